//! Packed clusters and grains that are taken over as they are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::os::unix::fs::FileExt;
use std::path::Path;

use diskmill_testkit::content::{Pattern, fill};
use diskmill_testkit::{Oracle, Tool, scratch};
use serde_json::Value;

const MIB: usize = 1 << 20;
const STREAM: [&str; 2] = ["-o", "subformat=streamOptimized"];

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

fn convert(dir: &Path, args: &[&str]) -> Value {
    diskmill().cmd(["convert", "--json"]).args(args).dir(dir).ok().json()
}

fn number(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("no {key} in {report}"))
}

/// Text, zeros and random bytes: 6 MiB and three sectors.
fn content() -> Vec<u8> {
    let mut bytes = fill(Pattern::Text, 7, 6 * MIB + 1536);
    bytes[2 * MIB..3 * MIB].fill(0);
    bytes[4 * MIB..5 * MIB].copy_from_slice(&fill(Pattern::Random, 7, MIB));
    bytes
}

#[test]
fn clusters_are_as_large_as_the_units_of_the_source() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let content = content();
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    let cluster = |args: &[&str]| {
        let report = convert(dir, &[&["-O", "qcow2"], args, &["out.qcow2"]].concat());
        let got = q.content("out.qcow2", "qcow2");
        assert!(got[..content.len()] == content, "{args:?}");
        q.check_clean("out.qcow2");
        (q.info("out.qcow2")["cluster-size"].as_u64().unwrap(), number(&report, "bytes-passed-packed") > 0)
    };
    let k64 = 64 << 10;
    for (name, options) in [("4k", "cluster_size=4k"), ("2M", "cluster_size=2M"), ("512", "cluster_size=512")]
    {
        let image = format!("{name}.qcow2");
        q.img(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "in.raw", &image]).ok();
        let size = q.info(&image)["cluster-size"].as_u64().unwrap();
        assert_eq!(cluster(&["-c", &image]), (size, true));
        assert_eq!(cluster(&[&image]), (k64, false), "what is not packed keeps the default");
        assert_eq!(cluster(&["-c", "-o", "cluster_size=32k", &image]), (32 << 10, false));
        assert_eq!(cluster(&["-c", "-o", "compression_type=zstd", &image]), (k64, false));
        assert_eq!(cluster(&["-c", "--recompress", &image]), (k64, false));
        assert_eq!(cluster(&["-c", "--level", "2", &image]), (k64, false));
    }
    // extended_l2 has no clusters that small.
    assert_eq!(cluster(&["-c", "-o", "extended_l2=on", "4k.qcow2"]), (k64, false));
    assert_eq!(cluster(&["-c", "in.raw"]), (k64, false));
    q.img(["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "in.raw", "plain.qcow2"]).ok();
    assert_eq!(cluster(&["-c", "plain.qcow2"]), (k64, false), "nothing in it is packed");
    convert(dir, &[&["-O", "vmdk"], &STREAM[..], &["in.raw", "in.vmdk"]].concat());
    assert_eq!(cluster(&["-c", "in.vmdk"]), (k64, true));
}

#[test]
fn payloads_that_are_trusted_are_not_unpacked() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let content = content();
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    for codec in ["zlib", "zstd"] {
        let option = format!("compression_type={codec}");
        for cluster in ["cluster_size=64k", "cluster_size=4k", "cluster_size=2M"] {
            let both = format!("{option},{cluster}");
            q.img(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &both, "in.raw", "in.qcow2"]).ok();
            let base = ["-c", "-O", "qcow2", "-o", &option, "in.qcow2"];
            let checked = convert(dir, &[&base[..], &["checked.qcow2"]].concat());
            let trusted = convert(dir, &[&base[..], &["--trust-packed", "trusted.qcow2"]].concat());
            let key = "bytes-passed-packed";
            // Of a cluster that is packed and zero, only the one knows that it is.
            assert!(number(&trusted, key) >= number(&checked, key), "{both}: {checked} {trusted}");
            assert!(number(&checked, key) > MIB as u64, "{checked}");
            q.check_clean("trusted.qcow2");
            assert!(q.content("trusted.qcow2", "qcow2") == content, "{both}");
            let len = |name: &str| std::fs::metadata(dir.join(name)).unwrap().len();
            assert!(len("trusted.qcow2") < len("checked.qcow2") + 64 * 1024, "{both}");
            convert(
                dir,
                &["-c", "-O", "qcow2", "--trust-packed", "-o", &option, "trusted.qcow2", "again.qcow2"],
            );
            assert!(q.content("again.qcow2", "qcow2") == content, "{both}");
        }
    }
    convert(dir, &[&["-O", "vmdk"], &STREAM[..], &["in.raw", "in.vmdk"]].concat());
    let report = convert(dir, &["-c", "-O", "qcow2", "--trust-packed", "in.vmdk", "out.qcow2"]);
    assert!(number(&report, "bytes-passed-packed") >= 4 << 20, "{report}");
    q.check_clean("out.qcow2");
    assert!(q.content("out.qcow2", "qcow2")[..content.len()] == content);
    // Here the length and the checksum of each stream are needed, so each is unpacked.
    for source in ["in.vmdk", "trusted.qcow2"] {
        convert(dir, &[&["-O", "vmdk", "--trust-packed"], &STREAM[..], &[source, "out.vmdk"]].concat());
        assert!(q.content("out.vmdk", "vmdk")[..content.len()] == content, "{source}");
        let stream = std::fs::read(dir.join("out.vmdk")).unwrap();
        if source == "in.vmdk" {
            diskmill_testkit::stream_optimized::check(&stream).unwrap();
        }
    }
}

#[test]
fn only_who_trusts_misses_damage() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    std::fs::write(dir.join("in.raw"), fill(Pattern::Text, 3, 2 * MIB)).unwrap();
    q.img(["convert", "-c", "-f", "raw", "-O", "qcow2", "in.raw", "in.qcow2"]).ok();
    let file = std::fs::File::options().write(true).open(dir.join("in.qcow2")).unwrap();
    let len = file.metadata().unwrap().len();
    // Payloads follow header, refcount table and block, L1 and L2 table, a cluster each.
    let payloads = 5 * (64 << 10);
    file.write_all_at(&[0xff; 4096], payloads + (len - payloads) / 2).unwrap();
    let base = ["convert", "-c", "-O", "qcow2", "in.qcow2", "out.qcow2"];
    diskmill().cmd(base).dir(dir).fails(1).says(&["compressed cluster"]);
    diskmill().cmd(base).arg("--trust-packed").dir(dir).ok();
    for other in ["--salvage", "--recompress"] {
        diskmill().cmd(base).args(["--trust-packed", other]).dir(dir).fails(2).says(&["--trust-packed"]);
    }
}
