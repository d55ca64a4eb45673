//! Opening an image and all layers under it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use diskmill_format::Limits;
use diskmill_format::qcow2::{CryptMethod, Snapshot, feature};
use diskmill_io::{FileStorage, ImageLock, LockMode, OpenHow, SharedStorage, Storage};

use super::{Image, ImageFile, Layer, OpenOptions, SnapshotRef, find_snapshot};
use crate::check::{CheckOptions, Repair, check_storage};
use crate::edit::{Qcow2Writer, RawWriter, VmdkWriter};
use crate::encrypted::{EncryptedStorage, LegacyAes, LockedLayout, LuksArea, legacy_aes};
use crate::error::{Error, Kind, Result};
use crate::layout::{FileId, FormatInfo, Layout};
use crate::policy::{Allow, EXTENT};
use crate::probe::{Format, first_bytes};
use crate::qcow2::{FileLen, Files, Qcow2Info, Qcow2Layout, lossy};
use crate::raw::RawLayout;
use crate::tables::TableCache;
use crate::vmdk::{ExtentFile, Parent, VmdkLayout};

/// What the next layer of a chain is.
pub(super) struct Next {
    pub(super) path: PathBuf,
    format: Option<Format>,
    /// The CID that it must have, if it is a VMDK's parent.
    cid: Option<u32>,
}

/// How much of a backing chain is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Depth {
    /// All of it.
    Whole,
    /// All of it, and the image is about to get another backing file: zeros that are written to it have to be there
    /// even if it has none now.
    ToRebase,
    /// Only the image itself; its backing file need not be there.
    Alone,
    /// What stands above the image's own backing file, which is to get what the image has. Only qcow2 images are emptied
    /// then, so that no other has a writer.
    ToCommit,
    /// What stands above one of these files, if the chain has one.
    Above(Vec<PathBuf>),
}

/// A backing file that was not opened.
pub(crate) struct Base {
    next: Next,
    /// The folder of the image whose chain it belongs to.
    root: PathBuf,
}

impl Base {
    /// Whether the image above it names its format.
    pub(crate) const fn has_format(&self) -> bool {
        self.next.format.is_some()
    }

    /// Opens it with its own backing chain, under the policy of the chain that it belongs to; `given` as for
    /// [`Image::open_part`].
    ///
    /// # Errors
    /// As [`Image::open`].
    pub(crate) fn open(self, given: Option<&[ImageFile]>, options: &OpenOptions) -> Result<Image> {
        let mut opener = Opener::new(options, given, Depth::Whole);
        opener.named = true;
        opener.chain(self.next, self.root).map(|(image, _)| image)
    }
}

pub(super) struct Opener<'a> {
    options: &'a OpenOptions,
    /// All files that there are, if the caller gave storages instead of a path.
    given: Option<&'a [ImageFile]>,
    depth: Depth,
    /// The first file was named by another image.
    named: bool,
    pub(super) image: Image,
    /// Device and inode of each file, to find loops.
    seen: Vec<(u64, u64)>,
    /// Bytes of all layers' snapshot tables: each is bounded, and so is their sum.
    snapshot_bytes: u64,
    /// The disk is inside an archive, and so cannot name files.
    archived: bool,
}

impl<'a> Opener<'a> {
    pub(super) fn new(options: &'a OpenOptions, given: Option<&'a [ImageFile]>, depth: Depth) -> Self {
        let image = Image {
            layers: Vec::new(),
            files: Vec::new(),
            window: None,
            writer: None,
            scratch: Mutex::default(),
            _locks: Vec::new(),
        };
        Self {
            options,
            given,
            depth,
            named: false,
            image,
            seen: Vec::new(),
            snapshot_bytes: 0,
            archived: false,
        }
    }

    pub(super) fn open(self, path: &Path) -> Result<(Image, Option<Base>)> {
        let root = match self.given {
            Some(_) => PathBuf::new(),
            None => {
                let real = path.canonicalize().map_err(|error| {
                    // `/dev/stdin` may lead to a pipe, which has no path.
                    match path.metadata() {
                        Ok(meta) if meta.file_type().is_fifo() => Error::unsupported(
                            "reading a pipe by a name (but `-` is standard input, where that is read)",
                        ),
                        _ => Error::io("cannot open", error),
                    }
                    .of(path)
                })?;
                real.parent().unwrap_or(Path::new("/")).to_owned()
            }
        };
        let top = Next { path: path.to_owned(), format: self.options.format, cid: None };
        self.chain(top, root)
    }

