//! The values that the file's keys may have.

use std::borrow::Cow;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::{DeInteger, DeValue};

use super::Control;
use super::section::kind;
use super::words::{local_address, parse_mode};
use crate::address::{Address, Port, TcpAddress};

/// No time is longer: with it, `1M`, which is a month, isn't taken for a minute.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);

fn wants(value: &DeValue<'_>, what: &str) -> String {
    format!("it is {}; write {what}", kind(value))
}

fn integer(number: &DeInteger<'_>) -> Option<i128> {
    i128::from_str_radix(number.as_str(), number.radix()).ok()
}

pub(super) fn text(value: &DeValue<'_>) -> Result<String, String> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        other => Err(wants(other, "a string, in quotes")),
    }
}

pub(super) fn yes_or_no(value: &DeValue<'_>) -> Result<bool, String> {
    match value {
        DeValue::Boolean(yes) => Ok(*yes),
        other => Err(wants(other, "true or false")),
    }
}

/// A time, 30 days at most: `"1m30s"`, or a number of seconds.
pub(super) fn time(value: &DeValue<'_>) -> Result<Duration, String> {
    const RIGHT: &str = "\"30s\", \"1m30s\", \"250ms\", or a number of seconds";
    let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string());
    let (text, time) = match value {
        DeValue::String(text) => match text.parse() {
            Ok(number) => (text.to_string(), seconds(number)),
            Err(_) => {
                let time = humantime::parse_duration(text).map_err(|e| e.to_string());
                (format!("{text:?}"), time)
            }
        },
        DeValue::Integer(number) => {
            let read = integer(number).ok_or_else(String::new);
            (
                number.to_string(),
                read.and_then(|number| seconds(number as f64)),
            )
        }
        DeValue::Float(number) => {
            let read = number.as_str().parse().map_err(|_| String::new());
            (number.to_string(), read.and_then(seconds))
        }
        other => return Err(wants(other, &format!("a time: {RIGHT}"))),
    };
    match time {
        Ok(time) if time <= LONGEST => Ok(time),
        Ok(_) => Err(format!(
            "{text} is more than 30 days (m is a minute, M a month)"
        )),
        Err(_) => Err(format!("{text} is no time; write {RIGHT}")),
    }
}

/// A time that is not zero.
pub(super) fn some_time(value: &DeValue<'_>) -> Result<Duration, String> {
    match time(value)? {
        Duration::ZERO => Err("it can't be 0".to_owned()),
        time => Ok(time),
    }
}

/// A time, or a word for there being none.
pub(super) fn time_or(word: &'static str, value: &DeValue<'_>) -> Result<Option<Duration>, String> {
    match value {
        DeValue::String(text) if text == word => Ok(None),
        other => some_time(other)
            .map(Some)
            .map_err(|why| format!("{why}; or {word:?}")),
    }
}

pub(super) fn count(
    range: RangeInclusive<usize>,
) -> impl FnOnce(&DeValue<'_>) -> Result<usize, String> {
    move |value| {
        let right = format!("a number from {} to {}", range.start(), range.end());
        let DeValue::Integer(number) = value else {
            return Err(wants(value, &right));
        };
        let read = integer(number).and_then(|number| usize::try_from(number).ok());
        match read.filter(|number| range.contains(number)) {
            Some(number) => Ok(number),
            None => Err(format!("{number} is not {right}")),
        }
    }
}

/// A vsock port.
pub(super) fn port(value: &DeValue<'_>) -> Result<Port, String> {
    match value {
        DeValue::Integer(number) => integer(number)
            .and_then(|number| u32::try_from(number).ok())
            .map(Port)
            .ok_or_else(|| {
                let largest = u32::MAX;
                format!("{number} is no vsock port: those are 0 to {largest}")
            }),
        DeValue::String(text) => text
            .parse()
            .map_err(|e: crate::address::PortError| e.to_string()),
        other => Err(wants(other, "a port: 80 or \"0x50\"")),
    }
}

/// Permissions: a string, for a bare 600 is another number than it looks like; `0o600` is TOML's way to write it.
pub(super) fn mode(value: &DeValue<'_>) -> Result<u32, String> {
    match value {
        DeValue::String(text) => parse_mode(text),
        DeValue::Integer(number) if number.radix() == 8 => parse_mode(number.as_str()),
        other => Err(wants(other, "permissions as a string: \"600\"")),
    }
}

/// A local address, as on the left of `-L`.
pub(super) fn address(value: &DeValue<'_>) -> Result<Address, String> {
    match value {
        DeValue::String(text) => local_address(&at_home(text)?),
        DeValue::Integer(number) if number.radix() == 10 => local_address(number.as_str()),
        other => Err(wants(
            other,
            "an address: 8080, \"127.0.0.1:8080\", \"/run/web.sock\" or a URI",
        )),
    }
}

/// A path.
/// The path of the control socket, or `"off"`.
pub(super) fn control(value: &DeValue<'_>) -> Result<Control, String> {
    match text(value)?.as_str() {
        "" => Err("it is empty; write a path, or \"off\"".to_owned()),
        "off" => Ok(Control::Off),
        text => Ok(Control::At(PathBuf::from(at_home(text)?.into_owned()))),
    }
}

/// A TCP address, as in `9100` or `"127.0.0.1:9100"`.
pub(super) fn tcp(value: &DeValue<'_>) -> Result<TcpAddress, String> {
    match address(value)? {
        Address::Tcp(tcp) => Ok(tcp),
        other => Err(format!(
            "{other} is no TCP address; write 9100 or \"127.0.0.1:9100\""
        )),
    }
}

/// A text whose `~/` is the user's home: there is no shell here that would do it.
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
