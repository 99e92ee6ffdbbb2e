//! The client of the control socket, used by `hvsock status` and similar commands.
//!
//! Only a server process of this user is trusted, and its answer is limited in size and time. Texts
//! in it are escaped, since they may come from files and peers of others.

use std::error::Error as _;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, Response};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::http::Io;
use super::model::Status;
use super::place;
use super::problem::ApiProblem;
use crate::app::{escape, processes};
use crate::dial;
use crate::error::{Error, Operation, counted};
use crate::stream::Stream;
use crate::sys;

/// How long the server may take for its whole answer. A change takes no longer than a worker takes
/// to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The longest answer in bytes. A connection takes some 200 bytes, a forward some 1000.
const MOST_BYTES: usize = 16 << 20;

/// Why there is no usable answer.
#[derive(Debug)]
pub(crate) enum Unanswered {
    /// No server is there.
    Absent(Error),
    /// The server may be anyone's, and was sent nothing.
    Untrusted(Error),
    /// The server has refused the request.
    Refused(ApiProblem),
}

/// Describes an hvsock that may be meant, with the listen address of its first forward if it
/// answers in time.
fn describe_candidate(process: u32) -> String {
    /// A stopped process never answers.
    const PATIENCE: Duration = Duration::from_secs(1);
    let answer = ask_status(&place::own_path(process), PATIENCE).ok();
    let status = answer.and_then(|answer| read::<Status>(&answer).ok());
    match status.as_ref().and_then(|it| it.forwards.first()) {
        Some(forward) => format!("--pid {process} ({})", forward.name_or_address()),
        None => format!("--pid {process}"),
    }
}

/// Returns whether a process is an hvsock of this user that may have a control socket.
fn is_hvsock(process: u32) -> bool {
    let all = processes::list().unwrap_or_default();
    all.iter().any(|it| it.id == process && !it.is_keeper())
}

impl std::fmt::Display for Unanswered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unanswered::Absent(error) => {
                let (place, cause) = (error.subject(), error.cause());
                let is_missing = matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                );
                if is_missing && let Some(process) = place::process_of(place) {
                    if is_hvsock(process) {
                        return write!(
                            f,
                            "the control socket of process {process} is elsewhere, or off: say where it is with --control PATH"
                        );
                    }
                    match i32::try_from(process).is_ok_and(sys::process_is_alive) {
                        true => write!(f, "process {process} is no hvsock with a control socket")?,
                        false => write!(f, "no hvsock is process {process}")?,
                    }
                    return f.write_str("; `hvsock ps` lists those that run");
                }
                let own = place::processes_with_own_sockets();
                let is_usual = |it: &std::path::PathBuf| place::address(it).to_string() == place;
                if own.len() > 1 && place::usual_paths().iter().any(is_usual) {
                    let hvsocks = counted(own.len() as u64, "hvsock");
                    let each: Vec<_> = own.into_iter().map(describe_candidate).collect();
                    let each = each.join(" or ");
                    return write!(f, "{hvsocks} run: say which with {each}");
                }
                write!(f, "no hvsock answers at {place}: {cause}; ")?;
                let addresses = place::usual_paths()
                    .into_iter()
                    .map(|it| place::address(&it).to_string());
                let (this, others): (Vec<_>, Vec<_>) = addresses.partition(|it| it == place);
                if !this.is_empty() && !others.is_empty() {
                    write!(f, "nor is one at {}; ", others.join(" or "))?;
                }
                f.write_str(match error.kind() {
                    ErrorKind::PermissionDenied | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                        "it lets in only the user who runs it: be that user"
                    }
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                        "it takes no request, or gives no answer: is it stopped, or is this another program's socket?"
                    }
                    _ if error.remedy().is_some_and(|it| it == dial::NO_SOCKET) => dial::NO_SOCKET,
                    _ => {
                        "start one with `hvsock run CONFIG`, or with --control, or say where it is with --control PATH; `hvsock ps` lists those that run"
                    }
                })
            }
            Unanswered::Untrusted(error) => write!(f, "not asking there: {error}"),
            Unanswered::Refused(problem) => problem.fmt(f),
        }
    }
}

