//! The transmission phase: requests and their replies.
//!
//! Workers take turns at the input: one reads a request (with a short payload), lets the next one read, does the work,
//! and writes the reply. So there are no queues, at most as many requests in flight as workers, and a client that does
//! not read its replies stops itself.

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use byteorder::{BE, WriteBytesExt};

use crate::export::{ErrorCode, Export, Failure, Session};
use crate::negotiate::Agreed;
use crate::protocol::{
    BASE_ALLOCATION_ID, MAX_REQUEST, MAX_TEXT, Request, STATE_HOLE, STATE_ZERO, chunk, command, flag,
    put_chunk, put_simple, violation,
};
use crate::stream::write_all_vectored;

/// Bytes that a worker reads and sends, or receives and writes, at once.
const PIECE: usize = 1 << 20;
/// Shorter holes are sent as zeros among the data: a chunk costs both sides more.
const LEAST_HOLE: u64 = 4096;
/// Runs in the answer to one block status request.
const MAX_RUNS: usize = 16 << 10;
/// For the requests; long payloads go past it.
const INPUT_BUFFER: usize = 16 << 10;

/// One client.
pub(crate) struct Connection<'a, R, W> {
    export: &'a dyn Export,
    agreed: Agreed,
    input: Mutex<BufReader<R>>,
    output: Mutex<W>,
    /// The client has left, or is of no use any more.
    closed: AtomicBool,
    /// Held by who answers with more than [`PIECE`] bytes in one piece: one of them bounds the memory.
    large: Mutex<()>,
    /// Told of each request that failed for a reason that is not the client's.
    log: &'a (dyn Fn(&str) + Sync),
}

/// A request and how far it is.
enum Task {
    /// To be done.
    Todo(Request),
    /// A write, done or refused.
    Written(Request, Result<(), Failure>),
}

impl<'a, R: Read + Send, W: Write + Send> Connection<'a, R, W> {
    pub(crate) fn new(
        export: &'a dyn Export,
        agreed: Agreed,
        (input, output): (R, W),
        log: &'a (dyn Fn(&str) + Sync),
    ) -> Self {
        Self {
            export,
            agreed,
            input: Mutex::new(BufReader::with_capacity(INPUT_BUFFER, input)),
            output: Mutex::new(output),
            closed: AtomicBool::new(false),
            large: Mutex::default(),
            log,
        }
    }

