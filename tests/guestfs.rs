//! A session with the real guestfish. One boot is shared by what can share it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs::File;
use std::time::{Duration, Instant};

use diskmill_guestfs::{Command, Disk, Kind, Options, Session, WatchdogCommand};
use diskmill_testkit::require_program;

/// Options with the program's own keeper, or nothing where there is no guestfish.
fn options() -> Option<Options> {
    require_program("guestfish")?;
    require_program("qemu-system-x86_64")?;
    let watchdog = WatchdogCommand::new(env!("CARGO_BIN_EXE_diskmill"), ["guestfs-keeper"]);
    let mut options = Options::new(watchdog).expect("options");
    if options.settings.backend_settings.is_none() {
        options.settings.backend_settings = Some("force_tcg".to_owned());
    }
    Some(options)
}

fn empty_disk(dir: &std::path::Path, len: u64) -> std::path::PathBuf {
    let path = dir.join("disk with 'quotes\".raw");
    File::create(&path).and_then(|file| file.set_len(len)).expect("a disk");
    path
}

#[test]
fn files_in_and_out_and_names_of_any_bytes() {
    let Some(options) = options() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let disk = empty_disk(dir.path(), 256 << 20);
    let started = Instant::now();
    let mut session = Session::open(&[Disk::file(&disk, "raw").writable()], options).expect("a session");
    eprintln!("started in {:?}", started.elapsed());
    let mut call = |command: Command| session.call(&command).unwrap_or_else(|e| panic!("{command:?}: {e}"));
    call(Command::new("part-disk").arg("/dev/sda").arg("mbr"));
    call(Command::new("mkfs").arg("ext4").arg("/dev/sda1"));
    call(Command::new("mount").arg("/dev/sda1").arg("/"));

    // Anything but NUL.
    let content: Vec<u8> = (1..=255u8).cycle().take(3_000_000).collect();
    session.upload(&mut &content[..], "/ a file").expect("upload");
    let mut back = Vec::new();
    assert_eq!(session.download("/ a file", &mut back).expect("download"), 3_000_000);
    assert!(back == content);
    session.upload(&mut &b"a\0b"[..], "/nul").expect("upload");
    let mut back = Vec::new();
    session.download("/nul", &mut back).expect("download");
    assert_eq!(back, b"a\0b");

    let odd: [&[u8]; 6] = [b"a b", b"it's", b"back\\slash\\", b"new\nline", b"\xff\xfe", b"\"q\\'"];
    for name in odd {
        session.call(&Command::new("touch").arg([b"/", name].concat())).expect("touch");
    }
    let names = session.call(&Command::new("ls0").arg("/").output()).expect("ls0");
    let names: Vec<&[u8]> = names.split(|&b| b == 0).collect();
    assert!(odd.iter().all(|name| names.contains(name)), "{names:?}");
    let stats = session.call(&Command::new("lstatnslist").arg("/").list(odd)).expect("lstatnslist");
    let stats = String::from_utf8(stats).expect("text");
    assert_eq!((stats.matches("st_ino: ").count(), stats.matches("st_ino: -1").count()), (6, 0), "{stats}");

    let error = session.call(&Command::new("read-file").arg("/none")).expect_err("no such file");
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
    let error = session.call(&Command::new("event").arg("x").arg("*").arg("id")).expect_err("refused");
    assert_eq!(error.kind(), Kind::Invalid, "{error}");

    // Whoever has enough of an output ends the call, not the session.
    let mut closed = Closed;
    assert_eq!(session.download("/ a file", &mut closed).expect_err("closed").kind(), Kind::Io);
    assert_eq!(session.call(&Command::new("list-partitions")).expect("call"), b"/dev/sda1\n");

    let closing = Instant::now();
    session.close().expect("close");
    assert!(closing.elapsed() < Duration::from_secs(20));
}

struct Closed;

impl std::io::Write for Closed {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
