//! Sessions that are kept: found again by the image they are on.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata, canonicalize, metadata};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use diskmill::{Image, OpenOptions};
use diskmill_guestfs::{Kept, Kind};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest as _, Sha256};

use super::args::ImageArgs;
use super::drive::{run_folder, wait_closed};
use super::failure::failure;
use super::guest::Access;
use super::watch;
use crate::exit::Failure;
use crate::names;

/// How often it is looked whether another program has started the session that we want, too.
const RETRY: Duration = Duration::from_millis(50);

/// What the state of an image begins with where its server writes; no digest does.
const WRITER: &str = "w";
/// What the name of a lock ends with.
pub(crate) const LOCK: &str = ".lock";
const SERVER_ENDED: &str = "the server of its image has ended";

/// What an image is to the sessions on it. A session that reads through a server has it as the name of the socket, so that
/// nothing else need be kept in step: `DEV-INO-STATE-OPTIONS-PROCESS`.
struct Identity {
    /// Which file: device and inode.
    file: String,
    /// What is in it and in the files that it names: a digest of their identities, sizes and times.
    state: String,
    /// How it was opened: a digest of format and options.
    options: String,
}

impl Identity {
    fn of(image: &Image, args: &ImageArgs, file: &Path) -> io::Result<Self> {
        let mut state = Sha256::new();
        let paths = image.files().iter().map(|file| file.path.as_path());
        // Each once: an image that is opened without its passphrase has fewer files by the same name.
        let paths: BTreeSet<&Path> = image.chain().map(|(path, _)| path).chain(paths).collect();
        for path in paths {
            let Ok(found) = metadata(path) else { continue };
            for number in [found.dev(), found.ino(), found.size()] {
                state.update(number.to_le_bytes());
            }
            for number in [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()] {
                state.update(number.to_le_bytes());
            }
        }
        let mut options = Sha256::new();
        options.update(args.format.map_or("", |format| format.name()));
        for argument in args.open.arguments() {
            options.update(argument.as_encoded_bytes());
            options.update([0]);
        }
        options.update(args.snapshot.as_deref().unwrap_or_default());
        Ok(Self { file: file_name(&metadata(file)?), state: short(state), options: short(options) })
    }

    fn prefix(&self) -> String {
        format!("{}-{}-{}-", self.file, self.state, self.options)
    }
}

fn file_name(found: &Metadata) -> String {
    format!("{:x}-{:x}", found.dev(), found.ino())
}

