use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use diskmill_codec::{Codec, Packer, level_range};
use diskmill_io::EngineChoice;

use super::target::file_name;
use super::{Assembler, CarryBitmaps, Output};
use crate::error::{Error, Result};
use crate::image::{OpenOptions, resolve};
use crate::qcow2::{Preallocation, Qcow2Options};
use crate::vmdk::{Subformat, VmdkOptions};

/// The format of the output, with its options.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TargetFormat {
    /// Raw.
    Raw(RawOptions),
    /// qcow2.
    Qcow2(Qcow2Options),
    /// VMDK.
    Vmdk(VmdkOptions),
    /// An OVA with one virtual machine that has the disk as streamOptimized VMDK.
    Ova(VmdkOptions),
}

/// Options of a raw output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawOptions {
    /// `preallocation`: off, falloc or full.
    pub preallocation: Preallocation,
}

impl RawOptions {
    /// Sets one option as it stands in an `-o` list.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) for a bad value or an unknown name.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match (name, value) {
            ("preallocation", "metadata") => {
                Err(Error::invalid("preallocation=metadata of a raw image").hint("off, falloc or full"))
            }
            ("preallocation", value) => {
                self.preallocation = value.parse()?;
                Ok(())
            }
            ("size", _) => {
                Err(Error::unsupported("the option size in a conversion (the source has its size)"))
            }
            (other, _) => {
                Err(Error::invalid(format!("raw has no option {other:?}")).hint("it has preallocation"))
            }
        }
    }
}

impl TargetFormat {
    /// The files that an image at `path` consists of besides that one: its external data file, its extents.
    pub(crate) fn other_files(&self, path: &Path, size: Option<u64>) -> Result<Vec<PathBuf>> {
        match self {
            Self::Qcow2(Qcow2Options { data_file: Some(name), .. }) => {
                Ok(vec![resolve(name.as_bytes(), path, "external data file")?])
            }
            Self::Vmdk(vmdk) => {
                let names = vmdk.extent_files(file_name(path), size)?;
                Ok(names.iter().map(|name| path.with_file_name(OsStr::from_bytes(name))).collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// The format by its name, with default options.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) for a format that is not written.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "raw" => Ok(Self::Raw(RawOptions::default())),
            "qcow2" => Ok(Self::Qcow2(Qcow2Options::default())),
            "vmdk" => Ok(Self::Vmdk(VmdkOptions::default())),
            "ova" => {
                Ok(Self::Ova(VmdkOptions { subformat: Subformat::StreamOptimized, ..VmdkOptions::default() }))
            }
            other => Err(Error::unsupported(format!("the output format {other:?}"))
                .hint("raw, qcow2, vmdk and ova are")),
        }
    }

    /// The format's name.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Raw(_) => "raw",
            Self::Qcow2(_) => "qcow2",
            Self::Vmdk(_) => "vmdk",
            Self::Ova(_) => "ova",
        }
    }

    /// Sets one option as it stands in an `-o` list.
    ///
    /// # Errors
    /// As [`Qcow2Options::set`], [`RawOptions::set`] and [`VmdkOptions::set`].
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match self {
            Self::Raw(options) => options.set(name, value),
            Self::Qcow2(options) => options.set(name, value),
            Self::Ova(_) if name == "subformat" => {
                Err(Error::invalid("the disk of an OVA is always streamOptimized"))
            }
            Self::Vmdk(options) | Self::Ova(options) => options.set(name, value),
        }
    }

    /// Whether the units of an image of this format are packed even where nobody asks for it.
    #[must_use]
    pub fn always_packs(&self) -> bool {
        match self {
            Self::Raw(_) | Self::Qcow2(_) => false,
            Self::Vmdk(options) => options.subformat == Subformat::StreamOptimized,
            Self::Ova(_) => true,
        }
    }

    /// Whether an image of this format is more than its guest's bytes.
    pub(super) const fn has_tables(&self) -> bool {
        !matches!(self, Self::Raw(_))
    }

    pub(super) fn is_stream_target(&self) -> bool {
        match self {
            Self::Raw(_) => true,
            Self::Vmdk(options) => options.subformat == Subformat::StreamOptimized,
            Self::Qcow2(_) | Self::Ova(_) => false,
        }
    }

    /// Whether the output is to have a backing file.
    pub(super) const fn has_backing_file(&self) -> bool {
        match self {
            Self::Raw(_) => false,
            Self::Qcow2(options) => options.backing_file.is_some(),
            Self::Vmdk(options) | Self::Ova(options) => options.backing_file.is_some(),
        }
    }
}

