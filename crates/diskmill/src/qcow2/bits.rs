//! The bits of a persistent bitmap.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use diskmill_format::Limits;
use diskmill_format::qcow2::{Bitmap, BitmapCluster, Geometry};
use diskmill_io::{SharedStorage, Storage};

use super::lossy;
use crate::error::{Error, Kind, Result};
use crate::image::ImageFile;
use crate::reader::read_exact;

/// Where the bits of a new bitmap come from.
pub(crate) trait BitSource {
    /// A bit from `from` on that may be set or has ones near behind it that may; `None` if none is.
    fn next_from(&self, from: u64) -> Option<u64>;

    /// Whether all bits of `range` are known to be set.
    fn is_ones(&self, range: Range<u64>) -> bool;

    /// Sets in `bytes`, which are zeros and of which the first one stands for bit `first`, the first one of a page, the
    /// bits that are set here.
    fn fill(&self, first: u64, bytes: &mut [u8]) -> Result<()>;
}

impl BitSource for Bits {
    fn next_from(&self, from: u64) -> Option<u64> {
        self.next_page(from)
    }

    fn is_ones(&self, range: Range<u64>) -> bool {
        self.find(range.start, false).is_none_or(|clear| clear >= range.end)
    }

    fn fill(&self, first: u64, bytes: &mut [u8]) -> Result<()> {
        self.merge_into(first, bytes);
        Ok(())
    }
}

/// The bits of a bitmap as they stand in its image, which are read when they are asked for.
pub(crate) struct StoredBits {
    file: SharedStorage,
    path: PathBuf,
    cluster_size: u64,
    table: Vec<BitmapCluster>,
    name: Vec<u8>,
}

impl StoredBits {
    /// As [`Bits::read`], but of the table only.
    pub(crate) fn open(
        file: &ImageFile,
        bitmap: &Bitmap,
        geometry: Geometry,
        size: u64,
        limits: &Limits,
    ) -> Result<Self> {
        let ImageFile { storage, path } = file;
        let table = read_table(&**storage, bitmap, geometry, size, limits).map_err(|error| error.of(path))?;
        Ok(Self {
            file: storage.clone(),
            path: path.clone(),
            cluster_size: geometry.cluster_size(),
            table,
            name: bitmap.name.clone(),
        })
    }

    /// Bytes of its table and of the clusters of bits that it points to.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if one of these is not in the file.
    pub(crate) fn stored_bytes(&self) -> Result<u64> {
        let len = self.file.len().map_err(|error| Error::io("cannot tell the size", error).of(&self.path))?;
        let mut bytes = self.table.len() as u64 * 8;
        for entry in &self.table {
            let BitmapCluster::Bits(host) = entry else { continue };
            if host.get().checked_add(self.cluster_size).is_none_or(|end| end > len) {
                let why = format!("it reaches past the end of the file ({len} bytes)");
                let error = Error::corrupt(structure(&self.name), Some(host.get()), why);
                return Err(error.of(&self.path));
            }
            bytes = bytes.saturating_add(self.cluster_size);
        }
        Ok(bytes)
    }

    /// The clusters from the one on that holds bit `from`, with their indexes.
    fn entries_from(&self, from: u64) -> impl Iterator<Item = (u64, BitmapCluster)> + '_ {
        let first = from / (self.cluster_size * 8);
        let skip = usize::try_from(first).unwrap_or(usize::MAX);
        (first..).zip(self.table.iter().copied().skip(skip))
    }
}

impl BitSource for StoredBits {
    fn next_from(&self, from: u64) -> Option<u64> {
        let (index, _) = self.entries_from(from).find(|(_, entry)| *entry != BitmapCluster::Zeros)?;
        Some(from.max(index * self.cluster_size * 8))
    }

    fn is_ones(&self, range: Range<u64>) -> bool {
        let end = range.end.div_ceil(self.cluster_size * 8);
        let mut entries = self.entries_from(range.start).take_while(|(index, _)| *index < end);
        // Behind the table there are no bits of the disk.
        entries.all(|(_, entry)| entry == BitmapCluster::Ones)
    }

    fn fill(&self, first: u64, bytes: &mut [u8]) -> Result<()> {
        let (from, len) = (first / 8, bytes.len() as u64);
        for (index, entry) in self.entries_from(first) {
            let start = index * self.cluster_size;
            if start >= from + len {
                break;
            }
            // The part that both clusters have: one size is a multiple of the other.
            let at = start.max(from);
            let end = (start + self.cluster_size).min(from + len);
            let Some(part) = bytes.get_mut((at - from) as usize..(end - from) as usize) else { break };
            match entry {
                BitmapCluster::Zeros => {}
                BitmapCluster::Ones => part.fill(ALL),
                BitmapCluster::Bits(host) => {
                    let host = host.get().saturating_add(at - start);
                    read_exact(&*self.file, part, host)
                        .map_err(|error| error.within(structure(&self.name), host).of(&self.path))?;
                }
            }
        }
        Ok(())
    }
}

