//! Persistent dirty bitmaps of an image: which parts of the guest's disk were written since.

use std::ops::Range;

use diskmill_format::qcow2::{BITMAP_GRANULARITY_BITS, MAX_BITMAP_NAME};
use diskmill_format::{HostOffset, Limits};
use diskmill_io::SharedStorage;

use super::qcow2::check_bitmap;
#[cfg(doc)]
use crate::error::Kind;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::FormatInfo;
use crate::qcow2::{Bitmap, Bits, Qcow2Info, read_bitmaps};

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

    /// Whether it speaks of a disk of `size` bytes.
    fn check_size(&self, size: u64) -> Result<()> {
        if self.size == size {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "Bitmaps are of different sizes (destination size is {size}, source size is {}) and can't be merged",
            self.size
        )))
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
        let found = match self.writer().and_then(|writer| writer.qcow2()) {
            Some(writer) => writer.dirty_bits(name),
            None => self.saved_bits(name),
        };
        let (bitmap, bits) = self.named(found)?;
        Ok(DirtyBits { bits, granularity: bitmap.granularity(), size: self.info().virtual_size })
    }

    fn saved_bits(&self, name: &str) -> Result<(Bitmap, Bits)> {
        let all = self.bitmaps()?;
        let bitmap = all.into_iter().find(|bitmap| bitmap.name == name.as_bytes());
        let bitmap = bitmap.ok_or_else(|| Error::invalid(format!("Dirty bitmap '{name}' not found")))?;
        check_bitmap(&bitmap)?;
        let (FormatInfo::Qcow2(info), Some(file)) = (&self.info().specific, self.files().first()) else {
            return Err(Error::invalid("an image without bitmaps"));
        };
        let header = &info.area.header;
        let bits = Bits::read(&*file.storage, &bitmap, header.geometry, header.size, &Limits::default())?;
        Ok((bitmap, bits))
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
        self.edit_qcow2(WHAT, |writer| writer.add_bitmaps(vec![(bitmap, Bits::default())]))
    }

    /// Adds bitmaps with what they mark, all at once.
    pub(crate) fn copy_bitmaps(&mut self, bitmaps: &[(Bitmap, DirtyBits)]) -> Result<()> {
        if bitmaps.is_empty() {
            return Ok(());
        }
        let size = self.info().virtual_size;
        let new = self.named(copies(bitmaps, size))?;
        self.edit_qcow2(WHAT, |writer| writer.add_bitmaps(new))
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
        self.named(source.check_size(size))?;
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

/// Adds bitmaps to the fresh image in `storage`, and makes it durable.
pub(crate) fn add_to_fresh(storage: &SharedStorage, bitmaps: &[(Bitmap, DirtyBits)]) -> Result<()> {
    let limits = Limits::default();
    let info = Qcow2Info::read(&**storage, &limits)?;
    let new = copies(bitmaps, info.area.header.size)?;
    super::qcow2::add_bitmaps(storage, info.area, limits, new)
}

/// New bitmaps for a disk of `size` bytes that are as these.
fn copies(bitmaps: &[(Bitmap, DirtyBits)], size: u64) -> Result<Vec<(Bitmap, Bits)>> {
    let copy = |(bitmap, dirty): &(Bitmap, DirtyBits)| {
        dirty.check_size(size)?;
        Ok((Bitmap { extra: Vec::new(), extra_compatible: false, ..bitmap.clone() }, dirty.bits.clone()))
    };
    bitmaps.iter().map(copy).collect()
}

/// What other formats do not have.
const WHAT: &str = "bitmaps";
