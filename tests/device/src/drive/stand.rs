//! What a check of either kind stands on: a machine, a proxy in front of it, and where that
//! listens.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::machine::{Line, Machine, Parts};
use crate::proxy::Proxy;
use crate::report::{Outcome, ensure, eventually};
use crate::sockets::Front;

const SOON: Duration = Duration::from_secs(30);

pub(crate) struct Stand {
    pub(crate) parts: Parts,
    pub(crate) dir: PathBuf,
    pub(crate) line: Line,
    machine: Mutex<Machine>,
    proxy: Mutex<Proxy>,
    /// The guest's ports, each with a TCP and a Unix front.
    ports: &'static [u32],
    fronts: Vec<Front>,
    /// The proxy's descriptors when it has just started.
    descriptors: usize,
}

impl Stand {
    /// Of a guest that serves, and a proxy that has done nothing yet and whose first rules are the
    /// ports' fronts.
    pub(crate) fn new(
        parts: &Parts,
        dir: &Path,
        machine: Machine,
        proxy: Proxy,
        ports: &'static [u32],
    ) -> Result<Stand, Box<dyn Error + Send + Sync>> {
        let fronts = (0..2 * ports.len())
            .map(|rule| proxy.front(rule))
            .collect::<Result<_, _>>()?;
        Ok(Stand {
            parts: parts.clone(),
            dir: dir.to_owned(),
            line: machine.line(),
            machine: Mutex::new(machine),
            descriptors: proxy.process.descriptors(),
            proxy: Mutex::new(proxy),
            ports,
            fronts,
        })
    }

    pub(crate) fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn proxy(&self) -> MutexGuard<'_, Proxy> {
        self.proxy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the parts have said on standard error, for whoever looks into a failure.
    pub(crate) fn said(&self) -> String {
        let machine = self.machine();
        let device = machine.device.err();
        format!(
            "{}{device}{}",
            self.proxy().process.err(),
            machine.qemu.out()
        )
    }

    /// The two fronts, TCP and Unix, of a port of the guest.
    pub(crate) fn fronts(&self, port: u32) -> &[Front] {
        let at = self.ports.iter().position(|&p| p == port);
        let at = 2 * at.unwrap_or_default();
        &self.fronts[at..at + 2]
    }

    pub(crate) fn tcp(&self, port: u32) -> &Front {
        &self.fronts(port)[0]
    }

    pub(crate) fn unix(&self, port: u32) -> &Front {
        &self.fronts(port)[1]
    }

    /// The proxy has nothing left of any connection. It makes sockets ahead for its keeper, sixteen
    /// at a time.
    pub(crate) fn proxy_is_idle(&self) -> Outcome {
        const AHEAD: usize = 16;
        let mut open = 0;
        let none = eventually(SOON, || {
            open = self.proxy().process.descriptors();
            open <= self.descriptors + AHEAD
        });
        ensure!(
            none,
            "{open} descriptors in the proxy, {} at its start",
            self.descriptors
        );
        Ok(())
    }
}
