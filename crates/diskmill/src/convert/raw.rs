use std::ops::Range;

use super::assembler::{Assembler, Finish, RUN, TargetFile, Unit, WriteOp};
use crate::error::Result;
use crate::qcow2::Preallocation;

/// What is done for zeros in a raw output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RawZeros {
    /// The output reads as zeros already: nothing.
    Hole,
    /// The output may hold old bytes: make it read as zeros.
    Clear,
    /// Write them out (a pipe, `preallocation=full`).
    Write,
}

/// Raw: every byte at its own offset.
pub(super) struct RawAssembler {
    unit: u64,
    zeros: RawZeros,
    stream: bool,
}

impl RawAssembler {
    /// Looks for zeros in granules of `unit` bytes. A `stream` takes bytes only in order.
    pub(super) fn new(unit: u64, zeros: RawZeros, stream: bool) -> Self {
        Self { unit, zeros, stream }
    }

    /// What zeros need, for a fresh file with this preallocation. (`falloc` reserves the whole file beforehand.)
    pub(super) const fn zeros_for(preallocation: Preallocation) -> RawZeros {
        match preallocation {
            Preallocation::Full => RawZeros::Write,
            _ => RawZeros::Hole,
        }
    }
}

impl Assembler for RawAssembler {
    fn unit(&self) -> u64 {
        self.unit
    }

    fn whole_units(&self) -> bool {
        false
    }

    fn ordered(&self) -> bool {
        self.stream
    }

    fn place(&mut self, guest: Range<u64>, units: &[Unit], out: &mut Vec<WriteOp>) -> Result<()> {
        for (run, zero) in Unit::runs(guest.clone(), self.unit, units) {
            if zero {
                self.zero(run, out)?;
            } else {
                let (buf_at, len) = ((run.start - guest.start) as usize, (run.end - run.start) as usize);
                WriteOp::push_buf(out, TargetFile::Main, run.start, buf_at, len);
            }
        }
        Ok(())
    }

    fn longest_zero(&self) -> u64 {
        // What is cleared or written takes its time, and can be cancelled in between.
        if self.zeros == RawZeros::Hole { u64::MAX } else { RUN }
    }

    fn zero(&mut self, run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()> {
        if self.zeros != RawZeros::Hole {
            let written = self.zeros == RawZeros::Write;
            WriteOp::push_zeroes(out, TargetFile::Main, run.start, run.end - run.start, written);
        }
        Ok(())
    }

    fn skip(&mut self, run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()> {
        self.zero(run, out)
    }

    fn check_size(&self, _size: u64) -> Result<()> {
        Ok(())
    }

    fn finish(&mut self, size: u64, _out: &mut Vec<WriteOp>) -> Result<Finish> {
        Ok(Finish { file_len: Some(size), ..Finish::default() })
    }
}
