//! `/metrics` for Prometheus, `/health` for load balancers and people.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::sync::Mutex;

use super::{Family, text};

/// What is served.
pub trait Source: Send + Sync + 'static {
    /// What is measured now.
    fn families(&self) -> impl Future<Output = Vec<Family>> + Send;
    /// Whether clients should be sent here, and what is wrong now.
    fn health(&self) -> (bool, Vec<String>);
}

/// Younger ones are given again: however often it is asked for, maps are counted once a second.
const FRESH: Duration = Duration::from_secs(1);

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
    axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await
}

async fn metrics<S: Source>(State(served): State<Arc<Served<S>>>) -> impl IntoResponse {
    const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let mut last = served.last.lock().await;
    let fresh = last.as_ref().filter(|(when, _)| when.elapsed() < FRESH);
    let text = match fresh {
        Some((_, text)) => text.clone(),
        None => {
            let text = text(served.source.families().await);
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
