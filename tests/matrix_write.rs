//! Every combination of creation options: the image that diskmill writes is clean for qemu-img, holds
//! the same guest content, and is of the kind that was asked for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use diskmill_testkit::content::disk;
use diskmill_testkit::{Oracle, Tool, pairwise, parallel, same_content, scratch};

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

#[derive(Clone, Copy, Debug)]
struct Case {
    compat: Option<&'static str>,
    cluster_bits: u32,
    refcount_bits: u32,
    preallocation: &'static str,
    lazy: bool,
    extended: bool,
    data_file: Option<&'static str>,
    compress: Option<&'static str>,
    backing: bool,
    tail: usize,
    threads: u32,
}

const PLAIN: Case = Case {
    compat: None,
    cluster_bits: 16,
    refcount_bits: 16,
    preallocation: "off",
    lazy: false,
    extended: false,
    data_file: None,
    compress: None,
    backing: false,
    tail: 512,
    threads: 2,
};

impl Case {
    fn v2(&self) -> bool {
        self.compat.is_some_and(|c| c == "v2" || c == "0.10")
    }

    /// What qemu-img accepts.
    fn legal(&self) -> bool {
        let wants_v3 = self.refcount_bits != 16
            || self.lazy
            || self.extended
            || self.data_file.is_some()
            || self.compress == Some("zstd");
        let small = self.extended && self.cluster_bits < 14;
        let bad_data = self.data_file.is_some() && self.compress.is_some()
            || self.data_file == Some("on") && self.backing;
        let preallocated = self.preallocation != "off";
        let bad_preallocation = preallocated && (self.compress.is_some() || self.backing && !self.extended);
        !(self.v2() && wants_v3 || small || bad_data || bad_preallocation)
    }

    fn options(&self) -> String {
        let mut o = format!(
            "cluster_size={},refcount_bits={},preallocation={}",
            1u64 << self.cluster_bits,
            self.refcount_bits,
            self.preallocation
        );
        let mut add = |on: bool, text: String| {
            if on {
                o += &text;
            }
        };
        add(self.compat.is_some(), format!(",compat={}", self.compat.unwrap_or_default()));
        add(self.lazy, ",lazy_refcounts=on".into());
        add(self.extended, ",extended_l2=on".into());
        add(self.compress.is_some(), format!(",compression_type={}", self.compress.unwrap_or_default()));
        if let Some(raw) = self.data_file {
            add(true, format!(",data_file=data.bin,data_file_raw={raw}"));
        }
        o
    }

    fn content(&self) -> Vec<u8> {
        let cluster = 1 << self.cluster_bits;
        disk(u64::from(self.cluster_bits), (700 << 10) / cluster * cluster + cluster + self.tail)
    }
}

fn writes_right(case: &Case) {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let content = case.content();
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    let threads = case.threads.to_string();
    let mut cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "qcow2", "--threads", &threads]);
    if case.compress.is_some() {
        cmd = cmd.arg("-c");
    }
    if case.backing {
        // The backing file must not show through anywhere.
        std::fs::write(dir.join("base.raw"), vec![0x5a; content.len()]).unwrap();
        cmd = cmd.args(["-B", "base.raw", "-F", "raw"]);
    }
    cmd.args(["-o", &case.options(), "in.raw", "out.qcow2"]).dir(dir).ok();

    q.check_clean("out.qcow2");
    q.identical(("raw", "in.raw"), ("qcow2", "out.qcow2"));
    if case.data_file == Some("on") {
        // A raw data file is a raw image of its own.
        let data = std::fs::read(dir.join("data.bin")).unwrap();
        assert!(data.len() >= content.len() && data[..content.len()] == content[..]);
    }
    is_as_asked(&q, dir, case, content.len());
    // And back again, by our own reader.
    diskmill().cmd(["convert", "out.qcow2", "back.raw"]).dir(dir).ok();
    same_content(&dir.join("back.raw"), &content);
}

