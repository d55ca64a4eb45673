//! A file of the host that is written: under a name of its own until it is whole, unless it is there and no regular file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::copy::folder_of;

/// What is written.
pub(crate) enum Target {
    /// A new file, which gets the name at the end.
    Fresh { file: tempfile::NamedTempFile, name: PathBuf },
    /// A device, a FIFO or the like, which is written and never replaced.
    There(File),
}

impl Target {
    /// Opens what is at `path`, or a new file with these permissions. A symbolic link is followed, or replaced itself: one that
    /// came out of a guest must not lead what comes after it elsewhere.
    pub(crate) fn open(path: &Path, mode: u32, follow: bool) -> io::Result<Self> {
        let there = || OpenOptions::new().write(true).create(true).truncate(true).open(path).map(Self::There);
        let name = match fs::metadata(path) {
            _ if !follow && path.is_symlink() => path.to_owned(),
            Ok(meta) if !meta.is_file() => return there(),
            Ok(_) => match path.canonicalize() {
                Ok(name) => name,
                // Behind /dev/fd: a file without a name.
                Err(_) => return there(),
            },
            // A link to what is not there yet.
            Err(_) if path.is_symlink() => return there(),
            Err(_) => path.to_owned(),
        };
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix(".diskmill-").permissions(fs::Permissions::from_mode(mode));
        Ok(Self::Fresh { file: builder.tempfile_in(folder_of(&name))?, name })
    }

    /// The new file, if it is one: what is there keeps its owner, mode and times.
    pub(crate) fn fresh(&self) -> Option<&File> {
        match self {
            Self::Fresh { file, .. } => Some(file.as_file()),
            Self::There(_) => None,
        }
    }

    /// Gives a new file its name; with `replace` in the place of another.
    pub(crate) fn publish(self, replace: bool) -> io::Result<()> {
        match self {
            Self::Fresh { file, name } if replace => file.persist(name).map(drop).map_err(|e| e.error),
            Self::Fresh { file, name } => file.persist_noclobber(name).map(drop).map_err(|e| e.error),
            Self::There(_) => Ok(()),
        }
    }
}

impl Write for Target {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Fresh { file, .. } => file.write(buf),
            Self::There(file) => file.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::{FileTypeExt as _, symlink};

    use super::*;

    #[test]
    fn what_is_no_regular_file_is_written_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let write = |name: &str| {
            let mut target = Target::open(&at(name), 0o666, true).unwrap();
            target.write_all(b"new").unwrap();
            let fresh = target.fresh().is_some();
            target.publish(true).unwrap();
            fresh
        };
        rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), rustix::fs::Mode::RWXU).unwrap();
        symlink("fifo", at("to-fifo")).unwrap();
        // Open for writing too: neither end waits for the other.
        let mut reader = OpenOptions::new().read(true).write(true).open(at("fifo")).unwrap();
        assert!(!write("fifo") && !write("to-fifo"));
        let mut got = [0; 6];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"newnew");
        assert!(at("fifo").symlink_metadata().unwrap().file_type().is_fifo());

        fs::write(at("file"), "an old file").unwrap();
        symlink("file", at("to-file")).unwrap();
        symlink("later", at("to-later")).unwrap();
        assert!(write("to-file") && !write("to-later") && write("none"));
        for link in ["to-fifo", "to-file", "to-later"] {
            assert!(at(link).is_symlink(), "{link}");
        }
        for name in ["file", "later", "none"] {
            assert_eq!(fs::read(at(name)).unwrap(), b"new", "{name}");
        }
        assert!(Target::open(dir.path(), 0o666, true).is_err());
        // Only what was asked for is replaced, and nothing else is left.
        assert!(Target::open(&at("file"), 0o666, true).unwrap().publish(false).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 7);

        for link in ["to-fifo", "to-file", "to-later"] {
            Target::open(&at(link), 0o666, false).unwrap().publish(true).unwrap();
            assert!(at(link).symlink_metadata().unwrap().is_file(), "{link}");
        }
        assert_eq!(fs::read(at("file")).unwrap(), b"new");
    }
}
