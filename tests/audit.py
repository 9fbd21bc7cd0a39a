"""What serving must not do: run bytes as code, start programs, reach out, write elsewhere. Seen by the interpreter.

    FEWSHOT_TEST_AUDIT=FILE python -m tests.audit      is `python -m service`, watched

Python tells an audit hook of such things before they happen. Each that is not allowed becomes a line of JSON in FILE,
which tests/conftest.py sets for the whole suite and holds to be empty. Recorded and not raised: a handler's `except`
would catch an error, and all would be well. Libraries that act without Python, as SQLite and onnxruntime do, tell of
nothing; uvloop is made to. Standard library only, so that a watched service loads nothing that it would not load.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import pickle
import runpy
import sys
import sysconfig
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "FEWSHOT_TEST_AUDIT"
IMPORTING = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
OURS = (f"{ROOT}/models/", f"{ROOT}/service/")
ANNOTATIONS = (inspect.__file__, typing.__file__)
# pytest writes down what it made of a module that a service in its process imports late, as the interpreter does.
WRITES_CODE = (*IMPORTING, f"{sysconfig.get_path('purelib')}/_pytest/assertion/rewrite.py")
FASTAPI = f"{sysconfig.get_path('purelib')}/fastapi/dependencies/utils.py"
# What runs beside the service, for whoever operates it; only what the service itself does is watched.
BESIDE = tuple(f"{ROOT}/service/{part}" for part in ("cli/", "client/", "keys.py", "secrets.py", "doctor.py"))
STORES = f"{ROOT}/service/stores/"

NEVER = {
    *("pickle.find_class", "fewshot.unpickle"),
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"),
    *("os.kill", "os.killpg", "sqlite3.enable_load_extension", "sqlite3.load_extension"),
    *("tempfile.mkstemp", "tempfile.mkdtemp"),
}
# Never, once it listens: before, a process loads its libraries, which make code, and takes its port.
LATE = {"exec", "compile", "marshal.loads", "marshal.load", "code.__new__", "ctypes.dlopen", "socket.bind"}
REACHES = {"socket.connect", "socket.sendto", "socket.sendmsg"}
ASKS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
# Event -> how many of its arguments are paths.
PATHS = {
    **{f"os.{name}": 1 for name in ("mkdir", "rmdir", "remove", "chmod", "chown", "truncate", "utime", "setxattr")},
    **{f"os.{name}": 2 for name in ("rename", "link", "symlink")},
    **{"shutil.rmtree": 1, "shutil.move": 2, "sqlite3.connect": 1, "os.mkfifo": 1, "os.mknod": 1},
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
WATCHED = NEVER | LATE | REACHES | ASKS | set(PATHS) | {"open"}


class Watch:
    """An audit hook. `writes` and `reaches` say what is allowed; `concerns`: whether a frame is one of the service."""

    def __init__(
        self,
        file: str,
        *,
        writes: Callable[[str, FrameType], bool],
        reaches: Callable[[str, Any, FrameType], bool],
        concerns: Callable[[FrameType], bool],
        listening: bool,
    ):
        self.writes, self.reaches, self.concerns = writes, reaches, concerns
        self.listening = listening
        self._out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def install(self) -> None:
        _tell_of_unpickling()
        _tell_of_uvloop()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event in WATCHED and (self.listening or event not in LATE):
            frame = sys._getframe(1)
            if self.concerns(frame) and not self._allowed(event, args, frame):
                self.note({"event": event, "args": repr(args)[:300], "at": [_place(one) for one in _stack(frame)][:12]})

    def note(self, what: dict[str, Any]) -> None:
        os.write(self._out, (json.dumps({**what, "pid": os.getpid()}) + "\n").encode())

    def _allowed(self, event: str, args: tuple[Any, ...], frame: FrameType) -> bool:
        if event in LATE:
            names = {one.f_code.co_filename for one in _stack(frame)}
            # Modules are loaded late too, and run what they like to while they are. A tree of source is not code yet.
            # FastAPI reads the annotations of a route when it is first asked for: text, but of our own source.
            parse = event == "compile" and frame.f_code.co_filename.endswith("/ast.py")
            own = event in ("compile", "exec") and frame.f_code.co_filename in ANNOTATIONS and FASTAPI in names
            return parse or own or not names.isdisjoint(IMPORTING)
        if event in REACHES:
            address = args[1]
            return isinstance(address, tuple) and self.reaches(str(address[0]), address[1], frame)
        if event in ASKS:
            host, port = (args[0], args[1]) if event == "socket.getaddrinfo" else (args[0], None)
            return host is None or self.reaches(_text(host), port, frame)
        if event == "open":
            path, mode, flags = args
            if isinstance(path, int) or not (flags & WRITES or set(mode or "") & set("wax+")):
                return True
            if _importing(frame) or _text(path) == os.devnull:
                return True
            return self.writes(os.path.realpath(_text(path)), frame)
        if event in PATHS:
            paths = [path for path in args[: PATHS[event]] if not isinstance(path, int) and _text(path) != ":memory:"]
            return _importing(frame) or all(self.writes(os.path.realpath(_text(path)), frame) for path in paths)
        return False


def _text(value: Any) -> str:
    return os.fsdecode(value).removeprefix("file:").partition("?")[0]


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _importing(frame: FrameType) -> bool:
    """Whether this writes a compiled module."""
    near = next(
        one.f_code.co_filename for one in _stack(frame) if one.f_code.co_filename not in ("<frozen os>", os.__file__)
    )
    return near in WRITES_CODE


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.removeprefix(f'{ROOT}/')}:{frame.f_lineno} {frame.f_code.co_name}"


def _tell_of_unpickling() -> None:
    """Python tells of the names that a pickle looks up, and not of a pickle that has none."""

    class Unpickler(pickle.Unpickler):
        def load(self) -> Any:
            sys.audit("fewshot.unpickle")
            return super().load()

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    def loads(data: Any, /, **options: Any) -> Any:
        sys.audit("fewshot.unpickle")
        return right(data, **options)

    right = pickle.loads
    pickle.Unpickler, pickle.load, pickle.loads = Unpickler, load, loads  # type: ignore[misc, assignment]


def _tell_of_uvloop() -> None:
    """libuv connects, looks up and spawns by itself; this loop says so first, with the events that Python has."""
    try:
        import uvloop
    except ImportError:
        return

    def telling(name: str, event: str, address: Callable[..., Any]) -> Callable[..., Any]:
        def told(self: Any, *args: Any, **named: Any) -> Any:
            found = address(*args, **named)
            if found is not None:
                sys.audit(event, *found)
            return getattr(base, name)(self, *args, **named)

        return told

    def connection(_: Any, host: Any = None, port: Any = None, **__: Any) -> Any:
        return None if host is None else (None, (host, port))

    def datagram(_: Any, local: Any = None, remote: Any = None, remote_addr: Any = None, **__: Any) -> Any:
        return None if (remote or remote_addr) is None else (None, remote or remote_addr)

    base = uvloop.Loop
    uvloop.Loop = type(  # type: ignore[misc]
        "Loop",
        (base,),
        {
            "__module__": __spec__.name if __spec__ else __name__,
            "create_connection": telling("create_connection", "socket.connect", connection),
            "create_unix_connection": telling(
                "create_unix_connection", "socket.connect", lambda _, path=None, **__: (None, path)
            ),
            "create_datagram_endpoint": telling("create_datagram_endpoint", "socket.connect", datagram),
            "sock_connect": telling("sock_connect", "socket.connect", lambda sock, address: (sock, address)),
            "getaddrinfo": telling("getaddrinfo", "socket.getaddrinfo", lambda host, port, **_: (host, port)),
            "getnameinfo": telling("getnameinfo", "socket.getnameinfo", lambda address, *_: (address[0],)),
            "subprocess_exec": telling("subprocess_exec", "subprocess.Popen", lambda *args, **_: args[1:]),
            "subprocess_shell": telling("subprocess_shell", "subprocess.Popen", lambda *args, **_: args[1:]),
        },
    )


def service(environment: dict[str, str]) -> Watch:
    """Of a service process: it may write under its folder, and reach its store and whoever takes its spans."""
    folder = os.path.realpath(environment.get("FEWSHOT_DATA_DIR", "data"))
    peers: set[tuple[str, int]] = set()
    for name, usual in (("REDIS_URL", 6379), ("TRACE_ENDPOINT", 4318)):
        address = urlsplit(environment.get(f"FEWSHOT_{name}", ""))
        if address.hostname:
            same = ("localhost", "127.0.0.1", "::1") if address.hostname == "localhost" else (address.hostname,)
            peers |= {(host, address.port or usual) for host in same}
    hosts = {host for host, _ in peers} | {environment.get("FEWSHOT_HOST", "127.0.0.1")}

    def reaches(host: str, port: Any, frame: FrameType) -> bool:
        return (host, int(port)) in peers if port else host in hosts

    def writes(path: str, frame: FrameType) -> bool:
        return path == folder or path.startswith(f"{folder}/")

    return Watch(environment[VARIABLE], writes=writes, reaches=reaches, concerns=lambda _: True, listening=False)


def in_this_process(file: str) -> Watch:
    """Of a process of tests: what threads other than its first do in the name of the service.

    Many services with folders and stores of their own share it, so of these is only known who may use them.
    """
    first = threading.main_thread().ident

    def ours(frame: FrameType) -> str:
        """The nearest file of the project, or uvicorn's if there is none."""
        names = [one.f_code.co_filename for one in _stack(frame)]
        near = next((name for name in names if name.startswith(f"{ROOT}/") and "/site-packages/" not in name), "")
        return near if near or not any("/uvicorn/" in name for name in names) else "uvicorn"

    def concerns(frame: FrameType) -> bool:
        if threading.get_ident() == first:
            return False
        near = ours(frame)
        return near == "uvicorn" or (near.startswith(OURS) and not near.startswith(BESIDE))

    def stores(_: str, frame: FrameType) -> bool:
        return ours(frame).startswith(STORES)

    return Watch(file, writes=stores, reaches=lambda _, __, frame: stores("", frame), concerns=concerns, listening=True)


def program() -> str:
    """The module that a test starts for a service: watched where the run of tests is, else as it is."""
    return "tests.audit" if VARIABLE in os.environ else "service"


def passed_on() -> dict[str, str]:
    """What the environment of a service needs for it."""
    return {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}


def main() -> None:
    """`python -m service`, watched from the first line to the last."""
    watch = service(dict(os.environ))
    watch.install()
    import uvicorn

    startup = uvicorn.Server.startup

    async def started(self: uvicorn.Server, *args: Any, **named: Any) -> None:
        await startup(self, *args, **named)
        watch.listening = True
        loop = type(asyncio.get_running_loop())
        watch.note({"watching": f"{loop.__module__}.{loop.__name__}"})

    uvicorn.Server.startup = started  # type: ignore[method-assign]
    sys.argv[0] = str(ROOT / "service" / "__main__.py")
    runpy.run_module("service", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
