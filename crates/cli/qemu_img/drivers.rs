//! The options of fresh images: names, types and the help of QEMU's drivers.

use super::opts::Dict;
use super::size::bytes;

/// What a value must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Text,
    Switch,
    Number,
    Size,
}

/// One option: name, type, help.
type Desc = (&'static str, Type, &'static str);

use Type::{Number, Size, Switch, Text};

const SIZE: Desc = ("size", Size, "Virtual disk size");
const BACKING_FILE: Desc = ("backing_file", Text, "File name of a base image");
const BACKING_FMT: Desc = ("backing_fmt", Text, "Image format of the base image");
const COMPAT: Desc = ("compat", Text, "Compatibility level (v2 [0.10] or v3 [1.1])");
const DATA_FILE: Desc = ("data_file", Text, "File name of an external data file");
const DATA_FILE_RAW: Desc =
    ("data_file_raw", Switch, "The external data file must stay valid as a raw image");
const LAZY_REFCOUNTS: Desc = ("lazy_refcounts", Switch, "Postpone refcount updates");
const REFCOUNT_BITS: Desc = ("refcount_bits", Number, "Width of a reference count entry in bits");
const ITER_TIME: Desc = ("encrypt.iter-time", Number, "Time to spend in PBKDF in milliseconds");

const RAW: &[Desc] = &[SIZE];

