//! The rate limit of log lines that a peer can cause again and again. It knows neither the log nor
//! the clock: the text and the time come in.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::lock::lock;

/// A limiter that admits one line in a while, so that no peer can fill the log.
#[derive(Debug, Default)]
pub(crate) struct LogLimiter(Mutex<Option<LastLine>>);

#[derive(Debug)]
struct LastLine {
    text: String,
    at: Instant,
    suppressed: u64,
}

/// The interval between two lines of the same text.
const SAME_TEXT_INTERVAL: Duration = Duration::from_secs(60);
/// The interval between any two lines.
const INTERVAL: Duration = Duration::from_secs(1);

impl LogLimiter {
    /// Returns how many lines were suppressed since the last one, if this one may be logged.
    pub(crate) fn admit(&self, text: &str, now: Instant) -> Option<u64> {
        let mut last = lock(&self.0);
        if let Some(line) = &mut *last {
            let interval = if line.text == text {
                SAME_TEXT_INTERVAL
            } else {
                INTERVAL
            };
            if now.saturating_duration_since(line.at) < interval {
                line.suppressed += 1;
                return None;
            }
        }
        let suppressed = last.take().map_or(0, |line| line.suppressed);
        *last = Some(LastLine {
            text: text.to_owned(),
            at: now,
            suppressed: 0,
        });
        Some(suppressed)
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
