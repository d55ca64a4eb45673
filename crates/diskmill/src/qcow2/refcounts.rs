use diskmill_format::HostOffset;
use diskmill_format::qcow2::{Geometry, RefcountWidth};

use crate::convert::WriteOp;
use crate::error::{Error, Kind, Result};

/// Hands out the clusters of a fresh image from the front to the back and counts references to them.
///
/// Only the refcount block of the region that is being filled is in memory: a full one gets the next free cluster
/// and is written, so an image of any size needs the refcount table alone (8 bytes for 2 GiB by default).
pub(super) struct Refcounts {
    geometry: Geometry,
    width: RefcountWidth,
    /// Clusters that one block counts.
    per_block: u64,
    /// The first free cluster.
    next: u64,
    /// Counts of the clusters `table.len() * per_block ..`.
    block: Vec<u8>,
    /// Host offset of each full block, in order.
    table: Vec<u64>,
    /// Full blocks without a place yet: their index in `table`.
    homeless: Vec<(usize, Vec<u8>)>,
}

impl Refcounts {
    /// Counts for an image whose first cluster, the header, is taken.
    pub(super) fn new(geometry: Geometry, width: RefcountWidth) -> Self {
        let mut block = vec![0; geometry.cluster_size() as usize];
        width.set(&mut block, 0, 1);
        Self {
            geometry,
            width,
            per_block: width.entries(geometry.cluster_size()),
            next: 1,
            block,
            table: Vec::new(),
            homeless: Vec::new(),
        }
    }

    pub(super) const fn max(&self) -> u64 {
        self.width.max()
    }

    /// The first free cluster's offset.
    pub(super) const fn end(&self) -> u64 {
        self.next << self.geometry.cluster_bits()
    }

    /// The first cluster whose count can still be changed, as a host offset.
    pub(super) const fn open_from(&self) -> u64 {
        (self.table.len() as u64 * self.per_block) << self.geometry.cluster_bits()
    }

    /// Takes `count` clusters that follow each other, with refcount 1.
    pub(super) fn take(&mut self, count: u64) -> Result<HostOffset> {
        let first = self.next;
        let end = first.checked_add(count).filter(|end| end >> (56 - self.geometry.cluster_bits()) == 0);
        let Some(end) = end else {
            return Err(Error::new(Kind::Limit, "the image would need host offsets of more than 56 bits"));
        };
        while self.next < end {
            let base = self.table.len() as u64 * self.per_block;
            let until = end.min(base + self.per_block);
            for index in self.next..until {
                self.width.set(&mut self.block, (index - base) as usize, 1);
            }
            self.next = until;
            if until == base + self.per_block {
                let full = std::mem::replace(&mut self.block, vec![0; self.geometry.cluster_size() as usize]);
                self.homeless.push((self.table.len(), full));
                self.table.push(0);
            }
        }
        Ok(HostOffset(first << self.geometry.cluster_bits()))
    }

    /// One more reference to the cluster at `host`, which lies at or after [`open_from`](Self::open_from).
    pub(super) fn raise(&mut self, host: u64) -> Result<()> {
        let base = self.table.len() as u64 * self.per_block;
        (host >> self.geometry.cluster_bits())
            .checked_sub(base)
            .and_then(|index| {
                let count = self.width.get(&self.block, index as usize)?;
                self.width.set(&mut self.block, index as usize, count + 1).then_some(())
            })
            .ok_or_else(|| Error::invalid("a refcount cannot be raised any more"))
    }

    /// References to the cluster at `host`, or `None` if its block is full and gone.
    pub(super) fn get(&self, host: u64) -> Option<u64> {
        let base = self.table.len() as u64 * self.per_block;
        let index = (host >> self.geometry.cluster_bits()).checked_sub(base)?;
        self.width.get(&self.block, usize::try_from(index).ok()?)
    }

    /// Lays out an image that holds nothing as QEMU does: refcount table, one block, L1 table of `l1` clusters. Returns
    /// the places of the tables; `None` if something was taken before, or one block cannot count all of it.
    pub(super) fn lay_out_empty(
        &mut self,
        l1: u64,
        out: &mut Vec<WriteOp>,
    ) -> Result<Option<(HostOffset, HostOffset)>> {
        if self.next > 1 || l1 + 3 >= self.per_block {
            return Ok(None);
        }
        let (table_at, block_at, l1_at) = (self.take(1)?, self.take(1)?, self.take(l1)?);
        let mut table = vec![0; self.geometry.cluster_size() as usize];
        if let Some(first) = table.first_chunk_mut() {
            *first = block_at.get().to_be_bytes();
        }
        out.push(WriteOp::bytes(table_at.get(), table));
        out.push(WriteOp::bytes(block_at.get(), std::mem::take(&mut self.block)));
        Ok(Some((table_at, l1_at)))
    }

    /// Writes the full blocks that have no place yet.
    pub(super) fn settle(&mut self, out: &mut Vec<WriteOp>) -> Result<()> {
        // Taking a cluster can fill the next block, but each holds the counts of at least 64 clusters.
        while let Some((index, bytes)) = self.homeless.pop() {
            let at = self.take(1)?;
            if let Some(slot) = self.table.get_mut(index) {
                *slot = at.get();
            }
            out.push(WriteOp::bytes(at.get(), bytes));
        }
        Ok(())
    }

    /// Writes the last blocks and the table. Returns the table's place and its length in clusters.
    ///
    /// # Errors
    /// [`Kind::Limit`] if the table would take more than `limit` bytes.
    pub(super) fn finish(&mut self, out: &mut Vec<WriteOp>, limit: u64) -> Result<(HostOffset, u64)> {
        self.settle(out)?;
        let cluster_size = self.geometry.cluster_size();
        let table_clusters = |blocks: u64| (blocks * 8).div_ceil(cluster_size).max(1);
        // The last blocks count themselves and the table too.
        let placed = self.table.len() as u64;
        let mut blocks = placed + 1;
        while blocks * self.per_block < self.next + (blocks - placed) + table_clusters(blocks) {
            blocks += 1;
        }
        let clusters = table_clusters(blocks);
        if clusters * cluster_size > limit {
            return Err(Error::new(Kind::Limit, "the refcount table would be larger than QEMU accepts")
                .hint("a larger cluster_size or fewer refcount_bits help"));
        }
        let first = self.take(blocks - placed)?.get();
        let table_at = self.take(clusters)?;
        let full = std::mem::take(&mut self.homeless).into_iter().map(|(_, bytes)| bytes);
        let open = std::mem::take(&mut self.block);
        self.table.truncate(placed as usize);
        for (bytes, index) in full.chain([open]).zip(0..blocks - placed) {
            let place = first + index * cluster_size;
            self.table.push(place);
            out.push(WriteOp::bytes(place, bytes));
        }
        let mut bytes: Vec<u8> = self.table.iter().flat_map(|at| at.to_be_bytes()).collect();
        bytes.resize((clusters * cluster_size) as usize, 0);
        out.push(WriteOp::bytes(table_at.get(), bytes));
        Ok((table_at, clusters))
    }
}
