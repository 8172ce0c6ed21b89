"""Zips that are damaged, or out to harm."""

from __future__ import annotations

import stat
import sys
import zipfile
from pathlib import Path

import pytest

from core.datasets import FileErrors
from tests.unit.ingest_builders import (
    Entry,
    accepted,
    image,
    image_zip,
    limits,
    parse,
    parse_measured,
    raw_zip,
    refused,
)

CAT, CAT_2, DOG, DOG_2 = (image(seed=i) for i in range(4))
GOOD = {"cat/1.png": CAT, "cat/2.png": CAT_2, "dog/1.png": DOG, "dog/2.png": DOG_2}
GOOD_ENTRIES = [Entry(name.encode(), data) for name, data in GOOD.items()]
AGAIN = "; save it again as JPEG, PNG or WEBP, or remove it"
LINK = (stat.S_IFLNK | 0o777) << 16
DEVICE = (stat.S_IFCHR | 0o666) << 16


@pytest.mark.parametrize(
    ("entry", "shown", "error"),
    [
        (
            Entry(b"../../x", CAT),
            "../../x",
            "the name climbs out of the archive with '..'; create the archive again",
        ),
        (
            Entry(b"cat/../../x", CAT),
            "cat/../../x",
            "the name climbs out of the archive with '..'; create the archive again",
        ),
        (
            Entry(b"/etc/passwd", CAT),
            "/etc/passwd",
            "the name is an absolute path; create the archive from inside the folder",
        ),
        (
            Entry(b"C:/cat/x", CAT),
            "C:/cat/x",
            "the name is an absolute path; create the archive from inside the folder",
        ),
        (
            Entry(b"C:\\cat\\x", CAT),
            "C:\\cat\\x",
            "the name contains a backslash; create the archive with '/' between folders",
        ),
        (
            Entry(b"cat/x\0.png", CAT),
            r"cat/x\x00.png",
            "the name contains a NUL byte; rename the file",
        ),
        (
            Entry(b"cat/\x1b[31m", b"x"),
            r"cat/\x1b[31m",
            f"not a readable JPEG, PNG or WEBP image{AGAIN}",
        ),
        (
            Entry(b"cat/link", b"/etc/passwd", external_attr=LINK),
            "cat/link",
            "the entry is a symbolic link; put the file itself into the archive",
        ),
        (
            Entry(b"cat/null", CAT, external_attr=DEVICE),
            "cat/null",
            "the entry is not a regular file; remove it",
        ),
        (
            Entry(b"cat/x", CAT, flags=1),
            "cat/x",
            "the entry is encrypted; create the archive without a password",
        ),
        (
            Entry(b"cat/x", CAT, method=zipfile.ZIP_LZMA),
            "cat/x",
            "the compression method is not supported; create the archive with 'deflate'",
        ),
        (
            Entry(b"cat/1.png", CAT),
            "cat/1.png",
            "the name is there twice; rename or remove one of the two",
        ),
        (
            Entry(b"cat/x", CAT, crc=1),
            "cat/x",
            "the entry is damaged, or its size is not the one declared; create the archive again",
        ),
        (
            Entry(b"cat/x", CAT, zipfile.ZIP_DEFLATED, declared_size=len(CAT) - 9),
            "cat/x",
            "the entry is damaged, or its size is not the one declared; create the archive again",
        ),
        (
            Entry(b"cat/x", CAT, zipfile.ZIP_DEFLATED, declared_size=len(CAT) + 9),
            "cat/x",
            "the entry's size is not the one declared; create the archive again",
        ),
        (
            Entry(b"cat/x", bytes(10_000_000), zipfile.ZIP_DEFLATED, declared_size=100),
            "cat/x",
            "the entry is damaged, or its size is not the one declared; create the archive again",
        ),
        (
            Entry(b"cat/x", CAT, declared_size=65 << 20),
            "cat/x",
            "the entry unpacks to more than 100 times its size, as no image does; remove it",
        ),
    ],
)
def test_a_harmful_entry_is_refused_and_named(entry: Entry, shown: str, error: str) -> None:
    # Ballast, so that the archive as a whole does not unpack to too many times its size.
    ballast = Entry(b"cat/ballast", bytes(700_000))
    outcome, _ = parse(raw_zip([*GOOD_ENTRIES, entry, ballast]), "a.zip")
    assert isinstance(outcome, FileErrors)
    found = [(e.entry, e.reason) for e in outcome.errors if e.entry != "cat/ballast"]
    assert found == [(shown, error)]


