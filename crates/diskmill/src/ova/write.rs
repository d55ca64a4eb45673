use std::ops::Range;
use std::path::Path;

use diskmill_codec::Codec;
use diskmill_format::HostOffset;
use diskmill_format::ova::OvfBuilder;
use diskmill_format::ova::manifest::{Algorithm, Digest as FileDigest, Manifest};
use diskmill_format::ova::tar::{self, Member, MemberKind};
use diskmill_format::vmdk::SECTOR_BYTES;
use sha2::{Digest, Sha256};

use super::verify::hash;
use crate::convert::{Assembler, Finish, Frame, Unit, WriteOp};
use crate::error::{Error, Result};
use crate::vmdk::{StreamAssembler, VmdkOptions};

/// Bytes of a SHA-256 digest in hexadecimal.
const HEX: usize = 64;
/// Hardware versions from which ESX(i) 4 takes a package.
const LEAST_HARDWARE: u32 = 7;

/// Lays out an OVA: envelope, manifest, and the disk as a streamOptimized VMDK, in the order of VMware's own tool.
///
/// Envelope and manifest have a fixed length, so the disk is written once, to where it stays; its size and its digest
/// are filled in at the end.
struct OvaAssembler {
    disk: StreamAssembler,
    parts: Parts,
}

/// What stands before the disk.
#[derive(Clone)]
struct Parts {
    envelope_name: Vec<u8>,
    manifest_name: Vec<u8>,
    disk_name: Vec<u8>,
    envelope: OvfBuilder,
    /// Bytes of the envelope, with blanks at its end.
    envelope_len: usize,
}

/// An OVA at `path` for a disk of `size` bytes.
pub(crate) fn assembler(options: VmdkOptions, path: &Path, size: Option<u64>) -> Result<Box<dyn Assembler>> {
    let size = size.ok_or_else(|| {
        Error::unsupported("an OVA from a pipe, whose size is not known beforehand")
            .hint("write the pipe to a file first")
    })?;
    if size == 0 {
        return Err(Error::unsupported("an OVA with a disk of no bytes").hint("write raw, qcow2 or vmdk"));
    }
    let stem = path.file_stem().and_then(|stem| stem.to_str()).ok_or_else(|| {
        Error::unsupported("a file name that is not UTF-8, for an OVA: its envelope cannot hold it")
    })?;
    let disk_name = format!("{stem}-disk1.vmdk");
    let mut envelope = OvfBuilder::new(stem, disk_name.as_str(), size.div_ceil(SECTOR_BYTES) * SECTOR_BYTES);
    envelope.adapter = options.adapter.clone();
    envelope.hardware_version = options.hw_version.unwrap_or(LEAST_HARDWARE).max(LEAST_HARDWARE);
    // The longest that it can get.
    envelope.disk_file_size = Some(u64::MAX);
    let envelope_len = envelope.write()?.len();
    let parts = Parts {
        envelope_name: format!("{stem}.ovf").into_bytes(),
        manifest_name: format!("{stem}.mf").into_bytes(),
        disk_name: disk_name.into_bytes(),
        envelope,
        envelope_len,
    };
    let base = parts.encode(0, [0; 32])?.len() as u64;
    let disk = StreamAssembler::new(options, &parts.disk_name, Some(size), base)?;
    Ok(Box::new(OvaAssembler { disk, parts }))
}

impl Parts {
    /// Everything before the disk, which has this size and digest.
    fn encode(&self, disk_len: u64, disk_digest: [u8; 32]) -> Result<Vec<u8>> {
        let mut envelope =
            OvfBuilder { disk_file_size: Some(disk_len), ..self.envelope.clone() }.write()?.into_bytes();
        // Blanks may follow the root element.
        envelope.resize(self.envelope_len, b'\n');
        let digest = |name: &[u8], digest: &[u8]| FileDigest {
            algorithm: Algorithm::Sha256,
            name: name.to_vec(),
            digest: digest.to_vec(),
        };
        let digests = vec![
            digest(&self.envelope_name, &Sha256::digest(&envelope)),
            digest(&self.disk_name, &disk_digest),
        ];
        let manifest = Manifest { digests }.write();
        let mut out = Vec::with_capacity(2 * envelope.len() + HEX);
        for (name, content) in [(&self.envelope_name, envelope), (&self.manifest_name, manifest)] {
            out.extend(tar::encode_file(name, content.len() as u64, 0)?);
            out.extend_from_slice(&content);
            out.resize(out.len() + tar::padding(content.len() as u64), 0);
        }
        // A size beyond 8 GiB has another form, not another length.
        out.extend(tar::encode_file(&self.disk_name, disk_len, 0)?);
        Ok(out)
    }
}

impl Assembler for OvaAssembler {
    fn unit(&self) -> u64 {
        self.disk.unit()
    }

    fn codec(&self) -> Option<Codec> {
        self.disk.codec()
    }

    fn frame(&self) -> Option<Frame> {
        self.disk.frame()
    }

    fn whole_units(&self) -> bool {
        self.disk.whole_units()
    }

    fn ordered(&self) -> bool {
        self.disk.ordered()
    }

    fn place(&mut self, guest: Range<u64>, units: &[Unit], out: &mut Vec<WriteOp>) -> Result<()> {
        self.disk.place(guest, units, out)
    }

    fn zero(&mut self, run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()> {
        self.disk.zero(run, out)
    }

    fn skip(&mut self, run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()> {
        self.disk.skip(run, out)
    }

    fn longest_zero(&self) -> u64 {
        self.disk.longest_zero()
    }

    fn check_size(&self, size: u64) -> Result<()> {
        self.disk.check_size(size)
    }

    fn finish(&mut self, size: u64, out: &mut Vec<WriteOp>) -> Result<Finish> {
        let done = self.disk.finish(size, out)?;
        let end = done.file_len.unwrap_or_default();
        // Whole sectors, as is the disk: no padding.
        out.push(WriteOp::bytes(end, tar::END.to_vec()));
        let (parts, len) = (self.parts.clone(), self.disk.len());
        let seal = move |file: &dyn diskmill_io::Storage| {
            let data = HostOffset(end - len);
            let disk =
                Member { name: Vec::new(), kind: MemberKind::File, size: len, data, next: HostOffset(end) };
            let digest = hash::<Sha256>(file, &disk)?;
            let digest = digest.first_chunk().copied().unwrap_or_default();
            Ok(vec![WriteOp::bytes(0, parts.encode(len, digest)?)])
        };
        Ok(Finish { file_len: Some(end + tar::END.len() as u64), seal: Some(Box::new(seal)), ..done })
    }
}
