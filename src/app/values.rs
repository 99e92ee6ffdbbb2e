//! Reads the values that people write on the command line, in a file and as JSON, and says what is
//! wrong with them.

use std::borrow::Cow;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::time::Duration;

use serde_json::Value;

use super::ranges::{BarePort, expand, is_number};
use crate::address::{Address, Host, Port, TcpAddress};
use crate::proxy::{ProxyProtocol, Source, SourceError};
use crate::sys;

/// The longest time. With this limit `1M`, which is a month, isn't taken for a minute.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);

/// Returns the name of a value's type.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::String(_) => "a string",
        Value::Number(_) => "a number",
        Value::Bool(_) => "true or false",
        Value::Array(_) => "a list",
        Value::Object(_) => "a table",
    }
}

fn wants(value: &Value, what: &str) -> String {
    format!("it is {}; write {what}", kind(value))
}

pub(super) fn text(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        other => Err(wants(other, "a string, in quotes")),
    }
}

/// Reads a list of strings.
pub(super) fn texts(value: &Value) -> Result<Vec<String>, String> {
    match value {
        Value::Array(values) => values.iter().map(text).collect(),
        other => Err(wants(other, "a list: [\"FILE\"]")),
    }
}

pub(super) fn yes_or_no(value: &Value) -> Result<bool, String> {
    match value {
        Value::Bool(yes) => Ok(*yes),
        other => Err(wants(other, "true or false")),
    }
}

/// Reads a time of at most 30 days: `"1m30s"`, or a number of seconds.
pub(super) fn time(value: &Value) -> Result<Duration, String> {
    const RIGHT: &str = "\"30s\", \"1m30s\", \"250ms\", or a number of seconds";
    let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).ok();
    let time = match value {
        Value::String(text) => match text.parse() {
            Ok(number) => seconds(number),
            Err(_) => humantime::parse_duration(text).ok(),
        },
        Value::Number(number) => number.as_f64().and_then(seconds),
        other => return Err(wants(other, &format!("a time: {RIGHT}"))),
    };
    match time {
        Some(time) if time <= LONGEST => Ok(time),
        Some(_) => {
            let is_month = value.as_str().is_some_and(|text| text.contains('M'));
            let hint = if is_month {
                " (m is a minute, M a month)"
            } else {
                ""
            };
            Err(format!("{value} is more than 30 days{hint}"))
        }
        None => Err(format!("{value} is no time; write {RIGHT}")),
    }
}

/// Reads a time that is not zero.
pub(super) fn some_time(value: &Value) -> Result<Duration, String> {
    match time(value)? {
        Duration::ZERO => Err("it can't be 0".to_owned()),
        time => Ok(time),
    }
}

/// Reads the time of TCP's keepalive; zero turns it off.
pub(super) fn keepalive(value: &Value) -> Result<Duration, String> {
    /// Linux takes at most 32,767 s.
    const LONGEST_KEEPALIVE: Duration = Duration::from_secs(9 * 3600);
    if value == "off" {
        return Ok(Duration::ZERO);
    }
    match time(value).map_err(|why| format!("{why}; or \"off\""))? {
        time if time.subsec_nanos() > 0 => {
            Err(format!("{value} is not possible: TCP counts whole seconds"))
        }
        time if time > LONGEST_KEEPALIVE => Err(format!("{value} is more than 9 hours")),
        time => Ok(time),
    }
}

/// Reads a time, or the given word or null, which mean none.
pub(super) fn time_or(word: &str, value: &Value) -> Result<Option<Duration>, String> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) if text == word => Ok(None),
        other => some_time(other)
            .map(Some)
            .map_err(|why| format!("{why}; or {word:?}")),
    }
}

