//! `diskmill map`: where guest data stands, in qemu-img's words.

use std::fs;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use diskmill::qcow2::is_metadata_preallocated;
use diskmill::{Allocation, Error, Extent, FormatInfo, Image, ImageFile, ImageInfo, Source};

use crate::args::{MapArgs, OutputForm};
use crate::exit::{Exit, Failure};
use crate::names::{FileNames, shown};

/// qemu-img's words for data that stands in no file as it is.
const WITHOUT_OFFSET: &str = "File contains external, encrypted or compressed clusters.";

/// A line of the map: what qemu-img tells of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    start: u64,
    length: u64,
    depth: u16,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
    /// Name of the file that the offset is in.
    file: Option<String>,
}

impl Entry {
    /// What qemu-img prints for a range that is empty.
    const fn nothing(start: u64) -> Self {
        Self {
            start,
            length: 0,
            depth: 0,
            present: false,
            zero: false,
            data: false,
            compressed: false,
            offset: None,
            file: None,
        }
    }

    /// Takes `next`, which follows, into this entry if they differ in nothing but their place.
    fn merge(&mut self, next: &Self) -> bool {
        let follows = Self {
            start: self.start + self.length,
            length: next.length,
            offset: self.offset.map(|offset| offset + self.length),
            ..self.clone()
        };
        let merged = follows == *next;
        if merged {
            self.length += next.length;
        }
        merged
    }

    fn json(&self) -> String {
        let Self { start, length, depth, present, zero, data, compressed, .. } = self;
        let offset = self.offset.map(|offset| format!(", \"offset\": {offset}")).unwrap_or_default();
        format!(
            "{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \
             \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}{offset}}}"
        )
    }
}

pub(crate) fn run(args: &MapArgs) -> Result<Exit, Failure> {
    let image = Image::open(&args.file, &args.open.options(args.format))?;
    print(&image, &args.file, args.start_offset, args.max_length, args.output.form()).map_err(
        |mut failure| {
            if let Some(message) = failure.message.as_mut().filter(|message| *message == WITHOUT_OFFSET) {
                message.push_str(" (--output json shows them)");
            }
            failure
        },
    )?;
    Ok(Exit::Done)
}

/// Prints the map of `image`, which the user calls `name`: from `start` on, at most `most` bytes.
pub(crate) fn print(
    image: &Image,
    name: &Path,
    start: u64,
    most: Option<u64>,
    form: OutputForm,
) -> Result<(), Failure> {
    let names = FileNames::new(image, name);
    let end = most.map_or(image.size(), |len| start.saturating_add(len)).min(image.size());
    let mut out = BufWriter::new(io::stdout().lock());
    let mut printer = match form {
        OutputForm::Human => Printer::Human,
        OutputForm::Json => Printer::Json { first: true },
    };
    printer.begin(&mut out)?;
    let walked = walk(image, &names, start..end, |entry| printer.entry(&mut out, entry));
    if walked.is_ok() {
        printer.end(&mut out)?;
    }
    // What came before damage is worth seeing, too.
    out.flush()?;
    walked
}

/// Calls `put` with each entry of `range`, adjacent ones merged.
fn walk(
    image: &Image,
    names: &FileNames,
    range: Range<u64>,
    mut put: impl FnMut(&Entry) -> Result<(), Failure>,
) -> Result<(), Failure> {
    if range.is_empty() {
        return put(&Entry::nothing(range.start));
    }
    let mut holes = Holes::new(image);
    // As in QEMU, encrypted data has no offset: what stands there is not what the guest sees.
    let encrypted: Vec<bool> = image.chain().map(|(_, info)| info.is_encrypted()).collect();
    let mut current: Option<Entry> = None;
    let mut at = range.start;
    while at < range.end {
        let mut extent = image.map(at, range.end - at).map_err(|error| error.error)?;
        let hole = holes.cut(&mut extent)?;
        at = extent.guest.end;
        let start = extent.guest.start;
        let (mut host, compressed) = match extent.source {
            Source::Raw { file, at } => (Some((file, at)), false),
            Source::Packed { .. } => (None, true),
            Source::Zero => (extent.zero_host, false),
        };
        if encrypted.get(usize::from(extent.depth)).is_some_and(|&encrypted| encrypted) {
            host = None;
        }
        let entry = Entry {
            start,
            length: extent.guest.end - start,
            depth: extent.depth,
            present: extent.present,
            zero: hole || extent.source == Source::Zero,
            data: extent.source != Source::Zero,
            compressed,
            offset: host.map(|(_, at)| at.get()),
            file: host.map(|(file, _)| names.get(file).to_owned()),
        };
        if !current.as_mut().is_some_and(|current| current.merge(&entry))
            && let Some(whole) = current.replace(entry)
        {
            put(&whole)?;
        }
    }
    current.iter().try_for_each(put)
}