fn is_as_asked(q: &Oracle, dir: &Path, case: &Case, size: usize) {
    let info = q.info("out.qcow2");
    let data = &info["format-specific"]["data"];
    assert_eq!(info["virtual-size"], size, "{info}");
    assert_eq!(info["cluster-size"], 1u64 << case.cluster_bits, "{info}");
    assert_eq!(data["compat"], if case.v2() { "0.10" } else { "1.1" }, "{info}");
    assert_eq!(data["refcount-bits"], case.refcount_bits, "{info}");
    // QEMU says this only of version 3.
    let lazy = if case.v2() { serde_json::Value::Null } else { case.lazy.into() };
    assert_eq!(data["lazy-refcounts"], lazy, "{info}");
    let extended = if case.v2() { serde_json::Value::Null } else { case.extended.into() };
    assert_eq!(data["extended-l2"], extended, "{info}");
    assert_eq!(data["compression-type"], case.compress.unwrap_or("zlib"), "{info}");
    assert_eq!(info["dirty-flag"], false, "{info}");
    assert_eq!(data.get("data-file").is_some(), case.data_file.is_some(), "{info}");
    if let Some(raw) = case.data_file {
        assert_eq!(data["data-file-raw"], raw == "on", "{info}");
    }
    if case.backing {
        assert_eq!(info["backing-filename"], "base.raw", "{info}");
        assert_eq!(info["backing-filename-format"], "raw", "{info}");
    }
    if case.preallocation == "full" && case.data_file.is_none() {
        let blocks =
            std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(dir.join("out.qcow2")).unwrap());
        assert!(blocks * 512 >= size as u64, "{blocks} blocks: not preallocated");
    }
    if case.compress.is_some() {
        let packed = q.map("out.qcow2", "qcow2").out().contains("\"compressed\": true");
        assert!(packed, "nothing is compressed");
    }
}

#[test]
fn all_pairs_of_options() {
    const REFCOUNTS: [u32; 7] = [16, 1, 2, 4, 8, 32, 64];
    const PACKED: [Option<&str>; 3] = [None, Some("zlib"), Some("zstd")];
    const DATA: [Option<&str>; 3] = [None, Some("off"), Some("on")];
    let case = |row: &[usize]| Case {
        compat: [None, Some("v2"), Some("v3"), Some("0.10"), Some("1.1")][row[0]],
        cluster_bits: [16, 9, 12, 14, 21][row[1]],
        refcount_bits: REFCOUNTS[row[2]],
        preallocation: ["off", "metadata", "falloc", "full"][row[3]],
        lazy: row[4] == 1,
        extended: row[5] == 1,
        data_file: DATA[row[6]],
        compress: PACKED[row[7]],
        backing: row[8] == 1,
        tail: [512, 0, 1536][row[9]],
        threads: [2, 1, 8][row[10]],
    };
    let sizes = [5, 5, 7, 4, 2, 2, 3, 3, 2, 3, 3];
    let rows = pairwise(&sizes, |row| case(row).legal());
    let cases: Vec<Case> = rows.iter().map(|row| case(row)).collect();
    parallel(&cases, writes_right);
}

#[test]
fn every_cluster_size_and_codec() {
    let mut cases = Vec::new();
    for cluster_bits in 9..=21 {
        for compress in [None, Some("zlib"), Some("zstd")] {
            for extended in [false, true] {
                cases.push(Case { cluster_bits, compress, extended, ..PLAIN });
            }
        }
    }
    cases.retain(Case::legal);
    parallel(&cases, writes_right);
}

#[test]
fn every_refcount_width_and_preallocation_in_small_clusters() {
    let mut cases = Vec::new();
    for order in 0..7u32 {
        for preallocation in ["off", "metadata", "falloc", "full"] {
            cases.push(Case { refcount_bits: 1u32 << order, preallocation, cluster_bits: 9, ..PLAIN });
        }
        // Two packed clusters may not share a host cluster when its refcount cannot exceed 1.
        let compress = Some("zlib");
        cases.push(Case { refcount_bits: 1u32 << order, compress, ..PLAIN });
        cases.push(Case { refcount_bits: 1u32 << order, compress, cluster_bits: 9, ..PLAIN });
    }
    parallel(&cases, writes_right);
}

#[test]
fn sizes_from_nothing_to_odd() {
    for len in [0usize, 512, 1024, 65_024, 65_536, 66_048, 1 << 20] {
        for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=2M"] {
            let dir = scratch();
            let dir = dir.path();
            let Some(q) = Oracle::find(dir) else { return };
            std::fs::write(dir.join("in.raw"), disk(1, len)).unwrap();
            let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "qcow2", "-o", options]);
            cmd.args(["in.raw", "out.qcow2"]).dir(dir).ok();
            q.check_clean("out.qcow2");
            assert_eq!(q.info("out.qcow2")["virtual-size"], len);
            q.identical(("raw", "in.raw"), ("qcow2", "out.qcow2"));
        }
    }
}

