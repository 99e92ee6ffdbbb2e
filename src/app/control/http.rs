//! HTTP for the sockets of the control interface, by hyper: one request a connection, and limits on
//! what a client sends, in bytes and in time.

use std::convert::Infallible;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderValue, TRANSFER_ENCODING};
use hyper::rt::ReadBufCursor;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, StatusCode};
use percent_encoding::percent_decode_str;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc::Receiver;
use tokio::time::{sleep, timeout};

use super::clients::{ClientPhase, ServedClient};
use super::problem::ApiProblem;
use crate::sys;

/// The most bytes of request line and headers.
const MOST_HEAD: usize = 16 * 1024;
const MOST_HEADERS: usize = 64;
/// The most bytes of a body: a rule has some hundred.
const MOST_BODY: u64 = 64 * 1024;

/// How long a request may take to arrive, and an answer to be sent.
const REQUEST: Duration = Duration::from_secs(5);

/// How long, and for how many bytes, the server reads on after a request. A connection closed with
/// bytes unread is reset, and the client may lose the answer.
const LINGER: Duration = Duration::from_millis(500);
const MOST_LINGERING: u64 = 1024 * 1024;

/// A client's request.
#[derive(Debug, Default)]
pub(super) struct HttpRequest {
    pub(super) method: Method,
    /// The path, percent-decoded.
    pub(super) path: String,
    /// The query, percent-decoded, in order.
    pub(super) query: Vec<(String, String)>,
    pub(super) body: Bytes,
    /// The process that sent it, if the system reports it.
    pub(super) asked_by: Option<u32>,
}

/// The answer to a client.
pub(super) type Response = hyper::Response<Content>;

pub(super) const JSON: &str = "application/json";

/// The content type of events: a JSON object on each line.
const JSON_LINES: &str = "application/x-ndjson";

/// The body of an answer.
#[derive(Debug)]
pub(super) enum Content {
    Text(String),
    /// Lines that are sent as events happen.
    Lines(Receiver<Bytes>),
}

impl Body for Content {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let next = match self.get_mut() {
            Content::Text(text) if text.is_empty() => None,
            Content::Text(text) => Some(std::mem::take(text).into()),
            Content::Lines(lines) => ready!(lines.poll_recv(context)),
        };
        Poll::Ready(next.map(|data| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Content::Text(text) if text.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Content::Text(text) => SizeHint::with_exact(text.len() as u64),
            Content::Lines(_) => SizeHint::default(),
        }
    }
}

/// Makes an answer.
pub(super) fn response(status: u16, content_type: &'static str, body: String) -> Response {
    answer(status, content_type, Content::Text(body))
}

/// Makes an answer with a stream of lines.
pub(super) fn lines(lines: Receiver<Bytes>) -> Response {
    answer(200, JSON_LINES, Content::Lines(lines))
}