fn structure(name: &[u8]) -> String {
    format!("bitmap {:?}", lossy(name))
}

/// Bytes in a page. No cluster is smaller.
const PAGE: usize = 512;
/// Bits in a page.
const PAGE_BITS: u64 = PAGE as u64 * 8;
const ALL: u8 = u8::MAX;

/// Bits by their numbers, in the order in which an image stores them. Pages of zeros take no memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Bits {
    pages: BTreeMap<u64, Page>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Page {
    Ones,
    Mixed(Box<[u8; PAGE]>),
}

impl Page {
    /// Sets the bits of `range`, which lies within a page.
    fn set(&mut self, range: Range<u64>) {
        let Self::Mixed(bytes) = self else { return };
        let (first, last) = ((range.start / 8) as usize, (range.end.saturating_sub(1) / 8) as usize);
        let head = ALL << (range.start % 8);
        let tail = ALL >> (7 - range.end.saturating_sub(1) % 8);
        match bytes.get_mut(first..=last) {
            Some([only]) => *only |= head & tail,
            Some([start, middle @ .., end]) => {
                *start |= head;
                middle.fill(ALL);
                *end |= tail;
            }
            _ => return,
        }
        if bytes.iter().all(|&byte| byte == ALL) {
            *self = Self::Ones;
        }
    }

    fn bit(&self, index: u64) -> bool {
        match self {
            Self::Ones => true,
            Self::Mixed(bytes) => {
                bytes.get((index / 8) as usize).is_some_and(|byte| byte >> (index % 8) & 1 != 0)
            }
        }
    }
}

impl Bits {
    /// Sets the bits of `range`.
    pub(crate) fn set(&mut self, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let (key, start) = (at / PAGE_BITS, at % PAGE_BITS);
            let end = PAGE_BITS.min(start + (range.end - at));
            let page = self.pages.entry(key).or_insert_with(|| Page::Mixed(Box::new([0; PAGE])));
            page.set(start..end);
            at += end - start;
        }
    }

    /// Clears all bits from `len` on.
    pub(crate) fn truncate(&mut self, len: u64) {
        let (key, within) = (len / PAGE_BITS, len % PAGE_BITS);
        let mut tail = self.pages.split_off(&key);
        let Some(last) = tail.remove(&key).filter(|_| within > 0) else { return };
        let mut kept = Self::default();
        (0..within).filter(|&bit| last.bit(bit)).for_each(|bit| kept.set(bit..bit + 1));
        self.pages.extend(kept.pages.into_values().map(|page| (key, page)));
    }

    /// Adds the bits that are set in `bytes`, of which the first one stands for bit `first`, the first one of a page.
    pub(crate) fn merge(&mut self, first: u64, bytes: &[u8]) {
        for (key, bytes) in (first / PAGE_BITS..).zip(bytes.as_chunks::<PAGE>().0) {
            if *bytes == [0; PAGE] {
                continue;
            }
            match self.pages.entry(key).or_insert_with(|| Page::Mixed(Box::new([0; PAGE]))) {
                Page::Ones => {}
                Page::Mixed(page) => page.iter_mut().zip(bytes).for_each(|(to, from)| *to |= from),
            }
        }
    }

    /// Sets in `bytes`, of which the first one stands for bit `first`, the first one of a page, the bits that are set
    /// here.
    pub(crate) fn merge_into(&self, first: u64, bytes: &mut [u8]) {
        let first = first / PAGE_BITS;
        for (&key, page) in self.pages.range(first..first.saturating_add((bytes.len() / PAGE) as u64)) {
            let start = (key - first) as usize * PAGE;
            let part = bytes.get_mut(start..start + PAGE).unwrap_or_default();
            match page {
                Page::Ones => part.fill(ALL),
                Page::Mixed(page) => part.iter_mut().zip(page.iter()).for_each(|(to, from)| *to |= from),
            }
        }
    }

    /// A bit from `from` on that is set or has set ones near behind it.
    pub(crate) fn next_page(&self, from: u64) -> Option<u64> {
        let (key, _) = self.pages.range(from / PAGE_BITS..).next()?;
        Some((key * PAGE_BITS).max(from))
    }

    /// The runs of set bits, in order.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.find(at, true)?;
            // Behind the last page all bits are clear.
            let end = self.find(start, false)?;
            at = end;
            Some(start..end)
        })
    }

    /// The first bit from `at` on that is `set`, or is not.
    fn find(&self, mut at: u64, set: bool) -> Option<u64> {
        loop {
            let (key, page) = match self.pages.get_key_value(&(at / PAGE_BITS)) {
                Some(here) => here,
                None if set => self.pages.range(at / PAGE_BITS..).next()?,
                None => return Some(at),
            };
            let first = key * PAGE_BITS;
            at = at.max(first);
            let end = first + PAGE_BITS;
            match (page, set) {
                (Page::Ones, true) => return Some(at),
                (Page::Ones, false) => at = end,
                (page, _) => match (at - first..PAGE_BITS).find(|&bit| page.bit(bit) == set) {
                    Some(bit) => return Some(first + bit),
                    None => at = end,
                },
            }
        }
    }

    /// Reads the bits of `bitmap` for a disk of `size` bytes.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for a damaged table; [`Kind::Limit`]; [`Kind::Io`].
    pub(crate) fn read(
        file: &dyn Storage,
        bitmap: &Bitmap,
        geometry: Geometry,
        size: u64,
        limits: &Limits,
    ) -> Result<Self> {
        let mut bits = Self::default();
        let cluster_bits = geometry.cluster_size() * 8;
        let mut cluster = vec![0; geometry.cluster_size() as usize];
        for (index, entry) in (0u64..).zip(read_table(file, bitmap, geometry, size, limits)?) {
            let first = index * cluster_bits;
            match entry {
                BitmapCluster::Zeros => {}
                BitmapCluster::Ones => bits.set(first..first + cluster_bits),
                BitmapCluster::Bits(host) => {
                    read_exact(file, &mut cluster, host.get())
                        .map_err(|error| error.within(structure(&bitmap.name), host.get()))?;
                    bits.merge(first, &cluster);
                }
            }
        }
        bits.truncate(bitmap.bits(size));
        Ok(bits)
    }
}

