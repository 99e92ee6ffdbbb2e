//! Finds missing things that the forwards of a file need, each with its line. Most may come later,
//! so `hvsock run` accepts the file, and retries.

use std::collections::HashMap;

use super::forward::ForwardSection;
use super::problems::{Problem, Weight};
use super::{Config, WantedState};
#[cfg(unix)]
use crate::address::Address;
#[cfg(unix)]
use crate::app::needs::look_at_state_dir;
use crate::app::needs::{
    HostAddresses, look_at_directory_of, look_at_listen, look_at_target, nearest,
};
use crate::app::slow::give_up_if_slow;

impl Config {
    /// Finds what is missing. If a disk hangs it gives up: forwards that don't need that disk are
    /// carried.
    pub(super) fn needs(&self, wanted: &WantedState) -> Vec<Problem> {
        let (config, wanted) = (self.clone(), wanted.clone());
        let looked = give_up_if_slow(move || config.look_at_needs(&wanted));
        looked.unwrap_or_else(|why| {
            vec![Problem {
                line: None,
                text: format!("what its forwards need was not looked at: {why}"),
                weight: Weight::Note,
            }]
        })
    }

    /// Returns what is missing, as notes, and what can never work, as mistakes.
    fn look_at_needs(&self, wanted: &WantedState) -> Vec<Problem> {
        let mut problems = Vec::new();
        let forwards = self.forwards.iter().map(|it| (it.name.as_str(), it));
        let forwards: HashMap<&str, &ForwardSection> = forwards.collect();
        for missing in &wanted.missing {
            let vm = self.vms.iter().find(|vm| vm.name == missing.name);
            let nearest = nearest(&missing.vm.state_dir);
            let nearest = nearest.map(|(path, _)| format!(" (there is {})", path.display()));
            let text = format!(
                "VM {:?} is not there yet: {}{}; until then its clients are refused",
                missing.name,
                missing.why,
                nearest.unwrap_or_default()
            );
            problems.push(Problem {
                line: vm.map(|vm| vm.line.clone()),
                text,
                weight: Weight::Note,
            });
        }
        let mut known = HostAddresses::default();
        #[cfg(unix)]
        let mut looked_at = std::collections::HashSet::new();
        for rule in &wanted.rules {
            let name = rule.name.as_deref().unwrap_or_default();
            let Some(forward) = forwards.get(name) else {
                continue;
            };
            #[cfg(unix)]
            for vm in [&rule.listen, &rule.connect].map(Address::hyperkit_vm) {
                let Some(vm) = vm.filter(|it| looked_at.insert(it.state_dir.clone())) else {
                    continue;
                };
                let line = forward.vm().map(|(name, line)| {
                    let section = self.vms.iter().find(|vm| vm.name == name);
                    section.map_or(line, |vm| &vm.line)
                });
                let line = line.unwrap_or(&forward.connect_line);
                problems.extend(look_at_state_dir(vm).map(|it| Problem {
                    line: Some(line.clone()),
                    text: it.to_string(),
                    weight: it.weight,
                }));
            }
            let listen = look_at_listen(&rule.listen, &mut known);
            problems.extend(listen.map(|it| Problem::of_forward(name, &forward.listen_line, &it)));
            let target = look_at_target(&rule.connect);
            problems.extend(target.map(|it| Problem::of_forward(name, &forward.connect_line, &it)));
        }
        if let Some(path) = &self.control
            && let Some(directory) = path.parent()
            // The directory itself is created.
            && let Some(finding) = look_at_directory_of("control", directory)
        {
            problems.push(Problem {
                line: None,
                text: finding.to_string(),
                weight: finding.weight,
            });
        }
        problems
    }
}
