//! `registry`: hives of a Windows guest, by hivexregedit on a private copy that goes back when it was changed.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command as Process, Stdio};
use std::thread;

use clap::{Args, Subcommand};
use diskmill_guestfs::Command;
use serde_json::{Map, Value, json};

use reg::Key;

use super::args::GuestArgs;
use super::copy::host_failure;
use super::external::not_started;
use super::guest::{Access, Guest};
use super::name::{self, guest_path};
use super::output::print_json;
use super::replace::LocalCopy;
use super::reply::texts;
use crate::exit::{Exit, Failure};
use crate::names;

mod reg;

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
    #[arg(id = "registry_key", value_name = "KEY")]
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

/// The hive of a key, and the key inside it with `\` in front and none behind. Names are compared without
/// case, as Windows does.
fn locate(key: &str) -> Result<(Hive, String), Failure> {
    if let Some((path, inside)) =
        key.split_once("!\\").or_else(|| key.strip_suffix('!').map(|path| (path, "")))
    {
        let hive = Hive { place: Place::Path(path.to_owned()), prefix: format!("{path}!") };
        return Ok((hive, format!("\\{}", inside.trim_end_matches('\\'))));
    }
    let refused = || {
        Failure::usage(format!(
            "the key {key:?} is not supported: begin with HKLM\\SOFTWARE, HKLM\\SYSTEM, HKLM\\SAM, HKLM\\SECURITY, \
             HKU\\.DEFAULT, HKU\\USER or FILE!"
        ))
    };
    let mut parts = key.split('\\');
    let root = parts.next().unwrap_or_default().to_ascii_uppercase();
    let name = parts.next().unwrap_or_default();
    let inside = parts.collect::<Vec<_>>().join("\\");
    let (prefix, place) = match (root.as_str(), name.to_ascii_uppercase().as_str()) {
        ("HKLM" | "HKEY_LOCAL_MACHINE", upper) => {
            let hive = ["SOFTWARE", "SYSTEM", "SAM", "SECURITY"].into_iter().find(|hive| *hive == upper);
            let hive = hive.ok_or_else(refused)?;
            (format!("HKEY_LOCAL_MACHINE\\{hive}"), Place::Config(hive))
        }
        ("HKU" | "HKEY_USERS", ".DEFAULT") => ("HKEY_USERS\\.DEFAULT".to_owned(), Place::Config("DEFAULT")),
        ("HKU" | "HKEY_USERS", user) if !user.is_empty() => {
            (format!("HKEY_USERS\\{name}"), Place::User(name.to_owned()))
        }
        _ => return Err(refused()),
    };
    Ok((Hive { place, prefix }, format!("\\{}", inside.trim_end_matches('\\'))))
}

impl Hive {
    /// Whether it is the same file. Windows compares names without case.
    fn is(&self, other: &Self) -> bool {
        self.prefix.eq_ignore_ascii_case(&other.prefix)
    }

    /// The full name of a key that is `\KEY` inside the hive.
    fn named(&self, inside: &str) -> String {
        format!("{}{}", self.prefix, if inside == "\\" { "" } else { inside })
    }

