//! Moving what an overlay has into a file that it stands on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_format::Limits;

use super::payload::PayloadReader;
use super::{Preallocation, ZeroHow, follow_parent};
use crate::convert::Monitor;
use crate::error::{Error, Kind, Result};
use crate::image::{Depth, Image, ImageFile, OpenOptions, given};
use crate::layout::Source;
use crate::parallel::in_parallel;
use crate::probe::{Format, PROBE_BYTES};

/// Guest bytes that a thread copies at once; a multiple of all cluster sizes.
const STEP: u64 = 2 << 20;

/// How to commit.
#[derive(Debug, Clone, Default)]
pub struct CommitOptions {
    /// How to open the overlay; its chain must be allowed to be opened.
    pub open: OpenOptions,
    /// A file of the overlay's chain: it gets what all layers above it have. `None`: the overlay's own backing file.
    /// A relative path starts at the working directory, or else at the overlay's folder. The layers between then show
    /// something else than before, so that the overlay is not emptied.
    pub base: Option<PathBuf>,
    /// Leave the overlay as it is: for one that is thrown away. Only a qcow2 image is emptied anyway, as by QEMU.
    pub keep_overlay: bool,
}

/// The commit of an overlay, as `qemu-img commit` makes it.
///
/// ```no_run
/// use diskmill::convert::Monitor;
/// use diskmill::edit::{Commit, CommitOptions};
/// use diskmill::{Allow, OpenOptions, OpenPolicy};
///
/// # fn main() -> Result<(), diskmill::Error> {
/// let policy = OpenPolicy { allow: Allow::OwnTree, ..OpenPolicy::default() };
/// let open = OpenOptions { policy, ..OpenOptions::default() };
/// let commit = Commit::open("overlay.qcow2", &CommitOptions { open, ..CommitOptions::default() })?;
/// commit.run(&Monitor::new())
/// # }
/// ```
pub struct Commit {
    /// The overlay and all layers above the base.
    overlay: Image,
    base: Image,
    /// The overlay is to be emptied.
    empty: bool,
    /// Nobody named the format of the base.
    probed: bool,
    /// The overlay and the base are VMDKs and the overlay's file is open for writing: its descriptor names the base's CID.
    follows: Option<Limits>,
}

impl Commit {
    /// Opens the overlay at `path` and its base.
    ///
    /// # Errors
    /// As [`Image::open`]; [`Kind::Invalid`] if there is no backing file, or none of this name;
    /// [`Kind::Unsupported`] for a base that cannot be written to.
    pub fn open(path: impl AsRef<Path>, options: &CommitOptions) -> Result<Self> {
        Self::open_in(path.as_ref(), None, options)
    }

    /// The same of an overlay whose chain is in `files`, which the caller made, as for [`Image::from_storages`]:
    /// the overlay is the first of them.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`Image::from_storages`].
    pub fn from_storages(files: &[ImageFile], options: &CommitOptions) -> Result<Self> {
        let (path, open) = given(files, &options.open)?;
        Self::open_in(path, Some(files), &CommitOptions { open, ..options.clone() })
    }

    fn open_in(path: &Path, files: Option<&[ImageFile]>, options: &CommitOptions) -> Result<Self> {
        let depth = match &options.base {
            None => Depth::ToCommit,
            Some(base) => Depth::Above(candidates(path, base, files.is_some())),
        };
        let writable = !options.keep_overlay && options.base.is_none();
        let open = OpenOptions { writable, snapshot: None, ..options.open.clone() };
        let (overlay, base) = Image::open_part(path, files, &open, depth)?;
        let base = base.ok_or_else(|| match &options.base {
            Some(base) if overlay.info().backing_name.is_some() => Error::invalid(format!(
                "Did not find '{}' in the backing chain of '{}'",
                base.display(),
                path.display()
            )),
            _ => Error::invalid("Image does not have a backing file"),
        })?;
        let probed = !base.has_format();
        let limits = open.limits.clone();
        let base = base.open(files, &OpenOptions { writable: true, ..open })?;
        let empty = overlay.writer().is_some();
        let vmdks = [&overlay, &base].iter().all(|image| image.info().format == Format::Vmdk);
        let follows = (writable && vmdks).then_some(limits);
        Ok(Self { overlay, base, empty, probed, follows })
    }

