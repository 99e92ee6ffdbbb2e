//! Where a service of the control interface is, and the socket that listens there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::address::Address;
use crate::error::{Error, Result};
use crate::listener::DEFAULT_MODE;
use crate::listener::nonblocking::Listener;

use super::model::Unserved;
use super::place;

/// What is served on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    /// Everything, to this user.
    Control,
    /// The metrics alone, to whoever can connect.
    Metrics,
}

/// Where a service is to be, and how it is there.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) service: Service,
    /// With the port that was chosen, if one was to be.
    pub(super) address: Address,
    /// Why nobody is served there, if so.
    trouble: Mutex<Option<Unserved>>,
}

impl Endpoint {
    fn lock(&self) -> MutexGuard<'_, Option<Unserved>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns why nobody is served there, if so.
    pub(super) fn trouble(&self) -> Option<Unserved> {
        self.lock().clone()
    }

    /// Notes why nobody is served, and returns whether that is news.
    pub(super) fn mark_unserved(&self, why: String) -> bool {
        let mut trouble = self.lock();
        let before = trouble.take();
        let is_new = before.as_ref().is_none_or(|before| before.why != why);
        *trouble = Some(Unserved {
            service: match self.service {
                Service::Control => "control".to_owned(),
                Service::Metrics => "metrics".to_owned(),
            },
            address: self.address.to_string(),
            why,
            since: before.map_or_else(SystemTime::now, |before| before.since),
        });
        is_new
    }

    /// Notes that clients are served.
    pub(super) fn mark_served(&self) {
        *self.lock() = None;
    }

    /// Listens there. It may block.
    pub(super) fn bind(&self) -> Result<Listener> {
        bind(self.service, &self.address)
    }
}

fn bind(service: Service, address: &Address) -> Result<Listener> {
    if let (Service::Control, Some(path)) = (service, address.unix_path()) {
        place::prepare(path)?;
    }
    Listener::bind(address, DEFAULT_MODE.into())
}

/// An endpoint, and the socket that listens there, if it could be bound.
#[derive(Debug)]
pub(super) struct Door {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) listener: Option<Arc<Listener>>,
}

impl Door {
    /// Listens at `address`: nobody is served yet, who connects waits.
    ///
    /// # Errors
    /// As those of [`Listener::bind`], and that others could get at the control socket.
    pub(super) fn open(service: Service, address: &Address) -> Result<Door> {
        let listener = bind(service, address)?;
        let address = listener.bound(address);
        Ok(Door {
            endpoint: Arc::new(Endpoint {
                service,
                address,
                trouble: Mutex::default(),
            }),
            listener: Some(Arc::new(listener)),
        })
    }

    /// One that can't be opened yet, for that reason.
    pub(super) fn closed(service: Service, address: &Address, error: &Error) -> Door {
        let endpoint = Endpoint {
            service,
            address: address.clone(),
            trouble: Mutex::default(),
        };
        endpoint.mark_unserved(error.to_string());
        Door {
            endpoint: Arc::new(endpoint),
            listener: None,
        }
    }
}
