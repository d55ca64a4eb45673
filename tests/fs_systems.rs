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

use diskmill_guestfs::Command;
use diskmill_testkit::{Cmd, is_root, require_program, scratch, sha256_file};
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
    if require_program("guestmount").is_some() && Path::new("/dev/fuse").exists() {
        fs::create_dir(dir.join("mnt")).unwrap();
        let _ = fs.ok(&["mount", "--write", "-m", "/dev/sda", "disk.vmdk", "mnt"]);
        fs::write(dir.join("mnt/mounted"), "through FUSE").unwrap();
        fs.cmd(&["ls", "disk.vmdk", "/"]).fails(1).says(&["lock"]);
        let _ = fs.ok(&["umount", "mnt"]);
        let _ = fs.program(&["convert", "-O", "raw", "disk.vmdk", "back.raw"]).ok();
        let cat = Cmd::new("debugfs").args(["-R", "cat /mounted", "back.raw"]).dir(dir);
        assert_eq!(cat.ok().out(), "through FUSE");
    }
    let packed = "subformat=streamOptimized";
    let _ = fs.program(&["convert", "-O", "vmdk", "-o", packed, "disk.raw", "packed.vmdk"]).ok();
    fs.cmd(&["put", "packed.vmdk", "file", "/"]).fails(1).says(&["compressed", "not supported"]);
}

/// A file system of the test's images: its folder below the root, its device, blkid's word for it, and how much its names
/// may be.
struct Kind {
    folder: &'static str,
    device: &'static str,
    content: &'static str,
    names: Names,
}

#[derive(PartialEq, Clone, Copy)]
enum Names {
    /// Any byte but NUL and `/`; links, owners and modes too.
    Unix,
    /// What is Unicode.
    Unicode,
    /// Without what DOS reserves.
    Dos,
}

const fn kind(folder: &'static str, device: &'static str, content: &'static str, names: Names) -> Kind {
    Kind { folder, device, content, names }
}

/// What is mounted below `/dev/sda1`; on the LUKS volume is an ext4.
const KINDS: [Kind; 8] = [
    kind("ext2", "/dev/sda2", "ext2", Names::Unix),
    kind("ext3", "/dev/sda3", "ext3", Names::Unix),
    kind("xfs", "/dev/sda4", "xfs", Names::Unix),
    kind("btrfs", "/dev/sda5", "btrfs", Names::Unix),
    kind("ntfs", "/dev/sda6", "ntfs", Names::Unicode),
    kind("vfat", "/dev/sda7", "vfat", Names::Dos),
    kind("lvm", "/dev/vg/lv", "ext4", Names::Unix),
    kind("luks", "", "ext4", Names::Unix),
];

/// Sizes of the partitions of `gpt.raw` in MiB; the last ones are for LVM and LUKS. XFS takes no less than 300.
const PARTS: [u64; 9] = [64, 64, 64, 320, 128, 64, 64, 64, 64];

/// Makes `gpt.raw` and `mbr.raw`; the name under which the LUKS volume appears when it is open.
fn make(fs: &Fs, dir: &Path) -> String {
    let size = PARTS.iter().sum::<u64>() + 2;
    for (name, mib) in [("gpt.raw", size), ("mbr.raw", 64)] {
        File::create(dir.join(name)).unwrap().set_len(mib << 20).unwrap();
    }
    let mut maker = fs.maker(&["gpt.raw", "mbr.raw"]);
    maker.run("part-init /dev/sda gpt");
    let mut start = 2048;
    for mib in PARTS {
        maker.run(&format!("part-add /dev/sda p {start} {}", start + mib * 2048 - 1));
        start += mib * 2048;
    }
    maker.run("mkfs ext4 /dev/sda1 label:root");
    for kind in KINDS.iter().filter(|kind| kind.device.starts_with("/dev/sda")) {
        maker.run(&format!("mkfs {} {}", kind.content, kind.device));
    }
    maker.run("pvcreate /dev/sda8");
    maker.run("vgcreate vg /dev/sda8");
    maker.run("lvcreate lv vg 48");
    maker.run("mkfs ext4 /dev/vg/lv");
    maker.call(Command::new("luks-format").arg("/dev/sda9").arg("0").key("secret"));
    let luks = format!("/dev/mapper/luks-{}", maker.run("luks-uuid /dev/sda9"));
    maker.call(Command::new("cryptsetup-open").arg("/dev/sda9").arg("made").key("secret"));
    maker.run("mkfs ext4 /dev/mapper/made");
    maker.run("cryptsetup-close /dev/mapper/made");
    maker.run("mount /dev/sda1 /");
    for kind in &KINDS {
        maker.run(&format!("mkdir /{}", kind.folder));
    }
    maker.run("umount /");
    maker.run("part-init /dev/sdb mbr");
    maker.run("part-add /dev/sdb p 2048 40959");
    maker.run("part-add /dev/sdb e 40960 -1");
    maker.run("part-add /dev/sdb l 43008 -1");
    maker.run("mkfs ext4 /dev/sdb1");
    maker.run("mkfs vfat /dev/sdb5 label:DATA");
    maker.close();
    luks
}

