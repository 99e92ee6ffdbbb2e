//! Checks a hyperkit VM: its state directory, its process, its guest.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use socket2::SockRef;

use super::carriers::{CarryingProcess, Hvsocks, Usage, VmFinding};
use super::check::{Check, DoctorPlan, UNANSWERED, Verdict};
use super::{socket, target};
use crate::address::{HyperkitAddress, Port, is_guest_cid};
use crate::error::{Result, counted};
use crate::file;
use crate::hyperkit::{
    self, HOST_CID, HyperkitVm, MAX_STATE_DIR, NO_DIRECTORY, PID_NAME, Places, find, socket_name,
};
use crate::keeper::status::{self as keepers, KeeperStatus};
use crate::stream::Stream;
use crate::sys::{self, SUN_PATH_LEN, Wanted};

/// The descriptors that hyperkit uses besides connections: started with a limit of 256, it took
/// 245.
const OWN_DESCRIPTORS: u64 = 11;

/// The most connections of hyperkit (`select`'s FD_SETSIZE, less its own descriptors).
const MOST_CONNECTIONS: u64 = 1013;

/// How long a guest may take to end a connection that is being closed.
const LEAVE: Duration = Duration::from_secs(1);

const START: &str = "start the VM";

/// Why the guest isn't dialled if the device has no free slot.
const ALL_TAKEN: &str = "all slots of the VM are taken";

/// Why a guest that hasn't answered isn't dialled again.
const UNANSWERING: &str = "the guest doesn't answer";

pub(super) fn examine(name: &str, plan: &DoctorPlan) -> Vec<Check> {
    let (directory, vm) = check_directory(name);
    let mut checks = vec![directory];
    let ports = plan.ports.iter().map(|port| (port, named_port(*port)));
    let host_ports = plan.host_ports.iter();
    let host_ports = host_ports.map(|port| (port, named_host_port(*port)));
    let vm = match vm {
        Ok(vm) => vm,
        Err(why) => {
            let names = ["path", "cid", "process", "limits", "socket", "guest"].map(str::to_owned);
            let ports = ports.chain(host_ports).map(|(_, name)| name);
            let left = names.into_iter().chain(ports);
            checks.extend(left.map(|name| Check::skipped(name, why)));
            return checks;
        }
    };
    checks.push(check_path(&vm));
    checks.push(check_cid(&vm));
    let process = check_process(&vm);
    checks.push(process.check);
    checks.push(match process.pid {
        Some(pid) => check_limits(pid),
        None if process.gone => Check::skipped("limits", "hyperkit's process is gone"),
        None => Check::skipped("limits", "hyperkit's process isn't known"),
    });
    let connect = socket::examine("socket", &vm.connect_path(), START);
    let hvsocks = Hvsocks::ask(&plan.asked);
    let carriers = hvsocks.carriers(|directory| is_same(Path::new(directory), &vm.state_dir));
    let usage = Usage::of(&hvsocks, &carriers);
    let not_dialled = |why| GuestReport {
        check: Check::skipped("guest", why),
        undialled: Some(why),
    };
    let guest = match connect.is_ok() {
        // It would take the dial after this process has ended.
        true if process.stopped => not_dialled("hyperkit is stopped"),
        true => check_guest(&vm, plan.patience, &usage),
        false => not_dialled("there is no socket to dial it by"),
    };
    checks.extend([connect, guest.check]);
    checks.extend(ports.map(|(port, name)| match guest.undialled {
        None => check_guest_port(&vm, *port, plan.patience, &usage),
        Some(why) => Check::skipped(name, why),
    }));
    checks.extend(host_ports.map(|(port, name)| {
        let remedy = format!("run `hvsock expose -R {}:TARGET`; a guest that dials a port on which nobody listens can hang hyperkit's device", port.0);
        let socket = socket::examine(name.clone(), &vm.listen_path(*port), &remedy);
        match socket.is_ok() {
            true => target::examine(&name, &vm, *port, &hvsocks).unwrap_or(socket),
            false => socket,
        }
    }));
    checks.extend(check_left_over(&vm, &plan.host_ports));
    let now = SystemTime::now();
    let found = match guest.undialled {
        _ if process.stopped => VmFinding::Stopped,
        Some(UNANSWERING) => VmFinding::Unanswered,
        _ => VmFinding::Nothing,
    };
    checks.extend(carriers.iter().map(|it| it.check_health(found, now)));
    let slots = carriers.iter().map(CarryingProcess::check_slots);
    checks.extend(slots.map(|check| match guest.undialled {
        // Other processes have the remaining slots.
        Some(ALL_TAKEN) if check.verdict == Verdict::Ok => Check::warning(
            check.name,
            format_args!("{}; {ALL_TAKEN}", check.seen),
            &usage.remedy(),
        ),
        // The device has no more slots, however many this hvsock may use.
        Some(ALL_TAKEN) => check.with_remedy(usage.remedy()),
        _ => check,
    }));
    checks.extend(hvsocks.check_unknown(&carriers, Some(&vm.state_dir)));
    checks.extend(check_keepers(&vm, &hvsocks));
    checks
}

