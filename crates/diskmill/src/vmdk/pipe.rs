use diskmill_codec::{Codec, Unpacker};
use diskmill_format::Limits;
use diskmill_format::vmdk::sparse::HEADER_BYTES;
use diskmill_format::vmdk::{Marker, SECTOR_BYTES, SparseGeometry, SparseHeader, marker};
use diskmill_io::PipeReader;

use crate::error::{Error, Result};

const GRAIN_LEAD: usize = marker::GRAIN_MARKER_BYTES as usize;
/// How much is read at once where nothing is kept.
const SKIP: u64 = 64 << 10;

/// A streamOptimized VMDK that comes through a pipe: read front to back by its markers, without its tables.
pub struct VmdkStream {
    pipe: PipeReader,
    geometry: SparseGeometry,
    /// Offset of the next byte in the stream.
    at: u64,
    /// The grain whose marker was read last and whose payload is next.
    next: Option<Grain>,
    /// The first guest byte that a grain may still come for.
    least: u64,
    /// What a stream must have before it may end, and has not had yet.
    missing: Missing,
    ended: bool,
    unpacker: Unpacker,
}

/// The parts at the end of a stream. Without them a sector of zeros is no end but damage: a hole in a file, say.
#[derive(Debug, Clone, Copy)]
struct Missing {
    directory: bool,
    footer: bool,
}

/// A grain in the stream.
#[derive(Debug, Clone, Copy)]
struct Grain {
    guest: u64,
    /// The sector in which its marker and the first bytes of its payload stand.
    sector: [u8; HEADER_BYTES],
    size: u32,
}

/// A payload that [`VmdkStream::take`] has read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Payload {
    /// The first guest byte.
    pub(crate) guest: u64,
    /// Bytes of the payload.
    pub(crate) len: usize,
    /// Bytes that it unpacks to.
    pub(crate) unit: usize,
    /// Guest bytes of it: less than `unit` at the end of the disk.
    pub(crate) used: usize,
    /// Offset in the stream.
    pub(crate) host: u64,
}

