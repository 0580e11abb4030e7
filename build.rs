//! Compiles `proto/` to Rust without `protoc`, and keeps the descriptor set for gRPC reflection.
use prost::Message as _;
use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
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
    tonic_prost_build::configure().bytes(".").btree_map(".").compile_fds(descriptors)?;
    Ok(())
}

/// Reflection shows the public services only.
fn prost_types_without_internal(all: &tonic_prost_build::FileDescriptorSet) -> tonic_prost_build::FileDescriptorSet {
    let mut public = all.clone();
    public.file.retain(|f| !f.package().starts_with("meridian.internal"));
    public
}