impl std::error::Error for Unanswered {}

/// Sends a request to the server at `path`. Returns the body of the answer.
pub(crate) fn ask(path: &Path, method: &str, call: &str, body: &str) -> Result<String, Unanswered> {
    let (status, answer) = exchange(path, method, call, body, PATIENCE)?;
    match status {
        200..=299 => Ok(answer),
        status => Err(Unanswered::Refused(ApiProblem::of_answer(status, &answer))),
    }
}

/// Sends a GET request as [`ask`] does, and parses the answer.
pub(crate) fn get<T: DeserializeOwned>(path: &Path, call: &str) -> Result<T, Unanswered> {
    read(&ask(path, "GET", call, "")?)
}

/// Requests the events from now on, and calls `pass_on` with each line until the server ends or
/// `pass_on` returns false.
pub(crate) fn follow_events(
    path: &Path,
    call: &str,
    mut pass_on: impl FnMut(&str) -> bool,
) -> Result<(), Unanswered> {
    let end = Instant::now() + PATIENCE;
    let refused = send_and_read(path, "GET", call, "", PATIENCE, async |answer| {
        let left = end.saturating_duration_since(Instant::now());
        let answer = timeout(left, answer).await.map_err(io::Error::from)??;
        let status = answer.status().as_u16();
        if !(200..=299).contains(&status) {
            return Ok(Some((status, read_text(answer).await?)));
        }
        let mut body = answer.into_body();
        let mut rest = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame =
                frame.map_err(|_| broken_answer("what it tells was cut short: has it ended?"))?;
            rest.extend(frame.into_data().unwrap_or_default());
            while let Some(len) = rest.iter().position(|byte| *byte == b'\n') {
                let line = rest.drain(..=len).collect::<Vec<u8>>();
                if !pass_on(String::from_utf8_lossy(&line[..len]).as_ref()) {
                    return Ok(None);
                }
            }
        }
        Ok(None)
    })?;
    match refused {
        None => Ok(()),
        Some((status, answer)) => Err(Unanswered::Refused(ApiProblem::of_answer(status, &answer))),
    }
}

/// Requests the status as [`ask`] does, from a server that may take that long. Returns the body of
/// the answer.
pub(crate) fn ask_status(path: &Path, patience: Duration) -> Result<String, Unanswered> {
    match exchange(path, "GET", "/v1/status", "", patience)? {
        (200..=299, answer) => Ok(answer),
        (status, answer) => Err(Unanswered::Refused(ApiProblem::of_answer(status, &answer))),
    }
}

/// Parses an answer. Its texts are escaped for single lines.
pub(crate) fn read<T: DeserializeOwned>(answer: &str) -> Result<T, Unanswered> {
    let parsed = serde_json::from_str(answer);
    let read = parsed.and_then(|mut value| {
        escape_all(&mut value);
        serde_json::from_value(value)
    });
    read.map_err(|e| {
        let why = format!("the answer can't be understood: {e}");
        let problem = ApiProblem::new(500, why);
        Unanswered::Refused(problem.with_remedy("is it an hvsock of the same version?"))
    })
}

/// Percent-encodes a name for a path.
pub(crate) fn encode_segment(name: &str) -> String {
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
    patience: Duration,
) -> Result<(u16, String), Unanswered> {
    let end = Instant::now() + patience;
    send_and_read(path, method, call, body, patience, async |answer| {
        let whole = async {
            let answer = answer.await?;
            let status = answer.status().as_u16();
            Ok((status, read_text(answer).await?))
        };
        let left = end.saturating_duration_since(Instant::now());
        timeout(left, whole).await.map_err(io::Error::from)?
    })
}

type HttpAnswer = Response<Incoming>;

