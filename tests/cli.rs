//! The command line: help, errors, exit codes, and output that programs read, against qemu-img's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use diskmill_testkit::content::{Pattern, disk, fill};
use diskmill_testkit::{Oracle, Tool, parallel, same_content, scratch, steps};
use serde_json::Value;

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

#[test]
fn help_names_every_option() {
    let verbs: [(&str, &[&str]); 4] = [
        (
            "convert",
            &[
                "--source-format",
                "--target-format",
                "--options",
                "--compress",
                "--level",
                "--progress",
                "--sparse-size",
                "--force-share",
                "--no-create",
                "--target-is-zero",
                "--backing",
                "--backing-format",
                "--snapshot",
                "--threads",
                "--memory",
                "--io",
                "--direct",
                "--sync",
                "--salvage",
                "--json",
                "--allow-path",
                "--allow-any-path",
            ],
        ),
        ("info", &["--output", "--force-share", "--backing-chain"]),
        ("map", &["--output", "--force-share"]),
        ("compare", &["--output", "--force-share"]),
    ];
    let all = diskmill().cmd(["--help"]).ok().out();
    for (verb, options) in verbs {
        assert!(all.contains(verb), "{verb} is missing: {all}");
        let help = diskmill().cmd([verb, "--help"]).ok().out();
        for option in options {
            assert!(help.contains(option), "{verb} --help does not name {option}: {help}");
        }
    }
    let version = diskmill().cmd(["--version"]).ok().out();
    assert!(
        version.starts_with("diskmill ") && version.contains("deflate by ") && version.contains("zstd by ")
    );
}

/// The texts behind the options are wrapped where the terminal ends, and nowhere else.
#[test]
fn notes_of_helps_wrap_at_the_end_of_the_line() {
    const WIDTH: usize = 70;
    let verbs: [&[&str]; 13] = [
        &["convert"],
        &["compare"],
        &["check"],
        &["create"],
        &["resize"],
        &["rebase"],
        &["commit"],
        &["amend"],
        &["snapshot"],
        &["serve"],
        &["doctor"],
        &["session"],
        &["fs"],
    ];
    for verb in verbs {
        let help = diskmill().cmd(verb).arg("--help").env("COLUMNS", WIDTH.to_string()).ok().out();
        let notes: Vec<_> = help.lines().rev().take_while(|line| !line.starts_with(' ')).collect();
        let mut notes = notes.into_iter().rev().peekable();
        while let Some(line) = notes.next() {
            let next = notes.peek().and_then(|next| next.split(' ').next()).unwrap_or_default();
            // Sentences may start a line.
            let wrapped = next.is_empty() || next.starts_with(char::is_uppercase);
            assert!(wrapped || line.len() + 1 + next.len() > WIDTH, "{verb:?}: {line:?} {next:?}");
        }
    }
}

#[test]
fn json_is_short_for_output_json() {
    let dir = scratch();
    let run = |args: &[&str]| diskmill().cmd(args).dir(dir.path()).ok();
    run(&["create", "a.qcow2", "1M"]);
    for verb in [
        &["info", "a.qcow2"][..],
        &["map", "a.qcow2"],
        &["check", "a.qcow2"],
        &["compare", "a.qcow2", "a.qcow2"],
        &["measure", "a.qcow2"],
        &["bitmap", "a.qcow2"],
        &["snapshot", "list", "a.qcow2"],
    ] {
        let [short, long] = [&["--json"][..], &["--output", "json"]].map(|form| run(&[verb, form].concat()));
        assert_eq!(short.json(), long.json(), "{verb:?}");
    }
}