    /// Opens the image `next` and what stands under it.
    fn chain(mut self, mut next: Next, root: PathBuf) -> Result<(Image, Option<Base>)> {
        let path = next.path.clone();
        loop {
            let top = self.image.layers.is_empty();
            if self.image.layers.len() >= usize::from(self.options.limits.chain_depth) {
                let depth = self.options.limits.chain_depth;
                return Err(Error::new(
                    Kind::Limit,
                    format!("the backing chain has more than {depth} layers"),
                )
                .of(&path));
            }
            let named = (!top || self.named).then_some((root.as_path(), "backing file"));
            let storage = self.open_file(&next.path, named)?;
            let snapshot = self.options.snapshot.as_ref().filter(|_| top);
            let (here, cid) = (next.path.clone(), next.cid);
            let below = self
                .layer(storage, next.path, next.format, snapshot, &root)
                .map_err(|error| error.of(&here))?;
            self.check_cid(cid).map_err(|error| error.of(&here))?;
            match below {
                Some(next) if self.ends_above(&next) => return Ok((self.image, Some(Base { next, root }))),
                Some(below) => next = below,
                None => return Ok((self.image, None)),
            }
        }
    }

    fn ends_above(&self, next: &Next) -> bool {
        match &self.depth {
            Depth::Whole | Depth::ToRebase => false,
            Depth::Alone | Depth::ToCommit => true,
            Depth::Above(paths) => paths.contains(&next.path),
        }
    }

    /// Opens and locks a file. One that an image in this tree `named` as that is checked against the policy again now that
    /// nobody can exchange it.
    fn open_file(&mut self, path: &Path, named: Option<(&Path, &str)>) -> Result<SharedStorage> {
        if let Some(given) = self.given {
            return self.find_given(given, path);
        }
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
        self.see((meta.dev(), meta.ino()), path)?;
        let storage: SharedStorage = Arc::new(storage);
        let mode = match () {
            () if writable => LockMode::Writer,
            () if self.options.force_share => LockMode::Shared,
            () => LockMode::Reader,
        };
        let lock = ImageLock::acquire(&storage, mode).map_err(|error| Error::lock(error).of(path))?;
        self.image._locks.push(lock);
        Ok(storage)
    }

    fn find_given(&mut self, given: &[ImageFile], path: &Path) -> Result<SharedStorage> {
        let Some((index, file)) = given.iter().enumerate().find(|(_, file)| file.path == path) else {
            return Err(Error::new(Kind::Denied, "the file is not among those that were given").of(path));
        };
        self.see((0, index as u64), path)?;
        Ok(Arc::clone(&file.storage))
    }

    /// Notes that the file of this `identity` belongs to the chain.
    fn see(&mut self, identity: (u64, u64), path: &Path) -> Result<()> {
        if self.seen.contains(&identity) {
            return Err(Error::corrupt("backing chain", None, "it comes back to this file: a loop").of(path));
        }
        self.seen.push(identity);
        Ok(())
    }

