//! An address of the control interface, and the socket that listens there.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;

use crate::address::Address;
use crate::error::{Error, Result};
use crate::listener::nonblocking::Listener;
use crate::listener::{self, DEFAULT_MODE};
use crate::lock::{lock, recover};
use crate::proxy::Source;

use super::model::Unserved;
use super::place;

/// What a socket serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ServedInterface {
    /// Everything, to this user.
    Control,
    /// Forwards and connections, to guests.
    GuestControl,
    /// The metrics only, to all who can connect.
    Metrics,
}

impl ServedInterface {
    /// Returns its key in the file.
    pub(super) fn name(self) -> &'static str {
        match self {
            ServedInterface::Control => "control",
            ServedInterface::GuestControl => "guest-control",
            ServedInterface::Metrics => "metrics",
        }
    }

    /// Returns what an address is for, to be followed by it.
    pub(super) fn phrase(self) -> &'static str {
        match self {
            ServedInterface::Control => "controlled at",
            ServedInterface::GuestControl => "controlled by guests at",
            ServedInterface::Metrics => "metrics at",
        }
    }
}

/// Returns why nothing else can listen on an address: this process' own `place` is there. `phrase`
/// says what that is for.
pub(crate) fn describe_own_place(listen: &Address, phrase: &str, place: &Address) -> String {
    format!("cannot listen on {listen}: this hvsock itself listens there ({phrase} {place})")
}

/// Whether the user has asked for a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Demand {
    Asked,
    /// No, but it is useful to have one.
    OwnAccord,
}

/// An address to serve at, and its state.
#[derive(Debug)]
pub(super) struct ServiceEndpoint {
    pub(super) service: ServedInterface,
    pub(super) demand: Demand,
    /// The address, with the chosen port if it was asked for as 0.
    pub(super) address: Address,
    /// The address as it was asked for.
    pub(super) asked: Address,
    /// Why it isn't served, if so.
    trouble: Mutex<Option<Unserved>>,
    /// The socket that listens there, if any.
    listener: Mutex<Weak<Listener>>,
    given_away: Notify,
    /// Notified, with the lock of `listener`, once the socket is closed after it was given away.
    closed: Condvar,
}

impl ServiceEndpoint {
    fn new(
        service: ServedInterface,
        demand: Demand,
        address: Address,
        asked: &Address,
    ) -> ServiceEndpoint {
        ServiceEndpoint {
            service,
            demand,
            address,
            asked: asked.clone(),
            trouble: Mutex::default(),
            listener: Mutex::default(),
            given_away: Notify::new(),
            closed: Condvar::new(),
        }
    }

    /// Returns the socket that listens there, if any.
    pub(super) fn listener(&self) -> Option<Arc<Listener>> {
        let listener = self.listener.lock();
        recover(listener).upgrade()
    }

    /// Notes the socket that listens there now.
    pub(super) fn note_listener(&self, listener: &Arc<Listener>) {
        let noted = self.listener.lock();
        *recover(noted) = Arc::downgrade(listener);
    }

    /// Leaves the socket and its file to another process, which already has it: this process
    /// accepts no more clients.
    pub(super) fn give_away(&self) {
        if let Some(file) = self.listener().and_then(|listener| listener.file()) {
            file.leave();
        }
        self.given_away.notify_one();
    }

    /// Waits at most a second until the socket is closed here.
    pub(super) fn wait_until_closed(&self) {
        const PATIENCE: Duration = Duration::from_secs(1);
        let listener = self.listener.lock();
        let listener = recover(listener);
        let is_open = |it: &mut Weak<Listener>| it.strong_count() > 0;
        // If it hangs, it is closed later.
        drop(self.closed.wait_timeout_while(listener, PATIENCE, is_open));
    }

    /// Notes that the socket is closed in this process.
    pub(super) fn mark_closed(&self) {
        let _listener = self.listener.lock();
        self.closed.notify_all();
    }

    /// Returns once the socket was given to another process.
    pub(super) async fn wait_until_given_away(&self) {
        self.given_away.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Unserved>> {
        lock(&self.trouble)
    }

    /// Returns why it isn't served, if so.
    pub(super) fn trouble(&self) -> Option<Unserved> {
        self.lock().clone()
    }

    /// Notes why it isn't served. Returns whether the reason is new.
    pub(super) fn mark_unserved(&self, why: String) -> bool {
        let mut trouble = self.lock();
        let before = trouble.take();
        let is_new = before.as_ref().is_none_or(|before| before.why != why);
        *trouble = Some(Unserved {
            service: self.service.name().to_owned(),
            address: self.address.to_string(),
            why,
            since: before.map_or_else(SystemTime::now, |before| before.since),
        });
        is_new
    }

    /// Notes that it is served.
    pub(super) fn mark_served(&self) {
        *self.lock() = None;
    }

    /// Binds the socket. May block.
    pub(super) fn bind(&self) -> Result<Listener> {
        bind(self.service, &self.address)
    }
}

fn bind(service: ServedInterface, address: &Address) -> Result<Listener> {
    if let (ServedInterface::Control, Some(path)) = (service, address.unix_path()) {
        place::prepare(path)?;
    }
    Listener::bind(address, DEFAULT_MODE.into())
}

/// An endpoint, and its listening socket if it could be bound.
#[derive(Debug)]
pub(super) struct BoundEndpoint {
    pub(super) endpoint: Arc<ServiceEndpoint>,
    pub(super) listener: Option<Arc<Listener>>,
    /// The sources from which clients are accepted; if it is empty, all.
    pub(super) from: Vec<Source>,
}

impl BoundEndpoint {
    /// Limits it to clients from these sources, if there are any.
    pub(super) fn limited_to(self, from: &[Source]) -> BoundEndpoint {
        BoundEndpoint {
            from: from.to_vec(),
            ..self
        }
    }

    /// Listens at `address`. Clients that connect wait until it is served.
    ///
    /// # Errors
    /// Returns those of [`Listener::bind`], and an error if others could get at the control socket.
    pub(super) fn open(
        service: ServedInterface,
        address: &Address,
        demand: Demand,
    ) -> Result<BoundEndpoint> {
        let listener = bind(service, address)?;
        let bound = listener.bound(address);
        Ok(BoundEndpoint::listening(
            ServiceEndpoint::new(service, demand, bound, address),
            listener,
        ))
    }

    /// Makes an endpoint from a socket of the predecessor.
    pub(super) fn from_predecessor(
        service: ServedInterface,
        asked: &Address,
        socket: listener::Listener,
    ) -> BoundEndpoint {
        let bound = socket.address().clone();
        let endpoint = ServiceEndpoint::new(service, Demand::Asked, bound, asked);
        BoundEndpoint::listening(endpoint, socket.into_nonblocking())
    }

    fn listening(endpoint: ServiceEndpoint, listener: Listener) -> BoundEndpoint {
        let listener = Arc::new(listener);
        endpoint.note_listener(&listener);
        BoundEndpoint {
            endpoint: Arc::new(endpoint),
            listener: Some(listener),
            from: Vec::new(),
        }
    }

    /// Makes an endpoint that can't be bound yet, with the reason.
    pub(super) fn without_listener(
        service: ServedInterface,
        address: &Address,
        error: &Error,
    ) -> BoundEndpoint {
        let endpoint = ServiceEndpoint::new(service, Demand::Asked, address.clone(), address);
        endpoint.mark_unserved(error.to_string());
        BoundEndpoint {
            endpoint: Arc::new(endpoint),
            listener: None,
            from: Vec::new(),
        }
    }
}
