"""The rules that docker-compose.yml, its GPU override and the Dockerfile keep, read as text; test_docker.py runs them.

Each rule is a function from the parsed file to what breaks it, and is shown to notice a planted fault.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import PREFIX, Settings
from tests.deploy import ROOT

Compose = dict[str, Any]
LONG_RUNNING = ("redis", "service")
KNOWN = {PREFIX + name.upper() for name in Settings.model_fields}
FILES = [
    ROOT / "docker-compose.yml",
    ROOT / ".dockerignore",
    ROOT / ".ci" / "run",
    *sorted(path for path in (ROOT / "deploy").iterdir() if path.is_file()),
]


def load(name: str) -> Compose:
    found: Compose = yaml.safe_load((ROOT / name).read_text())
    return found


def merge(base: Any, over: Any) -> Any:
    """What compose does with a second file: mappings are merged, all else is replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {key: merge(base.get(key), over.get(key, base.get(key))) for key in {**base, **over}}
    return over


BASE = load("docker-compose.yml")
GPU = merge(BASE, load("deploy/compose.gpu.yml"))
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def stages(dockerfile: str) -> dict[str, list[str]]:
    """The instructions of each stage with those of the stages it is built on, by name; the last one is called ''."""
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", "", dockerfile).splitlines():
        if match := re.fullmatch(r"FROM (\S+)(?: AS (\S+))?", line):
            name = match[2] or ""
            found[name] = list(found.get(match[1], []))
        elif line and not line.startswith("#"):
            found[name].append(line)
    return found


def last(instructions: list[str], word: str) -> str:
    return next((line.removeprefix(word + " ") for line in reversed(instructions) if line.startswith(word + " ")), "")


Rule = Callable[[Compose], list[str]]


def redis_is_not_published_and_reaches_nothing_but_the_service(compose: Compose) -> list[str]:
    redis = compose["services"]["redis"]
    networks = redis.get("networks", ["default"])
    return [word for word in ("ports", "network_mode") if word in redis] + [
        name for name in networks if not (compose.get("networks") or {}).get(name, {}).get("internal")
    ]


def ports_are_bound_to_loopback(compose: Compose) -> list[str]:
    return [
        str(port)
        for service in compose["services"].values()
        for port in service.get("ports", [])
        if not re.fullmatch(r"127\.0\.0\.1:[^:]+(:-\d+\})?:\d+", str(port))
    ]


def everything_is_read_only_without_privileges_and_bounded(compose: Compose) -> list[str]:
    return [
        f"{name}: {word}"
        for name, service in compose["services"].items()
        for word, right in {
            "read_only": service.get("read_only") is True,
            "cap_drop": service.get("cap_drop") == ["ALL"],
            "cap_add": set(service.get("cap_add", [])) <= ({"CHOWN"} if name == "secrets" else set()),
            "security_opt": service.get("security_opt") == ["no-new-privileges:true"],
            "mem_limit": "mem_limit" in service,
            "pids_limit": "pids_limit" in service,
            "privileged": not {"privileged", "pid", "ipc", "devices", "userns_mode"} & set(service),
        }.items()
        if not right
    ]


def nothing_runs_as_root_but_the_maker_of_secrets_which_has_no_network(compose: Compose) -> list[str]:
    found = []
    for name, service in compose["services"].items():
        target = service.get("build", {}).get("target")
        user = str(service.get("user") or (last(stages(DOCKERFILE)[target], "USER") if target else "0"))
        allowed = name == "secrets" and service.get("network_mode") == "none"
        if user.split(":")[0] in ("0", "root", "") and not allowed:
            found.append(f"{name} runs as {user}")
    return found


def what_is_to_stay_up_is_restarted_and_ended_with_grace(compose: Compose) -> list[str]:
    services = compose["services"]
    found = [name for name in LONG_RUNNING if services[name].get("restart") != "always"]
    if "restart" in services["secrets"]:
        found.append("secrets")
    grace = int(services["service"].get("stop_grace_period", "10s").removesuffix("s"))
    ends = re.findall(r"^(?:GRACE|HANGING)_S = (\d+)", (ROOT / "service" / "__main__.py").read_text(), re.MULTILINE)
    drain_s = float(services["service"]["environment"].get("FEWSHOT_DRAIN_S", 0))
    return found if len(ends) == 2 and grace > drain_s + sum(map(int, ends)) else [*found, "grace"]


