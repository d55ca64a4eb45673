//! Internal snapshots.
//!
//! Each of these changes many refcounts, L2 entries and tables. They are made in a [switch](Meta::switch): beside the
//! old ones, to be made visible all at once by one write of the header.

use diskmill_format::HostOffset;
use diskmill_format::qcow2::{Cluster, Snapshot};

use super::Qcow2Writer;
use super::cache::Class;
use super::meta::Meta;
use super::tables::{L1, Table};
use crate::error::{Error, Kind, Result};
use crate::tables::SLICE;

impl Qcow2Writer {
    /// Adds `snapshot` of the active state: its L1 table and size are filled in. `all` are those that there are.
    pub(crate) fn create_snapshot(&self, all: &[Snapshot], snapshot: Snapshot) -> Result<()> {
        let mut meta = self.meta();
        if all.len() as u64 >= u64::from(meta.limits.qcow2_snapshots) {
            return Err(Error::new(Kind::Limit, format!("the image has {} snapshots already", all.len())));
        }
        meta.refuse_external_data()?;
        meta.switch(|meta| {
            let active = meta.active();
            let (own, new) = (meta.take_l1(active.entries)?, meta.take_l1(active.entries)?);
            for index in 0..u64::from(active.entries) {
                let Some(table) = meta.l1_entry(active, index)? else { continue };
                let host = meta.share_table(table.host)?;
                for l1 in [own, new] {
                    meta.set_l1_entry(l1, index, Some(Table { host, copied: false }))?;
                }
                meta.spill()?;
            }
            meta.free_l1(active)?;
            meta.set_active(new);
            let snapshot = Snapshot {
                l1_offset: HostOffset(own.offset),
                l1_size: own.entries,
                disk_size: Some(meta.area.header.size),
                ..snapshot
            };
            let new: Vec<&Snapshot> = all.iter().chain([&snapshot]).collect();
            meta.put_snapshots(all, &new)
        })
    }

    /// Deletes number `index` of `all` snapshots.
    pub(crate) fn delete_snapshot(&self, all: &[Snapshot], index: usize) -> Result<()> {
        let mut meta = self.meta();
        let Some(snapshot) = all.get(index) else { return Err(Error::invalid("no such snapshot")) };
        meta.refuse_external_data()?;
        let l1 = meta.l1_of(snapshot)?;
        meta.switch(|meta| {
            meta.change_references(l1, -1)?;
            meta.free_l1(l1)?;
            let active = meta.active();
            let new = meta.copy_l1(active, active.entries)?;
            meta.free_l1(active)?;
            meta.set_active(new);
            meta.correct_copied(new)?;
            let left: Vec<&Snapshot> = all
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != index)
                .map(|(_, snapshot)| snapshot)
                .collect();
            meta.put_snapshots(all, &left)
        })
    }

    /// Makes `snapshot` the active state; what was active is lost.
    pub(crate) fn apply_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let mut meta = self.meta();
        meta.refuse_external_data()?;
        let l1 = meta.l1_of(snapshot)?;
        let size = snapshot.disk_size.unwrap_or(meta.area.header.size);
        if u64::from(l1.entries) < meta.geometry.l1_entries(size) || size > i64::MAX as u64 {
            return Err(Error::corrupt("snapshot table", None, "the L1 table of the snapshot is too small"));
        }
        meta.switch(|meta| {
            // First more references, then fewer: what both have never seems free.
            meta.change_references(l1, 1)?;
            let active = meta.active();
            meta.change_references(active, -1)?;
            let new = meta.copy_l1(l1, l1.entries)?;
            meta.free_l1(active)?;
            meta.set_active(new);
            meta.correct_copied(new)?;
            meta.area.header.size = size;
            Ok(())
        })
    }
}

impl Meta {
    fn refuse_external_data(&self) -> Result<()> {
        match self.data {
            // They are not counted, so none of them can be shared.
            Some(_) => Err(Error::unsupported("a snapshot of an image with an external data file")),
            None => Ok(()),
        }
    }

    pub(super) fn l1_of(&self, snapshot: &Snapshot) -> Result<L1> {
        let l1 = L1 { offset: snapshot.l1_offset.get(), entries: snapshot.l1_size };
        let aligned = l1.offset.is_multiple_of(self.cluster_size()) && l1.offset >> 56 == 0;
        if !aligned || u64::from(l1.entries) * 8 > self.limits.qcow2_l1_bytes {
            return Err(Error::corrupt(
                "snapshot table",
                Some(l1.offset),
                "the L1 table of the snapshot is misaligned or too large",
            ));
        }
        Ok(l1)
    }

    pub(super) fn set_active(&mut self, l1: L1) {
        self.area.header.l1_offset = HostOffset(l1.offset);
        self.area.header.l1_size = l1.entries;
    }

    pub(super) fn l1_clusters(&self, l1: L1) -> std::ops::Range<u64> {
        let first = l1.offset >> self.geometry.cluster_bits();
        first..first + (u64::from(l1.entries) * 8).div_ceil(self.cluster_size())
    }

    /// A new L1 table without entries, behind all that the file has.
    pub(super) fn take_l1(&mut self, entries: u32) -> Result<L1> {
        let bytes = u64::from(entries) * 8;
        let clusters = bytes.div_ceil(self.cluster_size());
        let offset = match clusters {
            // A disk of 0 bytes. The table stands nowhere.
            0 => self.active().offset,
            clusters => self.take_behind_all(clusters)?.host,
        };
        for start in (0..bytes).step_by(SLICE as usize) {
            let zeros = vec![0; SLICE.min(bytes - start) as usize];
            self.cache.put(offset + start, zeros.into(), Class::Mapping);
        }
        Ok(L1 { offset, entries })
    }

