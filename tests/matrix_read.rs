//! Every kind of qcow2 image that qemu-img and qemu-io write converts to raw byte for byte.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use diskmill_testkit::content::{Pattern, disk, fill};
use diskmill_testkit::{
    ModelDisk, Oracle, Step, Tool, args, pairwise, parallel, same_content, scratch, steps,
};

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Backing {
    None,
    Qcow2,
    Raw,
    Short,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    compat: &'static str,
    cluster_bits: u32,
    refcount_bits: u32,
    codec: Option<&'static str>,
    extended: bool,
    backing: Backing,
    data_file: Option<&'static str>,
    preallocation: &'static str,
    snapshots: bool,
    tail: u64,
}

const PLAIN: Case = Case {
    compat: "v3",
    cluster_bits: 16,
    refcount_bits: 16,
    codec: None,
    extended: false,
    backing: Backing::None,
    data_file: None,
    preallocation: "off",
    snapshots: false,
    tail: 512,
};

impl Case {
    /// What qemu-img can create.
    fn legal(&self) -> bool {
        let v2 = self.compat == "v2";
        let wants_v3 = self.refcount_bits != 16
            || self.codec == Some("zstd")
            || self.extended
            || self.data_file.is_some();
        let small = self.extended && self.cluster_bits < 14;
        let over = self.backing != Backing::None;
        let bad_data = self.data_file.is_some()
            && (self.codec.is_some() || self.snapshots || (over && self.data_file == Some("on")));
        let bad_preallocation = over && self.preallocation != "off" && !self.extended;
        // A snapshot needs a refcount of 2.
        let narrow = self.snapshots && self.refcount_bits == 1;
        !((v2 && wants_v3) || small || bad_data || bad_preallocation || narrow)
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Several L2 tables where clusters are small, several clusters where they are large.
    fn size(&self) -> u64 {
        (600 << 10) / self.cluster() * self.cluster() + 2 * self.cluster() + self.tail
    }

    fn options(&self) -> String {
        let mut o = format!(
            "compat={},cluster_size={},refcount_bits={},preallocation={}",
            self.compat,
            self.cluster(),
            self.refcount_bits,
            self.preallocation
        );
        if self.extended {
            o += ",extended_l2=on";
        }
        if let Some(codec) = self.codec {
            o += &format!(",compression_type={codec}");
        }
        if let Some(raw) = self.data_file {
            o += &format!(",data_file=data.bin,data_file_raw={raw}");
        }
        o
    }

    fn steps(&self, seed: u64) -> Vec<Step> {
        steps(seed, self.size(), self.cluster(), 14, self.codec.is_some())
    }
}

/// Writes the image `top.qcow2`; gives its content, and that of the snapshot `one` if there is one.
fn write(q: &Oracle, dir: &Path, case: &Case) -> (ModelDisk, Option<ModelDisk>) {
    let size = case.size();
    let mut model = match case.backing {
        Backing::None => {
            q.create("top.qcow2", &case.options(), size);
            ModelDisk::new(size, case.cluster())
        }
        Backing::Qcow2 => {
            q.create("base", "", size + 4096);
            let mut base = ModelDisk::new(size + 4096, 65536);
            let written = steps(7, size + 4096, 65536, 8, true);
            q.write("base", "qcow2", &written);
            written.iter().for_each(|step| base.apply(step));
            q.create_over("top.qcow2", &case.options(), size, ("base", "qcow2"));
            ModelDisk::over(&base, size, case.cluster(), case.compat == "v2")
        }
        Backing::Raw | Backing::Short => {
            let len = if case.backing == Backing::Raw { size } else { size / 1024 * 512 };
            let content = disk(3, usize::try_from(len).unwrap());
            std::fs::write(dir.join("base"), &content).unwrap();
            q.create_over("top.qcow2", &case.options(), size, ("base", "raw"));
            let base = ModelDisk::holding(content, 512);
            ModelDisk::over(&base, size, case.cluster(), case.compat == "v2")
        }
    };
    let first = case.steps(11);
    q.write("top.qcow2", "qcow2", &first);
    first.iter().for_each(|step| model.apply(step));
    let mut snapshot = None;
    if case.snapshots {
        snapshot = Some(model.clone());
        q.snapshot("top.qcow2", "one");
        // Not compressed: the clusters are taken.
        let second = steps(12, size, case.cluster(), 8, false);
        q.write("top.qcow2", "qcow2", &second);
        second.iter().for_each(|step| model.apply(step));
        q.snapshot("top.qcow2", "two");
    }
    (model, snapshot)
}

fn reads_right(case: &Case) {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let (model, snapshot) = write(&q, dir, case);
    assert!(
        q.content("top.qcow2", "qcow2") == model.bytes(),
        "the test is wrong: qemu-img reads something else than the model"
    );
    let convert = |more: &[&str]| {
        let cmd = diskmill().cmd(["convert", "-f", "qcow2"]).args(more);
        cmd.args(["top.qcow2", "out.raw"]).dir(dir).ok();
    };
    convert(&[]);
    same_content(&dir.join("out.raw"), model.bytes());
    if let Some(snapshot) = snapshot {
        // By name and by id.
        for key in ["one", "1"] {
            convert(&["-l", key]);
            same_content(&dir.join("out.raw"), snapshot.bytes());
        }
    }
}

#[test]
fn all_pairs_of_options() {
    const REFCOUNTS: [u32; 7] = [16, 1, 2, 4, 8, 32, 64];
    const CODECS: [Option<&str>; 3] = [None, Some("zlib"), Some("zstd")];
    const BACKINGS: [Backing; 4] = [Backing::None, Backing::Qcow2, Backing::Raw, Backing::Short];
    const DATA: [Option<&str>; 3] = [None, Some("off"), Some("on")];
    const MODES: [&str; 4] = ["off", "metadata", "falloc", "full"];
    let case = |row: &[usize]| Case {
        compat: ["v3", "v2"][row[0]],
        cluster_bits: [16, 9, 12, 14, 21][row[1]],
        refcount_bits: REFCOUNTS[row[2]],
        codec: CODECS[row[3]],
        extended: row[4] == 1,
        backing: BACKINGS[row[5]],
        data_file: DATA[row[6]],
        preallocation: MODES[row[7]],
        snapshots: row[8] == 1,
        tail: [512, 0][row[9]],
    };
    let rows = pairwise(&[2, 5, 7, 3, 2, 4, 3, 4, 2, 2], |row| case(row).legal());
    let cases: Vec<Case> = rows.iter().map(|row| case(row)).collect();
    parallel(&cases, reads_right);
}

#[test]
fn every_cluster_size() {
    let mut cases = Vec::new();
    for cluster_bits in 9..=21 {
        for codec in [None, Some("zlib"), Some("zstd")] {
            for extended in [false, true] {
                cases.push(Case { cluster_bits, codec, extended, ..PLAIN });
            }
        }
        cases.push(Case { cluster_bits, compat: "v2", codec: Some("zlib"), ..PLAIN });
    }
    cases.retain(Case::legal);
    parallel(&cases, reads_right);
}

#[test]
fn every_refcount_width_with_snapshots() {
    let case = |order: u32| Case { refcount_bits: 1u32 << order, cluster_bits: 9, ..PLAIN };
    let cases: Vec<Case> = (0..7)
        .flat_map(|order| [true, false].map(|snapshots| Case { snapshots, ..case(order) }))
        .filter(Case::legal)
        .collect();
    parallel(&cases, reads_right);
}

#[test]
fn compressed_images_of_qemu_img_convert() {
    let cases: Vec<(u32, &str, bool)> = [9, 12, 14, 16, 18, 21]
        .into_iter()
        .flat_map(|bits| [(bits, "zlib"), (bits, "zstd")])
        .flat_map(|(bits, codec)| [(bits, codec, false), (bits, codec, true)])
        .filter(|&(bits, _, extended)| !extended || bits >= 14)
        .collect();
    parallel(&cases, |&(bits, codec, extended)| {
        let dir = scratch();
        let dir = dir.path();
        let Some(q) = Oracle::find(dir) else { return };
        let content = disk(u64::from(bits), (5 << 20) + 512 * 3);
        std::fs::write(dir.join("in.raw"), &content).unwrap();
        let extended = if extended { "on" } else { "off" };
        let o = format!("cluster_size={},compression_type={codec},extended_l2={extended}", 1u64 << bits);
        q.img(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &o, "in.raw", "a.qcow2"]).ok();
        diskmill().cmd(["convert", "a.qcow2", "out.raw"]).dir(dir).ok();
        same_content(&dir.join("out.raw"), &content);
    });
}

