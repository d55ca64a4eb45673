//! Disks inside OVAs.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use diskmill::{Image, Kind, OpenOptions};
use sha2::{Digest as _, Sha256};

use super::{content, descriptor, open, own_tree, qemu_img, sample, sesparse};

/// A tar of `files`, written by the system's tar.
fn tar(dir: &Path, ova: &str, files: &[&str]) {
    let output = Command::new("tar")
        .arg("-C")
        .arg(dir)
        .args(["--format=ustar", "-cf"])
        .arg(dir.join(ova))
        .args(files)
        .output();
    assert!(output.unwrap().status.success());
}

fn envelope(files: &[(&str, &str)]) -> String {
    let mut text = "<?xml version=\"1.0\"?><Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\"><References>".to_owned();
    for (name, more) in files {
        write!(text, "<File ovf:href=\"{name}\" ovf:id=\"f-{name}\"{more}/>").unwrap();
    }
    text.push_str("</References><DiskSection><Info/>");
    for (name, _) in files {
        write!(
            text,
            "<Disk ovf:capacity=\"1\" ovf:diskId=\"d-{name}\" ovf:fileRef=\"f-{name}\" ovf:format=\"x\"/>"
        )
        .unwrap();
    }
    text + "</DiskSection></Envelope>"
}

#[test]
fn disks_in_archives() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let bytes = sample(3 << 20);
    std::fs::write(path("a.raw"), &bytes).unwrap();
    if !qemu_img(&[
        "convert",
        "-O",
        "vmdk",
        "-o",
        "subformat=streamOptimized",
        &path("a.raw"),
        &path("a.vmdk"),
    ]) {
        return;
    }
    std::fs::write(path("b.raw"), &bytes[1 << 20..]).unwrap();
    qemu_img(&["convert", "-O", "vmdk", &path("b.raw"), &path("b.vmdk")]);
    let whole = std::fs::read(path("a.vmdk")).unwrap();
    // An odd size, so that pieces do not fall on grains.
    for (number, piece) in whole.chunks(100_000).enumerate() {
        std::fs::write(path(&format!("c.vmdk.{number:09}")), piece).unwrap();
    }
    let pieces: Vec<String> =
        (0..whole.len().div_ceil(100_000)).map(|number| format!("c.vmdk.{number:09}")).collect();
    let gzip = Command::new("gzip").arg("-kc").arg(path("b.vmdk")).output().unwrap();
    std::fs::write(path("z.vmdk.gz"), gzip.stdout).unwrap();

    std::fs::write(path("one.ovf"), envelope(&[("a.vmdk", "")])).unwrap();
    tar(dir.path(), "one.ova", &["one.ovf", "a.vmdk"]);
    let image = open(Path::new(&path("one.ova"))).unwrap();
    assert!(content(&image).unwrap() == bytes);

    let chunked = format!(" ovf:chunkSize=\"100000\" ovf:size=\"{}\"", whole.len());
    let files = [
        ("a.vmdk", ""),
        ("b.vmdk", ""),
        ("c.vmdk", chunked.as_str()),
        ("z.vmdk.gz", " ovf:compression=\"gzip\""),
    ];
    std::fs::write(path("many.ovf"), envelope(&files)).unwrap();
    let mut members = vec!["many.ovf", "a.vmdk", "b.vmdk", "z.vmdk.gz"];
    members.extend(pieces.iter().map(String::as_str));
    tar(dir.path(), "many.ova", &members);
    let error = open(Path::new(&path("many.ova"))).err().unwrap();
    assert!(error.to_string().contains("--disk") && error.to_string().contains("b.vmdk"), "{error}");
    for (disk, from) in
        [("1", 0), ("2", 1 << 20), ("b.vmdk", 1 << 20), ("d-a.vmdk", 0), ("3", 0), ("4", 1 << 20)]
    {
        let options = OpenOptions { disk: Some(disk.to_owned()), ..own_tree() };
        let image = Image::open(path("many.ova"), &options).unwrap_or_else(|error| panic!("{disk}: {error}"));
        assert!(content(&image).unwrap() == bytes[from..], "{disk}");
    }

    let digest = |name: &str| {
        let mut hex = String::new();
        for byte in Sha256::digest(std::fs::read(path(name)).unwrap()) {
            write!(hex, "{byte:02x}").unwrap();
        }
        hex
    };
    let manifest = format!(
        "SHA256(one.ovf)= {}\nSHA256(a.vmdk)= {}\nSHA256(gone)= {}\n",
        digest("one.ovf"),
        digest("b.vmdk"),
        digest("a.raw")
    );
    std::fs::write(path("one.mf"), manifest).unwrap();
    tar(dir.path(), "two.ova", &["one.ovf", "one.mf", "a.vmdk"]);
    use diskmill::ova::Outcome;
    let checks = diskmill::ova::verify(path("two.ova"), &diskmill::Limits::default()).unwrap();
    let outcomes: Vec<Outcome> = checks.iter().map(|check| check.outcome).collect();
    assert_eq!(outcomes, [Outcome::Same, Outcome::Differs, Outcome::Missing]);

    // A disk inside an archive cannot name files.
    descriptor(dir.path(), "RW 8 FLAT \"b.raw\" 0");
    std::fs::write(path("d.ovf"), envelope(&[("d.vmdk", "")])).unwrap();
    tar(dir.path(), "d.ova", &["d.ovf", "d.vmdk"]);
    assert_eq!(open(Path::new(&path("d.ova"))).err().unwrap().kind(), Kind::Unsupported);
}

#[test]
fn damaged_archives_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("d.vmdk"), sesparse().0).unwrap();
    std::fs::write(dir.path().join("d.ovf"), envelope(&[("d.vmdk", " ovf:size=\"1\"")])).unwrap();
    tar(dir.path(), "d.ova", &["d.ovf", "d.vmdk"]);
    let whole = std::fs::read(dir.path().join("d.ova")).unwrap();
    let mut state = 7u64;
    for _ in 0..2000 {
        let mut file = whole.clone();
        for _ in 0..3 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // The two headers and the envelope.
            let at = (state >> 33) as usize % 2560;
            file[at] = (state >> 20) as u8;
        }
        let storage = std::sync::Arc::new(diskmill_io::MemoryStorage::with_bytes(file, 0));
        let options = OpenOptions { format: Some(diskmill::Format::Ova), ..OpenOptions::default() };
        if let Ok(image) = Image::from_storage(storage, "d.ova", &options) {
            let mut part = vec![0; 65_536];
            let _ = image.reader().read_at(&mut part, 0);
        }
    }
}
