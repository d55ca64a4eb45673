use std::sync::{Condvar, Mutex, PoisonError};

use diskmill_io::{Buf, cpus};

use super::ConvertOptions;
use super::planner::Planner;

/// Sizes that planner and workers agree on, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// The output's unit.
    pub(super) unit: u64,
    /// Most guest bytes of a job. The guest area is the first part of a buffer.
    pub(super) job: u64,
    /// Room for packed payloads behind it.
    pub(super) packed: u64,
}

impl Sizes {
    /// Buffers that one worker needs at least: one that it fills, one that is being written and, when packing, one to
    /// pack into.
    pub(super) const fn per_worker(packs: bool) -> u64 {
        if packs { 3 } else { 2 }
    }
}

/// Batches in flight per worker where the engine is asynchronous.
const DEPTH: usize = 8;
/// Buffers that may wait for their turn, per worker. Few where nothing is packed: each should be written while its
/// bytes are still in the processor's cache. More where jobs take unequal times.
const WAITING: usize = 2;
const WAITING_PACKED: usize = 6;

/// The conversion's memory: a fixed number of buffers, which are its credits.
///
/// A job is issued only with a buffer in hand, and the buffer of the job that is next in order is always with a worker
/// that is about to place it, so waiting for a buffer cannot block for good.
pub(super) struct Buffers {
    sizes: Sizes,
    workers: usize,
    depth: usize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    free: Vec<Buf>,
    /// Buffers that may still be made.
    unmade: usize,
    /// Workers that wait for a credit.
    waiting: usize,
    stopped: bool,
}

/// A credit: a buffer, or the right to make one.
pub(super) enum Credit {
    Used(Buf),
    Fresh,
}

impl Buffers {
    pub(super) fn new(
        planner: &Planner<'_>,
        options: &ConvertOptions,
        packs: bool,
        asynchronous: bool,
    ) -> Self {
        let sizes = planner.sizes();
        let each = (sizes.job + sizes.packed).max(1);
        let per_worker = Sizes::per_worker(packs);
        let depth = if asynchronous { DEPTH } else { 1 };
        let waiting = if packs { WAITING_PACKED } else { WAITING };
        let fitting = usize::try_from(options.memory / each / per_worker).unwrap_or(usize::MAX);
        let workers = options.threads.unwrap_or_else(cpus).min(fitting).max(1);
        let scratch = if packs { workers as u64 } else { 0 };
        let affordable =
            usize::try_from((options.memory / each).saturating_sub(scratch)).unwrap_or(usize::MAX);
        let count = affordable.clamp(2, workers.saturating_mul(depth + waiting).max(2));
        Self {
            sizes,
            workers,
            depth: (count / workers).clamp(1, depth),
            state: Mutex::new(State { free: Vec::new(), unmade: count, waiting: 0, stopped: false }),
            changed: Condvar::new(),
        }
    }

    pub(super) const fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Bytes in each buffer.
    pub(super) const fn capacity(&self) -> usize {
        (self.sizes.job + self.sizes.packed) as usize
    }

    pub(super) const fn workers(&self) -> usize {
        self.workers
    }

    /// Batches that a worker should keep in flight.
    pub(super) const fn depth(&self) -> usize {
        self.depth
    }

    /// Takes a credit; if there is none, waits for one if told to. `None` also when the conversion ends.
    pub(super) fn take(&self, wait: bool) -> Option<Credit> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if state.stopped {
                return None;
            }
            // The buffer given back last is the one that is still in the cache.
            if let Some(buf) = state.free.pop() {
                return Some(Credit::Used(buf));
            }
            if state.unmade > 0 {
                state.unmade -= 1;
                return Some(Credit::Fresh);
            }
            if !wait {
                return None;
            }
            state.waiting += 1;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
    }

    pub(super) fn give_back(&self, buf: Buf) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.free.push(buf);
        // Waking is a system call even where nobody waits.
        if state.waiting > 0 {
            self.changed.notify_one();
        }
    }

    /// Wakes all who wait: the conversion ends.
    pub(super) fn stop(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stopped = true;
        self.changed.notify_all();
    }
}
