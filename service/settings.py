"""Every setting of the service: one class, read once in `__main__` and passed down.

No other module reads the environment, so two differently configured apps live in one process. A wrong value or an
unknown variable with our prefix stops the start with its name.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

PREFIX = "FEWSHOT_"
PATHS = ("artifact", "keys_file", "redis_password_file", "data_dir", "store_key_file")
DAY_S, YEAR_S = 24 * 3600, 365 * 24 * 3600
PRETRAINED = Path(__file__).resolve().parent.parent / "models" / "pretrained"


class SettingsError(Exception):
    """A setting is wrong; the message names the variable."""


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Times have an upper bound, for what waits on them takes no number of any size: timers, sockets, Redis.
    host: str = Field(
        "127.0.0.1", min_length=1, description="address to listen on; without keys, think before leaving loopback"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    artifact: Path = Field(PRETRAINED / "photos", description="folder of the artifact to serve")
    device: Literal["auto", "cpu", "torch-cpu", "cuda"] = Field(
        "auto", description="where the extractor runs; auto = cuda where torch finds one, else cpu (onnxruntime)"
    )
    adapt_device: Literal["auto", "cpu", "torch-cpu", "cuda"] = Field(
        "auto", description="where learners run; auto = cpu, which is faster but for the LSTM from a thousand examples"
    )
    precision: Literal["auto", "float32", "bfloat16", "int8"] = Field(
        "auto",
        description="of the extractor; auto = on a CPU int8 where it loses at most half a point and is faster, "
        "on a GPU bfloat16 where it has that, else float32",
    )
    views: int = Field(
        1,
        ge=1,
        le=3,
        description="views of each image, at so many times the work: 2 = its middle too, 3 = mirrored too (not for "
        "what left and right tell apart)",
    )
    default_method: str = Field("", description="learner used when a request names none; empty = the artifact's own")
    keys_file: Path | None = Field(
        None, description="file of the API keys, made by `fewshot keys`; without one no key is asked for"
    )
    reject: float = Field(
        0.05, ge=0, le=0.5, description="share of genuine images that may be turned away as none of these; 0 = off"
    )
    cors_origins: str = Field(
        "",
        description="origins whose pages may call the service from a browser, as https://app.example, separated by "
        "commas; * = any; empty = none but its own",
    )
    redis_url: str = Field("", description="redis://host:port/db of the shared store; empty = SQLite in DATA_DIR")
    redis_password_file: Path | None = Field(None, description="file that holds the password of Redis")
    redis_user: str = Field("", description="user name at Redis, when it has one")
    data_dir: Path = Field(Path("data"), description="folder of the embedded store")
    store_key_file: Path | None = Field(
        None, description="file with the key that seals stored values; default: made in DATA_DIR, or none for Redis"
    )
    store_timeout_s: float = Field(0.5, gt=0, le=DAY_S, description="longest wait for one answer of Redis")
    stale_ok_s: float = Field(
        300, ge=0, le=YEAR_S, description="how long a known task is still trusted while the store is away"
    )
    head_ttl_s: int = Field(
        7 * DAY_S, ge=60, le=YEAR_S, description="how long a head is kept in Redis; it is made again when gone"
    )
    versions_kept: int = Field(10, ge=1, description="versions of a task that are kept, the current one included")
    lru_heads: int = Field(4096, ge=1, description="heads kept in memory")
    lanes: int = Field(0, ge=0, le=1024, description="threads that decode and extract; 0 = as many as cores, at most 8")
    max_batch: int = Field(16, ge=1, description="most images in one call of the extractor")
    max_waiting: int = Field(
        1024, ge=1, description="most images waiting; beyond that refused, but for a tenant with less than its share"
    )
    max_wait_s: float = Field(0.4, gt=0, le=DAY_S, description="longest time to wait for a lane; who would is refused")
    max_connections: int = Field(
        2048,
        ge=1,
        le=1_000_000,
        description="most connections at once; beyond that who is silent makes room, or who comes is refused",
    )
    header_timeout_s: float = Field(10, gt=0, le=DAY_S, description="longest time for the head of a request to arrive")
    answer_timeout_s: float = Field(
        30, gt=0, le=DAY_S, description="longest time in which a client takes nothing of its answer"
    )
    max_body_bytes: int = Field(32_000_000, ge=1000, description="largest body of a request")
    max_bodies_bytes: int = Field(
        256_000_000,
        ge=1000,
        description="most bytes of all bodies in memory at once; beyond that, only who has less than its share."
        " And most of all answers that clients have not taken; beyond that, who left most is let go",
    )
    body_timeout_s: float = Field(30, gt=0, le=DAY_S, description="longest time for a body to arrive")
    max_example_bytes: int = Field(8_000_000, ge=1000, description="largest encoded image")
    max_pixels: int = Field(
        16_800_000,
        ge=1000,
        description="most pixels of an image, by its header; a usual JPEG may have four times as many",
    )
    max_text_bytes: int = Field(16_384, ge=16, description="largest text, where the artifact reads texts")
    max_examples: int = Field(512, ge=2, le=10_000, description="most images of one support set")
    max_retained_bytes: int = Field(
        64_000_000,
        ge=1000,
        le=400_000_000,
        description="most bytes of the images that are kept of one task. While it is changed or downloaded the process"
        " takes some eight times as much, and over Redis its record has to pass within STORE_TIMEOUT_S",
    )
    max_queries: int = Field(64, ge=1, le=10_000, description="most images of one classify request")
    max_way: int = Field(256, ge=2, description="most classes of a task")
    max_label: int = Field(256, ge=1, description="most characters of a label")
    max_tasks: int = Field(0, ge=0, description="most tasks of one tenant; 0 = as many as the store holds")
    drain_s: float = Field(
        0,
        ge=0,
        le=3600,
        description="how long a service that is asked to stop still answers while it says that it is not ready",
    )
    trace_endpoint: str = Field("", description="OTLP/HTTP address that spans are sent to; empty = none are made")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator(*PATHS, mode="before")
    @classmethod
    def _is_named(cls, value: object) -> object:
        """An empty path would be the current folder."""
        if value == "":
            raise PydanticCustomError("empty", "It is empty; unset it where none is meant")
        return value

    def secret(self, path: Path | None) -> str:
        """The content of a secret file, without the line end."""
        if path is None:
            return ""
        try:
            return path.read_text().strip()
        except OSError as error:
            raise SettingsError(f"{path} cannot be read ({error.strerror}).") from None
        except UnicodeDecodeError:
            raise SettingsError(
                f"{path} is no text: a secret is a line of text, such as `openssl rand -base64 32` makes."
            ) from None

    def address(self, port: int | None = None) -> str:
        """Where this computer reaches the service; `port`: the one it listens on, where the setting is 0."""
        # Who listens on :: listens on IPv6 alone, as asyncio has it.
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://{spelled(here)}:{self.port if port is None else port}"


def spelled(host: str) -> str:
    """As it stands before a colon and a port."""
    return f"[{host}]" if ":" in host else host


def read(environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment. Raises SettingsError, with the variable's name."""
    given = os.environ if environment is None else environment
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    # FEWSHOT_DATA and FEWSHOT_TEST_* belong to training and tests, FEWSHOT_URL and FEWSHOT_KEY to the client.
    unknown = sorted(
        name
        for name in given
        if name.startswith(PREFIX)
        and name not in known
        and name not in ("FEWSHOT_DATA", "FEWSHOT_URL", "FEWSHOT_KEY")
        and not name.startswith("FEWSHOT_TEST_")
    )
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"Is it {near[0]}?" if near else f"Settings are {', '.join(sorted(known))}."
        raise SettingsError(f"{unknown[0]} is no setting. {hint}")
    values = {name: given[PREFIX + name.upper()] for name in Settings.model_fields if PREFIX + name.upper() in given}
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{PREFIX}{str(first['loc'][0]).upper()}: {first['msg']}.") from None


def overlooked(environment: Mapping[str, str] | None = None) -> list[str]:
    """Variables that are read by others and look as if they were meant for the service, a sentence each."""
    given = os.environ if environment is None else environment
    found = []
    if given.get("FEWSHOT_DATA") and not given.get("FEWSHOT_DATA_DIR"):
        found.append("FEWSHOT_DATA is read by training only. Is it FEWSHOT_DATA_DIR?")
    if given.get("FEWSHOT_URL", "").startswith("redis"):
        found.append("FEWSHOT_URL is read by the client only, and names a Redis. Is it FEWSHOT_REDIS_URL?")
    key = given.get("FEWSHOT_KEY", "")
    if key and not key.startswith("fsk_") and not given.get("FEWSHOT_KEYS_FILE"):
        found.append("FEWSHOT_KEY is read by the client only, and holds no key. Is it FEWSHOT_KEYS_FILE?")
    return found
