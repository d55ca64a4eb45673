use diskmill_format::qcow2::{Snapshot, feature, parse_snapshots};
use diskmill_format::{HostOffset, Limits};

use super::{Finding, Pass, Repair};
use crate::error::{Error, Result};
use crate::qcow2::lossy;

/// Where the header has the number of snapshots (4 bytes) and the offset of their table (8 bytes): in one sector, so that
/// they change together (specification, "Header").
const TABLE_FIELDS: u64 = 60;
/// Bytes of an entry that every one has, and where the length of its extra data stands among them.
const FIXED: usize = 40;
const EXTRA_LEN: usize = 36;
/// Extra data that version 3 demands: size of the VM state, size of the disk.
const LEAST_EXTRA: usize = 16;
/// Lengths of extra data that QEMU writes, or wrote: what an impossible length may have been.
const USUAL_EXTRA: [u32; 2] = [24, 16];

/// A table of L2 tables.
pub(super) struct Root {
    pub(super) offset: u64,
    pub(super) entries: u64,
    pub(super) active: bool,
    /// How often something refers to it.
    pub(super) times: u64,
}

/// The snapshot table as it stands in the file.
#[derive(Default)]
struct Table {
    snapshots: Vec<Snapshot>,
    /// Bytes in the file.
    len: u64,
    /// Something must be written anew: entries are not as they stand in the file.
    mended: bool,
}

/// A snapshot table that is to take the place of the old one.
pub(super) struct NewTable {
    snapshots: Vec<Snapshot>,
    /// Clusters of the old one.
    old: std::ops::Range<u64>,
}

