"""Access: keys, the tenant that a request is charged to, and the folders that adapters may come from."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from inlaid.config import ConfigError, ServerConfig
from inlaid.server.errors import BadRequest, Forbidden, Unauthorized

log = logging.getLogger(__name__)

TENANT_HEADER = "X-Tenant"
_MAX_TENANT_CHARS = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FAIR = frozenset({"vtc", "lcf", "drr", "rpm"})  # policies that weigh tenants


class Keys:
    """Inference keys and the admin key. Only their hashes are kept, and compared in constant time.

    An inference key is written KEY or NAME=KEY. The tenant of a key is its name, or the beginning of its hash.
    """

    def __init__(self, inference: Sequence[str], admin: str | None) -> None:
        named = [_named(text) for text in inference]
        if admin is not None and admin in (key for _, key in named):
            raise ConfigError("the admin key is also an inference key; choose another")
        if admin == "" or any(not key for _, key in named):
            raise ConfigError("a key is empty; give one with at least one character, or none at all")
        self._tenants: dict[bytes, str] = {}
        for name, key in named:
            tenant = name or _unnamed(key)
            if self._tenants.setdefault(_hash(key), tenant) != tenant:
                raise ConfigError(
                    f"the key of {tenant!r} is also that of {self._tenants[_hash(key)]!r}; give each its own"
                )
        self._inference = list(self._tenants)
        self._admin = None if admin is None else _hash(admin)

    @classmethod
    def of(cls, config: ServerConfig, environment: Mapping[str, str]) -> Keys:
        """Read the keys from the configuration and its file, else from the environment."""
        listed = environment.get("INLAID_API_KEY", "").split(",")
        given = (*config.api_key, *_lines(config.api_key_file))
        inference = given or tuple(filter(None, (key.strip() for key in listed)))
        return cls(inference, config.admin_key or environment.get("INLAID_ADMIN_KEY") or None)

    @property
    def has_admin(self) -> bool:
        return self._admin is not None

    @property
    def tenants(self) -> frozenset[str]:
        """The tenants of all inference keys; empty where no key is needed."""
        return frozenset(self._tenants.values())

    def tenant(self, headers: Mapping[str, str]) -> str:
        """Return the tenant of the key that a request carries, or an empty string."""
        key = bearer(headers)
        return (self._tenants.get(_hash(key)) or _unnamed(key)) if key else ""

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
    """Return the key that a request carries, as OpenAI's or as Anthropic's clients send it, or an empty string."""
    kind, _, key = headers.get("Authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "").strip()


def _named(text: str) -> tuple[str, str]:
    """Return the name and the key of NAME=KEY; the name is empty for a KEY alone, which may end in = as base64 does."""
    name, _, key = text.partition("=")
    return (name, key) if _NAME.fullmatch(name) and key.strip("=") else ("", text)


def _unnamed(key: str) -> str:
    return f"key-{_hash(key).hex()[:12]}"


def _lines(path: str) -> list[str]:
    """Return the keys of a file, a line each; empty lines and those that begin with # are left out."""
    if not path:
        return []
    try:
        lines = [line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key; write one a line, KEY or NAME=KEY")
    return keys


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def tenant(kind: str, keys: Keys, headers: Mapping[str, str], user: str | None, adapter: str | None) -> str:
    """Return the tenant that the ledger charges."""
    if kind == "adapter":
        return adapter or ""
    if kind == "user":
        return (user or "")[:_MAX_TENANT_CHARS]
    if kind == "header":
        return _utf8(TENANT_HEADER, headers.get(TENANT_HEADER, ""))[:_MAX_TENANT_CHARS]
    return keys.tenant(headers)


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

    def file(self, path: str, param: str) -> Path:
        """Return the real file that a client's path names. Forbidden when it is outside the roots, or not there."""
        for root in self.roots if "\0" not in path and ".." not in Path(path).parts else ():
            try:
                found = (root / path).resolve(strict=True)
            except (OSError, RuntimeError):
                continue
            if found.is_relative_to(root) and found.is_file():
                return found
        raise Forbidden(f"{param} must be a file inside one of the server's --lora-root folders", param)


def os_entries(folder: Path) -> list[Path]:
    """List the files of a folder; OSError when it is none."""
    return [Path(entry.path) for entry in os.scandir(folder)]


def _root(root: str) -> Path:
    try:
        return Path(root).expanduser().resolve(strict=True)
    except OSError as error:
        raise ConfigError(f"--lora-root {root} cannot be used: {error.strerror}") from error


def adapter_roots(config: ServerConfig) -> list[str]:
    """Return the folders that adapters may be loaded from; the one for adapters in bodies is made if it is missing."""
    if not config.lora_upload_root:
        return list(config.lora_root)
    root = Path(config.lora_upload_root).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--lora-upload-root {root} cannot be used: {error.strerror}") from error
    return [*config.lora_root, str(root)]


def check_config(config: ServerConfig, keys: Keys) -> None:
    """Refuse to start with loading at run time open to everybody or from everywhere."""
    if config.tasks.online_tasks and not keys.has_admin:
        raise ConfigError("--online-tasks needs --admin-key, apart from the inference keys")
    if not config.allow_runtime_lora:
        return
    if not keys.has_admin:
        raise ConfigError("--allow-runtime-lora needs --admin-key, apart from the inference keys")
    if not config.lora_root and not config.lora_upload_root:
        raise ConfigError("--allow-runtime-lora needs --lora-root, the folders that adapters may be loaded from")


def warn_of_risks(config: ServerConfig, policy: str, tenant_kind: str, keys: Keys) -> None:
    """Log what is allowed and is rarely meant."""
    if not keys.tenants and not _is_loopback(config.host):
        log.warning("every client that reaches %s is answered, as no key is set: give --api-key NAME=KEY", config.host)
    if policy.partition(":")[0] in _FAIR and tenant_kind == "api-key" and len(keys.tenants) < 2:
        log.warning(
            "policy %s shares the engine between tenants, and at most one key tells them apart: give each its "
            "--api-key NAME=KEY, or choose --tenant user, header or adapter",
            policy,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_tenants(kind: str, keys: Keys, adapters: Collection[str], given: Iterable[str], param: str) -> None:
    """Refuse tenants that no request can have, as a misspelled one would change nothing."""
    known = {"api-key": keys.tenants, "adapter": {"", *adapters}}.get(kind)
    unknown = sorted(set(given) - known) if known else []
    if unknown:
        raise BadRequest(
            f"{param} names {unknown[0]!r}, no tenant here; known: {', '.join(sorted(known or ()))}", param
        )
