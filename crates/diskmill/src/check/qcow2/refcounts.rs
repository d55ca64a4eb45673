use std::collections::HashSet;

use super::super::counts::Counts;
use super::{Finding, Pass, Repair, Verdict};
use crate::error::{Error, Result};

/// Bits of a refcount table entry that are no offset (specification, "Refcount table").
const RESERVED: u64 = 0x1ff;
/// Refcount blocks that are read although an entry before refers to them too. The number is reported as an error anyway.
const MOST_REPEATED: u64 = 1024;

/// The refcounts as the image has them.
#[derive(Default)]
pub(super) struct RefcountTable {
    /// The entries that are not 0, by index.
    entries: Vec<(u64, u64)>,
    /// Whether the refcount of a cluster with references differs from their number…
    differs: Counts,
    /// …and what it is then.
    other: Counts,
    /// The block that was read last by itself, and its offset.
    block: Option<(u64, Vec<u8>)>,
    /// Something is wrong with the structures themselves.
    damaged: bool,
}

impl RefcountTable {
    fn entry(&self, index: u64) -> u64 {
        let found = self.entries.binary_search_by_key(&index, |&(index, _)| index);
        found.ok().and_then(|at| self.entries.get(at)).map_or(0, |&(_, entry)| entry)
    }
}

