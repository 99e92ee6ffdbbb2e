//! `/init` of the guest that `scripts/guest-test` boots: checks hvsock on AF_VSOCK in a real
//! kernel.
//!
//! It is the only program in the guest besides `/hvsock`. What it prints goes to the serial line;
//! the last line is `done`. The kernel's command line selects what it does. With
//! `hvsock.mode=serve` it checks nothing, but serves a driver on the host. With `hvsock.mode=host`
//! it boots a guest itself, and checks the connections to it. With `hvsock.mode=idle` it measures
//! idle connections. With `hvsock.checks=NAME,NAME` it runs those checks alone.

mod accepting;
mod carry;
mod command;
mod errors;
mod framing;
mod idle;
mod pattern;
mod peers;
mod promptly;
mod report;
mod serve;
mod services;
mod sockets;
mod stress;
mod tools;
mod vhost;
mod vms;
mod vsudd;

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::kmod::{DeleteModuleFlags, ModuleInitFlags, delete_module, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket};
use nix::sys::termios::tcdrain;

use report::Outcome;
use vhost::Host;

fn main() {
    if let Err(e) = prepare() {
        println!("FAILED to prepare the guest: {e}");
    } else {
        match &words("hvsock.mode=")[..] {
            [mode] if mode == "serve" => {
                if let Err(e) = load_all(&VIRTIO).and_then(|()| serve::run()) {
                    println!("FAILED to serve: {e}");
                }
            }
            [mode] if mode == "host" => {
                run_host();
                println!("done");
            }
            [mode] if mode == "idle" => {
                idle::run();
                println!("done");
            }
            _ => {
                run();
                println!("done");
            }
        }
    }
    let _ = io::stdout().flush();
    let _ = tcdrain(io::stdout());
    // QEMU ends instead of starting again. If this fails, the kernel panics when this process ends.
    let _ = reboot(RebootMode::RB_AUTOBOOT);
}

fn run() {
    let wanted = words("hvsock.checks=");
    let check = |name: &str, limit, body: fn() -> Outcome| {
        if wanted.is_empty() || wanted.iter().any(|it| it == name) {
            report::check(name, limit, body);
        }
    };
    const SHORT: Duration = Duration::from_secs(90);
    check("no_vsock_module", SHORT, errors::no_vsock_module);
    if !load("vsock") {
        return;
    }
    check("no_loopback_module", SHORT, errors::no_loopback_module);
    if !load("vmw_vsock_virtio_transport_common") {
        return;
    }
    check("vm_by_cid_health", SHORT, || {
        vms::health(|| load(LOOPBACK), || unload(LOOPBACK))
    });
    // The health check may have left the module unloaded.
    if !is_loaded(LOOPBACK) && !load(LOOPBACK) {
        return;
    }
    check("vm_by_cid_limits", SHORT, vms::limits);
    check("guest_control", SHORT, vms::guests_may_control_it);
    check("guest_control_from", SHORT, vms::others_may_not);
    check("refused_port", SHORT, errors::refused_port);
    check("no_such_cid", SHORT, errors::no_such_cid);
    check("no_cid", SHORT, errors::no_cid);
    check("privileged_port", SHORT, errors::privileged_port);
    check("foreign_cid", SHORT, errors::foreign_cid);
    check("port_in_use", SHORT, errors::port_in_use);
    check("any_port", SHORT, errors::any_port);
    check("full_backlog", SHORT, errors::full_backlog);

    check(
        "finds_nobody_without_sleeping",
        SHORT,
        accepting::finds_nobody_without_sleeping,
    );

    const LONG: Duration = Duration::from_secs(240);
    check("client_ends_first", SHORT, carry::client_ends_first);
    check("server_ends_first", SHORT, carry::server_ends_first);
    check("echo_64_mib", LONG, carry::echo_64_mib);
    check("parallel_streams", LONG, carry::parallel_streams);
    check("parallel_200", LONG, carry::parallel_200);
    check("sequence_500", LONG, carry::sequence_500);

    check("framed_proxies", LONG, framing::through_two_proxies);
    check("frames_on_the_wire", SHORT, framing::on_the_wire);

    check("server_closes_unread", LONG, peers::server_closes_unread);
    check("client_closes_unread", LONG, peers::client_closes_unread);
    check("server_gone_in_upload", LONG, peers::server_gone_in_upload);
    check(
        "listener_gone_unaccepted",
        LONG,
        peers::listener_gone_unaccepted,
    );
    check("broken_upload", LONG, peers::broken_upload);
    check("server_does_not_read", LONG, peers::server_does_not_read);
    check("client_does_not_read", LONG, peers::client_does_not_read);
    check("never_read", LONG, peers::never_read);

    check("vsudd_and_sigterm", LONG, vsudd::serves_and_ends);
    check("sigterm_lets_finish", LONG, vsudd::lets_finish);

    check("stress_all_loads", LONG, stress::all_loads);
    check("cat_listens", LONG, stress::cat_listens);
    check("cat_is_refused", SHORT, stress::cat_is_refused);
    check("cat_waits", SHORT, stress::cat_waits);
    check("blocking_sockets", SHORT, stress::blocking_sockets);
    check("buffer_sizes", SHORT, stress::buffer_sizes);
}

