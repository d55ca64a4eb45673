//! Refcounts of another width: all refcount blocks and their table are made anew behind all that there is, and one write of
//! the header shows them.

use std::collections::HashSet;

use diskmill_format::HostOffset;
use diskmill_format::qcow2::RefcountWidth;

use super::Qcow2Writer;
use super::meta::Meta;
use crate::error::{Error, Kind, Result};

impl Qcow2Writer {
    /// Gives refcounts another width.
    ///
    /// # Errors
    /// [`Kind::Limit`] if there is a refcount that does not fit, or the refcount table would be too large.
    pub(crate) fn set_refcount_width(&self, width: RefcountWidth) -> Result<()> {
        let mut meta = self.meta();
        if meta.width == width {
            return Ok(());
        }
        if meta.area.header.version < 3 {
            return Err(
                Error::invalid("refcounts of other widths than 16 bits need version 3").hint("compat=1.1")
            );
        }
        meta.commit()?;
        let before = meta.disk.len();
        let done = meta.change_width(width);
        if done.is_err() && !meta.disk.storage().is_block_device() {
            // Only space is lost if this fails.
            let _ = meta.disk.set_len(before);
        }
        meta.reload()?;
        done
    }
}

/// The new refcount structures.
struct Plan {
    width: RefcountWidth,
    /// Clusters of the old ones, which become free.
    old: HashSet<u64>,
    /// The first new cluster.
    base: u64,
    /// The regions that get a block, in the order of their blocks from `base` on; the table stands behind them.
    regions: Vec<u64>,
    table_clusters: u64,
}

impl Plan {
    const fn clusters(&self) -> u64 {
        self.regions.len() as u64 + self.table_clusters
    }
}

impl Meta {
    fn change_width(&mut self, width: RefcountWidth) -> Result<()> {
        let plan = self.plan_width(width)?;
        let (bits, size) = (self.geometry.cluster_bits(), self.cluster_size());
        self.reach(plan.base + plan.clusters())?;
        // The plan has checked that the table is not too large.
        let mut table = vec![0u8; (plan.table_clusters * size) as usize];
        for (host, &region) in (plan.base..).zip(&plan.regions) {
            let block = self.block_of(&plan, region)?;
            self.disk.write(&block, host << bits)?;
            if let Some(slot) = table.get_mut(region as usize * 8..region as usize * 8 + 8) {
                slot.copy_from_slice(&(host << bits).to_be_bytes());
            }
        }
        let at = plan.base + plan.regions.len() as u64;
        self.disk.write(&table, at << bits)?;
        self.sync()?;
        self.put_header(|header| {
            header.refcount_width = width;
            header.refcount_table_offset = HostOffset(at << bits);
            header.refcount_table_clusters = plan.table_clusters as u32;
        })?;
        self.width = width;
        if self.virgin != u64::MAX {
            self.virgin = self.virgin.max(plan.base + plan.clusters());
        }
        Ok(())
    }

    fn plan_width(&mut self, width: RefcountWidth) -> Result<Plan> {
        let (bits, size) = (self.geometry.cluster_bits(), self.cluster_size());
        let header = &self.area.header;
        let table = header.refcount_table_offset.get() >> bits;
        let mut old: HashSet<u64> = (table..table + u64::from(header.refcount_table_clusters)).collect();
        old.extend(self.blocks.iter().filter(|&&block| block != 0).map(|block| block >> bits));
        let file_end = match self.disk.storage().is_block_device() {
            true => 0,
            false => self.disk.len().div_ceil(size).min(self.virgin),
        };
        let base = self.used_end(file_end)?;
        let mut plan = Plan { width, old, base, regions: Vec::new(), table_clusters: 0 };
        let per_block = width.entries(size);
        for region in 0..base.div_ceil(per_block) {
            if self.has_counts(&plan, region)? {
                plan.regions.push(region);
            }
        }
        // The new structures count themselves, which may take more of them.
        loop {
            let before = plan.clusters();
            let end = base + before.max(1);
            for region in base / per_block..end.div_ceil(per_block) {
                if !plan.regions.contains(&region) {
                    plan.regions.push(region);
                }
            }
            let last = plan.regions.iter().max().copied().unwrap_or(0);
            let bytes = (last + 1).saturating_mul(8);
            if bytes > self.limits.qcow2_refcount_table_bytes {
                return Err(Error::new(Kind::Limit, "the refcount table would be larger than QEMU accepts"));
            }
            plan.table_clusters = bytes.div_ceil(size);
            if plan.clusters() == before {
                return Ok(plan);
            }
        }
    }

    /// Whether a cluster of a new region is counted.
    ///
    /// # Errors
    /// If a refcount does not fit.
    fn has_counts(&mut self, plan: &Plan, region: u64) -> Result<bool> {
        let per_block = plan.width.entries(self.cluster_size());
        let mut found = false;
        let mut cluster = region * per_block;
        while cluster < (region + 1) * per_block {
            if !self.has_block(cluster) {
                cluster = (cluster / self.per_block() + 1) * self.per_block();
                continue;
            }
            let count = self.count(cluster)?;
            if count > plan.width.max() && !plan.old.contains(&cluster) {
                let host = cluster << self.geometry.cluster_bits();
                let bits = plan.width.bits();
                return Err(Error::new(
                    Kind::Limit,
                    format!("the cluster at offset {host:#x} has refcount {count}, too much for {bits} bits"),
                ));
            }
            found |= count != 0 && !plan.old.contains(&cluster);
            cluster += 1;
        }
        Ok(found)
    }

    /// The new refcount block of a region.
    fn block_of(&mut self, plan: &Plan, region: u64) -> Result<Vec<u8>> {
        let per_block = plan.width.entries(self.cluster_size());
        let mut block = vec![0; self.cluster_size() as usize];
        let first = region * per_block;
        let new = plan.base..plan.base + plan.clusters();
        let mut cluster = first;
        while cluster < first + per_block {
            let count = match () {
                () if new.contains(&cluster) => 1,
                () if plan.old.contains(&cluster) => 0,
                () if self.has_block(cluster) => self.count(cluster)?,
                () if cluster < new.start => {
                    cluster = ((cluster / self.per_block() + 1) * self.per_block()).min(new.start);
                    continue;
                }
                () => break,
            };
            if count != 0 && !plan.width.set(&mut block, (cluster - first) as usize, count) {
                return Err(Error::invalid("a refcount changed meanwhile"));
            }
            cluster += 1;
        }
        Ok(block)
    }

    fn has_block(&self, cluster: u64) -> bool {
        let index = usize::try_from(cluster / self.per_block()).ok();
        index.and_then(|index| self.blocks.get(index)).is_some_and(|&block| block != 0)
    }
}