/// In the order in which `create` lists them.
const QCOW2: &[Desc] = &[
    (
        "encryption",
        Switch,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    ("encrypt.format", Text, "Encrypt the image, format choices: 'aes', 'luks'"),
    ("encrypt.key-secret", Text, "ID of secret providing qcow AES key or LUKS passphrase"),
    ("encrypt.cipher-alg", Text, "Name of encryption cipher algorithm"),
    ("encrypt.cipher-mode", Text, "Name of encryption cipher mode"),
    ("encrypt.ivgen-alg", Text, "Name of IV generator algorithm"),
    ("encrypt.ivgen-hash-alg", Text, "Name of IV generator hash algorithm"),
    ("encrypt.hash-alg", Text, "Name of encryption hash algorithm"),
    ITER_TIME,
    ("cluster_size", Size, "qcow2 cluster size"),
    ("extended_l2", Switch, "Extended L2 tables"),
    ("preallocation", Text, "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    ("compression_type", Text, "Compression method used for image cluster compression"),
    SIZE,
    COMPAT,
    BACKING_FILE,
    BACKING_FMT,
    DATA_FILE,
    DATA_FILE_RAW,
    LAZY_REFCOUNTS,
    REFCOUNT_BITS,
];

const VMDK: &[Desc] = &[
    SIZE,
    (
        "adapter_type",
        Text,
        "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX",
    ),
    BACKING_FILE,
    ("backing_fmt", Text, "Must be 'vmdk' if present"),
    ("compat6", Switch, "VMDK version 6 image"),
    ("hwversion", Text, "VMDK hardware version"),
    ("toolsversion", Text, "VMware guest tools version"),
    (
        "subformat",
        Text,
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | \
         twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    ),
    ("zeroed_grain", Switch, "Enable efficient zero writes using the zeroed-grain GTE feature"),
];

const LUKS: &[Desc] = &[
    SIZE,
    ("key-secret", Text, "ID of the secret that provides the keyslot passphrase"),
    ("cipher-alg", Text, "Name of encryption cipher algorithm"),
    ("cipher-mode", Text, "Name of encryption cipher mode"),
    ("ivgen-alg", Text, "Name of IV generator algorithm"),
    ("ivgen-hash-alg", Text, "Name of IV generator hash algorithm"),
    ("hash-alg", Text, "Name of encryption hash algorithm"),
    ("iter-time", Number, "Time to spend in PBKDF in milliseconds"),
    ("detached-header", Switch, "Create a detached LUKS header"),
];

/// Options of the file that the image is in.
const FILE: &[Desc] = &[
    ("nocow", Switch, "Turn off copy-on-write (valid only on btrfs)"),
    ("preallocation", Text, "Preallocation mode (allowed values: off, falloc, full)"),
    ("extent_size_hint", Size, "Extent size hint for the image file, 0 to disable"),
];

/// What `amend` can change.
const AMEND_QCOW2: &[Desc] = &[
    ITER_TIME,
    ("encrypt.keyslot", Number, "Select a single keyslot to modify explicitly"),
    ("encrypt.new-secret", Text, "New secret to set in the matching keyslots. Empty string to erase"),
    ("encrypt.old-secret", Text, "Select all keyslots that match this password"),
    ("encrypt.state", Text, "Select new state of affected keyslots (active/inactive)"),
    SIZE,
    COMPAT,
    BACKING_FILE,
    BACKING_FMT,
    DATA_FILE,
    DATA_FILE_RAW,
    LAZY_REFCOUNTS,
    REFCOUNT_BITS,
];

/// Formats of QEMU's that it can open but not create, and those that it can, as far as they are not ours.
const READ_ONLY: [&str; 5] = ["bochs", "cloop", "dmg", "vvfat", "compress"];

/// Whose options are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Create,
    Amend,
}

/// The options of one format.
#[derive(Debug, Clone, Copy)]
pub(super) struct Driver {
    pub(super) name: &'static str,
    verb: Verb,
    format: &'static [Desc],
    file: &'static [Desc],
}

impl Driver {
    /// The driver that creates images of a format.
    pub(super) fn creating(name: &str) -> Result<Self, String> {
        let (name, format) = match name {
            "raw" => ("raw", RAW),
            "qcow2" => ("qcow2", QCOW2),
            "vmdk" => ("vmdk", VMDK),
            "luks" => ("luks", LUKS),
            name if READ_ONLY.contains(&name) => {
                return Err(format!("Format driver '{name}' does not support image creation"));
            }
            other => return Err(format!("Unknown file format '{other}'")),
        };
        Ok(Self { name, verb: Verb::Create, format, file: FILE })
    }

    /// The driver that amends images of a format.
    pub(super) fn amending(name: &str) -> Result<Self, String> {
        match name {
            "qcow2" => Ok(Self { name: "qcow2", verb: Verb::Amend, format: AMEND_QCOW2, file: &[] }),
            name if READ_ONLY.contains(&name) || matches!(name, "raw" | "vmdk") => {
                Err(format!("Format driver '{name}' does not support option amendment"))
            }
            other => Err(format!("Unknown file format '{other}'")),
        }
    }

    /// Whether there is an option of this name.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.all().iter().any(|(known, ..)| *known == name)
    }

    /// Whether the format can have a backing file.
    pub(super) fn has_backing_files(&self) -> bool {
        self.format.contains(&BACKING_FILE)
    }

    /// All options, each once.
    fn all(&self) -> Vec<Desc> {
        let mut all = self.format.to_vec();
        for desc in self.file {
            if !all.iter().any(|(name, ..)| *name == desc.0) {
                all.push(*desc);
            }
        }
        all
    }

    /// The text for `-o help`; with the options of the file if there is one.
    pub(super) fn help(&self, with_file: bool) -> String {
        let mut rows = if with_file { self.all() } else { self.format.to_vec() };
        rows.sort_unstable_by_key(|(name, ..)| *name);
        let mut text = match (self.verb, with_file) {
            (Verb::Create, true) => "Supported options:\n".to_owned(),
            (Verb::Create, false) => format!("Supported {} options:\n", self.name),
            (Verb::Amend, _) => format!("Amend options for '{}':\n", self.name),
        };
        for (name, kind, help) in rows {
            let kind = match kind {
                Text => "str",
                Switch => "bool (on/off)",
                Number => "num",
                Size => "size",
            };
            text += &format!("  {:<22} - {help}\n", format!("{name}=<{kind}>"));
        }
        if self.verb == Verb::Create && !with_file {
            text += "\nThe protocol level may support further options.\n\
                     Specify the target filename to include those options.\n";
        }
        text
    }

    /// Checks names and values, and brings values to the form in which `create` shows them.
    pub(super) fn check(&self, dict: &Dict) -> Result<Dict, String> {
        let all = self.all();
        let mut checked = Dict::default();
        for (name, value) in dict.iter() {
            let found = all.iter().find(|(known, ..)| *known == name);
            let (_, kind, _) = found.ok_or_else(|| format!("Invalid parameter '{name}'"))?;
            let value = match kind {
                Text => value.to_owned(),
                Switch => match value {
                    "on" | "yes" | "true" | "y" => "on".to_owned(),
                    "off" | "no" | "false" | "n" => "off".to_owned(),
                    _ => return Err(format!("Parameter '{name}' expects 'on' or 'off'")),
                },
                Number => value
                    .parse::<u64>()
                    .map_err(|_| format!("Parameter '{name}' expects a number"))?
                    .to_string(),
                Size => bytes(value)
                    .map_err(|_| {
                        format!(
                            "Parameter '{name}' expects a non-negative number below 2^64\n\
                             Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                             and exabytes, respectively."
                        )
                    })?
                    .to_string(),
            };
            checked.set(name, value);
        }
        Ok(checked)
    }

    /// The options as the line "Formatting …" lists them.
    pub(super) fn line(&self, dict: &Dict) -> String {
        let shown = self.all().into_iter().filter_map(|(name, ..)| {
            let value = dict.get(name)?;
            Some(format!(" {name}={}", value.replace(',', ",,")))
        });
        shown.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(format: &str, list: &str) -> String {
        let driver = Driver::creating(format).unwrap();
        match driver.check(&Dict::from_list(list)) {
            Ok(dict) => driver.line(&dict),
            Err(error) => error.lines().next().unwrap().to_owned(),
        }
    }

    #[test]
    fn options_are_listed_in_the_drivers_order() {
        assert_eq!(
            check("qcow2", "size=1M,cluster_size=4k,lazy_refcounts"),
            " cluster_size=4096 size=1048576 lazy_refcounts=on"
        );
        assert_eq!(check("vmdk", "subformat=a,,b,size=1k"), " size=1024 subformat=a,,b");
        assert_eq!(check("qcow2", "foo=1"), "Invalid parameter 'foo'");
        assert_eq!(check("qcow2", "lazy_refcounts=2"), "Parameter 'lazy_refcounts' expects 'on' or 'off'");
        assert_eq!(
            check("qcow2", "cluster_size=x"),
            "Parameter 'cluster_size' expects a non-negative number below 2^64"
        );
    }

    #[test]
    fn formats_that_are_not_created_are_named() {
        let refused = |name| Driver::creating(name).unwrap_err();
        assert_eq!(refused("dmg"), "Format driver 'dmg' does not support image creation");
        assert_eq!(refused("vdi"), "Unknown file format 'vdi'");
        assert_eq!(
            Driver::amending("raw").unwrap_err(),
            "Format driver 'raw' does not support option amendment"
        );
    }
}
