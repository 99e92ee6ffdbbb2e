//! The predecessor's part of a hand-over: gives its sockets away.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use super::{
    Done, EndedLine, FailedForwards, FileLine, Head, Mine, Slots, SocketLine, TakenSockets,
};
use super::{Use, Wire, Yours};
use super::{address_of, guest_port, take_from_keepers};
use crate::address::Address;
use crate::app::control::added::AdditionRecords;
use crate::app::control::endpoint::{ServedInterface, ServiceEndpoint};
use crate::app::control::model::{EndedInfo, RuleBody};
use crate::engine::admission::sharing::Remainder;
use crate::listener::nonblocking::Listener;
use crate::proxy::{ForwardId, Handle, Offered};
use crate::sys::{self, Identity};

/// A successor that waits for the sockets.
#[derive(Debug)]
pub(in crate::app::control) struct Successor(Wire);

impl Successor {
    /// Connects to the successor's socket.
    ///
    /// # Errors
    /// Returns `PermissionDenied` if it is a process of another user, or the system's error.
    pub(in crate::app::control) fn connect(address: &str) -> io::Result<Successor> {
        let path = super::path_of(address)?;
        let stream = sys::with_short_path(&path, |short| UnixStream::connect(short))?;
        Wire::new(stream).map(Successor)
    }

    /// Gives the successor all sockets that it takes. `listed` are the forwards of the
    /// configuration; `added` knows how the others were added. Once the successor is ready, `agree`
    /// returns whether the hand-over is still wanted.
    ///
    /// Returns the connection, by which the successor is told which slots this process still has.
    ///
    /// # Errors
    /// Returns why nothing has changed: the successor has ended, or takes too long.
    pub(in crate::app::control) fn give(
        mut self,
        handle: &Handle,
        endpoints: &[Arc<ServiceEndpoint>],
        listed: &HashSet<ForwardId>,
        added: &AdditionRecords,
        agree: impl FnOnce() -> bool,
    ) -> io::Result<Finishing> {
        let wire = &mut self.0;
        let served: Vec<_> = endpoints
            .iter()
            .filter_map(|it| Some((it, it.listener()?)))
            .collect();
        let of_endpoints: Vec<_> = served
            .iter()
            .flat_map(|pair| pair.1.sockets().into_iter().map(move |it| (pair, it)))
            .collect();
        let mut taken = Vec::new();
        let mut guest_ports = Vec::new();
        let mut hears_of_ended = false;
        let mut failed = FailedForwards::new();
        let handed = handle.hand_over(|offered| {
            let of_forwards: usize = offered.iter().map(|it| it.sockets.len()).sum();
            wire.send(&Head {
                sockets: of_endpoints.len() + of_forwards,
            })?;
            for ((endpoint, listener), socket) in &of_endpoints {
                wire.send_with(&endpoint_line(endpoint, listener), *socket)?;
            }
            let mut forwards = Vec::new();
            for mut it in offered {
                let sockets = std::mem::take(&mut it.sockets);
                let mut line = forward_line(&it, listed, added);
                let id = it.forward.map(|(id, _)| id);
                guest_ports.extend(guest_port(&it.bound));
                // Dropping the descriptors closes them: there may be many.
                for socket in sockets {
                    wire.send_with(&line, socket.as_fd())?;
                    forwards.push(id);
                    // The sockets are all of one rule, which is sent once.
                    line.added = None;
                }
            }
            taken = wire.next::<TakenSockets>()?.taken;
            if !agree() {
                return Err(io::Error::other("it was given up"));
            }
            let slots = Slots::reserve_in_proxy(handle, Remainder::HalfOfFree);
            wire.send(&Yours { yours: true, slots })?;
            match wire.next::<Mine>() {
                Ok(mine) => {
                    hears_of_ended = mine.hears_of_ended;
                    failed = mine.failed;
                }
                // A successor that hangs has the sockets already.
                Err(e) if e.kind() == io::ErrorKind::TimedOut => {}
                Err(e) => return Err(e),
            }
            let index = |number: &usize| number.checked_sub(of_endpoints.len());
            let id = |index: usize| forwards.get(index).copied().flatten();
            Ok(taken.iter().filter_map(index).filter_map(id).collect())
        });
        if let Err(e) = handed {
            handle.shared_slots().take_whole();
            take_from_keepers(&guest_ports);
            return Err(e);
        }
        let given = of_endpoints.into_iter().enumerate();
        let given: Vec<_> = given
            .filter(|(number, _)| taken.contains(number))
            .map(|(_, ((endpoint, _), _))| *endpoint)
            .collect();
        drop(served);
        for endpoint in &given {
            endpoint.give_away();
        }
        // Clients that connect from now on are the successor's.
        for endpoint in given {
            endpoint.wait_until_closed();
        }
        let slots = Slots::reserve_in_proxy(handle, Remainder::Used);
        let done = Done {
            done: true,
            slots: slots.clone(),
        };
        // If this fails, the successor goes on a little later by itself.
        let _ = wire.send(&done);
        Ok(Finishing {
            wire: self.0,
            told: slots,
            failed,
            ended: hears_of_ended.then(HashSet::new),
        })
    }
}

