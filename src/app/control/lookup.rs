//! Finds forwards by the ways to name them, each with one look into a map.

use std::collections::HashMap;

use super::problem::ApiProblem;
use crate::address::Address;
use crate::app::values::local_address;
use crate::proxy::{ForwardId, ForwardStatus};

/// The forwards of a proxy, by all that names them. Of several with the same name the first counts.
#[derive(Debug)]
pub(super) struct ForwardLookup<'a> {
    forwards: &'a [ForwardStatus],
    names: HashMap<&'a str, usize>,
    /// By the addresses on which they listen.
    listens: HashMap<&'a Address, usize>,
    /// By the addresses that were asked for, whose port may be 0.
    asked: HashMap<&'a Address, usize>,
    ids: HashMap<u64, usize>,
    /// By the TCP ports on which they listen.
    ports: HashMap<u64, OnPort>,
}

/// The forwards that listen on a TCP port.
#[derive(Clone, Copy, Debug)]
enum OnPort {
    One(usize),
    Several,
}

impl<'a> ForwardLookup<'a> {
    pub(super) fn new(forwards: &'a [ForwardStatus]) -> ForwardLookup<'a> {
        let mut lookup = ForwardLookup {
            forwards,
            names: HashMap::new(),
            listens: HashMap::new(),
            asked: HashMap::new(),
            ids: HashMap::new(),
            ports: HashMap::new(),
        };
        for (index, it) in forwards.iter().enumerate() {
            if let Some(name) = &it.rule.name {
                lookup.names.entry(name).or_insert(index);
            }
            lookup.listens.entry(&it.listen).or_insert(index);
            lookup.asked.entry(&it.rule.listen).or_insert(index);
            lookup.ids.entry(it.id.into()).or_insert(index);
            if let Some(tcp) = it.listen.as_tcp() {
                let on_port = lookup.ports.entry(tcp.port.into());
                on_port
                    .and_modify(|others| *others = OnPort::Several)
                    .or_insert(OnPort::One(index));
            }
        }
        lookup
    }

    /// Returns the forward with that name; or else that listen address; or else that id; or else
    /// the only one on that TCP port.
    ///
    /// # Errors
    /// Returns an error if there is none.
    pub(super) fn find(&self, name: &str) -> Result<&'a ForwardStatus, ApiProblem> {
        let there = || self.position_at(&parse_address(name)?);
        let id = name.parse::<u64>().ok();
        let numbered = || self.ids.get(&id?).copied();
        // A bare port, as in `-L 8080:80`.
        let ported = || match self.ports.get(&id?)? {
            OnPort::One(index) => Some(*index),
            OnPort::Several => None,
        };
        let index = self.names.get(name).copied();
        let index = index.or_else(there).or_else(numbered).or_else(ported);
        index.map(|it| &self.forwards[it]).ok_or_else(|| {
            let problem = ApiProblem::new(404, format!("there is no forward {name:?}"));
            problem.with_remedy("`hvsock status` lists those that there are")
        })
    }

    /// Returns the index of the first forward that listens at an address, or was asked to.
    fn position_at(&self, address: &Address) -> Option<usize> {
        let here = [&self.listens, &self.asked];
        let here = here.into_iter().filter_map(|it| it.get(address));
        here.min().copied()
    }

    /// Returns the forward of that name.
    pub(super) fn named(&self, name: &str) -> Option<&'a ForwardStatus> {
        self.names.get(name).map(|it| &self.forwards[*it])
    }

    /// Returns the forward that listens on that address.
    pub(super) fn listening_on(&self, address: &Address) -> Option<&'a ForwardStatus> {
        self.listens.get(address).map(|it| &self.forwards[*it])
    }

    /// Returns the forward of that id.
    pub(super) fn of_id(&self, id: ForwardId) -> Option<&'a ForwardStatus> {
        self.ids.get(&id.into()).map(|it| &self.forwards[*it])
    }
}

/// Parses an address; a TCP address may lack its scheme. A bare number is no address: it may be an
/// id.
fn parse_address(name: &str) -> Option<Address> {
    let parsed = name.parse().ok();
    parsed.or_else(|| local_address(name).ok().filter(|_| name.contains(':')))
}
