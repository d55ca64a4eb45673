//! Options and operands in any order, as GNU `getopt_long` takes them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::{Fail, Outcome};

/// Options whose argument is a file's name and nothing else: it may have any bytes. Those of all others become text.
const NAMES: [&str; 2] = ["base", "source-file"];

/// One option of a command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opt {
    /// Its letter.
    pub(super) short: Option<char>,
    /// Its long names. The first one is what the commands know it by.
    pub(super) long: &'static [&'static str],
    /// It has an argument.
    pub(super) takes: bool,
}

/// What stood on the command line.
#[derive(Debug, Default)]
pub(super) struct Args {
    /// The options in order: name and argument.
    pub(super) options: Vec<(&'static str, OsString)>,
    /// All that is no option.
    pub(super) operands: Vec<OsString>,
}

impl Args {
    pub(super) fn has(&self, name: &str) -> bool {
        self.options.iter().any(|(option, _)| *option == name)
    }

    /// The argument of the last option of this name: a later one wins.
    pub(super) fn last(&self, name: &str) -> Option<&OsStr> {
        self.options.iter().rev().find(|(option, _)| *option == name).map(|(_, value)| value.as_os_str())
    }

    /// The same as text.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.last(name).and_then(OsStr::to_str).map(str::to_owned)
    }

    /// All arguments of the options of this name.
    pub(super) fn all(&self, name: &str) -> impl Iterator<Item = &OsStr> {
        self.options.iter().filter(move |(option, _)| *option == name).map(|(_, value)| value.as_os_str())
    }

    /// The operand of a command that has exactly one.
    pub(super) fn one_file(&self) -> Outcome<&OsStr> {
        match self.operands.as_slice() {
            [file] => Ok(file),
            _ => Err(Fail::usage("Expecting one image file name")),
        }
    }
}

/// Sorts `args` into options and operands.
pub(super) fn parse(syntax: &[Opt], args: Vec<OsString>) -> Outcome<Args> {
    sort(syntax, args, false)
}

/// The same up to the first operand: what follows belongs to the command that it names.
pub(super) fn leading(syntax: &[Opt], args: Vec<OsString>) -> Outcome<Args> {
    sort(syntax, args, true)
}

fn sort(syntax: &[Opt], args: Vec<OsString>, stop: bool) -> Outcome<Args> {
    let mut sorted = Args::default();
    let mut rest = args.into_iter();
    while let Some(arg) = rest.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            sorted.operands.extend(rest);
            break;
        } else if let Some(long) = bytes.strip_prefix(b"--") {
            let (name, value) = split_at_equals(long);
            let option = find_long(syntax, name).ok_or_else(|| unrecognized(&arg))?;
            let value = match (option.takes, value) {
                (true, None) => rest.next().ok_or_else(|| missing(&arg))?,
                (false, Some(_)) => return Err(unrecognized(&arg)),
                (_, value) => value.unwrap_or_default(),
            };
            sorted.options.push((option.name(), value));
        } else if bytes.len() > 1 && bytes.starts_with(b"-") {
            letters(syntax, &arg, &mut rest, &mut sorted)?;
        } else {
            sorted.operands.push(arg);
            if stop {
                sorted.operands.extend(rest);
                break;
            }
        }
    }
    let named = |option: &str| NAMES.contains(&option);
    match sorted.options.iter().find(|(option, value)| !named(option) && value.to_str().is_none()) {
        Some((option, value)) => {
            let option = if option.len() > 1 { format!("--{option}") } else { format!("-{option}") };
            Err(Fail::usage(not_text(&format!("the argument of '{option}'"), value)))
        }
        None => Ok(sorted),
    }
}

/// Why `what` cannot be taken. With other characters in the place of its bytes it would name something else.
pub(super) fn not_text(what: &str, value: &OsStr) -> String {
    format!("{what} is not valid UTF-8, which is not supported here: {value:?}")
}

