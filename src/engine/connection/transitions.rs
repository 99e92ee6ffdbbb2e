//! Reports each state transition of a connection to a test on the same thread. Only tests use it.

use std::cell::Cell;

/// A function that takes the names of both states of a transition.
type Listener = fn(&'static str, &'static str);

thread_local! {
    static LISTENER: Cell<Option<Listener>> = const { Cell::new(None) };
}

/// Sets the function that is called with both states of each transition on this thread.
pub(crate) fn listen(listener: Listener) {
    LISTENER.set(Some(listener));
}

/// Reports a transition to the listener, if there is one.
pub(super) fn note(from: &'static str, to: &'static str) {
    if let Some(listener) = LISTENER.get() {
        listener(from, to);
    }
}
