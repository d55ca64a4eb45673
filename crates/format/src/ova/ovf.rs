//! Reading an OVF envelope.
//!
//! Elements and attributes are matched by their local names along the path from the root, so all
//! namespaces in use (OVF 0.9, 1.x and 2.x) read alike. Document type definitions are refused:
//! there are no entities besides the five of XML.

use std::borrow::Cow;

use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion};

use crate::vmdk::AdapterType;
use crate::{FormatError, Limits};

const WHAT: &str = "OVF envelope";
/// Characters of the envelope that a message quotes at most.
const QUOTED: usize = 200;

/// `ResourceType` of an IDE controller (CIM_ResourceAllocationSettingData).
pub const IDE_CONTROLLER: u16 = 5;
/// `ResourceType` of a parallel SCSI controller.
pub const SCSI_CONTROLLER: u16 = 6;
/// `ResourceType` of a disk drive.
pub const DISK_DRIVE: u16 = 17;

/// A file of the package (`References/File`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct File {
    /// `id`, which disks refer to.
    pub id: String,
    /// `href`: where the file is, relative to the envelope. Percent-encoding is kept, see
    /// [`is_named`](Self::is_named).
    pub href: String,
    /// `size` in bytes, of the file as it is stored.
    pub size: Option<u64>,
    /// `compression`, for example `gzip`; `None` also for `identity`.
    pub compression: Option<String>,
    /// `chunkSize` in bytes: the file is stored in pieces, see [`chunk_name`](super::chunk_name).
    pub chunk_size: Option<u64>,
}

impl File {
    /// `href`, percent-decoded.
    #[must_use]
    pub fn decoded_href(&self) -> Vec<u8> {
        percent_decode(self.href.as_bytes())
    }

    /// Whether `name` is the file that `href` means: as it stands, or percent-decoded.
    #[must_use]
    pub fn is_named(&self, name: &[u8]) -> bool {
        self.href.as_bytes() == name || self.decoded_href() == name
    }
}

/// A disk (`DiskSection/Disk`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Disk {
    /// `diskId`.
    pub id: String,
    /// `capacity` as it stands; may be a property (`${name}`).
    pub capacity: String,
    /// `capacityAllocationUnits`, bytes without it.
    pub units: Option<String>,
    /// `fileRef`: the [`File::id`]; `None` for an empty disk.
    pub file_ref: Option<String>,
    /// `format`, a URI.
    pub format: String,
    /// `parentRef`: the [`Disk::id`] of the parent of a delta.
    pub parent_ref: Option<String>,
    /// `populatedSize`, in bytes.
    pub populated_size: Option<u64>,
}

impl Disk {
    /// The capacity in bytes; `None` for a property, an unknown unit, or beyond 2^64.
    #[must_use]
    pub fn capacity_bytes(&self) -> Option<u64> {
        let number: u64 = self.capacity.trim().parse().ok()?;
        number.checked_mul(self.units.as_deref().map_or(Some(1), unit_bytes)?)
    }
}

/// A virtual device (`VirtualHardwareSection/Item` or `StorageItem`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Item {
    /// `InstanceID`.
    pub instance: String,
    /// `ResourceType`, for example [`DISK_DRIVE`].
    pub resource_type: Option<u16>,
    /// `ResourceSubType`, for example `lsilogic`.
    pub sub_type: Option<String>,
    /// `ElementName`: the name people see.
    pub name: String,
    /// `Parent`: the [`instance`](Self::instance) of the controller.
    pub parent: Option<String>,
    /// `AddressOnParent`: orders the disks of a controller.
    pub address_on_parent: Option<u32>,
    /// `HostResource`, for example `ovf:/disk/vmdisk1`.
    pub host_resource: Option<String>,
}

/// A virtual machine (`VirtualSystem`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct System {
    /// `id`.
    pub id: String,
    /// `Name`.
    pub name: Option<String>,
    /// Its devices.
    pub items: Vec<Item>,
}

/// An envelope, as far as disks are concerned.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ovf {
    /// The files.
    pub files: Vec<File>,
    /// The disks.
    pub disks: Vec<Disk>,
    /// The virtual machines.
    pub systems: Vec<System>,
}

