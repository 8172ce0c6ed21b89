"""Zips of images in class folders."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from core.datasets import DatasetManifest, FileErrors
from tests.unit.ingest_builders import (
    Entry,
    accepted,
    image,
    image_zip,
    limits,
    parse,
    parse_measured,
    png_header_only,
    raw_zip,
    refused,
)

CAT, CAT_2, DOG, DOG_2 = (image(seed=i) for i in range(4))
GOOD = {"cat/1.png": CAT, "cat/2.png": CAT_2, "dog/1.png": DOG, "dog/2.png": DOG_2}
GOOD_ENTRIES = [Entry(name.encode(), data) for name, data in GOOD.items()]
AGAIN = "; save it again as JPEG, PNG or WEBP, or remove it"
LAYOUT = "put each image at <class>/<file>"


def labels(files: dict[str, bytes]) -> list[str]:
    return [label for _, label in accepted(image_zip(files), "a.zip")]


def test_class_folders_in_the_order_of_the_archive() -> None:
    assert accepted(image_zip(GOOD), "a.zip") == [
        ({"bytes": data, "path": name}, name[:3]) for name, data in GOOD.items()
    ]


def test_jpeg_png_and_webp() -> None:
    forms = {"a/1.jpg": "JPEG", "a/2": "PNG", "b/3.webp": "WEBP", "b/4.txt": "JPEG"}
    assert labels({name: image(form) for name, form in forms.items()}) == ["a", "a", "b", "b"]


def test_one_common_folder_and_unicode_and_spaces() -> None:
    files = {"töp/ größe /1": CAT, "töp/ größe /2": CAT, "töp/犬/1": CAT, "töp/犬/2": CAT}
    assert labels(files) == ["größe", "größe", "犬", "犬"]


def test_what_file_managers_leave_behind_is_passed_over() -> None:
    files = {
        "pets/": b"", "pets/cat/": b"", "__MACOSX/pets/cat/._1.png": b"x", ".DS_Store": b"x",
        "pets/.DS_Store": b"x", "pets/cat/.hidden": b"x", "pets/dog/Thumbs.db": b"x",
        "pets/.git/config": b"x", **{f"pets/{name}": data for name, data in GOOD.items()},
    }  # fmt: skip
    assert labels(files) == ["cat", "cat", "dog", "dog"]


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("stray.png", CAT, f"the file is in no class folder; {LAYOUT}"),
        (
            "cat/kitten/3.png",
            CAT,
            f"the file is too many folders deep; {LAYOUT}, under at most one common folder",
        ),
        ("cat/notes.txt", b"hello", f"not a readable JPEG, PNG or WEBP image{AGAIN}"),
        ("cat/empty.png", b"", f"not a readable JPEG, PNG or WEBP image{AGAIN}"),
        ("cat/a.gif", image("GIF"), f"not a readable JPEG, PNG or WEBP image{AGAIN}"),
        ("cat/cut.jpg", image("JPEG", size=64)[:-300], f"image is damaged or truncated{AGAIN}"),
        ("cat/cut.png", image(size=64)[:-300], f"image is damaged or truncated{AGAIN}"),
        (
            "cat/more.zip",
            image_zip(GOOD),
            "the entry is an archive itself; unpack it and add its images",
        ),
        (
            "cat/big.png",
            png_header_only(600, 500),
            "image is 600x500; at most 100000 pixels are allowed; scale it down",
        ),
        ("  /3.png", CAT, "the label is blank; fill it in or remove the row"),
        (
            f"{'c' * 201}/3.png",
            CAT,
            f"the label '{'c' * 40}…' is 201 characters long; shorten it to 200",
        ),
    ],
)
def test_a_bad_file_is_an_error_at_its_entry(name: str, data: bytes, error: str) -> None:
    archive = image_zip({**GOOD, name: data})
    outcome, _ = parse(archive, "a.zip", limits(max_pixels=100_000))
    assert isinstance(outcome, FileErrors)
    shown = name if len(name) <= 200 else name[:200] + "…"
    assert [(e.entry, e.line, e.column, e.reason) for e in outcome.errors] == [
        (shown, None, None, error)
    ]


def test_all_bad_entries_are_reported_in_the_order_of_the_archive() -> None:
    files = {"z.png": CAT, **GOOD, "cat/b.txt": b"x", "cat/a.txt": b"x"}
    outcome, _ = parse(image_zip(files), "a.zip")
    assert isinstance(outcome, FileErrors)
    assert [error.entry for error in outcome.errors] == ["z.png", "cat/b.txt", "cat/a.txt"]


def test_two_trees_in_one_zip() -> None:
    files = {f"{part}/{name}": data for part in ("train", "test") for name, data in GOOD.items()}
    errors = refused(image_zip(files), "a.zip")
    assert len(errors) == 8
    assert all("too many folders deep" in error for error in errors)


def test_one_folder_is_one_class() -> None:
    assert refused(image_zip({"cat/1.png": CAT, "cat/2.png": CAT}), "a.zip") == [
        "all 2 rows have the label 'cat'; add rows of at least one other class"
    ]


def test_nothing_in_the_zip() -> None:
    assert refused(image_zip({}), "a.zip") == [
        "the file has no rows; at least 2 classes of 2 rows are needed"
    ]


def test_an_excel_workbook() -> None:
    data = image_zip({"[Content_Types].xml": b"<x/>", "xl/workbook.xml": b"<x/>"})
    assert refused(data, "train.csv") == ["the file is an Office document; save it as 'CSV UTF-8'"]


def test_a_name_that_is_too_long() -> None:
    found = refused(image_zip({**GOOD, f"cat/{'n' * 1100}": CAT}), "a.zip")
    assert found == [
        f"entry 'cat/{'n' * 196}…': the path of the image is longer than 1024 characters; "
        "shorten it"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_13000_by_13000_png_is_refused_without_decoding_it(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    bomb = png_header_only(13_000, 13_000)
    assert len(bomb) < 600_000
    # Stored: the picture itself is what unpacks, not the zip.
    path.write_bytes(raw_zip([*GOOD_ENTRIES, Entry(b"dog/x.png", bomb)]))

    mib, errors = parse_measured(path)

    assert errors == (
        "entry 'dog/x.png': image is 13000x13000; at most 25000000 pixels are allowed; "
        "scale it down"
    )
    assert mib < 50


def test_a_few_images_that_cannot_be_read_are_left_out_by_name() -> None:
    """One in a hundred, and not one more; what else is wrong is an error as ever."""
    files = {f"{'cat' if n % 2 else 'dog'}/{n}.png": CAT for n in range(199)}
    damaged = image(size=64)[:-300]
    one = {**files, "cat/cut.png": damaged}
    outcome, _ = parse(image_zip(one), "a.zip")
    assert isinstance(outcome, DatasetManifest)
    assert (outcome.rows, outcome.counts) == (199, {"cat": 99, "dog": 100})
    assert len(accepted(image_zip(one), "a.zip")) == 199
    assert [error.entry for error in outcome.unreadable] == ["cat/cut.png"]
    three = one | {"dog/notes.txt": b"hello", "cat/cut2.png": damaged}
    outcome, _ = parse(image_zip(three), "a.zip")
    assert isinstance(outcome, FileErrors)
    assert [error.entry for error in outcome.errors] == [
        "cat/cut.png", "dog/notes.txt", "cat/cut2.png",
    ]  # fmt: skip
    outcome, _ = parse(image_zip(one | {"stray.png": CAT}), "a.zip")
    assert isinstance(outcome, FileErrors)
    assert [error.entry for error in outcome.errors] == ["cat/cut.png", "stray.png"]
    # A class of which nothing is left is not there.
    outcome, _ = parse(image_zip({**files, "owl/1.png": CAT, "owl/2.png": damaged}), "a.zip")
    assert isinstance(outcome, FileErrors)
    assert "'owl'" in outcome.summary()
