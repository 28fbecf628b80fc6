"""The prefix cache as the scheduler uses it: names of a request's blocks, and which of them hold computed KV."""

from __future__ import annotations

from inlaid.config import CacheConfig
from inlaid.engine.kv_cache import BlockPool, extend_keys, root_key
from inlaid.engine.progress import Progress
from inlaid.kv_format import AUTO, kv_format


class PrefixCache:
    """Find and publish full blocks by (base version, adapter identity, all tokens up to the block's end)."""

    def __init__(self, config: CacheConfig, pool: BlockPool, base_version: str) -> None:
        self.base_version = base_version
        self._config = config
        self._pool = pool

    def match(self, progress: Progress) -> list[int]:
        """Return the blocks of the longest cached prefix; the last token is always left to compute, for its logits."""
        request = progress.request
        scored = progress.prompt_logprobs is not None
        if not self._config.enable_prefix_caching or scored or progress.uncached:
            return []
        self._extend_keys(progress)
        return self._pool.match(progress.block_keys[: (len(request.tokens) - 1) // self._pool.block_size])

    def publish(self, progress: Progress, start: int, end: int) -> None:
        """Name the blocks that tokens [start, end), which are computed now, have filled."""
        first, last = start // self._pool.block_size, end // self._pool.block_size
        if self._config.enable_prefix_caching and first < last:
            if len(progress.block_keys) < last:
                self._extend_keys(progress)
            self._pool.publish(progress.request.blocks[first:last], progress.block_keys[first:last])

    def _extend_keys(self, progress: Progress) -> None:
        """Name all full blocks. The root is settled at first use, and again after `forget`."""
        request = progress.request
        if not progress.root:
            tenant = request.tenant if self._config.isolate_tenants else ""
            progress.root = root_key(self._base(), request.adapter, tenant, request.cache_salt)
        extend_keys(progress.block_keys, progress.root, request.tokens, self._pool.block_size)

    def _base(self) -> str:
        """Return the base version, and the form of keys and values where it is not the usual one."""
        name = kv_format(self._config.kv_cache_dtype).name
        return self.base_version if name == AUTO.name else f"{self.base_version} with {name} keys and values"

    def withdraw(self, progress: Progress) -> None:
        """Take back what a running request has published, and what it shares: no other request shall use it."""
        progress.prefilled = False  # what it computed since is not published either
        self._pool.withdraw(progress.request.blocks)

    def settle(self, progress: Progress) -> None:
        """Let a request name its blocks by the base version of now, whatever is served later."""
        self._extend_keys(progress)

    def forget(self, progress: Progress) -> None:
        """Drop the names of a request's blocks, as the base version they belong to is no longer served."""
        progress.root, progress.block_keys = b"", []
