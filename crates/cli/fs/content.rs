//! Content, owners and times of the guest's files.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use diskmill_guestfs::{Command, Error, Kind};

use super::args::FileType;
use super::guest::Guest;
use super::list::Usage;
use super::meta::{Meta, type_name};
use super::name::{parent, shown};
use super::reply::{Record, texts};
use crate::exit::Failure;

/// Bytes up to which a file is read in one call, which may answer with 4 MiB.
const SMALL: usize = 1 << 20;

impl Guest {
    /// Copies a file of the guest to `output`: a small one in one call, which takes milliseconds where a download, for
    /// which the appliance starts a program, takes a hundred.
    pub(crate) fn print(&mut self, path: &[u8], output: &mut dyn Write) -> Result<(), Failure> {
        self.readable(path)?;
        let command = Command::new("pread").arg(path).arg(SMALL.to_string()).arg("0");
        match self.try_call(command)? {
            Some(content) if content.len() < SMALL => Ok(output.write_all(&content)?),
            _ => self.fetch(path, output).map(drop),
        }
    }

    /// Copies a file of the guest to `output`.
    pub(crate) fn download(&mut self, path: &[u8], output: &mut dyn Write) -> Result<u64, Failure> {
        self.readable(path)?;
        self.fetch(path, output)
    }

    /// The same of what is known to be a regular file.
    fn fetch(&mut self, path: &[u8], output: &mut dyn Write) -> Result<u64, Failure> {
        let result = self.session.download(path_of(&no_device(path)), output);
        result.map_err(|error| self.watch.failure(error))
    }

    /// Copies `input` to a file of the guest.
    pub(crate) fn upload(&mut self, input: &mut dyn Read, path: &[u8]) -> Result<(), Failure> {
        let result = self.session.upload(input, path_of(&no_device(path)));
        result.map_err(|error| {
            // libguestfs keeps the reason of a write that failed to itself.
            let full = error.kind() == Kind::Command && self.is_full(path);
            let said = error.message().to_owned();
            let error = if full {
                Error::new(Kind::NoSpace, format!("{said}: No space left on device"))
            } else {
                error
            };
            self.watch.failure(error)
        })
    }

    /// Whether next to nothing is free where `path` is.
    fn is_full(&mut self, path: &[u8]) -> bool {
        let found = self.space_at(path).unwrap_or_default();
        let found = Record::single(&found);
        let number = |name| found.number::<u64>(name);
        // Some file systems hold a little back.
        number("blocks").zip(number("bavail")).is_some_and(|(all, free)| free <= all / 50)
    }

    /// What statvfs says of the folder that `path` is in.
    fn space_at(&mut self, path: &[u8]) -> Result<Vec<u8>, Failure> {
        let folder = self.real_path(parent(path))?;
        self.call(Command::new("statvfs").arg(folder))
    }

    /// Whether there is room for so many bytes more beside `path`.
    pub(crate) fn has_room(&mut self, path: &[u8], bytes: u64) -> Result<bool, Failure> {
        let found = Usage::from_record(&Record::single(&self.space_at(path)?));
        Ok(found.is_none_or(|usage| usage.available >= bytes))
    }

    /// Changes permissions, with set-user-ID and the like.
    pub(crate) fn chmod(&mut self, path: &[u8], mode: u32) -> Result<(), Failure> {
        self.call(Command::new("chmod").arg(format!("0{mode:o}")).arg(path)).map(drop)
    }

    /// Changes the owner, by numbers.
    pub(crate) fn chown(&mut self, path: &[u8], user: u32, group: u32) -> Result<(), Failure> {
        self.call(Command::new("chown").arg(user.to_string()).arg(group.to_string()).arg(path)).map(drop)
    }

    /// Sets both times of a file.
    pub(crate) fn set_modified(&mut self, path: &[u8], seconds: i64, nanos: i64) -> Result<(), Failure> {
        let [seconds, nanos] = [seconds, nanos].map(|n| n.to_string());
        let command = Command::new("utimens").arg(path).arg(&seconds).arg(&nanos).arg(&seconds).arg(&nanos);
        self.call(command).map(drop)
    }

    /// The file system that the folder `path` is on, in blkid's words; empty where it is not known.
    pub(crate) fn filesystem_at(&mut self, path: &[u8]) -> Result<String, Failure> {
        let real = self.real_path(path)?;
        let below = |folder: &str| {
            let rest = real.strip_prefix(folder.trim_end_matches('/').as_bytes());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        let mounts = texts(&self.call(Command::new("mountpoints"))?);
        let mounts = mounts.iter().filter_map(|line| line.rsplit_once(": "));
        let Some((device, _)) =
            mounts.filter(|(_, folder)| below(folder)).max_by_key(|(_, folder)| folder.len())
        else {
            return Ok(String::new());
        };
        let found = self.try_call(Command::new("vfs-type").arg(device))?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&found).trim_end().to_owned())
    }

    /// Metadata of what the path leads to, which must be a regular file: reading a FIFO would wait for ever, a device is the
    /// appliance's own.
    fn readable(&mut self, path: &[u8]) -> Result<(), Failure> {
        let meta = self.stat(path)?;
        if meta.is(FileType::File) { Ok(()) } else { Err(no_file(path, &meta)) }
    }
}

/// The path as upload and download take it: what begins with `/dev/` is a device of the appliance to them.
fn no_device(path: &[u8]) -> Vec<u8> {
    if path.starts_with(b"/dev/") { [b"/.", path].concat() } else { path.to_vec() }
}

/// The error of what would be read or written and is no regular file.
pub(crate) fn no_file(path: &[u8], meta: &Meta) -> Failure {
    let kind = meta.kind().map_or("unknown", type_name);
    Failure::failed(format!("{}: a regular file is needed, and this is a {kind}", shown(path)))
}

fn path_of(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}
