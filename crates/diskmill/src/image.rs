mod open;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use diskmill_crypt::Secret;
use diskmill_format::qcow2::Snapshot;
use diskmill_format::{GuestOffset, Limits};
use diskmill_io::{ImageLock, SharedStorage};

use self::open::Opener;
pub(crate) use self::open::{Base, Depth, resolve};
use crate::edit::Writer;
use crate::error::{Error, Result};
use crate::layout::{Extent, FileId, ImageInfo, LayerExtent, LayerSource, Layout, MapError, Source};
use crate::policy::OpenPolicy;
use crate::probe::Format;
use crate::qcow2::lossy;
use crate::raw::ZeroLayout;
use crate::reader::{Reader, Scratch};

/// Which internal snapshot to read instead of the active state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotRef {
    /// The one with this id, or else with this name.
    Any(String),
    /// The one with this id, this name, or both.
    Exact {
        /// Its id.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
    },
}

/// How to open an image.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// The format; probed where it is not given. A raw image whose guest is not trusted should be named as such: its
    /// first bytes are the guest's.
    pub format: Option<Format>,
    /// Which other files the image may name.
    pub policy: OpenPolicy,
    /// Upper bounds for the image's structures.
    pub limits: Limits,
    /// Read although another process may be writing (`-U`). Of an image that is [`writable`](Self::writable): this
    /// goes for its backing files alone.
    pub force_share: bool,
    /// Read this internal snapshot of the image itself (not of its backing files).
    pub snapshot: Option<SnapshotRef>,
    /// Bypass the page cache.
    pub direct: bool,
    /// Do not open the files that the image names: for looking at its metadata alone. Guest data cannot be read then.
    pub metadata_only: bool,
    /// Do not open the backing file or parent: where the image itself has nothing, it reads as zeros. Not for writing.
    pub no_backing: bool,
    /// Which disk of an OVA: its number, from 1, or one of its names. Needed only where there are several.
    pub disk: Option<String>,
    /// Read a VMDK delta although its parent was changed since (the CIDs differ).
    pub ignore_cid: bool,
    /// Passphrases for encrypted images of the chain; each image takes the first that fits.
    pub keys: Vec<Secret>,
    /// Open encrypted images of the chain without a passphrase: to see what they are and which files they name. Their guest
    /// data cannot be mapped or read then ([`Kind::Denied`](crate::Kind::Denied)). Not for writing.
    pub locked: bool,
    /// Open the image itself for writing too (never its backing files), and keep all others from writing to it.
    pub writable: bool,
}

/// A file that an image consists of.
#[derive(Debug, Clone)]
pub struct ImageFile {
    /// Where its bytes are.
    pub storage: SharedStorage,
    /// Its path, as far as there is one.
    pub path: PathBuf,
}

struct Layer {
    layout: Box<dyn Layout>,
    path: PathBuf,
    /// The last run and where it starts: a walk over a fragmented backing file comes back to one long run of the
    /// overlay for each of its own short ones. `None` for a layer that is written to.
    last: Option<Mutex<Option<(u64, LayerExtent)>>>,
}

impl Layer {
    fn map(&self, at: u64, max: u64) -> Result<LayerExtent, MapError> {
        let ask = || {
            self.layout
                .map(GuestOffset(at), max)
                .map_err(|MapError { error, len }| MapError { error: error.of(&self.path), len })
        };
        let Some(last) = &self.last else { return ask() };
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((start, run)) = &*last
            && let Some(skip) = at.checked_sub(*start).filter(|&skip| skip < run.len)
        {
            return Ok(run.advanced(skip));
        }
        let run = ask()?;
        *last = Some((at, run));
        Ok(run)
    }
}

/// An open image with its backing chain, for reading and, if it was opened so, for writing.
pub struct Image {
    layers: Vec<Layer>,
    files: Vec<ImageFile>,
    /// The part of the disk that is shown, if not all of it.
    window: Option<Window>,
    writer: Option<Box<dyn Writer>>,
    /// What readers of this image left for the next ones.
    scratch: Mutex<Vec<Scratch>>,
    /// Released when the image is dropped.
    _locks: Vec<ImageLock>,
}

impl Drop for Image {
    fn drop(&mut self) {
        // Whoever wants to know calls `close`.
        let _ = self.close_writer();
    }
}

