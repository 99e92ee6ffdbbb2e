//! The resolution of names, on threads of their own.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use super::notifier::{Notifier, Report};

/// The addresses of a name, for the dial of a token.
pub(super) type Resolved = (usize, io::Result<Vec<SocketAddr>>);

/// The names that are being resolved, each with the tokens and ports of those that wait for it.
#[derive(Debug, Default)]
pub(super) struct Resolver(HashMap<String, Vec<(usize, u16)>>);

impl Resolver {
    /// Resolves `host` for the dial of `token`. The result is reported as [`Report::Resolved`], for
    /// all that have asked until then.
    pub(super) fn resolve<E: Send + 'static>(
        &mut self,
        token: usize,
        host: &str,
        port: u16,
        notifier: &Arc<Notifier<E>>,
    ) {
        if let Some(waiting) = self.0.get_mut(host) {
            waiting.push((token, port));
            return;
        }
        self.0.insert(host.to_owned(), vec![(token, port)]);
        if let Err(e) = start(host, notifier) {
            notifier.report(Report::Resolved(host.to_owned(), Err(e)));
        }
    }

    /// Returns the addresses of a name for each dial that waits for it.
    pub(super) fn take_addresses(
        &mut self,
        host: &str,
        found: &io::Result<Vec<SocketAddr>>,
    ) -> Vec<Resolved> {
        let waiting = self.0.remove(host).unwrap_or_default().into_iter();
        let addresses = |port| match found {
            Ok(found) => {
                let with_port = |address: &SocketAddr| SocketAddr::new(address.ip(), port);
                Ok(found.iter().map(with_port).collect())
            }
            Err(e) => Err(io::Error::new(e.kind(), e.to_string())),
        };
        waiting
            .map(|(token, port)| (token, addresses(port)))
            .collect()
    }
}

/// Resolves `host` on a thread of its own, since `getaddrinfo` has no form that does not block, and
/// a name server that does not answer must not delay other names. There is at most one thread per
/// name.
fn start<E: Send + 'static>(host: &str, notifier: &Arc<Notifier<E>>) -> io::Result<()> {
    let notifier = Arc::clone(notifier);
    let host = host.to_owned();
    let resolve = move || {
        let found = (host.as_str(), 0).to_socket_addrs().map(Iterator::collect);
        notifier.report(Report::Resolved(host, found));
    };
    let thread = std::thread::Builder::new().name("hvsock-resolver".into());
    thread.spawn(resolve).map(drop)
}
