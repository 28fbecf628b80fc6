"""Every setting with its default, in frozen dataclasses. `flags.py` makes flags of these fields (`--kebab-case`,
help from the field's metadata), so that a name, its default and its meaning are written once. Unknown keys raise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is unknown or impossible; the message says which and what is allowed."""


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    *,
    least: float | None = None,
    most: float | None = None,
    section: str = "",
    alias: str = "",
) -> Any:
    """Make a dataclass field that carries what the command line shows of it, and its range.

    The help lists it and the fields after it under `section`. The flag may also be called by its `alias`.
    """
    about = {"help": help, "choices": choices, "least": least, "most": most, "section": section, "alias": alias}
    return field(default=default, metadata=about)


def check(config: Any) -> None:
    """Raise ConfigError for the first field, inner configurations included, whose value is not a choice or in range."""
    for each in fields(config):
        value, about = getattr(config, each.name), each.metadata
        if is_dataclass(value):
            check(value)
        elif value is not None and about:
            _check_value("--" + each.name.replace("_", "-"), value, about)


def _check_value(flag: str, value: Any, about: Mapping[str, Any]) -> None:
    choices, least, most = about["choices"], about["least"], about["most"]
    if choices and value not in choices:
        raise ConfigError(f"{flag} {value}: give one of {', '.join(choices)}")
    if least is not None and not least <= value <= (float("inf") if most is None else most):  # NaN is refused too
        wanted = f"{least:g} or more" if most is None else f"a number from {least:g} to {most:g}"
        raise ConfigError(f"{flag} {value}: give {wanted}")


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a configuration from a dict. ConfigError: a key is unknown; the message lists the known ones."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{cls.__name__}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return cls(**values)


@dataclass(frozen=True)
class SchedulerConfig:
    """Scheduling: the order of requests and the limits of a step."""

    policy: str = option(
        "fcfs",
        "order of requests: fcfs, inlaid, srtf, vtc, lcf, drr, rpm, slo, priority; with options "
        "after a colon, as in inlaid:beta=5,ageing=2",
        section="Scheduling: the order of requests and the limits of a step",
    )
    max_num_seqs: int = option(256, "most sequences in one step")
    max_seqs_per_tenant: int = option(
        0,
        "most sequences of a tenant in one step while other tenants wait; 0: its share by weight, or an eighth of all "
        "if that is more",
    )
    max_num_batched_tokens: int = option(2048, "most tokens in one step; longer prompts are prefilled in chunks")
    max_step_ms: int = option(
        0,
        "most milliseconds of a step that makes tokens of answers: prompts get as many of its tokens as fit by the "
        "steps before; 0: 50 on a CPU, no limit on a GPU",
        least=0,
    )
    max_num_waiting: int = option(4096, "most requests waiting; more are refused with 429")
    enable_chunked_prefill: bool = option(True, "split prompts that exceed the token budget over several steps")
    max_tasks_per_step: int = option(0, "most distinct adapters in one step; 0: no limit")
    max_sum_of_ranks: int = option(0, "most ranks, summed over distinct adapters, in one step; 0: no limit")
    admission_margin: float = option(0.01, "share of KV blocks that admissions leave free for running requests to grow")
    reserve: float = option(
        0.8, "share of its predicted answer for which KV must be free when a request is admitted; less preempts more"
    )
    max_overtakes: int = option(1000, "admissions that may overtake a request that did not fit before all wait for it")
    predictor: str = option(
        "history",
        "lengths of answers: learned from history, or max_tokens",
        ("history", "none"),
        section="Fairness: predicted lengths, prices and tenants",
    )
    predictor_file: str = option("", "where what the predictor has learned is kept between runs; empty: nowhere")
    cost: str = option("linear", "price of service", ("linear", "profiled"))
    prompt_weight: float = option(1.0, "service that a prompt token costs (linear)")
    output_weight: float = option(2.0, "service that an output token costs (linear)")
    cached_price: float = option(0.0, "share of its price that a prompt token found in the prefix cache costs")
    tenant: str = option("api-key", "whom the ledger charges", ("api-key", "user", "header", "adapter"))


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = option(16, "tokens per KV block", least=1, section="KV cache")
    num_blocks: int = option(0, "KV blocks; 0: as many as memory allows", least=0)
    gpu_memory_utilization: float = option(
        0.9, "share of device memory that weights, adapters and KV may use", least=0.01, most=1
    )
    cpu_memory_gib: float = option(1.0, "memory for KV blocks on a machine without a GPU, in GiB", least=0)
    unified_memory: bool = option(
        False,
        "KV blocks and adapters share memory: adapters have adapter_memory_gib (0: room for a quarter of max_loras) "
        "and borrow KV blocks that nobody uses",
    )
    kv_cache_dtype: str = option(
        "auto",
        "keys and values in the cache: auto (the compute type), fp8 (e4m3) or int8, which take a byte and a scale for "
        "each token and head: nearly twice the tokens of 16 bits fit, and answers change a little",
    )
    min_kv_blocks: int = option(
        0, "with unified_memory: KV blocks that adapters never borrow; 0: enough for the longest request", least=0
    )
    enable_prefix_caching: bool = option(True, "reuse KV of shared prefixes (per base version and adapter identity)")
    isolate_tenants: bool = option(
        False, "no tenant reuses KV of another's prefixes, so timing tells nothing about them"
    )