def redis_keeps_what_it_acknowledged(compose: Compose) -> list[str]:
    command = compose["services"]["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    wanted = {
        "--appendonly": "yes",
        "--appendfsync": "always",
        "--maxmemory-policy": "noeviction",
        "--aclfile": "/rules/users.acl",
        "--dir": "/data",
    }
    found = [f"{name} {options.get(name)}" for name, value in wanted.items() if options.get(name) != value]
    if "--maxmemory" not in options:
        found.append("--maxmemory")
    volumes = compose["services"]["redis"]["volumes"]
    return found if "redis-data:/data" in volumes else [*found, "no volume"]


def each_side_sees_its_own_secrets_only_and_cannot_write_them(compose: Compose) -> list[str]:
    mounts = {name: sorted(service.get("volumes", [])) for name, service in compose["services"].items()}
    wanted = {
        "redis": ["redis-data:/data", "redis-rules:/rules:ro"],
        "service": ["service-data:/data", "service-secrets:/secrets:ro"],
        "secrets": ["redis-data:/secrets/data", "redis-rules:/secrets/redis", "service-secrets:/secrets/service"],
    }
    return [name for name in wanted if mounts[name] != wanted[name]]


def variables_name_files_of_secrets_and_hold_none(compose: Compose) -> list[str]:
    found = []
    for service in compose["services"].values():
        for name, value in (service.get("environment") or {}).items():
            if re.search("PASSWORD|KEY|SECRET|TOKEN", name) and not name.endswith("_FILE"):
                found.append(name)
            if "@" in str(value):
                found.append(f"{name} with a user")
    return found


def variables_are_settings(compose: Compose) -> list[str]:
    return [
        name
        for service in compose["services"].values()
        for name in (service.get("environment") or {})
        if name not in KNOWN
    ]


def each_waits_for_what_it_needs(compose: Compose) -> list[str]:
    ended, healthy = {"condition": "service_completed_successfully"}, {"condition": "service_healthy"}
    services = compose["services"]
    found = [] if services["redis"].get("depends_on") == {"secrets": ended} else ["redis"]
    if services["service"].get("depends_on") != {"redis": healthy, "secrets": ended}:
        found.append("service")
    return found if "healthcheck" in services["redis"] else [*found, "healthcheck"]


def logs_are_bounded(compose: Compose) -> list[str]:
    found = []
    for name, service in compose["services"].items():
        logging = service.get("logging", {})
        if logging.get("driver") != "json-file" or not {"max-size", "max-file"} <= set(logging.get("options", {})):
            found.append(name)
    return found


def words_are_read_by_every_compose(compose: Compose) -> list[str]:
    """What docker-compose 1.29 refuses, and what Compose v2 warns about."""
    found = [word for word in ("name", "include", "version", "secrets", "configs") if word in compose]
    for name, service in compose["services"].items():
        found += [f"{name}: {word}" for word in ("env_file", "develop", "pull_policy") if word in service]
        found += [f"{name}: {word}" for word in service.get("healthcheck", {}) if word == "start_interval"]
    return found