def test_an_image_file_that_is_too_large_is_not_read() -> None:
    entry = Entry(b"cat/x", CAT + bytes((64 << 20) + 1 - len(CAT)), crc=1)
    assert refused(raw_zip([entry]), "a.zip")[0] == (
        "entry 'cat/x': the image file is 67108865 bytes; at most 67108864 are allowed: "
        "scale it down"
    )


def test_a_bomb_is_refused_by_its_directory() -> None:
    bomb = Entry(b"cat/x", bytes(50_000_000), zipfile.ZIP_DEFLATED)
    data = raw_zip([*GOOD_ENTRIES, bomb])
    assert refused(data, "a.zip") == [
        "the zip unpacks to more than 100 times its size; upload images only"
    ]
    assert refused(data, "a.zip", limits(max_unpacked_bytes=49_999_999)) == [
        f"the zip unpacks to {50_000_000 + sum(map(len, GOOD.values()))} bytes; "
        "at most 49999999 are allowed: upload fewer or smaller images"
    ]


def test_overlapping_entries_are_refused() -> None:
    # Every other entry is the same bytes under another name.
    copies = [Entry(b"dog/%d" % i, GOOD_ENTRIES[0].data, offset=0) for i in range(9)]
    assert refused(raw_zip([*GOOD_ENTRIES, *copies]), "a.zip") == [
        "entry 'dog/0': the entry overlaps another one or the end; create the archive again"
    ]
    past = Entry(b"dog/9", CAT, offset=10_000_000)
    assert refused(raw_zip([*GOOD_ENTRIES, past]), "a.zip") == [
        "entry 'dog/9': the entry overlaps another one or the end; create the archive again"
    ]


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_a_zip_that_is_cut_off(cut: int) -> None:
    assert refused(image_zip(GOOD)[:-cut], "a.zip") == [
        "the zip is damaged or cut off; create the archive again"
    ]


def test_more_entries_than_allowed() -> None:
    assert refused(image_zip(GOOD), "a.zip", limits(max_zip_entries=3)) == [
        "the zip has more than 3 entries; upload fewer images"
    ]
    assert len(accepted(image_zip(GOOD), "a.zip", limits(max_zip_entries=4))) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_300_000_entries_take_little_memory(tmp_path: Path) -> None:
    small = raw_zip([Entry(b"a/b")])
    start, end = small.index(b"PK\x01\x02"), small.index(b"PK\x05\x06")
    record = small[start:end]
    directory = record * 300_000
    tail = small[end : end + 12] + len(directory).to_bytes(4, "little") + small[end + 16 :]
    path = tmp_path / "a.zip"
    path.write_bytes(small[:start] + directory + tail)

    mib, errors = parse_measured(path)

    assert errors == "the zip has more than 200000 entries; upload fewer images"
    assert mib < 60  # The directory's own 15 MB; as objects it would be some 150.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_entry_that_lies_about_its_size_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    liar = Entry(b"cat/x", bytes(300_000_000), zipfile.ZIP_DEFLATED, declared_size=5_000_000)
    path.write_bytes(raw_zip([*GOOD_ENTRIES, liar]))

    mib, errors = parse_measured(path)

    assert errors.startswith("entry 'cat/x': the entry is damaged, or its size is not the one")
    assert mib < 50
