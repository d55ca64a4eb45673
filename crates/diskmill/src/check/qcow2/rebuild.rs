use std::collections::BTreeMap;

use diskmill_format::Limits;
use diskmill_io::Storage;

use super::super::counts::Counts;
use super::{Pass, Repair};
use crate::error::{Error, Kind, Result};

/// Where the header has the refcount table's offset (8 bytes) and clusters (4 bytes): in one sector, so that they
/// change together (specification, "Header").
const TABLE_FIELDS: u64 = 48;

/// Refcount structures that are to take the place of damaged ones.
struct Plan {
    /// References without the old structures, but with the new ones.
    counts: Counts,
    /// The cluster that each block goes to, by index.
    blocks: BTreeMap<u64, u64>,
    /// The first cluster of the table, and how many it takes.
    table: (u64, u64),
    /// No cluster before this one is free.
    free_from: u64,
}

/// Writes new refcount structures into free clusters, and then makes the header point to them.
///
/// The old ones stay as they are until the header is written, so a crash leaves the one or the other.
pub(super) fn rebuild(file: &dyn Storage, limits: &Limits) -> Result<()> {
    let mut silent = |_, _: &_| {};
    let mut old = Pass::new(file, Repair::Nothing, limits, &mut silent)?;
    // The old table is what goes. Where it is said to lie over clusters in use, only these count.
    old.count_guest_data()?;
    old.count_extensions()?;
    if old.lost {
        return Err(Error::unsupported(
            "rebuilding the refcounts of an image with a damaged table that may refer to any cluster",
        )
        .hint("convert --salvage copies what can be read"));
    }
    let counts = std::mem::take(&mut old.counts);
    let mut plan = Plan { counts, blocks: BTreeMap::new(), table: (0, 0), free_from: 0 };
    // What is free must be free in the old image too.
    let mut silent = |_, _: &_| {};
    let mut old = Pass::new(file, Repair::Nothing, limits, &mut silent)?;
    old.count_references()?;
    old.count_refcount_structures()?;
    old.place(&mut plan)?;
    old.write_structures(&mut plan)
}

impl Pass<'_> {
    /// Finds a place for each block that is needed, and for the table.
    fn place(&mut self, plan: &mut Plan) -> Result<()> {
        let cluster = self.cluster_size();
        let per_block = self.width().entries(cluster);
        let mut from = 0;
        while let Some(next) = plan.counts.next_page(from) {
            if plan.counts.get(next) > 0 {
                self.place_block(plan, next / per_block)?;
                from = (next / per_block + 1).saturating_mul(per_block);
            } else {
                from = next + 1;
            }
        }
        loop {
            let highest = plan.blocks.last_key_value().map_or(0, |(&index, _)| index);
            let clusters = ((highest + 1) * 8).div_ceil(cluster);
            if clusters * cluster > self.limits.qcow2_refcount_table_bytes {
                return Err(Error::new(
                    Kind::Limit,
                    "the new refcount table would be larger than QEMU accepts",
                ));
            }
            // A run of free clusters.
            let mut first = plan.free_from;
            let mut len = 0;
            while len < clusters {
                if self.is_free(plan, first + len) {
                    len += 1;
                } else {
                    (first, len) = (first + len + 1, 0);
                }
            }
            let last = (first + clusters - 1) / per_block;
            let missing = (first / per_block..=last).find(|index| !plan.blocks.contains_key(index));
            match missing {
                // Its block may take a place in the run, or make the table longer.
                Some(index) => self.place_block(plan, index)?,
                None => {
                    for cluster in first..first + clusters {
                        plan.counts.set(cluster, 1, &mut self.budget)?;
                    }
                    plan.table = (first, clusters);
                    return Ok(());
                }
            }
        }
    }

    fn is_free(&mut self, plan: &mut Plan, cluster: u64) -> bool {
        self.counts.get(cluster) == 0 && self.beyond.get(cluster) == 0 && plan.counts.get(cluster) == 0
    }

    /// Gives block `index` a place, and the block that counts that place, and so on.
    fn place_block(&mut self, plan: &mut Plan, index: u64) -> Result<()> {
        let per_block = self.width().entries(self.cluster_size());
        let mut needed = Some(index);
        while let Some(index) = needed.filter(|index| !plan.blocks.contains_key(index)) {
            while !self.is_free(plan, plan.free_from) {
                plan.free_from += 1;
            }
            let cluster = plan.free_from;
            plan.counts.set(cluster, 1, &mut self.budget)?;
            plan.blocks.insert(index, cluster);
            self.budget.charge(64)?;
            needed = Some(cluster / per_block);
        }
        Ok(())
    }

    fn write_structures(&mut self, plan: &mut Plan) -> Result<()> {
        let (cluster, width) = (self.cluster_size(), self.width());
        let per_block = width.entries(cluster);
        let mut block = vec![0; cluster as usize];
        let mut table = vec![0; (plan.table.1 * cluster) as usize];
        for (&index, &at) in &plan.blocks {
            block.fill(0);
            let first = index * per_block;
            let mut next = plan.counts.next_page(first);
            while let Some(here) = next.filter(|&here| here < first.saturating_add(per_block)) {
                // Counts were kept within the width.
                width.set(&mut block, (here - first) as usize, plan.counts.get(here));
                next = plan.counts.next_page(here + 1);
            }
            self.disk.write(&block, at * cluster)?;
            let slot = table.get_mut(index as usize * 8..).and_then(|rest| rest.first_chunk_mut::<8>());
            if let Some(slot) = slot {
                *slot = (at * cluster).to_be_bytes();
            }
        }
        self.disk.write(&table, plan.table.0 * cluster)?;
        self.disk.barrier()?;
        let mut fields = (plan.table.0 * cluster).to_be_bytes().to_vec();
        // The limit of the table keeps this small.
        fields.extend((plan.table.1 as u32).to_be_bytes());
        self.disk.write(&fields, TABLE_FIELDS)?;
        self.disk.barrier()
    }
}
