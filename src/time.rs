//! Points in time that a caller's duration leads to.

use std::time::{Duration, Instant};

/// What stands for "never": a century. A clock can't reach `Duration::MAX` from now.
pub(crate) const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Returns that time from now on; of more than a century, a century.
pub(crate) fn after(now: Instant, time: Duration) -> Instant {
    now + time.min(NEVER)
}
