mod directory;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use diskmill_codec::{Codec, Unpacker};
use diskmill_format::vmdk::sesparse::{self, SeGrain};
use diskmill_format::vmdk::sparse::{self, GrainEntry};
use diskmill_format::vmdk::{
    CowdHeader, Marker, SECTOR_BYTES, SeSparseHeader, SparseGeometry, SparseHeader, marker,
};
use diskmill_format::{HostOffset, Limits};

use self::directory::Found;
use super::ExtentFile;
use crate::error::{Error, Kind, Result};
use crate::layout::{LayerExtent, LayerSource, MapError, Source};
use crate::reader::{read_exact, read_full};
use crate::tables::{SLICE, TableCache, Tables};

/// As many late warnings are kept for an extent; more would say nothing new.
const MAX_LATE: usize = 16;

/// One grain, or the directory's word on a whole table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grain {
    Unallocated,
    Zero,
    /// Byte offset in the file, of its marker where there is one.
    At(u64),
}

/// How grains are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packing {
    /// A marker with the size of the payload precedes it.
    markers: bool,
}

/// What the three kinds of sparse extents have of their own.
enum Kinds {
    /// `KDMV`.
    Hosted { zeroed_grains: bool, packing: Option<Packing>, overhead: u64, unclean: bool },
    /// `COWD`.
    Cowd,
    /// seSparse.
    Se(Box<SeSparseHeader>),
}

/// A sparse extent that grains can be added to.
pub(crate) struct Growable {
    /// Byte offset of the first grain.
    pub(crate) overhead: u64,
    /// An entry of 1 is a grain of zeros.
    pub(crate) zeroed_grains: bool,
    /// An earlier writer did not close the file.
    pub(crate) unclean: bool,
}

/// The two-level grain map of a sparse extent: directory → tables → grains.
pub(crate) struct GrainMap {
    file: ExtentFile,
    geometry: SparseGeometry,
    kind: Kinds,
    directory: u64,
    /// The redundant directory, if there is one within the file.
    redundant: Option<u64>,
    tables: Box<dyn Tables>,
    /// The tables are a writer's.
    followed: bool,
    /// A range of the file that is no hole.
    data: Mutex<Range<u64>>,
    /// Bytes in the file.
    len: Arc<AtomicU64>,
    /// Bytes that the last grain unpacks to, where the disk ends inside it: some writers pad it, some do not.
    last_unit: OnceLock<u32>,
    late: Mutex<Vec<String>>,
}

impl GrainMap {
    /// The map of a hosted sparse extent. `header` is the one that holds: the footer of a stream.
    pub(super) fn hosted(file: ExtentFile, header: &SparseHeader, limits: &Limits) -> Result<Self> {
        let geometry = header.geometry(limits)?;
        let packing = header.compressed().then_some(Packing { markers: header.markers() });
        let overhead = sector_offset(header.overhead, "sparse extent header")?;
        let zeroed_grains = header.zeroed_grains();
        let kind = Kinds::Hosted { zeroed_grains, packing, overhead, unclean: header.unclean_shutdown != 0 };
        let directory = sector_offset(header.gd_offset, "grain directory")?;
        let mut map = Self::new(file, geometry, kind, directory);
        map.redundant = match header.redundant_directory() {
            Ok(redundant) => redundant.filter(|&at| map.fits(at, map.directory_len())),
            Err(_) => None,
        };
        map.check_directory()?;
        Ok(map)
    }

    pub(super) fn cowd(file: ExtentFile, header: &CowdHeader, limits: &Limits) -> Result<Self> {
        let geometry = header.geometry(limits)?;
        let mut map = Self::new(file, geometry, Kinds::Cowd, header.directory_offset()?);
        map.check_directory()?;
        Ok(map)
    }

    pub(super) fn sesparse(file: ExtentFile, header: SeSparseHeader, limits: &Limits) -> Result<Self> {
        let geometry = header.geometry(limits)?;
        let directory = sector_offset(header.grain_directory.offset, "seSparse grain directory")?;
        let mut map = Self::new(file, geometry, Kinds::Se(Box::new(header)), directory);
        map.check_directory()?;
        Ok(map)
    }

    fn new(file: ExtentFile, geometry: SparseGeometry, kind: Kinds, directory: u64) -> Self {
        let tables = Box::new(TableCache::new(file.storage.clone(), file.len));
        Self {
            len: Arc::new(file.len.into()),
            file,
            geometry,
            kind,
            directory,
            redundant: None,
            tables,
            followed: false,
            data: Mutex::default(),
            last_unit: OnceLock::new(),
            late: Mutex::default(),
        }
    }

