//! The address at which guests may control an hvsock, and the guests that may, from the file or the
//! command line.

use serde_json::Value;

use super::values;
use crate::address::Address;
use crate::proxy::Source;

/// The address at which guests may control an hvsock, and the guests that may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestControl {
    /// A vsock address without framing.
    pub(crate) address: Address,
    /// The CIDs of the guests that may; if it is empty, all guests.
    pub(crate) from: Vec<Source>,
}

/// Reads the address for guests.
///
/// # Errors
/// Returns why the value is no valid address for that.
pub(crate) fn read_address(value: &Value) -> Result<Address, String> {
    match values::address(value)? {
        Address::Vsock(vsock) if !vsock.framing => Ok(Address::Vsock(vsock)),
        other => Err(format!(
            "{other} is not a vsock address; a right one: \"vsock://:9101\""
        )),
    }
}

/// Reads the guests that may control it: a list of CIDs, or one CID.
///
/// # Errors
/// Returns what is wrong with the value. An empty list is refused: it might be meant as no guest.
pub(crate) fn read_sources(value: &Value) -> Result<Vec<Source>, String> {
    let sources = values::sources(value)?;
    if sources.is_empty() {
        return Err(
            "it names no guest; write their CIDs, as in [3, 16], or leave it out".to_owned(),
        );
    }
    match sources.iter().find(|source| source.as_cid().is_none()) {
        Some(other) => Err(format!("{other} is no CID; a right one: [3, 16]")),
        None => Ok(sources),
    }
}

/// Parses an address of the command line.
#[cfg(unix)]
pub(crate) fn parse_address(text: &str) -> Result<Address, String> {
    read_address(&text.into())
}

/// Parses a CID of the command line.
#[cfg(unix)]
pub(crate) fn parse_source(text: &str) -> Result<Source, String> {
    let source = text.parse().ok();
    let cid = source.filter(|source: &Source| source.as_cid().is_some());
    cid.ok_or_else(|| format!("{text:?} is no CID; a right one: 3"))
}
