//! The vhost-user side: QEMU gives the rings and the guest's memory; packets move between them and
//! the [`Device`].

use std::io::{self, Read, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringState, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::device::{Counters, Device};
use crate::packet::{HEADER, Header};

/// The rings that a vhost device sees, by index; QEMU keeps the third, of events, to itself.
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
const RINGS: usize = 2;

/// What epoll calls the host's sockets and [`Rings::again`]; lower ones are the rings and the end.
pub(crate) const HOST: u64 = 8;
pub(crate) const AGAIN: u64 = 9;

/// How many packets go one way before the other way has its turn, and how many turns are taken
/// before QEMU has its.
const TURN: usize = 128;
const TURNS: usize = 32;

/// The longest packet that Linux sends.
const LONGEST: usize = 64 * 1024;

type Memory = GuestMemoryLoadGuard<GuestMemoryMmap>;

pub(crate) struct Rings {
    inner: Mutex<Inner>,
    guest_cid: u64,
    /// Wakes its own loop.
    pub(crate) again: (EventConsumer, EventNotifier),
}

struct Inner {
    device: Device,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// The rings have been stopped since they last ran.
    stopped: bool,
}

impl Rings {
    pub(crate) fn new(
        device: Device,
        guest_cid: u64,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
    ) -> io::Result<Rings> {
        Ok(Rings {
            inner: Mutex::new(Inner {
                device,
                memory,
                stopped: true,
            }),
            guest_cid,
            again: new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?,
        })
    }

    pub(crate) fn counters(&self) -> Counters {
        self.lock().device.counters()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VhostUserBackend for Rings {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        RINGS
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
    }

    fn set_event_idx(&self, _enabled: bool) {}

    /// The guest's CID is all that there is to configure.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.guest_cid.to_le_bytes();
        let (start, length) = (offset as usize, size as usize);
        let field = start
            .checked_add(length)
            .and_then(|end| config.get(start..end));
        field.map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.lock().memory = memory;
        Ok(())
    }

    /// The guest's driver has let go of a ring: it reboots. As with hyperkit, connections stay: the
    /// kernel that comes resets those that speak to it. Taking the lock is the point: when this
    /// returns no ring is in use.
    fn stop_vring(&self, _index: u32) -> io::Result<()> {
        self.lock().stopped = true;
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        rings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        if u64::from(event) == AGAIN {
            let _ = self.again.0.consume();
        }
        let mut inner = self.lock();
        for _ in 0..TURNS {
            let seen = inner.device.look_at_host();
            let moved = inner.hear(&rings[FROM_GUEST]) + inner.tell(&rings[TO_GUEST]);
            if !seen && moved == 0 {
                return Ok(());
            }
        }
        // There may be more, of which epoll will not tell.
        let _ = self.again.1.notify();
        Ok(())
    }
}

impl Inner {
    /// Takes what the guest has sent; how many packets.
    fn hear(&mut self, ring: &VringRwLock) -> usize {
        let memory = self.memory.memory();
        let mut ring = ring.get_mut();
        if !is_running(&ring) {
            return 0;
        }
        if self.stopped {
            self.stopped = false;
            self.device.booted();
        }
        let mut count = 0;
        while count < TURN && self.device.may_hear() {
            let Some(chain) = ring.get_queue_mut().pop_descriptor_chain(memory.clone()) else {
                break;
            };
            let head = chain.head_index();
            if let Some((header, data)) = read_packet(chain, &memory) {
                self.device.hear(&header, &data);
            }
            // Fails only for a ring outside of the guest's memory, and that is the guest's own
            // affair.
            let _ = ring.add_used(head, 0);
            count += 1;
        }
        if count > 0 {
            let _ = ring.signal_used_queue();
        }
        count
    }

    /// Gives the guest what it is to be told, as far as it has left room for it; how many packets.
    fn tell(&mut self, ring: &VringRwLock) -> usize {
        let memory = self.memory.memory();
        let mut ring = ring.get_mut();
        let mut count = 0;
        while count < TURN && self.device.has_next() && is_running(&ring) {
            let Some(chain) = ring.get_queue_mut().pop_descriptor_chain(memory.clone()) else {
                break;
            };
            let head = chain.head_index();
            let Ok(mut writer) = chain.writer(&memory) else {
                let _ = ring.add_used(head, 0);
                continue;
            };
            let room = writer.available_bytes().saturating_sub(HEADER);
            let Some((header, data)) = self.device.next(room) else {
                // It turned out that there was nothing; the room stays the guest's.
                ring.get_queue_mut().go_to_previous_position();
                break;
            };
            let written = writer
                .write_all(&header.to_bytes())
                .and_then(|()| writer.write_all(&data));
            let length = written.map_or(0, |()| HEADER + data.len());
            let _ = ring.add_used(head, length as u32);
            count += 1;
        }
        if count > 0 {
            let _ = ring.signal_used_queue();
        }
        count
    }
}

/// The guest has set it up, and QEMU hasn't taken it back.
fn is_running(ring: &VringState) -> bool {
    ring.is_enabled() && ring.get_queue().ready()
}

/// The packet in a chain, unless it is broken.
fn read_packet(chain: DescriptorChain<Memory>, memory: &Memory) -> Option<(Header, Vec<u8>)> {
    let mut reader = chain.reader(memory).ok()?;
    let mut header = [0; HEADER];
    reader.read_exact(&mut header).ok()?;
    let header = Header::parse(&header);
    let length = header.length as usize;
    if length > LONGEST {
        return None;
    }
    let mut data = vec![0; length];
    reader.read_exact(&mut data).ok()?;
    Some((header, data))
}
