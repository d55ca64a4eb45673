//! What goes wrong with `diskmill fs`: one clear message, the right exit code, nothing left behind, and an image that is
//! whole. The table in docs/guestfs.md names these tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[allow(dead_code, reason = "not every test needs all of it")]
#[path = "support/kept.rs"]
mod kept;

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use diskmill_testkit::{Cmd, Outcome, Tool, is_root, require_program, scratch, skip};
use kept::Kept;
use rustix::process::Signal;

/// The end of a command that failed: code 1 and one line that has all of the words.
fn explained(outcome: &Outcome, words: &[&str]) {
    let said = outcome.err();
    assert!(
        outcome.code == Some(1)
            && said.lines().count() == 1
            && said.starts_with("diskmill: ")
            && words.iter().all(|word| said.contains(word)),
        "not explained by {words:?}: {outcome}"
    );
}

fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The file system on the partition is whole.
fn assert_whole(dir: &Path) {
    let mut disk = File::open(dir.join("disk.raw")).unwrap();
    disk.seek(SeekFrom::Start(1 << 20)).unwrap();
    let mut part = Vec::new();
    disk.read_to_end(&mut part).unwrap();
    fs::write(dir.join("part.raw"), part).unwrap();
    let checked = Cmd::new("e2fsck").args(["-fn", "part.raw"]).dir(dir).run();
    // A file system that was mounted when its appliance was killed has a journal to play back.
    assert!(checked.code == Some(0) || checked.out().contains("recovery"), "{checked}");
}

#[test]
fn a_full_disk_and_an_appliance_that_hangs() {
    let dir = scratch();
    let Some(kept) = Kept::plain(dir.path()) else { return };
    File::create(dir.path().join("big")).unwrap().set_len(100 << 20).unwrap();
    let _ = kept.run(&["session", "start", "-q", "-w", "disk.raw"]).ok();
    let session = kept.list()[0]["id"].clone();

    let full = kept.run(&["fs", "put", "disk.raw", "big", "/big"]).run();
    explained(&full, &["/big", "No space left on device"]);
    // The session and the image go on, and what was put in part is gone.
    assert_eq!(kept.list()[0]["id"], session);
    kept.run(&["fs", "stat", "disk.raw", "/big"]).fails(1).says(&["No such file"]);
    let _ = kept.run(&["fs", "put", "disk.raw", "-", "/small"]).stdin_bytes(b"small".into()).ok();
    assert_eq!(kept.run(&["fs", "cat", "disk.raw", "/small"]).ok().out(), "small");

    // What was there before stays, with its names, and so it does where there is room.
    let full = kept.run(&["fs", "put", "disk.raw", "big", "/small"]).run();
    explained(&full, &["/small", "No space left on device"]);
    assert_eq!(kept.run(&["fs", "cat", "disk.raw", "/small"]).ok().out(), "small");
    let names = || kept.run(&["fs", "stat", "--json", "disk.raw", "/linked", "/other"]).ok().json();
    let before = names();
    let _ =
        kept.run(&["fs", "put", "--mode", "600", "disk.raw", "-", "/linked"]).stdin_bytes(b"new".into()).ok();
    let after = names();
    assert_eq!(kept.run(&["fs", "cat", "disk.raw", "/other"]).ok().out(), "new");
    for n in 0..2 {
        assert_eq!((&after[n]["inode"], &after[n]["mode"]), (&before[0]["inode"], &"0600".into()), "{after}");
    }
    let left = kept.run(&["fs", "find", "--name", ".diskmill*", "disk.raw", "/"]).ok();
    assert_eq!(left.out(), "");

    // QEMU does not go on.
    kept.stop_qemu();
    let began = Instant::now();
    let hung = kept.run(&["fs", "ls", "--call-timeout", "2", "disk.raw", "/"]).run();
    explained(&hung, &["no answer", "2 s", "`diskmill doctor kvm memory`"]);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    kept.assert_gone(Duration::from_secs(20));
    assert_whole(dir.path());
    let stored = Cmd::new("debugfs").args(["-R", "cat /small", "disk.raw?offset=1048576"]).dir(dir.path());
    assert_eq!(stored.ok().out(), "small");
}

