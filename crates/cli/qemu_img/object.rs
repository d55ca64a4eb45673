//! `--object`: QEMU's user-creatable objects, of which secrets matter here.

use super::opts::Dict;
use super::{Fail, Outcome};
use crate::qemu_img::getopt::Args;

/// Types of QEMU's that do nothing for an image tool.
const IGNORED: [&str; 4] = ["throttle-group", "iothread", "authz-simple", "tls-creds-anon"];

/// Passwords by their id.
#[derive(Debug, Default)]
pub(super) struct Secrets(Vec<(String, Secret)>);

/// Where a password stands.
#[derive(Debug)]
enum Secret {
    Data(String),
    File(String),
}

impl Secrets {
    /// Takes the `--object` options of a command line.
    pub(super) fn of(args: &Args) -> Outcome<Self> {
        let mut secrets = Self::default();
        for text in args.all("object") {
            secrets.add(&text.to_string_lossy()).map_err(Fail::new)?;
        }
        Ok(secrets)
    }

    fn add(&mut self, text: &str) -> Result<(), String> {
        let mut dict = if text.starts_with('{') {
            Dict::from_json(text)?
        } else {
            Dict::from_list_with(text, "qom-type")
        };
        let kind = dict.take("qom-type").ok_or("Parameter 'qom-type' is missing")?;
        if IGNORED.contains(&kind.as_str()) {
            return Ok(());
        }
        if kind != "secret" {
            return Err(format!("Parameter 'qom-type' does not accept value '{kind}'"));
        }
        let id = dict.take("id").ok_or("Parameter 'id' is missing")?;
        if dict.take("format").is_some_and(|format| format != "raw") {
            return Err("secret objects with format=base64 are not supported".to_owned());
        }
        let secret = match (dict.take("data"), dict.take("file")) {
            (Some(_), Some(_)) => return Err("'file' and 'data' are mutually exclusive".to_owned()),
            (Some(data), None) => Secret::Data(data),
            (None, Some(file)) => Secret::File(file),
            (None, None) => return Err("Either 'file' or 'data' must be provided".to_owned()),
        };
        if self.0.iter().any(|(known, _)| *known == id) {
            return Err(format!("attempt to add duplicate property '{id}' to object (type 'container')"));
        }
        if let Some(name) = dict.names().next() {
            return Err(format!("Parameter '{name}' is unexpected"));
        }
        self.0.push((id, secret));
        Ok(())
    }

    /// The password of this id.
    pub(super) fn get(&self, id: &str) -> Result<Vec<u8>, String> {
        let found = self.0.iter().find(|(known, _)| known == id);
        match found.ok_or_else(|| format!("No secret with id '{id}'"))? {
            (_, Secret::Data(data)) => Ok(data.clone().into_bytes()),
            (_, Secret::File(path)) => std::fs::read(path)
                .map_err(|error| format!("Unable to read {path}: {}", super::messages::system(&error))),
        }
    }
}
