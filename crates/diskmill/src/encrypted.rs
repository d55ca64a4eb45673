//! Encrypted guest data: storages that decrypt and encrypt on the way, so that neither formats nor the mover know
//! of it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError, RwLock};

use diskmill_crypt::{
    Algorithm, CipherSpec, CryptError, HEADER_BYTES, Header, IvGenerator, Mode, SECTOR, Secret, SectorCipher,
};
use diskmill_format::GuestOffset;
use diskmill_io::{Align, Allocation, SharedStorage, Storage};

use crate::error::{Error, Kind, Result};
use crate::layout::{FileId, ImageInfo, LayerExtent, LayerSource, Layout, MapError, Source};
use crate::qcow2::Qcow2Layout;
use crate::reader::{read_exact, read_full};

/// Bytes that are encrypted at once on writing.
const STEP: usize = 64 << 10;

impl From<CryptError> for Error {
    fn from(error: CryptError) -> Self {
        let kind = match error {
            CryptError::Corrupt(_) => Kind::Corrupt,
            CryptError::Unsupported(_) => Kind::Unsupported,
            CryptError::Limit(_) => Kind::Limit,
            CryptError::NoRandom => Kind::Io,
            _ => Kind::Denied,
        };
        Self::new(kind, error.to_string())
    }
}

/// The part of a file that holds a LUKS header with its key material.
#[derive(Clone, Copy)]
pub(crate) struct LuksArea<'a> {
    pub(crate) file: &'a dyn Storage,
    /// First byte.
    pub(crate) at: u64,
    /// Bytes.
    pub(crate) len: u64,
}

impl LuksArea<'_> {
    /// Unlocks the header with the first of `keys` that fits.
    ///
    /// # Errors
    /// [`Kind::Denied`] if none does; `Corrupt`, `Unsupported` or `Limit` for the header; `Io`.
    pub(crate) fn cipher(self, keys: &[Secret]) -> Result<SectorCipher> {
        let header = self.header()?;
        Ok(SectorCipher::new(header.cipher, &self.unlock(&header, keys)?)?)
    }

    pub(crate) fn header(self) -> Result<Header> {
        let mut fixed = [0; HEADER_BYTES];
        let header = read_exact(self.file, &mut fixed, self.at).and_then(|()| Ok(Header::parse(&fixed)?));
        header.map_err(|error: Error| error.within("LUKS header", self.at))
    }

    /// The disk's key.
    pub(crate) fn unlock(self, header: &Header, keys: &[Secret]) -> Result<Secret> {
        let unlocked = || {
            for key in keys {
                match header.unlock(key, |offset, out: &mut [u8]| self.read(offset, out)) {
                    Err(error) if error.kind() == Kind::Denied => {}
                    done => return done,
                }
            }
            Err(wrong_key(keys))
        };
        unlocked().map_err(|error: Error| error.within("LUKS header", self.at))
    }

    /// Reads key material at an offset from the header's start.
    pub(crate) fn read(self, offset: u64, out: &mut [u8]) -> Result<()> {
        read_exact(self.file, out, self.place(offset, out.len() as u64)?)
    }

    /// Where `len` bytes at an offset from the header's start stand in the file. They lie inside the header's room: key
    /// material must not be made of anything else in the file.
    pub(crate) fn place(self, offset: u64, len: u64) -> Result<u64> {
        match (self.at.checked_add(offset), offset.checked_add(len)) {
            (Some(position), Some(end)) if end <= self.len => Ok(position),
            _ => Err(Error::new(Kind::Corrupt, "a key slot lies outside the header's room")),
        }
    }
}

fn wrong_key(keys: &[Secret]) -> Error {
    match keys {
        [] => Error::new(Kind::Denied, "the image is encrypted and needs its passphrase")
            .hint("--key-file FILE reads it from a file"),
        _ => Error::from(CryptError::WrongPassphrase),
    }
}

/// The cipher of qcow2's legacy AES encryption: AES-128-CBC, the first 16 bytes of the passphrase, filled up with zeros,
/// for the key (the specification's "AES encryption"; the passphrase cannot be checked).
pub(crate) fn legacy_aes(keys: &[Secret]) -> Result<SectorCipher> {
    let [key, ..] = keys else { return Err(wrong_key(keys)) };
    let padded: Vec<u8> = key.bytes().iter().copied().chain(std::iter::repeat(0)).take(16).collect();
    let spec = CipherSpec { algorithm: Algorithm::Aes, mode: Mode::Cbc, iv: IvGenerator::Plain64 };
    Ok(SectorCipher::new(spec, &Secret::new(padded))?)
}

