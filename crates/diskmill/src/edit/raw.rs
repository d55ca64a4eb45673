//! Writing to raw images.

use std::ops::Range;
use std::sync::Arc;

use diskmill_io::SharedStorage;

use super::disk::Disk;
use super::ranges::{RangeGuard, RangeLocks};
use super::{Preallocation, Writer, ZeroHow};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{FileId, Layout};
use crate::raw::{FileRuns, RawLayout};

/// An open raw image that can be written to: nothing ever moves.
pub(crate) struct RawWriter {
    disk: Disk,
    id: FileId,
    ranges: RangeLocks,
}

impl RawWriter {
    pub(crate) fn open(file: SharedStorage, id: FileId) -> Result<Self> {
        Ok(Self { disk: Disk::new(file)?, id, ranges: RangeLocks::default() })
    }

    pub(crate) fn layout(&self) -> Result<RawLayout> {
        let file = Arc::clone(self.disk.storage());
        RawLayout::of(FileRuns::changing(file, self.id, self.disk.shared_len()))
    }
}

impl Writer for RawWriter {
    fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        self.ranges.lock(range, false)
    }

    fn write(&self, _image: &Image, buf: &[u8], at: u64) -> Result<()> {
        self.disk.write(buf, at)
    }

    fn zero(&self, _image: &Image, range: Range<u64>, how: ZeroHow) -> Result<()> {
        self.disk.zero(range.start, range.end - range.start, how == ZeroHow::KeepAllocated)
    }

    fn discard(&self, _image: &Image, range: Range<u64>) -> Result<()> {
        if self.disk.storage().is_block_device() {
            // A device may return anything afterwards, and zeroing it instead may take for ever.
            return Ok(());
        }
        self.disk.zero(range.start, range.end - range.start, false)
    }

    fn resize(&self, size: u64, how: Preallocation) -> Result<Box<dyn Layout>> {
        if how == Preallocation::Metadata {
            return Err(
                Error::unsupported("preallocation=metadata of a raw image").hint("off, falloc or full")
            );
        }
        let old = self.disk.len();
        let grow = || {
            // The system says at once if there is no room for it.
            self.disk.set_len(size)?;
            self.disk.preallocate(old.min(size)..size, how)
        };
        grow().inspect_err(|_| {
            let _ = self.disk.set_len(old);
        })?;
        self.disk.sync()?;
        Ok(Box::new(self.layout()?))
    }

    fn flush(&self) -> Result<()> {
        self.disk.sync()
    }

    fn close(&self) -> Result<()> {
        self.disk.sync()
    }
}
