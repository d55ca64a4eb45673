//! What goes wrong with guestfish and its appliance: one clear message, and nothing is left of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command as Program, Stdio};
use std::time::{Duration, Instant};

use common::{empty_disk, example, formatted, options, processes_of, wait_for};
use diskmill_guestfs::{Command, Disk, Kind, Options, Session};
use rustix::process::{Pid, Signal, kill_process};

/// The folder of the session whose guestfish has the number `pid`.
fn folder(pid: i32) -> PathBuf {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let mut variables = environment.split(|&b| b == 0);
    let dir = variables.find_map(|var| var.strip_prefix(b"XDG_RUNTIME_DIR=")).unwrap();
    PathBuf::from(String::from_utf8(dir.to_vec()).unwrap())
}

/// Whether this is QEMU with an appliance: libguestfs runs others for a moment, to see what it can do.
fn is_appliance(pid: i32) -> bool {
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    program(pid).starts_with("qemu-system") && arguments.split(|&b| b == 0).any(|word| word == b"-kernel")
}

fn program(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// The appliance, the guestfish in front of it, and their folder.
struct Running {
    qemu: i32,
    guestfish: i32,
    dir: PathBuf,
    /// libguestfs' own, for sockets.
    sockets: PathBuf,
}

/// The folder in QEMU's command line, `socket,path=/tmp/libguestfsXXXXXX/guestfsd.sock,…`.
fn sockets(qemu: i32) -> PathBuf {
    let arguments = String::from_utf8(std::fs::read(format!("/proc/{qemu}/cmdline")).unwrap()).unwrap();
    let path = arguments.split([',', '\0']).find_map(|word| word.strip_prefix("path=")).unwrap();
    PathBuf::from(path).parent().unwrap().to_owned()
}

impl Running {
    fn of(session: &Session) -> Self {
        let guestfish = session.pid();
        let dir = folder(guestfish);
        let qemu = processes_of(dir.file_name().unwrap().to_str().unwrap());
        let qemu = qemu.into_iter().find(|&pid| is_appliance(pid)).unwrap();
        Self { qemu, guestfish, dir, sockets: sockets(qemu) }
    }

    /// Nothing is left: no process, no folder, no socket.
    fn assert_gone(&self) {
        assert_eq!(processes_of(self.dir.file_name().unwrap().to_str().unwrap()), Vec::<i32>::new());
        for dir in [&self.dir, &self.sockets] {
            assert!(!dir.exists(), "{}", dir.display());
        }
        let uid = rustix::process::geteuid().as_raw();
        assert!(!PathBuf::from(format!("/tmp/.guestfish-{uid}/socket-{}", self.guestfish)).exists());
    }
}

/// A test that fails leaves nothing either.
impl Drop for Running {
    fn drop(&mut self) {
        if is_appliance(self.qemu) {
            signal(self.qemu, Signal::KILL);
        }
        if program(self.guestfish) == "guestfish" {
            signal(self.guestfish, Signal::KILL);
        }
    }
}

#[test]
fn an_appliance_killed_in_the_middle_of_a_command() {
    let Some(options) = options() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut session = formatted(&empty_disk(dir.path()), options);
    let running = Running::of(&session);
    let qemu = running.qemu;
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        signal(qemu, Signal::KILL);
    });
    let error = session.call(&Command::new("fill").arg("1").arg("200000000").arg("/file")).unwrap_err();
    killer.join().unwrap();
    assert_eq!(error.kind(), Kind::Died, "{error}");
    assert!(error.to_string().contains("doctor") && !error.to_string().contains('\n'), "{error}");
    running.assert_gone();
    assert_eq!(session.call(&Command::new("sync")).unwrap_err().kind(), Kind::Died);
}

#[test]
fn guestfish_killed_and_an_appliance_that_hangs() {
    let Some(mut options) = options() else { return };
    options.settings.call_timeout = Some(Duration::from_secs(25));
    let dir = tempfile::tempdir().unwrap();
    let disk = empty_disk(dir.path());
    let mut session = formatted(&disk, options.clone());
    let running = Running::of(&session);

    // Never two writers on one image.
    let error = Session::open(&[Disk::file(&disk, "raw").writable()], options.clone()).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");

    session.set_call_timeout(Some(Duration::from_secs(3)));
    signal(running.qemu, Signal::STOP);
    let began = Instant::now();
    let error = session.call(&Command::new("sync")).unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout, "{error}");
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    running.assert_gone();

    // The image is as the last finished operation left it, and can be used again at once.
    let mut session = Session::open(&[Disk::file(&disk, "raw")], options).unwrap();
    let running = Running::of(&session);
    signal(running.guestfish, Signal::KILL);
    let error = session.call(&Command::new("list-devices")).unwrap_err();
    assert_eq!(error.kind(), Kind::Died, "{error}");
    running.assert_gone();
}

