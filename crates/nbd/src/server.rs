//! Listening, and the threads of each client.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::export::Export;
use crate::listener::{Address, Listener};
use crate::negotiate::{Agreed, Offer, negotiate};
use crate::protocol::{MAX_NAME, MAX_TEXT};
use crate::stream::{Deadline, Stream};
use crate::transmit::Connection;

/// How long to wait where no client can be accepted for want of descriptors or memory.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// How to serve.
#[derive(Clone)]
pub struct Settings {
    /// Name of the export, of at most [`MAX_NAME`] bytes. Clients that ask for the empty name get it, too.
    pub export_name: String,
    /// Threads for each client: also how many of its requests are worked on at once. At least 1.
    pub threads: usize,
    /// Connections at once; more are turned away. At least 1. A client may make several where more than 1 are allowed.
    pub connections: usize,
    /// A client that has not finished its negotiation by then is turned away; [`Duration::MAX`]: never.
    pub negotiation_time: Duration,
    /// End after the last client has left, once there was one that took the export: who only looks whether somebody
    /// listens, or lists what there is, does not count.
    pub exit_with_last_client: bool,
    /// Told, in words for people, of clients that were turned away or broke the protocol, and of damage of the image.
    pub log: Arc<dyn Fn(&str) + Send + Sync>,
}

impl Default for Settings {
    /// Two to eight threads for each of at most 16 clients, 10 seconds for negotiation (as `qemu-nbd`), no end, no log.
    fn default() -> Self {
        Self {
            export_name: String::new(),
            threads: thread::available_parallelism().map_or(2, usize::from).clamp(2, 8),
            connections: 16,
            negotiation_time: Duration::from_secs(10),
            exit_with_last_client: false,
            log: Arc::new(|_| ()),
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { export_name, threads, connections, negotiation_time, exit_with_last_client, .. } = self;
        f.debug_struct("Settings")
            .field("export_name", export_name)
            .field("threads", threads)
            .field("connections", connections)
            .field("negotiation_time", negotiation_time)
            .field("exit_with_last_client", exit_with_last_client)
            .finish_non_exhaustive()
    }
}

/// A server that listens: clients wait from now on, and are served by [`run`](Self::run).
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    settings: Settings,
    shared: Arc<Shared>,
    /// The other end of [`Shared::wake`].
    woken: UnixStream,
}

#[derive(Debug)]
struct Shared {
    stopped: AtomicBool,
    /// A client has finished its negotiation and got the export.
    served: AtomicBool,
    /// A byte is written to it whenever the accepting thread should look up.
    wake: UnixStream,
    /// The clients' sockets, by number.
    clients: Mutex<HashMap<u64, Stream>>,
}

impl Shared {
    fn wake(&self) {
        // If the buffer is full, waking is under way.
        let _ = (&self.wake).write(&[0]);
    }

