"""The server of ``icm review``: who may use it, what it answers, and its state on the disk."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import COMPOSITES, SMALL_MODEL, Icm, alphas, arguments, output_files, read, shrink
from PIL import Image
from test_windows import write_cropped_exr
from typer.testing import CliRunner

from icm_cli.errors import ImageError, OutputError, UsageError
from icm_cli.files import atomic_writes
from icm_cli.images.writing import read_provenance_header
from icm_cli.matting.run_record import command_line, read_run_record
from icm_cli.review.corrections import Corrections
from icm_cli.review.images import VERSION_DIGITS
from icm_cli.review.run import ReviewRun
from icm_cli.review.security import HEADERS, RequestGuard, is_loopback
from icm_cli.review.server import ReviewApp
from icm_cli.review.state import ReviewState, StaleRevisionError, StateBusyError
from icm_cli.review.thumbnails import ThumbnailWorkers

PORT, TOKEN = 5000, "the-token"
STATIC = Path(__file__).parents[1] / "icm_cli" / "review" / "static"
IMAGE = "/api/images/0"
STALE = {"revision": 1_000_000}
"""Body of a request that passes all checks and changes nothing."""


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


@dataclass
class Client:
    """Sends requests to the application of a review in this process."""

    app: ReviewApp
    host: str = "127.0.0.1"

    def request(
        self, method: str, target: str, body: Any = None, *, headers: list[tuple[str, str]] | None = None, **others: str
    ) -> Response:
        """Send a request. Keyword arguments replace headers, and an empty value removes one."""
        path, _, query = target.partition("?")
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = {"host": f"127.0.0.1:{PORT}", "cookie": f"icm-{PORT}={TOKEN}"}
        if method not in ("GET", "HEAD"):
            sent |= {"origin": f"http://127.0.0.1:{PORT}", "content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in others.items()}
        pairs = [*((name, value) for name, value in sent.items() if value), *(headers or [])]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in pairs],
        }
        return asyncio.run(self._send(scope, content))

    def get(self, target: str) -> Any:
        """Return the JSON content of a successful request."""
        response = self.request("GET", target)
        assert response.status == 200, response
        return response.json

    def items(self) -> dict[str, dict[str, Any]]:
        return {item["name"]: item for item in self.get("/api/images")["images"]}

    def thumbnail(self, id: int, view: str = "cutout") -> bytes | str:
        """Return the thumbnail of an image, or the reason why it has none."""
        answer = self.get(f"/api/thumbnails?view={view}&ids={id}")
        jpeg = answer["jpegs"].get(str(id))
        return str(answer["errors"][str(id)]) if jpeg is None else base64.b64decode(jpeg)

    async def _send(self, scope: dict[str, Any], content: bytes) -> Response:
        messages: list[Any] = []
        bodies = iter([{"type": "http.request", "body": content, "more_body": False}])

        async def receive() -> Any:
            message = next(bodies, None)
            if message is None:
                await asyncio.sleep(3600)
            return message

        async def send(message: Any) -> None:
            messages.append(message)

        await RequestGuard(self.app.create_app(), TOKEN, self.host, PORT)(scope, receive, send)
        start, *parts = messages
        names = [(name.decode(), value.decode("latin-1")) for name, value in start["headers"]]
        return Response(start["status"], dict(names), b"".join(part.get("body", b"") for part in parts))


OpenReview = Callable[..., Client]


class NoModel(Corrections):
    """Corrections of a review whose model loads until they are closed."""

    def __init__(self, run: ReviewRun, state: ReviewState, *others: Any) -> None:
        self._is_closed = threading.Event()
        super().__init__(run, state, *others)

    def _load(self) -> None:
        self._is_closed.wait()

    def close(self) -> None:
        self._is_closed.set()
        super().close()

    def prepare(self, id: int) -> None:
        pass


@pytest.fixture
def open_review(scene: Path) -> Iterator[OpenReview]:
    """A function that opens the review of a run, by default of that in the folder out, without its model."""
    opened: list[ReviewApp] = []

    def open_again(folder: Path | None = None, host: str = "127.0.0.1", **options: Any) -> Client:
        run = ReviewRun(folder or scene / "out", options.get("hints"), options.get("notice", lambda _: None))
        app = ReviewApp(run, ReviewState(run.record_folder), None, lambda _: None)
        app.corrections = NoModel(run, app.state, None, lambda _: None)
        opened.append(app)
        return Client(app, host)

    yield open_again
    for app in opened:
        app.close()


def forbid_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the creation of files and folders, and opening files for writing, fail as on a read-only drive."""
    error = OSError(errno.EROFS, "Read-only file system")
    open_file = os.open

    def open_read_only(path: Any, flags: int, *others: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise error
        return open_file(path, flags, *others, **options)

    monkeypatch.setattr(os, "open", open_read_only)
    for name in ("touch", "mkdir"):
        monkeypatch.setattr(Path, name, Mock(side_effect=error))


@pytest.fixture
def client(icm: Icm, open_review: OpenReview) -> Client:
    """The review of a run over the scene."""
    assert icm().exit_code == 0
    return open_review()


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The review of one run for all tests that change nothing."""
    from icm_cli.cli import app

    folder = tmp_path_factory.mktemp("shared")
    (folder / "imgs").mkdir()
    (folder / "small.yaml").write_text(SMALL_MODEL)
    for name, target in (("ref.jpg", "ref.png"), ("mask.png", "mask.png"), ("imgs/lawn.jpg", "imgs/lawn.jpg")):
        shrink(COMPOSITES / name, folder / target, 160)
    options = {"ref": folder / "ref.png", "mask": folder / "mask.png", "src": folder / "imgs", "out": folder / "out"}
    line = ["matte", *arguments({**options, "device": "cpu", "model": folder / "small.yaml"})]
    assert CliRunner().invoke(app, line, catch_exceptions=False).exit_code == 0
    run = ReviewRun(folder / "out", None, lambda _: None)
    client = Client(ReviewApp(run, ReviewState(run.record_folder), None, lambda _: None))
    client.app.corrections = NoModel(run, client.app.state, None, lambda _: None)
    yield client
    client.app.close()


class TestSecurity:
    @pytest.fixture
    def client(self, shared_client: Client) -> Client:
        return shared_client

    def test_the_token_lets_a_browser_in(self, client: Client) -> None:
        response = client.request("GET", f"/?token={TOKEN}", cookie="")
        assert (response.status, response.headers["location"]) == (303, "/")
        cookie = response.headers["set-cookie"]
        assert cookie.startswith(f"icm-{PORT}={TOKEN};")
        assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(cookie.split("; "))
        assert client.request("GET", "/").status == 200
        for target in ("/?token=wrong", "/?token=", "/?token=%FF%FE", f"/api/run?token={TOKEN}"):
            assert client.request("GET", target, cookie="").status == 403

    @pytest.mark.parametrize("target", ["/", "/static/main.js", "/api/run", "/api/images", f"{IMAGE}/source"])
    @pytest.mark.parametrize("cookie", ["", f"icm-{PORT}=", f"icm-{PORT}=wrong", f"icm-5001={TOKEN}", "é"])
    def test_nothing_is_served_without_the_cookie(self, client: Client, target: str, cookie: str) -> None:
        response = client.request("GET", target, cookie=cookie)
        assert response.status == 403
        is_page = not target.startswith("/api/")
        assert response.headers["content-type"] == ("text/plain; charset=utf-8" if is_page else "application/json")
        assert "open that link" in (response.content.decode() if is_page else response.json["error"])

    @pytest.mark.parametrize(
        ("host", "is_own"),
        [
            (f"127.0.0.1:{PORT}", True),
            ("localhost:8080", True),
            ("LOCALHOST", True),
            (f"[::1]:{PORT}", True),
            (f"evil.example:{PORT}", False),
            ("127.0.0.1.evil.example", False),
            ("10.0.0.5", False),
            ("user@127.0.0.1.evil.example", False),
            ("[::1", False),
            ("127.0.0.1:port", True),
            ("", False),
        ],
    )
    def test_the_host_is_that_of_the_server(self, client: Client, host: str, is_own: bool) -> None:
        assert client.request("GET", "/api/run", host=host).status == (200 if is_own else 403)

    def test_two_hosts_are_refused(self, client: Client) -> None:
        assert client.request("GET", "/api/run", headers=[("host", "evil.example")]).status == 403

    def test_host_of_a_network(self, client: Client) -> None:
        named, all_addresses = Client(client.app, "studio-12.local"), Client(client.app, "0.0.0.0")
        assert named.request("GET", "/api/run", host=f"Studio-12.local:{PORT}").status == 200
        assert named.request("GET", "/api/run", host="10.0.0.5").status == 403
        assert all_addresses.request("GET", "/api/run", host=f"10.0.0.5:{PORT}").status == 200
        assert all_addresses.request("GET", "/api/run", host=socket.gethostname()).status == 200
        assert all_addresses.request("GET", "/api/run", host="evil.example").status == 403
        assert [is_loopback(name) for name in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "studio")] == [
            *(True, True, True, False, False)
        ]

    @pytest.mark.parametrize(
        "origin",
        ["", "null", "http://evil.example", "http://127.0.0.1:5001", f"https://evil.example:{PORT}", "http://["],
    )
    @pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
    def test_changes_need_the_origin_of_the_page(self, client: Client, origin: str, method: str) -> None:
        assert client.request(method, f"{IMAGE}/reject", {"revision": 0}, origin=origin).status == 403
        assert client.items()["lawn.jpg"]["revision"] == 0

    def test_a_forwarded_port_is_an_origin_of_its_own(self, client: Client) -> None:
        names = {"host": "localhost:81", "origin": "http://localhost:81"}
        assert client.request("POST", f"{IMAGE}/reject", STALE, **names).status == 409

    @pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
    def test_changes_need_json(self, client: Client, kind: str) -> None:
        assert client.request("POST", f"{IMAGE}/reject", STALE, content_type=kind).status == 400
        charset = "application/json; charset=utf-8"
        assert client.request("POST", f"{IMAGE}/reject", STALE, content_type=charset).status == 409

    @pytest.mark.parametrize(
        "target",
        ["/", "/api/images", "/api/images/99", "/nothing", "/static/style.css", "/api/thumbnails?view=alpha&ids=0"],
    )
    def test_every_response_has_the_headers(self, client: Client, target: str) -> None:
        for cookie in (f"icm-{PORT}={TOKEN}", ""):
            response = client.request("GET", target, cookie=cookie)
            assert {name.lower(): value for name, value in HEADERS.items()}.items() <= response.headers.items()
            assert response.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in response.headers["content-security-policy"]

    @pytest.mark.parametrize(
        "name",
        [
            "../state.py",
            "..%2Fstate.py",
            "%2e%2e/state.py",
            "/etc/passwd",
            "....//state.py",
            "index.html%00.js",
            "",
            ".",
        ],
    )
    def test_only_files_of_the_page_are_served(self, client: Client, name: str) -> None:
        for path in (f"/static/{name}", f"/{name}", f"/api/images/{name}", f"/api/images/{name}/source"):
            assert client.request("GET", path).status in (404, 405) or path in ("/", "/api/images/")

    @pytest.mark.parametrize("id", ["3", "-1", "1e0", "0x0", "9" * 20, "9" * 5000, "²", "%30", "wall.jpg", "NaN"])
    def test_images_are_numbers_of_the_run(self, client: Client, id: str) -> None:
        assert client.request("GET", f"/api/thumbnails?view=source&ids=0,{id.replace('%', '%25')}").status == 404
        for tail in ("", "/source", "/alpha"):
            assert client.request("GET", f"/api/images/{id}{tail}").status == 404
        assert client.request("POST", f"/api/images/{id}/reject", {"revision": 0}).status == 404
        assert client.request("DELETE", f"/api/references/{id}").status == 404

    @pytest.mark.parametrize(
        "body",
        [
            *(b"", b"[]", b"null", b"{", b'{"revision": "0"}', b'{"revision": true}', b'{"revision": 0.0}', b"\xff"),
            b"[" * 100_000,
        ],
    )
    def test_a_wrong_body_is_refused(self, client: Client, body: bytes) -> None:
        for path in ("reject", "undo", "accept", "answer"):
            assert client.request("POST", f"{IMAGE}/{path}", body).status == 400

    @pytest.mark.parametrize(
        "hints",
        [
            {},
            {"shapes": None},
            {"shapes": [{}]},
            {"shapes": [{"label": "fg", "shape_type": "point", "points": [["a", 1]]}]},
            {"shapes": [{"label": "fg", "shape_type": "point", "points": [[1, 1]], "mask": 3}]},
        ],
    )
    def test_wrong_hints_are_refused(self, client: Client, hints: Any) -> None:
        assert client.request("POST", f"{IMAGE}/answer", {"hints": hints, "refined": True}).status == 400
        assert client.request("POST", f"{IMAGE}/accept", {"hints": hints, "revision": 0}).status == 400


def test_a_damaged_hint_file_is_reported_and_not_replaced(client: Client, scene: Path) -> None:
    item = client.items()["wall.jpg"]
    path = scene / "out" / ".icm" / "hints" / "wall.json"
    path.write_text("{bad")
    address = f"/api/images/{item['id']}"
    assert str(path) in client.get(address)["error"]
    point = {"label": "fg", "shape_type": "point", "points": [[1, 1]]}
    answer = client.request("POST", f"{address}/accept", {"hints": {"shapes": [point]}, "revision": item["revision"]})
    assert answer.status == 400
    assert path.read_text() == "{bad"
    path.unlink()


def test_items_say_what_the_stamps_say(client: Client, scene: Path) -> None:
    items = client.items()
    assert list(items) == ["pad.0101.png", "sub/deep.png", "wall.jpg"]
    for name, item in items.items():
        path = scene / "out" / Path(name).with_suffix(".png")
        recorded = json.loads(read_provenance_header(path)["icm-result"])
        assert item["quality"] == recorded["quality"]
        assert item["reasons"] == recorded["reasons"]
        assert (item["status"], item["revision"], item["has_alpha"], item["has_hints"]) == ("open", 0, True, False)
    assert items["sub/deep.png"]["folder"] == "sub"
    assert len({item["version"] for item in items.values()}) == 3
    single = client.get(f"/api/images/{items['sub/deep.png']['id']}")
    height, width = read(scene / "imgs" / "sub" / "deep.png").shape[:2]
    assert (single["width"], single["height"]) == (width, height)
    assert single["source"] == str(scene / "imgs" / "sub" / "deep.png")
    assert single["shot"] is None
    assert single["hints"] is None


def test_a_decision_about_a_source_that_has_changed_is_refused(client: Client, scene: Path) -> None:
    """Also: the size of the image is that of the new source."""
    item = next(iter(client.items().values()))
    target = f"/api/images/{item['id']}"
    details = client.get(target)
    assert client.request("GET", f"{target}/source").headers["source-version"] == details["source_version"]
    body = {"revision": item["revision"], "hints": None, "source": details["source_version"]}
    source = scene / "imgs" / item["name"]
    Image.new("RGB", (details["width"] // 2, details["height"] // 2)).save(source)
    answer = {"hints": {"shapes": []}, "refined": True, "source": details["source_version"]}
    for action, content in (("accept", body), ("reject", body), ("answer", answer)):
        response = client.request("POST", f"{target}/{action}", content)
        assert response.status == 409
        assert "has changed since the page loaded it" in response.json["error"]
        assert response.json["image"]["status"] == "open"
    changed = client.get(target)
    assert (changed["width"], changed["height"]) == (details["width"] // 2, details["height"] // 2)
    accepted = client.request("POST", f"{target}/accept", {**body, "source": changed["source_version"]})
    assert accepted.json["status"] == "accepted"


def test_a_page_with_the_images_of_an_earlier_server_is_refused(
    client: Client, scene: Path, icm: Icm, open_review: OpenReview
) -> None:
    """Its ids refer to other images: every request is refused, not only decisions."""
    known = client.get("/api/run")["list"]
    assert client.request("GET", "/api/images", image_list=known).status == 200
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / "a first image.jpg")
    assert icm().exit_code == 0
    restarted = open_review()
    for method, target in (
        *(("POST", f"{IMAGE}/{action}") for action in ("accept", "reject", "undo")),
        *(("GET", IMAGE), ("GET", "/api/run"), ("GET", "/api/thumbnails?view=alpha&ids=0")),
        ("DELETE", "/api/references/0"),
    ):
        response = restarted.request(method, target, {"revision": 0, "hints": None}, image_list=known)
        assert (response.status, "reload the page" in response.json["error"]) == (410, True)
    assert {item["status"] for item in restarted.items().values()} == {"open"}
    now = restarted.get("/api/run")["list"]
    assert restarted.request("POST", f"{IMAGE}/reject", {"revision": 0}, image_list=now).json["status"] == "rejected"


def test_images_that_another_run_adds_are_listed(
    client: Client, scene: Path, icm: Icm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids of the others stay, so pages that show the earlier list can still be used."""
    monkeypatch.setattr("icm_cli.review.server.SCAN_INTERVAL_S", 0)
    monkeypatch.setattr("icm_cli.review.server.SCAN_PAUSE_FACTOR", 0)
    known = client.get("/api/run")["list"]
    first = client.get("/api/images")
    for folder in ("imgs", "imgs/new"):
        (scene / folder).mkdir(exist_ok=True)
        shutil.copy(scene / "imgs" / "wall.jpg", scene / folder / f"a {Path(folder).name}.jpg")
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "out" / "no alpha.jpg")
    assert icm().exit_code == 0
    changes = client.get(f"/api/images?since={first['revision']}&files={first['files']}")
    assert [(item["id"], item["name"]) for item in changes["images"]] == [(3, "a imgs.jpg"), (4, "new/a new.jpg")]
    assert all(item["has_alpha"] for item in changes["images"])
    names = list(client.items())
    assert names == [*(item["name"] for item in first["images"]), "a imgs.jpg", "new/a new.jpg"]
    assert client.get("/api/run")["list"] != known
    assert isinstance(client.thumbnail(4), bytes)
    for id in (0, 4):
        answer = client.request("POST", f"/api/images/{id}/accept", {"revision": 0, "hints": None}, image_list=known)
        assert (answer.json["name"], answer.json["status"]) == (names[id], "accepted")


