//! Relay threads on which no byte moves.

use super::*;

const TIME: Duration = Duration::from_millis(1_500);

#[test]
fn relay_threads_on_which_nothing_moves_are_cut_off() {
    let (it, listener) = proxy(|config| config.rules[0].timeouts.idle = Some(TIME));
    let (mut client, mut server) = it.pair(&listener);
    let begun = Instant::now();
    let mut last = begun;
    while begun.elapsed() < 3 * TIME {
        last = Instant::now();
        server.write_all(b"x").unwrap();
        client.read_exact(&mut [0]).unwrap();
        thread::sleep(TIME / 12);
    }
    assert_eq!(it.counters().timed_out.idle, 0);
    assert_reset(client.read(&mut [0]));
    assert!(last.elapsed() >= TIME);
    assert_reset(server.read(&mut [0]));
    it.wait_for(|counters| counters.live == 0);
    assert_eq!(it.counters().timed_out.idle, 1);
}

#[test]
fn relay_threads_of_which_one_side_has_ended_are_cut_off() {
    let (it, listener) = proxy(|config| config.rules[0].timeouts.half_closed = Some(TIME));
    let (mut client, mut server) = it.pair(&listener);
    thread::sleep(2 * TIME);
    server.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(server.read_to_end(&mut Vec::new()).unwrap(), 0);
    assert_reset(client.read(&mut [0]));
    it.wait_for(|counters| counters.live == 0);
    assert_eq!(it.counters().timed_out.half_closed, 1);
}

/// The server that no poller can wait for is absent at first.
#[test]
fn a_client_is_held_until_what_no_poller_can_wait_for_is_there() {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    socket.bind(&any.into()).unwrap();
    let target = socket.local_addr().unwrap().as_socket().unwrap();
    let it = proxy_to(format!("tcp://{target}").parse().unwrap(), |config| {
        config.rules[0].wait = Some(PATIENCE);
    });
    let mut client = it.client();
    client.write_all(b"early").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    it.wait_for(|counters| counters.accepted == 1);
    thread::sleep(Duration::from_millis(200));
    socket.listen(16).unwrap();
    let mut server = patient(TcpListener::from(socket).accept().unwrap().0);
    let mut request = Vec::new();
    server.read_to_end(&mut request).unwrap();
    assert_eq!(request, b"early");
    server.write_all(b"late").unwrap();
    drop(server);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(
        (answer.as_slice(), it.counters().refused),
        (b"late".as_slice(), 0)
    );
}
