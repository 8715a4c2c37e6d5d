"""The web server of ``icm review``. :func:`review` is what the command calls."""

from __future__ import annotations

import base64
import errno
import importlib.resources
import json
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any, TypeAlias

from icm_cli.environment import __version__
from icm_cli.errors import IcmError, ImageError, OutputError, UsageError, format_count
from icm_cli.events import ReviewListener
from icm_cli.files.json_files import check_schema
from icm_cli.files.system_errors import describe_os_error
from icm_cli.matting.run_record import command_line
from icm_cli.options import ReviewOptions
from icm_cli.review.corrections import Corrections
from icm_cli.review.images import VIEWS, DisplayImages, View, encode_alpha
from icm_cli.review.run import ReviewRun
from icm_cli.review.state import (
    ImageState,
    ModelNotReadyError,
    ReviewState,
    StaleAnswerError,
    StaleRevisionError,
    StaleSourceError,
    StateBusyError,
)
from icm_cli.review.teaching import Teaching
from icm_cli.review.thumbnails import ThumbnailWorkers

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from icm_cli.review.security import RequestGuard, is_any_address, is_loopback
except ImportError as error:
    raise UsageError(f"icm review needs {error.name}, which is missing; pip install 'icm-cli[review]'") from error

REVIEW_BELOW = 0.8
"""Quality below which the page lists an alpha under "Needs review": the default of ``icm matte --review-below``."""
MAX_BODY_BYTES = 1 << 26
MAX_THUMBNAILS = 64
"""Largest number of thumbnails of a request."""
STOP_TIMEOUT_S = 2
"""Seconds that open requests have to finish when the server stops."""
MODEL_DELAY_S = 2
"""Seconds between the first list of images and the loading of the model, which would delay the first thumbnails."""
IDLE_DELAY_S = 5
"""Seconds between the start and the loading of the model if nobody opens the page."""
SCAN_INTERVAL_S = 10
"""Seconds between two scans of all alphas while a page is open."""
SCAN_PAUSE_FACTOR = 20
"""Least pause between two scans, in durations of a scan, on slow drives."""
STATIC_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
SOURCE_VERSION_HEADER = "Source-Version"
OUTDATED_HEADER = "Outdated-Alpha"
"""Header of an answer: why the saved alpha would be made again, such as other references; "" if it would not."""
IMAGE_LIST_HEADER = "Image-List"
"""Header of requests of the page: the list of images that their ids refer to."""
CACHED = {"Cache-Control": "private, max-age=31536000, immutable"}
"""Headers of an image whose URL contains its version, so that its content never changes."""
HINTS_SCHEMA = {
    "shapes": [{"label": str, "shape_type": str, "points": [[(int, float)]], "mask?": (str, type(None))}],
}
REVISION_SCHEMA = {"revision": int}
NO_BODY: dict[str, Any] = {}


class NotFoundError(IcmError):
    """The request names an image or a file that does not exist."""


class StaleListError(IcmError):
    """The ids of the request refer to another list of images, from before the server was started again."""


STATUS_CODES: dict[type[IcmError], int] = {
    NotFoundError: 404,
    ImageError: 404,
    StaleListError: 410,
    StaleRevisionError: 409,
    StaleAnswerError: 409,
    ModelNotReadyError: 503,
    StateBusyError: 503,
}
"""HTTP status of a response after an error of a type. After other errors it is 400."""


@dataclass(frozen=True)
class ApiRequest:
    """The parts of an HTTP request that a handler uses."""

    id: int
    """Id of the image, from the URL; -1 without one."""
    name: str
    """Name of the file, from the URL; "" without one."""
    query: dict[str, str]
    port: int | None
    """Port of this server, if known. That of the URL may be another one, which SSH forwards."""
    body: dict[str, Any]
    """JSON of the body, which matches the schema of the route."""

    @property
    def shapes(self) -> list[dict[str, Any]] | None:
        """Hints in the body, as shapes of labelme; None if ``hints`` is null."""
        hints = self.body.get("hints")
        return None if hints is None else hints["shapes"]


Handler: TypeAlias = Callable[[ApiRequest], Any]
"""Returns a response, or a value that is sent as JSON."""


