//! The same input and options give the same bytes, whatever the number of threads and the engine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use diskmill_testkit::content::disk;
use diskmill_testkit::{Oracle, Tool, parallel, scratch, sha256_file, steps};

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

/// Makes `source` into a target with these options in every way of running, and compares the bytes.
fn same_bytes(dir: &Path, source: &str, format: &str, options: &[&str]) {
    let mut first: Option<(String, Vec<u8>)> = None;
    for threads in ["1", "2", "8"] {
        for io in ["uring", "sync", "auto"] {
            for memory in ["256M", "16M"] {
                let name = format!("out-{threads}-{io}-{memory}");
                let cmd = diskmill().cmd(["convert", "-f", format, "--threads", threads]);
                let cmd = cmd.args(["--io", io, "--memory", memory]).args(options);
                cmd.args([source, &name]).dir(dir).ok();
                let bytes = std::fs::read(dir.join(&name)).unwrap();
                std::fs::remove_file(dir.join(&name)).unwrap();
                match &first {
                    None => first = Some((name, bytes)),
                    Some((other, want)) => {
                        let at = bytes.iter().zip(want).position(|(a, b)| a != b);
                        assert!(
                            bytes == *want,
                            "{name} ({} bytes) and {other} ({} bytes) differ at {at:?}",
                            bytes.len(),
                            want.len()
                        );
                    }
                }
            }
        }
    }
}

const TARGETS: [&[&str]; 8] = [
    &["-O", "raw"],
    &["-O", "qcow2"],
    &["-O", "qcow2", "-o", "cluster_size=512"],
    &["-O", "qcow2", "-o", "extended_l2=on,cluster_size=128k"],
    &["-O", "qcow2", "-c"],
    &["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
    &["-O", "qcow2", "-c", "-o", "cluster_size=4k"],
    &["-O", "qcow2", "-o", "preallocation=metadata"],
];

#[test]
fn from_raw() {
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("in.raw"), disk(1, (9 << 20) + 1536)).unwrap();
    parallel(&TARGETS, |options| {
        let own = scratch();
        std::os::unix::fs::symlink(dir.join("in.raw"), own.path().join("in.raw")).unwrap();
        same_bytes(own.path(), "in.raw", "raw", options);
    });
}

#[test]
fn from_qcow2() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let size = (5 << 20) + 512;
    q.create("in.qcow2", "cluster_size=16k", size);
    q.write("in.qcow2", "qcow2", &steps(5, size, 16384, 60, true));
    parallel(&TARGETS, |options| {
        let own = scratch();
        std::fs::copy(dir.join("in.qcow2"), own.path().join("in.qcow2")).unwrap();
        same_bytes(own.path(), "in.qcow2", "qcow2", options);
    });
}

#[test]
fn two_runs_at_different_times_and_places() {
    let (a, b) = (scratch(), scratch());
    let sums = [a, b].map(|dir| {
        let dir = dir.path();
        std::fs::write(dir.join("in.raw"), disk(2, 4 << 20)).unwrap();
        let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "qcow2", "-c", "in.raw", "out"]);
        cmd.dir(dir).ok();
        std::thread::sleep(std::time::Duration::from_millis(1100));
        sha256_file(&dir.join("out"))
    });
    assert_eq!(sums[0], sums[1]);
}
