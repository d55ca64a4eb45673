use std::ops::Range;
use std::time::{Duration, Instant};

use subtle::ConstantTimeEq;

use crate::cipher::{Algorithm, CipherSpec, IvGenerator, Mode, SECTOR, SectorCipher};
use crate::split::{merge, split};
use crate::{CryptError, Hash, Secret, random};

/// Bytes in the fixed part of a header.
pub const HEADER_BYTES: usize = 592;
/// Key slots in a header.
pub const KEY_SLOTS: usize = 8;

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const VERSION: u16 = 1;
/// Where the slots stand in the header, and their length in bytes (specification, section 2.2).
const SLOTS_AT: usize = 208;
const SLOT_BYTES: usize = 48;
const SLOT_ENABLED: u32 = 0x00ac_71f3;
const SLOT_DISABLED: u32 = 0x0000_dead;
const SALT: usize = 32;
const DIGEST: usize = 20;
/// The only number of stripes that QEMU and cryptsetup write.
const STRIPES: u32 = 4000;
/// Key material begins at multiples of this (what QEMU and cryptsetup do).
const MATERIAL_ALIGN: u64 = 4096;
/// An image from a stranger may name any number of iterations; QEMU and cryptsetup measure some millions for the two
/// seconds that they spend.
const MAX_ITERATIONS: u32 = 1 << 26;
/// What cryptsetup takes for the least.
const MIN_ITERATIONS: u32 = 1000;

/// A slot that holds the disk's key, encrypted with a passphrase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySlot {
    /// Whether the slot is in use.
    pub active: bool,
    /// Iterations of PBKDF2.
    pub iterations: u32,
    /// Salt of PBKDF2.
    pub salt: [u8; SALT],
    /// Where the encrypted key stands, in bytes from the header's start.
    pub material_offset: u64,
    /// Stripes that the key is spread over.
    pub stripes: u32,
}

/// A LUKS header of version 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The cipher of the payload and of the key slots.
    pub cipher: CipherSpec,
    /// The hash of PBKDF2 and of the splitter.
    pub hash: Hash,
    /// Where the payload of a plain LUKS volume begins, in bytes. In qcow2: the length of header and key material.
    pub payload_offset: u64,
    /// Bytes in the disk's key.
    pub key_bytes: u32,
    /// Digest of the disk's key.
    pub digest: [u8; DIGEST],
    /// Salt of the digest.
    pub digest_salt: [u8; SALT],
    /// Iterations of the digest.
    pub digest_iterations: u32,
    /// UUID as text.
    pub uuid: String,
    /// The key slots.
    pub slots: [KeySlot; KEY_SLOTS],
}

/// What a new header is to be.
#[derive(Debug, Clone)]
pub struct NewHeader {
    /// The cipher.
    pub cipher: CipherSpec,
    /// Bytes in the key: for XTS twice the cipher's.
    pub key_bytes: u32,
    /// The hash.
    pub hash: Hash,
    /// How long a try at the passphrase is to take on this machine.
    pub iter_time: Duration,
}

impl Default for NewHeader {
    /// QEMU's defaults: AES-256 in XTS with `plain64`, SHA-256, two seconds.
    fn default() -> Self {
        let cipher = CipherSpec { algorithm: Algorithm::Aes, mode: Mode::Xts, iv: IvGenerator::Plain64 };
        Self { cipher, key_bytes: 64, hash: Hash::Sha256, iter_time: Duration::from_secs(2) }
    }
}

impl NewHeader {
    /// Bytes of key material of one slot, as far as the next slot's.
    fn material(&self) -> u64 {
        (u64::from(self.key_bytes) * u64::from(STRIPES)).next_multiple_of(MATERIAL_ALIGN)
    }

    /// Bytes of header and key material: the [`payload_offset`](Header::payload_offset) that the header will have.
    #[must_use]
    pub fn payload_offset(&self) -> u64 {
        MATERIAL_ALIGN + KEY_SLOTS as u64 * self.material()
    }
}