def review(options: ReviewOptions, listener: ReviewListener) -> None:
    """Serve the page of a review until Ctrl-C or SIGTERM. Raises UsageError or OutputError if it cannot start."""
    page = options.page
    with _bind(page.host, page.port) as listening:  # first, so that a port in use is reported at once
        run = ReviewRun(page.alphas, page.hints, listener.on_notice)
        state = ReviewState(run.record_folder)
        run.scan_alphas()  # takes seconds for thousands of new alphas; the page should not wait for it
        port = listening.getsockname()[1]
        token = secrets.token_urlsafe(24)
        app = ReviewApp(run, state, page.device, listener.on_notice)
        config = uvicorn.Config(
            RequestGuard(app.create_app(), token, page.host, port),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=STOP_TIMEOUT_S,
        )
        link = f"http://{_link_host(page.host)}:{port}/?token={token}"
        listener.on_notice(f"{format_count(len(run.jobs), 'image')} of {run.folder}; Ctrl-C ends the review")
        if not is_loopback(page.host):
            listener.on_notice(
                f"the page is served at {page.host}: everyone in the network who has the link sees the images and can "
                "change the alphas, and the connection is not encrypted"
            )
        if run.save_error:
            listener.on_notice(run.save_error)
        listener.on_link(link)
        if not page.no_browser and _has_desktop():
            threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            app.close()


