//! The identity of a file, which tells it from another one that had its name before.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The identity of a file: its device, inode and time of birth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    /// Some file systems give a new file the inode of the one just removed. `None` where it isn't
    /// kept.
    born: Option<SystemTime>,
}

impl Identity {
    /// Returns the identity of the file at `path`, not following a symbolic link.
    pub(crate) fn of(path: &Path) -> io::Result<Identity> {
        Ok(Identity::from(&fs::symlink_metadata(path)?))
    }
}

impl Identity {
    /// Returns the inode.
    pub(crate) fn inode(&self) -> u64 {
        self.inode
    }

    /// Returns it as text for another process: `DEVICE:INODE`, and `:SECONDS:NANOSECONDS` of the
    /// time of birth since 1970.
    pub(crate) fn to_text(self) -> String {
        let Identity {
            device,
            inode,
            born,
        } = self;
        match born.and_then(|it| it.duration_since(SystemTime::UNIX_EPOCH).ok()) {
            Some(born) => {
                let (seconds, part) = (born.as_secs(), born.subsec_nanos());
                format!("{device}:{inode}:{seconds}:{part}")
            }
            None => format!("{device}:{inode}"),
        }
    }

    /// Returns what [`to_text`](Identity::to_text) has written; `None` if it has not.
    pub(crate) fn from_text(text: &str) -> Option<Identity> {
        let mut parts = text.split(':').map(|part| part.parse::<u64>().ok());
        let (device, inode) = (parts.next()??, parts.next()??);
        let born = match (parts.next(), parts.next()) {
            (None, None) => None,
            (Some(seconds), Some(part)) => {
                let part = u32::try_from(part?).ok().filter(|it| *it < 1_000_000_000)?;
                Some(SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds?, part))?)
            }
            _ => return None,
        };
        Some(Identity {
            device,
            inode,
            born,
        })
    }
}

#[cfg(all(test, target_os = "linux"))]
impl Identity {
    /// Returns the identity of a file of that number, of a file system that there isn't.
    pub(crate) fn numbered(inode: u64) -> Identity {
        Identity {
            device: 0,
            inode,
            born: None,
        }
    }
}

impl From<&fs::Metadata> for Identity {
    fn from(metadata: &fs::Metadata) -> Identity {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            born: metadata.created().ok(),
        }
    }
}

/// The same identity as std's metadata give.
#[cfg(not(target_os = "linux"))]
impl From<&nix::sys::stat::FileStat> for Identity {
    #[allow(clippy::unnecessary_cast)]
    fn from(stat: &nix::sys::stat::FileStat) -> Identity {
        #[cfg(any(target_vendor = "apple", target_os = "freebsd"))]
        let born = {
            let seconds = u64::try_from(stat.st_birthtime).ok();
            let part = u32::try_from(stat.st_birthtime_nsec).ok();
            seconds.zip(part).map(|(seconds, part)| {
                SystemTime::UNIX_EPOCH + Duration::new(seconds, part.min(999_999_999))
            })
        };
        #[cfg(not(any(target_vendor = "apple", target_os = "freebsd")))]
        let born = None;
        Identity {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            born,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_the_same_as_text() {
        let root = tempfile::tempdir().unwrap();
        let identity = Identity::of(root.path()).unwrap();
        let text = identity.to_text();
        assert_eq!(Identity::from_text(&text), Some(identity));
        let unborn = Identity {
            born: None,
            ..identity
        };
        assert_eq!(Identity::from_text(&unborn.to_text()), Some(unborn));
        for wrong in ["", "1", "1:x", "1:2:3", "1:2:3:4000000000000"] {
            assert_eq!(Identity::from_text(wrong), None, "{wrong}");
        }
    }
}
