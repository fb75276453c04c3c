//! A thread that reads what the datapath leaves to it, until it is told to end.

use std::io;
use std::os::unix::net::UnixStream;
use std::thread::{Builder, JoinHandle};

/// A thread that ends when this is dropped.
#[derive(Debug)]
pub struct Reader {
    /// Closed, it ends the thread.
    end: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    /// Starts one. `work` is to return once what it gets is readable.
    pub fn start(name: &str, work: impl FnOnce(UnixStream) + Send + 'static) -> io::Result<Self> {
        let (end, ended) = UnixStream::pair()?;
        let thread = Builder::new().name(name.to_owned()).spawn(move || work(ended))?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }

    /// Whether it has ended, though it was not told so.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Reader {
    /// Waits for the thread: a ring buffer has one reader.
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
