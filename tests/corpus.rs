//! Images by other writers, described in the corpus's `manifest.tsv`.
//!
//! The corpus is not part of this repository: `DISKMILL_CORPUS` names its folder, else `../shared/corpus`
//! beside the workspace is tried.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::path::PathBuf;
use std::time::Duration;

use diskmill_testkit::{Tool, args, parallel, scratch, sha256_file, skip, workspace_root};

fn diskmill() -> Tool {
    Tool::under_test(env!("CARGO_BIN_EXE_diskmill"))
}

#[derive(Debug)]
struct Row {
    path: String,
    expect: String,
    sha256: String,
    size: u64,
}

fn rows(wanted: &str) -> Option<(PathBuf, Vec<Row>)> {
    let named = std::env::var_os("DISKMILL_CORPUS").map(PathBuf::from);
    let folder = named.unwrap_or_else(|| workspace_root().join("../shared/corpus"));
    let Ok(text) = std::fs::read_to_string(folder.join("manifest.tsv")) else {
        skip(&format!("no corpus: {} has no manifest.tsv (set DISKMILL_CORPUS)", folder.display()));
        return None;
    };
    let row = |line: &str| {
        let mut column = line.split('\t').map(str::to_owned);
        Some(Row {
            path: column.next()?,
            expect: column.next()?,
            sha256: column.next()?,
            size: column.next()?.parse().unwrap_or(0),
        })
    };
    let lines = text.lines().filter(|l| !l.starts_with('#'));
    let rows: Vec<Row> = lines.filter_map(row).filter(|r| r.expect == wanted).collect();
    Some((folder, rows))
}

#[test]
fn images_that_are_ok_give_the_listed_content() {
    let Some((folder, rows)) = rows("ok") else { return };
    parallel(&rows, |row| {
        let dir = scratch();
        let out = dir.path().join("out.raw");
        let cmd = diskmill().cmd(args!["convert", folder.join(&row.path), "-O", "raw", out]);
        let run = cmd.limit(Duration::from_secs(60)).ok();
        assert!(run.peak_rss < 300 << 20, "{} MiB: {run}", run.peak_rss >> 20);
        assert_eq!(std::fs::metadata(&out).unwrap().len(), row.size, "{run}");
        assert_eq!(sha256_file(&out), row.sha256, "{run}");
    });
}

#[test]
fn images_to_refuse_are_refused_with_a_message() {
    let Some((folder, rows)) = rows("refuse") else { return };
    parallel(&rows, |row| {
        let dir = scratch();
        let out = dir.path().join("out.raw");
        let image = folder.join(&row.path);
        let cmd = diskmill().cmd(args!["convert", "-f", "qcow2", image, "-O", "raw", out]);
        let run = cmd.limit(Duration::from_secs(20)).fails(1);
        run.no_panic();
        assert!(run.err().len() > 20, "no message: {run}");
        assert!(run.peak_rss < 100 << 20, "{} MiB: {run}", run.peak_rss >> 20);
        assert!(!out.exists(), "{run}");
    });
}

#[test]
fn the_rows_to_look_at() {
    let Some((folder, rows)) = rows("look") else { return };
    let dir = scratch();
    let dir = dir.path();
    let row = |name: &str| {
        let row = rows.iter().find(|r| r.path.ends_with(name));
        folder.join(&row.unwrap_or_else(|| panic!("no {name} in the manifest")).path)
    };
    let convert = |name: &str| {
        let cmd = diskmill().cmd(args!["convert", row(name), "-O", "raw", dir.join("out.raw")]);
        cmd.limit(Duration::from_secs(20)).run()
    };
    // Encrypted images need a passphrase, which nobody knows any more.
    convert("luks.qcow2").expect_code(1).says(&["LUKS", "passphrase"]);
    convert("aes.qcow2").expect_code(1).says(&["passphrase"]);
    // The backing file is absent: a broken chain is not a conversion, and the message names the file.
    convert("cirros-snapshot1.qcow2").expect_code(1).says(&["backing"]);
    // 64 TiB and empty: information and map at once, with little memory.
    let empty = row("empty_64T.qcow2");
    for verb in ["info", "map"] {
        let cmd = diskmill().cmd(args![verb, "--output", "json", empty]);
        let run = cmd.limit(Duration::from_secs(20)).ok();
        assert!(run.peak_rss < 100 << 20, "{run}");
    }
    let run = convert("chain_short.qcow2").expect_code(0);
    run.no_panic();
}
