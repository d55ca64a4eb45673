//! `diskmill doctor` on machines that lack something, as their environment shows it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use diskmill_testkit::{Cmd, Tool, require_program, scratch};
use serde_json::Value;

/// The doctor with a home, a cache and temporary files in `dir` alone, and no settings.
fn doctor(dir: &Path) -> Cmd {
    let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(["doctor"]).dir(dir);
    let cmd = cmd.env("HOME", dir).env("TMPDIR", dir).env("XDG_RUNTIME_DIR", dir);
    ["XDG_CACHE_HOME", "XDG_CONFIG_HOME", "LIBGUESTFS_PATH", "LIBGUESTFS_CACHEDIR", "LIBGUESTFS_BACKEND"]
        .into_iter()
        .fold(cmd, |cmd, name| cmd.env(name, ""))
}

fn status<'a>(report: &'a Value, name: &str) -> &'a str {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["check"] == name).unwrap()["status"].as_str().unwrap()
}

fn program(path: &Path, script: &str) {
    fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn each_thing_that_is_missing_is_a_problem_with_its_remedy() {
    let dir = scratch();
    let dir = dir.path();
    let run = |check: &str, env: (&str, &str)| doctor(dir).arg(check).env(env.0, env.1);
    let problems = [
        ("guestfish", ("PATH", "/nowhere"), "apt install guestfish"),
        ("qemu", ("PATH", "/nowhere"), "apt install qemu-system"),
        ("qemu", ("LIBGUESTFS_HV", "/nowhere/qemu"), "apt install qemu-system"),
        ("supermin", ("PATH", "/nowhere"), "apt install supermin"),
        ("kernel", ("SUPERMIN_KERNEL", "/nowhere/vmlinuz"), "set all three"),
        ("cache", ("LIBGUESTFS_CACHEDIR", "/nowhere"), "LIBGUESTFS_CACHEDIR"),
        ("tmp", ("LIBGUESTFS_TMPDIR", "/nowhere"), "LIBGUESTFS_TMPDIR"),
        ("appliance", ("LIBGUESTFS_PATH", "/nowhere"), "fs prepare --into"),
        ("settings", ("LIBGUESTFS_MEMSIZE", "much"), "whole number"),
        ("settings", ("LIBGUESTFS_MEMSIZE", "10"), "from 256"),
        ("settings", ("LIBGUESTFS_SMP", "0"), "from 1 to 255"),
        ("settings", ("LIBGUESTFS_BACKEND", "foo"), "libvirt:URI"),
    ];
    for (check, env, remedy) in problems {
        let out = run(check, env).run().expect_code(1);
        assert!(out.out().contains("PROBLEM") && out.out().contains(remedy), "{check} {env:?}: {out}");
    }
    for (check, env) in [("tools", ("PATH", "/nowhere")), ("fuse", ("PATH", "/nowhere"))] {
        let out = run(check, env).run().expect_code(0);
        assert!(out.out().starts_with("note") && out.out().contains("-> "), "{check} {env:?}: {out}");
    }
    run("nonsense", ("A", "b")).fails(2);
}

#[test]
fn programs_that_do_not_run_and_kernels_by_name() {
    let dir = scratch();
    let dir = dir.path();
    let bin = dir.join("bin");
    fs::create_dir(&bin).unwrap();
    program(&bin.join("guestfish"), "echo broken >&2; exit 3");
    let out = doctor(dir).arg("guestfish").env("PATH", &bin).run().expect_code(1);
    assert!(out.out().contains("does not run"), "{out}");
    program(&bin.join("guestfish"), "echo guestfish 9.9");
    let out = doctor(dir).arg("guestfish").env("PATH", &bin).ok();
    assert!(out.out().contains("guestfish 9.9"), "{out}");

    fs::write(dir.join("vmlinuz"), "").unwrap();
    fs::create_dir(dir.join("modules")).unwrap();
    let kernel = || {
        let cmd = doctor(dir).arg("kernel").env("SUPERMIN_KERNEL", dir.join("vmlinuz"));
        cmd.env("SUPERMIN_KERNEL_VERSION", "9").env("SUPERMIN_MODULES", dir.join("modules"))
    };
    assert!(kernel().run().expect_code(1).out().contains("modules.dep"));
    fs::write(dir.join("modules/modules.dep"), "").unwrap();
    kernel().ok();
}

#[test]
fn a_fixed_appliance_needs_neither_supermin_nor_a_kernel() {
    let dir = scratch();
    let dir = dir.path();
    let fixed = dir.join("fixed");
    fs::create_dir(&fixed).unwrap();
    for name in ["README.fixed", "kernel", "initrd", "root"] {
        fs::write(fixed.join(name), "").unwrap();
    }
    let cmd = doctor(dir).args(["--json", "appliance", "supermin", "kernel", "cache"]);
    let report = cmd.env("PATH", "/nowhere").env("LIBGUESTFS_PATH", &fixed).ok().json();
    assert_eq!(report["ok"], true);
    assert_eq!(report["checks"].as_array().unwrap().len(), 4);
    let path = report["settings"].as_array().unwrap().iter().find(|s| s["name"] == "appliance").unwrap();
    assert_eq!((&path["from"], &path["value"]), (&"LIBGUESTFS_PATH".into(), &fixed.to_str().unwrap().into()));
}

#[test]
fn kvm_that_hangs_is_told_and_remembered() {
    let dir = scratch();
    let dir = dir.path();
    if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        let report = doctor(dir).args(["--json", "kvm"]).ok().json();
        assert_eq!(status(&report, "kvm"), "note");
        return;
    }
    let qemu = dir.join("qemu");
    program(&qemu, "echo >>calls; case $2 in tcg) exit 85;; esac; exec sleep 60");
    let kvm = || doctor(dir).arg("kvm").env("LIBGUESTFS_HV", &qemu).limit(Duration::from_secs(30));
    let calls = || fs::read_to_string(dir.join("calls")).unwrap_or_default().len();
    assert!(kvm().ok().out().contains("does not boot"));
    assert_eq!(calls(), 2);
    assert!(kvm().ok().out().contains("does not boot"));
    assert_eq!(calls(), 2, "the verdict was not remembered");
    let _ = kvm().arg("--retest-kvm").ok();
    assert_eq!(calls(), 4);
}

