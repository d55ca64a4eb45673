//! OVA archives, good and doubtful, made byte by byte.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fmt::Write as _;
use std::path::Path;

use diskmill::convert::{ConvertOptions, Monitor, TargetFormat, convert};
use diskmill::ova::Outcome;
use diskmill::{Allow, Error, Format, Image, Kind, Limits, OpenOptions, OpenPolicy};
use diskmill_format::ova::tar;
use sha2::{Digest, Sha256};

fn options(disk: Option<&str>) -> OpenOptions {
    let policy = OpenPolicy { allow: Allow::OwnTree, paths: Vec::new() };
    OpenOptions { policy, disk: disk.map(str::to_owned), ..OpenOptions::default() }
}

fn open(path: &Path, disk: Option<&str>) -> Result<Image, Error> {
    Image::open(path, &options(disk))
}

/// An image of 64 KiB of `byte` in `format`, and its file.
fn disk(dir: &Path, format: &str, option: (&str, &str), byte: u8) -> Vec<u8> {
    std::fs::write(dir.join("a.raw"), [byte; 65_536]).unwrap();
    let mut format = TargetFormat::named(format).unwrap();
    format.set(option.0, option.1).unwrap();
    let image = Image::open(dir.join("a.raw"), &OpenOptions::default()).unwrap();
    let options = ConvertOptions { format, ..ConvertOptions::default() };
    convert(&[image], dir.join("a.image").into(), &options, &Monitor::new()).unwrap();
    std::fs::read(dir.join("a.image")).unwrap()
}

fn vmdk(dir: &Path, byte: u8) -> Vec<u8> {
    disk(dir, "vmdk", ("subformat", "streamOptimized"), byte)
}

fn member(name: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = tar::encode_file(name.as_bytes(), content.len() as u64, 0).unwrap();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len() + tar::padding(content.len() as u64), 0);
    bytes
}

fn folder(name: &str) -> Vec<u8> {
    let mut bytes = member(name, b"");
    bytes[156] = b'5';
    bytes[148..156].fill(b' ');
    let sum: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
    bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    bytes
}

fn archive(path: &Path, members: &[Vec<u8>]) {
    std::fs::write(path, [members.concat(), tar::END.to_vec()].concat()).unwrap();
}

/// An envelope with a disk for each file, with more attributes of the file.
fn envelope(files: &[(&str, &str)]) -> Vec<u8> {
    let mut text = "<Envelope><References>".to_owned();
    for (name, more) in files {
        write!(text, "<File href=\"{name}\" id=\"f-{name}\"{more}/>").unwrap();
    }
    text.push_str("</References><DiskSection>");
    for (name, _) in files {
        write!(text, "<Disk diskId=\"d-{name}\" fileRef=\"f-{name}\" format=\"http://example.org/vhd\"/>")
            .unwrap();
    }
    (text + "</DiskSection></Envelope>").into_bytes()
}

fn first_byte(image: &Image) -> u8 {
    let mut byte = [0];
    image.reader().read_at(&mut byte, 0).unwrap();
    byte[0]
}

#[test]
fn a_disk_is_read_though_others_are_broken() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.ova");
    let files = [("my%20disk.vmdk", ""), ("gone.vmdk", ""), ("x.vmdk", " compression=\"xz\"")];
    archive(
        &path,
        &[
            member("a.ovf", &envelope(&files)),
            member("my disk.vmdk", &vmdk(dir.path(), 7)),
            member("x.vmdk", b"?"),
        ],
    );
    for name in ["1", "d-my%20disk.vmdk"] {
        assert_eq!(first_byte(&open(&path, Some(name)).unwrap()), 7);
    }
    assert_eq!(open(&path, Some("2")).err().unwrap().kind(), Kind::Corrupt);
    assert_eq!(open(&path, Some("3")).err().unwrap().kind(), Kind::Unsupported);
    let error = open(&path, None).err().unwrap().to_string();
    assert!(error.contains("3 disks") && error.contains("2: gone.vmdk, d-gone.vmdk;"), "{error}");
}

#[test]
fn disks_of_other_formats_are_never_raw() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.ova");
    let refused = |content: &[u8]| {
        archive(&path, &[member("a.ovf", &envelope(&[("d", "")])), member("d", content)]);
        let error = open(&path, None).err().unwrap();
        assert_eq!(error.kind(), Kind::Unsupported, "{error}");
        error.to_string()
    };
    assert!(refused(b"conectix and more").contains("http://example.org/vhd"));
    let qcow2 = disk(dir.path(), "qcow2", ("data_file", "data.raw"), 3);
    assert!(dir.path().join("data.raw").exists());
    assert!(refused(&qcow2).contains("external data file"));
    let qcow2 = disk(dir.path(), "qcow2", ("cluster_size", "4096"), 5);
    archive(&path, &[member("a.ovf", &envelope(&[("d", "")])), member("d", &qcow2)]);
    assert_eq!(first_byte(&open(&path, None).unwrap()), 5);
}