/// A part of a disk: from `start` on `len` bytes, and then zeros up to whole sectors.
struct Window {
    start: u64,
    len: u64,
}

impl Window {
    fn size(&self) -> u64 {
        self.len.next_multiple_of(512)
    }

    /// The source bytes in `at..at + max`, given as their start in the disk and how many; `None` behind them.
    fn find(&self, at: u64, max: u64) -> Option<(u64, u64)> {
        let left = self.len.checked_sub(at).filter(|&left| left > 0)?;
        Some((self.start.saturating_add(at), left.min(max)))
    }
}

impl Image {
    /// Opens the image at `path`, and the files that it names if the policy allows.
    ///
    /// # Errors
    /// Any [`Kind`](crate::Kind) but `Cancelled`; the message names the file that is the trouble.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        Self::open_part(path.as_ref(), None, options, Depth::Whole).map(|(image, _)| image)
    }

    /// Opens the image and as much of its chain as `depth` says. What lies below shows as nothing: zeros that are not
    /// [`present`](Extent::present). Also returns the backing file that was left out, if there is one. Where files are
    /// `given`, there are no others, see [`from_storages`](Self::from_storages).
    pub(crate) fn open_part(
        path: &Path,
        given: Option<&[ImageFile]>,
        options: &OpenOptions,
        depth: Depth,
    ) -> Result<(Self, Option<Base>)> {
        Opener::new(options, given, depth).open(path)
    }

    /// Opens an image in `storage`, which the caller made; `path` only stands in messages. It may name no other file.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn from_storage(
        storage: SharedStorage,
        path: impl Into<PathBuf>,
        options: &OpenOptions,
    ) -> Result<Self> {
        Self::from_storages(&[ImageFile { storage, path: path.into() }], options)
    }

    /// Opens the image in the first of `files`, which the caller made. A file that an image names is the one among
    /// `files` with that path, which counts from the folder of the image that names it; there are no others.
    /// Nothing is locked.
    ///
    /// # Errors
    /// As [`Image::open`]; [`Kind::Denied`](crate::Kind::Denied) for a name that is not among them.
    pub fn from_storages(files: &[ImageFile], options: &OpenOptions) -> Result<Self> {
        let (path, options) = given(files, options)?;
        Self::open_part(path, Some(files), &options, Depth::Whole).map(|(image, _)| image)
    }

    /// A disk of `size` zero bytes, made of nothing.
    #[must_use]
    pub fn zeros(size: u64) -> Self {
        Self::of_layers([ZeroLayout::new(size, true)])
    }

    /// A disk of `size` bytes that has nothing in it, over one of zeros.
    pub(crate) fn blank(size: u64) -> Self {
        Self::of_layers([ZeroLayout::new(size, false), ZeroLayout::new(size, true)])
    }

    fn of_layers<const N: usize>(layouts: [ZeroLayout; N]) -> Self {
        let layer = |layout| Layer { layout: Box::new(layout), path: PathBuf::new(), last: None };
        let layers = layouts.into_iter().map(layer).collect();
        Self {
            layers,
            files: Vec::new(),
            window: None,
            writer: None,
            scratch: Mutex::default(),
            _locks: Vec::new(),
        }
    }

    /// Size of the disk that the guest sees, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.window.as_ref().map_or(self.info().virtual_size, Window::size)
    }

    /// Shows only `len` bytes of the disk, from `start` on: its new first byte. Where that ends inside a sector of 512
    /// bytes, zeros fill it up. [`Image::info`] tells of the whole disk as before.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) if the range reaches past the end of the disk, or only a part of it is shown
    /// already; [`Kind::Unsupported`](crate::Kind::Unsupported) for an image that is open for writing.
    pub fn into_window(mut self, start: u64, len: u64) -> Result<Self> {
        if self.writer.is_some() {
            return Err(Error::unsupported("writing to a part of a disk"));
        }
        if start.checked_add(len).is_none_or(|end| end > self.size()) || self.window.is_some() {
            return Err(Error::invalid(format!(
                "{len} bytes from {start} on reach past the end of the disk"
            )));
        }
        self.window = Some(Window { start, len });
        Ok(self)
    }

    /// Facts about the image itself.
    #[must_use]
    #[expect(clippy::indexing_slicing, reason = "no image is made without a layer")]
    pub fn info(&self) -> &ImageInfo {
        self.layers[0].layout.info()
    }

    /// Facts about each layer with its path: the image itself, its backing file, and so on.
    pub fn chain(&self) -> impl ExactSizeIterator<Item = (&Path, &ImageInfo)> {
        self.layers.iter().map(|layer| (layer.path.as_path(), layer.layout.info()))
    }

    /// The files that [`FileId`]s stand for.
    #[must_use]
    pub fn files(&self) -> &[ImageFile] {
        &self.files
    }

    pub(crate) fn file(&self, id: FileId) -> Result<&ImageFile> {
        self.files.get(id.0 as usize).ok_or_else(|| Error::invalid("a file id of another image"))
    }

    /// Guest bytes in the largest packed unit of any layer, or 0.
    pub(crate) fn packed_unit(&self) -> u64 {
        self.layers.iter().map(|layer| layer.layout.info().packed_unit).max().unwrap_or(0)
    }

    /// Where the guest bytes from `at` on come from: one run of at most `max` bytes.
    ///
    /// # Errors
    /// [`MapError`] where a table of some layer is damaged, or `at` is past the end of the disk.
    pub fn map(&self, at: u64, max: u64) -> Result<Extent, MapError> {
        let Some(left) = self.size().checked_sub(at).filter(|&left| left > 0 && max > 0) else {
            return Err(MapError {
                error: Error::invalid("an offset past the end of the disk"),
                len: max.max(1),
            });
        };
        let max = max.min(left);
        let Some(window) = &self.window else { return self.map_whole(at, max) };
        let Some((inside, len)) = window.find(at, max) else {
            let guest = at..at + max;
            return Ok(Extent { guest, source: Source::Zero, depth: 0, present: true, zero_host: None });
        };
        let extent = self.map_whole(inside, len)?;
        Ok(Extent { guest: at..at + (extent.guest.end - extent.guest.start), ..extent })
    }

    /// [`Image::map`] of the whole disk, for a run that lies in it.
    fn map_whole(&self, at: u64, max: u64) -> Result<Extent, MapError> {
        let mut len = max;
        for (depth, layer) in (0u16..).zip(&self.layers) {
            let found = layer.map(at, len)?;
            len = len.min(found.len);
            let answer = |source, present, zero_host| Extent {
                guest: at..at + len,
                source,
                depth,
                present,
                zero_host,
            };
            match found.source {
                LayerSource::Data(source) => return Ok(answer(source, true, None)),
                LayerSource::Zero(host) => return Ok(answer(Source::Zero, true, host)),
                LayerSource::Unallocated | LayerSource::Reserved(_) => {
                    let host = match found.source {
                        LayerSource::Reserved(host) => Some(host),
                        _ => None,
                    };
                    let below = self
                        .layers
                        .get(usize::from(depth) + 1)
                        .map_or(0, |next| next.layout.info().virtual_size);
                    // Past the end of a shorter backing file there is nothing: zeros.
                    match below.checked_sub(at).filter(|&left| left > 0) {
                        Some(left) => len = len.min(left),
                        None => return Ok(answer(Source::Zero, false, host)),
                    }
                }
            }
        }
        Err(MapError { error: Error::invalid("an image without layers"), len })
    }

    /// As [`map`](Self::map), of the image itself without its backing chain.
    pub(crate) fn map_top(&self, at: u64, max: u64) -> Result<LayerExtent, MapError> {
        match self.layers.first() {
            Some(layer) => layer.map(at, max),
            None => Err(MapError { error: Error::invalid("an image without layers"), len: max }),
        }
    }

    /// Damage of the upper layer that mapping has got around until now.
    pub(crate) fn bypassed(&self) -> Vec<String> {
        self.layers.first().map_or_else(Vec::new, |layer| layer.layout.bypassed())
    }

    /// All runs of `range`, in order. Stops after the first error.
    pub fn extents(&self, range: Range<u64>) -> impl Iterator<Item = Result<Extent>> + '_ {
        let mut at = range.start;
        let end = range.end.min(self.size());
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            match self.map(at, end - at) {
                Ok(extent) => {
                    at = extent.guest.end;
                    Some(Ok(extent))
                }
                Err(error) => {
                    at = end;
                    Some(Err(error.error))
                }
            }
        })
    }

    /// What is doubtful about the image and its backing chain and was read all the same, for people. Reading guest
    /// data may add to it.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let of_layer = |layer: &Layer| {
            let path = layer.path.clone();
            layer.layout.warnings().into_iter().map(move |text| format!("{path:?}: {text}"))
        };
        self.layers.iter().flat_map(of_layer).collect()
    }

    /// A reader of guest bytes. Make one per thread.
    #[must_use]
    pub fn reader(&self) -> Reader<'_> {
        Reader::new(self, Scratch::default())
    }

    pub(crate) fn writer(&self) -> Option<&dyn Writer> {
        self.writer.as_deref()
    }

    /// Packed payloads that were written since the image was opened.
    pub(crate) fn payloads_written(&self) -> u64 {
        self.writer().and_then(Writer::qcow2).map_or(0, |writer| writer.payloads_written())
    }

    /// Makes `layout` what the image itself has.
    pub(crate) fn replace_top(&mut self, layout: Box<dyn Layout>) {
        if let Some(top) = self.layers.first_mut() {
            top.layout = layout;
        }
    }

    /// Closes the writer, if there is one, for good.
    pub(crate) fn close_writer(&mut self) -> Result<()> {
        self.writer.take().map_or(Ok(()), |writer| self.named(writer.close()))
    }

    /// The same result, with the image named in its error.
    pub(crate) fn named<T>(&self, result: Result<T>) -> Result<T> {
        match self.layers.first() {
            Some(layer) => result.map_err(|error| error.of(&layer.path)),
            None => result,
        }
    }

    /// Fills `buf` with the guest bytes from `at` on. The caller keeps writers away from them.
    pub(crate) fn read_unlocked(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let pool = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = pool().pop().unwrap_or_default();
        let mut reader = Reader::new(self, scratch);
        let done = reader.read_unlocked(buf, at);
        pool().push(reader.into_scratch());
        done
    }

    /// Whether a table look-up alone tells that all of `range` reads as zeros.
    pub(crate) fn reads_as_zeros(&self, range: Range<u64>) -> Result<bool> {
        let mut at = range.start;
        let end = range.end.min(self.size());
        while at < end {
            let extent = self.map(at, end - at).map_err(|error| error.error)?;
            if extent.source != Source::Zero {
                return Ok(false);
            }
            at = extent.guest.end;
        }
        Ok(true)
    }
}

