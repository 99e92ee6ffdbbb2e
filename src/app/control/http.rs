//! As much of HTTP/1.1 as the control socket speaks: one request a connection, everything in it bounded.

use percent_encoding::percent_decode_str;

use super::Problem;

/// The longest request line and headers.
const MOST_HEAD: usize = 16 * 1024;
const MOST_HEADERS: usize = 64;
/// The longest body: a rule has some hundred bytes.
const MOST_BODY: usize = 64 * 1024;

/// What a client asks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    /// Decoded.
    pub(super) path: String,
    /// Decoded, in their order.
    pub(super) query: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

/// Why there is no request.
#[derive(Debug)]
pub(super) enum NoRequest {
    /// The client has gone: there is nobody to answer.
    Gone,
    /// It is answered with this.
    Refused(Problem),
}

impl From<Problem> for NoRequest {
    fn from(problem: Problem) -> NoRequest {
        NoRequest::Refused(problem)
    }
}

/// A request that comes piece by piece.
#[derive(Default)]
pub(super) struct Incoming {
    received: Vec<u8>,
    head: Option<Head>,
}

/// How far it has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// There is more to come.
    More,
    /// The client waits to hear this before it sends more.
    Waits(&'static [u8]),
    Whole(Request),
}

impl Incoming {
    /// Takes what has come.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<Progress, Problem> {
        self.received.extend_from_slice(bytes);
        let is_new = self.head.is_none();
        if is_new {
            self.head = parse_head(&self.received)?;
        }
        let Some(head) = &mut self.head else {
            if self.received.len() > MOST_HEAD {
                let why = format!("the request's head has more than {MOST_HEAD} bytes");
                return Err(Problem::new(431, why));
            }
            return Ok(Progress::More);
        };
        let end = head.len + head.body_len;
        if let Some(body) = self.received.get(head.len..end) {
            let mut request = std::mem::take(&mut head.request);
            request.body = body.to_vec();
            return Ok(Progress::Whole(request));
        }
        match is_new && head.waits {
            true => Ok(Progress::Waits(b"HTTP/1.1 100 Continue\r\n\r\n")),
            false => Ok(Progress::More),
        }
    }
}

struct Head {
    /// Without its body.
    request: Request,
    len: usize,
    body_len: usize,
    /// The client wants to be told to send its body.
    waits: bool,
}

/// The head, if all of it is there.
fn parse_head(received: &[u8]) -> Result<Option<Head>, Problem> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let len = match parsed.parse(received) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => {
            let why = format!("the request has more than {MOST_HEADERS} headers");
            return Err(Problem::new(431, why));
        }
        Err(e) => {
            let why = format!("that is no HTTP request: {e}");
            return Err(Problem::new(400, why));
        }
    };
    let mut body_len = None;
    let mut waits = false;
    for header in parsed.headers.iter() {
        let is = |name| header.name.eq_ignore_ascii_case(name);
        if is("Content-Length") {
            let told = parse_length(header.value)?;
            if body_len.is_some_and(|before| before != told) {
                return Err(Problem::new(400, "there are two lengths of the body"));
            }
            body_len = Some(told);
        } else if is("Transfer-Encoding") {
            let remedy = "send it at once, with a Content-Length";
            let problem = Problem::new(501, "a body in pieces is not taken");
            return Err(problem.with_remedy(remedy));
        } else if is("Expect") {
            waits = header.value.eq_ignore_ascii_case(b"100-continue");
        }
    }
    let (method, target) = (parsed.method.unwrap_or(""), parsed.path.unwrap_or(""));
    let (path, query) = parse_target(target)?;
    let request = Request {
        method: method.to_owned(),
        path,
        query,
        body: Vec::new(),
    };
    Ok(Some(Head {
        request,
        len,
        body_len: body_len.unwrap_or(0),
        waits,
    }))
}

