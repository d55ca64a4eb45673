//! Qcow2 images laid out byte by byte, written from the specification (QEMU's
//! `docs/interop/qcow2`) and sharing no code with diskmill: an independent witness for readers.
//!
//! [`ImageBuilder`] makes legal images, refcounts included, of kinds that no common writer makes.
//! [`Image`], its result, knows where everything lies and can be patched into a hostile one.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

mod bytes;
pub mod payload;

pub use bytes::ImageBytes;

/// Offsets of header fields, for [`Image::put`].
pub mod field {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const MAGIC: u64 = 0;
    pub const VERSION: u64 = 4;
    pub const BACKING_FILE_OFFSET: u64 = 8;
    pub const BACKING_FILE_SIZE: u64 = 16;
    pub const CLUSTER_BITS: u64 = 20;
    pub const SIZE: u64 = 24;
    pub const CRYPT_METHOD: u64 = 32;
    pub const L1_SIZE: u64 = 36;
    pub const L1_TABLE_OFFSET: u64 = 40;
    pub const REFCOUNT_TABLE_OFFSET: u64 = 48;
    pub const REFCOUNT_TABLE_CLUSTERS: u64 = 56;
    pub const NB_SNAPSHOTS: u64 = 60;
    pub const SNAPSHOTS_OFFSET: u64 = 64;
    pub const INCOMPATIBLE_FEATURES: u64 = 72;
    pub const COMPATIBLE_FEATURES: u64 = 80;
    pub const AUTOCLEAR_FEATURES: u64 = 88;
    pub const REFCOUNT_ORDER: u64 = 96;
    pub const HEADER_LENGTH: u64 = 100;
    pub const COMPRESSION_TYPE: u64 = 104;
}

/// Header extension types.
pub mod extension {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    pub const BITMAPS: u32 = 0x2385_2875;
    pub const CRYPTO_HEADER: u32 = 0x0537_be77;
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// "Refcount is exactly one", in L1 and L2 entries.
pub const COPIED: u64 = 1 << 63;
/// "Compressed cluster", in L2 entries.
pub const COMPRESSED: u64 = 1 << 62;

/// Where a guest cluster comes from.
#[derive(Clone, Copy, Debug)]
pub enum Entry {
    /// Host cluster at this offset.
    Data(u64),
    /// Reads as zeros, no host cluster.
    Zero,
    /// Reads as zeros, host cluster kept at this offset.
    ZeroAt(u64),
    /// Compressed payload: offset and length in bytes.
    Packed(u64, u64),
    /// Extended L2: host offset (0: none), allocation bits, zero bits.
    Sub(u64, u32, u32),
    /// These very bits; counted nowhere.
    Bits(u64),
    /// These very bits and this subcluster bitmap; counted nowhere.
    Bits128(u64, u64),
}

type Map = BTreeMap<u64, Entry>;

struct Snapshot {
    id: String,
    name: String,
    size: u64,
    map: Map,
}

/// Builds a qcow2 image piece by piece.
pub struct ImageBuilder {
    version: u32,
    cluster_bits: u32,
    size: u64,
    refcount_order: u32,
    incompatible: u64,
    zstd: bool,
    extensions: Vec<(u32, Vec<u8>)>,
    backing: Option<Vec<u8>>,
    chunks: BTreeMap<u64, Vec<u8>>,
    end: u64,
    map: Map,
    snapshots: Vec<Snapshot>,
}

impl ImageBuilder {
    /// An empty image of `size` guest bytes with clusters of `1 << cluster_bits` bytes.
    pub fn new(version: u32, cluster_bits: u32, size: u64) -> Self {
        Self {
            version,
            cluster_bits,
            size,
            refcount_order: 4,
            incompatible: 0,
            zstd: false,
            extensions: Vec::new(),
            backing: None,
            chunks: BTreeMap::new(),
            end: 1 << cluster_bits,
            map: Map::new(),
            snapshots: Vec::new(),
        }
    }

