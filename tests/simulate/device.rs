//! The state directory, the line, slots, pause and reboot.

use crate::support::*;
use hvsock::hyperkit::connect_line;
use hvsock::simulate::Vm;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

#[test]
fn the_directory_is_hyperkits() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory)
        .guest_forwards(&[80, 7])
        .start()
        .unwrap();
    let pid = fs::read_to_string(directory.path().join("hyperkit.pid")).unwrap();
    assert_eq!(pid, std::process::id().to_string());
    let json = fs::read(directory.path().join("hyperkit.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["vsock_ports"], serde_json::json!([80, 7]));
    assert_eq!(json["vsock_guest_cid"], 3);
    assert_eq!(json["state_dir"], directory.path().to_str().unwrap());
    let link = fs::read_link(directory.path().join("guest.00000050")).unwrap();
    assert_eq!(link.to_str(), Some("00000003.00000050"));

    let mut stream = UnixStream::connect(directory.path().join("guest.00000007")).unwrap();
    stream.write_all(b"no line here").unwrap();
    assert_eq!(finish(stream), b"no line here");
    echo(&vm, b"with a line");
    vm.stop();
    assert!(directory.path().join("connect").exists());
    let error = UnixStream::connect(directory.path().join("connect")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_new_vm_replaces_the_old_ones_files() {
    let directory = tempfile::tempdir().unwrap();
    let first = builder(&directory).guest_forwards(&[7]).start().unwrap();
    let mut stream = dial(&first, SILENT);
    drop(first);
    assert_closed(&mut stream);
    let second = builder(&directory).guest_forwards(&[7]).start().unwrap();
    assert_alive(&second);
}

#[test]
fn other_names_and_limits() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory)
        .cid(5)
        .connect_name("@connect")
        .prefix("@");
    let vm = vm.guest_forwards(&[7]).start().unwrap();
    let mut stream = UnixStream::connect(directory.path().join("@connect")).unwrap();
    stream.write_all(&connect_line(5, ECHO)).unwrap();
    stream.write_all(b"x").unwrap();
    assert_eq!(finish(stream), b"x");
    let link = fs::read_link(directory.path().join("guest.00000007")).unwrap();
    assert_eq!(link.to_str(), Some("@00000005.00000007"));
    drop(vm);

    let name = "x".repeat(85 - directory.path().as_os_str().len() - 1);
    let fits = directory.path().join(&name);
    assert!(Vm::builder(&fits).start().is_ok());
    let error = Vm::builder(directory.path().join(name + "y")).start();
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("86 bytes") && error.contains("85"),
        "{error}"
    );
    let error = Vm::builder(directory.path())
        .guest_forwards(&[1, 2, 3, 4, 5])
        .start();
    assert!(error.unwrap_err().to_string().contains("at most 4"));
}

