//! VMDKs of every kind read as the same bytes that went in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod archives;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use diskmill::{Allow, Error, Image, Kind, OpenOptions, OpenPolicy};
use diskmill_testkit::content::sample;
use sha2::{Digest, Sha256};

fn own_tree() -> OpenOptions {
    OpenOptions { policy: OpenPolicy { allow: Allow::OwnTree, paths: Vec::new() }, ..OpenOptions::default() }
}

fn open(path: &Path) -> Result<Image, Error> {
    Image::open(path, &own_tree())
}

/// All guest bytes.
fn content(image: &Image) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0xaa; image.size() as usize];
    image.reader().read_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn sha256(image: &Image) -> Result<String, Error> {
    let mut digest = Sha256::new();
    let mut reader = image.reader();
    let mut buf = vec![0; 4 << 20];
    let mut at = 0;
    while at < image.size() {
        let len = (image.size() - at).min(buf.len() as u64) as usize;
        reader.read_at(&mut buf[..len], at)?;
        digest.update(&buf[..len]);
        at += len as u64;
    }
    let mut hex = String::new();
    for byte in digest.finalize() {
        write!(hex, "{byte:02x}").unwrap();
    }
    Ok(hex)
}

fn qemu_img(args: &[&str]) -> bool {
    let Ok(output) = Command::new("qemu-img").args(args).output() else {
        eprintln!("SKIPPED: qemu-img is not installed");
        return false;
    };
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
    true
}

fn corpus() -> Option<PathBuf> {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus");
    let folder = std::env::var_os("DISKMILL_CORPUS").map_or(beside, PathBuf::from);
    if !folder.join("manifest.tsv").exists() {
        eprintln!("SKIPPED: no corpus at {} (set DISKMILL_CORPUS)", folder.display());
        return None;
    }
    Some(folder)
}

#[test]
fn images_of_other_writers() {
    let Some(folder) = corpus() else { return };
    let manifest = std::fs::read_to_string(folder.join("manifest.tsv")).unwrap();
    let mut seen = 0;
    for line in manifest.lines().filter(|line| !line.starts_with('#')) {
        let columns: Vec<&str> = line.split('\t').collect();
        let (name, expect, sha, size) = (columns[0], columns[1], columns[2], columns[3]);
        if !name.ends_with(".vmdk") && !name.ends_with(".ova") {
            continue;
        }
        seen += 1;
        let image = open(&folder.join(name));
        match expect {
            "ok" => {
                let image = image.unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(image.size().to_string(), size, "{name}");
                assert_eq!(sha256(&image).unwrap(), sha, "{name}");
                println!("{name}: {:?}", image.warnings());
            }
            "refuse" => println!("{name}: {}", image.err().expect(name)),
            _ => match image {
                Ok(image) => {
                    println!("{name}: {} bytes, {:?} {:?}", image.size(), image.warnings(), sha256(&image))
                }
                Err(error) => println!("{name}: {error}"),
            },
        }
    }
    assert!(seen > 0, "no VMDK in the corpus");
}

#[test]
fn every_kind_that_qemu_writes() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("a.raw");
    // An odd number of sectors: the last grain is a partial one.
    let bytes = sample(5 * 1024 * 1024 + 1536);
    std::fs::write(&raw, &bytes).unwrap();
    for (kind, more) in [
        ("monolithicSparse", ""),
        ("monolithicSparse", ",zeroed_grain=on"),
        ("monolithicFlat", ""),
        ("twoGbMaxExtentSparse", ""),
        ("twoGbMaxExtentFlat", ""),
        ("streamOptimized", ""),
    ] {
        let vmdk = dir.path().join(format!("{kind}{}.vmdk", more.len()));
        let options = format!("subformat={kind}{more}");
        if !qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "vmdk",
            "-o",
            &options,
            raw.to_str().unwrap(),
            vmdk.to_str().unwrap(),
        ]) {
            return;
        }
        let image = open(&vmdk).unwrap();
        assert_eq!(image.warnings(), Vec::<String>::new(), "{kind}");
        assert!(content(&image).unwrap() == bytes, "{kind}{more}");
        let mut reader = image.reader();
        for (at, len) in [(65_535usize, 2usize), (bytes.len() - 700, 700), (70_000, 200_000)] {
            let mut part = vec![0; len];
            reader.read_at(&mut part, at as u64).unwrap();
            assert!(part == bytes[at..at + len], "{kind} {at}");
        }
    }
}

