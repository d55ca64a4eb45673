//! `inspect`: which operating systems an image holds.

use std::io::{self, Write as _};
use std::path::Path;

use diskmill_guestfs::Command;
use serde_json::{Map, Value, json};

use super::args::{InspectArgs, ManyArgs};
use super::guest::{Access, Guest};
use super::many;
use super::output::print_json;
use super::reply::{Record, pairs, texts};
use super::table::Table;
use crate::exit::{Exit, Failure};
use crate::names;

/// One operating system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct System {
    root: String,
    /// Facts by libguestfs' name for them, in the order of [`FACTS`]. Unknown ones are left out.
    facts: Vec<(&'static str, String)>,
    mounts: Vec<(String, String)>,
    filesystems: Vec<String>,
    drives: Vec<(String, String)>,
    apps: Option<Vec<App>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct App {
    name: String,
    version: String,
    arch: String,
    summary: String,
}

/// The guestfish command for each fact, and the names that the fact has for people and in JSON.
const FACTS: [(&str, &str, &str); 13] = [
    ("inspect-get-type", "type", "type"),
    ("inspect-get-distro", "distribution", "distro"),
    ("inspect-get-product-name", "product", "product-name"),
    ("inspect-get-product-variant", "variant", "product-variant"),
    ("inspect-get-major-version", "", "major-version"),
    ("inspect-get-minor-version", "", "minor-version"),
    ("inspect-get-arch", "architecture", "arch"),
    ("inspect-get-hostname", "host name", "hostname"),
    ("inspect-get-osinfo", "osinfo", "osinfo"),
    ("inspect-get-package-format", "packages", "package-format"),
    ("inspect-get-package-management", "package manager", "package-management"),
    ("inspect-get-windows-systemroot", "system root", "windows-systemroot"),
    ("inspect-get-windows-current-control-set", "control set", "windows-current-control-set"),
];

pub(crate) fn inspect(args: &InspectArgs) -> Result<Exit, Failure> {
    let many = &args.many;
    let inspected = many::each(many, |file| systems(many, file, args.apps))?;
    if many.image.json {
        let all = |systems: &Vec<System>| systems.iter().map(System::json).collect();
        print_json(&many::values(&many.files, &inspected, "operating-systems", all))?;
    } else {
        let text = many::texts(&many.files, &inspected, |systems| {
            systems.iter().map(System::text).collect::<Vec<_>>().join("\n")
        });
        io::stdout().write_all(text.as_bytes())?;
    }
    many::outcome(&many.files, &inspected)
}

fn systems(args: &ManyArgs, file: &Path, apps: bool) -> Result<Vec<System>, Failure> {
    let mut guest = Guest::unmounted(&args.image, file, Access::Read)?;
    let mounts = guest.take_mounts()?;
    let mut systems = Vec::new();
    for root in guest.roots()? {
        systems.push(System::inspect(&mut guest, root, apps)?);
    }
    guest.restore_mounts(&mounts)?;
    guest.finish()?;
    if systems.is_empty() {
        return Err(Failure::failed("no operating system found; `diskmill fs list` shows the file systems"));
    }
    Ok(systems)
}

impl System {
    fn inspect(guest: &mut Guest, root: String, apps: bool) -> Result<Self, Failure> {
        let mut system = Self { root, ..Self::default() };
        for (command, _, key) in FACTS {
            // What does not apply to the system is an error or "unknown".
            if let Some(fact) = guest.try_call(Command::new(command).arg(&system.root))? {
                let fact = String::from_utf8_lossy(&fact).trim_end().to_owned();
                if !fact.is_empty() && fact != "unknown" {
                    system.facts.push((key, fact));
                }
            }
        }
        system.mounts = guest.mount_points(&system.root)?;
        system.filesystems = texts(&guest.call(Command::new("inspect-get-filesystems").arg(&system.root))?);
        let drives = guest.try_call(Command::new("inspect-get-drive-mappings").arg(&system.root))?;
        system.drives = pairs(&drives.unwrap_or_default());
        if apps {
            system.apps = Some(system.list_apps(guest)?);
        }
        Ok(system)
    }

    /// The packages; for these the file systems must be mounted.
    fn list_apps(&self, guest: &mut Guest) -> Result<Vec<App>, Failure> {
        for (folder, device) in &self.mounts {
            let mounted = guest.try_call(Command::new("mount-ro").arg(device).arg(folder))?;
            if mounted.is_none() && folder == "/" {
                return Err(Failure::failed(format!("{}: cannot be mounted", names::shown(device))));
            }
        }
        let output = guest.call(Command::new("inspect-list-applications2").arg(&self.root))?;
        guest.call(Command::new("umount-all"))?;
        let app = |record: Record| {
            let text = |key| record.text(key);
            let version =
                match (record.number::<i64>("app2_epoch").unwrap_or(0), text("app2_release").as_str()) {
                    (0, "") => text("app2_version"),
                    (0, release) => format!("{}-{release}", text("app2_version")),
                    (epoch, "") => format!("{epoch}:{}", text("app2_version")),
                    (epoch, release) => format!("{epoch}:{}-{release}", text("app2_version")),
                };
            App { name: text("app2_name"), version, arch: text("app2_arch"), summary: text("app2_summary") }
        };
        Ok(Record::list(&output).into_iter().map(app).collect())
    }

    fn fact(&self, key: &str) -> &str {
        self.facts.iter().find(|(known, _)| *known == key).map_or("", |(_, fact)| fact)
    }

    /// `12.5`, where both numbers are known.
    fn version(&self) -> String {
        match (self.fact("major-version"), self.fact("minor-version")) {
            ("" | "0", "" | "0") => String::new(),
            (major, "") => major.to_owned(),
            (major, minor) => format!("{major}.{minor}"),
        }
    }

    fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |key: &str, value: &str| {
            if !value.is_empty() {
                out.push_str(&format!("{key:>16}: {}\n", names::shown(value)));
            }
        };
        line("root", &self.root);
        for (_, title, key) in FACTS.iter().filter(|(_, title, _)| !title.is_empty()) {
            line(title, self.fact(key));
            if *key == "product-name" {
                line("version", &self.version());
            }
        }
        for (folder, device) in &self.mounts {
            line("mount point", &format!("{folder} on {device}"));
        }
        for (letter, device) in &self.drives {
            line("drive", &format!("{letter}: on {device}"));
        }
        if let Some(apps) = &self.apps {
            let mut table = Table::new(&["PACKAGE", "VERSION", "ARCH"]);
            for app in apps {
                table.row([&app.name, &app.version, &app.arch].map(|text| names::shown(text).into_owned()));
            }
            out.push('\n');
            out.push_str(&table.text());
        }
        out
    }

    fn json(&self) -> Value {
        let mut object = Map::new();
        object.insert("root".to_owned(), json!(self.root));
        for (_, _, key) in FACTS {
            let fact = self.fact(key);
            let value = match (key, fact.parse::<i64>()) {
                (_, _) if fact.is_empty() => Value::Null,
                ("major-version" | "minor-version", Ok(number)) => json!(number),
                _ => json!(fact),
            };
            object.insert(key.to_owned(), value);
        }
        let mounts = self.mounts.iter().map(|(folder, device)| json!({ "path": folder, "device": device }));
        object.insert("mount-points".to_owned(), mounts.collect());
        object.insert("filesystems".to_owned(), json!(self.filesystems));
        let drives = self.drives.iter().map(|(letter, device)| json!({ "drive": letter, "device": device }));
        object.insert("drive-mappings".to_owned(), drives.collect());
        if let Some(apps) = &self.apps {
            let apps = apps.iter().map(|app| {
                json!({ "name": app.name, "version": app.version, "arch": app.arch, "summary": app.summary })
            });
            object.insert("applications".to_owned(), apps.collect());
        }
        object.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_that_are_not_known_are_not_shown() {
        let mut system = System { root: "/dev/sda1".into(), ..System::default() };
        system.facts =
            vec![("type", "linux".into()), ("major-version", "12".into()), ("minor-version", "5".into())];
        system.mounts = vec![("/".into(), "/dev/sda1".into())];
        system.apps = Some(vec![App {
            name: "a\x1b".into(),
            version: "1".into(),
            arch: "amd64".into(),
            summary: String::new(),
        }]);
        let text = system.text();
        assert!(
            text.contains("type: linux\n") && !text.contains("host name") && text.contains("a\\u{1b}"),
            "{text}"
        );
        let json = system.json();
        assert_eq!((&json["major-version"], &json["hostname"]), (&json!(12), &Value::Null));
        assert_eq!(json["mount-points"][0], json!({ "path": "/", "device": "/dev/sda1" }));
        assert_eq!(system.version(), "12.5");
    }
}
