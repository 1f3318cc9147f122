//! A client of QEMU's machine protocol: commands, answers, events.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::stats::Result;

pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    /// The part of a line that has arrived.
    partial: String,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects as soon as QEMU listens, and negotiates.
    pub(crate) fn connect(path: &Path, patience: Duration) -> Result<Self> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > patience => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let mut qmp = Self { stream: BufReader::new(stream), partial: String::new(), events: VecDeque::new() };
        qmp.receive(patience)?.ok_or("QEMU does not greet")?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// The answer to a command.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.stream.get_mut().write_all(line.as_bytes())?;
        loop {
            let message = self.receive(Duration::from_secs(60))?;
            let mut message = message.ok_or_else(|| format!("QEMU does not answer {command}"))?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                return Err(format!("QEMU: {command}: {error}").into());
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// The next event within `timeout`.
    pub(crate) fn event(&mut self, timeout: Duration) -> Result<Option<Value>> {
        match self.events.pop_front() {
            Some(event) => Ok(Some(event)),
            None => self.receive(timeout),
        }
    }

    fn receive(&mut self, timeout: Duration) -> Result<Option<Value>> {
        let timeout = timeout.max(Duration::from_millis(1));
        self.stream.get_mut().set_read_timeout(Some(timeout))?;
        match self.stream.read_line(&mut self.partial) {
            Ok(0) => Err("QEMU has gone".into()),
            Ok(_) => Ok(Some(serde_json::from_str(&std::mem::take(&mut self.partial))?)),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// When an event happened, by QEMU's clock.
pub(crate) fn time_of(event: &Value) -> Option<Duration> {
    let time = event.get("timestamp")?;
    Some(Duration::from_secs(time["seconds"].as_u64()?) + Duration::from_micros(time["microseconds"].as_u64()?))
}
