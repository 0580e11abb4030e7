//! Ranges of integers: scans both ways, pages, counts, a ranged delete. Needs a cluster: `meridian dev`, then
//! `cargo run --example ranges`.
use futures_util::TryStreamExt as _;
use meridian::{
    client::{Client, Error},
    proto::v1,
};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:7170".to_owned());
    let client = Client::connect([address]).await?;
    let settings = v1::CreateKeyspaceRequest {
        name: "numbers".to_owned(),
        keys: v1::KeyKind::Integer as i32,
        max: 1_000,
        partitions: 4,
        ..Default::default()
    };
    let created = client.admin().create_keyspace(settings).await?;
    println!("created: {}, warnings: {:?}", created.created, created.warnings);

    let numbers = client.integer_keyspace("numbers");
    let mut batch = numbers.batch();
    for n in (0..1_000).step_by(7) {
        batch = batch.put(n, format!("{}", n * n));
    }
    println!("written: {}", batch.await?.applied);

    // Rows are fetched page by page while they are taken; the four partitions are asked ahead.
    let mut rows = numbers.scan(200..300).rows();
    while let Some(row) = rows.try_next().await? {
        println!("{} -> {}", row.key, String::from_utf8_lossy(&row.value));
    }
    let last = numbers.scan(..).reverse().limit(3).keys_only().await?;
    println!("largest: {:?}", last.iter().map(|row| row.key).collect::<Vec<_>>());

    println!("rows: {}", numbers.count(..).await?);
    println!("deleted: {}", numbers.delete_range(500..=999).await?);
    println!("rows: {}", numbers.count(..).await?);
    Ok(())
}
