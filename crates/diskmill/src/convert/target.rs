use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use diskmill_codec::is_zero;
use diskmill_io::{FileStorage, ImageLock, OpenHow, PendingFile, PipeWriter, SharedStorage};

use diskmill_crypt::SectorCipher;

use super::assembler::{Assembler, Finish, TargetFile, WriteOp, WriteWhat};
use super::needed::{Needed, acquire, lock_old, same};
use super::offload::{FileRun, Offload};
use super::raw::{RawAssembler, RawZeros};
use super::{ConvertOptions, Monitor, Output, Reflink, TargetFormat};
use crate::edit::BitmapCopy;
use crate::encrypted::EncryptedStorage;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::qcow2::{Encryption, Preallocation, Qcow2Assembler, Qcow2Options};
use crate::reserve::Reserve;

/// Bytes at the start of a device that are cleared before an image with a header of its own is written to it.
const OLD_HEADER: u64 = 4096;

/// Bytes at the start of a fresh raw file that are allocated in any case.
const FIRST_BLOCK: usize = 4096;

/// The output's files.
pub(super) struct Target {
    main: Main,
    /// The external data file, or the extents of a VMDK.
    others: Vec<(SharedStorage, PendingFile)>,
    path: PathBuf,
    /// Old bytes may be there.
    dirty: bool,
    reserve: Reserve,
    /// Blocks of zeros at the end of a table are left as holes: they read as zeros, and nothing is preallocated.
    sparse_tables: bool,
    /// The disk's size is at least this: that of the image that is being filled.
    least_size: u64,
    encryption: Option<Encryption>,
    /// Held until the output has its name, so that nobody begins to use the old file meanwhile.
    _locks: Vec<ImageLock>,
}

enum Main {
    /// A new file, named when it is whole.
    Pending(SharedStorage, PendingFile),
    /// A device, or a file that is filled in place.
    Existing(SharedStorage),
    Stream(Mutex<Stream>),
}

struct Stream {
    pipe: PipeWriter,
    at: u64,
}

impl Target {
    /// Opens or makes the output for a disk of `size` bytes (`None`: not known yet). `adopted` is the virtual size of an
    /// empty image that is to be filled.
    pub(super) fn open(
        output: Output,
        options: &mut ConvertOptions,
        sources: &[Image],
        size: Option<u64>,
        adopted: Option<u64>,
    ) -> Result<Self> {
        let path = match output {
            Output::Path(path) => path,
            Output::Stream(pipe) => {
                let main = Main::Stream(Mutex::new(Stream { pipe, at: 0 }));
                return Ok(Self {
                    main,
                    others: Vec::new(),
                    path: PathBuf::from("-"),
                    dirty: false,
                    reserve: Reserve::default(),
                    sparse_tables: false,
                    least_size: 0,
                    encryption: None,
                    _locks: Vec::new(),
                });
            }
        };
        let mut open = || {
            let mut target = Self::open_path(path.clone(), options, sources, size, adopted)?;
            if let TargetFormat::Qcow2(Qcow2Options { encryption: Some(wanted), .. }) = &options.format {
                target.encryption = Some(wanted.create()?);
            }
            Ok(target)
        };
        open().map_err(|error: Error| error.of(&path))
    }

