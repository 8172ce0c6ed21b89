"""Parquet uploads."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

from core.datasets import DatasetManifest, Modality
from tests.unit.ingest_builders import (
    GOOD_ROWS,
    accepted,
    image,
    limits,
    parquet,
    parse,
    parse_measured,
    png_header_only,
    refused,
)
from training.ingest.limits import MAX_IMAGE_BYTES

TEXTS = [text for text, _ in GOOD_ROWS]
LABELS = [label for _, label in GOOD_ROWS]
IMAGES = [image(seed=i) for i in range(4)]
STRUCTS = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(IMAGES)]
GOOD = parquet({"text": TEXTS, "label": LABELS})


def class_label(*names: object) -> dict[str, str]:
    feature = {"names": names, "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}


def test_hugging_face_images_and_class_names() -> None:
    data = parquet({"image": STRUCTS, "label": [1, 0, 1, 0]}, metadata=class_label("cat", "dog"))
    outcome, normal_form = parse(data, "train.parquet")

    assert isinstance(outcome, DatasetManifest)
    assert outcome.modality is Modality.IMAGE
    assert outcome.counts == {"dog": 2, "cat": 2}
    table = pq.read_table(io.BytesIO(normal_form))
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.equals(pa.schema([("image", image_type), ("label", pa.string())]))
    assert table.column("image").to_pylist() == STRUCTS


def test_images_without_paths() -> None:
    structs = [{"bytes": data, "path": None} for data in IMAGES]
    assert accepted(parquet({"image": structs, "label": LABELS}), "a.parquet") == list(
        zip(structs, LABELS, strict=True)
    )


def test_bad_values_are_errors_at_their_row() -> None:
    not_utf8 = pa.array([b"a", b"b", b"c", b"\xff\xfe", b"e", b"f"]).view(pa.string())
    text = pa.concat_arrays([not_utf8, pa.array([None, "a" * 21, "a" * 200_000, "ok"])])
    label = pa.array(["x", "x", "x", "x", " ", None, "x" * 4000, "y", "y", "y"])
    assert refused(
        parquet({"text": text, "label": label}), "a.parquet", limits(max_text_chars=20)
    ) == [
        "line 4, column 'text': the value is not UTF-8; write it as UTF-8",
        "line 5, column 'label': the label is blank; fill it in or remove the row",
        "line 6, column 'label': the label is null; fill it in or remove the row",
        "line 7, column 'text': the text is null; fill it in or remove the row",
        "line 7, column 'label': the value is 4000 bytes long; shorten it to 200 characters",
        "line 8, column 'text': the text is 21 characters long; shorten it to 20",
        "line 9, column 'text': the value is 200000 bytes long; shorten it to 20 characters",
    ]


def test_bad_images_are_errors_at_their_row() -> None:
    rows = [
        None,
        {"bytes": None, "path": "/data/1.jpg"},
        {"bytes": b"hello", "path": None},
        {"bytes": image("JPEG", size=64)[:-300], "path": None},
        {"bytes": IMAGES[0], "path": "p" * 5000},
        {"bytes": png_header_only(600, 500), "path": None},
        *STRUCTS,
    ]
    data = parquet({"image": rows, "label": ["a", "b"] * 5})
    again = "; save it again as JPEG, PNG or WEBP, or remove it"
    assert refused(data, "a.parquet", limits(max_pixels=100_000)) == [
        "line 1, column 'image': there is no image; add its bytes or remove the row",
        "line 2, column 'image': the image has no bytes; "
        "embed the image files before writing the Parquet",
        f"line 3, column 'image': not a readable JPEG, PNG or WEBP image{again}",
        f"line 4, column 'image': image is damaged or truncated{again}",
        "line 5, column 'image': the path of the image: the value is 5000 bytes long; "
        "shorten it to 1024 characters",
        "line 6, column 'image': image is 600x500; at most 100000 pixels are allowed; "
        "scale it down",
    ]


def test_an_image_file_that_is_too_large() -> None:
    rows = [{"bytes": bytes(MAX_IMAGE_BYTES + 1), "path": None}, *STRUCTS]
    assert refused(parquet({"image": rows, "label": ["a", *LABELS]}), "a.parquet")[0] == (
        "line 1, column 'image': the image file is 67108865 bytes; at most 67108864 are allowed: "
        "scale it down"
    )


def test_files_that_are_cut_off_or_damaged() -> None:
    cut_off = ["the Parquet file is cut off; write or upload it again"]
    assert refused(GOOD[:-20], "a.parquet") == cut_off
    assert refused(b"PAR1", "a.parquet") == cut_off
    assert refused(GOOD[:-8] + b"\xff\xff\xff\x7fPAR1", "a.parquet") == [
        "the Parquet footer is too large; write fewer, larger row groups"
    ]
    assert refused(GOOD[:-200] + GOOD[-150:], "a.parquet") == [
        "the Parquet file is damaged; write it again"
    ]


def test_damage_in_a_page_is_found_by_its_checksum() -> None:
    buffer = io.BytesIO()
    table = pa.table({"text": TEXTS, "label": LABELS})
    pq.write_table(
        table, buffer, compression="none", use_dictionary=False, write_page_checksum=True
    )
    data = buffer.getvalue()
    assert accepted(data, "a.parquet") == GOOD_ROWS
    assert refused(data.replace(b"good day", b"good dax", 1), "a.parquet") == [
        "line 1: the Parquet file is damaged; write it again"
    ]


def test_an_encrypted_file() -> None:
    assert refused(b"PARE" + b"\0" * 50 + b"PARE", "a.parquet") == [
        "the Parquet file is encrypted; write it without encryption"
    ]


class _PlainKeys(encryption.KmsClient):
    def __init__(self, config: object) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, master: str) -> bytes:
        return base64.b64encode(key)


@pytest.mark.parametrize(("plain_footer", "where"), [(False, ""), (True, "line 1: ")])
def test_encrypted_columns(plain_footer: bool, where: str) -> None:
    properties = encryption.CryptoFactory(_PlainKeys).file_encryption_properties(
        encryption.KmsConnectionConfig(),
        encryption.EncryptionConfiguration(
            footer_key="f", column_keys={"c": ["text"]}, plaintext_footer=plain_footer
        ),
    )
    table = pa.table({"text": TEXTS, "label": LABELS})
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    assert refused(buffer.getvalue(), "a.parquet") == [
        f"{where}the Parquet file is encrypted; write it without encryption"
    ]


def test_no_rows() -> None:
    data = parquet({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())})
    assert refused(data, "a.parquet") == [
        "the file has no rows; at least 2 classes of 2 rows are needed"
    ]


def test_too_many_rows_are_refused_by_the_footer() -> None:
    data = parquet({"text": ["", *TEXTS], "label": ["", *LABELS]})
    assert refused(data, "a.parquet", limits(max_rows=4)) == [
        "line 5: there are more than 4 rows; upload fewer of them"
    ]


def test_what_unpacks_to_too_much_is_refused_by_the_footer() -> None:
    data = parquet({"text": ["a" * 10_000] * 4, "label": LABELS})
    assert refused(data, "a.parquet", limits(max_unpacked_bytes=5000)) == [
        "the rows unpack to more than 5000 bytes; upload fewer or smaller ones"
    ]


def test_a_text_repeated_by_reference_counts_each_time() -> None:
    data = parquet({"text": ["a" * 1000] * 100, "label": ["x", "y"] * 50})
    assert refused(data, "a.parquet", limits(max_unpacked_bytes=50_000)) == [
        "line 50: the rows unpack to more than 50000 bytes; upload fewer or smaller ones"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("column", "store_schema"), [("text", True), ("text", False), ("image", False)]
)
def test_a_bomb_of_references_takes_little_memory(
    tmp_path: Path, column: str, store_schema: bool
) -> None:
    value = b"a" * 8_000_000
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 50_000, pa.int32()), [value])
    items: object = values.cast(pa.dictionary(pa.int32(), pa.string()))
    if column == "image":
        paths = pa.array(["p"] * 50_000)
        items = pa.StructArray.from_arrays([values, paths], ["bytes", "path"])
    path = tmp_path / "train.parquet"
    table = pa.table({column: items, "label": ["a", "b"] * 25_000})
    pq.write_table(table, path, compression="zstd", store_schema=store_schema)
    assert path.stat().st_size < 50_000

    mib, errors = parse_measured(path)

    assert errors.startswith(f"line 1, column '{column}': ")
    assert mib < 150  # The value stands there 50,000 times.


def test_a_dictionary_in_a_huge_row_group_is_refused() -> None:
    values = pa.array([f"{i} " + "a" * 1_000_000 for i in range(140)]).dictionary_encode()
    labels = pa.array(["x", "y"] * 70)
    assert refused(parquet({"text": values, "label": labels}), "a.parquet") == [
        "column 'text': a dictionary column is in a row group of more than 134217728 bytes; "
        "cast the column to its value type"
    ]
