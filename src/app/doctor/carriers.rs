//! The running hvsocks, and what they report of a VM to which they lead.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::check::{Asked, Check, Verdict};
use crate::app::answering::{self, Hvsock, find_control_of};
use crate::app::control::{self, ForwardInfo, Status, VmInfo, ask_status};
use crate::error::counted;
use crate::keeper::status as keepers;

/// How long the hvsock at the default control socket may take to answer, if its process isn't
/// listed: it may run in another container.
const PATIENCE: Duration = Duration::from_secs(2);

/// The remedy if the named hvsock is the wrong one.
const OTHER: &str = "`hvsock ps` lists those that run, and what each leads to";

/// The names of the checks of a VM's health, of its slots, and of both in one check.
const HEALTH: &str = "health";
const SLOTS: &str = "slots";
const VM: &str = "vm";

/// The remedy that brings lost slots back.
const REGAIN: &str = "let the guest go on if it sleeps, or end its programs that keep connections open whose other end is gone, or restart the VM";

/// The remedy that gives more slots instead of the lost ones, while the device has some.
const REPLACE: &str =
    "--vm-connections, or `connections` of the VM in the file, gives more until then, 1000 at most";

/// The hvsocks that were asked.
pub(super) struct Hvsocks {
    answers: Vec<Status>,
    /// Those that run and don't answer.
    silent: Vec<Hvsock>,
    named: Option<NamedProcess>,
}

/// The hvsock that the user has named.
struct NamedProcess {
    /// Its name within a sentence: its process or its control socket.
    name: String,
    /// Why it gives no answer.
    failure: Option<String>,
}

/// An hvsock that leads to a VM, and what it reports of that.
pub(super) struct CarryingProcess {
    pub(super) process: u32,
    pub(super) vm: VmInfo,
}

/// A finding about a VM that its hvsocks may not have made yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum VmFinding {
    /// None.
    Nothing,
    /// Its process is stopped.
    Stopped,
    /// Its guest hasn't answered a dial.
    Unanswered,
}

impl Hvsocks {
    pub(super) fn ask(asked: &Asked) -> Hvsocks {
        match asked {
            Asked::All => Hvsocks::ask_all(),
            Asked::At(path) => Hvsocks::ask_one(format!("the hvsock of {}", path.display()), path),
            Asked::Process(id) => Hvsocks::ask_one(format!("hvsock {id}"), &find_control_of(*id)),
        }
    }

    fn ask_one(name: String, control_socket: &Path) -> Hvsocks {
        let (answers, failure) = match control::get::<Status>(control_socket, "/v1/status") {
            Ok(status) => (vec![status], None),
            Err(e) => (Vec::new(), Some(e.to_string())),
        };
        Hvsocks {
            answers,
            silent: Vec::new(),
            named: Some(NamedProcess { name, failure }),
        }
    }

    fn ask_all() -> Hvsocks {
        let mut all = Hvsocks {
            answers: Vec::new(),
            silent: Vec::new(),
            named: None,
        };
        for hvsock in answering::find().unwrap_or_default() {
            match hvsock.status() {
                Some(status) => all.answers.push(status),
                None => all.silent.push(hvsock),
            }
        }
        let usual = ask_status(&control::find_path(), PATIENCE).ok();
        let usual = usual.and_then(|it| control::read::<Status>(&it).ok());
        let is_new = |it: &Status| all.answers.iter().all(|other| other.pid != it.pid);
        if let Some(status) = usual.filter(is_new) {
            all.answers.push(status);
        }
        all
    }

    /// Returns whether that process was among those to ask.
    pub(super) fn was_meant(&self, process: u32) -> bool {
        self.named.is_none() || self.answers.iter().any(|it| it.pid == process)
    }

    /// Returns the hvsocks that lead to a VM. `is_it` tests the VM's name as `--vm` takes it.
    pub(super) fn carriers(&self, is_it: impl Fn(&str) -> bool) -> Vec<CarryingProcess> {
        let carriers = self.answers.iter();
        let carriers = carriers
            .filter_map(|status| CarryingProcess::all(status).find(|it| is_it(&it.vm.directory)));
        carriers.collect()
    }

