//! A gRPC service on tonic, and its client, over a Unix socket.

#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::*;
use futures_util::stream::poll_fn;
use hvsock::SocketName;
use hvsock::tokio::{Listener, Stream};
use hyper_util::rt::TokioIo;
use tonic::service::InterceptorLayer;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tower::service_fn;

/// Refuses requests that don't say which client sent them.
fn expect_client(request: Request<()>) -> Result<Request<()>, Status> {
    match request.extensions().get::<SocketName>() {
        Some(SocketName::Unnamed) => Ok(request),
        other => Err(Status::internal(format!("{other:?}"))),
    }
}

#[tokio::test]
async fn a_service_on_tonic_is_called() {
    let dir = private_dir();
    // Of a VM: hyperkit://:5000/state/dir, for example.
    let address = unix(dir.path().join("grpc"));
    let listener = Listener::bind(&address).unwrap();
    let clients = poll_fn(move |context| {
        let accepted = listener.poll_accept(context);
        accepted.map(|accepted| Some(accepted.map(|(stream, _)| stream)))
    });
    let (_reporter, health) = tonic_health::server::health_reporter();
    let server = Server::builder()
        .layer(InterceptorLayer::new(expect_client))
        .add_service(health);
    let serving = tokio::spawn(server.serve_with_incoming(clients));

    let connector = service_fn(move |_| {
        let address = address.clone();
        async move { Stream::connect(&address).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://guest");
    let channel = endpoint.connect_with_connector(connector).await.unwrap();
    let mut client = HealthClient::new(channel);
    for _ in 0..3 {
        let request = HealthCheckRequest::default();
        let answer = client.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
    }
    serving.abort();
}
