use std::collections::BTreeMap;

use crate::error::{Error, Kind, Result};

/// log2 of the numbers in a page.
const PAGE_BITS: u32 = 13;
const PAGE: u64 = 1 << PAGE_BITS;
/// log2 of the widest number's bits.
const MAX_ORDER: u32 = 6;

/// Memory that may still be taken, in bytes.
#[derive(Debug)]
pub(super) struct Budget {
    left: u64,
    all: u64,
}

impl Budget {
    pub(super) const fn new(bytes: u64) -> Self {
        Self { left: bytes, all: bytes }
    }

    /// Takes `bytes`, or says that the image needs too many.
    pub(super) fn charge(&mut self, bytes: u64) -> Result<()> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            Error::new(
                Kind::Limit,
                format!("checking this image takes more than {} MiB of memory", self.all >> 20),
            )
        })?;
        Ok(())
    }
}

/// A number for each cluster: 0 costs nothing, and pages of clusters take as few bits for each as their largest
/// number needs.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// Where the page of clusters from `key << PAGE_BITS` on stands in `pages`.
    index: BTreeMap<u64, usize>,
    pages: Vec<Page>,
    /// The page that was asked for last: look-ups come in runs.
    last: Option<(u64, usize)>,
    /// No number is larger.
    largest: u64,
    /// No number behind this one was ever another than 0.
    last_used: Option<u64>,
}

#[derive(Debug)]
struct Page {
    /// log2 of the bits of each number.
    order: u32,
    words: Box<[u64]>,
}

impl Page {
    fn new(order: u32) -> Self {
        Self { order, words: vec![0; words(order)].into() }
    }

    /// Word and shift of number `slot`.
    const fn place(&self, slot: u64) -> (usize, u32) {
        let per_word = MAX_ORDER - self.order;
        ((slot >> per_word) as usize, ((slot & ((1 << per_word) - 1)) << self.order) as u32)
    }

    const fn mask(&self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.order))
    }

    fn get(&self, slot: u64) -> u64 {
        let (word, shift) = self.place(slot);
        self.words.get(word).map_or(0, |word| word >> shift & self.mask())
    }

    fn set(&mut self, slot: u64, value: u64) {
        let (word, shift) = self.place(slot);
        let mask = self.mask();
        if let Some(word) = self.words.get_mut(word) {
            *word = *word & !(mask << shift) | (value & mask) << shift;
        }
    }
}

/// Words of a page whose numbers have `1 << order` bits.
const fn words(order: u32) -> usize {
    (PAGE >> (MAX_ORDER - order)) as usize
}

impl Counts {
    /// The number of `cluster`.
    pub(super) fn get(&mut self, cluster: u64) -> u64 {
        let key = cluster >> PAGE_BITS;
        let at = match self.last {
            Some((last, at)) if last == key => Some(at),
            _ => self.index.get(&key).copied(),
        };
        let Some(at) = at else { return 0 };
        self.last = Some((key, at));
        self.pages.get(at).map_or(0, |page| page.get(cluster & (PAGE - 1)))
    }

    /// No number is larger than this.
    pub(super) const fn largest(&self) -> u64 {
        self.largest
    }

    /// Sets the number of `cluster`.
    pub(super) fn set(&mut self, cluster: u64, value: u64, budget: &mut Budget) -> Result<()> {
        let order = match value {
            0 | 1 => 0,
            value => (64 - value.leading_zeros()).next_power_of_two().trailing_zeros(),
        };
        let page = self.page(cluster >> PAGE_BITS, order, budget)?;
        page.set(cluster & (PAGE - 1), value);
        self.largest = self.largest.max(value);
        if value > 0 {
            self.last_used = self.last_used.max(Some(cluster));
        }
        Ok(())
    }

    /// Adds `times` to the number of each of the `len` clusters from `first` on, up to `most`. Tells what was too much
    /// through `over`: the cluster, and by how much.
    pub(super) fn add(
        &mut self,
        first: u64,
        len: u64,
        (times, most): (u64, u64),
        budget: &mut Budget,
        mut over: impl FnMut(u64, u64),
    ) -> Result<()> {
        let mut cluster = first;
        let end = first.saturating_add(len);
        while cluster < end {
            if times == 1 {
                let taken = self.claim(cluster, end, budget)?;
                if taken > 0 {
                    cluster += taken;
                    continue;
                }
            }
            let sum = self.get(cluster).saturating_add(times);
            if sum > most {
                over(cluster, sum - most);
            }
            self.set(cluster, sum.min(most), budget)?;
            cluster += 1;
        }
        Ok(())
    }

