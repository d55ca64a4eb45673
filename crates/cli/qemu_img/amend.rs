//! `qemu-img amend`.

use std::io::{Write, stdout};

use super::drivers::Driver;
use super::getopt::Args;
use super::node::Context;
use super::opts::{Dict, join};
use super::{Fail, Outcome};
use crate::options::asks_for_help;

pub(super) fn run(args: Args) -> Outcome {
    let Some(list) = join(args.all("options"))? else {
        return Err(Fail::usage("Must specify options (-o)"));
    };
    if asks_for_help(&list)
        && let Some(format) = args.text("format")
    {
        let driver = Driver::amending(&format).map_err(Fail::new)?;
        stdout().write_all(driver.help(true).as_bytes())?;
        return Ok(0);
    }
    let file = args.one_file()?;
    let (_, image) = Context::of(&args, "format")?.open(file)?;
    let driver = Driver::amending(image.info().format.name()).map_err(Fail::new)?;
    if asks_for_help(&list) {
        stdout().write_all(driver.help(true).as_bytes())?;
        return Ok(0);
    }
    driver.check(&Dict::from_list(&list)).map_err(Fail::new)?;
    Err(Fail::new("amending images is not supported yet: only -o help is"))
}
