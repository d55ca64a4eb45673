use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskmill_codec::{Codec, is_zero};
use diskmill_format::qcow2::{
    Cluster, CompressedRef, Geometry, L1Entry, L2Codec, SUBCLUSTERS, Snapshot, feature,
};
use diskmill_format::{GuestOffset, HostOffset};

use super::ahead::Ahead;
use super::{Qcow2Info, codec_of, lossy};
use crate::error::{Error, Kind, Result};
use crate::layout::{FileId, FormatInfo, ImageInfo, LayerExtent, LayerSource, Layout, MapError, Source};
use crate::probe::Format;
use crate::tables::{SLICE, Tables};

/// The active state, or one snapshot, of a qcow2 image.
pub(crate) struct Qcow2Layout {
    info: ImageInfo,
    geometry: Geometry,
    entries: L2Codec,
    codec: Codec,
    l1_offset: u64,
    tables: Box<dyn Tables>,
    ahead: Ahead,
    /// The image file, for compressed clusters, and the one with plain clusters.
    image: FileLen,
    data: FileLen,
}

/// A file and its length, which grows if the image is written to.
#[derive(Clone)]
pub(crate) struct FileLen {
    id: FileId,
    len: Arc<AtomicU64>,
}

impl FileLen {
    pub(crate) const fn new(id: FileId, len: Arc<AtomicU64>) -> Self {
        Self { id, len }
    }

    fn get(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }
}

/// The files of an image.
pub(crate) struct Files {
    /// The metadata of the image file.
    pub(crate) tables: Box<dyn Tables>,
    pub(crate) image: FileLen,
    /// The external data file.
    pub(crate) data: Option<FileLen>,
}

impl Qcow2Layout {
    /// The layout of `snapshot`, or of the active state.
    pub(crate) fn new(read: Qcow2Info, files: Files, snapshot: Option<&Snapshot>) -> Result<Self> {
        let header = &read.area.header;
        let geometry = header.geometry;
        let (l1_offset, l1_size, size) = match snapshot {
            None => (header.l1_offset.get(), header.l1_size, header.size),
            Some(snapshot) => {
                (snapshot.l1_offset.get(), snapshot.l1_size, snapshot.disk_size.unwrap_or(header.size))
            }
        };
        // The header's own values are checked where it is parsed; a snapshot's are not.
        if l1_offset % geometry.cluster_size() != 0
            || l1_offset >> 56 != 0
            || u64::from(l1_size) < geometry.l1_entries(size)
        {
            return Err(Error::corrupt(
                "L1 table",
                Some(l1_offset),
                "it is misaligned, beyond 2^56, or smaller than the disk needs",
            ));
        }
        if size > i64::MAX as u64 {
            return Err(Error::new(Kind::Limit, format!("a snapshot with a virtual size of {size} bytes")));
        }
        let info = ImageInfo {
            format: Format::Qcow2,
            virtual_size: size,
            cluster_size: Some(geometry.cluster_size()),
            packed_unit: if header.has(feature::DATA_FILE) { 0 } else { geometry.cluster_size() },
            backing_name: read.area.backing_name.as_deref().map(lossy),
            backing_format: read.area.extensions.backing_format.as_deref().map(lossy),
            warnings: Vec::new(),
            specific: FormatInfo::Raw,
        };
        Ok(Self {
            geometry,
            entries: L2Codec::new(geometry, header.version, header.has(feature::DATA_FILE)),
            codec: codec_of(header.compression),
            l1_offset,
            tables: files.tables,
            ahead: Ahead::new(),
            data: files.data.unwrap_or_else(|| files.image.clone()),
            image: files.image,
            info: ImageInfo { specific: FormatInfo::Qcow2(Box::new(read)), ..info },
        })
    }

    /// Offset and length of the piece of the L1 table that holds entry `index`, in bytes.
    fn l1_piece(&self, index: u64) -> (u64, u64) {
        let at = index * 8 / SLICE * SLICE;
        let whole = self.geometry.l1_entries(self.info.virtual_size) * 8;
        (at, SLICE.min(whole.saturating_sub(at)))
    }

    /// Asks for the tables that a walk will come to after that of L1 entry `index`.
    fn ask_ahead(&self, index: u64) {
        let l1 = |from: u64| {
            let (at, len) = self.l1_piece(from);
            let piece = (from * 8 < at + len).then(|| self.tables.slice(self.l1_offset + at, len))?;
            Some((at / 8, piece.ok()?))
        };
        let len = SLICE.min(self.geometry.cluster_size());
        self.ahead.enter(index, self.geometry, l1, |table| self.tables.will_need(table.get(), len));
    }

