//! Prometheus' text format (version 0.0.4). The counters are the proxy's, so that a library that keeps counters of its own would have
//! nothing to do but the escaping of three characters.

use std::fmt::Write;

use super::model::{Forward, Status, Tally, Vm};
use crate::sys;

pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The metrics of a proxy.
pub(super) fn text(status: &Status) -> String {
    let mut text = Text::default();
    let version = [("version", status.version.as_str())];
    text.family("hvsock_build_info", "gauge", "Which hvsock it is.");
    text.sample("hvsock_build_info", &version, 1.0);
    text.single(
        "hvsock_uptime_seconds",
        "gauge",
        "Seconds since the start.",
        status.uptime_seconds,
    );
    text.single(
        "hvsock_connections",
        "gauge",
        "Connections that are not closed yet, those of removed forwards included.",
        status.live as f64,
    );
    text.single(
        "hvsock_log_dropped_total",
        "counter",
        "Lines of the log that nobody took in time.",
        status.log_dropped as f64,
    );
    if let Some(open) = open_descriptors() {
        text.single(
            "process_open_fds",
            "gauge",
            "Descriptors that are open.",
            open as f64,
        );
    }
    if let Some(limit) = sys::descriptor_limit() {
        let what = "Descriptors that the process may have.";
        text.single("process_max_fds", "gauge", what, limit as f64);
    }
    for (name, kind, help, of) in FORWARD {
        text.family(name, kind, help);
        for forward in &status.forwards {
            text.sample(name, &labels(forward), of(&forward.counters) as f64);
        }
    }
    let refused = "hvsock_forward_refused_total";
    text.family(refused, "counter", "Connections that could not be carried.");
    for forward in &status.forwards {
        for (reason, count) in forward.counters.refusals.each() {
            let labels = [&labels(forward)[..], &[("reason", reason)]].concat();
            text.sample(refused, &labels, count as f64);
        }
    }
    let listening = "hvsock_forward_listening";
    text.family(
        listening,
        "gauge",
        "Whether it takes clients now (1) or not (0).",
    );
    for forward in &status.forwards {
        let value = f64::from(u8::from(forward.state == "listening"));
        text.sample(listening, &labels(forward), value);
    }
    for (name, kind, help, of) in VM {
        let of = |vm: &Vm| Some((vm.directory.clone(), of(vm)?));
        let values: Vec<(String, f64)> = status.vms().into_iter().filter_map(of).collect();
        if !values.is_empty() {
            text.family(name, kind, help);
        }
        for (directory, value) in values {
            text.sample(name, &[("vm", &directory)], value);
        }
    }
    text.0
}

type VmFamily = (
    &'static str,
    &'static str,
    &'static str,
    fn(&Vm) -> Option<f64>,
);

const VM: [VmFamily; 6] = [
    (
        "hvsock_vm_connections",
        "gauge",
        "Connections to a hyperkit VM and from it.",
        |it| Some(it.connections as f64),
    ),
    (
        "hvsock_vm_connections_limit",
        "gauge",
        "How many connections there may be to a hyperkit VM and from it.",
        |it| Some(it.limit as f64),
    ),
    (
        "hvsock_vm_unanswered",
        "gauge",
        "How many of the latest dials to a VM have brought nothing back yet; a service that waits for its client is silent.",
        |it| Some(it.unanswered as f64),
    ),
    (
        "hvsock_vm_last_heard_timestamp_seconds",
        "gauge",
        "When a byte or an end came last from a VM's guest, in seconds since 1970.",
        |it| it.last_heard,
    ),
    (
        "hvsock_vm_up",
        "gauge",
        "Whether a VM runs (1) or not (0), where that is known.",
        |it| it.up.map(|up| f64::from(u8::from(up))),
    ),
    (
        "hvsock_vm_restarts_total",
        "counter",
        "How often a VM was started anew.",
        |it| Some(it.restarts as f64),
    ),
];

type Family = (&'static str, &'static str, &'static str, fn(&Tally) -> u64);

const FORWARD: [Family; 6] = [
    (
        "hvsock_forward_accepted_total",
        "counter",
        "Connections accepted.",
        |it| it.accepted,
    ),
    (
        "hvsock_forward_live",
        "gauge",
        "Connections that are not closed yet.",
        |it| it.live,
    ),
    (
        "hvsock_forward_timed_out_total",
        "counter",
        "Open connections on which nothing moved for too long.",
        |it| it.idle + it.half_closed,
    ),
    (
        "hvsock_forward_abandoned_total",
        "counter",
        "Connections that were closed before their peer had ended them.",
        |it| it.abandoned,
    ),
    (
        "hvsock_forward_sent_bytes_total",
        "counter",
        "Bytes from the accepting to the dialled side.",
        |it| it.sent,
    ),
    (
        "hvsock_forward_received_bytes_total",
        "counter",
        "Bytes from the dialled to the accepting side.",
        |it| it.received,
    ),
];

fn labels(forward: &Forward) -> [(&'static str, &str); 3] {
    [
        ("name", forward.name.as_deref().unwrap_or("")),
        ("listen", &forward.listen),
        ("connect", &forward.connect),
    ]
}

fn open_descriptors() -> Option<usize> {
    // One is that of the directory itself.
    let all = std::fs::read_dir("/dev/fd").ok()?;
    all.count().checked_sub(1)
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {}", escape(help, false)));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(key, value)| format!("{key}=\"{}\"", escape(value, true)))
            .collect();
        match labels.is_empty() {
            true => self.line(format_args!("{name} {value}")),
            false => self.line(format_args!("{name}{{{}}} {value}", labels.join(","))),
        }
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string can't fail.
        let _ = writeln!(self.0, "{line}");
    }
}

/// What may not stand in a help text, or, `quoted`, in a label's value, as it is.
fn escape(text: &str, quoted: bool) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\\' => escaped.push_str("\\\\"),
            '\n' => escaped.push_str("\\n"),
            '"' if quoted => escaped.push_str("\\\""),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_stay_on_their_line_and_in_their_quotes() {
        let mut text = Text::default();
        text.family("a", "gauge", "one\ntwo \\ \"three\"");
        text.sample(
            "a",
            &[("x", "C:\\new\n\"it\"")],
            18_446_744_073_709_551_615_u64 as f64,
        );
        let right = "# HELP a one\\ntwo \\\\ \"three\"\n# TYPE a gauge\na{x=\"C:\\\\new\\n\\\"it\\\"\"} 18446744073709552000\n";
        assert_eq!(text.0, right);
    }
}
