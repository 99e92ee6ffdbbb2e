//! `hvsock top` on a terminal, and the picture of it that the README shows.

#![cfg(all(target_os = "linux", feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/command.rs"]
mod command;
mod common;
#[path = "common/picture.rs"]
mod picture;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use command::*;
use common::*;
use hvsock::simulate::{Service, Vm};
use picture::{picture, text_of};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// The terminal's size.
const ROWS: u16 = 20;
const COLUMNS: u16 = 100;

/// The picture, and the variable that has it made anew, as scripts/picture does.
const PICTURE: &str = "src/guide/top.svg";
const MAKE: &str = "HVSOCK_PICTURE";

/// An hvsock with a VM, three forwards, and clients that are at work.
struct Scene {
    clients: Vec<JoinHandle<()>>,
    over: Arc<AtomicBool>,
    _children: Vec<Mortal>,
    _hvsock: Running,
    _vm: Vm,
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Scene {
        let dir = private_dir();
        let path = dir.path();
        let docker = path.join("docker");
        fs::create_dir(&docker).unwrap();
        let vm = Vm::builder(&docker)
            .guest(80, Service::Chargen)
            .guest(2375, Service::Echo)
            .guest(22, Service::Silent);
        let vm = vm.start().unwrap();
        let at = text(path);
        let mut file = format!("[vm.docker]\nat = \"{at}/docker\"\n");
        for (name, listen, port) in [
            ("web", "0".to_owned(), 80),
            ("docker-api", format!("\"{at}/docker.sock\""), 2375),
            ("ssh", format!("\"{at}/ssh.sock\""), 22),
        ] {
            file +=
                &format!("[forward.{name}]\nlisten = {listen}\nvm = \"docker\"\nport = {port}\n");
        }
        fs::write(path.join("hvsock.toml"), file).unwrap();
        let words = ["run", &format!("{at}/hvsock.toml"), "--no-keeper"];
        let hvsock = Running::spawn(in_runtime(path, &words));
        let web = hvsock.tcp_port();
        hvsock.says("ssh");
        let mut scene = Scene {
            clients: Vec::new(),
            over: Arc::default(),
            _children: Vec::new(),
            _hvsock: hvsock,
            _vm: vm,
            dir,
        };
        for client in 1..4_usize {
            let mut page = tcp(web);
            let mut buffer = vec![0; 40_000 * client];
            scene.each(move |step| {
                // Now more, now less, each at its own pace.
                let wanted = buffer.len() * (2 + (step * client / 5) % 7) / 8;
                page.read_exact(&mut buffer[..wanted]).is_ok()
            });
        }
        let (mut api, ssh) = (scene.cat("docker.sock"), scene.cat("ssh.sock"));
        let bytes = pattern(30_000);
        scene.each(move |step| {
            let some = &bytes[..bytes.len() * (1 + (step / 9) % 4) / 4];
            api.write_all(some).is_ok()
        });
        // Idle, and open until the end.
        scene.each(move |_| ssh.as_fd().try_clone_to_owned().is_ok());
        scene
    }

    /// Does something again and again until it is over, or fails.
    fn each(&mut self, mut step: impl FnMut(usize) -> bool + Send + 'static) {
        let over = Arc::clone(&self.over);
        self.clients.push(thread::spawn(move || {
            let mut number = 0;
            while !over.load(Ordering::Relaxed) && step(number) {
                number += 1;
                thread::sleep(Duration::from_millis(50));
            }
        }));
    }

    /// Starts a client of a Unix socket; its standard input.
    fn cat(&mut self, socket: &str) -> std::process::ChildStdin {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hvsock"));
        command.arg("cat").arg(self.dir.path().join(socket));
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        self._children.push(Mortal(child));
        input
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for child in &mut self._children {
            let _ = child.0.kill();
        }
        for client in self.clients.drain(..) {
            let _ = client.join();
        }
    }
}

/// A terminal, and `hvsock top` on it.
struct Terminal {
    keys: File,
    written: Receiver<Vec<u8>>,
    parser: vt100::Parser,
    top: Mortal,
}

