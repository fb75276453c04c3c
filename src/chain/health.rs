//! The chain's problems: what `run` watches and `status` shows.

use std::sync::Mutex;

use crate::balancer::listeners::{self, Listener};
use crate::config::Config;
use crate::domain::Problem;
use crate::kernel::chain::{self, Chain};
use crate::kernel::pins::Pins;
use crate::kernel::xdp::{self, ProgramInfo};

/// The problems, each with its remedy; the balancer's state is not looked at.
pub fn problems(config: &Config) -> Vec<Problem> {
    let pins = config.pins();
    let chain = match Chain::open(&pins) {
        Ok(Some(chain)) => chain,
        Ok(None) => {
            let path = pins.root_array().display();
            let text = format!("there is no {path}; `mqtt-fwd load` puts it there");
            return vec![Problem::new("chain_missing", text)];
        }
        Err(e) => return vec![Problem::new("chain_unreadable", e.to_string())],
    };
    let mut problems = Vec::new();
    let mut problem = |code, text: String| problems.push(Problem::new(code, text));
    match xdp::attached(&config.interface) {
        Err(e) => problem("root_missing", e.to_string()),
        Ok(None) => problem(
            "root_missing",
            format!(
                "no XDP program is on {}, so packets are not forwarded; `mqtt-fwd load` attaches one",
                config.interface
            ),
        ),
        Ok(Some(root))
            if pins.identify(root.clone()).uses_pinned_map(pins.root_array()) == Some(false) =>
        {
            problem(
                "root_foreign",
                format!(
                    "the XDP program on {}, {} (id {}), does not use {}",
                    config.interface,
                    root.name,
                    root.id,
                    pins.root_array().display()
                ),
            );
        }
        Ok(Some(_)) => {}
    }
    let ours = pins.pinned_program("mqtt_fwd").map(|(_, program)| program.id);
    if ours.is_none() || chain.program(chain::MQTT_FWD).map(|p| p.id) != ours {
        let text = "mqtt_fwd is not in its position; `mqtt-fwd load` puts it back";
        problem("mqtt_fwd_missing", text.to_owned());
    }
    let listeners = listeners::recent(&config.balancer_endpoint);
    match chain.program(chain::BALANCER) {
        None => problem(
            "balancer_missing",
            "no program is in the balancer's position, and packets go to this host's own stack; \
             start the balancer"
                .to_owned(),
        ),
        Some(program) => {
            if let Some((code, text)) = balancer_problem(&pins.identify(program), &pins, &listeners)
            {
                problem(code, text);
            }
        }
    }
    if listeners.len() > 1 {
        let text = several_servers(config, chain.program(chain::BALANCER), &listeners);
        problem("several_servers", text);
    }
    problems
}

/// The problem of the program in the balancer's position, with its code.
fn balancer_problem(
    program: &ProgramInfo,
    pins: &Pins,
    listeners: &[Listener],
) -> Option<(&'static str, String)> {
    let shared: Vec<u32> = [pins.service_vips(), pins.root_array().to_owned()]
        .iter()
        .filter_map(|path| xdp::pinned_map_id(path))
        .collect();
    let Some(map_ids) = &program.map_ids else { return None };
    if program.uses_pinned_map(&pins.service_vips()) == Some(false) {
        let text = format!(
            "{} (id {}) does not use {}, so packets of groups are dropped, by it or by reals, which do not know a group's \
             VIP; build Katran's server and its object (-DINNER_DST) from sources with katran-patches/, start it on the \
             same bpffs with -map_path, and restart it if the map was replaced",
            program.name,
            program.id,
            pins.service_vips().display()
        );
        return Some(("balancer_unpatched", text));
    }
    let own: Vec<u32> = map_ids.iter().copied().filter(|id| !shared.contains(id)).collect();
    if listeners.is_empty() || is_of_a_listener(program.id, &own, listeners) {
        return None;
    }
    let names: Vec<String> = listeners.iter().map(ToString::to_string).collect();
    let text = format!(
        "{} (id {}) in the balancer's position is not the program of {}: it was left by a server that is gone, or \
         another one is just starting; if this lasts, restart the balancer",
        program.name,
        program.id,
        names.join(", ")
    );
    Some(("balancer_orphaned", text))
}

/// Katran takes its program out of the position when it is told to end, though that is another's:
/// so it makes a difference which one is ended, and how.
fn several_servers(
    config: &Config,
    program: Option<ProgramInfo>,
    listeners: &[Listener],
) -> String {
    let names: Vec<String> = listeners.iter().map(ToString::to_string).collect();
    let shared = [config.pins().service_vips(), config.pins().root_array().to_owned()];
    let shared: Vec<u32> = shared.iter().filter_map(|path| xdp::pinned_map_id(path)).collect();
    let maps = program.and_then(|program| program.map_ids).unwrap_or_default();
    let own: Vec<u32> = maps.into_iter().filter(|id| !shared.contains(id)).collect();
    let (in_position, others): (Vec<&Listener>, Vec<&Listener>) =
        listeners.iter().partition(|listener| listener.holds_any(&own));
    let advice = match in_position.as_slice() {
        [one] => {
            let pids: Vec<String> = others.iter().map(|other| other.pid().to_string()).collect();
            format!(
                "the program in the balancer's position is that of {one}; end the other with \
                 `kill -9 {}` (SIGTERM would empty the position)",
                pids.join(" ")
            )
        }
        _ => {
            "stop all but one with SIGKILL (SIGTERM empties the balancer's position), then restart \
              that one"
                .to_owned()
        }
    };
    format!(
        "{} servers listen at {} and each gets some of the calls: {}; {advice}",
        listeners.len(),
        config.balancer_endpoint,
        names.join(", ")
    )
}

/// Whether one of the servers has the program's maps open. /proc has a file for each thing that a
/// process holds, so the answer is kept as long as program and servers are the same.
fn is_of_a_listener(program: u32, maps: &[u32], listeners: &[Listener]) -> bool {
    static LAST: Mutex<Option<(u32, Vec<Listener>)>> = Mutex::new(None);
    let Ok(mut last) = LAST.lock() else { return true };
    if last.as_ref().is_some_and(|(id, of)| *id == program && of == listeners) {
        return true;
    }
    let found = listeners.iter().any(|listener| listener.holds_any(maps));
    *last = found.then(|| (program, listeners.to_vec()));
    found
}