#[test]
fn a_program_that_is_killed_leaves_a_socket_for_the_next_one_to_remove() {
    let dir = scratch();
    let Some(kept) = Kept::plain(dir.path()) else { return };
    let running = kept.run(&["fs", "ls", "disk.raw", "/"]).spawn();
    wait_for("QEMU", Duration::from_secs(120), || {
        !kept.processes("appliance").is_empty() || !kept.processes("-kernel").is_empty()
    });
    running.signal(Signal::KILL);
    assert_eq!(running.wait().signal, Some(Signal::KILL.as_raw()));
    assert!(!kept.sockets().is_empty());
    kept.assert_gone(Duration::from_secs(20));
}

#[test]
fn an_image_that_another_process_writes_is_left_alone() {
    let dir = scratch();
    let Some(kept) = Kept::plain(dir.path()) else { return };
    if require_program("qemu-io").is_none() {
        return;
    }
    let _ = kept.run(&["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]).ok();
    for (name, format) in [("disk.raw", "raw"), ("disk.qcow2", "qcow2")] {
        let before = fs::read(dir.path().join(name)).unwrap();
        // A machine that has not been started yet.
        let drive = format!("file={name},format={format},if=ide");
        let machine =
            ["-S", "-accel", "tcg", "-machine", "pc", "-m", "32", "-nodefaults", "-display", "none"];
        let holder = Cmd::new("qemu-system-x86_64").args(machine).args(["-drive", &drive]).dir(dir.path());
        // It ends even if this test does not.
        let holder = holder.under(["timeout", "100"]).spawn();
        wait_for("the lock", Duration::from_secs(20), || {
            let probe = Cmd::new("qemu-io").args(["-f", format, "-c", "read 0 512", name]);
            probe.dir(dir.path()).run().code != Some(0)
        });
        for words in [
            &["ls", name, "/"][..],
            &["rm", name, "/etc/hostname"],
            &["grow", name, "+1G"],
            &["sparsify", "--in-place", name],
        ] {
            let began = Instant::now();
            let refused = kept.run(&[&["fs"], words].concat()).run();
            explained(&refused, &[name, "lock"]);
            // No appliance was started in vain.
            assert!(began.elapsed() < Duration::from_secs(5), "{words:?}: {:?}", began.elapsed());
        }
        holder.signal(Signal::TERM);
        let _ = holder.wait();
        assert!(fs::read(dir.path().join(name)).unwrap() == before, "{name} was changed");
    }
    kept.assert_gone(Duration::from_secs(1));
}

#[test]
fn what_is_missing_is_named() {
    let dir = scratch();
    let Some(kept) = Kept::plain(dir.path()) else { return };
    let list = || kept.run(&["fs", "list", "disk.raw"]).env("XDG_CACHE_HOME", dir.path());
    explained(
        &list().env("PATH", "/nowhere").run(),
        &["guestfish is not installed", "`diskmill doctor guestfish`"],
    );
    let cache = |cmd: Cmd| cmd.env("LIBGUESTFS_CACHEDIR", dir.path());
    let none = dir.path().join("vmlinuz");
    let kernel = cache(list()).env("SUPERMIN_KERNEL", &none).env("SUPERMIN_KERNEL_VERSION", "9");
    explained(&kernel.env("SUPERMIN_MODULES", dir.path()).run(), &["supermin", "`diskmill doctor kernel"]);
    // A fixed appliance without its kernel.
    fs::create_dir(dir.path().join("fixed")).unwrap();
    let fixed = list().env("LIBGUESTFS_PATH", dir.path().join("fixed"));
    explained(&fixed.run(), &["appliance", "`diskmill doctor kernel`"]);
    let qemu = list().env("LIBGUESTFS_HV", dir.path().join("no-qemu"));
    explained(&qemu.run(), &["no-qemu", "`diskmill doctor"]);
    // What QEMU says is told, whatever the user's shell is.
    let broken = dir.path().join("broken-qemu");
    let says = "case \"$*\" in *-kernel*) echo qemu-system-x86_64: no guest memory >&2; exit 1;; esac";
    fs::write(&broken, format!("#!/bin/sh\n{says}\nexec qemu-system-x86_64 \"$@\"\n")).unwrap();
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).unwrap();
    let qemu = list().env("LIBGUESTFS_HV", &broken).env("SHELL", "/bin/false");
    explained(&qemu.run(), &["disk.raw", "no guest memory", "`diskmill doctor"]);
    kept.assert_gone(Duration::from_secs(1));
}

/// `diskmill` with a `/dev` that has these files besides what programs need; nothing, where that cannot be had.
fn with_dev(dir: &Path, kvm: bool, words: &[&str]) -> Option<Cmd> {
    if !is_root() {
        skip("another /dev needs root");
        return None;
    }
    require_program("unshare")?;
    let dev = dir.join(if kvm { "dev-kvm" } else { "dev" });
    let commands = format!(
        "mkdir -p {dev} && cd {dev} && (test -e null || (mknod null c 1 3 && mknod urandom c 1 9)) && {kvm} \
         && mount --bind {dev} /dev && cd {dir} && exec \"$@\"",
        dev = dev.display(),
        dir = dir.display(),
        // Any file opens; only a machine that boots tells.
        kvm = if kvm { "touch kvm" } else { "true" },
    );
    let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(words);
    let launcher = ["unshare", "--mount", "--propagation", "private", "sh", "-c", &commands, "sh"];
    let cmd = cmd.under(launcher).dir(dir).limit(Duration::from_secs(60));
    let cmd = ["LIBGUESTFS_BACKEND_SETTINGS", "LIBGUESTFS_PATH"]
        .into_iter()
        .fold(cmd, |cmd, name| cmd.env(name, ""));
    Some(
        cmd.env("XDG_CACHE_HOME", dir.join("cache"))
            .env("XDG_RUNTIME_DIR", dir.join("run"))
            .env("LIBGUESTFS_HV", dir.join("qemu")),
    )
}

#[test]
fn kvm_that_is_missing_or_hangs_is_not_used() {
    let dir = scratch();
    let Some(kept) = Kept::plain(dir.path()) else { return };
    let dir = dir.path();
    // A QEMU whose machines boot under emulation only, and that notes how libguestfs was told to start it.
    let script = "echo \"$LIBGUESTFS_BACKEND_SETTINGS\" >>told\ncase $2 in tcg) exit 85;; kvm) exec sleep 60;; esac\nexit 1";
    fs::write(dir.join("qemu"), format!("#!/bin/sh\ncd {}\n{script}\n", dir.display())).unwrap();
    fs::set_permissions(dir.join("qemu"), fs::Permissions::from_mode(0o755)).unwrap();

    let Some(missing) = with_dev(dir, false, &["doctor", "kvm"]) else { return };
    let said = missing.ok().out();
    assert!(
        said.contains("/dev/kvm: No such file") && said.contains("emulated") && said.contains("-> "),
        "{said}"
    );
    assert!(!dir.join("told").exists(), "a machine was booted without KVM");

    let hangs = |words: &[&str]| with_dev(dir, true, words).unwrap();
    let said = hangs(&["doctor", "kvm"]).ok().out();
    assert!(said.contains("does not boot within") && said.contains("--retest-kvm"), "{said}");
    let told = || fs::read_to_string(dir.join("told")).unwrap();
    let first = told().lines().count();
    let _ = hangs(&["doctor", "kvm"]).ok();
    assert_eq!(told().lines().count(), first, "the verdict was not remembered");
    // This QEMU starts no appliance; but it is told not to use KVM.
    explained(&hangs(&["fs", "list", "disk.raw"]).run(), &["disk.raw", "`diskmill doctor`"]);
    assert_eq!(told().lines().last(), Some("force_tcg"), "{}", told());
    kept.assert_gone(Duration::from_secs(5));
}
