//! Named cases: one promise of the relay each, every step by hand.

use std::io::ErrorKind;

use super::bench::Bench;
use super::kernel::{Habits, Wire};
use crate::engine::relay::{CloseMode, End, Half, PairTurn, Pool, Readiness, Side};

type Kernel = Bench<true>;
type Emulated = Bench<false>;

const RESET: ErrorKind = ErrorKind::ConnectionReset;

/// A pair whose server reads nothing before it is made to, with room for `n` bytes on the way to
/// it.
fn narrow(n: usize) -> Kernel {
    let narrow = Habits {
        send_queue: n,
        ..Habits::default()
    };
    Bench::with([Habits::default(), narrow])
}

/// Everything that `wire` was sent so far.
fn hear_all(mut wire: std::cell::RefMut<'_, Wire>) -> u64 {
    wire.hear(usize::MAX);
    wire.heard
}

/// Lets `side` read until it has heard `n` bytes.
fn hear_out(pair: &mut Kernel, side: Side, n: u64) {
    for _ in 0..=n {
        hear_all(pair.wires[side].borrow_mut());
        pair.settle();
    }
    assert_eq!(pair.wire(side).heard, n);
}

// 1. Readiness.

#[test]
fn an_eof_in_the_event_of_the_last_data_is_seen() {
    let mut pair = Kernel::calm();
    pair.settle();
    pair.client().say(5);
    pair.client().fin();
    assert!(pair.poll(Side::Client));
    pair.turn();
    assert_eq!(
        (
            pair.wire(Side::Server).written,
            pair.wire(Side::Server).half_closes
        ),
        (5, 1)
    );
}

#[test]
fn an_eof_after_the_event_of_the_last_data_is_seen() {
    let mut pair = Kernel::calm();
    pair.settle();
    pair.client().say(5);
    pair.poll(Side::Client);
    pair.client().fin();
    pair.turn();
    pair.settle();
    assert_eq!(
        (
            pair.wire(Side::Server).written,
            pair.wire(Side::Server).half_closes
        ),
        (5, 1)
    );
}

#[test]
fn a_short_read_may_have_more_behind_it() {
    let mark = Habits {
        mark: Some(4),
        ..Habits::default()
    };
    let mut pair = Kernel::with([mark, Habits::default()]);
    pair.client().say(9);
    pair.settle();
    assert_eq!(pair.wire(Side::Server).written, 9);
}

#[test]
fn a_full_read_is_followed_by_another() {
    let mut pair = Kernel::calm();
    pair.settle();
    pair.client().say(3 * pair.buffer + 1);
    pair.poll(Side::Client);
    pair.turn();
    assert_eq!(pair.wire(Side::Server).written, 3 * 16 + 1);
}

#[test]
fn emulated_edges_are_armed_by_reading_on_after_a_short_read() {
    let mut pair = Emulated::calm();
    for round in 1..=3 {
        pair.client().say(5);
        pair.settle();
        assert_eq!(pair.wire(Side::Server).written, 5 * round);
    }
}

#[test]
fn emulated_edges_are_armed_by_writing_on_after_a_short_write() {
    let narrow = Habits {
        send_queue: 4,
        ..Habits::default()
    };
    let mut pair = Emulated::with([Habits::default(), narrow]);
    pair.client().say(10);
    for heard in [4, 8, 10] {
        pair.settle();
        assert_eq!(hear_all(pair.server()), heard);
    }
}

#[test]
fn an_event_with_nothing_behind_it_does_no_harm() {
    let mut pair = Kernel::calm();
    pair.settle();
    let event = Readiness {
        readable: true,
        writable: true,
        ..Readiness::default()
    };
    pair.latch(Side::Client, event);
    assert_eq!(pair.turn(), PairTurn::Wait);
    pair.client().say(3);
    pair.settle();
    assert_eq!(pair.wire(Side::Server).written, 3);
}

// 2 and 7. Memory.

