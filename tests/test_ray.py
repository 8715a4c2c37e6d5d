"""Matting on a Ray cluster: the alphas of a plain run, failing actors, and refused options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from conftest import Icm, alphas, arguments, copy_many
from faulty_setups import FullDiskSetup, KilledSetup

from icm_cli.matting import cluster
from icm_cli.matting import matte as matting

MANY = 8
pytestmark = [
    pytest.mark.filterwarnings("default"),  # Ray raises deprecation warnings of its own
    pytest.mark.timeout(480),
]


@pytest.fixture
def on_ray(icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Icm]:
    """A function that mattes MANY images with two actors, which can import the test modules."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    copy_many(scene / "imgs" / "wall.jpg", scene / "many", MANY)
    assert icm(src=scene / "many", out=scene / "alone").exit_code == 0

    def run(*flags: str, **options: object) -> object:
        given = {"src": scene / "many", "device": None, "ray": "auto", "ray_cpus": 2, "report": scene / "r.json"}
        return icm(*flags, **(given | options))

    yield run
    assert not ray.is_initialized()  # a run stops the cluster that it started


@pytest.mark.slow
def test_actors_write_the_same_bytes_and_one_report(on_ray: Icm, icm: Icm, scene: Path) -> None:
    (scene / "many" / "bad.jpg").write_bytes(b"")
    result = on_ray("--progress", "json")
    assert result.exit_code == 1, result.output
    assert alphas(scene / "out") == alphas(scene / "alone")
    report = json.loads((scene / "r.json").read_text())
    assert [row["status"] for row in report["images"]] == ["done"] * MANY + ["failed"]
    assert report["settings"]["device"] == "cpu, float32; 2 Ray actors"
    assert report["summary"]["peak_memory_bytes"] > 1e8
    events = [json.loads(line)["event"] for line in result.stdout.splitlines()]
    assert events == ["started", *["image"] * (MANY + 1), "finished"]
    (scene / "many" / "bad.jpg").unlink()
    assert " 8" in icm(src=scene / "many").stdout.splitlines()[1]  # a plain run keeps the alphas of actors


@pytest.mark.slow
def test_images_of_a_dead_actor_are_matted_again(on_ray: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matting, "EngineSetup", KilledSetup)
    monkeypatch.setenv("DIED", str(scene / "died"))
    result = on_ray()
    assert result.exit_code == 0, result.output
    assert (scene / "died").exists()
    assert "a Ray actor died and was restarted" in result.stderr
    assert alphas(scene / "out") == alphas(scene / "alone")
    assert len(json.loads((scene / "r.json").read_text())["images"]) == MANY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "message"), [(KilledSetup, "Ray actors died repeatedly"), (FullDiskSetup, "no space left on the device")]
)
def test_error_of_all_actors_ends_the_run(
    on_ray: Icm, icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, work: type, message: str
) -> None:
    monkeypatch.setattr(matting, "EngineSetup", work)
    monkeypatch.setattr(cluster, "MAX_RESTARTS", 0)
    result = on_ray("--quiet", ray_cpus=1)
    assert result.exit_code == 3, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.undo()
    assert icm(src=scene / "many").exit_code == 0
    assert alphas(scene / "out") == alphas(scene / "alone")


@pytest.mark.slow
def test_node_without_the_files_is_reported(on_ray: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.Path, "write_text", lambda path, _: path.write_bytes(b"another file"))
    result = on_ray()
    assert result.exit_code == 2, result.output
    assert "of the Ray cluster does not see" in result.stderr
    assert "a file system that all nodes share" in result.stderr
    assert not alphas(scene / "out")


@pytest.mark.slow
def test_more_actors_than_cores_are_refused(on_ray: Icm) -> None:
    result = on_ray(ray_cpus=1000)
    assert result.exit_code == 3
    assert "--ray-cpus is 1000, and the Ray cluster has" in result.stderr


@pytest.mark.slow
def test_cluster_is_joined_by_address_and_keeps_running(on_ray: Icm, scene: Path, small_model: Path) -> None:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        address = ray.get_runtime_context().gcs_address
        given = {"ref": scene / "ref.png", "mask": scene / "mask.png", "src": scene / "many", "out": scene / "out"}
        line = arguments({**given, "model": small_model, "ray": address, "ray_cpus": 1})
        command = [sys.executable, "-m", "icm_cli.cli", "matte", *line]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert alphas(scene / "out") == alphas(scene / "alone")
        assert on_ray(src=scene / "imgs" / "wall.jpg", ray_cpus=1).exit_code == 0  # over the existing connection
        assert ray.is_initialized()
    finally:
        ray.shutdown()


@pytest.mark.parametrize("address", ["127.0.0.1:999999", "nowhere"])
def test_a_text_that_is_no_address_is_refused(icm: Icm, address: str) -> None:
    result = icm(device=None, ray=address)
    assert result.exit_code == 2, result.output
    assert f"--ray is '{address}'; expected auto, or an address such as 10.0.0.1:6379" in result.stderr
    assert result.stderr.count("\n") == 1


def test_address_without_cluster_is_an_error(icm: Icm) -> None:
    address = "127.0.0.1:1"
    result = icm(device=None, ray=address)
    assert result.exit_code == 3, result.output
    assert f"--ray {address}: no cluster answers there" in result.stderr
    assert result.stderr.count("\n") == 1


def test_options_incompatible_with_ray_are_refused(icm: Icm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for options, code, message in (
        ({"ray_cpus": 2}, 2, "give --ray too, or omit --ray-cpus"),
        ({"ray": "auto"}, 2, "--device is cpu; omit --device or omit --ray"),
        (
            {"ray": "auto", "device": None, "ray_cpus": 0},
            2,
            "--ray-cpus is 0; expected a whole number",
        ),
        ({"ray": "auto", "device": None}, 3, "pip install 'icm-cli[ray]'"),
    ):
        result = icm(**options)
        assert result.exit_code == code, result.output
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def test_node_with_other_code_of_icm_is_reported(tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("token")
    context = cluster.ProcessContext.current()
    build = cluster.describe_build()
    assert not cluster._find_node_problem(context, str(tmp_path / "probe"), "token", build)
    assert "install the same version on both" in cluster._find_node_problem(
        context, str(tmp_path / "probe"), "token", f"{build} changed"
    )
