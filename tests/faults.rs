//! Interruptions, full disks and damaged sources: never a half-written file under the final name, a
//! message that says what happened, and the right exit code.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use diskmill::{Image as Opened, OpenOptions};
use diskmill_testkit::content::{Pattern, Rng, disk, fill};
use diskmill_testkit::qcow2::{Entry, Image, ImageBuilder, payload};
use diskmill_testkit::{
    Cmd, Oracle, Outcome, Running, Signal, Tool, args, is_root, parallel, require_program, same_content,
    scratch, skip, workspace_root,
};

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

const OLD: &[u8] = b"the old file";

/// Names in a folder, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A folder with a source that takes a second or more to convert, and an old file in the target's place.
struct Slow(diskmill_testkit::TempDir);

impl Slow {
    fn new() -> Self {
        let dir = scratch();
        let block = fill(Pattern::Text, 1, 8 << 20);
        let file = File::create(dir.path().join("in.raw")).unwrap();
        for i in 0..24 {
            std::os::unix::fs::FileExt::write_all_at(&file, &block, i * block.len() as u64).unwrap();
        }
        std::fs::create_dir(dir.path().join("out")).unwrap();
        std::fs::write(dir.path().join("out/a.qcow2"), OLD).unwrap();
        Self(dir)
    }

    fn out(&self) -> PathBuf {
        self.0.path().join("out")
    }

    fn cmd(&self) -> Cmd {
        let cmd = diskmill().cmd(["convert", "-c", "-f", "raw", "-O", "qcow2", "--threads", "1"]);
        cmd.args(["in.raw", "out/a.qcow2"]).dir(self.0.path())
    }

    /// Starts it and returns when its temporary file is there.
    fn started(&self) -> Running {
        self.start(self.cmd())
    }

    fn start(&self, cmd: Cmd) -> Running {
        let run = cmd.spawn();
        let since = Instant::now();
        while names(&self.out()).len() < 2 {
            assert!(since.elapsed() < Duration::from_secs(10), "no temporary file in sight");
            std::thread::sleep(Duration::from_millis(1));
        }
        run
    }

    fn old_file_is_kept(&self) {
        same_content(&self.out().join("a.qcow2"), OLD);
    }
}

#[test]
fn interrupts_end_with_a_message_and_leave_nothing() {
    let slow = Slow::new();
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let run = slow.started();
        std::thread::sleep(Duration::from_millis(100));
        run.signal(signal);
        let sent = Instant::now();
        let out = run.wait().expect_code(code);
        assert!(sent.elapsed() < Duration::from_secs(5), "slow to stop: {out}");
        out.says(&["interrupt", "cancel", "signal"]);
        slow.old_file_is_kept();
        assert_eq!(names(&slow.out()), ["a.qcow2"], "{out}");
    }
}

#[test]
fn interrupted_fresh_images_leave_nothing() {
    let slow = Slow::new();
    let full = "create -f qcow2 -o preallocation=full out/a.qcow2 8G";
    for line in [
        full.replace("create", "create --force"),
        format!("qemu-img {full}"),
        "qemu-img dd -O qcow2 bs=512 if=in.raw of=out/a.qcow2".to_owned(),
    ] {
        let run = slow.start(diskmill().cmd(line.split(' ')).dir(slow.0.path()));
        run.signal(Signal::TERM);
        let out = run.wait().expect_code(143);
        out.says(&["interrupt"]);
        slow.old_file_is_kept();
        assert_eq!(names(&slow.out()), ["a.qcow2"], "{out}");
    }
}

#[test]
fn kill_at_any_time_keeps_the_old_file_and_the_next_run_cleans_up() {
    let slow = Slow::new();
    let mut rng = Rng::new(7);
    for _ in 0..8 {
        let run = slow.started();
        std::thread::sleep(Duration::from_millis(rng.below(400) as u64));
        run.signal(Signal::KILL);
        let out = run.wait();
        assert_eq!(out.signal, Some(9), "too quick to be killed: {out}");
        slow.old_file_is_kept();
    }
    slow.cmd().ok();
    assert_eq!(names(&slow.out()), ["a.qcow2"], "left over");
    let Some(q) = Oracle::find(slow.0.path()) else { return };
    q.check_clean("out/a.qcow2");
    q.identical(("raw", "in.raw"), ("qcow2", "out/a.qcow2"));
}

