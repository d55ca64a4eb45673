//! The engine of io_uring: one ring, used by the thread that made it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::{ended, transfer};
use crate::buf::Registration;
use crate::{Batch, Buf, Direction, Done, Engine, Full, Piece, SharedStorage};

/// Slots of the table of registered files; further files are used by their plain descriptors.
const FILE_SLOTS: u32 = 64;
/// Slots of the table of registered buffers; further buffers are plain ones.
const BUFFER_SLOTS: u16 = 64;
/// The most that one operation moves, in bytes: it fits the 32-bit length and keeps any alignment.
const MAX_OP: usize = 1 << 30;
/// How long to wait before the kernel is asked again after EAGAIN or EBUSY.
const PAUSE: Duration = Duration::from_millis(1);
/// How often a drop asks again before it leaks what is in flight.
const DROP_RETRIES: u32 = 5000;

/// Moves batches through an io_uring ring of its own.
///
/// Files are registered with the ring on first use, and kept open (by their `Arc`) for the life of the engine.
/// Storages without a descriptor, and pieces that do not meet the alignment of direct I/O, are served at
/// [`submit`](Engine::submit) by the storage's own methods.
///
/// Use it only on the thread that made it: newer kernels bind the ring to that thread, and elsewhere
/// [`reap`](Engine::reap) fails with `EEXIST`. On drop it waits for what is in flight; if it cannot, it leaks those
/// buffers rather than free memory that the kernel may still write.
pub struct UringEngine {
    ring: IoUring,
    /// Which ring this is, for [`Registration`].
    id: u64,
    files: FileTable,
    /// Slots of the table of registered buffers: handed out, and in all.
    buffers: u16,
    buffer_slots: u16,
    /// Bytes of the registered buffers.
    locked: u64,
    /// Batches in flight, by slot; as many slots as the depth.
    flights: Vec<Option<Flight>>,
    /// Operations that wait for room in the submission queue.
    queue: VecDeque<Op>,
    /// Operations in the submission queue or in the kernel, each of which will post one completion.
    in_kernel: usize,
    finished: VecDeque<Done>,
    /// Completions on their way from the queue; kept for its memory.
    completions: Vec<(u64, i32)>,
}

/// A batch in flight.
struct Flight {
    tag: u64,
    batch: Batch,
    buf: Buf,
    /// Bytes moved, by piece.
    done: Vec<usize>,
    /// Pieces in the queue or in the kernel.
    pending: usize,
    /// Pieces to finish by plain calls once the kernel has let go of the buffer.
    leftover: Vec<usize>,
    failed: Vec<(usize, io::Error)>,
}

/// One operation: what is left to do of a piece.
#[derive(Clone, Copy)]
struct Op {
    slot: u32,
    piece: u32,
}

impl Op {
    fn user_data(self) -> u64 {
        u64::from(self.slot) << 32 | u64::from(self.piece)
    }

    fn from_user_data(data: u64) -> Op {
        Op { slot: (data >> 32) as u32, piece: data as u32 }
    }
}

