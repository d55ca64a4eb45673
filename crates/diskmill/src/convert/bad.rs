//! What could not be read while salvaging.

use std::collections::BTreeMap;

/// Ranges that are kept. An image of 1 MiB can have millions of damaged ones.
const MOST: usize = 10_000;

/// A range of the guest's disk that could not be read and was filled with zeros (with
/// [`ConvertOptions::salvage`](super::ConvertOptions::salvage)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRange {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Why.
    pub reason: String,
}

/// What could not be read and was filled with zeros (with
/// [`ConvertOptions::salvage`](super::ConvertOptions::salvage)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BadRanges {
    /// The first ones, at most 10 000, in guest order. They do not touch.
    pub listed: Vec<BadRange>,
    /// How many there are behind those, or a few more: not all that touch are counted as one.
    pub more: u64,
    /// Bytes of these.
    pub more_bytes: u64,
}

impl BadRanges {
    /// Whether all could be read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    /// All bytes that could not be read.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.listed.iter().fold(self.more_bytes, |sum, range| sum.saturating_add(range.len))
    }
}

/// Gathers bad ranges, each byte of which is told once, in any order. Those that touch are joined, under the reason of the
/// first.
#[derive(Default)]
pub(super) struct BadList {
    /// End and reason by start.
    kept: BTreeMap<u64, (u64, String)>,
    more: u64,
    more_bytes: u64,
    /// Where the last one that was not kept ends.
    more_end: u64,
}

impl BadList {
    /// Adds a range. A reason that is not kept is not made.
    pub(super) fn add(&mut self, start: u64, len: u64, reason: impl FnOnce() -> String) {
        let mut end = start.saturating_add(len);
        let is_behind = |(_, (last, _)): (&u64, &(u64, String))| *last < start;
        if self.kept.len() >= MOST && self.kept.last_key_value().is_some_and(is_behind) {
            return self.leave_out(start, end);
        }
        if let Some((next, _)) = self.kept.remove(&end) {
            end = next;
        }
        match self.kept.range_mut(..start).next_back() {
            Some((_, (before, _))) if *before == start => *before = end,
            _ => {
                self.kept.insert(start, (end, reason()));
            }
        }
        if self.kept.len() > MOST
            && let Some((start, (end, _))) = self.kept.pop_last()
        {
            self.leave_out(start, end);
        }
    }

    fn leave_out(&mut self, start: u64, end: u64) {
        if self.more == 0 || start != self.more_end {
            self.more = self.more.saturating_add(1);
        }
        self.more_end = end;
        self.more_bytes = self.more_bytes.saturating_add(end.saturating_sub(start));
    }

    /// Both lists as one.
    pub(super) fn join(mut self, other: Self) -> Self {
        self.more = self.more.saturating_add(other.more);
        self.more_bytes = self.more_bytes.saturating_add(other.more_bytes);
        for (start, (end, reason)) in other.kept {
            self.add(start, end.saturating_sub(start), || reason);
        }
        self
    }
}

impl From<BadList> for BadRanges {
    fn from(list: BadList) -> Self {
        let range = |(start, (end, reason)): (u64, (u64, String))| BadRange {
            start,
            len: end.saturating_sub(start),
            reason,
        };
        Self {
            listed: list.kept.into_iter().map(range).collect(),
            more: list.more,
            more_bytes: list.more_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one_in_any_order() {
        let parts = [(0u64, 4u64), (4, 4), (8, 2), (20, 5), (30, 1), (25, 5)];
        for turn in 0..parts.len() {
            let mut list = BadList::default();
            for &(start, len) in parts.iter().cycle().skip(turn).take(parts.len()) {
                list.add(start, len, || start.to_string());
            }
            let range = |start, len| BadRange { start, len, reason: start.to_string() };
            let want = BadRanges { listed: vec![range(0, 10), range(20, 11)], more: 0, more_bytes: 0 };
            assert_eq!(BadRanges::from(list), want, "{turn}");
        }
    }

    #[test]
    fn the_first_ones_are_kept_and_all_are_counted() {
        const ALL: u64 = 3 * MOST as u64;
        for backwards in [false, true] {
            let (mut list, mut other) = (BadList::default(), BadList::default());
            for index in 0..ALL {
                let index = if backwards { ALL - 1 - index } else { index };
                let list = if index % 3 == 0 { &mut other } else { &mut list };
                list.add(index * 10, 5, String::new);
                assert!(list.kept.len() <= MOST);
            }
            let ranges = BadRanges::from(list.join(other));
            assert_eq!((ranges.listed.len(), ranges.bytes()), (MOST, ALL * 5));
            assert_eq!(ranges.more, ALL - MOST as u64);
            assert!(ranges.listed.iter().zip(0..).all(|(range, index)| range.start == index * 10));
        }
    }
}
