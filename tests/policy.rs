//! What an image may make diskmill do: which files it may name, and what is refused by name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use diskmill_testkit::content::{Pattern, disk, fill};
use diskmill_testkit::qcow2::{ImageBuilder, field};
use diskmill_testkit::{
    Cmd, Oracle, Outcome, Signal, Tool, args, parallel, require_program, same_content, scratch,
};

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

const SIZE: u64 = 1 << 20;

/// An empty image `name` over `backing`.
fn over(path: &Path, backing: &str, format: &str) {
    let mut image = ImageBuilder::new(3, 16, SIZE);
    image.backing(backing, format);
    image.build().write(path);
}

fn convert(dir: &Path, more: &[&str]) -> Cmd {
    let cmd = diskmill().cmd(["convert", "-f", "qcow2", "-O", "raw"]).args(more);
    cmd.arg(dir.join("top.qcow2")).arg(dir.join("out.raw")).limit(Duration::from_secs(20))
}

fn refused(dir: &Path, words: &[&str]) -> Outcome {
    let out = convert(dir, &[]).run();
    out.no_panic();
    let out = out.expect_code(1);
    out.says(words);
    assert!(!dir.join("out.raw").exists(), "{out}");
    out
}

#[test]
fn a_backing_file_beside_or_below_the_image_is_read() {
    let dir = scratch();
    let dir = dir.path();
    let content = disk(1, 1 << 20);
    std::fs::create_dir(dir.join("below")).unwrap();
    for name in ["base.raw", "below/base.raw", "./below/../base.raw"] {
        std::fs::write(dir.join(name), &content).unwrap();
        over(&dir.join("top.qcow2"), name, "raw");
        convert(dir, &[]).ok();
        same_content(&dir.join("out.raw"), &content);
    }
    // An absolute name inside the folder is no way out either.
    let absolute = dir.join("base.raw");
    over(&dir.join("top.qcow2"), absolute.to_str().unwrap(), "raw");
    convert(dir, &[]).ok();
}

#[test]
fn a_backing_file_outside_needs_permission() {
    let top = scratch();
    let top = top.path();
    let (inside, outside) = (top.join("inside"), top.join("outside"));
    std::fs::create_dir(&inside).unwrap();
    std::fs::create_dir(&outside).unwrap();
    let content = disk(1, 1 << 20);
    std::fs::write(outside.join("base.raw"), &content).unwrap();
    symlink(outside.join("base.raw"), inside.join("link.raw")).unwrap();
    symlink(&outside, inside.join("folder")).unwrap();
    let absolute = outside.join("base.raw");
    let prefixed = format!("file:{}", absolute.display());
    let names = [
        "file:../outside/base.raw",
        &prefixed,
        "../outside/base.raw",
        absolute.to_str().unwrap(),
        "link.raw",
        "folder/base.raw",
    ];
    for name in names {
        over(&inside.join("top.qcow2"), name, "raw");
        refused(&inside, &["--allow-path"]);
        let allowed = outside.to_str().unwrap();
        for more in [&["--allow-path", allowed][..], &["--allow-any-path"]] {
            convert(&inside, more).ok();
            same_content(&inside.join("out.raw"), &content);
            std::fs::remove_file(inside.join("out.raw")).unwrap();
        }
        // Permission for another folder is none for this one; a name that begins alike neither.
        for other in ["/usr", &allowed[..allowed.len() - 1]] {
            let out = convert(&inside, &["--allow-path", other]).run();
            assert_eq!(out.code, Some(1), "{out}");
        }
    }
}

#[test]
fn etc_passwd_is_not_opened() {
    let dir = scratch();
    let dir = dir.path();
    let images = [
        {
            let mut b = ImageBuilder::new(3, 16, SIZE);
            b.backing("/etc/passwd", "raw");
            b
        },
        {
            let mut b = ImageBuilder::new(3, 16, SIZE);
            b.data_file("/etc/passwd");
            b
        },
    ];
    let strace = require_program("strace");
    for image in images {
        image.build().write(&dir.join("top.qcow2"));
        refused(dir, &["--allow-path"]);
        if let Some(strace) = &strace {
            let log = dir.join("strace.log");
            let launcher = args![strace, "-f", "-e", "trace=file", "-o", log];
            let out = convert(dir, &[]).under(launcher).run();
            assert_eq!(out.code, Some(1), "{out}");
            let log = std::fs::read_to_string(&log).unwrap();
            let opened = log.lines().find(|l| l.contains("/etc/passwd") && l.contains("open"));
            assert_eq!(opened, None);
        }
    }
}