#[test]
fn archives_are_told_by_their_first_file_or_their_name() {
    let dir = tempfile::tempdir().unwrap();
    let disk = member("d.vmdk", &vmdk(dir.path(), 9));
    let ovf = member("a.ovf", &envelope(&[("d.vmdk", "")]));
    let format = |name: &str, members: &[Vec<u8>]| {
        let path = dir.path().join(name);
        archive(&path, members);
        let image = open(&path, None).unwrap();
        assert_eq!(first_byte(&image) == 9, image.info().format == Format::Vmdk);
        image.info().format
    };
    for first in [member("a.mf", b""), member("a.cert", b""), folder("vm/"), disk.clone()] {
        assert_eq!(format("a.tar", &[first, ovf.clone(), disk.clone()]), Format::Vmdk);
    }
    let readme = member("README", b"hello");
    assert_eq!(format("a.tar", &[readme.clone(), ovf.clone(), disk.clone()]), Format::Raw);
    assert_eq!(format("a.OVA", &[readme, ovf, disk]), Format::Vmdk);
}

#[test]
fn what_is_called_an_ova_is_raw_only_if_that_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.ova");
    archive(&path, &[member("a.ovf", &envelope(&[("d.vmdk", "")])), member("d.vmdk", &vmdk(dir.path(), 9))]);
    let whole = std::fs::read(&path).unwrap();
    for at in [0, 124, 150, 257] {
        let mut damaged = whole.clone();
        damaged[at] ^= 4;
        std::fs::write(&path, damaged).unwrap();
        let error = open(&path, None).err().unwrap().to_string();
        assert!(error.contains("tar header: the checksum") && error.contains("-f raw"), "{at}: {error}");
        let named = OpenOptions { format: Some(Format::Raw), ..options(None) };
        assert_eq!(Image::open(&path, &named).unwrap().info().format, Format::Raw);
    }
    std::fs::write(&path, b"").unwrap();
    open(&path, None).err().unwrap();
}

#[test]
fn names_in_an_archive_do_not_drive_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.ova");
    let evil = "\u{1b}[31m\u{9b}2J\u{85}";
    let named = envelope(&[(evil, ""), ("x", "")]);
    let long = format!("<Envelope>&{evil}{};</Envelope>", "x".repeat(100_000));
    let envelopes = [
        named,
        long.into_bytes(),
        format!("<Envelope><a></{evil}></Envelope>").into_bytes(),
        format!("<Envelope><References><File href=\"a\" {evil}/></References></Envelope>").into_bytes(),
    ];
    for text in envelopes {
        archive(&path, &[member("a.ovf", &text), member("d.vmdk", &vmdk(dir.path(), 9))]);
        let error = open(&path, Some("7")).err().unwrap().to_string();
        assert!(!error.contains(char::is_control) && error.len() < 4096, "{error}");
    }
}

#[test]
fn manifests_are_held_against_every_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.ova");
    let line = |name: &str, content: &[u8]| {
        let hex = Sha256::digest(content).iter().fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        });
        format!("SHA256({name})= {hex}\n")
    };
    let outcomes = |manifest: &str, members: &[Vec<u8>]| {
        archive(&path, &[&[member("a.mf", manifest.as_bytes())], members].concat());
        let checks = diskmill::ova::verify(&path, &Limits::default())?;
        Ok(checks.into_iter().map(|check| check.outcome).collect::<Vec<_>>())
    };
    let members = [member("a.cert", b"c"), member("d1", b"one"), member("d2", b"two")];
    let (one, two) = (line("d1", b"one"), line("d2", b"two"));
    let found = |manifest: &str| outcomes(manifest, &members).map_err(|error: Error| error.kind());
    assert_eq!(found(&(one.clone() + &two)), Ok(vec![Outcome::Same, Outcome::Same]));
    assert_eq!(found(&one), Ok(vec![Outcome::Same, Outcome::Unlisted]));
    assert_eq!(found(&line("d2", b"one")), Ok(vec![Outcome::Differs, Outcome::Unlisted]));
    assert_eq!(found(&(one.clone() + &line("d1", b"two"))), Err(Kind::Corrupt));
    // A second file of a name that was checked.
    let doubled = [member("d1", b"one"), member("d1", b"evil")];
    assert_eq!(outcomes(&one, &doubled).map_err(|error| error.kind()), Err(Kind::Corrupt));
    std::fs::write(&path, [9; 4096]).unwrap();
    assert_eq!(diskmill::ova::verify(&path, &Limits::default()).unwrap_err().kind(), Kind::Invalid);
}
