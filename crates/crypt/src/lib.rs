//! LUKS version 1 headers and the sector ciphers of disk images.
//!
//! * [`Header`]: a LUKS header, read and written; [`Header::unlock`] turns a passphrase into the disk's key.
//! * [`SectorCipher`]: encrypts and decrypts 512-byte sectors in place, told by their number.
//!
//! Sources: the LUKS On-Disk Format Specification, version 1.2.3, and the behaviour of QEMU and cryptsetup. The crate
//! knows neither files nor image formats.
#![forbid(unsafe_code)]

mod cipher;
mod error;
mod hash;
mod header;
mod key;
mod split;

pub use cipher::{Algorithm, CipherSpec, IvGenerator, Mode, SECTOR, SectorCipher};
pub use error::CryptError;
pub use hash::Hash;
pub use header::{HEADER_BYTES, Header, KEY_SLOTS, KeySlot, NewHeader};
pub use key::Secret;

/// Fills `bytes` with random ones.
///
/// # Errors
/// [`CryptError::NoRandom`].
pub fn random(bytes: &mut [u8]) -> Result<(), CryptError> {
    getrandom::fill(bytes).map_err(|_| CryptError::NoRandom)
}
