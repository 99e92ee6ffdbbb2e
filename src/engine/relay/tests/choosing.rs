//! The choice of the carrier: on machines where pipes are cheaper, where copies are, and where that
//! changes.

use std::time::{Duration, Instant};

use super::bench::Bench;
use super::kernel::{Costs, Habits, set_costs};
use crate::engine::relay::chooser::{Chooser, Rest, Span};
use crate::engine::relay::{Side, Through};

const UNIT: usize = 1000;

/// Bytes that are enough for a comparison and the pause after it.
const LONG: u64 = 220_000 * UNIT as u64;

/// A machine on which a byte takes so many nanoseconds in calls, and so many in waits between them.
#[derive(Clone, Copy)]
struct Machine {
    copied: u64,
    spliced: u64,
    copied_waits: u64,
    spliced_waits: u64,
    /// One call in so many takes a hundred times as long, since the process is interrupted.
    interrupts: Option<u64>,
    /// Before some calls the client has nothing to say for a second, and that while bytes happen to
    /// pass through this.
    silences: Option<Through>,
}

/// Sends so many bytes, as many at a time as a turn allows. Returns how many went through a pipe,
/// and for how many the time was taken.
fn send(chooser: &mut Chooser, machine: Machine, bytes: u64) -> (u64, u64) {
    let (mut piped, mut timed, mut sent) = (0, 0, 0);
    let most = 2 * UNIT as u64;
    let mut now = Instant::now();
    while sent < bytes {
        let through = chooser.choice();
        let (cost, wait) = match through {
            Through::Memory => (machine.copied, machine.copied_waits),
            Through::Pipe => (machine.spliced, machine.spliced_waits),
        };
        let happens = |every| (sent / most).is_multiple_of(every);
        let times = match machine.interrupts.is_some_and(happens) {
            true => 100,
            false => 1,
        };
        if machine.silences == Some(through) && happens(11) {
            now += Duration::from_secs(1);
        }
        if through == Through::Pipe {
            piped += most;
        }
        let begun = now + Duration::from_nanos(wait * most);
        now = begun + Duration::from_nanos(times * cost * most);
        let span = chooser.needs_time().then_some(Span { begun, ended: now });
        timed += if chooser.needs_time() { most } else { 0 };
        chooser.note(Some(through), most, span, Rest::GoesOn);
        sent += most;
    }
    (piped, timed)
}

fn machine(copied: u64, spliced: u64) -> Machine {
    Machine {
        copied,
        spliced,
        copied_waits: 0,
        spliced_waits: 0,
        interrupts: None,
        silences: None,
    }
}

fn choice_after(machine: Machine) -> Through {
    let mut chooser = Chooser::new(UNIT);
    send(&mut chooser, machine, LONG);
    // (Not in the midst of a comparison.)
    while chooser.needs_time() {
        send(&mut chooser, machine, 1);
    }
    chooser.choice()
}

#[test]
fn the_cheaper_carrier_is_chosen() {
    assert_eq!(choice_after(machine(30, 20)), Through::Pipe);
    assert_eq!(choice_after(machine(20, 30)), Through::Memory);
}

#[test]
fn what_costs_nearly_the_same_stays_as_it_is() {
    assert_eq!(choice_after(machine(99, 100)), Through::Pipe);
    assert_eq!(choice_after(machine(94, 100)), Through::Memory);
}

#[test]
fn interruptions_do_not_mislead() {
    let interrupted = |copied, spliced| Machine {
        interrupts: Some(47),
        ..machine(copied, spliced)
    };
    assert_eq!(choice_after(interrupted(30, 20)), Through::Pipe);
    assert_eq!(choice_after(interrupted(20, 30)), Through::Memory);
}

/// Other processes take their share of the processors for some milliseconds at a time.
#[test]
fn a_busy_machine_misleads_seldom() {
    const MACHINES: u64 = 200;
    let choices = |copied, spliced| {
        (0..MACHINES)
            .map(|seed| {
                let mut noise = fastrand::Rng::with_seed(seed);
                let mut chooser = Chooser::new(UNIT);
                let mut now = Instant::now();
                // A first comparison, and some more.
                for _ in 0..600 {
                    let percent = noise.u64(70..=150);
                    for _ in 0..32 {
                        let through = chooser.choice();
                        let nanos = match through {
                            Through::Memory => copied * percent,
                            Through::Pipe => spliced * percent,
                        };
                        let begun = now;
                        now += Duration::from_nanos(nanos * UNIT as u64);
                        let span = Some(Span { begun, ended: now });
                        chooser.note(Some(through), UNIT as u64, span, Rest::GoesOn);
                    }
                }
                while chooser.needs_time() {
                    chooser.note(None, UNIT as u64, None, Rest::GoesOn);
                }
                chooser.choice()
            })
            .collect::<Vec<_>>()
    };
    for (copied, spliced, better) in [(80, 100, Through::Memory), (100, 80, Through::Pipe)] {
        let found = choices(copied, spliced);
        let right = found.iter().filter(|it| **it == better).count() as u64;
        assert!(
            right >= MACHINES - MACHINES / 50,
            "{right} of {MACHINES}, {better:?}"
        );
    }
}

