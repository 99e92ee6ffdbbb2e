//! What `list.ps1` says.

use super::machine::Machine;
use crate::address::{VmId, parse_guid};

/// Why there is no list, as far as the script knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Hyper-V's PowerShell module can't be loaded.
    Module,
    /// The user may not ask.
    Denied,
    Other,
}

/// Parses the VMs that an answer lists. Lines that aren't the script's are skipped.
///
/// # Errors
/// Why there is no list, with the system's own words; `None` if it isn't an answer of the script,
/// or not the whole one.
pub(super) fn parse(answer: &[u8]) -> Result<Vec<Machine>, Option<(Why, String)>> {
    // What else a PowerShell has to say may be of any encoding.
    let mut lines = answer
        .split(|byte| *byte == b'\n')
        .map(|line| line.trim_ascii_end())
        .filter(|line| line.starts_with(b"hvsock-"));
    let mut machines = Vec::new();
    for line in lines.by_ref() {
        let line = std::str::from_utf8(line).map_err(|_| None)?;
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["hvsock-vm", id, state, name] => machines.push(machine(id, state, name).ok_or(None)?),
            ["hvsock-failed", kind, message] => {
                let why = match kind {
                    "module" => Why::Module,
                    "denied" => Why::Denied,
                    _ => Why::Other,
                };
                return Err(Some((why, unhex(message).ok_or(None)?)));
            }
            ["hvsock-done", count] if count == machines.len().to_string() => {
                return lines.next().is_none().then_some(machines).ok_or(None);
            }
            _ => return Err(None),
        }
    }
    Err(None)
}

fn machine(id: &str, state: &str, name: &str) -> Option<Machine> {
    let plain = !state.is_empty() && state.chars().all(|c| c.is_ascii_alphanumeric());
    Some(Machine {
        id: VmId(parse_guid(id)?),
        state: plain.then(|| state.to_owned())?,
        name: unhex(name)?,
    })
}

/// Decodes `-` and two hexadecimal digits for each byte of UTF-8.
fn unhex(text: &str) -> Option<String> {
    let digits = text.strip_prefix('-')?.as_bytes();
    let (pairs, rest) = digits.as_chunks::<2>();
    let bytes: Option<Vec<u8>> = pairs
        .iter()
        .map(|pair| match pair.iter().all(u8::is_ascii_hexdigit) {
            true => u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok(),
            false => None,
        })
        .collect();
    match rest {
        [] => String::from_utf8(bytes?).ok(),
        _ => None,
    }
}

/// Returns PowerShell's message as one line of at most 300 characters, without control characters.
pub(super) fn one_line(message: &str) -> String {
    let words: Vec<&str> = message.split_whitespace().collect();
    let line = words.join(" ").replace(char::is_control, "?");
    let cut: String = line.chars().take(300).collect();
    cut.trim_end_matches('.').to_owned()
}