pub(super) fn count(range: RangeInclusive<usize>) -> impl Fn(&Value) -> Result<usize, String> {
    move |value| {
        let right = format!("a number from {} to {}", range.start(), range.end());
        let Value::Number(number) = value else {
            return Err(wants(value, &right));
        };
        let read = number
            .as_u64()
            .and_then(|number| usize::try_from(number).ok());
        match read.filter(|number| range.contains(number)) {
            Some(number) => Ok(number),
            None => Err(format!("{number} is not {right}")),
        }
    }
}

/// Reads a vsock port, or a range of them: `"8000-8010"`.
pub(super) fn ports(value: &Value) -> Result<Vec<Port>, String> {
    match value {
        Value::String(text) => {
            let texts = expand(text, BarePort::Vsock)?.into_iter();
            texts.map(|text| port(&Value::String(text))).collect()
        }
        other => Ok(vec![port(other)?]),
    }
}

/// Reads a vsock port.
fn port(value: &Value) -> Result<Port, String> {
    match value {
        Value::Number(number) => {
            let number = number.as_u64().and_then(|it| u32::try_from(it).ok());
            let port = number.ok_or_else(|| no_port(value))?;
            some_port(Port(port))
        }
        Value::String(text) => parse_port(text),
        other => Err(wants(other, "a port: 80 or \"0x50\"")),
    }
}

/// Returns a parser of integers in a range, for the command line.
pub(super) fn number<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String> + Clone
where
    T: Copy + PartialOrd + TryFrom<u64> + Into<u64> + Clone,
{
    move |text| {
        let read = text.parse::<u64>().ok();
        let read = read.and_then(|it| T::try_from(it).ok());
        read.filter(|it| range.contains(it)).ok_or_else(|| {
            match ((*range.start()).into(), (*range.end()).into()) {
                (first, last) if last < u64::from(u32::MAX) => {
                    format!("write a number from {first} to {last}")
                }
                (first, _) => format!("write a number, {first} or more"),
            }
        })
    }
}

/// Parses a process id.
#[cfg(unix)]
pub(super) fn parse_process(text: &str) -> Result<u32, String> {
    let process = text.parse().ok().filter(|it| *it > 0);
    process.ok_or_else(|| "that is no process' number; `hvsock ps` lists them".to_owned())
}

/// Parses the id of a connection.
#[cfg(unix)]
pub(super) fn parse_connection(text: &str) -> Result<u64, String> {
    let connection = text.parse().ok();
    connection
        .ok_or_else(|| "that is no connection's number; `hvsock connections` lists them".to_owned())
}

/// Parses a vsock port, decimal or hexadecimal.
pub(super) fn parse_port(text: &str) -> Result<Port, String> {
    let port = text.parse::<Port>().map_err(|e| e.to_string())?;
    some_port(port)
}

/// Refuses the numbers that are no port to listen on: 0, and the one by which the system chooses
/// (`VMADDR_PORT_ANY`).
fn some_port(port: Port) -> Result<Port, String> {
    match port.0 {
        0 | u32::MAX => Err(no_port(port.0)),
        _ => Ok(port),
    }
}

fn no_port(number: impl std::fmt::Display) -> String {
    let largest = u32::MAX - 1;
    format!("port {number} is no vsock port to listen on: those are 1 to {largest}")
}

/// Reads permissions. They must be a string: the number 600 is decimal.
pub(super) fn mode(value: &Value) -> Result<u32, String> {
    match value {
        Value::String(text) => parse_mode(text),
        other => Err(wants(other, "permissions as a string: \"600\"")),
    }
}

/// Reads a user, by name or id.
pub(super) fn owner(value: &Value) -> Result<Option<u32>, String> {
    id(value, "a user: \"www-data\" or 33", parse_owner)
}

/// Reads a group, by name or id.
pub(super) fn group(value: &Value) -> Result<Option<u32>, String> {
    id(value, "a group: \"docker\" or 999", parse_group)
}

fn id(
    value: &Value,
    right: &str,
    parse: fn(&str) -> Result<u32, String>,
) -> Result<Option<u32>, String> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => parse(text).map(Some),
        Value::Number(number) => parse(&number.to_string()).map(Some),
        other => Err(wants(other, right)),
    }
}

