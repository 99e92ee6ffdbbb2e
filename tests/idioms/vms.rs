//! The lines of programs that Debian doesn't have: ours are run, before a stand-in VM.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::mpsc::channel;

use crate::common::{PATIENCE, eventually};
use crate::place::Place;
use crate::program::{Program, run};
use crate::seen::{echo, is_sound, serve};
use crate::table::Line;
use crate::vsock;

/// What listens in the guest, on port 80.
const GUEST: Place = Place::Unix("/run/guest.sock");

/// A VM that is found under the name of docker.
fn docker() -> Program {
    let at = "$HOME/Library/Containers/com.docker.docker/Data/vms/0";
    run(&format!(
        "mkdir -p {at} /tmp/h/vms && ln -s {at} /tmp/h/vms/docker"
    ));
    let guest: String = (8000..=8010)
        .map(|port| format!(" --guest {port}=echo"))
        .collect();
    let words = format!(
        "hvsock simulate {at} --guest 7=echo --guest 80=/run/guest.sock {guest} --dial 5000=tcp://127.0.0.1:5001"
    );
    let program = Program::start(&format!("exec {words}"));
    let socket = "/tmp/h/Library/Containers/com.docker.docker/Data/vms/0/connect";
    eventually("the VM is there", || Path::new(socket).exists());
    program
}

/// Ends a command as a user does.
fn end(mut program: Program) {
    run(&format!("kill -TERM {}", program.child.id()));
    assert_eq!(program.exit_code(), Some(0));
}

fn exposed(line: &Line, front: Place) {
    let vm = docker();
    let ours = Program::listening(&line.ours[0], front);
    is_sound(front, GUEST);
    end(ours);
    end(vm);
}

pub(crate) fn expose_port(line: &Line) {
    exposed(line, Place::Tcp(8080));
}

pub(crate) fn expose_web_socket(line: &Line) {
    exposed(line, Place::Unix("/tmp/web.sock"));
}

pub(crate) fn expose_podman(line: &Line) {
    exposed(line, Place::Unix("/tmp/podman.sock"));
}

pub(crate) fn expose_widely(line: &Line) {
    run("ip address add 10.9.8.7/32 dev lo");
    let vm = docker();
    let ours = Program::listening(&line.ours[0], Place::Tcp(8080));
    is_sound(Place::Tcp(8080), GUEST);
    std::net::TcpStream::connect("10.9.8.7:8080").unwrap();
    end(ours);
    end(vm);
}

pub(crate) fn expose_range(line: &Line) {
    let vm = docker();
    let ours = Program::listening(&line.ours[0], Place::Tcp(8010));
    for port in 8000..=8010 {
        let mut client = Place::Tcp(port).connect();
        client.write_all(b"hello").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
        client.half_close();
        assert_eq!(client.rest(), "");
    }
    end(ours);
    end(vm);
}

pub(crate) fn reversed(line: &Line) {
    let vm = docker();
    let ours = Program::listening(&line.ours[0], Place::Tcp(5001));
    let dialled = "/tmp/h/vms/docker/00000002.00001388";
    eventually("the guest can dial it", || Path::new(dialled).exists());
    let agent = Place::Unix("/tmp/agent.sock");
    let served = serve(agent, echo);
    let mut guest = Place::Tcp(5001).connect();
    guest.write_all(b"hello").unwrap();
    guest.half_close();
    assert_eq!(guest.rest(), "hello");
    served.recv().unwrap();
    end(ours);
    end(vm);
}

/// An hvsock that does something else, and is controlled.
fn controlled() -> Program {
    let other = Place::Unix("/tmp/other.sock");
    let words = "hvsock forward /tmp/other.sock tcp://127.0.0.1:1 --control";
    Program::listening(words, other)
}

fn added(line: &Line, front: Place) {
    let vm = docker();
    let ours = controlled();
    run(&line.ours[0]);
    is_sound(front, GUEST);
    end(ours);
    end(vm);
}

pub(crate) fn add_port(line: &Line) {
    added(line, Place::Tcp(8080));
}

pub(crate) fn add_socket(line: &Line) {
    added(line, Place::Unix("/tmp/web.sock"));
}

pub(crate) fn add_widely(line: &Line) {
    added(line, Place::Tcp(6443));
}

const ADD: &str = "hvsock add --name api tcp://127.0.0.1:6443 tcp://127.0.0.1:9000";

pub(crate) fn remove(line: &Line) {
    let ours = controlled();
    run(ADD);
    Place::Tcp(6443).wait_until_somebody_listens();
    run(&line.ours[0]);
    Place::Tcp(6443).wait_until_nobody_listens();
    end(ours);
}

