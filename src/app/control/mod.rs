//! The control socket: shows and changes a running proxy, by HTTP with JSON on a Unix socket.
//!
//! ```sh
//! curl --unix-socket "$XDG_RUNTIME_DIR/hvsock/control.sock" http://hvsock/v1/forwards
//! curl --unix-socket … http://hvsock/v1/forwards \
//!     -d '{"name": "web", "listen": "tcp://127.0.0.1:0", "connect": "unix:///run/web.sock"}'
//! curl --unix-socket … http://hvsock/v1/forwards/web -X DELETE
//! ```
//!
//! Adding a forward without a name on port 0 makes a new one each time. Any other forward that is
//! added twice exists once.
//!
//! | call | what it does | answers |
//! |---|---|---|
//! | `GET /v1/status` | returns the whole status: version, uptime, forwards | [`Status`] |
//! | `GET /v1/forwards` | returns the forwards | an array of [`ForwardInfo`] |
//! | `POST /v1/forwards` | adds a forward; the body is a rule, of which only the addresses are required; with ranges of ports it adds one for each port, or none | 201 and the forward, with the chosen port if it was 0; 200 and the existing forward, if its rule is the same; 409 if its rule is different; for a range an array |
//! | `GET /v1/forwards/NAME` | returns a forward, by its name, listen address (percent-encoded) or id | the forward |
//! | `DELETE /v1/forwards/NAME?grace=S` | removes a forward: it takes no more clients, and its connections have S seconds to finish | the removed forward; for a range an array |
//! | `GET /v1/events` | returns events from now on, until the proxy has ended | lines of JSON: see [`events`] |
//! | `GET /v1/connections` | returns the live connections | an array of [`ConnectionInfo`] |
//! | `GET /v1/connections/ended` | returns the last 100 ended connections, refused ones and those of predecessors included, the oldest first | an array of [`EndedInfo`] |
//! | `DELETE /v1/connections/ID` | closes a connection, a VM's side of it gracefully | the closed connection |
//! | `POST /v1/reload` | reads the file again | what has changed; 409 if there is no file |
//! | `POST /v1/take-over` | hands all listening sockets over to another process, and ends as `stop` does: see [`handover`] | 202; 409 if there is no file, or the other process has another version |
//! | `POST /v1/upgrade` | starts the program that is now at the path of this one, and hands over to it | 200, the new process' id and the forwards that it can't have; 409 if there is no file; 500 if it doesn't take over |
//! | `POST /v1/stop?grace=S` | ends the proxy, as SIGTERM does | 202 |
//! | `GET /metrics` | returns the counters | Prometheus' text format |
//!
//! The default of S is that of `--grace`. An error is `{"error": …, "remedy": …}` (the remedy where
//! there is one) with status 400 (invalid request), 403 (not allowed), 404, 405, 408 (the request
//! didn't arrive), 409 (conflict with something that exists), 413 and 431 (too long), 501, 503 (the
//! proxy is stopping, or another change takes long), 500. A connection has one request.
//!
//! # Access
//!
//! This user's processes, and no others, not even root's: the permissions of the socket and its
//! directory ensure it, and the kernel reports who has connected. Least of all a guest: no forward
//! may lead there ([`ProxyConfig::forbidden`](crate::ProxyConfig::forbidden)). If one does all the
//! same, because a symbolic link was changed later, the client is this process itself, and is
//! refused for that. Another proxy of the same user can't be told from the user.
//!
//! Guests are told apart by their CIDs, if control by guests is on and any CID is named.
//!
//! All who can connect may read the metrics on a TCP or vsock port. They have only the first guard:
//! no forward may lead there.

mod added;
mod api;
mod client;
mod clients;
mod endpoint;
mod events;
mod handover;
mod http;
mod inherited;
mod lookup;
mod metrics;
mod model;
mod place;
mod problem;
mod server;

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

use crate::address::Address;
use crate::app::guest_control::GuestControl;
use crate::error::{Error, Result};
use crate::proxy::{Handle, Observer};

