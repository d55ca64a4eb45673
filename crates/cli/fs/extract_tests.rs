//! Archives as a hostile guest would make them.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use tar::{Builder, EntryType, Header};

use super::copied::Copied;
use super::extract::{Keep, unpack};

/// A member: kind, name, link target, content.
type Member<'m> = (EntryType, &'m [u8], &'m [u8], &'m [u8]);

fn archive(members: &[Member<'_>]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for &(kind, name, link, content) in members {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name);
        gnu.linkname[..link.len()].copy_from_slice(link);
        header.set_size(content.len() as u64);
        header.set_mode(0o6755);
        header.set_mtime(1_000_000_000);
        header.set_uid(7);
        header.set_gid(8);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap()
}

const DIR: EntryType = EntryType::Directory;
const FILE: EntryType = EntryType::Regular;
const LINK: EntryType = EntryType::Symlink;
const HARD: EntryType = EntryType::Link;

/// A folder `out` to unpack into, and beside it a file that must never change.
fn sandbox() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("out")).unwrap();
    fs::write(dir.path().join("victim"), "precious").unwrap();
    dir
}

fn try_unpack(dir: &Path, members: &[Member<'_>], keep: Keep) -> Result<Copied, String> {
    let result = unpack(&archive(members)[..], &dir.join("out"), keep).map_err(|error| error.to_string());
    assert_eq!(fs::read_to_string(dir.join("victim")).unwrap(), "precious");
    let mut beside: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    beside.sort();
    assert_eq!(beside, ["out", "victim"]);
    result
}

#[test]
fn a_plain_tree_arrives() {
    let dir = sandbox();
    let members = [
        (DIR, &b"./"[..], &b""[..], &b""[..]),
        (DIR, b"./d", b"", b""),
        (FILE, b"./d/a b\n\xff", b"", b"hello"),
        (LINK, b"./d/l", b"../../../etc/passwd", b""),
        (HARD, b"./d/h", b"./d/a b\n\xff", b""),
        (EntryType::Char, b"./d/null", b"", b""),
    ];
    let done = try_unpack(dir.path(), &members, Keep::default()).unwrap();
    assert_eq!(done, Copied { files: 1, folders: 1, links: 2, bytes: 5, left_out: 1 });
    let out = dir.path().join("out/d");
    assert_eq!(fs::read_to_string(out.join("h")).unwrap(), "hello");
    let meta = fs::metadata(out.join("h")).unwrap();
    assert_eq!((meta.permissions().mode() & 0o7777, meta.mtime()), (0o755, 1_000_000_000));
    assert_eq!(fs::metadata(&out).unwrap().mtime(), 1_000_000_000);
    assert_eq!(fs::read_link(out.join("l")).unwrap(), Path::new("../../../etc/passwd"));
    assert!(!out.join("null").exists());
}

#[test]
fn nothing_is_written_outside() {
    let cases: [&[Member<'_>]; 7] = [
        &[(FILE, b"../victim", b"", b"x")],
        &[(FILE, b"a/../../victim", b"", b"x")],
        &[(LINK, b"l", b"..", b""), (FILE, b"l/victim", b"", b"x")],
        &[(LINK, b"l", b"../victim", b""), (FILE, b"l", b"", b"x")],
        &[(HARD, b"h", b"../victim", b"")],
        &[(LINK, b"l", b"..", b""), (HARD, b"h", b"l/victim", b"")],
        &[(LINK, b"l", b"..", b""), (DIR, b"l", b"", b"")],
    ];
    for members in cases {
        for existing in [false, true] {
            let dir = sandbox();
            let keep = Keep { existing, ..Keep::default() };
            let result = try_unpack(dir.path(), members, keep);
            // A link that stands where a file shall be is replaced, where that is allowed.
            let replaced = existing && members[members.len() - 1].0 == FILE && members.len() == 2;
            assert!(result.is_err() || replaced && !members[1].1.contains(&b'/'), "{result:?} {members:?}");
        }
    }
}

#[test]
fn absolute_names_land_inside() {
    let dir = sandbox();
    try_unpack(dir.path(), &[(FILE, b"/etc/x", b"", b"x")], Keep::default()).unwrap();
    assert_eq!(fs::read(dir.path().join("out/etc/x")).unwrap(), b"x");
}

#[test]
fn what_exists_stays_unless_asked_for() {
    let dir = sandbox();
    let out = dir.path().join("out");
    fs::write(out.join("f"), "old").unwrap();
    symlink("../victim", out.join("l")).unwrap();
    for name in [&b"f"[..], b"l"] {
        try_unpack(dir.path(), &[(FILE, name, b"", b"new")], Keep::default()).unwrap_err();
    }
    assert_eq!(fs::read_to_string(out.join("f")).unwrap(), "old");
    let keep = Keep { existing: true, ..Keep::default() };
    for name in [&b"f"[..], b"l"] {
        try_unpack(dir.path(), &[(FILE, name, b"", b"new")], keep).unwrap();
    }
    assert_eq!(fs::read_to_string(out.join("f")).unwrap(), "new");
    assert_eq!(fs::symlink_metadata(out.join("l")).unwrap().len(), 3);
}

#[test]
fn strange_archives_are_errors() {
    let dir = sandbox();
    let long = vec![b'x'; 70 << 10];
    let cases: [&[Member<'_>]; 3] = [
        &[(EntryType::GNULongName, b"././@LongLink", b"", &long), (FILE, b"x", b"", b"")],
        &[(EntryType::XHeader, b"pax", b"", b"11 path=x\n"), (FILE, b"y", b"", b"")],
        &[(HARD, b"h", b"", b"")],
    ];
    for members in cases {
        try_unpack(dir.path(), members, Keep::default()).unwrap_err();
    }
    let mut cut = archive(&[(FILE, b"f", b"", &[1; 2000])]);
    cut.truncate(1500);
    unpack(&cut[..], &dir.path().join("out"), Keep::default()).unwrap_err();
}

#[test]
fn long_names_are_joined() {
    let dir = sandbox();
    let name = ["n".repeat(100), "m".repeat(100)].join("/");
    let members = [
        (EntryType::GNULongName, &b"././@LongLink"[..], &b""[..], [name.as_bytes(), b"\0"].concat()),
        (FILE, b"n", b"", b"x".to_vec()),
    ];
    let members: Vec<Member<'_>> = members.iter().map(|(k, n, l, c)| (*k, *n, *l, c.as_slice())).collect();
    try_unpack(dir.path(), &members, Keep::default()).unwrap();
    assert_eq!(fs::read(dir.path().join("out").join(name)).unwrap(), b"x");
}