class ReviewApp:
    """The handlers of all routes. They run in threads, so that a slow one does not block the others."""

    def __init__(self, run: ReviewRun, state: ReviewState, device: str | None, notice: Callable[[str], None]) -> None:
        self.run, self.state, self.images = run, state, DisplayImages(run)
        self._thumbnails = ThumbnailWorkers(self.images.thumbnail, run.ids_by_quality())
        self.corrections = Corrections(run, state, device, notice)
        self.teaching = Teaching(run, state, self.corrections, notice)
        self._lock = threading.Lock()
        """Guards the time and the timer below."""
        self._next_scan = 0.0
        """Earliest time, by the monotonic clock, of the next scan of the alphas for changes by other processes."""
        self._model_load_timer = self._start_model_load_timer(IDLE_DELAY_S)

    def _start_model_load_timer(self, delay_s: float) -> threading.Timer:
        """Return a running timer. When it ends, the model begins to load."""
        timer = threading.Timer(delay_s, lambda: self.corrections.load_model())
        timer.daemon = True
        timer.start()
        return timer

    def close(self) -> None:
        """Stop all threads and processes."""
        self._model_load_timer.cancel()
        self._thumbnails.close()
        self.teaching.close()
        self.corrections.close()

    def create_app(self) -> Starlette:
        """Return the ASGI application. It does not check who sends a request: wrap it in RequestGuard."""

        def get(path: str, handler: Handler) -> Route:
            return Route(path, partial(self._respond, handler=handler), methods=["GET"])

        def post(path: str, schema: dict[str, Any], handler: Handler) -> Route:
            return Route(path, partial(self._respond, handler=handler, schema=schema), methods=["POST"])

        def delete(path: str, handler: Handler) -> Route:
            return Route(path, partial(self._respond, handler=handler), methods=["DELETE"])

        image = "/api/images/{id}"
        return Starlette(
            routes=[
                get("/", lambda _: read_static("index.html")),
                get("/static/{name}", lambda request: read_static(request.name)),
                get("/api/run", lambda request: self.describe_run(request.port)),
                get("/api/images", lambda request: self.list_images(request.query)),
                get(image, lambda request: self.describe_image(request.id)),
                Route("/api/thumbnails", self._get_thumbnails),  # it waits for other threads, so it is a coroutine
                get(f"{image}/source", self.get_source),
                get(f"{image}/alpha", self.get_alpha),
                post(
                    f"{image}/answer",
                    {"hints": HINTS_SCHEMA, "refined": bool, "tab?": str, "source?": str},
                    self.answer,
                ),
                post(f"{image}/accept", {**REVISION_SCHEMA, "hints": (dict, type(None)), "source?": str}, self.accept),
                post(f"{image}/reject", {**REVISION_SCHEMA, "source?": str}, self.reject),
                post(f"{image}/undo", REVISION_SCHEMA, self.undo),
                post("/api/model", NO_BODY, lambda _: self.corrections.reload_model()),
                post("/api/references", {"id": int, "kind": str, "area": str}, self.teach),
                delete("/api/references/{id}", self.forget),
                get("/api/recompute", lambda _: self.teaching.recompute_progress()),
                post("/api/recompute", NO_BODY, lambda _: self.recompute()),
                post("/api/recompute/stop", NO_BODY, lambda _: self.stop_recompute()),
            ]
        )

    def describe_run(self, port: int | None) -> dict[str, Any]:
        """Return what the page shows about the run."""
        return {
            "port": port,
            "list": self.run.list_digest,
            "folder": str(self.run.folder),
            "version": __version__,
            "model": self.corrections.model_name,
            "command": command_line(self.teaching.options()),
            "hints_folder": str(self.run.hints_folder),
            "is_shot": self.run.is_shot,
            "count": len(self.run.jobs),
            "model_state": self.corrections.model_state,
            "model_error": self.corrections.model_error,
            "warnings": [text for text in (self.run.save_error, self.run.other_run_warning) if text],
            "review_below": REVIEW_BELOW,
        }

    def list_images(self, query: dict[str, str]) -> dict[str, Any]:
        """Return all images, or only those changed after the revisions ``since`` (decisions) and ``files`` (alphas).

        A list of all images starts to load the model.
        """
        if "since" in query:
            return self._list_changes(
                _parse_number(query["since"], "since", digits=15),
                _parse_number(query["files"], "files", digits=15) if "files" in query else None,
            )
        self.run.scan_alphas()
        files, _ = self.run.changes_since(None)
        revision, states = self.state.read_all()
        images = [self.run.item(id, states.get(name, ImageState())) for id, name in enumerate(self.run.names)]
        with self._lock:
            if self._model_load_timer.interval != MODEL_DELAY_S:  # this is the first list
                self._model_load_timer.cancel()
                self._model_load_timer = self._start_model_load_timer(MODEL_DELAY_S)
        return {"revision": revision, "files": files, "images": images}

    def _list_changes(self, since: int, since_files: int | None) -> dict[str, Any]:
        """Return the images changed after the revisions ``since`` (decisions) and ``since_files`` (alphas).

        ``since_files`` None: the page has no list of alphas yet, so no change of alphas is returned.
        """
        self._scan_if_due()
        revision, states = self.state.read_all()
        decided = set()
        for name, state in states.items():
            id = self.run.find_id(name)
            if id is not None and state.revision > since:
                self.run.refresh(id)
                decided.add(id)
        files_revision, changed = self.run.changes_since(since_files)
        ids = sorted({*changed, *decided})
        images = [self.run.item(id, states.get(self.run.names[id], ImageState())) for id in ids]
        return {"revision": revision, "files": files_revision, "images": images}

    def _scan_if_due(self) -> None:
        """Scan all alphas for changes, unless they were scanned a moment ago. Slow scans are made less often."""
        with self._lock:
            start = time.monotonic()
            if start < self._next_scan:
                return
            self._next_scan = math.inf  # no second scan begins during this one
        try:
            self.run.scan_alphas()
        finally:
            duration = time.monotonic() - start
            with self._lock:
                self._next_scan = start + duration + max(SCAN_INTERVAL_S, SCAN_PAUSE_FACTOR * duration)

    def item(self, id: int) -> dict[str, Any]:
        """Return what the overview shows of an image, from the current state of its files."""
        self.run.refresh(id)
        return self.run.item(id, self.state.read(self.run.names[id]))

    def describe_image(self, id: int) -> dict[str, Any]:
        """Return what the page shows of a single image, and begin to read it, so that its first hint is fast."""
        self.run.find_restored_source(id)
        self.corrections.prepare(id)
        job, item = self.run.jobs[id], self.item(id)
        height, width, shapes = 0, 0, None  # unless they can be read
        try:
            height, width = self.images.display_size(id)
            shapes = self.run.read_shapes(id, (height, width))
        except (ImageError, UsageError) as error:
            item["error"] = item["error"] or str(error)
        return {
            **item,
            "width": width,
            "height": height,
            "source": str(job.source),
            "source_version": self.images.source_version(id),
            "source_error": self.run.source_error(id),
            "output": str(job.output),
            "hints": None if shapes is None else {"shapes": shapes},
            "shot": self.run.shot_of(id),
        }

    def get_source(self, request: ApiRequest) -> Response:
        """Return the source of an image as a JPEG. A header has its version, since browsers keep it in memory."""
        version = self.images.source_version(request.id)  # before it is read
        response = image_response(request, self.images.source_jpeg(request.id), "jpeg")
        response.headers[SOURCE_VERSION_HEADER] = version
        return response

    def get_alpha(self, request: ApiRequest) -> Response:
        """Return the alpha of an image as a PNG."""
        return image_response(request, self.images.alpha_png(request.id), "png")

    def answer(self, request: ApiRequest) -> Response:
        """Compute the alpha for hints, and return it as a PNG. Nothing is saved.

        With a refined alpha, a header says why its parts without new hints may differ from the saved alpha, if so.
        """
        shapes, tab = request.shapes, request.body.get("tab", "")
        assert shapes is not None
        self._check_source(request)
        is_refined = request.body["refined"]
        alpha = self.corrections.answer(request.id, shapes, is_refined, tab)
        response = image_response(request, encode_alpha(alpha), "png")
        if is_refined:
            response.headers[OUTDATED_HEADER] = self.corrections.outdated_reason(request.id)
        return response

    def accept(self, request: ApiRequest) -> dict[str, Any]:
        """Accept an alpha as it is, or save new hints and accept the alpha that they give."""
        self._check_source(request)
        if request.body["hints"] is not None:
            _check_body(request.body["hints"], HINTS_SCHEMA)
            # A damaged hint file must not be replaced: reading it raises an error.
            self.run.read_shapes(request.id, self.images.display_size(request.id))
        self.corrections.accept(request.id, request.body["revision"], request.shapes)
        return self.item(request.id)

    def _check_source(self, request: ApiRequest) -> None:
        """Raise StaleSourceError if a source has changed since the page loaded the version that the request states.

        A source that is missing is reported with its name by what reads it.
        """
        version = self.images.source_version(request.id)
        if version and request.body.get("source", version) != version:
            raise StaleSourceError(
                f"the source of {self.run.names[request.id]} has changed since the page loaded it; its newest state is "
                "shown: check it, and repeat your change if it is still needed"
            )

    def reject(self, request: ApiRequest) -> dict[str, Any]:
        """Reject an alpha."""
        self._check_source(request)
        self.corrections.reject(request.id, request.body["revision"])
        return self.item(request.id)

    def undo(self, request: ApiRequest) -> dict[str, Any]:
        """Undo the last change of an image."""
        self.corrections.undo(request.id, request.body["revision"])
        return self.item(request.id)

    def teach(self, request: ApiRequest) -> dict[str, Any]:
        """Use an image as a reference or as a negative."""
        id, kind, area = self._check_id(request.body["id"]), request.body["kind"], request.body["area"]
        if kind not in ("reference", "negative") or area not in ("alpha", "image"):
            raise UsageError(f"kind is {kind!r} and area {area!r}; expected reference or negative, and alpha or image")
        self.teaching.teach(id, kind, area)
        return self.item(id)

    def forget(self, request: ApiRequest) -> dict[str, Any]:
        """Stop using an image as a reference or negative."""
        self.teaching.forget(request.id)
        return self.item(request.id)

    def recompute(self) -> dict[str, Any]:
        """Start to recompute all alphas that are not accepted."""
        self.teaching.start_recompute()
        return self.teaching.recompute_progress()

    def stop_recompute(self) -> dict[str, Any]:
        """Stop the recompute."""
        self.teaching.stop_recompute()
        return self.teaching.recompute_progress()

    async def _respond(self, request: Request, handler: Handler, schema: dict[str, Any] | None = None) -> Response:
        """Run a handler in a thread and return its response. ``schema``: schema of the body; None without a body.

        An error becomes JSON with its message. After a conflict, the JSON also has the current state of the image.
        """
        parsed = None
        try:
            self._check_list(request)
            id = request.path_params.get("id")
            parsed = ApiRequest(
                -1 if id is None else self._check_id(_parse_number(id, "the image", digits=9)),
                request.path_params.get("name", ""),
                dict(request.query_params),
                (request.scope.get("server") or ("", None))[1],
                {} if schema is None else await _read_body(request, schema),
            )
            result = await run_in_threadpool(handler, parsed)
        except OSError as error:
            return json_response({"error": f"{error.filename or 'a file'}: {describe_os_error(error)}"}, 500)
        except IcmError as error:
            content: dict[str, Any] = {"error": str(error)}
            if isinstance(error, StaleRevisionError) and parsed is not None:
                content["image"] = await run_in_threadpool(self.item, parsed.id)
            return json_response(content, _status_code(error))
        return result if isinstance(result, Response) else json_response(result)

    async def _get_thumbnails(self, request: Request) -> Response:
        """Return thumbnails, in base64, of the first MAX_THUMBNAILS ids, as far as they are ready in a moment."""
        try:
            self._check_list(request)
            words = request.query_params.get("ids", "").split(",")[:MAX_THUMBNAILS]
            ids = [self._check_id(_parse_number(word, "the image", digits=9)) for word in words]
            view = _parse_view(request.query_params.get("view"))
        except IcmError as error:
            return json_response({"error": str(error)}, _status_code(error))
        jpegs, errors = {}, {}
        for id, jpeg_or_reason in (await self._thumbnails.make(ids, view)).items():
            if isinstance(jpeg_or_reason, bytes):
                jpegs[id] = base64.b64encode(jpeg_or_reason).decode()
            else:
                errors[id] = jpeg_or_reason
        return json_response({"jpegs": jpegs, "errors": errors})

    def _check_list(self, request: Request) -> None:
        """Raise StaleListError if the page has the images of a server that ran before, so that its ids are invalid."""
        if not self.run.is_valid_list(request.headers.get(IMAGE_LIST_HEADER, self.run.list_digest)):
            raise StaleListError(
                "icm review was started again with other images; reload the page. Hints that are not saved are lost "
                "then: write them down, or start icm review with the earlier images"
            )

    def _check_id(self, id: int) -> int:
        """Return the id of an image. Raises NotFoundError if there is no such image."""
        if not 0 <= id < len(self.run.jobs):
            raise NotFoundError(f"the run has no image {id}; reload the page")
        return id