#[test]
fn fifos_devices_and_folders_are_no_backing_files() {
    let dir = scratch();
    let dir = dir.path();
    Cmd::new("mkfifo").arg(dir.join("fifo")).ok();
    std::fs::create_dir(dir.join("folder")).unwrap();
    symlink("/dev/zero", dir.join("zero")).unwrap();
    for name in ["fifo", "folder", "zero", "/dev/zero", "/dev/stdin", "/proc/self/mem"] {
        for format in ["raw", "qcow2"] {
            over(&dir.join("top.qcow2"), name, format);
            let word = name.rsplit('/').next().unwrap();
            // Links are followed before the decision: the message may name what lies behind.
            refused(dir, &[word, "--allow-path"]);
        }
    }
}

#[test]
fn names_that_are_no_paths_are_refused() {
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("base.raw"), disk(1, 1 << 20)).unwrap();
    let json = r#"json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}"#;
    for name in [json, "nbd://localhost:1/x", "nbd:localhost:1", "ssh://h/x", "fat:rw:.", "null-co://"] {
        over(&dir.join("top.qcow2"), name, "raw");
        let word = &name[..=name.find(':').unwrap()];
        refused(dir, &[word]);
    }
}

#[test]
fn loops_are_found() {
    let dir = scratch();
    let dir = dir.path();
    over(&dir.join("top.qcow2"), "top.qcow2", "qcow2");
    refused(dir, &["loop", "itself", "cycle"]);
    over(&dir.join("top.qcow2"), "b.qcow2", "qcow2");
    over(&dir.join("b.qcow2"), "./c.qcow2", "qcow2");
    symlink("top.qcow2", dir.join("alias.qcow2")).unwrap();
    over(&dir.join("c.qcow2"), "alias.qcow2", "qcow2");
    refused(dir, &["loop", "itself", "cycle"]);
    // A hard link is another name of the same file.
    std::fs::remove_file(dir.join("alias.qcow2")).unwrap();
    std::fs::hard_link(dir.join("top.qcow2"), dir.join("alias.qcow2")).unwrap();
    refused(dir, &["loop", "itself", "cycle"]);
}

#[test]
fn a_chain_without_end_is_refused() {
    let dir = scratch();
    let dir = dir.path();
    over(&dir.join("top.qcow2"), "0.qcow2", "qcow2");
    for i in 0..2000 {
        let mut image = ImageBuilder::new(3, 9, SIZE);
        image.backing(&format!("{}.qcow2", i + 1), "qcow2");
        image.build().write(&dir.join(format!("{i}.qcow2")));
    }
    ImageBuilder::new(3, 9, SIZE).build().write(&dir.join("2000.qcow2"));
    refused(dir, &["chain", "deep", "depth"]);
}

#[test]
fn a_missing_backing_file_is_named() {
    let dir = scratch();
    let dir = dir.path();
    over(&dir.join("top.qcow2"), "gone.raw", "raw");
    refused(dir, &["gone.raw"]);
    over(&dir.join("top.qcow2"), "gone.raw", "no-such-format");
    std::fs::write(dir.join("gone.raw"), [0; 512]).unwrap();
    refused(dir, &["no-such-format"]);
}

#[test]
fn a_raw_backing_file_that_looks_like_qcow2_stays_raw() {
    let dir = scratch();
    let dir = dir.path();
    let mut inner = ImageBuilder::new(3, 16, SIZE);
    inner.backing("/etc/passwd", "raw");
    inner.build().write(&dir.join("base.raw"));
    over(&dir.join("top.qcow2"), "base.raw", "raw");
    convert(dir, &[]).ok();
    let mut want = std::fs::read(dir.join("base.raw")).unwrap();
    want.resize(SIZE as usize, 0);
    same_content(&dir.join("out.raw"), &want);
}

#[test]
fn encryption_is_refused_by_name() {
    let dir = scratch();
    let dir = dir.path();
    for (method, word) in [(1, "passphrase"), (2, "LUKS"), (77, "77")] {
        let image = ImageBuilder::new(3, 16, SIZE).build();
        let image = image.put32(field::CRYPT_METHOD, method);
        image.write(&dir.join("top.qcow2"));
        refused(dir, &[word]);
    }
}

