//! Sessions that are kept between commands, and the appliance that is prepared for them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use diskmill_testkit::{Cmd, Tool, require_program, scratch, skip};
use rustix::process::{Pid, Signal, kill_process};

/// The longest time that a command may take on a session that is kept.
const SECOND_CALL: Duration = Duration::from_millis(50);

/// The program in a folder with an image and run-time folders of its own; its sessions end with it.
struct Kept {
    dir: PathBuf,
}

impl Kept {
    fn new(dir: &Path) -> Option<Self> {
        for program in ["guestfish", "qemu-system-x86_64", "sfdisk", "mke2fs", "debugfs"] {
            require_program(program)?;
        }
        let kernels = fs::read_dir("/boot").into_iter().flatten().flatten();
        if !kernels.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz")) {
            skip("no kernel in /boot for libguestfs' appliance");
            return None;
        }
        fs::create_dir(dir.join("run")).unwrap();
        fs::set_permissions(dir.join("run"), Permissions::from_mode(0o700)).unwrap();
        fs::create_dir_all(dir.join("root/etc")).unwrap();
        fs::write(dir.join("root/etc/hostname"), "kept\n").unwrap();
        File::create(dir.join("disk.raw")).unwrap().set_len(64 << 20).unwrap();
        let table = b"label: gpt\nstart=2048, type=linux\n".to_vec();
        let _ = Cmd::new("sfdisk").args(["-q", "disk.raw"]).stdin_bytes(table).dir(dir).ok();
        let words = ["-q", "-t", "ext4", "-d", "root", "-E", "offset=1048576", "disk.raw", "60M"];
        let _ = Cmd::new("mke2fs").args(words).dir(dir).ok();
        Some(Self { dir: dir.to_owned() })
    }

    fn run(&self, words: &[&str]) -> Cmd {
        let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(words);
        cmd.dir(&self.dir)
            .limit(Duration::from_secs(300))
            .env("LIBGUESTFS_BACKEND", "direct")
            .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
            .env("XDG_RUNTIME_DIR", self.dir.join("run"))
    }

    fn list(&self) -> Vec<serde_json::Value> {
        self.run(&["session", "list", "--json"]).ok().json().as_array().unwrap().clone()
    }

    /// The processes of this folder's sessions whose command line has `word` in it.
    fn processes(&self, word: &str) -> Vec<i32> {
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let has = |pid: &i32| {
            let read = |name| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            let text = [read("cmdline"), read("environ")].concat();
            let ours = self.dir.join("run").to_string_lossy().into_owned();
            String::from_utf8_lossy(&text).contains(&ours)
                && String::from_utf8_lossy(&read("cmdline")).contains(word)
        };
        pids.filter(has).collect()
    }

    fn kill(&self, word: &str) {
        let found = self.processes(word);
        assert!(!found.is_empty(), "no process of {word}");
        for pid in found {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }

    /// Waits until nothing of a session is left.
    fn assert_gone(&self, limit: Duration) {
        let end = Instant::now() + limit;
        loop {
            let left = [self.processes("guestf"), self.processes("qemu-system")].concat();
            let sockets = self.sockets();
            if left.is_empty() && sockets.is_empty() && self.list().is_empty() {
                break;
            }
            assert!(Instant::now() < end, "still there: {left:?} {sockets:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(fs::read_dir(self.dir.join("run/diskmill")).unwrap().count(), 0);
    }

    fn sockets(&self) -> Vec<std::path::PathBuf> {
        let entries = fs::read_dir(self.dir.join("run/diskmill-nbd")).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_type().unwrap().is_socket()).map(|entry| entry.path()).collect()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        for pid in [self.processes("guestf"), self.processes("qemu-system")].concat() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

/// The fastest of some tries: what the machine does besides is no fault of ours.
fn fastest(mut one: impl FnMut()) -> Duration {
    let time = || {
        let began = Instant::now();
        one();
        began.elapsed()
    };
    std::iter::repeat_with(time).take(20).min().unwrap()
}

#[test]
fn a_session_serves_readers_until_its_image_changes() {
    let dir = scratch();
    let Some(kept) = Kept::new(dir.path()) else { return };
    let started = kept.run(&["session", "start", "--json", "disk.raw"]).ok().json();
    assert_eq!((&started["started"], &started["writable"]), (&true.into(), &false.into()), "{started}");
    assert_eq!(kept.list().len(), 1);
    for entry in fs::read_dir(kept.dir.join("run/diskmill-nbd")).unwrap().flatten() {
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
    }

    // Found under another name, too.
    std::os::unix::fs::symlink("disk.raw", kept.dir.join("link")).unwrap();
    assert_eq!(kept.run(&["fs", "cat", "./link", "/etc/hostname"]).ok().out(), "kept\n");
    for words in [
        &["ls", "disk.raw", "/etc"][..],
        &["cat", "disk.raw", "/etc/hostname"],
        &["stat", "disk.raw", "/etc"],
    ] {
        let words = [&["fs"], words].concat();
        let time = fastest(|| drop(kept.run(&words).ok()));
        eprintln!("{}: {time:?}", words.join(" "));
        assert!(time < SECOND_CALL, "{words:?} takes {time:?}");
    }
    // With and without what is mounted, by several programs at once.
    std::thread::scope(|scope| {
        for n in 0..4 {
            let kept = &kept;
            scope.spawn(move || {
                let rounds = if n < 2 { 1 } else { 5 };
                for _ in 0..rounds {
                    match n {
                        0 => assert_eq!(kept.run(&["fs", "list", "--json", "disk.raw"]).ok().code, Some(0)),
                        1 => assert_eq!(
                            kept.run(&["fs", "ls", "-m", "/dev/sda1:/:noatime", "disk.raw", "/etc"])
                                .ok()
                                .out(),
                            "hostname\n"
                        ),
                        _ => assert_eq!(
                            kept.run(&["fs", "cat", "disk.raw", "/etc/hostname"]).ok().out(),
                            "kept\n"
                        ),
                    }
                }
            });
        }
    });
    // A command that fails leaves it alone.
    kept.run(&["fs", "cat", "disk.raw", "/none"]).fails(1).says(&["No such file"]);
    assert_eq!(kept.list()[0]["id"], started["id"]);

    // The server of its image is gone.
    let stale = kept.sockets();
    kept.kill("guestfs-companion");
    // Killed, it leaves its socket.
    stale.iter().for_each(|socket| fs::remove_file(socket).unwrap_or_default());
    let outcome = kept.run(&["fs", "ls", "--keep", "disk.raw", "/etc"]).ok();
    outcome.says(&["the server of its image has ended"]);
    assert_eq!(outcome.out(), "hostname\n");
    assert_ne!(kept.list()[0]["id"], started["id"]);

    // The image is another one now.
    fs::copy(kept.dir.join("disk.raw"), kept.dir.join("other.raw")).unwrap();
    let _ = Cmd::new("debugfs")
        .args(["-w", "-R", "rm /etc/hostname", "other.raw?offset=1048576"])
        .dir(&kept.dir)
        .ok();
    fs::rename(kept.dir.join("other.raw"), kept.dir.join("disk.raw")).unwrap();
    let outcome = kept.run(&["fs", "ls", "--keep", "--idle-timeout", "3", "disk.raw", "/etc"]).ok();
    outcome.says(&["the image has been replaced"]);
    assert_eq!(outcome.out(), "");
    // Nobody uses it any more.
    kept.assert_gone(Duration::from_secs(30));
}

#[test]
fn a_session_that_writes_is_alone() {
    let dir = scratch();
    let Some(kept) = Kept::new(dir.path()) else { return };
    let _ = kept.run(&["session", "start", "-q", "disk.raw"]).ok();
    // A writer ends it, and is kept itself.
    let put = |content: &str| {
        kept.run(&["fs", "put", "--keep", "disk.raw", "-", "/etc/new"]).stdin_bytes(content.into())
    };
    put("one").ok().says(&["the image is about to be written"]);
    let session = kept.list();
    assert_eq!((session.len(), &session[0]["writable"]), (1, &true.into()), "{session:?}");
    let id = session[0]["id"].as_str().unwrap();
    assert_eq!(kept.run(&["fs", "cat", "disk.raw", "/etc/new"]).ok().out(), "one");
    let _ = put("two").ok();
    // What is written is in the image at once.
    let stored = || {
        Cmd::new("debugfs").args(["-R", "cat /etc/new", "disk.raw?offset=1048576"]).dir(&kept.dir).ok().out()
    };
    assert_eq!(stored(), "two");
    kept.run(&["fs", "sparsify", "-q", "--in-place", "disk.raw"])
        .fails(1)
        .says(&[&format!("session stop {id}")]);
    kept.run(&["fs", "cat", "-f", "qcow2", "disk.raw", "/etc/new"]).fails(1).says(&["as raw"]);
    kept.run(&["session", "stop", "none"]).fails(1).says(&["no session none"]);
    let _ = put("three").ok();
    let stopped = kept.run(&["session", "stop", "--json", id]).ok().json();
    assert_eq!(stopped["stopped"][0], id);
    assert_eq!(stored(), "three");
    kept.assert_gone(Duration::from_secs(1));

    // An appliance that is killed is forgotten, and its keeper cleans up.
    let _ = kept.run(&["session", "start", "-q", "disk.raw"]).ok();
    kept.kill("qemu-system");
    kept.assert_gone(Duration::from_secs(30));
}

#[test]
fn an_appliance_is_prepared_once() {
    let dir = scratch();
    let Some(kept) = Kept::new(dir.path()) else { return };
    if require_program("supermin").is_none() {
        return;
    }
    let run = |words: &[&str]| kept.run(words).env("XDG_CACHE_HOME", kept.dir.join("cache"));
    let built = run(&["fs", "prepare", "--json"]).ok().json();
    assert_eq!((&built["built"], &built["kernel-unpacked"]), (&true.into(), &true.into()), "{built}");
    let folder = kept.dir.join("cache/diskmill/appliance");
    assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    assert_eq!(run(&["fs", "prepare", "--json"]).ok().json()["built"], false);

    // It is what a command runs.
    let _ = run(&["session", "start", "-q", "disk.raw"]).ok();
    let qemu = kept.processes("qemu-system")[0];
    let arguments =
        String::from_utf8_lossy(&fs::read(format!("/proc/{qemu}/cmdline")).unwrap()).replace('\0', " ");
    assert!(arguments.contains(&format!("-kernel {}/kernel", folder.display())), "{arguments}");
    assert!(arguments.contains("-cpu qemu64"), "{arguments}");
    let _ = run(&["session", "stop", "--all"]).ok();

    // Not if it is made of something else, or others may write to it.
    let record = folder.join("diskmill.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("vmlinuz", "vmlinuz-old")).unwrap();
    fs::set_permissions(&folder, Permissions::from_mode(0o777)).unwrap();
    assert_eq!(run(&["fs", "prepare", "--json", "--remove"]).ok().json()["removed"], true);
    assert!(!folder.exists());
    assert_eq!(run(&["fs", "prepare", "--json", "--remove"]).ok().json()["removed"], false);
}
