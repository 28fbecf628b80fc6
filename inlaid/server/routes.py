"""The table of routes: everything that the server answers, in one place."""

from __future__ import annotations

from typing import Any

from inlaid.server import admin, info, manners, native, replicas, tasks
from inlaid.server.chat import chat_completions
from inlaid.server.completions import completions
from inlaid.server.messages import count_tokens, create_message
from inlaid.server.programs import programs
from inlaid.server.protocol.admin import (
    AdapterList,
    LoadAdapterBody,
    ReplicaList,
    SchedulerBody,
    StepList,
    UnloadAdapterBody,
)
from inlaid.server.protocol.anthropic import CountBody, InputTokens, MadeMessage, MessageEvent, MessagesBody
from inlaid.server.protocol.chat import ChatBody, ChatChunk, ChatCompletion
from inlaid.server.protocol.console import ChangeAdapterBody, ChangedAdapter
from inlaid.server.protocol.info import (
    DetokenizeBody,
    Detokenized,
    Health,
    Load,
    ModelCard,
    ModelList,
    TokenizeBody,
    Tokens,
    Version,
)
from inlaid.server.protocol.openai import Completion, CompletionBody
from inlaid.server.protocol.programs import ProgramAnswer, ProgramBody, ProgramEvent
from inlaid.server.protocol.responses import DeletedResponse, Response, ResponseBody, ResponseEvent
from inlaid.server.protocol.sglang import Generation, LoadResult, ModelSummary, NativeBody, ServerInfo
from inlaid.server.protocol.tasks import AddTaskBody, BaseCard, TaskCard, TaskList
from inlaid.server.responses import create_response, delete_response, get_response
from inlaid.server.route import Guard, Route
from inlaid.server.uploads import load_adapter_from_tensors

