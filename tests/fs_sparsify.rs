//! `diskmill fs sparsify` on every format that is written to: what is free goes back to the host, what is used stays.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[allow(dead_code, reason = "not every test needs all of it")]
#[path = "support/guestfs.rs"]
mod guestfs;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use diskmill_testkit::{Cmd, scratch};
use guestfs::Fs;

const MIB: u64 = 1 << 20;
/// Where the partitions begin: ext4, swap, LVM.
const STARTS: [u64; 3] = [MIB, 49 * MIB, 65 * MIB];
/// Bytes that nobody needs in each of the three.
const GARBAGE: usize = 12 << 20;

fn blocks(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// Bytes that no block of zeros is among.
fn garbage() -> Vec<u8> {
    (0..GARBAGE as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8 | 1).collect()
}

/// Makes `disk.raw` with what is used and what is not.
fn make(fs: &Fs, dir: &Path) {
    File::create(dir.join("disk.raw")).unwrap().set_len(96 * MIB).unwrap();
    let mut maker = fs.maker(&["disk.raw"]);
    maker.run("part-init /dev/sda gpt");
    for (start, end) in [(2048, 100_351), (100_352, 133_119), (133_120, 194_559)] {
        maker.run(&format!("part-add /dev/sda p {start} {end}"));
    }
    maker.run("pvcreate /dev/sda3");
    maker.run("vgcreate vg /dev/sda3");
    maker.run("lvcreate used vg 8");
    maker.run("lvcreate gone vg 16");
    let garbage = garbage();
    maker.upload(&garbage, "/dev/vg/gone");
    maker.run("lvremove /dev/vg/gone");
    maker.upload(&garbage, "/dev/sda2");
    maker.run("mkswap /dev/sda2 label:spare");
    for device in ["/dev/vg/used", "/dev/sda1"] {
        maker.run(&format!("mkfs ext4 {device}"));
        maker.run(&format!("mount {device} /"));
        maker.upload(device.as_bytes(), "/kept");
        if device == "/dev/sda1" {
            maker.upload(&garbage, "/gone");
            maker.run("sync");
            maker.run("rm /gone");
        }
        maker.run("umount /");
    }
    maker.close();
}

/// Whether the raw image at `path` has all that is used.
fn assert_sound(dir: &Path, swap: &[u8]) {
    let image = format!("back.raw?offset={}", STARTS[0]);
    let _ = Cmd::new("e2fsck").args(["-fn", &image]).dir(dir).ok();
    let cat = Cmd::new("debugfs").args(["-R", "cat /kept", &image]).dir(dir).ok().out();
    assert_eq!(cat, "/dev/sda1");
    assert!(swap_header(dir, "back.raw") == swap);
}

fn swap_header(dir: &Path, name: &str) -> Vec<u8> {
    let mut header = vec![0; 4096];
    File::open(dir.join(name)).unwrap().read_exact_at(&mut header, STARTS[1]).unwrap();
    assert!(header.ends_with(b"SWAPSPACE2"));
    header
}

#[test]
fn what_is_free_goes_back() {
    let dir = scratch();
    let dir = dir.path();
    let Some(fs) = Fs::new(dir) else { return };
    make(&fs, dir);
    let swap = swap_header(dir, "disk.raw");
    fs::write(dir.join("key"), "secret").unwrap();
    let luks = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let encrypted = ["--object", "secret,id=key,file=key", "-o", luks];
    let plain: (&[&str], &[&str]) = (&[], &[]);
    for (options, key) in [plain, (&encrypted, &["--key-file", "key"])] {
        let name = "sparse.qcow2";
        let words = [&["convert", "-O", "qcow2"], options, &["disk.raw", name]].concat();
        let _ = fs.program(&words).ok();
        let before = blocks(&dir.join(name));
        let said = fs.ok(&[&["sparsify", "--json", "--in-place"], key, &[name]].concat()).json();
        assert_eq!(said["trimmed"].to_string(), r#"["/dev/sda1","/dev/sda2","/dev/vg/used","vg"]"#);
        let after = blocks(&dir.join(name));
        assert_eq!((&said["allocated-before"], &said["allocated"]), (&before.into(), &after.into()));
        let freed = before.saturating_sub(after);
        assert!(freed > 3 * GARBAGE as u64 - MIB, "{name}: {before} bytes, then {after}");
        let _ = fs.program(&[&["check"], key, &[name]].concat()).ok();
        let _ = fs.program(&[&["convert", "-O", "raw"], key, &[name, "back.raw"]].concat()).ok();
        assert_sound(dir, &swap);
    }

    // The copy is a VMDK with all that is free, at first.
    let words = ["sparsify", "--json", "disk.raw", "-O", "vmdk", "copy.vmdk"];
    let said = fs.ok(&words).json();
    assert!(blocks(&dir.join("copy.vmdk")) < 12 * MIB, "{said}");
    let _ = fs.program(&["check", "copy.vmdk"]).ok();
    let _ = Cmd::new("qemu-img").args(["convert", "-O", "raw", "copy.vmdk", "back.raw"]).dir(dir).ok();
    assert_sound(dir, &swap);

    // A copy of an encrypted image is plain, which its owner must hear of.
    let words = ["sparsify", "--key-file", "key", "sparse.qcow2", "-O", "raw", "back.raw", "--force"];
    let said = fs.ok(&words);
    said.says(&["is encrypted, its copy is not"]);
    assert_sound(dir, &swap);
    fs.cmd(&["sparsify", "--keep", "disk.raw", "copy"]).fails(2).says(&["--in-place"]);
}
