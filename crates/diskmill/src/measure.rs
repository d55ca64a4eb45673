//! How large a file a disk needs in a format, without making it.

use diskmill_format::Limits;
use diskmill_format::qcow2::{Geometry, RefcountWidth};

use crate::convert::TargetFormat;
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::layout::{FormatInfo, Source};
use crate::qcow2::{Preallocation, Qcow2Options, read_bitmaps};

/// The disk that is to be stored.
#[derive(Clone, Copy)]
pub enum Disk<'a> {
    /// An empty one of this many bytes.
    Empty(u64),
    /// What this image shows the guest.
    Of(&'a Image),
}

/// Sizes in bytes, with the meanings and names of `qemu-img measure`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// What the file may need. Never less than a conversion takes: tables are counted as for a full disk.
    pub required: u64,
    /// What it needs once the guest has written everywhere.
    pub fully_allocated: u64,
    /// What the persistent bitmaps of the source need beyond that; `None` if source or target cannot have any.
    pub bitmaps: Option<u64>,
}

/// Tells how large a file `disk` needs in `format`, as `qemu-img measure` does: raw and qcow2. Only the map of an
/// image is looked at, not its data.
///
/// ```
/// use diskmill::convert::TargetFormat;
/// use diskmill::measure::{Disk, measure};
///
/// # fn main() -> Result<(), diskmill::Error> {
/// let measured = measure(Disk::Empty(1 << 30), &TargetFormat::named("qcow2")?)?;
/// assert_eq!(measured.required, 393_216);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Kind::Unsupported`] for other formats; [`Kind::Invalid`] for options that no image can have; [`Kind::Limit`] for a
/// disk that is too large for the format; what [`Image::map`] may give.
pub fn measure(disk: Disk<'_>, format: &TargetFormat) -> Result<Measured> {
    let size = match disk {
        Disk::Empty(size) => size,
        Disk::Of(image) => image.size(),
    };
    let size = size
        .checked_next_multiple_of(512)
        .filter(|&size| size <= i64::MAX as u64)
        .ok_or_else(|| Error::invalid(format!("a disk of {size} bytes")))?;
    match format {
        TargetFormat::Raw(_) => Ok(Measured { required: size, fully_allocated: size, bitmaps: None }),
        TargetFormat::Qcow2(options) => qcow2(disk, size, options),
        other => {
            Err(Error::unsupported(format!("measuring {} images", other.name())).hint("raw and qcow2 are"))
        }
    }
}

fn qcow2(disk: Disk<'_>, size: u64, options: &Qcow2Options) -> Result<Measured> {
    let (geometry, width) = (options.geometry()?, options.refcount_width()?);
    let cluster_size = geometry.cluster_size();
    if geometry.l1_entries(size).saturating_mul(8) > Limits::default().qcow2_l1_bytes {
        return Err(Error::new(Kind::Limit, format!("a disk of {size} bytes needs too large an L1 table"))
            .hint("a larger cluster_size"));
    }
    // Below 2^61 because of the limit above, so that the sums that follow cannot overflow.
    let data = size.next_multiple_of(cluster_size);
    let luks = options.encryption.as_ref().map_or(0, |options| options.header_bytes());
    let all = luks.next_multiple_of(cluster_size) + file_size(data, geometry, width);
    let reserved = matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full);
    let used = match disk {
        _ if reserved => data,
        Disk::Empty(_) => 0,
        // How much of the disk its backing file has is not known.
        Disk::Of(_) if options.backing_file.is_some() => data,
        Disk::Of(image) => clusters_with_data(image, cluster_size)? * cluster_size,
    };
    let bitmaps = match disk {
        Disk::Of(image) if options.compat == crate::qcow2::Compat::V3 => bitmap_bytes(image, size, geometry)?,
        _ => None,
    };
    Ok(Measured { required: all - data + used, fully_allocated: all, bitmaps })
}