impl Pass<'_> {
    /// Counts the references to the refcount blocks.
    pub(super) fn count_refcount_structures(&mut self) -> Result<()> {
        let cluster = self.cluster_size();
        let entries = u64::from(self.header.refcount_table_clusters) * cluster / 8;
        self.table.entries = self.disk.table(self.header.refcount_table_offset.get(), entries)?;
        let entries = std::mem::take(&mut self.table.entries);
        for &(index, entry) in &entries {
            let offset = entry & !RESERVED;
            let wrong = if entry & RESERVED != 0 {
                Some(Finding::RefcountTableReserved { index })
            } else if !offset.is_multiple_of(cluster) {
                Some(Finding::RefcountBlockMisaligned { index })
            } else if self.cluster_of(offset) >= self.clusters() {
                Some(Finding::RefcountBlockOutside { index })
            } else {
                self.count(offset, cluster, 1)?;
                let references = self.counts.get(self.cluster_of(offset));
                (references != 1).then_some(Finding::RefcountBlockShared { index, references })
            };
            if let Some(finding) = wrong {
                self.table.damaged = true;
                self.error(&finding, 1);
            }
        }
        self.table.entries = entries;
        Ok(())
    }

    /// Compares the refcounts with the references, and repairs what `repair` says. Tells whether that is not enough:
    /// the refcount structures themselves are damaged, or lack refcounts of clusters in use.
    pub(super) fn compare(&mut self, repair: Repair) -> Result<bool> {
        let cluster = self.cluster_size();
        let clusters = self.clusters();
        let per_block = self.width().entries(cluster);
        let mut damaged = self.table.damaged;
        let mut highest = None;
        let mut block = vec![0; cluster as usize];
        let mut seen = HashSet::new();
        let mut repeated = 0;
        let entries = std::mem::take(&mut self.table.entries);
        let mut left = entries.as_slice();
        self.table.differs = Counts::default();
        self.table.other = Counts::default();
        let mut from = 0;
        loop {
            // The next block that is there, or that has to be.
            let wanted = self.counts.next_page(from * per_block).map(|cluster| cluster / per_block);
            let listed = left.first().map(|&(index, _)| index);
            let Some(index) = [wanted, listed].into_iter().flatten().min() else { break };
            let first = index.saturating_mul(per_block);
            if first >= clusters {
                break;
            }
            from = index + 1;
            let mut entry = 0;
            if listed == Some(index) {
                entry = left.first().map_or(0, |&(_, entry)| entry);
                left = left.get(1..).unwrap_or_default();
            }
            let offset = entry & !RESERVED;
            let end = clusters.min(first.saturating_add(per_block));
            if !offset.is_multiple_of(cluster) {
                self.report.check_errors = self.report.check_errors.saturating_add(end - first);
                (self.found)(Verdict::Error, &Finding::RefcountUnknown { cluster: first, len: end - first });
                continue;
            }
            if offset != 0 && !seen.insert(offset) {
                repeated += 1;
                if repeated >= MOST_REPEATED {
                    if repeated == MOST_REPEATED {
                        self.report.check_errors += 1;
                        let finding =
                            Finding::NotFollowed { what: "refcount blocks that are referred to twice" };
                        (self.found)(Verdict::Error, &finding);
                    }
                    continue;
                }
            }
            let there = offset != 0 && self.disk.read(&mut block, offset)?;
            let block = if there { block.as_mut_slice() } else { &mut [] };
            damaged |= self.compare_block(first..end, block, offset, repair, &mut highest)?;
        }
        self.table.entries = entries;
        self.report.image_end_offset =
            highest.map_or(0, |highest: u64| (highest + 1).saturating_mul(cluster));
        Ok(damaged)
    }

    /// As [`compare`](Self::compare), for the clusters that `block` counts; an empty one is all zeros.
    fn compare_block(
        &mut self,
        clusters: std::ops::Range<u64>,
        block: &mut [u8],
        offset: u64,
        repair: Repair,
        highest: &mut Option<u64>,
    ) -> Result<bool> {
        let width = self.width();
        let mut damaged = false;
        // Bytes of the block that changed.
        let mut dirty: Option<(usize, usize)> = None;
        let mut cluster = clusters.start;
        while cluster < clusters.end {
            if block.is_empty() {
                match self.counts.next_page(cluster) {
                    Some(next) if next < clusters.end => cluster = next,
                    _ => break,
                }
            }
            let index = (cluster - clusters.start) as usize;
            let refcount = width.get(block, index).unwrap_or(0);
            let references = self.counts.get(cluster);
            cluster += 1;
            if refcount == 0 && references == 0 {
                continue;
            }
            let cluster = cluster - 1;
            *highest = Some(cluster);
            if refcount == references {
                continue;
            }
            damaged |= refcount == 0;
            let leak = refcount > references;
            let keep = leak && self.lost;
            let fix = if leak { repair != Repair::Nothing && !keep } else { repair == Repair::All };
            let finding = Finding::Refcount { cluster, refcount, references };
            if fix && width.set(block, index, references) {
                let at = index * width.bits() as usize / 8;
                let last = at + width.bits().div_ceil(8) as usize;
                dirty = Some(dirty.map_or((at, last), |(first, _)| (first, last)));
                (self.found)(Verdict::Repaired, &finding);
                let fixed =
                    if leak { &mut self.report.leaks_fixed } else { &mut self.report.corruptions_fixed };
                *fixed += 1;
                continue;
            }
            if leak {
                self.report.leaks += 1;
                self.report.leaks_kept += u64::from(keep && repair != Repair::Nothing);
                (self.found)(Verdict::Leak, &finding);
            } else {
                self.error(&finding, 1);
            }
            if references > 0 {
                self.table.differs.set(cluster, 1, &mut self.budget)?;
                self.table.other.set(cluster, refcount, &mut self.budget)?;
            }
        }
        if let Some((first, last)) = dirty
            && let Some(bytes) = block.get(first..last)
        {
            self.disk.write(bytes, offset.saturating_add(first as u64))?;
        }
        Ok(damaged)
    }

    /// The refcount of `cluster` as the image has it by now, after [`compare`](Self::compare). `None` if it cannot be
    /// told.
    pub(super) fn refcount(&mut self, cluster: u64) -> Result<Option<u64>> {
        let per_block = self.width().entries(self.cluster_size());
        let offset = self.table.entry(cluster / per_block) & !RESERVED;
        if !offset.is_multiple_of(self.cluster_size()) {
            return Ok(None);
        }
        let references = self.counts.get(cluster);
        if references > 0 {
            let differs = self.table.differs.get(cluster) != 0;
            return Ok(Some(if differs { self.table.other.get(cluster) } else { references }));
        }
        // Nothing that was counted: only wrong entries ask for it.
        if offset == 0 {
            return Ok(Some(0));
        }
        if self.table.block.as_ref().is_none_or(|(at, _)| *at != offset) {
            let mut block = vec![0; self.cluster_size() as usize];
            self.disk.read(&mut block, offset)?;
            self.table.block = Some((offset, block));
        }
        let index = (cluster % per_block) as usize;
        Ok(self.table.block.as_ref().and_then(|(_, block)| self.width().get(block, index)))
    }

    /// The first of `len` clusters in a row that are free, and whose refcounts have their places.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) if there are none.
    pub(super) fn free_run(&mut self, len: u64) -> Result<u64> {
        let per_block = self.width().entries(self.cluster_size());
        let (mut first, mut found) = (0, 0);
        for index in self.table.entries.iter().map(|&(index, _)| index).collect::<Vec<_>>() {
            let start = index.saturating_mul(per_block);
            // Offsets have 56 bits.
            let end = start.saturating_add(per_block).min(1 << (56 - self.geometry().cluster_bits()));
            for cluster in start..end {
                let unused = self.counts.get(cluster) == 0 && self.beyond.get(cluster) == 0;
                if !unused || self.refcount(cluster)? != Some(0) {
                    found = 0;
                    continue;
                }
                if found == 0 || first + found != cluster {
                    (first, found) = (cluster, 0);
                }
                found += 1;
                if found == len {
                    return Ok(first);
                }
            }
        }
        Err(Error::unsupported("finding room for a new snapshot table where no refcount block has any left")
            .hint("convert --snapshot copies the snapshots one by one"))
    }

    /// Sets the refcount of a cluster, whose block must be there.
    pub(super) fn put_refcount(&mut self, cluster: u64, count: u64) -> Result<()> {
        let width = self.width();
        let per_block = width.entries(self.cluster_size());
        let offset = self.table.entry(cluster / per_block) & !RESERVED;
        if offset == 0 {
            return Err(Error::invalid("a refcount without its block"));
        }
        self.table.block = None;
        let mut block = vec![0; self.cluster_size() as usize];
        self.disk.read(&mut block, offset)?;
        width.set(&mut block, (cluster % per_block) as usize, count);
        self.disk.write(&block, offset)
    }

    /// Whether some refcount of a cluster with references differs from their number.
    pub(super) fn refcounts_differ(&self) -> bool {
        self.table.differs.largest() > 0
    }
}