    fn open_path(
        path: PathBuf,
        options: &mut ConvertOptions,
        sources: &[Image],
        size: Option<u64>,
        adopted: Option<u64>,
    ) -> Result<Self> {
        let mut needed = Needed::new(sources);
        needed.refuse(&path)?;
        let meta = std::fs::metadata(&path).ok();
        let device = meta.as_ref().is_some_and(|meta| meta.file_type().is_block_device());
        let least_size = adopted.unwrap_or(0);
        match &mut options.format {
            TargetFormat::Qcow2(qcow2) if adopted.is_some() => {
                fits(least_size, size)?;
                qcow2.check(options.compress.is_some())?;
            }
            TargetFormat::Qcow2(qcow2) if device && qcow2.data_file.is_some() => {
                return Err(Error::unsupported("an external data file of an image on a device"));
            }
            TargetFormat::Vmdk(_) | TargetFormat::Ova(_) if device => {
                return Err(Error::unsupported(format!("writing {} to a device", options.format.name())));
            }
            TargetFormat::Qcow2(_) if options.trust_backing => {}
            format => needed.find_backing(format, &path)?,
        }
        if device || (!options.create && matches!(options.format, TargetFormat::Raw(_))) {
            return Self::existing(path, options, size, least_size);
        }
        let mut locks = Vec::new();
        locks.extend(lock_old(&path)?);
        let pending = PendingFile::create_with(&path, options.direct)
            .map_err(|error| Error::io("cannot create", error).of(&path))?;
        let others = options.format.other_files(&path, size)?;
        for other in &others {
            needed.refuse(other).map_err(|error| error.of(other))?;
            let old = std::fs::metadata(other);
            if old.is_ok_and(|old| meta.as_ref().is_some_and(|meta| same(meta, &old))) {
                return Err(one_file());
            }
            locks.extend(lock_old(other).map_err(|error| error.of(other))?);
        }
        let others = PendingFile::create_all(&others, options.direct)
            .map_err(|(path, error)| Error::io("cannot create", error).of(&path))?;
        if others.iter().any(|other| other.final_path() == pending.final_path()) {
            return Err(one_file());
        }
        let others = others.into_iter().map(|pending| (pending.storage(), pending)).collect();
        if let (TargetFormat::Raw(raw), Some(size)) = (&options.format, size.filter(|&size| size > 0)) {
            let storage = pending.storage();
            // A file system that cannot hold the file says so now, not after hours.
            storage.set_len(size).map_err(|error| {
                Error::io(format!("cannot make a file of {size} bytes"), error)
                    .hint("a raw image is as long as its disk: another file system may take it, or use qcow2")
            })?;
            if raw.preallocation == Preallocation::Off {
                // As QEMU: with direct I/O an allocated block tells what alignment reads need.
                let block = [0; FIRST_BLOCK];
                let block = block.get(..usize::try_from(size).unwrap_or(FIRST_BLOCK)).unwrap_or(&block);
                storage.write_all_at(block, 0).map_err(|error| Error::io("cannot write", error))?;
            }
            if raw.preallocation == Preallocation::Falloc {
                storage.allocate(0, size).map_err(|error| Error::io("cannot reserve the space", error))?;
            }
        }
        let reserve = Reserve::new(pending.storage().gains_from_allocate() && !options.direct);
        let sparse_tables = matches!(&options.format, TargetFormat::Qcow2(qcow2) if qcow2.preallocation == Preallocation::Off);
        Ok(Self {
            main: Main::Pending(pending.storage(), pending),
            others,
            path,
            dirty: false,
            reserve,
            sparse_tables,
            least_size,
            encryption: None,
            _locks: locks,
        })
    }

    fn existing(path: PathBuf, options: &ConvertOptions, size: Option<u64>, least_size: u64) -> Result<Self> {
        let how = OpenHow { read: true, write: true, create_new: false, direct: options.direct };
        let storage =
            FileStorage::open(&path, &how).map_err(|error| Error::io("cannot open for writing", error))?;
        let storage: SharedStorage = Arc::new(storage);
        let lock = acquire(&storage)?;
        let len = storage.len().map_err(|error| Error::io("cannot tell the size", error))?;
        if matches!(options.format, TargetFormat::Raw(_)) {
            // A file may end within the last sector of its disk.
            fits(if storage.is_block_device() { len } else { len.next_multiple_of(512) }, size)?;
        }
        if !matches!(options.format, TargetFormat::Raw(_)) {
            // Until the new header is there, an old one must not make an image of what is half overwritten.
            storage
                .write_zeroes(0, OLD_HEADER, true)
                .and_then(|()| storage.sync())
                .map_err(|error| Error::io("cannot clear the old header", error))?;
        }
        let dirty = !options.target_is_zero;
        Ok(Self {
            main: Main::Existing(storage),
            others: Vec::new(),
            path,
            dirty,
            reserve: Reserve::default(),
            sparse_tables: false,
            least_size,
            encryption: None,
            _locks: vec![lock],
        })
    }

