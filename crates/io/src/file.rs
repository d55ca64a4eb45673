//! Regular files and block devices.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::sys::{invalid, offset, range_end, retry, uninterrupted, unsupported};
use crate::{Align, Allocation, Buf, Storage};

/// How to open a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenHow {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// Make the file; fail if the name is taken, be it by a dangling symbolic link. Implies `write`.
    pub create_new: bool,
    /// Bypass the page cache (`O_DIRECT`) for whatever meets [`Storage::align`].
    pub direct: bool,
}

/// The largest piece of zeros that is written where nothing better is to be had, in bytes.
const ZERO_CHUNK: u64 = 1 << 20;
/// The alignment assumed for direct I/O where the system does not tell it.
const DEFAULT_ALIGN: u32 = 4096;
/// What is asked of the kernel at once in [`Storage::will_need`], in bytes: it cuts longer requests short, to the
/// largest transfer of the device or the readahead of the file, whichever is larger.
const WILL_NEED_STEP: u64 = 256 << 10;
/// `copy_file_range` of more could not be interrupted for long.
const COPY_CHUNK: u64 = 256 << 20;

/// A regular file or block device.
///
/// With `O_DIRECT`, a read or write that does not meet [`Storage::align`] (the last bytes of a file, as a rule) goes
/// through the page cache by a second descriptor of the same file; the kernel keeps the two coherent.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    /// The second, buffered descriptor of a file opened with `O_DIRECT`.
    buffered: Option<File>,
    device: bool,
    align: Align,
}

impl FileStorage {
    /// Opens `path`.
    ///
    /// # Errors
    /// What `open(2)` says; `InvalidInput` for whatever is neither a regular file nor a block device (never waits
    /// for a FIFO's other end, never touches a character device); `Unsupported` where there is no `O_DIRECT`.
    pub fn open(path: impl AsRef<Path>, how: &OpenHow) -> io::Result<FileStorage> {
        FileStorage::open_with_mode(path.as_ref(), how, 0o666)
    }

