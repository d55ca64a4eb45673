use diskmill::edit::ZeroHow;
use diskmill::{Error, Image, Reader, Source};

use crate::cache::UnitCache;
use crate::export::{Export, Failure, Run, Session};

/// An image of the library, with its backing chain, as a disk.
pub struct ImageExport {
    image: Image,
    writable: bool,
    /// Where anything in the chain is packed and nothing changes.
    cache: Option<UnitCache>,
}

impl ImageExport {
    /// Serves `image` for reading.
    #[must_use]
    pub fn new(image: Image) -> Self {
        let unit = image.chain().map(|(_, info)| info.packed_unit).max().unwrap_or(0);
        Self { cache: UnitCache::new(unit, image.size()), image, writable: false }
    }

    /// Serves `image`, which was opened with [`writable`](diskmill::OpenOptions::writable), for reading and writing.
    /// Clients' flushes are [`Image::flush`]; what they did not flush is durable after [`close`](Self::close).
    #[must_use]
    pub fn writable(image: Image) -> Self {
        Self { image, writable: true, cache: None }
    }

    /// Closes the image.
    ///
    /// # Errors
    /// As [`Image::close`].
    pub fn close(self) -> Result<(), Error> {
        self.image.close()
    }
}

impl Export for ImageExport {
    fn size(&self) -> u64 {
        self.image.size()
    }

    fn is_writable(&self) -> bool {
        self.writable
    }

    fn description(&self) -> String {
        format!("{} image", self.image.info().format)
    }

    fn status(&self, at: u64, max: u64) -> Result<Run, Failure> {
        let extent = self.image.map(at, max).map_err(|error| error.error)?;
        Ok(Run { len: extent.guest.end - extent.guest.start, hole: extent.source == Source::Zero })
    }

    fn session(&self) -> Box<dyn Session + '_> {
        Box::new(ImageSession { export: self, reader: self.image.reader() })
    }
}

struct ImageSession<'a> {
    export: &'a ImageExport,
    reader: Reader<'a>,
}

impl Session for ImageSession<'_> {
    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<(), Failure> {
        let Some(cache) = &self.export.cache else {
            return Ok(self.reader.read_at(buf, at)?);
        };
        let mut rest = buf;
        let mut at = at;
        while !rest.is_empty() {
            let extent = self.export.image.map(at, rest.len() as u64).map_err(|error| error.error)?;
            // At most the rest, which fits.
            let len = (extent.guest.end - extent.guest.start) as usize;
            let Some((part, behind)) = rest.split_at_mut_checked(len) else { break };
            match extent.source {
                // A whole unit is unpacked where it is wanted; a part of one is worth keeping for its neighbours.
                Source::Packed { unit, .. } if part.len() < unit as usize => {
                    cache.read(part, at, &mut self.reader)?;
                }
                _ => self.reader.read_at(part, at)?,
            }
            at = extent.guest.end;
            rest = behind;
        }
        Ok(())
    }

    fn write_at(&mut self, buf: &[u8], at: u64) -> Result<(), Failure> {
        Ok(self.export.image.write_at(buf, at)?)
    }

    fn write_zeroes(&mut self, at: u64, len: u64, keep_allocated: bool) -> Result<(), Failure> {
        let how = if keep_allocated { ZeroHow::KeepAllocated } else { ZeroHow::MayUnmap };
        Ok(self.export.image.write_zeroes(at, len, how)?)
    }

    fn discard(&mut self, at: u64, len: u64) -> Result<(), Failure> {
        Ok(self.export.image.discard(at, len)?)
    }

    fn flush(&mut self) -> Result<(), Failure> {
        Ok(self.export.image.flush()?)
    }
}