#[test]
fn lines_that_are_no_lines_are_closed_in_silence() {
    let (_directory, vm) = vm();
    let lines: [&[u8]; 5] = [
        b"00000003.00000007",
        b"\n",
        b"00000003.00000007 ",
        b"00000004.00000007\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ];
    for line in lines {
        let mut stream = connect(&vm);
        stream.write_all(line).unwrap();
        assert_closed(&mut stream);
    }
    let mut probe = connect(&vm);
    probe.shutdown(Shutdown::Write).unwrap();
    assert_closed(&mut probe);
    drop(connect(&vm));
    assert!(vm.wait_for(LONG, |counters| counters.silent_closes == 7));
    assert_eq!(vm.counters().dials, 0);
    assert_alive(&vm);
}

#[test]
fn a_client_that_says_nothing_stalls_the_device() {
    let (_directory, vm) = vm();
    let mut other = dial(&vm, ECHO);
    other.write_all(b"1").unwrap();
    other.read_exact(&mut [0]).unwrap();
    let before = vm.counters().stalls;
    let mut silent = connect(&vm);
    assert!(vm.wait_for(LONG, |counters| counters.stalls > before));
    other.write_all(b"2").unwrap();
    assert_quiet(&mut other);
    silent.write_all(&connect_line(3, ECHO)).unwrap();
    other.read_exact(&mut [0]).unwrap();
    assert!(vm.counters().longest_stall >= SHORT);
    finish(silent);
    finish(other);
    assert_alive(&vm);
}

#[test]
fn a_port_without_a_service_is_refused() {
    let (_directory, vm) = vm();
    let mut stream = dial(&vm, 1234);
    assert_eq!(read_all(&mut stream), b"");
    let mut stream = connect(&vm);
    let payload = [&connect_line(3, 1234)[..], b"payload"].concat();
    stream.write_all(&payload).unwrap();
    assert_closed(&mut stream);
    assert!(vm.wait_for(LONG, |counters| counters.refused == 2));
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn a_paused_guest_answers_later() {
    let (_directory, vm) = vm();
    let mut old = dial(&vm, ECHO);
    old.write_all(b"1").unwrap();
    old.read_exact(&mut [0]).unwrap();
    vm.pause();
    let mut new = dial(&vm, ECHO);
    new.write_all(b"new").unwrap();
    old.write_all(b"2").unwrap();
    let mut refused = dial(&vm, 1234);
    assert!(vm.wait_for(LONG, |counters| counters.unanswered == 2));
    assert_quiet(&mut old);
    assert_quiet(&mut new);
    assert_quiet(&mut refused);
    vm.resume();
    assert_eq!(finish(old), b"2");
    assert_eq!(finish(new), b"new");
    assert_closed(&mut refused);
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn a_rebooted_guest_has_forgotten_its_connections() {
    let (_directory, vm) = vm();
    let mut streams = [dial(&vm, ECHO), dial(&vm, ECHO), dial(&vm, ECHO)];
    for stream in &mut streams {
        stream.write_all(b"1").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    vm.reboot_guest();
    let [mut sends, ends, mut waits] = streams;
    assert_quiet(&mut sends);
    sends.write_all(b"2").unwrap();
    assert_closed(&mut sends);
    assert_eq!(finish(ends), b"");
    assert_quiet(&mut waits);
    // One slot is lost.
    assert_eq!(vm.counters().live_slots, 2);
    assert_eq!(finish(waits), b"");
    assert!(vm.wait_for(LONG, |counters| counters.live_slots == 1));
    assert_eq!(vm.counters().lost_slots, 1);
    assert_alive(&vm);
}

#[test]
fn requests_that_a_reboot_meets_are_lost() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).slots(4).lost_at_reboot(2);
    let vm = vm.start().unwrap();
    vm.pause();
    let mut requests = [dial(&vm, ECHO), dial(&vm, ECHO), dial(&vm, ECHO)];
    assert!(vm.wait_for(LONG, |counters| counters.unanswered == 3));
    vm.reboot_guest();
    vm.resume();
    echo(&vm, b"the guest is up again");
    for request in &mut requests {
        request.write_all(b"anybody there?").unwrap();
        request.shutdown(Shutdown::Write).unwrap();
        assert_quiet(request);
    }
    drop(requests);
    assert!(vm.wait_for(LONG, |counters| counters.live_slots == 2));
    // They take the place of others.
    let (mut first, mut second) = (dial(&vm, ECHO), dial(&vm, ECHO));
    assert!(vm.wait_for(LONG, |counters| counters.live_slots == 4));
    assert_closed(&mut connect(&vm));
    for stream in [&mut first, &mut second] {
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    finish(first);
    finish(second);
    assert!(vm.wait_for(LONG, |counters| counters.live_slots == 2));
    assert_eq!(vm.counters().lost_slots, 2);
    assert_alive(&vm);
}

#[test]
fn slots_are_limited() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).start().unwrap();
    let mut streams = Vec::new();
    for i in 0..1013 {
        streams.push(dial(&vm, ECHO));
        if i % 100 == 99 {
            assert!(
                vm.wait_for(LONG, |counters| counters.answered == i + 1),
                "{:?} {:?}",
                vm.fate(),
                vm.counters()
            );
        }
    }
    let mut excess = connect(&vm);
    let _ = excess.write(&connect_line(3, ECHO));
    assert_closed(&mut excess);
    for stream in &mut streams {
        stream.write_all(b"x").unwrap();
    }
    for mut stream in streams {
        stream.read_exact(&mut [0]).unwrap();
        finish(stream);
    }
    free(&vm);
    let counters = vm.counters();
    assert_eq!((counters.peak_slots, counters.turned_away), (1013, 1));
    assert_alive(&vm);
}

/// As macOS' `accept` does it.
#[test]
fn without_descriptors_the_rest_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory)
        .descriptor_limit(256)
        .loses_clients(true)
        .start()
        .unwrap();
    let mut streams: Vec<_> = (0..245).map(|_| dial(&vm, ECHO)).collect();
    assert!(vm.wait_for(LONG, |counters| counters.answered == 245));
    for _ in 0..3 {
        assert_closed(&mut connect(&vm));
    }
    assert!(vm.wait_for(LONG, |counters| counters.turned_away == 3));
    assert_eq!(vm.counters().accepted, 245);
    finish(streams.pop().unwrap());
    assert!(vm.wait_for(LONG, |counters| counters.live_slots == 244));
    echo(&vm, b"room again");
    for stream in streams {
        finish(stream);
    }
    assert_alive(&vm);
}

#[test]
fn without_descriptors_the_rest_hangs() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory)
        .descriptor_limit(256)
        .loses_clients(false)
        .start()
        .unwrap();
    let mut streams: Vec<_> = (0..245).map(|_| dial(&vm, ECHO)).collect();
    assert!(vm.wait_for(LONG, |counters| counters.answered == 245));
    let mut hangs = dial(&vm, ECHO);
    hangs.write_all(b"x").unwrap();
    assert_quiet(&mut hangs);
    assert_eq!(vm.counters().accepted, 245);
    finish(streams.pop().unwrap());
    assert_eq!(finish(hangs), b"x");
    for stream in streams {
        finish(stream);
    }
    assert_alive(&vm);
}
