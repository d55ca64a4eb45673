//! The numbers of the specification, and its fixed-size structures.

use std::io::{self, Read, Write};

use byteorder::{BE, ReadBytesExt, WriteBytesExt};

/// Bytes that one request may read or write at most: 32 MiB, what clients assume of a server that does not say
/// otherwise (specification, "Size constraints").
pub const MAX_REQUEST: u32 = 32 << 20;

/// The smallest and the preferred block, in bytes. Any byte can be addressed; 4 KiB suits every file system.
pub(crate) const MIN_BLOCK: u32 = 1;
pub(crate) const PREFERRED_BLOCK: u32 = 4096;

/// The longest string (export name, context name, message), in bytes (specification, "Conventions").
pub(crate) const MAX_STRING: u32 = 4096;
/// The longest name of an export, in bytes: clients cannot ask for a longer one.
pub const MAX_NAME: usize = MAX_STRING as usize;
/// The longest text for people (messages, descriptions), in characters: all that fit into a string, whatever they are.
pub(crate) const MAX_TEXT: usize = MAX_STRING as usize / 4;
/// The longest option data that is looked at, in bytes: room for a name and many queries.
pub(crate) const MAX_OPTION: u32 = 64 << 10;
/// The longest option data that is skipped; more ends the connection.
pub(crate) const MAX_SKIPPED: u32 = 32 << 20;
/// Options in one negotiation.
pub(crate) const MAX_OPTIONS: u32 = 256;

pub(crate) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags, the same for both sides.
pub(crate) mod handshake {
    pub(crate) const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub(crate) const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the negotiation.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = 0x8000_0001;
    pub(crate) const ERR_INVALID: u32 = 0x8000_0003;
    pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub(crate) const ERR_TOO_BIG: u32 = 0x8000_0009;
}

/// What `NBD_REP_INFO` tells.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub(crate) mod transmission {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
}

/// Requests.
pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub(crate) mod flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
}

/// Chunks of structured replies.
pub(crate) mod chunk {
    pub(crate) const DONE: u16 = 1 << 0;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const ERROR: u16 = 0x8001;
}

/// The context `base:allocation`: its name, the number that we give it, and its flags.
pub(crate) const BASE_ALLOCATION: &[u8] = b"base:allocation";
pub(crate) const BASE_ALLOCATION_ID: u32 = 1;
pub(crate) const STATE_HOLE: u32 = 1 << 0;
pub(crate) const STATE_ZERO: u32 = 1 << 1;

/// A request without its payload (specification, "Request message").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    /// The client's own mark, given back with each reply.
    pub(crate) cookie: u64,
    /// First byte.
    pub(crate) at: u64,
    /// Bytes.
    pub(crate) len: u32,
}

impl Request {
    /// Reads the next request.
    ///
    /// # Errors
    /// `InvalidData` for a wrong magic number, after which nothing that the client sends makes sense.
    pub(crate) fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut bytes = [0; 28];
        from.read_exact(&mut bytes)?;
        let mut bytes = &bytes[..];
        let magic = bytes.read_u32::<BE>()?;
        if magic != REQUEST_MAGIC {
            return Err(violation(format!("a request that starts with {magic:#010x}")));
        }
        Ok(Self {
            flags: bytes.read_u16::<BE>()?,
            command: bytes.read_u16::<BE>()?,
            cookie: bytes.read_u64::<BE>()?,
            at: bytes.read_u64::<BE>()?,
            len: bytes.read_u32::<BE>()?,
        })
    }

    pub(crate) const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Appends the header of a simple reply.
pub(crate) fn put_simple(out: &mut Vec<u8>, cookie: u64, error: u32) -> io::Result<()> {
    out.write_u32::<BE>(SIMPLE_REPLY_MAGIC)?;
    out.write_u32::<BE>(error)?;
    out.write_u64::<BE>(cookie)
}

/// Appends the header of a chunk with `len` bytes behind it.
pub(crate) fn put_chunk(out: &mut Vec<u8>, flags: u16, kind: u16, cookie: u64, len: usize) -> io::Result<()> {
    out.write_u32::<BE>(STRUCTURED_REPLY_MAGIC)?;
    out.write_u16::<BE>(flags)?;
    out.write_u16::<BE>(kind)?;
    out.write_u64::<BE>(cookie)?;
    out.write_u32::<BE>(u32::try_from(len).map_err(|_| violation("a chunk of 4 GiB or more"))?)
}

/// Appends a whole reply to an option.
pub(crate) fn put_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    out.write_u64::<BE>(OPTION_REPLY_MAGIC)?;
    out.write_u32::<BE>(option)?;
    out.write_u32::<BE>(kind)?;
    out.write_u32::<BE>(u32::try_from(data.len()).map_err(|_| violation("a reply of 4 GiB or more"))?)?;
    out.write_all(data)
}

/// The client broke the protocol in a way that leaves no way to go on.
pub(crate) fn violation(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the client broke the protocol: {}", what.into()))
}
