//! Parses `-L` and `-R`: pairs of a local address and a vsock port.

use std::str::FromStr;

use crate::address::{Address, Port};
use crate::app::ranges::{BarePort, expand, pair};
use crate::app::values::{local_address, parse_port};

/// `-L [ADDR:]PORT:GUESTPORT` or `-L /PATH:GUESTPORT`: a local address, and the guest's port to
/// which it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LocalForward {
    pub(super) listen: Address,
    pub(super) guest_port: Port,
}

/// The [`LocalForward`]s of one `-L`: several for a range of ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Locals(pub(super) Vec<LocalForward>);

/// The [`Remote`]s of one `-R`: several for a range of ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remotes(pub(super) Vec<Remote>);

/// Pairs two ports, or the ports of two ranges, of which each is parsed in its own way.
fn pair_ports(
    one: (&str, BarePort),
    other: (&str, BarePort),
) -> Result<Vec<(String, String)>, String> {
    pair(expand(one.0, one.1)?, expand(other.0, other.1)?)
        .map_err(|why| format!("{why}, as in 8000-8010:8000-8010"))
}

/// Refuses a port in docker's syntax, such as `80/udp`.
fn refuse_protocol(port: &str) -> Result<(), String> {
    let Some((number, protocol)) = port.split_once('/') else {
        return Ok(());
    };
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    match protocol {
        "tcp" if is_number => Err(format!("all of it is TCP; write {number}")),
        "udp" | "sctp" if is_number => Err(format!(
            "there is no {}: hypervisor sockets carry streams, as TCP does",
            protocol.to_uppercase()
        )),
        _ => Ok(()),
    }
}

impl FromStr for Locals {
    type Err = String;

    fn from_str(text: &str) -> Result<Locals, String> {
        text.split(':').try_for_each(refuse_protocol)?;
        let Some((listen, port)) = text.rsplit_once(':') else {
            return Err(match text.parse::<Port>() {
                Ok(port) => format!(
                    "the guest's port is missing; write {0}:{0}, or 0:{0} for a free port of the host",
                    port.0
                ),
                Err(_) => "the guest's port is missing; write [ADDR:]PORT:GUESTPORT, as in 8080:80, or /PATH:GUESTPORT".into(),
            });
        };
        // The last part of ADDR:PORT is no guest port.
        if listen.ends_with(']') {
            return Err(format!(
                "the guest's port is missing; write {text}:{port}, or {listen}:0:{port} for a free port of the host"
            ));
        }
        let pairs = pair_ports((listen, BarePort::Tcp), (port, BarePort::Vsock))?.into_iter();
        let locals = pairs.map(|(listen, port)| LocalForward::of(&listen, &port));
        locals.collect::<Result<_, _>>().map(Locals)
    }
}

impl FromStr for Remotes {
    type Err = String;

    fn from_str(text: &str) -> Result<Remotes, String> {
        text.split(':').try_for_each(refuse_protocol)?;
        let Some((port, target)) = text.split_once(':') else {
            return Err("the target is missing; write HOSTPORT:TARGET, as in 5000:127.0.0.1:8080 or 5000:/PATH".into());
        };
        let pairs = pair_ports((port, BarePort::Vsock), (target, BarePort::Tcp))?.into_iter();
        let remotes = pairs.map(|(port, target)| Remote::of(&port, &target));
        remotes.collect::<Result<_, _>>().map(Remotes)
    }
}

/// `-R HOSTPORT:TARGET`: a port of the host (CID 2) that the guest dials, and the local address to
/// which it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remote {
    pub(super) host_port: Port,
    pub(super) target: Address,
}

impl LocalForward {
    fn of(listen: &str, port: &str) -> Result<LocalForward, String> {
        let guest_port =
            parse_port(port).map_err(|e| format!("the guest's {e}; a right one: 8080:80"))?;
        if let Some((host, _)) = listen.split_once(':')
            && !host.is_empty()
            && host.chars().all(|c| c.is_ascii_digit())
        {
            return Err(format!(
                "{host:?} stands where an address would: there is no host on the vsock side, as there is in ssh; a right one: 8080:80 or 127.0.0.1:8080:80"
            ));
        }
        // Such as ssh's host:8080:localhost:80.
        let is_plain = !listen.contains(['/', '[', '\\']);
        if let [host, port, other] = &listen.split(':').collect::<Vec<_>>()[..]
            && is_plain
            && port.parse::<u16>().is_ok()
        {
            return Err(format!(
                "{other:?} stands where the guest's port would: there is no host on the vsock side, as there is in ssh; write {host}:{port}:{}",
                guest_port.0
            ));
        }
        let listen = local_address(listen).map_err(|why| {
            // The last number was the port of an address, not a guest port.
            match local_address(&format!("{listen}:{port}")) {
                Ok(Address::Tcp(_)) if !listen.ends_with(".sock") => format!(
                    "the guest's port is missing; write {listen}:{port}:{port}, or {listen}:0:{port} for a free port of the host"
                ),
                _ => why,
            }
        })?;
        Ok(LocalForward { listen, guest_port })
    }
}

