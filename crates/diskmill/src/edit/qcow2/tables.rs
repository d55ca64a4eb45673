//! L1 and L2 tables.

use diskmill_format::HostOffset;
use diskmill_format::qcow2::{Cluster, L1Entry};

use super::cache::Class;
use super::meta::Meta;
use crate::error::{Error, Kind, Result};
use crate::tables::SLICE;

/// An L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) cluster: Cluster,
    /// The host cluster has refcount 1: it may be written in place.
    pub(super) copied: bool,
}

impl Entry {
    pub(super) const NONE: Self = Self { cluster: Cluster::Unallocated, copied: false };
}

/// An L1 table: that of the active state, or of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct L1 {
    pub(super) offset: u64,
    pub(super) entries: u32,
}

/// An entry of an L1 table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    pub(super) host: u64,
    /// It has refcount 1: it may be changed in place.
    pub(super) copied: bool,
}

const COPIED: u64 = 1 << 63;

impl Meta {
    /// The L1 table of the active state.
    pub(super) fn active(&self) -> L1 {
        L1 { offset: self.area.header.l1_offset.get(), entries: self.area.header.l1_size }
    }

    /// Offset and length of the slice in which entry `index` stands, and its offset there.
    fn l1_place(l1: L1, index: u64) -> Option<(u64, u64, usize)> {
        let whole = u64::from(l1.entries) * 8;
        let byte = index.checked_mul(8).filter(|&byte| byte < whole)?;
        let start = byte / SLICE * SLICE;
        Some((l1.offset.checked_add(start)?, SLICE.min(whole - start), (byte - start) as usize))
    }

    /// Entry `index` of an L1 table; `None` if there is no L2 table, or the table has no such entry.
    pub(super) fn l1_entry(&mut self, l1: L1, index: u64) -> Result<Option<Table>> {
        let Some((at, len, byte)) = Self::l1_place(l1, index) else { return Ok(None) };
        let within = |error: Error| error.within(format!("L1 table, entry {index}"), at + byte as u64);
        let bytes = self.cache.get(&self.disk, at, len, Class::Mapping).map_err(within)?;
        let raw = bytes.get(byte..).and_then(|rest| rest.first_chunk::<8>());
        let raw = raw.map_or(0, |raw| u64::from_be_bytes(*raw));
        match L1Entry::decode(raw, self.geometry) {
            Ok(L1Entry::Unallocated) => Ok(None),
            Ok(L1Entry::Table(host)) => Ok(Some(Table { host: host.get(), copied: raw & COPIED != 0 })),
            Err(why) => Err(within(Error::new(Kind::Corrupt, why))),
        }
    }

    /// Sets entry `index` of an L1 table.
    pub(super) fn set_l1_entry(&mut self, l1: L1, index: u64, table: Option<Table>) -> Result<()> {
        let Some((at, len, byte)) = Self::l1_place(l1, index) else {
            return Err(Error::invalid("the L1 table is too small"));
        };
        let raw = table.map_or(0, |table| table.host | if table.copied { COPIED } else { 0 });
        let bytes = self.cache.modify(&self.disk, at, len, Class::Mapping, byte..byte + 8)?;
        if let Some(slot) = bytes.get_mut(byte..byte + 8) {
            slot.copy_from_slice(&raw.to_be_bytes());
        }
        Ok(())
    }

    /// Where entry `index` of the L2 table at `table` stands: offset of the slice and index in it.
    fn l2_place(&self, table: u64, index: u64) -> (u64, usize) {
        let per_slice = self.slice_size() / self.geometry.l2_entry_size() as u64;
        (table + index / per_slice * self.slice_size(), (index % per_slice) as usize)
    }

    /// Entry `index` of the L2 table at `table`.
    pub(super) fn l2_entry(&mut self, table: u64, index: u64) -> Result<Entry> {
        let (at, slot) = self.l2_place(table, index);
        let within = |error: Error| error.within(format!("L2 table, entry {index}"), at);
        let bytes = self.cache.get(&self.disk, at, self.slice_size(), Class::Mapping).map_err(within)?;
        let cluster = self.entries.decode(&bytes, slot);
        let cluster = cluster.map_err(|why| within(Error::new(Kind::Corrupt, why)))?;
        Ok(Entry { cluster, copied: self.entries.is_copied(&bytes, slot) })
    }

    /// Sets entry `index` of the L2 table at `table`, which the caller may change.
    pub(super) fn set_l2_entry(&mut self, table: u64, index: u64, entry: Entry) -> Result<()> {
        let (at, slot) = self.l2_place(table, index);
        let size = self.geometry.l2_entry_size();
        let range = slot * size..(slot + 1) * size;
        let (codec, len) = (self.entries, self.slice_size());
        let bytes = self.cache.modify(&self.disk, at, len, Class::Mapping, range)?;
        if !codec.set(bytes, slot, entry.cluster, entry.copied) {
            return Err(Error::invalid("an L2 entry that this image cannot have"));
        }
        Ok(())
    }

