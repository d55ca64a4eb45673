//! Any small disk through the converter: raw → qcow2 with any options → qcow2 with others, and read back.
#![no_main]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use arbitrary::Arbitrary;
use diskmill::convert::{Compression, ConvertOptions, Monitor, TargetFormat, convert};
use diskmill::qcow2::{Compat, Preallocation, Qcow2Options};
use diskmill::{Allow, EngineChoice, Error, Format, Image, Kind, OpenOptions, OpenPolicy};
use diskmill_format::qcow2::CompressionType;
use diskmill_io::MemoryStorage;
use libfuzzer_sys::fuzz_target;

/// Largest disk in bytes: several clusters of the usual sizes, and part of one of the largest.
const LARGEST: usize = 192 << 10;

#[derive(Debug, Arbitrary)]
struct Input {
    /// Size of the disk in steps of 64 bytes, so that most are not whole sectors.
    size: u16,
    runs: Vec<Run>,
    backing: Option<(u16, Vec<Run>)>,
    first: Options,
    second: Options,
    to_raw: bool,
}

#[derive(Debug, Arbitrary)]
struct Run {
    /// In steps of 64 bytes, modulo the disk's size.
    at: u16,
    len: u16,
    fill: Fill,
}

#[derive(Debug, Arbitrary)]
enum Fill {
    Zero,
    Byte(u8),
    /// Cannot be packed.
    Noise(u32),
    Bytes([u8; 8]),
}

#[derive(Debug, Arbitrary)]
struct Options {
    v2: bool,
    cluster_bits: u8,
    refcount_order: u8,
    preallocation: u8,
    lazy_refcounts: bool,
    extended_l2: bool,
    data_file: bool,
    data_file_raw: bool,
    zstd: bool,
    compress: Option<Option<i8>>,
    /// log2 of `-S`; 0 for none.
    sparse: u8,
    threads: u8,
    memory_bits: u8,
    /// Leave contradictions in.
    careless: bool,
}

impl Options {
    fn convert(&self, name: &str, backing: bool) -> ConvertOptions {
        let mut compress = self.compress.map(|level| Compression { level: level.map(i32::from) });
        let mut qcow2 = Qcow2Options {
            compat: if self.v2 { Compat::V2 } else { Compat::V3 },
            cluster_size: Some(1 << (9 + self.cluster_bits % 13)),
            refcount_bits: 1 << (self.refcount_order % 7),
            preallocation: [
                Preallocation::Off,
                Preallocation::Metadata,
                Preallocation::Falloc,
                Preallocation::Full,
            ][usize::from(self.preallocation % 4)],
            lazy_refcounts: self.lazy_refcounts,
            extended_l2: self.extended_l2,
            data_file: self.data_file.then(|| format!("{name}.data")),
            data_file_raw: self.data_file && self.data_file_raw,
            compression: if self.zstd { CompressionType::Zstd } else { CompressionType::Zlib },
            backing_file: backing.then(|| "base".to_owned()),
            backing_format: backing.then(|| "raw".to_owned()),
            encryption: None,
        };
        // Most contradictions are refused at once: without this few inputs would get further.
        if !self.careless {
            if let Some(Compression { level: Some(level) }) = &mut compress {
                *level = level.rem_euclid(12) + 1;
            }
            if compress.is_some() {
                (qcow2.preallocation, qcow2.data_file, qcow2.data_file_raw) =
                    (Preallocation::Off, None, false);
            }
            if qcow2.extended_l2 {
                qcow2.cluster_size = qcow2.cluster_size.max(Some(16 << 10));
            } else if backing {
                (qcow2.preallocation, qcow2.data_file_raw) = (Preallocation::Off, false);
            }
            if self.v2 {
                (qcow2.lazy_refcounts, qcow2.refcount_bits, qcow2.extended_l2) = (false, 16, false);
                (qcow2.data_file, qcow2.data_file_raw, qcow2.compression) =
                    (None, false, CompressionType::Zlib);
                if backing {
                    qcow2.preallocation = Preallocation::Off;
                }
            }
        }
        ConvertOptions {
            format: TargetFormat::Qcow2(qcow2),
            compress,
            sparse_size: match self.sparse % 18 {
                0 => 0,
                bits => 1 << bits,
            },
            threads: Some(1 + usize::from(self.threads % 3)),
            // From far too little to more than is wanted.
            memory: 1 << (16 + self.memory_bits % 8),
            engine: EngineChoice::Sync,
            ..ConvertOptions::default()
        }
    }
}