#[test]
fn a_server_that_reads_nothing_costs_one_buffer() {
    let mut pair = narrow(10);
    pair.client().say(1000);
    pair.settle();
    assert_eq!(
        (
            pair.wire(Side::Client).read,
            pair.wire(Side::Server).written
        ),
        (16, 10)
    );
    assert_eq!(
        (pair.carried(Side::Client), pair.pool.free_buffers()),
        (6, 1)
    );
    // The other direction isn't held up.
    pair.server().say(100);
    pair.settle();
    assert_eq!(pair.wire(Side::Client).written, 100);
    hear_out(&mut pair, Side::Server, 1000);
    assert_eq!(
        (pair.carried(Side::Client), pair.pool.free_buffers()),
        (0, 2)
    );
}

#[test]
fn a_pair_taken_apart_gives_its_buffers_back() {
    let mut pair = narrow(10);
    pair.client().say(1000);
    pair.settle();
    let ended = pair.leave(|_| false);
    assert_eq!(ended.close_modes, [CloseMode::Reset; 2]);
}

// 3. EOF.

#[test]
fn eof_waits_for_the_last_byte() {
    let mut pair = narrow(4);
    pair.client().say(10);
    pair.client().fin();
    for heard in [4, 8] {
        pair.settle();
        assert_eq!(pair.wire(Side::Server).half_closes, 0);
        assert_eq!(hear_all(pair.server()), heard);
    }
    pair.settle();
    assert_eq!(pair.wire(Side::Server).half_closes, 1);
    assert_eq!(hear_all(pair.server()), 10);
    assert!(pair.wire(Side::Server).saw_eof);
}

#[test]
fn each_direction_ends_by_itself() {
    for first in Side::BOTH {
        let mut pair = Kernel::calm();
        let second = first.other();
        pair.wires[first].borrow_mut().fin();
        assert_eq!(pair.settle(), PairTurn::Wait);
        assert_eq!(
            (pair.wire(second).half_closes, pair.wire(first).half_closes),
            (1, 0)
        );
        pair.wires[second].borrow_mut().say(100);
        assert_eq!(pair.settle(), PairTurn::Wait);
        assert_eq!(pair.wire(first).written, 100);
        pair.wires[second].borrow_mut().fin();
        assert_eq!(pair.settle(), PairTurn::Done);
        assert_eq!(pair.wire(first).half_closes, 1);
        assert_eq!(pair.close_modes(), [CloseMode::Close; 2]);
    }
}

// 4. Errors.

#[test]
fn a_source_that_breaks_is_no_eof() {
    for broken in Side::BOTH {
        let mut pair = Kernel::calm();
        pair.wires[broken].borrow_mut().say(100);
        pair.wires[broken].borrow_mut().reset(RESET);
        assert_eq!(pair.settle(), PairTurn::Done);
        let sink = broken.other();
        assert_eq!(
            (pair.wire(sink).written, pair.wire(sink).half_closes),
            (100, 0)
        );
        assert_eq!(pair.pair.close_mode(sink), CloseMode::Reset);
        assert_eq!(pair.pair.close_mode(broken), CloseMode::Close);
        let wires = pair.wires.clone();
        pair.leave(|_| false);
        assert!(wires[sink].borrow().saw_reset && !wires[sink].borrow().saw_eof);
    }
}

/// Linux' TCP tells of a reset once. The answer stands still as the client doesn't read; meanwhile
/// the server is reset, and the upload's write hears of it.
#[test]
fn a_reset_that_a_write_was_told_of_is_no_eof() {
    let small = Habits {
        send_queue: 10,
        ..Habits::default()
    };
    let told_once = Habits {
        write_takes_error: true,
        ..Habits::default()
    };
    let mut pair = Kernel::with([small, told_once]);
    pair.server().say(50);
    pair.settle();
    pair.client().say(1);
    pair.server().reset(RESET);
    pair.settle();
    assert_eq!(pair.wire(Side::Server).write_error, Some(RESET));
    hear_out(&mut pair, Side::Client, 50);
    assert_eq!(pair.wire(Side::Server).read_error, None);
    assert_eq!(pair.wire(Side::Client).half_closes, 0);
    assert_eq!(pair.pair.close_mode(Side::Client), CloseMode::Reset);
}

