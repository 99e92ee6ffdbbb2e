//! The guest's web server: a little of HTTP/1.1.

use super::buffer::Buffer;
use super::chargen::Chargen;

/// The longest request head it takes.
const HEAD_LIMIT: usize = 16 * 1024;

/// Room that an answer needs at most: it repeats the path.
const ANSWER_LIMIT: usize = HEAD_LIMIT + 1024;

/// How far a program in the guest has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Running,
    /// Sends no more, and still reads.
    SentAll,
    Closed,
    /// Has ended both directions by a reset.
    Reset,
}

/// One connection to the guest's web server.
///
/// `GET` and `HEAD` of any path get a page that names the VM and the path; `/bytes/N` is a body of
/// N bytes, and `/missing…` is not found.
#[derive(Debug)]
pub(super) struct Http {
    place: String,
    head: Vec<u8>,
    skip: u64,
    body: u64,
    pattern: Chargen,
    closing: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Request {
    method: String,
    target: String,
    close: bool,
    length: u64,
    chunked: bool,
}

impl Http {
    /// Makes a server at `place` ("VM, port"), as its pages name it.
    pub(super) fn new(place: String) -> Http {
        Http {
            place,
            head: Vec::new(),
            skip: 0,
            body: 0,
            pattern: Chargen::default(),
            closing: false,
        }
    }

    pub(super) fn run(&mut self, input: &mut Buffer, eof: bool, output: &mut Buffer) -> Life {
        loop {
            if self.body > 0 {
                self.body -= self.pattern.fill(output, self.body);
                if self.body > 0 {
                    return Life::Running;
                }
            }
            if self.closing {
                // Reads on to the client's EOF, so that the answer isn't lost in a reset.
                input.clear();
                return if eof { Life::Closed } else { Life::SentAll };
            }
            if self.skip > 0 {
                let n = self.skip.min(input.len() as u64);
                input.consume(n as usize);
                self.skip -= n;
                if self.skip > 0 {
                    return if eof { Life::Closed } else { Life::Running };
                }
            }
            if output.space() < ANSWER_LIMIT {
                return Life::Running;
            }
            if !self.take_head(input) {
                if self.head.len() >= HEAD_LIMIT {
                    self.refuse("431 Request Header Fields Too Large", output);
                    continue;
                }
                return if eof && input.is_empty() {
                    Life::Closed
                } else {
                    Life::Running
                };
            }
            let head = std::mem::take(&mut self.head);
            match parse(&head) {
                Some(request) => self.answer(&request, output),
                None => self.refuse("400 Bad Request", output),
            }
        }
    }

    /// Moves input to the head; whether the head is whole.
    fn take_head(&mut self, input: &mut Buffer) -> bool {
        while !input.is_empty() && self.head.len() < HEAD_LIMIT {
            let bytes = input.bytes();
            let line = bytes.iter().position(|&byte| byte == b'\n');
            let n = line.map_or(bytes.len(), |at| at + 1);
            let n = n.min(HEAD_LIMIT - self.head.len());
            self.head.extend_from_slice(&bytes[..n]);
            input.consume(n);
            // A server ignores empty lines before a request.
            if matches!(self.head.as_slice(), b"\r\n" | b"\n") {
                self.head.clear();
            }
            if self.head.ends_with(b"\n\r\n") || self.head.ends_with(b"\n\n") {
                return true;
            }
        }
        false
    }

    fn answer(&mut self, request: &Request, output: &mut Buffer) {
        if request.chunked {
            return self.refuse("501 Not Implemented", output);
        }
        self.skip = request.length;
        self.closing = request.close;
        let path = request.target.split('?').next().unwrap_or("/");
        if !matches!(request.method.as_str(), "GET" | "HEAD") {
            let page = "only GET and HEAD here\n";
            return self.send(
                "405 Method Not Allowed",
                "Allow: GET, HEAD\r\n",
                page,
                output,
            );
        }
        let head_only = request.method == "HEAD";
        if let Some(length) = path.strip_prefix("/bytes/").and_then(|n| n.parse().ok()) {
            self.start("200 OK", "", "application/octet-stream", length, output);
            self.body = if head_only { 0 } else { length };
            return;
        }
        let (status, verdict) = if path.starts_with("/missing") {
            ("404 Not Found", "not found here: ")
        } else {
            ("200 OK", "")
        };
        let page = format!("{}\n{verdict}{}\n", self.place, request.target);
        if head_only {
            self.start(
                status,
                "",
                "text/plain; charset=utf-8",
                page.len() as u64,
                output,
            );
        } else {
            self.send(status, "", &page, output);
        }
    }

