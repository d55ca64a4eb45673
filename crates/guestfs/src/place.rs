//! The folders of sessions: small files and sockets in the user's run-time folder, overlays where there is room.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::process::ProcessId;
use crate::{Error, Kind, Result, Settings};

/// Where all sessions of this user have their folders: `$XDG_RUNTIME_DIR/diskmill`, else `/tmp/diskmill-UID`.
pub(crate) fn root() -> PathBuf {
    let run = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match run.filter(|dir| dir.is_absolute() && private_dir(dir).is_ok()) {
        Some(dir) => dir.join("diskmill"),
        None => Path::new("/tmp").join(format!("diskmill-{}", uid())),
    }
}

pub(crate) fn uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The folders of one session, removed by [`Place::remove`].
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Place {
    /// State, sockets, messages.
    pub(crate) dir: PathBuf,
    /// Overlays.
    pub(crate) scratch: PathBuf,
}

impl Place {
    /// Makes the folders.
    pub(crate) fn create(settings: &Settings) -> Result<Self> {
        let root = root();
        make_root(&root)?;
        let dir = fresh_dir(&root)?;
        let var = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map(PathBuf::from);
        let tmp = settings.tmp_dir.clone().or(var).unwrap_or_else(|| "/tmp".into());
        let tmp = tmp.join(format!("diskmill-{}", uid()));
        let scratch = if tmp == root {
            let scratch = dir.join("scratch");
            make_dir(&scratch).map_err(|e| cannot_make(&scratch, e)).map(|()| scratch)
        } else {
            make_root(&tmp).and_then(|()| fresh_dir(&tmp))
        };
        match scratch {
            Ok(scratch) => Ok(Self { dir, scratch }),
            Err(e) => {
                let _ = fs::remove_dir(&dir);
                Err(e)
            }
        }
    }

    /// The session's name.
    pub(crate) fn id(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Removes the folders with all that is in them.
    pub(crate) fn remove(&self) {
        if let Ok(sockets) = fs::read_link(self.sockets()) {
            for name in SOCKETS {
                let _ = fs::remove_file(sockets.join(name));
            }
            let _ = fs::remove_dir(sockets);
        }
        let _ = fs::remove_dir_all(&self.scratch);
        let _ = fs::remove_dir_all(&self.dir);
    }

    /// Notes the folder that libguestfs has made for the sockets of QEMU, which is one of `processes`, so that it is removed
    /// with ours: root's is in /tmp whatever it is told, and stays when guestfish is killed.
    pub(crate) fn note_sockets(&self, processes: impl FnOnce() -> Vec<ProcessId>) {
        if fs::symlink_metadata(self.sockets()).is_ok() {
            return;
        }
        let arguments =
            |process: ProcessId| fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        let mut found = processes().into_iter().filter_map(|process| sockets_named(&arguments(process)));
        if let Some(folder) = found.next() {
            // It is only left where that fails.
            let _ = std::os::unix::fs::symlink(folder, self.sockets());
        }
    }

    /// A link to the folder of libguestfs' sockets.
    fn sockets(&self) -> PathBuf {
        self.dir.join("sockets")
    }

    /// What guestfish writes to its standard error.
    pub(crate) fn messages(&self) -> PathBuf {
        self.dir.join("messages")
    }

    /// Progress, a line for each event.
    pub(crate) fn progress(&self) -> PathBuf {
        self.dir.join("progress")
    }

    /// What QEMU and the appliance say while it starts.
    pub(crate) fn console(&self) -> PathBuf {
        self.dir.join("console")
    }

    /// Passphrases on their way to guestfish: a named pipe.
    pub(crate) fn keys(&self) -> PathBuf {
        self.dir.join("keys")
    }

    /// Held by whoever talks to guestfish; its time is that of the last use.
    pub(crate) fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// What other processes need to know of the session.
    pub(crate) fn state(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    /// What the programs that use the session tell each other.
    pub(crate) fn notes(&self) -> PathBuf {
        self.dir.join("notes.json")
    }
}

/// What libguestfs puts into its folder of sockets.
const SOCKETS: [&str; 2] = ["guestfsd.sock", "console.sock"];

/// The folder in an appliance's command line, which has `socket,path=/tmp/libguestfsXXXXXX/guestfsd.sock,id=channel0`.
fn sockets_named(arguments: &[u8]) -> Option<PathBuf> {
    let [socket, _] = SOCKETS;
    let paths =
        arguments.split(|&byte| byte == 0 || byte == b',').filter_map(|word| word.strip_prefix(b"path="));
    let mut paths = paths.map(|path| Path::new(OsStr::from_bytes(path)));
    let folder = paths.find(|path| path.file_name() == Some(OsStr::new(socket)))?.parent()?;
    let ours = folder.file_name()?.as_bytes().starts_with(b"libguestfs");
    (ours && folder.is_absolute()).then(|| folder.to_owned())
}

/// Makes the folder if it is not there, and refuses one that others may enter.
fn make_root(root: &Path) -> Result<()> {
    match make_dir(root) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => private_dir(root).map_err(|reason| {
            Error::new(Kind::Io, format!("{} is not safe to use: {reason}", root.display()))
        }),
        Err(e) => Err(cannot_make(root, e)),
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(dir)
}

fn cannot_make(dir: &Path, error: io::Error) -> Error {
    Error::io(format!("cannot make the folder {}", dir.display()), error)
}

/// Whether `dir` is a folder of ours that nobody else may enter.
pub(crate) fn private_dir(dir: &Path) -> Result<(), String> {
    let found = fs::symlink_metadata(dir).map_err(|e| e.to_string())?;
    if !found.is_dir() {
        return Err("it is no folder".to_owned());
    }
    if found.uid() != uid() {
        return Err(format!("it belongs to user {}", found.uid()));
    }
    if found.mode() & 0o077 != 0 {
        return Err(format!("others may enter it (mode {:o})", found.mode() & 0o7777));
    }
    Ok(())
}

fn fresh_dir(root: &Path) -> Result<PathBuf> {
    loop {
        // Short: the name of a socket, at most 107 bytes, is to fit below it.
        let dir = root.join(random_name().map_err(|e| Error::io("cannot read /dev/urandom", e))?);
        match make_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(cannot_make(&dir, e)),
        }
    }
}

/// A random name of eight characters.
pub(crate) fn random_name() -> io::Result<String> {
    let mut bytes = [0; 4];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:08x}", u32::from_ne_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_sockets_goes_with_ours() {
        let line =
            |path: &str| format!("qemu\0-chardev\0socket,path={path},id=channel0\0-device\0x").into_bytes();
        assert_eq!(
            sockets_named(&line("/tmp/libguestfsAb1234/guestfsd.sock")),
            Some("/tmp/libguestfsAb1234".into())
        );
        for other in ["/tmp/x/guestfsd.sock", "/tmp/libguestfsAb1234/x", "guestfsd.sock", ""] {
            assert_eq!(sockets_named(&line(other)), None, "{other}");
        }
        let tmp = tempfile::tempdir().unwrap();
        let [dir, scratch, sockets] =
            ["dir", "scratch", "libguestfsAb1234"].map(|name| tmp.path().join(name));
        for folder in [&dir, &scratch, &sockets] {
            fs::create_dir(folder).unwrap();
        }
        fs::write(sockets.join("guestfsd.sock"), "").unwrap();
        let place = Place { dir, scratch };
        std::os::unix::fs::symlink(&sockets, place.sockets()).unwrap();
        place.remove();
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    }
}
