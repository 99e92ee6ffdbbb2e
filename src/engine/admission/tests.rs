#![allow(clippy::unwrap_used)]

use super::*;

const ONE: ForwardId = ForwardId(1);

fn gate(live: usize, unanswered: u64) -> Arc<Gate> {
    Arc::new(Gate::new(
        GateLimits { live, unanswered },
        HyperkitVm::new("/tmp/vm"),
    ))
}

fn go(gate: &Arc<Gate>, now: Instant) -> Slot {
    match gate.admit(ONE, now) {
        Admission::Go(mut slot) => {
            slot.note_dial(None, now);
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
                slot.note_dial(None, now);
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
            Admission::Go(mut slot) if dial % 2 == 0 => slot.note_dial(None, now),
            Admission::Probe(mut slot) if dial % 2 == 1 => {
                slot.note_dial(None, now);
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
    let _slots = gate.reserve(ONE, 0, Some(true)).unwrap();
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
    probe.note_dial(None, now);
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
    probe.note_dial(None, now);
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
        probe.note_dial(None, now);
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
                slot.note_dial(None, now);
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
        Admission::Full(Full::Live(1))
    ));
    assert!(gate.begin_look(now, Duration::ZERO));
    gate.take_look(two, None, now);
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
    gate.take_look(None, None, now + 10 * second);
    let admission = gate.admit(ONE, now + 10 * second);
    assert!(matches!(admission, Admission::Go(_)));
    assert!(gate.begin_look(now + 10 * second, second));
    gate.take_look(None, None, now + 10 * second);
    assert!(!gate.begin_look(now + 10 * second, second));
}

#[test]
fn a_dial_from_the_guest_takes_a_slot_too() {
    let gate = gate(2, 64);
    let now = Instant::now();
    let guests = [gate.accept(ONE), gate.accept(ONE)];
    assert!(matches!(
        gate.admit(ONE, now),
        Admission::Full(Full::Live(2))
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
    let wake: Wake = {
        let woken = Arc::clone(&woken);
        Arc::new(move || {
            woken.fetch_add(1, Ordering::Relaxed);
        })
    };
    let enter = || gate.queue(ONE, 0, &wake);
    let slot = gate.accept(ONE);
    let queued = enter().unwrap();
    for _ in 0..3 {
        assert_eq!(enter().unwrap_err(), Full::Live(2));
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
    let wake: Wake = Arc::new(|| {});
    let _kept = gate.reserve(ONE, 0, Some(true)).unwrap();
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
    probe.note_dial(None, now);
    assert!(matches!(gate.admit_probe(now, 1, &wake), Admission::At(_)));
    assert!(!dial.is_answered());
    probe.note_answer(now);
    drop(probe);
    assert!(dial.is_answered());
    let Admission::Probe(mut lost) = gate.admit_probe(now, 1, &wake) else {
        panic!()
    };
    lost.note_dial(None, now);
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
