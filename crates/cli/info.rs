//! `diskmill info`: what an image is, with qemu-img's keys, order and texts.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use diskmill::crypt::{Header as LuksHeader, IvGenerator, KeySlot, Mode};
use diskmill::qcow2::{
    Bitmap, CompressionType, CryptMethod, Qcow2Info, feature, read_bitmaps, read_luks_header,
};
use diskmill::vmdk::VmdkInfo;
use diskmill::{FormatInfo, Image, ImageInfo, Limits, OpenOptions};
use serde_json::{Map, Value, json};

use crate::args::{InfoArgs, OutputForm};
use crate::exit::{Exit, Failure};
use crate::json::qemu_style;
use crate::names::{chain_names, resolved, shown};
use crate::say;
use crate::size::human_size;
use crate::snapshots;
use crate::verify::verify;

pub(crate) fn run(args: &InfoArgs) -> Result<Exit, Failure> {
    if args.verify {
        verify(&args.file)?;
    }
    let options = OpenOptions { metadata_only: !args.backing_chain, ..args.open.options(args.format) };
    let image = Image::open(&args.file, &options)?;
    let text = describe(&image, &args.file, args.backing_chain, args.output.form())?;
    io::stdout().write_all(text.as_bytes())?;
    for warning in image.warnings() {
        say::warning(warning);
    }
    Ok(Exit::Done)
}

/// What `image`, which the user calls `name`, is; with `chain` also its backing files.
pub(crate) fn describe(image: &Image, name: &Path, chain: bool, form: OutputForm) -> Result<String, Failure> {
    let layers: Vec<Layer<'_>> = chain_names(image, name)
        .into_iter()
        .zip(image.chain())
        .map(|(name, (path, info))| Layer::new(name, path, info, image))
        .collect::<Result<_, _>>()?;
    Ok(match form {
        OutputForm::Human => layers.iter().map(Layer::human).collect::<Vec<_>>().join("\n"),
        OutputForm::Json => {
            let mut values = layers.iter().map(Layer::json);
            let value = if chain { values.collect() } else { values.next().unwrap_or_default() };
            qemu_style(&value) + "\n"
        }
    })
}

/// One image of the chain.
struct Layer<'i> {
    /// As the user, or the image above, names it.
    name: String,
    path: &'i Path,
    info: &'i ImageInfo,
    /// Its persistent bitmaps.
    bitmaps: Vec<Bitmap>,
    /// Its LUKS header.
    luks: Option<LuksHeader>,
    /// Length of the image's file in bytes, in whole sectors as QEMU counts.
    file_len: u64,
    /// Bytes that the file takes on its disk.
    disk_size: u64,
    /// QEMU's driver for the file.
    protocol: &'static str,
}

impl<'i> Layer<'i> {
    fn new(name: String, path: &'i Path, info: &'i ImageInfo, image: &Image) -> Result<Self, Failure> {
        let failed = |error: io::Error| Failure::failed(format!("{path:?}: cannot tell the size: {error}"));
        let meta = std::fs::metadata(path).map_err(failed)?;
        let file = image.files().iter().find(|file| file.path == path);
        let len = file.map_or(Ok(meta.len()), |file| file.storage.len()).map_err(failed)?;
        let protocol = if meta.file_type().is_block_device() { "host_device" } else { "file" };
        let file_len = len.checked_next_multiple_of(512).unwrap_or(len);
        let (bitmaps, luks) = match (&info.specific, file) {
            (FormatInfo::Qcow2(qcow2), Some(file)) => (
                read_bitmaps(qcow2, &*file.storage, &Limits::default())?,
                read_luks_header(qcow2, &*file.storage)?,
            ),
            _ => (Vec::new(), None),
        };
        Ok(Self {
            name,
            path,
            info,
            bitmaps,
            luks,
            file_len,
            disk_size: meta.blocks().saturating_mul(512),
            protocol,
        })
    }

    fn qcow2(&self) -> Option<&Qcow2Info> {
        match &self.info.specific {
            FormatInfo::Qcow2(qcow2) => Some(qcow2),
            _ => None,
        }
    }

    /// Facts that only the format has.
    fn specific(&self) -> Option<Value> {
        match &self.info.specific {
            FormatInfo::Qcow2(qcow2) => Some(qcow2_specific(qcow2, &self.bitmaps, self.luks.as_ref())),
            FormatInfo::Vmdk(vmdk) => Some(vmdk_specific(vmdk, &self.name, self.path)),
            _ => None,
        }
    }

