//! OVA archives: a disk is read in place, inside the tar.

mod member;
mod verify;
mod write;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use diskmill_format::ova::ovf::DiskUse;
use diskmill_format::ova::tar::{Member, MemberKind, Scanner, Step};
use diskmill_format::ova::{Ovf, chunk_name, ovf};
use diskmill_format::{FormatError, Limits, Problem};
use diskmill_io::{SharedStorage, Storage};

use crate::error::{Error, Kind, Result};
use crate::image::OpenOptions;
use crate::probe::{Format, first_bytes};
use crate::qcow2::lossy;
use crate::reader::{read_exact, read_full};
use member::{Part, concatenated, spooled};
pub use verify::{FileCheck, Outcome, verify};
pub(crate) use write::assembler;

/// Longest name of a member, in bytes: Linux's `PATH_MAX`.
const MAX_NAME: usize = 4096;
/// As many disks are listed in a message.
const LISTED: usize = 20;

/// Whether these first bytes of a file are an archive whose first file is a part of an OVA: the envelope (the order
/// that DSP0243 demands), the manifest, the certificate or a disk. Other archives are raw data unless they are named to
/// be OVAs.
pub(crate) fn probe(start: &[u8]) -> bool {
    first_file(start).is_some_and(|member| {
        [".ovf", ".mf", ".cert", ".vmdk", ".vmdk.gz"].iter().any(|suffix| has_suffix(&member.name, suffix))
    })
}

/// Whether the file at `path` is called an OVA. Its first bytes do not matter: a damaged archive must not be taken for a raw
/// disk.
pub(crate) fn is_called(path: &Path) -> bool {
    path.extension().is_some_and(|name| name.eq_ignore_ascii_case("ova"))
}

fn first_file(start: &[u8]) -> Option<Member> {
    let mut scanner = Scanner::new(&Limits::default());
    loop {
        let (at, len) = scanner.want();
        let block = usize::try_from(at.get()).ok().and_then(|at| start.get(at..)?.get(..len))?;
        match scanner.feed(block) {
            Ok(Step::More) => {}
            Ok(Step::Member(member)) if member.kind == MemberKind::Directory => {}
            Ok(Step::Member(member)) if member.kind == MemberKind::File => return Some(member),
            _ => return None,
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
                if member.name.len() > MAX_NAME {
                    let message = format!("a member's name has more than {MAX_NAME} bytes");
                    return Err(Error::new(Kind::Limit, message).within("tar header", at.get()));
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

/// A disk of an archive that is open.
pub(crate) struct OpenDisk {
    pub(crate) storage: SharedStorage,
    pub(crate) format: Format,
}

/// The disk of the archive in `file` that `options` mean. Only that one is looked at: the others may be damaged.
pub(crate) fn open(file: &SharedStorage, options: &OpenOptions) -> Result<OpenDisk> {
    let members = members(&**file, &options.limits).map_err(|error| match error.kind() {
        Kind::NotThisFormat => error.hint("a raw disk under such a name needs -f raw"),
        _ => error,
    })?;
    let envelope = envelope(&**file, &members, &options.limits)?;
    let disks: Vec<Disk<'_>> = match &envelope {
        Some(ovf) => {
            ovf.disk_uses().into_iter().filter_map(|used| Some(Disk::Described(used, used.file?))).collect()
        }
        None => members.iter().filter(|member| is_disk(member)).map(Disk::Member).collect(),
    };
    let disk = choose(&disks, options.disk.as_deref())?;
    let (pieces, gzip) = disk.stored(&members)?;
    let parts = pieces.iter().map(|member| Part { at: member.data.get(), len: member.size });
    let stored = concatenated(file, parts)?;
    let storage = if gzip { spooled(&*stored, &disk.name(), options.limits.spool_bytes)? } else { stored };
    match Format::probe(&first_bytes(&*storage)?) {
        format @ (Format::Vmdk | Format::Qcow2) => Ok(OpenDisk { storage, format }),
        // Never raw: a file of an unknown format is not its guest's bytes.
        _ => {
            let said = match disk {
                Disk::Described(used, _) => format!("; its ovf:format is {:?}", shown(&used.disk.format)),
                Disk::Member(_) => String::new(),
            };
            let name = disk.name();
            Err(Error::unsupported(format!(
                "the disk {:?}, neither VMDK nor qcow2{said}, in an OVA",
                shown(&name)
            )))
        }
    }
}

/// The envelope, if there is one.
fn envelope(file: &dyn Storage, members: &[Member], limits: &Limits) -> Result<Option<Ovf>> {
    let Some(envelope) = members.iter().find(|member| has_suffix(&member.name, ".ovf")) else {
        return Ok(None);
    };
    let text = content(file, envelope, limits.ovf_bytes)?;
    let ovf = Ovf::parse(&text, limits).map_err(|error| match error {
        // The archive is one; it is its envelope that is not.
        FormatError { problem: Problem::NotThisFormat, .. } => {
            FormatError { problem: Problem::Corrupt, ..error }
        }
        error => error,
    })?;
    Ok(Some(ovf))
}

fn is_disk(member: &Member) -> bool {
    has_suffix(&member.name, ".vmdk") || has_suffix(&member.name, ".vmdk.gz")
}

/// A disk of an archive.
enum Disk<'a> {
    /// As the envelope has it.
    Described(DiskUse<'a>, &'a ovf::File),
    /// Of a plain tar of disks, named as an OVA by the user.
    Member(&'a Member),
}

impl Disk<'_> {
    /// What it may be called: file, disk id, device.
    fn names(&self) -> impl Iterator<Item = Cow<'_, str>> {
        match self {
            Self::Described(used, file) => {
                let device = used.device.map(|(_, item)| item.name.as_str());
                [Some(file.href.as_str()), Some(used.disk.id.as_str()), device]
                    .map(|name| name.map(Cow::Borrowed))
            }
            Self::Member(member) => [Some(Cow::Owned(lossy(&member.name))), None, None],
        }
        .into_iter()
        .flatten()
    }

    /// The name of its file.
    fn name(&self) -> Cow<'_, str> {
        self.names().next().unwrap_or_default()
    }

    /// The members that it is stored in, and whether they are compressed with gzip.
    fn stored<'m>(&self, members: &'m [Member]) -> Result<(Vec<&'m Member>, bool)>
    where
        Self: 'm,
    {
        let (used, file) = match self {
            Self::Described(used, file) => (used, file),
            Self::Member(member) => return Ok((vec![member], has_suffix(&member.name, ".gz"))),
        };
        if let Some(parent) = &used.disk.parent_ref {
            let id = &used.disk.id;
            return Err(Error::unsupported(format!("the disk {id:?} (a delta of {parent:?} inside an OVA)")));
        }
        let gzip = match file.compression.as_deref() {
            Some("gzip") => true,
            Some(other) => {
                return Err(Error::unsupported(format!("the compression {other:?} of {:?}", file.href)));
            }
            None => has_suffix(file.href.as_bytes(), ".gz"),
        };
        Ok((pieces(members, file)?, gzip))
    }
}

