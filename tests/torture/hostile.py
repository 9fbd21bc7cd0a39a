"""Files that were made to do harm, and what they may cost: themselves, little, and nobody else."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from models.artifact import Artifact
from models.errors import FewshotError, UndecodableExample
from models.extractor import load_extractor
from service.batcher import Batcher
from service.settings import Settings
from service.stores.memory import MemoryStore
from service.waiting import cost
from service.web import app as web
from tests.fakes import picture
from tests.models import corpus
from tests.service.live import served
from tests.torture._decode import MAX_MB, MAX_MS, decoder_of
from tests.torture.line import Outcome, fault
from tests.torture.world import CHARACTERS, ROOT, Service, support

BOMB = "png of 144 megapixels, all there"
LARGE = 4096  # a side; 16.78 of the 16.8 million pixels that are allowed
CODES = {413: {"too_large"}, 422: {"undecodable_example"}}
LEAKS = re.compile(r"0x[0-9a-f]|Traceback|PIL|/models/|/site-packages|\.py\b|object at")
PHOTOS = CHARACTERS.parent / "photos"


class Child:
    """A process that decodes what it is given. What it dies of is counted; the next file meets a new one."""

    def __init__(self, *what: str):
        self.what = what
        self.deaths: list[str] = []
        self._start()

    def _start(self) -> None:
        # Freed memory goes back at once, else a large file would make room for those after it.
        environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture._decode", *self.what],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, name: str, file: bytes) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.write(struct.pack(">I", len(file)) + file)
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self.deaths.append(f"{name}: {signal.Signals(-status).name if status < 0 else status}")
            self._start()
            return {"code": "died", "detail": "", "ms": 0.0, "mb": 0.0}
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        self._process.communicate()


# What may befall a file.


def parts(file: bytes) -> list[bytes]:
    """Its pieces as its format counts them: chunks or segments, and the rest in one."""
    png, webp, at = file.startswith(corpus.PNG), file.startswith(b"RIFF"), 0
    at = 8 if png else 12 if webp else 2
    found = [file[:at]]
    while at + 8 <= len(file):
        if png:
            length = 12 + int.from_bytes(file[at : at + 4], "big")
        elif webp:
            size = int.from_bytes(file[at + 4 : at + 8], "little")
            length = 8 + size + size % 2
        elif file[at] == 0xFF and file[at + 1] not in (0x00, 0xDA, 0xFF):
            length = 2 + int.from_bytes(file[at + 2 : at + 4], "big")
        else:
            break
        found.append(file[at : at + length])
        at += length
    return [*found, file[at:]] if file[at:] else found


def mutate(file: bytes, donor: bytes, rng: random.Random) -> bytes:
    """One to three accidents: to bits, to bytes, to the structure, or a marriage with another file."""
    for _ in range(rng.randint(1, 3)):
        data = bytearray(file)
        at = rng.randrange(len(data) + 1)
        match rng.randrange(9):
            case 0:
                for _ in range(rng.randint(1, 8)):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                data = data[: rng.choice([at, len(data) * 99 // 100, len(data) - 1])]
            case 2:
                data[at : at + rng.choice([1, 4, 64])] = rng.randbytes(rng.choice([0, 1, 4, 64]))
            case 3:  # a number, most of them lengths or sizes
                early = rng.randrange(min(len(data), 64) + 1)
                data[early : early + rng.choice([2, 4])] = rng.choice(
                    [b"\0\0", b"\xff\xff", b"\x10\0", b"\0\x10", b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\xff\xff\xff\xff"]
                )
            case 4:  # one file's beginning and another's end
                data = data[:at] + donor[rng.randrange(len(donor) + 1) :]
            case kind:
                pieces, other = parts(file), parts(donor)
                one, two = rng.randrange(len(pieces)), rng.randrange(len(pieces))
                if kind == 5:
                    pieces[one], pieces[two] = pieces[two], pieces[one]
                elif kind == 6:
                    pieces[one : one + 1] = [pieces[one]] * rng.choice([0, 2, 20])
                elif kind == 7:
                    pieces[one] = rng.choice(other)
                else:  # a length that is wrong by little
                    piece, where = bytearray(pieces[one]), 3 if file.startswith(corpus.PNG) else 4
                    if len(piece) > where:
                        piece[where] = (piece[where] + rng.choice([-2, -1, 1, 2])) % 256
                    pieces[one] = bytes(piece)
                data = bytearray(b"".join(pieces))
        file = bytes(data) or b"\0"
    return corpus.with_right_checksums(file) if rng.random() < 0.5 else file


def mutated(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    files = {name: file for name, (file, _, _) in corpus.readable().items()}
    for kind, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})):
        files[f"larger {kind} {options}"] = corpus.encode(corpus.scene(320, 240), kind, **options)
    names = list(files)
    for number in range(count):
        name = rng.choice(names)
        yield f"{number}: {name}", mutate(files[name], files[rng.choice(names)], rng)


def large() -> dict[str, bytes]:
    """Files of as many pixels as are allowed, that turn out to be no pictures as late as can be."""
    rgb, flat = corpus.scene(), np.zeros((LARGE, LARGE, 3), np.uint8)
    lossless, lossy = (corpus.encode(rgb, "WEBP", lossless=exact) for exact in (True, False))
    bits = int.from_bytes(lossless[21:25], "little") & ~0xFFFFFFF | (LARGE - 1) << 14 | LARGE - 1
    jpeg = corpus.encode(flat, "JPEG", progressive=True)
    return {
        "lossless webp": lossless[:21] + bits.to_bytes(4, "little") + lossless[25:],
        "lossy webp": lossy[:26] + struct.pack("<HH", LARGE, LARGE) + lossy[30:],
        "progressive jpeg": jpeg[: len(jpeg) // 2],
        "png without its last byte": corpus.png(flat, missing=1),
    }


@fault("G14", n=10_000, quick=200)
def hostile_images(n: int, seed: int, folder: Path) -> Outcome:
    """A file that is no picture is refused in 50 ms and 64 MB, in our words, and an accepted one has one meaning."""
    wrong: list[str] = []
    missed: list[str] = []
    refused_corpus = {**corpus.refused(), BOMB: corpus.blank(12_000, 12_000)}
    files = [*((f"corpus: {name}", file) for name, file in refused_corpus.items()), *mutated(n, seed)]
    accepted: list[bytes] = []
    refusals: Counter[str] = Counter()
    worst = {"ms": (0.0, ""), "mb": (0.0, "")}
    child = Child()
    with Service(folder, lanes=1) as service, service.client() as http:
        assert service.process
        pid = service.process.pid
        raw = {"Content-Type": "application/octet-stream"}
        before = service.rss
        for name, file in files:
            alone = child(name, file)
            answer = http.post("/v1/embed", content=file, headers=raw)
            found = answer.json()
            if "seen" in alone:
                accepted.append(file)
                if name.startswith("corpus"):
                    wrong.append(f"{name} was accepted")
            else:
                refusals[alone["code"]] += 1
                worst = {unit: max(worst[unit], (round(alone[unit], 1), name)) for unit in worst}
                if alone["mb"] > MAX_MB:
                    wrong.append(f"{name}: {alone['mb']:.0f} MB")
                if alone["ms"] > MAX_MS:
                    missed.append(f"{name}: {alone['ms']:.0f} ms")
            if answer.status_code == 200:
                same = "seen" in alone
            else:
                same = found.get("code") == alone.get("code") and found.get("detail") == alone.get("detail")
            if not same or found.get("code") not in CODES.get(answer.status_code, {None}):
                wrong.append(f"{name}: {answer.status_code} {found.get('code')}, and in a process alone {alone}")
            if LEAKS.search(answer.text):
                wrong.append(f"{name}: the answer tells too much: {answer.text[:200]}")
        if service.process.poll() is not None or service.process.pid != pid:
            wrong.append("the service ended")
        grown = (service.rss - before) / 1e6
        healthy = http.get("/readyz").status_code == 200
    if not healthy:
        wrong.append("the service is not ready any more")
    at_the_limit = {name: child(name, file) for name, file in large().items()}
    child.end()
    wrong += [f"the decoder's process died of {death}" for death in child.deaths]
    wrong += [f"{name} of {LARGE} x {LARGE} was accepted" for name, cost in at_the_limit.items() if "seen" in cost]
    different = _meanings([file for file, _, _ in corpus.readable().values()] + accepted, photos=n > 1000)
    wrong += different
    control = _stock(refused_corpus)
    if control["over 64 MB"] == 0 or control["accepted"] == 0:
        wrong.append("without our limits Pillow was no worse")
    return Outcome(
        len(files),
        len(child.deaths),
        control,
        {
            "accepted": len(accepted),
            "refused": dict(refusals),
            "worst": {unit: {"value": value, "file": name} for unit, (value, name) in worst.items()},
            "late at the limit of pixels": {
                name: {"ms": round(cost["ms"]), "mb": round(cost["mb"])} for name, cost in at_the_limit.items()
            },
            "service_grew_mb": round(grown, 1),
        },
        tuple(wrong),
        tuple(missed),
    )


def _stock(files: dict[str, bytes]) -> dict[str, Any]:
    """What Pillow with its default limits makes of what we refuse."""
    child = Child("pillow")
    names = [name for name in files if re.search("two frames|junk|rows|last row|2\\^31|65000", name)] + [BOMB]
    found = {name: child(name, files[name]) for name in names}
    child.end()
    bomb = found[BOMB]
    return {
        "files": len(found),
        "accepted": sum("seen" in cost for cost in found.values()),
        "over 64 MB": sum(cost["mb"] > MAX_MB for cost in found.values()),
        BOMB: {"ms": round(bomb["ms"]), "mb": round(bomb["mb"]), "accepted": "seen" in bomb},
    }


def _meanings(files: list[bytes], *, photos: bool) -> list[str]:
    """Which of 32 accepted files have not the same features, to the bit, 100 times, in every place of a batch."""
    wrong = []
    for path in (CHARACTERS, PHOTOS) if photos else (CHARACTERS,):
        artifact = Artifact.load(path)
        extractor, decoder = load_extractor(artifact, device="cpu"), decoder_of(path)
        chosen = files[:32]
        places = np.arange(len(chosen))
        alone = [extractor(decoder(file)[None])[0].tobytes() for file in chosen]
        for turn in range(100):
            order = np.roll(places, turn)
            size = len(order) if turn < len(order) else 1 + turn % len(order)  # and batches of other sizes
            features = extractor(np.stack([decoder(chosen[k]) for k in order[:size]]))
            moved = [int(k) for place, k in enumerate(order[:size]) if features[place].tobytes() != alone[k]]
            if moved:
                wrong.append(f"{path.name}: files {moved} have other features in turn {turn}")
    return wrong


# One bad image in a batch that several requests share.

BUG = b"a bug of the decoder"
SICK = picture("orange", seed=4711)  # the extractor's answer about it is not finite


class Faulty(Batcher):
    """With a decoder that has a bug of its own."""

    def _pixels(self, payload: Any) -> np.ndarray:
        if isinstance(payload, bytes) and payload.endswith(BUG):
            raise RuntimeError(f"secret: {hex(id(self))}")
        return super()._pixels(payload)


class OneTry(Faulty):
    """As it is done where nobody thought of it: what is wrong with one image is wrong with the batch."""

    def _do_batch(self, batch: Any) -> None:
        try:
            for job, index in batch:
                self._pixels(job.payloads[index])
        except Exception:
            self._tell([(job, UndecodableExample("The batch failed.")) for job in {job for job, _ in batch}])
        else:
            super()._do_batch(batch)


class Held:
    """The extractor of an artifact, which waits at a gate; it fails on one image."""

    def __init__(self, artifact: Artifact):
        self._real = load_extractor(artifact, device="cpu")
        self._sick = decoder_of(artifact.path)(SICK)
        self.dim = self._real.dim
        self.gate, self.waits = threading.Event(), threading.Event()
        self.batches: list[int] = []

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        self.waits.set()
        assert self.gate.wait(30)
        self.batches.append(len(batch))
        features = np.array(self._real(batch))
        features[(batch == self._sick).all(axis=(1, 2, 3))] = np.nan
        return features


class Table:
    """Fourteen requests for 32 images that end up in one batch: six of four images, eight of one."""

    SHAPE = (4,) * 6 + (1,) * 8

    def __init__(self, app: Any, held: Held, batcher: Batcher, http: httpx.Client):
        self.held, self.batcher, self.http = held, batcher, http
        self.pool = ThreadPoolExecutor(len(self.SHAPE) + 1)
        held.gate.set()
        assert http.put("/v1/tasks/kept", files=support(1)).status_code == 201
        self.images = [picture("red" if k % 2 else "blue", seed=5000 + k) for k in range(sum(self.SHAPE))]
        self.right = {places: self.ask([self.images[k] for k in places])[1]["predictions"] for places in self.seats()}

    @classmethod
    def seats(cls) -> list[range]:
        """The images of each request."""
        ends = np.cumsum(cls.SHAPE).tolist()
        return [range(end - size, end) for end, size in zip(ends, cls.SHAPE, strict=True)]

    def ask(self, images: list[bytes]) -> tuple[int, dict[str, Any]]:
        if len(images) == 1:
            answer = self.http.post("/v1/tasks/kept/classify", content=images[0], headers={"Content-Type": "image/png"})
        else:
            answer = self.http.post("/v1/tasks/kept/classify", files=[("i", image) for image in images])
        assert not LEAKS.search(answer.text), answer.text
        return answer.status_code, answer.json()

    def round(self, place: int, poison: bytes) -> list[tuple[range, int, dict[str, Any]]]:
        """Places, status and body of each request, when the image of one place is poison."""
        images = [poison if k == place else image for k, image in enumerate(self.images)]
        self.held.gate.clear()
        self.held.waits.clear()
        plug = self.pool.submit(self.ask, [self.images[0]])  # keeps the only lane busy while the rest gathers
        assert self.held.waits.wait(30)
        asked = [(places, self.pool.submit(self.ask, [images[k] for k in places])) for places in self.seats()]
        ends = time.monotonic() + 30
        while self.batcher.waiting < len(images):
            assert time.monotonic() < ends, "the requests do not arrive"
            time.sleep(0.0005)
        self.held.batches.clear()
        self.held.gate.set()
        plug.result()
        return [(places, *future.result()) for places, future in asked]


@contextmanager
def table(kind: type[Batcher], folder: Path) -> Iterator[Table]:
    artifact = Artifact.load(CHARACTERS)
    held, made = Held(artifact), []

    def noted(*given: Any, **named: Any) -> Batcher:
        made.append(kind(*given, **named))
        return made[0]

    logging.disable(logging.ERROR)  # each bug of a decoder is told with a traceback
    settings = Settings(artifact=CHARACTERS, lanes=1, max_batch=32, data_dir=folder)
    right, web.Batcher = web.Batcher, noted  # type: ignore[assignment, misc]
    try:
        app = web.create_app(settings, artifact=artifact, extractor=held, store=MemoryStore())
    finally:
        web.Batcher = right  # type: ignore[misc]
    with served(app) as http:
        http.timeout = httpx.Timeout(60)
        found = Table(app, held, made[0], http)
        try:
            yield found
        finally:
            held.gate.set()
            found.pool.shutdown()
            logging.disable(logging.NOTSET)


def _poisons(seed: int) -> list[tuple[str, bytes, str]]:
    """Name, file and the code that its request has to get."""
    decoder = decoder_of(CHARACTERS)
    found = [
        ("a bug of the decoder", picture("red") + BUG, "undecodable_example"),
        ("features that are not finite", SICK, "extractor_failed"),
    ]
    others = []
    for name, file in corpus.refused().items():
        try:
            decoder(file)
        except FewshotError as error:
            others.append((name, file, error.code))
    random.Random(seed).shuffle(others)
    return found + others


def _harmed(table: Table, place: int, poison: tuple[str, bytes, str]) -> list[str]:
    """What is wrong with the answers of one round."""
    name, file, code = poison
    wrong = []
    for places, status, body in table.round(place, file):
        items = body.get("predictions", [])
        if place not in places:
            right = items == table.right[places]
        elif len(places) == 1 or code == "extractor_failed":  # nothing else of it is good, or may be trusted
            right = (body.get("code"), body.get("index")) == (code, place - places.start)
        else:
            at = place - places.start
            error = items[at].get("error", {}) if len(items) == len(places) else {}
            # What the others are, asked in the same words without it: an image's own features do not depend on its
            # neighbours, but those of a request meet the head in one product, whose last bits depend on its size.
            others = table.ask([table.images[k] for k in places if k != place])[1]["predictions"]
            rest = [{**item, "index": k} for k, item in enumerate(items[:at] + items[at + 1 :])]
            right = (error.get("index"), error.get("code")) == (at, code) and rest == others
        if not right:
            wrong.append(f"{name} at {place}: the request of {places} got {status} {str(body)[:300]}")
    return wrong


@fault("N9", n=1000, quick=20)
def poison_in_a_batch(n: int, seed: int, folder: Path) -> Outcome:
    """A bad image among 32 of several requests fails alone, with index and code; the other answers are the same."""
    rng, poisons = random.Random(seed), _poisons(seed)
    wrong: list[str] = []
    sizes: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    with table(Faulty, folder) as real:
        for number in range(n):
            poison = poisons[number % len(poisons)]
            wrong += _harmed(real, rng.randrange(32), poison)
            kinds[poison[2]] += 1
            sizes[max(real.held.batches)] += 1
    if min(sizes) < 16:  # a large one takes the place of several
        wrong.append(f"the images did not share a batch: {dict(sizes)}")
    small = [poison for poison in poisons if poison[1] != SICK and cost(poison[1]) == 1]  # share it with all
    with table(OneTry, folder) as careless:
        failed = [len(_harmed(careless, rng.randrange(32), poison)) for poison in small[:4]]
    if not failed or min(failed) < len(Table.SHAPE) - 1:
        wrong.append(f"with one try around the batch only {failed} requests failed")
    control = {"one try around the batch": {"batches": len(failed), "requests that failed of 14": failed}}
    figures = {"images_in_a_batch": dict(sizes), "codes": dict(kinds)}
    return Outcome(31 * n, len(wrong), control, figures, tuple(wrong[:20]))
