//! Packed clusters that are taken over from one image into another without being packed anew.

use std::ops::Range;

use diskmill_codec::{Codec, Unpacker, rewrap};

use crate::error::Result;
use crate::image::Image;
use crate::layout::{Extent, Source};
use crate::reader::{Reader, Scratch, read_exact};

/// Payloads of whole clusters, each unpacked and found good.
#[derive(Default)]
pub(crate) struct Payloads {
    bytes: Vec<u8>,
    /// The guest offset of each cluster, ascending, and its place in `bytes`.
    places: Vec<(u64, Range<usize>)>,
}

impl Payloads {
    /// The payload of the cluster at guest offset `at`.
    pub(crate) fn get(&self, at: u64) -> Option<&[u8]> {
        let index = self.places.binary_search_by_key(&at, |(guest, _)| *guest).ok()?;
        self.bytes.get(self.places.get(index)?.1.clone())
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.places.clear();
    }
}

/// Reads guest bytes, and keeps the payloads that another image can take over.
pub(super) struct PayloadReader<'a> {
    image: &'a Image,
    reader: Reader<'a>,
    /// How the other image packs, and its cluster size; `None` if it takes no payloads.
    fits: Option<(Codec, u64)>,
    unpacker: Unpacker,
    packed: Vec<u8>,
    payloads: Payloads,
}

impl<'a> PayloadReader<'a> {
    /// Reads `image`, for a target that packs units of this size with this codec.
    pub(super) fn new(image: &'a Image, fits: Option<(Codec, u64)>) -> Self {
        Self {
            image,
            reader: Reader::new(image, Scratch::default()),
            fits,
            unpacker: Unpacker::new(),
            packed: Vec::new(),
            payloads: Payloads::default(),
        }
    }

    /// Fills `buf` with the guest bytes from `at` on, which lie within the disk. Returns the payloads that stand for
    /// whole clusters of them.
    pub(super) fn read(&mut self, buf: &mut [u8], at: u64) -> Result<&Payloads> {
        self.payloads.clear();
        let Some((codec, unit)) = self.fits else {
            self.reader.read_at(buf, at)?;
            return Ok(&self.payloads);
        };
        let image = self.image;
        let _guard = image.guard(at, buf.len() as u64);
        let (mut here, mut rest) = (at, buf);
        while !rest.is_empty() {
            let extent = image.map(here, rest.len() as u64).map_err(|error| error.error)?;
            let len = (extent.guest.end.saturating_sub(here)).clamp(1, rest.len() as u64);
            let (part, after) = rest.split_at_mut(len as usize);
            if !self.keep(&extent, part, codec, unit)? {
                self.reader.read_unlocked(part, here)?;
            }
            (here, rest) = (here.saturating_add(len), after);
        }
        Ok(&self.payloads)
    }

    /// Unpacks into `part` what `extent` has, and keeps its payload, if that is a whole cluster of the target.
    fn keep(&mut self, extent: &Extent, part: &mut [u8], codec: Codec, unit: u64) -> Result<bool> {
        let Source::Packed { file, at, len, unit: packed_unit, skip: 0, codec: from } = extent.source else {
            return Ok(false);
        };
        let whole = u64::from(packed_unit) == unit
            && part.len() as u64 == unit
            && extent.guest.start.is_multiple_of(unit)
            // The tables tell lengths in sectors, so this may be one that does fit: it is packed anew.
            && u64::from(len) < unit;
        if !whole || !from.is_kin_of(codec) {
            return Ok(false);
        }
        self.packed.resize(len as usize, 0);
        read_exact(&*self.image.file(file)?.storage, &mut self.packed, at.get())?;
        // What does not unpack is the reader's to report, which knows how.
        let Ok(used) = self.unpacker.unpack(from, &self.packed, part) else { return Ok(false) };
        let start = self.payloads.bytes.len();
        self.payloads.bytes.resize(start + (unit as usize).saturating_sub(1), 0);
        let room = self.payloads.bytes.get_mut(start..).unwrap_or_default();
        let payload = used.and_then(|used| self.packed.get(..used));
        let kept = payload.and_then(|payload| rewrap(from, codec, payload, part, room));
        self.payloads.bytes.truncate(start + kept.unwrap_or(0));
        if let Some(len) = kept {
            self.payloads.places.push((extent.guest.start, start..start + len));
        }
        Ok(true)
    }
}

impl Image {
    /// How this image packs clusters, and their size; `None` if it cannot have packed ones.
    pub(super) fn takes_payloads(&self) -> Option<(Codec, u64)> {
        self.writer()?.qcow2()?.packs()
    }

    /// As [`write_compressed`](Self::write_compressed), with the clusters whose payloads are there already.
    pub(super) fn write_payloads(&self, buf: &[u8], at: u64, payloads: &Payloads) -> Result<()> {
        match self.writer_for(at, buf.len() as u64)? {
            Some((writer, _)) => self.named(writer.write_packed(self, buf, at, payloads)),
            None => Ok(()),
        }
    }
}