/// Connects to the server if it is this user's, sends a request, and calls `read` with the answer.
fn send_and_read<T>(
    path: &Path,
    method: &str,
    call: &str,
    body: &str,
    patience: Duration,
    read: impl AsyncFnOnce(Pin<Box<dyn Future<Output = io::Result<HttpAnswer>>>>) -> io::Result<T>,
) -> Result<T, Unanswered> {
    let address = place::address(path);
    place::check(path).map_err(Unanswered::Untrusted)?;
    let stream = Stream::connect_timeout(&address, patience).map_err(Unanswered::Absent)?;
    check_owner(&stream).map_err(Unanswered::Untrusted)?;
    let request = Request::builder().method(method).uri(call);
    let request = request.header(HOST, "hvsock").body(body.to_owned());
    let talk = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let request = request.map_err(io::Error::other)?;
        let answer = send(stream.into_socket().into(), request);
        runtime.block_on(read(Box::pin(answer)))
    };
    talk().map_err(|e| Unanswered::Absent(Error::new(Operation::Connect, &address, e)))
}

/// Refuses a server that is no process of this user.
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

/// Sends a request. Returns its answer once the headers have come.
async fn send(socket: OwnedFd, request: Request<String>) -> io::Result<HttpAnswer> {
    let stream = std::os::unix::net::UnixStream::from(socket);
    stream.set_nonblocking(true)?;
    let io = Io::new(UnixStream::from_std(stream)?);
    let (mut sender, connection) = http1::handshake(io).await.map_err(no_answer)?;
    // It ends with the runtime.
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(no_answer)
}

fn broken_answer(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

/// Reads the body of an answer.
async fn read_text(answer: HttpAnswer) -> io::Result<String> {
    let body = Limited::new(answer.into_body(), MOST_BYTES).collect().await;
    let body = body.map_err(|e| match e.is::<LengthLimitError>() {
        true => broken_answer("the answer has more than 16 MiB"),
        false => broken_answer("the answer was cut short"),
    })?;
    let body = String::from_utf8(body.to_bytes().into());
    body.map_err(|_| broken_answer("the answer is no UTF-8"))
}

/// Describes why there is no answer.
fn no_answer(error: hyper::Error) -> io::Error {
    let cause = error.source().and_then(|it| it.downcast_ref::<io::Error>());
    if let Some(code) = cause.and_then(io::Error::raw_os_error) {
        return io::Error::from_raw_os_error(code);
    }
    match error.is_parse() {
        true => io::Error::new(ErrorKind::InvalidData, "what came is no HTTP answer"),
        false => io::Error::new(
            ErrorKind::ConnectionAborted,
            "it closed the connection without an answer (it serves nobody but the user who runs it)",
        ),
    }
}

impl ApiProblem {
    /// Makes the problem of an error answer.
    fn of_answer(status: u16, answer: &str) -> ApiProblem {
        let json: Value = serde_json::from_str(answer).unwrap_or_default();
        let text = |key: &str| json.get(key).and_then(|it| it.as_str()).map(str::to_owned);
        ApiProblem {
            status,
            // The mistakes in a file have many lines.
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
    use std::io::Write;

    use super::*;

    #[test]
    fn an_answer_that_was_cut_short_is_none() {
        let sent = "HTTP/1.1 409 Conflict\r\nContent-Length: 9\r\n\r\n{\"é\": 1}";
        let read = |len: usize| {
            let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.write_all(&sent.as_bytes()[..len]).unwrap();
            ours.shutdown(std::net::Shutdown::Write).unwrap();
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().build().unwrap();
            runtime.block_on(async {
                let answer = send(theirs.into(), Request::new(String::new())).await?;
                Ok::<_, io::Error>((answer.status().as_u16(), read_text(answer).await?))
            })
        };
        assert_eq!(read(sent.len()).unwrap(), (409, "{\"é\": 1}".to_owned()));
        for len in [0, 10, sent.len() - 1] {
            read(len).unwrap_err();
        }
    }
}