@dataclass(frozen=True)
class AdapterConfig:
    """Limits on adapters and where they may come from at run time."""

    max_loras: int = option(
        32,
        "adapters resident on the device at once (their pages are of true rank)",
        least=1,
        section="Adapters on the device and in host memory",
    )
    max_lora_rank: int = option(256, "largest rank accepted", least=1)
    max_cpu_loras: int = option(
        4096, "most adapters loaded, by name, whether in host memory or, beyond its budget, on disk only", least=1
    )
    max_cpu_adapter_gib: float = option(
        0.0,
        "host memory for adapters, in GiB; those that it does not hold are read again when wanted; 0: no limit",
        least=0,
    )
    adapter_memory_gib: float = option(
        0.0, "bytes for adapter pages on the device, in GiB; 0: sized from max_loras", least=0
    )
    adapter_mode: str = option(
        "on-demand",
        "how an adapter gets ready: cached (all are on the device from the start), on-demand (its requests start when "
        "it is there), pipelined (when its first layers are)",
    )
    adapter_link_gbps: float = option(
        0.0,
        "for experiments without a GPU: let adapters arrive at so many GB/s, as over a bus; 0: as fast as it goes",
        least=0,
    )
    adapter_timeout: float = option(
        60.0, "seconds that a request waits for its adapter to be on the device, before it is answered 503", least=0.001
    )
    pin_adapter: tuple[str, ...] = option(
        (), "name of an adapter that stays on the device once it is there, may be repeated; one place stays free"
    )
    require_eval: str = option(
        "",
        "report of `python -m eval.run`; adapters without a passing record in it for this base are not served",
        section="The accuracy gate",
    )
    max_drop: float = option(1.0, "with require_eval: most points that an adapter may lose on this base", least=0)


@dataclass(frozen=True)
class SpeculationConfig:
    """Several tokens a step: guesses at what comes next, which the model checks."""

    speculation: str = option(
        "off",  # until docs/speculation.md has figures of an H200
        "where guesses at the next tokens come from: ngram (the request's own text), suffix (and finished answers of "
        "its adapter); the model checks each, so answers stay as they are",
        ("off", "ngram", "suffix"),
        section="Speculation: several tokens a step",
    )
    num_speculative_tokens: int = option(8, "most guesses for a request in a step", least=1, most=64)
    speculation_length: str = option(
        "auto", "guesses in a step: as many as pay (auto), or as many as there are (fixed)", ("auto", "fixed")
    )
    speculation_scope: str = option(
        "tenant",
        "with suffix, whose finished answers a request's guesses may come from: nobody's (request), those of its "
        "tenant, or everybody's (adapter); always of the same adapter and cache_salt",
        ("request", "tenant", "adapter"),
    )
    speculation_memory_mib: float = option(
        64.0, "with suffix, host memory for finished answers, in MiB; the oldest are dropped first", least=1
    )
    no_speculation_tenant: tuple[str, ...] = option(
        (), "tenant whose requests get no guesses and whose answers are not kept for any, may be repeated"
    )
    speculative_config: str = option(
        "", "vLLM's JSON form of these settings: method (ngram or suffix) and num_speculative_tokens"
    )


