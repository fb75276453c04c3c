//! Work that reads maps, beside the threads that answer: a million entries take a second.

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::control::{Error, Result};
use crate::kernel::BpfError;

/// Entries in a message of a stream.
const BATCH: usize = 1000;
/// Messages that wait for the reader of a stream.
const AHEAD: usize = 4;

pub type Stream<T> = ReceiverStream<Result<T, Status>>;

/// Does something in a thread of its own, and waits for it.
pub async fn aside<T: Send + 'static, F: Future<Output = Result<T>>>(
    work: impl FnOnce() -> F + Send + 'static,
) -> Result<T, Status> {
    let here = Handle::current();
    let done = tokio::task::spawn_blocking(move || here.block_on(work()));
    done.await.map_err(|e| Status::internal(e.to_string()))?.map_err(|e| status(&e))
}

/// The messages that `work` puts out, until it ends, or nobody reads them any more.
pub fn stream<T: Send + 'static>(
    work: impl FnOnce(&Sender<T>) -> Result<()> + Send + 'static,
) -> Stream<T> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = work(&Sender(sender.clone())) {
            let _ = sender.blocking_send(Err(status(&error)));
        }
    });
    ReceiverStream::new(receiver)
}

/// Where a stream's messages go.
pub struct Sender<T>(mpsc::Sender<Result<T, Status>>);

impl<T> Sender<T> {
    /// Sends; false: nobody reads any more.
    pub fn send(&self, message: T) -> bool {
        self.0.blocking_send(Ok(message)).is_ok()
    }

    /// Whether nobody reads any more.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Sends entries, many in a message.
    pub fn send_all<E>(
        &self,
        entries: impl Iterator<Item = Result<E>>,
        message: impl Fn(Vec<E>) -> T,
    ) -> Result<()> {
        let mut entries = entries.peekable();
        while entries.peek().is_some() {
            let batch = entries.by_ref().take(BATCH).collect::<Result<_>>()?;
            if !self.send(message(batch)) {
                break;
            }
        }
        Ok(())
    }
}

/// What went wrong, for the other side.
pub fn status(error: &Error) -> Status {
    let code = match error {
        Error::Refused(_) | Error::Config(_) | Error::Edit(_) => Code::FailedPrecondition,
        Error::Busy(_)
        | Error::Balancer(_)
        | Error::Bpf(BpfError::Locked { .. } | BpfError::EventsTaken { .. }) => Code::Unavailable,
        _ => Code::Internal,
    };
    Status::new(code, error.to_string())
}
