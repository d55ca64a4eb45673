//! Packs and unpacks the units of a disk image with several codec libraries on one thread, and prints a Markdown table:
//!
//! ```console
//! $ cargo run --release -- IMAGE.raw [MiB [UNIT_KIB [NAME...]]]
//! $ cargo run --release --features zstd-rust -- IMAGE.raw 256 64 zstd
//! ```
//!
//! The units are spread evenly over the image; those that are all zeros are left out. A unit that does not get smaller
//! counts with its own size, as qcow2 stores it. Each figure is the best of three passes.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use structured_zstd::decoding::FrameDecoder;
use structured_zstd::encoding::{CompressionLevel, FrameCompressor};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// One library at one level.
struct Candidate {
    name: String,
    /// Packs a unit; false if it did not get smaller.
    pack: Box<dyn FnMut(&[u8], &mut Vec<u8>) -> bool>,
    /// Unpacks a payload into a unit.
    unpack: Box<dyn FnMut(&[u8], &mut [u8]) -> bool>,
}

impl Candidate {
    fn new(
        name: String,
        pack: impl FnMut(&[u8], &mut Vec<u8>) -> bool + 'static,
        unpack: impl FnMut(&[u8], &mut [u8]) -> bool + 'static,
    ) -> Self {
        Self { name, pack: Box::new(pack), unpack: Box::new(unpack) }
    }
}

fn libdeflate(level: i32) -> Result<Candidate> {
    let level_name = libdeflater::CompressionLvl::new(level).map_err(|_| "no such level")?;
    let mut packer = libdeflater::Compressor::new(level_name);
    let mut unpacker = libdeflater::Decompressor::new();
    Ok(Candidate::new(
        format!("libdeflate {level}"),
        move |unit, out| {
            out.resize(unit.len() - 1, 0);
            packer.deflate_compress(unit, out).map(|len| out.truncate(len)).is_ok()
        },
        move |packed, unit| unpacker.deflate_decompress(packed, unit) == Ok(unit.len()),
    ))
}

/// zlib-rs, with windows of 2^`bits` bytes.
fn zlib_rs(level: u32, bits: u8) -> Candidate {
    let mut packer = Compress::new_with_window_bits(Compression::new(level), false, bits);
    let mut unpacker = Decompress::new(false);
    Candidate::new(
        format!("zlib-rs {level}, window 2^{bits}"),
        move |unit, out| {
            packer.reset();
            out.resize(unit.len() - 1, 0);
            let done = packer.compress(unit, out, FlushCompress::Finish);
            out.truncate(packer.total_out() as usize);
            matches!(done, Ok(Status::StreamEnd))
        },
        move |packed, unit| {
            unpacker.reset(false);
            unpacker.decompress(packed, unit, FlushDecompress::Finish).is_ok()
                && unpacker.total_out() == unit.len() as u64
        },
    )
}

fn zstd(level: i32) -> Candidate {
    let mut packer = zstd_safe::CCtx::create();
    let mut unpacker = zstd_safe::DCtx::create();
    let back_end = if cfg!(feature = "zstd-rust") { "libzstd-rs-sys" } else { "C" };
    Candidate::new(
        format!("zstd {level}, {back_end}"),
        move |unit, out| {
            out.resize(unit.len() - 1, 0);
            packer.compress(&mut out[..], unit, level).map(|len| out.truncate(len)).is_ok()
        },
        move |packed, unit| unpacker.decompress(unit, packed).is_ok(),
    )
}

fn structured_zstd(level: i32) -> Candidate {
    let mut packer: FrameCompressor = FrameCompressor::new(CompressionLevel::from_level(level));
    let mut unpacker = FrameDecoder::new();
    Candidate::new(
        format!("structured-zstd {level}"),
        move |unit, out| {
            out.clear();
            packer.compress_independent_frame_into(unit, out);
            out.len() < unit.len()
        },
        move |packed, unit| unpacker.decode_all(packed, unit).is_ok(),
    )
}