/// Returns whether two paths lead to one directory.
fn is_same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    real(one) == real(other)
}

/// Checks whether the hvsock of each keeper of the VM still runs. If one hvsock was named,
/// keepers of other running ones are left out.
fn check_keepers(vm: &HyperkitVm, hvsocks: &Hvsocks) -> impl Iterator<Item = Check> {
    let name = "keeper";
    let check = move |it: KeeperStatus| {
        let (pid, proxy) = (it.pid, it.proxy);
        let ports = it.ports.iter().map(|port| Port(port.port).to_string());
        let ports: Vec<String> = ports.collect();
        let ports = match ports.is_empty() {
            true => "no port".to_owned(),
            false => format!("port {}", ports.join(", ")),
        };
        let connections = counted(it.connections as u64, "connection");
        match it.proxy_ended {
            false => Check::ok(
                name,
                format_args!(
                    "process {pid} of hvsock {proxy} has copies of {connections} and of {ports}"
                ),
            ),
            true => Check::warning(
                name,
                format_args!(
                    "hvsock {proxy} has ended, and process {pid} ends {connections}, and what the guest dials on {ports}"
                ),
                "start hvsock again, which takes that over; `hvsock stop VM --keeper` ends it, and the VM may hang if its guest goes on dialling",
            ),
        }
    };
    let all = keepers::query(&vm.state_dir).into_iter();
    let meant = all.filter(|it| it.proxy_ended || hvsocks.was_meant(it.proxy));
    meant.map(check)
}

fn named_port(port: Port) -> String {
    format!("port {port}")
}

fn named_host_port(port: Port) -> String {
    format!("host port {port}")
}

/// Checks whether there is a readable state directory. If not, returns why the rest can't be
/// checked.
fn check_directory(name: &str) -> (Check, std::result::Result<HyperkitVm, &'static str>) {
    const MISSING: &str = "there is no state directory";
    const UNREADABLE: &str = "the state directory can't be read";
    let check = "directory";
    let vm = match find(name, &Places::from_env()) {
        Ok(vm) => vm,
        Err(e) => {
            let why = match e.kind() {
                io::ErrorKind::InvalidData | io::ErrorKind::PermissionDenied => UNREADABLE,
                _ => MISSING,
            };
            return (Check::error(check, &e), Err(why));
        }
    };
    let dir = &vm.state_dir;
    let failed = |seen: &dyn fmt::Display, remedy, why| {
        let seen = format!("{}: {seen}", dir.display());
        (Check::failed(check, seen, remedy), Err(why))
    };
    match fs::metadata(dir) {
        Ok(metadata) if !metadata.is_dir() => {
            return failed(&"it is no directory", NO_DIRECTORY, MISSING);
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let remedy = "is the path right? Or start the VM, which makes it";
            return failed(&e, remedy, MISSING);
        }
        Err(e) => return failed(&e, "run as the user who runs the VM", UNREADABLE),
    }
    // Files in it can be reached only with search permission.
    match fs::symlink_metadata(vm.connect_path()) {
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            let seen = "this user may not search it";
            return failed(&seen, "run as the user who runs the VM", UNREADABLE);
        }
        _ => {}
    }
    (Check::ok(check, dir.display()), Ok(vm))
}

/// Checks whether the paths of the sockets fit into socket addresses.
fn check_path(vm: &HyperkitVm) -> Check {
    let name = "path";
    let connect = vm.connect_path();
    let len = connect.as_os_str().len();
    let most = SUN_PATH_LEN - 1;
    let reached = sys::with_short_path(&connect, |short| match fs::symlink_metadata(short) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    });
    if let Err(e) = reached {
        return Check::failed(name, format_args!("{len} bytes: {e}"), "use a shorter path");
    }
    let length = vm.state_dir.as_os_str().len();
    let limit = MAX_STATE_DIR.saturating_sub(vm.prefix.len());
    if length > limit {
        let detour = match len > most {
            true => "; this system reaches its sockets by a detour",
            false => "",
        };
        return Check::warning(
            name,
            format_args!("{length} bytes, where hyperkit takes {limit}{detour}"),
            "let hyperkit be started by a shorter path to it",
        );
    }
    Check::ok(name, format_args!("{length} bytes, of {limit} at most"))
}

