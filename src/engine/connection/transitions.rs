//! Tells a test of each transition of a connection of its thread.

use std::cell::Cell;

/// Takes the names of both states of a transition.
type Listener = fn(&'static str, &'static str);

thread_local! {
    static LISTENER: Cell<Option<Listener>> = const { Cell::new(None) };
}

/// Has `listener` called with the names of both states of each transition.
pub(crate) fn listen(listener: Listener) {
    LISTENER.set(Some(listener));
}

/// Notes a transition.
pub(super) fn note(from: &'static str, to: &'static str) {
    if let Some(listener) = LISTENER.get() {
        listener(from, to);
    }
}
