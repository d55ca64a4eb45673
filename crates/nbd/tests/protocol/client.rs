//! A client that also says what it should not, and a disk for it.

use diskmill_nbd::{Address, ErrorCode, Export, Failure, Run, Running, Session, Settings};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub(crate) const OPTION: u64 = 0x4948_4156_454f_5054;
pub(crate) const OPTION_REPLY: u64 = 0x3_e889_0455_65a9;
pub(crate) const REQUEST: u32 = 0x2560_9513;
pub(crate) const ACK: u32 = 1;
pub(crate) const ERR_UNSUP: u32 = 0x8000_0001;
pub(crate) const ERR_INVALID: u32 = 0x8000_0003;
pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;
pub(crate) const ERR_TOO_BIG: u32 = 0x8000_0009;
pub(crate) const EXPORT_NAME: u32 = 1;
pub(crate) const ABORT: u32 = 2;
pub(crate) const LIST: u32 = 3;
pub(crate) const STARTTLS: u32 = 5;
pub(crate) const INFO: u32 = 6;
pub(crate) const GO: u32 = 7;
pub(crate) const STRUCTURED: u32 = 8;
pub(crate) const LIST_META: u32 = 9;
pub(crate) const SET_META: u32 = 10;
pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;
pub(crate) const FUA: u16 = 1;
pub(crate) const DF: u16 = 4;
pub(crate) const REQ_ONE: u16 = 8;
pub(crate) const EPERM: u32 = 1;
pub(crate) const EIO: u32 = 5;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOSPC: u32 = 28;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const SIZE: u64 = 48 * MIB + 512;
/// From here on there is a hole of 16 MiB.
pub(crate) const HOLE: u64 = 8 * MIB;
/// Reading this byte fails.
pub(crate) const BAD: u64 = 40 * MIB + 5;

/// A disk in memory, sparse and with a bad spot.
#[derive(Clone)]
pub(crate) struct Disk {
    pub(crate) bytes: Arc<Mutex<Vec<u8>>>,
    pub(crate) writable: bool,
    pub(crate) description: String,
    pub(crate) flushes: Arc<Mutex<u32>>,
}

pub(crate) fn byte(at: u64) -> u8 {
    if (HOLE..HOLE + 16 * MIB).contains(&at) { 0 } else { (at % 251) as u8 + 1 }
}

pub(crate) fn disk(writable: bool) -> Disk {
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

pub(crate) struct Fixture {
    pub(crate) server: Running,
    pub(crate) log: Arc<Mutex<Vec<String>>>,
    pub(crate) dir: TempDir,
}

pub(crate) fn serve(disk: &Disk, change: impl FnOnce(&mut Settings)) -> Fixture {
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
    pub(crate) fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("s")
    }

    /// Waits for a message of the server that contains `text`.
    pub(crate) fn says(&self, text: &str) {
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
    pub(crate) fn still_serves(&self) {
        let mut client = Client::go(&self.socket(), true);
        assert!(client.read(100, 1000).unwrap().bytes == expected(100, 1000));
    }
}

pub(crate) fn expected(at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(byte).collect()
}

/// The raw socket, after the server's greeting.
pub(crate) struct Client {
    pub(crate) socket: UnixStream,
    pub(crate) structured: bool,
    pub(crate) cookie: u64,
}

/// A reply put together from its chunks.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    pub(crate) bytes: Vec<u8>,
    /// Start and length of each chunk, and whether it was a hole.
    pub(crate) chunks: Vec<(u64, u64, bool)>,
    pub(crate) status: Vec<(u32, u32)>,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut client = Self { socket, structured: false, cookie: 7 };
        assert_eq!(client.take(18), [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat());
        client
    }

    pub(crate) fn greet(path: &Path) -> Self {
        let mut client = Self::connect(path);
        client.put(&[&3u32.to_be_bytes()]);
        client
    }

    pub(crate) fn go(path: &Path, structured: bool) -> Self {
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

    pub(crate) fn put(&mut self, parts: &[&[u8]]) {
        self.socket.write_all(&parts.concat()).unwrap();
    }

    pub(crate) fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Panics unless the server closes the connection, whatever it sends before.
    pub(crate) fn closed(mut self) {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
        }
    }

    pub(crate) fn option(&mut self, option: u32, data: &[u8]) {
        let len = (data.len() as u32).to_be_bytes();
        self.put(&[&OPTION.to_be_bytes(), &option.to_be_bytes(), &len, data]);
    }

    pub(crate) fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        assert_eq!(self.u64(), OPTION_REPLY);
        let (option, kind, len) = (self.u32(), self.u32(), self.u32());
        (option, kind, self.take(len as usize))
    }

    /// The kinds of all replies to an option.
    pub(crate) fn kinds(&mut self) -> Vec<u32> {
        let mut kinds = Vec::new();
        loop {
            let (_, kind, _) = self.option_reply();
            kinds.push(kind);
            if kind == ACK || kind > 0x8000_0000 {
                return kinds;
            }
        }
    }

    pub(crate) fn request(&mut self, flags: u16, command: u16, at: u64, len: u32) {
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
    pub(crate) fn reply(&mut self, at: u64, len: u64) -> Result<Reply, u32> {
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

    pub(crate) fn ask(&mut self, flags: u16, command: u16, at: u64, len: u32) -> Result<Reply, u32> {
        self.request(flags, command, at, len);
        self.reply(at, 0)
    }

    pub(crate) fn read(&mut self, at: u64, len: u32) -> Result<Reply, u32> {
        self.request(0, READ, at, len);
        self.reply(at, len.into())
    }

    pub(crate) fn write(&mut self, flags: u16, at: u64, data: &[u8]) -> Result<Reply, u32> {
        self.request(flags, WRITE, at, data.len() as u32);
        self.put(&[data]);
        self.reply(at, 0)
    }
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

pub(crate) fn info(name: &str, wanted: &[u16]) -> Vec<u8> {
    let wanted = wanted.iter().flat_map(|kind| kind.to_be_bytes());
    let count = (wanted.clone().count() / 2) as u16;
    string(name).into_iter().chain(count.to_be_bytes()).chain(wanted).collect()
}

pub(crate) fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let count = (queries.len() as u32).to_be_bytes();
    string(name).into_iter().chain(count).chain(queries.iter().flat_map(|query| string(query))).collect()
}