/// Bytes of a qcow2 file with `data` bytes of guest clusters and all their tables.
fn file_size(data: u64, geometry: Geometry, width: RefcountWidth) -> u64 {
    let cluster_size = geometry.cluster_size();
    let clusters = data / cluster_size;
    let l2_tables = clusters.div_ceil(geometry.l2_entries());
    let l1_clusters = (l2_tables * 8).div_ceil(cluster_size);
    // With the header.
    let counted = 1 + l1_clusters + l2_tables + clusters;
    // Refcount blocks and their table count themselves, so that more of them may need more of them.
    let mut total = counted;
    loop {
        let blocks = total.div_ceil(width.entries(cluster_size));
        let table = (blocks * 8).div_ceil(cluster_size);
        let next = counted + blocks + table;
        if next == total {
            return total * cluster_size;
        }
        total = next;
    }
}

/// Clusters of this size that hold something other than zeros, as far as the image's map tells.
fn clusters_with_data(image: &Image, cluster_size: u64) -> Result<u64> {
    let mut clusters = 0;
    // The end of the last cluster that was counted.
    let mut end = 0;
    for extent in image.extents(0..image.size()) {
        let extent = extent?;
        if extent.source != Source::Zero && extent.guest.end > end {
            let first = extent.guest.start.max(end) / cluster_size;
            let last = extent.guest.end.div_ceil(cluster_size);
            clusters += last - first;
            end = last * cluster_size;
        }
    }
    Ok(clusters)
}

/// What the bitmaps of the image itself need, all bits allocated.
fn bitmap_bytes(image: &Image, size: u64, geometry: Geometry) -> Result<Option<u64>> {
    let (FormatInfo::Qcow2(info), Some(file)) = (&image.info().specific, image.files().first()) else {
        return Ok(None);
    };
    if info.area.header.version < 3 {
        return Ok(None);
    }
    let bitmaps = image.named(read_bitmaps(info, &*file.storage, &Limits::default()))?;
    let cluster_size = geometry.cluster_size();
    let (mut bytes, mut directory) = (0u64, 0u64);
    for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.in_use) {
        let clusters = bitmap.table_entries(size, geometry);
        bytes += clusters * cluster_size + (clusters * 8).next_multiple_of(cluster_size);
        directory += bitmap.encoded_len() as u64;
    }
    Ok(Some(bytes + directory.next_multiple_of(cluster_size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qcow2_of(size: u64, set: &[(&str, &str)]) -> (u64, u64) {
        let mut format = TargetFormat::named("qcow2").unwrap();
        set.iter().for_each(|(name, value)| format.set(name, value).unwrap());
        let Measured { required, fully_allocated, bitmaps } = measure(Disk::Empty(size), &format).unwrap();
        assert_eq!(bitmaps, None);
        (required, fully_allocated)
    }

    /// What qemu-img 10.0.2 prints.
    #[test]
    fn empty_disks() {
        assert_eq!(qcow2_of(0, &[]), (196_608, 196_608));
        assert_eq!(qcow2_of(1 << 30, &[]), (393_216, 1_074_135_040));
        assert_eq!(qcow2_of(1, &[("extended_l2", "on")]), (327_680, 393_216));
        let luks = [("encrypt.format", "luks"), ("encrypt.key-secret", "s")];
        assert_eq!(qcow2_of(1 << 30, &luks), (2_490_368, 1_076_232_192));
        let cbc = [luks[0], ("encrypt.cipher-mode", "cbc"), ("cluster_size", "512")];
        assert_eq!(qcow2_of(1 << 30, &cbc), (22_437_888, 1_096_179_712));
        let wide = [("refcount_bits", "64"), ("cluster_size", "512")];
        assert_eq!(qcow2_of(1 << 30, &wide), (34_629_120, 1_108_370_944));
        assert_eq!(
            qcow2_of(1 << 60, &[("cluster_size", "2M")]),
            (5_497_589_596_160, 1_152_927_002_196_443_136)
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let measured = |size, format| measure(Disk::Empty(size), &TargetFormat::named(format).unwrap());
        assert_eq!(measured(1 << 60, "qcow2").unwrap_err().kind(), Kind::Limit);
        assert_eq!(measured(u64::MAX, "raw").unwrap_err().kind(), Kind::Invalid);
        assert_eq!(measured(1, "vmdk").unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(measured(1, "raw").unwrap().required, 512);
    }
}
