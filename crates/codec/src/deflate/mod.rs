//! The engine for deflate that this build has: libdeflate, or zlib-rs with the feature `pure-rust`. Both take whole
//! units and have the same functions.

#[cfg(not(feature = "pure-rust"))]
mod libdeflate;
#[cfg(feature = "pure-rust")]
mod zlib_rs;

#[cfg(not(feature = "pure-rust"))]
pub(crate) use libdeflate::{Deflate, ENGINE, Inflate, LEVEL, LEVEL_WRAPPED, LEVELS, adler32};
#[cfg(feature = "pure-rust")]
pub(crate) use zlib_rs::{Deflate, ENGINE, Inflate, LEVEL, LEVEL_WRAPPED, LEVELS, adler32};

/// The zlib header of a deflate stream with a window of up to 32 KiB (RFC 1950): CMF and FLG.
pub(crate) const ZLIB_HEADER: [u8; 2] = [0x78, 0x9c];
/// Most bytes in a stored block (RFC 1951, 3.2.4).
const STORED: usize = 0xffff;

/// Puts parts one behind the other.
pub(crate) struct Output<'a> {
    room: &'a mut [u8],
    end: usize,
}

impl<'a> Output<'a> {
    pub(crate) const fn new(room: &'a mut [u8]) -> Self {
        Self { room, end: 0 }
    }

    /// `None` if there is no room for `bytes`.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Option<()> {
        let next = self.end.checked_add(bytes.len())?;
        self.room.get_mut(self.end..next)?.copy_from_slice(bytes);
        self.end = next;
        Some(())
    }

    /// Bytes so far.
    pub(crate) const fn len(&self) -> usize {
        self.end
    }
}

/// Writes `unit` as a deflate stream of stored blocks. Returns its length, or `None` if it does not fit.
pub(crate) fn store(wrapped: bool, unit: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut out = Output::new(out);
    if wrapped {
        out.put(&ZLIB_HEADER)?;
    }
    let mut blocks = unit.chunks(STORED).peekable();
    while let Some(block) = blocks.next() {
        let len = (block.len() as u16).to_le_bytes();
        // BFINAL in bit 0, BTYPE 00; then LEN and its complement.
        out.put(&[u8::from(blocks.peek().is_none()), len[0], len[1], !len[0], !len[1]])?;
        out.put(block)?;
    }
    if wrapped {
        out.put(&adler32(unit).to_be_bytes())?;
    }
    Some(out.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_blocks_are_read_back() {
        for len in [1, STORED - 1, STORED, STORED + 1, 1 << 20] {
            let unit: Vec<u8> = (0..len).map(|at| (at * at / 8) as u8).collect();
            for wrapped in [false, true] {
                let mut out = vec![0; len + 128];
                let packed = store(wrapped, &unit, &mut out).unwrap();
                let mut back = vec![0; len];
                let got = Inflate::new().unwrap().run(wrapped, &out[..packed], &mut back);
                assert_eq!(got, Some((packed, len)));
                assert!(back == unit);
                assert_eq!(store(wrapped, &unit, &mut out[..packed - 1]), None);
            }
        }
    }

    #[test]
    fn adler32_is_that_of_rfc_1950() {
        assert_eq!(adler32(b""), 1);
        assert_eq!(adler32(b"Wikipedia"), 0x11e6_0398);
    }

    /// The libraries do not tell their versions, so the constant could become stale.
    #[test]
    fn the_named_engine_is_the_one_in_the_lock_file() {
        let lock = concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.lock");
        let Ok(lock) = std::fs::read_to_string(lock) else { return };
        let (name, version) = ENGINE.split_once(' ').unwrap();
        let package = if name == "libdeflate" { "libdeflate-sys" } else { name };
        let locked = lock.split_once(&format!("name = \"{package}\"\nversion = \"")).unwrap().1;
        assert!(locked.starts_with(&format!("{version}.")), "{ENGINE}, but {}", &locked[..12]);
    }
}