    /// Makes numbers from `first` up to `end` 1 that are 0, as many as stand in one word of a page. Tells how many.
    fn claim(&mut self, first: u64, end: u64, budget: &mut Budget) -> Result<u64> {
        let page = self.page(first >> PAGE_BITS, 0, budget)?;
        if page.order != 0 {
            return Ok(0);
        }
        let (word, shift) = page.place(first & (PAGE - 1));
        let len = (end - first).min(u64::from(64 - shift));
        let bits = (u64::MAX >> (64 - len)) << shift;
        let Some(word) = page.words.get_mut(word).filter(|word| **word & bits == 0) else { return Ok(0) };
        *word |= bits;
        self.largest = self.largest.max(1);
        self.last_used = self.last_used.max(Some(first + len - 1));
        Ok(len)
    }

    /// The page `key`, with room for numbers of `1 << order` bits.
    fn page(&mut self, key: u64, order: u32, budget: &mut Budget) -> Result<&mut Page> {
        let at = match self.last {
            Some((last, at)) if last == key => at,
            _ => match self.index.get(&key) {
                Some(&at) => at,
                None => {
                    // With what the index takes.
                    budget.charge(words(order) as u64 * 8 + 64)?;
                    self.pages.push(Page::new(order));
                    self.index.insert(key, self.pages.len() - 1);
                    self.pages.len() - 1
                }
            },
        };
        self.last = Some((key, at));
        let Some(page) = self.pages.get_mut(at) else { return Err(Error::invalid("a page that is missing")) };
        if page.order < order {
            budget.charge(words(order) as u64 * 8)?;
            let mut wider = Page::new(order);
            for slot in 0..PAGE {
                wider.set(slot, page.get(slot));
            }
            *page = wider;
        }
        Ok(page)
    }

    /// The first cluster from `from` on whose page has numbers.
    pub(super) fn next_page(&self, from: u64) -> Option<u64> {
        let (key, _) = self.index.range(from >> PAGE_BITS..).next()?;
        Some((key << PAGE_BITS).max(from))
    }

    /// The highest cluster whose number was ever another than 0.
    pub(super) const fn highest(&self) -> Option<u64> {
        self.last_used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_like_a_map() {
        let mut budget = Budget::new(1 << 20);
        let mut counts = Counts::default();
        let mut model = BTreeMap::<u64, u64>::new();
        let mut seed = 1u64;
        for _ in 0..2000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (first, len) = (seed >> 40 & 0x7fff, seed >> 20 & 0x7f);
            let times = if seed & 0x700 == 0 { seed & 0xff } else { 1 };
            counts.add(first, len, (times, u64::MAX), &mut budget, |_, _| panic!()).unwrap();
            for cluster in first..first + len {
                *model.entry(cluster).or_default() += times;
            }
        }
        for cluster in 0..0x9000 {
            assert_eq!(counts.get(cluster), model.get(&cluster).copied().unwrap_or(0), "{cluster}");
        }
        assert_eq!(counts.highest(), model.keys().last().copied());
        assert_eq!(counts.next_page(0), Some(0));
        assert_eq!(counts.next_page(1 << 40), None);
        counts.set(1 << 50, u64::MAX, &mut budget).unwrap();
        assert_eq!((counts.get(1 << 50), counts.largest()), (u64::MAX, u64::MAX));
    }

    #[test]
    fn what_is_too_much_is_told() {
        let mut budget = Budget::new(1 << 20);
        let mut counts = Counts::default();
        let mut over = Vec::new();
        for _ in 0..3 {
            counts.add(5, 2, (1, 1), &mut budget, |cluster, by| over.push((cluster, by))).unwrap();
        }
        assert_eq!(over, [(5, 1), (6, 1), (5, 1), (6, 1)]);
        assert_eq!(counts.get(5), 1);
    }

    #[test]
    fn memory_is_bounded() {
        let mut budget = Budget::new(64 << 10);
        let mut counts = Counts::default();
        let far = (0..1000).try_for_each(|page| counts.set(page << PAGE_BITS, 1, &mut budget));
        assert_eq!(far.unwrap_err().kind(), Kind::Limit);
    }
}
