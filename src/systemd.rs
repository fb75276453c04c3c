//! What the service manager is told (sd_notify(3)); nothing where there is none.

use sd_notify::NotifyState;
use tracing::debug;

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!(%error, "sd_notify failed");
    }
}

/// It waits for something else, and may take another minute.
pub fn waiting(status: &str) {
    notify(&[NotifyState::Status(status), NotifyState::ExtendTimeoutUsec(60_000_000)]);
}

/// It works, also after a reload.
pub fn ready() {
    notify(&[NotifyState::Ready]);
}

/// It reads its configuration again (Type=notify-reload).
pub fn reloading() {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        notify(&[NotifyState::Reloading, now]);
    }
}

/// It ends.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// It is not stuck (WatchdogSec=); with a line for `systemctl status`.
pub fn alive(status: &str) {
    notify(&[NotifyState::Watchdog, NotifyState::Status(status)]);
}
