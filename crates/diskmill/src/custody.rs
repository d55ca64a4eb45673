//! Images that another program writes on our behalf.

use std::path::Path;
use std::sync::Arc;

use diskmill_io::{CustodyLock, FileStorage, ImageLock, LockMode, OpenHow, SharedStorage};

#[cfg(doc)]
use crate::error::Kind;
use crate::error::{Error, Result};

/// An image file that is handed to QEMU to be written. Until this is dropped, no other program of ours does the same.
///
/// QEMU locks the image for itself while it runs. This covers the time before and after, and tells of a conflict before
/// anything is started.
#[derive(Debug)]
pub struct Custody(#[expect(dead_code, reason = "held for its drop")] CustodyLock);

impl Custody {
    /// Takes the image file at `path`, which must be writable.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another process uses the image, be it QEMU, a tool of its or we; [`Kind::Io`] if the file cannot be
    /// opened for writing or locked.
    pub fn take(path: &Path) -> Result<Self> {
        Self::of(path).map_err(|error| error.of(path))
    }

    fn of(path: &Path) -> Result<Self> {
        let how = OpenHow { read: true, write: true, ..OpenHow::default() };
        let file =
            FileStorage::open(path, &how).map_err(|error| Error::io("cannot open for writing", error))?;
        let storage: SharedStorage = Arc::new(file);
        let lock = CustodyLock::acquire(&storage).map_err(Error::lock)?;
        // Only a look: QEMU, which comes next, would find this lock in its way.
        drop(ImageLock::acquire(&storage, LockMode::Writer).map_err(Error::lock)?);
        Ok(Self(lock))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn one_at_a_time_and_qemu_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        assert_eq!(Custody::take(&path).unwrap_err().kind(), Kind::Io);
        std::fs::write(&path, [0; 512]).unwrap();
        let custody = Custody::take(&path).unwrap();
        assert_eq!(Custody::take(&path).unwrap_err().kind(), Kind::Busy);
        let how = OpenHow { read: true, write: true, ..OpenHow::default() };
        let storage: SharedStorage = Arc::new(FileStorage::open(&path, &how).unwrap());
        // What QEMU takes does not collide with it, and keeps others from taking the image too.
        let qemu = ImageLock::acquire(&storage, LockMode::Writer).unwrap();
        drop(custody);
        assert_eq!(Custody::take(&path).unwrap_err().kind(), Kind::Busy);
        drop(qemu);
        let reader = ImageLock::acquire(&storage, LockMode::Reader).unwrap();
        assert_eq!(Custody::take(&path).unwrap_err().kind(), Kind::Busy);
        drop(reader);
        assert!(Custody::take(&path).is_ok());
    }
}