/// A file whose sectors are encrypted by their offset in it, as those of LUKS are.
#[derive(Debug)]
pub(crate) struct EncryptedStorage {
    file: SharedStorage,
    cipher: Arc<SectorCipher>,
}

impl EncryptedStorage {
    pub(crate) fn new(file: SharedStorage, cipher: Arc<SectorCipher>) -> Self {
        Self { file, cipher }
    }

    fn write_sectors(&self, sectors: &[u8], at: u64) -> io::Result<usize> {
        let mut encrypted = sectors.to_vec();
        self.cipher.encrypt(&mut encrypted, at / SECTOR as u64);
        self.file.write_all_at(&encrypted, at)?;
        Ok(encrypted.len())
    }
}

/// Reads the sectors that hold `buf.len()` bytes at `at` and decrypts them: `read` fills as much as there is.
fn read_sectors(
    buf: &mut [u8],
    at: u64,
    cipher: &SectorCipher,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let sector = SECTOR as u64;
    let skip = (at % sector) as usize;
    if skip == 0 && buf.len() >= SECTOR {
        let whole = buf.len() - buf.len() % SECTOR;
        let part = buf.get_mut(..whole).unwrap_or_default();
        let got = read(part, at)?;
        let decrypted = part.get_mut(..got).unwrap_or_default();
        cipher.decrypt(decrypted, at / sector);
        // A sector that is cut off cannot be decrypted.
        return Ok(if got < SECTOR { 0 } else { got - got % SECTOR });
    }
    let mut one = [0; SECTOR];
    let got = read(&mut one, at - skip as u64)?;
    if got < SECTOR {
        return Ok(0);
    }
    cipher.decrypt(&mut one, at / sector);
    let len = buf.len().min(SECTOR - skip);
    let found = one.get(skip..skip + len).unwrap_or_default();
    buf.get_mut(..len).unwrap_or_default().copy_from_slice(found);
    Ok(len)
}

fn fill(file: &dyn Storage, buf: &mut [u8], at: u64) -> io::Result<usize> {
    read_full(file, buf, at).map_err(|error| io::Error::other(error.to_string()))
}

impl Storage for EncryptedStorage {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        read_sectors(buf, at, &self.cipher, |part, at| fill(&*self.file, part, at))
    }

    /// Of a sector that is not written whole the rest is read and written again: the caller keeps others from it.
    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<usize> {
        let sector = SECTOR as u64;
        let skip = (at % sector) as usize;
        if skip != 0 || buf.len() < SECTOR {
            let part = buf.get(..SECTOR - skip).unwrap_or(buf);
            let mut whole = [0; SECTOR];
            let start = at - skip as u64;
            read_sectors(&mut whole, start, &self.cipher, |part, at| fill(&*self.file, part, at))?;
            let place = whole.get_mut(skip..skip + part.len()).unwrap_or_default();
            place.copy_from_slice(part);
            return self.write_sectors(&whole, start).map(|_| part.len());
        }
        let whole = buf.len().min(STEP) / SECTOR * SECTOR;
        self.write_sectors(buf.get(..whole).unwrap_or(buf), at)
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    /// All is data: the bytes of a hole do not decrypt to zeros.
    fn allocation(&self, at: u64) -> io::Result<Option<(Allocation, u64)>> {
        let len = self.file.len()?;
        Ok((at < len).then_some((Allocation::Data, len)))
    }

    fn write_zeroes(&self, at: u64, len: u64, _keep_allocated: bool) -> io::Result<()> {
        let zeros = vec![0; STEP.min(usize::try_from(len).unwrap_or(STEP))];
        let mut done = 0;
        while done < len {
            let part = usize::try_from(len - done).unwrap_or(STEP).min(STEP);
            done += self.write_at(zeros.get(..part).unwrap_or_default(), at + done)? as u64;
        }
        Ok(())
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.file.allocate(at, len)
    }

    fn gains_from_allocate(&self) -> bool {
        self.file.gains_from_allocate()
    }

    fn will_need(&self, at: u64, len: u64) {
        self.file.will_need(at, len);
    }

    fn clone_range(&self, _at: u64, _src: &dyn Storage, _src_at: u64, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn copy_range(&self, _at: u64, _src: &dyn Storage, _src_at: u64, _len: u64) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// None: what stands in the file is not what is read here.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn align(&self) -> Align {
        self.file.align()
    }
}

/// An encrypted image that was opened without its passphrase.
pub(crate) struct LockedLayout(Qcow2Layout);

impl LockedLayout {
    pub(crate) fn new(encrypted: Qcow2Layout) -> Self {
        Self(encrypted)
    }
}

impl Layout for LockedLayout {
    fn info(&self) -> &ImageInfo {
        self.0.info()
    }