/// Checks whether the guest's CID is the dialled one: a dial to another CID is refused like one to
/// an unused port.
fn check_cid(vm: &HyperkitVm) -> Check {
    let name = "cid";
    let configured = hyperkit::configured_cid(&vm.state_dir);
    let asked = vm.cid;
    if let Some(cid) = configured {
        let is_guests = u32::try_from(cid).is_ok_and(is_guest_cid);
        let seen = match is_guests {
            true => format!("hyperkit.json says {cid}, and {asked} is asked for"),
            false => format!("hyperkit.json says {cid}, which is no guest's; {asked} is asked for"),
        };
        if cid != u64::from(asked) {
            return Check::failed(
                name,
                seen,
                "name the VM by its directory, or by hyperkit://CID/DIR",
            );
        }
    }
    let others = list_sockets(vm).filter(|(cid, _)| ![asked, HOST_CID].contains(cid));
    if let Some((other, port)) = others.min() {
        return Check::failed(
            name,
            format_args!(
                "the directory has {}{}, of CID {other}, and {asked} is asked for",
                vm.prefix,
                socket_name(other, port)
            ),
            "name the VM by hyperkit://CID/DIR; or is that file left over from an earlier VM?",
        );
    }
    let source = match configured {
        Some(_) => "as hyperkit.json says",
        None => "nothing says otherwise",
    };
    Check::ok(name, format_args!("{asked}, {source}"))
}

/// Returns the CIDs and ports of the sockets in the directory.
fn list_sockets(vm: &HyperkitVm) -> impl Iterator<Item = (u32, u32)> {
    let entries = fs::read_dir(&vm.state_dir).into_iter().flatten().flatten();
    let prefix = vm.prefix.clone();
    entries.filter_map(move |entry| {
        let name = entry.file_name();
        let name = name.as_bytes().strip_prefix(prefix.as_bytes())?;
        let line: [u8; hyperkit::LINE_LEN] = [name, b"\n"].concat().try_into().ok()?;
        let (cid, port) = hyperkit::parse_connect_line(&line)?;
        let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
        (is_socket && name == socket_name(cid, port).as_bytes()).then_some((cid, port))
    })
}

/// What is known of hyperkit's process.
struct HyperkitProcess {
    check: Check,
    /// The process id, if it runs.
    pid: Option<i32>,
    /// Whether it is stopped, and will go on once it is continued.
    stopped: bool,
    /// Whether the process of the pid file has ended.
    gone: bool,
}

impl From<Check> for HyperkitProcess {
    fn from(check: Check) -> HyperkitProcess {
        HyperkitProcess {
            check,
            pid: None,
            stopped: false,
            gone: false,
        }
    }
}

/// Checks whether the process in hyperkit.pid runs.
fn check_process(vm: &HyperkitVm) -> HyperkitProcess {
    let name = "process";
    let remedy = "what is in the directory may be left over: start the VM";
    let text = match file::read_text(&vm.pid_path(), file::STATE_FILE) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let why = format!("there is no {PID_NAME} beside its sockets");
            return Check::skipped(name, why).into();
        }
        Err(e) => {
            let remedy = match e.kind() {
                io::ErrorKind::PermissionDenied => "run as the user who runs the VM",
                _ => "move it away: hyperkit writes its process id there",
            };
            return Check::warning(name, format_args!("{PID_NAME}: {e}"), remedy).into();
        }
    };
    let Some(pid) = text.trim().parse().ok().filter(|pid| *pid > 0) else {
        let seen = format!("{PID_NAME} holds {text:?}, no process");
        return Check::warning(name, seen, remedy).into();
    };
    let (state, program) = run_ps(pid).unwrap_or_default();
    if !sys::process_is_alive(pid) || state.starts_with('Z') {
        let seen = format!("{pid}, of {PID_NAME}, is gone");
        return HyperkitProcess {
            gone: true,
            ..Check::failed(name, seen, remedy).into()
        };
    }
    let known = |known| program.contains(known);
    if !program.is_empty() && !["hyperkit", "hvsock"].into_iter().any(known) {
        let seen = format!("{pid}, of {PID_NAME}, is {program:?}, not hyperkit");
        return Check::warning(name, seen, remedy).into();
    }
    let stopped = state.starts_with('T');
    let check = match stopped {
        true => Check::stopped_process(pid),
        false => Check::ok(name, format_args!("{pid} runs")),
    };
    HyperkitProcess {
        check,
        pid: Some(pid),
        stopped,
        gone: false,
    }
}

