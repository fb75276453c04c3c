//! What `run` says, and where it is silent, what can be seen from here: both are asked at once, so that nobody waits
//! twice.

use std::pin::Pin;
use std::time::Duration;

use crate::api::{ApiError, Run};
use crate::config::Config;

/// From then on, both: a `run` that is well has answered.
const HEAD_START: Duration = Duration::from_millis(200);

/// Who says it.
pub enum Found<T> {
    Run(Run),
    /// This process, since there is no `run`, or that does not answer.
    Here(Option<ApiError>, T),
}

/// Looks for `run`.
pub async fn find_or<T>(
    config: &Config,
    here: Pin<&mut impl Future<Output = T>>,
) -> Result<Found<T>, ApiError> {
    let mut finding = Box::pin(Run::find(config));
    let found = tokio::time::timeout(HEAD_START, &mut finding).await;
    let (found, here) = match found {
        Ok(Ok(Some(run))) => return Ok(Found::Run(run)),
        Ok(found) => (found, here.await),
        Err(_) => tokio::join!(finding, here),
    };
    match found {
        Ok(Some(run)) => Ok(Found::Run(run)),
        Ok(None) => Ok(Found::Here(None, here)),
        Err(silent @ (ApiError::NotAnswering { .. } | ApiError::Waiting { .. })) => {
            Ok(Found::Here(Some(silent), here))
        }
        Err(error) => Err(error),
    }
}