#[test]
fn unknown_incompatible_features_are_refused_by_name() {
    let dir = scratch();
    let dir = dir.path();
    let mut image = ImageBuilder::new(3, 16, SIZE);
    image.incompatible(1 << 17).feature_names(&[
        (0, 0, "dirty bit"),
        (1, 17, "not this one"),
        (0, 17, "quantum clusters"),
    ]);
    image.build().write(&dir.join("top.qcow2"));
    let out = refused(dir, &["quantum clusters"]);
    assert!(!out.err().contains("not this one"), "{out}");
    // Without a name, by the number.
    let mut image = ImageBuilder::new(3, 16, SIZE);
    image.incompatible(1 << 63);
    image.build().write(&dir.join("top.qcow2"));
    refused(dir, &["63"]);
    // A hostile name must not reach the terminal as it is.
    let mut image = ImageBuilder::new(3, 16, SIZE);
    image.incompatible(1 << 17).feature_names(&[(0, 17, "\x1b]0;owned\x07")]);
    image.build().write(&dir.join("top.qcow2"));
    let out = refused(dir, &["owned"]);
    assert!(!out.stderr.contains(&0x1b), "{out}");
}

#[test]
fn unknown_compatible_and_autoclear_features_are_read() {
    let dir = scratch();
    let dir = dir.path();
    let data = fill(Pattern::Text, 1, 65536);
    let mut image = ImageBuilder::new(3, 16, SIZE);
    image.data(3, &data);
    image.extension(0x1234_5678, b"something new");
    let image = image.build();
    let image = image.put64(field::COMPATIBLE_FEATURES, 1 << 50 | 1);
    image.put64(field::AUTOCLEAR_FEATURES, 1 << 50).write(&dir.join("top.qcow2"));
    convert(dir, &[]).ok();
    let mut want = vec![0; SIZE as usize];
    want[3 << 16..4 << 16].copy_from_slice(&data);
    same_content(&dir.join("out.raw"), &want);
}

#[test]
fn hostile_sizes_are_refused_quickly_and_cheaply() {
    let clean = || {
        let mut b = ImageBuilder::new(3, 16, SIZE);
        b.data(0, &fill(Pattern::Text, 1, 65536));
        b.snapshot("1", "one");
        b.build()
    };
    let image = clean();
    // The image that is made hostile below is a good one.
    let dir = scratch();
    image.write(&dir.path().join("top.qcow2"));
    convert(dir.path(), &[]).ok();
    let cases = [
        ("magic", image.clone().put32(field::MAGIC, 0)),
        ("version 0", image.clone().put32(field::VERSION, 0)),
        ("version 4", image.clone().put32(field::VERSION, 4)),
        ("cluster 2^0", image.clone().put32(field::CLUSTER_BITS, 0)),
        ("cluster 2^8", image.clone().put32(field::CLUSTER_BITS, 8)),
        ("cluster 2^22", image.clone().put32(field::CLUSTER_BITS, 22)),
        ("cluster 2^63", image.clone().put32(field::CLUSTER_BITS, 63)),
        ("cluster 2^max", image.clone().put32(field::CLUSTER_BITS, u32::MAX)),
        ("size 2^63", image.clone().put64(field::SIZE, 1 << 63)),
        ("size max", image.clone().put64(field::SIZE, u64::MAX)),
        ("size beyond L1", image.clone().put64(field::SIZE, 1 << 40)),
        ("L1 size max", image.clone().put32(field::L1_SIZE, u32::MAX)),
        ("L1 unaligned", image.clone().put64(field::L1_TABLE_OFFSET, 0x1_0001)),
        ("L1 at max", image.clone().put64(field::L1_TABLE_OFFSET, u64::MAX)),
        ("L1 at the last cluster", image.clone().put64(field::L1_TABLE_OFFSET, !0xffff)),
        ("L1 beyond the end", image.clone().put64(field::L1_TABLE_OFFSET, 1 << 40)),
        ("refcount order 7", image.clone().put32(field::REFCOUNT_ORDER, 7)),
        ("refcount order max", image.clone().put32(field::REFCOUNT_ORDER, u32::MAX)),
        ("header length 8", image.clone().put32(field::HEADER_LENGTH, 8)),
        ("header length max", image.clone().put32(field::HEADER_LENGTH, u32::MAX)),
        (
            "backing name length",
            image.clone().put64(field::BACKING_FILE_OFFSET, 200).put32(field::BACKING_FILE_SIZE, 1024),
        ),
        (
            "backing name far away",
            image.clone().put64(field::BACKING_FILE_OFFSET, u64::MAX).put32(field::BACKING_FILE_SIZE, 5),
        ),
        ("snapshots max", image.clone().put32(field::NB_SNAPSHOTS, u32::MAX)),
        ("snapshots unaligned", image.clone().put64(field::SNAPSHOTS_OFFSET, 5)),
        ("extension length", image.clone().put32(112, 0x1234).put32(116, u32::MAX)),
        ("L2 unaligned", image.clone().put64(image.l1_at, 0x1_0200)),
        ("L2 beyond the end", image.clone().put64(image.l1_at, 1 << 50)),
        ("data unaligned", image.clone().put64(image.l2_at[0], 0x1_0200)),
        ("data beyond the end", image.clone().put64(image.l2_at[0], 1 << 50)),
        ("packed beyond the end", image.clone().put64(image.l2_at[0], 1 << 62 | 1 << 50)),
        ("packed over itself", image.clone().put64(image.l2_at[0], 1 << 62 | image.l2_at[0])),
        (
            "compression type",
            image.clone().put64(field::INCOMPATIBLE_FEATURES, 8).put(field::COMPRESSION_TYPE, &[9]),
        ),
        ("compression type without its bit", image.clone().put(field::COMPRESSION_TYPE, &[1])),
        ("compression bit without a type", image.clone().put64(field::INCOMPATIBLE_FEATURES, 8)),
        ("data file missing", image.clone().put64(field::INCOMPATIBLE_FEATURES, 4)),
        (
            "extended L2 in small clusters",
            ImageBuilder::new(3, 12, SIZE).build().put64(field::INCOMPATIBLE_FEATURES, 16),
        ),
    ];
    let cases: Vec<_> = cases.into_iter().map(|(n, i)| (n, i.bytes())).collect();
    let names: Vec<usize> = (0..cases.len()).collect();
    parallel(&names, |&i| {
        let (name, bytes) = &cases[i];
        let dir = scratch();
        let dir = dir.path();
        std::fs::write(dir.join("top.qcow2"), bytes).unwrap();
        let snapshots = name.starts_with("snapshots");
        let more: &[&str] = if snapshots { &["-l", "one"] } else { &[] };
        let out = convert(dir, more).run();
        out.no_panic();
        assert!(out.code == Some(1), "{name}: {out}");
        assert!(out.err().len() > 20, "{name}: no message: {out}");
        assert!(out.peak_rss < 100 << 20, "{name}: {} MiB", out.peak_rss >> 20);
        assert!(!dir.join("out.raw").exists(), "{name}: {out}");
    });
}

