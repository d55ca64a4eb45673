//! How the appliance gets at an image.

use std::path::{Path, PathBuf};

use diskmill::{Format, Image};
use diskmill_guestfs::Disk;

use super::args::ImageArgs;
use super::guest::Access;
use crate::exit::Failure;

/// An image as a disk of the appliance.
pub(crate) struct Drive {
    file: PathBuf,
    format: Format,
    access: Access,
}

impl Drive {
    /// Opens the image once ourselves: that tells its format, checks it, and applies the policy for the files it names.
    pub(crate) fn open(args: &ImageArgs, file: &Path, access: Access) -> Result<Self, Failure> {
        let image = Image::open(file, &args.open.options(args.format))?;
        let format = image.info().format;
        for warning in image.warnings().iter().filter(|_| !args.quiet) {
            eprintln!("diskmill: warning: {warning}");
        }
        if !matches!(format, Format::Raw | Format::Qcow2) {
            let what = if access == Access::Write { "writing to" } else { "file systems of" };
            return Err(Failure::failed(format!(
                "{what} {} images is not supported: convert {file:?} to qcow2 first",
                format.name()
            )));
        }
        Ok(Self { file: file.to_owned(), format, access })
    }

    pub(crate) fn disk(&self) -> Disk {
        let disk = Disk::file(&self.file, self.format.name());
        if self.access == Access::Write { disk.writable() } else { disk }
    }
}
