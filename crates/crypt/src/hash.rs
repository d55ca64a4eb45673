use std::str::FromStr;

use pbkdf2::pbkdf2_hmac;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

use crate::CryptError;

/// A hash that LUKS headers name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

impl Hash {
    const ALL: [Self; 6] =
        [Self::Sha1, Self::Sha224, Self::Sha256, Self::Sha384, Self::Sha512, Self::Ripemd160];

    /// Its name in headers and options.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
        }
    }

    /// The digest of the concatenated `parts`.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Vec<u8> {
        fn of<D: Digest>(parts: &[&[u8]]) -> Vec<u8> {
            let mut hasher = D::new();
            for part in parts {
                hasher.update(part);
            }
            hasher.finalize().to_vec()
        }
        match self {
            Self::Sha1 => of::<Sha1>(parts),
            Self::Sha224 => of::<Sha224>(parts),
            Self::Sha256 => of::<Sha256>(parts),
            Self::Sha384 => of::<Sha384>(parts),
            Self::Sha512 => of::<Sha512>(parts),
            Self::Ripemd160 => of::<Ripemd160>(parts),
        }
    }

    /// Bytes in a digest.
    pub(crate) const fn len(self) -> usize {
        match self {
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// PBKDF2 (RFC 8018) with HMAC of this hash: fills `out`.
    pub(crate) fn pbkdf2(self, passphrase: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Self::Sha1 => pbkdf2_hmac::<Sha1>(passphrase, salt, iterations, out),
            Self::Sha224 => pbkdf2_hmac::<Sha224>(passphrase, salt, iterations, out),
            Self::Sha256 => pbkdf2_hmac::<Sha256>(passphrase, salt, iterations, out),
            Self::Sha384 => pbkdf2_hmac::<Sha384>(passphrase, salt, iterations, out),
            Self::Sha512 => pbkdf2_hmac::<Sha512>(passphrase, salt, iterations, out),
            Self::Ripemd160 => pbkdf2_hmac::<Ripemd160>(passphrase, salt, iterations, out),
        }
    }
}

impl FromStr for Hash {
    type Err = CryptError;

    fn from_str(name: &str) -> Result<Self, CryptError> {
        Self::ALL
            .into_iter()
            .find(|hash| hash.name() == name)
            .ok_or_else(|| CryptError::Unsupported(format!("the hash {name:?}")))
    }
}