#[test]
fn an_image_in_use_is_refused_and_read_with_force_share() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    q.create("top.qcow2", "", SIZE);
    let writer = q.io(["-f", "qcow2", "-c", "sleep 60000", "top.qcow2"]).spawn();
    let held = || q.img(["info", "top.qcow2"]).run().code == Some(1);
    for _ in 0..100 {
        if held() {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(held(), "qemu-io takes no lock: nothing is tested");
    refused(dir, &["lock"]).says(&["-U", "--force-share"]);
    convert(dir, &["-U"]).ok();
    for verb in ["info", "map"] {
        let cmd = |more: &[&str]| diskmill().cmd([verb]).args(more).arg(dir.join("top.qcow2"));
        cmd(&[]).fails(1).says(&["lock"]);
        cmd(&["-U"]).ok();
    }
    // Nor may it be written.
    let source = dir.join("source.raw");
    std::fs::write(&source, disk(1, 1 << 20)).unwrap();
    let before = std::fs::read(dir.join("top.qcow2")).unwrap();
    let target = dir.join("top.qcow2");
    let cmd = diskmill().cmd(args!["convert", "-n", "-f", "raw", "-O", "raw", source, target]);
    cmd.fails(1).says(&["lock"]);
    assert!(std::fs::read(&target).unwrap() == before);
    writer.signal(Signal::KILL);
    let _ = writer.wait();
    convert(dir, &[]).ok();
}

#[test]
fn we_hold_locks_that_qemu_respects() {
    // While diskmill reads an image, QEMU may not open it for writing.
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    std::fs::write(dir.join("source.raw"), fill(Pattern::Text, 1, 64 << 20)).unwrap();
    q.img(["convert", "-f", "raw", "-O", "qcow2", "source.raw", "top.qcow2"]).ok();
    let cmd = diskmill().cmd(["convert", "-c", "-f", "qcow2", "-O", "qcow2", "--threads", "1"]);
    let reader = cmd.args(["top.qcow2", "out.qcow2"]).dir(dir).spawn();
    let mut refused = false;
    while !refused && !reader.ended_within(Duration::from_millis(5)) {
        let writer = q.io(["-f", "qcow2", "-c", "write 0 512", "top.qcow2"]).run();
        refused = writer.err().contains("lock");
    }
    let _ = reader.wait();
    assert!(refused, "qemu-io could write to the image all the time");
}