/// Runs the checks of a host with a guest. Each goes on where the one before has ended.
fn run_host() {
    let host = match load_all(&VHOST).and_then(|()| Host::start()) {
        Ok(host) => Arc::new(host),
        Err(e) => return println!("FAILED to be a host: {e}"),
    };
    type Check = (&'static str, fn(&Host) -> Outcome);
    const CHECKS: [Check; 6] = [
        ("vhost_vm_comes", Host::vm_comes),
        ("vhost_to_guest", Host::to_guest),
        ("vhost_to_host", Host::to_host),
        ("vhost_vm_killed", Host::vm_killed),
        ("vhost_vm_back", Host::vm_back),
        ("vhost_vm_stopped", Host::vm_stopped),
    ];
    for (name, check) in CHECKS {
        let host = Arc::clone(&host);
        if !report::check(name, Duration::from_secs(240), move || check(&host)) {
            break;
        }
    }
}

fn prepare() -> io::Result<()> {
    for (kind, path) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(Some(kind), path, Some(kind), MsFlags::empty(), None::<&str>)?;
    }
    // hvsock keeps its control socket in its directory there.
    fs::create_dir_all("/tmp")?;
    fs::set_permissions("/tmp", Permissions::from_mode(0o1777))?;
    setrlimit(Resource::RLIMIT_NOFILE, 8192, 8192)?;
    bring_up_lo()
}

/// Returns the words that follow a key on the kernel's command line, separated by commas.
fn words(key: &str) -> Vec<String> {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let mut said = line.split_whitespace();
    let value = said.find_map(|word| word.strip_prefix(key));
    let words = value.into_iter().flat_map(|value| value.split(','));
    words.map(str::to_owned).collect()
}

/// The modules for a vsock device of the host, by PCI.
const VIRTIO: [&str; 8] = [
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "vmw_vsock_virtio_transport",
];

/// The modules that connect to guests, and those that run them.
const VHOST: [&str; 8] = [
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vhost_iotlb",
    "vhost",
    "vhost_vsock",
    "irqbypass",
    "kvm",
    "kvm-amd",
];

fn load_all(modules: &[&str]) -> Outcome {
    for name in modules {
        if !load(name) {
            return Err(format!("no module {name}").into());
        }
    }
    Ok(())
}

/// The module that connects to CID 1.
const LOOPBACK: &str = "vsock_loopback";

fn is_loaded(name: &str) -> bool {
    Path::new("/sys/module").join(name).exists()
}

/// Unloads a module. Returns false if that isn't possible now.
fn unload(name: &str) -> bool {
    let name = CString::new(name);
    name.is_ok_and(|name| delete_module(&name, DeleteModuleFlags::O_NONBLOCK).is_ok())
}

/// Loads a module. Prints a failure and returns false if that isn't possible.
fn load(name: &str) -> bool {
    let loaded = File::open(format!("/modules/{name}.ko"))
        .and_then(|file| Ok(finit_module(file, c"", ModuleInitFlags::empty())?));
    if let Err(e) = &loaded {
        println!("FAILED to load {name}: {e}");
    }
    loaded.is_ok()
}

/// Brings the loopback interface up, as `ip link set lo up` does: by a netlink message, after which
/// the kernel gives the interface its address too.
fn bring_up_lo() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const LO: i32 = 1;
    const IFF_UP: u32 = 1;
    let mut message = Vec::new();
    // struct nlmsghdr: length, type, flags, sequence, port
    message.extend(32u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    // struct ifinfomsg: family, type, index, flags, flags to change
    message.extend([0; 4]);
    message.extend(LO.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    send(
        std::os::fd::AsRawFd::as_raw_fd(&netlink),
        &message,
        MsgFlags::empty(),
    )?;
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map(drop)
}
