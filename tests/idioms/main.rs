//! The words of other programs and ours, as the guide's page on them has them side by side. Each
//! line of its tables is a test, which runs the command that stands there, in a network of its own,
//! and compares what a client sees with what it sees of the other program, where that is installed.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod apart;
#[path = "../common/mod.rs"]
mod common;
mod place;
mod program;
mod proxies;
mod seen;
mod socat;
mod table;
mod vms;
mod vsock;

/// Makes a test of each: its name, words that only its line has in the first column, and what it
/// does.
macro_rules! lines {
    ($($name:ident: $key:literal => $run:path;)*) => {
        const KEYS: &[&str] = &[$($key),*];

        $(
            #[test]
            fn $name() {
                if apart::is_apart(stringify!($name)) {
                    $run(&table::find($key));
                }
            }
        )*
    };
}

lines! {
    socat_tcp_to_unix: "socat TCP-LISTEN:8080,bind=127.0.0.1,fork,reuseaddr UNIX-CONNECT:" => socat::tcp_to_unix;
    socat_tcp_to_tcp: "socat -t3600 TCP-LISTEN:8080,fork,reuseaddr TCP:127.0.0.1:9000" => socat::tcp_to_tcp;
    socat_unix_to_tcp: "socat -t3600 UNIX-LISTEN:" => socat::unix_to_tcp;
    socat_abstract: "ABSTRACT-LISTEN:" => socat::abstract_to_tcp;
    socat_range: "range=127.0.0.0/8" => socat::range;
    socat_max_children: "max-children=1" => socat::one_at_a_time;
    socat_idle: "socat -T1" => socat::idle;
    socat_exec: "/bin/sed" => socat::program;
    socat_pty: "pty,setsid" => socat::terminal;
    socat_file: "OPEN:/etc/passwd" => socat::file;
    socat_echo: "PIPE" => socat::echoes;
    socat_cat: "socat - UNIX-CONNECT:/run/web.sock" => socat::cat;
    socat_retry: "retry=30" => socat::waits;
    socat_listen: "socat -u TCP-LISTEN" => socat::takes_one;
    socat_sort: "EXEC:/usr/bin/sort" => socat::sort;
    socat_firecracker: "printf" => socat::firecracker;
    socat_from_vsock: "socat VSOCK-LISTEN" => socat::from_vsock;
    socat_to_vsock: "VSOCK-CONNECT:3:22" => socat::to_vsock;
    socat_cat_vsock: "socat - VSOCK-CONNECT" => socat::cat_vsock;
    haproxy: "bind 127.0.0.1:8080\nserver s unix@/run/web.sock" => proxies::haproxy_alone;
    haproxy_send_proxy: "send-proxy-v2" => proxies::haproxy_sends;
    haproxy_accept_proxy: "accept-proxy" => proxies::haproxy_accepts;
    haproxy_maxconn: "maxconn 1" => proxies::haproxy_one;
    systemd_tcp: "systemd-socket-proxyd 127.0.0.1:9000" => proxies::systemd_to_tcp;
    systemd_unix: "systemd-socket-proxyd /run/web.sock" => proxies::systemd_to_unix;
    systemd_exit_idle: "--exit-idle-time=1s" => proxies::systemd_exits;
    systemd_connections_max: "--connections-max=1" => proxies::systemd_one;
    vsudd: "vsudd -inport" => vms::vsudd;
    vsudd_syslog: "vsudd -syslog" => vms::syslog;
    vsudd_detach: "vsudd -detach" => vms::detached;
    hvcat: "hvcat --vmid" => vms::cat;
    hvcat_listen: "hvcat -l SERVICE" => vms::cat_listens;
    hvcat_echo: "hvcat -l --echo" => vms::cat_echoes;
    register: "GuestCommunicationServices" => vms::register;
    sock_stress_server: "sock_stress -s" => vms::stress_server;
    sock_stress: "sock_stress -c" => vms::runs_against_the_vm;
    hvbench: "hvbench" => vms::runs_against_the_vm;
    vpnkit_port: "vpnkit-expose-port -host-ip" => vms::add_port;
    vpnkit_socket: "vpnkit-expose-port -proto unix" => vms::add_socket;
    vsock_proxy: "vsock-proxy 8000" => vms::vsock_proxy;
    vsock_proxy_workers: "vsock-proxy -w 20" => vms::vsock_proxy;
    gvproxy_socket: "gvproxy -forward-sock" => vms::expose_podman;
    gvproxy_expose: "forwarder/expose" => vms::add_widely;
    gvproxy_unexpose: "forwarder/unexpose" => vms::remove;
    gvproxy_all: "forwarder/all" => vms::list;
    lima_port: "{guestPort: 80, hostPort: 8080}" => vms::expose_port;
    lima_host_ip: "hostIP: 0.0.0.0" => vms::expose_widely;
    lima_range: "guestPortRange" => vms::expose_range;
    lima_socket: "{guestSocket: /run/web.sock" => vms::expose_web_socket;
    lima_reverse: "reverse: true" => vms::reversed;
}

#[test]
fn each_line_has_its_test() {
    let mut tested: Vec<String> = KEYS.iter().map(|key| table::find(key).theirs).collect();
    let mut lines: Vec<String> = table::lines().into_iter().map(|it| it.theirs).collect();
    tested.sort_unstable();
    lines.sort_unstable();
    assert_eq!(tested, lines);
}
