//! `-L` and `-R`: which local address belongs to which vsock port.

use std::str::FromStr;

use crate::address::{Address, Port};
use crate::app::values::local_address;

/// `-L [ADDR:]PORT:GUESTPORT` or `-L /PATH:GUESTPORT`: a local address that leads to a port of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Local {
    pub(super) listen: Address,
    pub(super) guest_port: Port,
}

/// `-R HOSTPORT:TARGET`: a port of the host (CID 2), as the guest dials it, that leads to a local address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remote {
    pub(super) host_port: Port,
    pub(super) target: Address,
}

impl FromStr for Local {
    type Err = String;

    fn from_str(text: &str) -> Result<Local, String> {
        let Some((listen, port)) = text.rsplit_once(':') else {
            return Err("the guest's port is missing; write [ADDR:]PORT:GUESTPORT, as in 8080:80, or /PATH:GUESTPORT".into());
        };
        let guest_port = port
            .parse()
            .map_err(|e| format!("the guest's {e}; a right one: 8080:80"))?;
        if let Some((host, _)) = listen.split_once(':')
            && !host.is_empty()
            && host.chars().all(|c| c.is_ascii_digit())
        {
            return Err(format!(
                "{host:?} stands where an address would: there is no host on the vsock side, as there is in ssh; a right one: 8080:80 or 127.0.0.1:8080:80"
            ));
        }
        let listen = local_address(listen)?;
        Ok(Local { listen, guest_port })
    }
}

impl FromStr for Remote {
    type Err = String;

    fn from_str(text: &str) -> Result<Remote, String> {
        let Some((port, target)) = text.split_once(':') else {
            return Err("the target is missing; write HOSTPORT:TARGET, as in 5000:127.0.0.1:8080 or 5000:/PATH".into());
        };
        let host_port = port
            .parse()
            .map_err(|e| format!("the host's {e}; a right one: 5000:127.0.0.1:8080"))?;
        if let Some((host, last)) = target.split_once(':')
            && !host.is_empty()
            && host.chars().all(|c| c.is_ascii_digit())
        {
            return Err(format!(
                "{host:?} stands where the target's host would; write {port}:{last} or {port}:127.0.0.1:{last}"
            ));
        }
        let target = local_address(target)?;
        if matches!(&target, Address::Tcp(tcp) if tcp.port == 0) {
            return Err("port 0 can't be connected to".into());
        }
        Ok(Remote { host_port, target })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn local(text: &str) -> Result<(String, u32), String> {
        text.parse::<Local>()
            .map(|local| (local.listen.to_string(), local.guest_port.0))
    }

    fn remote(text: &str) -> Result<(u32, String), String> {
        text.parse::<Remote>()
            .map(|remote| (remote.host_port.0, remote.target.to_string()))
    }

    #[test]
    fn locals_are_written_as_in_ssh() {
        for (text, listen, port) in [
            ("8080:80", "tcp://127.0.0.1:8080", 80),
            ("0:0x50", "tcp://127.0.0.1:0", 80),
            ("localhost:8080:80", "tcp://localhost:8080", 80),
            ("[::1]:8080:80", "tcp://[::1]:8080", 80),
            ("*:8080:80", "tcp://0.0.0.0:8080", 80),
            ("/run/docker.sock:2375", "unix:///run/docker.sock", 2375),
            ("/odd:name.sock:2375", "unix:///odd:name.sock", 2375),
            ("tcp://10.0.0.1:1:7", "tcp://10.0.0.1:1", 7),
            ("unix:@docker:7", "unix:@docker", 7),
            (r"\\.\pipe\docker:7", "npipe:////./pipe/docker", 7),
            ("//./pipe/docker:7", "npipe:////./pipe/docker", 7),
            ("npipe:////./pipe/docker:7", "npipe:////./pipe/docker", 7),
        ] {
            assert_eq!(local(text), Ok((listen.to_owned(), port)), "{text}");
        }
    }

    #[test]
    fn remotes_are_written_as_in_ssh() {
        for (text, port, target) in [
            ("5000:8080", 5000, "tcp://127.0.0.1:8080"),
            ("0x1388:example.org:80", 5000, "tcp://example.org:80"),
            ("5000:/run/agent.sock", 5000, "unix:///run/agent.sock"),
            ("5000:[::1]:80", 5000, "tcp://[::1]:80"),
            ("5000:unix:@agent", 5000, "unix:@agent"),
            (r"5000:\\.\pipe\agent", 5000, "npipe:////./pipe/agent"),
        ] {
            assert_eq!(remote(text), Ok((port, target.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_bad_one_says_what_and_shows_a_right_one() {
        for (text, part) in [
            ("8080", "guest's port is missing"),
            ("8080:", "guest's port"),
            ("8080:http", "guest's port"),
            ("8080:4294967296", "4294967295"),
            (":8080:80", "* for all interfaces"),
            ("99999:80", "larger than 65535"),
            ("18088:localhost:80", "no host on the vsock side"),
            ("8080:80:90", "no host on the vsock side"),
            ("tcp:8080:80", "tcp://"),
            ("web.sock:80", "./web.sock"),
            ("web:80", "a right one: 8080"),
            ("::1:8080:80", "["),
        ] {
            let error = local(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        for (text, part) in [
            ("5000", "target is missing"),
            ("x:80", "host's port"),
            ("5000:0", "port 0"),
            ("5000:19:80", "write 5000:80 or 5000:127.0.0.1:80"),
        ] {
            let error = remote(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
