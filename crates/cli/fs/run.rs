//! `run`: a command in the guest's file systems, by the guest's own programs.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;

use diskmill_guestfs::Command;
use serde_json::{Map, json};

use super::args::RunArgs;
use super::guest::{Access, Guest};
use super::name;
use super::output::print_json;
use crate::exit::{Exit, Failure};

/// The most that `--json` keeps of each output, in bytes.
const MAX_JSON: usize = 16 << 20;

pub(crate) fn run(args: &RunArgs) -> Result<Exit, Failure> {
    let access = if args.discard { Access::Discard } else { Access::Write };
    let mut guest = Guest::mounted(&args.guest, access)?;
    // libguestfs loses the output of a command that fails and cuts it at NUL: both outputs go to files, which are fetched.
    let folder = guest.text(Command::new("mkdtemp").arg("/tmp/.diskmill-XXXXXX"))?;
    let ran = in_folder(&mut guest, &folder, args);
    let real = guest.real_path(folder.as_bytes())?;
    guest.call(Command::new("rm-rf").arg(real))?;
    let exit = ran?;
    guest.finish()?;
    Ok(exit)
}

fn in_folder(guest: &mut Guest, folder: &str, args: &RunArgs) -> Result<Exit, Failure> {
    let script = [b"{\n".to_vec(), script(&args.command), b"\n}\n".to_vec()].concat();
    let [script_path, out_path, err_path] = ["script", "out", "err"].map(|name| format!("{folder}/{name}"));
    guest.upload(&mut &script[..], script_path.as_bytes())?;
    let line = format!("/bin/sh {script_path} </dev/null >{out_path} 2>{err_path}; echo $?");
    let code = guest.text(Command::new("sh").arg(line))?;
    let code: u8 =
        code.trim().parse().map_err(|_| Failure::failed("the guest's shell does not tell how it ended"))?;
    if args.guest.image.json {
        let mut object = Map::new();
        object.insert("exit-code".to_owned(), json!(code));
        for (key, path) in [("stdout", &out_path), ("stderr", &err_path)] {
            let mut output = Limited(Vec::new());
            guest.download(path.as_bytes(), &mut output)?;
            name::put(&mut object, key, &output.0);
        }
        print_json(&object.into())?;
    } else {
        guest.download(out_path.as_bytes(), &mut io::stdout())?;
        io::stdout().flush()?;
        guest.download(err_path.as_bytes(), &mut io::stderr())?;
    }
    Ok(Exit::Command(code))
}

/// Several arguments are a command with its arguments, each quoted; a single one is a line for the shell.
fn script(command: &[OsString]) -> Vec<u8> {
    if let [line] = command {
        return line.as_bytes().to_vec();
    }
    let quoted = command.iter().map(|word| {
        let escaped: Vec<u8> =
            word.as_bytes().split(|&byte| byte == b'\'').collect::<Vec<_>>().join(&b"'\\''"[..]);
        [b"'", &escaped[..], b"'"].concat()
    });
    quoted.collect::<Vec<_>>().join(&b' ')
}

struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.0.len().saturating_add(buf.len()) > MAX_JSON {
            return Err(io::Error::other(format!(
                "the command printed more than {MAX_JSON} bytes: leave out --json"
            )));
        }
        self.0.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_guest_as_they_are() {
        let words = |words: &[&str]| script(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(words(&["echo $HOME | wc"]), b"echo $HOME | wc");
        assert_eq!(words(&["echo", "a b", "it's", "$x"]), br"'echo' 'a b' 'it'\''s' '$x'");
    }
}
