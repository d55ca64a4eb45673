//! `measure`, `commit` and `rebase` under qemu-img's name, against qemu-img itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[path = "support/pair.rs"]
mod pair;

use diskmill_testkit::{Cmd, Oracle, scratch};
use pair::Pair;
use tempfile::TempDir;

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

/// A chain with two candidates for its backing file, which differ here and there.
fn to_rebase(oracle: &Oracle) {
    oracle.create("a.qcow2", "", 4 << 20);
    io(oracle, "a.qcow2", "qcow2", &["write -P 1 0 1M", "write -P 5 3M 100k", "write -P 6 3500k 4k"]);
    oracle.create("b.qcow2", "cluster_size=4k", 3 << 20);
    io(oracle, "b.qcow2", "qcow2", &["write -P 1 0 512k", "write -P 2 2M 100k", "write -P 9 2500k 4k"]);
    oracle.create_over("mid.qcow2", "", 4 << 20, ("a.qcow2", "qcow2"));
    io(oracle, "mid.qcow2", "qcow2", &["write -P 7 256k 64k", "write -z 512k 128k"]);
    let steps = ["write -P 2 128k 64k", "write -z 2M 64k", "write -P 3 3M 4k"];
    for (name, options, size, backing) in [
        ("t.qcow2", "", 4 << 20, "a.qcow2"),
        ("deep.qcow2", "cluster_size=512", 4 << 20, "mid.qcow2"),
        ("v2.qcow2", "compat=0.10", 4 << 20, "a.qcow2"),
        ("wide.qcow2", "extended_l2=on", 5 << 20, "a.qcow2"),
        ("short.qcow2", "cluster_size=2M", 3_500 << 10, "mid.qcow2"),
    ] {
        oracle.create_over(name, options, size, (backing, "qcow2"));
        io(oracle, name, "qcow2", &steps);
    }
    oracle.create("alone.qcow2", "", 4 << 20);
    io(oracle, "alone.qcow2", "qcow2", &steps);
    oracle.img(["create", "-q", "-f", "qcow2", "-u", "-b", "gone", "-F", "raw", "lost.qcow2", "1M"]).ok();
    oracle.img(["convert", "-O", "raw", "b.qcow2", "b.raw"]).ok();
    oracle.img(["convert", "-O", "vmdk", "b.qcow2", "b.vmdk"]).ok();
}

/// A folder to begin with.
fn template(fill: impl Fn(&Oracle)) -> Option<TempDir> {
    let dir = scratch();
    fill(&Oracle::find(dir.path())?);
    Some(dir)
}

/// Both programs in copies of a folder.
fn pair_of(template: &TempDir) -> Pair {
    let from = template.path().join(".");
    Pair::new(|oracle| drop(Cmd::new("cp").arg("-a").arg(&from).arg(oracle.dir()).ok())).unwrap()
}

/// Runs a line that changes `image`; both must leave the same disk in the same places, and sound.
fn same_change(line: &str, image: &str, template: &TempDir) {
    let pair = pair_of(template);
    pair.same(line);
    pair.same_disk(image, "qcow2");
    let [theirs, ours] = pair.path(image);
    let maps = [&theirs, &ours].map(|path| places(&pair.oracle.at(path.parent().unwrap()), image, owner));
    assert_eq!(maps[0], maps[1], "{line}");
    let at_ours = pair.oracle.at(ours.parent().unwrap());
    at_ours.check_clean(image);
    same_facts(&pair, image);
}

/// `qemu-img info` and ours tell the same, but for the length of the file.
fn same_facts(pair: &Pair, image: &str) {
    let facts = pair.run(&format!("info {image}")).map(|(out, err, code)| {
        let lines: Vec<_> =
            out.lines().filter(|line| !line.contains("file length:")).map(str::to_owned).collect();
        (lines, err, code)
    });
    assert_eq!(facts[0], facts[1]);
}

