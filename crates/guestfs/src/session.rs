use std::fmt;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::connection::{Connection, Input, Patience, Sink};
use crate::keeper::message::{Reply, Request, Server};
use crate::kept::{Keep, Kept, KeptDisk, Turn};
use crate::keys::Keys;
use crate::messages::{Messages, diagnose, refused_version};
use crate::process::ProcessId;
use crate::watchdog::Keeper;
use crate::wire::{self, Status};
use crate::{Cancel, Command, Disk, Error, Event, Kind, Options, Result};

/// The most that [`Session::call`] collects, in bytes; larger outputs go through [`Session::send`].
pub const MAX_OUTPUT: usize = 256 << 20;
/// What [`Session::read`] asks for at once, in bytes: a message of the appliance holds less than 4 MiB.
const READ_CHUNK: usize = 2 << 20;
/// How long we wait for another program that uses a kept session.
const TURN_LIMIT: Duration = Duration::from_secs(60);
/// How long a call that is cancelled may take to end before its session is.
const GRACE: Duration = Duration::from_secs(3);
/// How long [`Session::tidy`] waits.
const TIDY_LIMIT: Duration = Duration::from_secs(5);
/// How long a killed process may be seen after it has closed its sockets.
const DEATH: Duration = Duration::from_millis(200);
/// The name of the event handler that hears what QEMU and the appliance say while it starts.
const CONSOLE: &str = "diskmill-console";
/// How long the keeper may take to write down what it keeps.
const KEEP_LIMIT: Duration = Duration::from_secs(10);

/// A running appliance with disks, and guestfish in front of it.
///
/// However it ends (close, drop, panic, a signal, a crash), guestfish and the appliance end with it, and nothing of
/// them is left. Only [`close`](Self::close) makes sure that all writes have arrived.
pub struct Session {
    // Before the keeper: fields are dropped in this order.
    connection: Option<Connection>,
    messages: Messages,
    server: Server,
    owner: Owner,
    options: Options,
    disks: Vec<Disk>,
    ended: bool,
}

/// Who ends the appliance.
enum Owner {
    /// We do, through our keeper.
    Us(Keeper),
    /// The keeper of a kept session, which we use for a while.
    Kept(Turn),
    /// It has ended.
    Nobody,
}

impl Session {
    /// Starts the appliance with these disks, which the guest sees as `/dev/sda` and so on, in this order.
    ///
    /// # Errors
    /// `NotInstalled`, `Start`, `NoKernel`, `Version`, `Busy` when an image or the appliance's cache is locked, `Timeout`,
    /// `Cancelled`, `Io`; `Invalid` as [`Settings::check`](crate::Settings::check). Nothing is left running then.
    pub fn open(disks: &[Disk], options: Options) -> Result<Self> {
        let settings = options.settings.clone();
        settings.check()?;
        Self::start(disks, options).map_err(|error| settings.explain_late(error))
    }

    fn start(disks: &[Disk], options: Options) -> Result<Self> {
        let until = Instant::now() + options.settings.start_timeout;
        options.tell(Event::Step("starting guestfish"));
        let mut keeper = Keeper::start(&options.watchdog)?;
        let writable = disks.iter().any(Disk::is_writable);
        keeper.ask(&Request::Start { settings: Box::new(options.settings.clone()), writable })?;
        let server = loop {
            match keeper.reply(&options.cancel, until)? {
                Reply::Note(note) => options.tell(Event::Step(&note)),
                Reply::Ready(server) => break server,
                Reply::Kept => return Err(Error::protocol("the keeper keeps what was not started")),
                Reply::Failed { kind, message, hint } => return Err(failed(kind, message, hint)),
            }
        };
        let mut patience = Patience {
            cancel: &options.cancel,
            silence: None,
            until: Some(until),
            alive: &mut || false,
            grace: Duration::ZERO,
        };
        let connection = Connection::open(&server.socket, &server.version, &mut patience)?;
        let mut session = Self {
            connection: Some(connection),
            messages: Messages::new(&server.place),
            server,
            owner: Owner::Us(keeper),
            options,
            disks: disks.to_vec(),
            ended: false,
        };
        session.launch(until)?;
        Ok(session)
    }