    /// From now on tables come from `tables`, and the file, whose length `len` keeps, is being written to.
    pub(crate) fn follow(&mut self, tables: Box<dyn Tables>, len: Arc<AtomicU64>) {
        self.tables = tables;
        self.followed = true;
        self.len = len;
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// What a writer must know of an extent that grains can be added to.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for the other kinds of sparse extents.
    pub(crate) fn growable(&self) -> Result<Growable> {
        match self.kind {
            Kinds::Hosted { zeroed_grains, packing: None, overhead, unclean } => {
                self.check_overhead(overhead)?;
                Ok(Growable { overhead, zeroed_grains, unclean })
            }
            Kinds::Hosted { .. } => Err(Error::unsupported("writing to a VMDK with compressed grains")),
            Kinds::Cowd => Err(Error::unsupported("writing to a COWD sparse extent")),
            Kinds::Se(_) => Err(Error::unsupported("writing to an seSparse extent")),
        }
    }

    pub(crate) const fn geometry(&self) -> SparseGeometry {
        self.geometry
    }

    pub(super) const fn compressed(&self) -> bool {
        matches!(self.kind, Kinds::Hosted { packing: Some(_), .. })
    }

    pub(crate) const fn file(&self) -> &ExtentFile {
        &self.file
    }

    /// Damage that reading gets around, as far as mapping has found it by now.
    pub(super) fn late_warnings(&self) -> Vec<String> {
        self.late.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn warn_late(&self, text: String) {
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        if late.len() < MAX_LATE && !late.contains(&text) {
            late.push(text);
        }
    }

    const fn entry_bytes(&self) -> u64 {
        match self.kind {
            Kinds::Se(_) => 8,
            _ => 4,
        }
    }

    /// Bytes of the directory that are in use. Not the padding: the file may end right there.
    const fn directory_len(&self) -> u64 {
        self.geometry.tables * self.entry_bytes()
    }

    pub(crate) const fn table_len(&self) -> u64 {
        self.geometry.table_entries * self.entry_bytes()
    }

    fn fits(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.len())
    }

    fn past_end(&self, what: &str, at: u64) -> Error {
        let len = self.len();
        Error::new(
            Kind::Corrupt,
            format!(
                "it points to {what} at {at:#x}, past the end of the file ({len} bytes): the image is truncated"
            ),
        )
    }

    /// Entries `from..` of the grain table at `at`, decoded.
    fn grains(
        &self,
        table: u64,
        at: u64,
        from: u64,
    ) -> Result<impl Iterator<Item = Result<Grain>> + use<'_>> {
        let slice = self
            .tables
            .slice(at, self.table_len())
            .map_err(|error| error.within(format!("grain table {table}"), at))?;
        Ok((from..self.geometry.table_entries).map(move |index| self.grain(&slice, table, at, index)))
    }

    fn grain(&self, slice: &[u8], table: u64, at: u64, index: u64) -> Result<Grain> {
        let size = self.entry_bytes();
        let raw = slice
            .get((index * size) as usize..)
            .and_then(|rest| rest.get(..size as usize))
            .unwrap_or_default();
        let decoded = match &self.kind {
            Kinds::Se(header) => {
                let entry = sesparse::table_entries(raw).next().unwrap_or(0);
                header.grain(entry).map(|grain| match grain {
                    SeGrain::Unallocated => Grain::Unallocated,
                    SeGrain::Unmapped | SeGrain::Zero => Grain::Zero,
                    SeGrain::Allocated(at) => Grain::At(at),
                })
            }
            Kinds::Hosted { zeroed_grains, .. } => Ok(hosted_grain(raw, *zeroed_grains)),
            Kinds::Cowd => Ok(hosted_grain(raw, false)),
        };
        let place = || (format!("grain table {table}, entry {index}"), at + index * size);
        match decoded {
            Ok(Grain::At(grain)) if grain >= self.len() => {
                let (structure, offset) = place();
                Err(self.past_end("a grain", grain).within(structure, offset))
            }
            Ok(grain) => Ok(grain),
            Err(error) => {
                let (structure, offset) = place();
                Err(Error::new(Kind::Corrupt, error.message).within(structure, offset))
            }
        }
    }

