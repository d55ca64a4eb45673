use std::ops::Range;

use diskmill_codec::Codec;
use diskmill_io::Storage;

use crate::error::Result;

/// The longest run of zeros, in bytes, where each unit of it leaves something in the output.
pub(crate) const RUN: u64 = 1 << 30;

/// Which of the output's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TargetFile {
    /// The image.
    Main,
    /// The external data file.
    Data,
    /// What holds the guest's data, through its encryption.
    Encrypted,
    /// An extent file of a VMDK, by its number from 0.
    Extent(u32),
}

/// A write that an [`Assembler`] asks for.
#[derive(Debug)]
pub(crate) struct WriteOp {
    pub(crate) file: TargetFile,
    /// Host offset.
    pub(crate) at: u64,
    pub(crate) what: WriteWhat,
}

/// What is written.
#[derive(Debug)]
pub(crate) enum WriteWhat {
    /// A range of the job's buffer.
    Buf {
        /// First byte.
        at: usize,
        /// Bytes.
        len: usize,
    },
    /// Metadata.
    Bytes(Vec<u8>),
    /// Zeros; really written out where `written`, otherwise by whatever is cheapest.
    Zeroes {
        /// Bytes.
        len: u64,
        /// Allocate and fill the blocks.
        written: bool,
    },
    /// Blocks to allocate, in a file that reads as zeros there.
    Reserve {
        /// Bytes.
        len: u64,
    },
}

impl WriteOp {
    pub(crate) const fn bytes(at: u64, bytes: Vec<u8>) -> Self {
        Self { file: TargetFile::Main, at, what: WriteWhat::Bytes(bytes) }
    }

    pub(crate) const fn zeroes(file: TargetFile, at: u64, len: u64, written: bool) -> Self {
        Self { file, at, what: WriteWhat::Zeroes { len, written } }
    }

    /// Adds blocks to reserve, or makes the last run longer.
    pub(crate) fn push_reserve(out: &mut Vec<Self>, file: TargetFile, at: u64, len: u64) {
        if let Some(Self { file: last_file, at: last_at, what: WriteWhat::Reserve { len: last_len } }) =
            out.last_mut()
            && (*last_file, *last_at + *last_len) == (file, at)
        {
            *last_len += len;
            return;
        }
        out.push(Self { file, at, what: WriteWhat::Reserve { len } });
    }

    /// Adds a run of zeros, or makes the last one longer.
    pub(crate) fn push_zeroes(out: &mut Vec<Self>, file: TargetFile, at: u64, len: u64, written: bool) {
        if let Some(Self {
            file: last_file,
            at: last_at,
            what: WriteWhat::Zeroes { len: last_len, written: last },
        }) = out.last_mut()
            && (*last_file, *last_at + *last_len, *last) == (file, at, written)
        {
            *last_len += len;
            return;
        }
        out.push(Self::zeroes(file, at, len, written));
    }

    /// Adds a write from the job's buffer, or makes the last one longer if this one goes on where it ends.
    pub(crate) fn push_buf(out: &mut Vec<Self>, file: TargetFile, at: u64, buf_at: usize, len: usize) {
        if let Some(Self {
            file: last_file,
            at: last_at,
            what: WriteWhat::Buf { at: last_buf, len: last_len },
        }) = out.last_mut()
            && *last_file == file
            && *last_at + *last_len as u64 == at
            && *last_buf + *last_len == buf_at
        {
            *last_len += len;
            return;
        }
        out.push(Self { file, at, what: WriteWhat::Buf { at: buf_at, len } });
    }
}

/// What a unit of the output turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// All zeros.
    Zero,
    /// Data, at its place in a buffer in guest layout. Bit n of `zero`: subunit n is all zeros.
    Data { zero: u32 },
    /// Packed, anywhere in the buffer.
    Packed { at: usize, len: u32 },
    /// Not packed after all, because that would not have made it smaller; anywhere in the buffer.
    Stored { at: usize },
}

impl Unit {
    /// The runs of units of `unit` bytes, from the start of `guest` on, that are all zeros (`true`) or all not.
    pub(crate) fn runs(
        guest: Range<u64>,
        unit: u64,
        units: &[Self],
    ) -> impl Iterator<Item = (Range<u64>, bool)> {
        let mut at = guest.start;
        let is_zero = |of: &Self| *of == Self::Zero;
        units.chunk_by(move |a, b| is_zero(a) == is_zero(b)).map(move |run| {
            let start = at;
            at = guest.end.min(start + run.len() as u64 * unit);
            (start..at, run.first().is_some_and(is_zero))
        })
    }
}

