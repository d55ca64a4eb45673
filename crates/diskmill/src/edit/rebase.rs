//! Giving an image another backing file.

use std::ops::Range;
use std::path::{Path, PathBuf};

use diskmill_codec::is_zero;

use super::ZeroHow;
use super::payload::PayloadReader;
use crate::convert::Monitor;
use crate::error::{Error, Result};
use crate::image::{Depth, Image, ImageFile, OpenOptions, given, resolve};
use crate::layout::{Extent, FormatInfo, LayerSource, Source};
use crate::parallel::in_parallel;
use crate::probe::Format;

/// Guest bytes that a thread compares at once; a multiple of all cluster sizes.
const STEP: u64 = 2 << 20;

/// What becomes of the guest's disk when its backing file is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RebaseMode {
    /// It stays as it is: what the new backing file has otherwise is copied into the image.
    #[default]
    Safe,
    /// Only the name changes, neither backing file is opened: for backing files that were moved or renamed.
    Unsafe,
}

/// The change of an image's backing file, as `qemu-img rebase` makes it.
///
/// ```no_run
/// use diskmill::convert::Monitor;
/// use diskmill::edit::{Rebase, RebaseMode};
/// use diskmill::{Allow, OpenOptions, OpenPolicy};
///
/// # fn main() -> Result<(), diskmill::Error> {
/// let policy = OpenPolicy { allow: Allow::OwnTree, ..OpenPolicy::default() };
/// let mut rebase = Rebase::open(
///     "overlay.qcow2",
///     &OpenOptions { policy, ..OpenOptions::default() },
///     RebaseMode::Safe,
/// )?;
/// rebase.onto("other-base.qcow2", None)?;
/// rebase.run(&Monitor::new())
/// # }
/// ```
pub struct Rebase {
    image: Image,
    /// Where the image's files are, see [`places`].
    files: Vec<PathBuf>,
    path: PathBuf,
    /// All files that there are, if the caller gave storages instead of a path.
    given: Option<Vec<ImageFile>>,
    options: OpenOptions,
    mode: RebaseMode,
    /// What is copied is compressed.
    compress: bool,
    /// Name and format, as the image will have them.
    backing: Option<(String, Format)>,
    /// The new backing file with its chain and their files, unless the mode is unsafe.
    new: Option<(Image, Vec<PathBuf>)>,
}

impl Rebase {
    /// Opens the image at `path` for writing, with its present backing file if the mode is safe. Without
    /// [`onto`](Self::onto) it will have none.
    ///
    /// # Errors
    /// As [`Image::open`]; [`Kind::Unsupported`](crate::Kind::Unsupported) for formats other than qcow2.
    pub fn open(path: impl Into<PathBuf>, options: &OpenOptions, mode: RebaseMode) -> Result<Self> {
        Self::open_in(path.into(), None, options, mode)
    }

    /// The same of an image whose chain, the new one included, is in `files`, which the caller made, as for
    /// [`Image::from_storages`]: the image is the first of them.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`Image::from_storages`].
    pub fn from_storages(files: &[ImageFile], options: &OpenOptions, mode: RebaseMode) -> Result<Self> {
        let (path, options) = given(files, options)?;
        Self::open_in(path.to_owned(), Some(files.to_vec()), &options, mode)
    }

    fn open_in(
        path: PathBuf,
        given: Option<Vec<ImageFile>>,
        options: &OpenOptions,
        mode: RebaseMode,
    ) -> Result<Self> {
        let options = OpenOptions { writable: true, snapshot: None, ..options.clone() };
        let depth = match mode {
            RebaseMode::Safe => Depth::ToRebase,
            RebaseMode::Unsafe => Depth::Alone,
        };
        let (image, _) = Image::open_part(&path, given.as_deref(), &options, depth)?;
        let format = image.info().format;
        if format != Format::Qcow2 {
            return Err(
                Error::unsupported(format!("changing the backing file of a {format} image")).of(&path)
            );
        }
        let files = places(&image, given.is_some());
        Ok(Self { image, files, path, given, options, mode, compress: false, backing: None, new: None })
    }