#[test]
fn wrong_usage_exits_with_2() {
    let wrong: [&[&str]; 28] = [
        &[],
        &["no-such-verb"],
        &["convert"],
        &["convert", "one-name"],
        &["convert", "--no-such-option", "a", "b"],
        &["convert", "--threads", "many", "a", "b"],
        &["convert", "--memory", "1Q", "a", "b"],
        &["convert", "--io", "magic", "a", "b"],
        &["convert", "--progress", "loud", "a", "b"],
        &["info"],
        &["map", "--output", "xml", "a"],
        &["compare", "a"],
        // Mistakes that the library finds, before it opens an image.
        &["convert", "-O", "raw", "-c", "a", "b"],
        &["convert", "--level", "3", "-O", "qcow2", "a", "b"],
        &["convert", "--level", "3", "-O", "vmdk", "a", "b"],
        &["convert", "-c", "--level", "13", "-O", "qcow2", "a", "b"],
        &["convert", "--level", "13", "-O", "ova", "a", "b"],
        &["convert", "-o", "foo=1", "-O", "qcow2", "a", "b"],
        &["convert", "-o", "cluster_size=3k", "-O", "qcow2", "a", "b"],
        &["convert", "--threads", "0", "a", "b"],
        &["convert", "--memory", "0", "a", "b"],
        &["convert", "--reflink=always", "-S", "0", "a", "b"],
        &["convert", "--target-is-zero", "a", "b"],
        &["convert", "--verify-packed", "--trust-packed", "a", "b"],
        &["create", "-f", "qcow2", "-o", "cluster_size=3k", "/gone/a", "1M"],
        &["create", "-f", "qcow2", "-o", "size=2M", "/gone/a", "1M"],
        &["measure", "-O", "vmdk", "--size", "1M"],
        &["amend", "-o", "refcount_bits=some", "a"],
    ];
    for args in wrong {
        let out = diskmill().cmd(args).run();
        assert!(out.code == Some(2) && !out.err().is_empty(), "{out}");
        assert!(out.stdout.is_empty(), "an error on standard output: {out}");
    }
}

#[test]
fn what_may_be_a_mistake_is_told_and_what_helps_with_damage() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    diskmill().cmd(["create", "-f", "qcow2", &path("a.qcow2"), "1M"]).ok();

    // The name tells of qcow2, and raw is what is written without -O.
    let warned = diskmill().cmd(["convert", &path("a.qcow2"), &path("b.qcow2")]).ok().err();
    assert!(warned.contains("becomes a raw image") && warned.contains("-O qcow2"), "{warned}");
    // Formats that are not written.
    let warned = diskmill().cmd(["convert", &path("a.qcow2"), &path("b.vhdx")]).ok().err();
    assert!(warned.contains("becomes a raw image") && warned.contains("vhdx is not supported"), "{warned}");
    for name in ["c.vhdx", "c.VDI", "c.ova"] {
        diskmill().cmd(["create", &path(name), "1M"]).run().says(&["not supported"]);
        assert!(!Path::new(&path(name)).exists(), "{name}");
    }
    diskmill().cmd(["create", "-f", "raw", &path("c.vhdx"), "1M"]).ok();
    for quiet in [&["-O", "raw"][..], &["-q"]] {
        let said =
            diskmill().cmd(["convert"]).args(quiet).args([path("a.qcow2"), path("b.qcow2")]).ok().err();
        assert_eq!(said, "", "{quiet:?}");
    }

    std::fs::OpenOptions::new().write(true).open(path("a.qcow2")).unwrap().set_len(70_000).unwrap();
    let failed = diskmill().cmd(["convert", &path("a.qcow2"), &path("c.raw")]).fails(1).err();
    assert!(
        failed.contains("truncated") && failed.contains("hint: ") && failed.contains("--salvage"),
        "{failed}"
    );
    // No colours where no terminal is.
    assert!(!failed.contains('\x1b'), "{failed:?}");
}

#[test]
fn command_lines_of_qemu_img_without_a_link() {
    let dir = scratch();
    let (input, output) = (dir.path().join("in.raw"), dir.path().join("out.raw"));
    std::fs::write(&input, fill(Pattern::Random, 1, 1 << 20)).unwrap();
    let operands = [format!("if={}", input.display()), format!("of={}", output.display())];
    diskmill().cmd(["qemu-img", "dd", "bs=64k", "skip=2", "count=5"]).args(operands).ok();
    let want = &std::fs::read(&input).unwrap()[128 << 10..320 << 10];
    assert_eq!(std::fs::read(&output).unwrap(), want);
    let help = diskmill().cmd(["qemu-img", "--help"]).ok().out();
    assert!(help.starts_with("qemu-img version "), "{help}");
    let wrong = diskmill().cmd(["qemu-img", "frobnicate"]).fails(1).err();
    assert!(wrong.starts_with("qemu-img: Command not found: frobnicate"), "{wrong}");
    // Its only code for mistakes is 1.
    for option in ["foo=1", "cluster_size=3k", "compat=0.10,lazy_refcounts=on"] {
        diskmill().cmd(["qemu-img", "convert", "-O", "qcow2", "-o", option, "a", "b"]).fails(1);
    }
}

