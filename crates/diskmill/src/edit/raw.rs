//! Writing to raw images.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use diskmill_io::SharedStorage;

use super::disk::Disk;
use super::ranges::{RangeGuard, RangeLocks};
use super::{Writer, ZeroHow};
use crate::error::Result;
use crate::image::Image;

/// An open raw image that can be written to: nothing ever moves.
pub(crate) struct RawWriter {
    disk: Disk,
    ranges: RangeLocks,
}

impl RawWriter {
    pub(crate) fn open(file: SharedStorage) -> Result<Self> {
        Ok(Self { disk: Disk::new(file)?, ranges: RangeLocks::default() })
    }

    pub(crate) fn shared_len(&self) -> Arc<AtomicU64> {
        self.disk.shared_len()
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

    fn flush(&self) -> Result<()> {
        self.disk.sync()
    }

    fn close(&self) -> Result<()> {
        self.disk.sync()
    }
}
