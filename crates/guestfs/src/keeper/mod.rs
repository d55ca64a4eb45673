//! The keeper: a process of its own that starts guestfish and ends it, with all that it started, whatever becomes of the
//! program that wanted it.
//!
//! It is the subreaper of guestfish and its appliance, so that none of them can get away, and it holds the reading end of
//! a pipe to the session: when that ends, by a call, a signal or a crash, so does everything else. Only a session that is
//! to be kept goes on without its program, until nobody has used it for a while.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getpid, getrlimit, set_child_subreaper, setrlimit, setsid};

use crate::connection::{Connection, Patience};
use crate::kept::{State, Turn, guard, last_use};
use crate::place::Place;
use crate::process::{descendants_of, end_all_descendants, reap};
use crate::{Cancel, Error, Kind, Result, Settings, wire};

pub(crate) mod message;
mod requests;
pub(crate) mod server;

use message::{Reply, Request, Server};
use requests::{Heard, Requests};

/// Descriptors that guestfish and QEMU may open: what most systems start programs with.
const DESCRIPTORS: u64 = 1024;
/// How long killed processes may take to be gone. Only waiting for a disk keeps one that long.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How long file systems may take to be written back when nobody is left to wait for them.
const WRITE_BACK_LIMIT: Duration = Duration::from_secs(20);

/// What the program that [`WatchdogCommand`](crate::WatchdogCommand) names has to run, and nothing else: it talks to the
/// session on standard input and output and ends when the session does.
#[must_use]
pub fn keeper_main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            reply(&failed(&error));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    // Out of the terminal's reach: Ctrl-C is for the session, which then ends us.
    let _ = setsid();
    set_child_subreaper(Some(getpid())).map_err(|e| Error::io("cannot look after guestfish", e.into()))?;
    limit_descriptors();
    let mut requests = Requests::new().map_err(|e| Error::io("cannot catch signals", e))?;
    let (settings, writable) = loop {
        match requests.wait(None)? {
            Heard::Request(Request::Start { settings, writable }) => break (settings, writable),
            Heard::Request(_) => return Err(Error::protocol("the keeper was not told what to start")),
            Heard::SessionGone | Heard::Signal => return Ok(()),
            Heard::Tick => {}
        }
    };
    let place = Place::create(&settings)?;
    let _guard = guard(&place).inspect_err(|_| place.remove())?;
    let result = keep_watch(&settings, writable, &place, &mut requests);
    note_sockets(&place);
    if !end_all_descendants(END_LIMIT) {
        reply(&Reply::Note("guestfish's processes do not end: one of them waits for a disk".to_owned()));
    }
    let turn = result?;
    place.remove();
    drop(turn);
    Ok(())
}

/// Lowers the number of descriptors that guestfish may open, as far as it is unusually high: libguestfs closes each one that
/// there could be in each program that it starts, which takes a second in all where there may be a million.
fn limit_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current > DESCRIPTORS) {
        // It is only slower otherwise.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(DESCRIPTORS), ..limit });
    }
}

/// Starts guestfish, stays until the session or the server ends, and removes the server's socket.
fn keep_watch(
    settings: &Settings,
    writable: bool,
    place: &Place,
    requests: &mut Requests,
) -> Result<Option<Turn>> {
    let start = || -> Result<Option<(Server, State)>> {
        let mut state = State::new(place)?;
        state.write()?;
        let Some(server) = start(settings, place, requests)? else { return Ok(None) };
        state.server = Some(server.clone());
        state.write()?;
        Ok(Some((server, state)))
    };
    let mut start = start;
    let (server, state) = match start() {
        Ok(Some(started)) => started,
        failed => {
            note_sockets(place);
            end_all_descendants(END_LIMIT);
            place.remove();
            return failed.map(|_| None);
        }
    };
    reply(&Reply::Ready(server.clone()));
    let ended = look_after(&server, state, requests);
    let turn = match ended {
        Ok(Ended::WriteBack(turn)) => {
            let turn = turn.or_else(|| Turn::take(place, WRITE_BACK_LIMIT, None).ok());
            if writable {
                write_back(&server);
            }
            turn
        }
        Ok(Ended::AtOnce) | Err(_) => None,
    };
    let _ = fs::remove_file(&server.socket);
    Ok(turn)
}

