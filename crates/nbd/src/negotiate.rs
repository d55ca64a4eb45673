//! The fixed newstyle negotiation (specification, "Handshake phase").

use std::io::{self, Read, Write};

use byteorder::{BE, ReadBytesExt, WriteBytesExt};

use crate::protocol::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, MAX_OPTION, MAX_OPTIONS, MAX_REQUEST, MAX_SKIPPED, MAX_STRING,
    MIN_BLOCK, NBD_MAGIC, OPTION_MAGIC, PREFERRED_BLOCK, handshake, info, option, put_option_reply, reply,
    transmission, violation,
};

/// What is on offer: one export.
#[derive(Debug, Clone)]
pub(crate) struct Offer {
    /// Its name. The empty name means it in any case, being the only one.
    pub(crate) name: String,
    /// For people.
    pub(crate) description: String,
    /// Bytes.
    pub(crate) size: u64,
    /// Whether it may be written.
    pub(crate) writable: bool,
    /// Whether a client may connect more than once at the same time.
    pub(crate) multi_conn: bool,
}

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Agreed {
    /// Replies come in chunks.
    pub(crate) structured: bool,
    /// The client may ask for `base:allocation`.
    pub(crate) allocation: bool,
}

/// Talks with a client until it wants the export; `None` if it leaves in good order.
///
/// # Errors
/// `InvalidData` if the client breaks the protocol, and whatever the socket says. The connection is to be closed.
pub(crate) fn negotiate(stream: &mut (impl Read + Write), offer: &Offer) -> io::Result<Option<Agreed>> {
    let mut hello = Vec::with_capacity(18);
    hello.write_u64::<BE>(NBD_MAGIC)?;
    hello.write_u64::<BE>(OPTION_MAGIC)?;
    hello.write_u16::<BE>(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES)?;
    stream.write_all(&hello)?;
    let flags = stream.read_u32::<BE>()?;
    if flags & !u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES) != 0 {
        return Err(violation(format!("unknown flags {flags:#x}")));
    }
    if flags & u32::from(handshake::FIXED_NEWSTYLE) == 0 {
        return Err(violation("a client older than the fixed newstyle negotiation is not supported"));
    }
    let mut talk = Talk {
        offer,
        no_zeroes: flags & u32::from(handshake::NO_ZEROES) != 0,
        agreed: Agreed::default(),
        out: Vec::new(),
    };
    for _ in 0..MAX_OPTIONS {
        let next = talk.option(stream)?;
        stream.write_all(&talk.out)?;
        talk.out.clear();
        match next {
            Next::Option => {}
            Next::Transmission => return Ok(Some(talk.agreed)),
            Next::Leave => return Ok(None),
        }
    }
    Err(violation(format!("more than {MAX_OPTIONS} options")))
}

enum Next {
    /// Another option.
    Option,
    /// Requests follow.
    Transmission,
    /// The client is done.
    Leave,
}

struct Talk<'a> {
    offer: &'a Offer,
    no_zeroes: bool,
    agreed: Agreed,
    /// Replies to the current option.
    out: Vec<u8>,
}

