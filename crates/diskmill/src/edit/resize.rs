//! Changing the size of a disk.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::image::Image;
pub use crate::qcow2::Preallocation;

impl Image {
    /// Makes the guest's disk `size` bytes long. A longer one reads as zeros in its new area, whatever a backing file has
    /// there; of a shorter one what lies behind the new end is lost. `preallocation` tells what a longer one gets for
    /// its new area. Partitions and file systems on the disk stay as they are.
    ///
    /// A crash leaves the disk at its old size or at the new one, with the guest bytes that both have. Durable when it
    /// returns.
    ///
    /// ```no_run
    /// use diskmill::{Image, OpenOptions, edit::Preallocation};
    ///
    /// # fn main() -> Result<(), diskmill::Error> {
    /// let mut image =
    ///     Image::open("disk.qcow2", &OpenOptions { writable: true, ..OpenOptions::default() })?;
    /// image.resize(image.size() + (10 << 30), Preallocation::Off)?;
    /// image.close()
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) if the image was not opened for writing, or a qcow2 disk would have a
    /// size that is not a multiple of 512; [`Kind::Unsupported`](crate::Kind::Unsupported) for what the format
    /// cannot do; [`Kind::Limit`](crate::Kind::Limit) for a size that its tables cannot map;
    /// [`Kind::Io`](crate::Kind::Io). A disk that could not be made longer has its old size.
    /// Where a resize is stopped, persistent bitmaps may be left marked as inconsistent.
    pub fn resize(&mut self, size: u64, preallocation: Preallocation) -> Result<()> {
        // QEMU holds sizes as signed 64-bit integers, in sectors of 512 bytes.
        if size > (i64::MAX as u64) & !511 {
            return Err(Error::invalid(format!("a disk of {size} bytes")));
        }
        if size < self.size() && preallocation != Preallocation::Off {
            return self.named(Err(Error::invalid("preallocation is for disks that grow")));
        }
        let Some(writer) = self.writer() else {
            return Err(Error::invalid("the image was not opened for writing"));
        };
        let Some(writer) = writer.qcow2().map(Arc::clone) else {
            let layout = self.named(writer.resize(size, preallocation))?;
            self.replace_top(layout);
            return Ok(());
        };
        // The guest's bytes are read and written in between, through the tables as they are then.
        self.edit_qcow2("size", |writer| writer.make_room_for(size, preallocation))?;
        let done = writer.resize_guest(self, size, preallocation);
        let done = self.named(done);
        self.edit_qcow2("size", |_| done)
    }
}
