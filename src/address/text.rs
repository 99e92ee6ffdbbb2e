//! The text of an address that a person gave as a file name, or that may be no UTF-8.

use std::borrow::Cow;
use std::ffi::OsStr;

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};

use super::unix::UnixAddress;

/// Returns the text of an address that may be no UTF-8: a path that stands there as it is becomes a
/// URI; in a URI the bytes that are no UTF-8 are percent-encoded.
pub(crate) fn as_text(input: &OsStr) -> Cow<'_, str> {
    if let Some(text) = input.to_str() {
        return text.into();
    }
    let bytes = input.as_encoded_bytes();
    if ["/", "./", "../"]
        .iter()
        .any(|start| bytes.starts_with(start.as_bytes()))
    {
        return UnixAddress::Path(input.into()).to_string().into();
    }
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text += chunk.valid();
        text += &percent_encode(chunk.invalid(), NON_ALPHANUMERIC).to_string();
    }
    text.into()
}