fn answer(status: u16, content_type: &'static str, content: Content) -> Response {
    let mut response = Response::new(content);
    // All statuses used here are valid.
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or_default();
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

impl ApiProblem {
    /// Makes the answer that reports this problem.
    pub(super) fn response(&self) -> Response {
        let mut body = serde_json::json!({"error": self.error});
        if let Some(remedy) = &self.remedy {
            body["remedy"] = remedy.as_str().into();
        }
        response(self.status, JSON, format!("{body:#}\n"))
    }
}

/// Serves a request, whose answer `answer` returns. A client that disconnects gets none.
pub(super) async fn serve<F: Future<Output = Response>>(
    stream: UnixStream,
    client: &ServedClient,
    answer: impl Fn(HttpRequest) -> F,
) {
    let stream = Arc::new(stream);
    let is_asked = Arc::new(AtomicBool::new(false));
    let follows = AtomicBool::new(false);
    let exchange = async |request| {
        is_asked.store(true, Ordering::Relaxed);
        let response = match read(request).await? {
            // The client may have given up while this process was stopped: its request is not
            // carried out.
            Ok(request) if request.method != Method::GET && sys::is_hung_up(stream.as_fd()) => {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            Ok(request) => {
                client.enter_phase(ClientPhase::Waiting);
                answer(request).await
            }
            Err(problem) => problem.response(),
        };
        match response.body() {
            Content::Text(_) => client.enter_phase(ClientPhase::Hearing),
            // A client that follows events may wait for any time.
            Content::Lines(_) => follows.store(true, Ordering::Relaxed),
        }
        Ok::<_, io::Error>(response)
    };
    let connection = http1::Builder::new()
        .keep_alive(false)
        .half_close(true)
        .title_case_headers(true)
        .auto_date_header(false)
        .max_buf_size(MOST_HEAD)
        .max_headers(MOST_HEADERS)
        .serve_connection(
            Io {
                stream: Arc::clone(&stream),
                is_heard: Arc::clone(&is_asked),
            },
            service_fn(exchange),
        );
    let refusal = tokio::select! {
        served = connection => match served {
            Ok(()) => None,
            Err(e) if e.is_parse() && !is_asked.load(Ordering::Relaxed) => Some(refusal(&e)),
            Err(_) => return,
        },
        () = client.wait_until_overdue(REQUEST) => match client.phase() {
            ClientPhase::Asking => Some(ApiProblem::new(408, "the request took too long to come")),
            _ => return,
        },
        // With nothing to write, only a poll shows that the client has disconnected.
        () = wait_until_gone(&stream, &follows) => return,
    };
    let Some(mut stream) = Arc::into_inner(stream) else {
        return;
    };
    if let Some(problem) = refusal {
        client.enter_phase(ClientPhase::Hearing);
        let answer = to_text(&problem.response());
        let told = timeout(REQUEST, stream.write_all(answer.as_bytes())).await;
        if !matches!(told, Ok(Ok(()))) {
            return;
        }
    }
    // This fails if both directions have ended. What has arrived is read in any case.
    let _ = socket2::SockRef::from(&stream).shutdown(Shutdown::Write);
    let mut rest = stream.take(MOST_LINGERING);
    let _ = timeout(LINGER, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
}

/// Returns when a client that follows events has disconnected.
async fn wait_until_gone(stream: &UnixStream, follows: &AtomicBool) {
    const LOOK: Duration = Duration::from_secs(1);
    loop {
        sleep(LOOK).await;
        if follows.load(Ordering::Relaxed) && sys::is_hung_up(stream.as_fd()) {
            return;
        }
    }
}

/// Returns the problem with input that hyper refuses.
fn refusal(error: &hyper::Error) -> ApiProblem {
    match error.is_parse_too_large() {
        true => {
            let bounds = format!("{MOST_HEAD} bytes, or than {MOST_HEADERS} headers");
            ApiProblem::new(431, format!("the request's head has more than {bounds}"))
        }
        false => ApiProblem::new(400, format!("that is no HTTP request: {error}")),
    }
}

/// Formats an answer to input that is no valid request.
fn to_text(response: &Response) -> String {
    let status = response.status();
    let body = match response.body() {
        Content::Text(text) => text.as_str(),
        Content::Lines(_) => "",
    };
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// Reads a request to its end.
///
/// # Errors
/// Returns an error if the client disconnects.
async fn read(request: hyper::Request<Incoming>) -> io::Result<Result<HttpRequest, ApiProblem>> {
    let (path, query) = match check(&request) {
        Ok(target) => target,
        Err(problem) => return Ok(Err(problem)),
    };
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?;
    Ok(Ok(HttpRequest {
        method: head.method,
        path,
        query,
        body: body.to_bytes(),
        asked_by: None,
    }))
}

/// Refuses requests without reading their bodies.
fn check(request: &hyper::Request<Incoming>) -> Result<RequestTarget, ApiProblem> {
    if request.headers().contains_key(TRANSFER_ENCODING) {
        let problem = ApiProblem::new(501, "a body in pieces is not taken");
        return Err(problem.with_remedy("send it at once, with a Content-Length"));
    }
    if request.body().size_hint().lower() > MOST_BODY {
        let why = format!("the body has more than {MOST_BODY} bytes");
        return Err(ApiProblem::new(413, why));
    }
    parse_target(request.uri())
}

type RequestTarget = (String, Vec<(String, String)>);

fn parse_target(target: &hyper::Uri) -> Result<RequestTarget, ApiProblem> {
    if target.authority().is_some() || !target.path().starts_with('/') {
        return Err(ApiProblem::new(400, "the path does not begin with /"));
    }
    let decode = |text: &str| match percent_decode_str(text).decode_utf8() {
        Ok(text) => Ok(text.into_owned()),
        Err(_) => Err(ApiProblem::new(400, format!("{text:?} is no UTF-8"))),
    };
    let mut query = Vec::new();
    let pairs = target.query().unwrap_or_default().split('&');
    for pair in pairs.filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        query.push((decode(key)?, decode(value)?));
    }
    Ok((decode(target.path())?, query))
}

/// A stream for hyper. Other owners may use it afterwards.
#[derive(Debug)]
pub(super) struct Io {
    stream: Arc<UnixStream>,
    /// Whether hyper's writes are sent. Its own answers to invalid requests have no text.
    is_heard: Arc<AtomicBool>,
}

impl Io {
    pub(super) fn new(stream: UnixStream) -> Io {
        Io {
            stream: Arc::new(stream),
            is_heard: Arc::new(AtomicBool::new(true)),
        }
    }
}

impl hyper::rt::Read for Io {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut into: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut buffer = [0; 8192];
        let room = into.remaining().min(buffer.len());
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            match self.stream.try_read(&mut buffer[..room]) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                read => return Poll::Ready(read.map(|count| into.put_slice(&buffer[..count]))),
            }
        }
    }
}

