"""What the images are made of: pinned and hashed, of licences that may be passed on, listed, and asked about."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy import advisories, licences, sbom
from tests.deploy import ROOT

LOCKS = {image: ROOT / "deploy" / f"requirements-{image}.txt" for image in ("cpu", "gpu")}
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "deploy" / "Dockerfile").read_text())
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def asked(image: str) -> list[Requirement]:
    """What pyproject.toml asks for in an image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["serve"]
    if image == "gpu":
        lines = [line for line in lines if not line.startswith("onnx")] + extras["gpu"]
    return [Requirement(line) for line in lines]


def unfit(image: str, text: str) -> list[str]:
    """What of a lock does not satisfy pyproject.toml, or could be another file than the one that was locked."""
    wrong = []
    pins = dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", text, re.M))
    for requirement in asked(image):
        version = pins.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} is locked at {version}")
    for entry in re.sub(r" \\\n\s+", " ", text).splitlines():
        if entry.startswith("#"):
            continue
        name, *rest = entry.split()
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[\w.!]+", name):  # no local version, such as torch's +cpu
            wrong.append(f"{name} is no exact public version")
        if not rest or not all(HASH.fullmatch(word) for word in rest):
            wrong.append(f"{name} has no hash, or more than hashes")
    if re.search(r"https?:|--(?:extra-)?index|--find-links|--trusted-host|file:", text):
        wrong.append("it names where its files come from")
    return wrong


@pytest.mark.parametrize("image", LOCKS)
def test_the_lock_is_what_the_project_asks_for_and_every_name_has_hashes(image: str) -> None:
    assert unfit(image, LOCKS[image].read_text()) == []


@pytest.mark.parametrize(
    ("pattern", "to", "says"),
    [
        (r"^starlette==\S+", "starlette==1.0.0", "starlette"),
        (r"^numpy==\S+ \\\n(    --hash.*\n)+", "", "numpy"),
        (r"^(idna==\S+) \\\n(    --hash.*\n)+", r"\1\n", "no hash"),
        (r"^redis==", "redis>=", "no exact"),
        (r"\Z", "--extra-index-url https://elsewhere.invalid\n", "where its files"),
    ],
)
def test_a_lock_that_does_not_fit_is_noticed(pattern: str, to: str, says: str) -> None:
    text, count = re.subn(pattern, to, LOCKS["cpu"].read_text(), count=1, flags=re.M)
    assert count == 1
    assert any(says in wrong for wrong in unfit("cpu", text))


def test_the_cpu_lock_has_no_torch_and_the_gpu_lock_no_onnx() -> None:
    cpu, gpu = (set(licences.locked(path)) for path in LOCKS.values())
    assert not {name for name in cpu if name.startswith(("torch", "nvidia", "cuda", "triton"))}
    assert not {name for name in gpu if name.startswith("onnx")}
    assert {name for name in gpu if name.startswith("nvidia")}
    shared = cpu & gpu
    versions = [licences.locked(path) for path in LOCKS.values()]
    assert [name for name in shared if versions[0][name] != versions[1][name]] == []


def test_the_images_install_the_locks_and_nothing_else() -> None:
    installs = re.findall(r"^RUN python -m pip .*$", DOCKERFILE, re.M)
    assert len(installs) == 2
    for image, line in zip(LOCKS, installs, strict=True):
        assert f"--only-binary :all: --require-hashes -r requirements-{image}.txt" in line
    assert "ensurepip" in next(line for line in DOCKERFILE.splitlines() if line.startswith("RUN rm -rf"))
    assert not re.search(r"\b(curl|wget|apt-get|git clone)\b", DOCKERFILE)


def wheel(folder: Path, name: str, content: str) -> Path:
    """A package that was made here, so that nothing has to be fetched."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.slow
def test_a_file_that_was_changed_after_it_was_locked_is_refused(tmp_path: Path) -> None:
    """The same name and version with other contents, and a package that nobody locked: pip installs neither."""
    good = sha256(wheel(tmp_path, "looked_at", "x = 1").read_bytes()).hexdigest()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    options = [
        "--quiet",
        "--no-index",
        "--find-links",
        tmp_path,
        "--target",
        tmp_path / "out",
        "--only-binary",
        ":all:",
    ]

    def install(lock: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "lock.txt").write_text(lock)
        command = [sys.executable, "-m", "pip", "install", *options, "--require-hashes", "-r", tmp_path / "lock.txt"]
        environment = {**clean, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    line = f"looked-at==1.0 --hash=sha256:{good}\n"
    assert install(line).returncode == 0
    wheel(tmp_path, "looked_at", "x = 2")
    changed = install(line)
    assert changed.returncode != 0
    assert "HASHES" in changed.stderr
    wheel(tmp_path, "another", "")
    unlisted = install("another==1.0\n")
    assert unlisted.returncode != 0
    assert "--hash" in unlisted.stderr


def test_every_licence_of_what_is_installed_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the CPU image, all of it is installed where tests run."""
    assert licences.main(["--all", str(LOCKS["cpu"])]) == 0
    assert licences.main([]) == 0
    assert "pillow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("MIT AND BSD-3-Clause", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("MIT AND (GPL-2.0-only OR BSD-3-Clause)", True),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("AGPL-3.0-or-later", False),
        ("MIT AND (GPL-2.0-only AND BSD-3-Clause)", False),
        ("", False),
        ("Proprietary", False),
        ("(MIT", False),
    ],
)
def test_a_licence_is_allowed_or_not(expression: str, allowed: bool) -> None:
    assert licences.allowed(expression) is allowed


