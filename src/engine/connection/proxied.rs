//! The PROXY protocol at both sides of a connection: a client that is a proxy names its own client
//! first, and the target is told first who the client is.

use std::io;
use std::time::{Duration, Instant};

use crate::engine::end_reason::{EndReason, RefusalReason};
use crate::engine::proxy_header::{self, Header};
use crate::engine::relay::{End, Pair, Pool, Side};
use crate::error::{Error, Operation};
use crate::name::SocketName;
use crate::time::after;

use super::action::Context;
use super::socket::ConnectionSocket;
use super::state::{Connection, Proxied, State};

/// How long a header may take to come. (At least 3 s, says the protocol, for a segment that is
/// lost.)
const PATIENCE: Duration = Duration::from_secs(5);

/// The bytes of one read.
const READ: usize = 1024;

impl<S: ConnectionSocket> Connection<S> {
    /// Returns whether the client is a proxy that has to say who its client is.
    pub(super) fn expects_header(&self) -> bool {
        let from = &self.forward.rule.accept_proxy;
        from.iter().any(|source| source.includes(&self.peer.name))
    }

    /// Waits for the header.
    pub(super) fn begin_reading_header(&mut self, cx: &mut Context<'_, S>) {
        let until = after(cx.now, PATIENCE);
        self.proxied = Some(Box::new(Proxied {
            until: Some(until),
            read: Vec::new(),
            destination: None,
        }));
        self.go_on_reading_header(until, cx);
    }

    /// Returns by when the header has to be there, if it is awaited.
    pub(super) fn awaits_header(&self) -> Option<Instant> {
        self.proxied.as_ref().and_then(|it| it.until)
    }

    /// Reads what has come of the header. What was read behind it is the client's.
    pub(super) fn go_on_reading_header(&mut self, until: Instant, cx: &mut Context<'_, S>) {
        let (State::Waiting { client, .. }, Some(proxied)) = (&mut self.state, &mut self.proxied)
        else {
            return;
        };
        while client.is_readable() {
            let mut buffer = [0; READ];
            let Some(n) = client.read(&mut buffer) else {
                // An interrupted call leaves it readable.
                continue;
            };
            proxied.read.extend(&buffer[..n]);
            match proxy_header::parse(&proxied.read) {
                Ok(None) => {}
                Ok(Some(header)) => return self.take_header(header, cx),
                Err(why) => return self.refuse_header(why, io::ErrorKind::InvalidData, cx),
            }
        }
        if client.is_gone() {
            self.end_because(EndReason::ClientGaveUp);
            self.close(cx);
        } else if client.input_ended() {
            self.refuse_header("it ended before it", io::ErrorKind::UnexpectedEof, cx);
        } else if cx.now >= until {
            let why = "it has not come in time";
            self.refuse_header(why, io::ErrorKind::TimedOut, cx);
        } else {
            self.wake_at = Some(until);
        }
    }

    fn take_header(&mut self, header: Header, cx: &mut Context<'_, S>) {
        if let Some(client) = header.client {
            self.peer = client;
        }
        if let Some(proxied) = &mut self.proxied {
            proxied.until = None;
            proxied.read.drain(..header.len);
            proxied.destination = header.destination;
        }
        self.wake_at = None;
        self.begin_dial(cx);
    }

    fn refuse_header(&mut self, why: &str, kind: io::ErrorKind, cx: &mut Context<'_, S>) {
        let proxy = self.peer.name.without_port();
        let why = format!("no header of the PROXY protocol from {proxy}: {why}");
        let error = Error::new(
            Operation::Accept,
            &self.forward.rule.listen,
            io::Error::new(kind, why),
        );
        let error = error.with_remedy("have it send one, or take it out of accept-proxy");
        self.refuse(&error, RefusalReason::NoHeader, cx);
    }

    /// Returns the header by which the target is to be told who the client is.
    pub(super) fn header_for_target(&self, client: &End<S>) -> Vec<u8> {
        let Some(version) = self.forward.rule.proxy_protocol else {
            return Vec::new();
        };
        let told = self.proxied.as_ref().and_then(|it| it.destination);
        let destination = told.or_else(|| match client.socket.local_name() {
            Some(SocketName::Tcp(address)) => Some(address),
            _ => None,
        });
        proxy_header::encode(version, self.peer, destination)
    }

    /// Has the pair begin with the header for the target, and with what was read behind that of the
    /// client. What the client has sent meanwhile goes into the same write.
    pub(super) fn give_header(
        &mut self,
        header: &[u8],
        pair: &mut Pair<S>,
        pool: &mut Pool<S::Pipe>,
    ) {
        let behind = self.proxied.take().map(|it| it.read).unwrap_or_default();
        if header.is_empty() && behind.is_empty() {
            return;
        }
        let mut buffer = pool.take_buffer();
        let mut len = 0;
        for part in [header, &behind] {
            buffer[len..len + part.len()].copy_from_slice(part);
            len += part.len();
        }
        let client = &mut pair.ends[Side::Client];
        if client.is_readable() {
            len += client.read(&mut buffer[len..]).unwrap_or(0);
        }
        pair.give(Side::Client, buffer, len);
        pair.discount(Side::Client, header.len());
    }
}
