//! Writing to VMDKs: flat and hosted sparse extents.

mod cid;
mod tables;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use diskmill_format::{HostOffset, Limits};

use self::cid::DescriptorPlace;
pub(crate) use self::cid::follow_parent;
use self::tables::GrainTables;
use super::disk::Disk;
use super::ranges::{RangeGuard, RangeLocks};
use super::{Preallocation, Writer, ZeroHow};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::layout::{FileId, FormatInfo, LayerSource, Layout, Source};
use crate::raw::FileRuns;
use crate::vmdk::{ExtentFile, GrainMap, Growable, Part, PartSource, VmdkLayout};

/// Guest bytes that are written at once.
const CHUNK: u64 = 4 << 20;
/// Zeros that are written at once.
const ZEROS: u64 = 1 << 20;
/// The entry of a grain of zeros.
const ZEROED: u32 = 1;

/// An open VMDK that can be written to.
///
/// Locks, in the order in which they are taken: a range of guest grains, then the tables of one extent. Grains are added
/// behind all others and never move or go; so data may be written where it is under a shared lock.
pub(crate) struct VmdkWriter {
    ranges: RangeLocks,
    /// In guest order and without gaps.
    extents: Vec<Extent>,
    disks: Vec<Arc<Disk>>,
    /// Until the first write.
    descriptor: Mutex<Option<DescriptorPlace>>,
    /// Unallocated grains show a parent.
    backed: bool,
}

struct Extent {
    guest: Range<u64>,
    place: Place,
}

enum Place {
    /// Writing is refused for this reason.
    Closed(&'static str),
    Flat {
        disk: Arc<Disk>,
        offset: u64,
    },
    Sparse(Box<Sparse>),
}

struct Sparse {
    map: Arc<GrainMap>,
    tables: Arc<GrainTables>,
    /// First byte that a grain may have.
    overhead: u64,
    zeroed_grains: bool,
}

impl VmdkWriter {
    /// Prepares the disk for writing; `layout` shows what is written from then on. `own` is the file that the user named.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for extents that cannot be written to.
    pub(crate) fn open(
        layout: &mut VmdkLayout,
        own: &ExtentFile,
        backed: bool,
        limits: &Limits,
    ) -> Result<Self> {
        refuse_tracking(layout)?;
        let mut disks: HashMap<FileId, Arc<Disk>> = HashMap::new();
        let mut disk_of = |file: &ExtentFile| -> Result<Arc<Disk>> {
            if let Some(disk) = disks.get(&file.id) {
                return Ok(Arc::clone(disk));
            }
            let disk = Arc::new(Disk::new(Arc::clone(&file.storage))?);
            disks.insert(file.id, Arc::clone(&disk));
            Ok(disk)
        };
        let mut extents = Vec::with_capacity(layout.parts.len());
        for part in &mut layout.parts {
            let place = match &mut part.source {
                _ if part.read_only => Place::Closed("the descriptor says that it is read-only"),
                PartSource::Zero => Place::Closed("it has no file"),
                PartSource::Closed => Place::Closed("it is not open"),
                PartSource::Flat { runs, offset, file } => {
                    let disk = disk_of(file)?;
                    *runs = FileRuns::changing(Arc::clone(&file.storage), file.id, disk.shared_len());
                    Place::Flat { disk, offset: *offset }
                }
                PartSource::Sparse(map) => {
                    let growable = map.growable()?;
                    let disk = disk_of(map.file())?;
                    let len = disk.shared_len();
                    let tables = Arc::new(GrainTables::new(disk, &growable, map.geometry().grain_bytes)?);
                    let own = Arc::get_mut(map).ok_or_else(|| Error::invalid("a grain map in use"))?;
                    own.follow(Box::new(Arc::clone(&tables)), len);
                    let Growable { overhead, zeroed_grains, .. } = growable;
                    let sparse = Sparse { map: Arc::clone(map), tables, overhead, zeroed_grains };
                    Place::Sparse(Box::new(sparse))
                }
            };
            let Part { start, len, .. } = *part;
            extents.push(Extent { guest: start..start.saturating_add(len), place });
        }
        let descriptor = DescriptorPlace::find(disk_of(own)?, limits)?;
        Ok(Self {
            ranges: RangeLocks::default(),
            extents,
            disks: disks.into_values().collect(),
            descriptor: Mutex::new(descriptor),
            backed,
        })
    }

