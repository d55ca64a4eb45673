//! `registry`: hives of a Windows guest, by hivexregedit on a private copy that goes back when it was changed.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command as Process, Stdio};
use std::thread;

use clap::{Args, Subcommand};
use diskmill_guestfs::Command;
use serde_json::{Map, Value, json};

use super::args::GuestArgs;
use super::copy::{LocalCopy, host_failure};
use super::external::not_started;
use super::guest::{Access, Guest};
use super::name::{self, guest_path};
use super::output::print_json;
use crate::exit::{Exit, Failure};
use crate::names;

#[derive(Debug, Subcommand)]
pub(crate) enum RegistryVerb {
    /// Print a key's values and sub-keys, or one value
    Get(RegistryGetArgs),
    /// Set one value; the key is made where it is missing
    Set(RegistrySetArgs),
    /// Print a key and all below it as a .reg file
    Export(RegistryKeyArgs),
    /// Merge a .reg file
    Merge(RegistryMergeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RegistryKeyArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// The key: HKLM\SOFTWARE\…, HKLM\SYSTEM\…, HKLM\SAM, HKLM\SECURITY, HKU\.DEFAULT, HKU\NAME, or FILE!\… for a hive
    /// file in the image
    #[arg(value_name = "KEY")]
    pub(crate) key: String,
}

#[derive(Debug, Args)]
pub(crate) struct RegistryGetArgs {
    #[command(flatten)]
    pub(crate) key: RegistryKeyArgs,

    /// The value; `@` is the key's default value
    #[arg(value_name = "VALUE")]
    pub(crate) value: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RegistrySetArgs {
    #[command(flatten)]
    pub(crate) key: RegistryKeyArgs,

    /// The value's name; `@` is the key's default value
    #[arg(value_name = "VALUE")]
    pub(crate) value: String,

    /// What it is set to: text, dword:HEX, qword:HEX, expand:TEXT, hex:BYTES, hex(TYPE):BYTES
    #[arg(value_name = "DATA")]
    pub(crate) data: String,
}

#[derive(Debug, Args)]
pub(crate) struct RegistryMergeArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// The .reg file (UTF-8 or UTF-16)
    #[arg(value_name = "FILE")]
    pub(crate) reg: PathBuf,
}

pub(crate) fn registry(verb: &RegistryVerb) -> Result<Exit, Failure> {
    match verb {
        RegistryVerb::Get(args) => get(args),
        RegistryVerb::Set(args) => set(args),
        RegistryVerb::Export(args) => export(args),
        RegistryVerb::Merge(args) => merge(args),
    }
}

/// A hive file of the guest and where it hangs in the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hive {
    place: Place,
    /// The registry's name for the hive's root.
    prefix: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// A file of the system's folder `System32\config`.
    Config(&'static str),
    /// A user's `NTUSER.DAT`.
    User(String),
    /// A path in the image.
    Path(String),
}

/// The hive of a key, and the key inside it with `\` in front. Names are compared without case, as Windows does.
fn locate(key: &str) -> Result<(Hive, String), Failure> {
    if let Some((path, inside)) =
        key.split_once("!\\").or_else(|| key.strip_suffix('!').map(|path| (path, "")))
    {
        let hive = Hive { place: Place::Path(path.to_owned()), prefix: format!("{path}!") };
        return Ok((hive, format!("\\{inside}")));
    }
    let mut parts = key.split('\\');
    let root = parts.next().unwrap_or_default().to_ascii_uppercase();
    let name = parts.next().unwrap_or_default();
    let inside: Vec<&str> = parts.collect();
    let (root, place) = match (root.as_str(), name.to_ascii_uppercase().as_str()) {
        ("HKLM" | "HKEY_LOCAL_MACHINE", "SOFTWARE") => ("HKEY_LOCAL_MACHINE", Place::Config("SOFTWARE")),
        ("HKLM" | "HKEY_LOCAL_MACHINE", "SYSTEM") => ("HKEY_LOCAL_MACHINE", Place::Config("SYSTEM")),
        ("HKLM" | "HKEY_LOCAL_MACHINE", "SAM") => ("HKEY_LOCAL_MACHINE", Place::Config("SAM")),
        ("HKLM" | "HKEY_LOCAL_MACHINE", "SECURITY") => ("HKEY_LOCAL_MACHINE", Place::Config("SECURITY")),
        ("HKU" | "HKEY_USERS", ".DEFAULT") => ("HKEY_USERS", Place::Config("DEFAULT")),
        ("HKU" | "HKEY_USERS", user) if !user.is_empty() => ("HKEY_USERS", Place::User(name.to_owned())),
        _ => {
            return Err(Failure::usage(format!(
                "the key {key:?} is not supported: begin with HKLM\\SOFTWARE, HKLM\\SYSTEM, HKLM\\SAM, HKLM\\SECURITY, \
                 HKU\\.DEFAULT, HKU\\USER or FILE!"
            )));
        }
    };
    Ok((Hive { place, prefix: format!("{root}\\{name}") }, format!("\\{}", inside.join("\\"))))
}

impl Hive {
    /// The hive's path in the guest.
    fn path(&self, guest: &mut Guest) -> Result<Vec<u8>, Failure> {
        let path = match &self.place {
            Place::Path(path) => path.replace('\\', "/"),
            Place::User(user) => format!("/Users/{user}/NTUSER.DAT"),
            Place::Config(name) => {
                let root = guest.roots()?.into_iter().next();
                let root =
                    root.ok_or_else(|| Failure::failed("no Windows found: name the hive, FILE!\\KEY"))?;
                let folder = guest.text(Command::new("inspect-get-windows-systemroot").arg(root))?;
                format!("{folder}/System32/config/{name}")
            }
        };
        let path = guest_path(path.as_ref());
        let mut real = guest.call(Command::new("case-sensitive-path").arg(&path))?;
        if real.last() == Some(&b'\n') {
            real.pop();
        }
        Ok(real)
    }
}

/// The hive of a key, copied out of the guest.
struct Opened {
    guest: Guest,
    hive: Hive,
    path: Vec<u8>,
    copy: LocalCopy,
}

impl Opened {
    fn new(args: &GuestArgs, hive: Hive, access: Access) -> Result<Self, Failure> {
        let mut guest = Guest::mounted(args, access)?;
        let path = hive.path(&mut guest)?;
        let copy = LocalCopy::fetch(&mut guest, &path)?;
        Ok(Self { guest, hive, path, copy })
    }

