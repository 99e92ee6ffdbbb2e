//! hyperkit's state directory: its names, and the 18-byte line that asks for a connection.
//!
//! Source of every name and number here: hyperkit's `src/lib/pci_virtio_sock.c`.

/// The CID of the host, as the guest dials it (`VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// The CID of the guest unless hyperkit's `guest_cid=` said otherwise.
pub const GUEST_CID: u32 = 3;

/// The name of the socket on which hyperkit takes connections to the guest (`CONNECT_SOCKET_NAME`).
pub const CONNECT_NAME: &str = "connect";

/// How many bytes [`connect_line`] has.
pub const LINE_LEN: usize = 18;

/// The line that asks hyperkit for a connection to `port` of the guest `cid`: `%08x.%08x\n`.
///
/// hyperkit takes it with one `read` of 18 bytes and closes in silence if fewer are there at that moment: write it in one piece, at once after connect.
pub fn connect_line(cid: u32, port: u32) -> [u8; LINE_LEN] {
    let mut line = [b'\n'; LINE_LEN];
    line[..LINE_LEN - 1].copy_from_slice(socket_name(cid, port).as_bytes());
    line
}

/// The cid and the port in a [`connect_line`]; `None` if hyperkit would not understand it.
pub fn parse_connect_line(line: &[u8; LINE_LEN]) -> Option<(u32, u32)> {
    let text = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (cid, port) = text.split_once('.')?;
    Some((
        u32::from_str_radix(cid, 16).ok()?,
        u32::from_str_radix(port, 16).ok()?,
    ))
}

/// The file name of a socket in the state directory: `%08x.%08x` (cid, port; `PRIaddr`).
pub fn socket_name(cid: u32, port: u32) -> String {
    format!("{cid:08x}.{port:08x}")
}
