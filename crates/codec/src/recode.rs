use crate::Codec;
use crate::deflate::{Output, ZLIB_HEADER, adler32};

/// Bytes of the Adler-32 behind a deflate stream in its zlib wrapper.
const ZLIB_TRAILER: usize = 4;

/// Writes a payload packed with `from` as one packed with `to` into `out`, without packing anew: the payload as it is,
/// or the same deflate stream in or out of its zlib wrapper. `unit` is what it unpacks to.
///
/// Returns the length; `None` if the codecs have nothing in common, or `out` is too small.
pub fn rewrap(from: Codec, to: Codec, payload: &[u8], unit: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut out = Output::new(out);
    match (from, to) {
        (from, to) if from == to => out.put(payload)?,
        (Codec::Zlib, Codec::Deflate) => {
            let stream = payload.get(ZLIB_HEADER.len()..payload.len().checked_sub(ZLIB_TRAILER)?)?;
            out.put(stream)?;
        }
        (Codec::Deflate, Codec::Zlib) => {
            out.put(&ZLIB_HEADER)?;
            out.put(payload)?;
            out.put(&adler32(unit).to_be_bytes())?;
        }
        _ => return None,
    }
    Some(out.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Packer, Unpacker};

    #[test]
    fn each_codec_reads_what_it_was_given() {
        let unit: Vec<u8> = (0..65_536u32).map(|at| (at / 100) as u8).collect();
        let codecs = [Codec::Deflate, Codec::Zlib, Codec::Zstd];
        for from in codecs {
            let mut packed = vec![0; unit.len()];
            let len = Packer::new(from, 3).unwrap().pack(&unit, &mut packed).unwrap().unwrap();
            for to in codecs {
                let mut out = vec![0; unit.len()];
                let related = from == to || (from != Codec::Zstd && to != Codec::Zstd);
                let Some(done) = rewrap(from, to, &packed[..len], &unit, &mut out) else {
                    assert!(!related, "{from:?} to {to:?}");
                    continue;
                };
                assert!(related);
                let mut back = vec![0; unit.len()];
                assert_eq!(Unpacker::new().unpack(to, &out[..done], &mut back), Ok(Some(done)));
                assert!(back == unit, "{from:?} to {to:?}");
                assert_eq!(rewrap(from, to, &packed[..len], &unit, &mut out[..done - 1]), None);
            }
        }
    }
}
