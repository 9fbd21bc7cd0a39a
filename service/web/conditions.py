"""`If-Match` and `If-None-Match`, for every route that heeds one of them (RFC 9110, section 13)."""

from __future__ import annotations

from starlette.requests import Request

from models.errors import InvalidRequest, StoreUnavailable, TaskNotFound, TaskStale, VersionConflict
from service.engine import Engine
from service.stores import Expected, Pointer
from service.web.access import scope_of


def _tags(request: Request, header: str) -> list[str]:
    """What a header names: tags as they stand there, or `*`. No tag of ours holds a comma."""
    found = (tag.strip() for tag in ",".join(request.headers.getlist(header)).split(","))
    return [tag for tag in found if tag]


def etag(pointer: Pointer) -> str:
    return f'"v{pointer.version}-{pointer.head}"'


def unchanged(request: Request, tag: str) -> bool:
    """Whether the caller of a GET has what is at the tag; a weak one says so as well."""
    asked = {known.removeprefix("W/") for known in _tags(request, "if-none-match")}
    return "*" in asked or tag in asked


async def expected(request: Request, engine: Engine, task: str, *, makes: bool = False) -> Expected:
    """Where the task must be for a change: see Scope.commit. `makes`: one that is not there would be made.

    A task that moves after this was answered is at another version than the one that was compared, so that of several
    who replace any version at once one succeeds. Raises VersionConflict where it is elsewhere already.
    """
    if "if-none-match" in request.headers:
        if "if-match" in request.headers:
            raise InvalidRequest("Send If-Match or If-None-Match, and not both.")
        if _tags(request, "if-none-match") != ["*"]:
            raise InvalidRequest("If-None-Match takes only '*' here.")
        return 0
    if "if-match" not in request.headers:
        return None
    tags = _tags(request, "if-match")
    any_will_do = "*" in tags
    if any_will_do and not makes:
        return None  # it has to be there anyway
    try:
        pointer = await engine.at(scope_of(request), task)
    except (TaskNotFound, TaskStale) as error:  # the second: it is damaged, and where it is cannot be read
        if makes or isinstance(error, TaskStale):
            raise VersionConflict(error.detail) from None
        raise
    if pointer.stale:
        raise StoreUnavailable("The store does not answer, and where the task is now only it can tell.", retry_after=2)
    # A weak tag fits none here. A tag without its quotes, or without the head, is unmistakable.
    fitting = {f"v{pointer.version}", etag(pointer).strip('"')}
    if not any_will_do and fitting.isdisjoint(tag.strip('"') for tag in tags):
        raise VersionConflict(f"The task is at version {pointer.version}, and not where If-Match says.")
    return pointer
