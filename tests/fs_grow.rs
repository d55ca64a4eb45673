//! `diskmill fs grow` and `sparsify` on every file system that can grow.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[allow(dead_code, reason = "not every test needs all of it")]
#[path = "support/guestfs.rs"]
mod guestfs;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;

use diskmill_testkit::scratch;
use guestfs::Fs;

/// Name of the image, its table, its size in MiB, the file system on its only partition, and what of that and the tables
/// is not for files, in MiB at most.
const DISKS: [(&str, &str, u64, &str, u64); 4] = [
    ("xfs", "gpt", 340, "xfs", 68),
    ("btrfs", "mbr", 200, "btrfs", 24),
    ("ntfs", "gpt", 80, "ntfs", 24),
    ("lvm", "mbr", 80, "ext4", 24),
];

#[test]
fn file_systems_grow_and_give_back() {
    let dir = scratch();
    let dir = dir.path();
    let Some(fs) = Fs::new(dir) else { return };
    let image = |name: &str| format!("{name}.raw");
    for (name, _, mib, ..) in DISKS {
        File::create(dir.join(image(name))).unwrap().set_len(mib << 20).unwrap();
    }
    let images = DISKS.map(|(name, ..)| image(name));
    let images: Vec<&str> = images.iter().map(String::as_str).chain(["fat.raw"]).collect();
    File::create(dir.join("fat.raw")).unwrap().set_len(40 << 20).unwrap();
    let mut maker = fs.maker(&images);
    maker.run("part-disk /dev/sde mbr");
    maker.run("mkfs vfat /dev/sde1");
    for ((name, table, _, content, _), letter) in DISKS.into_iter().zip(["a", "b", "c", "d"]) {
        let disk = format!("/dev/sd{letter}");
        maker.run(&format!("part-disk {disk} {table}"));
        let mut device = format!("{disk}1");
        if name == "lvm" {
            maker.run(&format!("pvcreate {device}"));
            maker.run(&format!("vgcreate vg {device}"));
            maker.run("lvcreate-free lv vg 100");
            device = "/dev/vg/lv".to_owned();
        }
        maker.run(&format!("mkfs {content} {device}"));
        maker.run(&format!("mount {device} /"));
        maker.upload(name.as_bytes(), "/kept");
        // Blocks that are written and free afterwards.
        maker.run("fill 7 16777216 /junk");
        maker.run("sync");
        maker.run("rm /junk");
        maker.run("umount /");
    }
    maker.close();

    let _ = fs.program(&["convert", "-O", "qcow2", "xfs.raw", "xfs.qcow2"]).ok();
    let images = ["xfs.qcow2", "btrfs.raw", "ntfs.raw", "lvm.raw"];
    // Their sessions serve what follows.
    let growing = images.map(|image| fs.cmd(&["grow", "--keep", "--json", image, "+64M"]).spawn());
    for ((.., mib, _, _), growing) in DISKS.into_iter().zip(growing) {
        let grown = growing.wait().expect_code(0).json();
        assert_eq!(
            (&grown["size-before"], &grown["size"]),
            (&(mib << 20).into(), &((mib + 64) << 20).into())
        );
    }
    let found = fs.ok(&[&["df", "--json"], &images[..]].concat()).json();
    for (n, (name, _, mib, _, lost)) in DISKS.into_iter().enumerate() {
        let size = found[n]["filesystems"][0]["usage"]["size"].as_u64().unwrap();
        assert!(size > (mib + 64 - lost) << 20, "{name}: {size}");
    }
    assert_eq!(fs.ok(&["cat", "-q", "xfs.qcow2", "/kept"]).out(), "xfs");
    fs.stop();
    fs.cmd(&["grow", "fat.raw", "+8M"]).fails(1).says(&[
        "vfat on /dev/sda1",
        "not supported",
        "grown: /dev/sda1",
    ]);
    fs.cmd(&["grow", "ntfs.raw", "1M"]).fails(2).says(&["shrinking", "not supported"]);

    let blocks = |name: &str| fs::metadata(dir.join(name)).unwrap().blocks() * 512;
    let before = blocks("lvm.raw");
    let _ = fs.ok(&["sparsify", "-q", "lvm.raw", "-O", "qcow2", "copy.qcow2"]);
    assert!(blocks("copy.qcow2") + (15 << 20) < before && blocks("lvm.raw") == before);
    let sparse = fs.ok(&["sparsify", "--json", "--in-place", "btrfs.raw"]).json();
    assert_eq!(sparse["allocated"], blocks("btrfs.raw"));
    assert!(
        sparse["allocated"].as_u64().unwrap() + (15 << 20) < sparse["allocated-before"].as_u64().unwrap()
    );
    assert_eq!(fs.ok(&["cat", "-q", "copy.qcow2", "/kept"]).out(), "lvm");
}
