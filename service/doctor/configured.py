"""What the settings name: themselves, files of secrets, the artifact. Knows nothing of stores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.doctor.check import Check

if TYPE_CHECKING:
    from service.settings import Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def in_force(environment: Mapping[str, str]) -> dict[str, Any]:
    """Every setting by its variable, secrets masked; empty when they cannot be read."""
    from service.settings import PREFIX, SettingsError, read

    try:
        settings = read(environment)
    except SettingsError:
        return {}
    return {PREFIX + name.upper(): masked(getattr(settings, name)) for name in type(settings).model_fields}


def masked(value: object) -> Any:
    """Passwords inside addresses; every other secret is in a file, and the setting its path."""
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str) or "://" not in value:
        return value
    # Up to the last @, for a password may hold one, or a slash; in an address of a socket it stands behind the path.
    return re.sub(r"(?<=://).+(?=@)", "***", re.sub(r"([?&]\w*password=)[^&]*", r"\1***", value))


def effective(settings: Settings) -> Check:
    defaults = type(settings)()
    names = [name for name in type(settings).model_fields if getattr(settings, name) != getattr(defaults, name)]
    given = ", ".join(f"FEWSHOT_{name.upper()}={masked(getattr(settings, name))}" for name in names)
    return Check("settings", "ok", given or "all as they come")


def secrets(settings: Settings) -> Check:
    """Files that hold secrets: there, readable, and not for everybody."""
    from service.settings import SettingsError
    from service.stores.opening import LEAST_KEY

    files = {name: getattr(settings, name) for name in type(settings).model_fields if name.endswith("_file")}
    given = {name: path for name, path in files.items() if path is not None}
    for name, path in given.items():
        try:
            if name == "keys_file":
                path.read_bytes()
            elif len(settings.secret(path).encode()) < LEAST_KEY and name == "store_key_file":
                found = f"{path} holds no key of at least {LEAST_KEY} characters"
                return Check(
                    "secrets", "fail", found, f"Put the key back; for a new store: openssl rand -base64 32 > {path}"
                )
            mode = path.stat().st_mode & 0o777
        except OSError as error:
            return Check("secrets", "fail", f"FEWSHOT_{name.upper()}: {path}: {error.strerror}", "Make it readable.")
        except SettingsError as error:
            return Check("secrets", "fail", f"FEWSHOT_{name.upper()}: {error}", "Make it a readable line of text.")
        if mode & 0o027:
            return _open(path, mode)
    if settings.keys_file is not None:
        from service import keys

        live = [key for key in keys.load(settings.keys_file).values() if key.state(datetime.now(UTC)) == "live"]
        keys.load_pepper(settings.keys_file)
        pepper = keys.pepper_file(settings.keys_file)
        if (mode := pepper.stat().st_mode & 0o777) & 0o027:
            return _open(pepper, mode)
        if not live:
            found = f"{settings.keys_file} has no live key: nobody is let in"
            return Check("secrets", "warn", found, "fewshot keys create --tenant NAME --scopes adapt,classify")
    elif settings.host not in LOOPBACK:
        found = f"no keys, and FEWSHOT_HOST={settings.host}: whoever reaches the port may use the service"
        return Check("secrets", "warn", found, "Make a key with `fewshot keys create`, or listen on 127.0.0.1.")
    return Check("secrets", "ok", ", ".join(str(path) for path in given.values()) or "none are configured")


def _open(path: Path, mode: int) -> Check:
    found = f"{path} has mode {mode:o}: others may read it, or its group write it"
    return Check("secrets", "warn", found, f"chmod 600 {path}")


def artifact(settings: Settings) -> Check:
    """Loads it and runs its probe, as a start does."""
    from models.artifact import Artifact
    from models.errors import ArtifactInvalid
    from models.extractor import best_device, load_extractor
    from service.precision import automatic

    try:
        loaded = Artifact.load(settings.artifact)
        loaded.learners()
        if settings.views > 1 and loaded.kind != "image":
            return Check("artifact", "fail", f"it reads {loaded.kind}s, which have no views", "Unset FEWSHOT_VIEWS.")
        device = best_device(loaded) if settings.device == "auto" else settings.device
        precision: str = settings.precision
        if precision == "auto":
            precision = automatic(loaded, settings.data_dir, device=device, keep=False)
        extractor = load_extractor(loaded, device=device, precision=precision)
        difference = loaded.check(extractor, precision=precision)
    except ArtifactInvalid as error:
        fix = "FEWSHOT_ARTIFACT names a folder that `python -m training export` made; unset it for the one that ships."
        return Check("artifact", "fail", error.detail, fix)
    if settings.default_method and settings.default_method not in loaded.manifest.methods:
        found = f"it has no method {settings.default_method!r}, only {', '.join(loaded.manifest.methods)}"
        return Check("artifact", "fail", found, "Correct FEWSHOT_DEFAULT_METHOD.")
    return Check("artifact", "ok", f"{loaded.manifest.name} on {device}, {precision}, probe within {difference:.0e}")
