//! `measure`, `commit` and `rebase` under qemu-img's name, against qemu-img itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[path = "support/pair.rs"]
mod pair;

use diskmill_testkit::Oracle;
use pair::Pair;

/// What qemu-io does to an image.
fn io(oracle: &Oracle, image: &str, format: &str, commands: &[&str]) {
    let args = commands.iter().flat_map(|command| ["-c", command]);
    oracle.io(["-f", format]).args(args).arg(image).ok();
}

fn to_measure(oracle: &Oracle) {
    oracle.create("a.qcow2", "", 10 << 20);
    io(oracle, "a.qcow2", "qcow2", &["write 100k 3k", "write 1M 1M", "write -z 5M 1M"]);
    oracle.img(["bitmap", "--add", "a.qcow2", "one"]).ok();
    oracle.img(["bitmap", "--add", "-g", "512", "a.qcow2", "another-one"]).ok();
    oracle.snapshot("a.qcow2", "s1");
    io(oracle, "a.qcow2", "qcow2", &["write 0 64k"]);
    oracle.create("v2.qcow2", "compat=0.10,cluster_size=4k", 10 << 20);
    io(oracle, "v2.qcow2", "qcow2", &["write 5k 20k"]);
    oracle.create_over("top.qcow2", "extended_l2=on", 12 << 20, ("a.qcow2", "qcow2"));
    io(oracle, "top.qcow2", "qcow2", &["write 11M 4k"]);
    oracle.img(["convert", "-c", "-O", "qcow2", "a.qcow2", "packed.qcow2"]).ok();
    oracle.img(["convert", "-O", "vmdk", "a.qcow2", "a.vmdk"]).ok();
    oracle.img(["convert", "-O", "raw", "a.qcow2", "a.raw"]).ok();
    std::fs::write(oracle.dir().join("odd.raw"), [1; 1000]).unwrap();
}

#[test]
fn figures_are_the_same() {
    let Some(pair) = Pair::new(to_measure) else { return };
    for target in [
        "-O raw",
        "-O qcow2",
        "-O qcow2 --output json",
        "-O qcow2 -o cluster_size=512",
        "-O qcow2 -o cluster_size=2M,refcount_bits=64",
        "-O qcow2 -o refcount_bits=1,extended_l2=on",
        "-O qcow2 -o compat=0.10",
        "-O qcow2 -o preallocation=metadata",
        "-O qcow2 -o preallocation=falloc",
        "-O qcow2 -o backing_file=foo,backing_fmt=raw",
        "-O qcow2 -o data_file=foo,lazy_refcounts=on,compat=0.10",
    ] {
        for source in [
            "a.qcow2",
            "-l s1 a.qcow2",
            "v2.qcow2",
            "top.qcow2",
            "packed.qcow2",
            "a.vmdk",
            "-f raw a.raw",
            "odd.raw",
        ] {
            pair.same(&format!("measure {target} {source}"));
        }
        for size in ["0", "1", "1G", "100G", "16T"] {
            if target.contains("=512") && size == "16T" {
                continue;
            }
            pair.same(&format!("measure {target} --size {size}"));
        }
    }
    pair.same("measure -U --image-opts -O qcow2 driver=qcow2,file.filename=a.qcow2");
    pair.same("measure --size 1E -O qcow2 -o cluster_size=2M --output=json");
    let luks = "measure --object secret,id=s,data=abc -O qcow2 --size 1G -o encrypt.format=luks,encrypt.key-secret=s";
    pair.same(luks);
    pair.same(&format!("{luks},encrypt.cipher-mode=cbc,encrypt.cipher-alg=aes-128,cluster_size=512"));
}

#[test]
fn mistakes_of_measure_are_told_the_same() {
    let Some(pair) = Pair::new(to_measure) else { return };
    for line in [
        "measure",
        "measure a.qcow2 a.raw",
        "measure --size 1G a.raw",
        "measure -f raw",
        "measure --size 1G -l x",
        "measure --size 1G --image-opts",
        "measure --size 9E",
        "measure --size 1G -O foo",
        "measure --size 1G -O dmg",
        "measure --size 1G -O vmdk",
        "measure -O vmdk a.qcow2",
        "measure nonexistent",
        "measure -l foo a.qcow2",
        "measure --size 1G -O qcow2 -o foo=1",
        "measure --size 1G -O qcow2 -o help",
        "measure --size 1G -O raw -o foo=1",
        "measure --size 1E -O qcow2",
        "measure --size 1G -O qcow2 -o cluster_size=1000",
        "measure --size 1G -O qcow2 -o extended_l2=on,cluster_size=8k",
        "measure --size 1G -O qcow2 -o preallocation=foo",
        "measure --size 1G -O qcow2 -o compat=foo",
        "measure --size 1G -O qcow2 -o compat=v3",
        "measure --size 1G -O qcow2 -o refcount_bits=3",
        "measure --size 1G -O qcow2 -o compat=0.10,refcount_bits=8",
        "measure --size 1G -O qcow2 -o encrypt.format=luks",
        "measure --size 1G -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s",
    ] {
        pair.same_but_hint(line);
    }
}