#[test]
fn deltas_and_their_parents() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("a.raw"), sample(3 << 20)).unwrap();
    if !qemu_img(&["convert", "-O", "vmdk", &path("a.raw"), &path("base.vmdk")]) {
        return;
    }
    qemu_img(&["create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", &path("delta.vmdk")]);
    let image = open(Path::new(&path("delta.vmdk"))).unwrap();
    assert_eq!(image.chain().len(), 2);
    assert!(content(&image).unwrap() == sample(3 << 20));

    // The library opens no other file unless it is told to.
    let denied = Image::open(path("delta.vmdk"), &OpenOptions::default()).err().unwrap();
    assert_eq!(denied.kind(), Kind::Denied);

    // A parent that was changed since: another CID.
    let mut base = std::fs::read(path("base.vmdk")).unwrap();
    let at = base.windows(4).position(|window| window == b"CID=").unwrap();
    base[at + 4] = if base[at + 4] == b'1' { b'2' } else { b'1' };
    std::fs::write(path("base.vmdk"), base).unwrap();
    let error = open(Path::new(&path("delta.vmdk"))).err().unwrap();
    assert!(error.to_string().contains("--ignore-cid"), "{error}");
    let options = OpenOptions { ignore_cid: true, ..own_tree() };
    assert!(content(&Image::open(path("delta.vmdk"), &options).unwrap()).unwrap() == sample(3 << 20));
}

fn descriptor(dir: &Path, extents: &str) -> PathBuf {
    let path = dir.join("d.vmdk");
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"custom\"\n{extents}\n"
    );
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn no_extent_is_left_out_or_moved() {
    let dir = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..8192u32).map(|at| (at / 512) as u8 + 1).collect();
    std::fs::write(dir.path().join("flat.bin"), &data).unwrap();
    let lines = "RW 2 FLAT \"flat.bin\" 4\nRW 3 ZERO\nRDONLY 1 FLAT \"flat.bin\" 0\r\nNOACCESS 2 FLAT \"secret\" 0\nrw 1 VMFS \"flat.bin\" 15";
    let image = open(&descriptor(dir.path(), lines)).unwrap();
    let expected = [&data[2048..3072], &[0; 1536], &data[..512], &[0; 1024], &data[7680..]].concat();
    assert_eq!(image.size() as usize, expected.len());
    assert!(content(&image).unwrap() == expected);
    assert_eq!(image.warnings().len(), 1, "{:?}", image.warnings());

    // A flat file that is too short is damage, not zeros.
    let image = open(&descriptor(dir.path(), "RW 2 FLAT \"flat.bin\" 15")).unwrap();
    let error = content(&image).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.to_string().contains("flat.bin"), "{error}");
}

#[test]
fn nothing_outside_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let inside = dir.path().join("in");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(dir.path().join("secret"), [7; 4096]).unwrap();
    std::os::unix::fs::symlink(dir.path().join("secret"), inside.join("link")).unwrap();
    let absolute = dir.path().join("secret");
    for name in ["../secret", absolute.to_str().unwrap(), "link", "/dev/zero", "/etc/passwd"] {
        for kind in ["FLAT", "SPARSE", "VMFS"] {
            let vmdk = descriptor(&inside, &format!("RW 8 {kind} \"{name}\""));
            let error = open(&vmdk).err().unwrap_or_else(|| panic!("{name} was opened"));
            assert_eq!(error.kind(), Kind::Denied, "{error}");
            assert!(error.to_string().contains("--allow-path"), "{error}");
        }
    }
    let vmdk = descriptor(&inside, "RW 8 FLAT \"../secret\" 0");
    let policy = OpenPolicy { allow: Allow::OwnTree, paths: vec![dir.path().to_owned()] };
    let image = Image::open(&vmdk, &OpenOptions { policy, ..OpenOptions::default() }).unwrap();
    assert_eq!(content(&image).unwrap(), [7; 4096]);
    // Device files stay refused even where every path is allowed.
    let policy = OpenPolicy { allow: Allow::Anything, paths: Vec::new() };
    let vmdk = descriptor(&inside, "RW 8 FLAT \"/dev/zero\" 0");
    assert!(Image::open(&vmdk, &OpenOptions { policy, ..OpenOptions::default() }).is_err());
    // Looking at the metadata opens nothing.
    let options = OpenOptions { metadata_only: true, ..own_tree() };
    assert_eq!(Image::open(descriptor(&inside, "RW 8 FLAT \"/dev/zero\" 0"), &options).unwrap().size(), 4096);
}