/// Reads the table of `bitmap` for a disk of `size` bytes.
///
/// # Errors
/// As [`Bits::read`].
pub(crate) fn read_table(
    file: &dyn Storage,
    bitmap: &Bitmap,
    geometry: Geometry,
    size: u64,
    limits: &Limits,
) -> Result<Vec<BitmapCluster>> {
    let at = bitmap.table_offset.get();
    let structure = || format!("table of bitmap {:?}", lossy(&bitmap.name));
    let wrong = |why: &str| {
        Error::corrupt(structure(), Some(at), why).hint("removing the bitmap leaves the disk as it is")
    };
    if at == 0 || !at.is_multiple_of(geometry.cluster_size()) || at >> 56 != 0 {
        return Err(wrong("it is not at a multiple of the cluster size"));
    }
    let entries = u64::from(bitmap.table_size);
    if entries != bitmap.table_entries(size, geometry) {
        return Err(wrong("its length does not fit the disk"));
    }
    // Not above, since it is the disk that says how long it is.
    if entries.saturating_mul(geometry.cluster_size()) > limits.qcow2_bitmap_bytes {
        let message = format!("the bitmap takes more than {} bytes", limits.qcow2_bitmap_bytes);
        return Err(Error::new(Kind::Limit, message).within(structure(), at));
    }
    let mut bytes = vec![0; entries as usize * 8];
    read_exact(file, &mut bytes, at).map_err(|error| error.within(structure(), at))?;
    let decode = |raw: &[u8; 8]| BitmapCluster::decode(u64::from_be_bytes(*raw), geometry).map_err(wrong);
    bytes.as_chunks::<8>().0.iter().map(decode).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn bits_like_a_set() {
        let mut bits = Bits::default();
        let mut model = BTreeSet::new();
        let mut seed = 7u64;
        for _ in 0..200 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let start = seed >> 40 & 0x3_ffff;
            let len = if seed & 0x300 == 0 { seed >> 20 & 0x3fff } else { seed >> 20 & 0x1f };
            bits.set(start..start + len);
            model.extend(start..start + len);
        }
        let flat = |bits: &Bits| bits.runs().flatten().collect::<BTreeSet<_>>();
        assert!(flat(&bits) == model);
        // Runs do not touch.
        assert!(bits.runs().zip(bits.runs().skip(1)).all(|(one, next)| one.end < next.start));
        for len in [200_001, 200_000, PAGE_BITS * 3, 5, 0] {
            bits.truncate(len);
            model.retain(|&bit| bit < len);
            assert!(flat(&bits) == model, "{len}");
        }
        assert_eq!(bits, Bits::default());
    }

    #[test]
    fn bytes_there_and_back() {
        let mut bits = Bits::default();
        bits.set(3..4);
        bits.set(PAGE_BITS * 2 + 9..PAGE_BITS * 4 + 1);
        let mut bytes = vec![0; PAGE * 6];
        bits.merge_into(0, &mut bytes);
        assert_eq!((bytes[0], bytes[PAGE * 2 + 1], bytes[PAGE * 3], bytes[PAGE * 4]), (8, 0xfe, 0xff, 1));
        let mut again = Bits::default();
        again.merge(0, &bytes);
        assert!(again.runs().eq(bits.runs()));
        let mut part = vec![0; PAGE];
        bits.merge_into(PAGE_BITS * 4, &mut part);
        assert_eq!((part[0], part[1]), (1, 0));
        assert_eq!(bits.next_page(4), Some(4));
        assert_eq!(bits.next_page(PAGE_BITS * 5), None);
    }
}
