//! The text of .reg files ("Windows Registry Editor Version 5.00"), in Unicode.

use serde_json::{Value as Json, json};

/// The first line of a .reg file.
pub(super) const HEADER: &str = "Windows Registry Editor Version 5.00\n";

/// A key with what is set in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) name: String,
    /// `[-KEY]`: the key and all below it go.
    pub(super) deleted: bool,
    pub(super) values: Vec<Value>,
}

/// A value of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Value {
    /// Empty for the key's default value, which is written `@`.
    pub(super) name: String,
    /// `None` for `-`: the value goes.
    pub(super) data: Option<Data>,
}

/// A value's type (`REG_SZ` is 1) and bytes, as they are in the hive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Data {
    pub(super) kind: u32,
    pub(super) bytes: Vec<u8>,
}

const SZ: u32 = 1;
const EXPAND_SZ: u32 = 2;
const BINARY: u32 = 3;
const DWORD: u32 = 4;
const MULTI_SZ: u32 = 7;
const QWORD: u32 = 11;

impl Data {
    /// Text, of a type that holds text.
    pub(super) fn text(kind: u32, text: &str) -> Self {
        Self { kind, bytes: text.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect() }
    }

    /// What `registry set` takes: text, or with its type in front.
    ///
    /// # Errors
    /// What the data should look like.
    pub(super) fn typed(typed: &str) -> Result<Self, &'static str> {
        if let Some(text) = typed.strip_prefix("expand:") {
            return Ok(Self::text(EXPAND_SZ, text));
        }
        if let Some(number) = typed.strip_prefix("qword:") {
            let number = u64::from_str_radix(number, 16).map_err(|_| "qword: takes up to 16 hex digits")?;
            return Ok(Self { kind: QWORD, bytes: number.to_le_bytes().to_vec() });
        }
        if ["dword:", "hex:", "hex("].iter().any(|kind| typed.starts_with(kind)) {
            return data(typed).ok_or("dword: takes up to 8 hex digits, hex: and hex(TYPE): take 01,02,…");
        }
        Ok(Self::text(SZ, typed))
    }

    /// The text of a string that is whole: UTF-16 with one NUL, at its end.
    fn string(&self) -> Option<String> {
        let (pairs, rest) = self.bytes.as_chunks::<2>();
        let units: Vec<u16> = pairs.iter().map(|pair| u16::from_le_bytes(*pair)).collect();
        let text = units.strip_suffix(&[0]).filter(|text| rest.is_empty() && !text.contains(&0))?;
        String::from_utf16(text).ok()
    }

    /// The texts of a `REG_MULTI_SZ`: each ends with NUL, and the list with one more.
    fn strings(&self) -> Option<Vec<String>> {
        let (pairs, rest) = self.bytes.as_chunks::<2>();
        let units: Vec<u16> = pairs.iter().map(|pair| u16::from_le_bytes(*pair)).collect();
        let list = units.strip_suffix(&[0]).filter(|_| rest.is_empty())?;
        if list.is_empty() {
            return Some(Vec::new());
        }
        let texts = list.strip_suffix(&[0])?.split(|&unit| unit == 0);
        texts.map(|text| String::from_utf16(text).ok()).collect()
    }

    fn number(&self) -> Option<u64> {
        match (self.kind, self.bytes.as_slice()) {
            (DWORD, bytes) => bytes.try_into().ok().map(|bytes| u32::from_le_bytes(bytes).into()),
            (QWORD, bytes) => bytes.try_into().ok().map(u64::from_le_bytes),
            _ => None,
        }
    }

    /// For people, and for [`typed`](Self::typed) to read again.
    pub(super) fn shown(&self) -> String {
        match (self.kind, self.number()) {
            (DWORD, Some(number)) => return format!("dword:{number:08x}"),
            (QWORD, Some(number)) => return format!("qword:{number:016x}"),
            _ => {}
        }
        match (self.kind, self.string()) {
            (SZ, Some(text)) if Self::typed(&text).as_ref() == Ok(self) => text,
            (EXPAND_SZ, Some(text)) => format!("expand:{text}"),
            _ => self.hex(),
        }
    }

    /// Type and data: text, a list of texts, a number, or hex digits for what is none of them.
    pub(super) fn json(&self) -> Json {
        const NAMES: [&str; 12] = [
            "REG_NONE",
            "REG_SZ",
            "REG_EXPAND_SZ",
            "REG_BINARY",
            "REG_DWORD",
            "REG_DWORD_BIG_ENDIAN",
            "REG_LINK",
            "REG_MULTI_SZ",
            "REG_RESOURCE_LIST",
            "REG_FULL_RESOURCE_DESCRIPTOR",
            "REG_RESOURCE_REQUIREMENTS_LIST",
            "REG_QWORD",
        ];
        let name = usize::try_from(self.kind).ok().and_then(|kind| NAMES.get(kind));
        let data = match self.kind {
            SZ | EXPAND_SZ => self.string().map(Json::from),
            MULTI_SZ => self.strings().map(Json::from),
            _ => self.number().map(Json::from),
        };
        let hex = || Json::from(self.bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        let key = if data.is_some() { "data" } else { "data-hex" };
        json!({ "type": name.map_or_else(|| json!(self.kind), |name| json!(name)), key: data.unwrap_or_else(hex) })
    }

    /// As regedit writes it, where `plain`; else without strings, whose escapes and encoding not every reader knows.
    fn write(&self, plain: bool) -> String {
        match (self.kind, self.number(), self.string()) {
            (DWORD, Some(number), _) => format!("dword:{number:08x}"),
            (SZ, _, Some(text)) if plain && !text.contains(char::is_control) => {
                format!("\"{}\"", escape(&text))
            }
            _ => self.hex(),
        }
    }

    fn hex(&self) -> String {
        let bytes: Vec<String> = self.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let kind = if self.kind == BINARY { "hex".to_owned() } else { format!("hex({:x})", self.kind) };
        format!("{kind}:{}", bytes.join(","))
    }
}

