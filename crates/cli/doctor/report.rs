//! What was found, for people and as JSON.

use std::fmt::Write as _;

use clap::ValueEnum;
use serde::Serialize;

use crate::say;

/// What is looked at, in the order in which it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Topic {
    Guestfish,
    Tools,
    Qemu,
    Kvm,
    Appliance,
    Supermin,
    Kernel,
    Memory,
    Cache,
    Tmp,
    Fuse,
    Settings,
    IoUring,
    Reflink,
    Limits,
    Leftovers,
    Boot,
}

impl Topic {
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    Ok,
    /// Something is slower, or one command lacks something.
    Note,
    /// The file-system commands do not work.
    Problem,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    pub(crate) check: Topic,
    pub(crate) status: Status,
    pub(crate) found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remedy: Option<String>,
}

impl Check {
    pub(crate) fn ok(check: Topic, found: impl Into<String>) -> Self {
        Self { check, status: Status::Ok, found: found.into(), remedy: None }
    }

    pub(crate) fn note(check: Topic, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, status: Status::Note, found: found.into(), remedy: Some(remedy.into()) }
    }

    pub(crate) fn problem(check: Topic, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, status: Status::Problem, found: found.into(), remedy: Some(remedy.into()) }
    }

    /// The finding over lines, in colours: what it is, and below that the remedy.
    pub(crate) fn text(&self) -> String {
        let (style, word) = match self.status {
            Status::Ok => (say::GOOD, "ok"),
            Status::Note => (say::NOTE, "note"),
            Status::Problem => (say::BAD, "PROBLEM"),
        };
        let mut out = format!("{style}{word:<8}{style:#} {:<10} {}\n", self.check.name(), self.found);
        if let Some(remedy) = &self.remedy {
            // Writing to a string does not fail.
            let _ = writeln!(out, "{:20}-> {remedy}", "");
        }
        out
    }
}

/// `bytes` for people, in whole MiB or with one digit of GiB.
pub(crate) fn size(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    match bytes {
        ..MIB => format!("{} KiB", bytes >> 10),
        _ if bytes < 10 << 30 => format!("{} MiB", bytes / MIB),
        _ => format!("{} GiB", bytes >> 30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_says_what_and_what_to_do() {
        let check = Check::problem(Topic::IoUring, "it is not there", "bring it");
        let plain = anstream::adapter::strip_str(&check.text()).to_string();
        assert_eq!(plain, "PROBLEM  io-uring   it is not there\n                    -> bring it\n");
        let json = serde_json::to_value(&check).unwrap();
        assert_eq!((&json["check"], &json["status"]), (&"io-uring".into(), &"problem".into()));
        assert!(serde_json::to_value(Check::ok(Topic::Kvm, "x")).unwrap().get("remedy").is_none());
        assert_eq!((size(1 << 20), size(20 << 30)), ("1 MiB".to_owned(), "20 GiB".to_owned()));
    }
}
