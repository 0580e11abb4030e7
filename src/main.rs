//! The `meridian` binary: server, command line and embedded cluster.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // Huge pages are filled with zeros as a whole at the first touch, and openraft sets aside 1.6 MiB per replica of which
    // it touches little: without them an idle replica takes a tenth of the memory, and writes are faster. A kernel that
    // knows none refuses, which is as good.
    let _refused = rustix::thread::disable_transparent_huge_pages(true);
    meridian::cli::main()
}
