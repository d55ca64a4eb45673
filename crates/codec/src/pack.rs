use std::ops::RangeInclusive;

use zstd_safe::{CCtx, CParameter};

use crate::deflate::{self, Deflate, LEVEL, LEVEL_WRAPPED, LEVELS};
use crate::shrink::may_shrink;
use crate::{Codec, Error};

/// Zstd's levels from this one on take long over data that cannot be shrunk; those below see it quickly themselves.
const ZSTD_SLOW: i32 = 5;

/// The levels that a codec takes.
#[must_use]
pub fn level_range(codec: Codec) -> RangeInclusive<i32> {
    match codec {
        Codec::Deflate | Codec::Zlib => LEVELS,
        Codec::Zstd => -7..=zstd_safe::max_c_level(),
    }
}

/// The level that is used where the user names none: the fastest whose output is not larger than QEMU's, on file systems
/// full of real files (`docs/performance.md`). libdeflate takes the next one for some units ([`Packer::by_default`]).
///
/// QEMU packs qcow2's deflate with zlib's level 6 in a 4 KiB window, VMDK's grains with the same level in the full
/// window, and zstd with that library's own default, 3.
#[must_use]
pub const fn default_level(codec: Codec) -> i32 {
    match codec {
        Codec::Deflate => LEVEL,
        Codec::Zlib => LEVEL_WRAPPED,
        Codec::Zstd => 3,
    }
}

/// Packs units with one codec at one level.
pub struct Packer(Inner);

enum Inner {
    Deflate { context: Box<Deflate>, wrapped: bool },
    Zstd { context: Box<CCtx<'static>>, slow: bool },
}

impl Packer {
    /// A packer for `codec` at `level`.
    ///
    /// # Errors
    /// [`Error::Level`] outside [`level_range`]; [`Error::Codec`] for want of memory.
    pub fn new(codec: Codec, level: i32) -> Result<Self, Error> {
        if !level_range(codec).contains(&level) {
            return Err(Error::Level(level));
        }
        let inner = match codec {
            Codec::Deflate | Codec::Zlib => {
                let wrapped = codec == Codec::Zlib;
                let context = Deflate::new(level, wrapped).ok_or(Error::Level(level))?;
                Inner::Deflate { context: Box::new(context), wrapped }
            }
            Codec::Zstd => {
                let mut context = CCtx::try_create()
                    .ok_or_else(|| Error::Codec("no memory for a zstd context".to_owned()))?;
                context.set_parameter(CParameter::CompressionLevel(level)).map_err(zstd_error)?;
                Inner::Zstd { context: Box::new(context), slow: level >= ZSTD_SLOW }
            }
        };
        Ok(Self(inner))
    }

    /// A packer for `codec` for where the user names no level: at [`default_level`], with deflate from libdeflate one unit
    /// in eight at the next level, so that the whole is not larger than what QEMU makes.
    ///
    /// # Errors
    /// [`Error::Codec`] for want of memory.
    pub fn by_default(codec: Codec) -> Result<Self, Error> {
        let wrapped = match codec {
            Codec::Deflate => false,
            Codec::Zlib => true,
            Codec::Zstd => return Self::new(codec, default_level(codec)),
        };
        let context = Deflate::by_default(wrapped).ok_or(Error::Level(default_level(codec)))?;
        Ok(Self(Inner::Deflate { context: Box::new(context), wrapped }))
    }

