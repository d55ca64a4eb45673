//! `--object`: QEMU's user-creatable objects, of which secrets matter here.

use diskmill::Secret;

use super::getopt::Args;
use super::opts::Dict;
use super::{Fail, Outcome};
use crate::secrets::SecretObject;

/// The option that says what an object is.
const TYPE: &str = "qom-type";

/// Types of QEMU's that do nothing for an image tool.
const IGNORED: [&str; 4] = ["throttle-group", "iothread", "authz-simple", "tls-creds-anon"];

/// Passphrases by their id.
#[derive(Debug, Default)]
pub(super) struct Secrets {
    known: Vec<SecretObject>,
    /// Ids without a passphrase are no mistake.
    optional: bool,
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
        let dict =
            if text.starts_with('{') { Dict::from_json(text)? } else { Dict::from_list_with(text, TYPE) };
        let kind = dict.get(TYPE).ok_or("Parameter 'qom-type' is missing")?;
        if IGNORED.contains(&kind) {
            return Ok(());
        }
        if kind != "secret" {
            return Err(format!("Parameter 'qom-type' does not accept value '{kind}'"));
        }
        let id = dict.get("id").ok_or("Parameter 'id' is missing")?;
        match (dict.get("data"), dict.get("file")) {
            (Some(_), Some(_)) => return Err("'file' and 'data' are mutually exclusive".to_owned()),
            (None, None) => return Err("Either 'file' or 'data' must be provided".to_owned()),
            _ => {}
        }
        if self.known.iter().any(|known| known.id == id) {
            return Err(format!("attempt to add duplicate property '{id}' to object (type 'container')"));
        }
        let list: Vec<String> =
            dict.iter().map(|(name, value)| format!("{name}={}", value.replace(',', ",,"))).collect();
        self.known.push(SecretObject::parse(&list.join(","))?);
        Ok(())
    }

    /// The passphrase of this id.
    pub(super) fn get(&self, id: &str) -> Result<Secret, String> {
        let found = self.known.iter().find(|known| known.id == id);
        found.map(|known| known.secret.clone()).ok_or_else(|| format!("No secret with id '{id}'"))
    }

    /// The passphrase of this id that is to open an image; `None` where only its metadata is looked at.
    pub(super) fn to_open(&self, id: &str) -> Result<Option<Secret>, String> {
        match self.get(id) {
            Err(_) if self.optional => Ok(None),
            found => found.map(Some),
        }
    }

    /// The same passphrases for a look at metadata only.
    pub(super) fn optional(self) -> Self {
        Self { optional: true, ..self }
    }
}
