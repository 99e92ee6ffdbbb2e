//! What holds for all addresses, tried with addresses that nobody thought of.
#![allow(clippy::unwrap_used)]

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::sys::os_string_from_bytes;

/// File names as hostile as the system has them.
fn path() -> impl Strategy<Value = PathBuf> {
    let awkward = prop::sample::select(vec![
        "/",
        "/.",
        "/./",
        "./",
        ".",
        "..",
        "//",
        "@",
        "%",
        "%2F",
        "?",
        "#",
        " ",
        "vsock://3:80/",
        "unix:",
        "tcp://",
        "a",
        "\u{202e}",
        "\n",
        ":",
        "&connect=x",
    ])
    .prop_map(|s| s.as_bytes().to_vec());
    let piece = prop_oneof![3 => awkward, 1 => prop::collection::vec(1u8.., 0..4)];
    prop::collection::vec(piece, 1..5)
        .prop_map(|pieces| pieces.concat())
        .prop_filter("a path", |path| !path.is_empty() && path != b"/")
        .prop_filter_map("a file name here", |path| {
            os_string_from_bytes(path).ok().map(PathBuf::from)
        })
}

/// A name of any characters but NUL.
fn name() -> impl Strategy<Value = String> {
    let known = prop::sample::select(vec![
        "parent",
        "Loopback",
        "any",
        "127.0.0.1",
        "::1",
        "fe80::1%en0",
        "fe80::1%25",
        "FE80::1%x",
        "90db8b89-0d35-4f79-8ce9-49ea0ac8b7cd",
        "{90db8b89-0d35-4f79-8ce9-49ea0ac8b7cd}",
        "a:80",
        "%70arent",
        "[::1]",
        "münchen.de",
        "user@host",
    ])
    .prop_map(str::to_owned);
    prop_oneof![known, "[^\0]{1,12}"]
}

fn file_name() -> impl Strategy<Value = String> {
    "[^/\0]{1,8}".prop_filter("not a directory's", |name| name != "." && name != "..")
}

fn port() -> impl Strategy<Value = Port> {
    prop_oneof![Just(0), Just(u32::MAX), any::<u32>()].prop_map(Port)
}

fn guid() -> impl Strategy<Value = Uuid> {
    let known = vec![
        VmId::WILDCARD.0,
        VmId::BROADCAST.0,
        VmId::CHILDREN.0,
        VmId::LOOPBACK.0,
        VmId::PARENT.0,
        VmId::SILOHOST.0,
        ServiceId::VSOCK_TEMPLATE.0,
    ];
    prop_oneof![
        prop::sample::select(known),
        any::<u128>().prop_map(Uuid::from_u128)
    ]
}

fn vm() -> impl Strategy<Value = HyperkitVm> {
    let cid = prop_oneof![Just(3), Just(u32::MAX - 1), 3..u32::MAX];
    let connect = prop_oneof![Just("connect".to_owned()), file_name()];
    let prefix = prop_oneof![Just(String::new()), "[^/\0]{0,4}"];
    (path(), cid, connect, prefix).prop_map(|(state_dir, cid, connect, prefix)| HyperkitVm {
        state_dir,
        cid,
        connect,
        prefix,
    })
}

/// What a program may get as an argument.
fn argument() -> impl Strategy<Value = OsString> {
    let known = prop::sample::select(vec![
        "", "-i", "a=b", "&arg=c", "?x", "#", "%2F", "=", "a b",
    ]);
    let bytes = prop::collection::vec(1u8.., 0..5);
    prop_oneof![
        known.prop_map(OsString::from),
        bytes.prop_filter_map("a text here", |bytes| os_string_from_bytes(bytes).ok()),
    ]
}

fn exec() -> impl Strategy<Value = ExecAddress> {
    let name = "[^\0=]{1,4}".prop_map(OsString::from);
    let args = prop::collection::vec(argument(), 0..4);
    let env = prop::collection::vec((name, argument()), 0..3);
    (path(), args, env, any::<bool>()).prop_map(|(program, args, env, pty)| ExecAddress {
        program,
        args,
        env,
        pty,
    })
}