    /// Answers requests until the client leaves. Several threads may do this.
    ///
    /// # Errors
    /// The first error of this worker that ends the connection: `InvalidData` if the client broke the protocol, and
    /// whatever the socket says.
    pub(crate) fn work(&self) -> io::Result<()> {
        let mut worker = Worker { session: self.export.session(), buf: Vec::new(), head: Vec::new() };
        let result = loop {
            match self.next(&mut worker) {
                Ok(Some(task)) => {
                    if let Err(error) = self.answer(&task, &mut worker) {
                        break Err(error);
                    }
                }
                Ok(None) => return Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.closed.store(true, Relaxed);
        result
    }

    /// Waits for the next request; `None` if the client has left.
    fn next(&self, worker: &mut Worker<'_>) -> io::Result<Option<Task>> {
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        if self.closed.load(Relaxed) {
            return Ok(None);
        }
        let request = match Request::read(&mut *input) {
            Ok(Request { command: command::DISC, .. }) => None,
            Ok(request) => Some(request),
            // Not polite, and the usual way.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) => {
                self.closed.store(true, Relaxed);
                return Err(error);
            }
        };
        let Some(request) = request else {
            self.closed.store(true, Relaxed);
            return Ok(None);
        };
        if request.command != command::WRITE {
            return Ok(Some(Task::Todo(request)));
        }
        let task = self.payload(request, &mut *input, worker);
        self.closed.fetch_or(task.is_err(), Relaxed);
        task.map(Some)
    }

    /// Takes the payload of a write: into the worker's buffer if it is short, else right into the export.
    fn payload(&self, request: Request, input: &mut impl Read, worker: &mut Worker<'_>) -> io::Result<Task> {
        if request.len > MAX_REQUEST {
            return Err(violation(format!("a write of {} bytes", request.len)));
        }
        let mut verdict = self.check(&request);
        if verdict.is_ok() && request.len as usize <= PIECE {
            input.read_exact(worker.buffer(request.len as usize))?;
            return Ok(Task::Todo(request));
        }
        let mut done = 0;
        while done < request.len {
            let piece = (request.len - done).min(PIECE as u32);
            input.read_exact(worker.buffer(piece as usize))?;
            if verdict.is_ok() {
                verdict = worker.session.write_at(&worker.buf, request.at + u64::from(done));
            }
            done += piece;
        }
        Ok(Task::Written(request, verdict))
    }

    /// Whether the request makes sense for this export.
    fn check(&self, request: &Request) -> Result<(), Failure> {
        let invalid = |why: &str| Err(Failure::new(ErrorCode::Invalid, why));
        let flags = match request.command {
            command::READ if self.agreed.structured => flag::DF,
            command::WRITE | command::TRIM => flag::FUA,
            command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE,
            command::BLOCK_STATUS => flag::REQ_ONE,
            _ => 0,
        };
        // FUA asks nothing of what does not write, and old clients set it everywhere.
        if request.flags & !(flags | flag::FUA) != 0 {
            return invalid("a flag that this request does not have");
        }
        let writes = matches!(request.command, command::WRITE | command::WRITE_ZEROES | command::TRIM);
        if writes && !self.export.is_writable() {
            return Err(Failure::read_only());
        }
        if request.command == command::FLUSH {
            return Ok(());
        }
        let end = request.at.checked_add(request.len.into());
        if end.is_none_or(|end| end > self.export.size()) {
            return Err(Failure::new(
                match request.command {
                    command::WRITE | command::WRITE_ZEROES => ErrorCode::NoSpace,
                    // A trim, too (specification, "Error values").
                    _ => ErrorCode::Invalid,
                },
                format!(
                    "{} bytes at {} do not lie within the {} bytes of the disk",
                    request.len,
                    request.at,
                    self.export.size()
                ),
            ));
        }
        match request.command {
            command::READ if request.len > MAX_REQUEST => invalid("a read of more than 32 MiB"),
            command::BLOCK_STATUS if !self.agreed.allocation => invalid("no context was negotiated"),
            command::BLOCK_STATUS if request.len == 0 => invalid("the status of no bytes"),
            _ => Ok(()),
        }
    }

    fn answer(&self, task: &Task, worker: &mut Worker<'_>) -> io::Result<()> {
        let (request, result) = match task {
            Task::Written(request, result) => (request, result.clone()),
            Task::Todo(request) => (request, self.check(request)),
        };
        let result = result.and_then(|()| {
            match (task, request.command) {
                (Task::Written(..), _) | (_, command::CACHE) => Ok(()),
                (_, command::READ) => return Ok(Some(())),
                (_, command::BLOCK_STATUS) => return Ok(Some(())),
                (_, command::WRITE) => worker.session.write_at(&worker.buf, request.at),
                (_, command::FLUSH) => worker.session.flush(),
                (_, command::TRIM) => worker.session.discard(request.at, request.len.into()),
                (_, command::WRITE_ZEROES) => {
                    worker.session.write_zeroes(request.at, request.len.into(), request.has(flag::NO_HOLE))
                }
                (_, other) => Err(Failure::new(ErrorCode::Invalid, format!("unknown request {other}"))),
            }?;
            if request.has(flag::FUA) && self.export.is_writable() {
                worker.session.flush()?;
            }
            Ok(None)
        });
        match result {
            Err(failure) => self.fail(request, &failure, worker),
            Ok(None) => self.done(request, worker),
            Ok(Some(())) if request.command == command::READ => self.read(request, worker),
            Ok(Some(())) => self.status(request, worker),
        }
    }

    fn done(&self, request: &Request, worker: &mut Worker<'_>) -> io::Result<()> {
        let head = worker.head();
        if self.agreed.structured {
            put_chunk(head, chunk::DONE, chunk::NONE, request.cookie, 0)?;
        } else {
            put_simple(head, request.cookie, 0)?;
        }
        self.send(&mut [IoSlice::new(head)])
    }

    fn fail(&self, request: &Request, failure: &Failure, worker: &mut Worker<'_>) -> io::Result<()> {
        if matches!(failure.code, ErrorCode::Io | ErrorCode::NotSupported) {
            (self.log)(&failure.message);
        }
        let head = worker.head();
        if self.agreed.structured {
            let message: String = failure.message.chars().take(MAX_TEXT).collect();
            put_chunk(head, chunk::DONE, chunk::ERROR, request.cookie, message.len() + 6)?;
            head.write_u32::<BE>(failure.code.number())?;
            head.write_u16::<BE>(message.len() as u16)?;
            head.extend(message.as_bytes());
        } else {
            put_simple(head, request.cookie, failure.code.number())?;
        }
        self.send(&mut [IoSlice::new(head)])
    }

    fn read(&self, request: &Request, worker: &mut Worker<'_>) -> io::Result<()> {
        // A chunk of data has at least one byte.
        if request.len == 0 {
            return self.done(request, worker);
        }
        // Without chunks nothing can be taken back once it is sent.
        if !self.agreed.structured || request.has(flag::DF) {
            return self.read_whole(request, worker);
        }
        let end = request.at + u64::from(request.len);
        let mut at = request.at;
        while at < end {
            // Holes have any length; data comes in pieces.
            let run = self.export.status(at, end - at).ok().filter(|run| run.hole && run.len >= LEAST_HOLE);
            let next = match run {
                Some(run) => at + run.len,
                None => end.min(at + PIECE as u64),
            };
            if run.is_none()
                && let Err(failure) = worker.read(at..next)
            {
                return self.fail(request, &failure, worker);
            }
            let hole = run.is_some();
            self.send_runs(request, at..next, hole, next == end, worker)?;
            at = next;
        }
        worker.trim();
        Ok(())
    }

    /// Sends what the worker has read of `range`, its holes as such.
    fn send_runs(
        &self,
        request: &Request,
        range: Range<u64>,
        hole: bool,
        last: bool,
        worker: &mut Worker<'_>,
    ) -> io::Result<()> {
        let runs = if hole { vec![(range.clone(), true)] } else { self.runs(range.clone()) };
        let Worker { buf, head, .. } = worker;
        head.clear();
        // Of each chunk: where its header ends, and the data behind it.
        let mut parts = Vec::with_capacity(runs.len());
        for (index, (run, hole)) in runs.iter().enumerate() {
            let flags = if last && index + 1 == runs.len() { chunk::DONE } else { 0 };
            let len = (run.end - run.start) as usize;
            let from = (run.start - range.start) as usize;
            if *hole {
                put_chunk(head, flags, chunk::OFFSET_HOLE, request.cookie, 12)?;
                head.write_u64::<BE>(run.start)?;
                head.write_u32::<BE>(len as u32)?;
                parts.push((head.len(), 0..0));
            } else {
                put_chunk(head, flags, chunk::OFFSET_DATA, request.cookie, len + 8)?;
                head.write_u64::<BE>(run.start)?;
                parts.push((head.len(), from..from + len));
            }
        }
        let mut slices = Vec::with_capacity(parts.len() * 2);
        let mut start = 0;
        for (end, data) in parts {
            slices.push(IoSlice::new(head.get(start..end).unwrap_or_default()));
            slices.push(IoSlice::new(buf.get(data).unwrap_or_default()));
            start = end;
        }
        self.send(&mut slices)
    }

    /// The runs of a range that was read, and whether each is a hole worth telling.
    fn runs(&self, range: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let mut runs: Vec<(Range<u64>, bool)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let left = range.end - at;
            let (len, hole) = match self.export.status(at, left) {
                Ok(run) => (run.len.min(left), run.hole && run.len >= LEAST_HOLE),
                Err(_) => (left, false),
            };
            match runs.last_mut() {
                Some((last, kind)) if *kind == hole => last.end = at + len,
                _ => runs.push((at..at + len, hole)),
            }
            at += len;
        }
        runs
    }

