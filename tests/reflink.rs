//! Blocks shared between source and target, on file systems that can (needs root, for mounting).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use diskmill_testkit::content::{Pattern, fill};
use diskmill_testkit::{
    Mounted, Oracle, Tool, parallel, require_program, same_content, scratch, sha256_file,
};
use serde_json::Value;

const MIB: usize = 1 << 20;
const SIZE: u64 = 320 << 20;
/// Format, options and the file with the guest's data, for a name.
const KINDS: [(&str, &str, &str, &str); 4] = [
    ("raw", "raw", "", ""),
    ("qcow2", "qcow2", "", ""),
    ("flat", "vmdk", "subformat=monolithicFlat", "-flat.vmdk"),
    ("sparse", "vmdk", "subformat=monolithicSparse", ""),
];

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

fn file_systems() -> impl Iterator<Item = Mounted> {
    ["xfs", "btrfs"].into_iter().filter_map(|kind| Mounted::fresh(kind, SIZE))
}

/// Data, zeros inside data, a hole, and an end inside a cluster and inside a block: 9 MiB and three sectors.
fn content() -> Vec<u8> {
    let mut bytes = fill(Pattern::Random, 1, 3 * MIB);
    bytes.extend(vec![0; 2 * MIB]);
    bytes.extend(fill(Pattern::Text, 2, 4 * MIB + 1536));
    bytes[MIB..MIB + 128 * 1024].fill(0);
    bytes
}

/// Writes `bytes`, with a hole where there are 2 MiB of zeros.
fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (chunk, at) in bytes.chunks(MIB).zip((0..).step_by(MIB)) {
        if chunk.iter().any(|&byte| byte != 0) {
            file.write_all_at(chunk, at).unwrap();
        }
    }
}

/// Converts and gives the report.
fn convert(dir: &Path, args: &[&str]) -> Value {
    diskmill().cmd(["convert", "--json"]).args(args).dir(dir).ok().json()
}

fn number(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("no {key} in {report}"))
}

fn name(kind: &str, by: &str) -> String {
    format!("{kind}-{by}.{}", if kind == "flat" || kind == "sparse" { "vmdk" } else { kind })
}

/// The file of the image `name` that holds the guest's data.
fn data_file(name: &str, suffix: &str) -> String {
    if suffix.is_empty() { name.to_owned() } else { name.replace(".vmdk", suffix) }
}

fn is_shared(path: &Path) -> Option<bool> {
    let filefrag = require_program("filefrag")?;
    let out = diskmill_testkit::Cmd::new(filefrag).arg("-v").arg(path).ok().out();
    Some(out.contains("shared"))
}

#[test]
fn every_pair_shares_its_blocks() {
    let content = content();
    for mounted in file_systems() {
        let dir = &mounted.path();
        let Some(q) = Oracle::find(dir) else { return };
        write_sparse(&dir.join("first.raw"), &content);
        for (kind, format, options, suffix) in KINDS {
            let source = name(kind, "source");
            let mut args = vec!["-f", "raw", "-O", format];
            if !options.is_empty() {
                args.extend(["-o", options]);
            }
            args.extend(["--reflink=never", "first.raw", &source]);
            assert_eq!(number(&convert(dir, &args), "bytes-cloned"), 0);
            let source_file = dir.join(data_file(&source, suffix));
            let before = sha256_file(&source_file);
            let used = mounted.used();
            for (target_kind, target_format, options, suffix) in KINDS {
                let target = name(target_kind, &format!("from-{kind}"));
                let mut args = vec!["-f", format, "-O", target_format];
                if !options.is_empty() {
                    args.extend(["-o", options]);
                }
                args.extend([source.as_str(), target.as_str()]);
                let report = convert(dir, &args);
                // Of 7 MiB, zero clusters may be left out by the source; the end is copied.
                let cloned = number(&report, "bytes-cloned");
                assert!(cloned >= 6 << 20, "{source} → {target}: {report}");
                assert!(number(&report, "bytes-read") < 128 << 10, "{report}");
                assert!(number(&report, "bytes-written") < 2 << 20, "{report}");
                assert!(q.content(&target, target_format) == content, "{source} → {target}");
                if target_format == "qcow2" {
                    q.check_clean(&target);
                }
                // XFS gives the blocks of removed files back a while later.
                assert!(mounted.used().saturating_sub(used) < 3 << 20, "{source} → {target} takes space");
                let target_file = dir.join(data_file(&target, suffix));
                assert_ne!(is_shared(&target_file), Some(false), "{target_file:?}");
                // Whoever writes to the one does not change the other.
                let len = fs::metadata(&target_file).unwrap().len();
                let file = File::options().write(true).open(&target_file).unwrap();
                file.write_all_at(&vec![0x55; len as usize], 0).unwrap();
                file.sync_all().unwrap();
                assert_eq!(sha256_file(&source_file), before, "{source} was changed through {target}");
                fs::remove_file(&target_file).unwrap();
            }
        }
    }
}

