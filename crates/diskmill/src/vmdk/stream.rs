use std::ops::Range;

use diskmill_codec::Codec;
use diskmill_format::Limits;
use diskmill_format::vmdk::sparse::{
    DEFAULT_DESCRIPTOR_SECTORS, DEFAULT_GRAIN_SECTORS, MAX_GTES_PER_GT, encode_table,
};
use diskmill_format::vmdk::{Marker, SECTOR_BYTES, SparseHeader, marker};

use super::options::{Subformat, VmdkOptions};
use crate::convert::{Assembler, Finish, Frame, TargetFile, Unit, WriteOp};
use crate::error::{Error, Kind, Result};

const GRAIN: u64 = DEFAULT_GRAIN_SECTORS * SECTOR_BYTES;
const TABLE_ENTRIES: u64 = MAX_GTES_PER_GT as u64;

/// Lays out a streamOptimized file front to back, as VMware's converter does: header and descriptor, grains with
/// their markers, each grain table behind its grains, grain directory, footer, end-of-stream marker.
pub(crate) struct StreamAssembler {
    options: VmdkOptions,
    name: Vec<u8>,
    size: Option<u64>,
    /// Where the file begins in the output (inside an archive).
    base: u64,
    /// The next free byte of the file.
    at: u64,
    started: bool,
    /// The grain table that is being filled: its number and its entries.
    table: Option<(u64, Vec<u32>)>,
    directory: Vec<u32>,
}

impl StreamAssembler {
    pub(crate) fn new(options: VmdkOptions, name: &[u8], size: Option<u64>, base: u64) -> Result<Self> {
        let options = VmdkOptions { subformat: Subformat::StreamOptimized, ..options };
        let overhead = SparseHeader::stream_optimized(0).overhead * SECTOR_BYTES;
        let made = Self {
            options,
            name: name.to_vec(),
            size,
            base,
            at: overhead,
            started: false,
            table: None,
            directory: Vec::new(),
        };
        // A name that no descriptor can hold is refused before anything is written.
        made.head(size.unwrap_or(0))?;
        Ok(made)
    }

    /// Everything before the first grain.
    fn head(&self, size: u64) -> Result<Vec<u8>> {
        let header = SparseHeader::stream_optimized(size.div_ceil(SECTOR_BYTES));
        let descriptor = self.options.describe(&self.name, size, 0)?.write()?;
        if descriptor.len() as u64 > DEFAULT_DESCRIPTOR_SECTORS * SECTOR_BYTES {
            return Err(Error::new(Kind::Limit, "the descriptor does not fit: choose shorter names"));
        }
        let mut head = header.encode().to_vec();
        head.extend_from_slice(&descriptor);
        head.resize((header.overhead * SECTOR_BYTES) as usize, 0);
        Ok(head)
    }

    /// Writes the head first where it can be known first, so that a pipe and a file get the same bytes.
    fn start(&mut self, out: &mut Vec<WriteOp>) -> Result<()> {
        if let Some(size) = self.size.filter(|_| !self.started) {
            out.push(WriteOp::bytes(self.base, self.head(size)?));
            self.started = true;
        }
        Ok(())
    }

    /// The sector at which the next structure begins.
    fn sector(&self) -> Result<u32> {
        u32::try_from(self.at / SECTOR_BYTES).map_err(|_| {
            Error::new(Kind::Limit, "the file grows beyond 2 TiB, which its grain tables cannot address")
                .hint("split the disk, or use another format")
        })
    }

    fn push(&mut self, bytes: Vec<u8>, out: &mut Vec<WriteOp>) {
        let at = self.base + self.at;
        self.at += bytes.len() as u64;
        out.push(WriteOp::bytes(at, bytes));
    }

    /// Writes a marker and what it announces; gives the sector of the latter.
    fn push_table(
        &mut self,
        entries: &[u32],
        kind: fn(u64) -> Marker,
        out: &mut Vec<WriteOp>,
    ) -> Result<u32> {
        let table = encode_table(entries);
        let mut bytes = kind(table.len() as u64 / SECTOR_BYTES).encode().to_vec();
        let place = self
            .sector()?
            .checked_add(1)
            .ok_or_else(|| Error::new(Kind::Limit, "the file grows beyond 2 TiB"))?;
        bytes.extend_from_slice(&table);
        self.push(bytes, out);
        Ok(place)
    }

