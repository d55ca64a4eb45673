//! Output beside its final name: a file appears whole or not at all.
//!
//! The temporary is `.NAME.diskmill-XXXXXXXXXXXXXXXX.tmp` in the directory of the final file, locked with `flock(2)`
//! for as long as its maker lives. A later run for the same name that finds it unlocked knows that its maker was
//! killed, and removes it.

use std::collections::{HashMap, HashSet};
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::SharedStorage;
use crate::file::{FileStorage, OpenHow};
use crate::sys::{invalid, retry, uninterrupted};

/// Temporaries that live now, for a signal handler's thread to remove.
static PENDING: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// How many symbolic links to follow, as the kernel does.
const MAX_LINKS: usize = 40;
/// How many names to try before giving up; one is nearly always enough.
const MAX_TRIES: usize = 16;
/// The longest part of the final name that goes into the temporary's, in bytes: a name has at most 255.
const MAX_STEM: usize = 200;
const SUFFIX: &[u8] = b".tmp";
const RANDOM_DIGITS: usize = 16;

/// A new file under a temporary name, to take its final name by [`publish`](Self::publish) once it is whole. Dropped
/// before that, it is removed.
#[derive(Debug)]
pub struct PendingFile {
    storage: Arc<FileStorage>,
    temporary: PathBuf,
    final_path: PathBuf,
    published: bool,
}

impl PendingFile {
    /// Makes a temporary for `final_path`, open for reading and writing. Symbolic links in `final_path` are followed,
    /// and it is the file they lead to that will be replaced. A new file gets the permissions that the umask leaves;
    /// one that replaces an old one gets the old one's, and its owner where the system allows.
    ///
    /// # Errors
    /// What the system says; `InvalidInput` if `final_path` exists and is no regular file; `PermissionDenied` if it
    /// may not be written.
    pub fn create(final_path: impl AsRef<Path>) -> io::Result<PendingFile> {
        PendingFile::create_with(final_path, false)
    }

    /// As [`create`](Self::create), with `O_DIRECT` if `direct`.
    ///
    /// # Errors
    /// As [`create`](Self::create), and `Unsupported` where there is no direct I/O.
    pub fn create_with(final_path: impl AsRef<Path>, direct: bool) -> io::Result<PendingFile> {
        let (final_path, old) = place(final_path.as_ref())?;
        remove_stale(std::slice::from_ref(&final_path));
        Self::make(final_path, old.as_ref(), direct)
    }

    /// As [`create_with`](Self::create_with), for all files of one output.
    ///
    /// # Errors
    /// As [`create_with`](Self::create_with), with the path that it is about.
    pub fn create_all(paths: &[PathBuf], direct: bool) -> Result<Vec<PendingFile>, (PathBuf, io::Error)> {
        let places = paths.iter().map(|path| place(path).map_err(|error| (path.clone(), error)));
        let (paths, olds): (Vec<_>, Vec<_>) = places.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        remove_stale(&paths);
        let make = |(path, old): (PathBuf, Option<fs::Metadata>)| {
            Self::make(path.clone(), old.as_ref(), direct).map_err(|error| (path, error))
        };
        paths.into_iter().zip(olds).map(make).collect()
    }