    /// The extent in which `at` lies.
    fn extent(&self, at: u64) -> Result<&Extent> {
        let index = self.extents.partition_point(|extent| extent.guest.end <= at);
        self.extents.get(index).ok_or_else(|| Error::invalid("an offset past all extents"))
    }

    /// What comes before the first write.
    fn begin(&self) -> Result<()> {
        let mut descriptor = self.descriptor.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = &*descriptor {
            place.renew()?;
            *descriptor = None;
        }
        Ok(())
    }

    /// Cuts `range` at the borders of extents and of chunks, which are borders of grains too.
    fn parts(&self, range: Range<u64>) -> impl Iterator<Item = Result<(&Extent, Range<u64>)>> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= range.end {
                return None;
            }
            let extent = match self.extent(at) {
                Ok(extent) => extent,
                Err(error) => {
                    at = range.end;
                    return Some(Err(error));
                }
            };
            let chunk = match &extent.place {
                Place::Sparse(sparse) => CHUNK.next_multiple_of(sparse.map.geometry().grain_bytes),
                _ => CHUNK,
            };
            let within = at - extent.guest.start;
            let end = (at + (chunk - within % chunk)).min(extent.guest.end).min(range.end);
            let part = at..end;
            at = end;
            Some(Ok((extent, part)))
        })
    }

    fn write_sparse(
        &self,
        image: &Image,
        extent: &Extent,
        sparse: &Sparse,
        buf: &[u8],
        at: u64,
    ) -> Result<()> {
        let range = at..at.saturating_add(buf.len() as u64);
        // Most writes go where data already is: they need not keep each other out.
        {
            let _shared = self.ranges.lock(range.clone(), false);
            let pieces = sparse.pieces(image, extent, range.clone())?;
            if pieces.iter().all(|piece| piece.host.is_some()) {
                return pieces.iter().try_for_each(|piece| sparse.put(piece, buf, at));
            }
        }
        let grains = sparse.whole_grains(extent, &range);
        let _exclusive = self.ranges.lock(grains, true);
        sparse.tables.relieve()?;
        for piece in sparse.pieces(image, extent, range.clone())? {
            match piece.host {
                Some(_) => sparse.put(&piece, buf, at)?,
                None => sparse.add(image, extent, &piece, buf, at)?,
            }
        }
        Ok(())
    }

    fn zero_sparse(
        &self,
        image: &Image,
        extent: &Extent,
        sparse: &Sparse,
        range: Range<u64>,
        how: ZeroHow,
    ) -> Result<()> {
        let mut plainly = Vec::new();
        {
            let grains = sparse.whole_grains(extent, &range);
            let _exclusive = self.ranges.lock(grains, true);
            sparse.tables.relieve()?;
            for piece in sparse.pieces(image, extent, range)? {
                let guest = piece.guest.clone();
                match (piece.host, piece.zero) {
                    (Some(host), _) => {
                        let keep = how == ZeroHow::KeepAllocated;
                        sparse.tables.disk().zero(host, guest.end - guest.start, keep)?;
                    }
                    (None, true) => {}
                    (None, false) if !self.backed => {}
                    (None, false) => {
                        let whole = sparse.inner_grains(extent, &guest);
                        if sparse.zeroed_grains && !whole.is_empty() {
                            let first = (whole.start - extent.guest.start) / sparse.grain();
                            let count = (whole.end - whole.start).div_ceil(sparse.grain());
                            sparse.tables.set(&sparse.map, first, (0..count).map(|_| ZEROED))?;
                            plainly.push(guest.start..whole.start);
                            plainly.push(whole.end..guest.end);
                        } else {
                            plainly.push(guest);
                        }
                    }
                }
            }
        }
        for range in plainly {
            let mut at = range.start;
            while at < range.end {
                let zeros = vec![0; (range.end - at).min(ZEROS) as usize];
                self.write_sparse(image, extent, sparse, &zeros, at)?;
                at += zeros.len() as u64;
            }
        }
        Ok(())
    }
}

/// A run of guest bytes that stand in one place.
struct Piece {
    guest: Range<u64>,
    /// Where they stand; `None` for grains that are not there.
    host: Option<u64>,
    /// They read as zeros, whatever a parent holds.
    zero: bool,
}

impl Sparse {
    fn grain(&self) -> u64 {
        self.map.geometry().grain_bytes
    }

