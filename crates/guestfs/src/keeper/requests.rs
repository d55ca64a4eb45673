//! What the keeper listens to: its session's requests and end, and signals.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::message::{MAX_LINE, Request};
use crate::{Error, Result};

/// How often the server is looked after.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };

/// What the keeper heard.
pub(super) enum Heard {
    /// A request.
    Request(Request),
    /// The session has closed its end.
    SessionGone,
    /// A signal asks us to end.
    Signal,
    /// Nothing, for a while; or what was to be waited for besides.
    Tick,
}

/// Requests, read from standard input, and signals.
pub(super) struct Requests {
    line: Vec<u8>,
    signals: UnixStream,
    closed: bool,
}

impl Requests {
    pub(super) fn new() -> io::Result<Self> {
        let (signals, writer) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            signal_hook::low_level::pipe::register(signal, OwnedFd::from(writer.try_clone()?))?;
        }
        Ok(Self { line: Vec::new(), signals, closed: false })
    }

    /// Listens to signals only from now on.
    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    /// The next thing to happen, `also` included.
    pub(super) fn wait(&mut self, also: Option<&UnixStream>) -> Result<Heard> {
        if let Some(request) = self.take()? {
            return Ok(Heard::Request(request));
        }
        let stdin = rustix::stdio::stdin();
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if !self.closed {
            fds.push(PollFd::from_borrowed_fd(stdin, PollFlags::IN));
        }
        if let Some(also) = also {
            fds.push(PollFd::from_borrowed_fd(also.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, Some(&TICK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::io("cannot wait for the session", e.into())),
        }
        let ready = |n: usize| fds.get(n).is_some_and(|fd| !fd.revents().is_empty());
        if ready(0) {
            return Ok(Heard::Signal);
        }
        if self.closed || !ready(1) {
            return Ok(Heard::Tick);
        }
        let mut chunk = [0; 4096];
        match rustix::io::read(stdin, &mut chunk) {
            Ok(0) | Err(_) => Ok(Heard::SessionGone),
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
