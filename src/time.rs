//! Points in time that a caller's duration leads to; and how JSON has times: as numbers of seconds.

use std::time::{Duration, Instant};
#[cfg(feature = "cli")]
use std::time::{SystemTime, UNIX_EPOCH};

#[cfg(feature = "cli")]
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// What stands for "never": a century. A clock can't reach `Duration::MAX` from now.
pub(crate) const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Returns that time from now on; of more than a century, a century.
pub(crate) fn after(now: Instant, time: Duration) -> Instant {
    now + time.min(NEVER)
}

/// Writes a duration, if there is one.
#[cfg(feature = "cli")]
pub(crate) fn write_seconds<S: Serializer>(
    time: &(impl Copy + Into<Option<Duration>>),
    to: S,
) -> Result<S::Ok, S::Error> {
    let time: Option<Duration> = (*time).into();
    time.map(|time| time.as_secs_f64()).serialize(to)
}

/// A time on the wall, in seconds since 1970.
#[cfg(feature = "cli")]
pub(crate) mod unix {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        write_seconds(&time.duration_since(UNIX_EPOCH).unwrap_or_default(), to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        let since = Duration::try_from_secs_f64(f64::deserialize(from)?).map_err(Error::custom)?;
        let time = UNIX_EPOCH.checked_add(since);
        time.ok_or_else(|| Error::custom("a time beyond all clocks"))
    }
}

/// The same where there may be none.
#[cfg(feature = "cli")]
pub(crate) mod unix_option {
    use super::*;

    #[derive(Deserialize, Serialize)]
    struct Unix(#[serde(with = "unix")] SystemTime);

    pub(crate) fn serialize<S: Serializer>(
        time: &Option<SystemTime>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        time.map(Unix).serialize(to)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<SystemTime>, D::Error> {
        Ok(Option::<Unix>::deserialize(from)?.map(|time| time.0))
    }
}
