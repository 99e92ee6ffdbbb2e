//! AF_VSOCK, which is no part of a network of one's own: its ports are chosen.

use std::io::BufRead;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use crate::place::Stream;
use crate::seen::greet;

/// A port that nobody has, if this system has AF_VSOCK.
pub(crate) fn port() -> Option<u32> {
    if !Path::new("/dev/vsock").exists() {
        println!("skipped in part: there is no AF_VSOCK here");
        return None;
    }
    Some(fastrand::u32(1 << 20..1 << 31))
}

/// Whether the local CID can be connected to.
pub(crate) fn has_loopback() -> bool {
    let there = Path::new("/sys/module/vsock_loopback").exists();
    if !there {
        println!(
            "skipped in part: there is no vsock_loopback here; scripts/guest-test has a kernel with it"
        );
    }
    there
}

/// A server that greets whoever comes to that port.
pub(crate) fn server(port: u32) -> thread::JoinHandle<()> {
    let address = format!("vsock://:{port}").parse().unwrap();
    let listener = hvsock::Listener::bind(&address).unwrap();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            greet(Stream::Vsock(client));
        }
    })
}

/// Asserts that a command of ours says that it listens on that port.
pub(crate) fn is_bound(words: &str, port: u32) {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {words}")]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    let mut pipe = std::io::BufReader::new(child.stdout.take().unwrap());
    pipe.read_line(&mut said).unwrap();
    let _ = child.kill();
    let _ = child.wait();
    assert!(
        said.contains(&format!("vsock://:{port}")),
        "{words}: {said}"
    );
}
