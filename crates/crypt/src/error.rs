use std::fmt;

/// Why a header cannot be read, or a disk not be unlocked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CryptError {
    /// The header contradicts its format.
    Corrupt(String),
    /// The header is valid but asks for something that is not supported.
    Unsupported(String),
    /// The header asks for more work than is allowed.
    Limit(String),
    /// No key slot opens with the passphrase.
    WrongPassphrase,
    /// The system has no random bytes.
    NoRandom,
}

impl fmt::Display for CryptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Corrupt(text) | Self::Limit(text) => f.write_str(text),
            Self::Unsupported(what) => write!(f, "{what} is not supported"),
            Self::WrongPassphrase => f.write_str("no key slot opens with this passphrase"),
            Self::NoRandom => f.write_str("the system gives no random bytes"),
        }
    }
}

impl std::error::Error for CryptError {}
