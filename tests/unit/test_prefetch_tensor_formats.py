"""Where tensors lie: real files, and files that lie."""

from __future__ import annotations

import io
import json
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fusecache.prefetch.models import tensor_formats
from fusecache.prefetch.models.tensor_formats import MAX_HEADER_BYTES, FormatError, TensorLayout


def layout(name: str, data: bytes, size: int | None = None) -> TensorLayout:
    """The layout that is found, looking only at what is asked for; a file of `size` bytes has zeros at its end."""
    size = len(data) if size is None else size
    questions = tensor_formats.parse_layout(name, size)
    asked = 0
    try:
        offset, length = next(questions)
        while True:
            assert 0 <= offset <= offset + length <= size
            asked += length
            assert asked <= 3 * MAX_HEADER_BYTES
            offset, length = questions.send(data[offset : offset + length].ljust(length, b"\0"))
    except StopIteration as stop:
        found: TensorLayout = stop.value
        return found


def safetensors(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def gguf(tensors: int = 3, version: int = 3, words: int = 1000) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", version, tensors, 3)
    out += text("general.alignment") + struct.pack("<II", 4, 64)
    out += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, words)
    out += b"".join(text(f"word{number}") for number in range(words))
    out += (
        text("nested")
        + struct.pack("<IIQ", 9, 9, 2)
        + struct.pack("<IQ", 0, 1)
        + b"x"
        + struct.pack("<IQ", 5, 0)
    )
    for number in range(tensors):
        out += text(f"t{number}") + struct.pack("<IQIQ", 1, 250, 0, number * 1024)
    out += b"\0" * (-len(out) % 64)
    return out + b"\1" * 1024 * (tensors - 1) + b"\1" * 1000


def archive(method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        file.writestr("m/data.pkl", b"p" * 100)
        for number in range(4):
            file.writestr(f"m/data/{number}", bytes([number]) * 100_000)
        file.writestr("m/version", b"3")
    return out.getvalue()


def test_the_tensors_of_safetensors() -> None:
    data = save({"a": np.zeros(100_000, np.uint8), "b": np.ones(50_000, np.uint8)})
    found = layout("m.safetensors", data)
    (length,) = struct.unpack_from("<Q", data)
    assert found.header_ranges == ((0, 8 + length),)
    assert found.tensor_ranges == ((8 + length, 8 + length + 100_000), (8 + length + 100_000, len(data)))


def test_a_header_longer_than_the_first_look() -> None:
    data = save({f"tensor-with-a-long-name-{n}": np.zeros(10, np.uint8) for n in range(2000)})
    assert len(layout("m.safetensors", data).tensor_ranges) == 2000


def test_the_tensors_of_gguf() -> None:
    for words in (10, 30_000):
        data = gguf(words=words)
        found = layout("m.gguf", data)
        start = found.header_ranges[0][1]
        assert data[start] == 1
        assert found.tensor_ranges == (
            (start, start + 1024),
            (start + 1024, start + 2048),
            (start + 2048, len(data)),
        )


def test_the_entries_of_an_archive() -> None:
    data = archive()
    found = layout("m.bin", data)
    assert len(found.tensor_ranges) == 4
    for number, (start, stop) in enumerate(found.tensor_ranges):
        assert bytes([number]) * 100_000 in data[start:stop]
    assert b"p" * 100 in data[slice(*found.header_ranges[0])]
    assert found.header_ranges[-1][1] == len(data)


@pytest.mark.parametrize(
    ("name", "data", "size"),
    [
        ("m.safetensors", b"", None),
        ("m.safetensors", struct.pack("<Q", 100 << 20) + b"{}", 200 << 20),  # a header of 100 MB
        ("m.safetensors", struct.pack("<Q", 1 << 63) + b"{}", None),
        ("m.safetensors", safetensors({"a": {"data_offsets": [0, 10]}}), None),  # truncated
        ("m.safetensors", safetensors({"a": {"data_offsets": [0, 9]}, "b": {"data_offsets": [5, 10]}}), 1000),
        ("m.safetensors", safetensors({"a": {"data_offsets": [-5, 9]}}), 1000),
        ("m.safetensors", safetensors({"a": {"data_offsets": [0, "9"]}}), 1000),
        ("m.safetensors", safetensors({"a": {"data_offsets": [True, 9]}}), 1000),
        ("m.safetensors", safetensors({"a": 3}), 1000),
        ("m.safetensors", safetensors([1]), 1000),
        ("m.safetensors", safetensors(b"{"), 1000),
        ("m.safetensors", safetensors(b"\xff\xfe{}"), 1000),
        ("m.safetensors", safetensors(b"[" * 200_000), 1 << 20),  # deep
        ("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), 1000),
        ("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1 << 62), 1000),
        ("m.gguf", gguf()[:500], None),
        ("m.gguf", b"NOPE" + gguf()[4:], None),
        ("m.gguf", gguf(version=1), None),
        ("m.bin", b"\x80\x02}q\x00." * 100, None),  # a pickle, as torch.save wrote it long ago
        ("m.bin", archive(zipfile.ZIP_DEFLATED), None),
        ("m.bin", archive()[1000:], None),
        ("m.bin", archive()[:-30], None),
        ("m.pt", b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 9, 9, 0xFFFFFF0, 0, 0), None),
        ("m.txt", b"", None),
    ],
)
def test_files_that_lie_have_no_layout(name: str, data: bytes, size: int | None) -> None:
    with pytest.raises(FormatError):
        layout(name, data, size)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        [
            ("m.safetensors", save({"a": np.zeros(99, np.uint8)})),
            ("m.gguf", gguf(words=3)),
            ("m.pth", archive()),
        ]
    ),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=9)), max_size=4),
    st.integers(0, 1 << 20),
)
def test_whatever_is_in_a_file_it_has_a_layout_within_it_or_none(
    sample: tuple[str, bytes], edits: list[tuple[int, bytes]], cut: int
) -> None:
    name, good = sample
    data = bytearray(good)
    for at, new in edits:
        at %= len(good)
        data[at : at + len(new)] = new
    if cut % 3 == 0:
        del data[cut % len(good) :]
    try:
        found = layout(name, bytes(data))
    except FormatError:
        return
    at = 0
    for start, stop in found.tensor_ranges:
        assert at <= start < stop <= len(data)
        at = stop
    assert all(0 <= start <= stop <= len(data) for start, stop in found.header_ranges)
