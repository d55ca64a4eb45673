use std::str::FromStr;

use diskmill_format::vmdk::{AdapterType, CreateType, Descriptor, DescriptorBuilder, SECTOR_BYTES};
use sha2::{Digest, Sha256};

use super::flat::FlatAssembler;
use super::sparse::SparseAssembler;
use super::stream::StreamAssembler;
use crate::convert::Assembler;
use crate::error::{Error, Result};

/// `toolsVersion` of a disk of which nothing is known.
const UNKNOWN_TOOLS: u32 = i32::MAX as u32;
/// What a disk is called that goes to a pipe.
const NAMELESS: &[u8] = b"disk.vmdk";

/// The kind of a VMDK output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Subformat {
    /// One file that grows, with its descriptor in it.
    #[default]
    MonolithicSparse,
    /// A descriptor and one flat file.
    MonolithicFlat,
    /// A descriptor and files of at most 2047 MiB that grow.
    TwoGbMaxExtentSparse,
    /// A descriptor and flat files of at most 2047 MiB.
    TwoGbMaxExtentFlat,
    /// One compressed file that is read and written front to back: what vSphere and the clouds import.
    StreamOptimized,
}

impl Subformat {
    const ALL: [(Self, CreateType, &'static str); 5] = [
        (Self::MonolithicSparse, CreateType::MonolithicSparse, "monolithicSparse"),
        (Self::MonolithicFlat, CreateType::MonolithicFlat, "monolithicFlat"),
        (Self::TwoGbMaxExtentSparse, CreateType::TwoGbMaxExtentSparse, "twoGbMaxExtentSparse"),
        (Self::TwoGbMaxExtentFlat, CreateType::TwoGbMaxExtentFlat, "twoGbMaxExtentFlat"),
        (Self::StreamOptimized, CreateType::StreamOptimized, "streamOptimized"),
    ];

    fn create_type(self) -> CreateType {
        let found = Self::ALL.into_iter().find(|(subformat, ..)| *subformat == self);
        found.map_or(CreateType::MonolithicSparse, |(_, kind, _)| kind)
    }

    /// Whether the descriptor is a file of its own.
    const fn has_extent_files(self) -> bool {
        matches!(self, Self::MonolithicFlat | Self::TwoGbMaxExtentSparse | Self::TwoGbMaxExtentFlat)
    }
}

impl FromStr for Subformat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|(.., known)| known.eq_ignore_ascii_case(name))
            .map(|(subformat, ..)| subformat)
            .ok_or_else(|| {
                Error::invalid(format!("subformat={name}")).hint(Self::ALL.map(|(.., name)| name).join(", "))
            })
    }
}

/// Options of a VMDK output, with qemu-img's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmdkOptions {
    /// `subformat`.
    pub subformat: Subformat,
    /// `adapter_type`; lsilogic by default (QEMU's ide is what ESXi and the clouds refuse).
    pub adapter: AdapterType,
    /// `hwversion`; 4 by default, 6 with `compat6`.
    pub hw_version: Option<u32>,
    /// `compat6`: a disk for virtual hardware version 6.
    pub compat6: bool,
    /// `zeroed_grain`: zeros over a backing file take an entry, not a grain (monolithicSparse, twoGbMaxExtentSparse).
    pub zeroed_grain: bool,
    /// `toolsVersion`.
    pub tools_version: u32,
    /// `backing_file`: the parent, a VMDK; named as it stands here (monolithicSparse, twoGbMaxExtentSparse).
    pub backing_file: Option<String>,
    /// `backing_fmt`; only vmdk is possible.
    pub backing_format: Option<String>,
    /// The parent's CID, found when the output is opened.
    pub(crate) parent_cid: Option<u32>,
}

impl Default for VmdkOptions {
    fn default() -> Self {
        Self {
            subformat: Subformat::default(),
            adapter: AdapterType::default(),
            hw_version: None,
            compat6: false,
            zeroed_grain: false,
            tools_version: UNKNOWN_TOOLS,
            backing_file: None,
            backing_format: None,
            parent_cid: None,
        }
    }
}

