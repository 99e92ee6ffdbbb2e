//! Connects without blocking: names, attempts and handshakes are awaited.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use ::tokio::io::Interest;
use ::tokio::time::{sleep_until, timeout_at};

use crate::address::Address;
use crate::dial::{Attempts, Begun, Dial, FailedAddresses, Next, Programs, explain, on_thread};
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
            let order = FailedAddresses::own().order(address, found.collect(), Instant::now());
            dial.add(order.into_iter().map(Endpoint::Tcp));
        }
        Target::OnThread => {
            let to = address.clone();
            let dial = move || on_thread(&to, &Programs::alone(), drop);
            let dialled = ::tokio::task::spawn_blocking(dial).await;
            return dialled.unwrap_or_else(|e| Err(explain(address, io::Error::other(e))));
        }
        Target::NotCarried => return Err(not_carried(Operation::Connect, address)),
    }
    try_endpoints(dial).await.map_err(|e| explain(address, e))
}

/// Tries one endpoint after the other, and more than one at a time if the first doesn't answer.
async fn try_endpoints(dial: Dial) -> io::Result<Stream> {
    let mut attempts = Attempts::new(dial);
    loop {
        let error = match attempt(&mut attempts).await {
            Ok(stream) => return Ok(stream),
            Err(e) => e,
        };
        match attempts.note_failure(Instant::now(), error) {
            Next::Now => {}
            Next::At(at) => sleep_until(at.into()).await,
            Next::GiveUp(e) => return Err(e),
        }
    }
}

async fn attempt(attempts: &mut Attempts) -> io::Result<Stream> {
    if attempts.begin()? == Begun::InProgress {
        while !attempts.go_on(Instant::now())? {
            wait(attempts, Interest::WRITABLE).await?;
        }
    }
    while !attempts.shake_hands()? {
        if Instant::now() >= attempts.wait_until() {
            return Err(no_answer());
        }
        wait(attempts, Interest::READABLE).await?;
    }
    attempts.take()
}

/// Waits for a while; the caller looks at what has come of it.
async fn wait(attempts: &Attempts, interest: Interest) -> io::Result<()> {
    let streams = attempts.streams();
    let watched = streams.map(|stream| sys::watch_borrowed(stream.as_fd()));
    let watched: Vec<_> = watched.collect::<io::Result<_>>()?;
    let ready = sys::any_ready(&watched, interest);
    match timeout_at(attempts.wait_until().into(), ready).await {
        Ok(ready) => ready.map(drop),
        Err(_late) => Ok(()),
    }
}

fn no_answer() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it hasn't answered in time")
}
