//! `diskmill fs` on a whole operating system: a Debian made by debootstrap.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[allow(dead_code, reason = "not every test needs all of it")]
#[path = "support/guestfs.rs"]
mod guestfs;

use std::fs::{self, File};
use std::path::Path;

use diskmill_testkit::{Cmd, is_root, require_program, scratch, skip};
use guestfs::Fs;

/// A Debian on the only partition of `debian.raw`.
fn debian(dir: &Path) -> bool {
    let programs = ["debootstrap", "sfdisk", "mke2fs"];
    if !programs.into_iter().all(|name| require_program(name).is_some()) {
        return false;
    }
    if !is_root() {
        skip("debootstrap needs root");
        return false;
    }
    let root = dir.join("root");
    let made = Cmd::new("debootstrap").args(["--variant=minbase", "bookworm", "root"]).dir(dir);
    if made.limit(std::time::Duration::from_secs(600)).run().code != Some(0) {
        skip("debootstrap finds no mirror");
        return false;
    }
    fs::write(root.join("etc/hostname"), "before\n").unwrap();
    fs::write(root.join("etc/fstab"), "/dev/sda1 / ext4 defaults 0 1\n").unwrap();
    File::create(dir.join("debian.raw")).unwrap().set_len(700 << 20).unwrap();
    let table = b"label: gpt\nstart=2048, type=linux\n".to_vec();
    let _ = Cmd::new("sfdisk").args(["-q", "debian.raw"]).stdin_bytes(table).dir(dir).ok();
    let words = ["-q", "-t", "ext4", "-d", "root", "-E", "offset=1048576", "debian.raw", "680M"];
    let _ = Cmd::new("mke2fs").args(words).dir(dir).ok();
    fs::remove_dir_all(&root).unwrap();
    true
}

#[test]
fn a_debian_is_inspected_customised_and_grown() {
    let dir = scratch();
    let dir = dir.path();
    let Some(fs) = Fs::new(dir) else { return };
    if !debian(dir) {
        return;
    }
    let found = fs.ok(&["inspect", "--keep", "--apps", "--json", "debian.raw"]).json();
    let system = &found[0]["operating-systems"][0];
    assert_eq!((&system["distro"], &system["hostname"]), (&"debian".into(), &"before".into()));
    assert_eq!((&system["major-version"], &system["package-format"]), (&12.into(), &"deb".into()));
    assert_eq!(system["mount-points"][0]["path"], "/");
    let apps = system["applications"].as_array().unwrap();
    assert!(apps.iter().any(|app| app["name"] == "base-files" && app["version"] != ""), "{}", apps.len());

    fs::copy(dir.join("debian.raw"), dir.join("changed.raw")).unwrap();
    fs::write(dir.join("password"), "s3cret\n").unwrap();
    fs::write(dir.join("extra"), "extra\n").unwrap();
    let words = ["customize", "-q", "changed.raw", "--hostname", "after", "--timezone", "Europe/Berlin"];
    let more = ["--user", "bob", "--password", "bob:file:password", "--upload", "extra:/etc/extra"];
    let history = ["--upload", "extra:/root/.bash_history"];
    let _ = fs.ok(&[&words[..], &more, &history].concat());

    let diff = fs.cmd(&["diff", "--json", "debian.raw", "changed.raw", "/etc"]).fails(1).json();
    let changed = |path: &str| diff.as_array().unwrap().iter().find(|item| item["path"] == path).cloned();
    assert_eq!(changed("/etc/extra").unwrap()["changes"][0], "added");
    assert!(
        changed("/etc/hostname").is_some()
            && changed("/etc/shadow").is_some()
            && changed("/etc/motd").is_none()
    );

    fs.stop();

    let ran = fs.cmd(&[
        "run",
        "--json",
        "--discard",
        "changed.raw",
        "cat /etc/hostname; touch /gone; echo err >&2; exit 7",
    ]);
    let ran = ran.fails(7).json();
    assert_eq!((&ran["stdout"], &ran["stderr"]), (&"after\n".into(), &"err\n".into()));
    let grown = fs.ok(&["grow", "--keep", "--json", "changed.raw", "+100M"]).json();
    assert_eq!(grown["size"], 800u64 << 20);
    let editor =
        fs.cmd(&["edit", "--json", "changed.raw", "/etc/motd"]).env("VISUAL", "sed -i 1iedited").ok();
    assert_eq!(editor.json()["changed"], true);
    let df = fs.ok(&["df", "--json", "changed.raw"]).json();
    assert!(df[0]["filesystems"][0]["usage"]["size"].as_u64().unwrap() > 740 << 20, "{df}");
    fs.stop();

    fs::create_dir(dir.join("mnt")).unwrap();
    let mounts = require_program("guestmount").is_some() && Path::new("/dev/fuse").exists();
    if mounts {
        let _ = fs.ok(&["mount", "--write", "changed.raw", "mnt"]);
        assert!(fs::read_to_string(dir.join("mnt/etc/motd")).unwrap().starts_with("edited\n"));
        fs::write(dir.join("mnt/etc/mounted"), "through FUSE").unwrap();
        // One writer at a time.
        fs.cmd(&["rm", "changed.raw", "/etc/motd"]).fails(1).says(&["lock"]);
        let _ = fs.ok(&["umount", "mnt"]);
        assert!(!dir.join("mnt/etc").exists());
    }
    let operations = ["sysprep", "-q", "--operations", "bash-history", "changed.raw"];
    let _ = fs.ok(&operations);
    let names = "{gone,motd,extra,mounted,.bash_history}";
    let found = fs.ok(&["find", "--json", "--name", names, "--type", "f", "changed.raw", "/"]).json();
    let found: Vec<&str> =
        found.as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
    let has = |path: &str| found.contains(&path);
    assert!(has("/etc/extra") && has("/etc/motd") && has("/etc/mounted") == mounts, "{found:?}");
    assert!(!has("/gone") && !has("/root/.bash_history"), "{found:?}");
}
