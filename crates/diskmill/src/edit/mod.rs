//! Writing to images that exist: the guest's writes, and changes of the image itself.
//!
//! Guest writes go through an [`Image`] that was opened with [`OpenOptions::writable`](crate::OpenOptions::writable):
//!
//! ```no_run
//! use diskmill::{Image, OpenOptions, edit::ZeroHow};
//!
//! # fn main() -> Result<(), diskmill::Error> {
//! let image = Image::open("disk.qcow2", &OpenOptions { writable: true, ..OpenOptions::default() })?;
//! image.write_at(b"hello", 4096)?;
//! image.write_zeroes(1 << 20, 1 << 20, ZeroHow::MayUnmap)?;
//! image.flush()?;
//! image.close()
//! # }
//! ```
//!
//! All of it takes `&self` and may be called from several threads. A crash of the machine loses at most what was
//! written since the last [`Image::flush`]; it never damages the image, and at worst leaves clusters that are allocated
//! and unused.

mod amend;
mod bitmap;
mod commit;
mod disk;
mod keys;
mod payload;
mod qcow2;
mod ranges;
mod raw;
mod rebase;
mod resize;
mod snapshot;
mod vmdk;

use std::ops::Range;
use std::sync::Arc;

pub use amend::Amendment;
pub use bitmap::DirtyBits;
pub(crate) use bitmap::{BitmapCopy, add_to_fresh, check_sum};
pub use commit::{Commit, CommitOptions};
pub(crate) use disk::Disk;
pub use keys::KeySlotChange;
pub(crate) use payload::Payloads;
pub(crate) use qcow2::Qcow2Writer;
pub(crate) use ranges::RangeGuard;
pub(crate) use raw::RawWriter;
pub use rebase::{Rebase, RebaseMode};
pub use resize::Preallocation;
pub(crate) use vmdk::{VmdkWriter, follow_parent};

use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::layout::Layout;

/// What becomes of the space under zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ZeroHow {
    /// What is allocated stays allocated.
    #[default]
    KeepAllocated,
    /// The space may be given back (NBD without `NO_HOLE`, SCSI `WRITE SAME` with `UNMAP`).
    MayUnmap,
}

/// How a format is written to. Ranges lie within the disk.
pub(crate) trait Writer: Send + Sync {
    /// Keeps others from moving the guest bytes of `range` while they are read.
    fn lock(&self, range: Range<u64>) -> RangeGuard<'_>;
    fn write(&self, image: &Image, buf: &[u8], at: u64) -> Result<()>;
    /// Writes whole clusters packed; those of `payloads` are so already.
    fn write_packed(&self, _image: &Image, _buf: &[u8], _at: u64, _payloads: &Payloads) -> Result<()> {
        Err(Error::unsupported("compressed writes into an image of this format"))
    }
    fn zero(&self, image: &Image, range: Range<u64>, how: ZeroHow) -> Result<()>;
    fn discard(&self, image: &Image, range: Range<u64>) -> Result<()>;
    fn flush(&self) -> Result<()>;
    /// Flushes, and tidies up.
    fn close(&self) -> Result<()>;
    /// Changes the size of the disk, and tells what the image shows then. qcow2 has a way of its own.
    fn resize(&self, _size: u64, _how: Preallocation) -> Result<Box<dyn Layout>> {
        Err(Error::unsupported("resizing an image of this format"))
    }
    /// The writer of a qcow2 image, for changes that only that format has.
    fn qcow2(&self) -> Option<&Arc<Qcow2Writer>> {
        None
    }
}

