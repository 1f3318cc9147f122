//! Guest RAM handed over through a socket: what is sent, what Firecracker sends, what nobody should.
#![cfg(feature = "handoff")]
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{IoSlice, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use common::{LONG, Memory, PAGE, events, is_registered, raw_uffd, release, writer};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use ramshot_core::{BlockIndex, BlockName, GuestAddr, HostAddr, RamSource, RamTarget, Treatment, WriteTracker};
use ramshot_linux::{
    Filler, FillerOptions, GuestRam, Handoff, MapTarget, Region, RegionFile, TrackError, Tracker, TrackerOptions,
    compatible,
};

fn region(memory: &Memory, file: bool) -> Region {
    let file = memory.file.as_ref().filter(|_| file);
    Region {
        name: "ram0".to_owned(),
        guest: GuestAddr(0),
        host: memory.address(0),
        len: memory.len as u64,
        used: None,
        treatment: Treatment::Tracked,
        file: file.map(|file| RegionFile { file: file.try_clone().unwrap(), offset: 0 }),
    }
}

/// This process in the part of both.
fn handed_over(memory: &Memory) -> Arc<GuestRam> {
    let handoff = Handoff::of_this_process(vec![region(memory, true)], false).unwrap();
    Arc::new(GuestRam::from_handoff(handoff).unwrap())
}

#[test]
fn what_is_sent_is_received() {
    let (one, two) = (Memory::anonymous(4 * PAGE), Memory::memfd(8 * PAGE));
    let second = Region {
        name: "pc.ram \"2\"".to_owned(),
        guest: GuestAddr(4 << 30),
        used: Some(PAGE as u64),
        treatment: Treatment::ReadOnly,
        ..region(&two, true)
    };
    let third = Region { name: "third".to_owned(), guest: GuestAddr(8 << 30), ..region(&two, true) };
    let (here, there) = UnixStream::pair().unwrap();
    let handoff = Handoff::of_this_process(vec![region(&one, true), second, third], false).unwrap();
    handoff.send(&here).unwrap();
    let got = Handoff::receive(&there).unwrap();
    assert_eq!(got.pid, std::process::id());
    let show = |handoff: &Handoff| -> Vec<String> {
        let show = |region: &Region| {
            let Region { name, guest, host, len, used, treatment, file } = region;
            format!("{name} {guest} {host} {len} {used:?} {treatment:?} {:?}", file.as_ref().map(|file| file.offset))
        };
        handoff.regions.iter().map(show).collect()
    };
    assert_eq!(show(&got), show(&handoff));
    assert!(got.regions[0].file.is_none());
}

/// As Firecracker 1.17 writes it.
fn firecracker(memory: &Memory) -> String {
    format!(
        r#"[{{"base_host_virt_addr":{},"size":{},"offset":0,"page_size":4096,"page_size_kib":4096}}]"#,
        memory.address(0).0,
        memory.len
    )
}

fn send(socket: &UnixStream, text: &str, fds: &[OwnedFd]) {
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &control[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(text.as_bytes())], control, MsgFlags::empty(), None).unwrap();
}

#[test]
fn firecrackers_message_is_understood_in_pieces_too() {
    let memory = Arc::new(Memory::anonymous(4 * PAGE));
    memory.write(PAGE, 7);
    let text = firecracker(&memory);
    for cut in [1, 17, text.len() - 1, text.len()] {
        let (mut here, there) = UnixStream::pair().unwrap();
        // Its context knows of discards and nothing else.
        send(&here, &text[..cut], &[raw_uffd(Some(1 << 3))]);
        let mut handoff = std::thread::scope(|scope| {
            let receiving = scope.spawn(|| Handoff::receive(&there).unwrap());
            std::thread::sleep(Duration::from_millis(20));
            here.write_all(&text.as_bytes()[cut..]).unwrap();
            receiving.join().unwrap()
        });
        let name = BlockName::new("pc.ram").unwrap();
        let too_many = [(name, GuestAddr(0), 4 * PAGE as u64), (name, GuestAddr(0), 1)];
        assert!(
            handoff
                .lay_out_as(too_many)
                .unwrap_err()
                .to_string()
                .contains("1 regions of guest memory, and the layout has 2")
        );
        let other = handoff.lay_out_as([(name, GuestAddr(0), PAGE as u64)]).unwrap_err().to_string();
        assert!(other.contains("0x4000 bytes long") && other.contains("pc.ram") && other.contains("0x1000"), "{other}");
        assert_eq!(handoff.regions[0].name, "ram0");
        handoff.lay_out_as([(name, GuestAddr(0x1000), 4 * PAGE as u64)]).unwrap();
        let ram = Arc::new(GuestRam::from_handoff(handoff).unwrap());
        assert_eq!(ram.table().blocks()[0].name, name);

        let tracker = Tracker::open(Arc::clone(&ram), &TrackerOptions::default()).unwrap();
        tracker.protect(memory.range(PAGE, PAGE)).unwrap();
        let write = writer(&memory, PAGE, 8);
        assert_eq!(events(&tracker, LONG).len(), 1);
        let mut bytes = [0; 64];
        ram.read(memory.address(PAGE), &mut bytes).unwrap();
        assert_eq!(bytes[0], 7);
        release(&tracker, memory.range(PAGE, PAGE));
        write.finish();
        ram.read(memory.address(PAGE), &mut bytes).unwrap();
        assert_eq!(bytes[0], 8);
        memory.write(PAGE, 7);
    }
}