impl VmdkStream {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Kind::NotThisFormat`](crate::Kind::NotThisFormat) if it is none of a VMDK;
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) for a kind whose tables are needed to read it.
    pub fn new(pipe: PipeReader, limits: &Limits) -> Result<Self> {
        let mut sector = [0; HEADER_BYTES];
        let mut made = Self {
            pipe,
            geometry: SparseHeader::stream_optimized(0).geometry(limits)?,
            at: 0,
            next: None,
            least: 0,
            missing: Missing { directory: true, footer: true },
            ended: false,
            unpacker: Unpacker::new(),
        };
        let got = made.fill(&mut sector)?;
        let header = SparseHeader::parse(sector.get(..got).unwrap_or_default())?;
        // With the directory in front (QEMU, open-vmdk) nothing says where the stream ends.
        if !(header.gd_offset >= header.overhead && header.compressed() && header.markers()) {
            return Err(Error::unsupported("this kind of VMDK from a pipe").hint("save it to a file first"));
        }
        made.geometry = header.geometry(limits)?;
        made.missing.footer = header.directory_in_footer();
        if !made.geometry.grain_bytes.is_power_of_two() {
            return Err(Error::unsupported("grains of this size from a pipe").hint("save it to a file first"));
        }
        made.skip(header.overhead.saturating_mul(SECTOR_BYTES).saturating_sub(HEADER_BYTES as u64))?;
        made.advance()?;
        Ok(made)
    }

    /// Size of the disk in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.geometry.capacity_bytes
    }

    pub(crate) const fn grain_bytes(&self) -> u64 {
        self.geometry.grain_bytes
    }

    /// Bytes of a buffer that [`take`](Self::take) needs at most.
    pub(crate) const fn most_for_grain(&self) -> u64 {
        // As `Marker::check_size` says, and padding.
        self.geometry.grain_bytes.saturating_mul(2).saturating_add(SECTOR_BYTES)
    }

    /// The guest offset of the next grain; `None` behind the last one.
    pub(crate) const fn next_guest(&self) -> Option<u64> {
        match self.next {
            Some(Grain { guest, .. }) => Some(guest),
            None => None,
        }
    }

    /// Reads the payload of the next grain into the start of `buf`, if it has the room. `None` if it has not, or behind
    /// the last grain.
    pub(crate) fn take(&mut self, buf: &mut [u8]) -> Result<Option<Payload>> {
        let Some(Grain { guest, sector, size }) = self.next else { return Ok(None) };
        let len = size as usize;
        // What is read is whole sectors: marker, payload and padding.
        let whole = (GRAIN_LEAD + len).next_multiple_of(HEADER_BYTES);
        let Some(room) = buf.get_mut(..whole - GRAIN_LEAD) else { return Ok(None) };
        let host = self.at - HEADER_BYTES as u64 + marker::GRAIN_MARKER_BYTES;
        let (first, rest) = room.split_at_mut(HEADER_BYTES - GRAIN_LEAD);
        first.copy_from_slice(sector.get(GRAIN_LEAD..).unwrap_or_default());
        if self.fill(rest)? < rest.len() {
            return Err(self.cut_off());
        }
        let grain = self.geometry.grain_bytes;
        let used = self.geometry.grain_len(guest / grain);
        let mut unit = grain as usize;
        if used < grain {
            // Some writers pad the last grain, some do not.
            let mut unpacked = vec![0; unit];
            let packed = room.get(..len).unwrap_or_default();
            if let Err(diskmill_codec::Error::WrongLength { got, .. }) =
                self.unpacker.unpack(Codec::Zlib, packed, &mut unpacked)
                && got as u64 >= used
            {
                unit = got;
            }
        }
        self.least = guest + grain;
        self.advance()?;
        Ok(Some(Payload { guest, len, unit, used: used as usize, host }))
    }

    /// Goes on to the marker of the next grain.
    fn advance(&mut self) -> Result<()> {
        self.next = None;
        while !self.ended {
            let at = self.at;
            let mut sector = [0; HEADER_BYTES];
            if self.fill(&mut sector)? < HEADER_BYTES {
                return Err(self.cut_off());
            }
            let marker = Marker::parse(&sector).map_err(|error| error.at(at))?;
            marker.check_size(self.geometry.grain_bytes).map_err(|error| error.at(at))?;
            match marker {
                Marker::EndOfStream if self.missing.directory || self.missing.footer => {
                    let part = if self.missing.directory { "grain directory" } else { "footer" };
                    let message = format!("a sector of zeros before the {part}: part of the stream is lost");
                    return Err(Error::corrupt("stream", Some(at), message));
                }
                Marker::EndOfStream => {
                    self.ended = true;
                    // What is left unread would break the writer's pipe.
                    self.skip(u64::MAX)?;
                }
                Marker::Grain { lba, size } => {
                    let guest = self.guest_offset(lba, at)?;
                    self.next = Some(Grain { guest, sector, size });
                    return Ok(());
                }
                Marker::GrainTable { sectors }
                | Marker::GrainDirectory { sectors }
                | Marker::Footer { sectors } => {
                    self.missing.directory &= !matches!(marker, Marker::GrainDirectory { .. });
                    self.missing.footer &= !matches!(marker, Marker::Footer { .. });
                    let bytes = sectors.saturating_mul(SECTOR_BYTES);
                    if self.skip(bytes)? < bytes {
                        return Err(self.cut_off());
                    }
                }
            }
        }
        Ok(())
    }

    fn guest_offset(&self, lba: u64, at: u64) -> Result<u64> {
        let corrupt = |message: String| Err(Error::corrupt("grain marker", Some(at), message));
        let guest = lba.checked_mul(SECTOR_BYTES).filter(|&guest| guest < self.size());
        match guest {
            Some(guest) if guest % self.geometry.grain_bytes != 0 => {
                corrupt(format!("guest sector {lba} is no multiple of the grain size"))
            }
            Some(guest) if guest < self.least => {
                let error =
                    Error::unsupported(format!("a stream whose grains do not ascend (guest sector {lba})"));
                Err(error.within("grain marker", at).hint("save it to a file first"))
            }
            Some(guest) => Ok(guest),
            None => corrupt(format!("guest sector {lba} lies past the end of the disk")),
        }
    }

    fn cut_off(&self) -> Error {
        Error::corrupt("stream", Some(self.at), "it ends without an end-of-stream marker: it is cut off")
    }

    /// Fills `buf` as far as the pipe has bytes.
    fn fill(&mut self, buf: &mut [u8]) -> Result<usize> {
        let got = self.pipe.fill(buf).map_err(|error| Error::io("cannot read from the pipe", error))?;
        self.at = self.at.saturating_add(got as u64);
        Ok(got)
    }

    /// Reads past at most `bytes`; gives how many there were.
    fn skip(&mut self, bytes: u64) -> Result<u64> {
        let mut buf = vec![0; SKIP.min(bytes) as usize];
        let mut done = 0;
        while done < bytes {
            let step = (bytes - done).min(SKIP) as usize;
            let got = self.fill(buf.get_mut(..step).unwrap_or_default())?;
            done += got as u64;
            if got < step {
                break;
            }
        }
        Ok(done)
    }
}
