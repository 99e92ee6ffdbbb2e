//! Makes rules from the arguments of a command line.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Mutex;

use super::arguments::Addresses;
use super::console::complain;
use super::options::no_vm;
use super::outcome::{Failure, Outcome};
use super::spec::{LocalForward, Locals, Remote, Remotes};
use crate::address::overlap::ListenKey;
use crate::address::{Address, HyperkitVm};
use crate::app::needs::look_at_given_access;
#[cfg(unix)]
use crate::app::needs::look_at_state_dir;
use crate::app::ranges::pair;
use crate::app::vm::VmPlace;
use crate::error::{Error, Operation};
use crate::hyperkit::{Places, uri_of_vmm};
use crate::lock::lock;
use crate::proxy::{Candidate, Rule, RuleIndex, check_rule, describe_loop};

/// Returns the rules of each `-L` and `-R`: several for a range.
pub(super) fn rules_of_vm(
    name: &str,
    local: &[Locals],
    remote: &[Remotes],
) -> Result<Vec<Vec<Rule>>, Failure> {
    let vm = VmPlace::find(name, &Places::from_env()).map_err(|e| no_vm(name, &e))?;
    if let VmPlace::Hyperkit(vm) = &vm {
        look_at(vm)?;
    }
    Ok(rules(&vm, local, remote))
}

/// Returns the rules of a VM once its directory is there.
pub(super) type Later = Box<dyn Fn() -> Option<Vec<Rule>> + Send + Sync>;

