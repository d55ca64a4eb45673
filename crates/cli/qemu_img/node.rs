//! How a command line names an image: a file name, `json:{…}`, or `--image-opts`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use diskmill::{Allow, Error, Format, Image, Kind, OpenOptions, OpenPolicy, Secret};

use super::getopt::{Args, not_text};
use super::object::Secrets;
use super::opts::Dict;
use super::size::bytes;
use super::{Fail, Outcome, messages};
use crate::args::CacheMode;
use crate::names::resolved_path;

/// Options of QEMU's block layer that any node takes and that change nothing here.
const GENERIC: [&str; 9] = [
    "read-only",
    "auto-read-only",
    "discard",
    "detect-zeroes",
    "node-name",
    "cache.direct",
    "cache.no-flush",
    "cache.writeback",
    "active",
];
/// The same of files.
const OF_FILES: [&str; 5] = ["locking", "aio", "aio-max-batch", "pr-manager", "drop-cache"];
/// The same of qcow2 images: caches and checks of QEMU's own.
const OF_QCOW2: [&str; 9] = [
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-size",
];

/// How the files that a command line names are to be opened.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) image_opts: bool,
    pub(super) format: Option<String>,
    pub(super) force_share: bool,
    pub(super) cache: Option<CacheMode>,
    pub(super) secrets: Secrets,
}

impl Context {
    /// Takes `--image-opts`, `-f`, `-U` and `--object`. `format` is the name of the option for the format.
    pub(super) fn of(args: &Args, format: &str) -> Outcome<Self> {
        Ok(Self {
            image_opts: args.has("image-opts"),
            format: args.text(format),
            force_share: args.has("force-share"),
            cache: None,
            secrets: Secrets::of(args)?,
        })
    }

    /// The image that `given` names.
    pub(super) fn node(&self, given: &OsStr) -> Outcome<Node> {
        if self.image_opts && self.format.is_some() {
            return Err(Fail::new("--image-opts and --format are mutually exclusive"));
        }
        let node = if self.image_opts {
            let list = given.to_str().ok_or_else(|| not_text("the list of options", given));
            list.and_then(|list| Node::from_dict(given, Dict::from_list(list), &self.secrets))
        } else {
            Node::from_name(given, self.format.as_deref(), &self.secrets)
        };
        let mut node = node.map_err(|reason| could_not_open(given, &reason))?;
        if self.force_share {
            node.force_share = true;
        }
        node.direct |= self.cache.is_some_and(CacheMode::is_direct);
        Ok(node)
    }

    /// Opens the image that `given` names, for reading.
    pub(super) fn open(&self, given: &OsStr) -> Outcome<(Node, Image)> {
        let node = self.node(given)?;
        let image = node.open(&node.options())?;
        Ok((node, image))
    }

    /// Opens the image that `given` names, for writing; `None` if its format cannot be written to in place.
    pub(super) fn open_writable(&self, given: &OsStr) -> Outcome<Option<(Node, Image)>> {
        let node = self.node(given)?;
        if node.force_share {
            let reason = "force-share=on can only be used with read-only images";
            return Err(could_not_open(given, reason));
        }
        if node.zeros.is_some() || node.window.is_some() {
            return Err(could_not_open(given, "writing to a part of a file is not supported"));
        }
        let options = OpenOptions { writable: true, ..node.options() };
        let image = match Image::open(&node.path, &options) {
            Err(error) if error.kind() == Kind::Unsupported => {
                let found = node.open(&OpenOptions { metadata_only: true, ..node.options() })?;
                match found.info().format {
                    Format::Vmdk | Format::Ova => return Ok(None),
                    _ => return Err(node.cannot_open(&error)),
                }
            }
            opened => opened.map_err(|error| node.cannot_open(&error))?,
        };
        node.check_backing(&image)?;
        if node.format.is_none() && image.info().format == Format::Raw {
            eprintln!(
                "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
                 Automatically detecting the format is dangerous for raw images, write operations on block 0 will be \
                 restricted.\n         Specify the 'raw' format explicitly to remove the restrictions.",
                node.path.display()
            );
        }
        Ok(Some((node, image)))
    }
}