fn parse_length(value: &[u8]) -> Result<usize, Problem> {
    let text = std::str::from_utf8(value).unwrap_or("");
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Problem::new(400, "the Content-Length is no number"));
    }
    // One that overflows is too long, too.
    let length = text.parse().unwrap_or(usize::MAX);
    if length > MOST_BODY {
        let why = format!("the body has more than {MOST_BODY} bytes");
        return Err(Problem::new(413, why));
    }
    Ok(length)
}

type Target = (String, Vec<(String, String)>);

fn parse_target(target: &str) -> Result<Target, Problem> {
    if !target.starts_with('/') {
        return Err(Problem::new(400, "the path does not begin with /"));
    }
    let decode = |text: &str| match percent_decode_str(text).decode_utf8() {
        Ok(text) => Ok(text.into_owned()),
        Err(_) => Err(Problem::new(400, format!("{text:?} is no UTF-8"))),
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut pairs = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        pairs.push((decode(key)?, decode(value)?));
    }
    Ok((decode(path)?, pairs))
}

/// What a client is answered.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) status: u16,
    pub(super) content_type: &'static str,
    /// The methods that there are, where the one that was used is none of them.
    pub(super) allow: Option<&'static str>,
    pub(super) body: String,
}

impl Response {
    /// As it is sent.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let Response {
            status,
            content_type,
            body,
            ..
        } = self;
        let allow = match self.allow {
            Some(methods) => format!("Allow: {methods}\r\n"),
            None => String::new(),
        };
        let head = format!(
            "HTTP/1.1 {status} {}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
            reason(*status),
            body.len()
        );
        [head.as_bytes(), body.as_bytes()].concat()
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What comes of a request that comes in pieces of that size, and what its client is told meanwhile.
    fn read(sent: &[u8], pace: usize) -> Result<(Option<Request>, Vec<u8>), Problem> {
        let mut incoming = Incoming::default();
        let mut told = Vec::new();
        for piece in sent.chunks(pace) {
            match incoming.take(piece)? {
                Progress::More => {}
                Progress::Waits(word) => told.extend_from_slice(word),
                Progress::Whole(request) => return Ok((Some(request), told)),
            }
        }
        Ok((None, told))
    }

    fn refused(sends: impl AsRef<[u8]>) -> u16 {
        read(sends.as_ref(), 4096).unwrap_err().status
    }

    #[test]
    fn a_request_is_read_however_it_comes() {
        let sent = "DELETE /v1/forwards/tcp%3A%2F%2Fa?grace=3&x=%26 HTTP/1.1\r\nHost: x\r\nCONTENT-length: 2\r\n\r\nokmore";
        for pace in [1, 7, 4096] {
            let (request, _) = read(sent.as_bytes(), pace).unwrap();
            let request = request.unwrap();
            assert_eq!(request.method, "DELETE");
            assert_eq!(request.path, "/v1/forwards/tcp://a");
            let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
            assert_eq!(request.query, [pair("grace", "3"), pair("x", "&")]);
            assert_eq!(request.body, b"ok");
        }
    }

    #[test]
    fn a_client_that_waits_for_leave_to_send_its_body_gets_it() {
        let sent = b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nok";
        let (request, told) = read(sent, 1).unwrap();
        assert_eq!(request.unwrap().body, b"ok");
        assert_eq!(told, b"HTTP/1.1 100 Continue\r\n\r\n");
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
        assert_eq!(refused(with(&format!("Content-Length: {:9>40}", 9))), 413);
        assert_eq!(refused(with("Transfer-Encoding: chunked")), 501);
        assert_eq!(refused(with(&"A: b\r\n".repeat(65))), 431);
        assert_eq!(
            refused(format!("GET /{} HTTP/1.1", "x".repeat(20_000))),
            431
        );
        for cut in [
            "GET / HTTP",
            "POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx",
        ] {
            assert_eq!(read(cut.as_bytes(), 4096).unwrap().0, None, "{cut:?}");
        }
    }
}