#[test]
fn a_running_conversion_is_not_cleaned_up_by_another() {
    let slow = Slow::new();
    let first = slow.started();
    let second = slow.cmd().run();
    let first = first.wait();
    // Either both finish, or one says that the other is at work; the result is whole.
    assert!(first.code == Some(0) || second.code == Some(0), "{first}\n{second}");
    assert_eq!(names(&slow.out()), ["a.qcow2"]);
    let Some(q) = Oracle::find(slow.0.path()) else { return };
    q.check_clean("out/a.qcow2");
    q.identical(("raw", "in.raw"), ("qcow2", "out/a.qcow2"));
}

#[test]
fn a_file_size_limit_is_an_error() {
    let slow = Slow::new();
    // 1 MiB (blocks of 1024 bytes).
    let limited = ["bash", "-c", "ulimit -f 1024; exec \"$@\"", "limit"];
    let ignored = ["bash", "-c", "trap '' XFSZ; ulimit -f 1024; exec \"$@\"", "limit"];
    for more in [&["-O", "raw"][..], &["-O", "qcow2"], &["-O", "qcow2", "-c"]] {
        for launcher in [limited, ignored] {
            let cmd = diskmill().cmd(["convert", "-f", "raw"]).args(more);
            let out = cmd.args(["in.raw", "out/a.qcow2"]).dir(slow.0.path()).under(launcher).fails(1);
            out.no_panic();
            out.says(&["too large", "limit"]);
            slow.old_file_is_kept();
            assert_eq!(names(&slow.out()), ["a.qcow2"], "{out}");
        }
    }
    let dd = diskmill().cmd(["qemu-img", "dd", "bs=1M", "if=in.raw", "of=out/a.qcow2"]);
    dd.dir(slow.0.path()).under(limited).fails(1).says(&["too large", "limit"]);
    slow.old_file_is_kept();
    assert_eq!(names(&slow.out()), ["a.qcow2"]);
}

/// A tmpfs of 4 MiB.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> Option<Self> {
        if !is_root() {
            skip("mounting a small tmpfs needs root");
            return None;
        }
        std::fs::create_dir_all(&at).unwrap();
        let out = Cmd::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(&at).run();
        if out.code != Some(0) {
            skip(&format!("cannot mount a tmpfs: {}", out.err().trim()));
            return None;
        }
        Some(Self(at))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Cmd::new("umount").arg("-l").arg(&self.0).run();
    }
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let dir = scratch();
    let dir = dir.path();
    let Some(small) = SmallDisk::mount(dir.join("small")) else { return };
    std::fs::write(dir.join("in.raw"), fill(Pattern::Random, 1, 24 << 20)).unwrap();
    std::fs::write(small.0.join("a"), OLD).unwrap();
    let modes = [
        &["-O", "raw"][..],
        &["-O", "raw", "-S", "0"],
        &["-O", "qcow2"],
        &["-O", "qcow2", "-c"],
        &["-O", "qcow2", "-o", "preallocation=falloc"],
        &["-O", "qcow2", "-o", "preallocation=full"],
    ];
    for more in modes {
        for io in ["uring", "sync"] {
            let cmd = diskmill().cmd(["convert", "-f", "raw", "--io", io]).args(more);
            let out = cmd.args(["in.raw", "small/a"]).dir(dir).fails(1);
            out.no_panic();
            out.says(&["no space", "disk is full"]);
            same_content(&small.0.join("a"), OLD);
            assert_eq!(names(&small.0), ["a"], "{out}");
        }
    }
}

