//! One connection to `guestfish --listen`: calls go out, output comes through a pipe of ours, then the status.

use std::io::{self, IoSlice, PipeReader, PipeWriter, Read, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, socket_with,
};

use crate::wire::{self, STATUS_LEN, Status};
use crate::{Cancel, Error, Kind, Result};

/// What is read or written at once, in bytes.
const CHUNK: usize = 256 << 10;
/// The size that the pipes are given where the system allows it, in bytes.
const PIPE_SIZE: usize = 1 << 20;
/// How often it is asked whether the work goes on where nothing is to be seen.
const TICK: Duration = Duration::from_millis(250);
/// How long a socket may be there that nobody listens at yet: guestfish binds it a moment before.
const LISTEN_LIMIT: Duration = Duration::from_millis(500);
const LISTEN_STEP: Duration = Duration::from_millis(2);
/// How often a server that takes no more clients for now is tried again.
const BUSY_STEP: Duration = Duration::from_millis(50);

/// Takes output as it comes.
pub(crate) type Sink<'a> = dyn FnMut(&[u8]) -> io::Result<()> + 'a;

/// How long to wait, and for what.
pub(crate) struct Patience<'a> {
    /// Ends the wait.
    pub(crate) cancel: &'a Cancel,
    /// The longest time without any sign of life.
    pub(crate) silence: Option<Duration>,
    /// The end of the wait whatever happens.
    pub(crate) until: Option<Instant>,
    /// Called a few times a second: whether the work is seen to go on.
    pub(crate) alive: &'a mut dyn FnMut() -> bool,
    /// How long a call that is cancelled may take to end: only then can the next one be made.
    pub(crate) grace: Duration,
}

impl Patience<'_> {
    /// How long to wait before looking again.
    fn left(&self, heard: Instant) -> Result<Duration> {
        let mut left = TICK;
        if let Some(limit) = self.silence {
            left = left.min(limit.checked_sub(heard.elapsed()).ok_or_else(|| {
                let limit = limit.as_secs_f32();
                Error::new(Kind::Timeout, format!("no answer and no sign of life for {limit} s"))
            })?);
        }
        if let Some(until) = self.until {
            let rest = until.checked_duration_since(Instant::now());
            left = left.min(rest.ok_or_else(|| Error::new(Kind::Timeout, "not done in time"))?);
        }
        Ok(left)
    }
}

/// A stream for a command to read, through a pipe.
pub(crate) struct Input<'a> {
    source: &'a mut dyn Read,
    reader: PipeReader,
    writer: Option<PipeWriter>,
    chunk: Vec<u8>,
    written: usize,
    failed: Option<io::Error>,
}

impl<'a> Input<'a> {
    pub(crate) fn new(source: &'a mut dyn Read) -> Result<Self> {
        let (reader, writer) = pipe().map_err(no_pipe)?;
        set_nonblocking(&writer).map_err(no_pipe)?;
        Ok(Self { source, reader, writer: Some(writer), chunk: Vec::new(), written: 0, failed: None })
    }

    /// The name under which another process opens the pipe.
    pub(crate) fn name(&self) -> Vec<u8> {
        format!("/proc/{}/fd/{}", std::process::id(), self.reader.as_raw_fd()).into_bytes()
    }

    /// Moves on what the pipe takes. At the end of the source the pipe is closed.
    fn pump(&mut self) {
        let Some(writer) = &mut self.writer else { return };
        loop {
            if self.written == self.chunk.len() {
                self.chunk.resize(CHUNK, 0);
                self.written = 0;
                match self.source.read(&mut self.chunk) {
                    Ok(0) => break,
                    Ok(len) => self.chunk.truncate(len),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                        self.chunk.clear();
                        continue;
                    }
                    Err(e) => {
                        self.failed = Some(e);
                        break;
                    }
                }
            }
            match writer.write(self.chunk.get(self.written..).unwrap_or_default()) {
                Ok(len) => self.written = self.written.saturating_add(len).min(self.chunk.len()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.failed = Some(e);
                    break;
                }
            }
        }
        self.writer = None;
    }
}

/// A connection. Dropping it lets the server serve the next client.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: UnixStream,
    /// `None` once somebody downstream had enough: the server's next write fails then.
    output: Option<PipeReader>,
    /// Whether the server has answered: hello has no answer of its own, and a server that does not take it closes.
    answered: bool,
    /// Whether a call has begun that has not ended.
    busy: bool,
}