#[test]
fn formats_that_do_not_exist_are_named() {
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("in.raw"), [0; 512]).unwrap();
    for flag in ["-f", "-O"] {
        let out = diskmill().cmd(["convert", flag, "floppy", "in.raw", "out"]).dir(dir).run();
        assert!(matches!(out.code, Some(1 | 2)), "{out}");
        out.says(&["floppy"]);
    }
    // qcow2 by option, raw by content.
    let out = diskmill().cmd(["convert", "-f", "qcow2", "in.raw", "out"]).dir(dir).fails(1);
    out.says(&["qcow2"]);
}

/// Images of many kinds in one folder, all with relative names.
fn zoo(q: &Oracle, dir: &Path) -> Vec<(&'static str, &'static str)> {
    let size = (2 << 20) + 512;
    let images = [
        ("plain.qcow2", "", true),
        ("v2.qcow2", "compat=v2", true),
        ("small.qcow2", "cluster_size=512,refcount_bits=1", false),
        ("large.qcow2", "cluster_size=2M", true),
        ("zstd.qcow2", "compression_type=zstd", true),
        ("sub.qcow2", "extended_l2=on", true),
        ("lazy.qcow2", "lazy_refcounts=on", true),
        ("metadata.qcow2", "preallocation=metadata", false),
        ("full.qcow2", "preallocation=full", false),
        ("data.qcow2", "data_file=data.bin,data_file_raw=on", false),
        ("snapshots.qcow2", "", true),
        ("empty.qcow2", "", true),
    ];
    let mut all = Vec::new();
    for (name, options, packed) in images {
        q.create(name, options, size);
        if name != "empty.qcow2" {
            let cluster = q.info(name)["cluster-size"].as_u64().unwrap();
            q.write(name, "qcow2", &steps(9, size, cluster, 16, packed));
        }
        all.push((name, "qcow2"));
    }
    q.snapshot("snapshots.qcow2", "one");
    q.write("snapshots.qcow2", "qcow2", &steps(3, size, 65536, 5, false));
    q.snapshot("snapshots.qcow2", "two words");
    for (name, options, backing) in [
        ("over.qcow2", "", ("plain.qcow2", "qcow2")),
        ("over2.qcow2", "cluster_size=4k", ("over.qcow2", "qcow2")),
        ("over-raw.qcow2", "extended_l2=on", ("raw.raw", "raw")),
    ] {
        if backing.1 == "raw" {
            std::fs::write(dir.join("raw.raw"), disk(4, 1 << 20)).unwrap();
        }
        q.create_over(name, options, size + (1 << 20), backing);
        q.write(name, "qcow2", &steps(8, size, 65536, 6, false));
        all.push((name, "qcow2"));
    }
    let sparse = std::fs::File::create(dir.join("sparse.raw")).unwrap();
    sparse.set_len(size).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[1; 8192], 1 << 20).unwrap();
    all.extend([("raw.raw", "raw"), ("sparse.raw", "raw")]);
    all
}

/// Panics unless both hold the same keys and values; only what depends on the moment is let go.
fn same_json(path: &str, ours: &Value, theirs: &Value) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            let keys = |o: &serde_json::Map<String, Value>| {
                let mut keys: Vec<String> = o.keys().cloned().collect();
                keys.sort();
                keys
            };
            assert_eq!(keys(a), keys(b), "keys of {path}");
            for (key, value) in a {
                if key != "actual-size" {
                    same_json(&format!("{path}.{key}"), value, &b[key]);
                }
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "length of {path}");
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                same_json(&format!("{path}[{i}]"), a, b);
            }
        }
        _ => assert_eq!(ours, theirs, "{path}"),
    }
}