    /// Uses a session that was kept. It lives on when this one is dropped. One program at a time does so: others wait
    /// for a minute. Its settings are those it was opened with; of `options`, the time limit of calls, the switch and
    /// the listener count.
    ///
    /// # Errors
    /// `Died` when it has ended meanwhile; `Busy` when another program does not let go of it; `Cancelled`; `Timeout`, which
    /// ends the session.
    pub fn attach(kept: &Kept, options: Options) -> Result<Self> {
        let turn = Turn::take(&kept.server.place, TURN_LIMIT, Some(&options.cancel))?;
        let mut patience = Patience {
            cancel: &options.cancel,
            silence: options.settings.call_timeout,
            until: None,
            alive: &mut || false,
            grace: Duration::ZERO,
        };
        let connection = Connection::open(&kept.server.socket, &kept.server.version, &mut patience);
        let connection = connection.inspect_err(|error| {
            if error.kind() == Kind::Timeout {
                kept.server.kill();
            }
        })?;
        Ok(Self {
            connection: Some(connection),
            messages: Messages::new(&kept.server.place),
            server: kept.server.clone(),
            owner: Owner::Kept(turn),
            options,
            disks: kept.disks().cloned().collect(),
            ended: false,
        })
    }

    /// Lets go of the session without ending it: it can be attached to until nobody has done so for `idle`. Everything
    /// that was written has arrived in its image then. `label` is what lists call it.
    ///
    /// # Errors
    /// `Io` when the session's state cannot be written; `Invalid` when a disk's name is no UTF-8, or the session is kept
    /// already; as [`call`](Self::call) when file systems cannot be written back. The session ends then.
    pub fn keep(mut self, idle: Duration, label: impl Into<String>) -> Result<Kept> {
        if self.is_writable() {
            self.internal(&Command::new("sync"))?;
        }
        let pid = self.internal(&Command::new("get-pid"))?;
        let pid = String::from_utf8_lossy(&pid).trim().parse().ok();
        let appliance = pid.and_then(ProcessId::of);
        let appliance = appliance.ok_or_else(|| Error::new(Kind::Died, "the appliance has ended"))?;
        let disks = self.disks.iter().map(KeptDisk::new).collect();
        let keep = Keep { idle_secs: idle.as_secs(), disks, label: label.into(), appliance };
        // Lets the next program in, and its time is the first use.
        self.connection = None;
        drop(Turn::take(&self.server.place, TURN_LIMIT, Some(&self.options.cancel))?);
        let Owner::Us(keeper) = &mut self.owner else {
            return Err(Error::invalid("the session is kept already"));
        };
        keeper.ask(&Request::Keep(keep.clone()))?;
        let until = Instant::now() + KEEP_LIMIT;
        loop {
            match keeper.reply(&self.options.cancel, until)? {
                Reply::Note(_) => {}
                Reply::Kept => break,
                Reply::Failed { kind, message, hint } => return Err(failed(kind, message, hint)),
                Reply::Ready(_) => return Err(Error::protocol("the keeper starts again")),
            }
        }
        let keeper_process = keeper.process();
        keeper.release();
        Kept::new(self.server.clone(), keeper_process, keep)
    }

    /// Sets how long a call may take without any sign of life; `None`: for ever.
    pub fn set_call_timeout(&mut self, limit: Option<Duration>) {
        self.options.settings.call_timeout = limit;
    }

    /// The session's name, which [`Kept::id`] tells, too.
    #[must_use]
    pub fn id(&self) -> String {
        self.server.place.id()
    }