/// An image in a local file.
#[derive(Debug, Clone)]
pub(super) struct Node {
    /// As the user typed it.
    pub(super) given: OsString,
    pub(super) path: PathBuf,
    pub(super) format: Option<Format>,
    pub(super) force_share: bool,
    pub(super) direct: bool,
    /// The part of a raw image that is meant: its start, and its length if that is given.
    window: Option<(u64, Option<u64>)>,
    /// No file, but a disk of this many zeros.
    zeros: Option<u64>,
    /// The backing file, where the options name it: it has to be the image's own.
    backing: Option<PathBuf>,
    /// Passphrases of the image and its backing files.
    keys: Vec<Secret>,
}

impl Node {
    fn at(given: &OsStr, path: PathBuf) -> Self {
        Self {
            given: given.to_owned(),
            path,
            format: None,
            force_share: false,
            direct: false,
            window: None,
            zeros: None,
            backing: None,
            keys: Vec::new(),
        }
    }

    /// The image in the file `path`.
    pub(super) fn named(path: &Path) -> Self {
        Self::at(path.as_os_str(), path.to_owned())
    }

    fn from_name(given: &OsStr, format: Option<&str>, secrets: &Secrets) -> Result<Self, String> {
        if given.as_bytes().starts_with(b"json:") {
            let text = given.to_str().ok_or_else(|| not_text("the JSON text", given))?;
            let mut dict = Dict::from_json(text.strip_prefix("json:").unwrap_or(text))?;
            if let Some(format) = format {
                if dict.get("driver").is_some_and(|driver| driver != format) {
                    return Err("Driver specified twice".to_owned());
                }
                dict.set("driver", format.to_owned());
            }
            return Self::from_dict(given, dict, secrets);
        }
        let mut node = Self::at(given, local_path(given)?);
        node.format = format.map(format_named).transpose()?;
        Ok(node)
    }

    fn from_dict(given: &OsStr, mut dict: Dict, secrets: &Secrets) -> Result<Self, String> {
        let driver = dict.take("driver");
        if let Some(driver) = driver.as_deref().filter(|driver| is_protocol(driver)) {
            let mut node = Self::at(given, PathBuf::new());
            node.format = Some(Format::Raw);
            return node.with_file(driver, dict);
        }
        if driver.as_deref() == Some("null-co") {
            return Self::of_zeros(given, dict);
        }
        let format = driver.as_deref().map(format_named).transpose()?;
        if let Some(name) = dict.take("file") {
            return Err(no_such_node(&name));
        }
        let Some(mut file) = dict.take_nested("file") else {
            return Err(match (format, dict.names().next()) {
                (None, Some(name)) if dict.names().count() == 1 && dict.get(name) == Some("on") => {
                    no_such_node(name)
                }
                (None, _) => "Must specify either driver or file".to_owned(),
                (Some(_), _) => "A block device must be specified for \"file\"".to_owned(),
            });
        };
        let mut node = Self::at(given, PathBuf::new());
        node.format = format;
        let protocol = file.take("driver").unwrap_or_else(|| "file".to_owned());
        if !is_protocol(&protocol) {
            return Err(match format_named(&protocol) {
                Ok(_) => format!("a '{protocol}' node below another format is not supported"),
                Err(error) => error,
            });
        }
        let mut node = node.with_file(&protocol, file)?;
        node.take_generic(&mut dict);
        for name in ["encrypt.key-secret", "backing.encrypt.key-secret"] {
            if let Some(id) = dict.take(name) {
                node.keys.extend(secrets.to_open(&id)?);
            }
        }
        dict.take("encrypt.format");
        node.take_backing(&mut dict)?;
        if node.format == Some(Format::Raw) {
            node.take_window(&mut dict)?;
        }
        let known = |name: &&str| !(OF_QCOW2.contains(name) || name.starts_with("overlap-check"));
        if let Some(name) = dict.names().find(known) {
            let format = node.format.map_or("raw", Format::name);
            return Err(if matches!(name.split('.').next(), Some("backing" | "data-file")) {
                format!("the option '{name}' is not supported")
            } else {
                format!("Block format '{format}' does not support the option '{name}'")
            });
        }
        Ok(node)
    }

