//! A disk that fails on command, for tests.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::sys::{range_end, unsupported};
use crate::{Align, Allocation, MemoryStorage, SharedStorage, Storage};

/// What a crash leaves whole, in bytes: each write may be torn at these borders.
const SECTOR: u64 = 512;
/// The largest storage that can be journalled, in bytes.
const MAX_JOURNALLED: u64 = 1 << 30;

/// Wraps a storage and makes it fail as told. It has no descriptor, so every engine goes through its methods.
///
/// With the journal on, it remembers what was written since each [`sync`](Storage::sync), and
/// [`crash_states`](Self::crash_states) gives what a disk may hold after a power failure.
pub struct FaultyStorage {
    inner: SharedStorage,
    state: Mutex<State>,
    before_sync: OnceLock<Hook>,
}

type Hook = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct State {
    bad_reads: Vec<Range<u64>>,
    bad_writes: Vec<Range<u64>>,
    sync_fails: bool,
    space_left: Option<u64>,
    max_transfer: Option<usize>,
    /// Clones that are still to succeed; none can be had while this is `None`.
    clones_left: Option<usize>,
    journal: Option<Journal>,
}

/// What was written, by barrier.
struct Journal {
    /// The content when the journal was started.
    base: Vec<u8>,
    /// What was done between one barrier and the next; the last one is still open.
    epochs: Vec<Vec<Change>>,
}

/// A point in the journal of a [`FaultyStorage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moment {
    /// Barriers ([`sync`](Storage::sync)) before it.
    pub barriers: usize,
    /// Changes since the last of them.
    pub changes: usize,
}

#[derive(Clone)]
enum Change {
    Write { at: u64, data: Vec<u8> },
    Zero { at: u64, len: u64 },
    SetLen(u64),
}

impl FaultyStorage {
    /// Wraps `inner`; without faults for now.
    pub fn new(inner: SharedStorage) -> FaultyStorage {
        FaultyStorage { inner, state: Mutex::default(), before_sync: OnceLock::new() }
    }

    /// Reads that touch `range` fail with EIO.
    pub fn fail_reads(&self, range: Range<u64>) {
        self.state().bad_reads.push(range);
    }

    /// Writes (and zeroing, reserving, copying) that touch `range` fail with EIO.
    pub fn fail_writes(&self, range: Range<u64>) {
        self.state().bad_writes.push(range);
    }

    /// Whether [`sync`](Storage::sync) fails with EIO.
    pub fn fail_sync(&self, fail: bool) {
        self.state().sync_fails = fail;
    }

    /// Writes fail with ENOSPC after `bytes` more bytes; the last one before that is short.
    pub fn limit_space(&self, bytes: u64) {
        self.state().space_left = Some(bytes);
    }

    /// The next `count` clones succeed, by copying; those after them fail with EIO. Without this, clones are
    /// `Unsupported`.
    pub fn allow_clones(&self, count: usize) {
        self.state().clones_left = Some(count);
    }

    /// Each read and write moves at most `bytes` (at least 1).
    pub fn shorten(&self, bytes: usize) {
        self.state().max_transfer = Some(bytes.max(1));
    }

    /// Calls `hook` before each barrier ([`sync`](Storage::sync)), when most is open. Only the first one is taken.
    pub fn before_sync(&self, hook: impl Fn() + Send + Sync + 'static) {
        // A second one would be a mistake of the test, which its counts show.
        let _ = self.before_sync.set(Box::new(hook));
    }

    /// Ends all faults. The journal goes on.
    pub fn heal(&self) {
        let mut state = self.state();
        let journal = state.journal.take();
        *state = State { journal, ..State::default() };
    }

    /// Starts the journal, with what is stored now as durable.
    ///
    /// # Errors
    /// What reading says; `InvalidInput` above 1 GiB.
    pub fn start_journal(&self) -> io::Result<()> {
        let mut state = self.state();
        let len = self.inner.len()?;
        if len > MAX_JOURNALLED {
            return Err(crate::sys::invalid(format!(
                "a storage of {len} bytes is too long to be journalled"
            )));
        }
        let mut base = vec![0; len as usize];
        let mut at = 0;
        while at < base.len() {
            match self.inner.read_at(&mut base[at..], at as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => at += n,
            }
        }
        state.journal = Some(Journal { base, epochs: vec![Vec::new()] });
        Ok(())
    }

    /// How far the journal has come; its start without a journal.
    pub fn moment(&self) -> Moment {
        let state = self.state();
        let epochs = state.journal.as_ref().map(|journal| &journal.epochs);
        epochs.map_or(Moment::default(), |epochs| Moment {
            barriers: epochs.len().saturating_sub(1),
            changes: epochs.last().map_or(0, Vec::len),
        })
    }

