//! The man page of a command: its help text, and more.

use clap::{Arg, ArgAction, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Inline, bold, italic, roman};

use super::page::{Builder, Page, full_name, section_of_guide};

/// What a command's page says beyond its help.
#[derive(Default)]
struct More {
    /// What exit code 1 means; `None`: that it could not be done.
    failed: Option<&'static str>,
    touches: &'static [Thing],
    /// Commands and pages of the guide to read next.
    see: &'static [&'static str],
    guide: &'static [&'static str],
}

/// What a command uses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Thing {
    /// VMs, by their names.
    Vms,
    /// The control socket.
    Control,
    /// The protocol of a service manager.
    Manager,
    /// The file of `run`.
    File,
    /// The temporary files.
    Temporary,
    /// `/dev/log`.
    Log,
    /// Windows' registry.
    Registry,
    /// The paths in which shells look for completions.
    Shells,
    /// The paths in which `man` looks for pages.
    Manuals,
}

use Thing::{Control, File, Log, Manager, Manuals, Registry, Shells, Temporary, Vms};

fn more(name: &str) -> More {
    let (touches, see, guide): (&[Thing], &[&str], &[&str]) = match name {
        "hvsock" => (
            &[Vms, Control, File],
            &["expose", "run", "status", "doctor", "demo"],
            &[
                "commands",
                "addresses",
                "configuration",
                "control",
                "services",
                "promises",
                "hyperkit",
                "limits",
                "library",
                "speed",
                "tested",
            ],
        ),
        "expose" => (
            &[Vms, Control, Manager],
            &["forward", "run", "status", "doctor", "vms"],
            &["addresses", "hyperkit", "limits"],
        ),
        "forward" => (
            &[Control, Manager],
            &["expose", "run", "status"],
            &["addresses", "limits"],
        ),
        "run" => (
            &[File, Vms, Control, Manager],
            &["check", "status", "reload", "upgrade", "stop"],
            &["configuration", "services", "limits"],
        ),
        "check" => (&[File, Vms], &["run"], &["configuration"]),
        "status" => (
            &[Control],
            &["ps", "top", "connections", "add", "remove", "run", "doctor"],
            &["control"],
        ),
        "ps" => (&[Control], &["status", "stop"], &["control"]),
        "connections" => (&[Control], &["close", "status", "top"], &["control"]),
        "close" => (&[Control], &["connections"], &["control", "hyperkit"]),
        "top" => (
            &[Control],
            &["status", "events", "connections"],
            &["control"],
        ),
        "events" => (&[Control], &["status", "top", "connections"], &["control"]),
        "add" => (
            &[Control, Vms],
            &["remove", "status", "expose", "forward"],
            &["control"],
        ),
        "remove" => (&[Control], &["add", "status"], &["control", "hyperkit"]),
        "reload" => (
            &[Control, File],
            &["run", "check", "status"],
            &["configuration", "control"],
        ),
        "upgrade" => (
            &[Control, File],
            &["run", "status"],
            &["configuration", "control", "services"],
        ),
        "stop" => (
            &[Control, Vms],
            &["run", "status"],
            &["control", "hyperkit"],
        ),
        "cat" => (&[Vms], &["forward", "stress"], &["addresses"]),
        "stress" => (&[Vms], &["cat", "simulate"], &["addresses", "speed"]),
        "syslog" => (&[Log], &["forward"], &["addresses"]),
        "vms" => (&[Vms], &["expose", "doctor"], &["commands"]),
        "doctor" => (&[Vms], &["vms", "status", "expose"], &["hyperkit"]),
        "register" | "unregister" | "services" => (
            &[Registry],
            &["register", "unregister", "services", "cat"],
            &["addresses"],
        ),
        "simulate" => (&[Vms], &["expose", "demo", "stress"], &["hyperkit"]),
        "demo" => (&[Temporary], &["simulate", "expose"], &["commands"]),
        "completions" => (&[Shells], &["man"], &["commands"]),
        "man" => (&[Manuals], &["completions"], &["commands"]),
        _ => (&[Control], &["status"], &["control"]),
    };
    let failed = match name {
        "cat" => Some("Not all of standard input, or not all of the answer, went through."),
        "check" => Some("Something is wrong with the file."),
        "doctor" => Some("A check has failed."),
        "stress" => Some("Something was lost, changed or refused."),
        "syslog" => {
            Some("The socket could not be had, or some messages may not have been delivered.")
        }
        "simulate" => {
            Some("The stand-in could not start, or a client broke one of hyperkit's rules.")
        }
        "reload" => Some("The file has mistakes, or what it asks for can't be had now."),
        _ => None,
    };
    More {
        failed,
        touches,
        see,
        guide,
    }
}