    /// The grains that `range` touches.
    fn whole_grains(&self, extent: &Extent, range: &Range<u64>) -> Range<u64> {
        let (base, grain) = (extent.guest.start, self.grain());
        let start = (range.start - base) / grain * grain;
        let end = (range.end - base).next_multiple_of(grain);
        base + start..base.saturating_add(end)
    }

    /// The grains that lie in `range` as a whole; the last one of the extent may be short.
    fn inner_grains(&self, extent: &Extent, range: &Range<u64>) -> Range<u64> {
        let (base, grain) = (extent.guest.start, self.grain());
        let start = base + (range.start - base).next_multiple_of(grain);
        let end = match range.end == extent.guest.end {
            true => range.end,
            false => base + (range.end - base) / grain * grain,
        };
        if start < end { start..end } else { range.start..range.start }
    }

    /// Where the bytes of `range` stand now.
    fn pieces(&self, image: &Image, extent: &Extent, range: Range<u64>) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let found = image.map_top(at, range.end - at).map_err(|error| error.error)?;
            let guest = at..at + found.len.clamp(1, range.end - at);
            at = guest.end;
            let (host, zero) = match found.source {
                LayerSource::Unallocated | LayerSource::Reserved(_) => (None, false),
                LayerSource::Zero(_) => (None, true),
                LayerSource::Data(Source::Raw { at: host, .. }) => (Some(self.guard(host)?), false),
                LayerSource::Data(_) => return Err(Error::invalid("a packed grain in a plain extent")),
            };
            pieces.push(Piece { guest, host, zero });
        }
        // The header may give the extent fewer bytes than the descriptor: there is no place for what lies behind.
        let capacity = extent.guest.start.saturating_add(self.map.geometry().capacity_bytes);
        match pieces.iter().find(|piece| piece.guest.end > capacity) {
            Some(_) => Err(Error::corrupt(
                "sparse extent header",
                None,
                "its capacity is smaller than the extent: there is no place for what is written",
            )),
            None => Ok(pieces),
        }
    }

    /// Refuses to let the guest write into the extent's own metadata.
    fn guard(&self, host: HostOffset) -> Result<u64> {
        if host.get() < self.overhead {
            let why = "an entry points into the extent's own metadata: the image is damaged";
            return Err(Error::corrupt("grain table", Some(host.get()), why));
        }
        Ok(host.get())
    }

    /// Writes the bytes of a piece that has a place; `buf` begins at guest offset `at`.
    fn put(&self, piece: &Piece, buf: &[u8], at: u64) -> Result<()> {
        let Some(host) = piece.host else { return Ok(()) };
        self.tables.disk().write(part(buf, at, &piece.guest), host)
    }

    /// Adds the grains of a piece that has no place.
    fn add(&self, image: &Image, extent: &Extent, piece: &Piece, buf: &[u8], at: u64) -> Result<()> {
        let guest = self.whole_grains(extent, &piece.guest);
        let host = self.tables.allocate(guest.end - guest.start)?;
        // Around what is written the new grains hold what the guest sees now.
        let around = |range: Range<u64>| -> Result<Vec<u8>> {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            let inside = extent.guest.end.min(range.end).saturating_sub(range.start) as usize;
            if let Some(bytes) = bytes.get_mut(..inside) {
                image.read_unlocked(bytes, range.start)?;
            }
            Ok(bytes)
        };
        let (head, tail) = (around(guest.start..piece.guest.start)?, around(piece.guest.end..guest.end)?);
        let body = part(buf, at, &piece.guest);
        if head.is_empty() && tail.is_empty() {
            self.tables.disk().write_fresh(body, host)?;
        } else {
            self.tables.disk().write_fresh(&[&head, body, &tail].concat(), host)?;
        }
        let first = (guest.start - extent.guest.start) / self.grain();
        let step = self.grain();
        let hosts = (host..host.saturating_add(guest.end - guest.start)).step_by(step as usize);
        // `allocate` has seen to it that sectors fit.
        self.tables.set(&self.map, first, hosts.map(|host| (host / 512) as u32))
    }
}

