//! The state directory: hyperkit's sockets and files.

use super::plan::Plan;
use crate::error::{Error, Operation, Result};
use crate::hyperkit;
use crate::sys;
use mio::net::UnixListener;
use socket2::{Domain, SockAddr, Socket, Type};
use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};

/// macOS' `sun_path`, the final zero included: hyperkit's limit, kept on every system.
const SUN_PATH: usize = 104;

/// What a start has made so far; it is removed again unless it is to stay.
#[derive(Debug, Default)]
pub(super) struct Made(Vec<PathBuf>);

impl Made {
    pub(super) fn add(&mut self, path: &Path) {
        self.0.push(path.to_path_buf());
    }

    /// Makes a directory, and those above it.
    fn create_directory(&mut self, path: &Path) -> io::Result<()> {
        let missing = path
            .ancestors()
            .take_while(|it| !it.as_os_str().is_empty() && !it.exists());
        let missing: Vec<PathBuf> = missing.map(Path::to_path_buf).collect();
        fs::create_dir_all(path)?;
        self.0.extend(missing.into_iter().rev());
        Ok(())
    }

    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            // A directory in which there is something else stays.
            if fs::remove_file(path).is_err() {
                let _ = fs::remove_dir(path);
            }
        }
    }
}

/// The listening sockets, and which guest port each stands for (`None`: the line tells).
pub(super) type Listeners = Vec<(UnixListener, Option<u32>)>;

/// Returns the path of the socket that stands for `port` of `cid`.
pub(super) fn socket_path(plan: &Plan, cid: u32, port: u32) -> PathBuf {
    if let Some(mux) = &plan.mux {
        return mux.host_path(port);
    }
    plan.directory.join(format!(
        "{}{}",
        plan.prefix,
        hyperkit::socket_name(cid, port)
    ))
}

/// Refuses a directory whose sockets' names would not fit into an address.
fn check_length(plan: &Plan) -> Result<()> {
    let longest = (plan.prefix.len() + 17).max(plan.connect_name.len());
    let limit = SUN_PATH - 1 - 1 - longest.min(SUN_PATH - 2);
    let length = plan.directory.as_os_str().len();
    if length <= limit {
        return Ok(());
    }
    let cause = io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("the path has {length} bytes, and hyperkit takes {limit}"),
    );
    Err(
        Error::new(Operation::Listen, plan.directory.display(), cause)
            .with_remedy("choose a shorter one"),
    )
}

/// Refuses a directory in which another process' VM runs: its sockets are not ours to replace.
fn check_vacant(plan: &Plan) -> Result<()> {
    let connect = plan.directory.join(&plan.connect_name);
    let pid = match sys::is_socket_alive(&connect) {
        Ok(true) => hyperkit::running_pid(&plan.directory),
        // A leftover, or none: whatever has that pid now is no VM here.
        _ => None,
    };
    match pid {
        Some(pid) if u32::try_from(pid) != Ok(std::process::id()) => {
            let why = format!(
                "a VM runs there: {} names process {pid}",
                hyperkit::PID_NAME
            );
            let cause = io::Error::new(io::ErrorKind::AddrInUse, why);
            let error = Error::new(Operation::Listen, plan.directory.display(), cause);
            Err(error.with_remedy("choose another directory, or stop that VM"))
        }
        _ => Ok(()),
    }
}