# Each rule with a fault it must notice: a path into the file and what to put there (None: take it away).
RULES: list[tuple[Rule, tuple[str, ...], Any]] = [
    (redis_is_not_published_and_reaches_nothing_but_the_service, ("services", "redis", "ports"), ["6379:6379"]),
    (redis_is_not_published_and_reaches_nothing_but_the_service, ("networks", "store", "internal"), None),
    (redis_is_not_published_and_reaches_nothing_but_the_service, ("services", "redis", "networks"), None),
    (ports_are_bound_to_loopback, ("services", "service", "ports"), ["8000:8000"]),
    (ports_are_bound_to_loopback, ("services", "service", "ports"), ["0.0.0.0:8000:8000"]),
    (everything_is_read_only_without_privileges_and_bounded, ("services", "service", "read_only"), None),
    (everything_is_read_only_without_privileges_and_bounded, ("services", "redis", "cap_drop"), None),
    (everything_is_read_only_without_privileges_and_bounded, ("services", "service", "cap_add"), ["SYS_ADMIN"]),
    (everything_is_read_only_without_privileges_and_bounded, ("services", "service", "security_opt"), None),
    (everything_is_read_only_without_privileges_and_bounded, ("services", "service", "mem_limit"), None),
    (everything_is_read_only_without_privileges_and_bounded, ("services", "secrets", "pids_limit"), None),
    (everything_is_read_only_without_privileges_and_bounded, ("services", "service", "privileged"), True),
    (nothing_runs_as_root_but_the_maker_of_secrets_which_has_no_network, ("services", "redis", "user"), None),
    (nothing_runs_as_root_but_the_maker_of_secrets_which_has_no_network, ("services", "service", "user"), "0"),
    (nothing_runs_as_root_but_the_maker_of_secrets_which_has_no_network, ("services", "secrets", "network_mode"), None),
    (what_is_to_stay_up_is_restarted_and_ended_with_grace, ("services", "redis", "restart"), None),
    (what_is_to_stay_up_is_restarted_and_ended_with_grace, ("services", "service", "restart"), "on-failure"),
    (what_is_to_stay_up_is_restarted_and_ended_with_grace, ("services", "service", "stop_grace_period"), "10s"),
    (
        redis_keeps_what_it_acknowledged,
        ("services", "redis", "command"),
        [{"always": "everysec"}.get(word, word) for word in BASE["services"]["redis"]["command"]],
    ),
    (
        redis_keeps_what_it_acknowledged,
        ("services", "redis", "command"),
        [{"noeviction": "allkeys-lru"}.get(word, word) for word in BASE["services"]["redis"]["command"]],
    ),
    (redis_keeps_what_it_acknowledged, ("services", "redis", "volumes"), ["redis-rules:/rules:ro"]),
    (
        each_side_sees_its_own_secrets_only_and_cannot_write_them,
        ("services", "service", "volumes"),
        ["service-secrets:/secrets"],
    ),
    (
        each_side_sees_its_own_secrets_only_and_cannot_write_them,
        ("services", "redis", "volumes"),
        ["redis-data:/data", "redis-rules:/rules:ro", "service-secrets:/secrets:ro"],
    ),
    (variables_name_files_of_secrets_and_hold_none, ("services", "redis", "environment"), {"REDIS_PASSWORD": "x"}),
    (
        variables_name_files_of_secrets_and_hold_none,
        ("services", "service", "environment", "FEWSHOT_REDIS_URL"),
        "redis://fewshot:x@redis:6379/0",
    ),
    (variables_are_settings, ("services", "service", "environment", "FEWSHOT_REDIS_PASSWORD"), "x"),
    (each_waits_for_what_it_needs, ("services", "service", "depends_on", "redis"), {"condition": "service_started"}),
    (each_waits_for_what_it_needs, ("services", "redis", "healthcheck"), None),
    (logs_are_bounded, ("services", "redis", "logging"), None),
    (logs_are_bounded, ("services", "service", "logging"), {"driver": "json-file", "options": {"max-file": "5"}}),
    (words_are_read_by_every_compose, ("name",), "fewshot"),
    (words_are_read_by_every_compose, ("services", "redis", "healthcheck", "start_interval"), "1s"),
]


def name(value: object) -> str:
    if isinstance(value, tuple):
        return ".".join(value)
    return getattr(value, "__name__", str(value)[:20])


@pytest.mark.parametrize(("rule", "path", "value"), RULES, ids=name)
def test_a_planted_fault_is_noticed(rule: Rule, path: tuple[str, ...], value: Any) -> None:
    broken = copy.deepcopy(BASE)
    at: Any = broken
    for word in path[:-1]:
        at = at.setdefault(word, {})
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    assert rule(broken)


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _, _ in RULES), ids=name)
@pytest.mark.parametrize("compose", [BASE, GPU], ids=["cpu", "gpu"])
def test_the_rule_is_kept(rule: Rule, compose: Compose) -> None:
    assert rule(compose) == []


