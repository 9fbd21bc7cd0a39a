"""What is wrong with this computer, its settings or its service, a line each, and what to do about it.

Looks and leaves nothing behind: no folder is made, no task is learned. Everything beyond the standard library is
imported inside the check that needs it, for that it is missing may be what there is to find. Knows nothing of how its
findings are printed.

    computer.py     Python, packages, clock, port, disk         store.py      the folder, or the Redis
    configured.py   settings, secrets, artifact                 running.py    a service that runs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from service.doctor import computer, configured, running, store
from service.doctor.check import Check
from service.doctor.configured import in_force

__all__ = ["Check", "examine", "in_force", "wrong"]


def wrong(checks: Iterable[Check]) -> bool:
    return any(check.status == "fail" for check in checks)


def examine(environment: Mapping[str, str], *, url: str | None = None, key: str | None = None) -> Iterator[Check]:
    """Every check in turn. `url` is a service that has to answer; without one, one that is running here is tried."""
    yield computer.python()
    present = _safely("packages", partial(computer.packages, environment))
    if present.status == "fail" and url:  # this computer may only ask
        yield Check("packages", "note", f"none to serve with here: {present.found}", present.fix)
        yield _safely("service", partial(running.service, url, key))
        return
    yield present
    if present.status == "fail":
        return
    yield computer.clock()
    from service.settings import SettingsError, overlooked, read

    for text in overlooked(environment):
        yield Check("variables", "note", text, "Unset it where the service runs, if it was meant for that.")
    try:
        settings = read(environment)
    except SettingsError as error:
        yield Check("settings", "fail", str(error), "Correct or unset that variable.")
        settings = None
    if settings is not None:
        yield configured.effective(settings)
        yield _safely("secrets", partial(configured.secrets, settings))
        yield _safely("artifact", partial(configured.artifact, settings))
        free = _safely("port", partial(computer.port, settings))
        yield free
        runs = free.status == "ok" and free.found.startswith("fewshot")
        if settings.redis_url:
            yield _safely("redis", partial(store.redis, settings))
        else:
            yield _safely("data", partial(store.data, settings, running=runs))
            yield _safely("disk", partial(computer.disk, settings))
        if url is None and runs:
            url = settings.address()
    if url is None:
        yield Check("service", "note", "none is running with these settings", "`fewshot serve` starts one.")
    else:
        yield _safely("service", partial(running.service, url, key))


def _safely(name: str, check: Callable[[], Check]) -> Check:
    """A check that meets something unforeseen has found something, too."""
    try:
        return check()
    except Exception as error:
        return Check(name, "fail", f"could not be checked ({type(error).__name__}: {error})", "Look into that first.")
