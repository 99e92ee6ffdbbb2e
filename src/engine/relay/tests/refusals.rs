//! Named cases: servers that refuse by ending, and the half-close that is held back so that they
//! can be told.

use std::io::ErrorKind;

use super::bench::Bench;
use super::kernel::Habits;
use crate::engine::relay::{CloseMode, Ending, PairTurn, Side};

type Kernel = Bench<true>;

const RESET: ErrorKind = ErrorKind::ConnectionReset;

/// A pair whose server's family refuses by ending, with up to 50 bytes unread.
fn silent() -> Kernel {
    let mut pair = Kernel::calm();
    pair.pair.expect_refusal_by_eof(50);
    pair
}

fn assert_refused(pair: &Kernel) {
    assert!(pair.pair.was_refused());
    assert_eq!(pair.last, PairTurn::Done);
    assert_eq!(pair.wire(Side::Client).half_closes, 0);
    assert_eq!(pair.pair.close_mode(Side::Client), CloseMode::Reset);
}

fn assert_answered(pair: &Kernel) {
    assert!(!pair.pair.was_refused());
    assert_eq!(pair.wire(Side::Client).half_closes, 1);
    assert_ne!(pair.pair.close_mode(Side::Client), CloseMode::Reset);
}

#[test]
fn an_end_before_the_first_byte_is_a_refusal() {
    let mut pair = silent();
    pair.server().fin();
    pair.settle();
    assert_refused(&pair);

    let mut pair = silent();
    pair.server().reset(RESET);
    pair.settle();
    assert_refused(&pair);
}

#[test]
fn a_refusal_releases_the_half_close_that_was_held() {
    let mut pair = silent();
    pair.pair.withhold_half_close(Side::Client);
    pair.client().fin();
    pair.settle();
    pair.server().fin();
    pair.settle();
    assert_refused(&pair);
    assert_eq!(pair.wire(Side::Server).half_closes, 1);
    assert_eq!(pair.pair.close_mode(Side::Server), CloseMode::Close);
}

#[test]
fn a_refusal_that_a_write_was_told_of_first_is_one() {
    for error in [None, Some(RESET)] {
        let told = Habits {
            write_takes_error: true,
            ..Habits::default()
        };
        let mut pair = Kernel::with([Habits::default(), told]);
        pair.pair.expect_refusal_by_eof(50);
        pair.settle();
        match error {
            Some(error) => pair.server().reset(error),
            None => pair.server().turn_deaf(),
        }
        pair.client().say(10);
        pair.poll(Side::Client);
        pair.turn();
        assert!(pair.wire(Side::Server).write_error.is_some());
        if error.is_none() {
            pair.server().fin();
        }
        pair.settle();
        assert_refused(&pair);
    }
}

#[test]
fn an_end_after_the_half_close_is_an_empty_answer() {
    let mut pair = silent();
    pair.client().say(10);
    pair.client().fin();
    pair.settle();
    pair.server().fin();
    assert_eq!(pair.settle(), PairTurn::Done);
    assert_answered(&pair);
}

#[test]
fn an_end_after_more_than_can_lie_unread_is_an_empty_answer() {
    for (sent, refuses) in [(50, true), (51, false)] {
        let mut pair = silent();
        pair.client().say(sent);
        pair.settle();
        pair.server().fin();
        pair.settle();
        match refuses {
            true => assert_refused(&pair),
            false => assert_answered(&pair),
        }
    }
}

#[test]
fn an_end_after_the_first_byte_is_an_answer() {
    let mut pair = silent();
    pair.server().say(1);
    pair.server().fin();
    pair.settle();
    assert_answered(&pair);
}

#[test]
fn a_family_that_refuses_aloud_may_end_without_a_byte() {
    let mut pair = Kernel::calm();
    pair.server().fin();
    pair.settle();
    assert_answered(&pair);
}

// The half-close that is held back until the refusal would have come.

#[test]
fn a_held_half_close_waits_for_its_release() {
    let mut pair = Kernel::calm();
    pair.pair.withhold_half_close(Side::Client);
    pair.client().say(5);
    pair.settle();
    assert!(
        !pair.pair.is_withholding_half_close(Side::Client),
        "it hasn't come"
    );
    pair.client().fin();
    assert_eq!(pair.settle(), PairTurn::Wait);
    // The bytes before it are not held.
    assert_eq!(
        (
            pair.wire(Side::Server).written,
            pair.wire(Side::Server).half_closes
        ),
        (5, 0)
    );
    assert!(pair.pair.is_withholding_half_close(Side::Client));
    pair.pair.release_half_close(Side::Client);
    assert!(!pair.pair.is_withholding_half_close(Side::Client));
    assert_eq!(pair.turn(), PairTurn::Wait);
    assert_eq!(pair.wire(Side::Server).half_closes, 1);
}

#[test]
fn a_held_half_close_goes_when_the_server_has_ended() {
    let mut pair = Kernel::calm();
    pair.pair.withhold_half_close(Side::Client);
    pair.client().fin();
    pair.settle();
    pair.server().say(5);
    pair.server().fin();
    assert_eq!(pair.settle(), PairTurn::Done);
    assert_eq!(
        (
            pair.wire(Side::Server).half_closes,
            pair.wire(Side::Client).half_closes
        ),
        (1, 1)
    );
    assert_eq!(pair.close_modes(), [CloseMode::Close; 2]);
}

#[test]
fn only_the_clients_half_close_is_held() {
    let mut pair = Kernel::calm();
    pair.pair.withhold_half_close(Side::Client);
    pair.server().fin();
    pair.settle();
    assert_eq!(pair.wire(Side::Client).half_closes, 1);
}

#[test]
fn an_end_that_is_in_doubt_is_passed_on_when_it_is_known_what_it_is() {
    for (end, close_mode) in [
        (Ending::Whole, CloseMode::Close),
        (Ending::BrokenOff, CloseMode::Reset),
    ] {
        let mut pair = Kernel::calm();
        pair.pair.doubt_end(Side::Server);
        pair.client().fin();
        pair.server().say(5);
        pair.server().fin();
        assert_eq!(pair.settle(), PairTurn::Wait);
        assert!(pair.pair.has_doubtful_end(Side::Server));
        assert_eq!(pair.wire(Side::Client).half_closes, 0);
        pair.pair.settle_end(Side::Server, end);
        assert!(!pair.pair.has_doubtful_end(Side::Server));
        pair.turn();
        assert_eq!(pair.settle(), PairTurn::Done);
        assert_eq!(pair.pair.close_mode(Side::Client), close_mode);
        let whole = end == Ending::Whole;
        assert_eq!(pair.wire(Side::Client).half_closes, u32::from(whole));
    }
}
