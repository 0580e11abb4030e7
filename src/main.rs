//! The `meridian` binary: server, command line and embedded cluster.

fn main() -> std::process::ExitCode {
    meridian::cli::main()
}
