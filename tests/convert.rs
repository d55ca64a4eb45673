//! Corners of `convert` that once went wrong, or easily could.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use diskmill_testkit::content::{Pattern, fill};
use diskmill_testkit::{Cmd, Oracle, Tool, scratch, steps};

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

const MIB: usize = 1 << 20;

#[test]
fn what_a_pipe_fills_is_the_same_each_time() {
    let dir = scratch();
    let bytes = fill(Pattern::Random, 7, 9 * MIB + 512);
    let through_pipe = |name: &str, threads: &str| {
        let target = dir.path().join(name);
        let args =
            ["convert", "--threads", threads, "-f", "raw", "-O", "qcow2", "-", target.to_str().unwrap()];
        diskmill().cmd(args).stdin_bytes(bytes.clone()).ok();
        std::fs::read(target).unwrap()
    };
    let first = through_pipe("a.qcow2", "1");
    for run in 0..4 {
        assert!(through_pipe("b.qcow2", "2") == first, "run {run}: stale bytes behind the end of the source");
    }
    let Some(qemu) = Oracle::find(dir.path()) else { return };
    qemu.check_clean("a.qcow2");
    assert!(qemu.content("a.qcow2", "qcow2") == bytes);
}

#[test]
fn an_image_is_not_its_own_backing_file() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("flat.raw"), fill(Pattern::Random, 7, MIB)).unwrap();
    diskmill().cmd(["convert", "-O", "qcow2", &path("flat.raw"), &path("base.qcow2")]).ok();
    let before = std::fs::read(path("base.qcow2")).unwrap();
    diskmill()
        .cmd([
            "convert",
            "-O",
            "qcow2",
            "-B",
            "base.qcow2",
            "-F",
            "qcow2",
            &path("flat.raw"),
            &path("base.qcow2"),
        ])
        .fails(1)
        .says(&["its own backing chain"]);
    assert!(std::fs::read(path("base.qcow2")).unwrap() == before);
}

