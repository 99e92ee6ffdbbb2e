//! What the host of a virtual machine takes of its CPUs for others, which would be counted against
//! whoever is measured.

use std::fs;

/// The machine's CPU time so far, in ticks of all CPUs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticks {
    all: u64,
    stolen: u64,
}

impl Ticks {
    pub(crate) fn now() -> Ticks {
        // Of proc(5): user, nice, system, idle, iowait, irq, softirq, steal; what follows is part
        // of the first two.
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let line = stat.lines().next().unwrap_or_default();
        let fields = line.split_whitespace().skip(1).take(8);
        let fields: Vec<u64> = fields.filter_map(|field| field.parse().ok()).collect();
        Ticks {
            all: fields.iter().sum(),
            stolen: fields.get(7).copied().unwrap_or(0),
        }
    }

    /// What part of the time since then was taken.
    pub(crate) fn stolen_since(self) -> f64 {
        let now = Ticks::now();
        (now.stolen - self.stolen) as f64 / (now.all - self.all).max(1) as f64
    }
}
