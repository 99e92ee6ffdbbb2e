//! `hvsock simulate`: runs a stand-in VM.

use std::collections::HashSet;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueHint};
use signal_hook::consts::{SIGUSR1, SIGUSR2};

use super::console::{complain, say};
use super::outcome::{Failure, Outcome};
use super::signals::EndSignals;
use crate::address::{Address, Host, Port, TcpAddress, is_guest_cid};
use crate::app::values::number;
use crate::hyperkit::uri_of_vmm;
use crate::simulate::{Dial, Endpoint, Service, Vm};

/// The options that apply to hyperkit only.
const OF_HYPERKIT: [&str; 6] = [
    "cid",
    "guest_forward",
    "descriptors",
    "failed_dials",
    "strict",
    "lenient",
];

/// How often the VM's state and the signals are checked.
const LOOK: Duration = Duration::from_millis(100);

/// Stand in for a VM: serve a state directory as hyperkit does, its frailties included, or a socket
/// as Firecracker does
#[derive(Args, Debug)]
#[command(
    after_help = "The stand-in dies or hangs where hyperkit's device would, and says which rule its client broke (exit \
    code 1). With --vsock-mux nothing can break it. SIGUSR1 pauses the guest, SIGUSR2 lets it go on. The socket files stay behind, as hyperkit's do.

Examples:
  hvsock simulate /tmp/vm --guest 80=http --guest 7=echo
  hvsock simulate /tmp/vm --guest 22=tcp://127.0.0.1:22 --dial 5000=/tmp/dial
  hvsock simulate /tmp/vm --guest 19=endless --dial 5000=20/s --strict
  hvsock simulate --vsock-mux /tmp/vm.sock --guest 80=http"
)]
pub(super) struct SimulateArgs {
    /// The state directory, made if it doesn't exist in the one above it; its path has at most 85
    /// bytes
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath, required_unless_present = "vsock_mux", conflicts_with = "vsock_mux")]
    directory: Option<PathBuf>,
    /// In the place of DIR: the Unix socket of a VMM such as Firecracker, which vsock-mux:///PATH
    /// leads to
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath, conflicts_with_all = OF_HYPERKIT)]
    vsock_mux: Option<PathBuf>,
    /// With --vsock-mux: pass half-closes on, as Cloud Hypervisor does since June 2026; else the
    /// host's ends both directions, and the guest's is kept back
    #[arg(long, requires = "vsock_mux")]
    half_close: bool,
    /// The guest's CID
    #[arg(long, value_name = "N", default_value = "3", value_parser = parse_cid)]
    cid: u32,
    /// What listens on a vsock port of the guest: echo, discard, chargen, http, silent (never reads
    /// nor writes), endless (sends for ever, whatever it is told), heedless:BYTES (sends so much,
    /// and closes), reset (answers, and resets), or a real server at an address
    #[arg(long, value_name = "PORT=SERVICE|ADDRESS")]
    guest: Vec<Guest>,
    /// Guest ports with a socket of their own (hyperkit's guest_forwards=, at most 4)
    #[arg(long, value_name = "PORT")]
    guest_forward: Vec<Port>,
    /// Programs in the guest that dial the host's PORT: each connection made to this local address
    /// is one; or so many a second, once somebody listens on PORT
    #[arg(long, value_name = "PORT=ADDRESS|N/s")]
    dial: Vec<GuestDial>,
    /// Connections that the device has room for; more are closed at once, as hyperkit does, without
    /// a word
    #[arg(long, value_name = "N", default_value_t = 1013, value_parser = number::<u16>(1..=1024))]
    slots: u16,
    /// Descriptors that hyperkit was started with: beyond the limit, connections hang
    #[arg(long, value_name = "N", value_parser = number::<u32>(1..=1 << 20))]
    descriptors: Option<u32>,
    /// Dials of the guest that come to nothing until the device hangs; hyperkit's was seen to hang
    /// after 1 to some thousand
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = number(1..=u64::MAX))]
    failed_dials: u64,
    /// Punish more than hyperkit's device was seen to: any close with data unread, and one 10 to 20
    /// ms after a dial
    #[arg(long)]
    strict: bool,
    /// Only count what would kill the device
    #[arg(long)]
    lenient: bool,
}

#[derive(Clone, Debug)]
struct Guest {
    port: Port,
    service: Service,
}

#[derive(Clone, Debug)]
struct GuestDial {
    port: Port,
    dial: Dial,
}

impl FromStr for Guest {
    type Err = String;

    fn from_str(text: &str) -> Result<Guest, String> {
        let (port, service) = split_port(text, "80=http")?;
        let service = match service {
            "echo" => Service::Echo,
            "discard" => Service::Discard,
            "chargen" => Service::Chargen,
            "http" => Service::Http,
            "silent" => Service::Silent,
            "endless" => Service::Endless,
            "reset" => Service::Reset,
            other => match other.strip_prefix("heedless:").map(str::parse) {
                Some(Ok(bytes)) => Service::Heedless(bytes),
                _ => Service::Forward(endpoint(other).map_err(|e| {
                    let services = "a service is echo, discard, chargen, http, silent, endless, \
                         heedless:BYTES, reset or an address";
                    match other.contains([':', '/', '.']) && !other.starts_with("heedless") {
                        true => format!("{e}; {services}"),
                        false => format!("there is no service {other:?}; {services}"),
                    }
                })?),
            },
        };
        Ok(Guest { port, service })
    }
}

impl FromStr for GuestDial {
    type Err = String;

