//! Sessions that are kept between commands, and the appliance that is prepared for them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[allow(dead_code, reason = "not every test needs all of it")]
#[path = "support/kept.rs"]
mod kept;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use diskmill_testkit::{Cmd, require_program, scratch};
use kept::Kept;
use rustix::process::Signal;

/// The longest time that a command may take on a session that is kept.
const SECOND_CALL: Duration = Duration::from_millis(50);

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

    // The server of its image is gone. Killed, it leaves its socket, which the next command removes.
    let stale = kept.sockets();
    kept.kill("guestfs-companion");
    let outcome = kept.run(&["fs", "ls", "--keep", "disk.raw", "/etc"]).ok();
    outcome.says(&["the server of its image has ended"]);
    assert_eq!(outcome.out(), "hostname\n");
    assert_ne!(kept.list()[0]["id"], started["id"]);
    assert!(kept.sockets().iter().all(|socket| !stale.contains(socket)), "{stale:?}");

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
    absolute_links(&kept);
    special_files_and_silent_input(&kept);
    kept.run(&["fs", "sysprep", "-q", "disk.raw"]).fails(1).says(&[&format!("session stop {id}")]);
    let trimmed = kept.run(&["fs", "sparsify", "--json", "--in-place", "disk.raw"]).ok().json();
    assert_eq!(trimmed["trimmed"][0], "/dev/sda1");
    kept.run(&["fs", "cat", "-f", "qcow2", "disk.raw", "/etc/new"]).fails(1).says(&["as raw"]);
    kept.run(&["session", "stop", "none"]).fails(1).says(&["no session none"]);
    let _ = put("three").ok();
    let stopped = kept.run(&["session", "stop", "--json", id]).ok().json();
    assert_eq!(stopped["stopped"][0], id);
    assert_eq!(stored(), "three");
    kept.assert_gone(Duration::from_secs(1));

    // The image is replaced under a session that writes.
    let _ = kept.run(&["session", "start", "-q", "-w", "disk.raw"]).ok();
    fs::copy(kept.dir.join("disk.raw"), kept.dir.join("other.raw")).unwrap();
    fs::rename(kept.dir.join("other.raw"), kept.dir.join("disk.raw")).unwrap();
    let outcome = kept.run(&["fs", "ls", "--keep", "disk.raw", "/etc"]).ok();
    outcome.says(&["the image has been replaced"]);
    assert_eq!((outcome.out().as_str(), kept.list().len()), ("hostname\nnew\n", 1));

    // A command is interrupted, and its appliance does not answer: nobody shall wait for that.
    let folder = appliance_folder(&kept);
    kept.stop_qemu();
    let hangs = kept.run(&["fs", "ls", "-R", "disk.raw", "/etc"]).spawn();
    std::thread::sleep(Duration::from_millis(500));
    hangs.signal(Signal::TERM);
    assert!(hangs.ended_within(Duration::from_secs(10)));
    assert_eq!(hangs.wait().code, Some(128 + Signal::TERM.as_raw()));
    kept.assert_gone(Duration::from_secs(10));
    assert!(!folder.exists(), "{folder:?}");

    // An appliance that is killed is forgotten, and its keeper cleans up.
    let _ = kept.run(&["session", "start", "-q", "disk.raw"]).ok();
    let folder = appliance_folder(&kept);
    std::thread::sleep(Duration::from_secs(1));
    kept.kill("qemu-system");
    kept.assert_gone(Duration::from_secs(30));
    assert!(!folder.exists(), "{folder:?}");
}

/// The folder of libguestfs' own that the appliance's socket is in.
fn appliance_folder(kept: &Kept) -> PathBuf {
    let arguments = fs::read(format!("/proc/{}/cmdline", kept.processes("-kernel")[0])).unwrap();
    let arguments = String::from_utf8_lossy(&arguments).into_owned();
    let path = arguments.split([',', '\0']).find_map(|word| word.strip_prefix("path=")).unwrap();
    Path::new(path).parent().unwrap().to_owned()
}