    /// The run of entry `index` of the L1 table: where its L2 table stands, or for how many L1 entries there is none.
    fn l1_run(&self, index: u64, most: u64) -> Result<L1Run, MapError> {
        let mut count = 0;
        while count < most {
            let byte = (index + count) * 8;
            let (slice_at, slice_len) = self.l1_piece(index + count);
            let slice = match self.tables.slice(self.l1_offset + slice_at, slice_len) {
                Ok(slice) => slice,
                Err(_) if count > 0 => break,
                Err(error) => {
                    // All that this piece of the table maps is lost with it.
                    let lost = (slice_at + slice_len - byte) / 8 * self.geometry.l2_span();
                    return Err(self.damaged(error, "L1 table".to_owned(), self.l1_offset + byte, lost));
                }
            };
            let (entries, _) = slice.as_chunks::<8>();
            for raw in entries.iter().skip(((byte - slice_at) / 8) as usize) {
                let raw = u64::from_be_bytes(*raw);
                match L1Entry::decode(raw, self.geometry) {
                    Ok(L1Entry::Unallocated) => count += 1,
                    Ok(L1Entry::Table(host)) if count == 0 => return Ok(L1Run::Table(host)),
                    Err(why) if count == 0 => {
                        let error = Error::new(Kind::Corrupt, why);
                        let structure = format!("L1 table, entry {index}");
                        return Err(self.damaged(
                            error,
                            structure,
                            self.l1_offset + byte,
                            self.geometry.l2_span(),
                        ));
                    }
                    Ok(L1Entry::Table(_)) | Err(_) => return Ok(L1Run::None(count)),
                }
                if count >= most {
                    break;
                }
            }
        }
        Ok(L1Run::None(count))
    }

    fn damaged(&self, error: Error, structure: String, offset: u64, len: u64) -> MapError {
        MapError { error: error.within(structure, offset), len }
    }

    /// The piece of the L2 table at `table` that holds entry `index`.
    fn piece(&self, l1_index: u64, table: HostOffset, index: u64) -> Result<Piece, MapError> {
        let size = self.geometry.l2_entry_size() as u64;
        let byte = index * size;
        let at = byte / SLICE * SLICE;
        let cluster = self.geometry.cluster_size();
        let len = SLICE.min(cluster - at);
        let bytes = self.tables.slice(table.get() + at, len).map_err(|error| {
            // All that this piece of the table maps is lost with it.
            let lost = (at + len - byte) / size * cluster;
            self.damaged(error, format!("L2 table {l1_index}"), table.get(), lost)
        })?;
        Ok(Piece { l1_index, host: table.get() + at, first: at / size, entry_size: size, bytes })
    }

    /// What cluster `index` of the L2 table is whose piece holds it.
    fn cluster(&self, piece: &Piece, index: u64) -> Result<Cluster, MapError> {
        let slot = index - piece.first;
        self.entries.decode(&piece.bytes, slot as usize).map_err(|why| {
            let error = Error::new(Kind::Corrupt, why);
            let structure = format!("L2 table {}, entry {index}", piece.l1_index);
            self.damaged(error, structure, piece.host + slot * piece.entry_size, self.geometry.cluster_size())
        })
    }

    /// What stands at `within` bytes into a cluster, up to where that changes or the cluster ends.
    fn in_cluster(&self, cluster: Cluster, within: u64) -> LayerExtent {
        let size = self.geometry.cluster_size();
        let file = self.data.id;
        let host_at = |host: HostOffset| HostOffset(host.get() + within);
        let whole = |source| LayerExtent { len: size - within, source };
        match cluster {
            Cluster::Unallocated => whole(LayerSource::Unallocated),
            Cluster::Zero(host) => whole(LayerSource::Zero(host.map(|host| (file, host_at(host))))),
            Cluster::Standard(host) => whole(LayerSource::Data(Source::Raw { file, at: host_at(host) })),
            Cluster::Compressed(CompressedRef { host, len }) => whole(LayerSource::Data(Source::Packed {
                file: self.image.id,
                at: host,
                len,
                unit: size as u32,
                skip: within as u32,
                codec: self.codec,
            })),
            Cluster::Subclusters { host, allocated, zero } => {
                let sub = self.geometry.subcluster_size();
                let first = (within / sub) as u32;
                let state = |index: u32| (allocated >> index & 1, zero >> index & 1);
                let here = state(first);
                let end = (first..SUBCLUSTERS).find(|&index| state(index) != here).unwrap_or(SUBCLUSTERS);
                let source = match (here, host) {
                    ((1, _), Some(host)) => LayerSource::Data(Source::Raw { file, at: host_at(host) }),
                    ((_, 1), host) => LayerSource::Zero(host.map(|host| (file, host_at(host)))),
                    (_, Some(host)) => LayerSource::Reserved((file, host_at(host))),
                    (_, None) => LayerSource::Unallocated,
                };
                LayerExtent { len: u64::from(end) * sub - within, source }
            }
        }
    }

