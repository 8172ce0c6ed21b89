from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from cli.datasets import find_files, find_source, pack_folder, packed
from cli.failures import CommandError
from core.datasets import Modality


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "Clothing Photos"
    for name in ("shirt/b.jpg", "shirt/a.PNG", "shoe/c.webp", "shoe/.hidden.jpg", ".cache/d.jpg"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def test_every_file_is_packed_but_hidden_ones(folder: Path, tmp_path: Path) -> None:
    """The service names what cannot be trained on; what is left out here nobody hears of."""
    elsewhere = tmp_path / "elsewhere"
    for path in (
        folder / "shoe" / "d.gif", folder / "shoe" / "new" / "e.jpg", folder / "top.jpg",
        elsewhere / "f.jpg",
    ):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "linked").symlink_to(elsewhere)
    found = [path.relative_to(folder).as_posix() for path in find_files(folder)]
    assert found == [
        "linked/f.jpg", "shirt/a.PNG", "shirt/b.jpg", "shoe/c.webp", "shoe/d.gif", "shoe/new/e.jpg",
        "top.jpg",
    ]  # fmt: skip
    (folder / "shoe" / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(CommandError, match=r"broken\.jpg is not a file"):
        find_files(folder)


def test_a_folder_becomes_a_stored_zip_of_class_folders(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.zip"
    assert pack_folder(folder, target) == 3
    with zipfile.ZipFile(target) as archive:
        assert archive.namelist() == ["shirt/a.PNG", "shirt/b.jpg", "shoe/c.webp"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("shirt/b.jpg") == b"shirt/b.jpg"


def test_a_folder_is_bounded_in_bytes_and_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="more than 10 bytes"):
        pack_folder(folder, tmp_path / "out.zip", max_bytes=10)
    with pytest.raises(CommandError, match="more than 2 files"):
        find_files(folder, max_files=2)
    assert not (tmp_path / "out.zip").exists()


def test_a_folder_without_images_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="<class>/<image>"):
        find_files(tmp_path)


def test_the_zip_of_a_folder_is_removed_after_the_upload(folder: Path) -> None:
    with packed(find_source(folder)) as path:
        assert path.name == "clothing-photos.zip"
        assert zipfile.is_zipfile(path)
    assert not path.exists()


def test_a_file_is_uploaded_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n")
    with packed(find_source(path)) as uploaded:
        assert uploaded == path
    assert path.exists()


@pytest.mark.parametrize(
    ("name", "modality", "backbone"),
    [
        ("a.csv", Modality.TEXT, "minilm"),
        ("a.JSONL", Modality.TEXT, "minilm"),
        ("a.parquet", Modality.TEXT, "minilm"),
        ("a.zip", Modality.IMAGE, "efficientnet-lite0"),
    ],
)
def test_the_kind_of_file_suggests_the_backbone(
    tmp_path: Path, name: str, modality: Modality, backbone: str
) -> None:
    (tmp_path / name).touch()
    source = find_source(tmp_path / name)
    assert (source.modality, source.default_backbone) == (modality, backbone)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Support Intents.csv", "support-intents"), ("__x.csv", "x"), ("日本.csv", "model")],
)
def test_the_file_name_suggests_the_model_name(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / name).touch()
    assert find_source(tmp_path / name).default_name == expected


def test_what_is_not_a_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(CommandError, match="not a data set"):
        find_source(tmp_path / "a.txt")
    with pytest.raises(CommandError, match="does not exist"):
        find_source(tmp_path / "b.csv")