/// Packing of the output's units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compression {
    /// The codec's level; `None` for its default: the fastest whose output is not larger than qemu-img's.
    pub level: Option<i32>,
}

/// Whether the output may share blocks with the source, where both lie on one file system that can (XFS, btrfs,
/// bcachefs): as `cp --reflink`. What is shared is not read, so zeros in it are not looked for; holes stay holes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reflink {
    /// Where it can be had, unless other options stand against it: zeros are data too, blocks are to be reserved, the
    /// output is packed, or damage is to be found (salvage).
    #[default]
    Auto,
    /// As `Auto`, but where it cannot be had the conversion fails. What cannot be shared in any case (packed units,
    /// the end of a disk) is still copied.
    Always,
    /// Every byte gets blocks of its own.
    Never,
}

/// How to convert.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// The format of the output.
    pub format: TargetFormat,
    /// Pack the output (qcow2; streamOptimized VMDKs always are).
    pub compress: Option<Compression>,
    /// Runs of at least this many zero bytes are not written (`-S`); rounded down to a power of two of at least 512. 0
    /// looks for no zeros and allocates everything. 4096 by default, as in qemu-img.
    pub sparse_size: u64,
    /// Make the output, which is written beside its name and renamed when whole. Otherwise (`-n`) it must exist and
    /// is filled in place.
    pub create: bool,
    /// The existing output reads as zeros everywhere.
    pub target_is_zero: bool,
    /// How an existing output that holds something is opened: which files it may name, and its passphrases.
    pub existing: OpenOptions,
    /// Worker threads; `None`: one for each CPU that this process may use.
    pub threads: Option<usize>,
    /// Upper bound for the buffers of the conversion, in bytes, at least 1. Tables of the output come on top: 16 bytes for each
    /// L2 table and refcount block of a qcow2 (at most 80 MiB, by QEMU's limits), 8 for each grain table of a VMDK.
    pub memory: u64,
    /// The I/O engine.
    pub engine: EngineChoice,
    /// Bypass the page cache when writing. (For reading: [`OpenOptions::direct`](crate::OpenOptions::direct).)
    pub direct: bool,
    /// Make the output durable before it gets its name.
    pub sync: bool,
    /// Fill what cannot be read with zeros, and go on.
    pub salvage: bool,
    /// Pack everything anew, even what the source has packed in a way that the output can take over. A level in
    /// [`compress`](Self::compress) does the same.
    pub recompress: bool,
    /// Take packed units over without unpacking them, where the output's wrapper allows (deflate or zlib into qcow2, zstd
    /// into qcow2): damage in them goes unseen, and zeros in them are not looked for. Only for sources that are known
    /// to be sound. Ignored when salvaging.
    pub trust_packed: bool,
    /// Whether the output may share blocks with the source.
    pub reflink: Reflink,
    /// Copy plain data inside the kernel (`copy_file_range`) where it cannot be cloned, and do not look for zeros in it:
    /// for file systems whose server copies (NFS 4.2, SMB). On local ones it gains nothing.
    pub copy_offload: bool,
    /// Do not look for the backing file of a qcow2 output, whose format must be named then.
    pub trust_backing: bool,
    /// What becomes of the persistent bitmaps of a qcow2 source. With bitmaps to write, the output is made durable.
    pub bitmaps: CarryBitmaps,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            format: TargetFormat::Raw(RawOptions::default()),
            compress: None,
            sparse_size: 4096,
            create: true,
            target_is_zero: false,
            existing: OpenOptions::default(),
            threads: None,
            memory: 256 << 20,
            engine: EngineChoice::Auto,
            direct: false,
            sync: false,
            salvage: false,
            recompress: false,
            trust_packed: false,
            reflink: Reflink::Auto,
            copy_offload: false,
            trust_backing: false,
            bitmaps: CarryBitmaps::None,
        }
    }
}