/// What a full disk has no room for is refused when it is written, and not when it is flushed with all else.
#[test]
fn a_full_disk_keeps_what_was_acknowledged() {
    const LEN: usize = 256 << 10;
    let dir = scratch();
    let Some(small) = SmallDisk::mount(dir.path().join("small")) else { return };
    let path = small.0.join("a.qcow2");
    // Apart from each other: each write needs more of the tables than the one before.
    let place = |index: u64| index * ((1 << 20) + 4096);
    let bytes = |index| fill(Pattern::Random, index, LEN);
    for options in
        ["cluster_size=64k", "cluster_size=512", "cluster_size=4k,extended_l2=off,refcount_bits=64"]
    {
        diskmill().cmd(["create", "-q", "-f", "qcow2", "-o", options]).arg(&path).arg("64M").ok();
        let image = Opened::open(&path, &OpenOptions { writable: true, ..OpenOptions::default() }).unwrap();
        let results: Vec<_> = (0..40).map(|index| image.write_at(&bytes(index), place(index))).collect();
        image.flush().unwrap();
        image.close().unwrap();
        let failed = results.iter().filter_map(|result| result.as_ref().err());
        assert!(failed.clone().all(|error| error.to_string().contains("No space left")), "{options}");
        assert!((20..36).contains(&failed.count()), "{options}: the disk has room for about 15");
        let image = Opened::open(&path, &OpenOptions::default()).unwrap();
        for (index, _) in (0..).zip(&results).filter(|(_, result)| result.is_ok()) {
            let mut found = vec![0; LEN];
            image.read_at(&mut found, place(index)).unwrap();
            assert!(found == bytes(index), "{options}: write {index}");
        }
        drop(image);
        diskmill().cmd(["check"]).arg(&path).ok();
        if let Some(q) = Oracle::find(&small.0) {
            q.check_clean("a.qcow2");
        }
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn sources_and_targets_that_cannot_be_opened() {
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("in.raw"), disk(1, 65536)).unwrap();
    std::fs::create_dir(dir.join("folder")).unwrap();
    let fails = |args: &[&str], words: &[&str]| {
        let out = diskmill().cmd(["convert"]).args(args).dir(dir).fails(1);
        out.no_panic();
        out.says(words);
        assert!(!out.err().contains("os error"), "{out}");
    };
    fails(&["gone.raw", "out"], &["gone.raw"]);
    fails(&["folder", "out"], &["folder"]);
    fails(&["in.raw", "gone/out"], &["gone/out"]);
    fails(&["in.raw", "folder"], &["folder"]);
    fails(&["-n", "in.raw", "absent"], &["absent"]);
    fails(&["in.raw", "in.raw"], &["same file", "source", "itself"]);
    std::os::unix::fs::symlink("in.raw", dir.join("alias")).unwrap();
    fails(&["in.raw", "alias"], &["same file", "source", "itself"]);
    same_content(&dir.join("in.raw"), &disk(1, 65536));
    assert_eq!(names(dir), ["alias", "folder", "in.raw"]);
    if is_root() {
        skip("root reads files without read permission");
        return;
    }
    use std::os::unix::fs::PermissionsExt as _;
    let closed = std::fs::Permissions::from_mode(0o000);
    std::fs::set_permissions(dir.join("in.raw"), closed).unwrap();
    fails(&["in.raw", "out"], &["permission denied"]);
}

/// An image with plain and packed data, and where things lie in it.
fn sample() -> (Image, u64, u64) {
    let mut image = ImageBuilder::new(3, 16, 8 << 16);
    let packed = payload::deflate_stored(&fill(Pattern::Random, 1, 65536));
    let plain_at = image.data(1, &fill(Pattern::Text, 2, 65536));
    let packed_at = image.alloc(&packed);
    image.map(4, Entry::Packed(packed_at, packed.len() as u64));
    (image.build(), plain_at, packed_at)
}

struct Damage {
    name: &'static str,
    image: Image,
    /// The message names one of these structures…
    words: &'static [&'static str],
    /// …and `--salvage` gives this many bad bytes at least, or nothing when it cannot go on.
    salvage: Option<u64>,
}