/// Returns the state of a process and the name of its program, if `ps` is available.
fn run_ps(pid: i32) -> Option<(String, String)> {
    let mut ps = Command::new("ps");
    ps.args(["-o", "state=", "-o", "comm=", "-p", &pid.to_string()]);
    let text = String::from_utf8(ps.output().ok()?.stdout).ok()?;
    let (state, program) = text.trim().split_once(char::is_whitespace)?;
    let program = Path::new(program.trim()).file_name()?.to_str()?;
    Some((state.to_owned(), program.to_owned()))
}

/// Checks whether hyperkit's limit allows descriptors for the most connections that it can have.
fn check_limits(pid: i32) -> Check {
    let name = "limits";
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_whitespace().next());
    let remedy = "start hyperkit after `ulimit -n 2048`, or give --vm-connections 200";
    let few = |limit: u64| limit < MOST_CONNECTIONS + OWN_DESCRIPTORS;
    match soft.map(str::parse) {
        Some(Ok(limit)) if few(limit) => {
            let most = counted(limit.saturating_sub(OWN_DESCRIPTORS), "connection");
            let seen = format!("hyperkit may have {limit} descriptors: it hangs beyond {most}");
            Check::warning(name, seen, remedy)
        }
        Some(_) => Check::ok(name, "hyperkit has descriptors for all its connections"),
        None => Check::skipped(
            name,
            "this system doesn't tell; started with 256 descriptors, macOS' default, hyperkit hangs beyond 245 connections",
        )
        .with_remedy("if it was, give --vm-connections 200"),
    }
}

/// The answer to a dial that a running guest refuses at once.
enum Answer {
    After(Duration),
    /// hyperkit has taken the dial, but the guest hasn't answered.
    None,
    /// hyperkit hasn't taken the dial.
    NotTaken,
    /// hyperkit has closed it unread, as it does without a free slot. On macOS this looks like a
    /// refusal by the guest.
    EndedUnread,
}

/// Dials a port on which no program can listen.
fn probe(vm: &HyperkitVm, patience: Duration) -> Result<Answer> {
    let begun = Instant::now();
    let probe = vm.probe_address().into();
    let stream = match Stream::connect_timeout(&probe, patience) {
        // It ended before the line with the port was written.
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused && !is_absent(&e) => {
            return Ok(Answer::EndedUnread);
        }
        stream => stream?,
    };
    // If the wait fails the connection is over, too.
    let answer = match stream.wait(Wanted::Readable, patience) {
        Ok(false) if stream.untaken() > 0 => Answer::NotTaken,
        Ok(false) => Answer::None,
        _ if was_ended_unread(&stream) => Answer::EndedUnread,
        _ => Answer::After(begun.elapsed()),
    };
    // The outcome doesn't matter.
    let _ = close_gracefully(&stream, LEAVE);
    Ok(answer)
}

/// Returns whether the system reported that nothing listens.
fn is_absent(error: &crate::error::Error) -> bool {
    error.cause().raw_os_error().is_some()
}

/// Returns whether the peer closed with bytes of ours unread.
fn was_ended_unread(stream: &Stream) -> bool {
    let error = SockRef::from(stream).take_error().ok().flatten();
    error.is_some_and(|e| e.kind() == io::ErrorKind::ConnectionReset)
}

/// Closes a dial, which must not be dropped: if hyperkit hasn't taken it yet (for lack of
/// descriptors, say), it would later find it closed, and hang. The close may take ten seconds then.
fn close_gracefully(stream: &Stream, time: Duration) -> io::Result<()> {
    const UNTAKEN: Duration = Duration::from_secs(10);
    let time = match stream.untaken() {
        0 => time,
        _ => time.max(UNTAKEN),
    };
    stream.finish(time)
}

fn dial(vm: &HyperkitVm, port: Port, patience: Duration) -> Result<Stream> {
    let vm = vm.clone();
    Stream::connect_timeout(&HyperkitAddress { vm, port }.into(), patience)
}

/// What is known of a guest.
struct GuestReport {
    check: Check,
    /// Why its ports can't be dialled, if they can't.
    undialled: Option<&'static str>,
}

