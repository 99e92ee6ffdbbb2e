//! The other end of the control socket: what `hvsock status` and its kin ask with.

use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;

use super::{Problem, http, place};
use crate::error::{Error, Operation};
use crate::stream::Stream;

/// How long the server may take. To change something takes it no longer than a worker takes to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no answer to go by.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// Nobody is there.
    Absent(Error),
    /// It refused.
    Refused(Problem),
}

impl std::fmt::Display for Unanswered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unanswered::Absent(error) => {
                let (place, cause) = (error.subject(), error.cause());
                write!(f, "no hvsock answers at {place}: {cause}; ")?;
                f.write_str(match error.kind() {
                    ErrorKind::PermissionDenied | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                        "it lets in only the user who runs it: be that user"
                    }
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                        "it takes no request, or gives no answer: is it stopped, or is this another program's socket?"
                    }
                    _ => {
                        "start one with `hvsock run CONFIG`, or with --control, or say where it is with --control PATH"
                    }
                })
            }
            Unanswered::Refused(problem) => problem.fmt(f),
        }
    }
}

impl std::error::Error for Unanswered {}

/// Asks the server at `path`; the answer's body.
pub(crate) fn ask(path: &Path, method: &str, call: &str, body: &str) -> Result<String, Unanswered> {
    let (status, answer) = exchange(path, method, call, body).map_err(Unanswered::Absent)?;
    match status {
        200..=299 => Ok(answer),
        status => Err(Unanswered::Refused(Problem::of_answer(status, &answer))),
    }
}

/// As [`ask`] with GET, and reads the answer.
pub(crate) fn get<T: DeserializeOwned>(path: &Path, call: &str) -> Result<T, Unanswered> {
    read(&ask(path, "GET", call, "")?)
}

/// What an answer says.
pub(crate) fn read<T: DeserializeOwned>(answer: &str) -> Result<T, Unanswered> {
    serde_json::from_str(answer).map_err(|e| {
        let why = format!("the answer can't be understood: {e}");
        let problem = Problem::new(500, why);
        Unanswered::Refused(problem.with_remedy("is it an hvsock of the same version?"))
    })
}

/// A name as it stands in a path.
pub(crate) fn segment(name: &str) -> String {
    const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_');
    utf8_percent_encode(name, KEPT).to_string()
}

fn exchange(path: &Path, method: &str, call: &str, body: &str) -> crate::Result<(u16, String)> {
    let address = place::address(path);
    let mut stream = Stream::connect_timeout(&address, PATIENCE)?;
    let mut talk = || -> io::Result<(u16, String)> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let length = body.len();
        let request = format!(
            "{method} {call} HTTP/1.1\r\nHost: hvsock\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes())?;
        http::read_response(&mut stream)
    };
    talk().map_err(|e| Error::new(Operation::Connect, &address, e))
}

impl Problem {
    /// What an error's answer says.
    fn of_answer(status: u16, answer: &str) -> Problem {
        let json: serde_json::Value = serde_json::from_str(answer).unwrap_or_default();
        let text = |key: &str| json.get(key).and_then(|it| it.as_str()).map(str::to_owned);
        Problem {
            status,
            error: text("error").unwrap_or_else(|| format!("it answered with status {status}")),
            remedy: text("remedy"),
        }
    }
}
