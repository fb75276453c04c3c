//! What others ask `run` for: changes of services on top of what was read from the file, or to read that again.

use tokio::sync::oneshot;

use super::reconcile::plan;
use super::{Error, Result};
use crate::config::Config;
use crate::config::edit::{self, Change};
use crate::datapath::Datapath;
use crate::kernel::xdp;

/// Who hears once what was asked for is in force.
pub type Answer = oneshot::Sender<Result<(), NotMade>>;

/// What others ask for.
#[derive(Debug)]
pub enum Request {
    Change(Edits),
    /// To read the file again.
    Reload(Answer),
    /// To hear once what was changed otherwise is in force: reals in use, say.
    Settle(Answer),
}

/// What somebody wants to be changed.
#[derive(Debug)]
pub struct Edits {
    /// One after the other; of a service, or of the only one.
    pub edits: Vec<(Option<String>, Change)>,
    /// Whether the file gets them, too.
    pub persist: bool,
    pub answer: Answer,
}

/// Why a change is not in force.
#[derive(Debug, Clone)]
pub enum NotMade {
    /// Nothing was changed.
    Refused(String),
    /// It will be, once what stands in its way is gone.
    NotYet(String),
}

impl Edits {
    /// The configuration with the changes. It fits beside what is in force, and the file, if that is to have
    /// them, is written; else nothing has happened.
    pub fn carry_out(&self, config: &Config, datapath: &Datapath) -> Result<Config> {
        let new = self.edited(config)?;
        let mtu = xdp::interface_mtu(&config.interface)?;
        plan::plan_maps(&new, datapath, mtu)?;
        if self.persist {
            // It may say something else than what is in force.
            let file = self.edited(&Config::load(&config.path)?).map_err(|error| {
                let path = config.path.display();
                Error::Refused(format!("in {path}: {error} (nothing was changed)"))
            })?;
            edit::replace_file(&config.path, &file.text).map_err(|source| Error::Io {
                what: format!("writing {} (nothing was changed)", config.path.display()),
                source,
            })?;
        }
        Ok(new)
    }

    fn edited(&self, config: &Config) -> Result<Config> {
        let mut text = config.text.to_string();
        for (service, change) in &self.edits {
            text = edit::edit(&text, service.as_deref(), change)?;
        }
        Ok(Config::parse(&config.path, &text)?)
    }
}