fn damages() -> Vec<Damage> {
    let (image, plain_at, packed_at) = sample();
    let far = 1u64 << 40;
    let cut = |len| {
        let mut image = image.clone();
        image.len = len;
        image
    };
    let (l1, l2) = (image.l1_at, image.l2_at[0]);
    let entry = |guest: u64, bits: u64| image.clone().put64(l2 + guest * 8, bits);
    let damage = |name, image, words, salvage| Damage { name, image, words, salvage };
    vec![
        damage("empty file", cut(0), &["header", "qcow2", "empty"], None),
        damage("half a header", cut(40), &["header", "truncated", "qcow2"], None),
        damage("header only", cut(512), &["L1 table"], None),
        damage("L1 table cut", cut(l1), &["L1 table"], None),
        damage("L2 table cut", cut(l2), &["L2 table", "L1 table"], None),
        damage("data cut off", cut(plain_at), &["L2 table", "L1 table"], None),
        damage("L2 table past the end", image.clone().put64(l1, far), &["L2 table", "L1"], Some(1)),
        damage("L2 table unaligned", image.clone().put64(l1, l2 + 512), &["L2 table", "L1"], Some(1)),
        damage("data past the end", entry(1, far), &["L2 table", "L2 entry", "cluster"], Some(65536)),
        damage("data unaligned", entry(1, plain_at + 512), &["L2 table", "L2 entry", "cluster"], Some(65536)),
        damage("packed past the end", entry(4, 1 << 62 | far), &["compressed", "L2"], Some(65536)),
        damage(
            "packed garbage",
            image.clone().put(packed_at, &[0xff; 64]),
            &["compressed", "deflate", "inflate"],
            Some(65536),
        ),
        damage(
            "packed too short",
            entry(4, 1 << 62 | packed_at),
            &["compressed", "deflate", "inflate"],
            Some(65536),
        ),
    ]
}

fn salvages(damage: &Damage, dir: &Path, least: u64) {
    let cmd = diskmill().cmd(["convert", "-f", "qcow2", "-O", "raw", "--salvage", "--json"]);
    let out = cmd.args(["in.qcow2", "out.raw"]).dir(dir).fails(3);
    let json = out.json();
    let ranges = json["bad-ranges"].as_array().unwrap_or_else(|| panic!("{out}"));
    let mut sum = 0;
    let content = std::fs::read(dir.join("out.raw")).unwrap();
    assert_eq!(content.len(), 8 << 16);
    for range in ranges {
        let number = |key: &str| range[key].as_u64().unwrap_or_else(|| panic!("{key}: {out}"));
        let (start, length) = (number("start"), number("length"));
        assert!(range["reason"].as_str().is_some_and(|r| r.len() > 5), "{out}");
        let bad = &content[start as usize..(start + length) as usize];
        assert!(bad.iter().all(|&b| b == 0), "a bad range is not zeros: {out}");
        sum += length;
    }
    assert!(sum >= least, "{}: {sum} bad bytes: {out}", damage.name);
    // What is not damaged is there.
    let want = fill(Pattern::Text, 2, 65536);
    let covered = ranges.iter().any(|r| {
        let start = r["start"].as_u64().unwrap();
        start < 2 << 16 && start + r["length"].as_u64().unwrap() > 1 << 16
    });
    assert!(covered || content[1 << 16..2 << 16] == want, "{out}");
}

#[test]
fn damaged_images_are_errors_that_name_the_structure() {
    let damages = damages();
    let indices: Vec<usize> = (0..damages.len()).collect();
    parallel(&indices, |&i| {
        let damage = &damages[i];
        let dir = scratch();
        let dir = dir.path();
        damage.image.write(&dir.join("in.qcow2"));
        std::fs::write(dir.join("out.raw"), OLD).unwrap();
        let before = names(dir);
        for io in ["uring", "sync"] {
            let cmd = diskmill().cmd(["convert", "-f", "qcow2", "-O", "raw", "--io", io]);
            let out = cmd.args(["in.qcow2", "out.raw"]).dir(dir).run();
            out.no_panic();
            assert!(out.code == Some(1), "{}: {out}", damage.name);
            out.says(damage.words);
            same_content(&dir.join("out.raw"), OLD);
            assert_eq!(names(dir), before, "{out}");
        }
        if let Some(least) = damage.salvage {
            salvages(damage, dir, least);
        }
    });
}

