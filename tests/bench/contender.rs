//! Who is measured: hvsock, what one would take in its place, and no proxy at all.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::server::{self, Room, Service};

/// What all contenders lead to.
pub(crate) struct Backs {
    pub(crate) dir: PathBuf,
    /// How many a process may have.
    pub(crate) descriptors: u64,
    is_for_a_crowd: bool,
}

impl Backs {
    pub(crate) fn start(dir: &Path, descriptors: u64) -> Backs {
        for service in Service::ALL {
            for room in Room::ALL {
                server::unix(service, room, dir);
            }
        }
        server::hyperkit(dir);
        Backs {
            dir: dir.to_owned(),
            descriptors,
            is_for_a_crowd: false,
        }
    }

    /// The same, whose echo serves tens of thousands at a time.
    pub(crate) fn for_a_crowd(&self) -> Backs {
        server::crowd(&self.dir.join("crowd.sock"));
        Backs {
            dir: self.dir.clone(),
            is_for_a_crowd: true,
            ..*self
        }
    }

    fn socket(&self, service: Service, room: Room) -> String {
        let path = match (service, self.is_for_a_crowd) {
            (Service::Echo, true) => self.dir.join("crowd.sock"),
            _ => server::path(service, room, &self.dir),
        };
        path.display().to_string()
    }
}

/// A proxy that runs, or none.
pub(crate) struct Contender {
    processes: Vec<Child>,
    ports: [u16; 3],
}

/// See its file.
pub(crate) const BARE: &str = "bare";
/// It copies.
pub(crate) const BARE_COPY: &str = "bare --copy";

/// As on a Mac: Unix sockets have 8 KiB unless more is asked for (tests/manners), the server's as
/// well, and all is copied. Of the last two, one gets no more, whatever it asks for, and to the
/// other the server gives as much as hyperkit does.
const BARE_MAC: &str = "bare --copy, Mac";
const MAC: &str = "hvsock, Mac";
const MAC_CAPPED: &str = "hvsock, Mac, 8k";
const MAC_128: &str = "hvsock, Mac, 128k";

/// Another build of hvsock, `HVSOCK_BENCH_BEFORE`.
pub(crate) const BEFORE: &str = "hvsock, before";
const BEFORE_HYPERKIT: &str = "before, hyperkit";

/// Behind `connect` of a hyperkit VM, with a keeper and without.
const HYPERKIT: &str = "hvsock, hyperkit";
const NO_KEEPER: &str = "same, no keeper";

/// Those that can be had, in the order in which they are printed.
pub(crate) const NAMES: [&str; 17] = [
    "no proxy",
    BARE,
    BARE_COPY,
    "hvsock",
    BEFORE,
    "hvsock --no-splice",
    HYPERKIT,
    NO_KEEPER,
    BEFORE_HYPERKIT,
    BARE_MAC,
    MAC,
    MAC_CAPPED,
    MAC_128,
    "haproxy",
    "haproxy 128k",
    "nginx",
    "socat",
];