fn address() -> impl Strategy<Value = Address> {
    let hvsock_vm = prop_oneof![
        guid().prop_map(|id| Vm::Id(VmId(id))),
        name().prop_map(Vm::Name)
    ];
    let service = prop_oneof![
        guid().prop_map(ServiceId),
        port().prop_map(ServiceId::from_port)
    ];
    let unix = prop_oneof![
        path().prop_map(UnixAddress::Path),
        prop::collection::vec(any::<u8>(), 1..9).prop_map(UnixAddress::Abstract),
    ];
    let pipe = prop::collection::vec("[^\0/\\\\]{1,5}", 1..3)
        .prop_map(|parts| parts.join("/"))
        .prop_filter("a pipe's name", |name| {
            !name.split('/').any(|part| matches!(part, "." | ".."))
        });
    let sddl = proptest::option::of("[^\0]{1,8}");
    let host = prop_oneof![
        any::<IpAddr>().prop_map(Host::Ip),
        name().prop_map(Host::Name),
        Just(Host::Any)
    ];
    let family = prop_oneof![
        Just(IpFamily::Either),
        Just(IpFamily::V4),
        Just(IpFamily::V6)
    ];
    prop_oneof![
        (vm(), port()).prop_map(|(vm, port)| HyperkitAddress { vm, port }.into()),
        (
            port(),
            port(),
            proptest::option::of(128..u64::MAX),
            any::<bool>()
        )
            .prop_map(|(cid, port, buffer_size, framing)| {
                let cid = cid.0;
                VsockAddress {
                    cid,
                    port,
                    buffer_size,
                    framing,
                }
                .into()
            }),
        (hvsock_vm, service, any::<[bool; 3]>()).prop_map(
            |(vm, service, [connected_suspend, container_passthru, framing])| {
                HvsockAddress {
                    vm,
                    service,
                    connected_suspend,
                    container_passthru,
                    framing,
                }
                .into()
            }
        ),
        (path(), port(), any::<bool>()).prop_map(|(path, port, half_close)| {
            let address = VsockMuxAddress {
                path,
                port,
                half_close,
            };
            address.into()
        }),
        unix.prop_map(Address::Unix),
        (pipe, sddl).prop_map(|(name, sddl)| NpipeAddress { name, sddl }.into()),
        (host, any::<u16>(), family).prop_map(|(host, port, family)| {
            // An address is of one family, and a name may be an address with its zone.
            let family = match &host {
                Host::Ip(_) => IpFamily::Either,
                Host::Name(name) if name.contains('%') => IpFamily::Either,
                _ => family,
            };
            TcpAddress { host, port, family }.into()
        }),
        exec().prop_map(Address::Exec),
        path().prop_map(|path| FileAddress { path }.into()),
    ]
}

/// The path in an address, in which `==` overlooks `//` and `/./`.
fn exact_path(address: &Address) -> Option<OsString> {
    match address {
        Address::Hyperkit(address) => Some(address.vm.state_dir.clone().into()),
        Address::VsockMux(address) => Some(address.path.clone().into()),
        Address::Unix(UnixAddress::Path(path)) => Some(path.clone().into()),
        Address::Exec(address) => Some(address.program.clone().into()),
        Address::File(address) => Some(address.path.clone().into()),
        _ => None,
    }
}

/// A text close enough to an address to get past the first checks.
fn nearly_address() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "hyperkit",
        "vsock",
        "hvsock",
        "vsock-mux",
        "unix",
        "tcp",
        "tcp4",
        "tcp6",
        "npipe",
        "exec",
        "file",
        "arg=",
        "env=a=",
        "pipe",
        "//./pipe/",
        "\\",
        "sddl",
        ":",
        "//",
        "/",
        "/.",
        "@",
        "?",
        "#",
        "&",
        "=",
        "connect",
        "prefix",
        "%",
        "%0",
        "%00",
        "%ff",
        "[",
        "]",
        "::1",
        "0x",
        "80",
        "-",
        "99999999999999999999999",
        "{",
        "é",
        "parent",
        "any",
    ]);
    prop::collection::vec(piece, 0..10).prop_map(|pieces| pieces.concat())
}

