//! A port of its own for what is read by HTTP: `/metrics` and whatever else the caller answers.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

/// Connections at once: a Prometheus has one, and there may be two.
const MAX_CONNECTIONS: usize = 32;
/// How long a request's head may take, and a connection may be idle.
const HEAD_DEADLINE: Duration = Duration::from_secs(60);
/// How long an answer may take to be made.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// Pause after a connection could not be accepted: there are no more sockets for the moment.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Its type.
    pub content_type: &'static str,
    /// The text.
    pub body: String,
}

/// Serves until `stop`: `answer` is given the path of each GET and says what is there, if anything is.
pub async fn serve<A>(listener: TcpListener, answer: impl Fn(String) -> A + Send + Sync + 'static, stop: CancellationToken)
where
    A: Future<Output = Option<Reply>> + Send + 'static,
{
    let (answer, free) = (Arc::new(answer), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            accepted = async {
                let permit = free.clone().acquire_owned().await;
                (listener.accept().await, permit)
            } => accepted,
        };
        let (Ok((stream, _)), permit) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (answer, stop) = (answer.clone(), stop.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let service = service_fn(move |request| respond(request, answer.clone()));
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(HEAD_DEADLINE);
            let serving = server.serve_connection(TokioIo::new(stream), service);
            // A reader that goes away in the middle is no news.
            drop(stop.run_until_cancelled(serving).await);
        });
    }
}

async fn respond<A>(request: Request<Incoming>, answer: Arc<impl Fn(String) -> A>) -> Result<Response<Full<Bytes>>, Infallible>
where
    A: Future<Output = Option<Reply>>,
{
    let mut response = Response::new(Full::default());
    if request.method() != Method::GET {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET"));
        return Ok(response);
    }
    match tokio::time::timeout(ANSWER_DEADLINE, answer(request.uri().path().to_owned())).await {
        Ok(Some(Reply { content_type, body })) => {
            response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
            *response.body_mut() = Full::new(body.into());
        }
        Ok(None) => *response.status_mut() = StatusCode::NOT_FOUND,
        Err(_) => *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE,
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    async fn ask(request: &str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let answer = async |path: String| {
            (path == "/metrics").then(|| Reply { content_type: "text/plain", body: "all is well".to_owned() })
        };
        let serving = tokio::spawn(serve(listener, move |path| Box::pin(answer(path)), stop.clone()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{request} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        stop.cancel();
        serving.await.unwrap();
        response
    }

    #[tokio::test]
    async fn a_page_is_read_and_nothing_else_is_there() {
        let response = ask("GET /metrics").await;
        assert!(response.starts_with("HTTP/1.1 200") && response.ends_with("all is well"), "{response}");
        assert!(ask("GET /").await.starts_with("HTTP/1.1 404"));
        assert!(ask("POST /metrics").await.starts_with("HTTP/1.1 405"));
    }
}
