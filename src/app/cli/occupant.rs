//! Finds the hvsock that listens where another one can't.

use std::cell::OnceCell;

use crate::address::Address;
use crate::app::answering;
use crate::error::{Error, Operation};

/// The addresses at which other hvsocks of this user listen. The hvsocks are asked at first use.
#[derive(Debug, Default)]
pub(super) struct Occupants(OnceCell<Vec<Occupant>>);

#[derive(Debug)]
struct Occupant {
    process: u32,
    /// The forward's name, or the address at which it listens.
    forward: String,
    listen: Address,
}

impl Occupants {
    /// Names in the remedy of an error the hvsock that listens on the address in use.
    pub(super) fn name_in(&self, error: Error) -> Error {
        let is_taken =
            error.operation() == Operation::Listen && error.kind() == std::io::ErrorKind::AddrInUse;
        let address = error.subject().parse().ok().filter(|_| is_taken);
        match address.and_then(|address| self.remedy(&address)) {
            Some(remedy) => error.with_remedy(remedy),
            None => error,
        }
    }

    /// Returns which hvsock listens on an address, and what can be done. `None` if none does.
    pub(super) fn remedy(&self, address: &Address) -> Option<String> {
        let mut others = self.0.get_or_init(ask).iter();
        let Occupant {
            process, forward, ..
        } = others.find(|it| it.listen.collides(address))?;
        Some(format!(
            "hvsock process {process} listens there (forward {forward}): stop it (`hvsock stop --pid {process}`), or choose another path or port"
        ))
    }
}

fn ask() -> Vec<Occupant> {
    let mut occupants = Vec::new();
    for hvsock in answering::find().unwrap_or_default() {
        let process = hvsock.process.id;
        let forwards = hvsock.status().map(|it| it.forwards).unwrap_or_default();
        // A forward without an id is wanted there, but not carried.
        let carried = forwards.iter().filter(|it| it.id.is_some());
        occupants.extend(carried.filter_map(|it| {
            Some(Occupant {
                process,
                forward: it.name_or_address().to_owned(),
                listen: it.listen.parse().ok()?,
            })
        }));
    }
    occupants
}
