//! `diskmill fs` as far as no appliance is booted: what is wrong is said before, and tools of libguestfs are told what was
//! asked. Their place is taken by scripts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use diskmill_testkit::{Cmd, Tool, require_program, scratch};
use rustix::fs::{FlockOperation, flock};
use serde_json::json;

/// `diskmill` in a folder of its own, where no appliance can start.
fn diskmill(dir: &Path, words: &[&str]) -> Cmd {
    let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(words).dir(dir);
    let run = dir.join("run");
    let _ = fs::create_dir(&run);
    fs::set_permissions(&run, Permissions::from_mode(0o700)).unwrap();
    cmd.limit(Duration::from_secs(60))
        .env("XDG_RUNTIME_DIR", run)
        .env("HOME", dir)
        .env("LIBGUESTFS_BACKEND", "direct")
        .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
        .env("LIBGUESTFS_HV", "/bin/false")
}

fn disk(dir: &Path, name: &str) {
    File::create(dir.join(name)).unwrap().set_len(1 << 20).unwrap();
}

#[test]
fn a_sparse_copy_replaces_only_what_it_is_told_to() {
    let dir = scratch();
    let dir = dir.path();
    disk(dir, "disk.raw");
    fs::write(dir.join("old.raw"), "old").unwrap();
    fs::hard_link(dir.join("disk.raw"), dir.join("same.raw")).unwrap();
    symlink("disk.raw", dir.join("link.raw")).unwrap();
    let sparsify = |more: &[&str]| diskmill(dir, &[&["fs", "sparsify", "disk.raw"], more].concat());
    sparsify(&["old.raw"]).fails(1).says(&["old.raw", "exists", "--force"]);
    for same in ["disk.raw", "same.raw", "link.raw"] {
        sparsify(&[same]).fails(1).says(&["exists"]);
        sparsify(&["--force", same]).fails(1).says(&[same, "the output is a file of the source"]);
    }
    for wrong in ["/dev/null", "run"] {
        sparsify(&["--force", wrong]).fails(1).says(&[wrong, "not a regular file"]);
    }
    let _ = diskmill(dir, &["create", "used.qcow2", "1M"]).ok();
    let server = diskmill(dir, &["serve", "--writable", "used.qcow2", "-k", "socket"]).spawn();
    while !dir.join("socket").exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    sparsify(&["--force", "used.qcow2"]).fails(1).says(&["used.qcow2", "lock"]);
    server.signal(diskmill_testkit::Signal::TERM);
    let _ = server.wait();

    // The work fails: there is no appliance.
    let _ = sparsify(&["--force", "old.raw"]).fails(1);
    let _ = sparsify(&["new.raw"]).fails(1);
    assert_eq!(fs::read(dir.join("old.raw")).unwrap(), b"old");
    let left = fs::read_dir(dir).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.starts_with('.') || name == "new.raw").collect();
    assert_eq!(left, [""; 0]);
    sparsify(&["--force", "--in-place"]).fails(2).says(&["--force"]);
}