    /// The hive's path in the guest.
    fn path(&self, guest: &mut Guest, root: Option<&str>) -> Result<Vec<u8>, Failure> {
        let path = match &self.place {
            Place::Path(path) => path.replace('\\', "/"),
            Place::User(user) => format!("/Users/{user}/NTUSER.DAT"),
            Place::Config(name) => {
                // Not inspect-os, which unmounts. With -m nothing was inspected.
                let found = texts(&guest.call(Command::new("inspect-get-roots"))?);
                let folder = match root.or(found.first().map(String::as_str)) {
                    Some(root) => guest.text(Command::new("inspect-get-windows-systemroot").arg(root))?,
                    None => "/Windows".to_owned(),
                };
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
        let path = hive.path(&mut guest, args.root.as_deref())?;
        let copy = LocalCopy::fetch(&mut guest, &path)?;
        Ok(Self { guest, hive, path, copy })
    }

    /// A key and `depth` levels below it, or all; the names without [`Hive::prefix`].
    fn keys(&self, key: &str, depth: Option<u32>) -> Result<Vec<Key>, Failure> {
        let mut tool = Process::new("hivexregedit");
        tool.arg("--export");
        if let Some(depth) = depth {
            tool.arg("--max-depth").arg(depth.saturating_add(1).to_string());
        }
        let text = run(tool.arg("--").arg(self.copy.path()).arg(key), None)?;
        let text = String::from_utf8_lossy(&text);
        let strange =
            |line| Failure::failed(format!("hivexregedit: line {line} of its output is not understood"));
        reg::parse(&text).map_err(strange)
    }

    fn merge(&mut self, text: &str) -> Result<(), Failure> {
        let mut tool = Process::new("hivexregedit");
        run(tool.args(["--merge", "--"]).arg(self.copy.path()), Some(text.as_bytes()))?;
        self.copy.store(&mut self.guest, &self.path)
    }
}

/// Runs hivexregedit; its output.
fn run(tool: &mut Process, input: Option<&[u8]>) -> Result<Vec<u8>, Failure> {
    let name = "hivexregedit (Debian: libwin-hivex-perl)";
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    // perlrun(1): all streams are UTF-8. By itself hivexregedit takes and prints Latin-1.
    let tool = tool.env("PERL_UNICODE", "SD");
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
        // Perl tells where in the tool's own text it was.
        let said = said.split_once(" at /").map_or(said, |(said, _)| said);
        return Err(Failure::failed(format!("the registry: {}", names::shown(said))));
    }
    Ok(output.stdout)
}

fn export(args: &RegistryKeyArgs) -> Result<Exit, Failure> {
    let (hive, key) = locate(&args.key)?;
    let opened = Opened::new(&args.guest, hive, Access::Read)?;
    let mut keys = opened.keys(&key, None)?;
    for key in &mut keys {
        key.name = opened.hive.named(&key.name);
    }
    opened.guest.finish()?;
    if args.guest.image.json {
        return print_json(
            &keys.iter().map(|key| json!({ "key": key.name, "values": values(key) })).collect(),
        );
    }
    let mut out = format!("{}\n", reg::HEADER);
    keys.iter().for_each(|key| out.push_str(&key.write(true)));
    std::io::stdout().write_all(out.as_bytes())?;
    Ok(Exit::Done)
}

fn get(args: &RegistryGetArgs) -> Result<Exit, Failure> {
    let (hive, key) = locate(&args.key.key)?;
    let opened = Opened::new(&args.key.guest, hive, Access::Read)?;
    let keys = opened.keys(&key, Some(1))?;
    let name = |key: &Key| opened.hive.named(&key.name);
    let Some((top, below)) = keys.split_first() else {
        return Err(Failure::failed(format!("{}: no such key", args.key.key)));
    };
    let top_name = name(top);
    let subkeys: Vec<&str> =
        below.iter().filter_map(|key| key.name.rsplit_once('\\')).map(|(_, name)| name).collect();
    opened.guest.finish()?;
    let json = args.key.guest.image.json;
    if let Some(wanted) = &args.value {
        let found = top.values.iter().find(|value| shown_name(value).eq_ignore_ascii_case(wanted));
        let data = found.and_then(|value| value.data.as_ref());
        let data = data.ok_or_else(|| Failure::failed(format!("{}: no value {wanted:?}", args.key.key)))?;
        if json {
            return print_json(&data.json());
        }
        println!("{}", names::shown(&data.shown()));
        return Ok(Exit::Done);
    }
    if json {
        return print_json(&json!({ "key": top_name, "values": values(top), "keys": subkeys }));
    }
    let mut out = String::new();
    for value in &top.values {
        let data = value.data.as_ref().map(reg::Data::shown).unwrap_or_default();
        out.push_str(&format!("{} = {}\n", names::shown(shown_name(value)), names::shown(&data)));
    }
    for name in subkeys {
        out.push_str(&format!("{}\\\n", names::shown(name)));
    }
    std::io::stdout().write_all(out.as_bytes())?;
    Ok(Exit::Done)
}

/// A value's name; `@` for the default value.
fn shown_name(value: &reg::Value) -> &str {
    if value.name.is_empty() { "@" } else { &value.name }
}

fn values(key: &Key) -> Map<String, Value> {
    let values = key.values.iter().filter_map(|value| Some((value, value.data.as_ref()?)));
    values.map(|(value, data)| (shown_name(value).to_owned(), data.json())).collect()
}

fn set(args: &RegistrySetArgs) -> Result<Exit, Failure> {
    let (hive, key) = locate(&args.key.key)?;
    for text in [&key, &args.value] {
        if text.contains(char::is_control) {
            return Err(Failure::usage(
                "control characters in the names of keys and values are not supported",
            ));
        }
    }
    let data = reg::Data::typed(&args.data).map_err(Failure::usage)?;
    let name = if args.value == "@" { String::new() } else { args.value.clone() };
    let values = vec![reg::Value { name, data: Some(data) }];
    change(&args.key.guest, hive, &[Key { name: key, deleted: false, values }])
}

fn merge(args: &RegistryMergeArgs) -> Result<Exit, Failure> {
    let bytes = std::fs::read(&args.reg).map_err(|error| host_failure(&args.reg, &error))?;
    let text = reg::decode(&bytes)
        .ok_or_else(|| Failure::failed(format!("{:?} is neither UTF-8 nor UTF-16", args.reg)))?;
    let keys = reg::parse(&text)
        .map_err(|line| Failure::failed(format!("{:?}: line {line} is not understood", args.reg)))?;
    let mut hive: Option<Hive> = None;
    let mut inside = Vec::new();
    for key in keys {
        let (its, name) = locate(&key.name)?;
        if hive.as_ref().is_some_and(|hive| !hive.is(&its)) {
            return Err(Failure::failed(format!(
                "{:?} changes several hives, which is not supported: split it by hive",
                args.reg
            )));
        }
        hive = Some(its);
        inside.push(Key { name, ..key });
    }
    let hive = hive.ok_or_else(|| Failure::failed(format!("{:?} names no key", args.reg)))?;
    change(&args.guest, hive, &inside)
}

/// What hivexregedit is to read: each key after those above it, which it does not make by itself.
fn with_parents(keys: &[Key]) -> String {
    let mut out = format!("{}\n", reg::HEADER);
    for key in keys {
        if !key.deleted {
            for (at, _) in key.name.match_indices('\\').filter(|(at, _)| *at > 0) {
                let parent =
                    Key { name: key.name.get(..at).unwrap_or_default().to_owned(), ..Key::default() };
                out.push_str(&parent.write(false));
            }
        }
        out.push_str(&key.write(false));
    }
    out
}

fn change(args: &GuestArgs, hive: Hive, keys: &[Key]) -> Result<Exit, Failure> {
    let mut opened = Opened::new(args, hive, Access::Write)?;
    opened.merge(&with_parents(keys))?;
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
            (Place::Config("SOFTWARE"), "HKEY_LOCAL_MACHINE\\SOFTWARE")
        );
        assert_eq!(key, "\\Microsoft\\X");
        let (hive, key) = locate("/data/my.hive!\\A\\B").unwrap();
        assert_eq!((hive.place, key.as_str()), (Place::Path("/data/my.hive".into()), "\\A\\B"));
        assert_eq!(locate("HKU\\bob\\X").unwrap().0.place, Place::User("bob".into()));
        assert!(locate("HKCR\\x").is_err() && locate("HKLM\\HARDWARE").is_err() && locate("HKU").is_err());
    }

    #[test]
    fn keys_above_are_made() {
        let key = |name: &str, deleted| Key { name: name.into(), deleted, values: Vec::new() };
        let text = with_parents(&[key("\\A\\B", false), key("\\", false), key("\\A\\C", true)]);
        let keys: Vec<&str> = text.lines().filter(|line| line.starts_with('[')).collect();
        assert_eq!(keys, ["[\\A]", "[\\A\\B]", "[\\]", "[-\\A\\C]"]);
    }
}
