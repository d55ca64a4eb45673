use std::sync::{Arc, Mutex, PoisonError};

use diskmill_io::{SharedStorage, Storage};

use crate::error::{Error, Result};
use crate::reader::read_full;

/// Largest piece of a table that is read at once, in bytes. Tables may be 2 MiB (L2), 32 MiB (L1) or 128 MiB (grain
/// directory); pieces keep the memory of a long chain bounded.
pub(crate) const SLICE: u64 = 64 << 10;
const SLICES: usize = 8;

/// Where the pieces of metadata tables come from: the file, or a writer that has changed some of them.
pub(crate) trait Tables: Send + Sync {
    /// The piece at `at`, at least `len` bytes of it.
    ///
    /// # Errors
    /// If it cannot be read, or runs past the end of the file (QEMU would read zeros there, and lose data silently).
    fn slice(&self, at: u64, len: u64) -> Result<Arc<[u8]>>;

    /// The piece will be asked for soon. A hint, as [`Storage::will_need`] is one.
    fn will_need(&self, _at: u64, _len: u64) {}
}

impl<T: Tables + ?Sized> Tables for Arc<T> {
    fn slice(&self, at: u64, len: u64) -> Result<Arc<[u8]>> {
        (**self).slice(at, len)
    }

    fn will_need(&self, at: u64, len: u64) {
        (**self).will_need(at, len);
    }
}

/// Pieces of metadata tables, the last few used kept.
pub(crate) struct TableCache {
    file: SharedStorage,
    file_len: u64,
    slices: Mutex<Vec<(u64, Arc<[u8]>)>>,
}

impl TableCache {
    pub(crate) fn new(file: SharedStorage, file_len: u64) -> Self {
        Self { file, file_len, slices: Mutex::new(Vec::with_capacity(SLICES)) }
    }
}

impl Tables for TableCache {
    fn slice(&self, at: u64, len: u64) -> Result<Arc<[u8]>> {
        let mut slices = self.slices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(position) = slices.iter().position(|(key, bytes)| *key == at && bytes.len() as u64 >= len)
        {
            // Most recently used last.
            let hit = slices.remove(position);
            let bytes = Arc::clone(&hit.1);
            slices.push(hit);
            return Ok(bytes);
        }
        if at.checked_add(len).is_none_or(|end| end > self.file_len) {
            return Err(past_end(self.file_len));
        }
        let mut bytes = vec![0; len.min(SLICE) as usize];
        let got = read_full(&*self.file as &dyn Storage, &mut bytes, at)?;
        if got < bytes.len() {
            return Err(past_end(self.file_len));
        }
        let bytes: Arc<[u8]> = bytes.into();
        if slices.len() >= SLICES {
            slices.remove(0);
        }
        slices.push((at, Arc::clone(&bytes)));
        Ok(bytes)
    }

    fn will_need(&self, at: u64, len: u64) {
        self.file.will_need(at, len);
    }
}

fn past_end(file_len: u64) -> Error {
    Error::new(
        crate::Kind::Corrupt,
        format!("it lies past the end of the file ({file_len} bytes): the image is truncated"),
    )
}
