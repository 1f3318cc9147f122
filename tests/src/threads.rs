//! Threads of this process as the guest, for machines without KVM (`--accel threads`). They write to the same memory by
//! the same rule as the guest image does, and keep everything they need in that memory.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ramshot::DirtyLog;
use ramshot_images::layout::{
    Counters, FIRST_USABLE, Header, LAYOUT_VERSION, PAGE, PHASE_FILLING, PHASE_READY, Range, STATE_FILLING,
    STATS_ADDRESS, STATS_MAGIC, WORKLOAD_IDLE, WORKLOAD_RANDOM, WORKLOAD_SEQ, counters_address,
};
use ramshot_images::rule::mix;
use zerocopy::IntoBytes;

use crate::gate::Gate;
use crate::guest::{Guest, GuestConfig, GuestError, Talk, Workload};
use crate::memory::Memory;
use crate::worker::{CLOCK_KHZ, Ended, Ram, Worker};

const STATE_MAGIC: &[u8; 8] = b"rsthread";
const PATIENCE: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub struct ThreadGuest {
    talk: Talk,
    config: GuestConfig,
    gate: Arc<Gate>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl ThreadGuest {
    /// A guest in `memory`, not started.
    ///
    /// # Errors
    /// The configuration makes no sense.
    pub fn new(memory: Arc<Memory>, config: GuestConfig) -> Result<Self, GuestError> {
        config.check()?;
        let gate = Arc::new(Gate::new(config.vcpus));
        Ok(Self { talk: Talk::new(memory), config, gate, threads: Mutex::default() })
    }

    /// What the image's guest does in `set_up`.
    fn set_up(&self) -> Result<Header, GuestError> {
        let config = &self.config;
        let mut header = Header {
            magic: STATS_MAGIC,
            version: LAYOUT_VERSION,
            phase: PHASE_FILLING,
            vcpus: config.vcpus,
            workload: match config.workload {
                Workload::Idle => WORKLOAD_IDLE,
                Workload::Seq => WORKLOAD_SEQ,
                Workload::Random => WORKLOAD_RANDOM,
            },
            tsc_khz: CLOCK_KHZ,
            rate: config.rate.unwrap_or(0),
            seed: config.seed,
            ..Header::default()
        };
        for (range, region) in header.range.iter_mut().zip(self.talk.memory().regions()) {
            let address = region.guest.max(FIRST_USABLE);
            let pages = (region.guest + region.len).saturating_sub(address) / PAGE;
            if pages > 0 {
                *range = Range { first: header.pages, address, pages };
                header.pages += pages;
                header.ranges += 1;
            }
        }
        header.late_pages = (config.late / PAGE).min(header.pages);
        let left = header.pages - header.late_pages;
        header.ws_pages = (config.working_set / PAGE).min(left);
        header.fill_pages = config.fill.map_or(left, |fill| (fill / PAGE).clamp(header.ws_pages, left));

        let (n, late_first) = (u64::from(header.vcpus), header.pages - header.late_pages);
        for vcpu in 0..n {
            let counters = Counters {
                state: STATE_FILLING,
                position: vcpu,
                pass: 1,
                random: mix(header.seed.wrapping_add(vcpu + 1)) | 1,
                late_next: late_first + (vcpu + n - late_first % n) % n,
                ..Counters::default()
            };
            self.talk.memory().write(counters_address(vcpu), counters.as_bytes())?;
        }
        self.talk.memory().write(STATS_ADDRESS, header.as_bytes())?;
        Ok(header)
    }

    /// Starts the threads; they wait at the gate.
    fn spawn(&self, header: Header, fresh: bool) -> Result<(), GuestError> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if !threads.is_empty() {
            return Err(GuestError::State { what: "start or restore:", needs: "a guest that runs already cannot" });
        }
        let clock = Instant::now();
        for vcpu in 0..header.vcpus {
            let (gate, ram) = (Arc::clone(&self.gate), Ram::new(Arc::clone(self.talk.memory())));
            let body = move || {
                // Whatever ends the thread, nobody may wait for it.
                let leaver = Leaver(&gate);
                if gate.pass() {
                    let worker = Worker::new(&ram, &gate, header, u64::from(vcpu), clock);
                    let Err(Ended) = (if fresh { worker.fill() } else { Ok(()) }).and_then(|()| worker.work()) else {
                        return;
                    };
                }
                drop(leaver);
            };
            let thread = std::thread::Builder::new().name(format!("guest-{vcpu}")).spawn(body);
            threads.push(thread.map_err(|source| GuestError::Thread { vcpu, source })?);
        }
        Ok(())
    }
}