#[test]
fn the_redundant_directory_saves_a_damaged_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let bytes = sample(40 << 20);
    std::fs::write(path("a.raw"), &bytes).unwrap();
    if !qemu_img(&["convert", "-O", "vmdk", &path("a.raw"), &path("a.vmdk")]) {
        return;
    }
    let whole = std::fs::read(path("a.vmdk")).unwrap();
    let gd = u64::from_le_bytes(whole[56..64].try_into().unwrap()) as usize * 512;
    let damage = |at: usize, with: &[u8]| {
        let mut file = whole.clone();
        file[at..at + with.len()].copy_from_slice(with);
        std::fs::write(path("b.vmdk"), file).unwrap();
        let image = open(Path::new(&path("b.vmdk"))).unwrap();
        assert!(content(&image).unwrap() == bytes, "{at}");
        assert_eq!(image.warnings().len(), 1, "{:?}", image.warnings());
    };
    damage(gd, &[0xff; 8]);
    damage(gd, &[0; 8]);
    damage(56, &(1u64 << 40).to_le_bytes());
    // A grain table of the primary directory.
    let table = u32::from_le_bytes(whole[gd..gd + 4].try_into().unwrap()) as usize * 512;
    damage(table, &[0xff; 512]);
}

#[test]
fn truncation_is_told_and_never_read_as_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let bytes = sample(4 << 20);
    std::fs::write(path("a.raw"), &bytes).unwrap();
    for kind in ["monolithicSparse", "streamOptimized"] {
        let options = format!("subformat={kind}");
        if !qemu_img(&["convert", "-O", "vmdk", "-o", &options, &path("a.raw"), &path("a.vmdk")]) {
            return;
        }
        let whole = std::fs::read(path("a.vmdk")).unwrap();
        for keep in [100, 512, 4096, 80_000, whole.len() / 2, whole.len() - 70_000] {
            std::fs::write(path("b.vmdk"), &whole[..keep]).unwrap();
            let result = open(Path::new(&path("b.vmdk"))).and_then(|image| content(&image));
            assert!(result.is_err(), "{kind} cut to {keep} bytes");
        }
    }
}

fn sparse_files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    std::fs::write(path("a.raw"), sample(1 << 20)).unwrap();
    let mut files = vec![("seSparse".to_owned(), sesparse().0)];
    for kind in ["monolithicSparse", "streamOptimized"] {
        let options = format!("subformat={kind}");
        if qemu_img(&["convert", "-O", "vmdk", "-o", &options, &path("a.raw"), &path("a.vmdk")]) {
            files.push((kind.to_owned(), std::fs::read(path("a.vmdk")).unwrap()));
        }
        let mut format = diskmill::convert::TargetFormat::named("vmdk").unwrap();
        format.set("subformat", kind).unwrap();
        let options = diskmill::convert::ConvertOptions { format, ..Default::default() };
        let image = Image::open(path("a.raw"), &OpenOptions::default()).unwrap();
        let out = PathBuf::from(path("b.vmdk")).into();
        diskmill::convert::convert(&[image], out, &options, &diskmill::convert::Monitor::new()).unwrap();
        files.push((format!("own {kind}"), std::fs::read(path("b.vmdk")).unwrap()));
    }
    files
}

/// Damage of every kind ends in an error or in other bytes; never in a panic, an endless loop or another size.
#[test]
fn damage_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = 1u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for (kind, whole) in sparse_files(dir.path()) {
        // Headers, tables, markers: where structures are.
        let front = whole.len().min(80_000);
        for _ in 0..300 {
            let mut file = whole.clone();
            for _ in 0..1 + random(3) {
                let at = match random(3) {
                    0 => random(512),
                    1 => random(front),
                    _ => whole.len() - 1 - random(whole.len().min(4096)),
                };
                let value = [0, 1, 0x7f, 0x80, 0xff, file[at] ^ 1][random(6)];
                let len = [1, 2, 4, 8][random(4)].min(file.len() - at);
                file[at..at + len].fill(value);
            }
            if random(8) == 0 {
                file.truncate(random(file.len()));
            }
            let storage = std::sync::Arc::new(diskmill_io::MemoryStorage::with_bytes(file, 0));
            let options = OpenOptions { format: Some(diskmill::Format::Vmdk), ..OpenOptions::default() };
            let Ok(image) = Image::from_storage(storage, "x.vmdk", &options) else { continue };
            let mut at = 0;
            while at < image.size().min(8 << 20) {
                match image.map(at, u64::MAX) {
                    Ok(extent) => {
                        assert!(
                            extent.guest.start == at
                                && extent.guest.end > at
                                && extent.guest.end <= image.size(),
                            "{kind}"
                        );
                        at = extent.guest.end;
                    }
                    Err(error) => {
                        assert!(error.len > 0, "{kind}: {}", error.error);
                        at += error.len;
                    }
                }
            }
            let mut part = vec![0; image.size().min(2 << 20) as usize];
            let _ = image.reader().read_at(&mut part, 0);
        }
    }
}