pub(crate) fn list(line: &Line) {
    let ours = controlled();
    run(ADD);
    let said = run(&line.ours[0]);
    assert!(said.contains("tcp://127.0.0.1:6443"), "{said}");
    end(ours);
}

pub(crate) fn cat(line: &Line) {
    let vm = docker();
    let mut ours = Program::start(&line.ours[0]);
    ours.feed(b"hello");
    assert_eq!(ours.end(), ("hello".to_owned(), true));
    end(vm);
}

pub(crate) fn runs_against_the_vm(line: &Line) {
    let vm = docker();
    run(&line.ours[0]);
    end(vm);
}

/// Leads from a vsock port to a place.
fn from_vsock(line: &Line, port: &str, back: Place) {
    let Some(free) = vsock::port() else { return };
    let line = line.with(port, &format!(":{free}"));
    match vsock::has_loopback() {
        true => {
            let words = &line.ours[0];
            vsock::is_bound(words, free);
            let _ours = Program::start(&format!("exec {words}"));
            let mut served = None;
            eventually("it accepts", || {
                let address = format!("vsock://1:{free}").parse().unwrap();
                served = hvsock::Stream::connect(&address).ok();
                served.is_some()
            });
            is_sound(Place::Vsock(free), back);
        }
        false => vsock::is_bound(&line.ours[0], free),
    }
}

pub(crate) fn vsudd(line: &Line) {
    from_vsock(line, ":2375", Place::Unix("/run/docker.sock"));
}

pub(crate) fn vsock_proxy(line: &Line) {
    from_vsock(line, ":8000", Place::Tcp(443));
}

pub(crate) fn syslog(line: &Line) {
    // The device's directory and the host are not the test's.
    let line = line.with("/dev/log", "/tmp/log");
    let line = line.with("vsock://host:514", "tcp://127.0.0.1:9000");
    let (told, has_come) = channel();
    let served = serve(Place::Tcp(9000), move |mut client| {
        let mut all = Vec::new();
        let mut buffer = [0; 1000];
        while let count @ 1.. = client.read(&mut buffer).unwrap() {
            all.extend(&buffer[..count]);
            if all.ends_with(b"hello") {
                told.send(()).unwrap();
            }
        }
        all
    });
    let ours = Program::start(&format!("exec {}", line.ours[0]));
    eventually("it listens", || Path::new("/tmp/log").exists());
    let client = UnixDatagram::unbound().unwrap();
    client.send_to(b"<13>test: hello", "/tmp/log").unwrap();
    has_come.recv_timeout(PATIENCE).unwrap();
    end(ours);
    assert!(served.recv().unwrap().ends_with(b"test: hello"));
}

pub(crate) fn detached(line: &Line) {
    let Some(port) = vsock::port() else { return };
    let line = line.with(":2375", &format!(":{port}"));
    let line = line.with("/usr/bin/hvsock", "/tmp/bin/hvsock");
    run(&line.ours[0]);
    let mut pid = String::new();
    eventually("its pid is there", || {
        pid = fs::read_to_string("/run/hvsock.pid").unwrap_or_default();
        fs::read_to_string(format!("/proc/{}/comm", pid.trim())).is_ok_and(|it| it == "hvsock\n")
    });
    run(&format!("kill -TERM {pid}"));
}

/// What listens on a vsock port, once it can be connected to.
fn on_vsock(line: &Line, port: &str, then: impl FnOnce(hvsock::Stream, Program)) {
    let (Some(free), true) = (vsock::port(), vsock::has_loopback()) else {
        return;
    };
    let line = line.with(port, &format!(":{free}"));
    let ours = Program::start(&format!("exec {}", line.ours[0]));
    let mut client = None;
    eventually("it accepts", || {
        let address = format!("vsock://1:{free}").parse().unwrap();
        client = hvsock::Stream::connect(&address).ok();
        client.is_some()
    });
    then(client.unwrap(), ours);
}

pub(crate) fn cat_listens(line: &Line) {
    on_vsock(line, ":1024", |mut client, mut ours| {
        ours.feed(b"");
        client.write_all(b"an upload").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(ours.end(), ("an upload".to_owned(), true));
    });
}

pub(crate) fn cat_echoes(line: &Line) {
    on_vsock(line, ":7", |mut client, _ours| {
        client.write_all(b"hello").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
    });
}

pub(crate) fn stress_server(line: &Line) {
    let port = line.ours[0].rsplit(':').next().unwrap().to_owned();
    on_vsock(line, &format!(":{port}"), |mut client, _ours| {
        client.write_all(b"hello").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
    });
}

pub(crate) fn register(line: &Line) {
    let mut ours = Program::start(&format!("{} 2>&1", line.ours[0]));
    ours.feed(b"");
    let (said, is_well) = ours.end();
    assert!(!is_well && said.contains("only Windows"), "{said}");
}
