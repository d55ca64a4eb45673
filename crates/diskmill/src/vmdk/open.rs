use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_format::vmdk::descriptor::{Access, NO_PARENT};
use diskmill_format::vmdk::{
    CowdHeader, CreateType, Descriptor, Extent, ExtentKind, Kind as FileKind, SECTOR_BYTES, SeSparseHeader,
    SeSparseVolatileHeader, SparseHeader, marker, probe,
};
use diskmill_format::{FormatError, Limits, Problem};

use super::grains::GrainMap;
use super::layout::{Part, PartSource, VmdkLayout};
use super::{ExtentFile, VmdkExtent, VmdkInfo, beside};
use crate::error::{Error, Result};
use crate::image::OpenOptions;
use crate::layout::{FileId, FormatInfo, ImageInfo};
use crate::probe::Format;
use crate::qcow2::lossy;
use crate::raw::FileRuns;
use crate::reader::read_full;

/// How much of the end of a stream is searched for the footer, in bytes. Padding after it is seldom a megabyte.
const TAIL: u64 = 1 << 20;
/// The `parentCID` of a child whose parent has no CID of its own (open-vmdk): nothing to compare.
const UNKNOWN_CID: u32 = 0xffff_fffe;
const LONE_EXTENT: &str =
    "an extent without its descriptor: a parent, and further extents, would not be known";

/// The parent that a delta names.
pub(crate) struct Parent {
    /// Names to try, the one that the descriptor gives first.
    pub(crate) candidates: Vec<PathBuf>,
    /// The CID that it must have.
    pub(crate) cid: Option<u32>,
}

/// Opens the files that extents are in: applies the policy, locks, and remembers.
pub(crate) type OpenExtent<'a> = dyn FnMut(&Path) -> Result<ExtentFile> + 'a;

/// Opens the VMDK whose descriptor or sparse extent `own` is.
pub(crate) fn open(
    own: &ExtentFile,
    options: &OpenOptions,
    files: &mut OpenExtent<'_>,
) -> Result<(VmdkLayout, Option<Parent>)> {
    let mut opening = Opening {
        own,
        options,
        warnings: Vec::new(),
        parts: Vec::new(),
        extents: Vec::new(),
        sparse_files: HashSet::new(),
        size: 0,
    };
    let start = opening.read(own, 0, diskmill_format::vmdk::PROBE_BYTES as u64)?;
    let descriptor = match probe(&start) {
        Some(FileKind::Sparse) => opening.hosted(&start, files)?,
        Some(FileKind::Cowd | FileKind::SeSparse) => {
            let map = opening.sparse(own, &start)?;
            let kind =
                if start.starts_with(diskmill_format::vmdk::cowd::MAGIC) { "VMFSSPARSE" } else { "SESPARSE" };
            opening.add_sparse(map, kind, None);
            opening.warn(LONE_EXTENT.to_owned());
            None
        }
        None if start.starts_with(b"kdmv") || own.len > options.limits.vmdk_descriptor_bytes => {
            // Its parser says why: a writer that was stopped has its own magic.
            return Err(
                SparseHeader::parse(&start).map_or_else(Error::from, |_| Error::invalid("not a VMDK"))
            );
        }
        Some(FileKind::Descriptor) | None => {
            let limits = &options.limits;
            if own.len > limits.vmdk_descriptor_bytes {
                let max = limits.vmdk_descriptor_bytes;
                let text = format!("{} bytes, the limit is {max}", own.len);
                return Err(Error::new(crate::Kind::Limit, text).within("descriptor", 0));
            }
            let text = opening.read(own, 0, own.len)?;
            let descriptor = Descriptor::parse(&text, limits)?;
            opening.described(&descriptor, files)?;
            Some(descriptor)
        }
    };
    opening.finish(descriptor)
}

struct Opening<'a> {
    own: &'a ExtentFile,
    options: &'a OpenOptions,
    warnings: Vec<String>,
    parts: Vec<Part>,
    extents: Vec<VmdkExtent>,
    /// Files of the sparse extents so far.
    sparse_files: HashSet<FileId>,
    /// Guest bytes of the parts so far.
    size: u64,
}

