use flate2::{Decompress, FlushDecompress};
use libdeflater::Decompressor;
use zstd_safe::DCtx;

use crate::{Codec, Error};

/// Unpacks units. Contexts are made when first needed.
#[derive(Default)]
pub struct Unpacker {
    deflate: Option<Box<Decompressor>>,
    zstd: Option<Box<DCtx<'static>>>,
}

impl Unpacker {
    /// An unpacker with no context yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Unpacks the payload at the start of `packed` so that it fills `unit`. What follows the payload
    /// (padding to a sector) is ignored.
    ///
    /// # Errors
    /// [`Error::Damaged`] or [`Error::WrongLength`]; the contents of `unit` are then unspecified.
    pub fn unpack(&mut self, codec: Codec, packed: &[u8], unit: &mut [u8]) -> Result<(), Error> {
        match codec {
            Codec::Deflate => self.unpack_deflate(packed, unit),
            Codec::Zlib => self.unpack_zlib(packed, unit),
            Codec::Zstd => self.unpack_zstd(packed, unit),
        }
    }

    fn unpack_deflate(&mut self, packed: &[u8], unit: &mut [u8]) -> Result<(), Error> {
        let decompressor = self.deflate.get_or_insert_with(|| Box::new(Decompressor::new()));
        match decompressor.deflate_decompress(packed, unit) {
            Ok(len) if len == unit.len() => Ok(()),
            Ok(got) => Err(Error::WrongLength { got, want: unit.len() }),
            // QEMU takes a stream that fills the cluster without ending (`qcow2_zlib_decompress`); libdeflate
            // does not. Rare, so the slower decoder looks at it only now.
            Err(error) => unpack_unfinished(packed, unit).map_err(|()| Error::Damaged(error.to_string())),
        }
    }

    fn unpack_zlib(&mut self, packed: &[u8], unit: &mut [u8]) -> Result<(), Error> {
        let decompressor = self.deflate.get_or_insert_with(|| Box::new(Decompressor::new()));
        match decompressor.zlib_decompress(packed, unit) {
            Ok(len) if len == unit.len() => Ok(()),
            Ok(got) => Err(Error::WrongLength { got, want: unit.len() }),
            Err(error) => Err(Error::Damaged(error.to_string())),
        }
    }

    fn unpack_zstd(&mut self, packed: &[u8], unit: &mut [u8]) -> Result<(), Error> {
        let context = match &mut self.zstd {
            Some(context) => context,
            none => {
                let made = DCtx::try_create().ok_or_else(|| Error::Codec("no memory for a zstd context".to_owned()))?;
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
            let (frame, after) =
                packed.split_at_checked(frame.max(1)).ok_or_else(|| Error::Damaged("zstd: frame cut short".to_owned()))?;
            filled += context.decompress(rest, frame).map_err(damaged)?;
            packed = after;
        }
        Ok(())
    }
}

fn unpack_unfinished(packed: &[u8], unit: &mut [u8]) -> Result<(), ()> {
    let mut inflate = Decompress::new(false);
    let _ = inflate.decompress(packed, unit, FlushDecompress::Finish);
    if inflate.total_out() == unit.len() as u64 { Ok(()) } else { Err(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compress, Compression, FlushCompress};

    #[test]
    fn a_stream_that_fills_the_unit_without_ending_is_taken() {
        let unit = vec![7u8; 4096];
        let mut packed = Vec::with_capacity(4096);
        Compress::new(Compression::new(6), false).compress_vec(&unit, &mut packed, FlushCompress::Sync).unwrap();
        let mut back = vec![0; unit.len()];
        Unpacker::new().unpack(Codec::Deflate, &packed, &mut back).unwrap();
        assert_eq!(back, unit);
    }

    #[test]
    fn two_zstd_frames_make_one_unit() {
        let mut packed = vec![0; 1024];
        let first = zstd_safe::compress(&mut packed[..], &[1; 3000], 3).unwrap();
        let second = zstd_safe::compress(&mut packed[first..], &[2; 1096], 3).unwrap();
        let mut unit = vec![0; 4096];
        Unpacker::new().unpack(Codec::Zstd, &packed[..first + second + 100], &mut unit).unwrap();
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