#[test]
fn info_in_json_is_qemu_imgs() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    parallel(&zoo(&q, dir), |(name, format)| {
        for more in [&[][..], &["--backing-chain"]] {
            let args = ["info", "-f", format, "--output=json"];
            let theirs = q.img(args).args(more).arg(name).ok();
            let ours = diskmill().cmd(args).args(more).arg(name).dir(dir).ok();
            same_json(name, &ours.json(), &theirs.json());
        }
    });
}

#[test]
fn info_for_people_names_what_qemu_img_names() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    parallel(&zoo(&q, dir), |(name, format)| {
        let theirs = q.img(["info", "-f", format, name]).ok().out();
        let ours = diskmill().cmd(["info", "-f", format, name]).dir(dir).ok().out();
        for key in ["image: ", "file format: ", "virtual size: ", "cluster_size: ", "backing file: "] {
            let line = |text: &str| text.lines().find(|l| l.starts_with(key)).map(str::to_owned);
            assert_eq!(line(&ours), line(&theirs), "{ours}\n{theirs}");
        }
    });
}

#[test]
fn map_is_qemu_imgs_byte_for_byte() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    parallel(&zoo(&q, dir), |(name, format)| {
        let theirs = q.map(name, format);
        let cmd = diskmill().cmd(["map", "--output=json", "-f", format, name]);
        let ours = cmd.dir(dir).ok();
        assert_eq!(ours.out(), theirs.out(), "{name}");
        // A part of it.
        let theirs = q.img(["map", "--output=json", "-f", format]);
        let theirs = theirs.args(["--start-offset", "100000", "--max-length", "900000", name]).ok();
        let ours = diskmill().cmd(["map", "--output=json", "-f", format]);
        let ours = ours.args(["-s", "100000", "-l", "900000", name]).dir(dir).ok();
        assert_eq!(ours.out(), theirs.out(), "{name}, in part");
    });
}

#[test]
fn map_for_people_is_qemu_imgs() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    parallel(&zoo(&q, dir), |(name, format)| {
        let theirs = q.img(["map", "-f", format, name]).run();
        let ours = diskmill().cmd(["map", "-f", format, name]).dir(dir).run();
        // Compressed clusters have no place in this table: qemu-img refuses such images.
        assert_eq!(ours.code, theirs.code, "{ours}\n{theirs}");
        if theirs.code == Some(0) {
            assert_eq!(ours.out(), theirs.out(), "{name}");
        }
    });
}

#[test]
fn compare_answers_like_qemu_img() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let content = disk(1, (1 << 20) + 512);
    let file = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).unwrap();
    file("a.raw", &content);
    let mut other = content.clone();
    other[700 * 1024] ^= 1;
    file("differs.raw", &other);
    let mut first = content.clone();
    first[0] ^= 1;
    file("first.raw", &first);
    let longer = |fill: u8| [content.clone(), vec![fill; 65536]].concat();
    file("longer-zeros.raw", &longer(0));
    file("longer.raw", &longer(7));
    for (source, image, more) in [
        ("a.raw", "a.qcow2", &[][..]),
        ("a.raw", "c.qcow2", &["-c"]),
        ("differs.raw", "differs.qcow2", &["-c"]),
        ("longer.raw", "longer.qcow2", &[]),
    ] {
        q.img(["convert", "-f", "raw", "-O", "qcow2"]).args(more).args([source, image]).ok();
    }
    let images = [
        "a.raw",
        "differs.raw",
        "first.raw",
        "longer-zeros.raw",
        "longer.raw",
        "a.qcow2",
        "c.qcow2",
        "differs.qcow2",
        "longer.qcow2",
    ];
    let pairs: Vec<(&str, &str)> =
        (0..images.len()).flat_map(|i| images[i..].iter().map(move |b| (images[i], *b))).collect();
    parallel(&pairs, |(a, b)| {
        let format = |name: &str| if name.ends_with("raw") { "raw" } else { "qcow2" };
        for more in [&[][..], &["-s"], &["-q"]] {
            let args = ["compare", "-f", format(a), "-F", format(b)];
            let theirs = q.img(args).args(more).args([a, b]).run();
            let ours = diskmill().cmd(args).args(more).args([a, b]).dir(dir).run();
            assert_eq!((ours.code, ours.out()), (theirs.code, theirs.out()), "{ours}\n{theirs}");
        }
    });
    let gone = diskmill().cmd(["compare", "a.raw", "gone.raw"]).dir(dir).fails(2);
    gone.says(&["gone.raw"]);
    let json = diskmill().cmd(["compare", "--output=json", "a.raw", "differs.raw"]).dir(dir).fails(1);
    assert!(json.json().is_object(), "{json}");
}