/// A folder of the host for each file system, with names that it takes.
fn make_trees(dir: &Path) {
    for kind in &KINDS {
        let tree = dir.join(kind.folder);
        fs::create_dir_all(tree.join("deep/er")).unwrap();
        fs::write(tree.join("deep/er/file.bin"), content(kind.folder)).unwrap();
        for name in names(kind.names) {
            fs::write(tree.join(OsStr::from_bytes(name)), name).unwrap();
        }
        if kind.names == Names::Unix {
            symlink("deep/er/file.bin", tree.join("link")).unwrap();
            fs::set_permissions(tree.join("deep/er/file.bin"), fs::Permissions::from_mode(0o640)).unwrap();
        }
    }
}

fn names(allowed: Names) -> Vec<&'static [u8]> {
    let mut names: Vec<&[u8]> = vec![b"a b", b"it's", b"-rf", b"#;$(id)"];
    if allowed != Names::Dos {
        names.extend([&b"\"quoted\""[..], b"line\nend", b"back\\slash", "\u{fc}\u{20ac}".as_bytes()]);
    }
    if allowed == Names::Unix {
        names.push(b"\xff\xfe");
    }
    names
}

/// 300 kB that no two file systems have in common.
fn content(seed: &str) -> Vec<u8> {
    (0..300_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8 ^ seed.as_bytes()[n as usize % seed.len()])
        .collect()
}

/// Whether `back` holds what [`make_trees`] made.
fn same_tree(tree: &Path, back: &Path, allowed: Names) {
    for name in names(allowed) {
        assert_eq!(fs::read(back.join(OsStr::from_bytes(name))).unwrap(), name, "{back:?}");
    }
    let deep = "deep/er/file.bin";
    assert!(fs::read(back.join(deep)).unwrap() == fs::read(tree.join(deep)).unwrap(), "{back:?}");
    if allowed == Names::Unix {
        assert_eq!(fs::read_link(back.join("link")).unwrap(), Path::new(deep));
        assert_eq!(fs::metadata(back.join(deep)).unwrap().mode() & 0o7777, 0o640);
    }
    assert_eq!(fs::read_dir(back).unwrap().count(), fs::read_dir(tree).unwrap().count());
}

/// Everything of `gpt.*` mounted.
fn mounted(luks: &str) -> Vec<String> {
    let mut words =
        vec!["--key".to_owned(), "/dev/sda9:file:key".to_owned(), "-m".to_owned(), "/dev/sda1".to_owned()];
    for kind in &KINDS {
        let device = if kind.device.is_empty() { luks } else { kind.device };
        words.extend(["-m".to_owned(), format!("{device}:/{}", kind.folder)]);
    }
    words
}

