//! The clients of a socket of the control interface: their limit, and which is disconnected for a
//! new one.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;

use super::endpoint::Demand;
use crate::lock::lock;
use crate::sys;

/// The most clients of a socket, if there are enough descriptors.
const MOST_CLIENTS: usize = 256;

/// The most clients of a socket that the user has not asked for.
const FEW_CLIENTS: usize = 8;

/// Returns the most clients of a socket. If descriptors are scarce, most of them are left for
/// connections.
pub(super) fn most_clients(demand: Demand) -> usize {
    if demand == Demand::OwnAccord {
        return FEW_CLIENTS;
    }
    let few = sys::descriptor_limit().map_or(usize::MAX, |limit| {
        usize::try_from(limit / 16).unwrap_or(usize::MAX)
    });
    few.clamp(FEW_CLIENTS, MOST_CLIENTS)
}

/// A client that is being served.
#[derive(Debug)]
pub(super) struct ServedClient(Mutex<(ClientPhase, Instant)>);

/// What a client is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ClientPhase {
    /// It is sending its request.
    Asking,
    /// Its answer is being sent; it must read that and close.
    Hearing,
    /// It waits for its answer.
    Waiting,
}

impl ServedClient {
    pub(super) fn new() -> ServedClient {
        ServedClient(Mutex::new((ClientPhase::Asking, Instant::now())))
    }

    pub(super) fn enter_phase(&self, phase: ClientPhase) {
        *lock(&self.0) = (phase, Instant::now());
    }

    fn state(&self) -> (ClientPhase, Instant) {
        *lock(&self.0)
    }

    pub(super) fn phase(&self) -> ClientPhase {
        self.state().0
    }

    /// Returns once the client has kept the server waiting for `most`.
    pub(super) async fn wait_until_overdue(&self, most: Duration) {
        loop {
            let (phase, since) = self.state();
            let left = match phase {
                ClientPhase::Waiting => most,
                ClientPhase::Asking | ClientPhase::Hearing => most.saturating_sub(since.elapsed()),
            };
            if left.is_zero() {
                return;
            }
            sleep(left).await;
        }
    }

    /// Returns the sort key of disconnection, least first: clients that keep the server waiting,
    /// the longest wait first, then those that wait for the server.
    fn disconnection_key(&self) -> (bool, Instant) {
        let (phase, since) = self.state();
        (phase == ClientPhase::Waiting, since)
    }
}

/// The clients of one socket.
#[derive(Debug)]
pub(super) struct SocketClients {
    pub(super) tasks: JoinSet<()>,
    served: Vec<(Arc<ServedClient>, AbortHandle)>,
    most: usize,
}

impl SocketClients {
    pub(super) fn new(demand: Demand) -> SocketClients {
        SocketClients {
            tasks: JoinSet::new(),
            served: Vec::new(),
            most: most_clients(demand),
        }
    }

    /// Adds a client. Disconnects another one if there are too many.
    pub(super) fn admit(
        &mut self,
        client: &Arc<ServedClient>,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        while self.tasks.try_join_next().is_some() {}
        self.served.retain(|(_, task)| !task.is_finished());
        if self.served.len() >= self.most {
            self.disconnect_one();
        }
        let task = self.tasks.spawn(task);
        self.served.push((Arc::clone(client), task));
    }

    pub(super) fn disconnect_one(&mut self) {
        let all = self.served.iter().enumerate();
        let first = all.min_by_key(|(_, (client, _))| client.disconnection_key());
        if let Some((index, _)) = first {
            let (_, task) = self.served.swap_remove(index);
            task.abort();
        }
    }

    pub(super) fn disconnect_silent(&mut self) {
        for (client, task) in &self.served {
            if client.phase() == ClientPhase::Asking {
                task.abort();
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_client_that_delays_longest_is_disconnected_first() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(async {
            let mut clients = SocketClients::new(Demand::Asked);
            clients.most = 3;
            let come = |clients: &mut SocketClients, phase| {
                let client = Arc::new(ServedClient::new());
                client.enter_phase(phase);
                clients.admit(&client, std::future::pending());
                client
            };
            let is_there = |clients: &SocketClients, client| {
                let mut all = clients.served.iter();
                all.any(|(it, _)| Arc::ptr_eq(it, client))
            };
            let served = come(&mut clients, ClientPhase::Waiting);
            let silent = come(&mut clients, ClientPhase::Asking);
            let hearing = come(&mut clients, ClientPhase::Hearing);
            let second = come(&mut clients, ClientPhase::Waiting);
            assert!(!is_there(&clients, &silent) && is_there(&clients, &hearing));
            let third = come(&mut clients, ClientPhase::Waiting);
            assert!(!is_there(&clients, &hearing) && is_there(&clients, &served));
            // All wait for the server: the one that has waited longest.
            let last = come(&mut clients, ClientPhase::Asking);
            assert!(!is_there(&clients, &served));
            for client in [&second, &third, &last] {
                assert!(is_there(&clients, client));
            }
            // A client that was served makes room.
            clients.served[0].1.abort();
            tokio::task::yield_now().await;
            come(&mut clients, ClientPhase::Asking);
            assert!(is_there(&clients, &last) && clients.served.len() == 3);
        });
    }

    #[test]
    fn a_client_has_a_deadline_only_while_it_delays() {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().build().unwrap();
        runtime.block_on(async {
            let (client, most) = (ServedClient::new(), Duration::from_millis(5));
            let patience = Duration::from_secs(20);
            tokio::time::timeout(patience, client.wait_until_overdue(most))
                .await
                .unwrap();
            client.enter_phase(ClientPhase::Waiting);
            let waits = tokio::time::timeout(20 * most, client.wait_until_overdue(most));
            waits.await.unwrap_err();
            client.enter_phase(ClientPhase::Hearing);
            tokio::time::timeout(patience, client.wait_until_overdue(most))
                .await
                .unwrap();
        });
    }
}
