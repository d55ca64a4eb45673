use diskmill_codec::Unpacker;
use diskmill_io::Storage;

use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::layout::{Extent, Source};

/// Fills `buf` from `at` on, up to the end of the storage. Returns the bytes read.
pub(crate) fn read_full(file: &dyn Storage, buf: &mut [u8], at: u64) -> Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let position = at.saturating_add(filled as u64);
        match file.read_at(rest, position) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io(format!("cannot read at offset {position:#x}"), error)),
        }
    }
    Ok(filled)
}

/// Fills all of `buf`, or says that the file ends before.
pub(crate) fn read_exact(file: &dyn Storage, buf: &mut [u8], at: u64) -> Result<()> {
    let want = buf.len();
    let got = read_full(file, buf, at)?;
    if got < want {
        return Err(Error::new(
            Kind::Corrupt,
            format!(
                "the file ends at offset {:#x}, inside data that belongs to the image",
                at.saturating_add(got as u64)
            ),
        ));
    }
    Ok(())
}

/// Reads guest bytes of an [`Image`], with a codec context and the last unpacked unit of its own.
pub struct Reader<'a> {
    image: &'a Image,
    scratch: Scratch,
}

/// What a [`Reader`] needs to unpack, and the last unit that it unpacked.
pub(crate) struct Scratch {
    unpacker: Unpacker,
    packed: Vec<u8>,
    unit: Vec<u8>,
    /// Which payload `unit` holds, and how many had been written into the image when it was read.
    held: Option<(Source, u64)>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { unpacker: Unpacker::new(), packed: Vec::new(), unit: Vec::new(), held: None }
    }
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(image: &'a Image, scratch: Scratch) -> Self {
        Self { image, scratch }
    }

    pub(crate) fn into_scratch(self) -> Scratch {
        self.scratch
    }

    /// Fills `buf` with the guest bytes from `at` on. Bytes past the end of the disk read as zeros.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] for a damaged table or unit or a truncated file, [`Kind::Io`] if the system fails.
    pub fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        let _guard = self.image.guard(at, buf.len() as u64);
        self.read_unlocked(buf, at)
    }

    /// As [`read_at`](Self::read_at); the caller keeps writers away from the range.
    pub(crate) fn read_unlocked(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let position = at.saturating_add(filled as u64);
            if position >= self.image.size() {
                rest.fill(0);
                break;
            }
            let extent = self.image.map(position, rest.len() as u64).map_err(|error| error.error)?;
            let len = (extent.guest.end - extent.guest.start) as usize;
            let Some(part) = rest.get_mut(..len) else { break };
            self.read_extent(&extent, part)?;
            filled += len;
        }
        Ok(())
    }

    /// Fills `part` with the first bytes of `extent`.
    pub(crate) fn read_extent(&mut self, extent: &Extent, part: &mut [u8]) -> Result<()> {
        match extent.source {
            Source::Zero => part.fill(0),
            Source::Raw { file, at } => {
                let file = self.image.file(file)?;
                read_exact(&*file.storage, part, at.get()).map_err(|error| error.of(&file.path))?;
            }
            Source::Packed { skip, .. } => {
                self.unpack(extent.source)?;
                let skip = skip as usize;
                match self.scratch.unit.get(skip..).and_then(|rest| rest.get(..part.len())) {
                    Some(bytes) => part.copy_from_slice(bytes),
                    None => return Err(Error::invalid("a run reaches past its packed unit")),
                }
            }
        }
        Ok(())
    }

    fn unpack(&mut self, source: Source) -> Result<()> {
        let Source::Packed { file, at, len, unit, codec, .. } = source else { return Ok(()) };
        // A payload that is written may take the place of one that is gone. Counted after the map was asked: no payload is
        // in the map before it is counted.
        let key = (Source::Packed { file, at, len, unit, skip: 0, codec }, self.image.payloads_written());
        if self.scratch.held == Some(key) {
            return Ok(());
        }
        self.scratch.held = None;
        let file = self.image.file(file)?;
        self.scratch.packed.resize(len as usize, 0);
        self.scratch.unit.resize(unit as usize, 0);
        read_exact(&*file.storage, &mut self.scratch.packed, at.get())
            .and_then(|()| {
                self.scratch
                    .unpacker
                    .unpack(codec, &self.scratch.packed, &mut self.scratch.unit)
                    .map(|_| ())
                    .map_err(|error| Error::corrupt("compressed cluster", Some(at.get()), error.to_string()))
            })
            .map_err(|error| error.of(&file.path))?;
        self.scratch.held = Some(key);
        Ok(())
    }
}