#[test]
fn every_file_system_and_format() {
    let dir = scratch();
    let dir = dir.path();
    let Some(fs) = Fs::new(dir) else { return };
    let luks = make(&fs, dir);
    make_trees(dir);
    fs::write(dir.join("key"), "secret").unwrap();
    let mounted = mounted(&luks);
    let on = |verb: &[&str], rest: &[&str]| {
        let mut words = verb.to_vec();
        words.extend(mounted.iter().map(String::as_str));
        words.extend(rest);
        fs.cmd(&words)
    };

    let trees: Vec<&str> = KINDS.iter().map(|kind| kind.folder).collect();

    // Folders into folders that exist: beside each other on eight file systems.
    let put = on(&["put", "--json"], &[&["gpt.raw"], &trees[..], &["/"]].concat()).ok();
    put.says(&["vfat", "owners"]);
    let put = put.json();
    assert_eq!((&put["links"], &put["owners-kept"]), (&6.into(), &false.into()), "{put}");

    // The same disk in every format, and each is read through our server.
    for format in ["qcow2", "vmdk"] {
        let target = format!("gpt.{format}");
        let _ = fs.program(&["convert", "-O", format, "gpt.raw", &target]).ok();
    }
    let iso = ["-quiet", "-R", "-J", "-V", "DISC", "-o", "disc.iso", "ext2"];
    let has_iso = require_program("genisoimage").is_some();
    if has_iso {
        let _ = Cmd::new("genisoimage").args(iso).dir(dir).ok();
    }
    let images = ["gpt.raw", "gpt.qcow2", "gpt.vmdk", "mbr.raw", "disc.iso"];
    let images = if has_iso { &images[..] } else { &images[..4] };
    list_tells_all(&fs, images, &luks);

    for format in ["raw", "qcow2", "vmdk"] {
        let (image, back) = (format!("gpt.{format}"), format!("back.{format}"));
        fs::create_dir(dir.join(&back)).unwrap();
        let folders = trees.iter().map(|tree| format!("/{tree}")).collect::<Vec<_>>();
        let folders: Vec<&str> = folders.iter().map(String::as_str).collect();
        let _ = on(&["get", "-q"], &[&[image.as_str()], &folders[..], &[&back]].concat()).ok();
        for kind in &KINDS {
            // What mkfs makes is no part of the tree.
            let _ = fs::remove_dir_all(dir.join(&back).join(kind.folder).join("lost+found"));
            same_tree(&dir.join(kind.folder), &dir.join(&back).join(kind.folder), kind.names);
        }
    }
    if has_iso {
        let _ = fs.ok(&["get", "-q", "disc.iso", "/", "back.iso"]);
        same_tree(&dir.join("ext2"), &dir.join("back.iso"), Names::Unix);
    }
    looking(&fs, &on, dir);
    changing(&fs, &on);
}

/// `list` and `df`, on several images at once.
fn list_tells_all(fs: &Fs, images: &[&str], luks: &str) {
    let words = [&["list", "--json", "--jobs", "2", "--key", "/dev/sda9:file:key"], &images[..3]].concat();
    let found = fs.ok(&words).json();
    for (image, name) in found.as_array().unwrap().iter().zip(images) {
        assert_eq!(image["image"], *name);
        let devices = image["devices"].as_array().unwrap();
        let device = |name: &str| devices.iter().find(|device| device["name"] == name).expect(name);
        for kind in &KINDS {
            let found = device(if kind.device.is_empty() { luks } else { kind.device });
            assert_eq!(found["content"], kind.content, "{found}");
            assert!(found["usage"]["used"].as_u64().is_some(), "{found}");
        }
        assert_eq!(
            (&device("/dev/sda")["content"], &device("/dev/sda1")["label"]),
            (&"gpt".into(), &"root".into())
        );
        assert_eq!(
            (&device(luks)["parent"], &device("/dev/vg/lv")["parent"]),
            (&"/dev/sda9".into(), &"vg".into())
        );
        assert_eq!(device("/dev/sda9")["content"], "crypto_LUKS");
    }
    let found = fs.ok(&[&["df", "--json"], &images[3..]].concat()).json();
    let name = |image: usize, n: usize| found[image]["filesystems"][n]["name"].clone();
    assert_eq!((name(0, 0), name(0, 1)), ("/dev/sda1".into(), "/dev/sda5".into()), "{found}");
    if images.len() > 4 {
        assert_eq!((name(1, 0), &found[1]["filesystems"][0]["label"]), ("/dev/sda".into(), &"DISC".into()));
    }
}