/// Makes a command's page, which refers only to commands of `hvsock` that this system has.
pub(super) fn page(command: &Command, hvsock: &Command) -> Page {
    let name = command.get_name();
    let more = more(name);
    let about = command.get_about().map(ToString::to_string);
    let mut page = Builder::new(
        full_name(name),
        1,
        about.unwrap_or_default().trim_end_matches('.'),
    );
    page.heading("SYNOPSIS");
    page.text(synopsis(command));
    page.heading("DESCRIPTION");
    let description = command.get_long_about().or_else(|| command.get_about());
    for line in description
        .map(ToString::to_string)
        .unwrap_or_default()
        .lines()
    {
        match line.trim().is_empty() {
            true => page.paragraph(),
            false => page.text([roman(line)]),
        }
    }
    let (notes, examples) = notes(command);
    for note in notes {
        page.paragraph();
        page.text([roman(note)]);
    }
    options(&mut page, command);
    if command.has_subcommands() {
        page.heading("COMMANDS");
        for command in command.get_subcommands() {
            let about = command
                .get_about()
                .map(ToString::to_string)
                .unwrap_or_default();
            page.entry(&format!("{}(1)", full_name(command.get_name())), &about);
        }
    }
    for (heading, lines) in examples {
        page.heading(&heading);
        page.verbatim(lines.iter().map(String::as_str));
    }
    page.heading("EXIT STATUS");
    page.entry("0", "It was done.");
    page.entry(
        "1",
        more.failed
            .unwrap_or("It could not be done; standard error says why."),
    );
    page.entry("2", "The words were wrong.");
    environment(&mut page, more.touches);
    files(&mut page, more.touches);
    let commands = (name != "hvsock")
        .then_some("hvsock")
        .into_iter()
        .chain(more.see.iter().copied());
    let commands = commands
        .filter(|it| *it != name)
        .filter(|it| *it == hvsock.get_name() || hvsock.find_subcommand(it).is_some())
        .map(|it| (full_name(it), 1));
    let guide = more
        .guide
        .iter()
        .map(|it| (full_name(it), section_of_guide(it)));
    let mut see_also: Vec<(String, u8)> = commands.chain(guide).collect();
    see_also.sort_by_key(|(_, section)| *section);
    page.finish(&see_also)
}

/// Returns how a command is written: its required arguments, and its own options. Options that many
/// commands share are one word.
fn synopsis(command: &Command) -> Vec<Inline> {
    let mut line = vec![bold(
        command.get_bin_name().unwrap_or_else(|| command.get_name()),
    )];
    if command.has_subcommands() {
        line.extend([roman(" "), italic("COMMAND"), roman(" [")]);
        line.extend([italic("OPTION"), roman("]... [")]);
        line.extend([italic("ARGUMENT"), roman("]...")]);
        return line;
    }
    let shown =
        |arg: &&Arg| !arg.is_hide_set() && !arg.is_positional() && arg.get_help_heading().is_none();
    let all: Vec<&Arg> = command.get_arguments().collect();
    let mut options: Vec<&Arg> = all.iter().copied().filter(shown).collect();
    options.retain(|arg| {
        !matches!(
            arg.get_action(),
            ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong
        )
    });
    options.sort_by_key(|arg| !arg.is_required_set());
    for arg in options {
        let (open, close) = if arg.is_required_set() {
            ("", "")
        } else {
            ("[", "]")
        };
        let repeats = if matches!(arg.get_action(), ArgAction::Append) {
            "..."
        } else {
            ""
        };
        line.push(roman(format!(" {open}")));
        line.push(bold(match (arg.get_short(), arg.get_long()) {
            (Some(short), _) => format!("-{short}"),
            (None, long) => format!("--{}", long.unwrap_or_default()),
        }));
        if let Some(value) = value_of(arg) {
            line.extend([roman(" "), italic(value)]);
        }
        line.push(roman(format!("{close}{repeats}")));
    }
    if all.iter().any(|arg| arg.get_help_heading().is_some()) {
        line.extend([roman(" ["), italic("OPTION"), roman("]...")]);
    }
    for arg in all
        .iter()
        .filter(|arg| arg.is_positional() && !arg.is_hide_set())
    {
        let (open, close) = if arg.is_required_set() {
            ("", "")
        } else {
            ("[", "]")
        };
        let repeats = arg
            .get_num_args()
            .is_some_and(|count| count.max_values() > 2);
        let repeats = if repeats { "..." } else { "" };
        line.push(roman(format!(" {open}")));
        line.push(italic(value_of(arg).unwrap_or_default()));
        line.push(roman(format!("{close}{repeats}")));
    }
    line
}

/// Returns the placeholder of an argument's value, if it takes one.
fn value_of(arg: &Arg) -> Option<String> {
    let takes = arg.is_positional() || arg.get_action().takes_values();
    let names = arg.get_value_names().unwrap_or_default();
    takes.then(|| names.join(" "))
}

