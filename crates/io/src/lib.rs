//! Where the bytes of an image live, and how they are moved.
//!
//! * [`Storage`]: positioned bytes: a regular file, a block device, memory, or a faulty disk for tests.
//! * [`Engine`]: moves batches of bytes between storages and owned buffers, through io_uring or
//!   through plain positioned system calls. One engine per worker thread.
//! * holes, zero ranges and clones, as methods of [`Storage`]; [`ImageLock`]s that QEMU understands.
//! * [`PipeReader`] and [`PipeWriter`]: streams, front to back.
//! * [`PendingFile`]: output that appears under its name only when it is whole; [`temporary()`]: a file without a name.
//!
//! This is the crate for `unsafe` code; outside it, only `diskmill-codec` has some, for calls into libdeflate. It knows nothing of image formats.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

mod buf;
mod engine;
mod faulty;
mod file;
mod inherit;
mod lock;
mod memory;
mod pipe;
mod publish;
mod reflink;
mod signals;
mod sys;
mod temporary;

pub use buf::{BUF_ALIGN, Buf};
pub use engine::{EngineChoice, EnginePlan, SyncEngine, UringEngine};
pub use faulty::{CrashStates, FaultyStorage, Moment};
pub use file::{FileStorage, OpenHow};
pub use inherit::inherit_nothing;
pub use lock::{CustodyLock, ImageLock, LockError, LockMode};
pub use memory::MemoryStorage;
pub use pipe::{PipeReader, PipeWriter};
pub use publish::{PendingFile, unlink_all_pending};
pub use reflink::reflinks_in;
pub use signals::is_ignored;
pub use temporary::temporary;

/// What is stored in a range, as far as the storage can tell without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocation {
    /// Bytes that may be anything.
    Data,
    /// A hole: reads as zeros and takes no space.
    Hole,
}

/// The alignment that a storage wants of offsets, lengths and memory, in bytes. 1 where it does not care
/// (everything but files opened with `O_DIRECT`). Powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Align {
    /// Of file offsets and lengths.
    pub offset: u32,
    /// Of buffer addresses.
    pub memory: u32,
}

impl Align {
    /// Whether an access to `len` bytes at file offset `at`, in memory at `address`, meets this alignment.
    pub fn admits(self, address: usize, len: usize, at: u64) -> bool {
        let (offset, memory) = (u64::from(self.offset.max(1)), self.memory.max(1) as usize);
        at.is_multiple_of(offset) && (len as u64).is_multiple_of(offset) && address.is_multiple_of(memory)
    }
}

