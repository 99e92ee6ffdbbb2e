//! Opens files that somebody else has named or written, which may be anything.

use std::fs::{self, File, FileType, Metadata, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

/// The most bytes of a file of a VM's state: hyperkit.json has some 2 KiB, minikube's config.json
/// some 4 KiB.
pub(crate) const STATE_FILE: u64 = 64 * 1024;

/// Reads a regular file of at most `most` bytes, links followed. It never waits for a writer, and
/// never takes more memory.
///
/// # Errors
/// `IsADirectory`; `InvalidInput` if it is no regular file for another reason, or longer; what the
/// system says.
pub(crate) fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    // Not what its size says: it may grow, and files of /proc have none.
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        let why = format!("it has more than {most} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    Ok(bytes)
}

/// Reads as [`read`] does, and returns text.
///
/// # Errors
/// As there; `InvalidData` if it is no UTF-8.
pub(crate) fn read_text(path: &Path, most: u64) -> io::Result<String> {
    String::from_utf8(read(path, most)?).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Opens a regular file to be read, links followed, without waiting.
///
/// # Errors
/// `IsADirectory`; `InvalidInput` if it is no regular file for another reason; what the system
/// says.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    // Asked before as well: to open a device may have an effect.
    check(&fs::metadata(path)?)?;
    let mut options = OpenOptions::new();
    options.read(true);
    never_wait(&mut options);
    let file = options.open(path)?;
    check(&file.metadata()?)?;
    Ok(file)
}

/// Opens a file to append to it, and makes it (0600) if there is none. It may be a device, or a
/// FIFO that somebody reads; a write to it may wait, but the open does not.
///
/// # Errors
/// `IsADirectory`; `InvalidInput` if it is a socket, or a FIFO that nobody reads; what the system
/// says.
#[cfg(feature = "cli")]
pub(crate) fn append(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    never_wait(&mut options);
    let file = options.open(path).map_err(|e| explain(path, e))?;
    #[cfg(unix)]
    crate::sys::set_blocking(&file)?;
    Ok(file)
}

/// Has an open not wait: a FIFO's open waits for its other end, some devices' for a line.
#[cfg_attr(not(unix), allow(unused_variables))]
fn never_wait(options: &mut OpenOptions) {
    #[cfg(unix)]
    {
        use nix::libc::{O_NOCTTY, O_NONBLOCK};
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(O_NONBLOCK | O_NOCTTY);
    }
}

/// Returns the error of a file that can't be written, with what it is where that is the reason.
#[cfg(all(unix, feature = "cli"))]
fn explain(path: &Path, error: io::Error) -> io::Error {
    use std::os::unix::fs::FileTypeExt;
    let why = match path.metadata().map(|it| it.file_type()) {
        Ok(kind) if kind.is_socket() => "it is a socket, not a regular file",
        Ok(kind) if kind.is_fifo() && error.raw_os_error() == Some(nix::libc::ENXIO) => {
            "it is a FIFO that nobody reads"
        }
        _ => return error,
    };
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

#[cfg(all(not(unix), feature = "cli"))]
fn explain(_: &Path, error: io::Error) -> io::Error {
    error
}

fn check(metadata: &Metadata) -> io::Result<()> {
    let kind = metadata.file_type();
    match kind {
        _ if kind.is_file() => Ok(()),
        _ if kind.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        _ => {
            let why = format!("it is {}, not a regular file", describe_kind(kind));
            Err(io::Error::new(io::ErrorKind::InvalidInput, why))
        }
    }
}

/// Returns what is in a file's place, in words.
pub(crate) fn describe_kind(kind: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        match kind {
            _ if kind.is_fifo() => return "a FIFO",
            _ if kind.is_socket() => return "a socket",
            _ if kind.is_char_device() || kind.is_block_device() => return "a device",
            _ => {}
        }
    }
    match kind {
        _ if kind.is_file() => "a regular file",
        _ if kind.is_dir() => "a directory",
        _ => "something else",
    }
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// In time, or it panics: a test that hangs says nothing.
    fn read_in_time(path: &Path) -> io::Result<Vec<u8>> {
        let (tell, hear) = mpsc::channel();
        let path = path.to_owned();
        std::thread::spawn(move || tell.send(read(&path, 100)));
        let heard = hear.recv_timeout(Duration::from_secs(20));
        heard.unwrap()
    }

    #[test]
    fn a_short_file_is_read_and_a_link_is_followed() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("f");
        fs::write(&path, [b'x'; 100]).unwrap();
        symlink(&path, root.path().join("l")).unwrap();
        assert_eq!(read_in_time(&root.path().join("l")).unwrap(), [b'x'; 100]);
        let missing = read_in_time(&root.path().join("none")).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_no_short_file_is_refused_at_once() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let fifo = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
        nix::unistd::mkfifo(&at("fifo"), fifo).unwrap();
        symlink("/dev/zero", at("zero")).unwrap();
        symlink(".", at("directory")).unwrap();
        symlink("loop", at("loop")).unwrap();
        fs::write(at("long"), [b'x'; 101]).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for (name, why) in [
            ("fifo", "it is a FIFO, not a regular file"),
            ("zero", "it is a device, not a regular file"),
            ("socket", "it is a socket, not a regular file"),
            ("directory", "is a directory"),
            ("long", "it has more than 100 bytes"),
            ("loop", "os error"),
        ] {
            let error = read_in_time(&at(name)).unwrap_err();
            assert!(error.to_string().contains(why), "{name}: {error}");
        }
    }

    #[cfg(feature = "cli")]
    fn append_in_time(path: &Path) -> io::Result<File> {
        let (tell, hear) = mpsc::channel();
        let path = path.to_owned();
        std::thread::spawn(move || tell.send(append(&path)));
        hear.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    #[cfg(feature = "cli")]
    #[test]
    fn what_takes_no_lines_now_is_refused_at_once() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
        nix::unistd::mkfifo(&at("fifo"), mode).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for (name, why) in [
            ("fifo", "it is a FIFO that nobody reads"),
            ("socket", "it is a socket, not a regular file"),
            (".", "directory"),
        ] {
            let error = append_in_time(&at(name)).unwrap_err();
            assert!(error.to_string().contains(why), "{name}: {error}");
        }
        // One that is read takes them, and its writer waits when it is full.
        let _reader = open_both(&at("fifo"));
        let fifo = append_in_time(&at("fifo")).unwrap();
        let flags = nix::fcntl::fcntl(&fifo, nix::fcntl::FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags & nix::libc::O_NONBLOCK, 0);
        append_in_time(Path::new("/dev/null")).unwrap();
    }

    #[cfg(feature = "cli")]
    /// Opens a FIFO as a reader, which its own end for writing keeps from waiting.
    fn open_both(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }
}
