//! `diskmill doctor`: what the file-system commands need of the machine, whether it is there, and what to do if not.

mod boot;
mod host;
mod kernel;
mod places;
mod programs;
mod report;

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;
use diskmill_guestfs::{Preparation, Prepared, Settings, kvm};
use serde_json::{Value, json};

use crate::exit::{Exit, Failure};
use crate::fs::settings::{self, Setting, SettingsArgs};
use crate::json::qemu_style;
use report::{Check, Status, Topic};

const EXAMPLES: &str = "\
Examples:
  diskmill doctor
  diskmill doctor --boot
  diskmill doctor kernel kvm
  diskmill doctor reflink --path /var/lib/images";

const NOTES: &str = "\
A `note` is something that is slower than it could be, or that one command lacks; a PROBLEM keeps the fs commands from \
working. Exit codes: 0 no problem; 1 at least one; 2 wrong usage.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = NOTES)]
pub(crate) struct DoctorArgs {
    /// What to look at [default: all but boot]
    #[arg(value_enum, value_name = "CHECK")]
    checks: Vec<Topic>,

    /// Start the appliance, too, and tell how long it takes
    #[arg(long)]
    boot: bool,

    /// Remove what killed runs have left
    #[arg(long)]
    fix: bool,

    /// Try KVM again, even if it is known what it is worth
    #[arg(long)]
    retest_kvm: bool,

    /// Where reflinks are tried
    #[arg(long, value_name = "DIR", default_value = ".")]
    path: PathBuf,

    /// Print one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    settings: SettingsArgs,
}

/// What the checks look at.
struct Machine {
    settings: Settings,
    /// Each setting, and where it comes from.
    shown: Vec<Setting>,
    /// What is wrong with them; they are defaults then.
    mistake: Option<String>,
    /// Emulation was asked for.
    forced_by_user: bool,
    prepared: Preparation,
}

impl Machine {
    fn new(args: &SettingsArgs) -> Self {
        let (settings, shown, mistake) = match settings::asked_for(args) {
            Ok((settings, shown)) => (settings, shown, None),
            Err(failure) => (Settings::default(), Vec::new(), failure.message),
        };
        let prepared = Prepared::look();
        Self { forced_by_user: settings.forces_emulation(), settings, shown, mistake, prepared }
    }

    fn qemu(&self) -> Option<PathBuf> {
        kvm::qemu(&self.settings)
    }

    /// The prepared appliance, if the settings let it be used.
    fn prepared(&self) -> Option<&Prepared> {
        let Preparation::Fit(prepared) = &self.prepared else { return None };
        let mut settings = self.settings.clone();
        prepared.apply(&mut settings);
        (settings.appliance.as_deref() == Some(prepared.folder())).then_some(prepared)
    }

    /// The folder of a complete appliance that is used as it is (guestfs(3), "FIXED APPLIANCE").
    fn fixed_appliance(&self) -> Option<PathBuf> {
        if let Some(prepared) = self.prepared() {
            return Some(prepared.folder().to_owned());
        }
        let complete = |dir: &PathBuf| {
            ["README.fixed", "kernel", "initrd", "root"].iter().all(|name| dir.join(name).exists())
        };
        std::env::split_paths(self.settings.appliance.as_deref().map_or(OsStr::new(""), Path::as_os_str))
            .find(complete)
    }
}

pub(crate) fn run(args: &DoctorArgs) -> Result<Exit, Failure> {
    let machine = Machine::new(&args.settings);
    let mut checks = Vec::new();
    for topic in topics(args) {
        let check = look(topic, &machine, args);
        if !args.json {
            // At once: some take their time.
            anstream::stdout().write_all(check.text().as_bytes())?;
        }
        checks.push(check);
    }
    let problems = checks.iter().filter(|check| check.status == Status::Problem).count();
    if args.json {
        writeln!(io::stdout(), "{}", qemu_style(&as_json(&checks, &machine, problems == 0)))?;
    } else if args.checks.is_empty() {
        summary(&checks, problems)?;
    }
    Ok(if problems == 0 { Exit::Done } else { Exit::Failed })
}

fn topics(args: &DoctorArgs) -> Vec<Topic> {
    use clap::ValueEnum as _;
    let all = Topic::value_variants().iter().copied();
    let wanted = |topic: &Topic| match args.checks.is_empty() {
        true => *topic != Topic::Boot || args.boot,
        false => args.checks.contains(topic) || (*topic == Topic::Boot && args.boot),
    };
    all.filter(wanted).collect()
}

fn look(topic: Topic, machine: &Machine, args: &DoctorArgs) -> Check {
    match topic {
        Topic::Guestfish => programs::guestfish(machine),
        Topic::Tools => programs::tools(machine),
        Topic::Qemu => programs::qemu(machine),
        Topic::Kvm => host::kvm(machine, args),
        Topic::Appliance => places::appliance(machine),
        Topic::Supermin => programs::supermin(machine),
        Topic::Kernel => kernel::kernel(machine),
        Topic::Memory => host::memory(machine),
        Topic::Cache => places::cache_space(machine),
        Topic::Tmp => places::tmp_space(machine),
        Topic::Fuse => host::fuse(),
        Topic::Settings => shown_settings(machine),
        Topic::IoUring => host::io_uring(),
        Topic::Reflink => host::reflink(args),
        Topic::Limits => host::limits(),
        Topic::Leftovers => places::leftovers(args.fix),
        Topic::Boot => boot::boot(&args.settings),
    }
}

/// The settings that somebody has set or that follow from the machine, and whether they can be what was meant.
fn shown_settings(machine: &Machine) -> Check {
    if let Some(mistake) = &machine.mistake {
        return Check::problem(
            Topic::Settings,
            mistake,
            "correct it, or unset it; the other checks go by the defaults",
        );
    }
    let shown = machine.shown.iter().filter(|setting| !setting.is_default());
    let found = shown.map(Setting::text).collect::<Vec<_>>().join(", ");
    match machine.settings.backend.as_str() {
        "direct" => Check::ok(Topic::Settings, found),
        backend => Check::note(
            Topic::Settings,
            format!("{found}: the backend {backend} is not tested with diskmill"),
            "LIBGUESTFS_BACKEND=direct, if something fails",
        ),
    }
}

fn as_json(checks: &[Check], machine: &Machine, ok: bool) -> Value {
    let settings: Vec<Value> = machine
        .shown
        .iter()
        .map(|setting| json!({"name": setting.name, "value": setting.value, "from": setting.from}))
        .collect();
    json!({"ok": ok, "checks": checks, "settings": settings})
}

fn summary(checks: &[Check], problems: usize) -> io::Result<()> {
    let notes = checks.iter().filter(|check| check.status == Status::Note).count();
    let text = match (problems, notes) {
        (0, 0) => "All is well.".to_owned(),
        (0, notes) => format!("The fs commands can work ({notes} to note)."),
        (1, _) => "1 problem keeps the fs commands from working.".to_owned(),
        (problems, _) => format!("{problems} problems keep the fs commands from working."),
    };
    writeln!(io::stdout(), "\n{text}")
}
