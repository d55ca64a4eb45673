//! qcow2: opening and mapping existing images, and assembling fresh ones.

mod ahead;
mod assembler;
mod bits;
mod encryption;
mod layout;
mod options;
mod preallocated;
mod refcounts;

pub(crate) use assembler::Qcow2Assembler;
pub(crate) use bits::{BitSource, Bits, StoredBits, read_table};
pub(crate) use encryption::Encryption;
pub use encryption::{EncryptionFormat, EncryptionOptions};
pub(crate) use layout::{FileLen, Files, Qcow2Layout};
pub(crate) use options::parse_bool;
pub use options::{Compat, Preallocation, Qcow2Options};
pub use preallocated::is_metadata_preallocated;

use diskmill_codec::Codec;
pub use diskmill_format::qcow2::{Bitmap, CompressionType, CryptMethod, HeaderArea, Snapshot, feature};
use diskmill_format::qcow2::{Header, parse_bitmaps, parse_snapshots};
use diskmill_format::{HostOffset, Limits};
use diskmill_io::Storage;

use crate::error::{Error, Kind, Result};
use crate::reader::{read_exact, read_full};

/// The codec of clusters that are packed as a header says.
pub(crate) const fn codec_of(compression: CompressionType) -> Codec {
    match compression {
        CompressionType::Zlib => Codec::Deflate,
        CompressionType::Zstd => Codec::Zstd,
    }
}

/// Facts that only qcow2 images have.
#[derive(Debug, Clone)]
pub struct Qcow2Info {
    /// Header, extensions and names as they stand in the first cluster.
    pub area: HeaderArea,
    /// Internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Name of the external data file, as the image gives it.
    pub data_file: Option<String>,
    /// The image is marked corrupt: QEMU refuses to write to it.
    pub corrupt: bool,
    /// The image was not closed properly: refcounts may be wrong, guest data is not affected.
    pub dirty: bool,
}

impl Qcow2Info {
    /// Reads what stands outside the tables: first cluster and snapshot table.
    pub(crate) fn read(file: &dyn Storage, limits: &Limits) -> Result<Self> {
        let mut start = vec![0; 512];
        let got = read_full(file, &mut start, 0)?;
        start.truncate(got);
        let header = Header::parse(&start, limits)?;
        let mut cluster = vec![0; header.geometry.cluster_size() as usize];
        let got = read_full(file, &mut cluster, 0)?;
        cluster.truncate(got);
        let area = HeaderArea::parse(&cluster, limits)?;
        let snapshots = read_snapshots(file, &header, limits)?;
        let data_file =
            header.has(feature::DATA_FILE).then(|| area.extensions.data_file.as_deref().map(lossy)).flatten();
        Ok(Self {
            corrupt: header.has(feature::CORRUPT),
            dirty: header.has(feature::DIRTY),
            snapshots,
            data_file,
            area,
        })
    }
}

/// The persistent bitmaps of the image in `file`; none if the image says that they are out of date.
///
/// # Errors
/// [`Kind::Corrupt`] or [`Kind::Limit`] for a bad directory;
/// [`Kind::Io`].
pub fn read_bitmaps(info: &Qcow2Info, file: &dyn Storage, limits: &Limits) -> Result<Vec<Bitmap>> {
    read_directory(&info.area, file, limits)
}

/// As [`read_bitmaps`].
pub(crate) fn read_directory(area: &HeaderArea, file: &dyn Storage, limits: &Limits) -> Result<Vec<Bitmap>> {
    let Some((count, at, len)) = area.bitmap_directory() else { return Ok(Vec::new()) };
    if len > limits.qcow2_bitmap_directory_bytes {
        let message = format!("{len} bytes long; at most {} are read", limits.qcow2_bitmap_directory_bytes);
        return Err(Error::new(Kind::Limit, message).within("bitmap directory", at));
    }
    let mut bytes = vec![0; len as usize];
    let got = read_full(file, &mut bytes, at)?;
    bytes.truncate(got);
    Ok(parse_bitmaps(&bytes, count, HostOffset(at), limits)?)
}

/// The LUKS header of the image in `file`; none if it is not encrypted with LUKS.
///
/// # Errors
/// [`Kind::Corrupt`], [`Kind::Unsupported`] or [`Kind::Limit`] for a bad header; [`Kind::Io`].
pub fn read_luks_header(info: &Qcow2Info, file: &dyn Storage) -> Result<Option<diskmill_crypt::Header>> {
    let (CryptMethod::Luks, Some((at, _))) = (info.area.header.crypt, info.area.extensions.luks_header)
    else {
        return Ok(None);
    };
    let mut fixed = [0; diskmill_crypt::HEADER_BYTES];
    let header = read_exact(file, &mut fixed, at)
        .and_then(|()| Ok(diskmill_crypt::Header::parse(&fixed)?))
        .map_err(|error| error.within("LUKS header", at))?;
    Ok(Some(header))
}

pub(crate) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn read_snapshots(file: &dyn Storage, header: &Header, limits: &Limits) -> Result<Vec<Snapshot>> {
    let at = header.snapshots_offset.get();
    let mut window: u64 = 64 << 10;
    loop {
        if header.snapshots == 0 {
            return Ok(Vec::new());
        }
        // The table's length stands nowhere: read more until it parses.
        let mut bytes = vec![0; window as usize];
        let got = read_full(file, &mut bytes, at)?;
        let whole_file = (got as u64) < window;
        bytes.truncate(got);
        match parse_snapshots(&bytes, header.snapshots, HostOffset(at), limits) {
            Ok((snapshots, _)) => return Ok(snapshots),
            Err(error) if whole_file || window >= limits.qcow2_snapshot_table_bytes => {
                return Err(error.into());
            }
            Err(_) => window = window.saturating_mul(4).min(limits.qcow2_snapshot_table_bytes),
        }
    }
}
