//! The metrics of a proxy, in Prometheus' text format.

use std::fmt;
use std::time::UNIX_EPOCH;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet, prometheus_text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::model::{ForwardInfo, Status, VmInfo, refusals_by_reason};
use crate::keeper::LinkStatus;
use crate::proxy::{Counters, VmStatus};
use crate::sys;

pub(super) use prometheus_text::CONTENT_TYPE;

/// Returns the metrics of a proxy.
pub(super) fn text(status: Status) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Metrics(status)));
    let mut text = String::new();
    // Writing to a string can't fail.
    let _ = prometheus_text::encode(&mut text, &registry);
    text
}

/// The collector. The counts are kept by the proxy.
#[derive(Debug)]
struct Metrics(Status);

impl Collector for Metrics {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        let status = &self.0;
        Families(&mut to).of_process(status)?;
        Families(&mut to).of_keeper(status.keeper.as_ref())?;
        Families(&mut to).of_forwards(&status.forwards)?;
        Families(&mut to).of_vms(&status.vms())
    }
}

/// The value of a sample. The encoder appends the `_total` of a counter's name.
#[derive(Clone, Copy, Debug)]
enum Value {
    Counter(u64),
    Gauge(u64),
    Seconds(f64),
}

use Value::{Counter, Gauge, Seconds};

impl EncodeMetric for Value {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        match self {
            Counter(count) => encoder.encode_counter::<NoLabelSet, _, u64>(count, None),
            Gauge(count) => encoder.encode_gauge(count),
            Seconds(seconds) => encoder.encode_gauge(seconds),
        }
    }

    fn metric_type(&self) -> MetricType {
        match self {
            Counter(_) => MetricType::Counter,
            Gauge(_) | Seconds(_) => MetricType::Gauge,
        }
    }
}

struct Families<'a, 'b>(&'a mut DescriptorEncoder<'b>);

