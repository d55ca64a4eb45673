//! `grow`: image, partition, logical volume and file system, from the outside in.

use std::path::PathBuf;

use clap::Args;
use diskmill::edit::Preallocation;
use diskmill::{Image, OpenOptions, parse_size};
use diskmill_guestfs::Command;
use serde_json::json;

use super::args::ImageArgs;
use super::drive::make_way;
use super::guest::{Access, Guest};
use super::output::print_json;
use super::reply::{Record, texts};
use crate::exit::{Exit, Failure};
use crate::names;

#[derive(Debug, Args)]
pub(crate) struct GrowArgs {
    #[command(flatten)]
    pub(crate) image: ImageArgs,

    /// The image
    #[arg(value_name = "IMAGE")]
    pub(crate) file: PathBuf,

    /// New size of the disk, or +SIZE; without it only partition and file system grow
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    pub(crate) size: Option<String>,

    /// The partition to grow [default: the last one]
    #[arg(long, value_name = "DEVICE")]
    pub(crate) partition: Option<String>,

    /// The logical volume to grow, when the partition is part of LVM [default: the only one]
    #[arg(long, value_name = "DEVICE")]
    pub(crate) lv: Option<String>,
}

/// Sectors of the second GPT at the end of the disk: its header and 128 entries of 128 bytes (UEFI 2.10, 5.3).
const GPT_END: u64 = 33;
const SECTOR: u64 = 512;
/// Sectors in 1 MiB, to which partitions are aligned.
const ALIGNMENT: u64 = 2048;

pub(crate) fn grow(args: &GrowArgs) -> Result<Exit, Failure> {
    args.image.check(Access::Write)?;
    make_way(&args.file, args.image.quiet)?;
    let options = args.image.open.options(args.image.format);
    let old_size = Image::open(&args.file, &options)?.size();
    let new_size = match &args.size {
        Some(text) => wanted_size(text, old_size)?,
        None => old_size,
    };
    if new_size > old_size {
        let mut image = Image::open(&args.file, &OpenOptions { writable: true, ..options })?;
        image.resize(new_size, Preallocation::Off)?;
        image.close()?;
    }
    let mut guest = Guest::unmounted(&args.image, &args.file, Access::Write)?;
    guest.take_mounts()?;
    let mut grown = Vec::new();
    let unsupported = grow_inside(&mut guest, args, &mut grown)?;
    guest.finish()?;
    if let Some(content) = unsupported {
        let grown = if grown.is_empty() { "nothing".to_owned() } else { grown.join(", ") };
        return Err(Failure::failed(format!("growing {content} is not supported; grown: {grown}")));
    }
    if args.image.json {
        return print_json(&json!({ "size-before": old_size, "size": new_size, "grown": grown }));
    }
    if !args.image.quiet {
        eprintln!("diskmill: grown: {}", names::shown(&grown.join(", ")));
    }
    Ok(Exit::Done)
}

/// The size that was typed, or that the disk shall have more. Whole sectors.
fn wanted_size(text: &str, old: u64) -> Result<u64, Failure> {
    let wrong = |why: &str| Failure::usage(format!("the size {text:?} {why}"));
    if let Some(less) = text.strip_prefix('-') {
        return Err(match less.starts_with(|char: char| char.is_ascii_digit()) {
            true => wrong("would make the disk smaller: grow only grows; shrinking is not supported here"),
            false => Failure::usage(format!("unexpected argument {text:?}; see diskmill fs grow --help")),
        });
    }
    let (more, number) = match text.strip_prefix('+') {
        Some(number) => (true, number),
        None => (false, text),
    };
    let size = parse_size(number).map_err(|error| Failure::usage(error.to_string()))?;
    let size = if more { old.checked_add(size) } else { Some(size) };
    let size =
        size.and_then(|size| size.checked_next_multiple_of(SECTOR)).ok_or_else(|| wrong("is too large"))?;
    if size < old {
        return Err(wrong("is smaller than the disk is: shrinking is not supported here"));
    }
    Ok(size)
}