#[test]
fn chains_of_three_with_different_clusters() {
    let cases: Vec<(u32, u32, u32)> = vec![(16, 9, 21), (9, 16, 12), (21, 14, 9), (12, 12, 12)];
    parallel(&cases, |&(a, b, c)| {
        let dir = scratch();
        let dir = dir.path();
        let Some(q) = Oracle::find(dir) else { return };
        // Shorter and longer than the layer above.
        let layers = [
            ("base.qcow2", a, 2 << 20),
            ("mid.qcow2", b, (1 << 20) + 1536),
            ("top.qcow2", c, (3 << 20) + 512),
        ];
        let mut model = ModelDisk::new(0, 512);
        for (i, (name, bits, size)) in layers.into_iter().enumerate() {
            let cluster = 1u64 << bits;
            let o = format!("cluster_size={cluster}");
            match i {
                0 => q.create(name, &o, size),
                _ => q.create_over(name, &o, size, (layers[i - 1].0, "qcow2")),
            }
            model = ModelDisk::over(&model, size, cluster, false);
            let written = steps(i as u64, size, cluster, 10, true);
            q.write(name, "qcow2", &written);
            written.iter().for_each(|step| model.apply(step));
        }
        assert!(q.content("top.qcow2", "qcow2") == model.bytes(), "the test is wrong");
        diskmill().cmd(["convert", "top.qcow2", "out.raw"]).dir(dir).ok();
        same_content(&dir.join("out.raw"), model.bytes());
    });
}

#[test]
fn the_image_in_testdata_reads_like_qemu_img_reads_it() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    for entry in std::fs::read_dir(diskmill_testkit::workspace_root().join("testdata")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "qcow2") {
            let out = dir.join("out.raw");
            diskmill().cmd(args!["convert", path, "-O", "raw", out]).ok();
            same_content(&out, &q.content(&path, "qcow2"));
        }
    }
}

#[test]
fn a_raw_image_is_copied_as_it_is() {
    let dir = scratch();
    let dir = dir.path();
    for (i, len) in [0, 512, 4096, 65_536, (3 << 20) + 512].into_iter().enumerate() {
        let content = disk(i as u64, len);
        std::fs::write(dir.join("in.raw"), &content).unwrap();
        diskmill().cmd(["convert", "-f", "raw", "in.raw", "out.raw"]).dir(dir).ok();
        same_content(&dir.join("out.raw"), &content);
    }
    // A raw image that holds a qcow2 header is still raw when the user says so.
    let mut content = b"QFI\xfb\0\0\0\x03".to_vec();
    content.extend(fill(Pattern::Text, 1, 4096 - 8));
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    diskmill().cmd(["convert", "-f", "raw", "in.raw", "out.raw"]).dir(dir).ok();
    same_content(&dir.join("out.raw"), &content);
}
