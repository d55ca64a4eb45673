//! The keeper: a process of its own that starts guestfish and ends it, with all that it started, whatever becomes of the
//! program that wanted it.
//!
//! It is the subreaper of guestfish and its appliance, so that none of them can get away, and it holds the reading end of
//! a pipe to the session: when that ends, by a call, a signal or a crash, so does everything else.

use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{getpid, set_child_subreaper, setsid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::place::Place;
use crate::process::{end_all_descendants, reap};
use crate::{Error, Kind, Result, Settings};

pub(crate) mod message;
pub(crate) mod server;

use message::{MAX_LINE, Reply, Request, Server};

/// How long killed processes may take to be gone. Only waiting for a disk keeps one that long.
const END_LIMIT: Duration = Duration::from_secs(30);
/// How often the server is looked after.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

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
    let signals = Signals::catch().map_err(|e| Error::io("cannot catch signals", e))?;
    let mut requests = Requests::default();
    let settings = match requests.wait(&signals, None)? {
        Heard::Request(Request::Start(settings)) => settings,
        Heard::Request(_) => return Err(Error::protocol("the keeper was not told what to start")),
        Heard::End | Heard::Tick => return Ok(()),
    };
    let place = Place::create(&settings)?;
    let socket = Arc::new(Mutex::new(None));
    let result = serve(&settings, &place, &signals, &mut requests, &socket);
    if !end_all_descendants(END_LIMIT) {
        reply(&Reply::Note("guestfish's processes do not end: one of them waits for a disk".to_owned()));
    }
    if let Some(socket) = socket.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let _ = std::fs::remove_file::<std::path::PathBuf>(socket);
    }
    place.remove();
    result
}

/// Starts guestfish and stays until the session or the server ends.
fn serve(
    settings: &Settings,
    place: &Place,
    signals: &Signals,
    requests: &mut Requests,
    socket: &Mutex<Option<std::path::PathBuf>>,
) -> Result<()> {
    let (done, started) = UnixStream::pair().map_err(|e| Error::io("cannot make a socket", e))?;
    // A thread: the session may end while guestfish is slow to start.
    let starting = {
        let (settings, place) = (settings.clone(), place.clone());
        std::thread::spawn(move || {
            let _done = done;
            server::start(&settings, &place)
        })
    };
    loop {
        match requests.wait(signals, Some(&started))? {
            Heard::End => return Ok(()),
            Heard::Tick if starting.is_finished() => break,
            Heard::Tick => {}
            Heard::Request(_) => return Err(Error::protocol("guestfish is being started already")),
        }
    }
    let server = starting.join().unwrap_or_else(|_| Err(Error::new(Kind::Start, "the keeper panicked")))?;
    *socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(server.socket.clone());
    reply(&Reply::Ready(server.clone()));
    look_after(&server, signals, requests)
}

fn look_after(server: &Server, signals: &Signals, requests: &mut Requests) -> Result<()> {
    loop {
        match requests.wait(signals, None)? {
            Heard::End => return Ok(()),
            Heard::Tick => {
                reap();
                if !server.process.is_alive() {
                    return Ok(());
                }
            }
            Heard::Request(_) => reply(&failed(&Error::invalid("keeping sessions is not supported"))),
        }
    }
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

/// Signals that ask to end, as bytes in a socket.
struct Signals(UnixStream);

impl Signals {
    fn catch() -> std::io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            signal_hook::low_level::pipe::register(signal, OwnedFd::from(writer.try_clone()?))?;
        }
        Ok(Self(reader))
    }
}

/// What the keeper heard.
enum Heard {
    /// A request.
    Request(Request),
    /// The session has ended, or we are asked to.
    End,
    /// Nothing, for a while; or what was to be waited for besides.
    Tick,
}

/// Requests, read from standard input.
#[derive(Default)]
struct Requests {
    line: Vec<u8>,
}

impl Requests {
    /// The next thing to happen.
    fn wait(&mut self, signals: &Signals, also: Option<&UnixStream>) -> Result<Heard> {
        if let Some(request) = self.take()? {
            return Ok(Heard::Request(request));
        }
        let stdin = rustix::stdio::stdin();
        let mut fds = vec![PollFd::new(&stdin, PollFlags::IN), PollFd::new(&signals.0, PollFlags::IN)];
        if let Some(also) = also {
            fds.push(PollFd::from_borrowed_fd(also.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, Some(&TICK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::io("cannot wait for the session", e.into())),
        }
        let ready = |n: usize| fds.get(n).is_some_and(|fd| !fd.revents().is_empty());
        if ready(1) {
            return Ok(Heard::End);
        }
        if !ready(0) {
            return Ok(Heard::Tick);
        }
        let mut chunk = [0; 4096];
        match rustix::io::read(stdin, &mut chunk) {
            Ok(0) | Err(_) => Ok(Heard::End),
            Ok(len) => {
                self.line.extend_from_slice(chunk.get(..len).unwrap_or_default());
                if self.line.len() > MAX_LINE {
                    return Err(Error::protocol("the session's request is too long"));
                }
                Ok(self.take()?.map_or(Heard::Tick, Heard::Request))
            }
        }
    }

    /// A request, if there is a whole line.
    fn take(&mut self) -> Result<Option<Request>> {
        let Some(end) = self.line.iter().position(|&b| b == b'\n') else { return Ok(None) };
        let line: Vec<u8> = self.line.drain(..=end).collect();
        serde_json::from_slice(&line)
            .map(Some)
            .map_err(|e| Error::protocol(format!("the session's request: {e}")))
    }
}
