use std::collections::HashMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use diskmill_crypt::Secret;
use diskmill_format::qcow2::{CryptMethod, Snapshot, feature};
use diskmill_format::{GuestOffset, Limits};
use diskmill_io::{FileStorage, ImageLock, LockError, LockMode, OpenHow, SharedStorage};

use crate::edit::{Qcow2Writer, RawWriter, Writer};
use crate::encrypted::{EncryptedStorage, LegacyAesLayout, legacy_aes, unlock};
use crate::error::{Error, Kind, Result};
use crate::layout::{
    Extent, FileId, FormatInfo, ImageInfo, LayerExtent, LayerSource, Layout, MapError, Source,
};
use crate::policy::{Allow, EXTENT, OpenPolicy};
use crate::probe::{Format, PROBE_BYTES};
use crate::qcow2::{FileLen, Files, Qcow2Info, Qcow2Layout, lossy};
use crate::raw::{FileRuns, RawLayout, ZeroLayout};
use crate::reader::{Reader, Scratch, read_full};
use crate::tables::TableCache;
use crate::vmdk::{ExtentFile, Parent, VmdkLayout};

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
    /// Read although another process may be writing (`-U`).
    pub force_share: bool,
    /// Read this internal snapshot of the image itself (not of its backing files).
    pub snapshot: Option<SnapshotRef>,
    /// Bypass the page cache.
    pub direct: bool,
    /// Do not open the files that the image names: for looking at its metadata alone. Guest data cannot be read then.
    pub metadata_only: bool,
    /// Which disk of an OVA: its number, from 1, or one of its names. Needed only where there are several.
    pub disk: Option<String>,
    /// Read a VMDK delta although its parent was changed since (the CIDs differ).
    pub ignore_cid: bool,
    /// Passphrases for encrypted images of the chain; each image takes the first that fits.
    pub keys: Vec<Secret>,
    /// Open the image itself for writing too (never its backing files), and keep all others from writing to it.
    pub writable: bool,
}

/// A file that an image consists of.
#[derive(Debug)]
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
    /// Any [`Kind`] but `Cancelled`; the message names the file that is the trouble.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        Opener::new(options).open(path.as_ref())
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
        let options = OpenOptions { policy: OpenPolicy::default(), ..options.clone() };
        let path = path.into();
        let mut opener = Opener::new(&options);
        let next =
            opener.layer(storage, path.clone(), options.format, options.snapshot.as_ref(), Path::new(""))?;
        if let Some(next) = next {
            let path = next.path;
            return Err(Error::new(Kind::Denied, format!("the backing file {path:?} is not opened")));
        }
        Ok(opener.image)
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
    /// [`Kind::Invalid`] if the range reaches past the end of the disk.
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

/// What the next layer of a chain is.
struct Next {
    path: PathBuf,
    format: Option<Format>,
    /// The CID that it must have, if it is a VMDK's parent.
    cid: Option<u32>,
}

struct Opener<'a> {
    options: &'a OpenOptions,
    image: Image,
    /// Device and inode of each file, to find loops.
    seen: Vec<(u64, u64)>,
    /// Bytes of all layers' snapshot tables: each is bounded, and so is their sum.
    snapshot_bytes: u64,
    /// The disk is inside an archive, and so cannot name files.
    archived: bool,
}

impl<'a> Opener<'a> {
    fn new(options: &'a OpenOptions) -> Self {
        let image = Image {
            layers: Vec::new(),
            files: Vec::new(),
            window: None,
            writer: None,
            scratch: Mutex::default(),
            _locks: Vec::new(),
        };
        Self { options, image, seen: Vec::new(), snapshot_bytes: 0, archived: false }
    }

    fn open(mut self, path: &Path) -> Result<Image> {
        let root = path.canonicalize().map_err(|error| Error::io("cannot open", error).of(path))?;
        let root = root.parent().unwrap_or(Path::new("/")).to_owned();
        let mut next = Next { path: path.to_owned(), format: self.options.format, cid: None };
        loop {
            let top = self.image.layers.is_empty();
            if self.image.layers.len() >= usize::from(self.options.limits.chain_depth) {
                let depth = self.options.limits.chain_depth;
                return Err(Error::new(
                    Kind::Limit,
                    format!("the backing chain has more than {depth} layers"),
                )
                .of(path));
            }
            let storage = self.open_file(&next.path, (!top).then_some((root.as_path(), "backing file")))?;
            let snapshot = self.options.snapshot.as_ref().filter(|_| top);
            let (here, cid) = (next.path.clone(), next.cid);
            let below = self
                .layer(storage, next.path, next.format, snapshot, &root)
                .map_err(|error| error.of(&here))?;
            self.check_cid(cid).map_err(|error| error.of(&here))?;
            match below {
                Some(below) => next = below,
                None => return Ok(self.image),
            }
        }
    }

