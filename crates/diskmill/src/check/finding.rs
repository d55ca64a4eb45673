use std::fmt;

use crate::error::escaped;

/// Something that a check found in a qcow2 image or VMDK. Offsets and entries are as they stand in the file.
///
/// [`Display`](fmt::Display) gives the words of `qemu-img check`, which people and scripts know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// A cluster has another refcount than references. More is a leak, less corruption.
    Refcount {
        /// Number of the host cluster.
        cluster: u64,
        /// As the image counts.
        refcount: u64,
        /// As found.
        references: u64,
    },
    /// More references to a cluster than its refcount can hold.
    Overflow {
        /// Of the host cluster.
        offset: u64,
    },
    /// Something lies a cluster or more past the end of the file.
    PastEnd {
        /// Where it begins.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Reserved bits are set in an L1 entry.
    L1Reserved {
        /// The entry.
        entry: u64,
    },
    /// An L1 entry points to an L2 table that is no cluster.
    L2Misaligned {
        /// Of the table.
        offset: u64,
    },
    /// Reserved bits are set in an L2 entry.
    L2Reserved {
        /// The entry.
        entry: u64,
    },
    /// An L2 entry points to what is no cluster.
    ClusterMisaligned {
        /// Of the cluster.
        offset: u64,
        /// It holds data; otherwise it is kept for a range of zeros, and the entry can be repaired.
        data: bool,
    },
    /// The copied flag of a compressed cluster is set.
    CompressedCopied {
        /// Of the payload.
        offset: u64,
    },
    /// A compressed cluster in an image with an external data file.
    CompressedExternal {
        /// Its index in the L2 table.
        index: u64,
        /// The entry.
        entry: u64,
    },
    /// Subclusters of a compressed cluster are marked.
    CompressedSubclusters {
        /// Its index in the L2 table.
        index: u64,
        /// The entry.
        entry: u64,
    },
    /// Subclusters are marked allocated, and there is no cluster.
    UnallocatedSubclusters,
    /// Subclusters are marked both allocated and zero.
    BadSubclusters {
        /// Of the cluster.
        offset: u64,
    },
    /// The copied flag of an L1 entry contradicts the refcount of its L2 table.
    L2Copied {
        /// Index of the entry.
        index: u64,
        /// The entry.
        entry: u64,
        /// Of the table.
        refcount: u64,
    },
    /// The copied flag of an L2 entry contradicts the refcount of its cluster.
    DataCopied {
        /// The entry.
        entry: u64,
        /// Of the cluster.
        refcount: u64,
    },
    /// Reserved bits are set in an entry of the refcount table.
    RefcountTableReserved {
        /// Index of the entry.
        index: u64,
    },
    /// A refcount block is no cluster.
    RefcountBlockMisaligned {
        /// Index in the refcount table.
        index: u64,
    },
    /// A refcount block lies past the end of the file.
    RefcountBlockOutside {
        /// Index in the refcount table.
        index: u64,
    },
    /// A refcount block is referred to by others too.
    RefcountBlockShared {
        /// Index in the refcount table.
        index: u64,
        /// References to it.
        references: u64,
    },
    /// Refcounts that cannot be told, because their block cannot be read.
    RefcountUnknown {
        /// The first cluster.
        cluster: u64,
        /// How many clusters.
        len: u64,
    },
    /// A snapshot's L1 table is no whole number of clusters.
    SnapshotL1Misaligned {
        /// Id of the snapshot.
        id: String,
        /// Its name.
        name: String,
        /// Of the table.
        offset: u64,
    },
    /// A snapshot's L1 table is larger than any can be.
    SnapshotL1TooLarge {
        /// Id of the snapshot.
        id: String,
        /// Its name.
        name: String,
        /// Entries of the table.
        entries: u32,
    },
    /// An entry of the snapshot table lacks fields that version 3 demands.
    SnapshotIncomplete {
        /// Index of the entry.
        index: u64,
    },
    /// An entry of the snapshot table has more extra data than any can have.
    SnapshotExtra {
        /// Index of the entry.
        index: u64,
        /// Bytes, as it says.
        bytes: u32,
    },
    /// The snapshot table ends before the header says.
    SnapshotsEmpty {
        /// Index of the first entry of zeros.
        index: u64,
        /// How many are missing.
        count: u64,
    },
    /// Snapshots, in an image with an external data file.
    SnapshotsExternal {
        /// How many.
        count: u32,
    },
    /// An entry of a bitmap's table is wrong.
    BitmapEntry {
        /// Name of the bitmap.
        bitmap: String,
        /// The entry.
        entry: u64,
    },
    /// Two bitmaps have one name.
    BitmapTwice {
        /// The name.
        bitmap: String,
    },
    /// The header says of an external data file that it is a raw image, and there is no such file.
    RawWithoutDataFile,
    /// The limit on what contradicts the format was reached: the rest of these structures was not followed.
    NotFollowed {
        /// What is not followed.
        what: &'static str,
    },
    /// A range of a VMDK's disk cannot be mapped.
    Unmappable {
        /// First guest byte.
        guest: u64,
        /// Bytes.
        len: u64,
        /// Why.
        reason: String,
    },
    /// Damage of a VMDK that reading gets around, by a redundant table for example.
    Bypassed {
        /// What it is.
        damage: String,
    },
    /// Two grains of a VMDK lie on the same bytes of one file.
    Overlap {
        /// First byte that they share.
        offset: u64,
        /// Bytes that they share.
        len: u64,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refcount { cluster, refcount, references } => {
                write!(f, "cluster {cluster} refcount={refcount} reference={references}")
            }
            Self::Overflow { offset } => write!(f, "overflow cluster offset={offset:#x}"),
            Self::PastEnd { offset, len } => write!(
                f,
                "counting reference for region exceeding the end of the file by one cluster or more: offset {offset:#x} size {len:#x}"
            ),
            Self::L1Reserved { entry } => write!(f, "found L1 entry with reserved bits set: {entry:x}"),
            Self::L2Misaligned { offset } => {
                write!(f, "l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
            }
            Self::L2Reserved { entry } => write!(f, "found l2 entry with reserved bits set: {entry:x}"),
            Self::ClusterMisaligned { offset, data } => {
                let what = if *data { "Data" } else { "Preallocated" };
                write!(f, "offset={offset:x}: {what} cluster is not properly aligned; L2 entry corrupted.")
            }
            Self::CompressedCopied { offset } => {
                write!(f, "coffset={offset:#x}: copied flag must never be set for compressed clusters")
            }
            Self::CompressedExternal { index, entry } => {
                write!(f, "compressed cluster {index} with data file, entry={entry:#x}")
            }
            Self::CompressedSubclusters { index, entry } => {
                write!(
                    f,
                    "compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}"
                )
            }
            Self::UnallocatedSubclusters => {
                f.write_str("Unallocated cluster has non-zero subcluster allocation map")
            }
            Self::BadSubclusters { offset } => {
                write!(f, "offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap")
            }
            Self::L2Copied { index, entry, refcount } => {
                write!(f, "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}")
            }
            Self::DataCopied { entry, refcount } => {
                write!(f, "OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
            }
            Self::RefcountTableReserved { index } => {
                write!(f, "refcount table entry {index} has reserved bits set")
            }
            Self::RefcountBlockMisaligned { index } => {
                write!(f, "refcount block {index} is not cluster aligned; refcount table entry corrupted")
            }
            Self::RefcountBlockOutside { index } => write!(f, "refcount block {index} is outside image"),
            Self::RefcountBlockShared { index, references } => {
                write!(f, "refcount block {index} refcount={references}")
            }
            Self::RefcountUnknown { cluster, len } => {
                write!(f, "Can't get refcount for {len} clusters from cluster {cluster} on")
            }
            Self::SnapshotL1Misaligned { id, name, offset } => write!(
                f,
                "snapshot {} ({}) l1_offset={offset:#x}: L1 table is not cluster aligned; snapshot table entry corrupted",
                escaped(id),
                escaped(name)
            ),
            Self::SnapshotL1TooLarge { id, name, entries } => write!(
                f,
                "snapshot {} ({}) l1_size={entries:#x}: L1 table is too large; snapshot table entry corrupted",
                escaped(id),
                escaped(name)
            ),
            Self::SnapshotIncomplete { index } => write!(f, "snapshot table entry {index} is incomplete"),
            Self::SnapshotExtra { index, bytes } => {
                write!(f, "snapshot table entry {index} has too much extra data ({bytes} bytes)")
            }
            Self::SnapshotsEmpty { index, count } => {
                write!(f, "{count} snapshot table entries from entry {index} on are empty")
            }
            Self::SnapshotsExternal { count } => {
                write!(
                    f,
                    "{count} snapshots in image with data file: snapshots are not supported with data files"
                )
            }
            Self::BitmapEntry { bitmap, entry } => {
                write!(f, "bitmap {bitmap:?}: table entry {entry:#x} is invalid")
            }
            Self::BitmapTwice { bitmap } => write!(f, "bitmap {bitmap:?}: another one has the same name"),
            Self::RawWithoutDataFile => {
                f.write_str("autoclear bit 1 (data-file-raw) is set without an external data file")
            }
            Self::NotFollowed { what } => write!(f, "too many {what}: the rest is not followed"),
            Self::Unmappable { guest, len, reason } => {
                write!(f, "{len} bytes of the disk from offset {guest} on: {reason}")
            }
            Self::Bypassed { damage } => f.write_str(damage),
            Self::Overlap { offset, len } => {
                write!(f, "grains overlap: {len} bytes at offset {offset:#x} belong to two of them")
            }
        }
    }
}

/// What became of a [`Finding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Data may be wrong, or further writes may make it so.
    Error,
    /// Space is lost, and nothing else.
    Leak,
    /// It is repaired.
    Repaired,
}

impl Finding {
    /// The line that `qemu-img check` prints on standard error for it.
    #[must_use]
    pub fn qemu_line(&self, verdict: Verdict) -> String {
        let colon = matches!(
            self,
            Self::PastEnd { .. }
                | Self::Overflow { .. }
                | Self::CompressedCopied { .. }
                | Self::UnallocatedSubclusters
        );
        match verdict {
            Verdict::Error if colon => format!("ERROR: {self}"),
            Verdict::Error => format!("ERROR {self}"),
            Verdict::Leak => format!("Leaked {self}"),
            Verdict::Repaired => format!("Repairing {self}"),
        }
    }
}