def test_a_licence_that_is_not_allowed_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(licences, "ALLOWED", licences.ALLOWED - {"MIT-CMU"})
    assert licences.main([str(LOCKS["cpu"])]) == 1
    assert "pillow" in next(line for line in capsys.readouterr().out.splitlines() if line.endswith("NOT ALLOWED"))
    (tmp_path / "lock.txt").write_text("nobody-has-this==1.0\n")
    assert licences.main([str(tmp_path / "lock.txt")]) == 0
    assert licences.main(["--all", str(tmp_path / "lock.txt")]) == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cyclonedx_py") is None, reason="cyclonedx-bom is not installed")
def test_the_bill_of_materials_is_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this environment, which has everything of the lock and more; the versions are its own."""
    command = [sys.executable, "deploy/sbom.py", "--python", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["bomFormat"], found["metadata"]["component"]["name"]) == ("CycloneDX", "fewshot")
    named = {canonicalize_name(part["name"]): part for part in found["components"]}
    assert set(named) == set(licences.locked(LOCKS["cpu"]))
    assert all(part["version"] and part["purl"] for part in named.values())
    lock = tmp_path / "lock.txt"
    lock.write_text(LOCKS["cpu"].read_text() + "nobody-has-this==1.0\n")
    monkeypatch.setattr(sbom.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(SystemExit, match="nobody-has-this"):
        sbom.bill(Path(sys.executable), lock)


def audit(monkeypatch: pytest.MonkeyPatch, found: dict[str, list[str]] | advisories.NoAnswer) -> int:
    """What the command says when its source reports these packages, or cannot be asked."""

    def reported(requirements: Path, service: str) -> dict[str, list[str]]:
        if isinstance(found, advisories.NoAnswer):
            raise found
        return {name: ids for name, ids in found.items() if name in requirements.read_text()}

    monkeypatch.setattr(advisories, "reported", reported)
    return advisories.main([])


def test_advisories_fail_unless_all_was_asked_and_none_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = {advisories.CANARY: ["PYSEC-2022-8"]}
    name, version = next(iter(licences.locked(LOCKS["cpu"]).items()))
    assert audit(monkeypatch, canary) == 0
    assert audit(monkeypatch, {**canary, f"{name}=={version}": ["PYSEC-1"]}) == 1
    assert "PYSEC-1" in capsys.readouterr().out
    assert audit(monkeypatch, {}) == 2  # the canary is alive: whoever was asked knows nothing
    assert audit(monkeypatch, advisories.NoAnswer("no route")) == 2
    assert capsys.readouterr().err.count("Nothing is known") == 2
    monkeypatch.setitem(advisories.EXPLAINED, "PYSEC-1", "of a part that we do not use")
    assert audit(monkeypatch, {**canary, f"{name}=={version}": ["PYSEC-1"]}) == 0


def test_an_audit_that_skipped_a_package_or_said_nothing_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip-audit does where its source is out of reach: exit 0 and a skip reason, or an error."""
    skipped = {"dependencies": [{"name": "pillow", "skip_reason": "not found"}]}
    good = {"dependencies": [{"name": "pillow", "version": "9.0.0", "vulns": [{"id": "PYSEC-2022-8"}]}]}
    for output, answer in (
        (json.dumps(skipped), None),
        ("", None),
        (json.dumps(good), {"pillow==9.0.0": ["PYSEC-2022-8"]}),
    ):
        done = subprocess.CompletedProcess([], 0, output, "ERROR: no route")
        monkeypatch.setattr(advisories.subprocess, "run", lambda *_, done=done, **__: done)
        if answer is None:
            with pytest.raises(advisories.NoAnswer):
                advisories.reported(LOCKS["cpu"], "pypi")
        else:
            assert advisories.reported(LOCKS["cpu"], "pypi") == answer
