//! `list` and `df`: what is on the disks.

use std::io::{self, Write as _};

use diskmill_guestfs::Command;
use serde_json::{Map, Value, json};

use super::args::{DfArgs, ListArgs};
use super::guest::{Access, Guest};
use super::many;
use super::output::print_json;
use super::reply::{Record, texts};
use super::table::Table;
use crate::exit::{Exit, Failure};
use crate::names;
use crate::size::human_size;

/// A disk, or something on it that has a device of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Volume {
    /// The device, or for a btrfs subvolume what mount takes: `btrfsvol:/dev/sda1/name`.
    name: String,
    kind: Kind,
    /// The device that this one is on; of a logical volume its volume group.
    parent: Option<String>,
    /// Bytes; unknown for a subvolume.
    size: Option<u64>,
    /// The partition table or the file system (or `crypto_LUKS`, `LVM2_member`, `swap`), in blkid's words.
    content: String,
    label: String,
    uuid: String,
    /// Name and type of a partition, as its table has them.
    part_label: String,
    part_type: String,
    usage: Option<Usage>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Disk,
    Partition,
    Group,
    Logical,
    Crypt,
    Raid,
    Subvolume,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Partition => "part",
            Self::Group => "vg",
            Self::Logical => "lv",
            Self::Crypt => "crypt",
            Self::Raid => "raid",
            Self::Subvolume => "subvol",
        }
    }
}

/// How full a file system is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Bytes.
    total: u64,
    free: u64,
    /// For users other than root.
    pub(crate) available: u64,
    inodes: u64,
    inodes_free: u64,
}

impl Usage {
    pub(crate) fn from_record(record: &Record) -> Option<Self> {
        let unit: u64 =
            record.number("frsize").filter(|&unit| unit > 0).or_else(|| record.number("bsize"))?;
        let bytes = |name| Some(record.number::<u64>(name)?.saturating_mul(unit));
        Some(Self {
            total: bytes("blocks")?,
            free: bytes("bfree")?,
            available: bytes("bavail")?,
            inodes: record.number("files")?,
            inodes_free: record.number("ffree")?,
        })
    }

    fn used(self) -> u64 {
        self.total.saturating_sub(self.free)
    }
}

/// Used per cent of what users may use, rounded up, as df(1) counts.
fn percent(used: u64, available: u64) -> String {
    let all = u128::from(used) + u128::from(available);
    if all == 0 { String::new() } else { format!("{}%", (u128::from(used) * 100).div_ceil(all)) }
}

pub(crate) fn list(args: &ListArgs) -> Result<Exit, Failure> {
    let scanned = many::each(&args.many, |file| scan(&args.many, file))?;
    show(&args.many, &scanned, "devices", table)
}

pub(crate) fn df(args: &DfArgs) -> Result<Exit, Failure> {
    let scanned = many::each(&args.many, |file| {
        let mut volumes = scan(&args.many, file)?;
        volumes.retain(|volume| volume.usage.is_some());
        Ok(volumes)
    })?;
    show(&args.many, &scanned, "filesystems", |volumes| usage_table(volumes, args.inodes))
}

/// Prints what was found on each image, and the errors.
fn show(
    args: &super::args::ManyArgs,
    scanned: &[Result<Vec<Volume>, Failure>],
    key: &str,
    table: impl Fn(&[Volume]) -> Table,
) -> Result<Exit, Failure> {
    if args.image.json {
        let all = |volumes: &Vec<Volume>| volumes.iter().map(Volume::json).collect();
        print_json(&many::values(&args.files, scanned, key, all))?;
    } else {
        let text = many::texts(&args.files, scanned, |volumes| table(volumes).text());
        io::stdout().write_all(text.as_bytes())?;
    }
    many::outcome(&args.files, scanned)
}

fn table(volumes: &[Volume]) -> Table {
    let titles = &["NAME", "TYPE", ">SIZE", "CONTENT", "LABEL", "UUID", ">USED", ">AVAIL", ">USE%"];
    let mut table = Table::new(titles);
    for volume in volumes {
        let indent = "  ".repeat(depth(volumes, volume));
        let usage = |text: &dyn Fn(Usage) -> String| volume.usage.map(text).unwrap_or_default();
        let shown = |text: &str| names::shown(text).into_owned();
        table.row([
            indent + &shown(&volume.name),
            volume.kind.name().to_owned(),
            volume.size.map(human_size).unwrap_or_default(),
            shown(&volume.content),
            shown(&volume.label),
            shown(&volume.uuid),
            usage(&|usage| human_size(usage.used())),
            usage(&|usage| human_size(usage.available)),
            usage(&|usage| percent(usage.used(), usage.available)),
        ]);
    }
    table
}