impl Connection {
    /// Connects to the server's socket and says hello. A server that is busy has room for a few clients; the next ones wait.
    pub(crate) fn open(path: &Path, version: &str, patience: &mut Patience<'_>) -> Result<Self> {
        let lost = |e: io::Error| Error::io(format!("cannot reach guestfish at {}", path.display()), e);
        let address = SocketAddrUnix::new(path).map_err(|e| lost(e.into()))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let began = Instant::now();
        let socket = loop {
            // Linux: a socket that could not be connected can be tried again, but a fresh one has no past.
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
                .map_err(|e| lost(e.into()))?;
            match connect(&socket, &address) {
                Ok(()) => break UnixStream::from(socket),
                Err(Errno::CONNREFUSED) if began.elapsed() < LISTEN_LIMIT => thread::sleep(LISTEN_STEP),
                Err(Errno::AGAIN | Errno::INTR) => {
                    if patience.cancel.is_cancelled() {
                        return Err(cancelled());
                    }
                    let left = patience.left(began)?;
                    thread::sleep(left.min(BUSY_STEP));
                }
                Err(e) => return Err(lost(e.into())),
            }
        };
        socket.set_nonblocking(false).map_err(lost)?;
        Self::over(socket, version)
    }

    /// Hands over the output pipe and says hello: one byte that carries the descriptor, then the version.
    pub(crate) fn over(mut socket: UnixStream, version: &str) -> Result<Self> {
        let (output, theirs) = pipe().map_err(no_pipe)?;
        set_nonblocking(&output).map_err(no_pipe)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [theirs.as_fd()];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Error::protocol("no room for the descriptor of the output pipe"));
        }
        let lost = |e: io::Error| Error::io("cannot open a session with guestfish", e);
        sendmsg(&socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)
            .map_err(|e| lost(e.into()))?;
        drop(theirs);
        socket.write_all(&wire::hello(version)?).map_err(lost)?;
        socket.set_nonblocking(true).map_err(lost)?;
        Ok(Self { socket, output: Some(output), answered: false, busy: false })
    }

    /// Whether it can take another call.
    pub(crate) fn is_usable(&self) -> bool {
        self.output.is_some()
    }

    /// Whether the server still works for a call that was given up.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy
    }

    /// Sends one call and waits for its status; all output has gone into `sink` by then.
    ///
    /// # Errors
    /// `Died` when the server closes the connection, `Version` when it does so before its first answer, `Timeout`,
    /// `Cancelled`, after the call has ended or the patience's grace is over; `Io` when `sink` or the input's source fails (the call is over then too).
    pub(crate) fn call(
        &mut self,
        request: &[u8],
        input: Option<&mut Input<'_>>,
        sink: &mut Sink<'_>,
        patience: &mut Patience<'_>,
    ) -> Result<Status> {
        let status = self.exchange(request, input, sink, patience);
        match status {
            Err(error) if error.kind() == Kind::Died && !self.answered => {
                Err(Error::new(Kind::Version, error.message()))
            }
            status => status,
        }
    }

    fn exchange(
        &mut self,
        request: &[u8],
        mut input: Option<&mut Input<'_>>,
        sink: &mut Sink<'_>,
        patience: &mut Patience<'_>,
    ) -> Result<Status> {
        let mut unsent = request;
        let mut answer = Answer::default();
        let mut buffer = vec![0; CHUNK];
        let mut sink_failed = None;
        let mut heard = Instant::now();
        let mut given_up: Option<Instant> = None;
        loop {
            let ready = self.wait(unsent, input.as_deref(), patience, heard, given_up.is_some())?;
            let mut moved = ready.input;
            if ready.cancelled && !self.busy {
                return Err(cancelled());
            }
            if ready.cancelled && given_up.is_none() {
                given_up = Some(Instant::now());
                // What reads or writes a stream ends with it.
                if let Some(input) = input.as_deref_mut() {
                    input.writer = None;
                }
                self.output = None;
            }
            if given_up.is_some_and(|at| at.elapsed() >= patience.grace) {
                return Err(cancelled());
            }
            if ready.send {
                self.busy = true;
                let sent = send(&mut self.socket, unsent)?;
                unsent = unsent.get(sent..).unwrap_or_default();
                moved = true;
            }
            if ready.input
                && let Some(input) = input.as_deref_mut()
            {
                input.pump();
            }
            // Whoever has answered has written all its output before.
            let done = if ready.receive { answer.receive(&mut self.socket)? } else { None };
            if ready.output || done.is_some() {
                moved |= self.drain(&mut buffer, sink, &mut sink_failed, done.is_some());
            }
            if let Some(status) = done {
                (self.answered, self.busy) = (true, false);
                if given_up.is_some() {
                    return Err(cancelled());
                }
                if let Some(error) = sink_failed {
                    return Err(Error::io("cannot pass on what comes out of the image", error));
                }
                if let Some(error) = input.and_then(|input| input.failed.take()) {
                    return Err(Error::io("cannot read what goes into the image", error));
                }
                return Ok(status);
            }
            if moved || ready.receive || (patience.alive)() {
                heard = Instant::now();
            }
        }
    }

    /// Waits for anything to do, for a tick at most.
    fn wait(
        &self,
        unsent: &[u8],
        input: Option<&Input<'_>>,
        patience: &Patience<'_>,
        heard: Instant,
        given_up: bool,
    ) -> Result<Ready> {
        let left = if given_up { patience.grace.min(TICK) } else { patience.left(heard)? };
        let left = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
        let mut socket = PollFlags::IN;
        socket.set(PollFlags::OUT, !unsent.is_empty());
        let switch = if given_up { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = vec![PollFd::new(patience.cancel, switch), PollFd::new(&self.socket, socket)];
        let output = self.output.as_ref().map(|output| {
            fds.push(PollFd::new(output, PollFlags::IN));
            fds.len() - 1
        });
        let input = input.and_then(|input| input.writer.as_ref()).map(|writer| {
            fds.push(PollFd::new(writer, PollFlags::OUT));
            fds.len() - 1
        });
        match poll(&mut fds, Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(Error::io("cannot wait for guestfish", e.into())),
        }
        let events = |n: usize| fds.get(n).map_or(PollFlags::empty(), PollFd::revents);
        let ended = PollFlags::HUP | PollFlags::ERR;
        Ok(Ready {
            cancelled: !events(0).is_empty(),
            send: events(1).contains(PollFlags::OUT),
            receive: events(1).intersects(PollFlags::IN | ended),
            output: output.is_some_and(|n| !events(n).is_empty()),
            input: input.is_some_and(|n| !events(n).is_empty()),
        })
    }

    /// Takes what is in the output pipe: one buffer, or with `all` everything. Whether there was anything.
    fn drain(
        &mut self,
        buffer: &mut [u8],
        sink: &mut Sink<'_>,
        failed: &mut Option<io::Error>,
        all: bool,
    ) -> bool {
        let mut moved = false;
        while let Some(output) = &mut self.output {
            match output.read(buffer) {
                Ok(0) => self.output = None,
                Ok(len) => {
                    moved = true;
                    if let Err(e) = sink(buffer.get(..len).unwrap_or_default()) {
                        *failed = Some(e);
                        self.output = None;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // Empty; nothing else is expected of a pipe.
                Err(_) => break,
            }
            if !all {
                break;
            }
        }
        moved
    }
}

struct Ready {
    cancelled: bool,
    send: bool,
    receive: bool,
    output: bool,
    input: bool,
}

/// An answer as it comes in.
#[derive(Default)]
struct Answer {
    bytes: [u8; STATUS_LEN],
    len: usize,
}

impl Answer {
    fn receive(&mut self, socket: &mut UnixStream) -> Result<Option<Status>> {
        let rest = self.bytes.get_mut(self.len..).unwrap_or_default();
        match socket.read(rest) {
            Ok(0) => return Err(gone()),
            Ok(len) => self.len = self.len.saturating_add(len),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(gone()),
            Err(e) => return Err(Error::io("cannot read guestfish's answer", e)),
        }
        if self.len < STATUS_LEN { Ok(None) } else { wire::status(self.bytes).map(Some) }
    }
}

fn send(socket: &mut UnixStream, bytes: &[u8]) -> Result<usize> {
    match socket.write(bytes) {
        Ok(sent) => Ok(sent),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
        Err(e) if matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            Err(gone())
        }
        Err(e) => Err(Error::io("cannot send to guestfish", e)),
    }
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "cancelled")
}

fn gone() -> Error {
    Error::new(Kind::Died, "guestfish closed the connection without an answer")
}

fn no_pipe(error: io::Error) -> Error {
    Error::io("cannot make a pipe", error)
}

fn pipe() -> io::Result<(PipeReader, PipeWriter)> {
    let (reader, writer) = io::pipe()?;
    // Without it transfers are slower, nothing more.
    let _ = rustix::pipe::fcntl_setpipe_size(&writer, PIPE_SIZE);
    Ok((reader, writer))
}

fn set_nonblocking(fd: impl std::os::fd::AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&fd)?;
    Ok(fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
