//! What connections cost that do nothing: memory, the processor, and the round trips of another
//! one.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use crate::contender::{BARE, BARE_COPY, Backs, Contender, NAMES};
use crate::load::{connect, trip};
use crate::server::Service;
use crate::table::takes_part;

/// How many there are, if the limit of descriptors allows it.
const MOST: usize = 50_000;

/// For how long they are watched.
const WATCHED: Duration = Duration::from_secs(2);

const TRIPS: usize = 10_000;

/// Prints a table for a few thousand connections, and one for as many as can be.
pub(crate) fn print_tables(backs: &Backs, descriptors: u64) -> io::Result<()> {
    // Both ends of each are of this process, and of the proxies some want more than two.
    let most = usize::try_from(descriptors * 2 / 5).unwrap_or(MOST);
    let most = most.saturating_sub(1000).min(MOST);
    for count in [5_000.min(most), most] {
        print_table(count, backs)?;
    }
    Ok(())
}

fn print_table(count: usize, backs: &Backs) -> io::Result<()> {
    println!(
        "\nidle, {count} connections\n{:<18} {:>12} {:>12} {:>14} {:>12} {:>8}",
        "", "bytes each", "CPU ms/s", "p99 us alone", "beside them", "x alone"
    );
    for name in NAMES {
        // A process a connection.
        let is_left_out = ["no proxy", BARE, BARE_COPY, "socat"].contains(&name)
            || ["Mac", "hyperkit", "same"]
                .iter()
                .any(|it| name.contains(it))
            || !takes_part(name);
        if is_left_out {
            continue;
        }
        let Some(contender) = Contender::start(name, backs)? else {
            continue;
        };
        let port = contender.port(Service::Echo);
        let other = connect(port)?;
        p99(&other)?;
        let alone = p99(&other)?;
        let before = contender.memory();
        let streams: Vec<TcpStream> = (0..count)
            .map(|number| client(number, port))
            .collect::<io::Result<_>>()?;
        let bytes = contender.memory().saturating_sub(before) as f64 / count as f64;
        let (begun, _) = contender.cpu();
        thread::sleep(WATCHED);
        let busy = (contender.cpu().0 - begun) * 1e3 / WATCHED.as_secs_f64();
        let beside = p99(&other)?;
        drop(streams);
        println!(
            "{name:<18} {bytes:>12.0} {busy:>12.2} {:>14.0} {:>12.0} {:>8.2}",
            alone * 1e6,
            beside * 1e6,
            beside / alone
        );
    }
    Ok(())
}

/// A client that has carried a message. An address has 28,000 ports of its own.
fn client(number: usize, port: u16) -> io::Result<TcpStream> {
    let from = Ipv4Addr::new(127, 0, 1, 1 + u8::try_from(number / 20_000).unwrap_or(0));
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    socket.connect(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
    let stream = TcpStream::from(socket);
    stream.set_nodelay(true)?;
    trip(&stream, &mut [0; 64])?;
    Ok(stream)
}

/// Seconds.
fn p99(stream: &TcpStream) -> io::Result<f64> {
    let mut trips = Vec::with_capacity(TRIPS);
    for _ in 0..TRIPS {
        trips.push(trip(stream, &mut [0; 64])?);
    }
    trips.sort_unstable();
    Ok(trips[TRIPS * 99 / 100].as_secs_f64())
}
