//! The streams: services, half-close, backpressure, and the guest's own dials.

use crate::support::*;
use hvsock::simulate::{Dial, Endpoint, Service};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn the_guest_serves_the_web() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory).name("nova").start().unwrap();
    let mut stream = dial(&vm, HTTP);
    stream.write_all(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nGET /bytes/300000 HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let text = String::from_utf8(read_all(&mut stream)).unwrap();
    assert!(text.contains("nova (cid 3), port 80\n/a\n"), "{text:.300}");
    assert!(text.len() > 300_000);
    // The server waits for the client's EOF before it closes.
    finish(stream);
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn a_real_server_can_be_behind_a_guest_port() {
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let got = receive(&mut stream);
        stream.write_all(format!("{got:?}").as_bytes()).unwrap();
    });
    let vm = builder(&directory)
        .guest(1, Service::Forward(Endpoint::Tcp(address)))
        .guest(2, Service::Forward(Endpoint::Tcp(closed)))
        .guest(3, Service::Forward(Endpoint::Unix("/nonexistent".into())))
        .start()
        .unwrap();
    let mut stream = dial(&vm, 1);
    let sum = send_pattern(&mut stream, 9, 3 << 20);
    let answer = String::from_utf8(finish(stream)).unwrap();
    assert_eq!(answer, format!("{:?}", (3 << 20, sum)));
    server.join().unwrap();
    assert_closed(&mut dial(&vm, 2));
    assert_closed(&mut dial(&vm, 3));
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn the_guest_dials_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let any = Endpoint::Tcp(([127, 0, 0, 1], 0).into());
    let door = directory.path().join("door");
    let vm = builder(&directory)
        .dial(5000, Dial::Listen(any))
        .dial(5000, Dial::Listen(Endpoint::Unix(door.clone())))
        .start()
        .unwrap();
    thread::scope(|scope| {
        assert!(!vm.wait_for_listener(5000, SHORT));
        let listener = host_socket(&vm, 5000);
        assert!(vm.wait_for_listener(5000, LONG));
        let mut guest = vm.dial(5000).unwrap();
        let mut host = accept(&listener);
        guest.set_read_timeout(Some(LONG)).unwrap();
        let sum = send_pattern(&mut guest, 1, 100_000);
        guest.shutdown(Shutdown::Write).unwrap();
        assert_eq!(receive(&mut host), (100_000, sum));
        let writer = scope.spawn(move || receive(&mut guest));
        let sum = send_pattern(&mut host, 2, 1 << 20);
        host.shutdown(Shutdown::Write).unwrap();
        assert_eq!(writer.join().unwrap(), (1 << 20, sum));
        drop(host);

        let mut program = UnixStream::connect(&door).unwrap();
        program.write_all(b"from the guest").unwrap();
        program.shutdown(Shutdown::Write).unwrap();
        let mut host = accept(&listener);
        assert_eq!(read_all(&mut host), b"from the guest");
        host.write_all(b"to it").unwrap();
        assert_eq!(finish(host), b"");
        assert_eq!(read_all(&mut program), b"to it");
    });
    free(&vm);
    assert_eq!(vm.counters().guest_dials, 2);
    assert_alive(&vm);
}

#[test]
fn the_guest_dials_at_a_pace() {
    const PACE: u32 = 100;
    let directory = tempfile::tempdir().unwrap();
    let paced = Dial::Paced(PACE.try_into().unwrap());
    let vm = builder(&directory).dial(5000, paced).strict(true);
    let vm = vm.start().unwrap();
    // Not before somebody listens.
    assert!(!vm.wait_for(SHORT, |it| it.guest_dials + it.guest_dials_failed > 0));
    let listener = host_socket(&vm, 5000);
    let begun = Instant::now();
    thread::spawn(move || {
        for (number, stream) in listener.incoming().flatten().enumerate() {
            // Each third is sent something else, each fourth nothing.
            if number % 3 == 0 {
                (&stream).write_all(b"?").unwrap();
            }
            if number % 4 != 0 {
                io::copy(&mut &stream, &mut &stream).unwrap();
            }
            finish(stream);
        }
    });
    assert!(vm.wait_for(LONG, |counters| counters.guest_dials >= 60));
    let took = begun.elapsed();
    assert!(took > Duration::from_secs(1) * 60 / PACE / 2, "{took:?}");
    vm.stop_dialling();
    let dials = vm.counters().guest_dials;
    free(&vm);
    let counters = vm.counters();
    assert_eq!(
        (counters.guest_dials, counters.guest_dials_failed),
        (dials, 0)
    );
    let whole = (0..dials).filter(|number| number % 3 != 0 && number % 4 != 0);
    assert_eq!(counters.guest_echoes, whole.count() as u64);
    assert_alive(&vm);
}

