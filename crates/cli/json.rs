//! JSON in QEMU's style: four spaces, empty containers over two lines, everything but printable ASCII escaped.

use serde_json::Value;

/// `value` as qemu-img prints it, without the last line end.
pub(crate) fn qemu_style(value: &Value) -> String {
    let mut out = String::new();
    put(&mut out, value, 0);
    out
}

fn put(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Array(items) => {
            let items = items.iter().map(|item| (None, item));
            put_container(out, ['[', ']'], items, depth);
        }
        Value::Object(items) => {
            let items = items.iter().map(|(key, item)| (Some(key.as_str()), item));
            put_container(out, ['{', '}'], items, depth);
        }
        Value::String(text) => put_string(out, text),
        Value::Null | Value::Bool(_) | Value::Number(_) => out.push_str(&value.to_string()),
    }
}

fn put_container<'v>(
    out: &mut String,
    [open, close]: [char; 2],
    items: impl Iterator<Item = (Option<&'v str>, &'v Value)>,
    depth: usize,
) {
    out.push(open);
    for (index, (key, item)) in items.enumerate() {
        if index > 0 {
            out.push(',');
        }
        new_line(out, depth + 1);
        if let Some(key) = key {
            put_string(out, key);
            out.push_str(": ");
        }
        put(out, item, depth + 1);
    }
    new_line(out, depth);
    out.push(close);
}

fn new_line(out: &mut String, depth: usize) {
    out.push('\n');
    for _ in 0..depth {
        out.push_str("    ");
    }
}

pub(crate) fn put_string(out: &mut String, text: &str) {
    out.push('"');
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(char),
            _ => {
                for unit in char.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04X}"));
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn containers_and_strings_are_laid_out_as_by_qemu() {
        let value = json!({"a": [], "b": {}, "c": [1, {"d": "ü\"\u{1f600}\n"}], "e": true});
        let want = r#"{
    "a": [
    ],
    "b": {
    },
    "c": [
        1,
        {
            "d": "\u00FC\"\uD83D\uDE00\n"
        }
    ],
    "e": true
}"#;
        assert_eq!(qemu_style(&value), want);
        assert_eq!(serde_json::from_str::<Value>(want).unwrap(), value);
    }
}
