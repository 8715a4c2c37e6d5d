"""The server of ``icm review``: its routes, and the body of the command."""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any, TypeAlias

from icm_cli.environment import __version__
from icm_cli.errors import IcmError, ImageError, OutputError, UsageError, format_count
from icm_cli.events import ReviewListener
from icm_cli.files import check_shape, describe_os_error
from icm_cli.matting.run_record import command_line
from icm_cli.options import ReviewOptions
from icm_cli.review.corrections import Corrections
from icm_cli.review.images import VIEWS, DisplayImages, encode_alpha
from icm_cli.review.run import ReviewRun
from icm_cli.review.state import (
    ImageState,
    ModelNotReadyError,
    ReviewState,
    StaleAnswerError,
    StaleRevisionError,
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
"""Quality below which an alpha needs a person, as with ``--review-below`` of ``icm matte``."""
MAX_BODY_BYTES = 1 << 26
STOP_TIMEOUT_S = 2
"""Seconds that open requests have to end when the server stops."""
MODEL_DELAY_S = 2
"""Seconds from the first list of images until the model is loaded, which slows the first thumbnails down."""
STATIC_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}
"""Headers of an image whose address contains its version."""
SHAPE = {"label": str, "shape_type": str, "points": [[(int, float)]], "mask?": (str, type(None))}
HINTS = {"shapes": [SHAPE]}
EMPTY: dict[str, Any] = {}
REVISION = {"revision": int}
STATUS_CODES: dict[type[IcmError], int] = {
    ImageError: 404,
    StaleRevisionError: 409,
    StaleAnswerError: 409,
    ModelNotReadyError: 503,
    StateBusyError: 503,
}


class NotFoundError(IcmError):
    """The run has no such image, or the page no such file."""


STATUS_CODES[NotFoundError] = 404


@dataclass(frozen=True)
class Call:
    """A request, as the work for it needs it."""

    id: int
    """Id of the image in the path; -1 without one."""
    name: str
    """Name of the file in the path."""
    query: dict[str, str]
    body: dict[str, Any]

    @property
    def shapes(self) -> list[dict[str, Any]] | None:
        """Shapes of the hints in the body; None if they are null."""
        hints = self.body.get("hints")
        return None if hints is None else hints["shapes"]


Work: TypeAlias = Callable[[Call], Any]


