"""The files of the page, read once, with the headers that keep a browser from asking any other host for anything."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

FOLDER = Path(__file__).with_name("static")

_TYPES: Mapping[str, str] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".mjs": "text/javascript; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",  # asked again with the ETag: a page never mixes two releases
        "Vary": "Accept-Encoding",
    }
)


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent."""

    kind: str
    plain: bytes
    packed: bytes
    tag: str


def read_files(folder: Path = FOLDER) -> dict[str, PageFile]:
    """Read all files of the page, by their path below the folder."""
    files: dict[str, PageFile] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TYPES:
            plain = path.read_bytes()
            tag = f'"{hashlib.sha256(plain).hexdigest()[:20]}"'
            packed = gzip.compress(plain, 9, mtime=0)
            files[path.relative_to(folder).as_posix()] = PageFile(_TYPES[path.suffix], plain, packed, tag)
    return files