    /// Makes a temporary for `final_path`, which [`place`] has found and where `old` stands.
    fn make(final_path: PathBuf, old: Option<&fs::Metadata>, direct: bool) -> io::Result<PendingFile> {
        let (Some(directory), Some(name)) = (final_path.parent(), final_path.file_name()) else {
            return Err(invalid(format!("{} names no file", final_path.display())));
        };
        let how = OpenHow { read: true, write: true, create_new: true, direct };
        // Until it has its owner, nobody else may open what replaces an old file.
        let mode = if old.is_some() { 0o600 } else { 0o666 };
        for _ in 0..MAX_TRIES {
            let temporary = directory.join(temporary_name(name));
            // The registry stays locked, so that a signal's clean-up sees each temporary that exists.
            let mut pending = pending();
            let storage = match FileStorage::open_with_mode(&temporary, &how, mode) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                result => result?,
            };
            pending.push(temporary.clone());
            drop(pending);
            let made = PendingFile {
                storage: Arc::new(storage),
                temporary,
                final_path: final_path.clone(),
                published: false,
            };
            let file = made.storage.file();
            // Another run may have come upon the file before it was locked, and taken it for stale.
            if try_lock(file)? == Lock::Busy || file.metadata()?.nlink() == 0 {
                continue;
            }
            if let Some(old) = old {
                take_after(file, old)?;
            }
            return Ok(made);
        }
        Err(io::Error::other("no free name for a temporary file"))
    }

    /// The file, to be written.
    pub fn storage(&self) -> SharedStorage {
        Arc::clone(&self.storage) as SharedStorage
    }

    /// The final name, with symbolic links resolved.
    pub fn final_path(&self) -> &Path {
        &self.final_path
    }

    /// The temporary name.
    pub fn temporary_path(&self) -> &Path {
        &self.temporary
    }

    /// Gives the file its final name, replacing what had it. With `sync`, content and name are durable when this
    /// returns.
    ///
    /// # Errors
    /// What the system says. The temporary is gone then, and the old file stands, unless it was the directory's
    /// `fsync` that failed.
    pub fn publish(self, sync: bool) -> io::Result<()> {
        Self::publish_all(vec![self], sync).map_err(|(_, error)| error)
    }

    /// Gives all files of one output their final names, in this order, or none: where one cannot have its name, the others
    /// get their old files back (as far as the file system exchanges names; see `RENAME_EXCHANGE` in rename(2)). A process
    /// that is killed meanwhile may leave old and new files side by side.
    ///
    /// # Errors
    /// As [`publish`](Self::publish), with the final path that it is about.
    pub fn publish_all(files: Vec<Self>, sync: bool) -> Result<(), (PathBuf, io::Error)> {
        if sync {
            for file in &files {
                // Metadata as well: a size that was set, an owner.
                uninterrupted(|| file.storage.file().sync_all())
                    .map_err(|error| (file.final_path.clone(), error))?;
            }
        }
        // Held to the end, so that a signal's clean-up finds all done or nothing.
        let mut pending = pending();
        let mut done = Vec::new();
        let last = files.len().saturating_sub(1);
        for (index, file) in files.iter().enumerate() {
            // Nothing comes after the last one that could fail.
            let taken = if index == last { file.replace() } else { file.take_name() };
            match taken {
                Ok(how) => done.push((file, how)),
                Err(error) => {
                    let path = file.final_path.clone();
                    done.into_iter().rev().for_each(|(file, how)| file.give_back_name(how));
                    drop(pending);
                    return Err((path, error));
                }
            }
        }
        for (file, how) in done {
            if how == Named::Exchanged {
                let _ = fs::remove_file(&file.temporary);
            }
            pending.retain(|path| *path != file.temporary);
        }
        drop(pending);
        files.into_iter().try_for_each(|mut file| {
            let path = file.final_path.clone();
            file.named(sync).map_err(|error| (path, error))
        })
    }

    /// Takes the final name from what has it.
    fn replace(&self) -> io::Result<Named> {
        fs::rename(&self.temporary, &self.final_path).map(|()| Named::Replaced)
    }

    /// Takes the final name in a way that can be undone, if there is one.
    fn take_name(&self) -> io::Result<Named> {
        // Only files: with a directory that came there meanwhile, names could be exchanged, too.
        if !fs::symlink_metadata(&self.final_path).is_ok_and(|old| old.is_file()) {
            return self.replace().map(|_| Named::New);
        }
        match exchange(&self.temporary, &self.final_path) {
            Ok(()) => Ok(Named::Exchanged),
            // Not every file system knows how.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => {
                self.replace()
            }
            Err(e) => Err(e),
        }
    }

    /// Undoes [`take_name`](Self::take_name). There is nobody to tell of errors who could do more.
    fn give_back_name(&self, how: Named) {
        let _ = match how {
            Named::Exchanged => exchange(&self.temporary, &self.final_path),
            Named::New => fs::rename(&self.final_path, &self.temporary),
            Named::Replaced => Ok(()),
        };
    }

    /// It has its name, and is an ordinary file from now on.
    fn named(&mut self, sync: bool) -> io::Result<()> {
        self.published = true;
        unlock(self.storage.file());
        match self.final_path.parent() {
            Some(directory) if sync => uninterrupted(|| File::open(directory)?.sync_all()),
            _ => Ok(()),
        }
    }
}