impl UringEngine {
    /// Makes a ring for `depth` batches in flight (1 to 1024), to be used by this thread only.
    ///
    /// # Errors
    /// What the kernel says: EPERM (seccomp, `kernel.io_uring_disabled`), ENOSYS, ENOMEM (locked-memory limit).
    pub fn new(depth: usize) -> io::Result<UringEngine> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let depth = depth.clamp(1, 1024);
        let ring = build_ring((depth * 8).clamp(32, 256) as u32)?;
        let files = FileTable::new(&ring);
        let buffers = ring.submitter().register_buffers_sparse(BUFFER_SLOTS.into());
        Ok(UringEngine {
            ring,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            files,
            buffers: 0,
            locked: 0,
            buffer_slots: if buffers.is_ok() { BUFFER_SLOTS } else { 0 },
            flights: std::iter::repeat_with(|| None).take(depth).collect(),
            queue: VecDeque::new(),
            in_kernel: 0,
            finished: VecDeque::new(),
            completions: Vec::new(),
        })
    }

    /// Sees whether the kernel knows all operations that are used, by asking it and by doing a no-op.
    ///
    /// # Errors
    /// What the kernel says, or `Unsupported`.
    pub(super) fn probe(&mut self) -> io::Result<()> {
        let mut probe = Probe::new();
        self.ring.submitter().register_probe(&mut probe)?;
        let needed =
            [opcode::Read::CODE, opcode::Write::CODE, opcode::ReadFixed::CODE, opcode::WriteFixed::CODE];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "it lacks reads and writes (before Linux 5.6)",
            ));
        }
        // SAFETY: a no-op refers to no memory.
        unsafe { self.ring.submission().push(&opcode::Nop::new().build()) }.map_err(io::Error::other)?;
        while self.ring.completion().next().is_none() {
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Moves operations from our queue into the kernel, as many as fit.
    fn pump(&mut self) -> io::Result<()> {
        let limit = self.ring.params().cq_entries() as usize;
        loop {
            while self.in_kernel < limit
                && !self.ring.submission().is_full()
                && let Some(op) = self.queue.pop_front()
            {
                let Some(entry) = self.entry(op) else {
                    self.put_aside(op);
                    continue;
                };
                // SAFETY: the entry's memory belongs to the buffer of a flight (`Flight::entry`), which stays in
                // `flights`, unmoved on the heap and with no reference to its bytes, until the completion of this
                // operation was seen; `drop` waits for it or leaks the buffer. The descriptor is kept open by the
                // piece's `Arc`.
                match unsafe { self.ring.submission().push(&entry) } {
                    Ok(()) => self.in_kernel += 1,
                    Err(_) => {
                        self.queue.push_front(op);
                        break;
                    }
                }
            }
            let waiting = {
                let queue = self.ring.submission();
                !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
            };
            if !waiting {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(0) => return Ok(()),
                Ok(_) if self.queue.is_empty() || self.in_kernel >= limit => return Ok(()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_busy(&e) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    fn entry(&mut self, op: Op) -> Option<squeue::Entry> {
        let flight = self.flights.get_mut(op.slot as usize)?.as_mut()?;
        let (fd, flags) =
            self.files.descriptor(&self.ring, &flight.batch.pieces.get(op.piece as usize)?.file)?;
        let entry = flight.entry(op.piece as usize, types::Fd(fd), self.id)?;
        Some(entry.flags(flags).user_data(op.user_data()))
    }

    /// Takes what the kernel has completed.
    fn harvest(&mut self) {
        let mut completions = mem::take(&mut self.completions);
        completions.extend(self.ring.completion().map(|c| (c.user_data(), c.result())));
        for (data, result) in completions.drain(..) {
            self.in_kernel = self.in_kernel.saturating_sub(1);
            let op = Op::from_user_data(data);
            let Some(Some(flight)) = self.flights.get_mut(op.slot as usize) else { continue };
            match flight.complete(op.piece as usize, result) {
                Next::Resubmit => self.queue.push_front(op),
                Next::Finished => self.settle(op.slot as usize),
            }
        }
        self.completions = completions;
    }

    /// Leaves a piece that cannot go to the kernel to plain calls.
    fn put_aside(&mut self, op: Op) {
        if let Some(Some(flight)) = self.flights.get_mut(op.slot as usize) {
            flight.leftover.push(op.piece as usize);
            flight.pending = flight.pending.saturating_sub(1);
            self.settle(op.slot as usize);
        }
    }

    /// Finishes the batch in `slot` if the kernel has none of its pieces any more.
    fn settle(&mut self, slot: usize) {
        if let Some(place) = self.flights.get_mut(slot)
            && let Some(mut flight) = place.take_if(|f| f.pending == 0)
        {
            flight.finish_leftover();
            let Flight { tag, batch, buf, failed, .. } = flight;
            self.finished.push_back(Done { tag, batch, buf, failed });
        }
    }

    /// How many completions to wait for at once: no batch can be whole before.
    fn wanted(&self) -> usize {
        let least = self.flights.iter().flatten().map(|f| f.pending).min().unwrap_or(0);
        least.min(self.in_kernel).max(1)
    }
}

enum Next {
    Resubmit,
    Finished,
}

impl Flight {
    /// The submission entry for what is left of a piece; `None` if the kernel cannot do it.
    fn entry(&mut self, piece: usize, fd: types::Fd, ring: u64) -> Option<squeue::Entry> {
        let done = *self.done.get(piece)?;
        let piece = self.batch.pieces.get(piece)?;
        if !kernel_can(piece, &self.buf, done) {
            return None;
        }
        let at = piece.at.checked_add(done as u64)?;
        let len = piece.len.checked_sub(done)?.min(MAX_OP) as u32;
        // Inside the buffer, as `kernel_can` says.
        let address = self.buf.as_raw().wrapping_add(piece.buf_at).wrapping_add(done);
        let fixed = self.buf.registration().filter(|r| r.ring == ring).map(|r| r.index);
        Some(match (self.batch.direction, fixed) {
            (Direction::Read, None) => opcode::Read::new(fd, address, len).offset(at).build(),
            (Direction::Read, Some(i)) => opcode::ReadFixed::new(fd, address, len, i).offset(at).build(),
            (Direction::Write, None) => opcode::Write::new(fd, address, len).offset(at).build(),
            (Direction::Write, Some(i)) => opcode::WriteFixed::new(fd, address, len, i).offset(at).build(),
        })
    }

    /// Takes the result of an operation: bytes moved, or an error number below 0.
    fn complete(&mut self, index: usize, result: i32) -> Next {
        let (Some(piece), Some(done)) = (self.batch.pieces.get(index), self.done.get_mut(index)) else {
            return Next::Finished;
        };
        match usize::try_from(result) {
            Ok(0) => {
                let at = piece.at.saturating_add(*done as u64);
                self.failed.push((index, ended(self.batch.direction, at)));
            }
            Ok(moved) => {
                *done = done.saturating_add(moved).min(piece.len);
                if *done < piece.len {
                    if kernel_can(piece, &self.buf, *done) {
                        return Next::Resubmit;
                    }
                    self.leftover.push(index);
                }
            }
            Err(_) => match result.saturating_neg() {
                // The kernel could not do it this way or at this moment: a plain call waits as long as it takes
                // and gives the true error.
                libc::EINTR | libc::EAGAIN | libc::ECANCELED | libc::EINVAL | libc::EOPNOTSUPP => {
                    self.leftover.push(index);
                }
                errno => self.failed.push((index, io::Error::from_raw_os_error(errno))),
            },
        }
        self.pending = self.pending.saturating_sub(1);
        Next::Finished
    }

    /// Does by plain calls what was left over.
    fn finish_leftover(&mut self) {
        for index in mem::take(&mut self.leftover) {
            let (Some(piece), Some(&done)) = (self.batch.pieces.get(index), self.done.get(index)) else {
                continue;
            };
            if let Err(e) = transfer(piece, self.batch.direction, &mut self.buf, done) {
                self.failed.push((index, e));
            }
        }
        self.failed.sort_by_key(|&(index, _)| index);
    }
}

/// Whether the kernel can move this piece from `done` on: it has a descriptor, lies in the buffer and is aligned.
fn kernel_can(piece: &Piece, buf: &Buf, done: usize) -> bool {
    let (Some(at), Some(len)) = (piece.at.checked_add(done as u64), piece.len.checked_sub(done)) else {
        return false;
    };
    let in_buffer = piece.buf_at.checked_add(piece.len).is_some_and(|end| end <= buf.len());
    // Offset 2^64 − 1 would mean "the file position" to io_uring.
    let in_file = at.checked_add(len as u64).is_some_and(|end| i64::try_from(end).is_ok());
    let address = buf.address().wrapping_add(piece.buf_at).wrapping_add(done);
    len > 0
        && in_buffer
        && in_file
        && piece.file.fd().is_some()
        && piece.file.align().admits(address, len, at)
}

impl Engine for UringEngine {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    fn depth(&self) -> usize {
        self.flights.len()
    }

    fn submit(&mut self, batch: Batch, buf: Buf, tag: u64) -> Result<(), Full> {
        let slot = match self.flights.iter().position(Option::is_none) {
            Some(slot) if self.in_flight() < self.depth() => slot,
            _ => return Err(Full(batch, buf)),
        };
        let by_kernel = |piece: &Piece| kernel_can(piece, &buf, 0);
        let (kernel, plain) =
            (0..batch.pieces.len()).partition::<Vec<_>, _>(|&i| by_kernel(&batch.pieces[i]));
        let done = vec![0; batch.pieces.len()];
        let pending = kernel.len();
        let mut flight = Flight { tag, batch, buf, done, pending, leftover: plain, failed: Vec::new() };
        // Before the kernel has any piece of this buffer.
        flight.finish_leftover();
        self.flights[slot] = Some(flight);
        self.queue.extend(kernel.iter().map(|&piece| Op { slot: slot as u32, piece: piece as u32 }));
        self.settle(slot);
        // What the kernel did not take stays queued, and `reap` meets and reports the same error.
        let _ = self.pump();
        Ok(())
    }

    fn reap(&mut self, at_least: usize, out: &mut Vec<Done>) -> io::Result<()> {
        let target = at_least.min(self.in_flight());
        loop {
            let mut pumped = self.pump();
            self.harvest();
            if !self.queue.is_empty() {
                pumped = pumped.and(self.pump());
            }
            if self.finished.len() >= target {
                out.extend(self.finished.drain(..));
                return Ok(());
            }
            pumped?;
            match self.ring.submit_and_wait(self.wanted()) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_busy(&e) => std::thread::sleep(PAUSE),
                Err(e) => return Err(e),
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.flights.iter().flatten().count() + self.finished.len()
    }

    /// A buffer that is registered with this ring, while there are locked memory (half of `RLIMIT_MEMLOCK` for
    /// the whole process) and one of 64 slots for it; a plain one otherwise. A slot is not used again: keep the buffer.
    fn buffer(&mut self, capacity: usize) -> io::Result<Buf> {
        let mut buf = Buf::new(capacity)?;
        let size = buf.capacity() as u64;
        if self.buffers >= self.buffer_slots || size == 0 || !reserve_locked(size) {
            return Ok(buf);
        }
        let iovec = libc::iovec { iov_base: buf.as_raw().cast(), iov_len: buf.capacity() };
        let submitter = self.ring.submitter();
        // SAFETY: the kernel pins the pages behind the buffer until the ring goes, so they stay valid even when
        // the buffer is freed before; and only an operation on a live `Buf` that carries this index uses them.
        match unsafe { submitter.register_buffers_update(self.buffers.into(), &[iovec], None) } {
            Ok(()) => {
                buf.set_registration(Some(Registration { ring: self.id, index: self.buffers }));
                self.buffers += 1;
                self.locked += size;
            }
            Err(_) => {
                // The locked-memory limit, as a rule: the next one would fail as well.
                self.buffer_slots = self.buffers;
                LOCKED.fetch_sub(size, Ordering::Relaxed);
            }
        }
        Ok(buf)
    }
}

/// Bytes of the buffers that are registered with all rings of this process.
static LOCKED: AtomicU64 = AtomicU64::new(0);

/// Reserves locked memory for a registered buffer: half of `RLIMIT_MEMLOCK` at most, as the rings themselves need
/// some of it, and a ring pays more than its buffers.
fn reserve_locked(size: u64) -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes one `rlimit`, which outlives the call.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } != 0 {
        return false;
    }
    // "Unlimited" is the largest number.
    let budget = limit.rlim_cur / 2;
    let add = |locked: u64| locked.checked_add(size).filter(|&sum| sum <= budget);
    LOCKED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).is_ok()
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        LOCKED.fetch_sub(self.locked, Ordering::Relaxed);
        self.queue.clear();
        let mut retries = DROP_RETRIES;
        while self.in_kernel > 0 {
            let waited = self.ring.submit_and_wait(1);
            self.in_kernel = self.in_kernel.saturating_sub(self.ring.completion().count());
            match waited {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if is_busy(&e) && retries > 0 => {
                    retries -= 1;
                    std::thread::sleep(PAUSE);
                }
                Err(_) if self.in_kernel > 0 => {
                    // The kernel may still write into these buffers.
                    self.flights.drain(..).flatten().for_each(mem::forget);
                    return;
                }
                _ => {}
            }
        }
    }
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringEngine")
            .field("id", &self.id)
            .field("depth", &self.depth())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

/// The files that are registered with a ring.
struct FileTable {
    /// By slot; never removed, so that no slot can stand for another file.
    files: Vec<SharedStorage>,
    slots: usize,
}

impl FileTable {
    fn new(ring: &IoUring) -> FileTable {
        let registered = ring.submitter().register_files_sparse(FILE_SLOTS);
        FileTable { files: Vec::new(), slots: if registered.is_ok() { FILE_SLOTS as usize } else { 0 } }
    }

    /// How to name `file` in a submission: the slot, filled on first use, or else the plain descriptor.
    fn descriptor(&mut self, ring: &IoUring, file: &SharedStorage) -> Option<(RawFd, squeue::Flags)> {
        // The table keeps each storage alive, so an address stays that of the same storage.
        let address = |storage: &SharedStorage| Arc::as_ptr(storage).cast::<()>();
        let slot = match self.files.iter().position(|known| address(known) == address(file)) {
            Some(slot) => slot,
            None => {
                let slot = self.files.len();
                let fd = file.fd()?.as_raw_fd();
                let plain = Some((fd, squeue::Flags::empty()));
                if slot >= self.slots {
                    return plain;
                }
                if !matches!(ring.submitter().register_files_update(slot as u32, &[fd]), Ok(1)) {
                    self.slots = slot;
                    return plain;
                }
                self.files.push(Arc::clone(file));
                slot
            }
        };
        Some((RawFd::try_from(slot).ok()?, squeue::Flags::FIXED_FILE))
    }
}

/// Makes a ring with the flags that suit one thread, as far as the kernel knows them.
fn build_ring(entries: u32) -> io::Result<IoUring> {
    let unknown = |e: &io::Error| e.raw_os_error() == Some(libc::EINVAL);
    let mut newest = IoUring::builder(); // Linux 6.1
    newest.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
    let mut newer = IoUring::builder(); // Linux 5.19
    newer.setup_coop_taskrun().setup_taskrun_flag();
    for builder in [newest, newer] {
        match builder.build(entries) {
            Err(e) if unknown(&e) => {}
            result => return result,
        }
    }
    IoUring::new(entries)
}

/// The kernel has no memory or no room for now; what completes meanwhile makes some.
fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}
