//! qcow2 versions 2 and 3, as `docs/interop/qcow2.txt` of QEMU specifies them ("the
//! specification" below). All integers are big-endian.

mod bitmap;
mod entry;
mod extension;
mod header;
mod refcount;
mod rewrite;
mod snapshot;

pub use bitmap::{
    BITMAP_FLAGS_AT, BITMAP_GRANULARITY_BITS, Bitmap, BitmapCluster, MAX_BITMAP_NAME, parse_bitmaps,
};
pub use entry::{
    COMPRESSED, COPIED, Cluster, CompressedRef, L1_RESERVED, L1Entry, L2_RESERVED, L2Codec, ZERO,
};
pub use extension::{BitmapsPlace, Extensions, FeatureKind, FeatureName};
pub use header::{CompressionType, CryptMethod, Header, HeaderArea};
pub use refcount::RefcountWidth;
pub use rewrite::HeaderWrite;
pub use snapshot::{Snapshot, parse_snapshots};

/// `QFI\xfb`, the first four bytes.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Smallest cluster: 512 B.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster: 2 MiB (QEMU's bound; the specification has none).
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest cluster of an image with extended L2 entries: 32 subclusters of 512 B.
pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;
/// Host offsets have 56 bits (bits 9-55 of an L1 or L2 entry).
pub const HOST_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Feature bits of the header, by set.
pub mod feature {
    /// Incompatible: refcounts may be wrong after a crash.
    pub const DIRTY: u64 = 1 << 0;
    /// Incompatible: QEMU found corruption; never write.
    pub const CORRUPT: u64 = 1 << 1;
    /// Incompatible: guest data lives in an external file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Incompatible: the header's compression type is not zlib.
    pub const COMPRESSION_TYPE: u64 = 1 << 3;
    /// Incompatible: 128-bit L2 entries with subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All incompatible bits that are known.
    pub const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
    /// Compatible: refcounts are updated lazily.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
    /// Autoclear: the bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1 << 0;
    /// Autoclear: the external data file is a valid raw image by itself.
    pub const RAW_DATA_FILE: u64 = 1 << 1;
}

/// The arithmetic that cluster size and entry width fix: where a guest offset is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    extended_l2: bool,
}

impl Geometry {
    /// The geometry for clusters of `2^cluster_bits` bytes, or `None` outside
    /// [`MIN_CLUSTER_BITS`] (with extended L2 [`MIN_EXTENDED_CLUSTER_BITS`]) to [`MAX_CLUSTER_BITS`].
    #[must_use]
    pub const fn new(cluster_bits: u32, extended_l2: bool) -> Option<Self> {
        let least = if extended_l2 { MIN_EXTENDED_CLUSTER_BITS } else { MIN_CLUSTER_BITS };
        if cluster_bits < least || cluster_bits > MAX_CLUSTER_BITS {
            return None;
        }
        Some(Self { cluster_bits, extended_l2 })
    }

    /// log2 of the cluster size.
    #[must_use]
    pub const fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes in a cluster.
    #[must_use]
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries are 128 bits wide.
    #[must_use]
    pub const fn extended_l2(self) -> bool {
        self.extended_l2
    }

    /// Bytes in a subcluster; without extended L2 entries, in a cluster.
    #[must_use]
    pub const fn subcluster_size(self) -> u64 {
        if self.extended_l2 { self.cluster_size() / SUBCLUSTERS as u64 } else { self.cluster_size() }
    }

    /// Bytes in an L2 entry.
    #[must_use]
    pub const fn l2_entry_size(self) -> usize {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// log2 of the number of entries in an L2 table (which is one cluster).
    #[must_use]
    pub const fn l2_bits(self) -> u32 {
        self.cluster_bits - if self.extended_l2 { 4 } else { 3 }
    }

    /// Entries in an L2 table.
    #[must_use]
    pub const fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Guest bytes that one L2 table maps.
    #[must_use]
    pub const fn l2_span(self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits())
    }

    /// The L1 index of a guest offset.
    #[must_use]
    pub const fn l1_index(self, guest: u64) -> u64 {
        guest >> (self.cluster_bits + self.l2_bits())
    }

    /// The index within its L2 table of a guest offset.
    #[must_use]
    pub const fn l2_index(self, guest: u64) -> u64 {
        (guest >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// Entries that the L1 table of a disk of `size` bytes needs.
    #[must_use]
    pub const fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }
}
