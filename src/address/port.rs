//! Port numbers, and the one way in which this crate reads a number.

use std::fmt;
use std::str::FromStr;

/// The port of a hypervisor socket: 32 bits, unlike TCP's 16.
///
/// hyperkit writes ports in hex in file names (`00000003.00000050`) and takes them in decimal on
/// its command line, so both are read (`80`, `0x50`), and printing shows both: `80 (0x50)`. Inside
/// addresses the number is plain decimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port(pub u32);

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{0} ({0:#x})", self.0))
    }
}

impl From<u32> for Port {
    fn from(port: u32) -> Port {
        Port(port)
    }
}

impl From<Port> for u32 {
    fn from(port: Port) -> u32 {
        port.0
    }
}

impl FromStr for Port {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Port, PortError> {
        match parse_u32(text) {
            Ok(port) => Ok(Port(port)),
            Err(reason) => Err(PortError {
                text: text.to_owned(),
                reason,
            }),
        }
    }
}

/// A text that is not a [`Port`]. Prints as one line, such as `port "-1" is not a number (80, or
/// 0x50 in hex)`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PortError {
    text: String,
    reason: String,
}

impl fmt::Display for PortError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("port")?;
        if !self.text.is_empty() {
            write!(f, " {:?}", self.text)?;
        }
        write!(f, " {}", self.reason)
    }
}

impl std::error::Error for PortError {}

/// Parses a number of 32 bits, or returns why it is none.
pub(super) fn parse_u32(text: &str) -> Result<u32, String> {
    match parse_number(text)? {
        Some(number) if number <= u32::MAX.into() => Ok(number as u32),
        _ => Err(format!("is larger than {}", u32::MAX)),
    }
}

/// Parses a number of 16 bits, or returns why it is none.
pub(super) fn parse_u16(text: &str) -> Result<u16, String> {
    match parse_number(text)? {
        Some(number) if number <= u16::MAX.into() => Ok(number as u16),
        _ => Err(format!("is larger than {}", u16::MAX)),
    }
}

/// Parses a number in decimal, or in hex behind `0x`; `None` if it is too large for 64 bits.
fn parse_number(text: &str) -> Result<Option<u64>, String> {
    if text.is_empty() {
        return Err("is missing".to_owned());
    }
    let not_a_number = || "is not a number (80, or 0x50 in hex)".to_owned();
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let (digits, radix) = hex.map_or((text, 10), |digits| (digits, 16));
    // from_str_radix alone would take a sign.
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(not_a_number());
    }
    // 00000050 is how hyperkit's file names write port 80: better ask than guess.
    if radix == 10 && digits.len() > 1 && digits.starts_with('0') {
        let rest = match digits.trim_start_matches('0') {
            "" => "0",
            rest => rest,
        };
        return Err(format!(
            "starts with 0: write {rest}, or 0x{rest} if it is hex"
        ));
    }
    Ok(u64::from_str_radix(digits, radix).ok())
}
