//! Changes of the header, and what the other version of the format needs before it can be named there.

use std::collections::HashSet;

use diskmill_format::qcow2::{Cluster, CryptMethod, Snapshot, feature};

use super::Qcow2Writer;
use super::meta::Meta;
use super::tables::{Entry, L1};
use crate::edit::KeySlotChange;
use crate::encrypted::LuksArea;
use crate::error::{Error, Result};

/// Bytes of extra data that each snapshot of version 3 has (specification, "Snapshots"), with the instruction count.
const SNAPSHOT_EXTRA: usize = 24;

impl Qcow2Writer {
    /// Makes the image one of version 3.
    pub(crate) fn upgrade(&self, snapshots: &[Snapshot]) -> Result<()> {
        let mut meta = self.meta();
        if meta.area.header.version >= 3 {
            return Ok(());
        }
        if snapshots.iter().any(|snapshot| snapshot.disk_size.is_none()) {
            // Version 2 cannot change the size where there are snapshots.
            let size = meta.area.header.size;
            let complete = |snapshot: &Snapshot| Snapshot {
                disk_size: snapshot.disk_size.or(Some(size)),
                extra: grown(&snapshot.extra),
                ..snapshot.clone()
            };
            let new: Vec<Snapshot> = snapshots.iter().map(complete).collect();
            meta.switch(|meta| meta.put_snapshots(snapshots, &new.iter().collect::<Vec<_>>()))?;
        }
        meta.rewrite_area(|area| area.header.version = 3)
    }

    /// Makes the image one of version 2.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) for what that version cannot say.
    pub(crate) fn downgrade(&self, snapshots: &[Snapshot]) -> Result<()> {
        let mut meta = self.meta();
        let header = &meta.area.header;
        if header.version < 3 {
            return Ok(());
        }
        let cannot = |what: &str| Err(Error::unsupported(format!("{what} in version 2 (compat=0.10)")));
        if header.has(feature::DATA_FILE) {
            return cannot("an external data file");
        }
        if header.incompatible != 0 {
            return cannot(&format!("what incompatible features {:#x} say", header.incompatible));
        }
        if self.encrypted {
            return cannot("an encrypted disk");
        }
        if header.refcount_width.bits() != 16 {
            return cannot("a refcount width other than 16 bits");
        }
        if meta.area.bitmap_directory().is_some() {
            return cannot("a persistent bitmap");
        }
        let fits = |snapshot: &Snapshot| {
            snapshot.disk_size.is_none_or(|size| size == header.size)
                && u32::try_from(snapshot.vm_state_size).is_ok()
        };
        if !snapshots.iter().all(fits) {
            return cannot("a snapshot of another size than the disk");
        }
        let mut tables = vec![meta.active()];
        for snapshot in snapshots {
            tables.push(meta.l1_of(snapshot)?);
        }
        meta.expand_zeros(&tables, self.backed)?;
        meta.rewrite_area(|area| {
            area.header.version = 2;
            (area.header.compatible, area.header.autoclear) = (0, 0);
            area.extensions.feature_names.clear();
            area.extensions.bitmaps = None;
        })
    }

    /// Adds or erases passphrases.
    pub(crate) fn change_keys(&self, change: &KeySlotChange) -> Result<()> {
        let meta = self.meta();
        let refuse = |message: &str| Err(Error::invalid(message));
        match (meta.area.header.crypt, meta.area.extensions.luks_header) {
            (CryptMethod::Luks, Some((at, len))) => {
                change.make(&meta.disk, LuksArea { file: &**meta.disk.storage(), at, len })
            }
            (CryptMethod::Aes, _) => refuse("Only LUKS encryption options can be amended"),
            _ => refuse("Can't amend encryption options - encryption not present"),
        }
    }

    /// Lets QEMU postpone updates of refcounts, or not.
    pub(crate) fn set_lazy_refcounts(&self, lazy: bool) -> Result<()> {
        let mut meta = self.meta();
        if meta.area.header.version < 3 {
            return if lazy {
                Err(Error::invalid("lazy refcounts need version 3").hint("compat=1.1"))
            } else {
                Ok(())
            };
        }
        meta.put_header(|header| {
            header.compatible &= !feature::LAZY_REFCOUNTS;
            header.compatible |= if lazy { feature::LAZY_REFCOUNTS } else { 0 };
        })
    }

    /// Gives up that the external data file is a valid raw image.
    pub(crate) fn set_raw_data(&self, raw: bool) -> Result<()> {
        let mut meta = self.meta();
        let is_raw = meta.area.header.autoclear & feature::RAW_DATA_FILE != 0;
        match (is_raw, raw) {
            (false, true) => Err(Error::invalid("data_file_raw=on is for fresh images only")),
            (true, false) => meta.put_header(|header| header.autoclear &= !feature::RAW_DATA_FILE),
            _ => Ok(()),
        }
    }

    /// Names another external data file; none in the image if `name` is empty.
    pub(crate) fn set_data_file(&self, name: &str) -> Result<()> {
        let mut meta = self.meta();
        if !self.external {
            return Err(Error::invalid("data_file is for images that have an external data file"));
        }
        let name = (!name.is_empty()).then(|| name.as_bytes().to_vec());
        meta.rewrite_area(|area| area.extensions.data_file = name)
    }
}

fn grown(extra: &[u8]) -> Vec<u8> {
    let mut extra = extra.to_vec();
    if extra.len() < SNAPSHOT_EXTRA {
        extra.resize(SNAPSHOT_EXTRA, 0);
    }
    extra
}

impl Meta {
    /// Replaces zero clusters, which version 2 does not know, by unallocated ones, or over a backing file by clusters that
    /// hold zeros, in all L2 tables that `l1s` refer to.
    fn expand_zeros(&mut self, l1s: &[L1], backed: bool) -> Result<()> {
        let mut seen = HashSet::new();
        for &l1 in l1s {
            for index in 0..u64::from(l1.entries) {
                let Some(table) = self.l1_entry(l1, index)? else { continue };
                if seen.insert(table.host) {
                    self.expand_table(table.host, backed)?;
                    self.relieve()?;
                }
            }
        }
        Ok(())
    }

    /// The same in one L2 table. Whoever shares the table sees the same, so it may change in its place.
    fn expand_table(&mut self, table: u64, backed: bool) -> Result<()> {
        let (bits, size) = (self.geometry.cluster_bits(), self.cluster_size());
        let sharers = self.count_later(table >> bits)?;
        for index in 0..self.geometry.l2_entries() {
            let old = self.l2_entry(table, index)?;
            let Cluster::Zero(kept) = old.cluster else { continue };
            let new = match kept {
                None if !backed => Entry::NONE,
                // Nobody but this entry has it.
                Some(host) if self.count_later(host.get() >> bits)? == sharers => {
                    self.disk.zero(host.get(), size, true)?;
                    Entry { cluster: Cluster::Standard(host), ..old }
                }
                _ => {
                    let run = self.allocate(1)?;
                    if !run.zeroed {
                        self.disk.zero(run.host, size, true)?;
                    }
                    self.set_count(run.host >> bits, sharers)?;
                    let host = diskmill_format::HostOffset(run.host);
                    Entry { cluster: Cluster::Standard(host), copied: sharers == 1 }
                }
            };
            self.set_l2_entry(table, index, new)?;
            if let Some(host) = kept.filter(|&host| new.cluster_host() != Some(host)) {
                (0..sharers).try_for_each(|_| self.lower(host.get()))?;
            }
        }
        Ok(())
    }
}
