"""``icm review`` in a real browser: Chromium uses the page of a real server over a small run."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from browser import CHROMIUM, TIMEOUT_S, ReviewPage, ReviewServer, open_browser, wait_until
from conftest import COMPOSITES, SMALL_MODEL, alphas, arguments, read, shrink
from playwright.sync_api import Browser, Page, expect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

IMAGES = ("day/brickwall.jpg", "day/lawn.jpg", "night/cat.jpg", "night/deepfield.jpg", "night/launchpad.jpg")
WRONG = "night/cat.jpg"
"""An image whose alpha is empty, although the object is in it."""
ON_OBJECT, OFF_OBJECT = (185, 140), (60, 60)
"""Pixels of that image, x and y."""
HOSTILE_NAMES = (
    "<img src=x onerror=document.title='hacked'>.jpg",
    "</script><script>alert(1)</script>.jpg".replace("/", "∕"),
    "\"double\" 'single' `ticks` & &amp; ${0}.jpg",
    "ünïcode 猫 🐈 \u202egpj.exe.jpg",
    "%2e%2e%2f..%2f..%2fetc%2fpasswd.jpg",
    "#fragment?query=1&x=%00.jpg",
    "line\nbreak\ttab.jpg",
    os.fsdecode(b"latin-\xe9.jpg"),
    f"{'long ' * 48}.jpg",
)
TARGETS_OUTSIDE = (
    "/static/../server.py",
    "/static/..%2fserver.py",
    "/static/%2e%2e/server.py",
    "/static//etc/passwd",
    "/static/%2fetc%2fpasswd",
    "//etc/passwd",
    "/../../../../etc/passwd",
    "/api/images/../run",
    "/api/images/%2e%2e%2f%2e%2e/alpha",
    "/api/thumbnails?ids=0&view=../../../etc/passwd",
    "/api/images/-1",
    "/api/images/99999999999999999999",
    "/api/images/0x0/source",
    "/api/images/%D9%A3/source",
)
CELLS = "#grid .cell[data-id]:visible"
expect.set_options(TIMEOUT_S * 1000)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run: ref.png, mask.png, small.yaml, imgs/, and their alphas in alphas/."""
    folder = tmp_path_factory.mktemp("review") / "run"
    folder.mkdir()
    shrink(COMPOSITES / "ref.jpg", folder / "ref.png", 200)
    shrink(COMPOSITES / "mask.png", folder / "mask.png", 200)
    for name in IMAGES:
        target = folder / "imgs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shrink(COMPOSITES / "imgs" / target.name, target, 240)
    (folder / "imgs" / "odd").mkdir()
    content = cv2.imencode(".jpg", cv2.resize(read(folder / "imgs" / WRONG), (80, 60)))[1].tobytes()
    for name in HOSTILE_NAMES:
        (folder / "imgs" / "odd" / name).write_bytes(content)
    (folder / "small.yaml").write_text(SMALL_MODEL)
    run_matte(folder, folder / "alphas")
    shutil.copytree(folder, folder.with_name("template"))
    return folder


@pytest.fixture
def folder(run_folder: Path) -> Path:
    """The folder of the run, as it was before any review."""
    shutil.rmtree(run_folder)
    return shutil.copytree(run_folder.with_name("template"), run_folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., ReviewServer]]:
    """A function that starts the server over the run."""
    servers: list[ReviewServer] = []

    def start_server(*flags: str) -> ReviewServer:
        servers.append(ReviewServer.start(folder / "alphas", "--device", "cpu", *flags))
        return servers[-1]

    yield start_server
    for server in servers:
        server.kill()


@pytest.fixture
def server(start: Callable[..., ReviewServer]) -> ReviewServer:
    return start()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """A function that opens the page of a server in a new tab, with cookies of its own.

    After the test, no tab may have reported an error, or asked for anything elsewhere.
    """
    opened: list[tuple[ReviewPage, ReviewServer]] = []

    def open_tab(server: ReviewServer, width: int = 1280, height: int = 800) -> Page:
        tab = ReviewPage(browser.new_context(viewport={"width": width, "height": height}).new_page())
        opened.append((tab, server))
        tab.page.goto(server.url)
        expect(tab.page.locator(CELLS).first).to_be_visible()
        return tab.page

    yield open_tab
    for tab, _ in opened:
        tab.page.context.close()
    for tab, server in opened:
        assert not tab.errors
        assert [url for url in tab.requests if not url.startswith((server.origin, "blob:", "data:"))] == []


def run_matte(folder: Path, out: Path, *flags: str, **others: Path) -> None:
    """Run ``icm matte`` on the images of a folder as a user does. Keyword arguments replace options."""
    options = {"ref": "ref.png", "mask": "mask.png", "src": "imgs", "model": "small.yaml"}
    values = {name: folder / value for name, value in options.items()} | {"out": out, "device": "cpu"} | others
    command = [sys.executable, "-m", "icm_cli.cli", "matte", "--quiet", *arguments(values), *flags]
    subprocess.run(command, check=True, timeout=120)


def open_image(page: Page, server: ReviewServer, name: str) -> dict[str, Any]:
    """Open an image by its address; return what the server says about it."""
    item = server.images()[name]
    page.goto(f"{server.origin}/#image-{item['id']}")
    expect(page.locator("#image-name")).to_have_attribute("title", item["name"])
    expect(page.locator("#single")).to_have_attribute("aria-busy", "false")
    return server.get(f"/api/images/{item['id']}")


def to_page(page: Page, image: dict[str, Any], point: tuple[float, float]) -> tuple[float, float]:
    """Return where a pixel of an image is on the page that shows the whole image."""
    box = page.locator("#marks").bounding_box()
    assert box is not None
    zoom = min(4, box["width"] / image["width"], box["height"] / image["height"])
    left = box["x"] + (box["width"] - zoom * image["width"]) / 2
    top = box["y"] + (box["height"] - zoom * image["height"]) / 2
    return left + zoom * (point[0] + 0.5), top + zoom * (point[1] + 0.5)


def shown_alpha(page: Page, image: dict[str, Any], point: tuple[int, int]) -> int:
    """Return the alpha that the page shows at a pixel, 0..255."""
    page.mouse.move(*to_page(page, image, point))
    readout = page.locator("#readout")
    expect(readout).to_contain_text(f"{point[0]}, {point[1]} ")
    return int(readout.inner_text().rpartition(" A ")[2].split()[0])


def wait_for_answer(page: Page) -> None:
    """Wait until the page shows the refined alpha of the hints."""
    expect(page.locator("#hints-state")).to_contain_text("not saved")
    expect(page.locator("#answer-state")).to_have_text("")


def listed_ids(page: Page) -> list[int]:
    """Return the ids of the images in view, from left to right and from top to bottom."""
    script = """(cells) => cells.map((cell) => [cell.getBoundingClientRect(), Number(cell.dataset.id)])
        .sort(([a, _a], [b, _b]) => a.top - b.top || a.left - b.left).map(([_, id]) => id)"""
    return page.locator(CELLS).evaluate_all(script)


