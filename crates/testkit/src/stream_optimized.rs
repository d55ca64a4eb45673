//! Walks a streamOptimized VMDK front to back, as an importer that reads a stream does, and checks each rule of VMware's
//! layout. Written from the specification alone ("Stream-Optimized Compressed Sparse Extents" of Virtual Disk Format
//! 5.0): it shares no code with the library that it checks.

use std::collections::BTreeMap;

use flate2::read::ZlibDecoder;
use std::io::Read;

const SECTOR: usize = 512;

/// What a sound stream holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// Guest bytes.
    pub capacity: u64,
    /// The text of the descriptor.
    pub descriptor: String,
    /// Grains in the stream.
    pub grains: usize,
    /// Grain tables in the stream.
    pub tables: usize,
    /// The guest's bytes.
    pub content: Vec<u8>,
}

struct Header {
    capacity: u64,
    grain: u64,
    entries: u64,
    gd_offset: u64,
    overhead: u64,
    descriptor: (u64, u64),
}

/// Checks the stream in `file`.
///
/// # Errors
/// The first rule that it breaks, and where.
pub fn check(file: &[u8]) -> Result<Stream, String> {
    if !file.len().is_multiple_of(SECTOR) {
        return Err(format!("{} bytes are no whole sectors", file.len()));
    }
    let header = header(sector(file, 0)?)?;
    if header.gd_offset != u64::MAX {
        return Err(format!("header: gdOffset {:#x} instead of 2^64-1", header.gd_offset));
    }
    let (first, sectors) = header.descriptor;
    if first == 0 || first + sectors > header.overhead {
        return Err(format!("header: descriptor at {first}+{sectors}, overhead {}", header.overhead));
    }
    let text = range(file, first, sectors)?;
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    let descriptor = String::from_utf8(text.to_vec()).map_err(|error| format!("descriptor: {error}"))?;
    for line in [
        "createType=\"streamOptimized\"",
        "parentCID=ffffffff",
        "ddb.longContentID = ",
        "ddb.virtualHWVersion = ",
        "ddb.toolsInstallType = ",
    ] {
        if !descriptor.lines().any(|found| found.starts_with(line)) {
            return Err(format!("descriptor: no line {line:?}"));
        }
    }
    walk(file, &header, descriptor)
}

fn walk(file: &[u8], header: &Header, descriptor: String) -> Result<Stream, String> {
    let grain_bytes = (header.grain * SECTOR as u64) as usize;
    let mut content = vec![0; (header.capacity * SECTOR as u64) as usize];
    // Sector of each grain since the last table, by grain number; tables by the sector they stand at.
    let mut pending: BTreeMap<u64, u64> = BTreeMap::new();
    let mut tables: BTreeMap<u64, u64> = BTreeMap::new();
    let (mut last, mut grains, mut directory) = (None, 0, None);
    let mut at = header.overhead;
    loop {
        let marker = sector(file, at)?;
        let (value, size, kind) = (u64_at(marker, 0), u32_at(marker, 8), u32_at(marker, 12));
        if size > 0 {
            if directory.is_some() {
                return Err(format!("sector {at}: a grain behind the directory"));
            }
            if value % header.grain != 0 || value >= header.capacity {
                return Err(format!("sector {at}: a grain for guest sector {value}"));
            }
            if last.is_some_and(|last| last >= value) {
                return Err(format!("sector {at}: guest sector {value} does not ascend"));
            }
            last = Some(value);
            let start = at as usize * SECTOR + 12;
            let payload =
                file.get(start..start + size as usize).ok_or(format!("sector {at}: the grain is cut off"))?;
            let mut unpacked = Vec::new();
            let mut decoder = ZlibDecoder::new(payload);
            decoder.read_to_end(&mut unpacked).map_err(|error| format!("sector {at}: {error}"))?;
            if decoder.total_in() != u64::from(size) {
                return Err(format!(
                    "sector {at}: the marker says {size} bytes, the zlib stream has {}",
                    decoder.total_in()
                ));
            }
            if unpacked.len() != grain_bytes {
                return Err(format!("sector {at}: the grain unpacks to {} bytes", unpacked.len()));
            }
            let from = value as usize * SECTOR;
            let to = (from + grain_bytes).min(content.len());
            content[from..to].copy_from_slice(&unpacked[..to - from]);
            if unpacked[to - from..].iter().any(|byte| *byte != 0) {
                return Err(format!("sector {at}: bytes past the end of the disk"));
            }
            let end = (start + size as usize).next_multiple_of(SECTOR);
            if file.get(start + size as usize..end).is_none_or(|pad| pad.iter().any(|byte| *byte != 0)) {
                return Err(format!("sector {at}: the padding of the grain is not zero"));
            }
            pending.insert(value / header.grain, at);
            grains += 1;
            at = (end / SECTOR) as u64;
            continue;
        }
        if marker[16..].iter().any(|byte| *byte != 0) {
            return Err(format!("sector {at}: the marker is not padded with zeros"));
        }
        match kind {
            1 => {
                let entries = entries(range(file, at + 1, value)?);
                if entries.len() as u64 != header.entries {
                    return Err(format!("sector {at}: a grain table of {} entries", entries.len()));
                }
                let Some(first) = pending.keys().next() else {
                    return Err(format!("sector {at}: a grain table without grains"));
                };
                let number = first / header.entries;
                for (index, entry) in (0..).zip(entries) {
                    let expected = pending.remove(&(number * header.entries + index)).unwrap_or(0);
                    if u64::from(entry) != expected {
                        return Err(format!("sector {at}: entry {index} is {entry} instead of {expected}"));
                    }
                }
                if !pending.is_empty() {
                    return Err(format!("sector {at}: grains of another table stand before it"));
                }
                tables.insert(number, at + 1);
                at += 1 + value;
            }
            2 => {
                if !pending.is_empty() {
                    return Err(format!("sector {at}: grains without a table"));
                }
                let entries = entries(range(file, at + 1, value)?);
                for (index, entry) in (0..).zip(&entries) {
                    if u64::from(*entry) != tables.get(&index).copied().unwrap_or(0) {
                        return Err(format!("sector {at}: directory entry {index} is {entry}"));
                    }
                }
                let wanted = header.capacity.div_ceil(header.grain * header.entries);
                if (entries.len() as u64) < wanted {
                    return Err(format!(
                        "sector {at}: {} directory entries instead of {wanted}",
                        entries.len()
                    ));
                }
                directory = Some(at + 1);
                at += 1 + value;
            }
            3 => {
                check_footer(file, at, value, directory)?;
                return Ok(Stream {
                    capacity: header.capacity * SECTOR as u64,
                    descriptor,
                    grains,
                    tables: tables.len(),
                    content,
                });
            }
            0 => return Err(format!("sector {at}: the stream ends without a footer")),
            kind => return Err(format!("sector {at}: a marker of type {kind}")),
        }
    }
}

