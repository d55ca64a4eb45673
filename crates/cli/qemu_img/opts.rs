//! Lists of options: `-o`, `--image-opts`, `--object`, and the JSON form of names.

use serde_json::Value;

use super::{Fail, Outcome};
use crate::options::split;

/// Options by name, in order; a later one of the same name wins. Names of nested objects are joined by dots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Dict(Vec<(String, String)>);

impl Dict {
    /// Takes `a=1,b=2`. A bare name is a switch that is on, or with `no` in front of it one that is off.
    pub(super) fn from_list(list: &str) -> Self {
        Self::default().with(split(list).into_iter())
    }

    /// The same, where the value of `implied` may stand first without its name.
    pub(super) fn from_list_with(list: &str, implied: &str) -> Self {
        let mut items = split(list);
        if let Some((name, value @ None)) = items.first_mut() {
            *value = Some(std::mem::replace(name, implied.to_owned()));
        }
        Self::default().with(items.into_iter())
    }

    fn with(mut self, items: impl Iterator<Item = (String, Option<String>)>) -> Self {
        for (name, value) in items {
            match value {
                Some(value) => self.set(&name, value),
                None => match name.strip_prefix("no") {
                    Some(name) => self.set(name, "off".to_owned()),
                    None => self.set(&name, "on".to_owned()),
                },
            }
        }
        self
    }

    /// Takes a JSON object.
    pub(super) fn from_json(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(&double_quoted(text)).map_err(|error| {
            let what = if error.is_eof() { "premature EOI".to_owned() } else { error.to_string() };
            format!("Could not parse the JSON options: JSON parse error, {what}")
        })?;
        let Value::Object(_) = value else {
            return Err("Invalid JSON object given".to_owned());
        };
        let mut dict = Self::default();
        dict.flatten("", &value);
        Ok(dict)
    }

    fn flatten(&mut self, name: &str, value: &Value) {
        let inner = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
        match value {
            Value::Object(items) => items.iter().for_each(|(key, item)| self.flatten(&inner(key), item)),
            Value::Array(items) => {
                items
                    .iter()
                    .enumerate()
                    .for_each(|(index, item)| self.flatten(&inner(&index.to_string()), item));
            }
            Value::Null => self.set(name, String::new()),
            Value::Bool(on) => self.set(name, if *on { "on" } else { "off" }.to_owned()),
            Value::Number(number) => self.set(name, number.to_string()),
            Value::String(text) => self.set(name, text.clone()),
        }
    }

    pub(super) fn set(&mut self, name: &str, value: String) {
        self.0.retain(|(known, _)| known != name);
        self.0.push((name.to_owned(), value));
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Takes one option out.
    pub(super) fn take(&mut self, name: &str) -> Option<String> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.remove(at).1)
    }

    /// Takes out all options of the object `name`; `None` if there are none.
    pub(super) fn take_nested(&mut self, name: &str) -> Option<Self> {
        let prefix = format!("{name}.");
        let (nested, rest) =
            std::mem::take(&mut self.0).into_iter().partition(|(key, _)| key.starts_with(&prefix));
        self.0 = rest;
        let nested: Vec<(String, String)> = nested;
        let inner = |(key, value): (String, String)| (key[prefix.len()..].to_owned(), value);
        (!nested.is_empty()).then(|| Self(nested.into_iter().map(inner).collect()))
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// QEMU's JSON may have its strings in single quotes.
fn double_quoted(text: &str) -> String {
    let mut out = String::new();
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        match (char, quote) {
            ('\\', Some(_)) => match chars.next() {
                Some('\'') => out.push('\''),
                next => out.extend(std::iter::once('\\').chain(next)),
            },
            ('\'' | '"', None) => {
                quote = Some(char);
                out.push('"');
            }
            (_, Some(end)) if char == end => {
                quote = None;
                out.push('"');
            }
            ('"', Some(_)) => out.push_str("\\\""),
            _ => out.push(char),
        }
    }
    out
}

/// Joins the `-o` options of a command line: a list that begins with a comma, or ends inside an escaped one, would
/// change its meaning when it is joined.
pub(super) fn join<'a>(lists: impl Iterator<Item = &'a std::ffi::OsStr>) -> Outcome<Option<String>> {
    let mut joined: Option<String> = None;
    for list in lists {
        let list = list.to_string_lossy();
        let commas = list.len() - list.trim_end_matches(',').len();
        if list.is_empty() || list.starts_with(',') || commas % 2 == 1 {
            return Err(Fail::new(format!("Invalid option list: {list}")));
        }
        joined = Some(match joined {
            Some(before) => format!("{before},{list}"),
            None => list.into_owned(),
        });
    }
    Ok(joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_flattened() {
        let text = r#"{"driver":"qcow2","file":{"filename":"a","locking":false},"x":[1,{"y":null}]}"#;
        let mut dict = Dict::from_json(text).unwrap();
        let pairs: Vec<_> = dict.iter().collect();
        let want = [
            ("driver", "qcow2"),
            ("file.filename", "a"),
            ("file.locking", "off"),
            ("x.0", "1"),
            ("x.1.y", ""),
        ];
        assert_eq!(pairs, want);
        let file = dict.take_nested("file").unwrap();
        assert_eq!(file.get("filename"), Some("a"));
        assert!(dict.take_nested("file").is_none());
    }

    #[test]
    fn json_may_have_single_quotes() {
        let dict = Dict::from_json(r#"{'a': 'b"c', "d": 'it\'s', 'e\n': "'"}"#).unwrap();
        let pairs: Vec<_> = dict.iter().collect();
        assert_eq!(pairs, [("a", "b\"c"), ("d", "it's"), ("e\n", "'")]);
    }

    #[test]
    fn switches_need_no_value() {
        let dict = Dict::from_list("secret,noa,a=1,b");
        let pairs: Vec<_> = dict.iter().collect();
        assert_eq!(pairs, [("secret", "on"), ("a", "1"), ("b", "on")]);
        assert_eq!(Dict::from_list_with("secret,id=x", "qom-type").get("qom-type"), Some("secret"));
    }

    #[test]
    fn lists_that_would_run_together_are_refused() {
        let joined =
            |lists: &[&str]| join(lists.iter().map(std::ffi::OsStr::new)).map_err(|fail| fail.message);
        assert_eq!(joined(&["a=1", "b=,,"]).unwrap().unwrap(), "a=1,b=,,");
        for bad in [",help", "a=b,", ",,", "a,,,", ""] {
            assert!(joined(&["a=1", bad]).is_err(), "{bad:?}");
        }
    }
}
