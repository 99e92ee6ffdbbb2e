//! The only limit of time that a check may depend on.

use std::error::Error;
use std::time::{Duration, Instant};

use crate::report::Outcome;

/// Checks that one attempt of three takes less than a second, by its own clock or by this one; the
/// machine may be busy.
pub(crate) fn within_a_second(
    mut attempt: impl FnMut() -> Result<Option<Duration>, Box<dyn Error + Send + Sync>>,
) -> Outcome {
    let mut times = Vec::new();
    for _ in 0..3 {
        let start = Instant::now();
        let took = attempt()?.unwrap_or_else(|| start.elapsed());
        if took < Duration::from_secs(1) {
            return Ok(());
        }
        times.push(took);
    }
    Err(format!("it took {times:?}").into())
}