impl hyper::rt::Write for Io {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !self.is_heard.load(Ordering::Relaxed) {
            return Poll::Ready(Ok(bytes.len()));
        }
        loop {
            ready!(self.stream.poll_write_ready(context))?;
            match self.stream.try_write(bytes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Sends bytes, `pace` at a time. Returns the answer, with the request if it was valid.
    fn ask(sent: impl AsRef<[u8]>, pace: usize) -> String {
        let (answer, client) = (
            async |it: HttpRequest| {
                let text = format!("{} {} {:?} {:?}", it.method, it.path, it.query, it.body);
                Response::new(Content::Text(text))
            },
            ServedClient::new(),
        );
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            let talk = async {
                for piece in sent.as_ref().chunks(pace) {
                    ours.write_all(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
                ours.shutdown().await.unwrap();
                let mut answer = String::new();
                ours.read_to_string(&mut answer).await.unwrap();
                answer
            };
            tokio::join!(serve(theirs, &client, answer), talk).1
        })
    }

    fn refused(sent: impl AsRef<[u8]>) -> u16 {
        let answer = ask(sent, 4096);
        assert!(answer.contains("\r\n\r\n{\n  \"error\": \""), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        answer["HTTP/1.1 ".len()..][..3].parse().unwrap()
    }

    #[test]
    fn a_request_is_read_however_it_comes() {
        let sent = "DELETE /v1/forwards/tcp%3A%2F%2Fa?grace=3&x=%26 HTTP/1.1\r\nHost: x\r\nCONTENT-length: 2\r\n\r\nokmore";
        for pace in [1, 7, 4096] {
            let answer = ask(sent, pace);
            let (head, text) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
            let right = r#"DELETE /v1/forwards/tcp://a [("grace", "3"), ("x", "&")] b"ok""#;
            assert_eq!(text, right);
        }
    }

    #[test]
    fn a_client_that_waits_for_leave_to_send_its_body_gets_it() {
        let sent = b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nok";
        let answer = ask(sent, 1);
        let after = answer.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n");
        assert!(after.unwrap().ends_with(r#"POST / [] b"ok""#), "{answer}");
        let sent = "POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 70000\r\n\r\n";
        assert_eq!(refused(sent), 413);
    }

    #[test]
    fn what_is_no_request_or_too_long_is_refused() {
        assert_eq!(refused("\0\u{1}\u{2}garbage\r\n\r\n"), 400);
        assert_eq!(refused("GET http://x/ HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(refused("GET /%ff HTTP/1.1\r\n\r\n"), 400);
        let with = |header: &str| format!("POST / HTTP/1.1\r\n{header}\r\n\r\n");
        assert_eq!(refused(with("Content-Length: -1")), 400);
        assert_eq!(refused(with("Content-Length: 1\r\nContent-Length: 2")), 400);
        assert_eq!(refused(with("Content-Length: 65537")), 413);
        assert_eq!(refused(with("Transfer-Encoding: chunked")), 501);
        assert_eq!(refused(with(&"A: b\r\n".repeat(65))), 431);
        let long = format!("GET /{} HTTP/1.1", "x".repeat(20_000));
        assert_eq!(refused(long), 431);
        for cut in [
            "GET / HTTP",
            "POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx",
        ] {
            assert_eq!(ask(cut, 4096), "", "{cut:?}");
        }
    }
}
