//! How forwards were added by the control socket.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::lock::lock;
use crate::proxy::{ForwardId, ForwardStatus};

/// How a forward was asked for.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Added {
    Alone,
    InRange,
}

/// How the forwards came that were added by the control socket of this process, or of one from
/// which it has taken over, and are there still. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct AdditionRecords(Arc<Mutex<HashMap<ForwardId, Added>>>);

impl AdditionRecords {
    /// Notes how forwards were asked for, of which these are `new`. One of a range stays one. Those
    /// that are not among `forwards` any more are forgotten.
    pub(super) fn note(&self, ids: &[ForwardId], new: &[ForwardId], forwards: &[ForwardStatus]) {
        let there: HashSet<ForwardId> = forwards.iter().map(|it| it.id).collect();
        let mut added = lock(&self.0);
        added.retain(|id, _| there.contains(id));
        match ids {
            [_] => added.extend(new.iter().map(|id| (*id, Added::Alone))),
            all => added.extend(all.iter().map(|id| (*id, Added::InRange))),
        }
    }

    /// Notes how the forwards of these names were asked for in another process. A range is removed
    /// by its name alone, so those without one need not be known.
    pub(super) fn note_named(&self, named: &HashMap<String, Added>, forwards: &[ForwardStatus]) {
        let known = forwards.iter().filter_map(|it| {
            let name = it.rule.name.as_ref()?;
            Some((it.id, *named.get(name)?))
        });
        lock(&self.0).extend(known);
    }

    /// Returns how a forward was asked for; `None` if it wasn't added by the control socket.
    pub(super) fn of(&self, id: ForwardId) -> Option<Added> {
        lock(&self.0).get(&id).copied()
    }
}