    fn export(&self, key: &str) -> Result<Vec<u8>, Failure> {
        let mut tool = Process::new("hivexregedit");
        tool.args(["--export", "--unsafe-printable-strings", "--prefix"]).arg(&self.hive.prefix);
        run(tool.arg("--").arg(self.copy.path()).arg(key), None)
    }

    fn merge(&mut self, reg: &[u8]) -> Result<(), Failure> {
        let mut tool = Process::new("hivexregedit");
        tool.args(["--merge", "--prefix"]).arg(&self.hive.prefix);
        run(tool.arg("--").arg(self.copy.path()), Some(reg))?;
        self.copy.store(&mut self.guest, &self.path)
    }
}

/// Runs hivexregedit; its output.
fn run(tool: &mut Process, input: Option<&[u8]>) -> Result<Vec<u8>, Failure> {
    let name = "hivexregedit (Debian: libwin-hivex-perl)";
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let child = tool.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|error| not_started(name, &error))?;
    let failed = |error: std::io::Error| Failure::failed(format!("{name}: {error}"));
    let writing = child.stdin.take();
    let output = thread::scope(|scope| {
        scope.spawn(|| {
            if let (Some(mut stdin), Some(input)) = (writing, input) {
                // A tool that stops reading says why.
                let _ = stdin.write_all(input);
            }
        });
        child.wait_with_output()
    });
    let output = output.map_err(failed)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or_default();
        return Err(Failure::failed(format!("the registry: {}", names::shown(said))));
    }
    Ok(output.stdout)
}

