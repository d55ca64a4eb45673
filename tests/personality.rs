//! The personality against qemu-img itself: the same command line, in equal folders, prints the same and leaves the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[path = "support/pair.rs"]
mod pair;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use diskmill_testkit::{Cmd, Oracle, scratch};
use pair::Pair;

fn images(oracle: &Oracle) {
    let io = |image: &str, format: &str, commands: &[&str]| {
        let args = commands.iter().flat_map(|command| ["-c", command]);
        oracle.io(["-f", format]).args(args).arg(image).ok();
    };
    oracle.create("base.qcow2", "", 4 << 20);
    io("base.qcow2", "qcow2", &["write -P 1 0 1M", "write -P 2 2M 64k", "write -z 3M 128k"]);
    oracle.img(["snapshot", "-c", "first", "base.qcow2"]).ok();
    io("base.qcow2", "qcow2", &["write -P 3 512k 64k"]);
    oracle.img(["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]).ok();
    io("top.qcow2", "qcow2", &["write -P 4 1M 64k", "write -z 0 64k"]);
    oracle.img(["create", "-q", "-f", "qcow2", "-u", "-b", "gone", "-F", "raw", "lost.qcow2", "1M"]).ok();
    oracle.img(["convert", "-c", "-O", "qcow2", "base.qcow2", "packed.qcow2"]).ok();
    oracle.img(["convert", "-O", "vmdk", "base.qcow2", "a.vmdk"]).ok();
    oracle.img(["convert", "-O", "raw", "base.qcow2", "a.raw"]).ok();
}

#[test]
fn looking_prints_the_same() {
    let Some(pair) = Pair::new(images) else { return };
    for line in [
        "info base.qcow2",
        "info --backing-chain top.qcow2",
        "info -U --output json base.qcow2",
        "info --output=json --backing-chain top.qcow2",
        "info a.raw --output json",
        "info -f raw base.qcow2",
        "info file:packed.qcow2",
        "info json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"base.qcow2\"}}",
        "info --image-opts driver=qcow2,file.filename=base.qcow2",
        "info --image-opts file.driver=file,file.filename=base.qcow2,file.locking=off",
        "info --object secret,id=s,data=abc base.qcow2",
        "map base.qcow2",
        "map --output json top.qcow2",
        "map --output json packed.qcow2",
        "map packed.qcow2",
        "map a.raw --output=json -s 512k -l 1M",
        "map --output json a.vmdk",
        "map --output json json:{\"driver\":\"raw\",\"offset\":65536,\"size\":131072,\"file\":{\"driver\":\"file\",\"filename\":\"a.raw\"}}",
        "check --output json top.qcow2",
        "check -f qcow2 packed.qcow2",
        "check --output json packed.qcow2",
        "check -q base.qcow2",
        "check a.raw",
        "check a.vmdk",
        "check --output json -f vmdk a.vmdk",
        "check -U --image-opts driver=qcow2,file.filename=base.qcow2",
        "compare base.qcow2 a.raw",
        "compare -f qcow2 -F vmdk base.qcow2 a.vmdk",
        "compare base.qcow2 top.qcow2",
        "compare -s base.qcow2 packed.qcow2",
        "compare -q base.qcow2 top.qcow2",
        "compare --image-opts driver=qcow2,file.filename=base.qcow2 driver=raw,file.filename=a.raw",
    ] {
        pair.same(line);
    }
}

#[test]
fn mistakes_are_told_the_same() {
    let Some(pair) = Pair::new(images) else { return };
    for line in [
        "info nonexistent",
        "info .",
        "info lost.qcow2 --backing-chain",
        "info foo:bar",
        "info -f foo a.raw",
        "info -f qcow2 a.raw",
        "info -f vmdk a.raw",
        "info --image-opts -f raw a.raw",
        "info --image-opts a.raw",
        "info --image-opts driver=foo",
        "info --image-opts driver=qcow2",
        "info --image-opts driver=qcow2,file=a",
        "info --image-opts driver=qcow2,file.filename=base.qcow2,foo=1",
        "info --image-opts driver=qcow2,file.filename=base.qcow2,file.foo=1",
        "info json:{}",
        "info json:{",
        "info --object foo a.raw",
        "info --object secret,id=x a.raw",
        "map lost.qcow2",
        "compare a.raw nonexistent",
        "compare -T foo a.raw a.raw",
        "convert -S 1 a.raw b",
        "convert -S 3G a.raw b",
        "convert -m 0 a.raw b",
        "convert -m 20 a.raw b",
        "convert -n a.raw nonexistent",
        "convert -l foo base.qcow2 b",
        "convert -B foo a.raw b",
        "convert -O qcow2 -B foo a.raw b",
        "convert -O qcow2 -B foo -F qcow2 a.raw b",
        "convert -O qcow2 -o backing_file=a.raw,backing_fmt=raw base.qcow2 base.qcow2 b",
        "convert -C -S 4k a.raw b",
        "convert -C -c a.raw b",
        "convert --salvage -C a.raw b",
        "convert -c a.raw b",
        "convert -t foo a.raw b",
        "convert -T foo a.raw b",
        "convert base.qcow2 base.qcow2",
        "convert --target-image-opts a.raw driver=raw,file.filename=x",
        "convert --target-is-zero a.raw b",
        "convert -n -o foo=1 a.raw a.vmdk",
        "convert --skip-broken-bitmaps a.raw b",
        "convert -O dmg a.raw b",
        "convert -O foo a.raw b",
        "convert -O qcow2 -o foo=1 a.raw b",
        "convert -O qcow2 -o cluster_size=1000 a.raw b",
        "convert -O qcow2 -o compat=3 a.raw b",
        "convert -O vmdk -o subformat=foo a.raw b",
        "convert -O qcow2 -o ,help a.raw b",
        "convert -O qcow2 -o backing_file=a,,, a.raw b",
        "convert . b",
        "check nonexistent",
        "check -f qcow2 a.raw",
        "check -U -r all base.qcow2",
        "check -T foo base.qcow2",
        "create a",
        "create -f qcow2 c.qcow2 9E",
        "create -f qcow2 c.qcow2 -- -1",
        "create -f foo b 1M",
        "create -f dmg b 1M",
        "create -f qcow2 -o foo=1 c.qcow2 1M",
        "create -f qcow2 -o cluster_size=abc c.qcow2 1M",
        "create -f qcow2 -o lazy_refcounts=maybe c.qcow2 1M",
        "create -f qcow2 -o preallocation=foo c.qcow2 1M",
        "create -f qcow2 -o compat=foo c.qcow2 1M",
        "create -f qcow2 -o cluster_size=1000 c.qcow2 1M",
        "create -f qcow2 -o compat=0.10,lazy_refcounts=on c.qcow2 1M",
        "create -f qcow2 -o refcount_bits=3 c.qcow2 1M",
        "create -f qcow2 -o refcount_bits=8,compat=0.10 c.qcow2 1M",
        "create -f qcow2 -o data_file_raw=on c.qcow2 1M",
        "create -f qcow2 -o extended_l2=on,cluster_size=8k c.qcow2 1M",
        "create -f qcow2 -o size=2M c.qcow2 1M",
        "create -f qcow2 -o cluster_size=512 c.qcow2 1E",
        "create -f qcow2 -F raw c.qcow2 1M",
        "create -f qcow2 -b nonexistent -F qcow2 c.qcow2",
        "create -f qcow2 -b base.qcow2 c.qcow2",
        "create -f qcow2 -b base.qcow2 -F foo c.qcow2",
        "create -f qcow2 -b base.qcow2 -F raw -o preallocation=full c.qcow2",
        "create -f qcow2 -b c.qcow2 -F qcow2 c.qcow2",
        "create -f qcow2 -u -b nonexistent -F qcow2 c.qcow2",
        "create -f qcow2 -u -b nonexistent c.qcow2 1M",
        "create -f qcow2 nonexistent/c.qcow2 1M",
        "create -f raw -b a.raw -F raw c.raw",
        "create -f raw -o preallocation=metadata c.raw 1M",
        "create -f vmdk -b base.qcow2 -F qcow2 c.vmdk",
        "create -f vmdk -b a.vmdk -F vmdk -o subformat=monolithicFlat c.vmdk",
        "create -f vmdk -o subformat=foo c.vmdk 1M",
        "create foo:bar 1M",
        "dd if=a.raw",
        "dd if=a.raw of=b bs=0",
        "dd if=a.raw of=b count=-1",
        "dd if=a.raw of=b conv=notrunc",
        "dd if=nonexistent of=b",
        "dd if=a.raw of=nonexistent/b",
        "bench -c 10 -s 0 a.raw",
        "bench -d 0 a.raw",
        "bench -i foo a.raw",
        "bench --flush-interval 2 a.raw",
        "bench -w -d 4 --flush-interval 2 a.raw",
        "map json:{\"driver\":\"raw\",\"offset\":65536000,\"file.filename\":\"a.raw\"}",
        "map json:{\"driver\":\"raw\",\"size\":65536000,\"file.filename\":\"a.raw\"}",
    ] {
        pair.same(line);
    }
    for line in [
        "",
        "foo",
        "info",
        "compare a.raw",
        "map a b",
        "create",
        "create a 1M b",
        "check",
        "check -r foo a.raw",
    ] {
        pair.same_but_hint(line);
    }
}

#[test]
fn help_for_options_is_the_same() {
    let Some(pair) = Pair::new(|_| ()) else { return };
    for format in ["raw", "qcow2", "vmdk"] {
        pair.same(&format!("convert -O {format} -o help"));
        pair.same(&format!("convert -O {format} -o help a b"));
    }
}

#[test]
fn damage_is_told_and_repaired_the_same() {
    let Some(pair) = Pair::new(images) else { return };
    for [leaky, corrupt] in [["leaky.qcow2", "corrupt.qcow2"]] {
        for dir in [&pair.theirs, &pair.ours] {
            let path = |name: &str| dir.path().join(name);
            let mut bytes = std::fs::read(path("base.qcow2")).unwrap();
            let word =
                |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let block = word(&bytes, word(&bytes, 48));
            // A count more than there are references to the first cluster of data.
            let at = block + 2 * 5;
            let right = bytes[at + 1];
            bytes[at + 1] = right + 1;
            std::fs::write(path(leaky), &bytes).unwrap();
            bytes[at + 1] = 0;
            std::fs::write(path(corrupt), &bytes).unwrap();
        }
        for line in [
            format!("check {leaky}"),
            format!("check --output json {leaky}"),
            format!("check -r leaks {leaky}"),
            format!("check {leaky}"),
            format!("check {corrupt}"),
            format!("check --output json {corrupt}"),
        ] {
            pair.same(&line);
        }
        let repair = format!("check -r all {corrupt}");
        let [theirs, ours] = pair.run(&repair);
        assert_eq!(theirs.2, ours.2, "{repair}");
        pair.same_disk(corrupt, "qcow2");
    }
}

#[test]
fn fresh_images_are_the_same() {
    let Some(pair) = Pair::new(images) else { return };
    for (line, name, format) in [
        ("create f.raw 1M", "f.raw", "raw"),
        ("create -f raw -o preallocation=full,size=3M f.raw", "f.raw", "raw"),
        ("create -f qcow2 f.qcow2 1000", "f.qcow2", "qcow2"),
        (
            "create -f qcow2 -o cluster_size=4k -o lazy_refcounts=on -o cluster_size=8k f.qcow2 128M",
            "f.qcow2",
            "qcow2",
        ),
        ("create -f qcow2 -o compat=0.10 f.qcow2 1T", "f.qcow2", "qcow2"),
        (
            "create -f qcow2 -o preallocation=metadata,extended_l2=on,refcount_bits=64 f.qcow2 9M",
            "f.qcow2",
            "qcow2",
        ),
        ("create -f qcow2 -o preallocation=falloc f.qcow2 9M", "f.qcow2", "qcow2"),
        ("create -f qcow2 -o cluster_size,size=1M f.qcow2", "base.qcow2", "qcow2"),
        ("create -f qcow2 -b base.qcow2 -F qcow2 f.qcow2", "f.qcow2", "qcow2"),
        ("create -f qcow2 -b base.qcow2 -F qcow2 f.qcow2 9M", "f.qcow2", "qcow2"),
        ("create -f qcow2 -b a.raw -F raw -o cluster_size=512 f.qcow2 1M", "f.qcow2", "qcow2"),
        ("create -f vmdk f.vmdk 64M", "f.vmdk", "vmdk"),
        ("create -f vmdk -o subformat=twoGbMaxExtentFlat,adapter_type=lsilogic f.vmdk 3M", "f.vmdk", "vmdk"),
        ("create -f vmdk -b a.vmdk -F vmdk f.vmdk", "f.vmdk", "vmdk"),
        ("create -q -f qcow2 f.qcow2 0", "f.qcow2", "qcow2"),
        ("create -f qcow2 -o nocow=on f.qcow2 +1M", "f.qcow2", "qcow2"),
        ("create -f raw -o nocow=on f.raw +.5M", "f.raw", "raw"),
        ("create -f vmdk -o nocow=on,size=+1M f.vmdk", "f.vmdk", "vmdk"),
    ] {
        pair.same(line);
        pair.same_disk(name, format);
    }
    for line in [
        "create -f qcow2 g.qcow2 64M",
        "info g.qcow2",
        "info --output json g.qcow2",
        "create -f qcow2 -u -b nowhere -F raw g.qcow2 1M",
        "info g.qcow2",
        "create -f qcow2 -b base.qcow2 -F qcow2 -o compat=v3,compression_type=zstd,refcount_bits=1 g.qcow2",
        "info g.qcow2",
        "map --output json g.qcow2",
    ] {
        pair.same(line);
    }
}

#[test]
fn conversions_leave_the_same_disk() {
    let Some(pair) = Pair::new(images) else { return };
    for (line, name, format) in [
        ("convert top.qcow2 b.raw", "b.raw", "raw"),
        ("convert -q -p -f qcow2 -O raw top.qcow2 b.raw", "b.raw", "raw"),
        ("convert -O qcow2 -c -o compression_type=zstd,cluster_size=4k a.raw b.qcow2", "b.qcow2", "qcow2"),
        ("convert -O vmdk -o subformat=streamOptimized a.raw b.vmdk", "b.vmdk", "vmdk"),
        ("convert -c -O vmdk a.raw b.vmdk", "b.vmdk", "vmdk"),
        ("convert -c -O vmdk -o subformat=twoGbMaxExtentSparse a.raw b.vmdk", "b.vmdk", "vmdk"),
        ("convert -l first base.qcow2 b.raw", "b.raw", "raw"),
        ("convert -l snapshot.name=first -O qcow2 base.qcow2 b.qcow2", "b.qcow2", "qcow2"),
        ("convert -n a.raw b.raw", "b.raw", "raw"),
        ("convert -n -O qcow2 a.raw top.qcow2", "top.qcow2", "qcow2"),
        ("convert -n --target-image-opts a.raw driver=raw,file.filename=b.raw", "b.raw", "raw"),
        ("convert -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 c.qcow2", "c.qcow2", "qcow2"),
        ("convert a.raw a.raw -O qcow2 b.qcow2", "b.qcow2", "qcow2"),
        ("convert -W -m 16 -t none -T none -S 64k a.raw b.raw", "b.raw", "raw"),
        ("convert --salvage a.raw b.raw", "b.raw", "raw"),
        (
            "convert -O qcow2 json:{'driver':'null-co','size':1048576,'read-zeroes':true} b.qcow2",
            "b.qcow2",
            "qcow2",
        ),
        (
            "convert json:{'driver':'raw','offset':1024,'size':65536,'file':{'driver':'file','filename':'a.raw'}} b.raw",
            "b.raw",
            "raw",
        ),
        ("dd if=base.qcow2 of=d.raw", "d.raw", "raw"),
        ("dd -f qcow2 -O qcow2 bs=64k skip=3 count=7 if=top.qcow2 of=d.qcow2", "d.qcow2", "qcow2"),
        ("dd bs=1M skip=50 if=a.raw of=d.raw", "d.raw", "raw"),
        ("dd bs=513 count=1 if=a.raw of=d.raw", "d.raw", "raw"),
        ("convert --image-opts driver=qcow2,file.filename=top.qcow2 b.raw", "b.raw", "raw"),
    ] {
        pair.same(line);
        pair.same_disk(name, format);
    }
}

/// What stands for bytes that are no text would be the name of another file.
#[test]
fn names_of_any_bytes_are_those_files_or_refused() {
    let dir = scratch();
    let (odd, other) = (OsStr::from_bytes(b"o\xfe"), OsStr::from_bytes(b"o\xef\xbf\xbd"));
    let path = |name: &OsStr| dir.path().join(name);
    let with = |start: &str, name: &OsStr| OsString::from_vec([start.as_bytes(), name.as_bytes()].concat());
    let img = |words: &[&OsStr]| {
        let qemu_img = Cmd::new(env!("CARGO_BIN_EXE_diskmill")).arg("qemu-img");
        qemu_img.args(words).dir(dir.path()).run()
    };
    let keep = || assert_eq!(content(&path(other)), "keep");
    std::fs::write(path(other), "keep").unwrap();
    std::fs::write(path("a.raw".as_ref()), [7; 4096]).unwrap();
    let done = img(&["dd".as_ref(), "if=a.raw".as_ref(), &with("of=", odd)]);
    assert_eq!(done.code, Some(0), "{done}");
    assert_eq!(std::fs::read(path(odd)).unwrap(), [7; 4096]);
    let done = img(&["dd".as_ref(), &with("if=", odd), "of=b.raw".as_ref()]);
    assert_eq!(done.code, Some(0), "{done}");
    keep();

    let words = |line: &'static str| line.split(' ').map(OsStr::new).collect::<Vec<_>>();
    assert_eq!(img(&words("create -q -f qcow2 top 1M")).code, Some(0));
    let data_file = with("data_file=", odd);
    let backed = with("backing_fmt=raw,backing_file=", odd);
    let image_opts = with("driver=raw,file.filename=", odd);
    let json = with("json:{\"driver\":\"raw\",\"file.filename\":\"", OsStr::from_bytes(b"o\xfe\"}"));
    for (line, name) in [
        ("rebase -u -F raw top -b", odd),
        ("create -f qcow2 c 1M -o", &data_file),
        ("create -f qcow2 c -F raw -b", odd),
        ("convert -O qcow2 a.raw c -o", &backed),
        ("info --image-opts", &image_opts),
        ("info", &json),
        ("snapshot top -c", odd),
        ("bitmap --add top", odd),
    ] {
        let refused = img(&[words(line), vec![name]].concat());
        assert_eq!(refused.code, Some(1), "{line}: {refused}");
        assert!(refused.err().contains("is not valid UTF-8"), "{line}: {refused}");
        assert!(!path("c".as_ref()).exists(), "{line}");
    }
    keep();

    // A folder of any name is where the names in its images start.
    let folder = path(OsStr::from_bytes(b"d\xfe"));
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("base"), [7; 4096]).unwrap();
    let top = folder.join("top");
    let done = img(&[words("create -q -f qcow2 -F raw -b base"), vec![top.as_ref()]].concat());
    assert_eq!(done.code, Some(0), "{done}");
}

#[test]
fn it_says_what_it_stands_for() {
    let dir = scratch();
    let diskmill = || Cmd::new(env!("CARGO_BIN_EXE_diskmill"));
    diskmill().arg("install-qemu-img").arg(dir.path()).ok();
    diskmill().arg("install-qemu-img").arg(dir.path()).ok();
    let link = dir.path().join("qemu-img");
    let version = Cmd::new(&link).arg("--version").ok().out();
    assert!(version.starts_with("qemu-img version 10."), "{version}");
    let help = Cmd::new(&link).arg("--help").ok().out();
    assert!(help.contains("convert") && help.contains("Supported formats:"), "{help}");
    let help = Cmd::new(&link).args(["convert", "--help"]).ok().out();
    assert!(help.contains("--target-is-zero"), "{help}");

    let other = scratch();
    std::fs::write(other.path().join("qemu-img"), "another program").unwrap();
    let refused = diskmill().arg("install-qemu-img").arg(other.path()).run();
    assert_eq!(refused.code, Some(1), "{}", refused.err());
    assert_eq!(content(&other.path().join("qemu-img")), "another program");
    diskmill().args(["install-qemu-img", "--force"]).arg(other.path()).ok();
    assert!(Cmd::new(other.path().join("qemu-img")).arg("--version").ok().out().starts_with("qemu-img"));
}

fn content(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn passphrases_reach_the_image() {
    let key = "--object secret,id=s,data=abc";
    let image = |name: &str| format!("driver=qcow2,encrypt.key-secret=s,file.filename={name}");
    let Some(pair) = Pair::new(|oracle| {
        let luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
        let create = format!("create -q {key} -f qcow2 -o {luks}");
        for name in ["a.qcow2", "b.qcow2"] {
            oracle.img(create.split(' ').chain([name, "2M"])).ok();
        }
        let write = format!("{key} --image-opts {}", image("a.qcow2"));
        oracle.io(["-c", "write -P 7 64k 300k"]).args(write.split(' ')).ok();
    }) else {
        return;
    };
    pair.same(&format!("convert {key} --image-opts {} -O raw a.raw", image("a.qcow2")));
    pair.same_disk("a.raw", "raw");
    pair.same(&format!("map {key} --output json --image-opts {}", image("a.qcow2")));
    pair.same(&format!("compare {key} --image-opts {} driver=raw,file.filename=a.raw", image("a.qcow2")));
    for line in [
        format!("convert {} -O raw b.raw", "a.qcow2"),
        format!("convert --image-opts {} -O raw b.raw", image("a.qcow2")),
        format!("convert --object secret,id=s,data=wrong --image-opts {} -O raw b.raw", image("a.qcow2")),
        format!(
            "convert -n --image-opts --target-image-opts driver=raw,file.filename=a.raw {}",
            image("b.qcow2")
        ),
    ] {
        pair.same(&line);
    }
}

#[test]
fn bitmaps_change_the_same() {
    let Some(pair) = Pair::new(|oracle| {
        images(oracle);
        oracle.create("other.qcow2", "", 8 << 20);
        oracle.img(["bitmap", "--add", "other.qcow2", "b"]).ok();
        oracle.img(["bitmap", "--add", "-g", "512", "--disable", "packed.qcow2", "fine"]).ok();
        oracle.img(["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1M"]).ok();
    }) else {
        return;
    };
    for line in [
        "bitmap --add base.qcow2 b0",
        "bitmap --add -g 4k --disable base.qcow2 b1",
        "bitmap --add base.qcow2 b0",
        "bitmap --add -g 100 base.qcow2 b2",
        "bitmap --add -g 4G base.qcow2 b2",
        "bitmap --add -g 0 base.qcow2 b2",
        "bitmap --add --remove base.qcow2 b3",
        "bitmap --add --merge nope base.qcow2 b4",
        "bitmap --enable --clear base.qcow2 b1",
        "bitmap --disable base.qcow2 b0",
        "bitmap --merge b0 --merge b1 base.qcow2 b2",
        "bitmap --merge fine -b packed.qcow2 base.qcow2 b2",
        "bitmap --merge nope -b packed.qcow2 -F qcow2 base.qcow2 b2",
        "bitmap --merge b -b other.qcow2 base.qcow2 b2",
        "bitmap --remove base.qcow2 nope",
        "bitmap --remove base.qcow2 b4",
        "bitmap --clear -f raw a.raw b",
        "bitmap --merge b -b nope base.qcow2 b2",
        "info --output json packed.qcow2",
        "bitmap base.qcow2 b0",
        "bitmap --add base.qcow2",
        "bitmap -g 512 --disable base.qcow2 b0",
        "bitmap -F qcow2 --add base.qcow2 b0",
        "bitmap -b base.qcow2 --add base.qcow2 b0",
        "bitmap --add nonexistent b0",
        "convert --bitmaps -O qcow2 base.qcow2 carried.qcow2",
        "convert --bitmaps -O qcow2 base.qcow2 other.qcow2 two.qcow2",
        "convert --bitmaps -O raw base.qcow2 none.raw",
        "convert --bitmaps -O qcow2 a.raw none.qcow2",
        "convert --skip-broken-bitmaps -O qcow2 base.qcow2 none.qcow2",
    ] {
        pair.same(line);
    }
    let bitmaps = |name: &str| {
        pair.path(name).map(|path| pair.oracle.info(path)["format-specific"]["data"]["bitmaps"].clone())
    };
    for name in ["base.qcow2", "carried.qcow2"] {
        let [theirs, ours] = bitmaps(name);
        assert!(theirs.is_array() && theirs == ours, "{name}: {theirs} {ours}");
    }
}
