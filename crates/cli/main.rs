//! `diskmill`: converts and examines disk images from the command line.
#![forbid(unsafe_code)]

mod amend;
mod args;
mod bitmap;
mod check;
mod commands;
mod commit;
mod compare;
mod convert;
mod create;
mod deferred;
mod doctor;
mod exit;
mod fs;
mod info;
mod install;
mod job;
mod json;
mod map;
mod measure;
mod names;
mod options;
mod progress;
mod qemu_img;
mod rebase;
mod resize;
mod say;
mod secrets;
mod serve;
mod session;
mod signals;
mod size;
mod snapshot;
mod snapshots;
mod verify;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use commands::{Cli, Command};

fn main() -> ExitCode {
    signals::outlive_size_limit();
    let mut args = std::env::args_os();
    if qemu_img::is_called(args.next().as_deref()) {
        return qemu_img::main(args.collect());
    }
    let words = fs::order::verb_first(std::env::args_os().collect(), Cli::command);
    let outcome = match Cli::parse_from(words).command {
        Command::Convert(args) => convert::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Bitmap(args) => bitmap::run(&args),
        Command::Fs(args) => fs::run(args.into_inner()),
        Command::Session(args) => session::run(args.into_inner()),
        Command::GuestfsCompanion(args) => fs::drive::companion(&args),
        Command::GuestfsKeeper => return diskmill_guestfs::keeper_main(),
        Command::InstallQemuImg(args) => install::run(&args),
        Command::QemuImg { line } => return qemu_img::main(line),
        Command::Commit(args) => commit::run(&args),
        Command::Measure(args) => measure::run(&args),
        Command::Rebase(args) => rebase::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Create(args) => create::run(&args),
        Command::Amend(args) => amend::run(&args),
        Command::Resize(args) => resize::run(&args),
        Command::Snapshot(args) => snapshot::run(&args),
    };
    let exit = outcome.unwrap_or_else(|failure| {
        say::failure(&failure);
        failure.exit
    });
    exit.into()
}