impl Terminal {
    fn start(runtime: &Path) -> Terminal {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let controller = openpt(flags).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let user = ioctl_tiocgptpeer(&controller, flags).unwrap();
        let size = Winsize {
            ws_row: ROWS,
            ws_col: COLUMNS,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&user, size).unwrap();
        let mut command = in_runtime(runtime, &["top"]);
        command.env("TERM", "xterm-256color").env_remove("NO_COLOR");
        command.stdin(user.try_clone().unwrap());
        command.stdout(user.try_clone().unwrap()).stderr(user);
        let top = Mortal(command.spawn().unwrap());
        let keys = File::from(controller);
        let mut screen = keys.try_clone().unwrap();
        let (tell, written) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // At the end of all that have it, a terminal fails.
            while let Ok(n @ 1..) = screen.read(&mut buffer) {
                if tell.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        let size = |size| NonZeroU16::new(size).unwrap();
        Terminal {
            keys,
            written,
            parser: vt100::Parser::new(size(ROWS), size(COLUMNS), 0),
            top,
        }
    }

    fn shows(&mut self, what: &str, mut wanted: impl FnMut(&str) -> bool) -> String {
        let end = std::time::Instant::now() + 2 * PATIENCE;
        loop {
            let written = self.written.try_iter();
            written.for_each(|bytes| self.parser.process(&bytes));
            let shown = self.parser.screen().contents();
            if wanted(&shown) {
                return shown;
            }
            assert!(std::time::Instant::now() < end, "in vain: {what}:\n{shown}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn press(&mut self, key: &str) {
        self.keys.write_all(key.as_bytes()).unwrap();
    }
}

/// What doesn't change from one run to another: the headings, the keys, the forwards and their
/// states.
fn layout(lines: &[String]) -> Vec<String> {
    let words = |line: &String, n| line.split(' ').take(n).collect::<Vec<_>>().join(" ");
    let mut layout = Vec::new();
    for line in lines {
        match line.split(' ').next().unwrap_or_default() {
            "NAME" | "BUSIEST" | "q" => layout.push(line.clone()),
            "web" | "docker-api" | "ssh" => layout.push(words(line, 2)),
            "VM" => layout.push(words(line, 2)),
            "hvsock" if line.contains("sent") => layout.push(words(line, 1)),
            _ => {}
        }
    }
    layout
}

/// How far the history of a forward goes back, in bars.
fn bars(shown: &str, forward: &str) -> usize {
    let line = shown.lines().find(|line| line.starts_with(forward));
    let line = line.unwrap_or_default();
    line.chars().filter(|it| ('▁'..='█').contains(it)).count()
}

#[test]
fn it_draws_on_a_terminal_and_the_picture_shows_what_it_draws() {
    let scene = Scene::new();
    let mut terminal = Terminal::start(scene.dir.path());
    let makes = std::env::var_os(MAKE).is_some();
    // A column of the picture is to be full of them.
    let enough = if makes { 14 } else { 1 };
    terminal.shows("traffic", |shown| {
        ["web", "docker-api"]
            .iter()
            .all(|forward| bars(shown, forward) >= enough)
    });
    let screen = terminal.parser.screen();
    let drawn = picture(
        screen,
        "hvsock top: a VM, three forwards and their connections",
    );
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(PICTURE);
    if makes {
        fs::write(&path, &drawn).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap();
    let expected = layout(&text_of(&drawn));
    assert_eq!(expected.len(), 8, "{expected:?}");
    assert_eq!(
        layout(&text_of(&kept)),
        expected,
        "{PICTURE} is another top's: run scripts/picture"
    );

    terminal.press("?");
    terminal.shows("help", |shown| shown.contains("choose a connection"));
    // Any key ends the help.
    terminal.press(" ");
    terminal.shows("what was there", |shown| shown.contains("NAME"));
    terminal.press("q");
    assert_eq!(terminal.top.exit_code(), Some(0));
    terminal.shows("the end", |shown| !shown.contains("NAME"));
    assert!(!terminal.parser.screen().alternate_screen());
}