pub(crate) use api::{Actions, Started, Succession};
pub(crate) use client::{Unanswered, ask, ask_status, encode_segment, follow_events, get, read};
pub(crate) use endpoint::describe_own_place;
pub(crate) use handover::FailedForwards;
pub(crate) use handover::take::Predecessor;
#[cfg(any(test, target_os = "linux"))]
pub(crate) use model::ProcessInfo;
pub(crate) use model::{
    ConnectionInfo, EndedInfo, ForwardInfo, Status, VmInfo, age, refusals_by_reason,
};
pub(crate) use place::{default_path, find_own_path, find_path, paths_of};
pub(crate) use problem::ApiProblem;

use added::AdditionRecords;
use api::Api;
use clients::most_clients;
use endpoint::{BoundEndpoint, Demand, ServedInterface};
use events::Events;
use handover::Use;
pub(crate) use inherited::Inherited;
use server::Server;

/// The place of the control socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ControlPlace {
    /// There is no control socket.
    #[default]
    Nowhere,
    At(PathBuf),
    /// In the user's directory, under the process id. The user has not asked for it: it serves a
    /// few clients, is not announced, and is left out, with a log line, if it can't be bound.
    Own,
}

/// The wanted sockets of the control interface.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    pub(crate) control: ControlPlace,
    /// The address for guests, and the guests that may use it.
    pub(crate) guest_control: Option<GuestControl>,
    /// The address of the metrics, for all who can connect.
    pub(crate) metrics: Option<Address>,
    pub(crate) unavailable: Unavailable,
}

/// What happens to a socket that can't be bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Unavailable {
    #[default]
    Fails,
    /// It is retried, and shown in the status meanwhile. A control socket that another hvsock has
    /// is still an error.
    IsTriedAgain,
}

/// The bound sockets, which don't serve yet: clients that connect wait. Dropping them closes them.
#[derive(Debug)]
pub(crate) struct Bound {
    sockets: Vec<BoundEndpoint>,
    /// Why there is no control socket of the process' [own](ControlPlace::Own).
    missing: Option<Error>,
    events: Arc<Events>,
    inherited: Inherited,
    added: AdditionRecords,
}

/// Takes the sockets that the predecessor has, and binds the others.
///
/// # Errors
/// Returns those of [`bind`].
pub(crate) fn take(options: &Options, from: &mut Predecessor) -> Result<Bound> {
    open(options, |service, address| {
        let used_for = match service {
            ServedInterface::Control => Use::Control,
            ServedInterface::GuestControl => Use::GuestControl,
            ServedInterface::Metrics => Use::Metrics,
        };
        let socket = from.take_endpoint(used_for, address)?;
        Some(BoundEndpoint::from_predecessor(service, address, socket))
    })
}

/// Binds the sockets.
///
/// # Errors
/// Returns `AddrInUse` if another process has the control socket or the metrics' port;
/// `PermissionDenied` if others could get at the control socket; otherwise the system's error. See
/// [`Unavailable`] for exceptions.
pub(crate) fn bind(options: &Options) -> Result<Bound> {
    open(options, |_, _| None)
}

