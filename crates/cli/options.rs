//! `-o` lists.

use diskmill::convert::TargetFormat;

use crate::exit::Failure;

/// Splits `a=1,b=2` as QEMU does: `,,` is a comma in a value. A name without `=` has no value.
pub(crate) fn split(list: &str) -> Vec<(String, Option<String>)> {
    let mut items = vec![String::new()];
    let mut rest = list.chars().peekable();
    while let Some(char) = rest.next() {
        let escaped = char == ',' && rest.next_if_eq(&',').is_some();
        match items.last_mut() {
            Some(item) if char != ',' || escaped => item.push(char),
            _ => items.push(String::new()),
        }
    }
    items
        .into_iter()
        .filter(|item| !item.is_empty())
        .map(|item| match item.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (item, None),
        })
        .collect()
}

/// Sets what `list` names.
pub(crate) fn apply(format: &mut TargetFormat, list: &str) -> Result<(), Failure> {
    for (name, value) in split(list) {
        // QEMU takes a bare name for a switch that is on.
        format.set(&name, value.as_deref().unwrap_or("on")).map_err(Failure::of_request)?;
    }
    Ok(())
}

/// Whether `list` asks for help rather than naming options.
pub(crate) fn asks_for_help(list: &str) -> bool {
    split(list).iter().any(|(name, value)| value.is_none() && matches!(name.as_str(), "help" | "?"))
}

const RAW: &[(&str, &str)] =
    &[("preallocation", "off (default), falloc (reserve the space), full (write zeros)")];

const QCOW2: &[(&str, &str)] = &[
    ("compat", "version: 0.10 (v2) or 1.1 (v3, default)"),
    (
        "cluster_size",
        "bytes in a cluster: a power of two from 512 to 2M (default 64k; with -c, what the source has packed)",
    ),
    ("refcount_bits", "width of a refcount: 1, 2, 4, 8, 16 (default), 32 or 64"),
    ("preallocation", "off (default), metadata, falloc (reserve the space), full (write zeros)"),
    ("lazy_refcounts", "on or off (default): let QEMU postpone updates of refcounts"),
    ("extended_l2", "on or off (default): 32 subclusters in each cluster; cluster_size at least 16k"),
    ("data_file", "file beside the image that holds the guest's data"),
    ("data_file_raw", "on or off (default): keep data_file a valid raw image"),
    ("compression_type", "zlib (default) or zstd, for -c and for what QEMU compresses later"),
    ("backing_file", "the image that this one is an overlay of (also -B)"),
    ("backing_fmt", "its format (also -F)"),
    (
        "encrypt.format",
        "luks: the key is random, so no two outputs are the same; aes: weak, for old tools only",
    ),
    ("encrypt.key-secret", "id of the --object that holds the passphrase, unless --target-key-file gives it"),
    ("encrypt.cipher-alg", "aes-256 (default), serpent-256, twofish-256, and 128 or 192"),
    ("encrypt.cipher-mode", "xts (default) or cbc"),
    ("encrypt.ivgen-alg", "plain64 (default), plain or essiv"),
    ("encrypt.ivgen-hash-alg", "hash for essiv (default sha256)"),
    ("encrypt.hash-alg", "sha256 (default), sha1, sha224, sha384, sha512 or ripemd160"),
    ("encrypt.iter-time", "milliseconds that one try at the passphrase takes (default 2000)"),
];

const VMDK: &[(&str, &str)] = &[
    (
        "subformat",
        "monolithicSparse (default), monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat or streamOptimized",
    ),
    ("adapter_type", "ide, buslogic, lsilogic (default) or legacyESX"),
    ("hwversion", "virtual hardware version (default 4; 6 with compat6)"),
    ("compat6", "on or off (default): a disk for virtual hardware version 6"),
    ("zeroed_grain", "on or off (default): zeros over a backing file take an entry, not a grain"),
    ("toolsversion", "version of VMware Tools to write down"),
    ("backing_file", "the VMDK that this one is a delta of (also -B)"),
    ("backing_fmt", "its format: vmdk (also -F)"),
];

/// The text for `-o help`.
pub(crate) fn help(format: &TargetFormat) -> String {
    let rows = match format {
        TargetFormat::Qcow2(_) => QCOW2,
        TargetFormat::Vmdk(_) | TargetFormat::Ova(_) => VMDK,
        _ => RAW,
    };
    let mut text = format!("Options of {}:\n", format.name());
    for (name, meaning) in rows {
        text.push_str(&format!("  {:<24} {meaning}\n", format!("{name}=…")));
    }
    text
}

#[cfg(test)]
mod tests {
    use diskmill::qcow2::Qcow2Options;

    use super::*;

    fn pairs(list: &str) -> Vec<(String, String)> {
        split(list).into_iter().map(|(name, value)| (name, value.unwrap_or("-".to_owned()))).collect()
    }

    #[test]
    fn lists_split_as_in_qemu() {
        let cases: [(&str, &[(&str, &str)]); 8] = [
            ("", &[]),
            ("a=1", &[("a", "1")]),
            ("a=1,b=2", &[("a", "1"), ("b", "2")]),
            ("a=1,,2,b", &[("a", "1,2"), ("b", "-")]),
            ("a=,,,b=,", &[("a", ","), ("b", "")]),
            ("a=x=y", &[("a", "x=y")]),
            ("a=ü,,", &[("a", "ü,")]),
            (",a", &[("a", "-")]),
        ];
        for (list, want) in cases {
            let got = pairs(list);
            let got: Vec<_> = got.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
            assert_eq!(got, want, "{list:?}");
        }
    }

    #[test]
    fn help_is_asked_for_by_its_bare_name() {
        assert!(asks_for_help("help") && asks_for_help("compat=1.1,?"));
        assert!(!asks_for_help("backing_file=help") && !asks_for_help("help=1"));
    }

    #[test]
    fn help_has_every_option() {
        let names: Vec<&str> = QCOW2.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, Qcow2Options::NAMES);
    }
}