impl Key {
    /// The key's part of a .reg file, with the empty line that ends it.
    pub(super) fn write(&self, plain: bool) -> String {
        let mut out = format!("[{}{}]\n", if self.deleted { "-" } else { "" }, self.name);
        for value in &self.values {
            match value.name.as_str() {
                "" => out.push('@'),
                name => out.push_str(&format!("\"{}\"", escape(name))),
            }
            out.push('=');
            out.push_str(&value.data.as_ref().map_or_else(|| "-".to_owned(), |data| data.write(plain)));
            out.push('\n');
        }
        out.push('\n');
        out
    }
}

/// Reads a .reg file: comments and empty lines go, lines that end with a backslash go on.
///
/// # Errors
/// The number of the line that is not understood, from 1.
pub(super) fn parse(text: &str) -> Result<Vec<Key>, usize> {
    let mut keys: Vec<Key> = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        let mut line = line.trim().to_owned();
        if line.is_empty() || line.starts_with(';') || keys.is_empty() && !line.starts_with('[') {
            // In front of the first key there is the version.
            continue;
        }
        while line.ends_with('\\') {
            line.pop();
            line.push_str(lines.next().map_or("", |(_, more)| more.trim()));
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let deleted = name.starts_with('-');
            let name = name.strip_prefix('-').unwrap_or(name).to_owned();
            keys.push(Key { name, deleted, values: Vec::new() });
        } else {
            let value = value(&line).ok_or(index.saturating_add(1))?;
            let key = keys.last_mut().filter(|key| !key.deleted).ok_or(index.saturating_add(1))?;
            key.values.push(value);
        }
    }
    Ok(keys)
}

/// `"name"=data` or `@=data`.
fn value(line: &str) -> Option<Value> {
    let (name, rest) = match line.strip_prefix('@') {
        Some(rest) => (String::new(), rest),
        None => quoted(line)?,
    };
    match rest.trim_start().strip_prefix('=')?.trim_start() {
        "-" => Some(Value { name, data: None }),
        text => Some(Value { name, data: Some(data(text)?) }),
    }
}

fn data(text: &str) -> Option<Data> {
    if text.starts_with('"') {
        let (text, rest) = quoted(text)?;
        return rest.is_empty().then(|| Data::text(SZ, &text));
    }
    if let Some(digits) = text.strip_prefix("dword:") {
        let number = u32::from_str_radix(digits.trim(), 16).ok()?;
        return Some(Data { kind: DWORD, bytes: number.to_le_bytes().to_vec() });
    }
    let (kind, digits) = text.strip_prefix("hex")?.split_once(':')?;
    let kind = match kind {
        "" => BINARY,
        kind => u32::from_str_radix(kind.strip_prefix('(')?.strip_suffix(')')?, 16).ok()?,
    };
    let bytes = digits.split(',').map(str::trim).filter(|digits| !digits.is_empty());
    let bytes = bytes.map(|digits| u8::from_str_radix(digits, 16).ok()).collect::<Option<Vec<u8>>>()?;
    Some(Data { kind, bytes })
}