#[test]
fn leftovers_are_listed_and_removed_only_when_told() {
    let dir = scratch();
    let dir = dir.path();
    let sockets = dir.join("diskmill-nbd");
    fs::create_dir(&sockets).unwrap();
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o700)).unwrap();
    let alive = UnixListener::bind(sockets.join("alive")).unwrap();
    drop(UnixListener::bind(sockets.join("dead")).unwrap());
    let served = sockets.join("disk-x1");
    fs::create_dir(&served).unwrap();
    drop(UnixListener::bind(served.join("disk")).unwrap());
    // What is not ours to remove.
    symlink(dir, sockets.join("disk-x2")).unwrap();
    // A socket that is this young may belong to a server that is about to listen.
    assert_eq!(status(&doctor(dir).args(["--json", "leftovers"]).ok().json(), "leftovers"), "ok");
    std::thread::sleep(Duration::from_millis(1100));
    let report = doctor(dir).args(["--json", "leftovers"]).ok().json();
    let found = report["checks"][0]["found"].as_str().unwrap();
    for (name, listed) in [("nbd/dead", true), ("disk-x1/disk", true), ("alive", false), ("x2", false)] {
        assert_eq!(found.contains(name), listed, "{name}: {found}");
    }
    assert!(served.exists());
    let _ = doctor(dir).args(["leftovers", "--fix"]).ok();
    assert!(!served.exists() && !sockets.join("dead").exists());
    assert!(sockets.join("alive").exists() && sockets.join("disk-x2").exists());
    drop(alive);
}

#[test]
fn any_command_sweeps_the_sockets_of_killed_runs() {
    let dir = scratch();
    let dir = dir.path();
    let sockets = dir.join("diskmill-nbd");
    fs::create_dir(&sockets).unwrap();
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o700)).unwrap();
    for words in [&["session", "list"][..], &["fs", "ls", "none"]] {
        let alive = UnixListener::bind(sockets.join("alive")).unwrap();
        drop(UnixListener::bind(sockets.join("dead")).unwrap());
        std::thread::sleep(Duration::from_millis(1100));
        let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(words).dir(dir);
        let _ = cmd.env("XDG_RUNTIME_DIR", dir).run();
        assert!(!sockets.join("dead").exists(), "{words:?}");
        fs::remove_file(sockets.join("alive")).expect("it was not to be removed");
        drop(alive);
    }
}

