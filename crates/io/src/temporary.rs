//! Files without a name.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::file::FileStorage;
use crate::sys::uninterrupted;

/// A new, empty file in `directory` that nobody else can open: it has no name, and goes when it is closed.
///
/// # Errors
/// What the system says.
pub fn temporary(directory: &Path) -> io::Result<FileStorage> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    // O_EXCL: it never gets a name.
    let nameless = options.clone().custom_flags(libc::O_TMPFILE | libc::O_EXCL).clone();
    match uninterrupted(|| nameless.open(directory)) {
        // EISDIR: a kernel that does not know O_TMPFILE opens the folder.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
            FileStorage::from_file(unlinked(directory, &options)?)
        }
        file => FileStorage::from_file(file?),
    }
}

/// A file whose name is taken away at once, where the file system cannot do without.
fn unlinked(directory: &Path, options: &OpenOptions) -> io::Result<File> {
    // Each RandomState has other keys, of the system's randomness.
    let random = RandomState::new().hash_one(std::process::id());
    let path = directory.join(format!(".diskmill-{random:016x}.tmp"));
    let file = uninterrupted(|| options.clone().create_new(true).open(&path))?;
    fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Storage;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn temporaries_have_no_name_and_one_reader() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        let fallback = FileStorage::from_file(unlinked(dir.path(), &options).unwrap()).unwrap();
        for file in [temporary(dir.path()).unwrap(), fallback] {
            let meta = file.file().metadata().unwrap();
            assert_eq!((meta.nlink(), meta.mode() & 0o777), (0, 0o600));
            file.write_at(b"x", 5).unwrap();
            assert_eq!(file.len().unwrap(), 6);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
