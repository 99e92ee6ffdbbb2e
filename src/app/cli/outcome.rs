//! How a command ends.

/// Why a command ended without having done what it was asked for.
#[derive(Debug)]
pub(super) enum Failure {
    /// The words were wrong: exit code 2.
    Usage(String),
    /// It could not be done: exit code 1.
    Failed(String),
    /// The same, in several lines, of which the first says what.
    #[cfg(unix)]
    Listed(Vec<String>),
    /// The program that was to be run has ended with this exit code, which isn't 0.
    #[cfg(unix)]
    Program(u8),
    /// It could not be done, and that was told already: exit code 1.
    Silent,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Failed(error.to_string())
    }
}

pub(super) type Outcome = Result<(), Failure>;
