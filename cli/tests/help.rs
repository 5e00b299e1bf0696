//! The program starts and says what it can do. (This also makes `cargo test` build it for the cluster tests.)

use std::process::Command;

#[test]
fn every_subcommand_has_help() {
    for subcommand in ["up", "generate", "jobs", "models", "workers", "plan", "bench", "coordinator", "worker"] {
        let output = Command::new(env!("CARGO_BIN_EXE_atelier")).args([subcommand, "--help"]).output().unwrap();
        assert!(output.status.success(), "{subcommand}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_server_that_is_not_there_is_said_plainly() {
    let output = Command::new(env!("CARGO_BIN_EXE_atelier")).args(["models", "--server", "http://127.0.0.1:1"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("could not reach the server at http://127.0.0.1:1"), "{text}");
}

#[test]
fn a_row_that_the_kernels_table_lacks_is_refused() {
    let arguments = ["bench", "kernels", "--threads", "1", "--only", "linear 7 x"];
    let output = Command::new(env!("CARGO_BIN_EXE_atelier")).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("--only: no row starts with \"linear 7 x\""), "{text}");
}
