//! `diskmill fs` on every file system, table and volume manager, in one image that libguestfs makes; and names and bytes
//! that go in and come out unchanged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[allow(dead_code, reason = "not every test needs all of it")]
#[path = "support/guestfs.rs"]
mod guestfs;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use diskmill_testkit::{Cmd, is_root, scratch, sha256_file};
use guestfs::Fs;

#[test]
fn names_modes_and_bytes_survive() {
    let dir = scratch();
    let dir = dir.path();
    let Some(fs) = Fs::new(dir) else { return };
    File::create(dir.join("disk.raw")).unwrap().set_len(1600 << 20).unwrap();
    let made = Cmd::new("mke2fs").args(["-q", "-F", "-t", "ext4", "disk.raw"]).dir(dir).run();
    assert_eq!(made.code, Some(0), "{made}");

    let tree = dir.join("tree");
    fs::create_dir(&tree).unwrap();
    let names: [&[u8]; 6] = [b"a b", b"it's", b"\"quoted\"", b"line\nend", b"\xff\xfe", b"-rf"];
    for name in names {
        let path = tree.join(OsStr::from_bytes(name));
        fs::write(&path, name).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    }
    symlink("/etc/passwd", tree.join("link")).unwrap();
    let mut big = File::create(dir.join("big")).unwrap();
    let mut block = vec![0u8; 1 << 20];
    let mut state = 1u64;
    for _ in 0..1024 {
        for byte in block.chunks_exact_mut(8) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            byte.copy_from_slice(&state.to_le_bytes());
        }
        big.write_all(&block).unwrap();
    }
    drop(big);

    let put = fs.ok(&["put", "--json", "--owner", "12:34", "disk.raw", "tree", "big", "/"]).json();
    assert_eq!((&put["files"], &put["links"]), (&7.into(), &1.into()));
    let stat = fs.ok(&["ls", "--json", "disk.raw", "/tree"]).json();
    let entries = stat.as_array().unwrap();
    assert_eq!(entries.len(), 7, "{stat}");
    let odd = entries.iter().find(|entry| entry["name-hex"] == "fffe").unwrap();
    assert_eq!((&odd["mode"], &odd["uid"], &odd["gid"]), (&"0640".into(), &12.into(), &34.into()));
    assert!(entries.iter().any(|entry| entry["target"] == "/etc/passwd"));

    fs::create_dir(dir.join("back")).unwrap();
    let archive: &[&str] = if is_root() { &["--archive"] } else { &[] };
    let _ = fs.ok(&[&["get"], archive, &["disk.raw", "/tree", "/big", "back"]].concat());
    assert_eq!(sha256_file(&dir.join("back/big")), sha256_file(&dir.join("big")));
    for name in names {
        let path = dir.join("back/tree").join(OsStr::from_bytes(name));
        assert_eq!(fs::read(&path).unwrap(), name);
        let meta = fs::metadata(&path).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o640);
        assert!(!is_root() || (meta.uid(), meta.gid()) == (12, 34));
    }
    assert_eq!(fs::read_link(dir.join("back/tree/link")).unwrap(), Path::new("/etc/passwd"));

    let _ = fs.ok(&["tar-out", "disk.raw", "/tree", "tree.tar"]);
    let listed = Cmd::new("tar").args(["tf", "tree.tar"]).dir(dir).ok().out();
    assert_eq!(listed.lines().count(), 8, "{listed}");
}

/// QEMU has no part in this but as an NBD client: diskmill writes the VMDK.
#[test]
fn files_are_put_into_vmdks() {
    let dir = scratch();
    let dir = dir.path();
    let Some(fs) = Fs::new(dir) else { return };
    File::create(dir.join("disk.raw")).unwrap().set_len(64 << 20).unwrap();
    let _ = Cmd::new("mke2fs").args(["-q", "-F", "-t", "ext4", "disk.raw"]).dir(dir).ok();
    fs::write(dir.join("file"), vec![7; 3 << 20]).unwrap();
    for subformat in ["monolithicSparse", "monolithicFlat"] {
        let option = format!("subformat={subformat}");
        let _ = fs.program(&["convert", "-O", "vmdk", "-o", &option, "disk.raw", "disk.vmdk"]).ok();
        let _ = fs.ok(&["put", "-q", "disk.vmdk", "file", "/"]);
        let _ = fs.program(&["check", "disk.vmdk"]).ok();
        let _ = Cmd::new("qemu-img").args(["convert", "-O", "raw", "disk.vmdk", "back.raw"]).dir(dir).ok();
        let _ = Cmd::new("e2fsck").args(["-fn", "back.raw"]).dir(dir).ok();
        let _ = Cmd::new("debugfs").args(["-R", "dump /file back", "back.raw"]).dir(dir).ok();
        assert_eq!(sha256_file(&dir.join("back")), sha256_file(&dir.join("file")), "{subformat}");
    }
    let packed = "subformat=streamOptimized";
    let _ = fs.program(&["convert", "-O", "vmdk", "-o", packed, "disk.raw", "packed.vmdk"]).ok();
    fs.cmd(&["put", "packed.vmdk", "file", "/"]).fails(1).says(&["compressed", "not supported"]);
}
