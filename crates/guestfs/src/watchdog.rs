//! The session's end of the keeper.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::keeper::message::{MAX_LINE, Reply, Request};
use crate::process::ProcessId;
use crate::{Cancel, Error, Kind, Result};

/// How long the keeper may take to end everything before we go on without it (it goes on by itself).
const END_LIMIT: Duration = Duration::from_secs(35);

/// The program that runs [`keeper_main`](crate::keeper_main): as a rule this one, with a hidden subcommand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchdogCommand {
    program: PathBuf,
    args: Vec<OsString>,
}

impl WatchdogCommand {
    /// The program at `program` with these arguments.
    pub fn new<A: Into<OsString>>(program: impl Into<PathBuf>, args: impl IntoIterator<Item = A>) -> Self {
        Self { program: program.into(), args: args.into_iter().map(Into::into).collect() }
    }

    /// This very program, with these arguments. It works even if its file has been replaced or removed meanwhile.
    pub fn this_program<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> Self {
        Self::new("/proc/self/exe", args)
    }
}

/// A running keeper. Dropping it ends guestfish and the appliance and waits until they are gone.
#[derive(Debug)]
pub(crate) struct Keeper {
    child: Child,
    /// `None` once the keeper was told to end, by closing it.
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    line: Vec<u8>,
    released: bool,
}

impl Keeper {
    pub(crate) fn start(command: &WatchdogCommand) -> Result<Self> {
        let program = command.program.display();
        let mut child = Command::new(&command.program)
            .args(&command.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // It may outlive us, and must not hold on to our terminal or pipe.
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| Error::io(format!("cannot start the keeper, {program}"), e))?;
        match (child.stdin.take(), child.stdout.take()) {
            (stdin @ Some(_), Some(stdout)) => {
                Ok(Self { child, stdin, stdout, line: Vec::new(), released: false })
            }
            _ => Err(Error::protocol("the keeper has no pipes")),
        }
    }

    pub(crate) fn ask(&mut self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request)
            .map_err(|e| Error::invalid(format!("the settings cannot be handed over: {e}")))?;
        line.push(b'\n');
        let stdin = self.stdin.as_mut().ok_or_else(gone)?;
        stdin.write_all(&line).map_err(|e| Error::io("cannot reach the keeper", e))
    }

    /// The next reply.
    pub(crate) fn reply(&mut self, cancel: &Cancel, until: Instant) -> Result<Reply> {
        loop {
            if let Some(end) = self.line.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                let reply = serde_json::from_slice(&line);
                return reply.map_err(|e| Error::protocol(format!("the keeper's reply: {e}")));
            }
            let left = until.saturating_duration_since(Instant::now());
            let limit = Timespec::try_from(left).unwrap_or_default();
            let mut fds = [PollFd::new(cancel, PollFlags::IN), PollFd::new(&self.stdout, PollFlags::IN)];
            match poll(&mut fds, Some(&limit)) {
                Ok(0) => return Err(Error::new(Kind::Timeout, "guestfish did not start in time")),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(Error::io("cannot wait for the keeper", e.into())),
            }
            let [cancelled, _] = &fds;
            if !cancelled.revents().is_empty() {
                return Err(Error::new(Kind::Cancelled, "cancelled"));
            }
            let mut chunk = [0; 4096];
            match self.stdout.read(&mut chunk) {
                Ok(0) => return Err(gone()),
                Ok(len) => self.line.extend_from_slice(chunk.get(..len).unwrap_or_default()),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("cannot read from the keeper", e)),
            }
            if self.line.len() > MAX_LINE {
                return Err(Error::protocol("the keeper's reply is too long"));
            }
        }
    }

    /// Its process.
    pub(crate) fn process(&self) -> Option<ProcessId> {
        i32::try_from(self.child.id()).ok().and_then(ProcessId::of)
    }

    /// Lets it go on without us.
    pub(crate) fn release(&mut self) {
        self.released = true;
    }

    /// Ends guestfish and everything with it. Whether all is gone.
    pub(crate) fn end(&mut self) -> bool {
        self.stdin = None;
        let end = Instant::now() + END_LIMIT;
        while Instant::now() < end {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                Ok(Some(_)) | Err(_) => return true,
            }
        }
        false
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if !self.released {
            self.end();
        }
    }
}

fn gone() -> Error {
    Error::new(Kind::Died, "the keeper of the session has ended")
}
