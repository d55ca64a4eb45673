use diskmill_format::HostOffset;
use diskmill_format::qcow2::{Snapshot, feature, parse_snapshots};

use super::{Finding, Pass};
use crate::error::Result;
use crate::qcow2::lossy;

/// A table of L2 tables.
pub(super) struct Root {
    pub(super) offset: u64,
    pub(super) entries: u64,
    pub(super) active: bool,
    /// How often something refers to it.
    pub(super) times: u64,
}

impl Pass<'_> {
    /// Reads the snapshot table. Gives the L1 tables to follow, the active one first, and the bytes of the table.
    pub(super) fn roots(&mut self) -> Result<(Vec<Root>, u64)> {
        let (snapshots, len) = self.snapshot_table()?;
        if self.header.version >= 3 {
            for (index, _) in (0..).zip(&snapshots).filter(|(_, snapshot)| snapshot.disk_size.is_none()) {
                self.error(&Finding::SnapshotIncomplete { index }, 1);
            }
        }
        if self.header.has(feature::DATA_FILE) && !snapshots.is_empty() {
            self.error(&Finding::SnapshotsExternal { count: self.header.snapshots }, 1);
        }
        let active = Root {
            offset: self.header.l1_offset.get(),
            entries: u64::from(self.header.l1_size),
            active: true,
            times: 1,
        };
        let mut roots = vec![active];
        // Where each table stands in `roots`: snapshots that share one are followed together.
        let mut seen = std::collections::HashMap::new();
        for snapshot in &snapshots {
            let (offset, entries) = (snapshot.l1_offset.get(), snapshot.l1_size);
            let (id, name) = (lossy(&snapshot.id), lossy(&snapshot.name));
            if !offset.is_multiple_of(self.cluster_size()) {
                self.lost = true;
                self.error(&Finding::SnapshotL1Misaligned { id, name, offset }, 1);
            } else if u64::from(entries) * 8 > self.limits.qcow2_l1_bytes {
                self.lost = true;
                self.error(&Finding::SnapshotL1TooLarge { id, name, entries }, 1);
            } else {
                let at = *seen.entry((offset, entries)).or_insert(roots.len());
                match roots.get_mut(at) {
                    Some(root) => root.times += 1,
                    None => roots.push(Root { offset, entries: u64::from(entries), active: false, times: 1 }),
                }
            }
        }
        Ok((roots, len))
    }

    fn snapshot_table(&self) -> Result<(Vec<Snapshot>, u64)> {
        if self.header.snapshots == 0 {
            return Ok((Vec::new(), 0));
        }
        let at = self.header.snapshots_offset.get();
        let mut window: u64 = 64 << 10;
        loop {
            // The table's length stands nowhere: read more until it parses. Past the end of the file are zeros.
            let mut bytes = vec![0; window as usize];
            self.disk.read(&mut bytes, at)?;
            match parse_snapshots(&bytes, self.header.snapshots, HostOffset(at), self.limits) {
                Ok((snapshots, len)) => return Ok((snapshots, len as u64)),
                Err(error) if window >= self.limits.qcow2_snapshot_table_bytes => return Err(error.into()),
                Err(_) => window = window.saturating_mul(4).min(self.limits.qcow2_snapshot_table_bytes),
            }
        }
    }
}