    /// Where the file is that an image in the tree `root` names as `what`, if that is allowed.
    fn admit(&self, named: PathBuf, root: &Path, what: &str) -> Result<PathBuf> {
        match self.given {
            Some(_) => Ok(named),
            None => self.options.policy.check(&named, root, what),
        }
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
    pub(super) fn layer(
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
                let start = first_bytes(&*storage)?;
                match Format::probe(&start) {
                    // Only the image that the user named is called what the user called it.
                    Format::Raw if self.image.layers.is_empty() && crate::ova::is_called(&path) => {
                        Format::Ova
                    }
                    probed => probed,
                }
            }
        };
        let id = self.file_id(&storage, &path);
        let writable = self.writable() && (format == Format::Qcow2 || self.depth != Depth::ToCommit);
        let part = self.options.metadata_only || self.options.no_backing || self.options.locked;
        if writable && (snapshot.is_some() || part) {
            return Err(Error::invalid("a snapshot, or a part of an image, cannot be written to"));
        }
        let (layout, next): (Box<dyn Layout>, _) = match format {
            Format::Raw if snapshot.is_some() => return Err(Error::invalid("a raw image has no snapshots")),
            Format::Raw if writable => {
                let writer = RawWriter::open(storage, id)?;
                let layout = writer.layout()?;
                self.image.writer = Some(Box::new(writer));
                (Box::new(layout), None)
            }
            Format::Raw => (Box::new(RawLayout::new(storage, id)?), None),
            Format::Qcow2 => self.qcow2(storage, id, &path, snapshot, root)?,
            _ if snapshot.is_some() => {
                return Err(Error::invalid(format!("{format} has no internal snapshots")));
            }
            Format::Ova if writable => {
                return Err(Error::unsupported("writing to a disk inside an archive"));
            }
            Format::Vmdk => {
                let (mut layout, next) = self.vmdk(&storage, id, &path, root)?;
                if writable {
                    let own = ExtentFile::new(storage, id, &path)?;
                    let limits = &self.options.limits;
                    let writer = VmdkWriter::open(&mut layout, &own, next.is_some(), limits)?;
                    self.image.writer = Some(Box::new(writer));
                }
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
        let mut read = Qcow2Info::read(&*storage, &self.options.limits)?;
        if read.dirty && !read.corrupt && self.writable() {
            count_anew(&*storage, &self.options.limits)?;
            read = Qcow2Info::read(&*storage, &self.options.limits)?;
        }
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
            let data_path = self.admit(named, root, "external data file")?;
            let data = self.open_file(&data_path, Some((root, "external data file")))?;
            let len = data.len().map_err(|error| Error::io("cannot tell the size", error).of(&data_path))?;
            Some((data, data_path, len))
        } else {
            None
        };
        let backing_format = read.area.extensions.backing_format.as_deref().map(lossy);
        let next = match &read.area.backing_name {
            Some(name)
                if !self.options.metadata_only && !self.options.no_backing && self.depth != Depth::Alone =>
            {
                let named = resolve(name, path, "backing file")?;
                let format =
                    backing_format.as_deref().filter(|name| !name.is_empty()).map(str::parse).transpose()?;
                Some(Next { path: self.admit(named, root, "backing file")?, format, cid: None })
            }
            _ => None,
        };
        let locked = self.options.locked && header.crypt != CryptMethod::None;
        let crypt = if self.options.metadata_only || locked { CryptMethod::None } else { header.crypt };
        let mut clusters = data;
        if crypt == CryptMethod::Luks {
            let Some((at, room)) = read.area.extensions.luks_header else {
                let message = "the extension that tells where the LUKS header stands is missing";
                return Err(Error::corrupt("qcow2 header", Some(0), message));
            };
            let cipher = LuksArea { file: &*storage, at, len: room }.cipher(&self.options.keys)?;
            let (file, path, len) = clusters.unwrap_or_else(|| (Arc::clone(&storage), path.to_owned(), len));
            clusters = Some((Arc::new(EncryptedStorage::new(file, Arc::new(cipher))), path, len));
        }
        let data = clusters.as_ref().map(|(file, path, len)| (file, self.file_id(file, path), *len));
        let aes = if crypt == CryptMethod::Aes {
            let cipher = legacy_aes(&self.options.keys).map_err(|error| error.within("AES encryption", 0))?;
            let (file, path) = clusters.as_ref().map_or((&storage, path), |(file, path, _)| (file, path));
            Some(LegacyAes::new(Arc::clone(file), cipher, |decrypted| self.file_id(&decrypted, path)))
        } else {
            None
        };
        if self.writable() {
            let data = data.map(|(file, id, _)| (file, id));
            let mut writer = Qcow2Writer::open((&storage, id), data, aes, &read, &self.options.limits)?;
            if self.depth == Depth::ToRebase {
                writer.expect_backing();
            }
            let writer = Arc::new(writer);
            let layout = writer.layout()?;
            self.image.writer = Some(Box::new(writer));
            return Ok((layout, next));
        }
        let files = Files {
            tables: Box::new(TableCache::new(Arc::clone(&storage), len)),
            image: FileLen::new(id, Arc::new(len.into())),
            data: data.map(|(_, id, len)| FileLen::new(id, Arc::new(len.into()))),
        };
        let layout = Qcow2Layout::new(read, files, snapshot.as_ref())?;
        Ok(match aes {
            Some(aes) => (Box::new(aes.decrypt(layout)), next),
            None if locked => (Box::new(LockedLayout::new(layout)), next),
            None => (Box::new(layout), next),
        })
    }
}

/// Repairs an image whose refcounts were not kept up to date (lazy refcounts) by a writer that did not close it. QEMU
/// does so too whenever it opens one for writing.
fn count_anew(storage: &dyn Storage, limits: &Limits) -> Result<()> {
    let options = CheckOptions { repair: Repair::All, limits: limits.clone(), ..CheckOptions::default() };
    let report = check_storage(storage, &options, &mut |_, _| {})?;
    if report.check_errors > 0 || report.corruptions > 0 {
        return Err(Error::new(
            Kind::Corrupt,
            "the image was not closed and cannot be repaired all by itself",
        )
        .hint("`check -r all` shows what is wrong"));
    }
    Ok(())
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
            let path = self.admit(named.to_owned(), tree, EXTENT)?;
            if let Some(file) = opened.get(&path) {
                return Ok(file.clone());
            }
            let storage = self.open_file(&path, Some((tree, EXTENT)))?;
            let file = ExtentFile::new(Arc::clone(&storage), self.file_id(&storage, &path), &path)?;
            opened.insert(path, file.clone());
            Ok(file)
        };
        let (layout, parent) = crate::vmdk::open(&own, options, &mut open)?;
        let Some(Parent { candidates, cid }) =
            parent.filter(|_| !options.metadata_only && !options.no_backing && self.depth != Depth::Alone)
        else {
            return Ok((layout, None));
        };
        let named = candidates.iter().find(|path| path.exists()).or(candidates.first());
        let Some(named) = named else { return Ok((layout, None)) };
        let path = self.admit(named.clone(), root, "parent")?;
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