/// A disk with what belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskUse<'a> {
    /// The disk.
    pub disk: &'a Disk,
    /// Its file; `None` for an empty disk or a reference to nothing.
    pub file: Option<&'a File>,
    /// The virtual machine that uses it first, and the device.
    pub device: Option<(&'a System, &'a Item)>,
}

impl Ovf {
    /// Reads an envelope (UTF-8).
    ///
    /// # Errors
    /// `NotThisFormat` without an `Envelope`; `Corrupt` for malformed XML or text; `Unsupported`
    /// for a document type definition or another encoding; `Limit` above [`Limits::ovf_bytes`] or
    /// [`Limits::ovf_depth`].
    pub fn parse(text: &[u8], limits: &Limits) -> Result<Self, FormatError> {
        if text.len() as u64 > limits.ovf_bytes {
            let max = limits.ovf_bytes;
            return Err(FormatError::limit(WHAT, format!("{} bytes, the limit is {max}", text.len())));
        }
        if text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff") {
            return Err(FormatError::unsupported(WHAT, "the text is UTF-16: convert it to UTF-8"));
        }
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let text = std::str::from_utf8(text)
            .map_err(|error| FormatError::corrupt(WHAT, "not UTF-8").at(error.valid_up_to() as u64))?;
        let mut reader = Reader::from_str(text);
        reader.config_mut().expand_empty_elements = true;
        let mut visit = Visit::default();
        loop {
            let at = reader.buffer_position();
            let event = reader.read_event();
            let event = event.map_err(|error| {
                FormatError::corrupt(WHAT, start_of(&error.to_string())).at(reader.error_position())
            })?;
            match event {
                Event::Eof if visit.path.is_empty() => break,
                Event::Eof => return Err(FormatError::corrupt(WHAT, "the text is cut off").at(at)),
                Event::Start(_) if visit.path.len() >= limits.ovf_depth as usize => {
                    let max = limits.ovf_depth;
                    return Err(FormatError::limit(WHAT, format!("nested deeper than {max} elements")).at(at));
                }
                event => visit.event(event).map_err(|error| error.at(at))?,
            }
        }
        if visit.envelope {
            Ok(visit.ovf)
        } else {
            Err(FormatError::not_this_format(WHAT, "there is no Envelope element"))
        }
    }

    /// The disks in the order in which the virtual machines have them (controller, then address),
    /// then those no machine uses, in the order of the disk section.
    #[must_use]
    pub fn disk_uses(&self) -> Vec<DiskUse<'_>> {
        // A map keeps this linear in the text: a hostile envelope may have 10^5 disks and items.
        let mut free: std::collections::HashMap<&str, usize> =
            self.disks.iter().enumerate().rev().map(|(index, disk)| (disk.id.as_str(), index)).collect();
        let files: std::collections::HashMap<&str, &File> =
            self.files.iter().rev().map(|file| (file.id.as_str(), file)).collect();
        let file = |disk: &Disk| disk.file_ref.as_deref().and_then(|id| files.get(id).copied());
        let mut uses = Vec::new();
        let mut taken = vec![false; self.disks.len()];
        for system in &self.systems {
            let mut drives: Vec<&Item> =
                system.items.iter().filter(|item| item.resource_type == Some(DISK_DRIVE)).collect();
            drives.sort_by_key(|item| {
                (item.parent.as_ref().and_then(|id| id.parse::<u32>().ok()), item.address_on_parent)
            });
            for item in drives {
                let id = item.host_resource.as_deref().and_then(|name| name.rsplit('/').next());
                let index = id.and_then(|id| free.remove(id));
                if let Some((index, disk)) = index.and_then(|index| Some((index, self.disks.get(index)?))) {
                    uses.push(DiskUse { disk, file: file(disk), device: Some((system, item)) });
                    if let Some(taken) = taken.get_mut(index) {
                        *taken = true;
                    }
                }
            }
        }
        let unused = self.disks.iter().zip(taken).filter(|(_, taken)| !taken);
        uses.extend(unused.map(|(disk, _)| DiskUse { disk, file: file(disk), device: None }));
        uses
    }
}

