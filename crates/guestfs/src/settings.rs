//! What guestfish is told by its environment, and how long we wait.

use std::ffi::OsString;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use crate::{Error, Result};

use rustix::fs::Access;

/// How the appliance is run. [`Settings::from_env`] honours the variables that libguestfs documents (guestfs(3),
/// "ENVIRONMENT VARIABLES"); what is `None` is left to libguestfs.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct Settings {
    /// The program, a path or a name on `PATH`.
    pub guestfish: PathBuf,
    /// `LIBGUESTFS_BACKEND`: `direct`, `libvirt`, `libvirt:URI` or `unix:PATH` (guestfs(3), "BACKEND").
    pub backend: String,
    /// `LIBGUESTFS_BACKEND_SETTINGS`, such as `force_tcg`.
    pub backend_settings: Option<String>,
    /// `LIBGUESTFS_MEMSIZE`: memory of the appliance in MiB, in [`MEMORY_MIB`](Self::MEMORY_MIB).
    pub memory_mib: Option<u32>,
    /// `LIBGUESTFS_SMP`: virtual CPUs of the appliance, in [`CPUS`](Self::CPUS).
    pub cpus: Option<u32>,
    /// `LIBGUESTFS_CACHEDIR`: where the appliance is kept.
    pub cache_dir: Option<PathBuf>,
    /// `LIBGUESTFS_TMPDIR`: where overlays of read-only disks are kept while a session lasts.
    pub tmp_dir: Option<PathBuf>,
    /// `LIBGUESTFS_PATH`: a fixed appliance.
    pub appliance: Option<PathBuf>,
    /// `LIBGUESTFS_HV`: the program that runs the appliance.
    pub hypervisor: Option<PathBuf>,
    /// `LIBGUESTFS_APPEND`: more arguments for the appliance's kernel.
    pub append: Option<String>,
    /// `LIBGUESTFS_DEBUG`: messages of library and appliance.
    pub debug: bool,
    /// `LIBGUESTFS_TRACE`: each call of the library.
    pub trace: bool,
    /// Whether the guest may reach the network.
    pub network: bool,
    /// The longest time that the start may take, in [`START_SECS`](Self::START_SECS).
    pub start_timeout: Duration,
    /// The longest time that a call may take without any sign of life (output, input, progress).
    pub call_timeout: Option<Duration>,
}

/// A start under emulation takes 10 to 25 s of CPU time, and an appliance may have to be built first.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// Checks and resizes of large file systems are silent for minutes.
const CALL_TIMEOUT: Duration = Duration::from_secs(1800);

/// For the kernel of an emulated processor (Linux, Documentation/admin-guide/kernel-parameters.rst): QEMU's emulation speculates
/// on nothing that would have to be guarded against, and memory is not cleared for the kernel's own use (for programs it is).
const EMULATED: &str = "mitigations=off init_on_alloc=0";
/// In the environment of all that the appliance starts (systemd(1)): udev and systemd-tmpfiles report dozens of users that are
/// missing there, for each piece of which guestfish runs our event handler.
const QUIET: &str = "SYSTEMD_LOG_LEVEL=crit";

impl Default for Settings {
    fn default() -> Self {
        Self {
            guestfish: "guestfish".into(),
            backend: DIRECT.to_owned(),
            backend_settings: None,
            memory_mib: None,
            cpus: None,
            cache_dir: None,
            tmp_dir: None,
            appliance: None,
            hypervisor: None,
            append: None,
            debug: false,
            trace: false,
            network: false,
            start_timeout: START_TIMEOUT,
            call_timeout: Some(CALL_TIMEOUT),
        }
    }
}

impl Settings {
    /// Memory that an appliance may have, in MiB: with less it does not boot.
    pub const MEMORY_MIB: RangeInclusive<u32> = 256..=1 << 20;
    /// Virtual CPUs that it may have: libguestfs takes no more (guestfs(3), "guestfs_set_smp").
    pub const CPUS: RangeInclusive<u32> = 1..=255;
    /// Seconds that a start may take, a day at the most.
    pub const START_SECS: RangeInclusive<u64> = 1..=24 * 60 * 60;

