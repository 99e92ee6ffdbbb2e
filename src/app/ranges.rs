//! Ranges of ports: `8000-8010` in place of a port, on the command line, in the file and in JSON.

use std::ops::Range;

use crate::address::Address;
use crate::error::counted;

/// The most ports of a range. Each has a listener with a descriptor.
const MOST_PORTS: u32 = 4096;

/// The remedy if another program has a port of the range.
pub(super) const TAKEN_IN_RANGE: &str =
    "another program listens there: stop it, or choose another range";

/// The schemes of addresses in which the port ends the authority.
const SCHEMES: [&str; 6] = ["tcp", "tcp4", "tcp6", "vsock", "vsock-mux", "hyperkit"];

/// The meaning of a port without an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BarePort {
    Tcp,
    Vsock,
}

/// Returns whether the port of an address is a TCP port.
fn is_of_tcp(text: &str, bare: BarePort) -> bool {
    match text.split_once("://") {
        Some((scheme, _)) => ["tcp", "tcp4", "tcp6"]
            .iter()
            .any(|known| known.eq_ignore_ascii_case(scheme)),
        None => bare == BarePort::Tcp || text.contains(':'),
    }
}

/// Returns the position of the port or the range in an address. A path has none.
fn find_port(text: &str) -> Option<Range<usize>> {
    let Some((scheme, rest)) = text.split_once("://") else {
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let is_path = host.contains(['/', '\\']) || matches!(host, "unix" | "exec" | "file");
        return (!is_path).then(|| text.len() - port.len()..text.len());
    };
    let is = |known: &str| known.eq_ignore_ascii_case(scheme);
    let start = scheme.len() + "://".len();
    let end_at = |marks: &[char], from: usize| {
        let end = text[from..].find(marks);
        end.map_or(text.len(), |at| from + at)
    };
    if is("hvsock") {
        let port = start + rest.find('/')? + 1;
        return Some(port..end_at(&['?', '#'], port));
    }
    let end = end_at(&['/', '?', '#'], start);
    let colon = text[start..end].rfind(':')?;
    SCHEMES
        .iter()
        .any(|known| is(known))
        .then(|| start + colon + 1..end)
}

/// Returns the texts of all addresses of a range, or the text itself if it has no range.
///
/// # Errors
/// Returns what is wrong with the range.
pub(super) fn expand(text: &str, bare: BarePort) -> Result<Vec<String>, String> {
    let whole = || Ok(vec![text.to_owned()]);
    let Some(place) = find_port(text) else {
        return whole();
    };
    let range = &text[place.clone()];
    let Some((first, last)) = range.split_once('-') else {
        return whole();
    };
    if !is_number(first) {
        return whole();
    }
    if last.is_empty() {
        return Err(format!("the range {range} has no end; write {first}-LAST"));
    }
    if !is_number(last) {
        return whole();
    }
    let number = |text: &str| text.parse().map_err(|_| format!("{text} is no port"));
    let (first, last): (u32, u32) = (number(first)?, number(last)?);
    if first > last {
        return Err(format!("the range {range} goes down; write {last}-{first}"));
    }
    if last > u16::MAX.into() && is_of_tcp(text, bare) {
        let most = u16::MAX;
        return Err(format!(
            "the range {range} ends above {most}, the largest port of TCP"
        ));
    }
    if last - first >= MOST_PORTS {
        return Err(format!(
            "the range {range} has more than {MOST_PORTS} ports"
        ));
    }
    if first == 0 && last > 0 {
        return Err(format!(
            "the range {range} begins with port 0, which stands for a free port; begin with another"
        ));
    }
    let (before, behind) = (&text[..place.start], &text[place.end..]);
    let of_port = |port| format!("{before}{port}{behind}");
    Ok((first..=last).map(of_port).collect())
}