/// Runs of the disk, as qemu-img's map has them, with what `key` makes of each.
fn places(
    oracle: &Oracle,
    image: &str,
    key: fn(&serde_json::Value) -> Option<u64>,
) -> Vec<(u64, Option<u64>)> {
    let mut runs: Vec<(u64, Option<u64>)> = Vec::new();
    for run in oracle.map(image, "qcow2").json().as_array().unwrap() {
        let len = run["length"].as_u64().unwrap();
        match runs.last_mut() {
            Some((last, kind)) if *kind == key(run) => *last += len,
            _ => runs.push((len, key(run))),
        }
    }
    runs
}

/// The layer that has a run, be it zeros or data.
fn owner(run: &serde_json::Value) -> Option<u64> {
    run["depth"].as_u64().filter(|_| run["present"] == true)
}

/// The layer that has data for a run.
fn holder(run: &serde_json::Value) -> Option<u64> {
    run["depth"].as_u64().filter(|_| run["data"] == true)
}

#[test]
fn rebase_leaves_the_same() {
    let Some(template) = template(to_rebase) else { return };
    let backings = [
        "-b b.qcow2 -F qcow2",
        "-b b.raw -F raw",
        "-b b.vmdk -F vmdk",
        "-b mid.qcow2 -F qcow2",
        "-q -b a.qcow2 -F qcow2",
    ];
    let images = ["t.qcow2", "deep.qcow2", "v2.qcow2", "wide.qcow2", "short.qcow2", "alone.qcow2"];
    for (line, image) in backings.iter().flat_map(|line| images.map(|image| (line, image))) {
        same_change(&format!("rebase {line} {image}"), image, &template);
    }
    for image in images {
        same_change(&format!("rebase --backing= {image}"), image, &template);
    }
    for line in ["-b b.qcow2 -F qcow2", "-b elsewhere -F raw", "--backing=", ""] {
        for image in ["t.qcow2", "v2.qcow2", "lost.qcow2"] {
            let pair = pair_of(&template);
            pair.same(&format!("rebase -u {line} {image}"));
            same_facts(&pair, image);
            let alone = format!(r#"json:{{"driver":"qcow2","backing":null,"file.filename":"{image}"}}"#);
            pair.oracle.at(pair.ours.path()).img(["check", &alone]).ok();
        }
    }
    for line in [
        "rebase -b b.qcow2 -F qcow2 --image-opts driver=qcow2,file.filename=t.qcow2",
        "rebase -U -t none -T none -f qcow2 -b b.qcow2 -F qcow2 t.qcow2",
    ] {
        same_change(line, "t.qcow2", &template);
    }
}

/// Whether a run of data that the image has itself is compressed.
fn packed(run: &serde_json::Value) -> Option<u64> {
    (run["depth"] == 0 && run["data"] == true).then(|| u64::from(run["compressed"] == true))
}

#[test]
fn rebase_compresses_the_same() {
    let Some(template) = template(|oracle| {
        to_rebase(oracle);
        oracle.create_over("zstd.qcow2", "compression_type=zstd", 4 << 20, ("a.qcow2", "qcow2"));
        oracle.create_over("one.qcow2", "refcount_bits=1", 4 << 20, ("a.qcow2", "qcow2"));
    }) else {
        return;
    };
    for image in ["t.qcow2", "deep.qcow2", "short.qcow2", "zstd.qcow2", "one.qcow2", "v2.qcow2"] {
        for line in ["rebase -c --backing= ", "rebase -c -b b.qcow2 -F qcow2 "] {
            same_change(&format!("{line}{image}"), image, &template);
        }
    }
    // QEMU 10.0 fails an assertion where subclusters are the image's own.
    let pair = pair_of(&template);
    let ours = pair.oracle.at(pair.ours.path());
    ours.img(["convert", "-O", "raw", "wide.qcow2", "want.raw"]).ok();
    Cmd::new(&pair.program).args(["rebase", "-c", "--backing=", "wide.qcow2"]).dir(pair.ours.path()).ok();
    ours.identical(("qcow2", "wide.qcow2"), ("raw", "want.raw"));
    ours.check_clean("wide.qcow2");
    // Without a backing file nobody has zeros to write.
    for image in ["t.qcow2", "zstd.qcow2", "one.qcow2"] {
        let pair = pair_of(&template);
        pair.same(&format!("rebase -q -c --backing= {image}"));
        let maps = [&pair.theirs, &pair.ours].map(|dir| places(&pair.oracle.at(dir.path()), image, packed));
        assert_eq!(maps[0], maps[1], "{image}");
        assert!(maps[1].iter().any(|(_, packed)| *packed == Some(1)), "{image}");
    }
}

#[test]
fn mistakes_of_rebase_are_told_the_same() {
    let Some(pair) = Pair::new(to_rebase) else { return };
    let long = "x".repeat(1100);
    for line in [
        "rebase",
        "rebase t.qcow2",
        "rebase -b a.qcow2 -F qcow2",
        "rebase -F qcow2 t.qcow2",
        "rebase -b foo -F qcow2 t.qcow2",
        "rebase -b b.qcow2 -F foo t.qcow2",
        "rebase -u -b b.qcow2 -F foo t.qcow2",
        "rebase -b b.vmdk -F qcow2 t.qcow2",
        "rebase -b t.qcow2 -F qcow2 t.qcow2",
        "rebase -T foo -b b.qcow2 t.qcow2",
        "rebase -t foo -b b.qcow2 t.qcow2",
        "rebase -u -b foo t.qcow2",
        "rebase -b b.qcow2 t.qcow2",
        "rebase -b b.qcow2 -F qcow2 nonexistent",
        "rebase -b b.qcow2 -F qcow2 lost.qcow2",
        "rebase -b a.qcow2 -F qcow2 -f raw b.raw",
        "rebase -u -b a.qcow2 -F qcow2 b.vmdk",
        "rebase -b a.qcow2 -F qcow2 t.qcow2 x",
        &format!("rebase -u -b {long} -F qcow2 t.qcow2"),
    ] {
        pair.same_but_hint(line);
    }
}

/// Three layers, and overlays of several kinds.
fn to_commit(oracle: &Oracle) {
    oracle.create("base.qcow2", "", 4 << 20);
    io(oracle, "base.qcow2", "qcow2", &["write -P 1 0 1M", "write -P 8 3900k 100k"]);
    oracle.create_over("mid.qcow2", "cluster_size=4k", 4 << 20, ("base.qcow2", "qcow2"));
    io(oracle, "mid.qcow2", "qcow2", &["write -P 3 3M 64k", "write -P 4 512k 4k"]);
    oracle.create_over("low.qcow2", "", 2 << 20, ("base.qcow2", "qcow2"));
    let steps = [
        "write -P 2 512k 1M",
        "write -z 64k 64k",
        "write -P 5 1900k 4k",
        "write -z -u 800k 64k",
        "discard 1M 64k",
    ];
    for (name, options, size, backing) in [
        ("t.qcow2", "", 4 << 20, "mid.qcow2"),
        ("tiny.qcow2", "cluster_size=512", 4 << 20, "base.qcow2"),
        ("v2.qcow2", "compat=0.10", 4 << 20, "mid.qcow2"),
        ("wide.qcow2", "extended_l2=on", 4 << 20, "mid.qcow2"),
        ("short.qcow2", "cluster_size=2M", 3_500 << 10, "mid.qcow2"),
        ("long.qcow2", "", 9 << 20, "mid.qcow2"),
        ("longer.qcow2", "", 4 << 20, "low.qcow2"),
        ("snap.qcow2", "", 4 << 20, "mid.qcow2"),
    ] {
        oracle.create_over(name, options, size, (backing, "qcow2"));
        io(oracle, name, "qcow2", &steps);
    }
    oracle.snapshot("snap.qcow2", "s");
    io(oracle, "snap.qcow2", "qcow2", &["write -P 9 600k 300k"]);
    oracle.img(["convert", "-O", "raw", "base.qcow2", "base.raw"]).ok();
    oracle.create_over("overraw.qcow2", "", 5 << 20, ("base.raw", "raw"));
    io(oracle, "overraw.qcow2", "qcow2", &steps);
    oracle.img(["create", "-q", "-f", "vmdk", "base.vmdk", "4M"]).ok();
    io(oracle, "base.vmdk", "vmdk", &["write -P 1 0 1M"]);
    oracle.img(["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "top.vmdk"]).ok();
    io(oracle, "top.vmdk", "vmdk", &["write -P 2 512k 1M", "write -P 3 3M 4k"]);
    oracle.create_over("overvmdk.qcow2", "", 4 << 20, ("base.vmdk", "vmdk"));
    io(oracle, "overvmdk.qcow2", "qcow2", &steps);
    oracle.img(["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "packed.qcow2"]).ok();
    io(oracle, "packed.qcow2", "qcow2", &["write -c -P 7 1M 640k", "write -c -P 6 0 64k"]);
}

/// Commits with both programs; all images of the chain must be the same after it, and sound.
fn same_commit(template: &TempDir, args: &str, overlay: &str, chain: &[(&str, &str)]) {
    let pair = pair_of(template);
    let line = format!("commit {args} {overlay}");
    pair.same(&line);
    let ours = pair.oracle.at(pair.ours.path());
    for (image, format) in std::iter::once(&(overlay, "qcow2")).chain(chain) {
        pair.same_disk(image, format);
        if *format == "qcow2" {
            let maps = [&pair.oracle, &ours].map(|oracle| places(oracle, image, holder));
            // QEMU copies zeros in very small clusters, and to VMDKs, as data.
            let copied = ["tiny.qcow2", "overvmdk.qcow2"].contains(&overlay);
            assert!(copied || maps[0] == maps[1], "{line}: {image}: {maps:?}");
            ours.check_clean(image);
            same_facts(&pair, image);
        }
    }
}

#[test]
fn commit_leaves_the_same() {
    let Some(template) = template(to_commit) else { return };
    let (base, mid, low) = (("base.qcow2", "qcow2"), ("mid.qcow2", "qcow2"), ("low.qcow2", "qcow2"));
    for overlay in
        ["t.qcow2", "v2.qcow2", "wide.qcow2", "short.qcow2", "long.qcow2", "snap.qcow2", "packed.qcow2"]
    {
        same_commit(&template, "", overlay, &[mid, base]);
        same_commit(&template, "-d", overlay, &[mid, base]);
        same_commit(&template, "-b base.qcow2", overlay, &[base]);
    }
    same_commit(&template, "-q -f qcow2 -t none", "tiny.qcow2", &[base]);
    same_commit(&template, "-r 100M", "overraw.qcow2", &[("base.raw", "raw")]);
    same_commit(&template, "", "overvmdk.qcow2", &[("base.vmdk", "vmdk")]);
    let pair = pair_of(&template);
    pair.same("commit top.vmdk");
    pair.same_disk("base.vmdk", "vmdk");
    same_commit(&template, "", "longer.qcow2", &[low, base]);
    same_commit(&template, "-b ./base.qcow2", "longer.qcow2", &[base]);
}

#[test]
fn mistakes_of_commit_are_told_the_same() {
    let Some(pair) = Pair::new(to_commit) else { return };
    for line in [
        "commit",
        "commit base.qcow2",
        "commit -f raw base.raw",
        "commit nonexistent",
        "commit t.qcow2 v2.qcow2",
        "commit -b foo t.qcow2",
        "commit -b t.qcow2 t.qcow2",
        "commit -f raw t.qcow2",
        "commit -t foo t.qcow2",
    ] {
        pair.same_but_hint(line);
    }
}