    fn stop(&self) {
        self.stopped.store(true, Relaxed);
        self.wake();
        self.clients().values().for_each(Stream::shutdown);
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Stream>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a [`Server`] from anywhere.
#[derive(Debug, Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Makes [`Server::run`] return soon: no new clients, connections are closed, replies under way are lost.
    pub fn stop(&self) {
        self.0.stop();
    }
}

impl Server {
    /// Listens at `address`. The stale socket of a server that was killed is replaced.
    ///
    /// # Errors
    /// `AddrInUse` if another server listens there or a file has the name, `InvalidInput` if the name is too long for a
    /// socket or that of the export for a client, and whatever the system says.
    pub fn bind(address: &Address, settings: Settings) -> io::Result<Self> {
        if settings.export_name.len() > MAX_NAME {
            let why = format!("the name of an export has at most {MAX_NAME} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let listener = Listener::bind(address)?;
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let shared = Shared {
            stopped: AtomicBool::new(false),
            served: AtomicBool::new(false),
            wake,
            clients: Mutex::default(),
        };
        Ok(Self { listener, settings, shared: Arc::new(shared), woken })
    }

    /// Where it listens: the port is the true one where any was asked for.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.listener.address
    }

    /// What clients call the export.
    #[must_use]
    pub fn uri(&self) -> String {
        self.address().uri(&self.settings.export_name)
    }

    /// Ends it.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Serves `export` until it is [stopped](Stopper::stop), or the last client has left if that is
    /// [wanted](Settings::exit_with_last_client). Then all threads have ended and the socket file is gone.
    ///
    /// # Errors
    /// What the system says if the server cannot go on accepting. What happens to one client is no error.
    pub fn run(self, export: &dyn Export) -> io::Result<()> {
        self.serve(export)
    }

    fn serve(&self, export: &dyn Export) -> io::Result<()> {
        thread::scope(|scope| {
            let result = self.accept(|number, stream| {
                let server = self;
                thread::Builder::new()
                    .name(format!("nbd-{number}"))
                    .spawn_scoped(scope, move || server.client(number, &stream, export))
                    .map(drop)
            });
            // Wakes the threads that the scope waits for.
            self.shared.stop();
            result
        })
    }

    /// Accepts clients until the end, and calls `start` for each.
    fn accept(&self, start: impl Fn(u64, Stream) -> io::Result<()>) -> io::Result<()> {
        let mut number = 0;
        loop {
            let mut fds =
                [PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&self.woken, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            while matches!((&self.woken).read(&mut [0; 64]), Ok(64)) {}
            // In this order: whoever is gone has said before whether it was served.
            let left = self.shared.clients().is_empty() && self.shared.served.load(Relaxed);
            if self.shared.stopped.load(Relaxed) || (self.settings.exit_with_last_client && left) {
                return Ok(());
            }
            let stream = match self.listener.accept() {
                Ok(stream) => stream,
                Err(error) if is_momentary(&error) => continue,
                Err(error) => {
                    self.log(&format!("cannot accept a client: {error}"));
                    // Woken sooner if a client leaves.
                    let _ = poll(&mut [PollFd::new(&self.woken, PollFlags::IN)], Some(&PAUSE));
                    continue;
                }
            };
            let mut clients = self.shared.clients();
            if clients.len() >= self.settings.connections.max(1) {
                drop(clients);
                self.log(&format!(
                    "a client was turned away: there are {} already",
                    self.settings.connections
                ));
                continue;
            }
            let started = stream.try_clone().and_then(|clone| {
                number += 1;
                clients.insert(number, clone);
                drop(clients);
                start(number, stream)
            });
            if let Err(error) = started {
                self.shared.clients().remove(&number);
                self.log(&format!("a client was turned away: {error}"));
            }
        }
    }

    /// Serves one client to its end.
    fn client(&self, number: u64, stream: &Stream, export: &dyn Export) {
        let log = |message: &str| self.log(&format!("client {number}: {message}"));
        let serve = || match self.agree(stream, export)? {
            Some(agreed) => {
                self.shared.served.store(true, Relaxed);
                self.transmit(stream, agreed, export, &log)
            }
            None => Ok(()),
        };
        // A bug must end this client, not the others.
        let result = catch_unwind(AssertUnwindSafe(serve)).unwrap_or_else(|_| Err(panicked()));
        if let Err(error) = result
            && !self.shared.stopped.load(Relaxed)
            && !has_left(&error)
        {
            log(&error.to_string());
        }
        self.shared.clients().remove(&number);
        self.shared.wake();
    }

    fn agree(&self, stream: &Stream, export: &dyn Export) -> io::Result<Option<Agreed>> {
        let mut stream = Deadline::new(stream, self.settings.negotiation_time);
        match negotiate(&mut stream, &self.settings.offer(export)) {
            // Looked whether somebody listens.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                let seconds = self.settings.negotiation_time.as_secs();
                Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("the negotiation was not finished within {seconds} seconds"),
                ))
            }
            result => result,
        }
    }