    /// Entry `index` of grain table `table`, or of its redundant copy if that one is damaged.
    fn grain_or_copy(&self, table: u64, at: u64, index: u64) -> Result<Grain> {
        let first = |at| match self.grains(table, at, index)?.next() {
            Some(grain) => grain,
            None => Err(Error::invalid("a grain outside its table")),
        };
        let error = match first(at) {
            Ok(grain) => return Ok(grain),
            Err(error) => error,
        };
        if let Some(directory) = self.redundant
            && let Ok(Some(copy)) = self.entry(directory, table)
            && copy != at
            && let Ok(grain) = first(copy)
        {
            self.warn_late(format!("grain table {table} is damaged; the redundant one is used"));
            return Ok(grain);
        }
        Err(error)
    }

    /// The redundant copy of the grain table at `at`, if that one is all zeros and the copy is sound and is not: writers
    /// fill both.
    fn copy_of_zeroed(&self, table: u64, at: u64) -> Option<u64> {
        let copy = self.entry(self.redundant?, table).ok()?.filter(|&copy| copy != at)?;
        let zeroed = |at| {
            let slice = self.tables.slice(at, self.table_len()).ok()?;
            Some(slice.iter().all(|&byte| byte == 0))
        };
        let lost = self.fits(copy, self.table_len()) && zeroed(at)? && !zeroed(copy)?;
        let sound = lost && self.grains(table, copy, 0).ok()?.all(|grain| grain.is_ok());
        sound.then_some(copy)
    }

    /// What the extent has at byte `at` of it.
    pub(super) fn map(&self, at: u64, max: u64) -> Result<LayerExtent, MapError> {
        let geometry = self.geometry;
        let Some((table, index, within)) = geometry.locate(at) else {
            // The descriptor gives the extent more sectors than the header: nobody can have written there.
            return Ok(LayerExtent { len: max, source: LayerSource::Unallocated });
        };
        let max = max.min(geometry.capacity_bytes - at);
        let in_table = at % geometry.table_coverage;
        let grain_left = geometry.grain_bytes - within;
        let left = geometry.table_coverage - in_table;
        let mut table_at = match self.look_up(table, in_table.saturating_add(max)) {
            Ok(Found::Table(at)) => at,
            Ok(Found::Empty(tables)) => {
                let len = (tables * geometry.table_coverage - in_table).min(max);
                return Ok(LayerExtent { len, source: LayerSource::Unallocated });
            }
            Err(error) => return Err(MapError { error, len: left.min(max) }),
        };
        let cut = |error| MapError { error, len: grain_left.min(max) };
        let mut first = self.grain_or_copy(table, table_at, index).map_err(cut)?;
        if first == Grain::Unallocated
            && let Some(copy) = self.copy_of_zeroed(table, table_at)
        {
            self.warn_late(
                "grain tables of zeros have a redundant copy with grains, which is used".to_owned(),
            );
            table_at = copy;
            first = self.grain_or_copy(table, table_at, index).map_err(cut)?;
        }
        if let (Grain::At(host), Kinds::Hosted { packing: Some(packing), .. }) = (first, &self.kind) {
            let number = at / geometry.grain_bytes;
            let source =
                self.packed(*packing, (table, table_at, index), number, host, within).map_err(cut)?;
            return Ok(LayerExtent { len: grain_left.min(max), source: LayerSource::Data(source) });
        }
        // Goes on over further grains of the same table.
        let mut len = grain_left;
        if len < max {
            for next in self.grains(table, table_at, index + 1).map_err(cut)? {
                let continues = match (first, next) {
                    (Grain::At(host), Ok(Grain::At(next))) => host.checked_add(within + len) == Some(next),
                    (first, Ok(next)) => first == next,
                    (_, Err(_)) => false,
                };
                if !continues || len >= max {
                    break;
                }
                len += geometry.grain_bytes;
            }
        }
        let len = len.min(max);
        Ok(match first {
            Grain::Unallocated => LayerExtent { len, source: LayerSource::Unallocated },
            Grain::Zero => LayerExtent { len, source: LayerSource::Zero(None) },
            Grain::At(host) => {
                let host = host.saturating_add(within);
                let Some(left) = self.len().checked_sub(host).filter(|&left| left > 0) else {
                    let place = format!("grain table {table}, entry {index}");
                    let error =
                        self.past_end("a grain", host).within(place, table_at + index * self.entry_bytes());
                    return Err(MapError { error, len: grain_left.min(max) });
                };
                let source = Source::Raw { file: self.file.id, at: HostOffset(host) };
                LayerExtent { len: len.min(left), source: LayerSource::Data(source) }
            }
        })
    }