    /// As [`open`](Self::open); a new file gets the permissions `mode & !umask`.
    pub(crate) fn open_with_mode(path: &Path, how: &OpenHow, mode: u32) -> io::Result<FileStorage> {
        // Opening alone can act on a character device (rewind a tape, start a watchdog): look first.
        match fs::metadata(path) {
            Ok(meta) if !how.create_new => check_kind(&meta)?,
            Err(e) if !how.create_new => return Err(e),
            _ => {}
        }
        // The name may lead elsewhere by now, so the open must not wait for a FIFO either.
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY | if how.direct { libc::O_DIRECT } else { 0 };
        let mut options = OpenOptions::new();
        options.read(how.read).write(how.write || how.create_new).create_new(how.create_new).mode(mode);
        let file = match uninterrupted(|| options.custom_flags(flags).open(path)) {
            Err(e) if how.direct && e.raw_os_error() == Some(libc::EINVAL) => {
                if how.create_new {
                    // open(2) makes the file before it finds that its file system has no direct I/O.
                    let _ = fs::remove_file(path);
                }
                return Err(unsupported("the file system has no direct I/O (O_DIRECT)", &e));
            }
            result => result?,
        };
        check_kind(&file.metadata()?)?;
        let status = fcntl(&file, libc::F_GETFL, 0)?;
        fcntl(&file, libc::F_SETFL, status & !libc::O_NONBLOCK)?;
        if !how.direct {
            return FileStorage::from_file(file);
        }
        options.create_new(false);
        let buffered = uninterrupted(|| options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path))?;
        let (one, other) = (file.metadata()?, buffered.metadata()?);
        if (one.dev(), one.ino()) != (other.dev(), other.ino()) {
            return Err(io::Error::other("the file was replaced while it was opened: try again"));
        }
        let align = direct_align(&file)?;
        Ok(FileStorage { buffered: Some(buffered), align, ..FileStorage::from_file(file)? })
    }

    /// Wraps an open file.
    ///
    /// # Errors
    /// `InvalidInput` for whatever is neither a regular file nor a block device.
    pub fn from_file(file: File) -> io::Result<FileStorage> {
        let meta = file.metadata()?;
        check_kind(&meta)?;
        let device = meta.file_type().is_block_device();
        let direct = fcntl(&file, libc::F_GETFL, 0)? & libc::O_DIRECT != 0;
        let align = if direct { direct_align(&file)? } else { Align { offset: 1, memory: 1 } };
        Ok(FileStorage { file, buffered: None, device, align })
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The descriptor for an access: the buffered one if this access cannot be direct.
    fn file_for(&self, address: *const u8, len: usize, at: u64) -> &File {
        match &self.buffered {
            Some(buffered) if !self.align.admits(address.addr(), len, at) => buffered,
            _ => &self.file,
        }
    }

    /// The size of a logical sector of a block device, in bytes.
    fn sector(&self) -> u64 {
        sector_size(&self.file).map_or(512, u64::from)
    }

    /// What the file system says of itself.
    fn statfs(&self) -> Option<libc::statfs> {
        let mut stat = MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: fstatfs fills the struct that it is given; the descriptor is open.
        let found = retry(|| i64::from(unsafe { libc::fstatfs(self.file.as_raw_fd(), stat.as_mut_ptr()) }));
        // SAFETY: it was filled, since the call succeeded.
        found.ok().map(|_| unsafe { stat.assume_init() })
    }

    /// Whether the page that holds `at` is in the page cache: a read that must not wait finds it there.
    fn is_cached(&self, at: libc::off_t) -> bool {
        let mut byte = 0u8;
        let slot = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        // SAFETY: reads at most one byte into `byte`, which outlives the call; the descriptor is open.
        unsafe { libc::preadv2(self.file.as_raw_fd(), &raw const slot, 1, at, libc::RWF_NOWAIT) == 1 }
    }

    fn fallocate(&self, mode: libc::c_int, at: u64, len: u64) -> io::Result<()> {
        let (at, len) = (offset(at)?, offset(len)?);
        // SAFETY: takes numbers only; the descriptor is open for the life of `self`.
        retry(|| i64::from(unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at, len) })).map(drop)
    }

    /// Zeros by writing them.
    fn write_plain_zeroes(&self, at: u64, end: u64) -> io::Result<()> {
        let zeros = Buf::new(end.saturating_sub(at).min(ZERO_CHUNK) as usize)?;
        let mut at = at;
        while at < end {
            let n = (end - at).min(zeros.len() as u64);
            self.write_all_at(&zeros[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }

    /// Zeros in a regular file by `fallocate`, with the length grown to `end`.
    fn zero_file(&self, at: u64, end: u64, keep_allocated: bool) -> io::Result<()> {
        if keep_allocated {
            match self.fallocate(libc::FALLOC_FL_ZERO_RANGE, at, end - at) {
                Err(e) if no_fallocate(&e) => {}
                result => return result,
            }
        }
        // Growing by ftruncate(2) could cut off what another thread appends meanwhile; a byte written in our
        // own range cannot, and the hole swallows it again.
        if end > self.file.metadata()?.len() {
            self.write_all_at(&[0], end - 1)?;
        }
        self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, end - at)?;
        if keep_allocated { self.fallocate(0, at, end - at) } else { Ok(()) }
    }

    /// Zeros on whole sectors of a device. Never `BLKDISCARD`, after which a device may return anything.
    fn zero_device(&self, at: u64, end: u64, keep_allocated: bool) -> io::Result<()> {
        let mode = if keep_allocated { libc::FALLOC_FL_ZERO_RANGE } else { libc::FALLOC_FL_PUNCH_HOLE };
        match self.fallocate(mode | libc::FALLOC_FL_KEEP_SIZE, at, end - at) {
            Err(e) if no_fallocate(&e) => {}
            result => return result,
        }
        let range = [at, end - at];
        // SAFETY: BLKZEROOUT reads two u64, start and length, from the array, which outlives the call.
        retry(|| i64::from(unsafe { libc::ioctl(self.file.as_raw_fd(), BLKZEROOUT, range.as_ptr()) }))
            .map(drop)
    }
}

impl Storage for FileStorage {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let file = self.file_for(buf.as_ptr(), buf.len(), at);
        uninterrupted(|| file.read_at(buf, at))
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<usize> {
        let file = self.file_for(buf.as_ptr(), buf.len(), at);
        uninterrupted(|| file.write_at(buf, at))
    }

    fn len(&self) -> io::Result<u64> {
        if self.device { seek(&self.file, 0, libc::SEEK_END) } else { Ok(self.file.metadata()?.len()) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if !self.device {
            offset(len)?;
            return uninterrupted(|| self.file.set_len(len));
        }
        let size = self.len()?;
        if len <= size {
            return Ok(());
        }
        let message = format!("the block device has {size} bytes, {len} are needed");
        Err(io::Error::new(io::ErrorKind::Unsupported, message))
    }

    fn sync(&self) -> io::Result<()> {
        uninterrupted(|| self.file.sync_data())
    }

    fn allocation(&self, at: u64) -> io::Result<Option<(Allocation, u64)>> {
        let len = self.len()?;
        if at >= len {
            return Ok(None);
        }
        let from = offset(at)?;
        let whole = Ok(Some((Allocation::Data, len)));
        if self.device {
            return whole;
        }
        match seek(&self.file, from, libc::SEEK_DATA) {
            Ok(data) if data > at => return Ok(Some((Allocation::Hole, data.min(len)))),
            Ok(_) => {}
            // No data up to the end.
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => return Ok(Some((Allocation::Hole, len))),
            Err(e) if cannot_tell(&e) => return whole,
            Err(e) => return Err(e),
        }
        match seek(&self.file, from, libc::SEEK_HOLE) {
            Ok(hole) if hole > at => Ok(Some((Allocation::Data, hole.min(len)))),
            // The file changes under us, or the file system is odd: data is always a true answer.
            Ok(_) => whole,
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) || cannot_tell(&e) => whole,
            Err(e) => Err(e),
        }
    }

    fn write_zeroes(&self, at: u64, len: u64, keep_allocated: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let end = range_end(at, len)?;
        if !self.device {
            return match self.zero_file(at, end, keep_allocated) {
                Err(e) if no_fallocate(&e) => self.write_plain_zeroes(at, end),
                result => result,
            };
        }
        // The kernel zeroes whole sectors; what is left at the edges is written.
        let sector = self.sector();
        let (first, last) = (at.next_multiple_of(sector), end - end % sector);
        if first >= last {
            return self.write_plain_zeroes(at, end);
        }
        self.write_plain_zeroes(at, first)?;
        match self.zero_device(first, last, keep_allocated) {
            Err(e) if no_fallocate(&e) => self.write_plain_zeroes(first, last)?,
            result => result?,
        }
        self.write_plain_zeroes(last, end)
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        if self.device {
            return self.set_len(range_end(at, len)?);
        }
        match self.fallocate(0, at, len) {
            Err(e) if no_fallocate(&e) => {
                Err(unsupported("the file system cannot reserve blocks (fallocate)", &e))
            }
            result => result,
        }
    }

    fn gains_from_allocate(&self) -> bool {
        !self.device && self.statfs().is_some_and(|stat| stat.f_type == libc::EXT4_SUPER_MAGIC)
    }

    fn will_need(&self, at: u64, len: u64) {
        // Direct reads leave the page cache alone.
        if self.align.offset > 1 || !offset(at).is_ok_and(|at| !self.is_cached(at)) {
            return;
        }
        let end = at.saturating_add(len);
        for at in (at..end).step_by(WILL_NEED_STEP as usize) {
            let (Ok(from), Ok(len)) = (offset(at), offset((end - at).min(WILL_NEED_STEP))) else { return };
            // SAFETY: takes numbers only; the descriptor is open for the life of `self`.
            unsafe { libc::posix_fadvise(self.file.as_raw_fd(), from, len, libc::POSIX_FADV_WILLNEED) };
        }
    }

    fn block_size(&self) -> Option<u64> {
        let size = self.statfs().filter(|_| !self.device)?.f_bsize;
        u64::try_from(size).ok().filter(|size| size.is_power_of_two())
    }

    fn clone_range(&self, at: u64, src: &dyn Storage, src_at: u64, len: u64) -> io::Result<()> {
        // A length of 0 would mean "to the end" to the kernel.
        if len == 0 {
            return Ok(());
        }
        let src = source_fd(src)?;
        let range = libc::file_clone_range {
            src_fd: src.as_raw_fd().into(),
            src_offset: src_at,
            src_length: len,
            dest_offset: at,
        };
        let clone = || {
            // SAFETY: FICLONERANGE reads one `file_clone_range`, which outlives the call; both descriptors are open.
            i64::from(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::FICLONERANGE, &raw const range) })
        };
        match retry(clone) {
            Err(e) if no_kernel_copy(&e) => Err(unsupported("cannot share blocks here (FICLONERANGE)", &e)),
            result => result.map(drop),
        }
    }

    fn copy_range(&self, at: u64, src: &dyn Storage, src_at: u64, len: u64) -> io::Result<u64> {
        let src = source_fd(src)?;
        let (from, to) = (offset(src_at)?, offset(at)?);
        let len = len.min(COPY_CHUNK) as usize;
        let copied = retry(|| {
            // The kernel moves the offsets on.
            let (mut from, mut to) = (from, to);
            // SAFETY: both offsets are live for the call; the descriptors are open.
            let n = unsafe {
                libc::copy_file_range(
                    src.as_raw_fd(),
                    &raw mut from,
                    self.file.as_raw_fd(),
                    &raw mut to,
                    len,
                    0,
                )
            };
            n as i64
        });
        match copied {
            Err(e) if no_kernel_copy(&e) => {
                Err(unsupported("cannot copy in the kernel (copy_file_range)", &e))
            }
            result => result,
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn align(&self) -> Align {
        self.align
    }

    fn is_block_device(&self) -> bool {
        self.device
    }
}

/// `_IO(0x12, 127)`; as `BLKSSZGET` is `_IO(0x12, 104)`, this is right on every architecture.
const BLKZEROOUT: libc::Ioctl = libc::BLKSSZGET + 127 - 104;

fn check_kind(meta: &fs::Metadata) -> io::Result<()> {
    let kind = meta.file_type();
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() {
        "a character device"
    } else {
        "of an unknown kind"
    };
    Err(invalid(format!("it is {what}, not a regular file or block device")))
}

fn fcntl(file: &File, command: libc::c_int, argument: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: the commands used here take an int or nothing; the descriptor is open.
    let value = retry(|| i64::from(unsafe { libc::fcntl(file.as_raw_fd(), command, argument) }))?;
    Ok(libc::c_int::try_from(value).unwrap_or(libc::c_int::MAX))
}

/// `lseek(2)`: all reading and writing is positioned, so nobody minds that the file position moves.
fn seek(file: &File, at: libc::off_t, whence: libc::c_int) -> io::Result<u64> {
    // SAFETY: takes numbers only; the descriptor is open.
    retry(|| unsafe { libc::lseek(file.as_raw_fd(), at, whence) })
}

fn sector_size(file: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int, which outlives the call.
    retry(|| i64::from(unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut size) }))?;
    u32::try_from(size)
        .ok()
        .filter(|s| s.is_power_of_two())
        .ok_or_else(|| io::Error::other(format!("the device claims a sector size of {size} bytes")))
}

