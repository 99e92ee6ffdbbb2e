//! Unix sockets, alone and as the front of a VM's vsock ports.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::uri::{self, Uri};
use super::{AddressError, Part, Port};

const UNIX_EXAMPLE: &str = "unix:///run/service.sock";

/// A Unix socket: a path that begins with `/`, `./` or `../`, as it is; or `unix:///abs`,
/// `unix:rel`, `unix:@abstract`, percent-encoded.
///
/// Printed it is always the URI, in which no byte is lost.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UnixAddress {
    /// A socket in the file system; never empty.
    Path(PathBuf),
    /// A name in Linux's abstract namespace, without the NUL that precedes it there; any bytes,
    /// never empty.
    Abstract(Vec<u8>),
}

impl UnixAddress {
    /// Parses a path as people write it, without percent-encoding.
    pub(super) fn from_plain(input: &str) -> Result<UnixAddress, AddressError> {
        if input.contains('\0') {
            return Err(AddressError::new(
                input,
                Part::Path,
                "",
                "has a NUL",
                UNIX_EXAMPLE,
            ));
        }
        Ok(UnixAddress::Path(input.into()))
    }
}

impl fmt::Display for UnixAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UnixAddress::Path(path) => {
                // Not Path::is_absolute: what counts is how the text will be read again, on any
                // system.
                let absolute = path.as_os_str().as_encoded_bytes().starts_with(b"/");
                let start = if absolute { "unix://" } else { "unix:" };
                write!(f, "{start}{}", uri::encode_path(path))
            }
            UnixAddress::Abstract(name) => write!(f, "unix:@{}", uri::encode_name(name)),
        }
    }
}

impl FromStr for UnixAddress {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<UnixAddress, AddressError> {
        let error = |part, text: &str, reason: &str| {
            AddressError::new(input, part, text, reason, UNIX_EXAMPLE)
        };
        let rest = match input.split_once(':') {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("unix") => rest,
            _ => return UnixAddress::from_plain(input),
        };
        if let Some(at) = rest.find(['?', '#']) {
            let (part, reason) = match &rest[at..=at] {
                "?" => (
                    Part::Query,
                    "is not taken here (a ? in a name is written %3F)",
                ),
                _ => (
                    Part::Fragment,
                    "means nothing here (a # in a name is written %23)",
                ),
            };
            return Err(error(part, &rest[at + 1..], reason));
        }
        if let Some(name) = rest.strip_prefix('@') {
            return match uri::decode(name) {
                Ok(name) if name.is_empty() => Err(error(Part::Path, rest, "has no name behind @")),
                Ok(name) => Ok(UnixAddress::Abstract(name)),
                Err(reason) => Err(error(Part::Path, rest, reason)),
            };
        }
        let path = match rest.strip_prefix("//") {
            None => rest,
            Some(path) if path.is_empty() || path.starts_with('/') => path,
            Some(path) => {
                let reason = "stands where a host would: an absolute path has three slashes, a relative one none";
                let example = uri::decode_path(path).map(UnixAddress::Path);
                let example = example.map_or(UNIX_EXAMPLE.to_owned(), |path| path.to_string());
                return Err(AddressError::new(input, Part::Path, path, reason, example));
            }
        };
        if path.is_empty() {
            return Err(error(Part::Path, "", "is missing"));
        }
        match uri::decode_path(path) {
            Ok(path) => Ok(UnixAddress::Path(path)),
            Err(reason) => Err(error(Part::Path, path, reason)),
        }
    }
}

/// A vsock port behind the Unix socket of Firecracker, Cloud Hypervisor or vhost-device-vsock:
/// `vsock-mux://:PORT/PATH[?half-close=yes]`.
///
/// The socket is one VM's, so that there is no CID. `/./rel` is the relative path `rel`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VsockMuxAddress {
    /// The Unix socket that takes `CONNECT PORT`; neither empty nor `/`.
    pub path: PathBuf,
    /// The guest's port to dial, or the host's port to listen on.
    pub port: Port,
    /// The VMM goes on carrying the guest's direction after the host's half-close. Most take a
    /// half-close for the end of both.
    pub half_close: bool,
}

impl VsockMuxAddress {
    /// Returns the path at which a program of the host listens for guests that dial the host's
    /// port.
    pub fn listen_path(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", self.port.0));
        path.into()
    }
}

impl fmt::Display for VsockMuxAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vsock-mux://:{}", self.port.0)?;
        uri::write_file(f, &self.path)?;
        uri::write_query(f, &[(HALF_CLOSE, self.half_close.then_some("yes"))])
    }
}

const HALF_CLOSE: &str = "half-close";

impl FromStr for VsockMuxAddress {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<VsockMuxAddress, AddressError> {
        let uri = Uri::parse(input, "vsock-mux", "vsock-mux://:1024/run/vm.sock")?;
        let (cid, port) = uri.split_port()?;
        if !cid.is_empty() {
            return Err(uri.error(Part::Cid, cid, "is not taken here: the socket is one VM's"));
        }
        let mut address = VsockMuxAddress {
            port: uri.port(port)?,
            path: uri.file("of the VM's Unix socket is missing")?,
            half_close: false,
        };
        for (key, value) in uri.query(&[HALF_CLOSE])? {
            address.half_close = uri.yes_or_no(key, &value)?;
        }
        Ok(address)
    }
}