#[test]
fn a_program_that_is_killed_leaves_nothing_and_neither_does_its_keeper() {
    if options().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = empty_disk(dir.path());
    // A run-time folder of their own: tests beside this one would sweep, too.
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
    let start = |hypervisor: &str| {
        let mut command = Program::new(example());
        command.arg(&disk).args(["raw", "/dev/sda1", "/x"]).stdout(Stdio::null()).stderr(Stdio::null());
        command
            .env("XDG_RUNTIME_DIR", dir.path())
            .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
            .env("LIBGUESTFS_HV", hypervisor);
        command.spawn().unwrap()
    };
    let appliance = |id: u32| {
        let mut found = None;
        wait_for("an appliance", Duration::from_secs(120), || {
            let keeper = children(id as i32).into_iter().next();
            found = keeper.and_then(|keeper| {
                let guestfish = children(keeper).into_iter().find(|&pid| !children(pid).is_empty())?;
                let qemu = children(guestfish).into_iter().find(|&pid| is_appliance(pid))?;
                Some((keeper, Running { qemu, guestfish, dir: folder(guestfish), sockets: sockets(qemu) }))
            });
            found.is_some()
        });
        found.unwrap()
    };

    // Killed while the appliance boots.
    let mut child = start("");
    let (_, running) = appliance(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("the end of all", Duration::from_secs(10), || !running.dir.exists());
    running.assert_gone();

    // The keeper too: the next one who comes finds what is left.
    let mut child = start("");
    let (keeper, running) = appliance(child.id());
    signal(keeper, Signal::KILL);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("the end of the keeper", Duration::from_secs(5), || program(keeper).is_empty());
    assert_eq!((is_appliance(running.qemu), running.dir.exists()), (true, true));
    assert!(!start("/bin/false").wait().unwrap().success());
    running.assert_gone();
}

fn children(parent: i32) -> Vec<i32> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
        after.split_whitespace().nth(1) == Some(parent.to_string().as_str())
    })
    .collect()
}

#[test]
fn what_is_missing_is_named() {
    let Some(options) = options() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = empty_disk(dir.path());
    let open = |change: &dyn Fn(&mut Options)| {
        let mut options = options.clone();
        change(&mut options);
        Session::open(&[Disk::file(&disk, "raw")], options).unwrap_err()
    };
    let error = open(&|options| options.settings.guestfish = "no-such-guestfish".into());
    assert_eq!(error.kind(), Kind::NotInstalled, "{error}");
    assert!(error.to_string().contains("no-such-guestfish is not installed"), "{error}");

    let error = open(&|options| options.settings.hypervisor = Some("/bin/false".into()));
    assert_eq!(error.kind(), Kind::Start, "{error}");
    assert!(error.to_string().contains("doctor"), "{error}");

    // A fixed appliance that is none: no kernel.
    let error = open(&|options| options.settings.appliance = Some(dir.path().to_owned()));
    assert_eq!(error.kind(), Kind::NoKernel, "{error}");

    let error = open(&|options| options.settings.start_timeout = Duration::from_secs(2));
    assert_eq!(error.kind(), Kind::Timeout, "{error}");

    let error = Session::open(&[Disk::file(dir.path().join("none"), "raw")], options.clone()).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");

    let waiting = options.clone();
    let cancel = waiting.cancel.clone();
    let cancelling = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        cancel.cancel();
    });
    let error = Session::open(&[Disk::file(&disk, "raw")], waiting).unwrap_err();
    cancelling.join().unwrap();
    assert_eq!(error.kind(), Kind::Cancelled, "{error}");
}

#[test]
fn a_guestfish_that_listens_as_another_version() {
    let Some(mut options) = options() else { return };
    let dir = tempfile::tempdir().unwrap();
    let wrapper = dir.path().join("guestfish");
    let script =
        "#!/bin/sh\ncase $1 in --version) echo guestfish 9.9.9 ;; *) exec guestfish \"$@\" ;; esac\n";
    std::fs::write(&wrapper, script).unwrap();
    std::fs::set_permissions(&wrapper, Permissions::from_mode(0o755)).unwrap();
    options.settings.guestfish = wrapper;
    let error = Session::open(&[Disk::file(empty_disk(dir.path()), "raw")], options).unwrap_err();
    assert_eq!(error.kind(), Kind::Version, "{error}");
    let text = error.to_string();
    let own = Program::new("guestfish").arg("--version").output().unwrap().stdout;
    let own = String::from_utf8(own).unwrap();
    let own = own.trim().trim_start_matches("guestfish ");
    assert!(["9.9.9", own, "doctor guestfish"].iter().all(|word| text.contains(word)), "{text}");
}