impl Talk<'_> {
    /// Reads an option and prepares the replies.
    fn option(&mut self, stream: &mut impl Read) -> io::Result<Next> {
        let magic = stream.read_u64::<BE>()?;
        if magic != OPTION_MAGIC {
            return Err(violation(format!("an option that starts with {magic:#018x}")));
        }
        let option = stream.read_u32::<BE>()?;
        let len = stream.read_u32::<BE>()?;
        if len > MAX_SKIPPED || (len > MAX_OPTION && option == option::EXPORT_NAME) {
            return Err(violation(format!("option {option} of {len} bytes")));
        }
        if len > MAX_OPTION {
            let skipped = io::copy(&mut stream.take(len.into()), &mut io::sink())?;
            if skipped < u64::from(len) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.refuse(option, reply::ERR_TOO_BIG, "too long")?;
            return Ok(Next::Option);
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        match option {
            option::EXPORT_NAME => {
                // There is no reply that could refuse it.
                if !self.is_known(&data) {
                    return Err(violation("an export that does not exist"));
                }
                self.out.write_u64::<BE>(self.offer.size)?;
                self.out.write_u16::<BE>(self.flags())?;
                if !self.no_zeroes {
                    self.out.extend([0; 124]);
                }
                return Ok(Next::Transmission);
            }
            option::ABORT => {
                self.reply(option, reply::ACK, &[])?;
                return Ok(Next::Leave);
            }
            option::INFO | option::GO => return self.info(option, &data),
            option::LIST | option::STRUCTURED_REPLY if !data.is_empty() => {
                self.refuse(option, reply::ERR_INVALID, "this option has no data")?;
            }
            option::LIST => {
                let mut server = Vec::new();
                put_string(&mut server, self.offer.name.as_bytes())?;
                server.extend(self.offer.description.as_bytes());
                self.reply(option, reply::SERVER, &server)?;
                self.reply(option, reply::ACK, &[])?;
            }
            option::STRUCTURED_REPLY => {
                self.agreed.structured = true;
                self.reply(option, reply::ACK, &[])?;
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, &data)?,
            // STARTTLS and EXTENDED_HEADERS, too.
            _ => self.refuse(option, reply::ERR_UNSUP, "this option is not supported")?,
        }
        Ok(Next::Option)
    }

    fn info(&mut self, option: u32, data: &[u8]) -> io::Result<Next> {
        let Some((name, wanted)) = parse_info(data) else {
            self.refuse(option, reply::ERR_INVALID, "the data of this option is malformed")?;
            return Ok(Next::Option);
        };
        if !self.is_known(name) {
            self.refuse(option, reply::ERR_UNKNOWN, "there is no export of this name")?;
            return Ok(Next::Option);
        }
        let mut export = Vec::with_capacity(12);
        export.write_u16::<BE>(info::EXPORT)?;
        export.write_u64::<BE>(self.offer.size)?;
        export.write_u16::<BE>(self.flags())?;
        self.reply(option, reply::INFO, &export)?;
        // What was not asked for may be told, too.
        let mut block = Vec::with_capacity(14);
        block.write_u16::<BE>(info::BLOCK_SIZE)?;
        for size in [MIN_BLOCK, PREFERRED_BLOCK, MAX_REQUEST] {
            block.write_u32::<BE>(size)?;
        }
        self.reply(option, reply::INFO, &block)?;
        for (kind, text) in [(info::NAME, &self.offer.name), (info::DESCRIPTION, &self.offer.description)] {
            if wanted.chunks_exact(2).any(|request| request == kind.to_be_bytes()) {
                let text = [&kind.to_be_bytes(), text.as_bytes()].concat();
                self.reply(option, reply::INFO, &text)?;
            }
        }
        self.reply(option, reply::ACK, &[])?;
        Ok(if option == option::GO { Next::Transmission } else { Next::Option })
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // Whatever comes of it, what was set before is void.
            self.agreed.allocation = false;
        }
        let Some((name, queries)) = parse_contexts(data) else {
            return self.refuse(option, reply::ERR_INVALID, "the data of this option is malformed");
        };
        if set && !self.agreed.structured {
            return self.refuse(option, reply::ERR_INVALID, "structured replies must be negotiated first");
        }
        if !self.is_known(name) {
            return self.refuse(option, reply::ERR_UNKNOWN, "there is no export of this name");
        }
        let found = if set {
            queries.contains(&BASE_ALLOCATION)
        } else {
            queries.is_empty() || queries.iter().any(|query| [b"base:", BASE_ALLOCATION].contains(query))
        };
        if found {
            // For a list the number means nothing.
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            self.reply(option, reply::META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION].concat())?;
            self.agreed.allocation |= set;
        }
        self.reply(option, reply::ACK, &[])
    }

    fn is_known(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.offer.name.as_bytes()
    }

    fn flags(&self) -> u16 {
        use transmission::{
            CAN_MULTI_CONN, HAS_FLAGS, READ_ONLY, SEND_CACHE, SEND_DF, SEND_FLUSH, SEND_FUA, SEND_TRIM,
            SEND_WRITE_ZEROES,
        };
        let access = if self.offer.writable { SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES } else { READ_ONLY };
        let structured = if self.agreed.structured { SEND_DF } else { 0 };
        // Of a client that is told so, the second connection would be turned away.
        let multi_conn = if self.offer.multi_conn { CAN_MULTI_CONN } else { 0 };
        HAS_FLAGS | SEND_FLUSH | SEND_CACHE | multi_conn | access | structured
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        put_option_reply(&mut self.out, option, kind, data)
    }

    fn refuse(&mut self, option: u32, kind: u32, why: &str) -> io::Result<()> {
        self.reply(option, kind, why.as_bytes())
    }
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) -> io::Result<()> {
    out.write_u32::<BE>(u32::try_from(text.len()).unwrap_or(u32::MAX))?;
    out.write_all(text)
}

/// A string with its length in front of it.
fn take_string<'d>(data: &mut &'d [u8]) -> Option<&'d [u8]> {
    let len = data.read_u32::<BE>().ok().filter(|&len| len <= MAX_STRING)?;
    data.split_off(..len as usize)
}

/// The name of the export and the information requests, two bytes each.
fn parse_info(mut data: &[u8]) -> Option<(&[u8], &[u8])> {
    let name = take_string(&mut data)?;
    let count = data.read_u16::<BE>().ok()?;
    (data.len() == usize::from(count) * 2).then_some((name, data))
}

/// The name of the export and the queries.
fn parse_contexts(mut data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let name = take_string(&mut data)?;
    let count = data.read_u32::<BE>().ok()?;
    // Each takes at least the four bytes of its length.
    if count as usize > data.len() / 4 {
        return None;
    }
    let queries = (0..count).map(|_| take_string(&mut data)).collect::<Option<Vec<_>>>()?;
    data.is_empty().then_some((name, queries))
}
