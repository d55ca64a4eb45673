//! Settings of the appliance: flags first, then the `LIBGUESTFS_*` variables, then the configuration file, then what
//! suits the machine.

use std::env;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use diskmill_guestfs::kvm::{self, Verdict};
use diskmill_guestfs::{Prepared, Settings};
use serde::Deserialize;

use super::{defaults, memory};
use crate::exit::Failure;

/// How long a kept session waits for the next command.
const IDLE: Duration = Duration::from_secs(15 * 60);

#[derive(Debug, Default, Clone, Args)]
pub(crate) struct SettingsArgs {
    /// Memory of the appliance in MiB
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(within(Settings::MEMORY_MIB)))]
    pub(crate) memsize: Option<u32>,

    /// Virtual CPUs of the appliance
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(within(Settings::CPUS)))]
    pub(crate) smp: Option<u32>,

    /// libguestfs' backend: direct, libvirt, libvirt:URI or unix:PATH
    #[arg(long, value_name = "NAME", value_parser = backend)]
    pub(crate) backend: Option<String>,

    /// Longest time for the start, in seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(Settings::START_SECS))]
    pub(crate) start_timeout: Option<u64>,

    /// Longest time that a call may show no sign of life, in seconds; 0 waits for ever
    #[arg(long, value_name = "SECONDS")]
    pub(crate) call_timeout: Option<u64>,

    /// How long a kept session waits for the next command, in seconds
    #[arg(long, value_name = "SECONDS")]
    pub(crate) idle_timeout: Option<u64>,
}

/// A range as clap has it.
fn within(range: RangeInclusive<u32>) -> RangeInclusive<i64> {
    i64::from(*range.start())..=i64::from(*range.end())
}

fn backend(name: &str) -> Result<String, String> {
    let mut settings = Settings::default();
    name.clone_into(&mut settings.backend);
    settings.check().map(|()| settings.backend).map_err(|error| error.message().to_owned())
}

/// The configuration file: `$XDG_CONFIG_HOME/diskmill/config.toml`, by default below `~/.config`.
#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    fs: FsTable,
}

/// Its table `[fs]`. Times are seconds.
#[derive(Debug, Default, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FsTable {
    memsize: Option<u32>,
    smp: Option<u32>,
    backend: Option<String>,
    backend_settings: Option<String>,
    cache_dir: Option<PathBuf>,
    tmp_dir: Option<PathBuf>,
    appliance: Option<PathBuf>,
    start_timeout: Option<u64>,
    call_timeout: Option<u64>,
    idle_timeout: Option<u64>,
}

/// The settings for an image of `size` bytes, and how long a kept session stays idle. Where KVM is there and does not boot, it
/// is not used; an appliance that is prepared is.
pub(crate) fn settings(args: &SettingsArgs, size: u64) -> Result<(Settings, Duration), Failure> {
    let (mut settings, idle) = merge(args, from_file()?, from_env()?, in_env);
    let verdict = kvm_of(&settings).map(|qemu| kvm::verdict(&qemu, false));
    if settings.backend_settings.is_none() && verdict.as_ref().is_some_and(Verdict::hangs) {
        settings.backend_settings = Some("force_tcg".to_owned());
    }
    fill(&mut settings, size, verdict.as_ref());
    if let Some(prepared) = Prepared::find() {
        prepared.apply(&mut settings);
    }
    Ok((settings, idle))
}

/// The QEMU that may use KVM, if these settings let it.
fn kvm_of(settings: &Settings) -> Option<PathBuf> {
    if settings.backend == "direct" && !settings.forces_emulation() { kvm::qemu(settings) } else { None }
}

/// What nobody has set, by the machine and the size of the image.
fn fill(settings: &mut Settings, size: u64, verdict: Option<&Verdict>) {
    settings.memory_mib.get_or_insert_with(|| defaults::memory_mib(size, memory::free()));
    let allowed = || std::thread::available_parallelism().map_or(1, usize::from);
    settings.cpus.get_or_insert_with(|| defaults::cpus(verdict.is_some_and(Verdict::works), allowed()));
}

fn from_file() -> Result<FsTable, Failure> {
    path().map_or(Ok(FsTable::default()), |path| read(&path))
}

fn from_env() -> Result<Settings, Failure> {
    Settings::from_env().map_err(|error| Failure::usage(error.to_string()))
}

fn in_env(name: &str) -> bool {
    env::var_os(name).is_some_and(|value| !value.is_empty())
}

/// A setting, for people.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    /// As in the configuration file.
    pub(crate) name: &'static str,
    /// `None` is what libguestfs does by itself.
    pub(crate) value: Option<String>,
    /// A flag, a variable, the configuration file, the machine, or `default`.
    pub(crate) from: String,
}

impl Setting {
    /// Whether it is the same everywhere.
    pub(crate) fn is_default(&self) -> bool {
        self.from == DEFAULT
    }

