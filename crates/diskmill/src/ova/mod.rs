//! OVA archives: a disk is read in place, inside the tar.

mod member;
mod verify;
mod write;

use diskmill_format::ova::tar::{Member, MemberKind, Scanner, Step};
use diskmill_format::ova::{Ovf, chunk_name, ovf};
use diskmill_format::{FormatError, Limits, Problem};
use diskmill_io::{SharedStorage, Storage};

use crate::error::{Error, Kind, Result};
use crate::image::OpenOptions;
use crate::qcow2::lossy;
use crate::reader::{read_exact, read_full};
use member::{Part, concatenated, spooled};
pub use verify::{FileCheck, Outcome, verify};
pub(crate) use write::assembler;

/// Whether these first bytes of a file are an archive whose first member is an OVF envelope (the order that DSP0243
/// demands). Other archives are raw data unless they are named to be OVAs.
pub(crate) fn probe(start: &[u8]) -> bool {
    let mut scanner = Scanner::new(&Limits::default());
    loop {
        let (at, len) = scanner.want();
        let block = usize::try_from(at.get()).ok().and_then(|at| start.get(at..)?.get(..len));
        match block.map(|block| scanner.feed(block)) {
            Some(Ok(Step::More)) => {}
            Some(Ok(Step::Member(member))) => {
                return member.kind == MemberKind::File && has_suffix(&member.name, ".ovf");
            }
            _ => return false,
        }
    }
}

fn has_suffix(name: &[u8], suffix: &str) -> bool {
    let tail = name.len().checked_sub(suffix.len()).and_then(|at| name.get(at..));
    tail.is_some_and(|tail| tail.eq_ignore_ascii_case(suffix.as_bytes()))
}

/// The plain files of an archive.
fn members(file: &dyn Storage, limits: &Limits) -> Result<Vec<Member>> {
    let len = file.len().map_err(|error| Error::io("cannot tell the size", error))?;
    let mut scanner = Scanner::new(limits);
    let mut found = Vec::new();
    loop {
        let (at, want) = scanner.want();
        let mut bytes = vec![0; want];
        let got = read_full(file, &mut bytes, at.get())?;
        match scanner.feed(bytes.get(..got).unwrap_or_default())? {
            Step::More => {}
            Step::End => return Ok(found),
            Step::Member(mut member) => {
                if member.data.get().checked_add(member.size).is_none_or(|end| end > len) {
                    let name = lossy(&member.name);
                    let message = format!(
                        "the member {name:?} reaches past the end of the file ({len} bytes): the archive is cut off"
                    );
                    return Err(Error::corrupt("tar header", Some(at.get()), message));
                }
                // GNU tar writes `./name` when it is given a folder.
                if let Some(plain) = member.name.strip_prefix(b"./") {
                    member.name = plain.to_vec();
                }
                if member.kind == MemberKind::File {
                    found.push(member);
                }
            }
        }
    }
}

/// The whole content of a member of at most `most` bytes.
fn content(file: &dyn Storage, member: &Member, most: u64) -> Result<Vec<u8>> {
    if member.size > most {
        let name = lossy(&member.name);
        return Err(Error::new(
            Kind::Limit,
            format!("{name:?} has {} bytes, the limit is {most}", member.size),
        ));
    }
    let mut bytes = vec![0; member.size as usize];
    read_exact(file, &mut bytes, member.data.get())?;
    Ok(bytes)
}

/// A disk of an archive, not opened yet.
struct Disk {
    /// What it may be called: file, disk id, device.
    names: Vec<String>,
    pieces: Vec<Member>,
    gzip: bool,
}

/// The disk of the archive in `file` that `options` mean.
pub(crate) fn open(file: &SharedStorage, options: &OpenOptions) -> Result<SharedStorage> {
    let disks = disks(&**file, &options.limits)?;
    let disk = choose(disks, options.disk.as_deref())?;
    let parts = disk.pieces.iter().map(|member| Part { at: member.data.get(), len: member.size });
    let stored = concatenated(file, parts)?;
    if disk.gzip { spooled(&*stored, disk.names.first().map_or("", String::as_str)) } else { Ok(stored) }
}

