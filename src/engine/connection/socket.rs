//! What a connection needs of its sockets, besides what the relay needs.

use std::io;

use crate::name::{PeerProcess, SocketName};
use crate::stream::socket::Socket;

/// What a connection needs of its sockets besides carrying bytes.
pub(crate) trait ConnectionSocket: Socket {
    /// Returns whether a connect that was begun is done.
    ///
    /// # Errors
    /// Returns why the connect failed.
    fn connected(&self) -> io::Result<bool>;
    /// Shuts down the input: nothing more is taken from the peer.
    fn shutdown_read(&self);
    /// Returns how many bytes were written that a reset would now discard before the peer has them.
    fn unacknowledged(&self) -> usize;
    /// Returns the local name that the kernel gives this socket.
    fn local_name(&self) -> Option<SocketName>;
    /// Returns the name of the Unix listener at which the socket was dialled.
    fn unix_peer_name(&self) -> Option<Vec<u8>>;
    /// Returns the process that made the other end, if it is a Unix socket.
    fn peer_process(&self) -> Option<PeerProcess>;
    /// Returns how many bytes have come that were not read yet, as far as the system tells.
    fn unread(&self) -> Option<u64>;
    /// Returns whether this accepted Unix socket was connected by this process.
    fn is_from_this_process(&self) -> bool;
    /// Returns whether another process has a copy of it, and will close it gracefully when this
    /// process has ended.
    fn is_guarded(&self) -> bool;
}
