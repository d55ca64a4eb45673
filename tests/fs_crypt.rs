//! `diskmill fs` on encrypted qcow2 images. QEMU knows nothing of the encryption: diskmill reads and writes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[allow(dead_code, reason = "not every test needs all of it")]
#[path = "support/kept.rs"]
mod kept;

use std::fs;
use std::path::Path;
use std::time::Duration;

use diskmill_testkit::{Cmd, require_program, scratch};
use kept::Kept;

const SECRET: &str = "correct horse";

/// Makes `disk.qcow2` of `disk.raw`, and files with its passphrase and a wrong one.
fn encrypt(kept: &Kept, options: &str) {
    fs::write(kept.dir.join("key"), SECRET).unwrap();
    fs::write(kept.dir.join("wrong"), "guess\n").unwrap();
    let options = format!("{options},encrypt.key-secret=key");
    let words = ["convert", "-O", "qcow2", "-o", &options, "--object", "secret,id=key,file=key"];
    let _ = kept.run(&words).args(["disk.raw", "disk.qcow2"]).ok();
}

const LUKS: &str = "encrypt.format=luks,encrypt.iter-time=10";

/// The bytes of a file of the image, which must be sound.
fn stored(kept: &Kept, path: &str) -> String {
    let _ = kept.run(&["check", "--key-file", "key", "disk.qcow2"]).ok();
    let _ = kept.run(&["convert", "-O", "raw", "--key-file", "key", "disk.qcow2", "back.raw"]).ok();
    let _ = Cmd::new("e2fsck").args(["-fn", "back.raw?offset=1048576"]).dir(&kept.dir).ok();
    let cat = format!("cat {path}");
    Cmd::new("debugfs").args(["-R", &cat, "back.raw?offset=1048576"]).dir(&kept.dir).ok().out()
}

/// Whether `text` stands in any file of the folder, or in what a process of its sessions shows of itself.
fn is_seen(kept: &Kept, text: &str) -> bool {
    fn below(dir: &Path, text: &str) -> bool {
        fs::read_dir(dir).unwrap().flatten().any(|entry| match entry.file_type().unwrap() {
            kind if kind.is_dir() => below(&entry.path(), text),
            kind if kind.is_file() => contains(&entry.path(), text),
            _ => false,
        })
    }
    fn contains(path: &Path, text: &str) -> bool {
        fs::read(path).unwrap_or_default().windows(text.len()).any(|part| part == text.as_bytes())
    }
    let processes = kept.processes("");
    assert!(!processes.is_empty());
    below(&kept.dir.join("run"), text)
        || processes.iter().any(|pid| {
            ["cmdline", "environ"]
                .iter()
                .any(|name| contains(&Path::new("/proc").join(pid.to_string()).join(name), text))
        })
}

#[test]
fn a_session_holds_the_passphrase() {
    let dir = scratch();
    let Some(kept) = Kept::new(dir.path()) else { return };
    encrypt(&kept, LUKS);
    let put = |content: &str, key: &[&str]| {
        let words = [&["fs", "put", "--keep", "-q"], key, &["disk.qcow2", "-", "/etc/new"]].concat();
        kept.run(&words).stdin_bytes(content.into())
    };
    put("none", &[]).fails(1).says(&["needs its passphrase"]);
    put("none", &["--key-file", "wrong"]).fails(1).says(&["passphrase"]);
    assert!(kept.sockets().is_empty() && kept.list().is_empty());

    let _ = put("one", &["--key-file", "key"]).ok();
    let id = kept.list()[0]["id"].as_str().unwrap().to_owned();
    assert!(!is_seen(&kept, SECRET));
    // It is open to its user, who need not give the passphrase again, but not a wrong one.
    let _ = put("two", &[]).ok();
    let _ = put("three", &["--object", &format!("secret,id=any,data={SECRET}")]).ok();
    put("four", &["--key-file", "wrong"]).fails(1).says(&["passphrase"]);
    assert_eq!(kept.run(&["fs", "cat", "disk.qcow2", "/etc/new"]).ok().out(), "three");
    assert_eq!(kept.list()[0]["id"], *id);
    let _ = kept.run(&["session", "stop", &id]).ok();
    kept.assert_gone(Duration::from_secs(1));
    assert_eq!(stored(&kept, "/etc/new"), "three");

    // The same for readers.
    let _ = kept.run(&["session", "start", "-q", "--key-file", "key", "disk.qcow2"]).ok();
    assert!(!is_seen(&kept, SECRET));
    let cat = |key: &[&str]| kept.run(&[&["fs", "cat"], key, &["disk.qcow2", "/etc/hostname"]].concat());
    for key in [&[][..], &["--key-file", "key"]] {
        assert_eq!(cat(key).ok().out(), "kept\n");
    }
    cat(&["--key-file", "wrong"]).fails(1).says(&["passphrase"]);
    assert_eq!(kept.list().len(), 1);
    // Not if the image is another one now, whose passphrase nobody has given.
    fs::copy(kept.dir.join("disk.qcow2"), kept.dir.join("other")).unwrap();
    fs::rename(kept.dir.join("other"), kept.dir.join("disk.qcow2")).unwrap();
    cat(&[]).fails(1).says(&["has been replaced", "needs its passphrase"]);
    kept.assert_gone(Duration::from_secs(1));
}

/// Legacy AES, without a session and mounted.
#[test]
fn files_are_put_into_an_image_with_legacy_aes() {
    let dir = scratch();
    let Some(kept) = Kept::new(dir.path()) else { return };
    encrypt(&kept, "encrypt.format=aes");
    let words = ["fs", "put", "--json", "--key-file", "key", "disk.qcow2", "-", "/etc/new"];
    let put = kept.run(&words).stdin_bytes("put".into()).ok().json();
    assert_eq!(put["files"], 1);
    assert_eq!(stored(&kept, "/etc/new"), "put");
    if require_program("guestmount").is_none() || !Path::new("/dev/fuse").exists() {
        return;
    }
    fs::create_dir(kept.dir.join("mnt")).unwrap();
    let words = ["fs", "mount", "--write", "--key-file", "key", "-m", "/dev/sda1", "disk.qcow2", "mnt"];
    let _ = kept.run(&words).ok();
    let seen = is_seen(&kept, SECRET);
    fs::write(kept.dir.join("mnt/etc/mounted"), "through FUSE").unwrap();
    let _ = kept.run(&["fs", "umount", "mnt"]).ok();
    assert!(!seen);
    assert_eq!(stored(&kept, "/etc/mounted"), "through FUSE");
}
