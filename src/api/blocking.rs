//! Work that reads maps, beside the threads that answer: a million entries take a second.

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::clients::ClientsError;
use crate::inspect::InspectError;
use crate::inspect::explain::Unknown;
use crate::kernel::BpfError;
use crate::reconcile::ReconcileError;

/// Entries in a message of a stream.
const BATCH: usize = 1000;
/// Messages that wait for the reader of a stream.
const AHEAD: usize = 4;

pub type Stream<T> = ReceiverStream<Result<T, Status>>;

/// Does something in a thread of its own, and waits for it.
pub async fn aside<T: Send + 'static, E: Into<Refusal> + Send + 'static>(
    work: impl AsyncFnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, Status> {
    let here = Handle::current();
    let done = tokio::task::spawn_blocking(move || here.block_on(work()));
    let done = done.await.map_err(|e| Status::internal(e.to_string()))?;
    done.map_err(|error| error.into().0)
}

/// The messages that `work` puts out, until it ends, or nobody reads them any more.
pub fn stream<T: Send + 'static>(
    work: impl FnOnce(&Sender<T>) -> Result<(), InspectError> + Send + 'static,
) -> Stream<T> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = work(&Sender(sender.clone())) {
            let _ = sender.blocking_send(Err(Refusal::from(error).0));
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
    pub fn send_all<R, E: From<R>>(
        &self,
        entries: impl Iterator<Item = Result<R, BpfError>>,
        message: impl Fn(Vec<E>) -> T,
    ) -> Result<(), InspectError> {
        let mut entries = entries.peekable();
        while entries.peek().is_some() {
            let batch = entries.by_ref().take(BATCH).map(|entry| Ok(entry?.into()));
            let batch = batch.collect::<Result<_, InspectError>>()?;
            if !self.send(message(batch)) {
                break;
            }
        }
        Ok(())
    }
}

/// An error, for the other side.
pub struct Refusal(pub Status);

impl From<InspectError> for Refusal {
    fn from(error: InspectError) -> Self {
        let code = match &error {
            InspectError::Config(_)
            | InspectError::Unknown(_)
            | InspectError::Reconcile(ReconcileError::Plan(_)) => Code::FailedPrecondition,
            InspectError::Balancer(_)
            | InspectError::Reconcile(ReconcileError::Balancer(_))
            | InspectError::Bpf(BpfError::Locked { .. } | BpfError::EventsTaken { .. }) => {
                Code::Unavailable
            }
            _ => Code::Internal,
        };
        Self(Status::new(code, error.to_string()))
    }
}

impl From<Unknown> for Refusal {
    fn from(error: Unknown) -> Self {
        InspectError::from(error).into()
    }
}

impl From<BpfError> for Refusal {
    fn from(error: BpfError) -> Self {
        InspectError::from(error).into()
    }
}

impl From<ClientsError> for Refusal {
    fn from(error: ClientsError) -> Self {
        match error {
            ClientsError::Bpf(error) => error.into(),
            other => Self(Status::invalid_argument(other.to_string())),
        }
    }
}
