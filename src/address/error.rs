//! The error of a text that is not an address.

use std::fmt;

/// Which part of an address is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Part {
    /// The whole of it.
    Address,
    /// What stands before `://`.
    Scheme,
    /// What stands between `//` and the path.
    Authority,
    /// The context id of a VM.
    Cid,
    /// The port.
    Port,
    /// The path, or the state directory.
    Path,
    /// The TCP host.
    Host,
    /// The VM of an `hvsock` address.
    Vm,
    /// The service of an `hvsock` address.
    Service,
    /// What stands behind `?`.
    Query,
    /// What stands behind `#`.
    Fragment,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Address => "it",
            Part::Scheme => "scheme",
            Part::Authority => "authority",
            Part::Cid => "cid",
            Part::Port => "port",
            Part::Path => "path",
            Part::Host => "host",
            Part::Vm => "vm",
            Part::Service => "service",
            Part::Query => "query",
            Part::Fragment => "fragment",
        })
    }
}

/// A text that is not an address: which part of it is wrong, why, and what a right one looks like.
///
/// Prints as one line, whatever the input: control characters in it are escaped.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AddressError {
    input: String,
    part: Part,
    text: String,
    reason: String,
    example: String,
}

impl AddressError {
    /// Makes an error of the part `text`, as it stands in the input; empty where there is nothing
    /// to show.
    pub(crate) fn new(
        input: &str,
        part: Part,
        text: &str,
        reason: impl Into<String>,
        example: impl Into<String>,
    ) -> AddressError {
        AddressError {
            input: input.to_owned(),
            part,
            text: text.to_owned(),
            reason: reason.into(),
            example: example.into(),
        }
    }

    /// Returns the text that was to be an address.
    pub fn input(&self) -> &str {
        &self.input
    }

    /// Returns which part of it is wrong.
    pub fn part(&self) -> Part {
        self.part
    }

    /// Returns why it is wrong.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Returns a right address that is near to the input.
    pub fn example(&self) -> &str {
        &self.example
    }
}

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bad address {:?}: {}", self.input, self.part)?;
        if !self.text.is_empty() {
            write!(f, " {:?}", self.text)?;
        }
        write!(f, " {}; a right one: {}", self.reason, self.example)
    }
}

impl std::error::Error for AddressError {}
