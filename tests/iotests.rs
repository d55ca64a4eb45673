//! QEMU's own tests (qemu-iotests) against diskmill under qemu-img's name, with the installed qemu-io and qemu-nbd.
//!
//! They are not part of this project: `DISKMILL_IOTESTS` names an unpacked QEMU source, or it is looked for in
//! `~/.cache/qemu-iotests/qemu`. `tests/iotests.tsv` lists what is run and what is expected. `DISKMILL_IOTESTS_SECONDS`
//! bounds the time (120 by default); what does not fit is said not to have run.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diskmill_testkit::{Cmd, parallel, require_program, scratch, skip, workspace_root};

/// A line of the list.
#[derive(Debug)]
struct Expected {
    test: String,
    format: String,
    /// Why it fails, if it is known to.
    failure: Option<String>,
}

fn list() -> Vec<Expected> {
    let text = fs::read_to_string(workspace_root().join("tests/iotests.tsv")).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let parsed = lines.map(|line| {
        let mut fields = line.split('\t').map(str::to_owned);
        let (test, format) = (fields.next().unwrap(), fields.next().unwrap());
        Expected { test, format, failure: fields.next() }
    });
    parsed.collect()
}

fn sources() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/qemu-iotests/qemu"));
    let source = std::env::var_os("DISKMILL_IOTESTS").map(PathBuf::from).or_else(home)?;
    let tests = source.join("tests/qemu-iotests");
    tests.join("check").is_file().then_some(tests)
}

/// Programs under the names that the tests' expected output has.
fn wrappers(dir: &Path) -> Option<()> {
    let mut programs = vec![("qemu-img", PathBuf::from(env!("CARGO_BIN_EXE_diskmill")))];
    for name in ["qemu-io", "qemu-nbd"] {
        programs.push((name, require_program(name)?));
    }
    let script = |name: &str, text: String| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    for (name, program) in programs {
        script(name, format!("#!/bin/bash\nexec -a {name} '{}' \"$@\"\n", program.display()));
    }
    // No test that is listed starts a machine; the harness asks what there is.
    let formats = "bochs cloop file host_device qcow2 raw vmdk";
    let answers = format!(
        "case \" $* \" in\n\
         *' -machine help '*) echo 'none (default)';;\n\
         *' format=help '*) echo 'Supported formats: {formats}'; echo 'Supported formats (read-only): {formats}';;\n\
         *' -device help '*) echo 'name \"virtio-blk\"';;\n\
         *) exit 97;;\n\
         esac"
    );
    for name in ["qemu-system-x86_64", "qemu-storage-daemon"] {
        script(name, format!("#!/bin/bash\n{answers}\n"));
    }
    Some(())
}

#[test]
fn qemu_s_own_tests() {
    let Some(source) = sources() else {
        return skip("QEMU's tests are not here (DISKMILL_IOTESTS names an unpacked QEMU source)");
    };
    let Some(python) = require_program("python3") else { return };
    let bin = scratch();
    if wrappers(bin.path()).is_none() {
        return;
    }
    let seconds = std::env::var("DISKMILL_IOTESTS_SECONDS").ok().and_then(|text| text.parse().ok());
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or(120));
    let mut list = list();
    // If the time ends before the list, those that prove something have run.
    list.sort_by_key(|expected| expected.failure.is_some());
    let left = AtomicUsize::new(0);
    parallel(&list, |expected| {
        if Instant::now() > end {
            left.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let passed = run(&python, &source, bin.path(), expected);
        match (&expected.failure, passed) {
            (None, Err(output)) => panic!("{output}"),
            (Some(_), Ok(())) => panic!("it passes now: take its reason out"),
            _ => {}
        }
    });
    let left = left.into_inner();
    println!("{} of QEMU's tests ran, {left} did not fit into the time", list.len() - left);
}

fn run(python: &Path, source: &Path, bin: &Path, expected: &Expected) -> Result<(), String> {
    let work = scratch();
    let mut cmd = Cmd::new(python)
        .arg(source.join("check"))
        .arg(format!("-{}", expected.format))
        .args(["--color", "off", "--source-dir"])
        .arg(source)
        .arg("--build-dir")
        .arg(source)
        .arg(&expected.test)
        .dir(work.path())
        .limit(Duration::from_secs(120))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("LC_ALL", "C");
    for (name, program) in [
        ("QEMU_IMG_PROG", "qemu-img"),
        ("QEMU_IO_PROG", "qemu-io"),
        ("QEMU_NBD_PROG", "qemu-nbd"),
        ("QEMU_PROG", "qemu-system-x86_64"),
        ("QSD_PROG", "qemu-storage-daemon"),
    ] {
        cmd = cmd.env(name, bin.join(program));
    }
    for (name, dir) in [("TEST_DIR", "t"), ("SOCK_DIR", "s")] {
        fs::create_dir(work.path().join(dir)).unwrap();
        cmd = cmd.env(name, work.path().join(dir));
    }
    let outcome = cmd.run();
    let output = outcome.out();
    // A test that does not run here counts as one that does not pass.
    let passed = outcome.code == Some(0) && output.contains("Passed all 1");
    if passed || is_extent_tree(&output) { Ok(()) } else { Err(output) }
}

/// Whether nothing differs but that a file takes one block more. ext4 counts as the file's the block of its extent tree that a file
/// of more than four extents has, which is a matter of the free space that is left to the test.
fn is_extent_tree(output: &str) -> bool {
    let differs = |line: &&str| {
        (line.starts_with('+') && !line.starts_with("+++"))
            || (line.starts_with('-') && !line.starts_with("---"))
    };
    let one_block = |line: &str| {
        let (_, sizes) = line.split_once(": Host size has grown from ")?;
        let (before, after) = sizes.split_once(" to ")?;
        let grown = after.trim().parse::<u64>().ok()?.checked_sub(before.parse().ok()?)?;
        (grown == 4096).then_some(())
    };
    let mut lines = output.lines().map(str::trim_start).filter(differs).peekable();
    lines.peek().is_some() && lines.all(|line| one_block(line).is_some())
}
