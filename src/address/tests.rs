//! Single addresses, right and wrong, to the letter.
#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn right_addresses_print_in_one_form() {
    for (input, printed) in [
        ("hyperkit://:80/state", "hyperkit://:80/state"),
        ("hyperkit://3:0x50/state", "hyperkit://:80/state"),
        ("HYPERKIT://4:0X50/a/b", "hyperkit://4:80/a/b"),
        ("hyperkit://:80/./vms/0", "hyperkit://:80/./vms/0"),
        ("hyperkit://:80/.", "hyperkit://:80/./."),
        ("hyperkit://:80/John Doe/vm", "hyperkit://:80/John%20Doe/vm"),
        (
            "hyperkit://:80/d?prefix=@&connect=@connect",
            "hyperkit://:80/d?connect=%40connect&prefix=%40",
        ),
        (
            "hyperkit://:80/d?connect=connect&prefix=",
            "hyperkit://:80/d",
        ),
        ("vsock://:1024", "vsock://:1024"),
        ("vsock://any:1024/", "vsock://:1024"),
        ("vsock://4294967295:1", "vsock://:1"),
        ("vsock://hypervisor:1", "vsock://0:1"),
        ("vsock://local:1", "vsock://1:1"),
        ("vsock://Host:1", "vsock://2:1"),
        ("vsock://0x3:0xffffffff", "vsock://3:4294967295"),
        (
            "vsock://:7/?buffer-size=1048576",
            "vsock://:7?buffer-size=1048576",
        ),
        (
            "hvsock://parent/00000050-facb-11e6-bd58-64006a7986d3",
            "hvsock://parent/80",
        ),
        ("hvsock:///0x50/", "hvsock:///80"),
        (
            "hvsock://A42E7CDA-D03F-480C-9CC2-A4DE20ABB878/80",
            "hvsock://parent/80",
        ),
        (
            "hvsock://{00000000-0000-0000-0000-000000000001}/{3049197C-9A4E-4FBF-9367-97F792F16994}",
            "hvsock://00000000-0000-0000-0000-000000000001/3049197c-9a4e-4fbf-9367-97f792f16994",
        ),
        ("hvsock://My VM/80", "hvsock://My%20VM/80"),
        ("hvsock://%70arent/80", "hvsock://%70arent/80"),
        (
            "hvsock://parent/80/?container-passthru=yes&connected-suspend=yes",
            "hvsock://parent/80?connected-suspend=yes&container-passthru=yes",
        ),
        (
            "hvsock://parent/80?connected-suspend=no",
            "hvsock://parent/80",
        ),
        ("vsock-mux://:52/run/vm.sock", "vsock-mux://:52/run/vm.sock"),
        ("vsock-mux://:52/./vm.sock", "vsock-mux://:52/./vm.sock"),
        ("unix:///run/x", "unix:///run/x"),
        ("unix:/run/x", "unix:///run/x"),
        ("unix:x", "unix:x"),
        ("unix:./x", "unix:./x"),
        ("unix:@name", "unix:@name"),
        ("unix:%40name", "unix:%40name"),
        ("/run/a b%20?#", "unix:///run/a%20b%2520%3F%23"),
        ("./vsock://3:80", "unix:./vsock://3:80"),
        ("../x", "unix:../x"),
        (
            "npipe:////./pipe/docker_engine",
            "npipe:////./pipe/docker_engine",
        ),
        ("npipe://./pipe/a", "npipe:////./pipe/a"),
        (r"npipe://\\.\pipe\a", "npipe:////./pipe/a"),
        ("NPIPE:////./PIPE/a%20b", "npipe:////./pipe/a%20b"),
        ("//./pipe/a b%20?#", "npipe:////./pipe/a%20b%2520%3F%23"),
        (r"\\.\Pipe\a\b", "npipe:////./pipe/a/b"),
        (
            "npipe:////./pipe/a?sddl=D:P(A;;GA;;;BA)",
            "npipe:////./pipe/a?sddl=D%3AP%28A%3B%3BGA%3B%3B%3BBA%29",
        ),
        ("//./pip", "unix:////./pip"),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0"),
        ("tcp://[::1]:65535/", "tcp://[::1]:65535"),
        ("tcp://[0:0::1]:1", "tcp://[::1]:1"),
        ("tcp://[FE80::1%en0]:1", "tcp://[fe80::1%25en0]:1"),
        ("tcp://[fe80::1%25en0]:1", "tcp://[fe80::1%25en0]:1"),
        ("tcp://[fe80::1%25]:1", "tcp://[fe80::1%2525]:1"),
        ("tcp://db-1.example:0x50", "tcp://db-1.example:80"),
        ("tcp://*:80", "tcp://*:80"),
        ("tcp://%2A:80", "tcp://%2A:80"),
        ("TCP4://*:80/", "tcp4://*:80"),
        ("tcp4://127.0.0.1:80", "tcp4://127.0.0.1:80"),
        ("tcp6://[0:0::1]:80", "tcp6://[::1]:80"),
        ("tcp6://[fe80::1%en0]:1", "tcp6://[fe80::1%25en0]:1"),
        ("tcp6://localhost:0", "tcp6://localhost:0"),
    ] {
        let address: Address = input.parse().unwrap();
        assert_eq!(address.to_string(), printed, "{input}");
    }
}

