//! A session with the real guestfish. One boot is shared by what can share it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod common;

use std::time::{Duration, Instant};

use common::{empty_disk, formatted, options, processes_of, wait_for};
use diskmill_guestfs::{Command, Disk, Kept, Kind, Session};

#[test]
fn files_in_and_out_names_of_any_bytes_and_a_session_that_is_kept() {
    let Some(options) = options() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = empty_disk(dir.path());
    let mut session = formatted(&disk, options.clone());

    // Anything, NUL included; more than one read's worth.
    let content: Vec<u8> = (0..=255u8).cycle().take(5_000_001).collect();
    session.upload(&mut &content[..], "/ a file").unwrap();
    let mut back = Vec::new();
    assert_eq!(session.download("/ a file", &mut back).unwrap(), 5_000_001);
    assert!(back == content);
    assert!(session.read("/ a file").unwrap() == content);
    session.upload(&mut &b""[..], "/empty").unwrap();
    assert_eq!(session.read("/empty").unwrap(), b"");

    let odd: [&[u8]; 6] = [b"a b", b"it's", b"back\\slash\\", b"new\nline", b"\xff\xfe", b"\"q\\'"];
    for name in odd {
        session.call(&Command::new("touch").arg([b"/", name].concat())).unwrap();
    }
    let names = session.call(&Command::new("ls0").arg("/").output()).unwrap();
    let names: Vec<&[u8]> = names.split(|&b| b == 0).collect();
    assert!(odd.iter().all(|name| names.contains(name)), "{names:?}");
    let stats = session.call(&Command::new("lstatnslist").arg("/").list(odd)).unwrap();
    let stats = String::from_utf8(stats).unwrap();
    assert_eq!((stats.matches("st_ino: ").count(), stats.matches("st_ino: -1").count()), (6, 0), "{stats}");

    let error = session.read("/none").unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound, "{error}");
    let error = session.call(&Command::new("event").arg("x").arg("*").arg("id")).unwrap_err();
    assert_eq!(error.kind(), Kind::Invalid, "{error}");

    // Whoever has enough of an output ends the call, not the session.
    assert_eq!(session.download("/ a file", &mut Closed).unwrap_err().kind(), Kind::Io);
    assert_eq!(session.call(&Command::new("list-partitions")).unwrap(), b"/dev/sda1\n");

    // Passphrases: one that was not asked for does not answer the next question.
    let luks = |name: &str, key: &str| Command::new(name).arg("/dev/sda1").key(key);
    session.call(&Command::new("umount").arg("/")).unwrap();
    session.call(&Command::new("ping-daemon").key("left over")).unwrap();
    session.call(&luks("luks-format", "s e'cret").arg("0")).unwrap();
    assert!(session.call(&luks("luks-open", "wrong").arg("crypt")).is_err());
    session.call(&luks("luks-open", "s e'cret").arg("crypt")).unwrap();
    session.call(&Command::new("mkfs").arg("ext2").arg("/dev/mapper/crypt")).unwrap();
    session.call(&Command::new("mount").arg("/dev/mapper/crypt").arg("/")).unwrap();
    session.call(&Command::new("write").arg("/note").arg("kept")).unwrap();

    // No disk is left in the guest: one message, and the session goes on.
    let error = session.call(&Command::new("fallocate64").arg("/big").arg("1000000000")).unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace, "{error}");

    let mut notes = serde_json::Map::new();
    notes.insert("mounted".to_owned(), true.into());
    session.set_notes(&notes).unwrap();
    let kept = session.keep(Duration::from_secs(3), "kept").unwrap();
    let wanted = [Disk::file(&disk, "raw")];
    let found = Kept::find(&wanted).unwrap();
    assert_eq!((found.id(), found.pid()), (kept.id(), kept.pid()));
    assert!(Kept::find(&[Disk::file(&disk, "qcow2")]).is_none());
    let began = Instant::now();
    let mut session = Session::attach(&found, options.clone()).unwrap();
    assert_eq!(session.notes(), notes);
    assert_eq!(session.read("/note").unwrap(), b"kept");
    session.close().unwrap();
    eprintln!("second use took {:?}", began.elapsed());
    // Its keeper ends it when nobody has used it for a while, and everything has arrived in the image.
    wait_for("the end of an idle session", Duration::from_secs(40), || processes_of(&kept.id()).is_empty());
    wait_for("the end of its keeper", Duration::from_secs(10), || Kept::find(&wanted).is_none());
    assert!(matches!(Session::attach(&kept, options), Err(e) if e.kind() == Kind::Died));
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
