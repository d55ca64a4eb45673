//! Encrypted qcow2 images: QEMU reads ours, we read QEMU's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use diskmill_testkit::content::disk;
use diskmill_testkit::{Oracle, Tool, scratch};

const SECRET: &str = "secret,id=s,data=correct horse";
const SIZE: usize = 3 << 20;

/// What stands after `encrypt.format=luks`.
const VARIANTS: [&str; 9] = [
    "",
    ",encrypt.cipher-alg=aes-128",
    ",encrypt.cipher-alg=aes-192,encrypt.ivgen-alg=plain",
    ",encrypt.cipher-alg=serpent-256,encrypt.hash-alg=sha512",
    ",encrypt.cipher-alg=twofish-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256",
    ",encrypt.hash-alg=sha1,cluster_size=512",
    ",encrypt.hash-alg=ripemd160,cluster_size=2M",
    ",extended_l2=on",
    ",data_file=outside.data",
];

fn diskmill(dir: &Path) -> impl Fn(&[&str]) -> diskmill_testkit::Cmd {
    let dir = dir.to_owned();
    move |args| Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(args).dir(&dir)
}

/// The image as qemu-img's commands take it with `--image-opts`.
fn opts(image: &str) -> String {
    format!("driver=qcow2,encrypt.key-secret=s,file.filename={image}")
}

#[test]
fn qemu_reads_what_we_encrypt() {
    let dir = scratch();
    let Some(qemu) = Oracle::find(dir.path()) else { return };
    let run = diskmill(dir.path());
    std::fs::write(dir.path().join("plain"), disk(3, SIZE)).unwrap();
    std::fs::write(dir.path().join("key"), "correct horse\n").unwrap();
    let preallocated =
        [",preallocation=full", ",preallocation=metadata", ",preallocation=falloc,cluster_size=4k"];
    let luks = VARIANTS.into_iter().chain(preallocated);
    let luks = luks.map(|variant| format!("encrypt.format=luks,encrypt.iter-time=5{variant}"));
    let aes = [
        "",
        ",cluster_size=512,compat=0.10",
        ",extended_l2=on",
        ",data_file=outside.data",
        ",preallocation=metadata",
        ",preallocation=full",
        ",preallocation=falloc,extended_l2=on",
    ];
    for options in luks.chain(aes.map(|variant| format!("encrypt.format=aes{variant}"))) {
        run(&["convert", "-O", "qcow2", "--target-key-file", "key", "-o", &options, "plain", "ours"]).ok();
        qemu.img(["check", "-q", "--object", SECRET, "--image-opts", &opts("ours")]).ok();
        qemu.img([
            "compare",
            "--object",
            SECRET,
            "--image-opts",
            &opts("ours"),
            "driver=raw,file.filename=plain",
        ])
        .ok();
        run(&["compare", "--key-file", "key", "ours", "plain"]).ok();
        let ours = qemu.img(["info", "--output=json", "ours"]).ok().out();
        assert_eq!(run(&["info", "--output=json", "ours"]).ok().out(), ours, "{options}");
    }
}

#[test]
fn we_read_what_qemu_encrypts() {
    let dir = scratch();
    let Some(qemu) = Oracle::find(dir.path()) else { return };
    let run = diskmill(dir.path());
    std::fs::write(dir.path().join("plain"), disk(4, SIZE)).unwrap();
    // QEMU tries for seconds how fast the machine hashes: not every variant, then.
    let luks = [VARIANTS[0], VARIANTS[4], VARIANTS[8]]
        .map(|variant| format!("encrypt.format=luks,encrypt.iter-time=5{variant}"));
    let aes = ["", ",cluster_size=512", ",compat=0.10"].map(|variant| format!("encrypt.format=aes{variant}"));
    for options in luks.iter().chain(&aes) {
        let options = format!("{options},encrypt.key-secret=s");
        qemu.img(["convert", "--object", SECRET, "-O", "qcow2", "-o", &options, "plain", "theirs"]).ok();
        run(&["compare", "--object", SECRET, "theirs", "plain"]).ok();
        let map = qemu
            .img(["map", "--output=json", "--object", SECRET, "--image-opts", &opts("theirs")])
            .ok()
            .out();
        assert_eq!(run(&["map", "--output=json", "--object", SECRET, "theirs"]).ok().out(), map, "{options}");
        let info = qemu.img(["info", "theirs"]).ok().out();
        assert_eq!(run(&["info", "theirs"]).ok().out(), info, "{options}");
    }
}

