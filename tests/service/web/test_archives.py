"""Archives that a stranger wrote: read to the byte where they are plain, refused before they cost anything else."""

from __future__ import annotations

import io
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import PurePosixPath

import pytest

from models.errors import FewshotError, InvalidRequest, TooLarge
from service.web.archives import Most, open_tar, open_zip
from service.web.bodies import _from_entries

MOST = Most(parts=40, unpacked=10_000_000, entry=1_000_000)
LONG = "photos/" + "/".join(["ä" * 60] * 3) + "/1.png"


def member(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, pax: dict[str, str] | None = None) -> bytes:
    """One entry of a tar."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    info.pax_headers = pax or {}
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


END = bytes(2 * tarfile.BLOCKSIZE)


def hole(name: str, size: int) -> bytes:
    """A file of zeros that is stored as nothing but its size, as GNU tar does with --sparse."""
    told = {"major": "1", "minor": "0", "name": name, "realsize": str(size)}
    pax = {f"GNU.sparse.{key}": value for key, value in told.items()}
    return member("x", f"1\n{size}\n0\n".encode(), pax=pax)


def test_a_zip_of_extra_fields_is_refused_before_they_are_read() -> None:
    """In Python, four bytes at a time: 31 MB of them took twelve seconds of a core."""

    def extra(size: int) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for index in range(30):
                info = zipfile.ZipInfo(f"a/{index}")
                info.extra = b"\xff\xff\0\0" * (size // 4)
                archive.writestr(info, b"x")
        return out.getvalue()

    assert len(list(open_zip(extra(400), MOST).files())) == 30
    with pytest.raises(TooLarge, match="extra fields"):
        open_zip(extra(20_000), MOST)


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["a", "b"], ["a", "b"]),
        (["x/a", "x/b"], ["a", "b"]),
        (["x/y/a", "x/y/a/c"], ["a", "a/c"]),
        (["x/a", "x/a"], ["a", "a"]),
        (["x/y/a", "x/z/a", "x/y/b"], ["y/a", "z/a", "y/b"]),
        (["x", "x/a"], ["x", "x/a"]),
    ],
)
def test_folders_that_all_share_are_no_part_of_the_label(folders: list[str], labels: list[str]) -> None:
    given = _from_entries((PurePosixPath(folder, f"{n}.png"), b"x") for n, folder in enumerate(folders))
    assert [example.label for example in given.examples] == labels


def test_folders_within_thousands_of_folders_take_no_time() -> None:
    deep = PurePosixPath("x/" * 8000)
    start = time.perf_counter()
    given = _from_entries((deep / label / f"{k}.png", b"x") for k in range(10) for label in ("a", "b"))
    assert {example.label for example in given.examples} == {"a", "b"}
    assert time.perf_counter() - start < 2


def test_a_path_of_more_folders_than_any_computer_makes_is_refused_before_it_is_taken_apart() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/" * 1000 + "1", b"x")
        archive.writestr("a/" * 1001 + "1", b"x")
    name = (
        member("././@LongLink", b"a/" * folders + b"1\0", kind=tarfile.GNUTYPE_LONGNAME) for folders in (1000, 1001)
    )
    for opened in (open_zip(out.getvalue(), MOST), open_tar(b"".join(n + member("x", b"x") for n in name) + END, MOST)):
        files = opened.files()
        assert len(next(files)[0].parts) == 1001
        with pytest.raises(InvalidRequest, match="more than 1000 folders") as caught:
            next(files)
        assert caught.value.index == 1


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_read_as_it_was_written_whatever_its_form(form: int) -> None:
    names = ["a/1.png", "ä b/2.png", "c/" + "x" * 90 + "/1.png", *([LONG] if form != tarfile.USTAR_FORMAT else [])]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, pax_headers={"comment": "of all"}) as archive:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for index, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 500 * index, 1.5
            archive.addfile(info, io.BytesIO(bytes([index]) * info.size))
    found = open_tar(out.getvalue(), MOST)
    assert [(str(path), data) for path, data in found.files()] == [
        (name, bytes([index]) * (500 * index)) for index, name in enumerate(names)
    ]
    assert found.size == sum(500 * index for index in range(len(names)))


def test_a_tar_with_holes_is_refused_before_they_are_filled() -> None:
    """A megabyte of them is gigabytes, and one of a size below nothing would make up for all others."""
    for tar in (hole("a/1", 900_000), hole("a/1", 900_000) * 30 + hole("a/2", -(10**12))):
        with pytest.raises(InvalidRequest, match="holes"):
            open_tar(tar + END, MOST)
    with pytest.raises(InvalidRequest, match="holes"):
        open_tar(member("a/1", kind=tarfile.GNUTYPE_SPARSE) + END, MOST)


@pytest.mark.parametrize("size", ["-5", "99999999", "x"])
def test_a_tar_whose_header_lies_about_a_size_is_refused(size: str) -> None:
    with pytest.raises(InvalidRequest, match="not a tar"):
        open_tar(member("a/1", b"xy", pax={"size": size}) + END, MOST)


def test_a_header_for_all_entries_of_a_tar_is_not_kept_for_each() -> None:
    told = tarfile.TarInfo.create_pax_global_header({f"k{k}": "v" for k in range(20_000)})
    tar = told + b"".join(member(f"a/{k}", b"x", pax={"mtime": "1.5"}) for k in range(40)) + END
    tracemalloc.start()
    try:
        assert len(list(open_tar(tar, MOST).files())) == 40
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_headers_of_headers_of_a_tar_are_counted_and_end() -> None:
    name = member("././@LongLink", b"a/named\0", kind=tarfile.GNUTYPE_LONGNAME)
    assert [str(path) for path, _ in open_tar(name * 2000 + member("x") + END, MOST).files()] == ["a/named"]
    for many in (name * 5000 + member("x"), member("a/", kind=tarfile.DIRTYPE) * 1100):
        with pytest.raises(TooLarge, match="too many entries"):
            open_tar(many + END, MOST)


def test_what_else_the_headers_of_a_tar_tell_is_passed_over_however_long_it_is() -> None:
    """As a tar of macOS does, of a picture with a preview of its own among its attributes."""
    tar = member("a/1", b"x", pax={"LIBARCHIVE.xattr.com.apple.ResourceFork": "A" * 200_000}) + END
    assert [(str(path), data) for path, data in open_tar(tar, MOST).files()] == [("a/1", b"x")]


@pytest.mark.slow
def test_a_tar_of_more_records_than_any_program_writes_is_refused_before_it_is_kept() -> None:
    """Each takes a microsecond, and ten times its bytes if it is kept."""
    tar = b"".join(member("a/1", pax={f"{n}.{k}": "v" for k in range(4000)}) for n in range(17)) + END
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="than any program writes"):
            open_tar(tar, MOST)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("between", [tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE])
def test_a_size_that_a_header_of_a_tar_tells_is_that_of_the_entry(between: bytes) -> None:
    told = member("x", b"10 size=1\n", kind=tarfile.XHDTYPE) + member("x", b"600" * 200, kind=between)
    assert [data for _, data in open_tar(told + member("a/1", b"x") + END, MOST).files()] == [b"x"]


@pytest.mark.parametrize("record", [b"5", b"0 a=b\n", b"-6 a=b\n", b"99 a=b\n", b"6 axb\n", b"x a=b\n", b"1" * 40])
def test_a_tar_whose_records_are_none_is_refused(record: bytes) -> None:
    tar = member("x", record, kind=tarfile.XHDTYPE) + member("a/1", b"x") + END
    with pytest.raises(FewshotError):
        open_tar(tar, MOST)
