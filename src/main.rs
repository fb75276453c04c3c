//! `mqtt-fwd`: see `mqtt-fwd --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mqtt_fwd::cli::main()
}
