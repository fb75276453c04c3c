//! Requests to `run`: to change services, to read the file again, or to hear once something is in force.

use std::path::PathBuf;

use tokio::sync::oneshot;

use crate::config::edit::{self, Change, EditError};
use crate::config::{Config, ConfigError};
use crate::datapath::Datapath;
use crate::datapath::plan::{MapPlan, PlanError};
use crate::kernel::{BpfError, xdp};

/// Who hears once it is in force.
pub type Answer = oneshot::Sender<Result<(), Unmade>>;

/// A request.
#[derive(Debug)]
pub enum Request {
    Change(Edits),
    /// To read the file again.
    Reload(Answer),
    /// To hear once what was changed otherwise is in force: reals in use, say.
    Settle(Answer),
}

/// Changes of services.
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
pub enum Unmade {
    /// Nothing was changed.
    Refused(String),
    /// It will be, once what stands in its way is gone.
    NotYet(String),
}

/// Why changes are refused. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RefusedEdits {
    #[error(transparent)]
    Edit(#[from] EditError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error("in {path}: {source} (nothing was changed)")]
    InFile { path: PathBuf, source: Box<RefusedEdits> },
    #[error("writing {path} (nothing was changed): {source}")]
    Io { path: PathBuf, source: std::io::Error },
}

impl Edits {
    /// The configuration with the changes. It fits beside what is in force, and the file, if that is to have
    /// them, is written; else nothing has happened.
    pub fn carry_out(&self, config: &Config, datapath: &Datapath) -> Result<Config, RefusedEdits> {
        let new = self.edited(config)?;
        let mtu = xdp::interface_mtu(&config.interface)?;
        MapPlan::of(&new, datapath, mtu)?;
        if self.persist {
            let path = || config.path.clone();
            // It may say something else than what is in force.
            let file = Config::load(&config.path)
                .map_err(RefusedEdits::from)
                .and_then(|file| self.edited(&file))
                .map_err(|e| RefusedEdits::InFile { path: path(), source: Box::new(e) })?;
            edit::replace_file(&config.path, &file.text)
                .map_err(|source| RefusedEdits::Io { path: path(), source })?;
        }
        Ok(new)
    }

    fn edited(&self, config: &Config) -> Result<Config, RefusedEdits> {
        let mut text = config.text.to_string();
        for (service, change) in &self.edits {
            text = edit::edit(&text, service.as_deref(), change)?;
        }
        Ok(Config::parse(&config.path, &text)?)
    }
}
