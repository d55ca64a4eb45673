//! The protocol, byte by byte, with a client that knows no manners.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use diskmill_nbd::{Address, ErrorCode, Export, Failure, MAX_NAME, Run, Running, Session, Settings};
use tempfile::TempDir;

const OPTION: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x3_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const ACK: u32 = 1;
const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_UNKNOWN: u32 = 0x8000_0006;
const ERR_TOO_BIG: u32 = 0x8000_0009;
const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const LIST: u32 = 3;
const STARTTLS: u32 = 5;
const INFO: u32 = 6;
const GO: u32 = 7;
const STRUCTURED: u32 = 8;
const LIST_META: u32 = 9;
const SET_META: u32 = 10;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;
const FUA: u16 = 1;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 48 * MIB + 512;
/// From here on there is a hole of 16 MiB.
const HOLE: u64 = 8 * MIB;
/// Reading this byte fails.
const BAD: u64 = 40 * MIB + 5;

/// A disk in memory, sparse and with a bad spot.
#[derive(Clone)]
struct Disk {
    bytes: Arc<Mutex<Vec<u8>>>,
    writable: bool,
    description: String,
    flushes: Arc<Mutex<u32>>,
}

fn byte(at: u64) -> u8 {
    if (HOLE..HOLE + 16 * MIB).contains(&at) { 0 } else { (at % 251) as u8 + 1 }
}

fn disk(writable: bool) -> Disk {
    let bytes = (0..SIZE).map(byte).collect();
    let description = "a test".to_owned();
    Disk { bytes: Arc::new(Mutex::new(bytes)), writable, description, flushes: Arc::default() }
}

impl Export for Disk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn status(&self, at: u64, max: u64) -> Result<Run, Failure> {
        assert!(at < SIZE && max > 0 && at + max <= SIZE);
        let hole = (HOLE..HOLE + 16 * MIB).contains(&at);
        let end = [HOLE, HOLE + 16 * MIB, SIZE].into_iter().find(|&end| end > at).unwrap();
        Ok(Run { len: (end - at).min(max), hole })
    }

    fn session(&self) -> Box<dyn Session + '_> {
        Box::new(self.clone())
    }
}