#[test]
fn several_sources_are_one_disk() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    // The second begins inside a cluster of the target.
    let parts = [disk(1, (1 << 20) + 512), disk(2, (1 << 20) + 1024), disk(3, 65536)];
    let names = ["1.raw", "2.raw", "3.raw"];
    for (name, part) in names.iter().zip(&parts) {
        std::fs::write(dir.join(name), part).unwrap();
    }
    let all = parts.concat();
    std::fs::write(dir.join("all.raw"), &all).unwrap();
    let convert = |more: &[&str], target: &str| {
        let cmd = diskmill().cmd(["convert", "-f", "raw"]).args(more).args(names);
        cmd.arg(target).dir(dir).ok();
    };
    convert(&[], "out.raw");
    same_content(&dir.join("out.raw"), &all);
    for more in [&["-O", "qcow2"][..], &["-O", "qcow2", "-c"], &["-O", "qcow2", "-o", "cluster_size=512"]] {
        convert(more, "out.qcow2");
        q.check_clean("out.qcow2");
        q.identical(("raw", "all.raw"), ("qcow2", "out.qcow2"));
    }
}

#[test]
fn no_create_writes_into_the_target_that_is_there() {
    let dir = scratch();
    let dir = dir.path();
    let content = disk(1, 1 << 20);
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    let target = dir.join("out.raw");
    // Old bytes must not show where the source is zero, unless the user says the target is zero.
    std::fs::write(&target, vec![0xee; (1 << 20) + 4096]).unwrap();
    let inode = std::fs::metadata(&target).unwrap().ino();
    let convert = |more: &[&str]| {
        let cmd = diskmill().cmd(["convert", "-n", "-f", "raw", "-O", "raw"]).args(more);
        cmd.args(["in.raw", "out.raw"]).dir(dir).run()
    };
    let out = convert(&[]).expect_code(0);
    assert_eq!(std::fs::metadata(&target).unwrap().ino(), inode, "replaced: {out}");
    let got = std::fs::read(&target).unwrap();
    assert!(got[..content.len()] == content[..], "old bytes show through");
    assert!(got.len() == content.len() || got[content.len()..] == [0xee; 4096], "the tail changed");

    std::fs::write(&target, vec![0; 1 << 20]).unwrap();
    let out = convert(&["--target-is-zero"]).expect_code(0);
    same_content(&target, &content);
    drop(out);
    // A target that is too small is not grown.
    std::fs::write(&target, vec![0; 1 << 19]).unwrap();
    convert(&[]).expect_code(1).says(&["small", "needs"]);
    // The promise needs -n, as in qemu-img.
    let out = diskmill().cmd(["convert", "--target-is-zero", "in.raw", "out.raw"]).dir(dir).run();
    assert!(matches!(out.code, Some(1 | 2)), "{out}");
}

