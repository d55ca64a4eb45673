//! The commands that change images, under qemu-img's name, against qemu-img: the same command line on equal copies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[path = "support/pair.rs"]
mod pair;

use diskmill_testkit::Oracle;
use pair::Pair;

fn io(oracle: &Oracle, image: &str, commands: &[&str]) {
    let args = commands.iter().flat_map(|command| ["-c", command]);
    oracle.io(["-f", "qcow2"]).args(args).arg(image).ok();
}

fn images(oracle: &Oracle) {
    oracle.create("base.qcow2", "", 4 << 20);
    io(oracle, "base.qcow2", &["write -P 1 0 4M"]);
    oracle.create("a.qcow2", "", 4 << 20);
    io(oracle, "a.qcow2", &["write -P 1 0 1M", "write -P 2 3M 1M"]);
    oracle.create("v2.qcow2", "compat=0.10", 4 << 20);
    oracle.img(["snapshot", "-c", "old", "v2.qcow2"]).ok();
    oracle.create_over("over.qcow2", "", 1_000_448, ("base.qcow2", "qcow2"));
    oracle.create("tiny.qcow2", "cluster_size=512,refcount_bits=1", 100 << 10);
    io(oracle, "tiny.qcow2", &["write -P 3 50k 10k"]);
    oracle.create("narrow.qcow2", "refcount_bits=1", 1 << 20);
    io(oracle, "narrow.qcow2", &["write -P 3 0 1M"]);
    oracle.create("data.qcow2", "data_file=data.raw", 1 << 20);
    oracle.create("snap.qcow2", "", 4 << 20);
    io(oracle, "snap.qcow2", &["write -P 1 0 1M", "write -P 2 3M 1M"]);
    oracle.img(["snapshot", "-c", "first", "snap.qcow2"]).ok();
    io(oracle, "snap.qcow2", &["write -P 4 512k 3M"]);
    oracle.img(["snapshot", "-c", "second", "snap.qcow2"]).ok();
    oracle.img(["snapshot", "-c", "first", "snap.qcow2"]).ok();
    io(oracle, "snap.qcow2", &["write -P 5 0 64k"]);
    oracle.img(["create", "-q", "-f", "vmdk", "v.vmdk", "1M"]).ok();
    oracle.img(["create", "-q", "-f", "raw", "r.raw", "1M"]).ok();
}

#[test]
fn resize() {
    let Some(pair) = Pair::new(images) else { return };
    for line in [
        "resize a.qcow2 8M",
        "resize a.qcow2 +1M",
        "resize -q a.qcow2 +1M",
        "resize a.qcow2 4M",
        "resize --shrink a.qcow2 4M",
        "resize a.qcow2 4M",
        "resize a.qcow2 -- -1M",
        "resize --shrink a.qcow2 -1M",
        "resize --shrink a.qcow2 -99M",
        "resize a.qcow2 -q 30M",
        "resize a.qcow2 0",
        "resize a.qcow2 8E",
        "resize a.qcow2 9E",
        "resize a.qcow2 7E",
        "resize a.qcow2 x",
        "resize a.qcow2 +x",
        "resize a.qcow2 33M --preallocation=metadata",
        "resize --preallocation=metadata a.qcow2 33M",
        "resize --preallocation=falloc a.qcow2 +1M",
        "resize --preallocation=full a.qcow2 +1M",
        "resize --preallocation=full --shrink a.qcow2 1M",
        "resize --preallocation=foo a.qcow2 99M",
        "resize a.qcow2 50000000",
        "resize --image-opts driver=qcow2,file.filename=a.qcow2 100M",
        "resize --image-opts -f raw a.qcow2 100M",
        "resize -f raw r.raw 2M",
        "resize r.raw 3M",
        "resize -f raw r.raw 1000",
        "resize -f raw --shrink r.raw 1000",
        "resize -f raw r.raw +1k",
        "resize --preallocation=metadata -f raw r.raw 3M",
        "resize --preallocation=falloc -f raw r.raw 3M",
        "resize --preallocation=full -f raw r.raw 4M",
        "resize v.vmdk 2M",
        "resize v2.qcow2 8M",
        "resize nope 1M",
        "resize over.qcow2 4M",
        "resize --shrink over.qcow2 1M",
        "resize --preallocation=metadata over.qcow2 3M",
        "resize tiny.qcow2 10M",
        "resize tiny.qcow2 200G",
        "resize --shrink tiny.qcow2 60k",
        "resize data.qcow2 4M",
        "resize --shrink data.qcow2 2M",
        "resize --preallocation=metadata data.qcow2 3M",
        "resize --shrink snap.qcow2 1M",
        "resize snap.qcow2 5M",
        "snapshot -a second snap.qcow2",
    ] {
        pair.same(line);
    }
    for line in ["resize", "resize a.qcow2"] {
        pair.same_but_hint(line);
    }
    for image in ["a.qcow2", "over.qcow2", "tiny.qcow2", "data.qcow2", "snap.qcow2", "v2.qcow2"] {
        pair.same_disk(image, "qcow2");
        pair.clean(image);
    }
    for name in ["r.raw", "data.raw"] {
        let [theirs, ours] = pair.path(name).map(|path| std::fs::read(path).unwrap());
        assert!(theirs == ours, "{name}: {} and {} bytes", theirs.len(), ours.len());
    }
    for (image, snapshot) in [("snap.qcow2", "first"), ("snap.qcow2", "second"), ("v2.qcow2", "old")] {
        pair.same_snapshot(image, snapshot);
    }
}

