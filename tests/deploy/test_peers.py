"""deploy/peers.py: what it counts, and a small run where the peers can be installed."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from typing import Any

import pytest

from deploy import peers
from tests.deploy import ROOT

CHARACTERS = ROOT / "models" / "pretrained" / "characters"
BUSY = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


@pytest.mark.slow
def test_the_work_of_a_servers_children_counts_as_its_own() -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True)
    try:
        give_up = time.monotonic() + 30
        while len(peers.tree(process.pid)) < 2 or peers.cpu_s(process.pid) < 0.5:
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert peers.rss_mb(process.pid) > 1
    finally:
        for pid in reversed(peers.tree(process.pid)):
            subprocess.run(["kill", "-9", str(pid)], check=False)
        process.wait()


def test_the_open_inference_body_holds_the_image() -> None:
    (given,) = json.loads(peers._open_inference(b"\xff\xd8 image"))["inputs"]
    assert base64.b64decode(given["data"][0]) == b"\xff\xd8 image"


def test_a_row_is_the_median_of_its_windows_and_counts_every_bad_answer() -> None:
    def window(per_s: float, bad: int) -> dict[str, Any]:
        names = ("share", "cpu", "p50_ms", "p99_ms")
        return {"per_s": per_s, "bad": bad, "over_bare": None, **dict.fromkeys(names, 1.0)}

    row = peers._row("a peer", 8, [window(10, 0), window(30, 2), window(20, 1)])
    assert (row["per_s"], row["bad"], row["over_bare"]) == (20, 3, None)


@pytest.mark.slow
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_a_small_run_answers_as_the_others_do(peer: peers.Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    environments = tmp_path_factory.getbasetemp().parent / "peers"  # kept from run to run, as pytest keeps it
    try:
        peers.environment(peer, environments)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"{peer.name} cannot be installed here: {error}")
    options = ["--seconds", "1", "--rounds", "1", "--precision", "float32", "--peers", peer.name]
    places = ["--artifact", str(CHARACTERS), "--environments", str(environments)]
    command = [sys.executable, str(ROOT / "deploy" / "peers.py"), *options, *places]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout.splitlines()[-1])["results"]
    found = {(row["server"], row["connections"]): row for row in result["rows"]}
    assert set(found) == {(name, n) for name in ("this service", peer.name) for n in (1, 8, 64)}
    assert all(row["bad"] == 0 and row["per_s"] > 0 and row["cpu"] > 0 for row in found.values())
    assert result["settings"][peer.name] in peer.tunings