    fn flush_table(&mut self, out: &mut Vec<WriteOp>) -> Result<()> {
        let Some((number, entries)) = self.table.take() else { return Ok(()) };
        let place = self.push_table(&entries, |sectors| Marker::GrainTable { sectors }, out)?;
        let number = number as usize;
        // Tables without grains are not written: their entries are 0.
        self.directory.resize(number, 0);
        self.directory.push(place);
        Ok(())
    }

    fn place_grain(&mut self, guest: u64, buf_at: usize, len: u32, out: &mut Vec<WriteOp>) -> Result<()> {
        let grain = guest / GRAIN;
        let number = grain / TABLE_ENTRIES;
        if self.table.as_ref().is_none_or(|(current, _)| *current != number) {
            self.flush_table(out)?;
            self.table = Some((number, vec![0; TABLE_ENTRIES as usize]));
        }
        let sector = self.sector()?;
        if let Some((_, entries)) = &mut self.table
            && let Some(entry) = entries.get_mut((grain % TABLE_ENTRIES) as usize)
        {
            *entry = sector;
        }
        WriteOp::push_buf(out, TargetFile::Main, self.base + self.at, buf_at, len as usize);
        self.at += u64::from(len);
        Ok(())
    }

    /// Bytes of the file so far.
    pub(crate) const fn len(&self) -> u64 {
        self.at
    }
}

fn fill_marker(guest: u64, len: u32, lead: &mut [u8]) {
    lead.copy_from_slice(&marker::encode_grain(guest / SECTOR_BYTES, len));
}

impl Assembler for StreamAssembler {
    fn unit(&self) -> u64 {
        GRAIN
    }

    fn codec(&self) -> Option<Codec> {
        Some(Codec::Zlib)
    }

    fn frame(&self) -> Option<Frame> {
        let lead = marker::GRAIN_MARKER_BYTES as usize;
        Some(Frame { lead, align: SECTOR_BYTES as usize, fill: fill_marker })
    }

    fn whole_units(&self) -> bool {
        true
    }

    fn ordered(&self) -> bool {
        true
    }

    fn place(&mut self, guest: Range<u64>, units: &[Unit], out: &mut Vec<WriteOp>) -> Result<()> {
        self.start(out)?;
        for (at, unit) in guest.step_by(GRAIN as usize).zip(units) {
            match *unit {
                Unit::Zero => {}
                Unit::Packed { at: buf_at, len } => self.place_grain(at, buf_at, len, out)?,
                Unit::Data { .. } | Unit::Stored { .. } => {
                    return Err(Error::invalid("a grain of a stream that is not packed"));
                }
            }
        }
        Ok(())
    }

    fn longest_zero(&self) -> u64 {
        u64::MAX
    }

    fn zero(&mut self, _run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()> {
        self.start(out)
    }

    fn skip(&mut self, run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()> {
        self.zero(run, out)
    }

    fn check_size(&self, size: u64) -> Result<()> {
        SparseHeader::stream_optimized(size.div_ceil(SECTOR_BYTES)).geometry(&Limits::default())?;
        Ok(())
    }

    fn finish(&mut self, size: u64, out: &mut Vec<WriteOp>) -> Result<Finish> {
        self.check_size(size)?;
        self.start(out)?;
        self.flush_table(out)?;
        let mut footer = SparseHeader::stream_optimized(size.div_ceil(SECTOR_BYTES));
        let tables = footer.geometry(&Limits::default())?.tables;
        let mut directory = std::mem::take(&mut self.directory);
        // A disk of no bytes has a directory all the same.
        directory.resize(tables.max(1) as usize, 0);
        footer.gd_offset =
            u64::from(self.push_table(&directory, |sectors| Marker::GrainDirectory { sectors }, out)?);
        self.push(marker::encode_footer(&footer).to_vec(), out);
        let header = if self.started { None } else { Some(self.head(size)?) };
        Ok(Finish { file_len: Some(self.base + self.at), header, ..Finish::default() })
    }
}
