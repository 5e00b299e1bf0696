//! Whoever reads what a command prints may stop before its end (`atelier models | head`): then the command ends too, and says nothing.

use std::panic;

/// What a shell says of a program that a broken pipe ended.
const BROKEN_PIPE: i32 = 128 + 13;

/// For commands that print and are done; others go on though nobody reads.
pub(crate) fn end_when_gone() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        // The only way to hear of it: `println!` panics.
        let said = info.payload_as_str().unwrap_or_default();
        if said.starts_with("failed printing to stdout") && said.contains("Broken pipe") {
            std::process::exit(BROKEN_PIPE);
        }
        report(info);
    }));
}
