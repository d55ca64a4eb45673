use std::ops::Range;

use diskmill_format::vmdk::{SECTOR_BYTES, geometry};

use super::options::{Subformat, VmdkOptions};
use crate::convert::{Assembler, Finish, TargetFile, Unit, WriteOp};
use crate::error::{Error, Result};

const SPLIT: u64 = geometry::SPLIT_SECTORS * SECTOR_BYTES;

/// Lays out a monolithicFlat or twoGbMaxExtentFlat disk: every byte at its own offset; zeros are holes.
pub(super) struct FlatAssembler {
    options: VmdkOptions,
    name: Vec<u8>,
    size: u64,
    unit: u64,
    /// Fingerprint of what was placed.
    content: u64,
}

impl FlatAssembler {
    /// Looks for zeros in granules of `unit` bytes.
    pub(super) fn new(options: VmdkOptions, name: &[u8], size: u64, unit: u64) -> Result<Self> {
        let made = Self { options, name: name.to_vec(), size, unit, content: 0 };
        made.descriptor()?;
        Ok(made)
    }

    fn descriptor(&self) -> Result<Vec<u8>> {
        Ok(self.options.describe(&self.name, self.size, self.content)?.write()?)
    }

    fn step(&self) -> u64 {
        if self.options.subformat == Subformat::TwoGbMaxExtentFlat { SPLIT } else { u64::MAX }
    }
}

impl Assembler for FlatAssembler {
    fn unit(&self) -> u64 {
        self.unit
    }

    fn whole_units(&self) -> bool {
        false
    }

    fn ordered(&self) -> bool {
        false
    }

    fn place(&mut self, guest: Range<u64>, units: &[Unit], out: &mut Vec<WriteOp>) -> Result<()> {
        let step = self.step();
        for (mut run, _) in Unit::runs(guest.clone(), self.unit, units).filter(|(_, zero)| !zero) {
            while !run.is_empty() {
                let (file, at) = (TargetFile::Extent((run.start / step) as u32), run.start % step);
                let len = (run.end - run.start).min(step - at);
                WriteOp::push_buf(out, file, at, (run.start - guest.start) as usize, len as usize);
                run.start += len;
            }
        }
        Ok(())
    }

    fn longest_zero(&self) -> u64 {
        u64::MAX
    }

    fn zero(&mut self, _run: Range<u64>, _out: &mut Vec<WriteOp>) -> Result<()> {
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
        Ok(())
    }

    fn finish(&mut self, size: u64, _out: &mut Vec<WriteOp>) -> Result<Finish> {
        if size != self.size {
            return Err(Error::invalid("the source has another size than before"));
        }
        let text = self.descriptor()?;
        let other_lens = self.other_lens();
        Ok(Finish { file_len: Some(text.len() as u64), other_lens, header: Some(text), ..Finish::default() })
    }

    fn other_lens(&self) -> Vec<u64> {
        let step = self.step();
        // What the descriptor says: whole sectors.
        let size = self.size.div_ceil(SECTOR_BYTES) * SECTOR_BYTES;
        let extents = if step == u64::MAX { 1 } else { size.div_ceil(step) };
        (0..extents).map(|number| size.saturating_sub(number.saturating_mul(step)).min(step)).collect()
    }
}
