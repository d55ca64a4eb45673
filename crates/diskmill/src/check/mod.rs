//! Looks for damage in images, and repairs qcow2 images, as `qemu-img check` does.
//!
//! The references to each host cluster are counted and compared with the refcounts that the image keeps. Counts are
//! sparse and compact (`counts`), each table is read once however often it is referred to, and holes are not read: the
//! cost grows with the data, and a hostile image cannot make it grow beyond [`Limits::check_bytes`].

mod counts;
mod disk;
mod finding;
mod qcow2;
mod vmdk;

use std::path::Path;
use std::sync::Arc;

use diskmill_format::Limits;
use diskmill_io::{FileStorage, ImageLock, LockMode, OpenHow, SharedStorage, Storage};

pub use finding::{Finding, Verdict};

#[cfg(doc)]
use crate::error::Kind;
use crate::error::{Error, Result};
use crate::image::{Image, OpenOptions};
use crate::policy::OpenPolicy;
use crate::probe::{Format, first_bytes};

/// What is to be repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Repair {
    /// Nothing: the image is only read.
    #[default]
    Nothing,
    /// Leaked clusters (`-r leaks`).
    Leaks,
    /// Everything that can be (`-r all`).
    All,
}

/// How to check an image.
#[derive(Debug, Clone, Default)]
pub struct CheckOptions {
    /// The format; probed where it is not given.
    pub format: Option<Format>,
    /// What to repair.
    pub repair: Repair,
    /// Which extents a VMDK may name. Nothing else is opened.
    pub policy: OpenPolicy,
    /// Upper bounds for the image's structures.
    pub limits: Limits,
    /// Check although another process may be writing (`-U`). Not for repairs.
    pub force_share: bool,
}

/// What a check found, with the terms of QEMU's `ImageCheck`. After a repair: what a second check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Things that could not be looked at.
    pub check_errors: u64,
    /// Errors that may damage data, now or with further writes.
    pub corruptions: u64,
    /// Clusters with a higher refcount than references.
    pub leaks: u64,
    /// Corruptions that were repaired.
    pub corruptions_fixed: u64,
    /// Leaks that were repaired.
    pub leaks_fixed: u64,
    /// Offset behind the last cluster in use, in bytes. 0 where the format does not tell.
    pub image_end_offset: u64,
    /// Clusters of the guest's disk; 0 where the format does not tell.
    pub total_clusters: u64,
    /// Guest clusters that have a host cluster or a compressed payload.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow the one before, and all compressed ones.
    pub fragmented_clusters: u64,
    /// Compressed clusters.
    pub compressed_clusters: u64,
    /// Leaks that were not repaired because a table is damaged that may refer to them.
    pub leaks_kept: u64,
    /// Doubts about a VMDK that are no errors, such as that its writer did not close it. (`qemu-img` does not tell of
    /// them.)
    pub warnings: Vec<String>,
}

impl Report {
    /// The exit code of `qemu-img check`: 0 clean, 1 not completed, 2 corrupt, 3 leaks only.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        if self.check_errors > 0 {
            1
        } else if self.corruptions > 0 {
            2
        } else if self.leaks > 0 {
            3
        } else {
            0
        }
    }
}

/// Checks the image at `path`, and repairs it if asked to. `found` gets each finding as it comes, in the order of
/// QEMU; when something was repaired, a second check follows, whose findings come too.
///
/// The files that the image names (backing file, external data file) are not opened.
///
/// # Errors
/// [`Kind::Unsupported`] for formats without a check (raw, OVA) and for repairs of VMDKs; [`Kind::Corrupt`] if the
/// image cannot be opened, or cannot be repaired in the way asked for; [`Kind::Limit`], [`Kind::Busy`] and [`Kind::Io`].
pub fn check(
    path: impl AsRef<Path>,
    options: &CheckOptions,
    found: &mut dyn FnMut(Verdict, &Finding),
) -> Result<Report> {
    let path = path.as_ref();
    let write = options.repair != Repair::Nothing;
    let open = |write| {
        FileStorage::open(path, &OpenHow { read: true, write, ..OpenHow::default() })
            .map_err(|error| Error::io("cannot open", error).of(path))
    };
    let format = match options.format {
        Some(format) => format,
        None => probe(&open(false)?).map_err(|error| error.of(path))?,
    };
    match format {
        Format::Qcow2 => {
            let storage: SharedStorage = Arc::new(open(write)?);
            let mode = match options.force_share {
                _ if write => LockMode::Writer,
                true => LockMode::Shared,
                false => LockMode::Reader,
            };
            let _lock = ImageLock::acquire(&storage, mode).map_err(|error| Error::lock(error).of(path))?;
            check_storage(&*storage, options, found).map_err(|error| error.of(path))
        }
        Format::Vmdk if write => Err(Error::unsupported("repairing a VMDK").of(path)),
        Format::Vmdk => {
            let open = OpenOptions {
                format: Some(Format::Vmdk),
                policy: options.policy.clone(),
                limits: options.limits.clone(),
                force_share: options.force_share,
                no_backing: true,
                ..OpenOptions::default()
            };
            let image = Image::open(path, &open)?;
            let report = vmdk::check(&image, &options.limits, found).map_err(|error| error.of(path))?;
            Ok(Report { warnings: image.info().warnings.clone(), ..report })
        }
        Format::Raw | Format::Ova => Err(Error::unsupported(format!("checking {format}")).of(path)),
    }
}

/// Checks the qcow2 image in `storage`, which must be writable for repairs, as [`check`] does.
///
/// # Errors
/// As [`check`].
pub fn check_storage(
    storage: &dyn Storage,
    options: &CheckOptions,
    found: &mut dyn FnMut(Verdict, &Finding),
) -> Result<Report> {
    qcow2::check(storage, options, found)
}

fn probe(storage: &dyn Storage) -> Result<Format> {
    Ok(Format::probe(&first_bytes(storage)?))
}
