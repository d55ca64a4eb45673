//! Persistent dirty bitmaps of an image: which parts of the guest's disk were written since.

use std::ops::Range;

use diskmill_format::qcow2::{BITMAP_GRANULARITY_BITS, Geometry, Header, MAX_BITMAP_NAME};
use diskmill_format::{HostOffset, Limits};
use diskmill_io::SharedStorage;

use super::qcow2::{check_bitmap, find_bitmap};
use crate::error::{Error, Kind, Result};
use crate::image::{Image, ImageFile};
use crate::layout::FormatInfo;
use crate::qcow2::{Bitmap, Bits, Qcow2Info, StoredBits, read_bitmaps};

/// What a bitmap says of the guest's disk.
#[derive(Debug, Clone)]
pub struct DirtyBits {
    bits: Bits,
    granularity: u64,
    size: u64,
}

impl DirtyBits {
    /// Guest bytes that one bit stands for.
    #[must_use]
    pub const fn granularity(&self) -> u64 {
        self.granularity
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The ranges of guest bytes that are marked, in order; they do not touch.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.bits.runs().map(|run| {
            run.start.saturating_mul(self.granularity)
                ..run.end.saturating_mul(self.granularity).min(self.size)
        })
    }
}

impl Image {
    /// The persistent bitmaps of the image itself, in the order of its directory; none for other formats than qcow2, and
    /// none where the image says that they are out of date.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] or [`Kind::Limit`] for a damaged directory; [`Kind::Io`].
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        match (&self.info().specific, self.files().first()) {
            (FormatInfo::Qcow2(info), Some(file)) => {
                self.named(read_bitmaps(info, &*file.storage, &Limits::default()))
            }
            _ => Ok(Vec::new()),
        }
    }

    /// What the bitmap called `name` says. In an image that is open for writing: with all that was written until now.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if there is none such; [`Kind::Corrupt`] if it is damaged or was not saved;
    /// [`Kind::Limit`], [`Kind::Io`].
    pub fn dirty_bits(&self, name: &str) -> Result<DirtyBits> {
        let bitmaps = self.bitmaps()?;
        self.dirty_bits_of(self.named(find_bitmap(&bitmaps, name.as_bytes()))?)
    }

    /// As [`dirty_bits`](Self::dirty_bits), of one of the [`bitmaps`](Self::bitmaps): names need not be UTF-8.
    ///
    /// # Errors
    /// As [`dirty_bits`](Self::dirty_bits).
    pub fn dirty_bits_of(&self, bitmap: &Bitmap) -> Result<DirtyBits> {
        let found = match self.writer().and_then(|writer| writer.qcow2()) {
            Some(writer) => writer.dirty_bits(&bitmap.name),
            None => self.saved_bits(bitmap),
        };
        let bits = self.named(found)?;
        Ok(DirtyBits { bits, granularity: bitmap.granularity(), size: self.info().virtual_size })
    }

    fn saved_bits(&self, bitmap: &Bitmap) -> Result<Bits> {
        check_bitmap(bitmap)?;
        let (header, file) = self.with_bitmaps()?;
        Bits::read(&*file.storage, bitmap, header.geometry, header.size, &Limits::default())
    }

    fn with_bitmaps(&self) -> Result<(&Header, &ImageFile)> {
        match (&self.info().specific, self.files().first()) {
            (FormatInfo::Qcow2(info), Some(file)) => Ok((&info.area.header, file)),
            _ => Err(Error::invalid("an image without bitmaps")),
        }
    }

    /// One of the [`bitmaps`](Self::bitmaps), to be copied into another image. In an image that is open for writing: with
    /// all that was written until now.
    pub(crate) fn bitmap_to_copy(&self, bitmap: Bitmap) -> Result<BitmapCopy> {
        let copy = || {
            if let Some(writer) = self.writer().and_then(|writer| writer.qcow2()) {
                writer.save_bitmaps()?;
            }
            check_bitmap(&bitmap)?;
            let (header, file) = self.with_bitmaps()?;
            let file = ImageFile { storage: file.storage.clone(), path: file.path.clone() };
            Ok(BitmapCopy { bitmap, file, geometry: header.geometry, size: header.size })
        };
        self.named(copy())
    }

    /// Adds a bitmap without marks. `granularity` is in bytes, a power of 2 from 512 to 2^31; by default it is the
    /// cluster size, but at least 4 KiB and at most 64 KiB, as in QEMU. An `enabled` one records the guest's writes from
    /// now on.
    ///
    /// This and the other changes of bitmaps are durable when they return. A crash leaves the bitmaps as they were before
    /// or as they are after, or else (only where there was none before, is none after, or the header was written by
    /// somebody who placed it so) no bitmap; guest data is never affected.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a name that is empty, too long or taken, and for a bad granularity; [`Kind::Limit`] if the
    /// bitmap would take more than 512 MiB; [`Kind::Unsupported`] for other images than qcow2 of version 3.
    pub fn add_bitmap(&mut self, name: &str, granularity: Option<u64>, enabled: bool) -> Result<()> {
        let cluster = self.info().cluster_size.unwrap_or(u64::MAX);
        let granularity = granularity.unwrap_or_else(|| cluster.clamp(4 << 10, 64 << 10));
        let invalid = |why: &str| Err(Error::invalid(why));
        // The words are QEMU's.
        if name.is_empty() {
            return self.named(invalid("Bitmap name cannot be empty"));
        }
        if name.len() > MAX_BITMAP_NAME {
            return self.named(invalid("Bitmap name is too long"));
        }
        let bits = granularity.trailing_zeros() as u8;
        if !granularity.is_power_of_two() || !BITMAP_GRANULARITY_BITS.contains(&bits) {
            let error = Error::invalid("Granularity must be power of 2 and at least 512");
            return self.named(Err(error.hint(format!("{granularity} is not; the largest is 2147483648"))));
        }
        let bitmap = Bitmap {
            name: name.as_bytes().to_vec(),
            table_offset: HostOffset(0),
            table_size: 0,
            in_use: false,
            auto: enabled,
            extra_compatible: false,
            granularity_bits: bits,
            extra: Vec::new(),
        };
        self.edit_qcow2(WHAT, |writer| writer.add_bitmaps(std::iter::once(Ok((bitmap, Bits::default())))))
    }

    /// Adds bitmaps with what they mark, all at once.
    pub(crate) fn copy_bitmaps(&mut self, bitmaps: &[BitmapCopy]) -> Result<()> {
        if bitmaps.is_empty() {
            return Ok(());
        }
        let size = self.info().virtual_size;
        self.edit_qcow2(WHAT, |writer| writer.add_bitmaps(bitmaps.iter().map(|copy| copy.open(size))))
    }

    /// Removes a bitmap. What a damaged one takes may be leaked.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if there is none such.
    pub fn remove_bitmap(&mut self, name: &str) -> Result<()> {
        self.edit_qcow2(WHAT, |writer| writer.remove_bitmap(name))
    }

    /// Takes all marks out of a bitmap.
    ///
    /// # Errors
    /// As [`dirty_bits`](Self::dirty_bits).
    pub fn clear_bitmap(&mut self, name: &str) -> Result<()> {
        self.edit_qcow2(WHAT, |writer| writer.change_bits(name, |_, _| Bits::default()))
    }

    /// Whether the guest's writes are recorded in a bitmap.
    ///
    /// # Errors
    /// As [`dirty_bits`](Self::dirty_bits).
    pub fn enable_bitmap(&mut self, name: &str, enabled: bool) -> Result<()> {
        self.edit_qcow2(WHAT, |writer| writer.enable_bitmap(name, enabled))
    }

    /// Adds the marks of another bitmap, of this image or another one, whose granularity may be another.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the disks differ in size; as [`dirty_bits`](Self::dirty_bits).
    pub fn merge_bitmap(&mut self, name: &str, source: &DirtyBits) -> Result<()> {
        let size = self.info().virtual_size;
        self.named(check_size(source.size, size))?;
        self.edit_qcow2(WHAT, |writer| {
            writer.change_bits(name, |bitmap, mut bits| {
                let granularity = bitmap.granularity();
                for range in source.ranges() {
                    bits.set(range.start / granularity..range.end.div_ceil(granularity));
                }
                bits
            })
        })
    }
}