#[test]
fn levels_change_the_size_and_not_the_content() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    std::fs::write(dir.join("in.raw"), disk(5, 8 << 20)).unwrap();
    for (codec, levels) in [("zlib", ["1", "12"]), ("zstd", ["-7", "22"])] {
        let size = levels.map(|level| {
            let o = format!("compression_type={codec}");
            let cmd = diskmill().cmd(["convert", "-c", "-f", "raw", "-O", "qcow2", "--level", level]);
            cmd.args(["-o", &o, "in.raw", "out.qcow2"]).dir(dir).ok();
            q.check_clean("out.qcow2");
            q.identical(("raw", "in.raw"), ("qcow2", "out.qcow2"));
            std::fs::metadata(dir.join("out.qcow2")).unwrap().len()
        });
        assert!(size[1] < size[0], "{codec}: {size:?}");
    }
    for (codec, level, range) in [
        ("zlib", "0", "1 to 12"),
        ("zlib", "13", "1 to 12"),
        ("zstd", "-8", "-7 to 22"),
        ("zstd", "23", "-7 to 22"),
    ] {
        let o = format!("compression_type={codec}");
        let cmd = diskmill().cmd(["convert", "-c", "-f", "raw", "-O", "qcow2", "--level", level, "-o", &o]);
        let run = cmd.args(["in.raw", "refused.qcow2"]).dir(dir).fails(2);
        run.says(&[&format!("{level} is not a level of {codec}"), range]);
    }
}

#[test]
fn formats_that_always_pack_take_a_level_without_c() {
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("in.raw"), disk(5, 4 << 20)).unwrap();
    for format in [&["-O", "ova"][..], &["-O", "vmdk", "-o", "subformat=streamOptimized"]] {
        let size = ["1", "12"].map(|level| {
            let cmd = diskmill().cmd(["convert", "-f", "raw", "--level", level]).args(format);
            cmd.args(["in.raw", "out"]).dir(dir).ok();
            diskmill().cmd(["compare", "-f", "raw", "in.raw", "out"]).dir(dir).ok();
            std::fs::metadata(dir.join("out")).unwrap().len()
        });
        assert!(size[1] < size[0], "{format:?}: {size:?}");
    }
}

#[test]
fn options_that_exclude_one_another_are_refused_and_leave_nothing() {
    let bad = [
        ("compat=v2,refcount_bits=8", "refcount"),
        ("compat=v2,lazy_refcounts=on", "lazy"),
        ("compat=v2,compression_type=zstd", "compression"),
        ("compat=v2,extended_l2=on", "extended"),
        ("compat=v2,data_file=d", "data"),
        ("extended_l2=on,cluster_size=8k", "extended"),
        ("data_file_raw=on", "data_file"),
        ("cluster_size=1000", "cluster"),
        ("cluster_size=256", "cluster"),
        ("cluster_size=4M", "cluster"),
        ("refcount_bits=3", "refcount"),
        ("refcount_bits=128", "refcount"),
        ("preallocation=some", "preallocation"),
        ("compression_type=lz4", "compression"),
        ("compat=4", "compat"),
        ("size=1G", "size"),
        ("encryption=on", "encrypt"),
        ("encrypt.format=luks", "encrypt"),
        ("no_such_option=1", "no_such_option"),
    ];
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("in.raw"), disk(1, 65536)).unwrap();
    parallel(&bad, |(options, word)| {
        let name = format!("{options}.out");
        let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "qcow2", "-o", options]);
        let out = cmd.args(["in.raw", &name]).dir(dir).fails(2);
        out.no_panic();
        out.says(&[word]);
        assert!(!dir.join(&name).exists(), "{out}");
    });
}

#[test]
fn existing_content_of_the_options_backing_file_is_kept_apart() {
    // backing_file and backing_fmt as -o options mean what -B and -F mean.
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    std::fs::write(dir.join("in.raw"), disk(2, 1 << 20)).unwrap();
    std::fs::write(dir.join("base.raw"), disk(3, 1 << 20)).unwrap();
    let o = "backing_file=base.raw,backing_fmt=raw";
    let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "qcow2", "-o", o]);
    cmd.args(["in.raw", "out.qcow2"]).dir(dir).ok();
    q.check_clean("out.qcow2");
    q.identical(("raw", "in.raw"), ("qcow2", "out.qcow2"));
    assert_eq!(q.info("out.qcow2")["backing-filename"], "base.raw");
}