/// What became of the file that had the final name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Named {
    /// It has the temporary's name now.
    Exchanged,
    /// It is gone.
    Replaced,
    /// There was none.
    New,
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if !self.published {
            let mut pending = pending();
            let _ = fs::remove_file(&self.temporary);
            pending.retain(|path| *path != self.temporary);
        }
    }
}

/// Removes the temporaries of all [`PendingFile`]s of this process, none of which can be published any more. For the
/// thread that handles signals, just before the process ends; not for the signal handler itself, as it takes a lock.
pub fn unlink_all_pending() {
    for path in pending().drain(..) {
        let _ = fs::remove_file(path);
    }
}

fn pending() -> MutexGuard<'static, Vec<PathBuf>> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the file that `path` names is to be, and the regular file that is there now.
fn place(path: &Path) -> io::Result<(PathBuf, Option<fs::Metadata>)> {
    if path.as_os_str().as_bytes().ends_with(b"/") {
        return Err(invalid("it names a directory"));
    }
    // Before links are read: those of /proc/self/fd may lead to pipes, which have no path.
    if fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
        return Err(invalid("the output exists and is not a regular file"));
    }
    let path = resolve(path)?;
    let old = match fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_file() => meta,
        Ok(_) => return Err(invalid("the output exists and is not a regular file")),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((path, None)),
        Err(e) => return Err(e),
    };
    // Renaming over it would work all the same, but a file is made read-only for a reason.
    check_writable(&path)?;
    check_replaceable(&path, &old)?;
    Ok((path, Some(old)))
}

/// Whether another file can take the name of the one at `path`: hours later would be a bad time to learn that.
fn check_replaceable(path: &Path, old: &fs::Metadata) -> io::Result<()> {
    let attributes = attributes(path)?;
    let why = if attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0 {
        "a file system is mounted on it"
    } else if attributes & libc::STATX_ATTR_APPEND as u64 != 0 {
        "it can only be appended to (chattr +a)"
    } else if !may_rename_over(path, old)? {
        "it belongs to another user, in a directory with the sticky bit"
    } else {
        return Ok(());
    };
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("no new file can take its place: {why}; an image that is there can be written into (`-n`)"),
    ))
}

/// In a directory with the sticky bit only the owners of file and directory may, and root (unlink(2), EPERM).
fn may_rename_over(path: &Path, old: &fs::Metadata) -> io::Result<bool> {
    let Some(directory) = path.parent() else { return Ok(true) };
    let directory = fs::metadata(directory)?;
    // SAFETY: takes nothing and cannot fail.
    let user = unsafe { libc::geteuid() };
    Ok(directory.mode() & libc::S_ISVTX == 0 || [0, old.uid(), directory.uid()].contains(&user))
}

/// The file that `path` leads to, be it there or not, with no symbolic link left.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&path) {
            // An absolute target replaces the whole.
            Ok(target) => path = path.parent().unwrap_or(Path::new("")).join(target),
            // EINVAL: it is no link.
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::EINVAL) => {
                let name =
                    path.file_name().ok_or_else(|| invalid(format!("{} names no file", path.display())))?;
                let directory = match path.parent() {
                    Some(parent) if parent != Path::new("") => fs::canonicalize(parent)?,
                    _ => fs::canonicalize(".")?,
                };
                return Ok(directory.join(name));
            }
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

/// What the name of each temporary for `name` begins with.
fn prefix(name: &OsStr) -> Vec<u8> {
    let stem = name.as_bytes();
    [b".", &stem[..stem.len().min(MAX_STEM)], b".diskmill-"].concat()
}

fn temporary_name(name: &OsStr) -> OsString {
    // Each RandomState has other keys, of the system's randomness.
    let random = RandomState::new().hash_one(std::process::id());
    let mut bytes = prefix(name);
    bytes.extend_from_slice(format!("{random:0RANDOM_DIGITS$x}").as_bytes());
    bytes.extend_from_slice(SUFFIX);
    OsString::from_vec(bytes)
}