/// A seSparse extent of 64 MiB, and the guest bytes that are not zeros.
fn sesparse() -> (Vec<u8>, Vec<(usize, u8)>) {
    use diskmill_format::vmdk::sesparse::Area;
    use diskmill_format::vmdk::{SeSparseHeader, SeSparseVolatileHeader};
    let area = |offset, sectors| Area { offset, sectors };
    let header = SeSparseHeader {
        capacity: 131_072,
        volatile_header: area(1, 1),
        journal_header: area(2, 2),
        journal: area(4, 4),
        grain_directory: area(8, 8),
        grain_tables: area(16, 4 * 64),
        free_bitmap: area(272, 8),
        backmap: area(280, 8),
        grains: area(288, 64),
    };
    let mut file = vec![0; (288 + 64) * 512];
    file[..512].copy_from_slice(&header.encode());
    let volatile = SeSparseVolatileHeader { free_table: 2, next_transaction: 1, replay_journal: 0 };
    file[512..1024].copy_from_slice(&volatile.encode());
    let mut put = |at: usize, value: u64| file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    // The second table of the disk is table 1 of the file; the third is not there.
    put(8 * 512, 0x1000_0000_0000_0000);
    put(8 * 512 + 8, 0x1000_0000_0000_0001);
    let table = |number: usize| 16 * 512 + number * 64 * 512;
    let grain = |number: u64| 3 << 60 | (number & 0xfff) << 48 | number >> 12;
    put(table(0), grain(2));
    put(table(0) + 8, grain(3));
    put(table(0) + 16, 1 << 60);
    put(table(0) + 24, 2 << 60);
    put(table(1) + 8 * 4095, grain(0));
    for number in 0..4u8 {
        let at = 288 * 512 + usize::from(number) * 4096;
        file[at..at + 4096].fill(number + 1);
    }
    (file, vec![(0, 3), (4096, 4), (8191 * 4096, 1)])
}

#[test]
fn sesparse_extents() {
    let dir = tempfile::tempdir().unwrap();
    let (file, grains) = sesparse();
    std::fs::write(dir.path().join("d-sesparse.vmdk"), &file).unwrap();
    let image = open(&descriptor(dir.path(), "RW 131072 SESPARSE \"d-sesparse.vmdk\"")).unwrap();
    let mut expected = vec![0; 64 << 20];
    for (at, byte) in grains {
        expected[at..at + 4096].fill(byte);
    }
    assert!(content(&image).unwrap() == expected);
    assert!(content(&open(&dir.path().join("d-sesparse.vmdk")).unwrap()).unwrap() == expected);

    let mut dirty = file;
    dirty[512 + 24] = 1;
    std::fs::write(dir.path().join("d-sesparse.vmdk"), dirty).unwrap();
    let error = open(&dir.path().join("d.vmdk")).err().unwrap();
    assert!(error.kind() == Kind::Unsupported && error.to_string().contains("journal"), "{error}");
}