impl Session for Disk {
    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<(), Failure> {
        if (at..at + buf.len() as u64).contains(&BAD) {
            return Err(Failure::new(ErrorCode::Io, "a bad spot"));
        }
        let bytes = self.bytes.lock().unwrap();
        buf.copy_from_slice(&bytes[at as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&mut self, buf: &[u8], at: u64) -> Result<(), Failure> {
        self.bytes.lock().unwrap()[at as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&mut self, at: u64, len: u64, _: bool) -> Result<(), Failure> {
        self.bytes.lock().unwrap()[at as usize..][..len as usize].fill(0);
        Ok(())
    }

    fn discard(&mut self, at: u64, len: u64) -> Result<(), Failure> {
        self.write_zeroes(at, len, false)
    }

    fn flush(&mut self) -> Result<(), Failure> {
        *self.flushes.lock().unwrap() += 1;
        Ok(())
    }
}

struct Fixture {
    server: Running,
    log: Arc<Mutex<Vec<String>>>,
    dir: TempDir,
}

fn serve(disk: &Disk, change: impl FnOnce(&mut Settings)) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let log: Arc<Mutex<Vec<String>>> = Arc::default();
    let to = Arc::clone(&log);
    let mut settings = Settings {
        log: Arc::new(move |message| to.lock().unwrap().push(message.to_owned())),
        threads: 3,
        ..Settings::default()
    };
    change(&mut settings);
    let address = Address::Unix(dir.path().join("s"));
    Fixture { server: diskmill_nbd::serve(disk.clone(), &address, settings).unwrap(), log, dir }
}

impl Fixture {
    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("s")
    }

    /// Waits for a message of the server that contains `text`.
    fn says(&self, text: &str) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let log = self.log.lock().unwrap().clone();
            if log.iter().any(|line| line.contains(text)) {
                return;
            }
            assert!(Instant::now() < until, "no {text:?} in {log:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Panics unless a new client is served: whatever happened before harmed nobody else.
    fn still_serves(&self) {
        let mut client = Client::go(&self.socket(), true);
        assert!(client.read(100, 1000).unwrap().bytes == expected(100, 1000));
    }
}

fn expected(at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(byte).collect()
}

/// The raw socket, after the server's greeting.
struct Client {
    socket: UnixStream,
    structured: bool,
    cookie: u64,
}

/// A reply put together from its chunks.
#[derive(Debug, Default)]
struct Reply {
    bytes: Vec<u8>,
    /// Start and length of each chunk, and whether it was a hole.
    chunks: Vec<(u64, u64, bool)>,
    status: Vec<(u32, u32)>,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut client = Self { socket, structured: false, cookie: 7 };
        assert_eq!(client.take(18), [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat());
        client
    }

    fn greet(path: &Path) -> Self {
        let mut client = Self::connect(path);
        client.put(&[&3u32.to_be_bytes()]);
        client
    }

    fn go(path: &Path, structured: bool) -> Self {
        let mut client = Self::greet(path);
        if structured {
            client.option(STRUCTURED, &[]);
            assert_eq!(client.kinds(), [ACK]);
            client.structured = true;
            client.option(SET_META, &contexts("", &["base:allocation"]));
            assert_eq!(client.kinds(), [4, ACK]);
        }
        client.option(GO, &info("", &[]));
        assert_eq!(client.kinds(), [3, 3, ACK]);
        client
    }

    fn put(&mut self, parts: &[&[u8]]) {
        self.socket.write_all(&parts.concat()).unwrap();
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Panics unless the server closes the connection, whatever it sends before.
    fn closed(mut self) {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        let len = (data.len() as u32).to_be_bytes();
        self.put(&[&OPTION.to_be_bytes(), &option.to_be_bytes(), &len, data]);
    }

    fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        assert_eq!(self.u64(), OPTION_REPLY);
        let (option, kind, len) = (self.u32(), self.u32(), self.u32());
        (option, kind, self.take(len as usize))
    }

    /// The kinds of all replies to an option.
    fn kinds(&mut self) -> Vec<u32> {
        let mut kinds = Vec::new();
        loop {
            let (_, kind, _) = self.option_reply();
            kinds.push(kind);
            if kind == ACK || kind > 0x8000_0000 {
                return kinds;
            }
        }
    }

    fn request(&mut self, flags: u16, command: u16, at: u64, len: u32) {
        self.cookie += 1;
        let cookie = self.cookie;
        self.put(&[
            &REQUEST.to_be_bytes(),
            &flags.to_be_bytes(),
            &command.to_be_bytes(),
            &cookie.to_be_bytes(),
            &at.to_be_bytes(),
            &len.to_be_bytes(),
        ]);
    }

    /// The reply to the only request under way, which asked for `len` bytes from `at` on if it was a read.
    fn reply(&mut self, at: u64, len: u64) -> Result<Reply, u32> {
        let mut reply = Reply { bytes: vec![0xee; len as usize], ..Reply::default() };
        if !self.structured {
            assert_eq!(self.u32(), 0x6744_6698);
            let (error, cookie) = (self.u32(), self.u64());
            assert_eq!(cookie, self.cookie);
            if error != 0 {
                return Err(error);
            }
            reply.bytes = self.take(len as usize);
            return Ok(reply);
        }
        loop {
            assert_eq!(self.u32(), 0x668e_33ef);
            let (flags, kind, cookie, size) = (self.u16(), self.u16(), self.u64(), self.u32());
            assert_eq!(cookie, self.cookie);
            match kind {
                0 => assert_eq!(size, 0),
                1 => {
                    let start = self.u64();
                    let data = self.take(size as usize - 8);
                    reply.bytes[(start - at) as usize..][..data.len()].copy_from_slice(&data);
                    reply.chunks.push((start, data.len() as u64, false));
                }
                2 => {
                    let (start, size) = (self.u64(), self.u32());
                    reply.bytes[(start - at) as usize..][..size as usize].fill(0);
                    reply.chunks.push((start, size.into(), true));
                }
                5 => {
                    assert_eq!(self.u32(), 1, "the context's number");
                    reply.status = (0..(size - 4) / 8).map(|_| (self.u32(), self.u32())).collect();
                }
                0x8001 => {
                    let (error, len) = (self.u32(), self.u16());
                    assert_eq!(u32::from(len) + 6, size);
                    let message = String::from_utf8(self.take(len.into())).unwrap();
                    assert!(!message.is_empty());
                    assert_eq!(flags, 1, "an error ends the reply");
                    return Err(error);
                }
                other => panic!("chunk {other:#x}"),
            }
            if flags & 1 != 0 {
                return Ok(reply);
            }
        }
    }

    fn ask(&mut self, flags: u16, command: u16, at: u64, len: u32) -> Result<Reply, u32> {
        self.request(flags, command, at, len);
        self.reply(at, 0)
    }

    fn read(&mut self, at: u64, len: u32) -> Result<Reply, u32> {
        self.request(0, READ, at, len);
        self.reply(at, len.into())
    }

    fn write(&mut self, flags: u16, at: u64, data: &[u8]) -> Result<Reply, u32> {
        self.request(flags, WRITE, at, data.len() as u32);
        self.put(&[data]);
        self.reply(at, 0)
    }
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn info(name: &str, wanted: &[u16]) -> Vec<u8> {
    let wanted = wanted.iter().flat_map(|kind| kind.to_be_bytes());
    let count = (wanted.clone().count() / 2) as u16;
    string(name).into_iter().chain(count.to_be_bytes()).chain(wanted).collect()
}

fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let count = (queries.len() as u32).to_be_bytes();
    string(name).into_iter().chain(count).chain(queries.iter().flat_map(|query| string(query))).collect()
}

#[test]
fn options_are_answered_by_the_specification() {
    let fixture = serve(&disk(false), |settings| settings.export_name = "disk".to_owned());
    let mut client = Client::greet(&fixture.socket());
    let cases: [(u32, Vec<u8>, &[u32]); 19] = [
        (LIST, vec![], &[2, ACK]),
        (LIST, vec![0], &[ERR_INVALID]),
        (STARTTLS, vec![], &[ERR_UNSUP]),
        (11, vec![], &[ERR_UNSUP]),
        (0xffff_ffff, vec![1; 100], &[ERR_UNSUP]),
        (INFO, info("", &[]), &[3, 3, ACK]),
        (INFO, info("disk", &[1, 2, 3, 99]), &[3, 3, 3, 3, ACK]),
        (INFO, info("other", &[]), &[ERR_UNKNOWN]),
        (INFO, vec![], &[ERR_INVALID]),
        (INFO, vec![0xff; 40], &[ERR_INVALID]),
        (INFO, [info("", &[1]), vec![0]].concat(), &[ERR_INVALID]),
        (INFO, vec![0; (64 << 10) + 1], &[ERR_TOO_BIG]),
        (LIST_META, contexts("disk", &[]), &[4, ACK]),
        (LIST_META, contexts("disk", &["base:"]), &[4, ACK]),
        (LIST_META, contexts("disk", &["qemu:", "base:allocation2"]), &[ACK]),
        (LIST_META, contexts("other", &[]), &[ERR_UNKNOWN]),
        // Structured replies come first.
        (SET_META, contexts("disk", &["base:allocation"]), &[ERR_INVALID]),
        (LIST_META, [string("disk"), vec![0xff; 4]].concat(), &[ERR_INVALID]),
        (STRUCTURED, vec![], &[ACK]),
    ];
    for (option, data, want) in cases {
        client.option(option, &data);
        assert_eq!(client.kinds(), want, "option {option}, {} bytes", data.len());
    }
    client.option(SET_META, &contexts("disk", &["base:"]));
    assert_eq!(client.kinds(), [ACK], "only whole names can be set");
    client.option(SET_META, &contexts("disk", &["x", "base:allocation"]));
    assert_eq!(client.kinds(), [4, ACK]);
    client.option(INFO, &info("disk", &[]));
    let (_, kind, export) = client.option_reply();
    assert_eq!((kind, &export[..2], &export[2..10]), (3, &[0, 0][..], &SIZE.to_be_bytes()[..]));
    // HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_DF, CAN_MULTI_CONN, SEND_CACHE.
    assert_eq!(u16::from_be_bytes([export[10], export[11]]), 0b101_1000_0111);
    assert_eq!(client.kinds(), [3, ACK]);
    client.option(ABORT, &[]);
    assert_eq!(client.kinds(), [ACK]);
    client.closed();
}

#[test]
fn names_and_descriptions_are_as_long_as_clients_may_take_them() {
    let name = "n".repeat(MAX_NAME);
    let disk = Disk { description: "é".repeat(5000), ..disk(false) };
    let fixture = serve(&disk, |settings| settings.export_name.clone_from(&name));
    let mut client = Client::greet(&fixture.socket());
    client.option(INFO, &info(&name, &[2]));
    let texts: Vec<_> = [3, 3, 3, ACK].map(|kind| (client.option_reply(), kind)).into();
    for ((_, got, text), want) in texts {
        assert!(got == want && text.len() <= 2 + MAX_NAME, "{got} of {} bytes", text.len());
    }
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("s"));
    let settings = Settings { export_name: name + "n", ..Settings::default() };
    assert_eq!(diskmill_nbd::serve(disk, &address, settings).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn the_old_way_in_works() {
    let fixture = serve(&disk(false), |_| ());
    for (flags, padding) in [(3u32, 0), (1, 124)] {
        let mut client = Client::connect(&fixture.socket());
        client.put(&[&flags.to_be_bytes()]);
        client.option(EXPORT_NAME, b"");
        assert_eq!(client.u64(), SIZE);
        assert_eq!(client.u16(), 0b101_0000_0111);
        assert_eq!(client.take(padding), vec![0; padding]);
        assert!(client.read(5, 300).unwrap().bytes == expected(5, 300));
    }
}

#[test]
fn reads_show_holes_and_reach_the_last_byte() {
    let fixture = serve(&disk(false), |_| ());
    let mut plain = Client::go(&fixture.socket(), false);
    let mut chunked = Client::go(&fixture.socket(), true);
    let ranges =
        [(0, 1), (1, 512), (HOLE - 10, 20), (HOLE - 5000, 10_000), (SIZE - 512, 512), (0, 32 << 20), (7, 0)];
    for (at, len) in ranges {
        for client in [&mut plain, &mut chunked] {
            let reply = client.read(at, len).unwrap();
            assert!(reply.bytes == expected(at, len.into()), "{len} bytes at {at}");
        }
    }
    let reply = chunked.read(HOLE - 5000, 10_000).unwrap();
    assert_eq!(reply.chunks, [(HOLE - 5000, 5000, false), (HOLE, 5000, true)]);
    let reply = chunked.read(HOLE - MIB, 20 << 20).unwrap();
    let holes: Vec<_> = reply.chunks.iter().filter(|chunk| chunk.2).collect();
    assert_eq!(holes, [&(HOLE, 16 * MIB, true)]);
    // In one piece.
    for (at, len) in [(HOLE - 5000, 10_000), (HOLE - MIB, 20 << 20)] {
        chunked.request(DF, READ, at, len);
        let reply = chunked.reply(at, len.into()).unwrap();
        assert_eq!(reply.chunks, [(at, u64::from(len), false)]);
        assert!(reply.bytes == expected(at, len.into()));
    }
    // A chunk of data has at least one byte, and the end of the disk is no place beyond it.
    for (flags, at) in [(0, 7), (DF, 7), (DF, HOLE), (DF, SIZE)] {
        chunked.request(flags, READ, at, 0);
        assert_eq!(chunked.reply(at, 0).unwrap().chunks, []);
    }
}

#[test]
fn bad_requests_are_refused_and_the_next_is_served() {
    let fixture = serve(&disk(false), |_| ());
    for structured in [false, true] {
        let mut client = Client::go(&fixture.socket(), structured);
        let refused: [(u16, u16, u64, u32, u32); 12] = [
            (0, READ, SIZE, 1, EINVAL),
            (0, READ, SIZE - 1, 2, EINVAL),
            (0, READ, u64::MAX, 1, EINVAL),
            (0, READ, u64::MAX - 5, u32::MAX, EINVAL),
            (0, READ, 0, (32 << 20) + 1, EINVAL),
            (0x4000, READ, 0, 1, EINVAL),
            (0, TRIM, 0, 512, EPERM),
            (0, WRITE_ZEROES, 0, 512, EPERM),
            (0, 99, 0, 512, EINVAL),
            (0, 0xffff, 0, 0, EINVAL),
            (0, CACHE, SIZE, 512, EINVAL),
            (0, BLOCK_STATUS, 0, 0, EINVAL),
        ];
        for (flags, command, at, len, error) in refused {
            assert_eq!(client.ask(flags, command, at, len).unwrap_err(), error, "{command} {at} {len}");
        }
        assert_eq!(client.write(0, 0, &[1; 512]).unwrap_err(), EPERM);
        assert_eq!(client.write(FUA, 0, &vec![1; 3 << 20]).unwrap_err(), EPERM);
        client.ask(0, FLUSH, 0, 0).unwrap();
        client.ask(0, CACHE, 0, 512).unwrap();
        assert!(client.read(9, 9).unwrap().bytes == expected(9, 9));
    }
}

#[test]
fn damage_ends_a_reply_and_not_the_connection() {
    let fixture = serve(&disk(false), |_| ());
    for structured in [false, true] {
        let mut client = Client::go(&fixture.socket(), structured);
        for (at, len) in [(BAD, 1), (BAD - 4 * MIB, 8 << 20)] {
            assert_eq!(client.read(at, len).unwrap_err(), EIO);
        }
        assert!(client.read(BAD + 1, 10).unwrap().bytes == expected(BAD + 1, 10));
    }
    fixture.says("a bad spot");
}

#[test]
fn block_status_tells_holes() {
    let fixture = serve(&disk(false), |_| ());
    let mut client = Client::go(&fixture.socket(), true);
    let all = SIZE as u32;
    let (hole, len) = (HOLE as u32, 16 << 20);
    let reply = client.ask(0, BLOCK_STATUS, 0, all).unwrap();
    assert_eq!(reply.status, [(hole, 0), (len, 3), (all - hole - len, 0)]);
    let reply = client.ask(REQ_ONE, BLOCK_STATUS, HOLE + 5, all - hole - 5).unwrap();
    assert_eq!(reply.status, [(len - 5, 3)]);
    assert_eq!(client.ask(0, BLOCK_STATUS, 5, all).unwrap_err(), EINVAL);
    // Not without the context.
    let mut client = Client::go(&fixture.socket(), false);
    assert_eq!(client.ask(0, BLOCK_STATUS, 0, 512).unwrap_err(), EINVAL);
}

#[test]
fn writes_arrive_where_they_are_allowed() {
    let disk = disk(true);
    let fixture = serve(&disk, |_| ());
    for structured in [false, true] {
        let mut client = Client::go(&fixture.socket(), structured);
        for len in [1, 4096, 1 << 20, (3 << 20) + 7] {
            let data: Vec<u8> = (0..len).map(|i| (i % 199) as u8).collect();
            client.write(0, 1000, &data).unwrap();
            assert!(client.read(1000, len).unwrap().bytes == data, "{len}");
        }
        client.ask(0, WRITE_ZEROES, 1000, 100).unwrap();
        client.ask(0, TRIM, 1100, 100).unwrap();
        assert!(client.read(1000, 200).unwrap().bytes == [0; 200]);
        assert_eq!(client.write(0, SIZE - 1, &[1, 2]).unwrap_err(), ENOSPC);
        assert_eq!(client.write(0, SIZE - 1, &vec![1; 2 << 20]).unwrap_err(), ENOSPC);
        // A trim needs no space.
        for (command, error) in [(TRIM, EINVAL), (WRITE_ZEROES, ENOSPC)] {
            for (at, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1)] {
                assert_eq!(client.ask(0, command, at, len).unwrap_err(), error, "{command} {at} {len}");
            }
        }
        let before = *disk.flushes.lock().unwrap();
        client.write(FUA, 0, &[1]).unwrap();
        client.ask(0, FLUSH, 0, 0).unwrap();
        assert_eq!(*disk.flushes.lock().unwrap(), before + 2);
    }
}

#[test]
fn requests_overlap() {
    let fixture = serve(&disk(false), |_| ());
    let mut client = Client::go(&fixture.socket(), false);
    // All at once; the answers come in any order.
    let first = client.cookie + 1;
    for i in 0..200 {
        client.request(0, READ, i * 1000, 1000);
    }
    let mut seen = [false; 200];
    for _ in 0..200 {
        assert_eq!((client.u32(), client.u32()), (0x6744_6698, 0));
        let i = client.u64() - first;
        assert!(client.take(1000) == expected(i * 1000, 1000));
        assert!(!std::mem::replace(&mut seen[i as usize], true));
    }
}

#[test]
fn nonsense_ends_the_connection_and_nothing_else() {
    let fixture = serve(&disk(false), |_| ());
    let socket = fixture.socket();
    let before: [&dyn Fn(&mut Client); 7] = [
        &|client| client.put(&[b"GET / HTTP/1.1\r\n\r\n"]),
        &|client| client.put(&[&0xffff_ffffu32.to_be_bytes()]),
        &|client| client.put(&[&0u32.to_be_bytes()]),
        &|client| client.put(&[&3u32.to_be_bytes(), &[0x55; 16]]),
        &|client| client.put(&[&3u32.to_be_bytes(), &OPTION.to_be_bytes(), &[0xff; 8]]),
        &|client| {
            client.put(&[&3u32.to_be_bytes()]);
            client.option(EXPORT_NAME, b"no such export");
        },
        &|client| {
            client.put(&[&3u32.to_be_bytes()]);
            // More may not fit into the socket once the server has gone.
            let option = [&OPTION.to_be_bytes()[..], &[0, 0, 0, 77, 0, 0, 0, 0]].concat();
            let _ = client.socket.write_all(&option.repeat(300));
        },
    ];
    for (i, act) in before.into_iter().enumerate() {
        let mut client = Client::connect(&socket);
        act(&mut client);
        client.closed();
        println!("case {i} closed");
    }
    for structured in [false, true] {
        let mut client = Client::go(&socket, structured);
        client.put(&[&[0x11; 28]]);
        client.closed();
        let mut client = Client::go(&socket, structured);
        client.request(0, WRITE, 0, (32 << 20) + 1);
        client.closed();
        let mut client = Client::go(&socket, structured);
        client.request(0, DISC, 0, 0);
        client.closed();
    }
    fixture.says("broke the protocol");
    fixture.still_serves();
}

#[test]
fn clients_may_vanish_at_any_byte() {
    let fixture = serve(&disk(false), |settings| settings.connections = 1000);
    let mut script = 3u32.to_be_bytes().to_vec();
    for (option, data) in
        [(STRUCTURED, vec![]), (SET_META, contexts("", &["base:allocation"])), (GO, info("", &[3]))]
    {
        script.extend(OPTION.to_be_bytes());
        script.extend(option.to_be_bytes());
        script.extend((data.len() as u32).to_be_bytes());
        script.extend(data);
    }
    script.extend(REQUEST.to_be_bytes());
    script.extend([0; 12]);
    script.extend(0u64.to_be_bytes());
    script.extend((8u32 << 20).to_be_bytes());
    for end in 0..script.len() {
        let mut socket = UnixStream::connect(fixture.socket()).unwrap();
        socket.write_all(&script[..end]).unwrap();
    }
    fixture.log.lock().unwrap().clear();
    // Leaves in the middle of its reply, which is nothing to speak of.
    for _ in 0..20 {
        let mut client = Client::go(&fixture.socket(), true);
        client.request(0, READ, 0, 8 << 20);
        client.take(100_000);
    }
    std::thread::sleep(Duration::from_millis(200));
    fixture.still_serves();
    let log = fixture.log.lock().unwrap().clone();
    assert!(!log.iter().any(|line| line.contains("panicked") || line.contains("pipe")), "{log:?}");
}

#[test]
fn negotiation_has_a_deadline_even_for_those_who_trickle() {
    let fixture = serve(&disk(false), |settings| settings.negotiation_time = Duration::from_millis(300));
    let silent = Client::connect(&fixture.socket());
    let mut trickling = Client::greet(&fixture.socket());
    let start = Instant::now();
    let option = [&OPTION.to_be_bytes()[..], &[0, 0, 0, 77, 1, 0, 0, 0]].concat();
    trickling.put(&[&option]);
    while trickling.socket.write_all(&[0]).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(5), "still open");
        std::thread::sleep(Duration::from_millis(20));
    }
    silent.closed();
    fixture.says("not finished within");
    // Nobody is hurried after that.
    let mut client = Client::go(&fixture.socket(), true);
    std::thread::sleep(Duration::from_millis(500));
    assert!(client.read(1, 1).is_ok());
}

