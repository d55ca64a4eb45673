use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use diskmill_format::HostOffset;
use diskmill_format::qcow2::{Geometry, L1Entry};

/// Tables that are asked for before a walk comes to them: a few times what a disk has in flight.
const TABLES: usize = 16;

/// Asks for L2 tables ahead of whoever walks through an image in guest order, so that a sparse image that is not in the page
/// cache costs less than a disk's latency for each. Each table is asked for once at most.
pub(super) struct Ahead {
    /// The L1 index of the table that was looked at last.
    entered: AtomicU64,
    /// Up to which L1 index tables were asked for.
    asked: AtomicU64,
    /// From which on it is time for more.
    refill: AtomicU64,
}

impl Ahead {
    pub(super) const fn new() -> Self {
        Self { entered: AtomicU64::new(u64::MAX), asked: AtomicU64::new(0), refill: AtomicU64::new(0) }
    }

    /// A walk comes to the table of L1 entry `index`. `l1` gives the piece of the L1 table that holds an entry, and the index
    /// of its first one; `ask` is called for the tables that come next.
    pub(super) fn enter(
        &self,
        index: u64,
        geometry: Geometry,
        l1: impl FnOnce(u64) -> Option<(u64, Arc<[u8]>)>,
        ask: impl Fn(HostOffset),
    ) {
        // The first table that is looked at may be the only one.
        if self.entered.swap(index, Relaxed) >= index || index < self.refill.load(Relaxed) {
            return;
        }
        let from = self.asked.load(Relaxed).max(index.saturating_add(1));
        let Some((first, piece)) = l1(from) else {
            self.refill.store(u64::MAX, Relaxed);
            return;
        };
        let (entries, _) = piece.as_chunks::<8>();
        let (mut until, mut refill) = (first + entries.len() as u64, index);
        let mut found = 0;
        for (entry, at) in entries.iter().zip(first..).skip_while(|(_, at)| *at < from) {
            if let Ok(L1Entry::Table(table)) = L1Entry::decode(u64::from_be_bytes(*entry), geometry) {
                ask(table);
                found += 1;
                if found <= TABLES / 2 {
                    refill = at;
                } else if found == TABLES {
                    until = at + 1;
                    break;
                }
            }
        }
        self.asked.store(until, Relaxed);
        self.refill.store(refill, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// What a walk over these L1 indexes asks for, where every third of 300 entries has a table, in pieces of 128 entries.
    fn asked(walk: &[u64]) -> Vec<u64> {
        let geometry = Geometry::new(16, false).unwrap();
        let at = |index: u64| if index.is_multiple_of(3) { (index + 1) << 16 } else { 0 };
        let l1 = |index: u64| {
            let first = index / 128 * 128;
            (index < 300)
                .then(|| (first, (first..300.min(first + 128)).flat_map(|i| at(i).to_be_bytes()).collect()))
        };
        let ahead = Ahead::new();
        let asked = RefCell::new(Vec::new());
        for &index in walk {
            ahead.enter(index, geometry, l1, |table| asked.borrow_mut().push((table.get() >> 16) - 1));
        }
        asked.into_inner()
    }

    #[test]
    fn a_walk_asks_for_each_table_once_and_before_it_comes_to_it() {
        let walk: Vec<u64> = (0..300).step_by(3).collect();
        assert_eq!(asked(&walk), walk.get(2..).unwrap());
        // A table is looked at as often as it has runs.
        let slow: Vec<u64> = walk.iter().flat_map(|&index| [index; 4]).collect();
        assert_eq!(asked(&slow), walk.get(2..).unwrap());
        assert_eq!(asked(walk.get(..3).unwrap()), walk.get(2..2 + TABLES).unwrap());
    }

    #[test]
    fn single_looks_ask_for_nothing() {
        assert!(asked(&[0]).is_empty());
        assert!(asked(&[150, 90, 30, 3]).is_empty());
        assert!(asked(&[0, 297]).is_empty());
    }
}
