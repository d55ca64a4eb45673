//! Writing an OVF envelope for one virtual machine with one disk.

use quick_xml::escape::escape;

use crate::FormatError;
use crate::vmdk::AdapterType;

/// `format` of a streamOptimized VMDK.
pub const STREAM_OPTIMIZED: &str =
    "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";

/// What the envelope is to say; [`write`](Self::write) makes the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OvfBuilder {
    /// Name of the virtual machine.
    pub name: String,
    /// Name of the VMDK in the package.
    pub disk_file: String,
    /// Its size in bytes. The attribute is optional: `None` lets the envelope be written first when
    /// the size is not known yet.
    pub disk_file_size: Option<u64>,
    /// Size of the disk in bytes.
    pub capacity: u64,
    /// Bytes of the disk in use, if known.
    pub populated_size: Option<u64>,
    /// The controller: SCSI `lsilogic` or `buslogic`, or IDE.
    pub adapter: AdapterType,
    /// Number of CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual hardware version, `vmx-07` for 7: ESX(i) 4 and later.
    pub hardware_version: u32,
}

impl OvfBuilder {
    /// A machine with one CPU, 1 GiB of memory, hardware version 7 and an lsilogic controller.
    pub fn new(name: impl Into<String>, disk_file: impl Into<String>, capacity: u64) -> Self {
        Self {
            name: name.into(),
            disk_file: disk_file.into(),
            disk_file_size: None,
            capacity,
            populated_size: None,
            adapter: AdapterType::default(),
            cpus: 1,
            memory_mib: 1024,
            hardware_version: 7,
        }
    }

    /// The text of the envelope, OVF 1.1. Children of an `Item` are in alphabetical order, which
    /// the CIM schema demands.
    ///
    /// # Errors
    /// `Unsupported` for an empty name, or one with a control character (XML cannot hold it).
    pub fn write(&self) -> Result<String, FormatError> {
        for name in [&self.name, &self.disk_file] {
            if name.is_empty() || name.chars().any(|c| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'))
            {
                return Err(FormatError::unsupported(
                    "OVF envelope",
                    format!("a name of {name:?}: rename it"),
                ));
            }
        }
        let name = escape(&self.name);
        let file = escape(percent_encode(&self.disk_file)).into_owned();
        let size = attribute("size", self.disk_file_size);
        let populated = attribute("populatedSize", self.populated_size);
        let Self { capacity, cpus, memory_mib, hardware_version, .. } = self;
        let controller = match &self.adapter {
            AdapterType::Ide => item(&[
                ("Address", "0"),
                ("Description", "IDE Controller"),
                ("ElementName", "IDE 0"),
                ("InstanceID", "3"),
                ("ResourceType", "5"),
            ]),
            scsi => item(&[
                ("Address", "0"),
                ("Description", "SCSI Controller"),
                ("ElementName", "SCSI controller 0"),
                ("InstanceID", "3"),
                ("ResourceSubType", if *scsi == AdapterType::BusLogic { "buslogic" } else { "lsilogic" }),
                ("ResourceType", "6"),
            ]),
        };
        let cpu = item(&[
            ("AllocationUnits", "hertz * 10^6"),
            ("Description", "Number of Virtual CPUs"),
            ("ElementName", &format!("{cpus} virtual CPU(s)")),
            ("InstanceID", "1"),
            ("ResourceType", "3"),
            ("VirtualQuantity", &cpus.to_string()),
        ]);
        let memory = item(&[
            ("AllocationUnits", "byte * 2^20"),
            ("Description", "Memory Size"),
            ("ElementName", &format!("{memory_mib}MB of memory")),
            ("InstanceID", "2"),
            ("ResourceType", "4"),
            ("VirtualQuantity", &memory_mib.to_string()),
        ]);
        let disk = item(&[
            ("AddressOnParent", "0"),
            ("ElementName", "Hard disk 1"),
            ("HostResource", "ovf:/disk/vmdisk1"),
            ("InstanceID", "4"),
            ("Parent", "3"),
            ("ResourceType", "17"),
        ]);
        Ok(format!(
            r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
  <References>
    <File ovf:href="{file}" ovf:id="file1"{size}/>
  </References>
  <DiskSection>
    <Info>Virtual disk information</Info>
    <Disk ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte" ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:format="{STREAM_OPTIMIZED}"{populated}/>
  </DiskSection>
  <VirtualSystem ovf:id="{name}">
    <Info>A virtual machine</Info>
    <Name>{name}</Name>
    <OperatingSystemSection ovf:id="102" vmw:osType="otherGuest64">
      <Info>The kind of installed guest operating system</Info>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>Virtual hardware requirements</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-{hardware_version:02}</vssd:VirtualSystemType>
      </System>
{cpu}{memory}{controller}{disk}    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"#
        ))
    }
}

fn attribute(name: &str, value: Option<u64>) -> String {
    value.map(|value| format!(" ovf:{name}=\"{value}\"")).unwrap_or_default()
}

/// The values are ours and need no escaping.
fn item(fields: &[(&str, &str)]) -> String {
    let lines: String =
        fields.iter().map(|(name, value)| format!("        <rasd:{name}>{value}</rasd:{name}>\n")).collect();
    format!("      <Item>\n{lines}      </Item>\n")
}

/// `href` is a URI reference: what is not allowed in one, and `%`, is encoded.
fn percent_encode(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=@/".contains(&byte);
    name.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
