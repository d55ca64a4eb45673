use flate2::{Decompress, FlushDecompress};
use zstd_safe::DCtx;

use crate::deflate::Inflate;
use crate::{Codec, Error};

/// Unpacks units. Contexts are made when first needed.
#[derive(Default)]
pub struct Unpacker {
    deflate: Option<Inflate>,
    zstd: Option<Box<DCtx<'static>>>,
}

impl Unpacker {
    /// An unpacker with no context yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Unpacks the payload at the start of `packed` so that it fills `unit`. What follows the payload
    /// (padding to a sector) is ignored. Returns the payload's own length, or `None` if it does not end by itself and
    /// so cannot be used elsewhere.
    ///
    /// # Errors
    /// [`Error::Damaged`] or [`Error::WrongLength`]; the contents of `unit` are then unspecified.
    pub fn unpack(&mut self, codec: Codec, packed: &[u8], unit: &mut [u8]) -> Result<Option<usize>, Error> {
        match codec {
            Codec::Deflate => self.inflate(false, packed, unit),
            Codec::Zlib => self.inflate(true, packed, unit),
            Codec::Zstd => self.unpack_zstd(packed, unit).map(Some),
        }
    }

    fn inflate(&mut self, wrapped: bool, packed: &[u8], unit: &mut [u8]) -> Result<Option<usize>, Error> {
        let context = match &mut self.deflate {
            Some(context) => context,
            none => {
                let no_memory = || Error::Codec("no memory for a deflate context".to_owned());
                none.insert(Inflate::new().ok_or_else(no_memory)?)
            }
        };
        match context.run(wrapped, packed, unit) {
            Some((used, got)) if got == unit.len() => Ok(Some(used)),
            Some((_, got)) => Err(Error::WrongLength { got, want: unit.len() }),
            // QEMU takes a raw stream that fills the cluster without ending (`qcow2_zlib_decompress`); our engines
            // do not. Rare, so the slower decoder looks at it only now.
            None if !wrapped && fills(packed, unit) => Ok(None),
            None => Err(Error::Damaged("no valid deflate stream of the unit's length".to_owned())),
        }
    }

    fn unpack_zstd(&mut self, packed: &[u8], unit: &mut [u8]) -> Result<usize, Error> {
        let whole = packed.len();
        let context = match &mut self.zstd {
            Some(context) => context,
            none => {
                let made = DCtx::try_create()
                    .ok_or_else(|| Error::Codec("no memory for a zstd context".to_owned()))?;
                none.insert(Box::new(made))
            }
        };
        let damaged = |code| Error::Damaged(format!("zstd: {}", zstd_safe::get_error_name(code)));
        let (mut packed, mut filled) = (packed, 0);
        let want = unit.len();
        while let Some(rest) = unit.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            if packed.is_empty() {
                return Err(Error::WrongLength { got: filled, want });
            }
            // The one-shot decoder refuses trailing bytes, so the frame is measured first.
            let frame = zstd_safe::find_frame_compressed_size(packed).map_err(damaged)?;
            let (frame, after) = packed
                .split_at_checked(frame.max(1))
                .ok_or_else(|| Error::Damaged("zstd: frame cut short".to_owned()))?;
            filled += context.decompress(rest, frame).map_err(damaged)?;
            packed = after;
        }
        Ok(whole - packed.len())
    }
}

/// Unpacks a raw deflate stream that fills the unit and has no end. One that has more than the unit takes is damaged: without
/// a checksum, only its length can tell.
fn fills(packed: &[u8], unit: &mut [u8]) -> bool {
    /// What a writer that flushes its stream instead of ending it leaves last; the next cluster's payload may follow.
    const FLUSHED: [u8; 4] = [0, 0, 0xff, 0xff];
    let inflate = |packed: &[u8], out: &mut [u8]| {
        let mut inflate = Decompress::new(false);
        let _ = inflate.decompress(packed, out, FlushDecompress::Finish);
        (inflate.total_in() as usize, inflate.total_out() as usize)
    };
    let (used, got) = inflate(packed, unit);
    let taken = packed.get(..used.saturating_add(FLUSHED.len())).unwrap_or(packed);
    let flushed = taken.windows(FLUSHED.len()).rposition(|bytes| bytes == FLUSHED);
    let packed = flushed.and_then(|at| packed.get(..at + FLUSHED.len())).unwrap_or(packed);
    got == unit.len() && inflate(packed, &mut vec![0; unit.len() + 1]).1 == unit.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compress, Compression, FlushCompress};

    #[test]
    fn a_stream_that_fills_the_unit_without_ending_is_taken() {
        let unit = vec![7u8; 4096];
        let mut packed = Vec::with_capacity(4096);
        Compress::new(Compression::new(6), false)
            .compress_vec(&unit, &mut packed, FlushCompress::Sync)
            .unwrap();
        let mut back = vec![0; unit.len()];
        // The next cluster's payload follows in the same sector.
        for next in [&[][..], &packed.clone()] {
            packed.extend_from_slice(next);
            assert_eq!(Unpacker::new().unpack(Codec::Deflate, &packed, &mut back), Ok(None));
            assert_eq!(back, unit);
        }
    }

    #[test]
    fn a_stream_that_goes_on_after_the_unit_is_damaged() {
        let longer: Vec<u8> =
            (0..9000u32).flat_map(|number| number.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
        for flush in [FlushCompress::Sync, FlushCompress::Finish] {
            let mut packed = Vec::with_capacity(2 * longer.len());
            Compress::new(Compression::new(6), false).compress_vec(&longer, &mut packed, flush).unwrap();
            for unit in [512, 4096, longer.len() - 1] {
                let damaged = Unpacker::new().unpack(Codec::Deflate, &packed, &mut vec![0; unit]);
                assert!(matches!(damaged, Err(Error::Damaged(_))), "{unit}: {damaged:?}");
            }
        }
    }

    #[test]
    fn two_zstd_frames_make_one_unit() {
        let mut packed = vec![0; 1024];
        let first = zstd_safe::compress(&mut packed[..], &[1; 3000], 3).unwrap();
        let second = zstd_safe::compress(&mut packed[first..], &[2; 1096], 3).unwrap();
        let mut unit = vec![0; 4096];
        let used = Unpacker::new().unpack(Codec::Zstd, &packed[..first + second + 100], &mut unit);
        assert_eq!(used, Ok(Some(first + second)));
        assert!(unit[..3000] == [1; 3000] && unit[3000..] == [2; 1096]);
        let short = Unpacker::new().unpack(Codec::Zstd, &packed[..first], &mut unit);
        assert_eq!(short, Err(Error::WrongLength { got: 3000, want: 4096 }));
    }

    #[test]
    fn damage_is_an_error() {
        let mut unit = vec![0; 4096];
        for codec in [Codec::Deflate, Codec::Zlib, Codec::Zstd] {
            for packed in [&[][..], &[0xff; 512], &[0; 512]] {
                assert!(Unpacker::new().unpack(codec, packed, &mut unit).is_err(), "{codec:?} {packed:?}");
            }
        }
    }
}