impl ConvertOptions {
    /// Checks the options against each other and against the kind of output, as [`convert`](super::convert) does before
    /// it opens anything: what is wrong here is wrong for all images.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) for values that are out of range or exclude each other,
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) for what no output of this kind can have.
    pub fn check(&self, output: &Output) -> Result<()> {
        self.clone().settle(output)
    }

    /// Checks them, and sets what follows from others.
    pub(super) fn settle(&mut self, output: &Output) -> Result<()> {
        let compress = self.compress.is_some();
        match &mut self.format {
            TargetFormat::Raw(_) if compress => {
                return Err(Error::invalid("raw images cannot be compressed"));
            }
            TargetFormat::Raw(_) => {}
            TargetFormat::Qcow2(options) => options.check(compress)?,
            TargetFormat::Vmdk(options) | TargetFormat::Ova(options) => options.check(compress)?,
        }
        if let Some(Compression { level: Some(level) }) = self.compress {
            let codec = self.codec();
            if !level_range(codec).contains(&level) {
                let range = level_range(codec);
                return Err(Error::invalid(format!("{level} is not a level of {}", codec.name()))
                    .hint(format!("{} to {}", range.start(), range.end())));
            }
        }
        if matches!(output, Output::Stream(_)) && !self.format.is_stream_target() {
            let name = self.format.name();
            return Err(Error::unsupported(format!("writing {name} to a pipe")).hint(
                "its header is written last; raw and subformat=streamOptimized of vmdk are supported",
            ));
        }
        if self.target_is_zero && self.create {
            return Err(
                Error::invalid("target-is-zero speaks of an existing target").hint("add -n (--no-create)")
            );
        }
        if self.threads == Some(0) {
            return Err(Error::invalid("0 threads"));
        }
        if self.memory == 0 {
            return Err(Error::invalid("0 bytes of memory"));
        }
        self.must_look(compress || self.format.always_packs())?;
        Ok(())
    }

    fn codec(&self) -> Codec {
        match &self.format {
            TargetFormat::Qcow2(options) => options.codec(),
            _ => Codec::Deflate,
        }
    }

    /// Codec of the output's units and the level, if one is named, tried once so that workers cannot fail for it.
    pub(super) fn packer(&self, assembler: &dyn Assembler) -> Result<Option<(Codec, Option<i32>)>> {
        let always = assembler.frame().map(|_| Compression::default());
        let (Some(Compression { level }), Some(codec)) = (self.compress.or(always), assembler.codec()) else {
            return Ok(None);
        };
        make_packer(codec, level)?;
        Ok(Some((codec, level)))
    }

    fn encrypts(&self) -> bool {
        matches!(&self.format, TargetFormat::Qcow2(Qcow2Options { encryption: Some(_), .. }))
    }

    /// Whether something stands against moving plain data without looking at it, which is an error where that is
    /// asked for. `packs`: the output is packed.
    pub(super) fn must_look(&self, packs: bool) -> Result<bool> {
        let preallocation = match &self.format {
            TargetFormat::Raw(options) => options.preallocation,
            TargetFormat::Qcow2(options) => options.preallocation,
            TargetFormat::Vmdk(_) | TargetFormat::Ova(_) => Preallocation::Off,
        };
        let against = match preallocation {
            _ if packs => Some("compression"),
            Preallocation::Falloc | Preallocation::Full => Some("preallocation"),
            _ if self.granule() == 0 => Some("a sparse size of 0"),
            _ if self.salvage => Some("salvage"),
            _ if self.encrypts() => Some("encryption"),
            _ => None,
        };
        match against {
            Some(against) if self.reflink == Reflink::Always => {
                Err(Error::invalid(format!("reflink=always and {against} exclude each other")))
            }
            against => Ok(against.is_some()),
        }
    }

    /// The granule for zero detection: a power of two, or 0 for none.
    pub(super) const fn granule(&self) -> u64 {
        match self.sparse_size {
            0 => 0,
            size if size < 512 => 512,
            size => 1 << size.ilog2(),
        }
    }
}

/// A packer at `level`, or at the level for where none is named.
pub(super) fn make_packer(codec: Codec, level: Option<i32>) -> Result<Packer> {
    let packer = match level {
        Some(level) => Packer::new(codec, level),
        None => Packer::by_default(codec),
    };
    packer.map_err(|error| Error::invalid(error.to_string()))
}
