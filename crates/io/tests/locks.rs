//! Locks against ourselves and against QEMU.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use LockMode::{Reader, Shared, Writer};
use diskmill_io::{FileStorage, ImageLock, LockError, LockMode, MemoryStorage, OpenHow, SharedStorage};

fn open(path: &Path) -> SharedStorage {
    Arc::new(FileStorage::open(path, &OpenHow { read: true, write: true, ..OpenHow::default() }).unwrap())
}

fn try_lock(path: &Path, mode: LockMode) -> Result<ImageLock, String> {
    ImageLock::acquire(&open(path), mode).map_err(|e| e.to_string())
}

#[test]
fn readers_share_and_writers_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap();
    let cases = [
        (Reader, Reader, true),
        (Reader, Shared, true),
        (Reader, Writer, false),
        (Writer, Reader, false),
        (Writer, Writer, false),
        (Writer, Shared, true),
        (Shared, Writer, true),
        (Shared, Reader, true),
    ];
    for (first, second, fine) in cases {
        let held = try_lock(&path, first).unwrap();
        assert!(held.is_held());
        assert_eq!(try_lock(&path, second).is_ok(), fine, "{first:?} then {second:?}");
        // A failed try leaves nothing behind.
        drop(held);
        drop(try_lock(&path, Writer).unwrap());
    }
}

#[test]
fn messages_name_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap();
    let held = try_lock(&path, Writer).unwrap();
    let message = try_lock(&path, Reader).unwrap_err();
    assert!(message.contains("the \"write\" lock is held by another process"), "{message}");
    assert!(message.contains("-U"), "{message}");
    drop(held);
    let _held = try_lock(&path, Reader).unwrap();
    let error = ImageLock::acquire(&open(&path), Writer).unwrap_err();
    assert!(matches!(error, LockError::Conflict { permission: "write", in_use: false, .. }), "{error:?}");
    assert!(!error.to_string().contains("-U"), "{error}");
}

#[test]
fn memory_has_no_lock() {
    let memory: SharedStorage = Arc::new(MemoryStorage::new(1));
    let lock = ImageLock::acquire(&memory, Writer).unwrap();
    assert!(!lock.is_held() && lock.mode() == Writer);
}

fn has(program: &str) -> bool {
    let found =
        Command::new(program).arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success());
    if !found {
        eprintln!("skipped: no {program}");
    }
    found
}

/// A qcow2 image: of raw images, QEMU's own tools share everything.
fn create(path: &Path) {
    let made =
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg("1M").status().unwrap();
    assert!(made.success());
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A qemu-io that waits for commands with the image open, until it is dropped.
fn qemu_io(path: &Path, options: &[&str]) -> Killed {
    let child = Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .args(options)
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Killed(child)
}

fn wait_for(mut what: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        if what() {
            return true;
        }
        sleep(Duration::from_millis(20));
    }
    false
}

#[test]
fn qemu_stops_us() {
    if !has("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path);
    {
        let _qemu = qemu_io(&path, &[]);
        assert!(wait_for(|| try_lock(&path, Writer).is_err()), "qemu-io took no lock");
        let message = try_lock(&path, Reader).unwrap_err();
        assert!(message.contains("the \"write\" lock is held by another process"), "{message}");
        drop(try_lock(&path, Shared).unwrap());
    }
    drop(try_lock(&path, Writer).unwrap());
    let _qemu = qemu_io(&path, &["-r"]);
    assert!(wait_for(|| try_lock(&path, Writer).is_err()), "qemu-io -r took no lock");
    drop(try_lock(&path, Reader).unwrap());
}

#[test]
fn we_stop_qemu() {
    if !has("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create(&path);
    let info = |options: &[&str]| {
        let out =
            Command::new("qemu-img").args(["info", "-f", "qcow2"]).args(options).arg(&path).output().unwrap();
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let lock = try_lock(&path, Writer).unwrap();
    let (fine, message) = info(&[]);
    assert!(!fine && message.contains("Failed to get shared \"write\" lock"), "{message}");
    assert!(info(&["-U"]).0);
    drop(lock);
    let lock = try_lock(&path, Reader).unwrap();
    assert!(info(&[]).0);
    let resize =
        Command::new("qemu-img").args(["resize", "-f", "qcow2"]).arg(&path).arg("2M").output().unwrap();
    let message = String::from_utf8_lossy(&resize.stderr);
    assert!(!resize.status.success() && message.contains("lock"), "{message}");
    drop(lock);
    let _lock = try_lock(&path, Shared).unwrap();
    let resize =
        Command::new("qemu-img").args(["resize", "-f", "qcow2"]).arg(&path).arg("2M").output().unwrap();
    assert!(resize.status.success(), "{}", String::from_utf8_lossy(&resize.stderr));
}