    /// Returns a check for each hvsock whose use of the VM isn't known. If one was named, it fails
    /// if that one doesn't answer or doesn't lead to the VM. Otherwise there is a skipped check for
    /// each hvsock that doesn't answer, if its command line or a keeper in the state directory
    /// shows that it leads to the VM.
    pub(super) fn check_unknown(
        &self,
        carriers: &[CarryingProcess],
        directory: Option<&Path>,
    ) -> Vec<Check> {
        if let Some(named) = &self.named {
            let why = match &named.failure {
                Some(why) => why.clone(),
                None if carriers.is_empty() => format!("{} doesn't lead to the VM", named.name),
                None => return Vec::new(),
            };
            let (seen, remedy) = why.split_once("; ").unwrap_or((&why, OTHER));
            return vec![Check::failed(SLOTS, seen, remedy)];
        }
        let Some(directory) = directory else {
            return Vec::new();
        };
        let of_keepers = keepers::query(directory).into_iter();
        let of_keepers = of_keepers.filter(|it| !it.proxy_ended).map(|it| it.proxy);
        let shown = directory.to_string_lossy();
        let names_it = |it: &&Hvsock| serves_vm_of(&it.process.command, &shown);
        let by_words = self.silent.iter().filter(names_it).map(|it| it.process.id);
        let mut processes: Vec<u32> = of_keepers.chain(by_words).collect();
        processes.retain(|process| self.answers.iter().all(|it| it.pid != *process));
        processes.sort_unstable();
        processes.dedup();
        let unknown = |process| {
            let what = format!(
                "hvsock {process} leads to the VM, and doesn't tell how it uses it: it is stopped, or its control socket is elsewhere"
            );
            Check::skipped(SLOTS, what)
                .with_remedy("name its control socket with --control PATH, if it has one")
        };
        processes.into_iter().map(unknown).collect()
    }

    /// Returns the first of their forwards for which `is_it` is true. A process that has taken over
    /// comes before its predecessor.
    pub(super) fn forward(&self, is_it: impl Fn(&ForwardInfo) -> bool) -> Option<&ForwardInfo> {
        let (old, current): (Vec<_>, Vec<_>) =
            self.answers.iter().partition(|it| it.successor.is_some());
        let forwards = current.into_iter().chain(old).flat_map(|it| &it.forwards);
        let mut forwards = forwards.filter(|it| is_it(it));
        forwards.next()
    }
}

/// Checks each VM to which an hvsock of this user leads, by that hvsock's report. Nothing is
/// dialled.
pub(super) fn examine() -> Vec<Check> {
    let (hvsocks, now) = (Hvsocks::ask_all(), SystemTime::now());
    let carriers = hvsocks.answers.iter().flat_map(CarryingProcess::all);
    let mut checks: Vec<Check> = carriers.map(|it| it.check_all(now)).collect();
    let silent = hvsocks.silent.iter().map(|it| &it.process);
    let silent = silent.filter(|it| serves(&it.command));
    checks.extend(silent.map(|it| {
        let seen = format!(
            "hvsock {} doesn't answer: it is stopped, or has no control socket, or it is elsewhere",
            it.id
        );
        Check::skipped(VM, seen).with_remedy("`hvsock doctor --vm VM` looks at one VM itself")
    }));
    checks
}

/// Returns whether a command serves forwards.
fn serves(command: &[String]) -> bool {
    let command = command.get(1);
    command.is_some_and(|it| ["expose", "forward", "run"].contains(&it.as_str()))
}

/// Returns whether a command line names the VM of that directory.
fn serves_vm_of(command: &[String], directory: &str) -> bool {
    let is_in = |word: &String| {
        let mut behind = word.match_indices(directory);
        behind.any(|(at, _)| {
            let next = word[at + directory.len()..].chars().next();
            next.is_none_or(|next| "/?".contains(next))
        })
    };
    serves(command) && command.iter().skip(2).any(is_in)
}

impl CarryingProcess {
    /// Returns an entry for each VM to which an hvsock leads.
    fn all(status: &Status) -> impl Iterator<Item = CarryingProcess> {
        status.vms().into_iter().map(|vm| CarryingProcess {
            process: status.pid,
            vm: vm.clone(),
        })
    }

    /// Checks the VM's health and the use of its slots, in one check.
    fn check_all(&self, now: SystemTime) -> Check {
        let place = &self.vm.directory;
        let checks = [
            self.check_health(VmFinding::Nothing, now),
            self.check_slots(),
        ];
        let seen = format!(
            "{place}: hvsock {}: {}; {}",
            self.process,
            self.vm.health(now),
            self.vm.slots()
        );
        let more = format!("`hvsock doctor --vm {place}` tells more");
        let wrong = checks.into_iter().find(|it| it.verdict != Verdict::Ok);
        match wrong.and_then(|it| it.remedy) {
            Some(remedy) => Check::warning(VM, seen, &format!("{remedy}; {more}")),
            None => Check::ok(VM, seen).with_remedy(more),
        }
    }

    /// Checks whether the VM is there and answers. `found` is a finding made just now.
    pub(super) fn check_health(&self, found: VmFinding, now: SystemTime) -> Check {
        const GO_ON: &str = "send its process a SIGCONT";
        const SILENT: &str = "no dial is answered: see on the VM's console whether it hangs";
        let status = &self.vm.status;
        let seen = format!("hvsock {}: {}", self.process, self.vm.health(now));
        let remedy = match (status.silent_since, found) {
            // The hvsock checks at intervals: it may not have seen the stop yet, or take the VM for
            // gone.
            (_, VmFinding::Stopped) => GO_ON,
            _ if status.up == Some(false) => "start the VM",
            _ if status.paused => GO_ON,
            (Some(_), _) => SILENT,
            (None, VmFinding::Unanswered) if status.unanswered > 0 => SILENT,
            (None, _) => return Check::ok(HEALTH, seen),
        };
        Check::warning(HEALTH, seen, remedy)
    }