/// Links with absolute targets lead to the guest's own folders, whatever the verb; `/s2/etc` to `/etc`, `/s2/var` to `/var`.
fn absolute_links(kept: &Kept) {
    let ok = |words: &[&str]| {
        let (verb, rest) = words.split_first().unwrap();
        kept.run(&[&["fs", verb, "disk.raw"], rest].concat()).ok().out()
    };
    let both = "hostname\nnew\n";
    assert_eq!((ok(&["ls", "/s2/etc"]).as_str(), ok(&["ls", "-R", "/s2/etc"]).as_str()), (both, both));
    assert_eq!(ok(&["find", "/s2/etc"]), "/s2/etc\n/s2/etc/hostname\n/s2/etc/new\n");
    assert!(ok(&["tree", "/s2/etc/"]).contains("hostname\n"));
    let _ = ok(&["get", "/s2/etc", "out"]);
    assert_eq!(fs::read_dir(kept.dir.join("out")).unwrap().count(), 2);
    let _ = ok(&["tar-out", "/s2/etc", "etc.tar"]);
    let listed = Cmd::new("tar").args(["tf", "etc.tar"]).dir(&kept.dir).ok().out();
    assert_eq!(listed.lines().count(), 3, "{listed}");
    let _ = ok(&["tar-in", "etc.tar", "/s2/var"]);
    assert_eq!(ok(&["ls", "/var"]), both);
    assert_eq!(ok(&["cat", "/s2/var/hostname"]), "kept\n");
    let _ = ok(&["rm", "-r", "/s2/var/new"]);
    assert_eq!(ok(&["ls", "/var"]), "hostname\n");

    // A folder of the host behind a link, and times before 1970.
    fs::create_dir_all(kept.dir.join("tree/sub")).unwrap();
    let file = fs::File::create(kept.dir.join("tree/sub/old")).unwrap();
    file.set_modified(UNIX_EPOCH - Duration::from_secs(315_619_200)).unwrap();
    std::os::unix::fs::symlink("tree", kept.dir.join("to-tree")).unwrap();
    let _ = ok(&["put", "to-tree", "/s2/var/"]);
    let _ = ok(&["put", "tree/sub/old", "/s2/var"]);
    let found = ok(&["find", "--json", "--type", "f", "--name", "old", "/var"]);
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    let found: Vec<_> =
        found.as_array().unwrap().iter().map(|file| (&file["path"], &file["modified"]["seconds"])).collect();
    let time = &serde_json::Value::from(-315_619_200);
    assert_eq!(found, [(&"/var/old".into(), time), (&"/var/to-tree/sub/old".into(), time)]);
    let _ = ok(&["get", "/s2/var/to-tree", "back"]);
    assert_eq!(fs::metadata(kept.dir.join("back/sub/old")).unwrap().mtime(), -315_619_200);
    let _ = ok(&["mkdir", "-p", "/s2/var/a/b"]);
    let edit = kept.run(&["fs", "edit", "-b", ".b", "disk.raw", "/s2/var/hostname"]);
    let _ = edit.env("EDITOR", "sed -i s/kept/edited/").ok();
    assert_eq!(ok(&["cat", "/var/hostname", "/var/hostname.b"]), "edited\nkept\n");
    assert_eq!(ok(&["ls", "/var"]), "a\nhostname\nhostname.b\nold\nto-tree\n");
    let _ = ok(&["rm", "-r", "/var/a", "/var/hostname", "/var/hostname.b", "/var/old", "/var/to-tree"]);
}

/// What is no regular file is refused, not waited for; input that does not come ends with a signal.
fn special_files_and_silent_input(kept: &Kept) {
    for words in [
        &["cat", "disk.raw", "/s2/fifo"][..],
        &["get", "disk.raw", "/s2/fifo", "-"],
        &["edit", "disk.raw", "/s2/fifo"],
    ] {
        kept.run(&[&["fs"], words].concat()).fails(1).says(&["/s2/fifo"]);
    }
    let put = |to: &str| kept.run(&["fs", "put", "disk.raw", "-", to]);
    put("/s2/fifo").stdin_bytes(b"x".to_vec()).fails(1).says(&["fifo"]);
    // Not the appliance's disk.
    put("/dev/sda").stdin_bytes(b"x".to_vec()).fails(1).says(&["/dev"]);

    let silent = kept.dir.join("silent");
    rustix::fs::mkfifoat(rustix::fs::CWD, &silent, rustix::fs::Mode::RWXU).unwrap();
    let _writer = fs::File::options().read(true).write(true).open(&silent).unwrap();
    let id = kept.list()[0]["id"].clone();
    for waits in
        [put("/var/x").stdin_file(&silent), kept.run(&["fs", "tar-in", "disk.raw", "silent", "/var"])]
    {
        let waits = waits.spawn();
        std::thread::sleep(Duration::from_millis(500));
        waits.signal(Signal::TERM);
        assert!(waits.ended_within(Duration::from_secs(5)));
        assert_eq!(waits.wait().code, Some(128 + Signal::TERM.as_raw()));
    }
    // The session is as good as before, and of the file is nothing left.
    assert_eq!(kept.run(&["fs", "ls", "disk.raw", "/var"]).ok().out(), "");
    assert_eq!(kept.list()[0]["id"], id);
}

