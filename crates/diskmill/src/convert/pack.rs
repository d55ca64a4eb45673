use std::ops::Range;

use diskmill_codec::{Codec, Packer, rewrap};
use diskmill_io::Buf;

use super::Monitor;
use super::assembler::{Frame, Unit};
use crate::error::{Error, Result};

/// A payload of the source that is a whole unit of the output, unpacked and found good.
pub(super) struct Pass {
    /// Its place in the guest area, in bytes.
    pub(super) at: usize,
    /// How it is packed.
    pub(super) codec: Codec,
    /// Its place in the buffer.
    pub(super) payload: Range<usize>,
    /// Nobody has unpacked it: its bytes in the guest area mean nothing.
    pub(super) unread: bool,
}

/// Packs the units of one job.
pub(super) struct JobPacker<'a> {
    pub(super) packer: &'a mut Packer,
    pub(super) codec: Codec,
    pub(super) frame: Option<Frame>,
    /// Bytes in a unit.
    pub(super) unit: usize,
    pub(super) monitor: &'a Monitor,
}

impl JobPacker<'_> {
    /// Packs the units of the guest area, the first `filled` bytes of `buf`, one behind the other into `scratch`: all
    /// but those that are zero. Units that the source has packed already (`passes`, in guest order) are only put into
    /// another wrapper.
    pub(super) fn pack(
        &mut self,
        guest: u64,
        buf: &[u8],
        filled: usize,
        passes: &[Pass],
        units: &mut [Unit],
        scratch: &mut Buf,
    ) -> Result<()> {
        scratch.set_len(scratch.capacity());
        let area = buf.get(..filled).ok_or_else(no_room)?;
        let mut passes = passes.iter().peekable();
        let mut end = 0;
        for ((bytes, state), at) in area.chunks(self.unit).zip(units).zip((0..).step_by(self.unit)) {
            let pass = passes.next_if(|pass| pass.at == at);
            if *state == Unit::Zero {
                continue;
            }
            let unread = pass.is_some_and(|pass| pass.unread);
            let pass = pass.and_then(|pass| Some((pass.codec, buf.get(pass.payload.clone())?)));
            let room = scratch.get_mut(end..).ok_or_else(no_room)?;
            if let (true, Some((codec, payload))) = (unread, pass) {
                // There is nothing to pack instead.
                let len = rewrap(codec, self.codec, payload, &[], room).ok_or_else(no_room)?;
                self.monitor.add_passed(bytes.len() as u64);
                *state = Unit::Packed { at: end, len: len as u32 };
                end += len;
                continue;
            }
            let used = match self.frame {
                Some(frame) => self.framed(frame, guest + at as u64, bytes, pass, room, state)?,
                None => self.plain(bytes, pass, room, state)?,
            };
            *state = match *state {
                Unit::Packed { at: _, len } => Unit::Packed { at: end, len },
                _ => Unit::Stored { at: end },
            };
            end += used;
        }
        Ok(())
    }

    /// A unit that is stored as it is if packing does not make it smaller.
    fn plain(
        &mut self,
        bytes: &[u8],
        pass: Option<(Codec, &[u8])>,
        room: &mut [u8],
        state: &mut Unit,
    ) -> Result<usize> {
        let smaller = room.get_mut(..bytes.len().saturating_sub(1)).ok_or_else(no_room)?;
        if let Some(len) = self.payload(bytes, pass, smaller)? {
            *state = Unit::Packed { at: 0, len: len as u32 };
            return Ok(len);
        }
        room.get_mut(..bytes.len()).ok_or_else(no_room)?.copy_from_slice(bytes);
        Ok(bytes.len())
    }

    /// A unit that is packed in any case, in its frame.
    fn framed(
        &mut self,
        frame: Frame,
        guest: u64,
        bytes: &[u8],
        pass: Option<(Codec, &[u8])>,
        room: &mut [u8],
        state: &mut Unit,
    ) -> Result<usize> {
        let (lead, room) = room.split_at_mut_checked(frame.lead).ok_or_else(no_room)?;
        let payload = room.get_mut(..Frame::payload_room(self.unit)).ok_or_else(no_room)?;
        let len = self.payload(bytes, pass, payload)?.ok_or_else(no_room)?;
        (frame.fill)(guest, len as u32, lead);
        let whole = (frame.lead + len).next_multiple_of(frame.align);
        room.get_mut(len..whole - frame.lead).ok_or_else(no_room)?.fill(0);
        *state = Unit::Packed { at: 0, len: whole as u32 };
        Ok(whole)
    }

    /// The payload of a unit: the source's own, if there is one and it fits, or a new one.
    fn payload(
        &mut self,
        bytes: &[u8],
        pass: Option<(Codec, &[u8])>,
        out: &mut [u8],
    ) -> Result<Option<usize>> {
        if let Some((codec, payload)) = pass
            && let Some(len) = rewrap(codec, self.codec, payload, bytes, out)
        {
            self.monitor.add_passed(bytes.len() as u64);
            return Ok(Some(len));
        }
        let packed = self.packer.pack(bytes, out).map_err(|error| Error::invalid(error.to_string()))?;
        self.monitor.add_packed(bytes.len() as u64);
        Ok(packed)
    }
}

fn no_room() -> Error {
    Error::invalid("no room for packed units")
}