    /// Lays out what this output is to hold.
    pub(super) fn assembler(
        &self,
        options: &ConvertOptions,
        size: Option<u64>,
    ) -> Result<Box<dyn Assembler>> {
        // Without zero detection the unit of plain formats only matters for alignment.
        let granule = match options.granule() {
            0 => 64 << 10,
            granule => granule,
        };
        let luks = match &self.encryption {
            Some(Encryption::Luks(_, header)) => Some(header.clone()),
            _ => None,
        };
        let name = (!self.is_stream()).then(|| file_name(&self.path));
        Ok(match &options.format {
            TargetFormat::Vmdk(vmdk) => vmdk.assembler(name, size, granule)?,
            TargetFormat::Ova(vmdk) => crate::ova::assembler(vmdk.clone(), &self.path, size)?,
            TargetFormat::Qcow2(qcow2) => Box::new(Qcow2Assembler::new(qcow2.clone(), self.dirty, luks)?),
            TargetFormat::Raw(raw) => {
                let zeros = match &self.main {
                    Main::Stream(_) => RawZeros::Write,
                    Main::Existing(_) if self.dirty => RawZeros::Clear,
                    _ => RawAssembler::zeros_for(raw.preallocation),
                };
                Box::new(RawAssembler::new(granule.min(1 << 20), zeros, self.is_stream()))
            }
        })
    }

    /// Gives the other files the lengths that they are known to get. XFS keeps the blocks that it reserves behind the end
    /// of a growing file if that is lengthened; and a file system that cannot hold a file says so now.
    pub(super) fn lengthen(&self, lens: &[u64]) -> Result<()> {
        for ((storage, pending), &len) in self.others.iter().zip(lens) {
            storage.set_len(len).map_err(|error| {
                Error::io(format!("cannot make a file of {len} bytes"), error).of(pending.final_path())
            })?;
        }
        Ok(())
    }

    /// Finds out which files of the sources can be moved without reading them.
    pub(super) fn offload(
        &self,
        sources: &[Image],
        options: &ConvertOptions,
        packs: bool,
    ) -> Result<Offload> {
        let always = options.reflink == Reflink::Always;
        if options.must_look(packs)? {
            return Ok(Offload::default());
        }
        match &self.main {
            Main::Pending(main, _) if !sources.is_empty() => {
                // Where there are other files, the guest's data is in these; all lie in one folder.
                let file = self.others.first().map_or(main, |(storage, _)| storage);
                Offload::probe(sources, file, options)
            }
            _ if always => {
                Err(Error::unsupported("sharing blocks (reflink) with a pipe, a device or an existing file"))
            }
            _ => Ok(Offload::default()),
        }
    }

    /// Does a write of [`WriteWhat::Buf`], whose bytes are those of `run` instead of a buffer's.
    pub(super) fn transfer(&self, op: &WriteOp, run: &FileRun, monitor: &Monitor) -> Result<()> {
        let WriteWhat::Buf { at, len } = op.what else { return self.write(op, &[], monitor) };
        let storage = self.file(op.file)?;
        run.transfer(&*storage, op.at, at as u64, len as u64, monitor)
            .map_err(|error| self.write_error(op.at, error))
    }

    /// What guest data is encrypted with by its guest offset, before it is placed.
    pub(super) const fn guest_cipher(&self) -> Option<&SectorCipher> {
        match &self.encryption {
            Some(Encryption::Aes(cipher)) => Some(cipher),
            _ => None,
        }
    }

    pub(super) const fn is_stream(&self) -> bool {
        matches!(self.main, Main::Stream(_))
    }

    pub(super) fn is_device(&self) -> bool {
        matches!(&self.main, Main::Existing(storage) if storage.is_block_device())
    }