def test_images_of_a_run_with_other_sources_are_not_listed(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    """A recompute still covers all images of the list. A notice says how to see the others."""
    assert icm().exit_code == 0
    notices: list[str] = []
    client = open_review(notice=notices.append)
    items, run = client.items(), client.get("/api/run")
    assert run["warnings"] == []
    for name in ("others/a other.jpg", "others/b other.jpg"):
        (scene / "others").mkdir(exist_ok=True)
        shutil.copy(scene / "imgs" / "wall.jpg", scene / name)
        assert icm(src=scene / "others").exit_code == 0
        assert client.items() == items
    assert len(notices) == 1
    assert "start icm review again" in notices[0]
    assert client.get("/api/run") == {**run, "warnings": notices}
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / "new.jpg")
    assert icm().exit_code == 0
    assert list(client.items()) == [*items, "new.jpg"]


def test_a_run_with_other_sources_is_noticed_when_its_record_is_written(
    icm: Icm, scene: Path, open_review: OpenReview
) -> None:
    """A run writes its first alpha before its record, and may have only this alpha."""
    assert icm().exit_code == 0
    client = open_review()
    client.items()
    (scene / "others").mkdir()
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "others" / "other.jpg")
    assert icm(src=scene / "others", out=scene / "elsewhere").exit_code == 0
    for name, warnings in (("other.png", 0), (".icm/run.json", 1)):
        shutil.copy(scene / "elsewhere" / name, scene / "out" / name)
        assert len(client.items()) == 3
        assert len(client.get("/api/run")["warnings"]) == warnings


