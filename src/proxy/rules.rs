//! What no rule may ask for.

use std::io;

use super::forward::Rule;
use crate::address::{Address, CID_ANY, PORT_ANY};
use crate::error::{Error, Operation, Result};

/// Refuses a rule that can't work, whatever the system says.
pub(super) fn check<'a>(rule: &Rule, mut others: impl Iterator<Item = &'a Rule>) -> Result<()> {
    let invalid = |operation, address, why| {
        let cause = io::Error::new(io::ErrorKind::InvalidInput, why);
        Err(Error::new(operation, address, cause))
    };
    if matches!(&rule.connect, Address::Tcp(tcp) if tcp.port == 0) {
        let why = "port 0 can't be connected to";
        return invalid(Operation::Connect, &rule.connect, why);
    }
    if matches!(&rule.connect, Address::Vsock(vsock) if vsock.cid == CID_ANY) {
        let why = "there is no CID to connect to";
        return invalid(Operation::Connect, &rule.connect, why)
            .map_err(|error| error.with_remedy("name one, as in vsock://3:1024"));
    }
    if matches!(&rule.connect, Address::Npipe(pipe) if pipe.sddl.is_some()) {
        let why = "sddl says who may connect: it belongs to the address that is listened on";
        return invalid(Operation::Connect, &rule.connect, why);
    }
    let chosen = match &rule.listen {
        Address::Tcp(tcp) => tcp.port == 0,
        Address::Vsock(vsock) => vsock.port == PORT_ANY,
        _ => false,
    };
    if !chosen && others.any(|other| other.listen == rule.listen) {
        return invalid(Operation::Listen, &rule.listen, "it is given twice");
    }
    Ok(())
}
