//! VMDKs that are damaged or doubtful: never other bytes without a word.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::Path;

use diskmill::convert::{ConvertOptions, Input, Monitor, TargetFormat, convert};
use diskmill::vmdk::VmdkStream;
use diskmill::{Allow, Error, Image, Kind, Limits, OpenOptions, OpenPolicy, PipeReader};

fn open(path: &Path) -> Result<Image, Error> {
    let policy = OpenPolicy { allow: Allow::OwnTree, paths: Vec::new() };
    Image::open(path, &OpenOptions { policy, ..OpenOptions::default() })
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xaa; image.size() as usize];
    image.reader().read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Bytes without a grain of zeros.
fn sample(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 700) as u8).collect()
}

/// Makes `dir/name` of `bytes`.
fn make(dir: &Path, name: &str, format: &str, subformat: &str, bytes: &[u8]) {
    std::fs::write(dir.join("a.raw"), bytes).unwrap();
    let mut target = TargetFormat::named(format).unwrap();
    if format == "vmdk" {
        target.set("subformat", subformat).unwrap();
    }
    let options = ConvertOptions { format: target, ..ConvertOptions::default() };
    let image = Image::open(dir.join("a.raw"), &OpenOptions::default()).unwrap();
    convert(&[image], dir.join(name).into(), &options, &Monitor::new()).unwrap();
}

fn descriptor(dir: &Path, name: &str, lines: &str) {
    let text = format!("# Disk DescriptorFile\nversion=1\nCID=1\ncreateType=\"custom\"\n{lines}\n");
    std::fs::write(dir.join(name), text).unwrap();
}

#[test]
fn a_parent_is_followed_without_its_cid() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "base.vmdk", "vmdk", "monolithicSparse", &sample(65_536));
    make(dir.path(), "empty.vmdk", "vmdk", "monolithicSparse", &[0; 65_536]);
    let delta = |cid: &str| {
        let lines = format!("{cid}parentFileNameHint=\"base.vmdk\"\nRW 128 SPARSE \"empty.vmdk\"");
        descriptor(dir.path(), "delta.vmdk", &lines);
        let image = open(&dir.path().join("delta.vmdk")).unwrap();
        (content(&image) == sample(65_536), image.warnings().join("\n"))
    };
    for cid in ["", "parentCID=unknown\n"] {
        let (follows, warnings) = delta(cid);
        assert!(follows && warnings.contains("not compared"), "{cid}: {warnings}");
    }
    let (follows, warnings) = delta("parentCID=ffffffff\n");
    assert!(!follows && warnings.contains("ignored"), "{warnings}");
}

#[test]
fn zeros_do_not_end_a_piped_stream() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "a.vmdk", "vmdk", "streamOptimized", &sample(1 << 20));
    let whole = std::fs::read(dir.path().join("a.vmdk")).unwrap();
    let through = |file: &[u8]| {
        std::fs::write(dir.path().join("b.vmdk"), file).unwrap();
        let pipe = PipeReader::new(std::fs::File::open(dir.path().join("b.vmdk")).unwrap().into());
        let input = Input::VmdkStream(Box::new(VmdkStream::new(pipe, &Limits::default())?));
        convert(input, dir.path().join("out").into(), &ConvertOptions::default(), &Monitor::new()).map(drop)
    };
    through(&whole).unwrap();
    assert!(std::fs::read(dir.path().join("out")).unwrap() == sample(1 << 20));
    // The first grain, the second one, the markers of the directory and the footer (the end holds: table of four
    // sectors, directory of one, footer of one, each behind its marker, and the end-of-stream marker).
    let size = u32::from_le_bytes(whole[65_536 + 8..][..4].try_into().unwrap()) as usize;
    let second = 65_536 + (12 + size).next_multiple_of(512);
    for at in [65_536, second, whole.len() - 5 * 512, whole.len() - 3 * 512] {
        let mut file = whole.clone();
        file[at..at + 512].fill(0);
        assert_eq!(through(&file).unwrap_err().kind(), Kind::Corrupt, "{at}");
    }
}

