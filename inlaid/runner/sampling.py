"""The features that requests ask of the sampler: noise, penalties, biases, grammars, truncation, log probabilities.
Each runner keeps one `SamplingState`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from inlaid.engine.request import Request, Sampled, SamplingParams, TokenLogprobs, Work, accept
from inlaid.kernels.vocabulary import Change, change_logits
from inlaid.kernels.workspace import FreshMemory
from inlaid.layers import sampler
from inlaid.layers.sampler import NOT_FINITE, SamplingBatch, seed_key
from inlaid.model.transformer import Transformer
from inlaid.text.grammar import completing, token_bits

_BAN = -1e9  # beyond any logit, yet above what must not be chosen at all
_PROMPT_LOGPROB_ROWS = 256  # rows of logits held at once for prompt logprobs
_NOTHING: Mapping[str, int] = MappingProxyType({})


class SamplingState:
    """The state of requests between steps: keys of their noise, and token counts of those with penalties."""

    def __init__(self, vocab_size: int, device: torch.device, seed: int) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.seed = seed
        self.keys: dict[str, int] = {}  # by request id
        self.counts: dict[str, TokenCounts] = {}

    def forget(self, request_id: str) -> None:
        self.keys.pop(request_id, None)
        self.counts.pop(request_id, None)

    def batch(self, works: Sequence[Work], unseen: Mapping[str, int] = _NOTHING) -> SamplingBatch:
        """Return what these requests ask of the sampler, feature by feature. `unseen`: tokens by request id that
        penalties must count and the engine has not been told of yet."""
        params = [work.request.params for work in works]
        wanting = [row for row, p in enumerate(params) if p.logprobs is not None]
        drawing = [row for row, p in enumerate(params) if not p.greedy]
        return SamplingBatch(
            bias=self._bias(works),
            grammar=self._grammar(works),
            penalties=self._penalties(works, unseen),
            noise=self._noise(works, drawing) if drawing else None,
            truncation=self._truncation([params[row] for row in drawing]),
            logprob_rows=self._tensor(np.array(wanting)) if wanting else None,
            num_top=max((params[row].logprobs or 0 for row in wanting), default=0),
        )

    def _bias(self, works: Sequence[Work]) -> sampler.Coordinates | None:
        """Return logit_bias, a ban on what would complete a bad word, and -inf for what would end an output before
        min_tokens. A grammar may leave nothing but the end, so it overrules min_tokens, and so do allowed_token_ids
        that are all ends; both overrule bad words, whose ban is finite."""
        coordinates: list[tuple[int, int, float]] = []
        for row, work in enumerate(works):
            request, params = work.request, work.request.params
            coordinates += [(row, token, value) for token, value in params.logit_bias.items()]
            if params.bad_words:
                coordinates += [
                    (row, token, _BAN) for token in completing([*request.outputs, *work.draft], params.bad_words)
                ]
            num_outputs = work.start + work.num_tokens - request.num_prompt
            if num_outputs < params.min_tokens and request.grammar is None:
                ends = request.stop_ids | frozenset(params.stop_token_ids)
                if not params.allowed_token_ids or not ends.issuperset(params.allowed_token_ids):
                    coordinates += [(row, token, -torch.inf) for token in ends]
        if not coordinates:
            return None
        rows, tokens, values = zip(*coordinates, strict=True)
        return sampler.Coordinates(
            self._tensor(np.array(rows)), self._tensor(np.array(tokens)), self._tensor(np.array(values, np.float32))
        )

    def _grammar(self, works: Sequence[Work]) -> sampler.GrammarMask | None:
        """Return the masks of grammars and of allowed_token_ids; a request has one or the other."""
        rows = [r for r, w in enumerate(works) if w.request.grammar is not None or w.request.params.allowed_token_ids]
        if not rows:
            return None
        bits = []
        for row in rows:
            request = works[row].request
            if request.grammar is not None:
                bits.append(request.grammar.mask(request.outputs, len(works[row].draft)))
            else:
                bits.append(token_bits(request.params.allowed_token_ids, self.vocab_size))
        return sampler.GrammarMask(self._tensor(np.array(rows)), self._tensor(np.stack(bits)))

    def _penalties(self, works: Sequence[Work], unseen: Mapping[str, int]) -> sampler.Penalties | None:
        rows = [row for row, work in enumerate(works) if is_penalized(work.request.params)]
        if not rows:
            return None
        counts = [self._counts_of(works[row], unseen) for row in rows]
        params = [works[row].request.params for row in rows]
        return sampler.Penalties(
            rows=self._tensor(np.array(rows)),
            repetition=self._floats([p.repetition_penalty for p in params]),
            frequency=self._floats([p.frequency_penalty for p in params]),
            presence=self._floats([p.presence_penalty for p in params]),
            output_counts_PV=torch.stack([count.outputs_V for count in counts]),
            prompt_seen_PV=torch.stack([count.prompt_V for count in counts]),
        )

    def _counts_of(self, work: Work, unseen: Mapping[str, int]) -> TokenCounts:
        """Return the request's counts, brought up to its outputs and its unseen token; with the work's guesses, but
        those in a copy."""
        request = work.request
        if request.id not in self.counts:
            self.counts[request.id] = TokenCounts.of(request.prompt, self.vocab_size, self.device)
        counts = self.counts[request.id]
        counts.add(request.tokens[request.num_prompt + counts.num_added :])
        if request.id in unseen and counts.num_added == request.num_outputs:
            counts.add([unseen[request.id]])
        return counts.with_guesses(work.draft) if work.draft else counts

    def _noise(self, works: Sequence[Work], rows: list[int]) -> sampler.Noise:
        chosen = [works[row] for row in rows]
        return sampler.Noise(
            rows=self._tensor(np.array(rows)),
            temperature=self._floats([work.request.params.temperature for work in chosen]),
            keys=self._tensor(np.array([self.key(work.request) for work in chosen], dtype=np.int64)),
            positions=self._tensor(np.array([work.start + work.num_tokens for work in chosen], dtype=np.int64)),
        )

    def key(self, request: Request) -> int:
        """Return the key of a request's noise: its seed's, or one made of its id and the engine's seed."""
        if request.id not in self.keys:
            seed = request.params.seed
            if seed is None:
                digest = hashlib.blake2b(f"{self.seed}:{request.id}".encode(), digest_size=8).digest()
                seed = int.from_bytes(digest, "little")
            self.keys[request.id] = seed_key(seed)
        return self.keys[request.id]

    def _truncation(self, drawing: Sequence[SamplingParams]) -> sampler.Truncation | None:
        rows = [row for row, p in enumerate(drawing) if p.top_p < 1 or p.top_k > 0 or p.min_p > 0]
        if not rows:
            return None
        return sampler.Truncation(
            rows=self._tensor(np.array(rows)),
            top_k=self._tensor(np.array([max(0, drawing[row].top_k) for row in rows])),
            top_p=self._floats([drawing[row].top_p for row in rows]),
            min_p=self._floats([drawing[row].min_p for row in rows]),
        )

    def prompt_logprobs(
        self, model: Transformer, works: Sequence[Work], hidden_TD: torch.Tensor, heads: Sequence[Change | None]
    ) -> dict[str, list[TokenLogprobs]]:
        """Return log probabilities of positions start+1 .. start+num_tokens, as far as they are prompt. `heads` are the
        changes of the head by each work's adapter."""
        found: dict[str, list[TokenLogprobs]] = {}
        head_of = {work.request.id: head for work, head in zip(works, heads, strict=True)}
        for work, first, targets in _scored(works):
            wanted, key = work.request.params.prompt_logprobs or 0, work.request.id
            hidden_QD = hidden_TD[first : first + len(targets)]
            found[key] = self._logprobs_of(model, hidden_QD, targets, wanted, head_of[key])
        return found

    def _logprobs_of(
        self, model: Transformer, hidden_QD: torch.Tensor, targets: list[int], num_top: int, head: Change | None
    ) -> list[TokenLogprobs]:
        memory = FreshMemory(hidden_QD.device, hidden_QD.dtype)
        made: list[TokenLogprobs] = []
        for start in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
            part = targets[start : start + _PROMPT_LOGPROB_ROWS]
            logits_LV = model.logits(hidden_QD[start : start + len(part)], memory)
            change_logits(head, hidden_QD[start : start + len(part)], logits_LV)
            logprobs = sampler.logprobs(logits_LV.float(), torch.tensor(part, device=self.device), num_top)
            made += _to_host(part, logprobs, [num_top] * len(part))
        return made

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _floats(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)


