//! `diskmill serve` with the clients that people use: libnbd's tools and QEMU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use diskmill_testkit::content::disk;
use diskmill_testkit::{
    Cmd, Oracle, Outcome, Running, Signal, Tool, parallel, require_program, same_content, scratch, steps,
};
use serde_json::Value;

const SIZE: u64 = (6 << 20) + 512;

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

/// A server and its folder.
struct Served {
    run: Option<Running>,
    uri: String,
}

impl Served {
    /// Serves at a socket in `dir` until it is dropped. Relative names mean `dir`.
    fn start(dir: &Path, args: &[&str]) -> Self {
        let name = format!("{}.s", fs::read_dir(dir).unwrap().count());
        let (socket, pid) = (dir.join(&name), dir.join(format!("{name}.pid")));
        let cmd = diskmill().cmd(["serve", "--pid-file"]).arg(&pid).arg("--unix").arg(&socket);
        let run = cmd.args(args).dir(dir).spawn();
        wait_for(&run, &pid);
        assert_eq!(fs::read_to_string(&pid).unwrap().trim(), run.id().to_string());
        Self { run: Some(run), uri: format!("nbd+unix:///?socket={}", socket.display()) }
    }

    fn stop(mut self) -> Outcome {
        let run = self.run.take().unwrap();
        run.signal(Signal::INT);
        run.wait().expect_code(0)
    }

    /// Ends it as a crash would.
    fn kill(mut self) {
        let run = self.run.take().unwrap();
        run.signal(Signal::KILL);
        let _ = run.wait();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(run) = &self.run {
            run.signal(Signal::KILL);
        }
    }
}

/// Waits until the server has written `file`.
fn wait_for(run: &Running, file: &Path) {
    let until = Instant::now() + Duration::from_secs(30);
    while !fs::read(file).is_ok_and(|bytes| bytes.ends_with(b"\n")) {
        assert!(!run.ended_within(Duration::from_millis(10)), "the server has ended: {file:?}");
        assert!(Instant::now() < until, "the server does not come up");
    }
}

/// libnbd's tools, or a word about why not.
fn tools() -> Option<()> {
    require_program("nbdinfo").and(require_program("nbdcopy")).map(drop)
}

