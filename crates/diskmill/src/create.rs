//! Fresh, empty images.

use std::path::{Path, PathBuf};

use diskmill_io::PendingFile;

use crate::convert::{ConvertOptions, Input, Monitor, Output, TargetFormat, convert};
use crate::edit::{Disk, Preallocation};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::qcow2::{Encryption, EncryptionOptions};

/// What a fresh image is to be.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// The format with its options, a backing file among them.
    pub format: TargetFormat,
    /// The disk that the guest sees, in bytes; rounded up to sectors of 512 bytes.
    pub size: u64,
    /// Do not look for the backing file of a qcow2 image (`qemu-img create -u`).
    pub trust_backing: bool,
}

impl CreateOptions {
    /// The files that [`create`] makes for an image at `path`, and replaces where they exist: the image, its external
    /// data file, its extents.
    ///
    /// # Errors
    /// As [`create`], for a size or names that it would refuse.
    pub fn files(&self, path: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
        let path = path.as_ref();
        let mut files = vec![path.to_owned()];
        files.extend(self.format.other_files(path, Some(self.whole_size()?))?);
        Ok(files)
    }

    /// The size in whole sectors.
    fn whole_size(&self) -> Result<u64> {
        let size = self.size.checked_next_multiple_of(512).filter(|&size| size <= i64::MAX as u64);
        size.ok_or_else(|| Error::invalid(format!("a disk of {} bytes", self.size)))
    }
}

/// Makes a plain LUKS container at `path`, without an image format inside: header and key material, and behind them the
/// disk of `size` bytes, which was never written and so decrypts to noise. An existing file is replaced when it is whole.
///
/// # Errors
/// [`Kind::Invalid`](crate::Kind::Invalid) without a passphrase, or for another encryption than LUKS;
/// [`Kind::Io`](crate::Kind::Io).
pub fn create_luks(
    path: impl AsRef<Path>,
    encryption: &EncryptionOptions,
    size: u64,
    preallocation: Preallocation,
) -> Result<()> {
    let path = path.as_ref();
    let make = || {
        let Encryption::Luks(_, header) = encryption.create()? else {
            return Err(Error::invalid("a container without a LUKS header"));
        };
        let payload = header.len() as u64;
        let len = payload.checked_add(size).filter(|&len| len <= i64::MAX as u64);
        let len = len.ok_or_else(|| Error::invalid(format!("a disk of {size} bytes")))?;
        let pending = PendingFile::create(path).map_err(|error| Error::io("cannot create", error))?;
        let disk = Disk::new(pending.storage())?;
        disk.write(&header, 0)?;
        disk.set_len(len)?;
        disk.preallocate(payload..len, preallocation)?;
        pending.publish(false).map_err(|error| Error::io("cannot give the file its name", error))
    };
    make().map_err(|error: Error| error.of(path))
}

/// Makes an empty image at `path`: all zeros, or what the backing file has. An existing file is replaced when the
/// image is whole.
///
/// # Errors
/// [`Kind::Invalid`](crate::Kind::Invalid) for options that do not go together or a size above 2^63 - 512,
/// [`Kind::Limit`](crate::Kind::Limit) for a size that the format cannot have,
/// [`Kind::Busy`](crate::Kind::Busy) if the file is in use, [`Kind::Io`](crate::Kind::Io).
pub fn create(path: impl Into<PathBuf>, options: &CreateOptions) -> Result<()> {
    let size = options.whole_size()?;
    let convert_options = ConvertOptions {
        format: options.format.clone(),
        trust_backing: options.trust_backing,
        ..ConvertOptions::default()
    };
    // Nothing of the source is in its upper layer, so the output's own backing file stands for all of it.
    let blank = [Image::blank(size)];
    convert(Input::Images(&blank), Output::Path(path.into()), &convert_options, &Monitor::new())?;
    Ok(())
}