/// Checks whether the guest answers. `usage` is the known use of its slots.
fn check_guest(vm: &HyperkitVm, patience: Duration, usage: &Usage) -> GuestReport {
    let answer = probe(vm, patience);
    GuestReport {
        undialled: match &answer {
            Ok(Answer::After(_)) => None,
            Ok(Answer::EndedUnread) => Some(ALL_TAKEN),
            Ok(Answer::None) => Some(UNANSWERING),
            Ok(Answer::NotTaken) => Some("hyperkit takes no connection"),
            Err(_) => Some("the guest can't be dialled"),
        },
        check: describe_answer(answer, patience, usage),
    }
}

/// Makes the check of a dial's answer.
fn describe_answer(answer: Result<Answer>, patience: Duration, usage: &Usage) -> Check {
    let name = "guest";
    let seconds = patience.as_secs_f64();
    match answer {
        Ok(Answer::EndedUnread) => {
            let ours = usage.shares().map(|shares| format!("; {shares}"));
            let ours = ours.unwrap_or_default();
            let seen = format!("hyperkit ended the dial unread: all its slots are taken{ours}");
            Check::failed(name, seen, &usage.remedy())
        }
        Ok(Answer::After(took)) => match usage.almost_all() {
            // Both the guest and a device without a free slot may refuse so.
            Some((used, limit)) => {
                let seen = format!(
                    "a dial is ended at once, by the guest or for want of a slot: {used} of {limit} are taken"
                );
                Check::warning(name, seen, &usage.remedy())
            }
            None => {
                let took = took.as_secs_f64() * 1e3;
                Check::ok(name, format_args!("answers, after {took:.1} ms"))
            }
        },
        Ok(Answer::None) => Check::unanswered(name, patience).with_remedy(format!(
            "{UNANSWERED}. Each dial that a guest hasn't answered takes one of hyperkit's 1,024 slots"
        )),
        Ok(Answer::NotTaken) => Check::failed(
            name,
            format_args!(
                "hyperkit has taken no connection for {seconds} s: it hangs, is stopped, or has no descriptor left for one"
            ),
            "if connections work that are there already, end some; if not, restart the VM",
        ),
        Err(e) => Check::error(name, &e),
    }
}

/// Checks whether a program in the guest listens on a port.
///
/// A guest answers dials in their order. So a second dial, to a port that no program can have, is
/// refused after the first was answered.
fn check_guest_port(vm: &HyperkitVm, port: Port, patience: Duration, usage: &Usage) -> Check {
    let name = named_port(port);
    let stream = match dial(vm, port, patience) {
        Ok(stream) => stream,
        Err(e) => return Check::error(name, &e),
    };
    let answered = probe(vm, patience);
    if matches!(answered, Ok(Answer::EndedUnread)) || was_ended_unread(&stream) {
        let _ = close_gracefully(&stream, patience);
        let seen = "hyperkit ended the dial unread: all its slots are taken";
        return Check::failed(name, seen, &usage.remedy());
    }
    let readable = stream.wait(Wanted::Readable, Duration::ZERO);
    let refused = readable.unwrap_or(true) && stream.has_ended();
    let left = close_gracefully(&stream, patience);
    match answered {
        Err(e) => Check::error(name, &e),
        Ok(Answer::None | Answer::NotTaken | Answer::EndedUnread) => Check::failed(
            name,
            "the guest answers no longer",
            "try again; hyperkit may have no place or descriptor left",
        ),
        Ok(Answer::After(_)) if refused => Check::failed(
            name,
            "nobody listens there in the guest",
            "start its program in the guest; does it listen on AF_VSOCK, and on that port? (80 is 0x50) Or all slots of the \
             VM are taken, of which other programs have some, perhaps",
        ),
        Ok(Answer::After(_)) => Check::ok(
            name,
            match left {
                Ok(()) => "is listened on",
                Err(_) => "is listened on, by a program that doesn't end when its client does",
            },
        ),
    }
}

/// Checks whether there are socket files for guests' dials on which nothing listens.
fn check_left_over(vm: &HyperkitVm, but: &[Port]) -> Option<Check> {
    let ports = list_sockets(vm).filter(|(cid, _)| *cid == HOST_CID);
    let ports = ports.map(|(_, port)| Port(port));
    let is_dead = |port: &Port| {
        !but.contains(port) && matches!(sys::is_socket_alive(&vm.listen_path(*port)), Ok(false))
    };
    let mut dead: Vec<Port> = ports.filter(is_dead).collect();
    dead.sort_unstable();
    let dead: Vec<String> = dead.iter().map(Port::to_string).collect();
    (!dead.is_empty()).then(|| {
        let seen = format!("nobody listens any more on port {}", dead.join(", "));
        let remedy = "start again what listened there, or see that the guest doesn't dial it: that can hang hyperkit's device";
        Check::warning("host ports", seen, remedy)
    })
}
