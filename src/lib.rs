//! Hypervisor sockets of every family, and a proxy that carries them: hyperkit's Unix-socket vsock,
//! Linux' AF_VSOCK, Windows' AF_HYPERV, the socket of Firecracker and its kin, beside TCP, Unix
//! sockets and named pipes.
//!
//! # A request to a guest
//!
//! ```
//! # #[cfg(all(unix, feature = "simulate"))] {
//! use hvsock::simulate::{Service, Vm};
//! use hvsock::address::HyperkitAddress;
//! use hvsock::{Address, Proxy, ProxyConfig, Rule, Stream};
//! use std::io::{Read, Write};
//!
//! // A stand-in for a VM, with a web server on its vsock port 80. A real one has its state
//! // directory already.
//! let dir = tempfile::tempdir()?;
//! let vm = Vm::builder(dir.path()).guest(80, Service::Http).start()?;
//! // Or "hyperkit://:80/state/dir".parse()?
//! let guest: Address = HyperkitAddress::new(dir.path(), 80).into();
//!
//! // Directly:
//! let mut stream = Stream::connect(&guest)?;
//! stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
//! let mut answer = String::new();
//! stream.read_to_string(&mut answer)?;
//! assert!(answer.starts_with("HTTP/1."));
//!
//! // Or by a proxy, for programs that know TCP alone:
//! let rule = Rule::new("tcp://127.0.0.1:0".parse()?, guest);
//! let proxy = Proxy::start(ProxyConfig::new(vec![rule]))?;
//! let mut client = Stream::connect(&proxy.forwards()[0].listen)?;
//! client.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
//! answer.clear();
//! client.read_to_string(&mut answer)?;
//! assert!(answer.starts_with("HTTP/1."));
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What there is
//!
//! | | |
//! |---|---|
//! | [`Address`] | the URI of every family, on every system |
//! | [`Stream`], [`Listener`] | blocking sockets, used as std's are |
//! | [`Proxy`], [`proxy::Handle`] | rules that are carried; forwards are added and removed, connections looked at, while it runs |
//! | [`hyperkit`] | state directories of VMs, and finding them |
//! | [`hyperv`], [`services`] | Hyper-V's VMs by name, and the services that its guests may dial |
//! | [`vsock`], [`hyperkit`], [`hyperv`] | `Stream` and `Listener` of that family alone; this system's CID |
//! | [`framing`] | half-close for peers that have none |
//! | [`mio`] | the same sockets for an event loop of mio's |
//! | `tokio` (Unix; feature `tokio`) | streams and listeners for tokio; with the features `axum` and `tonic` for their servers, too |
//! | `simulate` (Unix; feature `simulate`) | a stand-in VM for tests |
//! | [`guide`] | what people who use it need to know: addresses, limits, promises, the command |
//!
//! The library installs no signal handler, prints nothing, and logs through [`tracing`] only. The
//! feature `cli`, on by default, is the command, which has the feature `simulate` with it:
//! `default-features = false` leaves both out, and the dependencies of the command.
//!
//! # Coming from ocaml-hvsock
//!
//! | there | here |
//! |---|---|
//! | `Af_common.S`: `create`, `connect ?timeout_ms`, of each family | [`Stream::connect`], [`connect_timeout`](Stream::connect_timeout); a socket is made by what is done with it |
//! | `Af_common.S`: `bind`, `accept` | [`Listener::bind`], [`accept`](Listener::accept), whose [`SocketName`] says `Unnamed` where the kernel knows none (hyperkit) |
//! | `Af_hyperv.vmid`, `string_of_vmid`, `serviceid`, `sockaddr` | [`address::Vm`], [`address::VmId`], [`address::ServiceId`], [`address::HvsockAddress`] |
//! | `Af_hyperv.vmid_of_name` | [`hyperv::find`] |
//! | `Af_hyperv.register_serviceid` | [`services::register`] |
//! | `Af_vsock.cid`, `string_of_cid`, `sockaddr`, `string_of_sockaddr` | [`address::VsockAddress`] |
//! | `Af_vsock.local` | [`vsock::local_cid`] |
//! | `Hyperkit`'s `sockaddr` | [`address::HyperkitAddress`], [`hyperkit::find`] |
//! | `Socket`: one `sockaddr` for both kernels, `Port` and `Serviceid` | [`Address`], [`ServiceId::from_port`](address::ServiceId::from_port) and [`port`](address::ServiceId::port) |
//! | `Flow`: `read`, `write`, `writev`, `shutdown_read`, `shutdown_write`, `close` | [`Stream`]: `Read`, `Write`, [`shutdown`](Stream::shutdown), [`finish`](Stream::finish), drop |
//! | `Flow_shutdown` | [`framing::Framed`] |

pub mod address;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod app;
mod dial;
mod engine;
pub mod error;
pub mod family;
mod file;
pub mod framing;
pub mod guide;
pub mod hyperkit;
pub mod hyperv;
#[cfg(unix)]
pub mod keeper;
mod listener;
mod lock;
pub mod mio;
mod name;
#[cfg(feature = "cli")]
mod nearest;
pub mod proxy;
pub mod services;
#[cfg(all(unix, any(feature = "simulate", test)))]
pub mod simulate;
mod stream;
mod sys;
#[cfg(any(feature = "cli", feature = "tokio", windows, test))]
mod thread;
mod time;
#[cfg(all(unix, feature = "tokio"))]
pub mod tokio;
pub mod vsock;

pub use address::{Address, AddressError};
pub use error::{Error, Operation, Result};
pub use listener::{DEFAULT_MODE, Listener};
pub use name::{HvsockName, PeerProcess, SocketName, VsockName};
pub use proxy::{Proxy, ProxyConfig, Rule};
pub use stream::Stream;