def json_response(content: Any, status: int = 200) -> Response:
    """Return a response with a value as JSON. Bytes of file names that are not UTF-8 are escaped."""
    return Response(json.dumps(content), status, media_type="application/json")


def image_response(request: ApiRequest, content: bytes, kind: str) -> Response:
    """Return a response with an image. Browsers cache it if the URL has its version, as in ``?v=1a2b``."""
    return Response(content, headers=CACHED if request.query.get("v") else {}, media_type=f"image/{kind}")


def read_static(name: str) -> Response:
    """Return a response with a file of ``static/``. No path is built from ``name``, so no other file can be read."""
    folder = importlib.resources.files("icm_cli.review").joinpath("static")
    kind = STATIC_TYPES.get(PurePath(name).suffix)
    for file in folder.iterdir():
        if file.name == name and kind is not None and file.is_file():
            return Response(file.read_bytes(), media_type=kind)
    raise NotFoundError("the page has no such file")


def _status_code(error: IcmError) -> int:
    """Return the HTTP status of the response after an error."""
    for kind, code in STATUS_CODES.items():
        if isinstance(error, kind):
            return code
    return 400


def _parse_view(name: str | None) -> View:
    """Return the view with a name. Raises UsageError."""
    for view in VIEWS:
        if view == name:
            return view
    raise UsageError(f"view is {name!r}; expected one of {', '.join(VIEWS)}")


