//! What guestfish's remote control reads and writes: bare XDR (RFC 4506) without record marks.
//!
//! The client says hello with its version, once, and then puts any number of calls; each is answered by a status. There
//! is no document of this: it was learnt from the bytes that `guestfish --remote` exchanges with `guestfish --listen`
//! (1.48.6).

use crate::{Error, Result};

/// The longest string that is sent, in bytes. guestfish takes a megabyte and more; an appliance's own message limit is
/// 4 MiB.
pub const MAX_STRING: usize = 4 << 20;

/// The most arguments that one call takes.
pub const MAX_ARGS: usize = 4096;

/// The most bytes that one call takes.
pub const MAX_CALL: usize = 16 << 20;

/// The length of an answer in bytes.
pub const STATUS_LEN: usize = 4;

/// The hello that opens a connection: the version, which must equal the server's.
///
/// # Errors
/// `Invalid` as for [`call`].
pub fn hello(version: &str) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    string(&mut out, version.as_bytes())?;
    Ok(out)
}

/// One call.
///
/// # Errors
/// `Invalid` for a NUL (the server would cut the argument there) and above [`MAX_STRING`], [`MAX_ARGS`] or [`MAX_CALL`].
pub fn call(name: &str, args: &[Vec<u8>]) -> Result<Vec<u8>> {
    let count = u32::try_from(args.len()).ok().filter(|_| args.len() <= MAX_ARGS).ok_or_else(|| {
        Error::invalid(format!("{name}: {} arguments are more than {MAX_ARGS}", args.len()))
    })?;
    let mut out = Vec::new();
    string(&mut out, name.as_bytes())?;
    out.extend_from_slice(&count.to_be_bytes());
    for (n, arg) in args.iter().enumerate() {
        string(&mut out, arg).map_err(|e| e.of(format_args!("{name}, argument {}", n + 1)))?;
        if out.len() > MAX_CALL {
            return Err(Error::invalid(format!("{name}: arguments of more than {MAX_CALL} bytes")));
        }
    }
    // "Exit on error": the server itself would end.
    out.extend_from_slice(&0u32.to_be_bytes());
    Ok(out)
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
    if let Some(at) = bytes.iter().position(|&b| b == 0) {
        return Err(Error::invalid(format!("a NUL at byte {at}, which guestfish cannot pass on")));
    }
    let len = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= MAX_STRING);
    let len =
        len.ok_or_else(|| Error::invalid(format!("{} bytes are more than {MAX_STRING}", bytes.len())))?;
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
    Ok(())
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done; the output is complete.
    Done,
    /// Failed; the reason is on the server's standard error.
    Failed,
}

/// An answer: 0 or −1, nothing else.
///
/// # Errors
/// `Protocol` for any other value.
pub fn status(bytes: [u8; STATUS_LEN]) -> Result<Status> {
    match i32::from_be_bytes(bytes) {
        0 => Ok(Status::Done),
        -1 => Ok(Status::Failed),
        other => Err(Error::protocol(format!("guestfish answered {other:#x} where 0 or -1 was due"))),
    }
}

/// Decodes what [`hello`] and [`call`] encode: for servers that play guestfish in tests.
pub mod decode {
    use super::{MAX_ARGS, MAX_CALL, MAX_STRING};
    use crate::{Error, Result};