/// Ranges that read as zeros, as some map tells.
fn zeros(map: &Value, zero: impl Fn(&Value) -> bool, names: (&str, &str)) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for entry in map.as_array().unwrap().iter().filter(|entry| zero(entry)) {
        let start = entry[names.0].as_u64().unwrap();
        let end = start + entry[names.1].as_u64().unwrap();
        match ranges.last_mut() {
            Some((_, last)) if *last == start => *last = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

/// What all clients must find at `uri`.
fn reads_as(q: &Oracle, dir: &Path, uri: &str, content: &Path) {
    let json = Cmd::new("nbdinfo").args(["--json", uri]).ok().json();
    let export = &json["exports"][0];
    let size = fs::metadata(content).unwrap().len();
    assert_eq!(json["structured"], true);
    for (key, want) in
        [("is_read_only", true), ("can_multi_conn", true), ("can_df", true), ("can_trim", false)]
    {
        assert_eq!(export[key], want, "{key}: {json}");
    }
    assert_eq!(export["export-size"], size);
    assert_eq!(export["contexts"][0], "base:allocation");
    let copy = dir.join(format!("copy-{}", fs::read_dir(dir).unwrap().count()));
    for more in [&[][..], &["--connections=1", "--requests=1", "--no-extents"]] {
        Cmd::new("nbdcopy").args(more).arg(uri).arg(&copy).ok();
        assert!(fs::read(&copy).unwrap() == fs::read(content).unwrap(), "nbdcopy {more:?} of {uri}");
    }
    q.identical(("raw", uri), ("raw", content));
    q.img(["convert", "-f", "raw", "-O", "raw", uri]).arg(&copy).ok();
    assert!(fs::read(&copy).unwrap() == fs::read(content).unwrap(), "qemu-img convert of {uri}");
    fs::remove_file(&copy).unwrap();
}

#[test]
fn every_kind_of_image_is_the_same_disk_to_every_client() {
    let dir = scratch();
    let dir = dir.path();
    let (Some(q), Some(())) = (Oracle::find(dir), tools()) else { return };
    let mut content = disk(5, SIZE as usize);
    content[1 << 20..3 << 20].fill(0);
    fs::write(dir.join("a.raw"), &content).unwrap();
    let theirs: [(&str, &str, &[&str]); 12] = [
        ("plain.qcow2", "qcow2", &[]),
        ("v2.qcow2", "qcow2", &["-o", "compat=v2"]),
        ("zlib.qcow2", "qcow2", &["-c"]),
        ("small.qcow2", "qcow2", &["-c", "-o", "cluster_size=512"]),
        ("large.qcow2", "qcow2", &["-c", "-o", "cluster_size=2M"]),
        ("zstd.qcow2", "qcow2", &["-c", "-o", "compression_type=zstd"]),
        ("sub.qcow2", "qcow2", &["-o", "extended_l2=on"]),
        ("sparse.vmdk", "vmdk", &[]),
        ("flat.vmdk", "vmdk", &["-o", "subformat=monolithicFlat"]),
        ("split.vmdk", "vmdk", &["-o", "subformat=twoGbMaxExtentSparse"]),
        ("splitflat.vmdk", "vmdk", &["-o", "subformat=twoGbMaxExtentFlat"]),
        ("stream.vmdk", "vmdk", &["-o", "subformat=streamOptimized"]),
    ];
    for (name, format, more) in theirs {
        q.img(["convert", "-f", "raw", "-O", format]).args(more).args(["a.raw", name]).ok();
    }
    let ours: [(&str, &[&str]); 2] =
        [("vm.ova", &["-O", "ova"]), ("esx.vmdk", &["-O", "vmdk", "-o", "subformat=streamOptimized"])];
    for (name, more) in ours {
        diskmill().cmd(["convert", "-f", "raw"]).args(more).args(["a.raw", name]).dir(dir).ok();
    }
    let mut cases: Vec<(&str, Option<&str>)> = vec![("a.raw", Some("raw"))];
    cases.extend(theirs.iter().map(|(name, format, _)| (*name, Some(*format))));
    cases.extend(ours.iter().map(|(name, _)| (*name, None)));
    parallel(&cases, |(name, format)| {
        let at = dir.join(format!("at-{name}"));
        fs::create_dir(&at).unwrap();
        let image = dir.join(name);
        let served = Served::start(&at, &[image.to_str().unwrap()]);
        reads_as(&q, &at, &served.uri, &dir.join("a.raw"));
        if let Some(format) = format {
            // Every zero that QEMU knows of in the image, it learns from us too.
            let map = q.map(&image, format).json();
            let want = zeros(&map, |entry| entry["zero"] == true, ("start", "length"));
            let map = Cmd::new("nbdinfo").args(["--json", "--map", &served.uri]).ok().json();
            let got = zeros(&map, |entry| entry["type"] == 3, ("offset", "length"));
            assert_eq!(got, want, "{name}");
        }
        let out = served.stop();
        assert!(out.err().is_empty(), "{out}");
    });
}

#[test]
fn chains_and_snapshots_are_served() {
    let dir = scratch();
    let dir = dir.path();
    let (Some(q), Some(())) = (Oracle::find(dir), tools()) else { return };
    q.create("base.qcow2", "cluster_size=4k", SIZE);
    q.write("base.qcow2", "qcow2", &steps(1, SIZE, 4096, 12, true));
    q.create_over("top.qcow2", "", SIZE + (1 << 20), ("base.qcow2", "qcow2"));
    q.write("top.qcow2", "qcow2", &steps(2, SIZE, 65536, 8, true));
    q.snapshot("top.qcow2", "before");
    fs::write(dir.join("before.raw"), q.content("top.qcow2", "qcow2")).unwrap();
    q.write("top.qcow2", "qcow2", &steps(3, SIZE, 65536, 8, false));
    fs::write(dir.join("now.raw"), q.content("top.qcow2", "qcow2")).unwrap();
    for (args, content) in [(&["top.qcow2"][..], "now.raw"), (&["-l", "before", "top.qcow2"], "before.raw")] {
        let served = Served::start(dir, args);
        reads_as(&q, dir, &served.uri, &dir.join(content));
        served.stop();
    }
}

#[test]
fn several_clients_at_once_read_a_packed_image_right() {
    let dir = scratch();
    let dir = dir.path();
    let (Some(q), Some(())) = (Oracle::find(dir), tools()) else { return };
    let content = disk(8, 24 << 20);
    fs::write(dir.join("a.raw"), &content).unwrap();
    q.img(["convert", "-f", "raw", "-O", "qcow2", "-c", "a.raw", "a.qcow2"]).ok();
    let served = Served::start(dir, &["a.qcow2"]);
    parallel(&["1", "2", "3", "4", "5", "6"], |number| {
        // Small requests: many of each cluster.
        let out = dir.join(format!("out-{number}"));
        let cmd = Cmd::new("nbdcopy").args(["--connections=2", "--request-size=4096", &served.uri]);
        cmd.arg(&out).ok();
        same_content(&out, &content);
    });
    served.stop();
}

#[test]
fn damage_is_an_error_for_the_client_and_the_server_goes_on() {
    let dir = scratch();
    let dir = dir.path();
    let (Some(q), Some(())) = (Oracle::find(dir), tools()) else { return };
    fs::write(dir.join("a.raw"), disk(8, 4 << 20)).unwrap();
    q.img(["convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2"]).ok();
    let len = fs::metadata(dir.join("a.qcow2")).unwrap().len();
    fs::OpenOptions::new().write(true).open(dir.join("a.qcow2")).unwrap().set_len(len / 2).unwrap();
    let served = Served::start(dir, &["a.qcow2"]);
    for _ in 0..2 {
        let out = Cmd::new("nbdcopy").args([&served.uri, "null:"]).run();
        assert!(out.code != Some(0), "{out}");
    }
    Cmd::new("nbdinfo").arg(&served.uri).ok();
    served.stop().says(&["the end of the file", "the file ends"]);
}

#[test]
fn a_signal_ends_it_and_leaves_nothing() {
    let dir = scratch();
    let dir = dir.path();
    fs::write(dir.join("a.raw"), disk(1, 1 << 20)).unwrap();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let served = Served::start(dir, &["-f", "raw", "a.raw"]);
        let socket = served.uri.split_once('=').unwrap().1;
        let _client = UnixStream::connect(socket).unwrap();
        // Nobody else gets the name meanwhile.
        let out = diskmill().cmd(["serve", "-f", "raw", "--unix", socket, "a.raw"]).dir(dir).fails(1);
        out.says(&["another server"]);
        let mut served = served;
        let run = served.run.take().unwrap();
        run.signal(signal);
        let out = run.wait().expect_code(0);
        assert_eq!(out.out(), format!("{}\n", served.uri));
        assert_eq!(fs::read_dir(dir).unwrap().count(), 1, "something was left behind");
    }
    // Killed, it leaves its socket; the next one takes it over.
    let mut served = Served::start(dir, &["-f", "raw", "a.raw"]);
    let run = served.run.take().unwrap();
    run.signal(Signal::KILL);
    assert_eq!(run.wait().signal, Some(9));
    let socket = dir.join("1.s");
    assert!(socket.exists());
    let _ = fs::remove_file(dir.join("1.s.pid"));
    let pid = dir.join("pid");
    let cmd = diskmill().cmd(["serve", "-f", "raw", "--pid-file"]).arg(&pid).arg("--unix").arg(&socket);
    let run = cmd.arg("a.raw").dir(dir).spawn();
    wait_for(&run, &pid);
    run.signal(Signal::INT);
    let _ = run.wait().expect_code(0);
}

#[test]
fn a_pid_file_costs_no_other_file() {
    let dir = scratch();
    let dir = dir.path();
    let disk = disk(1, 1 << 20);
    fs::write(dir.join("a.raw"), &disk).unwrap();
    fs::write(dir.join("empty.raw"), "").unwrap();
    fs::write(dir.join("notes"), "bread\n").unwrap();
    fs::write(dir.join("long"), "1".repeat(100)).unwrap();
    fs::create_dir(dir.join("folder")).unwrap();
    for (image, pid, why) in [
        ("a.raw", "a.raw", "locked"),
        ("empty.raw", "empty.raw", "locked"),
        ("a.raw", "notes", "something else than a process id"),
        ("a.raw", "long", "something else than a process id"),
        ("a.raw", "empty.raw/pid", "not a directory"),
        ("a.raw", "folder", "is a directory"),
        ("a.raw", "/dev/null", "no regular file"),
    ] {
        let cmd = diskmill().cmd(["serve", "-f", "raw", "--unix", "s", "--pid-file", pid, image]).dir(dir);
        let out = cmd.limit(Duration::from_secs(10)).fails(1);
        out.says(&[pid]);
        out.says(&[why]);
    }
    assert!(fs::read(dir.join("a.raw")).unwrap() == disk);
    assert_eq!(fs::read(dir.join("empty.raw")).unwrap(), b"");
    assert_eq!(fs::read(dir.join("notes")).unwrap(), b"bread\n");
    assert_eq!(fs::metadata(dir.join("long")).unwrap().len(), 100);
    // Neither does what fails for another reason.
    fs::write(dir.join("old"), "4711\n").unwrap();
    for pid in ["old", "new"] {
        let cmd =
            diskmill().cmd(["serve", "-f", "raw", "--unix", "notes", "--pid-file", pid, "a.raw"]).dir(dir);
        cmd.fails(1).says(&["no socket"]);
    }
    assert_eq!(fs::read(dir.join("old")).unwrap(), b"4711\n");
    assert_eq!(fs::read_dir(dir).unwrap().count(), 6, "something was left behind");
}

#[test]
fn a_pid_file_is_of_one_server() {
    let dir = scratch();
    let dir = dir.path();
    fs::write(dir.join("a.raw"), disk(1, 1 << 20)).unwrap();
    let pid = dir.join("pid");
    // What a killed one left, by way of a link.
    fs::write(&pid, "1234567\n").unwrap();
    std::os::unix::fs::symlink("pid", dir.join("link")).unwrap();
    let start = |socket, pid| {
        diskmill().cmd(["serve", "-f", "raw", "--unix", socket, "--pid-file", pid, "a.raw"]).dir(dir)
    };
    let first = start("1", "link").spawn();
    let number = format!("{}\n", first.id());
    let until = Instant::now() + Duration::from_secs(30);
    while fs::read_to_string(&pid).unwrap() != number {
        assert!(!first.ended_within(Duration::from_millis(10)) && Instant::now() < until);
    }
    start("2", "pid").limit(Duration::from_secs(10)).fails(1).says(&["locked"]);
    assert_eq!(fs::read_to_string(&pid).unwrap(), number);
    assert!(!dir.join("2").exists());
    first.signal(Signal::INT);
    let _ = first.wait().expect_code(0);
    assert!(!pid.exists());
    // What somebody has put in its place stays.
    let second = start("1", "pid").spawn();
    wait_for(&second, &pid);
    fs::remove_file(&pid).unwrap();
    fs::write(&pid, "theirs").unwrap();
    second.signal(Signal::INT);
    let _ = second.wait().expect_code(0);
    assert_eq!(fs::read(&pid).unwrap(), b"theirs");
}

#[test]
fn tcp_names_and_the_last_client() {
    let dir = scratch();
    let dir = dir.path();
    if tools().is_none() {
        return;
    }
    fs::write(dir.join("a.raw"), disk(1, 1 << 20)).unwrap();
    let pid = dir.join("pid");
    let cmd = diskmill().cmd(["serve", "-f", "raw", "--json", "-p", "0", "-x", "my disk", "--pid-file"]);
    let out = dir.join("out");
    // Its output is wanted before it ends.
    let cmd = cmd.arg(&pid).args(["--exit-with-last-client", "a.raw"]);
    let run = cmd.dir(dir).spawn();
    wait_for(&run, &pid);
    let port = listening_port(run.id());
    let uri = format!("nbd://127.0.0.1:{port}/my%20disk");
    Cmd::new("nbdcopy").arg(&uri).arg(&out).ok();
    let done = run.wait().expect_code(0);
    let facts = done.json();
    assert_eq!((&facts["uri"], &facts["format"]), (&Value::from(uri), &Value::from("raw")));
    assert!(!pid.exists());
    assert!(fs::read(&out).unwrap() == fs::read(dir.join("a.raw")).unwrap());
}

#[test]
fn one_connection_is_enough_for_clients_that_like_more() {
    let dir = scratch();
    let dir = dir.path();
    if tools().is_none() {
        return;
    }
    fs::write(dir.join("a.raw"), disk(1, 8 << 20)).unwrap();
    let served = Served::start(dir, &["-f", "raw", "-e", "1", "a.raw"]);
    Cmd::new("nbdcopy").args(["--connections=4", "--threads=4", &served.uri, "out"]).dir(dir).ok();
    assert!(fs::read(dir.join("out")).unwrap() == fs::read(dir.join("a.raw")).unwrap());
    let out = served.stop();
    assert!(out.err().is_empty(), "{out}");
}

/// The loopback port on which a process listens.
fn listening_port(pid: u32) -> u16 {
    let inodes: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let line = table.lines().find(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(3) == Some(&"0A") && inodes.iter().any(|inode| fields.get(9) == Some(&inode.as_str()))
    });
    let local = line.unwrap().split_whitespace().nth(1).unwrap();
    u16::from_str_radix(local.split_once(':').unwrap().1, 16).unwrap()
}

