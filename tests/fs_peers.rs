//! virt-customize and virt-sparsify with our `qemu-img` first on `PATH`: what they ask of it they get.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[allow(dead_code, reason = "not every test needs all of it")]
#[path = "support/guestfs.rs"]
mod guestfs;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use diskmill_testkit::{Cmd, require_program, scratch};
use guestfs::Fs;

/// Where the partition begins, in bytes.
const START: u64 = 1 << 20;

/// As much of a Debian as libguestfs needs to recognise one.
fn debian(dir: &Path) {
    let root = dir.join("root");
    for folder in ["bin", "etc", "root", "usr/bin", "var/lib"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    let release = "ID=debian\nNAME=\"Debian GNU/Linux\"\nPRETTY_NAME=\"Debian 12\"\nVERSION_ID=\"12\"\n";
    fs::write(root.join("etc/os-release"), release).unwrap();
    fs::write(root.join("etc/debian_version"), "12.0\n").unwrap();
    fs::write(root.join("etc/hostname"), "guest\n").unwrap();
    fs::write(root.join("etc/fstab"), "/dev/sda1 / ext4 defaults 0 1\n").unwrap();
    File::create(dir.join("disk.raw")).unwrap().set_len(96 << 20).unwrap();
    let table = b"label: dos\nstart=2048, type=83\n".to_vec();
    let _ = Cmd::new("sfdisk").args(["-q", "disk.raw"]).stdin_bytes(table).dir(dir).ok();
    let offset = format!("offset={START}");
    let words = ["-q", "-t", "ext4", "-d", "root", "-E", &offset, "disk.raw", "90M"];
    let _ = Cmd::new("mke2fs").args(words).dir(dir).ok();
}

#[test]
fn virt_customize_and_virt_sparsify_use_our_qemu_img() {
    let dir = scratch();
    let dir = dir.path();
    let Some(fs) = Fs::new(dir) else { return };
    let programs = ["virt-customize", "virt-sparsify", "sfdisk", "mke2fs", "debugfs"];
    if !programs.into_iter().all(|name| require_program(name).is_some()) {
        return;
    }
    debian(dir);
    fs.program(&["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]).ok();
    let (bin, log) = (dir.join("bin"), dir.join("log"));
    fs::create_dir(&bin).unwrap();
    let ours = env!("CARGO_BIN_EXE_diskmill");
    let script = format!(
        "#!/bin/bash\n(exec -a qemu-img '{ours}' \"$@\")\ncode=$?\necho \"$code $*\" >>'{}'\nexit $code\n",
        log.display()
    );
    fs::write(bin.join("qemu-img"), script).unwrap();
    fs::set_permissions(bin.join("qemu-img"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let run = |words: &[&str]| fs.peer(words).env("PATH", &path).env("TMPDIR", dir).ok();

    // Without a format given, libguestfs asks qemu-img for it.
    run(&["virt-customize", "-a", "disk.qcow2", "--no-network", "--write", "/etc/marker:was here"]);
    run(&["virt-sparsify", "disk.qcow2", "sparse.qcow2"]);

    let calls = fs::read_to_string(&log).unwrap();
    for command in ["info", "create", "convert"] {
        assert!(calls.contains(&format!("0 {command} ")), "no call of {command}:\n{calls}");
    }
    assert!(calls.lines().all(|call| call.starts_with("0 ")), "a call failed:\n{calls}");
    fs.program(&["check", "sparse.qcow2"]).ok();
    fs.program(&["convert", "-O", "raw", "sparse.qcow2", "sparse.raw"]).ok();
    let partition = format!("sparse.raw?offset={START}");
    let marker = Cmd::new("debugfs").args(["-R", "cat /etc/marker", &partition]).dir(dir).ok().out();
    assert_eq!(marker, "was here");
}
