use std::ops::Range;

use diskmill_format::Limits;
use diskmill_format::vmdk::sparse::{
    DEFAULT_DESCRIPTOR_SECTORS, DEFAULT_GRAIN_SECTORS, SparseLayout, encode_table,
};
use diskmill_format::vmdk::{SECTOR_BYTES, geometry};

use super::options::{Subformat, VmdkOptions};
use crate::convert::{Assembler, Finish, RUN, TargetFile, Unit, WriteOp};
use crate::error::{Error, Kind, Result};

const GRAIN: u64 = DEFAULT_GRAIN_SECTORS * SECTOR_BYTES;
const SPLIT: u64 = geometry::SPLIT_SECTORS * SECTOR_BYTES;
/// What to do about a disk that does not fit one file.
const SPLIT_IT: &str = "subformat=twoGbMaxExtentSparse splits the disk";
/// A grain table entry for a grain of zeros.
const ZEROED: u32 = 1;

/// Lays out a monolithicSparse or twoGbMaxExtentSparse disk.
///
/// Directories and tables stand at places that follow from the size, grains are placed as they come, in guest order. A
/// grain table is written when its grains are done, so memory does not grow with the disk.
pub(super) struct SparseAssembler {
    options: VmdkOptions,
    name: Vec<u8>,
    size: u64,
    split: bool,
    /// The extent that is being written.
    extent: Option<Extent>,
    /// Bytes of the extents that are done.
    lens: Vec<u64>,
    /// What the disk's identity is made of: where there is data.
    /// Fingerprint of what was placed.
    content: u64,
}

struct Extent {
    number: u64,
    file: TargetFile,
    layout: SparseLayout,
    /// The next free sector.
    next: u64,
    /// The grain table that is being filled: its number and its entries.
    table: Option<(u64, Vec<u32>)>,
}

impl SparseAssembler {
    pub(super) fn new(options: VmdkOptions, name: &[u8], size: u64) -> Result<Self> {
        let split = options.subformat == Subformat::TwoGbMaxExtentSparse;
        let made =
            Self { options, name: name.to_vec(), size, split, extent: None, lens: Vec::new(), content: 0 };
        made.descriptor()?;
        Ok(made)
    }

    fn descriptor(&self) -> Result<Vec<u8>> {
        let text = self.options.describe(&self.name, self.size, self.content)?.write()?;
        if !self.split && text.len() as u64 > DEFAULT_DESCRIPTOR_SECTORS * SECTOR_BYTES {
            return Err(Error::new(Kind::Limit, "the descriptor does not fit: choose shorter names"));
        }
        Ok(text)
    }

    /// Guest bytes before the next extent.
    const fn step(&self) -> u64 {
        if self.split { SPLIT } else { u64::MAX }
    }

    fn layout(&self, number: u64) -> Result<SparseLayout> {
        let start = number.saturating_mul(self.step());
        let sectors = self.size.saturating_sub(start).min(self.step()).div_ceil(SECTOR_BYTES);
        let descriptor = if self.split { 0 } else { DEFAULT_DESCRIPTOR_SECTORS };
        let layout = SparseLayout::new(sectors, descriptor, self.options.zeroed_grain, &Limits::default());
        layout.map_err(|error| Error::from(error).hint(SPLIT_IT))
    }

    /// Goes on to extent `number`; those before it are completed.
    fn advance(&mut self, number: u64, out: &mut Vec<WriteOp>) -> Result<()> {
        while self.extent.as_ref().is_none_or(|extent| extent.number != number) {
            let next = match self.extent.take() {
                Some(done) => {
                    let next = done.number + 1;
                    self.complete(done, out)?;
                    next
                }
                None => 0,
            };
            let layout = self.layout(next)?;
            let file = if self.split { TargetFile::Extent(next as u32) } else { TargetFile::Main };
            self.extent =
                Some(Extent { number: next, file, next: layout.header.overhead, layout, table: None });
        }
        Ok(())
    }

    fn complete(&mut self, mut extent: Extent, out: &mut Vec<WriteOp>) -> Result<()> {
        extent.flush(out);
        let header = &extent.layout.header;
        for (at, first) in
            [(header.rgd_offset, extent.layout.redundant_tables), (header.gd_offset, extent.layout.tables)]
        {
            let directory = extent.layout.directory(first);
            out.push(WriteOp { file: extent.file, ..WriteOp::bytes(at * SECTOR_BYTES, directory) });
        }
        if self.split {
            out.push(WriteOp { file: extent.file, ..WriteOp::bytes(0, header.encode().to_vec()) });
        }
        self.lens.push(extent.next * SECTOR_BYTES);
        Ok(())
    }

    /// The extent that the guest offset lies in, made current.
    fn extent_at(&mut self, guest: u64, out: &mut Vec<WriteOp>) -> Result<&mut Extent> {
        self.advance(guest / self.step(), out)?;
        self.extent.as_mut().ok_or_else(|| Error::invalid("an extent that is not there"))
    }