    /// Has what is copied become compressed clusters, see [`Image::write_compressed`]. What is compressed already, in
    /// clusters of the same size and by a codec of the same kind, is taken over as it is once it was unpacked and found
    /// good.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) for an image that cannot have them.
    pub fn compress(&mut self) -> Result<()> {
        self.compress = true;
        self.image.edit_qcow2("clusters", |writer| writer.takes_packed())
    }

    /// Names the new backing file as the image will: relative to the image's folder. Without a format the one that the
    /// file seems to have is recorded.
    ///
    /// # Errors
    /// As [`Image::open`] of the new backing file; [`Kind::Invalid`](crate::Kind::Invalid) if the mode is unsafe and
    /// there is no format.
    pub fn onto(&mut self, name: &str, format: Option<Format>) -> Result<()> {
        let format = match (self.mode, format) {
            (RebaseMode::Unsafe, Some(format)) => format,
            (RebaseMode::Unsafe, None) => {
                return Err(Error::invalid("the backing file needs a format: it is not looked at"));
            }
            (RebaseMode::Safe, format) => {
                let path = resolve(name.as_bytes(), &self.path, "backing file")?;
                let options = OpenOptions { format, writable: false, ..self.options.clone() };
                let (new, _) = Image::open_part(&path, self.given.as_deref(), &options, Depth::Whole)?;
                let format = new.info().format;
                let files = places(&new, self.given.is_some());
                // On a file system its lock has said so already.
                if self.files.first().is_some_and(|own| files.contains(own)) {
                    return Err(Error::invalid(format!("{name:?} stands on the image itself")));
                }
                self.new = Some((new, files));
                format
            }
        };
        self.backing = Some((name.to_owned(), format));
        Ok(())
    }

    /// Copies what has to be copied, and then changes the name. A crash leaves the image with its old or its new
    /// backing file, and the guest's disk as it was (unless the mode is unsafe).
    ///
    /// # Errors
    /// What reading and writing an image may give; `Cancelled` if `monitor` was cancelled: the image is still over its
    /// old backing file then, and may have grown.
    pub fn run(mut self, monitor: &Monitor) -> Result<()> {
        if self.mode == RebaseMode::Safe {
            self.copy(monitor)?;
        }
        let (name, format) = match &self.backing {
            Some((name, format)) => (Some(name.as_str()), Some(format.name())),
            None => (None, None),
        };
        // The name changes when all that was copied is durable.
        self.image.edit_qcow2("backing file", |writer| writer.set_backing(name, format))?;
        self.image.close()
    }

    fn copy(&self, monitor: &Monitor) -> Result<()> {
        let FormatInfo::Qcow2(info) = &self.image.info().specific else { return Ok(()) };
        let header = &info.area.header;
        let geometry = header.geometry;
        let unit = if self.compress { geometry.cluster_size() } else { geometry.subcluster_size() };
        let zeros_need_data = header.version < 3;
        monitor.start(self.image.size());
        let mut at = 0;
        in_parallel(
            diskmill_io::cpus(),
            || self.next(&mut at, unit, monitor),
            || {
                let fits = self.image.takes_payloads().filter(|_| self.compress);
                let new = self.new.as_ref().map(|(image, _)| image.reader());
                (PayloadReader::new(&self.image, fits), new, [Vec::new(), Vec::new()])
            },
            |piece: Range<u64>, (old, new, bufs)| {
                let len = (piece.end - piece.start) as usize;
                bufs.iter_mut().for_each(|buf| buf.resize(len, 0));
                let [was, is] = bufs;
                let payloads = old.read(was, piece.start)?;
                match new {
                    Some(new) => new.read_at(is, piece.start)?,
                    None => is.fill(0),
                }
                for (run, zero) in differing(was, is, unit as usize) {
                    let guest = piece.start + run.start as u64;
                    let bytes = was.get(run).unwrap_or_default();
                    if zero && !zeros_need_data {
                        self.image.write_zeroes(guest, bytes.len() as u64, ZeroHow::MayUnmap)?;
                    } else if self.compress {
                        self.image.write_payloads(bytes, guest, payloads)?;
                    } else {
                        self.image.write_at(bytes, guest)?;
                    }
                }
                monitor.add_done(len as u64);
                Ok(())
            },
        )
    }

