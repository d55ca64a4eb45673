//! `diskmill fs` as far as no appliance is booted: what is wrong is said before, and tools of libguestfs are told what was
//! asked. Their place is taken by scripts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use diskmill_testkit::{Cmd, Tool, scratch};

/// `diskmill` in a folder of its own, where no appliance can start.
fn diskmill(dir: &Path, words: &[&str]) -> Cmd {
    let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(words).dir(dir);
    let run = dir.join("run");
    let _ = fs::create_dir(&run);
    fs::set_permissions(&run, Permissions::from_mode(0o700)).unwrap();
    cmd.limit(Duration::from_secs(60))
        .env("XDG_RUNTIME_DIR", run)
        .env("HOME", dir)
        .env("LIBGUESTFS_BACKEND", "direct")
        .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
        .env("LIBGUESTFS_HV", "/bin/false")
}

fn disk(dir: &Path, name: &str) {
    File::create(dir.join(name)).unwrap().set_len(1 << 20).unwrap();
}

#[test]
fn a_sparse_copy_replaces_only_what_it_is_told_to() {
    let dir = scratch();
    let dir = dir.path();
    disk(dir, "disk.raw");
    fs::write(dir.join("old.raw"), "old").unwrap();
    fs::hard_link(dir.join("disk.raw"), dir.join("same.raw")).unwrap();
    symlink("disk.raw", dir.join("link.raw")).unwrap();
    let sparsify = |more: &[&str]| diskmill(dir, &[&["fs", "sparsify", "disk.raw"], more].concat());
    sparsify(&["old.raw"]).fails(1).says(&["old.raw", "exists", "--force"]);
    for same in ["disk.raw", "same.raw", "link.raw"] {
        sparsify(&[same]).fails(1).says(&["exists"]);
        sparsify(&["--force", same]).fails(1).says(&[same, "the output is a file of the source"]);
    }
    for wrong in ["/dev/null", "run"] {
        sparsify(&["--force", wrong]).fails(1).says(&[wrong, "not a regular file"]);
    }
    let _ = diskmill(dir, &["create", "used.qcow2", "1M"]).ok();
    let server = diskmill(dir, &["serve", "--writable", "used.qcow2", "-k", "socket"]).spawn();
    while !dir.join("socket").exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    sparsify(&["--force", "used.qcow2"]).fails(1).says(&["used.qcow2", "lock"]);
    server.signal(diskmill_testkit::Signal::TERM);
    let _ = server.wait();

    // The work fails: there is no appliance.
    let _ = sparsify(&["--force", "old.raw"]).fails(1);
    let _ = sparsify(&["new.raw"]).fails(1);
    assert_eq!(fs::read(dir.join("old.raw")).unwrap(), b"old");
    let left = fs::read_dir(dir).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.starts_with('.') || name == "new.raw").collect();
    assert_eq!(left, [""; 0]);
    sparsify(&["--force", "--in-place"]).fails(2).says(&["--force"]);
}