/// A program that stands in for one of libguestfs'.
fn fake(dir: &Path, name: &str, script: &str) {
    let bin = dir.join("bin");
    let _ = fs::create_dir(&bin);
    fs::write(bin.join(name), format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(bin.join(name), Permissions::from_mode(0o755)).unwrap();
}

/// `diskmill` that finds the fakes first.
fn with_fakes(dir: &Path, words: &[&str]) -> Cmd {
    let path = std::env::var("PATH").unwrap();
    diskmill(dir, words).env("PATH", format!("{}:{path}", dir.join("bin").display()))
}

/// Writes its arguments down, a line for each, and copies the files that passwords and keys come from.
const WRITES_DOWN: &str = r#"printf '%s\n' "$@" >argv
for word in "$@"; do
    case $word in
    *:file:/*) file=${word#*:file:};;
    file:*) file=${word#file:};;
    *) continue;;
    esac
    cat "$file" >>secrets; stat -c %a "$file" >>modes
done
echo noise"#;

fn argv(dir: &Path) -> Vec<String> {
    fs::read_to_string(dir.join("argv")).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn what_is_wrong_on_the_host_is_said_before_the_image_is_opened() {
    let dir = scratch();
    let dir = dir.path();
    for tool in ["guestfish", "guestmount", "virt-customize", "virt-sysprep"] {
        fake(dir, tool, "touch started");
    }
    // Were it looked at, its absence would be said.
    let says = |code: i32, words: &[&str], what: &str| {
        with_fakes(dir, words).fails(code).says(&[what]);
        assert!(!dir.join("started").exists(), "{words:?}");
    };
    let customize = |option: &str, value: &str, what: &str| {
        let code = if what.contains("takes") { 2 } else { 1 };
        says(code, &["fs", "customize", "no.raw", option, value], what);
    };
    says(1, &["fs", "script", "no.raw", "nofile"], "\"nofile\"");
    says(1, &["fs", "ls", "--key", "file:nofile", "no.raw"], "\"nofile\"");
    says(1, &["fs", "get", "no.raw", "/x", "nofolder/x"], "\"nofolder\"");
    says(1, &["fs", "get", "no.raw", "/x", "bin/guestfish"], "--force");
    says(1, &["fs", "tar-out", "no.raw", "/", "nofolder/x.tar"], "\"nofolder\"");
    says(1, &["fs", "mount", "--key", "/dev/sda1:file:nofile", "no.raw", "."], "\"nofile\"");
    says(1, &["fs", "sysprep", "--key", "/dev/sda1:file:nofile", "no.raw"], "\"nofile\"");
    says(2, &["fs", "customize", "no.raw"], "nothing to do");
    says(2, &["fs", "customize", "--network", "no.raw"], "nothing to do");
    for (option, value) in [
        ("--upload", "nofile:/x"),
        ("--copy-in", "nofile:/x"),
        ("--run", "nofile"),
        ("--first-boot", "nofile"),
        ("--ssh-key", "root:nofile"),
        ("--root-password", "file:nofile"),
        ("--password", "bob:file:nofile"),
    ] {
        customize(option, value, "\"nofile\"");
    }
    customize("--upload", "nofile", "takes FILE:NAME");
    customize("--copy-in", ":/x", "takes PATH:FOLDER");
    customize("--run", "bin", "directory");
    // The files are there: now the image is.
    customize("--copy-in", "bin:/x", "\"no.raw\"");
}

#[test]
fn customize_passes_on_what_was_asked_for() {
    let dir = scratch();
    let dir = dir.path();
    disk(dir, "disk.raw");
    fake(dir, "virt-customize", WRITES_DOWN);
    for (name, content) in
        [("pw", "s3cret"), ("key.pub", "ssh-ed25519 AAAA"), ("up", "u"), ("job", "j"), ("luks", "p")]
    {
        fs::write(dir.join(name), content).unwrap();
    }
    fs::create_dir(dir.join("in")).unwrap();
    let customize = |words: &[&str]| {
        let _ = with_fakes(dir, &[&["fs", "customize", "disk.raw"], words].concat()).ok();
        let argv = argv(dir);
        assert_eq!(argv[..3], ["--format=raw", "-a", "disk.raw"]);
        argv[3..].to_vec()
    };
    // Each option by itself, and what it becomes.
    let cases: &[(&[&str], &[&str])] = &[
        (&["--hostname", "a b"], &["--hostname", "a b"]),
        (&["--timezone", "Europe/Berlin"], &["--timezone", "Europe/Berlin"]),
        (&["--user", "bob"], &["--run-command", "useradd --create-home -- bob"]),
        (&["--root-password", "file:pw"], &["--root-password", "file:pw"]),
        (&["--root-password", "random"], &["--root-password", "random"]),
        (&["--root-password", "disabled"], &["--root-password", "disabled"]),
        (&["--root-password", "locked"], &["--root-password", "locked:disabled"]),
        (&["--password", "bob:file:pw"], &["--password", "bob:file:pw"]),
        (&["--password", "bob:locked"], &["--password", "bob:locked:disabled"]),
        (&["--ssh-key", "bob:key.pub"], &["--ssh-inject", "bob:file:key.pub"]),
        (&["--mkdir", "/d"], &["--mkdir", "/d"]),
        (&["--copy-in", "in:/d"], &["--copy-in", "in:/d"]),
        (&["--upload", "up:/x:y"], &["--upload", "up:/x:y"]),
        (&["--remove", "a,b"], &["--uninstall", "a,b"]),
        (&["--run", "job"], &["--run", "job"]),
        (&["--run-command", "echo a  b"], &["--run-command", "echo a  b"]),
        (&["--first-boot", "job"], &["--firstboot", "job"]),
        (&["--first-boot-command", "x y"], &["--firstboot-command", "x y"]),
        (&["--delete", "/a b"], &["--delete", "/a b"]),
        (&["--selinux-relabel"], &["--selinux-relabel"]),
    ];
    for (words, want) in cases {
        assert_eq!(customize(words), [&["--no-network"], *want].concat(), "{words:?}");
    }
    // The network is on for packages from there, or when it is asked for.
    assert_eq!(customize(&["--update"]), ["--network", "--update"]);
    assert_eq!(customize(&["--install", "a,b"]), ["--network", "--install", "a,b"]);
    assert_eq!(customize(&["--network", "--mkdir", "/d"]), ["--network", "--mkdir", "/d"]);
    let key = ["--key", "/dev/sda1:file:luks"];
    assert_eq!(
        customize(&[&key[..], &["-q", "--mkdir", "/d"]].concat())[..3],
        ["--key", "/dev/sda1:file:luks", "--quiet"]
    );
    with_fakes(dir, &["fs", "customize", "--key", "file:luks", "disk.raw", "--mkdir", "/d"])
        .fails(2)
        .says(&["--key DEVICE:"]);

    // The order is ours, not that of the command line; all values of an option stay.
    let all = "--delete /z --run job --install p --update --upload up:/u --mkdir /d --mkdir /e --password bob:random \
               --user bob --hostname h --remove q";
    let found = customize(&all.split_whitespace().collect::<Vec<_>>());
    let options: Vec<&str> = found.iter().map(String::as_str).filter(|word| word.starts_with("--")).collect();
    let order = "--network --hostname --run-command --password --mkdir --mkdir --upload --update --install --uninstall \
                 --run --delete";
    assert_eq!(options, order.split_whitespace().collect::<Vec<_>>());

    let words = ["fs", "customize", "--json", "disk.raw", "--mkdir", "/d"];
    assert_eq!(with_fakes(dir, &words).ok().json(), json!({ "image": "disk.raw", "done": true }));
    assert!(argv(dir).contains(&"--quiet".to_owned()));
    with_fakes(dir, &["fs", "customize", "disk.raw", "--root-password", "s3cret"])
        .fails(2)
        .says(&["not supported"]);
}

#[test]
fn a_password_that_is_typed_is_seen_by_nobody() {
    let dir = scratch();
    let dir = dir.path();
    if require_program("script").is_none() {
        return;
    }
    disk(dir, "disk.raw");
    fake(dir, "virt-customize", WRITES_DOWN);
    // What is typed before the question is thrown away.
    let typed = format!(
        "(until grep -qs Passphrase seen; do sleep 0.1; done; echo s3cret) | \
         script -qefc '{} fs customize disk.raw --root-password prompt' seen",
        env!("CARGO_BIN_EXE_diskmill")
    );
    let path = format!("{}:{}", dir.join("bin").display(), std::env::var("PATH").unwrap());
    let typed = Cmd::new("sh").args(["-c", &typed]).dir(dir).limit(Duration::from_secs(60));
    let outcome = typed.env("PATH", path).env("XDG_RUNTIME_DIR", dir).ok();
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
    assert_eq!((read("secrets").as_str(), read("modes").as_str()), ("s3cret", "600\n"), "{outcome}");
    let argv = argv(dir);
    let file = argv.last().unwrap().strip_prefix("file:").unwrap();
    assert!(!argv.concat().contains("s3cret") && !Path::new(file).exists(), "{argv:?}");
    assert!(!read("seen").contains("s3cret"), "{outcome}");
}

#[test]
fn sysprep_passes_on_what_was_asked_for() {
    let dir = scratch();
    let dir = dir.path();
    let _ = diskmill(dir, &["create", "disk.qcow2", "1M"]).ok();
    fake(dir, "virt-sysprep", WRITES_DOWN);
    let sysprep = |words: &[&str]| {
        let _ = with_fakes(dir, &[&["fs", "sysprep", "disk.qcow2"], words].concat()).ok();
        argv(dir)
    };
    let image = ["--format=qcow2", "-a", "disk.qcow2"];
    assert_eq!(sysprep(&[]), image);
    let operations = ["--operations", "-lvm-uuids,ssh-hostkeys"];
    assert_eq!(sysprep(&operations), [&image[..], &operations].concat());
    assert_eq!(sysprep(&["-q"])[3..], ["--quiet"]);
    let json = with_fakes(dir, &["fs", "sysprep", "--json", "disk.qcow2"]).ok().json();
    assert_eq!(json, json!({ "image": "disk.qcow2", "done": true }));
    with_fakes(dir, &["fs", "sysprep", "--keep", "disk.qcow2"]).fails(2).says(&["--keep is not supported"]);
}

#[test]
fn errors_of_tools_are_told_without_their_advice() {
    let dir = scratch();
    let dir = dir.path();
    disk(dir, "disk.raw");
    let advice = r"To see full error messages you may need to enable debugging.
Do:
  export LIBGUESTFS_DEBUG=1 LIBGUESTFS_TRACE=1
and run the command again.  For further information, read:
  http://libguestfs.org/guestfs-faq.1.html#debugging-libguestfs
";
    let bugs = "\nIf reporting bugs, run virt-customize with debugging enabled and include the complete output:\n\n  x [...]\n";
    let said = |error: &str| {
        fs::write(dir.join("said"), error).unwrap();
        fake(dir, "virt-customize", "cat said >&2; exit 1");
        with_fakes(dir, &["fs", "customize", "disk.raw", "--mkdir", "/d"]).fails(1);
        with_fakes(dir, &["fs", "customize", "disk.raw", "--mkdir", "/d"]).run().err()
    };
    let supermin = "libguestfs error: /usr/bin/supermin exited with error status 1.";
    assert_eq!(
        said(&format!("virt-customize: error: {supermin}\n{advice}{bugs}")),
        format!(
            "diskmill: virt-customize: {supermin}; `diskmill doctor kernel supermin cache` tells what this machine lacks\n"
        )
    );
    let ran = "job: command exited with an error";
    assert_eq!(
        said(&format!("E: no such \x1b[31mpackage\nvirt-customize: error: {ran}\n{bugs}")),
        format!("E: no such \\u{{1b}}[31mpackage\ndiskmill: virt-customize: {ran}\n")
    );
    assert_eq!(said("odd"), "diskmill: virt-customize: odd\n");
    assert_eq!(said(""), "diskmill: virt-customize failed (exit status: 1)\n");
    // What is no error is told, too.
    fake(dir, "virt-customize", "echo virt-customize: warning: no seed >&2");
    let warned = with_fakes(dir, &["fs", "customize", "disk.raw", "--mkdir", "/d"]).ok();
    assert_eq!(warned.err(), "virt-customize: warning: no seed\n");

    fake(dir, "guestmount", "cat said >&2; exit 1");
    fs::write(dir.join("said"), format!("libguestfs: error: {supermin}\n{advice}")).unwrap();
    let mount = with_fakes(dir, &["fs", "mount", "disk.raw", "."]).fails(1);
    assert!(mount.err().ends_with("lacks\n") && mount.err().lines().count() == 1, "{mount}");

    // Something is mounted there, but the tool cannot unmount it.
    fake(
        dir,
        "guestunmount",
        "echo 'guestunmount: failed to unmount' >&2; seq -f 'Cannot stat %g' 60 >&2; exit 1",
    );
    let umount = with_fakes(dir, &["fs", "umount", "/proc"]).fails(1);
    assert_eq!(umount.err(), "diskmill: guestunmount: failed to unmount\n");
    for folder in ["bin", "/nonexist"] {
        with_fakes(dir, &["fs", "umount", folder]).fails(1).says(&[folder, "nothing is mounted"]);
    }
}

#[test]
fn snapshots_are_read_and_never_written() {
    let dir = scratch();
    let dir = dir.path();
    if require_program("nbdcopy").is_none() {
        return;
    }
    fs::write(dir.join("old.raw"), vec![b'a'; 1 << 20]).unwrap();
    fs::write(dir.join("new.raw"), vec![b'b'; 1 << 20]).unwrap();
    let _ = diskmill(dir, &["convert", "-O", "qcow2", "old.raw", "disk.qcow2"]).ok();
    let _ = diskmill(dir, &["snapshot", "create", "disk.qcow2", "before"]).ok();
    let _ = diskmill(dir, &["convert", "-n", "-O", "qcow2", "new.raw", "disk.qcow2"]).ok();
    let copies = "while [ $# -gt 0 ]; do case $1 in -a) uri=$2;; esac; shift; done\n\
                  nbdcopy \"nbd+unix:///?socket=${uri#*socket=}\" out.raw; exit 3";
    fake(dir, "guestfish", copies);
    fake(dir, "guestmount", copies);
    let seen = || fs::read(dir.join("out.raw")).unwrap()[..4].to_vec();
    // Through a server of the command, and through one that outlives it.
    for (words, code) in [(&["fs", "script", "disk.qcow2", "-"], 3), (&["fs", "mount", "disk.qcow2", "."], 1)]
    {
        let _ = with_fakes(dir, words).fails(code);
        assert_eq!(seen(), b"bbbb");
        for snapshot in ["before", "1", "snapshot.name=before"] {
            let _ = with_fakes(dir, words).args(["--snapshot", snapshot]).fails(code);
            assert_eq!(seen(), b"aaaa", "{words:?} {snapshot}");
        }
        with_fakes(dir, words).args(["--snapshot", "none"]).fails(1).says(&["none"]);
        with_fakes(dir, words).args(["--snapshot", "before", "--write"]).fails(2).says(&["--snapshot"]);
    }
    let before = fs::read(dir.join("disk.qcow2")).unwrap();
    for words in [
        &["rm", "disk.qcow2", "/x"][..],
        &["put", "disk.qcow2", "old.raw", "/x"],
        &["customize", "disk.qcow2", "--mkdir", "/x"],
        &["sysprep", "disk.qcow2"],
        &["grow", "disk.qcow2", "+1M"],
        &["sparsify", "--in-place", "disk.qcow2"],
        &["sparsify", "disk.qcow2", "copy.qcow2"],
        &["edit", "disk.qcow2", "/x"],
        &["run", "disk.qcow2", "true"],
    ] {
        let words = [&["fs", "--snapshot", "before"], words].concat();
        with_fakes(dir, &words).fails(2).says(&["writing to a snapshot is not supported"]);
    }
    assert!(fs::read(dir.join("disk.qcow2")).unwrap() == before);
}

#[test]
fn help_begins_with_the_verbs_own() {
    let dir = scratch();
    let dir = dir.path();
    let help = |words: &[&str]| diskmill(dir, &[words, &["--help"]].concat()).ok().out();
    let ordered = |text: &str, marks: &[&str]| {
        let at: Vec<_> = marks.iter().map(|mark| text.find(mark)).collect();
        assert!(at.iter().all(Option::is_some) && at.is_sorted(), "{marks:?} {at:?}\n{text}");
    };
    let put = help(&["fs", "put"]);
    ordered(
        &put,
        &["<PATH>... <TARGET>", "Arguments:", "Options:", "--owner", "General:", "--format", "--snapshot"],
    );
    assert!(put.split("Options:").next().unwrap().contains("  <IMAGE>"), "{put}");
    ordered(
        &put,
        &["General:", "--key-file", "--json", "--mount", "Appliance:", "--memsize", "--idle-timeout"],
    );
    assert_eq!(put.split("Appliance:").nth(1).unwrap().matches("\n      --").count(), 6, "{put}");
    ordered(&help(&["fs", "registry", "set"]), &["<DATA>", "General:", "--json", "Appliance:", "--memsize"]);
    ordered(&help(&["session", "start"]), &["--write", "General:", "--json", "Appliance:", "--memsize"]);
    ordered(&help(&["fs", "prepare"]), &["Options:", "--into", "--json", "Appliance:", "--memsize"]);
    for (verb, keeps) in
        [("ls", true), ("put", true), ("customize", false), ("script", false), ("mount", false)]
    {
        assert_eq!(help(&["fs", verb]).contains("--keep"), keeps, "{verb}");
    }
    diskmill(dir, &["session", "stop"]).fails(2).says(&["--all"]);
    diskmill(dir, &["fs", "sparsify", "disk.raw"]).fails(2).says(&["--in-place"]);
    diskmill(dir, &["fs", "get", "disk.raw"]).fails(2).says(&["<IMAGE> <PATH>... <TARGET>"]);
    disk(dir, "disk.raw");
    diskmill(dir, &["fs", "grow", "disk.raw", "-1G"]).fails(2).says(&["-1G", "only grows"]);
    diskmill(dir, &["doctor", "reflink", "--path", "/nonexist"]).fails(1);
}

#[test]
fn images_that_fail_are_named_once_and_told_to_programs() {
    let dir = scratch();
    let dir = dir.path();
    for verb in ["list", "df", "inspect"] {
        let failed = diskmill(dir, &["fs", verb, "one.raw", "two.raw"]).fails(1).err();
        assert!(failed.lines().count() == 2 && failed.matches("one.raw").count() == 1, "{failed}");
        let json = diskmill(dir, &["fs", verb, "--json", "one.raw", "two.raw"]).fails(1).json();
        assert_eq!((&json[0]["image"], &json[1]["image"]), (&json!("one.raw"), &json!("two.raw")));
        assert!(json[1]["error"].as_str().unwrap().starts_with("cannot open: No such file"), "{json}");
    }
    let none = diskmill(dir, &["session", "list"]).ok();
    assert_eq!((none.out(), none.err()), (String::new(), "diskmill: no session is kept\n".to_owned()));
}

#[test]
fn locks_of_starting_sessions_do_not_stay() {
    let dir = scratch();
    let dir = dir.path();
    disk(dir, "disk.raw");
    let _ = diskmill(dir, &["fs", "ls", "--keep", "disk.raw"]).fails(1);
    let folder = dir.join("run/diskmill-nbd");
    let names = fs::read_dir(&folder).unwrap().flatten().map(|entry| entry.file_name());
    assert!(names.into_iter().all(|name| !name.as_encoded_bytes().ends_with(b".lock")));
    // One that a killed run has left, and one in use.
    File::create(folder.join("1-2.lock")).unwrap();
    let used = File::create(folder.join("3-4.lock")).unwrap();
    flock(&used, FlockOperation::LockExclusive).unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    let found = diskmill(dir, &["doctor", "leftovers"]).ok().out();
    assert!(found.contains("1-2.lock") && !found.contains("3-4.lock"), "{found}");
    let _ = diskmill(dir, &["session", "list"]).ok();
    assert!(!folder.join("1-2.lock").exists() && folder.join("3-4.lock").exists());
}