#[test]
fn a_server_that_takes_no_more_still_answers_a_client_that_goes_on_sending() {
    let mut pair = Kernel::calm();
    pair.server().turn_deaf();
    pair.client().say(100);
    assert_eq!(pair.settle(), PairTurn::Wait);
    assert_eq!(
        pair.wire(Side::Server).write_error,
        Some(ErrorKind::BrokenPipe)
    );
    pair.server().say(40);
    pair.server().fin();
    pair.client().say(100);
    assert_eq!(pair.settle(), PairTurn::Done);
    assert_eq!(
        (
            pair.wire(Side::Client).written,
            pair.wire(Side::Client).half_closes
        ),
        (40, 1)
    );
    assert_eq!(pair.close_modes(), [CloseMode::Linger, CloseMode::Reset]);

    // It sends on while it is lingered for, and still gets the whole answer.
    let mut rounds = 0;
    let wires = pair.wires.clone();
    pair.leave(|wires| {
        rounds += 1;
        let mut client = wires[Side::Client].borrow_mut();
        match rounds {
            1..10 => client.say(1000),
            10 => client.fin(),
            _ => {}
        }
        rounds < 100
    });
    let mut client = wires[Side::Client].borrow_mut();
    client.hear(100);
    assert_eq!((client.heard, client.saw_eof), (40, true));
    assert_eq!(client.read, client.sent);
}

#[test]
fn a_server_whose_reader_is_gone_is_reset() {
    let mut pair = Kernel::calm();
    pair.client().fin();
    pair.client().turn_deaf();
    pair.server().say(100);
    assert_eq!(pair.settle(), PairTurn::Done);
    assert_eq!(pair.wire(Side::Server).half_closes, 1);
    assert_eq!(pair.close_modes(), [CloseMode::Reset; 2]);
}

#[test]
fn what_a_broken_direction_still_gets_is_dropped_until_it_ends() {
    let mut pair = Kernel::calm();
    pair.server().turn_deaf();
    pair.client().say(1000);
    assert_eq!(pair.settle(), PairTurn::Wait);
    assert_eq!(pair.wire(Side::Client).read, 1000);
    pair.client().fin();
    pair.server().fin();
    assert_eq!(pair.settle(), PairTurn::Done);
    assert_eq!(pair.pair.close_mode(Side::Client), CloseMode::Close);
}

/// As macOS' Unix sockets have it.
#[test]
fn a_server_that_closes_with_bytes_unread_where_nothing_tells_has_said_all() {
    let hides = Habits {
        hides_resets: true,
        ..Habits::default()
    };
    let mut pair = Kernel::with([Habits::default(), hides]);
    pair.client().say(10);
    pair.settle();
    pair.server().say(4);
    pair.server().close();
    pair.settle();
    assert_eq!(hear_all(pair.client()), 4);
    assert!(pair.client().saw_eof);
    // The next thing that it says is what tells.
    pair.client().say(1);
    pair.settle();
    assert_eq!(pair.last, PairTurn::Done);
    assert_eq!(
        pair.wire(Side::Server).write_error,
        Some(ErrorKind::BrokenPipe)
    );
    assert_eq!(pair.pair.close_mode(Side::Client), CloseMode::Linger);
}

#[test]
fn nobody_waits_for_a_server_whose_client_is_dead() {
    let mut pair = Kernel::calm();
    pair.server().say(10);
    pair.settle();
    pair.client().reset(RESET);
    assert_eq!(pair.settle(), PairTurn::Done);
    assert_eq!(pair.close_modes(), [CloseMode::Close, CloseMode::Reset]);
}

#[test]
fn what_can_go_to_a_dead_client_without_waiting_goes() {
    let mut pair = Kernel::calm();
    pair.budget = 40;
    pair.server().say(100);
    pair.pair.ends[Side::Client].input = Half::Failed(RESET);
    assert_eq!(pair.settle(), PairTurn::Done);
    assert_eq!(pair.wire(Side::Client).written, 100);
}