/// Bytes in a page of memory, and so of the page cache.
#[must_use]
pub fn page_size() -> u64 {
    // SAFETY: takes a number only.
    u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// How many CPUs this process may use: the affinity mask and the cgroup quota count. At least 1.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Positioned bytes. All methods take `&self` and are safe from several threads.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Reads at most `buf.len()` bytes at `at`; 0 means the end of the storage.
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize>;
    /// Writes at most `buf.len()` bytes at `at`, growing the storage if it can grow.
    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<usize>;
    /// Writes all of `buf` at `at`. `WriteZero` if the storage takes nothing more.
    fn write_all_at(&self, mut buf: &[u8], mut at: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.write_at(buf, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(done) => {
                    buf = buf.get(done..).unwrap_or_default();
                    at = at.saturating_add(done as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
    /// The length in bytes (of a block device: its size).
    fn len(&self) -> io::Result<u64>;
    /// Whether the length is 0.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Cuts or grows (with a hole) to `len` bytes. `Unsupported` for devices unless the length already fits.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes what was written durable (`fdatasync`), a barrier.
    fn sync(&self) -> io::Result<()>;
    /// The run that starts at `at`: what it is and where it ends (exclusive, at most the length).
    /// `None` at or past the end. Storages that can't tell answer `Data` up to the end.
    fn allocation(&self, at: u64) -> io::Result<Option<(Allocation, u64)>>;
    /// Makes the range read as zeros. With `keep_allocated` the blocks stay allocated
    /// (`FALLOC_FL_ZERO_RANGE`), otherwise they are given back where possible (`PUNCH_HOLE`). Falls back
    /// to writing zeros. Never changes the length except to grow it to cover the range.
    fn write_zeroes(&self, at: u64, len: u64, keep_allocated: bool) -> io::Result<()>;
    /// Reserves blocks for the range (`fallocate`), growing the length to cover it. `Unsupported` where the
    /// file system cannot.
    fn allocate(&self, at: u64, len: u64) -> io::Result<()>;
    /// Whether [`allocate`](Self::allocate) before a large write makes the two together faster than the write alone.
    ///
    /// On ext4 it does: a write into reserved blocks skips the delayed allocation of each block, which costs as much as
    /// copying the bytes (measured on Linux 6.18: 10 instead of 5 GB/s).
    fn gains_from_allocate(&self) -> bool {
        false
    }
    /// Begins to bring the range into the page cache, and does not wait for that. A hint: whether it is followed is not
    /// told. Costs one short system call if the range's first page is there already.
    fn will_need(&self, _at: u64, _len: u64) {}
    /// The block size of the file system in bytes: what offsets and lengths of clones must be multiples of. `None` for
    /// whatever is not a regular file.
    fn block_size(&self) -> Option<u64> {
        None
    }
    /// Shares the blocks of `src[src_at..src_at+len]` at `at` (`FICLONERANGE`).
    /// `Unsupported` (EOPNOTSUPP, EXDEV, EINVAL, ...) where that is not to be had.
    fn clone_range(&self, at: u64, src: &dyn Storage, src_at: u64, len: u64) -> io::Result<()>;
    /// Copies inside the kernel (`copy_file_range`); may be short, like `read_at`.
    fn copy_range(&self, at: u64, src: &dyn Storage, src_at: u64, len: u64) -> io::Result<u64>;
    /// The descriptor, for engines and locks, where there is one.
    fn fd(&self) -> Option<BorrowedFd<'_>>;
    /// What the storage wants of offsets, lengths and memory.
    fn align(&self) -> Align;
    /// Whether this is a block device.
    fn is_block_device(&self) -> bool {
        false
    }
}

/// A shared storage.
pub type SharedStorage = Arc<dyn Storage>;

/// One contiguous piece of a [`Batch`].
#[derive(Debug, Clone)]
pub struct Piece {
    /// Where the bytes live.
    pub file: SharedStorage,
    /// Offset in `file`, in bytes.
    pub at: u64,
    /// Offset in the buffer, in bytes.
    pub buf_at: usize,
    /// Length in bytes.
    pub len: usize,
}

/// Which way a batch moves its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From storage into the buffer.
    Read,
    /// From the buffer to storage.
    Write,
}

/// Pieces that share one buffer and complete together.
#[derive(Debug)]
pub struct Batch {
    /// Which way.
    pub direction: Direction,
    /// The pieces; their buffer ranges must not overlap when reading.
    pub pieces: Vec<Piece>,
}

/// A finished [`Batch`].
#[derive(Debug)]
pub struct Done {
    /// The tag that was given to [`Engine::submit`].
    pub tag: u64,
    /// The batch as submitted.
    pub batch: Batch,
    /// The buffer, back from the kernel.
    pub buf: Buf,
    /// The pieces that failed, by index; empty when all went well. A read that meets the end of the storage
    /// fails with `UnexpectedEof`.
    pub failed: Vec<(usize, io::Error)>,
}

/// A queue that can take no more for now.
#[derive(Debug)]
pub struct Full(pub Batch, pub Buf);

/// Moves batches. One per worker; buffers are moved in and come back, nothing is borrowed by the kernel.
pub trait Engine: Send {
    /// `"io_uring"` or `"sync"`.
    fn name(&self) -> &'static str;
    /// How many batches it pays to keep in flight (1 for the synchronous engine).
    fn depth(&self) -> usize;
    /// Starts a batch. Short completions are resubmitted by the engine.
    ///
    /// # Errors
    /// [`Full`] gives batch and buffer back when [`depth`](Self::depth) batches are in flight: reap first.
    fn submit(&mut self, batch: Batch, buf: Buf, tag: u64) -> Result<(), Full>;
    /// Appends finished batches to `out`, waiting until at least `at_least` have finished (never more than are
    /// in flight).
    ///
    /// # Errors
    /// Only if the engine itself fails; the failure of a piece is in its [`Done`].
    fn reap(&mut self, at_least: usize, out: &mut Vec<Done>) -> io::Result<()>;
    /// Batches in flight.
    fn in_flight(&self) -> usize;
    /// A buffer of `capacity` zero bytes that this engine can move fastest: registered with its ring where that is
    /// to be had, an ordinary [`Buf::new`] otherwise. It may be used with any engine, and reused after each batch.
    ///
    /// # Errors
    /// `OutOfMemory`, as [`Buf::new`].
    fn buffer(&mut self, capacity: usize) -> io::Result<Buf> {
        Buf::new(capacity)
    }
}