/// A bitmap of an image that is to be copied into another one. Its bits are read when they are written: there may be many
/// such bitmaps, and little in the image may say of each that it is large.
pub(crate) struct BitmapCopy {
    bitmap: Bitmap,
    /// Of the image that it is in.
    file: ImageFile,
    geometry: Geometry,
    size: u64,
}

impl BitmapCopy {
    /// Bytes that the image has for it.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for a damaged table; [`Kind::Limit`]; [`Kind::Io`].
    pub(crate) fn stored_bytes(&self) -> Result<u64> {
        self.bits()?.stored_bytes()
    }

    /// The new bitmap for a disk of `size` bytes, and its bits.
    fn open(&self, size: u64) -> Result<(Bitmap, StoredBits)> {
        check_size(self.size, size)?;
        let bitmap = Bitmap { extra: Vec::new(), extra_compatible: false, ..self.bitmap.clone() };
        Ok((bitmap, self.bits()?))
    }

    fn bits(&self) -> Result<StoredBits> {
        StoredBits::open(&self.file, &self.bitmap, self.geometry, self.size, &Limits::default())
    }
}

/// Most bytes that all bitmaps together take which are added at once.
const MOST_BYTES: u64 = 2 << 30;

/// Refuses bitmaps that take `bytes` together.
pub(crate) fn check_sum(bytes: u64) -> Result<()> {
    if bytes <= MOST_BYTES {
        return Ok(());
    }
    let why = format!("the bitmaps take more than {MOST_BYTES} bytes together");
    Err(Error::new(Kind::Limit, why).hint("carry over fewer, or ones with a larger granularity"))
}

/// Refuses marks of a disk of `from` bytes for one of `size` bytes.
fn check_size(from: u64, size: u64) -> Result<()> {
    if from == size {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "Bitmaps are of different sizes (destination size is {size}, source size is {from}) and can't be merged"
    )))
}

/// Adds bitmaps to the fresh image in `storage`, and makes it durable.
pub(crate) fn add_to_fresh(storage: &SharedStorage, bitmaps: &[BitmapCopy]) -> Result<()> {
    let limits = Limits::default();
    let info = Qcow2Info::read(&**storage, &limits)?;
    let size = info.area.header.size;
    super::qcow2::add_bitmaps(storage, info.area, limits, bitmaps.iter().map(|copy| copy.open(size)))
}

/// What other formats do not have.
const WHAT: &str = "bitmaps";
