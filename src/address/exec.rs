//! `exec:/PROGRAM`, the addresses of programs that are started for each connection, and
//! `file:/PATH`, those of files that each connection reads.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::uri::{self, Uri};
use super::{AddressError, Part};
use crate::sys;

const EXEC: &str = "exec";
const EXEC_EXAMPLE: &str = "exec:/usr/sbin/sshd?arg=-i";
const FILE: &str = "file";
const FILE_EXAMPLE: &str = "file:/srv/notice.txt";

/// A program of this machine, started for each connection, which is its standard input and output:
/// `exec:/PROGRAM[?arg=…&env=NAME=VALUE&pty=yes]`, percent-encoded. No shell is in between.
///
/// `exec:./rel` is the relative path `rel`; no program is searched for in `PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExecAddress {
    /// The program's file; never empty.
    pub program: PathBuf,
    /// Its arguments, behind its own path. None has a NUL.
    pub args: Vec<OsString>,
    /// Variables that it gets besides the environment of this process. No name is empty or has a
    /// `=`, and nothing has a NUL.
    pub env: Vec<(OsString, OsString)>,
    /// Whether its standard input, output and error are a terminal.
    pub pty: bool,
}

impl ExecAddress {
    /// Makes the address of a program without arguments.
    pub fn new(program: impl Into<PathBuf>) -> ExecAddress {
        ExecAddress {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            pty: false,
        }
    }
}

impl fmt::Display for ExecAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{EXEC}:")?;
        uri::write_local_path(f, &self.program)?;
        let mut mark = '?';
        for argument in &self.args {
            write!(f, "{mark}arg={}", uri::encode_value(argument))?;
            mark = '&';
        }
        for (name, value) in &self.env {
            let (name, value) = (uri::encode_name(bytes(name)), uri::encode_value(value));
            write!(f, "{mark}env={name}={value}")?;
            mark = '&';
        }
        match self.pty {
            true => write!(f, "{mark}pty=yes"),
            false => Ok(()),
        }
    }
}

impl FromStr for ExecAddress {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<ExecAddress, AddressError> {
        let uri = Uri::parse_path(input, EXEC, EXEC_EXAMPLE)?;
        let program = uri.local_path(
            "of the program is missing",
            "begins with a name, and no program is searched for: write its path, as /usr/bin/NAME or ./NAME",
        )?;
        let mut address = ExecAddress::new(program);
        let mut pty = None;
        for (key, value) in uri.pairs() {
            let value = || {
                let value = uri::decode(value).and_then(text);
                value.map_err(|reason| uri.error(Part::Query, key, reason))
            };
            match key {
                "arg" => address.args.push(value()?),
                "env" => {
                    let pair = split_variable(value()?);
                    let reason = "is a variable and its value: env=NAME=VALUE";
                    let pair = pair.ok_or_else(|| uri.error(Part::Query, key, reason));
                    address.env.push(pair?);
                }
                "pty" if pty.is_some() => {
                    return Err(uri.error(Part::Query, key, "stands there twice"));
                }
                "pty" => {
                    let value = value()?;
                    pty = Some(uri.yes_or_no(key, &value.to_string_lossy())?);
                }
                _ => {
                    let reason = "is unknown (known: arg, env, pty)";
                    return Err(uri.error(Part::Query, key, reason));
                }
            }
        }
        address.pty = pty.unwrap_or(false);
        Ok(address)
    }
}

/// A file of this machine, which each connection reads from its beginning: `file:/PATH`,
/// percent-encoded. `file:./rel` is the relative path `rel`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileAddress {
    /// Never empty.
    pub path: PathBuf,
}

impl fmt::Display for FileAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{FILE}:")?;
        uri::write_local_path(f, &self.path)
    }
}

impl FromStr for FileAddress {
    type Err = AddressError;

    fn from_str(input: &str) -> Result<FileAddress, AddressError> {
        let uri = Uri::parse_path(input, FILE, FILE_EXAMPLE)?;
        let path = uri.local_path(
            "of the file is missing",
            "begins with a name: write the file's path, as /srv/NAME or ./NAME",
        )?;
        uri.query(&[])?;
        Ok(FileAddress { path })
    }
}

/// Makes a text for a program, which ends at a NUL.
fn text(bytes: Vec<u8>) -> Result<OsString, &'static str> {
    match bytes.contains(&0) {
        true => Err("has a NUL"),
        false => sys::os_string_from_bytes(bytes).map_err(|_| "is no text on this system"),
    }
}

/// Splits `NAME=VALUE`.
fn split_variable(variable: OsString) -> Option<(OsString, OsString)> {
    let bytes = bytes(&variable);
    let at = bytes
        .iter()
        .position(|byte| *byte == b'=')
        .filter(|at| *at > 0)?;
    let part = |bytes: &[u8]| sys::os_string_from_bytes(bytes.to_vec()).ok();
    Some((part(&bytes[..at])?, part(&bytes[at + 1..])?))
}

fn bytes(text: &OsStr) -> &[u8] {
    text.as_encoded_bytes()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    // Elsewhere not all bytes are a text.
    #[cfg(unix)]
    #[test]
    fn arguments_and_variables_keep_their_order_and_their_bytes() {
        let text = "exec:/bin/a%20b?arg=-c&env=A=1&arg=x%26y%3dz&arg=&env=B=%ff=&pty=yes";
        let address: ExecAddress = text.parse().unwrap();
        assert_eq!(address.program, PathBuf::from("/bin/a b"));
        assert_eq!(address.args, ["-c", "x&y=z", ""]);
        assert_eq!(address.env[0], ("A".into(), "1".into()));
        assert_eq!(bytes(&address.env[1].1), b"\xff=");
        assert!(address.pty);
        let printed = "exec:/bin/a%20b?arg=-c&arg=x%26y=z&arg=&env=A=1&env=B=%FF=&pty=yes";
        assert_eq!(address.to_string(), printed);
    }

    #[test]
    fn paths_are_absolute_or_begin_with_a_dot() {
        for (text, printed) in [
            ("exec:/bin/cat", "exec:/bin/cat"),
            ("exec:///bin/cat", "exec:/bin/cat"),
            ("EXEC:./cat", "exec:./cat"),
            ("exec:../bin/cat", "exec:./../bin/cat"),
            ("exec:////bin/cat", "exec:////bin/cat"),
            ("exec:.//cat", "exec:./cat"),
        ] {
            let address: ExecAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), printed, "{text}");
        }
        for (text, part) in [
            ("exec:cat", "no program is searched for: write its path"),
            ("exec:", "is missing"),
            ("exec:/", "is missing"),
            ("exec://bin/cat", "where a host would"),
            ("exec:/bin/cat?arg=%00", "has a NUL"),
            ("exec:/bin/cat?env=A", "env=NAME=VALUE"),
            ("exec:/bin/cat?env==A", "env=NAME=VALUE"),
            ("exec:/bin/cat?pty=maybe", "yes or no"),
            ("exec:/bin/cat?pty=yes&pty=yes", "twice"),
            ("exec:/bin/cat?user=root", "known: arg, env, pty"),
            ("exec:/bin/cat#x", "%23"),
        ] {
            let error = text.parse::<ExecAddress>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!("file:/etc/motd?arg=x".parse::<FileAddress>().is_err());
        let error = "file:motd".parse::<FileAddress>().unwrap_err().to_string();
        assert!(error.contains("write the file's path"), "{error}");
        assert!(!error.contains("program"), "{error}");
    }
}
