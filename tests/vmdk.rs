//! VMDK and OVA through the program: what it writes, qemu-img, libvmdk and VMware's rules accept.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use diskmill_testkit::content::{Pattern, fill};
use diskmill_testkit::{Cmd, Oracle, TempDir, Tool, args, require_program, scratch, skip, stream_optimized};

const MIB: usize = 1 << 20;

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

/// Text, noise and holes over several grain tables, with an odd tail.
fn sample() -> Vec<u8> {
    let mut disk = vec![0; 70 * MIB + 1536];
    let mut put =
        |at: usize, pattern, len| disk[at..at + len].copy_from_slice(&fill(pattern, at as u64, len));
    put(0, Pattern::Text, 3 * MIB + 512);
    put(5 * MIB + 65_000, Pattern::Random, 2 * MIB);
    put(31 * MIB, Pattern::Text, 2 * MIB);
    put(69 * MIB, Pattern::Random, MIB + 1536);
    disk
}

struct Place {
    dir: TempDir,
    oracle: Option<Oracle>,
}

impl Place {
    fn new() -> Self {
        let dir = scratch();
        let oracle = Oracle::find(dir.path());
        Self { dir, oracle }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    fn convert(&self, more: &[&str], from: &str, to: &str) {
        diskmill().cmd(["convert"]).args(more).arg(from).arg(to).dir(self.dir.path()).ok();
    }

    /// That all who can read `image` read `content`.
    fn agree(&self, image: &str, content: &[u8]) {
        self.convert(&["-O", "raw"], image, "back.raw");
        assert!(self.read("back.raw") == content, "{image} by diskmill");
        if let Some(oracle) = &self.oracle {
            oracle.img(args!["convert", "-f", "vmdk", "-O", "raw", image, "qemu.raw"]).ok();
            assert!(self.read("qemu.raw") == content, "{image} by qemu-img");
        }
    }

    fn libvmdk(&self, image: &str, content: &[u8]) {
        let (Some(info), Some(mount)) = (require_program("vmdkinfo"), require_program("vmdkmount")) else {
            return;
        };
        let told = Cmd::new(info).arg(image).dir(self.dir.path()).ok().out();
        assert!(told.contains("Disk type"), "{told}");
        if !Path::new("/dev/fuse").exists() {
            return skip("no /dev/fuse for vmdkmount");
        }
        let at = self.path("mnt");
        std::fs::create_dir_all(&at).unwrap();
        if Cmd::new(mount).args(args![image, &at]).dir(self.dir.path()).run().code != Some(0) {
            return skip("vmdkmount cannot mount here");
        }
        let mounted = std::fs::read(at.join("vmdk1"));
        // The file system is busy until its daemon has answered the last request.
        let gone = (0..50).any(|_| {
            std::thread::sleep(Duration::from_millis(100));
            Cmd::new("umount").arg(&at).run().code == Some(0)
        });
        assert!(gone, "cannot unmount {at:?}");
        assert!(mounted.unwrap() == content, "{image} by libvmdk");
    }
}

#[test]
fn every_kind_that_is_written_is_read_by_all() {
    let place = Place::new();
    let content = sample();
    std::fs::write(place.path("a.raw"), &content).unwrap();
    let kinds = [
        "monolithicSparse",
        "monolithicSparse,zeroed_grain=on,adapter_type=ide",
        "monolithicFlat,hwversion=10",
        "twoGbMaxExtentSparse,compat6=on",
        "twoGbMaxExtentFlat,adapter_type=buslogic",
        "streamOptimized",
    ];
    for (number, kind) in kinds.iter().enumerate() {
        let image = format!("k{number}.vmdk");
        place.convert(&["-O", "vmdk", "-o", &format!("subformat={kind}")], "a.raw", &image);
        place.agree(&image, &content);
        // libvmdk 20200926 knows the type, but calls it unsupported.
        if !kind.starts_with("monolithicFlat") {
            place.libvmdk(&image, &content);
        }
        if let Some(oracle) = &place.oracle
            && kind.contains("parse")
        {
            oracle.img(args!["check", "-f", "vmdk", &image]).ok();
        }
        let first = place.read(&image);
        // The same input and options give the same bytes, with any number of threads.
        place.convert(&["-O", "vmdk", "--threads", "1", "-o", &format!("subformat={kind}")], "a.raw", &image);
        assert!(place.read(&image) == first, "{kind}");
    }
}

#[test]
fn large_disks_are_split_where_vmware_splits_them() {
    let place = Place::new();
    let file = std::fs::File::create(place.path("a.raw")).unwrap();
    let size = 5u64 << 30;
    file.set_len(size).unwrap();
    let split = 2047u64 << 20;
    // Across the first border, at the second one, and the last byte.
    for (at, len) in [(0, 3), (split - 100_000, 200_000), (2 * split, 70_000), (size - 1, 1)] {
        file.write_all_at(&fill(Pattern::Random, at, len), at).unwrap();
    }
    for kind in ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "monolithicSparse", "streamOptimized"] {
        place.convert(&["-O", "vmdk", "-o", &format!("subformat={kind}")], "a.raw", "b.vmdk");
        diskmill().cmd(["compare", "-f", "raw", "-F", "vmdk", "a.raw", "b.vmdk"]).dir(place.dir.path()).ok();
        if let Some(oracle) = &place.oracle {
            oracle.img(args!["compare", "-f", "raw", "-F", "vmdk", "a.raw", "b.vmdk"]).ok();
        }
        if kind == "twoGbMaxExtentSparse" {
            // One extent alone is not the disk.
            let told = diskmill().cmd(["info", "b-s001.vmdk"]).dir(place.dir.path()).ok().err();
            assert!(told.contains("warning") && told.contains("without its descriptor"), "{told}");
        }
        let letter = if kind == "twoGbMaxExtentSparse" { 's' } else { 'f' };
        let parts = (1..9).filter(|n| place.path(&format!("b-{letter}00{n}.vmdk")).exists()).count();
        assert_eq!(parts, if kind.starts_with("twoGb") { 3 } else { 0 }, "{kind}");
        for n in 1..=parts {
            std::fs::remove_file(place.path(&format!("b-{letter}00{n}.vmdk"))).unwrap();
        }
    }
}

