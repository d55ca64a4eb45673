use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use crate::connection::{Connection, Input, Patience, Sink};
use crate::keeper::message::{Reply, Request, Server};
use crate::keys::Keys;
use crate::messages::{Messages, diagnose};
use crate::watchdog::Keeper;
use crate::wire::{self, Status};
use crate::{Cancel, Command, Error, Kind, Result, Settings, WatchdogCommand};

/// The most that [`Session::call`] collects, in bytes; larger outputs go through [`Session::send`].
pub const MAX_OUTPUT: usize = 256 << 20;

/// A disk for the appliance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    source: Source,
    format: String,
    writable: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    File(PathBuf),
    Nbd { socket: PathBuf, export: String },
}

impl Disk {
    /// The image at `path`, read-only: what the guest writes goes into an overlay that ends with the session. The format,
    /// in QEMU's words (`raw`, `qcow2`), is always named, so that nothing is probed.
    pub fn file(path: impl Into<PathBuf>, format: impl Into<String>) -> Self {
        Self { source: Source::File(path.into()), format: format.into(), writable: false }
    }

    /// What an NBD server offers on a Unix socket, as a raw disk, read-only. The default export has the empty name.
    pub fn nbd(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        let source = Source::Nbd { socket: socket.into(), export: export.into() };
        Self { source, format: "raw".to_owned(), writable: false }
    }

    /// The same disk, to be written. QEMU holds the image's write lock while the session lasts.
    #[must_use]
    pub fn writable(mut self) -> Self {
        self.writable = true;
        self
    }

    /// Whether it may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The image's file, unless it comes from a server.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match &self.source {
            Source::File(path) => Some(path),
            Source::Nbd { .. } => None,
        }
    }

    fn add(&self) -> Result<Command> {
        let command = match &self.source {
            // guestfish reads `file:///…` and the like as addresses, but only from its command line.
            Source::File(path) => {
                let path = std::path::absolute(path)
                    .map_err(|e| Error::io(format!("cannot name {} in full", path.display()), e))?;
                Command::new("add-drive").path(path)
            }
            Source::Nbd { socket, export } => {
                let mut server = b"unix:".to_vec();
                server.extend_from_slice(std::os::unix::ffi::OsStrExt::as_bytes(socket.as_os_str()));
                Command::new("add-drive").arg(export).opt("protocol", "nbd").opt("server", server)
            }
        };
        let readonly = if self.writable { "false" } else { "true" };
        Ok(command.opt("readonly", readonly).opt("format", &self.format))
    }
}