    /// One call as the server reads it.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct Call {
        /// The command.
        pub name: Vec<u8>,
        /// Its arguments.
        pub args: Vec<Vec<u8>>,
        /// Whether the server is to end if the command fails.
        pub exit_on_error: bool,
    }

    /// Takes a string off the front of `bytes`; `None` if there is not yet all of it.
    ///
    /// # Errors
    /// `Protocol` above the limit, for padding that is not zero.
    pub fn string<'a>(bytes: &mut &'a [u8]) -> Result<Option<&'a [u8]>> {
        let mut rest = *bytes;
        let Some(len) = int(&mut rest) else { return Ok(None) };
        let len = usize::try_from(len).ok().filter(|&len| len <= MAX_STRING);
        let len = len.ok_or_else(|| Error::protocol("string longer than the limit"))?;
        let Some((found, rest)) = rest.split_at_checked(len) else { return Ok(None) };
        let Some((padding, rest)) = rest.split_at_checked(len.next_multiple_of(4) - len) else {
            return Ok(None);
        };
        if padding.iter().any(|&b| b != 0) {
            return Err(Error::protocol("padding that is not zero"));
        }
        *bytes = rest;
        Ok(Some(found))
    }

    /// Takes a call off the front of `bytes`; `None` if there is not yet all of it.
    ///
    /// # Errors
    /// `Protocol` for what is no call, or above the limits.
    pub fn call(bytes: &mut &[u8]) -> Result<Option<Call>> {
        let mut rest = *bytes;
        let Some(name) = string(&mut rest)? else { return Ok(None) };
        let Some(count) = int(&mut rest) else { return Ok(None) };
        let count = usize::try_from(count).ok().filter(|&count| count <= MAX_ARGS);
        let count = count.ok_or_else(|| Error::protocol("more arguments than the limit"))?;
        let mut args = Vec::new();
        let mut total = name.len();
        for _ in 0..count {
            let Some(arg) = string(&mut rest)? else { return Ok(None) };
            total = total.saturating_add(arg.len());
            if total > MAX_CALL {
                return Err(Error::protocol("call longer than the limit"));
            }
            args.push(arg.to_vec());
        }
        let exit_on_error = match int(&mut rest) {
            None => return Ok(None),
            Some(0) => false,
            Some(1) => true,
            Some(_) => return Err(Error::protocol("a truth value that is neither 0 nor 1")),
        };
        *bytes = rest;
        Ok(Some(Call { name: name.to_vec(), args, exit_on_error }))
    }

    fn int(bytes: &mut &[u8]) -> Option<u32> {
        let (head, rest) = bytes.split_first_chunk::<4>()?;
        *bytes = rest;
        Some(u32::from_be_bytes(*head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_call_as_guestfish_sends_it() {
        let bytes = call("ls", &[b"/etc".to_vec()]).unwrap();
        let expected = b"\0\0\0\x02ls\0\0\0\0\0\x01\0\0\0\x04/etc\0\0\0\0";
        assert_eq!(bytes, expected);
        assert_eq!(hello("1.48.6").unwrap(), b"\0\0\0\x061.48.6\0\0");
    }

    #[test]
    fn what_the_server_would_misread_is_refused() {
        assert!(call("ls", &[b"a\0b".to_vec()]).unwrap_err().to_string().contains("NUL at byte 1"));
        assert!(call("ls", &[vec![b'a'; MAX_STRING + 1]]).is_err());
        assert!(call("ls", &vec![Vec::new(); MAX_ARGS + 1]).is_err());
        assert!(call("ls", &vec![vec![b'a'; MAX_STRING]; 5]).is_err());
    }

    #[test]
    fn a_status_is_0_or_minus_1() {
        assert_eq!(status([0; 4]).unwrap(), Status::Done);
        assert_eq!(status([0xff; 4]).unwrap(), Status::Failed);
        assert!(status([0, 0, 0, 1]).is_err());
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            name in "[a-z0-9-]{1,20}",
            args in prop::collection::vec(prop::collection::vec(1u8.., 0..40), 0..8),
            cut in 0usize..400,
        ) {
            let bytes = call(&name, &args).unwrap();
            let mut rest = &bytes[..];
            let back = decode::call(&mut rest).unwrap().unwrap();
            prop_assert!(rest.is_empty());
            prop_assert_eq!(back, decode::Call { name: name.into_bytes(), args, exit_on_error: false });
            if cut < bytes.len() {
                prop_assert_eq!(decode::call(&mut &bytes[..cut]).unwrap(), None);
            }
        }
    }
}
