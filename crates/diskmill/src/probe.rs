use std::fmt;
use std::str::FromStr;

use diskmill_io::Storage;

use crate::error::{Error, Result};
use crate::reader::read_full;

/// An image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The guest's bytes as they are.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// VMware's format: a descriptor with its extents, or one sparse extent.
    Vmdk,
    /// A tar archive with an OVF envelope and its disks, of which one is read.
    Ova,
}

/// Bytes from the start of a file that [`Format::probe`] looks at.
pub(crate) const PROBE_BYTES: usize = diskmill_format::vmdk::PROBE_BYTES;

/// Of these, the ones that settle the format of most images.
const SETTLING_BYTES: usize = 4 << 10;

/// The first bytes of a file, as many as it takes to tell its format.
pub(crate) fn first_bytes(storage: &dyn Storage) -> Result<Vec<u8>> {
    let mut start = vec![0; SETTLING_BYTES];
    let mut got = read_full(storage, &mut start, 0)?;
    if got == start.len() && Format::probe(&start) == Format::Raw {
        start.resize(PROBE_BYTES, 0);
        let rest = start.get_mut(got..).unwrap_or_default();
        got += read_full(storage, rest, got as u64)?;
    }
    start.truncate(got);
    Ok(start)
}

impl Format {
    /// The format that the first bytes of a file look like, best 64 KiB of them. Everything else is raw.
    #[must_use]
    pub fn probe(start: &[u8]) -> Self {
        if start.starts_with(&diskmill_format::qcow2::MAGIC) {
            Self::Qcow2
        } else if diskmill_format::vmdk::probe(start).is_some() {
            Self::Vmdk
        } else if crate::ova::probe(start) {
            Self::Ova
        } else {
            Self::Raw
        }
    }

    /// The name that qemu-img uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Ova => "ova",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    /// Takes qemu-img's names. `file` and `host_device`, which QEMU writes into some backing format extensions,
    /// mean raw.
    fn from_str(name: &str) -> Result<Self> {
        match name {
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "vmdk" => Ok(Self::Vmdk),
            "ova" => Ok(Self::Ova),
            other => Err(Error::unsupported(format!("the image format {other:?}"))
                .hint("raw, qcow2, vmdk and ova are")),
        }
    }
}