#[test]
fn wrong_usage_and_what_is_not_supported() {
    let dir = scratch();
    let dir = dir.path();
    fs::write(dir.join("a.raw"), disk(1, 1 << 20)).unwrap();
    let nowhere = diskmill().cmd(["serve", "a.raw"]).dir(dir).fails(2);
    assert!(nowhere.err().contains("--unix <SOCKET>|--port <PORT>"), "{nowhere}");
    let usage: [&[&str]; 5] = [
        &["--unix", "s", "--port", "1", "a.raw"],
        &["--unix", "s", "--bind", "127.0.0.1", "a.raw"],
        &["--unix", "s", "--threads", "0", "a.raw"],
        &["--unix", "s", "--writable", "--read-only", "a.raw"],
        &["--unix", "s"],
    ];
    for args in usage {
        let _ = diskmill().cmd(["serve"]).args(args).dir(dir).limit(Duration::from_secs(10)).fails(2);
    }
    let name = "n".repeat(4097);
    let long = ["serve", "--unix", "s", "-x", &name, "a.raw"];
    diskmill().cmd(long).dir(dir).limit(Duration::from_secs(10)).fails(2).says(&["4096"]);
    let failed: [(&[&str], &str); 4] = [
        (&["--unix", "s", "--writable", "-f", "ova", "a.raw"], "archive"),
        (&["--unix", "s", "gone.raw"], "gone.raw"),
        (&["--unix", "a.raw", "a.raw"], "no socket"),
        (&["--unix", "no/such/folder/s", "a.raw"], "no such file"),
    ];
    for (args, word) in failed {
        diskmill().cmd(["serve"]).args(args).dir(dir).fails(1).says(&[word]);
    }
    assert_eq!(fs::read_dir(dir).unwrap().count(), 1, "something was left behind");
}

