//! create, resize, snapshot and amend under the program's own name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use diskmill_testkit::content::{Pattern, fill};
use diskmill_testkit::{Cmd, Outcome, scratch};

fn run(dir: &Path, line: &str) -> Outcome {
    Cmd::new(env!("CARGO_BIN_EXE_diskmill")).args(line.split(' ')).dir(dir).run()
}

fn ok(dir: &Path, line: &str) -> String {
    let done = run(dir, line);
    assert_eq!(done.code, Some(0), "diskmill {line}: {done}");
    done.out()
}

fn refused(dir: &Path, line: &str, code: i32, why: &str) {
    let done = run(dir, line);
    assert_eq!(done.code, Some(code), "diskmill {line}: {done}");
    assert!(done.err().contains(why), "diskmill {line}: {done}");
}

fn size(dir: &Path, image: &str) -> u64 {
    let info = ok(dir, &format!("info --output json {image}"));
    serde_json::from_str::<serde_json::Value>(&info).unwrap()["virtual-size"].as_u64().unwrap()
}

#[test]
fn images_are_created() {
    let dir = scratch();
    let dir = dir.path();
    assert_eq!(ok(dir, "create a.qcow2 40M"), "qcow2, 40 MiB (41943040 bytes)\n");
    refused(dir, "create a.qcow2 1M", 1, "--force replaces it");
    ok(dir, "create --force -q a.qcow2 20M");
    ok(dir, "create -b a.qcow2 b.qcow2");
    assert_eq!((size(dir, "a.qcow2"), size(dir, "b.qcow2")), (20 << 20, 20 << 20));
    ok(dir, "create -o subformat=monolithicFlat a.vmdk 1M");
    ok(dir, "create disk 1M");
    assert_eq!(std::fs::metadata(dir.join("disk")).unwrap().len(), 1 << 20);
    refused(dir, "create -b disk c.qcow2", 1, "say -F raw");
    ok(dir, "create -b disk -F raw c.qcow2");
    refused(dir, "create d.qcow2", 2, "size of the disk is missing");
    refused(dir, "create -b nothing d.qcow2", 1, "nothing");
    assert!(ok(dir, "create -f qcow2 -o help").contains("refcount_bits"));
    refused(dir, "create -f ova d.ova 1M", 1, "is not supported");
}

#[test]
fn files_beside_a_fresh_image_are_replaced_only_by_force() {
    let dir = scratch();
    let dir = dir.path();
    for (name, line) in [
        ("user.raw", "create -f qcow2 -o data_file=user.raw,data_file_raw=on a.qcow2 64M"),
        ("v-flat.vmdk", "create -f vmdk -o subformat=monolithicFlat v.vmdk 1M"),
        ("w-s002.vmdk", "create -f vmdk -o subformat=twoGbMaxExtentSparse w.vmdk 3G"),
    ] {
        let kept = || std::fs::read(dir.join(name)).unwrap() == b"keep";
        std::fs::write(dir.join(name), "keep").unwrap();
        refused(dir, line, 1, &format!("{name}\" exists: --force replaces it"));
        assert!(kept(), "{line}");
        ok(dir, &line.replace("create", "create --force"));
        assert!(!kept(), "{line}");
    }
    assert!(!dir.join("w-s003.vmdk").exists());
}

#[test]
fn an_ova_has_a_disk_with_bytes() {
    let dir = scratch();
    std::fs::write(dir.path().join("none.raw"), "").unwrap();
    refused(dir.path(), "convert -f raw -O ova none.raw none.ova", 1, "an OVA with a disk of no bytes");
    assert!(!dir.path().join("none.ova").exists());
    for format in ["vmdk", "vmdk -o subformat=streamOptimized", "vmdk -o subformat=monolithicFlat"] {
        ok(dir.path(), &format!("convert -f raw -O {format} none.raw none.vmdk"));
        ok(dir.path(), "convert -f vmdk -O raw none.vmdk back.raw");
    }
}

#[test]
fn disks_are_resized() {
    let dir = scratch();
    let dir = dir.path();
    ok(dir, "create a.qcow2 4M");
    assert_eq!(ok(dir, "resize a.qcow2 +4M"), "4 MiB -> 8 MiB (8388608 bytes)\n");
    refused(dir, "resize a.qcow2 -2M", 1, "--shrink allows that");
    ok(dir, "resize --shrink a.qcow2 -2M");
    ok(dir, "resize a.qcow2 -q 8M");
    assert_eq!(size(dir, "a.qcow2"), 8 << 20);
    refused(dir, "resize --shrink a.qcow2 -8M", 1, "no bytes would be left");
    refused(dir, "resize a.qcow2 9000001", 1, "multiples of 512");
    refused(dir, "resize --preallocation full --shrink a.qcow2 1M", 1, "disks that grow");
    ok(dir, "check a.qcow2");
}

#[test]
fn a_shrink_gives_up_packed_clusters() {
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("a.raw"), fill(Pattern::Text, 1, 4 << 20)).unwrap();
    ok(dir, "convert -c -O qcow2 a.raw a.qcow2");
    ok(dir, "resize --shrink a.qcow2 1M");
    // Exit code 3 would tell of leaks.
    ok(dir, "check a.qcow2");
}

#[test]
fn snapshots_are_taken_listed_applied_and_deleted() {
    let dir = scratch();
    let dir = dir.path();
    ok(dir, "create a.qcow2 4M");
    assert_eq!(ok(dir, "snapshot list a.qcow2"), "");
    assert_eq!(ok(dir, "snapshot create a.qcow2 first"), "snapshot 1 (first) taken\n");
    ok(dir, "snapshot -c second a.qcow2");
    let list = ok(dir, "snapshot list --output json a.qcow2");
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!((&list[0]["name"], &list[1]["id"]), (&"first".into(), &"2".into()));
    ok(dir, "resize a.qcow2 8M");
    ok(dir, "snapshot apply a.qcow2 1");
    assert_eq!(size(dir, "a.qcow2"), 4 << 20);
    ok(dir, "snapshot delete a.qcow2 snapshot.name=second");
    ok(dir, "snapshot -d first a.qcow2");
    assert_eq!(ok(dir, "snapshot -l a.qcow2"), "");
    refused(dir, "snapshot delete a.qcow2 first", 1, "has no snapshot");
    refused(dir, "snapshot", 2, "wants a command");
    ok(dir, "check a.qcow2");
}

#[test]
fn properties_are_amended() {
    let dir = scratch();
    let dir = dir.path();
    ok(dir, "create a.qcow2 4M");
    ok(dir, "amend -o compat=0.10 a.qcow2");
    refused(dir, "amend -o refcount_bits=8 a.qcow2", 1, "compat=1.1");
    ok(dir, "amend -o compat=1.1,refcount_bits=8,lazy_refcounts,size=8M a.qcow2");
    let info = ok(dir, "info a.qcow2");
    for fact in ["compat: 1.1", "refcount bits: 8", "lazy refcounts: true", "8 MiB"] {
        assert!(info.contains(fact), "{fact} in {info}");
    }
    refused(dir, "amend -o cluster_size=4k a.qcow2", 2, "is not supported");
    refused(dir, "amend -o backing_file=x a.qcow2", 2, "rebase");
    ok(dir, "check a.qcow2");
}