    /// Sets or clears the copied bit alone.
    pub(super) fn set_l2_copied(&mut self, table: u64, index: u64, copied: bool) -> Result<()> {
        let (at, slot) = self.l2_place(table, index);
        let size = self.geometry.l2_entry_size();
        let (codec, len) = (self.entries, self.slice_size());
        let bytes = self.cache.modify(&self.disk, at, len, Class::Mapping, slot * size..(slot + 1) * size)?;
        codec.set_copied(bytes, slot, copied);
        Ok(())
    }

    /// What the active state has at guest offset `guest`.
    pub(super) fn entry(&mut self, guest: u64) -> Result<Entry> {
        match self.l1_entry(self.active(), self.geometry.l1_index(guest))? {
            None => Ok(Entry::NONE),
            Some(table) => self.l2_entry(table.host, self.geometry.l2_index(guest)),
        }
    }

    /// Sets what the active state has at guest offset `guest`, in an L2 table of its own.
    pub(super) fn set_entry(&mut self, guest: u64, entry: Entry) -> Result<()> {
        let table = self.own_table(self.geometry.l1_index(guest))?;
        self.set_l2_entry(table, self.geometry.l2_index(guest), entry)
    }

    /// Puts `new` in the place of `old` at guest offset `guest`, and gives up what that had.
    pub(super) fn replace(&mut self, guest: u64, old: Entry, new: Entry) -> Result<()> {
        self.set_entry(guest, new)?;
        self.release_replaced(old, new)
    }

    /// Gives up what `old` had, in whose place `new` is now.
    pub(super) fn release_replaced(&mut self, old: Entry, new: Entry) -> Result<()> {
        // Compressed payloads always go: no entry takes one over.
        let stays = old.cluster_host().is_some_and(|host| new.cluster_host() == Some(host));
        if stays { Ok(()) } else { self.release(old) }
    }

    /// As [`replace`](Self::replace), whatever stands there.
    pub(super) fn exchange(&mut self, guest: u64, new: Entry) -> Result<()> {
        let old = self.entry(guest)?;
        self.replace(guest, old, new)
    }

    /// The L2 table of entry `index` of the active L1 table. Made if there is none, copied if a snapshot has it too.
    fn own_table(&mut self, index: u64) -> Result<u64> {
        let old = self.l1_entry(self.active(), index)?;
        if let Some(table) = old.filter(|table| table.copied) {
            return Ok(table.host);
        }
        let bytes = match old {
            Some(table) => self.whole(table.host, Class::Mapping)?,
            None => vec![0; self.cluster_size() as usize],
        };
        let host = self.allocate(1)?.host;
        let placed = self.put_fresh(host, &bytes, Class::Mapping);
        let shown = Some(Table { host, copied: true });
        if let Err(error) = placed.and_then(|()| self.set_l1_entry(self.active(), index, shown)) {
            // At worst the cluster is leaked.
            let _ = self.lower(host);
            return Err(error);
        }
        if let Some(table) = old {
            self.lower(table.host)?;
        }
        Ok(host)
    }

    /// Gives up the host clusters of an entry that is no longer there.
    pub(super) fn release(&mut self, entry: Entry) -> Result<()> {
        if self.data.is_some() {
            // Clusters of an external data file are not counted.
            return Ok(());
        }
        match entry.cluster {
            Cluster::Unallocated | Cluster::Zero(None) | Cluster::Subclusters { host: None, .. } => Ok(()),
            Cluster::Standard(host)
            | Cluster::Zero(Some(host))
            | Cluster::Subclusters { host: Some(host), .. } => {
                if !entry.copied && self.is_shared_within(host)? {
                    return Ok(());
                }
                self.lower(host.get())
            }
            Cluster::Compressed(payload) => {
                let size = self.cluster_size();
                let end = payload.host.get().saturating_add(payload.len.into());
                let first = payload.host.get() / size * size;
                (first..end).step_by(size as usize).try_for_each(|host| self.lower(host))
            }
        }
    }

    /// Whether the other reference to the cluster at `host` is another entry of the active state, as no snapshot can
    /// hold it. Its copied bit is clear and would be wrong if the refcount fell to 1: the cluster stays counted twice,
    /// which wastes it at worst.
    fn is_shared_within(&mut self, host: HostOffset) -> Result<bool> {
        let cluster = host.get() >> self.geometry.cluster_bits();
        Ok(self.area.header.snapshots == 0 && self.count_later(cluster)? == 2)
    }
}
