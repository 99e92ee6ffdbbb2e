//! An index of listening sockets that are there already, by what a rule wants. Comparing each
//! socket with each rule would take a minute at a start with thousands.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;
#[cfg(unix)]
use std::path::PathBuf;

use super::Listener;
use super::tcp::socket_addresses;
use crate::address::{Address, Port};
use crate::name::SocketName;
#[cfg(unix)]
use crate::sys::Identity;

/// What a socket has in common with each rule that may take it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    /// It was bound for a rule of that name and address, which left the port to the kernel.
    Wish(Option<String>, Address),
    Tcp(IpAddr, u16),
    Vsock(u32, Port),
    #[cfg(unix)]
    Path(PathBuf),
    /// A file, however its path is spelled.
    #[cfg(unix)]
    File(Identity),
    Other(Address),
}

impl Key {
    /// Returns the keys of the sockets that a rule of this name which listens on `address` may
    /// take. A name of a host is looked up.
    pub(crate) fn wanted(name: Option<&str>, address: &Address) -> Vec<Key> {
        if address.leaves_port_to_kernel() {
            return vec![Key::Wish(name.map(str::to_owned), address.clone())];
        }
        let mut keys = Key::there(address);
        if let Some(asked) = address.as_tcp() {
            let found = socket_addresses(asked).into_iter().flatten();
            keys.extend(found.map(|it| Key::Tcp(it.ip(), it.port())));
        }
        keys
    }

    /// Returns the keys of a socket that is bound to `address`.
    fn there(address: &Address) -> Vec<Key> {
        if let Address::Vsock(vsock) = address {
            return vec![Key::Vsock(vsock.cid, vsock.port)];
        }
        #[cfg(unix)]
        if let Some(path) = address.listen_path() {
            let file = Identity::of(&path).ok().map(Key::File);
            return [Some(Key::Path(path.into_owned())), file]
                .into_iter()
                .flatten()
                .collect();
        }
        vec![Key::Other(address.clone())]
    }
}

/// The sockets in their order, each with what else is known of it.
#[derive(Debug)]
pub(crate) struct Ready<T> {
    there: BTreeMap<usize, T>,
    /// The numbers of those that have a key; some may have gone since.
    by_key: HashMap<Key, VecDeque<usize>>,
}

impl<T> Ready<T> {
    /// Takes all of them; `listener` returns the socket of one.
    pub(crate) fn new(all: Vec<T>, listener: impl Fn(&T) -> &Listener) -> Ready<T> {
        let mut by_key: HashMap<Key, VecDeque<usize>> = HashMap::new();
        for (number, one) in all.iter().enumerate() {
            for key in listener(one).keys() {
                by_key.entry(key).or_default().push_back(number);
            }
        }
        let there = all.into_iter().enumerate().collect();
        Ready { there, by_key }
    }

    /// Returns the number of the first that has one of these keys, and of which `fits` is true.
    pub(crate) fn find(&mut self, keys: &[Key], fits: impl Fn(&T) -> bool) -> Option<usize> {
        self.search(keys, |_, _, it| fits(it))
    }

    /// Finds as [`find`](Ready::find) does, but another one than `first`, with which it is
    /// compared.
    pub(crate) fn find_beside(
        &mut self,
        first: usize,
        keys: &[Key],
        fits: impl Fn(&T, &T) -> bool,
    ) -> Option<usize> {
        self.search(keys, |there, number, it| {
            number != first && there.get(&first).is_some_and(|first| fits(first, it))
        })
    }

    fn search(
        &mut self,
        keys: &[Key],
        fits: impl Fn(&BTreeMap<usize, T>, usize, &T) -> bool,
    ) -> Option<usize> {
        let Ready { there, by_key } = self;
        let mut first = |key| {
            let numbers = by_key.get_mut(key)?;
            while numbers.front().is_some_and(|it| !there.contains_key(it)) {
                numbers.pop_front();
            }
            let mut numbers = numbers.iter().copied();
            numbers.find(|&number| there.get(&number).is_some_and(|it| fits(there, number, it)))
        };
        keys.iter().filter_map(&mut first).min()
    }

    /// Returns the numbers of all of which `fits` is true.
    #[cfg(all(unix, feature = "cli"))]
    pub(crate) fn numbers(&self, fits: impl Fn(&T) -> bool) -> Vec<usize> {
        let fitting = self.there.iter().filter(|(_, it)| fits(it));
        fitting.map(|(number, _)| *number).collect()
    }

    pub(crate) fn get_mut(&mut self, number: usize) -> Option<&mut T> {
        self.there.get_mut(&number)
    }

    pub(crate) fn remove(&mut self, number: usize) -> Option<T> {
        self.there.remove(&number)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.there.is_empty()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.there.values()
    }

    /// Removes all.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = T> + use<T> {
        self.by_key.clear();
        std::mem::take(&mut self.there).into_values()
    }
}

impl Listener {
    /// Returns the keys of this socket.
    pub(crate) fn keys(&self) -> Vec<Key> {
        let mut keys = Key::there(&self.address);
        if self.address.as_tcp().is_some()
            && let Ok(SocketName::Tcp(here)) = self.local_addr()
        {
            keys.push(Key::Tcp(here.ip(), here.port()));
        }
        #[cfg(unix)]
        if let Some((name, asked)) = &self.wish
            && asked.leaves_port_to_kernel()
        {
            keys.push(Key::Wish(name.clone(), asked.clone()));
        }
        keys
    }
}
