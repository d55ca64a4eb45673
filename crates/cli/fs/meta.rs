//! What a guest's inode says, as lstatns prints it.

use serde_json::{Map, Value, json};

use super::args::FileType;
use super::reply::Record;

/// Metadata of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) device: i64,
    pub(crate) inode: i64,
    /// Type and permissions, as in `st_mode`.
    pub(crate) mode: u32,
    pub(crate) links: i64,
    pub(crate) user: u32,
    pub(crate) group: u32,
    /// Of a device node.
    pub(crate) rdev: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Bytes on the disk.
    pub(crate) allocated: u64,
    pub(crate) accessed: Time,
    pub(crate) modified: Time,
    pub(crate) changed: Time,
}

/// Seconds since 1970 and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanos: i64,
}

impl Time {
    /// In UTC, to the second: a guest's time zone is not the host's. As the number if no calendar has it.
    pub(crate) fn text(self) -> String {
        match jiff::Timestamp::from_second(self.seconds) {
            Ok(time) => time.to_string(),
            Err(_) => format!("@{}", self.seconds),
        }
    }
}

impl Meta {
    /// `None` where lstatnslist says that there is no such file (an inode of -1).
    pub(crate) fn from_record(record: &Record) -> Option<Self> {
        let inode = record.number("st_ino").filter(|&inode| inode != -1)?;
        let time = |name: &str| {
            let seconds = record.number(&format!("st_{name}_sec"))?;
            Some(Time { seconds, nanos: record.number(&format!("st_{name}_nsec"))? })
        };
        Some(Self {
            device: record.number("st_dev")?,
            inode,
            mode: record.number("st_mode")?,
            links: record.number("st_nlink")?,
            user: record.number("st_uid")?,
            group: record.number("st_gid")?,
            rdev: record.number("st_rdev")?,
            size: record.number("st_size")?,
            allocated: record.number::<u64>("st_blocks")?.saturating_mul(512),
            accessed: time("atime")?,
            modified: time("mtime")?,
            changed: time("ctime")?,
        })
    }

    pub(crate) fn kind(&self) -> Option<FileType> {
        Some(match self.mode & 0o170_000 {
            0o100_000 => FileType::File,
            0o040_000 => FileType::Folder,
            0o120_000 => FileType::Link,
            0o060_000 => FileType::Block,
            0o020_000 => FileType::Char,
            0o010_000 => FileType::Fifo,
            0o140_000 => FileType::Socket,
            _ => return None,
        })
    }

    pub(crate) fn is(&self, kind: FileType) -> bool {
        self.kind() == Some(kind)
    }

    /// Permissions with set-user-ID, set-group-ID and sticky bits.
    pub(crate) fn permissions(&self) -> u32 {
        self.mode & 0o7777
    }

    /// Major and minor number of a device node, as Linux packs them.
    pub(crate) fn device_numbers(&self) -> (u64, u64) {
        let major = (self.rdev >> 8 & 0xfff) | (self.rdev >> 32 & 0xffff_f000);
        let minor = (self.rdev & 0xff) | (self.rdev >> 12 & 0xffff_ff00);
        (major, minor)
    }

    /// `-rwxr-xr-x` and its like.
    pub(crate) fn mode_text(&self) -> String {
        let letter = match self.kind() {
            Some(FileType::File) => '-',
            Some(FileType::Folder) => 'd',
            Some(FileType::Link) => 'l',
            Some(FileType::Block) => 'b',
            Some(FileType::Char) => 'c',
            Some(FileType::Fifo) => 'p',
            Some(FileType::Socket) => 's',
            None => '?',
        };
        let mut text = String::from(letter);
        for (shift, special, set) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
            let bit = |bit: u32| self.mode >> shift & bit != 0;
            text.push(if bit(4) { 'r' } else { '-' });
            text.push(if bit(2) { 'w' } else { '-' });
            text.push(match (self.mode & special != 0, bit(1)) {
                (true, true) => set,
                (true, false) => set.to_ascii_uppercase(),
                (false, true) => 'x',
                (false, false) => '-',
            });
        }
        text
    }

    /// Puts the fields into a JSON object.
    pub(crate) fn put_json(&self, object: &mut Map<String, Value>) {
        object.insert("type".to_owned(), json!(self.kind().map(type_name)));
        object.insert("mode".to_owned(), json!(format!("{:04o}", self.permissions())));
        object.insert("links".to_owned(), json!(self.links));
        object.insert("uid".to_owned(), json!(self.user));
        object.insert("gid".to_owned(), json!(self.group));
        object.insert("size".to_owned(), json!(self.size));
        object.insert("allocated".to_owned(), json!(self.allocated));
        object.insert("inode".to_owned(), json!(self.inode));
        if self.is(FileType::Block) || self.is(FileType::Char) {
            let (major, minor) = self.device_numbers();
            object.insert("device".to_owned(), json!({ "major": major, "minor": minor }));
        }
        for (key, time) in
            [("accessed", self.accessed), ("modified", self.modified), ("changed", self.changed)]
        {
            object.insert(key.to_owned(), json!({ "seconds": time.seconds, "nanoseconds": time.nanos }));
        }
    }
}

/// The type in words, as JSON has it.
pub(crate) const fn type_name(kind: FileType) -> &'static str {
    match kind {
        FileType::File => "file",
        FileType::Folder => "directory",
        FileType::Link => "symlink",
        FileType::Block => "block-device",
        FileType::Char => "character-device",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
    }
}

/// One file of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its path, relative to where the listing began; empty for that itself.
    pub(crate) path: Vec<u8>,
    /// `None` where only names were asked for.
    pub(crate) meta: Option<Meta>,
    /// Of a symbolic link.
    pub(crate) target: Option<Vec<u8>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(mode: u32, rdev: u64) -> Meta {
        let text = format!(
            "st_dev: 1\nst_ino: 2\nst_mode: {mode}\nst_nlink: 1\nst_uid: 0\nst_gid: 0\nst_rdev: {rdev}\nst_size: 5\n\
             st_blksize: 1024\nst_blocks: 2\nst_atime_sec: 1\nst_atime_nsec: 2\nst_mtime_sec: 1000000000\n\
             st_mtime_nsec: 4\nst_ctime_sec: -5\nst_ctime_nsec: 6\n"
        );
        Meta::from_record(&Record::single(text.as_bytes())).unwrap()
    }

    #[test]
    fn modes_are_written_as_by_ls() {
        let cases = [
            (0o100_644, "-rw-r--r--"),
            (0o041_777, "drwxrwxrwt"),
            (0o104_755, "-rwsr-xr-x"),
            (0o102_640, "-rw-r-S---"),
            (0o120_777, "lrwxrwxrwx"),
            (0o000_000, "?---------"),
        ];
        for (mode, want) in cases {
            assert_eq!(meta(mode, 0).mode_text(), want);
        }
    }

    #[test]
    fn fields_have_their_units() {
        let null = meta(0o020_666, 0x103);
        assert_eq!(null.device_numbers(), (1, 3));
        assert_eq!((null.allocated, null.modified.text()), (1024, "2001-09-09T01:46:40Z".into()));
        assert_eq!(Time { seconds: i64::MAX, nanos: 0 }.text(), format!("@{}", i64::MAX));
        assert!(Meta::from_record(&Record::single(b"st_ino: -1\n")).is_none());
    }
}