#[test]
fn a_prepared_appliance_is_told_with_its_age_and_whether_it_fits() {
    let dir = scratch();
    let dir = dir.path();
    let folder = dir.join(".cache/diskmill/appliance");
    fs::create_dir_all(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    let says = |status: &str, words: &[&str]| {
        let report = doctor(dir).args(["--json", "appliance"]).ok().json();
        let found = report["checks"][0]["found"].as_str().unwrap();
        assert!(
            report["checks"][0]["status"] == status && words.iter().all(|word| found.contains(word)),
            "{report}"
        );
    };
    says("note", &["not used", "not whole"]);
    fs::write(dir.join("part"), "").unwrap();
    let record = |was: &str| serde_json::json!({ "made_of": { dir.join("part").to_str().unwrap(): was }, "packed": null });
    fs::write(folder.join("diskmill.json"), record("9 9").to_string()).unwrap();
    says("note", &["not used", "part has changed"]);
    let meta = fs::metadata(dir.join("part")).unwrap();
    let identity = format!("0 {}", std::os::unix::fs::MetadataExt::mtime(&meta));
    fs::write(folder.join("diskmill.json"), record(&identity).to_string()).unwrap();
    says("ok", &["prepared, 0 days ago"]);
    // Nothing else is needed then.
    let others = ["supermin", "kernel", "cache"];
    let report = doctor(dir).arg("--json").args(others).env("PATH", "/nowhere").ok().json();
    assert!(others.iter().all(|name| status(&report, name) == "ok"), "{report}");
    // Somebody else could have put something into it.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    says("note", &["not used", "only this user"]);
}

#[test]
fn the_appliance_boots() {
    let dir = scratch();
    if require_program("guestfish").is_none() {
        return;
    }
    // The appliance that other tests have built, too, is good enough.
    let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(["doctor", "--json", "boot", "kernel"]);
    let out =
        cmd.dir(dir.path()).env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg").limit(Duration::from_secs(400));
    let report = out.ok().json();
    assert_eq!(status(&report, "boot"), "ok");
    assert!(report["checks"][1]["found"].as_str().unwrap().contains("emulated"), "{report}");
}

#[test]
fn a_verb_that_fails_names_the_check_that_explains_it() {
    let dir = scratch();
    let dir = dir.path();
    fs::File::create(dir.join("a.raw")).unwrap().set_len(1 << 20).unwrap();
    let list =
        Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(["fs", "list", "-f", "raw", "a.raw"]).dir(dir);
    list.env("PATH", "/nowhere").fails(1).says(&["guestfish", "`diskmill doctor guestfish`"]);
}

#[test]
fn a_start_that_another_program_blocks_says_who_does() {
    let Some(python) = require_program("python3") else { return };
    let dir = scratch();
    let dir = dir.path();
    let cache = dir.join(format!(".guestfs-{}", rustix::process::geteuid().as_raw()));
    fs::create_dir(&cache).unwrap();
    let lock = cache.join("lock");
    fs::write(&lock, "").unwrap();
    // As supermin does it.
    let script = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); \
                  print(flush=True); time.sleep(60)";
    let mut holder = Command::new(python);
    let mut holder = holder.args(["-c", script]).arg(&lock).stdout(Stdio::piped()).spawn().unwrap();
    let mut told = [0];
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut told).unwrap();
    let check = |status: &str, words: &[&str]| {
        let report = doctor(dir).args(["--json", "cache"]).env("LIBGUESTFS_CACHEDIR", dir).ok().json();
        let check = &report["checks"][0];
        let found = check["found"].as_str().unwrap();
        assert!(check["status"] == status && words.iter().all(|word| found.contains(word)), "{report}");
    };
    let process = format!("process {}", holder.id());
    check("note", &[&process, "is building the appliance", lock.to_str().unwrap()]);

    // Its guestfish does not come to listen, be it for that or for another reason.
    let bin = dir.join("bin");
    fs::create_dir(&bin).unwrap();
    program(&bin.join("guestfish"), "case $1 in --version) echo guestfish 9.9.9 ;; *) exec sleep 60 ;; esac");
    fs::File::create(dir.join("a.raw")).unwrap().set_len(1 << 20).unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let list = |options: &[&str]| {
        let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(["fs", "list", "-f", "raw", "a.raw"]);
        let cmd = cmd.args(options).dir(dir).env("PATH", &path).env("HOME", dir).env("XDG_RUNTIME_DIR", dir);
        cmd.env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg").env("LIBGUESTFS_CACHEDIR", dir).fails(1)
    };
    let blocked = format!("another program ({process}) is building the appliance: {}", lock.display());
    let out = list(&["--start-timeout", "6"]);
    let said = out.err();
    assert!(said.starts_with(&format!("diskmill: waiting: {blocked} is locked\n")), "{out}");
    assert!(said.matches(&blocked).count() == 2 && said.contains("`diskmill doctor cache`"), "{out}");
    let out = list(&["--start-timeout", "6", "-q"]);
    assert_eq!(out.err().matches(&blocked).count(), 1, "{out}");

    holder.kill().unwrap();
    holder.wait().unwrap();
    check("ok", &["free in"]);
    let out = list(&["--start-timeout", "6"]);
    assert!(out.err().starts_with("diskmill: the appliance is starting; emulated"), "{out}");
    out.says(&["did not start within 6 s", "`diskmill doctor kvm memory`"]);
}

