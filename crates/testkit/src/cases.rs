//! Tables of cases: all pairs of many options, run on all processors.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::test_runner::Config;

use crate::content::Rng;

/// How proptest runs: `cases` unless `PROPTEST_CASES` says otherwise, at most `shrinks` steps towards a smaller case, and
/// no file of failures: a case that failed becomes a test of its own.
pub fn proptest_config(cases: u32, shrinks: u32) -> Config {
    let set = std::env::var("PROPTEST_CASES").ok().and_then(|number| number.parse().ok());
    Config {
        cases: set.unwrap_or(cases),
        max_shrink_iters: shrinks,
        failure_persistence: None,
        ..Config::default()
    }
}

/// Rows (one choice index per dimension) in which every pair of choices that `valid` allows occurs.
///
/// `sizes` gives the number of choices per dimension. `valid` judges a whole row. The same arguments
/// give the same rows. A pair that cannot be completed to a valid row within the tries is left out,
/// which is right for pairs that exclude one another.
pub fn pairwise(sizes: &[usize], valid: impl Fn(&[usize]) -> bool) -> Vec<Vec<usize>> {
    const TRIES: usize = 400;
    let mut rng = Rng::new(1);
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let covers = |row: &Vec<usize>, (a, i, b, j): (usize, usize, usize, usize)| row[a] == i && row[b] == j;
    for a in 0..sizes.len() {
        for b in a + 1..sizes.len() {
            for (i, j) in (0..sizes[a]).flat_map(|i| (0..sizes[b]).map(move |j| (i, j))) {
                if rows.iter().any(|row| covers(row, (a, i, b, j))) {
                    continue;
                }
                let row = (0..TRIES).find_map(|_| {
                    let mut row: Vec<usize> = sizes.iter().map(|&n| rng.below(n)).collect();
                    (row[a], row[b]) = (i, j);
                    valid(&row).then_some(row)
                });
                rows.extend(row);
            }
        }
    }
    rows
}

/// Runs `check` on every case, on all processors, and then fails with the first of those that failed.
pub fn parallel<C: Sync + std::fmt::Debug>(cases: &[C], check: impl Fn(&C) + Sync) {
    assert!(!cases.is_empty(), "a table without cases tests nothing");
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(cause) = catch_unwind(AssertUnwindSafe(|| check(case))) {
                        let text = cause
                            .downcast_ref::<String>()
                            .cloned()
                            .or_else(|| cause.downcast_ref::<&str>().map(ToString::to_string))
                            .unwrap_or_default();
                        failures.lock().expect("no poison").push(format!("{case:?}: {text}"));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().expect("no poison");
    assert!(
        failures.is_empty(),
        "{} of {} cases failed:\n{}",
        failures.len(),
        cases.len(),
        // Often all fail for one reason: the first ones tell it.
        failures[..failures.len().min(8)].join("\n")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_allowed_pair_occurs() {
        let sizes = [3, 4, 2, 5];
        let valid = |row: &[usize]| !(row[0] == 1 && row[3] == 2);
        let rows = pairwise(&sizes, valid);
        assert!(rows.iter().all(|row| valid(row)));
        for (a, b) in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)] {
            for (i, j) in (0..sizes[a]).flat_map(|i| (0..sizes[b]).map(move |j| (i, j))) {
                let excluded = (a, i, b, j) == (0, 1, 3, 2);
                assert_eq!(rows.iter().any(|r| r[a] == i && r[b] == j), !excluded, "{a}={i} {b}={j}");
            }
        }
        assert!(rows.len() < 60, "{} rows for a product of 120: no saving", rows.len());
    }

    #[test]
    #[should_panic(expected = "1 of 3 cases failed:\n2: two")]
    fn a_failing_case_is_named() {
        parallel(&[1, 2, 3], |&n| assert!(n != 2, "two"));
    }
}