impl Header {
    /// Parses the fixed part of a header, the first [`HEADER_BYTES`] bytes.
    ///
    /// # Errors
    /// [`CryptError`] `Corrupt`, `Unsupported` or `Limit`.
    pub fn parse(bytes: &[u8]) -> Result<Self, CryptError> {
        let mut rest = Fields(bytes);
        if rest.take(6)? != MAGIC {
            return Err(CryptError::Corrupt("there is no LUKS header".to_owned()));
        }
        let version = u16::from_be_bytes(rest.array()?);
        if version != VERSION {
            return Err(CryptError::Unsupported(format!("LUKS version {version}")));
        }
        let (cipher, mode, hash) = (rest.text(32)?, rest.text(32)?, rest.text(32)?);
        let cipher = CipherSpec::parse(&cipher, &mode)?;
        let header = Self {
            cipher,
            hash: hash.parse()?,
            payload_offset: u64::from(rest.u32()?) * SECTOR as u64,
            key_bytes: rest.u32()?,
            digest: rest.array()?,
            digest_salt: rest.array()?,
            digest_iterations: rest.u32()?,
            uuid: rest.text(40)?,
            slots: {
                let mut slots = Vec::with_capacity(KEY_SLOTS);
                for index in 0..KEY_SLOTS {
                    slots.push(rest.slot(index)?);
                }
                slots.try_into().map_err(|_| CryptError::Corrupt("not 8 key slots".to_owned()))?
            },
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), CryptError> {
        // Makes sure that the length fits, and so bounds the memory for key material.
        SectorCipher::new(self.cipher, &Secret::zeros(self.key_bytes.min(1024) as usize))?;
        let active = || self.slots.iter().filter(|slot| slot.active);
        let iterations = active().map(|slot| slot.iterations).chain([self.digest_iterations]);
        for count in iterations {
            if count == 0 {
                return Err(CryptError::Corrupt("a key slot or the digest has 0 iterations".to_owned()));
            }
            if count > MAX_ITERATIONS {
                return Err(CryptError::Limit(format!(
                    "{count} iterations for one try at the passphrase; at most {MAX_ITERATIONS} are made"
                )));
            }
        }
        if let Some(slot) = active().find(|slot| slot.stripes != STRIPES) {
            return Err(CryptError::Unsupported(format!("a key of {} stripes", slot.stripes)));
        }
        Ok(())
    }

    /// Bytes of key material in a slot: the stripes, filled up to whole sectors.
    fn material(&self) -> Secret {
        Secret::zeros((self.key_bytes as usize * STRIPES as usize).next_multiple_of(SECTOR))
    }

    /// The disk's key. `read` reads key material: so many bytes at an offset from the header's start.
    ///
    /// # Errors
    /// [`CryptError::WrongPassphrase`] if no slot opens; what `read` fails with.
    pub fn unlock<E: From<CryptError>>(
        &self,
        passphrase: &Secret,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Secret, E> {
        for slot in &self.slots {
            if let Some(key) = self.open_slot(slot, passphrase, &mut read)? {
                return Ok(key);
            }
        }
        Err(CryptError::WrongPassphrase.into())
    }

    /// The disk's key, if `slot` is active and opens. `read` as for [`unlock`](Self::unlock).
    ///
    /// # Errors
    /// What `read` fails with.
    pub fn open_slot<E: From<CryptError>>(
        &self,
        slot: &KeySlot,
        passphrase: &Secret,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Option<Secret>, E> {
        if !slot.active {
            return Ok(None);
        }
        let mut material = self.material();
        read(slot.material_offset, material.bytes_mut())?;
        let slot_key = self.slot_key(passphrase, slot);
        SectorCipher::new(self.cipher, &slot_key)?.decrypt(material.bytes_mut(), 0);
        let whole = self.key_bytes as usize * STRIPES as usize;
        let stripes = material.bytes().get(..whole).unwrap_or_default();
        let key = merge(self.hash, stripes, self.key_bytes as usize);
        Ok(bool::from(self.digest_of(&key).ct_eq(&self.digest)).then_some(key))
    }

    /// Makes `key` open with `passphrase` through the slot of this number: the slot as it will be, and its key material,
    /// which belongs at its [`material_offset`](KeySlot::material_offset). A try takes about `iter_time`.
    ///
    /// # Errors
    /// As [`material_range`](Self::material_range); [`CryptError::NoRandom`].
    pub fn fill_slot(
        &self,
        index: usize,
        key: &Secret,
        passphrase: &Secret,
        iter_time: Duration,
    ) -> Result<(KeySlot, Vec<u8>), CryptError> {
        let mut slot = KeySlot {
            active: true,
            iterations: iterations(self.hash, self.key_bytes as usize, iter_time),
            salt: [0; SALT],
            material_offset: self.material_range(index)?.start,
            stripes: STRIPES,
        };
        random(&mut slot.salt)?;
        let mut stripes = self.material();
        let whole = self.key_bytes as usize * STRIPES as usize;
        split(self.hash, key, stripes.bytes_mut().get_mut(..whole).unwrap_or_default())?;
        let slot_key = self.slot_key(passphrase, &slot);
        SectorCipher::new(self.cipher, &slot_key)?.encrypt(stripes.bytes_mut(), 0);
        Ok((slot, stripes.bytes().to_vec()))
    }

    /// Where the key material of a slot stands, in bytes from the header's start. It may be written: nothing else is
    /// there.
    ///
    /// # Errors
    /// [`CryptError::Corrupt`] if it overlaps the header, the payload or another slot's, or there is no such slot.
    pub fn material_range(&self, index: usize) -> Result<Range<u64>, CryptError> {
        let len = self.material().bytes().len() as u64;
        let range = |slot: &KeySlot| slot.material_offset..slot.material_offset.saturating_add(len);
        let wrong = || CryptError::Corrupt(format!("the key material of slot {index} overlaps something"));
        let own = range(self.slots.get(index).ok_or_else(wrong)?);
        let overlaps = |other: &KeySlot| own.start < range(other).end && range(other).start < own.end;
        let others = self.slots.iter().enumerate().filter(|(other, _)| *other != index);
        let outside = own.start < HEADER_BYTES as u64 || own.end > self.payload_offset;
        if outside || others.into_iter().any(|(_, other)| overlaps(other)) {
            return Err(wrong());
        }
        Ok(own)
    }

    /// Where the slot of this number stands in the header, in bytes.
    #[must_use]
    pub const fn slot_offset(index: usize) -> usize {
        SLOTS_AT + index * SLOT_BYTES
    }

    fn slot_key(&self, passphrase: &Secret, slot: &KeySlot) -> Secret {
        let mut key = Secret::zeros(self.key_bytes as usize);
        self.hash.pbkdf2(passphrase.bytes(), &slot.salt, slot.iterations, key.bytes_mut());
        key
    }

    fn digest_of(&self, key: &Secret) -> [u8; DIGEST] {
        let mut digest = [0; DIGEST];
        self.hash.pbkdf2(key.bytes(), &self.digest_salt, self.digest_iterations, &mut digest);
        digest
    }

    /// A new header for a new random key that opens with `passphrase`: the key, and the bytes of header and key material
    /// with their length as [`payload_offset`](Self::payload_offset).
    ///
    /// # Errors
    /// [`CryptError::NoRandom`], or `Unsupported` for a key length that the cipher does not take.
    pub fn create(new: &NewHeader, passphrase: &Secret) -> Result<(Secret, Vec<u8>), CryptError> {
        let mut key = Secret::zeros(new.key_bytes as usize);
        SectorCipher::new(new.cipher, &key)?;
        random(key.bytes_mut())?;
        let material = new.material();
        let slot = |index: usize| KeySlot {
            active: false,
            iterations: 0,
            salt: [0; SALT],
            material_offset: MATERIAL_ALIGN + index as u64 * material,
            stripes: STRIPES,
        };
        let mut header = Self {
            cipher: new.cipher,
            hash: new.hash,
            payload_offset: new.payload_offset(),
            key_bytes: new.key_bytes,
            digest: [0; DIGEST],
            digest_salt: [0; SALT],
            // As QEMU and cryptsetup: an eighth of the time for the digest.
            digest_iterations: iterations(new.hash, DIGEST, new.iter_time / 8),
            uuid: random_uuid()?,
            slots: std::array::from_fn(slot),
        };
        random(&mut header.digest_salt)?;
        header.digest = header.digest_of(&key);
        let (slot, material) = header.fill_slot(0, &key, passphrase, new.iter_time)?;
        let material_offset = slot.material_offset as usize;
        let [first, ..] = &mut header.slots;
        *first = slot;
        let mut bytes = header.fixed_part();
        bytes.resize(material_offset, 0);
        bytes.extend_from_slice(&material);
        bytes.resize(header.payload_offset as usize, 0);
        Ok((key, bytes))
    }

    /// The fixed part as bytes.
    #[must_use]
    pub fn fixed_part(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_be_bytes());
        for text in [self.cipher.algorithm.name(), &self.cipher.mode_name(), self.hash.name()] {
            push_text(&mut out, text, 32);
        }
        out.extend_from_slice(&sectors(self.payload_offset));
        out.extend_from_slice(&self.key_bytes.to_be_bytes());
        out.extend_from_slice(&self.digest);
        out.extend_from_slice(&self.digest_salt);
        out.extend_from_slice(&self.digest_iterations.to_be_bytes());
        push_text(&mut out, &self.uuid, 40);
        self.slots.iter().for_each(|slot| out.extend(slot.encode()));
        out
    }
}

impl KeySlot {
    /// The slot as it stands in a header; its first 4 bytes tell whether it is active.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let state = if self.active { SLOT_ENABLED } else { SLOT_DISABLED };
        let fields = [
            &state.to_be_bytes()[..],
            &self.iterations.to_be_bytes(),
            &self.salt,
            &sectors(self.material_offset),
            &self.stripes.to_be_bytes(),
        ];
        fields.concat()
    }

    /// The same slot with nothing in it.
    #[must_use]
    pub const fn erased(&self) -> Self {
        Self { active: false, iterations: 0, salt: [0; SALT], ..*self }
    }
}

/// An offset as a header tells it.
fn sectors(bytes: u64) -> [u8; 4] {
    u32::try_from(bytes / SECTOR as u64).unwrap_or(u32::MAX).to_be_bytes()
}

fn push_text(out: &mut Vec<u8>, text: &str, room: usize) {
    let end = out.len() + room;
    out.extend(text.bytes().take(room));
    out.resize(end, 0);
}

/// A random UUID (RFC 9562, version 4) as text.
fn random_uuid() -> Result<String, CryptError> {
    let mut bits = [0; 16];
    random(&mut bits)?;
    let bits = u128::from_be_bytes(bits) & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    let groups: Vec<String> = [0..8, 8..12, 12..16, 16..20, 20..32]
        .into_iter()
        .filter_map(|range| hex.get(range).map(str::to_owned))
        .collect();
    Ok(groups.join("-"))
}

/// How many iterations of PBKDF2 for `len` bytes take about `time` on this machine.
fn iterations(hash: Hash, len: usize, time: Duration) -> u32 {
    const TRIAL: u32 = 20_000;
    let mut out = vec![0; len];
    let started = Instant::now();
    hash.pbkdf2(b"trial", &[0; SALT], TRIAL, &mut out);
    let each = started.elapsed().as_secs_f64() / f64::from(TRIAL);
    let count = time.as_secs_f64() / each.max(1e-12);
    // A float becomes the nearest integer that there is.
    (count as u32).clamp(MIN_ITERATIONS, MAX_ITERATIONS)
}

/// Takes fields from the front of a header.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], CryptError> {
        let (field, rest) = self
            .0
            .split_at_checked(len)
            .ok_or_else(|| CryptError::Corrupt("the LUKS header is cut off".to_owned()))?;
        self.0 = rest;
        Ok(field)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CryptError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, CryptError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// ASCII text that a zero byte ends; `?` stands for all other bytes.
    fn text(&mut self, len: usize) -> Result<String, CryptError> {
        let field = self.take(len)?;
        let text = field.split(|&byte| byte == 0).next().unwrap_or_default();
        Ok(text.iter().map(|&byte| if byte.is_ascii() { char::from(byte) } else { '?' }).collect())
    }