#[test]
fn snapshot() {
    let Some(pair) = Pair::new(images) else { return };
    for line in [
        "snapshot -l snap.qcow2",
        "snapshot snap.qcow2",
        "snapshot -U -l snap.qcow2",
        "snapshot -q -l a.qcow2",
        "snapshot -d first snap.qcow2",
        "snapshot -l snap.qcow2",
        "snapshot -d 2 snap.qcow2",
        "snapshot -d nope snap.qcow2",
        "snapshot -a nope snap.qcow2",
        "snapshot -a 2 snap.qcow2",
        "snapshot -l snap.qcow2",
        "snapshot -a first snap.qcow2",
        "snapshot -f raw -c x r.raw",
        "snapshot -f raw -l r.raw",
        "snapshot -f raw -d x r.raw",
        "snapshot -c x r.raw",
        "snapshot -d x r.raw",
        "snapshot -c x v.vmdk",
        "snapshot -l v.vmdk",
        "snapshot -d x v.vmdk",
        "snapshot -c x data.qcow2",
        "snapshot -d x data.qcow2",
        "snapshot -a x data.qcow2",
        "snapshot -l data.qcow2",
        "snapshot -c x narrow.qcow2",
        "snapshot -U -c x a.qcow2",
        "snapshot -c x nope",
        "snapshot -c x --image-opts driver=qcow2,file.filename=a.qcow2",
        "snapshot -d x a.qcow2",
        "snapshot -d old v2.qcow2",
    ] {
        pair.same(line);
    }
    for line in ["snapshot", "snapshot -l", "snapshot -l a.qcow2 b", "snapshot -l -c x a.qcow2"] {
        pair.same_but_hint(line);
    }
    // Dates differ; all else of a new snapshot is the same.
    pair.run("snapshot -c fresh snap.qcow2");
    let [theirs, ours] = pair.run("info --output=json snap.qcow2").map(|(out, ..)| {
        let (_, list) = out.split_once("\"snapshots\": [").unwrap();
        list.lines().filter(|line| !line.contains("date-")).collect::<Vec<_>>().join("\n")
    });
    assert_eq!(theirs, ours);
    for image in ["snap.qcow2", "a.qcow2", "v2.qcow2"] {
        pair.same_disk(image, "qcow2");
        pair.clean(image);
    }
    pair.same_snapshot("snap.qcow2", "second");
}

