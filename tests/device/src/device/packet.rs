//! The header of a virtio vsock packet (virtio 1.2, section 5.10.6), as it stands in the rings.
//!
//! Not the crate virtio-vsock's: that wants header and data in a descriptor each, and drivers are
//! free to do otherwise.

/// How long a header is.
pub(crate) const HEADER: usize = 44;

/// The host's CID.
pub(crate) const HOST_CID: u64 = 2;

/// The only type there is here: a stream.
pub(crate) const STREAM: u16 = 1;

/// Flags of [`Op::Shutdown`]: the sender will receive no more, send no more.
pub(crate) const NO_RECEIVE: u32 = 1;
pub(crate) const NO_SEND: u32 = 2;
pub(crate) const NEITHER: u32 = NO_RECEIVE | NO_SEND;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

const OPS: [Op; 7] = [
    Op::Request,
    Op::Response,
    Op::Reset,
    Op::Shutdown,
    Op::Data,
    Op::CreditUpdate,
    Op::CreditRequest,
];

/// The header, numbers as the machine has them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) source_cid: u64,
    pub(crate) target_cid: u64,
    pub(crate) source_port: u32,
    pub(crate) target_port: u32,
    pub(crate) length: u32,
    pub(crate) kind: u16,
    /// None: one that virtio 1.2 doesn't know.
    pub(crate) op: Option<Op>,
    pub(crate) flags: u32,
    pub(crate) buf_alloc: u32,
    pub(crate) fwd_cnt: u32,
}

impl Header {
    pub(crate) fn parse(bytes: &[u8; HEADER]) -> Header {
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Header {
            source_cid: long(0),
            target_cid: long(8),
            source_port: word(16),
            target_port: word(20),
            length: word(24),
            kind: half(28),
            op: usize::from(half(30))
                .checked_sub(1)
                .and_then(|op| OPS.get(op).copied()),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    pub(crate) fn to_bytes(self) -> [u8; HEADER] {
        let op = self
            .op
            .and_then(|op| OPS.iter().position(|&known| known == op))
            .map_or(0, |position| position as u16 + 1);
        let mut bytes = [0; HEADER];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&self.source_cid.to_le_bytes());
        put(&self.target_cid.to_le_bytes());
        put(&self.source_port.to_le_bytes());
        put(&self.target_port.to_le_bytes());
        put(&self.length.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&op.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buf_alloc.to_le_bytes());
        put(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_ring() {
        let header = Header {
            source_cid: 2,
            target_cid: 3,
            source_port: 0x0102_0304,
            target_port: 7,
            length: 4096,
            kind: STREAM,
            op: Some(Op::Shutdown),
            flags: NO_SEND,
            buf_alloc: 262_144,
            fwd_cnt: 9,
        };
        let bytes = header.to_bytes();
        assert_eq!((bytes[28], bytes[30], bytes[32]), (1, 4, 2));
        assert_eq!(
            format!("{:?}", Header::parse(&bytes)),
            format!("{header:?}")
        );
    }
}