class TestOverview:
    def test_sort_filter_and_thumbnails(self, server: ReviewServer, open_page: Open) -> None:
        page = open_page(server)
        total = len(IMAGES) + len(HOSTILE_NAMES)
        expect(page.locator("#list-title")).to_contain_text(f"{total} ")
        expect(page.locator(CELLS)).to_have_count(total)
        expect(page.locator("#grid .thumbnail.loaded")).to_have_count(total)
        items = {item["id"]: item for item in server.images().values()}
        qualities = [items[each]["quality"] for each in listed_ids(page)]
        assert qualities == sorted(qualities)
        page.locator("#sort").select_option("name")
        expect(page.locator("#grid .thumbnail.loaded")).to_have_count(total)
        assert [items[each]["name"] for each in listed_ids(page)][: len(IMAGES)] == list(IMAGES)
        page.locator("#filter-folder").select_option("night")
        expect(page.locator(CELLS)).to_have_count(3)
        page.locator("#filter-text").fill("DEEP")
        expect(page.locator(f"{CELLS} .cell-name")).to_have_text(["deepfield.jpg"])
        page.locator("#filter-text").fill("nothing has this name")
        expect(page.locator("#grid-empty")).to_be_visible()
        page.locator('[data-action="reset-filters"]').click()
        expect(page.locator(CELLS)).to_have_count(total)
        for view in ("alpha", "overlay", "source"):
            page.locator("#thumbnail-view").select_option(view)
            expect(page.locator("#grid .thumbnail.loaded")).to_have_count(total)

    @pytest.mark.parametrize("width", [1280, 1920])
    def test_no_horizontal_scrolling(self, server: ReviewServer, open_page: Open, width: int) -> None:
        page = open_page(server, width, 720)
        check_width(page)
        for action in ("help", "teach"):
            page.locator(f'[data-action="open-{action}"]').click()
            expect(page.locator(f"#{action}")).to_be_visible()
            check_width(page)
            page.keyboard.press("Escape")
            expect(page.locator(f"#{action}")).to_be_hidden()
        open_image(page, server, f"odd/{HOSTILE_NAMES[-1]}")
        check_width(page)

    def test_a_zoom_of_200_percent(self, server: ReviewServer, open_page: Open) -> None:
        """Nothing in the header overlaps, and the image has room."""
        page = open_page(server, 640, 400)
        open_image(page, server, IMAGES[0])
        overlaps = """() => {
            const boxes = [...document.querySelectorAll("#header button, #counts, #model-state, h1")]
                .filter((each) => each.checkVisibility()).map((each) => each.getBoundingClientRect());
            return boxes.some((one, index) => one.right > innerWidth || boxes.slice(index + 1).some((other) =>
                one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom));
        }"""
        assert not page.evaluate(overlaps)
        stage = page.locator("#stage").bounding_box()
        assert stage is not None
        assert stage["height"] > 240


def check_width(page: Page) -> None:
    """The page is as wide as the window, and all that can be pressed is in the window."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = """() => [...document.querySelectorAll("button, input, select")]
        .filter((each) => each.checkVisibility() && each.getBoundingClientRect().right > innerWidth + 1)
        .map((each) => each.outerHTML)"""
    assert page.evaluate(outside) == []


class TestNames:
    def test_hostile_names_are_text(self, server: ReviewServer, open_page: Open) -> None:
        page = open_page(server)
        page.locator("#filter-folder").select_option("odd")
        expect(page.locator(CELLS)).to_have_count(len(HOSTILE_NAMES))
        shown = page.locator("#grid .cell-name").evaluate_all("(cells) => cells.map((cell) => cell.textContent)")
        names = [name for name in HOSTILE_NAMES if name.isprintable()]
        assert {*names, "ünïcode 猫 🐈 \\u{202e}gpj.exe.jpg"} <= set(shown)
        for name in HOSTILE_NAMES:
            open_image(page, server, f"odd/{name}")
        assert "hacked" not in page.title()
        assert page.locator("main script, main img[src='x']").count() == 0

    def test_the_command_is_copied_as_it_is(self, server: ReviewServer, open_page: Open) -> None:
        """The page shows escapes of direction characters, such as those in the name of this negative."""
        item = server.images()[f"odd/{HOSTILE_NAMES[3]}"]
        server.post("/api/references", {"id": item["id"], "kind": "negative", "area": "image"})
        page = open_page(server)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator('[data-action="open-teach"]').click()
        page.locator("#teach summary").click()
        expect(page.locator("#command")).to_contain_text("\\u{202e}gpj")
        page.locator('[data-action="copy-command"]').click()
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == server.get("/api/run")["command"]
        assert HOSTILE_NAMES[3] in copied

    def test_alphas_of_hostile_names_are_accepted(self, server: ReviewServer, open_page: Open, folder: Path) -> None:
        server.wait_until_ready()
        page = open_page(server)
        hints = {"shapes": [{"label": "fg", "shape_type": "point", "points": [[62, 46]]}]}
        for number, name in enumerate(HOSTILE_NAMES):
            item = server.images()[f"odd/{name}"]
            given = hints if number >= len(HOSTILE_NAMES) - 3 else None
            accepted = server.post(f"/api/images/{item['id']}/accept", {"revision": item["revision"], "hints": given})
            assert (accepted["status"], accepted["has_hints"]) == ("accepted", given is not None)
        expect(page.locator("#counts")).to_contain_text(f"{len(HOSTILE_NAMES)} accepted")
        found = sorted(os.fsencode(path.name) for path in (folder / "alphas" / ".icm" / "hints" / "odd").iterdir())
        assert found == sorted(os.fsencode(str(Path(name).with_suffix(".json"))) for name in HOSTILE_NAMES[-3:])


class TestSecurity:
    def test_only_the_link_opens_the_page(self, server: ReviewServer, browser: Browser, open_page: Open) -> None:
        other = browser.new_context().new_page()
        for target in ("/", "/?token=wrong", f"/?token={server.token[:-1]}", "/api/images", "/static/main.js"):
            answer = other.goto(server.origin + target)
            assert answer is not None
            assert answer.status == 403, target
        other.goto(f"{server.origin}/?token=wrong")
        expect(other.locator("body")).to_contain_text("this link is incomplete, or from an earlier start")
        expect(other.locator("body")).to_contain_text("open that link in this browser")
        rebound = server.url.replace("127.0.0.1", "other.example")
        answer = other.goto(rebound)
        assert answer is not None
        assert answer.status == 403
        other.context.close()
        page = open_page(server)
        assert page.url == f"{server.origin}/"
        assert page.evaluate("document.cookie") == ""
        (cookie,) = page.context.cookies()
        assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (f"icm-{server.port}", True, "Strict")

    def test_other_pages_change_and_read_nothing(self, server: ReviewServer, open_page: Open, tmp_path: Path) -> None:
        """A page of another program on this machine, which the browser sends the cookie to."""
        page = open_page(server)
        (tmp_path / "index.html").write_text("<title>other</title>")
        with serve_folder(tmp_path) as other:
            attacker = page.context.new_page()
            attacker.goto(other)
            body = json.dumps({"revision": 0})
            statuses = attacker.evaluate(
                """async ([target, body]) => {
                    const kinds = ["application/json", "text/plain"];
                    const post = (kind) => fetch(target + "/api/images/0/reject", {
                        method: "POST", body, credentials: "include", mode: kind === kinds[1] ? "no-cors" : "cors",
                        headers: { "Content-Type": kind } }).then((answer) => answer.status, () => "refused");
                    const read = fetch(target + "/api/run", { credentials: "include" })
                        .then((answer) => answer.text(), () => "refused");
                    return [...await Promise.all(kinds.map(post)), await read];
                }""",
                [server.origin, body],
            )
            assert statuses[0] == statuses[2] == "refused"
            attacker.set_content(
                f"<iframe src='{server.origin}/'></iframe><form method=post action='{server.origin}/api/recompute'>"
            )
            attacker.wait_for_timeout(300)
            assert [frame.url for frame in attacker.frames[1:]] == ["chrome-error://chromewebdata/"]
            with attacker.expect_navigation():
                attacker.evaluate("document.forms[0].submit()")
            assert "403" in attacker.content() or "403" in attacker.evaluate(
                "String(performance.getEntriesByType('navigation')[0].responseStatus)"
            )
        assert {item["status"] for item in server.images().values()} == {"open"}
        assert server.get("/api/recompute")["state"] == "idle"

    def test_headers_and_refused_requests(self, server: ReviewServer) -> None:
        for target in ("/", "/static/main.js", "/api/images", "/api/thumbnails?ids=0&view=alpha", "/nothing"):
            _, headers, _ = server.request("GET", target)
            assert "default-src 'none'" in headers["content-security-policy"], target
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
        assert server.request("GET", "/api/run")[0] == 200
        assert server.request("GET", "/api/run", Host=f"localhost:{server.port}")[0] == 200
        for host in ("other.example", f"127.0.0.1.other.example:{server.port}", "", "127.0.0.1@other.example"):
            assert server.request("GET", "/api/run", Host=host)[0] in (400, 403), host
        for cookie in ("", f"icm-{server.port}=", f"icm-{server.port}={server.token}x", f"icm-1={server.token}"):
            assert server.request("GET", "/api/run", Cookie=cookie)[0] == 403, cookie
        reject, body = "/api/images/0/reject", {"revision": 0}
        for origin in ("", "null", "http://other.example", "http://127.0.0.1", f"https://other.example:{server.port}"):
            assert server.request("POST", reject, body, Origin=origin)[0] == 403, origin
        for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            assert server.request("POST", reject, body, Content_Type=kind)[0] in (400, 403, 415), kind
        assert {item["status"] for item in server.images().values()} == {"open"}

    def test_no_other_file_is_served(self, server: ReviewServer) -> None:
        for target in TARGETS_OUTSIDE:
            status, _, content = server.request("GET", target)
            assert status in (400, 404), target
            assert b"root:" not in content
            assert b"import " not in content


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """Serve the files of a folder at a free port of this machine; yield the address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{other.server_port}/"
        other.shutdown()
        thread.join()