impl Remote {
    fn of(port: &str, target: &str) -> Result<Remote, String> {
        let host_port = parse_port(port)
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
        if let Some((why, remedy)) = target.why_no_target() {
            let remedy = remedy.map(|remedy| format!("; {remedy}"));
            return Err(format!("{why}{}", remedy.unwrap_or_default()));
        }
        Ok(Remote { host_port, target })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn local(text: &str) -> Result<(String, u32), String> {
        let Locals(all) = text.parse()?;
        let [local] = &all[..] else {
            return Err(format!("{} of them", all.len()));
        };
        Ok((local.listen.to_string(), local.guest_port.0))
    }

    fn remote(text: &str) -> Result<(u32, String), String> {
        let Remotes(all) = text.parse()?;
        let [remote] = &all[..] else {
            return Err(format!("{} of them", all.len()));
        };
        Ok((remote.host_port.0, remote.target.to_string()))
    }

    #[test]
    fn locals_are_written_as_in_ssh() {
        for (text, listen, port) in [
            ("8080:80", "tcp://127.0.0.1:8080", 80),
            ("0:0x50", "tcp://127.0.0.1:0", 80),
            ("localhost:8080:80", "tcp://localhost:8080", 80),
            ("[::1]:8080:80", "tcp://[::1]:8080", 80),
            ("*:8080:80", "tcp://*:8080", 80),
            ("tcp4://*:8080:80", "tcp4://*:8080", 80),
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
    fn ranges_are_pairs_of_ports() {
        let Locals(locals) = "[::1]:8000-8002:90-92".parse().unwrap();
        let told = locals
            .iter()
            .map(|it| format!("{} {}", it.listen, it.guest_port.0));
        let right = [
            "tcp://[::1]:8000 90",
            "tcp://[::1]:8001 91",
            "tcp://[::1]:8002 92",
        ];
        assert_eq!(told.collect::<Vec<_>>(), right);
        let Remotes(remotes) = "5000-5001:localhost:80-81".parse().unwrap();
        let told = remotes
            .iter()
            .map(|it| format!("{} {}", it.host_port.0, it.target));
        let right = ["5000 tcp://localhost:80", "5001 tcp://localhost:81"];
        assert_eq!(told.collect::<Vec<_>>(), right);
        for (text, part) in [
            ("8000-8010:80", "11 ports on one side, 1 port on the other"),
            ("8010-8000:10-20", "goes down; write 8000-8010"),
            ("0-60000:0-60000", "more than 4096 ports"),
            ("0-2:80-82", "begins with port 0"),
            ("18200-:8000-8002", "has no end; write 18200-LAST"),
            ("/run/s:80-81", "1 port on one side, 2 ports on the other"),
            ("65535-65536:1-2", "ends above 65535"),
        ] {
            let error = text.parse::<Locals>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        // The dash belongs to a path.
        assert_eq!(local("/run/a-1:80"), Ok(("unix:///run/a-1".to_owned(), 80)));
    }

    #[test]
    fn a_bad_one_says_what_and_shows_a_right_one() {
        for (text, part) in [
            ("8080", "write 8080:8080, or 0:8080 for a free port"),
            ("/run/s", "guest's port is missing"),
            ("[::1]:8080", "write [::1]:8080:8080"),
            ("tcp6://[::1]:8080", "write tcp6://[::1]:8080:8080"),
            (
                "tcp4://*:8080",
                "write tcp4://*:8080:8080, or tcp4://*:0:8080",
            ),
            ("localhost:8080", "write localhost:8080:8080"),
            ("8080:0", "port 0 is no vsock port to listen on"),
            ("8080:4294967295", "those are 1 to 4294967294"),
            ("8080:80/udp", "there is no UDP"),
            ("53/udp:53", "there is no UDP"),
            ("8080:80/tcp", "write 80"),
            ("box:8080:localhost:80", "write box:8080:80"),
            ("8080:", "guest's port"),
            ("8080:http", "guest's port"),
            ("8080:4294967296", "4294967295"),
            (":8080:80", "* for all interfaces"),
            ("99999:80", "larger than 65535"),
            ("18088:localhost:80", "no host on the vsock side"),
            ("8080:80:90", "no host on the vsock side"),
            ("tcp:8080:80", "tcp://"),
            ("web.sock:80", "./web.sock"),
            ("web:80", "write web:80:80, or web:0:80"),
            ("::1:8080:80", "["),
        ] {
            let error = local(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        for (text, part) in [
            ("5000", "target is missing"),
            ("5000:80/udp", "there is no UDP"),
            ("x:80", "host's port"),
            ("5000:0", "port 0"),
            ("0:80", "the host's port 0 is no vsock port"),
            ("5000:19:80", "write 5000:80 or 5000:127.0.0.1:80"),
        ] {
            let error = remote(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