/// Takes `-abc`: flags, of which the last one may have an argument, here or in the next word.
fn letters(
    syntax: &[Opt],
    arg: &OsStr,
    rest: &mut impl Iterator<Item = OsString>,
    sorted: &mut Args,
) -> Outcome<()> {
    let mut left = arg.as_bytes().get(1..).unwrap_or_default();
    while let Some((&letter, behind)) = left.split_first() {
        let option = syntax.iter().find(|option| option.short == Some(char::from(letter)));
        let option = option.ok_or_else(|| unrecognized(arg))?;
        let mut value = OsString::new();
        if option.takes {
            value = match behind {
                [] => rest.next().ok_or_else(|| missing(arg))?,
                here => OsString::from_vec(here.to_vec()),
            };
            left = &[];
        } else {
            left = behind;
        }
        sorted.options.push((option.name(), value));
    }
    Ok(())
}

impl Opt {
    fn name(&self) -> &'static str {
        self.long.first().copied().unwrap_or_default()
    }
}

fn split_at_equals(long: &[u8]) -> (&[u8], Option<OsString>) {
    match long.iter().position(|&byte| byte == b'=') {
        Some(at) => {
            let (name, value) = long.split_at(at);
            (name, Some(OsString::from_vec(value.get(1..).unwrap_or_default().to_vec())))
        }
        None => (long, None),
    }
}

/// The option of this long name, or the only one whose name begins so.
fn find_long<'s>(syntax: &'s [Opt], name: &[u8]) -> Option<&'s Opt> {
    let exact = syntax.iter().find(|option| option.long.iter().any(|long| long.as_bytes() == name));
    exact.or_else(|| {
        let begins = |option: &&Opt| option.long.iter().any(|long| long.as_bytes().starts_with(name));
        let mut found = syntax.iter().filter(begins);
        found.next().filter(|_| found.next().is_none())
    })
}

fn unrecognized(arg: &OsStr) -> Fail {
    Fail::usage(format!("unrecognized option '{}'", arg.to_string_lossy()))
}

fn missing(arg: &OsStr) -> Fail {
    Fail::usage(format!("missing argument for option '{}'", arg.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYNTAX: &[Opt] = &[
        Opt { short: Some('f'), long: &["format"], takes: true },
        Opt { short: Some('q'), long: &["quiet"], takes: false },
        Opt { short: None, long: &["image-opts"], takes: false },
        Opt { short: None, long: &["force-share"], takes: false },
    ];

    fn shown(line: &str) -> String {
        match parse(SYNTAX, line.split_whitespace().map(OsString::from).collect()) {
            Ok(Args { options, operands }) => format!("{options:?} {operands:?}"),
            Err(fail) => fail.message.unwrap().lines().next().unwrap().to_owned(),
        }
    }

    #[test]
    fn options_and_operands_come_in_any_order() {
        assert_eq!(shown("a -f x -q b"), r#"[("format", "x"), ("quiet", "")] ["a", "b"]"#);
        assert_eq!(shown("-qfx - -- -q"), r#"[("quiet", ""), ("format", "x")] ["-", "-q"]"#);
        assert_eq!(shown("--format=a=b --format c"), r#"[("format", "a=b"), ("format", "c")] []"#);
        assert_eq!(shown("--im"), r#"[("image-opts", "")] []"#);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(shown("--fo x"), "unrecognized option '--fo'");
        assert_eq!(shown("-z"), "unrecognized option '-z'");
        assert_eq!(shown("--quiet=x"), "unrecognized option '--quiet=x'");
        assert_eq!(shown("a -f"), "missing argument for option '-f'");
        assert_eq!(shown("--format"), "missing argument for option '--format'");
    }

    #[test]
    fn only_names_of_files_may_have_any_bytes() {
        let odd = || OsString::from_vec(b"a\xff".to_vec());
        let refused = parse(SYNTAX, vec!["-f".into(), odd()]).unwrap_err().message.unwrap();
        assert!(refused.starts_with("the argument of '--format' is not valid UTF-8"), "{refused}");
        const BASE: &[Opt] = &[Opt { short: Some('b'), long: &["base"], takes: true }];
        let args = parse(BASE, vec!["-b".into(), odd(), odd()]).unwrap();
        assert_eq!((args.last("base"), args.operands.as_slice()), (Some(odd().as_os_str()), &[odd()][..]));
    }
}