    /// The payload of the compressed grain number `number` at `host`.
    fn packed(
        &self,
        packing: Packing,
        (table, table_at, index): (u64, u64, u64),
        number: u64,
        host: u64,
        within: u64,
    ) -> Result<Source> {
        let grain = self.geometry.grain_bytes;
        let lead = if packing.markers { marker::GRAIN_MARKER_BYTES } else { 0 };
        let place = format!("compressed grain {number}");
        let payload = host.saturating_add(lead);
        let Some(left) = self.len().checked_sub(payload).filter(|&left| left > 0) else {
            return Err(self.past_end("a compressed grain", host).within(place, host));
        };
        // In a stream the next grain follows, which bounds the payload without a read of its marker: each grain's
        // bytes are read once, with those of its neighbours.
        let next = self.grains(table, table_at, index + 1)?.find_map(|next| match next {
            Ok(Grain::At(next)) => Some(next),
            _ => None,
        });
        let gap =
            next.and_then(|next| next.checked_sub(payload)).filter(|&gap| gap > 0 && gap <= grain + SLICE);
        let most = match gap {
            Some(gap) => gap,
            None if packing.markers => u64::from(self.marker_size(number, host)?),
            // QEMU's limit.
            None => grain.saturating_mul(2),
        };
        let len = most.min(left) as u32;
        let mut source = Source::Packed {
            file: self.file.id,
            at: HostOffset(payload),
            len,
            unit: grain as u32,
            skip: within as u32,
            codec: Codec::Zlib,
        };
        let wanted = self.geometry.grain_len(number);
        if wanted < grain {
            let real = self.last_unit(payload, len, wanted).map_err(|error| error.within(place, host))?;
            if let Source::Packed { unit, .. } = &mut source {
                *unit = real;
            }
        }
        Ok(source)
    }

    fn marker_size(&self, number: u64, host: u64) -> Result<u32> {
        let place = || format!("marker of compressed grain {number}");
        let mut bytes = [0; 16];
        let got = read_full(&*self.file.storage, &mut bytes, host)?;
        let marker = Marker::parse(bytes.get(..got).unwrap_or_default()).map_err(Error::from)?;
        marker.check_size(self.geometry.grain_bytes).map_err(Error::from)?;
        match marker {
            Marker::Grain { lba, size } => {
                if lba.checked_mul(SECTOR_BYTES) != number.checked_mul(self.geometry.grain_bytes) {
                    self.warn_late(format!(
                        "the marker of grain {number} says guest sector {lba}; the grain table is followed"
                    ));
                }
                Ok(size)
            }
            _ => Err(Error::corrupt(
                place(),
                Some(host),
                "the grain table points to a marker that is no grain's",
            )),
        }
    }

    /// Bytes that the payload of the last grain unpacks to, found out by doing it.
    fn last_unit(&self, payload: u64, len: u32, wanted: u64) -> Result<u32> {
        if let Some(unit) = self.last_unit.get() {
            return Ok(*unit);
        }
        let mut packed = vec![0; len as usize];
        read_exact(&*self.file.storage, &mut packed, payload)?;
        let mut unit = vec![0; self.geometry.grain_bytes as usize];
        let got = match Unpacker::new().unpack(Codec::Zlib, &packed, &mut unit) {
            Err(diskmill_codec::Error::WrongLength { got, .. }) if got as u64 >= wanted => got,
            // Damage is reported by whoever reads the grain.
            _ => unit.len(),
        };
        Ok(*self.last_unit.get_or_init(|| got as u32))
    }
}

fn hosted_grain(raw: &[u8], zeroed_grains: bool) -> Grain {
    match GrainEntry::new(sparse::table_entries(raw).next().unwrap_or(0), zeroed_grains) {
        GrainEntry::Unallocated => Grain::Unallocated,
        GrainEntry::Zero => Grain::Zero,
        GrainEntry::Sector(sector) => Grain::At(u64::from(sector) * SECTOR_BYTES),
    }
}

/// `sectors` in bytes.
fn sector_offset(sectors: u64, structure: &str) -> Result<u64> {
    sectors
        .checked_mul(SECTOR_BYTES)
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(|| Error::corrupt(structure, None, format!("sector {sectors} lies beyond 2^63 bytes")))
}