    fn slot(&mut self, index: usize) -> Result<KeySlot, CryptError> {
        let state = self.u32()?;
        if state != SLOT_ENABLED && state != SLOT_DISABLED {
            return Err(CryptError::Corrupt(format!("key slot {index} has the state {state:#x}")));
        }
        Ok(KeySlot {
            active: state == SLOT_ENABLED,
            iterations: self.u32()?,
            salt: self.array()?,
            material_offset: u64::from(self.u32()?) * SECTOR as u64,
            stripes: self.u32()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quick() -> NewHeader {
        NewHeader { iter_time: Duration::from_millis(1), ..NewHeader::default() }
    }

    fn reader(bytes: &[u8]) -> impl FnMut(u64, &mut [u8]) -> Result<(), CryptError> + '_ {
        |at, out| {
            out.copy_from_slice(&bytes[at as usize..at as usize + out.len()]);
            Ok(())
        }
    }

    #[test]
    fn a_new_header_opens_with_its_passphrase_only() {
        let passphrase = Secret::new(b"correct horse".to_vec());
        let (key, bytes) = Header::create(&quick(), &passphrase).unwrap();
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.fixed_part(), bytes[..HEADER_BYTES]);
        assert_eq!(header.payload_offset, bytes.len() as u64);
        assert_eq!(header.uuid.len(), 36);
        assert_eq!(header.unlock(&passphrase, reader(&bytes)).unwrap().bytes(), key.bytes());
        let wrong = header.unlock(&Secret::new(b"correct hors".to_vec()), reader(&bytes));
        assert_eq!(wrong.unwrap_err(), CryptError::WrongPassphrase);
    }

    #[test]
    fn slots_are_filled_and_erased() {
        let [one, two] = ["one", "two"].map(|text| Secret::new(text.into()));
        let (key, mut bytes) = Header::create(&quick(), &one).unwrap();
        let mut header = Header::parse(&bytes).unwrap();
        let (slot, material) = header.fill_slot(6, &key, &two, Duration::from_millis(1)).unwrap();
        let at = Header::slot_offset(6);
        bytes[at..at + SLOT_BYTES].copy_from_slice(&slot.encode());
        let range = header.material_range(6).unwrap();
        assert!(range.end - range.start == material.len() as u64);
        bytes[range.start as usize..range.end as usize].copy_from_slice(&material);
        header = Header::parse(&bytes).unwrap();
        assert_eq!(header.slots[6], slot);
        assert_eq!(header.unlock(&two, reader(&bytes)).unwrap().bytes(), key.bytes());
        assert!(header.open_slot(&header.slots[0], &two, reader(&bytes)).unwrap().is_none());
        let erased = header.slots[0].erased();
        bytes[208..208 + SLOT_BYTES].copy_from_slice(&erased.encode());
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.unlock(&one, reader(&bytes)).unwrap_err(), CryptError::WrongPassphrase);
        assert_eq!(header.unlock(&two, reader(&bytes)).unwrap().bytes(), key.bytes());
    }

