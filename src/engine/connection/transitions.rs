//! Reports each state transition of a connection to a test on the same thread. Only tests use it.

use std::cell::Cell;

/// A function that takes the names of both states of a transition.
type TransitionObserver = fn(&'static str, &'static str);

thread_local! {
    static REPORTER: Cell<Option<TransitionObserver>> = const { Cell::new(None) };
}

/// Sets the function that is called with both states of each transition on this thread.
pub(crate) fn report_to(reporter: TransitionObserver) {
    REPORTER.set(Some(reporter));
}

/// Reports a transition to the function, if there is one.
pub(super) fn report_transition(from: &'static str, to: &'static str) {
    if let Some(reporter) = REPORTER.get() {
        reporter(from, to);
    }
}
