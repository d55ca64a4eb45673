//! Changing the properties of an image that exists.

use diskmill_format::qcow2::RefcountWidth;

use super::{KeySlotChange, Preallocation};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::qcow2::{Compat, parse_bool};
use crate::size::parse_size;

/// What is to change of a qcow2 image; `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Amendment {
    /// The version of the format.
    pub compat: Option<Compat>,
    /// Width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64; version 2 has 16.
    pub refcount_bits: Option<u64>,
    /// Let QEMU postpone updates of refcounts (version 3).
    pub lazy_refcounts: Option<bool>,
    /// Another name for the external data file, for an image that has one; empty for no name in the image. The file
    /// itself is neither renamed nor looked for.
    pub data_file: Option<String>,
    /// Whether the external data file has to stay a valid raw image: this can only be given up.
    pub data_file_raw: Option<bool>,
    /// Size of the disk in bytes, see [`Image::resize`].
    pub size: Option<u64>,
    /// `encrypt.*`: passphrases of a LUKS image.
    pub keys: Option<KeySlotChange>,
}

impl Amendment {
    /// Sets an option of `qemu-img amend` by its name.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) for a value that the option does not have,
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) for an option that cannot be amended.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "compat" => self.compat = Some(value.parse()?),
            "refcount_bits" => {
                let bits = value.parse().map_err(|_| Error::invalid(format!("refcount_bits={value:?}")))?;
                self.refcount_bits = Some(bits);
            }
            "lazy_refcounts" => self.lazy_refcounts = Some(parse_bool(name, value)?),
            "data_file" => self.data_file = Some(value.to_owned()),
            "data_file_raw" => self.data_file_raw = Some(parse_bool(name, value)?),
            "size" => self.size = Some(parse_size(value)?),
            "backing_file" | "backing_fmt" => {
                return Err(Error::unsupported(format!("amending {name}")).hint("`rebase` can"));
            }
            other => match other.strip_prefix("encrypt.") {
                Some(name) => self.keys.get_or_insert_default().set(name, value)?,
                None => {
                    return Err(Error::unsupported(format!("amending {other}")).hint(
                        "compat, refcount_bits, lazy_refcounts, data_file, data_file_raw, size and encrypt.* can be \
                         amended",
                    ));
                }
            },
        }
        Ok(())
    }
}

impl Image {
    /// Changes the properties of a qcow2 image. What the guest sees stays as it is, but for the size.
    ///
    /// Each single change is made all at once, so that a crash leaves the image before or after it. (Where header
    /// extensions and the name of the backing file need more than the first 512 bytes, changes of the version and of the
    /// data file's name rely on the disk to write a cluster whole.)
    ///
    /// ```no_run
    /// use diskmill::{Image, OpenOptions, edit::Amendment};
    ///
    /// # fn main() -> Result<(), diskmill::Error> {
    /// let mut image =
    ///     Image::open("disk.qcow2", &OpenOptions { writable: true, ..OpenOptions::default() })?;
    /// image.amend(&Amendment { refcount_bits: Some(32), ..Amendment::default() })?;
    /// image.close()
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) for values that the image cannot have,
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) for other formats and for what the older version cannot hold,
    /// [`Kind::Limit`](crate::Kind::Limit) if a refcount does not fit into the new width, and as
    /// [`resize`](Self::resize). Changes that were made before the one that failed stay.
    pub fn amend(&mut self, changes: &Amendment) -> Result<()> {
        const WHAT: &str = "properties";
        let Amendment { compat, refcount_bits, lazy_refcounts, data_file, data_file_raw, size, keys } =
            changes;
        if *compat == Some(Compat::V3) {
            let snapshots = self.snapshots().to_vec();
            self.edit_qcow2(WHAT, |writer| writer.upgrade(&snapshots))?;
        }
        if let Some(keys) = keys {
            self.edit_qcow2(WHAT, |writer| writer.change_keys(keys))?;
        }
        if let Some(bits) = refcount_bits {
            let width = RefcountWidth::from_bits(*bits);
            let width =
                width.ok_or_else(|| Error::invalid(format!("refcount_bits={bits}")).hint("1, 2, 4, … 64"))?;
            self.edit_qcow2(WHAT, |writer| writer.set_refcount_width(width))?;
        }
        if let Some(raw) = data_file_raw {
            self.edit_qcow2(WHAT, |writer| writer.set_raw_data(*raw))?;
        }
        if let Some(name) = data_file {
            self.edit_qcow2(WHAT, |writer| writer.set_data_file(name))?;
        }
        if let Some(lazy) = lazy_refcounts {
            self.edit_qcow2(WHAT, |writer| writer.set_lazy_refcounts(*lazy))?;
        }
        if let Some(size) = size {
            self.resize(*size, Preallocation::Off)?;
        }
        if *compat == Some(Compat::V2) {
            let snapshots = self.snapshots().to_vec();
            self.edit_qcow2(WHAT, |writer| writer.downgrade(&snapshots))?;
        }
        Ok(())
    }
}
