#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::gate::{BURST, INTERVAL, LONGEST_PATIENCE, LOST_PROBES, PROBE_PATIENCE, WANTED};
use super::quotas::{Holder, ReachedLimit};
use super::*;
use crate::address::{AnyVm, HyperkitVm};
use crate::engine::health::{VmIdentity, VmLook};
use crate::engine::id::ForwardId;
use crate::engine::rule::WhileDown;

const ONE: ForwardId = ForwardId(1);

fn gate(live: usize, unanswered: u64) -> Arc<Gate> {
    Arc::new(Gate::new(
        GateLimits { live, unanswered },
        HyperkitVm::new("/tmp/vm").into(),
    ))
}

fn look(identity: Option<VmIdentity>) -> VmLook {
    VmLook {
        identity,
        ..VmLook::default()
    }
}

fn go(gate: &Arc<Gate>, now: Instant) -> Slot {
    match gate.admit(ONE, now) {
        Admission::Go(mut slot) => {
            slot.note_unidentified_dial(now);
            slot
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn dials_keep_their_distance_on_average() {
    let gate = gate(10_000, 10_000);
    let start = Instant::now();
    let mut now = start;
    let mut times = Vec::new();
    while times.len() < 1000 {
        match gate.admit(ONE, now) {
            Admission::Go(mut slot) => {
                slot.note_unidentified_dial(now);
                times.push(now);
            }
            Admission::At(then) => {
                assert!(then > now);
                // The millisecond of a poll timeout.
                now = then + Duration::from_micros(900);
            }
            other => panic!("{other:?}"),
        }
    }
    for window in times.windows(BURST as usize + 1) {
        let span = window[BURST as usize] - window[0];
        assert!(
            span >= INTERVAL,
            "{BURST} dials and one more within {span:?}"
        );
    }
    let average = (times[999] - start) / 1000;
    assert!(average >= Duration::from_micros(100), "{average:?}");
}

#[test]
fn probes_keep_the_distance_of_dials() {
    let gate = gate(900, 1);
    let now = Instant::now();
    // Each is answered at once.
    for dial in 0..BURST {
        match gate.admit(ONE, now) {
            Admission::Go(mut slot) if dial % 2 == 0 => slot.note_unidentified_dial(now),
            Admission::Probe(mut slot) if dial % 2 == 1 => {
                slot.note_unidentified_dial(now);
                slot.note_answer(now);
            }
            other => panic!("{dial}: {other:?}"),
        }
    }
    assert!(matches!(gate.admit(ONE, now), Admission::At(_)));
}

#[test]
fn a_vm_that_may_have_one_connection_only_keeps_no_slot_for_probes() {
    let gate = gate(900, 64);
    let _slots = gate.reserve(ONE, 0, Some(WhileDown::HoldsClients)).unwrap();
    gate.set_limits(GateLimits {
        live: 1,
        unanswered: 64,
    });
    let other = ForwardId(2);
    let admission = gate.admit(other, Instant::now());
    assert!(matches!(admission, Admission::Go(_)), "{admission:?}");
}

#[test]
fn a_guest_that_answers_nothing_is_not_dialled_without_end() {
    let gate = gate(900, 64);
    let mut now = Instant::now();
    let mut slots = Vec::new();
    for _ in 0..64 {
        now += Duration::from_millis(1);
        slots.push(go(&gate, now));
    }
    now += Duration::from_secs(1);
    let Admission::Probe(mut probe) = gate.admit(ONE, now) else {
        panic!()
    };
    probe.note_unidentified_dial(now);
    assert!(matches!(
        gate.admit(ONE, now),
        Admission::Full(Full::Unanswered(64))
    ));
    // Dropping slots is no answer.
    let last = slots.pop().unwrap();
    slots.clear();
    assert!(matches!(
        gate.admit(ONE, now),
        Admission::Full(Full::Unanswered(64))
    ));
    last.note_answer(now);
    drop(go(&gate, now));
}

#[test]
fn old_connections_say_nothing_of_newer_dials() {
    let gate = gate(900, 3);
    let mut now = Instant::now();
    let first = go(&gate, now);
    first.note_answer(now);
    for _ in 0..3 {
        now += Duration::from_millis(1);
        drop(go(&gate, now));
    }
    first.note_answer(now);
    assert!(matches!(gate.admit(ONE, now), Admission::Probe(_)));
}

#[test]
fn an_answered_probe_lets_the_others_through() {
    let gate = gate(900, 1);
    let mut now = Instant::now();
    let _silent = go(&gate, now);
    now += Duration::from_millis(1);
    let Admission::Probe(mut probe) = gate.admit(ONE, now) else {
        panic!()
    };
    probe.note_unidentified_dial(now);
    assert!(matches!(gate.admit(ONE, now), Admission::Full(_)));
    probe.note_answer(now);
    drop(probe);
    drop(go(&gate, now));
}

#[test]
fn a_probe_lost_in_a_reboot_does_not_block_dials_for_ever() {
    let gate = gate(900, 1);
    let mut now = Instant::now();
    let _silent = go(&gate, now);
    let mut lost = Vec::new();
    for patience in [30, 60, 120] {
        let Admission::Probe(mut probe) = gate.admit(ONE, now) else {
            panic!()
        };
        probe.note_unidentified_dial(now);
        lost.push(probe);
        now += Duration::from_secs(patience - 1);
        assert!(matches!(gate.admit(ONE, now), Admission::Full(_)));
        now += Duration::from_secs(1);
    }
    lost.pop().unwrap().note_answer(now);
    drop(go(&gate, now));
}

#[test]
fn lost_probes_are_not_enough_to_kill_the_device() {
    let gate = gate(900, 4);
    let mut now = Instant::now();
    let mut dials = 0;
    for _ in 0..1000 {
        match gate.admit(ONE, now) {
            Admission::Go(mut slot) | Admission::Probe(mut slot) => {
                slot.note_unidentified_dial(now);
                dials += 1;
            }
            _ => {}
        }
        now += LONGEST_PATIENCE;
    }
    assert_eq!(dials, 4 + LOST_PROBES);
}

// The identities of two files are needed, which only Unix has.
#[cfg(unix)]
#[test]
fn a_new_vm_starts_afresh_and_old_slots_do_not_count() {
    let directory = tempfile::tempdir().unwrap();
    let (one, two) = (directory.path().join("one"), directory.path().join("two"));
    std::fs::write(&one, "").unwrap();
    std::fs::write(&two, "").unwrap();
    let of = |path| crate::sys::Identity::of(path).ok().map(VmIdentity::Socket);
    let (one, two) = (of(&one), of(&two));
    let gate = gate(1, 64);
    let now = Instant::now();
    let Admission::Go(mut old) = gate.admit(ONE, now) else {
        panic!()
    };
    old.note_dial(one, now);
    assert!(matches!(
        gate.admit(ONE, now),
        Admission::Full(Full::Live { cap: 1, lost: 0 })
    ));
    assert!(gate.begin_look(now, Duration::ZERO));
    gate.take_look(&look(two), now);
    let Admission::Go(mut new) = gate.admit(ONE, now) else {
        panic!()
    };
    new.note_dial(two, now);
    drop(old);
    assert_eq!(gate.live(), 1);
    drop(new);
    assert_eq!(gate.live(), 0);
}

// The identities of two files are needed, which only Unix has.
#[cfg(unix)]
#[test]
fn a_dial_counts_for_the_vm_that_got_it() {
    let directory = tempfile::tempdir().unwrap();
    let of = |name| {
        let path = directory.path().join(name);
        std::fs::write(&path, "").unwrap();
        crate::sys::Identity::of(&path).ok().map(VmIdentity::Socket)
    };
    let (one, two) = (of("one"), of("two"));
    let gate = gate(4, 64);
    let now = Instant::now();
    let go = || match gate.admit(ONE, now) {
        Admission::Go(slot) => slot,
        other => panic!("{other:?}"),
    };
    let (mut first, mut second, third) = (go(), go(), go());
    first.note_dial(one, now);
    second.note_dial(two, now);
    assert_eq!(gate.live(), 1);
    drop(first);
    // A slot that was never dialled, and was admitted to the old VM.
    drop(third);
    assert_eq!((gate.live(), gate.status(now).unanswered), (1, 1));
    assert!(!second.is_answered());
    second.note_answer(now);
    assert!(second.is_answered());
    drop(second);
    assert_eq!((gate.live(), gate.status(now).unanswered), (0, 0));
}

#[test]
fn a_vm_is_looked_at_once_at_a_time() {
    let gate = gate(1, 64);
    let now = Instant::now();
    let second = Duration::from_secs(1);
    assert!(gate.begin_look(now, second));
    // The look hangs: dials are refused meanwhile.
    assert!(!gate.begin_look(now + 10 * second, second));
    assert!(matches!(gate.admit(ONE, now + second), Admission::Go(_)));
    let hangs = gate.admit(ONE, now + 3 * second);
    assert!(matches!(hangs, Admission::Full(Full::Hangs)));
    gate.take_look(&look(None), now + 10 * second);
    let admission = gate.admit(ONE, now + 10 * second);
    assert!(matches!(admission, Admission::Go(_)));
    assert!(gate.begin_look(now + 10 * second, second));
    gate.take_look(&look(None), now + 10 * second);
    assert!(!gate.begin_look(now + 10 * second, second));
    // Nothing is known after a look that failed, and the next one may follow.
    assert!(gate.begin_look(now + 20 * second, second));
    gate.end_look();
    let is_hanging = gate.state().is_hanging(now + 30 * second);
    assert!(!is_hanging);
    assert!(gate.begin_look(now + 30 * second, second));
}

#[test]
fn a_dial_from_the_guest_takes_a_slot_too() {
    let gate = gate(2, 64);
    let now = Instant::now();
    let guests = [
        gate.accept(ONE, None, Instant::now()),
        gate.accept(ONE, None, Instant::now()),
    ];
    assert!(matches!(
        gate.admit(ONE, now),
        Admission::Full(Full::Live { cap: 2, lost: 0 })
    ));
    drop(guests);
    assert_eq!(gate.live(), 0);
    drop(go(&gate, now));
}

#[test]
fn a_slot_that_never_became_a_dial_is_given_back() {
    let gate = gate(2, 1);
    let now = Instant::now();
    for _ in 0..3 {
        match gate.admit(ONE, now) {
            Admission::Go(slot) => drop(slot),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(gate.live(), 0);
}

#[test]
fn a_worker_that_waits_for_a_slot_is_woken_when_there_is_one() {
    let gate = gate(2, 64);
    let woken = Arc::new(AtomicU64::new(0));
    let wake: SlotWake = {
        let woken = Arc::clone(&woken);
        Arc::new(move |_| {
            woken.fetch_add(1, Ordering::Relaxed);
        })
    };
    let enter = || gate.queue(ONE, 0, &wake);
    let slot = gate.accept(ONE, None, Instant::now());
    let queued = enter().unwrap();
    for _ in 0..3 {
        assert_eq!(enter().unwrap_err(), Full::Live { cap: 2, lost: 0 });
    }
    drop(slot);
    assert_eq!(woken.load(Ordering::Relaxed), 1);
    let other = enter().unwrap();
    assert!(enter().is_err());
    drop(queued);
    assert_eq!(woken.load(Ordering::Relaxed), 2);
    // No worker waits any more.
    drop(other);
    assert_eq!(woken.load(Ordering::Relaxed), 2);
}

#[test]
fn one_probe_at_a_time_serves_all_and_a_lost_one_not_for_ever() {
    let gate = gate(2, 64);
    let wake: SlotWake = Arc::new(|_| {});
    let _kept = gate.reserve(ONE, 0, Some(WhileDown::HoldsClients)).unwrap();
    let now = Instant::now();
    let dial = go(&gate, now);
    // The other slot is reserved for probes.
    assert!(matches!(
        gate.admit(ONE, now),
        Admission::Full(Full::Reserved(1))
    ));
    let Admission::Probe(mut probe) = gate.admit_probe(now, 0, &wake) else {
        panic!()
    };
    probe.note_unidentified_dial(now);
    assert!(matches!(gate.admit_probe(now, 1, &wake), Admission::At(_)));
    assert!(!dial.is_answered());
    // It is no connection of a client, and is told apart.
    let slots = |gate: &Gate| {
        let status = gate.status(now);
        (status.connections, status.probes)
    };
    assert_eq!(slots(&gate), (1, 1));
    probe.note_answer(now);
    drop(probe);
    assert_eq!(slots(&gate), (1, 0));
    assert!(dial.is_answered());
    let Admission::Probe(mut lost) = gate.admit_probe(now, 1, &wake) else {
        panic!()
    };
    lost.note_unidentified_dial(now);
    drop(lost);
    assert!(matches!(gate.admit_probe(now, 1, &wake), Admission::At(_)));
    let later = now + PROBE_PATIENCE;
    assert!(matches!(
        gate.admit_probe(later, 1, &wake),
        Admission::Probe(_)
    ));
    // The answers of another VM say nothing about this dial.
    gate.note_vm_gone();
    assert!(!dial.is_answered());
}

const OTHER: ForwardId = ForwardId(2);

#[test]
fn a_guests_dials_leave_slots_for_the_host() {
    let gate = gate(900, 64);
    let now = Instant::now();
    let mut guests: Vec<GuestSlot> = (0..800)
        .map(|_| gate.accept(ONE, None, Instant::now()))
        .collect();
    assert!(guests.iter().all(|guest| guest.served.is_ok()));
    let refused = gate.accept(ONE, None, Instant::now());
    assert_eq!(refused.served, Err(NotServed::GuestQuota(800)));
    assert!(refused.slot.is_turned_away());
    let status = gate.status(now);
    assert_eq!((status.guests, status.guest_limit), (800, Some(800)));
    // The device has a slot for it, as long as it has not ended.
    assert_eq!((status.connections, status.turned_away), (801, 1));
    drop(refused);
    assert_eq!(gate.live(), 800);
    drop(go(&gate, now));
    guests.pop();
    assert_eq!(gate.accept(ONE, None, Instant::now()).served, Ok(()));
    drop(guests);
    let status = gate.status(now);
    assert_eq!((status.connections, status.guests), (0, 0));
}

#[test]
fn a_guests_dial_is_served_only_if_there_is_a_slot_and_gets_what_is_reserved() {
    let gate = gate(9, 64);
    let now = Instant::now();
    let _kept = gate.reserve(OTHER, 2, None).unwrap();
    let _dials: Vec<Slot> = (0..7).map(|_| go(&gate, now)).collect();
    assert_eq!(
        gate.accept(ONE, None, Instant::now()).served,
        Err(NotServed::Full(Full::Reserved(2)))
    );
    let reserved = [
        gate.accept(OTHER, None, Instant::now()),
        gate.accept(OTHER, None, Instant::now()),
    ];
    assert!(reserved.iter().all(|guest| guest.served.is_ok()));
    let full = Full::Live { cap: 9, lost: 0 };
    assert_eq!(
        gate.accept(OTHER, None, Instant::now()).served,
        Err(NotServed::Full(full))
    );
    assert_eq!(
        gate.accept(OTHER, Some(ReachedLimit(2)), Instant::now())
            .served,
        Err(NotServed::Forward(ReachedLimit(2)))
    );
}

#[test]
fn one_of_several_forwards_does_not_take_a_guests_whole_quota() {
    let gate = gate(9, 64);
    let kept = |forward| {
        gate.reserve(forward, 0, None)
            .unwrap()
            .count_guest_forward(&gate)
    };
    let (_one, other) = (kept(ONE), kept(OTHER));
    let mut hanging: Vec<GuestSlot> = (0..6)
        .map(|_| gate.accept(ONE, None, Instant::now()))
        .collect();
    assert!(hanging.iter().all(|guest| guest.served.is_ok()));
    assert_eq!(
        gate.accept(ONE, None, Instant::now()).served,
        Err(NotServed::ForwardQuota(6))
    );
    let others = [
        gate.accept(OTHER, None, Instant::now()),
        gate.accept(OTHER, None, Instant::now()),
    ];
    assert!(others.iter().all(|guest| guest.served.is_ok()));
    assert_eq!(
        gate.accept(OTHER, None, Instant::now()).served,
        Err(NotServed::GuestQuota(8))
    );
    drop((others, other));
    hanging.push(gate.accept(ONE, None, Instant::now()));
    assert_eq!(hanging.pop().unwrap().served, Ok(()));
}

// The identities of two files are needed, which only Unix has.
#[cfg(unix)]
#[test]
fn a_lost_slot_is_taken_until_the_vm_is_another_one() {
    let directory = tempfile::tempdir().unwrap();
    let of = |name| {
        let path = directory.path().join(name);
        std::fs::write(&path, "").unwrap();
        crate::sys::Identity::of(&path).ok().map(VmIdentity::Socket)
    };
    let (one, two) = (of("one"), of("two"));
    let gate = gate(2, 64);
    let now = Instant::now();
    let dial = |vm| match gate.admit(ONE, now) {
        Admission::Go(mut slot) => {
            slot.note_dial(vm, now);
            slot
        }
        other => panic!("{other:?}"),
    };
    let (mut first, second) = (dial(one), dial(one));
    first.mark_lost();
    drop((first, second));
    let status = gate.status(now);
    assert_eq!((status.connections, status.lost), (0, 1));
    let third = dial(one);
    let full = gate.admit(ONE, now);
    let why = Full::Live { cap: 2, lost: 1 };
    assert!(matches!(full, Admission::Full(it) if it == why), "{full:?}");
    drop(third);
    gate.accept(ONE, None, Instant::now()).slot.mark_lost();
    assert_eq!(gate.lost(), 2);
    assert!(gate.begin_look(now, Duration::ZERO));
    gate.take_look(&look(two), now);
    assert_eq!((gate.lost(), gate.live()), (0, 0));
    // What an older VM had lost is not this one's.
    let mut old = dial(two);
    gate.note_vm_gone();
    old.mark_lost();
    drop(old);
    assert_eq!((gate.lost(), gate.live()), (0, 0));
}

#[test]
fn drains_are_in_the_way_only_beyond_a_tenth_while_clients_wait_the_oldest_first() {
    let gate = gate(20, 64);
    let mut now = Instant::now();
    let mut slots: Vec<Slot> = Vec::new();
    for _ in 0..20 {
        now += Duration::from_millis(1);
        slots.push(go(&gate, now));
    }
    for slot in &mut slots[..4] {
        slot.note_drain();
        slot.note_drain();
    }
    let given_up = |slots: &[Slot], now| -> Vec<bool> {
        let may = |slot: &Slot| slot.may_give_up_drain(DrainEnd::InTheWay, now);
        slots[..4].iter().map(may).collect()
    };
    now += Duration::from_secs(1);
    assert_eq!(given_up(&slots, now), [false; 4]);
    assert!(matches!(gate.admit(ONE, now), Admission::Full(_)));
    assert_eq!(given_up(&slots, now), [true, true, false, false]);
    // One that is silent now is not in the way.
    slots[0].forget_drain();
    assert_eq!(given_up(&slots, now), [false, true, false, false]);
    assert_eq!(given_up(&slots, now + WANTED), [false; 4]);
    // What lasts too long is given up in any case, at the pace of dials.
    now += Duration::from_secs(1);
    let may = |slot: &Slot| slot.may_give_up_drain(DrainEnd::Due, now);
    let allowed = slots.iter().filter(|slot| may(slot)).count();
    assert_eq!(allowed, BURST as usize);
}

/// A process that lets its connections finish, and its successor, have a gate of the VM each.
#[test]
fn two_processes_have_no_more_slots_than_one() {
    use super::sharing::{OtherSlots, Remainder};
    let now = Instant::now();
    let (old, new) = (gate(20, 400), gate(20, 400));
    let mut live: Vec<Slot> = (0..6).map(|_| go(&old, now)).collect();
    live.pop().unwrap().mark_lost();
    let waiting = old.queue_always(ONE);
    let free = |gate: &Gate| gate.state().quotas.free_for(Holder::Forward(ONE));
    // For a moment both may accept.
    let kept = old.keep_remainder(Remainder::HalfOfFree).unwrap();
    assert_eq!(kept, OtherSlots { used: 12, lost: 1 });
    new.leave_out(kept);
    assert_eq!((free(&old), free(&new)), (7, 7));
    // If nothing comes of it, all is as before.
    old.take_whole();
    assert_eq!(free(&old), 14);
    let kept = old.keep_remainder(Remainder::Used).unwrap();
    // One is for the client that waits, and one for a probe.
    assert_eq!(kept, OtherSlots { used: 7, lost: 1 });
    new.leave_out(kept);
    assert_eq!((free(&old), free(&new)), (2, 12));
    drop((live, waiting));
    let kept = old.keep_remainder(Remainder::Used).unwrap();
    assert_eq!(kept, OtherSlots { used: 0, lost: 1 });
    new.leave_out(kept);
    assert_eq!((free(&old), free(&new)), (0, 19));
    // What is lost outlives the process, and not the VM.
    new.forget_other();
    assert_eq!((free(&new), new.lost()), (19, 1));
    new.note_vm_gone();
    assert_eq!((free(&new), new.lost()), (20, 0));
}

#[test]
fn a_worker_that_waits_for_a_probe_is_no_client_that_waits_for_a_slot() {
    let gate = gate(20, 64);
    let now = Instant::now();
    let wake: SlotWake = Arc::new(|_| {});
    let mut drains: Vec<Slot> = (0..4).map(|_| go(&gate, now)).collect();
    drains.iter_mut().for_each(Slot::note_drain);
    let Admission::Probe(mut probe) = gate.admit_probe(now, 0, &wake) else {
        panic!()
    };
    probe.note_unidentified_dial(now);
    assert!(matches!(gate.admit_probe(now, 1, &wake), Admission::At(_)));
    let is_in_the_way = |now| drains[0].may_give_up_drain(DrainEnd::InTheWay, now);
    let later = now + Duration::from_secs(1);
    assert!(!is_in_the_way(later));
    let guests: Vec<GuestSlot> = (0..15)
        .map(|_| gate.accept(ONE, None, Instant::now()))
        .collect();
    assert!(gate.queue(ONE, 1, &wake).is_err());
    assert!(is_in_the_way(later));
    drop(guests);
}

fn other_gate(vm: AnyVm, live: usize) -> Arc<Gate> {
    let limits = GateLimits {
        live,
        ..GateLimits::UNLIMITED
    };
    Arc::new(Gate::new(limits, vm))
}

#[cfg(unix)]
fn no_such_cid() -> crate::Error {
    let cause = std::io::Error::from_raw_os_error(nix::libc::ENODEV);
    crate::Error::new(crate::error::Operation::Connect, "vsock://3:80", cause)
}

#[test]
fn a_vm_that_nothing_harms_is_dialled_at_once_and_without_end() {
    for vm in [AnyVm::Vsock(3), AnyVm::VsockMux("/run/vm".into())] {
        let gate = Arc::new(Gate::new(GateLimits::UNLIMITED, vm));
        let _kept = gate.reserve(ONE, 5, Some(WhileDown::HoldsClients)).unwrap();
        let now = Instant::now();
        let slots: Vec<Slot> = (0..2_000).map(|_| go(&gate, now)).collect();
        let status = gate.status(now);
        assert_eq!((status.connections, status.unanswered), (2_000, 0));
        assert_eq!((status.limit, status.guest_limit), (None, None));
        assert_eq!(gate.accept(ONE, None, now).served, Ok(()));
        assert!(!gate.can_be_probed());
        drop(slots);
        assert_eq!(gate.status(now).connections, 0);
    }
}

#[test]
fn a_vm_of_any_family_has_its_limit_and_loses_no_slot() {
    for vm in [AnyVm::Vsock(3), AnyVm::VsockMux("/run/vm".into())] {
        let gate = other_gate(vm, 9);
        let now = Instant::now();
        // None of them is kept for probes.
        let _kept = gate.reserve(ONE, 0, Some(WhileDown::HoldsClients)).unwrap();
        let guests: Vec<GuestSlot> = (0..9).map(|_| gate.accept(ONE, None, now)).collect();
        assert_eq!(guests[7].served, Ok(()));
        assert_eq!(guests[8].served, Err(NotServed::GuestQuota(8)));
        drop(guests);
        let mut slots: Vec<Slot> = (0..9).map(|_| go(&gate, now)).collect();
        let why = Full::Live { cap: 9, lost: 0 };
        let full = gate.admit(ONE, now);
        assert!(matches!(full, Admission::Full(it) if it == why), "{full:?}");
        slots.iter_mut().for_each(Slot::mark_lost);
        drop(slots);
        assert_eq!((gate.live(), gate.lost()), (0, 0));
    }
}

// The error of the system is needed, which Windows does not have.
#[cfg(unix)]
#[test]
fn a_cid_is_up_or_down_as_its_answers_say() {
    let gate = other_gate(AnyVm::Vsock(3), usize::MAX);
    let now = Instant::now();
    let second = Duration::from_secs(1);
    let up = |now| gate.status(now).up;
    // A dial that was begun says nothing, and nobody looks.
    let _dial = go(&gate, now);
    assert_eq!(up(now), None);
    assert!(!gate.begin_look(now, second));
    gate.mark_up(now);
    assert_eq!(up(now), Some(true));
    assert!(!gate.begin_look(now, second));
    let mut now = now + second;
    gate.mark_down(&no_such_cid(), now);
    assert_eq!(up(now), Some(false));
    assert!(gate.status(now).gone_since.is_some());
    // It is looked for until it is there.
    for identity in [None, Some(VmIdentity::Cid)] {
        now += second;
        assert!(gate.begin_look(now, second));
        assert!(!gate.begin_look(now, second));
        gate.take_look(&look(identity), now);
        assert_eq!(up(now), Some(identity.is_some()));
    }
    assert!(!gate.begin_look(now + second, second));
    assert_eq!(gate.status(now).restarts, 1);
    // A connection that ends with its VM says the same.
    go(&gate, now).note_vm_end(now + second);
    now += 2 * second;
    assert_eq!(up(now), Some(false));
    assert!(gate.begin_look(now, second));
    gate.take_look(&look(Some(VmIdentity::Cid)), now);
    assert_eq!((up(now), gate.status(now).restarts), (Some(true), 2));
    // A guest that is silent gets no dials for the sake of looking; its own dial says that it runs.
    let late = std::io::ErrorKind::TimedOut.into();
    let late = crate::Error::new(crate::error::Operation::Connect, "vsock://3:80", late);
    gate.mark_down(&late, now + second);
    assert_eq!(up(now), Some(false));
    assert!(!gate.begin_look(now + 2 * second, second));
    drop(gate.accept(ONE, None, now));
    assert_eq!((up(now), gate.status(now).restarts), (Some(true), 2));
}

#[test]
fn the_vm_of_a_dial_without_an_answer_is_looked_for() {
    let gate = other_gate(AnyVm::Vsock(3), usize::MAX);
    let (now, second) = (Instant::now(), Duration::from_secs(1));
    let first = go(&gate, now);
    assert!(!gate.begin_look(now, second));
    // A look that has found it says nothing else of it, and is made once for all that ask.
    assert!(!first.check_vm_gone() && !first.check_vm_gone());
    assert!(gate.begin_look(now + second, second));
    gate.take_look(&look(Some(VmIdentity::Cid)), now + second);
    assert_eq!(gate.status(now).up, None);
    assert!(!gate.begin_look(now + 9 * second, second));
    assert!(!first.check_vm_gone());
    assert!(gate.begin_look(now + 10 * second, second));
    // That of a dial which was made meanwhile may be another one.
    let later = go(&gate, now + 10 * second);
    gate.take_look(&look(None), now + 10 * second);
    assert!(first.check_vm_gone() && !later.check_vm_gone());
    assert_eq!(gate.status(now).up, Some(false));
    // It is looked for until it is there.
    assert!(gate.begin_look(now + 11 * second, second));
    gate.take_look(&look(Some(VmIdentity::Cid)), now + 11 * second);
    assert_eq!(gate.status(now).up, Some(true));
}

#[test]
fn the_end_of_a_vm_is_no_answer_and_leaves_nothing_behind() {
    let gate = gate(2, 64);
    let now = Instant::now();
    let (first, mut second) = (go(&gate, now), go(&gate, now));
    assert_eq!(gate.status(now).up, Some(true));
    first.note_vm_end(now);
    let status = gate.status(now);
    assert_eq!(
        (status.up, status.connections, status.unanswered),
        (Some(false), 0, 0)
    );
    assert!(!second.is_answered());
    // Its other connections say nothing about the VM that is started next.
    drop(go(&gate, now));
    second.note_vm_end(now);
    second.mark_lost();
    drop((first, second));
    let status = gate.status(now);
    assert_eq!((status.up, status.lost), (Some(true), 0));
}

#[test]
fn a_listener_that_was_alive_at_a_dial_is_nobodys_heir() {
    let gate = gate(9, 64);
    let now = Instant::now();
    let dial = || go(&gate, now);
    // Whoever has begun to listen had ended before the first dial.
    assert!(dial().note_listener(None, true));
    assert!(!dial().note_listener(None, false));
    // It ends just now.
    let last = dial();
    assert!(!last.note_listener(None, true));
    last.note_vm_end(now);
    assert!(dial().note_listener(None, true));
}
