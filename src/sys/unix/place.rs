//! A file by its place: the directory that it is in, held open, and its name there. Any user who
//! may write to the directory, or to one above it, can put another file or a link in the place of a
//! file made here. So no file is changed by its path: it is opened, and changed only if it is the
//! right one, and no link is followed.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::{OFlag, open, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::Identity;
use found::FoundFile;

/// Where a file is, or was.
#[derive(Debug)]
pub(crate) struct Place {
    directory: OwnedFd,
    name: OsString,
}

impl Place {
    /// Returns the place that `path` names now.
    ///
    /// # Errors
    /// That its directory can't be opened; `InvalidInput` if it names none.
    pub(crate) fn of(path: &Path) -> io::Result<Place> {
        let Some(name) = path.file_name() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = found::DIRECTORY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Place {
            directory: open(directory, flags, Mode::empty())?,
            name: name.to_owned(),
        })
    }

    /// Returns the identity of the file there.
    ///
    /// # Errors
    /// `NotFound`; what the system says.
    pub(crate) fn identity(&self) -> io::Result<Identity> {
        Ok(FoundFile::at(self)?.identity)
    }

    /// Removes the file, if it is still that one.
    ///
    /// # Errors
    /// `NotFound`; what the system says.
    pub(crate) fn remove(&self, file: Identity) -> io::Result<()> {
        if self.identity()? == file {
            let name = self.name.as_os_str();
            unlinkat(&self.directory, name, UnlinkatFlags::NoRemoveDir)?;
        }
        Ok(())
    }

    /// Gives the file another name in its directory, if it is still that one. Another file of that
    /// name is replaced.
    ///
    /// # Errors
    /// `NotFound`; what the system says.
    pub(crate) fn rename(&self, file: Identity, name: &OsStr) -> io::Result<()> {
        if self.identity()? != file {
            return Err(io::ErrorKind::NotFound.into());
        }
        let (directory, old) = (&self.directory, self.name.as_os_str());
        Ok(renameat(directory, old, directory, name)?)
    }

    /// Gives the file other permissions, if it is still that one.
    ///
    /// # Errors
    /// `NotFound`; what the system says.
    pub(crate) fn set_mode(&self, file: Identity, mode: u32) -> io::Result<()> {
        let found = FoundFile::at(self)?;
        match found.identity == file {
            true => found.set_mode(self, mode),
            false => Ok(()),
        }
    }

    /// Returns whether the file has that owner and that group already, as far as they are asked
    /// for.
    ///
    /// # Errors
    /// `NotFound`; what the system says.
    pub(crate) fn is_owned(&self, owner: Option<u32>, group: Option<u32>) -> io::Result<bool> {
        let found = FoundFile::at(self)?;
        let has = |asked: Option<u32>, is: u32| asked.is_none_or(|asked| asked == is);
        Ok(has(owner, found.owner) && has(group, found.group))
    }

    /// Gives the file another owner and another group, if it is still that one.
    ///
    /// # Errors
    /// `NotFound`; `PermissionDenied`; what the system says.
    pub(crate) fn set_owner(
        &self,
        file: Identity,
        owner: Option<u32>,
        group: Option<u32>,
    ) -> io::Result<()> {
        let found = FoundFile::at(self)?;
        match found.identity == file {
            true => found.set_owner(self, owner, group),
            false => Ok(()),
        }
    }

    /// Gives the socket that was just bound here these permissions. Returns the identity of its
    /// file.
    ///
    /// # Errors
    /// `PermissionDenied` if there is something else by now; what the system says.
    pub(crate) fn finish_bind(&self, mode: u32) -> io::Result<Identity> {
        let found = FoundFile::at(self)?;
        let is_right = found.mode == mode;
        // (On some network file systems the owner is not the user who made it.)
        let is_ours = is_right || found.owner == nix::unistd::geteuid().as_raw();
        if !found.is_socket || !is_ours {
            let why = "another file has taken its place while it was bound";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        if !is_right {
            found.set_mode(self, mode)?;
        }
        Ok(found.identity)
    }
}

/// A descriptor of the file itself, which names the same file whatever is done to its name.
#[cfg(target_os = "linux")]
mod found {
    use std::fs::{File, Permissions, set_permissions};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

    use nix::fcntl::openat;

    use super::*;

    pub(super) const DIRECTORY: OFlag = OFlag::O_PATH;

    pub(super) struct FoundFile {
        file: File,
        pub(super) identity: Identity,
        pub(super) is_socket: bool,
        pub(super) owner: u32,
        pub(super) group: u32,
        pub(super) mode: u32,
    }

    impl FoundFile {
        pub(super) fn at(place: &Place) -> io::Result<FoundFile> {
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let name = place.name.as_os_str();
            let file = File::from(openat(&place.directory, name, flags, Mode::empty())?);
            let metadata = file.metadata()?;
            Ok(FoundFile {
                identity: Identity::from(&metadata),
                is_socket: metadata.file_type().is_socket(),
                owner: metadata.uid(),
                group: metadata.gid(),
                mode: metadata.mode() & 0o7777,
                file,
            })
        }

        /// fchmod(2) refuses descriptors that can't be read; `/proc` leads to the same file.
        pub(super) fn set_mode(&self, _: &Place, mode: u32) -> io::Result<()> {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            set_permissions(path, Permissions::from_mode(mode))
        }

        pub(super) fn set_owner(
            &self,
            _: &Place,
            owner: Option<u32>,
            group: Option<u32>,
        ) -> io::Result<()> {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            std::os::unix::fs::chown(path, owner, group)
        }
    }
}

/// Elsewhere no descriptor of a socket's file is to be had. Between the look and the change another
/// file may take its name, but no link is followed.
#[cfg(not(target_os = "linux"))]
mod found {
    use nix::fcntl::AtFlags;
    use nix::libc;
    use nix::sys::stat::{FchmodatFlags, fchmodat, fstatat};

    use super::*;

    pub(super) const DIRECTORY: OFlag = OFlag::O_RDONLY;

    pub(super) struct FoundFile {
        pub(super) identity: Identity,
        pub(super) is_socket: bool,
        pub(super) owner: u32,
        pub(super) group: u32,
        pub(super) mode: u32,
    }

    impl FoundFile {
        pub(super) fn at(place: &Place) -> io::Result<FoundFile> {
            let name = place.name.as_os_str();
            let stat = fstatat(&place.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
            Ok(FoundFile {
                identity: Identity::from(&stat),
                is_socket: stat.st_mode & libc::S_IFMT == libc::S_IFSOCK,
                owner: stat.st_uid,
                group: stat.st_gid,
                mode: u32::from(stat.st_mode) & 0o7777,
            })
        }

        pub(super) fn set_mode(&self, place: &Place, mode: u32) -> io::Result<()> {
            let mode = Mode::from_bits_truncate(mode as libc::mode_t);
            let name = place.name.as_os_str();
            Ok(fchmodat(
                &place.directory,
                name,
                mode,
                FchmodatFlags::NoFollowSymlink,
            )?)
        }

        pub(super) fn set_owner(
            &self,
            place: &Place,
            owner: Option<u32>,
            group: Option<u32>,
        ) -> io::Result<()> {
            use nix::unistd::{Gid, Uid, fchownat};
            let (owner, group) = (owner.map(Uid::from_raw), group.map(Gid::from_raw));
            let (name, no_link) = (place.name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
            Ok(fchownat(&place.directory, name, owner, group, no_link)?)
        }
    }
}