    #[test]
    fn material_that_overlaps_something_is_not_written() {
        let (key, bytes) = Header::create(&quick(), &Secret::new(b"x".to_vec())).unwrap();
        for (slot, at) in [(3, 0), (3, 8), (3, u32::MAX), (5, 4096 / 512)] {
            let mut bytes = bytes.clone();
            let place = Header::slot_offset(slot) + 40;
            bytes[place..place + 4].copy_from_slice(&u32::to_be_bytes(at));
            let header = Header::parse(&bytes).unwrap();
            let refused = header.fill_slot(slot, &key, &key, Duration::ZERO).unwrap_err();
            assert!(matches!(refused, CryptError::Corrupt(_)), "{slot} {at}");
        }
    }

    #[test]
    fn headers_that_ask_for_too_much_are_refused() {
        let (_, bytes) = Header::create(&quick(), &Secret::new(b"x".to_vec())).unwrap();
        let patched = |at: usize, value: u32| {
            let mut bytes = bytes.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            Header::parse(&bytes).unwrap_err()
        };
        // Key bytes, digest iterations; state, iterations and stripes of the first slot.
        assert!(matches!(patched(108, u32::MAX), CryptError::Unsupported(_)));
        assert!(matches!(patched(164, u32::MAX), CryptError::Limit(_)));
        assert!(matches!(patched(164, 0), CryptError::Corrupt(_)));
        assert!(matches!(patched(208, 1), CryptError::Corrupt(_)));
        assert!(matches!(patched(212, MAX_ITERATIONS + 1), CryptError::Limit(_)));
        assert!(matches!(patched(252, u32::MAX), CryptError::Unsupported(_)));
        for len in 0..HEADER_BYTES {
            assert!(matches!(Header::parse(&bytes[..len]), Err(CryptError::Corrupt(_))));
        }
    }
}
