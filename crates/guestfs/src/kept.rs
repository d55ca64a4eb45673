//! Sessions that outlive the program that started them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};

use crate::keeper::message::Server;
use crate::place::{Place, root};
use crate::process::ProcessId;
use crate::{Cancel, Disk, Error, Kind, Result};

/// The version of [`State`]; another one is not ours to use.
const VERSION: u32 = 2;
/// The file that a keeper holds locked while it lives.
const GUARD: &str = "guard";
/// A folder without a guard is left alone so long: its keeper may be about to make it.
const YOUNG: Duration = Duration::from_secs(60);
/// How often a lock that somebody else holds is tried again.
const RETRY: Duration = Duration::from_millis(5);
/// How long a session that was told to stop may take to write back and end.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// How long killed processes may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What a session's folder tells other processes: `state.json`, written by the keeper.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct State {
    version: u32,
    pub(crate) keeper: ProcessId,
    pub(crate) place: Place,
    /// Once guestfish listens.
    pub(crate) server: Option<Server>,
    /// Once the session is kept.
    pub(crate) keep: Option<Keep>,
}

/// What the keeper is told to keep.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Keep {
    /// After how many seconds without use the session ends.
    pub(crate) idle_secs: u64,
    /// The disks, in the appliance's order.
    pub(crate) disks: Vec<KeptDisk>,
    /// What its owner calls it.
    pub(crate) label: String,
    /// The appliance: guestfish lives on when it ends, and is of no use then.
    pub(crate) appliance: ProcessId,
}

/// A disk with the identity of its file.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct KeptDisk {
    pub(crate) disk: Disk,
    file: Option<Identity>,
}

/// A file, and for read-only disks its state: what the appliance has in its cache must still be true.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Identity {
    dev: u64,
    ino: u64,
    unchanged: Option<(u64, i64, i64)>,
}

impl KeptDisk {
    pub(crate) fn new(disk: &Disk) -> Self {
        let file = disk.path().and_then(|path| Identity::of(path, disk.is_writable()));
        Self { disk: disk.clone(), file }
    }

    /// Whether it can serve where `wanted` is asked for: the same file in the same format, and writable if need be.
    fn serves(&self, wanted: &Disk) -> bool {
        if wanted.is_writable() && !self.disk.is_writable() {
            return false;
        }
        match wanted.path() {
            None => self.disk == *wanted,
            Some(path) => {
                self.disk.format() == wanted.format()
                    && self.file.is_some()
                    && self.file == Identity::of(path, self.disk.is_writable())
            }
        }
    }
}

impl Identity {
    fn of(path: &Path, writable: bool) -> Option<Self> {
        let found = fs::metadata(path).ok()?;
        let unchanged = (!writable).then(|| (found.size(), found.mtime(), found.mtime_nsec()));
        Some(Self { dev: found.dev(), ino: found.ino(), unchanged })
    }
}

impl State {
    pub(crate) fn new(place: &Place) -> Result<Self> {
        let own = rustix::process::getpid().as_raw_nonzero().get();
        let keeper =
            ProcessId::of(own).ok_or_else(|| Error::new(Kind::Io, "/proc does not show this process"))?;
        Ok(Self { version: VERSION, keeper, place: place.clone(), server: None, keep: None })
    }

    pub(crate) fn write(&self) -> Result<()> {
        let path = self.place.state();
        let write = || -> io::Result<()> {
            let fresh = path.with_extension("new");
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            fs::rename(&fresh, &path)
        };
        write().map_err(|e| Error::io(format!("cannot write {}", path.display()), e))
    }

    fn read(path: &Path) -> Option<Self> {
        let state: Self = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        // What it names is removed by us one day: only what stands where it says.
        (state.version == VERSION && Some(state.place.dir.as_path()) == path.parent()).then_some(state)
    }
}

/// A session that is kept: it runs on, and programs of this user may attach to it by
/// [`Session::attach`](crate::Session::attach).
#[derive(Debug, Clone)]
pub struct Kept {
    pub(crate) server: Server,
    pub(crate) keeper: ProcessId,
    keep: Keep,
}

