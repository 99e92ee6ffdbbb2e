//! The host's services, to which the guest's dials lead.

use crate::guest::LONG;
use socket2::{Domain, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;

#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) tcp: SocketAddr,
    pub(crate) unix: PathBuf,
    /// Bound, so that nobody else gets it, and not listened on.
    pub(crate) refusing: SocketAddr,
    _refusing: Socket,
}

impl Host {
    pub(crate) fn start(root: &Path) -> Host {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let unix = root.join("host.sock");
        let listener = UnixListener::bind(&unix).unwrap();
        let refusing = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        refusing.bind(&any.into()).unwrap();
        let host = Host {
            tcp: tcp.local_addr().unwrap(),
            unix,
            refusing: refusing.local_addr().unwrap().as_socket().unwrap(),
            _refusing: refusing,
        };
        thread::spawn(move || {
            serve(tcp.incoming(), |stream| {
                let _ = stream.set_read_timeout(Some(LONG));
                let _ = stream.set_write_timeout(Some(LONG));
            });
        });
        thread::spawn(move || {
            serve(listener.incoming(), |stream| {
                let _ = stream.set_read_timeout(Some(LONG));
                let _ = stream.set_write_timeout(Some(LONG));
            });
        });
        host
    }
}

/// Echoes on every connection. The thread ends with the process.
fn serve<S: Read + Write + Send + 'static>(
    incoming: impl Iterator<Item = io::Result<S>>,
    prepare: impl Fn(&S) + Copy + Send + 'static,
) {
    for stream in incoming.flatten() {
        thread::spawn(move || {
            let mut stream = stream;
            prepare(&stream);
            // Its client may vanish at any time.
            let _ = echo(&mut stream);
        });
    }
}

fn echo(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}