def test_the_gpu_override_asks_for_the_gpu_image_and_a_device_and_changes_nothing_else() -> None:
    service = GPU["services"]["service"]
    assert service["build"] == {**BASE["services"]["service"]["build"], "target": "gpu"}
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    changed = {word for word, value in service.items() if value != BASE["services"]["service"].get(word)}
    assert changed == {"build", "deploy", "mem_limit"}
    assert {key: value for key, value in GPU["services"].items() if key != "service"} == {
        key: value for key, value in BASE["services"].items() if key != "service"
    }


def test_every_target_that_compose_builds_exists() -> None:
    for compose in (BASE, GPU):
        for service in compose["services"].values():
            if build := service.get("build"):
                assert build["target"] in stages(DOCKERFILE)
                assert (ROOT / build["context"] / build["dockerfile"]).is_file()


def test_every_variable_of_ours_is_a_setting() -> None:
    for path in (ROOT / "docker-compose.yml", ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "compose.gpu.yml"):
        assert set(re.findall(r"\bFEWSHOT_\w+", path.read_text())) <= KNOWN, path.name


@pytest.mark.parametrize("target", ["cpu", "gpu", ""])
def test_the_image_of_the_service(target: str) -> None:
    instructions = stages(DOCKERFILE)[target]
    assert last(instructions, "USER") == "10001:10001"
    assert last(instructions, "ENTRYPOINT") == '["python", "-m", "service"]'
    assert last(instructions, "STOPSIGNAL") == "SIGTERM"
    environment = " ".join(line for line in instructions if line.startswith("ENV ")).split()
    assert {"PYTHONDONTWRITEBYTECODE=1", "ORT_DISABLE_TELEMETRY=1", "FEWSHOT_HOST=0.0.0.0"} <= set(environment)
    assert ("FEWSHOT_DEVICE=cuda" in environment) is (target == "gpu")
    health = next(i for i in instructions if i.startswith("HEALTHCHECK"))
    assert re.match(r'HEALTHCHECK .*CMD \["python", ', health)
    assert "//localhost:" in health  # by name: IPv4 or IPv6, whichever it listens on
    assert not [line for line in instructions if re.match(r"RUN .*(pip install|apt|gcc)", line)]


def test_the_image_without_a_target_is_the_one_for_a_cpu() -> None:
    assert stages(DOCKERFILE)[""] == stages(DOCKERFILE)["cpu"]


def test_the_dockerfile_needs_no_other_frontend_and_is_built_by_any_builder() -> None:
    assert not re.search(r"^#\s*syntax", DOCKERFILE, re.MULTILINE | re.IGNORECASE)
    assert "--mount" not in DOCKERFILE
    assert "<<" not in DOCKERFILE


# Long runs of letters and digits, and words that introduce a secret with something after them.
LITERAL = re.compile(
    r"(?i)\b[0-9a-f]{32,}\b|\b(?=\w*\d)(?=\w*[a-z])[\w-]{40,}\b"
    r"|(requirepass|password|secret|token)\s*[=:]\s*[\"']?\w{4,}"
)


# Lines as sha256sum or pip writes them: the sums of files that are fetched.
SUM = re.compile(r"^[0-9a-f]{64}  [\w.-]+\"?$|^    --hash=sha256:[0-9a-f]{64}(?: \\)?$", re.M)


def literals(text: str) -> list[str]:
    return [match[0] for match in LITERAL.finditer(SUM.sub("", text))]


@pytest.mark.parametrize(
    "planted",
    [
        "--requirepass: hunter22",
        'password = "hunter22"',
        "REDIS_PASSWORD=hunter22",
        "0123456789abcdef0123456789abcdef",
        "2OM7zQ4k2nLmpaWIW1EEe4Vnt5ZUyvY8w3nzHt2wYvw",
    ],
)
def test_a_planted_secret_is_noticed(planted: str) -> None:
    assert literals(f"x {planted} y")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    assert literals(path.read_text()) == []


def test_builds_see_nothing_that_is_not_named() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    copied = {
        source.strip("/")
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert {source for source in copied if not any(source == a or source.startswith(a + "/") for a in allowed)} == set()
    assert all(any(source == a or source.startswith(a + "/") for source in copied) for a in allowed)
