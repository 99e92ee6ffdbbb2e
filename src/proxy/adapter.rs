//! Adapters between a stream that no poller can wait for and one that only a poller can wait for:
//! AF_HYPERV, and a named pipe whose poller had it first. A pair of local TCP sockets lies between
//! them; relay threads carry the bytes from the one to the other. The loop sees only the TCP
//! socket.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use socket2::SockRef;

use super::relay_threads::{RelayThreads, Reporter};
use crate::address::{Address, Host, TcpAddress};
use crate::engine::connection::ThreadsResult;
use crate::engine::relay::Side;
use crate::lock::lock;
use crate::stream;
use crate::stream::nonblocking::{Stream, set_tcp_options};

/// The number of live adapters.
#[derive(Debug, Default)]
pub(super) struct Adapters {
    live: Mutex<usize>,
    ended: Condvar,
}

impl Adapters {
    fn live(&self) -> MutexGuard<'_, usize> {
        lock(&self.live)
    }

    /// Waits until all adapters have ended, at most `timeout`.
    pub(super) fn wait(&self, timeout: Duration) {
        let some = |live: &mut usize| *live > 0;
        drop(self.ended.wait_timeout_while(self.live(), timeout, some));
    }
}

/// One adapter.
struct Adapter {
    /// The side of the stream that threads wait for.
    side: Side,
    drain: Duration,
    adapters: Arc<Adapters>,
}

impl Reporter for Adapter {
    /// Does nothing, because the loop counts the bytes.
    fn count_delivered(&self, _: Side, _: u64) {}

    fn drain_timeout(&self, side: Side) -> Option<Duration> {
        (side == self.side).then_some(self.drain)
    }

    fn report_end(&self, _: ThreadsResult) {
        *self.adapters.live() -= 1;
        self.adapters.ended.notify_all();
    }
}

/// Replaces `stream`, the end of `side`, by a TCP socket that leads to it through an adapter.
///
/// # Errors
/// Returns the reason if there can be no adapter. The stream is unchanged if a socket can't be had;
/// if no thread can be started, it leads nowhere, and what it was is reset.
pub(super) fn insert(
    side: Side,
    stream: &mut Stream,
    drain: Duration,
    adapters: &Arc<Adapters>,
) -> io::Result<()> {
    let [near, far] = pair()?;
    near.set_nonblocking(true)?;
    set_tcp_options(SockRef::from(&near));
    set_tcp_options(SockRef::from(&far));
    let here = Host::Ip(Ipv4Addr::LOCALHOST.into());
    let address = Address::Tcp(TcpAddress::new(here, near.local_addr()?.port()));
    let far = Stream::Tcp(mio::net::TcpStream::from_std(far));
    let far = stream::Stream::from_nonblocking(far, &address)?;
    let near = Stream::Tcp(mio::net::TcpStream::from_std(near));
    let blocking = std::mem::replace(stream, near);
    let blocking = stream::Stream::from_nonblocking(blocking, &address)?;
    let streams = match side {
        Side::Client => [blocking, far],
        Side::Server => [far, blocking],
    };
    *adapters.live() += 1;
    let order = Adapter {
        side,
        drain,
        adapters: Arc::clone(adapters),
    };
    if let Err(e) = RelayThreads::start(streams, order) {
        *adapters.live() -= 1;
        return Err(e);
    }
    Ok(())
}

/// Returns two local sockets that are connected with each other.
fn pair() -> io::Result<[TcpStream; 2]> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let ours = near.local_addr()?;
    // Another program may have guessed the port and connected first.
    for _ in 0..16 {
        let (far, peer) = listener.accept()?;
        if peer == ours {
            return Ok([near, far]);
        }
    }
    Err(io::ErrorKind::ConnectionRefused.into())
}
