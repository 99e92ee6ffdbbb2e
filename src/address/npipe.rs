//! `npipe:////./pipe/NAME`, the addresses of Windows' named pipes.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::uri::{self, Uri};
use super::{AddressError, Part};

const SCHEME: &str = "npipe";
const EXAMPLE: &str = "npipe:////./pipe/docker_engine";
const SDDL: &str = "sddl";

/// A named pipe of this machine: `npipe:////./pipe/NAME[?sddl=TEXT]` as Docker writes it (or
/// `npipe://./pipe/NAME`), percent-encoded; or `//./pipe/NAME` and `\\.\pipe\NAME`, as they are.
///
/// Slashes and backslashes mean the same. Printed it is always Docker's URI.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NpipeAddress {
    /// What stands behind `\\.\pipe\`, with slashes for backslashes: never empty, and no part of it
    /// is empty, `.` or `..`, which Windows would take out. To Windows capital and small letters
    /// are the same.
    pub name: String,
    /// To listen: who may do what, as a security descriptor in Microsoft's SDDL, such as
    /// `D:P(A;;GA;;;BA)` for administrators. It has to let the user who listens do all (`GA`).
    /// `None`: that user alone.
    pub sddl: Option<String>,
}

impl NpipeAddress {
    /// Returns whether a text without a scheme is the path of a pipe. Two backslashes at the start
    /// mean nothing else here.
    pub(super) fn is_plain(input: &str) -> bool {
        input.starts_with(r"\\") || behind_prefix(&slashes(input)).is_some()
    }

    /// Parses a path as people write it, without percent-encoding.
    pub(super) fn from_plain(input: &str) -> Result<NpipeAddress, AddressError> {
        let error = |reason| AddressError::new(input, Part::Path, input, reason, EXAMPLE);
        Ok(NpipeAddress {
            name: name_of(&slashes(input)).map_err(error)?,
            sddl: None,
        })
    }
}

fn slashes(text: &str) -> String {
    text.replace('\\', "/")
}

fn behind_prefix(path: &str) -> Option<&str> {
    const PREFIX: &str = "//./pipe/";
    let (prefix, name) = path.split_at_checked(PREFIX.len())?;
    prefix.eq_ignore_ascii_case(PREFIX).then_some(name)
}

/// Returns the name in `//./pipe/NAME`.
fn name_of(path: &str) -> Result<String, &'static str> {
    let name = match behind_prefix(path) {
        Some(name) => name,
        None if path.to_ascii_lowercase().contains("/pipe/") => {
            return Err("is no pipe of this machine, which begins with //./pipe/");
        }
        None => return Err("is no pipe's: it wants //./pipe/ before its name"),
    };
    if name.is_empty() {
        return Err("has no name behind //./pipe/");
    }
    if name.contains('\0') {
        return Err("has a NUL");
    }
    // Windows takes these out before it looks for the pipe: `..` leads out of the directory of
    // pipes.
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("has an empty part, or one that is . or ..");
    }
    Ok(name.to_owned())
}

impl fmt::Display for NpipeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = uri::encode_path(Path::new(&self.name));
        write!(f, "{SCHEME}:////./pipe/{name}")?;
        uri::write_query(f, &[(SDDL, self.sddl.as_deref())])
    }
}

impl FromStr for NpipeAddress {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<NpipeAddress, AddressError> {
        if NpipeAddress::is_plain(input) {
            return NpipeAddress::from_plain(input);
        }
        let uri = Uri::parse(input, SCHEME, EXAMPLE)?;
        let whole = format!("{}{}", uri.authority, uri.path);
        let error = |reason| uri.error(Part::Path, &whole, reason);
        if whole.is_empty() {
            return Err(uri.error(Part::Path, "", "is missing"));
        }
        let path = String::from_utf8(uri::decode(&whole).map_err(error)?);
        let path = slashes(&path.map_err(|_| error("is not UTF-8 when decoded"))?);
        // With the dot where a host stands.
        let path = match path.strip_prefix("./") {
            Some(rest) => format!("//./{rest}"),
            None => path,
        };
        let name = name_of(&path).map_err(error)?;
        let mut address = NpipeAddress { name, sddl: None };
        for (key, value) in uri.query(&[SDDL])? {
            if value.is_empty() || value.contains('\0') {
                let reason = "wants a security descriptor, as in D:P(A;;GA;;;BA)";
                return Err(uri.error(Part::Query, key, reason));
            }
            address.sddl = Some(value);
        }
        Ok(address)
    }
}