#[test]
fn vms_print_in_one_form() {
    for (input, printed) in [
        (
            "hyperkit:///s/d?connect=@connect",
            "hyperkit:///s/d?connect=%40connect",
        ),
        ("hyperkit://4/state/dir", "hyperkit://4/state/dir"),
        ("hyperkit:///./rel", "hyperkit:///./rel"),
    ] {
        assert_eq!(input.parse::<HyperkitVm>().unwrap().to_string(), printed);
    }
}

#[test]
fn ports_read_both_notations_and_print_both() {
    assert_eq!("80".parse(), Ok(Port(80)));
    assert_eq!("0x50".parse(), Ok(Port(80)));
    assert_eq!("0X00000050".parse(), Ok(Port(80)));
    assert_eq!(Port(80).to_string(), "80 (0x50)");
    assert_eq!(format!("{:>12}", Port(80)), "   80 (0x50)");
    for (input, message) in [
        ("", "port is missing"),
        ("-1", r#"port "-1" is not a number (80, or 0x50 in hex)"#),
        ("+1", r#"port "+1" is not a number (80, or 0x50 in hex)"#),
        (" 1", r#"port " 1" is not a number (80, or 0x50 in hex)"#),
        ("0x", r#"port "0x" is not a number (80, or 0x50 in hex)"#),
        (
            "0x+1",
            r#"port "0x+1" is not a number (80, or 0x50 in hex)"#,
        ),
        ("1_0", r#"port "1_0" is not a number (80, or 0x50 in hex)"#),
        (
            "4294967296",
            r#"port "4294967296" is larger than 4294967295"#,
        ),
        (
            "00000050",
            r#"port "00000050" starts with 0: write 50, or 0x50 if it is hex"#,
        ),
        (
            "00",
            r#"port "00" starts with 0: write 0, or 0x0 if it is hex"#,
        ),
    ] {
        assert_eq!(input.parse::<Port>().unwrap_err().to_string(), message);
    }
}

#[test]
fn well_known_ids_are_microsofts() {
    for (id, text) in [
        (VmId::WILDCARD, "00000000-0000-0000-0000-000000000000"),
        (VmId::BROADCAST, "ffffffff-ffff-ffff-ffff-ffffffffffff"),
        (VmId::CHILDREN, "90db8b89-0d35-4f79-8ce9-49ea0ac8b7cd"),
        (VmId::LOOPBACK, "e0e16197-dd56-4a10-9195-5ee7a155a838"),
        (VmId::PARENT, "a42e7cda-d03f-480c-9cc2-a4de20abb878"),
        (VmId::SILOHOST, "36bd0c5c-7276-4223-88ba-7d03b654c568"),
    ] {
        assert_eq!(id.to_string(), text);
    }
    assert_eq!(
        ServiceId::from_port(Port(0x1234_5678)).0.to_string(),
        "12345678-facb-11e6-bd58-64006a7986d3"
    );
}

#[test]
fn bad_addresses_say_what_is_wrong_and_what_is_right() {
    const KNOWN: &str =
        "(known: hyperkit, vsock, hvsock, vsock-mux, unix, npipe, tcp, tcp4, tcp6, exec, file)";
    let no_number = "is not a number (80, or 0x50 in hex)";
    let vsock = "; a right one: vsock://3:1024";
    let hyperkit = "; a right one: hyperkit://:80/path/to/state";
    let tcp = "; a right one: tcp://127.0.0.1:8080";
    let hvsock = "; a right one: hvsock://parent/1024";
    let mux = "; a right one: vsock-mux://:1024/run/vm.sock";
    let unix = "; a right one: unix:///run/service.sock";
    let npipe = "; a right one: npipe:////./pipe/docker_engine";
    for (input, message) in [
        ("", format!("it is empty{tcp}")),
        ("minikube", format!("scheme is missing {KNOWN}{tcp}")),
        ("8080", format!("scheme is missing {KNOWN}{tcp}")),
        (":81", format!("scheme is missing {KNOWN}; a right one: tcp://127.0.0.1:81")),
        ("db:81", format!("scheme is missing {KNOWN}; a right one: tcp://db:81")),
        ("[::1]:81", format!("scheme is missing {KNOWN}; a right one: tcp://[::1]:81")),
        ("::1:81", format!("scheme is missing {KNOWN}; a right one: tcp://[::1]:81")),
        ("tcp4://[::1]:81", r#"host "[::1]" is of the other family of IP; a right one: tcp4://*:8080"#.to_owned()),
        ("tcp6://[fe80::1%lo]", "port is missing; a right one: tcp6://*:8080".to_owned()),
        ("tcp6://10.0.0.1:81", r#"host "10.0.0.1" is of the other family of IP; a right one: tcp6://*:8080"#.to_owned()),
        ("run/x.sock", format!("scheme is missing {KNOWN}; a right one: unix:./run/x.sock")),
        ("http://x", format!(r#"scheme "http" is unknown {KNOWN}{tcp}"#)),
        ("hyper-kit://:80/x", format!(r#"scheme "hyper-kit" is unknown {KNOWN}{hyperkit}"#)),
        ("hyper-kit:", format!(r#"scheme "hyper-kit" is unknown {KNOWN}{hyperkit}"#)),
        ("vsock:3:80", format!(r#"scheme "vsock" wants :// behind it{vsock}"#)),
        ("vsock://3:99999999999", format!(r#"port "99999999999" is larger than 4294967295{vsock}"#)),
        ("vsock://3", format!("port is missing{vsock}")),
        ("vsock://3:", format!("port is missing{vsock}")),
        ("vsock://3:-1", format!(r#"port "-1" {no_number}{vsock}"#)),
        ("vsock://4294967296:1", format!(r#"cid "4294967296" is larger than 4294967295{vsock}"#)),
        ("vsock://guest:1", format!(r#"cid "guest" is neither a number nor any, hypervisor, local or host{vsock}"#)),
        ("vsock://3:1/x", format!(r#"path "/x" is not taken here{vsock}"#)),
        ("vsock://3:1?x=y", format!(r#"query "x" is unknown (known: buffer-size, framing){vsock}"#)),
        ("vsock://3:1?buffer-size=127", format!(r#"query "buffer-size" is a number of bytes, at least 128{vsock}"#)),
        ("vsock://3:1?buffer-size=1M", format!(r#"query "buffer-size" is a number of bytes, at least 128{vsock}"#)),
        ("vsock://3:1#x", format!(r#"fragment "x" means nothing here (a # in a name is written %23){vsock}"#)),
        ("hyperkit:///x", format!("port is missing{hyperkit}")),
        ("hyperkit://:80", format!("path to the VM's state directory is missing{hyperkit}")),
        ("hyperkit://:80/", format!("path to the VM's state directory is missing{hyperkit}")),
        ("hyperkit://2:80/x", format!(r#"cid "2" is no guest's (3 to 4294967294){hyperkit}"#)),
        ("hyperkit://:80/a%", format!(r#"path "/a%" has a % without two hex digits (a % itself is written %25){hyperkit}"#)),
        ("hyperkit://:80/a%00", format!(r#"path "/a%00" has a NUL{hyperkit}"#)),
        ("hyperkit://:80/d?conect=x", format!(r#"query "conect" is unknown (known: connect, prefix){hyperkit}"#)),
        ("hyperkit://:80/d?connect=", format!(r#"query "connect" wants the name of a socket{hyperkit}"#)),
        ("hyperkit://:80/d?connect=a%2Fb", format!(r#"query "connect" is part of a file name: no / and no NUL{hyperkit}"#)),
        ("hyperkit://:80/d?prefix=a&prefix=b", format!(r#"query "prefix" stands there twice{hyperkit}"#)),
        ("hyperkit://:80/d?prefix=%FF", format!(r#"query "prefix=%FF" is not UTF-8 when decoded{hyperkit}"#)),
        ("hvsock://parent", format!("service is missing{hvsock}")),
        ("hvsock://parent/x", format!(r#"service "x" is neither a GUID nor a port{hvsock}"#)),
        ("hvsock://parent/4294967296", format!(r#"service "4294967296" is larger than 4294967295{hvsock}"#)),
        ("hvsock://parent/80?connected-suspend=1", format!(r#"query "connected-suspend" is yes or no{hvsock}"#)),
        ("hvsock://parent/80?suspend=yes", format!(r#"query "suspend" is unknown (known: connected-suspend, container-passthru, framing){hvsock}"#)),
        ("hvsock://%00/80", format!(r#"vm "%00" has a NUL{hvsock}"#)),
        ("vsock-mux://3:80/x", format!(r#"cid "3" is not taken here: the socket is one VM's{mux}"#)),
        ("vsock-mux://:80", format!("path of the VM's Unix socket is missing{mux}")),
        ("vsock-mux://:80/.//", format!(r#"path "/.//" of the VM's Unix socket is missing{mux}"#)),
        ("vsock-mux://:80/x?y=z", format!(r#"query "y" is unknown (known: half-close){mux}"#)),
        ("unix:", format!("path is missing{unix}")),
        ("unix://", r#"path is missing; a right one: unix:///run/service.sock"#.to_owned()),
        ("unix:@", format!(r#"path "@" has no name behind @{unix}"#)),
        ("unix://run/x", r#"path "run/x" stands where a host would: an absolute path has three slashes, a relative one none; a right one: unix:run/x"#.to_owned()),
        ("unix:/a?b", format!(r#"query "b" is not taken here (a ? in a name is written %3F){unix}"#)),
        ("/a\0b", format!(r#"path has a NUL{unix}"#)),
        ("npipe://", format!("path is missing{npipe}")),
        ("npipe:a", format!(r#"scheme "npipe" wants :// behind it{npipe}"#)),
        ("npipe:////./pipe/", format!(r#"path "//./pipe/" has no name behind //./pipe/{npipe}"#)),
        ("npipe:////srv/pipe/a", format!(r#"path "//srv/pipe/a" is no pipe of this machine, which begins with //./pipe/{npipe}"#)),
        (r"\\srv\pipe\a", format!(r#"path "\\\\srv\\pipe\\a" is no pipe of this machine, which begins with //./pipe/{npipe}"#)),
        ("npipe://a", format!(r#"path "a" is no pipe's: it wants //./pipe/ before its name{npipe}"#)),
        ("//./pipe/../C:/x", format!(r#"path "//./pipe/../C:/x" has an empty part, or one that is . or ..{npipe}"#)),
        ("npipe:////./pipe/a%2F%2e.%5Cb", format!(r#"path "//./pipe/a%2F%2e.%5Cb" has an empty part, or one that is . or ..{npipe}"#)),
        ("npipe:////./pipe/a?mode=600", format!(r#"query "mode" is unknown (known: sddl){npipe}"#)),
        ("npipe:////./pipe/a?sddl=", format!(r#"query "sddl" wants a security descriptor, as in D:P(A;;GA;;;BA){npipe}"#)),
        ("tcp://db", format!("port is missing{tcp}")),
        ("tcp://[::1]", format!("port is missing{tcp}")),
        ("tcp://:80", format!("host is missing (localhost is this machine alone, * any network){tcp}")),
        ("tcp://db:65536", format!(r#"port "65536" is larger than 65535{tcp}"#)),
        ("tcp://::1:80", r#"host "::1:80" is an IPv6 address without its brackets; a right one: tcp://[::1]:80"#.to_owned()),
        ("tcp://fe80::1", r#"host "fe80::1" is an IPv6 address without its brackets; a right one: tcp://[fe80::1]:8080"#.to_owned()),
        ("tcp://::", r#"host "::" is an IPv6 address without its brackets; a right one: tcp://[::]:8080"#.to_owned()),
        ("tcp://[1.2.3.4]:80", format!(r#"host "[1.2.3.4]" is no IPv6 address{tcp}"#)),
        ("tcp://a b:80", format!(r#"host "a b" has ' ' in it{tcp}"#)),
        ("tcp://me@db:80", format!(r#"host "me@db" has '@' in it{tcp}"#)),
    ] {
        let error = input.parse::<Address>().unwrap_err();
        assert_eq!(error.to_string(), format!("bad address {input:?}: {message}"));
    }
}

#[test]
fn a_bad_vm_is_told_apart_from_a_bad_address() {
    let error = "hyperkit://:80/x".parse::<HyperkitVm>().unwrap_err();
    assert_eq!(error.part(), Part::Port);
    assert_eq!(
        error.to_string(),
        r#"bad address "hyperkit://:80/x": port "80" is not taken here: only the VM is named; a right one: hyperkit:///path/to/state"#
    );
    let error = "hyperkit://".parse::<HyperkitVm>().unwrap_err();
    assert_eq!(error.part(), Part::Path);
    assert_eq!(error.example(), "hyperkit:///path/to/state");
}

#[test]
fn control_characters_do_not_reach_a_terminal() {
    let error = "vsock://\u{1b}[2J\n:80".parse::<Address>().unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"bad address "vsock://\u{1b}[2J\n:80": cid "\u{1b}[2J\n" is not a number (80, or 0x50 in hex); a right one: vsock://3:1024"#
    );
}
