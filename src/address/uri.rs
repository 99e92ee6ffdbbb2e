//! Parses and prints URIs: what all schemes have in common.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use percent_encoding::{AsciiSet, CONTROLS, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

use super::port::parse_u32;
use super::{AddressError, Part, Port};
use crate::sys;

/// What a path may not hold as it is: what would end it, what people cannot see, and `@`, which
/// begins an abstract name.
const IN_PATH: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'<')
    .add(b'>')
    .add(b'?')
    .add(b'@')
    .add(b'[')
    .add(b'\\')
    .add(b']')
    .add(b'^')
    .add(b'`')
    .add(b'{')
    .add(b'|')
    .add(b'}');

/// What a name (of a host, a VM, a file in a query) may not hold as it is: all but RFC 3986's
/// unreserved characters.
const IN_NAME: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// What a value of a query that stands for itself may not hold as it is: less than a name, so that
/// people can read it.
const IN_VALUE: &AsciiSet = &IN_NAME
    .remove(b'/')
    .remove(b':')
    .remove(b',')
    .remove(b'=')
    .remove(b'@')
    .remove(b'+');

/// A URI, `SCHEME://AUTHORITY/PATH?QUERY`, split and not decoded.
pub(super) struct Uri<'a> {
    input: &'a str,
    example: &'static str,
    pub(super) authority: &'a str,
    /// Empty, or with its leading `/`.
    pub(super) path: &'a str,
    query: &'a str,
}

