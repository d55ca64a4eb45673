//! `diskmill fs` on a Windows guest that is not there but for its layout and its registry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

#[allow(dead_code, reason = "not every test needs all of it")]
#[path = "support/guestfs.rs"]
mod guestfs;

use std::fs::{self, File};

use diskmill_testkit::{Cmd, empty_hive, require_program, scratch};
use guestfs::Fs;
use serde_json::json;

/// What libguestfs asks of a Windows: its name and version, its current control set, its host name.
const SOFTWARE: &str = "\
[\\Microsoft]

[\\Microsoft\\Windows NT]

[\\Microsoft\\Windows NT\\CurrentVersion]
\"ProductName\"=\"Test Windows\"
\"CurrentVersion\"=\"6.3\"
\"InstallationType\"=\"Client\"
\"CurrentMajorVersionNumber\"=dword:0000000a
\"CurrentMinorVersionNumber\"=dword:00000000

";
const SYSTEM: &str = "\
[\\Select]
\"Current\"=dword:00000001

[\\ControlSet001]

[\\ControlSet001\\Services]

[\\ControlSet001\\Services\\Tcpip]

[\\ControlSet001\\Services\\Tcpip\\Parameters]
\"Hostname\"=\"testbox\"

";

/// A program for the console of a 64-bit Windows, as file(1) tells by its headers.
fn program() -> Vec<u8> {
    let mut out = vec![0; 512];
    out[..2].copy_from_slice(b"MZ");
    out[0x3c] = 0x80;
    out[0x80..0x86].copy_from_slice(b"PE\0\0\x64\x86");
    out[0x94..0x96].copy_from_slice(&[240, 0]);
    out[0x96] = 0x22;
    out[0x98..0x9a].copy_from_slice(&[0x0b, 2]);
    out[0xdc] = 3;
    out
}

#[test]
fn a_registry_is_read_and_changed() {
    let dir = scratch();
    let dir = dir.path();
    let Some(fs) = Fs::new(dir) else { return };
    if require_program("hivexregedit").is_none() {
        return;
    }
    File::create(dir.join("windows.raw")).unwrap().set_len(64 << 20).unwrap();
    let mut maker = fs.maker(&["windows.raw"]);
    maker.run("part-disk /dev/sda mbr");
    maker.run("part-set-mbr-id /dev/sda 1 7");
    maker.run("mkfs ntfs /dev/sda1");
    maker.run("mount /dev/sda1 /");
    maker.run("mkdir-p /Windows/System32/config");
    maker.run("mkdir-p /Users/bob");
    maker.upload(&program(), "/Windows/System32/cmd.exe");
    for (name, content) in [("SOFTWARE", SOFTWARE), ("SYSTEM", SYSTEM), ("NTUSER.DAT", "")] {
        let hive = dir.join(name);
        fs::write(&hive, empty_hive()).unwrap();
        if !content.is_empty() {
            let _ =
                Cmd::new("hivexregedit").args(["--merge", name]).stdin_bytes(content.into()).dir(dir).ok();
        }
        let folder = if name == "NTUSER.DAT" { "/Users/bob" } else { "/Windows/System32/config" };
        maker.upload(&fs::read(&hive).unwrap(), &format!("{folder}/{name}"));
    }
    maker.close();

    let found = fs.ok(&["inspect", "--json", "windows.raw"]).json();
    let system = &found[0]["operating-systems"][0];
    assert_eq!((&system["type"], &system["hostname"]), (&json!("windows"), &json!("testbox")), "{system}");
    assert_eq!((&system["arch"], &system["major-version"]), (&json!("x86_64"), &json!(10)));
    assert_eq!(system["product-name"], "Test Windows");

    // Every kind of value, in a key whose parents are not there either.
    let reg = "Windows Registry Editor Version 5.00\r\n\r\n[HKEY_LOCAL_MACHINE\\SOFTWARE\\A b\\ü\\Deep]\r\n\
               \"text\"=\"C:\\\\temp \\\"ü€\\\"\"\r\n@=\"default\"\r\n\"number\"=dword:0000002a\r\n\
               \"bytes\"=hex:00,ff,\\\r\n  0a\r\n\"list\"=hex(7):61,00,00,00,62,00,00,00,00,00\r\n\r\n\
               [HKLM\\Software\\Gone\\Below]\r\n\r\n[-HKLM\\SOFTWARE\\Gone]\r\n";
    let utf16: Vec<u8> =
        [0xff, 0xfe].into_iter().chain(reg.encode_utf16().flat_map(u16::to_le_bytes)).collect();
    fs::write(dir.join("changes.reg"), utf16).unwrap();
    // One session serves all that follows.
    let _ = fs.program(&["convert", "-O", "vmdk", "windows.raw", "windows.vmdk"]).ok();
    let merged = fs.ok(&["registry", "merge", "--keep", "--json", "windows.vmdk", "changes.reg"]).json();
    assert_eq!(merged["hive"], "/Windows/System32/config/SOFTWARE");

    let refused = fs.cmd(&["registry", "get", "windows.vmdk", "HKLM\\SOFTWARE\\Gone"]).fails(1);
    refused.says(&["registry", "not found"]);
    let set = |key: &str, name: &str, data: &str| {
        let _ = fs.ok(&["registry", "set", "windows.vmdk", key, name, data]);
    };
    set("HKLM\\SOFTWARE\\A b\\ü\\Deep", "number", "qword:100000000");
    set("HKU\\bob\\Software\\New", "@", "expand:%x%\\ü");

    let exported = fs.ok(&["registry", "export", "windows.vmdk", "hklm\\software\\a B"]).out();
    let want = "Windows Registry Editor Version 5.00\n\n[HKEY_LOCAL_MACHINE\\SOFTWARE\\A b]\n\n\
                [HKEY_LOCAL_MACHINE\\SOFTWARE\\A b\\ü]\n\n[HKEY_LOCAL_MACHINE\\SOFTWARE\\A b\\ü\\Deep]\n\
                @=\"default\"\n\"bytes\"=hex:00,ff,0a\n\"list\"=hex(7):61,00,00,00,62,00,00,00,00,00\n\
                \"number\"=hex(b):00,00,00,00,01,00,00,00\n\"text\"=\"C:\\\\temp \\\"ü€\\\"\"\n\n";
    assert_eq!(exported, want);
    let values = fs.ok(&["registry", "get", "--json", "windows.vmdk", "HKLM\\SOFTWARE\\A b\\ü\\Deep"]).json();
    assert_eq!(values["values"]["list"], json!({ "type": "REG_MULTI_SZ", "data": ["a", "b"] }));
    assert_eq!(values["values"]["number"], json!({ "type": "REG_QWORD", "data": 1u64 << 32 }));
    fs.stop();
    let value = fs.ok(&["registry", "get", "windows.vmdk", "/Users/bob/ntuser.dat!\\Software\\New", "@"]);
    assert_eq!(value.out(), "expand:%x%\\ü\n");
}