/// What a session tells while it works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The start has come to this.
    Step(&'a str),
    /// So much of the start or of a long command is done.
    Progress {
        /// In units of its own.
        done: u64,
        /// In the same units; never 0.
        total: u64,
    },
    /// What guestfish wrote to its standard error besides errors: warnings, and with `debug` or `trace` their output.
    Message(&'a str),
}

/// Hears events.
pub type Listener = Arc<dyn Fn(Event<'_>) + Send + Sync>;

/// How a session is opened.
#[derive(Clone)]
#[non_exhaustive]
pub struct Options {
    /// How the appliance is run.
    pub settings: Settings,
    /// The program that ends the appliance whatever becomes of us.
    pub watchdog: WatchdogCommand,
    /// Ends the session from another thread.
    pub cancel: Cancel,
    /// Hears what goes on.
    pub listener: Option<Listener>,
}

impl Options {
    /// The settings of the environment, and nobody who listens.
    ///
    /// # Errors
    /// `Io` when the process has too many open files.
    pub fn new(watchdog: WatchdogCommand) -> Result<Self> {
        let cancel = Cancel::new().map_err(|e| Error::io("cannot make an event descriptor", e))?;
        Ok(Self { settings: Settings::from_env(), watchdog, cancel, listener: None })
    }

    fn tell(&self, event: Event<'_>) {
        if let Some(listener) = &self.listener {
            listener(event);
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// A running appliance with disks, and guestfish in front of it.
///
/// However it ends (close, drop, panic, a signal, a crash), guestfish and the appliance end with it, and nothing of
/// them is left. Only [`close`](Self::close) makes sure that all writes have arrived.
pub struct Session {
    // Before the keeper: fields are dropped in this order.
    connection: Option<Connection>,
    messages: Messages,
    server: Server,
    keeper: Option<Keeper>,
    options: Options,
    writable: bool,
}

impl Session {
    /// Starts the appliance with these disks, which the guest sees as `/dev/sda` and so on, in this order.
    ///
    /// # Errors
    /// `NotInstalled`, `Start`, `NoKernel`, `Busy` when an image is locked, `Timeout`, `Cancelled`, `Io`. Nothing is left
    /// running then.
    pub fn open(disks: &[Disk], options: Options) -> Result<Self> {
        let until = Instant::now() + options.settings.start_timeout;
        options.tell(Event::Step("starting guestfish"));
        let mut keeper = Keeper::start(&options.watchdog)?;
        keeper.ask(&Request::Start(Box::new(options.settings.clone())))?;
        let server = loop {
            match keeper.reply(&options.cancel, until)? {
                Reply::Note(note) => options.tell(Event::Step(&note)),
                Reply::Ready(server) => break server,
                Reply::Kept => return Err(Error::protocol("the keeper keeps what was not started")),
                Reply::Failed { kind, message, hint } => return Err(failed(kind, message, hint)),
            }
        };
        let connection = Connection::open(&server.socket, &server.version)?;
        let writable = disks.iter().any(Disk::is_writable);
        let mut session = Self {
            connection: Some(connection),
            messages: Messages::new(&server.place),
            server,
            keeper: Some(keeper),
            options,
            writable,
        };
        session.launch(disks, until)?;
        Ok(session)
    }

    fn launch(&mut self, disks: &[Disk], until: Instant) -> Result<()> {
        let progress = self.messages.progress_handler();
        self.internal(&Command::new("event").arg("diskmill").arg("progress").arg(progress))?;
        if self.options.settings.network {
            self.internal(&Command::new("set-network").arg("true"))?;
        }
        for disk in disks {
            self.internal(&disk.add()?)?;
        }
        self.options.tell(Event::Step("starting the appliance"));
        let patience = self.options.settings.call_timeout;
        self.options.settings.call_timeout = Some(until.saturating_duration_since(Instant::now()));
        let started = self.internal(&Command::new("run"));
        self.options.settings.call_timeout = patience;
        started.map(drop)
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
        self.exchange(command, input, &mut |bytes| output.write_all(bytes))
    }

    /// Copies a file of the guest to `output`. How many bytes there were.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn download(&mut self, path: impl AsRef<Path>, output: &mut dyn Write) -> Result<u64> {
        let command = Command::new("download").path(path).output();
        let mut count = 0u64;
        self.exchange(&command, None, &mut |bytes| {
            count = count.saturating_add(bytes.len() as u64);
            output.write_all(bytes)
        })?;
        Ok(count)
    }

    /// Copies `input` to a file of the guest, which is made or overwritten. After an error a part of it may be there.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn upload(&mut self, input: &mut dyn Read, path: impl AsRef<Path>) -> Result<()> {
        let command = Command::new("upload").input().path(path);
        self.exchange(&command, Some(input), &mut |_| Ok(()))
    }

    /// Ends the session. If a disk was writable, everything that was written has arrived in its image when this returns
    /// without an error.
    ///
    /// # Errors
    /// As [`call`](Self::call), when file systems cannot be unmounted or written back.
    pub fn close(mut self) -> Result<()> {
        let written = if self.writable { self.write_back() } else { Ok(()) };
        self.connection = None;
        let ended = self.keeper.take().is_none_or(|mut keeper| keeper.end());
        written?;
        if ended {
            Ok(())
        } else {
            Err(Error::new(Kind::Io, "guestfish's processes do not end: one of them waits for a disk"))
        }
    }

    fn write_back(&mut self) -> Result<()> {
        self.internal(&Command::new("umount-all"))?;
        self.internal(&Command::new("shutdown")).map(drop)
    }

    fn internal(&mut self, command: &Command) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        self.exchange(command, None, &mut |bytes| {
            if out.len().saturating_add(bytes.len()) > MAX_OUTPUT {
                return Err(io::Error::new(
                    io::ErrorKind::FileTooLarge,
                    format!("more than {MAX_OUTPUT} bytes"),
                ));
            }
            out.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(out)
    }

    fn exchange(
        &mut self,
        command: &Command,
        input: Option<&mut dyn Read>,
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        if command.takes_input() && input.is_none() {
            return Err(Error::invalid(format!("{}: no stream was given to read", command.name())));
        }
        let mut input = input.map(Input::new).transpose()?;
        let name = input.as_ref().map(Input::name);
        let request = wire::call(command.name(), &command.arguments(name.as_deref())?)?;
        let _keys = Keys::offer(&self.server.place, &command.key_lines()?)?;
        self.messages.skip();
        let connection = match &mut self.connection {
            Some(connection) if connection.is_usable() => connection,
            other => {
                if self.keeper.is_none() {
                    return Err(Error::new(Kind::Died, "the session has ended"));
                }
                // The server serves one connection at a time.
                *other = None;
                other.insert(Connection::open(&self.server.socket, &self.server.version)?)
            }
        };
        let (messages, options) = (&mut self.messages, &self.options);
        let mut alive =
            || messages.progress(&mut |done, total| options.tell(Event::Progress { done, total }));
        let mut patience =
            Patience { cancel: &options.cancel, silence: options.settings.call_timeout, alive: &mut alive };
        let answer = connection.call(&request, input.as_mut(), sink, &mut patience);
        let said = self.messages.take();
        match answer {
            Ok(Status::Done) => {
                if !said.is_empty() {
                    self.options.tell(Event::Message(&said));
                }
                Ok(())
            }
            Ok(Status::Failed) => Err(self.lost(diagnose(command.name(), &said))),
            Err(e) => Err(self.lost(e.of(command.name()))),
        }
    }

    /// Ends what is of no more use after `error`.
    fn lost(&mut self, error: Error) -> Error {
        if error.kind().is_fatal() {
            self.connection = None;
            self.keeper = None;
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
