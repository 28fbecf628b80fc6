"""The engine's nouns: what is asked (SamplingParams, NewRequest), what is remembered (Request), what a step
does (Work, Batch), what it yields (Sampled, StepResult) and what leaves the engine (Output).

The server fills NewRequest; the scheduler owns Request and makes Batch; the runner reads Batch and makes
StepResult; the scheduler turns that into Output. Nothing here imports torch: the simulator runs the same objects.
What is made for every token (Work, Sampled, Output) is a struct outside the garbage collector, as it holds no cycles.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from inlaid.engine.account import Account
from inlaid.engine.refusal import Refusal


class FinishReason(str, enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Grammar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A constraint on the output: exactly one field is set. json_schema holds the schema as JSON text."""

    json_schema: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    lark: str | None = None  # or GBNF, which is turned into it


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings for choosing tokens and stopping; names and defaults are vLLM's. `n` is expanded above the engine."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1: all
    min_p: float = 0.0
    seed: int | None = None  # None: the maker of the request draws one at random
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()  # none: all
    bad_words: tuple[
        tuple[int, ...], ...
    ] = ()  # token sequences; the one that would complete such a sequence is banned
    stop: tuple[str, ...] = ()  # applied where text is made, above the engine
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None  # how many alternatives beside the chosen token; 0: the chosen token only
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it crosses into the engine: tokens, not text."""

    id: str
    prompt: list[int]
    params: SamplingParams = SamplingParams()
    adapter: str | None = None  # a registered name; None is the base
    tenant: str = ""  # whom the ledger charges
    priority: int = 0  # smaller goes first, as in vLLM
    deadline: float | None = None  # absolute, on the engine's clock, for slack-aware policies
    cache_salt: str = ""  # requests with another salt share no prefix with this one
    true_output_len: int | None = None  # experiments only: what an oracle predictor may see
    made: list[int] = []  # the answer's first tokens, which another engine has made and charged; this one goes on
    speculation: bool = True  # False: no drafts for it, and none from its answer


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One request as the scheduler, the policies and the runner see it. The scheduler is the only writer, and keeps
    what it alone needs in Progress.

    `tokens` is prompt + outputs known to the host; with overlap a sampled token may still be on the device, in which
    case its successor can be scheduled before its value is known.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    adapter: str | None  # the adapter's *identity* (content hash), resolved from the name at arrival
    adapter_name: str | None
    account: Account  # its tenant's, which is charged
    arrival: float
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""
    true_output_len: int | None = None
    speculation: bool = True
    tokens: list[int] = field(default_factory=list)  # starts as a copy of prompt
    blocks: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    grammar: Any = None  # a GrammarState (text/grammar.py) when params.grammar is set
    order: int = 0  # how many requests were added before; breaks ties, so that runs repeat exactly
    limit: int = 0  # most tokens of prompt plus outputs
    stop_ids: frozenset[int] = frozenset()
    late: bool = False  # its deadline can no longer be met
    senior: bool = False  # it has waited as long as the policy lets later ones overtake it

    @property
    def tenant(self) -> str:
        return self.account.tenant

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def outputs(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def must_see(self) -> bool:
        """True if a token can only be chosen when the token before it is known on the host."""
        return self.grammar is not None or bool(self.params.bad_words)


class Work(msgspec.Struct, frozen=True, gc=False):
    """One request's share of a step: compute tokens [start, start + num_tokens) of request.tokens.

    With overlap, the token at position len(request.tokens) may be the one sampled on the device by the step
    before; the runner takes it from there. `samples`: the last position yields a new token. `plain`: a decode in the
    middle of an answer, of which the scheduler looks at nothing but the token.

    With a `draft` the work is a decode of 1 + len(draft) tokens: the newest one, which the host knows, and guesses at
    those to come. Each position yields the token after it, which counts as long as the guesses before it were right.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    plain: bool = False
    draft: tuple[int, ...] = ()

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 1 + len(self.draft) and self.start >= self.request.num_prompt


@dataclass(frozen=True)
class Batch:
    """The work of one step, single-token works first, then longer ones."""

    step: int
    works: tuple[Work, ...]
    released: tuple[str, ...] = ()  # ended or preempted since the last batch: their rows may be reused

    @property
    def num_tokens(self) -> int:
        return sum(work.num_tokens for work in self.works)


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False):
    """The chosen token's log probability and rank (1 is the most likely), and the top alternatives."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Sampled(msgspec.Struct, frozen=True, gc=False):
    """The token of one Work with `samples`, in the batch's order, and those that `following` it a draft brought. They
    mean nothing in `not_finite`."""

    token: int
    logprobs: TokenLogprobs | None = None
    following: tuple[Sampled, ...] = ()


def accept(work: Work, sampled: Sequence[Sampled]) -> Sampled:
    """Return what a work with a draft has brought, given the token sampled at each of its positions: the first, and
    those behind guesses that were right. A token that is none (its logits are not finite) ends them: the next step
    computes it again, and tells."""
    following = []
    for guess, one, after in zip(work.draft, sampled, sampled[1:]):
        if one.token != guess or after.token < 0:
            break
        following.append(after)
    return Sampled(sampled[0].token, sampled[0].logprobs, tuple(following))


@dataclass(frozen=True)
class StepResult:
    sampled: list[Sampled]  # one per Work with samples=True, in order
    # request id -> logprobs of prompt positions start+1 .. start+num_tokens computed by this step
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()  # ids of requests whose logits are not finite: what the step brought them is void


class Runner(Protocol):
    """The device's side of a step. With `overlap` the engine submits step n+1 before it collects step n.

    After a step that raised, its works come again in smaller batches of the same number. A request may stand in
    `released` and in `works` at once: then everything kept of it is made anew.
    """

    overlap: bool

    def submit(self, batch: Batch) -> Any: ...

    def collect(self, ticket: Any) -> StepResult: ...


class Output(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A step's result for one request: zero or more new tokens and, at the end, why it ended."""

    id: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, with the first output; first entry None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the stop_token_ids entry or eos that ended it
    num_cached: int = 0
    queue_time: float | None = None  # seconds from arrival to first scheduled, with the first output
    adapter_time: float = 0.0  # of these, waiting for its adapter to come to the device,
    adapter_read: float = 0.0  # of these, while the adapter was read from disk,
    adapter_copy: float = 0.0  # and while it was copied to the device
    host_time: float = (
        0.0  # with the last output: its share of the host's seconds to make (on a CPU, compute) its steps
    )
    refusal: Refusal | None = None  # with FinishReason.ERROR: why
