"""Access: keys, the tenant that a request is charged to, and the folders that adapters may come from."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from inlaid.config import ConfigError, ServerConfig
from inlaid.server.errors import BadRequest, Forbidden, Unauthorized

TENANT_HEADER = "X-Tenant"
_MAX_TENANT_CHARS = 128


class Keys:
    """Inference keys and the admin key. Only their hashes are kept, and compared in constant time."""

    def __init__(self, inference: Sequence[str], admin: str | None) -> None:
        if admin is not None and admin in inference:
            raise ConfigError("the admin key is also an inference key; choose another")
        if admin == "" or "" in inference:
            raise ConfigError("a key is empty; give one with at least one character, or none at all")
        self._inference = [_hash(key) for key in inference]
        self._admin = None if admin is None else _hash(admin)

    @classmethod
    def of(cls, config: ServerConfig, environment: Mapping[str, str]) -> Keys:
        """Read the keys from the configuration, else from the environment."""
        listed = environment.get("INLAID_API_KEY", "")
        inference = config.api_key or tuple(filter(None, (key.strip() for key in listed.split(","))))
        return cls(inference, config.admin_key or environment.get("INLAID_ADMIN_KEY") or None)

    @property
    def has_admin(self) -> bool:
        return self._admin is not None

    def check_inference(self, headers: Mapping[str, str]) -> None:
        """Raise Unauthorized unless no key is needed or a valid one is there; the admin key is valid here too."""
        if self._inference and not self._matches(bearer(headers), [*self._inference, *self._admins()]):
            raise Unauthorized("a valid API key is needed: send it as 'Authorization: Bearer KEY'")

    def check_admin(self, headers: Mapping[str, str]) -> None:
        """Raise Forbidden where there is no admin key, and Unauthorized unless the request carries it."""
        if self._admin is None:
            raise Forbidden("this needs an admin key, and the server was started without one (--admin-key)")
        if not self._matches(bearer(headers), [self._admin]):
            raise Unauthorized("the admin key is needed: send it as 'Authorization: Bearer KEY'")

    def opens_paths(self, headers: Mapping[str, str]) -> bool:
        """Tell whether a client may see paths on the server's disk: with the admin key, or where no key is needed for
        anything."""
        return self._matches(bearer(headers), self._admins()) if self._inference or self._admin else True

    def _admins(self) -> list[bytes]:
        return [] if self._admin is None else [self._admin]

    def _matches(self, key: str, known: Sequence[bytes]) -> bool:
        given = _hash(key)
        matches = [hmac.compare_digest(given, one) for one in known]  # all of them: time must not tell which
        return any(matches)


def bearer(headers: Mapping[str, str]) -> str:
    """Return the key that a request carries, or an empty string."""
    kind, _, key = headers.get("Authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def tenant(kind: str, headers: Mapping[str, str], user: str | None, adapter: str | None) -> str:
    """Return the tenant that the ledger charges. A key is shown as the beginning of its hash."""
    if kind == "adapter":
        return adapter or ""
    if kind == "user":
        return (user or "")[:_MAX_TENANT_CHARS]
    if kind == "header":
        return _utf8(TENANT_HEADER, headers.get(TENANT_HEADER, ""))[:_MAX_TENANT_CHARS]
    key = bearer(headers)
    return f"key-{_hash(key).hex()[:12]}" if key else ""


def _utf8(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"the header {name} is not valid UTF-8", name) from None
    return value


class AllowedFolders:
    """The roots that adapters may be loaded from while serving."""

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = [_root(root) for root in roots]

    def resolve(self, path: str) -> Path:
        """Return the real folder that a client's path names. Forbidden when it, or a file in it, is outside the roots.
        A path that does not exist is answered like a forbidden one, so that no client can explore the disk."""
        outside = Forbidden("lora_path must be a folder inside one of the server's --lora-root folders", "lora_path")
        if "\0" in path or ".." in Path(path).parts:
            raise outside
        for root in self.roots:
            try:
                folder = (root / path).resolve(strict=True)  # an absolute path replaces the root
                inside = [folder, *(entry.resolve() for entry in os_entries(folder))]
            except (OSError, RuntimeError):
                continue
            if all(place.is_relative_to(root) for place in inside):
                return folder
        raise outside


def os_entries(folder: Path) -> list[Path]:
    """List the files of a folder; OSError when it is none."""
    return [Path(entry.path) for entry in os.scandir(folder)]


def _root(root: str) -> Path:
    try:
        return Path(root).expanduser().resolve(strict=True)
    except OSError as error:
        raise ConfigError(f"--lora-root {root} cannot be used: {error.strerror}") from error


def check_config(config: ServerConfig, keys: Keys) -> None:
    """Refuse to start with loading at run time open to everybody or from everywhere."""
    if not config.allow_runtime_lora:
        return
    if not keys.has_admin:
        raise ConfigError("--allow-runtime-lora needs --admin-key, apart from the inference keys")
    if not config.lora_root:
        raise ConfigError("--allow-runtime-lora needs --lora-root, the folders that adapters may be loaded from")