fn disks(file: &dyn Storage, limits: &Limits) -> Result<Vec<Disk>> {
    let members = members(file, limits)?;
    let Some(envelope) = members.iter().find(|member| has_suffix(&member.name, ".ovf")) else {
        // A plain tar of disks, named as an OVA by the user.
        let is_disk =
            |member: &&Member| has_suffix(&member.name, ".vmdk") || has_suffix(&member.name, ".vmdk.gz");
        return Ok(members
            .iter()
            .filter(is_disk)
            .map(|member| Disk {
                names: vec![lossy(&member.name)],
                gzip: has_suffix(&member.name, ".gz"),
                pieces: vec![member.clone()],
            })
            .collect());
    };
    let text = content(file, envelope, limits.ovf_bytes)?;
    let ovf = Ovf::parse(&text, limits).map_err(|error| match error {
        // The archive is one; it is its envelope that is not.
        FormatError { problem: Problem::NotThisFormat, .. } => {
            Error::from(FormatError { problem: Problem::Corrupt, ..error })
        }
        error => error.into(),
    })?;
    let mut disks = Vec::new();
    for used in ovf.disk_uses() {
        let Some(reference) = used.file else { continue };
        if let Some(parent) = &used.disk.parent_ref {
            return Err(Error::unsupported(format!(
                "the disk {:?} (a delta of {parent:?} inside an OVA)",
                used.disk.id
            )));
        }
        let pieces = pieces(&members, reference)?;
        let gzip = match reference.compression.as_deref() {
            Some("gzip") => true,
            Some(other) => {
                return Err(Error::unsupported(format!("the compression {other:?} of {:?}", reference.href)));
            }
            None => reference.href.to_ascii_lowercase().ends_with(".gz"),
        };
        let device = used.device.map(|(_, item)| item.name.clone());
        let names = [Some(reference.href.clone()), Some(used.disk.id.clone()), device];
        disks.push(Disk { names: names.into_iter().flatten().collect(), pieces, gzip });
    }
    Ok(disks)
}

/// The members that the file `reference` is stored in.
fn pieces(members: &[Member], reference: &ovf::File) -> Result<Vec<Member>> {
    let href = &reference.href;
    let missing = |name: &str| {
        Error::corrupt("OVF envelope", None, format!("it refers to {name:?}, which is not in the archive"))
            .hint("if the files are beside each other on disk, open the VMDK itself")
    };
    if let Some(whole) = members.iter().find(|member| reference.is_named(&member.name)) {
        return Ok(vec![whole.clone()]);
    }
    let mut pieces = Vec::new();
    let chunk = |number| {
        let piece = ovf::File { href: chunk_name(href, number), ..ovf::File::default() };
        members.iter().find(|member| piece.is_named(&member.name))
    };
    while let Some(member) = u32::try_from(pieces.len()).ok().and_then(chunk) {
        pieces.push(member.clone());
    }
    let stored: u64 = pieces.iter().fold(0, |sum, member| sum.saturating_add(member.size));
    if pieces.is_empty() || reference.size.is_some_and(|size| stored < size) {
        let name = if pieces.is_empty() { href.clone() } else { chunk_name(href, pieces.len() as u32) };
        return Err(missing(&name));
    }
    Ok(pieces)
}

/// The disk that `wanted` names, by its number (from 1) or one of its names.
fn choose(mut disks: Vec<Disk>, wanted: Option<&str>) -> Result<Disk> {
    let list: Vec<String> = (1..)
        .zip(&disks)
        .map(|(number, disk): (u32, _)| format!("{number}: {}", disk.names.join(", ")))
        .collect();
    let list = format!("its disks are {}", list.join("; "));
    let index = match wanted {
        None if disks.is_empty() => return Err(Error::invalid("the archive has no disk")),
        None if disks.len() == 1 => Some(0),
        None => {
            return Err(Error::invalid(format!("the archive has {} disks", disks.len()))
                .hint(format!("choose with --disk; {list}")));
        }
        Some(name) => {
            disks.iter().position(|disk| disk.names.iter().any(|known| known == name)).or_else(|| {
                name.parse::<usize>()
                    .ok()
                    .and_then(|number| number.checked_sub(1))
                    .filter(|&index| index < disks.len())
            })
        }
    };
    match (index, wanted) {
        (Some(index), _) => Ok(disks.swap_remove(index)),
        (None, wanted) => {
            Err(Error::invalid(format!("the archive has no disk {:?}", wanted.unwrap_or_default()))
                .hint(list))
        }
    }
}
