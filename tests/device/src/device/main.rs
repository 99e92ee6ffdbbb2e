//! A vhost-user vsock device with hyperkit's face, for tests: `device VHOST.sock STATE_DIR
//! [GUEST_CID]`.
//!
//! QEMU gets its vsock device from the first; the second is a state directory as hyperkit has it,
//! with `connect`, `00000002.PORT` and `hyperkit.pid`. Exact where hyperkit is, and robust where
//! hyperkit isn't: what kills or hangs that one is `hvsock simulate`'s to imitate. It ends with
//! QEMU, and then leaves its files behind, as hyperkit does.
//!
//! Each line of its standard input is answered with a line of counters; at the end of the input it
//! ends, too.

mod connection;
mod device;
mod packet;
mod rings;
mod state_dir;

use std::error::Error;
use std::io::stdin;
use std::path::PathBuf;
use std::sync::Arc;
use std::{env, process, thread};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use device::Device;
use rings::{AGAIN, HOST, Rings};

fn main() {
    if let Err(e) = run() {
        eprintln!("device: {e}");
        process::exit(1);
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args_os().skip(1).map(PathBuf::from);
    let (Some(vhost), Some(directory)) = (arguments.next(), arguments.next()) else {
        return Err("usage: device VHOST.sock STATE_DIR [GUEST_CID]".into());
    };
    let guest_cid = match arguments.next() {
        Some(cid) => cid.to_string_lossy().parse()?,
        None => 3,
    };
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;

    let device = Device::new(&directory, guest_cid)?;
    let sockets = device.descriptor();
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let rings = Arc::new(Rings::new(device, guest_cid, memory.clone())?);
    let mut daemon = VhostUserDaemon::new("device".to_owned(), Arc::clone(&rings), memory)
        .map_err(|e| e.to_string())?;
    for handler in daemon.get_epoll_handlers() {
        use std::os::fd::AsRawFd;
        handler.register_listener(sockets, EventSet::IN, HOST)?;
        handler.register_listener(rings.again.0.as_raw_fd(), EventSet::IN, AGAIN)?;
    }
    thread::spawn(move || {
        for line in stdin().lines() {
            if line.is_err() {
                break;
            }
            let counters = rings.counters();
            println!(
                "live {} buffered {} from_host {} from_guest {} refused {} broken {} boots {}",
                counters.live,
                counters.buffered,
                counters.from_host,
                counters.from_guest,
                counters.refused,
                counters.broken,
                counters.boots
            );
        }
        process::exit(0);
    });
    let mut listener = Listener::new(&vhost, true)?;
    daemon.start(&mut listener).map_err(|e| e.to_string())?;
    println!("QEMU is there");
    // Its end is the VM's, however it comes. No destructor runs: that of the daemon would wait for
    // the loop to end.
    if let Err(e) = daemon.wait() {
        eprintln!("device: QEMU has gone: {e}");
    }
    process::exit(0)
}
