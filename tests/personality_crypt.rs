//! Encryption under qemu-img's name, against qemu-img itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[path = "support/pair.rs"]
mod pair;

use diskmill_testkit::Oracle;
use diskmill_testkit::content::disk;
use pair::Pair;

const OBJECT: &str = "--object secret,id=s,data=abc --object secret,id=t,data=other";

fn nothing(_: &Oracle) {}

/// The image as `--image-opts` take it.
fn opts(image: &str, secret: &str) -> String {
    format!("driver=qcow2,encrypt.key-secret={secret},file.filename={image}")
}

/// Both programs find ours without damage and leaks.
fn sound(pair: &Pair, image: &str, secret: &str) {
    let ours = pair.oracle.at(pair.ours.path());
    ours.img(["check", "-q", "--image-opts"]).args(OBJECT.split(' ')).arg(opts(image, secret)).ok();
    pair.same(&format!("check -q {OBJECT} --image-opts {}", opts(image, secret)));
}

#[test]
fn mistakes_with_encryption_are_told_the_same() {
    let Some(pair) = Pair::new(nothing) else { return };
    for options in [
        "encryption=on",
        "encryption=off",
        "encrypt.format=aes",
        "encrypt.format=aes,encrypt.key-secret=gone",
        "encrypt.format=aes,encrypt.key-secret=s,encrypt.cipher-alg=aes-256",
        "encrypt.format=aes,encrypt.key-secret=s,encrypt.iter-time=10",
        "encryption=on,encrypt.format=luks,encrypt.key-secret=s",
        "encryption=on,encrypt.format=aes,encrypt.key-secret=s",
        "encrypt.format=foo,encrypt.key-secret=s",
        "encrypt.key-secret=s",
        "encrypt.cipher-alg=aes-256",
        "encrypt.format=luks",
    ] {
        pair.same(&format!("create -f qcow2 {OBJECT} -o {options} new.qcow2 1M"));
    }
}

#[test]
fn legacy_aes_is_the_same() {
    let fill = |oracle: &Oracle| {
        std::fs::write(oracle.dir().join("plain"), disk(3, 2 << 20)).unwrap();
    };
    let Some(pair) = Pair::new(fill) else { return };
    for options in [
        "encryption=on,encrypt.key-secret=s",
        "encrypt.format=aes,encrypt.key-secret=s,compat=0.10",
        "encryption=off,encrypt.format=aes,encrypt.key-secret=s,cluster_size=4k",
    ] {
        pair.same(&format!("create -f qcow2 {OBJECT} -o {options} a.qcow2 1M"));
        sound(&pair, "a.qcow2", "s");
        pair.same(&format!("convert {OBJECT} -f raw -O qcow2 -o {options} plain b.qcow2"));
        sound(&pair, "b.qcow2", "s");
        pair.same(&format!("measure {OBJECT} -O qcow2 -o {options} -f raw plain"));
        let image = opts("b.qcow2", "s");
        let ours = pair.oracle.at(pair.ours.path());
        let object = OBJECT.split(' ');
        ours.img(["compare", "--image-opts"])
            .args(object)
            .args([&image, "driver=raw,file.filename=plain"])
            .ok();
        pair.same(&format!("compare {OBJECT} --image-opts {image} driver=raw,file.filename=plain"));
    }
}