/// Finds holes in clusters that are allocated only for their metadata: what QEMU looks for in images that were
/// preallocated, and only there.
struct Holes<'i> {
    image: &'i Image,
    /// For each layer, whether it was preallocated; not known before it is asked for.
    preallocated: Vec<Option<bool>>,
}

impl<'i> Holes<'i> {
    fn new(image: &'i Image) -> Self {
        Self { image, preallocated: vec![None; image.chain().len()] }
    }

    /// Cuts `extent` where a hole of its file begins or ends, and tells whether what is left is a hole.
    fn cut(&mut self, extent: &mut Extent) -> Result<bool, Failure> {
        let Source::Raw { file, at } = extent.source else { return Ok(false) };
        if !self.is_preallocated(extent.depth)? {
            return Ok(false);
        }
        let Some(file) = self.image.files().get(file.0 as usize) else { return Ok(false) };
        match file.storage.allocation(at.get()) {
            Ok(Some((kind, end))) => {
                let len = end.saturating_sub(at.get());
                extent.guest.end = extent.guest.end.min(extent.guest.start.saturating_add(len));
                Ok(kind == Allocation::Hole)
            }
            Ok(None) => Ok(true),
            Err(error) => Err(Failure::failed(format!("{:?}: cannot look for holes: {error}", file.path))),
        }
    }

    fn is_preallocated(&mut self, depth: u16) -> Result<bool, Error> {
        let depth = usize::from(depth);
        let Some(known) = self.preallocated.get_mut(depth) else { return Ok(false) };
        if let Some(known) = *known {
            return Ok(known);
        }
        let found = match self.image.chain().nth(depth) {
            Some((path, ImageInfo { specific: FormatInfo::Qcow2(qcow2), .. })) => {
                let file = self.image.files().iter().find(|file| file.path == path);
                let allocated = fs::metadata(path).map_or(0, |meta| meta.blocks().saturating_mul(512));
                let detect = |file: &ImageFile| is_metadata_preallocated(qcow2, &*file.storage, allocated);
                file.map(detect).transpose()?.unwrap_or(false)
            }
            _ => false,
        };
        *known = Some(found);
        Ok(found)
    }
}

enum Printer {
    Human,
    Json { first: bool },
}

impl Printer {
    fn begin(&self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Human => writeln!(out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to"),
            Self::Json { .. } => out.write_all(b"["),
        }
    }

    fn entry(&mut self, out: &mut impl Write, entry: &Entry) -> Result<(), Failure> {
        match self {
            Self::Human if !entry.data => {}
            Self::Human => {
                let Some(offset) = entry.offset else {
                    return Err(Failure::failed(WITHOUT_OFFSET));
                };
                if !entry.zero {
                    let columns = [entry.start, entry.length, offset].map(hex).concat();
                    writeln!(out, "{columns}{}", shown(entry.file.as_deref().unwrap_or_default()))?;
                }
            }
            Self::Json { first } => {
                let separator = if std::mem::take(first) { "" } else { ",\n" };
                write!(out, "{separator}{}", entry.json())?;
            }
        }
        Ok(())
    }

    fn end(&self, out: &mut impl Write) -> io::Result<()> {
        match self {
            Self::Human => Ok(()),
            Self::Json { .. } => out.write_all(b"]\n"),
        }
    }
}

/// C's `%#-16x`, which writes 0 without its prefix.
fn hex(value: u64) -> String {
    let digits = if value == 0 { "0".to_owned() } else { format!("{value:#x}") };
    format!("{digits:<16}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_merge_only_where_host_offsets_go_on() {
        let entry = |start, length, offset| Entry {
            length,
            offset,
            data: true,
            present: true,
            ..Entry::nothing(start)
        };
        let mut first = entry(0, 10, Some(100));
        assert!(!first.merge(&entry(10, 5, Some(111))));
        assert!(!first.merge(&entry(10, 5, None)));
        assert!(!first.merge(&Entry { depth: 1, ..entry(10, 5, Some(110)) }));
        assert!(first.merge(&entry(10, 5, Some(110))));
        assert_eq!(first, entry(0, 15, Some(100)));
        let mut without = entry(0, 10, None);
        assert!(without.merge(&entry(10, 5, None)));
    }

    #[test]
    fn numbers_are_in_columns() {
        assert_eq!([0, 0x10000].map(hex).concat(), "0               0x10000         ");
    }
}
