//! A guest's web server asked in HTTP/1.1 by hand, blocking, written against the docs alone.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used)]
use hvsock::simulate::{Service, Vm};
use hvsock::{Stream, address::HyperkitAddress};
use std::io::{ErrorKind, Read, Result, Write};
use std::{net::Shutdown, path::Path, time::Duration};

const PATIENCE: Duration = Duration::from_secs(20);

/// Head and body of the answer; `ConnectionRefused` also if nobody listens on the guest's port.
fn get(state_dir: &Path, port: u32, path: &str) -> Result<(String, String)> {
    let guest = HyperkitAddress::new(state_dir, port).into();
    let mut stream = Stream::connect_timeout(&guest, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    let end = stream
        .write_all(request.as_bytes())
        .and_then(|()| stream.shutdown(Shutdown::Write))
        .and_then(|()| stream.read_to_string(&mut answer));
    let _ = stream.finish(PATIENCE); // Whatever has happened: the VM lives on.
    match end.map_err(|e| e.kind()) {
        // hyperkit connects, and ends it when the guest refuses: before, amid or after the request.
        Ok(0) | Err(ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) if answer.is_empty() => {
            Err(ErrorKind::ConnectionRefused.into())
        }
        Err(kind) => Err(kind.into()),
        Ok(_) => {
            let (head, body) = answer
                .split_once("\r\n\r\n")
                .ok_or(ErrorKind::InvalidData)?;
            Ok((head.to_owned(), body.to_owned()))
        }
    }
}

#[test]
fn a_refusal_of_the_guest_is_told_from_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Vm::builder(dir.path())
        .name("kiwi")
        .guest(80, Service::Http);
    let vm = vm.start().unwrap();
    let (head, page) = get(dir.path(), 80, "/fruit").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(page.contains("kiwi") && page.contains("/fruit"), "{page}");
    let (head, body) = get(dir.path(), 80, "/bytes/300000").unwrap();
    assert!(head.contains("\r\nContent-Length: 300000\r\n"), "{head}");
    assert_eq!(body.len(), 300_000);

    let kind = |port, dir: &Path| get(dir, port, "/").unwrap_err().kind();
    assert_eq!(kind(81, dir.path()), ErrorKind::ConnectionRefused);
    assert!(vm.wait_for(PATIENCE, |seen| seen.refused == 1));
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
    vm.stop();
    assert_eq!(kind(80, dir.path()), ErrorKind::ConnectionRefused);
    assert_eq!(kind(80, &dir.path().join("none")), ErrorKind::NotFound);
}
