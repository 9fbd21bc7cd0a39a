"""The scripts beside the service: the load generator, the field test, the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.goals import GOALS
from models.learners import LEARNERS
from tests.service.test_main import started
from training import synthetic

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started(tmp_path_factory.mktemp("scripts")) as (_, address, _said):
        yield address


def script(name: str, *arguments: str, limit_s: float = 120) -> str:
    command = [sys.executable, str(ROOT / "deploy" / name), *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=limit_s)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_field_test_prints_a_row_for_each_learner_and_forgets_its_task(address: str, tmp_path: Path) -> None:
    shapes = synthetic.write(tmp_path / "shapes", classes=3, images=6)
    rows = script("field.py", address, str(shapes), "--classes", "3", "--shots", "1,4", "--draws", "2").splitlines()
    assert [row.split("|")[2].strip() for row in rows] == sorted(LEARNERS)
    accuracies = [float(cell.split("±")[0]) for row in rows for cell in row.split("|")[3:5]]
    assert min(accuracies) > 40  # chance is 33
    listed = subprocess.run(["curl", "-s", address + "/v1/tasks"], capture_output=True, text=True, timeout=10).stdout
    assert "field-test" not in listed


def test_the_field_test_leaves_raw_results_with_unlabelled_and_foreign_images(address: str, tmp_path: Path) -> None:
    shapes, out = synthetic.write(tmp_path / "shapes", classes=5, images=6), tmp_path / "field.jsonl"
    given = ["--classes", "3", "--shots", "2", "--draws", "2", "--unlabelled", "2", "--foreign", "9"]
    rows = script("field.py", address, str(shapes), *given, "--json-out", str(out)).splitlines()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(lines) == 11  # ridge has no use for unlabelled images
    assert {(line["method"], line["unlabelled"]) for line in lines} >= {("ridge", 0), ("whitened", 0), ("whitened", 2)}
    assert ("ridge", 2) not in {(line["method"], line["unlabelled"]) for line in lines}
    for line, row in zip(lines, rows, strict=True):
        assert f"{line['accuracy']:.1f} ± {line['interval']:.1f}" in row
        assert 0 <= line["genuine_rejected"] <= 100
        assert 0 <= line["foreign_rejected"] <= 100
        assert line["command"] == f"python deploy/field.py ADDRESS DATA/shapes {' '.join(given)}"


def test_the_load_generator_counts_every_answer_and_its_status(address: str) -> None:
    sample = ROOT / "service" / "sample"
    fields = [f"-F{label}=@{sample}/{label}/1.png" for label in ("alpha", "omega")]
    subprocess.run(["curl", "-s", "-X", "PUT", address + "/v1/tasks/load", *fields], capture_output=True, timeout=30)
    image = str(sample / "alpha" / "2.png")
    found = json.loads(script("load.py", address, "load", image, "--connections", "4", "--seconds", "1"))
    assert found["answers"] == found["statuses"]["200"] > 10
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]
    assert found["by_status"]["200"] == {name: found[name] for name in ("p50_ms", "p95_ms", "p99_ms")}
    wrong = json.loads(script("load.py", address, "nothing", image, "--connections", "2", "--seconds", "1"))
    assert set(wrong["statuses"]) == {"404"}


def test_the_load_generator_keeps_to_a_rate_however_slow_the_answers(address: str) -> None:
    image = str(ROOT / "service" / "sample" / "alpha" / "2.png")
    options = ["--tasks", "load,nothing", "--seconds", "2", "--even", "--rate", "20"]
    found = json.loads(script("load.py", address, image, *options, "--deadline-ms", "5000"))
    assert found["statuses"] == {"200": 20, "404": 20}
    assert found["goodput_per_s"] == 10
    assert found["lag_p99_ms"] < found["by_status"]["200"]["p99_ms"] + 1000
    hasty = json.loads(script("load.py", address, image, *options, "--deadline-ms", "0.01"))
    assert hasty["statuses"] == {"late": 40}
    assert hasty["answers"] == hasty["goodput_per_s"] == 0


def test_the_benchmark_measures_each_goal_beside_the_floor_of_the_same_run() -> None:
    characters = str(ROOT / "models" / "pretrained" / "characters")  # small pictures: quick
    # A second is too short for a window on a machine that runs other tests as well.
    options = ["--seconds", "3", "--rounds", "1", "--precision", "int8", "--artifact", characters]
    *lines, last = script("bench.py", *options, limit_s=400).splitlines()
    result = json.loads(last)["results"][0]
    found = {row["goal"]: row for row in result["figures"]}
    wanted = {name for name in GOALS if name not in ("head", "zipf") and not name.endswith("float32")}
    assert set(found) | {"refused"} == wanted  # where the machine is so busy that nobody is refused in time
    assert all(row["spread"][0] <= row["value"] <= row["spread"][1] for row in found.values())
    assert 0 < found["share_64 int8"]["value"] < 2
    assert found["adapt 100 x 10"]["value"] > 0.5
    assert all(row["bad"] == 0 for rows in result["loops"].values() for row in rows)
    assert sum(line.startswith("| ") for line in lines) == 1 + len(found)


def test_ways_to_run_the_service_are_measured_beside_the_one_that_ships() -> None:
    characters = str(ROOT / "models" / "pretrained" / "characters")
    forked = "lanes in forked processes"
    options = ["--only", forked, "--seconds", "1", "--rounds", "1", "--artifact", characters]
    rows = json.loads(script("variants.py", *options, limit_s=240).splitlines()[-1])["rows"]
    assert [row["variant"] for row in rows] == ["as shipped", forked]
    assert all(row["share"] > 0 and row["bad"] == 0 for row in rows)
    assert rows[0]["over_first"] == 1


def test_a_head_at_rest_is_measured_in_each_form(tmp_path: Path) -> None:
    shapes = str(synthetic.write(tmp_path / "shapes", classes=10, images=20))
    characters = str(ROOT / "models" / "pretrained" / "characters")
    options = ["--way", "2", "--shots", "1,2", "--episodes", "20", "--artifact", characters]
    found = json.loads(script("heads.py", "--data", shapes, *options).splitlines()[-1])
    assert [(row["shot"], row["form"]) for row in found["rows"]][3:5] == [
        (1, "int8, a scale per class"),
        (2, "float32"),
    ]
    exact, half, one, each = found["rows"][:4]
    assert (exact["other_answers"], exact["difference"], exact["most_apart"]) == (0, 0, 0)
    assert 0 < half["most_apart"] < each["most_apart"] < 0.2
    assert exact["bytes"] > half["bytes"] > each["bytes"] > one["bytes"]
    assert found["whole_bytes"] > each["bytes"]


def test_ways_to_decode_are_compared_with_the_exact_one() -> None:
    found = json.loads(script("decoders.py", "--edge", "32", "--width", "320", "--height", "240").splitlines()[-1])
    exact, twice, once, ours = found["rows"][:4]
    assert exact["difference"] == 0 < twice["difference"] < once["difference"]
    assert ours["difference"] < twice["difference"] + 1
    assert once["ms"] < exact["ms"]


def test_each_step_of_an_answer_is_timed() -> None:
    found = json.loads(script("parts.py").splitlines()[-1])
    assert len(found) == 10
    assert all(0 < quickest <= median for quickest, median in found.values())


def test_the_measurement_of_a_gpu_runs_through_on_a_cpu(tmp_path: Path) -> None:
    artifact, out = ROOT / "models" / "pretrained" / "characters", tmp_path / "gpu.json"
    script("gpu.py", str(artifact), "--device", "torch-cpu", "--seconds", "0.001", "--out", str(out))
    found = json.loads(out.read_text())
    assert {row["precision"] for row in found["throughput"]} == {"float32", "bfloat16"}
    assert all(row["floor_ms"] > 0 and row["share"] > 0 for row in found["throughput"])
    assert {row["method"] for row in found["adapting"]} == {"gradient", "lstm", "prototype", "ridge", "whitened"}