    /// The settings by this process's environment.
    ///
    /// # Errors
    /// `Invalid` for a variable that libguestfs would refuse, or silently take for another value.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var_os(name))
    }

    /// The settings by these variables. An empty variable counts as none.
    fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let text = |name: &str| var(name).and_then(|value| value.into_string().ok());
        let number = |name: &str, range| {
            let number = |value: OsString| number(name, &value.to_string_lossy(), &range);
            var(name).map(number).transpose()
        };
        let backend = |value: OsString| backend("LIBGUESTFS_BACKEND", &value.to_string_lossy());
        let path = |name: &str| var(name).map(PathBuf::from);
        let flag = |name: &str| text(name).is_some_and(|value| truth(&value));
        Ok(Self {
            backend: var("LIBGUESTFS_BACKEND").map(backend).transpose()?.unwrap_or_else(|| DIRECT.to_owned()),
            backend_settings: text("LIBGUESTFS_BACKEND_SETTINGS"),
            memory_mib: number("LIBGUESTFS_MEMSIZE", Self::MEMORY_MIB)?,
            cpus: number("LIBGUESTFS_SMP", Self::CPUS)?,
            cache_dir: path("LIBGUESTFS_CACHEDIR"),
            tmp_dir: path("LIBGUESTFS_TMPDIR"),
            appliance: path("LIBGUESTFS_PATH"),
            hypervisor: path("LIBGUESTFS_HV"),
            append: text("LIBGUESTFS_APPEND"),
            debug: flag("LIBGUESTFS_DEBUG"),
            trace: flag("LIBGUESTFS_TRACE"),
            ..Self::default()
        })
    }

    /// Whether an appliance can be started with them.
    ///
    /// # Errors
    /// `Invalid`; the message begins with `memsize`, `smp`, `backend` or `start-timeout`.
    pub fn check(&self) -> Result<()> {
        self.memory_mib.map_or(Ok(()), |mib| within("memsize", mib, &Self::MEMORY_MIB))?;
        self.cpus.map_or(Ok(()), |cpus| within("smp", cpus, &Self::CPUS))?;
        // Less than a second is a test's.
        let seconds = self.start_timeout.as_secs().max(self.start_timeout.subsec_nanos().min(1).into());
        within("start-timeout", seconds, &Self::START_SECS)?;
        backend("backend", &self.backend).map(drop)
    }

    /// Whether KVM is ruled out.
    #[must_use]
    pub fn forces_emulation(&self) -> bool {
        self.backend_settings
            .as_deref()
            .is_some_and(|list| list.split(':').any(|setting| setting == "force_tcg"))
    }

    /// `LIBGUESTFS_APPEND`: arguments for the appliance's kernel. Under emulation first those that save time there, so that those
    /// that were asked for win.
    #[must_use]
    pub fn kernel_arguments(&self) -> Option<String> {
        // As libguestfs' backend "direct" decides.
        let emulated = self.backend == "direct"
            && (self.forces_emulation() || rustix::fs::access("/dev/kvm", Access::WRITE_OK).is_err());
        let ours = [(emulated, EMULATED), (emulated && !self.debug, QUIET)];
        let ours = ours.into_iter().filter_map(|(used, arguments)| used.then_some(arguments));
        let all: Vec<&str> = ours.chain(self.append.as_deref()).collect();
        (!all.is_empty()).then(|| all.join(" "))
    }

    /// Puts these settings into the environment of `command`, for libguestfs (guestfs(3), "ENVIRONMENT VARIABLES").
    pub fn apply(&self, command: &mut Command) {
        let text = |value: &Option<String>| value.as_ref().map(OsString::from);
        let path = |value: &Option<PathBuf>| value.as_ref().map(|path| path.clone().into_os_string());
        let number = |value: Option<u32>| value.map(|n| n.to_string().into());
        let flag = |on: bool| on.then(|| "1".into());
        let variables = [
            ("LIBGUESTFS_BACKEND", Some(self.backend.clone().into())),
            ("LIBGUESTFS_BACKEND_SETTINGS", text(&self.backend_settings)),
            ("LIBGUESTFS_MEMSIZE", number(self.memory_mib)),
            ("LIBGUESTFS_SMP", number(self.cpus)),
            ("LIBGUESTFS_CACHEDIR", path(&self.cache_dir)),
            ("LIBGUESTFS_TMPDIR", path(&self.tmp_dir)),
            ("LIBGUESTFS_PATH", path(&self.appliance)),
            ("LIBGUESTFS_HV", path(&self.hypervisor)),
            ("LIBGUESTFS_APPEND", self.kernel_arguments().map(OsString::from)),
            ("LIBGUESTFS_DEBUG", flag(self.debug)),
            ("LIBGUESTFS_TRACE", flag(self.trace)),
        ];
        for (name, value) in variables {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
    }
}

/// The backend that runs QEMU itself.
const DIRECT: &str = "direct";

/// The value of `name`, a whole number in `range`.
fn number<T: FromStr + PartialOrd + Display>(name: &str, text: &str, range: &RangeInclusive<T>) -> Result<T> {
    match text.trim().parse() {
        Ok(value) if range.contains(&value) => Ok(value),
        _ => Err(Error::invalid(format!(
            "{name} is {text:?}: it must be a whole number from {} to {}",
            range.start(),
            range.end()
        ))),
    }
}

fn within<T: FromStr + PartialOrd + Display>(name: &str, value: T, range: &RangeInclusive<T>) -> Result<()> {
    number(name, &value.to_string(), range).map(drop)
}

