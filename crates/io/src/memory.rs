//! Bytes in memory.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::sys::{range_end, unsupported};
use crate::{Align, Allocation, Storage};

/// A storage in memory that grows on writing, up to a limit. It knows no holes: everything is data.
pub struct MemoryStorage {
    bytes: RwLock<Vec<u8>>,
    limit: u64,
}

impl MemoryStorage {
    /// An empty storage that may grow to `limit` bytes.
    pub fn new(limit: u64) -> MemoryStorage {
        MemoryStorage { bytes: RwLock::new(Vec::new()), limit }
    }

    /// A storage that starts with `bytes` and may grow to `limit` bytes, or stay as long as it is if that is more.
    pub fn with_bytes(bytes: Vec<u8>, limit: u64) -> MemoryStorage {
        let limit = limit.max(bytes.len() as u64);
        MemoryStorage { bytes: RwLock::new(bytes), limit }
    }

    /// A copy of the content.
    pub fn to_vec(&self) -> Vec<u8> {
        self.read().clone()
    }

    // A poisoned lock only says that another thread panicked: the bytes are bytes all the same.
    fn read(&self) -> RwLockReadGuard<'_, Vec<u8>> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<u8>> {
        self.bytes.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `bytes` reach to `end` (exclusive) and gives the end as an index.
    fn grow(&self, bytes: &mut Vec<u8>, end: u64) -> io::Result<usize> {
        let full = || {
            let message = format!(
                "cannot grow to {end} bytes: the limit of this memory storage is {} bytes",
                self.limit
            );
            io::Error::new(io::ErrorKind::StorageFull, message)
        };
        if end > self.limit {
            return Err(full());
        }
        let end = usize::try_from(end).map_err(|_| full())?;
        if let Some(more) = end.checked_sub(bytes.len()) {
            bytes.try_reserve(more).map_err(|_| full())?;
            bytes.resize(end, 0);
        }
        Ok(end)
    }

    fn grow_for(&self, bytes: &mut Vec<u8>, at: u64, len: u64) -> io::Result<usize> {
        self.grow(bytes, range_end(at, len)?)
    }
}

impl Storage for MemoryStorage {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let bytes = self.read();
        let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let mut bytes = self.write();
        let end = self.grow_for(&mut bytes, at, buf.len() as u64)?;
        bytes[end - buf.len()..end].copy_from_slice(buf);
        Ok(buf.len())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.read().len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut bytes = self.write();
        let end = self.grow(&mut bytes, len)?;
        bytes.truncate(end);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocation(&self, at: u64) -> io::Result<Option<(Allocation, u64)>> {
        let len = self.len()?;
        Ok((at < len).then_some((Allocation::Data, len)))
    }

    fn write_zeroes(&self, at: u64, len: u64, _keep_allocated: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let mut bytes = self.write();
        let end = self.grow_for(&mut bytes, at, len)?;
        bytes[end - len as usize..end].fill(0);
        Ok(())
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.grow_for(&mut self.write(), at, len).map(drop)
    }

    fn clone_range(&self, _at: u64, _src: &dyn Storage, _src_at: u64, _len: u64) -> io::Result<()> {
        Err(unsupported("cannot clone into memory", &io::Error::from_raw_os_error(libc::EOPNOTSUPP)))
    }

    fn copy_range(&self, _at: u64, _src: &dyn Storage, _src_at: u64, _len: u64) -> io::Result<u64> {
        Err(unsupported(
            "cannot copy into memory in the kernel",
            &io::Error::from_raw_os_error(libc::EOPNOTSUPP),
        ))
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn align(&self) -> Align {
        Align { offset: 1, memory: 1 }
    }
}

impl fmt::Debug for MemoryStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStorage").field("len", &self.read().len()).field("limit", &self.limit).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_writes_and_grows() {
        let memory = MemoryStorage::new(100);
        assert_eq!(memory.write_at(b"abc", 10).unwrap(), 3);
        assert_eq!(memory.len().unwrap(), 13);
        let mut buf = [9; 8];
        assert_eq!(memory.read_at(&mut buf, 8).unwrap(), 5);
        assert_eq!(&buf, b"\0\0abc\x09\x09\x09");
        assert_eq!(memory.read_at(&mut buf, 13).unwrap(), 0);
        assert_eq!(memory.read_at(&mut buf, u64::MAX).unwrap(), 0);
        assert_eq!(memory.allocation(3).unwrap(), Some((Allocation::Data, 13)));
        assert_eq!(memory.allocation(13).unwrap(), None);
        memory.write_zeroes(11, 4, false).unwrap();
        assert_eq!(memory.to_vec(), b"\0\0\0\0\0\0\0\0\0\0a\0\0\0\0");
        memory.set_len(11).unwrap();
        assert_eq!(memory.to_vec().len(), 11);
        memory.allocate(0, 5).unwrap();
        assert_eq!(memory.to_vec().len(), 11);
    }

    #[test]
    fn stops_at_its_limit() {
        let memory = MemoryStorage::new(100);
        assert_eq!(memory.write_at(&[1; 2], 99).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(memory.write_at(&[1; 2], u64::MAX).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(memory.set_len(1 << 62).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(memory.len().unwrap(), 0);
        memory.write_at(&[1; 2], 98).unwrap();
    }
}