impl DiskUse<'_> {
    /// The adapter type of the disk's controller, if the envelope has one that a descriptor can name.
    #[must_use]
    pub fn adapter(&self) -> Option<AdapterType> {
        let (system, item) = self.device?;
        let parent = item.parent.as_ref()?;
        let controller = system.items.iter().find(|item| item.instance == *parent)?;
        let sub_type = controller.sub_type.as_deref().unwrap_or_default();
        match controller.resource_type? {
            IDE_CONTROLLER => Some(AdapterType::Ide),
            SCSI_CONTROLLER if sub_type.eq_ignore_ascii_case("buslogic") => Some(AdapterType::BusLogic),
            SCSI_CONTROLLER => Some(AdapterType::LsiLogic),
            _ => None,
        }
    }
}

#[derive(Default)]
struct Visit<'a> {
    ovf: Ovf,
    envelope: bool,
    /// Local names of the open elements.
    path: Vec<Cow<'a, str>>,
    /// Text of the innermost open element.
    text: String,
}

impl<'a> Visit<'a> {
    fn event(&mut self, event: Event<'a>) -> Result<(), FormatError> {
        match event {
            Event::Start(start) => {
                self.text.clear();
                let name = start.local_name().as_ref().to_owned();
                self.path.push(Cow::Owned(name));
                self.open(&start)
            }
            Event::End(_) => {
                let text = std::mem::take(&mut self.text);
                self.close(text.trim());
                self.path.pop();
                Ok(())
            }
            Event::Text(text) => {
                self.text.push_str(&text.xml10_content());
                Ok(())
            }
            Event::CData(text) => {
                self.text.push_str(&text.xml10_content());
                Ok(())
            }
            Event::GeneralRef(reference) => {
                let name = reference.xml10_content().into_owned();
                let resolved = match reference.resolve_char_ref() {
                    Ok(Some(character)) => Some(character.to_string()),
                    Ok(None) => quick_xml::escape::resolve_predefined_entity(&name).map(str::to_owned),
                    Err(_) => None,
                };
                let unknown = || FormatError::corrupt(WHAT, format!("unknown entity &{};", start_of(&name)));
                self.text.push_str(&resolved.ok_or_else(unknown)?);
                Ok(())
            }
            Event::DocType(_) => {
                Err(FormatError::unsupported(WHAT, "it has a document type definition, which no OVF needs"))
            }
            _ => Ok(()),
        }
    }

    fn is_at(&self, tail: &[&str]) -> bool {
        self.path.len() >= tail.len() && self.path.iter().rev().zip(tail.iter().rev()).all(|(a, b)| a == b)
    }

    fn open(&mut self, start: &BytesStart<'_>) -> Result<(), FormatError> {
        let depth = self.path.len();
        if depth == 1 && self.is_at(&["Envelope"]) {
            self.envelope = true;
        } else if depth == 3 && self.is_at(&["Envelope", "References", "File"]) {
            let [id, href, size, compression, chunk] =
                attributes(start, ["id", "href", "size", "compression", "chunkSize"])?;
            self.ovf.files.push(File {
                id: id.unwrap_or_default(),
                href: href.unwrap_or_default(),
                size: number(size.as_deref())?,
                compression: compression.filter(|name| !name.is_empty() && name != "identity"),
                chunk_size: number(chunk.as_deref())?,
            });
        } else if depth == 3
            && self.is_at(&["Disk"])
            && self.path.get(1).is_some_and(|s| s.ends_with("Section"))
        {
            let [id, capacity, units, file_ref, format, parent_ref, populated] = attributes(
                start,
                [
                    "diskId",
                    "capacity",
                    "capacityAllocationUnits",
                    "fileRef",
                    "format",
                    "parentRef",
                    "populatedSize",
                ],
            )?;
            self.ovf.disks.push(Disk {
                id: id.unwrap_or_default(),
                capacity: capacity.unwrap_or_default(),
                units,
                file_ref,
                format: format.unwrap_or_default(),
                parent_ref,
                populated_size: number(populated.as_deref())?,
            });
        } else if self.is_at(&["VirtualSystem"]) {
            let [id] = attributes(start, ["id"])?;
            self.ovf.systems.push(System { id: id.unwrap_or_default(), ..System::default() });
        } else if self.is_item(0)
            && let Some(system) = self.ovf.systems.last_mut()
        {
            system.items.push(Item::default());
        }
        Ok(())
    }

    /// Whether the element `up` levels above the innermost one is a device of a virtual machine.
    fn is_item(&self, up: usize) -> bool {
        let Some(end) = self.path.len().checked_sub(up) else { return false };
        let Some([.., system, section, item]) = self.path.get(..end) else { return false };
        system == "VirtualSystem"
            && section == "VirtualHardwareSection"
            && matches!(item.as_ref(), "Item" | "StorageItem")
    }

