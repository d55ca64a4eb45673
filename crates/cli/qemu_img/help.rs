//! `--help` and `--version`.

use std::io::{Write, stdout};

use super::{COMMANDS, Outcome, PEER_VERSION, syntax};

/// Scripts look for `qemu-img version X.Y.Z` and for the list of formats.
pub(super) fn version() -> Outcome {
    writeln!(stdout(), "qemu-img version {PEER_VERSION} (diskmill {})", diskmill::VERSION)?;
    Ok(0)
}

pub(super) fn print() -> Outcome {
    let mut text = format!(
        "qemu-img version {PEER_VERSION} (diskmill {})\n\
         usage: qemu-img [standard options] command [command options]\n\
         diskmill in place of QEMU's disk image utility: the same command lines for raw, qcow2 and vmdk\n\n\
         Standard options:\n  -h, --help     show this text\n  -V, --version  show the version\n  \
         -T, --trace    accepted and ignored\n\n\
         Commands (qemu-img COMMAND --help lists the options of one):\n",
        diskmill::VERSION
    );
    for (name, _) in COMMANDS {
        text += &format!("  {name}\n");
    }
    text += "\nSupported formats: qcow2 raw vmdk\n";
    stdout().write_all(text.as_bytes())?;
    Ok(0)
}

pub(super) fn command(name: &str) -> Outcome {
    let mut text = format!("usage: qemu-img {name} [options] {}\n\nOptions:\n", operands(name));
    for option in syntax::of(name) {
        let short = option.short.map_or("    ".to_owned(), |letter| format!("-{letter}, "));
        let long = option.long.join(", --");
        let value = if option.takes { " ARG" } else { "" };
        text += &format!("  {short}--{long}{value}\n");
    }
    stdout().write_all(text.as_bytes())?;
    Ok(0)
}

fn operands(command: &str) -> &'static str {
    match command {
        "bitmap" => "FILENAME BITMAP",
        "compare" => "FILENAME1 FILENAME2",
        "convert" => "FILENAME [FILENAME2 [...]] OUTPUT_FILENAME",
        "create" => "FILENAME [SIZE]",
        "dd" => "[bs=BLOCK_SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
        "measure" => "[--size SIZE | FILENAME]",
        "resize" => "FILENAME [+|-]SIZE",
        _ => "FILENAME",
    }
}
