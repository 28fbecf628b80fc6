"""POST /v1/load_lora_adapter_from_tensors: an adapter in the body of a request, for trainers that publish every few
seconds. It is a form with the fields lora_name, load_inplace, pinned, config (adapter_config.json) and weights
(safetensors), and becomes a folder below --lora-upload-root, which is then loaded as any other.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from aiohttp import BodyPartReader, web

from inlaid.server.admin import finish, load_folder
from inlaid.server.completions import answer
from inlaid.server.errors import BadRequest, BrokenBody, Forbidden, TooLarge, TooSlow
from inlaid.server.protocol.sglang import LoadResult
from inlaid.server.service import SERVICE, Service

_MAX_CONFIG = 1 << 20
_FILES: Mapping[str, str] = MappingProxyType({"config": "adapter_config.json", "weights": "adapter_model.safetensors"})
_TEXTS = ("lora_name", "load_inplace", "pinned")
_KEPT = 2  # folders of one name: requests still run on the weights before
_PIECE = 1 << 18


async def load_adapter_from_tensors(request: web.Request) -> web.Response:
    """Load an adapter whose files the request's form holds; with load_inplace it may replace one of that name."""
    service = request.app[SERVICE]
    root = service.config.lora_upload_root
    if not root or not service.config.allow_runtime_lora:
        raise Forbidden("adapters in bodies are not taken; start with --allow-runtime-lora and --lora-upload-root")
    if not request.content_type.startswith("multipart/"):
        raise BadRequest("send a form: lora_name, config (adapter_config.json) and weights (safetensors)")
    folder = Path(root).expanduser() / f".{secrets.token_hex(8)}.partial"
    await asyncio.to_thread(folder.mkdir, parents=True)
    try:
        given = await _received(request, folder)
        name = given.get("lora_name", "")
        kept = folder.with_name(f"{_key(name)}-{secrets.token_hex(8)}")
        await asyncio.to_thread(folder.rename, kept)
        try:
            pinned = _flag(given, "pinned")
            loading = load_folder(request, name, kept, bool(_flag(given, "load_inplace")), pinned)
            await finish(request, loading)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, kept, ignore_errors=True)
            raise
        await asyncio.to_thread(_forget_older, kept)
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    return answer(LoadResult(loaded_adapters={name: str(kept)}))


async def _received(request: web.Request, folder: Path) -> dict[str, str]:
    """Write the form's files into a folder and return its other fields."""
    service = request.app[SERVICE]
    given: dict[str, str] = {}
    seconds = service.config.body_timeout
    try:
        form = await request.multipart()
        while (part := await asyncio.wait_for(form.next(), seconds or None)) is not None:
            name = part.name if isinstance(part, BodyPartReader) else None
            if not isinstance(part, BodyPartReader) or name not in (*_FILES, *_TEXTS) or name in given:
                raise BadRequest(
                    f"the form has a field {name!r}, unknown or twice; it has {_TEXTS} and {tuple(_FILES)}"
                )
            given[name] = await _field(service, part, name, folder)
    except asyncio.TimeoutError:
        raise TooSlow(f"the form did not arrive within {seconds:g} s a part (--body-timeout)") from None
    except (ValueError, web.RequestPayloadError) as error:
        raise BrokenBody(f"the form cannot be read: {error}") from error
    missing = [name for name in ("lora_name", *_FILES) if name not in given]
    if missing:
        raise BadRequest(f"the form has no {', '.join(missing)}", missing[0])
    return given


async def _field(service: Service, part: BodyPartReader, name: str, folder: Path) -> str:
    """Return a field's text, or write the file that it is. TooLarge: it is beyond its bound."""
    most = int(service.config.max_upload_mib * 2**20) if name == "weights" else _MAX_CONFIG
    seconds = service.config.body_timeout or None
    if name in _TEXTS:
        text = await asyncio.wait_for(part.read(decode=True), seconds)
        return text.decode("utf-8", "replace")[:1024]
    size = 0
    with (folder / _FILES[name]).open("wb") as file:
        while piece := await asyncio.wait_for(part.read_chunk(_PIECE), seconds):
            size += len(piece)
            if size > most:
                raise TooLarge(f"{name} is larger than {most} bytes (--max-upload-mib for the weights)", name)
            await asyncio.to_thread(file.write, piece)
    return ""


def _flag(given: Mapping[str, str], name: str) -> bool | None:
    text = given.get(name, "").lower()
    if text not in ("", "true", "false", "1", "0"):
        raise BadRequest(f"{name} is {text!r}; it can be true or false", name)
    return None if not text else text in ("true", "1")


def _key(name: str) -> str:
    """Return what folders of a name begin with: names may have characters that files cannot."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _forget_older(kept: Path) -> None:
    """Remove the folders of a name that no request can run on any more."""
    key = kept.name.partition("-")[0]
    of_name = sorted(kept.parent.glob(f"{key}-*"), key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
    for folder in of_name[_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
