use std::path::Path;

use diskmill_format::qcow2::{CryptMethod, feature};
use diskmill_io::Allocation;

use super::{ConvertOptions, TargetFormat};
use crate::error::{Error, Result};
use crate::image::{Image, OpenOptions};
use crate::layout::{FormatInfo, Source};
use crate::probe::Format;
use crate::qcow2::{Compat, Preallocation, Qcow2Info, Qcow2Options, lossy};

/// What there is under the name of an output that is not to be made (`-n`).
pub(super) enum Existing {
    /// A qcow2 image that holds nothing yet, as `qemu-img create` makes it, of this virtual size: it is replaced by
    /// one of the same kind when that is whole.
    Empty(u64),
    /// An image with something in it, open for writing.
    Holding(Box<Image>),
}

/// Opens the image at `path`. The options of an empty one are taken over.
///
/// # Errors
/// As [`Image::open`].
pub(super) fn open(path: &Path, options: &mut ConvertOptions, size: Option<u64>) -> Result<Existing> {
    let format = match &mut options.format {
        TargetFormat::Qcow2(qcow2) => {
            if let Some(least) = empty_qcow2(path, qcow2, size)? {
                return Ok(Existing::Empty(least));
            }
            Format::Qcow2
        }
        TargetFormat::Vmdk(_) => Format::Vmdk,
        format => {
            return Err(Error::unsupported(format!("writing {} into an existing file (-n)", format.name())));
        }
    };
    if options.compress.is_some() {
        return Err(Error::unsupported("packing (-c) into an existing image that holds something")
            .hint("leave -c out, or leave -n out to replace the image"));
    }
    let open =
        OpenOptions { format: Some(format), writable: true, snapshot: None, ..options.existing.clone() };
    Image::open(path, &open).map(|image| Existing::Holding(Box::new(image)))
}

/// The virtual size of a qcow2 image that holds nothing and can be made again; its options go to `options`. `None`
/// for others.
fn empty_qcow2(path: &Path, options: &mut Qcow2Options, size: Option<u64>) -> Result<Option<u64>> {
    let open = OpenOptions {
        format: Some(Format::Qcow2),
        metadata_only: true,
        force_share: true,
        ..OpenOptions::default()
    };
    let image = Image::open(path, &open)?;
    let FormatInfo::Qcow2(info) = &image.info().specific else { return Ok(None) };
    let header = &info.area.header;
    let backing = info.area.backing_name.as_ref();
    // The last cluster is written whole, and would hide what the backing file has behind the source's end.
    let inside = |size: u64| size < image.size() && !size.is_multiple_of(header.geometry.cluster_size());
    let holds = !info.snapshots.is_empty()
        || info.area.extensions.bitmaps.is_some_and(|(count, ..)| count > 0)
        || info.data_file.is_some()
        || header.crypt != CryptMethod::None
        || backing.is_some_and(|name| std::str::from_utf8(name).is_err() || size.is_none_or(inside));
    if holds {
        return Ok(None);
    }
    let Some(allocated) = allocates(&image)? else { return Ok(None) };
    *options = options_of(info);
    if allocated {
        options.preallocation = Preallocation::Metadata;
    }
    Ok(Some(image.size()))
}

/// Whether clusters are allocated, all of them holes; `None` if there is data.
fn allocates(image: &Image) -> Result<Option<bool>> {
    let mut allocated = false;
    for extent in image.extents(0..image.size()) {
        let extent = extent?;
        match extent.source {
            Source::Zero => allocated |= extent.zero_host.is_some(),
            Source::Packed { .. } => return Ok(None),
            Source::Raw { file, at } => {
                let storage = &image.file(file)?.storage;
                let end = at.get().saturating_add(extent.guest.end - extent.guest.start);
                let run = storage
                    .allocation(at.get())
                    .map_err(|error| Error::io("cannot look for holes", error))?;
                if run.is_some_and(|(kind, until)| kind == Allocation::Data || until < end) {
                    return Ok(None);
                }
                allocated = true;
            }
        }
    }
    Ok(Some(allocated))
}

/// The options that make an image like this one.
fn options_of(info: &Qcow2Info) -> Qcow2Options {
    let header = &info.area.header;
    Qcow2Options {
        compat: if header.version < 3 { Compat::V2 } else { Compat::V3 },
        cluster_size: Some(header.geometry.cluster_size()),
        refcount_bits: u64::from(header.refcount_width.bits()),
        preallocation: Preallocation::Off,
        lazy_refcounts: header.compatible & feature::LAZY_REFCOUNTS != 0,
        extended_l2: header.geometry.extended_l2(),
        data_file: None,
        data_file_raw: false,
        compression: header.compression,
        backing_file: info.area.backing_name.as_deref().map(lossy),
        backing_format: info.area.extensions.backing_format.as_deref().map(lossy),
        encryption: None,
    }
}