#[test]
fn standard_input_and_output() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let content = disk(1, (3 << 20) + 512);
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    q.img(["convert", "-c", "-O", "qcow2", "in.raw", "in.qcow2"]).ok();
    // To a pipe, zeros included.
    let out = diskmill().cmd(["convert", "-O", "raw", "in.qcow2", "-"]).dir(dir).ok();
    assert!(out.stdout == content, "{} bytes on standard output", out.stdout.len());
    // From a pipe and from a file.
    for more in [&["-O", "raw"][..], &["-O", "qcow2"], &["-O", "qcow2", "-c"]] {
        let cmd = || diskmill().cmd(["convert", "-f", "raw"]).args(more).args(["-", "out"]).dir(dir);
        for cmd in [cmd().stdin_bytes(content.clone()), cmd().stdin_file(dir.join("in.raw"))] {
            cmd.ok();
            q.identical(("raw", "in.raw"), (more[1], "out"));
        }
    }
    // Through.
    let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "raw", "-", "-"]);
    assert!(cmd.stdin_bytes(content.clone()).dir(dir).ok().stdout == content);
    // Only raw.
    let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "qcow2", "in.raw", "-"]);
    let out = cmd.dir(dir).run();
    assert!(matches!(out.code, Some(1 | 2)) && out.stdout.is_empty(), "{out}");
    // A JSON result would mix with the data.
    let out = diskmill().cmd(["convert", "--json", "-O", "raw", "in.qcow2", "-"]).dir(dir).run();
    assert!(out.code != Some(0) || out.stdout == content, "JSON in the data: {out}");
}

#[test]
fn progress_for_programs() {
    let dir = scratch();
    let dir = dir.path();
    std::fs::write(dir.join("in.raw"), fill(Pattern::Random, 1, 16 << 20)).unwrap();
    let convert = |more: &[&str]| {
        let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "qcow2"]).args(more);
        cmd.args(["in.raw", "out.qcow2"]).dir(dir).ok()
    };
    // Importers parse this from standard output.
    let out = convert(&["--progress", "qemu"]).out();
    assert!(out.starts_with("    (0.00/100%)\r"), "{out:?}");
    assert!(out.trim_end().ends_with("(100.00/100%)"), "{out:?}");
    let mut last = -1.0;
    for part in out.split('\r').filter(|p| !p.trim().is_empty()) {
        let percent = part.trim().strip_prefix('(').and_then(|p| p.strip_suffix("/100%)"));
        let percent: f64 = percent.and_then(|p| p.parse().ok()).unwrap_or_else(|| panic!("{out:?}"));
        assert!(percent >= last, "{out:?}");
        last = percent;
    }
    let run = convert(&["--progress", "json"]);
    let text = run.out() + &run.err();
    let objects = text.lines().filter(|l| l.trim_start().starts_with('{'));
    let parsed = objects.map(|l| serde_json::from_str::<Value>(l).unwrap_or_else(|e| panic!("{l}: {e}")));
    assert!(parsed.count() > 0, "{run}");
    for quiet in [&[][..], &["-q"], &["--progress", "none"]] {
        let run = convert(quiet);
        assert!(run.stdout.is_empty() && run.stderr.is_empty(), "{run}");
    }
}

#[test]
fn the_json_result_adds_up() {
    let dir = scratch();
    let dir = dir.path();
    let mut content = vec![0; 4 << 20];
    content[1 << 20..2 << 20].copy_from_slice(&fill(Pattern::Random, 1, 1 << 20));
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    let cmd = diskmill().cmd(["convert", "--json", "--threads", "2", "-f", "raw", "-O", "qcow2"]);
    let out = cmd.args(["in.raw", "out.qcow2"]).dir(dir).ok();
    let json = out.json();
    let number = |key: &str| json[key].as_u64().unwrap_or_else(|| panic!("{key}: {out}"));
    assert_eq!(number("virtual-size"), 4 << 20);
    assert_eq!(number("threads"), 2);
    assert_eq!(number("bytes-zero"), 3 << 20);
    assert!(number("bytes-read") >= 1 << 20 && number("bytes-read") <= 4 << 20, "{out}");
    assert!(number("bytes-written") >= 1 << 20 && number("bytes-written") < 3 << 20, "{out}");
    assert!(matches!(json["engine"].as_str(), Some("io_uring" | "sync")), "{out}");
    assert!(json["engine-reason"].is_string() && json["seconds"].is_number(), "{out}");
    assert_eq!(json["bad-ranges"], Value::Array(Vec::new()), "{out}");
    assert!(json.get("source").is_some() && json.get("target").is_some(), "{out}");
    assert_eq!(out.out().trim().lines().count(), 1, "one line for programs that read lines: {out}");
}

