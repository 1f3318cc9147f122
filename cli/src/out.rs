//! Standard output that may be closed at any time: `ramshot inspect FILE | head` is no error.

use std::io::{self, BufWriter, ErrorKind, StdoutLock, Write};

/// Standard output. When the reader has gone, what is written is dropped and the command goes on to its exit code.
#[derive(Debug)]
pub(crate) struct Out {
    inner: BufWriter<StdoutLock<'static>>,
    closed: bool,
}

impl Out {
    pub(crate) fn new() -> Self {
        Self { inner: BufWriter::new(io::stdout().lock()), closed: false }
    }

    fn tolerate<T>(&mut self, outcome: io::Result<T>, instead: T) -> io::Result<T> {
        match outcome {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(instead)
            }
            other => other,
        }
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.closed {
            return Ok(bytes.len());
        }
        let outcome = self.inner.write(bytes);
        self.tolerate(outcome, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        let outcome = self.inner.flush();
        self.tolerate(outcome, ())
    }
}