    /// Refcounts of `1 << order` bits (version 3).
    pub fn refcount_order(&mut self, order: u32) -> &mut Self {
        self.refcount_order = order;
        self
    }

    /// Compressed clusters are zstd (version 3).
    pub fn zstd(&mut self) -> &mut Self {
        self.zstd = true;
        self.incompatible |= 1 << 3;
        self
    }

    /// L2 entries of 128 bits (version 3, clusters of at least 16 KiB).
    pub fn extended_l2(&mut self) -> &mut Self {
        self.incompatible |= 1 << 4;
        self
    }

    /// Guest data lies in this file; entries then name guest offsets.
    pub fn data_file(&mut self, name: &str) -> &mut Self {
        self.incompatible |= 1 << 2;
        self.extension(extension::DATA_FILE, name.as_bytes())
    }

    /// Sets incompatible feature bits.
    pub fn incompatible(&mut self, bits: u64) -> &mut Self {
        self.incompatible |= bits;
        self
    }

    /// Adds a header extension.
    pub fn extension(&mut self, kind: u32, data: &[u8]) -> &mut Self {
        self.extensions.push((kind, data.to_vec()));
        self
    }

    /// Adds a feature name table: (0 incompatible, 1 compatible, 2 autoclear; bit; name).
    pub fn feature_names(&mut self, names: &[(u8, u8, &str)]) -> &mut Self {
        let mut table = Vec::new();
        for (kind, bit, name) in names {
            table.extend_from_slice(&[*kind, *bit]);
            let mut field = name.as_bytes().to_vec();
            field.resize(46, 0);
            table.extend(field);
        }
        self.extension(extension::FEATURE_NAMES, &table)
    }

    /// Names a backing file and, if not empty, its format.
    pub fn backing(&mut self, name: &str, format: &str) -> &mut Self {
        self.backing = Some(name.as_bytes().to_vec());
        if !format.is_empty() {
            self.extension(extension::BACKING_FORMAT, format.as_bytes());
        }
        self
    }

    /// Puts bytes into fresh clusters; gives their host offset.
    pub fn alloc(&mut self, bytes: &[u8]) -> u64 {
        let at = self.end;
        self.place(at, bytes);
        at
    }

    /// Puts bytes at a host offset, which need not be aligned.
    pub fn place(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        self.chunks.insert(at, bytes.to_vec());
        let end = at + bytes.len() as u64;
        self.end = self.end.max(end.next_multiple_of(self.cluster()));
        self
    }

    /// Maps a guest cluster (by number).
    pub fn map(&mut self, guest: u64, entry: Entry) -> &mut Self {
        self.map.insert(guest, entry);
        self
    }

    /// Puts one cluster of bytes into a fresh host cluster and maps it.
    pub fn data(&mut self, guest: u64, bytes: &[u8]) -> u64 {
        let at = self.alloc(bytes);
        self.map(guest, Entry::Data(at));
        at
    }

