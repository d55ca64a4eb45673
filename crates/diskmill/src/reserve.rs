//! Blocks that are reserved before they are written, where that makes writing faster.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use diskmill_io::Storage;

/// Shorter writes gain nothing, in bytes.
const FROM: usize = 64 << 10;

/// Whether blocks are reserved first: until the file system says that it cannot.
#[derive(Default)]
pub(crate) struct Reserve(AtomicBool);

impl Reserve {
    pub(crate) const fn new(wanted: bool) -> Self {
        Self(AtomicBool::new(wanted))
    }

    /// Reserves the blocks of `len` bytes at `at`, which are written next, if that pays.
    pub(crate) fn before_write(&self, storage: &dyn Storage, at: u64, len: usize) -> io::Result<()> {
        if len < FROM || !self.0.load(Relaxed) {
            return Ok(());
        }
        match storage.allocate(at, len as u64) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.0.store(false, Relaxed);
                Ok(())
            }
            reserved => reserved,
        }
    }
}
