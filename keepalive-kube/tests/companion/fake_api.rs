//! An API server as small as a companion needs it: lists, watches and patches over
//! HTTP on the loopback interface.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
    task::JoinHandle,
};

type Body = BoxBody<Bytes, Infallible>;

/// How the server behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Well,
    /// Every request fails, and every watch ends.
    Away,
    /// No request is answered.
    Hangs,
}

#[derive(Debug)]
struct Event {
    version: u64,
    collection: String,
    what: &'static str,
    object: Value,
}

#[derive(Debug)]
struct State {
    mood: Mood,
    objects: BTreeMap<(String, String), Value>,
    events: Vec<Event>,
    /// Versions up to this one are forgotten: a watch from there has to list anew.
    forgotten: u64,
    requests: Vec<String>,
    patches: Vec<(String, Value)>,
}

#[derive(Debug)]
pub(crate) struct FakeApi {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    version: watch::Sender<u64>,
    serving: JoinHandle<()>,
}

impl FakeApi {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State {
            mood: Mood::Well,
            objects: BTreeMap::new(),
            events: Vec::new(),
            forgotten: 0,
            requests: Vec::new(),
            patches: Vec::new(),
        }));
        let version = watch::Sender::new(1);
        let (shared, sender) = (Arc::clone(&state), version.clone());
        let serving = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (state, version) = (Arc::clone(&shared), sender.clone());
                let service = service_fn(move |request| {
                    answer(request, Arc::clone(&state), version.subscribe())
                });
                let connection =
                    http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                tokio::spawn(connection);
            }
        });
        Self {
            address,
            state,
            version,
            serving,
        }
    }

    pub(crate) fn client(&self) -> kube::Client {
        let uri = format!("http://{}", self.address).parse().unwrap();
        keepalive_kube::api::client(kube::Config::new(uri)).unwrap()
    }

    pub(crate) fn behave(&self, mood: Mood) {
        self.state.lock().unwrap().mood = mood;
        // Watches look at it when something happens.
        self.version.send_modify(|version| *version += 1);
    }

    /// Makes or changes an object; the collection is the last part of its address.
    pub(crate) fn set(&self, collection: &str, object: Value) {
        let key = (collection.to_owned(), key(&object));
        let mut state = self.state.lock().unwrap();
        let version = *self.version.borrow() + 1;
        let mut object = object;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let what = if state.objects.contains_key(&key) {
            "MODIFIED"
        } else {
            "ADDED"
        };
        state.objects.insert(key, object.clone());
        state.events.push(Event {
            version,
            collection: collection.to_owned(),
            what,
            object,
        });
        drop(state);
        self.version.send_replace(version);
    }

    pub(crate) fn remove(&self, collection: &str, name: &str) {
        let mut state = self.state.lock().unwrap();
        let version = *self.version.borrow() + 1;
        let key = (collection.to_owned(), name.to_owned());
        let object = state.objects.remove(&key).unwrap();
        state.events.push(Event {
            version,
            collection: collection.to_owned(),
            what: "DELETED",
            object,
        });
        drop(state);
        self.version.send_replace(version);
    }

    /// As after a long time: no watch can go on from where it was.
    pub(crate) fn forget(&self) {
        let mut state = self.state.lock().unwrap();
        state.forgotten = *self.version.borrow();
        state.events.clear();
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.state.lock().unwrap().requests.clone()
    }

    pub(crate) fn patches(&self) -> Vec<(String, Value)> {
        self.state.lock().unwrap().patches.clone()
    }
}

