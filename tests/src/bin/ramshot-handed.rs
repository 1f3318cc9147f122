//! A VMM that hands its memory over, to be killed by a test: `ramshot-handed SOCKET LEN [missing]`. It fills LEN bytes (unless
//! they are missing), hands them over, and writes to them for ever. What the handler answers it prints; lines of its
//! standard input it passes on.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ramshot::core::Treatment;
use ramshot::{AnonymousRam, GuestAddr, HostAddr, Region};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, len, more @ ..] = args.as_slice() else { return Err("SOCKET LEN [missing]".into()) };
    let missing = !more.is_empty();
    let len: u64 = len.parse()?;
    let memory = Arc::new(AnonymousRam::new(len)?);
    let words = memory.words();
    if !missing {
        words.iter().step_by(512).for_each(|word| word.store(1, Ordering::Relaxed));
    }
    let region = Region {
        name: "ram0".to_owned(),
        guest: GuestAddr(0),
        host: HostAddr(u64::try_from(words.as_ptr().expose_provenance())?),
        len,
        used: None,
        treatment: Treatment::Tracked,
        file: None,
    };
    let handoff = ramshot::Handoff::of_this_process(vec![region], missing)?;
    let mut socket = UnixStream::connect(socket)?;
    handoff.send(&socket)?;
    let answers = BufReader::new(socket.try_clone()?);
    std::thread::spawn(move || answers.lines().map_while(Result::ok).for_each(|line| println!("{line}")));
    let writer = Arc::clone(&memory);
    std::thread::spawn(move || {
        for n in 0usize.. {
            let words = writer.words();
            if let Some(word) = words.get(n.wrapping_mul(512 * 7 + 1) % words.len()) {
                word.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    for line in std::io::stdin().lock().lines() {
        writeln!(socket, "{}", line?)?;
    }
    Ok(())
}