    pub(crate) fn text(&self) -> String {
        format!("{} = {} ({})", self.name, self.value.as_deref().unwrap_or("none"), self.from)
    }
}

const DEFAULT: &str = "default";
const MACHINE: &str = "default for this machine";

/// The settings as they were asked for, and where each comes from; those by the machine are shown for a small image.
pub(crate) fn asked_for(args: &SettingsArgs) -> Result<(Settings, Vec<Setting>), Failure> {
    let file = from_file()?;
    let shown = origins(args, &file, in_env);
    let (settings, idle) = merge(args, file, from_env()?, in_env);
    let mut filled = settings.clone();
    fill(&mut filled, 0, kvm_of(&settings).and_then(|qemu| kvm::known(&qemu)).as_ref());
    let seconds = |time: Duration| Some(time.as_secs().to_string());
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let flag = |on: bool| Some(on.to_string());
    let values = [
        filled.memory_mib.map(|mib| mib.to_string()),
        filled.cpus.map(|cpus| cpus.to_string()),
        Some(settings.backend.clone()),
        settings.backend_settings.clone(),
        path(&settings.cache_dir),
        path(&settings.tmp_dir),
        path(&settings.appliance),
        path(&settings.hypervisor),
        flag(settings.debug),
        flag(settings.trace),
        seconds(settings.start_timeout),
        Some(settings.call_timeout.map_or(0, |time| time.as_secs()).to_string()),
        seconds(idle),
    ];
    let shown = shown.into_iter().zip(values).map(|((name, from), value)| Setting { name, value, from });
    Ok((settings, shown.collect()))
}

/// Each setting's name, and where its value comes from.
fn origins(
    args: &SettingsArgs,
    file: &FsTable,
    in_env: impl Fn(&str) -> bool,
) -> [(&'static str, String); 13] {
    let of = |name: &'static str, variable: &str, flag: bool, in_file: bool| {
        let from = if flag {
            format!("--{name}")
        } else if in_env(variable) {
            variable.to_owned()
        } else if in_file {
            "config.toml".to_owned()
        } else if ["memsize", "smp"].contains(&name) {
            MACHINE.to_owned()
        } else {
            DEFAULT.to_owned()
        };
        (name, from)
    };
    [
        of("memsize", "LIBGUESTFS_MEMSIZE", args.memsize.is_some(), file.memsize.is_some()),
        of("smp", "LIBGUESTFS_SMP", args.smp.is_some(), file.smp.is_some()),
        of("backend", "LIBGUESTFS_BACKEND", args.backend.is_some(), file.backend.is_some()),
        of("backend-settings", "LIBGUESTFS_BACKEND_SETTINGS", false, file.backend_settings.is_some()),
        of("cache-dir", "LIBGUESTFS_CACHEDIR", false, file.cache_dir.is_some()),
        of("tmp-dir", "LIBGUESTFS_TMPDIR", false, file.tmp_dir.is_some()),
        of("appliance", "LIBGUESTFS_PATH", false, file.appliance.is_some()),
        of("hypervisor", "LIBGUESTFS_HV", false, false),
        of("debug", "LIBGUESTFS_DEBUG", false, false),
        of("trace", "LIBGUESTFS_TRACE", false, false),
        of("start-timeout", "", args.start_timeout.is_some(), file.start_timeout.is_some()),
        of("call-timeout", "", args.call_timeout.is_some(), file.call_timeout.is_some()),
        of("idle-timeout", "", args.idle_timeout.is_some(), file.idle_timeout.is_some()),
    ]
}

fn merge(
    args: &SettingsArgs,
    file: FsTable,
    mut out: Settings,
    in_env: impl Fn(&str) -> bool,
) -> (Settings, Duration) {
    let unless = |name: &str| !in_env(name);
    out.memory_mib =
        args.memsize.or_else(|| file.memsize.filter(|_| unless("LIBGUESTFS_MEMSIZE"))).or(out.memory_mib);
    out.cpus = args.smp.or_else(|| file.smp.filter(|_| unless("LIBGUESTFS_SMP"))).or(out.cpus);
    let from_file = file.backend.filter(|_| unless("LIBGUESTFS_BACKEND"));
    if let Some(backend) = args.backend.clone().or(from_file) {
        out.backend = backend;
    }
    let from_file = file.backend_settings.filter(|_| unless("LIBGUESTFS_BACKEND_SETTINGS"));
    out.backend_settings = from_file.or(out.backend_settings);
    out.cache_dir = file.cache_dir.filter(|_| unless("LIBGUESTFS_CACHEDIR")).or(out.cache_dir);
    out.tmp_dir = file.tmp_dir.filter(|_| unless("LIBGUESTFS_TMPDIR")).or(out.tmp_dir);
    out.appliance = file.appliance.filter(|_| unless("LIBGUESTFS_PATH")).or(out.appliance);
    if let Some(seconds) = args.start_timeout.or(file.start_timeout) {
        out.start_timeout = Duration::from_secs(seconds);
    }
    if let Some(seconds) = args.call_timeout.or(file.call_timeout) {
        out.call_timeout = Some(seconds).filter(|&seconds| seconds > 0).map(Duration::from_secs);
    }
    let idle = args.idle_timeout.or(file.idle_timeout).map_or(IDLE, Duration::from_secs);
    (out, idle)
}

