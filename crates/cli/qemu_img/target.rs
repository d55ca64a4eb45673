//! From the options of a fresh image to the library's, with QEMU's words for what does not go together.

use diskmill::convert::TargetFormat;
use diskmill::edit::Preallocation;
use diskmill::qcow2::{EncryptionOptions, Qcow2Options};

use super::drivers::Driver;
use super::object::Secrets;
use super::opts::Dict;

/// The library's options for a fresh image of this format. `dict` has been checked by its driver.
pub(super) fn target_format(driver: Driver, dict: &Dict, secrets: &Secrets) -> Result<TargetFormat, String> {
    match driver.name {
        "qcow2" => check_qcow2(dict)?,
        "vmdk" => check_vmdk(dict)?,
        _ => {}
    }
    let mut format = TargetFormat::named(driver.name).map_err(|error| error.to_string())?;
    for (name, value) in dict.iter() {
        match name {
            // They change how the file system keeps the file, and nothing in it.
            "size" | "extent_size_hint" | "nocow" => continue,
            _ => {}
        }
        if driver.name == "vmdk" && matches!(name, "subformat" | "adapter_type") {
            format.set(name, value).map_err(|_| format!("invalid parameter value: {value}"))?;
            continue;
        }
        if driver.name == "raw" && name == "preallocation" {
            check_raw_preallocation(value)?;
        }
        format.set(name, value).map_err(|error| error.to_string())?;
    }
    if let TargetFormat::Qcow2(qcow2) = &mut format
        && let Some(encryption) = &mut qcow2.encryption
    {
        let id = encryption.key_secret.as_ref();
        let id = id.ok_or("Parameter 'encrypt.key-secret' is required for cipher")?;
        encryption.key = Some(secrets.get(id)?);
    }
    // QEMU's VMDKs have an IDE adapter unless the user says otherwise.
    if let (TargetFormat::Vmdk(vmdk), None) = (&mut format, dict.get("adapter_type")) {
        vmdk.adapter = diskmill::vmdk::AdapterType::Ide;
    }
    Ok(format)
}

/// The options of a LUKS container: those of an encrypted qcow2 image without their prefix.
pub(super) fn luks_options(
    dict: &Dict,
    secrets: &Secrets,
) -> Result<(EncryptionOptions, Preallocation), String> {
    let mut options = Qcow2Options::default();
    options.set("encrypt.format", "luks").map_err(|error| error.to_string())?;
    let mut preallocation = Preallocation::Off;
    for (name, value) in dict.iter() {
        match name {
            "size" | "extent_size_hint" | "nocow" => {}
            "detached-header" if value == "off" => {}
            "detached-header" => return Err(format!("the option '{name}' is not supported")),
            "preallocation" => {
                preallocation = match value {
                    "off" | "metadata" => Preallocation::Off,
                    "falloc" => Preallocation::Falloc,
                    "full" => Preallocation::Full,
                    _ => return Err(format!("invalid parameter value: {value}")),
                }
            }
            name => options
                .set(&format!("encrypt.{name}"), value)
                .map_err(|_| format!("Parameter '{name}' does not accept value '{value}'"))?,
        }
    }
    let mut encryption = options.encryption.unwrap_or_default();
    let id = encryption.key_secret.as_ref().ok_or("Parameter 'key-secret' is required for cipher")?;
    encryption.key = Some(secrets.get(id)?);
    Ok((encryption, preallocation))
}