/// Refuses a disk whose changed blocks are recorded for backups: they would miss what we write.
fn refuse_tracking(layout: &VmdkLayout) -> Result<()> {
    let FormatInfo::Vmdk(info) = &layout.info().specific else { return Ok(()) };
    let mut entries = info.descriptor.iter().flat_map(|descriptor| &descriptor.other);
    match entries.any(|entry| entry.key.eq_ignore_ascii_case(b"changeTrackPath")) {
        false => Ok(()),
        true => Err(Error::unsupported("recording writes in a change tracking file (changeTrackPath)")
            .hint("convert the disk and work on the copy")),
    }
}

/// The bytes of `guest` in `buf`, which begins at `at`.
fn part<'b>(buf: &'b [u8], at: u64, guest: &Range<u64>) -> &'b [u8] {
    let (start, end) = (guest.start.saturating_sub(at) as usize, guest.end.saturating_sub(at) as usize);
    buf.get(start..end).unwrap_or_default()
}

fn closed(extent: &Extent, why: &str) -> Error {
    Error::new(
        Kind::Unsupported,
        format!("the extent at guest offset {:#x} is not written to: {why}", extent.guest.start),
    )
}

impl Writer for VmdkWriter {
    fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.ranges.lock(range, false)
    }

    fn write(&self, image: &Image, buf: &[u8], at: u64) -> Result<()> {
        self.begin()?;
        for step in self.parts(at..at.saturating_add(buf.len() as u64)) {
            let (extent, range) = step?;
            let bytes = part(buf, at, &range);
            match &extent.place {
                Place::Closed(why) => return Err(closed(extent, why)),
                Place::Flat { disk, offset } => {
                    disk.write(bytes, offset.saturating_add(range.start - extent.guest.start))?;
                }
                Place::Sparse(sparse) => {
                    sparse.tables.begin()?;
                    self.write_sparse(image, extent, sparse, bytes, range.start)?;
                }
            }
        }
        Ok(())
    }

    fn zero(&self, image: &Image, range: Range<u64>, how: ZeroHow) -> Result<()> {
        self.begin()?;
        for step in self.parts(range) {
            let (extent, range) = step?;
            match &extent.place {
                // It reads as zeros already.
                Place::Closed(_) if image.reads_as_zeros(range.clone())? => {}
                Place::Closed(why) => return Err(closed(extent, why)),
                Place::Flat { disk, offset } => {
                    let at = offset.saturating_add(range.start - extent.guest.start);
                    // The file is as long as the extent, or the disk would not have been readable.
                    disk.zero(at, range.end - range.start, how == ZeroHow::KeepAllocated)?;
                }
                Place::Sparse(sparse) => {
                    sparse.tables.begin()?;
                    self.zero_sparse(image, extent, sparse, range, how)?;
                }
            }
        }
        Ok(())
    }

    fn discard(&self, image: &Image, range: Range<u64>) -> Result<()> {
        for step in self.parts(range) {
            let (extent, range) = step?;
            match &extent.place {
                Place::Closed(_) => {}
                // A device may return anything afterwards, and zeroing it instead may take for ever.
                Place::Flat { disk, .. } if disk.storage().is_block_device() => {}
                Place::Flat { disk, offset } => {
                    self.begin()?;
                    let at = offset.saturating_add(range.start - extent.guest.start);
                    disk.zero(at, range.end - range.start, false)?;
                }
                Place::Sparse(sparse) => {
                    let whole = sparse.inner_grains(extent, &range);
                    let _exclusive = self.ranges.lock(whole.clone(), true);
                    for piece in sparse.pieces(image, extent, whole)? {
                        if let Some(host) = piece.host {
                            self.begin()?;
                            sparse.tables.begin()?;
                            let len = piece.guest.end - piece.guest.start;
                            sparse.tables.disk().zero(host, len, false)?;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        for extent in &self.extents {
            if let Place::Sparse(sparse) = &extent.place {
                sparse.tables.commit()?;
            }
        }
        self.disks.iter().try_for_each(|disk| disk.sync())
    }

    fn close(&self) -> Result<()> {
        self.flush()?;
        for extent in &self.extents {
            if let Place::Sparse(sparse) = &extent.place {
                sparse.tables.end()?;
            }
        }
        Ok(())
    }

    fn resize(&self, _size: u64, _how: Preallocation) -> Result<Box<dyn Layout>> {
        // Nor does QEMU: the sizes stand in many places, which no order of writes changes at once.
        Err(Error::unsupported("changing the size of a VMDK")
            .hint("create a disk of the new size and write the old one into it with convert -n"))
    }
}