fn path() -> Option<PathBuf> {
    let folder = |name: &str| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let config = folder("XDG_CONFIG_HOME").or_else(|| Some(folder("HOME")?.join(".config")))?;
    Some(config.join("diskmill/config.toml"))
}

fn read(path: &Path) -> Result<FsTable, Failure> {
    let failed =
        |error: &dyn std::fmt::Display| Failure::usage(format!("the configuration file {path:?}: {error}"));
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let table = toml::from_str::<File>(&text).map_err(|error| failed(&error))?.fs;
            let (alone, _) = merge(&SettingsArgs::default(), table.clone(), Settings::default(), |_| false);
            alone.check().map_err(|error| failed(&error))?;
            Ok(table)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(FsTable::default()),
        Err(error) => Err(failed(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_beat_the_environment_which_beats_the_file() {
        let file = |text: &str| toml::from_str::<File>(text).unwrap().fs;
        let text = "[fs]\nmemsize = 1000\nsmp = 2\nbackend = 'libvirt'\ncall-timeout = 0\nidle-timeout = 5\n";
        let mut env = Settings::default();
        env.memory_mib = Some(2000);
        let by = |args| merge(args, file(text), env.clone(), |name| name == "LIBGUESTFS_MEMSIZE");
        let none = SettingsArgs::default();
        let (settings, idle) = by(&none);
        assert_eq!((settings.memory_mib, settings.cpus), (Some(2000), Some(2)));
        assert_eq!((settings.backend.as_str(), settings.call_timeout), ("libvirt", None));
        assert_eq!(idle, Duration::from_secs(5));
        let args = SettingsArgs {
            memsize: Some(3000),
            backend: Some("direct".into()),
            call_timeout: Some(9),
            ..SettingsArgs::default()
        };
        let (settings, _) = by(&args);
        assert_eq!((settings.memory_mib, settings.backend.as_str()), (Some(3000), "direct"));
        assert_eq!(settings.call_timeout, Some(Duration::from_secs(9)));
    }

    #[test]
    fn each_setting_tells_where_it_comes_from() {
        let file: FsTable = toml::from_str("memsize = 1000\nsmp = 2\nbackend = 'libvirt'").unwrap();
        let args = SettingsArgs { memsize: Some(3000), ..SettingsArgs::default() };
        let found = origins(&args, &file, |name| ["LIBGUESTFS_SMP", "LIBGUESTFS_HV"].contains(&name));
        let from = |name: &str| found.iter().find(|(other, _)| *other == name).unwrap().1.clone();
        assert_eq!(["memsize", "smp", "backend"].map(from), ["--memsize", "LIBGUESTFS_SMP", "config.toml"]);
        assert_eq!(["hypervisor", "idle-timeout"].map(from), ["LIBGUESTFS_HV", DEFAULT]);
        let found = origins(&SettingsArgs::default(), &FsTable::default(), |_| false);
        assert_eq!([&found[0].1, &found[1].1, &found[2].1], [MACHINE, MACHINE, DEFAULT]);
    }

    #[test]
    fn what_somebody_has_set_wins_over_the_machine() {
        let mut settings = Settings::default();
        settings.cpus = Some(7);
        fill(&mut settings, 0, None);
        let mib = settings.memory_mib.unwrap();
        assert!((512..=1280).contains(&mib) && settings.cpus == Some(7), "{mib}");
        settings.memory_mib = Some(300);
        fill(&mut settings, u64::MAX, None);
        assert_eq!(settings.memory_mib, Some(300));
    }

    #[test]
    fn mistakes_in_the_file_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        assert_eq!(read(&path).unwrap(), FsTable::default());
        for (wrong, word) in [
            ("[fs]\nmemory = 1\n", "memory"),
            ("[fs]\nsmp = 'two'\n", "two"),
            ("[other]\n", "other"),
            ("[fs]\nmemsize = 10\n", "memsize is \"10\": it must be a whole number from 256"),
            ("[fs]\nsmp = 0\n", "smp is \"0\""),
            ("[fs]\nbackend = 'foo'\n", "backend is \"foo\": it must be direct"),
            ("[fs]\nstart-timeout = 0\n", "start-timeout is \"0\""),
        ] {
            std::fs::write(&path, wrong).unwrap();
            let said = read(&path).unwrap_err().message.unwrap();
            assert!(said.contains("config.toml") && said.contains(word), "{wrong}: {said}");
        }
    }
}
