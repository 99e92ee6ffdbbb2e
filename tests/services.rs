//! Windows' register of services, by the command and by the library: for real on Windows (and under
//! Wine), its absence elsewhere. What is registered here is taken out again.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::{Command, Output};

use hvsock::address::{Port, ServiceId};
use hvsock::services;

fn hvsock(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hvsock"))
        .args(arguments)
        .output()
        .unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn fails(arguments: &[&str], code: i32, parts: &[&str]) {
    let output = hvsock(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    for part in parts {
        assert!(said.contains(part), "{arguments:?}: {said}");
    }
}

#[test]
fn words_that_are_no_service_are_told() {
    fails(
        &["register", "ssh"],
        2,
        &["'ssh'", "neither a GUID nor a port"],
    );
    fails(&["unregister", "4294967296"], 2, &["larger than"]);
    fails(&["register"], 2, &["<GUID|PORT>"]);
    fails(&["services", "5000"], 2, &["5000"]);
    fails(&["cat", "--register", "hvsock:///5000"], 2, &["--listen"]);
}

#[test]
fn the_help_has_an_example() {
    for command in ["register", "unregister", "services", "vms"] {
        let output = hvsock(&[command, "--help"]);
        assert_eq!(output.status.code(), Some(0));
        let said = out(&output);
        let example = said.split_once("Example").unwrap().1;
        assert!(example.contains(&format!("hvsock {command}")), "{said}");
    }
}

#[cfg(not(windows))]
#[test]
fn other_systems_say_that_it_is_windows() {
    for arguments in [
        &["register", "5000"][..],
        &["register", "5000", "--name", "x"],
        &["unregister", "3049197C-9A4E-4FBF-9367-97F792F16994"],
        &["services"],
    ] {
        fails(arguments, 2, &["only Windows", "nothing here needs one"]);
    }
    fails(
        &["cat", "-l", "--register", "hvsock:///5000"],
        2,
        &["Windows"],
    );
    let error = services::register(ServiceId::from_port(Port(5000)), None).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::Unsupported);
}

#[cfg(windows)]
mod windows {
    use std::io::{BufRead, BufReader, ErrorKind};
    use std::process::Stdio;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use hvsock::Operation;
    use hvsock::services::{DEFAULT_NAME, Registration, Service};
    use uuid::Uuid;
    use winreg::HKLM;
    use winreg::enums::{KEY_READ, KEY_WOW64_64KEY};

    use super::*;

    /// A service that nobody has, and that isn't registered any more at the end. There is one at a
    /// time: who reads the list while another takes something out of it may miss a third.
    struct Ours(ServiceId, #[allow(dead_code)] MutexGuard<'static, ()>);

    static ONE: Mutex<()> = Mutex::new(());

    impl Ours {
        /// `None`, and what to do, if this user may not register any.
        fn new(id: ServiceId) -> Option<Ours> {
            let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
            match services::register(id, Some("tried")) {
                Ok((_, done)) => assert_eq!(done, Registration::New),
                Err(e) => {
                    assert_eq!(e.kind(), ErrorKind::PermissionDenied, "{e}");
                    assert!(e.remedy().unwrap().contains("as Administrator"), "{e}");
                    eprintln!("skipped: run as Administrator");
                    return None;
                }
            }
            services::unregister(id).unwrap();
            Some(Ours(id, one))
        }

        fn guid() -> Option<Ours> {
            Ours::new(ServiceId(Uuid::from_u128(fastrand::u128(..))))
        }

        fn port() -> Option<Ours> {
            Ours::new(ServiceId::from_port(Port(fastrand::u32(..))))
        }
    }

    impl Drop for Ours {
        fn drop(&mut self) {
            let _ = services::unregister(self.0);
        }
    }

    /// What Hyper-V would read.
    fn element_name(id: ServiceId) -> Option<String> {
        let key = format!(
            r"SOFTWARE\Microsoft\Windows NT\CurrentVersion\Virtualization\GuestCommunicationServices\{}",
            id.0.hyphenated()
        );
        let key = HKLM.open_subkey_with_flags(key, KEY_READ | KEY_WOW64_64KEY);
        Some(key.ok()?.get_value("ElementName").unwrap())
    }

    fn succeeds(arguments: &[&str]) -> String {
        let output = hvsock(arguments);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        out(&output)
    }

    #[test]
    fn a_service_is_registered_listed_renamed_and_unregistered() {
        let Some(ours) = Ours::guid() else { return };
        let id = ours.0;
        // As people copy it.
        let guid = id.0.braced().to_string().to_uppercase();
        assert_eq!(element_name(id), None);
        let said = succeeds(&["register", &guid, "--name", "it's \"mine\" Ä"]);
        assert!(said.contains(&id.to_string()), "{said}");
        assert_eq!(element_name(id).unwrap(), "it's \"mine\" Ä");

        let said = succeeds(&["services"]);
        let row = said.lines().find(|row| row.contains(&id.to_string()));
        assert!(row.unwrap().ends_with("it's \"mine\" Ä"), "{said}");
        assert!(said.starts_with("SERVICE"), "{said}");

        let said = succeeds(&["register", &guid]);
        assert!(said.contains("registered already"), "{said}");
        assert_eq!(element_name(id).unwrap(), "it's \"mine\" Ä");
        let said = succeeds(&["register", &guid, "--name", "other"]);
        assert!(said.contains("renamed") && said.contains("mine"), "{said}");
        assert_eq!(element_name(id).unwrap(), "other");

        let said = succeeds(&["unregister", &guid]);
        assert!(
            said.contains("unregistered") && said.contains("other"),
            "{said}"
        );
        assert_eq!(element_name(id), None);
        fails(
            &["unregister", &guid],
            1,
            &["cannot unregister", "isn't registered", "hvsock services"],
        );
    }

    #[test]
    fn a_port_stands_in_the_list_as_a_port() {
        let Some(ours) = Ours::port() else { return };
        let port = ours.0.port().unwrap();
        succeeds(&["register", &format!("{:#x}", port.0)]);
        assert_eq!(element_name(ours.0).unwrap(), DEFAULT_NAME);
        let said = succeeds(&["services"]);
        let row = said.lines().find(|row| row.contains(&ours.0.0.to_string()));
        assert!(row.unwrap().contains(&port.to_string()), "{said}");
    }

    #[test]
    fn the_library_says_what_was_there() {
        let Some(ours) = Ours::guid() else { return };
        let id = ours.0;
        let service = |name: &str| Service {
            id,
            name: name.to_owned(),
        };
        let new = services::register(id, None).unwrap();
        assert_eq!(new, (service(DEFAULT_NAME), Registration::New));
        let again = services::register(id, Some(DEFAULT_NAME)).unwrap();
        assert_eq!(again, (service(DEFAULT_NAME), Registration::Unchanged));
        let renamed = services::register(id, Some("")).unwrap();
        let was = Registration::Renamed(DEFAULT_NAME.to_owned());
        assert_eq!(renamed, (service(""), was));
        let list = services::list().unwrap();
        assert!(list.contains(&service("")));
        assert!(list.is_sorted_by_key(|service| service.id.0));
        assert_eq!(services::unregister(id).unwrap(), service(""));
        let error = services::unregister(id).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert_eq!(error.operation(), Operation::Unregister);
    }

    #[test]
    fn what_is_below_a_service_goes_with_it_and_keys_that_are_no_guids_are_left_out() {
        let Some(ours) = Ours::guid() else { return };
        let services_key = r"SOFTWARE\Microsoft\Windows NT\CurrentVersion\Virtualization\GuestCommunicationServices";
        let (key, _) = HKLM
            .create_subkey(format!(r"{services_key}\{}\below", ours.0))
            .unwrap();
        drop(key);
        // Nobody has named it.
        let list = services::list().unwrap();
        let found = list.iter().find(|service| service.id == ours.0).unwrap();
        assert_eq!(found.name, "");
        let odd = format!(r"{services_key}\{}", ours.0.0.braced());
        drop(HKLM.create_subkey(&odd).unwrap());
        let again = services::list().unwrap();
        HKLM.delete_subkey(&odd).unwrap();
        let count = again.iter().filter(|service| service.id == ours.0).count();
        assert_eq!(count, 1);
        services::unregister(ours.0).unwrap();
    }

    #[test]
    fn cat_registers_what_it_is_going_to_listen_on() {
        let Some(ours) = Ours::port() else { return };
        let address = format!("hvsock:///{}", ours.0.port().unwrap().0);
        let mut cat = Command::new(env!("CARGO_BIN_EXE_hvsock"))
            .args(["cat", "-l", "--register", &address])
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut err = BufReader::new(cat.stderr.take().unwrap());
        err.read_line(&mut said).unwrap();
        // It goes on to listen, or to find out that it can't.
        let _ = cat.kill();
        cat.wait().unwrap();
        assert!(said.starts_with("hvsock: registered service "), "{said}");
        assert_eq!(element_name(ours.0).unwrap(), DEFAULT_NAME);
    }

    #[test]
    fn cat_registers_no_other_addresses() {
        fails(
            &["cat", "-l", "--register", "tcp://127.0.0.1:0"],
            2,
            &["--register", "hvsock://"],
        );
    }

    /// No Hyper-V, no PowerShell, no rights, no such VM: whichever it is, the name is only a name.
    #[test]
    fn a_vms_name_is_looked_up() {
        let name = "no such VM \" ' $(exit 7) `n; * |";
        let quoted = format!("cannot find VM {name:?}: ");
        fails(&["cat", "--vm", name, "5000"], 1, &[&quoted]);
        fails(
            &["cat", "--vm", name, "3049197C-9A4E-4FBF-9367-97F792F16994"],
            1,
            &[&quoted],
        );
        fails(&["cat", "--vm", name, "ssh"], 2, &["\"ssh\" with --vm"]);
        fails(&["cat", "--vm", "", "5000"], 2, &["neither a VM's name"]);
        // An id is not looked up.
        let output = hvsock(&["cat", "--vm", "parent", "5000"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("hvsock://parent/"), "{said}");
    }

    /// What can't be looked at is skipped; what guests may dial is looked up all the same.
    #[test]
    fn doctor_knows_what_guests_may_dial() {
        let Some(ours) = Ours::port() else { return };
        let port = ours.0.port().unwrap().0.to_string();
        let examine = || {
            let asked = ["--host-port", &port, "--port", "80"];
            let output = hvsock(&[&["doctor", "--vm", "no such VM"][..], &asked].concat());
            assert_eq!(output.status.code(), Some(1));
            out(&output)
        };
        let said = examine();
        assert!(said.contains("not in the registry"), "{said}");
        assert!(said.contains(&format!("hvsock register {port}")), "{said}");
        assert!(said.contains("skip port 80 (0x50)"), "{said}");
        services::register(ours.0, Some("tried")).unwrap();
        let said = examine();
        assert!(said.contains("registered, as \"tried\""), "{said}");
    }
}
