"""Checks at the engine's door: settings that are out of range, and requests that can never be served here.

A request's sampling values are checked where it is made, see text/params.py; here stands only what depends on this
engine: its memory, the model's length, and the budgets of a step. The scheduler is the only caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from inlaid.config import SchedulerConfig
from inlaid.engine.account import Account
from inlaid.engine.cost import LinearCost, ProfiledCost
from inlaid.engine.kv_cache import BlockPool
from inlaid.engine.refusal import Refusal, Refused
from inlaid.engine.request import NewRequest, Request

MAX_SETTING = 1e9  # of any number here: sums and sort keys stay finite


def check_config(config: SchedulerConfig) -> None:
    """Raise ValueError for a setting that is out of range."""
    least: Iterable[tuple[str, float]] = (
        ("max_num_seqs", 1),
        ("max_num_batched_tokens", 1),
        ("max_num_waiting", 1),
        ("max_seqs_per_tenant", 0),
        ("max_tasks_per_step", 0),
        ("max_sum_of_ranks", 0),
        ("max_overtakes", 0),
        ("admission_margin", 0),
        ("reserve", 0),
        ("prompt_weight", 0),
        ("output_weight", 0),
        ("cached_price", 0),
    )
    for name, smallest in least:
        value = getattr(config, name)
        if not smallest <= value <= MAX_SETTING:
            raise ValueError(f"{name} is {value}; it must be at least {smallest} and at most {MAX_SETTING:g}")
    if config.admission_margin >= 1:
        raise ValueError(f"admission_margin is {config.admission_margin}; it is a share, below 1")


def make_cost(config: SchedulerConfig) -> LinearCost | ProfiledCost:
    """Make the price list that a configuration names."""
    if config.cost == "linear":
        return LinearCost(config.prompt_weight, config.output_weight, config.cached_price)
    if config.cost == "profiled":
        return ProfiledCost(cached_price=config.cached_price)
    raise ValueError(f"unknown cost {config.cost!r}; known: linear, profiled")


def most_tokens(new: NewRequest, max_model_len: int, pool: BlockPool, config: SchedulerConfig) -> int:
    """Return the most tokens of prompt plus output, or raise Refused for a request that can never be served."""
    params = new.params
    if new.deadline is not None and not math.isfinite(new.deadline):
        raise _invalid(f"the deadline is {new.deadline}; it must be a finite time")
    if not new.prompt:
        raise _invalid("the prompt is empty; at least one token is needed")
    if params.max_tokens < (0 if params.prompt_logprobs is not None else 1):
        raise _invalid(f"max_tokens is {params.max_tokens}; it must be at least 1 (0 only with prompt_logprobs)")
    if len(new.prompt) + (params.max_tokens > 0) > max_model_len:
        raise _invalid(
            f"the prompt has {len(new.prompt)} tokens; with max_model_len {max_model_len} it can have "
            f"{max_model_len - 1} at most"
        )
    limit = min(len(new.prompt) + params.max_tokens, max_model_len)
    if len(new.prompt) + len(new.made) >= limit and new.made:
        raise _invalid(f"the answer has {len(new.made)} tokens already, all that it may have")
    blocks = -(-max(limit - 1, len(new.prompt)) // pool.block_size)
    if blocks > pool.guaranteed:
        raise _invalid(
            f"prompt and output may take {limit} tokens, {blocks} KV blocks; there are {pool.guaranteed}: "
            f"ask for at most {pool.guaranteed * pool.block_size + 1} tokens together"
        )
    if not config.enable_chunked_prefill and limit > config.max_num_batched_tokens:
        raise _invalid(
            f"prompt and output may take {limit} tokens, but chunked prefill is off and a step holds "
            f"{config.max_num_batched_tokens}: raise max_num_batched_tokens or enable chunked prefill"
        )
    return limit


def _invalid(message: str) -> Refused:
    return Refused(Refusal(message))


def make_request(
    new: NewRequest, identity: str | None, account: Account, limit: int, now: float, order: int, eos_ids: frozenset[int]
) -> Request:
    """Make the state of a request that has just arrived."""
    params = new.params
    return Request(
        id=new.id,
        prompt=new.prompt,
        params=params,
        adapter=identity,
        adapter_name=new.adapter,
        account=account,
        arrival=now,
        priority=new.priority,
        deadline=new.deadline,
        cache_salt=new.cache_salt,
        true_output_len=new.true_output_len,
        tokens=[*new.prompt, *new.made],
        speculation=new.speculation,
        order=order,
        limit=limit,
        stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids),
    )
