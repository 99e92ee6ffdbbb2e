//! The error of a request to the control socket.

use std::fmt;
use std::io::ErrorKind;

use crate::error::Error;

/// Why a request is not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiProblem {
    /// The HTTP status.
    pub(crate) status: u16,
    pub(crate) error: String,
    pub(crate) remedy: Option<String>,
}

impl ApiProblem {
    pub(crate) fn new(status: u16, error: impl Into<String>) -> ApiProblem {
        ApiProblem {
            status,
            error: error.into(),
            remedy: None,
        }
    }

    pub(crate) fn with_remedy(mut self, remedy: impl Into<String>) -> ApiProblem {
        self.remedy = Some(remedy.into());
        self
    }
}

impl fmt::Display for ApiProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.error)?;
        match &self.remedy {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

impl From<Error> for ApiProblem {
    fn from(error: Error) -> ApiProblem {
        let status = match error.kind() {
            ErrorKind::InvalidInput
            | ErrorKind::InvalidFilename
            | ErrorKind::Unsupported
            | ErrorKind::NotFound
            | ErrorKind::AddrNotAvailable => 400,
            ErrorKind::PermissionDenied => 403,
            ErrorKind::AddrInUse | ErrorKind::AlreadyExists => 409,
            ErrorKind::NotConnected => 503,
            _ => 500,
        };
        let (operation, subject, cause) = (error.operation(), error.subject(), error.cause());
        ApiProblem {
            status,
            error: format!("{operation} {subject}: {cause}"),
            remedy: error.remedy().map(str::to_owned),
        }
    }
}