#[test]
fn the_last_words_of_a_dead_client_wait_for_their_reader() {
    let mut pair = narrow(10);
    pair.client().say(26);
    pair.settle();
    assert!(!pair.pair.is_ending());
    // The last bytes are in the carrier; the read that finds the error comes after them.
    pair.client().reset(RESET);
    pair.settle();
    assert!(pair.pair.is_ending());
    assert_eq!(hear_all(pair.server()), 10);
    assert_eq!(pair.settle(), PairTurn::Wait);
    assert_eq!(hear_all(pair.server()), 20);
    assert_eq!(pair.settle(), PairTurn::Done);
    assert_eq!(hear_all(pair.server()), 26);
    assert_eq!(pair.pair.close_mode(Side::Server), CloseMode::Reset);
}

#[test]
fn a_pair_is_ending_when_a_dead_end_has_undelivered_bytes() {
    let mut pair = narrow(10);
    pair.client().say(12);
    pair.settle();
    let failed = Readiness {
        failed: true,
        ..Readiness::default()
    };
    pair.latch(Side::Client, failed);
    pair.turn();
    assert_eq!(pair.last, PairTurn::Wait);
    assert!(pair.pair.is_ending());
    assert_eq!(pair.carried(Side::Client), 2);
    assert_eq!(hear_all(pair.server()), 10);
    pair.settle();
    assert_eq!(pair.wire(Side::Server).written, 12);
}

#[test]
fn a_pair_that_only_waits_is_not_ending() {
    let mut pair = Kernel::calm();
    pair.settle();
    assert!(!pair.pair.is_ending());
    pair.client().fin();
    pair.settle();
    assert!(!pair.pair.is_ending());
}

#[test]
fn an_end_is_gone_as_soon_as_an_event_says_so() {
    let wire = Kernel::calm().wires[Side::Client].clone();
    let mut end = End::new(super::kernel::FakeSocket::<true>(wire));
    assert!(!end.is_gone());
    end.latch(Readiness {
        failed: true,
        ..Readiness::default()
    });
    // What has come may still be read.
    assert!(end.is_gone() && !end.is_dead() && !end.input_ended());
}

// 5. Work.

#[test]
fn a_turn_moves_its_budget_in_each_direction_and_asks_for_another() {
    let mut pair = Kernel::calm();
    pair.budget = 40;
    pair.client().say(100);
    pair.server().say(100);
    pair.poll(Side::Client);
    pair.poll(Side::Server);
    for moved in [48, 96] {
        assert_eq!(pair.turn(), PairTurn::Again);
        assert_eq!(
            (
                pair.wire(Side::Server).written,
                pair.wire(Side::Client).written
            ),
            (moved, moved)
        );
    }
    assert_eq!(pair.turn(), PairTurn::Wait);
    assert_eq!(
        (
            pair.wire(Side::Server).written,
            pair.wire(Side::Client).written
        ),
        (100, 100)
    );
}

#[test]
fn the_turn_that_releases_the_half_close_keeps_its_budget() {
    let mut pair = Kernel::calm();
    pair.budget = 40;
    pair.pair.withhold_half_close(Side::Client);
    pair.client().say(100);
    pair.server().fin();
    pair.poll(Side::Client);
    pair.poll(Side::Server);
    assert_eq!(pair.turn(), PairTurn::Again);
    assert_eq!(pair.wire(Side::Client).read, 48);
}

#[test]
fn discarding_takes_turns_too() {
    let pair = Kernel::calm();
    let mut pool = Pool::new(16, 9, 0, std::sync::Arc::default());
    let mut end = pair.pair.ends.into_iter().next().unwrap();
    let wire = &pair.wires[Side::Client];
    wire.borrow_mut().say(100);
    assert!(!end.discard(&mut pool), "no event yet");
    end.latch(wire.borrow_mut().poll(true).unwrap());
    assert!(end.discard(&mut pool));
    assert_eq!(wire.borrow().read, 64);
    assert!(!end.discard(&mut pool));
    assert_eq!(wire.borrow().read, 100);
    wire.borrow_mut().fin();
    end.latch(wire.borrow_mut().poll(true).unwrap());
    assert!(!end.discard(&mut pool));
    assert!(end.input_ended() && !end.is_dead());
}
