//! LUKS volumes and their passphrases, which are never an argument of any process.

use std::fs::File;
use std::io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _};
use std::path::Path;

use diskmill_guestfs::Command;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
use serde_json::{Value, json};

use super::args::{Key, KeySource};
use super::guest::Guest;
use super::reply::{Record, texts};
use crate::exit::Failure;

/// Longest passphrase in bytes: cryptsetup's own limit.
const MAX_KEY: u64 = 512;

/// The name under which an opened volume appears: `/dev/mapper/luks-UUID`, as systemd names it.
pub(crate) fn mapped_name(uuid: &str) -> String {
    format!("/dev/mapper/luks-{uuid}")
}

/// Opens the LUKS volumes that there are keys for, and activates what is inside.
pub(crate) fn unlock(guest: &mut Guest, keys: &[Key]) -> Result<(), Failure> {
    if keys.is_empty() {
        return Ok(());
    }
    let mut opened = 0_usize;
    let mut tried: Vec<String> = Vec::new();
    let mapped = texts(&guest.call(Command::new("list-dm-devices"))?);
    // Volumes may be inside of volumes (LUKS on LVM on LUKS): look again after each round.
    loop {
        let mut devices = Vec::new();
        for list in ["list-devices", "list-partitions", "lvs", "list-md-devices"] {
            devices.extend(texts(&guest.call(Command::new(list))?));
        }
        devices.retain(|device| !tried.contains(device));
        let before = opened;
        for device in devices {
            let facts = guest.try_call(Command::new("blkid").arg(&device))?.unwrap_or_default();
            let facts = Record::single(&facts);
            let uuid = facts.text("UUID");
            tried.push(device.clone());
            if facts.text("TYPE") != "crypto_LUKS" {
                continue;
            }
            if mapped.contains(&mapped_name(&uuid)) {
                // A kept session has it open.
                opened += 1;
                continue;
            }
            let suits =
                |key: &&Key| key.device.as_ref().is_none_or(|wanted| *wanted == device || *wanted == uuid);
            let mut refused = None;
            for key in keys.iter().filter(suits) {
                refused = open_volume(guest, &device, &uuid, key).err();
                if refused.is_none() {
                    opened += 1;
                    break;
                }
            }
            if let Some(reason) = refused {
                return Err(Failure::failed(format!(
                    "no passphrase that was given opens {device} (UUID {uuid}): {reason}"
                )));
            }
        }
        if opened == before {
            break;
        }
        guest.call(Command::new("lvm-scan").arg("true"))?;
    }
    if opened == 0 {
        return Err(Failure::failed("there are keys, but no LUKS volume that they are for"));
    }
    Ok(())
}

/// Which keys there are, if any, for a later command to compare. A session opens a volume once, so that the content of key
/// files does not matter.
pub(crate) fn note(keys: &[Key]) -> Option<Value> {
    let source = |key: &Key| match &key.source {
        KeySource::Prompt => None,
        KeySource::File(path) => Some(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
    };
    let keys: Vec<_> = keys
        .iter()
        .map(|key| json!([key.device, source(key).map(|p| p.to_string_lossy().into_owned())]))
        .collect();
    (!keys.is_empty()).then(|| keys.into())
}

/// Opens one volume; the reason when it cannot be.
fn open_volume(guest: &mut Guest, device: &str, uuid: &str, key: &Key) -> Result<(), String> {
    let passphrase =
        read(&key.source, device).map_err(|error| format!("the passphrase cannot be read: {error}"))?;
    let name = format!("luks-{uuid}");
    let command = Command::new("cryptsetup-open").arg(device).arg(name).key(passphrase);
    guest.call(command).map(drop).map_err(|failure| failure.message.unwrap_or_default())
}

/// The passphrase for `what`, from where it is to come.
pub(crate) fn read(source: &KeySource, what: &str) -> io::Result<Vec<u8>> {
    match source {
        KeySource::File(path) => read_file(path),
        KeySource::Prompt => prompt(&format!("Passphrase of {what}: ")),
    }
}

/// The file's bytes, without one line end.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut key = Vec::new();
    File::open(path)?.take(MAX_KEY + 2).read_to_end(&mut key)?;
    if key.last() == Some(&b'\n') {
        key.pop();
    }
    if key.len() as u64 > MAX_KEY || key.contains(&b'\n') || key.contains(&0) {
        let message = format!(
            "{path:?} is no passphrase: one line of at most {MAX_KEY} bytes; binary keys are not supported"
        );
        return Err(io::Error::other(message));
    }
    Ok(key)
}

/// Asks on the terminal, without showing what is typed.
fn prompt(question: &str) -> io::Result<Vec<u8>> {
    let terminal = File::options().read(true).write(true).open("/dev/tty");
    let mut terminal =
        terminal.map_err(|_| io::Error::other("no terminal to ask on; use --key file:PATH"))?;
    let shown = if terminal.is_terminal() { Some(tcgetattr(&terminal)?) } else { None };
    if let Some(modes) = &shown {
        let mut hidden = modes.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&terminal, OptionalActions::Flush, &hidden)?;
    }
    write!(terminal, "{question}")?;
    let mut line = Vec::new();
    let read = io::BufReader::new((&terminal).take(MAX_KEY + 2)).read_until(b'\n', &mut line);
    if let Some(modes) = &shown {
        tcsetattr(&terminal, OptionalActions::Flush, modes)?;
    }
    let _ = writeln!(terminal);
    read?;
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_files_hold_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for (content, want) in
            [(&b"secret\n"[..], Some(&b"secret"[..])), (b"s\xff", Some(b"s\xff")), (b"a\nb", None)]
        {
            std::fs::write(&path, content).unwrap();
            assert_eq!(read_file(&path).ok().as_deref(), want);
        }
        std::fs::write(&path, vec![b'x'; 513]).unwrap();
        assert!(read_file(&path).is_err());
    }
}