ROUTES = (
    Route(
        "POST",
        "/v1/completions",
        completions,
        body=CompletionBody,
        answers=(Completion, Completion),
        answering=True,
    ),
    Route(
        "POST",
        "/v1/chat/completions",
        chat_completions,
        body=ChatBody,
        answers=(ChatCompletion, ChatChunk),
        answering=True,
    ),
    Route(
        "POST",
        "/generate",
        native.generate,
        body=NativeBody,
        answers=(Generation | list[Generation], Generation),
        answering=True,
    ),
    Route(
        "POST",
        "/v1/responses",
        create_response,
        body=ResponseBody,
        answers=(Response, ResponseEvent),
        answering=True,
    ),
    Route("GET", "/v1/responses/{name}", get_response, answers=(Response,)),
    Route("DELETE", "/v1/responses/{name}", delete_response, answers=(DeletedResponse,)),
    Route(
        "POST",
        "/v1/messages",
        create_message,
        body=MessagesBody,
        answers=(MadeMessage, MessageEvent),
        answering=True,
    ),
    Route("POST", "/v1/messages/count_tokens", count_tokens, body=CountBody, answers=(InputTokens,)),
    Route("POST", "/v1/embeddings", manners.embeddings),
    Route("POST", "/v1/moderations", manners.moderations),
    Route(
        "POST",
        "/v1/programs",
        programs,
        body=ProgramBody,
        answers=(ProgramAnswer, ProgramEvent),
        answering=True,
        strict=True,
    ),
    Route("GET", "/v1/models", info.models, answers=(ModelList,)),
    Route("GET", "/v1/models/{name:.+}", info.model, answers=(ModelCard,)),
    Route("POST", "/tokenize", info.tokenize, body=TokenizeBody, answers=(Tokens,)),
    Route("POST", "/detokenize", info.detokenize, body=DetokenizeBody, answers=(Detokenized,)),
    Route("GET", "/health", info.health, Guard.OPEN, answers=(Health,)),
    Route("GET", "/ready", info.ready, Guard.OPEN, answers=(Health,)),
    Route("GET", "/health_generate", info.health_generate, answers=(Health,)),
    Route("GET", "/version", info.version, Guard.OPEN, answers=(Version,)),
    Route("GET", "/get_model_info", info.model_info, answers=(ModelSummary,)),
    Route("GET", "/model_info", info.model_info, answers=(ModelSummary,)),
    Route("GET", "/get_server_info", native.server_info, answers=(ServerInfo,)),
    Route("GET", "/server_info", native.server_info, answers=(ServerInfo,)),
    Route("GET", "/ping", info.health, Guard.OPEN, answers=(Health,)),
    Route("GET", "/load", manners.load, answers=(Load,)),
    Route("GET", "/tokenizer_info", manners.tokenizer_info, answers=(dict[str, Any],)),
    Route("GET", "/docs", manners.docs, Guard.OPEN, text="text/html"),
    Route("POST", "/reset_prefix_cache", manners.reset_prefix_cache, Guard.OPERATOR, text="text/plain"),
    Route("POST", "/start_profile", manners.start_profile, Guard.ADMIN, text="text/plain"),
    Route("POST", "/stop_profile", manners.stop_profile, Guard.ADMIN, text="text/plain"),
    Route("POST", "/flush_cache", native.flush_cache, Guard.OPERATOR, text="text/plain"),
    Route("GET", "/metrics", info.metrics, Guard.OPEN, text="text/plain"),
    Route("GET", "/v1/adapters", admin.list_adapters, answers=(AdapterList,)),
    Route("POST", "/v1/load_lora_adapter", admin.load_adapter, Guard.ADMIN, LoadAdapterBody, text="text/plain"),
    Route("POST", "/v1/unload_lora_adapter", admin.unload_adapter, Guard.ADMIN, UnloadAdapterBody, text="text/plain"),
    Route("POST", "/v1/change_lora_adapter", admin.change_adapter, Guard.ADMIN, ChangeAdapterBody, (ChangedAdapter,)),
    Route(
        "POST",
        "/v1/load_lora_adapter_from_tensors",
        load_adapter_from_tensors,
        Guard.ADMIN,
        answers=(LoadResult,),
    ),
    Route(
        "POST",
        "/load_lora_adapter",
        admin.load_adapter_sglang,
        Guard.ADMIN,
        LoadAdapterBody,
        (LoadResult,),
    ),
    Route(
        "POST",
        "/unload_lora_adapter",
        admin.unload_adapter_sglang,
        Guard.ADMIN,
        UnloadAdapterBody,
        (LoadResult,),
    ),
    Route("GET", "/v1/tasks", tasks.list_tasks, Guard.ADMIN, answers=(TaskList,)),
    Route("POST", "/v1/tasks", tasks.add_task, Guard.ADMIN, AddTaskBody, (TaskCard,)),
    Route("GET", "/v1/tasks/{name}", tasks.get_task, Guard.ADMIN, answers=(TaskCard,)),
    Route("DELETE", "/v1/tasks/{name}", tasks.delete_task, Guard.ADMIN, answers=(TaskCard,)),
    Route("POST", "/v1/tasks/{name}/switch", tasks.switch_task, Guard.ADMIN, answers=(TaskCard,)),
    Route("GET", "/v1/base", tasks.get_base, Guard.ADMIN, answers=(BaseCard,)),
    Route("POST", "/v1/base/rollback", tasks.rollback, Guard.ADMIN, answers=(BaseCard,)),
    Route("GET", "/v1/replicas", replicas.list_replicas, Guard.OPERATOR, answers=(ReplicaList,)),
    Route("POST", "/v1/replicas", replicas.add_replica, Guard.ADMIN, answers=(ReplicaList,)),
    Route("DELETE", "/v1/replicas/{name}", replicas.drain_replica, Guard.ADMIN, answers=(ReplicaList,)),
    Route("GET", "/v1/steps", admin.list_steps, Guard.OPERATOR, answers=(StepList,)),
    Route("GET", "/v1/scheduler", admin.get_scheduler, Guard.OPERATOR, answers=(dict[str, Any],)),
    Route("PUT", "/v1/scheduler", admin.put_scheduler, Guard.ADMIN, SchedulerBody, (dict[str, Any],)),
    Route(
        "GET",
        "/v1/fairness",
        admin.fairness,
        Guard.OPERATOR,
        answers=(dict[str, Any],),
        query=(("window", {"type": "number", "exclusiveMinimum": 0}),),
    ),
)