/// Leaves the gate, also when the thread panics.
struct Leaver<'a>(&'a Gate);

impl Drop for Leaver<'_> {
    fn drop(&mut self) {
        self.0.leave(std::thread::panicking().then(|| "a guest thread panicked".to_owned()));
    }
}

impl Guest for ThreadGuest {
    fn dirty_logs(&self) -> Result<Vec<Box<dyn DirtyLog>>, GuestError> {
        let why = "threads of a process have no dirty log besides userfaultfd, which the snapshot itself needs: use --accel kvm";
        Err(GuestError::Config(why.to_owned()))
    }

    fn start(&self) -> Result<(), GuestError> {
        let mut header = self.set_up()?;
        self.spawn(header, true)?;
        self.gate.open();
        let start = Instant::now();
        while !self.talk.counters()?.iter().all(|c| c.filled == 1) {
            if let Some(why) = self.gate.failure() {
                return Err(GuestError::Failed(why));
            }
            if start.elapsed() > PATIENCE {
                let state = "guest RAM is still being filled".to_owned();
                return Err(GuestError::Timeout { what: "starting the guest", after: PATIENCE, state });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        header.phase = PHASE_READY;
        self.talk.memory().write(STATS_ADDRESS, header.as_bytes())?;
        Ok(())
    }

    fn pause(&self) -> Result<(), GuestError> {
        if !self.gate.close(PATIENCE, &|| ()) {
            let state = "a guest thread does not come to a safe point".to_owned();
            return Err(GuestError::Timeout { what: "pausing the guest", after: PATIENCE, state });
        }
        self.gate.failure().map_or(Ok(()), |why| Err(GuestError::Failed(why)))
    }

    fn resume(&self) -> Result<(), GuestError> {
        self.gate.open();
        self.gate.failure().map_or(Ok(()), |why| Err(GuestError::Failed(why)))
    }

    fn save_state(&self) -> Result<Vec<u8>, GuestError> {
        if !self.gate.all_parked() {
            return Err(GuestError::State { what: "save_state:", needs: "the guest has to be paused first" });
        }
        // Everything else is in RAM.
        let mut state = STATE_MAGIC.to_vec();
        state.extend_from_slice(&self.config.vcpus.to_le_bytes());
        Ok(state)
    }

    fn restore(&self, state: &[u8]) -> Result<(), GuestError> {
        let vcpus = state.strip_prefix(STATE_MAGIC).and_then(|rest| <[u8; 4]>::try_from(rest).ok());
        let vcpus = vcpus.map(u32::from_le_bytes).ok_or_else(|| {
            GuestError::SavedState(format!("{} bytes that are not the state of a thread guest", state.len()))
        })?;
        let header = self
            .talk
            .header()?
            .ok_or_else(|| GuestError::SavedState("RAM has no statistics area: restore RAM first".to_owned()))?;
        if vcpus != self.config.vcpus || header.vcpus != vcpus {
            let mut why = format!("it is of {vcpus} vCPUs, RAM of {}", header.vcpus);
            let _ = write!(why, ", this guest has {}", self.config.vcpus);
            return Err(GuestError::SavedState(why));
        }
        if header.tsc_khz != CLOCK_KHZ {
            return Err(GuestError::SavedState("RAM is of a KVM guest, not of a thread guest".to_owned()));
        }
        self.talk.adopt()?;
        self.spawn(header, false)?;
        if !self.gate.close(PATIENCE, &|| ()) {
            let state = "its threads do not come up".to_owned();
            return Err(GuestError::Timeout { what: "restoring the guest", after: PATIENCE, state });
        }
        Ok(())
    }

    fn failure(&self) -> Option<String> {
        self.gate.failure()
    }

    fn console(&self) -> String {
        String::new()
    }

    fn talk(&self) -> &Talk {
        &self.talk
    }
}

impl Drop for ThreadGuest {
    fn drop(&mut self) {
        self.gate.stop();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A panic was reported by `failure`.
            let _ = thread.join();
        }
    }
}
