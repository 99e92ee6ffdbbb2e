//! The control socket and the metrics of a proxy: their options, and how they are served.

use std::path::PathBuf;

use clap::Args;

use super::console::{complain, say};
use super::summary::tried_again;
use crate::address::{Address, TcpAddress};
use crate::app::control::{self, Actions, Bound, Control, ControlPlace, Unavailable};
use crate::app::guest_control::{self, GuestControl};
use crate::app::values::{at_home, metrics};
use crate::proxy::{Proxy, ProxyConfig, Source};

/// How a proxy that runs can be looked at and changed.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Control")]
pub(super) struct ControlOptions {
    /// Let `hvsock status`, `top`, `add` and `remove` at it by a Unix socket at PATH, or without
    /// =PATH where they look first. =off: there is none [default: one under the process' number,
    /// which `hvsock ps` lists]
    #[arg(long, value_name = "PATH|off", num_args = 0..=1, require_equals = true, value_parser = parse_place)]
    control: Option<Option<ControlPlace>>,
    /// Serve Prometheus' metrics at http://ADDR:PORT/metrics (127.0.0.1 if ADDR is left out), to
    /// whoever can connect; or at a Unix socket (/run/metrics.sock), or to guests at vsock://:PORT
    #[arg(long, value_name = "[ADDR:]PORT|ADDRESS", value_parser = parse_metrics)]
    metrics: Option<Address>,
    /// Let guests do at vsock://:PORT what the control socket does, but for ending it: they may
    /// forward to any address that this user reaches [default: they may not]
    #[arg(long, value_name = "ADDRESS", value_parser = guest_control::parse_address)]
    guest_control: Option<Address>,
    /// CIDs of the guests that may; others are refused [default: every guest may]
    #[arg(long, value_name = "CID", value_delimiter = ',', requires = "guest_control", value_parser = guest_control::parse_source)]
    guest_control_from: Vec<Source>,
    /// Let forwards to programs (exec:/PROGRAM) be added by the control socket, too
    #[arg(long)]
    allow_exec: bool,
}

impl ControlOptions {
    /// Returns whether forwards to programs may be added by the control socket.
    pub(super) fn allows_exec(&self) -> bool {
        self.allow_exec
    }

    /// Returns the sockets that are wanted, if any. `unavailable` says what to do if one can't be
    /// bound.
    pub(super) fn sockets(&self, unavailable: Unavailable) -> Option<control::Options> {
        let control = match self.control.clone() {
            None => ControlPlace::Own,
            Some(place) => place.unwrap_or_else(|| ControlPlace::At(control::default_path())),
        };
        let guest_control = self.guest_control.clone().map(|address| GuestControl {
            address,
            from: self.guest_control_from.clone(),
        });
        if control == ControlPlace::Nowhere && self.metrics.is_none() && guest_control.is_none() {
            return None;
        }
        Some(control::Options {
            control,
            guest_control,
            metrics: self.metrics.clone(),
            unavailable,
        })
    }
}

/// Reads the path of a control socket, or `off`. Refuses a URI, which is likely a mistake.
fn parse_place(text: &str) -> Result<ControlPlace, String> {
    match text {
        "off" => Ok(ControlPlace::Nowhere),
        "" => Err("it is empty; leave the = out for the usual place".to_owned()),
        text if text.contains("://") || text.starts_with(['@', '-']) => {
            Err("it is a path, as /run/hvsock.sock or ./hvsock.sock".to_owned())
        }
        text => Ok(ControlPlace::At(PathBuf::from(&*at_home(text)?))),
    }
}

fn parse_metrics(text: &str) -> Result<Address, String> {
    metrics(&text.into())
}

/// Binds the wanted sockets, and forbids the proxy's forwards to lead there.
pub(super) fn open(sockets: &control::Options, config: &mut ProxyConfig) -> crate::Result<Bound> {
    let bound = control::bind(sockets)?;
    config.forbidden.extend(bound.addresses());
    config.other_descriptors += bound.descriptors();
    config.observer = Some(bound.observer());
    Ok(bound)
}

/// Serves on the bound sockets, to which no forward may lead, and prints their addresses.
pub(super) fn serve(bound: Bound, proxy: &Proxy, actions: Actions) -> crate::Result<Control> {
    let states = bound.endpoint_states();
    let control = bound.serve(proxy.handle(), actions)?;
    for (what, address, trouble) in states {
        match (address.as_tcp(), trouble) {
            (_, Some(why)) => complain(tried_again(&why)),
            (Some(TcpAddress { host, port, .. }), None) => {
                say(format_args!("metrics at http://{host}:{port}/metrics"));
            }
            (None, None) => say(format_args!("{what} {address}")),
        }
    }
    Ok(control)
}
