//! Locks on ranges of guest bytes.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Who works on which guest bytes. Whoever came first goes first, so that nobody waits for ever.
#[derive(Default)]
pub(crate) struct RangeLocks {
    queue: Mutex<Queue>,
    left: Condvar,
}

#[derive(Default)]
struct Queue {
    /// In order of arrival: those at work and those that wait for an earlier one.
    entries: Vec<Entry>,
    next: u64,
}

struct Entry {
    id: u64,
    range: Range<u64>,
    exclusive: bool,
}

impl Entry {
    fn excludes(&self, other: &Self) -> bool {
        (self.exclusive || other.exclusive)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

/// Releases the range when dropped.
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    id: u64,
}

impl RangeLocks {
    /// Waits until nobody who came earlier works on a part of `range`, or only together with others if not `exclusive`.
    pub(crate) fn lock(&self, range: Range<u64>, exclusive: bool) -> RangeGuard<'_> {
        let mut queue = self.queue();
        let id = queue.next;
        queue.next = queue.next.wrapping_add(1);
        queue.entries.push(Entry { id, range, exclusive });
        loop {
            let mine = queue.entries.iter().position(|entry| entry.id == id).unwrap_or_default();
            let (earlier, rest) = queue.entries.split_at(mine);
            if rest.first().is_none_or(|me| !earlier.iter().any(|other| other.excludes(me))) {
                return RangeGuard { locks: self, id };
            }
            queue = self.left.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.locks.queue().entries.retain(|entry| entry.id != self.id);
        self.locks.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn exclusive_ranges_exclude_each_other() {
        let (locks, total) = (RangeLocks::default(), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (locks, total) = (&locks, &total);
                scope.spawn(move || {
                    for turn in 0..500 {
                        let start = (thread + turn) % 3;
                        let _guard = locks.lock(start..start + 3, true);
                        // Byte 2 is in all of these ranges.
                        let seen = total.load(Ordering::Relaxed);
                        std::hint::spin_loop();
                        total.store(seen + 1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 2000);
        assert!(locks.queue().entries.is_empty());
    }

    #[test]
    fn readers_share_and_others_pass() {
        let locks = RangeLocks::default();
        let _a = locks.lock(0..10, false);
        let _b = locks.lock(5..15, false);
        let _c = locks.lock(20..30, true);
    }
}
