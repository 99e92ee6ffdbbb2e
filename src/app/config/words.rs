//! How people write addresses, times and permissions, on the command line and in a file.

use std::net::{IpAddr, Ipv4Addr};

use crate::address::{Address, Host, Port, TcpAddress};

/// A path, a URI, `HOST:PORT`, or a bare port of 127.0.0.1.
pub(crate) fn local_address(text: &str) -> Result<Address, String> {
    if text.starts_with(['/', '.', '\\']) || text.contains("://") || text.starts_with("unix:") {
        return text.parse().map_err(|e: crate::AddressError| e.to_string());
    }
    if !text.contains(':') {
        return local_port(text);
    }
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    if !host.is_empty() && host.chars().all(|c| c.is_ascii_digit()) {
        return Err(format!(
            "{host:?} stands where an address would: there is no host on the vsock side, as there is in ssh; a right one: 8080:80 or 127.0.0.1:8080:80"
        ));
    }
    if matches!(
        host,
        "tcp" | "npipe" | "hyperkit" | "vsock" | "vsock-mux" | "hvsock"
    ) {
        return Err(format!("a URI has two slashes: {host}://…:{port}"));
    }
    // As in ssh. The other spelling of it there, an empty address, is too easily written by mistake.
    let text = match text.strip_prefix("*:") {
        Some(port) => format!("0.0.0.0:{port}"),
        None if text.starts_with(':') && !text.starts_with("::") => {
            return Err("the address before the port is empty: leave the colon out for 127.0.0.1, or write * for all interfaces".into());
        }
        None => text.to_owned(),
    };
    format!("tcp://{text}")
        .parse()
        .map_err(|e: crate::AddressError| e.to_string())
}

/// A bare port of 127.0.0.1.
fn local_port(text: &str) -> Result<Address, String> {
    let right =
        "a right one: 8080, 127.0.0.1:8080, or for a Unix socket /run/web.sock or ./web.sock";
    let port: Port = text.parse().map_err(|e| format!("{e}; {right}"))?;
    let port = u16::try_from(port.0)
        .map_err(|_| format!("TCP port {} is larger than 65535; {right}", port.0))?;
    Ok(Address::Tcp(TcpAddress {
        host: Host::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        port,
    }))
}

/// Permissions, octal.
pub(crate) fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("permissions are up to three octal digits, such as 600 or 660".into()),
    }
}
