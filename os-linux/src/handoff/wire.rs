//! A [`Handoff`] through a Unix socket: JSON as Firecracker sends it to its page fault handlers, with more keys that it does
//! not need, and the descriptors beside it (SCM_RIGHTS).

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, getsockopt, recvmsg, sendmsg, sockopt::PeerCredentials,
};
use ramshot_core::{BlockName, GuestAddr, HostAddr, Treatment};
use serde::{Deserialize, Serialize};

use super::Handoff;
use crate::ram::{Region, RegionFile};

/// Longest message taken, in bytes: thousands of regions.
const MOST_BYTES: usize = 1 << 20;
/// Most descriptors in one message (the kernel's SCM_MAX_FD).
const MOST_FDS: usize = 253;

/// Why guest RAM was not handed over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandoffError {
    /// The socket.
    #[error("the socket to the other process: {what}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// The message is not one.
    #[error("what came through the socket is no list of guest memory mappings: {0}")]
    Message(#[source] serde_json::Error),
    /// There is something wrong with it.
    #[error("{0}")]
    Invalid(String),
}

/// A region as it is written. The keys of Firecracker's `GuestRegionUffdMapping`, then ours.
#[derive(Debug, Serialize, Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    /// In the file that is restored.
    #[serde(default)]
    offset: u64,
    /// Bytes. Not needed here: the kernel knows.
    #[serde(default)]
    page_size: u64,
    /// Bytes too, whatever it is called; for handlers that know no other.
    #[serde(default)]
    page_size_kib: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    guest_addr: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    used: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    treatment: Option<Kind>,
    /// Which of the descriptors, 1 being the first after the userfaultfd, and from where on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<(usize, u64)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Tracked,
    ReadOnly,
    InPause,
    Ignored,
}

const KINDS: [(Kind, Treatment); 4] = [
    (Kind::Tracked, Treatment::Tracked),
    (Kind::ReadOnly, Treatment::ReadOnly),
    (Kind::InPause, Treatment::InPause),
    (Kind::Ignored, Treatment::Ignored),
];