#[test]
fn there_may_be_no_deadline() {
    for time in [Duration::MAX, Duration::from_secs(1 << 62)] {
        let fixture = serve(&disk(false), |settings| settings.negotiation_time = time);
        fixture.still_serves();
        assert_eq!(*fixture.log.lock().unwrap(), [""; 0]);
    }
}

#[test]
fn there_are_only_so_many_clients() {
    let fixture = serve(&disk(false), |settings| settings.connections = 2);
    let first = Client::go(&fixture.socket(), true);
    let _second = Client::go(&fixture.socket(), true);
    let mut third = UnixStream::connect(fixture.socket()).unwrap();
    assert_eq!(third.read(&mut [0; 18]).unwrap(), 0, "closed without a word");
    fixture.says("turned away");
    drop(first);
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let mut next = UnixStream::connect(fixture.socket()).unwrap();
        if next.read(&mut [0; 18]).unwrap() == 18 {
            return;
        }
        assert!(Instant::now() < until, "the place of the first is not free");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn one_connection_is_no_invitation_to_more() {
    for (connections, flags) in [(1, 0b100_0000_0111), (2, 0b101_0000_0111)] {
        let fixture = serve(&disk(false), |settings| settings.connections = connections);
        let mut client = Client::greet(&fixture.socket());
        client.option(EXPORT_NAME, b"");
        assert_eq!((client.u64(), client.u16()), (SIZE, flags));
    }
}

#[test]
fn stopping_ends_all_and_removes_the_socket() {
    let fixture = serve(&disk(false), |_| ());
    let socket = fixture.socket();
    let mut busy = Client::go(&socket, true);
    let idle = Client::go(&socket, true);
    let silent = Client::connect(&socket);
    // More than the socket holds, and never read.
    for _ in 0..8 {
        busy.request(0, READ, 0, 8 << 20);
    }
    let start = Instant::now();
    fixture.server.stop().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(!socket.exists());
    for client in [busy, idle, silent] {
        client.closed();
    }
}

#[test]
fn the_last_client_may_end_it() {
    let fixture = serve(&disk(false), |settings| settings.exit_with_last_client = true);
    let socket = fixture.socket();
    let first = Client::go(&socket, true);
    let second = Client::go(&socket, true);
    drop(first);
    std::thread::sleep(Duration::from_millis(100));
    assert!(socket.exists());
    drop(second);
    fixture.server.wait().unwrap();
    assert!(!socket.exists());
}

#[test]
fn who_never_was_a_client_does_not_end_it() {
    let fixture = serve(&disk(false), |settings| settings.exit_with_last_client = true);
    let socket = fixture.socket();
    drop(UnixStream::connect(&socket).unwrap());
    drop(Client::greet(&socket));
    let mut lister = Client::greet(&socket);
    for (option, data, want) in [(LIST, vec![], &[2, ACK][..]), (INFO, info("", &[]), &[3, 3, ACK])] {
        lister.option(option, &data);
        assert_eq!(lister.kinds(), want);
    }
    lister.option(ABORT, &[]);
    assert_eq!(lister.kinds(), [ACK]);
    lister.closed();
    // Another server looks whether the socket is stale.
    let other = diskmill_nbd::serve(disk(false), &Address::Unix(socket.clone()), Settings::default());
    assert_eq!(other.unwrap_err().kind(), ErrorKind::AddrInUse);
    std::thread::sleep(Duration::from_millis(200));
    fixture.still_serves();
    fixture.server.wait().unwrap();
    // The old way in counts.
    let fixture = serve(&disk(false), |settings| settings.exit_with_last_client = true);
    let mut client = Client::greet(&fixture.socket());
    client.option(EXPORT_NAME, b"");
    client.take(10);
    drop(client);
    fixture.server.wait().unwrap();
}

#[test]
fn tcp_works_too() {
    let address = Address::Tcp("127.0.0.1:0".parse().unwrap());
    let server = diskmill_nbd::serve(disk(false), &address, Settings::default()).unwrap();
    let Address::Tcp(address) = *server.address() else { panic!("no TCP") };
    assert!(address.port() != 0 && server.uri() == format!("nbd://{address}/"));
    let mut socket = std::net::TcpStream::connect(address).unwrap();
    let mut hello = [0; 18];
    socket.read_exact(&mut hello).unwrap();
    assert_eq!(&hello[..8], b"NBDMAGIC");
}
