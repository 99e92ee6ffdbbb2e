//! The server: echoes, or receives and sends what a client requests.

use std::io::{self, Read, Write};
use std::sync::Mutex;
use std::time::Instant;

use tracing::{debug, info};

use crate::app::serve::{self, Stop};
use crate::listener::lasting::LastingListener;
use crate::lock::lock;
use crate::name::SocketName;
use crate::stream::Stream;

use super::data::{Data, LONGEST_LINE, MARK, StressRequest, Way};

/// Serves clients until stopped. With `verbose`, prints a line for each.
pub(crate) fn serve(
    listener: &mut LastingListener,
    plan: serve::ServePlan,
    stop: &Stop,
    verbose: bool,
) {
    // Most clients have the seed of the last one.
    let last: Mutex<Option<Data>> = Mutex::new(None);
    serve::serve(listener, plan, stop, |number, stream, peer| {
        let begun = Instant::now();
        let outcome = serve_client(stream, &last);
        let took = begun.elapsed().as_secs_f64() * 1e3;
        match outcome {
            Ok((what, bytes)) if verbose => {
                info!("connection {number} from {peer}: {what} {bytes} bytes in {took:.1} ms");
            }
            Ok((what, bytes)) => debug!("connection {number} from {peer}: {what} {bytes} bytes"),
            Err(e) => fail(number, peer, &e, verbose),
        }
    });
}

fn fail(number: u64, peer: SocketName, error: &io::Error, verbose: bool) {
    match verbose {
        true => info!("connection {number} from {peer}: {error}"),
        false => debug!("connection {number} from {peer}: {error}"),
    }
}

/// Serves a client. Returns what was done, and the number of bytes.
fn serve_client(stream: &Stream, last: &Mutex<Option<Data>>) -> io::Result<(&'static str, u64)> {
    let mut first = Vec::new();
    let Some(request) = read_request(stream, &mut first)? else {
        return serve::echo(stream, &first).map(|bytes| ("echoed", bytes));
    };
    let data = {
        let mut last = lock(last);
        match &*last {
            Some(data) if data.seed == request.seed => data.clone(),
            _ => last.insert(Data::new(request.seed)).clone(),
        }
    };
    match request.way {
        Way::Up => receive_upload(stream, &request, &data),
        Way::Down => send_download(stream, &request, &data),
    }
}

/// Reads a request's line, and nothing after it. If there is none, returns `None`, and the bytes in
/// `came`.
fn read_request(mut stream: &Stream, came: &mut Vec<u8>) -> io::Result<Option<StressRequest>> {
    while came.len() < LONGEST_LINE {
        // Bytes are read one by one, since nothing after the line may be read. The first bytes show
        // whether it is a request.
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 {
            return Ok(None);
        }
        came.push(byte[0]);
        let begins = came.len().min(MARK.len());
        if came[..begins] != MARK[..begins] {
            return Ok(None);
        }
        if byte == *b"\n" {
            let line = String::from_utf8_lossy(came);
            return Ok(line.parse().ok());
        }
    }
    Ok(None)
}

fn receive_upload(
    mut stream: &Stream,
    request: &StressRequest,
    data: &Data,
) -> io::Result<(&'static str, u64)> {
    let mut buffer = vec![0; 256 * 1024];
    let mut taken = 0;
    let mut wrong = None;
    while taken < request.bytes {
        let len = usize::try_from(request.bytes - taken).unwrap_or(usize::MAX);
        let len = len.min(buffer.len());
        let n = stream.read(&mut buffer[..len])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if wrong.is_none() {
            wrong = data.difference(request.start + taken, &buffer[..n]);
        }
        taken += n as u64;
    }
    let answer = match wrong {
        None => "ok\n".to_owned(),
        Some(at) => format!(
            "MISMATCH: byte {} is not the one that was sent\n",
            at - request.start
        ),
    };
    stream.write_all(answer.as_bytes())?;
    half_close_and_drain(stream)?;
    Ok(("taken", taken))
}

fn send_download(
    mut stream: &Stream,
    request: &StressRequest,
    data: &Data,
) -> io::Result<(&'static str, u64)> {
    let mut given = 0;
    while given < request.bytes {
        let len = (request.bytes - given).min(256 * 1024);
        given += stream.write(data.at(request.start + given, len))? as u64;
    }
    half_close_and_drain(stream)?;
    Ok(("given", given))
}

/// Half-closes, and reads to the client's EOF.
fn half_close_and_drain(mut stream: &Stream) -> io::Result<()> {
    stream.half_close()?;
    while stream.read(&mut [0; 64])? > 0 {}
    Ok(())
}