/// What the name of a temporary begins with, if `name` is one.
fn temporary_prefix(name: &OsStr) -> Option<&[u8]> {
    let rest = name.as_bytes().strip_suffix(SUFFIX)?;
    let (prefix, digits) = rest.split_at_checked(rest.len().checked_sub(RANDOM_DIGITS)?)?;
    digits.iter().all(u8::is_ascii_hexdigit).then_some(prefix)
}

/// Removes what killed runs left behind for files of these names. Best effort: a leftover does no harm but to space.
fn remove_stale(paths: &[PathBuf]) {
    let mut directories: HashMap<&Path, HashSet<Vec<u8>>> = HashMap::new();
    for path in paths {
        if let (Some(directory), Some(name)) = (path.parent(), path.file_name()) {
            directories.entry(directory).or_default().insert(prefix(name));
        }
    }
    for (directory, prefixes) in directories {
        let Ok(entries) = fs::read_dir(directory) else { continue };
        let stale = |name: &OsStr| temporary_prefix(name).is_some_and(|prefix| prefixes.contains(prefix));
        for entry in entries.flatten().filter(|entry| stale(&entry.file_name())) {
            let path = entry.path();
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
            if entry.file_type().is_ok_and(|kind| kind.is_file())
                && let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(&path)
                && try_lock(&file).is_ok_and(|lock| lock == Lock::Taken)
            {
                let _ = fs::remove_file(&path);
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Lock {
    Taken,
    Busy,
    /// The file system has no such locks.
    None,
}

fn try_lock(file: &File) -> io::Result<Lock> {
    // SAFETY: takes numbers only; the descriptor is open.
    match retry(|| i64::from(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) })) {
        Ok(_) => Ok(Lock::Taken),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Lock::Busy),
        Err(e) => match e.raw_os_error() {
            Some(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::EBADF) => {
                Ok(Lock::None)
            }
            _ => Err(e),
        },
    }
}

fn unlock(file: &File) {
    // SAFETY: takes numbers only; the descriptor is open.
    let _ = retry(|| i64::from(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) }));
}

/// Exchanges two names of one file system.
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    let one = CString::new(one.as_os_str().as_bytes())?;
    let other = CString::new(other.as_os_str().as_bytes())?;
    let (here, how) = (libc::AT_FDCWD, libc::RENAME_EXCHANGE);
    // SAFETY: two strings that end with NUL and outlive the call.
    let call =
        || unsafe { libc::syscall(libc::SYS_renameat2, here, one.as_ptr(), here, other.as_ptr(), how) };
    retry(call).map(drop)
}

/// The attributes of a file (`stx_attributes` of statx(2)); none where the kernel does not tell.
fn attributes(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_SYMLINK_NOFOLLOW;
    let call = || {
        // SAFETY: a string that ends with NUL and room for the answer, which both outlive the call.
        i64::from(unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, 0, found.as_mut_ptr()) })
    };
    if retry(call).is_err() {
        return Ok(0);
    }
    // SAFETY: all zeros is a value of these numbers, and the kernel has filled in others.
    let found = unsafe { found.assume_init() };
    Ok(found.stx_attributes & found.stx_attributes_mask)
}

fn check_writable(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let call = || {
        // SAFETY: a string that ends with NUL and outlives the call.
        i64::from(unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), libc::W_OK, libc::AT_EACCESS) })
    };
    retry(call).map(drop)
}