#[test]
fn the_options_decide() {
    let content = content();
    for mounted in file_systems() {
        let dir = &mounted.path();
        write_sparse(&dir.join("in.raw"), &content);
        let cloned = |more: &[&str]| {
            let report = convert(dir, &[&["-f", "raw", "-O", "qcow2"], more, &["in.raw", "out"]].concat());
            (number(&report, "bytes-cloned") > 0, number(&report, "bytes-zero"))
        };
        let (hole, all_zeros) = (2 << 20, (2 << 20) + (128 << 10));
        assert_eq!(cloned(&[]), (true, hole));
        assert_eq!(cloned(&["--reflink=auto", "-S", "4k"]), (true, hole));
        assert_eq!(cloned(&["-C"]), (true, hole));
        assert_eq!(cloned(&["--reflink=never"]), (false, all_zeros));
        assert_eq!(cloned(&["-S", "4k"]), (false, all_zeros));
        assert!(!cloned(&["-S", "0"]).0);
        assert_eq!(cloned(&["--salvage"]), (false, all_zeros));
        assert!(!cloned(&["-o", "preallocation=falloc"]).0);
        assert!(!cloned(&["-c"]).0);
        // Clusters smaller than a block lie inside blocks.
        assert_eq!(cloned(&["-o", "cluster_size=512"]), (false, all_zeros));
        assert_eq!(cloned(&["-o", "cluster_size=4k"]), (true, hole));
        assert!(cloned(&["-o", "cluster_size=2M"]).0);
        assert_eq!(cloned(&["-o", "extended_l2=on"]), (true, hole));
        assert_eq!(cloned(&["-o", "data_file=out.data"]), (true, hole));
        assert_eq!(cloned(&["--direct"]), (true, hole));
        let always = |more: &[&str]| {
            let cmd = diskmill().cmd(["convert", "--reflink=always", "-f", "raw", "-O", "qcow2"]);
            cmd.args(more).args(["in.raw", "other"]).dir(dir).fails(2)
        };
        always(&["-c"]).says(&["reflink=always", "compression"]);
        always(&["-S", "0"]).says(&["reflink=always", "sparse size"]);
    }
}

#[test]
fn without_a_common_file_system_the_bytes_are_copied() {
    let Some(mounted) = Mounted::fresh("xfs", SIZE) else { return };
    let (inside, outside) = (mounted.path(), scratch());
    let content = content();
    write_sparse(&inside.join("in.raw"), &content);
    let source = inside.join("in.raw");
    let source = source.to_str().unwrap();
    for more in [&[][..], &["-C"]] {
        let report =
            convert(outside.path(), &[&["-f", "raw", "-O", "raw"], more, &[source, "out.raw"]].concat());
        assert_eq!(number(&report, "bytes-cloned"), 0);
        same_content(&outside.path().join("out.raw"), &content);
    }
    let cmd = diskmill().cmd(["convert", "--reflink=always", "-f", "raw", "-O", "raw", source, "no.raw"]);
    cmd.dir(outside.path()).fails(1).says(&["cannot share blocks", "in.raw", "reflink=auto"]);
    assert!(!outside.path().join("no.raw").exists());
}

