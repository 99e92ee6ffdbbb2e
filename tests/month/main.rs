//! A month in small: the real binary carries a file's forwards, while its VM ends and comes back
//! all the time, the file changes, and clients of every kind come and go. Nothing may be lost that
//! could be kept, and nothing may pile up.
//!
//! `HVSOCK_MONTH` is how many seconds it lasts, `HVSOCK_MONTH_RESTART` how many lie between two
//! restarts of the VM, `HVSOCK_SEED` repeats a run's choices. The long run: `scripts/month`.
#![cfg(all(target_os = "linux", feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../soak/child.rs"]
#[allow(dead_code)]
mod child;
#[path = "../soak/client.rs"]
#[allow(dead_code)]
mod client;
mod clients;
#[path = "../common/command.rs"]
mod command;
#[path = "../common/mod.rs"]
mod common;
#[path = "../soak/crowd.rs"]
#[allow(dead_code)]
mod crowd;
#[path = "../soak/guest.rs"]
#[allow(dead_code)]
mod guest;
#[path = "../soak/host.rs"]
mod host;
mod hvsock;
mod vm;

use child::{Places, wait_until};
use client::End;
use clients::{Count, Others};
use crowd::{Tally, World};
use guest::{ECHO, LONG, PORTS};
use hvsock::{File, Hvsock, Status};
use nix::sys::signal::Signal;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vm::{Doors, Machine};

/// Threads of the crowd, of which each has one client after the other.
const CROWD: usize = 3;

/// Streams that last from the beginning to the end.
const STREAMS: u64 = 3;

/// Clients at once of the forward that waits.
const PATIENT: u64 = 3;

/// How long the VM is away, every other time; else it is back at once.
const AWAY: Duration = Duration::from_millis(1500);

/// Restarts after which all has been in use that is used, and the memory may grow no more.
const WARM: usize = 4;

/// How much more memory it may then have, in KiB: a few buffers, and what the allocator keeps.
const MORE: u64 = 3 * 1024;

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}")))
}

/// What was measured when nothing moved, after each restart.
/// Descriptors of the pipes through which bulk may go at the moment.
const PIPES: usize = 2 * 64;

#[derive(Clone, Copy, Debug)]
struct Sample {
    memory: u64,
    descriptors: usize,
}

struct Month<'a> {
    others: &'a Others<'a>,
    hvsock: &'a mut Hvsock<'a>,
    doors: &'a Doors,
    machine: Option<Machine>,
    restarts: usize,
    reloads: usize,
    samples: Vec<Sample>,
}