    /// Opens and locks a file. One that an image in this tree `named` as that is checked against the policy again now that
    /// nobody can exchange it.
    fn open_file(&mut self, path: &Path, named: Option<(&Path, &str)>) -> Result<SharedStorage> {
        let writable = self.writable();
        let how = OpenHow { read: true, write: writable, direct: self.options.direct, ..OpenHow::default() };
        let storage =
            FileStorage::open(path, &how).map_err(|error| Error::io("cannot open", error).of(path))?;
        let meta = storage.file().metadata().map_err(|error| Error::io("cannot open", error).of(path))?;
        if let Some((root, what)) = named {
            // Without /proc there is still its kind to look at.
            let real = std::fs::read_link(format!("/proc/self/fd/{}", storage.file().as_raw_fd()));
            let real = real.unwrap_or_else(|_| path.to_owned());
            self.options.policy.check_open(&real, &meta, root, what)?;
        }
        let identity = (meta.dev(), meta.ino());
        if self.seen.contains(&identity) {
            return Err(Error::corrupt("backing chain", None, "it comes back to this file: a loop").of(path));
        }
        self.seen.push(identity);
        let storage: SharedStorage = Arc::new(storage);
        let mode = match () {
            () if writable => LockMode::Writer,
            () if self.options.force_share => LockMode::Shared,
            () => LockMode::Reader,
        };
        match ImageLock::acquire(&storage, mode) {
            Ok(lock) => self.image._locks.push(lock),
            Err(LockError::Io(error)) => return Err(Error::io("cannot lock", error).of(path)),
            Err(conflict) => return Err(Error::new(Kind::Busy, conflict.to_string()).of(path)),
        }
        Ok(storage)
    }

    /// Whether what is opened now belongs to the image itself, and that is to be written to.
    fn writable(&self) -> bool {
        self.options.writable && self.image.layers.is_empty()
    }

    fn file_id(&mut self, storage: &SharedStorage, path: &Path) -> FileId {
        self.image.files.push(ImageFile { storage: Arc::clone(storage), path: path.to_owned() });
        // Bounded by the chain's depth.
        FileId((self.image.files.len() - 1) as u32)
    }

    /// Adds a layer, and tells which one comes below it.
    fn layer(
        &mut self,
        storage: SharedStorage,
        path: PathBuf,
        format: Option<Format>,
        snapshot: Option<&SnapshotRef>,
        root: &Path,
    ) -> Result<Option<Next>> {
        let format = match format {
            Some(format) => format,
            None => {
                let mut start = vec![0; PROBE_BYTES];
                let got = read_full(&*storage, &mut start, 0)?;
                let start = start.get(..got).unwrap_or_default();
                match Format::probe(start) {
                    // Only the image that the user named is called what the user called it.
                    Format::Raw if self.image.layers.is_empty() && crate::ova::is_called(&path, start) => {
                        Format::Ova
                    }
                    probed => probed,
                }
            }
        };
        let id = self.file_id(&storage, &path);
        let writable = self.writable();
        if writable && (snapshot.is_some() || self.options.metadata_only || self.options.force_share) {
            return Err(Error::invalid("a snapshot, or an image that is shared, cannot be written to"));
        }
        let (layout, next): (Box<dyn Layout>, _) = match format {
            Format::Raw if snapshot.is_some() => return Err(Error::invalid("a raw image has no snapshots")),
            Format::Raw if writable => {
                let writer = RawWriter::open(Arc::clone(&storage))?;
                let runs = FileRuns::changing(storage, id, writer.shared_len());
                self.image.writer = Some(Box::new(writer));
                (Box::new(RawLayout::of(runs)?), None)
            }
            Format::Raw => (Box::new(RawLayout::new(storage, id)?), None),
            Format::Qcow2 => self.qcow2(storage, id, &path, snapshot, root)?,
            _ if snapshot.is_some() => {
                return Err(Error::invalid(format!("{format} has no internal snapshots")));
            }
            Format::Vmdk | Format::Ova if writable => {
                return Err(Error::unsupported(format!("writing to {format} images")));
            }
            Format::Vmdk => {
                let (layout, next) = self.vmdk(&storage, id, &path, root)?;
                (Box::new(layout), next)
            }
            Format::Ova => return self.ova(&storage, path, root),
        };
        let last = (!writable).then(|| Mutex::new(None));
        self.image.layers.push(Layer { layout, path, last });
        Ok(next)
    }