/// Compressed grains without markers, last grain cut short: what no writer at hand makes.
#[test]
fn compressed_grains_without_markers() {
    use diskmill_format::vmdk::sparse::{FLAG_COMPRESSED, FLAG_NEWLINE_TEST, SparseHeader, encode_table};
    let bytes = sample(3 * 65_536 + 1024);
    let header = SparseHeader {
        flags: FLAG_NEWLINE_TEST | FLAG_COMPRESSED,
        gd_offset: 2,
        descriptor_offset: 0,
        descriptor_sectors: 0,
        ..SparseHeader::stream_optimized(bytes.len() as u64 / 512)
    };
    let mut file = header.encode().to_vec();
    file.resize(128 * 512, 0);
    let mut entries = vec![0u32; 512];
    let mut packer = diskmill_codec::Packer::new(diskmill_codec::Codec::Zlib, 6).unwrap();
    // Not in guest order.
    for number in [2, 0, 3, 1] {
        let grain = &bytes[number * 65_536..bytes.len().min((number + 1) * 65_536)];
        let mut packed = vec![0; 70_000];
        let len = packer.pack(grain, &mut packed).unwrap().unwrap();
        entries[number] = (file.len() / 512) as u32;
        file.extend_from_slice(&packed[..len]);
        file.resize(file.len().next_multiple_of(512), 0);
    }
    file[1024..1028].copy_from_slice(&4u32.to_le_bytes());
    file[2048..4096].copy_from_slice(&encode_table(&entries));
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.vmdk"), &file).unwrap();
    assert!(content(&open(&dir.path().join("a.vmdk")).unwrap()).unwrap() == bytes);
}

#[test]
fn streams_with_something_behind_them_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let Some((_, whole)) =
        sparse_files(dir.path()).into_iter().find(|(kind, _)| kind == "own streamOptimized")
    else {
        return;
    };
    let check = |file: &[u8], warnings: usize| {
        std::fs::write(dir.path().join("c.vmdk"), file).unwrap();
        let image = open(&dir.path().join("c.vmdk")).unwrap();
        assert!(content(&image).unwrap() == sample(1 << 20));
        assert_eq!(image.warnings().len(), warnings, "{:?}", image.warnings());
    };
    check(&whole, 0);
    check(&[&whole[..], &[0; 4096]].concat(), 1);
    check(&whole[..whole.len() - 512], 2);
    std::fs::write(dir.path().join("c.vmdk"), &whole[..whole.len() - 1024]).unwrap();
    assert_eq!(open(&dir.path().join("c.vmdk")).err().unwrap().kind(), Kind::Corrupt);
}

#[test]
fn streams_from_a_pipe() {
    use diskmill::convert::{ConvertOptions, Input, Monitor, TargetFormat, convert};
    use diskmill::vmdk::VmdkStream;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    // A pipe, but for its length, is a file that is read front to back.
    let stream = |file: &Path| {
        let pipe = diskmill::PipeReader::new(std::fs::File::open(file).unwrap().into());
        VmdkStream::new(pipe, &diskmill::Limits::default())
    };
    let through = |file: &Path, format: &str, cluster: Option<&str>| {
        let mut format = TargetFormat::named(format).unwrap();
        if let Some(cluster) = cluster {
            format.set("cluster_size", cluster).unwrap();
        }
        let options = ConvertOptions { format, threads: Some(2), ..ConvertOptions::default() };
        let input = Input::VmdkStream(Box::new(stream(file)?));
        convert(input, path("out").into(), &options, &Monitor::new())?;
        content(&open(&path("out"))?)
    };
    // Grains, gaps and an odd tail over several jobs.
    let mut bytes = sample(9 * (1 << 20) + 1536);
    bytes[2 << 20..5 << 20].fill(0);
    bytes[6 << 20..(6 << 20) + 300_000].fill(0);
    std::fs::write(path("a.raw"), &bytes).unwrap();
    let mut format = TargetFormat::named("vmdk").unwrap();
    format.set("subformat", "streamOptimized").unwrap();
    let options = ConvertOptions { format, ..ConvertOptions::default() };
    let image = Image::open(path("a.raw"), &OpenOptions::default()).unwrap();
    convert(&[image], path("a.vmdk").into(), &options, &Monitor::new()).unwrap();
    assert!(through(&path("a.vmdk"), "raw", None).unwrap() == bytes);
    assert!(through(&path("a.vmdk"), "qcow2", None).unwrap() == bytes);
    assert!(through(&path("a.vmdk"), "qcow2", Some("2M")).unwrap() == bytes);
    if let Some(folder) = corpus() {
        for name in
            ["cot/blank-a.vmdk", "gen-virtualbox-7.2.22/vb_a_Stream.vmdk", "gen-vmdktool-1.4/vt_b.vmdk"]
        {
            let file = folder.join(name);
            let Ok(source) = stream(&file) else { panic!("{name}: {}", stream(&file).err().unwrap()) };
            let size = source.size();
            let options = ConvertOptions::default();
            convert(Input::VmdkStream(Box::new(source)), path("out").into(), &options, &Monitor::new())
                .unwrap();
            let options = OpenOptions { format: Some(diskmill::Format::Raw), ..OpenOptions::default() };
            let out = Image::open(path("out"), &options).unwrap();
            assert_eq!(out.size(), size);
            assert_eq!(sha256(&out).unwrap(), sha256(&open(&file).unwrap()).unwrap(), "{name}");
        }
    }
    // Cut off anywhere, it is an error; nothing is published.
    let whole = std::fs::read(path("a.vmdk")).unwrap();
    for keep in [0, 300, 512, 65_536, 100_000, whole.len() - 512, whole.len() - 1536] {
        std::fs::write(path("cut.vmdk"), &whole[..keep]).unwrap();
        std::fs::remove_file(path("out")).ok();
        assert!(through(&path("cut.vmdk"), "raw", None).is_err(), "{keep}");
        assert!(!path("out").exists(), "{keep}");
    }
}

