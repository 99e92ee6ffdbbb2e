//! Checks what a rule needs beside sockets: directories, files, programs, addresses of this host.
//!
//! The file, the command line and the control socket all use it. What is missing now may come
//! later, and is only a note; what can never work is a mistake.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};

use crate::address::{Address, UnixAddress};
#[cfg(unix)]
use crate::app::rule_options::RuleOptions;
use crate::app::slow::give_up_if_slow;
#[cfg(unix)]
use crate::hyperkit::{HyperkitVm, MAX_STATE_DIR};
use crate::proxy::Rule;
use crate::{file, sys};

/// How serious a finding is for the user who asks for a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Weight {
    /// The rule can't be carried out.
    Mistake,
    /// The rule can be carried out, but may not be what was meant.
    Note,
}

/// A problem with what a rule needs. Prints as `WHAT; REMEDY`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) weight: Weight,
    pub(crate) what: String,
    pub(crate) remedy: String,
}

impl Finding {
    fn mistake(what: String, remedy: impl Into<String>) -> Finding {
        Finding {
            weight: Weight::Mistake,
            what,
            remedy: remedy.into(),
        }
    }

    fn note(what: String, remedy: impl Into<String>) -> Finding {
        Finding {
            weight: Weight::Note,
            what,
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.remedy)
    }
}

/// The state of a directory that is needed.
enum Directory {
    /// It exists, or can't be looked at.
    IsThere,
    IsMissing {
        path: PathBuf,
        /// The nearest existing path above it.
        nearest: PathBuf,
    },
    /// This path, of the directory or above it, is no directory.
    CanNotBe(PathBuf),
}

impl Directory {
    fn look_at(path: &Path) -> Directory {
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => Directory::IsThere,
            Ok(_) => Directory::CanNotBe(path.to_owned()),
            Err(e) if is_missing(&e) => match nearest(path) {
                Some((nearest, true)) => Directory::IsMissing {
                    path: path.to_owned(),
                    nearest: nearest.to_owned(),
                },
                Some((nearest, false)) => Directory::CanNotBe(nearest.to_owned()),
                None => Directory::IsThere,
            },
            Err(_) => Directory::IsThere,
        }
    }

    /// Looks at the parent directory of a file.
    fn of(file: &Path) -> Directory {
        match file.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => Directory::look_at(parent),
            _ => Directory::IsThere,
        }
    }
}

fn is_missing(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
    kinds.contains(&error.kind())
}

/// Returns the nearest existing path above one, and whether it is a directory.
pub(crate) fn nearest(path: &Path) -> Option<(&Path, bool)> {
    let mut above = path.ancestors().skip(1);
    above.find_map(|it| Some((it, fs::metadata(it).ok()?.is_dir())))
}

/// Returns the nearest existing directory above a path.
#[cfg(unix)]
pub(crate) fn nearest_directory(path: &Path) -> Option<&Path> {
    nearest(path)
        .filter(|(_, is_directory)| *is_directory)
        .map(|(path, _)| path)
}

/// Returns the problem with a file's directory, if any. `whose` names what needs the file.
pub(crate) fn look_at_directory_of(whose: &str, file: &Path) -> Option<Finding> {
    match Directory::of(file) {
        Directory::IsThere => None,
        Directory::IsMissing { path, nearest } => {
            let (path, nearest) = (path.display(), nearest.display());
            let what = format!("{whose}: there is no directory {path} yet (there is {nearest})");
            Some(Finding::note(what, "make it, or is the path right?"))
        }
        Directory::CanNotBe(path) => {
            let what = format!("{whose}: {} is no directory", path.display());
            Some(Finding::mistake(what, "choose another path"))
        }
    }
}

/// The IP addresses of listeners, each with whether this host has it.
#[derive(Default)]
pub(crate) struct HostAddresses(HashMap<IpAddr, bool>);

impl HostAddresses {
    fn contain(&mut self, ip: IpAddr) -> bool {
        *self.0.entry(ip).or_insert_with(|| is_of_this_host(ip))
    }
}

/// Returns whether an address can be listened on here, as far as that is known.
fn is_of_this_host(ip: IpAddr) -> bool {
    match TcpListener::bind((ip, 0)) {
        Err(e) => e.kind() != io::ErrorKind::AddrNotAvailable,
        Ok(_) => true,
    }
}

/// Returns the problem with the address of a listener, if any.
pub(crate) fn look_at_listen(listen: &Address, known: &mut HostAddresses) -> Option<Finding> {
    let whose = listen.to_string();
    match listen {
        Address::Unix(UnixAddress::Path(path)) => {
            let missing = look_at_directory_of(&whose, path);
            if missing.is_some() {
                return missing;
            }
            let found = fs::symlink_metadata(path).ok()?;
            let kind = match (found.is_file(), found.is_dir()) {
                (true, _) => "file",
                (_, true) => "directory",
                _ => return None,
            };
            let what = format!("{whose}: a {kind} is there");
            let remedy = "remove it, or choose another path for the socket";
            Some(Finding::mistake(what, remedy))
        }
        Address::VsockMux(mux) => look_at_directory_of(&whose, &mux.path),
        Address::Tcp(tcp) => {
            let ip = tcp.socket_addr()?.ip();
            let remedy = "choose another, or it can't be listened on until it is";
            let what = format!("{ip} is no address of this host now");
            (!known.contain(ip)).then(|| Finding::note(what, remedy))
        }
        _ => None,
    }
}

/// The consequence of a target that this user may not use.
const UNLESS_ITS_USER_MAY: &str = "its clients are refused unless the user who runs this may";