/// QEMU cannot write to a VMDK of ours: the session's server does.
#[test]
fn a_session_that_writes_to_a_vmdk() {
    let dir = scratch();
    let Some(kept) = Kept::new(dir.path()) else { return };
    let _ = kept.run(&["convert", "-O", "vmdk", "disk.raw", "disk.vmdk"]).ok();
    // An option before the verb is one of the verb.
    let put = |content: &str| {
        kept.run(&["fs", "--keep", "put", "-q", "disk.vmdk", "-", "/etc/new"]).stdin_bytes(content.into())
    };
    let _ = put("one").ok();
    let session = kept.list();
    assert_eq!((session.len(), &session[0]["writable"]), (1, &true.into()), "{session:?}");
    let _ = put("two").ok();
    assert_eq!(kept.run(&["fs", "cat", "disk.vmdk", "/etc/new"]).ok().out(), "two");
    let id = session[0]["id"].as_str().unwrap();
    assert_eq!(kept.list()[0]["id"], id);
    kept.run(&["fs", "cat", "-f", "raw", "disk.vmdk", "/etc/new"]).fails(1).says(&["as vmdk"]);
    kept.run(&["fs", "grow", "disk.vmdk", "+1M"]).fails(1).says(&[&format!("session stop {id}")]);
    let _ = kept.run(&["session", "stop", id]).ok();
    // The server lets go of the image at once.
    let stored = |want: &str| {
        kept.assert_gone(Duration::from_secs(1));
        let _ = kept.run(&["check", "disk.vmdk"]).ok();
        let _ = kept.run(&["convert", "-O", "raw", "disk.vmdk", "back.raw"]).ok();
        let cat = Cmd::new("debugfs").args(["-R", "cat /etc/new", "back.raw?offset=1048576"]);
        assert_eq!(cat.dir(&kept.dir).ok().out(), want);
    };
    stored("two");

    // A server that is killed takes nothing with it that was written before.
    let _ = put("three").ok();
    kept.kill("guestfs-companion");
    let outcome = kept.run(&["fs", "cat", "disk.vmdk", "/etc/new"]).ok();
    outcome.says(&["the server of its image has ended"]);
    assert_eq!(outcome.out(), "three");
    stored("three");
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

    let report = run(&["doctor", "--json", "appliance", "kernel"]).ok().json();
    let found = report["checks"][0]["found"].as_str().unwrap();
    assert!(found.starts_with("prepared, 0 days ago"), "{report}");

    // Not if it is made of something else, or others may write to it.
    let record = folder.join("diskmill.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("vmlinuz", "vmlinuz-old")).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(run(&["fs", "prepare", "--json", "--remove"]).ok().json()["removed"], true);
    assert!(!folder.exists());
    assert_eq!(run(&["fs", "prepare", "--json", "--remove"]).ok().json()["removed"], false);

    // In a folder for others, of which one must be told.
    let built = run(&["fs", "prepare", "--json", "--no-start", "--into", "fixed"]).ok().json();
    assert_eq!(
        (&built["built"], &built["start-seconds"]),
        (&true.into(), &serde_json::Value::Null),
        "{built}"
    );
    let fixed = kept.dir.join("fixed");
    let hypervisor = fixed.join("hv");
    let doctor = run(&["doctor", "--json", "appliance"]).env("LIBGUESTFS_PATH", &fixed);
    let report = doctor.env("LIBGUESTFS_HV", hypervisor).ok().json();
    assert!(report["checks"][0]["found"].as_str().unwrap().starts_with("fixed, in"), "{report}");
    run(&["fs", "prepare", "--no-start", "--into", "root"]).fails(1).says(&["no prepared appliance"]);
}
