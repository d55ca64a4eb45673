//! Passphrases, from files and from QEMU's secret objects.

use std::io::{self, Read, Write};
use std::path::Path;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use diskmill::{Secret, without_os_codes};

use crate::options;

/// Longer passphrases are refused: a file that is not one was named.
const LONGEST: u64 = 64 << 10;
/// Stands where the next passphrase's length would.
const END: u32 = u32::MAX;

/// The passphrase in a file (`-`: standard input). One line end after it does not count.
pub(crate) fn from_file(path: &str) -> Result<Secret, String> {
    let mut bytes = read(path)?;
    if bytes.ends_with(b"\n") {
        bytes.pop();
    }
    Ok(Secret::new(bytes))
}

fn said(doing: &str, path: &str, error: &io::Error) -> String {
    without_os_codes(&format!("cannot {doing} {path:?}: {error}"))
}

/// Passes passphrases to another process of ours through `pipe`: what stands among the arguments or in the environment of a
/// process can be read by others.
pub(crate) fn send(pipe: &mut impl Write, secrets: &[Secret]) -> io::Result<()> {
    for secret in secrets {
        let len = u32::try_from(secret.bytes().len()).map_err(io::Error::other)?;
        pipe.write_all(&len.to_be_bytes())?;
        pipe.write_all(secret.bytes())?;
    }
    pipe.write_all(&END.to_be_bytes())
}

/// Takes what [`send`] has sent. The pipe is not to be buffered: a copy would stay in the buffer.
pub(crate) fn receive(pipe: &mut impl Read) -> io::Result<Vec<Secret>> {
    let mut secrets = Vec::new();
    loop {
        let mut len = [0; 4];
        pipe.read_exact(&mut len)?;
        let len = u32::from_be_bytes(len);
        if len == END {
            return Ok(secrets);
        }
        if u64::from(len) > LONGEST {
            return Err(io::Error::other(format!("a passphrase of {len} bytes")));
        }
        let mut bytes = vec![0; len as usize];
        pipe.read_exact(&mut bytes)?;
        secrets.push(Secret::new(bytes));
    }
}

/// A named passphrase, as QEMU's `--object secret,id=ID,data=TEXT` or `file=PATH` gives it, with `format=base64` if it
/// is that.
#[derive(Debug, Clone)]
pub(crate) struct SecretObject {
    /// What image options call it by.
    pub(crate) id: String,
    pub(crate) secret: Secret,
}

impl SecretObject {
    /// Parses the argument of `--object`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (mut id, mut data, mut base64, mut kind) = (None, None, false, None);
        for (index, (name, value)) in options::split(text).into_iter().enumerate() {
            match (name.as_str(), value) {
                (other, None) if index == 0 => kind = Some(other.to_owned()),
                ("qom-type", Some(value)) => kind = Some(value),
                ("id", Some(value)) => id = Some(value),
                ("data", Some(value)) => data = Some(value.into_bytes()),
                ("file", Some(path)) => data = Some(read(&path)?),
                ("format", Some(format)) if format == "raw" || format == "base64" => {
                    base64 = format == "base64"
                }
                (name @ ("keyid" | "iv"), _) => {
                    return Err(format!("a secret encrypted with another ({name}) is not supported"));
                }
                (name, value) => return Err(format!("{name}={} of a secret", value.unwrap_or_default())),
            }
        }
        match kind.as_deref() {
            Some("secret") => {}
            other => {
                return Err(format!(
                    "the object {:?} is not supported: only secret is",
                    other.unwrap_or_default()
                ));
            }
        }
        let id = id.ok_or("a secret needs id=")?;
        let data = data.ok_or("a secret needs data= or file=")?;
        let bytes = if base64 { decode_base64(&data).ok_or("the secret is not valid base64")? } else { data };
        Ok(Self { id, secret: Secret::new(bytes) })
    }
}

fn read(path: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut file: Box<dyn Read> = match path {
        "-" => Box::new(std::io::stdin()),
        path => Box::new(std::fs::File::open(Path::new(path)).map_err(|error| said("open", path, &error))?),
    };
    let mut limited = file.by_ref().take(LONGEST + 1);
    limited.read_to_end(&mut bytes).map_err(|error| said("read", path, &error))?;
    if bytes.len() as u64 > LONGEST {
        return Err(format!("{path:?} is larger than {LONGEST} bytes: no passphrase"));
    }
    Ok(bytes)
}

/// Blanks and line ends do not count.
fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    let text: Vec<u8> = text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    BASE64_STANDARD.decode(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_pass_through_a_pipe() {
        let secrets = [&b"a\0b\n"[..], b"", b"c"].map(|bytes| Secret::new(bytes.to_vec()));
        let mut pipe = Vec::new();
        send(&mut pipe, &secrets).unwrap();
        pipe.extend(b"4711\n");
        let mut rest = pipe.as_slice();
        assert_eq!(receive(&mut rest).unwrap(), secrets);
        assert_eq!(rest, b"4711\n");
        assert!(receive(&mut &pipe[..6]).is_err());
        assert!(receive(&mut &[0, 1, 0, 1][..]).is_err());
    }

    #[test]
    fn secrets_as_qemu_takes_them() {
        let secret = SecretObject::parse("secret,id=sec0,data=ab,,c").unwrap();
        assert_eq!((secret.id.as_str(), secret.secret.bytes()), ("sec0", &b"ab,c"[..]));
        let secret = SecretObject::parse("secret,id=s,format=base64,data=aGVsbG8K").unwrap();
        assert_eq!(secret.secret.bytes(), b"hello\n");
        for wrong in [
            "secret,id=a",
            "secret,data=x",
            "tls-creds-x509,id=a",
            "secret,id=a,data=b,keyid=c",
            "secret,id=a,format=base64,data=*",
        ] {
            assert!(SecretObject::parse(wrong).is_err(), "{wrong}");
        }
    }
}