/// The value of `name`, a backend (guestfs(3), "BACKEND"): libguestfs itself says of another one that it is invalid, and
/// goes on with its default.
fn backend(name: &str, text: &str) -> Result<String> {
    match text {
        // The older name.
        "appliance" => Ok(DIRECT.to_owned()),
        DIRECT | "libvirt" => Ok(text.to_owned()),
        _ if ["libvirt:", "unix:"]
            .iter()
            .any(|kind| text.strip_prefix(kind).is_some_and(|of| !of.is_empty())) =>
        {
            Ok(text.to_owned())
        }
        _ => Err(Error::invalid(format!(
            "{name} is {text:?}: it must be direct, libvirt, libvirt:URI or unix:PATH"
        ))),
    }
}

/// As libguestfs reads a flag (guestfs(3)): `1`, `true`, `t`, `yes`, `y`, `on`.
fn truth(value: &str) -> bool {
    ["1", "true", "t", "yes", "y", "on"].iter().any(|word| word.eq_ignore_ascii_case(value.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_variables_count_and_empty_ones_do_not() {
        let vars = |name: &str| match name {
            "LIBGUESTFS_MEMSIZE" => Some("2048".into()),
            "LIBGUESTFS_BACKEND_SETTINGS" => Some("force_tcg:gdb".into()),
            "LIBGUESTFS_TRACE" => Some("1".into()),
            "LIBGUESTFS_PATH" => Some(OsString::new()),
            _ => None,
        };
        let settings = Settings::from_vars(vars).unwrap();
        assert_eq!((settings.memory_mib, settings.cpus), (Some(2048), None));
        assert!(settings.forces_emulation() && settings.trace && !settings.debug);
        assert_eq!((settings.backend.as_str(), settings.appliance), ("direct", None));
    }

    #[test]
    fn a_value_that_libguestfs_would_not_take_is_refused_wherever_it_comes_from() {
        let by = |name: &str, value: &str| {
            Settings::from_vars(|asked| (asked == name).then(|| value.into())).map_err(|e| e.to_string())
        };
        for (name, value, remedy) in [
            ("LIBGUESTFS_MEMSIZE", "10", "from 256 to 1048576"),
            ("LIBGUESTFS_MEMSIZE", "much", "a whole number"),
            ("LIBGUESTFS_MEMSIZE", "4294967296", "a whole number"),
            ("LIBGUESTFS_SMP", "0", "from 1 to 255"),
            ("LIBGUESTFS_SMP", "256", "from 1 to 255"),
            ("LIBGUESTFS_BACKEND", "foo", "direct, libvirt, libvirt:URI or unix:PATH"),
            ("LIBGUESTFS_BACKEND", "unix:", "unix:PATH"),
        ] {
            let error = by(name, value).unwrap_err();
            assert!(
                error.starts_with(&format!("{name} is \"{value}\": ")) && error.contains(remedy),
                "{error}"
            );
        }
        for backend in ["direct", "libvirt", "libvirt:qemu:///session", "unix:/run/guestfsd.sock"] {
            assert_eq!(by("LIBGUESTFS_BACKEND", backend).unwrap().backend, backend);
        }
        assert_eq!(by("LIBGUESTFS_BACKEND", "appliance").unwrap().backend, "direct");
        assert_eq!(by("LIBGUESTFS_MEMSIZE", " 256 ").unwrap().memory_mib, Some(256));

        let wrong = |settings: Settings| settings.check().unwrap_err().to_string();
        let default = Settings::default;
        default().check().unwrap();
        assert!(wrong(Settings { memory_mib: Some(255), ..default() }).starts_with("memsize is \"255\""));
        assert!(wrong(Settings { cpus: Some(0), ..default() }).starts_with("smp "));
        assert!(wrong(Settings { backend: "foo".to_owned(), ..default() }).starts_with("backend "));
        assert!(wrong(Settings { start_timeout: Duration::ZERO, ..default() }).starts_with("start-timeout "));
        assert!(wrong(Settings { start_timeout: Duration::MAX, ..default() }).starts_with("start-timeout "));
        Settings { start_timeout: Duration::from_millis(5), ..default() }.check().unwrap();
    }

    #[test]
    fn an_emulated_kernel_has_arguments_of_its_own_and_those_asked_for_behind_them() {
        let asked = Some("mitigations=auto".to_owned());
        let settings = |force: Option<&str>, append: &Option<String>| Settings {
            backend_settings: force.map(str::to_owned),
            append: append.clone(),
            ..Settings::default()
        };
        let all = settings(Some("force_tcg"), &asked).kernel_arguments().unwrap();
        assert_eq!(all, format!("{EMULATED} {QUIET} mitigations=auto"));
        let debug = Settings { debug: true, ..settings(Some("force_tcg"), &None) };
        assert_eq!(debug.kernel_arguments().unwrap(), EMULATED);
        let libvirt = |append| Settings { backend: "libvirt".into(), ..settings(Some("force_tcg"), append) };
        assert_eq!((libvirt(&asked).kernel_arguments(), libvirt(&None).kernel_arguments()), (asked, None));
    }
}
