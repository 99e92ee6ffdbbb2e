//! The other end of the control socket: what `hvsock status` and its kin ask with.
//!
//! Whoever sits there is believed only if it is a process of this user's, and only so much of it is
//! read, for so long. What it has named is escaped: it may come from files and peers of others.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Problem, place};
use crate::app::escape;
use crate::error::{Error, Operation};
use crate::stream::Stream;
use crate::sys;

/// How long the server may take for all of its answer. To change something takes it no longer than
/// a worker takes to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The longest answer. A connection has some 200 bytes in it, a forward some 1000.
const MOST_BYTES: usize = 16 << 20;

const MOST_HEADERS: usize = 64;

/// Why there is no answer to go by.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// Nobody is there.
    Absent(Error),
    /// Whoever is there may be anybody, and was asked nothing.
    Untrusted(Error),
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
            Unanswered::Untrusted(error) => write!(f, "not asking there: {error}"),
            Unanswered::Refused(problem) => problem.fmt(f),
        }
    }
}

impl std::error::Error for Unanswered {}

/// Asks the server at `path`; the answer's body.
pub(crate) fn ask(path: &Path, method: &str, call: &str, body: &str) -> Result<String, Unanswered> {
    let (status, answer) = exchange(path, method, call, body)?;
    match status {
        200..=299 => Ok(answer),
        status => Err(Unanswered::Refused(Problem::of_answer(status, &answer))),
    }
}

/// As [`ask`] with GET, and reads the answer.
pub(crate) fn get<T: DeserializeOwned>(path: &Path, call: &str) -> Result<T, Unanswered> {
    read(&ask(path, "GET", call, "")?)
}

/// What an answer says, each text in it fit for a line.
pub(crate) fn read<T: DeserializeOwned>(answer: &str) -> Result<T, Unanswered> {
    let parsed = serde_json::from_str(answer);
    let read = parsed.and_then(|mut value| {
        escape_all(&mut value);
        serde_json::from_value(value)
    });
    read.map_err(|e| {
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

fn escape_all(value: &mut Value) {
    match value {
        Value::String(text) => *text = escape::line(text).into_owned(),
        Value::Array(values) => values.iter_mut().for_each(escape_all),
        Value::Object(fields) => fields.values_mut().for_each(escape_all),
        _ => {}
    }
}

fn exchange(
    path: &Path,
    method: &str,
    call: &str,
    body: &str,
) -> Result<(u16, String), Unanswered> {
    let end = Instant::now() + PATIENCE;
    let address = place::address(path);
    place::check(path).map_err(Unanswered::Untrusted)?;
    let connected = Stream::connect_timeout(&address, PATIENCE);
    let mut stream = connected.map_err(Unanswered::Absent)?;
    check_owner(&stream).map_err(Unanswered::Untrusted)?;
    let mut talk = || -> io::Result<(u16, String)> {
        stream.set_write_timeout(Some(PATIENCE))?;
        let length = body.len();
        let request = format!(
            "{method} {call} HTTP/1.1\r\nHost: hvsock\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes())?;
        read_response(&mut stream, |stream| {
            let left = end.saturating_duration_since(Instant::now());
            match left.is_zero() {
                true => Err(ErrorKind::TimedOut.into()),
                false => stream.set_read_timeout(Some(left)),
            }
        })
    };
    talk().map_err(|e| Unanswered::Absent(Error::new(Operation::Connect, &address, e)))
}

/// Refuses a server that is not a process of this user's.
fn check_owner(stream: &Stream) -> crate::Result<()> {
    let fail = |cause| Error::new(Operation::Connect, stream.address(), cause);
    let (owner, user) = (
        sys::connector(stream.as_fd()).map_err(fail)?.user,
        sys::user_id(),
    );
    if owner == user {
        return Ok(());
    }
    let why = format!("it is a socket of user {owner}, not of user {user}");
    let cause = io::Error::new(ErrorKind::PermissionDenied, why);
    Err(fail(cause).with_remedy(format!(
        "run as user {owner} if that hvsock is meant, or else say where yours is with --control PATH"
    )))
}

/// Reads an answer to its end, which is that of the connection: its status and its body. `wait` is
/// called before each read.
fn read_response<R: Read>(
    stream: &mut R,
    mut wait: impl FnMut(&mut R) -> io::Result<()>,
) -> io::Result<(u16, String)> {
    let broken = |why: &str| io::Error::new(ErrorKind::InvalidData, why);
    let mut received = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        wait(stream)?;
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => received.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if received.len() > MOST_BYTES {
            return Err(broken("the answer has more than 16 MiB"));
        }
    }
    if received.is_empty() {
        let why = "it closed the connection without an answer (it serves nobody but the user who runs it)";
        return Err(io::Error::new(ErrorKind::ConnectionAborted, why));
    }
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut parsed = httparse::Response::new(&mut headers);
    let Ok(httparse::Status::Complete(len)) = parsed.parse(&received) else {
        return Err(broken("what came is no HTTP answer"));
    };
    let status = parsed.code.unwrap_or(0);
    let told = parsed
        .headers
        .iter()
        .find(|it| it.name.eq_ignore_ascii_case("Content-Length"))
        .and_then(|it| std::str::from_utf8(it.value).ok()?.parse().ok());
    let body = received.split_off(len);
    if told != Some(body.len()) {
        return Err(broken("the answer was cut short"));
    }
    let body = String::from_utf8(body).map_err(|_| broken("the answer is no UTF-8"))?;
    Ok((status, body))
}

impl Problem {
    /// What an error's answer says.
    fn of_answer(status: u16, answer: &str) -> Problem {
        let json: Value = serde_json::from_str(answer).unwrap_or_default();
        let text = |key: &str| json.get(key).and_then(|it| it.as_str()).map(str::to_owned);
        Problem {
            status,
            // All that is wrong with a file has many lines.
            error: text("error").map_or_else(
                || format!("it answered with status {status}"),
                |error| escape::text(&error).into_owned(),
            ),
            remedy: text("remedy").map(|remedy| escape::line(&remedy).into_owned()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_was_cut_short_is_none() {
        let sent = "HTTP/1.1 409 Conflict\r\nContent-Length: 9\r\n\r\n{\"é\": 1}";
        let read = |len: usize| read_response(&mut &sent.as_bytes()[..len], |_| Ok(()));
        assert_eq!(read(sent.len()).unwrap(), (409, "{\"é\": 1}".to_owned()));
        for len in [0, 10, sent.len() - 1] {
            read(len).unwrap_err();
        }
    }
}