    /// The next guest bytes from `at` on that the image does not have itself and that may be other ones in the new
    /// backing file: whole units.
    fn next(&self, at: &mut u64, unit: u64, monitor: &Monitor) -> Result<Option<Range<u64>>> {
        let size = self.image.size();
        while *at < size {
            if monitor.is_cancelled() {
                return Err(Error::cancelled());
            }
            let here = *at;
            let own = self.image.map_top(here, size - here).map_err(|error| error.error)?;
            let skipped = match own.source {
                LayerSource::Unallocated | LayerSource::Reserved(_) => {
                    let (len, same) = self.compare_maps(here, own.len)?;
                    if !same {
                        let start = here / unit * unit;
                        let end = (here + len).next_multiple_of(unit).min((here / STEP + 1) * STEP);
                        *at = end.min(size);
                        return Ok(Some(start..*at));
                    }
                    len
                }
                _ => own.len,
            };
            *at = here + skipped;
            monitor.add_done(skipped);
        }
        Ok(None)
    }

    /// Whether a look at the maps alone tells that old and new backing file have the same from `at` on, and how many
    /// bytes, at most `max`, that goes for.
    fn compare_maps(&self, at: u64, max: u64) -> Result<(u64, bool)> {
        let map = |image: &Image| -> Result<Extent> { image.map(at, max).map_err(|error| error.error) };
        let old = map(&self.image)?;
        let new = match &self.new {
            Some((new, _)) if at < new.size() => Some(map(new)?),
            // Past its end a backing file reads as zeros.
            _ => None,
        };
        let len = old.guest.end.min(new.as_ref().map_or(u64::MAX, |new| new.guest.end)) - at;
        let same = match (&self.new, &new) {
            (Some((_, files)), Some(new)) => {
                same_place(place(&self.files, &old.source), place(files, &new.source))
            }
            _ => old.source == Source::Zero,
        };
        Ok((len, same))
    }
}

/// The paths of an image's files: canonical ones, unless the files were `given`.
fn places(image: &Image, given: bool) -> Vec<PathBuf> {
    let real = |path: &PathBuf| path.canonicalize().ok().filter(|_| !given);
    let place = |file: &ImageFile| real(&file.path).unwrap_or_else(|| file.path.clone());
    image.files().iter().map(place).collect()
}

/// A source with the path of its file, by which it can be told among those of other images.
fn place<'f>(files: &'f [PathBuf], source: &Source) -> (Source, Option<&'f Path>) {
    let file = match source {
        Source::Zero => None,
        Source::Raw { file, .. } | Source::Packed { file, .. } => files.get(file.0 as usize),
    };
    (*source, file.map(PathBuf::as_path))
}

/// Whether two sources are the same place.
fn same_place(one: (Source, Option<&Path>), other: (Source, Option<&Path>)) -> bool {
    let alike = match (one.0, other.0) {
        (Source::Zero, Source::Zero) => true,
        (Source::Raw { at, .. }, Source::Raw { at: other, .. }) => at == other,
        (
            Source::Packed { at, len, skip, .. },
            Source::Packed { at: other, len: other_len, skip: other_skip, .. },
        ) => (at, len, skip) == (other, other_len, other_skip),
        _ => false,
    };
    alike && one.1 == other.1
}

/// The runs of whole units (the last one may be cut) in which `was` and `is` differ, and whether `was` is zeros there.
fn differing(was: &[u8], is: &[u8], unit: usize) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let mut at = 0;
    for (was, is) in was.chunks(unit).zip(is.chunks(unit)) {
        let range = at..at + was.len();
        at = range.end;
        if was == is {
            continue;
        }
        let zero = is_zero(was);
        match runs.last_mut() {
            Some((last, kind)) if last.end == range.start && *kind == zero => last.end = range.end,
            _ => runs.push((range, zero)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_units_that_differ() {
        let was = [1, 1, 1, 1, 0, 0, 0, 0, 2, 2, 3];
        let is = [1, 1, 1, 9, 0, 9, 9, 9, 2, 2, 4];
        assert_eq!(differing(&was, &is, 2), [(2..4, false), (4..8, true), (10..11, false)]);
        assert_eq!(differing(&was, &was, 2), []);
    }
}