@dataclass(frozen=True)
class EngineConfig:
    """Everything the step loop needs."""

    model: str = option("", "a local Hugging Face folder, a .gguf file or a hub id; empty: the bundled demo")
    dtype: str = option(
        "auto", "compute type", ("auto", "float32", "float16", "bfloat16"), section="Model, device and kernels"
    )
    device: str = option("auto", "where the model runs", ("auto", "cpu", "cuda"))
    max_model_len: int = option(0, "most tokens of prompt plus output; 0: what the model allows", least=0)
    seed: int = option(0, "seed of the draws for requests that bring none")
    linear_backend: str = option(
        "auto",
        "kernel of the quantized linears; on a CPU packed, which is built by the C compiler at first use, or "
        "reference, which dequantizes the weights at load",
        ("auto", "reference", "packed", "exllama", "humming", "triton"),
    )
    deterministic: bool = option(
        True,
        "the same batch gives the same bits every time: only kernels that add in a fixed order are chosen (exllama's "
        "cannot, and serves only when named); without it a GPU may be a little faster",
    )
    attention_backend: str = option("auto", "kernel of attention", ("auto", "reference", "triton"))
    decode_kernel: str = option(
        "auto",
        "steps of up to 4 decodes: a kernel for each operation (layers), one persistent kernel (one), or one where it "
        "was measured faster, linear_backend is auto and its second copy of the weights takes at most 5% of the "
        "device's memory (auto)",
        ("auto", "one", "layers"),
    )
    enforce_eager: bool = option(False, "no CUDA graphs")
    tensor_parallel_size: int = option(
        1, "processes that compute the model together, each with its part of the weights", least=1, alias="-tp"
    )
    tensor_parallel_timeout: float = option(
        60.0, "seconds that one of these processes may keep the others waiting; then the engine is restarted", least=0.1
    )
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)