/// A string in quotes, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut out = String::new();
    let mut chars = text.strip_prefix('"')?.chars();
    loop {
        match chars.next()? {
            '"' => return Some((out, chars.as_str())),
            '\\' => out.push(chars.next()?),
            char => out.push(char),
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}

/// The text of a .reg file, which is UTF-16 with a byte order mark when Windows writes it; `None` if it is neither that
/// nor UTF-8.
pub(super) fn decode(bytes: &[u8]) -> Option<String> {
    let utf16 = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let (pairs, rest) = bytes.as_chunks::<2>();
        rest.is_empty()
            .then(|| String::from_utf16(&pairs.iter().map(|pair| unit(*pair)).collect::<Vec<_>>()).ok())?
    };
    match bytes {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        [0xef, 0xbb, 0xbf, rest @ ..] => String::from_utf8(rest.to_vec()).ok(),
        plain => String::from_utf8(plain.to_vec()).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_and_written_back() {
        let text = "Windows Registry Editor Version 5.00\r\n\r\n[A\\B]\r\n\"a\\\"b\"=\"x\\\\yü\"\r\n; comment\r\n\r\n@=dword:a\r\n\
                    \"h\"=hex(2):25,00,\\\r\n  00,00\r\n\"gone\"=-\n[-A\\C]\n";
        let keys = parse(text).unwrap();
        let written: String = keys.iter().map(|key| key.write(true)).collect();
        let want = "[A\\B]\n\"a\\\"b\"=\"x\\\\yü\"\n@=dword:0000000a\n\"h\"=hex(2):25,00,00,00\n\"gone\"=-\n\n[-A\\C]\n\n";
        assert_eq!(written, want);
        let safe = keys[0].write(false);
        assert!(safe.contains("\"a\\\"b\"=hex(1):78,00,5c,00,79,00,fc,00,00,00\n"), "{safe}");
        for (wrong, line) in
            [("[A]\n\"a\"=1", 2), ("[A]\nx", 2), ("[-A]\n\n@=\"x\"", 3), ("[A]\n@=hex:0g", 2)]
        {
            assert_eq!(parse(wrong), Err(line), "{wrong}");
        }
    }

    #[test]
    fn what_is_shown_can_be_set() {
        for text in
            ["", "plain ü", "dword:00000007", "qword:0000000000000001", "expand:%x%", "hex:01,02", "hex(7):"]
        {
            assert_eq!(Data::typed(text).unwrap().shown(), text);
        }
        // A text that looks like something else, one without its end, and one with a NUL inside.
        for bytes in [Data::text(SZ, "dword:1").bytes, vec![0x41, 0], vec![0, 0, 0, 0], vec![0]] {
            let data = Data { kind: SZ, bytes };
            assert!(data.shown().starts_with("hex(1):") && Data::typed(&data.shown()) == Ok(data.clone()));
        }
        assert!(Data::typed("dword:x").is_err() && Data::typed("qword:").is_err());
    }

    #[test]
    fn json_has_the_type() {
        let multi = Data { kind: MULTI_SZ, bytes: Data::text(SZ, "a\0b\0").bytes };
        assert_eq!(multi.json(), json!({ "type": "REG_MULTI_SZ", "data": ["a", "b"] }));
        assert_eq!(Data::typed("dword:a").unwrap().json(), json!({ "type": "REG_DWORD", "data": 10 }));
        assert_eq!(Data::typed("hex(20):ff").unwrap().json(), json!({ "type": 32, "data-hex": "ff" }));
        assert_eq!(Data::text(SZ, "ü").json(), json!({ "type": "REG_SZ", "data": "ü" }));
    }

    #[test]
    fn files_of_windows_are_utf_16() {
        let utf16: Vec<u8> =
            [0xff, 0xfe].into_iter().chain("[ü]".encode_utf16().flat_map(u16::to_le_bytes)).collect();
        assert_eq!(decode(&utf16).as_deref(), Some("[ü]"));
        assert_eq!((decode(&utf16[..3]), decode(b"\xff")), (None, None));
    }
}
