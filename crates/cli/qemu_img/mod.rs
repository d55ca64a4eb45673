//! The personality: started under the name `qemu-img`, diskmill takes qemu-img's command lines and prints what
//! qemu-img prints, for raw, qcow2 and VMDK. The meaning comes from the library; here are only words.
//!
//! Where texts or behaviour differ on purpose stands in `docs/qemu-img.md`.

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod drivers;
mod getopt;
mod help;
mod info;
mod map;
mod measure;
mod messages;
mod node;
mod object;
mod opts;
mod rebase;
mod resize;
mod size;
mod snapshot;
mod syntax;
mod target;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use diskmill::convert::Monitor;

use crate::args::{CacheMode, OutputForm, ProgressArgs};
use crate::exit::{Exit, Failure};
use crate::progress::Progress;
use crate::signals::Watch;
use getopt::Args;

/// The release of QEMU whose command lines and texts are followed.
const PEER_VERSION: &str = "10.0.2";

/// How a command ends that does not end well: the exit code, and the lines for standard error.
#[derive(Debug)]
struct Fail {
    code: u8,
    message: Option<String>,
}

type Outcome<T = u8> = Result<T, Fail>;

impl Fail {
    fn new(message: impl Into<String>) -> Self {
        Self { code: 1, message: Some(message.into()) }
    }

    /// The command line is wrong.
    fn usage(message: impl std::fmt::Display) -> Self {
        Self::new(format!("{message}\nTry 'qemu-img --help' for more information"))
    }

    fn code(self, code: u8) -> Self {
        Self { code, ..self }
    }
}

impl From<Failure> for Fail {
    fn from(failure: Failure) -> Self {
        // qemu-img has no code of its own for mistakes in the command line.
        let exit = if failure.exit == Exit::Usage { Exit::Failed } else { failure.exit };
        Self { code: exit.code(), message: failure.message }
    }
}

impl From<std::io::Error> for Fail {
    /// Of an error while writing to standard output.
    fn from(error: std::io::Error) -> Self {
        Failure::from(error).into()
    }
}

type Run = fn(Args) -> Outcome;

/// The commands by name.
const COMMANDS: &[(&str, Run)] = &[
    ("amend", amend::run),
    ("bench", bench::run),
    ("bitmap", bitmap::run),
    ("check", check::run),
    ("commit", commit::run),
    ("compare", compare::run),
    ("convert", convert::run),
    ("create", create::run),
    ("dd", dd::run),
    ("info", info::run),
    ("map", map::run),
    ("measure", measure::run),
    ("rebase", rebase::run),
    ("resize", resize::run),
    ("snapshot", snapshot::run),
];

/// Whether the program was started under qemu-img's name.
pub(crate) fn is_called(program: Option<&OsStr>) -> bool {
    program.is_some_and(|program| Path::new(program).file_name() == Some(OsStr::new("qemu-img")))
}

/// Runs the command line (without the program's name).
pub(crate) fn main(args: Vec<OsString>) -> ExitCode {
    let outcome = run(args);
    match outcome {
        Ok(code) => code.into(),
        Err(Fail { code, message }) => {
            if let Some(message) = message {
                report(&message);
            }
            code.into()
        }
    }
}

/// Prints an error or a warning as qemu-img does.
fn report(message: &str) {
    eprintln!("qemu-img: {message}");
}

fn run(args: Vec<OsString>) -> Outcome {
    let Args { options, operands, .. } = getopt::leading(syntax::GLOBAL, args)?;
    for (option, _) in &options {
        match *option {
            "help" => return help::print(),
            "version" => return help::version(),
            // --trace: there is nothing to trace.
            _ => {}
        }
    }
    let mut operands = operands.into_iter();
    let Some(name) = operands.next() else { return Err(Fail::usage("Not enough arguments")) };
    let known = COMMANDS.iter().find(|(command, _)| name == *command);
    let Some((command, run)) = known else {
        return Err(Fail::usage(format!("Command not found: {}", name.to_string_lossy())));
    };
    let mut operands: Vec<OsString> = operands.collect();
    let size = (*command == "resize").then(|| resize::take_size(&mut operands)).flatten();
    let mut args = getopt::parse(syntax::of(command), operands)?;
    args.operands.extend(size);
    if args.has("help") {
        return help::command(command);
    }
    run(args)
}

/// `--output`.
fn output_form(args: &Args) -> Outcome<OutputForm> {
    match args.text("output").as_deref() {
        None | Some("human") => Ok(OutputForm::Human),
        Some("json") => Ok(OutputForm::Json),
        Some(_) => Err(Fail::usage("--output must be used with human or json as argument.")),
    }
}

/// A cache mode; `what` it is for stands in the message.
fn cache_mode(args: &Args, option: &str, what: &str) -> Outcome<Option<CacheMode>> {
    let mode = |name: String| match name.as_str() {
        "none" | "off" => Ok(CacheMode::None),
        "directsync" => Ok(CacheMode::Directsync),
        "writeback" => Ok(CacheMode::Writeback),
        "writethrough" => Ok(CacheMode::Writethrough),
        "unsafe" => Ok(CacheMode::Unsafe),
        other => Err(Fail::new(format!("Invalid {what} option: {other}"))),
    };
    args.text(option).map(mode).transpose()
}

/// Does work that takes long: `-p` and `-q` say whether its progress is shown, and a signal ends the program at once.
fn watched<T>(
    args: &Args,
    work: impl FnOnce(&Monitor) -> Result<T, diskmill::Error>,
) -> Outcome<Result<T, diskmill::Error>> {
    let monitor = Arc::new(Monitor::new());
    let _watch = Watch::start(&monitor, true)?;
    let progress = ProgressArgs::of_qemu_img(args.has("progress"), args.has("quiet"));
    let progress = Progress::start(&progress, false, &monitor);
    let result = work(&monitor);
    progress.finish(result.is_ok());
    Ok(result)
}
