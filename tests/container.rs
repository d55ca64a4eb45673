//! The Dockerfile: by a linter, and carried out without a container engine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs;
use std::time::Duration;

use diskmill_testkit::{Cmd, scratch, skip, workspace_root};

/// What the build needs is let through to it.
#[test]
fn no_crate_is_kept_from_the_build() {
    let root = workspace_root();
    let ignore = fs::read_to_string(root.join(".dockerignore")).unwrap();
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    for needed in ["Cargo.toml", "Cargo.lock", "crates"] {
        assert!(ignore.lines().any(|line| line.strip_prefix('!') == Some(needed)), "{needed}");
    }
    let members = manifest.lines().find_map(|line| line.strip_prefix("members = [")).unwrap();
    let members: Vec<_> =
        members.trim_end_matches(']').split(", ").map(|name| name.trim_matches('"')).collect();
    assert!(members.len() > 5 && members.iter().all(|name| name.starts_with("crates/")), "{members:?}");
}

#[test]
fn a_linter_has_nothing_to_say() {
    let root = workspace_root();
    if std::process::Command::new("hadolint").arg("--version").output().is_err() {
        println!("hadolint is not installed: the Dockerfile was not linted");
        return;
    }
    Cmd::new("hadolint").arg("Dockerfile").dir(root).ok();
}

#[test]
#[ignore = "builds the release program and an appliance: a quarter of an hour, as root"]
fn the_dockerfile_can_be_carried_out() {
    let root = workspace_root();
    let dir = scratch();
    let run = Cmd::new(root.join("tests/setup/run-dockerfile")).arg(dir.path());
    let out = run.limit(Duration::from_secs(3600)).run();
    match out.code {
        Some(77) => skip("tests/setup/run-dockerfile needs root, debootstrap and a mirror"),
        code => assert_eq!(code, Some(0), "{out}"),
    }
}
