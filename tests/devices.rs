//! Block devices as source and target, by loop devices (needs root).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use diskmill_testkit::content::{Pattern, disk, fill};
use diskmill_testkit::{Cmd, Oracle, Tool, is_root, require_program, same_content, scratch, skip};

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

/// A loop device over a file, detached when dropped.
struct Loop(String);

impl Loop {
    fn over(file: &Path) -> Option<Self> {
        Self::with(&[], file)
    }

    fn with(options: &[&str], file: &Path) -> Option<Self> {
        if !is_root() {
            skip("loop devices need root");
            return None;
        }
        let losetup = require_program("losetup")?;
        let out = Cmd::new(losetup).args(["-f", "--show"]).args(options).arg(file).run();
        if out.code != Some(0) {
            skip(&format!("no loop device: {}", out.err().trim()));
            return None;
        }
        Some(Self(out.out().trim().to_owned()))
    }

    /// Writes the device's cache back to the file and lets the device go.
    fn detach(self) {
        Cmd::new("blockdev").args(["--flushbufs", &self.0]).ok();
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Cmd::new("losetup").args(["-d", &self.0]).run();
    }
}

#[test]
fn a_device_is_read() {
    let dir = scratch();
    let dir = dir.path();
    let content = disk(1, 4 << 20);
    std::fs::write(dir.join("disk"), &content).unwrap();
    let Some(device) = Loop::over(&dir.join("disk")) else { return };
    for direct in [&[][..], &["--direct"]] {
        let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "raw"]).args(direct);
        cmd.args([&device.0, "out.raw"]).dir(dir).ok();
        same_content(&dir.join("out.raw"), &content);
    }
    let info = diskmill().cmd(["info", "--output=json", "-f", "raw", &device.0]).ok().json();
    assert_eq!(info["virtual-size"], 4 << 20);
}

#[test]
fn a_device_is_written_in_place_and_old_bytes_do_not_show() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let content = disk(2, 3 << 20);
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    q.img(["convert", "-c", "-f", "raw", "-O", "qcow2", "in.raw", "in.qcow2"]).ok();
    for more in [&["-n"][..], &[], &["-n", "--direct"], &["-n", "--io", "sync"]] {
        std::fs::write(dir.join("disk"), vec![0xee; 4 << 20]).unwrap();
        let Some(device) = Loop::over(&dir.join("disk")) else { return };
        let cmd = diskmill().cmd(["convert", "-f", "qcow2", "-O", "raw"]).args(more);
        cmd.args(["in.qcow2", &device.0]).dir(dir).ok();
        assert!(Path::new(&device.0).metadata().is_ok_and(|m| !m.is_file()), "the device was replaced");
        device.detach();
        let got = std::fs::read(dir.join("disk")).unwrap();
        assert!(got[..content.len()] == content[..], "{more:?}: old bytes show through");
        assert!(got[content.len()..].iter().all(|&b| b == 0xee), "{more:?}: written past the end");
    }
}

#[test]
fn fresh_raw_disks_on_a_device() {
    let dir = scratch();
    let dir = dir.path();
    let device = || {
        std::fs::write(dir.join("disk"), vec![0xee; 4 << 20]).unwrap();
        Loop::over(&dir.join("disk"))
    };
    let cleared = |device: Loop| {
        device.detach();
        let got = std::fs::read(dir.join("disk")).unwrap();
        let zeros = got.iter().take_while(|&&byte| byte == 0).count();
        assert!(got[zeros..].iter().all(|&byte| byte == 0xee));
        zeros
    };
    let img = |words: &[&str], device: &Loop, size: &str| {
        let cmd = diskmill().cmd(["qemu-img", "create"]).args(words);
        cmd.args([&device.0, size]).run()
    };
    // As QEMU: only what may be an old header.
    let Some(disk) = device() else { return };
    let refused = img(&["-f", "raw"], &disk, "5M");
    assert!(refused.code == Some(1) && refused.err().contains("Cannot grow device files"), "{refused}");
    let refused = img(&["-f", "raw", "-o", "preallocation=full"], &disk, "3M");
    assert!(refused.err().contains("Unsupported preallocation mode 'full'"), "{refused}");
    assert_eq!(img(&["-f", "raw"], &disk, "3M").code, Some(0));
    assert_eq!(cleared(disk), 512);

    let Some(disk) = device() else { return };
    diskmill().cmd(["create", "-f", "raw", &disk.0, "3M"]).fails(1).says(&["--force"]);
    diskmill().cmd(["create", "--force", "-f", "raw", &disk.0, "3M"]).ok();
    assert_eq!(cleared(disk), 3 << 20);
}

#[test]
fn a_device_that_is_too_small_is_refused_before_anything_is_written() {
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("in.raw"), fill(Pattern::Text, 1, 4 << 20)).unwrap();
    std::fs::write(dir.join("disk"), vec![0xee; 1 << 20]).unwrap();
    let Some(device) = Loop::over(&dir.join("disk")) else { return };
    let cmd = diskmill().cmd(["convert", "-n", "-f", "raw", "-O", "raw", "in.raw", &device.0]);
    cmd.dir(dir).fails(1).says(&["small", "needs"]);
    device.detach();
    same_content(&dir.join("disk"), &vec![0xee; 1 << 20]);
}

#[test]
fn a_qcow2_image_on_a_device() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let content = disk(3, 2 << 20);
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    q.img(["convert", "-f", "raw", "-O", "qcow2", "in.raw", "disk"]).ok();
    // A device is longer than the image on it.
    let file = std::fs::File::options().write(true).open(dir.join("disk")).unwrap();
    file.set_len(8 << 20).unwrap();
    let Some(device) = Loop::over(&dir.join("disk")) else { return };
    let cmd = diskmill().cmd(["convert", "-f", "qcow2", "-O", "raw", &device.0, "out.raw"]);
    cmd.dir(dir).ok();
    same_content(&dir.join("out.raw"), &content);
}

/// Tables smaller than a page go through the page cache, data in the same page past it. When both were written at the same time,
/// every other run had old bytes in a cluster.
#[test]
fn direct_writes_to_a_device_keep_clear_of_the_page_cache() {
    const DISK: usize = 64 << 20;
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    std::fs::write(dir.join("in.raw"), fill(Pattern::Random, 1, DISK)).unwrap();
    std::fs::write(dir.join("disk"), []).unwrap();
    // A loop device that works in the background as a disk does, and not as the page cache.
    for _ in 0..6 {
        std::fs::write(dir.join("disk"), vec![0xaa; DISK + (4 << 20)]).unwrap();
        std::fs::File::open(dir.join("disk")).unwrap().sync_all().unwrap();
        let Some(device) = Loop::with(&["--direct-io=on"], &dir.join("disk")) else { return };
        let words = ["convert", "-O", "qcow2", "-o", "cluster_size=1k", "--direct", "--threads", "1"];
        diskmill().cmd(words).args(["-f", "raw", "in.raw", &device.0]).dir(dir).ok();
        device.detach();
        q.identical(("raw", "in.raw"), ("qcow2", "disk"));
    }
}
