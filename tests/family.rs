//! The sockets of one family alone.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use common::private_dir;
use hvsock::address::{HyperkitAddress, VsockAddress};
use hvsock::family::Unnamed;
use hvsock::simulate::{Service, Vm};
use hvsock::{hyperkit, vsock};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_hyperkit_guest_is_dialled_and_dials() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path())
        .guest(7, Service::Echo)
        .start()
        .unwrap();
    let address = HyperkitAddress::new(dir.path(), 7);
    let mut stream = hyperkit::Stream::connect_timeout(&address, PATIENCE).unwrap();
    assert_eq!(stream.peer_addr().unwrap(), Unnamed);
    let mut clone = stream.try_clone().unwrap();
    clone.write_all(b"echo").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut echo = Vec::new();
    stream.read_to_end(&mut echo).unwrap();
    assert_eq!(echo, b"echo");

    let listener = hyperkit::Listener::bind(&HyperkitAddress::new(dir.path(), 5000)).unwrap();
    assert!(
        listener
            .accept_timeout(Duration::from_millis(1))
            .unwrap()
            .is_none()
    );
    let mut guest = vm.dial(5000).unwrap();
    let (mut accepted, Unnamed) = listener.accept().unwrap();
    guest.write_all(b"from the guest").unwrap();
    let mut heard = [0; 14];
    accepted.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"from the guest");
    guest.shutdown(Shutdown::Write).unwrap();
    accepted.finish(PATIENCE).unwrap();
}

#[test]
fn another_family_is_given_back() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let bound = listener.local_addr().unwrap();
    let address: hvsock::Address = format!("tcp://{bound}").parse().unwrap();
    let tcp = hvsock::Stream::connect(&address).unwrap();
    let tcp = vsock::Stream::try_from(tcp).unwrap_err();
    assert_eq!(tcp.address(), &address);
    // What the kernel calls it says whether it is what it was taken for.
    let socket = TcpStream::connect(bound).unwrap();
    let taken = vsock::Stream::from_socket(socket, VsockAddress::new(3, 1024));
    assert!(taken.peer_addr().is_err());
    let stream = hvsock::Stream::from(taken);
    assert!(vsock::Stream::try_from(stream).is_ok());
}