def test_a_source_that_is_restored_is_found(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    assert icm().exit_code == 0
    source = scene / "imgs" / "wall.jpg"
    content = source.read_bytes()
    source.unlink()
    client = open_review()
    image = f"/api/images/{client.items()['wall.jpg']['id']}"
    assert client.get(image)["error"] == f"{source} does not exist any more"
    source.write_bytes(content)
    details = client.get(image)
    assert (details["error"], details["source_error"]) == (None, "")
    assert client.items()["wall.jpg"]["error"] is None


def test_a_restored_source_that_cannot_be_used_is_planned_once(
    icm: Icm, scene: Path, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert icm().exit_code == 0
    source = scene / "imgs" / "wall.jpg"
    source.unlink()
    run = open_review().app.run
    source.write_bytes((scene / "out" / "pad.0101.png").read_bytes())  # an output of icm
    plan, plans = run._plan, []
    monkeypatch.setattr(run, "_plan", lambda *arguments: plans.append(1) or plan(*arguments))
    for _ in range(3):
        run.scan_alphas()
    assert len(plans) == 1


@pytest.mark.parametrize("is_missing_at_start", [True, False])
def test_other_tabs_show_a_source_that_is_restored(
    icm: Icm, scene: Path, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch, is_missing_at_start: bool
) -> None:
    """They ask for its thumbnail again, because the version of the image is another one."""
    monkeypatch.setattr("icm_cli.review.server.SCAN_INTERVAL_S", 0)
    monkeypatch.setattr("icm_cli.review.server.SCAN_PAUSE_FACTOR", 0)
    assert icm().exit_code == 0
    source = scene / "imgs" / "wall.jpg"
    content = source.read_bytes()
    if is_missing_at_start:
        source.unlink()
    client = open_review()
    client.items()
    source.unlink(missing_ok=True)
    listed = client.get("/api/images")
    lost = next(item for item in listed["images"] if item["name"] == "wall.jpg")
    assert "wall.jpg" in str(client.thumbnail(lost["id"]))
    source.write_bytes(content)
    (found,) = client.get(f"/api/images?since={listed['revision']}&files={listed['files']}")["images"]
    assert (found["name"], found["error"], found["revision"]) == ("wall.jpg", None, lost["revision"])
    assert found["version"] != lost["version"]
    assert isinstance(client.thumbnail(lost["id"]), bytes)


def test_an_alpha_that_is_restored_gets_a_new_version(client: Client) -> None:
    """A tab that asked for the alpha while it was replaced may have kept the wrong one under the earlier version."""
    known = client.get("/api/images")
    before = known["images"][0]
    accepted = client.request("POST", f"{IMAGE}/accept", {"revision": before["revision"], "hints": None}).json
    undone = client.request("POST", f"{IMAGE}/undo", {"revision": accepted["revision"]}).json
    assert len({before["version"], accepted["version"], undone["version"]}) == 3
    assert client.get(f"/api/images?since={known['revision']}&files={known['files']}")["images"] == [undone]


def test_frames_that_are_added_are_at_their_place_in_the_shot(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    (scene / "frames").mkdir()
    for numbers in ((1, 2, 5, 11), (3, 4)):
        for number in numbers:
            shutil.copy(scene / "imgs" / "wall.jpg", scene / "frames" / f"a.{number}.jpg")
        assert icm("--shot", src=scene / "frames").exit_code == 0
        if numbers[0] == 1:
            client = open_review()
            assert client.get(IMAGE)["shot"] == [0, 1, 2, 3]
    items = client.items()
    assert client.get(IMAGE)["shot"] == [items[f"a.{number}.jpg"]["id"] for number in (1, 2, 3, 4, 5, 11)]


def test_only_decisions_change_the_decision_of_an_image(client: Client) -> None:
    """The page shows a message if it changes elsewhere; a recompute must not cause one."""
    item = next(iter(client.items().values()))
    target = f"/api/images/{item['id']}"
    rejected = client.request("POST", f"{target}/reject", {"revision": item["revision"]}).json
    before = client.app.run.record_folder / "before"
    client.app.teaching._save_alphas(before)  # as a recompute does
    client.app.teaching._save_changes({item["id"]: 0.5}, before)
    changed = client.get(target)
    assert (changed["status"], changed["decision"]) == ("open", rejected["decision"])
    recomputed = client.request("POST", f"{target}/undo", {"revision": changed["revision"]}).json
    assert (recomputed["status"], recomputed["decision"]) == ("rejected", rejected["decision"])
    undone = client.request("POST", f"{target}/undo", {"revision": recomputed["revision"]}).json
    assert "" == item["decision"] == undone["decision"] != rejected["decision"]


def test_a_recompute_whose_files_cannot_be_written_is_an_error(client: Client, scene: Path) -> None:
    """It can be started later: its lock is free."""
    record = scene / "out" / ".icm"
    (record / "recompute.jsonl").mkdir()
    response = client.request("POST", "/api/recompute", {})
    assert response.status == 400
    assert str(record / "recompute.jsonl") in response.json["error"]
    lock = atomic_writes.open_locked(record / "recompute.lock", 0)
    assert lock is not None
    os.close(lock)
    (record / "recompute.jsonl").rmdir()


def test_an_error_of_the_system_is_a_message_with_its_reason(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/out/a.png")
    monkeypatch.setattr(client.app.corrections, "reject", Mock(side_effect=error))
    response = client.request("POST", f"{IMAGE}/reject", {"revision": 0})
    assert response.status == 500
    assert "/out/a.png: Permission denied" in response.json["error"]


def test_images_without_an_alpha_come_last(client: Client) -> None:
    """The thumbnails are made ahead in the order of the list."""
    lost = client.items()[sorted(client.items())[0]]
    Path(client.get(f"/api/images/{lost['id']}")["output"]).unlink()
    client.app.run.scan_alphas()
    assert client.app.run.ids_by_quality()[-1] == lost["id"]


def test_an_alpha_that_changes_gets_another_version(client: Client, scene: Path) -> None:
    before = client.items()
    (scene / "out" / "wall.png").unlink()
    after = client.items()
    assert not after["wall.jpg"]["has_alpha"]
    assert after["wall.jpg"]["quality"] is None
    assert after["pad.0101.png"] == before["pad.0101.png"]
    shutil.copy(scene / "out" / "pad.0101.png", scene / "out" / "wall.png")
    assert not client.items()["wall.jpg"]["has_alpha"], "the stamp is that of another image"


def test_alphas_that_other_processes_write_are_found(
    client: Client, scene: Path, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page also gets those that were written while no server ran."""
    monkeypatch.setattr("icm_cli.review.server.SCAN_INTERVAL_S", 0)
    monkeypatch.setattr("icm_cli.review.server.SCAN_PAUSE_FACTOR", 0)
    first = client.get("/api/images")
    known = f"since={first['revision']}&files={first['files']}"
    assert client.get(f"/api/images?{known}")["images"] == []
    (scene / "out" / "wall.png").rename(scene / "kept.png")
    again = client.get(f"/api/images?{known}")
    assert [(item["name"], item["has_alpha"]) for item in again["images"]] == [("wall.jpg", False)]
    assert client.get(f"/api/images?since=0&files={again['files']}")["images"] == []
    shutil.copy(scene / "kept.png", scene / "out" / "wall.png")
    restarted = open_review()
    for files in (again["files"], 10**14):  # the second: the clock was set back
        images = restarted.get(f"/api/images?since=0&files={files}")["images"]
        assert {item["name"]: item["has_alpha"] for item in images} == dict.fromkeys(client.items(), True)


def test_the_run_is_described(client: Client, scene: Path) -> None:
    run = client.get("/api/run")
    assert run["folder"] == str(scene / "out")
    assert run["count"] == 3
    assert (run["model_state"], run["is_shot"], run["review_below"]) == ("loading", False, 0.8)
    assert run["hints_folder"] == str(scene / "out" / ".icm" / "hints")
    assert f"--src {scene}/imgs" in run["command"]
    assert f"--hints {run['hints_folder']}" in run["command"]


@pytest.mark.parametrize("view", ["source", "alpha", "cutout", "overlay"])
def test_thumbnails_are_kept_until_a_file_changes(
    client: Client, scene: Path, view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = client.items()["wall.jpg"]["id"]
    first = client.thumbnail(id, view)
    assert isinstance(first, bytes)
    image = np.asarray(Image.open(io.BytesIO(first)).convert("RGB"), int)
    height, width = read(scene / "imgs" / "wall.jpg").shape[:2]
    assert image.shape[:2] == (height, width), "a small image is not enlarged"
    if view == "alpha":
        assert np.abs(image[..., 0] - read(scene / "out" / "wall.png")).mean() < 3
    with monkeypatch.context() as patch:
        patch.setattr(client.app.images, "_draw_thumbnail", None)
        assert client.thumbnail(id, view) == first, "it is on the disk"
    shutil.copy(scene / "imgs" / "sub" / "deep.png", scene / "imgs" / "wall.jpg")
    shutil.copy(scene / "out" / "sub" / "deep.png", scene / "out" / "wall.png")
    changed = client.thumbnail(id, view)
    assert changed != first
    kept = [path.read_bytes() for path in (scene / "out" / ".icm" / "thumbnails").rglob(f"*-{view}.jpg")]
    assert changed in [content[:-VERSION_DIGITS] for content in kept]
    assert first not in [content[:-VERSION_DIGITS] for content in kept]


def test_large_photographs_have_upright_thumbnails_in_srgb(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    image = np.zeros((1200, 1600, 3), np.uint8)
    image[:, 800:] = (200, 40, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(image).save(scene / "imgs" / "wall.jpg", exif=exif, quality=95)
    assert icm().exit_code == 0
    client = open_review()
    content = client.thumbnail(client.items()["wall.jpg"]["id"], "source")
    assert isinstance(content, bytes)
    small = np.asarray(Image.open(io.BytesIO(content)), int)
    assert small.shape == (256, 192, 3)
    assert np.abs(small[10:118].mean(axis=(0, 1)) - 0).max() < 4
    assert np.abs(small[138:246].mean(axis=(0, 1)) - (200, 40, 30)).max() < 4


def test_images_are_shown_as_they_are_displayed(client: Client, scene: Path) -> None:
    id = client.items()["wall.jpg"]["id"]
    source = client.request("GET", f"/api/images/{id}/source?v=1")
    assert source.headers["cache-control"].startswith("private, max-age=")
    shown = np.asarray(Image.open(io.BytesIO(source.content)), int)
    assert np.abs(shown - read(scene / "imgs" / "wall.jpg")[..., ::-1]).mean() < 2
    alpha = client.request("GET", f"/api/images/{id}/alpha")
    assert alpha.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(alpha.content))), read(scene / "out" / "wall.png"))


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"format": "tiff", "depth": "16"}, ()),
        ({"format": "exr"}, ()),
        ({}, ("--invert",)),
        ({"trimap": "also"}, ()),
        ({"foreground": "auto", "format": "exr"}, ()),
        ({"foreground": "straight"}, ()),
    ],
)
def test_alphas_of_every_output(
    icm: Icm, scene: Path, open_review: OpenReview, options: dict[str, str], flags: tuple[str, ...]
) -> None:
    """The page shows the alpha, whatever is written: also for the cropped EXR, in its display window."""
    rgb = read(scene / "imgs" / "wall.jpg")[..., ::-1].astype(np.float32) / 255
    write_cropped_exr(scene / "imgs" / "wall.exr", rgb, (20, 10, 100, 100))
    (scene / "imgs" / "wall.jpg").unlink()
    assert icm(out=scene / "plain").exit_code == 0
    assert icm(*flags, **options).exit_code == 0
    client = open_review()
    items = client.items()
    assert len(items) == 3
    for name, item in items.items():
        assert item["has_alpha"]
        assert client.get(f"/api/images/{item['id']}")["error"] is None
        content = client.request("GET", f"/api/images/{item['id']}/alpha").content
        plain = read(scene / "plain" / Path(name).with_suffix(".png"))
        assert np.abs(np.asarray(Image.open(io.BytesIO(content)), int) - plain).max() <= 1
        assert isinstance(client.thumbnail(item["id"]), bytes)


def test_trimaps_instead_of_alphas_are_shown(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    assert icm(trimap="instead").exit_code == 0
    client = open_review()
    content = client.request("GET", f"{IMAGE}/alpha").content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), read(scene / "out" / "pad.0101.png"))


def test_pages_of_a_file_are_images(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    pages = [Image.open(scene / "imgs" / "wall.jpg").convert("RGB").rotate(turn) for turn in (0, 20)]
    (scene / "pages").mkdir()
    pages[0].save(scene / "pages" / "a.tif", save_all=True, append_images=pages[1:])
    assert icm(src=scene / "pages").exit_code == 0
    client = open_review()
    assert list(client.items()) == ["a.0001.tif", "a.0002.tif"]
    for id, page in enumerate(pages):
        shown = np.asarray(Image.open(io.BytesIO(client.request("GET", f"/api/images/{id}/source").content)), int)
        assert np.abs(shown - np.asarray(page)).mean() < 2


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "gone"])
def test_damaged_files_have_an_error_and_harm_nothing_else(client: Client, scene: Path, damage: str) -> None:
    id = client.items()["wall.jpg"]["id"]
    for path in (scene / "imgs" / "wall.jpg", scene / "out" / "wall.png"):
        content = {"empty": b"", "text": b"no image", "truncated": path.read_bytes()[:700], "gone": b""}[damage]
        path.write_bytes(content)
        if damage == "gone":
            path.unlink()
    for view in ("source", "alpha", "cutout", "overlay"):
        reason = client.thumbnail(id, view)
        assert isinstance(reason, str)
        assert "wall" in reason
    for target in ("source", "alpha"):
        response = client.request("GET", f"/api/images/{id}/{target}")
        assert response.status == 404
        assert "wall" in response.json["error"]
    assert str(scene / "imgs" / "wall.jpg") in client.get(f"/api/images/{id}")["error"]
    taught = client.request("POST", "/api/references", {"id": id, "kind": "negative", "area": "image"})
    assert str(scene / "imgs" / "wall.jpg") in taught.json["error"]
    assert isinstance(client.thumbnail(0), bytes)


class TestThumbnailWorkers:
    @staticmethod
    def ask(workers: ThumbnailWorkers, *ids: int) -> dict[int, bytes | str]:
        return asyncio.run(workers.make(ids, "alpha"))

    def test_a_request_is_answered_with_what_is_ready(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("icm_cli.review.thumbnails.MAX_AHEAD", 0)
        workers = ThumbnailWorkers(lambda id, _: b"%d" % id, range(4))
        assert self.ask(workers, 3, 1, 2) == {3: b"3", 1: b"1", 2: b"2"}
        monkeypatch.setattr("icm_cli.review.thumbnails.BATCH_S", -1)
        assert self.ask(workers, 2, 1, 3) == {2: b"2"}
        workers.close()

    def test_an_error_is_that_of_its_image_only(self) -> None:
        def make(id: int, _: str) -> bytes:
            if not id:
                raise ImageError("damaged")
            return b"1"

        workers = ThumbnailWorkers(make, range(2))
        assert self.ask(workers, 0, 1) == {0: "damaged", 1: b"1"}
        workers.close()

    def test_the_next_thumbnails_of_the_list_are_made_ahead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("icm_cli.review.thumbnails.MAX_AHEAD", 2)
        made: list[tuple[int, str]] = []
        changed = threading.Condition()

        def make(id: int, view: str) -> bytes:
            with changed:
                made.append((id, view))
                changed.notify()
            return b"%d" % id

        def wait_for(*expected: tuple[int, str]) -> None:
            with changed:
                assert changed.wait_for(lambda: made == list(expected), 10), made

        workers = ThumbnailWorkers(make, [4, 2, 5, 1, 3, 0])
        wait_for((4, "cutout"), (2, "cutout"))
        assert self.ask(workers, 5) == {5: b"5"}
        wait_for((4, "cutout"), (2, "cutout"), (5, "alpha"), (1, "alpha"), (3, "alpha"))
        workers.close()
        assert len(made) == 5


def test_an_unknown_view_is_refused(client: Client) -> None:
    for view in ("", "view=", "view=hints", "view=../source"):
        assert client.request("GET", f"/api/thumbnails?ids=0&{view}").status == 400


HOSTILE = ["<img src=x onerror=alert(1)>.png", "a b'\"&;.png", "a..png", "%2e%2e%2f.png", "-rf.png", "\x1b[31mred.png"]


def test_hostile_names_are_data(icm: Icm, scene: Path, open_review: OpenReview) -> None:
    folder = scene / "hostile"
    folder.mkdir()
    names = [*HOSTILE, os.fsdecode(b"\xff\xfe.png")]
    for name in names:
        shutil.copy(scene / "imgs" / "sub" / "deep.png", folder / name)
    assert icm(src=folder).exit_code == 0
    client = open_review()
    items = client.items()
    assert set(items) == set(names)
    for item in items.values():
        assert item["has_alpha"]
        assert isinstance(client.thumbnail(item["id"]), bytes)
        assert client.request("POST", f"/api/images/{item['id']}/reject", {"revision": 0}).status == 200
        assert client.get(f"/api/images/{item['id']}")["status"] == "rejected"
    assert all(item["status"] == "rejected" for item in open_review().items().values())


class TestRuns:
    def test_a_folder_without_a_run(self, scene: Path) -> None:
        with pytest.raises(UsageError, match=r"is not the output folder of a run of icm matte .*; give the folder"):
            ReviewRun(scene / "imgs", None, print)
        with pytest.raises(UsageError, match="is not a folder"):
            ReviewRun(scene / "nowhere", None, print)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "[]",
            '{"schema_version": 9, "icm": "1", "options": {}}',
            '{"schema_version": 1, "icm": "1", "options": {"nothing": 1}}',
            '{"schema_version": 1, "icm": "1", "options": {"ref": []}}',
        ],
    )
    @pytest.mark.usefixtures("client")
    def test_a_damaged_record(self, scene: Path, content: str) -> None:
        (scene / "out" / ".icm" / "run.json").write_text(content)
        with pytest.raises(UsageError, match=r"run\.json.*run the same icm matte command again"):
            ReviewRun(scene / "out", None, print)

    def test_the_record_is_of_every_working_directory(
        self, icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(scene)
        options = {"ref": "ref.png", "mask": "mask.png", "src": "imgs/*.jpg", "out": "out", "include": "w*"}
        assert icm("--overwrite", "--workers", "1", report="r.json", **options).exit_code == 0
        monkeypatch.chdir("/")
        read = read_run_record(scene / "out")
        assert read.given == {"ref", "mask", "src", "out", "include", "model", "device", "workers"}
        assert read.sources.src == str(scene / "imgs" / "*.jpg")
        assert f"--out {scene}/out" in command_line(read)
        assert list(ReviewRun(scene / "out", None, print).names) == ["wall.jpg"]

    def test_shards_and_frames_have_one_review(self, icm: Icm, open_review: OpenReview) -> None:
        for flags in (("--shard", "1/2"), ("--shard", "2/2"), ("--frames", "101")):
            assert icm(*flags).exit_code == 0
        assert all(item["has_alpha"] for item in open_review().items().values())
        assert len(open_review().items()) == 3

    def test_frame_patterns_of_a_shot(self, icm: Icm, scene: Path, open_review: OpenReview) -> None:
        for number in (1001, 1002, 1003):
            shutil.copy(scene / "imgs" / "wall.jpg", scene / f"sh.{number}.jpg")
        assert icm("--shot", src=scene / "sh.####.jpg", out=scene / "mattes" / "m.####.png").exit_code == 0
        client = open_review(scene / "mattes")
        assert list(client.items()) == ["sh.1001.jpg", "sh.1002.jpg", "sh.1003.jpg"]
        assert client.get("/api/run")["is_shot"]
        assert client.get("/api/images/1")["shot"] == [0, 1, 2]
        assert client.get("/api/images/1")["output"] == str(scene / "mattes" / "m.1002.png")

    def test_sources_from_standard_input(
        self, small_model: Path, scene: Path, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Shards of one list add their parts to the recorded list."""
        from icm_cli.matting.matte import matte

        monkeypatch.chdir(scene)
        for name in ("wall.jpg", "pad.0101.png"):
            monkeypatch.setattr("sys.stdin", io.StringIO(f"imgs/{name}\n"))
            matte("ref.png", "mask.png", src="-", out="out", shard="1/1", device="cpu", model=str(small_model))
        assert list(open_review().items()) == ["imgs/pad.0101.png", "imgs/wall.jpg"]

    def test_alphas_whose_sources_are_gone_are_listed(self, icm: Icm, scene: Path, open_review: OpenReview) -> None:
        assert icm(trimap="also").exit_code == 0
        (scene / "imgs" / "wall.jpg").unlink()
        client = open_review()
        items = client.items()
        assert list(items) == ["pad.0101.png", "sub/deep.png", "wall.jpg"]
        assert "does not exist" in items["wall.jpg"]["error"]
        assert items["wall.jpg"]["quality"] is not None
        assert isinstance(client.thumbnail(2, "alpha"), bytes)
        assert "does not exist" in str(client.thumbnail(2, "source"))
        before = (scene / "out" / "wall.png").read_bytes()
        assert "restore the source" in client.get("/api/images/2")["source_error"]
        assert client.get("/api/images/1")["source_error"] == ""
        refused = client.request("POST", "/api/images/2/accept", {"revision": 0, "hints": None})
        assert refused.status == 400
        assert f"its source {scene}/imgs/wall.jpg does not exist any more; restore the source" in refused.json["error"]
        assert client.get("/api/images/2")["status"] == "open"
        assert (scene / "out" / "wall.png").read_bytes() == before
        shutil.rmtree(scene / "imgs")
        notices: list[str] = []
        assert len(open_review(notice=notices.append).items()) == 3
        assert "only the alphas are shown" in notices[0]

    @pytest.mark.usefixtures("client")
    def test_a_read_only_folder_can_be_looked_at(
        self, scene: Path, open_review: OpenReview, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The terminal and the page say at the start why nothing can be saved. An earlier recompute does not matter."""
        shutil.rmtree(scene / "out" / ".icm" / "hints")
        (scene / "out" / ".icm" / "recompute.lock").touch()
        forbid_writing(monkeypatch)
        client = open_review()
        (warning,) = client.get("/api/run")["warnings"]
        assert warning.startswith(f"changes cannot be saved: {scene}/out/.icm cannot be written: Read-only file system")
        assert all(item["has_alpha"] for item in client.items().values())
        assert client.get("/api/recompute")["state"] == "idle"
        assert len(client.items()) == 3

    @pytest.mark.usefixtures("client")
    def test_decisions_can_be_saved_if_only_the_hints_are_read_only(
        self, scene: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        touch = Path.touch

        def touch_elsewhere(path: Path) -> None:
            if path.parent == scene / "hints":
                raise OSError(errno.EROFS, "Read-only file system")
            touch(path)

        monkeypatch.setattr(Path, "touch", touch_elsewhere)
        run = ReviewRun(scene / "out", scene / "hints", print)
        assert run.save_error.startswith(f"hints cannot be saved: {scene}/hints cannot be written")

    @pytest.mark.parametrize("is_recorded", [True, False])
    def test_a_folder_for_hints_that_cannot_be_created_is_an_error(
        self, icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, is_recorded: bool
    ) -> None:
        """Without it, a recompute would ignore the hints of the run."""
        hints = scene / "hints"
        hints.mkdir()
        assert icm(hints=hints).exit_code == 0
        if is_recorded:
            hints.rmdir()
        forbid_writing(monkeypatch)
        wanted = hints if is_recorded else scene / "other"
        with pytest.raises(OutputError, match=f"--hints {wanted} cannot be created: Read-only file system"):
            ReviewRun(scene / "out", None if is_recorded else wanted, print)

    @pytest.mark.usefixtures("client")
    def test_hints_must_be_a_folder(self, scene: Path) -> None:
        with pytest.raises(UsageError, match=r"--hints .*ref\.png is a file; expected the folder"):
            ReviewRun(scene / "out", scene / "ref.png", print)

    def test_a_moved_folder_is_reviewed_where_it_is(self, icm: Icm, scene: Path, open_review: OpenReview) -> None:
        hints = scene / "out" / ".icm" / "hints"
        hints.mkdir(parents=True)
        assert icm(hints=hints).exit_code == 0  # as a recompute gives them
        (scene / "out").rename(scene / "moved")
        client = open_review(scene / "moved")
        assert client.get("/api/run")["hints_folder"] == str(scene / "moved" / ".icm" / "hints")
        assert not (scene / "out").exists()
        assert client.get(IMAGE)["output"] == str(scene / "moved" / "pad.0101.png")
        assert client.items()["wall.jpg"]["has_alpha"]

    def test_hints_of_the_run_are_used(self, icm: Icm, scene: Path, open_review: OpenReview) -> None:
        (scene / "hints" / "sub").mkdir(parents=True)
        shape = {"label": "keep", "shape_type": "rectangle", "points": [[10, 10], [30, 30]]}
        (scene / "hints" / "sub" / "deep.json").write_text(json.dumps({"shapes": [shape]}))
        assert icm(hints=scene / "hints").exit_code == 0
        client = open_review()
        assert client.get("/api/run")["hints_folder"] == str(scene / "hints")
        item = client.items()["sub/deep.png"]
        assert item["has_hints"]
        (found,) = client.get(f"/api/images/{item['id']}")["hints"]["shapes"]
        assert (found["label"], found["points"]) == ("keep", [[10, 10], [30, 30]])
        other = open_review(hints=scene / "other")
        assert other.get("/api/run")["hints_folder"] == str(scene / "other")
        assert not other.items()["sub/deep.png"]["has_hints"]

    def test_all_hints_of_a_pattern_were_removed(self, icm: Icm, scene: Path) -> None:
        hint = scene / "hints" / "fix.0101.json"
        hint.parent.mkdir()
        shape = {"label": "keep", "shape_type": "rectangle", "points": [[10, 10], [30, 30]]}
        hint.write_text(json.dumps({"shapes": [shape]}))
        assert icm(src=scene / "imgs" / "pad.####.png", hints=scene / "hints" / "fix.####.json").exit_code == 0
        hint.unlink()
        notices: list[str] = []
        run = ReviewRun(scene / "out", None, notices.append)
        assert not notices  # the source of the alpha is found
        assert run.hint_target(0) == hint

    def test_a_run_ignores_the_files_of_a_review(self, icm: Icm, scene: Path) -> None:
        """Sources, hints and outputs below a folder .icm are never found, and no notice names them."""
        assert icm(src=scene / "imgs", out=scene / "imgs" / "alphas").exit_code == 0
        record = scene / "imgs" / "alphas" / ".icm"
        shutil.copy(scene / "imgs" / "wall.jpg", record / "copy.jpg")
        again = icm(src=scene / "imgs", out=scene / "imgs" / "alphas", report=scene / "r.json")
        assert again.exit_code == 0
        assert json.loads((scene / "r.json").read_text())["summary"]["kept"] == 3
        assert ".icm" not in again.stderr
        shape = {"label": "drop", "shape_type": "rectangle", "points": [[0, 0], [30, 30]]}
        (record / "hints").mkdir()
        (record / "hints" / "wall.json").write_text(json.dumps({"shapes": [shape]}))
        hinted = icm(src=scene / "imgs", out=scene / "imgs" / "alphas", hints=record / "hints")
        assert hinted.exit_code == 0, hinted.stderr
        assert "1 image with hints" in hinted.stderr
        assert not read(scene / "imgs" / "alphas" / "wall.png")[:28, :28].any()

    def test_a_record_that_cannot_be_written_is_a_notice(self, icm: Icm, scene: Path) -> None:
        (scene / "out").mkdir()
        (scene / "out" / ".icm").write_text("a file")
        result = icm()
        assert result.exit_code == 0
        assert "icm review will not be able to open this run" in result.stderr
        assert len([path for path in output_files(scene / "out") if path.suffix == ".png"]) == 3

    def test_dry_runs_and_empty_runs_record_nothing(self, icm: Icm, scene: Path) -> None:
        assert icm("--dry-run").exit_code == 0
        assert icm("--exclude", "*").exit_code == 0
        assert not list((scene / "out").iterdir())


class TestState:
    def test_a_stale_revision_changes_nothing(self, client: Client) -> None:
        first = client.request("POST", f"{IMAGE}/reject", {"revision": 0}).json
        assert first["status"] == "rejected"
        revision = first["revision"]
        assert revision > 0
        stale = client.request("POST", f"{IMAGE}/reject", {"revision": 0})
        assert stale.status == 409
        assert stale.json["image"] == first
        assert client.get("/api/images?since=0")["images"] == [stale.json["image"]]
        listed = client.get(f"/api/images?since={revision}")
        assert (listed["revision"], listed["images"]) == (revision, [])
        assert client.request("GET", "/api/images?since=x").status == 404

    def test_two_servers_see_each_other(self, client: Client, open_review: OpenReview) -> None:
        other = open_review()
        assert client.request("POST", f"{IMAGE}/reject", {"revision": 0}).status == 200
        assert [item["name"] for item in other.get("/api/images?since=0")["images"]] == ["pad.0101.png"]
        assert other.request("POST", f"{IMAGE}/undo", {"revision": 0}).status == 409
        revision = other.request("POST", "/api/images/1/reject", {"revision": 0}).json["revision"]
        assert client.get("/api/images?since=1")["revision"] == revision

    def test_no_change_of_many_threads_and_processes_is_lost(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from icm_cli.review.state import ReviewState\n"
            "state = ReviewState(Path(sys.argv[1]))\n"
            "for number in range(10):\n"
            "    with state.edit('shared') as image: image.undo.append({})\n"
        )
        others = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
        state = ReviewState(tmp_path)

        def edit() -> None:
            for _ in range(5):
                with state.edit("shared") as image:
                    image.undo.append({})

        threads = [threading.Thread(target=edit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [other.wait() for other in others] == [0, 0]
        assert len(state.read("shared").undo) == state.read("shared").revision == state.revision == 40

    def test_an_error_or_a_kill_saves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        state = ReviewState(tmp_path)
        with state.edit("a") as image:
            image.status = "accepted"
        before = alphas(tmp_path)

        def reject(number: int) -> None:
            with state.edit("a") as image:
                image.status = "rejected"
                assert 1 / number

        with pytest.raises(ZeroDivisionError):
            reject(0)
        monkeypatch.setattr(atomic_writes, "_rename", lambda *_: (_ for _ in ()).throw(OSError(5, "killed")))
        with pytest.raises(OutputError):
            reject(1)
        monkeypatch.undo()
        assert alphas(tmp_path) == before
        assert state.read("a").status == ReviewState(tmp_path).read("a").status == "accepted"
        with pytest.raises(StaleRevisionError), state.edit("a", 0):
            pass

    def test_a_held_lock_is_a_message(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("icm_cli.review.state.LOCK_TIMEOUT_S", 0.05)
        with (
            atomic_writes.locked_file(tmp_path / "review.lock", 0),
            pytest.raises(StateBusyError),
            ReviewState(tmp_path).edit("a"),
        ):
            pass

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "[]",
            '{"schema_version": 2, "revision": 0, "images": {}}',
            '{"schema_version": 1, "revision": 0, "images": {"a": {}}}',
            '{"schema_version": 1, "revision": 0, "images": {"a": {"status": "good", "revision": 1, "taught": null, '
            '"change": null, "undo": []}}}',
        ],
    )
    def test_a_damaged_state_is_not_replaced(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "review.json").write_text(content)
        with pytest.raises(UsageError, match=r"review\.json"):
            ReviewState(tmp_path)
        assert (tmp_path / "review.json").read_text() == content

    def test_a_removed_state_begins_anew(self, tmp_path: Path) -> None:
        state = ReviewState(tmp_path)
        with state.edit("a") as image:
            image.status = "rejected"
        (tmp_path / "review.json").unlink()
        assert state.read("a").status == "open"
        assert state.revision > 1


class TestCommand:
    @pytest.fixture
    def command(self, icm: Icm, scene: Path) -> list[str]:
        assert icm().exit_code == 0
        return [sys.executable, "-m", "icm_cli", "review", str(scene / "out"), "--no-browser"]

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_ends_the_server(self, command: list[str], number: signal.Signals, code: int) -> None:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        link = process.stdout.readline()
        assert link.startswith("http://127.0.0.1:")
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert "run the same command again to continue the review" in errors
        assert "Traceback" not in errors

    def test_a_port_in_use_is_one_sentence(self, command: list[str]) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            ended = subprocess.run([*command, "--port", str(port)], capture_output=True, text=True, check=False)
        assert ended.returncode == 3
        (line,) = [line for line in ended.stderr.splitlines() if "cannot be served" in line]
        assert f"127.0.0.1:{port}" in line
        assert "give another --port" in line

    def test_the_port_is_checked_before_the_run(self) -> None:
        from icm_cli.cli import app

        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            result = CliRunner().invoke(app, ["review", "nowhere", "--port", str(taken.getsockname()[1])])
        assert result.exit_code == 3
        assert "cannot be served" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "missing option: ALPHAS"),
            (["a", "b"], "unexpected words: b"),
            (["nowhere"], "is not a folder"),
            (["nowhere", "--port", "70000"], "--port is 70000"),
            (["nowhere", "--host", "a b"], "--host is 'a b'"),
        ],
    )
    def test_wrong_usage_is_one_sentence(self, arguments: list[str], message: str) -> None:
        from icm_cli.cli import app

        result = CliRunner().invoke(app, ["review", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.usefixtures("client")
def test_starting_needs_no_torch(scene: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from icm_cli.review.server import ReviewRun\n"
        "ReviewRun(Path(sys.argv[1]), None, print).scan_alphas(); print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(scene / "out")], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


def test_the_page_has_no_external_resource_and_is_short() -> None:
    lines = [
        line for path in STATIC.iterdir() if path.suffix in (".js", ".css") for line in path.read_text().splitlines()
    ]
    assert len(lines) <= 2000
    for path in STATIC.iterdir():
        text = path.read_text()
        assert "https://" not in text.replace("https://www.w3.org", "")
        assert "innerHTML" not in text
        assert "<script>" not in text