    /// The storage of one of the files, for engines.
    pub(super) fn file(&self, file: TargetFile) -> Result<SharedStorage> {
        if file == TargetFile::Encrypted {
            let inner = if self.others.is_empty() { TargetFile::Main } else { TargetFile::Data };
            let (Some(Encryption::Luks(cipher, _)), file) = (&self.encryption, self.file(inner)?) else {
                return Err(Error::invalid("encrypted data of an output that is not"));
            };
            return Ok(Arc::new(EncryptedStorage::new(file, Arc::clone(cipher))));
        }
        let other = |index| self.others.get(index).map(|(storage, _)| storage);
        let found = match (file, &self.main) {
            (TargetFile::Data, _) => other(0),
            (TargetFile::Extent(index), _) => other(index as usize),
            (TargetFile::Main, Main::Pending(storage, _) | Main::Existing(storage)) => Some(storage),
            (TargetFile::Main, Main::Stream(_)) | (TargetFile::Encrypted, _) => None,
        };
        found.cloned().ok_or_else(|| Error::invalid("a file that the output does not have"))
    }

    pub(super) fn write_error(&self, at: u64, error: std::io::Error) -> Error {
        let full = error.kind() == std::io::ErrorKind::StorageFull && matches!(self.main, Main::Pending(..));
        let error = Error::io(format!("cannot write at offset {at:#x}"), error).of(&self.path);
        if full { error.hint("the disk is full; the unfinished output was removed") } else { error }
    }

    /// Does one write. `bytes` is the buffer that [`WriteWhat::Buf`] speaks of.
    pub(super) fn write(&self, op: &WriteOp, bytes: &[u8], monitor: &Monitor) -> Result<()> {
        let data = match &op.what {
            WriteWhat::Buf { at, len } => bytes.get(*at..).and_then(|rest| rest.get(..*len)),
            WriteWhat::Bytes(bytes) => Some(bytes.as_slice()),
            WriteWhat::Zeroes { .. } | WriteWhat::Reserve { .. } => Some(&[][..]),
        };
        let data = data.ok_or_else(|| Error::invalid("a write from outside its buffer"))?;
        if let Main::Stream(stream) = &self.main {
            let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
            return stream.write(op, data, monitor);
        }
        let storage = self.file(op.file)?;
        let failed = |error| self.write_error(op.at, error);
        match &op.what {
            WriteWhat::Zeroes { len, written: false } => {
                storage.write_zeroes(op.at, *len, false).map_err(failed)
            }
            WriteWhat::Zeroes { len, written: true } => {
                let zeros = vec![0; (*len).min(1 << 20) as usize];
                let mut left = *len;
                let mut at = op.at;
                while left > 0 {
                    let part = zeros.get(..left.min(zeros.len() as u64) as usize).unwrap_or_default();
                    storage.write_all_at(part, at).map_err(failed)?;
                    at += part.len() as u64;
                    left -= part.len() as u64;
                }
                monitor.add_written(*len);
                Ok(())
            }
            WriteWhat::Reserve { len } => storage.allocate(op.at, *len).map_err(failed),
            WriteWhat::Buf { .. } => {
                self.reserve.before_write(&*storage, op.at, data.len()).map_err(failed)?;
                storage.write_all_at(data, op.at).map_err(failed)?;
                monitor.add_written(data.len() as u64);
                Ok(())
            }
            WriteWhat::Bytes(_) => {
                let data = if self.sparse_tables { without_zero_blocks(data) } else { data };
                storage.write_all_at(data, op.at).map_err(failed)?;
                monitor.add_written(data.len() as u64);
                Ok(())
            }
        }
    }

