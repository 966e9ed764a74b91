"""The format of sha256sum(1): a digest and a name per line. Pure.

    <64 hex digits>  name          text
    <64 hex digits> *name          binary
    SHA256 (name) = <64 hex>       with --tag
    \\<64 hex digits>  na\\nme      a name with backslashes or newlines

Blank lines and lines that begin with # are passed over. Anything else voids the whole file: a manifest that was cut
off or tampered with is no manifest. So do names that lead out of the folder of the file.
"""

from __future__ import annotations

import re

_SUM_LINE = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_TAGGED_LINE = re.compile(rb"(\\?)SHA256 \((.+)\) = ([0-9a-fA-F]{64})", re.DOTALL)
_BARE_DIGEST = re.compile(rb"\s*([0-9a-fA-F]{64})\s*")
_ESCAPES = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}


def parse_sums(text: bytes) -> dict[str, bytes]:
    """Digests by name, relative to the folder of the file. Raises ValueError."""
    found: dict[str, bytes] = {}
    for number, line in enumerate(text.split(b"\n"), 1):
        line = line.removesuffix(b"\r")
        if not line.strip() or line.startswith(b"#"):
            continue
        try:
            name, digest = _parse_line(line)
            add_digest(found, normalize_name(name), digest)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return found


def parse_single(text: bytes, name: str) -> bytes:
    """The digest in a file that is about the file `name` alone: bare, or one line as above, whose name may have
    folders before it. Raises ValueError."""
    bare = _BARE_DIGEST.fullmatch(text)
    if bare:
        return bytes.fromhex(bare[1].decode("ascii"))
    lines = [line.removesuffix(b"\r") for line in text.split(b"\n") if line.strip()]
    if len(lines) != 1:
        raise ValueError(f"{len(lines)} lines, where there should be one digest")
    said, digest = _parse_line(lines[0])
    if said.rpartition("/")[2] != name:
        raise ValueError(f"it is about {said!r}")
    return digest


def normalize_name(name: str) -> str:
    """A name below a folder, without `./` before it. Raises ValueError for one that may lead anywhere else."""
    while name.startswith("./"):
        name = name[2:]
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name[:200]!r} is no name below this folder")
    return name


def add_digest(found: dict[str, bytes], name: str, digest: bytes) -> None:
    """Add an entry. Raises ValueError when there is another one for the same name."""
    if found.setdefault(name, digest) != digest:
        raise ValueError(f"two digests for {name[:200]!r}")


def _parse_line(line: bytes) -> tuple[str, bytes]:
    if match := _SUM_LINE.fullmatch(line):
        escaped, digest, name = match.groups()
    elif match := _TAGGED_LINE.fullmatch(line):
        escaped, name, digest = match.groups()
    else:
        raise ValueError("not a line of sha256sum")
    if escaped:
        name = re.sub(rb"\\.", lambda found: _ESCAPES.get(found[0], found[0]), name)
    return name.decode("utf-8", "surrogateescape"), bytes.fromhex(digest.decode("ascii"))
