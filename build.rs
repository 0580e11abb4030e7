//! Compiles `proto/` to Rust without `protoc`, keeps the descriptor set for gRPC reflection, and says which commit it is.
use prost::Message as _;
use std::{env, error::Error, fs, path::PathBuf, process::Command};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let commit = commit();
    let plus = if commit.is_empty() { "" } else { "+" };
    println!("cargo:rustc-env=MERIDIAN_VERSION={}{plus}{commit}", env::var("CARGO_PKG_VERSION")?);
    let files = [
        "meridian/v1/types.proto",
        "meridian/v1/kv.proto",
        "meridian/v1/topology.proto",
        "meridian/v1/admin.proto",
        "meridian/internal/v1/node.proto",
    ];
    let descriptors = protox::compile(files, ["proto"])?;
    let public = prost_types_without_internal(&descriptors);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("meridian_v1.bin"), public.encode_to_vec())?;
    // Maps in order: the same message is the same bytes.
    // Batches of the pipeline stay the bytes that they are: `src/proto/batch.rs`.
    tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".")
        .extern_path(".meridian.v1.PipelineRequest", "crate::proto::batch::Requests")
        .extern_path(".meridian.v1.PipelineReply", "crate::proto::batch::Replies")
        .compile_fds(descriptors)?;
    Ok(())
}

/// The commit that is built, with `-dirty` if files differ from it: `MERIDIAN_COMMIT` when whoever builds sets it, else
/// what git says. Empty where there is no git, and in debug builds, all of which would else be made again after every
/// commit.
fn commit() -> String {
    println!("cargo:rerun-if-env-changed=MERIDIAN_COMMIT");
    let given = env::var("MERIDIAN_COMMIT").unwrap_or_default();
    if !given.is_empty() || env::var("PROFILE").as_deref() != Ok("release") {
        return given;
    }
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success());
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    };
    let head = git(&["rev-parse", "--git-path", "logs/HEAD"]);
    if fs::exists(&head).unwrap_or(false) {
        println!("cargo:rerun-if-changed={head}\ncargo:rerun-if-changed=src");
    }
    git(&["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
}

/// Reflection shows the public services only.
fn prost_types_without_internal(all: &tonic_prost_build::FileDescriptorSet) -> tonic_prost_build::FileDescriptorSet {
    let mut public = all.clone();
    public.file.retain(|f| !f.package().starts_with("meridian.internal"));
    public
}