/// A process that has handed over, while its connections finish.
#[derive(Debug)]
pub(in crate::app::control) struct Finishing {
    wire: Wire,
    told: Slots,
    /// The forwards that the successor can't have.
    pub(in crate::app::control) failed: FailedForwards,
    /// The ended connections that the successor knows, by process and id; `None` if it is of an
    /// earlier version, which takes none.
    ended: Option<HashSet<(Option<u32>, u64)>>,
}

impl Finishing {
    /// Tells the successor which slots this process still has, if there are fewer now, and which
    /// connections have `ended`, if it doesn't know them.
    ///
    /// # Errors
    /// Returns an error if the successor has ended or reads nothing.
    pub(in crate::app::control) fn send_progress(
        &mut self,
        handle: &Handle,
        ended: Vec<EndedInfo>,
    ) -> io::Result<()> {
        let slots = Slots::reserve_in_proxy(handle, Remainder::Used);
        if slots != self.told {
            self.wire.send(&slots)?;
            self.told = slots;
        }
        let Some(known) = &mut self.ended else {
            return Ok(());
        };
        let name = |it: &EndedInfo| (it.carried_by, it.id);
        let now: HashSet<_> = ended.iter().map(name).collect();
        for ended in ended {
            if !known.contains(&name(&ended)) {
                self.wire.send(&EndedLine { ended })?;
            }
        }
        // An ended connection that is forgotten doesn't come again.
        *known = now;
        Ok(())
    }
}

fn endpoint_line(endpoint: &ServiceEndpoint, listener: &Listener) -> SocketLine {
    let identity = listener.file().map(|file| file.identity());
    SocketLine {
        used_for: match endpoint.service {
            ServedInterface::Control => Use::Control,
            ServedInterface::GuestControl => Use::GuestControl,
            ServedInterface::Metrics => Use::Metrics,
        },
        name: None,
        asked: Some(endpoint.asked.to_string()),
        bound: endpoint.address.to_string(),
        file: file_line(&endpoint.address, identity),
        foreign: false,
        added: None,
        added_as: None,
    }
}

fn forward_line(
    offered: &Offered,
    listed: &HashSet<ForwardId>,
    all_added: &AdditionRecords,
) -> SocketLine {
    let forward = offered.forward.as_ref();
    let added_as = forward.and_then(|(id, _)| all_added.of(*id));
    let added = offered
        .forward
        .as_ref()
        .filter(|(id, _)| !listed.contains(id));
    let added = added.and_then(|(_, rule)| serde_json::to_value(RuleBody::from(rule)).ok());
    let (name, asked) = offered.wish.clone().unzip();
    SocketLine {
        used_for: Use::Forward,
        name: name.flatten(),
        asked: asked.map(|it| it.to_string()),
        bound: offered.bound.to_string(),
        file: file_line(&offered.bound, offered.file),
        foreign: offered.is_foreign,
        added,
        added_as,
    }
}

/// Describes the file of a bound socket that has that identity.
fn file_line(bound: &Address, identity: Option<Identity>) -> Option<FileLine> {
    let (path, identity) = (bound.listen_path()?, identity?);
    // The successor may have another working directory.
    let path = std::path::absolute(&path).unwrap_or_else(|_| Path::new(&*path).to_owned());
    Some(FileLine {
        at: address_of(&path),
        identity: identity.to_text(),
    })
}