#[test]
fn what_clients_write_is_in_the_image() {
    let dir = scratch();
    let dir = dir.path();
    let (Some(q), Some(())) = (Oracle::find(dir), tools()) else { return };
    fs::write(dir.join("base.raw"), disk(1, SIZE as usize)).unwrap();
    let new = disk(2, SIZE as usize);
    fs::write(dir.join("new.raw"), &new).unwrap();
    q.create("plain.qcow2", "", SIZE);
    q.create("small.qcow2", "cluster_size=512", SIZE);
    q.create("sub.qcow2", "extended_l2=on", SIZE);
    q.create_over("over.qcow2", "", SIZE, ("base.raw", "raw"));
    q.img(["convert", "-f", "raw", "-O", "qcow2", "-c", "base.raw", "packed.qcow2"]).ok();
    q.img(["convert", "-f", "raw", "-O", "raw", "base.raw", "copy.raw"]).ok();
    q.img(["create", "-q", "-f", "vmdk", "plain.vmdk", &SIZE.to_string()]).ok();
    q.img(["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", "base.raw", "flat.vmdk"])
        .ok();
    for image in [
        "plain.qcow2",
        "small.qcow2",
        "sub.qcow2",
        "over.qcow2",
        "packed.qcow2",
        "copy.raw",
        "plain.vmdk",
        "flat.vmdk",
    ] {
        let format = image.rsplit('.').next().unwrap();
        let served = Served::start(dir, &["--writable", "-f", format, image]);
        Cmd::new("nbdcopy").args(["new.raw", &served.uri]).dir(dir).ok();
        q.identical(("raw", &served.uri), ("raw", "new.raw"));
        // The rest of NBD's writes, by a client that says what it expects.
        let io = q.io(["-f", "raw"]).args(["-c", "write -P 7 1000 70000", "-c", "write -z 200000 300000"]);
        let io = io.args(["-c", "write -z -u 1048576 1048576", "-c", "discard 3145728 65536", "-c", "flush"]);
        let io = io.args(["-c", "write -f -P 9 4000000 4096", "-c", "read -P 7 1000 70000"]);
        let io = io.args(["-c", "read -P 0 200000 300000", "-c", "read -P 0 1048576 1048576"]);
        let out = io.arg(&served.uri).ok();
        assert!(!out.out().contains("failed"), "{image}: {out}");
        fs::remove_file(dir.join("seen.raw")).unwrap_or_default();
        q.img(["convert", "-f", "raw", "-O", "raw", &served.uri, "seen.raw"]).ok();
        served.stop();
        q.identical((format, image), ("raw", "seen.raw"));
        if format == "qcow2" {
            q.check_clean(image);
        }
    }
}