#[test]
fn an_overlay_and_its_backing_file_have_keys_of_their_own() {
    let dir = scratch();
    let Some(qemu) = Oracle::find(dir.path()) else { return };
    let run = diskmill(dir.path());
    let create = |secret: &str, image: &str, more: &[&str]| {
        let options = "encrypt.format=luks,encrypt.iter-time=5,encrypt.key-secret=s";
        let secret = format!("secret,id=s,data={secret}");
        let args = ["create", "-q", "--object", &secret, "-f", "qcow2", "-o", options];
        qemu.img(args).args(more).arg(image).arg("1M").ok();
        let write = format!("driver=qcow2,encrypt.key-secret=s,file.filename={image},backing=");
        qemu.io(["--object", &secret, "--image-opts", &write, "-c"])
            .arg(if image == "base" { "write -P 1 0 256k" } else { "write -P 2 128k 256k" })
            .ok();
    };
    create("one", "base", &[]);
    create("two", "top", &["-u", "-b", "base", "-F", "qcow2"]);
    let keys = ["--object", "secret,id=a,data=two", "--object", "secret,id=b,data=one"];
    run(&["convert", "top", "flat"]).args(keys).ok();
    let mut want = vec![0; 1 << 20];
    want[..128 << 10].fill(1);
    want[128 << 10..384 << 10].fill(2);
    assert!(std::fs::read(dir.path().join("flat")).unwrap() == want);
}

#[test]
fn without_its_passphrase_an_image_is_not_read() {
    let dir = scratch();
    let run = diskmill(dir.path());
    std::fs::write(dir.path().join("plain"), disk(5, SIZE)).unwrap();
    std::fs::write(dir.path().join("key"), "right").unwrap();
    std::fs::write(dir.path().join("wrong"), "wrong").unwrap();
    let luks = "encrypt.format=luks,encrypt.iter-time=5";
    run(&["convert", "-O", "qcow2", "--target-key-file", "key", "-o", luks, "plain", "image"]).ok();
    run(&["convert", "image", "out"]).fails(1).says(&["needs its passphrase", "--key-file"]);
    run(&["convert", "--key-file", "wrong", "image", "out"]).fails(1).says(&["no key slot opens"]);
    assert!(!dir.path().join("out").exists());
    // What stands in the file is not the guest's data.
    let (image, plain) = (std::fs::read(dir.path().join("image")).unwrap(), disk(5, SIZE));
    let sample = plain.chunks(64).find(|chunk| chunk.iter().any(|&byte| byte != 0)).unwrap();
    assert!(!image.windows(sample.len()).any(|window| window == sample));

    run(&["convert", "-O", "qcow2", "-o", luks, "plain", "out"]).fails(2).says(&["--target-key-file"]);
    run(&["convert", "-c", "-O", "qcow2", "--target-key-file", "key", "-o", luks, "plain", "out"])
        .fails(2)
        .says(&["compression and encryption"]);
    run(&["convert", "-O", "qcow2", "-o", "encryption=on", "plain", "out"])
        .fails(2)
        .says(&["--target-key-file"]);
}

#[test]
fn a_header_that_costs_too_much_is_refused() {
    let dir = scratch();
    let run = diskmill(dir.path());
    std::fs::write(dir.path().join("plain"), disk(6, 1 << 20)).unwrap();
    std::fs::write(dir.path().join("key"), "k").unwrap();
    let luks = "encrypt.format=luks,encrypt.iter-time=5";
    run(&["convert", "-O", "qcow2", "--target-key-file", "key", "-o", luks, "plain", "image"]).ok();
    let image = std::fs::read(dir.path().join("image")).unwrap();
    let header = image.windows(6).position(|bytes| bytes == b"LUKS\xba\xbe").unwrap();
    // Iterations of the digest and of the first slot; the slot's place.
    for (at, value, says) in [
        (164, u32::MAX, "iterations"),
        (212, u32::MAX, "iterations"),
        (248, 0x7fff_ffff, "outside the header"),
    ] {
        let mut bad = image.clone();
        bad[header + at..header + at + 4].copy_from_slice(&value.to_be_bytes());
        std::fs::write(dir.path().join("bad"), bad).unwrap();
        run(&["convert", "--key-file", "key", "bad", "out"]).fails(1).says(&["LUKS header", says]);
    }
}

#[test]
fn passphrases_are_added_and_erased() {
    let dir = scratch();
    let run = diskmill(dir.path());
    std::fs::write(dir.path().join("plain"), disk(7, 1 << 20)).unwrap();
    for name in ["one", "two"] {
        std::fs::write(dir.path().join(name), name).unwrap();
    }
    let luks = "encrypt.format=luks,encrypt.iter-time=5";
    run(&["convert", "-O", "qcow2", "--target-key-file", "one", "-o", luks, "plain", "image"]).ok();
    let quick = "encrypt.iter-time=5";
    run(&["amend", "--new-key-file", "two", "image"]).fails(1).says(&["needs its passphrase"]);
    run(&["amend", "--key-file", "one", "-o", quick, "--new-key-file", "two", "image"]).ok();
    for key in ["one", "two"] {
        run(&["compare", "--key-file", key, "image", "plain"]).ok();
    }
    run(&["amend", "--key-file", "two", "--erase-key-file", "one", "image"]).ok();
    run(&["compare", "--key-file", "one", "image", "plain"]).fails(2).says(&["no key slot opens"]);
    run(&["compare", "--key-file", "two", "image", "plain"]).ok();
    run(&["amend", "--key-file", "two", "--erase-key-file", "two", "image"]).fails(1).says(&["irreversibly"]);
    run(&["compare", "--key-file", "two", "image", "plain"]).ok();
}