/// A text that has the form of an address, with parts as people, and those who mean ill, write
/// them.
fn formed_address() -> impl Strategy<Value = String> {
    let text = |parts: &'static [&'static str]| prop::sample::select(parts);
    let scheme = text(&[
        "hyperkit://",
        "HyperKit://",
        "vsock://",
        "VSOCK://",
        "hvsock://",
        "vsock-mux://",
        "unix:",
        "UNIX://",
        "unix:@",
        "npipe://",
        "tcp://",
        "exec:",
        "exec://",
        "file:",
        "",
        "./",
        "//./pipe/",
        "\\\\.\\pipe\\",
    ]);
    let host = text(&[
        "",
        "3",
        "0x3",
        "any",
        "LOCAL",
        "parent",
        "%70arent",
        "Parent",
        "{90DB8B89-0D35-4F79-8CE9-49EA0AC8B7CD}",
        "a.b",
        "A%2eb",
        "127.0.0.1",
        "%31%32%37.0.0.1",
        "[::1]",
        "[::ffff:1.2.3.4]",
        "[::1%25]",
        "[::1%2525]",
        "[FE80::1%25en0]",
        "[fe80::1%25%5D]",
        "%5B::1%5D",
        "::1",
        "fe80::1%25en0",
        "%3A%3A1",
        "fe80%3A%3A1%25x",
        "m\u{fc}nchen",
        ".",
        "..",
        "%2E",
        "user%40host",
        "a%3A80",
        "4294967295",
        "0",
    ]);
    let port = text(&[
        "",
        ":80",
        ":0x50",
        ":0X50",
        ":0",
        ":4294967295",
        ":65535",
        ":",
    ]);
    let part = text(&[
        "/",
        "/",
        "//",
        "/.",
        "/./",
        "/..",
        "./",
        ".",
        "%2F",
        "%2f",
        "%2E",
        "%2e%2e",
        "%5C",
        "\\",
        "a",
        "A",
        "%41",
        "%00",
        "%FF",
        "%C3%BC",
        "\u{fc}",
        "%",
        "%25",
        "@",
        "%40",
        "~",
        "pipe",
        "PIPE/",
        "/pipe/a",
        " ",
        "%20",
        "%0A",
        "80",
        "/80",
        "0x50",
        "/90db8b89-0d35-4f79-8ce9-49ea0ac8b7cd",
        "00000050-FACB-11E6-BD58-64006A7986D3",
        ":",
        "?",
        "#",
        "&",
        "=",
        "[",
        "{",
    ]);
    let pair = text(&[
        "connect=a",
        "connect=%40connect",
        "connect=connect",
        "connect=.",
        "connect=",
        "connect",
        "prefix=%40",
        "prefix=",
        "prefix=a%26b",
        "buffer-size=128",
        "buffer-size=0x100",
        "framing=yes",
        "framing=no",
        "half-close=yes",
        "half-close=no",
        "sddl=D:P(A;;GA;;;BA)",
        "sddl=%44%3AP",
        "sddl=a=b",
        "connected-suspend=yes",
        "container-passthru=yes",
        "",
        "x=y",
        "?",
        "arg=",
        "arg=%FF",
        "arg=a=%26b",
        "env=a=b=",
        "env=%3D=",
        "env=a",
        "pty=yes",
        "pty=no",
    ]);
    let path = prop::collection::vec(part, 0..6).prop_map(|parts| parts.concat());
    let query = prop_oneof![2 => Just(Vec::new()), 1 => prop::collection::vec(pair, 1..4)]
        .prop_map(|pairs| match pairs.is_empty() {
            true => String::new(),
            false => format!("?{}", pairs.join("&")),
        });
    let begun = text(&[
        "hyperkit://:80",
        "hyperkit://",
        "vsock-mux://:80",
        "unix:",
        "unix://",
        "unix:@",
        "npipe://",
        "npipe:////./pipe",
        "hvsock://vm",
        "tcp://a:80",
        "exec:",
        "exec:.",
        "file:",
        "file:/",
        "vsock://:80",
    ])
    .prop_map(str::to_owned);
    let put_together =
        (scheme, host, port).prop_map(|(scheme, host, port)| format!("{scheme}{host}{port}"));
    // What means something in a path, closer together.
    let few = prop::collection::vec(
        text(&[
            "/./", "/", "/", ".", "%2F", "%2E", "a", "@", "%40", "\\", "%5C",
        ]),
        1..5,
    )
    .prop_map(|parts| parts.concat());
    (
        prop_oneof![begun, put_together],
        prop_oneof![few, path],
        query,
    )
        .prop_map(|(begun, path, query)| format!("{begun}{path}{query}"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn printing_then_parsing_gives_the_same(address in address()) {
        let printed = address.to_string();
        let parsed: Address = printed.parse().unwrap();
        prop_assert_eq!(exact_path(&parsed), exact_path(&address), "{}", printed);
        prop_assert_eq!(&parsed, &address, "{}", printed);
        prop_assert_eq!(printed.split(':').next(), Some(address.scheme()));
        prop_assert!(!printed.contains(|c: char| c.is_control() || c == ' '), "{}", printed);
    }

    #[test]
    fn printing_then_parsing_gives_the_same_vm(vm in vm()) {
        let printed = vm.to_string();
        let parsed: HyperkitVm = printed.parse().unwrap();
        prop_assert_eq!(parsed.state_dir.as_os_str(), vm.state_dir.as_os_str());
        prop_assert_eq!(parsed, vm);
    }

    #[test]
    fn no_input_panics_and_errors_are_one_line(text in prop_oneof![".*", "(?s).{0,40}", nearly_address()]) {
        for error in [text.parse::<Address>().err(), text.parse::<HyperkitVm>().err()].into_iter().flatten() {
            prop_assert!(!error.to_string().contains(char::is_control));
            prop_assert!(error.example().parse::<Address>().is_ok() || error.example().parse::<HyperkitVm>().is_ok(), "{}", error);
        }
        let _ = text.parse::<Port>();
    }

    #[test]
    fn a_plain_path_is_taken_as_it_is(start in prop::sample::select(vec!["/", "./", "../"]), rest in "[^\0]{0,20}") {
        let path = format!("{start}{rest}");
        prop_assume!(!path.to_ascii_lowercase().starts_with("//./pipe/"));
        let address: Address = path.parse().unwrap();
        prop_assert_eq!(exact_path(&address), Some(OsString::from(path)));
    }

    #[test]
    fn a_service_id_keeps_its_port(port in port()) {
        prop_assert_eq!(ServiceId::from_port(port).port(), Some(port));
    }
}

proptest! {
    // Texts of many parts: few of them parse.
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_parses_prints_as_what_parses_to_the_same(text in prop_oneof![nearly_address(), formed_address()]) {
        if let Ok(address) = text.parse::<Address>() {
            let printed = address.to_string();
            let parsed = printed.parse::<Address>();
            prop_assert_eq!(parsed.as_ref(), Ok(&address), "{} printed as {}", text, printed);
            prop_assert_eq!(parsed.ok().and_then(|it| exact_path(&it)), exact_path(&address), "{}", printed);
            prop_assert!(!printed.contains(|c: char| c.is_control() || c == ' '), "{}", printed);
        }
        if let Ok(vm) = text.parse::<HyperkitVm>() {
            prop_assert_eq!(vm.to_string().parse::<HyperkitVm>(), Ok(vm), "{}", text);
        }
    }
}
