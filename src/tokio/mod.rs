//! The sockets for tokio: with the feature `tokio`, on Unix.
//!
//! They are used as `tokio::net::TcpStream` and `TcpListener` are. hyper takes them in
//! `hyper_util::rt::TokioIo`. A guest may half-close behind its request: a hyper server wants
//! `.half_close(true)`, or it gives such a guest no answer.
//!
//! # A request
//!
//! ```
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # #[cfg(feature = "simulate")] {
//! use hvsock::address::HyperkitAddress;
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//! # use hvsock::simulate::{Service, Vm};
//! # let dir = tempfile::tempdir()?;
//! # let vm = Vm::builder(dir.path()).guest(80, Service::Http).start()?;
//! # let state_dir = dir.path();
//!
//! let guest = HyperkitAddress::new(state_dir, 80).into();
//! let mut stream = hvsock::tokio::Stream::connect(&guest).await?;
//! stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
//! let mut answer = Vec::new();
//! stream.read_to_end(&mut answer).await?;
//! assert!(answer.starts_with(b"HTTP/1."));
//! # }
//! # Ok(())
//! # }
//! ```
//!
//! # Serving
//!
//! With the feature `axum` a [`Listener`] is what `axum::serve` takes, and [`SocketName`] what its
//! `ConnectInfo` extracts. With the feature `tonic` a tonic server takes streams
//! (`serve_with_incoming`), and a request's extensions have the client's [`SocketName`].
//! Neither takes a half-close for less than the end of the connection.
//!
//! ```no_run
//! # #[cfg(feature = "axum")]
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! use axum::Router;
//! use axum::routing::get;
//! use hvsock::tokio::Listener;
//!
//! // Port 5000 of the host, as the guest dials it.
//! let listener = Listener::bind(&"hyperkit://:5000/path/to/state".parse()?)?;
//! let service = Router::new().route("/", get(|| async { "hello, guest" }));
//! axum::serve(listener, service).await?;
//! # Ok(())
//! # }
//! ```
//!
//! [`SocketName`]: crate::SocketName

#[cfg(feature = "axum")]
mod axum;
mod dial;
mod listener;
mod split;
mod stream;
#[cfg(feature = "tonic")]
mod tonic;

pub use listener::Listener;
pub use split::{OwnedReadHalf, OwnedWriteHalf, ReuniteError};
pub use stream::Stream;
