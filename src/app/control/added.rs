//! Records how forwards were added on the control socket.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::lock::lock;
use crate::proxy::{ForwardId, ForwardStatus};

/// How a forward was added.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Added {
    Alone,
    InRange,
}

/// Records how the existing forwards were added on the control socket of this process or of a
/// predecessor. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct AdditionRecords(Arc<Mutex<HashMap<ForwardId, Added>>>);

impl AdditionRecords {
    /// Records forwards that were added together, of which `new` did not exist before. A range
    /// remains a range. Forgets those that are no longer in `forwards`.
    pub(super) fn note(&self, ids: &[ForwardId], new: &[ForwardId], forwards: &[ForwardStatus]) {
        let there: HashSet<ForwardId> = forwards.iter().map(|it| it.id).collect();
        let mut added = lock(&self.0);
        added.retain(|id, _| there.contains(id));
        match ids {
            [_] => added.extend(new.iter().map(|id| (*id, Added::Alone))),
            all => added.extend(all.iter().map(|id| (*id, Added::InRange))),
        }
    }

    /// Records how forwards were added in another process, by their names. Those without a name are
    /// not needed: a range is removed by its name.
    pub(super) fn note_named(&self, named: &HashMap<String, Added>, forwards: &[ForwardStatus]) {
        let known = forwards.iter().filter_map(|it| {
            let name = it.rule.name.as_ref()?;
            Some((it.id, *named.get(name)?))
        });
        lock(&self.0).extend(known);
    }

    /// Returns how a forward was added; `None` if it wasn't added on the control socket.
    pub(super) fn of(&self, id: ForwardId) -> Option<Added> {
        lock(&self.0).get(&id).copied()
    }
}