impl Contender {
    /// Starts it; `None` if its program isn't installed.
    pub(crate) fn start(name: &'static str, backs: &Backs) -> io::Result<Option<Contender>> {
        let free =
            || -> io::Result<u16> { Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port()) };
        let ports = match name {
            "no proxy" => Service::ALL.map(server::tcp),
            _ => [free()?, free()?, free()?],
        };
        let fronts = || Service::ALL.into_iter().zip(ports);
        let room = match name {
            BARE_MAC | MAC | MAC_CAPPED => Room::Mac,
            MAC_128 => Room::Hyperkit,
            _ => Room::Default,
        };
        let manners = match room {
            Room::Default => None,
            // Where the library is, which scripts/bench builds.
            _ => match std::env::var_os("HVSOCK_BENCH_MANNERS") {
                Some(library) => Some(library),
                None => return Ok(None),
            },
        };
        let mut commands = Vec::new();
        match name {
            "no proxy" => {}
            BARE | BARE_COPY | BARE_MAC => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(name.trim_end_matches(", Mac").split(' '));
                for (service, port) in fronts() {
                    command.args([port.to_string(), backs.socket(service, room)]);
                }
                commands.push(command);
            }
            "hvsock" | BEFORE | "hvsock --no-splice" | HYPERKIT | NO_KEEPER | BEFORE_HYPERKIT
            | MAC | MAC_CAPPED | MAC_128 => {
                let mut command = match name {
                    BEFORE | BEFORE_HYPERKIT => match std::env::var_os("HVSOCK_BENCH_BEFORE") {
                        Some(program) => Command::new(program),
                        None => return Ok(None),
                    },
                    _ => Command::new(env!("CARGO_BIN_EXE_hvsock")),
                };
                command.arg("forward");
                if name == NO_KEEPER {
                    command.arg("--no-keeper");
                }
                if name.ends_with("--no-splice") || room != Room::Default {
                    command.arg("--no-splice");
                }
                for (service, port) in fronts() {
                    let to = match name {
                        HYPERKIT | NO_KEEPER | BEFORE_HYPERKIT => {
                            format!("hyperkit://:{}{}", service.port(), backs.dir.display())
                        }
                        _ => backs.socket(service, room),
                    };
                    command.args([format!("tcp://127.0.0.1:{port}"), to]);
                }
                commands.push(command);
            }
            "haproxy" | "haproxy 128k" => {
                // It wants two descriptors for each, and pipes for a quarter of them.
                let most = backs.descriptors * 2 / 5 - 500;
                let buffers = match name {
                    "haproxy" => "",
                    _ => "tune.bufsize 131072\n",
                };
                let mut config = format!(
                    "global\nnbthread 2\nmaxconn {most}\n{buffers}defaults\nmode tcp\noption splice-auto\ntimeout connect 10s\ntimeout client 1h\ntimeout server 1h\n"
                );
                for (service, port) in fronts() {
                    let socket = backs.socket(service, room);
                    config += &format!(
                        "listen {service:?}\nbind 127.0.0.1:{port}\nserver s unix@{socket}\n"
                    );
                }
                let path = backs.dir.join(format!("{name}.cfg"));
                fs::write(&path, config)?;
                let mut command = Command::new("haproxy");
                command.arg("-db").arg("-f").arg(path);
                commands.push(command);
            }
            "nginx" => {
                let most = backs.descriptors - 500;
                let dir = backs.dir.display();
                let mut config = format!(
                    "load_module modules/ngx_stream_module.so;\nuser root;\ndaemon off;\npid {dir}/nginx.pid;\nerror_log stderr crit;\nworker_processes 2;\nevents {{ worker_connections {most}; }}\nstream {{ proxy_half_close on; proxy_timeout 1h;\n"
                );
                for (service, port) in fronts() {
                    let socket = backs.socket(service, room);
                    config += &format!(
                        "server {{ listen 127.0.0.1:{port} backlog=4096; proxy_pass unix:{socket}; }}\n"
                    );
                }
                let path = backs.dir.join("nginx.conf");
                fs::write(&path, config + "}\n")?;
                let mut command = Command::new("nginx");
                command
                    .args(["-p", "/usr/share/nginx/", "-e", "stderr", "-c"])
                    .arg(path);
                commands.push(command);
            }
            _ => {
                for (service, port) in fronts() {
                    let mut command = Command::new("socat");
                    // Without -t it waits half a second for an answer after a half-close, and drops
                    // it then.
                    command.args([
                        "-b262144".to_owned(),
                        "-t3600".to_owned(),
                        format!("TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr,backlog=4096"),
                        format!("UNIX-CONNECT:{}", backs.socket(service, room)),
                    ]);
                    commands.push(command);
                }
            }
        }
        let mut contender = Contender {
            processes: Vec::new(),
            ports,
        };
        for mut command in commands {
            command.stdin(Stdio::null()).stdout(Stdio::null());
            if let Some(library) = &manners {
                let manners = match name {
                    MAC_CAPPED => "buffers,capped",
                    _ => "buffers",
                };
                command.env("LD_PRELOAD", library).env("MANNERS", manners);
            }
            // What it says of its end is of no interest; what goes wrong shows in the results.
            command.stderr(Stdio::null());
            match command.spawn() {
                Ok(child) => contender.processes.push(child),
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        contender.wait_until_it_listens()?;
        Ok(Some(contender))
    }

    /// Starts an hvsock with so many forwards to the echo, half of them of Unix sockets, and
    /// returns how long that has taken. The first listens on the port of the echo.
    pub(crate) fn with_forwards(
        name: &str,
        count: u64,
        backs: &Backs,
    ) -> io::Result<Option<(Contender, Duration)>> {
        let mut command = match name {
            BEFORE => match std::env::var_os("HVSOCK_BENCH_BEFORE") {
                Some(program) => Command::new(program),
                None => return Ok(None),
            },
            _ => Command::new(env!("CARGO_BIN_EXE_hvsock")),
        };
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let sockets = tempfile::tempdir_in(&backs.dir)?;
        let at = |number: u64| sockets.path().join(number.to_string());
        let splice = !name.ends_with("--no-splice");
        let mut file = format!("control = \"off\"\nsplice = {splice}\n");
        for number in 0..count {
            let listen = match number {
                0 => format!("tcp://127.0.0.1:{port}"),
                number if number % 2 == 0 => "tcp://127.0.0.1:0".to_owned(),
                number => at(number).display().to_string(),
            };
            let connect = backs.socket(Service::Echo, Room::Default);
            file += &format!("[forward.f{number}]\nlisten = {listen:?}\nconnect = {connect:?}\n");
        }
        let path = sockets.path().join("hvsock.toml");
        fs::write(&path, file)?;
        command.arg("run").arg(&path).stdin(Stdio::null());
        let begun = Instant::now();
        let child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let contender = Contender {
            processes: vec![child],
            ports: [port; 3],
        };
        contender.wait_until_it_listens()?;
        // The last Unix socket, behind which at most one is bound.
        let last = (1..count).rfind(|number| number % 2 == 1);
        let end = begun + Duration::from_secs(60);
        while last
            .is_some_and(|number| std::os::unix::net::UnixStream::connect(at(number)).is_err())
        {
            if Instant::now() > end {
                return Err(io::ErrorKind::TimedOut.into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(Some((contender, begun.elapsed())))
    }

    fn wait_until_it_listens(&self) -> io::Result<()> {
        let end = Instant::now() + Duration::from_secs(10);
        for port in self.ports {
            while let Err(e) = TcpStream::connect(("127.0.0.1", port)) {
                if Instant::now() > end {
                    return Err(e);
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    pub(crate) fn port(&self, service: Service) -> u16 {
        self.ports[service as usize]
    }

    /// Seconds of the processor that it and its children have used, and those of its keeper among
    /// them.
    pub(crate) fn cpu(&self) -> (f64, f64) {
        let (mut all, mut keeper) = (0.0, 0.0);
        for pid in self.pids() {
            let (own, comm) = (cpu(pid), fs::read_to_string(format!("/proc/{pid}/comm")));
            all += own;
            if comm.is_ok_and(|name| name.trim_end() == "hvsock-keeper") {
                keeper += own;
            }
        }
        (all, keeper)
    }

    /// Bytes of memory that are resident.
    pub(crate) fn memory(&self) -> u64 {
        let resident = |pid: &u32| -> Option<u64> {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find(|line| line.starts_with("VmRSS"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        };
        self.pids().iter().filter_map(resident).sum::<u64>() << 10
    }

    fn pids(&self) -> Vec<u32> {
        let mut pids: Vec<u32> = self.processes.iter().map(Child::id).collect();
        let mut next = 0;
        while let Some(pid) = pids.get(next) {
            // Those of each thread.
            let tasks = fs::read_dir(format!("/proc/{pid}/task"));
            for task in tasks.into_iter().flatten().flatten() {
                let children = fs::read_to_string(task.path().join("children"));
                let children = children.unwrap_or_default();
                pids.extend(
                    children
                        .split_whitespace()
                        .filter_map(|pid| pid.parse::<u32>().ok()),
                );
            }
            next += 1;
        }
        pids
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        use nix::sys::signal::{Signal, kill};
        use nix::unistd::Pid;
        for pid in self.pids() {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
        }
        let end = Instant::now() + Duration::from_secs(2);
        for child in &mut self.processes {
            while Instant::now() < end && matches!(child.try_wait(), Ok(None)) {
                thread::sleep(Duration::from_millis(10));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Of a process, its threads and those of its children that have ended.
fn cpu(pid: u32) -> f64 {
    let nanoseconds = |task: io::Result<fs::DirEntry>| -> Option<u64> {
        let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let own: u64 = tasks.into_iter().flatten().filter_map(nanoseconds).sum();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // Of proc(5), in ticks of 10 ms: `utime` and `stime` (the 14th and 15th field) have the threads
    // that ended, too; `cutime` and `cstime` (behind them) the children.
    let ticks = |field: usize| fields.get(field).and_then(|f| f.parse::<u64>().ok());
    let seconds =
        |field| (ticks(field).unwrap_or(0) + ticks(field + 1).unwrap_or(0)) as f64 / 100.0;
    (own as f64 / 1e9).max(seconds(11)) + seconds(13)
}