impl VmdkOptions {
    /// Sets one option as it stands in an `-o` list.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) for a bad value or an unknown name.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let bad = || Error::invalid(format!("{name}={value}"));
        let on = || match value {
            "on" | "yes" | "true" | "y" => Ok(true),
            "off" | "no" | "false" | "n" => Ok(false),
            _ => Err(bad().hint("on or off")),
        };
        match name {
            "subformat" => self.subformat = value.parse()?,
            "adapter_type" => {
                self.adapter = match AdapterType::from_bytes(value.as_bytes()) {
                    AdapterType::Other(_) => return Err(bad().hint("ide, buslogic, lsilogic or legacyESX")),
                    known => known,
                }
            }
            "hwversion" => match value {
                "undefined" => self.hw_version = None,
                value => self.hw_version = Some(value.parse().map_err(|_| bad().hint("a number"))?),
            },
            "toolsversion" | "toolsVersion" => {
                self.tools_version = value.parse().map_err(|_| bad().hint("a number"))?
            }
            "compat6" => self.compat6 = on()?,
            "zeroed_grain" => self.zeroed_grain = on()?,
            "backing_file" => self.backing_file = Some(value.to_owned()),
            "backing_fmt" => self.backing_format = Some(value.to_owned()),
            "size" => {
                return Err(Error::unsupported("the option size in a conversion (the source has its size)"));
            }
            other => {
                return Err(Error::invalid(format!("vmdk has no option {other:?}")).hint(
                    "subformat, adapter_type, hwversion, compat6, zeroed_grain, toolsversion, backing_file, backing_fmt",
                ));
            }
        }
        Ok(())
    }

    /// Checks the options against each other.
    pub(crate) fn check(&self, compress: bool) -> Result<()> {
        let growing = matches!(self.subformat, Subformat::MonolithicSparse | Subformat::TwoGbMaxExtentSparse);
        let only_growing = "only monolithicSparse and twoGbMaxExtentSparse";
        if compress && self.subformat != Subformat::StreamOptimized {
            return Err(
                Error::invalid("compression of this kind of VMDK").hint("add -o subformat=streamOptimized")
            );
        }
        if self.zeroed_grain && !growing {
            return Err(Error::invalid(format!("zeroed_grain: {only_growing} have it")));
        }
        if self.backing_file.is_some() && !growing {
            return Err(Error::invalid(format!("a backing file: {only_growing} take one")));
        }
        if self.compat6 && self.hw_version.is_some() {
            return Err(Error::invalid("compat6 and hwversion exclude each other"));
        }
        if self.backing_format.as_deref().is_some_and(|format| format != "vmdk") {
            return Err(Error::invalid("the backing file of a VMDK must be a VMDK"));
        }
        Ok(())
    }

    /// The descriptor of a disk of `size` bytes in a file of this name. `digest` holds what is known of the content.
    pub(super) fn describe(&self, name: &[u8], size: u64, content: u64) -> Result<Descriptor> {
        let kind = self.subformat.create_type();
        let mut builder = DescriptorBuilder::new(kind, size.div_ceil(SECTOR_BYTES), name, 0);
        builder.adapter = self.adapter.clone();
        builder.hw_version = self.hw_version.unwrap_or(if self.compat6 { 6 } else { 4 });
        builder.tools_version = self.tools_version;
        builder.parent = match (&self.backing_file, self.parent_cid) {
            (Some(parent), Some(cid)) => Some((cid, parent.clone().into_bytes())),
            _ => None,
        };
        // Never random: the same input and options give the same bytes.
        let text = builder.build()?.write()?;
        let digest = Sha256::new().chain_update(content.to_le_bytes()).chain_update(text).finalize();
        builder.content_id = digest.first_chunk().map_or(0, |id: &[u8; 16]| u128::from_be_bytes(*id));
        Ok(builder.build()?)
    }

    /// Names of the extent files beside the descriptor `name`, for a disk of `size` bytes.
    pub(crate) fn extent_files(&self, name: &[u8], size: Option<u64>) -> Result<Vec<Vec<u8>>> {
        if !self.subformat.has_extent_files() {
            return Ok(Vec::new());
        }
        let descriptor = self.describe(name, known(size)?, 0)?;
        if descriptor.extents.is_empty() {
            return Err(Error::unsupported("a disk of no bytes, split into extents")
                .hint("use subformat=monolithicSparse"));
        }
        Ok(descriptor.extents.into_iter().filter_map(|extent| extent.file).collect())
    }

    /// Lays out a disk of `size` bytes (`None`: not known yet) in a file of this name (`None`: a pipe). `granule`: what
    /// zeros are looked for in, where the kind leaves that open.
    pub(crate) fn assembler(
        &self,
        name: Option<&[u8]>,
        size: Option<u64>,
        granule: u64,
    ) -> Result<Box<dyn Assembler>> {
        if name.is_none() {
            // The size stands at the front, so a pipe needs it first.
            known(size)?;
        }
        let name = name.unwrap_or(NAMELESS);
        Ok(match self.subformat {
            Subformat::StreamOptimized => Box::new(StreamAssembler::new(self.clone(), name, size, 0)?),
            Subformat::MonolithicSparse | Subformat::TwoGbMaxExtentSparse => {
                Box::new(SparseAssembler::new(self.clone(), name, known(size)?)?)
            }
            Subformat::MonolithicFlat | Subformat::TwoGbMaxExtentFlat => {
                Box::new(FlatAssembler::new(self.clone(), name, known(size)?, granule)?)
            }
        })
    }
}

fn known(size: Option<u64>) -> Result<u64> {
    size.ok_or_else(|| {
        Error::unsupported("this kind of VMDK from a pipe, whose size is not known beforehand")
            .hint("write the pipe to a file first, or a streamOptimized VMDK to a file")
    })
}