    fn is_dirty(&self) -> bool {
        self.qcow2().is_some_and(|qcow2| qcow2.dirty)
    }

    /// The key order is that of QEMU's hash table.
    fn json(&self) -> Value {
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
        let file = json!({
            "children": [],
            "virtual-size": self.file_len,
            "filename": self.name,
            "format": self.protocol,
            "actual-size": self.disk_size,
            "format-specific": { "type": self.protocol, "data": {} },
            "dirty-flag": false,
        });
        put("children", json!([{ "name": "file", "info": file }]));
        if let Some(format) = &self.info.backing_format {
            put("backing-filename-format", json!(format));
        }
        if let Some(qcow2) = self.qcow2().filter(|qcow2| !qcow2.snapshots.is_empty()) {
            put("snapshots", qcow2.snapshots.iter().map(snapshots::json).collect());
        }
        put("virtual-size", json!(self.info.virtual_size));
        put("filename", json!(self.name));
        if let Some(size) = self.info.cluster_size {
            put("cluster-size", json!(size));
        }
        put("format", json!(self.info.format.name()));
        put("actual-size", json!(self.disk_size));
        if let Some(data) = self.specific() {
            put("format-specific", json!({ "type": self.info.format.name(), "data": data }));
        }
        if let Some(name) = &self.info.backing_name {
            put("full-backing-filename", json!(resolved(&self.name, name)));
        }
        if self.info.is_encrypted() {
            put("encrypted", json!(true));
        }
        if let Some(name) = &self.info.backing_name {
            put("backing-filename", json!(name));
        }
        put("dirty-flag", json!(self.is_dirty()));
        Value::Object(out)
    }

    fn human(&self) -> String {
        let info = self.info;
        let mut out = String::new();
        let mut line = |key: &str, value: &str| out.extend([key, ": ", &shown(value), "\n"]);
        line("image", &self.name);
        line("file format", info.format.name());
        line("virtual size", &exact_size(info.virtual_size));
        line("disk size", &human_size(self.disk_size));
        if self.info.is_encrypted() {
            line("encrypted", "yes");
        }
        if let Some(size) = info.cluster_size {
            line("cluster_size", &size.to_string());
        }
        if self.is_dirty() {
            line("cleanly shut down", "no");
        }
        if let Some(name) = &info.backing_name {
            let full = resolved(&self.name, name);
            let actual = if full == *name { String::new() } else { format!(" (actual path: {full})") };
            line("backing file", &format!("{name}{actual}"));
            if let Some(format) = &info.backing_format {
                line("backing file format", format);
            }
        }
        if let Some(qcow2) = self.qcow2().filter(|qcow2| !qcow2.snapshots.is_empty()) {
            out += &snapshots::table(&qcow2.snapshots);
        }
        if let Some(data) = self.specific() {
            out += "Format specific information:\n";
            put_tree(&mut out, &data, 4);
        }
        let Self { name, protocol, .. } = self;
        out += &format!(
            "Child node '/file':\n    filename: {}\n    protocol type: {protocol}\n    file length: {}\n    disk size: {}\n",
            shown(name),
            exact_size(self.file_len),
            human_size(self.disk_size)
        );
        out
    }
}

fn exact_size(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", human_size(bytes))
}

fn bitmap(bitmap: &Bitmap) -> Value {
    let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
    let flags: Vec<_> = flags.into_iter().filter_map(|(set, name)| set.then_some(name)).collect();
    json!({ "flags": flags, "name": String::from_utf8_lossy(&bitmap.name), "granularity": bitmap.granularity() })
}

/// The key order is that of QEMU's hash table.
fn luks_facts(luks: &LuksHeader) -> Value {
    let mut out = Map::new();
    let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
    let cipher = luks.cipher;
    let (iv, iv_hash) = match cipher.iv {
        IvGenerator::Plain => ("plain", None),
        IvGenerator::Plain64 => ("plain64", None),
        IvGenerator::Essiv(hash) => ("essiv", Some(hash.name())),
    };
    let (mode, cipher_key) = match cipher.mode {
        Mode::Xts => ("xts", luks.key_bytes / 2),
        Mode::Cbc => ("cbc", luks.key_bytes),
    };
    put("ivgen-alg", json!(iv));
    put("detached-header", json!(false));
    put("hash-alg", json!(luks.hash.name()));
    put("cipher-alg", json!(format!("{}-{}", cipher.algorithm.name(), cipher_key * 8)));
    put("uuid", json!(luks.uuid));
    if let Some(hash) = iv_hash {
        put("ivgen-hash-alg", json!(hash));
    }
    put("format", json!("luks"));
    put("cipher-mode", json!(mode));
    let slot = |slot: &KeySlot| match slot.active {
        true => {
            json!({ "active": true, "iters": slot.iterations, "key-offset": slot.material_offset, "stripes": slot.stripes })
        }
        false => json!({ "active": false, "key-offset": slot.material_offset }),
    };
    put("slots", luks.slots.iter().map(slot).collect());
    put("payload-offset", json!(luks.payload_offset));
    put("master-key-iters", json!(luks.digest_iterations));
    Value::Object(out)
}