#[test]
fn rude_services_are_rude() {
    let directory = tempfile::tempdir().unwrap();
    let vm = builder(&directory)
        .guest(1, Service::Endless)
        .guest(2, Service::Heedless(3 << 20))
        .guest(3, Service::Reset)
        .start()
        .unwrap();
    // It heeds no EOF; a close it must.
    let mut endless = dial(&vm, 1);
    endless.write_all(b"stop").unwrap();
    endless.shutdown(Shutdown::Write).unwrap();
    io::copy(&mut (&mut endless).take(8 << 20), &mut io::sink()).unwrap();
    drop(endless);
    free(&vm);
    // All that it has to say arrives, whatever it is told.
    let heedless = dial(&vm, 2);
    assert_eq!(finish(heedless).len(), 3 << 20);
    free(&vm);
    let mut reset = dial(&vm, 3);
    assert_quiet(&mut reset);
    reset.write_all(b"x").unwrap();
    assert_eq!(read_all(&mut reset).len(), 4096);
    free(&vm);
    assert_eq!(finish(dial(&vm, 3)).len(), 4096);
    free(&vm);
    assert_alive(&vm);
}

/// Some before they are accepted, some (`scripts/check-manners`) just after.
#[test]
fn programs_that_have_left_keep_no_other_waiting() {
    /// The device would sleep once for each of them, 250 ms.
    const GONE: usize = 60;
    let directory = tempfile::tempdir().unwrap();
    let any = Endpoint::Tcp(([127, 0, 0, 1], 0).into());
    let vm = builder(&directory).dial(5000, Dial::Listen(any));
    let vm = vm.start().unwrap();
    let Some(Endpoint::Tcp(address)) = vm.dial_addr(5000) else {
        panic!("no address");
    };
    let listener = host_socket(&vm, 5000);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || io::copy(&mut &stream, &mut &stream));
        }
    });
    vm.pause();
    for _ in 0..GONE {
        let program = TcpStream::connect(address).unwrap();
        let socket = socket2::SockRef::from(&program);
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }
    let mut program = TcpStream::connect(address).unwrap();
    program.set_read_timeout(Some(LONG)).unwrap();
    program.write_all(b"here").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    let resumed = Instant::now();
    vm.resume();
    assert_eq!(read_all(&mut program), b"here");
    let took = resumed.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_alive(&vm);
}

#[test]
fn the_chosen_address_of_a_dial_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let any = Endpoint::Tcp(([127, 0, 0, 1], 0).into());
    let vm = builder(&directory)
        .dial(8, Dial::Listen(any))
        .start()
        .unwrap();
    let Some(Endpoint::Tcp(address)) = vm.dial_addr(8) else {
        panic!("no address");
    };
    let listener = host_socket(&vm, 8);
    let mut program = TcpStream::connect(address).unwrap();
    program.write_all(b"x").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(finish(accept(&listener)), b"x");
    assert_eq!(vm.dial_addr(9), None);
    assert_eq!(read_all(&mut program), b"");
    assert_alive(&vm);
}