/// What remains to be done when all units are placed and all writes are done.
#[derive(Default)]
pub(crate) struct Finish {
    /// The length that the image file must have, where it is not just what was written.
    pub(crate) file_len: Option<u64>,
    /// The same of the other files: the external data file, or the extents.
    pub(crate) other_lens: Vec<u64>,
    /// Goes to offset 0, after a barrier.
    pub(crate) header: Option<Vec<u8>>,
    /// Makes the writes that depend on the bytes of the image file, which is whole but for these.
    pub(crate) seal: Option<Seal>,
}

/// Reads the written file and gives the last writes.
pub(crate) type Seal = Box<dyn FnOnce(&dyn Storage) -> Result<Vec<WriteOp>> + Send>;

/// What stands around a packed payload, so that packed units follow each other in the buffer as they do in the file.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    /// Bytes before the payload.
    pub(crate) lead: usize,
    /// A frame is filled up with zeros to a multiple of this.
    pub(crate) align: usize,
    /// Writes the lead of the unit at a guest offset, whose payload has so many bytes.
    pub(crate) fill: fn(guest: u64, len: u32, lead: &mut [u8]),
}

impl Frame {
    /// Room for the payload of a unit of `unit` bytes that cannot be shrunk (deflate adds five bytes for each stored
    /// block of 5000 or more).
    pub(crate) const fn payload_room(unit: usize) -> usize {
        unit + unit / 64 + 64
    }

    /// Room for the whole frame.
    pub(crate) const fn room(&self, unit: usize) -> usize {
        self.lead + Self::payload_room(unit) + self.align
    }
}

/// Every creatable format: lays out a fresh output by arithmetic alone.
///
/// `place`, `zero` and `skip` are called for ranges in ascending guest order that together cover the disk
/// (in any order if not [`ordered`](Self::ordered)); each starts at a multiple of [`unit`](Self::unit).
pub(crate) trait Assembler: Send {
    /// Bytes in a unit: what is found to be zero, placed and packed as a whole. A power of two.
    fn unit(&self) -> u64;

    /// Bytes in a subunit: what zeros are looked for in. A 32nd of a unit, or the unit.
    fn subunit(&self) -> u64 {
        self.unit()
    }

    /// The codec for packed units.
    fn codec(&self) -> Option<Codec> {
        None
    }

    /// The frame of packed units, in a format in which each unit that is not zero must be packed. `Unit::Packed` then
    /// speaks of the whole frame.
    fn frame(&self) -> Option<Frame> {
        None
    }

    /// Whether the last unit is written whole, filled up with zeros.
    fn whole_units(&self) -> bool;

    /// Whether the place of a unit depends on those before it.
    fn ordered(&self) -> bool;

    /// Places the units of the run `guest`, which stand in a buffer. The last unit may be a partial one.
    fn place(&mut self, guest: Range<u64>, units: &[Unit], out: &mut Vec<WriteOp>) -> Result<()>;

    /// A run of zeros.
    fn zero(&mut self, run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()>;

    /// A run that the output's backing file has.
    fn skip(&mut self, run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()>;

    /// The longest run that [`zero`](Self::zero) takes at once: what it makes of one is held in memory.
    fn longest_zero(&self) -> u64 {
        RUN
    }

    /// The same of [`skip`](Self::skip).
    fn longest_skip(&self) -> u64 {
        self.longest_zero()
    }

    /// Whether [`fingerprint`](Self::fingerprint) is of use.
    fn wants_fingerprint(&self) -> bool {
        false
    }

    /// The fingerprint of some placed bytes; the sum over all calls is the content's, in whatever order they come.
    fn fingerprint(&mut self, _content: u64) {}

    /// Refuses a disk that does not fit the format.
    fn check_size(&self, size: u64) -> Result<()>;

    /// The lengths of the other files, where they are known beforehand: as [`Finish::other_lens`].
    fn other_lens(&self) -> Vec<u64> {
        Vec::new()
    }

    /// Writes the tables of a disk of `size` bytes.
    fn finish(&mut self, size: u64, out: &mut Vec<WriteOp>) -> Result<Finish>;
}