impl<'a> Uri<'a> {
    /// Splits `input` if its scheme is `scheme`; `example` goes into the errors.
    pub(super) fn parse(
        input: &'a str,
        scheme: &str,
        example: &'static str,
    ) -> Result<Uri<'a>, AddressError> {
        let error = |part, text: &str, reason: String| {
            Err(AddressError::new(input, part, text, reason, example))
        };
        let Some((found, rest)) = input.split_once(':') else {
            return error(Part::Scheme, "", format!("is missing ({scheme}://)"));
        };
        if !found.eq_ignore_ascii_case(scheme) {
            return error(Part::Scheme, found, format!("is not {scheme}"));
        }
        let Some(rest) = rest.strip_prefix("//") else {
            return error(Part::Scheme, found, "wants :// behind it".to_owned());
        };
        let (rest, fragment) = cut(rest, '#');
        if let Some(fragment) = fragment {
            return error(Part::Fragment, fragment, NO_FRAGMENT.to_owned());
        }
        let (rest, query) = cut(rest, '?');
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        Ok(Uri {
            input,
            example,
            authority,
            path,
            query: query.unwrap_or(""),
        })
    }

    /// Splits `input`, `SCHEME:PATH?QUERY`, if its scheme is `scheme`. Two slashes may stand before
    /// an absolute path.
    pub(super) fn parse_path(
        input: &'a str,
        scheme: &str,
        example: &'static str,
    ) -> Result<Uri<'a>, AddressError> {
        let error = |part, text: &str, reason: &str| {
            Err(AddressError::new(input, part, text, reason, example))
        };
        let (found, rest) = cut(input, ':');
        let Some(rest) = rest.filter(|_| found.eq_ignore_ascii_case(scheme)) else {
            return error(Part::Scheme, found, &format!("is not {scheme}"));
        };
        let (rest, fragment) = cut(rest, '#');
        if let Some(fragment) = fragment {
            return error(Part::Fragment, fragment, NO_FRAGMENT);
        }
        let (path, query) = cut(rest, '?');
        let path = match path.strip_prefix("//") {
            Some(absolute) if absolute.starts_with('/') => absolute,
            Some(host) => {
                let reason = "stands where a host would: an absolute path has one slash, or three";
                return error(Part::Path, host, reason);
            }
            None => path,
        };
        Ok(Uri {
            input,
            example,
            authority: "",
            path,
            query: query.unwrap_or(""),
        })
    }

    pub(super) fn error(&self, part: Part, text: &str, reason: impl Into<String>) -> AddressError {
        AddressError::new(self.input, part, text, reason, self.example)
    }

    /// Makes an error with an example for this input.
    pub(super) fn error_with_example(
        &self,
        part: Part,
        text: &str,
        reason: &str,
        example: String,
    ) -> AddressError {
        AddressError::new(self.input, part, text, reason, example)
    }

    /// Splits the authority into its halves, `BEFORE:PORT`.
    pub(super) fn split_port(&self) -> Result<(&'a str, &'a str), AddressError> {
        self.authority
            .rsplit_once(':')
            .ok_or_else(|| self.error(Part::Port, "", "is missing"))
    }

    pub(super) fn port(&self, text: &str) -> Result<Port, AddressError> {
        parse_u32(text)
            .map(Port)
            .map_err(|reason| self.error(Part::Port, text, reason))
    }

    /// Decodes a name, and refuses one that is empty or has a NUL.
    pub(super) fn name(&self, part: Part, text: &str) -> Result<String, AddressError> {
        let error = |reason: &str| self.error(part, text, reason);
        let name = String::from_utf8(decode(text).map_err(error)?)
            .map_err(|_| error("is not UTF-8 when decoded"))?;
        match name.as_str() {
            "" => Err(error("is missing")),
            name if name.contains('\0') => Err(error("has a NUL")),
            _ => Ok(name),
        }
    }

    /// Decodes the path of a file: `/abs`, or `/./rel` for the relative `rel`.
    pub(super) fn file(&self, missing: &str) -> Result<PathBuf, AddressError> {
        let text = match self.path {
            "" | "/" => return Err(self.error(Part::Path, "", missing)),
            "/." | "/./" => ".",
            path => path.strip_prefix("/./").unwrap_or(path),
        };
        match decode_path(text) {
            // `/.//`, or with an encoded slash.
            Ok(path) if path.as_os_str() == "/" => Err(self.error(Part::Path, self.path, missing)),
            Ok(path) => Ok(path),
            Err(reason) => Err(self.error(Part::Path, self.path, reason)),
        }
    }

    /// Decodes the path of [`parse_path`](Uri::parse_path): `/abs`, or `./rel` for the relative
    /// `rel`. A path that begins with a name is refused, lest it look like that of a program that
    /// is searched for. `missing` and `named` are what is said of no path, and of a name.
    pub(super) fn local_path(&self, missing: &str, named: &str) -> Result<PathBuf, AddressError> {
        let error = |reason: &str| self.error(Part::Path, self.path, reason);
        let text = match self.path {
            "" | "/" => return Err(self.error(Part::Path, "", missing)),
            path if path.starts_with(['/']) || path.starts_with("../") => path,
            path => path.strip_prefix("./").ok_or_else(|| error(named))?,
        };
        let path = decode_path(text).map_err(error)?;
        // `.//rel` is a relative path, too. (Windows has another root, which is written otherwise.)
        let is_relative = self.path.starts_with('.');
        let has_slash = path.as_os_str().as_encoded_bytes().starts_with(b"/");
        let path = match is_relative && has_slash {
            true => path.components().skip(1).collect(),
            false => path,
        };
        match path.as_os_str() {
            path if path.is_empty() || path == "/" => Err(self.error(Part::Path, "", missing)),
            _ => Ok(path),
        }
    }

    /// Returns the pairs of the query, not decoded.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        let pairs = self.query.split('&').filter(|pair| !pair.is_empty());
        pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")))
    }

    /// Decodes the pairs of the query. Each key is one of `known` and stands there once.
    pub(super) fn query(
        &self,
        known: &[&'static str],
    ) -> Result<Vec<(&'static str, String)>, AddressError> {
        let mut pairs: Vec<(&'static str, String)> = Vec::new();
        for pair in self.query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let Some(key) = known.iter().find(|known| **known == key) else {
                let reason = match known {
                    [] => "is not taken here (a ? in a name is written %3F)".to_owned(),
                    known => format!("is unknown (known: {})", known.join(", ")),
                };
                return Err(self.error(Part::Query, key, reason));
            };
            if pairs.iter().any(|(seen, _)| seen == key) {
                return Err(self.error(Part::Query, key, "stands there twice"));
            }
            let value = decode(value)
                .and_then(|value| String::from_utf8(value).map_err(|_| NOT_UTF8))
                .map_err(|reason| self.error(Part::Query, pair, reason))?;
            pairs.push((key, value));
        }
        Ok(pairs)
    }

    /// Parses the value of the query's `key` as a switch.
    pub(super) fn yes_or_no(&self, key: &str, value: &str) -> Result<bool, AddressError> {
        match value {
            "yes" => Ok(true),
            "no" => Ok(false),
            _ => Err(self.error(Part::Query, key, "is yes or no")),
        }
    }

    /// Refuses a path, but for a closing `/`.
    pub(super) fn no_path(&self) -> Result<(), AddressError> {
        match self.path {
            "" | "/" => Ok(()),
            path => Err(self.error(Part::Path, path, "is not taken here")),
        }
    }

    /// Refuses a path (but for a closing `/`) and a query.
    pub(super) fn ends_here(&self) -> Result<(), AddressError> {
        self.no_path()?;
        self.query(&[]).map(drop)
    }
}

