//! Sequential streams: pipes, sockets, terminals, whatever standard input and output are.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::Buf;
use crate::sys::retry;

/// What a pipe is enlarged to, in bytes: the limit for ordinary users (`/proc/sys/fs/pipe-max-size`).
const PIPE_SIZE: libc::c_int = 1 << 20;
/// The largest piece of zeros that is written at once, in bytes.
const ZERO_CHUNK: u64 = 1 << 20;

/// Reads a stream front to back.
#[derive(Debug)]
pub struct PipeReader {
    file: File,
}

impl PipeReader {
    /// Reads from `fd`; a pipe is enlarged if the system allows it.
    pub fn new(fd: OwnedFd) -> PipeReader {
        enlarge(fd.as_fd());
        PipeReader { file: File::from(fd) }
    }

    /// Reads standard input, past any buffer of `std::io::stdin`.
    ///
    /// # Errors
    /// What `dup(2)` says.
    pub fn stdin() -> io::Result<PipeReader> {
        Ok(PipeReader::new(io::stdin().as_fd().try_clone_to_owned()?))
    }

    /// Reads until `buf` is full or the stream ends; gives the bytes read, less than `buf.len()` only at the end.
    ///
    /// # Errors
    /// What `read(2)` says; the bytes read before an error are lost.
    pub fn fill(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.file.read(&mut buf[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) => wait_or_fail(e, self.file.as_fd(), libc::POLLIN)?,
            }
        }
        Ok(filled)
    }
}

/// Writes a stream front to back.
#[derive(Debug)]
pub struct PipeWriter {
    file: File,
    zeros: Option<Buf>,
}

impl PipeWriter {
    /// Writes to `fd`; a pipe is enlarged if the system allows it.
    pub fn new(fd: OwnedFd) -> PipeWriter {
        enlarge(fd.as_fd());
        PipeWriter { file: File::from(fd), zeros: None }
    }

    /// Writes to standard output, past any buffer of `std::io::stdout`.
    ///
    /// # Errors
    /// What `dup(2)` says.
    pub fn stdout() -> io::Result<PipeWriter> {
        Ok(PipeWriter::new(io::stdout().as_fd().try_clone_to_owned()?))
    }

    /// Writes all of `data`.
    ///
    /// # Errors
    /// What `write(2)` says: `BrokenPipe` when the reader has gone.
    pub fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        write_all(&self.file, data)
    }

    /// Writes `len` zero bytes.
    ///
    /// # Errors
    /// As [`write_all`](Self::write_all).
    pub fn write_zeroes(&mut self, mut len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let zeros = match self.zeros.take() {
            Some(zeros) => zeros,
            None => Buf::new(ZERO_CHUNK as usize)?,
        };
        let zeros = self.zeros.insert(zeros);
        while len > 0 {
            let n = len.min(ZERO_CHUNK);
            write_all(&self.file, &zeros[..n as usize])?;
            len -= n;
        }
        Ok(())
    }
}

fn write_all(mut file: &File, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match file.write(data) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => data = &data[n..],
            Err(e) => wait_or_fail(e, file.as_fd(), libc::POLLOUT)?,
        }
    }
    Ok(())
}

/// Makes a pipe hold more, so that reader and writer switch less often. Refusal (not a pipe, the user's limit) is fine.
fn enlarge(fd: BorrowedFd<'_>) {
    // SAFETY: the commands take an int or nothing; the descriptor is open.
    unsafe {
        if (0..PIPE_SIZE).contains(&libc::fcntl(fd.as_raw_fd(), libc::F_GETPIPE_SZ)) {
            libc::fcntl(fd.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_SIZE);
        }
    }
}

/// After an error: returns when the call is worth repeating. A shell may hand us a stream in non-blocking mode, which
/// is shared with others and so not ours to change.
fn wait_or_fail(error: io::Error, fd: BorrowedFd<'_>, events: libc::c_short) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock => {
            let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
            // SAFETY: one `pollfd`, which outlives the call.
            retry(|| i64::from(unsafe { libc::poll(&raw mut poll, 1, -1) })).map(drop)
        }
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;
    use std::thread;

    fn pipe(flags: libc::c_int) -> (OwnedFd, OwnedFd) {
        let mut fds = [0; 2];
        // SAFETY: two ints for two descriptors, which nobody else owns.
        unsafe {
            assert_eq!(libc::pipe2(fds.as_mut_ptr(), flags | libc::O_CLOEXEC), 0);
            (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
        }
    }

    fn through(flags: libc::c_int) {
        let (r, w) = pipe(flags);
        let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let expected = [&data[..], &[0; 2_500_001], b"end"].concat();
        let writer = thread::spawn(move || {
            let mut writer = PipeWriter::new(w);
            writer.write_all(&data).unwrap();
            writer.write_zeroes(2_500_001).unwrap();
            writer.write_zeroes(0).unwrap();
            writer.write_all(b"end").unwrap();
        });
        let mut reader = PipeReader::new(r);
        let mut got = Vec::new();
        let mut buf = vec![1; 1_000_000];
        loop {
            let n = reader.fill(&mut buf).unwrap();
            got.extend_from_slice(&buf[..n]);
            if n < buf.len() {
                break;
            }
        }
        assert_eq!(reader.fill(&mut buf).unwrap(), 0);
        writer.join().unwrap();
        assert!(got == expected, "{} bytes for {}", got.len(), expected.len());
    }

    #[test]
    fn everything_comes_through() {
        through(0);
    }

    #[test]
    fn non_blocking_pipes_are_waited_for() {
        through(libc::O_NONBLOCK);
    }

    #[test]
    fn pipes_grow_and_broken_ones_say_so() {
        let (r, w) = pipe(0);
        let mut writer = PipeWriter::new(w);
        // SAFETY: takes numbers only.
        assert_eq!(unsafe { libc::fcntl(r.as_raw_fd(), libc::F_GETPIPE_SZ) }, PIPE_SIZE);
        drop(r);
        assert_eq!(writer.write_all(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