    fn map(&self, _at: GuestOffset, max: u64) -> Result<LayerExtent, MapError> {
        Err(MapError { error: wrong_key(&[]), len: max })
    }
}

/// A qcow2 image with legacy AES encryption. Its sectors are encrypted by their guest offset, so its plain clusters are
/// read through a [`LegacyAesStorage`], in which each byte stands at its guest offset.
pub(crate) struct LegacyAesLayout {
    encrypted: Arc<Qcow2Layout>,
    decrypted: FileId,
}

/// The plain clusters of an image with legacy AES encryption, by guest offset. Read-only: guest writes need the tables.
pub(crate) struct LegacyAesStorage {
    /// The image as it is now.
    encrypted: RwLock<Option<Arc<Qcow2Layout>>>,
    file: SharedStorage,
    cipher: Arc<SectorCipher>,
}

/// How the clusters of an image with legacy AES encryption are read.
#[derive(Clone)]
pub(crate) struct LegacyAes {
    storage: Arc<LegacyAesStorage>,
    id: FileId,
}

impl LegacyAes {
    /// For an image whose clusters stand in `file`; `register` gives the storage that decrypts them a file id.
    pub(crate) fn new(
        file: SharedStorage,
        cipher: SectorCipher,
        register: impl FnOnce(SharedStorage) -> FileId,
    ) -> Self {
        let storage =
            Arc::new(LegacyAesStorage { encrypted: RwLock::default(), file, cipher: Arc::new(cipher) });
        Self { id: register(Arc::clone(&storage) as SharedStorage), storage }
    }

    pub(crate) fn cipher(&self) -> &Arc<SectorCipher> {
        &self.storage.cipher
    }

    /// The image `encrypted` as it reads. An earlier one is given up.
    pub(crate) fn decrypt(&self, encrypted: Qcow2Layout) -> LegacyAesLayout {
        let encrypted = Arc::new(encrypted);
        let mut held = self.storage.encrypted.write().unwrap_or_else(PoisonError::into_inner);
        *held = Some(Arc::clone(&encrypted));
        LegacyAesLayout { encrypted, decrypted: self.id }
    }
}

impl LegacyAesStorage {
    fn layout(&self) -> io::Result<Arc<Qcow2Layout>> {
        let held = self.encrypted.read().unwrap_or_else(PoisonError::into_inner);
        held.clone().ok_or_else(|| io::Error::other("the image is not open"))
    }
}

impl Layout for LegacyAesLayout {
    fn info(&self) -> &ImageInfo {
        self.encrypted.info()
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<LayerExtent, MapError> {
        let run = self.encrypted.map(at, max)?;
        let source = match run.source {
            LayerSource::Data(Source::Raw { .. }) => LayerSource::Data(Source::Raw {
                file: self.decrypted,
                at: diskmill_format::HostOffset(at.get()),
            }),
            other => other,
        };
        Ok(LayerExtent { source, ..run })
    }
}

impl std::fmt::Debug for LegacyAesStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LegacyAesStorage({:?})", self.file)
    }
}

fn read_only<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "legacy AES encryption needs guest writes"))
}

impl Storage for LegacyAesStorage {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let encrypted = self.layout()?;
        read_sectors(buf, at, &self.cipher, |part, at| {
            let run = encrypted
                .map(GuestOffset(at), part.len() as u64)
                .map_err(|MapError { error, .. }| io::Error::other(error.to_string()))?;
            let LayerSource::Data(Source::Raw { at: host, .. }) = run.source else { return Ok(0) };
            let len = usize::try_from(run.len).unwrap_or(part.len()).min(part.len());
            fill(&*self.file, part.get_mut(..len).unwrap_or_default(), host.get())
        })
    }

    fn write_at(&self, _buf: &[u8], _at: u64) -> io::Result<usize> {
        read_only()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.layout()?.info().virtual_size)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        read_only()
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocation(&self, at: u64) -> io::Result<Option<(Allocation, u64)>> {
        let len = self.len()?;
        Ok((at < len).then_some((Allocation::Data, len)))
    }

    fn write_zeroes(&self, _at: u64, _len: u64, _keep_allocated: bool) -> io::Result<()> {
        read_only()
    }

    fn allocate(&self, _at: u64, _len: u64) -> io::Result<()> {
        read_only()
    }

    fn clone_range(&self, _at: u64, _src: &dyn Storage, _src_at: u64, _len: u64) -> io::Result<()> {
        read_only()
    }

    fn copy_range(&self, _at: u64, _src: &dyn Storage, _src_at: u64, _len: u64) -> io::Result<u64> {
        read_only()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn align(&self) -> Align {
        self.file.align()
    }
}
