use std::str::FromStr;

use diskmill_codec::Codec;
use diskmill_format::Limits;
use diskmill_format::qcow2::{CompressionType, Geometry, RefcountWidth};

use super::{EncryptionOptions, codec_of};
use crate::error::{Error, Result};
use crate::size::parse_size;

/// `cluster_size` where nobody names one, as in QEMU.
const DEFAULT_CLUSTER_SIZE: u64 = 64 << 10;

/// The version of a qcow2 image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compat {
    /// Version 2 (`compat=0.10`).
    V2,
    /// Version 3 (`compat=1.1`).
    #[default]
    V3,
}

impl FromStr for Compat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "0.10" | "v2" => Ok(Self::V2),
            "1.1" | "v3" => Ok(Self::V3),
            other => Err(Error::invalid(format!("compat={other:?}")).hint("0.10 or 1.1")),
        }
    }
}

/// How much of a fresh image is allocated beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Every cluster has its place in the tables; the file stays sparse.
    Metadata,
    /// The file's blocks are reserved (`fallocate`).
    Falloc,
    /// Zeros are written everywhere.
    Full,
}

impl FromStr for Preallocation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "off" => Ok(Self::Off),
            "metadata" => Ok(Self::Metadata),
            "falloc" => Ok(Self::Falloc),
            "full" => Ok(Self::Full),
            other => {
                Err(Error::invalid(format!("preallocation={other:?}")).hint("off, metadata, falloc or full"))
            }
        }
    }
}

/// Options of a fresh qcow2 image, with the names, meanings and defaults of `qemu-img create -f qcow2 -o help`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Options {
    /// `compat`.
    pub compat: Compat,
    /// `cluster_size` in bytes: a power of two from 512 (16 KiB with extended L2) to 2 MiB. `None`: 64 KiB, but a
    /// conversion that packs takes the source's packed unit, so that payloads can be taken over as they are.
    pub cluster_size: Option<u64>,
    /// `refcount_bits`: 1, 2, 4, … 64; version 2 has 16.
    pub refcount_bits: u64,
    /// `preallocation`.
    pub preallocation: Preallocation,
    /// `lazy_refcounts`.
    pub lazy_refcounts: bool,
    /// `extended_l2`.
    pub extended_l2: bool,
    /// `data_file`: name of the external data file, relative to the image's directory.
    pub data_file: Option<String>,
    /// `data_file_raw`: the external data file stays a valid raw image.
    pub data_file_raw: bool,
    /// `compression_type`.
    pub compression: CompressionType,
    /// `backing_file`: relative to the image's directory.
    pub backing_file: Option<String>,
    /// `backing_fmt`.
    pub backing_format: Option<String>,
    /// `encrypt.*`, and `encryption=on` for the legacy AES.
    pub encryption: Option<EncryptionOptions>,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self {
            compat: Compat::V3,
            cluster_size: None,
            refcount_bits: 16,
            preallocation: Preallocation::Off,
            lazy_refcounts: false,
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
            compression: CompressionType::Zlib,
            backing_file: None,
            backing_format: None,
            encryption: None,
        }
    }
}

/// `on` or `off`, and what else QEMU takes for them.
pub(crate) fn parse_bool(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        other => Err(Error::invalid(format!("{name}={other:?}")).hint("on or off")),
    }
}

impl Qcow2Options {
    /// The names of all options, for help.
    pub const NAMES: [&str; 19] = [
        "compat",
        "cluster_size",
        "refcount_bits",
        "preallocation",
        "lazy_refcounts",
        "extended_l2",
        "data_file",
        "data_file_raw",
        "compression_type",
        "backing_file",
        "backing_fmt",
        "encrypt.format",
        "encrypt.key-secret",
        "encrypt.cipher-alg",
        "encrypt.cipher-mode",
        "encrypt.ivgen-alg",
        "encrypt.ivgen-hash-alg",
        "encrypt.hash-alg",
        "encrypt.iter-time",
    ];

