//! Options before the verb: `fs --keep ls …` is `fs ls --keep …`.

use std::ffi::{OsStr, OsString};

use clap::{Arg, Command};

/// The program's arguments with the options in front of the verb of `fs` moved behind it, so that each verb accepts, there
/// too, what it knows and nothing else. Anything doubtful is left as it is, for the parser to explain.
pub(crate) fn verb_first(words: Vec<OsString>, program: impl FnOnce() -> Command) -> Vec<OsString> {
    let [_, fs, first, ..] = words.as_slice() else { return words };
    if fs != "fs" || !first.as_encoded_bytes().starts_with(b"-") {
        return words;
    }
    let mut program = program();
    program.build();
    let Some(group) = program.find_subcommand("fs") else { return words };
    let mut at = 2_usize;
    while let Some(word) = words.get(at) {
        if let Some(verbs) = verbs_at(group, words.get(at..).unwrap_or_default()) {
            let (before, after) = words.split_at(at);
            let (verb, rest) = after.split_at(verbs.min(after.len()));
            let (head, options) = before.split_at(2);
            return [head, verb, options, rest].concat();
        }
        match takes_next(group, word) {
            Some(true) => at = at.saturating_add(2),
            Some(false) => at = at.saturating_add(1),
            None => break,
        }
    }
    words
}

/// How many of the words are a verb (`registry get` is two); `None` if they do not begin with one.
fn verbs_at(group: &Command, words: &[OsString]) -> Option<usize> {
    let mut depth = 0_usize;
    let mut command = group;
    while let Some(inner) = words.get(depth).and_then(|word| command.find_subcommand(word)) {
        command = inner;
        depth = depth.saturating_add(1);
    }
    (depth > 0).then_some(depth)
}

/// Whether the value of this option is the next word. `None` for what is no option of any verb, such as `--help`, and for
/// what is not the same for all verbs.
fn takes_next(group: &Command, word: &OsStr) -> Option<bool> {
    let text = word.to_str()?;
    if let Some(long) = text.strip_prefix("--") {
        let (name, value) = long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)));
        let takes = takes_value(group, &|arg| arg.get_long() == Some(name))?;
        return (value.is_none() || takes).then_some(takes && value.is_none());
    }
    let mut letters = text.strip_prefix('-').filter(|letters| !letters.is_empty())?.chars();
    while let Some(letter) = letters.next() {
        if takes_value(group, &|arg| arg.get_short() == Some(letter))? {
            return Some(letters.as_str().is_empty());
        }
    }
    Some(false)
}

/// Whether the options that are meant take a value, if there are any and all agree.
fn takes_value(group: &Command, meant: &dyn Fn(&Arg) -> bool) -> Option<bool> {
    let mut verbs: Vec<&Command> = group.get_subcommands().collect();
    let mut found = None;
    while let Some(verb) = verbs.pop() {
        verbs.extend(verb.get_subcommands());
        let own = verb.get_arguments().filter(|arg| !arg.is_positional() && arg.get_id() != "help");
        for arg in own.filter(|arg| meant(arg)) {
            let takes = arg.get_action().takes_values();
            if *found.get_or_insert(takes) != takes {
                return None;
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::commands::Cli;

    fn ordered(line: &str) -> String {
        let words = line.split(' ').map(OsString::from).collect();
        verb_first(words, Cli::command).join(OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn options_go_behind_the_verb() {
        for (line, want) in [
            ("d fs --keep ls a /", "d fs ls --keep a /"),
            ("d fs -qf qcow2 --json ls -l a", "d fs ls -qf qcow2 --json -l a"),
            (
                "d fs --key=prompt -fraw --memsize 512 cat a b",
                "d fs cat --key=prompt -fraw --memsize 512 a b",
            ),
            ("d fs --json registry get a k", "d fs registry get --json a k"),
            ("d fs --key ls ls a", "d fs ls --key ls a"),
        ] {
            assert_eq!(ordered(line), want);
        }
    }

    #[test]
    fn what_is_doubtful_stays() {
        for line in [
            "d fs",
            "d fs ls --keep a",
            "d fs --help",
            "d fs --nonsense ls",
            "d fs --keep",
            "d fs --keep=1 ls",
            "d info --json a",
            "d fs -- ls",
            "d fs - ls",
            "d fs --keep a ls",
        ] {
            assert_eq!(ordered(line), line);
        }
    }
}
