//! Listening sockets: root's own if they are Unix sockets, and with a bound on connections.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::transport::server::{Connected, Router};
use tracing::warn;

/// Connections at a time. More are closed at once.
const CONNECTIONS: usize = 64;

/// Why the service does not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
}

/// A socket that listens.
#[derive(Debug)]
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Listens at `host:port` or `unix:/path`. A Unix socket is for its owner only.
pub fn listen(endpoint: &str) -> io::Result<Listener> {
    let Some(path) = endpoint.strip_prefix("unix:").map(Path::new) else {
        return TcpListener::bind(endpoint).map(Listener::Tcp);
    };
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    remove_stale(path)?;
    // Bound under a temporary name: until its mode is set, no other user can connect.
    let new = path.with_extension(format!("new-{}", std::process::id()));
    let _ = fs::remove_file(&new);
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, path)?;
    Ok(Listener::Unix(listener))
}

/// Removes a stale socket, and nothing else.
fn remove_stale(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    if !found.file_type().is_socket() {
        let text = "it exists and is not a socket; name another path";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves there")),
        Err(e) => Err(e),
    }
}

/// Serves until the listener fails.
pub async fn serve(listener: Listener, router: Router) -> Result<(), ServeError> {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    match listener {
        Listener::Tcp(listener) => {
            listener.set_nonblocking(true)?;
            let listener = net::TcpListener::from_std(listener)?;
            let accept = async |listener: &net::TcpListener| Ok(listener.accept().await?.0);
            router.serve_with_incoming(limited(listener, places, accept)).await?;
        }
        Listener::Unix(listener) => {
            listener.set_nonblocking(true)?;
            let listener = net::UnixListener::from_std(listener)?;
            let accept = async |listener: &net::UnixListener| Ok(listener.accept().await?.0);
            router.serve_with_incoming(limited(listener, places, accept)).await?;
        }
    }
    Ok(())
}

fn limited<L, S>(
    listener: L,
    places: Arc<Semaphore>,
    accept: impl AsyncFn(&L) -> io::Result<S>,
) -> impl Stream<Item = io::Result<Limited<S>>> {
    stream::unfold((listener, places, accept), async |(listener, places, accept)| {
        loop {
            let accepted = match accept(&listener).await {
                Ok(accepted) => accepted,
                // Of this one connection, or of this moment (out of descriptors): not the end.
                Err(error) => {
                    warn!(%error, "accepting a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
                let limited = Limited { stream: accepted, _place: place };
                return Some((Ok(limited), (listener, places, accept)));
            }
            warn!(limit = CONNECTIONS, "too many connections: one more was closed");
        }
    })
}

/// A connection that counts as long as it is open.
#[derive(Debug)]
struct Limited<S> {
    stream: S,
    _place: OwnedSemaphorePermit,
}

impl<S: Connected> Connected for Limited<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Limited<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Limited<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
