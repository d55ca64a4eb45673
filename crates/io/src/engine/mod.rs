//! How batches are moved: which engine runs, and what the engines share.

use std::io;

use crate::sys::{describe, invalid};
use crate::{Batch, Direction, Engine, Piece};

mod sync;
mod uring;

pub use sync::SyncEngine;
pub use uring::UringEngine;

/// Which engine the user wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// The one that suits the job, without a word if io_uring is refused.
    #[default]
    Auto,
    /// io_uring; the synchronous engine, and a reason to tell, if the kernel refuses it.
    Uring,
    /// Plain positioned system calls.
    Sync,
}

/// Which engine runs, and why: made once per job, then asked for an engine by each worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnginePlan {
    /// `"io_uring"` or `"sync"`.
    pub kind: &'static str,
    /// Why it is this one, for people.
    pub reason: String,
    /// Whether io_uring was asked for and refused.
    pub refused: bool,
}

const URING: &str = "io_uring";
const SYNC: &str = "sync";

impl EnginePlan {
    /// Chooses an engine. Where io_uring is wanted (always with [`EngineChoice::Uring`], with `want_uring_in_auto`
    /// if the choice is left to us) it is tried by making a ring and doing a no-op; whatever the kernel says against it
    /// leads to the synchronous engine, with the reason.
    pub fn probe(choice: EngineChoice, want_uring_in_auto: bool) -> EnginePlan {
        let plan = |kind, reason: &str| EnginePlan { kind, reason: reason.to_owned(), refused: false };
        match choice {
            EngineChoice::Sync => return plan(SYNC, "chosen by the caller"),
            EngineChoice::Auto if !want_uring_in_auto => {
                return plan(SYNC, "page-cached files are served as fast by plain reads and writes");
            }
            EngineChoice::Auto | EngineChoice::Uring => {}
        }
        match UringEngine::new(1).and_then(|mut engine| engine.probe()) {
            Ok(()) if choice == EngineChoice::Uring => plan(URING, "chosen by the caller"),
            Ok(()) => plan(URING, "direct or device I/O gains from deep queues"),
            Err(e) => EnginePlan { kind: SYNC, reason: refusal(&e), refused: choice == EngineChoice::Uring },
        }
    }

    /// An engine for the calling thread, with up to `depth` batches in flight. Where this thread's ring cannot be
    /// made after all (a locked-memory limit, as a rule), a synchronous one.
    pub fn engine(&self, depth: usize) -> Box<dyn Engine> {
        if self.kind == URING
            && let Ok(engine) = UringEngine::new(depth)
        {
            return Box::new(engine);
        }
        Box::new(SyncEngine::new())
    }
}

/// Why there is no io_uring, and what may be behind it.
fn refusal(error: &io::Error) -> String {
    let cause = match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => ": a seccomp filter or kernel.io_uring_disabled",
        Some(libc::ENOSYS) => ": not built into this kernel, or a sandbox",
        Some(libc::ENOMEM) => ": the limit of locked memory (ulimit -l) or of memory",
        Some(libc::EMFILE | libc::ENFILE) => ": the limit of open files (ulimit -n)",
        _ => "",
    };
    format!("io_uring refused by the kernel: {}{cause}", describe(error))
}

/// Moves the bytes of `piece` from `done` on with plain positioned calls.
fn transfer(piece: &Piece, direction: Direction, buf: &mut [u8], mut done: usize) -> io::Result<()> {
    let slice = piece_of(piece, buf)?;
    while done < slice.len() {
        let at = piece
            .at
            .checked_add(done as u64)
            .ok_or_else(|| invalid(format!("offset {} overflows", piece.at)))?;
        let moved = match direction {
            Direction::Read => piece.file.read_at(&mut slice[done..], at),
            Direction::Write => piece.file.write_at(&slice[done..], at),
        };
        match moved {
            Ok(0) => return Err(ended(direction, at)),
            Ok(n) => done = done.saturating_add(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The bytes of `piece` in the buffer of its batch.
fn piece_of<'a>(piece: &Piece, buf: &'a mut [u8]) -> io::Result<&'a mut [u8]> {
    let size = buf.len();
    piece.buf_at.checked_add(piece.len).and_then(|end| buf.get_mut(piece.buf_at..end)).ok_or_else(|| {
        invalid(format!(
            "a piece of {} bytes at {} lies outside its buffer of {size} bytes",
            piece.len, piece.buf_at
        ))
    })
}

/// The error for a call that moved nothing.
fn ended(direction: Direction, at: u64) -> io::Error {
    match direction {
        Direction::Read => {
            io::Error::new(io::ErrorKind::UnexpectedEof, format!("the file ends at or before offset {at}"))
        }
        Direction::Write => {
            io::Error::new(io::ErrorKind::WriteZero, format!("no byte could be written at offset {at}"))
        }
    }
}

/// Moves a whole batch with plain positioned calls; gives the pieces that failed.
fn transfer_all(batch: &Batch, buf: &mut [u8]) -> Vec<(usize, io::Error)> {
    let one = |(i, piece)| transfer(piece, batch.direction, buf, 0).err().map(|e| (i, e));
    batch.pieces.iter().enumerate().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Makes `io_uring_setup` fail on the calling thread for ever, as container sandboxes do.
    fn forbid_io_uring(errno: i32) {
        const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
        const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
        let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let mut steps = [
            step(LOAD, 0, 0, 0), // the number of the system call
            step(JUMP_IF_EQUAL, 0, 1, libc::SYS_io_uring_setup as u32),
            step(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
            step(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let filter = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
        // SAFETY: the filter and its steps outlive the call, which copies them; it binds this thread only.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter), 0);
        }
    }

    #[test]
    fn refusal_leads_to_the_synchronous_engine() {
        for (errno, words) in [
            (libc::EPERM, "Operation not permitted (EPERM): a seccomp filter or kernel.io_uring_disabled"),
            (libc::ENOSYS, "Function not implemented (ENOSYS): not built into this kernel, or a sandbox"),
        ] {
            let before = EnginePlan::probe(EngineChoice::Uring, true);
            let check = move || {
                forbid_io_uring(errno);
                for choice in [EngineChoice::Uring, EngineChoice::Auto] {
                    let plan = EnginePlan::probe(choice, true);
                    assert_eq!((plan.kind, plan.refused), ("sync", choice == EngineChoice::Uring));
                    assert_eq!(plan.reason, format!("io_uring refused by the kernel: {words}"));
                    assert_eq!(plan.engine(4).name(), "sync");
                }
                // A plan of another thread does not hold here.
                assert_eq!(before.engine(4).name(), "sync");
            };
            thread::spawn(check).join().unwrap();
        }
    }
}
