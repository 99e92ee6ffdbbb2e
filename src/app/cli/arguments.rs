//! Parsers of command line arguments that may be no UTF-8, as file names may.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{OsStringValueParser, TypedValueParser};

use super::spec::{Locals, Remotes};
use crate::AddressError;
#[cfg(unix)]
use crate::address::ExecAddress;
use crate::address::{Address, HyperkitVm, as_text};
use crate::app::ranges::join;
use crate::app::values::parse_local_addresses;
use crate::sys::os_string_from_bytes;

/// Parses an address.
#[cfg(unix)]
pub(super) fn address() -> impl TypedValueParser<Value = Address> {
    OsStringValueParser::new().try_map(|text| Address::from_os(&text))
}

/// The addresses of one argument: one, or those of a range of ports. Never empty.
#[derive(Clone, Debug)]
pub(super) struct Addresses(pub(super) Vec<Address>);

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0[..] {
            [] => Ok(()),
            [first, .., last] => f.write_str(&join(first, last)),
            [one] => one.fmt(f),
        }
    }
}

/// Parses an address, or those of a range of ports, as the file has it: a TCP address may leave its
/// scheme out. Unlike in the file, `~` is left to the shell.
pub(super) fn addresses() -> impl TypedValueParser<Value = Addresses> {
    OsStringValueParser::new().try_map(|text| {
        let text = as_text(&text);
        let all = match text.starts_with('~') {
            true => text
                .parse()
                .map(|it| vec![it])
                .map_err(|e: AddressError| e.to_string()),
            false => parse_local_addresses(&text),
        };
        all.map(Addresses)
    })
}

/// Parses an address, or what stands for one, into a text that keeps every byte.
pub(super) fn address_text() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new().map(|text| as_text(&text).into_owned())
}

/// Parses a VM's name or directory.
pub(super) fn vm() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new().map(|text| match text.into_string() {
        Ok(text) => text,
        // Names of VMs are UTF-8.
        Err(path) => HyperkitVm::new(PathBuf::from(path)).to_string(),
    })
}

/// Parses a program: its path, or its `exec:` address.
#[cfg(unix)]
pub(super) fn program() -> impl TypedValueParser<Value = ExecAddress> {
    OsStringValueParser::new().try_map(|text| match text.as_encoded_bytes() {
        bytes if bytes.starts_with(b"exec:") => {
            let address = as_text(&text).parse::<ExecAddress>();
            address.map_err(|e| e.to_string())
        }
        bytes if bytes.contains(&b'/') => Ok(ExecAddress::new(text)),
        _ => Err("no program is searched for: write its path".to_owned()),
    })
}

/// Parses `-L`.
pub(super) fn locals() -> impl TypedValueParser<Value = Locals> {
    // A path stands before the last colon.
    OsStringValueParser::new().try_map(|text| parse_pair(text, |it| it.iter().rposition(is_colon)))
}

/// Parses `-R`.
pub(super) fn remotes() -> impl TypedValueParser<Value = Remotes> {
    OsStringValueParser::new().try_map(|text| parse_pair(text, |it| it.iter().position(is_colon)))
}

fn is_colon(byte: &u8) -> bool {
    *byte == b':'
}

/// Parses two parts with a colon between them, each of which may be an address.
fn parse_pair<T: FromStr<Err = String>>(
    text: OsString,
    split: impl Fn(&[u8]) -> Option<usize>,
) -> Result<T, String> {
    let bytes = text.as_encoded_bytes();
    let (None, Some(at)) = (text.to_str(), split(bytes)) else {
        return as_text(&text).parse();
    };
    let part = |bytes: &[u8]| match os_string_from_bytes(bytes.to_vec()) {
        Ok(part) => as_text(&part).into_owned(),
        Err(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
    };
    format!("{}:{}", part(&bytes[..at]), part(&bytes[at + 1..])).parse()
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn no_byte_of_a_path_is_lost() {
        let of = |bytes: &[u8]| Address::from_os(OsStr::from_bytes(bytes)).map(|it| it.to_string());
        for (bytes, printed) in [
            (b"/tmp/\xff.sock".as_slice(), "unix:///tmp/%FF.sock"),
            (b"./\xff?", "unix:./%FF%3F"),
            (b"unix:a%20\xff", "unix:a%20%FF"),
            (b"exec:/bin/\xff?arg=\xfe", "exec:/bin/%FF?arg=%FE"),
            (b"/plain", "unix:///plain"),
        ] {
            assert_eq!(of(bytes).unwrap(), printed);
        }
        assert!(of(b"\xff").is_err());
    }

    #[test]
    fn pairs_have_paths() {
        let split = |it: &[u8]| it.iter().rposition(is_colon);
        let local = OsStr::from_bytes(b"/tmp/a:\xff:80").to_owned();
        let Locals(locals) = parse_pair(local, split).unwrap();
        assert_eq!(locals[0].listen.to_string(), "unix:///tmp/a:%FF");
        let split = |it: &[u8]| it.iter().position(is_colon);
        let remote = OsStr::from_bytes(b"5000:./\xff:1").to_owned();
        let Remotes(remotes) = parse_pair(remote, split).unwrap();
        assert_eq!(remotes[0].target.to_string(), "unix:./%FF:1");
        let none = OsStr::from_bytes(b"\xff").to_owned();
        assert!(
            parse_pair::<Locals>(none, |_| None)
                .unwrap_err()
                .contains("missing")
        );
    }
}
