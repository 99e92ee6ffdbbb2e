//! Parses an address of any family, by its scheme.

use std::str::FromStr;

use super::tcp::TCP_EXAMPLE;
use super::transport::{ALL, UNIX};
use super::{Address, AddressError, NpipeAddress, Part, TcpAddress, UnixAddress};

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<Address, AddressError> {
        if NpipeAddress::is_plain(input) {
            return input.parse().map(Address::Npipe);
        }
        if ["/", "./", "../"].iter().any(|s| input.starts_with(s)) {
            return UnixAddress::from_plain(input).map(Address::Unix);
        }
        let scheme = input.split_once(':').map_or("", |(scheme, _)| scheme);
        match scheme.to_ascii_lowercase().as_str() {
            "hyperkit" => input.parse().map(Address::Hyperkit),
            "vsock" => input.parse().map(Address::Vsock),
            "hvsock" => input.parse().map(Address::Hvsock),
            "vsock-mux" => input.parse().map(Address::VsockMux),
            "unix" => input.parse().map(Address::Unix),
            "npipe" => input.parse().map(Address::Npipe),
            "tcp" | "tcp4" | "tcp6" => input.parse().map(Address::Tcp),
            "exec" => input.parse().map(Address::Exec),
            "file" => input.parse().map(Address::File),
            _ => Err(unknown(input, scheme)),
        }
    }
}

/// Returns the error for an input of no known scheme, with the example that comes nearest to it.
fn unknown(input: &str, scheme: &str) -> AddressError {
    if input.is_empty() {
        return AddressError::new(input, Part::Address, "", "is empty", TCP_EXAMPLE);
    }
    let list = ALL.map(|row| row.scheme).join(", ");
    let missing = format!("is missing (known: {list})");
    let behind = input.rsplit_once(':').map_or(input, |(_, behind)| behind);
    if !input.contains("://") && behind.starts_with(|c: char| c.is_ascii_digit()) {
        // HOST:PORT, PORT or :PORT.
        let example = ["tcp://", "tcp://127.0.0.1:", "tcp://127.0.0.1"]
            .map(|start| format!("{start}{input}").parse::<TcpAddress>());
        let example = match (example.iter().flatten().next(), &example[0]) {
            (Some(address), _) => address.to_string(),
            (None, Err(error)) => error.example().to_owned(),
            (None, Ok(_)) => TCP_EXAMPLE.to_owned(),
        };
        return AddressError::new(input, Part::Scheme, "", missing, example);
    }
    if input.starts_with("~/") {
        let why = format!(
            "{missing}; or ~ is filled in by the shell, at the start of a word that is not in quotes"
        );
        return AddressError::new(input, Part::Scheme, "", why, UNIX.example);
    }
    if !input.contains(':') {
        // What looks like a file's name was to be a path.
        let file = input.contains('/') || input.ends_with(".sock");
        let example = match UnixAddress::from_plain(&format!("./{input}")) {
            Ok(path) if file => path.to_string(),
            _ => TCP_EXAMPLE.to_owned(),
        };
        return AddressError::new(input, Part::Scheme, "", missing, example);
    }
    let letters = |s: &str| s.replace(|c: char| !c.is_alphanumeric(), "").to_lowercase();
    let near = ALL
        .iter()
        .find(|row| letters(row.scheme) == letters(scheme));
    AddressError::new(
        input,
        Part::Scheme,
        scheme,
        format!("is unknown (known: {list})"),
        near.map_or(TCP_EXAMPLE, |row| row.example),
    )
}
