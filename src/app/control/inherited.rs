//! The last connections that have ended in the processes from which this one has taken over.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::model::EndedInfo;
use crate::engine::ended::MOST_REMEMBERED;
use crate::lock::lock;

/// The connections, in the order in which they were received. Together with the proxy's own they
/// are no more than a proxy remembers. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inherited(Arc<Mutex<VecDeque<EndedInfo>>>);

impl Inherited {
    /// Adds a connection of `process`, unless it says itself that it is another process'.
    pub(super) fn add_ended(&self, mut ended: EndedInfo, process: u32) {
        ended.carried_by.get_or_insert(process);
        let mut all = lock(&self.0);
        if all.len() >= MOST_REMEMBERED {
            all.pop_front();
        }
        all.push_back(ended);
    }

    /// Returns the last of these and of this process' own, in the order in which they have ended.
    pub(super) fn merge_with(&self, own: Vec<EndedInfo>) -> Vec<EndedInfo> {
        let mut all = own;
        let inherited = lock(&self.0);
        all.extend(inherited.iter().cloned());
        drop(inherited);
        all.sort_by_key(|it| it.at);
        all.drain(..all.len().saturating_sub(MOST_REMEMBERED));
        all
    }
}