/// Adds the options, as clap's own man pages have them.
fn options(page: &mut Builder, command: &Command) {
    let mut text = Vec::new();
    // Writing to memory can't fail.
    let _ = Man::new(command.clone()).render_options_section(&mut text);
    let text = String::from_utf8_lossy(&text);
    // The page already has the lines before the first heading.
    let section = text.find(".SH").map_or("", |at| &text[at..]);
    // No line break is needed before a blank line.
    page.raw(&section.replace("\n.br\n\n.br\n", "\n.sp\n"));
}

/// Returns the help text after the options: its paragraphs, and its blocks of lines by heading.
fn notes(command: &Command) -> (Vec<String>, Vec<(String, Vec<String>)>) {
    let text = command
        .get_after_help()
        .map(ToString::to_string)
        .unwrap_or_default();
    let (mut notes, mut blocks) = (Vec::new(), Vec::<(String, Vec<String>)>::new());
    for line in text.lines() {
        if let Some(indented) = line.strip_prefix("  ") {
            if let Some((_, lines)) = blocks.last_mut() {
                lines.push(indented.to_owned());
            }
        } else if let Some(heading) = line.strip_suffix(':') {
            // Such as "Example, in a guest".
            let heading = match heading.starts_with("Example") {
                true => "EXAMPLES".to_owned(),
                false => heading.to_uppercase(),
            };
            blocks.push((heading, Vec::new()));
        } else if !line.is_empty() {
            notes.push(line.to_owned());
        }
    }
    (notes, blocks)
}

fn environment(page: &mut Builder, touches: &[Thing]) {
    page.heading("ENVIRONMENT");
    page.entry(
        "HVSOCK_LOG",
        "How much the log says: off, error, warn, info (the default), debug or trace; of a part alone as in info,connection=debug. The parts are access, connection, control, listener, syslog and vm.",
    );
    if touches.contains(&Vms) {
        page.entry(
            "HOME",
            "Where the state directories of minikube and Docker are looked for.",
        );
        page.entry(
            "MINIKUBE_HOME",
            "Where minikube keeps its machines, if not in ~/.minikube.",
        );
    } else if touches.contains(&File) {
        page.entry("HOME", "What ~/ stands for.");
    }
    if touches.contains(&Control) {
        page.entry(
            "XDG_RUNTIME_DIR",
            "Where the control socket is, except on macOS.",
        );
        page.entry("TMPDIR", "Where the control socket is otherwise.");
    } else if touches.contains(&Temporary) {
        page.entry(
            "TMPDIR",
            "Where the stand-in VM is, if its path is short enough.",
        );
    }
    if touches.contains(&Manager) {
        page.entry(
            "LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES",
            "Sockets that systemd has passed, which are used where a rule listens on their address.",
        );
        page.entry(
            "NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID",
            "Where systemd is told of readiness, reloads and the end, and how often that all is well.",
        );
    }
}

fn files(page: &mut Builder, touches: &[Thing]) {
    page.heading("FILES");
    for thing in touches {
        match thing {
            Vms => {
                page.entry("~/.minikube/machines/NAME", "The state directory of a machine of minikube.");
                page.entry(
                    "~/Library/Containers/com.docker.docker/Data/vms/0",
                    "The state directory of Docker's VM, which is named docker.",
                );
                page.entry("./NAME-state", "The state directory of a VM of linuxkit.");
            }
            Control => page.entry(
                "$XDG_RUNTIME_DIR/hvsock/control.sock, $TMPDIR/hvsock-UID/control.sock, /tmp/hvsock-UID/control.sock",
                "The control socket: the first of these whose directory is there; on macOS not the first one. Commands that ask an hvsock look at all of them. Beside it is PID.sock, that of an hvsock that was started without --control.",
            ),
            Manager => page.entry(
                "hvsock.service, hvsock.socket, hvsock-run.service",
                "Units for systemd; see hvsock-services(7).",
            ),
            File => page.entry("~/.config/hvsock.toml", "The file that hvsock-run.service takes; see hvsock.toml(5)."),
            Temporary => page.entry("/tmp/hvsock-demo-*", "The stand-in VM, removed at the end."),
            Log => page.entry("/dev/log", "Where programs write their messages."),
            Registry => page.entry(
                "HKEY_LOCAL_MACHINE\\SOFTWARE\\Microsoft\\Windows NT\\CurrentVersion\\Virtualization\\GuestCommunicationServices",
                "Windows' register of the services that guests may dial.",
            ),
            Shells => {
                page.entry("share/bash-completion/completions/hvsock", "Where bash looks, below /usr or ~/.local.");
                page.entry("share/zsh/site-functions/_hvsock", "Where zsh looks, if it is in its fpath.");
                page.entry("share/fish/vendor_completions.d/hvsock.fish", "Where fish looks.");
            }
            Manuals => page.entry("/usr/local/share/man", "Where man looks, among other places."),
        }
    }
}