#[test]
fn a_change_of_the_machine_is_noticed() {
    let mut chooser = Chooser::new(UNIT);
    send(&mut chooser, machine(20, 30), LONG);
    let (piped, _) = send(&mut chooser, machine(30, 20), LONG);
    assert!(piped > LONG / 2, "{piped}");
    let (piped, _) = send(&mut chooser, machine(20, 30), LONG);
    assert!(piped < LONG / 2, "{piped}");
}

#[test]
fn less_than_a_hundredth_goes_through_the_dearer_carrier() {
    let mut chooser = Chooser::new(UNIT);
    let costs = machine(20, 30);
    send(&mut chooser, costs, LONG);
    let all = 20 * LONG;
    let (piped, timed) = send(&mut chooser, costs, all);
    assert!(piped > 0 && piped <= all / 100, "{piped} of {all}");
    assert!(timed > 0 && timed <= all / 50, "{timed} of {all}");
}

/// What a carrier costs the peers is in no call of ours.
#[test]
fn the_carrier_through_which_more_passes_is_chosen_though_its_calls_take_longer() {
    let waits = |copied_waits, spliced_waits| Machine {
        copied_waits,
        spliced_waits,
        ..machine(30, 20)
    };
    assert_eq!(choice_after(waits(10, 40)), Through::Memory);
    assert_eq!(choice_after(waits(40, 10)), Through::Pipe);
}

#[test]
fn where_a_network_sets_the_pace_the_cheaper_carrier_is_chosen() {
    let paced = |copied, spliced| Machine {
        copied_waits: 1000 - copied,
        spliced_waits: 1000 - spliced,
        ..machine(copied, spliced)
    };
    assert_eq!(choice_after(paced(20, 30)), Through::Memory);
    assert_eq!(choice_after(paced(30, 20)), Through::Pipe);
}

#[test]
fn silences_do_not_mislead() {
    let silent = |through, copied, spliced| Machine {
        silences: Some(through),
        ..machine(copied, spliced)
    };
    let pipe = silent(Through::Pipe, 30_000, 20_000);
    assert_eq!(choice_after(pipe), Through::Pipe);
    let memory = silent(Through::Memory, 20_000, 30_000);
    assert_eq!(choice_after(memory), Through::Memory);
}

#[test]
fn where_wake_ups_outweigh_the_calls_fewer_are_preferred() {
    let mut chooser = Chooser::new(UNIT);
    let mut now = Instant::now();
    for _ in 0..LONG / UNIT as u64 {
        // As fast, with a wait for each kilobyte or for two.
        let (bytes, nanos, through) = match chooser.choice() {
            Through::Memory => (UNIT as u64, 1000, Through::Memory),
            Through::Pipe => (2 * UNIT as u64, 3000, Through::Pipe),
        };
        let begun = now + Duration::from_nanos(10_000 * bytes / UNIT as u64 - nanos);
        now = begun + Duration::from_nanos(nanos);
        let span = Some(Span { begun, ended: now });
        chooser.note(Some(through), bytes, span, Rest::Sleeps);
    }
    while chooser.needs_time() {
        chooser.note(None, UNIT as u64, None, Rest::GoesOn);
    }
    assert_eq!(chooser.choice(), Through::Pipe);
}

#[test]
fn a_comparison_ends_where_no_pipe_can_be_had() {
    let mut chooser = Chooser::new(UNIT);
    let begun = Instant::now();
    let span = Span {
        begun,
        ended: begun + Duration::from_micros(1),
    };
    let mut timed = 0;
    for _ in 0..LONG / UNIT as u64 {
        timed += u64::from(chooser.needs_time());
        chooser.note(Some(Through::Memory), UNIT as u64, Some(span), Rest::GoesOn);
    }
    assert!(timed < LONG / UNIT as u64 / 5, "{timed}");
}

#[test]
fn a_comparison_ends_where_flows_change_their_carrier_in_each_turn() {
    let mut chooser = Chooser::new(UNIT);
    let mut timed = 0;
    for _ in 0..LONG / UNIT as u64 {
        timed += u64::from(chooser.needs_time());
        chooser.note(None, UNIT as u64, None, Rest::GoesOn);
    }
    assert!(timed < LONG / UNIT as u64 / 10, "{timed}");
}

/// The relay takes what the chooser says, and measures what it costs.
#[test]
fn a_flow_takes_what_is_cheaper() {
    const ROUNDS: u64 = 40_000;
    let carried = |copied, spliced| {
        set_costs(Costs {
            copied: Duration::from_micros(copied),
            spliced: Duration::from_micros(spliced),
        });
        let habits = Habits {
            drains: true,
            splices: true,
            ..Habits::default()
        };
        let mut pair = Bench::<true>::with([habits.clone(), habits]);
        for _ in 0..ROUNDS {
            pair.client().say(64);
            pair.settle();
            pair.server().hear(64);
        }
        assert_eq!(pair.wire(Side::Server).written, 64 * ROUNDS);
        Through::ALL.map(|through| pair.carried.bytes(through))
    };
    let [copied, spliced] = carried(20, 10);
    assert_eq!(copied + spliced, 64 * ROUNDS);
    assert!(spliced > copied * 3, "{copied} copied, {spliced} spliced");
    let [copied, spliced] = carried(10, 20);
    assert_eq!(copied + spliced, 64 * ROUNDS);
    assert!(copied > spliced * 3, "{copied} copied, {spliced} spliced");
}
