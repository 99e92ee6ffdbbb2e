//! Connects without blocking: names, attempts and handshakes are awaited.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use ::tokio::io::Interest;
use ::tokio::time::{sleep_until, timeout_at};

use crate::address::Address;
use crate::dial::{Begun, Dial, Next, Programs, explain, on_thread};
use crate::error::{Error, Operation, Result};
use crate::stream::endpoint::{Endpoint, Target, not_carried};
use crate::stream::nonblocking::Stream;
use crate::sys;

/// Connects to `address` until `deadline`.
pub(super) async fn connect(address: &Address, deadline: Instant) -> Result<Stream> {
    let mut dial = Dial::new(deadline);
    match Target::of(address) {
        Target::Endpoint(endpoint) => dial.add([endpoint]),
        Target::Name { host, port } => {
            let found = ::tokio::net::lookup_host((host, port));
            let found = timeout_at(deadline.into(), found).await;
            let found = found.unwrap_or_else(|_| Err(no_answer())).map_err(|e| {
                Error::new(Operation::Resolve, host, e)
                    .with_remedy("is the name right, and does DNS answer?")
            })?;
            dial.add(found.map(Endpoint::Tcp));
        }
        Target::OnThread => {
            let to = address.clone();
            let dial = move || on_thread(&to, &Programs::alone());
            let dialled = ::tokio::task::spawn_blocking(dial).await;
            return dialled.unwrap_or_else(|e| Err(explain(address, io::Error::other(e))));
        }
        Target::NotCarried => return Err(not_carried(Operation::Connect, address)),
    }
    try_endpoints(&mut dial)
        .await
        .map_err(|e| explain(address, e))
}

/// Tries one endpoint after the other.
async fn try_endpoints(dial: &mut Dial) -> io::Result<Stream> {
    loop {
        let error = match attempt(dial).await {
            Ok(stream) => return Ok(stream),
            Err(e) => e,
        };
        match dial.failed(Instant::now(), error) {
            Next::Now => {}
            Next::At(at) => sleep_until(at.into()).await,
            Next::GiveUp(e) => return Err(e),
        }
    }
}

async fn attempt(dial: &mut Dial) -> io::Result<Stream> {
    let Some(endpoint) = dial.endpoint() else {
        let why = "the name has no address";
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    };
    let mut stream = Stream::connect(endpoint)?;
    if dial.begun(Instant::now()) == Begun::InProgress {
        while !stream.connected()? {
            wait(&stream, Interest::WRITABLE, dial).await?;
        }
    }
    while !dial.shake_hands(&mut stream)? {
        wait(&stream, Interest::READABLE, dial).await?;
    }
    Ok(stream)
}

/// Waits until the stream is ready, at most until the attempt's deadline.
async fn wait(stream: &Stream, interest: Interest, dial: &Dial) -> io::Result<()> {
    let watched = sys::watch_borrowed(stream.as_fd())?;
    let ready = watched.ready(interest);
    match timeout_at(dial.attempt_deadline().into(), ready).await {
        Ok(ready) => ready.map(drop),
        Err(_) => Err(no_answer()),
    }
}

fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it hasn't answered in time")
}
