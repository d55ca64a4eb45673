//! The manifest (`.mf`): one line `SHA256(name)= digest` for each file (DSP0243, "Distribution").

use std::collections::HashSet;
use std::fmt::Write as _;

use crate::{FormatError, Limits};

/// A digest algorithm of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// SHA-1, OVF 1.
    Sha1,
    /// SHA-256, OVF 2.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Algorithm {
    const NAMES: [(Self, &'static [u8], usize); 3] =
        [(Self::Sha1, b"SHA1", 20), (Self::Sha256, b"SHA256", 32), (Self::Sha512, b"SHA512", 64)];

    fn from_bytes(name: &[u8]) -> Option<Self> {
        let plain: Vec<u8> = name.iter().copied().filter(|&byte| byte != b'-').collect();
        let found = Self::NAMES.into_iter().find(|(_, known, _)| known.eq_ignore_ascii_case(&plain));
        found.map(|(algorithm, ..)| algorithm)
    }

    /// Bytes of a digest.
    #[must_use]
    pub fn digest_bytes(self) -> usize {
        Self::NAMES.iter().find(|(algorithm, ..)| *algorithm == self).map_or(0, |(.., len)| *len)
    }

    fn name(self) -> &'static [u8] {
        Self::NAMES.iter().find(|(algorithm, ..)| *algorithm == self).map_or(b"", |(_, name, _)| name)
    }
}

/// The digest of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digest {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// Name of the file in the archive.
    pub name: Vec<u8>,
    /// The digest, [`Algorithm::digest_bytes`] bytes.
    pub digest: Vec<u8>,
}

/// A manifest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Manifest {
    /// The digests in their order.
    pub digests: Vec<Digest>,
}

impl Manifest {
    /// Reads a manifest: `SHA256(name)= digest`, with blanks anywhere between the parts.
    ///
    /// # Errors
    /// `Limit` above [`Limits::manifest_bytes`]; `Unsupported` for another algorithm; `Corrupt` for
    /// any other line, a digest of the wrong length, or a second digest of one file.
    pub fn parse(text: &[u8], limits: &Limits) -> Result<Self, FormatError> {
        if text.len() as u64 > limits.manifest_bytes {
            let max = limits.manifest_bytes;
            return Err(FormatError::limit("manifest", format!("{} bytes, the limit is {max}", text.len())));
        }
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let mut digests = Vec::new();
        let mut seen = HashSet::new();
        for (number, line) in (1..).zip(text.split(|&byte| byte == b'\n')) {
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            let what = || format!("manifest, line {number}");
            let bad = || FormatError::corrupt(what(), "not of the form `SHA256(name)= digest`");
            // The name may hold parentheses: it goes from the first one to the last one.
            let open = line.iter().position(|&byte| byte == b'(').ok_or_else(bad)?;
            let close =
                line.iter().rposition(|&byte| byte == b')').filter(|&at| at > open).ok_or_else(bad)?;
            let (head, _) = line.split_at(open);
            let algorithm = Algorithm::from_bytes(head.trim_ascii()).ok_or_else(|| {
                let shown = String::from_utf8_lossy(head).into_owned();
                FormatError::unsupported(
                    what(),
                    format!("digest algorithm {shown:?}; known are SHA1, SHA256, SHA512"),
                )
            })?;
            let name = line.get(open + 1..close).ok_or_else(bad)?;
            if !seen.insert(name) {
                // One of them may be what a forger added.
                let shown = String::from_utf8_lossy(name);
                return Err(FormatError::corrupt(what(), format!("a second digest of {shown:?}")));
            }
            let hex =
                line.get(close + 1..).unwrap_or_default().trim_ascii().strip_prefix(b"=").ok_or_else(bad)?;
            let digest = decode_hex(hex.trim_ascii())
                .filter(|d| d.len() == algorithm.digest_bytes())
                .ok_or_else(|| {
                    FormatError::corrupt(
                        what(),
                        format!("the digest is not {} hexadecimal digits", algorithm.digest_bytes() * 2),
                    )
                })?;
            digests.push(Digest { algorithm, name: name.to_vec(), digest });
        }
        Ok(Self { digests })
    }

