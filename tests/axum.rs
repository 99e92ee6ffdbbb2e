//! A web service on axum, which a guest asks.

#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};

use axum::Router;
use axum::extract::ConnectInfo;
use axum::routing::get;
use common::*;
use hvsock::simulate::Vm;
use hvsock::tokio::{Listener, Stream};
use hvsock::{Address, SocketName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;

const REQUEST: &[u8] = b"GET /hello HTTP/1.1\r\nhost: host\r\nconnection: close\r\n\r\n";

async fn hello(ConnectInfo(client): ConnectInfo<SocketName>) -> String {
    format!("hello, {client}")
}

/// Serves on `address` until the sender is used or dropped. Returns where, too.
async fn serve(address: &Address) -> (Address, oneshot::Sender<()>) {
    let listener = Listener::bind(address).unwrap();
    let address = listener.address().clone();
    let (stop, stopped) = oneshot::channel();
    let service = Router::new().route("/hello", get(hello));
    let service = service.into_make_service_with_connect_info::<SocketName>();
    tokio::spawn(async {
        let stopped = async { drop(stopped.await) };
        let serving = axum::serve(listener, service).with_graceful_shutdown(stopped);
        serving.await.unwrap();
    });
    (address, stop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_asks_a_service_on_axum() {
    let dir = private_dir();
    let vm = Vm::builder(dir.path()).start().unwrap();
    let (_, _stop) = serve(&hyperkit(dir.path(), 5000)).await;
    let answer = tokio::task::block_in_place(|| {
        let mut guest = vm.dial(5000).unwrap();
        guest.set_read_timeout(Some(PATIENCE)).unwrap();
        guest.write_all(REQUEST).unwrap();
        let mut answer = String::new();
        guest.read_to_string(&mut answer).unwrap();
        answer
    });
    let expected = format!("hello, {}", SocketName::Unnamed);
    assert!(answer.ends_with(&expected), "{answer}");
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
}

#[tokio::test]
async fn the_name_of_a_client_can_be_extracted() {
    let (address, _stop) = serve(&any_tcp()).await;
    let mut client = Stream::connect(&address).await.unwrap();
    client.write_all(REQUEST).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    let expected = format!("hello, {}", client.local_addr().unwrap());
    assert!(answer.ends_with(&expected), "{answer}");
}
