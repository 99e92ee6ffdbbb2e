//! Targets that no rule may have, in whatever form they are spelled.
//!
//! The check is made when a rule is bound, and holds for that moment: a person who can create
//! symbolic links can redirect a path later. So the program that listens at such an address should
//! check its peers as well.

use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};

use crate::address::{Address, CID_HOST, CID_LOCAL, Host, TcpAddress};
use crate::sys;

/// Returns whether a connection to `target` may arrive at `place`.
pub(crate) fn leads_to(target: &Address, place: &Address) -> bool {
    match (target, place) {
        (Address::Tcp(target), Address::Tcp(place)) => return may_reach(target, place),
        (Address::Vsock(target), Address::Vsock(place)) => {
            return target.port == place.port
                && (target.cid == place.cid || is_this_machines(target.cid));
        }
        _ => {}
    }
    match place.listen_path() {
        Some(place) => target
            .connect_paths()
            .iter()
            .any(|path| is_same(path, &place)),
        None => target == place,
    }
}

pub(super) fn is_same(one: &Path, other: &Path) -> bool {
    is_same_file(one, other) || resolve_links(one) == resolve_links(other)
}

/// Returns whether both paths name one existing file.
fn is_same_file(one: &Path, other: &Path) -> bool {
    #[cfg(unix)]
    return file_at(one).is_some_and(|file| file_at(other) == Some(file));
    #[cfg(not(unix))]
    {
        let _ = (one, other);
        false
    }
}

/// Returns the device and the inode of the file to which a path leads.
#[cfg(unix)]
pub(super) fn file_at(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}

/// Returns the path without symbolic links; the file itself need not exist.
pub(super) fn resolve_links(path: &Path) -> PathBuf {
    if let Ok(real) = path.canonicalize() {
        return real;
    }
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return path.to_path_buf(),
    };
    match (parent.canonicalize(), path.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        _ => path.to_path_buf(),
    }
}

/// Returns whether `target` may be the port of `place`. A listener on one of this machine's
/// addresses is assumed to be reachable by each of them. A name is assumed to stand for any
/// address, since it is resolved anew for each connection.
fn may_reach(target: &TcpAddress, place: &TcpAddress) -> bool {
    target.port == place.port
        && match (&target.host, &place.host) {
            (Host::Name(_) | Host::Any, _) => true,
            (Host::Ip(ip), Host::Ip(place)) if ip == place => true,
            (Host::Ip(ip), _) => is_this_machine(ip.to_canonical()),
        }
}

/// Returns whether a connect to that CID may stay on this machine. If it can't be told, it may.
fn is_this_machines(cid: u32) -> bool {
    match (cid, sys::local_cid()) {
        (CID_LOCAL, _) => true,
        (cid, Ok(own)) => cid == own,
        (cid, Err(_)) => cid == CID_HOST,
    }
}

pub(super) fn is_this_machine(ip: IpAddr) -> bool {
    // An address that can be bound is this machine's; nothing is sent.
    ip.is_unspecified() || ip.is_loopback() || UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    #[cfg(unix)]
    use crate::address::UnixAddress;

    fn leads(target: &str, place: &str) -> bool {
        leads_to(&target.parse().unwrap(), &place.parse().unwrap())
    }

    #[test]
    fn a_tcp_port_is_known_under_each_of_this_machines_addresses_and_under_names() {
        for place in [
            "tcp://127.0.0.1:9100",
            "tcp://0.0.0.0:9100",
            "tcp://[::1]:9100",
        ] {
            for host in [
                "127.0.0.1",
                "127.0.0.2",
                "0.0.0.0",
                "[::1]",
                "[::]",
                "[::ffff:127.0.0.1]",
                "localhost",
                "some.example",
            ] {
                assert!(leads(&format!("tcp://{host}:9100"), place), "{host}");
                assert!(!leads(&format!("tcp://{host}:9101"), place), "{host}");
            }
            // An address of nobody's (RFC 5737). (Wine binds whatever it is asked for.)
            assert!(cfg!(windows) || !leads("tcp://192.0.2.1:9100", place));
        }
        assert!(leads("tcp://192.0.2.1:9100", "tcp://192.0.2.1:9100"));
        for place in ["tcp://localhost:9100", "tcp://*:9100", "tcp6://*:9100"] {
            assert!(leads("tcp://127.0.0.1:9100", place), "{place}");
            assert!(leads("tcp://localhost:9100", place), "{place}");
            assert!(!leads("tcp://localhost:9101", place), "{place}");
        }
        assert!(leads("vsock://local:9100", "vsock://:9100"));
        assert!(leads("vsock://7:9100", "vsock://7:9100"));
        assert!(!leads("vsock://local:9101", "vsock://:9100"));
        assert!(!leads("vsock://99:9100", "vsock://:9100"));
        assert!(!leads("unix:///tmp/9100", "tcp://127.0.0.1:9100"));
    }

    #[cfg(unix)]
    #[test]
    fn a_file_is_known_by_each_way_to_it() {
        use std::fs;
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().canonicalize().unwrap();
        let at = |name: &str| Address::Unix(UnixAddress::Path(dir.join(name)));
        fs::create_dir(dir.join("d")).unwrap();
        symlink("d", dir.join("dlink")).unwrap();
        symlink("d/s", dir.join("link")).unwrap();
        // Before and after the file exists.
        for there in [false, true] {
            let place = at("d/s");
            assert!(leads_to(&at("d/s"), &place));
            assert!(leads_to(&at("dlink/s"), &place));
            assert!(leads_to(&at("d/../d/./s"), &place));
            assert!(!leads_to(&at("d/t"), &place));
            if there {
                assert!(leads_to(&at("link"), &place));
                assert!(leads_to(&at("hard"), &place));
            } else {
                drop(std::os::unix::net::UnixListener::bind(dir.join("d/s")).unwrap());
                fs::hard_link(dir.join("d/s"), dir.join("hard")).unwrap();
            }
        }
        // The sockets at which hyperkit and other VMMs are dialled are files, too.
        let vm = dir.join("vm");
        fs::create_dir(&vm).unwrap();
        let hyperkit = format!("hyperkit://:80{}", vm.display());
        let mux = format!("vsock-mux://:80{}", vm.join("connect").display());
        let place = at("d/s");
        assert!(!leads_to(&hyperkit.parse().unwrap(), &place));
        symlink("../d/s", vm.join("connect")).unwrap();
        assert!(leads_to(&hyperkit.parse().unwrap(), &place));
        assert!(leads_to(&mux.parse().unwrap(), &place));
        assert!(leads("unix:@name", "unix:@name"));
        assert!(!leads("unix:@name", "unix:@other"));
    }
}
