//! The kernel inside a bzImage (Linux, Documentation/arch/x86/boot.rst): unpacked once, it need not be unpacked by each
//! boot, which takes seconds under emulation.

use std::io::Write as _;
use std::process::{Command, Stdio};

/// The most that an unpacked kernel may have, in bytes.
const MAX_KERNEL: usize = 512 << 20;

/// The unpacked kernel, an ELF file, or why there is none.
pub(crate) fn unpack(image: &[u8]) -> Result<Vec<u8>, String> {
    let payload = payload(image).ok_or("the kernel is no bzImage")?;
    let (program, args) = unpacker(payload).ok_or("the kernel is packed in an unknown way")?;
    let failed = |error: std::io::Error| format!("{program}: {error}");
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let mut kernel = Vec::new();
    std::thread::scope(|scope| {
        if let Some(mut stdin) = stdin {
            // A program that stops reading has what it needs, or fails.
            scope.spawn(move || stdin.write_all(payload));
        }
        match stdout {
            Some(stdout) => {
                std::io::Read::read_to_end(&mut std::io::Read::take(stdout, MAX_KERNEL as u64), &mut kernel)
            }
            None => Ok(0),
        }
    })
    .map_err(failed)?;
    // Its status tells nothing: what follows the packed bytes, their size, is no part of the stream.
    let _ = child.kill();
    let _ = child.wait();
    let size = payload.last_chunk().map_or(0, |size| u32::from_le_bytes(*size) as usize);
    if kernel.len() != size || !kernel.starts_with(b"\x7fELF") {
        return Err(format!("{program} does not unpack the kernel"));
    }
    Ok(kernel)
}

/// The packed kernel, with its size behind it.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let at = |offset: usize, len: usize| image.get(offset..offset.checked_add(len)?);
    let u32_at = |offset| Some(u32::from_le_bytes(at(offset, 4)?.try_into().ok()?) as usize);
    let version = u16::from_le_bytes(at(0x206, 2)?.try_into().ok()?);
    // payload_offset is there since version 2.08 of the boot protocol.
    if at(0x202, 4)? != b"HdrS" || version < 0x208 {
        return None;
    }
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = sectors.checked_add(1)?.checked_mul(512)?.checked_add(u32_at(0x248)?)?;
    at(start, u32_at(0x24c)?)
}

/// The program that unpacks what begins like this.
fn unpacker(payload: &[u8]) -> Option<(&'static str, &'static [&'static str])> {
    const UNPACKERS: [(&[u8], &str, &[&str]); 4] = [
        (b"\xfd7zXZ\0", "xz", &["-dcq", "--single-stream"]),
        (b"\x28\xb5\x2f\xfd", "zstd", &["-dcq"]),
        (b"\x1f\x8b", "gzip", &["-dcq"]),
        (b"\x02\x21\x4c\x18", "lz4", &["-dcq"]),
    ];
    let found = UNPACKERS.iter().find(|(magic, ..)| payload.starts_with(magic));
    found.map(|&(_, program, args)| (program, args))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 64];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&64u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn a_kernel_is_unpacked_whole_or_not_at_all() {
        let kernel = [b"\x7fELF".to_vec(), vec![7; 100_000]].concat();
        let mut gzip =
            Command::new("gzip").arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        gzip.stdin.take().unwrap().write_all(&kernel).unwrap();
        let mut packed = gzip.wait_with_output().unwrap().stdout;
        packed.extend_from_slice(&(kernel.len() as u32).to_le_bytes());
        assert!(unpack(&image(&packed)).unwrap() == kernel);
        let last = packed.len() - 1;
        packed[last] ^= 1;
        assert!(unpack(&image(&packed)).is_err());
        assert!(unpack(&image(b"unknown")).is_err());
    }

    #[test]
    fn headers_that_lie_are_refused() {
        assert!(payload(&[]).is_none() && payload(&[0; 4096]).is_none());
        let mut image = image(b"abcd");
        assert_eq!(payload(&image), Some(&b"abcd"[..]));
        image[0x24c] += 1;
        assert_eq!(payload(&image), None);
        image[0x248..0x250].fill(0xff);
        assert_eq!(payload(&image), None);
    }
}