#[test]
fn sparse_size_decides_what_becomes_a_hole() {
    let dir = scratch();
    let dir = dir.path();
    let mut content = vec![0; 4 << 20];
    // Single blocks of 4 KiB among zeros.
    for at in (0..content.len()).step_by(1 << 18) {
        content[at..at + 4096].fill(1);
    }
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    let blocks = |more: &[&str]| {
        diskmill().cmd(["convert", "-f", "raw"]).args(more).args(["in.raw", "out.raw"]).dir(dir).ok();
        same_content(&dir.join("out.raw"), &content);
        std::fs::metadata(dir.join("out.raw")).unwrap().blocks() * 512
    };
    assert!(blocks(&[]) < 256 << 10, "zeros are not holes");
    assert!(blocks(&["-S", "0"]) >= 4 << 20, "-S 0 writes everything");
    assert!(blocks(&["-S", "64k"]) < 2 << 20);
}

#[test]
fn a_raw_size_that_is_no_multiple_of_512_is_rounded_up_as_qemu_img_does() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    let content = fill(Pattern::Text, 1, 70_001);
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    diskmill().cmd(["convert", "-f", "raw", "-O", "qcow2", "in.raw", "out.qcow2"]).dir(dir).ok();
    q.check_clean("out.qcow2");
    let mut want = content;
    want.resize(70_144, 0);
    assert!(q.content("out.qcow2", "qcow2") == want);
}

#[test]
fn names_may_begin_with_a_dash_or_hold_odd_bytes() {
    let dir = scratch();
    let dir = dir.path();
    let content = disk(1, 65536);
    for name in ["-x", "a b", "a,b", "ümlaut", "a\nb", "a\u{1b}[31m"] {
        std::fs::write(dir.join(name), &content).unwrap();
        let cmd = diskmill().cmd(["convert", "-f", "raw", "-O", "raw", "--", name, "out.raw"]);
        cmd.dir(dir).ok();
        same_content(&dir.join("out.raw"), &content);
        std::fs::remove_file(dir.join(name)).unwrap();
    }
}

#[test]
fn letters_of_qemu_img_are_accepted() {
    // What callers pass to qemu-img today.
    let dir = scratch();
    let dir = dir.path();
    let content = disk(1, 1 << 20);
    std::fs::write(dir.join("in.raw"), &content).unwrap();
    let cmd = diskmill().cmd(["convert", "-p", "-W", "-m", "16", "-t", "none", "-T", "none", "-f", "raw"]);
    let cmd = cmd.args(["-O", "qcow2", "in.raw", "out.qcow2"]).dir(dir);
    cmd.ok();
    let cmd = diskmill().cmd(["convert", "-q", "-t", "writeback", "-T", "unsafe", "-f", "qcow2"]);
    cmd.args(["out.qcow2", "out.raw"]).dir(dir).ok();
    same_content(&dir.join("out.raw"), &content);
    let out = diskmill().cmd(["convert", "-t", "magic", "in.raw", "x"]).dir(dir).run();
    assert!(matches!(out.code, Some(1 | 2)), "{out}");
}

#[test]
fn names_from_images_do_not_drive_the_terminal() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else { return };
    q.create("a.qcow2", "", 1 << 20);
    q.snapshot("a.qcow2", "evil-name");
    let image = dir.path().join("a.qcow2");
    let mut bytes = std::fs::read(&image).unwrap();
    let at = bytes.windows(9).position(|at| at == b"evil-name").unwrap();
    bytes[at..at + 9].copy_from_slice(b"\x1b[31m\n\xc2\x9bJ");
    std::fs::write(&image, bytes).unwrap();
    let image = image.to_str().unwrap();
    for line in [
        &["convert", "-l", "none", image, "x.raw"][..],
        &["snapshot", "delete", image, "none"],
        &["qemu-img", "snapshot", "-d", "none", image],
    ] {
        let said = diskmill().cmd(line).dir(dir.path()).run().err();
        let drives = |char: char| char != '\n' && char.is_control();
        assert!(said.lines().count() < 3 && !said.contains(drives), "{said:?}");
    }
}