#[test]
fn the_sample_without_damage_is_read() {
    let dir = scratch();
    let dir = dir.path();
    sample().0.write(&dir.join("in.qcow2"));
    for more in [&[][..], &["--salvage"]] {
        let cmd = diskmill().cmd(["convert", "-f", "qcow2", "-O", "raw"]).args(more);
        cmd.args(["in.qcow2", "out.raw"]).dir(dir).ok();
        let mut want = vec![0; 8 << 16];
        want[1 << 16..2 << 16].copy_from_slice(&fill(Pattern::Text, 2, 65536));
        want[4 << 16..5 << 16].copy_from_slice(&fill(Pattern::Random, 1, 65536));
        same_content(&dir.join("out.raw"), &want);
    }
}

#[test]
fn truncation_of_a_real_image_is_never_a_success() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    std::fs::write(dir.join("in.raw"), fill(Pattern::Text, 1, 3 << 20)).unwrap();
    let mut cases = Vec::new();
    for (name, more) in [("plain", &[][..]), ("packed", &["-c"])] {
        let image = format!("{name}.qcow2");
        q.img(["convert", "-f", "raw", "-O", "qcow2"]).args(more).args(["in.raw", &image]).ok();
        let bytes = std::fs::read(dir.join(&image)).unwrap();
        diskmill().cmd(["convert", "-f", "qcow2", &image, "whole.raw"]).dir(dir).ok();
        for i in 1..16 {
            cases.push((image.clone(), bytes.len() * i / 16));
        }
        // QEMU ends the file at the last byte of the last payload or on a cluster: cut well inside.
        cases.push((image, bytes.len() - 70_000));
    }
    parallel(&cases, |(image, len)| {
        let own = scratch();
        let own = own.path();
        let bytes = std::fs::read(dir.join(image)).unwrap();
        std::fs::write(own.join("in.qcow2"), &bytes[..*len]).unwrap();
        let cmd = diskmill().cmd(["convert", "-f", "qcow2", "in.qcow2", "out.raw"]);
        let out = cmd.dir(own).run();
        out.no_panic();
        assert!(out.code == Some(1), "{out}");
        assert_eq!(names(own), ["in.qcow2"], "{out}");
    });
}

#[test]
fn refused_io_uring_changes_nothing_but_the_engine() {
    let Some(python) = require_program("python3") else { return };
    let launcher = workspace_root().join("tests/support/no_io_uring.py");
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("in.raw"), disk(1, 5 << 20)).unwrap();
    let convert = |io: &str, name: &str| {
        let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "qcow2", "-c", "--json", "--io", io]);
        cmd.args(["in.raw", name]).dir(dir)
    };
    let free = convert("sync", "free").ok();
    assert_eq!(free.json()["engine"], "sync");
    let want = std::fs::read(dir.join("free")).unwrap();
    // EPERM (container profiles), ENOSYS (old kernels, sandboxes), ENOMEM (locked-memory limit).
    for errno in ["1", "38", "12"] {
        let out = convert("auto", "refused").under(args![python, launcher, errno]).ok();
        let json = out.json();
        assert_eq!(json["engine"], "sync", "{out}");
        // Chosen without a probe, it need not be io_uring's fault.
        assert!(json["engine-reason"].as_str().is_some_and(|r| r.len() > 10), "{out}");
        same_content(&dir.join("refused"), &want);
        // Asked for by name, it may fall back as well, or be refused with a reason.
        let out = convert("uring", "forced").under(args![python, launcher, errno]).run();
        match out.code {
            Some(0) => {
                let json = out.json();
                assert_eq!(json["engine"], "sync", "{out}");
                assert!(json["engine-reason"].as_str().is_some_and(|r| r.contains("io_uring")), "{out}");
                same_content(&dir.join("forced"), &want);
            }
            _ => out.expect_code(1).says(&["io_uring"]),
        }
    }
}

#[test]
fn a_target_that_exists_keeps_its_permissions_or_fails_whole() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("in.raw"), disk(1, 1 << 20)).unwrap();
    std::fs::write(dir.join("out.raw"), OLD).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    std::fs::set_permissions(dir.join("out.raw"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let convert = || -> Outcome { diskmill().cmd(["convert", "in.raw", "out.raw"]).dir(dir).ok() };
    convert();
    same_content(&dir.join("out.raw"), &disk(1, 1 << 20));
    // A private file must not become readable for others.
    assert_eq!(mode(&dir.join("out.raw")) & 0o077, 0);
}