    /// Brings the files to their lengths and writes the header, which makes the output an image.
    pub(super) fn complete(&self, finish: Finish, options: &ConvertOptions, monitor: &Monitor) -> Result<()> {
        let Finish { file_len, other_lens, header, seal } = finish;
        if let (Main::Pending(storage, _), Some(len)) = (&self.main, file_len) {
            storage.set_len(len).map_err(|error| self.write_error(len, error))?;
        }
        for ((storage, _), len) in self.others.iter().zip(other_lens) {
            storage.set_len(len).map_err(|error| self.write_error(len, error))?;
        }
        if let (Main::Pending(storage, _), Some(seal)) = (&self.main, seal) {
            for op in seal(&**storage)? {
                self.write(&op, &[], monitor)?;
            }
        }
        let barrier = |storage: &SharedStorage| {
            storage.sync().map_err(|error| Error::io("cannot flush", error).of(&self.path))
        };
        match &self.main {
            Main::Existing(storage) => {
                // Here the header is what makes old bytes an image: never before what it points to.
                if header.is_some() || options.sync {
                    barrier(storage)?;
                }
            }
            Main::Pending(..) | Main::Stream(_) => {}
        }
        if let Some(header) = header {
            self.write(&WriteOp::bytes(0, header), &[], monitor)?;
            if let (Main::Existing(storage), true) = (&self.main, options.sync) {
                barrier(storage)?;
            }
        }
        Ok(())
    }

    /// The virtual size of an output that was made from `size` bytes.
    pub(super) fn virtual_size(&self, size: u64) -> u64 {
        size.max(self.least_size)
    }

    /// Adds bitmaps to a qcow2 output that is whole otherwise.
    pub(super) fn add_bitmaps(&self, bitmaps: &[BitmapCopy]) -> Result<()> {
        if bitmaps.is_empty() {
            return Ok(());
        }
        crate::edit::add_to_fresh(&self.file(TargetFile::Main)?, bitmaps)
            .map_err(|error| error.of(&self.path))
    }

    /// Where the output is until it has its name, if it is one new file.
    pub(super) fn temporary_path(&self) -> Option<&Path> {
        match &self.main {
            Main::Pending(_, pending) if self.others.is_empty() => Some(pending.temporary_path()),
            _ => None,
        }
    }

    /// Gives new files their names. With `sync` they are durable.
    pub(super) fn publish(self, sync: bool) -> Result<()> {
        let Self { main, others, .. } = self;
        let main = match main {
            Main::Pending(_, pending) => Some(pending),
            Main::Existing(_) | Main::Stream(_) => None,
        };
        // The image itself last: it must not name a file that is not there.
        let files = others.into_iter().map(|(_, pending)| pending).chain(main).collect();
        PendingFile::publish_all(files, sync)
            .map_err(|(path, error)| Error::io("cannot finish the output", error).of(&path))
    }
}

impl Stream {
    fn write(&mut self, op: &WriteOp, data: &[u8], monitor: &Monitor) -> Result<()> {
        let failed = |error| Error::io("cannot write to the pipe", error);
        if op.at != self.at {
            return Err(Error::invalid("a write out of order to a pipe"));
        }
        let len = match op.what {
            WriteWhat::Zeroes { len, .. } | WriteWhat::Reserve { len } => {
                self.pipe.write_zeroes(len).map_err(failed)?;
                len
            }
            WriteWhat::Buf { .. } | WriteWhat::Bytes(_) => {
                self.pipe.write_all(data).map_err(failed)?;
                data.len() as u64
            }
        };
        self.at += len;
        monitor.add_written(len);
        Ok(())
    }
}

/// The bytes up to the last block that is not all zeros.
fn without_zero_blocks(bytes: &[u8]) -> &[u8] {
    const BLOCK: usize = 4096;
    let used = bytes.chunks(BLOCK).rposition(|block| !is_zero(block)).map_or(0, |last| (last + 1) * BLOCK);
    bytes.get(..used).unwrap_or(bytes)
}

/// A target of `len` bytes takes a source of `size`, as far as that is known.
pub(super) fn fits(len: u64, size: Option<u64>) -> Result<()> {
    match size {
        Some(size) if size > len => {
            Err(Error::invalid(format!("the target has {len} bytes, and the source needs {size}")))
        }
        _ => Ok(()),
    }
}

/// Two files of an output would have one name.
fn one_file() -> Error {
    Error::invalid("the image and another file of it, an extent or external data file, are one file")
}

/// The last component of `path`, as bytes.
pub(super) fn file_name(path: &Path) -> &[u8] {
    path.file_name().unwrap_or_default().as_bytes()
}