fn export(args: &RegistryKeyArgs) -> Result<Exit, Failure> {
    let (hive, key) = locate(&args.key)?;
    let opened = Opened::new(&args.guest, hive, Access::Read)?;
    let text = opened.export(&key)?;
    opened.guest.finish()?;
    if args.guest.image.json {
        let text = String::from_utf8_lossy(&text);
        return print_json(
            &keys(&text)
                .into_iter()
                .map(|(key, values)| json!({ "key": key, "values": object(&values) }))
                .collect(),
        );
    }
    std::io::stdout().write_all(&text)?;
    Ok(Exit::Done)
}

fn get(args: &RegistryGetArgs) -> Result<Exit, Failure> {
    let (hive, key) = locate(&args.key.key)?;
    let opened = Opened::new(&args.key.guest, hive, Access::Read)?;
    let text = opened.export(&key)?;
    opened.guest.finish()?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let all = keys(&text);
    let (top, values) = all.first().cloned().unwrap_or_default();
    let below = format!("{top}\\");
    let subkeys: Vec<&str> = all
        .iter()
        .filter_map(|(key, _)| key.strip_prefix(below.as_str()))
        .filter(|name| !name.contains('\\'))
        .collect();
    if let Some(wanted) = &args.value {
        let found = values.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
        let (_, data) =
            found.ok_or_else(|| Failure::failed(format!("{}: no value {wanted:?}", args.key.key)))?;
        if args.key.guest.image.json {
            return print_json(&json!({ "name": wanted, "data": data }));
        }
        println!("{}", names::shown(data));
        return Ok(Exit::Done);
    }
    if args.key.guest.image.json {
        return print_json(&json!({ "key": top, "values": object(&values), "keys": subkeys }));
    }
    for (name, data) in &values {
        println!("{} = {}", names::shown(name), names::shown(data));
    }
    for name in subkeys {
        println!("{}\\", names::shown(name));
    }
    Ok(Exit::Done)
}

fn object(values: &[(String, String)]) -> Map<String, Value> {
    values.iter().map(|(name, data)| (name.clone(), json!(data))).collect()
}

/// The keys of a .reg file with their values; the default value's name is `@`, data is written as in the file, but plain
/// strings without their quotes.
fn keys(text: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut keys: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for line in text.lines() {
        if let Some(key) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            keys.push((key.to_owned(), Vec::new()));
        } else if let Some((_, values)) = keys.last_mut()
            && let Some((name, data)) = value(line)
        {
            values.push((name, data));
        }
    }
    keys
}

/// `"name"=data`, with `\"` and `\\` in names and strings.
fn value(line: &str) -> Option<(String, String)> {
    if let Some(data) = line.strip_prefix("@=") {
        return Some(("@".to_owned(), plain(data)));
    }
    let (name, rest) = quoted(line)?;
    Some((name, plain(rest.strip_prefix('=')?)))
}

fn plain(data: &str) -> String {
    let text = data.strip_prefix("str(1):").unwrap_or(data);
    match quoted(text) {
        Some((text, "")) => text,
        _ => data.to_owned(),
    }
}

/// A string in quotes, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut chars = text.strip_prefix('"')?.chars();
    loop {
        match chars.next()? {
            '"' => return Some((out, chars.as_str())),
            '\\' => out.push(chars.next()?),
            char => out.push(char),
        }
    }
}

fn set(args: &RegistrySetArgs) -> Result<Exit, Failure> {
    let (hive, key) = locate(&args.key.key)?;
    let escape = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    let key = key.trim_end_matches('\\');
    for text in [key, args.value.as_str(), args.data.as_str()] {
        if text.contains(|char: char| char.is_control()) {
            return Err(Failure::usage(
                "control characters are not supported here: write hex(1): with the bytes",
            ));
        }
    }
    let name = if args.value == "@" { "@".to_owned() } else { format!("\"{}\"", escape(&args.value)) };
    let typed = ["dword:", "hex:", "hex("].iter().any(|kind| args.data.starts_with(kind));
    let data = match (args.data.strip_prefix("qword:"), args.data.strip_prefix("expand:")) {
        (Some(number), _) => {
            let number = u64::from_str_radix(number, 16);
            let number = number.map_err(|_| Failure::usage("qword: takes up to 16 hex digits"))?;
            let bytes: Vec<String> = number.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            format!("hex(b):{}", bytes.join(","))
        }
        (_, Some(text)) => format!("str(2):\"{}\"", escape(text)),
        _ if typed => args.data.clone(),
        _ => format!("\"{}\"", escape(&args.data)),
    };
    let reg = format!("Windows Registry Editor Version 5.00\n\n[{}{key}]\n{name}={data}\n", hive.prefix);
    change(&args.key.guest, hive, reg.as_bytes())
}