fn qcow2_specific(qcow2: &Qcow2Info, bitmaps: &[Bitmap], luks: Option<&LuksHeader>) -> Value {
    let mut out = Map::new();
    let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
    let header = &qcow2.area.header;
    let v3 = header.version >= 3;
    let compression = match header.compression {
        CompressionType::Zlib => "zlib",
        CompressionType::Zstd => "zstd",
    };
    put("compat", json!(if v3 { "1.1" } else { "0.10" }));
    put("compression-type", json!(compression));
    if v3 {
        put("lazy-refcounts", json!(header.compatible & feature::LAZY_REFCOUNTS != 0));
        if !bitmaps.is_empty() {
            put("bitmaps", bitmaps.iter().map(bitmap).collect());
        }
    }
    put("refcount-bits", json!(header.refcount_width.bits()));
    if let Some(name) = &qcow2.data_file {
        put("data-file", json!(name));
    }
    match (header.crypt, luks) {
        (CryptMethod::Luks, Some(luks)) => put("encrypt", luks_facts(luks)),
        (CryptMethod::Luks, None) => put("encrypt", json!({ "format": "luks" })),
        (CryptMethod::Aes, _) => put("encrypt", json!({ "format": "aes" })),
        (CryptMethod::None, _) => None,
    };
    if qcow2.data_file.is_some() {
        put("data-file-raw", json!(header.autoclear & feature::RAW_DATA_FILE != 0));
    }
    if v3 {
        put("corrupt", json!(qcow2.corrupt));
        put("extended-l2", json!(header.geometry.extended_l2()));
    }
    Value::Object(out)
}

/// `image` is the name of the VMDK, and `path` its file.
fn vmdk_specific(vmdk: &VmdkInfo, image: &str, path: &Path) -> Value {
    let descriptor = vmdk.descriptor.as_ref();
    let create_type = descriptor.and_then(|descriptor| descriptor.create_type.as_ref());
    let lines = descriptor.map(|descriptor| descriptor.extents.as_slice()).unwrap_or_default();
    let extents = vmdk.extents.iter().enumerate().map(|(index, extent)| {
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
        if extent.compressed {
            put("compressed", json!(true));
        }
        put("virtual-size", json!(extent.size));
        // An extent in the image's own file goes by the image's name, whatever the descriptor calls it.
        let embedded = extent.path.as_deref() == Some(path);
        let named = lines.get(index).and_then(|line| line.file.as_deref()).map(String::from_utf8_lossy);
        let named = named.filter(|_| !embedded);
        put("filename", json!(named.map_or_else(|| image.to_owned(), |name| resolved(image, &name))));
        if let Some(size) = extent.grain_size {
            put("cluster-size", json!(size));
        }
        put("format", json!(if embedded { "" } else { &extent.kind }));
        Value::Object(out)
    });
    json!({
        "cid": descriptor.and_then(|descriptor| descriptor.cid),
        "parent-cid": descriptor.and_then(|descriptor| descriptor.parent_cid),
        "create-type": create_type.map(|kind| String::from_utf8_lossy(kind.as_bytes())),
        "extents": extents.collect::<Vec<_>>(),
    })
}

/// Prints nested facts as qemu-img does: `-` in keys becomes a space.
fn put_tree(out: &mut String, value: &Value, indent: usize) {
    let rows: Vec<(String, &Value)> = match value {
        Value::Array(items) => {
            items.iter().enumerate().map(|(index, item)| (format!("[{index}]"), item)).collect()
        }
        Value::Object(items) => items.iter().map(|(key, item)| (key.replace('-', " "), item)).collect(),
        _ => Vec::new(),
    };
    for (key, item) in rows {
        let _ = write!(out, "{:indent$}{key}:", "");
        match item {
            Value::Array(_) | Value::Object(_) => {
                out.push('\n');
                put_tree(out, item, indent + 4);
            }
            Value::String(text) => out.extend([" ", &shown(text), "\n"]),
            other => out.extend([" ", &other.to_string(), "\n"]),
        }
    }
}
