//! What the tests with the real guestfish share.
#![allow(dead_code, reason = "not every test file uses all of it")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use diskmill_guestfs::{Command, Disk, Options, Session, WatchdogCommand};
use diskmill_testkit::require_program;

/// The example program, which is a keeper too: cargo builds examples with the tests, beside them.
pub(crate) fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples/read");
    assert!(program.exists(), "`cargo build --examples` makes {}", program.display());
    program
}

/// Options with a keeper of their own, or nothing where there is no guestfish.
pub(crate) fn options() -> Option<Options> {
    require_program("guestfish")?;
    require_program("qemu-system-x86_64")?;
    let mut options = Options::new(WatchdogCommand::new(example(), ["guestfs-keeper"])).unwrap();
    // Whether KVM works is another test's question.
    options.settings.backend_settings.get_or_insert_with(|| "force_tcg".to_owned());
    Some(options)
}

/// A disk of zeros whose name needs care.
pub(crate) fn empty_disk(dir: &Path) -> PathBuf {
    let path = dir.join("disk with 'quotes\".raw");
    File::create(&path).and_then(|file| file.set_len(256 << 20)).unwrap();
    path
}

/// A session that writes to `disk`, with an ext4 file system mounted.
pub(crate) fn formatted(disk: &Path, options: Options) -> Session {
    let started = Instant::now();
    let mut session = Session::open(&[Disk::file(disk, "raw").writable()], options).unwrap();
    eprintln!("started in {:?}", started.elapsed());
    for command in [
        Command::new("part-disk").arg("/dev/sda").arg("mbr"),
        Command::new("mkfs").arg("ext4").arg("/dev/sda1"),
        Command::new("mount").arg("/dev/sda1").arg("/"),
    ] {
        session.call(&command).unwrap();
    }
    session
}

/// The processes that have `dir`, a session's folder, in their environment.
pub(crate) fn processes_of(name: &str) -> Vec<i32> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let text = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        text.split(|&b| b == 0)
            .any(|var| var.starts_with(b"XDG_RUNTIME_DIR=") && var.ends_with(name.as_bytes()))
    })
    .collect()
}

/// Waits until `done`, at most `limit`.
pub(crate) fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
