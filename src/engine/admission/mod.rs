//! The admission of connections to one VM: its slots and their quotas, and the pace of dials. VMs
//! of all families have gates. Those of hyperkit VMs have two caps and a pace that keep the VM's
//! device alive; what is said of a device below is true of them alone ([`Gate`] asks the family's
//! `VmTraits`).
//!
//! Rule 5 of a good neighbour (`hyperkit.md`): a burst of dials overflows the ring of 512 replies
//! in which the device keeps what the guest has not fetched yet, and the VM dies. So it does after
//! 512 dials to a guest that does not answer.
//!
//! hyperkit reports nothing when a guest accepts. A guest has taken a dial, and all dials before
//! it, once the first byte or the EOF arrives on that very connection. (What arrives on an older
//! one may have lain in buffers since before the guest stopped.) Services that wait for their
//! client to speak send nothing. So when the cap is reached, a probe asks the guest's kernel: a
//! dial of a port on which nobody listens, which the kernel refuses as soon as it runs. The same
//! probe tells whether the dial of a held client was taken.
//!
//! A guest dials the host whether there is a slot or not, and each of its dials has taken one by
//! the time it is accepted. So a guest's dials are bounded by their end: those beyond their quota
//! ([`guests`]) are not served, but ended at once, gracefully.
//!
//! What is counted are the slots that the device counts. A connection that its guest has not ended
//! in time keeps its slot in the device, closed or not. So its socket stays open where it can be,
//! half-closed, and the slot is [lost](Slot::mark_held) until the guest ends it, too. What had to
//! be closed is [lost](Slot::mark_lost) until the VM is another one: nothing tells what the guest
//! does.
//!
//! A VM that has no slot free meets three kinds of client:
//!
//! | client | where it waits | until | told by |
//! |---|---|---|---|
//! | one that is not accepted yet | in its listener's backlog | the gate wakes the worker ([`Gate::queue`]) | nobody; the forward's status and the log say it (`proxy/listeners/accepting.rs`) |
//! | one that is: it was held, or a forward of this process dialled it | in a queue of its forward (`proxy/connections/queues.rs`) | the gate admits it, which is asked every 10 ms ([`Gate::admit`]); at most for the dial timeout, or for the rule's `wait` if that is set | `time_out` in `connection/refusing.rs` |
//! | a guest of the VM, which dials the host | nowhere: it is accepted | it is ended at once ([`Gate::accept`]) | `turn_away` in `connection/beginning.rs` |
//!
//! A gate decides and counts. It knows no socket, and makes no dial.

mod admit;
mod gate;
mod guests;
mod heard;
pub(crate) mod quotas;
#[cfg_attr(not(all(unix, feature = "cli")), allow(dead_code))]
pub(crate) mod sharing;
mod silence;
mod silent;
mod slot;

pub(crate) use admit::Admission;
pub(crate) use gate::{Full, Gate, GateId, GateLimits, SlotWake, Wake};
pub(crate) use guests::{GuestSlot, NotServed};
pub(crate) use silence::SilenceCheck;
pub(crate) use slot::{DrainEnd, Reservation, Slot};

#[cfg(test)]
mod tests;
