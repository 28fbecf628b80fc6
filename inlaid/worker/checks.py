"""Checks of settings that need neither torch nor weights, so that a mistake is told at once. The server makes them
before it starts the engine process, and `build_engine` before it imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from inlaid.adapters.modes import why_not
from inlaid.config import ConfigError, EngineConfig, check
from inlaid.engine.intake import check_config
from inlaid.engine.policy import parse_policy
from inlaid.engine.speculation import resolved
from inlaid.kv_format import kv_format


def check_settings(config: EngineConfig, adapters: Iterable[str] = ()) -> None:
    """Raise ConfigError for a setting that cannot work, a policy that does not exist, or a file that is not there."""
    check(config)
    try:
        check_config(config.scheduler)
        parse_policy(config.scheduler.policy)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    resolved(config.speculation)
    if kv_format(config.cache.kv_cache_dtype).is_coded and config.decode_kernel == "one":
        raise ConfigError(
            f"--decode-kernel one reads keys and values of 16 bits, not --kv-cache-dtype "
            f"{config.cache.kv_cache_dtype}; use --decode-kernel layers or auto"
        )
    if problem := why_not(config.adapters.adapter_mode):
        raise ConfigError(problem)
    if config.tensor_parallel_size > 1 and config.decode_kernel == "one":
        raise ConfigError(
            "--decode-kernel one computes a whole model on one GPU, not with --tensor-parallel-size; use layers or auto"
        )
    gate = config.adapters.require_eval
    if gate and not Path(gate).is_file():
        raise ConfigError(f"--require-eval {gate}: there is no such file; `python -m eval.run` writes one")
    for path in adapters:
        if not Path(path).is_dir():
            raise ConfigError(f"there is no adapter folder {path}")
