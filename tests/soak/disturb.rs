//! What disturbs the proxy and may not disturb its clients: files of the VM that can't be read, and
//! listeners that are shut down from outside.

use crate::child::wait_until;
use crate::client::Place;
use crate::crowd::World;
use crate::guest::PORTS;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use socket2::{SockRef, Socket};
use std::fs;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// What a VM's state directory may have, and what is read there.
const FILES: [&str; 3] = ["hyperkit.pid", "hyperkit.json", "config.json"];

/// Puts FIFOs, to which nobody writes, in the place of a VM's files, and more of them beside its
/// sockets.
pub(crate) fn put_fifos(vm: &Path) -> io::Result<()> {
    for name in FILES.into_iter().chain(["00000002.00000001", "log"]) {
        clear(&vm.join(name))?;
        mkfifo(&vm.join(name), Mode::S_IRWXU)?;
    }
    Ok(())
}

/// Puts what has no end, and what is no file, in the place of a VM's files.
pub(crate) fn put_odd_files(vm: &Path) -> io::Result<()> {
    let [pid, json, config] = FILES.map(|name| vm.join(name));
    for path in [&pid, &json, &config] {
        clear(path)?;
    }
    symlink("/dev/zero", pid)?;
    symlink("/dev/zero", json)?;
    fs::create_dir(config)
}

fn clear(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Shuts down one listener after the other, of process `pid`, until `over`; how many it was.
///
/// What the guest dials is left out: the device of a guest that dials nobody may hang, so that this
/// is the VM's end.
pub(crate) fn shut_down_listeners(
    world: &World,
    pid: &AtomicU32,
    every: Duration,
    over: &AtomicBool,
) -> usize {
    let of_port = |port| [true, false].map(|tcp| world.place(port, tcp));
    let mut places: Vec<Place> = PORTS.into_iter().flat_map(of_port).collect();
    places.push(Place::Unix(world.places.control()));
    let mut count = 0;
    let mut turn = places.iter().cycle();
    while !wait_until(every, || over.load(Ordering::SeqCst)) {
        // It is ending, or gone.
        if !world.changes().is_multiple_of(2) {
            continue;
        }
        let place = turn.next().expect("there is always another");
        match find_listener(pid.load(Ordering::SeqCst), place) {
            Ok(listener) => {
                let now = Instant::now();
                world.shut_down.lock().unwrap().insert(place.clone(), now);
                match SockRef::from(&listener).shutdown(Shutdown::Both) {
                    Ok(()) => count += 1,
                    Err(error) => world.fail(format!("{place:?} can't be shut down: {error}")),
                }
            }
            Err(_) if !world.changes().is_multiple_of(2) => {}
            Err(error) => {
                world.fail(format!("no listener at {place:?}: {error}"));
                break;
            }
        }
    }
    count
}

/// The listening socket of a process: not a copy, the socket itself.
fn find_listener(pid: u32, place: &Place) -> io::Result<Socket> {
    let link = format!("socket:[{}]", inode(place)?);
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        // Others of them may have been closed meanwhile.
        if fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == link.as_str()) {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.parse().ok());
            return take_descriptor(pid, number.ok_or(ErrorKind::InvalidData)?);
        }
    }
    Err(io::Error::new(ErrorKind::NotFound, "it isn't the proxy's"))
}

/// The number of the socket that listens there.
fn inode(place: &Place) -> io::Result<String> {
    let (table, address, listening) = match place {
        Place::Tcp(address) => ("tcp", format!(":{:04X}", address.port()), (3, "0A")),
        Place::Unix(path) => ("unix", path.display().to_string(), (3, "00010000")),
    };
    let sockets = fs::read_to_string(format!("/proc/net/{table}"))?;
    let found = sockets.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (number, state) = listening;
        let (local, inode) = match place {
            Place::Tcp(_) => (fields.get(1)?, fields.get(9)?),
            Place::Unix(_) => (fields.get(7)?, fields.get(6)?),
        };
        (fields[number] == state && local.ends_with(&address)).then(|| (*inode).to_owned())
    });
    found.ok_or_else(|| io::Error::new(ErrorKind::NotFound, "nothing listens there"))
}

#[cfg(target_os = "linux")]
fn take_descriptor(pid: u32, number: i32) -> io::Result<Socket> {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = pidfd_open(pid.ok_or(ErrorKind::InvalidInput)?, PidfdFlags::empty())?;
    let descriptor = pidfd_getfd(process, number, PidfdGetfdFlags::empty())?;
    Ok(descriptor.into())
}

#[cfg(not(target_os = "linux"))]
fn take_descriptor(_: u32, _: i32) -> io::Result<Socket> {
    Err(ErrorKind::Unsupported.into())
}