#[test]
fn a_setting_that_cannot_be_meant_is_refused_from_everywhere() {
    let dir = scratch();
    let dir = dir.path();
    fs::File::create(dir.join("a.raw")).unwrap().set_len(1 << 20).unwrap();
    let list = |options: &[&str], env: (&str, &str)| {
        let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(["fs", "list", "-f", "raw", "a.raw"]);
        cmd.args(options).dir(dir).env("XDG_CONFIG_HOME", dir).env(env.0, env.1)
    };
    for (option, value, word) in [
        ("--memsize", "1", "256"),
        ("--smp", "256", "255"),
        ("--backend", "foo", "libvirt:URI"),
        ("--start-timeout", "0", "86400"),
    ] {
        list(&[option, value], ("A", "b")).fails(2).says(&[option, word]);
    }
    for (name, value) in [("LIBGUESTFS_MEMSIZE", "10"), ("LIBGUESTFS_BACKEND", "foo")] {
        list(&[], (name, value)).fails(2).says(&[name, value]);
    }
    fs::create_dir(dir.join("diskmill")).unwrap();
    fs::write(dir.join("diskmill/config.toml"), "[fs]\nmemsize = 10\n").unwrap();
    list(&[], ("A", "b")).fails(2).says(&["config.toml", "memsize", "256"]);
    let out = doctor(dir).arg("settings").env("XDG_CONFIG_HOME", dir).fails(1);
    assert!(out.out().contains("config.toml") && out.out().contains("correct it"), "{out}");
}

#[test]
fn the_memory_of_the_appliance_bounds_the_jobs_wherever_it_is_set() {
    let dir = scratch();
    let dir = dir.path();
    for name in ["a.raw", "b.raw"] {
        fs::File::create(dir.join(name)).unwrap().set_len(1 << 20).unwrap();
    }
    let list = |options: &[&str], memsize: &str| {
        let words = ["fs", "list", "-f", "raw", "-j", "50", "a.raw", "b.raw"];
        let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(words).args(options).dir(dir);
        cmd.env("PATH", "/nowhere").env("LIBGUESTFS_MEMSIZE", memsize).env("XDG_CONFIG_HOME", dir).fails(1)
    };
    let clamped = "warning: 1 at a time instead of 2: an appliance may take 1000000 MiB";
    list(&["--memsize", "1000000"], "").says(&[clamped]);
    list(&[], "1000000").says(&[clamped]);
    assert!(!list(&["-q"], "1000000").err().contains("at a time"));
    fs::create_dir(dir.join("diskmill")).unwrap();
    fs::write(dir.join("diskmill/config.toml"), "[fs]\nmemsize = 1000000\n").unwrap();
    list(&[], "").says(&[clamped]);
    assert!(!list(&["--memsize", "256"], "").err().contains("at a time"));
}

#[test]
fn what_nobody_has_set_follows_the_machine_and_is_shown() {
    let dir = scratch();
    let dir = dir.path();
    let shown = |env: (&str, &str)| {
        let cmd =
            doctor(dir).args(["--json", "settings"]).env("LIBGUESTFS_MEMSIZE", "").env("LIBGUESTFS_SMP", "");
        let cmd = cmd.env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg").env("XDG_CONFIG_HOME", dir);
        cmd.env(env.0, env.1).ok().json()
    };
    let report = shown(("A", "b"));
    let setting = |report: &Value, name: &str| {
        let all = report["settings"].as_array().unwrap();
        let found = all.iter().find(|setting| setting["name"] == name).unwrap();
        (found["value"].as_str().unwrap().to_owned(), found["from"].as_str().unwrap().to_owned())
    };
    let machine = "default for this machine";
    assert_eq!(setting(&report, "smp"), ("1".to_owned(), machine.to_owned()));
    let (mib, from) = setting(&report, "memsize");
    assert!((512..=1280).contains(&mib.parse::<u32>().unwrap()) && from == machine, "{report}");
    let found = report["checks"][0]["found"].as_str().unwrap();
    assert!(found.contains(&format!("memsize = {mib} ({machine})")), "{found}");
    let report = shown(("LIBGUESTFS_MEMSIZE", "700"));
    assert_eq!(setting(&report, "memsize"), ("700".to_owned(), "LIBGUESTFS_MEMSIZE".to_owned()));
}