    fn close(&mut self, text: &str) {
        let in_item = self.is_item(1);
        let is_name = self.is_at(&["VirtualSystem", "Name"]);
        let Some(system) = self.ovf.systems.last_mut() else { return };
        if is_name {
            system.name = Some(text.to_owned());
        }
        if !in_item {
            return;
        }
        let (Some(item), Some(field)) = (system.items.last_mut(), self.path.last()) else { return };
        match field.as_ref() {
            "InstanceID" | "InstanceId" => item.instance = text.to_owned(),
            "ResourceType" => item.resource_type = text.parse().ok(),
            "ResourceSubType" => item.sub_type = Some(text.to_owned()),
            "ElementName" => item.name = text.to_owned(),
            "Parent" => item.parent = Some(text.to_owned()),
            "AddressOnParent" => item.address_on_parent = text.parse().ok(),
            "HostResource" if item.host_resource.is_none() => item.host_resource = Some(text.to_owned()),
            _ => {}
        }
    }
}

/// The attributes with these local names; one with the prefix `ovf` or none goes before others.
fn attributes<const N: usize>(
    start: &BytesStart<'_>,
    names: [&str; N],
) -> Result<[Option<String>; N], FormatError> {
    let bad = |error: &dyn std::fmt::Display| {
        FormatError::corrupt(WHAT, start_of(&format!("bad attribute: {error}")))
    };
    let mut found = [const { None }; N];
    let mut sure = [false; N];
    let mut attributes = start.attributes();
    // The check for duplicates takes quadratic time in a hostile element.
    for attribute in attributes.with_checks(false) {
        let attribute = attribute.map_err(|error| bad(&error))?;
        let (local, prefix) = attribute.key.decompose();
        let Some(index) = names.iter().position(|name| *name == local.as_ref()) else { continue };
        let own = prefix.is_none_or(|prefix| prefix.as_ref() == "ovf");
        if let (Some(place), Some(sure)) = (found.get_mut(index), sure.get_mut(index))
            && !*sure
            && (own || place.is_none())
        {
            let value = attribute.normalized_value(XmlVersion::Implicit1_0).map_err(|error| bad(&error))?;
            *place = Some(value.into_owned());
            *sure = own;
        }
    }
    Ok(found)
}

fn number(text: Option<&str>) -> Result<Option<u64>, FormatError> {
    match text.map(str::trim) {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(|_| {
            FormatError::corrupt(WHAT, format!("{:?} is not a number of bytes", start_of(text)))
        }),
    }
}

/// What a message quotes of a text, which may be as long as the envelope.
fn start_of(text: &str) -> String {
    text.chars().take(QUOTED).collect()
}

/// Bytes of a programmatic unit (DSP0004, annex "Programmatic Units"): `byte`, `byte * 2^30`,
/// `byte * 10^9`, `byte * 1024`; also `MegaBytes` and `MB` as OVF 0.9 has them.
fn unit_bytes(unit: &str) -> Option<u64> {
    let mut factors = unit.split('*').map(str::trim);
    let base = factors.next()?.to_ascii_lowercase();
    let base = match base.strip_suffix('s').unwrap_or(&base) {
        "byte" => 1,
        "kilobyte" | "kb" => 1 << 10,
        "megabyte" | "mb" => 1 << 20,
        "gigabyte" | "gb" => 1 << 30,
        "terabyte" | "tb" => 1 << 40,
        _ => return None,
    };
    factors.try_fold(base, |product: u64, factor| {
        let factor = match factor.split_once('^') {
            Some((number, power)) => {
                number.trim().parse::<u64>().ok()?.checked_pow(power.trim().parse().ok()?)?
            }
            None => factor.parse().ok()?,
        };
        product.checked_mul(factor)
    })
}

fn percent_decode(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let hex = after.get(..2).filter(|hex| byte == b'%' && hex.iter().all(u8::is_ascii_hexdigit));
        let decoded = hex
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        out.push(decoded.unwrap_or(byte));
        rest = if decoded.is_some() { after.get(2..).unwrap_or_default() } else { after };
    }
    out
}

#[cfg(test)]
#[path = "ovf_tests.rs"]
mod tests;