def review(options: ReviewOptions, listener: ReviewListener) -> None:
    """Serve the page of a review until a signal ends it. Raises UsageError or OutputError before it is served."""
    page = options.page
    run = ReviewRun(page.alphas, page.hints, listener.on_notice)
    state = ReviewState(run.record_folder)
    run.scan_alphas()  # takes seconds for thousands of new alphas, and the page is fast afterwards
    with _bind(page.host, page.port) as listening:
        port = listening.getsockname()[1]
        token = secrets.token_urlsafe(24)
        app = ReviewApp(run, state, page.device, listener.on_notice)
        config = uvicorn.Config(
            RequestGuard(app.routes(), token, page.host, port),
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
        listener.on_link(link)
        if not page.no_browser and _has_desktop():
            threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            app.close()


class ReviewApp:
    """What the routes of the server do. Their work runs in threads, so that the server always answers."""

    def __init__(self, run: ReviewRun, state: ReviewState, device: str | None, notice: Callable[[str], None]) -> None:
        self.run, self.state, self.images = run, state, DisplayImages(run)
        self._thumbnails = ThumbnailWorkers(self.images.thumbnail)
        self._device, self._notice = device, notice
        self._lock = threading.RLock()
        self._corrections: Corrections | None = None
        self._teaching: Teaching | None = None

    @property
    def corrections(self) -> Corrections:
        """Corrections of images. The first use loads the model in a thread of its own."""
        with self._lock:
            if self._corrections is None:
                self._corrections = Corrections(self.run, self.state, self._device, self._notice)
            return self._corrections

    @property
    def teaching(self) -> Teaching:
        """References and negatives from reviewed images."""
        with self._lock:
            if self._teaching is None:
                self._teaching = Teaching(self.run, self.state, self.corrections, self._notice)
            return self._teaching

    def close(self) -> None:
        """End all work."""
        self._thumbnails.close()
        if self._teaching is not None:
            self._teaching.close()
        if self._corrections is not None:
            self._corrections.close()

    def routes(self) -> Starlette:
        """Return the application without the checks of :class:`~icm_cli.review.security.RequestGuard`."""

        def get(path: str, work: Work, method: str = "GET") -> Route:
            return Route(path, partial(self._respond, work=work), methods=[method])

        def post(path: str, shape: dict[str, Any], work: Work) -> Route:
            return Route(path, partial(self._respond, work=work, shape=shape), methods=["POST"])

        image = "/api/images/{id}"
        return Starlette(
            routes=[
                get("/", lambda _: read_static("index.html")),
                get("/static/{name}", lambda call: read_static(call.name)),
                get("/api/run", lambda _: self.describe_run()),
                get("/api/images", lambda call: self.list_images(call.query.get("since"))),
                get(image, lambda call: self.describe_image(call.id)),
                Route(f"{image}/thumbnail", self._get_thumbnail),
                get(f"{image}/source", lambda call: image_response(call, self.images.source_jpeg(call.id), "jpeg")),
                get(f"{image}/alpha", lambda call: image_response(call, self.images.alpha_png(call.id), "png")),
                post(f"{image}/answer", {"hints": HINTS, "refined": bool, "tab?": str}, self.answer),
                post(f"{image}/accept", {**REVISION, "hints": (dict, type(None))}, self.accept),
                post(f"{image}/reject", REVISION, self.reject),
                post(f"{image}/undo", REVISION, self.undo),
                post("/api/references", {"id": int, "kind": str, "area": str}, self.teach),
                get("/api/references/{id}", self.forget, "DELETE"),
                get("/api/recompute", lambda _: self.teaching.progress()),
                post("/api/recompute", EMPTY, lambda _: self.recompute()),
                post("/api/recompute/stop", EMPTY, lambda _: self.stop_recompute()),
            ]
        )

    def describe_run(self) -> dict[str, Any]:
        """Return what the page shows about the run."""
        corrections, options = self._corrections, self.run.options
        return {
            "folder": str(self.run.folder),
            "version": __version__,
            "model": (corrections or self.run).model_name,
            "command": command_line(options if corrections is None else self.teaching.options()),
            "hints_folder": str(self.run.hints_folder),
            "is_shot": self.run.is_shot,
            "count": len(self.run.jobs),
            "model_state": corrections.model_state if corrections else "loading",
            "model_error": corrections.model_error if corrections else "",
            "review_below": REVIEW_BELOW,
        }

    def list_images(self, since: str | None) -> dict[str, Any]:
        """Return all images, or those that were changed after a revision. The first list lets the model load."""
        if since is not None:
            return self._list_changes(_parse_number(since, "since", 15))
        self.run.scan_alphas()
        revision, states = self.state.read_all()
        images = [self.run.item(id, states.get(name, ImageState())) for id, name in enumerate(self.run.names)]
        loading = threading.Timer(MODEL_DELAY_S, lambda: self.corrections)
        loading.daemon = True
        loading.start()
        return {"revision": revision, "images": images}

    def _list_changes(self, since: int) -> dict[str, Any]:
        revision, states = self.state.read_all()
        found = {self.run.find_id(name): state for name, state in states.items() if state.revision > since}
        images = []
        for id, state in found.items():
            if id is not None:
                self.run.refresh(id)
                images.append(self.run.item(id, state))
        return {"revision": revision, "images": images}

    def item(self, id: int) -> dict[str, Any]:
        """Return what the overview shows of an image, after a look at its files."""
        self.run.refresh(id)
        return self.run.item(id, self.state.read(self.run.names[id]))

    def describe_image(self, id: int) -> dict[str, Any]:
        """Return what the page shows of a single image."""
        self.corrections.prepare(id)
        job, item, shapes = self.run.jobs[id], self.item(id), None
        height = width = 0
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
            "output": str(job.output),
            "hints": None if shapes is None else {"shapes": shapes},
            "shot": self.run.shot_of(id),
            "can_undo": self.corrections.can_undo(id),
        }

    def answer(self, call: Call) -> Response:
        """Return the alpha that hints would make."""
        shapes, tab = call.shapes, call.body.get("tab", "")
        assert shapes is not None
        alpha = self.corrections.answer(call.id, shapes, call.body["refined"], tab)
        return image_response(call, encode_alpha(alpha), "png")

    def accept(self, call: Call) -> dict[str, Any]:
        """Accept an alpha, with other hints or as it is."""
        if call.body["hints"] is not None:
            _check_body(call.body["hints"], HINTS)
            self.run.read_shapes(call.id, self.images.display_size(call.id))  # damaged files are not replaced
        self.corrections.accept(call.id, call.body["revision"], call.shapes)
        return self.item(call.id)

    def reject(self, call: Call) -> dict[str, Any]:
        """Reject an alpha."""
        self.corrections.reject(call.id, call.body["revision"])
        return self.item(call.id)

    def undo(self, call: Call) -> dict[str, Any]:
        """Take back the last change of an image."""
        self.corrections.undo(call.id, call.body["revision"])
        return self.item(call.id)

    def teach(self, call: Call) -> dict[str, Any]:
        """Use an image as a reference or as a negative."""
        id, kind, area = self._check_id(call.body["id"]), call.body["kind"], call.body["area"]
        if kind not in ("reference", "negative") or area not in ("alpha", "image"):
            raise UsageError(f"kind is {kind!r} and area {area!r}; expected reference or negative, and alpha or image")
        self.teaching.teach(id, kind, area)
        return self.item(id)

    def forget(self, call: Call) -> dict[str, Any]:
        """Use an image no more as a reference or negative."""
        self.teaching.forget(call.id)
        return self.item(call.id)

    def recompute(self) -> dict[str, Any]:
        """Begin to compute the other alphas again."""
        self.teaching.start()
        return self.teaching.progress()

    def stop_recompute(self) -> dict[str, Any]:
        """Stop the recompute."""
        self.teaching.stop()
        return self.teaching.progress()

    async def _respond(self, request: Request, work: Work, shape: dict[str, Any] | None = None) -> Response:
        """Do the work for a request in a thread, and return its result as JSON, unless it is a response."""
        call = None
        try:
            id = request.path_params.get("id")
            call = Call(
                -1 if id is None else self._check_id(_parse_number(id, "the image", 9)),
                request.path_params.get("name", ""),
                dict(request.query_params),
                {} if shape is None else await _read_body(request, shape),
            )
            result = await run_in_threadpool(work, call)
        except IcmError as error:
            status = next((code for kind, code in STATUS_CODES.items() if isinstance(error, kind)), 400)
            content: dict[str, Any] = {"error": str(error)}
            if isinstance(error, StaleRevisionError) and call is not None:
                content["image"] = await run_in_threadpool(self.item, call.id)
            return json_response(content, status)
        return result if isinstance(result, Response) else json_response(result)

    async def _get_thumbnail(self, request: Request) -> Response:
        try:
            id = self._check_id(_parse_number(request.path_params["id"], "the image", 9))
            view = next((each for each in VIEWS if each == request.query_params.get("view")), None)
            if view is None:
                raise UsageError(f"expected one of the views {', '.join(VIEWS)}")
            content = await self._thumbnails.make(id, view, request.is_disconnected)
        except IcmError as error:
            return json_response({"error": str(error)}, 400 if isinstance(error, UsageError) else 404)
        if content is None:
            return json_response({"error": "newer requests replace this one; try again"}, 503)
        return image_response(Call(id, "", dict(request.query_params), {}), content, "jpeg")

    def _check_id(self, id: int) -> int:
        if not 0 <= id < len(self.run.jobs):
            raise NotFoundError(f"the run has no image {id}; reload the page")
        return id


