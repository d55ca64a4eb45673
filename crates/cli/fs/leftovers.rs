//! What killed runs have left: sessions without a keeper, sockets at which nobody listens, disks of boot tests.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::geteuid;

use super::drive::{SOCKET, run_folder};
use super::kept::{LOCK, is_free};

/// A socket this young may be one whose server is about to listen.
const YOUNG: Duration = Duration::from_secs(1);
/// The disk of a boot test is in use for less than this.
const BOOT_TEST: Duration = Duration::from_secs(300);

/// What killed runs of this user have left.
pub(crate) struct Leftovers {
    /// Folders of sessions, with whatever may still run for them.
    sessions: Vec<PathBuf>,
    /// Files, and folders behind what is in them.
    files: Vec<PathBuf>,
}

impl Leftovers {
    pub(crate) fn find() -> Self {
        let mut files = dead_guestfish_sockets(&guestfish_folder());
        files.extend(dead_servers());
        let temporary = std::env::temp_dir();
        let disks = ours(&temporary, "diskmill-boot-");
        let disks = disks.filter(|(path, kind)| kind.is_file() && is_older(path, BOOT_TEST));
        files.extend(disks.map(|(path, _)| path));
        Self { sessions: diskmill_guestfs::leftovers(), files }
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.sessions.iter().chain(&self.files).map(|path| path.display().to_string()).collect()
    }

    /// Removes them, and ends what still runs for them.
    ///
    /// # Errors
    /// The first file that cannot be removed; the others are, all the same.
    pub(crate) fn remove(&self) -> io::Result<()> {
        if !self.sessions.is_empty() {
            diskmill_guestfs::sweep();
        }
        remove(&self.files)
    }
}

/// Removes what is found without a look at folders that others use too. Every command that works with sessions does it first.
pub(crate) fn sweep() {
    let mut files = dead_guestfish_sockets(&guestfish_folder());
    files.extend(dead_servers());
    // Whoever wants to know why something stays asks the doctor.
    let _ = remove(&files);
    diskmill_guestfs::sweep();
}

fn remove(files: &[PathBuf]) -> io::Result<()> {
    let results = files.iter().map(|path| match path.is_dir() {
        true => fs::remove_dir(path),
        false => fs::remove_file(path),
    });
    let failed =
        |result: io::Result<()>| result.err().filter(|error| error.kind() != io::ErrorKind::NotFound);
    // To the end: one that stays is no reason to leave the others.
    let errors: Vec<io::Error> = results.filter_map(failed).collect();
    errors.into_iter().next().map_or(Ok(()), Err)
}

fn guestfish_folder() -> PathBuf {
    PathBuf::from(format!("/tmp/.guestfish-{}", geteuid().as_raw()))
}

/// The sockets of servers of ours that have ended, the folders that were made for them, and locks that nobody holds.
fn dead_servers() -> Vec<PathBuf> {
    let Ok(folder) = run_folder() else { return Vec::new() };
    let mut dead = Vec::new();
    let mut listening = None;
    let mut is_dead = |socket: &Path| {
        is_older(socket, YOUNG)
            && !listening.get_or_insert_with(bound_sockets).iter().any(|name| name == socket)
            // The table is that of this network namespace alone.
            && UnixStream::connect(socket).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    for (path, kind) in ours(&folder, "") {
        let socket = path.join(SOCKET);
        if kind.is_dir() && is_dead(&socket) {
            dead.push(socket);
            dead.push(path);
        } else if (kind.is_socket() && is_dead(&path))
            || (kind.is_dir() && !socket.exists() && is_older(&path, BOOT_TEST))
            || (kind.is_file() && is_lock(&path) && is_older(&path, YOUNG) && is_free(&path))
        {
            dead.push(path);
        }
    }
    dead
}

/// The entries of `dir` that belong to this user and whose names begin with `prefix`, with what they are.
fn ours(dir: &Path, prefix: &str) -> impl Iterator<Item = (PathBuf, fs::FileType)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(move |entry| entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()))
        .filter_map(|entry| {
            let found = entry.path().symlink_metadata().ok()?;
            (found.uid() == geteuid().as_raw()).then(|| (entry.path(), found.file_type()))
        })
}

fn is_lock(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(LOCK.as_bytes())
}

/// `socket-PID` of guestfish processes that are gone. Not tried by connecting: that would end a server that lives.
fn dead_guestfish_sockets(folder: &Path) -> Vec<PathBuf> {
    let dead = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        let pid: u32 = name.strip_prefix("socket-")?.parse().ok()?;
        (!Path::new("/proc").join(pid.to_string()).exists()).then_some(())
    };
    ours(folder, "socket-")
        .filter(|(path, kind)| kind.is_socket() && dead(path).is_some())
        .map(|(path, _)| path)
        .collect()
}

/// The names of all Unix sockets that exist in the kernel (proc(5), `/proc/net/unix`).
fn bound_sockets() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    // Seven columns, then the name, which may have spaces.
    table
        .lines()
        .filter_map(|line| line.find(" /").and_then(|at| line.get(at + 1..)))
        .map(PathBuf::from)
        .collect()
}

fn is_older(path: &Path, than: Duration) -> bool {
    let age =
        path.symlink_metadata().and_then(|found| found.modified()).ok().and_then(|at| at.elapsed().ok());
    age.is_some_and(|age| age > than)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn sockets_of_dead_processes_are_told_from_those_of_the_living() {
        let dir = tempfile::tempdir().unwrap();
        let socket = |name: &str| UnixListener::bind(dir.path().join(name)).unwrap();
        let _kept = (socket(&format!("socket-{}", std::process::id())), socket("socket-x"));
        // No process has such a number (proc(5), pid_max).
        drop(socket("socket-99999999"));
        fs::write(dir.path().join("socket-99999998"), "").unwrap();
        assert_eq!(dead_guestfish_sockets(dir.path()), [dir.path().join("socket-99999999")]);
        assert!(bound_sockets().contains(&dir.path().join("socket-x")));
        assert!(!bound_sockets().contains(&dir.path().join("socket-99999999")));
    }
}
