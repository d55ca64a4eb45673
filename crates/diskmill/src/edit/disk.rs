//! A file that is being written to.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use diskmill_io::SharedStorage;

use super::Preallocation;
use crate::error::{Error, Kind, Result};
use crate::reserve::Reserve;

/// A file of an image that is open for writing: it knows its length, and whether there are writes that no barrier has
/// covered yet.
pub(crate) struct Disk {
    storage: SharedStorage,
    /// In bytes; shared with the layout that reads the same file.
    len: Arc<AtomicU64>,
    durability: Arc<Durability>,
    reserve: Reserve,
}

/// What a barrier is about.
#[derive(Default)]
struct Durability {
    unsynced: AtomicBool,
    /// A barrier failed. The kernel may have dropped what it could not write, so that a second try proves nothing.
    lost: AtomicBool,
    /// Held during a barrier: whoever finds nothing left to do must not be done before those that do it.
    turn: Mutex<()>,
}

impl Disk {
    pub(crate) fn new(storage: SharedStorage) -> Result<Self> {
        let len = storage.len().map_err(|error| Error::io("cannot tell the size", error))?;
        let reserve = Reserve::new(storage.gains_from_allocate());
        Ok(Self { storage, len: Arc::new(AtomicU64::new(len)), durability: Arc::default(), reserve })
    }

    /// The same file through `storage`, which encrypts what is written to it.
    pub(crate) fn seen_through(&self, storage: SharedStorage) -> Self {
        let reserve = Reserve::new(storage.gains_from_allocate());
        Self { storage, len: Arc::clone(&self.len), durability: Arc::clone(&self.durability), reserve }
    }

    pub(crate) fn storage(&self) -> &SharedStorage {
        &self.storage
    }

    pub(crate) fn shared_len(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.len)
    }

    /// Bytes in the file.
    pub(crate) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Writes all of `buf` at `at`. Not by `Storage::write_all_at`: what was written before a failure counts for the length.
    pub(crate) fn write(&self, mut buf: &[u8], mut at: u64) -> Result<()> {
        self.check()?;
        while !buf.is_empty() {
            let written = match self.storage.write_at(buf, at) {
                Ok(0) => Err(std::io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                done => done,
            };
            // Even a failed write may have changed something.
            self.durability.unsynced.store(true, Ordering::Release);
            let written = written.map_err(|error| cannot("write", at, error))?;
            at = at.saturating_add(written as u64);
            self.len.fetch_max(at, Ordering::AcqRel);
            buf = buf.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// As [`write`](Self::write), where the file may have no blocks yet.
    pub(crate) fn write_fresh(&self, buf: &[u8], at: u64) -> Result<()> {
        self.check()?;
        self.durability.unsynced.store(true, Ordering::Release);
        let reserved = self.reserve.before_write(&*self.storage, at, buf.len());
        reserved.map_err(|error| cannot("reserve blocks", at, error))?;
        self.write(buf, at)
    }

    /// Makes a range read as zeros; its blocks stay allocated if `keep`.
    pub(crate) fn zero(&self, at: u64, len: u64, keep: bool) -> Result<()> {
        self.check()?;
        let done = self.storage.write_zeroes(at, len, keep);
        self.durability.unsynced.store(true, Ordering::Release);
        done.map_err(|error| cannot("write zeros", at, error))?;
        self.len.fetch_max(at.saturating_add(len), Ordering::AcqRel);
        Ok(())
    }

    /// Cuts the file, or grows it with zeros. Nobody may write past the shorter of both lengths meanwhile.
    pub(crate) fn set_len(&self, len: u64) -> Result<()> {
        self.check()?;
        let done = self.storage.set_len(len);
        self.durability.unsynced.store(true, Ordering::Release);
        done.map_err(|error| Error::io(format!("cannot change the length to {len} bytes"), error))?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    /// Reserves blocks for a range that reads as zeros, or fills it with zeros, as `how` says.
    pub(crate) fn preallocate(&self, range: Range<u64>, how: Preallocation) -> Result<()> {
        /// Zeros that are written at once.
        const ZEROS: u64 = 1 << 20;
        let len = range.end.saturating_sub(range.start);
        match how {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc if len == 0 => Ok(()),
            Preallocation::Falloc => {
                self.check()?;
                let done = self.storage.allocate(range.start, len);
                self.durability.unsynced.store(true, Ordering::Release);
                done.map_err(|error| cannot("reserve blocks", range.start, error))?;
                self.len.fetch_max(range.end, Ordering::AcqRel);
                Ok(())
            }
            Preallocation::Full => {
                let zeros = vec![0; len.min(ZEROS) as usize];
                let mut at = range.start;
                while at < range.end {
                    let part = zeros.get(..(range.end - at).min(ZEROS) as usize).unwrap_or(&zeros);
                    self.write(part, at)?;
                    at += part.len() as u64;
                }
                Ok(())
            }
        }
    }

    /// Sees to it that a later write of the range finds room on the disk. `bytes` are what the range holds, or may hold from
    /// now on: they are written where blocks cannot be reserved.
    pub(crate) fn make_room(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.check()?;
        if bytes.is_empty() || self.storage.is_block_device() {
            return Ok(());
        }
        let reserved = self.storage.allocate(at, bytes.len() as u64);
        self.durability.unsynced.store(true, Ordering::Release);
        match reserved {
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => self.write(bytes, at),
            Err(error) => Err(cannot("reserve blocks", at, error)),
            Ok(()) => {
                self.len.fetch_max(at.saturating_add(bytes.len() as u64), Ordering::AcqRel);
                Ok(())
            }
        }
    }

    /// A barrier: what was written before is durable when it returns.
    pub(crate) fn sync(&self) -> Result<()> {
        let durability = &self.durability;
        let _turn = durability.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        if !durability.unsynced.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.storage.sync().map_err(|error| {
            durability.lost.store(true, Ordering::Release);
            Error::io("cannot make the written data durable", error)
        })
    }

    fn check(&self) -> Result<()> {
        if self.durability.lost.load(Ordering::Acquire) {
            return Err(Error::new(
                Kind::Io,
                "the disk failed to make earlier writes durable: what was written since the last flush may be lost",
            )
            .hint("close the image and open it again"));
        }
        Ok(())
    }
}

fn cannot(what: &str, at: u64, error: std::io::Error) -> Error {
    Error::io(format!("cannot {what} at offset {at:#x}"), error)
}
