//! Internal snapshots of an image.

use std::time::{SystemTime, UNIX_EPOCH};

use diskmill_format::HostOffset;

use crate::error::{Error, Result};
use crate::image::{Image, SnapshotRef, find_snapshot};
use crate::layout::FormatInfo;
use crate::qcow2::Snapshot;

impl Image {
    /// The image's internal snapshots, in the order of its table.
    #[must_use]
    pub fn snapshots(&self) -> &[Snapshot] {
        match &self.info().specific {
            FormatInfo::Qcow2(info) => &info.snapshots,
            _ => &[],
        }
    }

    /// Takes an internal snapshot of the guest's disk, named `name` and dated `date`. Names need not be unique; the new
    /// one gets the next free number as its id, as in QEMU. Returns the id.
    ///
    /// The change is made all at once: a crash leaves the image with the snapshot or as it was.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) for other formats than qcow2 and images with an external data
    /// file; [`Kind::Limit`](crate::Kind::Limit) if the refcounts are too narrow for one more reference.
    pub fn create_snapshot(&mut self, name: &str, date: SystemTime) -> Result<String> {
        let all = self.snapshots().to_vec();
        let number = |snapshot: &Snapshot| String::from_utf8_lossy(&snapshot.id).parse::<u64>().ok();
        let id = all.iter().filter_map(number).max().unwrap_or(0).saturating_add(1).to_string();
        let since = date.duration_since(UNIX_EPOCH).unwrap_or_default();
        let snapshot = Snapshot {
            id: id.clone().into_bytes(),
            name: name.as_bytes().to_vec(),
            l1_offset: HostOffset(0),
            l1_size: 0,
            // The format counts seconds in 32 bits, until 2106.
            date_sec: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
            date_nsec: since.subsec_nanos(),
            vm_clock_nsec: 0,
            vm_state_size: 0,
            disk_size: None,
            // As `qemu-img snapshot` writes it.
            icount: Some(0),
            extra: Vec::new(),
        };
        self.edit_qcow2("snapshots", |writer| writer.create_snapshot(&all, snapshot))?;
        Ok(id)
    }

    /// Deletes an internal snapshot.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) if there is none such; [`Kind::Corrupt`](crate::Kind::Corrupt) if its
    /// tables are damaged.
    pub fn delete_snapshot(&mut self, wanted: &SnapshotRef) -> Result<()> {
        let all = self.snapshots().to_vec();
        let found = self.named(find_snapshot(&all, wanted))?;
        let Some(index) = all.iter().position(|snapshot| std::ptr::eq(snapshot, found)) else {
            return Err(Error::invalid("no such snapshot"));
        };
        self.edit_qcow2("snapshots", |writer| writer.delete_snapshot(&all, index))
    }

    /// Makes the disk what it was when the snapshot was taken, its size included. What was written since is lost; the
    /// snapshot stays.
    ///
    /// # Errors
    /// As [`delete_snapshot`](Self::delete_snapshot).
    pub fn apply_snapshot(&mut self, wanted: &SnapshotRef) -> Result<()> {
        let all = self.snapshots().to_vec();
        if matches!(&self.info().specific, FormatInfo::Qcow2(info) if info.area.bitmap_directory().is_some())
        {
            // They would tell of another disk.
            return self
                .named(Err(Error::unsupported("applying a snapshot to an image with persistent bitmaps")));
        }
        let snapshot = self.named(find_snapshot(&all, wanted))?;
        self.edit_qcow2("snapshots", |writer| writer.apply_snapshot(snapshot))
    }
}
