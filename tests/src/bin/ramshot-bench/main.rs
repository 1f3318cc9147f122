//! `cargo xtask bench`: what a live snapshot costs a running guest, beside what the machine charges for the same work and
//! what QEMU takes for it. One guest a size, backing and workload; several snapshots of it, each into a fresh file.

mod case;
mod floors;
mod machine;
mod metric;
mod num;
mod options;
mod ours;
mod qemu;
mod qmp;
mod result;
mod stats;
mod svg;
mod table;

use std::error::Error;
use std::fs::{self, File};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use ramshot_tests::{Backing, Scratch};

use self::case::Boot;
use self::metric::Sample;
use self::options::{Load, Options, Target};
use self::ours::{OurGuest, Trace};
use self::qemu::{Method, Qemu};
use self::result::{CaseResult, PeerResult};
use self::stats::Result;

/// How often a floor is measured.
const FLOOR_RUNS: u32 = 3;
/// How long faults are served one by one.
const FAULT_TIME: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    match bench(&Options::parse().resolved()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// False if a case failed.
fn bench(options: &Options) -> Result<bool> {
    if let Some(why) = kvm_unavailable() {
        return Err(format!("the figures are of a KVM guest, and there is no KVM here: {why}").into());
    }
    let boots = case::matrix(options);
    if boots.is_empty() {
        return Err("no case has such a name (they are mem/backing/workload/target, like 1g/anon/random/tmpfs)".into());
    }
    let mut json = options.json.as_ref().map(|path| create(path)).transpose()?;
    options.svg.as_ref().map(fs::create_dir_all).transpose()?;
    println!("{}", machine::describe());

    let (mut results, mut failed) = (Vec::new(), Vec::new());
    for boot in &boots {
        eprintln!("\n== {}, load {:.1}", boot.name(), machine::load());
        match guest(options, boot) {
            Ok(cases) => {
                for case in cases {
                    if let Some(file) = &mut json {
                        case.write_json(file)?;
                    }
                    options.svg.as_ref().map(|folder| plot(folder, &case)).transpose()?;
                    results.push(case);
                }
                // After each guest: what is measured stays, whatever happens to the rest.
                if let Some(path) = &options.markdown {
                    let text = table::markdown(&results);
                    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
                }
            }
            Err(error) => {
                eprintln!("FAILED: {}", chain(error.as_ref()));
                failed.push(format!("{}: {}", boot.name(), chain(error.as_ref())));
            }
        }
    }
    println!("{}", table::text(&results));
    failed.iter().for_each(|what| println!("FAILED: {what}"));
    Ok(failed.is_empty())
}

fn create(path: &Path) -> Result<File> {
    Ok(File::create(path).map_err(|error| format!("{}: {error}", path.display()))?)
}

/// All cases of one guest: ours first, then the peer's, so that there is one of them at a time.
fn guest(options: &Options, boot: &Boot) -> Result<Vec<CaseResult>> {
    // Guest, image, and a copy of it.
    let (needed, there) = (3 * boot.mem, machine::available()?);
    if there < needed {
        return Err(format!("needs {} MiB of memory, there are {}", needed >> 20, there >> 20).into());
    }
    let ours = OurGuest::boot(boot, !options.arm_inside, options.precopy)?;
    let khz = ours.stats()?.khz();
    let of_guest = floors::of_guest(&ours, boot.working_set, is_busy(boot), FLOOR_RUNS)?;
    let mut results = Vec::new();
    for &target in &boot.targets {
        results.push(case(options, boot, &ours, target, of_guest.clone())?);
    }
    drop(ours);
    if options.peer.is_some()
        && let Some(result) = results.iter_mut().find(|result| result.case.ends_with("tmpfs"))
    {
        match peer(options, boot, khz) {
            Ok(peers) => result.peers = peers,
            Err(error) => eprintln!("==== NO PEER: {}", chain(error.as_ref())),
        }
    }
    Ok(results)
}

/// Where the files of a case go.
fn scratch(options: &Options, target: Target) -> Result<Scratch> {
    let folder = match target {
        Target::Tmpfs => &options.tmpfs,
        Target::Disk => &options.out,
    };
    Ok(Scratch::new_in(folder, "ramshot-bench-").map_err(|error| format!("{}: {error}", folder.display()))?)
}

/// Whether its guest writes flat out.
const fn is_busy(boot: &Boot) -> bool {
    matches!(boot.load, Load::Seq | Load::Random)
}

/// One case of ours.
fn case(options: &Options, boot: &Boot, ours: &OurGuest, target: Target, mut floor: Sample) -> Result<CaseResult> {
    let folder = scratch(options, target)?;
    floor.extend(floors::of_target(ours, target, folder.path(), is_busy(boot), FLOOR_RUNS)?);
    if boot.load == Load::Slow && boot.backing != Backing::Thp {
        // The faults, with nothing going on beside them.
        let bare = floors::bare_faults(ours, FAULT_TIME)?;
        floor.extend(bare.into_iter().filter(|(key, _)| key.starts_with("stall_")));
    }
    let path = folder.path().join("bench.ramshot");
    let settings = options.snapshot();
    let runs = repeat(&boot.case(target), options, None, || ours.snapshot(&path, &settings))?;
    Ok(CaseResult { case: boot.case(target), ours: runs.0, floor, peers: Vec::new(), trace: runs.1 })
}

fn peer(options: &Options, boot: &Boot, khz: u64) -> Result<Vec<PeerResult>> {
    let mut qemu = Qemu::boot(boot, khz)?;
    let methods = qemu.methods()?;
    if !methods.contains(&Method::PreCopy) {
        eprintln!("==== QEMU {} has no mapped-ram: only its background snapshot", qemu.version()?);
    }
    let folder = scratch(options, Target::Tmpfs)?;
    let path = folder.path().join("bench.qemu");
    let (mut peers, pid) = (Vec::new(), Some(qemu.pid()));
    for method in methods {
        let name = format!("{}, QEMU {} {}", boot.case(Target::Tmpfs), qemu.version()?, method.name());
        match repeat(&name, options, pid, || qemu.snapshot(method, &path)) {
            Ok((samples, trace)) => peers.push(PeerResult { name: method.name(), samples, trace }),
            Err(error) => eprintln!("==== NO PEER: {}", chain(error.as_ref())),
        }
    }
    Ok(peers)
}

/// What is told of each run as it ends: what, metric, digits, unit.
const PROGRESS: &[(&str, &str, usize, &str)] = &[
    ("prepare", "prepare_ms", 0, " ms"),
    ("pause", "pause_ms", 2, " ms"),
    ("total", "total_ms", 0, " ms"),
    ("faults", "faults", 0, ""),
    ("stall p50", "stall_p50_us", 0, " us"),
    ("gap", "gap_ms", 2, " ms"),
    ("while arming", "arming_gap_ms", 2, " ms"),
    ("lost", "lost_ms", 0, " ms"),
    ("stalled", "stalled_ms", 0, " ms"),
    ("short gaps", "short_ms", 0, " ms"),
    ("load", "load", 1, ""),
    ("others", "others_percent", 0, " %"),
];

/// One snapshot that does not count (fresh page cache, cold code), then those that do, and the plot of the last one.
fn repeat(
    name: &str,
    options: &Options,
    peer: Option<u32>,
    mut once: impl FnMut() -> Result<(Sample, Trace)>,
) -> Result<(Vec<Sample>, Option<Trace>)> {
    let patience = Duration::from_secs(options.wait_idle);
    let (mut samples, mut trace) = (Vec::new(), None);
    for run in 0..=options.runs() {
        machine::wait_for_calm(patience, peer)?;
        let others = machine::OthersMeter::start(peer)?;
        let (mut sample, of_run) = once()?;
        sample.insert("others_percent", others.percent()?);
        let told = PROGRESS.iter().filter_map(|&(what, key, digits, unit)| {
            sample.get(key).map(|value| format!("{what} {value:.digits$}{unit}"))
        });
        let run_name = if run == 0 { "warm-up".to_owned() } else { format!("run {run}") };
        eprintln!("{name} {run_name}: {}", told.collect::<Vec<_>>().join(", "));
        if run > 0 {
            samples.push(sample);
            trace = Some(of_run);
        }
    }
    Ok((samples, trace))
}

fn plot(folder: &Path, case: &CaseResult) -> Result<()> {
    let peers = case.peers.iter().filter_map(|peer| Some((peer.name, peer.trace.as_ref()?)));
    let traces: Vec<(&str, &Trace)> = case.trace.iter().map(|trace| ("ramshot", trace)).chain(peers).collect();
    if case.case.contains("/idle/") || traces.is_empty() {
        return Ok(());
    }
    let title = format!("Rate of the guest around a live snapshot, {}", case.case);
    let path = folder.join(format!("rate-{}.svg", case.case.replace('/', "-")));
    fs::write(&path, svg::plot(&title, &traces)).map_err(|error| format!("{}: {error}", path.display()).into())
}

#[cfg(target_arch = "x86_64")]
fn kvm_unavailable() -> Option<String> {
    ramshot_tests::kvm_unavailable()
}

#[cfg(not(target_arch = "x86_64"))]
fn kvm_unavailable() -> Option<String> {
    Some("the guest image is built for x86-64 only".to_owned())
}

/// An error with its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
