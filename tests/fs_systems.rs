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
use serde_json::Value;

/// The file systems of the image, by partition from 1: type, label.
const SYSTEMS: [(&str, &str); 7] = [
    ("ext2", "e2"),
    ("ext3", "e3"),
    ("ext4", "e4"),
    ("xfs", "x"),
    ("btrfs", "b"),
    ("ntfs", "n"),
    ("vfat", "FAT"),
];

/// A GPT disk with each file system, LVM and LUKS, and an MBR disk.
fn make(fs: &Fs, dir: &Path) {
    for (name, len) in [("gpt.raw", 1600u64 << 20), ("mbr.raw", 64 << 20)] {
        File::create(dir.join(name)).unwrap().set_len(len).unwrap();
    }
    let mut script = String::from("run\npart-init /dev/sda gpt\n");
    let sizes_mib = [32, 32, 64, 400, 256, 64, 64, 96, 96];
    let mut start = 2048;
    for mib in sizes_mib {
        let end = start + mib * 2048 - 1;
        script += &format!("part-add /dev/sda p {start} {end}\n");
        start = end + 1;
    }
    for (index, (kind, label)) in SYSTEMS.iter().enumerate() {
        let device = format!("/dev/sda{}", index + 1);
        script += &format!("mkfs {kind} {device} label:{label}\nmount {device} /\nmkdir /{label}\n");
        if *kind == "ext4" {
            script += "mkdir /mnt\n";
            for (_, label) in SYSTEMS {
                script += &format!("-mkdir /mnt/{label}\n");
            }
            script += "mkdir /mnt/lv\nmkdir /mnt/crypt\n";
        }
        if *kind == "btrfs" {
            script += "btrfs-subvolume-create /sub\n";
        }
        script += &format!("write /{label}/hello \"hello from {kind}\\n\"\numount /\n");
    }
    script +=
        "pvcreate /dev/sda8\nvgcreate vg /dev/sda8\nlvcreate lv vg 64\nmkfs ext4 /dev/vg/lv label:lvm\n";
    script += "mount /dev/vg/lv /\nwrite /hello \"hello from lvm\\n\"\numount /\n";
    script += "luks-format /dev/sda9 0\ncryptsetup-open /dev/sda9 vault\nmkfs ext4 /dev/mapper/vault label:secret\n";
    script += "mount /dev/mapper/vault /\nwrite /hello \"hello from luks\\n\"\numount /\ncryptsetup-close /dev/mapper/vault\n";
    script += "part-disk /dev/sdb mbr\nmkfs ext4 /dev/sdb1 label:root\n";
    fs.guestfish(&["gpt.raw", "mbr.raw"], &script);
}

fn find<'v>(list: &'v Value, name: &str) -> &'v Value {
    let devices = list[0]["devices"].as_array().unwrap();
    devices.iter().find(|device| device["name"] == name).unwrap_or_else(|| panic!("no {name} in {list}"))
}

#[test]
fn every_file_system_is_listed_and_read() {
    let dir = scratch();
    let dir = dir.path();
    let Some(fs) = Fs::new(dir) else { return };
    make(&fs, dir);
    fs::write(dir.join("key"), "secret\n").unwrap();
    let convert = |format: &str, to: &str| {
        Cmd::new(env!("CARGO_BIN_EXE_diskmill")).args(["convert", "-O", format, "gpt.raw", to]).dir(dir).ok()
    };
    let _ = (convert("qcow2", "gpt.qcow2"), convert("vmdk", "gpt.vmdk"));

    let list = fs.ok(&["list", "--json", "--key", "file:key", "gpt.qcow2"]).json();
    assert_eq!(find(&list, "/dev/sda")["content"], "gpt");
    for (index, (kind, label)) in SYSTEMS.iter().enumerate() {
        let device = find(&list, &format!("/dev/sda{}", index + 1));
        assert_eq!((&device["content"], &device["label"]), (&(*kind).into(), &(*label).into()), "{device}");
        assert_eq!(device["parent"], "/dev/sda");
        let size = device["size"].as_u64().unwrap();
        let used = device["usage"]["used"].as_u64().unwrap();
        assert!(used < size && device["usage"]["available"].as_u64().unwrap() > 0, "{device}");
    }
    assert_eq!(find(&list, "btrfsvol:/dev/sda5/sub")["parent"], "/dev/sda5");
    assert_eq!(
        (&find(&list, "/dev/sda8")["content"], &find(&list, "/dev/vg/lv")["label"]),
        (&"LVM2_member".into(), &"lvm".into())
    );
    let luks = find(&list, "/dev/sda9");
    let crypt = find(&list, &format!("/dev/mapper/luks-{}", luks["uuid"].as_str().unwrap())).clone();
    assert_eq!((&crypt["parent"], &crypt["label"]), (&"/dev/sda9".into(), &"secret".into()));

    // All of them mounted together, out of a VMDK: one boot.
    let mut words: Vec<String> = ["get", "--key", "file:key", "-m", "/dev/sda3:/"].map(str::to_owned).into();
    for (index, (_, label)) in SYSTEMS.iter().enumerate().filter(|(index, _)| *index != 2) {
        words.extend(["-m".to_owned(), format!("/dev/sda{}:/mnt/{label}", index + 1)]);
    }
    words.extend(["-m".to_owned(), "/dev/vg/lv:/mnt/lv".to_owned()]);
    words.extend(["-m".to_owned(), format!("{}:/mnt/crypt", crypt["name"].as_str().unwrap())]);
    words.extend(["gpt.vmdk", "/", "out"].map(str::to_owned));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let _ = fs.ok(&words);
    let read = |path: &str| fs::read_to_string(dir.join("out").join(path)).unwrap();
    for (kind, label) in SYSTEMS {
        let path =
            if kind == "ext4" { format!("{label}/hello") } else { format!("mnt/{label}/{label}/hello") };
        assert_eq!(read(&path), format!("hello from {kind}\n"));
    }
    assert_eq!(
        (read("mnt/lv/hello"), read("mnt/crypt/hello")),
        ("hello from lvm\n".into(), "hello from luks\n".into())
    );

    // Several images at once; a wrong one does not hide the others.
    let df = fs.cmd(&["df", "--json", "mbr.raw", "missing.raw"]).fails(1);
    df.says(&["missing.raw"]);
    let df = df.json();
    assert_eq!(
        (&df[0]["filesystems"][0]["name"], &df[0]["filesystems"][0]["label"]),
        (&"/dev/sda1".into(), &"root".into())
    );

    // What cannot be decided is asked.
    fs.cmd(&["ls", "gpt.qcow2"]).fails(1).says(&["-m device"]);
    fs.cmd(&["rm", "gpt.vmdk", "/x"]).fails(1).says(&["writing to vmdk images is not supported"]);
}

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