#[test]
fn a_sparse_extent_has_one_place() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "e.vmdk", "vmdk", "monolithicSparse", &sample(65_536));
    descriptor(dir.path(), "d.vmdk", "RW 128 SPARSE \"e.vmdk\"\nRW 128 SPARSE \"e.vmdk\"");
    let error = open(&dir.path().join("d.vmdk")).err().unwrap();
    assert!(error.kind() == Kind::Corrupt && error.to_string().contains("twice"), "{error}");
}

#[test]
fn extents_without_their_descriptor_are_told() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), "d.vmdk", "vmdk", "twoGbMaxExtentSparse", &sample(65_536));
    assert_eq!(open(&dir.path().join("d.vmdk")).unwrap().warnings(), Vec::<String>::new());
    let image = open(&dir.path().join("d-s001.vmdk")).unwrap();
    assert!(content(&image) == sample(65_536));
    assert_eq!(image.warnings().len(), 1);
    assert!(image.warnings()[0].contains("without its descriptor"), "{:?}", image.warnings());
}

#[test]
fn a_grain_table_of_zeros_has_a_copy() {
    let dir = tempfile::tempdir().unwrap();
    // Three grain tables, the second of which has no grain: its copy is all zeros too.
    let mut bytes = sample(70 << 20);
    bytes[32 << 20..64 << 20].fill(0);
    make(dir.path(), "a.vmdk", "vmdk", "monolithicSparse", &bytes);
    let path = dir.path().join("a.vmdk");
    let mut file = std::fs::read(&path).unwrap();
    let directory = u64::from_le_bytes(file[56..64].try_into().unwrap()) as usize * 512;
    for table in [0, 2] {
        let entry = file[directory + 4 * table..][..4].try_into().unwrap();
        let at = u32::from_le_bytes(entry) as usize * 512;
        assert!(file[at..at + 4] != [0; 4]);
        file[at..at + 2048].fill(0);
    }
    std::fs::write(&path, file).unwrap();
    let image = open(&path).unwrap();
    assert!(content(&image) == bytes);
    assert_eq!(image.warnings().len(), 1, "{:?}", image.warnings());
}

#[test]
fn sizes_that_are_no_sectors_are_rounded_up() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = sample(65_536 + 1000);
    let mut expected = bytes.clone();
    expected.resize(65_536 + 1024, 0);
    for subformat in [
        "monolithicSparse",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "streamOptimized",
    ] {
        make(dir.path(), "a.vmdk", "vmdk", subformat, &bytes);
        let image = open(&dir.path().join("a.vmdk")).unwrap();
        assert_eq!(image.warnings(), Vec::<String>::new(), "{subformat}");
        assert!(content(&image) == expected, "{subformat}: {}", image.size());
    }
    // From a pipe, whose size is not known beforehand.
    let mut format = TargetFormat::named("vmdk").unwrap();
    format.set("subformat", "streamOptimized").unwrap();
    let options = ConvertOptions { format, ..ConvertOptions::default() };
    let pipe = PipeReader::new(std::fs::File::open(dir.path().join("a.raw")).unwrap().into());
    convert(Input::Stream(pipe), dir.path().join("p.vmdk").into(), &options, &Monitor::new()).unwrap();
    let image = open(&dir.path().join("p.vmdk")).unwrap();
    assert_eq!(image.warnings(), Vec::<String>::new());
    assert!(content(&image) == expected);
    make(dir.path(), "a.ova", "ova", "", &bytes);
    assert!(content(&open(&dir.path().join("a.ova")).unwrap()) == expected);
    let ova = std::fs::read(dir.path().join("a.ova")).unwrap();
    let text = String::from_utf8_lossy(&ova[..8192]);
    assert!(text.contains("ovf:capacity=\"66560\""), "{text}");
}