/// Gives `file` the owner, as far as the system allows, and the permissions of the file it will replace.
fn take_after(file: &File, old: &fs::Metadata) -> io::Result<()> {
    let new = file.metadata()?;
    let mut mode = old.mode() & 0o777;
    if (new.uid(), new.gid()) != (old.uid(), old.gid())
        && fchown(file, Some(old.uid()), Some(old.gid())).is_err()
    {
        let group = new.gid() == old.gid() || fchown(file, None, Some(old.gid())).is_ok();
        if !group {
            // What the old group could do is not for another group, unless everybody may.
            mode &= 0o707 | (mode & 0o007) << 3;
        }
    }
    file.set_permissions(fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let dropped = PendingFile::create(&path).unwrap();
        dropped.storage().write_at(b"half", 0).unwrap();
        assert_eq!(names(dir.path()).len(), 1);
        assert!(!path.exists());
        drop(dropped);
        assert_eq!(names(dir.path()), [""; 0]);

        for (content, sync) in [(b"one", false), (b"two", true)] {
            let file = PendingFile::create(&path).unwrap();
            file.storage().write_at(content, 0).unwrap();
            file.publish(sync).unwrap();
            assert_eq!(fs::read(&path).unwrap(), content);
            assert_eq!(names(dir.path()), ["disk.raw"]);
        }
    }

    #[test]
    fn several_files_appear_all_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["new", "old", "last"].map(|name| dir.path().join(name));
        fs::write(&paths[1], b"old").unwrap();
        let make = || {
            let files = PendingFile::create_all(&paths, false).unwrap();
            files.iter().for_each(|file| file.storage().write_all_at(b"now", 0).unwrap());
            files
        };
        let files = make();
        fs::create_dir(&paths[2]).unwrap();
        assert_eq!(PendingFile::publish_all(files, false).unwrap_err().0, paths[2].canonicalize().unwrap());
        assert_eq!(names(dir.path()), ["last", "old"]);
        assert_eq!(fs::read(&paths[1]).unwrap(), b"old");

        fs::remove_dir(&paths[2]).unwrap();
        for sync in [false, true] {
            PendingFile::publish_all(make(), sync).unwrap();
            assert_eq!(names(dir.path()), ["last", "new", "old"]);
            paths.iter().for_each(|path| assert_eq!(fs::read(path).unwrap(), b"now"));
        }
    }

    #[test]
    fn modes_are_those_of_a_new_or_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, path) = (dir.path().join("plain"), dir.path().join("disk"));
        File::create(&plain).unwrap();
        PendingFile::create(&path).unwrap().publish(false).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode(), fs::metadata(&plain).unwrap().mode());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let file = PendingFile::create(&path).unwrap();
        assert_eq!(fs::metadata(file.temporary_path()).unwrap().mode() & 0o777, 0o640);
        file.publish(false).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
    }

    #[test]
    fn symbolic_links_are_written_through() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("store")).unwrap();
        let (link, target) = (dir.path().join("link"), dir.path().join("store/real"));
        symlink("store/real", &link).unwrap();
        // Dangling at first, then not.
        for _ in 0..2 {
            let file = PendingFile::create(&link).unwrap();
            assert_eq!(file.final_path(), fs::canonicalize(dir.path()).unwrap().join("store/real"));
            file.publish(false).unwrap();
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
            assert!(fs::symlink_metadata(&target).unwrap().is_file());
        }
        symlink("loop", dir.path().join("loop")).unwrap();
        assert_eq!(
            PendingFile::create(dir.path().join("loop")).unwrap_err().raw_os_error(),
            Some(libc::ELOOP)
        );
    }

    #[test]
    fn leftovers_of_killed_runs_go_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let live = PendingFile::create(&path).unwrap();
        let live_name = live.temporary_path().file_name().unwrap().to_str().unwrap().to_owned();
        let stale = ".disk.raw.diskmill-0123456789abcdef.tmp";
        let others = [
            ".disk.raw.diskmill-0123.tmp",
            ".disk.raw.diskmill-0123456789abcdef.bak",
            ".disk2.raw.diskmill-0123456789abcdef.tmp",
        ];
        for name in others.iter().chain([&stale]) {
            fs::write(dir.path().join(name), b"x").unwrap();
        }
        let second = PendingFile::create(&path).unwrap();
        let left = names(dir.path());
        assert!(!left.contains(&stale.to_owned()), "{left:?}");
        assert!(left.contains(&live_name), "{left:?}");
        assert!(others.iter().all(|o| left.contains(&(*o).to_owned())), "{left:?}");
        drop(second);
        live.publish(false).unwrap();
    }

    #[test]
    fn long_names_and_wrong_targets() {
        let dir = tempfile::tempdir().unwrap();
        PendingFile::create(dir.path().join("n".repeat(255))).unwrap().publish(false).unwrap();
        assert_eq!(PendingFile::create(dir.path()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(PendingFile::create(dir.path().join("no/x")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(PendingFile::create("/dev/null").unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let (pipe, _end) = io::pipe().unwrap();
        for wrong in [format!("/proc/self/fd/{}", pipe.as_raw_fd()).into(), dir.path().join("new/")] {
            assert_eq!(PendingFile::create(wrong).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
