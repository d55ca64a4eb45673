//! Allocating clusters and counting references to them.

use std::ops::Range;

use diskmill_format::HostOffset;

use super::cache::Class;
use super::meta::{Meta, Switch};
use crate::error::{Error, Kind, Result};

/// Clusters that follow each other in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    /// Of the first one.
    pub(super) host: u64,
    pub(super) clusters: u64,
    /// The file holds zeros there.
    pub(super) zeroed: bool,
}

impl Meta {
    /// Clusters that one refcount block counts.
    pub(super) const fn per_block(&self) -> u64 {
        self.width.entries(self.cluster_size())
    }

    /// Where the refcount of `cluster` stands: offset of the slice and index in it; `None` if it has no block.
    fn place_of(&self, cluster: u64) -> Option<(u64, usize)> {
        let region = usize::try_from(cluster / self.per_block()).ok()?;
        let block = self.blocks.get(region).copied().filter(|&block| block != 0)?;
        let per_slice = self.width.entries(self.slice_size());
        let within = cluster % self.per_block();
        Some((block + within / per_slice * self.slice_size(), (within % per_slice) as usize))
    }

    /// References to `cluster` that the file has or will have, those to be given up at the next commit included.
    pub(super) fn count(&mut self, cluster: u64) -> Result<u64> {
        let Some((at, index)) = self.place_of(cluster) else { return Ok(0) };
        let bytes = self.cache.get(&self.disk, at, self.slice_size(), Class::Refcounts);
        let bytes = bytes.map_err(|error| error.within("refcount block", at))?;
        Ok(self.width.get(&bytes, index).unwrap_or(0))
    }

    /// References to `cluster` after the next commit.
    pub(super) fn count_later(&mut self, cluster: u64) -> Result<u64> {
        let lower = self.lowers.get(&cluster).copied().unwrap_or(0);
        Ok(self.count(cluster)?.saturating_sub(lower))
    }

    pub(super) fn set_count(&mut self, cluster: u64, count: u64) -> Result<()> {
        if count > self.width.max() {
            let bits = self.width.bits();
            return Err(Error::new(
                Kind::Limit,
                format!(
                    "more than {} references to a cluster do not fit into refcounts of {bits} bits",
                    self.width.max()
                ),
            )
            .hint("an image with larger refcount_bits can have them"));
        }
        self.writable_block(cluster / self.per_block())?;
        let Some((at, index)) = self.place_of(cluster) else {
            return Err(Error::invalid("a cluster without a refcount block"));
        };
        let (bits, width, size) = (self.width.bits() as usize, self.width, self.slice_size());
        let first = index * bits / 8;
        let range = first..first + bits.div_ceil(8);
        let bytes = self.cache.modify(&self.disk, at, size, Class::Refcounts, range)?;
        width.set(bytes, index, count);
        Ok(())
    }

    /// Adds `by` to the refcount of `cluster`, at once. Only where a switch keeps the old counts in the file.
    pub(super) fn change_count(&mut self, cluster: u64, by: i64) -> Result<()> {
        let count = self.count(cluster)?;
        let Some(changed) = count.checked_add_signed(by) else {
            return Err(self.uncounted(cluster));
        };
        self.set_count(cluster, changed)?;
        if changed == 0 {
            self.forget(cluster);
        }
        Ok(())
    }

    fn uncounted(&self, cluster: u64) -> Error {
        let host = HostOffset(cluster << self.geometry.cluster_bits());
        self.corrupt("refcount", host, "a cluster in use has refcount 0: the image is damaged")
            .hint("`check -r all` repairs it")
    }

    fn forget(&mut self, cluster: u64) {
        let host = cluster << self.geometry.cluster_bits();
        self.cache.forget_cluster(host, self.cluster_size(), self.slice_size());
        self.fresh.remove(&host);
        self.packed_tail = self.packed_tail.filter(|tail| tail >> self.geometry.cluster_bits() != cluster);
    }

