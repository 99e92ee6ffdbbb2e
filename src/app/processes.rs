//! Lists the processes of this program and of others.
//!
//! On Linux it reads `/proc`: a container may lack `ps`. Elsewhere it runs POSIX' `ps`: macOS has
//! no documented call for the arguments of another process.

use std::io;

/// The name of the program's file.
const PROGRAM: &str = "hvsock";

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunningProcess {
    pub(crate) id: u32,
    /// The program, and its arguments.
    pub(crate) command: Vec<String>,
}

impl RunningProcess {
    /// Returns whether it is a keeper, which is started as `hvsock keeper VERSION`.
    pub(crate) fn is_keeper(&self) -> bool {
        self.command.get(1).is_some_and(|word| word == "keeper")
    }

    /// Returns the value of an option that is written as `--NAME=VALUE`.
    pub(crate) fn option(&self, name: &str) -> Option<&str> {
        let mut values = self.command.iter().filter_map(|word| {
            let rest = word.strip_prefix("--")?.strip_prefix(name)?;
            rest.strip_prefix('=')
        });
        values.next_back()
    }
}

/// Returns whether a path is that of this program. Linux appends ` (deleted)` to a replaced file's
/// path.
fn is_ours(program: &str) -> bool {
    let program = program.strip_suffix(" (deleted)").unwrap_or(program);
    program.rsplit('/').next() == Some(PROGRAM)
}

/// Lists the processes of this program that belong to this user, except this one.
///
/// # Errors
/// Returns the system's error, if it doesn't list processes.
pub(crate) fn list() -> io::Result<Vec<RunningProcess>> {
    let mut processes = all_of_user()?;
    processes.retain(|it| it.id != std::process::id());
    processes.sort_by_key(|it| it.id);
    Ok(processes)
}

/// Lists the processes of all users, as far as the system shows them.
///
/// # Errors
/// Returns the system's error, if it doesn't list processes.
pub(crate) fn list_all() -> io::Result<Vec<RunningProcess>> {
    let mut processes = all()?;
    processes.sort_by_key(|it| it.id);
    Ok(processes)
}

#[cfg(target_os = "linux")]
fn all_of_user() -> io::Result<Vec<RunningProcess>> {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    let user = crate::sys::user_id();
    let is_own = |it: &RunningProcess| {
        let directory = format!("/proc/{}", it.id);
        let owner = fs::metadata(&directory).map(|it| it.uid()).ok();
        let program = fs::read_link(format!("{directory}/exe"));
        owner == Some(user) && program.is_ok_and(|it| is_ours(&it.to_string_lossy()))
    };
    Ok(all()?.into_iter().filter(is_own).collect())
}

#[cfg(target_os = "linux")]
fn all() -> io::Result<Vec<RunningProcess>> {
    use std::fs;
    let all = fs::read_dir("/proc")?.flatten().filter_map(|entry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        let command = fs::read(entry.path().join("cmdline")).ok()?;
        let command = command.strip_suffix(b"\0").unwrap_or(&command);
        let words = command.split(|byte| *byte == 0);
        let words = words.map(|word| String::from_utf8_lossy(word).into_owned());
        Some(RunningProcess {
            id,
            command: words.collect(),
        })
    });
    Ok(all.collect())
}

#[cfg(not(target_os = "linux"))]
fn all_of_user() -> io::Result<Vec<RunningProcess>> {
    let user = crate::sys::user_id().to_string();
    let mut processes = ps(&["-U", &user])?;
    processes.retain(|it| it.command.first().is_some_and(|it| is_ours(it)));
    Ok(processes)
}

#[cfg(not(target_os = "linux"))]
fn all() -> io::Result<Vec<RunningProcess>> {
    ps(&["-A"])
}

#[cfg(not(target_os = "linux"))]
fn ps(which: &[&str]) -> io::Result<Vec<RunningProcess>> {
    let mut ps = std::process::Command::new("/bin/ps");
    ps.arg("-ww").args(which).args(["-o", "pid=,args="]);
    let told = ps.output()?;
    match told.status.success() {
        true => Ok(read_ps(&String::from_utf8_lossy(&told.stdout))),
        false => {
            let why = String::from_utf8_lossy(&told.stderr);
            Err(io::Error::other(format!("ps: {}", why.trim())))
        }
    }
}

/// Reads lines of `ps -o pid=,args=`. These separate words by spaces, so a word that contains one
/// is read as several.
#[cfg(any(test, not(target_os = "linux")))]
fn read_ps(text: &str) -> Vec<RunningProcess> {
    let read = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let id = words.next()?.parse().ok()?;
        let command: Vec<String> = words.map(str::to_owned).collect();
        (!command.is_empty()).then_some(RunningProcess { id, command })
    });
    read.collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_ps_are_read() {
        let text = "    1 /sbin/launchd\n  501 /usr/local/bin/hvsock run /etc/hvsock.toml\n\
            77 vi hvsock\n  502 hvsock forward --control=off tcp://127.0.0.1:1 /x\nnone\n";
        let read = read_ps(text);
        let ids: Vec<u32> = read.iter().map(|it| it.id).collect();
        assert_eq!(ids, [1, 501, 77, 502]);
        assert_eq!(read[1].command[1..], ["run", "/etc/hvsock.toml"]);
        assert_eq!(read[3].option("control"), Some("off"));
        assert_eq!(read[1].option("control"), None);
    }

    #[test]
    fn a_program_is_known_by_its_file() {
        for (program, ours) in [
            ("/usr/bin/hvsock", true),
            ("hvsock", true),
            ("/tmp/hvsock (deleted)", true),
            ("/usr/bin/hvsock-7", false),
            ("/hvsock/cat", false),
        ] {
            assert_eq!(is_ours(program), ours, "{program}");
        }
    }
}