fn listen(path: &Path, backlog: i32) -> Result<UnixListener> {
    let listen = || {
        remove(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        socket.listen(backlog)?;
        socket.set_nonblocking(true)?;
        Ok(UnixListener::from_std(StdUnixListener::from(socket)))
    };
    listen().map_err(|cause| Error::new(Operation::Listen, path.display(), cause))
}

/// Replaces the file that an earlier VM, or another program, has left there. It never writes to the
/// old one, which may be a FIFO without a reader, or a link to another file.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    remove(path)?;
    fs::File::create_new(path)?.write_all(text.as_bytes())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes the socket of a VMM; what an earlier one left there is replaced.
fn prepare_mux(path: &Path, plan: &Plan, made: &mut Made) -> Result<Listeners> {
    if sys::is_socket_alive(path).unwrap_or(false) {
        let cause = io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there");
        let error = Error::new(Operation::Listen, path.display(), cause);
        return Err(error.with_remedy("choose another path, or stop that VM"));
    }
    let listener = listen(path, plan.backlog)?;
    made.add(path);
    Ok(vec![(listener, None)])
}

/// Makes the directory, its files and its sockets; what an earlier VM left there is replaced.
pub(super) fn prepare(plan: &Plan, made: &mut Made) -> Result<Listeners> {
    if let Some(mux) = &plan.mux {
        return prepare_mux(&mux.path, plan, made);
    }
    check_length(plan)?;
    check_vacant(plan)?;
    let failed = |path: &Path| {
        let vm = format!("a VM in {}", plan.directory.display());
        let path = path.display().to_string();
        move |e: io::Error| {
            let cause = io::Error::new(e.kind(), format!("cannot make {path}: {e}"));
            Error::new(Operation::Run, vm, cause)
        }
    };
    made.create_directory(&plan.directory)
        .map_err(failed(&plan.directory))?;

    let connect = plan.directory.join(&plan.connect_name);
    let mut listeners = vec![(listen(&connect, plan.backlog)?, None)];
    made.add(&connect);
    for &port in &plan.forwards {
        let link = plan.directory.join(format!("guest.{port:08x}"));
        remove(&link).map_err(failed(&link))?;
        let path = socket_path(plan, plan.cid, port);
        listeners.push((listen(&path, plan.backlog)?, Some(port)));
        made.add(&path);
        let target = path.file_name().unwrap_or(path.as_os_str());
        std::os::unix::fs::symlink(target, &link).map_err(failed(&link))?;
        made.add(&link);
    }

    let pid = std::process::id();
    let path = plan.directory.join("hyperkit.pid");
    // No newline: hyperkit's Go package parses the whole file as a number.
    replace(&path, &pid.to_string()).map_err(failed(&path))?;
    made.add(&path);
    let path = plan.directory.join("hyperkit.json");
    replace(&path, &configuration(plan, pid)).map_err(failed(&path))?;
    made.add(&path);
    Ok(listeners)
}

/// Returns `hyperkit.json` with the keys of hyperkit's Go package.
fn configuration(plan: &Plan, pid: u32) -> String {
    let directory = plan.directory.to_string_lossy();
    let program = std::env::args().next().unwrap_or_default();
    let forwards = plan
        .forwards
        .iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(";");
    let mut device = format!("1,virtio-sock,guest_cid={},path={directory}", plan.cid);
    if !forwards.is_empty() {
        device += &format!(",guest_forwards={forwards}");
    }
    let arguments = ["-s", &device];
    serde_json::json!({
        "hyperkit": program,
        "state_dir": directory,
        "vpnkit_sock": "",
        "vpnkit_key": "",
        "uuid": "",
        "disks": null,
        "iso": "",
        "vsock": true,
        "vsock_ports": plan.forwards,
        "vsock_guest_cid": plan.cid,
        "vmnet": false,
        "9p_sockets": null,
        "kernel": "",
        "initrd": "",
        "bootrom": "",
        "cpus": 1,
        "memory": 1024,
        "console": 1,
        "pid": pid,
        "arguments": arguments,
        "cmdline": format!("{program} {}", arguments.join(" ")),
    })
    .to_string()
}

/// Parses the CID and the port in a line, as leniently as `sscanf("%08x.%08x\n")` does.
///
/// It isn't [`hyperkit::parse_connect_line`]: the stand-in must not share a mistake with what it
/// tests.
pub(super) fn scan_line(line: &[u8; hyperkit::LINE_LEN]) -> Option<(u32, u32)> {
    let text = line.strip_suffix(b"\n")?;
    let (cid, rest) = scan_hex(text)?;
    let (port, _) = scan_hex(rest.strip_prefix(b".")?)?;
    Some((cid, port))
}

/// Parses one `%08x`: blanks, and at most eight characters with an optional sign and `0x`. Returns
/// it with the rest.
fn scan_hex(text: &[u8]) -> Option<(u32, &[u8])> {
    let blanks = text
        .iter()
        .take_while(|byte| byte.is_ascii_whitespace())
        .count();
    let text = &text[blanks..];
    let mut at = 0;
    let negative = text.first() == Some(&b'-');
    if negative || text.first() == Some(&b'+') {
        at += 1;
    }
    if text[at..].len() > 2 && text[at] == b'0' && matches!(text[at + 1], b'x' | b'X') {
        at += 2;
    }
    let digits = text[at..]
        .iter()
        .take(8 - at)
        .take_while(|byte| byte.is_ascii_hexdigit())
        .count();
    let digits = std::str::from_utf8(&text[at..at + digits]).ok()?;
    let value = u32::from_str_radix(digits, 16).ok()?;
    let value = if negative {
        value.wrapping_neg()
    } else {
        value
    };
    Some((value, &text[at + digits.len()..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_lines_as_sscanf_does() {
        assert_eq!(scan_line(b"00000003.00000050\n"), Some((3, 0x50)));
        assert_eq!(scan_line(b"       3.      50\n"), Some((3, 0x50)));
        assert_eq!(scan_line(b"0x000003.FFFFffff\n"), Some((3, u32::MAX)));
        assert_eq!(scan_line(b"3.50             \n"), Some((3, 0x50)));
        assert_eq!(scan_line(b"00000003.00000050 "), None);
        assert_eq!(scan_line(b"00000003:00000050\n"), None);
        assert_eq!(scan_line(b"000000003.0000050\n"), None);
        assert_eq!(scan_line(b"GET / HTTP/1.1\r\n\r\n"), None);
        assert_eq!(scan_line(b"                 \n"), None);
    }
}
