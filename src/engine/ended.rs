//! The last connections that have ended.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use crate::lock::lock;
use crate::name::{PeerProcess, SocketName};

use super::end_reason::EndReason;
use super::id::{ConnectionId, ForwardId};
use super::rule::Rule;

/// How many connections are remembered.
pub(crate) const MOST_REMEMBERED: usize = 100;

/// A connection that has ended, refused or not.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EndedConnection {
    /// The connection's identifier.
    pub id: ConnectionId,
    /// The forward that it belonged to, which may have been removed.
    pub forward: ForwardId,
    /// The rule under which it was accepted, with the address that was bound.
    pub rule: Arc<Rule>,
    /// The peer that was accepted, as far as the kernel knew its name.
    pub peer: SocketName,
    /// The process that made the peer, if it was a Unix socket.
    pub process: Option<PeerProcess>,
    /// Bytes from the accepting to the dialled side.
    pub sent: u64,
    /// Bytes from the dialled to the accepting side.
    pub received: u64,
    /// The time from the accept to the end.
    pub age: Duration,
    /// The time at which both sides were closed.
    pub at: SystemTime,
    /// Why it has ended. That its program has failed may become known some time later.
    pub why: EndReason,
    /// The error for which it was refused, if it was.
    pub error: Option<Arc<str>>,
}

/// The last connections that have ended. Its lock is held for moments: an entry is moved in, or
/// all are cloned, which allocates one array.
#[derive(Debug)]
pub(crate) struct Ended(Mutex<VecDeque<EndedConnection>>);

impl Default for Ended {
    fn default() -> Ended {
        Ended(Mutex::new(VecDeque::with_capacity(MOST_REMEMBERED)))
    }
}

impl Ended {
    /// Adds a connection, in place of the oldest one if there are too many.
    pub(crate) fn add_connection(&self, ended: EndedConnection) {
        let mut all = lock(&self.0);
        let oldest = match all.len() < MOST_REMEMBERED {
            true => None,
            false => all.pop_front(),
        };
        all.push_back(ended);
        drop(all);
        // It may be the last that knows a rule.
        drop(oldest);
    }

    /// Completes why a connection has ended, which is known now, after it was added.
    pub(crate) fn complete_reason(&self, id: ConnectionId, why: EndReason) {
        let mut all = lock(&self.0);
        if let Some(ended) = all.iter_mut().rev().find(|it| it.id == id) {
            let mut noted = Some(ended.why);
            why.note_in(&mut noted);
            ended.why = noted.unwrap_or(why);
        }
    }

    /// Returns the connections, the oldest first.
    pub(crate) fn list(&self) -> Vec<EndedConnection> {
        let all = lock(&self.0);
        all.iter().cloned().collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::end_reason::ProgramFailure;

    #[test]
    fn the_last_hundred_are_remembered_in_their_order() {
        let ended = Ended::default();
        let address = || "tcp://127.0.0.1:1".parse().unwrap();
        let rule = Arc::new(Rule::new(address(), address()));
        for id in 0..250 {
            ended.add_connection(EndedConnection {
                id: ConnectionId(id),
                forward: ForwardId(0),
                rule: Arc::clone(&rule),
                peer: SocketName::Unnamed,
                process: None,
                sent: 0,
                received: 0,
                age: Duration::ZERO,
                at: SystemTime::UNIX_EPOCH,
                why: EndReason::ClientClosed,
                error: None,
            });
        }
        let ids = ended.list().into_iter().map(|it| it.id.0);
        assert!(ids.eq(150..250));
        assert_eq!(Arc::strong_count(&rule), 101);
        assert_eq!(ended.0.lock().unwrap().capacity(), MOST_REMEMBERED);
        // What is known later completes the right one, and nothing of one that is forgotten.
        let failed = EndReason::ProgramFailed(ProgramFailure::Status(3));
        ended.complete_reason(ConnectionId(200), failed);
        ended.complete_reason(ConnectionId(3), failed);
        let all = ended.list().into_iter().filter(|it| it.why == failed);
        assert!(all.map(|it| it.id.0).eq([200]));
    }
}
