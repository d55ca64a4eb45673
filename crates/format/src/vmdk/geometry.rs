//! Disk geometry, adapter types, and the sizes at which writers split disks.

use std::fmt;

/// Sectors of a full extent of a split disk: 2047 MiB, VMware's size (QEMU splits at 2 GiB).
pub const SPLIT_SECTORS: u64 = 2047 << 11;

/// The adapter a disk was made for (`ddb.adapterType`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum AdapterType {
    /// `ide`.
    Ide,
    /// `buslogic`.
    BusLogic,
    /// `lsilogic`, the default: what ESXi and the cloud importers expect.
    #[default]
    LsiLogic,
    /// `legacyESX`.
    LegacyEsx,
    /// Anything else, kept as it was written.
    Other(Vec<u8>),
}

impl AdapterType {
    /// Reads a value of `ddb.adapterType`; the four names in any case.
    #[must_use]
    pub fn from_bytes(name: &[u8]) -> Self {
        [Self::Ide, Self::BusLogic, Self::LsiLogic, Self::LegacyEsx]
            .into_iter()
            .find(|adapter| adapter.as_bytes().eq_ignore_ascii_case(name))
            .unwrap_or_else(|| Self::Other(name.to_vec()))
    }

    /// The value of `ddb.adapterType`.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Ide => b"ide",
            Self::BusLogic => b"buslogic",
            Self::LsiLogic => b"lsilogic",
            Self::LegacyEsx => b"legacyESX",
            Self::Other(name) => name,
        }
    }
}

impl fmt::Display for AdapterType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(self.as_bytes()))
    }
}

/// Cylinders, heads, sectors per track (`ddb.geometry.*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chs {
    /// Cylinders.
    pub cylinders: u32,
    /// Heads.
    pub heads: u32,
    /// Sectors per track.
    pub sectors: u32,
}

impl Chs {
    /// The geometry of a disk of `capacity` sectors: 63 sectors per track, 16 heads for IDE and 255
    /// otherwise, whole cylinders, at least 1. At most 16383 cylinders for IDE (the ATA limit, as
    /// VMware writes; QEMU writes no limit) and 65535 otherwise (as open-vmdk).
    #[must_use]
    pub fn of(capacity: u64, adapter: &AdapterType) -> Self {
        let (heads, most) = if *adapter == AdapterType::Ide { (16u32, 16_383) } else { (255, 65_535) };
        let cylinders = (capacity / (u64::from(heads) * 63)).clamp(1, most);
        Self { cylinders: u32::try_from(cylinders).unwrap_or(65_535), heads, sectors: 63 }
    }
}

/// The sizes of the extents of a split disk of `capacity` sectors, in sectors: full extents of
/// [`SPLIT_SECTORS`] and the rest. A disk of no sectors has no extents.
pub fn split(capacity: u64) -> impl Iterator<Item = u64> {
    let rest = capacity % SPLIT_SECTORS;
    (0..capacity / SPLIT_SECTORS).map(|_| SPLIT_SECTORS).chain((rest != 0).then_some(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cylinders(capacity: u64, adapter: &AdapterType) -> u32 {
        Chs::of(capacity, adapter).cylinders
    }

    #[test]
    fn geometry_is_the_one_other_writers_give() {
        // qemu-img 10.0.2 (5 GiB ide, 300 GiB lsilogic), VirtualBox (4.5 GiB ide), open-vmdk.
        assert_eq!(cylinders(10_485_760, &AdapterType::Ide), 10_402);
        assert_eq!(cylinders(629_145_600, &AdapterType::LsiLogic), 39_162);
        assert_eq!(cylinders(9_437_184, &AdapterType::Ide), 9362);
        assert_eq!(Chs::of(8192, &AdapterType::LsiLogic), Chs { cylinders: 1, heads: 255, sectors: 63 });
        assert_eq!(Chs::of(16_777_216, &AdapterType::Ide), Chs { cylinders: 16_383, heads: 16, sectors: 63 });
        assert_eq!(cylinders(u64::MAX, &AdapterType::LsiLogic), 65_535);
        assert_eq!(cylinders(0, &AdapterType::Ide), 1);
    }

    #[test]
    fn disks_are_split_as_vmware_does() {
        assert_eq!(split(9_437_184).collect::<Vec<_>>(), [4_192_256, 4_192_256, 1_052_672]);
        assert_eq!(split(SPLIT_SECTORS).collect::<Vec<_>>(), [SPLIT_SECTORS]);
        assert_eq!(split(0).count(), 0);
    }

    #[test]
    fn adapters_are_named() {
        assert_eq!(AdapterType::from_bytes(b"LegacyESX"), AdapterType::LegacyEsx);
        assert_eq!(AdapterType::from_bytes(b"pvscsi").to_string(), "pvscsi");
        assert_eq!(AdapterType::default().to_string(), "lsilogic");
    }
}