/// The members that the file `reference` is stored in.
fn pieces<'m>(members: &'m [Member], reference: &ovf::File) -> Result<Vec<&'m Member>> {
    let mut by_name: HashMap<&[u8], &Member> = HashMap::with_capacity(members.len());
    for member in members {
        by_name.entry(&member.name).or_insert(member);
    }
    // What the reference means: as it stands, or percent-decoded.
    let bases = [reference.href.clone().into_bytes(), reference.decoded_href()];
    let find = |suffix: &str| {
        bases.iter().find_map(|base| by_name.get([base, suffix.as_bytes()].concat().as_slice()).copied())
    };
    if let Some(whole) = find("") {
        return Ok(vec![whole]);
    }
    let pieces: Vec<&Member> = (0..).map_while(|number| find(&chunk_name("", number))).collect();
    let stored: u64 = pieces.iter().fold(0, |sum, member| sum.saturating_add(member.size));
    if pieces.is_empty() || reference.size.is_some_and(|size| stored < size) {
        let suffix = if pieces.is_empty() { String::new() } else { chunk_name("", pieces.len() as u32) };
        let name = shown(&reference.href) + &suffix;
        let message = format!("it refers to {name:?}, which is not in the archive");
        return Err(Error::corrupt("OVF envelope", None, message)
            .hint("if the files are beside each other on disk, open the VMDK itself"));
    }
    Ok(pieces)
}

/// The disk that `wanted` names, by one of its names or its number (from 1).
fn choose<'d, 'a>(disks: &'d [Disk<'a>], wanted: Option<&str>) -> Result<&'d Disk<'a>> {
    let Some(name) = wanted else {
        return match disks {
            [] => Err(Error::invalid("the archive has no disk")),
            [disk] => Ok(disk),
            _ => Err(Error::invalid(format!("the archive has {} disks", disks.len()))
                .hint(format!("choose with --disk; {}", list(disks)))),
        };
    };
    let numbered = || disks.get(name.parse::<usize>().ok()?.checked_sub(1)?);
    disks
        .iter()
        .find(|disk| disk.names().any(|known| known == name))
        .or_else(numbered)
        .ok_or_else(|| Error::invalid(format!("the archive has no disk {name:?}")).hint(list(disks)))
}

/// The disks, for a message.
fn list(disks: &[Disk<'_>]) -> String {
    let mut lines: Vec<String> = (1..)
        .zip(disks.iter().take(LISTED))
        .map(|(number, disk): (u32, _)| {
            let names: Vec<String> = disk.names().map(|name| shown(&name)).collect();
            format!("{number}: {}", names.join(", "))
        })
        .collect();
    if disks.len() > LISTED {
        lines.push("…".to_owned());
    }
    format!("its disks are {}", lines.join("; "))
}

/// The start of a name from a file, which may be of any length.
fn shown(name: &str) -> String {
    name.chars().take(80).collect()
}