    /// Cuts a run of file bytes at the end of its file.
    fn within_file(&self, extent: LayerExtent, l1_index: u64, index: u64) -> Result<LayerExtent, MapError> {
        let LayerSource::Data(source) = extent.source else { return Ok(extent) };
        let (Source::Raw { at, .. } | Source::Packed { at, .. }) = source else { return Ok(extent) };
        let (packed, file_len) = match source {
            Source::Packed { .. } => (true, self.image.get()),
            _ => (false, self.data.get()),
        };
        let Some(left) = file_len.checked_sub(at.get()).filter(|&left| left > 0) else {
            let what = if packed { "a compressed cluster" } else { "a cluster" };
            let error = Error::new(
                Kind::Corrupt,
                format!(
                    "it points to {what} at {at}, past the end of the file ({file_len} bytes): the image is truncated"
                ),
            );
            let structure = format!("L2 table {l1_index}, entry {index}");
            return Err(MapError { error: error.within(structure, at.get()), len: extent.len });
        };
        Ok(match source {
            Source::Packed { file, at, len, unit, skip, codec } => {
                let len = u64::from(len).min(left) as u32;
                let source = LayerSource::Data(Source::Packed { file, at, len, unit, skip, codec });
                LayerExtent { source, ..extent }
            }
            _ => LayerExtent { len: extent.len.min(left), ..extent },
        })
    }
}

/// A piece of an L2 table.
struct Piece {
    /// The table's entry in the L1 table.
    l1_index: u64,
    host: u64,
    /// The first entry in it.
    first: u64,
    /// Bytes in an entry.
    entry_size: u64,
    bytes: Arc<[u8]>,
}

impl Piece {
    fn holds(&self, index: u64) -> bool {
        index.checked_sub(self.first).is_some_and(|slot| slot < self.bytes.len() as u64 / self.entry_size)
    }

    /// How many entries from `index` on are all zeros, which stands for unallocated.
    fn unallocated(&self, index: u64) -> u64 {
        let start = ((index - self.first) * self.entry_size) as usize;
        let entries = self.bytes.get(start..).unwrap_or_default().chunks_exact(self.entry_size as usize);
        entries.take_while(|entry| is_zero(entry)).count() as u64
    }
}

enum L1Run {
    Table(HostOffset),
    None(u64),
}

/// Whether `next` goes on where the run `source` of `len` bytes ends.
fn continues(source: LayerSource, len: u64, next: LayerSource) -> bool {
    match (source, next) {
        (LayerSource::Unallocated, LayerSource::Unallocated)
        | (LayerSource::Zero(None), LayerSource::Zero(None)) => true,
        (LayerSource::Zero(Some((file, a))), LayerSource::Zero(Some((other, b))))
        | (LayerSource::Reserved((file, a)), LayerSource::Reserved((other, b)))
        | (
            LayerSource::Data(Source::Raw { file, at: a }),
            LayerSource::Data(Source::Raw { file: other, at: b }),
        ) => file == other && a.get().checked_add(len) == Some(b.get()),
        _ => false,
    }
}

