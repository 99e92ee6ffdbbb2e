//! No register: this system has none.

use std::io;

use crate::address::ServiceId;

fn none<T>() -> io::Result<T> {
    let why = "only Windows has a register of services; nothing here needs one";
    Err(io::Error::new(io::ErrorKind::Unsupported, why))
}

pub(super) fn name(_: ServiceId) -> io::Result<String> {
    none()
}

pub(super) fn write(_: ServiceId, _: &str) -> io::Result<()> {
    none()
}

pub(super) fn remove(_: ServiceId) -> io::Result<()> {
    none()
}

pub(super) fn list() -> io::Result<Vec<(ServiceId, String)>> {
    none()
}