    fn transmit(
        &self,
        stream: &Stream,
        agreed: Agreed,
        export: &dyn Export,
        log: &(dyn Fn(&str) + Sync),
    ) -> io::Result<()> {
        let connection = Connection::new(export, agreed, (stream, stream), log);
        let work = || {
            let result = connection.work();
            if result.is_err() {
                // The others may wait for what will not come.
                stream.shutdown();
            }
            result
        };
        thread::scope(|scope| {
            let more: Vec<_> = (1..self.settings.threads)
                // With fewer threads than wanted the work gets done all the same.
                .map_while(|_| {
                    thread::Builder::new().name("nbd-worker".to_owned()).spawn_scoped(scope, work).ok()
                })
                .collect();
            let mut result = work();
            for worker in more {
                // A bug must end this client, not the others.
                let ended =
                    worker.join().unwrap_or_else(|_| Err(io::Error::other("a worker thread panicked")));
                result = result.and(ended);
            }
            result
        })
    }

    fn log(&self, message: &str) {
        (self.settings.log)(message);
    }
}

impl Settings {
    fn offer(&self, export: &dyn Export) -> Offer {
        Offer {
            name: self.export_name.clone(),
            description: export.description().chars().take(MAX_TEXT).collect(),
            size: export.size(),
            writable: export.is_writable(),
            multi_conn: self.connections > 1,
        }
    }
}

fn panicked() -> io::Error {
    io::Error::other("a thread of the server panicked: this is a bug")
}

/// What a socket says when its client leaves without waiting for replies: the client's right.
fn has_left(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// Errors of `accept(2)` that say nothing of the listener: none waits, or it left before it was accepted.
fn is_momentary(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted | ConnectionReset)
}

/// A server in the background, stopped when dropped.
#[derive(Debug)]
pub struct Running {
    stopper: Stopper,
    address: Address,
    uri: String,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Running {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What clients call the export.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Ends it from anywhere.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// As [`Server::run`].
    pub fn wait(mut self) -> io::Result<()> {
        self.thread.take().map_or(Ok(()), join)
    }

    /// Stops it and waits until all threads have ended and the socket file is gone.
    ///
    /// # Errors
    /// As [`Server::run`].
    pub fn stop(self) -> io::Result<()> {
        self.stopper.stop();
        self.wait()
    }
}

fn join(thread: JoinHandle<io::Result<()>>) -> io::Result<()> {
    thread.join().unwrap_or_else(|_| Err(panicked()))
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stopper.stop();
        // Who wants to know asks by `stop`.
        let _ = self.thread.take().map(join);
    }
}

/// Serves `export` at `address` in the background: clients may connect as soon as this returns.
///
/// # Errors
/// As [`Server::bind`].
pub fn serve(export: impl Export + 'static, address: &Address, settings: Settings) -> io::Result<Running> {
    let server = Server::bind(address, settings)?;
    let (stopper, address, uri) = (server.stopper(), server.address().clone(), server.uri());
    let thread = thread::Builder::new().name("nbd".to_owned()).spawn(move || {
        let result = server.serve(&export);
        // Before the socket file: whoever waits for that finds the image closed.
        drop(export);
        drop(server);
        result
    })?;
    Ok(Running { stopper, address, uri, thread: Some(thread) })
}

/// Serves one client over any pair of streams, with one thread and without a deadline: for `socketpair(2)`, and for
/// tests.
///
/// # Errors
/// `InvalidData` if the client breaks the protocol, and what the streams say.
pub fn converse(
    mut stream: impl Read + Write + Send,
    export: &dyn Export,
    settings: &Settings,
) -> io::Result<()> {
    let Some(agreed) = negotiate(&mut stream, &settings.offer(export))? else { return Ok(()) };
    let stream = Mutex::new(stream);
    Connection::new(export, agreed, (Half(&stream), Half(&stream)), &|message| (settings.log)(message)).work()
}

/// A stream that is read and written by turns.
struct Half<'a, S>(&'a Mutex<S>);

impl<S: Read> Read for Half<'_, S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(buf)
    }
}

impl<S: Write> Write for Half<'_, S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}
