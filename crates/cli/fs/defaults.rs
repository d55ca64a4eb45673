//! What an appliance is given where neither flag nor variable nor file says: memory by the size of the image and by what the
//! machine or its control group has left, CPUs where KVM runs them.

/// libguestfs' own default on x86-64 (guestfs(3), "guestfs_set_memsize"). LUKS2 volumes may ask for 1 GiB of it.
const BASE_MIB: u64 = 1280;
/// What each TiB of the image adds: e2fsck holds three bitmaps of the blocks, 32 MiB each with blocks of 4 KiB, and several
/// of the inodes.
const PER_TIB_MIB: u64 = 256;
const MOST_MIB: u64 = 4096;
/// The appliance boots and works on small file systems with it.
const LEAST_MIB: u64 = 512;
/// What QEMU itself and the server of the image take besides.
const BESIDE_MIB: u64 = 128;
/// More CPUs than that are of no use to the commands that an appliance runs.
const MOST_CPUS: u32 = 4;

/// Memory for an appliance on an image of `size` bytes, in MiB, where `free` bytes are available.
pub(crate) fn memory_mib(size: u64, free: Option<u64>) -> u32 {
    let wanted = BASE_MIB.saturating_add((size >> 40).saturating_mul(PER_TIB_MIB)).min(MOST_MIB);
    let room = free.map_or(wanted, |free| (free >> 20).saturating_sub(BESIDE_MIB));
    u32::try_from(wanted.min(room).max(LEAST_MIB)).unwrap_or(u32::MAX)
}

/// Virtual CPUs, of `allowed` ones. Emulated ones wait for each other more than they gain.
pub(crate) fn cpus(kvm_works: bool, allowed: usize) -> u32 {
    if kvm_works { u32::try_from(allowed).unwrap_or(MOST_CPUS).clamp(1, MOST_CPUS) } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_follows_the_image_and_what_is_left() {
        const GIB: u64 = 1 << 30;
        for (size, free, mib) in [
            (0, None, 1280),
            (GIB, Some(64 * GIB), 1280),
            (1023 * GIB, Some(64 * GIB), 1280),
            (1024 * GIB, Some(64 * GIB), 1536),
            (8 * 1024 * GIB, Some(64 * GIB), 3328),
            (u64::MAX, Some(64 * GIB), 4096),
            (8 * 1024 * GIB, Some(2 * GIB), 1920),
            (GIB, Some(GIB), 896),
            (GIB, Some(0), 512),
        ] {
            assert_eq!(memory_mib(size, free), mib, "{size} {free:?}");
        }
    }

    #[test]
    fn cpus_are_for_kvm() {
        assert_eq!([(true, 1), (true, 3), (true, 64), (false, 8)].map(|(kvm, n)| cpus(kvm, n)), [1, 3, 4, 1]);
    }
}