fn open(
    options: &Options,
    mut take: impl FnMut(ServedInterface, &Address) -> Option<BoundEndpoint>,
) -> Result<Bound> {
    let (mut sockets, mut missing) = (Vec::new(), None);
    let mut open = |service, address: &Address| match take(service, address) {
        Some(bound) => Ok(bound),
        None => BoundEndpoint::open(service, address, Demand::Asked),
    };
    if options.control == ControlPlace::Own {
        place::remove_stale();
        let address = place::address(&place::own_path(std::process::id()));
        match BoundEndpoint::open(ServedInterface::Control, &address, Demand::OwnAccord) {
            Ok(bound) => sockets.push(bound),
            Err(e) => {
                let e = match e.remedy() {
                    Some(_) => e,
                    None => e.with_remedy("choose another place with --control PATH"),
                };
                missing = Some(e);
            }
        }
    }
    if let ControlPlace::At(path) = &options.control {
        let address = place::address(path);
        sockets.push(match open(ServedInterface::Control, &address) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => {
                return Err(e.with_remedy(
                    "another hvsock runs (`hvsock status` shows it): give this one --control PATH with a path of its own",
                ));
            }
            Err(e) if options.unavailable == Unavailable::IsTriedAgain => {
                BoundEndpoint::without_listener(ServedInterface::Control, &address, &e)
            }
            opened => opened?,
        });
    }
    let of_guests = options.guest_control.as_ref();
    let metrics = options.metrics.as_ref();
    let others = [
        of_guests.map(|it| (ServedInterface::GuestControl, &it.address, &it.from[..])),
        metrics.map(|address| (ServedInterface::Metrics, address, &[][..])),
    ];
    for (service, address, from) in others.into_iter().flatten() {
        // No forward may lead there, which can't be ensured before the kernel has chosen the port.
        let waits =
            options.unavailable == Unavailable::IsTriedAgain && !address.leaves_port_to_kernel();
        let bound = match open(service, address) {
            Err(e) if waits => BoundEndpoint::without_listener(service, address, &e),
            opened => opened?,
        };
        sockets.push(bound.limited_to(from));
    }
    Ok(Bound {
        sockets,
        missing,
        events: Arc::default(),
        inherited: Inherited::default(),
        added: AdditionRecords::default(),
    })
}

impl Bound {
    /// Returns whether there are no sockets.
    pub(crate) fn is_empty(&self) -> bool {
        self.sockets.is_empty()
    }

    /// Returns a warning if the control socket can't be had and the process goes on without it.
    pub(crate) fn warning(&self) -> Option<String> {
        let e = self.missing.as_ref()?;
        Some(format!(
            "going on without a control socket: {e} (--control=off asks for none)"
        ))
    }

    /// Returns how many descriptors the sockets and their clients need.
    pub(crate) fn descriptors(&self) -> usize {
        let clients = self
            .sockets
            .iter()
            .map(|it| most_clients(it.endpoint.demand));
        server::descriptors(clients)
    }

    /// Returns the observer for the proxy, which feeds the readers of events.
    pub(crate) fn observer(&self) -> Observer {
        self.events.observer()
    }

    /// Returns the addresses of all sockets, bound or not. No forward may lead there.
    pub(crate) fn addresses(&self) -> Vec<Address> {
        self.sockets
            .iter()
            .map(|it| it.endpoint.address.clone())
            .collect()
    }

    /// Returns the sockets that were asked for: kind, address, and why it can't serve, if so.
    pub(crate) fn endpoint_states(&self) -> Vec<(&'static str, Address, Option<String>)> {
        let why = |it: &BoundEndpoint| it.endpoint.trouble().map(|trouble| trouble.why);
        let is_asked = |it: &&BoundEndpoint| it.endpoint.demand == Demand::Asked;
        let sockets = self.sockets.iter().filter(is_asked);
        sockets
            .map(|it| {
                let what = it.endpoint.service.phrase();
                (what, it.endpoint.address.clone(), why(it))
            })
            .collect()
    }

    /// Begins to serve, until the [`Control`] is dropped.
    ///
    /// # Errors
    /// Returns an error if there can be no thread.
    pub(crate) fn serve(self, handle: Handle, actions: Actions) -> Result<Control> {
        let endpoints = self.sockets.iter();
        let endpoints = endpoints.map(|it| Arc::clone(&it.endpoint)).collect();
        let api = Api::new(handle, actions, endpoints, self.events);
        let api = Arc::new(api.with_inherited(self.inherited, self.added));
        let server = Server::start(self.sockets, Arc::clone(&api))?;
        Ok(Control {
            api,
            _server: server,
        })
    }

    /// Records how forwards were added in the predecessor.
    pub(crate) fn note_added(&self, from: &Predecessor, handle: &Handle) {
        self.added
            .note_named(from.ways_of_adding(), &handle.forwards());
    }

    /// Returns the record of connections that ended in predecessors.
    pub(crate) fn inherited(&self) -> Inherited {
        self.inherited.clone()
    }
}

/// The server of the control interface. Dropping it ends it, and removes its socket.
#[derive(Debug)]
pub(crate) struct Control {
    api: Arc<Api>,
    _server: Server,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.api.tell_successor_the_rest();
    }
}