def json_response(content: Any, status: int = 200) -> Response:
    """Return a value as JSON. Names that are not UTF-8 have escapes."""
    return Response(json.dumps(content), status, media_type="application/json")


def image_response(call: Call, content: bytes, kind: str) -> Response:
    """Return an image, which browsers keep if its version is in the address."""
    return Response(content, headers=FOREVER if call.query.get("v") else {}, media_type=f"image/{kind}")


def read_static(name: str) -> Response:
    """Return a file of the page. Only a file that the page has by exactly this name is opened."""
    folder = importlib.resources.files("icm_cli.review").joinpath("static")
    found = next((file for file in folder.iterdir() if file.name == name and file.is_file()), None)
    kind = STATIC_TYPES.get(PurePath(name).suffix)
    if found is None or kind is None:
        raise NotFoundError("the page has no such file")
    return Response(found.read_bytes(), media_type=kind)


async def _read_body(request: Request, shape: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object of a request. Raises UsageError."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise UsageError(f"the request has more than {MAX_BODY_BYTES} bytes")
    try:
        body = json.loads(content or b"{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request is not JSON: {error}") from error
    return _check_body(body, shape)


def _check_body(body: Any, shape: dict[str, Any]) -> dict[str, Any]:
    try:
        check_shape(body, shape, "")
    except ValueError as error:
        raise UsageError(f"the request cannot be used: {error}") from error
    checked: dict[str, Any] = body
    return checked


def _parse_number(text: str, name: str, digits: int) -> int:
    """Return a whole number of a request. Raises NotFoundError."""
    if not re.fullmatch(f"[0-9]{{1,{digits}}}", text, re.ASCII):
        raise NotFoundError(f"{name} is {text[:20]!r}; expected a whole number")
    return int(text)


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address. Raises OutputError if the port is in use."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UsageError(f"--host {host} is not an address of this machine: {error.strerror or error}") from error
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for its body
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        remedy = f"give another --port than {port}, or omit --port" if port else "give another --host"
        where = f"{host}:{port}" if port else host
        raise OutputError(f"the page cannot be served at {where}: {describe_os_error(error, remedy)}") from error
    return listening


def _link_host(host: str) -> str:
    """Return the host as a link names it."""
    if is_any_address(host):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _has_desktop() -> bool:
    """Return whether a browser can open a window; in a terminal without one, text browsers would take the terminal."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