    /// Sets one option as it stands in an `-o` list.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) for a bad value or an unknown name,
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) for one of QEMU's that is not supported.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "compat" => {
                self.compat = value.parse()?;
            }
            "cluster_size" => self.cluster_size = Some(parse_size(value)?),
            "refcount_bits" => {
                self.refcount_bits =
                    value.parse().map_err(|_| Error::invalid(format!("refcount_bits={value:?}")))?;
            }
            "preallocation" => self.preallocation = value.parse()?,
            "lazy_refcounts" => self.lazy_refcounts = parse_bool(name, value)?,
            "extended_l2" => self.extended_l2 = parse_bool(name, value)?,
            "data_file" => self.data_file = Some(value.to_owned()),
            "data_file_raw" => self.data_file_raw = parse_bool(name, value)?,
            "compression_type" => {
                self.compression = match value {
                    "zlib" => CompressionType::Zlib,
                    "zstd" => CompressionType::Zstd,
                    other => {
                        return Err(
                            Error::invalid(format!("compression_type={other:?}")).hint("zlib or zstd")
                        );
                    }
                }
            }
            "backing_file" => self.backing_file = Some(value.to_owned()),
            "backing_fmt" => self.backing_format = Some(value.to_owned()),
            "size" => {
                return Err(Error::unsupported("the option size in a conversion (the source has its size)"));
            }
            "encryption" => {
                if parse_bool(name, value)? {
                    self.set("encrypt.format", "aes")?;
                }
            }
            other => {
                if let Some(name) = other.strip_prefix("encrypt.") {
                    // Set as a whole: an error leaves the options as they were.
                    let mut encryption = self.encryption.clone().unwrap_or_default();
                    encryption.set(name, value)?;
                    self.encryption = Some(encryption);
                    return Ok(());
                }
                return Err(Error::invalid(format!("qcow2 has no option {other:?}"))
                    .hint(format!("it has {}", Self::NAMES.join(", "))));
            }
        }
        Ok(())
    }

    /// The codec of packed clusters.
    pub(crate) const fn codec(&self) -> Codec {
        codec_of(self.compression)
    }

    /// Bytes in a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.cluster_size.unwrap_or(DEFAULT_CLUSTER_SIZE)
    }

    /// Leaves the choice of the cluster size to the source, which has packed units of `unit` bytes, if it is open.
    pub(crate) fn fit_clusters(&mut self, unit: u64) {
        let fitting = Self { cluster_size: Some(unit), ..self.clone() };
        if self.cluster_size.is_none() && fitting.geometry().is_ok() {
            *self = fitting;
        }
    }

    /// Cluster size and entry width.
    pub(crate) fn geometry(&self) -> Result<Geometry> {
        Some(self.cluster_size())
            .filter(|size| size.is_power_of_two())
            .and_then(|size| Geometry::new(size.trailing_zeros(), self.extended_l2))
            .ok_or_else(|| {
                let least = if self.extended_l2 { "16k (because of extended_l2)" } else { "512" };
                Error::invalid(format!("cluster_size={}", self.cluster_size()))
                    .hint(format!("a power of two from {least} to 2M"))
            })
    }

    pub(crate) fn refcount_width(&self) -> Result<RefcountWidth> {
        RefcountWidth::from_bits(self.refcount_bits).ok_or_else(|| {
            Error::invalid(format!("refcount_bits={}", self.refcount_bits)).hint("a power of two, at most 64")
        })
    }

    /// Checks the options against each other, as QEMU does (`qcow2_co_create`), and against a compressed output.
    pub(crate) fn check(&mut self, compress: bool) -> Result<()> {
        self.geometry()?;
        self.refcount_width()?;
        if self.data_file_raw && self.data_file.is_none() {
            return Err(Error::invalid("data_file_raw needs data_file"));
        }
        // Without tables that point everywhere, a guest's write through the raw file could go unseen.
        if self.data_file_raw && self.preallocation == Preallocation::Off {
            self.preallocation = Preallocation::Metadata;
        }
        if self.compat == Compat::V2 {
            let needs_v3 = [
                ("lazy_refcounts", self.lazy_refcounts),
                ("refcount_bits other than 16", self.refcount_bits != 16),
                ("extended_l2", self.extended_l2),
                ("data_file", self.data_file.is_some()),
                ("compression_type=zstd", self.compression != CompressionType::Zlib),
            ];
            if let Some((name, _)) = needs_v3.into_iter().find(|(_, used)| *used) {
                return Err(Error::invalid(format!("{name} needs compat=1.1")));
            }
        }
        if compress && self.preallocation != Preallocation::Off {
            return Err(Error::invalid("compression and preallocation exclude each other"));
        }
        if compress && self.encryption.is_some() {
            return Err(Error::invalid("compression and encryption exclude each other"));
        }
        if self.encryption.is_some() && self.preallocation != Preallocation::Off && self.compat == Compat::V2
        {
            return Err(Error::unsupported("encryption with preallocation in version 2 (compat=0.10)"));
        }
        if compress && self.data_file.is_some() {
            return Err(Error::invalid("compression and an external data file exclude each other"));
        }
        if self.backing_file.is_some() && self.data_file_raw {
            return Err(Error::invalid("a backing file and data_file_raw exclude each other"));
        }
        if self.backing_file.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return Err(Error::invalid(
                "a backing file and preallocation exclude each other without extended_l2",
            ));
        }
        if self.backing_file.is_none() && self.backing_format.is_some() {
            return Err(Error::invalid("a backing format without a backing file"));
        }
        if let Some(name) = &self.backing_file
            && name.len() as u64 > u64::from(Limits::default().backing_name_bytes)
        {
            return Err(Error::invalid(format!(
                "a backing file name of {} bytes; at most 1023 fit",
                name.len()
            )));
        }
        Ok(())
    }
}
