//! `cargo xtask soak`: guests of all kinds, snapshotted live again and again, cancelled, sabotaged, verified byte for byte,
//! restored. Everything a run does follows from its seed.

mod dice;
mod plan;
mod run;
mod tally;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;
use ramshot_tests::{Accel, Scratch, chaos, kvm_unavailable};

use self::plan::Plan;
use self::tally::Tally;

/// Nothing takes that long: something hangs.
const HANGS: Duration = Duration::from_secs(400);

/// Runs guests of random configurations, takes live snapshots of them, with cancels and injected errors, and verifies
/// every page of every image against a copy of guest RAM taken at T0. The last line is a JSON object.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask soak", version)]
struct Options {
    /// How long; the run under way then is finished.
    #[arg(long, default_value_t = 20.0)]
    minutes: f64,
    /// Seed of the first run; the next ones count up. Default: the time.
    #[arg(long)]
    seed: Option<u64>,
    /// This many runs, however long they take. One, with the seed of a run, replays it.
    #[arg(long)]
    runs: Option<u64>,
    /// Only this kind of guest. Default: KVM, and threads now and then; threads alone where there is no KVM.
    #[arg(long, value_name = "kvm|threads")]
    accel: Option<Accel>,
    /// The JSON object goes to this file, too.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Folder for the snapshot file. Default: the one for temporary files.
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match soak(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error}");
            ExitCode::FAILURE
        }
    }
}

/// True if all is well.
fn soak(options: &Options) -> Result<bool, Box<dyn Error>> {
    chaos::hush();
    let unavailable = kvm_unavailable();
    if let Some(why) = &unavailable {
        chaos::skipped("the soak of KVM guests", why);
    }
    let seed = match options.seed {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs(),
    };
    let folder = options.out.clone().unwrap_or_else(std::env::temp_dir);
    let folder = Scratch::new_in(&folder, "ramshot-soak-")?;
    let target = folder.path().join("soak.ramshot");
    let start = Instant::now();
    let watched = Watched::new(seed);
    std::thread::Builder::new().name("watchdog".to_owned()).spawn(move || watched.watch())?;

    let end = Duration::try_from_secs_f64(options.minutes * 60.0)?;
    let mut tally = Tally { seed, ..Tally::default() };
    while options.runs.map_or(start.elapsed() < end, |runs| tally.runs < runs) {
        let plan = Plan::new(seed + tally.runs, options.accel, unavailable.is_none());
        println!("{:6.0} s  {plan}", start.elapsed().as_secs_f64());
        let before = tally.clone();
        watched.beat(&tally);
        run::run(&plan, &target, &mut tally, &|| watched.beat(&before));
        tally.runs += 1;
        tally.seconds = start.elapsed().as_secs();
        println!(
            "          {} verified, {} cancelled, {} errors, {} faults; {}",
            tally.snapshots - before.snapshots,
            tally.cancels - before.cancels,
            tally.injected_errors - before.injected_errors,
            tally.write_faults - before.write_faults,
            if tally.problems.len() == before.problems.len() { "ok" } else { "NOT OK" }
        );
        for problem in &tally.problems[before.problems.len()..] {
            println!("NOT OK    {problem}");
        }
    }
    tally.ok = tally.is_ok();
    println!("{}", tally.summary());
    let json = serde_json::to_string(&tally)?;
    if let Some(path) = &options.json {
        std::fs::write(path, format!("{json}\n")).map_err(|error| format!("--json {}: {error}", path.display()))?;
    }
    println!("{json}");
    Ok(tally.ok)
}

/// Ends the program with a result if nothing moves any more.
struct Watched(Mutex<(Instant, Tally)>);

impl Watched {
    /// Lives as long as the program.
    fn new(seed: u64) -> &'static Self {
        let tally = Tally { seed, ..Tally::default() };
        Box::leak(Box::new(Self(Mutex::new((Instant::now(), tally)))))
    }

    fn beat(&self, tally: &Tally) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (Instant::now(), tally.clone());
    }

    fn watch(&self) {
        loop {
            std::thread::sleep(Duration::from_secs(5));
            let (last, tally) = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if last.elapsed() > HANGS {
                let problem = format!("seed {}: nothing moves for {HANGS:?}", tally.seed + tally.runs);
                let tally = Tally { stuck_vcpus: tally.stuck_vcpus + 1, problems: vec![problem], ..tally };
                println!("{}", tally.summary());
                println!("{}", serde_json::to_string(&tally).unwrap_or_default());
                std::process::exit(1);
            }
        }
    }
}