impl Pass<'_> {
    /// Reads the snapshot table. Gives the L1 tables to follow, the active one first, and the bytes of the table.
    pub(super) fn roots(&mut self) -> Result<(Vec<Root>, u64)> {
        let Table { mut snapshots, len, mut mended } = self.snapshot_table()?;
        if self.header.version >= 3 {
            let size = self.header.size;
            for (index, snapshot) in (0..).zip(&mut snapshots) {
                if snapshot.disk_size.is_some() {
                    continue;
                }
                let finding = Finding::SnapshotIncomplete { index };
                if self.repair == Repair::All && !is_empty(snapshot) {
                    // QEMU, too, takes the present size for a disk that could not be resized.
                    snapshot.disk_size = Some(size);
                    snapshot.extra.resize(LEAST_EXTRA, 0);
                    mended = true;
                    self.repaired(&finding);
                } else {
                    self.error(&finding, 1);
                }
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
        if mended {
            let first = self.cluster_of(self.header.snapshots_offset.get());
            let old = first..first + len.div_ceil(self.cluster_size());
            self.new_snapshots = Some(NewTable { snapshots, old });
        }
        Ok((roots, len))
    }

    fn snapshot_table(&mut self) -> Result<Table> {
        let (count, at) = (self.header.snapshots, self.header.snapshots_offset.get());
        if count == 0 {
            return Ok(Table::default());
        }
        let largest = self.limits.qcow2_snapshot_table_bytes;
        let mut window: u64 = 64 << 10;
        loop {
            // The table's length stands nowhere: read more until it parses. Past the end of the file are zeros.
            let mut bytes = vec![0; window as usize];
            self.disk.read(&mut bytes, at)?;
            let parsed = match parse_snapshots(&bytes, count, HostOffset(at), self.limits) {
                Ok((snapshots, len)) => Ok(Table { snapshots, len: len as u64, mended: false }),
                Err(error) => Err(error.into()),
            };
            // A table past the end of the file is not lost if the file is put right by other means.
            if self.repair == Repair::All && at < self.disk.len() {
                let version = self.header.version;
                let doubtful = |snapshot: &Snapshot| {
                    is_empty(snapshot) || (version >= 3 && snapshot.disk_size.is_none())
                };
                let sound = matches!(&parsed, Ok(table) if !table.snapshots.iter().any(doubtful));
                if !sound && let Some(table) = self.mend(&bytes, count, window == largest)? {
                    return Ok(table);
                }
            }
            match parsed {
                Ok(table) => return Ok(table),
                Err(error) if window >= largest => return Err(error),
                Err(_) => window = window.saturating_mul(4).min(largest),
            }
        }
    }

    /// What can be read of a damaged table, without extra data beyond the limit and without what follows an entry of zeros:
    /// that refers to nothing, and writers leave none out. `None` if `bytes` has not all of it.
    fn mend(&mut self, bytes: &[u8], count: u32, is_all: bool) -> Result<Option<Table>> {
        let most = self.limits.qcow2_snapshot_extra_bytes;
        let mut table = Table::default();
        let mut found = Vec::new();
        let mut at = 0;
        for index in 0..u64::from(count) {
            let rest = bytes.get(at..).unwrap_or_default();
            let Some(fixed) = rest.first_chunk::<FIXED>() else { return self.cut(index, is_all) };
            if *fixed == [0; FIXED] {
                found.push(Finding::SnapshotsEmpty { index, count: u64::from(count) - index });
                break;
            }
            if index >= u64::from(self.limits.qcow2_snapshots) {
                return self.cut(index, true);
            }
            let told = fixed.last_chunk::<4>().map_or(0, |len| u32::from_be_bytes(*len));
            let short = self.header.version >= 3 && (told as usize) < LEAST_EXTRA;
            let as_told = entry(rest, None);
            let read = if told <= most && !short {
                as_told
            } else {
                let is_last = index + 1 == u64::from(count);
                let found = readings(rest)
                    .find(|(snapshot, len)| self.is_plausible(snapshot) && self.goes_on(rest, *len, is_last));
                found.or(if short { as_told } else { None })
            };
            let Some((mut snapshot, len)) = read else { return self.cut(index, is_all) };
            if told > most {
                found.push(Finding::SnapshotExtra { index, bytes: told });
                snapshot.extra.truncate(most as usize);
            } else if short && snapshot.disk_size.is_some() {
                found.push(Finding::SnapshotIncomplete { index });
            }
            table.snapshots.push(snapshot);
            at += len;
        }
        table.len = at as u64;
        table.mended = !found.is_empty();
        for finding in found {
            // What looks like a leak may be what a lost entry referred to.
            self.lost |= matches!(finding, Finding::SnapshotsEmpty { .. });
            self.repaired(&finding);
        }
        Ok(Some(table))
    }

    /// Entry `index` cannot be read: it may need more bytes, unless these are all.
    fn cut(&self, index: u64, is_all: bool) -> Result<Option<Table>> {
        if !is_all {
            return Ok(None);
        }
        let at = self.header.snapshots_offset.get();
        let why = "it cannot be told where it ends, so that the snapshots behind it would be lost";
        Err(Error::corrupt(format!("snapshot table, entry {index}"), Some(at), why))
    }

    /// Whether this may be a snapshot: with an id, as all have, and an L1 table within the file.
    fn is_plausible(&self, snapshot: &Snapshot) -> bool {
        let at = snapshot.l1_offset.get();
        !snapshot.id.is_empty()
            && snapshot.id.iter().all(u8::is_ascii_graphic)
            && at != 0
            && at < self.disk.len()
            && at.is_multiple_of(self.cluster_size())
    }

    /// Whether after `len` bytes of `rest` there is the end of the table, or something that may be an entry.
    fn goes_on(&self, rest: &[u8], len: usize, is_last: bool) -> bool {
        let rest = rest.get(len..).unwrap_or_default();
        is_last
            || rest.first_chunk::<FIXED>() == Some(&[0; FIXED])
            || readings(rest).any(|(next, _)| self.is_plausible(&next))
    }

    /// Writes the mended snapshot table to free clusters, and then makes the header point to them. Refcounts must be right
    /// by now. A crash leaves the old table or the new one, and leaks at worst.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) if the refcount blocks have no free clusters in a row.
    pub(super) fn write_snapshots(&mut self) -> Result<()> {
        let Some(NewTable { snapshots, old }) = self.new_snapshots.take() else { return Ok(()) };
        let cluster = self.cluster_size();
        let mut bytes = Vec::new();
        for snapshot in &snapshots {
            bytes.extend(snapshot.encode()?);
        }
        let clusters = (bytes.len() as u64).div_ceil(cluster);
        let first = if clusters == 0 { 0 } else { self.free_run(clusters)? };
        bytes.resize((clusters * cluster) as usize, 0);
        self.disk.write(&bytes, first * cluster)?;
        for cluster in first..first + clusters {
            self.put_refcount(cluster, 1)?;
        }
        self.disk.barrier()?;
        // No more than there were.
        let mut fields = (snapshots.len() as u32).to_be_bytes().to_vec();
        fields.extend((first * cluster).to_be_bytes());
        self.disk.write(&fields, TABLE_FIELDS)?;
        self.disk.barrier()?;
        for cluster in old {
            // Something else may lie on it, too.
            if let Some(count @ 1..) = self.refcount(cluster)? {
                self.put_refcount(cluster, count - 1)?;
            }
        }
        self.disk.barrier()
    }
}

/// Whether an entry says nothing of a snapshot.
fn is_empty(snapshot: &Snapshot) -> bool {
    snapshot.l1_size == 0 && snapshot.id.is_empty()
}

/// The entry that `bytes` begins with, as it stands there and with extra data of each usual length.
fn readings(bytes: &[u8]) -> impl Iterator<Item = (Snapshot, usize)> {
    let usual = USUAL_EXTRA.into_iter().map(Some);
    [None].into_iter().chain(usual).filter_map(|extra| entry(bytes, extra))
}

/// The entry that `bytes` begins with, and how long it is there; with extra data of this length instead of its own.
fn entry(bytes: &[u8], extra: Option<u32>) -> Option<(Snapshot, usize)> {
    /// The longest entry with extra data of a usual length.
    const LONGEST: usize = FIXED + 24 + 2 * 65_535 + 7;
    let mut limits = Limits::default();
    limits.qcow2_snapshot_extra_bytes = u32::MAX;
    let parse = |bytes: &[u8]| parse_snapshots(bytes, 1, HostOffset(0), &limits).ok();
    let (snapshots, len) = match extra {
        None => parse(bytes)?,
        Some(extra) => {
            let mut bytes = bytes.get(..bytes.len().min(LONGEST))?.to_vec();
            bytes.get_mut(EXTRA_LEN..FIXED)?.copy_from_slice(&extra.to_be_bytes());
            parse(&bytes)?
        }
    };
    Some((snapshots.into_iter().next()?, len))
}
