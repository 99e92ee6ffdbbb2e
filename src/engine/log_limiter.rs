//! What a peer can cause again and again is logged now and then.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets one complaint through now and then: what a peer can cause again and again must not fill the log.
#[derive(Debug, Default)]
pub(crate) struct LogLimiter(Mutex<Option<Heard>>);

#[derive(Debug)]
struct Heard {
    text: String,
    at: Instant,
    more: u64,
}

/// At most one complaint in this time, unless its text is a new one.
const SAME_TEXT_INTERVAL: Duration = Duration::from_secs(60);
/// At most one complaint in this time at all.
const INTERVAL: Duration = Duration::from_secs(1);

impl LogLimiter {
    /// How many log_limiter were swallowed since the last one, if this one may be said.
    pub(crate) fn admit(&self, text: &str, now: Instant) -> Option<u64> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(heard) = &mut *last {
            let interval = if heard.text == text {
                SAME_TEXT_INTERVAL
            } else {
                INTERVAL
            };
            if now.saturating_duration_since(heard.at) < interval {
                heard.more += 1;
                return None;
            }
        }
        let more = last.take().map_or(0, |heard| heard.more);
        *last = Some(Heard {
            text: text.to_owned(),
            at: now,
            more: 0,
        });
        Some(more)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_repeats_is_said_once_and_counted() {
        let log_limiter = LogLimiter::default();
        let start = Instant::now();
        assert_eq!(log_limiter.admit("down", start), Some(0));
        for i in 1..10 {
            assert_eq!(
                log_limiter.admit("down", start + Duration::from_secs(i)),
                None
            );
        }
        assert_eq!(
            log_limiter.admit("refused", start + Duration::from_secs(10)),
            Some(9)
        );
        assert_eq!(
            log_limiter.admit("down", start + Duration::from_millis(10_500)),
            None
        );
        assert_eq!(
            log_limiter.admit("down", start + Duration::from_secs(12)),
            Some(1)
        );
    }
}
