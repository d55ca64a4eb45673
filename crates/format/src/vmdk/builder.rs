//! Descriptors of new disks.

use super::descriptor::{Access, CreateType, Descriptor, Entry, Extent, ExtentKind, NO_PARENT};
use super::geometry::{self, AdapterType, Chs, SPLIT_SECTORS};
use crate::FormatError;

/// Most extents of a split disk, about 64 TiB: each is a file.
const MAX_SPLIT_EXTENTS: u64 = 32_768;

/// What a new disk is to be; [`build`](Self::build) makes its descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DescriptorBuilder {
    /// One of monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat and
    /// streamOptimized.
    pub create_type: CreateType,
    /// Size of the disk in sectors.
    pub capacity: u64,
    /// Name of the descriptor's own file, without a folder: `disk.vmdk`.
    pub file_name: Vec<u8>,
    /// `ddb.longContentID`; its low 32 bits are the `CID`, as in open-vmdk. To be the same for the
    /// same content, derive it from the content or from a seed.
    pub content_id: u128,
    /// The adapter.
    pub adapter: AdapterType,
    /// `ddb.virtualHWVersion`: 4, or 6 with `compat6`; any version is valid.
    pub hw_version: u32,
    /// `ddb.toolsVersion`; 2147483647 is "unknown".
    pub tools_version: u32,
    /// `CID` and name of the parent of a delta.
    pub parent: Option<(u32, Vec<u8>)>,
}

impl DescriptorBuilder {
    /// A disk with adapter `lsilogic`, hardware version 4, tools unknown and no parent.
    pub fn new(
        create_type: CreateType,
        capacity: u64,
        file_name: impl Into<Vec<u8>>,
        content_id: u128,
    ) -> Self {
        Self {
            create_type,
            capacity,
            file_name: file_name.into(),
            content_id,
            adapter: AdapterType::default(),
            hw_version: 4,
            tools_version: 0x7fff_ffff,
            parent: None,
        }
    }

    /// The `CID` that goes with `content_id`. 0xffffffff ("no parent") and 0xfffffffe ("look at the
    /// long content id") are not used, as in open-vmdk.
    #[must_use]
    pub fn cid(&self) -> u32 {
        let cid = u32::try_from(self.content_id & 0xffff_ffff).unwrap_or(0);
        if cid >= 0xffff_fffe { cid - 2 } else { cid }
    }

    /// The descriptor; [`Descriptor::write`] gives its text.
    ///
    /// Extents are named as VMware names them: the file itself for monolithicSparse and
    /// streamOptimized, `disk-flat.vmdk`, `disk-s001.vmdk`, `disk-f001.vmdk` beside it otherwise;
    /// splits are at 2047 MiB.
    ///
    /// # Errors
    /// `Unsupported` for another create type, and for a parent of a kind that cannot be a delta
    /// (flat and streamOptimized); `Limit` above 32,768 extents.
    pub fn build(&self) -> Result<Descriptor, FormatError> {
        let extents = self.extents()?;
        let sparse = extents.iter().all(|extent| extent.kind == ExtentKind::Sparse);
        if self.parent.is_some() && (!sparse || self.create_type == CreateType::StreamOptimized) {
            return Err(FormatError::unsupported(
                "descriptor",
                "only monolithicSparse and twoGbMaxExtentSparse disks can have a parent",
            ));
        }
        let chs = Chs::of(self.capacity, &self.adapter);
        let cid = self.cid();
        let content_id = (self.content_id & !0xffff_ffff) | u128::from(cid);
        let mut ddb = vec![
            ("longContentID", format!("{content_id:032x}")),
            ("virtualHWVersion", self.hw_version.to_string()),
            ("geometry.cylinders", chs.cylinders.to_string()),
            ("geometry.heads", chs.heads.to_string()),
            ("geometry.sectors", chs.sectors.to_string()),
            ("adapterType", self.adapter.to_string()),
        ];
        if self.create_type == CreateType::StreamOptimized {
            // 4: the guest's own package of open-vm-tools, the value of VMware's converter.
            ddb.push(("toolsInstallType", "4".to_owned()));
        }
        ddb.push(("toolsVersion", self.tools_version.to_string()));
        Ok(Descriptor {
            version: Some(1),
            encoding: Some(b"UTF-8".to_vec()),
            cid: Some(cid),
            parent_cid: Some(self.parent.as_ref().map_or(NO_PARENT, |(cid, _)| *cid)),
            create_type: Some(self.create_type.clone()),
            parent_hint: self.parent.as_ref().map(|(_, name)| name.clone()),
            extents,
            ddb: ddb.into_iter().map(|(key, value)| Entry::quoted(format!("ddb.{key}"), value)).collect(),
            ..Descriptor::default()
        })
    }