impl Kept {
    fn of(state: State) -> Option<Self> {
        let (server, keep) = (state.server?, state.keep?);
        let alive = [state.keeper, server.process, keep.appliance].into_iter().all(ProcessId::is_alive);
        alive.then_some(Self { server, keeper: state.keeper, keep })
    }

    /// One whose keeper has just said that it keeps it.
    pub(crate) fn new(server: Server, keeper: Option<ProcessId>, keep: Keep) -> Result<Self> {
        let keeper = keeper.ok_or_else(ended)?;
        Ok(Self { server, keeper, keep })
    }

    /// All of this user's kept sessions that are alive.
    #[must_use]
    pub fn list() -> Vec<Self> {
        states().filter_map(|(_, state)| Self::of(state?)).collect()
    }

    /// Whether its only disk is this file itself, open for writing.
    #[must_use]
    pub fn writes_to(&self, path: &Path) -> bool {
        match self.keep.disks.as_slice() {
            [kept] if kept.disk.is_writable() => kept.file.is_some() && kept.file == Identity::of(path, true),
            _ => false,
        }
    }

    /// The kept session that has exactly these disks, unchanged, and may write to those that are to be written.
    #[must_use]
    pub fn find(disks: &[Disk]) -> Option<Self> {
        Self::list().into_iter().find(|kept| {
            kept.keep.disks.len() == disks.len()
                && kept.keep.disks.iter().zip(disks).all(|(kept, wanted)| kept.serves(wanted))
        })
    }

    /// The session's name.
    #[must_use]
    pub fn id(&self) -> String {
        self.server.place.id()
    }

    /// What its owner called it.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.keep.label
    }

    /// Its disks, in the appliance's order.
    pub fn disks(&self) -> impl Iterator<Item = &Disk> {
        self.keep.disks.iter().map(|kept| &kept.disk)
    }

    /// After how long without use it ends by itself.
    #[must_use]
    pub fn idle_limit(&self) -> Duration {
        Duration::from_secs(self.keep.idle_secs)
    }

    /// How long it has not been used.
    #[must_use]
    pub fn idle(&self) -> Duration {
        last_use(&self.server.place).and_then(|at| at.elapsed().ok()).unwrap_or_default()
    }

    /// The number of its guestfish process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.server.process.pid
    }

    /// Ends it as [`stop`](Self::stop) does, unless a program is using it right now.
    ///
    /// # Errors
    /// `Busy` if one is.
    pub fn stop_unused(&self) -> Result<()> {
        match Turn::take(&self.server.place, Duration::ZERO, None) {
            Err(error) if error.kind() == Kind::Busy => Err(error),
            _ => self.stop(),
        }
    }

    /// Ends it, after everything written has been brought to its images, and waits until it is gone. A command that uses it
    /// has a while to finish; then all is killed.
    ///
    /// # Errors
    /// `Io` if its processes do not end.
    pub fn stop(&self) -> Result<()> {
        self.keeper.signal(rustix::process::Signal::TERM);
        if self.keeper.wait_gone(STOP_LIMIT) {
            return Ok(());
        }
        self.server.kill();
        if self.keeper.wait_gone(KILL_LIMIT) {
            return Ok(());
        }
        self.keeper.kill();
        self.keeper.wait_gone(KILL_LIMIT);
        sweep();
        if self.server.process.is_alive() || self.keep.appliance.is_alive() {
            return Err(Error::new(Kind::Io, format!("the processes of session {} do not end", self.id())));
        }
        Ok(())
    }
}

/// What was left of sessions whose programs were killed, keeper and all, is ended and removed. Returns the folders.
/// Sessions that are alive are left alone. A program does it before it opens its first session: an appliance that was left
/// may still have the image open.
pub fn sweep() -> Vec<PathBuf> {
    let mut swept = Vec::new();
    for Dead { dir, state, _guard } in dead() {
        // The folder's name was chosen at random and is in the environment of all that the session started.
        let mut variable = b"XDG_RUNTIME_DIR=".to_vec();
        variable.extend_from_slice(std::os::unix::ffi::OsStrExt::as_bytes(dir.as_os_str()));
        let processes = crate::process::with_variable(&variable);
        if let Some(state) = &state {
            state.place.note_sockets(|| processes.clone());
        }
        for process in processes {
            process.kill();
            process.wait_gone(Duration::from_secs(5));
        }
        if let Some(state) = state {
            if let Some(server) = &state.server {
                let _ = fs::remove_file(&server.socket);
            }
            state.place.remove();
        }
        let _ = fs::remove_dir_all(&dir);
        swept.push(dir);
    }
    swept
}