/// Parses an address, or the addresses of a range of ports.
///
/// # Errors
/// Returns what is wrong with the text.
#[cfg(any(unix, test))]
pub(super) fn parse_addresses(text: &str) -> Result<Vec<Address>, String> {
    // A text without a scheme is a path.
    let texts = match text.contains("://") {
        true => expand(text, BarePort::Tcp)?,
        false => vec![text.to_owned()],
    };
    let address = |text: String| text.parse::<Address>().map_err(|e| e.to_string());
    texts.into_iter().map(address).collect()
}

/// Pairs the elements of two ranges.
///
/// # Errors
/// Returns an error if they differ in length.
pub(super) fn pair<A, B>(ones: Vec<A>, others: Vec<B>) -> Result<Vec<(A, B)>, String> {
    if ones.len() != others.len() {
        return Err(format!(
            "{} on one side, {} on the other; write ranges of the same length",
            counted(ones.len() as u64, "port"),
            counted(others.len() as u64, "port")
        ));
    }
    Ok(ones.into_iter().zip(others).collect())
}

/// Returns the text of a range of addresses from its first and last one.
pub(super) fn join(first: &Address, last: &Address) -> String {
    let (text, last) = (first.to_string(), last.to_string());
    match (find_port(&text), find_port(&last)) {
        (Some(from), Some(to)) if text != last => {
            format!("{}-{}{}", &text[..from.end], &last[to], &text[from.end..])
        }
        _ => text,
    }
}

/// Returns the name of a range's forward: the name of the range, and the port on which the forward
/// listens.
pub(super) fn name_of(range: &str, listen: &Address) -> String {
    let text = listen.to_string();
    let port = find_port(&text).map_or(&*text, |place| &text[place]);
    format!("{range}-{port}")
}

/// Returns whether forwards with these addresses may be one range: two or more on successive ports,
/// with successive targets, that differ in nothing else.
#[cfg(unix)]
pub(super) fn are_a_range(forwards: &[(&Address, &Address)]) -> bool {
    let split = |address: &Address| {
        let text = address.to_string();
        let place = find_port(&text)?;
        let port: u32 = text[place.clone()].parse().ok()?;
        Some((
            port,
            [text[..place.start].to_owned(), text[place.end..].to_owned()],
        ))
    };
    let split_both =
        |(listen, connect): &(&Address, &Address)| Some((split(listen)?, split(connect)?));
    let Some(mut all) = forwards.iter().map(split_both).collect::<Option<Vec<_>>>() else {
        return false;
    };
    all.sort_unstable();
    let follows = |one: &(u32, [String; 2]), next: &(u32, [String; 2])| {
        one.0.checked_add(1) == Some(next.0) && one.1 == next.1
    };
    let is_next = |pair: &[_]| match pair {
        [(listen, connect), (next_listen, next_connect)] => {
            follows(listen, next_listen) && follows(connect, next_connect)
        }
        _ => false,
    };
    all.len() > 1 && all.windows(2).all(is_next)
}