/// What direct I/O on `file` asks for: `STATX_DIOALIGN` (Linux 6.1), else the sector size, else 4096.
fn direct_align(file: &File) -> io::Result<Align> {
    // SAFETY: `statx` is plain numbers, for which all zeros is a value.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    let told = retry(|| {
        let (fd, flags) = (file.as_raw_fd(), libc::AT_EMPTY_PATH);
        // SAFETY: an empty path with AT_EMPTY_PATH names the open descriptor; `st` outlives the call.
        i64::from(unsafe { libc::statx(fd, c"".as_ptr(), flags, libc::STATX_DIOALIGN, &raw mut st) })
    });
    if told.is_ok() && st.stx_mask & libc::STATX_DIOALIGN != 0 {
        let align = Align { offset: st.stx_dio_offset_align, memory: st.stx_dio_mem_align };
        if align.offset == 0 || align.memory == 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this file has no direct I/O (O_DIRECT)"));
        }
        if align.offset.is_power_of_two() && align.memory.is_power_of_two() {
            return Ok(align);
        }
    }
    let both = sector_size(file).unwrap_or(DEFAULT_ALIGN);
    Ok(Align { offset: both, memory: both })
}

fn source_fd(src: &dyn Storage) -> io::Result<BorrowedFd<'_>> {
    src.fd().ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "the source is not a file"))
}