    /// Checks how the hvsock uses the VM's slots.
    pub(super) fn check_slots(&self) -> Check {
        let (name, process, status) = (SLOTS, self.process, &self.vm.status);
        let seen = format!("hvsock {process}: {}", self.vm.slots());
        let most = status.guest_limit.filter(|_| status.guests > 0);
        let is_crowded = most.is_some_and(|most| status.guests >= most);
        match status.lost {
            0 if self.vm.is_full() => {
                let remedy = format!(
                    "end some (`hvsock connections --pid {process}` shows them), or allow more, 1000 at most: --vm-connections, or `connections` of the VM in the file"
                );
                Check::warning(name, seen, &remedy)
            }
            0 if is_crowded => {
                let remedy = format!(
                    "see in `hvsock status --pid {process}` to which target the guest's connections lead, and whether it hangs"
                );
                Check::warning(name, seen, &remedy)
            }
            0 => Check::ok(name, seen),
            _ => Check::warning(name, seen, &format!("{REGAIN}; {REPLACE}")),
        }
    }
}

/// How the hvsocks that lead to a VM use its slots together, if they were asked.
pub(super) struct Usage {
    /// The slots that are in use or lost.
    used: usize,
    /// The most slots that one of them may use; `None` if none leads to the VM.
    limit: Option<usize>,
    shares: Vec<Share>,
    /// The name of the hvsock that was asked, if no other was.
    asked_alone: Option<String>,
}

/// The slots of a VM that an hvsock has.
struct Share {
    process: u32,
    taken: usize,
    lost: usize,
}

impl Share {
    /// Describes the slots: `hvsock 12 has 3 of them, and has lost 2`.
    fn in_words(&self) -> String {
        let Share {
            process,
            taken,
            lost,
        } = self;
        match (taken, lost) {
            (taken, 0) => format!("hvsock {process} has {taken} of them"),
            (0, lost) => format!("hvsock {process} has lost {lost} of them"),
            (taken, lost) => format!("hvsock {process} has {taken} of them, and has lost {lost}"),
        }
    }
}

impl Usage {
    pub(super) fn of(hvsocks: &Hvsocks, carriers: &[CarryingProcess]) -> Usage {
        let limits = carriers.iter().filter_map(|it| it.vm.status.limit);
        let limit = limits.max();
        let share = |it: &CarryingProcess| Share {
            process: it.process,
            taken: it.vm.status.connections + it.vm.status.probes,
            lost: it.vm.status.lost,
        };
        let shares: Vec<Share> = carriers.iter().map(share).collect();
        Usage {
            used: shares.iter().map(|it| it.taken + it.lost).sum(),
            limit,
            shares,
            asked_alone: hvsocks.named.as_ref().map(|it| it.name.clone()),
        }
    }

    /// Returns how many slots are used, and the limit, if almost all are used.
    pub(super) fn almost_all(&self) -> Option<(usize, usize)> {
        let limit = self.limit?;
        (self.used * 10 >= limit * 9).then_some((self.used, limit))
    }

    /// Describes the slots of each hvsock, if any leads to the VM: `hvsock 12 has 3 of them, hvsock
    /// 14 has lost 2 of them`.
    pub(super) fn shares(&self) -> Option<String> {
        self.limit?;
        let shares = self.shares.iter().map(Share::in_words);
        Some(shares.collect::<Vec<_>>().join(", "))
    }

    /// Returns the remedy for a VM without a free slot.
    pub(super) fn remedy(&self) -> String {
        let lost = self.shares.iter().map(|it| it.lost).sum::<usize>();
        let lost = counted(lost as u64, "slot");
        let users = self.shares.iter().filter(|it| it.taken > 0);
        let commands: Vec<String> = users
            .map(|it| format!("`hvsock connections --pid {}`", it.process))
            .collect();
        let has_lost = self.shares.iter().any(|it| it.lost > 0);
        if has_lost && commands.is_empty() {
            return format!("{lost} can't be had back from here: {REGAIN}");
        }
        let shown = match (&commands[..], &self.asked_alone) {
            ([], None) => "; no hvsock that can be asked has one".to_owned(),
            ([], Some(name)) => format!("; {name} was asked alone, and has none"),
            ([one], _) => format!(" ({one} shows them)"),
            (more, _) => format!(" ({} show them)", more.join(" and ")),
        };
        let lost = match has_lost {
            true => format!("to have back the {lost} that were lost, {REGAIN}"),
            false => {
                "slots that were lost come back when the guest ends them or the VM is restarted"
                    .to_owned()
            }
        };
        format!("end some of its connections{shown}; {lost}")
    }
}
