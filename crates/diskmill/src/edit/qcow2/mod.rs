//! Writing to qcow2 images.

mod amend;
mod backing;
mod bitmaps;
mod cache;
mod extension;
mod guest;
mod meta;
mod packed;
mod recorder;
mod refcounts;
mod resize;
mod snapshots;
mod tables;
mod width;

use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskmill_format::qcow2::{CryptMethod, HeaderArea, feature};
use diskmill_format::{HostOffset, Limits};
use diskmill_io::SharedStorage;

use super::disk::Disk;
use super::ranges::{RangeGuard, RangeLocks};
use super::{Payloads, Writer, ZeroHow};
use crate::encrypted::LegacyAes;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::layout::{FileId, Layout};
use crate::qcow2::{FileLen, Files, Qcow2Info, Qcow2Layout};
use crate::tables::{SLICE, Tables};
pub(crate) use bitmaps::{add_bitmaps, check as check_bitmap, find as find_bitmap};
use meta::Meta;
use recorder::Recorder;

/// An open qcow2 image that can be written to.
///
/// Locks, in the order in which they are taken: a range of guest clusters (`ranges`), then the metadata (`meta`), then
/// the dirty bitmaps (`recorder`). Guest
/// data moves under the range alone; the metadata is locked to look places up, and again to publish them. So an entry
/// only ever points to bytes that were written before, and the barriers of a commit cover them.
pub(crate) struct Qcow2Writer {
    disk: Arc<Disk>,
    /// Where plain guest clusters are: the external data file, or the image itself; encrypted on the way if need be.
    data: Arc<Disk>,
    /// Only whole sectors can be written: a part of one needs the rest of it, and nobody else at work on that.
    encrypted: bool,
    /// Legacy AES encryption, which goes by guest offsets.
    aes: Option<LegacyAes>,
    ranges: RangeLocks,
    meta: Mutex<Meta>,
    /// How many packed payloads were written: what a reader has unpacked may be gone when there are more.
    payloads: AtomicU64,
    recorder: Recorder,
    /// Unallocated clusters show a backing file.
    backed: bool,
    /// Guest clusters are in an external data file.
    external: bool,
    /// That must be a valid raw image by itself.
    raw_data: bool,
    /// The image file, and the external data file.
    ids: (FileId, Option<FileId>),
}

impl Qcow2Writer {
    /// Prepares the image for writing. `data` is where plain guest clusters are, if not in the file as they are; `aes` is
    /// for an image with legacy AES encryption.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for what would be damaged by writing; [`Kind::Corrupt`] for an image that is.
    pub(crate) fn open(
        (file, id): (&SharedStorage, FileId),
        data: Option<(&SharedStorage, FileId)>,
        aes: Option<LegacyAes>,
        info: &Qcow2Info,
        limits: &Limits,
    ) -> Result<Self> {
        refuse(info)?;
        let area: HeaderArea = info.area.clone();
        let header = &area.header;
        let (backed, raw_data) =
            (area.backing_name.is_some(), header.autoclear & feature::RAW_DATA_FILE != 0);
        let disk = Arc::new(Disk::new(Arc::clone(file))?);
        let ids = (id, data.map(|(_, id)| id));
        let external = header.has(feature::DATA_FILE);
        let encrypted = header.crypt != CryptMethod::None;
        let seen = |(data, _): (&SharedStorage, _)| match external {
            true => Disk::new(Arc::clone(data)),
            false => Ok(disk.seen_through(Arc::clone(data))),
        };
        let data = data.map(seen).transpose()?.map(Arc::new);
        let outside = data.clone().filter(|_| external);
        let mut meta = Meta::open(Arc::clone(&disk), outside, area, limits.clone())?;
        meta.clear_unknown_features()?;
        let recorder = Recorder::default();
        recorder.load(&meta)?;
        Ok(Self {
            external,
            recorder,
            data: data.unwrap_or_else(|| Arc::clone(&disk)),
            encrypted,
            aes,
            disk,
            ranges: RangeLocks::default(),
            meta: Mutex::new(meta),
            payloads: AtomicU64::new(0),
            backed,
            raw_data,
            ids,
        })
    }

    /// The active state as it is now, for reading. To be made anew when the header has changed.
    pub(crate) fn layout(self: &Arc<Self>) -> Result<Box<dyn Layout>> {
        let info = {
            let meta = self.meta();
            Qcow2Info::read(&**meta.disk.storage(), &meta.limits)?
        };
        let files = Files {
            tables: Box::new(Arc::clone(self)),
            image: FileLen::new(self.ids.0, self.disk.shared_len()),
            data: self.ids.1.map(|id| FileLen::new(id, self.data.shared_len())),
        };
        let layout = Qcow2Layout::new(info, files, None)?;
        Ok(match &self.aes {
            Some(aes) => Box::new(aes.decrypt(layout)),
            None => Box::new(layout),
        })
    }

    fn meta(&self) -> MutexGuard<'_, Meta> {
        self.meta.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses an image that must not be written to as it is.
fn refuse(info: &Qcow2Info) -> Result<()> {
    if info.corrupt {
        return Err(Error::new(Kind::Corrupt, "the image is marked as corrupt: it is not written to")
            .hint("`check -r all` repairs it and clears the mark"));
    }
    if info.dirty {
        return Err(Error::unsupported("writing to an image whose refcounts are out of date (dirty bit)")
            .hint("`check -r all` brings them up to date"));
    }
    Ok(())
}

impl Tables for Qcow2Writer {
    fn slice(&self, at: u64, _len: u64) -> Result<Arc<[u8]>> {
        let mut meta = self.meta();
        let l1 = meta.active();
        let end = l1.offset.saturating_add(u64::from(l1.entries) * 8);
        let len = match (l1.offset..end).contains(&at) {
            true => SLICE.min(end - at),
            false => meta.slice_size(),
        };
        let Meta { cache, disk, .. } = &mut *meta;
        cache.get(disk, at, len, cache::Class::Mapping)
    }
}

impl Writer for Arc<Qcow2Writer> {
    fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.ranges.lock(range, false)
    }

    fn write(&self, image: &Image, buf: &[u8], at: u64) -> Result<()> {
        self.recorder.record(&self.disk, &(at..at.saturating_add(buf.len() as u64)))?;
        self.write_guest(image, buf, at)
    }

    fn write_packed(&self, image: &Image, buf: &[u8], at: u64, payloads: &Payloads) -> Result<()> {
        self.recorder.record(&self.disk, &(at..at.saturating_add(buf.len() as u64)))?;
        self.write_packed_guest(image, buf, at, payloads)
    }

    fn zero(&self, image: &Image, range: Range<u64>, how: ZeroHow) -> Result<()> {
        self.recorder.record(&self.disk, &range)?;
        self.zero_guest(image, range, how)
    }

    fn discard(&self, image: &Image, range: Range<u64>) -> Result<()> {
        self.recorder.record(&self.disk, &range)?;
        self.discard_guest(image, range)
    }

    fn qcow2(&self) -> Option<&Arc<Qcow2Writer>> {
        Some(self)
    }

    fn flush(&self) -> Result<()> {
        let mut meta = self.meta();
        meta.commit()?;
        meta.sync()
    }

    fn close(&self) -> Result<()> {
        let mut meta = self.meta();
        // What cannot be saved stays marked as in use; the image itself is closed all the same.
        let saved = self.recorder.save(&mut meta);
        meta.close().and(saved)
    }
}

/// The host offset `host` moved by `bytes`.
fn moved(host: HostOffset, bytes: u64) -> u64 {
    host.get().saturating_add(bytes)
}
