//! What is wrong with the chain: what `run` watches and `status` shows.

use std::sync::Mutex;

use crate::balancer::listeners::{self, Listener};
use crate::config::Config;
use crate::kernel::chain::{self, Chain};
use crate::kernel::load;
use crate::kernel::pins::Pins;
use crate::kernel::xdp::{self, ProgramInfo};

/// What is wrong, each with what to do about it; the balancer's state is not looked at.
pub fn problems(config: &Config) -> Vec<String> {
    let pins = config.pins();
    let chain = match Chain::open(&pins) {
        Ok(Some(chain)) => chain,
        Ok(None) => {
            let path = pins.root_array().display();
            return vec![format!("there is no {path}; `mqtt-fwd load` puts it there")];
        }
        Err(e) => return vec![e.to_string()],
    };
    let mut problems = Vec::new();
    match xdp::attached(&config.interface) {
        Err(e) => problems.push(e.to_string()),
        Ok(None) => problems.push(format!(
            "no XDP program is on {}, so packets are not forwarded; `mqtt-fwd load` attaches one",
            config.interface
        )),
        Ok(Some(root)) if !root.uses_pinned_map(pins.root_array()) => problems.push(format!(
            "the XDP program on {}, {} (id {}), does not use {}",
            config.interface,
            root.name,
            root.id,
            pins.root_array().display()
        )),
        Ok(Some(_)) => {}
    }
    let ours = load::pinned_program(&pins.program("mqtt_fwd")).map(|p| p.id);
    if ours.is_none() || chain.program(chain::MQTT_FWD).map(|p| p.id) != ours {
        problems.push("mqtt_fwd is not in its position; `mqtt-fwd load` puts it back".to_owned());
    }
    let listeners = listeners::recent(&config.balancer_endpoint);
    match chain.program(chain::BALANCER) {
        None => problems.push(
            "no program is in the balancer's position, and packets go to this host's own stack; \
             start the balancer"
                .to_owned(),
        ),
        Some(program) => problems.extend(balancer_problem(&program, &pins, &listeners)),
    }
    if listeners.len() > 1 {
        let names: Vec<String> = listeners.iter().map(ToString::to_string).collect();
        problems.push(format!(
            "{} servers listen at {} and each gets some of the calls: {}; stop all but one",
            listeners.len(),
            config.balancer_endpoint,
            names.join(", ")
        ));
    }
    problems
}

/// What is wrong with the program in the balancer's position.
fn balancer_problem(program: &ProgramInfo, pins: &Pins, listeners: &[Listener]) -> Option<String> {
    let shared: Vec<u32> = [pins.service_vips(), pins.root_array().to_owned()]
        .iter()
        .filter_map(|path| xdp::pinned_map_id(path))
        .collect();
    if !program.uses_pinned_map(&pins.service_vips()) {
        return Some(format!(
            "{} (id {}) does not use {}, so reals get packets with a group's VIP inside; build it \
             with katran-patches/ and -DMQTT_SERVICE, start it with the same bpffs, and restart it \
             if the map was made anew",
            program.name,
            program.id,
            pins.service_vips().display()
        ));
    }
    let own: Vec<u32> = program.map_ids.iter().copied().filter(|id| !shared.contains(id)).collect();
    if listeners.is_empty() || is_of_a_listener(program.id, &own, listeners) {
        return None;
    }
    let names: Vec<String> = listeners.iter().map(ToString::to_string).collect();
    Some(format!(
        "{} (id {}) in the balancer's position is not the program of {}, but left by a server that \
         is gone; restart the balancer",
        program.name,
        program.id,
        names.join(", ")
    ))
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