impl Drop for FakeApi {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn key(object: &Value) -> String {
    let field = |name: &str| object["metadata"][name].as_str();
    let name = field("name").unwrap();
    field("namespace").map_or(name.to_owned(), |namespace| format!("{namespace}/{name}"))
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<State>>,
    versions: watch::Receiver<u64>,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let mood = {
        let mut state = state.lock().unwrap();
        state
            .requests
            .push(format!("{} {path}?{query}", request.method()));
        state.mood
    };
    match mood {
        Mood::Well => {}
        Mood::Away => return Ok(failure(StatusCode::SERVICE_UNAVAILABLE, "away")),
        Mood::Hangs => futures::future::pending().await,
    }
    if request.method() != Method::GET {
        let method = request.method().clone();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap();
        state
            .lock()
            .unwrap()
            .patches
            .push((format!("{method} {path}"), body.clone()));
        return Ok(whole(StatusCode::OK, &with_metadata(body)));
    }
    if let Some(name) = path.strip_prefix("/api/v1/nodes/") {
        let key = ("nodes".to_owned(), name.to_owned());
        let found = state.lock().unwrap().objects.get(&key).cloned();
        return Ok(found.map_or_else(
            || failure(StatusCode::NOT_FOUND, "NotFound"),
            |object| whole(StatusCode::OK, &object),
        ));
    }
    let collection = path.rsplit('/').next().unwrap().to_owned();
    let parameter = |name: &str| {
        query
            .split('&')
            .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    };
    let node = parameter("fieldSelector").map(|selector| {
        selector
            .replace("%3D", "=")
            .strip_prefix("spec.nodeName=")
            .unwrap()
            .to_owned()
    });
    let is_wanted = move |object: &Value| {
        node.as_ref()
            .is_none_or(|node| object["spec"]["nodeName"] == **node)
    };
    if parameter("watch") == Some("true") {
        let since: u64 = parameter("resourceVersion").unwrap().parse().unwrap();
        if since < state.lock().unwrap().forgotten {
            let gone = json!({
                "kind": "Status", "apiVersion": "v1", "status": "Failure", "metadata": {},
                "message": "too old resource version", "reason": "Expired", "code": 410,
            });
            return Ok(whole(
                StatusCode::OK,
                &json!({ "type": "ERROR", "object": gone }),
            ));
        }
        let wanted = (collection, is_wanted);
        return Ok(Response::new(events(since, wanted, state, versions)));
    }
    let state = state.lock().unwrap();
    let items: Vec<_> = state
        .objects
        .iter()
        .filter(|((of, _), object)| *of == collection && is_wanted(object))
        .map(|(_, object)| object)
        .collect();
    let version = *versions.borrow();
    let list = json!({
        "apiVersion": "v1",
        "kind": "List",
        "metadata": { "resourceVersion": version.to_string() },
        "items": items,
    });
    Ok(whole(StatusCode::OK, &list))
}

/// Lines of events, one after the other as they happen, until the server is not well.
fn events(
    since: u64,
    wanted: (
        String,
        impl Fn(&Value) -> bool + Clone + Send + Sync + 'static,
    ),
    state: Arc<Mutex<State>>,
    versions: watch::Receiver<u64>,
) -> Body {
    let lines = stream::unfold((since, versions), move |(since, mut versions)| {
        let state = Arc::clone(&state);
        let (collection, is_wanted) = wanted.clone();
        async move {
            loop {
                let now = *versions.borrow_and_update();
                let lines: Vec<_> = {
                    let state = state.lock().unwrap();
                    if state.mood != Mood::Well {
                        return None;
                    }
                    let is_new = |event: &&Event| {
                        event.version > since
                            && event.collection == collection
                            && is_wanted(&event.object)
                    };
                    let events = state.events.iter().filter(is_new);
                    let line = |event: &Event| {
                        json!({ "type": event.what, "object": event.object }).to_string() + "\n"
                    };
                    events.map(line).collect()
                };
                if !lines.is_empty() {
                    return Some((lines.concat(), (now, versions)));
                }
                versions.changed().await.ok()?;
            }
        }
    });
    let frames = lines.map(|lines| Ok(Frame::data(Bytes::from(lines))));
    BodyExt::boxed(StreamBody::new(frames))
}

fn with_metadata(mut object: Value) -> Value {
    if object["metadata"].is_null() {
        object["metadata"] = json!({ "name": "x" });
    }
    if object["apiVersion"].is_null() {
        object["apiVersion"] = "v1".into();
        object["kind"] = "X".into();
    }
    object
}

fn whole(status: StatusCode, body: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(body.to_string())).boxed();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let kind = "application/json".parse().unwrap();
    response.headers_mut().insert("content-type", kind);
    response
}

fn failure(status: StatusCode, message: &str) -> Response<Body> {
    whole(
        status,
        &json!({
            "kind": "Status", "apiVersion": "v1", "status": "Failure",
            "message": message, "reason": message, "code": status.as_u16(),
        }),
    )
}

/// Serves these metrics on a socket, as an agent does.
pub(crate) fn fake_agent(socket: &Path, text: Arc<Mutex<String>>) {
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let text = Arc::clone(&text);
            let service = service_fn(move |_: Request<Incoming>| {
                let body = Full::new(Bytes::from(text.lock().unwrap().clone()));
                async move { Ok::<_, Infallible>(Response::new(body)) }
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
}

/// Waits until something is true, for at most this many seconds.
pub(crate) async fn eventually(seconds: u64, what: &str, mut is: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
    while !is() {
        assert!(
            tokio::time::Instant::now() < end,
            "{what}: not within {seconds} s"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