    /// Packs `unit` into `out`. `None` if the payload would not fit: the unit is better stored as it is.
    ///
    /// A unit that looks as if it cannot be shrunk is not really packed: there is no room for it in an `out` that is
    /// smaller, and in a larger one it becomes stored blocks of deflate.
    ///
    /// # Errors
    /// [`Error::Codec`] if the codec fails for another reason than space.
    pub fn pack(&mut self, unit: &[u8], out: &mut [u8]) -> Result<Option<usize>, Error> {
        match &mut self.0 {
            Inner::Deflate { context, wrapped } => Ok(if may_shrink(unit) {
                context.run(unit, out)
            } else if out.len() < unit.len() {
                None
            } else {
                deflate::store(*wrapped, unit, out)
            }),
            Inner::Zstd { slow: true, .. } if out.len() < unit.len() && !may_shrink(unit) => Ok(None),
            Inner::Zstd { context, .. } => match context.compress2(out, unit) {
                Ok(len) => Ok(Some(len)),
                Err(code) if zstd_safe::get_error_name(code).contains("too small") => Ok(None),
                Err(code) => Err(zstd_error(code)),
            },
        }
    }
}

fn zstd_error(code: usize) -> Error {
    Error::Codec(format!("zstd: {}", zstd_safe::get_error_name(code)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Unpacker;

    fn text(len: usize) -> Vec<u8> {
        (0..len).map(|i| b"the quick brown fox "[i * i % 20]).collect()
    }

    /// Bytes that no codec can shrink.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1u64;
        std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .take(len)
        .collect()
    }

    #[test]
    fn round_trip_at_every_level() {
        let unit = text(65_536);
        let mut packed = vec![0; unit.len()];
        let mut back = vec![0; unit.len()];
        for codec in [Codec::Deflate, Codec::Zlib, Codec::Zstd] {
            for level in level_range(codec) {
                let len = Packer::new(codec, level).unwrap().pack(&unit, &mut packed).unwrap().unwrap();
                assert!(len < unit.len() / 2, "{codec:?} {level}");
                // Payloads are padded to sectors on disk.
                let padded = (len.next_multiple_of(512) + 512).min(packed.len());
                packed[len..padded].fill(0xa5);
                back.fill(0);
                assert_eq!(Unpacker::new().unpack(codec, &packed[..padded], &mut back), Ok(Some(len)));
                assert!(back == unit, "{codec:?} {level}");
            }
            assert_eq!(Packer::new(codec, 100).err(), Some(Error::Level(100)));
        }
    }

    #[cfg(not(feature = "pure-rust"))]
    #[test]
    fn by_default_some_units_are_packed_finer() {
        let mut packers = [
            Packer::new(Codec::Deflate, 1),
            Packer::new(Codec::Deflate, 2),
            Packer::by_default(Codec::Deflate),
        ]
        .map(|packer| packer.unwrap());
        let mut finer = 0;
        for seed in 0..200usize {
            let unit: Vec<u8> =
                (0..65_536usize).map(|i| b"the quick brown fox "[(i * i / 7 + i * seed) % 20]).collect();
            let [coarse, fine, mixed] = packers.each_mut().map(|packer| {
                let mut out = vec![0; unit.len()];
                let len = packer.pack(&unit, &mut out).unwrap().unwrap();
                out.truncate(len);
                out
            });
            assert!(mixed == coarse || mixed == fine);
            finer += usize::from(mixed != coarse);
        }
        assert!((5..60).contains(&finer), "{finer} of 200");
    }

    #[test]
    fn noise_is_not_packed() {
        let unit = noise(65_536);
        for codec in [Codec::Deflate, Codec::Zlib, Codec::Zstd] {
            let mut packer = Packer::new(codec, default_level(codec)).unwrap();
            assert_eq!(packer.pack(&unit, &mut vec![0; unit.len() - 1]), Ok(None), "{codec:?}");
            assert!(packer.pack(&text(65_536), &mut vec![0; 65_535]).unwrap().is_some(), "usable afterwards");
        }
    }

    #[test]
    fn noise_becomes_stored_blocks_where_it_must_be_packed() {
        for len in [512, 65_536, 1 << 20] {
            let unit = noise(len);
            for codec in [Codec::Deflate, Codec::Zlib] {
                let mut out = vec![0; len + len / 64 + 64];
                let mut packer = Packer::new(codec, default_level(codec)).unwrap();
                let packed = packer.pack(&unit, &mut out).unwrap().unwrap();
                assert!(packed < len + len / 512 + 16, "{codec:?} {len} {packed}");
                let mut back = vec![0; len];
                assert_eq!(Unpacker::new().unpack(codec, &out[..packed], &mut back), Ok(Some(packed)));
                assert!(back == unit);
            }
        }
    }
}