async def _read_body(request: Request, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object in the body of a request. Raises UsageError if it does not match the schema."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise UsageError(f"the request has more than {MAX_BODY_BYTES} bytes; use fewer or smaller hints")
    try:
        body = json.loads(content or b"{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request is not JSON: {error}") from error
    return _check_body(body, schema)


def _check_body(body: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """Return JSON that matches a schema. Raises UsageError if it does not."""
    try:
        check_schema(body, schema, "")
    except ValueError as error:
        raise UsageError(f"the request cannot be used: {error}") from error
    checked: dict[str, Any] = body
    return checked


def _parse_number(text: str, name: str, digits: int) -> int:
    """Return a whole number from a URL. Raises NotFoundError if it is anything else or has more than ``digits``."""
    if not re.fullmatch(f"[0-9]{{1,{digits}}}", text, re.ASCII):
        raise NotFoundError(f"{name} is {text[:20]!r}; expected a whole number")
    return int(text)


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. ``port``: 0 for any free one.

    Raises UsageError for an unknown host, and OutputError if the server cannot listen there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--host {host} is unknown: {reason}; give an address of this machine") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else every response is delayed by 40 ms
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        is_in_use = error.errno == errno.EADDRINUSE
        remedy = f"give another --port than {port}, or omit --port" if is_in_use else "give another --host or --port"
        where = f"{host}:{port}" if port else host
        raise OutputError(f"the page cannot be served at {where}: {describe_os_error(error, remedy)}") from error
    return listening


def _link_host(host: str) -> str:
    """Return the host for a link: a name that other machines can use instead of 0.0.0.0, and IPv6 in brackets."""
    if is_any_address(host):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _has_desktop() -> bool:
    """Return whether a browser can open a window. Without a desktop, a text browser would start in this terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