fn short(hash: Sha256) -> String {
    hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// Where the server of this very state of the image listens. Each process has its own.
pub(crate) fn socket(image: &Image, args: &ImageArgs, file: &Path, access: Access) -> io::Result<PathBuf> {
    let mut identity = Identity::of(image, args, file)?;
    if access == Access::Write {
        identity.state = format!("{WRITER}{}", image.info().format.name());
    }
    Ok(run_folder()?.join(format!("{}{:x}", identity.prefix(), std::process::id())))
}

/// What the session on an image is called: the image's real path.
pub(crate) fn label(file: &Path) -> String {
    canonicalize(file).unwrap_or_else(|_| file.to_owned()).to_string_lossy().into_owned()
}

/// The socket of a session's server, and its name.
fn served_as(kept: &Kept) -> Option<(&Path, &str)> {
    let (socket, _) = kept.disks().next()?.served()?;
    Some((socket, socket.file_name()?.to_str()?))
}

/// Waits until a session that was ended has let go of its image.
pub(crate) fn closed(kept: &Kept) -> Result<(), Failure> {
    served_as(kept).map_or(Ok(()), |(socket, _)| wait_closed(socket))
}

/// Whether it may write to its image.
pub(crate) fn is_writable(kept: &Kept) -> bool {
    kept.disks().any(diskmill_guestfs::Disk::is_writable)
}

/// The format in which a session has this very file open for writing, be it by itself or through a server of ours.
fn writes_as(kept: &Kept, file: &Path) -> Option<String> {
    if kept.writes_to(file) {
        return kept.disks().next().map(|disk| disk.format().to_owned());
    }
    let (_, name) = served_as(kept)?;
    let state = name.strip_prefix(&format!("{}-", file_name(&metadata(file).ok()?)))?.split('-').next()?;
    state.strip_prefix(WRITER).map(str::to_owned)
}

/// The kept session that serves for this image and access. Sessions that are of no more use, because the image was
/// changed or replaced or because their image's server has ended, are ended, and `say` tells so.
pub(crate) fn find(
    args: &ImageArgs,
    file: &Path,
    access: Access,
    say: &dyn Fn(&str),
) -> Result<Option<Kept>, Failure> {
    let mut all = Kept::list();
    if all.is_empty() || access == Access::Discard {
        return Ok(None);
    }
    let replaced = |kept: &Kept| -> io::Result<bool> {
        let same = match served_as(kept) {
            Some((_, name)) => name.starts_with(&format!("{}-", file_name(&metadata(file)?))),
            None => kept.writes_to(file),
        };
        Ok(!same && kept.label() == label(file))
    };
    for kept in all.extract_if(.., |kept| replaced(kept).unwrap_or(false)) {
        end(&kept, "the image has been replaced since it was started", say)?;
    }
    if let Some((kept, format)) = all.iter().find_map(|kept| Some((kept, writes_as(kept, file)?))) {
        if served_as(kept).is_some_and(|(socket, _)| UnixStream::connect(socket).is_err()) {
            end(kept, SERVER_ENDED, say)?;
            return Ok(None);
        }
        if args.snapshot.is_some() {
            return Err(being_written(kept));
        }
        if let Some(wanted) = args.format.filter(|wanted| wanted.name() != format) {
            return Err(Failure::failed(format!(
                "session {} has the image open for writing as {format}, not as {}",
                kept.id(),
                wanted.name()
            )));
        }
        if !args.open.keys().is_empty() {
            // The session has the passphrase. Another one that is given is a mistake.
            let options = OpenOptions { force_share: true, ..args.open.options(args.format) };
            drop(Image::open(file, &options)?);
        }
        return Ok(Some(kept.clone()));
    }
    if access == Access::Write {
        return Ok(None);
    }
    let options = args.options();
    // A session that is kept is open to its user without the passphrase.
    let image = Image::open(file, &OpenOptions { locked: options.keys.is_empty(), ..options })?;
    let unreadable = |error| Failure::failed(format!("{}: {error}", names::shown(&file.to_string_lossy())));
    let wanted = Identity::of(&image, args, file).map_err(unreadable)?;
    let prefix = wanted.prefix();
    let mut found = None;
    for kept in &all {
        let Some((socket, name)) = served_as(kept) else { continue };
        if name.starts_with(&prefix) {
            if UnixStream::connect(socket).is_ok() {
                found.get_or_insert_with(|| kept.clone());
            } else {
                end(kept, SERVER_ENDED, say)?;
            }
            continue;
        }
        let this_file = name.starts_with(&format!("{}-", wanted.file));
        let same_options = name.contains(&format!("-{}-", wanted.options));
        if this_file && same_options {
            end(kept, "the image has changed since it was started", say)?;
        }
    }
    Ok(found)
}

/// Ends the sessions that read the image: it is about to be written, and their locks stand in the way.
pub(crate) fn make_way(file: &Path, say: &dyn Fn(&str)) -> Result<(), Failure> {
    let Ok(meta) = metadata(file) else { return Ok(()) };
    let prefix = format!("{}-", file_name(&meta));
    for kept in Kept::list() {
        if writes_as(&kept, file).is_some() {
            return Err(being_written(&kept));
        }
        if served_as(&kept).is_some_and(|(_, name)| name.starts_with(&prefix)) {
            end(&kept, "the image is about to be written", say)?;
        }
    }
    Ok(())
}

fn being_written(kept: &Kept) -> Failure {
    let id = kept.id();
    Failure::failed(format!(
        "session {id} has the image open for writing: `diskmill session stop {id}` ends it"
    ))
}

fn end(kept: &Kept, why: &str, say: &dyn Fn(&str)) -> Result<(), Failure> {
    match kept.stop_unused() {
        Ok(()) => {
            closed(kept)?;
            say(&format!("session {} is ended: {why}", kept.id()));
            Ok(())
        }
        Err(error) if error.kind() == Kind::Busy => Err(Failure::failed(format!(
            "session {} must end, as {why}, but another program is using it: try again",
            kept.id()
        ))),
        Err(error) => Err(failure(&error)),
    }
}

/// Given back when dropped.
pub(crate) struct Starting {
    path: PathBuf,
    _lock: File,
}

impl Drop for Starting {
    fn drop(&mut self) {
        // While it is locked: who waits for it sees that it has gone.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether nobody holds this lock.
pub(crate) fn is_free(lock: &Path) -> bool {
    File::open(lock).is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_ok())
}

/// The right to start a session on an image that is to be kept: of programs that want the same at once, one starts it, and
/// the others find it. Waits for `limit` at the most.
pub(crate) fn starting(file: &Path, limit: Duration) -> Result<Starting, Failure> {
    let failed = |error: io::Error| Failure::failed(format!("cannot lock the start of a session: {error}"));
    let name = format!("{}{LOCK}", file_name(&metadata(file).map_err(failed)?));
    let path = run_folder().map_err(failed)?.join(name);
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let mut lock = options.open(&path).map_err(failed)?;
    let end = Instant::now() + limit;
    loop {
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if lock.metadata().map_err(failed)?.nlink() > 0 => {
                return Ok(Starting { path, _lock: lock });
            }
            // Whoever held it has removed it.
            Ok(()) => {
                lock = options.open(&path).map_err(failed)?;
                continue;
            }
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
        if let Some(signal) = watch::received() {
            return Err(Failure::signal(signal, "interrupted"));
        }
        if Instant::now() > end {
            return Err(Failure::failed(
                "another program starts a session on this image and does not finish",
            ));
        }
        sleep(RETRY);
    }
}