    /// Keeps the mapping of this moment as an internal snapshot.
    pub fn snapshot(&mut self, id: &str, name: &str) -> &mut Self {
        self.snapshots.push(Snapshot {
            id: id.to_owned(),
            name: name.to_owned(),
            size: self.size,
            map: self.map.clone(),
        });
        self
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn external(&self) -> bool {
        self.incompatible & 1 << 2 != 0
    }

    fn entry_len(&self) -> u64 {
        if self.incompatible & 1 << 4 != 0 { 16 } else { 8 }
    }

    /// Host clusters that an entry uses.
    fn used(&self, entry: Entry) -> std::ops::Range<u64> {
        let cluster = self.cluster();
        match entry {
            Entry::Data(at) | Entry::ZeroAt(at) if !self.external() => at / cluster..at / cluster + 1,
            Entry::Sub(at, ..) if at != 0 && !self.external() => at / cluster..at / cluster + 1,
            Entry::Packed(at, len) => {
                // The descriptor counts whole sectors, and every cluster they touch is referenced.
                let end = (at + len).next_multiple_of(512);
                at / cluster..end.div_ceil(cluster)
            }
            _ => 0..0,
        }
    }

    fn encode(&self, entry: Entry, count: impl Fn(u64) -> u64) -> (u64, u64) {
        let copied = |at: u64| {
            let alone = self.external() || count(at / self.cluster()) == 1;
            at | if alone { COPIED } else { 0 }
        };
        match entry {
            Entry::Data(at) => (copied(at), 0xffff_ffff),
            Entry::Zero if self.entry_len() == 16 => (0, 0xffff_ffff << 32),
            Entry::Zero => (1, 0),
            Entry::ZeroAt(at) if self.entry_len() == 16 => (copied(at), 0xffff_ffff << 32),
            Entry::ZeroAt(at) => (copied(at) | 1, 0),
            Entry::Packed(at, len) => {
                let shift = 62 - (self.cluster_bits - 8);
                let sectors = (at + len - 1) / 512 - at / 512;
                (COMPRESSED | sectors << shift | at, 0)
            }
            Entry::Sub(at, alloc, zero) => {
                let bits = u64::from(zero) << 32 | u64::from(alloc);
                (if at == 0 { 0 } else { copied(at) }, bits)
            }
            Entry::Bits(bits) => (bits, 0),
            Entry::Bits128(bits, sub) => (bits, sub),
        }
    }

    /// Lays out L2 tables and an L1 table; gives the L1 table's offset, its entries and the L2 offsets.
    fn tables(&mut self, map: &Map, counts: &mut BTreeMap<u64, u64>) -> (u64, u64, Vec<u64>) {
        let per_l2 = self.cluster() / self.entry_len();
        let l1_len = self.size.div_ceil(self.cluster()).div_ceil(per_l2).max(1);
        let l1_len = l1_len.max(map.keys().last().map_or(0, |g| g / per_l2 + 1));
        let mut l2s: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for (&guest, &entry) in map {
            let table = l2s.entry(guest / per_l2).or_insert_with(|| vec![0; 1 << self.cluster_bits]);
            let (bits, sub) = self.encode(entry, |c| counts.get(&c).copied().unwrap_or(0));
            let mut both = bits.to_be_bytes().to_vec();
            both.extend_from_slice(&sub.to_be_bytes());
            let at = usize::try_from(guest % per_l2 * self.entry_len()).expect("below a cluster");
            let len = if self.entry_len() == 16 { 16 } else { 8 };
            table[at..at + len].copy_from_slice(&both[..len]);
        }
        let mut l1 = vec![0; usize::try_from(l1_len * 8).expect("a small L1 table")];
        let mut l2_at = Vec::new();
        for (index, table) in l2s {
            let at = self.alloc(&table);
            *counts.entry(at / self.cluster()).or_default() += 1;
            let i = usize::try_from(index * 8).expect("a small L1 table");
            l1[i..i + 8].copy_from_slice(&(at | COPIED).to_be_bytes());
            l2_at.push(at);
        }
        let at = self.alloc(&l1);
        for c in at / self.cluster()..(at + l1_len * 8).div_ceil(self.cluster()) {
            *counts.entry(c).or_default() += 1;
        }
        (at, l1_len, l2_at)
    }

    /// Lays out everything that is missing and gives the image.
    pub fn build(mut self) -> Image {
        let cluster = self.cluster();
        let mut counts: BTreeMap<u64, u64> = BTreeMap::from([(0, 1)]);
        let map = std::mem::take(&mut self.map);
        let snapshots = std::mem::take(&mut self.snapshots);
        for map in snapshots.iter().map(|s| &s.map).chain([&map]) {
            for c in map.values().flat_map(|&e| self.used(e)) {
                *counts.entry(c).or_default() += 1;
            }
        }
        let mut directory = Vec::new();
        for snapshot in &snapshots {
            let (l1_at, l1_len, _) = self.tables(&snapshot.map, &mut counts);
            directory.extend(snapshot_entry(snapshot, l1_at, l1_len));
        }
        let directory_at = if snapshots.is_empty() { 0 } else { self.alloc(&directory) };
        for c in directory_at / cluster..(directory_at + directory.len() as u64).div_ceil(cluster) {
            *counts.entry(c).or_default() += u64::from(directory_at != 0);
        }
        let (l1_at, l1_len, l2_at) = self.tables(&map, &mut counts);
        let (table_at, table_clusters, block_at) = self.refcounts(counts);

        let mut header = Vec::new();
        let be32 = |h: &mut Vec<u8>, v: u64| {
            h.extend_from_slice(&u32::try_from(v).expect("a 32-bit field").to_be_bytes());
        };
        let be64 = |h: &mut Vec<u8>, v: u64| h.extend_from_slice(&v.to_be_bytes());
        header.extend_from_slice(b"QFI\xfb");
        be32(&mut header, u64::from(self.version));
        be64(&mut header, 0);
        be32(&mut header, 0);
        be32(&mut header, u64::from(self.cluster_bits));
        be64(&mut header, self.size);
        be32(&mut header, 0);
        be32(&mut header, l1_len);
        be64(&mut header, l1_at);
        be64(&mut header, table_at);
        be32(&mut header, table_clusters);
        be32(&mut header, snapshots.len() as u64);
        be64(&mut header, directory_at);
        if self.version >= 3 {
            be64(&mut header, self.incompatible);
            be64(&mut header, 0);
            be64(&mut header, 0);
            be32(&mut header, u64::from(self.refcount_order));
            be32(&mut header, 112);
            header.extend_from_slice(&[u8::from(self.zstd), 0, 0, 0, 0, 0, 0, 0]);
        }
        for (kind, data) in &self.extensions {
            be32(&mut header, u64::from(*kind));
            be32(&mut header, data.len() as u64);
            header.extend_from_slice(data);
            header.resize(header.len().next_multiple_of(8), 0);
        }
        be64(&mut header, 0);
        if let Some(name) = &self.backing {
            let at = header.len() as u64;
            header.extend_from_slice(name);
            header[8..16].copy_from_slice(&at.to_be_bytes());
            header[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        }
        self.chunks.insert(0, header);
        Image {
            chunks: self.chunks,
            len: self.end,
            l1_at,
            l2_at,
            refcount_table_at: table_at,
            refcount_block_at: block_at,
            snapshots_at: directory_at,
        }
    }

    /// Lays out the refcount table and blocks, which count themselves.
    fn refcounts(&mut self, mut counts: BTreeMap<u64, u64>) -> (u64, u64, Vec<u64>) {
        let cluster = self.cluster();
        let per_block = (cluster * 8) >> self.refcount_order;
        let first = self.end / cluster;
        let (mut blocks, mut table) = (1, 1);
        loop {
            let total = first + blocks + table;
            let need = total.div_ceil(per_block);
            let need_table = (need * 8).div_ceil(cluster);
            if (need, need_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (need, need_table);
        }
        counts.extend((first..first + blocks + table).map(|c| (c, 1)));
        let mut block_at = Vec::new();
        let mut entries = Vec::new();
        for b in 0..blocks {
            let mut block = vec![0u8; 1 << self.cluster_bits];
            for (&c, &n) in counts.range(b * per_block..(b + 1) * per_block) {
                let bit = (c % per_block) << self.refcount_order;
                let at = usize::try_from(bit / 8).expect("below a cluster");
                let width = 1usize << self.refcount_order;
                if width < 8 {
                    // Bit 0 is the least significant one of the byte.
                    block[at] |= (n as u8) << (bit % 8);
                } else {
                    let bytes = n.to_be_bytes();
                    block[at..at + width / 8].copy_from_slice(&bytes[8 - width / 8..]);
                }
            }
            let at = self.alloc(&block);
            entries.extend_from_slice(&at.to_be_bytes());
            block_at.push(at);
        }
        entries.resize(entries.len().next_multiple_of(1 << self.cluster_bits), 0);
        (self.alloc(&entries), table, block_at)
    }
}

fn snapshot_entry(snapshot: &Snapshot, l1_at: u64, l1_len: u64) -> Vec<u8> {
    let mut e = Vec::new();
    e.extend_from_slice(&l1_at.to_be_bytes());
    e.extend_from_slice(&u32::try_from(l1_len).expect("a small L1 table").to_be_bytes());
    e.extend_from_slice(&(snapshot.id.len() as u16).to_be_bytes());
    e.extend_from_slice(&(snapshot.name.len() as u16).to_be_bytes());
    // Date, nanoseconds, guest clock, 32-bit size of the VM state.
    e.extend_from_slice(&[0; 4 + 4 + 8 + 4]);
    e.extend_from_slice(&16u32.to_be_bytes());
    e.extend_from_slice(&0u64.to_be_bytes());
    e.extend_from_slice(&snapshot.size.to_be_bytes());
    e.extend_from_slice(snapshot.id.as_bytes());
    e.extend_from_slice(snapshot.name.as_bytes());
    e.resize(e.len().next_multiple_of(8), 0);
    e
}

/// A finished image: stretches of bytes, and where its structures lie.
#[derive(Clone)]
pub struct Image {
    chunks: BTreeMap<u64, Vec<u8>>,
    /// Length of the file in bytes.
    pub len: u64,
    /// Offset of the active L1 table.
    pub l1_at: u64,
    /// Offsets of the active L2 tables, in the order of the guest.
    pub l2_at: Vec<u64>,
    /// Offset of the refcount table.
    pub refcount_table_at: u64,
    /// Offsets of the refcount blocks.
    pub refcount_block_at: Vec<u64>,
    /// Offset of the snapshot table; 0 without snapshots.
    pub snapshots_at: u64,
}

impl Image {
    /// Overwrites bytes anywhere.
    #[must_use]
    pub fn put(mut self, at: u64, bytes: &[u8]) -> Self {
        let chunk = self.chunks.range_mut(..=at).next_back();
        match chunk {
            Some((start, old)) if at + bytes.len() as u64 <= start + old.len() as u64 => {
                let i = usize::try_from(at - start).expect("inside the chunk");
                old[i..i + bytes.len()].copy_from_slice(bytes);
            }
            _ => {
                self.chunks.insert(at, bytes.to_vec());
                self.len = self.len.max(at + bytes.len() as u64);
            }
        }
        self
    }

    /// Overwrites a 32-bit field.
    #[must_use]
    pub fn put32(self, at: u64, value: u32) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    /// Overwrites a 64-bit field.
    #[must_use]
    pub fn put64(self, at: u64, value: u64) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    /// Writes a sparse file, cut or lengthened to `len`.
    pub fn write(&self, path: &Path) {
        let file = File::create(path).expect("create the image");
        for (at, bytes) in &self.chunks {
            file.write_all_at(bytes, *at).expect("write the image");
        }
        file.set_len(self.len).expect("set the length");
    }

    /// The whole file in memory.
    pub fn bytes(&self) -> Vec<u8> {
        let len = usize::try_from(self.len).expect("an image that fits in memory");
        let mut out = vec![0; len];
        for (at, bytes) in &self.chunks {
            let at = usize::try_from(*at).expect("inside the image");
            let end = (at + bytes.len()).min(len);
            out[at.min(len)..end].copy_from_slice(&bytes[..end.saturating_sub(at)]);
        }
        out
    }
}

#[cfg(test)]
mod tests;
