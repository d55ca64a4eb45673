use std::sync::Arc;
use std::time::Duration;

use diskmill_crypt::{
    Algorithm, CipherSpec, Hash, Header, IvGenerator, Mode, NewHeader, Secret, SectorCipher,
};

use crate::encrypted::legacy_aes;
use crate::error::{Error, Result};

/// How the guest's data is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EncryptionFormat {
    /// LUKS, version 1.
    #[default]
    Luks,
    /// qcow2's own AES-128-CBC: weak (specification, "AES encryption"), for tools that know nothing else.
    Aes,
}

/// Encryption of a fresh image: the options `encrypt.*` of `qemu-img create -f qcow2 -o help`, with its defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncryptionOptions {
    /// `encrypt.format`; all options below but the passphrase are for LUKS.
    pub format: EncryptionFormat,
    /// `encrypt.key-secret`: what the caller knows the passphrase by.
    pub key_secret: Option<String>,
    /// The passphrase.
    pub key: Option<Secret>,
    /// `encrypt.iter-time`: how long one try at the passphrase takes on this machine.
    pub iter_time: Duration,
    /// `encrypt.hash-alg`.
    pub hash: Hash,
    algorithm: Algorithm,
    /// Bytes in the cipher's key.
    cipher_key: u32,
    mode: Mode,
    iv: Iv,
    iv_hash: Option<Hash>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Iv {
    Plain,
    Plain64,
    Essiv,
}

impl Default for EncryptionOptions {
    fn default() -> Self {
        Self {
            format: EncryptionFormat::default(),
            key_secret: None,
            key: None,
            iter_time: Duration::from_secs(2),
            hash: Hash::Sha256,
            algorithm: Algorithm::Aes,
            cipher_key: 32,
            mode: Mode::Xts,
            iv: Iv::Plain64,
            iv_hash: None,
        }
    }
}

/// What guest data is encrypted with.
pub(crate) enum Encryption {
    /// By offset in the file; with the LUKS header that keeps the key.
    Luks(Arc<SectorCipher>, Vec<u8>),
    /// By guest offset.
    Aes(SectorCipher),
}

impl EncryptionOptions {
    /// Sets the option whose name is `encrypt.` and `name`.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let unknown = |known: &str| {
            Error::unsupported(format!("encrypt.{name}={value:?}")).hint(format!("one of {known}"))
        };
        match name {
            "format" if value == "luks" => self.format = EncryptionFormat::Luks,
            "format" if value == "aes" => self.format = EncryptionFormat::Aes,
            "format" => return Err(unknown("luks and aes")),
            "key-secret" => self.key_secret = Some(value.to_owned()),
            "cipher-alg" => {
                let known = "aes-, serpent- or twofish-, and 128, 192 or 256";
                let (name, bits) = value.split_once('-').ok_or_else(|| unknown(known))?;
                self.algorithm = name.parse().map_err(|_| unknown(known))?;
                let bytes = match bits {
                    "128" => 16,
                    "192" => 24,
                    "256" => 32,
                    _ => return Err(unknown(known)),
                };
                self.cipher_key = bytes;
            }
            "cipher-mode" => {
                self.mode = match value {
                    "xts" => Mode::Xts,
                    "cbc" => Mode::Cbc,
                    _ => return Err(unknown("xts and cbc")),
                }
            }
            "ivgen-alg" => {
                self.iv = match value {
                    "plain" => Iv::Plain,
                    "plain64" => Iv::Plain64,
                    "essiv" => Iv::Essiv,
                    _ => return Err(unknown("plain, plain64 and essiv")),
                }
            }
            "ivgen-hash-alg" => self.iv_hash = Some(value.parse()?),
            "hash-alg" => self.hash = value.parse()?,
            "iter-time" => {
                let time = value.parse().ok().filter(|&time| (1..=60_000).contains(&time));
                let time = time.ok_or_else(|| {
                    Error::invalid(format!("encrypt.iter-time={value:?}"))
                        .hint("milliseconds, at most a minute")
                })?;
                self.iter_time = Duration::from_millis(time);
            }
            _ => return Err(Error::unsupported(format!("the qcow2 option encrypt.{name}"))),
        }
        Ok(())
    }

    /// Makes a disk key, or takes the passphrase for it.
    pub(crate) fn create(&self) -> Result<Encryption> {
        let Some(passphrase) = &self.key else {
            return Err(Error::invalid("encryption needs a passphrase for the new image"));
        };
        if self.format == EncryptionFormat::Aes {
            return legacy_aes(std::slice::from_ref(passphrase)).map(Encryption::Aes);
        }
        let new = self.header();
        let (key, bytes) = Header::create(&new, passphrase)?;
        Ok(Encryption::Luks(Arc::new(SectorCipher::new(new.cipher, &key)?), bytes))
    }

    /// Bytes that the LUKS header and its key material will take.
    pub(crate) fn header_bytes(&self) -> u64 {
        match self.format {
            EncryptionFormat::Luks => self.header().payload_offset(),
            EncryptionFormat::Aes => 0,
        }
    }

    fn header(&self) -> NewHeader {
        let iv = match self.iv {
            Iv::Plain => IvGenerator::Plain,
            Iv::Plain64 => IvGenerator::Plain64,
            Iv::Essiv => IvGenerator::Essiv(self.iv_hash.unwrap_or(Hash::Sha256)),
        };
        NewHeader {
            cipher: CipherSpec { algorithm: self.algorithm, mode: self.mode, iv },
            key_bytes: if self.mode == Mode::Xts { 2 * self.cipher_key } else { self.cipher_key },
            hash: self.hash,
            iter_time: self.iter_time,
        }
    }
}