/// The verbs that read, each on one of the formats.
fn looking(fs: &Fs, on: &dyn Fn(&[&str], &[&str]) -> Cmd, dir: &Path) {
    let all = |kind: &Kind| names(kind.names);
    let names_in = |folder: &str, json: &serde_json::Value| {
        let prefix = format!("/{folder}/");
        json.as_array().unwrap().iter().filter(|e| e["path"].as_str().unwrap().starts_with(&prefix)).count()
    };
    let found = on(&["ls", "-R", "--json"], &["gpt.vmdk", "/"]).ok().json();
    for kind in &KINDS {
        // The names, two folders, the file in them, a link; what mkfs made.
        let made = all(kind).len() + 3 + usize::from(kind.names == Names::Unix);
        let extra = usize::from(kind.content.starts_with("ext"));
        assert_eq!(names_in(kind.folder, &found), made + extra, "{}", kind.folder);
    }
    let found = on(&["find", "-0", "--type", "f", "--name", "*[\n\"]*"], &["gpt.qcow2", "/"]).ok();
    let unicode = KINDS.iter().filter(|kind| kind.names != Names::Dos).count();
    assert_eq!(found.stdout.split(|&b| b == 0).filter(|name| !name.is_empty()).count(), unicode * 2);
    let cat = on(&["cat"], &["gpt.vmdk", "/ntfs/line\nend", "/xfs/-rf", "/btrfs/link"]).ok();
    assert!(cat.stdout == [&b"line\nend-rf"[..], &content("btrfs")].concat());
    let stat = on(&["stat", "--json"], &["gpt.qcow2", "/lvm/link", "/luks/deep/er/file.bin"]).ok().json();
    assert_eq!((&stat[0]["target"], &stat[1]["size"]), (&"deep/er/file.bin".into(), &300_000.into()));
    let tree = on(&["tree", "-L", "2"], &["gpt.raw", "/"]).ok().out();
    assert!(tree.contains("│   ├── line\\nend\n") && tree.contains("\\377\\376\n"), "{tree}");

    let _ =
        on(&["tar-out", "--exclude", "*.bin", "--exclude", "a b"], &["gpt.vmdk", "/btrfs", "btrfs.tar"]).ok();
    let listed = Cmd::new("tar").args(["tf", "btrfs.tar"]).dir(dir).ok().out();
    assert!(listed.contains("deep/er/\n") && !listed.contains(".bin") && !listed.contains("a b"), "{listed}");
    on(&["script"], &["gpt.qcow2", "-"]).fails(2).says(&["--key", "not supported"]);
    let plain = ["-m", "/dev/sda1", "-m", "/dev/sda3:/ext3", "-m", "/dev/sda4:/xfs", "-m", "/dev/sda7:/vfat"];
    let fish = |verb: &str, rest: &[&str], said: &str| {
        let cmd = fs.cmd(&[&[verb], &plain[..], rest].concat());
        cmd.stdin_bytes(said.into()).ok().out()
    };
    let said = fish("script", &["gpt.qcow2", "-"], "ls /xfs\ncat \"/ext3/a b\"\n");
    assert!(said.contains("deep\n") && said.trim_end().ends_with("a b"), "{said}");
    let said = fish("shell", &["gpt.vmdk"], "cat \"/vfat/it's\"\n");
    assert!(said.contains("it's"), "{said}");
}

/// The verbs that write, on qcow2 and once on VMDK.
fn changing(fs: &Fs, on: &dyn Fn(&[&str], &[&str]) -> Cmd) {
    let _ = on(&["rm"], &["gpt.vmdk", "/xfs/a b"]).ok();
    let image = "gpt.qcow2";
    on(&["put"], &[image, "--mode", "600", "key", "/vfat/x"]).fails(1).says(&["--mode", "vfat"]);
    let each = |path: &str| KINDS.iter().map(|kind| format!("/{}/{path}", kind.folder)).collect::<Vec<_>>();
    let with = |verb: &[&str], paths: &[String]| {
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        on(verb, &[&[image], &paths[..]].concat())
    };
    let _ = with(&["mkdir", "-p", "--mode", "700"], &each("new/below")).ok();
    let _ = with(&["rm", "-r"], &[each("deep"), each("a b")].concat()).ok();
    let _ = on(&["tar-in"], &[image, "btrfs.tar", "/xfs/new"]).ok();
    for file in ["/ntfs/it's", "/vfat/it's"] {
        let edit = on(&["edit", "--json", "-b", ".old"], &[image, file]).env("EDITOR", "sed -i s/it/THAT/");
        assert_eq!(edit.ok().json()["changed"], true);
    }
    let script = ["script", "--write", "-m", "/dev/sda5", image, "-"];
    let _ = fs.cmd(&script).stdin_bytes(b"write /written \"by a script\"\n".to_vec()).ok();

    fs.program(&["check", image]).ok().no_panic();
    let diff = on(&["diff", "--json", "--checksum"], &["gpt.raw", image, "/"]).fails(1).json();
    let change = |path: &str| {
        let found = diff.as_array().unwrap().iter().find(|change| change["path"] == path);
        found.map(|change| change["changes"][0].as_str().unwrap())
    };
    for path in each("new/below") {
        assert_eq!(change(&path), Some("added"), "{path}");
    }
    for path in [each("a b"), each("deep/er/file.bin")].concat() {
        assert_eq!(change(&path), Some("removed"), "{path}");
    }
    assert_eq!((change("/vfat/it's"), change("/vfat/-rf")), (Some("size"), None));
    let paths = ["/ntfs/it's", "/ntfs/it's.old", "/btrfs/written", "/xfs/new/it's"];
    let back = on(&["cat"], &[&[image], &paths[..]].concat()).ok();
    assert_eq!(back.out(), "THAT'sit'sby a scriptit's");
}
