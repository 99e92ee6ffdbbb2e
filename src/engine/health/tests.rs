#![allow(clippy::unwrap_used)]

use super::*;

const GONE: Option<News> = Some(News::Down { was_up: true });

#[test]
fn a_repeated_observation_is_not_reported() {
    let mut health = Health::default();
    let start = Instant::now();
    let later = start + Duration::from_secs(3);
    assert_eq!(health.is_up(), None);
    let never = Some(News::Down { was_up: false });
    assert_eq!(health.mark_down(start), never);
    assert_eq!(health.mark_down(later), None);
    // It was never there.
    assert_eq!(health.gone_since(), None);
    assert_eq!(health.mark_up(later), Some(News::Appeared));
    assert_eq!(health.mark_up(later), None);
    // A dial that was begun before fails.
    assert_eq!(health.mark_down(later), None);
    let gone = later + SETTLE_TIME;
    assert_eq!(health.mark_down(gone), GONE);
    let since = health.gone_since();
    assert!(since.is_some());
    let later = gone + Duration::from_secs(3);
    assert_eq!(health.mark_down(later), None);
    assert_eq!(health.gone_since(), since);
    let back = Some(News::Up(Duration::from_secs(3)));
    assert_eq!(health.mark_up(later), back);
}

#[test]
fn absence_from_the_start_is_reported_by_the_first_failed_dial() {
    let mut health = Health::default();
    let now = Instant::now();
    assert_eq!(health.note_absence(now), None);
    assert_eq!(health.is_up(), Some(false));
    assert!(health.mark_down(now).is_some());
    assert_eq!(health.note_absence(now), None);
}

#[test]
fn only_a_process_that_was_alive_marks_the_vm_down_by_its_end() {
    let mut health = Health::default();
    let now = Instant::now();
    health.mark_up(now);
    assert_eq!(health.note_process(None, now), None);
    assert_eq!(health.note_process(Some(7), now), None);
    assert_eq!(health.note_process(None, now), GONE);
    assert_eq!(health.note_process(None, now), None);
}

// The identities of two files are needed, which only Unix has.
#[cfg(unix)]
#[test]
fn a_vm_that_is_started_anew_may_write_its_pid_file_late() {
    let directory = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| {
        let path = directory.path().join(name);
        std::fs::write(&path, "").unwrap();
        VmIdentity::Socket(Identity::of(&path).unwrap())
    });
    let mut health = Health::default();
    let now = Instant::now();
    health.note_identity(one, now);
    health.note_process(Some(7), now);
    let now = now + SETTLE_TIME;
    assert_eq!(health.mark_down(now), GONE);
    assert!(health.note_identity(two, now).1.is_some());
    assert_eq!(health.note_process(None, now), None);
    assert_eq!(health.is_up(), Some(true));
}

#[test]
fn a_listener_tells_only_what_was_not_known() {
    let mut health = Health::default();
    let now = Instant::now();
    assert_eq!(health.note_listener(now), None);
    assert_eq!(health.is_up(), Some(true));
    // A process that ends may have its socket for a moment still.
    assert_eq!(health.mark_down(now), GONE);
    assert_eq!(health.note_listener(now), None);
    assert_eq!(health.is_up(), Some(false));
}

// The identities of two files are needed, which only Unix has.
#[cfg(unix)]
#[test]
fn another_file_is_another_vm_and_the_same_file_marks_nothing_up() {
    let directory = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| {
        let path = directory.path().join(name);
        std::fs::write(&path, "").unwrap();
        VmIdentity::Socket(Identity::of(&path).unwrap())
    });
    let now = Instant::now();
    let mut health = Health::default();
    assert_eq!(health.note_identity(one, now), (false, None));
    assert_eq!(health.is_up(), None);
    health.mark_up(now);
    health.mark_down(now);
    // A socket that was left behind is seen.
    assert_eq!(health.note_identity(one, now), (false, None));
    let back = Some(News::Up(Duration::ZERO));
    assert_eq!(health.note_identity(two, now), (true, back));
    assert_eq!(health.note_identity(two, now), (false, None));
    // Another worker looked before the change.
    assert_eq!(health.note_identity(one, now), (false, None));
    let now = now + SETTLE_TIME;
    assert_eq!(
        health.note_identity(one, now),
        (true, Some(News::Restarted))
    );
    assert_eq!(health.note_absence(now), GONE);
    assert_eq!(health.note_identity(one, now), (false, back));
    assert_eq!(health.restarts(), 2);
    // A dial may find the new VM before anything has looked at its file.
    let now = now + SETTLE_TIME;
    assert_eq!(health.mark_down(now), GONE);
    assert_eq!(health.mark_up(now), back);
    let now = now + 2 * SETTLE_TIME;
    assert_eq!(health.note_identity(two, now), (true, None));
    let now = now + SETTLE_TIME;
    assert_eq!(
        health.note_identity(one, now),
        (true, Some(News::Restarted))
    );
}

/// A VM that starts has its other files before its socket; this is still one start.
#[cfg(unix)]
#[test]
fn a_pid_file_beside_the_socket_is_no_other_vm() {
    let directory = tempfile::tempdir().unwrap();
    let [one, pid, two, other] = ["one", "pid", "two", "other"].map(|name| {
        let path = directory.path().join(name);
        std::fs::write(&path, "").unwrap();
        Identity::of(&path).unwrap()
    });
    let (socket, file) = (VmIdentity::Socket, VmIdentity::PidFile);
    let mut now = Instant::now();
    let mut health = Health::default();
    assert_eq!(health.note_identity(file(pid), now), (false, None));
    assert_eq!(health.note_identity(socket(one), now), (false, None));
    health.mark_up(now);
    now += SETTLE_TIME;
    assert_eq!(health.note_identity(file(pid), now), (false, GONE));
    let back = Some(News::Up(SETTLE_TIME));
    now += SETTLE_TIME;
    assert_eq!(health.note_identity(socket(two), now), (true, back));
    assert_eq!(health.restarts(), 1);
    // A VM without a socket is known by its pid file.
    let mut health = Health::default();
    assert_eq!(health.note_identity(file(pid), now), (false, None));
    assert!(health.note_identity(file(other), now).0);
    assert_eq!(health.restarts(), 1);
}