    /// Gives up one reference to the cluster at `host`, when the next commit has made durable that nobody uses it.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if there is no reference to give up.
    pub(super) fn lower(&mut self, host: u64) -> Result<()> {
        let cluster = host >> self.geometry.cluster_bits();
        if self.count_later(cluster)? == 0 {
            return Err(self.uncounted(cluster));
        }
        *self.lowers.entry(cluster).or_default() += 1;
        Ok(())
    }

    /// Gives up what [`lower`](Self::lower) held back. The entries that held these references are gone from the file.
    pub(super) fn apply_lowers(&mut self) -> Result<()> {
        let mut freed: Option<Range<u64>> = None;
        while let Some((&cluster, &by)) = self.lowers.first_key_value() {
            let count = self.count(cluster)?.saturating_sub(by);
            self.set_count(cluster, count)?;
            if count == 0 {
                self.forget(cluster);
                self.hint = self.hint.min(cluster);
                match &mut freed {
                    Some(run) if run.end == cluster => run.end += 1,
                    _ => self.punch_out(freed.replace(cluster..cluster + 1)),
                }
            }
            self.lowers.remove(&cluster);
        }
        self.punch_out(freed);
        Ok(())
    }

    /// Gives the space of free clusters back to the file system, if that is wanted.
    fn punch_out(&self, clusters: Option<Range<u64>>) {
        let Some(Range { start, end }) = clusters.filter(|_| self.punch) else { return };
        let bits = self.geometry.cluster_bits();
        if !self.disk.storage().is_block_device() {
            // Only space is lost if this fails.
            let _ = self.disk.zero(start << bits, (end - start) << bits, false);
        }
    }

    /// Takes up to `most` free clusters that follow each other, with refcount 1. The file reaches to their end.
    pub(super) fn allocate(&mut self, most: u64) -> Result<Run> {
        if self.switch.is_some() {
            return self.take_behind_all(1);
        }
        let mut at = self.hint;
        let (first, clusters) = loop {
            let region = at / self.per_block();
            self.block_for_region(region)?;
            let end = (region + 1).saturating_mul(self.per_block());
            match self.free_run(at, end, most)? {
                Some(found) => break found,
                None => {
                    at = end;
                    self.hint = end;
                }
            }
        };
        self.reach(first + clusters)?;
        for cluster in first..first + clusters {
            self.set_count(cluster, 1)?;
        }
        self.hint = first + clusters;
        Ok(self.taken(first, clusters))
    }

    /// The first free clusters in `from..end`, which one refcount block counts.
    fn free_run(&mut self, from: u64, end: u64, most: u64) -> Result<Option<(u64, u64)>> {
        let mut found = None;
        let mut at = from;
        while at < end {
            let Some((slice, first)) = self.place_of(at) else { break };
            let bytes = self.cache.get(&self.disk, slice, self.slice_size(), Class::Refcounts)?;
            for index in first.. {
                let Some(count) = self.width.get(&bytes, index) else { break };
                match (&mut found, count) {
                    (None, 0) => found = Some((at, 1)),
                    (Some((_, clusters)), 0) => *clusters += 1,
                    (Some(_), _) => return Ok(found),
                    (None, _) => {}
                }
                if found.is_some_and(|(_, clusters)| clusters >= most) {
                    return Ok(found);
                }
                at += 1;
                if at >= end {
                    break;
                }
            }
        }
        Ok(found)
    }

    fn taken(&mut self, first: u64, clusters: u64) -> Run {
        let zeroed = first >= self.virgin;
        if self.virgin != u64::MAX {
            self.virgin = self.virgin.max(first + clusters);
        }
        Run { host: first << self.geometry.cluster_bits(), clusters, zeroed }
    }