/// Parses a user name or id.
pub(super) fn parse_owner(text: &str) -> Result<u32, String> {
    parse_id(text, "user", sys::user_by_name)
}

/// Parses a group name or id.
pub(super) fn parse_group(text: &str) -> Result<u32, String> {
    parse_id(text, "group", sys::group_by_name)
}

/// Parses a name or an id. The largest number is refused: to chown(2) it means no change.
fn parse_id(
    text: &str,
    what: &str,
    find: fn(&str) -> io::Result<Option<u32>>,
) -> Result<u32, String> {
    if let Ok(id) = text.parse::<u32>() {
        return match id {
            u32::MAX => Err(format!("{text} is no {what}'s id")),
            id => Ok(id),
        };
    }
    match find(text) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => Err(format!(
            "there is no {what} {text:?}; write its name or its id"
        )),
        Err(e) => Err(format!("{what} {text:?} can't be looked up: {e}")),
    }
}

/// Reads the sources from which clients may come: a list, or a single source.
pub(super) fn sources(value: &Value) -> Result<Vec<Source>, String> {
    let source = |value: &Value| match value {
        Value::String(text) => text.parse().map_err(|e: SourceError| e.to_string()),
        Value::Number(number) => {
            let cid = number.as_u64().and_then(|cid| u32::try_from(cid).ok());
            let cid = cid.ok_or_else(|| format!("{number} is no CID"))?;
            Ok(Source::cid(cid))
        }
        other => Err(wants(other, "a network, an address or a CID")),
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(values) => values.iter().map(source).collect(),
        one @ (Value::String(_) | Value::Number(_)) => Ok(vec![source(one)?]),
        other => Err(wants(
            other,
            "a list: [\"192.168.7.0/24\", \"::1\"] or [3, 16]",
        )),
    }
}

/// Reads the version of the PROXY protocol; `"off"` means none.
pub(super) fn proxy_protocol(value: &Value) -> Result<Option<ProxyProtocol>, String> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) if text == "off" => Ok(None),
        Value::String(text) => text.parse().map(Some).map_err(str::to_owned),
        other => Err(wants(other, "\"v1\", \"v2\" or \"off\"")),
    }
}

/// Reads a local address, or the addresses of a range: `"127.0.0.1:8000-8010"`.
pub(super) fn addresses(value: &Value) -> Result<Vec<Address>, String> {
    match value {
        Value::String(text) => parse_local_addresses(text),
        other => Ok(vec![address(other)?]),
    }
}

/// Parses a local address, or the addresses of a range.
pub(super) fn parse_local_addresses(text: &str) -> Result<Vec<Address>, String> {
    let texts = expand(text, BarePort::Tcp)?.into_iter();
    texts.map(|text| local_address(&text)).collect()
}

/// Reads a local address, as on the left of `-L`.
pub(super) fn address(value: &Value) -> Result<Address, String> {
    match value {
        Value::String(text) => local_address(text),
        Value::Number(number) => local_address(&number.to_string()),
        other => Err(wants(
            other,
            "an address: 8080, \"127.0.0.1:8080\", \"/run/web.sock\" or a URI",
        )),
    }
}

/// Reads the address of a file's forward, or the addresses of a range. Unlike in `-L`, its two
/// ports are separate keys.
pub(super) fn listen_addresses(value: &Value) -> Result<Vec<Address>, String> {
    let ports = value.as_str().and_then(|text| text.split_once(':'));
    match ports {
        Some((port, guest)) if is_number(port) && is_number(guest) => Err(format!(
            "two ports: write listen = {port}, port = {guest} and vm = \"NAME\""
        )),
        _ => addresses(value),
    }
}