    /// Answers in one piece.
    fn read_whole(&self, request: &Request, worker: &mut Worker<'_>) -> io::Result<()> {
        let large =
            (request.len as usize > PIECE).then(|| self.large.lock().unwrap_or_else(PoisonError::into_inner));
        if let Err(failure) = worker.read(request.at..request.at + u64::from(request.len)) {
            worker.trim();
            drop(large);
            return self.fail(request, &failure, worker);
        }
        let Worker { buf, head, .. } = worker;
        head.clear();
        if self.agreed.structured {
            put_chunk(head, chunk::DONE, chunk::OFFSET_DATA, request.cookie, buf.len() + 8)?;
            head.write_u64::<BE>(request.at)?;
        } else {
            put_simple(head, request.cookie, 0)?;
        }
        let sent = self.send(&mut [IoSlice::new(head), IoSlice::new(buf)]);
        worker.trim();
        sent
    }

    fn status(&self, request: &Request, worker: &mut Worker<'_>) -> io::Result<()> {
        let end = request.at + u64::from(request.len);
        let mut at = request.at;
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let most = if request.has(flag::REQ_ONE) { 1 } else { MAX_RUNS };
        while at < end {
            let run = match self.export.status(at, end - at) {
                Ok(run) => run,
                Err(failure) if runs.is_empty() => return self.fail(request, &failure, worker),
                // The client asks again from there.
                Err(_) => break,
            };
            let state = if run.hole { STATE_HOLE | STATE_ZERO } else { 0 };
            let len = run.len.min(end - at) as u32;
            let full = runs.len() == most;
            match runs.last_mut() {
                // Together at most the length of the request.
                Some((sum, same)) if *same == state => *sum += len,
                _ if full => break,
                _ => runs.push((len, state)),
            }
            at += u64::from(len);
        }
        let head = worker.head();
        put_chunk(head, chunk::DONE, chunk::BLOCK_STATUS, request.cookie, 4 + runs.len() * 8)?;
        head.write_u32::<BE>(BASE_ALLOCATION_ID)?;
        for (len, state) in runs {
            head.write_u32::<BE>(len)?;
            head.write_u32::<BE>(state)?;
        }
        self.send(&mut [IoSlice::new(head)])
    }

    fn send(&self, bufs: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        write_all_vectored(&mut *output, bufs)
    }
}

/// What one thread works with.
struct Worker<'a> {
    session: Box<dyn Session + 'a>,
    /// Data of the request or the reply.
    buf: Vec<u8>,
    /// Headers of the reply.
    head: Vec<u8>,
}

impl Worker<'_> {
    /// The buffer at this length; what it holds is void.
    fn buffer(&mut self, len: usize) -> &mut [u8] {
        self.buf.resize(len, 0);
        &mut self.buf
    }

    /// The buffer for headers, empty.
    fn head(&mut self) -> &mut Vec<u8> {
        self.head.clear();
        &mut self.head
    }

    fn read(&mut self, range: Range<u64>) -> Result<(), Failure> {
        self.buf.resize((range.end - range.start) as usize, 0);
        self.session.read_at(&mut self.buf, range.start)
    }

    /// Gives back the memory of a large reply.
    fn trim(&mut self) {
        if self.buf.capacity() > PIECE {
            self.buf = Vec::new();
        }
    }
}