@dataclass(frozen=True)
class TaskConfig:
    """Adding tasks to the base while it serves."""

    online_tasks: str = option(
        "", "the bank of the base (FOLDER.bank, beside a folder made by inlaid quantize): tasks are added while serving"
    )
    task_gpu_share: float = option(
        0.1, "share of the device's time that quantizing may take; on a CPU, of the time of a core", least=0.001, most=1
    )
    task_device: str = option("auto", "where quantizing runs; auto: where the model runs", ("auto", "cpu", "cuda"))
    task_threads: int = option(1, "threads of the quantizing process", least=1)
    task_memory_gib: float = option(0.0, "most host memory of the quantizing process, in GiB; 0: any", least=0)
    task_gpu_memory_gib: float = option(0.0, "most GPU memory of the quantizing process, in GiB; 0: any", least=0)
    task_tolerance: float = option(
        0.02,
        "largest loss that an old task may gain by a new base, in nats a token (a share of its loss where that is "
        "above 1), besides two standard errors; else it is not served",
        least=0,
    )
    on_base_switch: str = option(
        "finish",
        "requests in flight when the base is switched: finish (on the old base) or recompute (their KV on the new one)",
        ("finish", "recompute"),
    )
    base_switch_memory: str = option(
        "auto",
        "where the new base waits: device (both fit there), host (it is copied in while nothing runs), auto: by room",
        ("auto", "device", "host"),
    )
    keep_versions: int = option(
        4, "versions of the base that are kept on disk; the one before can be rolled back to", least=2
    )


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP side: addresses, keys, limits, safety."""

    host: str = option("127.0.0.1", "address to listen on", section="Server: address, name and template")
    port: int = option(8000, "port to listen on; 0: any free one", least=0, most=65535)
    served_model_name: str | None = option(None, "the base model's name in the API; default: its folder's name")
    chat_template: str | None = option(None, "file with a chat template that replaces the model's")
    allow_special_tokens_in_messages: bool = option(
        False,
        "read special tokens that a client writes into a message, such as <|im_end|>, as these tokens; without it they "
        "are text there, and can end nobody's turn",
    )
    strict_requests: bool = option(
        False,
        "refuse unknown fields in requests, and numbers written as text, instead of ignoring the ones with a "
        "warning and reading the others",
    )
    max_stored_responses: int = option(
        1000, "most answers of /v1/responses kept for previous_response_id; the oldest go first; 0: none"
    )
    profile_dir: str = option("", "folder for the traces of /start_profile and /stop_profile; empty: profiles are off")
    tool_call_parser: str = option(
        "auto",
        "the form in which the model writes tool calls; auto: what its chat template writes, none: calls stay text",
        ("auto", "none", "json", "hermes", "llama3_json", "mistral", "pythonic", "words", "qwen", "llama3", "openai"),
    )
    reasoning_parser: str = option(
        "auto",
        "the marks around the model's reasoning; auto: those of its chat template, none: reasoning stays text",
        ("auto", "none", "think", "deepseek_r1", "qwen3", "mistral"),
    )
    api_key: tuple[str, ...] = option(
        (),
        "KEY or NAME=KEY: a key that inference requests must carry, and the name of its tenant; may be repeated; also "
        "from INLAID_API_KEY, separated by commas",
        section="Keys, HTTPS and origins",
    )
    api_key_file: str = option("", "file with further keys, KEY or NAME=KEY on each line")
    admin_key: str | None = option(
        None, "another key, for loading adapters and changing the scheduler; also from INLAID_ADMIN_KEY"
    )
    ssl_certfile: str = option("", "PEM file with the certificate chain to serve HTTPS with")
    ssl_keyfile: str = option("", "PEM file with the certificate's key, if it is not in --ssl-certfile")
    allowed_origins: tuple[str, ...] = option(
        (), "origin whose pages may call the API from a browser (https://host, or *), may be repeated"
    )
    console: bool = option(True, "serve the console, a page to see and steer the server, at /")
    allow_runtime_lora: bool = option(
        False, "allow loading and unloading adapters while serving", section="Adapters that come and go while serving"
    )
    lora_root: tuple[str, ...] = option((), "folders that adapters may be loaded from at run time")
    lora_upload_root: str = option(
        "", "folder for adapters that arrive in the body of a request, with --allow-runtime-lora; empty: none may"
    )
    max_upload_mib: float = option(1024.0, "largest weights of such an adapter, in MiB")
    lora_watch: tuple[str, ...] = option(
        (),
        "folder whose sub-folders are served as adapters: loaded when complete, swapped when changed, unloaded when "
        "gone; may be repeated",
    )
    lora_watch_interval: float = option(2.0, "seconds between two looks at the --lora-watch folders", least=0.01)
    lora_resolver_root: str = option(
        "", "folder in which an adapter that a request names first is looked for by its name"
    )
    lora_resolver: str = option(
        "", "MODULE:FUNCTION that gives the path (in a --lora-root folder) of an adapter that a request names first"
    )
    max_lora_resolving: int = option(8, "most adapters being looked for and loaded by a resolver at a time", least=1)
    max_body_mib: float = option(
        0.0,
        "largest request body, in MiB; 0: 64 bytes for each token of the context, at least 2 MiB",
        least=0,
        section="Limits of requests",
    )
    body_timeout: float = option(60.0, "seconds that a client may take to send a request's body; 0: any", least=0)
    max_prompts: int = option(256, "most prompts times n in one request", least=1)
    max_program_calls: int = option(256, "most calls of one program (/v1/programs)", least=1)
    max_program_tokens: int = option(
        262_144, "most tokens of all prompts and answers of one program; 0: any number", least=0
    )
    request_timeout: float = option(0.0, "seconds after which a request is aborted; 0: never", least=0)
    stream_timeout: float = option(
        60.0, "seconds that a client may leave a stream unread before it is disconnected; 0: any", least=0
    )
    drain_timeout: float = option(
        60.0,
        "seconds that SIGTERM waits for requests in flight",
        least=0,
        section="The life of the server and its engine process",
    )
    on_engine_death: str = option("restart", "what to do when the engine process dies", ("restart", "exit"))
    engine_timeout: float = option(
        300.0, "seconds without an answer after which the engine process is taken for dead; 0: never", least=0
    )
    health_timeout: float = option(
        30.0, "seconds without an answer of the engine process after which /health says 503; 0: any", least=0
    )
    state: str = option(
        "",
        "file in which changes over the API (scheduler, adapters, pins) are kept, to hold again when the server is "
        "started anew; empty: they last as long as the server",
    )
    max_metric_adapters: int = option(
        16, "most adapters with metric labels of their own; the rest share one", least=0, section="Metrics and logs"
    )
    metrics_interval: float = option(1.0, "seconds for which a page of /metrics is served again", least=0)
    log_level: str = option("info", "least serious messages that are logged", ("debug", "info", "warning", "error"))
    log_format: str = option("text", "form of a line of the log, on stderr", ("text", "json"))
    log_requests: bool = option(
        True,
        "log a line for each request, with its seconds by part: answers, changes and errors at info, probes and "
        "look-ups at debug",
    )
    log_prompts: bool = option(False, "have the log of requests hold the beginning of each prompt")
    otlp_traces_endpoint: str = option(
        "",
        "URL that spans of answers are sent to by OTLP over HTTP (http://HOST:4318/v1/traces); empty: none are made",
    )
    tasks: TaskConfig = field(default_factory=TaskConfig)