    /// QEMU's null device, as far as it reads as zeros.
    fn of_zeros(given: &OsStr, mut dict: Dict) -> Result<Self, String> {
        let mut node = Self::at(given, PathBuf::from("null-co://"));
        let size = dict.take("size").map_or(Ok(1 << 30), |text| {
            bytes(&text).map_err(|_| "Parameter 'size' expects a non-negative number below 2^64".to_owned())
        })?;
        if dict.take("read-zeroes").as_deref() != Some("on") {
            return Err("a null-co node without read-zeroes is not supported".to_owned());
        }
        node.take_generic(&mut dict);
        node.zeros = Some(size);
        match dict.names().next() {
            Some(name) => Err(format!("Block protocol 'null-co' doesn't support the option '{name}'")),
            None => Ok(node),
        }
    }

    /// Takes the options of the file itself.
    fn with_file(mut self, protocol: &str, mut dict: Dict) -> Result<Self, String> {
        let name = dict
            .take("filename")
            .ok_or_else(|| format!("The '{protocol}' block driver requires a file name"))?;
        self.path = PathBuf::from(name);
        self.take_generic(&mut dict);
        match dict.names().find(|name| !OF_FILES.contains(name)) {
            Some(name) => Err(format!("Block protocol '{protocol}' doesn't support the option '{name}'")),
            None => Ok(self),
        }
    }

    fn take_backing(&mut self, dict: &mut Dict) -> Result<(), String> {
        for name in ["backing.driver", "backing.file.driver"] {
            if let Some(driver) = dict.take(name)
                && !is_protocol(&driver)
            {
                format_named(&driver)?;
            }
        }
        dict.take("backing.encrypt.format");
        self.backing = dict.take("backing.file.filename").map(PathBuf::from);
        Ok(())
    }

    fn take_window(&mut self, dict: &mut Dict) -> Result<(), String> {
        let mut size = |name: &str| match dict.take(name) {
            Some(text) => bytes(&text)
                .map(Some)
                .map_err(|_| format!("Parameter '{name}' expects a non-negative number below 2^64")),
            None => Ok(None),
        };
        let (start, len) = (size("offset")?, size("size")?);
        self.window = (start.is_some() || len.is_some()).then(|| (start.unwrap_or(0), len));
        Ok(())
    }

    fn take_generic(&mut self, dict: &mut Dict) {
        self.direct |= dict.get("cache.direct") == Some("on");
        for name in GENERIC {
            dict.take(name);
        }
        if let Some(on) = dict.take("force-share") {
            self.force_share = on == "on";
        }
    }

    /// The options to open the image with.
    pub(super) fn options(&self) -> OpenOptions {
        OpenOptions {
            format: self.format,
            // As qemu-img: a backing file may stand anywhere. Not so the extents of a VMDK.
            policy: OpenPolicy { allow: Allow::Backing, paths: Vec::new() },
            force_share: self.force_share,
            direct: self.direct,
            keys: self.keys.clone(),
            ..OpenOptions::default()
        }
    }

    pub(super) fn open(&self, options: &OpenOptions) -> Outcome<Image> {
        self.open_or(options, |error| self.cannot_open(error))
    }

    /// The same with other words for a failure.
    pub(super) fn open_or(&self, options: &OpenOptions, failed: impl Fn(&Error) -> Fail) -> Outcome<Image> {
        if let Some(size) = self.zeros {
            return Ok(Image::zeros(size));
        }
        let image = Image::open(&self.path, options).map_err(|error| failed(&error))?;
        self.check_backing(&image)?;
        let Some((start, len)) = self.window else { return Ok(image) };
        let whole = image.size();
        let refused = |reason: String| could_not_open(&self.given, &reason);
        let left = whole.checked_sub(start).ok_or_else(|| {
            refused(format!("Offset ({start}) cannot be greater than size of the containing file ({whole})"))
        })?;
        let len = len.unwrap_or(left);
        image.into_window(start, len).map_err(|_| {
            refused(format!(
                "The sum of offset ({start}) and size ({len}) has to be smaller or equal to the  \
                 actual size of the containing file ({whole})"
            ))
        })
    }

    /// As [`check_backing`](Self::check_backing), before somebody else opens the image.
    pub(super) fn check_named_backing(&self) -> Outcome<()> {
        if self.backing.is_none() {
            return Ok(());
        }
        self.open(&OpenOptions { force_share: true, ..self.options() }).map(drop)
    }

