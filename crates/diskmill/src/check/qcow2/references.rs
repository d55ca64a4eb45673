use std::collections::{HashMap, HashSet};

use diskmill_format::HostOffset;
use diskmill_format::qcow2::{
    BitmapCluster, COMPRESSED, COPIED, CryptMethod, HOST_OFFSET_MASK, L1_RESERVED, L2_RESERVED, ZERO,
    feature, parse_bitmaps,
};

use super::snapshots::Root;
use super::{Finding, Pass, Repair};
use crate::error::{Error, Kind, Result};
use crate::qcow2::lossy;

/// L2 tables that are no clusters and are followed all the same, as QEMU does with all of them.
const MOST_MISALIGNED: u64 = 1024;
/// Bytes that a row of [`References`] takes.
const ROW: u64 = 48;

/// How often L1 tables refer to an L2 table.
#[derive(Default)]
struct References {
    all: u64,
    active: u64,
    followed: bool,
}

/// Host clusters, one behind the other, that entries of an L2 table refer to.
#[derive(Default)]
struct Run {
    at: u64,
    len: u64,
}

impl Pass<'_> {
    /// Counts the references to all clusters, but for those of refcount blocks.
    pub(super) fn count_references(&mut self) -> Result<()> {
        self.count_guest_data()?;
        let table_bytes = u64::from(self.header.refcount_table_clusters) * self.cluster_size();
        self.count(self.header.refcount_table_offset.get(), table_bytes, 1)?;
        self.count_extensions()
    }

    /// Counts the header, the tables of the disk and of its snapshots, and what they point to.
    pub(super) fn count_guest_data(&mut self) -> Result<()> {
        let cluster = self.cluster_size();
        self.count(0, cluster, 1)?;
        let (roots, snapshot_bytes) = self.roots()?;
        let mut l2: HashMap<u64, References> = HashMap::new();
        for root in &roots {
            for (_, entry) in self.disk.table(root.offset, root.entries)? {
                let known = l2.len();
                let references = l2.entry(entry & HOST_OFFSET_MASK).or_default();
                references.all += root.times;
                references.active += u64::from(root.active);
                if l2.len() > known {
                    self.budget.charge(ROW)?;
                }
            }
        }
        let mut table = vec![0; cluster as usize];
        let mut misaligned = 0;
        for root in &roots {
            self.follow_root(root, &mut l2, &mut table, &mut misaligned)?;
        }
        drop(l2);
        self.follow(self.header.snapshots_offset.get(), snapshot_bytes, 1)?;
        Ok(())
    }

    /// Counts what header extensions point to.
    pub(super) fn count_extensions(&mut self) -> Result<()> {
        if let (CryptMethod::Luks, Some((at, len))) = (self.header.crypt, self.extensions.luks_header) {
            self.count(at, len, 1)?;
        }
        self.count_bitmaps()
    }

    /// Counts `times` references to what stands at `offset`. Tells whether it is there: a cluster or more past the end
    /// of the file is an error, and not counted. (The last cluster of the file may be cut.)
    pub(super) fn count(&mut self, offset: u64, len: u64, times: u64) -> Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        let past = offset.saturating_add(len).saturating_sub(self.disk.len());
        let first = self.cluster_of(offset);
        let clusters = self.cluster_of(offset.saturating_add(len - 1)) - first + 1;
        if past >= self.cluster_size() {
            self.error(&Finding::PastEnd { offset, len }, times);
            self.beyond.add(first, clusters.min(1 << 20), (1, 1), &mut self.budget, |_, _| {})?;
            return Ok(false);
        }
        self.count_clusters(first, clusters, times)?;
        Ok(true)
    }

    fn count_clusters(&mut self, first: u64, clusters: u64, times: u64) -> Result<()> {
        let mut over = Vec::new();
        let most = self.width().max();
        self.counts.add(first, clusters, (times, most), &mut self.budget, |cluster, by| {
            over.push((cluster, by));
        })?;
        for (cluster, by) in over {
            self.error(&Finding::Overflow { offset: cluster << self.geometry().cluster_bits() }, by);
        }
        Ok(())
    }

    /// As [`count`](Self::count), for a table: where it is missing, so is what it refers to.
    fn follow(&mut self, offset: u64, len: u64, times: u64) -> Result<bool> {
        let there = self.count(offset, len, times)?;
        self.lost |= !there;
        Ok(there)
    }

    fn follow_root(
        &mut self,
        root: &Root,
        l2: &mut HashMap<u64, References>,
        table: &mut [u8],
        misaligned: &mut u64,
    ) -> Result<()> {
        let cluster = self.cluster_size();
        self.follow(root.offset, root.entries * 8, root.times)?;
        for (_, entry) in self.disk.table(root.offset, root.entries)? {
            if entry & L1_RESERVED != 0 {
                self.error(&Finding::L1Reserved { entry }, root.times);
            }
            self.uncopied |= root.active && entry & COPIED == 0;
            let offset = entry & HOST_OFFSET_MASK;
            let there = self.follow(offset, cluster, root.times)?;
            let aligned = offset.is_multiple_of(cluster);
            if !aligned {
                self.lost = true;
                self.error(&Finding::L2Misaligned { offset }, root.times);
            }
            let Some(references) = l2.get_mut(&offset) else { continue };
            if std::mem::replace(&mut references.followed, true) || !there {
                continue;
            }
            let (all, active) = (references.all, references.active);
            if !aligned {
                *misaligned += 1;
                if *misaligned == MOST_MISALIGNED {
                    self.report.check_errors += 1;
                    (self.found)(
                        super::Verdict::Error,
                        &Finding::NotFollowed { what: "misaligned L2 tables" },
                    );
                }
                if *misaligned >= MOST_MISALIGNED {
                    continue;
                }
            }
            self.follow_l2(offset, all, active, table)?;
        }
        Ok(())
    }

    /// Counts what the L2 table at `offset` refers to, to which `all` L1 entries refer, `active` of them in the active
    /// L1 table. `table` has room for it.
    fn follow_l2(&mut self, offset: u64, all: u64, active: u64, table: &mut [u8]) -> Result<()> {
        if !self.disk.read(table, offset)? {
            return Ok(());
        }
        let cluster = self.cluster_size();
        let words = self.geometry().l2_entry_size() / 8;
        let mut run = Run::default();
        // Where the next cluster would continue the last one; 0 before the first.
        let mut next = 0;
        let (mut allocated, mut fragmented, mut compressed) = (0u64, 0u64, 0u64);
        let (pieces, _) = table.as_chunks::<64>();
        for (piece_at, piece) in (0usize..).step_by(64).zip(pieces) {
            if *piece == [0; 64] {
                continue;
            }
            let piece: &[[u8; 8]] = piece.as_chunks::<8>().0;
            for (index, entry) in piece.chunks_exact(words).enumerate() {
                let word = |at: usize| entry.get(at).map_or(0, |word| u64::from_be_bytes(*word));
                let (entry, bitmap) = (word(0), word(1));
                if entry == 0 && bitmap == 0 {
                    continue;
                }
                let slot = (piece_at / 8 / words + index) as u64;
                let at = offset.saturating_add((piece_at + index * words * 8) as u64);
                let Some(kind) = self.inspect((offset, at), (slot, entry, bitmap), all)? else { continue };
                match kind {
                    Kept::Packed(at, len) => {
                        self.flush(&mut run, all)?;
                        self.count(at, len, all)?;
                        allocated += 1;
                        fragmented += 1;
                        compressed += 1;
                    }
                    Kept::Cluster { offset: host, data } => {
                        if !host.is_multiple_of(cluster) {
                            let finding = Finding::ClusterMisaligned { offset: host, data };
                            if self.repair == Repair::All && !data {
                                self.clear(at)?;
                                self.repaired(&finding);
                                continue;
                            }
                            self.error(&finding, all);
                        }
                        self.uncopied |= active > 0 && entry & COPIED == 0;
                        allocated += 1;
                        fragmented += u64::from(next != 0 && next != host);
                        next = host.saturating_add(cluster);
                        if self.external() {
                            continue;
                        }
                        if run.len > 0 && run.at.checked_add(run.len) == Some(host) {
                            run.len += cluster;
                        } else {
                            self.flush(&mut run, all)?;
                            run = Run { at: host, len: cluster };
                        }
                    }
                }
            }
        }
        self.flush(&mut run, all)?;
        let report = &mut self.report;
        report.allocated_clusters =
            report.allocated_clusters.saturating_add(allocated.saturating_mul(active));
        report.fragmented_clusters =
            report.fragmented_clusters.saturating_add(fragmented.saturating_mul(active));
        report.compressed_clusters =
            report.compressed_clusters.saturating_add(compressed.saturating_mul(active));
        Ok(())
    }

    /// Counts the clusters of a run, each by itself where one of them is not in the file.
    fn flush(&mut self, run: &mut Run, times: u64) -> Result<()> {
        let Run { at, len } = std::mem::take(run);
        let cluster = self.cluster_size();
        if len == 0 {
            return Ok(());
        }
        if at.is_multiple_of(cluster) && at.saturating_add(len) <= self.disk.len() {
            return self.count_clusters(self.cluster_of(at), len / cluster, times);
        }
        for at in (at..at.saturating_add(len)).step_by(cluster as usize) {
            self.count(at, cluster, times)?;
        }
        Ok(())
    }

    /// What an L2 entry that is not 0 refers to, if anything; with errors noted. `place`: of its table, and its own.
    fn inspect(
        &mut self,
        place: (u64, u64),
        (index, entry, bitmap): (u64, u64, u64),
        times: u64,
    ) -> Result<Option<Kept>> {
        let extended = self.geometry().extended_l2();
        if entry & COMPRESSED != 0 {
            if self.external() {
                self.error(&Finding::CompressedExternal { index, entry }, times);
                return Ok(None);
            }
            let (offset, len) = self.entries.compressed_range(entry);
            if entry & COPIED != 0 {
                self.error(&Finding::CompressedCopied { offset }, times);
            }
            if bitmap != 0 {
                let finding = Finding::CompressedSubclusters { index, entry };
                if !self.mend_bitmap(finding, place, 0, times)? {
                    // It may be a payload all the same: what looks like a leak is kept.
                    self.lost = true;
                    return Ok(None);
                }
            }
            return Ok(Some(Kept::Packed(offset, len)));
        }
        if entry & L2_RESERVED != 0 {
            self.error(&Finding::L2Reserved { entry }, times);
        }
        let offset = entry & HOST_OFFSET_MASK;
        let allocated = bitmap & 0xffff_ffff;
        if offset == 0 && !(self.external() && entry & COPIED != 0) {
            if allocated != 0 {
                let finding = Finding::UnallocatedSubclusters;
                // What looks like a leak may be the cluster.
                self.lost |= self.mend_bitmap(finding, place, bitmap ^ allocated, times)?;
            }
            return Ok(None);
        }
        let both = allocated & bitmap >> 32;
        if both != 0 {
            // The cluster is still the entry's, and what is in it is kept.
            self.mend_bitmap(Finding::BadSubclusters { offset }, place, bitmap ^ both << 32, times)?;
        }
        let data = if extended { allocated != 0 } else { entry & ZERO == 0 };
        Ok(Some(Kept::Cluster { offset, data }))
    }

    /// Notes that the subcluster bitmap of the entry at `place` is wrong, or is to be `bitmap` if that is repaired. Tells
    /// whether it is.
    fn mend_bitmap(
        &mut self,
        finding: Finding,
        (table, at): (u64, u64),
        bitmap: u64,
        times: u64,
    ) -> Result<bool> {
        if self.repair != Repair::All || !table.is_multiple_of(self.cluster_size()) {
            self.error(&finding, times);
            return Ok(false);
        }
        self.budget.charge(std::mem::size_of::<Patch>() as u64)?;
        self.patches.push(Patch { finding, table, at: at.saturating_add(8), bitmap, times });
        Ok(true)
    }

    /// Repairs the entries that are to be, but for those of tables that something else lies on, too.
    pub(super) fn apply_patches(&mut self) -> Result<()> {
        for Patch { finding, table, at, bitmap, times } in std::mem::take(&mut self.patches) {
            if self.counts.get(self.cluster_of(table)) == times {
                self.disk.write(&bitmap.to_be_bytes(), at)?;
                self.repaired(&finding);
            } else {
                self.error(&finding, times);
            }
        }
        Ok(())
    }

    /// Makes the L2 entry at `at` one that reads as zeros and has no cluster.
    fn clear(&self, at: u64) -> Result<()> {
        if self.geometry().extended_l2() {
            let bitmap = diskmill_format::qcow2::L2Codec::encode_bitmap(0, u32::MAX);
            self.disk.write(&(u128::from(bitmap)).to_be_bytes(), at)
        } else {
            self.disk.write(&ZERO.to_be_bytes(), at)
        }
    }

    fn count_bitmaps(&mut self) -> Result<()> {
        let Some((count, at, len)) = self.extensions.bitmaps else { return Ok(()) };
        if self.header.autoclear & feature::BITMAPS == 0 || count == 0 {
            return Ok(());
        }
        let cluster = self.cluster_size();
        let wrong = |why: &str| Error::new(Kind::Corrupt, why).within("bitmap directory", at);
        if len > self.limits.qcow2_bitmap_directory_bytes {
            return Err(Error::new(Kind::Limit, format!("{len} bytes long")).within("bitmap directory", at));
        }
        if !at.is_multiple_of(cluster) {
            return Err(wrong("it is misaligned"));
        }
        self.follow(at, len, 1)?;
        let mut bytes = vec![0; len as usize];
        self.disk.read(&mut bytes, at)?;
        let mut names = HashSet::new();
        for bitmap in parse_bitmaps(&bytes, count, HostOffset(at), self.limits)? {
            // Not repaired: which of them is the one that is meant cannot be told.
            if !names.insert(bitmap.name.clone()) {
                self.error(&Finding::BitmapTwice { bitmap: lossy(&bitmap.name) }, 1);
            }
            let (offset, entries) = (bitmap.table_offset.get(), u64::from(bitmap.table_size));
            if offset == 0 || !offset.is_multiple_of(cluster) {
                return Err(wrong("the table of a bitmap is misaligned"));
            }
            if entries == 0 || entries.saturating_mul(cluster) > self.limits.qcow2_bitmap_bytes {
                return Err(wrong("the table of a bitmap has no entries, or too many"));
            }
            self.follow(offset, entries * 8, 1)?;
            for (_, entry) in self.disk.table(offset, entries)? {
                match BitmapCluster::decode(entry, self.geometry()) {
                    Err(_) => {
                        self.lost = true;
                        self.error(&Finding::BitmapEntry { bitmap: lossy(&bitmap.name), entry }, 1);
                    }
                    Ok(BitmapCluster::Bits(host)) => {
                        self.count(host.get(), cluster, 1)?;
                    }
                    Ok(BitmapCluster::Zeros | BitmapCluster::Ones) => {}
                }
            }
        }
        Ok(())
    }
}

/// The subcluster bitmap of an L2 entry that is to be mended.
pub(super) struct Patch {
    finding: Finding,
    /// Offset of the L2 table, and how many L1 entries refer to it.
    table: u64,
    times: u64,
    /// Offset of the bitmap.
    at: u64,
    /// What it is to be.
    bitmap: u64,
}

/// What an L2 entry keeps in the file.
enum Kept {
    /// A host cluster, for data or for a range of zeros.
    Cluster { offset: u64, data: bool },
    /// A compressed payload: offset, and bytes up to the end of its last sector.
    Packed(u64, u64),
}