/// Starts guestfish in a thread, as the session may end while it is slow to start; `None` if it has.
fn start(settings: &Settings, place: &Place, requests: &mut Requests) -> Result<Option<Server>> {
    let (done, started) = UnixStream::pair().map_err(|e| Error::io("cannot make a socket", e))?;
    let starting = {
        let (settings, place) = (settings.clone(), place.clone());
        std::thread::spawn(move || {
            let _done = done;
            server::start(&settings, &place)
        })
    };
    loop {
        match requests.wait(Some(&started))? {
            Heard::SessionGone | Heard::Signal | Heard::Request(_) => return Ok(None),
            Heard::Tick if starting.is_finished() => break,
            Heard::Tick => {}
        }
    }
    starting.join().unwrap_or_else(|_| Err(Error::new(Kind::Start, "the keeper panicked"))).map(Some)
}

/// How a session has ended.
enum Ended {
    /// In good order, or its program is gone: what was written is to be saved.
    WriteBack(Option<Turn>),
    /// There is nothing to be saved any more.
    AtOnce,
}

fn look_after(server: &Server, mut state: State, requests: &mut Requests) -> Result<Ended> {
    loop {
        match requests.wait(None)? {
            Heard::SessionGone if state.keep.is_some() => requests.close(),
            Heard::SessionGone | Heard::Signal => return Ok(Ended::WriteBack(None)),
            Heard::Request(Request::Kill) => return Ok(Ended::AtOnce),
            Heard::Request(Request::Keep(keep)) => {
                state.keep = Some(keep);
                match state.write() {
                    Ok(()) => reply(&Reply::Kept),
                    Err(e) => {
                        state.keep = None;
                        reply(&failed(&e));
                    }
                }
            }
            Heard::Request(Request::Start { .. }) => {
                return Err(Error::protocol("guestfish has been started already"));
            }
            Heard::Tick => {
                reap();
                // While QEMU is there to ask: nobody can when it is killed.
                note_sockets(&server.place);
                let appliance = state.keep.as_ref().map(|keep| keep.appliance);
                if !server.process.is_alive() || appliance.is_some_and(|process| !process.is_alive()) {
                    return Ok(Ended::AtOnce);
                }
                if let Some(keep) = &state.keep
                    && is_idle(&server.place, Duration::from_secs(keep.idle_secs))
                    && let Ok(turn) = Turn::take(&server.place, Duration::ZERO, None)
                {
                    return Ok(Ended::WriteBack(Some(turn)));
                }
            }
        }
    }
}

fn note_sockets(place: &Place) {
    let own = getpid().as_raw_nonzero().get();
    place.note_sockets(|| descendants_of(own));
}

fn is_idle(place: &Place, limit: Duration) -> bool {
    last_use(place).and_then(|at| at.elapsed().ok()).is_some_and(|idle| idle >= limit)
}

/// Unmounts and shuts down, as well as it goes: there is nobody to tell.
fn write_back(server: &Server) {
    let end = Instant::now() + WRITE_BACK_LIMIT;
    let finish = || -> Result<()> {
        let cancel = Cancel::new().map_err(|e| Error::io("cannot make an event descriptor", e))?;
        let mut patience = Patience {
            cancel: &cancel,
            silence: None,
            until: Some(end),
            alive: &mut || false,
            grace: Duration::ZERO,
        };
        let mut connection = Connection::open(&server.socket, &server.version, &mut patience)?;
        for command in ["umount-all", "shutdown"] {
            connection.call(&wire::call(command, &[])?, None, &mut |_| Ok(()), &mut patience)?;
        }
        Ok(())
    };
    let _ = finish();
}

fn failed(error: &Error) -> Reply {
    let message = match error.os_error() {
        Some(cause) => format!("{}: {cause}", error.message()),
        None => error.message().to_owned(),
    };
    Reply::Failed { kind: error.kind(), message, hint: error.next_step().map(str::to_owned) }
}

/// Whoever does not listen any more is not told.
fn reply(reply: &Reply) {
    if let Ok(mut line) = serde_json::to_vec(reply) {
        line.push(b'\n');
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}
