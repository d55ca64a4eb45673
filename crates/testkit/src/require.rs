//! What a test needs from the machine, and how it says that something is missing.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Says that a test, or a part of it, does not run here, and why.
///
/// The line goes to standard error and, because test runners hide the output of tests that pass, to
/// the file named by `DISKMILL_SKIP_LOG`. With `DISKMILL_REQUIRE_ALL=1` a skip is a failure.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let line = format!("SKIPPED: {}: {reason}\n", thread.name().unwrap_or("?"));
    eprint!("{line}");
    if let Some(log) = std::env::var_os("DISKMILL_SKIP_LOG") {
        let file = OpenOptions::new().create(true).append(true).open(log);
        file.and_then(|mut f| f.write_all(line.as_bytes())).expect("write the skip log");
    }
    let all = std::env::var_os("DISKMILL_REQUIRE_ALL");
    assert!(all.is_none_or(|v| v != "1"), "DISKMILL_REQUIRE_ALL=1 and {line}");
}

/// The program of that name on `PATH`; without it, [`skip`] and `None`.
pub fn require_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| p.is_file());
    if found.is_none() {
        skip(&format!("no {name} on PATH"));
    }
    found
}

/// Whether this process runs as root (some faults can only be made, or only be avoided, as root).
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The folder of the workspace: where `testdata/` and `tests/` are.
pub fn workspace_root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("crates/testkit is two levels down")
}