    fn extents(&self) -> Result<Vec<Extent>, FormatError> {
        let stem = self.file_name.len().checked_sub(5).map(|at| self.file_name.split_at(at));
        let stem = match stem {
            Some((stem, suffix)) if suffix.eq_ignore_ascii_case(b".vmdk") => stem,
            _ => &self.file_name,
        };
        let extent = |kind: ExtentKind, sectors: u64, suffix: &str| Extent {
            access: Access::ReadWrite,
            sectors,
            offset: (kind == ExtentKind::Flat).then_some(0),
            kind,
            file: Some([stem, suffix.as_bytes()].concat()),
            rest: Vec::new(),
        };
        let split = |kind: ExtentKind, letter: char| {
            (1..)
                .zip(geometry::split(self.capacity))
                .map(|(number, sectors): (u32, u64)| {
                    extent(kind.clone(), sectors, &format!("-{letter}{number:03}.vmdk"))
                })
                .collect()
        };
        let is_split =
            matches!(self.create_type, CreateType::TwoGbMaxExtentSparse | CreateType::TwoGbMaxExtentFlat);
        let files = self.capacity.div_ceil(SPLIT_SECTORS);
        if is_split && files > MAX_SPLIT_EXTENTS {
            let message = format!(
                "{files} extents of 2047 MiB, the limit is {MAX_SPLIT_EXTENTS}: do not split the disk"
            );
            return Err(FormatError::limit("descriptor", message));
        }
        match self.create_type {
            CreateType::MonolithicSparse | CreateType::StreamOptimized => {
                let itself = extent(ExtentKind::Sparse, self.capacity, "");
                Ok(vec![Extent { file: Some(self.file_name.clone()), ..itself }])
            }
            CreateType::MonolithicFlat => Ok(vec![extent(ExtentKind::Flat, self.capacity, "-flat.vmdk")]),
            CreateType::TwoGbMaxExtentSparse => Ok(split(ExtentKind::Sparse, 's')),
            CreateType::TwoGbMaxExtentFlat => Ok(split(ExtentKind::Flat, 'f')),
            ref other => Err(FormatError::unsupported(
                "descriptor",
                format!("disks of type {} cannot be made", String::from_utf8_lossy(other.as_bytes())),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Limits, Problem};

    const ID: u128 = 0xb0ac_a906_9502_b309_f495_39c5_7e67_07b0;

    fn text(builder: &DescriptorBuilder) -> String {
        String::from_utf8(builder.build().unwrap().write().unwrap()).unwrap()
    }

    #[test]
    fn stream_optimized_is_byte_for_byte_open_vmdk() {
        let builder = DescriptorBuilder::new(CreateType::StreamOptimized, 8192, "disk", ID);
        let expected = "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=7e6707b0\nparentCID=ffffffff\n\
            createType=\"streamOptimized\"\n\n# Extent description\nRW 8192 SPARSE \"disk\"\n\n\
            # The Disk Data Base\n#DDB\n\nddb.longContentID = \"b0aca9069502b309f49539c57e6707b0\"\n\
            ddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"1\"\nddb.geometry.heads = \"255\"\n\
            ddb.geometry.sectors = \"63\"\nddb.adapterType = \"lsilogic\"\nddb.toolsInstallType = \"4\"\n\
            ddb.toolsVersion = \"2147483647\"\n";
        assert_eq!(text(&builder), expected);
    }

    #[test]
    fn extents_are_named_as_vmware_does() {
        let lines = |kind, capacity| -> Vec<String> {
            let builder = DescriptorBuilder::new(kind, capacity, "my.disk.VMDK", ID);
            text(&builder).lines().filter(|line| line.starts_with("RW ")).map(str::to_owned).collect()
        };
        assert_eq!(lines(CreateType::MonolithicSparse, 8), ["RW 8 SPARSE \"my.disk.VMDK\""]);
        assert_eq!(lines(CreateType::MonolithicFlat, 8), ["RW 8 FLAT \"my.disk-flat.vmdk\" 0"]);
        assert_eq!(
            lines(CreateType::TwoGbMaxExtentSparse, 4_192_257),
            ["RW 4192256 SPARSE \"my.disk-s001.vmdk\"", "RW 1 SPARSE \"my.disk-s002.vmdk\""]
        );
        assert_eq!(lines(CreateType::TwoGbMaxExtentFlat, 9), ["RW 9 FLAT \"my.disk-f001.vmdk\" 0"]);
    }

    #[test]
    fn deltas_name_their_parent() {
        let mut builder = DescriptorBuilder::new(CreateType::MonolithicSparse, 8, "d.vmdk", u128::MAX);
        builder.parent = Some((0x5c0d_0308, b"base.vmdk".to_vec()));
        builder.adapter = AdapterType::Ide;
        assert_eq!(builder.cid(), 0xffff_fffd);
        let it = Descriptor::parse(text(&builder).as_bytes(), &Limits::default()).unwrap();
        assert_eq!(
            (it.parent(), it.parent_hint.as_deref()),
            (Some(0x5c0d_0308), Some(b"base.vmdk".as_slice()))
        );
        assert_eq!(it, builder.build().unwrap());
        builder.create_type = CreateType::StreamOptimized;
        assert_eq!(builder.build().unwrap_err().problem, Problem::Unsupported);
        builder.parent = None;
        builder.create_type = CreateType::TwoGbMaxExtentSparse;
        builder.capacity = SPLIT_SECTORS * MAX_SPLIT_EXTENTS;
        assert_eq!(builder.build().unwrap().extents.len(), 32_768);
        builder.capacity += 1;
        assert_eq!(builder.build().unwrap_err().problem, Problem::Limit);
        builder.capacity = u64::MAX;
        assert_eq!(builder.build().unwrap_err().problem, Problem::Limit);
        builder.create_type = CreateType::Vmfs;
        assert_eq!(builder.build().unwrap_err().problem, Problem::Unsupported);
    }
}