/// Returns the problem with the file, program or socket path of a target, if any.
pub(crate) fn look_at_target(target: &Address) -> Option<Finding> {
    let whose = target.to_string();
    let path = path_of(target)?;
    let missing = look_at_directory_of(&whose, path);
    if missing.is_some() {
        return missing;
    }
    let found = match fs::metadata(path) {
        Ok(found) => found,
        // The server makes its socket when it starts.
        Err(e) if is_missing(&e) && matches!(target, Address::Unix(_)) => return None,
        Err(e) if is_missing(&e) => {
            let what = format!("{whose}: it is not there");
            return Some(Finding::note(what, "its clients are refused until it is"));
        }
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            let what = format!("{whose}: this user may not look at it ({e})");
            return Some(Finding::note(what, "run as a user who may"));
        }
        Err(_) => return None,
    };
    let kind = file::describe_kind(found.file_type());
    let shown = path.display();
    match target {
        Address::Exec(_) if found.is_dir() => {
            let what = format!("{whose}: it is a directory");
            Some(Finding::mistake(what, "name a program in it"))
        }
        Address::Exec(_) if !found.is_file() => {
            let what = format!("{whose}: it is {kind}, and no program");
            Some(Finding::mistake(what, "is the path right?"))
        }
        Address::Exec(_) if !sys::is_program(&found) => {
            let what = format!("{whose}: it is not executable");
            let remedy = format!("make it a program: chmod +x {shown}");
            Some(Finding::mistake(what, remedy))
        }
        Address::Exec(_) if !sys::may_start(path) => {
            let what = format!("{whose}: this user may not start it");
            Some(Finding::note(what, UNLESS_ITS_USER_MAY))
        }
        Address::File(_) if found.is_dir() => {
            let what = format!("{whose}: it is a directory");
            Some(Finding::mistake(what, "name a file in it"))
        }
        Address::File(_) if !found.is_file() => {
            let what = format!("{whose}: it is {kind}, not a regular file");
            Some(Finding::mistake(what, "is the path right?"))
        }
        Address::File(_) if !sys::may_read(path) => {
            let what = format!("{whose}: this user may not read it");
            Some(Finding::note(what, UNLESS_ITS_USER_MAY))
        }
        Address::Unix(_) if found.is_dir() => {
            let what = format!("{whose}: it is a directory");
            Some(Finding::mistake(what, "name a socket in it"))
        }
        Address::Unix(_) if !sys::may_be_socket(&found) => {
            let what = format!("{whose}: it is {kind}, and no socket");
            let remedy = "is the path right? The content of a file is sent by file:/PATH";
            Some(Finding::mistake(what, remedy))
        }
        _ => None,
    }
}

/// Returns a note if a VM's state directory is so deep that hyperkit truncates the paths of its own
/// sockets.
#[cfg(unix)]
pub(crate) fn look_at_state_dir(vm: &HyperkitVm) -> Option<Finding> {
    let length = vm.state_dir.as_os_str().len();
    let limit = MAX_STATE_DIR.saturating_sub(vm.prefix.len());
    let shown = vm.state_dir.display();
    let what = format!("{shown}: {length} bytes, where hyperkit takes {limit}");
    let remedy = "let hyperkit be started by a shorter path to it";
    (length > limit).then(|| Finding::note(what, remedy))
}

/// Returns the path in a target's address, if it has one.
fn path_of(target: &Address) -> Option<&Path> {
    match target {
        Address::Unix(UnixAddress::Path(path)) => Some(path),
        Address::File(file) => Some(&file.path),
        Address::Exec(exec) => Some(&exec.program),
        _ => None,
    }
}

/// Looks at the targets of rules. Gives up if a disk hangs. Returns the problems, in the order of
/// the rules.
///
/// # Errors
/// Returns why the targets were not looked at.
pub(crate) fn look_at_targets(rules: &[Rule]) -> Result<Vec<Finding>, String> {
    let targets = rules.iter().map(|it| &it.connect);
    let targets = targets.filter(|it| path_of(it).is_some());
    let targets: Vec<Address> = targets.cloned().collect();
    if targets.is_empty() {
        return Ok(Vec::new());
    }
    give_up_if_slow(move || targets.iter().filter_map(look_at_target).collect())
}

/// The keys of options that apply only to the file of a Unix socket.
pub(crate) const ACCESS_KEYS: [&str; 3] = ["mode", "owner", "group"];

/// Returns a note if a rule has other permissions than `usual`, but its listener has no file.
#[cfg(unix)]
pub(crate) fn look_at_access(rule: &Rule, usual: &RuleOptions) -> Option<Finding> {
    let listen = &rule.listen;
    let usual = usual.applied_to(Rule::new(listen.clone(), rule.connect.clone()));
    let given = [
        ("mode", rule.mode != usual.mode),
        ("owner", rule.owner != usual.owner),
        ("group", rule.group != usual.group),
    ];
    let given = given.iter().filter(|(_, is_given)| *is_given);
    let given: Vec<&str> = given.map(|(key, _)| *key).collect();
    look_at_given_access(listen, &given)
}

/// Returns a mistake if permissions, given by their keys, are for a listener without a file.
pub(crate) fn look_at_given_access(listen: &Address, given: &[&str]) -> Option<Finding> {
    if given.is_empty() || listen.listen_path().is_some() {
        return None;
    }
    let remedy = match listen {
        Address::Tcp(_) | Address::Vsock(_) => "leave it out; `from` says which clients may come",
        Address::Npipe(_) => "leave it out; ?sddl=… of its address says who may connect",
        _ => "leave it out",
    };
    let (keys, are) = (
        given.join(" and "),
        if given.len() == 1 { "is" } else { "are" },
    );
    let what = format!("{listen}: {keys} {are} for the file of a Unix socket, and it has none");
    Some(Finding::mistake(what, remedy))
}
