//! Finds the processes of TCP clients on this machine, on Linux.
//!
//! Linux has no call for this. The list of TCP sockets is read once, then the descriptors of
//! processes until all clients are found. It is slow: for commands only, never for a thread that
//! serves connections.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};

use crate::name::PeerProcess;

/// The most descriptors that are looked at.
const MOST_DESCRIPTORS: usize = 1 << 20;

/// A connection from the client's side: its own address, and the port to which it is connected.
pub(crate) type Client = (SocketAddr, u16);

/// Finds the processes of clients of the process `server` on this machine. For clients of other
/// users only root learns more than the user.
pub(crate) fn find(server: u32, clients: &HashSet<Client>) -> HashMap<Client, PeerProcess> {
    let mut sockets = HashMap::new();
    let mut found = HashMap::new();
    if clients.is_empty() {
        return found;
    }
    for table in ["tcp", "tcp6"] {
        // The process may be in another network namespace.
        let table = fs::read_to_string(format!("/proc/{server}/net/{table}"));
        for socket in table.unwrap_or_default().lines().filter_map(read_socket) {
            if socket.inode != 0 && clients.contains(&socket.client) {
                let user = socket.user;
                found.insert(socket.client, PeerProcess { id: None, user });
                sockets.insert(format!("socket:[{}]", socket.inode), socket.client);
            }
        }
    }
    let mut left = MOST_DESCRIPTORS;
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for entry in processes {
        if sockets.is_empty() {
            break;
        }
        let id = entry.file_name().to_str().and_then(|it| it.parse().ok());
        // The server's own sockets are the other ends.
        let Some(id) = id.filter(|id| *id != server) else {
            continue;
        };
        let descriptors = fs::read_dir(entry.path().join("fd"));
        for descriptor in descriptors.into_iter().flatten().flatten().take(left) {
            left -= 1;
            let target = fs::read_link(descriptor.path()).unwrap_or_default();
            let client = target.to_str().and_then(|it| sockets.remove(it));
            if let Some(process) = client.and_then(|it| found.get_mut(&it)) {
                process.id = Some(id);
            }
        }
    }
    found
}

/// A row of the list of TCP sockets.
#[derive(Debug, PartialEq, Eq)]
struct TcpSocket {
    client: Client,
    user: u32,
    inode: u64,
}

/// Reads a line of `proc_pid_net(5)`: number, both addresses, state, two pairs of numbers, a
/// number, user, a number, inode.
fn read_socket(line: &str) -> Option<TcpSocket> {
    let mut fields = line.split_whitespace().skip(1);
    let (own, other) = (fields.next()?, fields.next()?);
    let user = fields.nth(4)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(TcpSocket {
        client: (read_address(own)?, read_address(other)?.port()),
        user,
        inode,
    })
}

/// Reads an address: 32-bit words in the machine's byte order, and the port.
fn read_address(text: &str) -> Option<SocketAddr> {
    let (words, port) = text.split_once(':')?;
    let mut bytes = Vec::new();
    for at in (0..words.len()).step_by(8) {
        let word = u32::from_str_radix(words.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    let port = u16::from_str_radix(port, 16).ok()?;
    Some(SocketAddr::new(ip.to_canonical(), port))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

    #[test]
    #[cfg(target_endian = "little")]
    fn lines_of_the_kernel_are_read() {
        let line = "   3: 0100007F:9C42 0100007F:1F90 01 00000000:00000000 02:000A 00000000  1000        0 4711 2 0 20 4 30 10 -1";
        let read = read_socket(line).unwrap();
        let client = (SocketAddr::from((Ipv4Addr::LOCALHOST, 40_002)), 8080);
        let right = TcpSocket {
            client,
            user: 1000,
            inode: 4711,
        };
        assert_eq!(read, right);
        let loopback = "00000000000000000000000001000000:0050";
        let right = SocketAddr::from((Ipv6Addr::LOCALHOST, 80));
        assert_eq!(read_address(loopback), Some(right));
        let mapped = "0000000000000000FFFF00000100007F:0050";
        let right = SocketAddr::from((Ipv4Addr::LOCALHOST, 80));
        assert_eq!(read_address(mapped), Some(right));
        for wrong in [
            "",
            "0100007F",
            "0100007:0050",
            "0100007F:x",
            "é100007F:0050",
        ] {
            assert_eq!(read_address(wrong), None, "{wrong}");
        }
        assert_eq!(read_socket("  sl  local_address rem_address   st"), None);
    }

    /// The server's own descriptors are skipped, so the server is given as another process.
    #[test]
    fn the_process_of_a_client_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let ours = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let ours = (ours.local_addr().unwrap(), port);
        let nobodys = (ours.0, port.wrapping_add(1));
        let server = std::os::unix::process::parent_id();
        let found = find(server, &HashSet::from([ours, nobodys]));
        let right = PeerProcess {
            id: Some(std::process::id()),
            user: nix::unistd::geteuid().as_raw(),
        };
        assert_eq!(found, HashMap::from([(ours, right)]));
    }
}
