//! What the engine asks of a connection's socket, as the sockets for an event loop answer it.

use std::io;

use crate::engine::connection::ConnectionSocket;
use crate::name::{PeerProcess, SocketName};
use crate::stream::nonblocking::Stream;

impl ConnectionSocket for Stream {
    fn connected(&self) -> io::Result<bool> {
        Stream::connected(self)
    }

    fn shutdown_read(&self) {
        Stream::shutdown_read(self);
    }

    fn unacknowledged(&self) -> usize {
        Stream::unacknowledged(self)
    }

    fn is_guarded(&self) -> bool {
        Stream::is_guarded(self)
    }

    fn local_name(&self) -> Option<SocketName> {
        self.local_addr().ok()
    }

    fn unix_peer_name(&self) -> Option<Vec<u8>> {
        self.peer_name()
    }

    fn peer_process(&self) -> Option<PeerProcess> {
        Stream::peer_process(self)
    }

    fn unread(&self) -> Option<u64> {
        Stream::unread(self)
    }

    fn is_from_this_process(&self) -> bool {
        self.is_from_us()
    }
}
