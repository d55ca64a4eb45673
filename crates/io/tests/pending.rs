//! The clean-up of all temporaries of a process, alone in its process as it spares none.

#![allow(clippy::unwrap_used, clippy::panic)]

use diskmill_io::{PendingFile, unlink_all_pending};

#[test]
fn all_temporaries_go_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    std::fs::write(&old, b"old").unwrap();
    let files = [PendingFile::create(&old).unwrap(), PendingFile::create(&new).unwrap()];
    files[0].storage().write_at(b"half", 0).unwrap();
    unlink_all_pending();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    for file in files {
        assert_eq!(file.publish(false).unwrap_err().kind(), std::io::ErrorKind::NotFound);
    }
    assert_eq!(std::fs::read(&old).unwrap(), b"old");
    assert!(!new.exists());
}