    fn from_str(text: &str) -> Result<GuestDial, String> {
        let (port, dial) = split_port(text, "5000=tcp://127.0.0.1:0")?;
        let dial = match dial.strip_suffix("/s").map(str::parse) {
            Some(Ok(per_second)) => Dial::Paced(per_second),
            Some(Err(_)) => {
                return Err(format!(
                    "{dial:?} is no number a second; a right one: 5000=20/s"
                ));
            }
            None => Dial::Listen(endpoint(dial)?),
        };
        Ok(GuestDial { port, dial })
    }
}

fn parse_cid(text: &str) -> Result<u32, String> {
    let cid: Port = text.parse().map_err(|e| format!("as a CID, {e}"))?;
    match cid.0 {
        cid if is_guest_cid(cid) => Ok(cid),
        other => Err(format!(
            "{other} is no guest's CID: those are 3 to 4294967294"
        )),
    }
}

fn split_port<'a>(text: &'a str, right: &str) -> Result<(Port, &'a str), String> {
    let (port, rest) = text
        .split_once('=')
        .ok_or_else(|| format!("no = in it; a right one: {right}"))?;
    Ok((
        port.parse()
            .map_err(|e| format!("{e}; a right one: {right}"))?,
        rest,
    ))
}

/// Parses a TCP or Unix address of this machine. Resolves names.
fn endpoint(text: &str) -> Result<Endpoint, String> {
    let address = text.parse::<Address>().map_err(|e| e.to_string())?;
    match (address.as_tcp(), address.unix_path()) {
        (Some(tcp), _) => resolve(tcp).map(Endpoint::Tcp),
        (_, Some(path)) => Ok(Endpoint::Unix(path.to_owned())),
        _ => Err(format!(
            "{address}: only tcp:// and unix: addresses can stand here"
        )),
    }
}

fn resolve(tcp: &TcpAddress) -> Result<SocketAddr, String> {
    let name = match &tcp.host {
        Host::Ip(ip) => return Ok(SocketAddr::new(*ip, tcp.port)),
        Host::Name(name) => name,
        Host::Any => return Err(format!("{tcp}: name one address")),
    };
    let found = (name.as_str(), tcp.port).to_socket_addrs();
    let mut found = found.map_err(|e| format!("{name}: {e}"))?;
    found
        .find(|it| tcp.family.includes(&it.ip()))
        .ok_or_else(|| format!("{name} has no address"))
}

impl SimulateArgs {
    pub(super) fn run(self) -> Outcome {
        let place = match (&self.directory, &self.vsock_mux) {
            (Some(place), _) | (None, Some(place)) => place,
            (None, None) => return Err(Failure::Usage("give DIR, or --vsock-mux".into())),
        };
        if let Some(parent) = place.parent()
            && !parent.as_os_str().is_empty()
            && !parent.exists()
        {
            let parent = parent.display();
            let why =
                format!("there is no directory {parent}: is the path right? Or make it first");
            return Err(Failure::Failed(why));
        }
        let vm = match self.vsock_mux {
            Some(_) => Vm::behind_socket(place).half_close(self.half_close),
            None => Vm::builder(place).cid(self.cid),
        };
        let mut vm = vm
            .slots(self.slots.into())
            .failed_dials(self.failed_dials)
            .strict(self.strict)
            .lenient(self.lenient);
        if let Some(descriptors) = self.descriptors {
            vm = vm.descriptor_limit(descriptors as usize);
        }
        let mut taken = HashSet::new();
        for Guest { port, service } in &self.guest {
            if !taken.insert(port.0) {
                let why = format!("guest port {port} has two services");
                return Err(Failure::Usage(why));
            }
            vm = vm.guest(port.0, service.clone());
        }
        for GuestDial { port, dial } in &self.dial {
            vm = vm.dial(port.0, dial.clone());
        }
        let forwards: Vec<u32> = self.guest_forward.iter().map(|port| port.0).collect();
        crate::sys::raise_descriptor_limit()?;
        let mut signals = EndSignals::take()?.into_system();
        for signal in [SIGUSR1, SIGUSR2] {
            signals.add_signal(signal)?;
        }
        let vm = vm.guest_forwards(&forwards).start()?;
        match self.vsock_mux {
            Some(_) => say(format_args!("a stand-in VM at {}", uri_of_vmm(place))),
            None => say(format_args!(
                "a stand-in VM, CID {}, in {}",
                self.cid,
                place.display()
            )),
        }
        for Guest { port, service } in &self.guest {
            say(format_args!("guest port {port}: {service}"));
        }
        for GuestDial { port, dial } in &self.dial {
            if let Dial::Paced(per_second) = dial {
                say(format_args!(
                    "the guest dials CID 2 port {port} {per_second} times a second, once somebody listens there"
                ));
            } else if let Some(from) = vm.dial_addr(port.0) {
                say(format_args!(
                    "connect to {from} to have the guest dial CID 2 port {port}"
                ));
            }
        }
        loop {
            if let Some(fate) = vm.wait_for_fate(LOOK) {
                return Err(Failure::Failed(fate.to_string()));
            }
            for signal in signals.pending() {
                match signal {
                    SIGUSR1 => {
                        vm.pause();
                        complain("the guest is paused; SIGUSR2 lets it go on");
                    }
                    SIGUSR2 => {
                        vm.resume();
                        complain("the guest goes on");
                    }
                    // The kernel closes its sockets, as it does for a VM process that ends.
                    _ => {
                        std::mem::forget(vm);
                        return Ok(());
                    }
                }
            }
        }
    }
}
