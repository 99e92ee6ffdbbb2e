//! Locks that outlive a panic: what a thread leaves behind when it panics is used on, since each
//! lock here guards counts and lists that are whole after every statement.

use std::sync::{LockResult, Mutex, MutexGuard, PoisonError};

/// Locks a mutex, whether a thread has panicked with it or not.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    recover(mutex.lock())
}

/// Returns what a lock or a condition variable has returned, whether a thread has panicked or not.
pub(crate) fn recover<T>(locked: LockResult<T>) -> T {
    locked.unwrap_or_else(PoisonError::into_inner)
}
