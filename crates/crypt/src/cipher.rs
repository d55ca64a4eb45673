use std::fmt;
use std::str::FromStr;

use aes::cipher::consts::U16;
use aes::cipher::{
    Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, BlockSizeUser,
    InnerIvInit, KeyInit,
};
use aes::{Aes128, Aes192, Aes256};
use serpent::Serpent;
use twofish::Twofish;
use xts_mode::Xts128;

use crate::{CryptError, Hash, Secret};

/// Bytes in a sector: each is encrypted by itself.
pub const SECTOR: usize = 512;
const BLOCK: usize = 16;

type Block = [u8; BLOCK];

/// A block cipher of 128-bit blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Algorithm {
    Aes,
    Serpent,
    Twofish,
}

/// How the blocks of a sector hang together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Cipher block chaining.
    Cbc,
    /// XEX with ciphertext stealing (IEEE 1619); its key is twice as long.
    Xts,
}

/// How a sector's number becomes its initialisation vector (LUKS specification, annex "IV generators").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IvGenerator {
    /// Its low 32 bits.
    Plain,
    /// Its 64 bits.
    Plain64,
    /// Its 64 bits, encrypted with the hash of the key.
    Essiv(Hash),
}

/// A cipher as a header names it, such as `aes` with `xts-plain64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CipherSpec {
    /// The block cipher.
    pub algorithm: Algorithm,
    /// Its mode.
    pub mode: Mode,
    /// Its initialisation vectors.
    pub iv: IvGenerator,
}

impl Algorithm {
    /// Its name in headers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Serpent => "serpent",
            Self::Twofish => "twofish",
        }
    }
}

impl FromStr for Algorithm {
    type Err = CryptError;

    fn from_str(name: &str) -> Result<Self, CryptError> {
        match name {
            "aes" => Ok(Self::Aes),
            "serpent" => Ok(Self::Serpent),
            "twofish" => Ok(Self::Twofish),
            _ => Err(CryptError::Unsupported(format!("the cipher {name:?}"))),
        }
    }
}

impl CipherSpec {
    /// The spec that a header gives as cipher name and mode, such as `aes` and `cbc-essiv:sha256`.
    ///
    /// # Errors
    /// [`CryptError::Unsupported`] for names that are not known.
    pub fn parse(cipher: &str, mode: &str) -> Result<Self, CryptError> {
        let unknown = || CryptError::Unsupported(format!("the cipher mode {mode:?}"));
        let (chaining, iv) = mode.split_once('-').ok_or_else(unknown)?;
        let iv = match iv.split_once(':') {
            Some(("essiv", hash)) => IvGenerator::Essiv(hash.parse()?),
            None if iv == "plain" => IvGenerator::Plain,
            None if iv == "plain64" => IvGenerator::Plain64,
            _ => return Err(unknown()),
        };
        let mode = match chaining {
            "cbc" => Mode::Cbc,
            "xts" => Mode::Xts,
            _ => return Err(unknown()),
        };
        Ok(Self { algorithm: cipher.parse()?, mode, iv })
    }

    /// The mode as a header gives it, such as `xts-plain64`.
    #[must_use]
    pub fn mode_name(&self) -> String {
        let mode = match self.mode {
            Mode::Cbc => "cbc",
            Mode::Xts => "xts",
        };
        match self.iv {
            IvGenerator::Plain => format!("{mode}-plain"),
            IvGenerator::Plain64 => format!("{mode}-plain64"),
            IvGenerator::Essiv(hash) => format!("{mode}-essiv:{}", hash.name()),
        }
    }
}

/// Encrypts and decrypts sectors with one key.
pub struct SectorCipher {
    mode: Box<dyn SectorMode>,
    iv: Iv,
}

enum Iv {
    Plain,
    Plain64,
    Essiv(Box<dyn SectorMode>),
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SectorCipher(..)")
    }
}

impl SectorCipher {
    /// The cipher of `spec` with `key`.
    ///
    /// # Errors
    /// [`CryptError::Unsupported`] if the key has a length that the cipher does not take.
    pub fn new(spec: CipherSpec, key: &Secret) -> Result<Self, CryptError> {
        let iv = match spec.iv {
            IvGenerator::Plain => Iv::Plain,
            IvGenerator::Plain64 => Iv::Plain64,
            IvGenerator::Essiv(hash) => {
                let salt = Secret::new(hash.digest(&[key.bytes()]));
                Iv::Essiv(sector_mode(spec.algorithm, Mode::Cbc, salt.bytes())?)
            }
        };
        Ok(Self { mode: sector_mode(spec.algorithm, spec.mode, key.bytes())?, iv })
    }

    /// Decrypts whole sectors in place, the first of which has the number `first`. Bytes after the last whole sector
    /// stay as they are.
    pub fn decrypt(&self, sectors: &mut [u8], first: u64) {
        for (sector, number) in sectors.chunks_exact_mut(SECTOR).zip(first..) {
            self.mode.decrypt(sector, self.iv(number));
        }
    }

    /// Encrypts whole sectors in place, the first of which has the number `first`. Bytes after the last whole sector
    /// stay as they are.
    pub fn encrypt(&self, sectors: &mut [u8], first: u64) {
        for (sector, number) in sectors.chunks_exact_mut(SECTOR).zip(first..) {
            self.mode.encrypt(sector, self.iv(number));
        }
    }