impl Layout for Qcow2Layout {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<LayerExtent, MapError> {
        let geometry = self.geometry;
        let guest = at.get();
        let max = max.min(self.info.virtual_size.saturating_sub(guest)).max(1);
        let l1_index = geometry.l1_index(guest);
        let in_span = guest % geometry.l2_span();
        let entries = (in_span + max).div_ceil(geometry.l2_span());
        let table = match self.l1_run(l1_index, entries) {
            Ok(L1Run::Table(table)) => table,
            Ok(L1Run::None(count)) => {
                let len = count.saturating_mul(geometry.l2_span()) - in_span;
                return Ok(LayerExtent { len: len.min(max), source: LayerSource::Unallocated });
            }
            Err(error) => return Err(MapError { len: (error.len - in_span).min(max), ..error }),
        };
        self.ask_ahead(l1_index);
        let cluster_size = geometry.cluster_size();
        let within = guest % cluster_size;
        let mut index = geometry.l2_index(guest);
        let cut = |error: MapError, skip: u64| MapError { len: (error.len - skip).min(max), ..error };
        let mut piece = self.piece(l1_index, table, index).map_err(|error| cut(error, within))?;
        let first = self.cluster(&piece, index).map_err(|error| cut(error, within))?;
        let first = self.in_cluster(first, within);
        let mut run = self.within_file(first, l1_index, index).map_err(|error| cut(error, 0))?;
        if matches!(run.source, LayerSource::Data(Source::Packed { .. })) {
            return Ok(LayerExtent { len: run.len.min(max), ..run });
        }
        // Goes on over further clusters of the same table, as long as each continues the run to its own end.
        while run.len < max && run.len >= first.len && (within + run.len).is_multiple_of(cluster_size) {
            index += 1;
            if index >= geometry.l2_entries() {
                break;
            }
            if !piece.holds(index) {
                match self.piece(l1_index, table, index) {
                    Ok(next) => piece = next,
                    Err(_) => break,
                }
            }
            if run.source == LayerSource::Unallocated {
                // Tables of sparse disks are empty but for a few entries, and need not be decoded one by one.
                let count = piece.unallocated(index);
                if count > 0 {
                    run.len += count * cluster_size;
                    index += count - 1;
                    continue;
                }
            }
            let Ok(next) = self.cluster(&piece, index) else { break };
            let next = self.in_cluster(next, 0);
            if !continues(run.source, run.len, next.source) {
                break;
            }
            let Ok(next) = self.within_file(next, l1_index, index) else { break };
            run.len += next.len;
        }
        Ok(LayerExtent { len: run.len.min(max), ..run })
    }
}

#[cfg(test)]
mod tests {
    use diskmill_format::qcow2::{
        CompressionType, CryptMethod, Extensions, Header, HeaderArea, RefcountWidth,
    };
    use diskmill_io::MemoryStorage;

    use super::*;
    use crate::{Image, OpenOptions, SnapshotRef};

    /// Opens the one snapshot of an image whose snapshot table has these fields.
    fn open_snapshot(cluster_bits: u32, l1_offset: u64, l1_size: u32, disk_size: u64) -> Result<Image> {
        let cluster = 1u64 << cluster_bits;
        let header = Header {
            version: 3,
            backing_name: None,
            geometry: Geometry::new(cluster_bits, false).unwrap(),
            size: 512,
            crypt: CryptMethod::None,
            l1_size: 1,
            l1_offset: HostOffset(cluster),
            refcount_table_offset: HostOffset(2 * cluster),
            refcount_table_clusters: 1,
            snapshots: 1,
            snapshots_offset: HostOffset(3 * cluster),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_width: RefcountWidth::from_bits(16).unwrap(),
            header_length: 112,
            compression: CompressionType::Zlib,
        };
        let area = HeaderArea { header, extensions: Extensions::default(), backing_name: None };
        let mut bytes = area.encode().unwrap();
        bytes.resize(3 * cluster as usize, 0);
        bytes.extend(l1_offset.to_be_bytes());
        bytes.extend(l1_size.to_be_bytes());
        bytes.extend([0, 1, 0, 1]);
        bytes.extend([0; 20]);
        bytes.extend(16u32.to_be_bytes());
        bytes.extend([0; 8]);
        bytes.extend(disk_size.to_be_bytes());
        bytes.extend(b"1s\0\0\0\0\0\0");
        bytes.resize(4 * cluster as usize, 0);
        let storage = Arc::new(MemoryStorage::with_bytes(bytes, 0));
        let snapshot = Some(SnapshotRef::Exact { id: Some("1".to_owned()), name: None });
        Image::from_storage(storage, "image", &OpenOptions { snapshot, ..OpenOptions::default() })
    }

    #[test]
    fn a_snapshot_is_checked_like_the_header() {
        let sound = open_snapshot(9, 512, 1, 512).unwrap();
        assert_eq!(sound.map(0, 512).unwrap().source, Source::Zero);
        // The second slice of this table would begin past 2^64.
        let far = open_snapshot(9, u64::MAX - 511, 1 << 20, 1 << 34).err().unwrap();
        assert_eq!((far.kind(), far.structure()), (Kind::Corrupt, Some("L1 table")));
        let large = open_snapshot(21, 1 << 21, u32::MAX, 1 << 63).err().unwrap();
        assert_eq!(large.kind(), Kind::Limit);
    }
}