fn check_qcow2(dict: &Dict) -> Result<(), String> {
    let one_of = |name: &str, shown: &str, values: &[&str]| match dict.get(name) {
        Some(value) if !values.contains(&value) => {
            Err(format!("Parameter '{shown}' does not accept value '{value}'"))
        }
        _ => Ok(()),
    };
    one_of("preallocation", "preallocation", &["off", "metadata", "falloc", "full"])?;
    one_of("compat", "version", &["0.10", "1.1", "v2", "v3"])?;
    one_of("compression_type", "compression-type", &["zlib", "zstd"])?;
    let number =
        |name: &str, default: u64| dict.get(name).and_then(|text| text.parse().ok()).unwrap_or(default);
    let on = |name: &str| dict.get(name) == Some("on");
    let old = matches!(dict.get("compat"), Some("0.10" | "v2"));
    let newer = "compatibility level 1.1 and above (use version=v3 or greater)";
    check_encryption(dict)?;
    check_geometry(dict)?;
    if on("extended_l2") && old {
        return Err(format!("Extended L2 entries are only supported with {newer}"));
    }
    let bits = number("refcount_bits", 16);
    if !bits.is_power_of_two() || bits > 64 {
        return Err("Refcount width must be a power of two and may not exceed 64 bits".to_owned());
    }
    if old && bits != 16 {
        return Err("Different refcount widths than 16 bits require compatibility level 1.1 or above \
                    (use version=v3 or greater)"
            .to_owned());
    }
    if old && on("lazy_refcounts") {
        return Err(format!("Lazy refcounts only supported with {newer}"));
    }
    if old && dict.get("data_file").is_some() {
        return Err(format!("External data files are only supported with {newer}"));
    }
    if old && dict.get("compression_type") == Some("zstd") {
        return Err("Non-zlib compression type is only supported with compatibility level 1.1 and above \
                    (use version=v3 or greater)"
            .to_owned());
    }
    if on("data_file_raw") && dict.get("data_file").is_none() {
        return Err("data-file-raw requires data-file".to_owned());
    }
    if on("data_file_raw") && dict.get("backing_file").is_some() {
        return Err("Backing file and data-file-raw cannot be used at the same time".to_owned());
    }
    let preallocated = dict.get("preallocation").is_some_and(|mode| mode != "off");
    if preallocated && dict.get("backing_file").is_some() && !on("extended_l2") {
        return Err("Backing file and preallocation can only be used at the same time if extended_l2 is on"
            .to_owned());
    }
    check_backing_format(dict)
}

fn check_encryption(dict: &Dict) -> Result<(), String> {
    let format = match (dict.get("encryption"), dict.get("encrypt.format")) {
        (Some("on"), Some(_)) => {
            return Err(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time".to_owned()
            );
        }
        (Some("on"), None) => "aes",
        (_, Some(format)) => format,
        (_, None) => match dict.names().any(|name| name.starts_with("encrypt.")) {
            true => return Err("Parameter 'encrypt.format' is missing".to_owned()),
            false => return Ok(()),
        },
    };
    if !matches!(format, "aes" | "luks") {
        return Err(format!("Parameter 'format' does not accept value '{format}'"));
    }
    let of_luks = |name: &&str| {
        name.starts_with("encrypt.") && !matches!(*name, "encrypt.format" | "encrypt.key-secret")
    };
    match dict.names().find(of_luks) {
        Some(name) if format == "aes" => Err(format!("Parameter '{name}' is unexpected")),
        _ => Ok(()),
    }
}

/// The size of clusters, which depends on the kind of L2 entries.
pub(super) fn check_geometry(dict: &Dict) -> Result<(), String> {
    let cluster_size: u64 = dict.get("cluster_size").and_then(|text| text.parse().ok()).unwrap_or(64 << 10);
    if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
        return Err("Cluster size must be a power of two between 512 and 2048k".to_owned());
    }
    if dict.get("extended_l2") == Some("on") && cluster_size < 16 << 10 {
        return Err(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes".to_owned()
        );
    }
    Ok(())
}

/// A format of a backing file that is not there.
fn check_backing_format(dict: &Dict) -> Result<(), String> {
    match (dict.get("backing_file"), dict.get("backing_fmt")) {
        (None, Some(_)) => Err("Backing format cannot be used without backing file".to_owned()),
        _ => Ok(()),
    }
}

fn check_raw_preallocation(mode: &str) -> Result<(), String> {
    match mode {
        "off" | "falloc" | "full" => Ok(()),
        "metadata" => Err(format!("Unsupported preallocation mode: {mode}")),
        other => Err(format!("Parameter 'preallocation' does not accept value '{other}'")),
    }
}

fn check_vmdk(dict: &Dict) -> Result<(), String> {
    const SUBFORMATS: [&str; 5] = [
        "monolithicSparse",
        "monolithicFlat",
        "twoGbMaxExtentSparse",
        "twoGbMaxExtentFlat",
        "streamOptimized",
    ];
    let backing = dict.get("backing_file").is_some();
    let subformat = dict.get("subformat").unwrap_or("monolithicSparse");
    if !SUBFORMATS.contains(&subformat) {
        return Err(format!("invalid parameter value: {subformat}"));
    }
    let flat = subformat.ends_with("Flat");
    let on = |name: &str| dict.get(name) == Some("on");
    let wrong = if on("compat6") && dict.get("hwversion").is_some_and(|version| version != "undefined") {
        "compat6 cannot be enabled with hwversion set"
    } else if flat && backing {
        "Flat image can't have backing file"
    } else if flat && on("zeroed_grain") {
        "Flat image can't enable zeroed grain"
    } else if backing && dict.get("backing_fmt").is_some_and(|format| format != "vmdk") {
        "backing_file must be a vmdk image"
    } else {
        return check_backing_format(dict);
    };
    Err(wrong.to_owned())
}