    /// Copies what the overlay has into the base, which grows if it is shorter, makes that durable, and then empties
    /// the overlay. After an error or a crash the overlay is whole.
    ///
    /// Compressed clusters stay so where both have clusters of the same size and codecs of the same kind: they are
    /// unpacked, which shows that they are good, and taken over as they are. (`qemu-img` writes them uncompressed.)
    ///
    /// # Errors
    /// What reading and writing an image may give; `Cancelled` if `monitor` was cancelled. [`Kind::Denied`] if the base
    /// is raw only because it looks so, and would not any more.
    pub fn run(self, monitor: &Monitor) -> Result<()> {
        let Self { mut overlay, mut base, empty, probed, follows } = self;
        if probed && base.info().format == Format::Raw {
            stays_raw(&overlay)?;
        }
        if base.size() < overlay.size() {
            base.resize(overlay.size(), Preallocation::Off)?;
        }
        copy(&overlay, &base, monitor)?;
        let parent = base.files().first().map(|file| Arc::clone(&file.storage));
        base.close()?;
        if let (Some(limits), Some(child), Some(parent)) = (follows, overlay.files().first(), parent) {
            follow_parent(&child.storage, &parent, &limits)?;
        }
        if empty {
            overlay.edit_qcow2("contents", |writer| writer.make_empty())?;
        }
        overlay.close()
    }
}

/// The paths that `base` may mean: canonical ones, unless the files are `given`.
fn candidates(overlay: &Path, base: &Path, given: bool) -> Vec<PathBuf> {
    let beside = overlay.parent().map(|dir| dir.join(base));
    let place = |path: PathBuf| if given { Some(path) } else { path.canonicalize().ok() };
    [Some(base.to_owned()), beside].into_iter().flatten().filter_map(place).collect()
}

/// A guest that writes the header of another format to its first sectors must not have its raw base taken for that.
fn stays_raw(overlay: &Image) -> Result<()> {
    let mut start = vec![0; PROBE_BYTES];
    overlay.read_at(&mut start, 0)?;
    match Format::probe(&start) {
        Format::Raw => Ok(()),
        other => Err(Error::new(
            Kind::Denied,
            format!("the raw backing file, whose format is not named, would be taken for {other} afterwards"),
        )
        .hint("`rebase -u -F raw` names its format")),
    }
}

enum Piece {
    Data { at: u64, len: u64 },
    Zeros { at: u64, len: u64 },
}

fn copy(overlay: &Image, base: &Image, monitor: &Monitor) -> Result<()> {
    monitor.start(overlay.size());
    let mut at = 0;
    in_parallel(
        diskmill_io::cpus(),
        || next(overlay, &mut at, monitor),
        || (PayloadReader::new(overlay, base.takes_payloads()), Vec::new()),
        |piece, (reader, buf)| {
            let len = match piece {
                Piece::Data { at, len } => {
                    buf.resize(len as usize, 0);
                    let payloads = reader.read(buf, at)?;
                    if payloads.get(at).is_some() {
                        base.write_payloads(buf, at, payloads)?;
                    } else {
                        base.write_at(buf, at)?;
                    }
                    len
                }
                Piece::Zeros { at, len } => {
                    base.write_zeroes(at, len, ZeroHow::MayUnmap)?;
                    len
                }
            };
            monitor.add_done(len);
            Ok(())
        },
    )
}

/// The next piece of the disk from `at` on that the layers above the base decide.
fn next(overlay: &Image, at: &mut u64, monitor: &Monitor) -> Result<Option<Piece>> {
    let size = overlay.size();
    let last = overlay.chain().len() - 1;
    while *at < size {
        if monitor.is_cancelled() {
            return Err(Error::cancelled());
        }
        let here = *at;
        let extent = overlay.map(here, size - here).map_err(|error| error.error)?;
        let len = extent.guest.end - here;
        // A layer that is shorter than the one above it hides what is below.
        if !extent.present && usize::from(extent.depth) == last {
            *at = extent.guest.end;
            monitor.add_done(len);
            continue;
        }
        if extent.source == Source::Zero {
            *at = extent.guest.end;
            return Ok(Some(Piece::Zeros { at: here, len }));
        }
        let len = len.min(STEP - here % STEP);
        *at = here + len;
        return Ok(Some(Piece::Data { at: here, len }));
    }
    Ok(None)
}