#[test]
fn disks_of_no_and_of_few_bytes() {
    let place = Place::new();
    for len in [0, 512, 65_536] {
        std::fs::write(place.path("a.raw"), fill(Pattern::Random, 1, len)).unwrap();
        for kind in [
            "monolithicSparse",
            "monolithicFlat",
            "twoGbMaxExtentSparse",
            "twoGbMaxExtentFlat",
            "streamOptimized",
        ] {
            if len == 0 && kind.starts_with("twoGb") {
                // It would have no extents, and a descriptor without extents is none.
                let options = format!("subformat={kind}");
                let refused = diskmill().cmd(["convert", "-O", "vmdk", "-o", &options, "a.raw", "x.vmdk"]);
                assert_eq!(refused.dir(place.dir.path()).run().code, Some(1));
                continue;
            }
            place.convert(&["-O", "vmdk", "-o", &format!("subformat={kind}")], "a.raw", "b.vmdk");
            place.convert(&["-O", "raw"], "b.vmdk", "c.raw");
            assert!(place.read("c.raw") == place.read("a.raw"), "{kind} {len}");
        }
    }
}

#[test]
fn streams_keep_every_rule() {
    let place = Place::new();
    let content = sample();
    std::fs::write(place.path("a.raw"), &content).unwrap();
    place.convert(&["-O", "vmdk", "-o", "subformat=streamOptimized"], "a.raw", "a.vmdk");
    let stream = stream_optimized::check(&place.read("a.vmdk")).unwrap();
    assert!(stream.content == content);
    assert_eq!(stream.tables, 3, "tables 0, 1 and 2 have grains");
    assert!(stream.descriptor.contains("ddb.adapterType = \"lsilogic\""), "{}", stream.descriptor);

    // Through a pipe, but for the name, the same; and from qcow2, compressed and not.
    let piped = diskmill().cmd(["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "a.raw", "-"]);
    let piped = piped.dir(place.dir.path()).ok().stdout;
    assert_eq!(piped.len(), place.read("a.vmdk").len());
    assert!(stream_optimized::check(&piped).unwrap().content == content);
    assert!(piped[65_536..] == place.read("a.vmdk")[65_536..]);
    place.convert(&["-O", "qcow2", "-c"], "a.raw", "a.qcow2");
    place.convert(&["-O", "vmdk", "-o", "subformat=streamOptimized"], "a.qcow2", "b.vmdk");
    assert!(stream_optimized::check(&place.read("b.vmdk")).unwrap().content == content);
    // And a stream from a pipe, whose size is not known beforehand.
    let from_pipe = diskmill().cmd([
        "convert",
        "-f",
        "raw",
        "-O",
        "vmdk",
        "-o",
        "subformat=streamOptimized",
        "-",
        "c.vmdk",
    ]);
    from_pipe.stdin_bytes(content.clone()).dir(place.dir.path()).ok();
    assert!(stream_optimized::check(&place.read("c.vmdk")).unwrap().content == content);

    for (name, len) in [("empty", 40 * MIB), ("nothing", 0), ("sector", 512)] {
        let raw = format!("{name}.raw");
        std::fs::write(place.path(&raw), vec![u8::from(len == 512); len]).unwrap();
        place.convert(&["-O", "vmdk", "-o", "subformat=streamOptimized"], &raw, "e.vmdk");
        let stream = stream_optimized::check(&place.read("e.vmdk")).unwrap();
        assert_eq!((stream.capacity, stream.grains), (len as u64, usize::from(len == 512)), "{name}");
        place.convert(&["-O", "raw"], "e.vmdk", "e.raw");
        assert!(place.read("e.raw") == place.read(&raw), "{name}");
    }
}

/// With the least memory jobs end where there is no room for the next grain; with less, the error says how much it takes.
#[test]
fn streams_from_pipes_need_little_memory() {
    let place = Place::new();
    let content = sample();
    std::fs::write(place.path("a.raw"), &content).unwrap();
    place.convert(&["-O", "vmdk", "-o", "subformat=streamOptimized"], "a.raw", "a.vmdk");
    let stream = place.read("a.vmdk");
    let targets = [
        &["-O", "raw"][..],
        &["-O", "raw", "-S", "0"],
        &["-O", "qcow2", "-c"],
        &["-O", "qcow2", "-o", "cluster_size=512"],
        // A cluster holds several grains.
        &["-O", "qcow2", "-o", "cluster_size=2M"],
    ];
    for target in targets {
        let convert = |memory: &str| {
            let cmd = diskmill().cmd(["convert", "-f", "vmdk", "--memory", memory]).args(target);
            cmd.args(["-", "out"]).stdin_bytes(stream.clone()).dir(place.dir.path())
        };
        let out = convert("2M").fails(1);
        let error = out.err();
        let need: String = error
            .split("--memory ")
            .nth(1)
            .unwrap_or_else(|| panic!("{out}"))
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        convert(&need).ok();
        place.convert(&["-O", "raw"], "out", "back.raw");
        assert!(place.read("back.raw") == content, "{target:?} in {need} bytes");
    }
}

#[test]
fn deltas_name_their_parent() {
    let place = Place::new();
    let mut content = sample();
    std::fs::write(place.path("a.raw"), &content).unwrap();
    place.convert(&["-O", "vmdk"], "a.raw", "base.vmdk");
    let Some(oracle) = &place.oracle else { return };
    oracle.img(args!["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "top.vmdk"]).ok();
    oracle.io(args!["-f", "vmdk", "-c", "write -P 7 64k 128k", "-c", "write -P 0 31M 1M", "top.vmdk"]).ok();
    content[65_536..65_536 * 3].fill(7);
    content[31 * MIB..32 * MIB].fill(0);
    for options in ["subformat=monolithicSparse", "zeroed_grain=on", "subformat=twoGbMaxExtentSparse"] {
        place.convert(&["-O", "vmdk", "-o", options, "-B", "base.vmdk"], "top.vmdk", "delta.vmdk");
        place.convert(&["-O", "raw"], "delta.vmdk", "back.raw");
        assert!(place.read("back.raw") == content, "{options}");
        oracle.img(args!["convert", "-f", "vmdk", "-O", "raw", "delta.vmdk", "qemu.raw"]).ok();
        assert!(place.read("qemu.raw") == content, "{options} by qemu-img");
    }
}

#[test]
fn archives_are_written_and_read_back() {
    let place = Place::new();
    let content = sample();
    std::fs::write(place.path("a.raw"), &content).unwrap();
    place.convert(&["-O", "ova"], "a.raw", "vm.ova");
    place.convert(&["-O", "raw"], "vm.ova", "back.raw");
    assert!(place.read("back.raw") == content);
    let listed = Cmd::new("tar").args(["-tf", "vm.ova"]).dir(place.dir.path()).ok().out();
    assert_eq!(listed.lines().collect::<Vec<_>>(), ["vm.ovf", "vm.mf", "vm-disk1.vmdk"]);
    Cmd::new("tar").args(["-xf", "vm.ova"]).dir(place.dir.path()).ok();
    assert!(stream_optimized::check(&place.read("vm-disk1.vmdk")).unwrap().content == content);
    let size = place.read("vm-disk1.vmdk").len();
    let envelope = String::from_utf8(place.read("vm.ovf")).unwrap();
    assert!(envelope.contains(&format!("ovf:size=\"{size}\"")), "{envelope}");
    for name in ["vm.ovf", "vm-disk1.vmdk"] {
        let digest = diskmill_testkit::sha256_bytes(&place.read(name));
        let manifest = String::from_utf8(place.read("vm.mf")).unwrap();
        assert!(manifest.contains(&format!("SHA256({name})= {digest}")), "{manifest}");
    }
    use diskmill::ova::Outcome;
    let checks = diskmill::ova::verify(place.path("vm.ova"), &diskmill::Limits::default()).unwrap();
    assert!(checks.iter().all(|check| check.outcome == Outcome::Same) && checks.len() == 2, "{checks:?}");

    let run = |line: &[&str]| diskmill().cmd(line).dir(place.dir.path());
    run(&["convert", "--verify", "vm.ova", "verified.raw"]).ok();
    run(&["info", "--verify", "vm.ova"]).ok();
    let mut forged = place.read("vm.ova");
    // In the name of the machine: nothing but the manifest tells.
    let at = forged.windows(6).position(|window| window == b"<Name>").unwrap();
    forged[at + 6] ^= 1;
    std::fs::write(place.path("forged.ova"), forged).unwrap();
    for line in [&["convert", "--verify", "forged.ova", "x.raw"][..], &["info", "--verify", "forged.ova"]] {
        let outcome = run(line).fails(1);
        assert!(outcome.err().contains("\"vm.ovf\" has another digest"), "{outcome}");
        assert!(outcome.stdout.is_empty() && !place.path("x.raw").exists());
    }
    run(&["convert", "forged.ova", "x.raw"]).ok();
    run(&["convert", "--verify", "a.raw", "y.raw"]).fails(1);
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let place = Place::new();
    std::fs::write(place.path("a.raw"), vec![1; MIB]).unwrap();
    for options in [
        "subformat=vmfs",
        "adapter_type=nvme",
        "subformat=streamOptimized,zeroed_grain=on",
        "subformat=monolithicFlat,backing_file=a.raw",
        "compat6=on,hwversion=9",
        "nonsense=1",
        "backing_file=a.raw",
    ] {
        let outcome = diskmill()
            .cmd(["convert", "-O", "vmdk", "-o", options, "a.raw", "x.vmdk"])
            .dir(place.dir.path())
            .run();
        assert!(matches!(outcome.code, Some(code) if code != 0), "{options}");
        assert!(!place.path("x.vmdk").exists(), "{options}");
    }
    let left = std::fs::read_dir(place.dir.path()).unwrap().count();
    assert_eq!(left, 1, "only the source is there");
}
