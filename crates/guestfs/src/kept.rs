//! Sessions that outlive the program that started them.

/// What the keeper is told to keep.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct Keep {
    /// After how many seconds without use the session ends.
    pub(crate) idle_secs: u64,
}