/// Grows partition, volume and file system, and adds them to `grown`; tells of content that cannot grow.
fn grow_inside(
    guest: &mut Guest,
    args: &GrowArgs,
    grown: &mut Vec<String>,
) -> Result<Option<String>, Failure> {
    const DISK: &str = "/dev/sda";
    let Some(table) = guest.try_call(Command::new("part-get-parttype").arg(DISK))? else {
        return grow_content(guest, DISK, args, grown);
    };
    let gpt = table.starts_with(b"gpt");
    if gpt {
        // Moves the second table to the new end.
        guest.call(Command::new("part-expand-gpt").arg(DISK))?;
    }
    let parts = Record::list(&guest.call(Command::new("part-list").arg(DISK))?);
    let last = parts
        .iter()
        .max_by_key(|part| part.number::<u64>("part_start"))
        .and_then(|part| part.number::<u32>("part_num"));
    let last = last.ok_or_else(|| Failure::failed("the partition table is empty"))?;
    let partition = args.partition.clone().unwrap_or_else(|| format!("{DISK}{last}"));
    if partition != format!("{DISK}{last}") {
        return Err(Failure::failed(format!(
            "{partition} is not the last partition of the disk, or not there: only {DISK}{last} can grow"
        )));
    }
    let number = last.to_string();
    if !gpt && guest.text(Command::new("part-get-mbr-part-type").arg(DISK).arg(&number))? == "logical" {
        return Err(Failure::failed(format!(
            "{partition} is a logical partition: growing one is not supported"
        )));
    }
    let size: u64 = guest
        .text(Command::new("blockdev-getsize64").arg(DISK))?
        .parse()
        .map_err(|_| Failure::failed("the size of the disk is not understood"))?;
    let sectors = size / SECTOR;
    // sgdisk, behind part-expand-gpt, ends what may be used at a multiple of its alignment.
    let end = if gpt { sectors.saturating_sub(GPT_END + 1) / ALIGNMENT * ALIGNMENT } else { sectors };
    let end = end.checked_sub(1);
    let end = end.ok_or_else(|| Failure::failed("the disk is too small"))?;
    let part_end = parts.iter().filter_map(|part| part.number::<u64>("part_end")).max().unwrap_or(0);
    if part_end / SECTOR < end {
        guest.call(Command::new("part-resize").arg(DISK).arg(&number).arg(end.to_string()))?;
        grown.push(partition.clone());
    }
    grow_content(guest, &partition, args, grown)
}

/// Grows what is on a device up to the device's size.
fn grow_content(
    guest: &mut Guest,
    device: &str,
    args: &GrowArgs,
    grown: &mut Vec<String>,
) -> Result<Option<String>, Failure> {
    let content = guest.text(Command::new("vfs-type").arg(device))?;
    let on = |command: &str| Command::new(command).arg(device);
    match content.as_str() {
        "ext2" | "ext3" | "ext4" => {
            // resize2fs wants a file system that was checked just now.
            guest.call(on("e2fsck").opt("correct", "true"))?;
            guest.call(on("resize2fs"))?;
        }
        "xfs" => in_mounted(guest, device, Command::new("xfs-growfs").arg("/"))?,
        "btrfs" => in_mounted(guest, device, Command::new("btrfs-filesystem-resize").arg("/"))?,
        "ntfs" => drop(guest.call(on("ntfsresize"))?),
        "f2fs" => drop(guest.call(on("f2fs-expand"))?),
        "LVM2_member" => {
            guest.call(on("pvresize"))?;
            let volumes = texts(&guest.call(Command::new("lvs"))?);
            let volume = match (&args.lv, volumes.as_slice()) {
                (Some(volume), _) => volume,
                (None, [only]) => only,
                (None, several) => {
                    let list = several.join(", ");
                    return Err(Failure::failed(format!(
                        "which logical volume shall grow? --lv DEVICE, of: {list}"
                    )));
                }
            };
            guest.call(Command::new("lvresize-free").arg(volume).arg("100"))?;
            grown.push(volume.clone());
            return grow_content(guest, &volume.clone(), args, grown);
        }
        other => {
            let content = if other.is_empty() { "what is not known" } else { other };
            return Ok(Some(format!("{} on {device}", names::shown(content))));
        }
    }
    grown.push(format!("{content} on {device}"));
    Ok(None)
}

fn in_mounted(guest: &mut Guest, device: &str, command: Command) -> Result<(), Failure> {
    guest.call(Command::new("mount").arg(device).arg("/"))?;
    guest.call(command)?;
    guest.call(Command::new("umount").arg("/")).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_more() {
        assert_eq!(wanted_size("2M", 1 << 20).unwrap(), 2 << 20);
        assert_eq!(wanted_size("+1000", 1 << 20).unwrap(), (1 << 20) + 1024);
        let said = |text: &str| wanted_size(text, 1 << 20).unwrap_err().message.unwrap();
        assert!(said("-1G").contains("only grows") && said("--jsn").contains("unexpected argument"));
        for wrong in ["", "+", "1k", "x", "-1k", "+9223372036854775807"] {
            assert!(wanted_size(wrong, u64::MAX / 2 + 512).is_err(), "{wrong}");
        }
    }
}