const NO_FRAGMENT: &str = "means nothing here (a # in a name is written %23)";
const NOT_UTF8: &str = "is not UTF-8 when decoded";

/// Returns `text` up to `mark`, and what is behind it.
fn cut(text: &str, mark: char) -> (&str, Option<&str>) {
    match text.split_once(mark) {
        Some((before, behind)) => (before, Some(behind)),
        None => (text, None),
    }
}

/// Decodes percent-encoding. Unlike lenient decoders it refuses a `%` without two hex digits.
pub(super) fn decode(text: &str) -> Result<Vec<u8>, &'static str> {
    let hex = |digit: Option<&u8>| digit.is_some_and(u8::is_ascii_hexdigit);
    for part in text.split('%').skip(1).map(str::as_bytes) {
        if !hex(part.first()) || !hex(part.get(1)) {
            return Err("has a % without two hex digits (a % itself is written %25)");
        }
    }
    Ok(percent_decode_str(text).collect())
}

/// Decodes percent-encoding of a file's path.
pub(super) fn decode_path(text: &str) -> Result<PathBuf, &'static str> {
    let bytes = decode(text)?;
    if bytes.contains(&0) {
        return Err("has a NUL");
    }
    let path: OsString =
        sys::os_string_from_bytes(bytes).map_err(|_| "is no file name on this system")?;
    Ok(path.into())
}

/// Prints a name.
pub(super) fn encode_name(name: &[u8]) -> impl fmt::Display {
    percent_encode(name, IN_NAME)
}

/// Prints a value that may be any bytes.
pub(super) fn encode_value(value: &OsStr) -> impl fmt::Display {
    percent_encode(value.as_encoded_bytes(), IN_VALUE)
}

/// Prints a name that would be read as something else: its first byte is always encoded.
pub(super) fn write_guarded_name(f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
    match name.as_bytes().split_first() {
        Some((first, rest)) => write!(f, "%{first:02X}{}", encode_name(rest)),
        None => Ok(()),
    }
}

/// Prints a path's bytes.
pub(super) fn encode_path(path: &Path) -> impl fmt::Display {
    percent_encode(path.as_os_str().as_encoded_bytes(), IN_PATH)
}

/// Prints a path as [`Uri::file`] reads it.
pub(super) fn write_file(f: &mut fmt::Formatter<'_>, path: &Path) -> fmt::Result {
    match path.as_os_str().as_encoded_bytes() {
        // An absolute path that begins as a relative one is marked.
        [b'/', b'.', rest @ ..] if matches!(rest, [] | [b'/', ..]) => {
            write!(f, "/%2E{}", percent_encode(rest, IN_PATH))
        }
        [b'/', ..] => write!(f, "{}", encode_path(path)),
        _ => write!(f, "/./{}", encode_path(path)),
    }
}

/// Prints a path as [`Uri::local_path`] reads it.
pub(super) fn write_local_path(f: &mut fmt::Formatter<'_>, path: &Path) -> fmt::Result {
    let start = match path.as_os_str().as_encoded_bytes() {
        [b'/', b'/', ..] => "//",
        [b'/', ..] => "",
        _ => "./",
    };
    write!(f, "{start}{}", encode_path(path))
}

/// Prints `?key=value&…`, leaving out pairs without a value.
pub(super) fn write_query(
    f: &mut fmt::Formatter<'_>,
    pairs: &[(&str, Option<&str>)],
) -> fmt::Result {
    let mut mark = '?';
    for (key, value) in pairs {
        if let Some(value) = value {
            write!(f, "{mark}{key}={}", encode_name(value.as_bytes()))?;
            mark = '&';
        }
    }
    Ok(())
}
