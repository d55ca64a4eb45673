//! Work on a disk from several threads.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// How many threads fit into `memory` bytes, and at least one. Each of them keeps, of each of two images, `step` bytes that it
/// works on, an unpacked unit of so many bytes, and its payload, which may be twice as long.
pub(crate) fn fitting(memory: u64, step: u64, units: [u64; 2]) -> usize {
    let kept = |unit: u64| unit.saturating_mul(3).saturating_add(step);
    let each = units.into_iter().map(kept).fold(0, u64::saturating_add);
    usize::try_from(memory / each.max(1)).unwrap_or(usize::MAX).max(1)
}

/// Does pieces of work from `threads` threads. `next` names them one after the other; `worker` makes what a thread
/// keeps between pieces. After the first error nothing new is begun, and it is returned.
pub(crate) fn in_parallel<T: Send, W>(
    threads: usize,
    next: impl FnMut() -> Result<Option<T>> + Send,
    worker: impl Fn() -> W + Sync,
    work: impl Fn(T, &mut W) -> Result<()> + Sync,
) -> Result<()> {
    let source = Mutex::new(next);
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let first_error = || failed.lock().unwrap_or_else(PoisonError::into_inner);
    let run = || {
        let mut own = worker();
        while first_error().is_none() {
            let piece = {
                let mut next = source.lock().unwrap_or_else(PoisonError::into_inner);
                next()
            };
            let done = match piece {
                Ok(Some(piece)) => work(piece, &mut own),
                Ok(None) => return,
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                first_error().get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // With fewer threads than planned the work gets done all the same.
            if std::thread::Builder::new().spawn_scoped(scope, run).is_err() {
                break;
            }
        }
        run();
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn large_units_have_few_threads() {
        const MIB: u64 = 1 << 20;
        let fitting = |units| fitting(256 * MIB, MIB, units);
        assert_eq!(fitting([64 * MIB, 0]), 1);
        assert_eq!(fitting([64 * MIB, 64 * MIB]), 1);
        assert_eq!(fitting([2 * MIB, 0]), 32);
        assert!(fitting([64 << 10, 64 << 10]) > 64);
        assert_eq!(fitting([u64::MAX, u64::MAX]), 1);
    }

    #[test]
    fn all_is_done_and_errors_end_it() {
        let sum = AtomicU64::new(0);
        let run = |bad: u64| {
            let mut at = 0;
            in_parallel(
                4,
                || {
                    at += 1;
                    Ok((at <= 1000).then_some(at))
                },
                || (),
                |piece, ()| {
                    sum.fetch_add(piece, Ordering::Relaxed);
                    if piece == bad { Err(Error::cancelled()) } else { Ok(()) }
                },
            )
        };
        run(0).unwrap();
        assert_eq!(sum.swap(0, Ordering::Relaxed), 500_500);
        run(10).unwrap_err();
        assert!(sum.into_inner() < 500_500);
    }
}