#[test]
fn the_kernel_copies_where_it_is_told_to() {
    let dir = scratch();
    let dir = dir.path();
    let content = content();
    write_sparse(&dir.join("in.raw"), &content);
    let report = convert(dir, &["-C", "--reflink=never", "-f", "raw", "-O", "raw", "in.raw", "out.raw"]);
    // Not on every file system; on none does it lose a byte or fill a hole.
    let (copied, read) = (number(&report, "bytes-copied-in-kernel"), number(&report, "bytes-read"));
    assert!(copied > 6 << 20 || read > 6 << 20, "{report}");
    same_content(&dir.join("out.raw"), &content);
    assert!(fs::metadata(dir.join("out.raw")).unwrap().blocks() * 512 < 8 << 20, "the hole was filled");
    for with in [&["-S", "4k"][..], &["-c", "-O", "qcow2"]] {
        let cmd = diskmill().cmd(["convert", "-C", "-f", "raw"]).args(with).args(["in.raw", "x"]).dir(dir);
        cmd.fails(2).says(&["Cannot enable copy offloading"]);
    }
}

#[test]
fn chains_snapshots_and_several_sources() {
    for mounted in file_systems() {
        let dir = &mounted.path();
        let Some(q) = Oracle::find(dir) else { return };
        let size = 8 << 20;
        q.create("base.qcow2", "", size);
        for cmd in ["write -P 1 0 3M", "write -P 2 4M 1M"] {
            q.io(["-f", "qcow2", "-c", cmd, "base.qcow2"]).ok();
        }
        q.create_over("top.qcow2", "", size, ("base.qcow2", "qcow2"));
        // Inside a cluster, over part of the base, and a discarded run.
        let writes = ["write -P 3 1000k 200k", "write -P 4 6M 1M", "write -z 2M 300k"];
        for cmd in writes {
            q.io(["-f", "qcow2", "-c", cmd, "top.qcow2"]).ok();
        }
        q.snapshot("top.qcow2", "before");
        let before = q.content("top.qcow2", "qcow2");
        q.io(["-f", "qcow2", "-c", "write -P 5 0 2M", "top.qcow2"]).ok();
        for (target, options) in [("qcow2", &[][..]), ("raw", &[]), ("vmdk", &["-o", "zeroed_grain=on"])] {
            let base = ["-f", "qcow2", "-O", target];
            let report = convert(dir, &[&base, options, &["top.qcow2", "flat"]].concat());
            assert!(number(&report, "bytes-cloned") > 3 << 20, "{report}");
            q.identical(("qcow2", "top.qcow2"), (target, "flat"));
            let report = convert(dir, &[&base, options, &["-l", "before", "top.qcow2", "old"]].concat());
            assert!(number(&report, "bytes-cloned") > 3 << 20, "{report}");
            assert!(q.content("old", target) == before);
        }
        let overlay = ["-f", "qcow2", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2"];
        let report = convert(dir, &[&overlay[..], &["top.qcow2", "overlay.qcow2"]].concat());
        assert!(number(&report, "bytes-cloned") > 2 << 20, "{report}");
        q.identical(("qcow2", "top.qcow2"), ("qcow2", "overlay.qcow2"));
        q.check_clean("overlay.qcow2");
        // The second source begins inside a cluster and a block of the target.
        fs::write(dir.join("odd.raw"), fill(Pattern::Random, 9, MIB + 512)).unwrap();
        fs::write(dir.join("even.raw"), fill(Pattern::Random, 10, MIB)).unwrap();
        convert(dir, &["-f", "raw", "-O", "qcow2", "odd.raw", "even.raw", "odd.raw", "joined.qcow2"]);
        let parts = ["odd.raw", "even.raw", "odd.raw"].map(|part| fs::read(dir.join(part)).unwrap());
        assert!(q.content("joined.qcow2", "qcow2") == parts.concat());
        q.check_clean("joined.qcow2");
    }
}

#[test]
fn misaligned_sources_are_read() {
    for mounted in file_systems() {
        let dir = &mounted.path();
        let Some(q) = Oracle::find(dir) else { return };
        let content = fill(Pattern::Text, 3, 4 * MIB);
        // The data begins at the first sector of its file.
        fs::write(dir.join("flat.bin"), [&[7; 512][..], &content].concat()).unwrap();
        let descriptor = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n\
            createType=\"monolithicFlat\"\nRW 8192 FLAT \"flat.bin\" 1\n";
        fs::write(dir.join("in.vmdk"), descriptor).unwrap();
        fs::write(dir.join("in.raw"), &content).unwrap();
        for target in ["raw", "qcow2"] {
            let report = convert(dir, &["-f", "vmdk", "-O", target, "in.vmdk", "out"]);
            assert_eq!(number(&report, "bytes-cloned"), 0);
            assert!(q.content("out", target) == content);
        }
        // QEMU's own images, whatever their alignment.
        let makes: [(&str, &[&str]); 4] = [
            ("qcow2", &["-o", "cluster_size=512"]),
            ("qcow2", &["-o", "cluster_size=4k"]),
            ("vmdk", &[]),
            ("vmdk", &["-o", "subformat=twoGbMaxExtentSparse"]),
        ];
        for (format, options) in makes {
            let cmd = q.img(["convert", "-f", "raw", "-O", format]).args(options);
            cmd.args(["in.raw", "made"]).ok();
            for target in ["raw", "qcow2"] {
                convert(dir, &["-f", format, "-O", target, "made", "out"]);
                assert!(q.content("out", target) == content, "{format} {options:?} → {target}");
            }
        }
    }
}

#[test]
fn holes_inside_clusters_stay_holes() {
    for mounted in file_systems() {
        let dir = &mounted.path();
        let Some(q) = Oracle::find(dir) else { return };
        q.create("in.qcow2", "preallocation=metadata", 64 << 20);
        q.io(["-f", "qcow2", "-c", "write -P 1 8M 1M", "in.qcow2"]).ok();
        for target in ["raw", "qcow2"] {
            convert(dir, &["-f", "qcow2", "-O", target, "in.qcow2", "out"]);
            q.identical(("qcow2", "in.qcow2"), (target, "out"));
            assert!(fs::metadata(dir.join("out")).unwrap().blocks() * 512 < 4 << 20, "{target}");
        }
    }
}

#[test]
fn the_same_for_any_number_of_threads() {
    let content = content();
    for mounted in file_systems() {
        let dir = mounted.path();
        write_sparse(&dir.join("in.raw"), &content);
        let targets: [(&str, &[&str]); 3] =
            [("qcow2", &[]), ("vmdk", &[]), ("vmdk", &["-o", "subformat=twoGbMaxExtentSparse"])];
        parallel(&targets, |(format, options)| {
            let own = dir.join(format!("{format}-{}", options.len()));
            fs::create_dir(&own).unwrap();
            let bytes = |threads: &str, io: &str| {
                let base = ["--threads", threads, "--io", io, "-f", "raw", "-O", format];
                convert(&own, &[&base, *options, &["../in.raw", "out"]].concat());
                let mut files: Vec<_> =
                    fs::read_dir(&own).unwrap().map(|file| file.unwrap().path()).collect();
                files.sort();
                files.iter().map(|file| fs::read(file).unwrap()).collect::<Vec<_>>()
            };
            let first = bytes("1", "sync");
            for (threads, io) in [("2", "sync"), ("8", "sync"), ("2", "uring")] {
                assert!(bytes(threads, io) == first, "{threads} {io}");
            }
        });
    }
}
