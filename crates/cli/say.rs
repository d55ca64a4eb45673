//! What people are told on standard error, in colours if that is a terminal (and neither `NO_COLOR` nor `TERM=dumb` is set).

use std::fmt::Display;

use anstyle::{AnsiColor, Style};

use diskmill::without_os_codes;

use crate::exit::Failure;

/// Bad, of note, good, and what to do about it.
pub(crate) const BAD: Style = AnsiColor::Red.on_default().bold();
pub(crate) const NOTE: Style = AnsiColor::Yellow.on_default();
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
pub(crate) const HELP: Style = AnsiColor::Cyan.on_default();

/// Says why the program ends, and what helps.
pub(crate) fn failure(failure: &Failure) {
    if let Some(message) = &failure.message {
        anstream::eprintln!("{BAD}diskmill:{BAD:#} {}", without_os_codes(message));
    }
    if let Some(hint) = &failure.hint {
        anstream::eprintln!("{HELP}hint:{HELP:#} {hint}");
    }
}

/// Warns of something that does not stop the work.
pub(crate) fn warning(text: impl Display) {
    anstream::eprintln!("diskmill: {NOTE}warning:{NOTE:#} {}", without_os_codes(&text.to_string()));
}