    /// Sends an error, after which it closes.
    fn refuse(&mut self, status: &str, output: &mut Buffer) {
        self.closing = true;
        self.skip = 0;
        self.send(status, "", &format!("{status}\n"), output);
    }

    fn send(&mut self, status: &str, more: &str, page: &str, output: &mut Buffer) {
        self.start(
            status,
            more,
            "text/plain; charset=utf-8",
            page.len() as u64,
            output,
        );
        output.push(page.as_bytes());
    }

    fn start(&mut self, status: &str, more: &str, kind: &str, length: u64, output: &mut Buffer) {
        let connection = if self.closing { "close" } else { "keep-alive" };
        let head = format!(
            "HTTP/1.1 {status}\r\nServer: hvsock-simulate\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}Connection: {connection}\r\n\r\n"
        );
        output.push(head.as_bytes());
    }
}

fn parse(head: &[u8]) -> Option<Request> {
    let text = std::str::from_utf8(head).ok()?;
    let mut lines = text.lines();
    let mut words = lines.next()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    if words.next().is_some() || method.is_empty() || !target.starts_with(['/', '*', 'h']) {
        return None;
    }
    let mut request = Request {
        method: method.to_owned(),
        target: target.to_owned(),
        close: match version {
            "HTTP/1.1" => false,
            "HTTP/1.0" => true,
            _ => return None,
        },
        length: 0,
        chunked: false,
    };
    for line in lines.take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(':')?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            request.length = value.parse().ok()?;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            request.chunked = true;
        } else if name.eq_ignore_ascii_case("connection") {
            for word in value.split(',').map(str::trim) {
                if word.eq_ignore_ascii_case("close") {
                    request.close = true;
                } else if word.eq_ignore_ascii_case("keep-alive") {
                    request.close = false;
                }
            }
        }
    }
    Some(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(text: &str, eof: bool) -> (Life, String) {
        let (mut input, mut output) = (Buffer::new(1 << 20), Buffer::new(1 << 20));
        input.push(text.as_bytes());
        let life = Http::new("a VM".into()).run(&mut input, eof, &mut output);
        (life, String::from_utf8_lossy(output.bytes()).into_owned())
    }

    #[test]
    fn answers_and_keeps_or_closes() {
        let (life, text) = talk("GET /x HTTP/1.1\r\nHost: a\r\n\r\n", false);
        assert_eq!(life, Life::Running);
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        assert!(text.ends_with("Content-Length: 8\r\nConnection: keep-alive\r\n\r\na VM\n/x\n"));
        let (life, text) = talk("GET / HTTP/1.0\r\n\r\n", false);
        assert_eq!(life, Life::SentAll);
        assert!(text.contains("Connection: close"));
        let (life, text) = talk("HEAD / HTTP/1.1\r\n\r\n", true);
        assert_eq!(life, Life::Closed);
        assert!(text.contains("Content-Length: 7") && text.ends_with("\r\n\r\n"));
    }

    #[test]
    fn says_no() {
        assert!(
            talk("nonsense\r\n\r\n", false)
                .1
                .starts_with("HTTP/1.1 400")
        );
        assert!(
            talk("GET /missing HTTP/1.1\r\n\r\n", false)
                .1
                .starts_with("HTTP/1.1 404")
        );
        let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(20_000));
        assert!(talk(&long, false).1.starts_with("HTTP/1.1 431"));
        let post = "POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\n\r\n";
        let text = talk(post, false).1;
        assert!(
            text.starts_with("HTTP/1.1 405") && text.contains("HTTP/1.1 200"),
            "{text}"
        );
    }

    #[test]
    fn sends_bytes() {
        let (life, text) = talk(
            "GET /bytes/5000 HTTP/1.1\r\nConnection: close\r\n\r\n",
            false,
        );
        assert_eq!(life, Life::SentAll);
        let body = text.split_once("\r\n\r\n").map(|(_, body)| body.len());
        assert_eq!(body, Some(5000));
    }
}
