//! A proxy that is told to stop stops, whenever that is.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use hvsock::address::{Address, UnixAddress};
use hvsock::{Proxy, ProxyConfig, Rule};
use std::num::NonZeroUsize;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

const ROUNDS: usize = 60;
const WORKERS: usize = 4;
const GRACE: Duration = Duration::from_millis(10);
const LONG: Duration = Duration::from_secs(10);

/// "For ever" is a time like any other.
#[test]
fn times_without_end_end_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let listen = Address::Unix(UnixAddress::Path(directory.path().join("listen")));
    let nobody = Address::Unix(UnixAddress::Path(directory.path().join("nobody")));
    let mut config = ProxyConfig::new(vec![Rule::new(listen, nobody)]);
    config.rules[0].timeouts.dial = Duration::MAX;
    config.rules[0].timeouts.drain = Duration::MAX;
    let proxy = Proxy::start(config).unwrap();
    let client = UnixStream::connect(directory.path().join("listen")).unwrap();
    drop(client);
    proxy.stop(Duration::MAX);
    proxy.wait().unwrap();
}

/// The workers hear of the end one after the other: who has nothing left to do must not leave while
/// another one may still hand a connection over.
#[test]
fn clients_that_come_at_the_very_end_do_not_keep_it() {
    let directory = tempfile::Builder::new()
        .prefix("hvs")
        .tempdir_in("/tmp")
        .unwrap();
    let path = |name: String| directory.path().join(name);
    let target = path("target".into());
    // Its clients are never accepted: they stay until the proxy cuts them off.
    let _target = UnixListener::bind(&target).unwrap();
    let rule = |name: String| {
        let unix = |path| Address::Unix(UnixAddress::Path(path));
        Rule::new(unix(path(name)), unix(target.clone()))
    };
    for round in 0..ROUNDS {
        let names: Vec<String> = (0..WORKERS).map(|i| format!("{round}.{i}")).collect();
        let mut config = ProxyConfig::new(names.iter().cloned().map(rule).collect());
        config.workers = NonZeroUsize::new(WORKERS);
        let proxy = Proxy::start(config).unwrap();
        let stopper = proxy.handle();
        let (ended, end) = mpsc::channel();
        thread::spawn(move || ended.send(proxy.wait().is_ok()));
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let crowd = scope.spawn(|| {
                // As many as the last worker may want to share; they leave at once, so that all is
                // quiet in between.
                while !over.load(Ordering::SeqCst) {
                    let last = path(names[WORKERS - 1].clone());
                    let all: Vec<_> = (0..8).map(|_| UnixStream::connect(&last)).collect();
                    if all.iter().any(Result::is_err) {
                        return;
                    }
                }
            });
            stopper.stop(GRACE);
            let ended = end.recv_timeout(LONG);
            over.store(true, Ordering::SeqCst);
            crowd.join().unwrap();
            assert_eq!(ended, Ok(true), "round {round}: the proxy doesn't end");
        });
    }
}