#[test]
fn a_month_in_small() {
    let lasts = Duration::from_secs(variable("HVSOCK_MONTH").unwrap_or(12));
    let between = variable("HVSOCK_MONTH_RESTART").unwrap_or(4).max(1);
    let seed = variable("HVSOCK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("month: {lasts:?}, a restart every {between} s, HVSOCK_SEED={seed}");
    let root = common::private_dir();
    let host = host::Host::start(root.path());
    let places = Places::new(root.path(), &host);
    let doors = Doors::start(places.root.clone());
    let machine = Machine::start(&places, &doors).unwrap();
    let mut hvsock = Hvsock::start(&places, &host).unwrap();
    let status = hvsock.status().unwrap();
    let address = |port| (port, status.tcp(&format!("tcp-{port}")));
    let tcp = PORTS.into_iter().map(address).collect();
    let mut world = World::new(&doors, &places, seed, usize::MAX, tcp);
    world.ends_silently = true;
    let over_tcp = |name| (status.tcp(name), Count::default());
    let others = Others {
        world: &world,
        plain: over_tcp("plain"),
        waiting: over_tcp("waiting"),
        idle: over_tcp("idle"),
        changed: (hvsock::changed(&places), Count::default()),
        passing: [hvsock::more(&places), hvsock::added(&places)].map(|it| (it, Count::default())),
        gone: false.into(),
        held: 0.into(),
        stillness: Default::default(),
        end: false.into(),
    };
    let mut month = Month {
        others: &others,
        hvsock: &mut hvsock,
        doors: &doors,
        machine: Some(machine),
        restarts: 0,
        reloads: 0,
        samples: Vec::new(),
    };
    let watched = AtomicBool::new(true);
    thread::scope(|scope| {
        for number in 0..STREAMS {
            let others = &others;
            scope.spawn(move || others.stream(number));
        }
        let (world, places, watched) = (&world, &places, &watched);
        scope.spawn(move || watch(world, places, watched));
        let end = Instant::now() + lasts;
        while Instant::now() < end && world.failures.lock().unwrap().is_empty() {
            world.over.store(false, Ordering::SeqCst);
            if let Err(error) = month.cycle(Duration::from_secs(between)) {
                world.fail(error);
            }
        }
        watched.store(false, Ordering::SeqCst);
        others.end.store(true, Ordering::SeqCst);
    });
    month.report();
    let failures = world.failures.lock().unwrap().clone();
    assert!(
        failures.is_empty(),
        "{failures:#?}\n{}",
        month.hvsock.proxy.log_tail()
    );
    month.check_end();
}

/// Asks for the status once a second.
fn watch(world: &World<'_, Doors>, places: &Places, watched: &AtomicBool) {
    let mut before = HashMap::new();
    while watched.load(Ordering::SeqCst) {
        let checked = Status::ask(places).and_then(|status| status.check(&mut before));
        if let Err(error) = checked {
            return world.fail(error);
        }
        wait_until(Duration::from_secs(1), || !watched.load(Ordering::SeqCst));
    }
}

fn median(samples: &[Sample]) -> u64 {
    let mut memory: Vec<u64> = samples.iter().map(|it| it.memory).collect();
    memory.sort_unstable();
    memory[memory.len() / 2]
}

impl Month<'_> {
    fn world(&self) -> &World<'_, Doors> {
        self.others.world
    }

    fn places(&self) -> &Places {
        self.world().places
    }

    /// From one restart to the next: traffic, in which the VM is restarted and the file changed,
    /// and then nothing at all.
    fn cycle(&mut self, time: Duration) -> Result<(), String> {
        let others = self.others;
        let world = others.world;
        thread::scope(|scope| {
            let crowd = (0..CROWD).map(|_| scope.spawn(|| world.clients()));
            let patient = (0..PATIENT).map(|it| scope.spawn(move || others.patient(it)));
            let mut threads: Vec<_> = crowd.chain(patient).collect();
            threads.extend([
                scope.spawn(|| world.guests(0)),
                scope.spawn(|| others.visitors()),
                scope.spawn(|| others.silent()),
                scope.spawn(|| others.followers()),
                scope.spawn(|| others.passers()),
            ]);
            let told = self.act(time);
            world.over.store(true, Ordering::SeqCst);
            let ended = threads.into_iter().map(|it| it.join().is_ok());
            // All are waited for, whatever the first one did.
            let well = ended.collect::<Vec<_>>().into_iter().all(|well| well);
            told.and(if well {
                Ok(())
            } else {
                Err("a thread panicked".into())
            })
        })?;
        match world.failures.lock().unwrap().is_empty() {
            true => self.at_rest(),
            false => Ok(()),
        }
    }

    fn act(&mut self, time: Duration) -> Result<(), String> {
        let others = self.others;
        // That the time passes is what it is for; a failure ends it.
        let pause = || wait_until(time / 4, || others.world.is_over());
        let kind = self.restarts;
        let [more, added] = &others.passing;
        pause();
        let stays = others.begin(&others.changed)?;
        self.reload(match kind % 4 {
            0 | 2 => File::Changed,
            1 => File::More,
            _ => File::Bad,
        })?;
        others.go_on(stays, "the file has changed")?;
        self.restart(kind)?;
        pause();
        self.hvsock.add()?;
        let stays = others.begin(added)?;
        pause();
        self.hvsock.remove()?;
        others.go_on(stays, "its forward was removed")?;
        let stays = match kind % 4 {
            1 => others.begin(more)?,
            _ => others.begin(&others.changed)?,
        };
        self.reload(File::Usual)?;
        others.go_on(stays, "the file is as it was")?;
        pause();
        Ok(())
    }

    fn reload(&mut self, file: File) -> Result<(), String> {
        self.reloads += 1;
        self.hvsock.reload(file)
    }

    /// Ends the VM in one way or the other, and starts it anew at once or after a while.
    fn restart(&mut self, kind: usize) -> Result<(), String> {
        let others = self.others;
        let world = others.world;
        let signal = match kind % 2 {
            0 => Signal::SIGKILL,
            _ => Signal::SIGTERM,
        };
        let machine = self.machine.take().expect("it runs");
        world.changes.fetch_add(1, Ordering::SeqCst);
        machine.end(signal)?;
        *world.may_dial.write().unwrap() = false;
        others.gone.store(true, Ordering::SeqCst);
        if (kind / 2).is_multiple_of(2) {
            self.known("it is gone", |status| status.vm()["up"] == false)?;
            let refused = |mut conn| client::refused(&mut conn, b"anybody there?", false);
            match world.open(ECHO, true).and_then(refused) {
                Ok(End::Reset) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
                other => return Err(format!("the VM is gone, and a client saw {other:?}")),
            }
            wait_until(AWAY, || world.is_over());
        }
        others.gone.store(false, Ordering::SeqCst);
        self.machine = Some(Machine::start(self.places(), self.doors)?);
        self.restarts += 1;
        let restarts = self.restarts as u64;
        self.known("it is back", |status| {
            status.vm()["up"] == true && status.vm()["restarts"] == restarts
        })?;
        *world.may_dial.write().unwrap() = true;
        world.changes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Waits until status says so.
    fn known(&self, what: &str, says: impl Fn(&Status) -> bool) -> Result<(), String> {
        let mut last = None;
        let known = wait_until(LONG, || {
            last = Some(self.hvsock.status());
            matches!(&last, Some(Ok(status)) if says(status))
        });
        match known {
            true => Ok(()),
            false => Err(format!(
                "restart {}, status never says that {what}: {last:?}",
                self.restarts
            )),
        }
    }

    /// With no clients but the streams, which pause: nothing is left of those who were there, and
    /// all is accounted for.
    fn at_rest(&mut self) -> Result<(), String> {
        self.machine.as_mut().expect("it runs").check()?;
        let _stillness = self.others.stillness.write().unwrap();
        self.known("all have gone", |status| status.live() == STREAMS)?;
        self.account(STREAMS)?;
        let proxy = &self.hvsock.proxy;
        let descriptors = proxy.descriptors_at_rest().ok_or("no /proc")?;
        let memory = proxy.memory("VmRSS:").ok_or("no VmRSS")?;
        let sample = Sample {
            memory,
            descriptors,
        };
        self.samples.push(sample);
        println!("month: restart {}, {sample:?}", self.restarts);
        let first = self.samples[0].descriptors;
        if descriptors > first + PIPES {
            return Err(format!("{descriptors} descriptors, and {first} at first"));
        }
        let warm = self.samples.iter().take(WARM).map(|it| it.memory).max();
        let most = warm.expect("one at least") + MORE;
        match memory <= most {
            true => Ok(()),
            false => Err(format!("{memory} KiB of memory, and {most} are the most")),
        }
    }

    /// Compares what status counts with what clients did. `live` are the streams that are there.
    fn account(&self, live: u64) -> Result<(), String> {
        let others = self.others;
        let at = self.hvsock.status()?;
        let same = |name: &str, counter: &str, expected: u64| {
            let counted = at.count(name, counter);
            match counted == expected {
                true => Ok(()),
                false => Err(format!("{name}: {counter} {counted}, not {expected}")),
            }
        };
        let at_least = |name: &str, counter: &str, least: u64| {
            let counted = at.count(name, counter);
            match counted >= least {
                true => Ok(()),
                false => Err(format!("{name}: {counter} {counted}, less than {least}")),
            }
        };
        // Who is accepted in the place of a listener that is gone is nobody's: but these never
        // went.
        for ((port, tcp), opened) in &*self.world().opened.lock().unwrap() {
            let family = if *tcp { "tcp" } else { "unix" };
            let name = format!("{family}-{port}");
            same(&name, "accepted", *opened)?;
            same(&name, "live", 0)?;
        }
        same("changed", "accepted", others.changed.1.of(|it| &it.opened))?;
        for (name, (_, count)) in [("waiting", &others.waiting), ("idle", &others.idle)] {
            same(name, "accepted", count.of(|it| &it.opened))?;
            same(name, "live", 0)?;
            at_least(name, "sent", count.of(|it| &it.sent))?;
            at_least(name, "received", count.of(|it| &it.received))?;
        }
        at_least("idle", "idle", others.idle.1.of(|it| &it.whole))?;
        let plain = &others.plain.1;
        same("plain", "accepted", plain.of(|it| &it.opened))?;
        same("plain", "live", live)?;
        same("plain", "refused", 0)?;
        same("plain", "sent", plain.of(|it| &it.sent))?;
        same("plain", "received", plain.of(|it| &it.received))
    }

    fn report(&self) {
        let others = self.others;
        for (kind, tally) in &*self.world().tallies.lock().unwrap() {
            println!("month: {:8} {kind}, {} cut", tally.done, tally.cut);
        }
        let mib = |kib: u64| kib as f64 / 1024.0;
        let warm = &self.samples[WARM.min(self.samples.len())..];
        let third = warm.len().div_ceil(3).max(1);
        let medians = warm
            .chunks(third)
            .map(|of| format!("{:.2}", mib(median(of))));
        let medians: Vec<_> = medians.collect();
        let memory = |it: Option<u64>| mib(it.unwrap_or(0));
        let row = |what: &str, value: String| println!("month| {what:44} {value}");
        row(
            "VM restarts, reloads",
            format!("{}, {}", self.restarts, self.reloads),
        );
        let tallies = self.world().tallies.lock().unwrap();
        let total = |of: fn(&Tally) -> u64| tallies.values().map(of).sum::<u64>();
        let (done, cut) = (total(|it| it.done), total(|it| it.cut));
        let clean = total(|it| it.clean) + others.waiting.1.of(|it| &it.clean);
        row(
            "the VM's clients: served or rude, cut off",
            format!("{done}, {cut}"),
        );
        row("cut off by an EOF over TCP, with the VM", clean.to_string());
        for (name, count) in [
            ("beside the VM", &others.plain.1),
            ("that wait for the VM", &others.waiting.1),
            ("cut off for their silence", &others.idle.1),
            ("of a forward that leads elsewhere", &others.changed.1),
            (
                "of a forward that the file has at times",
                &others.passing[0].1,
            ),
            (
                "of a forward that is added and removed",
                &others.passing[1].1,
            ),
        ] {
            let whole = count.of(|it| &it.whole);
            let moved = count.of(|it| &it.sent) + count.of(|it| &it.received);
            row(
                &format!("clients {name}"),
                format!("{whole}, {:.1} MiB", moved as f64 / (1 << 20) as f64),
            );
        }
        row(
            "clients that were held till the VM was back",
            others.held.load(Ordering::SeqCst).to_string(),
        );
        row(
            "memory at rest: first, then least and most",
            format!(
                "{:.1}, {:.1} to {:.1} MiB",
                memory(self.samples.first().map(|it| it.memory)),
                memory(warm.iter().map(|it| it.memory).min()),
                memory(warm.iter().map(|it| it.memory).max()),
            ),
        );
        row(
            "the same in three thirds, the medians",
            format!("{} MiB", medians.join(", ")),
        );
        let descriptors = |of: Option<usize>| of.unwrap_or(0);
        row(
            "descriptors at rest: least and most",
            format!(
                "{} to {}",
                descriptors(self.samples.iter().map(|it| it.descriptors).min()),
                descriptors(self.samples.iter().map(|it| it.descriptors).max()),
            ),
        );
    }

    /// Nothing is left, neither of the clients nor of the proxy.
    fn check_end(&mut self) {
        self.known("the streams have gone", |status| status.live() == 0)
            .unwrap();
        self.account(0).unwrap();
        self.hvsock.proxy.signal(Signal::SIGTERM);
        let (status, time) = self.hvsock.proxy.wait(LONG).unwrap();
        assert_eq!(status.code(), Some(0), "{}", self.hvsock.proxy.log_tail());
        let places = self.places();
        let mut left = places.left_over();
        let more = [
            hvsock::changed(places),
            hvsock::more(places),
            hvsock::added(places),
            places.root.join("hvsock/control.sock"),
        ];
        left.extend(more.into_iter().filter(|it| it.symlink_metadata().is_ok()));
        assert!(left.is_empty(), "left over: {left:?}");
        let machine = self.machine.take().expect("it runs");
        machine.end(Signal::SIGTERM).unwrap();
        println!("month| {:44} {time:.1?}", "end after SIGTERM");
        println!("month: all is well");
    }
}