/// Returns whether a text is a decimal number.
pub(super) fn is_number(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_digit())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_range_stands_where_a_port_does() {
        for (text, first, last) in [
            ("8000-8002", "8000", "8002"),
            ("[::1]:8000-8002", "[::1]:8000", "[::1]:8002"),
            ("my-host:1-2", "my-host:1", "my-host:2"),
            ("tcp://*:8000-8002", "tcp://*:8000", "tcp://*:8002"),
            ("TCP6://[::1]:1-2", "TCP6://[::1]:1", "TCP6://[::1]:2"),
            (
                "vsock://3:80-82?framing=yes",
                "vsock://3:80?framing=yes",
                "vsock://3:82?framing=yes",
            ),
            (
                "vsock-mux://:80-82/run/a:1-2",
                "vsock-mux://:80/run/a:1-2",
                "vsock-mux://:82/run/a:1-2",
            ),
            (
                "hyperkit://4:80-82/vm",
                "hyperkit://4:80/vm",
                "hyperkit://4:82/vm",
            ),
            (
                "hvsock://parent/80-82?framing=yes",
                "hvsock://parent/80?framing=yes",
                "hvsock://parent/82?framing=yes",
            ),
        ] {
            let all = expand(text, BarePort::Tcp).unwrap();
            let ends = [all.first(), all.last()].map(Option::unwrap);
            assert_eq!(ends, [first, last], "{text}");
        }
    }

    #[test]
    fn what_is_no_range_stays_as_it_is() {
        for text in [
            "8000",
            "/run/a:1-2",
            "unix:1-2",
            "unix:///run/a:1-2",
            "exec:/bin/a?arg=b:1-2",
            "tcp://1-2",
            "tcp://[::1]",
            "hyperkit://:80/vm/a:1-2",
            "hvsock://parent/12345678-1234-1234-1234-123456789abc",
            r"\\.\pipe\a:1-2",
            "web-1",
        ] {
            assert_eq!(
                expand(text, BarePort::Tcp),
                Ok(vec![text.to_owned()]),
                "{text}"
            );
        }
    }

    #[test]
    fn what_a_range_can_not_be_is_told() {
        let why = |text, bare| expand(text, bare).unwrap_err();
        let too_large = "the range 21000-99999 ends above 65535, the largest port of TCP";
        let too_many = "the range 21000-99999 has more than 4096 ports";
        assert_eq!(why("21000-99999", BarePort::Tcp), too_large);
        assert_eq!(why("127.0.0.1:21000-99999", BarePort::Tcp), too_large);
        assert_eq!(why("tcp://[::1]:21000-99999", BarePort::Vsock), too_large);
        assert_eq!(why("21000-99999", BarePort::Vsock), too_many);
        assert_eq!(why("vsock://3:21000-99999", BarePort::Tcp), too_many);
        assert!(why("9-7", BarePort::Tcp).contains("write 7-9"));
        assert!(why("9-", BarePort::Tcp).contains("has no end"));
        assert!(expand("70000-70001", BarePort::Vsock).is_ok());
    }

    #[cfg(unix)]
    #[test]
    fn what_has_a_gap_or_another_target_is_no_range() {
        let are = |forwards: &[(&str, &str)]| {
            let parse = |text: &str| text.parse::<Address>().unwrap();
            let all = forwards
                .iter()
                .map(|(listen, to)| (parse(listen), parse(to)));
            let all: Vec<_> = all.collect();
            are_a_range(
                &all.iter()
                    .map(|(listen, to)| (listen, to))
                    .collect::<Vec<_>>(),
            )
        };
        let (first, second) = (
            ("tcp://[::1]:80", "vsock://3:8"),
            ("tcp://[::1]:81", "vsock://3:9"),
        );
        assert!(are(&[first, second]));
        assert!(are(&[second, ("tcp://[::1]:82", "vsock://3:10"), first]));
        for other in [
            first,
            ("tcp://[::1]:82", "vsock://3:10"),
            ("tcp://[::1]:81", "vsock://3:8"),
            ("tcp://[::1]:81", "vsock://4:9"),
            ("tcp://127.0.0.1:81", "vsock://3:9"),
            ("tcp://[::1]:81", "unix:///run/a"),
        ] {
            assert!(!are(&[first, other]), "{other:?}");
        }
        assert!(!are(&[first]) && !are(&[]));
    }

    #[test]
    fn a_range_is_written_as_it_was_read() {
        for text in [
            "tcp://127.0.0.1:8000-8002",
            "tcp://[::1]:8000-8002",
            "vsock-mux://:80-82/run/a",
            "unix:///run/a",
        ] {
            let all = parse_addresses(text).unwrap();
            assert_eq!(join(&all[0], &all[all.len() - 1]), text);
        }
        let one = parse_addresses("hyperkit://:80/vm").unwrap();
        assert_eq!(name_of("web", &one[0]), "web-80");
    }
}
