//! What many forwards cost: their start, and a round trip through one of them.

use std::io;

use crate::contender::{BEFORE, Backs, Contender};
use crate::load::Load;
use crate::server::{Service, tcp};
use crate::table::takes_part;

const COUNTS: [u64; 4] = [1, 1000, 8000, 10_000];

const TRIPS: Load = Load::Trips {
    size: 64,
    count: 20_000,
    connections: 1,
};

/// Prints a line for each number of forwards that the limit of descriptors allows.
pub(crate) fn print_table(backs: &Backs, descriptors: u64) -> io::Result<()> {
    println!(
        "\nforwards; 64 B there and back through the first\n{:<18} {:>8} {:>10} {:>13} {:>12} {:>9} {:>8} {:>8} {:>9} {:>8}",
        "",
        "",
        "start s",
        "its CPU s",
        "CPU us/trip",
        "x first",
        "p50 us",
        "p99",
        "x none",
        "x own"
    );
    let direct = rate(tcp(Service::Echo))?;
    let own = |name| -> io::Result<f64> {
        match Contender::with_forwards(name, 1, backs)? {
            Some((contender, _)) => rate(contender.port(Service::Echo)),
            None => Ok(0.0),
        }
    };
    let own = own(BEFORE)?.max(own("hvsock --no-splice")?);
    for name in ["hvsock", "hvsock --no-splice", BEFORE] {
        let mut first = None;
        for count in COUNTS {
            if !takes_part(name) || count + 1000 > descriptors {
                continue;
            }
            let Some((contender, started)) = Contender::with_forwards(name, count, backs)? else {
                continue;
            };
            let port = contender.port(Service::Echo);
            let (start, _) = contender.cpu();
            TRIPS.run(port)?;
            let (begun, _) = contender.cpu();
            let measured = TRIPS.run(port)?;
            let trips = measured.trips.len() as f64;
            let cpu = (contender.cpu().0 - begun) * 1e6 / trips;
            let us = |share| measured.quantile(share).unwrap_or_default().as_secs_f64() * 1e6;
            let rate = trips / measured.took.as_secs_f64();
            println!(
                "{name:<18} {count:>8} {:>10.3} {start:>13.3} {cpu:>12.1} {:>9.2} {:>8.0} {:>8.0} {:>9.2} {:>8.2}",
                started.as_secs_f64(),
                cpu / *first.get_or_insert(cpu),
                us(0.5),
                us(0.99),
                rate / direct,
                rate / own
            );
        }
    }
    Ok(())
}

/// Round trips a second.
fn rate(port: u16) -> io::Result<f64> {
    let measured = TRIPS.run(port)?;
    Ok(measured.trips.len() as f64 / measured.took.as_secs_f64())
}