    /// Refuses options that put another file in the place of the image's backing file.
    pub(super) fn check_backing(&self, image: &Image) -> Outcome<()> {
        let canonical = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let Some(wanted) = &self.backing else { return Ok(()) };
        let own = image.info().backing_name.as_deref();
        let own = own.map(|name| canonical(&resolved_path(&self.path, name)));
        if own == Some(canonical(wanted)) {
            return Ok(());
        }
        let reason = "another backing file than the image's own is not supported";
        Err(could_not_open(&self.given, reason))
    }

    /// The failure to open this image.
    pub(super) fn cannot_open(&self, error: &Error) -> Fail {
        could_not_open(&self.given, &messages::cannot_open(error, &self.path, self.format))
    }

    /// As qemu-img shows it.
    pub(super) fn name(&self) -> &Path {
        &self.path
    }
}

fn could_not_open(given: &OsStr, reason: &str) -> Fail {
    Fail::new(format!("Could not open '{}': {reason}", given.to_string_lossy()))
}

fn no_such_node(name: &str) -> String {
    format!("Cannot find device='{name}' nor node-name='{name}'")
}

fn is_protocol(driver: &str) -> bool {
    matches!(driver, "file" | "host_device")
}

/// A format by the name of QEMU's driver.
pub(super) fn format_named(name: &str) -> Result<Format, String> {
    match name {
        "ova" => None,
        name => name.parse().ok(),
    }
    .ok_or_else(|| format!("Unknown driver '{name}'"))
}

/// The file that a name stands for; QEMU takes it for a protocol if a colon comes before the first slash.
pub(super) fn local_path(name: &OsStr) -> Result<PathBuf, String> {
    let bytes = name.as_bytes();
    if bytes.is_empty() {
        return Err("The 'file' block driver requires a file name".to_owned());
    }
    if let Some(plain) = bytes.strip_prefix(b"file:") {
        return Ok(PathBuf::from(OsString::from_vec(plain.to_vec())));
    }
    let first = bytes.split(|&byte| byte == b'/').next().unwrap_or_default();
    match first.iter().position(|&byte| byte == b':') {
        Some(colon) => {
            let protocol = first.get(..colon).unwrap_or_default();
            Err(format!("Unknown protocol '{}'", String::from_utf8_lossy(protocol)))
        }
        None => Ok(PathBuf::from(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(node: Result<Node, String>) -> String {
        node.map_or_else(|error| error, |node| format!("{:?} {:?}", node.path, node.format))
    }

    #[test]
    fn names_are_files_or_refused() {
        let name = |name: &str| shown(Node::from_name(OsStr::new(name), None, &Secrets::default()));
        assert_eq!(name("a/b:c"), "\"a/b:c\" None");
        assert_eq!(name("./b:c"), "\"./b:c\" None");
        assert_eq!(name("file:a"), "\"a\" None");
        assert_eq!(name("nbd:a"), "Unknown protocol 'nbd'");
        assert_eq!(name(r#"json:{"driver":"raw","file.filename":"a"}"#), "\"a\" Some(Raw)");
        assert_eq!(name("json:{}"), "Must specify either driver or file");
    }

    #[test]
    fn options_make_a_node() {
        let node =
            |text: &str| shown(Node::from_dict(OsStr::new(text), Dict::from_list(text), &Secrets::default()));
        assert_eq!(
            node("driver=qcow2,file.filename=a,file.locking=off,overlap-check=all"),
            "\"a\" Some(Qcow2)"
        );
        assert_eq!(node("file.filename=a,,b"), "\"a,b\" None");
        assert_eq!(node("driver=file,filename=x"), "\"x\" Some(Raw)");
        assert_eq!(node("driver=qcow2"), "A block device must be specified for \"file\"");
        assert_eq!(node("driver=foo"), "Unknown driver 'foo'");
        assert_eq!(node("driver=qcow2,file=x"), "Cannot find device='x' nor node-name='x'");
        assert_eq!(
            node("driver=qcow2,file.filename=x,foo=1"),
            "Block format 'qcow2' does not support the option 'foo'"
        );
        assert_eq!(
            node("driver=qcow2,file.filename=x,file.foo=1"),
            "Block protocol 'file' doesn't support the option 'foo'"
        );
    }
}
