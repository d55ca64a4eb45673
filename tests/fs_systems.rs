//! `diskmill fs` on every file system, table and volume manager, in one image that libguestfs makes; and names and bytes
//! that go in and come out unchanged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[allow(dead_code, reason = "not every test needs all of it")]
#[path = "support/guestfs.rs"]
mod guestfs;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
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

    let put = fs.ok(&["put", "--keep", "--json", "--owner", "12:34", "disk.raw", "tree", "big", "/"]).json();
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

/// The bytes in front of the data of a LUKS2 volume, as cryptsetup makes it.
const LUKS_HEADER: usize = 16 << 20;

/// Makes `gpt.raw` and `mbr.raw`; the name under which the LUKS volume appears when it is open.
fn make(fs: &Fs, dir: &Path) -> String {
    let size = PARTS.iter().sum::<u64>() + 2;
    for (name, mib) in [("gpt.raw", size), ("mbr.raw", 64)] {
        File::create(dir.join(name)).unwrap().set_len(mib << 20).unwrap();
    }
    let luks = format_luks(dir, size - 1 - PARTS[8]);
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

/// Makes a LUKS volume at `start` MiB of `gpt.raw`, by the rules of LUKS2, whose passphrase costs an emulated processor
/// little; the name under which it appears when it is open.
fn format_luks(dir: &Path, start: u64) -> String {
    File::create(dir.join("luks.img")).unwrap().set_len(PARTS[8] << 20).unwrap();
    let cheap = ["--pbkdf", "argon2id", "--pbkdf-memory", "64", "--pbkdf-force-iterations", "4"];
    let format = Cmd::new("cryptsetup").args(["luksFormat", "-q", "--type", "luks2", "--key-file", "-"]);
    let _ = format.args(cheap).arg("luks.img").stdin_bytes(b"secret".to_vec()).dir(dir).ok();
    let disk = OpenOptions::new().write(true).open(dir.join("gpt.raw")).unwrap();
    disk.write_all_at(&fs::read(dir.join("luks.img")).unwrap()[..LUKS_HEADER], start << 20).unwrap();
    let uuid = Cmd::new("cryptsetup").args(["luksUUID", "luks.img"]).dir(dir).ok().out();
    format!("/dev/mapper/luks-{}", uuid.trim())
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

/// What opens the LUKS volume.
const KEY: [&str; 2] = ["--key", "/dev/sda9:file:key"];

/// Everything of `gpt.*` mounted.
fn mounts(luks: &str) -> Vec<String> {
    let mut words = vec!["-m".to_owned(), "/dev/sda1".to_owned()];
    for kind in &KINDS {
        let device = if kind.device.is_empty() { luks } else { kind.device };
        words.extend(["-m".to_owned(), format!("{device}:/{}", kind.folder)]);
    }
    words
}

/// The formats in which the disk is read and written.
const FORMATS: [&str; 3] = ["raw", "qcow2", "vmdk"];

#[test]
fn every_file_system_and_format() {
    let dir = scratch();
    let dir = dir.path();
    let Some(fs) = Fs::new(dir) else { return };
    let t0 = std::time::Instant::now();
    let luks = make(&fs, dir);
    eprintln!("TRACE make {:?}", t0.elapsed());
    make_trees(dir);
    fs::write(dir.join("key"), "secret").unwrap();
    let mounts = mounts(&luks);
    let on = |verb: &[&str], rest: &[&str]| fs.cmd(verb).args(&mounts).args(rest);

    // Folders into folders that exist: beside each other on eight file systems.
    let trees = KINDS.map(|kind| kind.folder);
    let put = on(&["put", "--json"], &[&KEY[..], &["gpt.raw"], &trees[..], &["/"]].concat()).ok();
    put.says(&["vfat", "owners"]);
    let put = put.json();
    assert_eq!((&put["links"], &put["owners-kept"]), (&6.into(), &false.into()), "{put}");

    // The same disk in every format, and each is read through our server.
    for format in ["qcow2", "vmdk"] {
        let target = format!("gpt.{format}");
        let _ = fs.program(&["convert", "-O", format, "gpt.raw", &target]).ok();
    }
    let images = FORMATS.map(|format| format!("gpt.{format}"));
    list_tells_all(&fs, images.each_ref().map(String::as_str), &luks);
    for image in &images {
        looking(&on, image, dir);
    }
    fs.stop();
    other_tables(&fs, dir);
    scripts(&fs, &on);

    let _ = fs.program(&["convert", "-O", "raw", "gpt.raw", "new.raw"]).ok();
    changing(&fs, &mounts, &on);
}

/// `list` and `df`, on several images at once, whose sessions are kept.
fn list_tells_all(fs: &Fs, images: [&str; 3], luks: &str) {
    let list = ["list", "--json", "--jobs", "2", "--keep"];
    let listed = fs.ok(&[&list[..], &KEY, &images].concat()).json();
    let used = fs.ok(&[&["df", "--json"], &KEY[..], &images].concat()).json();
    for (n, name) in images.into_iter().enumerate() {
        assert_eq!((&listed[n]["image"], &used[n]["image"]), (&name.into(), &name.into()));
        let devices = listed[n]["devices"].as_array().unwrap();
        let device = |name: &str| devices.iter().find(|device| device["name"] == name).expect(name);
        let systems = used[n]["filesystems"].as_array().unwrap();
        for kind in &KINDS {
            let name = if kind.device.is_empty() { luks } else { kind.device };
            let found = device(name);
            assert_eq!(found["content"], kind.content, "{found}");
            assert!(found["usage"]["used"].as_u64().is_some(), "{found}");
            let system = systems.iter().find(|system| system["name"] == name).expect(name);
            assert_eq!(system["usage"]["size"], found["usage"]["size"], "{system}");
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
}

/// The verbs that read, in a session that is kept: its LUKS volume is open.
fn looking(on: &dyn Fn(&[&str], &[&str]) -> Cmd, image: &str, dir: &Path) {
    let names_in = |folder: &str, json: &serde_json::Value| {
        let prefix = format!("/{folder}/");
        json.as_array().unwrap().iter().filter(|e| e["path"].as_str().unwrap().starts_with(&prefix)).count()
    };
    let found = on(&["ls", "-R", "--json"], &[image, "/"]).ok().json();
    for kind in &KINDS {
        // The names, two folders, the file in them, a link; what mkfs made.
        let made = names(kind.names).len() + 3 + usize::from(kind.names == Names::Unix);
        let extra = usize::from(kind.content.starts_with("ext"));
        assert_eq!(names_in(kind.folder, &found), made + extra, "{image}: {}", kind.folder);
    }
    let found = on(&["find", "-0", "--type", "f", "--name", "*[\n\"]*"], &[image, "/"]).ok();
    let unicode = KINDS.iter().filter(|kind| kind.names != Names::Dos).count();
    assert_eq!(found.stdout.split(|&b| b == 0).filter(|name| !name.is_empty()).count(), unicode * 2);
    let cat = on(&["cat"], &[image, "/ntfs/line\nend", "/xfs/-rf", "/btrfs/link"]).ok();
    assert!(cat.stdout == [&b"line\nend-rf"[..], &content("btrfs")].concat());
    let stat = on(&["stat", "--json"], &[image, "/lvm/link", "/luks/deep/er/file.bin"]).ok().json();
    assert_eq!((&stat[0]["target"], &stat[1]["size"]), (&"deep/er/file.bin".into(), &300_000.into()));
    let tree = on(&["tree", "-L", "2"], &[image, "/"]).ok().out();
    assert!(tree.contains("│   ├── line\\nend\n") && tree.contains("\\377\\376\n"), "{tree}");

    let archive = format!("{image}.tar");
    let _ = on(&["tar-out", "--exclude", "*.bin", "--exclude", "a b"], &[image, "/btrfs", &archive]).ok();
    let listed = Cmd::new("tar").args(["tf", &archive]).dir(dir).ok().out();
    assert!(listed.contains("deep/er/\n") && !listed.contains(".bin") && !listed.contains("a b"), "{listed}");

    let back = format!("back.{image}");
    fs::create_dir(dir.join(&back)).unwrap();
    let folders = KINDS.map(|kind| format!("/{}", kind.folder));
    let _ =
        on(&["get", "-q"], &[&[image], &folders.each_ref().map(String::as_str)[..], &[&back]].concat()).ok();
    for kind in &KINDS {
        let (tree, back) = (dir.join(kind.folder), dir.join(&back).join(kind.folder));
        // What mkfs makes is no part of the tree.
        let _ = fs::remove_dir_all(back.join("lost+found"));
        same_tree(&tree, &back, kind.names);
    }
}

/// MBR with a logical partition, and a disc without a table.
fn other_tables(fs: &Fs, dir: &Path) {
    let disc = require_program("genisoimage").map(|program| {
        let words = ["-quiet", "-R", "-J", "-V", "DISC", "-o", "disc.iso", "ext2"];
        let _ = Cmd::new(program).args(words).dir(dir).ok();
        "disc.iso"
    });
    let words = ["df", "--json", "--keep", "--jobs", "2", "mbr.raw"];
    let found = fs.ok(&[&words[..], disc.as_slice()].concat()).json();
    let name = |image: usize, n: usize| found[image]["filesystems"][n]["name"].clone();
    assert_eq!((name(0, 0), name(0, 1)), ("/dev/sda1".into(), "/dev/sda5".into()), "{found}");
    assert_eq!(found[0]["filesystems"][1]["label"], "DATA");
    if let Some(disc) = disc {
        assert_eq!((name(1, 0), &found[1]["filesystems"][0]["label"]), ("/dev/sda".into(), &"DISC".into()));
        let _ = fs.ok(&["get", "-q", disc, "/", "back.iso"]);
        same_tree(&dir.join("ext2"), &dir.join("back.iso"), Names::Unix);
    }
    fs.stop();
}

/// `script` and `shell`, which have an appliance of their own.
fn scripts(fs: &Fs, on: &dyn Fn(&[&str], &[&str]) -> Cmd) {
    on(&["script"], &[&KEY[..], &["gpt.qcow2", "-"]].concat()).fails(2).says(&["--key", "not supported"]);
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

/// The verbs that write, on every format in a session that is kept; afterwards all have the same files.
fn changing(fs: &Fs, mounts: &[String], on: &dyn Fn(&[&str], &[&str]) -> Cmd) {
    let images = ["new.raw", "gpt.qcow2", "gpt.vmdk"];
    let start = |image: &str| {
        let start = fs.program(&["session", "start", "-q", "-w"]);
        start.args(KEY).args(mounts).arg(image).spawn()
    };
    for starting in images.map(start) {
        let _ = starting.wait().expect_code(0);
    }
    let each = |path: &str| KINDS.iter().map(|kind| format!("/{}/{path}", kind.folder)).collect::<Vec<_>>();
    for image in images {
        on(&["put"], &[image, "--mode", "600", "key", "/vfat/x"]).fails(1).says(&["--mode", "vfat"]);
        let with = |verb: &[&str], paths: &[String]| {
            let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
            on(verb, &[&[image], &paths[..]].concat())
        };
        let _ = with(&["mkdir", "-p", "--mode", "700"], &each("new/below")).ok();
        let _ = with(&["rm", "-r"], &[each("deep"), each("a b")].concat()).ok();
        let _ = on(&["tar-in"], &[image, "gpt.vmdk.tar", "/xfs/new"]).ok();
        let _ = on(&["put"], &[image, "key", "/luks/put"]).ok();
        for file in ["/ntfs/it's", "/vfat/it's"] {
            let edit =
                on(&["edit", "--json", "-b", ".old"], &[image, file]).env("EDITOR", "sed -i s/it/THAT/");
            assert_eq!(edit.ok().json()["changed"], true);
        }
    }
    fs.stop();
    let script = ["script", "--write", "--no-mount", "gpt.qcow2", "-"];
    let said = b"run\nmount /dev/sda5 /\nwrite /written \"by a script\"\n".to_vec();
    let _ = fs.cmd(&script).stdin_bytes(said).ok();
    for image in &images[1..] {
        fs.program(&["check", image]).ok().no_panic();
    }

    // One boot for what was written raw, and one for each disk that it is compared with.
    let diff = |other: &str, code: i32| {
        let run = on(&["diff", "--json", "--checksum", "--keep"], &[&KEY[..], &["new.raw", other]].concat());
        run.run().expect_code(code).json().as_array().unwrap().clone()
    };
    let before = diff("gpt.raw", 1);
    let change = |path: &str| {
        let found = before.iter().find(|change| change["path"] == path);
        found.map(|change| change["changes"][0].as_str().unwrap())
    };
    for path in each("new/below") {
        assert_eq!(change(&path), Some("removed"), "{path}");
    }
    for path in [each("a b"), each("deep/er/file.bin")].concat() {
        assert_eq!(change(&path), Some("added"), "{path}");
    }
    assert_eq!((change("/vfat/it's"), change("/vfat/-rf")), (Some("size"), None));
    assert!(diff("gpt.vmdk", 0).is_empty());
    let script = diff("gpt.qcow2", 1);
    assert_eq!((script.len(), &script[0]["path"]), (1, &"/btrfs/written".into()), "{script:?}");
    let paths = ["/ntfs/it's", "/ntfs/it's.old", "/luks/put", "/xfs/new/it's"];
    let back = on(&["cat"], &[&["new.raw"], &paths[..]].concat()).ok();
    assert_eq!(back.out(), "THAT'sit'ssecretit's");
}
