//! How a command ends.

/// Why a command did not do what was asked for.
#[derive(Debug)]
pub(super) enum Failure {
    /// The arguments were wrong: exit code 2.
    Usage(String),
    /// It failed: exit code 1.
    Failed(String),
    /// It failed, with several lines, the first of which is a summary: exit code 1.
    #[cfg(unix)]
    Listed(Vec<String>),
    /// The program that was started has ended with this exit code, which isn't 0.
    #[cfg(unix)]
    Program(u8),
    /// It failed, and a message was printed already: exit code 1.
    Silent,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Failed(error.to_string())
    }
}

pub(super) type Outcome = Result<(), Failure>;