/// `fallocate` or `BLKZEROOUT` cannot do this here, and writing zeros can.
fn no_fallocate(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY | libc::EINVAL)
    )
}

/// The file system knows no `SEEK_DATA`.
fn cannot_tell(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
}

/// Clones or kernel copies cannot be had between these two files, or not with these offsets.
fn no_kernel_copy(error: &io::Error) -> bool {
    use libc::{EINVAL, ENOSYS, ENOTTY, EOPNOTSUPP, EPERM, ETXTBSY, EXDEV};
    matches!(error.raw_os_error(), Some(EOPNOTSUPP | EXDEV | EINVAL | ENOTTY | ENOSYS | EPERM | ETXTBSY))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that this thread had read from devices.
    fn read_from_devices() -> Option<u64> {
        let text = fs::read_to_string("/proc/thread-self/io").ok()?;
        text.lines().find_map(|line| line.strip_prefix("read_bytes: ")?.parse().ok())
    }

    #[test]
    fn what_will_be_needed_is_asked_for_once() {
        const LEN: u64 = 3 << 20;
        let storage = FileStorage::from_file(tempfile::tempfile().unwrap()).unwrap();
        storage.write_all_at(&vec![7; LEN as usize + 4096], 0).unwrap();
        storage.sync().unwrap();
        for advice in [libc::POSIX_FADV_DONTNEED, libc::POSIX_FADV_RANDOM] {
            // SAFETY: takes numbers only.
            unsafe { libc::posix_fadvise(storage.file.as_raw_fd(), 0, 0, advice) };
        }
        let Some(before) = read_from_devices().filter(|_| !storage.is_cached(LEN as i64)) else {
            eprintln!("skipped: this file system keeps all in memory, or the kernel does not count reads");
            return;
        };
        storage.will_need(0, LEN);
        let asked = read_from_devices().unwrap() - before;
        assert!((LEN..LEN + (64 << 10)).contains(&asked), "{asked}");
        let mut bytes = vec![0; LEN as usize];
        assert_eq!(storage.read_at(&mut bytes, 0).unwrap(), bytes.len());
        storage.will_need(0, LEN);
        storage.will_need(u64::MAX, u64::MAX);
        assert!(read_from_devices().unwrap() - before < LEN + (64 << 10));
    }
}