#[test]
fn what_is_no_handoff_is_refused_with_the_reason() {
    let memory = Memory::anonymous(PAGE);
    let fine = firecracker(&memory);
    let fd = || vec![raw_uffd(Some(0))];
    let long = format!("[{}", " ".repeat(2 << 20));
    let named = fine.replace("}]", r#","file":[2,0]}]"#);
    for (text, fds, said) in [
        (fine.as_str(), vec![], "without a userfaultfd"),
        ("[]", fd(), "no region"),
        ("hello", fd(), "expected value"),
        ("{\"a\":1}", fd(), "invalid type: map"),
        ("[{\"size\":1}]", fd(), "missing field `base_host_virt_addr`"),
        (&fine[..20], fd(), "closed before the message was whole"),
        ("", vec![], "closed before the message was whole"),
        (&named, fd(), "names descriptor 2, and 0 came"),
        (&format!("{fine} more"), fd(), "trailing characters"),
        (&long, fd(), "EOF while parsing"),
    ] {
        let (mut here, there) = UnixStream::pair().unwrap();
        let error = std::thread::scope(|scope| {
            scope.spawn(move || {
                let first = text.len().min(1000);
                if first > 0 {
                    send(&here, &text[..first], &fds);
                }
                // The other end may have heard enough.
                let _ = here.write_all(&text.as_bytes()[first..]);
            });
            let error = Handoff::receive(&there).unwrap_err();
            drop(there);
            error
        });
        let text = std::error::Error::source(&error).map_or(error.to_string(), |source| format!("{error}: {source}"));
        assert!(text.contains(said), "{said:?}: {text}");
    }
    // And one who says nothing does not hold us for ever.
    let (_here, there) = UnixStream::pair().unwrap();
    there.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(Handoff::receive(&there).is_err());
}

#[test]
fn memory_handed_over_is_read_and_not_filled() {
    for (memory, file) in
        [(Memory::anonymous(4 * PAGE), false), (Memory::memfd(4 * PAGE), true), (Memory::memfd(4 * PAGE), false)]
    {
        memory.write(PAGE + 5, 9);
        let handoff = Handoff::of_this_process(vec![region(&memory, file)], false).unwrap();
        let ram = GuestRam::from_handoff(handoff).unwrap();
        let mut bytes = vec![1; 3 * PAGE];
        ram.read(HostAddr(memory.address(0).0 + 3), &mut bytes).unwrap();
        assert_eq!((bytes[PAGE + 1], bytes[PAGE + 2], bytes[PAGE + 3]), (0, 9, 0));
        assert_eq!(bytes.iter().filter(|&&byte| byte != 0).count(), 1);
        assert_eq!(ram.read(memory.address(PAGE), &mut vec![0; 4 * PAGE]).unwrap_err().errno, libc::EFAULT);
        let error = ram.with_mut(memory.address(0), 8, &mut |_| panic!("called")).unwrap_err();
        assert_eq!(error.errno, libc::EOPNOTSUPP);
        assert!(error.to_string().contains("lazily"));
    }
}

#[test]
fn one_at_a_time_uses_the_userfaultfd() {
    let memory = Memory::anonymous(4 * PAGE);
    memory.write(0, 1);
    let ram = handed_over(&memory);
    let tracker = Tracker::open(Arc::clone(&ram), &TrackerOptions::default()).unwrap();
    let second = Tracker::open(Arc::clone(&ram), &TrackerOptions::default()).unwrap_err();
    assert!(matches!(&second, TrackError::Unsuitable(m) if m.why.contains("another snapshot")), "{second}");
    assert!(Filler::open(Arc::clone(&ram), &FillerOptions::default()).is_err());
    tracker.protect(memory.range(0, PAGE)).unwrap();
    drop(tracker);
    assert!(!is_registered(memory.address(0), "uw"));
    assert!(compatible(&ram).iter().all(|(_, verdict)| verdict.is_ok()));
    // SAFETY: it is refused.
    let target = unsafe { MapTarget::new(Arc::clone(&ram)) };
    let missing = target.check(BlockIndex(0), 0).unwrap_err();
    assert!(missing.to_string().contains("memory of another process"), "{missing}");
    // After it, the next.
    drop(Tracker::open(ram, &TrackerOptions::default()).unwrap());
}

/// A lazy restore that does not begin must not make ordinary memory, which is zero, of what the VMM has registered as missing.
#[test]
fn a_restore_that_does_not_begin_leaves_missing_what_was_missing() {
    let memory = Memory::anonymous(4 * PAGE);
    // What is there before is no fresh memory.
    memory.write(0, 1);
    let handoff = Handoff::of_this_process(vec![region(&memory, false)], true).unwrap();
    let ram = Arc::new(GuestRam::from_handoff(handoff).unwrap());
    let error = Filler::open(Arc::clone(&ram), &FillerOptions::default()).unwrap_err();
    assert!(error.to_string().contains("fresh"), "{error}");
    assert!(is_registered(memory.address(0), "um"));
    drop(ram);
    assert!(!is_registered(memory.address(0), "um"));
}