@dataclass
class TokenCounts:
    """The tokens of a request with penalties: which are in its prompt, and how often each is in its outputs."""

    prompt_V: torch.Tensor
    outputs_V: torch.Tensor
    num_added: int = 0

    @classmethod
    def of(cls, prompt: list[int], vocab_size: int, device: torch.device) -> TokenCounts:
        seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        seen[torch.tensor(prompt, device=device)] = True
        return cls(seen, torch.zeros(vocab_size, dtype=torch.float32, device=device))

    def add(self, tokens: list[int]) -> None:
        if tokens:
            index = torch.tensor(tokens, device=self.outputs_V.device)
            self.outputs_V.index_add_(0, index, torch.ones(len(tokens), device=self.outputs_V.device))
            self.num_added += len(tokens)

    def with_guesses(self, draft: Sequence[int]) -> TokenCounts:
        """Return a copy that counts these tokens too."""
        copy = TokenCounts(self.prompt_V, self.outputs_V.clone(), self.num_added)
        copy.add(list(draft))
        return copy


def lines(works: Sequence[Work]) -> Sequence[Work]:
    """Return a work for each token that these sample: a work with a draft samples at each of its positions, as if it
    ended there, with the guesses before that position for its draft."""
    if not any(work.draft for work in works):
        return works
    return [
        Work(work.request, work.start, work.num_tokens - len(work.draft) + place, True, draft=work.draft[:place])
        for work in works
        for place in range(len(work.draft) + 1)
    ]


