//! Any bytes as what an NBD client sends: negotiation, then requests.
#![no_main]

use std::io::{self, Read, Write};

use diskmill_nbd::{Export, Failure, Run, Session, Settings, converse};
use libfuzzer_sys::fuzz_target;

/// Small, so that replies are, too; its holes are long enough to be told.
const SIZE: u64 = 96 << 10;
const HOLE: std::ops::Range<u64> = 32 << 10..64 << 10;
/// Bytes of replies after which the client hangs up.
const MOST_OUTPUT: usize = 4 << 20;

struct Client<'a> {
    sends: &'a [u8],
    got: usize,
}

impl Read for Client<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.sends.read(buf)
    }
}

impl Write for Client<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.got += buf.len();
        if self.got > MOST_OUTPUT {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Disk {
    writable: bool,
}

/// The server promises that no request reaches past the disk.
fn within(at: u64, len: u64) {
    assert!(at.checked_add(len).is_some_and(|end| end <= SIZE), "{len} bytes at {at}");
}

impl Export for Disk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn status(&self, at: u64, max: u64) -> Result<Run, Failure> {
        assert!(max > 0 && at < SIZE);
        within(at, max);
        let end = [HOLE.start, HOLE.end, SIZE].into_iter().find(|&end| end > at).unwrap_or(SIZE);
        Ok(Run { len: (end - at).min(max), hole: HOLE.contains(&at) })
    }

    fn session(&self) -> Box<dyn Session + '_> {
        Box::new(Access(self))
    }
}

struct Access<'a>(&'a Disk);

impl Session for Access<'_> {
    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<(), Failure> {
        within(at, buf.len() as u64);
        buf.fill(1);
        Ok(())
    }

    fn write_at(&mut self, buf: &[u8], at: u64) -> Result<(), Failure> {
        assert!(self.0.writable);
        within(at, buf.len() as u64);
        Ok(())
    }

    fn write_zeroes(&mut self, at: u64, len: u64, _: bool) -> Result<(), Failure> {
        assert!(self.0.writable);
        within(at, len);
        Ok(())
    }

    fn discard(&mut self, at: u64, len: u64) -> Result<(), Failure> {
        self.write_zeroes(at, len, false)
    }
}

fuzz_target!(|data: &[u8]| {
    let settings = Settings { export_name: "disk".to_owned(), ..Settings::default() };
    for writable in [false, true] {
        let client = Client { sends: data, got: 0 };
        if let Err(error) = converse(client, &Disk { writable }, &settings) {
            assert!(!error.to_string().is_empty());
        }
    }
});
