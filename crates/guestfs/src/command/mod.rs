//! Commands for guestfish: which may be sent, and how their arguments are written.

use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use crate::{Error, Result};

mod allowed;

use allowed::{ALLOWED, STREAMS, Stream};

/// One argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Arg {
    /// Bytes as they are.
    Bytes(Vec<u8>),
    /// The stream that goes into the guest.
    Input,
    /// The stream that comes out of it.
    Output,
}

/// A guestfish command with its arguments.
///
/// Nothing on the way is a shell: spaces, quotes, newlines and bytes that are no UTF-8 pass as they are. NUL does not,
/// and is refused when the command is sent. Only commands that work on the guest's disks may be sent.
///
/// ```
/// use diskmill_guestfs::Command;
/// let mount = Command::new("mount-options").arg("ro,noload").arg("/dev/sda1").arg("/");
/// let tar = Command::new("tar-out").arg("/etc").output().opt("numericowner", "true");
/// assert!(mount.check().is_ok() && tar.check().is_ok());
/// assert!(Command::new("!").arg("id").check().is_err());
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Command {
    name: String,
    args: Vec<Arg>,
    keys: Vec<Vec<u8>>,
}

impl Command {
    /// The command `name` without arguments.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), args: Vec::new(), keys: Vec::new() }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<[u8]>) -> Self {
        self.args.push(Arg::Bytes(arg.as_ref().to_vec()));
        self
    }

    /// Adds a path inside the guest.
    #[must_use]
    pub fn path(self, path: impl AsRef<Path>) -> Self {
        let bytes = path.as_ref().as_os_str().as_bytes();
        self.arg(bytes)
    }

    /// Adds one argument that is a list of strings, such as the names of `lstatnslist` or a command line.
    #[must_use]
    pub fn list<S: AsRef<[u8]>>(self, items: impl IntoIterator<Item = S>) -> Self {
        let list = quote_list(items);
        self.arg(list)
    }

    /// Adds an optional argument, `key:value`. They come behind the others.
    #[must_use]
    pub fn opt(self, key: &str, value: impl AsRef<[u8]>) -> Self {
        let mut arg = key.as_bytes().to_vec();
        arg.push(b':');
        arg.extend_from_slice(value.as_ref());
        self.arg(arg)
    }

    /// Adds an optional argument that is a list of strings, such as the patterns that `tar-out` leaves out.
    #[must_use]
    pub fn opt_list<S: AsRef<[u8]>>(self, key: &str, items: impl IntoIterator<Item = S>) -> Self {
        let list = quote_list(items);
        self.opt(key, list)
    }

    /// Adds the file that the command reads on the host: the stream given to [`Session::send`](crate::Session::send).
    #[must_use]
    pub fn input(mut self) -> Self {
        self.args.push(Arg::Input);
        self
    }

    /// Adds the file that the command writes on the host: its output, as of every other command.
    #[must_use]
    pub fn output(mut self) -> Self {
        self.args.push(Arg::Output);
        self
    }

    /// Adds a passphrase. It is no argument: guestfish reads it from a pipe that only this user can open, and neither
    /// messages nor [`Debug`](fmt::Debug) show it.
    #[must_use]
    pub fn key(mut self, key: impl AsRef<[u8]>) -> Self {
        self.keys.push(key.as_ref().to_vec());
        self
    }

    /// The command's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the command reads a stream of the host.
    pub(crate) fn takes_input(&self) -> bool {
        self.args.contains(&Arg::Input)
    }

    /// The passphrases, a line each.
    ///
    /// # Errors
    /// `Invalid` for a line feed or a NUL in one.
    pub(crate) fn key_lines(&self) -> Result<Vec<u8>> {
        if self.keys.iter().flatten().any(|byte| matches!(byte, b'\n' | 0)) {
            return Err(Error::invalid(format!("{}: a passphrase with a line feed or NUL", self.name)));
        }
        Ok(self.keys.iter().flat_map(|key| key.iter().copied().chain([b'\n'])).collect())
    }

    /// The arguments, with `input` for the file to read.
    pub(crate) fn arguments(&self, input: Option<&[u8]>) -> Result<Vec<Vec<u8>>> {
        let args = self.args.iter().map(|arg| match arg {
            Arg::Bytes(bytes) => Ok(bytes.clone()),
            Arg::Output => Ok(b"-".to_vec()),
            Arg::Input => input
                .map(<[u8]>::to_vec)
                .ok_or_else(|| Error::invalid(format!("{}: no stream was given to read", self.name))),
        });
        args.collect()
    }

    /// Whether the command may be sent.
    ///
    /// # Errors
    /// `Invalid` for a command that is not on the list, for a stream where the command has none, and for a file of the
    /// host where only a stream may be.
    pub fn check(&self) -> Result<()> {
        if ALLOWED.binary_search(&self.name.as_str()).is_err() {
            return Err(Error::invalid(format!(
                "the guestfish command \"{}\" is not supported: only commands that work inside the image are",
                self.name.escape_debug()
            )));
        }
        let stream = STREAMS.iter().find(|(name, ..)| *name == self.name);
        for (n, arg) in self.args.iter().enumerate() {
            let wanted = stream.filter(|(_, at, _)| *at == n).map(|(.., way)| *way);
            let given = match arg {
                Arg::Bytes(_) => None,
                Arg::Input => Some(Stream::Input),
                Arg::Output => Some(Stream::Output),
            };
            if wanted != given {
                return Err(Error::invalid(format!(
                    "{}: argument {} is {}",
                    self.name,
                    n + 1,
                    if wanted.is_some() { "a stream, not a file of the host" } else { "no stream" }
                )));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Command").field("name", &self.name).field("args", &self.args).finish_non_exhaustive()
    }
}

/// A list as guestfish splits it: items in single quotes. A backslash escapes a quote and stands for itself anywhere
/// else, so those at the end of an item stand behind the closing quote.
fn quote_list<S: AsRef<[u8]>>(items: impl IntoIterator<Item = S>) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        let item = item.as_ref();
        let trailing = item.iter().rev().take_while(|&&byte| byte == b'\\').count();
        let (quoted, bare) = item.split_at(item.len().saturating_sub(trailing));
        if !out.is_empty() {
            out.push(b' ');
        }
        out.push(b'\'');
        for &byte in quoted {
            if byte == b'\'' {
                out.push(b'\\');
            }
            out.push(byte);
        }
        out.push(b'\'');
        out.extend_from_slice(bare);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_has_no_command_of_the_host() {
        assert!(ALLOWED.is_sorted_by(|a, b| a < b));
        for name in
            ["!", "event", "edit", "vi", "more", "less", "display", "copy-in", "add-drive", "lcd", "setenv"]
        {
            assert!(Command::new(name).check().is_err(), "{name}");
        }
        assert!(STREAMS.iter().all(|(name, ..)| ALLOWED.contains(name)));
    }

    #[test]
    fn files_of_the_host_are_no_arguments() {
        assert!(Command::new("upload").arg("/etc/passwd").arg("/x").check().is_err());
        assert!(Command::new("upload").input().arg("/x").check().is_ok());
        assert!(Command::new("download").arg("/x").arg("/tmp/x").check().is_err());
        assert!(Command::new("download").arg("/x").output().check().is_ok());
        assert!(Command::new("cat").input().check().is_err());
    }

    #[test]
    fn lists_are_quoted() {
        assert_eq!(quote_list(["a b", "it's", "\\", "x\\'\\"]), br"'a b' 'it\'s' ''\ 'x\\''\");
        assert_eq!(quote_list([[0xffu8, b'\n']]), [b'\'', 0xff, b'\n', b'\'']);
    }
}