fn depth(volumes: &[Volume], of: &Volume) -> usize {
    let mut depth = 0;
    let mut at = of;
    // Bounded: a hostile image must not make a circle of names.
    while let Some(parent) =
        at.parent.as_ref().and_then(|name| volumes.iter().find(|volume| volume.name == *name))
    {
        depth += 1;
        at = parent;
        if depth >= 8 {
            break;
        }
    }
    depth
}

fn usage_table(volumes: &[Volume], inodes: bool) -> Table {
    let mut table = Table::new(if inodes {
        &["FILESYSTEM", "TYPE", ">INODES", ">USED", ">FREE", ">USE%"]
    } else {
        &["FILESYSTEM", "TYPE", ">SIZE", ">USED", ">AVAIL", ">USE%"]
    });
    for volume in volumes {
        let Some(usage) = volume.usage else { continue };
        let [total, used, left] = if inodes {
            [usage.inodes, usage.inodes.saturating_sub(usage.inodes_free), usage.inodes_free]
        } else {
            [usage.total, usage.used(), usage.available]
        };
        let text = |n: u64| if inodes { n.to_string() } else { human_size(n) };
        let name = names::shown(&volume.name).into_owned();
        table.row([name, volume.content.clone(), text(total), text(used), text(left), percent(used, left)]);
    }
    table
}

impl Volume {
    fn new(name: String, kind: Kind, parent: Option<String>) -> Self {
        Self {
            name,
            kind,
            parent,
            size: None,
            content: String::new(),
            label: String::new(),
            uuid: String::new(),
            part_label: String::new(),
            part_type: String::new(),
            usage: None,
        }
    }

    fn json(&self) -> Value {
        let mut object = Map::new();
        let mut put = |key: &str, value: Value| object.insert(key.to_owned(), value);
        let text = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
        put("name", json!(self.name));
        put("type", json!(self.kind.name()));
        put("parent", json!(self.parent));
        put("size", json!(self.size));
        put("content", text(&self.content));
        put("label", text(&self.label));
        put("uuid", text(&self.uuid));
        put("partition-label", text(&self.part_label));
        put("partition-type", text(&self.part_type));
        let usage = self.usage.map(|usage| {
            json!({
                "size": usage.total,
                "used": usage.used(),
                "available": usage.available,
                "inodes": usage.inodes,
                "inodes-free": usage.inodes_free,
            })
        });
        put("usage", json!(usage));
        object.into()
    }
}

fn scan(args: &super::args::ManyArgs, file: &std::path::Path) -> Result<Vec<Volume>, Failure> {
    let mut guest = Guest::unmounted(&args.image, file, Access::Read)?;
    let mounts = guest.take_mounts()?;
    let volumes = volumes(&mut guest)?;
    guest.restore_mounts(&mounts)?;
    guest.finish()?;
    Ok(volumes)
}

/// Everything on the disks, what is on something behind it.
fn volumes(guest: &mut Guest) -> Result<Vec<Volume>, Failure> {
    let mut names = |command: &str| guest.call(Command::new(command)).map(|output| texts(&output));
    let disks = names("list-devices")?;
    let partitions = names("list-partitions")?;
    let groups = names("vgs")?;
    let logicals = names("lvs")?;
    let mapped = names("list-dm-devices")?;
    let raids = names("list-md-devices")?;

    let mut volumes = Vec::new();
    let whole =
        disks.iter().map(|name| (name, Kind::Disk)).chain(raids.iter().map(|name| (name, Kind::Raid)));
    for (name, kind) in whole.clone() {
        volumes.push(device(guest, name, kind, None)?);
        for partition in &partitions {
            // The longest disk whose name the partition's begins with: /dev/sda1 is on /dev/sda, not on /dev/sd.
            let on = whole.clone().map(|(disk, _)| disk).filter(|disk| partition.starts_with(disk.as_str()));
            if on.max_by_key(|disk| disk.len()) == Some(name) {
                volumes.push(device(guest, partition, Kind::Partition, Some(name.clone()))?);
            }
        }
    }
    for group in &groups {
        volumes.push(Volume::new(group.clone(), Kind::Group, None));
        let prefix = format!("/dev/{group}/");
        for logical in logicals.iter().filter(|logical| logical.starts_with(&prefix)) {
            volumes.push(device(guest, logical, Kind::Logical, Some(group.clone()))?);
        }
    }
    for name in &mapped {
        let parent = volumes
            .iter()
            .find(|volume| !volume.uuid.is_empty() && *name == super::keys::mapped_name(&volume.uuid))
            .map(|volume| volume.name.clone());
        volumes.push(device(guest, name, Kind::Crypt, parent)?);
    }
    let mut out = Vec::with_capacity(volumes.len());
    for mut volume in volumes {
        let subvolumes = usage(guest, &mut volume)?;
        out.push(volume);
        out.extend(subvolumes);
    }
    Ok(out)
}