fn check_footer(file: &[u8], at: u64, sectors: u64, directory: Option<u64>) -> Result<(), String> {
    if sectors != 1 {
        return Err(format!("sector {at}: a footer of {sectors} sectors"));
    }
    let footer = sector(file, at + 1)?;
    let mut copy = footer.to_vec();
    copy[56..64].fill(0xff);
    if copy != sector(file, 0)? {
        return Err("the footer differs from the header in more than gdOffset".to_owned());
    }
    if Some(u64_at(footer, 56)) != directory {
        return Err(format!("footer: gdOffset {} instead of {directory:?}", u64_at(footer, 56)));
    }
    if sector(file, at + 2)?.iter().any(|byte| *byte != 0) {
        return Err("no end-of-stream marker".to_owned());
    }
    match file.len() as u64 / SECTOR as u64 - (at + 3) {
        0 => Ok(()),
        more => Err(format!("{more} sectors behind the end-of-stream marker")),
    }
}

fn header(b: &[u8]) -> Result<Header, String> {
    let mut wrong = Vec::new();
    let mut want = |what: &str, yes: bool| {
        if !yes {
            wrong.push(what.to_owned());
        }
    };
    want("magic", b.starts_with(b"KDMV"));
    want("version 3", u32_at(b, 4) == 3);
    want("flags", u32_at(b, 8) == 0x0003_0001);
    want("grain of 128 sectors", u64_at(b, 20) == 128);
    want("512 entries per table", u32_at(b, 44) == 512);
    want("no redundant directory", u64_at(b, 48) == 0);
    want("clean shutdown", b[72] == 0);
    want("newline bytes", b[73..77] == *b"\n \r\n");
    want("deflate", b[77..79] == [1, 0]);
    want("padding", b[79..].iter().all(|byte| *byte == 0));
    if !wrong.is_empty() {
        return Err(format!("header: {}", wrong.join(", ")));
    }
    Ok(Header {
        capacity: u64_at(b, 12),
        grain: u64_at(b, 20),
        entries: u64::from(u32_at(b, 44)),
        gd_offset: u64_at(b, 56),
        overhead: u64_at(b, 64),
        descriptor: (u64_at(b, 28), u64_at(b, 36)),
    })
}

fn range(file: &[u8], sector: u64, sectors: u64) -> Result<&[u8], String> {
    let start = sector as usize * SECTOR;
    file.get(start..start + sectors as usize * SECTOR).ok_or(format!("sector {sector}: the file is cut off"))
}

fn sector(file: &[u8], at: u64) -> Result<&[u8], String> {
    range(file, at, 1)
}

fn entries(table: &[u8]) -> Vec<u32> {
    table.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect()
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    b.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
