//! What verbs print.

use std::io::{self, Write as _};

use serde_json::Value;

use crate::exit::{Exit, Failure};
use crate::json::qemu_style;

/// Prints one value as the other verbs of the program do: indented, printable ASCII only.
pub(crate) fn print_json(value: &Value) -> Result<Exit, Failure> {
    writeln!(io::stdout(), "{}", qemu_style(value))?;
    Ok(Exit::Done)
}