    fn iv(&self, sector: u64) -> Block {
        let number = if matches!(self.iv, Iv::Plain) { sector & 0xffff_ffff } else { sector };
        let mut iv = u128::from(number).to_le_bytes();
        if let Iv::Essiv(cipher) = &self.iv {
            // One block chained to a zero vector is that block encrypted.
            cipher.encrypt(&mut iv, [0; BLOCK]);
        }
        iv
    }
}

trait SectorMode: Send + Sync {
    fn encrypt(&self, sector: &mut [u8], iv: Block);
    fn decrypt(&self, sector: &mut [u8], iv: Block);
}

/// What all block ciphers of this crate are.
trait BlockCipher:
    BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + Send + Sync + 'static
{
}

impl<C> BlockCipher for C where
    C: BlockSizeUser<BlockSize = U16>
        + BlockCipherEncrypt
        + BlockCipherDecrypt
        + KeyInit
        + Send
        + Sync
        + 'static
{
}

struct Chained<C>(C);

impl<C: BlockCipher> SectorMode for Chained<C> {
    fn encrypt(&self, sector: &mut [u8], iv: Block) {
        let (blocks, _) = Array::slice_as_chunks_mut(sector);
        cbc::Encryptor::inner_iv_init(&self.0, &iv.into()).encrypt_blocks(blocks);
    }

    fn decrypt(&self, sector: &mut [u8], iv: Block) {
        let (blocks, _) = Array::slice_as_chunks_mut(sector);
        cbc::Decryptor::inner_iv_init(&self.0, &iv.into()).decrypt_blocks(blocks);
    }
}

impl<C: BlockCipher> SectorMode for Xts128<C> {
    fn encrypt(&self, sector: &mut [u8], iv: Block) {
        self.encrypt_sector(sector, iv.into());
    }

    fn decrypt(&self, sector: &mut [u8], iv: Block) {
        self.decrypt_sector(sector, iv.into());
    }
}

fn sector_mode(algorithm: Algorithm, mode: Mode, key: &[u8]) -> Result<Box<dyn SectorMode>, CryptError> {
    let key_len = if mode == Mode::Xts { key.len() / 2 } else { key.len() };
    match (algorithm, key_len) {
        (Algorithm::Aes, 16) => with::<Aes128>(mode, key),
        (Algorithm::Aes, 24) => with::<Aes192>(mode, key),
        (Algorithm::Aes, 32) => with::<Aes256>(mode, key),
        (Algorithm::Serpent, 16 | 24 | 32) => with::<Serpent>(mode, key),
        (Algorithm::Twofish, 16 | 24 | 32) => with::<Twofish>(mode, key),
        _ => None,
    }
    .ok_or_else(|| {
        CryptError::Unsupported(format!("a key of {} bytes for the cipher {}", key.len(), algorithm.name()))
    })
}

fn with<C: BlockCipher>(mode: Mode, key: &[u8]) -> Option<Box<dyn SectorMode>> {
    Some(match mode {
        Mode::Cbc => Box::new(Chained(C::new_from_slice(key).ok()?)),
        Mode::Xts => {
            let (data, tweak) = key.split_at_checked(key.len() / 2)?;
            if data.len() != tweak.len() {
                return None;
            }
            Box::new(Xts128::new(C::new_from_slice(data).ok()?, C::new_from_slice(tweak).ok()?))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cipher_decrypts_what_it_encrypted() {
        for cipher in ["aes", "serpent", "twofish"] {
            for mode in ["cbc-plain", "cbc-plain64", "cbc-essiv:sha256", "xts-plain64", "xts-plain"] {
                let spec = CipherSpec::parse(cipher, mode).unwrap();
                assert_eq!(spec.mode_name(), mode);
                let key_len = if spec.mode == Mode::Xts { 64 } else { 32 };
                let cipher = SectorCipher::new(spec, &Secret::new((0..key_len).collect())).unwrap();
                let plain: Vec<u8> = (0..3 * SECTOR).map(|at| (at % 251) as u8).collect();
                let mut sectors = plain.clone();
                cipher.encrypt(&mut sectors, 0xffff_fffe);
                assert_ne!(sectors, plain);
                // Equal sectors look different, each by itself can be read.
                cipher.decrypt(&mut sectors[SECTOR..2 * SECTOR], 0xffff_ffff);
                assert_eq!(sectors[SECTOR..2 * SECTOR], plain[SECTOR..2 * SECTOR]);
                cipher.decrypt(&mut sectors[..SECTOR], 0xffff_fffe);
                cipher.decrypt(&mut sectors[2 * SECTOR..], 0x1_0000_0000);
                assert_eq!(sectors, plain);
            }
        }
    }

    #[test]
    fn names_and_key_lengths_that_are_not_known_are_refused() {
        for (cipher, mode) in
            [("cast5", "cbc-plain"), ("aes", "ctr-plain"), ("aes", "xts"), ("aes", "xts-benbi")]
        {
            assert!(matches!(CipherSpec::parse(cipher, mode), Err(CryptError::Unsupported(_))), "{mode}");
        }
        let spec = CipherSpec::parse("aes", "xts-plain64").unwrap();
        for len in [0, 16, 33, 65, 128] {
            assert!(SectorCipher::new(spec, &Secret::new(vec![1; len])).is_err(), "{len}");
        }
    }
}