/// The path of the image that `files` are, and the options to open it with: no policy is asked about files that the
/// caller gave.
pub(crate) fn given<'f>(files: &'f [ImageFile], options: &OpenOptions) -> Result<(&'f Path, OpenOptions)> {
    let first = files.first().ok_or_else(|| Error::invalid("an image without a file"))?;
    Ok((&first.path, OpenOptions { policy: OpenPolicy::default(), ..options.clone() }))
}

pub(crate) fn find_snapshot<'s>(snapshots: &'s [Snapshot], wanted: &SnapshotRef) -> Result<&'s Snapshot> {
    let is = |field: &[u8], text: &String| field == text.as_bytes();
    let found = match wanted {
        SnapshotRef::Any(text) => {
            let by_id = snapshots.iter().find(|snapshot| is(&snapshot.id, text));
            by_id.or_else(|| snapshots.iter().find(|snapshot| is(&snapshot.name, text)))
        }
        SnapshotRef::Exact { id, name } => snapshots.iter().find(|snapshot| {
            id.as_ref().is_none_or(|id| is(&snapshot.id, id))
                && name.as_ref().is_none_or(|name| is(&snapshot.name, name))
        }),
    };
    found.ok_or_else(|| {
        let names: Vec<String> = snapshots.iter().map(|snapshot| lossy(&snapshot.name)).collect();
        let hint =
            if names.is_empty() { "it has none".to_owned() } else { format!("it has: {}", names.join(", ")) };
        Error::invalid(format!("the image has no snapshot {}", describe_snapshot(wanted))).hint(hint)
    })
}

fn describe_snapshot(wanted: &SnapshotRef) -> String {
    match wanted {
        SnapshotRef::Any(text) => format!("{text:?}"),
        SnapshotRef::Exact { id, name } => {
            let parts = [
                id.as_ref().map(|id| format!("with id {id:?}")),
                name.as_ref().map(|name| format!("named {name:?}")),
            ];
            parts.into_iter().flatten().collect::<Vec<_>>().join(" ")
        }
    }
}
