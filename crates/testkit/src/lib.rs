//! What the tests of diskmill share: commands with a time limit and a memory reading, qemu-img and
//! qemu-io as oracles, a model disk, content generators, all-pairs case tables, and a qcow2 image
//! builder that was written from the specification alone.
//!
//! Nothing here uses diskmill's own crates, so that no mistake can agree with itself. This crate is
//! for tests only: its functions panic when the machine fails them (no temporary folder, a program
//! that cannot be started), because a test can do nothing better.
#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failure here is a failed test"
)]

mod cases;
mod command;
pub mod content;
mod digest;
mod hive;
mod model;
mod mount;
mod oracle;
pub mod qcow2;
mod require;
pub mod stream_optimized;

pub use cases::{pairwise, parallel, proptest_config};
pub use command::{Cmd, Outcome, Running, Tool};
pub use digest::{hex, same, same_content, sha256_bytes, sha256_file};
pub use hive::empty_hive;
pub use model::{ModelDisk, Op, Step, legalise, ops, steps, unpack};
pub use mount::Mounted;
pub use oracle::{Oracle, Script};
pub use require::{is_root, require_program, skip, workspace_root};
pub use rustix::process::Signal;
pub use tempfile::TempDir;

/// A fresh folder for one test, removed when dropped.
///
/// It lies under `DISKMILL_TEST_DIR` when that is set, else under the system's temporary folder.
pub fn scratch() -> TempDir {
    let builder = || {
        let mut b = tempfile::Builder::new();
        b.prefix("diskmill-test-");
        b
    };
    match std::env::var_os("DISKMILL_TEST_DIR") {
        Some(dir) => builder().tempdir_in(dir),
        None => builder().tempdir(),
    }
    .expect("a temporary folder")
}

/// Builds a list of command arguments from strings, paths and `format!` results alike.
#[macro_export]
macro_rules! args {
    ($($a:expr),* $(,)?) => {
        [$(::std::ffi::OsString::from(&$a)),*]
    };
}
