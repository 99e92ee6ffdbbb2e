//! A host's port that a guest dials: a web server of hyper's, written against the docs alone.
#![cfg(all(unix, feature = "simulate"))]
use http_body_util::{BodyExt, Full};
use hvsock::{address::HyperkitAddress, simulate::Vm, tokio::Listener};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, client, server, service::service_fn};
use hyper_util::rt::TokioIo;
use std::{error::Error, time::Duration};
use tokio::{net::UnixStream, task, time::timeout};
const PATIENCE: Duration = Duration::from_secs(20);

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

/// Answers with the path and then what was posted; `/unread` isn't interested in that.
async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let mut page = request.uri().path().as_bytes().to_vec();
    if page != b"/unread" {
        page.extend(request.into_body().collect().await?.to_bytes());
    }
    Ok(Response::new(Full::from(page)))
}

/// Serves one guest. hyper drops the stream with bytes unread; it takes its leave by itself.
async fn serve(listener: Listener) -> Outcome {
    let (stream, _) = listener.accept().await?;
    server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service_fn(answer))
        .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_posts_to_the_host() -> Outcome {
    let dir = tempfile::tempdir()?;
    let vm = Vm::builder(dir.path()).start()?;
    let listener = Listener::bind(&HyperkitAddress::new(dir.path(), 8080).into())?;
    let server = tokio::spawn(serve(listener));
    let program = task::block_in_place(|| vm.dial(8080))?;
    program.set_nonblocking(true)?;
    let (mut guest, connection) =
        client::conn::http1::handshake(TokioIo::new(UnixStream::from_std(program)?)).await?;
    let connection = tokio::spawn(connection);
    for (path, length) in [("/first", 10), ("/second", 300_000), ("/unread", 3_000_000)] {
        timeout(PATIENCE, guest.ready()).await??;
        let posted = Bytes::from(vec![b'x'; length]);
        let request = Request::post(path).body(Full::new(posted.clone()))?;
        let response = timeout(PATIENCE, guest.send_request(request)).await??;
        assert!(response.status().is_success(), "{response:?}");
        let page = timeout(PATIENCE, response.into_body().collect()).await??;
        let read = if path == "/unread" { &[] } else { &posted[..] };
        assert_eq!(page.to_bytes(), [path.as_bytes(), read].concat());
    }
    drop(guest); // No more requests: hyper ends the guest's side.
    let _ = timeout(PATIENCE, connection).await??; // Broken off amid the last request.
    timeout(PATIENCE, server).await???;
    assert!(vm.wait_for(PATIENCE, |seen| seen.live_slots == 0));
    assert!(vm.fate().is_none(), "{:?}", vm.fate());
    Ok(())
}