    fn qcow2(
        &mut self,
        storage: SharedStorage,
        id: FileId,
        path: &Path,
        snapshot: Option<&SnapshotRef>,
        root: &Path,
    ) -> Result<(Box<dyn Layout>, Option<Next>)> {
        let read = Qcow2Info::read(&*storage, &self.options.limits)?;
        let held =
            |snapshot: &Snapshot| (size_of::<Snapshot>() + snapshot.id.len() + snapshot.name.len()) as u64;
        self.snapshot_bytes += read.snapshots.iter().map(held).sum::<u64>();
        if self.snapshot_bytes > self.options.limits.qcow2_snapshot_table_bytes {
            return Err(Error::new(
                Kind::Limit,
                "the snapshot tables of the backing chain are too large together",
            ));
        }
        let header = &read.area.header;
        let len = storage.len().map_err(|error| Error::io("cannot tell the size", error))?;
        let snapshot = snapshot.map(|wanted| find_snapshot(&read.snapshots, wanted)).transpose()?.cloned();
        let data = if header.has(feature::DATA_FILE) && !self.options.metadata_only {
            let Some(name) = &read.area.extensions.data_file else {
                return Err(Error::corrupt(
                    "qcow2 header",
                    Some(0),
                    "the name of the external data file is missing",
                ));
            };
            if self.archived {
                return Err(Error::unsupported("an external data file of a disk inside an archive"));
            }
            let named = resolve(name, path, "external data file")?;
            let data_path = self.options.policy.check(&named, root, "external data file")?;
            let data = self.open_file(&data_path, Some((root, "external data file")))?;
            let len = data.len().map_err(|error| Error::io("cannot tell the size", error).of(&data_path))?;
            Some((data, data_path, len))
        } else {
            None
        };
        let backing_format = read.area.extensions.backing_format.as_deref().map(lossy);
        let next = match &read.area.backing_name {
            Some(name) if !self.options.metadata_only => {
                let named = resolve(name, path, "backing file")?;
                let format =
                    backing_format.as_deref().filter(|name| !name.is_empty()).map(str::parse).transpose()?;
                Some(Next {
                    path: self.options.policy.check(&named, root, "backing file")?,
                    format,
                    cid: None,
                })
            }
            _ => None,
        };
        let crypt = if self.options.metadata_only { CryptMethod::None } else { header.crypt };
        let mut clusters = data;
        if crypt == CryptMethod::Luks {
            let Some((at, room)) = read.area.extensions.luks_header else {
                let message = "the extension that tells where the LUKS header stands is missing";
                return Err(Error::corrupt("qcow2 header", Some(0), message));
            };
            let cipher = unlock(&*storage, at, room, &self.options.keys)?;
            let (file, path, len) = clusters.unwrap_or_else(|| (Arc::clone(&storage), path.to_owned(), len));
            clusters = Some((Arc::new(EncryptedStorage::new(file, Arc::new(cipher))), path, len));
        }
        let data = clusters.as_ref().map(|(file, path, len)| (file, self.file_id(file, path), *len));
        if self.writable() {
            let data = data.map(|(file, id, _)| (file, id));
            let writer = Qcow2Writer::open((&storage, id), data, &read, &self.options.limits)?;
            let writer = Arc::new(writer);
            let layout = writer.layout()?;
            self.image.writer = Some(Box::new(writer));
            return Ok((Box::new(layout), next));
        }
        let files = Files {
            tables: Box::new(TableCache::new(Arc::clone(&storage), len)),
            image: FileLen::new(id, Arc::new(len.into())),
            data: data.map(|(_, id, len)| FileLen::new(id, Arc::new(len.into()))),
        };
        let layout = Qcow2Layout::new(read, files, snapshot.as_ref())?;
        if crypt != CryptMethod::Aes {
            return Ok((Box::new(layout), next));
        }
        let cipher = legacy_aes(&self.options.keys)?;
        let (file, path, _) = clusters.unwrap_or_else(|| (storage, path.to_owned(), len));
        let register = |decrypted| self.file_id(&decrypted, &path);
        Ok((Box::new(LegacyAesLayout::new(layout, file, cipher, register)), next))
    }
}

