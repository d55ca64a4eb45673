//! `diskmill fs`: file systems inside images, through a session with guestfish.

pub(crate) mod args;
mod content;
mod copied;
mod copy;
mod customize;
pub(crate) mod defaults;
mod diff;
pub(crate) mod drive;
mod edit;
mod external;
mod extract;
#[cfg(test)]
mod extract_tests;
pub(crate) mod failure;
mod files;
mod grow;
pub(crate) mod guest;
pub(crate) mod headings;
mod inspect;
pub(crate) mod kept;
mod keys;
pub(crate) mod leftovers;
mod list;
mod many;
pub(crate) mod memory;
mod meta;
mod name;
pub(crate) mod order;
pub(crate) mod output;
mod pack;
mod paths;
pub(crate) mod prepare;
mod registry;
mod replace;
mod reply;
mod run;
pub(crate) mod settings;
mod sparsify;
pub(crate) mod table;
mod target;
mod tools;
pub(crate) mod watch;

use args::{FsArgs, Verb};

use crate::exit::{Exit, Failure};

pub(crate) fn run(args: FsArgs) -> Result<Exit, Failure> {
    // Appliances may outlive us. Before Linux 5.11 they hold on to what our caller has open.
    let _ = diskmill::inherit_nothing();
    leftovers::sweep();
    match args.verb {
        Verb::List(args) => list::list(&args),
        Verb::Inspect(args) => inspect::inspect(&args),
        Verb::Df(args) => list::df(&args),
        Verb::Ls(args) => files::ls(&args),
        Verb::Tree(args) => files::tree(&args),
        Verb::Cat(args) => files::cat(&args),
        Verb::Stat(args) => files::stat(&args),
        Verb::Find(args) => files::find(&args),
        Verb::Get(args) => copy::get(&args),
        Verb::Put(args) => copy::put(&args),
        Verb::TarOut(args) => copy::tar_out(&args),
        Verb::TarIn(args) => copy::tar_in(&args),
        Verb::Rm(args) => files::rm(&args),
        Verb::Mkdir(args) => files::mkdir(&args),
        Verb::Edit(args) => edit::edit(&args),
        Verb::Diff(args) => diff::diff(&args),
        Verb::Run(args) => run::run(&args),
        Verb::Customize(args) => customize::customize(&args),
        Verb::Sysprep(args) => customize::sysprep(&args),
        Verb::Sparsify(args) => sparsify::sparsify(&args),
        Verb::Grow(args) => grow::grow(&args),
        Verb::Mount(args) => tools::mount(&args),
        Verb::Umount(args) => tools::umount(&args),
        Verb::Registry(verb) => registry::registry(&verb),
        Verb::Script(args) => tools::script(&args),
        Verb::Shell(args) => tools::shell(&args),
        Verb::Prepare(args) => prepare::prepare(&args),
    }
}
