//! Read your own writes from any replica, also from another process that was handed the session's token. Needs a
//! cluster: `meridian dev`, then `cargo run --example sessions`.
use meridian::client::{Client, Error, Session};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:7170".to_owned());
    let client = Client::connect([address]).await?;
    let rows = client.keyspace("default");

    let session = client.session();
    rows.put("profile", "new").session(&session).await?;
    let (row, read) = rows.get("profile").session(&session).with_info().await?;
    println!("node {} has {:?}", read.node, row.map(|row| row.value));

    let elsewhere = Session::from_token(session.token())?;
    let row = rows.get("profile").session(&elsewhere).await?;
    println!("with the token handed over: {:?}", row.map(|row| row.value));
    Ok(())
}