/// The folders that [`sweep`] would remove.
#[must_use]
pub fn leftovers() -> Vec<PathBuf> {
    dead().map(|dead| dead.dir).collect()
}

/// The folder of a session that has ended without removing it.
struct Dead {
    dir: PathBuf,
    state: Option<State>,
    /// Held while we look at it, so that nobody else removes it meanwhile.
    _guard: Option<File>,
}

/// The folders whose sessions have ended without removing them.
fn dead() -> impl Iterator<Item = Dead> {
    states().filter_map(|(dir, state)| {
        let Ok(guard) = File::open(dir.join(GUARD)) else {
            return is_old(&dir).then_some(Dead { dir, state, _guard: None });
        };
        // A keeper that lives holds it, in whichever container of this machine.
        flock(&guard, FlockOperation::NonBlockingLockExclusive).ok()?;
        Some(Dead { dir, state, _guard: Some(guard) })
    })
}

/// The folders below the root, with their states.
fn states() -> impl Iterator<Item = (PathBuf, Option<State>)> {
    let root = root();
    // A root that is not ours alone is never written to; nothing in it is believed either.
    let entries = crate::place::private_dir(&root).ok().and_then(|()| fs::read_dir(&root).ok());
    entries.into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).map(
        |dir| {
            let state = State::read(&dir.join("state.json"));
            (dir, state)
        },
    )
}

fn is_old(dir: &Path) -> bool {
    let age = fs::metadata(dir).and_then(|found| found.modified()).ok().and_then(|at| at.elapsed().ok());
    age.is_some_and(|age| age > YOUNG)
}

/// When somebody used the session last.
pub(crate) fn last_use(place: &Place) -> Option<SystemTime> {
    fs::metadata(place.lock()).and_then(|found| found.modified()).ok()
}

/// Locks the session's guard for as long as its keeper lives.
pub(crate) fn guard(place: &Place) -> Result<File> {
    let path = place.dir.join(GUARD);
    let lock = || -> io::Result<File> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(file)
    };
    lock().map_err(|e| Error::io(format!("cannot lock {}", path.display()), e))
}

/// The right to talk to a session's guestfish, which serves one program at a time.
#[derive(Debug)]
pub(crate) struct Turn(File);

impl Turn {
    /// Waits for our turn, `limit` at the most, and until `cancel` is on.
    ///
    /// # Errors
    /// `Busy` when others do not let go of it; `Died` when the session has ended meanwhile; `Cancelled`.
    pub(crate) fn take(place: &Place, limit: Duration, cancel: Option<&Cancel>) -> Result<Self> {
        let path = place.lock();
        let doing = |e| Error::io(format!("cannot lock {}", path.display()), e);
        // The keeper made it: making it here would put it into a folder that is being removed.
        let file = match OpenOptions::new().write(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(ended()),
            file => file.map_err(doing)?,
        };
        let end = Instant::now() + limit;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() >= end => {
                    return Err(Error::new(Kind::Busy, "another program is using the session"));
                }
                Err(_) if cancel.is_some_and(Cancel::is_cancelled) => {
                    return Err(Error::new(Kind::Cancelled, "cancelled"));
                }
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => std::thread::sleep(RETRY),
                Err(e) => return Err(doing(e.into())),
            }
        }
        // The keeper that ends a session holds the lock until the file is gone.
        let (ours, now) = (file.metadata().map_err(doing)?, fs::metadata(&path));
        if now.is_ok_and(|now| now.ino() == ours.ino()) { Ok(Self(file)) } else { Err(ended()) }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // The time of the last use, from which idleness counts.
        let _ = self.0.set_modified(SystemTime::now());
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

fn ended() -> Error {
    Error::new(Kind::Died, "the session has ended")
}