fn disk(size: u16, runs: &[Run]) -> Vec<u8> {
    let mut bytes = vec![0; (usize::from(size) * 64) % (LARGEST + 1)];
    for Run { at, len, fill } in runs.iter().take(64) {
        let at = (usize::from(*at) * 64).checked_rem(bytes.len()).unwrap_or(0);
        let end = (at + usize::from(*len)).min(bytes.len());
        let part = &mut bytes[at..end];
        match fill {
            Fill::Zero => part.fill(0),
            Fill::Byte(byte) => part.fill(*byte),
            Fill::Bytes(pattern) => {
                part.iter_mut().zip(pattern.iter().cycle()).for_each(|(to, from)| *to = *from)
            }
            Fill::Noise(seed) => {
                let mut state = u64::from(*seed) | 1 << 40;
                for byte in part {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    *byte = state as u8;
                }
            }
        }
    }
    bytes
}

fuzz_target!(|input: Input| {
    // Replacing a file by a rename makes ext4 write it out; memory does not.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let mut expected = disk(input.size, &input.runs);
    let source = Arc::new(MemoryStorage::with_bytes(expected.clone(), 0));
    let source = Image::from_storage(
        source,
        "source",
        &OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() },
    );
    let source = [source.expect("any bytes are a raw image")];
    // Disks consist of sectors.
    expected.resize(expected.len().next_multiple_of(512), 0);

    if let Some((size, runs)) = &input.backing {
        fs::write(folder.path().join("base"), disk(*size, runs)).expect("writes");
    }
    let Some(first) = pass(&source, folder.path(), "first", &input.first, input.backing.is_some()) else {
        return;
    };
    assert_holds(&first, &expected, "the first image");
    let first = [first];
    let Some(second) = pass(&first, folder.path(), "second", &input.second, false) else { return };
    assert_holds(&second, &expected, "the second image");
    if input.to_raw {
        let path = folder.path().join("raw");
        let options = ConvertOptions { engine: EngineChoice::Sync, ..ConvertOptions::default() };
        convert(&[second], path.clone().into(), &options, &Monitor::new()).expect("a sound image converts");
        assert!(fs::read(path).expect("reads") == expected, "the raw image differs");
    }
});

/// Converts `source` to a file `name`, and opens it. `None` if the options are refused.
fn pass(source: &[Image], folder: &Path, name: &str, options: &Options, backing: bool) -> Option<Image> {
    let path = folder.join(name);
    let files = || fs::read_dir(folder).expect("lists").count();
    let before = files();
    let wanted = options.convert(name, backing);
    if let Err(error) = run(source, &path, &wanted) {
        assert!(matches!(error.kind(), Kind::Invalid | Kind::Unsupported | Kind::Limit), "{error}");
        assert_eq!(files(), before, "a refused conversion left a file behind");
        return None;
    }
    assert_eq!(files(), before + 1 + usize::from(has_data_file(&wanted)), "files that nobody asked for");

    // The same bytes for any number of threads.
    let content = fs::read(&path).expect("reads");
    let threads = if wanted.threads == Some(1) { 3 } else { 1 };
    let other = ConvertOptions { threads: Some(threads), memory: 8 << 20, ..wanted };
    if let Err(error) = run(source, &path, &other) {
        panic!("refused with {threads} threads only: {error}");
    }
    assert!(fs::read(&path).expect("reads") == content, "other bytes with {threads} threads");

    let policy = OpenPolicy { allow: Allow::OwnTree, ..OpenPolicy::default() };
    let image = Image::open(&path, &OpenOptions { policy, ..OpenOptions::default() });
    Some(image.unwrap_or_else(|error| panic!("the output cannot be opened: {error}")))
}

fn has_data_file(options: &ConvertOptions) -> bool {
    matches!(&options.format, TargetFormat::Qcow2(qcow2) if qcow2.data_file.is_some())
}

fn run(source: &[Image], path: &Path, options: &ConvertOptions) -> Result<(), Error> {
    convert(source, path.into(), options, &Monitor::new()).map(drop)
}

fn assert_holds(image: &Image, expected: &[u8], what: &str) {
    assert_eq!(image.size(), expected.len() as u64, "the size of {what}");
    let mut bytes = vec![0xa5; expected.len()];
    if let Err(error) = image.reader().read_at(&mut bytes, 0) {
        panic!("{what} cannot be read: {error}");
    }
    if let Some(at) = bytes.iter().zip(expected).position(|(got, want)| got != want) {
        panic!("{what} differs at {at}");
    }
}