#[test]
fn half_close_works_both_ways() {
    const LENGTH: usize = 8 << 20;
    let directory = tempfile::tempdir().unwrap();
    let (sums, received) = std::sync::mpsc::channel();
    let sums = std::sync::Mutex::new(sums);
    let vm = builder(&directory)
        // Answers only after EOF.
        .guest(
            1,
            Service::custom(|mut stream| {
                let got = receive(&mut stream);
                stream.write_all(format!("{got:?}").as_bytes()).unwrap();
            }),
        )
        // Ends its own direction first, and then reads.
        .guest(
            2,
            Service::custom(move |mut stream| {
                send_pattern(&mut stream, 2, LENGTH);
                stream.shutdown(Shutdown::Write).unwrap();
                sums.lock().unwrap().send(receive(&mut stream)).unwrap();
            }),
        )
        .start()
        .unwrap();

    let mut stream = dial(&vm, 1);
    let sum = send_pattern(&mut stream, 1, LENGTH);
    let answer = String::from_utf8(finish(stream)).unwrap();
    assert_eq!(answer, format!("{:?}", (LENGTH, sum)));

    let mut stream = dial(&vm, 2);
    assert_eq!(
        receive(&mut stream),
        (LENGTH, send_pattern(&mut io::sink(), 2, LENGTH))
    );
    let sum = send_pattern(&mut stream, 3, LENGTH);
    assert_eq!(finish(stream), b"");
    assert_eq!(received.recv_timeout(LONG).unwrap(), (LENGTH, sum));

    let mut stream = dial(&vm, ECHO);
    let mut reader = stream.try_clone().unwrap();
    let writer = thread::spawn(move || {
        let sum = send_pattern(&mut stream, 4, LENGTH);
        stream.shutdown(Shutdown::Write).unwrap();
        sum
    });
    let got = receive(&mut reader);
    assert_eq!(got, (LENGTH, writer.join().unwrap()));
    drop(reader);
    free(&vm);
    assert_alive(&vm);
}

#[test]
fn a_guest_that_reads_nothing_lets_a_bounded_amount_in() {
    let directory = tempfile::tempdir().unwrap();
    let deaf = Service::custom(|stream| {
        thread::park_timeout(LONG);
        drop(stream);
    });
    let vm = builder(&directory).guest(1, deaf).start().unwrap();
    for port in [SILENT, 1] {
        let mut stream = dial(&vm, port);
        stream.set_write_timeout(Some(SHORT)).unwrap();
        // As much as hvsock's have where the system's own is small.
        let socket = socket2::SockRef::from(&stream);
        if socket.send_buffer_size().unwrap() < 128 * 1024 {
            socket.set_send_buffer_size(128 * 1024).unwrap();
        }
        let mut total = 0;
        let chunk = [0; 65_536];
        while let Ok(n) = stream.write(&chunk) {
            total += n;
            assert!(total < 1 << 20, "no backpressure on port {port}");
        }
        assert!((150_000..420_000).contains(&total), "port {port}: {total}");
    }
    assert_alive(&vm);
}

#[test]
fn a_guest_that_ignores_eof_keeps_its_slot() {
    let directory = tempfile::tempdir().unwrap();
    let (go, wait) = std::sync::mpsc::channel::<&[u8]>();
    let wait = std::sync::Mutex::new(wait);
    let program = Service::custom(move |mut stream| {
        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0);
        let bytes = wait.lock().unwrap().recv_timeout(LONG).unwrap();
        stream.write_all(bytes).unwrap();
        if !bytes.is_empty() {
            // It keeps its end open; only the reset ends it.
            assert_eq!(
                stream.write(bytes).map(|_| stream.read(&mut [0]).ok()).ok(),
                None
            );
        }
    });
    let vm = builder(&directory).guest(1, program).start().unwrap();
    for bytes in [&b""[..], b"more"] {
        let mut stream = dial(&vm, 1);
        assert!(vm.wait_for(LONG, |counters| counters.live_slots == 1));
        assert_quiet(&mut stream);
        drop(stream);
        assert!(!vm.wait_for(SHORT, |counters| counters.live_slots == 0));
        go.send(bytes).unwrap();
        free(&vm);
    }
    assert_alive(&vm);
}
