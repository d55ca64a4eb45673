/// Upper bounds that a parser charges before it allocates memory or follows a structure.
///
/// The defaults are QEMU's own limits (`block/qcow2.h`, `block/vmdk.c`), so an image that QEMU
/// opens opens here too, unless a field says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Largest qcow2 L1 table, in bytes.
    pub qcow2_l1_bytes: u64,
    /// Largest qcow2 refcount table, in bytes.
    pub qcow2_refcount_table_bytes: u64,
    /// Most internal snapshots of a qcow2 image.
    pub qcow2_snapshots: u32,
    /// Largest qcow2 snapshot table, in bytes.
    pub qcow2_snapshot_table_bytes: u64,
    /// Largest extra data of one qcow2 snapshot table entry, in bytes.
    pub qcow2_snapshot_extra_bytes: u32,
    /// Most persistent bitmaps of a qcow2 image.
    pub qcow2_bitmaps: u32,
    /// Largest qcow2 bitmap directory, in bytes.
    pub qcow2_bitmap_directory_bytes: u64,
    /// Largest qcow2 bitmap, in bytes of its bits in whole clusters.
    pub qcow2_bitmap_bytes: u64,
    /// Longest backing file name, in bytes.
    pub backing_name_bytes: u32,
    /// Most layers in a backing chain, the top image included. (QEMU has no limit.)
    pub chain_depth: u16,
    /// Largest VMDK descriptor, in bytes. (QEMU: 1 MiB embedded, 2 MiB as a file.)
    pub vmdk_descriptor_bytes: u64,
    /// Most extents of one VMDK. (QEMU has no limit.)
    pub vmdk_extents: u32,
    /// Largest VMDK grain, in bytes (QEMU: 1 GiB sparse; compressed grains are unpacked whole,
    /// so this library stops earlier).
    pub vmdk_grain_bytes: u64,
    /// Largest VMDK grain directory, in entries.
    pub vmdk_directory_entries: u64,
    /// Largest OVF envelope, in bytes. (Real ones have 5 to 50 KiB.)
    pub ovf_bytes: u64,
    /// Deepest nesting of elements in an OVF envelope. (Real ones have about 10.)
    pub ovf_depth: u32,
    /// Largest OVA manifest, in bytes.
    pub manifest_bytes: u64,
    /// Most members of a tar archive.
    pub tar_members: u32,
    /// Largest extended header of a tar member (pax records, GNU long name), in bytes.
    pub tar_extension_bytes: u64,
    /// Most bytes that a compressed disk of an OVA may unpack to; they go to a temporary file.
    pub spool_bytes: u64,
    /// Most memory for what a check keeps of an image, in bytes. (QEMU has no limit. One bit for each cluster suffices
    /// where nothing is shared: 32 MiB for 16 TiB of data in ordinary clusters.)
    pub check_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        const MIB: u64 = 1 << 20;
        Self {
            qcow2_l1_bytes: 32 * MIB,
            qcow2_refcount_table_bytes: 8 * MIB,
            qcow2_snapshots: 65_536,
            qcow2_snapshot_table_bytes: 64 * MIB,
            qcow2_snapshot_extra_bytes: 1024,
            qcow2_bitmaps: 65_535,
            qcow2_bitmap_directory_bytes: 64 * MIB,
            qcow2_bitmap_bytes: 512 * MIB,
            backing_name_bytes: 1023,
            chain_depth: 64,
            vmdk_descriptor_bytes: 2 * MIB,
            vmdk_extents: 65_536,
            vmdk_grain_bytes: 64 * MIB,
            vmdk_directory_entries: 32 << 20,
            ovf_bytes: MIB,
            ovf_depth: 64,
            manifest_bytes: MIB,
            tar_members: 65_536,
            tar_extension_bytes: MIB,
            spool_bytes: 64 << 30,
            check_bytes: 1 << 30,
        }
    }
}