#[test]
fn names_of_other_systems() {
    let dir = tempfile::tempdir().unwrap();
    let text = |hint: &str, cid: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nencoding=\"windows-1252\"\nCID=2\nparentCID={cid}\n{hint}createType=\"custom\"\n"
        )
    };
    // An umlaut in windows-1252, for a file whose name is in UTF-8.
    std::fs::write(dir.path().join("größe.bin"), [5; 512]).unwrap();
    let mut bytes = text("", "ffffffff").into_bytes();
    bytes.extend_from_slice(b"RW 1 FLAT \"gr\xf6\xdfe.bin\" 0\n");
    std::fs::write(dir.path().join("base.vmdk"), bytes).unwrap();
    assert_eq!(content(&open(&dir.path().join("base.vmdk")).unwrap()).unwrap(), [5; 512]);

    // Parents by absolute names of the system where they were made: the file beside is meant.
    let header = {
        use diskmill_format::vmdk::sparse::{SparseLayout, encode_table};
        let layout = SparseLayout::new(1, 0, false, &diskmill::Limits::default()).unwrap();
        let mut file = vec![0; layout.header.overhead as usize * 512];
        file[..512].copy_from_slice(&layout.header.encode());
        for (at, first) in
            [(layout.header.gd_offset, layout.tables), (layout.header.rgd_offset, layout.redundant_tables)]
        {
            file[at as usize * 512..][..512].copy_from_slice(&encode_table(&[first]));
        }
        file
    };
    std::fs::write(dir.path().join("delta-s001.vmdk"), header).unwrap();
    for hint in ["/vmfs/volumes/4711/vm/base.vmdk", "C:\\VMs\\vm\\base.vmdk", "base.vmdk", "./base.vmdk"] {
        let delta =
            text(&format!("parentFileNameHint=\"{hint}\"\n"), "2") + "RW 1 SPARSE \"delta-s001.vmdk\"\n";
        std::fs::write(dir.path().join("delta.vmdk"), delta).unwrap();
        let image = open(&dir.path().join("delta.vmdk")).unwrap_or_else(|error| panic!("{hint}: {error}"));
        assert_eq!(content(&image).unwrap(), [5; 512], "{hint}");
    }
    // One that is there, outside, is named and refused.
    let delta = text("parentFileNameHint=\"/etc/passwd\"\n", "2") + "RW 1 SPARSE \"delta-s001.vmdk\"\n";
    std::fs::write(dir.path().join("delta.vmdk"), delta).unwrap();
    assert_eq!(open(&dir.path().join("delta.vmdk")).err().unwrap().kind(), Kind::Denied);
    // Without a name there is no telling.
    std::fs::write(dir.path().join("delta.vmdk"), text("", "2") + "RW 1 SPARSE \"delta-s001.vmdk\"\n")
        .unwrap();
    assert_eq!(open(&dir.path().join("delta.vmdk")).err().unwrap().kind(), Kind::Corrupt);
    // A parent that is its own child.
    let delta = text("parentFileNameHint=\"delta.vmdk\"\n", "2") + "RW 1 SPARSE \"delta-s001.vmdk\"\n";
    std::fs::write(dir.path().join("delta.vmdk"), delta).unwrap();
    assert_eq!(open(&dir.path().join("delta.vmdk")).err().unwrap().kind(), Kind::Corrupt);
}