    /// A copy of `l1` behind all that the file has, with at least as many `entries`. The references of its entries are
    /// not counted by this.
    pub(super) fn copy_l1(&mut self, l1: L1, entries: u32) -> Result<L1> {
        let new = self.take_l1(entries)?;
        for index in 0..u64::from(l1.entries) {
            if let Some(table) = self.l1_entry(l1, index)? {
                self.set_l1_entry(new, index, Some(table))?;
            }
        }
        Ok(new)
    }

    /// Gives up the clusters of an L1 table, but not what it refers to.
    pub(super) fn free_l1(&mut self, l1: L1) -> Result<()> {
        self.l1_clusters(l1).try_for_each(|cluster| self.change_count(cluster, -1))
    }

    /// One more L1 table refers to the L2 table at `host`, which so cannot be changed in place any more, and neither can
    /// its clusters. Returns where the table is now: its copied bits have to go.
    fn share_table(&mut self, host: u64) -> Result<u64> {
        self.change_table_references(host, 1)?;
        let cluster = host >> self.geometry.cluster_bits();
        let copied: Vec<u64> = (0..self.geometry.l2_entries())
            .filter_map(|index| match self.l2_entry(host, index) {
                Ok(entry) => entry.copied.then_some(Ok(index)),
                Err(error) => Some(Err(error)),
            })
            .collect::<Result<_>>()?;
        if copied.is_empty() {
            self.change_count(cluster, 1)?;
            return Ok(host);
        }
        let new = self.relocate_table(host)?;
        for index in copied {
            self.set_l2_copied(new, index, false)?;
        }
        self.change_count(new >> self.geometry.cluster_bits(), 1)?;
        Ok(new)
    }

    /// Copies the L2 table at `host` and gives up a reference to the old one.
    fn relocate_table(&mut self, host: u64) -> Result<u64> {
        let bytes = self.whole(host, Class::Mapping)?;
        let new = self.take_behind_all(1)?.host;
        self.put_fresh(new, &bytes, Class::Mapping)?;
        self.change_count(host >> self.geometry.cluster_bits(), -1)?;
        Ok(new)
    }

    /// Adds `by` to the refcounts of all that an L1 table refers to, L2 tables and clusters.
    pub(super) fn change_references(&mut self, l1: L1, by: i64) -> Result<()> {
        for index in 0..u64::from(l1.entries) {
            if let Some(table) = self.l1_entry(l1, index)? {
                self.change_table_references(table.host, by)?;
                self.change_count(table.host >> self.geometry.cluster_bits(), by)?;
                self.spill()?;
            }
        }
        Ok(())
    }

    /// Adds `by` to the refcounts of all clusters that an L2 table refers to.
    fn change_table_references(&mut self, table: u64, by: i64) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        for index in 0..self.geometry.l2_entries() {
            let (host, len) = match self.l2_entry(table, index)?.cluster {
                Cluster::Compressed(payload) => (payload.host.get(), u64::from(payload.len)),
                Cluster::Standard(host)
                | Cluster::Zero(Some(host))
                | Cluster::Subclusters { host: Some(host), .. } => (host.get(), 1),
                Cluster::Unallocated | Cluster::Zero(None) | Cluster::Subclusters { host: None, .. } => {
                    continue;
                }
            };
            let end = host.saturating_add(len).div_ceil(self.cluster_size());
            (host >> bits..end).try_for_each(|cluster| self.change_count(cluster, by))?;
        }
        Ok(())
    }

    /// Makes the copied bits right of all that the active L1 table `l1` refers to, after refcounts have changed. The L1
    /// table itself is new; L2 tables that have to change are copied.
    fn correct_copied(&mut self, l1: L1) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        for index in 0..u64::from(l1.entries) {
            let Some(Table { mut host, .. }) = self.l1_entry(l1, index)? else { continue };
            let mut fresh = self.is_fresh(host);
            for entry_index in 0..self.geometry.l2_entries() {
                let entry = self.l2_entry(host, entry_index)?;
                let Some(data) = entry.cluster_host() else { continue };
                let copied = self.count(data.get() >> bits)? == 1;
                if copied == entry.copied {
                    continue;
                }
                if !fresh {
                    host = self.relocate_table(host)?;
                    fresh = true;
                }
                self.set_l2_copied(host, entry_index, copied)?;
            }
            let copied = self.count(host >> bits)? == 1;
            self.set_l1_entry(l1, index, Some(Table { host, copied }))?;
            self.spill()?;
        }
        Ok(())
    }

    /// Replaces the snapshot table, which holds `old`.
    pub(super) fn put_snapshots(&mut self, old: &[Snapshot], new: &[&Snapshot]) -> Result<()> {
        let old_len = old
            .iter()
            .try_fold(0, |len, snapshot| Ok::<u64, Error>(len + snapshot.encode()?.len() as u64))?;
        let first = self.area.header.snapshots_offset.get() >> self.geometry.cluster_bits();
        (first..first + old_len.div_ceil(self.cluster_size()))
            .try_for_each(|cluster| self.change_count(cluster, -1))?;
        let mut bytes = Vec::new();
        for snapshot in new {
            bytes.extend(snapshot.encode()?);
        }
        let len = bytes.len() as u64;
        if len > self.limits.qcow2_snapshot_table_bytes {
            return Err(Error::new(Kind::Limit, format!("a snapshot table of {len} bytes")));
        }
        let offset = match len.div_ceil(self.cluster_size()) {
            0 => 0,
            clusters => self.take_behind_all(clusters)?.host,
        };
        bytes.resize(len.next_multiple_of(self.cluster_size()) as usize, 0);
        self.disk.write(&bytes, offset)?;
        self.area.header.snapshots = new.len() as u32;
        self.area.header.snapshots_offset = HostOffset(offset);
        Ok(())
    }
}
