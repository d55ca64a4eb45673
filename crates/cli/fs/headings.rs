//! The order of a verb's help: its own arguments, what all verbs take, the appliance.

use clap::{Args, Command, Id};

use super::args::GuestArgs;
use super::settings::SettingsArgs;

/// Verbs that refuse `--keep`: they run a tool with an appliance of its own, or keep their session anyway.
const WITHOUT_KEEP: [&str; 6] = ["customize", "sysprep", "mount", "script", "shell", "start"];

/// The verb with its options under their headings. clap's own way, a heading for all that follows, would take in the
/// arguments of the verb, which stand behind the shared ones.
pub(crate) fn arranged(command: Command) -> Command {
    let (appliance, shared) = (ids::<SettingsArgs>(), ids::<GuestArgs>());
    let takes_image = command.get_arguments().any(|arg| arg.get_id() == "force_share");
    let keeps = !WITHOUT_KEEP.contains(&command.get_name());
    let command = command.mut_args(|arg| {
        let heading = if appliance.contains(arg.get_id()) {
            Some("Appliance")
        } else if takes_image && !arg.is_positional() && shared.contains(arg.get_id()) {
            Some("General")
        } else {
            None
        };
        let hidden = arg.is_hide_set() || (arg.get_id() == "keep" && !keeps);
        arg.help_heading(heading).hide(hidden)
    });
    command.mut_subcommands(arranged)
}

fn ids<T: Args>() -> Vec<Id> {
    T::augment_args(Command::new("")).get_arguments().map(|arg| arg.get_id().clone()).collect()
}
