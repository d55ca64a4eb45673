//! The Dockerfile: by a linter, and carried out without a container engine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use diskmill_testkit::{Cmd, Outcome, Tool, require_program, scratch, skip, workspace_root};

/// The Dockerfile of `tree`, as far as reading tells.
fn read_through(tree: &Path) -> Outcome {
    let script = workspace_root().join("tests/setup/run-dockerfile");
    Cmd::new(script).arg("--check").arg(tree).run()
}

#[test]
fn what_the_dockerfile_names_is_there() {
    if require_program("python3").is_none() {
        return;
    }
    let out = read_through(workspace_root());
    assert_eq!(out.code, Some(0), "{out}");
    if let Some(line) = out.out().lines().find(|line| line.starts_with("not checked: ")) {
        skip(line);
    }
}

#[test]
fn mistakes_in_the_dockerfile_are_found() {
    if require_program("python3").is_none() {
        return;
    }
    let root = workspace_root();
    let (docker, ignore) = ("Dockerfile", ".dockerignore");
    for (file, right, wrong, found) in [
        (ignore, "!crates", "", "cargo misses something"),
        (ignore, "!Cargo.lock", "!Cargo.loc", "Cargo.loc"),
        (docker, "/out/diskmill /usr", "/out/diskmil /usr", "nothing in stage build makes /out/diskmil"),
        (docker, "appliance/hv", "applianc/hv", "LIBGUESTFS_HV"),
        (docker, "USER 1000", "USER 1001", "nobody makes 1001"),
        (docker, "[\"diskmill\"]", "[\"diskmil\"]", "is not there"),
        (docker, "WORKDIR /src", "WORKDIRS /src", "WORKDIRS is not known"),
        (docker, " fuse3 ", " fuse3-no-such ", "does not have fuse3-no-such"),
    ] {
        let dir = scratch();
        for name in ["Cargo.toml", "Cargo.lock", "crates", docker, ignore] {
            let path = dir.path().join(name);
            if name == file {
                let text = fs::read_to_string(root.join(name)).unwrap();
                assert!(text.contains(right), "{right}");
                fs::write(path, text.replace(right, wrong)).unwrap();
            } else {
                symlink(root.join(name), path).unwrap();
            }
        }
        let out = read_through(dir.path());
        let unchecked = out.out().contains("not checked: ") && wrong.contains("no-such");
        assert!(unchecked || (out.code == Some(1) && out.err().contains(found)), "{right}: {out}");
    }
}

/// As far as it goes without images: each stops at one that is missing, not at its options.
#[test]
fn examples_are_command_lines_of_the_program() {
    if require_program("python3").is_none() {
        return;
    }
    let script = workspace_root().join("tests/setup/run-dockerfile");
    let examples = Cmd::new(script).arg("--examples").ok();
    let tool = Tool::under_test(env!("CARGO_BIN_EXE_diskmill"));
    for line in examples.out().lines() {
        let dir = scratch();
        fs::write(dir.path().join("notes.txt"), "hello\n").unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        let out = tool.cmd(&words).dir(dir.path()).run();
        assert!(out.code == Some(1) && out.err().contains("disk."), "{line}: {out}");
    }
    assert!(examples.out().lines().count() > 5, "{examples}");
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
