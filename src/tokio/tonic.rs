//! What tonic asks of a server's streams: with the feature `tonic`.

use ::tonic::transport::server::Connected;

use super::stream::Stream;
use crate::name::SocketName;

/// Gives a request's extensions the name of the client; `Unnamed` also if it has gone already.
impl Connected for Stream {
    type ConnectInfo = SocketName;

    fn connect_info(&self) -> SocketName {
        self.peer_addr().unwrap_or(SocketName::Unnamed)
    }
}
