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
fn luks_containers_are_the_same() {
    let Some(pair) = Pair::new(nothing) else { return };
    for options in [
        "iter-time=10",
        "key-secret=gone",
        "key-secret=s,cipher-alg=foo",
        "key-secret=s,cipher-mode=foo",
        "key-secret=s,foo=1",
        "key-secret=s,preallocation=foo",
        "help",
    ] {
        pair.same(&format!("create -f luks {OBJECT} -o {options} a.luks 1000001"));
    }
    pair.same(&format!("create -f luks {OBJECT} -b x -F raw -o key-secret=s a.luks 1M"));
    pair.same(&format!("create -f luks {OBJECT} -o key-secret=s a.luks"));
    for options in [
        "key-secret=s,iter-time=10",
        "key-secret=s,iter-time=10,preallocation=full",
        "key-secret=s,cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1,iter-time=10",
    ] {
        pair.same(&format!("create -f luks {OBJECT} -o {options} a.luks 1000001"));
        let facts = [&pair.theirs, &pair.ours].map(|dir| {
            let oracle = pair.oracle.at(dir.path());
            let image = "driver=luks,key-secret=s,file.filename=a.luks";
            oracle.io(["-c", "write 1000 5000", "--image-opts", image]).args(OBJECT.split(' ')).ok();
            let info = oracle.info("a.luks");
            let data = &info["format-specific"]["data"];
            let fields =
                ["cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "payload-offset"];
            (info["virtual-size"].clone(), fields.map(|field| data[field].clone()))
        });
        assert_eq!(facts[0], facts[1], "{options}");
    }
}

#[test]
fn encrypted_backing_files_need_no_passphrase_to_be_named() {
    let fill = |oracle: &Oracle| {
        for (name, format) in [("luks.qcow2", "luks,encrypt.iter-time=10"), ("aes.qcow2", "aes")] {
            let options = format!("encrypt.key-secret=s,encrypt.format={format}");
            oracle
                .img(["create", "-q", "-f", "qcow2", "-o", &options])
                .args(OBJECT.split(' '))
                .args([name, "1M"])
                .ok();
        }
    };
    let Some(pair) = Pair::new(fill) else { return };
    for base in ["luks.qcow2", "aes.qcow2"] {
        pair.same(&format!("create -f qcow2 -b {base} -F qcow2 top.qcow2"));
        pair.same("info top.qcow2");
        // Without a passphrase, whose name is known.
        let info = format!("info --image-opts driver=qcow2,encrypt.key-secret=s,file.filename={base}");
        assert!(
            pair.run(&info).iter().all(|(out, _, code)| out.contains("encrypted: yes") && *code == Some(0))
        );
        pair.same(&format!("convert {base} out.raw"));
        // The backing file may be named once more.
        let image = "driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.encrypt.key-secret=s";
        pair.same(&format!("check -q {OBJECT} --image-opts {image},backing.file.filename={base}"));
        pair.same(&format!("commit {OBJECT} --image-opts {image},backing.file.filename={base}"));
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

/// Numbers of the key slots in use, in both programs' images.
fn slots_in_use(pair: &Pair) -> [Vec<usize>; 2] {
    [&pair.theirs, &pair.ours].map(|dir| {
        let info = pair.oracle.at(dir.path()).info("l.qcow2");
        let slots = &info["format-specific"]["data"]["encrypt"]["slots"];
        let slots = slots.as_array().unwrap().iter().enumerate();
        slots.filter(|(_, slot)| slot["active"] == true).map(|(index, _)| index).collect()
    })
}

#[test]
fn key_slots_are_changed_the_same() {
    let fill = |oracle: &Oracle| {
        let options = "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s";
        let create = ["create", "-q", "-f", "qcow2", "-o", options, "l.qcow2", "1M"];
        oracle.img(create).args(OBJECT.split(' ')).ok();
        let write = ["-c", "write -P 7 64k 300k", "--image-opts", &opts("l.qcow2", "s")];
        oracle.io(write).args(OBJECT.split(' ')).ok();
        oracle.create("plain.qcow2", "", 1 << 20);
    };
    let Some(pair) = Pair::new(fill) else { return };
    let new = "encrypt.state=active,encrypt.iter-time=10,encrypt.new-secret";
    let erase = "encrypt.state=inactive";
    let mut before = vec![0];
    // The secret that opens the image, and the options.
    for (secret, options) in [
        ("s", "encrypt.state=active".to_owned()),
        ("s", "encrypt.new-secret=t".to_owned()),
        ("s", "encrypt.iter-time=10".to_owned()),
        ("s", format!("{new}=gone")),
        ("t", format!("{new}=t")),
        ("s", format!("{new}=t,encrypt.old-secret=s")),
        ("s", "encrypt.state=foo,encrypt.new-secret=t".to_owned()),
        ("s", format!("{new}=t,encrypt.keyslot=8")),
        ("s", format!("{new}=t,encrypt.keyslot=0")),
        ("s", "encrypt.cipher-alg=aes-128".to_owned()),
        ("s", format!("{erase},encrypt.keyslot=0")),
        ("s", format!("{erase},encrypt.old-secret=s")),
        ("s", format!("{new}=t")),
        ("t", format!("{new}=t,encrypt.keyslot=6")),
        ("s", format!("{new}=t,encrypt.keyslot=6")),
        ("s", format!("{new}=s,encrypt.keyslot=6 --force")),
        ("s", erase.to_owned()),
        ("s", format!("{erase},encrypt.new-secret=t")),
        ("s", format!("{erase},encrypt.iter-time=10,encrypt.keyslot=1")),
        ("s", format!("{erase},encrypt.keyslot=3")),
        ("s", format!("{erase},encrypt.keyslot=3,encrypt.old-secret=s")),
        ("s", format!("{erase},encrypt.keyslot=9")),
        ("s", format!("{erase},encrypt.keyslot=0,encrypt.old-secret=t")),
        ("t", format!("{erase},encrypt.old-secret=s")),
        ("s", format!("{new}=s")),
        ("t", format!("{new}=s")),
        ("s", format!("{erase},encrypt.old-secret=t")),
        ("s", format!("{erase},encrypt.keyslot=0")),
    ] {
        pair.same(&format!("amend {OBJECT} -o {options} --image-opts {}", opts("l.qcow2", secret)));
        let [theirs, ours] = slots_in_use(&pair);
        assert_eq!(theirs, ours, "{secret}: {options}");
        if theirs == before {
            continue;
        }
        before = theirs;
        // QEMU opens with the passphrases that we wrote.
        for secret in ["s", "t"] {
            let [theirs, ours] = [&pair.theirs, &pair.ours].map(|dir| {
                let check = ["check", "-q", "--image-opts", &opts("l.qcow2", secret)];
                pair.oracle.at(dir.path()).img(check).args(OBJECT.split(' ')).run().code
            });
            assert_eq!(theirs, ours, "{secret} after {options}");
        }
    }
    let read = ["-c", "read -P 7 64k 300k", "--image-opts", &opts("l.qcow2", "s")];
    let read = pair.oracle.at(pair.ours.path()).io(read).args(OBJECT.split(' ')).ok();
    assert!(!read.out().contains("failed"), "{read}");
    // With it all is lost.
    pair.same(&format!(
        "amend --force {OBJECT} -o {erase},encrypt.keyslot=0 --image-opts {}",
        opts("l.qcow2", "s")
    ));
    pair.same(&format!(
        "amend --force {OBJECT} -o {erase},encrypt.old-secret=s --image-opts {}",
        opts("l.qcow2", "s")
    ));
    pair.same(&format!("amend {OBJECT} -o {new}=s --image-opts {}", opts("l.qcow2", "s")));
    pair.same(&format!("amend {OBJECT} -o {new}=s plain.qcow2"));
    pair.same(&format!("create -q -f qcow2 {OBJECT} -o encryption=on,encrypt.key-secret=s l.qcow2 1M"));
    pair.same(&format!("amend {OBJECT} -o {new}=t --image-opts {}", opts("l.qcow2", "s")));
}