#[test]
fn amend() {
    let Some(pair) = Pair::new(|oracle| {
        images(oracle);
        io(oracle, "a.qcow2", &["write -z 1M 64k", "write -z 2M 1M"]);
        oracle.create_over("zero.qcow2", "", 4 << 20, ("base.qcow2", "qcow2"));
        io(oracle, "zero.qcow2", &["write -P 9 0 256k", "write -z 128k 64k", "write -z 1M 1M"]);
        oracle.img(["snapshot", "-c", "one", "zero.qcow2"]).ok();
        io(oracle, "zero.qcow2", &["write -P 8 1M 64k", "write -z 3M 64k"]);
        oracle.create("extended.qcow2", "extended_l2=on", 1 << 20);
        oracle.create("raw.qcow2", "data_file=raw.data,data_file_raw=on", 1 << 20);
    }) else {
        return;
    };
    for line in [
        "amend -o compat=0.10 a.qcow2",
        "amend -o lazy_refcounts=on a.qcow2",
        "amend -o refcount_bits=32 a.qcow2",
        "amend -o compat=1.1,lazy_refcounts=on a.qcow2",
        "info a.qcow2",
        "amend -o compat=0.42 a.qcow2",
        "amend -o refcount_bits=1 a.qcow2",
        "amend -o refcount_bits=7 a.qcow2",
        "amend -o refcount_bits=128 a.qcow2",
        "amend -o compat=0.10 a.qcow2",
        "amend -q -o refcount_bits=64 --force a.qcow2",
        "amend -o lazy_refcounts=off,size=5M a.qcow2",
        "amend -o size=5000001 a.qcow2",
        "amend -o backing_file=base.qcow2 a.qcow2",
        "amend -o cluster_size=4k a.qcow2",
        "amend -o foo=1 a.qcow2",
        "amend -o lazy_refcounts=7 a.qcow2",
        "amend -o data_file=x a.qcow2",
        "amend -o data_file_raw=on a.qcow2",
        "amend -o data_file_raw=off a.qcow2",
        "amend -t foo -o size=1M a.qcow2",
        "amend -o size=1M nope",
        "amend -f raw -o size=1M r.raw",
        "amend -o size=1M v.vmdk",
        "amend -o refcount_bits=1 snap.qcow2",
        "amend -o refcount_bits=2 snap.qcow2",
        "amend -o compat=0.10,refcount_bits=16 snap.qcow2",
        "amend -o size=8M snap.qcow2",
        "amend -o compat=1.1 snap.qcow2",
        "amend -o size=8M snap.qcow2",
        "amend -o compat=0.10 snap.qcow2",
        "amend -o compat=1.1,refcount_bits=8 v2.qcow2",
        "amend -o compat=0.10 zero.qcow2",
        "info --backing-chain zero.qcow2",
        "amend -o compat=0.10 extended.qcow2",
        "amend -o compat=0.10 data.qcow2",
        "amend -o data_file_raw=off raw.qcow2",
        "amend -o data_file=elsewhere raw.qcow2",
        "amend -o refcount_bits=64 tiny.qcow2",
        "amend -o refcount_bits=1 tiny.qcow2",
        "amend --image-opts -o lazy_refcounts=on driver=qcow2,file.filename=tiny.qcow2",
    ] {
        let [theirs, ours] = pair.run(line).map(|(out, err, code)| {
            // The length of the file.
            (
                out.lines().filter(|line| !line.contains("file length")).collect::<Vec<_>>().join("\n"),
                err,
                code,
            )
        });
        assert_eq!(theirs, ours, "qemu-img {line}");
    }
    for line in ["amend a.qcow2", "amend -o size=1M"] {
        pair.same_but_hint(line);
    }
    for image in ["a.qcow2", "snap.qcow2", "v2.qcow2", "zero.qcow2", "tiny.qcow2"] {
        pair.same_disk(image, "qcow2");
        pair.clean(image);
    }
    for (image, snapshot) in [("snap.qcow2", "second"), ("v2.qcow2", "old"), ("zero.qcow2", "one")] {
        pair.same_snapshot(image, snapshot);
    }
}

