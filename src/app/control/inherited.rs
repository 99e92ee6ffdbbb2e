//! The last connections that ended in predecessors of this process.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::model::EndedInfo;
use crate::engine::ended::MOST_REMEMBERED;
use crate::lock::lock;

/// The connections, in the order of their receipt. Together with the proxy's own they are limited
/// to as many as a proxy keeps. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inherited(Arc<Mutex<VecDeque<EndedInfo>>>);

impl Inherited {
    /// Adds a connection of `process`, unless the connection names another process itself.
    pub(super) fn add_ended(&self, mut ended: EndedInfo, process: u32) {
        ended.carried_by.get_or_insert(process);
        let mut all = lock(&self.0);
        if all.len() >= MOST_REMEMBERED {
            all.pop_front();
        }
        all.push_back(ended);
    }

    /// Returns the last of these and of this process' own, in the order of their ends.
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