    fn place_zero(&mut self, guest: u64, out: &mut Vec<WriteOp>) -> Result<()> {
        if self.options.backing_file.is_none() {
            return Ok(());
        }
        let (step, zeroed) = (self.step(), self.options.zeroed_grain);
        let extent = self.extent_at(guest, out)?;
        // Without zeroed grains zeros take a grain, which as a hole of the file costs nothing.
        let entry = if zeroed { ZEROED } else { extent.take()? };
        extent.set(guest % step, entry, out);
        Ok(())
    }
}

impl Extent {
    /// The sector of a fresh grain.
    fn take(&mut self) -> Result<u32> {
        let sector = u32::try_from(self.next).map_err(|_| {
            let why = "the file grows beyond 2 TiB, which its grain tables cannot address";
            Error::new(Kind::Limit, why).hint(SPLIT_IT)
        })?;
        self.next += DEFAULT_GRAIN_SECTORS;
        Ok(sector)
    }

    /// Sets the entry of the grain at `within` the extent; a table that is left is written.
    fn set(&mut self, within: u64, entry: u32, out: &mut Vec<WriteOp>) {
        let entries = self.layout.geometry.table_entries;
        let grain = within / GRAIN;
        if self.table.as_ref().is_none_or(|(number, _)| *number != grain / entries) {
            self.flush(out);
            self.table = Some((grain / entries, vec![0; entries as usize]));
        }
        if let Some((_, table)) = &mut self.table
            && let Some(slot) = table.get_mut((grain % entries) as usize)
        {
            *slot = entry;
        }
    }

    fn flush(&mut self, out: &mut Vec<WriteOp>) {
        let Some((number, entries)) = self.table.take() else { return };
        let bytes = encode_table(&entries);
        for first in [self.layout.redundant_tables, self.layout.tables] {
            let at = u64::from(first) * SECTOR_BYTES + number * self.layout.geometry.table_bytes;
            out.push(WriteOp { file: self.file, ..WriteOp::bytes(at, bytes.clone()) });
        }
    }
}

impl Assembler for SparseAssembler {
    fn unit(&self) -> u64 {
        GRAIN
    }

    fn whole_units(&self) -> bool {
        true
    }

    fn ordered(&self) -> bool {
        true
    }

    fn place(&mut self, guest: Range<u64>, units: &[Unit], out: &mut Vec<WriteOp>) -> Result<()> {
        let step = self.step();
        for (index, (at, unit)) in guest.step_by(GRAIN as usize).zip(units).enumerate() {
            if *unit == Unit::Zero {
                self.place_zero(at, out)?;
                continue;
            }
            let extent = self.extent_at(at, out)?;
            let sector = extent.take()?;
            let file = extent.file;
            extent.set(at % step, sector, out);
            WriteOp::push_buf(
                out,
                file,
                u64::from(sector) * SECTOR_BYTES,
                index * GRAIN as usize,
                GRAIN as usize,
            );
        }
        Ok(())
    }

    fn longest_zero(&self) -> u64 {
        if self.options.backing_file.is_none() { u64::MAX } else { RUN }
    }

    fn longest_skip(&self) -> u64 {
        u64::MAX
    }

    fn zero(&mut self, run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()> {
        if self.options.backing_file.is_none() {
            return Ok(());
        }
        for guest in run.step_by(GRAIN as usize) {
            self.place_zero(guest, out)?;
        }
        Ok(())
    }

    fn skip(&mut self, _run: Range<u64>, _out: &mut Vec<WriteOp>) -> Result<()> {
        Ok(())
    }

    fn fingerprint(&mut self, content: u64) {
        self.content = self.content.wrapping_add(content);
    }

    fn wants_fingerprint(&self) -> bool {
        true
    }

    fn check_size(&self, _size: u64) -> Result<()> {
        self.layout(0).map(drop)
    }

    fn finish(&mut self, size: u64, out: &mut Vec<WriteOp>) -> Result<Finish> {
        if size != self.size {
            return Err(Error::invalid("the source has another size than before"));
        }
        let extents = if self.split { size.div_ceil(SPLIT) } else { 1 };
        if extents > 0 {
            self.advance(extents - 1, out)?;
        }
        let last = self.extent.take();
        let header = last.as_ref().map(|extent| extent.layout.header.encode().to_vec());
        if let Some(extent) = last {
            self.complete(extent, out)?;
        }
        let text = self.descriptor()?;
        let lens = std::mem::take(&mut self.lens);
        if self.split {
            return Ok(Finish {
                file_len: Some(text.len() as u64),
                other_lens: lens,
                header: Some(text),
                ..Finish::default()
            });
        }
        let header = header.map(|header| [header, text].concat());
        Ok(Finish { file_len: lens.first().copied(), header, ..Finish::default() })
    }
}