    /// The number of the guestfish process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.server.process.pid
    }

    /// The disks, in the appliance's order.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// Whether any of them may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.disks.iter().any(Disk::is_writable)
    }

    /// What an earlier user of this session has noted, such as what is mounted.
    #[must_use]
    pub fn notes(&self) -> serde_json::Map<String, serde_json::Value> {
        let text = std::fs::read(self.server.place.notes()).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Notes something for later users of this session; it replaces what was noted before.
    ///
    /// # Errors
    /// `Io` when it cannot be written.
    pub fn set_notes(&mut self, notes: &serde_json::Map<String, serde_json::Value>) -> Result<()> {
        let path = self.server.place.notes();
        let write = || std::fs::write(&path, serde_json::to_vec(notes)?);
        write().map_err(|e| Error::io(format!("cannot write {}", path.display()), e))
    }

    fn launch(&mut self, until: Instant) -> Result<()> {
        let progress = self.messages.progress_handler();
        self.internal(&Command::new("event").arg("diskmill").arg("progress").arg(progress))?;
        // Without it nobody hears why QEMU ends.
        let console = self.messages.console_handler();
        self.internal(&Command::new("event").arg(CONSOLE).arg("appliance").arg(console))?;
        if self.options.settings.network {
            self.internal(&Command::new("set-network").arg("true"))?;
        }
        for command in self.disks.iter().map(Disk::add).collect::<Result<Vec<_>>>()? {
            self.internal(&command)?;
        }
        self.options.tell(Event::Step("starting the appliance"));
        self.exchange(&Command::new("run"), None, &mut |_| Ok(()), Some(until), Duration::ZERO)?;
        self.internal(&Command::new("delete-event").arg(CONSOLE)).map(drop)
    }

    /// Sends a command and gives back its output.
    ///
    /// # Errors
    /// `Invalid` for what may not be sent; `Command`, `NotFound`, `NoSpace`, `ReadOnly` when the guest refuses; `Died`,
    /// `Timeout`, `Cancelled` end the session; `Io` for more output than [`MAX_OUTPUT`].
    pub fn call(&mut self, command: &Command) -> Result<Vec<u8>> {
        command.check()?;
        self.internal(command)
    }

    /// Sends a command; its output goes into `output` as it comes, what it reads comes from `input`.
    ///
    /// # Errors
    /// As [`call`](Self::call); `Io` if `input` or `output` fails.
    pub fn send(
        &mut self,
        command: &Command,
        input: Option<&mut dyn Read>,
        output: &mut dyn Write,
    ) -> Result<()> {
        command.check()?;
        self.exchange(command, input, &mut |bytes| output.write_all(bytes), None, self.grace())
    }

    /// The content of a file of the guest: for small ones faster than [`download`](Self::download), which makes the
    /// appliance start a program.
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn read(&mut self, path: impl AsRef<Path>) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        loop {
            let at = content.len();
            let count = READ_CHUNK.min(MAX_OUTPUT.saturating_sub(at));
            if count == 0 {
                let path = path.as_ref().display();
                return Err(Error::invalid(format!("{path} has more than {MAX_OUTPUT} bytes")));
            }
            let command = Command::new("pread").path(&path).arg(count.to_string()).arg(at.to_string());
            content.extend(self.internal(&command)?);
            if content.len().saturating_sub(at) < count {
                return Ok(content);
            }
        }
    }

    /// Copies a file of the guest to `output`. How many bytes there were.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn download(&mut self, path: impl AsRef<Path>, output: &mut dyn Write) -> Result<u64> {
        let command = Command::new("download").path(path).output();
        let mut count = 0u64;
        let mut sink = |bytes: &[u8]| {
            count = count.saturating_add(bytes.len() as u64);
            output.write_all(bytes)
        };
        self.exchange(&command, None, &mut sink, None, self.grace())?;
        Ok(count)
    }

    /// Copies `input` to a file of the guest, which is made or overwritten. After an error a part of it may be there.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn upload(&mut self, input: &mut dyn Read, path: impl AsRef<Path>) -> Result<()> {
        let command = Command::new("upload").input().path(path);
        self.exchange(&command, Some(input), &mut |_| Ok(()), None, self.grace())
    }

    /// Sends a command that tidies up after another one, which failed or was cancelled: it gets a few seconds, even if the
    /// switch is on.
    ///
    /// # Errors
    /// As [`call`](Self::call); `Died` where the session has ended.
    pub fn tidy(&mut self, command: &Command) -> Result<()> {
        command.check()?;
        let cancel = Cancel::new().map_err(|e| Error::io("cannot make an event descriptor", e))?;
        let theirs = std::mem::replace(&mut self.options.cancel, cancel);
        let until = Instant::now() + TIDY_LIMIT;
        let result = self.exchange(command, None, &mut |_| Ok(()), Some(until), Duration::ZERO);
        self.options.cancel = theirs;
        result
    }

    /// How long a call that is cancelled is waited for: where we end the appliance and nothing is written, not at all.
    fn grace(&self) -> Duration {
        match self.owner {
            Owner::Kept(_) => GRACE,
            _ if self.is_writable() => GRACE,
            _ => Duration::ZERO,
        }
    }

    /// Ends the session, or lets go of a kept one. If a disk was writable, everything that was written has arrived in its
    /// image when this returns without an error.
    ///
    /// # Errors
    /// As [`call`](Self::call), when file systems cannot be unmounted or written back.
    pub fn close(mut self) -> Result<()> {
        let writable = self.is_writable();
        match std::mem::replace(&mut self.owner, Owner::Nobody) {
            Owner::Us(mut keeper) => {
                let written = if writable { self.write_back() } else { Ok(()) };
                self.connection = None;
                if written.as_ref().is_err_and(|e| e.kind().is_fatal()) {
                    let _ = keeper.ask(&Request::Kill);
                }
                let ended = keeper.end();
                written?;
                if ended { Ok(()) } else { Err(Error::new(Kind::Io, UNENDING)) }
            }
            Owner::Kept(_turn) if writable => self.internal(&Command::new("sync")).map(drop),
            Owner::Kept(_) | Owner::Nobody => Ok(()),
        }
    }

    fn write_back(&mut self) -> Result<()> {
        self.internal(&Command::new("umount-all"))?;
        self.internal(&Command::new("shutdown")).map(drop)
    }

    fn internal(&mut self, command: &Command) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let mut sink = |bytes: &[u8]| {
            if out.len().saturating_add(bytes.len()) > MAX_OUTPUT {
                return Err(io::Error::new(
                    io::ErrorKind::FileTooLarge,
                    format!("more than {MAX_OUTPUT} bytes"),
                ));
            }
            out.extend_from_slice(bytes);
            Ok(())
        };
        self.exchange(command, None, &mut sink, None, self.grace())?;
        Ok(out)
    }

    fn exchange(
        &mut self,
        command: &Command,
        input: Option<&mut dyn Read>,
        sink: &mut Sink<'_>,
        until: Option<Instant>,
        grace: Duration,
    ) -> Result<()> {
        if command.takes_input() && input.is_none() {
            return Err(Error::invalid(format!("{}: no stream was given to read", command.name())));
        }
        if self.ended {
            return Err(Error::new(Kind::Died, "the session has ended"));
        }
        let mut input = input.map(Input::new).transpose()?;
        let name = input.as_ref().map(Input::name);
        let request = wire::call(command.name(), &command.arguments(name.as_deref())?)?;
        let _keys = Keys::offer(&self.server.place, &command.key_lines()?)?;
        self.messages.skip();
        let (messages, options) = (&mut self.messages, &self.options);
        let mut alive =
            || messages.progress(&mut |done, total| options.tell(Event::Progress { done, total }));
        // The start is silent for most of its time, and has a limit of its own.
        let silence = options.settings.call_timeout.filter(|_| until.is_none());
        let mut patience = Patience { cancel: &options.cancel, silence, until, alive: &mut alive, grace };
        let connection = match &mut self.connection {
            Some(connection) if connection.is_usable() => connection,
            other => {
                // The server serves one connection at a time.
                *other = None;
                match Connection::open(&self.server.socket, &self.server.version, &mut patience) {
                    Ok(connection) => other.insert(connection),
                    Err(e) => return Err(self.lost(e.of(command.name()), false)),
                }
            }
        };
        let answer = connection.call(&request, input.as_mut(), sink, &mut patience);
        let busy = connection.is_busy();
        let said = self.messages.take();
        match answer {
            Ok(Status::Done) => {
                if !said.is_empty() {
                    self.options.tell(Event::Message(&said));
                }
                Ok(())
            }
            Ok(Status::Failed) => {
                let said = format!("{said}\n{}", self.messages.console());
                Err(self.lost(diagnose(command.name(), &said), busy))
            }
            Err(e) if e.kind() == Kind::Version => {
                // A server that is killed closes, too, a moment before it is gone.
                let error = match self.server.process.wait_gone(DEATH) {
                    true => Error::new(Kind::Died, e.message()).of(command.name()),
                    false => refused_version(&self.server.version, &said),
                };
                Err(self.lost(error, busy))
            }
            Err(e) => Err(self.lost(e.of(command.name()), busy)),
        }
    }

    /// Ends what is of no more use after `error`; `busy`: guestfish still works for a call that was given up.
    fn lost(&mut self, error: Error, busy: bool) -> Error {
        // Whoever was cancelled between two calls, or has waited for the end of one, leaves a session that can be used.
        if !error.kind().is_fatal() || error.kind() == Kind::Cancelled && !busy {
            return error;
        }
        self.ended = true;
        self.connection = None;
        // Whoever was cancelled still writes back; what hangs or has died does not.
        let at_once = error.kind() != Kind::Cancelled;
        match std::mem::replace(&mut self.owner, Owner::Nobody) {
            Owner::Us(mut keeper) => {
                if at_once {
                    let _ = keeper.ask(&Request::Kill);
                }
                keeper.end();
            }
            // A session that nobody else can use, for all its calls would wait behind this one.
            Owner::Kept(_turn) => self.server.kill(),
            Owner::Nobody => {}
        }
        error
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("server", &self.server).finish_non_exhaustive()
    }
}

fn failed(kind: Kind, message: String, hint: Option<String>) -> Error {
    let error = Error::new(kind, message);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

const UNENDING: &str = "guestfish's processes do not end: one of them waits for a disk";
