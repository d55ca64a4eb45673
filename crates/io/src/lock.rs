//! Image locks that QEMU understands, and that understand QEMU's.
//!
//! QEMU takes shared (read) byte-range locks of the open file description on single bytes of the image file: byte
//! 100 + n says "I use permission n", byte 200 + n says "I do not share permission n". Whoever wants to use a
//! permission looks for somebody who does not share it, and the other way round (`block/file-posix.c`).

use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::SharedStorage;
use crate::sys::{describe, retry};

/// Where the bytes for permissions in use begin.
const USED: u16 = 100;
/// Where the bytes for permissions that are not shared begin.
const UNSHARED: u16 = 200;

/// The byte of [`CustodyLock`], below all of QEMU's.
const CUSTODY: u16 = 99;

/// QEMU's block permissions by bit, in its words.
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];
const CONSISTENT_READ: u8 = 1 << 0;
const WRITE: u8 = 1 << 1;
const RESIZE: u8 = 1 << 3;

/// What an image is locked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Reading, with nobody writing meanwhile.
    Reader,
    /// Writing, with nobody else writing.
    Writer,
    /// Reading whatever is there while others may write (`-U`, `--force-share`).
    Shared,
}

impl LockMode {
    /// The permissions in use, by bit.
    fn used(self) -> u8 {
        match self {
            LockMode::Reader | LockMode::Shared => CONSISTENT_READ,
            LockMode::Writer => CONSISTENT_READ | WRITE | RESIZE,
        }
    }

    /// The permissions not shared, by bit.
    fn unshared(self) -> u8 {
        match self {
            LockMode::Reader | LockMode::Writer => WRITE | RESIZE,
            LockMode::Shared => 0,
        }
    }
}

/// Why an image could not be locked.
#[derive(Debug)]
pub enum LockError {
    /// Another process uses the image in a way that does not go with this mode.
    Conflict {
        /// The mode that was asked for.
        mode: LockMode,
        /// The permission, in QEMU's words: `"consistent read"`, `"write"`, `"write unchanged"` or `"resize"`.
        permission: &'static str,
        /// The other process uses the permission that we would not share; otherwise it is the other one that
        /// does not share what we would use.
        in_use: bool,
    },
    /// The system refused.
    Io(io::Error),
}

impl fmt::Display for LockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LockError::Conflict { mode, permission, in_use } => {
                if *in_use {
                    write!(f, "failed to get shared \"{permission}\" lock: ")?;
                    write!(f, "the \"{permission}\" lock is held by another process")?;
                } else {
                    write!(f, "failed to get \"{permission}\" lock: ")?;
                    write!(f, "another process has the image open and does not share \"{permission}\"")?;
                }
                match mode {
                    LockMode::Writer => write!(f, "; end that process first"),
                    _ => {
                        write!(f, "; -U (--force-share) reads all the same, at the risk of inconsistent data")
                    }
                }
            }
            LockError::Io(error) => write!(f, "locking the image failed: {}", describe(error)),
        }
    }
}

impl Error for LockError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            LockError::Io(error) => Some(error),
            LockError::Conflict { .. } => None,
        }
    }
}

impl From<LockError> for io::Error {
    fn from(error: LockError) -> io::Error {
        match error {
            LockError::Io(error) => error,
            conflict => io::Error::new(io::ErrorKind::ResourceBusy, conflict),
        }
    }
}

/// A lock on an image, released on drop.
///
/// The locks belong to the open file, so two of these on one storage share their fate: take one per storage.
#[derive(Debug)]
pub struct ImageLock {
    storage: SharedStorage,
    mode: LockMode,
    held: bool,
}