class TestFixes:
    def test_clicks_give_the_alpha_of_the_hint_file(self, server: ReviewServer, open_page: Open, folder: Path) -> None:
        page = open_page(server)
        image = open_image(page, server, WRONG)
        server.wait_until_ready()
        assert shown_alpha(page, image, ON_OBJECT) < 128
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        wait_for_answer(page)
        assert shown_alpha(page, image, ON_OBJECT) > 127
        for point, options in ((OFF_OBJECT, {"button": "right"}), ((20, 150), {"modifiers": ["Alt"]})):
            x, y = to_page(page, image, point)
            box = page.locator("#marks").bounding_box()
            assert box is not None
            position = {"x": x - box["x"], "y": y - box["y"]}
            page.locator("#marks").click(position=position, **options)  # type: ignore[arg-type]
            wait_for_answer(page)
            assert shown_alpha(page, image, point) < 128
        expect(page.locator("#hints-state")).to_contain_text("3 hints, not saved")
        shapes = server.get(f"/api/images/{image['id']}")["hints"]
        assert shapes is None
        page.locator('[data-action="accept-stay"]').click()
        expect(page.locator("#status")).to_contain_text("accepted")
        expect(page.locator("#hints-state")).to_contain_text("3 hints, saved")
        saved = server.get(f"/api/images/{image['id']}")
        assert (saved["status"], saved["has_hints"]) == ("accepted", True)
        body = {"hints": saved["hints"], "refined": True}
        status, _, answer = server.request("POST", f"/api/images/{image['id']}/answer", body)
        assert status == 200
        run_matte(folder, folder / "again", "--include", "cat*", "--hints", str(folder / "alphas" / ".icm" / "hints"))
        again, reviewed = read(folder / "again" / "night" / "cat.png"), read(folder / "alphas" / "night" / "cat.png")
        assert (again == reviewed).all()
        assert (again == cv2.imdecode(np.frombuffer(answer, np.uint8), cv2.IMREAD_GRAYSCALE)).all()
        assert again[ON_OBJECT[::-1]] > 127 > again[OFF_OBJECT[::-1]]

    def test_notices_do_not_cover_the_image(self, server: ReviewServer, open_page: Open) -> None:
        """Also: the quality is marked as that of the saved alpha, the film strip shows folders, no button moves."""
        server.wait_until_ready()
        page = open_page(server)
        image = open_image(page, server, WRONG)
        expect(page.locator('.frame[aria-current="true"] .frame-folder')).to_have_text("night")
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        wait_for_answer(page)
        expect(page.locator("#quality-value")).to_contain_text("saved quality")
        accept = page.locator('[data-action="accept-stay"]')
        place = accept.bounding_box()
        accept.click()
        expect(page.locator("#status")).to_contain_text("cat.jpg: accepted")
        expect(page.locator("#quality-value")).not_to_contain_text("saved quality")
        assert accept.bounding_box() == place
        for width in (1280, 1920):
            page.set_viewport_size({"width": width, "height": 800})
            boxes = [page.locator(selector).bounding_box() for selector in ("#stage", "#strip-frames", "#status")]
            (stage, frames, notice) = boxes
            assert stage is not None
            assert frames is not None
            assert notice is not None
            assert stage["y"] + stage["height"] <= notice["y"]
            assert notice["y"] + notice["height"] <= frames["y"]

    def test_box_brush_and_undo(self, server: ReviewServer, open_page: Open, folder: Path) -> None:
        before = alphas(folder / "alphas")
        page = open_page(server)
        image = open_image(page, server, WRONG)
        server.wait_until_ready()
        page.locator('#tools [data-tool="box"]').click()
        drag(page, image, [(140, 80), (215, 175)])
        wait_for_answer(page)
        assert shown_alpha(page, image, ON_OBJECT) > 127
        page.locator('#tools [data-tool="keep"]').click()
        drag(page, image, [(20, 20), (40, 20), (60, 24)])
        wait_for_answer(page)
        assert shown_alpha(page, image, (40, 20)) == 255
        page.locator('#tools [data-tool="drop"]').click()
        drag(page, image, [(185, 100), (185, 150)])
        wait_for_answer(page)
        assert shown_alpha(page, image, (185, 125)) == 0
        page.keyboard.press("Control+z")
        wait_for_answer(page)
        assert shown_alpha(page, image, (185, 125)) > 127
        page.keyboard.press("Control+Shift+z")
        wait_for_answer(page)
        assert shown_alpha(page, image, (185, 125)) == 0
        page.keyboard.press("Shift+A")
        expect(page.locator("#status")).to_contain_text("accepted")
        written = read(folder / "alphas" / "night" / "cat.png")
        assert (written[20, 40], written[125, 185]) == (255, 0)
        shapes = json.loads((folder / "alphas" / ".icm" / "hints" / "night" / "cat.json").read_text())["shapes"]
        assert [(each["label"], each["shape_type"]) for each in shapes] == [
            ("fg", "rectangle"),
            ("keep", "mask"),
            ("drop", "mask"),
        ]
        run_matte(folder, folder / "again", "--include", "cat*", "--hints", str(folder / "alphas" / ".icm" / "hints"))
        assert (read(folder / "again" / "night" / "cat.png") == written).all()
        page.keyboard.press("u")
        expect(page.locator("#image-status")).to_have_attribute("data-status", "open")
        after = alphas(folder / "alphas")
        assert {name: content for name, content in after.items() if not name.startswith(".icm")} == {
            name: content for name, content in before.items() if not name.startswith(".icm")
        }
        assert not (folder / "alphas" / ".icm" / "hints" / "night" / "cat.json").exists()

    @pytest.mark.parametrize("uses_keys", [False, True])
    def test_one_press_of_a_brush_paints(self, server: ReviewServer, open_page: Open, uses_keys: bool) -> None:
        """Also: a click is not possible on paint of the opposite kind, or on a hidden point of it."""
        page = open_page(server)
        image = open_image(page, server, WRONG)
        server.wait_until_ready()
        x, y = (image["width"] // 2, image["height"] // 2) if uses_keys else (40, 20)
        for key, value in (("d", 0), ("k", 255)):
            page.keyboard.press(key)
            if uses_keys:
                page.locator('[data-action="undo"]').focus()  # a button that Enter must not press
                page.keyboard.press("Shift+ArrowDown")
                page.keyboard.press("Enter")
            else:
                page.mouse.click(*to_page(page, image, (x, y)))
            wait_for_answer(page)
            expect(page.locator("#readout")).to_contain_text(f"A {value} (")  # at the crosshair or the mouse
        page.keyboard.press("p")
        page.mouse.click(*to_page(page, image, (x, y)), button="right")
        expect(page.locator("#status")).to_contain_text("painted with Keep")
        expect(page.locator("#hints-state")).to_have_text("2 hints, not saved")
        page.mouse.click(*to_page(page, image, OFF_OBJECT))
        page.keyboard.press("m")
        page.mouse.click(*to_page(page, image, OFF_OBJECT), button="right")
        expect(page.locator("#status")).to_contain_text("A point here says the opposite")
        expect(page.locator("#hints-state")).to_have_text("3 hints, not saved")

    def test_hints_that_are_taken_back_are_no_change(self, server: ReviewServer, open_page: Open) -> None:
        page = open_page(server)
        image = open_image(page, server, WRONG)
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        expect(page.locator("#hints-state")).to_have_text("1 hint, not saved")
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        expect(page.locator("#hints-state")).to_have_text("No hints")
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        page.keyboard.press("Shift+A")
        expect(page.locator("#hints-state")).to_have_text("1 hint, saved")
        page.mouse.click(*to_page(page, image, OFF_OBJECT), button="right")
        open_image(page, server, IMAGES[0])
        open_image(page, server, WRONG)
        expect(page.locator("#hints-state")).to_have_text("2 hints, not saved")
        page.keyboard.press("Control+z")
        expect(page.locator("#hints-state")).to_have_text("1 hint, saved")

    def test_a_press_outside_of_the_image_is_no_hint(self, server: ReviewServer, open_page: Open) -> None:
        """Also if the mouse moves a little, with an arrow key for the pointer of the keyboard during the press."""
        page = open_page(server)
        image = open_image(page, server, WRONG)
        for tool in ("p", "h"):
            page.keyboard.press(tool)
            page.mouse.move(*to_page(page, image, (-6, 50)))
            page.mouse.down()
            page.mouse.move(*to_page(page, image, (-2, 50)), steps=3)
            page.keyboard.press("Shift+ArrowRight")
            page.mouse.up()
        assert hints_of(page) == []

    @pytest.mark.parametrize("uses_keys", [False, True])
    def test_escape_cancels_a_box(self, server: ReviewServer, open_page: Open, uses_keys: bool) -> None:
        """The hints and the redo stay as they were before it. Without a box, Escape goes back to the overview."""
        page = open_page(server)
        image = open_image(page, server, WRONG)
        for point in (ON_OBJECT, OFF_OBJECT):
            page.mouse.click(*to_page(page, image, point))
        page.keyboard.press("Control+z")
        expect(page.locator("#hints-state")).to_have_text("1 hint, not saved")
        page.keyboard.press("x")
        if uses_keys:
            for key in ("Shift+ArrowDown", "Enter", *["Shift+ArrowRight"] * 3, "Shift+ArrowDown"):
                page.keyboard.press(key)
        else:
            page.mouse.move(*to_page(page, image, (10, 10)))
            page.mouse.down()
            page.mouse.move(*to_page(page, image, (60, 60)), steps=4)
        expect(page.locator("#hints-state")).to_have_text("1 hint, not saved")  # the box has replaced the click
        assert hints_of(page) == ["fg rectangle"]
        page.keyboard.press("Escape")
        assert hints_of(page) == ["fg point"]
        page.mouse.move(*to_page(page, image, (80, 80)))
        page.mouse.up()
        assert hints_of(page) == ["fg point"]
        page.keyboard.press("Control+y")
        assert hints_of(page) == ["fg point", "fg point"]
        expect(page.locator('[data-action="redo-hint"]')).to_be_disabled()
        page.keyboard.press("Escape")
        expect(page.locator("#overview")).to_be_visible()

    def test_a_dragged_point_stays_out_of_hints_of_the_opposite(self, server: ReviewServer, open_page: Open) -> None:
        """It goes back from paint and from points that say the opposite. The box grows with it."""
        server.wait_until_ready()
        page = open_page(server)
        image = open_image(page, server, WRONG)
        page.keyboard.press("d")
        page.locator("#brush-size").fill("12")
        page.mouse.click(*to_page(page, image, (120, 60)))
        page.keyboard.press("x")
        drag(page, image, [(30, 30), (80, 90)])
        page.keyboard.press("p")
        page.mouse.click(*to_page(page, image, (50, 60)))
        page.mouse.click(*to_page(page, image, (60, 40)), button="right")
        drag(page, image, [(50, 60), (60, 40)])
        expect(page.locator("#status")).to_contain_text("A point here says the opposite")
        drag(page, image, [(50, 60), (120, 60)])
        expect(page.locator("#status")).to_contain_text("painted with Drop")
        drag(page, image, [(50, 60), (95, 60)])
        wait_for_answer(page)
        expect(page.locator("#alerts .alert")).to_have_count(0)
        page.keyboard.press("Shift+A")
        expect(page.locator("#hints-state")).to_have_text("4 hints, saved")
        shapes = {
            f"{each['label']} {each['shape_type']}": each["points"]
            for each in server.get(f"/api/images/{image['id']}")["hints"]["shapes"]
        }
        ((x, _),), (_, (right, _)) = shapes["fg point"], shapes["fg rectangle"]
        assert 95 <= x <= right < 100
        assert shapes["bg point"] == [[60.5, 40.5]]

    def test_a_source_that_changes_is_loaded_again(self, server: ReviewServer, open_page: Open, folder: Path) -> None:
        """The page shows the new source, and a decision about the earlier one is refused."""
        server.wait_until_ready()
        page = open_page(server)
        image = open_image(page, server, WRONG)
        source = folder / "imgs" / WRONG
        white = np.full((image["height"] // 2, image["width"] // 2, 3), 255, np.uint8)
        source.write_bytes(cv2.imencode(".jpg", white)[1].tobytes())
        page.keyboard.press("Shift+A")
        expect(page.locator("#alerts .alert")).to_contain_text("the source of night/cat.jpg has changed")
        assert server.images()[WRONG]["status"] == "open"
        page.locator("#files summary").click()
        expect(page.locator("#image-details")).to_contain_text(f"{white.shape[1]} × {white.shape[0]}")
        image |= {"width": white.shape[1], "height": white.shape[0]}
        page.mouse.move(*to_page(page, image, (10, 10)))
        expect(page.locator("#readout")).to_contain_text("x, y 10, 10   RGB 255 255 255")
        page.keyboard.press("Shift+A")
        expect(page.locator("#status")).to_contain_text("cat.jpg: accepted")
        expect(page.locator("#alerts .alert")).to_have_count(0)

    def test_images_that_another_run_adds_appear(self, server: ReviewServer, open_page: Open, folder: Path) -> None:
        page = open_page(server)
        expect(page.locator("#counts")).to_contain_text(f"of {len(IMAGES) + len(HOSTILE_NAMES)} reviewed")
        (folder / "imgs" / "added").mkdir()
        shutil.copy(folder / "imgs" / WRONG, folder / "imgs" / "added" / "new.jpg")
        shutil.copy(folder / "imgs" / WRONG, folder / "imgs" / "top.jpg")
        run_matte(folder, folder / "alphas")
        page.reload()
        expect(page.locator("#counts")).to_contain_text(f"of {len(IMAGES) + len(HOSTILE_NAMES) + 2} reviewed")
        page.locator("#filter-folder").select_option(label="(top folder)")
        expect(page.locator(f"{CELLS} .cell-name")).to_have_text(["top.jpg"])
        page.locator("#filter-folder").select_option("added")
        expect(page.locator(f"{CELLS} .cell-name")).to_have_text(["new.jpg"])
        expect(page.locator("#grid .thumbnail.loaded")).to_have_count(1)
        (folder / "imgs" / "added").rename(folder / "others")
        (folder / "others" / "new.jpg").rename(folder / "others" / "other.jpg")
        run_matte(folder, folder / "alphas", src=folder / "others")
        page.reload()
        expect(page.locator("#alerts .alert")).to_contain_text("Another run of icm matte with other sources")
        expect(page.locator("#counts")).to_contain_text(f"of {len(IMAGES) + len(HOSTILE_NAMES) + 2} reviewed")

    def test_images_without_an_alpha_come_last(self, server: ReviewServer, open_page: Open, folder: Path) -> None:
        """A run of a few frames of a sequence has no alphas of the others."""
        page = open_page(server)
        total = len(IMAGES) + len(HOSTILE_NAMES)
        page.locator("#filter-folder").select_option("night")
        expect(page.locator(f"{CELLS} .thumbnail.loaded")).to_have_count(3)
        (folder / "alphas" / "night" / "deepfield.png").unlink()
        expect(page.locator(f"{CELLS} .thumbnail.loaded")).to_have_count(2)
        assert listed_ids(page)[-1] == server.images()["night/deepfield.jpg"]["id"]
        expect(page.locator("#counts")).to_contain_text(f"0 of {total - 1} reviewed")
        page.locator('#filter-status [value="open"]').check()
        expect(page.locator(f"{CELLS} .cell-name")).to_have_count(2)
        page.locator('#filter-status [value="missing"]').check()
        expect(page.locator(f"{CELLS} .cell-name")).to_have_text(["deepfield.jpg"])
        reason = "getComputedStyle(document.querySelector('.cell .thumbnail'), '::after').content"
        wait_until(lambda: "the run did not include it" in page.evaluate(reason), "the cell shows no reason")
        page.locator(CELLS).click()
        expect(page.locator("#image-name")).to_have_text("deepfield.jpg")
        expect(page.locator("#single")).to_have_attribute("aria-busy", "false")
        page.keyboard.press("a")
        expect(page.locator("#status")).to_contain_text("no alpha to accept")
        page.route(re.compile(r"/api/images/\d+$"), lambda _: None)  # the image is loaded for ever
        page.reload()
        expect(page.locator("#image-name")).to_have_text("deepfield.jpg")
        page.keyboard.press("r")
        assert page.locator("#status").text_content() == ""

    def test_keys_alone_are_enough(self, server: ReviewServer, open_page: Open) -> None:
        """Find an image, correct it, accept it, reject the next and take that back, without a mouse."""
        server.wait_until_ready()
        page = open_page(server)
        page.locator("#filter-folder").select_option("night")
        page.locator("#sort").select_option("name")
        page.keyboard.press("/")
        page.keyboard.press("Enter")
        expect(page.locator("#grid")).to_be_focused()
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        expect(page.locator("#image-name")).to_have_text("cat.jpg")
        expect(page.locator("#single")).to_have_attribute("aria-busy", "false")
        page.keyboard.press("?")
        expect(page.locator("#help")).to_be_visible()
        page.keyboard.press("Escape")
        for number, view in enumerate(("source", "alpha", "overlay", "checker", "colour"), 1):
            page.keyboard.press(str(number))
            expect(page.locator(f'#views [data-view="{view}"]')).to_have_attribute("aria-pressed", "true")
        page.keyboard.press("Shift+ArrowDown")
        page.keyboard.press("Enter")
        wait_for_answer(page)
        page.keyboard.press("Control+z")
        expect(page.locator("#hints-state")).to_contain_text("No hints")
        for key in (*["Shift+ArrowLeft"] * 10, *["+"] * 4):
            page.keyboard.press(key)
        position = """async () => (await import("/static/editor.js")).editor.findCrosshair()"""
        x, y = page.evaluate(position)
        stage = page.locator("#stage").bounding_box()
        assert stage is not None
        assert 0 < x < stage["width"] / 2
        assert 0 < y < stage["height"]
        page.keyboard.press("f")
        page.keyboard.press("a")
        expect(page.locator("#image-name")).to_have_text("deepfield.jpg")
        expect(page.locator("#status")).to_contain_text("cat.jpg: accepted")
        expect(page.locator("#single")).to_have_attribute("aria-busy", "false")
        page.keyboard.press("r")
        expect(page.locator("#image-name")).to_have_text("launchpad.jpg")
        expect(page.locator("#status")).to_contain_text("deepfield.jpg: rejected")
        expect(page.locator("#single")).to_have_attribute("aria-busy", "false")
        page.keyboard.press("u")
        expect(page.locator("#image-name")).to_have_text("deepfield.jpg")
        expect(page.locator("#image-status")).to_have_attribute("data-status", "open")
        page.keyboard.press("Escape")
        expect(page.locator("#counts")).to_contain_text("1 accepted")
        statuses = {name: item["status"] for name, item in server.images().items() if name.startswith("night")}
        assert statuses == {"night/cat.jpg": "accepted", "night/deepfield.jpg": "open", "night/launchpad.jpg": "open"}
        page.reload()
        page.locator(CELLS).first.wait_for()
        page.keyboard.press("u")
        expect(page.locator("#status")).to_contain_text("Open an image to take back its decision")
        open_image(page, server, WRONG)
        page.keyboard.press("u")
        expect(page.locator("#image-status")).to_have_attribute("data-status", "open")

    def test_an_image_is_accepted_only_after_it_was_shown(self, server: ReviewServer, open_page: Open) -> None:
        """While it is loaded, the image before is still visible. The focus stays in the page."""
        page = open_page(server)
        held: list[Any] = []
        source = re.compile(f"/{server.images()['day/lawn.jpg']['id']}/source")
        page.route(source, lambda route: held.append(route))
        page.locator("#sort").select_option("name")
        page.locator(CELLS, has_text="brickwall.jpg").click()
        expect(page.locator("#single")).to_have_attribute("aria-busy", "false")
        button = page.locator('[data-action="accept"]')
        button.focus()
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_contain_text("brickwall.jpg: accepted")
        expect(page.locator("#image-name")).to_have_text("lawn.jpg")
        expect(page.locator("#detail-source")).to_contain_text("lawn.jpg")  # its details are there
        expect(page.locator("#loading")).to_be_visible()
        expect(button).to_be_disabled()
        for key in ("a", "r", "Shift+A"):
            page.keyboard.press(key)
        wait_until(lambda: bool(held), "the source is not asked for")
        for route in held:
            route.continue_()
        expect(button).to_be_enabled()
        assert server.images()["day/lawn.jpg"]["status"] == "open"
        expect(page.locator("#marks")).to_be_focused()

    def test_every_control_has_a_name(self, server: ReviewServer, open_page: Open) -> None:
        page = open_page(server)
        open_image(page, server, IMAGES[0])
        unnamed = """() => [...document.querySelectorAll("button, input, select, canvas[tabindex], [role=listbox]")]
            .filter((each) => !(each.getAttribute("aria-label") || each.textContent.trim() || each.title
                || each.labels?.length)).map((each) => each.outerHTML)"""
        assert page.evaluate(unnamed) == []


def hints_of(page: Page) -> list[str]:
    """Return label and type of the hints of the open image."""
    script = """async () => (await import("/static/single.js")).single.draft.shapes
        .map(({ label, shape_type: type }) => `${label} ${type}`)"""
    return page.evaluate(script)


def drag(page: Page, image: dict[str, Any], points: list[tuple[float, float]]) -> None:
    """Press the mouse at the first of these pixels, and release it at the last."""
    page.mouse.move(*to_page(page, image, points[0]))
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*to_page(page, image, point), steps=4)
    page.mouse.up()


class TestShots:
    def test_film_strip(self, folder: Path, open_page: Open) -> None:
        """The strip shows the frames of the shot; a comma and a full stop go from frame to frame."""
        (folder / "plates").mkdir()
        for number in range(1, 4):
            shutil.copy(folder / "imgs" / IMAGES[3], folder / "plates" / f"sh.{number:04d}.jpg")
        out = folder / "shot"
        run_matte(folder, out, "--shot", src=folder / "plates")
        server = ReviewServer.start(out, "--device", "cpu")
        try:
            page = open_page(server)
            open_image(page, server, "sh.0002.jpg")
            expect(page.locator("#strip-title")).to_contain_text("Frames of the shot: 2 of 3")
            expect(page.locator("#strip-frames .thumbnail.loaded")).to_have_count(3)
            page.keyboard.press(".")
            expect(page.locator("#image-name")).to_have_text("sh.0003.jpg")
            page.locator("#strip-frames .frame").first.click()
            expect(page.locator("#image-name")).to_have_text("sh.0001.jpg")
        finally:
            server.kill()


class TestSeveralPeople:
    def test_a_decision_about_a_changed_image_is_refused(self, server: ReviewServer, open_page: Open) -> None:
        first, second = open_page(server), open_page(server)
        for page in (first, second):
            open_image(page, server, IMAGES[0])
        second.route("**/api/images?since=*", lambda route: route.abort())
        first.locator('[data-action="reject"]').click()
        expect(first.locator("#status")).to_contain_text("brickwall.jpg: rejected")
        second.locator('[data-action="accept-stay"]').click()
        expect(second.locator('#alerts .alert[data-topic^="decision"]')).to_contain_text("another person")
        assert server.images()[IMAGES[0]]["status"] == "rejected"
        expect(second.locator("#image-status")).to_have_attribute("data-status", "rejected")

    def test_a_decision_of_another_person_is_a_message(self, server: ReviewServer, open_page: Open) -> None:
        """Hints that are not saved stay. The message goes away with the own decision."""
        server.wait_until_ready()
        first, second = open_page(server), open_page(server)
        image = open_image(second, server, WRONG)
        open_image(first, server, WRONG)
        second.mouse.click(*to_page(second, image, ON_OBJECT))
        wait_for_answer(second)
        first.locator('[data-action="reject"]').click()
        message = second.locator('#alerts .alert[data-topic^="decision"]')
        expect(message).to_contain_text("cat.jpg was changed in another window. Check it, and decide again.")
        expect(message).to_contain_text("Your hints are kept.")
        second.locator('[data-action="accept-stay"]').click()
        expect(second.locator("#image-status")).to_have_attribute("data-status", "accepted")
        expect(message).to_have_count(0)

    def test_messages_end_with_what_they_are_about(self, server: ReviewServer, open_page: Open) -> None:
        """That of a failed decision with the next decision, in any window; that of refused hints with these hints."""
        server.wait_until_ready()
        first, second = open_page(server), open_page(server)
        image = open_image(first, server, IMAGES[0])
        alerts = first.locator("#alerts .alert")
        first.route(re.compile("/accept"), lambda route: route.fulfill(status=503, json={"error": "it is locked"}))
        first.keyboard.press("Shift+A")
        expect(alerts).to_contain_text("brickwall.jpg was not accepted: it is locked")
        open_image(second, server, IMAGES[0])
        second.keyboard.press("Shift+A")
        expect(alerts).to_have_count(0)
        first.route(re.compile("/answer"), lambda route: route.fulfill(status=400, json={"error": "they are refused"}))
        first.mouse.click(*to_page(first, image, (20, 20)))
        expect(alerts).to_contain_text("they are refused.")
        first.keyboard.press("Control+z")
        expect(alerts).to_have_count(0)

    def test_the_own_recompute_is_no_decision(self, server: ReviewServer, open_page: Open) -> None:
        """A rejected image whose alpha changes becomes open again, also while it has hints that are not saved."""
        server.wait_until_ready()
        page = open_page(server)
        image = open_image(page, server, WRONG)
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        wait_for_answer(page)
        page.keyboard.press("Shift+A")
        page.keyboard.press("t")  # waits until the decision is saved
        expect(page.locator("#taught-state")).to_contain_text("reference")
        open_image(page, server, IMAGES[0])
        page.locator('[data-action="reject"]').click()
        expect(page.locator("#status")).to_contain_text("brickwall.jpg: rejected")
        image = open_image(page, server, IMAGES[0])
        place = page.locator('[data-action="accept"]').bounding_box()
        page.mouse.click(*to_page(page, image, (20, 20)), button="right")
        expect(page.locator("#hints-state")).to_contain_text("1 hint, not saved. The whole alpha may change: ")
        expect(page.locator("#hints-state")).to_contain_text(": references changed")
        assert page.locator('[data-action="accept"]').bounding_box() == place
        page.locator('[data-action="open-teach"]').click()
        page.locator('[data-action="recompute"]').click()
        expect(page.locator("#recompute-state")).to_contain_text("Done", timeout=90_000)
        page.keyboard.press("Escape")
        expect(page.locator("#image-status")).to_have_attribute("data-status", "open")
        expect(page.locator("#hints-state")).to_have_text("1 hint, not saved")
        expect(page.locator('#alerts .alert[data-topic^="decision"]')).to_have_count(0)

    def test_other_tabs_follow(self, server: ReviewServer, open_page: Open) -> None:
        """A press of the mouse in another tab is not interrupted, and the focus stays."""
        first, second = open_page(server), open_page(server)
        open_image(first, server, IMAGES[1])
        open_image(second, server, WRONG)
        frame = second.locator("#strip .frame").nth(1)
        frame.hover()
        second.mouse.down()
        first.locator('[data-action="reject"]').click()
        expect(second.locator("#counts")).to_contain_text("1 rejected")
        expect(frame).to_be_focused()
        second.mouse.up()
        expect(frame).to_have_attribute("aria-current", "true")


class TestKills:
    def test_nothing_is_lost(self, start: Callable[..., ReviewServer], folder: Path) -> None:
        """Kill the server after decisions and during one; the next server has all of them."""
        server = start()
        server.wait_until_ready()
        ids = {name: item["id"] for name, item in server.images().items()}
        hints = {"shapes": [{"label": "fg", "shape_type": "point", "points": [[*ON_OBJECT]]}]}
        server.post(f"/api/images/{ids[WRONG]}/accept", {"revision": 0, "hints": hints})
        server.post(f"/api/images/{ids[IMAGES[0]]}/accept", {"revision": 0, "hints": None})
        server.post(f"/api/images/{ids[IMAGES[1]]}/reject", {"revision": 0})
        written = alphas(folder / "alphas")
        hints = {"shapes": [{"label": "drop", "shape_type": "rectangle", "points": [[0, 0], [90, 90]]}]}
        late = threading.Thread(target=try_accept, args=(server, ids[IMAGES[3]], hints))
        late.start()
        time.sleep(0.15)
        server.kill()
        late.join()
        server = start()
        items = server.images()
        assert [items[name]["status"] for name in (WRONG, *IMAGES[:2])] == ["accepted", "accepted", "rejected"]
        assert items[WRONG]["has_hints"]
        now = alphas(folder / "alphas")
        assert [
            name for name in written if name.endswith(".png") and ".icm/" not in name and now[name] != written[name]
        ] in (
            [],
            ["night/deepfield.png"],
        )
        assert read(folder / "alphas" / "night" / "deepfield.png") is not None
        accepted = server.get(f"/api/images/{ids[WRONG]}")
        server.wait_until_ready()
        undone = server.post(f"/api/images/{ids[WRONG]}/undo", {"revision": accepted["revision"]})
        assert (undone["status"], undone["has_hints"]) == ("open", False)

    def test_a_recompute_continues_and_is_followed(self, start: Callable[..., ReviewServer], folder: Path) -> None:
        """Kill the server during a recompute; the next server shows that recompute, and does not start another one."""
        damaged = folder / "imgs" / IMAGES[0]
        damaged.write_bytes(damaged.read_bytes()[:2000])
        server = start()
        lawn = server.images()[IMAGES[1]]["id"]
        server.post("/api/references", {"id": lawn, "kind": "negative", "area": "image"})
        assert server.post("/api/recompute", {})["state"] == "running"
        lock = folder / "alphas" / ".icm" / "recompute.lock"
        wait_until(lambda: " " in lock.read_text(), "the recompute does not start")
        process_id = int(lock.read_text().split()[1])
        os.kill(process_id, signal.SIGSTOP)
        server.kill()
        server = start()
        for progress in (server.get("/api/recompute"), server.post("/api/recompute", {}), server.get("/api/recompute")):
            assert (progress["state"], progress["message"]) == ("running", "started by another icm review")
        assert int(lock.read_text().split()[1]) == process_id
        os.kill(process_id, signal.SIGCONT)
        wait_until(lambda: server.get("/api/recompute")["state"] != "running", "it does not end", 300)
        ended = server.get("/api/recompute")
        log = folder / "alphas" / ".icm" / "recompute.log"
        assert (ended["state"], ended["message"]) == ("done", f"1 image failed; see {log}")
        changes = {item["id"]: item["change"] for item in server.images().values() if item["change"]}
        assert {each["id"]: each["difference"] for each in ended["changed"]} == changes != {}
        assert not (folder / "alphas" / ".icm" / "before").exists()
        server.kill()
        assert start().get("/api/recompute") == ended

    def test_the_page_reports_a_stopped_server(self, start: Callable[..., ReviewServer], open_page: Open) -> None:
        """Its message names the port of the server, also if the browser uses another one that is forwarded to it."""
        server = start()
        with forward_port(server.port) as forwarded:
            link = server.url.replace(f":{server.port}/", f":{forwarded}/")
            page = open_page(ReviewServer(server.process, link))
            server.kill()
            message = page.locator('#alerts .alert[data-topic="connection"]')
            expect(message).to_contain_text(f"start icm review again with --port {server.port}. Open its new link")
            page.keyboard.press("r")
            failed = page.locator('#alerts .alert[data-topic^="decision"]')
            expect(failed).to_contain_text("was not rejected: the server does not answer.")
            expect(failed).not_to_contain_text("--port")
            server = start("--port", str(server.port))
            expect(message).to_contain_text("this page needs the link of the icm review that runs now")
            other = page.context.new_page()
            other.goto(server.url.replace(f":{server.port}/", f":{forwarded}/"))
            expect(message).to_have_count(0)

    def test_the_image_that_was_opened_meanwhile_is_loaded(
        self, start: Callable[..., ReviewServer], open_page: Open
    ) -> None:
        """When a stopped server answers again: also thumbnails, and the alpha of hints that are not saved."""
        server = start()
        server.wait_until_ready()
        page = open_page(server)
        page.locator("#filter-folder").select_option("night")
        page.locator(CELLS).first.wait_for()
        server_items = server.images()
        image = open_image(page, server, WRONG)
        page.mouse.click(*to_page(page, image, OFF_OBJECT), button="right")
        wait_for_answer(page)
        server.kill()
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        expect(page.locator("#model-state")).to_have_text("model: not connected")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Escape")
        page.locator('[data-action="reset-filters"]').click()
        page.goto(f"{server.origin}/#image-{server_items[IMAGES[0]]['id']}")
        expect(page.locator('[data-action="reject"]')).to_be_disabled()
        server = start("--port", str(server.port))
        page.context.new_page().goto(server.url)
        expect(page.locator('[data-action="accept-stay"]')).to_be_enabled()
        expect(page.locator("#image-name")).to_have_text("brickwall.jpg")
        expect(page.locator("#model-state")).to_contain_text("model: ")
        page.locator("#stage").hover()
        expect(page.locator("#readout")).to_contain_text("RGB")
        expect(page.locator("#strip-frames .thumbnail:not(.loaded)")).to_have_count(0)
        expect(page.locator("#alerts .alert")).to_have_count(0)
        open_image(page, server, WRONG)
        wait_for_answer(page)
        expect(page.locator("#hints-state")).to_have_text("2 hints, not saved")
        assert shown_alpha(page, image, ON_OBJECT) > 127

    def test_a_tab_with_the_images_of_an_earlier_server(
        self, start: Callable[..., ReviewServer], open_page: Open, folder: Path
    ) -> None:
        """The numbers of the images are others: the tab can decide again after it was loaded again."""
        server = start()
        page = open_page(server)
        open_image(page, server, WRONG)
        server.kill()
        shutil.copy(folder / "imgs" / IMAGES[0], folder / "imgs" / "a first image.jpg")
        run_matte(folder, folder / "alphas")
        server = start("--port", str(server.port))
        page.context.new_page().goto(server.url)
        page.keyboard.press("Shift+A")
        expect(page.locator('#alerts .alert[data-topic="connection"]')).to_contain_text("reload the page")
        expect(page.locator('#alerts .alert[data-topic^="decision"]')).to_contain_text("cat.jpg was not accepted")
        assert {item["status"] for item in server.images().values()} == {"open"}
        page.goto(f"{server.origin}/")
        page.reload()
        open_image(page, server, WRONG)
        page.keyboard.press("Shift+A")
        expect(page.locator("#image-status")).to_have_attribute("data-status", "accepted")
        assert [name for name, item in server.images().items() if item["status"] == "accepted"] == [WRONG]


@contextlib.contextmanager
def forward_port(port: int) -> Iterator[int]:
    """Forward a free port of this machine to another one, as SSH does; yield the free port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as target:
                threading.Thread(target=copy_stream, args=(target, self.request), daemon=True).start()
                copy_stream(self.request, target)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def copy_stream(source: socket.socket, target: socket.socket) -> None:
    """Copy what arrives at a connection to another one, until it ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def try_accept(server: ReviewServer, id: int, hints: dict[str, Any]) -> None:
    """Accept an image at a server that may end meanwhile."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.request("POST", f"/api/images/{id}/accept", {"revision": 0, "hints": hints})


class TestTeaching:
    def test_reference_negative_and_recompute(self, server: ReviewServer, open_page: Open, folder: Path) -> None:
        server.wait_until_ready()
        page = open_page(server)
        image = open_image(page, server, WRONG)
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        wait_for_answer(page)
        page.keyboard.press("Shift+A")
        expect(page.locator("#status")).to_contain_text("accepted")
        page.locator('[data-action="reference"]').click()
        expect(page.locator("#taught-state")).to_contain_text("reference")
        other = open_image(page, server, IMAGES[1])
        page.locator("#negative-area").select_option("image")
        page.locator('[data-action="negative"]').click()
        expect(page.locator("#taught-state")).to_contain_text("negative")
        accepted = (folder / "alphas" / "night" / "cat.png").read_bytes()
        before = {name: read(folder / "alphas" / Path(name).with_suffix(".png")) for name in server.images()}
        page.locator('[data-action="open-teach"]').click()
        total = len(IMAGES) + len(HOSTILE_NAMES)
        expect(page.locator("#recompute-plan")).to_have_text(f"at most {total - 1} of {total} alphas are replaced")
        expect(page.locator("#taught-list li")).to_have_count(2)
        page.locator(f'#taught-list li[data-id="{other["id"]}"] [data-action="forget-row"]').click()
        expect(page.locator("#taught-list li")).to_have_count(1)
        page.locator('[data-action="recompute"]').click()
        expect(page.locator("#open-teach")).to_have_text("Preparing references")
        expect(page.locator("#recompute-state")).to_contain_text("Done", timeout=90_000)
        expect(page.locator("#changed-list li").first).to_be_visible()
        assert (folder / "alphas" / "night" / "cat.png").read_bytes() == accepted
        changes = {name: item["change"] for name, item in server.images().items()}
        assert max(change or 0 for change in changes.values()) > 0
        row, count = page.locator("#changed-list li").first, page.locator("#changed-list li").count()
        name = row.locator('[data-part="name"]').inner_text()
        row.get_by_role("button", name="Undo").click()
        expect(page.locator("#status")).to_contain_text("alpha before the recompute restored")
        expect(page.locator("#changed-list li")).to_have_count(count - 1)
        assert read(folder / "alphas" / Path(name).with_suffix(".png")).tobytes() == before[name].tobytes()
        expect(page.locator("#teach")).to_be_visible()
        command = server.get("/api/run")["command"]
        line = [sys.executable, "-m", "icm_cli.cli", *shlex.split(command)[1:], "--dry-run"]
        outcome = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert outcome.returncode == 0, outcome.stderr
        page.locator("#changed-list li [data-action=open]").first.click()
        page.keyboard.press("u")  # takes back the last decision of this window, not the recompute of this image
        expect(page.locator("#status")).to_contain_text("cat.jpg: decision taken back")
        page.go_back()
        page.locator('[data-action="undo-recompute"]').click()
        expect(page.locator("#status")).to_contain_text("alpha before the recompute restored")
        expect(page.locator('[data-action="undo-recompute"]')).to_be_hidden()

    def test_a_reference_is_an_accepted_alpha(self, server: ReviewServer, open_page: Open, folder: Path) -> None:
        """What the page shows but has not saved is neither taught nor accepted."""
        server.wait_until_ready()
        page, written = open_page(server), folder / "alphas" / "night" / "cat.png"
        image, before = open_image(page, server, WRONG), written.read_bytes()
        alert, state = page.locator("#alerts .alert"), page.locator("#taught-state")
        page.keyboard.press("t")
        expect(alert).to_contain_text("cat.jpg is not used: night/cat.jpg is not accepted")
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        wait_for_answer(page)
        page.keyboard.press("t")
        expect(alert).to_contain_text("cat.jpg is not used: its hints are not saved")
        assert (written.read_bytes(), server.images()[WRONG]["status"]) == (before, "open")
        page.keyboard.press("Shift+A")
        expect(page.locator("#image-status")).to_have_attribute("data-status", "accepted")
        accepted = written.read_bytes()
        page.mouse.click(*to_page(page, image, OFF_OBJECT), button="right")
        wait_for_answer(page)
        page.keyboard.press("t")
        expect(alert).to_contain_text("cat.jpg is not used: its hints are not saved")
        assert (written.read_bytes(), server.images()[WRONG]["taught"]) == (accepted, None)
        page.locator('[data-action="discard-hints"]').click()
        page.keyboard.press("t")
        expect(state).to_have_text("Used as a reference.")
        expect(alert).to_have_count(0)
        page.keyboard.press("u")
        expect(page.locator("#status")).to_have_text("cat.jpg: decision taken back, and no longer a reference")
        expect(state).to_have_text("")
        assert written.read_bytes() == before


class TestFailures:
    def test_a_model_that_cannot_be_loaded(
        self, start: Callable[..., ReviewServer], open_page: Open, folder: Path
    ) -> None:
        (folder / "small.yaml").write_text(
            "backbone: {name: efficientnet-lite, long_side_px: -3}\nhead: {name: token-match}"
        )
        server = start()
        page = open_page(server)
        image = open_image(page, server, WRONG)
        state, alert = page.locator("#model-state"), page.locator('#alerts .alert[data-topic="model"]')
        expect(state).to_have_attribute("data-state", "failed")
        expect(alert).to_contain_text("long_side_px is -3")
        alert.get_by_role("button").click()
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        expect(alert).to_contain_text("long_side_px is -3")
        expect(page.locator("#answer-state")).to_have_text("No alpha for these hints")
        page.locator("#reload-model").click()
        expect(alert).to_contain_text("press Try again at the top")
        (folder / "small.yaml").write_text(SMALL_MODEL)
        page.locator("#reload-model").click()
        wait_for_answer(page)
        assert shown_alpha(page, image, ON_OBJECT) > 127
        expect(state).to_have_attribute("data-state", "ready")
        expect(page.locator("#reload-model")).to_be_hidden()
        expect(alert).to_have_count(0)

    def test_an_answer_that_was_replaced_by_an_earlier_request(self, server: ReviewServer, open_page: Open) -> None:
        """The earlier request, which the page has cancelled, may reach the server after the later one."""
        server.wait_until_ready()
        page = open_page(server)
        image = open_image(page, server, WRONG)
        stale = json.dumps({"error": "newer hints replace these"})
        page.route(re.compile("/answer"), lambda route: route.fulfill(status=409, body=stale), times=1)
        page.mouse.click(*to_page(page, image, ON_OBJECT))
        wait_for_answer(page)
        assert shown_alpha(page, image, ON_OBJECT) > 127

    def test_sources_that_are_gone_or_damaged(
        self, start: Callable[..., ReviewServer], open_page: Open, folder: Path
    ) -> None:
        (folder / "imgs" / IMAGES[0]).unlink()
        (folder / "imgs" / IMAGES[1]).write_bytes(b"no image any more")
        (folder / "alphas" / "night" / "cat.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        (folder / "alphas" / "night" / "deepfield.png").unlink()
        server = start()
        page = open_page(server)
        for name in IMAGES:
            item = server.images()[name]
            page.goto(f"{server.origin}/#image-{item['id']}")
            expect(page.locator("#image-name")).to_have_attribute("title", name)
            expect(page.locator("#single")).to_have_attribute("aria-busy", "false")
            alert, status = page.locator('#alerts .alert[data-topic="image"]'), page.locator("#image-status")
            if name in IMAGES[:2]:
                expect(alert).to_contain_text(Path(name).name)
            else:
                expect(alert).to_have_count(0)
            if name in IMAGES[2:4]:
                expect(status).to_contain_text("no alpha")
                expect(page.locator('[data-action="accept-stay"]')).to_be_disabled()
            else:
                expect(status).not_to_contain_text("no alpha")
            if name == IMAGES[0]:
                for action in ("accept", "accept-stay"):
                    button = page.locator(f'[data-action="{action}"]')
                    expect(button).to_be_disabled()
                    expect(button).to_have_attribute("title", re.compile("restore the source, or reject the alpha"))
                page.keyboard.press("a")
                expect(page.locator("#status")).to_contain_text("brickwall.jpg does not exist any more")
                shutil.copy(folder / "imgs" / IMAGES[4], folder / "imgs" / name)
                page.keyboard.press("a")
                expect(page.locator('[data-action="accept"]')).to_be_enabled()
                expect(page.locator("#status")).to_have_text("It can be accepted now. Press A again.")
                expect(alert).to_have_count(0)
                page.locator("#stage").hover()
                expect(page.locator("#readout")).to_contain_text("RGB")

    def test_a_folder_without_a_run(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "icm_cli.cli", "review", str(tmp_path), "--no-browser"]
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert outcome.returncode == 2
        assert "icm matte" in outcome.stderr
