//! What axum asks of a listener: with the feature `axum`.

use std::io;
use std::time::Duration;

use ::axum::extract::connect_info::Connected;
use ::axum::serve::IncomingStream;
use ::tokio::time::sleep;

use super::listener::Listener;
use super::stream::Stream;
use crate::name::SocketName;

/// The pause after an accept that failed. Descriptors that have run out may be there again then.
const PAUSE: Duration = Duration::from_secs(1);

/// Serves as `axum::serve` has it, which never ends by an accept that fails: that is logged and
/// tried again after a second.
impl ::axum::serve::Listener for Listener {
    type Io = Stream;
    type Addr = SocketName;

    async fn accept(&mut self) -> (Stream, SocketName) {
        loop {
            match Listener::accept(self).await {
                Ok(accepted) => return accepted,
                Err(e) => {
                    tracing::error!("{e}");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketName> {
        Listener::local_addr(self)
    }
}

/// The name of the client, for `into_make_service_with_connect_info::<SocketName>()`.
impl Connected<IncomingStream<'_, Listener>> for SocketName {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> SocketName {
        *stream.remote_addr()
    }
}
