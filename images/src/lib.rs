//! The guest of ramshot's test VM: a small program that writes to memory by a rule it can check, and measures how long
//! its own writes were held up. No operating system in it, no devices but a serial port.
//!
//! [`IMAGE`] is a static ELF with a PVH note, so the test VM, `qemu-system-x86_64 -kernel`, Firecracker and Cloud
//! Hypervisor all boot it. Its source stands in `guest/`: `boot.S` is the whole of ring 0 (32-bit entry to ring 3 in
//! identity-mapped long mode, some forty instructions, since nested hosts may emulate them one by one), `main.c` reads
//! the command line and starts the other vCPUs, `work.c` holds the workloads and the self check.
//!
//! # Command line
//! Words separated by one blank; sizes take K, M, G.
//!
//! | word | means | default |
//! |---|---|---|
//! | `workload=idle\|seq\|random` | what to write to | random |
//! | `ws=BYTES` | working set: the first pages of usable RAM, shared out among the vCPUs | 16M |
//! | `rate=max\|N` | writes per second and vCPU | max |
//! | `vcpus=N` | how many take part, at most 16 | 1 |
//! | `ap=sipi\|vmm` | who starts the others: the guest through the local APIC, or the VMM at the PVH entry | sipi |
//! | `tsc_khz=K` | TSC frequency; without it rates and times are off | 2000000 |
//! | `fill=BYTES\|all` | how much RAM gets the pattern at boot, working set included | all |
//! | `late=BYTES` | the last RAM, left untouched until the VMM says so | 0 |
//! | `mem=BYTES` | use no more than this of the memory map (or of RAM, where there is no map) | all |
//! | `seed=S` | of pattern and random numbers | 1 |
//! | `report=0\|1` | a line `rate N` on the serial port every second | 0 |
//!
//! Usable RAM starts at [`layout::FIRST_USABLE`]. On the serial port the guest says `ramshot-guest: ready, ...` once RAM is
//! filled; an exception is reported there, too, and halts that vCPU.
//!
//! A KVM guest of the test VM keeps its time stamp counter over a save and restore where KVM can offset it; where it cannot,
//! the guest takes a jump of the counter for a fresh start.
//!
//! [`layout`] is where guest and VMM meet, [`rule`] what every page has to look like.
#![forbid(unsafe_code)]

pub mod layout;
pub mod rule;

/// The guest image, or `None` where it is not built: see [`IMAGE_MISSING`].
#[cfg(guest_image)]
pub const IMAGE: Option<&[u8]> = Some(include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf")));
/// The guest image, or `None` where it is not built: see [`IMAGE_MISSING`].
#[cfg(not(guest_image))]
pub const IMAGE: Option<&[u8]> = None;

/// Why [`IMAGE`] is `None`; empty if it is not.
pub const IMAGE_MISSING: &str = match option_env!("GUEST_IMAGE_MISSING") {
    Some(why) => why,
    None => "",
};

/// Reading a byte from this I/O port means "nothing to do for about a millisecond". A VMM may sleep on it; where nobody
/// answers, the guest polls.
pub const IDLE_PORT: u16 = 0x600;

/// First I/O port of the serial port.
pub const SERIAL_PORT: u16 = 0x3f8;

/// Starts the line on the serial port that says that RAM is filled and the workload begins.
pub const READY_LINE: &str = "ramshot-guest: ready";

/// Starts the line on the serial port that reports an exception: vector, error code, instruction pointer follow.
pub const EXCEPTION_LINE: &str = "EXCEPTION vector, error, rip:";