#[cfg(feature = "isal")]
fn isal(name: &str, level: isal::CompressionLevel) -> Candidate {
    use isal::Codec;
    Candidate::new(
        format!("ISA-L {name}"),
        move |unit, out| {
            out.resize(unit.len() + unit.len() / 8 + 1024, 0);
            let done = isal::compress_into(unit, out, level, Codec::Deflate);
            done.is_ok_and(|len| {
                out.truncate(len);
                len < unit.len()
            })
        },
        |packed, unit| isal::decompress_into(packed, unit, Codec::Deflate).is_ok(),
    )
}

fn candidates() -> Result<Vec<Candidate>> {
    let mut all = Vec::new();
    for level in 1..=9 {
        all.push(libdeflate(level)?);
    }
    for level in 1..=6 {
        all.push(zlib_rs(level, 15));
    }
    // What QEMU uses: level 6 of zlib with a window of 4 KiB.
    all.push(zlib_rs(6, 12));
    #[cfg(feature = "isal")]
    all.extend([
        isal("0", isal::CompressionLevel::Zero),
        isal("1", isal::CompressionLevel::One),
        isal("3", isal::CompressionLevel::Three),
    ]);
    all.extend([-5, -3, -1, 1, 2, 3, 4, 6, 9].map(zstd));
    all.extend([-1, 1, 3, 9].map(structured_zstd));
    Ok(all)
}

fn units(path: &str, bytes: usize, unit: usize) -> Result<Vec<Vec<u8>>> {
    let file = File::open(path)?;
    let total = file.metadata()?.len() as usize / unit;
    let step = (total / (bytes / unit).max(1)).max(1);
    let mut units = Vec::new();
    for index in (0..total).step_by(step) {
        let mut bytes = vec![0; unit];
        file.read_exact_at(&mut bytes, (index * unit) as u64)?;
        if bytes.iter().any(|&byte| byte != 0) {
            units.push(bytes);
        }
    }
    Ok(units)
}

fn best(mut pass: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let start = Instant::now();
        pass()?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}

fn measure(candidate: &mut Candidate, units: &[Vec<u8>]) -> Result<()> {
    let total: usize = units.iter().map(Vec::len).sum();
    let mut packed: Vec<Option<Vec<u8>>> = Vec::new();
    let mut room = Vec::new();
    let pack = best(|| {
        packed.clear();
        for unit in units {
            packed.push((candidate.pack)(unit, &mut room).then(|| room.clone()));
        }
        Ok(())
    })?;
    let mut back = vec![0; units.first().map_or(0, Vec::len)];
    let unpack = best(|| {
        for payload in packed.iter().flatten() {
            if !(candidate.unpack)(payload, &mut back) {
                return Err(format!("{} cannot unpack", candidate.name).into());
            }
        }
        Ok(())
    })?;
    let stored: usize = units.iter().zip(&packed).map(|(unit, p)| p.as_ref().unwrap_or(unit).len()).sum();
    let unpacked: usize = units.iter().zip(&packed).filter(|(_, p)| p.is_some()).map(|(u, _)| u.len()).sum();
    let speed = |bytes: usize, time: Duration| bytes as f64 / 1e6 / time.as_secs_f64();
    println!(
        "| {} | {:.0} | {:.3} | {:.0} |",
        candidate.name,
        speed(total, pack),
        total as f64 / stored as f64,
        speed(unpacked, unpack),
    );
    Ok(())
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: diskmill-codec-bench IMAGE.raw [MiB [UNIT_KIB [NAME...]]]")?;
    let mib: usize = args.next().map_or(Ok(128), |text| text.parse())?;
    let unit: usize = args.next().map_or(Ok(64), |text| text.parse())?;
    let names: Vec<String> = args.collect();
    let units = units(&path, mib << 20, unit << 10)?;
    println!("{} units of {unit} KiB\n", units.len());
    println!("| codec | pack MB/s | ratio | unpack MB/s |\n|---|--:|--:|--:|");
    for candidate in &mut candidates()? {
        if names.is_empty() || names.iter().any(|name| candidate.name.contains(name.as_str())) {
            measure(candidate, &units)?;
        }
    }
    Ok(())
}