impl Opener<'_> {
    fn vmdk(
        &mut self,
        storage: &SharedStorage,
        id: FileId,
        path: &Path,
        root: &Path,
    ) -> Result<(VmdkLayout, Option<Next>)> {
        let options = self.options;
        let own = ExtentFile::new(Arc::clone(storage), id, path)?;
        // Where backing files may stand anywhere, each VMDK of the chain has a tree of its own.
        let own_tree = (options.policy.allow == Allow::Backing)
            .then(|| path.canonicalize().ok()?.parent().map(Path::to_owned))
            .flatten();
        let tree = own_tree.as_deref().unwrap_or(root);
        // Several extents may lie in one file.
        let mut opened: HashMap<PathBuf, ExtentFile> = HashMap::new();
        let mut open = |named: &Path| {
            if self.archived {
                return Err(Error::unsupported(format!("the extent {named:?} of a disk inside an archive")));
            }
            let path = options.policy.check(named, tree, EXTENT)?;
            if let Some(file) = opened.get(&path) {
                return Ok(file.clone());
            }
            let storage = self.open_file(&path, Some((tree, EXTENT)))?;
            let file = ExtentFile::new(Arc::clone(&storage), self.file_id(&storage, &path), &path)?;
            opened.insert(path, file.clone());
            Ok(file)
        };
        let (layout, parent) = crate::vmdk::open(&own, options, &mut open)?;
        let Some(Parent { candidates, cid }) = parent.filter(|_| !options.metadata_only) else {
            return Ok((layout, None));
        };
        let named = candidates.iter().find(|path| path.exists()).or(candidates.first());
        let Some(named) = named else { return Ok((layout, None)) };
        let path = options.policy.check(named, root, "parent")?;
        // Never probed: a parent is a VMDK, and a raw one would let the guest choose.
        Ok((layout, Some(Next { path, format: Some(Format::Vmdk), cid })))
    }

    /// Whether the layer that was opened last is the parent that its child was made for.
    fn check_cid(&self, expected: Option<u32>) -> Result<()> {
        let info = self.image.layers.last().map(|layer| layer.layout.info());
        let (Some(expected), Some(FormatInfo::Vmdk(vmdk))) = (expected, info.map(|info| &info.specific))
        else {
            return Ok(());
        };
        let found = vmdk.descriptor.as_ref().and_then(|descriptor| descriptor.cid);
        if self.options.ignore_cid || found == Some(expected) {
            return Ok(());
        }
        let found = found.map_or("none".to_owned(), |cid| format!("{cid:08x}"));
        let message = format!(
            "its CID is {found} and its child was made for {expected:08x}: the parent was changed since, or is another disk"
        );
        Err(Error::corrupt("parent", None, message).hint("--ignore-cid reads the disk all the same"))
    }

    /// Adds the disk inside an archive as a layer.
    fn ova(&mut self, archive: &SharedStorage, path: PathBuf, root: &Path) -> Result<Option<Next>> {
        if self.archived || !self.image.layers.is_empty() {
            return Err(Error::unsupported("an archive inside an image"));
        }
        self.archived = true;
        // The disk inside takes the archive's place among the files.
        self.image.files.clear();
        let disk = crate::ova::open(archive, self.options)?;
        match self.layer(disk.storage, path, Some(disk.format), None, root)? {
            Some(Next { path, .. }) => {
                Err(Error::unsupported(format!("the backing file {path:?} of a disk inside an archive")))
            }
            None => Ok(None),
        }
    }
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

/// The path that an image at `image` means by `name`: relative names start at the image's own directory.
pub(crate) fn resolve(name: &[u8], image: &Path, what: &str) -> Result<PathBuf> {
    let plain = name.strip_prefix(b"file:").unwrap_or(name);
    if plain.is_empty() || plain.contains(&0) {
        return Err(Error::corrupt(what, None, "its name is empty or contains a zero byte"));
    }
    // QEMU takes a name for a protocol if a colon comes before the first slash.
    let protocol = plain.split(|&byte| byte == b'/').next().is_some_and(|first| first.contains(&b':'));
    if protocol && plain.len() == name.len() {
        let name = lossy(name);
        let shown: String = name.chars().take(80).collect();
        return Err(Error::unsupported(format!("the {what} name {shown:?} (only local files are)")));
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(OsStr::from_bytes(plain)))
}
