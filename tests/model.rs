//! Random images: operations applied by qemu-io and to a plain disk in memory must read the same.
//!
//! `PROPTEST_CASES` sets the number of cases (default 64 here); a failure prints the smallest case.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use diskmill_testkit::{
    ModelDisk, Op, Oracle, Step, Tool, legalise, ops, proptest_config, same_content, scratch, unpack,
};
use proptest::prelude::*;

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

/// One image file: how it is created and what happens to it.
#[derive(Clone, Debug)]
struct Layer {
    v2: bool,
    cluster_bits: u32,
    refcount_order: u32,
    zstd: bool,
    extended: bool,
    size: u64,
    steps: Vec<Step>,
    /// A snapshot is taken after these, and then `later` happens.
    snapshot: bool,
    later: Vec<Step>,
}

impl Layer {
    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn options(&self) -> String {
        let mut o = format!("cluster_size={}", self.cluster());
        if self.v2 {
            return o + ",compat=v2";
        }
        o += &format!(",refcount_bits={}", 1u32 << self.refcount_order);
        o += if self.zstd { ",compression_type=zstd" } else { "" };
        o += if self.extended { ",extended_l2=on" } else { "" };
        o
    }
}

fn layer() -> impl Strategy<Value = Layer> {
    let cluster_bits = prop_oneof![2 => 9..=12u32, 3 => 13..=16u32, 1 => 17..=21u32];
    let kind = (any::<[bool; 4]>(), 0..7u32, cluster_bits, 1..=1600u64);
    kind.prop_flat_map(|([v2, zstd, extended, snapshot], order, cluster_bits, sectors)| {
        let cluster = 1 << cluster_bits;
        // A small image in small clusters crosses L2 tables; in large ones it needs a few clusters.
        let size = sectors * 512 + 3 * cluster * u64::from(cluster_bits > 16);
        let steps = (ops(size, cluster, 1..20), ops(size, cluster, 1..12));
        steps.prop_map(move |(mut steps, mut later)| {
            legalise(&mut steps, size, cluster);
            unpack(&mut later);
            legalise(&mut later, size, cluster);
            Layer {
                v2,
                cluster_bits,
                // A snapshot doubles refcounts, and packed clusters share host clusters.
                refcount_order: if snapshot { order.max(4) } else { order },
                zstd,
                extended: extended && !v2 && cluster_bits >= 14,
                size,
                steps,
                snapshot,
                later,
            }
        })
    })
}

/// How the copy is made.
#[derive(Clone, Debug)]
struct Target {
    options: String,
    compress: bool,
    threads: u32,
}

fn target() -> impl Strategy<Value = Target> {
    let bits = (9..=21u32, 0..7u32, 0..3u32);
    (any::<[bool; 4]>(), bits).prop_map(|([v2, zstd, extended, compress], (cluster, order, t))| {
        let mut options = format!("cluster_size={}", 1u64 << cluster);
        if v2 {
            options += ",compat=v2";
        } else {
            options += &format!(",refcount_bits={}", 1u32 << order);
            options += if zstd { ",compression_type=zstd" } else { "" };
            options += if extended && cluster >= 14 { ",extended_l2=on" } else { "" };
        }
        Target { options, compress, threads: 1 << t }
    })
}

fn check(layers: &[Layer], target: &Target) {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let mut model = ModelDisk::new(0, 512);
    let mut snapshot = None;
    for (i, layer) in layers.iter().enumerate() {
        let name = format!("layer{i}.qcow2");
        match i {
            0 => q.create(&name, &layer.options(), layer.size),
            _ => {
                let below = format!("layer{}.qcow2", i - 1);
                q.create_over(&name, &layer.options(), layer.size, (&below, "qcow2"));
            }
        }
        model = if i == 0 {
            ModelDisk::new(layer.size, layer.cluster())
        } else {
            ModelDisk::over(&model, layer.size, layer.cluster(), layer.v2)
        };
        let packs = |step: &Step| matches!(step.op, Op::Compressed(_));
        if let Err(refusal) = q.try_write(&name, "qcow2", &layer.steps) {
            // Only what QEMU is known to refuse may end a case.
            assert!(layer.steps.iter().any(packs), "{refusal}");
            eprintln!("SKIPPED: a case whose compressed writes qemu-io refuses");
            return;
        }
        layer.steps.iter().for_each(|step| model.apply(step));
        snapshot = None;
        if layer.snapshot {
            snapshot = Some(model.clone());
            q.snapshot(&name, "then");
            q.write(&name, "qcow2", &layer.later);
            layer.later.iter().for_each(|step| model.apply(step));
        }
    }
    let top = format!("layer{}.qcow2", layers.len() - 1);
    let wrong = "the test is wrong: qemu-img reads something else than the model";
    assert!(q.content(&top, "qcow2") == model.bytes(), "{wrong}");

    diskmill().cmd(["convert", "-f", "qcow2", &top, "out.raw"]).dir(dir).ok();
    same_content(&dir.join("out.raw"), model.bytes());
    if let Some(snapshot) = snapshot {
        let cmd = diskmill().cmd(["convert", "-f", "qcow2", "-l", "then", &top, "then.raw"]);
        cmd.dir(dir).ok();
        same_content(&dir.join("then.raw"), snapshot.bytes());
    }
    let threads = target.threads.to_string();
    let mut cmd = diskmill().cmd(["convert", "-f", "qcow2", "-O", "qcow2", "--threads", &threads]);
    if target.compress {
        cmd = cmd.arg("-c");
    }
    cmd.args(["-o", &target.options, &top, "out.qcow2"]).dir(dir).ok();
    q.check_clean("out.qcow2");
    q.identical(("qcow2", &top), ("qcow2", "out.qcow2"));
}

proptest! {
    #![proptest_config(proptest_config(64, 300))]

    #[test]
    fn one_image(layer in layer(), target in target()) {
        check(&[layer], &target);
    }

    #[test]
    fn a_backing_chain(layers in proptest::collection::vec(layer(), 2..4), target in target()) {
        check(&layers, &target);
    }
}