    /// Sees to it that `region` has a refcount block. A new one takes the region's first cluster, so that it counts
    /// itself and is valid as soon as the refcount table points to it.
    fn block_for_region(&mut self, region: u64) -> Result<()> {
        let index = self.region_index(region)?;
        if self.blocks.get(index).is_some_and(|&block| block != 0) {
            return Ok(());
        }
        let cluster = region.saturating_mul(self.per_block());
        self.reach(cluster + 1)?;
        self.new_block(index, cluster << self.geometry.cluster_bits())?;
        self.taken(cluster, 1);
        self.set_count(cluster, 1)
    }

    /// # Errors
    /// [`Kind::Limit`] if a table that counts this region would be too large.
    fn region_index(&self, region: u64) -> Result<usize> {
        if region >= self.limits.qcow2_refcount_table_bytes / 8 {
            return Err(Error::new(Kind::Limit, "the refcount table would be larger than QEMU accepts")
                .hint("an image with a larger cluster_size can grow further"));
        }
        Ok(region as usize)
    }

    fn new_block(&mut self, index: usize, host: u64) -> Result<()> {
        let table = u64::from(self.area.header.refcount_table_clusters) * self.cluster_size();
        let byte = index as u64 * 8;
        if self.switch.is_none() && byte < table {
            // There is no entry yet: zeros. A table that has become too small is written anew by the commit.
            self.disk.make_room(&[0; 8], self.area.header.refcount_table_offset.get() + byte)?;
        }
        let zeros = vec![0; self.cluster_size() as usize];
        self.put_fresh(host, &zeros, Class::Refcounts)?;
        if self.blocks.len() <= index {
            self.blocks.resize(index + 1, 0);
        }
        if let Some(block) = self.blocks.get_mut(index) {
            *block = host;
        }
        self.new_blocks.push(index);
        Ok(())
    }

    /// Sees to it that the block of `region` may be changed.
    fn writable_block(&mut self, region: u64) -> Result<()> {
        let index = self.region_index(region)?;
        let old = self.blocks.get(index).copied().unwrap_or(0);
        match &self.switch {
            None if old == 0 => self.block_for_region(region),
            None => Ok(()),
            Some(switch) if old == 0 || (switch.relocate && !self.is_fresh(old)) => {
                let bytes = match old {
                    0 => None,
                    old => Some(self.whole(old, Class::Refcounts)?),
                };
                // Taking the cluster first would come back here for the block that counts it.
                let host = self.bump(1)?.host;
                self.new_block(index, host)?;
                if let Some(bytes) = bytes {
                    self.put_fresh(host, &bytes, Class::Refcounts)?;
                }
                self.set_count(host >> self.geometry.cluster_bits(), 1)?;
                if old != 0 { self.change_count(old >> self.geometry.cluster_bits(), -1) } else { Ok(()) }
            }
            Some(_) => Ok(()),
        }
    }

    /// From here on clusters are taken from behind all that the file has.
    pub(super) fn begin_behind_all(&mut self, relocate: bool) -> Result<()> {
        let base = match self.disk.storage().is_block_device() {
            true => 0,
            false => self.disk.len().div_ceil(self.cluster_size()).min(self.virgin),
        };
        // Clusters that are counted and that the file does not reach, and on a device all of them.
        let base = self.used_end(base)?;
        self.switch = Some(Switch { base, next: base, relocate });
        Ok(())
    }

    /// Where the last cluster ends that has a refcount, or `least` if none has from there on.
    pub(super) fn used_end(&mut self, least: u64) -> Result<u64> {
        for index in (0..self.blocks.len()).rev() {
            let first = (index as u64 * self.per_block()).max(least);
            let mut end = (index as u64 + 1) * self.per_block();
            if self.blocks.get(index).is_none_or(|&block| block == 0) {
                continue;
            }
            while end > first && self.count(end - 1)? == 0 {
                end -= 1;
            }
            if end > first {
                return Ok(end);
            }
        }
        Ok(least)
    }