fn device(guest: &mut Guest, name: &str, kind: Kind, parent: Option<String>) -> Result<Volume, Failure> {
    let mut volume = Volume::new(name.to_owned(), kind, parent);
    // blkid has nothing to say of a device without any signature, which is no error here.
    let facts = guest.try_call(Command::new("blkid").arg(name))?.unwrap_or_default();
    let facts = Record::single(&facts);
    let text = |key| unescape(&facts.text(key));
    volume.content = text("TYPE");
    if volume.content.is_empty() {
        volume.content = text("PTTYPE");
    }
    volume.label = text("LABEL");
    volume.uuid = text(if facts.text("UUID").is_empty() { "PTUUID" } else { "UUID" });
    volume.part_label = text("PART_ENTRY_NAME");
    volume.part_type = text("PART_ENTRY_TYPE");
    let size = guest.call(Command::new("blockdev-getsize64").arg(name))?;
    volume.size = String::from_utf8_lossy(&size).trim().parse().ok();
    if facts.text("USAGE") == "filesystem" {
        // Asked for below, when all devices are known.
        volume.usage = Some(Usage { total: 0, free: 0, available: 0, inodes: 0, inodes_free: 0 });
    }
    Ok(volume)
}

/// Mounts a file system to see how full it is, and which subvolumes a btrfs has.
fn usage(guest: &mut Guest, volume: &mut Volume) -> Result<Vec<Volume>, Failure> {
    let mut subvolumes = Vec::new();
    if volume.usage.take().is_none() {
        return Ok(subvolumes);
    }
    // One that the appliance cannot mount is listed all the same.
    if guest.try_call(Command::new("mount-ro").arg(&volume.name).arg("/"))?.is_none() {
        return Ok(subvolumes);
    }
    volume.usage = guest
        .try_call(Command::new("statvfs").arg("/"))?
        .and_then(|output| Usage::from_record(&Record::single(&output)));
    if volume.content == "btrfs"
        && let Some(output) = guest.try_call(Command::new("btrfs-subvolume-list").arg("/"))?
    {
        for subvolume in Record::list(&output) {
            let name = format!("btrfsvol:{}/{}", volume.name, subvolume.text("btrfssubvolume_path"));
            subvolumes.push(Volume::new(name, Kind::Subvolume, Some(volume.name.clone())));
        }
    }
    guest.call(Command::new("umount").arg("/"))?;
    Ok(subvolumes)
}

/// blkid's output escapes what a shell would not take, by a backslash before the byte; this takes it away.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        out.push(if char == '\\' { chars.next().unwrap_or(char) } else { char });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_counts_in_fragments() {
        let statvfs = b"bsize: 4096\nfrsize: 1024\nblocks: 100\nbfree: 60\nbavail: 50\nfiles: 10\nffree: 4\n";
        let usage = Usage::from_record(&Record::single(statvfs)).unwrap();
        assert_eq!((usage.total, usage.used(), usage.available), (102_400, 40_960, 51_200));
        assert_eq!((percent(usage.used(), usage.available), percent(0, 0)), ("45%".into(), String::new()));
        assert!(Usage::from_record(&Record::default()).is_none());
    }

    #[test]
    fn rows_are_indented_below_their_parents() {
        let volumes = [
            Volume::new("/dev/sda".into(), Kind::Disk, None),
            Volume::new("/dev/sda1".into(), Kind::Partition, Some("/dev/sda".into())),
            Volume::new("btrfsvol:/dev/sda1/a\x1b".into(), Kind::Subvolume, Some("/dev/sda1".into())),
        ];
        let text = table(&volumes).text();
        assert!(
            text.contains("\n  /dev/sda1  ") && text.contains("\n    btrfsvol:/dev/sda1/a\\u{1b}  "),
            "{text}"
        );
        // A circle ends.
        let mut circle = volumes[1].clone();
        circle.parent = Some("/dev/sda1".into());
        assert_eq!(depth(&[circle.clone()], &circle), 8);
    }

    #[test]
    fn blkid_escapes_are_taken_away() {
        assert_eq!((unescape("LVM2\\ 001"), unescape("a\\\\b\\")), ("LVM2 001".into(), "a\\b\\".into()));
    }
}