    /// The text of the manifest. Names hold no line end: those that [`tar`](super::tar) and
    /// [`OvfBuilder`](super::OvfBuilder) accept never do.
    #[must_use]
    pub fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for Digest { algorithm, name, digest } in &self.digests {
            let mut hex = String::with_capacity(digest.len() * 2);
            for byte in digest {
                // Writing to a string does not fail.
                let _ = write!(hex, "{byte:02x}");
            }
            for part in [algorithm.name(), b"(", name, b")= ", hex.as_bytes(), b"\n"] {
                out.extend_from_slice(part);
            }
        }
        out
    }

    /// The digest of the file `name`.
    #[must_use]
    pub fn get(&self, name: &[u8]) -> Option<&Digest> {
        self.digests.iter().find(|digest| digest.name == name)
    }
}

fn decode_hex(hex: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(hex).ok().filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()))?;
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Problem;
    use proptest::prelude::*;

    #[test]
    fn the_forms_of_real_manifests_read() {
        // The corpus (go-vcloud-director), and OpenSSL's and BSD's spelling.
        let hex = "f93f8092a1eea9e5161c3768ce55299891f5cbbf";
        for text in [
            format!("SHA1(vm-disk-0.vmdk)= {hex}\n"),
            format!("SHA1 (vm-disk-0.vmdk) = {}\r\n\r\n", hex.to_uppercase()),
            format!("\u{feff}sha-1(vm-disk-0.vmdk)={hex}"),
        ] {
            let manifest = Manifest::parse(text.as_bytes(), &Limits::default()).unwrap();
            let digest = manifest.get(b"vm-disk-0.vmdk").unwrap();
            assert_eq!(
                (digest.algorithm, digest.digest[0], digest.digest.len()),
                (Algorithm::Sha1, 0xf9, 20)
            );
        }
    }

    #[test]
    fn bad_lines_are_named() {
        let problem = |text: &str| Manifest::parse(text.as_bytes(), &Limits::default()).unwrap_err().problem;
        assert_eq!(problem("SHA1(a)= 00"), Problem::Corrupt);
        assert_eq!(problem("SHA1(a) 00"), Problem::Corrupt);
        assert_eq!(problem("SHA1)a(= 00"), Problem::Corrupt);
        assert_eq!(problem(&format!("SHA1(a)= {}", "0g".repeat(20))), Problem::Corrupt);
        assert_eq!(problem(&format!("SHA1(a)= {}0", "00".repeat(20))), Problem::Corrupt);
        let line = format!("SHA1(a)= {}\n", "00".repeat(20));
        assert_eq!(problem(&line.repeat(2)), Problem::Corrupt);
        assert_eq!(problem("MD5(a)= 00"), Problem::Unsupported);
        assert_eq!(problem(&" ".repeat((1 << 20) + 1)), Problem::Limit);
    }

    proptest! {
        #[test]
        fn manifests_round_trip(files in proptest::collection::vec(("[ -~]{1,20}", any::<[u8; 64]>(), 0usize..3), 0..5)) {
            let names: HashSet<String> = files.iter().map(|(name, ..)| name.clone()).collect();
            prop_assume!(names.len() == files.len());
            let digests = files
                .into_iter()
                .map(|(name, digest, kind)| {
                    let (algorithm, _, len) = Algorithm::NAMES[kind];
                    Digest { algorithm, name: name.into_bytes(), digest: digest[..len].to_vec() }
                })
                .collect();
            let manifest = Manifest { digests };
            prop_assert_eq!(Manifest::parse(&manifest.write(), &Limits::default()).unwrap(), manifest);
        }

        #[test]
        fn arbitrary_text_never_panics(text in "(SHA1|SHA256|\\(|\\)|=|[0-9a-f]|.|\\n){0,40}") {
            let _ = Manifest::parse(text.as_bytes(), &Limits::default());
        }
    }
}