impl ImageLock {
    /// Takes the locks for `mode`, then looks for conflicts, in this order so that of two processes at least one
    /// sees the other. Storages without a descriptor, and file systems without such locks, are not locked.
    ///
    /// # Errors
    /// [`LockError::Conflict`] if another process stands in the way; [`LockError::Io`] for what else the system says
    /// (EBADF if the storage is open for writing only).
    pub fn acquire(storage: &SharedStorage, mode: LockMode) -> Result<ImageLock, LockError> {
        let mut lock = ImageLock { storage: SharedStorage::clone(storage), mode, held: false };
        let Some(fd) = storage.fd() else { return Ok(lock) };
        // From here on the drop releases whatever was taken.
        lock.held = true;
        for byte in mode.bytes() {
            match set(fd, byte, libc::F_RDLCK) {
                Ok(()) => {}
                Err(e)
                    if matches!(e.raw_os_error(), Some(libc::ENOLCK | libc::EINVAL | libc::EOPNOTSUPP)) =>
                {
                    return Ok(ImageLock { storage: SharedStorage::clone(storage), mode, held: false });
                }
                // Somebody holds an exclusive lock: not QEMU, but a conflict.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                    return Err(conflict(mode, byte, byte >= UNSHARED));
                }
                Err(e) => return Err(LockError::Io(e)),
            }
        }
        let against_users = bits(mode.unshared(), USED);
        let against_keepers = bits(mode.used(), UNSHARED);
        for byte in against_keepers.chain(against_users) {
            if is_locked(fd, byte).map_err(LockError::Io)? {
                return Err(conflict(mode, byte, byte < UNSHARED));
            }
        }
        Ok(lock)
    }

    /// What the image is locked for.
    pub fn mode(&self) -> LockMode {
        self.mode
    }

    /// Whether there is a lock at all: not where the storage or its file system has none.
    pub fn is_held(&self) -> bool {
        self.held
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        if let (true, Some(fd)) = (self.held, self.storage.fd()) {
            for byte in self.mode.bytes() {
                // Closing the file would release it anyway.
                let _ = set(fd, byte, libc::F_UNLCK);
            }
        }
    }
}

/// An exclusive lock beside QEMU's, released on drop: for programs of ours that let QEMU write to an image.
///
/// While QEMU writes it holds its own locks, with which an [`ImageLock`] of ours would conflict. This one is on a byte that
/// QEMU does not look at, and keeps other programs of ours away from before QEMU starts until all is done.
#[derive(Debug)]
pub struct CustodyLock {
    storage: SharedStorage,
    held: bool,
}

impl CustodyLock {
    /// Takes the lock. Storages without a descriptor, and file systems without such locks, are not locked.
    ///
    /// # Errors
    /// [`LockError::Conflict`] if another program of ours has it; [`LockError::Io`] for what else the system says (EBADF
    /// if the storage is open for reading only).
    pub fn acquire(storage: &SharedStorage) -> Result<Self, LockError> {
        let mut lock = Self { storage: SharedStorage::clone(storage), held: false };
        let Some(fd) = storage.fd() else { return Ok(lock) };
        match set(fd, CUSTODY, libc::F_WRLCK) {
            Ok(()) => lock.held = true,
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOLCK | libc::EINVAL | libc::EOPNOTSUPP)) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Err(LockError::Conflict {
                    mode: LockMode::Writer,
                    permission: "write",
                    in_use: true,
                });
            }
            Err(e) => return Err(LockError::Io(e)),
        }
        Ok(lock)
    }
}

impl Drop for CustodyLock {
    fn drop(&mut self) {
        if let (true, Some(fd)) = (self.held, self.storage.fd()) {
            // Closing the file would release it anyway.
            let _ = set(fd, CUSTODY, libc::F_UNLCK);
        }
    }
}

impl LockMode {
    /// The bytes to hold.
    fn bytes(self) -> impl Iterator<Item = u16> {
        bits(self.used(), USED).chain(bits(self.unshared(), UNSHARED))
    }
}

/// The byte for each bit that is set.
fn bits(set: u8, base: u16) -> impl Iterator<Item = u16> {
    (0..4u16).filter(move |bit| set & 1 << bit != 0).map(move |bit| base + bit)
}

fn conflict(mode: LockMode, byte: u16, in_use: bool) -> LockError {
    let permission = NAMES[usize::from(byte % 100) % NAMES.len()];
    LockError::Conflict { mode, permission, in_use }
}

fn set(fd: BorrowedFd<'_>, byte: u16, kind: libc::c_int) -> io::Result<()> {
    ofd_lock(fd, libc::F_OFD_SETLK, byte, kind).map(drop)
}

/// Whether another open file holds any lock on `byte`.
fn is_locked(fd: BorrowedFd<'_>, byte: u16) -> io::Result<bool> {
    let found = ofd_lock(fd, libc::F_OFD_GETLK, byte, libc::F_WRLCK)?;
    Ok(libc::c_int::from(found.l_type) != libc::F_UNLCK)
}

fn ofd_lock(
    fd: BorrowedFd<'_>,
    command: libc::c_int,
    byte: u16,
    kind: libc::c_int,
) -> io::Result<libc::flock> {
    // SAFETY: `flock` is plain numbers, for which all zeros is a value (l_pid must be 0 for OFD locks).
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte.into();
    lock.l_len = 1;
    // SAFETY: these commands read and write one `flock`, which outlives the call; the descriptor is open.
    retry(|| i64::from(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw mut lock) }))?;
    Ok(lock)
}
