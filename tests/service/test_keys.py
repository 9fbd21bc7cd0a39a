"""API keys: what is printed, what is kept, who is let in, and what happens when the file changes or breaks."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from models.errors import Unauthorized
from service import keys
from service.keys import Keyring, KeysUnusable, create, load, pepper_file, revoke
from tests import flushed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def a_key(file: Path, **options: object) -> str:
    return create(file, **{"tenant": "acme", "scopes": ["classify"], **options})[1]  # type: ignore[arg-type]


def refusal(ring: Keyring, token: str) -> str:
    with pytest.raises(Unauthorized) as caught:
        ring.check(token.encode())
    return caught.value.detail


def command(
    *arguments: str, file: Path | None = None, module: str = "service.keys"
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSHOT_")}
    environment = {**clean, "FEWSHOT_KEYS_FILE": str(file)} if file else clean
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_a_key_has_a_form_that_can_be_searched_for_and_a_secret_of_256_bits(file: Path) -> None:
    key, token = create(file, tenant="acme", scopes=["adapt"], env="test")
    form = re.fullmatch(r"fsk_test_([a-z0-9]{12})_([A-Za-z0-9]{43})", token)
    assert form
    assert form[1] == key.id
    assert 62 ** len(form[2]) > 2**256
    assert create(file, tenant="acme", scopes=["adapt"])[1][-43:] != form[2]


def test_a_key_that_was_made_is_known_with_its_tenant_scopes_and_quota(file: Path) -> None:
    token = a_key(file, scopes=["classify", "adapt", "adapt"], quota=7, name="the door")
    found = Keyring(file).check(token.encode())
    assert (found.tenant, found.scopes, found.quota, found.name) == ("acme", ("adapt", "classify"), 7, "the door")


def test_no_secret_is_on_disk_and_nobody_else_may_read_what_is(file: Path) -> None:
    token = a_key(file)
    secret = token.rsplit("_", 1)[1]
    assert sorted(path.name for path in file.parent.iterdir()) == ["keys.json", "keys.json.pepper"]
    for path in file.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        text = path.read_text()
        assert secret not in text
        # Not guessable from one of the files alone: the digest is no plain one.
        assert not {hashlib.sha256(part.encode()).hexdigest() for part in (secret, token)} & set(
            re.findall(r"[0-9a-f]{64}", text)
        )
    assert pepper_file(file).read_text() not in file.read_text()


def test_whoever_has_no_good_key_is_refused(file: Path) -> None:
    good = a_key(file)
    other = a_key(file)
    ring = Keyring(file)
    ring.check(good.encode())
    wrong = good[:-1] + ("a" if good[-1] != "a" else "b")
    swapped = other[:-43] + good[-43:]
    for token in (
        wrong,
        swapped,
        good[:-1],
        good + "a",
        good.swapcase(),
        "FSK" + good[3:],
        good.replace("live", "test"),
        "",
        "fsk_live_" + "a" * 12 + "_" + "A" * 43,
        good + "\0",
        "x" * 10_000,
    ):
        assert refusal(ring, token) == "There is no such key."


def test_an_unknown_id_and_a_wrong_secret_cost_the_same_comparison(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = a_key(file)
    ring = Keyring(file)
    lengths: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counted(a: str, b: str) -> bool:
        lengths.append((len(a), len(b)))
        return bool(compare(a, b))

    monkeypatch.setattr(hmac, "compare_digest", counted)
    refusal(ring, good[:-1] + ("a" if good[-1] != "a" else "b"))
    refusal(ring, "fsk_live_" + "a" * 12 + "_" + "A" * 43)
    assert lengths == [(64, 64), (64, 64)]


def test_an_expired_and_a_revoked_key_are_told_so_only_to_whoever_has_the_secret(file: Path) -> None:
    brief = a_key(file, expires=datetime.now(UTC) + timedelta(seconds=0))
    lasting = a_key(file, expires=datetime.now(UTC) + timedelta(days=1))
    gone = a_key(file)
    revoke(file, gone.split("_")[2])
    ring = Keyring(file)
    ring.check(lasting.encode())
    assert refusal(ring, brief) == "This key has expired."
    assert refusal(ring, gone) == "This key was revoked."
    assert refusal(ring, gone[:-43] + "A" * 43) == "There is no such key."


def test_a_digest_is_worth_nothing_under_another_id(file: Path) -> None:
    weak, strong = a_key(file), a_key(file, scopes=["admin"])
    text = json.loads(file.read_text())
    by_id = {row["id"]: row for row in text["keys"]}
    by_id[strong.split("_")[2]]["digest"] = by_id[weak.split("_")[2]]["digest"]
    file.write_text(json.dumps(text))
    forged = strong[:-43] + weak[-43:]
    assert refusal(Keyring(file), forged) == "There is no such key."


def test_keys_that_are_made_and_revoked_at_once_are_all_kept(file: Path) -> None:
    # Each call opens the lock anew, so threads exclude each other as processes do.
    def work(number: int) -> list[str]:
        tokens = [a_key(file, tenant=f"t{number}") for _ in range(5)]
        revoke(file, tokens[0])
        return tokens

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(work, range(8)))
    ring = Keyring(file)
    assert len(load(file)) == 40
    for number, (first, *rest) in enumerate(made):
        assert refusal(ring, first) == "This key was revoked."
        assert {ring.check(token.encode()).tenant for token in rest} == {f"t{number}"}
    assert sorted(path.name for path in file.parent.iterdir()) == ["keys.json", "keys.json.pepper"]


def test_a_key_that_was_made_or_revoked_outlives_a_power_cut(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = flushed.noted(monkeypatch)
    whole = ["flush keys.json.*", "name keys.json", f"flush {file.parent.name}"]
    token = a_key(file)
    assert done == ["flush keys.json.pepper", *whole]
    done.clear()
    revoke(file, token.split("_")[2])
    assert done == whole


def test_a_write_that_fails_leaves_the_keys_as_they_were(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = a_key(file)
    before = file.read_bytes()

    def full(path: Path, text: str, *, mode: int) -> None:
        path.write_text(text[: len(text) // 2])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(keys, "write", full)
    with pytest.raises(OSError, match="No space"):
        a_key(file)
    assert file.read_bytes() == before
    assert sorted(path.name for path in file.parent.iterdir()) == ["keys.json", "keys.json.pepper"]
    Keyring(file).check(token.encode())


def test_a_running_service_looks_at_the_file_once_a_second_and_takes_what_has_changed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = a_key(file)
    clock = Clock()
    ring = Keyring(file, clock=clock)
    looks = 0
    state = ring._state

    def counted() -> object:
        nonlocal looks
        looks += 1
        return state()

    monkeypatch.setattr(ring, "_state", counted)
    second = a_key(file)
    revoke(file, first.split("_")[2])
    for _ in range(100):
        ring.check(first.encode())
    assert (looks, refusal(ring, second)) == (0, "There is no such key.")
    clock.now = 1.0
    assert refusal(ring, first) == "This key was revoked."
    for _ in range(100):
        ring.check(second.encode())
    assert looks <= 2


def test_a_file_that_has_not_changed_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = a_key(file)
    clock = Clock()
    ring = Keyring(file, clock=clock)
    monkeypatch.setattr(keys, "load", lambda _: pytest.fail("read again"))
    for _ in range(3):
        clock.now += 1
        ring.check(token.encode())


def emptied(file: Path) -> None:
    file.write_text("")


def cut(file: Path) -> None:
    file.write_text(file.read_text()[:-30])


def removed(file: Path) -> None:
    file.unlink()


def binary(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\0")


def doubled(file: Path) -> None:
    text = json.loads(file.read_text())
    file.write_text(json.dumps({**text, "keys": text["keys"] * 2}))


def of_another_format(file: Path) -> None:
    file.write_text(file.read_text().replace("fewshot-keys-1", "fewshot-keys-9"))


def with_an_unknown_scope(file: Path) -> None:
    file.write_text(file.read_text().replace('"classify"', '"everything"'))


def with_a_tenant_that_is_none(file: Path) -> None:
    file.write_text(file.read_text().replace('"acme"', '"../acme"'))


def without_its_pepper(file: Path) -> None:
    pepper_file(file).unlink()


def with_another_pepper(file: Path) -> None:
    pepper_file(file).write_bytes(b"\xffnothing")


BROKEN = [
    emptied,
    cut,
    removed,
    binary,
    doubled,
    of_another_format,
    with_an_unknown_scope,
    with_a_tenant_that_is_none,
    without_its_pepper,
    with_another_pepper,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_file_stops_the_start_with_a_sentence_that_names_it(
    file: Path, broken: Callable[[Path], None]
) -> None:
    token = a_key(file)
    digest = load(file)[token.split("_")[2]].digest
    broken(file)
    with pytest.raises(KeysUnusable, match=r"keys\.json") as caught:
        Keyring(file)
    assert str(caught.value).endswith(".")
    assert digest not in str(caught.value)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_file_that_breaks_later_leaves_the_keys_as_they_were_is_logged_once_and_can_be_mended(
    file: Path, broken: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    token = a_key(file)
    whole = {path: path.read_bytes() for path in file.parent.iterdir()}
    clock = Clock()
    ring = Keyring(file, clock=clock)
    broken(file)
    if file.exists():
        os.utime(file)  # where it was the pepper that broke: it is read again with the keys
    for _ in range(3):
        clock.now += 1
        assert ring.check(token.encode()).tenant == "acme"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "stay in force" in errors[0].getMessage()
    for path, content in whole.items():
        path.write_bytes(content)
    revoke(file, token.split("_")[2])
    clock.now += 1
    assert refusal(ring, token) == "This key was revoked."
    assert token.rsplit("_", 1)[1] not in caplog.text


def test_a_lost_pepper_is_not_replaced_while_there_are_keys(file: Path) -> None:
    a_key(file)
    pepper_file(file).unlink()
    with pytest.raises(KeysUnusable, match="is not replaced"):
        a_key(file)
    assert len(load(file)) == 1


def test_a_pepper_that_was_cut_short_before_the_first_key_is_made_again(file: Path) -> None:
    pepper_file(file).write_text("abc")
    token = a_key(file)
    Keyring(file).check(token.encode())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_writes_stays_readable_for_the_service(file: Path) -> None:
    os.chown(file.parent, 4321, 4321)
    token = a_key(file)
    assert {path.stat().st_uid for path in file.parent.iterdir()} == {4321}
    os.chown(file, 1234, 1234)
    revoke(file, token.split("_")[2])
    assert (file.stat().st_uid, pepper_file(file).stat().st_uid) == (1234, 4321)


# The command.


def test_create_prints_the_key_alone_and_list_and_revoke_never_do(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--file", str(file)]
    options = [
        "--tenant",
        "acme",
        "--scopes",
        "classify,adapt",
        "--name",
        "the door",
        "--expires",
        "90d",
        "--quota",
        "60",
    ]
    assert keys.main([*at, "create", *options]) == 0
    token = capsys.readouterr().out.removesuffix("\n")
    Keyring(file).check(token.encode())
    assert keys.main([*at, "list"]) == 0
    listed = capsys.readouterr().out
    expires = datetime.now(UTC) + timedelta(days=90)
    for part in (token.split("_")[2], "acme", "adapt,classify", "live", "60", f"{expires:%Y-%m-%d}", "the door"):
        assert part in listed
    assert keys.main([*at, "revoke", token.split("_")[2]]) == 0
    assert keys.main([*at, "list"]) == 0
    said = capsys.readouterr()
    assert "revoked" in said.out
    assert token.rsplit("_", 1)[1] not in listed + said.out + said.err


def test_a_key_that_leaked_is_revoked_by_pasting_it_and_is_not_repeated(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = a_key(file)
    assert keys.main(["--file", str(file), "revoke", token]) == 0
    assert refusal(Keyring(file), token) == "This key was revoked."
    assert keys.main(["--file", str(file), "revoke", "FSK" + token[3:]]) == 1
    assert token.rsplit("_", 1)[1] not in capsys.readouterr().err


def test_a_key_is_good_until_the_moment_at_which_it_expires(file: Path) -> None:
    end = datetime(2040, 1, 31, tzinfo=UTC)
    key, _ = create(file, tenant="acme", scopes=["adapt"], expires=end)
    assert key.state(end - timedelta(microseconds=1)) == "live"
    assert key.state(end) == "expired"


def test_revoking_twice_keeps_the_first_time(file: Path) -> None:
    token = a_key(file)
    revoke(file, token.split("_")[2])
    file.write_text(re.sub(r'"revoked": "[^"]+"', '"revoked": "2020-02-02T20:20:20Z"', file.read_text()))
    assert revoke(file, token.split("_")[2]).revoked == datetime(2020, 2, 2, 20, 20, 20, tzinfo=UTC)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["create", "--tenant", "Acme", "--scopes", "adapt"], 1, "tenant"),
        (["create", "--tenant", "", "--scopes", "adapt"], 1, "tenant"),
        (["create", "--tenant", "a" * 33, "--scopes", "adapt"], 1, "tenant"),
        (["create", "--tenant", "acme", "--scopes", "adapt,all"], 2, "'all' is no scope"),
        (["create", "--tenant", "acme", "--scopes", ""], 2, "no scope"),
        (["create", "--tenant", "acme"], 2, "--scopes"),
        (["create", "--tenant", "acme", "--scopes", "adapt", "--quota", "0"], 1, "quota"),
        (["create", "--tenant", "acme", "--scopes", "adapt", "--env", "a_b"], 1, "env"),
        (["create", "--tenant", "acme", "--scopes", "adapt", "--name", "a\nb"], 1, "name"),
        (["create", "--tenant", "acme", "--scopes", "adapt", "--expires", "2001-01-31"], 2, "is over"),
        (["create", "--tenant", "acme", "--scopes", "adapt", "--expires", "soon"], 2, "2030-01-31"),
        (["revoke", "aaaaaaaaaaaa"], 1, "no key aaaaaaaaaaaa"),
        (["list"], 1, "cannot be read"),
        ([], 2, "command"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_and_makes_no_key(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, words: str
) -> None:
    assert keys.main(["--file", str(file), *arguments]) == status
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""
    assert not file.exists() or not load(file)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["create", "--tenant", "acme", "--scopes", "adapt"]
    assert keys.main(["--file", str(tmp_path / "none" / "keys.json"), *options]) == 1
    assert "No such file or directory" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_program_it_finds_the_file_in_the_setting(file: Path) -> None:
    made = command("create", "--tenant", "acme", "--scopes", "adapt", file=file)
    assert (made.returncode, len(made.stdout.split())) == (0, 1)
    Keyring(file).check(made.stdout.strip().encode())
    nowhere = command("list")
    assert nowhere.returncode == 1
    assert "FEWSHOT_KEYS_FILE" in nowhere.stderr