impl Families<'_, '_> {
    /// Writes a family, if it has samples.
    fn family<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = (L, Value)>,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        let Some((_, first)) = samples.peek() else {
            return Ok(());
        };
        let mut family = self
            .0
            .encode_descriptor(name, help, None, first.metric_type())?;
        for (labels, value) in samples {
            value.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn of_process(&mut self, status: &Status) -> fmt::Result {
        let version = [("version", status.version.as_str())];
        let build = [(version, Gauge(1))];
        self.family("hvsock_build_info", "Which hvsock it is.", build)?;
        let open = open_descriptors().map(|open| Gauge(open as u64));
        let limit = sys::descriptor_limit().map(Gauge);
        for (name, help, value) in [
            (
                "hvsock_uptime_seconds",
                "Seconds since the start.",
                Some(Seconds(status.uptime_seconds)),
            ),
            (
                "hvsock_connections",
                "Connections that are not closed yet, those of removed forwards included.",
                Some(Gauge(status.live as u64)),
            ),
            (
                "hvsock_log_dropped",
                "Lines of the log that nobody took in time.",
                Some(Counter(status.log_dropped)),
            ),
            ("process_open_fds", "Descriptors that are open.", open),
            (
                "process_max_fds",
                "Descriptors that the process may have.",
                limit,
            ),
        ] {
            self.family(name, help, value.map(|value| (NO_LABELS, value)))?;
        }
        let carried = [
            ([("carrier", "buffer")], Counter(status.carried.copied)),
            ([("carrier", "pipe")], Counter(status.carried.spliced)),
        ];
        let help = "Bytes that were delivered, by what has carried them.";
        self.family("hvsock_carried_bytes", help, carried)
    }

    fn of_keeper(&mut self, keeper: Option<&LinkStatus>) -> fmt::Result {
        let mut each = |name, help, of: fn(&LinkStatus) -> Value| {
            self.family(name, help, keeper.map(|it| (NO_LABELS, of(it))))
        };
        each(
            "hvsock_keeper_pid",
            "The process that keeps VMs whole when this one is gone; 0 if none runs.",
            |it| Gauge(it.pid.unwrap_or_default().into()),
        )?;
        each(
            "hvsock_keeper_connections",
            "Connections of VMs of which the keeper has a copy.",
            |it| Gauge(it.connections as u64),
        )?;
        each(
            "hvsock_keeper_ports",
            "Ports that guests dial and of which the keeper has a copy.",
            |it| Gauge(it.ports as u64),
        )?;
        each(
            "hvsock_keeper_unguarded",
            "Connections and ports of which the keeper should have a copy and has none.",
            |it| Gauge(it.unguarded as u64),
        )?;
        each(
            "hvsock_keeper_restarts",
            "Keepers that ended and were replaced.",
            |it| Counter(it.restarts),
        )
    }

    fn of_forwards(&mut self, forwards: &[ForwardInfo]) -> fmt::Result {
        let mut each = |name, help, of: fn(&Counters) -> Value| {
            let samples = forwards.iter().map(|it| (labels(it), of(&it.counters)));
            self.family(name, help, samples)
        };
        each("hvsock_forward_accepted", "Connections accepted.", |it| {
            Counter(it.accepted)
        })?;
        each(
            "hvsock_forward_live",
            "Connections that are not closed yet.",
            |it| Gauge(it.live),
        )?;
        each(
            "hvsock_forward_timed_out",
            "Open connections on which nothing moved for too long.",
            |it| Counter(it.timed_out.idle + it.timed_out.half_closed),
        )?;
        each(
            "hvsock_forward_abandoned",
            "Connections that were closed before their peer had ended them.",
            |it| Counter(it.abandoned),
        )?;
        each(
            "hvsock_forward_sent_bytes",
            "Bytes from the accepting to the dialled side.",
            |it| Counter(it.sent),
        )?;
        each(
            "hvsock_forward_received_bytes",
            "Bytes from the dialled to the accepting side.",
            |it| Counter(it.received),
        )?;
        let refused = forwards.iter().flat_map(|it| {
            let reasons = refusals_by_reason(&it.counters.refusals).into_iter();
            reasons.map(|(reason, count)| ((labels(it), [("reason", reason)]), Counter(count)))
        });
        let help = "Connections that could not be carried.";
        self.family("hvsock_forward_refused", help, refused)?;
        let ended = forwards.iter().flat_map(|it| {
            let reasons = it.counters.ended.by_reason();
            reasons.map(|(reason, count)| ((labels(it), [("reason", reason)]), Counter(count)))
        });
        let help = "Connections that have ended, by what began their end.";
        self.family("hvsock_forward_ended", help, ended)?;
        let listening = forwards.iter().map(|it| {
            let listens = it.state == "listening";
            (labels(it), Gauge(listens.into()))
        });
        let help = "Whether it takes clients now (1) or not (0).";
        self.family("hvsock_forward_listening", help, listening)
    }

    fn of_vms(&mut self, vms: &[&VmInfo]) -> fmt::Result {
        let mut each = |name, help, of: fn(&VmStatus) -> Option<Value>| {
            let sample = |vm: &&VmInfo| Some(([("vm", vm.directory.clone())], of(&vm.status)?));
            self.family(name, help, vms.iter().filter_map(sample))
        };
        each(
            "hvsock_vm_connections",
            "Connections to a VM and from it.",
            |it| Some(Gauge(it.connections as u64)),
        )?;
        each(
            "hvsock_vm_connections_limit",
            "How many connections there may be to a VM and from it, if it has a limit.",
            |it| Some(Gauge(it.limit? as u64)),
        )?;
        each(
            "hvsock_vm_lost_slots",
            "Slots of a VM whose connections have ended, but not in its guest; they come back when it ends them, or the VM is restarted.",
            |it| Some(Gauge(it.lost as u64)),
        )?;
        each(
            "hvsock_vm_guest_connections",
            "Connections that a VM's guest has made to this host, and that are served.",
            |it| Some(Gauge(it.guests as u64)),
        )?;
        each(
            "hvsock_vm_guest_turned_away",
            "Dials of a VM's guest that were ended at once, because a limit was reached; from 0 when the VM is restarted.",
            |it| Some(Counter(it.turned_away)),
        )?;
        each(
            "hvsock_vm_unanswered",
            "How many of the latest dials to a VM have brought nothing back yet; a service that waits for its client is silent.",
            |it| Some(Gauge(it.unanswered)),
        )?;
        each(
            "hvsock_vm_last_heard_timestamp_seconds",
            "When a byte or an end came last from a VM's guest, in seconds since 1970.",
            |it| {
                let at = it.last_heard?.duration_since(UNIX_EPOCH);
                Some(Seconds(at.unwrap_or_default().as_secs_f64()))
            },
        )?;
        each(
            "hvsock_vm_up",
            "Whether a VM runs (1) or not (0), where that is known.",
            |it| it.up.map(|up| Gauge(up.into())),
        )?;
        each(
            "hvsock_vm_silent",
            "Whether a VM's guest has answered nothing for 30 s, though it was asked (1), or not (0).",
            |it| Some(Gauge(it.silent_since.is_some().into())),
        )?;
        each(
            "hvsock_vm_paused",
            "Whether a VM's process is stopped (1) or not (0), as far as the system tells.",
            |it| Some(Gauge(it.paused.into())),
        )?;
        each(
            "hvsock_vm_restarts",
            "How often a VM was started anew.",
            |it| Some(Counter(it.restarts)),
        )
    }
}

const NO_LABELS: [(&str, &str); 0] = [];

fn labels(forward: &ForwardInfo) -> [(&'static str, &str); 3] {
    [
        ("name", forward.name.as_deref().unwrap_or("")),
        ("listen", &forward.listen),
        ("connect", &forward.connect),
    ]
}

fn open_descriptors() -> Option<usize> {
    // One of them is that of the directory itself.
    let all = std::fs::read_dir("/dev/fd").ok()?;
    all.count().checked_sub(1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn families_and_labels_are_as_the_format_has_them() {
        #[derive(Debug)]
        struct Some;
        impl Collector for Some {
            fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
                let odd = [("x", "C:\\new\n\"it\"")];
                let samples = [(odd, Counter(u64::MAX)), ([("x", "")], Counter(0))];
                Families(&mut to).family("a", "one\ntwo \\ \"three\"", samples)?;
                Families(&mut to).family("b", "gone", [(odd, Gauge(0)); 0])?;
                Families(&mut to).family("c", "when", [(NO_LABELS, Seconds(1_764_456_789.25))])
            }
        }
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Some));
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry).unwrap();
        let right = "# HELP a_total one\\ntwo \\\\ \"three\"\n# TYPE a_total counter\n\
            a_total{x=\"C:\\\\new\\n\\\"it\\\"\"} 18446744073709551615\na_total{x=\"\"} 0\n\
            # HELP c when\n# TYPE c gauge\nc 1764456789.25\n";
        assert_eq!(text, right);
    }
}