impl Handoff {
    /// Sends it. The other end's [`receive`](Self::receive) expects nothing after it before it has answered.
    ///
    /// # Errors
    /// The socket's; more files behind the regions than one message can carry (252).
    pub fn send(&self, socket: &UnixStream) -> Result<(), HandoffError> {
        let mut fds = vec![self.userfaultfd.as_raw_fd()];
        let mut mappings = Vec::with_capacity(self.regions.len());
        let mut offset = 0;
        for region in &self.regions {
            let file = region.file.as_ref().map(|file| {
                let fd = file.file.as_raw_fd();
                let at = fds.iter().skip(1).position(|&known| known == fd).map_or(fds.len(), |at| at + 1);
                if at == fds.len() {
                    fds.push(fd);
                }
                (at, file.offset)
            });
            let page_size = crate::backing::base_page_size();
            mappings.push(Mapping {
                base_host_virt_addr: region.host.0,
                size: region.len,
                offset,
                page_size,
                page_size_kib: page_size,
                name: Some(region.name.clone()),
                guest_addr: Some(region.guest.0),
                used: region.used,
                treatment: KINDS.iter().find(|(_, treatment)| *treatment == region.treatment).map(|&(kind, _)| kind),
                file,
            });
            offset = offset.saturating_add(region.len);
        }
        if fds.len() > MOST_FDS {
            let files = fds.len() - 1;
            return Err(HandoffError::Invalid(format!(
                "guest RAM is made of {files} files, and a message carries {} descriptors at most; use fewer files",
                MOST_FDS - 1
            )));
        }
        let text = serde_json::to_vec(&mappings).map_err(HandoffError::Message)?;
        let failed = |source: io::Error| HandoffError::Socket { what: "sending", source };
        let control = [ControlMessage::ScmRights(&fds)];
        let sent = loop {
            match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&text)], &control, MsgFlags::MSG_NOSIGNAL, None) {
                Err(nix::Error::EINTR) => {}
                result => break result.map_err(|errno| failed(errno.into()))?,
            }
        };
        // The descriptors went with the first byte.
        let mut socket = socket;
        socket.write_all(text.get(sent..).unwrap_or_default()).map_err(failed)
    }

    /// Receives it: from [`send`](Self::send), or from Firecracker (`mem_backend` of type `Uffd`, all versions up to
    /// 1.17). The process is the one at the other end of the socket, as the kernel knows it.
    ///
    /// Firecracker does not say what regions are called and where the guest sees them. They are called `ram0`, `ram1`, ... and lie
    /// in guest memory as they lie in the file; [`lay_out_as`](Self::lay_out_as) says better.
    ///
    /// It waits as long as the socket's read timeout allows.
    ///
    /// # Errors
    /// The socket's; what is no such message.
    pub fn receive(socket: &UnixStream) -> Result<Self, HandoffError> {
        let peer = getsockopt(&socket, PeerCredentials)
            .map_err(|errno| HandoffError::Socket { what: "SO_PEERCRED", source: errno.into() })?;
        let pid = u32::try_from(peer.pid()).ok().filter(|&pid| pid != 0);
        let pid = pid.ok_or_else(|| {
            HandoffError::Invalid(
                "the process at the other end of the socket cannot be seen from this PID namespace".into(),
            )
        })?;
        let (text, mut fds) = receive_message(socket)?;
        let mappings: Vec<Mapping> = serde_json::from_slice(&text).map_err(HandoffError::Message)?;
        if mappings.is_empty() {
            return Err(HandoffError::Invalid("the message has no region of guest memory".into()));
        }
        if fds.is_empty() {
            return Err(HandoffError::Invalid("the message came without a userfaultfd (SCM_RIGHTS)".into()));
        }
        let userfaultfd = fds.remove(0);
        let files: Vec<File> = fds.into_iter().map(File::from).collect();
        let mut regions = Vec::with_capacity(mappings.len());
        for (number, mapping) in mappings.into_iter().enumerate() {
            let file = match mapping.file {
                None => None,
                Some((at, offset)) => {
                    let file = at.checked_sub(1).and_then(|at| files.get(at)).ok_or_else(|| {
                        HandoffError::Invalid(format!(
                            "region {number} names descriptor {at}, and {} came",
                            files.len()
                        ))
                    })?;
                    let file = file
                        .try_clone()
                        .map_err(|source| HandoffError::Socket { what: "duplicating a descriptor", source })?;
                    Some(RegionFile { file, offset })
                }
            };
            let treatment = mapping
                .treatment
                .and_then(|kind| KINDS.iter().find(|(known, _)| *known == kind).map(|&(_, treatment)| treatment));
            regions.push(Region {
                name: mapping.name.unwrap_or_else(|| format!("ram{number}")),
                guest: GuestAddr(mapping.guest_addr.unwrap_or(mapping.offset)),
                host: HostAddr(mapping.base_host_virt_addr),
                len: mapping.size,
                used: mapping.used,
                treatment: treatment.unwrap_or(Treatment::Tracked),
                file,
            });
        }
        Ok(Self { pid, userfaultfd, regions })
    }

    /// Calls regions what the blocks of the image that is restored are called, and puts them where the guest saw those: the first the
    /// first, and so on; a block is its name, guest address and length in use. For a [`receive`](Self::receive) from a VMM
    /// that did not say.
    ///
    /// # Errors
    /// There are more or fewer, or one has another length.
    pub fn lay_out_as(
        &mut self,
        blocks: impl IntoIterator<Item = (BlockName, GuestAddr, u64)>,
    ) -> Result<(), HandoffError> {
        let blocks: Vec<_> = blocks.into_iter().collect();
        if blocks.len() != self.regions.len() {
            let (there, here) = (blocks.len(), self.regions.len());
            return Err(HandoffError::Invalid(format!(
                "the VM handed over has {here} regions of guest memory, and the layout has {there}"
            )));
        }
        for (region, (name, _, len)) in self.regions.iter().zip(&blocks) {
            if region.len != *len {
                return Err(HandoffError::Invalid(format!(
                    "the region at {} is {:#x} bytes long, and RAM block {name:?} {len:#x}",
                    region.host, region.len
                )));
            }
        }
        for (region, (name, guest, _)) in self.regions.iter_mut().zip(blocks) {
            region.name = name.to_string();
            region.guest = guest;
        }
        Ok(())
    }
}

/// One JSON value, however many pieces it comes in, and the descriptors that came with it.
fn receive_message(mut socket: &UnixStream) -> Result<(Vec<u8>, Vec<OwnedFd>), HandoffError> {
    let failed = |source: io::Error| HandoffError::Socket { what: "receiving", source };
    let mut piece = [0u8; 4096];
    let mut space = nix::cmsg_space!([RawFd; MOST_FDS]);
    let (mut got, fds) = loop {
        let mut into = [IoSliceMut::new(&mut piece)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(socket.as_raw_fd(), &mut into, Some(&mut space), flags) {
            Err(nix::Error::EINTR) => continue,
            result => result.map_err(|errno| failed(errno.into()))?,
        };
        if message.flags.contains(MsgFlags::MSG_CTRUNC) {
            let text = "descriptors of the message were lost: this process may open no more (ulimit -n)";
            return Err(HandoffError::Invalid(text.into()));
        }
        let mut fds = Vec::new();
        for control in message.cmsgs().map_err(|errno| failed(errno.into()))? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
                fds.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        break (message.bytes, fds);
    };
    let mut text = Vec::new();
    loop {
        if got == 0 {
            let error = io::Error::new(io::ErrorKind::UnexpectedEof, "it was closed before the message was whole");
            return Err(failed(error));
        }
        text.extend_from_slice(piece.get(..got).unwrap_or_default());
        match serde_json::from_slice::<serde::de::IgnoredAny>(&text) {
            Ok(_) => return Ok((text, fds)),
            Err(error) if error.is_eof() && text.len() < MOST_BYTES => {}
            Err(error) => return Err(HandoffError::Message(error)),
        }
        got = loop {
            match socket.read(&mut piece) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result.map_err(failed)?,
            }
        };
    }
}