/// Reads the address of the metrics: `9100`, `"127.0.0.1:9100"`, a Unix socket or a vsock port.
pub(super) fn metrics(value: &Value) -> Result<Address, String> {
    let address = address(value)?;
    match address {
        Address::Tcp(_) | Address::Unix(_) => Ok(address),
        // HTTP can't be sent over a framed address.
        Address::Vsock(ref vsock) if !vsock.framing => Ok(address),
        other => Err(format!(
            "metrics are not served at {other}; a right one: 9100, \"127.0.0.1:9100\", \"/run/metrics.sock\" or \"vsock://:9100\""
        )),
    }
}

/// Replaces `~/` by the user's home, since no shell does it here.
pub(super) fn at_home(text: &str) -> Result<Cow<'_, str>, String> {
    let Some(rest) = text.strip_prefix("~/") else {
        return match text.starts_with('~') {
            true => Err(format!(
                "{text:?}: only ~/ is known, the home of who runs this; write the path"
            )),
            false => Ok(text.into()),
        };
    };
    let home =
        std::env::home_dir().and_then(|home| home.join(rest).into_os_string().into_string().ok());
    home.map(Cow::from)
        .ok_or_else(|| format!("{text:?}: no home is known; write the whole path"))
}

/// Parses a path, a URI, `HOST:PORT`, or a port of 127.0.0.1. Replaces `~/`: shells don't do so
/// within a word.
pub(super) fn local_address(text: &str) -> Result<Address, String> {
    let text = &*at_home(text)?;
    if text.starts_with(['/', '.', '\\']) || text.contains("://") || is_local_uri(text) {
        return text.parse().map_err(|e: crate::AddressError| e.to_string());
    }
    if !text.contains(':') {
        return local_port(text);
    }
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    if is_number(host) {
        return Err(format!(
            "{host:?} stands where a host or an address would; write {port} or 127.0.0.1:{port}"
        ));
    }
    let scheme = text.split_once(':').map_or("", |(scheme, _)| scheme);
    if matches!(
        scheme,
        "tcp" | "tcp4" | "tcp6" | "npipe" | "hyperkit" | "vsock" | "vsock-mux" | "hvsock"
    ) {
        return Err(format!("a URI has two slashes: {scheme}://…:{port}"));
    }
    // In ssh an empty address means all interfaces, as `*` does. It is refused since it is easily
    // written by mistake.
    if text.starts_with(':') && !text.starts_with("::") {
        return Err("the address before the port is empty: leave the colon out for 127.0.0.1, or write * for all interfaces".into());
    }
    format!("tcp://{text}")
        .parse()
        .map_err(|e: crate::AddressError| e.to_string())
}

/// Returns whether it is a URI without a host, which may be written without slashes.
fn is_local_uri(text: &str) -> bool {
    ["unix:", "exec:", "file:"]
        .iter()
        .any(|scheme| text.starts_with(scheme))
}

/// Parses a port of 127.0.0.1.
fn local_port(text: &str) -> Result<Address, String> {
    let right =
        "a right one: 8080, 127.0.0.1:8080, or for a Unix socket /run/web.sock or ./web.sock";
    let port: Port = text.parse().map_err(|e| format!("{e}; {right}"))?;
    let port = u16::try_from(port.0)
        .map_err(|_| format!("TCP port {} is larger than 65535; {right}", port.0))?;
    let host = Host::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
    Ok(Address::Tcp(TcpAddress::new(host, port)))
}

/// Parses octal permissions.
pub(super) fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("permissions are up to three octal digits, such as 600 or 660".into()),
    }
}

/// Parses a time: `1m30s`, or a number of seconds.
pub(super) fn parse_time(text: &str) -> Result<Duration, String> {
    time(&text.into())
}

/// Parses the time of TCP's keepalive: seconds, or `off`.
pub(super) fn parse_keepalive(text: &str) -> Result<Duration, String> {
    keepalive(&text.into())
}

/// Parses a time that is not zero.
pub(super) fn parse_some_time(text: &str) -> Result<Duration, String> {
    some_time(&text.into())
}