    /// Gives up the refcount blocks at the end of the table that count nothing but themselves.
    pub(super) fn drop_last_blocks(&mut self) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        while let Some((&host, before)) = self.blocks.split_last().filter(|(_, before)| !before.is_empty()) {
            let index = before.len();
            let first = index as u64 * self.per_block();
            let own = host >> bits;
            let counted = self.whole(host, Class::Refcounts)?;
            let inside = (first..first + self.per_block()).contains(&own);
            let zeros = match inside {
                true => {
                    let mut bytes = counted;
                    self.width.set(&mut bytes, (own - first) as usize, 0)
                        && bytes.iter().all(|&byte| byte == 0)
                }
                false => counted.iter().all(|&byte| byte == 0),
            };
            if host != 0 && !zeros {
                return Ok(());
            }
            self.blocks.truncate(index);
            if host == 0 {
                continue;
            }
            self.disk.write(&[0; 8], self.area.header.refcount_table_offset.get() + index as u64 * 8)?;
            self.disk.sync()?;
            self.forget(own);
            if !inside {
                self.set_count(own, 0)?;
            }
        }
        self.hint = 0;
        self.cache.write(&self.disk, |_, _| true)
    }

    /// The next clusters behind all others, not counted yet.
    fn bump(&mut self, clusters: u64) -> Result<Run> {
        let Some(switch) = &mut self.switch else { return Err(Error::invalid("no switch is going on")) };
        let first = switch.next;
        let end = first.saturating_add(clusters);
        switch.next = end;
        self.reach(end)?;
        Ok(self.taken(first, clusters))
    }

    /// Takes clusters behind all others, with refcount 1.
    pub(super) fn take_behind_all(&mut self, clusters: u64) -> Result<Run> {
        let run = self.bump(clusters)?;
        let first = run.host >> self.geometry.cluster_bits();
        for cluster in first..first + clusters {
            self.set_count(cluster, 1)?;
        }
        Ok(run)
    }

    /// Clusters that a refcount table with an entry for each block takes.
    fn block_table_clusters(&self) -> u64 {
        (self.blocks.len() as u64 * 8).div_ceil(self.cluster_size()).max(1)
    }

    /// Takes clusters for the refcount table, behind all others. They are as many as it needs with the blocks that count
    /// them.
    pub(super) fn take_block_table(&mut self) -> Result<(HostOffset, u32)> {
        let mut clusters = self.block_table_clusters();
        loop {
            let run = self.take_behind_all(clusters)?;
            let need = self.block_table_clusters();
            if need <= clusters {
                if clusters.saturating_mul(self.cluster_size()) > self.limits.qcow2_refcount_table_bytes {
                    return Err(Error::new(
                        Kind::Limit,
                        "the refcount table would be larger than QEMU accepts",
                    ));
                }
                return Ok((HostOffset(run.host), clusters as u32));
            }
            // Nothing was written there: it only has to be uncounted.
            let first = run.host >> self.geometry.cluster_bits();
            for cluster in first..first + clusters {
                self.set_count(cluster, 0)?;
            }
            clusters = need;
        }
    }

    /// Gives the refcount table a larger place if it has outgrown its own. Returns the new one.
    pub(super) fn place_block_table(&mut self) -> Result<Option<(HostOffset, u32)>> {
        let have = u64::from(self.area.header.refcount_table_clusters);
        if self.block_table_clusters() <= have {
            return Ok(None);
        }
        self.begin_behind_all(false)?;
        let placed = self.take_block_table();
        self.switch = None;
        placed.map(Some)
    }

    /// Writes the refcount table to its place.
    pub(super) fn write_block_table(&mut self, at: HostOffset, clusters: u32) -> Result<()> {
        let mut bytes: Vec<u8> = self.blocks.iter().flat_map(|block| block.to_be_bytes()).collect();
        bytes.resize((u64::from(clusters) * self.cluster_size()) as usize, 0);
        self.disk.write(&bytes, at.get())
    }
}
