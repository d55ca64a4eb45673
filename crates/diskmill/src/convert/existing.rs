use std::path::Path;

use diskmill_format::qcow2::feature;
use diskmill_io::Allocation;

use crate::error::{Error, Result};
use crate::image::{Image, OpenOptions};
use crate::layout::{FormatInfo, Source};
use crate::probe::Format;
use crate::qcow2::{Compat, Preallocation, Qcow2Info, Qcow2Options, lossy};

/// Takes over the options of an existing qcow2 image that is to be filled (`-n`), and tells its virtual size.
///
/// Only an image that holds nothing yet, as `qemu-img create` makes it, can be filled: it is replaced by one of the
/// same kind when that is whole.
///
/// # Errors
/// [`Kind::Unsupported`](crate::Kind::Unsupported) if the image holds data, snapshots or bitmaps.
pub(super) fn adopt_qcow2(path: &Path, options: &mut Qcow2Options) -> Result<u64> {
    let holds = |what: &str| {
        Error::unsupported(format!("filling (-n) an existing qcow2 image that holds {what}"))
            .hint("leave -n out to replace it, or make a new one")
    };
    let open = OpenOptions {
        format: Some(Format::Qcow2),
        metadata_only: true,
        force_share: true,
        ..OpenOptions::default()
    };
    let image = Image::open(path, &open)?;
    let FormatInfo::Qcow2(info) = &image.info().specific else { return Err(holds("something else")) };
    if !info.snapshots.is_empty() {
        return Err(holds("snapshots"));
    }
    if info.area.extensions.bitmaps.is_some_and(|(count, ..)| count > 0) {
        return Err(holds("bitmaps"));
    }
    if info.data_file.is_some() {
        return Err(holds("an external data file"));
    }
    crate::qcow2::refuse_encryption(&info.area.header)?;
    if info.area.backing_name.as_ref().is_some_and(|name| std::str::from_utf8(name).is_err()) {
        return Err(holds("the name of a backing file that is not UTF-8"));
    }
    *options = options_of(info);
    if allocates(&image)?.ok_or_else(|| holds("data"))? {
        options.preallocation = Preallocation::Metadata;
    }
    Ok(image.size())
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
