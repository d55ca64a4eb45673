//! The program's commands. Their arguments stand with them; the shared ones in `args`.

use std::ffi::OsString;
use std::sync::LazyLock;

use clap::{Parser, Subcommand};

use crate::args::{CheckArgs, CompareArgs, ConvertArgs, InfoArgs, MapArgs};
use crate::deferred::Deferred;
use crate::fs::args::FsArgs;
use crate::fs::drive::CompanionArgs;
use crate::install::InstallArgs;

const EXAMPLES: &str = "\
Examples:
  diskmill convert disk.qcow2 disk.raw
  diskmill convert -O qcow2 -c -o compression_type=zstd disk.raw disk.qcow2
  diskmill convert -O raw disk.qcow2 - | ssh host 'cat > /dev/vdb'
  diskmill info disk.qcow2
  diskmill map --output json disk.qcow2
  diskmill compare disk.qcow2 disk.raw
  diskmill fs cat disk.vmdk /etc/os-release";

/// What `--version` says behind the name.
static VERSION: LazyLock<String> =
    LazyLock::new(|| format!("{} (codecs: {})", env!("CARGO_PKG_VERSION"), diskmill::codec_engines()));

/// Converts, examines and changes disk images: raw, qcow2, VMDK and OVA.
#[derive(Debug, Parser)]
#[command(name = "diskmill", version = VERSION.as_str(), before_help = EXAMPLES, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Copy images into a fresh one, in the same or another format
    Convert(Deferred<ConvertArgs>),
    /// Show what an image is
    Info(Deferred<InfoArgs>),
    /// Show where an image's guest data is stored
    Map(Deferred<MapArgs>),
    /// Tell whether two images show the guest the same bytes
    Compare(Deferred<CompareArgs>),
    /// Look for damage in an image, and repair it
    Check(Deferred<CheckArgs>),
    /// Tell how large a file a disk would need in a format
    Measure(Deferred<crate::measure::MeasureArgs>),
    /// Make an empty image
    Create(Deferred<crate::create::CreateArgs>),
    /// Make a disk longer or shorter
    Resize(Deferred<crate::resize::ResizeArgs>),
    /// Take, apply, list and delete internal snapshots
    Snapshot(Deferred<crate::snapshot::SnapshotArgs>),
    /// Move what an overlay has into its backing file
    Commit(Deferred<crate::commit::CommitArgs>),
    /// Give an image another backing file, or none
    Rebase(Deferred<crate::rebase::RebaseArgs>),
    /// List, add, remove, clear, enable, disable and merge persistent bitmaps of qcow2 images
    Bitmap(Deferred<crate::bitmap::BitmapArgs>),
    /// Change the properties of a qcow2 image: version, width of refcounts and the like
    Amend(Deferred<crate::amend::AmendArgs>),
    /// Serve an image over NBD
    Serve(Deferred<crate::serve::ServeArgs>),
    /// Look into images and change them: files, packages, partitions, registry
    Fs(Deferred<FsArgs>),
    /// Keep appliances running between file-system commands
    Session(Deferred<crate::session::SessionArgs>),
    /// Tell what file-system commands need of this machine, and what it lacks
    Doctor(Deferred<crate::doctor::DoctorArgs>),
    /// Accept a qemu-img command line, `dd` and `bench` among them, and print what qemu-img prints
    #[command(disable_help_flag = true)]
    QemuImg {
        /// A command of qemu-img's, and what belongs to it
        #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
        line: Vec<OsString>,
    },
    /// Make a link named qemu-img, under which diskmill takes qemu-img's command lines
    InstallQemuImg(Deferred<InstallArgs>),
    /// Started by file-system commands: ends their appliance whatever becomes of them
    #[command(hide = true)]
    GuestfsKeeper,
    /// Started by file-system commands: serves an image to an appliance that is kept
    #[command(hide = true)]
    GuestfsCompanion(Deferred<CompanionArgs>),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Cli;

    #[test]
    fn commands_have_their_own_texts_and_in_the_end_their_arguments() {
        let mut command = Cli::command();
        let texts = |command: &clap::Command| -> Vec<_> {
            let own = command.get_subcommands().filter(|command| command.get_name() != "help");
            own.map(|command| (command.get_name().to_owned(), command.get_about().cloned())).collect()
        };
        let before = texts(&command);
        let arguments = |command: &clap::Command| {
            command.find_subcommand("convert").map_or(0, |convert| convert.get_arguments().count())
        };
        assert_eq!(arguments(&command), 0);
        command.build();
        assert_eq!(texts(&command), before);
        assert!(arguments(&command) > 10);
        Cli::command().debug_assert();
    }
}