#[test]
fn bench_writes() {
    let Some(pair) = Pair::new(images) else { return };
    for line in [
        "bench -w -c 100 -f qcow2 --pattern=7 -s 1000 -S 3000 a.qcow2",
        "bench -w -c 50 -d 8 --flush-interval=16 -o 1M a.qcow2",
        "bench -w -c 5 -d 8 --flush-interval=16 --no-drain -s 2M a.qcow2",
        "bench -w -c 1 -U a.qcow2",
    ] {
        let [theirs, ours] = pair.run(line).map(|(out, err, code)| {
            let lines = out.lines().filter(|line| !line.starts_with("Run completed"));
            (lines.collect::<Vec<_>>().join("\n"), err, code)
        });
        assert_eq!(theirs, ours, "qemu-img {line}");
    }
    pair.same_disk("a.qcow2", "qcow2");
    pair.clean("a.qcow2");
}

#[test]
fn bitmaps_follow_the_size_of_the_disk() {
    let Some(pair) = Pair::new(|oracle| {
        oracle.create("a.qcow2", "", 4 << 20);
        oracle.img(["bitmap", "--add", "a.qcow2", "b0"]).ok();
        oracle.img(["bitmap", "--add", "--disable", "-g", "512", "a.qcow2", "b1"]).ok();
        oracle.img(["bitmap", "--add", "-g", "512", "a.qcow2", "b2"]).ok();
        io(
            oracle,
            "a.qcow2",
            &["write -P 1 0 64k", "write -P 1 1M 1000", "write -P 1 4M 0", "write -P 1 4194303 1"],
        );
    }) else {
        return;
    };
    let same = |line: &str| {
        pair.same(line);
        pair.clean("a.qcow2");
        // Their image, whose bits the library can read, and ours must tell the same.
        let bits = |dir: usize, name: &str| {
            let image = diskmill::Image::open(&pair.path("a.qcow2")[dir], &Default::default()).unwrap();
            image.dirty_bits(name).unwrap().ranges().collect::<Vec<_>>()
        };
        for name in ["b0", "b1", "b2"] {
            assert_eq!(bits(0, name), bits(1, name), "{line}: {name}");
        }
    };
    for line in [
        "resize a.qcow2 5M",
        "resize a.qcow2 1G",
        "resize --shrink a.qcow2 1049088",
        "resize a.qcow2 3M",
        "snapshot -a nope a.qcow2",
    ] {
        if line.starts_with("resize") { same(line) } else { pair.same_but_hint(line) }
    }
}

#[test]
fn encrypted_disks_are_resized() {
    const SECRET: [&str; 2] = ["--object", "secret,id=s,data=abc"];
    const IMAGE: &str = "driver=qcow2,file.filename=l.qcow2,encrypt.key-secret=s";
    let Some(pair) = Pair::new(|oracle| {
        let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
        oracle.img(["create", "-q", "-f", "qcow2", "-o", options]).args(SECRET).args(["l.qcow2", "1M"]).ok();
        oracle.io(SECRET).args(["--image-opts", IMAGE, "-c", "write -P 7 1000k 24k"]).ok();
    }) else {
        return;
    };
    pair.same("resize l.qcow2 2M");
    for change in ["--shrink 1030144", "2M", "--preallocation=metadata 3M", "--preallocation=full 4M"] {
        pair.same(&format!("resize --object secret,id=s,data=abc --image-opts {IMAGE} {change}"));
        let [theirs, ours] = [&pair.theirs, &pair.ours].map(|dir| {
            let oracle = pair.oracle.at(dir.path());
            oracle.img(["convert", "-O", "raw", "--image-opts", IMAGE, "out.raw"]).args(SECRET).ok();
            std::fs::read(dir.path().join("out.raw")).unwrap()
        });
        assert!(ours[1_030_144..].iter().all(|&byte| byte == 0), "{change}");
        // What QEMU preallocates it does not encrypt.
        if !change.contains("preallocation") && change != "2M" {
            assert!(theirs == ours, "{change}");
        }
        pair.oracle.at(pair.ours.path()).img(["check", "--image-opts", IMAGE]).args(SECRET).ok();
    }
}
