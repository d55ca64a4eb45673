//! Digests of guest content, and comparison of a file with what it should hold.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

const CHUNK: usize = 1 << 20;

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of bytes in memory, in hexadecimal.
pub fn sha256_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of a file, in hexadecimal. Holes are hashed from memory, without reading the file.
pub fn sha256_file(path: &Path) -> String {
    let mut hash = Sha256::new();
    let zeros = vec![0; CHUNK];
    each_run(path, |run, len| match run {
        Some(bytes) => hash.update(bytes),
        None => {
            let mut left = len;
            while left > 0 {
                // The step is at most CHUNK.
                let step = left.min(CHUNK as u64) as usize;
                hash.update(&zeros[..step]);
                left -= step as u64;
            }
        }
    })
    .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    hex(&hash.finalize())
}

/// Panics unless the file holds exactly `want`; names the first offset that differs.
pub fn same_content(path: &Path, want: &[u8]) {
    let got = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(got.len(), want.len(), "length of {}", path.display());
    if let Some(at) = got.iter().zip(want).position(|(a, b)| a != b) {
        let differing = got.iter().zip(want).filter(|(a, b)| a != b).count();
        panic!(
            "{} differs at offset {at:#x}: {:#04x} instead of {:#04x}; {differing} bytes differ",
            path.display(),
            got[at],
            want[at]
        );
    }
}

/// Panics unless `got` is `want`; says of `what` that is, how long both are and where they differ first.
pub fn same(got: &[u8], want: &[u8], what: &str) {
    if got != want {
        let at = got.iter().zip(want).position(|(a, b)| a != b);
        panic!("{what}: {} and {} bytes, first difference at {at:?}", got.len(), want.len());
    }
}

/// Calls `f` with the bytes of each stretch of data, or with `None` and the length of each hole.
fn each_run(path: &Path, mut f: impl FnMut(Option<&[u8]>, u64)) -> io::Result<()> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut buf = vec![0; CHUNK];
    let mut at = 0;
    while at < len {
        let data = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data.min(len),
            // Only a hole is left.
            Err(Errno::NXIO) => len,
            Err(e) => return Err(e.into()),
        };
        f(None, data - at);
        at = data;
        let end = if at < len { seek(&file, SeekFrom::Hole(at))? } else { len };
        while at < end {
            let step = (end - at).min(CHUNK as u64) as usize;
            file.read_exact_at(&mut buf[..step], at)?;
            f(Some(&buf[..step]), step as u64);
            at += step as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparse_file_hashes_like_its_bytes() {
        let dir = crate::scratch();
        let path = dir.path().join("f");
        let file = File::create(&path).unwrap();
        file.set_len(5 << 20).unwrap();
        file.write_all_at(b"hello", (2 << 20) + 3).unwrap();
        let mut plain = vec![0; 5 << 20];
        plain[(2 << 20) + 3..][..5].copy_from_slice(b"hello");
        assert_eq!(sha256_file(&path), sha256_bytes(&plain));
        same_content(&path, &plain);
        assert_eq!(sha256_bytes(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    #[should_panic(expected = "differs at offset 0x3")]
    fn a_wrong_byte_is_found() {
        let dir = crate::scratch();
        let path = dir.path().join("f");
        std::fs::write(&path, b"abcd").unwrap();
        same_content(&path, b"abce");
    }
}
