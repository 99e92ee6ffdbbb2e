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
        name().prop_map(Host::Name)
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
        (host, any::<u16>()).prop_map(|(host, port)| TcpAddress { host, port }.into()),
    ]
}

/// The path in an address, in which `==` overlooks `//` and `/./`.
fn exact_path(address: &Address) -> Option<OsString> {
    match address {
        Address::Hyperkit(address) => Some(address.vm.state_dir.clone().into()),
        Address::VsockMux(address) => Some(address.path.clone().into()),
        Address::Unix(UnixAddress::Path(path)) => Some(path.clone().into()),
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
        "npipe",
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
    fn what_parses_prints_as_what_parses_to_the_same(text in nearly_address()) {
        if let Ok(address) = text.parse::<Address>() {
            prop_assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
        }
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
