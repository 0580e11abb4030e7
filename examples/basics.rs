//! Puts, gets, conditions, counters and batches. Needs a cluster: `meridian dev`, then
//! `cargo run --example basics`.
use meridian::client::{Client, Consistency, Error, Expected};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:7170".to_owned());
    let client = Client::connect([address]).await?;
    let rows = client.keyspace("default");

    let written = rows.put("user/anna", "Anna").if_absent().await?;
    println!("put: applied {}, version {}", written.applied, written.version);

    // An unmet condition is a result: nothing has changed, and the version is that of the row as it is.
    let swapped = rows.compare_and_set("user/anna", Expected::value("Anna"), "Anna B.").return_previous().await?;
    println!("compare and set: applied {}, before {:?}", swapped.applied, swapped.previous.map(|row| row.value));

    let visits = rows.increment("visits", 1).await?;
    println!("visits: {:?}", visits.number);

    let (row, read) = rows.get("user/anna").consistency(Consistency::Eventual).with_info().await?;
    println!("eventual get from node {}: {:?}", read.node, row.map(|row| row.value));

    let batch = rows.batch().put("user/ben", "Ben").put("user/cleo", "Cleo").delete("user/dora").await?;
    for item in batch.items {
        println!("batch item: the row was there before: {:?}", item.map(|written| written.existed));
    }

    match rows.delete("user/nobody").must_exist().await {
        Ok(_) => println!("deleted"),
        Err(error) => println!("{error}; retryable {}, outcome {:?}", error.is_retryable(), error.outcome()),
    }
    Ok(())
}
