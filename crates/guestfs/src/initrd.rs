//! The list of kernel modules in supermin's initrd: an unpacked cpio archive ("newc" format, cpio(5)) with a file `modules`
//! that names the modules to be loaded, one on each line, in this order (supermin, ext2 mini initrd).

/// Modules of devices that an appliance of QEMU, as libguestfs starts it, does not have, and variants of checksums for
/// processors that the one we emulate is not. Loading one takes up to 0.2 s under emulation (`ata_piix` waits for disks).
/// Modules that something in the appliance does need later are loaded by then from its root.
const NEEDLESS: &[&str] = &[
    "ata_piix",
    "crc-itu-t",
    "crc32-pclmul",
    "crc32c-intel",
    "crc7",
    "crc8",
    "crct10dif-pclmul",
    "crypto_engine",
    "fuse",
    "libata",
    "libnvdimm",
    "nd_btt",
    "nd_pmem",
    "nd_virtio",
    "nfit",
    "virtio_balloon",
    "virtio_crypto",
    "virtio_dma_buf",
    "virtio_input",
    "virtio_mem",
    "virtio_mmio",
    "virtio_pmem",
    "virtiofs",
];
const MODULES: &[u8] = b"modules";
/// The module that mounts the root: a list without it is not the one we know.
const ROOT: &str = "ext4.ko";
const HEADER: usize = 110;
const ALIGN: usize = 4;

/// What is to be put behind the initrd so that it loads the needed modules only: an archive whose list replaces the one
/// before it (Linux, Documentation/driver-api/early-userspace/buffer-format.rst). `None` if the initrd is not as we know it.
pub(crate) fn shorter_list(initrd: &[u8]) -> Option<Vec<u8>> {
    let list = std::str::from_utf8(find(initrd, MODULES)?).ok()?;
    if !list.lines().any(|module| module == ROOT) {
        return None;
    }
    let needed = |module: &&str| module.strip_suffix(".ko").is_none_or(|name| !NEEDLESS.contains(&name));
    let mut short = list.lines().filter(needed).collect::<Vec<_>>().join("\n").into_bytes();
    short.push(b'\n');
    let mut more = vec![0; initrd.len().next_multiple_of(ALIGN) - initrd.len()];
    put(&mut more, initrd.len(), MODULES, 0o100_644, &short);
    put(&mut more, initrd.len(), b"TRAILER!!!", 0, &[]);
    Some(more)
}

/// The content of a file of the archive.
fn find<'a>(archive: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let mut at = 0usize;
    loop {
        let header = archive.get(at..at.checked_add(HEADER)?)?;
        if !header.starts_with(b"070701") {
            return None;
        }
        // Thirteen fields of eight digits: the seventh is the content's length, the twelfth the name's, with its NUL.
        let field = |n: usize| {
            let digits = header.get(6 + 8 * n..14 + 8 * n)?;
            usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        };
        let name_at = at.checked_add(HEADER)?;
        let name_end = name_at.checked_add(field(11)?)?;
        let content_at = name_end.checked_next_multiple_of(ALIGN)?;
        let content_end = content_at.checked_add(field(6)?)?;
        if archive.get(name_at..name_end)?.strip_suffix(b"\0")? == wanted {
            return archive.get(content_at..content_end);
        }
        at = content_end.checked_next_multiple_of(ALIGN)?;
    }
}

/// Adds a file to what stands behind `before` bytes.
fn put(archive: &mut Vec<u8>, before: usize, name: &[u8], mode: u32, content: &[u8]) {
    let align = |archive: &mut Vec<u8>| {
        let len = before + archive.len();
        archive.resize(archive.len() + len.next_multiple_of(ALIGN) - len, 0);
    };
    // inode, mode, uid, gid, links, time, length, four device numbers, length of the name, checksum
    let (len, name_len) = (content.len(), name.len() + 1);
    archive.extend_from_slice(
        format!(
            "070701{:08X}{mode:08X}{:08X}{:08X}{:08X}{:08X}{len:08X}{:032X}{name_len:08X}{:08X}",
            1, 0, 0, 1, 0, 0, 0
        )
        .as_bytes(),
    );
    archive.extend_from_slice(name);
    archive.push(0);
    align(archive);
    archive.extend_from_slice(content);
    align(archive);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(files: &[(&str, &str)]) -> Vec<u8> {
        let mut archive = Vec::new();
        for (name, content) in files {
            put(&mut archive, 0, name.as_bytes(), 0o100_644, content.as_bytes());
        }
        put(&mut archive, 0, b"TRAILER!!!", 0, &[]);
        archive
    }

    #[test]
    fn the_list_behind_names_only_what_is_needed() {
        let old = archive(&[
            ("init", "\x7fELF"),
            ("modules", "libata.ko\nata_piix.ko\nvirtio.ko\next4.ko\n"),
            ("ext4.ko", "1"),
        ]);
        let more = shorter_list(&old).unwrap();
        assert_eq!(more.len() % ALIGN, 0);
        assert_eq!(find(&more, MODULES).unwrap(), b"virtio.ko\next4.ko\n");
    }

    #[test]
    fn what_another_program_unpacks_is_the_new_list() {
        let dir = tempfile::tempdir().unwrap();
        let old = archive(&[("modules", "fuse.ko\next4.ko\n")]);
        let file = dir.path().join("initrd");
        std::fs::write(&file, shorter_list(&old).unwrap()).unwrap();
        let mut run = std::process::Command::new("cpio");
        run.args(["-i", "--quiet"]).current_dir(&dir).stdin(std::fs::File::open(&file).unwrap());
        let Ok(mut child) = run.spawn() else { return eprintln!("skipped: cpio is not installed") };
        assert!(child.wait().unwrap().success());
        assert_eq!(std::fs::read(dir.path().join("modules")).unwrap(), b"ext4.ko\n");
    }

    #[test]
    fn an_initrd_of_another_kind_is_left_alone() {
        let good = archive(&[("modules", "fuse.ko\next4.ko\n")]);
        assert!(shorter_list(&good).is_some());
        for bad in [archive(&[("modules", "fuse.ko\n")]), archive(&[("init", "")]), b"\x1f\x8b".to_vec()] {
            assert_eq!(shorter_list(&bad), None);
        }
        // Its lengths may lie.
        for at in (0..good.len()).filter(|at| (6..HEADER).contains(at)) {
            let mut bad = good.clone();
            bad[at] = b'F';
            let _ = shorter_list(&bad);
        }
        // The list ends there.
        for len in 0..136 {
            assert_eq!(shorter_list(&good[..len]), None);
        }
    }
}