fn merge(args: &RegistryMergeArgs) -> Result<Exit, Failure> {
    let bytes = std::fs::read(&args.reg).map_err(|error| host_failure(&args.reg, &error))?;
    let text = decode(&bytes)
        .ok_or_else(|| Failure::failed(format!("{:?} is neither UTF-8 nor UTF-16", args.reg)))?;
    let first = text.lines().find_map(|line| line.trim().strip_prefix('[')?.strip_suffix(']'));
    let first = first.ok_or_else(|| Failure::failed(format!("{:?} names no key", args.reg)))?;
    let (hive, _) = locate(first.trim_start_matches('-'))?;
    for line in text.lines().filter_map(|line| line.trim().strip_prefix('[')?.strip_suffix(']')) {
        if locate(line.trim_start_matches('-'))?.0 != hive {
            return Err(Failure::failed(format!(
                "{:?} changes several hives, which is not supported: split it by hive",
                args.reg
            )));
        }
    }
    change(&args.guest, hive, text.as_bytes())
}

/// .reg files are UTF-16 with a byte order mark when Windows writes them.
fn decode(bytes: &[u8]) -> Option<String> {
    let utf16 = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let (pairs, rest) = bytes.as_chunks::<2>();
        rest.is_empty()
            .then(|| String::from_utf16(&pairs.iter().map(|pair| unit(*pair)).collect::<Vec<_>>()).ok())?
    };
    match bytes {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        [0xef, 0xbb, 0xbf, rest @ ..] => String::from_utf8(rest.to_vec()).ok(),
        plain => String::from_utf8(plain.to_vec()).ok(),
    }
}

fn change(args: &GuestArgs, hive: Hive, reg: &[u8]) -> Result<Exit, Failure> {
    let mut opened = Opened::new(args, hive, Access::Write)?;
    opened.merge(reg)?;
    let path = opened.path.clone();
    opened.guest.finish()?;
    if args.image.json {
        let mut object = Map::new();
        name::put(&mut object, "hive", &path);
        return print_json(&object.into());
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_find_their_hives() {
        let (hive, key) = locate("hklm\\Software\\Microsoft\\X").unwrap();
        assert_eq!(
            (hive.place, hive.prefix.as_str()),
            (Place::Config("SOFTWARE"), "HKEY_LOCAL_MACHINE\\Software")
        );
        assert_eq!(key, "\\Microsoft\\X");
        let (hive, key) = locate("/data/my.hive!\\A\\B").unwrap();
        assert_eq!((hive.place, key.as_str()), (Place::Path("/data/my.hive".into()), "\\A\\B"));
        assert_eq!(locate("HKU\\bob\\X").unwrap().0.place, Place::User("bob".into()));
        assert!(locate("HKCR\\x").is_err() && locate("HKLM\\HARDWARE").is_err() && locate("HKU").is_err());
    }

    #[test]
    fn reg_files_are_read() {
        let text = "Windows Registry Editor Version 5.00\n\n[A\\B]\n\"a\\\"b\"=\"x\\\\y\"\n@=dword:00000001\n[A\\B\\C]\n";
        let want = vec![
            (
                "A\\B".to_owned(),
                vec![("a\"b".to_owned(), "x\\y".to_owned()), ("@".into(), "dword:00000001".into())],
            ),
            ("A\\B\\C".to_owned(), vec![]),
        ];
        assert_eq!(keys(text), want);
        let utf16: Vec<u8> =
            [0xff, 0xfe].into_iter().chain("[ü]".encode_utf16().flat_map(u16::to_le_bytes)).collect();
        assert_eq!(decode(&utf16).as_deref(), Some("[ü]"));
        assert_eq!((decode(&utf16[..3]), decode(b"\xff")), (None, None));
    }
}
