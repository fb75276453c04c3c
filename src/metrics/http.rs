//! `/metrics` for Prometheus, `/health` for load balancers and people.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::{Mutex, Semaphore};
use tracing::warn;

use super::{Family, process, text};

/// What is served.
pub trait Source: Send + Sync + 'static {
    /// What is measured now.
    fn families(&self) -> impl Future<Output = Vec<Family>> + Send;
    /// Whether clients should be sent here, and what is wrong now.
    fn health(&self) -> (bool, Vec<String>);
}

/// Younger ones are given again: however often it is asked for, maps are counted once a second.
const FRESH: Duration = Duration::from_secs(1);

/// Connections at a time. More are closed at once.
const CONNECTIONS: usize = 64;
/// For a request's header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// For a connection: one request.
const TIMEOUT: Duration = Duration::from_secs(20);

struct Served<S> {
    source: S,
    last: Mutex<Option<(Instant, String)>>,
}

/// Listens.
pub fn bind(addr: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(addr)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves until it is dropped.
pub async fn serve(listener: TcpListener, source: impl Source) -> std::io::Result<()> {
    let served = Arc::new(Served { source, last: Mutex::new(None) });
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .with_state(served);
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut http = http1::Builder::new();
    http.keep_alive(false).timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // Of this one connection, or of this moment (out of descriptors): not the end.
            Err(error) => {
                warn!(%error, "accepting a connection for metrics failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Whoever holds all places with requests that do not end has none of them for long.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let service = TowerToHyperService::new(router.clone());
        let connection = http.serve_connection(TokioIo::new(stream), service);
        tokio::spawn(async move {
            let _place = place;
            let _ = tokio::time::timeout(TIMEOUT, connection).await;
        });
    }
}

async fn metrics<S: Source>(State(served): State<Arc<Served<S>>>) -> impl IntoResponse {
    const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let mut last = served.last.lock().await;
    let fresh = last.as_ref().filter(|(when, _)| when.elapsed() < FRESH);
    let text = match fresh {
        Some((_, text)) => text.clone(),
        None => {
            let mut families = served.source.families().await;
            families.extend(process::families());
            let text = text(families);
            *last = Some((Instant::now(), text.clone()));
            text
        }
    };
    ([(header::CONTENT_TYPE, TYPE)], text)
}

async fn health<S: Source>(State(served): State<Arc<Served<S>>>) -> impl IntoResponse {
    let (usable, problems) = served.source.health();
    let status = if usable { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let text = if problems.is_empty() { "healthy".to_owned() } else { problems.join("\n") };
    (status, text + "\n")
}