#[test]
fn an_output_does_not_replace_what_it_needs() {
    let dir = scratch();
    let dir = dir.path();
    let content = fill(Pattern::Text, 7, MIB);
    std::fs::write(dir.join("root.raw"), &content).unwrap();
    let run = |words: &[&str]| diskmill().cmd(words).dir(dir);
    let before = ["root.raw", "base.qcow2"].map(|name| {
        let _ = run(&["create", "-F", "raw", "-b", "root.raw", "base.qcow2"]).run();
        std::fs::read(dir.join(name)).unwrap()
    });
    let over = |more: &[&'static str]| [&["convert", "-O", "qcow2", "-B", "base.qcow2"], more].concat();
    let source = "base.qcow2";
    std::fs::copy(dir.join("root.raw"), dir.join("in.raw")).unwrap();
    for wrong in [
        over(&["in.raw", "root.raw"]),
        over(&["-o", "data_file=base.qcow2", "in.raw", "out.qcow2"]),
        over(&["-o", "data_file=./root.raw", "in.raw", "out.qcow2"]),
        vec!["convert", "-O", "qcow2", "-o", "data_file=root.raw", source, "out.qcow2"],
        vec!["create", "--force", "-b", "base.qcow2", "-o", "data_file=root.raw", "out.qcow2"],
    ] {
        run(&wrong).fails(1).says(&["backing chain", "file of the source"]);
    }
    for one in ["./out.qcow2", "sub/../out.qcow2"] {
        std::fs::create_dir_all(dir.join("sub")).unwrap();
        let data = format!("data_file={one}");
        run(&["convert", "-O", "qcow2", "-o", &data, "in.raw", "out.qcow2"]).fails(1).says(&["one file"]);
    }
    assert!(!dir.join("out.qcow2").exists());
    assert_eq!(before, ["root.raw", "base.qcow2"].map(|name| std::fs::read(dir.join(name)).unwrap()));
}

#[test]
fn an_empty_image_is_filled() {
    let dir = scratch();
    let Some(qemu) = Oracle::find(dir.path()) else { return };
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let bytes = fill(Pattern::Text, 7, MIB + 512);
    std::fs::write(path("a.raw"), &bytes).unwrap();
    qemu.create("t.qcow2", "cluster_size=4k,refcount_bits=8", 4 * MIB as u64);
    diskmill().cmd(["convert", "-n", "-O", "qcow2", &path("a.raw"), &path("t.qcow2")]).ok();
    qemu.check_clean("t.qcow2");
    let info = qemu.info("t.qcow2");
    assert_eq!(
        (info["cluster-size"].as_u64(), info["virtual-size"].as_u64()),
        (Some(4096), Some(4 * MIB as u64))
    );
    assert!(qemu.content("t.qcow2", "qcow2")[..bytes.len()] == bytes);

    qemu.create("small.qcow2", "", MIB as u64);
    diskmill().cmd(["convert", "-n", "-O", "qcow2", &path("a.raw"), &path("small.qcow2")]).fails(1);
}

#[test]
fn an_image_that_holds_something_is_written_into() {
    let dir = scratch();
    let Some(qemu) = Oracle::find(dir.path()) else { return };
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let mut new = fill(Pattern::Random, 7, 3 * MIB + 512);
    new[MIB..2 * MIB].fill(0);
    std::fs::write(path("new.raw"), &new).unwrap();
    let old = fill(Pattern::Text, 3, 4 * MIB);
    std::fs::write(path("old.raw"), &old).unwrap();
    let expected = [&new[..], &old[new.len()..]].concat();
    let convert = |more: &[&str], target: &str| {
        let cmd = diskmill().cmd(["convert", "-n", "-O", "qcow2"]).args(more);
        cmd.args([&path("new.raw"), &path(target)])
    };
    for (name, options) in
        [("a.qcow2", "cluster_size=4k"), ("b.qcow2", "extended_l2=on"), ("c.qcow2", "compat=0.10")]
    {
        qemu.img(["convert", "-c", "-O", "qcow2", "-o", options, "old.raw", name]).ok();
        qemu.img(["snapshot", "-c", "before", name]).ok();
        convert(&[], name).ok();
        qemu.check_clean(name);
        assert!(qemu.content(name, "qcow2") == expected, "{name}");
        qemu.img(["snapshot", "-a", "before", name]).ok();
        assert!(qemu.content(name, "qcow2") == old, "{name}: the snapshot");
    }
    // Over a backing file: zeros hide it, and behind the source's end, inside a cluster, it shows.
    qemu.create_over("over.qcow2", "", 4 * MIB as u64, ("a.qcow2", "qcow2"));
    convert(&[], "over.qcow2").ok();
    qemu.check_clean("over.qcow2");
    assert!(qemu.content("over.qcow2", "qcow2") == expected);

    for subformat in ["monolithicSparse", "twoGbMaxExtentFlat"] {
        let option = format!("subformat={subformat}");
        qemu.img(["convert", "-O", "vmdk", "-o", &option, "old.raw", "a.vmdk"]).ok();
        diskmill().cmd(["convert", "-n", "-O", "vmdk", &path("new.raw"), &path("a.vmdk")]).ok();
        assert!(qemu.content("a.vmdk", "vmdk") == expected, "{subformat}");
        if subformat.contains("Sparse") {
            diskmill().cmd(["check", &path("a.vmdk")]).ok();
        }
    }
    // Its extents are in files of their own.
    qemu.img(["convert", "-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "old.raw", "split.vmdk"]).ok();
    diskmill().cmd(["check", &path("split.vmdk")]).ok();

    // Each thread holds some memory.
    for (memory, threads) in [("1M", 1), ("16M", 3), ("64M", 6)] {
        let limits = ["--json", "--threads", "6", "--memory", memory];
        assert_eq!(convert(&limits, "b.qcow2").ok().json()["threads"], threads, "in {memory}");
    }

    convert(&["-c"], "a.qcow2").fails(1).says(&["-c", "not supported"]);
    assert!(qemu.content("a.qcow2", "qcow2") == old, "a refusal changes nothing");
    qemu.create("small.qcow2", "", MIB as u64);
    qemu.io(["-f", "qcow2", "-c", "write 0 4k", "small.qcow2"]).ok();
    convert(&[], "small.qcow2").fails(1).says(&["small.qcow2", "1048576"]);
}

#[test]
fn packed_clusters_are_taken_over_and_right() {
    let dir = scratch();
    let Some(qemu) = Oracle::find(dir.path()) else { return };
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let mut bytes = fill(Pattern::Text, 7, 6 * MIB + 1536);
    bytes[2 * MIB..3 * MIB].fill(0);
    bytes[4 * MIB..5 * MIB].copy_from_slice(&fill(Pattern::Random, 7, MIB));
    std::fs::write(path("a.raw"), &bytes).unwrap();
    for codec in ["zlib", "zstd"] {
        let option = format!("compression_type={codec}");
        qemu.img(["convert", "-c", "-O", "qcow2", "-o", &option, "a.raw", "packed.qcow2"]).ok();
        let args = [
            "convert",
            "--json",
            "-c",
            "-O",
            "qcow2",
            "-o",
            &option,
            &path("packed.qcow2"),
            &path("again.qcow2"),
        ];
        let passed = diskmill().cmd(args).ok().json()["bytes-passed-packed"].as_u64().unwrap();
        assert!(passed >= 4 * MIB as u64, "{codec}: {passed} bytes taken over");
        qemu.check_clean("again.qcow2");
        assert!(qemu.content("again.qcow2", "qcow2") == bytes, "{codec}");
        let anew = diskmill().cmd(args).arg("--recompress").ok().json()["bytes-passed-packed"].as_u64();
        assert_eq!(anew, Some(0), "{codec}");
    }
    // The same deflate stream out of one wrapper and into the other.
    diskmill()
        .cmd(["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", &path("a.raw"), &path("a.vmdk")])
        .ok();
    let args = ["convert", "--json", "-c", "-O", "qcow2", &path("a.vmdk"), &path("from.qcow2")];
    assert!(diskmill().cmd(args).ok().json()["bytes-passed-packed"].as_u64() >= Some(4 * MIB as u64));
    qemu.check_clean("from.qcow2");
    assert!(qemu.content("from.qcow2", "qcow2")[..bytes.len()] == bytes);
    let target = path("to.vmdk");
    let args =
        ["convert", "--json", "-O", "vmdk", "-o", "subformat=streamOptimized", &path("from.qcow2"), &target];
    assert!(diskmill().cmd(args).ok().json()["bytes-passed-packed"].as_u64() >= Some(4 * MIB as u64));
    assert!(qemu.content("to.vmdk", "vmdk")[..bytes.len()] == bytes);
}

#[test]
fn bad_ranges_are_counted_once() {
    let dir = scratch();
    let Some(qemu) = Oracle::find(dir.path()) else { return };
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    qemu.create("a.qcow2", "cluster_size=4k", 8 * MIB as u64);
    qemu.write("a.qcow2", "qcow2", &steps(1, 8 * MIB as u64, 4096, 60, true));
    let whole = std::fs::metadata(path("a.qcow2")).unwrap().len();
    for cut in [whole / 3, whole / 2, whole / 3 * 2] {
        let bytes = std::fs::read(path("a.qcow2")).unwrap();
        std::fs::write(path("cut.qcow2"), &bytes[..cut as usize]).unwrap();
        let args = ["convert", "--json", "--salvage", &path("cut.qcow2"), &path("out.raw")];
        let outcome = diskmill().cmd(args).run();
        if outcome.code == Some(1) {
            // Even the first table is gone.
            continue;
        }
        let json = outcome.expect_code(3).json();
        let ranges: Vec<(u64, u64)> = json["bad-ranges"]
            .as_array()
            .unwrap()
            .iter()
            .map(|range| (range["start"].as_u64().unwrap(), range["length"].as_u64().unwrap()))
            .collect();
        assert!(!ranges.is_empty());
        assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0), "{ranges:?}");
        assert!(ranges.iter().all(|(start, len)| start + len <= 8 * MIB as u64), "{ranges:?}");

        // The same disk comes out where an image that holds something is written into.
        qemu.create("used.qcow2", "", 8 * MIB as u64);
        qemu.write("used.qcow2", "qcow2", &steps(2, 8 * MIB as u64, 65536, 20, false));
        let args =
            ["convert", "--json", "--salvage", "-n", "-O", "qcow2", &path("cut.qcow2"), &path("used.qcow2")];
        assert!(!diskmill().cmd(args).fails(3).json()["bad-ranges"].as_array().unwrap().is_empty());
        qemu.check_clean("used.qcow2");
        qemu.identical(("qcow2", "used.qcow2"), ("raw", "out.raw"));
    }
}

#[test]
fn a_raw_file_takes_one_of_its_own_odd_length() {
    let dir = scratch();
    let content = fill(Pattern::Text, 7, 1500);
    std::fs::write(dir.path().join("in.raw"), &content).unwrap();
    std::fs::write(dir.path().join("out.raw"), fill(Pattern::Byte(1), 0, 1500)).unwrap();
    let convert =
        |size: &str| diskmill().cmd(["convert", "-n", "-f", "raw", size, "out.raw"]).dir(dir.path());
    convert("in.raw").ok();
    assert!(std::fs::read(dir.path().join("out.raw")).unwrap()[..1500] == content);
    std::fs::write(dir.path().join("larger.raw"), fill(Pattern::Text, 7, 1600)).unwrap();
    convert("larger.raw").fails(1).says(&["the source needs"]);
}

#[test]
fn pipes_and_directories_are_no_names_for_images() {
    let dir = scratch();
    std::fs::write(dir.path().join("in.raw"), fill(Pattern::Text, 7, MIB)).unwrap();
    let shell = |script: &str| {
        let program = env!("CARGO_BIN_EXE_diskmill");
        Cmd::new("sh").args(["-c", script, program]).dir(dir.path())
    };
    shell("cat in.raw | $0 convert -f raw /dev/stdin out.raw").fails(1).says(&["a pipe by a name"]);
    shell("$0 convert in.raw /dev/stdout | cat; exit 1").fails(1).says(&["not a regular file"]);
    shell("$0 convert in.raw new/").fails(1).says(&["names a directory"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}