impl Opening<'_> {
    const fn limits(&self) -> &Limits {
        &self.options.limits
    }

    /// At most `len` bytes of `file`; less only at its end. The caller bounds `len`.
    fn read(&self, file: &ExtentFile, at: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len.min(file.len.saturating_sub(at)) as usize];
        let got = read_full(&*file.storage, &mut bytes, at)?;
        bytes.truncate(got);
        Ok(bytes)
    }

    /// A hosted sparse extent that the user opened: a whole disk, a stream, or one extent of a split disk.
    fn hosted(&mut self, start: &[u8], files: &mut OpenExtent<'_>) -> Result<Option<Descriptor>> {
        let header = SparseHeader::parse(start)?;
        let descriptor = self.embedded(&header)?;
        if let Some(descriptor) = &descriptor
            && (header.capacity == 0 || descriptor.extents.len() > 1)
            && !descriptor.extents.is_empty()
        {
            // This file only carries the descriptor (QEMU reads a header of no capacity so), or is one of several.
            self.described(descriptor, files)?;
            return Ok(Some(descriptor.clone()));
        }
        let map = self.sparse(self.own, start)?;
        let capacity = map.geometry().capacity_bytes / SECTOR_BYTES;
        if let Some([extent]) = descriptor.as_ref().map(|descriptor| descriptor.extents.as_slice())
            && extent.sectors != capacity
        {
            let line = extent.sectors;
            self.warn(format!(
                "the descriptor says {line} sectors and the header {capacity}: the header is followed"
            ));
        }
        self.add_sparse(map, "SPARSE", None);
        Ok(descriptor)
    }

    fn embedded(&mut self, header: &SparseHeader) -> Result<Option<Descriptor>> {
        let Some((at, len)) = header.descriptor(self.limits())? else {
            self.warn(LONE_EXTENT.to_owned());
            return Ok(None);
        };
        let text = self.read(self.own, at, len)?;
        let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
        if text.is_empty() {
            // QEMU leaves the room empty in the extents of a split disk.
            self.warn(LONE_EXTENT.to_owned());
            return Ok(None);
        }
        match Descriptor::parse(text, self.limits()) {
            Ok(descriptor) => Ok(Some(descriptor)),
            Err(FormatError { problem: Problem::NotThisFormat, .. }) => {
                self.warn(
                    "the embedded descriptor is no descriptor: a parent, if there is one, is not known"
                        .to_owned(),
                );
                Ok(None)
            }
            Err(error) => Err(Error::from(error).within("embedded descriptor", at)),
        }
    }

    fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }

    /// The map of a sparse extent of any kind; `start` is the beginning of its file.
    fn sparse(&mut self, file: &ExtentFile, start: &[u8]) -> Result<GrainMap> {
        match probe(start) {
            Some(FileKind::Cowd) => {
                let header = CowdHeader::parse(start)?;
                if header.unclean_shutdown != 0 {
                    self.warn(format!("{:?} was not closed cleanly", file.path));
                }
                GrainMap::cowd(file.clone(), &header, self.limits())
            }
            Some(FileKind::SeSparse) => {
                let header = SeSparseHeader::parse(start)?;
                let at = header.volatile_header.offset.saturating_mul(SECTOR_BYTES);
                let volatile = self.read(file, at, SECTOR_BYTES)?;
                SeSparseVolatileHeader::parse(&volatile).map_err(|error| Error::from(error.at(at)))?;
                GrainMap::sesparse(file.clone(), header, self.limits())
            }
            // Anything else is refused by the header's own parser, which says why.
            _ => {
                let mut header = SparseHeader::parse(start)?;
                if header.directory_in_footer() {
                    header = self.footer(file, &header)?;
                }
                let map = GrainMap::hosted(file.clone(), &header, self.limits())?;
                let of = if file.id == self.own.id { String::new() } else { format!("{:?}: ", file.path) };
                self.warnings.extend(header.doubts().into_iter().map(|doubt| format!("{of}{doubt}")));
                Ok(map)
            }
        }
    }

    /// The header of a stream that holds.
    fn footer(&mut self, file: &ExtentFile, header: &SparseHeader) -> Result<SparseHeader> {
        let at = file.len.saturating_sub(TAIL).next_multiple_of(SECTOR_BYTES);
        let tail = self.read(file, at, TAIL)?;
        let footer = marker::find_footer(&tail).map_err(|error| Error::from(error.at(at)))?;
        for doubt in footer.doubts {
            self.warn(doubt);
        }
        let found = footer.header;
        let same = (found.capacity, found.grain_sectors, found.gtes_per_gt, found.flags)
            == (header.capacity, header.grain_sectors, header.gtes_per_gt, header.flags);
        if !same {
            self.warn("header and footer disagree: the footer is followed".to_owned());
        }
        Ok(found)
    }

    /// Opens the extents that `descriptor` names.
    fn described(&mut self, descriptor: &Descriptor, files: &mut OpenExtent<'_>) -> Result<()> {
        if let Some(
            kind @ (CreateType::VmfsRawDeviceMap
            | CreateType::VmfsPassthroughRawDeviceMap
            | CreateType::VsanSparse),
        ) = &descriptor.create_type
        {
            let name = lossy(kind.as_bytes());
            return Err(Error::unsupported(format!(
                "the createType {name} (only the ESXi host can resolve it)"
            )));
        }
        if descriptor.extents.is_empty() {
            return Err(Error::corrupt("descriptor", None, "it has no extents"));
        }
        for extent in &descriptor.extents {
            let before = self.parts.len();
            self.extent(descriptor, extent, files)?;
            for part in self.parts.iter_mut().skip(before) {
                part.read_only = extent.access != Access::ReadWrite;
            }
        }
        Ok(())
    }

    fn extent(&mut self, descriptor: &Descriptor, extent: &Extent, files: &mut OpenExtent<'_>) -> Result<()> {
        let size = extent.bytes()?;
        let kind = lossy(extent.kind.as_bytes());
        let mut info = VmdkExtent { kind, path: None, size, grain_size: None, compressed: false };
        if extent.access == Access::NoAccess && extent.kind != ExtentKind::Zero {
            // It keeps its place: QEMU leaves it out, and all that follows moves.
            self.warn(format!(
                "the NOACCESS extent at guest offset {:#x} ({size} bytes) is read as zeros",
                self.size
            ));
            self.add(info, PartSource::Zero);
            return Ok(());
        }
        let name = match (&extent.kind, &extent.file) {
            (ExtentKind::Zero, _) | (_, None) => {
                self.add(info, PartSource::Zero);
                return Ok(());
            }
            (ExtentKind::VmfsRdm, _) => {
                return Err(Error::unsupported(
                    "a VMFSRDM extent (a raw device mapping, which only the ESXi host can resolve)",
                ));
            }
            (ExtentKind::Unknown(name), _) => {
                return Err(Error::unsupported(format!("the extent type {:?}", lossy(name))));
            }
            (_, Some(name)) => name,
        };
        let named = self.extent_path(descriptor, name)?;
        if self.options.metadata_only {
            info.path = Some(named);
            self.add(info, PartSource::Closed);
            return Ok(());
        }
        let file = if self.own.path == named { self.own.clone() } else { files(&named)? };
        info.path = Some(file.path.clone());
        match extent.kind {
            ExtentKind::Sparse | ExtentKind::VmfsSparse | ExtentKind::SeSparse => {
                let path = file.path.clone();
                if !self.sparse_files.insert(file.id) {
                    let message = format!("it names the sparse extent {path:?} twice");
                    return Err(Error::corrupt("descriptor", None, message));
                }
                let map = self.extent_map(&file).map_err(|error| error.of(&path))?;
                self.add_sparse(map, &info.kind, Some(size));
            }
            _ => {
                let runs = FileRuns::new(file.storage.clone(), file.id)?;
                let offset = extent.file_offset()?;
                self.add(info, PartSource::Flat { runs, offset, file });
            }
        }
        Ok(())
    }

    fn extent_map(&mut self, file: &ExtentFile) -> Result<GrainMap> {
        let start = self.read(file, 0, diskmill_format::vmdk::cowd::HEADER_BYTES as u64)?;
        if start.is_empty() {
            return Err(Error::corrupt("sparse extent header", Some(0), "the file is empty"));
        }
        self.sparse(file, &start)
    }

    /// The file of an extent. Names in windows-1252 are tried in UTF-8 too: files are renamed so when they are moved.
    fn extent_path(&self, descriptor: &Descriptor, name: &[u8]) -> Result<PathBuf> {
        let named = beside(name, &self.own.path, "extent")?;
        match descriptor.decode(name) {
            Some(text) if text.as_bytes() != name && !named.exists() => {
                beside(text.as_bytes(), &self.own.path, "extent")
            }
            _ => Ok(named),
        }
    }

    /// Adds a sparse extent of `size` bytes, or as many as its header says.
    fn add_sparse(&mut self, map: GrainMap, kind: &str, size: Option<u64>) {
        let geometry = map.geometry();
        let capacity = geometry.capacity_bytes;
        if let Some(size) = size.filter(|&size| size != capacity) {
            let path = &map.file().path;
            self.warn(format!("the descriptor gives {path:?} {size} bytes and its header {capacity}: the descriptor is followed"));
        }
        let info = VmdkExtent {
            kind: kind.to_owned(),
            path: Some(map.file().path.clone()),
            size: size.unwrap_or(capacity),
            grain_size: Some(geometry.grain_bytes),
            compressed: map.compressed(),
        };
        self.add(info, PartSource::Sparse(Arc::new(map)));
    }

    fn add(&mut self, info: VmdkExtent, source: PartSource) {
        let (start, len) = (self.size, info.size);
        // The descriptor's parser has bounded the sum.
        self.size = start.saturating_add(len);
        self.extents.push(info);
        if len > 0 {
            self.parts.push(Part { start, len, source, read_only: false });
        }
    }

    fn finish(mut self, descriptor: Option<Descriptor>) -> Result<(VmdkLayout, Option<Parent>)> {
        if let Some(descriptor) = &descriptor {
            self.warnings.extend(descriptor.doubts.iter().map(|doubt| format!("descriptor: {doubt}")));
        }
        let parent = match &descriptor {
            Some(descriptor) => self.parent(descriptor)?,
            None => None,
        };
        let packed = self
            .extents
            .iter()
            .filter(|extent| extent.compressed)
            .filter_map(|extent| extent.grain_size)
            .max();
        let info = ImageInfo {
            format: Format::Vmdk,
            virtual_size: self.size,
            cluster_size: self.extents.iter().find_map(|extent| extent.grain_size),
            packed_unit: packed.unwrap_or(0),
            backing_name: descriptor
                .as_ref()
                .filter(|_| parent.is_some())
                .and_then(|it| it.parent_hint.as_deref())
                .map(lossy),
            backing_format: None,
            warnings: self.warnings,
            specific: FormatInfo::Vmdk(Box::new(VmdkInfo { descriptor, extents: self.extents })),
        };
        Ok((VmdkLayout { info, parts: self.parts }, parent))
    }

    fn parent(&mut self, descriptor: &Descriptor) -> Result<Option<Parent>> {
        let (cid, hint) = match (descriptor.parent_cid, &descriptor.parent_hint) {
            (Some(NO_PARENT) | None, None) => return Ok(None),
            (Some(NO_PARENT), Some(_)) => {
                self.warn(
                    "parentFileNameHint is ignored: the parentCID says that there is no parent".to_owned(),
                );
                return Ok(None);
            }
            (None, Some(hint)) => {
                // Without its parent the disk would be zeros where the delta has nothing.
                self.warn("there is no valid parentCID: the parent's CID is not compared".to_owned());
                (UNKNOWN_CID, hint)
            }
            (Some(_), None) => {
                return Err(Error::corrupt(
                    "descriptor",
                    None,
                    "it has a parentCID, and no parentFileNameHint says which file that is",
                ));
            }
            (Some(cid), Some(hint)) => (cid, hint),
        };
        let mut candidates = vec![beside(hint, &self.own.path, "parentFileNameHint")?];
        if let Some(text) = descriptor.decode(hint).filter(|text| text.as_bytes() != hint) {
            candidates.push(beside(text.as_bytes(), &self.own.path, "parentFileNameHint")?);
        }
        // Deltas are moved together with their parents: an absolute name of another system means the file beside.
        let last = hint.rsplit(|byte| matches!(byte, b'/' | b'\\')).next().unwrap_or_default();
        if !last.is_empty() && last != hint.as_slice() {
            candidates.push(beside(last, &self.own.path, "parentFileNameHint")?);
        }
        Ok(Some(Parent { candidates, cid: (cid != UNKNOWN_CID).then_some(cid) }))
    }
}