    /// The moments before each barrier, and now: those at which most is open. None without a journal.
    pub fn moments(&self) -> Vec<Moment> {
        let state = self.state();
        let epochs = state.journal.iter().flat_map(|journal| &journal.epochs);
        epochs.enumerate().map(|(barriers, open)| Moment { barriers, changes: open.len() }).collect()
    }

    /// What the disk may hold if the power fails now: all that was written before the last barrier, and of what was
    /// written since any subset in any order, with writes torn at 512-byte borders. At most `max` states: first none
    /// of it, then all of it, then each subset if there are few enough, or random ones (by `seed`, always the same):
    /// of sectors, of whole writes, all but one write, or the writes up to some point.
    /// Empty without a journal.
    pub fn crash_states(&self, seed: u64, max: usize) -> CrashStates {
        self.crash_states_at(self.moment(), seed, max)
    }

    /// As [`crash_states`](Self::crash_states), for a power failure at an earlier moment.
    pub fn crash_states_at(&self, moment: Moment, seed: u64, max: usize) -> CrashStates {
        let state = self.state();
        let open = state.journal.as_ref().and_then(|journal| {
            let open = journal.epochs.get(moment.barriers)?;
            Some((journal, open.get(..moment.changes)?))
        });
        let Some((journal, open)) = open else {
            return CrashStates {
                base: Vec::new(),
                changes: Vec::new(),
                next: 0,
                count: 0,
                random: Random(seed),
            };
        };
        let mut base = journal.base.clone();
        journal.epochs.iter().take(moment.barriers).flatten().for_each(|change| change.apply(&mut base));
        let torn = |(index, change): (usize, &Change)| {
            change.sectors().into_iter().map(move |part| (index, part)).collect::<Vec<_>>()
        };
        let changes: Vec<_> = open.iter().enumerate().flat_map(torn).collect();
        let subsets =
            u32::try_from(changes.len()).ok().and_then(|n| 1usize.checked_shl(n)).filter(|&n| n > 0);
        // A single order of so few changes is not all there is; the states beyond the subsets shuffle them.
        let count = if changes.is_empty() {
            max.min(1)
        } else {
            max.min(subsets.map_or(max, |n| n.saturating_mul(4)))
        };
        CrashStates { base, changes, next: 0, count, random: Random(seed) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Performs a change that must happen whole or not at all, and records it.
    fn change(&self, change: Change, op: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = self.state();
        if let Change::Zero { at, len } = change {
            state.check_write(at, len)?;
        }
        op()?;
        state.record(change);
        Ok(())
    }
}

impl State {
    fn check_write(&self, at: u64, len: u64) -> io::Result<()> {
        check(&self.bad_writes, at, len)
    }

    fn record(&mut self, change: Change) {
        if let Some(epoch) = self.journal.as_mut().and_then(|j| j.epochs.last_mut()) {
            epoch.push(change);
        }
    }

    /// How much of `len` bytes one call may move.
    fn shortened(&self, len: usize) -> usize {
        self.max_transfer.map_or(len, |max| len.min(max))
    }
}

fn check(bad: &[Range<u64>], at: u64, len: u64) -> io::Result<()> {
    let end = at.saturating_add(len);
    let hit = bad.iter().any(|r| r.start < end && at < r.end);
    if hit { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
}

impl Storage for FaultyStorage {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let len = {
            let state = self.state();
            let len = state.shortened(buf.len());
            check(&state.bad_reads, at, len as u64)?;
            len
        };
        self.inner.read_at(&mut buf[..len], at)
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<usize> {
        let mut state = self.state();
        let mut len = state.shortened(buf.len());
        state.check_write(at, len as u64)?;
        if let Some(left) = state.space_left {
            if left == 0 && len > 0 {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            len = len.min(usize::try_from(left).unwrap_or(usize::MAX));
        }
        // The lock is held, so that the journal has the writes in the order they happened.
        let written = self.inner.write_at(&buf[..len], at)?;
        state.space_left = state.space_left.map(|left| left.saturating_sub(written as u64));
        state.record(Change::Write { at, data: buf[..written].to_vec() });
        Ok(written)
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::SetLen(len), || self.inner.set_len(len))
    }

    fn sync(&self) -> io::Result<()> {
        if let Some(hook) = self.before_sync.get() {
            hook();
        }
        let mut state = self.state();
        if state.sync_fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.inner.sync()?;
        if let Some(journal) = &mut state.journal {
            journal.epochs.push(Vec::new());
        }
        Ok(())
    }

    fn allocation(&self, at: u64) -> io::Result<Option<(Allocation, u64)>> {
        self.inner.allocation(at)
    }

    fn write_zeroes(&self, at: u64, len: u64, keep_allocated: bool) -> io::Result<()> {
        self.change(Change::Zero { at, len }, || self.inner.write_zeroes(at, len, keep_allocated))
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        let end = range_end(at, len)?;
        let state = self.state();
        state.check_write(at, len)?;
        if state.space_left.is_some_and(|left| left < len) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        drop(state);
        // Zeroing nothing up to the end only grows.
        self.change(Change::Zero { at: end, len: 0 }, || self.inner.allocate(at, len))
    }

    fn clone_range(&self, at: u64, src: &dyn Storage, src_at: u64, len: u64) -> io::Result<()> {
        match &mut self.state().clones_left {
            None => {
                let error = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
                return Err(unsupported("cannot clone into a faulty disk", &error));
            }
            Some(0) => return Err(io::Error::from_raw_os_error(libc::EIO)),
            Some(left) => *left -= 1,
        }
        let mut done = 0;
        let mut buf = [0; 4096];
        while done < len {
            let part = &mut buf[..(len - done).min(4096) as usize];
            let got = src.read_at(part, src_at + done)?;
            let written = self.write_at(&part[..got], at + done)?;
            if written == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += written as u64;
        }
        Ok(())
    }

    fn copy_range(&self, _at: u64, _src: &dyn Storage, _src_at: u64, _len: u64) -> io::Result<u64> {
        Err(unsupported("cannot copy into a faulty disk", &io::Error::from_raw_os_error(libc::EOPNOTSUPP)))
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn align(&self) -> Align {
        self.inner.align()
    }

    fn is_block_device(&self) -> bool {
        self.inner.is_block_device()
    }
}

impl fmt::Debug for FaultyStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyStorage").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl Change {
    fn apply(&self, disk: &mut Vec<u8>) {
        let reach = |disk: &mut Vec<u8>, at: u64, len: u64| {
            let (from, to) = (at as usize, (at + len) as usize);
            if disk.len() < to {
                disk.resize(to, 0);
            }
            from..to
        };
        match self {
            Change::Write { at, data } => {
                let range = reach(disk, *at, data.len() as u64);
                disk[range].copy_from_slice(data);
            }
            Change::Zero { at, len } => {
                let range = reach(disk, *at, *len);
                disk[range].fill(0);
            }
            Change::SetLen(len) => disk.resize(*len as usize, 0),
        }
    }

    /// The parts that a crash may separate. Zeroing is a change of metadata, which journalling file systems do whole.
    fn sectors(&self) -> Vec<Change> {
        let Change::Write { at, data } = self else { return vec![self.clone()] };
        let mut parts = Vec::new();
        let mut done = 0;
        while done < data.len() {
            let at = at + done as u64;
            let n = ((SECTOR - at % SECTOR) as usize).min(data.len() - done);
            parts.push(Change::Write { at, data: data[done..done + n].to_vec() });
            done += n;
        }
        parts
    }
}

/// The disks that a crash may leave; see [`FaultyStorage::crash_states`].
pub struct CrashStates {
    base: Vec<u8>,
    /// Sectors, each with the number of its write.
    changes: Vec<(usize, Change)>,
    next: usize,
    count: usize,
    random: Random,
}

impl Iterator for CrashStates {
    type Item = MemoryStorage;

    fn next(&mut self) -> Option<MemoryStorage> {
        if self.next >= self.count {
            return None;
        }
        let (n, all) = (self.next, self.changes.len());
        self.next += 1;
        let mut disk = self.base.clone();
        let subsets = u32::try_from(all).ok().and_then(|n| 1usize.checked_shl(n)).unwrap_or(usize::MAX);
        let chosen: Vec<usize> = match n {
            0 => Vec::new(),
            1 => (0..all).collect(),
            // 0 and all ones were first.
            _ if subsets <= self.count && n < subsets => {
                (0..all).filter(|&i| (n - 1) >> i & 1 == 1).collect()
            }
            _ => self.sample(),
        };
        let parts = chosen.iter().filter_map(|&i| self.changes.get(i));
        parts.for_each(|(_, change)| change.apply(&mut disk));
        Some(MemoryStorage::with_bytes(disk, MAX_JOURNALLED))
    }
}

impl CrashStates {
    /// Some of the changes. Lost writes tell more than lost sectors where a write is long, and one lost write among many
    /// is what a missing barrier comes to.
    fn sample(&mut self) -> Vec<usize> {
        let writes = self.changes.last().map_or(0, |(write, _)| write + 1) as u64;
        let (kind, density, seed) = (self.random.below(6), self.random.below(9), self.random.next());
        let one = self.random.below(writes) as usize;
        let write_stays = |write: usize| Random(seed ^ write as u64).below(8) < density;
        let mut some = Vec::new();
        for (i, (write, _)) in self.changes.iter().enumerate() {
            let stays = match kind {
                0 | 1 => self.random.below(8) < density,
                2 => write_stays(*write),
                3 => *write != one,
                4 => *write == one,
                // The write at the border is torn.
                _ => *write < one || (*write == one && self.random.below(2) == 0),
            };
            some.extend(stays.then_some(i));
        }
        if kind == 0 {
            self.random.shuffle(&mut some);
        }
        some
    }
}

impl fmt::Debug for CrashStates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CrashStates")
            .field("changes", &self.changes.len())
            .field("next", &self.next)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

/// SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    fn shuffle(&mut self, items: &mut [usize]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::Arc;

    fn disk(len: usize) -> FaultyStorage {
        FaultyStorage::new(Arc::new(MemoryStorage::with_bytes(vec![0; len], 1 << 20)))
    }

    #[test]
    fn fails_where_told() {
        let disk = disk(4096);
        disk.fail_reads(1000..1001);
        disk.fail_writes(2000..3000);
        let mut buf = [0; 100];
        assert_eq!(disk.read_at(&mut buf, 900).unwrap(), 100);
        assert_eq!(disk.read_at(&mut buf, 901).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(disk.write_at(&buf, 1900).unwrap(), 100);
        assert_eq!(disk.write_at(&buf, 2999).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(disk.write_zeroes(1500, 501, false).is_err());
        disk.heal();
        disk.limit_space(150);
        assert_eq!(disk.write_at(&buf, 2000).unwrap(), 100);
        assert_eq!(disk.write_at(&buf, 2100).unwrap(), 50);
        assert_eq!(disk.write_at(&buf, 2150).unwrap_err().kind(), io::ErrorKind::StorageFull);
        disk.heal();
        disk.shorten(7);
        assert_eq!(disk.write_at(&buf, 0).unwrap(), 7);
        assert_eq!(disk.read_at(&mut buf, 0).unwrap(), 7);
        disk.fail_sync(true);
        assert!(disk.sync().is_err());
    }

    #[test]
    fn crashes_leave_every_subset_of_what_has_no_barrier() {
        let disk = disk(3);
        disk.write_at(b"...", 0).unwrap();
        disk.start_journal().unwrap();
        disk.write_at(b"A", 0).unwrap();
        disk.sync().unwrap();
        disk.write_at(b"B", 1).unwrap();
        disk.write_at(b"C", 2).unwrap();
        let states = |barriers, changes| -> BTreeSet<Vec<u8>> {
            let moment = Moment { barriers, changes };
            disk.crash_states_at(moment, 1, 100).map(|s| s.to_vec()).collect()
        };
        let set = |all: &[&[u8]]| -> BTreeSet<Vec<u8>> { all.iter().map(|s| s.to_vec()).collect() };
        assert_eq!(disk.moment(), Moment { barriers: 1, changes: 2 });
        assert_eq!(states(0, 1), set(&[b"...", b"A.."]));
        assert_eq!(states(1, 1), set(&[b"A..", b"AB."]));
        assert_eq!(states(1, 2), set(&[b"A..", b"AB.", b"A.C", b"ABC"]));
        assert!(disk.crash_states(1, 100).map(|s| s.to_vec()).collect::<BTreeSet<_>>() == states(1, 2));
        disk.sync().unwrap();
        assert_eq!(states(2, 0), set(&[b"ABC"]));
        assert!(states(3, 0).is_empty());
    }

    #[test]
    fn writes_are_reordered_and_torn() {
        let disk = disk(1024);
        disk.start_journal().unwrap();
        disk.write_at(&[1; 1024], 0).unwrap();
        disk.write_at(&[2; 1024], 0).unwrap();
        let ends = |s: MemoryStorage| (s.to_vec()[0], s.to_vec()[1023]);
        let states: BTreeSet<_> = disk.crash_states(7, 64).map(ends).collect();
        let all: BTreeSet<_> = (0..3).flat_map(|a| (0..3).map(move |b| (a, b))).collect();
        assert_eq!(states, all);
        assert!(disk.crash_states(7, 5).count() == 5);
        // The same seed, the same states.
        let bytes = |seed| disk.crash_states(seed, 64).map(|s| s.to_vec()).collect::<Vec<_>>();
        assert!(bytes(3) == bytes(3));
    }
}