def folded(works: Sequence[Work], sampled: Sequence[Sampled]) -> list[Sampled]:
    """Return what each work has brought, given what was sampled for each of its `lines`."""
    made, at = [], 0
    for work in works:
        count = 1 + len(work.draft)
        made.append(accept(work, sampled[at : at + count]) if work.draft else sampled[at])
        at += count
    return made


def _scored(works: Sequence[Work]) -> Iterator[tuple[Work, int, list[int]]]:
    """Yield the works whose prompts are scored, with their first row of the step and the tokens that follow each."""
    first = 0
    for work in works:
        request = work.request
        if request.params.prompt_logprobs is not None:
            yield work, first, request.prompt[work.start + 1 : work.start + work.num_tokens + 1]
        first += work.num_tokens


def scored_pieces(works: Sequence[Work]) -> list[tuple[int, int]]:
    """Return the rows whose logits `prompt_logprobs` asks for, in its order: the first and the number of each piece."""
    return [
        (first + start, min(_PROMPT_LOGPROB_ROWS, len(targets) - start))
        for _, first, targets in _scored(works)
        for start in range(0, len(targets), _PROMPT_LOGPROB_ROWS)
    ]


def is_penalized(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def needs_full_sampler(params: SamplingParams) -> bool:
    """Return whether a request asks for more than the sampling kernels of a GPU offer, at any of its tokens."""
    return (
        params.logprobs is not None
        or params.grammar is not None
        or bool(params.logit_bias or params.allowed_token_ids or params.bad_words)
        or is_penalized(params)
    )


def to_sampled(works: Sequence[Work], tokens_S: torch.Tensor, logprobs: sampler.Logprobs | None) -> list[Sampled]:
    """Return the sampled tokens on the host, with the log probabilities that their requests asked for."""
    tokens = tokens_S.tolist()
    if logprobs is None:
        return [Sampled(token) for token in tokens]
    wanted = [(row, work.request.params.logprobs) for row, work in enumerate(works)]
    counts = [count for _, count in wanted if count is not None]
    chosen = [tokens[row] for row, count in wanted if count is not None]
    made = iter(_to_host(chosen, logprobs, counts))
    return [Sampled(tokens[row], None if count is None else next(made)) for row, count in wanted]


def not_finite(
    works: Sequence[Work], sampled: Sequence[Sampled], prompt_logprobs: Mapping[str, Sequence[TokenLogprobs]]
) -> tuple[str, ...]:
    """Return the ids of the requests, among those that sampled or were scored, whose logits are not finite."""
    found = [work.request.id for work, one in zip(works, sampled, strict=True) if one.token == NOT_FINITE]
    found += [name for name, listed in prompt_logprobs.items() if any(math.isnan(item.logprob) for item in listed)]
    return tuple(dict.fromkeys(found))


def _to_host(tokens: list[int], logprobs: sampler.Logprobs, counts: list[int]) -> list[TokenLogprobs]:
    columns = zip(
        tokens,
        logprobs.chosen_L.tolist(),
        logprobs.ranks_L.tolist(),
        logprobs.top_tokens_LK.tolist(),
        logprobs.top_values_LK.tolist(),
        counts,
        strict=True,
    )
    return [
        TokenLogprobs(token, value, rank, list(zip(top[:count], values[:count], strict=True)))
        for token, value, rank, top, values, count in columns
    ]