impl Image {
    /// Fills `buf` with the guest bytes from `at` on. Bytes past the end of the disk read as zeros.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for a damaged table or unit or a truncated file, [`Kind::Io`] if the system fails.
    pub fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        let _guard = self.guard(at, buf.len() as u64);
        self.read_unlocked(buf, at)
    }

    /// Writes all of `buf` to the guest's disk at `at`. Durable after the next [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the image was not opened writable or the range reaches past the end of the disk;
    /// [`Kind::Corrupt`], [`Kind::Limit`], [`Kind::Io`]. The guest bytes of the range are undefined then, as after a
    /// failed write of a real disk; the image stays sound.
    pub fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        match self.writer_for(at, buf.len() as u64)? {
            Some((writer, _)) => self.named(writer.write(self, buf, at)),
            None => Ok(()),
        }
    }

    /// As [`write_at`](Self::write_at), but the clusters of a qcow2 image that `buf` fills become compressed ones, with
    /// the codec that the image names. A cluster that would not become smaller is stored as it is.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at); [`Kind::Invalid`] unless the range is whole clusters (the end of the disk may cut
    /// the last one); [`Kind::Unsupported`] for other formats, and for images that are encrypted or have an external
    /// data file.
    pub fn write_compressed(&self, buf: &[u8], at: u64) -> Result<()> {
        self.write_payloads(buf, at, &Payloads::default())
    }

    /// Makes `len` guest bytes at `at` read as zeros.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    pub fn write_zeroes(&self, at: u64, len: u64, how: ZeroHow) -> Result<()> {
        match self.writer_for(at, len)? {
            Some((writer, range)) => self.named(writer.zero(self, range, how)),
            None => Ok(()),
        }
    }

    /// Tells that the guest does not need `len` bytes at `at` any more. What they read as afterwards depends on the
    /// format; whole clusters of qcow2 version 3 read as zeros. Parts of clusters stay as they are.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    pub fn discard(&self, at: u64, len: u64) -> Result<()> {
        match self.writer_for(at, len)? {
            Some((writer, range)) => self.named(writer.discard(self, range)),
            None => Ok(()),
        }
    }

    /// Makes durable what was written before. Nothing to do for an image that is not writable.
    ///
    /// # Errors
    /// [`Kind::Io`]; [`Kind::Corrupt`] if damaged refcounts come to light.
    pub fn flush(&self) -> Result<()> {
        self.writer().map_or(Ok(()), |writer| self.named(writer.flush()))
    }

    /// Flushes and closes the image. Dropping it does the same, but cannot report errors.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub fn close(mut self) -> Result<()> {
        self.close_writer()
    }

    /// Changes the image itself, which must be qcow2 and writable, and takes notice of its new header. `what` is what
    /// other formats do not have.
    pub(crate) fn edit_qcow2<T>(
        &mut self,
        what: &str,
        change: impl FnOnce(&Qcow2Writer) -> Result<T>,
    ) -> Result<T> {
        let Some(writer) = self.writer() else {
            return Err(Error::invalid("the image was not opened for writing"));
        };
        let Some(writer) = writer.qcow2().map(Arc::clone) else {
            let format = self.info().format;
            return self.named(Err(Error::unsupported(format!("changing the {what} of a {format} image"))));
        };
        let result = change(&writer);
        let layout = writer.layout();
        let result = result.and_then(|value| layout.map(|layout| (value, layout)));
        let (value, layout) = self.named(result)?;
        self.replace_top(layout);
        Ok(value)
    }

    /// Keeps a range in its place while it is read.
    pub(crate) fn guard(&self, at: u64, len: u64) -> Option<RangeGuard<'_>> {
        self.writer().map(|writer| writer.lock(at..at.saturating_add(len)))
    }

    /// The writer and the range, unless that is empty.
    fn writer_for(&self, at: u64, len: u64) -> Result<Option<(&dyn Writer, Range<u64>)>> {
        let Some(writer) = self.writer() else {
            return Err(Error::invalid("the image was not opened for writing"));
        };
        match at.checked_add(len) {
            Some(end) if end <= self.size() => Ok((len > 0).then_some((writer, at..end))),
            _ => Err(Error::new(
                Kind::Invalid,
                format!("{len} bytes at {at} reach past the end of the disk ({} bytes)", self.size()),
            )),
        }
    }
}
