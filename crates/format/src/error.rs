use std::fmt;

/// What is wrong with a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// The magic number or signature is another one: not this format at all.
    NotThisFormat,
    /// The structure contradicts its specification or itself.
    Corrupt,
    /// The structure is valid but asks for something this library does not do.
    Unsupported,
    /// The structure is larger than [`Limits`](crate::Limits) allows.
    Limit,
}

/// A structure of an image that cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatError {
    /// What kind of problem it is.
    pub problem: Problem,
    /// The structure as a reader of the specification would name it, for example
    /// `header`, `L2 table 17, entry 3`.
    pub structure: String,
    /// The offset in the file (bytes) at which the structure stands, where it is known.
    pub offset: Option<u64>,
    /// What is wrong with it, in words.
    pub message: String,
}

impl FormatError {
    /// An error about `structure` with no offset yet.
    pub fn new(problem: Problem, structure: impl Into<String>, message: impl Into<String>) -> Self {
        Self { problem, structure: structure.into(), offset: None, message: message.into() }
    }

    /// A structure that contradicts its specification.
    pub fn corrupt(structure: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Problem::Corrupt, structure, message)
    }

    /// A valid structure that is not supported.
    pub fn unsupported(structure: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Problem::Unsupported, structure, message)
    }

    /// A structure over its limit.
    pub fn limit(structure: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Problem::Limit, structure, message)
    }

    /// Bytes of another format.
    pub fn not_this_format(structure: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Problem::NotThisFormat, structure, message)
    }

    /// The same error with the file offset (bytes) of the structure.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        self.offset = Some(offset);
        self
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.offset {
            Some(offset) => write!(f, "{} at offset {:#x}: {}", self.structure, offset, self.message),
            None => write!(f, "{}: {}", self.structure, self.message),
        }
    }
}

impl std::error::Error for FormatError {}