/// Returns the rules of `-L` and `-R` for a VM that may come later, and a function that finds them
/// once it is there. Until then they are those of a VM without settings of its own. Only a VM named
/// by its directory may come later; an unknown name is an error.
pub(super) fn rules_of_vm_to_come(
    name: &str,
    local: &[Locals],
    remote: &[Remotes],
) -> Result<(Vec<Rule>, Option<Later>), Failure> {
    let places = Places::from_env();
    let Some(vm) = find_missing(name, &places) else {
        return Ok((rules_of_vm(name, local, remote)?.concat(), None));
    };
    let directory = &vm.state_dir;
    #[cfg(unix)]
    let nearest = crate::app::needs::nearest_directory(directory);
    #[cfg(not(unix))]
    let nearest: Option<&std::path::Path> = None;
    let nearest = nearest.map(|it| format!(" (there is {})", it.display()));
    let remedy = match is_named_as_socket(directory) {
        true => format!(
            "the state directory of a hyperkit VM is waited for; the socket of another VMM is written {}",
            uri_of_vmm(directory)
        ),
        false => "is the path right?".to_owned(),
    };
    // Such a VM can't be started at that path, so waiting for it is useless.
    #[cfg(unix)]
    if let Some(finding) = look_at_state_dir(&vm) {
        complain(finding);
    }
    complain(format_args!(
        "there is no VM directory {} yet{}: clients are refused until the VM has made it; {remedy}",
        directory.display(),
        nearest.unwrap_or_default()
    ));
    let rules_now = rules(&VmPlace::Hyperkit(vm), local, remote).concat();
    let (name, local, remote) = (name.to_owned(), local.to_vec(), remote.to_vec());
    let told = Mutex::new(None);
    let later = move || match VmPlace::find(&name, &places) {
        Ok(VmPlace::Hyperkit(vm)) if !vm.state_dir.is_dir() => None,
        Ok(vm) => Some(rules(&vm, &local, &remote).concat()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        // Something that is no VM may be at that path for long.
        Err(e) => {
            complain_once(&told, &e);
            None
        }
    };
    Ok((rules_now, Some(Box::new(later))))
}

/// Prints why a VM can't be found, unless that was the last message.
fn complain_once(told: &Mutex<Option<String>>, error: &Error) {
    let text = error.to_string();
    let mut told = lock(told);
    if told.as_ref() != Some(&text) {
        complain(format_args!("{text}; it is looked for again every 2 s"));
        *told = Some(text);
    }
}

/// Returns whether a path has a name that is usual for sockets.
fn is_named_as_socket(path: &Path) -> bool {
    let extension = path.extension().and_then(|it| it.to_str());
    extension.is_some_and(|it| ["sock", "socket", "vsock"].contains(&it))
}

/// Returns the hyperkit VM of a directory, if that directory doesn't exist.
fn find_missing(name: &str, places: &Places) -> Option<HyperkitVm> {
    if cfg!(windows) {
        return None;
    }
    let is_missing = |path: &Path| {
        let found = path.symlink_metadata();
        found.is_err_and(|e| e.kind() == io::ErrorKind::NotFound)
    };
    let vm = match VmPlace::find(name, places) {
        Ok(VmPlace::Hyperkit(vm)) => vm,
        Err(e) if e.kind() == io::ErrorKind::NotFound && name.contains('/') => {
            let path = places.current_dir.join(name);
            HyperkitVm::new(std::path::absolute(&path).unwrap_or(path))
        }
        _ => return None,
    };
    is_missing(&vm.state_dir).then_some(vm)
}

fn rules(vm: &VmPlace, local: &[Locals], remote: &[Remotes]) -> Vec<Vec<Rule>> {
    let local_rule = |it: &LocalForward| {
        let LocalForward { listen, guest_port } = it;
        Rule::new(listen.clone(), vm.guest_port(*guest_port)).absolute()
    };
    let remote_rule = |it: &Remote| {
        let Remote { host_port, target } = it;
        let mut rule = Rule::new(vm.host_port(*host_port), target.clone());
        rule.from = vm.sources();
        rule.absolute()
    };
    let local = local.iter().map(|it| it.0.iter().map(local_rule).collect());
    let remote = remote.iter();
    let remote = remote.map(|it| it.0.iter().map(remote_rule).collect());
    local.chain(remote).collect()
}

/// Reports at once what each client would find out: that there is no directory, that it can't be
/// used, or that no VM runs.
fn look_at(vm: &HyperkitVm) -> crate::Result<()> {
    let directory = vm.state_dir.display();
    match vm.connect_path().symlink_metadata() {
        Ok(found) => {
            if found.is_file() || found.is_dir() {
                complain(format_args!(
                    "{:?} in {directory} is no socket; clients are refused until a VM has put its own there",
                    vm.connect
                ));
            }
            Ok(())
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound && vm.state_dir.is_dir() => {
            complain(format_args!(
                "the VM is not running (no socket {:?} in {directory}); clients are refused until it is",
                vm.connect
            ));
            Ok(())
        }
        Err(e) => {
            let remedy = match e.kind() {
                io::ErrorKind::NotFound => "there is no such state directory: is the path right?",
                io::ErrorKind::PermissionDenied => "run as the user who runs the VM",
                _ => "is it a VM's state directory?",
            };
            Err(
                Error::new(Operation::Find, format_args!("a VM in {directory}"), e)
                    .with_remedy(remedy),
            )
        }
    }
}

/// Refuses rules that conflict: an address that is given twice, or the same port in another
/// spelling.
pub(super) fn refuse_collisions(rules: &[Rule]) -> Outcome {
    let mut taken: HashMap<ListenKey<'_>, &Address> = HashMap::new();
    for Rule { listen, .. } in rules {
        let near = listen.colliding_keys().into_iter();
        let mut others = near.filter_map(|key| taken.get(&key));
        let is_in_the_way = |other: &&&Address| match **other == listen {
            true => !listen.leaves_port_to_kernel(),
            false => other.collides(listen),
        };
        if let Some(other) = others.find(is_in_the_way) {
            if *other == listen {
                let why = format!("cannot listen on {listen}: it is given twice");
                return Err(Failure::Usage(why));
            }
            return Err(Failure::Usage(format!(
                "cannot listen on {listen}: {other} is given, too, and is in its way; choose another address or port for one of them"
            )));
        }
        let keys = listen.listen_keys().into_iter();
        taken.extend(keys.map(|key| (key, listen)));
    }
    Ok(())
}

/// Refuses a rule that can never work.
pub(super) fn refuse_unworkable(rule: &Rule) -> Outcome {
    check_rule(rule).map_err(|e| match e.cause().raw_os_error() {
        // This system lacks something, so the usage is right.
        Some(_) => Failure::from(e),
        None => Failure::Usage(e.to_string()),
    })
}

/// Refuses rules that can never work, and those that lead back to themselves.
pub(super) fn refuse_what_can_not_work(rules: &[Rule]) -> Outcome {
    for rule in rules {
        refuse_unworkable(rule)?;
    }
    let mut index = RuleIndex::default();
    for (id, rule) in (0..).zip(rules) {
        index.insert(id, rule);
    }
    for (id, rule) in (0..).zip(rules) {
        if let Some(trail) = index.find_loop(Candidate::InPlaceOf(id), rule) {
            let cause = io::Error::new(io::ErrorKind::InvalidInput, describe_loop(&trail));
            let error = Error::new(Operation::Connect, &rule.connect, cause);
            let error = error.with_remedy("connect to another address");
            return Err(Failure::Usage(error.to_string()));
        }
    }
    Ok(())
}

/// Refuses permissions, given by their keys, if none of the rules makes a socket file. Options
/// given for several rules may be meant for one.
pub(super) fn refuse_useless_access<'a>(
    rules: impl IntoIterator<Item = &'a Rule>,
    given: &[&str],
) -> Outcome {
    let looks = rules.into_iter();
    let mut looks = looks.map(|rule| look_at_given_access(&rule.listen, given));
    match looks.next() {
        Some(Some(first)) if looks.all(|it| it.is_some()) => Err(Failure::Usage(first.to_string())),
        _ => Ok(()),
    }
}

/// Returns the rules of pairs of addresses, to listen on and to connect to: several rules for a
/// pair of ranges.
pub(super) fn rules_of(addresses: &[Addresses]) -> Result<Vec<Vec<Rule>>, Failure> {
    let (pairs, rest) = addresses.as_chunks::<2>();
    if let [alone] = rest {
        return Err(Failure::Usage(format!(
            "{alone} has no address to connect to: addresses come in pairs"
        )));
    }
    let rule = |(listen, connect)| Rule::new(listen, connect).absolute();
    let rules = pairs.iter().map(|[listen, connect]| {
        let pairs = pair(listen.0.clone(), connect.0.clone());
        let pairs = pairs.map_err(|why| Failure::Usage(format!("{listen} {connect}: {why}")))?;
        Ok(pairs.into_iter().map(rule).collect())
    });
    rules.collect()
}