#[test]
fn a_file_that_may_not_grow_is_no_space() {
    let dir = scratch();
    let dir = dir.path();
    let Some(q) = Oracle::find(dir) else { return };
    q.create("a.qcow2", "", SIZE);
    let (socket, pid) = (dir.join("s"), dir.join("pid"));
    // EFBIG instead of the signal, from 1 MiB on.
    let limited = ["sh", "-c", r#"trap "" XFSZ; ulimit -f 2048; exec "$0" "$@""#];
    let cmd = diskmill().cmd(["serve", "--writable", "--unix", "s", "--pid-file", "pid", "a.qcow2"]);
    let run = cmd.under(limited).dir(dir).spawn();
    wait_for(&run, &pid);
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let out = q.io(["-f", "raw", "-c", "write -P 1 0 4M", &uri]).run();
    assert!(format!("{out}").contains("No space left on device"), "{out}");
    run.signal(Signal::INT);
    let _ = run.wait();
}

#[test]
fn nobody_else_has_an_image_that_is_written_to() {
    let dir = scratch();
    let dir = dir.path();
    let (Some(q), Some(())) = (Oracle::find(dir), tools()) else { return };
    q.create("a.qcow2", "", SIZE);
    let served = Served::start(dir, &["--writable", "a.qcow2"]);
    diskmill()
        .cmd(["serve", "--writable", "--unix", "other", "a.qcow2"])
        .dir(dir)
        .fails(1)
        .says(&["a.qcow2", "use"]);
    q.io(["-f", "qcow2", "-c", "write 0 512", "a.qcow2"]).fails(1).says(&["lock"]);
    served.stop();
    q.io(["-f", "qcow2", "-c", "write 0 512", "a.qcow2"]).ok();
}

#[test]
fn a_killed_server_loses_nothing_that_was_flushed() {
    let dir = scratch();
    let dir = dir.path();
    let (Some(q), Some(())) = (Oracle::find(dir), tools()) else { return };
    for (number, options) in
        ["", "cluster_size=512", "extended_l2=on", "lazy_refcounts=on"].iter().enumerate()
    {
        let image = format!("{number}.qcow2");
        q.create(&image, options, SIZE);
        let served = Served::start(dir, &["--writable", &image]);
        let io = q.io(["-f", "raw", "-c", "write -P 1 1000 1500000", "-c", "flush"]);
        io.args(["-c", "write -f -P 2 3000000 100000", &served.uri]).ok();
        // These are lost, or not, or in parts: the client is killed before it could flush.
        let io = q.io(["-f", "raw", "-c", "write -P 3 3200000 2000000", "-c", "write -z 3500000 500000"]);
        assert_ne!(io.args(["-c", "sigraise 9", &served.uri]).run().code, Some(0));
        served.kill();
        let check = q.img(["check", "-q", "-f", "qcow2", &image]).run();
        assert!(matches!(check.code, Some(0 | 3)), "{options}: {check}");
        let check = diskmill().cmd(["check", "-q", &image]).dir(dir).run();
        assert!(matches!(check.code, Some(0 | 3)), "{options}: {check}");
        let io =
            q.io(["-r", "-f", "qcow2", "-c", "read -P 1 1000 1500000", "-c", "read -P 2 3000000 100000"]);
        let out = io.arg(&image).ok();
        assert!(!out.out().contains("failed"), "{options}: {out}");
    }
}
