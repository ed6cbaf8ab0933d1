#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""copilot_proxy: one local address for every AI client, on your own GitHub Copilot subscription.

One file, standard library only, Python 3.9 and up. It listens on 127.0.0.1:4141 and speaks OpenAI Chat
Completions, OpenAI Responses, Anthropic Messages and Gemini, so Claude Code, Codex, opencode, Gemini CLI,
Aider, Cursor and any SDK can use any model of the account that signed in.

    python copilot_proxy.py start            # serve; prints how to sign in when nobody has
    python copilot_proxy.py start --demo     # a built-in model: no account, no network
    python copilot_proxy.py auth login       # sign in to GitHub and leave
    python copilot_proxy.py config           # effective settings and where each comes from
    python -m copilot_proxy start            # the same from cached bytecode: faster start, less memory

The way of one request (rooms in brackets):

    accept     [Server]    read head and body, with limits; nothing else touches the client's socket
    route      [Server]    ROUTES: path -> dialect and operation
    admit      [Server]    Host, Origin, API key
    read       [codecs]    JSON -> Request, for decisions and translation
    interpret  [Agents]    session, prompt, initiator, sub-agent, compaction, vision
    plan       [Catalog]   asked name -> model -> upstream dialect; then permit: rate limit, approval
    shape      [codecs]    the client's own body where the model speaks its dialect, else Request in upstream's;
                           edited where a row of QUIRKS says so
    send       [Upstream]  fresh token, pooled socket, retries only before the first byte
    relay      [Gateway]   upstream's bytes, or events decoded and encoded anew, whole frames at a time, metered
    record     [Ledger]    one row per exchange, however it ended

The rooms, in order. A definition uses names of its own room or of rooms above, never below. Up to Agents
everything is pure: data in, data out, no sockets, files, clock or threads.

    Masthead            imports, version, the few constants that several rooms share
    Vocabulary          blocks, messages, requests, usage; what was planned and how it went
    Errors              the three roots, and the one classification of failures
    Wire                JSON with limits, HTTP heads, chunks, server-sent events, redaction
    Stream algebra      the hub: what every codec promises, streams as events, carriers, tools flattened
    OpenAI Chat         codec of /v1/chat/completions
    OpenAI Responses    codec of /v1/responses
    Anthropic Messages  codec of /v1/messages
    Gemini              codec of the generateContent family
    Quirks              one row per named deviation of an upstream
    Tokens              estimates for text, images, documents and whole requests, corrected by what was billed
    Catalog             codecs by dialect, model records, name resolution, planning
    Agents              who is calling and why
    State               directories, settings, atomic files, locks, logs
    Upstream            the one outbound door: opener, pool, byte pump, retries, the watch thread
    Accounts            GitHub tokens, device sign-in, Copilot tokens
    Providers           how one upstream is addressed: hosts, headers, paths; the demo model
    Ledger              usage and requests in SQLite, one writer
    Gateway             the steps above, from read to record
    Server              routes, keys, origin checks, the HTTP handler
    Console             the page
    Clients             set-up of client programs
    Command line        commands, composition of the parts, main
"""
from __future__ import annotations

import base64
import binascii
import codecs
import email.utils
import errno
import gc
import hashlib
import hmac
import importlib
import ipaddress
import json
import math
import os
import queue
import random
import re
import select
import selectors
import signal
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
import urllib.request
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from http.server import ThreadingHTTPServer
from json.encoder import encode_basestring_ascii
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit
from typing import (Any, Callable, Deque, Dict, FrozenSet, Iterable, Iterator, List, NamedTuple, Optional, Pattern, Sequence, Set, Tuple,
                    Union)

###############################################################################
#                                  Masthead                                   #
###############################################################################
# What several rooms share and nothing else.

VERSION = "0.1.0"

Json = Dict[str, Any]  # a decoded wire body

CHAT, RESPONSES, MESSAGES, GEMINI = "chat", "responses", "messages", "gemini"  # dialects
EMBEDDINGS = "embeddings"  # not a dialect: an operation of its own with OpenAI's error shape

# One read from a socket. Below 64 KB full-speed streams cost up to half more, above it nothing is
# gained (measured 2026-11-21, 32 streams).
READ_BYTES = 65536


###############################################################################
#                                 Vocabulary                                  #
###############################################################################
# The words of the hub: what a conversation is made of, what a request asks,
# what was planned for it and how it went.
#
# `None` means "not said"; an empty value means "said, and empty". Every block
# lists last what it may carry besides: `cache` (a cache breakpoint as sent),
# `seal` (a signature bound to this very block), `origin` (who made the opaque
# parts: first 12 hex of sha256(provider|account|model)) and `extra` (fields of
# its source that no other dialect knows; re-emitted only by name).


class Value:
    """Equality and representation by fields, for all dataclasses here. `dataclass` would compile both anew for every
    class, which is half of what it costs: 13 of 30 ms at start (measured 2026-11-26)."""

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if other.__class__ is self.__class__ else NotImplemented

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


@dataclass(eq=False, repr=False)
class Text(Value):
    """Words."""

    text: str
    citations: Optional[List[Json]] = None
    phase: Optional[str] = None  # Responses: commentary | final_answer
    cache: Optional[Json] = None
    seal: Optional[str] = None
    origin: Optional[str] = None
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class Image(Value):
    """An image by base64 `data` (with its media type), by `url`, or by a `file_id` of the origin."""

    media_type: Optional[str] = None
    data: Optional[str] = None
    url: Optional[str] = None
    file_id: Optional[str] = None
    detail: Optional[str] = None
    cache: Optional[Json] = None
    seal: Optional[str] = None
    origin: Optional[str] = None
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class File(Value):
    """A document: base64 `data`, a `url`, plain `text`, or a `file_id` of the origin."""

    media_type: Optional[str] = None
    data: Optional[str] = None
    url: Optional[str] = None
    text: Optional[str] = None
    file_id: Optional[str] = None
    name: Optional[str] = None
    cache: Optional[Json] = None
    seal: Optional[str] = None
    origin: Optional[str] = None
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class Thinking(Value):
    """Reasoning of the model: readable `text`, a `signature`, or only `redacted` data."""

    text: str = ""
    signature: Optional[str] = None
    redacted: Optional[str] = None
    id: Optional[str] = None
    cache: Optional[Json] = None
    seal: Optional[str] = None
    origin: Optional[str] = None
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class ToolCall(Value):
    """A call; `arguments` stays the JSON (or free-form) string it was on the wire."""

    id: str
    name: str
    arguments: str
    kind: str = "function"  # function | custom | search | server
    namespace: Optional[str] = None
    cache: Optional[Json] = None
    seal: Optional[str] = None
    origin: Optional[str] = None
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class ToolResult(Value):
    """What a call gave."""

    call_id: str
    content: List[Block]
    is_error: Optional[bool] = None
    kind: str = "function"
    cache: Optional[Json] = None
    seal: Optional[str] = None
    origin: Optional[str] = None
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class ToolReference(Value):
    """The name of a deferred tool that a search found."""

    name: str
    cache: Optional[Json] = None
    seal: Optional[str] = None
    origin: Optional[str] = None
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class Compaction(Value):
    """What stands for the conversation so far: `sealed` by its origin, or a readable `summary`."""

    sealed: Optional[str] = None
    summary: Optional[str] = None
    id: Optional[str] = None
    cache: Optional[Json] = None
    seal: Optional[str] = None
    origin: Optional[str] = None
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class Refusal(Value):
    """Words that decline."""

    text: str
    cache: Optional[Json] = None
    seal: Optional[str] = None
    origin: Optional[str] = None
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class Opaque(Value):
    """A block only its own dialect knows, kept as it came."""

    kind: str
    raw: Any
    cache: Optional[Json] = None
    seal: Optional[str] = None
    origin: Optional[str] = None
    extra: Optional[Json] = None


Block = Union[Text, Image, File, Thinking, ToolCall, ToolResult, ToolReference, Compaction, Refusal, Opaque]


@dataclass(eq=False, repr=False)
class Message(Value):
    """One side's turn, or part of it. `role`: system | developer | user | assistant.

    Tool results live in user messages, whatever their place on the wire.
    """

    role: str
    content: List[Block]
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class Tool(Value):
    """What the model may call."""

    name: str
    description: Optional[str] = None
    schema: Optional[Json] = None
    kind: str = "function"  # function | custom | search | server
    namespace: Optional[str] = None
    deferred: Optional[bool] = None
    strict: Optional[bool] = None
    grammar: Optional[Json] = None
    cache: Optional[Json] = None
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class ToolChoice(Value):
    """Which tool the model may or must call. `mode`: auto | none | required | tool (the one named)."""

    mode: str
    name: Optional[str] = None
    namespace: Optional[str] = None
    kind: str = "function"


@dataclass(eq=False, repr=False)
class Reasoning(Value):
    """How the model is asked to think.

    `mode`: off | on (a budget) | adaptive; `effort`: none minimal low medium high xhigh max; `budget` in tokens;
    `visible`: whether its text is wanted; `summary`: Responses' auto | concise | detailed.
    """

    mode: Optional[str] = None
    effort: Optional[str] = None
    budget: Optional[int] = None
    visible: Optional[bool] = None
    summary: Optional[str] = None


@dataclass(eq=False, repr=False)
class OutputFormat(Value):
    """The structure the answer must have; without `schema` any JSON object."""

    schema: Optional[Json] = None
    name: Optional[str] = None
    strict: Optional[bool] = None
    description: Optional[str] = None


@dataclass(eq=False, repr=False)
class Request(Value):
    """What a generation request asks, in canonical form (see `canonical`)."""

    model: str
    messages: List[Message]
    tools: List[Tool] = field(default_factory=list)
    tool_choice: Optional[ToolChoice] = None
    parallel_tools: Optional[bool] = None
    stream: bool = False
    max_tokens: Optional[int] = None
    stop: Optional[List[str]] = None
    temperature: Optional[float] = None
    top_p: Optional[float] = None
    top_k: Optional[int] = None
    seed: Optional[int] = None
    presence_penalty: Optional[float] = None
    frequency_penalty: Optional[float] = None
    logprobs: Optional[int] = None  # how many alternatives per token, 0: only the token itself
    reasoning: Optional[Reasoning] = None
    output: Optional[OutputFormat] = None
    verbosity: Optional[str] = None
    user: Optional[str] = None  # Messages: `metadata.user_id`
    metadata: Optional[Json] = None
    cache_key: Optional[str] = None  # `prompt_cache_key`
    extra: Optional[Json] = None


@dataclass(eq=False, repr=False)
class Reply(Value):
    """A whole answer. `stop_reason` is a meaning of STOP_REASONS; `created_at` in Unix seconds, 0 unknown."""

    id: str = ""
    model: str = ""
    created_at: int = 0
    content: List[Block] = field(default_factory=list)
    stop_reason: str = "end"
    stop_sequence: Optional[str] = None
    usage: Optional[Usage] = None
    extra: Optional[Json] = None


class Event:
    """One item of the hub's stream. Plain slotted classes: they are made a million times a minute."""

    __slots__: Tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


class ReplyStart(Event):
    """First of every stream; `usage` is what is known (or estimated) of the prompt."""

    __slots__ = ("id", "model", "created_at", "usage")

    def __init__(self, id: str, model: str, created_at: int = 0, usage: Optional[Usage] = None) -> None:
        self.id = id
        self.model = model
        self.created_at = created_at
        self.usage = usage


class BlockStart(Event):
    """A block opens under an index of its own; `block` holds what is known: a call's id and name, no text yet."""

    __slots__ = ("index", "block")

    def __init__(self, index: int, block: Block) -> None:
        self.index = index
        self.block = block


class BlockDelta(Event):
    """More of an open block's main text: a text's, a thinking's, a refusal's, or a call's arguments."""

    __slots__ = ("index", "text")

    def __init__(self, index: int, text: str) -> None:
        self.index = index
        self.text = text


class BlockStop(Event):
    """A block is complete. `block` is its final form where only the end tells it (signature, id, citations); None
    when start and deltas say it all."""

    __slots__ = ("index", "block")

    def __init__(self, index: int, block: Optional[Block] = None) -> None:
        self.index = index
        self.block = block


class ReplyStop(Event):
    """Last of a good stream."""

    __slots__ = ("reason", "usage", "sequence")

    def __init__(self, reason: str, usage: Optional[Usage] = None, sequence: Optional[str] = None) -> None:
        self.reason = reason
        self.usage = usage
        self.sequence = sequence


class Fault(Event):
    """Last of a stream that failed."""

    __slots__ = ("failure",)

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


class Used(Event):
    """What has been used so far, where upstream says it before the end. Nothing for the client: if the stream breaks off, it is billed."""

    __slots__ = ("usage",)

    def __init__(self, usage: Usage) -> None:
        self.usage = usage


class Pulse(Event):
    """Upstream is alive, nothing else."""

    __slots__ = ()


class Frame:
    """One server-sent event as on the wire."""

    __slots__ = ("event", "data")

    def __init__(self, event: Optional[str], data: str) -> None:
        self.event = event
        self.data = data

    def __eq__(self, other: object) -> bool:
        return type(other) is Frame and self.event == other.event and self.data == other.data

    def __repr__(self) -> str:
        return f"Frame({self.event!r}, {self.data!r})"


class Names:
    """Tool names as an upstream gets them, and the way back: flattened namespaces, other kinds, over 64 characters.

    Written while a request is flattened, read while its answer is decoded.
    """

    LONGEST = 64  # characters; OpenAI and Anthropic refuse more

    def __init__(self) -> None:
        self._full: Dict[str, Tuple[str, Optional[str], str]] = {}

    def shorten(self, name: str, namespace: Optional[str] = None, kind: str = "function") -> str:
        """The wire name of a tool; the same for the same tool, never one for two."""
        full = (name, namespace, kind)
        wire = re.sub(r"[^A-Za-z0-9_-]", "_", f"{namespace}__{name}" if namespace else name) or "tool"
        if len(wire) > self.LONGEST or self._full.get(wire, full) != full:
            digest = hashlib.sha256(repr(full).encode("utf-8", "replace")).hexdigest()[:8]
            wire = f"{wire[:self.LONGEST - 9]}_{digest}"
        self._full[wire] = full
        return wire

    def restore(self, wire: str) -> Tuple[str, Optional[str], str]:
        """(name, namespace, kind) behind a wire name; a name nobody shortened is itself."""
        return self._full.get(wire, (wire, None, "function"))

    def renamed(self) -> Dict[str, str]:
        """The wire names that are not a tool's own, and what it is called."""
        return {wire: full[0] for wire, full in self._full.items() if wire != full[0]}


@dataclass(eq=False, repr=False)
class Usage(Value):
    """Tokens of one answer. `cache_read` and `cache_write` are disjoint parts of `input`; `reasoning` is part
    of `output`; `billed_nano` is what upstream says it charged (1e9 = one AI credit); `estimated`: counted here, because
    upstream was not heard to its end."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0
    billed_nano: Optional[int] = None
    estimated: bool = False

    @property
    def total(self) -> int:
        """All tokens of the exchange."""
        return self.input + self.output


@dataclass(eq=False, repr=False)
class Caller(Value):
    """Who is calling and why; each decision stands beside its reason."""

    client: str = ""
    session_id: Optional[str] = None  # UUID derived from what the client calls its session
    session_reason: str = "none"
    prompt_id: str = ""  # UUID shared by all requests of one human prompt
    prompt_reason: str = ""
    initiator: str = "user"
    initiator_reason: str = ""
    interaction: Optional[str] = None  # conversation-subagent | conversation-compaction
    subagent: Optional[Json] = None  # {"session_id", "agent_id", "agent_type"}
    compaction: int = 0  # 0 none, 1 summary request, 2 automatic continuation
    vision: bool = False


@dataclass(eq=False, repr=False)
class ImageLimits(Value):
    """What the images of a request may be; None is not said. The count is of the newest."""

    bytes: Optional[int] = None  # decoded
    pixels: Optional[int] = None  # of the longest side
    count: Optional[int] = None


@dataclass(eq=False, repr=False)
class Plan(Value):
    """What was decided for one request before anything was sent."""

    dialect: str  # the client's
    operation: str = "generate"
    asked_model: str = ""
    model: str = ""
    model_reason: Optional[str] = None  # alias, mapping ...; None when the name was exact
    record: Optional[Json] = None  # the catalogue's entry
    upstream_dialect: str = ""
    provider: str = "copilot"
    road: str = "pass-through"
    stream: bool = False
    asked_at: int = 0  # Unix seconds
    choices: int = 1  # answers asked for at once (`n` of Chat)
    assembled: bool = False  # a whole answer was asked for, and is put together from a stream of upstream's
    caller: Caller = field(default_factory=Caller)
    betas: List[str] = field(default_factory=list)
    long_context: bool = False  # the client asked for the window of a million tokens
    names: Names = field(default_factory=Names)  # tool names as upstream gets them
    origin: str = ""  # who reads the state this exchange seals
    image_limits: ImageLimits = field(default_factory=ImageLimits)  # the operator's
    cut_at: Optional[int] = None  # tokens of visible text after which we end the answer; None where upstream does
    edits: List[str] = field(default_factory=list)  # names of the rows that changed something
    dropped: List[str] = field(default_factory=list)  # named to the client
    given_up: Dict[str, str] = field(default_factory=dict)  # models that could not serve, in the order tried -> kind of failure


@dataclass(eq=False, repr=False)
class Exchange(Value):
    """The life of one request: what came, what was decided, how it ended."""

    trace_id: str
    endpoint: str  # chat_completions | responses | messages | embeddings | count_tokens
    method: str = ""
    path: str = ""
    user_agent: str = ""
    started_ms: int = 0  # Unix milliseconds
    plan: Optional[Plan] = None
    account: str = ""
    attempts: int = 0
    status: int = 0
    outcome: str = "unfinished"  # ok | refused | upstream_error | interrupted | client_gone
    failure: Optional[Failure] = None
    usage: Optional[Usage] = None
    served_model: str = ""
    stop_reason: Optional[str] = None
    upstream_request_id: Optional[str] = None
    request_bytes: int = 0
    response_bytes: int = 0
    first_byte_ms: Optional[int] = None
    duration_ms: int = 0


# ---- what names and records of models say ------------------------------------

# The first number or pair of numbers: 4.6, 4-6, 3-5, 5, and Copilot's `claude-opus-41`, `gpt-41-copilot`; no date.
MODEL_VERSION = r"(?<![\d.])(?:([3-9])(\d)|(\d{1,2})(?:[.-](\d{1,2}))?)(?![\dm])"
NEWEST_VERSION = (99, 0)


def model_version(model: str, brand: str) -> Tuple[int, int]:
    """(4, 6) for `claude-opus-4.6`; a name without a number is the newest."""
    found = re.search(MODEL_VERSION, model.lower().partition(brand)[2])
    if found is None:
        return NEWEST_VERSION
    return int(found[1] or found[3]), int(found[2] or found[4] or 0)


def needs_state(model: str) -> bool:
    """Whether a model refuses calls without the state it gave beside them: Gemini from 3 on (copilot-upstream 5.1)."""
    return "gemini" in model.lower() and model_version(model, "gemini") >= (3, 0)


def model_capability(record: Json, *path: str) -> Any:
    """A value inside `capabilities`, None when it is not said."""
    value: Any = record.get("capabilities")
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def model_limit(record: Json, name: str) -> Optional[int]:
    """A limit in tokens (or inputs), None when upstream does not state it."""
    value = model_capability(record, "limits", name)
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 else None


###############################################################################
#                                   Errors                                    #
###############################################################################
# Three roots, and one classification of whatever goes wrong upstream.
#
#     ProxyError            status, kind, message, code, headers; rendered in the caller's dialect
#     +-- ClientError       theirs: bad input, a name nobody has                     default 400
#     +-- UpstreamError     the far side's answer or its absence; holds a Failure    default 502
#     +-- SetupError        the operator's: sign-in, settings, files                 default 500
#     ClientGone            nobody is left to answer (not an error anyone sees)
#
# A Failure is classified once, here; later steps act on the value, never on the text again.


class ProxyError(Exception):
    """An answer that is not the one asked for."""

    status = 500
    final = False  # a refusal of ours that no retry can change

    def __init__(self, message: str, status: Optional[int] = None, code: Optional[str] = None,
                 kind: Optional[str] = None, param: Optional[str] = None,
                 headers: Optional[Dict[str, str]] = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.code = code
        self.kind = kind  # OpenAI's `error.type`; None: by status
        self.param = param
        self.headers = headers or {}


class ClientError(ProxyError):
    status = 400
    final = True


class SetupError(ProxyError):
    status = 500
    final = True


class UpstreamError(ProxyError):
    """What upstream answered, or why there is no answer."""

    status = 502

    def __init__(self, failure: Failure) -> None:
        super().__init__(advised(failure), failure.status, failure.code)
        self.failure = failure
        self.headers = dict(failure.headers)


class ClientGone(Exception):
    """The client closed its side: nothing can be delivered, upstream is stopped."""


@dataclass(eq=False, repr=False)
class Failure(Value):
    """Why one attempt failed.

    `kind`: rate | quota | overflow | auth | policy | transport | model | filter | request
    `scope`: whom it concerns: model | account | provider | request
    `wait_s`: how long upstream asks to wait; `resets_at`: when the limit ends (Unix seconds)
    """

    kind: str
    scope: str
    status: int
    message: str
    code: Optional[str] = None
    wait_s: Optional[float] = None
    resets_at: Optional[float] = None
    overflow: Optional[Tuple[int, int]] = None  # tokens sent, tokens allowed
    transient: bool = False  # the same request may pass in a moment
    lasting: bool = False  # it asks for a longer wait than the operator allows
    renew: bool = False  # a fresh Copilot token (and host) may cure it
    request_id: Optional[str] = None
    headers: Tuple[Tuple[str, str], ...] = ()  # of upstream's answer, those that are relayed
    param: Optional[str] = None  # what upstream says the failure is about
    told: Optional[Tuple[int, Dict[str, str], bytes]] = None  # (status, headers, body) that an error frame stood for; see `dated`


# What an upstream answer means: the first row that fits counts. `statuses` None = any; the pattern is
# searched in code and message together, lower-cased. Source: copilot-upstream 9.2, 6.6, 10.4; the texts are
# upstream's own.
TRANSIENT, RENEW = "transient", "renew"
LIMITS = ("rate", "quota")  # the kinds that end by themselves
FAILURE_ROWS: Tuple[Tuple[Optional[Tuple[int, ...]], str, str, str, str], ...] = (
    # statuses       pattern in "code message"                                       kind         scope       cure
    ((400, 413, 422, 500), r"model_max_prompt_tokens_exceeded|context_length_exceeded|prompt is too long"
     r"|prompt token count of \d+ exceeds|exceeds the context window|too large for model context window"
     r"|maximum context length|input is too long for requested model",                 "overflow",  "request",  ""),
    (None,           r"websocket_(connection|stream)_limit_reached",                   "transport", "provider", TRANSIENT),
    ((400,),         r"unsupported_api_for_model|is not accessible via the",           "model",     "model",    ""),
    ((400,),         r"no_available_model_endpoints",                                  "policy",    "model",    ""),
    ((400, 404),     r"model_not_supported|model_not_found|model is not supported|requested model is not supported",
                                                                                       "model",     "model",    ""),
    ((400, 466),     r"editor-version|copilot-integration-id|personal access tokens are not supported",
                                                                                       "policy",    "provider", ""),
    ((400,),         r"off_topic|cyber_policy",                                        "filter",    "request",  ""),
    ((401,),         r"authorize_url",                                                 "policy",    "account",  ""),
    ((401,),         r"auto-mode selector",                                            "request",   "request",  ""),
    ((401,),         r"",                                                              "auth",      "account",  RENEW),
    ((402,),         r"",                                                              "quota",     "account",  ""),
    ((403, 429),     r"usage_not_included",                                            "policy",    "account",  ""),
    ((403,),         r"not licensed|not authorized to use this copilot feature|denied by copilot policy"
     r"|no_copilot_access|feature_flag_blocked",                                       "policy",    "account",  ""),
    ((403,),         r"quota|monthly limit|premium requests|overage_limit|spend_limit|billing_not_configured|budget",
                                                                                       "quota",     "account",  ""),
    ((403,),         r"rate_limit|rate limit|(?:session|daily|weekly|usage) limit",    "rate",      "account",  ""),
    ((403,),         r"answered with an html page",                                    "policy",    "provider", ""),
    ((403,),         r"endpoint is forbidden",                                         "policy",    "account",  RENEW),
    ((403,),         r"",                                                              "auth",      "account",  RENEW),
    ((404,),         r"",                                                              "model",     "model",    ""),
    ((408, 499),     r"",                                                              "transport", "request",  TRANSIENT),
    ((413,),         r"",                                                              "request",   "request",  ""),
    ((421,),         r"",                                                              "auth",      "account",  RENEW),
    ((422,),         r"",                                                              "filter",    "request",  ""),
    ((429,),         r"too many concurrent",                                           "rate",      "account",  TRANSIENT),
    ((429, 503),     r"quota_exceeded|insufficient_quota|overage_limit|spend_limit|billing_not_configured"
     r"|usage_limit_reached",                                                          "quota",     "account",  ""),
    ((429,),         r"user_model_rate_limited|model_overloaded|agent_mode_limit",     "rate",      "model",    ""),
    ((429,),         r"integration_rate_limited|upstream_provider_rate_limit",         "rate",      "provider", ""),
    ((429,),         r"extension_blocked",                                             "policy",    "account",  ""),
    ((429,),         r"",                                                              "rate",      "account",  ""),
    ((466,),         r"",                                                              "policy",    "provider", ""),
    ((424,),         r"",                                                              "request",   "request",  ""),
    ((500,),         r"",                                                              "transport", "provider", ""),
    ((503,),         r"",                                                              "rate",      "provider", TRANSIENT),
    ((502, 504),     r"",                                                              "transport", "provider", TRANSIENT),
    ((529,),         r"",                                                              "rate",      "provider", ""),
    (None,           r"quota_exceeded|insufficient_quota",                             "quota",     "account",  ""),
    (None,           r"rate_limit|rate limit|overloaded",                              "rate",      "account",  ""),
    (None,           r"",                                                              "request",   "request",  ""),
)

# A span of time as limits state it: `2733`, `1.2s`, `500ms`, `7m12s`, `18h31m10s`, `2 hours 15 minutes`, `3 days`, `an hour`.
# unit -> seconds; the longest words first, so that `ms` is not read as `m`
WAIT_UNITS = {"ms|msecs?|milliseconds?": 0.001, "months?": 2592000.0, "m|mins?|minutes?": 60.0, "s|secs?|seconds?": 1.0,
              "h|hrs?|hours?": 3600.0, "d|days?": 86400.0, "w|weeks?": 604800.0}
SPAN_PART = rf"(?:(?:\d+(?:\.\d+)?|\ban?\b)\s*(?:{'|'.join(WAIT_UNITS)})(?![a-z]))"
SPAN = rf"{SPAN_PART}(?:[\s,]*(?:and\s+)?{SPAN_PART})*|\d+(?:\.\d+)?"
# `Please retry after …`, `try again in …`, `wait …`, `your limit to reset in …`, `will reset after …`, `"resets_in_seconds":…`
PROSE_WAIT = rf"(?i)(?:retry[ _-]after|try again (?:in|after)|retry in|\bwait|\bresets?(?:_| )(?:in|after)(?:_seconds)?)\"?:?\s*({SPAN})"
# `x-ratelimit-reset`, `x-ratelimit-reset-tokens`, `anthropic-ratelimit-unified-reset`; the limits whose rest is not 0 are others
RESET_HEADER = re.compile(r"(?:x-|anthropic-)?ratelimit-(?:[\w-]+-)?reset(?:-\w+)?\Z")
ISO_TIME = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:\.\d+)?(?:Z|([+-])(\d\d):?(\d\d))")
# `resets at 2026-12-01T00:00:00Z`, `until 2026-12-01`, `on December 1, 2026 at 2:00 PM`, `on 1 Dec 2026`; UTC where no zone is named
PROSE_MOMENT = re.compile(r"(?i)\b(?:on|at|until|till|before|after|resets?:?)\s+(?:(\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d:\d\d\S*)?)"
                          r"|(?:(?P<month>[a-z]{3})[a-z]*\.? (?P<day>\d{1,2})|(?P<day2>\d{1,2}) (?P<month2>[a-z]{3})[a-z]*)(?:st|nd|rd|th)?,? (?P<year>\d{4})"
                          r"(?:,? (?:at )?(?P<time>\d{1,2}:\d\d)(?: ?(?P<half>[ap])m)?)?)")
OVERFLOW_NUMBERS = (r"prompt token count of (\d+) exceeds the limit of (\d+)", r"prompt is too long: (\d+) tokens > (\d+) maximum")

# Response headers a client may need; never set-cookie. Source: DESIGN 8, "Relayed response headers".
RELAYED_HEADERS = ("retry-after", "retry-after-ms")
RELAYED_PREFIXES = ("x-ratelimit-", "x-quota-snapshot-", "x-usage-ratelimit-", "openai-", "anthropic-")


def relayed_headers(headers: Dict[str, str]) -> List[Tuple[str, str]]:
    """The part of upstream's response headers that goes on to the client."""
    return [(name, value) for name, value in headers.items()
            if name in RELAYED_HEADERS or name.startswith(RELAYED_PREFIXES)]


def error_text(body: bytes) -> Tuple[str, Optional[str], Optional[Json]]:
    """(message, code, parsed) of an upstream error body: JSON in five shapes, bare text, or HTML.

    {"error":{"message","code"}}   {"type":"error","error":{…}}   {"code","message"}
    {"message","documentation_url"}   {"detail":"…"}   Source: copilot-upstream 9.1, 10.4.
    """
    text = body.decode("utf-8", "replace").strip()
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        return (html_title(text) if text[:1] == "<" else text), None, None
    inner = parsed.get("error")
    inner = inner if isinstance(inner, dict) else parsed
    bare = parsed.get("error")
    message = inner.get("message") or inner.get("detail") or parsed.get("detail") or (bare if isinstance(bare, str) else None) or text
    code = inner.get("code") or inner.get("type") if inner is not parsed else inner.get("code")
    return str(message), str(code) if code else None, parsed


def html_title(page: str) -> str:
    """A sentence in place of an HTML page some middlebox answered with."""
    found = re.search(r"<title[^>]*>([^<]{1,200})", page, re.I)
    title = " ".join(found.group(1).split()) if found else "no title"
    return f"upstream answered with an HTML page ({title}); a proxy or firewall may stand in between"


LONGEST_WAIT_S = 1e9  # beyond it (and for inf and nan) a header says nothing


def stated_wait(headers: Dict[str, str], message: str, now: float) -> Optional[float]:
    """Seconds upstream asks to wait: `retry-after-ms`, `retry-after` as seconds or date, or its own words."""
    found = re.search(PROSE_WAIT, message)
    stated = (seconds_of(headers.get("retry-after-ms"), 0.001), seconds_of(headers.get("retry-after")),
              seconds_until(http_date(headers.get("retry-after")), now), span_of(found.group(1)) if found else None)
    return next((wait for wait in stated if wait is not None), None)


def span_of(text: str) -> Optional[float]:
    """A span of time (SPAN) as seconds, None when it is none."""
    if not re.fullmatch(SPAN, text, re.I):
        return None
    parts = re.findall(r"(\d+(?:\.\d+)?|an?)\s*([a-z]*)", text.lower().replace("and", " "))
    units = [next((seconds for names, seconds in WAIT_UNITS.items() if re.fullmatch(names, unit)), 1.0) for _, unit in parts]
    wait = sum(unit * (float(number) if number[0].isdigit() else 1.0) for (number, _), unit in zip(parts, units))
    return wait if wait < LONGEST_WAIT_S else None


def seconds_of(text: Optional[str], unit_s: float = 1.0) -> Optional[float]:
    """A number of units as seconds, None when it is no usable number."""
    try:
        wait = float(text or "") * unit_s
    except ValueError:
        return None
    return max(0.0, wait) if wait < LONGEST_WAIT_S else None


def http_date(text: Optional[str]) -> Optional[float]:
    """Unix seconds of an HTTP date or an ISO time, None when it is neither."""
    try:
        return float(email.utils.mktime_tz(email.utils.parsedate_tz(text or "") or ()))
    except (ValueError, OverflowError, TypeError, IndexError):
        return iso_time(text or "")


def iso_time(text: str) -> Optional[float]:
    """Unix seconds of the first ISO time with a zone in a text."""
    found = ISO_TIME.search(text)
    if found is None:
        return None
    *when, sign, hours, minutes = found.groups()
    offset = (int(hours) * 3600 + int(minutes) * 60) * (-1 if sign == "-" else 1) if sign else 0
    try:
        return float(email.utils.mktime_tz((*map(int, when), 0, 1, -1, offset)))
    except (ValueError, OverflowError):
        return None


def seconds_until(moment: Optional[float], now: float) -> Optional[float]:
    """Seconds from now until a moment (Unix seconds), None where it is not known."""
    return None if moment is None else max(0.0, moment - now)


def stated_reset(headers: Dict[str, str], parsed: Optional[Json], message: str, now: float) -> Optional[float]:
    """When the limit ends: from `resets_at` of the body, the reset headers of limits with nothing left, or a time in the words."""
    inner = (parsed or {}).get("error")
    named = [moment_of(inner.get("resets_at"), now)] if isinstance(inner, dict) else []
    spent = [moment_of(value, now) for name, value in headers.items()
             if RESET_HEADER.match(name) and headers.get(name.replace("reset", "remaining"), "0") == "0"]
    known = [moment for moment in named if moment is not None] or [moment for moment in spent if moment is not None]
    return max(known) if known else prose_moment(message)


def prose_moment(message: str) -> Optional[float]:
    """Unix seconds of a date in a message's words (PROSE_MOMENT), None where there is none."""
    found = PROSE_MOMENT.search(message)
    if found is None:
        return None
    if found.group(1):
        return iso_time(found.group(1) if "T" in found.group(1) or " " in found.group(1) else found.group(1) + "T00:00:00Z")
    hour, _, minute = (found["time"] or "0:00").partition(":")
    clock = int(hour) % 12 + 12 * (found["half"] in "pP") if found["half"] else int(hour)
    return http_date(f"{found['day'] or found['day2']} {found['month'] or found['month2']} {found['year']} {clock}:{minute}:00 +0000")


def moment_of(value: Any, now: float) -> Optional[float]:
    """Unix seconds of a reset: seconds or milliseconds since 1970, an ISO time, or a span from now on (`30`, `6m0s`)."""
    text = str(value)
    try:
        number = float(text)
    except ValueError:
        span = span_of(text)
        return iso_time(text) if span is None else now + span
    if not 0 <= number < 1e15:
        return None
    if number < LONGEST_WAIT_S:
        return now + number
    return number if number < 1e11 else number / 1000


# Headers that tell how full the buckets of a kind of limit are: `ent=1500&ov=0.0&ovPerm=false&rem=0.0&rst=2026-09-01T00%3A00%3A00Z`
# (copilot-upstream 2.3). In frames the same stands in an object.
BUCKETS = {"quota": "x-quota-snapshot-", "rate": "x-usage-ratelimit-"}
ROLLING = frozenset(("session", "weekly"))


def exhausted_until(kind: str, headers: Dict[str, str]) -> Optional[float]:
    """When the last of the used-up buckets of a kind of limit is full again (Unix seconds)."""
    prefix = BUCKETS.get(kind, "none")
    buckets = [dict(parse_qsl(value)) for name, value in headers.items() if name.startswith(prefix)]
    empty = [bucket for bucket in buckets if bucket.get("ovPerm") != "true" and bucket.get("ent") != "-1" and seconds_of(bucket.get("rem")) == 0]
    return max(filter(None, (iso_time(bucket.get("rst") or "") for bucket in empty)), default=None)


def snapshot_headers(parsed: Optional[Json]) -> Dict[str, str]:
    """The buckets of a body or frame as the headers that say the same on successes:

    {"copilot_quota_snapshots":{"premium_interactions":{"entitlement":"1500","percent_remaining":0,"overage_permitted":false,
     "overage_count":0,"reset_date":"2026-09-01T00:00:00Z"}}}   copilot-upstream 6.6; `entitlement` is a string
    """
    snapshots = (parsed or {}).get("copilot_quota_snapshots")
    headers = {}
    for name, bucket in snapshots.items() if isinstance(snapshots, dict) else ():
        if isinstance(bucket, dict) and re.fullmatch(r"\w{1,40}", name):
            fields = {"ent": bucket.get("entitlement"), "ov": bucket.get("overage_count"), "ovPerm": bucket.get("overage_permitted"),
                      "rem": bucket.get("percent_remaining"), "rst": bucket.get("reset_date")}
            headers[BUCKETS["rate" if name in ROLLING else "quota"] + name.lower()] = "&".join(
                f"{field}={quote(value if isinstance(value, str) else json.dumps(value), safe='', errors='replace')}"
                for field, value in fields.items() if isinstance(value, (str, int, float)))
    return headers


def overflow_numbers(message: str) -> Optional[Tuple[int, int]]:
    """(tokens sent, tokens allowed) where the message names both."""
    for pattern in OVERFLOW_NUMBERS:
        found = re.search(pattern, message)
        if found:
            return int(found.group(1)), int(found.group(2))
    return None


def error_param(parsed: Optional[Json]) -> Optional[str]:
    """`error.param` of an error body."""
    inner = (parsed or {}).get("error")
    param = inner.get("param") if isinstance(inner, dict) else None
    return param if isinstance(param, str) else None


def classify(status: int, headers: Dict[str, str], body: bytes, now: float) -> Failure:
    """The one verdict on an upstream answer that is not a success. `now`: Unix seconds, for dates."""
    if not 400 <= status <= 599:  # a redirect is not followed, a success without an answer is none
        what = " (redirects are refused)" if 300 <= status < 400 else ""
        return Failure("transport", "provider", 502, f"upstream answered {status} instead of an answer{what}", "upstream_status",
                       request_id=headers.get("x-request-id"), headers=tuple(relayed_headers(headers)))
    message, code, parsed = error_text(body)
    haystack = f"{code or ''} {message}".lower()
    if parsed and "authorize_url" in parsed:
        haystack += " authorize_url"
    for statuses, pattern, kind, scope, cure in FAILURE_ROWS:
        if (statuses is None or status in statuses) and re.search(pattern, haystack):
            break
    headers = {**snapshot_headers(parsed), **headers}
    wait = stated_wait(headers, body.decode("utf-8", "replace"), now)
    resets = stated_reset(headers, parsed, message, now)
    if wait is None and resets is None:
        resets = exhausted_until(kind, headers)
    if resets is None and wait is not None:
        resets = now + wait
    if wait is None and resets is not None:
        wait = max(0.0, resets - now)
    return Failure(kind, scope, status, message or f"upstream answered {status} without a text", code,
                   wait_s=wait if kind in LIMITS or status in (408, 503) else None,
                   resets_at=resets if kind in LIMITS else None,
                   overflow=overflow_numbers(message) if kind == "overflow" else None,
                   transient=cure == TRANSIENT, renew=cure == RENEW, param=error_param(parsed),
                   request_id=request_id_of(headers), headers=tuple(relayed_headers(headers)))


def request_id_of(headers: Dict[str, str]) -> Optional[str]:
    """Upstream's name for one exchange."""
    return headers.get("x-request-id") or headers.get("request-id") or headers.get("x-github-request-id")


def dated(failure: Failure, headers: Dict[str, str], now: float) -> Failure:
    """The failure of an error frame with what only the moment and the head of its answer can say; any other as it is."""
    if failure.told is None:
        return failure
    again = classify(*failure.told, now)
    named = {name for name, _ in again.headers}
    return replace(again, told=failure.told, transient=failure.transient, request_id=again.request_id or request_id_of(headers),
                   headers=again.headers + tuple(pair for pair in relayed_headers(headers) if pair[0] not in named))


# What the user can do about a limit or a policy: (kind, pattern in "code message", advice); the first row that fits.
ADVICE = (
    ("quota",  r"free_quota",                     "the free plan's allowance is used up: upgrade the plan, or add another provider"),
    ("quota",  r"billing_not_configured",         "set up billing for Copilot at https://github.com/settings/billing"),
    ("quota",  r"overage|additional_spend",       "raise the spending limit at https://github.com/settings/billing, or use an included model"),
    ("quota",  r"session_quota",                  "this session's allowance is used up: start a new one, or use an included model"),
    ("quota",  r"",                               "use an included model, raise the budget at https://github.com/settings/billing, or wait for the reset"),
    ("policy", r"not licensed|no_copilot_access", "this account has no Copilot seat: see https://github.com/settings/copilot or ask your organization for one"),
    ("policy", r"no_available_model_endpoints",   "allow the model at https://github.com/settings/copilot/features (an organization's owner decides for its seats), or use another"),
    ("policy", r"usage_not_included",             "the plan does not include this: use another model or account"),
    ("policy", r"extension_blocked|terms of service|endpoint is forbidden",
     "GitHub refuses this account or client: stop automated use, then sign in again (python copilot_proxy.py auth login)"),
    ("policy", r"editor-version|client not supported|integration-id",
     "set a newer identity.editorVersion, identity.pluginVersion and identity.userAgent in config.json"),
    ("policy", r"html page",                      "something in front of upstream refuses this client: try another network or proxy, or set identity.userAgent"),
    ("policy", r"personal access token",          "this kind of token cannot be used: sign in with python copilot_proxy.py auth login"),
    ("policy", r"feature|policy",                 "an organization's owner must allow it in the Copilot policies of the organization"),
    ("policy", r"",                               "what this account may do is listed at https://github.com/settings/copilot"),
    ("auth",   r"",                               "sign in again: python copilot_proxy.py auth login, or open /auth/device"),
)


def is_long(failure: Failure) -> bool:
    """Whether a limit lasts so long that nobody should wait for its end."""
    return failure.kind in LIMITS and (failure.lasting or (failure.wait_s or 0) >= LONG_WAIT_S)


def advised(failure: Failure) -> str:
    """Upstream's message, and behind it what to do about a limit or a policy and when the limit ends."""
    if failure.code in (UNREACHABLE, INTERRUPTED):
        return failure.message
    text = f"{failure.code or ''} {failure.message}".lower()
    if failure.status == 466:
        text += " client not supported"
    advice = next((advice for kind, pattern, advice in ADVICE if kind == failure.kind and re.search(pattern, text)), None)
    advice = None if failure.transient else advice  # it passes by itself
    resets = failure.resets_at if is_long(failure) else None
    said = [advice] if advice else []
    said += [f"resets {email.utils.formatdate(resets, localtime=True)}"] if resets else []
    return f"{failure.message} ({'; '.join(said)})" if said else failure.message


LONG_WAIT_S = 60.0  # a shorter wait needs no date, and a client may well wait for its end
UNREACHABLE, INTERRUPTED = "upstream_unreachable", "stream_interrupted"  # codes of transport failures


# Another model may serve where one is limited, overloaded or not to be had; what the request, the account's rights or
# its sign-in are refused for would be refused again.
FALLBACK_KINDS = frozenset(("rate", "quota", "transport", "model"))


def may_fall_back(failure: Failure) -> bool:
    """Whether `fallbacks` concern a failure."""
    return failure.kind in FALLBACK_KINDS or failure.kind == "policy" and failure.scope == "model"


def unreachable(message: str, tries: int = 1, status: int = 504) -> Failure:
    """The failure of a connection: nothing was answered at all."""
    times = "after 1 attempt" if tries == 1 else f"after {tries} attempts"
    return Failure("transport", "provider", status, f"{message} ({times})", UNREACHABLE, transient=True)


###############################################################################
#                                    Wire                                     #
###############################################################################
# Bytes to values and back: JSON, heads, chunks, server-sent events, secrets.
# Nothing here touches a socket.

# ---- JSON -------------------------------------------------------------------

# Deepest nesting of a request. Real bodies stay under 40; 5,000 levels overflow Python 3.9 and parse on 3.13.
MAX_DEPTH = 200
# Longest integer in digits. Python refuses 4,300 and more by itself since 3.9.14; nobody needs 100.
MAX_DIGITS = 100


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _short_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_short_int)


Spans = Dict[str, Tuple[int, int]]  # member of an object -> where its value begins and ends


class ParsedBody(NamedTuple):
    """A request body: its value, where its members lie in the bytes (of large bodies), and whether it can as well be
    written as ASCII: the encoder is twice as fast then, and the few characters beyond it cost less than 2 %."""

    value: Any
    spans: Spans
    as_ascii: bool


def parse_json(raw: bytes) -> Any:
    """The value of JSON bytes; raises ClientError (400) that says where they are broken."""
    return _parse(raw, _STRICT.decode)[0]


def parse_body(raw: bytes) -> ParsedBody:
    """A request body, read once; raises like `parse_json`."""
    if len(raw) < LARGE_BODY:
        return ParsedBody(parse_json(raw), {}, raw.isascii())
    spans: Spans = {}
    value, text = _parse(raw, partial(_decoded_members, spans=spans))
    if raw.startswith(codecs.BOM_UTF8):
        spans.clear()
    beyond = len(raw) - len(text)
    return ParsedBody(value, spans if raw.isascii() else _in_bytes(spans, text, len(raw)), 4 * beyond <= len(raw) // 50)


def _parse(raw: bytes, decode: Callable[[str], Any]) -> Tuple[Any, str]:
    try:
        text = (raw[3:] if raw.startswith(codecs.BOM_UTF8) else raw).decode()
        value = decode(text)
    except RecursionError:
        raise _bad_json(f"nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as exc:
        raise _bad_json(f"not UTF-8 at byte {exc.start}") from exc
    except json.JSONDecodeError as exc:
        raise _bad_json(f"{exc.msg} at line {exc.lineno} column {exc.colno}") from exc
    except ValueError as exc:
        raise _bad_json(str(exc)) from exc
    few = len(raw) < LARGE_BODY and raw.count(b"[") + raw.count(b"{") <= MAX_DEPTH  # of a large body, counting takes longer than looking
    if not few and _is_deep(value):
        raise _bad_json(f"nested deeper than {MAX_DEPTH} levels")
    return value, text


# ---- large bodies -----------------------------------------------------------
# Most edits of a request concern a few members outside its conversation. Its megabytes are then sent as they came: writing
# them anew took 4 ms of 1 MB, 10 of 5 MB (measured 2026-11-26).

LARGE_BODY = 1 << 16
CONVERSATION = frozenset(("messages", "input", "system", "instructions", "tools"))
OBJECT_OPENS = re.compile(r"[ \t\n\r]*\{")
MEMBER_OPENS = re.compile(r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')
MEMBER_ENDS = re.compile(r"[ \t\n\r]*([,}])")


def _decoded_members(text: str, spans: Spans) -> Any:
    """The value of JSON text, member by member so that `spans` tells where each lies; what is no plain object the decoder
    reads by itself, and tells what is wrong with it."""
    value: Json = {}
    place = OBJECT_OPENS.match(text)
    while place is not None and place[0][-1] != "}":
        member = MEMBER_OPENS.match(text, place.end())
        if member is None:
            break
        try:
            value[member[1]], end = _STRICT.scan_once(text, member.end())
        except StopIteration:
            break
        spans[member[1]] = member.end(), end
        place = MEMBER_ENDS.match(text, end)
    else:
        if place is not None and not text[place.end():].strip(" \t\n\r"):
            return value
    spans.clear()
    return _STRICT.decode(text)


def _in_bytes(spans: Spans, text: str, size: int) -> Spans:
    """The place of the largest member in the bytes of a text of that size; the others are written anew."""
    if not spans:
        return {}
    name, (start, end) = max(spans.items(), key=lambda item: item[1][1] - item[1][0])
    return {name: (len(text[:start].encode()), size - len(text[end:].encode()))}


def spliced(raw: bytes, spans: Spans, body: Json) -> bytes:
    """The JSON of an edited body whose conversation is still what it was in `raw`."""
    members = [dump_json(name) + b":" + (raw[slice(*spans[name])] if name in spans and name in CONVERSATION else dump_json(value))
               for name, value in body.items()]
    return b"{" + b",".join(members) + b"}"


def _bad_json(why: str) -> ClientError:
    return ClientError(f"the request body is not valid JSON: {why}", code="invalid_request_body")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level if type(parent) in (dict, list)
                 for child in (parent.values() if type(parent) is dict else parent)
                 if type(child) in (dict, list)]
        if not level:
            return False
    return True


# `json.dumps` builds an encoder at every call that wants other separators: a third of the time of a small object.
_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_COMPACT_ASCII = json.JSONEncoder(separators=(",", ":")).encode


def dump_json(value: Any, ascii_only: bool = False) -> bytes:
    """Compact JSON. `ascii_only` is twice as fast and right for a body that came as ASCII; a lone surrogate
    (an emoji cut in two) can only be said in ASCII."""
    if not ascii_only:
        try:
            return _COMPACT(value).encode()
        except UnicodeEncodeError:
            pass
    return _COMPACT_ASCII(value).encode()


# ---- heads ------------------------------------------------------------------

# A head of more lines is an attack or a loop of proxies. nginx and Apache allow 100 fields.
MAX_HEAD_LINES = 100
TRACE_ID = re.compile(r"\w[\w.-]{0,63}\Z", re.ASCII)


class BadHead(ValueError):
    """A request or response head that must not be believed."""


def parse_head(head: bytes) -> Tuple[str, Dict[str, str]]:
    """(first line, headers with lower-case names); repeated headers are joined by ", ".

    `head` ends before the empty line. Raises BadHead for blanks before the colon, folded lines, two
    different lengths, or a length beside a transfer coding (request smuggling, RFC 9112 6.3).
    """
    lines = head.decode("latin-1").split("\r\n")
    if not head.count(b"\r") == head.count(b"\n") == len(lines) - 1 or b"\0" in head:
        raise BadHead("a bare CR, LF or NUL")
    if len(lines) > MAX_HEAD_LINES:
        raise BadHead(f"more than {MAX_HEAD_LINES} header lines")
    try:
        pairs = [(name.lower(), value.strip(" \t")) for name, value in [line.split(":", 1) for line in lines[1:]]]
    except ValueError:
        raise BadHead("a header line is malformed") from None
    headers = dict(pairs)
    names = "\n".join(headers)
    if "" in headers or (" " in names or "\t" in names) and any(name != name.strip(" \t") for name in headers):
        raise BadHead("a header line is malformed")
    if len(headers) < len(pairs):
        headers = joined_headers(pairs)
    if "transfer-encoding" in headers and "content-length" in headers:
        raise BadHead("Content-Length beside Transfer-Encoding")
    return lines[0], headers


def joined_headers(pairs: Sequence[Tuple[str, str]]) -> Dict[str, str]:
    """Headers of which some come several times; raises BadHead for those that must not."""
    headers: Dict[str, str] = {}
    for name, value in pairs:
        if name in headers:
            if name in ("content-length", "host") and headers[name] != value:
                raise BadHead(f"two different {name} headers")
            value = value if name in ("content-length", "host") else f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def content_length(headers: Dict[str, str]) -> Optional[int]:
    """The declared length in bytes, None when none is declared; raises BadHead."""
    text = headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise BadHead("Content-Length is not a number")
    return int(text)


def format_head(first_line: str, headers: Iterable[Tuple[str, str]]) -> bytes:
    """A head with its empty line. A line break inside a value cannot be sent: it becomes a blank."""
    lines = [first_line, *[f"{name}: {value}" for name, value in headers], "\r\n"]
    head = "\r\n".join(lines)
    if not head.count("\n") == head.count("\r") == len(lines):
        head = "\r\n".join([" ".join(line.split()) if "\n" in line or "\r" in line else line for line in lines[:-1]] + ["\r\n"])
    return head.encode("latin-1", "replace")


def json_object(body: bytes) -> Optional[Json]:
    """The JSON object of an upstream body, None when it is none."""
    try:
        value = json.loads(body.decode().lstrip("\ufeff"))  # of bytes it would first guess the encoding
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ---- chunked bodies ---------------------------------------------------------


CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}\Z")  # int(x, 16) would also take +5, 0x5, 1_0 and blanks


class ChunkDecoder:
    """Takes a chunked body as it arrives and gives its bytes; `done` once the trailers are read.

        size line -> data -> CRLF -> size line ... "0" -> trailers -> done

    Data of an unfinished chunk is given at once: a giant chunk must stream. `rest` holds what followed the
    body (a pipelined request). Raises BadHead for a malformed body.
    """

    __slots__ = ("done", "rest", "_held", "_left", "_trailers", "_trailer_bytes", "_sizes")

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._held = b""  # an incomplete size line, CRLF or trailer line
        self._left = 0  # bytes of the current chunk still to come, CRLF included
        self._trailers = False
        self._trailer_bytes = 0
        self._sizes: Dict[bytes, int] = {}  # of the chunks so far, by their text: looking up is a tenth of parsing

    def feed(self, data: bytes) -> bytes:
        """The body bytes inside `data`."""
        if self._held:
            data, self._held = self._held + data, b""
        pieces: List[bytes] = []
        at, end = 0, len(data)
        while at < end and not self.done:
            if self._left:
                at = self._take(data, at, pieces)
                continue
            if not self._trailers:
                at = self._whole_chunks(data, at, pieces)
                if at == end:
                    break
            line_end = data.find(b"\n", at)
            if line_end < 0:
                self._hold(data[at:])
                break
            if data[line_end - 1:line_end] != b"\r" or line_end == at:
                raise BadHead("a chunk line does not end in CR LF")
            at = self._line(data[at:line_end - 1], line_end + 1)
        if self.done:
            self.rest += data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _whole_chunks(self, data: bytes, at: int, pieces: List[bytes]) -> int:
        """Moves the plain chunks that lie whole in `data` to `pieces`; gives the position behind them.

        What is not plain (a size not seen before, an extension, a cut chunk, the last one) is left to `_line` and
        `_take`. In this loop a chunk costs 0.4 µs instead of 1.6 (measured 2026-11-25).
        """
        find, known, add = data.find, self._sizes.get, pieces.append
        while True:
            line_end = find(b"\r\n", at)
            size = known(data[at:line_end]) if line_end > 0 else None
            if size is None:
                return at
            start = line_end + 2
            stop = start + size
            if data[stop:stop + 2] != b"\r\n":
                return at
            add(data[start:stop])
            at = stop + 2

    def _take(self, data: bytes, at: int, pieces: List[bytes]) -> int:
        """Moves the current chunk's bytes to `pieces`; gives the position behind them."""
        stop = at + self._left
        have = len(data)
        if have >= stop:
            if data[stop - 2:stop] != b"\r\n" and not (self._left == 1 and data[at:stop] == b"\n"):
                raise BadHead("a chunk does not end where its size says")
            if stop - 2 > at:
                pieces.append(data[at:stop - 2])
            self._left = 0
            return stop
        body = min(have, max(at, stop - 2))
        if body > at:
            pieces.append(data[at:body])
        if have > body and data[body:have] != b"\r":
            raise BadHead("a chunk does not end where its size says")
        self._left -= have - at
        return have

    def _line(self, line: bytes, after: int) -> int:
        """Reads a size line or a trailer line; gives the position behind it."""
        if self._trailers:
            self.done = not line
            self._trailer_bytes += len(line)
            if self._trailer_bytes > READ_BYTES:
                raise BadHead("trailers without end")
            return after
        size = line.partition(b";")[0].strip()
        if not CHUNK_SIZE.match(size):
            raise BadHead("a chunk size is not a hexadecimal number")
        length = int(size, 16)
        if length:
            self._left = length + 2
            if len(self._sizes) < 4096:
                self._sizes[size] = length
        else:
            self._trailers = True
        return after

    def _hold(self, part: bytes) -> None:
        if len(part) > READ_BYTES:
            raise BadHead("a chunk size line without end")
        self._held = part


# ---- server-sent events -----------------------------------------------------

FRAME_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")  # the last: a proxy's CR LF behind upstream's LF
LINE_END = re.compile(r"\r\n|\n|\r")  # never str.splitlines: it cuts at U+2028 inside JSON text


def whole_frames_end(data: bytes) -> int:
    """The position behind the last blank line of `data`, 0 when no frame is complete."""
    end = data.rfind(b"\n\n") + 2
    if end == len(data) and end > 1:
        return end
    end = end if end > 1 else 0
    if b"\r" in data:
        end = max(end, data.rfind(b"\n\r\n") + 3 if b"\n\r\n" in data else 0,
                  data.rfind(b"\r\r") + 2 if b"\r\r" in data else 0)
    return end


def split_frames(data: bytes) -> List[bytes]:
    """The frames of `data`, each with the blank line that ends it."""
    if b"\r" not in data:  # a tenth of the time
        parts = data.split(b"\n\n")
        rest = parts.pop()
        return [part + b"\n\n" for part in parts] + ([rest] if rest else [])
    frames, at = [], 0
    for found in FRAME_END.finditer(data):
        frames.append(data[at:found.end()])
        at = found.end()
    if at < len(data):
        frames.append(data[at:])
    return frames


def last_frames(data: bytes, count: int) -> List[bytes]:
    """The last `count` frames of `data`, newest first."""
    if b"\r" in data:
        return split_frames(data)[:-count - 1:-1]
    frames: List[bytes] = []
    end = len(data)
    while end and len(frames) < count:
        start = data.rfind(b"\n\n", 0, end - 1) + 2
        start = start if start > 1 else 0
        frames.append(data[start:end])
        end = start
    return frames


def parse_frame(frame: bytes) -> Tuple[Optional[str], str]:
    """(event, data) of one frame; data is "" for comments. Many data lines are joined by line feeds."""
    event, data = None, []
    for line in LINE_END.split(frame.decode("utf-8", "replace")):
        name, _, value = line.partition(":")
        value = value[1:] if value[:1] == " " else value
        if name == "data":
            data.append(value)
        elif name == "event":
            event = value
    return event, "\n".join(data)


def plain_data(frame: bytes) -> str:
    """The data of a frame of one `data:` line and at most an `event:` line before it, as nearly all are; else ""."""
    event, named, data = frame.partition(b"data: ")
    lines = {b"": 2, b"event: ": 3}.get(event[:7])
    plain = named and frame.count(b"\n") == lines and event[-1:] in (b"", b"\n") and frame[-2:] == b"\n\n" and b"\r" not in frame
    return data[:-2].decode("utf-8", "replace") if plain else ""


def frame_json(frame: bytes) -> Optional[Json]:
    """The JSON object a frame carries, None when it carries none (comments, `[DONE]`, junk)."""
    try:
        value = json.loads(plain_data(frame) or parse_frame(frame)[1])
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# data that does not open as an object, or a frame that does not end as one; one literal in front keeps the search fast
JUNK_DATA = re.compile(rb"\n(?:data: ?[^{ ]|\n(?<!}\n\n)|\r\n(?<!}\r\n\r\n))")
EVENT_FIELD = re.compile(rb"(?m)^(?:event|id|retry):")


# Lines of comments and of Messages' `ping`, and blank ones.
PRELUDE = re.compile(rb'(?::[^\r\n]*\r?\n|event: ?ping\r?\n|data: ?\{"type": ?"ping"\}\r?\n|\r?\n)*')


def is_prelude(frames: bytes) -> bool:
    """Whether frames are only comments, lines without a meaning and pings: upstream is alive and may still refuse."""
    return b"data:" not in frames or PRELUDE.fullmatch(frames) is not None


def without_junk(frames: bytes, end_word: str) -> bytes:
    """Whole frames without those whose data is neither a JSON object nor the word that ends a stream: clients fail on them.
    An object is what opens and ends as one.

    One search tells that there is none (0.1 µs a frame at full speed, where two counts cost 0.2).
    """
    if JUNK_DATA.search(frames) is None and JUNK_DATA.match(b"\n" + frames[:7]) is None:
        return frames
    return b"".join([frame for frame in split_frames(frames) if is_sound(frame, end_word)])


def is_sound(frame: bytes, end_word: str) -> bool:
    """Whether clients can read a frame. An event without data kills OpenAI's SDK (3.57); comments and unknown lines do not."""
    if b"data:" not in frame:
        return EVENT_FIELD.search(frame) is None
    return may_be_data((plain_data(frame) or parse_frame(frame)[1]).strip(), end_word)


def may_be_data(data: str, end_word: str) -> bool:
    """Whether a frame's data is an object or the word that ends a stream."""
    return bool(data) and (data[0] == "{" and data[-1] == "}" or data == end_word)


def is_whole_frame(rest: bytes) -> bool:
    """Whether a stream's rest lacks only the blank line: its data is complete JSON, or `[DONE]`."""
    return parse_frame(rest)[1] == "[DONE]" or frame_json(rest) is not None


def format_sse(event: Optional[str], data: Any) -> bytes:
    """One frame: `event:` line if there is a name, one `data:` line, blank line."""
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + (data.encode() if isinstance(data, str) else dump_json(data)) + b"\n\n"


class FrameBuffer:
    """Cuts a byte stream at blank lines: whole frames leave at once, the rest waits for its end.

    What waits is a list, joined when its frame ends: a 4 MB event glued together read by read is quadratic.
    """

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: List[bytes] = []

    def feed(self, data: bytes) -> bytes:
        """The whole frames that `data` completes, b"" if none."""
        if not self._parts:
            end = whole_frames_end(data)
            if end == len(data):
                return data
        else:
            # The blank line may straddle two reads: the last bytes kept decide together with the first new ones.
            last = self._parts.pop()
            data = last + data
            end = whole_frames_end(data)
        if not end:
            self._keep(data)
            return b""
        whole = b"".join(self._parts) + data[:end] if self._parts else data[:end]
        self._parts = [data[end:]] if end < len(data) else []
        return whole

    def _keep(self, data: bytes) -> None:
        if len(data) > 3:
            self._parts.append(data[:-3])
            data = data[-3:]
        self._parts.append(data)

    def rest(self) -> bytes:
        """The unfinished frame."""
        return b"".join(self._parts)


# ---- secrets ----------------------------------------------------------------


class Secret:
    """A token or key that cannot be printed by accident; `reveal()` gives it to the one header it is for."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself."""
        return self._value

    def matches(self, other: str) -> bool:
        """Whether `other` is the same, in constant time."""
        return hmac.compare_digest(self._value.encode(), other.encode())

    def __bool__(self) -> bool:
        return bool(self._value)

    def __str__(self) -> str:
        return mask(self._value)

    def __repr__(self) -> str:
        return f"Secret({mask(self._value)})"


def mask(value: str) -> str:
    """What may be shown of a secret: its kind, never its value (`ghu_…`, `sk-…`, `***`)."""
    prefix = re.match(r"gh[a-z]_|github_pat_|sk-", value)
    return prefix.group(0) + "…" if prefix else "***"


SECRET_SHAPES = re.compile(
    r"\b(?:gh[opusr]_|github_pat_)[A-Za-z0-9_]{4,}"  # GitHub tokens
    r"|\btid=[^\s\"',]+"  # Copilot tokens
    r"|\bsk-[A-Za-z0-9_-]{8,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"  # JWTs
    r"|(?<=Bearer )[^\s\"',]+|(?<=bearer )[^\s\"',]+|(?<=token )gh[^\s\"',]+")
SECRET_QUERY = re.compile(r"([?&](?:api_key|key|token|access_token)=)[^&\s\"']+", re.I)
SECRET_HEADERS = frozenset(("authorization", "proxy-authorization", "x-api-key", "x-goog-api-key", "cookie",
                            "set-cookie", "api-key"))


def redact(text: str) -> str:
    """The text without anything that looks like a token, a key, or a key in a query string."""
    return SECRET_QUERY.sub(r"\1***", SECRET_SHAPES.sub(lambda found: mask(found.group(0)), text))


# ---- image headers ----------------------------------------------------------

# The first 64 KB of an image hold its size, except in a JPEG with large metadata.
IMAGE_HEAD_BYTES = 65536
# Decoded at once: 1 ms, so that a large payload never holds other threads up.
BASE64_CHARS = 1 << 20


def decode_base64(text: str, limit: Optional[int] = None) -> bytes:
    """The first `limit` bytes (default all) of base64 or base64url text, a data: URL too; b"" if it is not base64."""
    if text.startswith("data:"):
        text = text[text.find(",", 0, 1024) + 1:]
    if limit is not None:
        text = text[:limit * 4 // 3 // 4 * 4]
    if "\n" in text or "-" in text or "_" in text or " " in text:
        text = "".join(text.split()).replace("-", "+").replace("_", "/")
    text += "=" * (-len(text) % 4)
    try:
        return b"".join([binascii.a2b_base64(text[at:at + BASE64_CHARS]) for at in range(0, len(text), BASE64_CHARS)])
    except ValueError:
        return b""


def webp_size(data: bytes) -> Tuple[int, int]:
    """Raises struct.error or IndexError when the header is cut."""
    if data[12:16] == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return (high_w << 16 | low_w) + 1, (high_h << 16 | low_h) + 1
    if data[12:16] == b"VP8L":
        bits, = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def jpeg_size(data: bytes) -> Tuple[int, int]:
    """Walks the segments to the start of frame. Raises struct.error or IndexError when the data ends before it."""
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these have no length
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return 0, 0


def image_size(data: bytes) -> Optional[Tuple[int, int]]:
    """(width, height) in pixels from the header of a PNG, GIF, WebP or JPEG; None if it holds none."""
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            size = struct.unpack_from(">II", data, 16)
        elif data[:4] == b"GIF8":
            size = struct.unpack_from("<HH", data, 6)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            size = webp_size(data)
        elif data[:2] == b"\xff\xd8":
            size = jpeg_size(data)
        else:
            return None
    except (struct.error, IndexError):
        return None
    return size if all(size) else None


def image_size_base64(text: str) -> Optional[Tuple[int, int]]:
    """`image_size` of base64 text. Decodes 64 KB, and the rest only for a JPEG whose metadata is larger."""
    head = decode_base64(text, IMAGE_HEAD_BYTES)
    size = image_size(head)
    if size is None and head[:2] == b"\xff\xd8" and len(text) > len(head) * 4 // 3 + 4:
        size = image_size(decode_base64(text))
    return size


###############################################################################
#                               Stream algebra                                #
###############################################################################
# What every dialect's codec promises, and what a relayed stream teaches on its
# way. The block assembler, sequencer, `collect` and `replay` will stand here.

# What a status is called. Anthropic: API reference "Errors", 2026-09; OpenAI: API reference "Error codes", 2026-09.
#   status: (OpenAI type, Anthropic type)
ERROR_TYPES: Dict[int, Tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    402: ("insufficient_quota", "billing_error"),
    403: ("permission_error", "permission_error"),
    404: ("invalid_request_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error"),
    422: ("invalid_request_error", "invalid_request_error"),
    426: ("invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_error"),
    431: ("invalid_request_error", "invalid_request_error"),
    503: ("service_unavailable", "api_error"),
    504: ("timeout_error", "timeout_error"),
    529: ("service_unavailable", "overloaded_error"),
}


def openai_error(error: ProxyError) -> Json:
    """{"error":{"message","type","param","code"}}: the shape Chat, Responses and our own routes share."""
    failure = getattr(error, "failure", None)
    kind = error.kind or ERROR_TYPES.get(error.status, ("server_error", ""))[0]
    code = error.code
    if failure is not None and failure.kind == "overflow":
        code = "context_length_exceeded"  # what Codex and opencode compact on (clients.md)
    if failure is not None and (failure.kind == "quota" or is_long(failure)):
        kind = "insufficient_quota"  # the word on which clients do not try again (clients.md)
    return {"error": {"message": redact(error.message), "type": kind, "param": error.param, "code": code}}


def objects_in(value: Any) -> List[Json]:
    """The objects of a list; none of anything else."""
    return [member for member in value if isinstance(member, dict)] if isinstance(value, list) else []


class Codec:
    """The contract of a dialect: wire bodies to the hub's values and back.

    Decoding never fails over unknown fields, items or types: they become `extra` and Opaque. A wrong type of a field
    it reads raises ClientError 400 naming the field. Encoding says what the dialect can say and leaves out the rest
    on purpose (LOSSES of the test file lists it).

    `decode_stream` takes batches of frames (all frames of one read) and yields one list of events per batch;
    `encode_stream` takes lists of lawful events and yields lists of frames. Both keep their state in local variables.
    A decoder turns an error frame into a Fault, reads usage wherever it stands, and adds nothing at the end of its
    input: a stream without a terminal is completed by `lawful`. An encoder ends a Fault in its dialect's own way.
    """

    name = ""
    keep_alive = b": keep-alive\n\n"  # what a silent stream sends so that clients go on waiting
    end_word = ""  # the data of a last frame that is no JSON

    def decode_request(self, body: Json) -> Request:
        raise NotImplementedError

    def encode_request(self, request: Request) -> Json:
        raise NotImplementedError

    def decode_reply(self, body: Json) -> Reply:
        raise NotImplementedError

    def encode_reply(self, reply: Reply) -> Json:
        raise NotImplementedError

    def decode_stream(self, batches: Iterable[List[Frame]]) -> Iterator[List[Event]]:
        raise NotImplementedError

    def encode_stream(self, batches: Iterable[List[Event]]) -> Iterator[List[Frame]]:
        raise NotImplementedError

    def encode_error(self, error: ProxyError) -> Json:
        return openai_error(error)

    def decode_usage(self, body: Json) -> Optional[Usage]:
        raise NotImplementedError

    def stop_reason(self, body: Json) -> Optional[str]:
        raise NotImplementedError

    def finish(self, body: Json) -> bool:
        """Says why a whole answer ended where upstream did not, as clients wait or run no tool without (user-pains P31); True
        when the body was changed."""
        return False

    def meter(self, trace_id: str) -> Meter:
        raise NotImplementedError


USAGE_NEEDLE = b'_tokens"'  # in the usage of every dialect; inside JSON text the quote is escaped


class Meter:
    """Reads along one pass-through stream and sees to it that it ends once and legally.

        meter.feed(frames) -> frames to relay      whole frames only, upstream's bytes wherever possible
        meter.close(failure) -> closing frames     after the last read; failure None when upstream ended well

    Learns `usage`, `served_model` and `stop_reason`. Nothing is parsed per frame: the first frames are
    read, the last few reads are kept and read when the stream has ended. `ended` is set once a terminal frame
    has gone out: nothing may follow it. `error` is the failure an error frame of upstream stands for; one of another
    form than the dialect's is held back, and `close` says it.
    """

    # finish chunk, usage chunk, cost chunk and [DONE] may each come in a read of their own
    KEPT_READS = 6
    KEPT_FRAMES = 12  # of these reads: at full speed one holds hundreds, and all of them took 6 ms to parse
    TOLD_BYTES = 2048  # of each read are searched for usage told on the way: a whole one took 50 us

    def __init__(self, trace_id: str) -> None:
        self.trace_id = trace_id
        self.usage: Optional[Usage] = None
        self.served_model = ""
        self.stop_reason: Optional[str] = None
        self.error: Optional[Failure] = None
        self.ended = False
        self._recent: deque = deque(maxlen=self.KEPT_READS)
        self._told = b""  # the last read that spoke of usage

    def feed(self, frames: bytes) -> bytes:
        """Remembers the frames, and gives those to relay."""
        self.keep(frames)
        return self.relayed(frames)

    def relayed(self, frames: bytes) -> bytes:
        """Frames to relay of frames that `keep` was told of."""
        raise NotImplementedError

    def close(self, failure: Optional[Failure]) -> bytes:
        raise NotImplementedError

    def passes(self, around: bytes) -> bool:
        """Whether frames of which only the delta differs, with this around it, go out as they came and teach nothing
        but what `keep` keeps."""
        raise NotImplementedError

    def keep(self, frames: bytes) -> None:
        """Remembers a read; comments alone (upstream's own keep-alives) would push the last frames out."""
        if b"data:" in frames and not self.ended:
            self._recent.append(frames)
            if frames.find(USAGE_NEEDLE, -self.TOLD_BYTES) >= 0:
                self._told = frames

    def _last_told(self) -> Iterator[Json]:
        """The JSON of the last frames that spoke of usage, newest first: where it grows on the way they may be long gone from those kept."""
        told = [frame for frame in split_frames(self._told + b"".join(self._recent)) if USAGE_NEEDLE in frame]
        yield from filter(None, map(frame_json, told[:-self.KEPT_FRAMES - 1:-1]))

    def _last_objects(self) -> Iterator[Json]:
        """The JSON of the frames kept, newest first."""
        for frame in last_frames(b"".join(self._recent), self.KEPT_FRAMES):
            value = frame_json(frame)
            if value is not None:
                yield value


CUT = Failure("transport", "provider", 502, "the upstream connection ended before the answer was complete", INTERRUPTED,
              transient=True)

# The status an error frame would have had as an answer of its own, by its type or code up to a colon. Sources: copilot-upstream 6.6,
# 9.2, 10.4.
STREAM_ERROR_STATUS = {
    **dict.fromkeys((
        "invalid_request_error", "invalid_request_body", "context_length_exceeded", "model_max_prompt_tokens_exceeded", "invalid_prompt",
        "invalid_tool_call_format", "invalid_function_parameters", "invalid_encrypted_content", "invalid_value", "unknown_parameter",
        "unsupported_parameter", "unsupported_value", "unsupported_api_for_model", "model_not_supported", "no_available_model_endpoints",
        "previous_response_not_found", "bad_request"), 400),
    **dict.fromkeys(("authentication_error", "session_expired"), 401),
    **dict.fromkeys(("quota_exceeded", "free_quota_exceeded", "overage_limit_reached", "additional_spend_limit_reached",
                     "session_quota_exceeded", "billing_not_configured", "billing_error"), 402),
    **dict.fromkeys(("permission_error", "usage_not_included"), 403),
    **dict.fromkeys(("not_found_error", "not_found"), 404),
    "user_request_timeout": 408, "request_too_large": 413,
    **dict.fromkeys(("content_filter", "cyber_policy"), 422),
    **dict.fromkeys((
        "rate_limit_error", "rate_limit_exceeded", "rate_limited", "user_model_rate_limited", "user_global_rate_limited",
        "user_weekly_rate_limited", "integration_rate_limited", "model_overloaded", "agent_mode_limit_exceeded",
        "upstream_provider_rate_limit", "extension_blocked", "usage_limit_reached", "insufficient_quota"), 429),
    **dict.fromkeys(("api_error", "server_error", "internal_error"), 500),
    **dict.fromkeys(("server_is_overloaded", "service_unavailable", "slow_down"), 503),
    "overloaded_error": 529,
}
# Limits of a WebSocket, not of the request: a new socket cures them, whatever status the frame names (400, 429).
SOCKET_LIMITS = frozenset(("websocket_connection_limit_reached", "websocket_stream_limit_reached"))
FRAME_MEMBERS = frozenset(("headers", "status", "status_code", "copilot_quota_snapshots", "sequence_number", "event_id"))


def is_error_object(body: Json) -> bool:
    """Whether a body says nothing but an error, as an object, a text, or flat (copilot-upstream 9.1); a Responses object has
    an `error` field too, beside its output."""
    error = body.get("error") or isinstance(body.get("message"), str) and body.get("code")
    return isinstance(error, (dict, str)) and bool(error) and not any(name in body for name in ("choices", "output", "content", "data"))


def stream_failure(body: Json) -> Failure:
    """What an error frame says, as if it had come as an answer of its own; 502 when it names no status.

    {"error":{"message","code"}}   {"type":"error","error":{"type","message"}}   {"type":"error","code","message"}
    {"type":"error","status":429,"error":{…},"headers":{"retry-after":"3600"}}   {…,"copilot_quota_snapshots":{…}}
    """
    inner = body.get("error")
    if isinstance(inner, str):
        inner = {"message": inner}
    elif not isinstance(inner, dict):
        inner = {name: value for name, value in body.items() if name not in FRAME_MEMBERS}
    status = frame_status(body, inner)
    told = {"error": inner, **{name: value for name, value in body.items() if name == "copilot_quota_snapshots"}}
    failure = framed_failure(status or 502, frame_headers(body), dump_json(told))
    return failure if status else replace(failure, transient=False)  # nobody knows whether it would pass


def frame_status(body: Json, inner: Json) -> Optional[int]:
    """The status of an error frame: as it states, by its code or type, or by its words."""
    names = [str(inner.get(key)).partition(":")[0] for key in ("code", "type") if inner.get(key)]
    if not SOCKET_LIMITS.isdisjoint(names):
        return 503
    said = [value for value in (body.get("status"), body.get("status_code"), inner.get("code")) if type(value) is int and 400 <= value <= 599]
    said += [STREAM_ERROR_STATUS[name] for name in names if name in STREAM_ERROR_STATUS]
    return said[0] if said else worded_status(inner)


# Words of answers whose status says the rest (copilot-upstream 9.2).
STATUS_WORDS = ((r"unauthorized", 401), (r"entity too large", 413), (r"misdirected request", 421), (r"responsible ai", 422),
                (PROSE_WAIT, 429), (r"service unavailable", 503))


def worded_status(inner: Json) -> Optional[int]:
    """The status that goes with the words of an error: that of the first row of FAILURE_ROWS they fit."""
    text = f"{inner.get('code') or ''} {inner.get('message') or dump_json(inner).decode()}".lower()
    for statuses, pattern, kind, _, _ in FAILURE_ROWS:
        if pattern and re.search(pattern, text):
            return statuses[0] if statuses and (kind, statuses) != ("rate", (403,)) else 402 if kind == "quota" else 429
    return next((status for pattern, status in STATUS_WORDS if re.search(pattern, text)), None)


def frame_headers(body: Json) -> Dict[str, str]:
    """The `headers` of an error frame: those that could stand in a head."""
    given = body.get("headers")
    pairs = [(name.lower(), str(value)) for name, value in given.items() if isinstance(value, (str, int, float))] if isinstance(given, dict) else []
    return {name: value for name, value in pairs if re.fullmatch(r"[\w-]{1,100}", name, re.A) and re.fullmatch(r"[ -~]{1,2000}", value)}


def framed_failure(status: int, headers: Dict[str, str], body: bytes) -> Failure:
    """The verdict on what a frame tells. There is no clock here: `dated` says later when a limit ends."""
    return replace(classify(status, headers, body, 0.0), resets_at=None, told=(status, headers, body))


# What a WebSocket close code stands for before the answer is complete (RFC 6455, 7.4.1; copilot-upstream 6.6); any other is a cut.
CLOSE_STATUS = {1008: 403, 1009: 413, 1011: 500, 1012: 503, 1013: 503}


def closed_failure(code: int, reason: str) -> Failure:
    """The failure of a WebSocket that upstream closed before its answer was complete; for the transport that is still to come."""
    said = reason or f"upstream closed the WebSocket ({code})"
    status = CLOSE_STATUS.get(code)
    return framed_failure(status, {}, dump_json({"error": {"message": said}})) if status else replace(CUT, message=said)


# ---- meanings ---------------------------------------------------------------

# Why an answer ended. Reading: the first row with the wire word; writing: the row of the meaning.
STOP_REASONS: Tuple[Tuple[str, str, str, Tuple[str, Optional[str]], str], ...] = (
    # meaning     chat              messages                         responses (status, reason)             gemini
    ("end",      "stop",           "end_turn",                      ("completed", None),                   "STOP"),
    ("length",   "length",         "max_tokens",                    ("incomplete", "max_output_tokens"),   "MAX_TOKENS"),
    ("tool",     "tool_calls",     "tool_use",                      ("completed", None),                   "STOP"),
    ("filter",   "content_filter", "refusal",                       ("incomplete", "content_filter"),      "SAFETY"),
    ("stop",     "stop",           "stop_sequence",                 ("completed", None),                   "STOP"),
    ("pause",    "stop",           "pause_turn",                    ("completed", None),                   "STOP"),
    ("overflow", "length",         "model_context_window_exceeded", ("incomplete", "max_output_tokens"),   "MAX_TOKENS"),
    ("tool",     "function_call",  "tool_use",                      ("completed", None),                   "STOP"),
    ("filter",   "content_filter", "refusal",                       ("incomplete", "content_filter"),      "PROHIBITED_CONTENT"),
    ("filter",   "content_filter", "refusal",                       ("incomplete", "content_filter"),      "RECITATION"),
    ("filter",   "content_filter", "refusal",                       ("incomplete", "content_filter"),      "BLOCKLIST"),
    ("filter",   "content_filter", "refusal",                       ("incomplete", "content_filter"),      "SPII"),
    ("filter",   "content_filter", "refusal",                       ("incomplete", "content_filter"),      "IMAGE_SAFETY"),
    ("filter",   "content_filter", "refusal",                       ("incomplete", "content_filter"),      "IMAGE_PROHIBITED_CONTENT"),
    ("filter",   "content_filter", "refusal",                       ("incomplete", "content_filter"),      "MODEL_ARMOR"),
)
STOP_COLUMNS = {CHAT: 1, MESSAGES: 2, RESPONSES: 3, GEMINI: 4}


def stop_meaning(dialect: str, word: Any) -> str:
    """The meaning of a dialect's stop word (Responses: a pair of status and reason); `end` for words nobody knows."""
    column = STOP_COLUMNS[dialect]
    return next((row[0] for row in STOP_REASONS if row[column] == word), "end")


def stop_word(dialect: str, meaning: str) -> Any:
    """The dialect's word for a meaning."""
    column = STOP_COLUMNS[dialect]
    return next((row[column] for row in STOP_REASONS if row[0] == meaning), STOP_REASONS[0][column])


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
EFFORT_BUDGETS = {"minimal": 4096, "low": 4096, "medium": 16000, "high": 24576, "xhigh": 31999, "max": 31999}  # tokens; DESIGN 8


def budget_of_effort(effort: str) -> int:
    """The thinking budget that stands for an effort where only budgets can be said."""
    return EFFORT_BUDGETS.get(effort, EFFORT_BUDGETS["medium"])


def clamped_effort(effort: str, efforts: Sequence[str]) -> str:
    """The nearest effort of a model's list: itself, `max` for a missing `xhigh`, else the next lower, else the lowest."""
    if effort in efforts:
        return effort
    if effort == "xhigh" and "max" in efforts:
        return "max"
    rank = EFFORTS.index(effort) if effort in EFFORTS else len(EFFORTS) if effort == "ultra" else EFFORTS.index("medium")
    known = [listed for listed in EFFORTS if listed in efforts]
    lower = [listed for listed in known if EFFORTS.index(listed) <= rank]
    return (lower or known[:1] or [effort])[-1]


def effort_of_budget(budget: int) -> str:
    """The effort that stands for a budget where only efforts can be said."""
    return "low" if budget <= 8191 else "medium" if budget <= 24575 else "high"


# ---- canonical form ---------------------------------------------------------


def canonical(messages: Iterable[Message]) -> List[Message]:
    """The one form of a conversation: neighbours of one role are one Message, empty ones are gone.

    Tool results stand in user messages; `system` and `developer` keep their place.
    """
    merged: List[Message] = []
    for message in messages:
        if not message.content:
            continue
        if merged and merged[-1].role == message.role:
            merged[-1] = Message(message.role, merged[-1].content + message.content, merged[-1].extra or message.extra)
        else:
            merged.append(message)
    return merged


# ---- streams ----------------------------------------------------------------

_DECODER = json.JSONDecoder()
_scan_json = _DECODER.scan_once  # what `json.loads` ends in, without the steps before it: twice as fast


def load_object(data: str) -> Optional[Json]:
    """The JSON object of a frame's data, None for anything else."""
    try:
        value, end = _scan_json(data, 0)
        if end != len(data):
            value = json.loads(data)
    except (StopIteration, ValueError, RecursionError):  # StopIteration: nothing there
        return None
    return value if type(value) is dict else None


ID_MEMBER = re.compile(rb'"id"\s*:\s*(?P<id>"[^"]*")')


def id_member(frame: bytes, spelled_id: bytes) -> Any:
    """The match of `"id":…` with this value, quotes included; None where there is none. One pattern for every id: a
    compiled one per stream costs more than the search."""
    return next((found for found in ID_MEMBER.finditer(frame) if found.group("id") == spelled_id), None)


def parse_frames(frames: bytes) -> List[Frame]:
    """The frames of one read; comments are left out. Plain `data:` and `event:` + `data:` frames take a short way."""
    found: List[Frame] = []
    text = frames.decode("utf-8", "replace")
    if "\r" in text:
        text = LINE_END.sub("\n", text)
    for part in text.split("\n\n"):
        if part[:6] == "data: " and "\n" not in part:
            found.append(Frame(None, part[6:]))
            continue
        event, gap, data = part.partition("\ndata: ")
        if gap and event[:7] == "event: " and "\n" not in data and "\n" not in event:
            found.append(Frame(event[7:], data))
        elif part:
            name, data = parse_frame(part.encode("utf-8", "surrogatepass"))
            if data:
                found.append(Frame(name, data))
    return found


def format_frames(frames: Iterable[Frame]) -> bytes:
    """Frames as one run of bytes."""
    return format_text("".join([f"event: {frame.event}\ndata: {frame.data}\n\n" if frame.event else f"data: {frame.data}\n\n"
                                for frame in frames]))


def format_text(text: str) -> bytes:
    """JSON text as bytes; a lone surrogate (half an emoji) is escaped."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found.group(0)):04x}", text).encode()


def main_text(block: Block) -> Optional[str]:
    """The text that deltas extend, None for blocks that come whole."""
    return block.arguments if isinstance(block, ToolCall) else block.text if isinstance(block, (Text, Thinking, Refusal)) else None


def with_text(block: Block, text: str) -> Block:
    """The block with another main text."""
    return replace(block, arguments=text) if isinstance(block, ToolCall) else replace(block, text=text)


def collect(batches: Iterable[List[Event]]) -> Reply:
    """The whole answer of a stream; raises UpstreamError for a Fault. Blocks stand in the order they opened."""
    reply = Reply()
    blocks: Dict[int, Block] = {}
    texts: Dict[int, List[str]] = {}
    for events in batches:
        for event in events:
            kind = type(event)
            if kind is BlockDelta:
                texts[event.index].append(event.text)
            elif kind is BlockStart:
                blocks[event.index], texts[event.index] = event.block, [main_text(event.block) or ""]
            elif kind is BlockStop:
                blocks[event.index] = finished(blocks[event.index], "".join(texts[event.index]), event.block)
            elif kind is ReplyStart:
                reply.id, reply.model, reply.created_at, reply.usage = event.id, event.model, event.created_at, event.usage
            elif kind is ReplyStop:
                reply.stop_reason, reply.stop_sequence, reply.usage = event.reason, event.sequence, event.usage or reply.usage
            elif kind is Fault:
                raise UpstreamError(event.failure)
    reply.content = list(blocks.values())
    return reply


def finished(opened: Block, text: str, final: Optional[Block]) -> Block:
    """A block at its end: the final form where there is one, with the text that streamed if it says none."""
    block = opened if final is None else final
    said = main_text(block)
    return block if said is None or final is not None and said else with_text(block, text)


def replay(reply: Reply) -> List[Event]:
    """The events that say a whole answer, each block in one delta."""
    events: List[Event] = [ReplyStart(reply.id, reply.model, reply.created_at, reply.usage)]
    for index, block in enumerate(reply.content):
        text = main_text(block)
        if text is None:
            events += [BlockStart(index, block), BlockStop(index)]
            continue
        events.append(BlockStart(index, opening(block)))
        if text:
            events.append(BlockDelta(index, text))
        events.append(BlockStop(index, block))
    events.append(ReplyStop(reply.stop_reason, reply.usage, reply.stop_sequence))
    return events


def opening(block: Block) -> Block:
    """What is known of a block before its text: no text, no signature."""
    bare = with_text(block, "")
    return replace(bare, signature=None) if isinstance(bare, Thinking) else bare


def lawful(batches: Iterable[List[Event]], trace_id: str) -> Iterator[List[Event]]:
    """The same stream under the hub's grammar, whatever the decoder gave:

        ReplyStart (Pulse | Used | BlockStart i, (BlockDelta i)*, BlockStop i)* (ReplyStop | Fault)

    A missing start is made, open blocks are closed before the end, nothing follows it, a stream without an end
    ends in a Fault. Deltas of blocks that are not open are dropped. What was used so far is the last of a batch, or the last before
    the end: who counts looks nowhere else.
    """
    started = False
    open_blocks: set = set()
    for events in batches:
        lawful_events: List[Event] = []
        used: List[Event] = []
        for event in events:
            kind = type(event)
            if kind is BlockDelta:
                if event.index in open_blocks:
                    lawful_events.append(event)
                continue
            if kind is Used:
                used = [event]
                continue
            if not started and kind is not Pulse:
                started = True
                if kind is not ReplyStart:
                    lawful_events.append(ReplyStart(f"msg_{trace_id}", ""))
            elif kind is ReplyStart:
                continue
            if kind is BlockStart:
                open_blocks.add(event.index)
            elif kind is BlockStop:
                if event.index not in open_blocks:
                    continue
                open_blocks.discard(event.index)
            elif kind is ReplyStop or kind is Fault:
                lawful_events += [BlockStop(index) for index in sorted(open_blocks)]
                lawful_events += [*used, event]
                yield lawful_events
                return
            lawful_events.append(event)
        if lawful_events or used:
            yield lawful_events + used if used else lawful_events
    ending: List[Event] = [] if started else [ReplyStart(f"msg_{trace_id}", "")]
    yield ending + [BlockStop(index) for index in sorted(open_blocks)] + [Fault(CUT)]


RUNAWAY = 20  # line breaks and tabs in a row inside a call's arguments


def guarded(batches: Iterable[List[Event]]) -> Iterator[List[Event]]:
    """The stream, ended by a Fault where a call's arguments run away in line breaks and tabs, which models do
    (gateway-features 8.8): blanks neither count nor reset."""
    runs: Dict[int, int] = {}
    for events in batches:
        for at, event in enumerate(events):
            kind = type(event)
            if kind is BlockStart and isinstance(event.block, ToolCall):
                runs[event.index] = 0
            elif kind is BlockDelta and event.index in runs:
                for part in re.split(r"([\r\n\t ]+)", event.text):
                    runs[event.index] = 0 if part.strip() else runs[event.index] + len(part) - part.count(" ")
                    if runs[event.index] > RUNAWAY:
                        failure = Failure("model", "request", 502, "the model filled a tool call with endless white space")
                        yield [*events[:at], Fault(failure)]
                        return
        yield events


def sequence(batches: Iterable[List[Event]]) -> Iterator[List[Event]]:
    """The stream with one block open at a time, numbered 0, 1, 2 …: for dialects that know no interleaving.

    The first open block streams; what arrives for others waits until it closes.
    """
    current: Optional[int] = None
    number = -1
    waiting: Dict[int, List[Event]] = {}  # in the order the blocks opened
    for events in batches:
        ordered: List[Event] = []
        for event in events:
            kind = type(event)
            if kind is BlockDelta:
                if event.index == current:
                    ordered.append(event if current == number else BlockDelta(number, event.text))
                else:
                    waiting.setdefault(event.index, []).append(event)
                continue
            if kind is not BlockStart and kind is not BlockStop:
                ordered.append(event)
                continue
            if current is None and kind is BlockStart:
                current, number = event.index, number + 1
            if event.index != current:
                waiting.setdefault(event.index, []).append(event)
                continue
            ordered.append(renumbered(event, number))
            if kind is BlockStop:
                current = None
                while waiting and current is None:
                    current = next(iter(waiting))
                    held, number = waiting.pop(current), number + 1
                    ordered += [renumbered(held_event, number) for held_event in held]
                    if type(held[-1]) is BlockStop:
                        current = None
        if ordered:
            yield ordered


def renumbered(event: Any, index: int) -> Event:
    """A block event under another index."""
    if event.index == index:
        return event
    return BlockDelta(index, event.text) if type(event) is BlockDelta else type(event)(index, event.block)


WORD = re.compile(r"\S+\s*|\s+")


class TextCutter:
    """Ends the visible text of one stream where its client said, for an upstream that cannot be told: at a stop sequence,
    or behind `most` tokens as `tokens(text)` counts them. The stream ends there: who waits for upstream's end waits and pays
    for words nobody reads. Usage is upstream's if it has come already, else counted: `prompt()` tokens of input, and what was said.
    """

    def __init__(self, most: Optional[int], stops: Sequence[str], tokens: Callable[[str], int], prompt: Callable[[], int]) -> None:
        self._left: float = float("inf") if most is None else most
        self._stops = [stop for stop in stops if stop]
        self._tokens = tokens
        self._prompt = prompt
        self._heard: List[str] = []  # all that upstream said, visible or not
        self._held: Dict[int, str] = {}  # open text -> its end so far, which may be the beginning of a stop sequence
        self._cut: Optional[ReplyStop] = None

    def stream(self, batches: Iterable[List[Event]]) -> Iterator[List[Event]]:
        """The stream, ended early where it must be."""
        for events in batches:
            kept: List[Event] = []
            for at, event in enumerate(events):
                kept += self._event(event)
                if self._cut is not None:
                    told = [later.usage for later in events[at:] if type(later) is ReplyStop]
                    yield [*kept, ReplyStop(self._cut.reason, told[0] if told else self._counted(), self._cut.sequence)]
                    return
            if kept:
                yield kept

    def _counted(self) -> Usage:
        """Usage as far as it can be known here."""
        return Usage(input=self._prompt(), output=self._tokens("".join(self._heard)), estimated=True)

    def _event(self, event: Any) -> List[Event]:
        kind = type(event)
        if kind is BlockDelta:
            self._heard.append(event.text)
        if kind is BlockStart and isinstance(event.block, Text):
            self._held[event.index] = ""
        elif kind is BlockDelta and event.index in self._held:
            return self._said(event.index, self._held[event.index] + event.text, False)
        elif kind is BlockStop and event.index in self._held:
            rest = self._said(event.index, self._held[event.index], True)
            return rest if self._cut is not None else [*rest, event]
        return [event]

    def _said(self, index: int, text: str, last: bool) -> List[Event]:
        """The delta to pass on of a text that has come; at its `last` nothing is held back."""
        found = min(((text.find(stop), stop) for stop in self._stops if stop in text), default=None)
        held = 0
        if found is not None:
            self._cut, text = ReplyStop("stop", None, found[1]), text[:found[0]]
        elif not last:
            held = max((size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
            text, self._held[index] = text[:len(text) - held], text[len(text) - held:]
        fitting = self._fitting(text)
        if len(fitting) < len(text):
            self._cut = ReplyStop("length")
        return [BlockDelta(index, fitting)] if fitting else []

    def _fitting(self, text: str) -> str:
        """As much of a text as is left to say."""
        if self._left == float("inf"):
            return text
        size = self._tokens(text)
        if size <= self._left:
            self._left -= size
            return text
        fitting = ""
        for word in WORD.findall(text):
            self._left -= self._tokens(word)
            if self._left < 0:
                break
            fitting += word
        return fitting


ID_PREFIXES = {CHAT: "chatcmpl-", RESPONSES: "resp_", MESSAGES: "msg_", GEMINI: ""}


def client_id(dialect: str, own: str, trace_id: str) -> str:
    """The answer's id in the form the client's dialect uses; one of ours when upstream gave none."""
    prefix, own = ID_PREFIXES[dialect], own or trace_id
    return own if own.startswith(prefix) else prefix + own


# ---- carriers ---------------------------------------------------------------

# Thinking signatures and encrypted state mean something only to their origin, and clients only store what they are
# given: what they get is a carrier, padded URL-safe base64 of `cp1` + {"k": kind, "o": origin, "i": item id, "s": signature
# or data, "t": exact thinking text}. google-genai validates base64 and rewrites other alphabets; Anthropic checks the
# text byte by byte while clients drop or split it. Towards Messages clients Responses' state keeps the seeds' shapes
# `<encrypted>@<id>` and `cm1#<encrypted>@<id>` (gateway-features 8.2, 8.5).
CARRIER = "cp1"
CARRIER_HEAD = "Y3Ax"  # how the base64 of the mark begins
SEED_COMPACTION = "cm1#"
PLACEHOLDER = "Thinking..."  # some clients drop a thinking block without text


def origin_of(provider: str, account: str, model: str) -> str:
    """Who may read what it sealed: the first 12 hex of sha256(provider|account|model)."""
    return hashlib.sha256(f"{provider}|{account}|{model}".encode("utf-8", "replace")).hexdigest()[:12]


def state_digest(state: str) -> str:
    """A short name of a sealed state."""
    return hashlib.sha256(state.encode("utf-8", "replace")).hexdigest()[:16]


def seal(kind: str, origin: str, state: str, id: Optional[str] = None, text: str = "") -> str:
    """A carrier."""
    facts = {"k": kind, "o": origin, "i": id, "s": state, "t": text}
    return base64.urlsafe_b64encode(CARRIER.encode() + dump_json(facts, ascii_only=True)).decode()


def unseal(text: str) -> Optional[Json]:
    """What a carrier holds, None for any other text."""
    if not text.startswith(CARRIER_HEAD):
        return None
    try:
        raw = base64.urlsafe_b64decode(text.replace("+", "-").replace("/", "_") + "=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        return None
    return load_object(raw[len(CARRIER):].decode("utf-8", "replace")) if raw.startswith(CARRIER.encode()) else None


@dataclass(eq=False, repr=False)
class Carriage(Value):
    """How one exchange's state travels: whose it is, who keeps it, who made it.

    `hidden`: the client asked for thinking without its text (`display: "omitted"`); the text travels in the carrier.
    """

    origin: str
    client: str
    upstream: str
    hidden: bool = False

    def sealed(self, block: Block) -> Block:
        """A block of an answer with its state in the form this client may keep."""
        seeds = self.client == MESSAGES and self.upstream == RESPONSES and not self.hidden
        if isinstance(block, Thinking) and block.signature:
            state = f"{block.signature}@{block.id or ''}" if seeds else seal("thinking", self.origin, block.signature, block.id, block.text)
            return replace(block, signature=state, text="" if self.hidden else block.text or PLACEHOLDER if seeds else block.text)
        if isinstance(block, Thinking) and block.redacted:
            return replace(block, redacted=seal("redacted", self.origin, block.redacted, block.id))
        if isinstance(block, Thinking):
            return replace(block, text="") if self.hidden else block
        if isinstance(block, Compaction) and block.sealed:
            if seeds:
                return Thinking(PLACEHOLDER, signature=f"{SEED_COMPACTION}{block.sealed}@{block.id or ''}")
            return replace(block, sealed=seal("compaction", self.origin, block.sealed, block.id))
        return replace(block, seal=seal("seal", self.origin, block.seal)) if getattr(block, "seal", None) else block

    def stream(self, batches: Iterable[List[Event]]) -> Iterator[List[Event]]:
        """The stream with every signature and sealed state in a carrier; final forms only say what deltas did not."""
        thinking: Dict[int, List[str]] = {}
        for events in batches:
            carried: List[Event] = []
            for event in events:
                kind = type(event)
                if kind is BlockDelta:
                    if event.index in thinking:
                        thinking[event.index].append(event.text)
                        if self.hidden:
                            event = Pulse()
                elif kind is BlockStart:
                    if isinstance(event.block, Thinking):
                        thinking[event.index] = [event.block.text]
                    event = BlockStart(event.index, self.sealed(event.block))
                elif kind is BlockStop:
                    said = "".join(thinking.pop(event.index, []))
                    if isinstance(event.block, Thinking):
                        final = self.sealed(replace(event.block, text=event.block.text or said))
                        if not said and final.text:
                            carried.append(BlockDelta(event.index, final.text))
                        event = BlockStop(event.index, final)
                    elif event.block is not None:
                        event = BlockStop(event.index, self.sealed(event.block))
                carried.append(event)
            yield carried

    def reply(self, reply: Reply) -> Reply:
        """A whole answer with its state in carriers."""
        return replace(reply, content=[self.sealed(block) for block in reply.content])


def foreign_compaction() -> ClientError:
    """The 400 for a conversation of which the compacted part is sealed for another model (DESIGN 8): without it, all that
    was said before is lost."""
    return ClientError("the beginning of this conversation was compacted by another model, and only that model can read it: "
                       "start a new conversation, or return to that model")


def is_sealed_compaction(state: str) -> bool:
    """Whether a state that a client keeps stands for a compacted conversation."""
    return state.startswith(SEED_COMPACTION) and "@" in state or (unseal(state) or {}).get("k") == "compaction"


def opened(block: Block, origin: str, upstream: str) -> Optional[Block]:
    """A block of a request with its state as this upstream made it; None for state of another origin, and for
    thinking that carries none: it means nothing to anyone but its maker. A compaction may be readable besides; raises
    ClientError 400 for one that is not."""
    if isinstance(block, Thinking):
        return opened_thinking(block, origin, upstream)
    if isinstance(block, Compaction) and block.sealed:
        facts = unseal(block.sealed)
        if facts is not None and is_own(facts, origin):
            return replace(block, sealed=facts["s"], id=facts.get("i"))
        if not block.summary:
            raise foreign_compaction()
        return replace(block, sealed=None, id=None)
    if getattr(block, "seal", None):
        facts = unseal(block.seal)
        return replace(block, seal=facts["s"] if is_own(facts, origin) else None)
    return block


def opened_thinking(block: Thinking, origin: str, upstream: str) -> Optional[Block]:
    """The thinking (or compaction) behind a carrier or one of the seeds' shapes; raises like `opened`."""
    state = block.signature or block.redacted or ""
    facts = unseal(state)
    if facts is not None:
        if not is_own(facts, origin):
            if facts.get("k") == "compaction":
                raise foreign_compaction()
            return None
        if facts.get("k") == "compaction":
            return Compaction(sealed=facts["s"], id=facts.get("i"))
        if facts.get("k") == "redacted":
            return Thinking(redacted=facts["s"], id=facts.get("i"))
        return Thinking(text=str(facts.get("t") or ""), signature=facts["s"], id=facts.get("i"))
    if upstream != RESPONSES or "@" not in state:
        if is_sealed_compaction(state):
            raise foreign_compaction()
        return None
    text = "" if block.text == PLACEHOLDER else block.text
    if state.startswith(SEED_COMPACTION):
        encrypted, _, item = state[len(SEED_COMPACTION):].rpartition("@")
        return Compaction(sealed=encrypted, id=item or None)
    encrypted, _, item = state.rpartition("@")
    return Thinking(text=text, signature=encrypted, id=item or None)


def opened_blocks(block: Block, origin: str, upstream: str) -> List[Block]:
    """A block of a request, opened; state that rode on its seal (Gemini) stands before it again."""
    sealed = getattr(block, "seal", None)
    if sealed is None and type(block) in (ToolCall, ToolResult) or type(block) is Text and block.text and sealed is None:
        return [block]  # most of a long history
    facts = unseal(sealed or "")
    if facts is None or facts.get("k") in (None, "seal"):
        found = [opened(block, origin, upstream)]
    else:
        found = [opened_thinking(Thinking(signature=block.seal), origin, upstream), replace(block, seal=None)]
    return [one for one in found if one is not None and not (type(one) is Text and one == Text(""))]


def is_own(facts: Optional[Json], origin: str) -> bool:
    """Whether a carrier is of this origin and whole."""
    return facts is not None and facts.get("o") == origin and isinstance(facts.get("s"), str)


def open_carriers(body: Json, dialect: str, origin: str) -> bool:
    """Opens the carriers of a wire body that is passed on as it is, where this origin made them (thinking whose text was
    hidden); every other one goes, with the thinking it belongs to. True when there was any; raises ClientError 400 for a
    compaction among them."""
    turns = body.get("input" if dialect == RESPONSES else "messages")
    found = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    changed = False
    for turn in found:
        content = turn.get("content")
        if dialect == RESPONSES and "encrypted_content" in turn and holds_carrier(turn, "encrypted_content"):
            turns.remove(turn)
            changed = True
        elif dialect == CHAT and "reasoning_opaque" in turn and holds_carrier(turn, "reasoning_opaque"):
            for name in ("reasoning_opaque", "reasoning_text", "reasoning_content"):
                turn.pop(name, None)
            changed = True
        elif dialect == MESSAGES and isinstance(content, list) and any([holds_carrier(block, "signature", "data") for block in content
                                                                        if isinstance(block, dict) and ("signature" in block or "data" in block)]):
            opened_ones = [open_thinking_form(block, origin) for block in content]
            turn["content"] = [block for block in opened_ones if block is not None] or PLACEHOLDER
            changed = True
    return changed


def open_thinking_form(block: Any, origin: str) -> Any:
    """A Messages block with its text and signature as upstream made them; None for a carrier of another origin."""
    if not holds_carrier(block, "signature", "data"):
        return block
    facts = unseal(str(block.get("signature")))
    return {**block, "thinking": str(facts.get("t") or ""), "signature": facts["s"]} if is_own(facts, origin) else None


def holds_carrier(value: Any, *names: str) -> bool:
    """Whether one of these fields of a wire object holds a carrier, or one of the seeds' shapes (no base64 has an @); raises
    ClientError 400 for a compaction's."""
    said = [value[name] for name in names if isinstance(value.get(name), str)] if isinstance(value, dict) else []
    found = [text for text in said if text.startswith(CARRIER_HEAD) or "@" in text]
    if any(map(is_sealed_compaction, found)):
        raise foreign_compaction()
    return bool(found)


def opened_request(request: Request, origin: str, upstream: str) -> Request:
    """The request with every carrier of this origin opened, and foreign state left out; raises like `opened`."""
    messages = []
    for message in request.messages:
        content = [found for block in message.content for found in opened_blocks(block, origin, upstream)]
        messages.append(Message(message.role, content, message.extra))
    return replace(request, messages=canonical(messages))


def told_calls(request: Request) -> Request:
    """The request with calls that carry no state, and their results, told as text: Gemini 3 answers 400 to a bare call."""
    names: Dict[str, str] = {}
    messages = []
    for message in request.messages:
        bare = message.role == "assistant" and not any(isinstance(block, Thinking) or getattr(block, "seal", None) for block in message.content)
        content: List[Block] = []
        for block in message.content:
            if bare and isinstance(block, ToolCall):
                names[block.id] = block.name
                content.append(Text(f"[Called {block.name} with {block.arguments or '{}'}]"))
            elif isinstance(block, ToolResult) and block.call_id in names:
                content += [Text(f"[Result of {names[block.call_id]}:]"), *block.content]
            else:
                content.append(block)
        messages.append(Message(message.role, content, message.extra))
    return replace(request, messages=canonical(messages))


# ---- tools that not every dialect has ---------------------------------------

# What a dialect can say of tools; the rest is flattened to plain functions. Copilot's chat takes no custom tools.
# DEFER: tools found later; REFERENCE: blocks that name a found tool; SERVER: tools upstream runs itself.
CUSTOM, NAMESPACE, SEARCH, DEFER, REFERENCE, SERVER = "custom", "namespace", "search", "defer", "reference", "server"
TOOL_POWERS = {CHAT: frozenset(), RESPONSES: frozenset((CUSTOM, NAMESPACE, SEARCH, DEFER, REFERENCE, SERVER)),
               MESSAGES: frozenset((DEFER, REFERENCE, SERVER)), GEMINI: frozenset()}
CUSTOM_SCHEMA: Json = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
SEARCH_SCHEMA: Json = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}


def flatten(request: Request, names: Names, dialect: str, lacking: Any = frozenset()) -> Request:
    """The request in words the dialect knows: other tool kinds as functions, namespaces in the name, long names
    shortened, references as text. `names` learns the way back; `lacking`: powers of the dialect the model does not have."""
    powers = TOOL_POWERS[dialect] - lacking
    if dialect == RESPONSES and not any(tool.kind == "search" for tool in request.tools):
        powers = powers - {DEFER}  # nothing could load what is deferred
    tools = [flat_tool(tool, names, powers) for tool in request.tools if tool.kind != "server" or SERVER in powers]
    choice = request.tool_choice
    if choice is not None and choice.mode == "tool" and choice.name is not None:
        kept = NAMESPACE in powers
        choice = ToolChoice("tool", flat_name(choice.name, choice.namespace, choice.kind, names, powers),
                            choice.namespace if kept else None, choice.kind if choice.kind in powers else "function")
    kinds = {block.id: block.kind for message in request.messages for block in message.content if isinstance(block, ToolCall)}
    messages = [Message(message.role, [flat_block(of_its_call(block, kinds), names, powers) for block in message.content], message.extra)
                for message in request.messages]
    return replace(request, tools=tools, tool_choice=choice if tools or choice is None or choice.mode != "tool" else None,
                   messages=messages)


def allowed_tools(tools: Sequence[Tool], allowed: Sequence[Tool]) -> List[Tool]:
    """The tools that a choice leaves: of the kind and name of one it lists, and its namespace or server if it says one. All
    where it lists none. No other dialect has such a choice, but what is not offered is not called."""
    def leaves(one: Tool, tool: Tool) -> bool:
        label = (one.extra or {}).get("server_label")
        return (one.kind, one.name) == (tool.kind, tool.name) and one.namespace in (None, tool.namespace) \
            and label in (None, (tool.extra or {}).get("server_label"))
    return [tool for tool in tools if not allowed or any(leaves(one, tool) for one in allowed)]


def flat_name(name: str, namespace: Optional[str], kind: str, names: Names, powers: Any) -> str:
    """The name a tool goes by in the dialect."""
    if NAMESPACE in powers and namespace:
        return name
    return names.shorten(name, namespace, "function" if kind in powers else kind)


def flat_tool(tool: Tool, names: Names, powers: Any) -> Tool:
    """One tool, flattened."""
    name = flat_name(tool.name, tool.namespace, tool.kind, names, powers)
    flat = replace(tool, name=name, namespace=tool.namespace if NAMESPACE in powers else None,
                   deferred=tool.deferred if DEFER in powers else None)
    if tool.kind == "function" or tool.kind in powers:
        return flat
    if tool.kind == "custom":
        note = f"\n\nThe input must follow this grammar:\n{tool.grammar.get('definition')}" if isinstance(tool.grammar, dict) and tool.grammar.get("definition") else ""
        return replace(flat, kind="function", schema=CUSTOM_SCHEMA, description=(tool.description or "") + note, grammar=None)
    return replace(flat, kind="function", schema=tool.schema or SEARCH_SCHEMA)


def of_its_call(block: Block, kinds: Dict[str, str]) -> Block:
    """A result with the kind of its call, which Chat and Messages do not say."""
    known = isinstance(block, ToolResult) and kinds.get(block.call_id, block.kind)
    return replace(block, kind=known) if known and known != block.kind else block


def flat_block(block: Block, names: Names, powers: Any) -> Block:
    """One block, its tool names and kinds flattened; itself where that changes nothing, as in most of a long history."""
    if isinstance(block, ToolCall):
        name = flat_name(block.name, block.namespace, block.kind, names, powers)
        arguments = block.arguments
        if block.kind == "custom" and CUSTOM not in powers:
            arguments = dump_json({"input": block.arguments}).decode("utf-8", "surrogatepass")
        if name == block.name and block.namespace is None and block.kind == "function":
            return block
        return replace(block, name=name, namespace=block.namespace if NAMESPACE in powers else None, arguments=arguments,
                       kind=block.kind if block.kind in powers else "function")
    if isinstance(block, ToolResult):
        content = [flat_block(part, names, powers) for part in block.content]
        if content == block.content and block.kind == "function":
            return block
        return replace(block, content=content, kind=block.kind if block.kind in powers else "function")
    if isinstance(block, ToolReference):
        name = flat_name(block.name, text_or_none((block.extra or {}).get("namespace")), "function", names, powers)
        return replace(block, name=name) if REFERENCE in powers else Text(f"Tool {name} loaded", cache=block.cache)
    return block


def restored_call(call: ToolCall, names: Names) -> ToolCall:
    """A whole call under its own name, namespace and kind."""
    name, namespace, kind = names.restore(call.name)
    arguments = custom_input(call.arguments) if kind == "custom" and call.kind != "custom" else call.arguments
    return replace(call, name=name, namespace=namespace or call.namespace, arguments=arguments,
                   kind=kind if kind != "function" else call.kind)


def custom_input(arguments: str) -> str:
    """The free text inside the arguments of a flattened custom tool; other arguments are taken as the text itself."""
    value = load_object(arguments)
    return value["input"] if value is not None and isinstance(value.get("input"), str) else arguments


def restore_names(batches: Iterable[List[Event]], names: Names) -> Iterator[List[Event]]:
    """The stream with calls under their own names. A flattened custom call is held until its text can be unwrapped."""
    held: Dict[int, List[str]] = {}
    calls: Dict[int, ToolCall] = {}
    for events in batches:
        restored: List[Event] = []
        for event in events:
            kind = type(event)
            if kind is BlockStart and isinstance(event.block, ToolCall):
                call = calls[event.index] = restored_call(event.block, names)
                if call.kind == "custom" and event.block.kind != "custom":
                    held[event.index] = [event.block.arguments]
                    call = calls[event.index] = replace(call, arguments="")
                restored.append(BlockStart(event.index, call))
            elif kind is BlockDelta and event.index in held:
                held[event.index].append(event.text)
            elif kind is BlockStop and event.index in calls:
                restored += _restored_stop(event, calls.pop(event.index), held.pop(event.index, None), names)
            else:
                restored.append(event)
        yield restored


def _restored_stop(event: Any, call: ToolCall, held: Optional[List[str]], names: Names) -> List[Event]:
    final = restored_call(event.block, names) if isinstance(event.block, ToolCall) else None
    if held is None:
        return [BlockStop(event.index, final)]
    text = final.arguments if final is not None and final.arguments else custom_input("".join(held))
    return [BlockDelta(event.index, text), BlockStop(event.index, replace(call, arguments=text))]


def restore_reply(reply: Reply, names: Names) -> Reply:
    """A whole answer with calls under their own names."""
    return replace(reply, content=[restored_call(block, names) if isinstance(block, ToolCall) else block for block in reply.content])

# ---- reading wire bodies ----------------------------------------------------

TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number",
              bool: "true or false", type(None): "null"}


def wrong_type(path: str, wanted: str, got: Any) -> ClientError:
    """The 400 for a field of the wrong type."""
    return ClientError(f"{path}: expected {wanted}, got {TYPE_NAMES.get(type(got), 'something else')}", param=path)


def want_object(value: Any, path: str) -> Json:
    """The value, if it is a JSON object."""
    if not isinstance(value, dict):
        raise wrong_type(path, "an object", value)
    return value


def want_list(body: Json, name: str) -> List[Any]:
    """The list under `name`, empty when absent or null."""
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong_type(name, "a list", value)
    return value


def want_model(body: Json) -> str:
    """The model asked for; raises 400 naming where the names are listed."""
    value = body.get("model")
    if value is None or value == "":
        raise ClientError("model: required; GET /v1/models lists the names", param="model")
    if not isinstance(value, str):
        raise wrong_type("model", "a string", value)
    return value


def want_flag(body: Json, name: str) -> bool:
    """The boolean under `name`, False when absent or null."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong_type(name, "true or false", value)
    return bool(value)


def want_number(body: Json, name: str) -> Optional[float]:
    """The number under `name`, None when absent or null; raises ClientError 400 for anything else."""
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise wrong_type(name, "a number", value)
    return value


def want_count(body: Json, *names: str) -> Optional[int]:
    """The first positive number under one of `names`; None when all are absent or null."""
    for name in names:
        value = body.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise wrong_type(name, "a number", value)
            return int(value)
    return None


def text_or_none(value: Any) -> Optional[str]:
    """The value if it is a string: optional fields of another type are left to upstream."""
    return value if isinstance(value, str) else None


def name_in(value: Any, key: str) -> str:
    """The string under `key` of an object ("type", "role" …), "" when there is none: safe to look up in a table."""
    name = value.get(key) if isinstance(value, dict) else None
    return name if isinstance(name, str) else ""


def count_or_zero(usage: Any, *path: str) -> int:
    """A token count somewhere inside a usage object; 0 for anything that is no count."""
    for name in path:
        usage = usage.get(name) if isinstance(usage, dict) else None
    return int(usage) if isinstance(usage, (int, float)) and not isinstance(usage, bool) and 0 < usage < 1e15 else 0


def billed_nano(body: Json) -> Optional[int]:
    """`copilot_usage.total_nano_aiu`, where upstream says what it charged (copilot-upstream 2.4)."""
    return count_or_zero(body, "copilot_usage", "total_nano_aiu") or None


def split_data_url(url: str) -> Tuple[Optional[str], Optional[str]]:
    """(media type, base64) of a `data:` URL, (None, None) of any other."""
    if not url.startswith("data:"):
        return None, None
    head, _, data = url.partition(",")
    return head[5:].partition(";")[0] or None, data


# Media types of texts that do not begin with `text/`.
TEXT_TYPES = frozenset("application/" + kind for kind in (
    "json", "x-ndjson", "xml", "yaml", "x-yaml", "toml", "javascript", "x-javascript", "typescript", "x-typescript", "x-sh", "sql"))
# What a file of a type is called at its end; OpenAI's models tell types by it.
FILE_ENDINGS = {
    "application/pdf": "pdf", "application/rtf": "rtf", "application/zip": "zip", "application/msword": "doc",
    "application/vnd.ms-excel": "xls", "application/vnd.ms-powerpoint": "ppt",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
    "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet": "xlsx",
    "application/vnd.openxmlformats-officedocument.presentationml.presentation": "pptx", "application/epub+zip": "epub"}
SOUND_NOTE = "[{}: this model takes no {}; the file was left out.]"


def file_type(file: File) -> str:
    """A file's media type without its parameters; a PDF's where none was said."""
    return (file.media_type or "application/pdf").partition(";")[0].strip().lower()


def file_text(file: File) -> Optional[str]:
    """The text of a text file, given as such or as base64; None for other files."""
    kind = file_type(file)
    if file.text is not None or file.data is None or not (kind.startswith("text/") or kind in TEXT_TYPES):
        return file.text
    try:
        return base64.b64decode(file.data).decode("utf-8")
    except ValueError:
        return None


def file_note(file: File) -> Optional[str]:
    """What is said in place of sound and film, which no upstream dialect takes (Gemini clients send them); None for other files."""
    kind = file_type(file).partition("/")[0]
    sounds = kind in ("audio", "video") and file.text is None
    return SOUND_NOTE.format(file.name or file.url or file_type(file), kind) if sounds else None


def file_name(file: File) -> Optional[str]:
    """A name with an ending for a file that is sent by its data; the given one for any other."""
    if file.data is None or file.name and re.search(r"\.\w{1,5}$", file.name):
        return file.name
    ending = FILE_ENDINGS.get(file_type(file)) or ("txt" if file_type(file).startswith("text/") else "bin")
    return f"{file.name or 'document'}.{ending}"


def image_of_url(url: Any, detail: Any = None) -> Image:
    """An image block of a `data:` or https URL."""
    media_type, data = split_data_url(url) if isinstance(url, str) else (None, None)
    if data is not None:
        return Image(media_type=media_type, data=data, detail=text_or_none(detail))
    return Image(url=text_or_none(url), detail=text_or_none(detail))


###############################################################################
#                                 OpenAI Chat                                 #
###############################################################################
# POST /v1/chat/completions. API reference "Chat", "Chat streaming", 2026-09; what Copilot makes of it: copilot-upstream 5.
#
#   {"model","messages":[{"role":"system","content":"…"},
#      {"role":"user","content":"…"|[{"type":"text","text"},{"type":"image_url","image_url":{"url","detail"}},
#                                    {"type":"file","file":{"filename","file_data"}}]},
#      {"role":"assistant","content":null,"reasoning_text","reasoning_opaque","tool_calls":[
#         {"id","type":"function","function":{"name","arguments"}}|{"id","type":"custom","custom":{"name","input"}}]},
#      {"role":"tool","tool_call_id","content":"…"}],"tools":[{"type":"function","function":{"name","parameters"}}],
#    "max_tokens","reasoning_effort","thinking_budget","response_format":{"type":"json_schema","json_schema":{…}},
#    "stream_options":{"include_usage":true}}
#   {"id","object":"chat.completion","created","model","choices":[{"index":0,"message":{"role","content","refusal",
#      "annotations","tool_calls"},"logprobs":{"content":[…]},"finish_reason":"stop"}],"usage":{"prompt_tokens",…}}
#   data: {"id","object":"chat.completion.chunk","created","model","choices":[{"index":0,"delta":{"content"},"finish_reason":null}]}
#   data: {…,"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id","type","function":{"name","arguments":""}}]}}]}
#   data: {…,"choices":[],"usage":{…}}      data: {"error":{"message","code"}}      data: [DONE]
#
# A message has one slot for each kind of thing: its thinking, its words, its refusal, its calls. The order among them
# is lost in a message, and kept in a stream.

CHAT_ROLES = {"system": "system", "developer": "developer", "user": "user", "assistant": "assistant",
              "tool": "user", "function": "user"}
CHAT_FINISH = re.compile(rb'"finish_reason"\s*:\s*"(\w+)"')
CHAT_END = b"data: [DONE]\n\n"
CHAT_DONE = re.compile(rb"(?:^|[\r\n])data:\s*\[DONE\]")  # JSON text holds no raw line end
CHAT_TEXT_PARTS = frozenset(("text", "input_text", "output_text"))
CHAT_OPAQUE_PARTS = frozenset(("input_audio",))  # content parts without a place in the hub, written back as they came
# Fields for readable thinking, the first that says something counts: Copilot's, DeepSeek's (what the AI SDK's compatible
# provider and LiteLLM read), OpenRouter's, Copilot's for GPT.
CHAT_THOUGHTS = ("reasoning_text", "reasoning_content", "reasoning", "cot_summary")
# Fields whose text usually is all that a delta says, with what comes before the text on the wire.
CHAT_STREAMED = {name: re.compile(rf'"{name}"\s*:\s*"') for name in ("content", "arguments") + CHAT_THOUGHTS}
# Top-level fields that only this dialect knows, with the type (or values) that tells them from another dialect's.
CHAT_PASSED: Tuple[Tuple[str, Any], ...] = (
    ("logit_bias", dict), ("prediction", dict), ("store", bool), ("safety_identifier", str), ("prompt_cache_retention", str),
    ("web_search_options", dict), ("snippy", dict), ("intent", bool), ("intent_threshold", (int, float)),
    ("copilot_thread_id", str), ("service_tier", ("auto", "default", "flex", "scale", "priority")))
# Top-level fields that become words of the hub.
CHAT_READ = frozenset((
    "model", "messages", "tools", "functions", "tool_choice", "function_call", "parallel_tool_calls", "stream", "max_tokens",
    "max_completion_tokens", "stop", "temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "logprobs",
    "top_logprobs", "reasoning_effort", "thinking_budget", "response_format", "verbosity", "user", "metadata", "prompt_cache_key"))

# ---- content parts ----------------------------------------------------------


def chat_part(part: Any) -> Block:
    """The block of one content part."""
    if isinstance(part, str):
        return Text(part)
    kind = name_in(part, "type")
    if kind in CHAT_TEXT_PARTS and isinstance(part.get("text"), str):
        mark = part.get("cache_control")
        return Text(part["text"], cache=mark if isinstance(mark, dict) else None)
    if kind == "image_url":
        image = part.get("image_url")
        image = image if isinstance(image, dict) else {"url": image}
        return image_of_url(image.get("url"), image.get("detail"))
    if kind == "file" and isinstance(part.get("file"), dict):
        file, given = part["file"], text_or_none(part["file"].get("file_data"))
        media_type, data = split_data_url(given) if given else (None, None)
        return File(media_type=media_type, data=given if data is None else data, file_id=text_or_none(file.get("file_id")),
                    name=text_or_none(file.get("filename")))
    if kind == "refusal":
        return Refusal(text_or_none(part.get("refusal")) or "")
    return Opaque(kind, part)


def chat_content(content: Any, path: str) -> List[Block]:
    """The blocks of a message's content: string, list of parts, or null."""
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(content)]
    if not isinstance(content, list):
        raise wrong_type(path, "a string or a list", content)
    return [chat_part(part) for part in content]


def chat_wire_part(block: Block) -> Optional[Json]:
    """A block of a user's turn or of a result as a part; None for what is no part."""
    if isinstance(block, (Text, Refusal)):
        return {"type": "text", "text": block.text}
    if isinstance(block, Image):
        return chat_wire_image(block)
    if isinstance(block, File):
        return chat_wire_file(block)
    if isinstance(block, ToolReference):
        return {"type": "text", "text": f"Tool {block.name} loaded"}
    if isinstance(block, Compaction) and block.sealed is None and block.summary:
        return {"type": "text", "text": block.summary}
    return block.raw if isinstance(block, Opaque) and block.kind in CHAT_OPAQUE_PARTS else None


def chat_wire_image(image: Image) -> Optional[Json]:
    """{"type":"image_url","image_url":{"url":"data:…"|"https:…","detail"}}; there are no file ids for images."""
    url = image.url if image.data is None else f"data:{image.media_type or 'image/png'};base64,{image.data}"
    if url is None:
        return None
    return {"type": "image_url", "image_url": {"url": url, **({} if image.detail is None else {"detail": image.detail})}}


def chat_wire_file(file: File) -> Optional[Json]:
    """{"type":"file","file":{"filename","file_data":"data:application/pdf;base64,…"}|{"file_id"}}; text files are text."""
    words = file_note(file) or file_text(file)
    if words is not None:
        return {"type": "text", "text": words}
    if file.data is None and file.file_id is None:
        return None
    data = file.data if file.data is None or file.media_type is None else f"data:{file.media_type};base64,{file.data}"
    said = {"filename": file_name(file), "file_data": data, "file_id": file.file_id}
    return {"type": "file", "file": {name: value for name, value in said.items() if value is not None}}


# ---- messages ---------------------------------------------------------------


def chat_message(message: Json, path: str) -> Message:
    """One wire message; a tool message becomes a user message that holds its result."""
    role = name_in(message, "role")
    if role not in CHAT_ROLES:
        raise ClientError(f"{path}.role: expected one of {', '.join(CHAT_ROLES)}, got {message.get('role')!r}", param=f"{path}.role")
    content = chat_content(message.get("content"), f"{path}.content")
    extra = chat_named(message) or None
    if role in ("tool", "function"):
        call_id = message.get("tool_call_id") or message.get("name") or ""
        return Message("user", [ToolResult(str(call_id), content, extra=extra)])
    if role == "assistant":
        content = chat_turn(message, content)
    return Message(CHAT_ROLES[role], content, extra)


def chat_named(fields: Optional[Json]) -> Json:
    """{"name"} of a message or of what was kept of one, {} where there is none."""
    name = name_in(fields, "name")
    return {"name": name} if name else {}


def chat_turn(message: Json, content: List[Block]) -> List[Block]:
    """What an assistant message says, thinking first, calls last. An empty `content` beside something else is nothing."""
    thought, opaque = chat_thought(message), text_or_none(message.get("reasoning_opaque")) or None
    before: List[Block] = [Thinking(thought, opaque)] if thought or opaque else []
    after: List[Block] = [Refusal(message["refusal"])] if name_in(message, "refusal") else []
    after.extend(chat_call(call) for call in want_list(message, "tool_calls") if isinstance(call, dict))
    if isinstance(message.get("function_call"), dict):  # of old clients; its result comes under the function's name
        after.append(chat_call({"id": message["function_call"].get("name"), "function": message["function_call"]}))
    if message.get("content") == "" and (before or after):
        content = []
    return before + content + after


def chat_thought(said: Json) -> str:
    """The readable thinking of a message or a delta, in whichever field it stands."""
    for name in CHAT_THOUGHTS:
        text = said.get(name)
        if text and type(text) is str:
            return text
    return ""


def chat_call(call: Json) -> ToolCall:
    """One entry of `tool_calls`."""
    kind, inner = chat_called(call)
    return ToolCall(str(call.get("id") or ""), name_in(inner, "name"),
                    chat_arguments(inner.get("input" if kind == "custom" else "arguments")), kind)


def chat_called(call: Json) -> Tuple[str, Json]:
    """(kind, what is called with what) of an entry of `tool_calls`."""
    kind = "custom" if isinstance(call.get("custom"), dict) else "function"
    inner = call.get(kind)
    return kind, inner if isinstance(inner, dict) else {}


def chat_arguments(given: Any) -> str:
    """A call's arguments as text; some upstreams send the object itself."""
    try:
        return given if isinstance(given, str) else dump_json(given).decode() if isinstance(given, dict) else ""
    except RecursionError:
        return "{}"


def chat_wire_call(call: ToolCall) -> Json:
    """{"id","type":"function","function":{"name","arguments"}} | {"id","type":"custom","custom":{"name","input"}}"""
    if call.kind == "custom":
        return {"id": call.id, "type": "custom", "custom": {"name": call.name, "input": call.arguments}}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments or "{}"}}


def chat_wire_messages(message: Message) -> Iterator[Json]:
    """The wire messages of one message of the hub."""
    named = chat_named(message.extra)
    if message.role == "user":
        results = [block for block in message.content if isinstance(block, ToolResult)]
        yield from map(chat_wire_result, results)
        parts = [part for result in results for part in chat_moved(result)]
        parts += filter(None, map(chat_wire_part, message.content))
        if parts:
            yield {"role": "user", **named, "content": chat_wire_content(parts)}
    elif message.role == "assistant":
        yield from ({"role": "user", "content": part["text"]} for block in message.content if isinstance(block, Compaction)
                    for part in [chat_wire_part(block)] if part is not None)
        turn = chat_wire_turn(message.content)
        if turn:
            yield {"role": "assistant", **named, **turn}
    else:
        texts = [block.text for block in message.content if isinstance(block, Text)]
        if texts:
            yield {"role": message.role, **named, "content": "\n\n".join(texts)}


def chat_wire_content(parts: List[Json]) -> Union[str, List[Json]]:
    """The content of a message: a string where it is one text."""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def chat_rich(result: ToolResult) -> List[Json]:
    """The parts of a result that a tool message cannot hold."""
    return [part for part in map(chat_wire_part, result.content) if part is not None and part["type"] != "text"]


def chat_wire_result(result: ToolResult) -> Json:
    """{"role":"tool","tool_call_id","content"}: the result's text, or a word on where to find the rest (gateway-features 9.3)."""
    texts = [part["text"] for part in map(chat_wire_part, result.content) if part is not None and part["type"] == "text"]
    text = "\n".join(texts) if texts or not chat_rich(result) else "The result follows in the next user message."
    return {"role": "tool", "tool_call_id": result.call_id, **chat_named(result.extra), "content": text}


def chat_moved(result: ToolResult) -> List[Json]:
    """The rich parts of a result, under a line that says whose they are."""
    rich = chat_rich(result)
    return [{"type": "text", "text": f"Tool result for {result.call_id}:"}, *rich] if rich else []


def chat_wire_turn(blocks: Sequence[Block]) -> Json:
    """An assistant message without its role; empty when nothing of it can be said."""
    words = [block for block in blocks if isinstance(block, (Text, Refusal))]
    parts: List[Json] = [{"type": "text", "text": block.text} if isinstance(block, Text) else {"type": "refusal", "refusal": block.text}
                         for block in words if block.text or isinstance(block, Refusal)]
    calls = [chat_wire_call(block) for block in blocks if isinstance(block, ToolCall)]
    thoughts = chat_wire_thoughts(blocks)
    if not (words or calls or thoughts):
        return {}
    return {"content": chat_wire_content(parts) if parts else None if calls else "", **thoughts, **({"tool_calls": calls} if calls else {})}


def chat_wire_thoughts(blocks: Sequence[Block]) -> Json:
    """{"reasoning_text","reasoning_opaque"}: all thoughts, and the first of what is sealed; a message holds one."""
    text = "\n\n".join(block.text for block in blocks if isinstance(block, Thinking) and block.text)
    opaque = next(filter(None, map(chat_sealed, blocks)), None)
    return {name: value for name, value in (("reasoning_text", text), ("reasoning_opaque", opaque)) if value}


def chat_sealed(block: Block) -> Optional[str]:
    """The opaque state a block carries."""
    return (block.signature or block.redacted if isinstance(block, Thinking) else None) or block.seal


# ---- tools and options ------------------------------------------------------


def chat_tool(tool: Any) -> Tool:
    """One entry of `tools`, of the old `functions`, or a server tool of some upstream, which has neither name nor schema."""
    tool = tool if isinstance(tool, dict) else {}
    wire_type = name_in(tool, "type") or "function"
    inner = tool.get(wire_type) if isinstance(tool.get(wire_type), dict) else tool.get("function")
    inner = inner if isinstance(inner, dict) else tool
    kind = wire_type if wire_type in ("function", "custom") else "server"
    schema, strict, grammar = inner.get("parameters"), inner.get("strict"), inner.get("format")
    if isinstance(grammar, dict) and isinstance(grammar.get("grammar"), dict):
        grammar = {"type": "grammar", **grammar["grammar"]}
    return Tool((text_or_none(inner.get("name")) if kind != "server" else None) or wire_type, text_or_none(inner.get("description")),
                schema if isinstance(schema, dict) else None, kind, strict=strict if isinstance(strict, bool) else None,
                grammar=grammar if isinstance(grammar, dict) else None)


def chat_wire_tool(tool: Tool) -> Optional[Json]:
    """{"type":"function","function":{"name","description","parameters","strict"}} | {"type":"custom","custom":{"name","format"}}"""
    if tool.kind == "server":
        return None
    said: Json = {"name": tool.name, "description": tool.description}
    if tool.kind == "custom":
        grammar = {name: value for name, value in (tool.grammar or {}).items() if name != "type"}
        said["format"] = {"type": "grammar", "grammar": grammar} if name_in(tool.grammar, "type") == "grammar" else tool.grammar
    else:
        said["parameters"] = {"type": "object", "properties": {}} if tool.schema is None else tool.schema
        said["strict"] = tool.strict
    kind = "custom" if tool.kind == "custom" else "function"
    return {"type": kind, kind: {name: value for name, value in said.items() if value is not None}}


def chat_choice(value: Any) -> Optional[ToolChoice]:
    """"auto"|"none"|"required" | {"type":"function","function":{"name"}} | {"type":"allowed_tools","allowed_tools":{"mode","tools"}};
    old clients: {"name"}"""
    if isinstance(value, str):
        return ToolChoice(value) if value in ("auto", "none", "required") else None
    kind = name_in(value, "type") or "function"
    inner = value.get(kind) if isinstance(value, dict) else None
    inner = inner if isinstance(inner, dict) else value
    if kind == "allowed_tools":
        allowed, forced = inner.get("tools"), inner.get("mode") == "required"
        only = allowed[0] if forced and isinstance(allowed, list) and len(allowed) == 1 else None
        named = chat_choice(only) if name_in(only, "type") in ("function", "custom") else None
        return named or ToolChoice("required" if forced else "auto")
    name = name_in(inner, "name")
    return ToolChoice("tool", name, None, kind) if name and kind in ("function", "custom") else None


def chat_allowed(value: Any) -> List[Tool]:
    """The tools that a choice of {"type":"allowed_tools"} lists, none for any other choice."""
    inner = value.get("allowed_tools") if name_in(value, "type") == "allowed_tools" else None
    listed = inner.get("tools") if isinstance(inner, dict) else None
    return [chat_tool(tool) for tool in listed] if isinstance(listed, list) else []


def chat_wire_choice(choice: ToolChoice) -> Any:
    """The wire form of a choice; what is no function cannot be forced."""
    if choice.mode != "tool":
        return choice.mode
    if choice.kind == "server" or not choice.name:
        return "auto"
    kind = "custom" if choice.kind == "custom" else "function"
    return {"type": kind, kind: {"name": choice.name}}


def chat_stop(value: Any) -> Optional[List[str]]:
    """`stop`: a string or a list of them."""
    if value is None or isinstance(value, str):
        return None if value is None else [value]
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise wrong_type("stop", "a string or a list of strings", value)
    return value


def chat_reasoning(body: Json) -> Optional[Reasoning]:
    """`reasoning_effort`, and Copilot's `thinking_budget` in tokens, 0 for none."""
    effort, budget = text_or_none(body.get("reasoning_effort")), want_count(body, "thinking_budget")
    if effort is None and budget is None:
        return None
    return Reasoning(None if budget is None else "on" if budget else "off", effort, budget or None)


def chat_output(given: Any) -> Optional[OutputFormat]:
    """{"type":"json_schema","json_schema":{"name","schema","strict","description"}} | {"type":"json_object"}"""
    kind, inner = name_in(given, "type"), given.get("json_schema") if isinstance(given, dict) else None
    if kind == "json_object":
        return OutputFormat()
    if kind != "json_schema" or not isinstance(inner, dict):
        return None
    schema, strict = inner.get("schema"), inner.get("strict")
    return OutputFormat(schema if isinstance(schema, dict) else {}, text_or_none(inner.get("name")),
                        strict if isinstance(strict, bool) else None, text_or_none(inner.get("description")))


def chat_wire_output(output: OutputFormat) -> Json:
    """The wire form of the structure wanted; a schema must have a name."""
    if output.schema is None:
        return {"type": "json_object"}
    said = {"name": output.name or "output", "schema": output.schema, "strict": output.strict, "description": output.description}
    return {"type": "json_schema", "json_schema": {name: value for name, value in said.items() if value is not None}}


def chat_options(request: Request) -> Json:
    """A request's fields but its model and its messages. What Copilot calls `max_tokens` other models call otherwise: Quirks."""
    tools = [wire for wire in map(chat_wire_tool, request.tools) if wire is not None]
    thinks = request.reasoning or Reasoning()
    said = {
        "tools": tools or None, "tool_choice": chat_wire_choice(request.tool_choice) if tools and request.tool_choice else None,
        "parallel_tool_calls": request.parallel_tools if tools else None, "max_tokens": request.max_tokens, "stop": request.stop,
        "temperature": request.temperature, "top_p": request.top_p, "seed": request.seed, "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty, "logprobs": None if request.logprobs is None else True,
        "top_logprobs": request.logprobs or None, "thinking_budget": thinks.budget,
        "reasoning_effort": "none" if thinks.effort is None and thinks.mode == "off" else thinks.effort,
        "response_format": None if request.output is None else chat_wire_output(request.output), "verbosity": request.verbosity,
        "user": request.user, "metadata": request.metadata, "prompt_cache_key": request.cache_key}
    return {**chat_passed(request.extra or {}), **{name: value for name, value in said.items() if value is not None}}


def chat_passed(extra: Json) -> Json:
    """Those of the fields without a word in the hub that this dialect knows."""
    passed: Json = {}
    for name, wanted in CHAT_PASSED:
        value = extra.get(name)
        values = isinstance(wanted, tuple) and isinstance(wanted[0], str)
        if value is not None and (value in wanted if values else isinstance(value, wanted)):
            passed[name] = value
    return passed


def chat_asked_usage(asked: Optional[Request]) -> bool:
    """Whether the stream ends in a usage chunk: where the client asked for one, or nobody knows."""
    options = None if asked is None else (asked.extra or {}).get("stream_options")
    return asked is None or isinstance(options, dict) and options.get("include_usage") is True


def chat_usage(usage: Any, body: Json) -> Optional[Usage]:
    """The hub's usage of a chat usage object.

    Gemini counts `reasoning_tokens` beside `completion_tokens`, at top level (copilot-upstream 5.4); everybody
    else inside them.
    """
    if not isinstance(usage, dict):
        return None
    beside = count_or_zero(usage, "reasoning_tokens")
    return Usage(input=count_or_zero(usage, "prompt_tokens"),
                 output=count_or_zero(usage, "completion_tokens") + beside,
                 cache_read=count_or_zero(usage, "prompt_tokens_details", "cached_tokens"),
                 cache_write=count_or_zero(usage, "prompt_tokens_details", "cache_write_tokens"),
                 reasoning=beside or count_or_zero(usage, "completion_tokens_details", "reasoning_tokens"),
                 billed_nano=billed_nano(body))


def chat_wire_usage(usage: Usage) -> Json:
    """{"prompt_tokens","completion_tokens","total_tokens","prompt_tokens_details":{…},"completion_tokens_details":{…}}"""
    return {"prompt_tokens": usage.input, "completion_tokens": usage.output, "total_tokens": usage.total,
            "prompt_tokens_details": {"cached_tokens": usage.cache_read, "cache_write_tokens": usage.cache_write},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning}}


def chat_notes(given: Any) -> List[Json]:
    """Annotations as the hub's flat citations: {"type":"url_citation","url","title","start_index","end_index"}."""
    given = [note for note in given if isinstance(note, dict)] if isinstance(given, list) else []
    return [{"type": "url_citation", **note["url_citation"]} if isinstance(note.get("url_citation"), dict) else note for note in given]


def chat_wire_notes(text: Text, length: int, start: int) -> List[Json]:
    """A text's citations that name a URL, as annotations; they count from the start of the message."""
    notes: List[Json] = []
    for note in text.citations or ():
        if not name_in(note, "url"):
            continue
        own = name_in(note, "type") == "url_citation"
        place = {name: value for name, value in note.items() if name != "type"} if own else \
            {"url": note["url"], "start_index": 0, "end_index": length}
        cited = {**place, "title": name_in(note, "title")}  # a string in the SDK's type
        for name in ("start_index", "end_index"):
            if start and type(cited.get(name)) is int:
                cited[name] += start
        notes.append({"type": "url_citation", "url_citation": cited})
    return notes


# ---- reading a stream -------------------------------------------------------


class ChatPart:
    """An open text, refusal or thinking of a stream being read."""

    __slots__ = ("index", "block", "sealed", "notes", "logprobs")

    def __init__(self, index: int, block: Block) -> None:
        self.index = index
        self.block = block
        self.sealed: List[str] = []
        self.notes: List[Json] = []
        self.logprobs: List[Json] = []

    def final(self) -> Optional[Block]:
        """Its final form, without its text; None where nothing came but text."""
        if self.sealed:
            return Thinking(signature="".join(self.sealed))
        if isinstance(self.block, Text) and (self.notes or self.logprobs):
            return Text("", self.notes or None, extra={"logprobs": self.logprobs} if self.logprobs else None)
        return None


class ChatCall:
    """A call of a stream being read. It opens (gets an index) once its id and its name are known."""

    __slots__ = ("index", "id", "name", "kind", "held")

    def __init__(self) -> None:
        self.index: Optional[int] = None
        self.id = ""
        self.name = ""
        self.kind = "function"
        self.held: List[str] = []


class ChatReader:
    """Reads one stream: frames in, the hub's events out.

    Text, refusal and thinking stream one at a time and close when something else opens; calls stay open to the end,
    as their deltas may interleave. All choices are one answer: Copilot splits Claude's (copilot-upstream 5.3), and we
    never ask for two. Opaque reasoning that comes while text streams waits for its end, in a thinking of its own.
    """

    LEARNINGS = 8  # tries in a row to learn a skeleton that no frame has fitted: more would cost more than it gains

    def __init__(self) -> None:
        self.ended = False
        self._events: List[Event] = []
        self._id = self._model = ""
        self._created = 0
        self._started = False
        self._count = 0
        self._part: Optional[ChatPart] = None
        self._late: List[str] = []  # opaque values that came while text streamed
        self._late_open = False  # the last of them may go on
        self._calls: List[ChatCall] = []
        self._places: Dict[Any, ChatCall] = {}
        self._finish: Optional[str] = None
        self._usage: Optional[Usage] = None
        self._billed: Optional[int] = None
        self._said: Optional[Usage] = None  # what has been told of usage
        self._skeleton: Optional[Tuple[str, str, int]] = None  # before and behind the text of the last delta, its block
        self._learnings = 0

    def read(self, frames: Iterable[Frame]) -> List[Event]:
        """The events of one batch of frames. What is no JSON object is passed over, as VS Code does."""
        events: List[Event] = []
        self._events = events
        for frame in frames:
            if self.ended:
                break
            delta = self._fitting(frame.data) if self._skeleton is not None else None
            if delta is not None:
                events.append(delta)
                continue
            chunk = load_object(frame.data)
            if chunk is not None:
                before = len(events)
                self.take(chunk)
                if len(events) == before + 1 and type(events[-1]) is BlockDelta:
                    self._learn(frame.data, chunk, events[-1])
            elif frame.data.strip() == "[DONE]":
                self.done()
        return events

    # Half of the time goes into parsing chunks that differ in one text only. If a frame was nothing but one delta, any other
    # with the same characters before and behind its text is the same JSON with another text (speed.md 3.4).

    def _fitting(self, data: str) -> Optional[BlockDelta]:
        """The delta of a frame that fits the skeleton."""
        head, tail, index = self._skeleton or ("", "", 0)
        if not (data.startswith(head) and data.endswith(tail)):
            return None
        try:
            text, end = json.decoder.scanstring(data, len(head))
        except ValueError:
            return None
        if not text or end - 1 + len(tail) != len(data):
            return None
        self._learnings = 0
        return BlockDelta(index, text)

    def _learn(self, data: str, chunk: Json, delta: Any) -> None:
        """Keeps a frame that said one text as a skeleton, if a probe in place of the text changes nothing else."""
        self._skeleton = None
        choice = chunk["choices"][0] if len(chunk["choices"]) == 1 else {}
        said = [name for name, value in choice.get("delta", {}).items() if value and name != "role"]
        if self._learnings >= self.LEARNINGS or len(said) != 1 or choice.get("logprobs"):
            return
        self._learnings += 1
        name, holder = said[0], choice["delta"]
        if name == "tool_calls" and len(holder[name]) == 1 and "custom" not in holder[name][0]:
            name, holder = "arguments", holder[name][0].get("function")
        found = CHAT_STREAMED[name].search(data) if name in CHAT_STREAMED and holder.get(name) == delta.text else None
        if found is not None:
            head, tail = data[:found.end()], data[json.decoder.scanstring(data, found.end())[1] - 1:]
            holder[name] = "?"
            self._skeleton = (head, tail, delta.index) if load_object(f"{head}?{tail}") == chunk else None

    # -- the answer --

    def take(self, chunk: Json) -> List[Event]:
        """The events so far, those of one more chunk among them."""
        before, choices = len(self._events), chunk.get("choices")
        if chunk.get("error") and not choices:
            return self._end(Fault(stream_failure(chunk)))
        self._identify(chunk)
        for at, choice in enumerate(choices if isinstance(choices, list) else ()):
            if isinstance(choice, dict):
                self._choice(choice, at)
        if chunk.get("usage") or "copilot_usage" in chunk:
            self._tell_used()
        if len(self._events) == before:
            self._events.append(Pulse())
        return self._events

    def _tell_used(self) -> None:
        used = self._used()
        if used is not None and used.total and used != self._said:
            self._said = used
            self._events.append(Used(used))

    def _used(self) -> Optional[Usage]:
        """What has been used so far."""
        return self._usage if self._billed is None else replace(self._usage or Usage(), billed_nano=self._billed)

    def _identify(self, chunk: Json) -> None:
        """Id, model and usage, which may come late, in pieces, or again and again (Gemini, with zeros until the end)."""
        if chunk.get("usage"):
            usage = chat_usage(chunk["usage"], {})
            self._usage = usage if usage is not None and (usage.total or self._usage is None) else self._usage
        if not self._started:
            self._id = self._id or text_or_none(chunk.get("id")) or ""
            self._model = self._model or text_or_none(chunk.get("model")) or ""
            self._created = self._created or count_or_zero(chunk, "created")
            if self._id and self._model:
                self._start()
        if "copilot_usage" in chunk:
            self._billed = billed_nano(chunk) or self._billed

    def _start(self) -> None:
        if not self._started:
            self._started = True
            said = self._usage if self._usage is not None and self._usage.input else None
            self._events.append(ReplyStart(self._id, self._model, self._created, said))

    def end(self) -> List[Event]:
        """What is left at the end of the input: the stop, if upstream said why; a cut is not ours to mend."""
        self._events = []
        return self.done() if self._finish else []

    def done(self) -> List[Event]:
        """The events so far, and those of an answer that is complete, if there is one."""
        if self.ended or not (self._finish or self._started):
            self.ended = True
            return self._events
        self._leave()
        for call in self._calls:
            if call.index is None and (call.id or call.name or call.held):
                self._open_call(call)
            if call.index is not None:
                self._events.append(BlockStop(call.index))
        word = stop_meaning(CHAT, self._finish)
        called = any(call.index is not None for call in self._calls)
        self._start()
        return self._end(ReplyStop("tool" if word == "end" and called else word, self._used()))

    def _end(self, event: Event) -> List[Event]:
        self.ended = True
        self._events.append(event)
        return self._events

    # -- choices --

    def _choice(self, choice: Json, at: int) -> None:
        """One choice of a chunk: within a delta thinking comes before words, words before calls."""
        delta = choice.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        thought, opaque, content = chat_thought(delta), delta.get("reasoning_opaque"), delta.get("content")
        if thought:
            self._say(Thinking, thought)
        if opaque and type(opaque) is str:
            self._seal(opaque)
        if content:
            text = content if type(content) is str else "".join(name_in(part, "text") for part in content) if type(content) is list else ""
            if text:
                self._say(Text, text)
        self._beside(choice, delta)
        refusal = delta.get("refusal")
        if refusal and type(refusal) is str:
            self._say(Refusal, refusal)
        calls, old = delta.get("tool_calls"), delta.get("function_call")
        for position, call in enumerate(calls if type(calls) is list else ()):
            if isinstance(call, dict):
                self._call(call, choice.get("index", at), position)
        if isinstance(old, dict):
            self._call({"index": -1, "function": old}, 0, 0)
        self._finish = text_or_none(choice.get("finish_reason")) or self._finish

    def _beside(self, choice: Json, delta: Json) -> None:
        """What belongs to the text that streams: annotations, logprobs."""
        logprobs, part = choice.get("logprobs"), self._part
        if part is not None:
            if delta.get("annotations"):
                part.notes += chat_notes(delta["annotations"])
            if logprobs and isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
                part.logprobs += logprobs["content"]

    def _say(self, kind: Any, text: str) -> None:
        part, self._late_open = self._part, False
        if part is None or type(part.block) is not kind:
            part = self._open(kind(text=""))
        self._events.append(BlockDelta(part.index, text))

    def _seal(self, opaque: str) -> None:
        """Opaque state belongs to the thinking that is open, or to one without text. One value may come in pieces."""
        if self._part is None or isinstance(self._part.block, Thinking):
            (self._part or self._open(Thinking())).sealed.append(opaque)
        elif self._late_open:
            self._late[-1] += opaque
        else:
            self._late.append(opaque)
        self._late_open, self._skeleton = True, None

    def _open(self, block: Block) -> ChatPart:
        self._leave()
        self._start()
        part = self._part = ChatPart(self._count, block)
        self._count += 1
        self._events.append(BlockStart(part.index, block))
        return part

    def _leave(self) -> None:
        """Nothing more joins the part that streams."""
        part, self._part, self._skeleton = self._part, None, None
        if part is not None:
            self._events.append(BlockStop(part.index, part.final()))
        late, self._late = self._late, []
        for opaque in late:
            self._open(Thinking()).sealed.append(opaque)
            self._leave()

    # -- calls --

    def _call(self, wire: Json, choice: Any, position: int) -> None:
        kind, inner = chat_called(wire)
        call = self._called(wire, inner, choice, position)
        if kind == "custom":
            call.kind = kind
        arguments = chat_arguments(inner.get("input" if kind == "custom" else "arguments"))
        if call.index is not None:
            if arguments:
                self._events.append(BlockDelta(call.index, arguments))
            return
        call.id = call.id or text_or_none(wire.get("id")) or ""
        call.name = call.name or name_in(inner, "name")
        if arguments:
            call.held.append(arguments)
        if call.id and call.name:
            self._open_call(call)

    def _called(self, wire: Json, inner: Json, choice: Any, position: int) -> ChatCall:
        """The call an entry is about: by `index`, else by id, else a new one if it has a name, else the newest.
        Another id under the same index is another call."""
        index, call_id = wire.get("index"), text_or_none(wire.get("id")) or ""
        if type(index) is int:
            place: Any = (choice if type(choice) is int else 0, index)
        elif call_id or name_in(inner, "name") or not self._calls:
            place = call_id or (position, len(self._calls))
        else:
            return self._calls[-1]
        call = self._places.get(place)
        if call is None or call_id and call.id and call_id != call.id:
            call = self._places[place] = ChatCall()
            self._calls.append(call)
            self._skeleton = None
        return call

    def _open_call(self, call: ChatCall) -> None:
        """Opens a call; one that never got an id or a name has one made from the answer's id and its place."""
        self._leave()
        self._start()
        call.index, self._count = self._count, self._count + 1
        call_id = call.id or f"call_{hashlib.sha256(self._id.encode('utf-8', 'replace')).hexdigest()[:20]}{call.index:04x}"
        self._events.append(BlockStart(call.index, ToolCall(call_id, call.name or "tool", "", call.kind)))
        self._events.extend([BlockDelta(call.index, text) for text in call.held])


# ---- writing a stream -------------------------------------------------------


class ChatBlock:
    """An open block of a stream being written: its delta frames are `head`, the text, `tail`; `again` in between where the
    text is said twice."""

    __slots__ = ("block", "head", "again", "tail", "length")

    def __init__(self, block: Block, head: str, tail: str, again: Optional[str] = None) -> None:
        self.block = block
        self.head = head
        self.again = again
        self.tail = tail
        self.length = 0  # characters so far


class ChatWriter:
    """Writes one stream: lawful events in, frames out. What clients read as thinking is `reasoning_content` for most,
    `reasoning_text` for Copilot's own: both are written."""

    def __init__(self, asked: Optional[Request]) -> None:
        self._frames: List[Frame] = []
        self._about: Json = {"id": "", "object": "chat.completion.chunk", "created": 0, "model": asked.model if asked else ""}
        self._head = self._tail = ""
        self._open: Dict[int, ChatBlock] = {}
        self._calls = 0
        self._length = 0  # characters of the message's content before the open text
        self._notes = 0  # annotations so far: openai's accumulator wants a number in each of a second list
        self._thought = False
        self._sealed = False
        self._usage: Optional[Usage] = None
        self._usage_asked = chat_asked_usage(asked)

    def write(self, events: Sequence[Event]) -> List[Frame]:
        """The frames of one list of events."""
        self._frames = []
        if events and type(events[-1]) is Fault:  # what it closed is not whole
            events = [event for event in events if type(event) is not BlockStop]
        for event in events:
            self._actions[type(event)](self, event)
        return self._frames

    def _send(self, delta: Json, finish: Optional[str] = None, logprobs: Optional[Json] = None) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        self._frames.append(Frame(None, dump_json({**self._about, "choices": [choice]}).decode()))

    # -- the answer --

    def _start(self, event: ReplyStart) -> None:
        self._usage = event.usage
        self._about.update(chat_identity(event.id, event.created_at, event.model or self._about["model"]))
        self._head = dump_json(self._about).decode()[:-1] + ',"choices":[{"index":0,"delta":'
        self._tail = '},"logprobs":null,"finish_reason":null}]}'
        self._send({"role": "assistant", "content": ""})

    def _stop(self, event: ReplyStop) -> None:
        self._send({}, stop_word(CHAT, event.reason))
        if self._usage_asked:
            usage = chat_wire_usage(event.usage or self._usage or Usage())
            self._frames.append(Frame(None, dump_json({**self._about, "choices": [], "usage": usage}).decode()))
        self._frames.append(Frame(None, "[DONE]"))

    def _fault(self, event: Fault) -> None:
        self._frames.append(Frame(None, dump_json(openai_error(UpstreamError(event.failure))).decode()))
        self._frames.append(Frame(None, "[DONE]"))

    # -- blocks --

    def _block_start(self, event: BlockStart) -> None:
        block = event.block
        self._seal(block)
        if isinstance(block, (Text, Refusal)):
            name = "content" if isinstance(block, Text) else "refusal"
            self._open[event.index] = ChatBlock(block, f'{self._head}{{"{name}":', self._tail)
        elif isinstance(block, Thinking):
            self._open[event.index] = ChatBlock(block, self._head + '{"reasoning_content":', self._tail, ',"reasoning_text":')
        elif isinstance(block, ToolCall):
            self._open[event.index] = self._call(block)

    def _call(self, call: ToolCall) -> ChatBlock:
        """Announces a call. Its deltas are known by their index among the calls."""
        at, self._calls = self._calls, self._calls + 1
        kind, name = ("custom", "input") if call.kind == "custom" else ("function", "arguments")
        self._send({"tool_calls": [{"index": at, "id": call.id, "type": kind, kind: {"name": call.name, name: ""}}]})
        return ChatBlock(call, f'{self._head}{{"tool_calls":[{{"index":{at},"{kind}":{{"{name}":', "}}]" + self._tail)

    def _delta(self, event: BlockDelta) -> None:
        opened = self._open.get(event.index)
        if opened is None or not event.text:
            return
        text = encode_basestring_ascii(event.text)
        if opened.again is not None:
            if not opened.length and self._thought:  # a blank line parts it from the thought before
                text = f'"\\n\\n{text[1:]}'
            self._thought = True
            text = f"{text}{opened.again}{text}"
        opened.length += len(event.text)
        self._frames.append(Frame(None, f"{opened.head}{text}{opened.tail}"))

    def _block_stop(self, event: BlockStop) -> None:
        opened, final = self._open.get(event.index), event.block
        if opened is not None:
            said = "" if final is None else main_text(final) or ""
            if isinstance(opened.block, ToolCall) and opened.block.kind != "custom":
                said = said or "{}"
            if said and not opened.length:
                self._delta(BlockDelta(event.index, said))
            if isinstance(opened.block, Text):
                self._text_done(final if isinstance(final, Text) else opened.block, opened.length)
            del self._open[event.index]
        if final is not None:
            self._seal(final)

    def _text_done(self, text: Text, length: int) -> None:
        """What only a text's end tells."""
        notes, logprobs = chat_wire_notes(text, length, self._length), (text.extra or {}).get("logprobs")
        notes = [{**note, "index": self._notes + at} for at, note in enumerate(notes)] if self._notes else notes
        self._length, self._notes = self._length + length, self._notes + len(notes)
        if notes or logprobs:
            self._send({"annotations": notes} if notes else {}, None, {"content": logprobs, "refusal": None} if logprobs else None)

    def _seal(self, block: Block) -> None:
        opaque = None if self._sealed else chat_sealed(block)
        if opaque:
            self._sealed = True
            self._send({"reasoning_opaque": opaque})

    _actions: Dict[Any, Callable[[Any, Any], None]] = {  # of the class: an object that held its own methods would be a ring
        ReplyStart: _start, BlockStart: _block_start, BlockDelta: _delta, BlockStop: _block_stop,
        ReplyStop: _stop, Fault: _fault, Pulse: lambda self, event: None, Used: lambda self, event: None}


def chat_identity(reply_id: str, created: int, model: str) -> Json:
    """{"id","created","model"} of an answer; an id that nobody gave is made."""
    return {"id": reply_id or f"chatcmpl-{hashlib.sha256(model.encode('utf-8', 'replace')).hexdigest()[:24]}",
            "created": created, "model": model}


class ChatCodec(Codec):
    """Chat Completions; see the samples at the top of the room."""

    name = CHAT
    end_word = "[DONE]"

    def decode_request(self, body: Json) -> Request:
        """The Request of a body; an empty `messages` is refused here, upstream's own words are less clear."""
        messages = want_list(body, "messages")
        if not messages:
            raise ClientError("no messages found: `messages` must hold at least one message", param="messages")
        chosen = body.get("tool_choice") if body.get("tool_choice") is not None else body.get("function_call")
        extra = {name: value for name, value in body.items() if name not in CHAT_READ and value is not None}
        return Request(
            model=want_model(body), messages=canonical(chat_message(want_object(message, f"messages.{at}"), f"messages.{at}")
                                                       for at, message in enumerate(messages)),
            tools=allowed_tools([chat_tool(tool) for tool in want_list(body, "tools") + want_list(body, "functions")],
                                chat_allowed(chosen)),
            tool_choice=chat_choice(chosen),
            parallel_tools=want_flag(body, "parallel_tool_calls") if body.get("parallel_tool_calls") is not None else None,
            stream=want_flag(body, "stream"), max_tokens=want_count(body, "max_completion_tokens", "max_tokens"),
            stop=chat_stop(body.get("stop")), temperature=want_number(body, "temperature"), top_p=want_number(body, "top_p"),
            top_k=want_count(body, "top_k"), seed=want_count(body, "seed"), presence_penalty=want_number(body, "presence_penalty"),
            frequency_penalty=want_number(body, "frequency_penalty"),
            logprobs=want_count(body, "top_logprobs") or 0 if want_flag(body, "logprobs") else None,
            reasoning=chat_reasoning(body), output=chat_output(body.get("response_format")),
            verbosity=text_or_none(body.get("verbosity")), user=text_or_none(body.get("user")),
            metadata=None if body.get("metadata") is None else want_object(body["metadata"], "metadata"),
            cache_key=text_or_none(body.get("prompt_cache_key")), extra=extra or None)

    def encode_request(self, request: Request) -> Json:
        """The body of a request. In streams usage is always asked for."""
        streams = {"stream": True, "stream_options": {"include_usage": True}} if request.stream else {"stream": False}
        messages = [wire for message in request.messages for wire in chat_wire_messages(message)]
        return {"model": request.model, "messages": messages, **chat_options(request), **streams}

    def decode_reply(self, body: Json) -> Reply:
        """The whole answer, read as a stream of one chunk; raises UpstreamError for one that failed."""
        choices: List[Json] = []
        thought, reader = False, ChatReader()
        for choice in body["choices"] if isinstance(body.get("choices"), list) else ():
            message = choice.get("message") if isinstance(choice, dict) else None
            if isinstance(message, dict):
                calls = message.get("tool_calls")
                numbered = [{**call, "index": at} for at, call in enumerate(calls) if isinstance(call, dict)] if isinstance(calls, list) else None
                # A split answer repeats its thinking: the first pair counts.
                said = {name: value for name, value in message.items() if not (thought and name in CHAT_THOUGHTS + ("reasoning_opaque",))}
                thought = thought or bool(chat_thought(message) or message.get("reasoning_opaque"))
                choice = {**choice, "index": len(choices), "delta": {**said, "tool_calls": numbered}}
            choices.append(choice)
        reader.take({**body, "choices": choices})
        return collect([reader.done()])

    def encode_reply(self, reply: Reply, asked: Optional[Request] = None) -> Json:
        """The completion object of an answer."""
        content, notes, logprobs = "", [], []
        for text in (block for block in reply.content if isinstance(block, Text)):
            notes += chat_wire_notes(text, len(text.text), len(content))
            logprobs += (text.extra or {}).get("logprobs") or []
            content += text.text
        refusals = [block.text for block in reply.content if isinstance(block, Refusal)]
        calls = [chat_wire_call(block) for block in reply.content if isinstance(block, ToolCall)]
        thoughts = chat_wire_thoughts(reply.content)
        message = {"role": "assistant", "content": content if content or not (calls or refusals) else None, "refusal": "".join(refusals) or None,
                   **({"reasoning_content": thoughts["reasoning_text"]} if "reasoning_text" in thoughts else {}), **thoughts,
                   **({"annotations": notes} if notes else {}), **({"tool_calls": calls} if calls else {})}
        choice = {"index": 0, "message": message, "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
                  "finish_reason": stop_word(CHAT, reply.stop_reason)}
        identity = chat_identity(reply.id, reply.created_at, reply.model or (asked.model if asked else ""))
        return {"id": identity["id"], "object": "chat.completion", "created": identity["created"], "model": identity["model"],
                "choices": [choice], "usage": chat_wire_usage(reply.usage or Usage())}

    def decode_stream(self, batches: Iterable[List[Frame]]) -> Iterator[List[Event]]:
        reader = ChatReader()
        for frames in batches:
            yield reader.read(frames)
        rest = reader.end()
        if rest:
            yield rest

    def encode_stream(self, batches: Iterable[List[Event]], asked: Optional[Request] = None) -> Iterator[List[Frame]]:
        """The frames of a stream; with a usage chunk if `asked` asks for one."""
        writer = ChatWriter(asked)
        for events in batches:
            yield writer.write(events)

    def decode_usage(self, body: Json) -> Optional[Usage]:
        return chat_usage(body.get("usage"), body)

    def stop_reason(self, body: Json) -> Optional[str]:
        choices = body.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        return text_or_none(first.get("finish_reason")) if isinstance(first, dict) else None

    def finish(self, body: Json) -> bool:
        unfinished = [choice for choice in objects_in(body.get("choices"))
                      if isinstance(choice.get("message"), dict) and choice.get("finish_reason") is None]
        for choice in unfinished:
            choice["finish_reason"] = "tool_calls" if choice["message"].get("tool_calls") else "stop"
        return bool(unfinished)

    def meter(self, trace_id: str) -> ChatMeter:
        return ChatMeter(trace_id)


class ChatMeter(Meter):
    """A chat stream: every chunk under one `id`, one `[DONE]`, an error object when upstream broke off.

    A read in which every frame holds the pinned id once is passed untouched; two counts find that out.
    """

    def __init__(self, trace_id: str) -> None:
        super().__init__(trace_id)
        self._id: Optional[str] = None
        self._pin = b""  # the bytes `"id":"…"` as upstream writes them
        self._held: List[bytes] = []  # chunks without content that came before any id did

    def relayed(self, frames: bytes) -> bytes:
        if self.ended:
            return b""
        if self._pin and 0 < frames.count(self._pin) == frames.count(b"\n\n") and b"\r" not in frames:
            return frames
        return b"".join(map(self._frame, split_frames(frames)))

    def passes(self, around: bytes) -> bool:
        return not self.ended and self._pin in around and self._pin != b""

    def _frame(self, frame: bytes) -> bytes:
        if self.ended:
            return b""
        if self._pin and self._pin in frame:
            return frame
        if b"[DONE]" in frame and CHAT_DONE.search(frame):
            return self._done(frame)
        chunk = frame_json(frame)
        if chunk is None:
            return frame
        if chunk.get("error") and not chunk.get("choices"):
            self.error, self.ended = stream_failure(chunk), True
            return self._identified() + frame + CHAT_END
        return self._identify(frame, chunk)

    def _identify(self, frame: bytes, chunk: Json) -> bytes:
        """The frame under the stream's id; the first id seen becomes it."""
        own = chunk.get("id")
        if self._id is None:
            if not own and not chunk.get("choices"):
                self._held.append(frame)
                return b""
            self._id = own if isinstance(own, str) and own else f"chatcmpl-{self.trace_id}"
            found = id_member(frame, b'"' + self._id.encode("utf-8", "surrogatepass") + b'"')
            self._pin = found.group(0) if found else dump_json({"id": self._id})[1:-1]
            held, self._held = self._held, []
            return b"".join(map(self._frame, held)) + self._frame(frame)
        return with_chunk_id(frame, chunk, self._id)

    def _done(self, frame: bytes) -> bytes:
        """`[DONE]`, behind a finish reason if upstream gave none: without one clients wait or run no tool (user-pains P31).
        Alone it is no answer."""
        if self._id is None and not self._held:
            return b""
        self.ended = True
        return self._identified() + self._finish() + frame

    def _finish(self) -> bytes:
        """The chunk that says why the answer ends, if none of the last frames does."""
        if self._reason() is not None:
            return b""
        chunks = list(self._last_objects())
        last = next((chunk for chunk in chunks if chunk.get("model")), {})
        called = any(isinstance(choice, dict) and isinstance(choice.get("delta"), dict) and choice["delta"].get("tool_calls")
                     for chunk in chunks for choice in chunk.get("choices") or ())
        return format_sse(None, {"id": self._id or f"chatcmpl-{self.trace_id}", "object": "chat.completion.chunk",
                                 "created": last.get("created", 0), "model": last.get("model", ""),
                                 "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls" if called else "stop"}]})

    def _reason(self) -> Optional[str]:
        """The last finish reason of the last frames."""
        reasons = CHAT_FINISH.findall(b"".join(reversed(last_frames(b"".join(self._recent), self.KEPT_FRAMES))))
        return reasons[-1].decode() if reasons else None

    def _identified(self) -> bytes:
        """The chunks still held for want of an id, under one of ours."""
        held, self._held = self._held, []
        chunks = [(frame, frame_json(frame)) for frame in held]
        return b"".join([with_chunk_id(frame, chunk, f"chatcmpl-{self.trace_id}") if chunk else frame for frame, chunk in chunks])

    def close(self, failure: Optional[Failure]) -> bytes:
        self._learn()
        if self.ended:
            return b""
        rest = self._identified()
        self.ended = True
        if self.stop_reason:
            return rest + CHAT_END
        self.error = failure or CUT
        return rest + format_sse(None, openai_error(UpstreamError(self.error))) + CHAT_END

    def _learn(self) -> None:
        """Reads usage, model and finish reason out of the last frames."""
        self.stop_reason = self._reason()
        billed = None
        for chunk in self._last_objects():
            self.served_model = self.served_model or text_or_none(chunk.get("model")) or ""
            billed = billed or billed_nano(chunk)  # it may come in a chunk of its own
            if self.usage is None or not self.usage.total:
                self.usage = chat_usage(chunk.get("usage"), chunk) or self.usage
        if self.usage is None or not self.usage.total:
            self.usage = next(filter(None, (chat_usage(chunk.get("usage"), chunk) for chunk in self._last_told())), self.usage)
        if billed and self.usage:
            self.usage.billed_nano = billed


def with_chunk_id(frame: bytes, chunk: Json, wanted: str) -> bytes:
    """The frame with another top-level id. Its other bytes stay upstream's where the id can be found for sure."""
    own = chunk.get("id")
    if isinstance(own, str):
        spot = re.findall(rb'"id"\s*:\s*"' + re.escape(own.encode("utf-8", "surrogatepass")) + rb'"', frame)
        if len(spot) == 1:
            return frame.replace(spot[0], dump_json({"id": wanted})[1:-1], 1)
    chunk["id"] = wanted
    return format_sse(None, chunk)


###############################################################################
#                              OpenAI Responses                               #
###############################################################################
# POST /v1/responses. API reference "Responses", "Streaming events", 2026-09; what Copilot makes of it:
# copilot-upstream 6.
#
#   {"model","instructions","input":"…"|[{"role":"user","content":[{"type":"input_text","text"}]},
#     {"type":"function_call","call_id","name","arguments"},{"type":"function_call_output","call_id","output"},
#     {"type":"reasoning","id","summary":[{"type":"summary_text","text"}],"encrypted_content"}],"tools":[{"type":"function",…}],
#    "reasoning":{"effort","summary"},"text":{"format":{"type":"json_schema","name","schema"},"verbosity"},"max_output_tokens"}
#   {"id","object":"response","created_at","status":"completed","model","output":[{"type":"message","id","role":"assistant",
#     "content":[{"type":"output_text","text","annotations":[]}]}],"usage":{"input_tokens","output_tokens",…}}
#   event: response.created            {"type","sequence_number","response":{…}}
#   event: response.output_item.added  {"type","sequence_number","output_index":0,"item":{"id","type":"message","content":[],…}}
#   event: response.output_text.delta  {"type","sequence_number","output_index":0,"content_index":0,"item_id","delta"}
#   event: response.output_item.done   {"type","sequence_number","output_index":0,"item":{…}}
#   event: response.completed          {"type","sequence_number","response":{…,"usage":{…}}}
#
# A message item holds parts, every part is a block; each other item is one block. Ids of items mean nothing (Copilot
# gives one item up to four), `output_index` does.

RESPONSES_ROLES = frozenset(("system", "developer", "user", "assistant"))
RESPONSES_TERMINALS = frozenset(("response.completed", "response.incomplete", "response.failed", "response.cancelled"))
SEQUENCE_NUMBER = re.compile(rb'"sequence_number"\s*:\s*(\d{1,15})')
RESPONSES_TEXT_PARTS = frozenset(("input_text", "output_text", "text", "summary_text", "reasoning_text"))
# item type -> (kind of the call, field that holds its arguments)
RESPONSES_CALLS = {"function_call": ("function", "arguments"), "custom_tool_call": ("custom", "input"),
                   "tool_search_call": ("search", "arguments"), "local_shell_call": ("server", "action")}
RESPONSES_RESULTS = {"function_call_output": "function", "custom_tool_call_output": "custom",
                     "tool_search_output": "search", "local_shell_call_output": "server"}
RESPONSES_CALL_ITEMS = {kind: (item, field_name) for item, (kind, field_name) in RESPONSES_CALLS.items()}
RESPONSES_RESULT_ITEMS = {kind: item for item, kind in RESPONSES_RESULTS.items()}
RESPONSES_TOOL_TYPES = {"function": "function", "custom": "custom", "search": "tool_search"}
RESPONSES_SERVER_TOOLS = frozenset((
    "web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11", "file_search",
    "code_interpreter", "image_generation", "mcp", "computer", "computer_use_preview", "local_shell", "shell",
    "apply_patch", "tool_search", "programmatic_tool_calling"))
# fields of a tool that only this dialect knows
RESPONSES_TOOL_FIELDS = frozenset((
    "output_schema", "environment", "external_web_access", "search_content_types", "search_context_size", "user_location",
    "filters", "vector_store_ids", "max_num_results", "ranking_options", "container", "server_label", "server_url",
    "server_description", "connector_id", "authorization", "headers", "allowed_tools", "require_approval", "display_width",
    "display_height", "action", "background", "input_fidelity", "input_image_mask", "model", "moderation",
    "output_compression", "output_format", "partial_images", "quality", "size"))
# Items and content parts without a place in the hub that are written back as they came. Their ids are not, but for
# those that name something or are bound to a fingerprint (copilot-upstream 6.4).
RESPONSES_OPAQUE = frozenset((
    "compaction_trigger", "item_reference", "web_search_call", "file_search_call", "computer_call", "computer_call_output",
    "code_interpreter_call", "image_generation_call", "mcp_call", "mcp_list_tools", "mcp_approval_request",
    "mcp_approval_response", "shell_call", "shell_call_output", "apply_patch_call", "apply_patch_call_output", "program",
    "program_output", "agent_message", "configuration_update", "tool_search_call", "tool_search_output"))
RESPONSES_OPAQUE_PARTS = frozenset(("input_audio",))
RESPONSES_BOUND_IDS = frozenset(("item_reference", "program", "program_output", "agent_message"))
# Prefixes of ids we make (copilot-upstream 6.4).
RESPONSES_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc", "compaction": "cmp",
                      "web_search_call": "ws", "tool_search_call": "tsc", "tool_search_output": "tso", "program": "cm",
                      "program_output": "cmo", "agent_message": "amsg", "shell_call": "sh", "shell_call_output": "sho",
                      "apply_patch_call": "apc", "local_shell_call": "lsh"}
RESPONSES_ANNOTATIONS = frozenset(("file_citation", "url_citation", "container_file_citation", "file_path"))
# Top-level fields that only this dialect knows, with the type (or values) that tells them from another dialect's of
# that name: Messages has a `context_management`, too.
RESPONSES_PASSED: Tuple[Tuple[str, Any], ...] = (
    ("truncation", str), ("safety_identifier", str), ("prompt_cache_retention", str), ("previous_response_id", str),
    ("max_tool_calls", int), ("background", bool), ("context_management", list), ("prompt", dict), ("moderation", dict),
    ("prompt_cache_options", dict), ("conversation", (str, dict)),
    ("service_tier", ("auto", "default", "flex", "scale", "priority")))
# Top-level fields that become words of the hub (or, `store`, are ours alone to say).
RESPONSES_READ = frozenset((
    "model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "stream", "max_output_tokens", "temperature",
    "top_p", "top_logprobs", "reasoning", "text", "user", "metadata", "prompt_cache_key", "include", "store"))
ENCRYPTED_REASONING, TEXT_LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"
# The least `max_output_tokens` upstream takes (copilot-upstream 6.1).
RESPONSES_LEAST_OUTPUT = 16

# ---- content parts ----------------------------------------------------------


def responses_part(part: Any) -> Block:
    """The block of one content part."""
    if isinstance(part, str):
        return Text(part)
    kind = name_in(part, "type")
    if kind in RESPONSES_TEXT_PARTS and isinstance(part.get("text"), str):
        logprobs, notes = part.get("logprobs"), part.get("annotations")
        return Text(part["text"], citations=notes if notes and isinstance(notes, list) else None,
                    extra={"logprobs": logprobs} if logprobs and isinstance(logprobs, list) else None)
    if kind == "input_image":
        image = image_of_url(part.get("image_url"), part.get("detail"))
        image.file_id = text_or_none(part.get("file_id"))
        return image
    if kind == "input_file":
        given = text_or_none(part.get("file_data"))
        media_type, data = split_data_url(given) if given else (None, None)
        return File(media_type=media_type, data=given if data is None else data, url=text_or_none(part.get("file_url")),
                    file_id=text_or_none(part.get("file_id")), name=text_or_none(part.get("filename")))
    if kind == "refusal":
        return Refusal(text_or_none(part.get("refusal")) or "")
    return Opaque(kind, part)


def responses_content(content: Any, path: str) -> List[Block]:
    """The blocks of a message's content or of a call's output: string, list of parts, or null."""
    if content is None:
        return []
    if isinstance(content, str):
        return [Text(content)]
    if not isinstance(content, list):
        raise wrong_type(path, "a string or a list", content)
    return [responses_part(part) for part in content]


def responses_input_part(block: Block) -> Optional[Json]:
    """What a user, a system prompt or a tool says, as a part; None for what is no part."""
    if isinstance(block, (Text, Refusal)):
        return {"type": "input_text", "text": block.text}
    if isinstance(block, Image):
        return responses_image(block)
    if isinstance(block, File):
        return responses_file(block)
    if isinstance(block, ToolReference):
        return {"type": "input_text", "text": f"Tool {block.name} loaded"}
    if isinstance(block, Opaque) and block.kind in RESPONSES_OPAQUE_PARTS:
        return block.raw
    return None


def responses_image(image: Image) -> Optional[Json]:
    """{"type":"input_image","image_url":"data:…"|"https:…","file_id","detail"}"""
    url = image.url if image.data is None else f"data:{image.media_type or 'image/png'};base64,{image.data}"
    if url is None and image.file_id is None:
        return None
    said = {"image_url": url, "file_id": image.file_id, "detail": image.detail}
    return {"type": "input_image", **{name: value for name, value in said.items() if value is not None}}


def responses_file(file: File) -> Optional[Json]:
    """{"type":"input_file","filename","file_data":"data:application/pdf;base64,…"|…,"file_url","file_id"}; text files are text."""
    words = file_note(file) or file_text(file)
    if words is not None:
        return {"type": "input_text", "text": words}
    data = file.data
    if data is not None and file.media_type is not None:
        data = f"data:{file.media_type};base64,{data}"
    if data is None and file.url is None and file.file_id is None:
        return None
    said = {"filename": file_name(file), "file_data": data, "file_url": file.url, "file_id": file.file_id}
    return {"type": "input_file", **{name: value for name, value in said.items() if value is not None}}


def responses_output_part(block: Union[Text, Refusal], whole: bool) -> Json:
    """What the model said, as a part; a `whole` one names empty lists too, as the SDKs' types want."""
    if isinstance(block, Refusal):
        return {"type": "refusal", "refusal": block.text}
    said = {"annotations": responses_annotations(block), "logprobs": (block.extra or {}).get("logprobs") or []}
    return {"type": "output_text", "text": block.text, **{name: value for name, value in said.items() if value or whole}}


def responses_annotations(text: Text) -> List[Json]:
    """A text's citations as annotations: our own as they are, any other with a `url` as one over the whole text."""
    notes: List[Json] = []
    for note in text.citations or ():
        if name_in(note, "type") == "url_citation":
            notes.append({**note, "title": name_in(note, "title")})  # a string in the SDK's type
        elif name_in(note, "type") in RESPONSES_ANNOTATIONS:
            notes.append(note)
        elif name_in(note, "url"):
            notes.append({"type": "url_citation", "url": note["url"], "title": name_in(note, "title"),
                          "start_index": 0, "end_index": len(text.text)})
    return notes


# ---- items ------------------------------------------------------------------


def responses_list(value: Any) -> List[Any]:
    """The value if it is a list: what upstream sends is taken as it comes."""
    return value if isinstance(value, list) else []


def responses_block(item: Json, kind: str) -> Block:
    """The block of an item that is no message and no output of a call."""
    if kind in RESPONSES_CALLS and not (kind == "tool_search_call" and item.get("execution") == "server"):
        call_kind, field_name = RESPONSES_CALLS[kind]
        return ToolCall(text_or_none(item.get("call_id")) or text_or_none(item.get("id")) or "",
                        text_or_none(item.get("name")) or kind[:-len("_call")], responses_arguments(item.get(field_name)),
                        call_kind, text_or_none(item.get("namespace")))
    if kind == "reasoning":
        parts = responses_list(item.get("summary")) + responses_list(item.get("content"))
        return Thinking("\n\n".join(filter(None, (name_in(part, "text") for part in parts))),
                        text_or_none(item.get("encrypted_content")), id=text_or_none(item.get("id")))
    if kind == "compaction":
        return Compaction(sealed=text_or_none(item.get("encrypted_content")), id=text_or_none(item.get("id")))
    return Opaque(kind, item)


def responses_arguments(given: Any) -> str:
    """A call's arguments as text: most are, a search's and a shell's are an object."""
    if given is None or isinstance(given, str):
        return given or ""
    if isinstance(given, dict) and len(given) == 1 and isinstance(given.get("_raw_arguments"), str):
        return given["_raw_arguments"]
    try:
        return dump_json(given).decode()
    except RecursionError:
        return "{}"


def responses_arguments_object(arguments: str) -> Json:
    """The object a text of arguments stands for; text that is none is kept inside one."""
    value = load_object(arguments) if arguments else {}
    return {"_raw_arguments": arguments} if value is None else value


def responses_wire_item(block: Block) -> Optional[Json]:
    """The item of a block that is no part of a message, without id and status; None for what the dialect cannot say."""
    if isinstance(block, Thinking):
        sealed = block.redacted if block.signature is None else block.signature
        summary = [{"type": "summary_text", "text": block.text}] if block.text else []
        return {"type": "reasoning", "summary": summary, **({} if sealed is None else {"encrypted_content": sealed})}
    if isinstance(block, ToolCall):
        return responses_wire_call(block)
    if isinstance(block, Compaction):
        return None if block.sealed is None else {"type": "compaction", "encrypted_content": block.sealed}
    if isinstance(block, Opaque) and block.kind in RESPONSES_OPAQUE and isinstance(block.raw, dict):
        return {**block.raw, "type": block.kind}
    return None


def responses_wire_call(call: ToolCall) -> Optional[Json]:
    """{"type":"function_call","call_id","name","arguments","namespace"}, or the item of the call's kind."""
    if call.kind not in RESPONSES_CALL_ITEMS or call.kind == "server" and call.name != "local_shell":
        return None
    kind, field_name = RESPONSES_CALL_ITEMS[call.kind]
    item: Json = {"type": kind, "call_id": call.id}
    if call.kind in ("function", "custom"):
        space = {} if call.namespace is None else {"namespace": call.namespace}
        return {**item, "name": call.name, field_name: call.arguments, **space}
    item[field_name] = responses_arguments_object(call.arguments)
    return {**item, "execution": "client", "status": "completed"} if call.kind == "search" else {**item, "status": "completed"}


def responses_item(item: Json, path: str) -> Message:
    """One input item as the message it belongs to; an empty one for tools, which the caller collects."""
    kind = name_in(item, "type") or ("item_reference" if "role" not in item and "content" not in item and item.get("id") else "message")
    if kind == "message":
        role, phase = name_in(item, "role"), text_or_none(item.get("phase"))
        if role not in RESPONSES_ROLES:
            raise ClientError(f"{path}.role: expected system, developer, user or assistant, got {item.get('role')!r}", param=f"{path}.role")
        return Message(role, in_phase(responses_content(item.get("content"), f"{path}.content"), phase if role == "assistant" else None))
    if kind in RESPONSES_RESULTS and item.get("execution") != "server":
        return Message("user", [responses_result(item, kind, path)])
    if kind == "additional_tools":
        return Message("developer", [])
    if kind == "reasoning":
        for name in ("summary", "content"):
            want_list(item, name)
    # What a model says (…_call, its reasoning, its compaction) is the assistant's, the rest belongs to nobody's turn.
    return Message("assistant" if kind.endswith("_call") or kind in ("reasoning", "compaction") else "developer",
                   [responses_block(item, kind)])


def responses_call_id(seed: str, place: int) -> str:
    """An id for a call that came without any, the same whenever it is read at that place."""
    return "call_" + hashlib.sha256(f"{seed}|{place}".encode("utf-8", "replace")).hexdigest()[:24]


def responses_paired(messages: List[Message]) -> List[Message]:
    """The messages; gives calls and results that have no id one: a call by its place, a result that of the first call nobody
    has answered."""
    calls, unanswered = 0, []  # in the order they came
    for message in messages:
        for block in message.content:
            if isinstance(block, ToolCall):
                calls, block.id = calls + 1, block.id or responses_call_id("", calls)
                unanswered.append(block.id)
            elif isinstance(block, ToolResult):
                block.call_id = block.call_id or (unanswered[0] if unanswered else "")
                if block.call_id in unanswered:
                    unanswered.remove(block.call_id)
    return messages


def in_phase(blocks: List[Block], phase: Optional[str]) -> List[Block]:
    """The blocks, their texts in a phase of the answer."""
    return [replace(block, phase=phase) if phase and isinstance(block, Text) else block for block in blocks]


def responses_result(item: Json, kind: str, path: str) -> ToolResult:
    """The result an output item holds; `status` tells an error where there is one, a search names what it found."""
    call_id = text_or_none(item.get("call_id")) or ""
    if kind == "tool_search_output":
        found = responses_tools(want_list(item, "tools"))
        return ToolResult(call_id, [ToolReference(tool.name, extra={"namespace": tool.namespace} if tool.namespace else None)
                                    for tool in found], kind="search")
    output = item.get("output")
    content = responses_content(output, f"{path}.output") if output is None or isinstance(output, (str, list)) else [Opaque(kind, output)]
    return ToolResult(call_id, content, {"completed": False, "incomplete": True}.get(name_in(item, "status")), RESPONSES_RESULTS[kind])


def responses_wire_result(result: ToolResult, tools: Sequence[Tool]) -> Json:
    """{"type":"function_call_output","call_id","output":"…"|[parts]}, or the output item of the result's kind."""
    kind = RESPONSES_RESULT_ITEMS.get(result.kind, "function_call_output")
    item: Json = {"type": kind, "call_id": result.call_id}
    if kind == "tool_search_output":
        wanted = {(part.name, (part.extra or {}).get("namespace")) for part in result.content if isinstance(part, ToolReference)}
        found = [tool for tool in tools if (tool.name, tool.namespace) in wanted or (tool.name, None) in wanted]
        return {**item, "execution": "client", "status": "completed", "tools": responses_wire_tools(found)}
    texts = [part.text for part in result.content if isinstance(part, Text)]
    if kind == "local_shell_call_output" or len(texts) == len(result.content) < 2:
        item["output"] = "\n".join(texts)
    else:
        item["output"] = [part for part in map(responses_input_part, result.content) if part is not None] or ""
    if result.is_error is not None and kind != "custom_tool_call_output":
        item["status"] = "incomplete" if result.is_error else "completed"
    return item


# ---- tools ------------------------------------------------------------------


def responses_tools(tools: Iterable[Any], namespace: Optional[str] = None, about: Optional[str] = None) -> List[Tool]:
    """The tools of a list, namespaces opened; each keeps what its namespace says about itself."""
    found: List[Tool] = []
    for tool in tools:
        tool = tool if isinstance(tool, dict) else {}
        if name_in(tool, "type") == "namespace":
            found.extend(responses_tools(want_list(tool, "tools"), text_or_none(tool.get("name")), text_or_none(tool.get("description"))))
        else:
            found.append(responses_tool(tool, namespace, about))
    return found


def responses_tool(tool: Json, namespace: Optional[str], about: Optional[str]) -> Tool:
    """One tool. A search that the client runs is a kind of its own, whatever upstream runs is a server tool."""
    wire_type = name_in(tool, "type") or "function"
    kind = {"function": "function", "custom": "custom"}.get(wire_type, "server")
    if wire_type == "tool_search" and tool.get("execution") == "client":
        kind = "search"
    extra = {name: value for name, value in tool.items() if name in RESPONSES_TOOL_FIELDS and value is not None}
    if namespace and about:
        extra["namespace_description"] = about
    schema, strict, deferred, grammar = (tool.get(name) for name in ("parameters", "strict", "defer_loading", "format"))
    return Tool((text_or_none(tool.get("name")) if kind in ("function", "custom") else None) or wire_type,
                text_or_none(tool.get("description")), schema if isinstance(schema, dict) else None, kind, namespace,
                deferred if isinstance(deferred, bool) else None, strict if isinstance(strict, bool) else None,
                grammar if isinstance(grammar, dict) else None, extra=extra or None)


def by_namespace(tools: Iterable[Tool]) -> List[List[Tool]]:
    """The tools in groups: those of one namespace together, where its first one stood; every other alone."""
    groups: Dict[Any, List[Tool]] = {}
    for at, tool in enumerate(tools):
        groups.setdefault(tool.namespace or at, []).append(tool)
    return list(groups.values())


def responses_wire_tools(tools: Iterable[Tool]) -> List[Json]:
    """The tools of a request, those of one namespace inside one `namespace` tool. Its description must not be empty."""
    wire: List[Json] = []
    for group in by_namespace(tools):
        inner = [tool for tool in map(responses_wire_tool, group) if tool is not None]
        space = group[0].namespace
        if space and inner:
            about = next(((tool.extra or {})["namespace_description"] for tool in group if (tool.extra or {}).get("namespace_description")), space)
            inner = [{"type": "namespace", "name": space, "description": about, "tools": inner}]
        wire.extend(inner)
    return wire


def responses_wire_tool(tool: Tool) -> Optional[Json]:
    """One tool; None for a server tool of another dialect. `strict` is always said: upstream's default is true."""
    wire_type = RESPONSES_TOOL_TYPES.get(tool.kind, tool.name)
    if tool.kind == "server" and wire_type not in RESPONSES_SERVER_TOOLS:
        return None
    wire: Json = {"type": wire_type}
    wire.update((name, value) for name, value in (tool.extra or {}).items() if name in RESPONSES_TOOL_FIELDS)
    schema = tool.schema
    if tool.kind in ("function", "custom"):
        wire["name"] = tool.name
    if tool.kind == "function":
        schema = {"type": "object", "properties": {}} if schema is None else schema
        wire["strict"] = bool(tool.strict)
    if tool.kind == "search":
        wire["execution"] = "client"
    said = {"description": tool.description, "parameters": None if tool.kind == "custom" else schema,
            "format": tool.grammar if tool.kind == "custom" else None, "defer_loading": tool.deferred}
    wire.update((name, value) for name, value in said.items() if value is not None)
    return wire


def responses_choice(value: Any) -> Optional[ToolChoice]:
    """"auto" | "none" | "required" | {"type":"function"|"custom","name"} | {"type":"web_search"} | {"type":"allowed_tools",…}"""
    if isinstance(value, str):
        return ToolChoice(value) if value in ("auto", "none", "required") else None
    kind, name = name_in(value, "type"), name_in(value, "name")
    if kind == "allowed_tools":
        allowed = responses_list(value.get("tools"))
        forced = value.get("mode") == "required"
        only = responses_choice(allowed[0]) if forced and len(allowed) == 1 and isinstance(allowed[0], dict) \
            and allowed[0].get("type") != "allowed_tools" else None
        return only or ToolChoice("required" if forced else "auto")
    if kind in ("function", "custom"):
        return ToolChoice("tool", name, text_or_none(value.get("namespace")), kind) if name else None
    return ToolChoice("tool", kind, None, "server") if kind else None


def responses_allowed(value: Any) -> List[Tool]:
    """The tools that a choice of {"type":"allowed_tools"} lists, none for any other choice."""
    listed = responses_list(value.get("tools")) if name_in(value, "type") == "allowed_tools" else []
    return [tool for entry in listed if isinstance(entry, dict)
            for tool in responses_tools([entry], text_or_none(entry.get("namespace")))]


def responses_wire_choice(choice: ToolChoice) -> Any:
    """The wire form of a choice; a search cannot be forced."""
    if choice.mode != "tool":
        return choice.mode
    if choice.kind == "server" and choice.name in RESPONSES_SERVER_TOOLS:
        return {"type": choice.name}
    if choice.kind not in ("function", "custom") or not choice.name:
        return "auto"
    space = {} if choice.namespace is None else {"namespace": choice.namespace}
    return {"type": choice.kind, "name": choice.name, **space}


# ---- options ----------------------------------------------------------------


def responses_object(body: Json, name: str) -> Json:
    """The object under `name`, empty when absent or null."""
    return {} if body.get(name) is None else want_object(body[name], name)


def responses_reasoning(given: Json) -> Optional[Reasoning]:
    """{"effort","summary"}; `off`, in VS Code's words, means no summary."""
    effort = text_or_none(given.get("effort"))
    summary = text_or_none(given.get("summary")) or text_or_none(given.get("generate_summary"))
    if effort is None and summary is None:
        return None
    return Reasoning(effort=effort, summary=summary, visible=None if summary is None else summary not in ("off", "none"))


def responses_wire_reasoning(reasoning: Reasoning) -> Json:
    """The wire form of what was said about thinking. Where its text would be shown, a summary is asked for."""
    thinks = reasoning.mode in ("on", "adaptive")
    effort = reasoning.effort
    if effort is None and reasoning.mode == "off":
        effort = "none"
    elif effort is None and reasoning.budget is not None:
        effort = effort_of_budget(reasoning.budget)
    shown = reasoning.visible or thinks and reasoning.visible is None
    said = {"effort": effort, "summary": reasoning.summary or ("auto" if shown else None)}
    return {name: value for name, value in said.items() if value is not None}


def responses_output(given: Any) -> Optional[OutputFormat]:
    """{"type":"json_schema","name","schema","strict","description"} | {"type":"json_object"}; `text` asks for nothing."""
    kind = name_in(given, "type")
    if kind == "json_object":
        return OutputFormat()
    if kind != "json_schema":
        return None
    schema, strict = given.get("schema"), given.get("strict")
    return OutputFormat(schema if isinstance(schema, dict) else {}, text_or_none(given.get("name")),
                        strict if isinstance(strict, bool) else None, text_or_none(given.get("description")))


def responses_wire_output(output: OutputFormat) -> Json:
    """The wire form of the structure wanted; a schema must have a name."""
    if output.schema is None:
        return {"type": "json_object"}
    said = {"strict": output.strict, "description": output.description}
    return {"type": "json_schema", "name": output.name or "output", "schema": output.schema,
            **{name: value for name, value in said.items() if value is not None}}


def responses_extra(body: Json) -> Optional[Json]:
    """What the hub has no word for, by its name."""
    extra = {name: value for name, value in body.items() if name not in RESPONSES_READ and value is not None}
    included = [name for name in responses_list(body.get("include")) if name not in (ENCRYPTED_REASONING, TEXT_LOGPROBS)]
    modes = {name: value for name, value in responses_object(body, "reasoning").items() if name in ("context", "mode") and value is not None}
    if included:
        extra["include"] = included
    if modes:
        extra["reasoning"] = modes
    return extra or None


def responses_passed(extra: Json) -> Json:
    """Those of the fields without a word in the hub that this dialect knows."""
    passed: Json = {}
    for name, wanted in RESPONSES_PASSED:
        value = extra.get(name)
        values = isinstance(wanted, tuple) and isinstance(wanted[0], str)
        if value is not None and (value in wanted if values else isinstance(value, wanted) and not (wanted is int and value is True)):
            passed[name] = value
    return passed


def responses_instructions(messages: Sequence[Message]) -> Optional[str]:
    """The leading system prompt, where it is nothing but text."""
    leading = messages[0] if messages and messages[0].role == "system" else None
    if leading is None or not all(isinstance(block, Text) for block in leading.content):
        return None
    return "\n\n".join(block.text for block in leading.content if isinstance(block, Text))


def responses_options(request: Request) -> Json:
    """A request's fields but its model and its input: what is asked, and what a response object repeats of it."""
    text: Json = {}
    if request.output is not None:
        text["format"] = responses_wire_output(request.output)
    if request.verbosity is not None:
        text["verbosity"] = request.verbosity
    tools = responses_wire_tools(request.tools)
    reasoning = (request.extra or {}).get("reasoning")
    reasoning = {name: reasoning[name] for name in ("context", "mode") if reasoning.get(name)} if isinstance(reasoning, dict) else {}
    said = {
        "instructions": responses_instructions(request.messages), "tools": tools or None,
        "tool_choice": responses_wire_choice(request.tool_choice) if tools and request.tool_choice is not None else None,
        "parallel_tool_calls": request.parallel_tools,
        "max_output_tokens": None if request.max_tokens is None else max(RESPONSES_LEAST_OUTPUT, request.max_tokens),
        "temperature": request.temperature, "top_p": request.top_p, "top_logprobs": request.logprobs or None,
        "reasoning": {**reasoning, **(responses_wire_reasoning(request.reasoning) if request.reasoning is not None else {})} or None,
        "text": text or None, "user": request.user, "metadata": request.metadata, "prompt_cache_key": request.cache_key}
    return {**responses_passed(request.extra or {}), **{name: value for name, value in said.items() if value is not None}}


def responses_input(request: Request) -> List[Json]:
    """The items of a conversation; the system prompt that became `instructions` is left out."""
    messages = request.messages[1:] if responses_instructions(request.messages) is not None else request.messages
    # A call nobody can say leaves no result behind either.
    unsaid = {block.id for message in messages for block in message.content
              if isinstance(block, ToolCall) and responses_wire_call(block) is None}
    return [item for message in messages for item in responses_message_items(message, request.tools, unsaid)]


def responses_message_items(message: Message, tools: Sequence[Tool], unsaid: Any) -> Iterator[Json]:
    """The items of one message: its words as `message` items, one per phase, calls and results between them."""
    said: Optional[Json] = None
    for block in message.content:
        phase = block.phase if isinstance(block, Text) and message.role == "assistant" else None
        if message.role != "assistant":
            part = responses_input_part(block)
        else:
            part = responses_output_part(block, False) if isinstance(block, (Text, Refusal)) else None
        if part is None:
            item = responses_replayed(block, tools, unsaid)
            if item is not None:
                if said is not None:
                    yield said
                said = None
                yield item
            continue
        if said is not None and said.get("phase") != phase:
            yield said
            said = None
        if said is None:
            said = {"type": "message", "role": message.role, "content": [], **({} if phase is None else {"phase": phase})}
        said["content"].append(part)
    if said is not None:
        yield said


def responses_replayed(block: Block, tools: Sequence[Tool], unsaid: Any) -> Optional[Json]:
    """An item of the history. Only what is bound to its id has one; thinking nobody sealed is nothing to upstream."""
    if isinstance(block, ToolResult):
        return None if block.call_id in unsaid else responses_wire_result(block, tools)
    if isinstance(block, Compaction) and block.sealed is None and block.summary:
        return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": block.summary}]}
    item = responses_wire_item(block)
    if item is None or isinstance(block, Thinking) and "encrypted_content" not in item:
        return None
    if isinstance(block, (Thinking, Compaction)) and block.id is not None:
        item["id"] = block.id
    elif isinstance(block, Opaque) and block.kind not in RESPONSES_BOUND_IDS:
        item.pop("id", None)
    return item


def responses_usage(usage: Any, body: Json) -> Optional[Usage]:
    """The hub's usage of a Responses usage object."""
    if not isinstance(usage, dict):
        return None
    return Usage(input=count_or_zero(usage, "input_tokens"), output=count_or_zero(usage, "output_tokens"),
                 cache_read=count_or_zero(usage, "input_tokens_details", "cached_tokens"),
                 cache_write=count_or_zero(usage, "input_tokens_details", "cache_write_tokens"),
                 reasoning=count_or_zero(usage, "output_tokens_details", "reasoning_tokens"),
                 billed_nano=billed_nano(body))


def responses_wire_usage(usage: Usage) -> Json:
    """{"input_tokens","input_tokens_details":{…},"output_tokens","output_tokens_details":{…},"total_tokens"}"""
    return {"input_tokens": usage.input,
            "input_tokens_details": {"cached_tokens": usage.cache_read, "cache_write_tokens": usage.cache_write},
            "output_tokens": usage.output, "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.total}


# ---- reading a stream -------------------------------------------------------


class ResponsesPart:
    """An open block of a stream being read."""

    __slots__ = ("index", "block", "texts", "said", "final", "spot", "notes", "logprobs")

    def __init__(self, index: int, block: Block) -> None:
        self.index = index
        self.block = block
        self.texts: List[str] = []
        self.said = False  # upstream called its text complete
        self.final: Optional[Block] = None
        self.spot: Any = None  # the summary part that streams
        self.notes: List[Json] = []
        self.logprobs: List[Json] = []


RESPONSES_VARYING = re.compile(r'"(sequence_number|item_id|obfuscation|delta)"(\s*:\s*)')


def responses_skeleton(data: str) -> Optional[Pattern[str]]:
    """What fits a text's delta of another number, item id (Copilot's change) and padding; group 1 is the text with its
    closing quote. None for a frame of another form."""
    pieces = RESPONSES_VARYING.split(data)
    pattern = re.escape(pieces[0])
    for name, colon, rest in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
        value = re.match(r'[0-9]+(?![0-9.eE])' if name == "sequence_number" else r'"[^"\\]*(?:\\.[^"\\]*)*"', rest)
        if value is None:
            return None
        form = {"sequence_number": "(?:0|[1-9][0-9]*)", "delta": r'"([^"\\]*(?:\\.[^"\\]*)*")'}.get(name, r'"[ !#-\[\]-~]*"')
        pattern += re.escape(f'"{name}"{colon}') + form + re.escape(rest[value.end():])
    return re.compile(pattern) if pieces[1::3].count("delta") == 1 else None


class ResponsesReader:
    """Reads one stream: frames in, the hub's events out.

    Blocks are known by `output_index` and `content_index`, never by an id. Blocks that stream open with their first
    event and close with their item, or, once their text is complete, when another opens; the others come whole with
    `output_item.done`. What only a `…done` event says is made up for by a delta.
    """

    LEARNINGS = 8  # tries in a row to learn a skeleton that no frame has fitted: more would cost more than it gains

    def __init__(self) -> None:
        self.ended = False
        self._events: List[Event] = []
        self._started = False
        self._count = 0
        self._seed = ""  # the response's id
        self._items: Dict[int, Json] = {}  # as `output_item.added` gave them
        self._done: set = set()
        self._parts: Dict[Tuple[int, int], ResponsesPart] = {}
        self._closed: set = set()
        self._called = False
        self._held: Optional[Failure] = None
        self._spoken: Optional[Tuple[Tuple[int, int], ResponsesPart]] = None  # where the last event went, if it was a text's delta
        self._skeleton: Optional[Pattern[str]] = None  # see `responses_skeleton`
        self._learnings = 0

    def read(self, frames: Iterable[Frame]) -> List[Event]:
        """The events of one batch of frames."""
        self._events = []
        for frame in frames:
            if self._skeleton is not None and self._fits(frame.data):
                continue
            event = load_object(frame.data)
            if event is None or self.ended:
                continue
            if self._goes_on(event):
                self._learn(frame.data)
            else:
                self.take(event)
        return self._events

    # Nearly all frames are deltas of one text that differ in a number, ids and the text only: what fits a pattern made of
    # the last one is the same JSON but for these, and need not be parsed.

    def _fits(self, data: str) -> bool:
        """Whether a frame fits the pattern; its text has gone out then."""
        found, spoken = self._skeleton.fullmatch(data) if self._skeleton is not None else None, self._spoken
        if found is None or spoken is None:
            return False
        try:
            text = json.decoder.scanstring(data, found.start(1))[0]
        except ValueError:
            return False
        if text:
            self._learnings = 0
            spoken[1].texts.append(text)
            self._events.append(BlockDelta(spoken[1].index, text))
        return bool(text)

    def _learn(self, data: str) -> None:
        """Makes a pattern of a frame that was nothing but a delta, unless the last ones were of no use."""
        self._learnings += 1
        self._skeleton = responses_skeleton(data) if self._learnings <= self.LEARNINGS else None

    def _goes_on(self, event: Json) -> bool:
        """Whether a wire event was nothing but more of the text that streamed last: the short way of nearly all of them."""
        spoken = self._spoken
        if spoken is None or event.get("type") != "response.output_text.delta" or event.get("logprobs"):
            return False
        delta = event.get("delta")
        if type(delta) is not str or not delta or (event.get("output_index"), event.get("content_index")) != spoken[0]:
            return False
        part = spoken[1]
        part.texts.append(delta)
        self._events.append(BlockDelta(part.index, delta))
        return True

    def take(self, event: Json) -> List[Event]:
        """The events so far, those of one more wire event among them."""
        self._spoken = self._skeleton = None
        kind = event.get("type")
        action = self._actions.get(kind) if type(kind) is str else None
        if action is None and isinstance(event.get("error"), dict):
            action = ResponsesReader._error
        if self._held is not None and action is not ResponsesReader._error:
            self._fail(self._held)
        elif action is None:
            self._events.append(Pulse())
        else:
            action(self, event)
        return self._events

    def end(self) -> List[Event]:
        """What is left at the end of the input: a failure that waited for the `error` event that may follow it."""
        self._events = []
        if self._held is not None and not self.ended:
            self._fail(self._held)
        return self._events

    # -- blocks --

    def _place(self, event: Json) -> Tuple[int, int]:
        """(output_index, content_index) of an event; what it does not say is the newest item, the first part."""
        at, part = event.get("output_index"), event.get("content_index")
        if type(at) is not int:
            at = max(self._items, default=0)
        return at, part if type(part) is int else 0

    def _open(self, place: Tuple[int, int], block: Block) -> ResponsesPart:
        for other in [other for other, part in self._parts.items() if part.said]:
            self._close(other)
        part = self._parts[place] = ResponsesPart(self._count, block)
        self._count += 1
        self._closed.discard(place)
        self._called = self._called or isinstance(block, ToolCall)
        self._events.append(BlockStart(part.index, block))
        return part

    def _close(self, place: Tuple[int, int], final: Optional[Block] = None) -> None:
        part = self._parts.pop(place)
        self._closed.add(place)
        final = part.final if final is None else final
        if isinstance(part.block, Text) and (part.notes or part.logprobs):
            final = part.block if final is None else final
            if isinstance(final, Text):
                final = replace(final, citations=final.citations or part.notes or None,
                                extra=final.extra or ({"logprobs": part.logprobs} if part.logprobs else None))
        self._events.append(BlockStop(part.index, final))

    def _more(self, part: ResponsesPart, text: str) -> None:
        part.texts.append(text)
        self._events.append(BlockDelta(part.index, text))

    def _complete(self, place: Tuple[int, int], block: Block) -> None:
        """A block as its item gives it at the end: what has not streamed does so now."""
        said = main_text(block)
        if said is None:
            self._open(place, block)
            return self._close(place)
        part = self._parts.get(place)
        if part is not None and (type(part.block), getattr(part.block, "kind", None)) != (type(block), getattr(block, "kind", None)):
            self._close(place)  # announced as something else
            part = None
        if part is None:
            part = self._open(place, opening(block))
        streamed = "".join(part.texts)
        if len(said) > len(streamed) and said.startswith(streamed):
            self._more(part, said[len(streamed):])
        self._close(place, block)

    # -- the response --

    def _start(self, event: Json) -> None:
        response = event.get("response")
        if not isinstance(response, dict):
            return
        if self._started:
            return self._tell_used(response, event)
        self._started = True
        created = response.get("created_at")
        self._seed = text_or_none(response.get("id")) or ""
        self._events.append(ReplyStart(self._seed, text_or_none(response.get("model")) or "",
                                       count_or_zero({"at": created}, "at"), responses_usage(response.get("usage"), event)))

    def _terminal(self, event: Json) -> None:
        if not self._started:
            self._start(event)
        response = event.get("response")
        response = response if isinstance(response, dict) else {}
        said = name_in(event, "type").partition(".")[2]
        status = said if said in ("failed", "cancelled") else name_in(response, "status") or said
        if status in ("failed", "cancelled"):
            self._tell_used(response, event)
            return self._failed(event, response, status)
        self._rest(responses_list(response.get("output")))
        details = response.get("incomplete_details")
        reason = (name_in(details, "reason") or None) if status == "incomplete" else None
        word = stop_meaning(RESPONSES, (status, reason))
        if status == "incomplete" and word == "end":
            word = "length"
        usage = responses_usage(response.get("usage"), response if billed_nano(response) else event)
        self._end(ReplyStop("tool" if word == "end" and self._called else word, usage))

    def _tell_used(self, response: Json, event: Json) -> None:
        usage = responses_usage(response.get("usage"), response if billed_nano(response) else event)
        if usage is not None:
            self._events.append(Used(usage))

    def _rest(self, output: List[Any]) -> None:
        """Items that only the final object holds. Upstream may leave it empty though items were sent."""
        if len(self._done) < len(output):
            for at, item in enumerate(output):
                if at not in self._done and isinstance(item, dict):
                    self._item(at, item)
        for place in list(self._parts):
            self._close(place)

    def _failed(self, event: Json, response: Json, status: str) -> None:
        inner = response.get("error")
        if isinstance(inner, dict):
            return self._fail(stream_failure({**response, **event, "error": inner}))
        said = f"the response {'failed' if status == 'failed' else 'was cancelled'}"
        self._held = stream_failure({**response, **event, "error": {"message": said}})

    def _error(self, event: Json) -> None:
        self._fail(stream_failure(event))

    def _fail(self, failure: Failure) -> None:
        self._end(Fault(failure))

    def _end(self, event: Event) -> None:
        self.ended = True
        self._events.append(event)

    # -- items --

    def _added(self, event: Json) -> None:
        at, item = self._place(event)[0], event.get("item")
        if not isinstance(item, dict) or at in self._items:
            return
        self._items[at] = item
        kind = name_in(item, "type")
        if kind == "message":
            return
        block = self._block(at, item, kind)
        said = main_text(block)
        if said is not None:
            part = self._open((at, -1), opening(block))
            if said and getattr(block, "kind", None) not in ("search", "server"):  # an object is whole with its item only
                self._more(part, said)

    def _block(self, at: int, item: Json, kind: str) -> Block:
        """The block of an item; a call has an id."""
        block = responses_block(item, kind)
        return replace(block, id=responses_call_id(self._seed, at)) if isinstance(block, ToolCall) and not block.id else block

    def _item_done(self, event: Json) -> None:
        at, item = self._place(event)[0], event.get("item")
        if isinstance(item, dict) and at not in self._done:
            self._item(at, item)

    def _item(self, at: int, item: Json) -> None:
        """A whole item: whatever of it has not been said yet."""
        self._done.add(at)
        kind = name_in(item, "type") or "message"
        if kind != "message":
            return self._complete((at, -1), self._block(at, item, kind))
        phase = text_or_none(item.get("phase")) or self._phase(at)
        for index, block in enumerate(in_phase([responses_part(part) for part in responses_list(item.get("content"))], phase)):
            if (at, index) not in self._closed:
                self._complete((at, index), block)
        for place in [place for place in self._parts if place[0] == at]:
            self._close(place)

    def _phase(self, at: int) -> Optional[str]:
        return text_or_none(self._items.get(at, {}).get("phase"))

    # -- parts of a message --

    def _said(self, place: Tuple[int, int], block: Block) -> ResponsesPart:
        """The open part of that place; one that nobody announced opens now."""
        part = self._parts.get(place)
        if part is None:
            part = self._open(place, in_phase([block], self._phase(place[0]))[0])
        return part

    def _part_added(self, event: Json) -> None:
        kind = name_in(event.get("part"), "type")
        if kind in ("output_text", "refusal"):
            self._said(self._place(event), Text("") if kind == "output_text" else Refusal(""))

    def _part_done(self, event: Json) -> None:
        place, block = self._place(event), responses_part(event.get("part"))
        part = self._parts.get(place)
        if part is not None and type(block) is type(part.block):
            part.said, part.final = True, in_phase([block], self._phase(place[0]))[0]

    def _text_delta(self, event: Json) -> None:
        delta = event.get("delta")
        if type(delta) is str and delta:
            place = self._place(event)
            part = self._parts.get(place) or self._said(place, Text(""))
            if event.get("logprobs"):
                part.logprobs += responses_list(event["logprobs"])
            self._more(part, delta)
            self._spoken = place, part

    def _refusal_delta(self, event: Json) -> None:
        delta = event.get("delta")
        if type(delta) is str and delta:
            self._more(self._said(self._place(event), Refusal("")), delta)

    def _last_words(self, event: Json, name: str, block: Block) -> None:
        """The whole text of a part, which counts where nothing of it streamed."""
        place, text = self._place(event), name_in(event, name)
        if text and place not in self._closed and not (place in self._parts and self._parts[place].texts):
            self._more(self._said(place, block), text)

    def _annotation(self, event: Json) -> None:
        part = self._parts.get(self._place(event))
        if part is not None and isinstance(event.get("annotation"), dict):
            part.notes.append(event["annotation"])

    # -- thoughts --

    def _whole_thought(self, event: Json, counter: str) -> None:
        part = self._parts.get((self._place(event)[0], -1))
        if part is None or part.spot != (counter, event.get(counter)):
            self._thought(event, counter, name_in(event, "text"))

    def _thought(self, event: Json, counter: str, text: str) -> None:
        """More of a summary part, or of the thought itself; a blank line parts it from the one before."""
        place, spot = (self._place(event)[0], -1), (counter, event.get(counter))
        part = self._parts.get(place)
        if not text or place in self._closed or part is not None and not isinstance(part.block, Thinking):
            return
        if part is None:
            part = self._open(place, Thinking())
        if part.spot != spot:
            if part.texts:
                self._more(part, "\n\n")
            part.spot = spot
        self._more(part, text)

    # -- calls --

    def _call_delta(self, event: Json) -> None:
        part, delta = self._parts.get((self._place(event)[0], -1)), name_in(event, "delta")
        if part is not None and delta and isinstance(part.block, ToolCall):
            self._more(part, delta)

    def _whole_call(self, event: Json, text: str) -> None:
        part = self._parts.get((self._place(event)[0], -1))
        if part is not None and text and not part.texts and isinstance(part.block, ToolCall):
            self._more(part, text)

    _actions: Dict[Any, Callable[[Any, Json], None]] = {  # of the class: an object that held its own methods would be a ring
        "response.created": _start, "response.in_progress": _start, "response.queued": _start,
        "response.output_item.added": _added, "response.output_item.done": _item_done,
        "response.content_part.added": _part_added, "response.content_part.done": _part_done,
        "response.output_text.delta": _text_delta, "response.output_text.done": lambda self, event: self._last_words(event, "text", Text("")),
        "response.output_text.annotation.added": _annotation,
        "response.refusal.delta": _refusal_delta,
        "response.refusal.done": lambda self, event: self._last_words(event, "refusal", Refusal("")),
        "response.reasoning_summary_text.delta": lambda self, event: self._thought(event, "summary_index", name_in(event, "delta")),
        "response.reasoning_summary_text.done": lambda self, event: self._whole_thought(event, "summary_index"),
        "response.reasoning_text.delta": lambda self, event: self._thought(event, "content_index", name_in(event, "delta")),
        "response.reasoning_text.done": lambda self, event: self._whole_thought(event, "content_index"),
        "response.function_call_arguments.delta": _call_delta,
        "response.function_call_arguments.done": lambda self, event: self._whole_call(event, name_in(event, "arguments")),
        "response.custom_tool_call_input.delta": _call_delta,
        "response.custom_tool_call_input.done": lambda self, event: self._whole_call(event, name_in(event, "input")),
        "response.completed": _terminal, "response.done": _terminal, "response.incomplete": _terminal,
        "response.failed": _terminal, "response.cancelled": _terminal, "error": _error}


# ---- writing a stream -------------------------------------------------------


def responses_error(failure: Failure) -> Json:
    """{"code","message"} of a failed response. It has no `type`: on the code alone Codex stops asking, or waits as long as
    the message says (clients.md)."""
    error = openai_error(UpstreamError(failure))["error"]
    code = error["type"] if error["type"] == "insufficient_quota" else error["code"] or "server_error"
    if failure.kind == "rate" and failure.wait_s is not None and not is_long(failure):
        words = "" if "try again in" in error["message"] else f" Please try again in {max(1, math.ceil(failure.wait_s))}s."
        return {"code": "rate_limit_exceeded", "message": error["message"] + words}
    return {"code": code, "message": error["message"]}


class ResponsesItem:
    """An item of a stream being written; `parts` are open blocks inside it."""

    __slots__ = ("place", "wire", "parts")

    def __init__(self, place: int, wire: Json) -> None:
        self.place = place
        self.wire = wire
        self.parts = 0


class ResponsesBlock:
    """An open block of a stream being written. `head` is the constant part of its delta frames; None: no part is open."""

    __slots__ = ("block", "texts", "item", "part", "event", "head")

    def __init__(self, block: Block, item: Optional[ResponsesItem], part: int = 0) -> None:
        self.block = block
        self.texts: List[str] = []
        self.item = item  # None: the dialect cannot say this block
        self.part = part
        self.event = ""
        self.head: Optional[str] = None


# block -> (its events, field of the delta's end that holds the whole)
RESPONSES_STREAMED = {"text": ("response.output_text", "text"), "refusal": ("response.refusal", "refusal"),
                      "reasoning": ("response.reasoning_summary_text", "text"),
                      "function_call": ("response.function_call_arguments", "arguments"),
                      "custom_tool_call": ("response.custom_tool_call_input", "input")}


class ResponsesWriter:
    """Writes one stream: lawful events in, frames out; `response` is the object of the last lifecycle frame.

    Neighbouring texts of one phase are parts of one message item, which ends when something else opens: Codex shows
    every message item as a paragraph of its own.
    """

    def __init__(self, response: Json) -> None:
        self.response = response
        self._frames: List[Frame] = []
        self._number = 0
        self._seed = ""
        self._output: List[Optional[Json]] = []  # by output_index, None until the item is done
        self._open: Dict[int, ResponsesBlock] = {}
        self._message: Optional[ResponsesItem] = None  # the message item that takes further parts
        self._usage: Optional[Usage] = None

    def write(self, events: Sequence[Event]) -> List[Frame]:
        """The frames of one list of events."""
        self._frames = []
        for event in self._uncut(events):
            self._actions[type(event)](self, event)
        return self._frames

    @staticmethod
    def _uncut(events: Sequence[Event]) -> Sequence[Event]:
        """Without the stops a Fault forced: an item that is not whole must not be called done, Codex would run the call."""
        if not events or type(events[-1]) is not Fault:
            return events
        last = len(events) - 1
        while last and type(events[last - 1]) is BlockStop:
            last -= 1
        return [*events[:last], events[-1]]

    def _send(self, kind: str, **fields: Any) -> None:
        body = {"type": kind, "sequence_number": self._number, **fields}
        self._frames.append(Frame(kind, dump_json(body).decode()))
        self._number += 1

    # -- the response --

    def _start(self, event: ReplyStart) -> None:
        self._seed = hashlib.sha256(event.id.encode("utf-8", "replace")).hexdigest()[:24]
        self._usage = event.usage
        self.response = {**self.response, "id": event.id or f"resp_{self._seed}", "created_at": event.created_at,
                         "model": event.model or self.response["model"]}
        self._send("response.created", response=self.response)
        self._send("response.in_progress", response=self.response)

    def _stop(self, event: ReplyStop) -> None:
        status, reason = stop_word(RESPONSES, event.reason)
        self._leave_message(status)
        usage = event.usage or self._usage or Usage()
        self._finish(status, incomplete_details=None if reason is None else {"reason": reason}, usage=responses_wire_usage(usage))

    def _fault(self, event: Fault) -> None:
        self._finish("failed", error=responses_error(event.failure))

    def _finish(self, status: str, **fields: Any) -> None:
        self.response = {**self.response, "status": status, "output": [item for item in self._output if item is not None], **fields}
        self._send(f"response.{status}", response=self.response)

    # -- items --

    def _item(self, wire: Json) -> ResponsesItem:
        """A further item, announced."""
        kind, place = wire["type"], len(self._output)
        made = f"{RESPONSES_PREFIXES.get(kind, 'item')}_{self._seed}{place:04x}"
        item = ResponsesItem(place, {**wire, "id": text_or_none(wire.get("id")) or made})
        self._output.append(None)
        self._send("response.output_item.added", output_index=place, item=item.wire)
        return item

    def _item_done(self, item: ResponsesItem, wire: Json) -> None:
        """The item as it ended, under the id and the place it had."""
        wire = {**wire, "id": item.wire["id"]}
        self._output[item.place] = wire
        self._send("response.output_item.done", output_index=item.place, item=wire)

    def _leave_message(self, status: str = "completed") -> None:
        """No further part joins the message item; it ends now, or with the last of its open parts."""
        message, self._message = self._message, None
        if message is not None and not message.parts:
            self._item_done(message, {**message.wire, "status": status})

    # -- blocks --

    def _block_start(self, event: BlockStart) -> None:
        block = event.block
        if isinstance(block, (Text, Refusal)):
            self._open[event.index] = self._open_part(block)
            return
        wire = responses_wire_item(block)
        if wire is None:
            self._open[event.index] = ResponsesBlock(block, None)
            return
        self._leave_message()
        if isinstance(block, ToolCall):
            wire["status"] = "in_progress"
        if isinstance(block, (Thinking, Compaction)) and block.id is not None:
            wire["id"] = block.id
        item = self._item(wire)
        opened = self._open[event.index] = ResponsesBlock(block, item)
        if wire["type"] in RESPONSES_STREAMED:
            opened.event = RESPONSES_STREAMED[wire["type"]][0] + ".delta"
            if isinstance(block, ToolCall):
                opened.head = self._head(opened)

    def _open_part(self, block: Union[Text, Refusal]) -> ResponsesBlock:
        """A text or refusal in the message item of its phase."""
        phase = block.phase if isinstance(block, Text) else None
        message = self._message
        if message is None or message.wire.get("phase") != phase:
            self._leave_message()
            said = {} if phase is None else {"phase": phase}
            message = self._message = self._item({"type": "message", "role": "assistant", "status": "in_progress", "content": [], **said})
        opened = ResponsesBlock(block, message, len(message.wire["content"]))
        bare = responses_output_part(type(block)(""), True)
        message.parts += 1
        message.wire["content"].append(bare)
        self._send("response.content_part.added", **self._where(opened), part=bare)
        opened.event = RESPONSES_STREAMED["text" if isinstance(block, Text) else "refusal"][0] + ".delta"
        opened.head = self._head(opened)
        return opened

    def _where(self, opened: ResponsesBlock) -> Json:
        """The fields by which an event names its block."""
        item: Any = opened.item
        where = {"item_id": item.wire["id"], "output_index": item.place}
        if isinstance(opened.block, (Text, Refusal)):
            where["content_index"] = opened.part
        elif isinstance(opened.block, Thinking):
            where["summary_index"] = 0
        return where

    def _head(self, opened: ResponsesBlock) -> str:
        """A delta frame up to its sequence number."""
        logprobs = {"logprobs": []} if isinstance(opened.block, Text) else {}
        return dump_json({"type": opened.event, **self._where(opened), **logprobs}).decode()[:-1] + ',"sequence_number":'

    def _delta(self, event: BlockDelta) -> None:
        opened = self._open.get(event.index)
        if opened is None or opened.item is None:
            return
        opened.texts.append(event.text)
        if opened.head is None:
            if not opened.event:
                return
            opened.head = self._head(opened)
            self._send("response.reasoning_summary_part.added", **self._where(opened), part={"type": "summary_text", "text": ""})
        self._frames.append(Frame(opened.event, f'{opened.head}{self._number},"delta":{encode_basestring_ascii(event.text)}}}'))
        self._number += 1

    def _block_stop(self, event: BlockStop) -> None:
        opened = self._open.get(event.index)
        if opened is None or opened.item is None:
            self._open.pop(event.index, None)
            return
        block = finished(opened.block, "".join(opened.texts), event.block)
        if not opened.texts and main_text(block):
            self._delta(BlockDelta(event.index, main_text(block) or ""))
        del self._open[event.index]
        if isinstance(block, (Text, Refusal)):
            self._part_done(opened, opened.item, block)
        else:
            self._whole_done(opened, opened.item, block)

    def _part_done(self, opened: ResponsesBlock, item: ResponsesItem, block: Union[Text, Refusal]) -> None:
        """The end of a part, and of its message if nothing else can join it."""
        where, part = self._where(opened), responses_output_part(block, True)
        for at, note in enumerate(part.get("annotations") or ()):
            self._send("response.output_text.annotation.added", **where, annotation_index=at, annotation=note)
        events, name = RESPONSES_STREAMED["text" if isinstance(block, Text) else "refusal"]
        logprobs = {"logprobs": part["logprobs"]} if isinstance(block, Text) else {}
        self._send(f"{events}.done", **where, **{name: block.text}, **logprobs)
        self._send("response.content_part.done", **where, part=part)
        item.wire["content"][opened.part] = part
        if isinstance(block, Text) and block.phase is not None:
            item.wire.setdefault("phase", block.phase)
        item.parts -= 1
        if not item.parts and item is not self._message:
            self._item_done(item, {**item.wire, "status": "completed"})

    def _whole_done(self, opened: ResponsesBlock, item: ResponsesItem, block: Block) -> None:
        """The end of an item that is one block."""
        wire = responses_wire_item(block) or dict(item.wire)
        kind, where = wire["type"], self._where(opened)
        if opened.head is not None:
            events, name = RESPONSES_STREAMED[kind]
            named = {"name": wire["name"]} if kind == "function_call" else {}
            self._send(f"{events}.done", **where, **named, **{name: main_text(block)})
            if kind == "reasoning":
                self._send("response.reasoning_summary_part.done", **where, part=wire["summary"][0])
        if isinstance(block, ToolCall):
            wire["status"] = "completed"
        self._item_done(item, wire)

    _actions: Dict[Any, Callable[[Any, Any], None]] = {  # of the class: an object that held its own methods would be a ring
        ReplyStart: _start, BlockStart: _block_start, BlockDelta: _delta, BlockStop: _block_stop,
        ReplyStop: _stop, Fault: _fault, Pulse: lambda self, event: None, Used: lambda self, event: None}


class ResponsesCodec(Codec):
    """Responses; `instructions` is the first system message, tools may stand inside input items."""

    name = RESPONSES

    def decode_request(self, body: Json) -> Request:
        """The Request of a body; `input` is a string or a list of items. Tools inside items join the others."""
        messages: List[Message] = []
        if isinstance(body.get("instructions"), str):
            messages.append(Message("system", [Text(body["instructions"])]))
        given = body.get("input")
        if isinstance(given, str):
            messages.append(Message("user", [Text(given)]))
        elif isinstance(given, list):
            messages.extend(responses_item(want_object(item, f"input.{at}"), f"input.{at}") for at, item in enumerate(given))
        elif given is not None:
            raise wrong_type("input", "a string or a list", given)
        text = responses_object(body, "text")
        included = TEXT_LOGPROBS in responses_list(body.get("include"))
        return Request(
            model=want_model(body), messages=canonical(responses_paired(messages)), tools=self._tools(body),
            tool_choice=responses_choice(body.get("tool_choice")),
            parallel_tools=want_flag(body, "parallel_tool_calls") if body.get("parallel_tool_calls") is not None else None,
            stream=want_flag(body, "stream"), max_tokens=want_count(body, "max_output_tokens"),
            temperature=want_number(body, "temperature"), top_p=want_number(body, "top_p"),
            logprobs=want_count(body, "top_logprobs") or (0 if included else None),
            reasoning=responses_reasoning(responses_object(body, "reasoning")), output=responses_output(text.get("format")),
            verbosity=text_or_none(text.get("verbosity")), user=text_or_none(body.get("user")),
            metadata=None if body.get("metadata") is None else responses_object(body, "metadata"),
            cache_key=text_or_none(body.get("prompt_cache_key")), extra=responses_extra(body))

    @staticmethod
    def _tools(body: Json) -> List[Tool]:
        """The tools of a body that its choice leaves, each once, those of one namespace side by side."""
        tools = responses_tools(want_list(body, "tools"))
        known = {(tool.namespace, tool.name, tool.kind) for tool in tools}
        for item in responses_list(body.get("input")):
            if name_in(item, "type") not in ("additional_tools", "tool_search_output"):
                continue
            for tool in responses_tools(want_list(item, "tools")):
                if (tool.namespace, tool.name, tool.kind) not in known:
                    known.add((tool.namespace, tool.name, tool.kind))
                    tools.append(tool)
        return allowed_tools([tool for group in by_namespace(tools) for tool in group], responses_allowed(body.get("tool_choice")))

    def encode_request(self, request: Request) -> Json:
        """The body of a request. Nothing is ever stored, so reasoning must come back encrypted."""
        include = responses_list((request.extra or {}).get("include"))
        wanted = [ENCRYPTED_REASONING] + ([TEXT_LOGPROBS] if request.logprobs is not None else [])
        return {"model": request.model, **responses_options(request), "input": responses_input(request), "stream": request.stream,
                "store": False, "include": wanted + [name for name in include if isinstance(name, str) and name not in wanted]}

    def decode_reply(self, body: Json) -> Reply:
        """The whole answer; raises UpstreamError for one that failed. Read as the last event of a stream, which holds the same."""
        if is_error_object(body):
            raise UpstreamError(stream_failure(body))
        reader = ResponsesReader()
        return collect([reader.take({"type": "response.completed", "response": body}), reader.end()])

    def encode_reply(self, reply: Reply, asked: Optional[Request] = None) -> Json:
        """The response object, which repeats what was `asked`."""
        writer = ResponsesWriter(self._empty(asked))
        writer.write(replay(reply))
        return writer.response

    def decode_stream(self, batches: Iterable[List[Frame]]) -> Iterator[List[Event]]:
        reader = ResponsesReader()
        for frames in batches:
            yield reader.read(frames)
        rest = reader.end()
        if rest:
            yield rest

    def encode_stream(self, batches: Iterable[List[Event]], asked: Optional[Request] = None) -> Iterator[List[Frame]]:
        """The frames of a stream; its response objects repeat what was `asked`."""
        writer = ResponsesWriter(self._empty(asked))
        for events in batches:
            yield writer.write(events)

    @staticmethod
    def _empty(asked: Optional[Request]) -> Json:
        """A response object that has not begun: every field the OpenAI SDK's type demands."""
        empty: Json = {
            "id": "", "object": "response", "created_at": 0, "status": "in_progress", "error": None, "incomplete_details": None,
            "instructions": None, "max_output_tokens": None, "model": asked.model if asked else "", "output": [],
            "parallel_tool_calls": True, "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "store": False,
            "temperature": None, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": None,
            "truncation": "disabled", "usage": None, "user": None, "metadata": {}}
        said = responses_options(asked) if asked else {}
        said["text"] = {**empty["text"], **said.get("text", {})}
        said["reasoning"] = {**empty["reasoning"], **said.get("reasoning", {})}
        return {**empty, **{name: value for name, value in said.items() if name in empty}}

    def decode_usage(self, body: Json) -> Optional[Usage]:
        return responses_usage(body.get("usage"), body)

    def stop_reason(self, body: Json) -> Optional[str]:
        details = body.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        return text_or_none(reason) or text_or_none(body.get("status"))

    def meter(self, trace_id: str) -> ResponsesMeter:
        return ResponsesMeter(trace_id)


class ResponsesMeter(Meter):
    """A Responses stream: one `response.id`, and `response.failed` wherever upstream broke off or sent `error`.

    Only frames that hold the whole response object or speak of an error are parsed: a handful per stream.
    """

    def __init__(self, trace_id: str) -> None:
        super().__init__(trace_id)
        self._id: Optional[str] = None
        self._response: Json = {}  # the object of `response.created`

    def relayed(self, frames: bytes) -> bytes:
        if self.ended or self.error is not None:
            return b""
        if b'"response"' not in frames and b"error" not in frames:
            return frames
        return b"".join(map(self._frame, split_frames(frames)))

    def passes(self, around: bytes) -> bool:
        return not self.ended and self.error is None and b'"response"' not in around and b"error" not in around

    def _frame(self, frame: bytes) -> bytes:
        if self.ended or self.error is not None:
            return b""
        if b'"response"' not in frame and b"error" not in frame:
            return frame
        event = frame_json(frame)
        if event is None:
            return frame
        if event.get("type") == "error" or is_error_object(event):
            self.error = stream_failure(event)
            return b""
        if isinstance(event.get("response"), dict):
            return self._lifecycle(frame, event, event["response"])
        return frame

    def _lifecycle(self, frame: bytes, event: Json, response: Json) -> bytes:
        """A frame that carries the response object: pinned to the first id, and read when it is the last."""
        own = text_or_none(response.get("id")) or ""
        if self._id is None:
            self._id = own or f"resp_{self.trace_id}"
            self._response = response
        self.served_model = text_or_none(response.get("model")) or self.served_model
        self.usage = responses_usage(response.get("usage"), event) or self.usage
        mute = False
        if name_in(event, "type") in RESPONSES_TERMINALS:
            self._learn(event, response)
            mute = self.error is not None and not isinstance(response.get("error"), dict)
        if mute:
            response["error"] = responses_error(self.error or CUT)
        elif own == self._id:
            return frame
        spot = re.findall(rb'"id"\s*:\s*"' + re.escape(own.encode("utf-8", "surrogatepass")) + rb'"', frame)
        if own and len(spot) == 1 and not mute:
            return frame.replace(spot[0], dump_json({"id": self._id})[1:-1], 1)
        response["id"] = self._id
        return format_sse(text_or_none(event.get("type")), event)

    def _learn(self, event: Json, response: Json) -> None:
        self.ended = True
        details = response.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        self.stop_reason = text_or_none(reason) or text_or_none(response.get("status"))
        if event.get("type") == "response.failed":
            inner = response.get("error")
            self.error = stream_failure({**response, **event, "error": inner if isinstance(inner, dict) else {"message": "the response failed"}})

    def close(self, failure: Optional[Failure]) -> bytes:
        if self.ended:
            return b""
        self.error = failure or self.error or CUT
        return self._failed()

    def _failed(self) -> bytes:
        """`response.failed`, behind a `response.created` of our own when upstream sent none."""
        self.ended = True
        number = max((int(found) for found in SEQUENCE_NUMBER.findall(b"".join(self._recent))), default=-1) + 1
        frames = b""
        if self._id is None:
            self._response = {"id": f"resp_{self.trace_id}", "object": "response", "created_at": 0, "model": "",
                              "status": "in_progress", "output": [], "error": None, "incomplete_details": None}
            frames = format_sse("response.created", {"type": "response.created", "sequence_number": number,
                                                     "response": self._response})
            number += 1
        response = {**self._response, "status": "failed", "error": responses_error(self.error or CUT)}
        return frames + format_sse("response.failed", {"type": "response.failed", "sequence_number": number,
                                                       "response": response})


###############################################################################
#                             Anthropic Messages                              #
###############################################################################
# POST /v1/messages. API reference "Messages", "Streaming messages", "Errors", 2026-09; beta fields as anthropic-sdk 2.14.
#
#   {"model","max_tokens","system":"…"|[{"type":"text","text","cache_control"}],"messages":[{"role":"user","content":"…"|[
#     {"type":"text","text"},{"type":"image","source":{"type":"base64","media_type","data"}},
#     {"type":"document","source":{"type":"base64"|"url"|"text"|"file",…},"title"},
#     {"type":"tool_result","tool_use_id","content":"…"|[…],"is_error"}]},{"role":"assistant","content":[
#     {"type":"thinking","thinking","signature"},{"type":"redacted_thinking","data"},{"type":"tool_use","id","name","input":{}}]},
#     {"role":"system","content":"…","output_config":{"effort"}}],"tools":[{"name","description","input_schema","defer_loading"}],
#    "tool_choice":{"type":"auto"|"any"|"tool"|"none","name","disable_parallel_tool_use"},"stop_sequences":["…"],
#    "thinking":{"type":"enabled","budget_tokens","display"}|{"type":"adaptive","display"}|{"type":"disabled"},
#    "output_config":{"effort","format":{"type":"json_schema","schema"}},"metadata":{"user_id"},"stream":true}
#   {"id","type":"message","role":"assistant","model","content":[…],"stop_reason","stop_sequence","usage":{"input_tokens",
#    "cache_creation_input_tokens","cache_read_input_tokens","output_tokens","output_tokens_details":{"thinking_tokens"}}}
#   event: message_start        data: {"type":"message_start","message":{…,"content":[],"usage":{…}}}
#   event: content_block_start  data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}
#   event: content_block_delta  data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hel"}}
#          thinking_delta{thinking} signature_delta{signature} input_json_delta{partial_json} citations_delta{citation}
#   event: content_block_stop   data: {"type":"content_block_stop","index":0}
#   event: message_delta        data: {"type":"message_delta","delta":{"stop_reason","stop_sequence"},"usage":{…}}
#   event: message_stop / ping / error

MESSAGES_ROLES = frozenset(("user", "assistant", "system"))
# Texts of an overflow on which Claude Code compacts (clients.md).
COMPACTING = ("(?i)prompt is too long|maximum context length|context_length_exceeded|exceeds the context window"
              "|input is too long for requested model")
MESSAGE_STOP = re.compile(rb'"type"\s*:\s*"message_stop"')
MESSAGES_REASON = re.compile(rb'"stop_reason"\s*:\s*"')
MESSAGES_CALL = re.compile(rb'"type"\s*:\s*"tool_use"')
# fields of a usage object that a later one overrides
MESSAGES_USAGE = ("input_tokens", "cache_creation_input_tokens", "cache_creation", "cache_read_input_tokens", "output_tokens",
                  "output_tokens_details")
# `max_tokens` is required. Who names none gets what every Claude of Copilot's catalogue may write and what one answer
# that is not streamed may hold (`max_non_streaming_output_tokens`, copilot-upstream 4.3).
MESSAGES_MAX_TOKENS = 16000
MESSAGES_MIN_BUDGET = 1024  # tokens; a smaller `budget_tokens` is refused (API reference "Extended thinking")
MESSAGES_NO_SCHEMA: Json = {"type": "object", "properties": {}}  # `input_schema` is required
MESSAGES_EFFORTS = {"minimal": "low"}  # the others are called alike; `none` is thinking switched off
MESSAGES_MODES = (("off", "disabled"), ("on", "enabled"), ("adaptive", "adaptive"))  # hub, `thinking.type`
MESSAGES_CHOICES = (("auto", "auto"), ("required", "any"), ("tool", "tool"), ("none", "none"))  # hub, `tool_choice.type`
MESSAGES_DISPLAYS = {"omitted": False, "summarized": True, "updates": True}

# What holds arguments that are no JSON object, an input must be one: the word we write (console reference A.6), and the
# one that histories of another seed hold (B.4).
MESSAGES_RAW = ("raw_arguments", "_raw_arguments")

# Blocks only this dialect knows; they are Opaque in the hub and re-emitted as they came.
MESSAGES_OPAQUE = frozenset((
    "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
    "bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "tool_search_tool_result", "mcp_tool_use",
    "mcp_tool_result", "mcp_tool_listing", "advisor_tool_result", "search_result", "container_upload", "fallback", "document"))
MESSAGES_WEB = "web_search_result_location"
MESSAGES_CITATIONS = frozenset(("char_location", "page_location", "content_block_location", "search_result_location", MESSAGES_WEB))
MESSAGES_SERVER_TOOL = re.compile(r"_20\d{6}$|^mcp_toolset$")  # `web_search_20250305`: server tools of this dialect carry a date

# Fields that ride in `extra` and are written again, by what carries them.
MESSAGES_CALL_EXTRA = ("caller", "toolset_name")
MESSAGES_FILE_EXTRA = ("context", "citations")
MESSAGES_TOOL_EXTRA = ("eager_input_streaming", "input_examples", "allowed_callers")
# Top-level fields: name -> whether a value is this dialect's (Responses calls other things by two of these names).
MESSAGES_EXTRA: Dict[str, Callable[[Any], bool]] = {
    "cache_control": lambda value: isinstance(value, dict),
    "container": lambda value: isinstance(value, (str, dict)),
    "context_management": lambda value: isinstance(value, dict),
    "inference_geo": lambda value: isinstance(value, str),
    "mcp_servers": lambda value: isinstance(value, list),
    "service_tier": lambda value: value in ("auto", "standard_only"),
    "speed": lambda value: isinstance(value, str),
}
MESSAGES_READ = frozenset(("model", "messages", "system", "tools", "tool_choice", "stream", "max_tokens", "stop_sequences",
                           "temperature", "top_p", "top_k", "thinking", "output_config", "output_format", "metadata"))


# ---- reading: blocks --------------------------------------------------------


def messages_some(body: Json, names: Iterable[str]) -> Optional[Json]:
    """The named fields that are there, None when none is."""
    return {name: body[name] for name in names if body.get(name) is not None} or None


def messages_cache(block: Json) -> Optional[Json]:
    """{"type":"ephemeral","ttl"} of a block or tool."""
    mark = block.get("cache_control")
    return mark if isinstance(mark, dict) else None


def messages_arguments(given: Any) -> str:
    """The arguments string of a `tool_use.input`. Text that was no JSON has travelled under one of MESSAGES_RAW; a list does
    not become bare again, for a tool may have a parameter `arguments`."""
    name = next(iter(given)) if isinstance(given, dict) and len(given) == 1 else ""
    if name in MESSAGES_RAW and isinstance(given[name], str):
        return given[name]
    return dump_json({} if given is None else given).decode()


def messages_input(arguments: str) -> Json:
    """The object of an arguments string: blank is {}, a list {"arguments":[…]}, other text {"raw_arguments":"…"}."""
    if not arguments.strip():
        return {}
    try:
        value = parse_json(arguments.encode("utf-8", "surrogatepass"))
    except ClientError:
        value = None
    return value if isinstance(value, dict) else {"arguments": value} if isinstance(value, list) else {MESSAGES_RAW[0]: arguments}


def messages_citation_form(citation: Any, text: str, to_client: bool) -> Optional[Json]:
    """A citation on this wire. One of the web needs an `encrypted_index` towards upstream and none towards clients,
    so OpenAI's `url_citation` can be said to them, its place as the cited text."""
    kind = name_in(citation, "type")
    if kind in MESSAGES_CITATIONS and (to_client or kind != MESSAGES_WEB or citation.get("encrypted_index")):
        return citation
    if kind != "url_citation" or not to_client:
        return None
    start, end = citation.get("start_index"), citation.get("end_index")
    cited = text[start:end] if type(start) is type(end) is int and start >= 0 else ""
    return {"type": MESSAGES_WEB, "cited_text": cited, "url": text_or_none(citation.get("url")) or "",
            "title": text_or_none(citation.get("title")), "encrypted_index": ""}


def messages_text(block: Json) -> Text:
    """{"type":"text","text","citations"}"""
    given = block.get("citations")
    return Text(text_or_none(block.get("text")) or "", given if isinstance(given, list) and given else None,
                cache=messages_cache(block))


def messages_image(block: Json) -> Image:
    """{"type":"image","source":{"type":"base64","media_type","data"}|{"type":"url","url"}|{"type":"file","file_id"}}"""
    source = block.get("source")
    source = source if isinstance(source, dict) else {}
    return Image(text_or_none(source.get("media_type")), text_or_none(source.get("data")), text_or_none(source.get("url")),
                 text_or_none(source.get("file_id")), cache=messages_cache(block))


def messages_document(block: Json) -> Block:
    """{"type":"document","source":{…},"title","context","citations"}"""
    source = block.get("source")
    source = source if isinstance(source, dict) else {}
    kind, data = name_in(source, "type"), source.get("content" if source.get("type") == "content" else "data")
    if kind == "content" and not isinstance(data, str):
        return Opaque("document", block)
    is_text = kind in ("text", "content")
    return File(text_or_none(source.get("media_type")), None if is_text else text_or_none(data), text_or_none(source.get("url")),
                (text_or_none(data) or "") if is_text else None, text_or_none(source.get("file_id")),
                text_or_none(block.get("title")), cache=messages_cache(block), extra=messages_some(block, MESSAGES_FILE_EXTRA))


def messages_thinking(block: Json) -> Thinking:
    """{"type":"thinking","thinking","signature"}; an empty signature is none (Claude Code returns unsigned ones so)."""
    return Thinking(text_or_none(block.get("thinking")) or "", text_or_none(block.get("signature")) or None)


def messages_call(block: Json) -> ToolCall:
    """{"type":"tool_use","id","name","input":{…}}; the input becomes the JSON text that other dialects carry."""
    return ToolCall(str(block.get("id") or ""), str(block.get("name") or ""), messages_arguments(block.get("input")),
                    cache=messages_cache(block), extra=messages_some(block, MESSAGES_CALL_EXTRA))


def messages_result(block: Json) -> ToolResult:
    """{"type":"tool_result","tool_use_id","content":"…"|[…],"is_error"}"""
    content, is_error = block.get("content"), block.get("is_error")
    blocks = messages_content(content, "tool_result.content") if content is not None else []
    return ToolResult(str(block.get("tool_use_id") or ""), blocks, is_error if isinstance(is_error, bool) else None,
                      cache=messages_cache(block))


# block type -> how it enters the hub
MESSAGES_BLOCKS: Dict[str, Callable[[Json], Block]] = {
    "text": messages_text,
    "image": messages_image,
    "document": messages_document,
    "thinking": messages_thinking,
    "redacted_thinking": lambda block: Thinking(redacted=text_or_none(block.get("data")) or ""),
    "tool_use": messages_call,
    "tool_result": messages_result,
    "tool_reference": lambda block: ToolReference(str(block.get("tool_name") or ""), cache=messages_cache(block)),
    "compaction": lambda block: Compaction(text_or_none(block.get("encrypted_content")), text_or_none(block.get("content")),
                                           cache=messages_cache(block)),
}


def messages_block(block: Any) -> Block:
    """The hub's block of one content block."""
    if isinstance(block, str):
        return Text(block)
    kind = name_in(block, "type")
    return MESSAGES_BLOCKS[kind](block) if kind in MESSAGES_BLOCKS else Opaque(kind, block)


def messages_answer_block(block: Any) -> Block:
    """The hub's block of one content block of an answer. Results of the client's tools make no sense there, and
    `raw_arguments` is the model's own word: it may have read it in its history."""
    kind = name_in(block, "type")
    if kind == "tool_use":
        return replace(messages_call(block), arguments=dump_json(block.get("input") or {}).decode())
    return Opaque(kind, block) if kind == "tool_result" else messages_block(block)


def messages_content(content: Any, path: str) -> List[Block]:
    """The blocks of a content field: string or list."""
    if isinstance(content, str):
        return [Text(content)]
    if not isinstance(content, list):
        raise wrong_type(path, "a string or a list", content)
    return [found for block in content for found in messages_blocks(block)]


def messages_blocks(block: Any) -> List[Block]:
    """The hub's blocks of one content block: a document made of parts, {"source":{"type":"content","content":[…]}}, is a file
    of its texts, and its images behind it."""
    source = block.get("source") if name_in(block, "type") == "document" else None
    if name_in(source, "type") != "content" or not isinstance(source.get("content"), list):
        return [messages_block(block)]
    parts = [messages_block(part) for part in source["content"]]
    text = "\n\n".join(part.text for part in parts if isinstance(part, Text))
    file = messages_document({**block, "source": {"type": "text", "media_type": "text/plain", "data": text}})
    return ([file] if text else []) + [part for part in parts if isinstance(part, Image)]


# ---- reading: requests ------------------------------------------------------


def messages_message(message: Json, path: str) -> Message:
    """One wire message. `system` may stand anywhere: Claude Code puts it between turns (clients.md)."""
    role = name_in(message, "role")
    if role not in MESSAGES_ROLES:
        raise ClientError(f"{path}.role: expected user, assistant or system, got {message.get('role')!r}", param=f"{path}.role")
    return Message(role, messages_content(message.get("content"), f"{path}.content"),
                   {name: value for name, value in message.items() if name not in ("role", "content")} or None)


def messages_tool(tool: Any) -> Tool:
    """One entry of `tools`. A `type` beside `custom` is a server tool, kept whole in `extra`."""
    tool = tool if isinstance(tool, dict) else {}
    kind, deferred, strict = name_in(tool, "type"), tool.get("defer_loading"), tool.get("strict")
    own = kind in ("", "custom")
    schema = tool.get("input_schema")
    return Tool(str(tool.get("name") or kind), text_or_none(tool.get("description")), schema if isinstance(schema, dict) else None,
                kind="function" if own else "server", deferred=deferred if isinstance(deferred, bool) else None,
                strict=strict if isinstance(strict, bool) else None, cache=messages_cache(tool),
                extra=messages_some(tool, MESSAGES_TOOL_EXTRA) if own else tool)


def messages_choice(body: Json) -> Tuple[Optional[ToolChoice], Optional[bool]]:
    """(choice, parallel) of `tool_choice`: {"type":"auto"|"any"|"tool"|"none","name","disable_parallel_tool_use"}."""
    if body.get("tool_choice") is None:
        return None, None
    given = want_object(body["tool_choice"], "tool_choice")
    mode = next((hub for hub, wire in MESSAGES_CHOICES if wire == given.get("type")), None)
    alone = given.get("disable_parallel_tool_use")
    return (ToolChoice(mode, text_or_none(given.get("name")) if mode == "tool" else None) if mode else None,
            not alone if isinstance(alone, bool) else None)


def messages_reasoning(body: Json, effort: Optional[str]) -> Optional[Reasoning]:
    """The Reasoning of `thinking` and `output_config`; `effort` is what a late system message asks for this turn."""
    thinking = want_object(body["thinking"], "thinking") if body.get("thinking") is not None else {}
    output = want_object(body["output_config"], "output_config") if body.get("output_config") is not None else {}
    mode = next((hub for hub, wire in MESSAGES_MODES if wire == thinking.get("type")), None)
    reasoning = Reasoning(mode, effort or text_or_none(output.get("effort")), want_count(thinking, "budget_tokens"),
                          MESSAGES_DISPLAYS.get(name_in(thinking, "display")))
    return reasoning if reasoning != Reasoning() else None


def messages_turn_effort(messages: Iterable[Message]) -> Optional[str]:
    """The effort a system message behind the last answer asks for: {"role":"system","output_config":{"effort"}}."""
    effort = None
    for message in messages:
        if message.role == "assistant":
            effort = None
        elif message.extra:
            effort = name_in(message.extra.get("output_config"), "effort") or effort
    return effort


def messages_format(body: Json) -> Optional[OutputFormat]:
    """The structure asked for: `output_config.format`, formerly `output_format`."""
    output = body.get("output_config")
    given = output.get("format") if isinstance(output, dict) else None
    given = body.get("output_format") if given is None else given
    if name_in(given, "type") != "json_schema":
        return None
    return OutputFormat(given["schema"] if isinstance(given.get("schema"), dict) else None)


def messages_usage(usage: Any, body: Json) -> Optional[Usage]:
    """The hub's usage of a Messages usage object, where `input_tokens` leaves out what the cache holds.

    What was written to the cache stands in `cache_creation_input_tokens`, or split by lifetime in `cache_creation`.
    """
    if not isinstance(usage, dict):
        return None
    split = usage.get("cache_creation")
    read, write = count_or_zero(usage, "cache_read_input_tokens"), count_or_zero(usage, "cache_creation_input_tokens")
    if not write and isinstance(split, dict):
        write = sum(count_or_zero(split, name) for name in split)
    return Usage(input=count_or_zero(usage, "input_tokens") + read + write, output=count_or_zero(usage, "output_tokens"),
                 cache_read=read, cache_write=write,
                 reasoning=count_or_zero(usage, "output_tokens_details", "thinking_tokens"), billed_nano=billed_nano(body))


def messages_later_usage(first: Json, later: Any) -> Json:
    """The usage of message_start overridden by that of message_delta: cumulative, the most accurate (copilot-upstream 7.3)."""
    if not isinstance(later, dict):
        return first
    said = {name: later[name] for name in MESSAGES_USAGE if later.get(name) is not None}
    if "cache_creation_input_tokens" in said and "cache_creation" not in said:
        said["cache_creation"] = None
    return {**first, **said}


# ---- writing: blocks --------------------------------------------------------


def messages_marked(wire: Json, block: Any) -> Json:
    """The wire form under its cache breakpoint."""
    if block.cache is not None:
        wire["cache_control"] = block.cache
    return wire


def messages_extended(wire: Json, block: Any, names: Iterable[str]) -> Json:
    """The wire form with the fields of `extra` that belong to it."""
    wire.update(messages_some(block.extra or {}, names) or {})
    return messages_marked(wire, block)


def messages_text_form(block: Text, to_client: bool) -> Optional[Json]:
    """A text block; an empty one is refused by upstream and may not enter a client's history."""
    if not block.text:
        return None
    wire: Json = {"type": "text", "text": block.text}
    citations = [messages_citation_form(citation, block.text, to_client) for citation in block.citations or ()]
    if any(citations):
        wire["citations"] = [citation for citation in citations if citation]
    return messages_marked(wire, block)


def messages_image_form(block: Image, to_client: bool) -> Optional[Json]:
    """An image block of what is known of it."""
    if block.data is not None:
        source = {"type": "base64", "media_type": block.media_type or "image/png", "data": block.data}
    elif block.url is not None or block.file_id is not None:
        source = {"type": "url", "url": block.url} if block.url is not None else {"type": "file", "file_id": block.file_id}
    else:
        return None
    return messages_marked({"type": "image", "source": source}, block)


def messages_document_form(block: File, to_client: bool) -> Optional[Json]:
    """A document block: PDFs as base64, texts as text (the dialect has no other kinds), or where it can be had."""
    text, note = file_text(block), file_note(block)
    if note is not None:
        return messages_marked({"type": "text", "text": note}, block)
    if text is not None:
        source: Json = {"type": "text", "media_type": "text/plain", "data": text}
    elif block.data is not None:
        source = {"type": "base64", "media_type": block.media_type or "application/pdf", "data": block.data}
    elif block.url is not None or block.file_id is not None:
        source = {"type": "url", "url": block.url} if block.url is not None else {"type": "file", "file_id": block.file_id}
    else:
        return None
    wire = {"type": "document", "source": source}
    if block.name is not None:
        wire["title"] = block.name
    return messages_extended(wire, block, MESSAGES_FILE_EXTRA)


def messages_thinking_form(block: Thinking, to_client: bool) -> Optional[Json]:
    """A thinking block. Upstream takes signed ones only; a client gets `"signature":""`, its SDKs want the field."""
    if block.redacted is not None:
        return {"type": "redacted_thinking", "data": block.redacted}
    if not to_client and not block.signature:
        return None
    return {"type": "thinking", "thinking": block.text, "signature": block.signature or ""}


def messages_call_form(block: ToolCall, to_client: bool) -> Json:
    """A tool_use block."""
    wire = {"type": "tool_use", "id": block.id, "name": block.name, "input": messages_input(block.arguments)}
    return messages_extended(wire, block, MESSAGES_CALL_EXTRA)


def messages_result_form(block: ToolResult, to_client: bool) -> Json:
    """A tool_result block; one plain text is said as a string, nothing is left out."""
    wire: Json = {"type": "tool_result", "tool_use_id": block.call_id}
    only = block.content[0] if len(block.content) == 1 else None
    if isinstance(only, Text) and only == Text(only.text):
        wire["content"] = only.text
    elif block.content:
        wire["content"] = messages_forms(block.content, MESSAGES_INSIDE)
    if block.is_error is not None:
        wire["is_error"] = block.is_error
    return messages_marked(wire, block)


def messages_stand_in(block: Compaction, to_client: bool) -> Optional[Block]:
    """What is written for a compaction: a summary as text. Sealed state goes to a client as the signature of a thinking
    block: those it keeps, unknown blocks it may not (gateway-features 8.5)."""
    if block.summary:
        return Text(block.summary, cache=block.cache)
    return Thinking(signature=block.sealed) if to_client and block.sealed else None


def messages_compaction_form(block: Compaction, to_client: bool) -> Optional[Json]:
    """The wire form of its stand-in."""
    stand_in = messages_stand_in(block, to_client)
    return MESSAGES_WRITERS[type(stand_in)](stand_in, to_client) if stand_in is not None else None


def messages_opaque_form(block: Opaque, to_client: bool) -> Optional[Json]:
    """A block of this dialect as it came; nothing of others."""
    return block.raw if block.kind in MESSAGES_OPAQUE and name_in(block.raw, "type") == block.kind else None


# hub type -> its wire form, None where nothing is to be written
MESSAGES_WRITERS: Dict[type, Callable[[Any, bool], Optional[Json]]] = {
    Text: messages_text_form, Image: messages_image_form, File: messages_document_form, Thinking: messages_thinking_form,
    ToolCall: messages_call_form, ToolResult: messages_result_form, Compaction: messages_compaction_form, Opaque: messages_opaque_form,
    Refusal: lambda block, to_client: messages_marked({"type": "text", "text": block.text}, block) if block.text else None,
    ToolReference: lambda block, to_client: messages_marked({"type": "tool_reference", "tool_name": block.name}, block),
}
# what may stand where
MESSAGES_SIDES: Dict[str, Tuple[type, ...]] = {
    "user": (Text, Image, File, ToolResult, Refusal, Compaction, Opaque),
    "assistant": (Text, Thinking, ToolCall, Refusal, Compaction, Opaque),
}
MESSAGES_INSIDE = (Text, Image, File, ToolReference, Refusal, Opaque)  # inside a tool_result


def messages_forms(blocks: Iterable[Block], allowed: Tuple[type, ...], to_client: bool = False) -> List[Json]:
    """The wire forms of those blocks that may stand there and can be said."""
    forms = [MESSAGES_WRITERS[type(block)](block, to_client) for block in blocks if isinstance(block, allowed)]
    return [form for form in forms if form is not None]


# ---- writing: requests ------------------------------------------------------


def messages_reminder(message: Message) -> Message:
    """A late system or developer message as part of the user's turn, where it stands (DESIGN 8, "Late `system` messages")."""
    return Message("user", [replace(block, text=f"<system-reminder>\n{block.text}\n</system-reminder>")
                            if isinstance(block, Text) and block.text and not block.text.startswith("<system-reminder>") else block
                            for block in message.content if isinstance(block, (Text, Image, File))])


def messages_turns(messages: Iterable[Message]) -> List[Json]:
    """The wire messages: neighbours of one side are one, and of a user's blocks the tool results come first
    (API reference "Tool use": text before a result is refused)."""
    turns: List[Tuple[str, List[Json]]] = []
    for message in messages:
        message = message if message.role in MESSAGES_SIDES else messages_reminder(message)
        blocks = messages_forms(message.content, MESSAGES_SIDES[message.role])
        if turns and turns[-1][0] == message.role:
            turns[-1][1].extend(blocks)
        elif blocks:
            turns.append((message.role, blocks))
    for role, blocks in turns:
        blocks.sort(key=lambda block: role == "user" and block["type"] != "tool_result")
    return [{"role": role, "content": messages_bare(blocks)} for role, blocks in turns]


def messages_bare(blocks: List[Json]) -> Any:
    """A single plain text as a string, else the list."""
    return blocks[0]["text"] if len(blocks) == 1 and list(blocks[0]) == ["type", "text"] else blocks


def messages_tool_form(tool: Tool) -> Optional[Json]:
    """One entry of `tools`; server tools of other dialects have none."""
    if tool.kind == "server":
        return tool.extra if tool.extra and MESSAGES_SERVER_TOOL.search(name_in(tool.extra, "type")) else None
    wire: Json = {"name": tool.name, "input_schema": MESSAGES_NO_SCHEMA if tool.schema is None else tool.schema}
    if tool.description is not None:
        wire["description"] = tool.description
    if tool.deferred is not None:
        wire["defer_loading"] = tool.deferred
    if tool.strict:  # the default is said by silence: hosts without the feature refuse the field
        wire["strict"] = True
    wire.update(messages_some(tool.extra or {}, MESSAGES_TOOL_EXTRA) or {})
    if tool.cache is not None:
        wire["cache_control"] = tool.cache
    return wire


def messages_choice_form(choice: Optional[ToolChoice], parallel: Optional[bool]) -> Optional[Json]:
    """`tool_choice`, None where its default says the same."""
    if choice is None:
        return {"type": "auto", "disable_parallel_tool_use": True} if parallel is False else None
    kind = next((wire for hub, wire in MESSAGES_CHOICES if hub == choice.mode), None)
    if kind is None or kind == "tool" and not choice.name:
        return None
    entry: Json = {"type": kind}
    if kind == "tool":
        entry["name"] = choice.name
    if parallel is not None and kind != "none":
        entry["disable_parallel_tool_use"] = not parallel
    return entry


def messages_mode(asked: Reasoning) -> Optional[str]:
    """off | on | adaptive, from the other fields where it was not said."""
    if asked.effort == "none":
        return "off"
    if asked.mode is not None:
        return asked.mode
    if asked.budget is not None:
        return "on" if asked.budget > 0 else "adaptive" if asked.budget < 0 else "off"
    return "adaptive" if asked.effort or asked.visible else None


def messages_budget(asked: Reasoning, max_tokens: Optional[int]) -> Optional[int]:
    """`budget_tokens`, None when `max_tokens` leaves no room. A budget made of an effort leaves half to the answer."""
    stated = asked.budget is not None and asked.budget > 0
    budget = asked.budget if stated else budget_of_effort(asked.effort or "medium")
    if max_tokens is not None:
        budget = min(budget, max_tokens - 1 if stated else max_tokens // 2)
    budget = max(budget, MESSAGES_MIN_BUDGET)
    return budget if max_tokens is None or budget < max_tokens else None


def messages_reasoning_form(request: Request) -> Tuple[Optional[Json], Optional[str]]:
    """(`thinking`, `output_config.effort`). Beside a forced tool thinking cannot be asked for ("Extended thinking")."""
    asked = request.reasoning
    if asked is None:
        return None, None
    mode = messages_mode(asked)
    effort = MESSAGES_EFFORTS.get(asked.effort, asked.effort) if asked.effort != "none" else None
    forced = request.tool_choice is not None and request.tool_choice.mode in ("required", "tool")
    if mode in ("on", "adaptive") and forced:
        return None, None
    if mode is None or mode == "off":
        return {"type": "disabled"} if mode else None, effort
    thinking: Json = {"type": "adaptive"}
    if mode == "on":
        budget = messages_budget(asked, request.max_tokens)
        effort = effort if asked.budget else None
        if budget is None:
            return {"type": "disabled"}, effort
        thinking = {"type": "enabled", "budget_tokens": budget}
    if asked.visible is not None:
        thinking["display"] = "summarized" if asked.visible else "omitted"
    return thinking, effort


def messages_sampling(request: Request, thinks: bool) -> Json:
    """temperature (0 to 1), top_p, top_k; thinking allows no change but a `top_p` from 0.95 ("Extended thinking")."""
    fields: Json = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
    if fields["temperature"] is not None:
        fields["temperature"] = min(fields["temperature"], 1)
    if thinks:
        fields["top_k"] = None
        fields["temperature"] = 1 if fields["temperature"] == 1 else None
        fields["top_p"] = fields["top_p"] if fields["top_p"] is not None and fields["top_p"] >= 0.95 else None
    return {name: value for name, value in fields.items() if value is not None}


def messages_usage_form(usage: Optional[Usage]) -> Json:
    """The wire's usage object; zeros where nothing is known: opencode fails without the object, the SDKs without numbers."""
    usage = usage or Usage()
    wire: Json = {"input_tokens": max(0, usage.input - usage.cache_read - usage.cache_write),
                  "cache_creation_input_tokens": usage.cache_write, "cache_read_input_tokens": usage.cache_read,
                  "cache_creation": {"ephemeral_5m_input_tokens": usage.cache_write, "ephemeral_1h_input_tokens": 0},
                  "output_tokens": usage.output}
    if usage.reasoning:
        wire["output_tokens_details"] = {"thinking_tokens": usage.reasoning}
    return wire


def messages_billed(body: Json, usage: Optional[Usage]) -> Json:
    """The body with Copilot's own figure beside it."""
    if usage is not None and usage.billed_nano is not None:
        body["copilot_usage"] = {"total_nano_aiu": usage.billed_nano}
    return body


# ---- streams ----------------------------------------------------------------


class OpenMessagesBlock:
    """A block of an upstream stream that is not closed yet."""

    __slots__ = ("number", "block", "flows", "heard", "parts", "signature", "citations")

    def __init__(self, number: int, block: Block) -> None:
        self.number = number
        self.block = block
        self.flows = main_text(block) is not None  # its deltas are the hub's
        self.heard = False  # a delta came
        self.parts: List[str] = []  # deltas of a block that comes whole in the hub
        self.signature = getattr(block, "signature", None) or ""
        self.citations: List[Any] = getattr(block, "citations", None) or []

    def rest(self) -> Optional[str]:
        """What of the arguments stood in content_block_start and no delta said."""
        return self.block.arguments if isinstance(self.block, ToolCall) and not self.heard else None

    def final(self) -> Optional[Block]:
        """The final form, where only the end tells it."""
        block, said = self.block, "".join(self.parts)
        if isinstance(block, Thinking) and self.signature:
            return replace(block, text="", signature=self.signature)
        if isinstance(block, Text) and self.citations:
            return replace(block, text="", citations=self.citations)
        if isinstance(block, Opaque) and said and block.kind.endswith("tool_use"):
            value = load_object(said)
            return block if value is None else Opaque(block.kind, {**block.raw, "input": value})
        if isinstance(block, Compaction):
            return replace(block, summary=said or block.summary, sealed=self.signature or block.sealed)
        return None


def messages_stop_meaning(reason: Any, called: bool) -> str:
    """The meaning of a stop reason; an answer that calls and gives none ended to be called (user-pains P31)."""
    return "tool" if reason is None and called else stop_meaning(MESSAGES, reason)


class MessagesReader:
    """Reads the events of one stream: a method for each, which appends what it means (MESSAGES_EVENTS)."""

    def __init__(self) -> None:
        self._open: Dict[Any, OpenMessagesBlock] = {}  # by upstream's index
        self._opened = 0
        self._usage: Json = {}
        self._billed: Optional[int] = None
        self._delta: Json = {}  # of message_delta
        self._called = False  # a tool of the client's

    def message_start(self, body: Json, events: List[Event]) -> None:
        message = body.get("message")
        message = message if isinstance(message, dict) else {}
        self._usage = message["usage"] if isinstance(message.get("usage"), dict) else {}
        self._billed = billed_nano(body) or billed_nano(message)
        events.append(ReplyStart(text_or_none(message.get("id")) or "", text_or_none(message.get("model")) or "", 0,
                                 self._said()))

    def _said(self) -> Optional[Usage]:
        usage = messages_usage(self._usage or None, {})
        return replace(usage, billed_nano=self._billed) if usage is not None and self._billed else usage

    def block_start(self, body: Json, events: List[Event]) -> None:
        """{"index","content_block"}; an index that is still open is closed first."""
        block = messages_answer_block(body.get("content_block"))
        index = body.get("index")
        index = index if type(index) is int else self._opened
        if index in self._open:
            self._close(index, events)
        opened = self._open[index] = OpenMessagesBlock(self._opened, block)
        self._opened += 1
        self._called = self._called or isinstance(block, ToolCall)
        text = None if isinstance(block, ToolCall) else main_text(block)
        events.append(BlockStart(opened.number, opening(block) if opened.flows else block))
        if text:
            events.append(BlockDelta(opened.number, text))

    def block_delta(self, body: Json, events: List[Event]) -> None:
        """{"index","delta":{"type",…}}"""
        try:
            opened, delta = self._open[body["index"]], body["delta"]
            kind = delta["type"]
            text = delta[MESSAGES_DELTAS[kind]]
        except (KeyError, TypeError):
            return
        if kind in MESSAGES_TEXT_DELTAS:
            if text and type(text) is str:
                opened.heard = True
                if opened.flows:
                    events.append(BlockDelta(opened.number, text))
                else:
                    opened.parts.append(text)
        elif kind == "citations_delta":
            opened.citations = opened.citations + [text]
        elif kind == "signature_delta":
            opened.signature += text_or_none(text) or ""
        else:
            opened.parts.append(text_or_none(text) or "")
            opened.signature += text_or_none(delta.get("encrypted_content")) or ""

    def block_stop(self, body: Json, events: List[Event]) -> None:
        index = body.get("index")
        if type(index) is int and index in self._open:
            self._close(index, events)
        elif type(index) is not int and self._open:
            self._close(next(reversed(self._open)), events)

    def _close(self, index: int, events: List[Event]) -> None:
        opened = self._open.pop(index)
        rest = opened.rest()
        if rest:
            events.append(BlockDelta(opened.number, rest))
        events.append(BlockStop(opened.number, opened.final()))

    def message_delta(self, body: Json, events: List[Event]) -> None:
        self._usage = messages_later_usage(self._usage, body.get("usage"))
        self._billed = billed_nano(body) or self._billed
        if isinstance(body.get("delta"), dict):
            self._delta = {**self._delta, **body["delta"]}
        used = self._said()
        if used is not None:
            events.append(Used(used))

    def message_stop(self, body: Json, events: List[Event]) -> None:
        self._billed = billed_nano(body) or self._billed
        events.append(ReplyStop(messages_stop_meaning(self._delta.get("stop_reason"), self._called), self._said(),
                                text_or_none(self._delta.get("stop_sequence"))))

    def ping(self, body: Json, events: List[Event]) -> None:
        events.append(Pulse())

    def error(self, body: Json, events: List[Event]) -> None:
        events.append(Fault(stream_failure(body)))


# delta type -> the field that holds what is new
MESSAGES_DELTAS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json",
                   "signature_delta": "signature", "citations_delta": "citation", "compaction_delta": "content"}
MESSAGES_TEXT_DELTAS = frozenset(("text_delta", "thinking_delta", "input_json_delta"))
MESSAGES_EVENTS: Dict[str, Callable[[MessagesReader, Json, List[Event]], None]] = {
    "content_block_delta": MessagesReader.block_delta, "content_block_start": MessagesReader.block_start,
    "content_block_stop": MessagesReader.block_stop, "message_start": MessagesReader.message_start,
    "message_delta": MessagesReader.message_delta, "message_stop": MessagesReader.message_stop,
    "ping": MessagesReader.ping, "error": MessagesReader.error,
}


class MessagesWriter:
    """Writes a stream with one block open at a time (see `sequence`): a method for each event (MESSAGES_FRAMES).

    Blocks get their own numbers: what the dialect cannot say (an image in an answer) leaves no gap, an empty text
    neither. Arguments stream as they come when they open like an object; others wait and leave as `raw_arguments`,
    or the SDKs raise at the first piece that is no JSON.
    """

    def __init__(self, codec: MessagesCodec) -> None:
        self._codec = codec
        self._usage: Optional[Usage] = None
        self._number = -1
        self._block: Block = Text("")
        self._head = ""  # a delta frame up to its text
        self._said: List[str] = []  # what of the block has gone out
        self._pending: Optional[Frame] = None  # the start of a text that has said nothing yet
        self._held: List[str] = []  # arguments that do not open like an object, or not yet
        self._raw = False  # they do not

    def start(self, event: ReplyStart, frames: List[Frame]) -> None:
        self._usage = event.usage
        message = {"id": event.id, "type": "message", "role": "assistant", "model": event.model, "content": [],
                   "stop_reason": None, "stop_sequence": None, "usage": messages_usage_form(event.usage)}
        frames.append(messages_frame("message_start", **messages_billed({"message": message}, event.usage)))

    def block_start(self, event: BlockStart, frames: List[Frame]) -> None:
        """Opens a block that streams; a text waits for its first word."""
        block = self._block = event.block
        self._said, self._pending, self._held, self._raw = [], None, [], False
        if not messages_streams(block):
            return
        form, kind = MESSAGES_OPENINGS[type(block)]
        if isinstance(block, ToolCall):
            form = messages_extended({**form, "id": block.id, "name": block.name}, block, MESSAGES_CALL_EXTRA)
        self._number += 1
        self._head = f'{{"type":"content_block_delta","index":{self._number},"delta":{{"type":"{kind}","{MESSAGES_DELTAS[kind]}":'
        start = messages_frame("content_block_start", index=self._number, content_block=form)
        if isinstance(block, (Text, Refusal)):
            self._pending = start
        else:
            frames.append(start)
        if main_text(block):
            self._first(main_text(block) or "", frames)

    def block_delta(self, event: BlockDelta, frames: List[Frame]) -> None:
        if self._said:
            self._said.append(event.text)
            frames.append(Frame("content_block_delta", f"{self._head}{encode_basestring_ascii(event.text)}}}}}"))
        elif event.text:
            self._first(event.text, frames)

    def _first(self, text: str, frames: List[Frame]) -> None:
        """What a block says before anything of it has gone out."""
        if not messages_streams(self._block):
            return
        if isinstance(self._block, ToolCall):
            self._raw = self._raw or text.lstrip()[:1] not in ("", "{")
            self._held.append(text)
            if self._raw or not text.strip():
                return
            text, self._held = "".join(self._held), []
        if self._pending is not None:
            frames.append(self._pending)
            self._pending = None
        self._said.append(text)
        frames.append(Frame("content_block_delta", f"{self._head}{encode_basestring_ascii(text)}}}}}"))

    def block_stop(self, event: BlockStop, frames: List[Frame]) -> None:
        """What only the end tells, and the end."""
        final = self._block if event.block is None else event.block
        if not messages_streams(self._block):
            self._whole(final, frames)
            return
        if not self._said:
            self._late(final, frames)
        if self._pending is not None:  # a text that said nothing is not worth a block
            self._number -= 1
            return
        for delta in messages_closing(final, self._said):
            frames.append(messages_frame("content_block_delta", index=self._number, delta=delta))
        frames.append(Frame("content_block_stop", f'{{"type":"content_block_stop","index":{self._number}}}'))

    def _late(self, final: Block, frames: List[Frame]) -> None:
        """The text that only the final form told, and arguments that were held."""
        text = "".join(self._held) or main_text(final)
        self._held, self._raw = [], False
        if text and isinstance(self._block, ToolCall):
            text = text if text.lstrip()[:1] == "{" else dump_json(messages_input(text), ascii_only=True).decode()
        if text:
            self._first(text, frames)

    def _whole(self, block: Block, frames: List[Frame]) -> None:
        """A block that comes in one piece; a server tool's input still goes as a delta, clients read it only there."""
        stand_in = messages_stand_in(block, True) if isinstance(block, Compaction) else None
        if stand_in is not None:
            self.block_start(BlockStart(0, opening(stand_in)), frames)
            self.block_stop(BlockStop(0, stand_in), frames)
            return
        for wire in messages_forms([block], MESSAGES_SIDES["assistant"], to_client=True):
            self._number += 1
            given = wire.get("input") if wire["type"].endswith("tool_use") else None
            start = {**wire, "input": {}} if isinstance(given, dict) else wire
            frames.append(messages_frame("content_block_start", index=self._number, content_block=start))
            if isinstance(given, dict) and given:
                delta = {"type": "input_json_delta", "partial_json": dump_json(given).decode()}
                frames.append(messages_frame("content_block_delta", index=self._number, delta=delta))
            frames.append(Frame("content_block_stop", f'{{"type":"content_block_stop","index":{self._number}}}'))

    def stop(self, event: ReplyStop, frames: List[Frame]) -> None:
        usage = event.usage or self._usage
        body = {"delta": {"stop_reason": stop_word(MESSAGES, event.reason), "stop_sequence": event.sequence},
                "usage": messages_usage_form(usage)}
        frames.append(messages_frame("message_delta", **messages_billed(body, usage)))
        frames.append(Frame("message_stop", '{"type":"message_stop"}'))

    def fault(self, event: Fault, frames: List[Frame]) -> None:
        frames.append(messages_frame(**self._codec.encode_error(UpstreamError(event.failure))))

    def pulse(self, event: Pulse, frames: List[Frame]) -> None:
        frames.append(Frame("ping", '{"type":"ping"}'))

    def used(self, event: Used, frames: List[Frame]) -> None:
        pass


MESSAGES_FRAMES: Dict[type, Callable[[MessagesWriter, Any, List[Frame]], None]] = {
    BlockDelta: MessagesWriter.block_delta, BlockStart: MessagesWriter.block_start, BlockStop: MessagesWriter.block_stop,
    ReplyStart: MessagesWriter.start, ReplyStop: MessagesWriter.stop, Fault: MessagesWriter.fault, Pulse: MessagesWriter.pulse, Used: MessagesWriter.used,
}
# blocks that stream -> (content_block of their start, type of their deltas)
MESSAGES_OPENINGS: Dict[type, Tuple[Json, str]] = {
    Text: ({"type": "text", "text": ""}, "text_delta"),
    Refusal: ({"type": "text", "text": ""}, "text_delta"),
    Thinking: ({"type": "thinking", "thinking": "", "signature": ""}, "thinking_delta"),
    ToolCall: ({"type": "tool_use", "id": "", "name": "", "input": {}}, "input_json_delta"),
}


def messages_streams(block: Block) -> bool:
    """Whether a block goes out as it comes."""
    return type(block) in MESSAGES_OPENINGS and not (isinstance(block, Thinking) and block.redacted is not None)


def messages_closing(final: Block, said: List[str]) -> List[Json]:
    """What a block says only at its end, as deltas; `said` is what it has said before.

    A thinking block without a signature gets no empty one: clients send back what they were given, and one that was
    given none drops the block itself or says so with "" (clients.md: either way is fine).
    """
    if isinstance(final, Thinking) and final.signature:
        return [{"type": "signature_delta", "signature": final.signature}]
    if isinstance(final, Text):
        text = final.text or "".join(said) if final.citations else ""
        citations = [messages_citation_form(citation, text, True) for citation in final.citations or ()]
        return [{"type": "citations_delta", "citation": citation} for citation in citations if citation]
    return []


def messages_frame(type: str, **fields: Any) -> Frame:
    """One frame; its event is its body's `type`."""
    return Frame(type, dump_json({"type": type, **fields}).decode())


# ---- the codec --------------------------------------------------------------


class MessagesCodec(Codec):
    """Messages; `system` is the first message, further ones may stand between the turns."""

    name = MESSAGES
    keep_alive = b'event: ping\ndata: {"type": "ping"}\n\n'

    def decode_request(self, body: Json) -> Request:
        """The Request of a body; `system` becomes the first message."""
        turns = [messages_message(want_object(message, f"messages.{at}"), f"messages.{at}")
                 for at, message in enumerate(want_list(body, "messages"))]
        if not turns:
            raise ClientError("messages: at least one message is required", param="messages")
        if body.get("system") is not None:
            turns.insert(0, Message("system", messages_content(body["system"], "system")))
        choice, parallel = messages_choice(body)
        metadata = body.get("metadata")
        metadata = dict(metadata) if isinstance(metadata, dict) else {}
        user = text_or_none(metadata.pop("user_id", None))
        stop = None if body.get("stop_sequences") is None else want_list(body, "stop_sequences")
        return Request(
            model=want_model(body), messages=canonical(turns), tools=[messages_tool(tool) for tool in want_list(body, "tools")],
            tool_choice=choice, parallel_tools=parallel, stream=want_flag(body, "stream"), max_tokens=want_count(body, "max_tokens"),
            stop=stop if stop is None else [text for text in stop if isinstance(text, str)],
            temperature=want_number(body, "temperature"), top_p=want_number(body, "top_p"), top_k=want_count(body, "top_k"),
            reasoning=messages_reasoning(body, messages_turn_effort(turns)), output=messages_format(body), user=user,
            metadata=metadata or None, extra={name: value for name, value in body.items() if name not in MESSAGES_READ} or None)

    def encode_request(self, request: Request) -> Json:
        """The body that asks the same. Leading system and developer messages are `system`, later ones reminders."""
        lead = next((at for at, message in enumerate(request.messages) if message.role in MESSAGES_SIDES), len(request.messages))
        system = messages_forms((block for message in request.messages[:lead] for block in message.content), (Text, Refusal, Compaction))
        thinking, effort = messages_reasoning_form(request)
        tools = [entry for entry in map(messages_tool_form, request.tools) if entry is not None]
        choice = messages_choice_form(request.tool_choice, request.parallel_tools) if tools else None
        stop = [text for text in request.stop or () if text.strip()]  # blank ones are refused
        output = {"effort": effort, "format": {"type": "json_schema", "schema": request.output.schema}
                  if request.output is not None and request.output.schema is not None else None}
        fields: Json = {
            "model": request.model, "max_tokens": request.max_tokens, "system": messages_bare(system) if system else None,
            "messages": messages_turns(request.messages[lead:]), "tools": tools or None, "tool_choice": choice,
            "stream": request.stream or None, "stop_sequences": stop or None,
            **messages_sampling(request, thinking is not None and thinking["type"] != "disabled"), "thinking": thinking,
            "output_config": {name: value for name, value in output.items() if value is not None} or None,
            "metadata": {"user_id": request.user} if request.user is not None else None}
        if fields["max_tokens"] is None:
            fields["max_tokens"] = MESSAGES_MAX_TOKENS + (thinking or {}).get("budget_tokens", 0)
        if not fields["messages"] and fields["system"] is not None:  # a conversation needs a turn
            fields["messages"], fields["system"] = [{"role": "user", "content": fields["system"]}], None
        fields.update((name, value) for name, value in (request.extra or {}).items()
                      if name in MESSAGES_EXTRA and MESSAGES_EXTRA[name](value))
        return {name: value for name, value in fields.items() if value is not None}

    def decode_reply(self, body: Json) -> Reply:
        """The Reply of a whole answer; raises UpstreamError for an error object."""
        if body.get("type") == "error" or is_error_object(body):
            raise UpstreamError(stream_failure(body))
        content = body.get("content")
        content = [content] if isinstance(content, str) else content if isinstance(content, list) else []
        blocks = [messages_answer_block(block) for block in content]
        called = any(isinstance(block, ToolCall) for block in blocks)
        return Reply(text_or_none(body.get("id")) or "", text_or_none(body.get("model")) or "", 0,
                     blocks, messages_stop_meaning(body.get("stop_reason"), called),
                     text_or_none(body.get("stop_sequence")), messages_usage(body.get("usage"), body))

    def encode_reply(self, reply: Reply, asked: Optional[Request] = None) -> Json:
        """{"id","type":"message","role":"assistant","model","content":[…],"stop_reason","stop_sequence","usage":{…}};
        nothing of what was `asked` is repeated."""
        body = {"id": reply.id, "type": "message", "role": "assistant", "model": reply.model,
                "content": messages_forms(reply.content, MESSAGES_SIDES["assistant"], to_client=True),
                "stop_reason": stop_word(MESSAGES, reply.stop_reason), "stop_sequence": reply.stop_sequence,
                "usage": messages_usage_form(reply.usage)}
        return messages_billed(body, reply.usage)

    def decode_stream(self, batches: Iterable[List[Frame]]) -> Iterator[List[Event]]:
        """The events of upstream's frames; `[DONE]` and comments say nothing here."""
        reader = MessagesReader()
        for frames in batches:
            events: List[Event] = []
            for frame in frames:
                body = load_object(frame.data)
                if body is None:
                    continue
                kind = body.get("type", "error" if "error" in body else frame.event)
                read = MESSAGES_EVENTS.get(kind) if type(kind) is str else None
                if read is not None:
                    read(reader, body, events)
            yield events

    def encode_stream(self, batches: Iterable[List[Event]], asked: Optional[Request] = None) -> Iterator[List[Frame]]:
        """The frames of a lawful stream; nothing of what was `asked` is repeated."""
        writer = MessagesWriter(self)
        for events in sequence(batches):
            frames: List[Frame] = []
            for event in events:
                MESSAGES_FRAMES[type(event)](writer, event, frames)
            yield frames

    def encode_error(self, error: ProxyError) -> Json:
        """{"type":"error","error":{"type","message"}}, overflow in the words Claude Code compacts on."""
        failure = getattr(error, "failure", None)
        message = redact(error.message)
        overflow = failure is not None and failure.kind == "overflow"
        if failure is not None and failure.overflow:
            message = "prompt is too long: {} tokens > {} maximum".format(*failure.overflow)
        elif overflow and not re.search(COMPACTING, message):
            message += " (the prompt exceeds the context window)"
        kind = ERROR_TYPES.get(error.status, ("", "api_error"))[1]
        inner = {"type": kind, "message": message}
        if error.code and not overflow:
            inner["code"] = error.code
        body: Json = {"type": "error", "error": inner}
        if failure is not None and failure.request_id:
            body["request_id"] = failure.request_id
        return body

    def decode_usage(self, body: Json) -> Optional[Usage]:
        return messages_usage(body.get("usage"), body)

    def stop_reason(self, body: Json) -> Optional[str]:
        return text_or_none(body.get("stop_reason"))

    def finish(self, body: Json) -> bool:
        unfinished = isinstance(body.get("content"), list) and body.get("stop_reason") is None
        if unfinished:
            called = any(name_in(block, "type") == "tool_use" for block in objects_in(body["content"]))
            body["stop_reason"] = "tool_use" if called else "end_turn"
        return unfinished

    def meter(self, trace_id: str) -> MessagesMeter:
        return MessagesMeter(trace_id, self)


class MessagesMeter(Meter):
    """A Messages stream: nothing after `message_stop` (upstream sometimes adds `[DONE]`), `event: error` when cut."""

    def __init__(self, trace_id: str, codec: MessagesCodec) -> None:
        super().__init__(trace_id)
        self._codec = codec
        self._usage: Json = {}  # of message_start, overridden by message_delta
        self._billed: Optional[int] = None
        self._started = False

    def relayed(self, frames: bytes) -> bytes:
        if self.ended or self.error is not None:
            return b""
        if self._started and b"message_stop" not in frames and b"error" not in frames:
            return frames
        return b"".join(map(self._frame, split_frames(frames)))

    def passes(self, around: bytes) -> bool:
        return self._started and not self.ended and self.error is None and b"message_stop" not in around and b"error" not in around

    def _frame(self, frame: bytes) -> bytes:
        if self.ended or self.error is not None:
            return b""
        if not self._started and b"message_start" in frame:
            self._start(frame)
        elif b"message_stop" in frame and MESSAGE_STOP.search(frame):
            self.ended = (frame_json(frame) or {}).get("type") == "message_stop"
            return self._reason() + frame if self.ended else frame
        elif b'"error"' in frame:  # JSON text holds no bare quotes
            return self._failed(frame)
        return frame

    def _reason(self) -> bytes:
        """A `message_delta` that says why the answer ends, if upstream did not: clients run no tool without (user-pains P31)."""
        recent = b"".join(self._recent)
        if MESSAGES_REASON.search(recent):
            return b""
        last = next((event for event in self._last_objects() if event.get("type") == "message_delta"), {})
        usage = messages_later_usage(self._usage, last.get("usage"))
        reason = "tool_use" if MESSAGES_CALL.search(recent) else "end_turn"
        return format_sse("message_delta", {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None},
                                            "usage": {"output_tokens": count_or_zero(usage, "output_tokens")}})

    def _start(self, frame: bytes) -> None:
        event = frame_json(frame) or {}
        message = event.get("message")
        if isinstance(message, dict):
            self._started = True
            self.served_model = text_or_none(message.get("model")) or ""
            self._usage = message["usage"] if isinstance(message.get("usage"), dict) else {}
            self._billed = billed_nano(event) or billed_nano(message)

    def _failed(self, frame: bytes) -> bytes:
        """An error frame as it came, or nothing if it has another form than this dialect's; any other frame untouched."""
        event = frame_json(frame) or {}
        if event.get("type") != "error" and not is_error_object(event):
            return frame
        self.error = stream_failure(event)
        self.ended = event.get("type") == parse_frame(frame)[0] == "error"
        return frame if self.ended else b""

    def close(self, failure: Optional[Failure]) -> bytes:
        self._learn()
        if self.ended:
            return b""
        self.ended = True
        self.error = failure or self.error or CUT
        return format_sse("error", self._codec.encode_error(UpstreamError(self.error)))

    def _learn(self) -> None:
        """Reads the newest message_delta: its usage is cumulative and the most accurate (copilot-upstream 7.3)."""
        last = next((event for told in (self._last_objects(), self._last_told()) for event in told if event.get("type") == "message_delta"), {})
        delta = last.get("delta")
        self.stop_reason = text_or_none(delta.get("stop_reason")) if isinstance(delta, dict) else None
        usage = messages_later_usage(self._usage, last.get("usage"))
        self.usage = messages_usage(usage, last) if usage else None
        if self.usage is not None and self.usage.billed_nano is None:
            self.usage.billed_nano = self._billed


###############################################################################
#                                   Gemini                                    #
###############################################################################
# POST /v1beta/models/{model}:generateContent and :streamGenerateContent, the token counter and the embedding verbs.
# ai.google.dev API reference "Generating content", "Function calling", "Thought signatures", 2026-11; types of google-genai 3.6.1;
# what its clients send: clients.md. The body names no model and no stream: both stand in the path, and whoever reads or
# writes the path moves them into or out of the body (`model`, `stream`).
#
#   {"systemInstruction":{"parts":[{"text"}]},"contents":[{"role":"user","parts":[{"text"},{"inlineData":{"mimeType","data"}},
#     {"fileData":{"mimeType","fileUri"}},{"functionResponse":{"id","name","response":{"output"|"error"},"parts":[…]}}]},
#     {"role":"model","parts":[{"text","thought":true},{"functionCall":{"id","name","args":{}},"thoughtSignature":"…"}]}],
#    "tools":[{"functionDeclarations":[{"name","description","parameters"|"parametersJsonSchema"}]},{"googleSearch":{}}],
#    "toolConfig":{"functionCallingConfig":{"mode":"AUTO"|"ANY"|"NONE"|"VALIDATED","allowedFunctionNames":["…"]}},
#    "generationConfig":{"temperature","topP","topK","maxOutputTokens","stopSequences","responseMimeType","responseSchema"|
#     "responseJsonSchema","thinkingConfig":{"includeThoughts","thinkingBudget"|"thinkingLevel"}},"safetySettings":[…]}
#   {"candidates":[{"content":{"role":"model","parts":[…]},"finishReason":"STOP","index":0}],"usageMetadata":{"promptTokenCount",
#     "cachedContentTokenCount","candidatesTokenCount","thoughtsTokenCount","totalTokenCount"},"modelVersion","responseId"}
#
# A stream is such objects with a few parts each, as `data:` lines without event names; the last has `finishReason` and
# usage, nothing follows it. Neighbouring texts are therefore one block, and so are neighbouring thoughts.
#
# Signatures: whatever part carries one keeps it as `seal`, a thought as `signature`. Clients do not send thoughts back
# (Gemini CLI), so towards them a thought's signature rides on the part behind it, as Gemini's own do.

GEMINI_MODEL_ROLES = frozenset(("model", "assistant"))
# Placeholders of clients that have no signature ("Thought signatures", FAQ), plain and as google-genai encodes bytes.
GEMINI_NO_SEALS = frozenset(("skip_thought_signature_validator", "c2tpcF90aG91Z2h0X3NpZ25hdHVyZV92YWxpZGF0b3I=",
                             "context_engineering_is_the_way_to_go", "Y29udGV4dF9lbmdpbmVlcmluZ19pc190aGVfd2F5X3RvX2dv"))
# Parts without a place in the hub that are written back as they came.
GEMINI_OPAQUE = frozenset(("executableCode", "codeExecutionResult", "toolCall", "toolResponse"))
GEMINI_MEDIA_EXTRA = ("videoMetadata", "mediaResolution", "mediaProcessing")  # beside the media of a part
GEMINI_DETAILS = {"MEDIA_RESOLUTION_LOW": "low", "MEDIA_RESOLUTION_HIGH": "high"}
GEMINI_IMAGE_ENDINGS = {"png": "png", "gif": "gif", "webp": "webp", "heic": "heic", "avif": "avif"}  # else jpeg
GEMINI_TOOL_EXTRA = ("response", "responseJsonSchema", "behavior")
GEMINI_SERVER_TOOLS = frozenset(("googleSearch", "googleSearchRetrieval", "urlContext", "codeExecution", "fileSearch", "googleMaps",
                                 "computerUse", "enterpriseWebSearch", "retrieval", "mcpServers"))
GEMINI_CHOICES = {"AUTO": "auto", "VALIDATED": "auto", "ANY": "required", "NONE": "none"}
GEMINI_MODES = {"auto": "AUTO", "required": "ANY", "tool": "ANY", "none": "NONE"}
# hub, generationConfig, whole numbers only
GEMINI_NUMBERS = (("max_tokens", "maxOutputTokens", True), ("temperature", "temperature", False), ("top_p", "topP", False),
                  ("top_k", "topK", True), ("seed", "seed", True), ("presence_penalty", "presencePenalty", False),
                  ("frequency_penalty", "frequencyPenalty", False))
GEMINI_CONFIG_READ = frozenset(("stopSequences", "responseMimeType", "responseSchema", "responseJsonSchema", "responseLogprobs", "logprobs",
                                "thinkingConfig")) | {name for _, name, _ in GEMINI_NUMBERS}
GEMINI_READ = frozenset(("model", "stream", "contents", "systemInstruction", "tools", "toolConfig", "generationConfig"))
# Fields that only this dialect knows, by their type; those of generationConfig lie under its name. `candidateCount` is not
# among them: a translated answer has one candidate (DESIGN 8).
GEMINI_PASSED: Tuple[Tuple[str, type], ...] = (("safetySettings", list), ("cachedContent", str), ("labels", dict), ("serviceTier", str))
GEMINI_CONFIG_PASSED = ("mediaResolution", "responseModalities", "speechConfig", "imageConfig", "audioTimestamp", "enableEnhancedCivicAnswers")
GEMINI_EMPTY = "Invalid Gemini request: contents.parts.text is required."  # console reference A.8; for a body without a usable part
GEMINI_LEVELS = {"max": "XHIGH"}  # `thinkingLevel`; the others are called alike

# google.rpc.Code by HTTP status; others by their hundred (cloud.google.com/apis/design/errors).
GEMINI_STATUS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 402: "RESOURCE_EXHAUSTED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
                 405: "UNIMPLEMENTED", 408: "DEADLINE_EXCEEDED", 409: "ABORTED", 429: "RESOURCE_EXHAUSTED", 499: "CANCELLED",
                 500: "INTERNAL", 501: "UNIMPLEMENTED", 502: "UNAVAILABLE", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
                 529: "UNAVAILABLE"}
GEMINI_CODES = {**{word: code for code, word in reversed(list(GEMINI_STATUS.items()))}, "RESOURCE_EXHAUSTED": 429, "UNAVAILABLE": 503,
                "FAILED_PRECONDITION": 400, "OUT_OF_RANGE": 400}
RPC = "type.googleapis.com/google.rpc."

# ---- spelling ---------------------------------------------------------------


@lru_cache(maxsize=1024)
def gemini_camel(name: str) -> str:
    """A field's name in camelCase."""
    return re.sub("_([a-z0-9])", lambda found: found.group(1).upper(), name)


def gemini_fields(value: Any) -> Json:
    """The object with its names in camelCase, {} for what is no object. Both spellings occur, even in one body
    (clients.md); only the outer names are touched, for inside may lie a user's data."""
    if type(value) is not dict:
        return {}
    return value if "_" not in "".join(value) else {gemini_camel(name): inner for name, inner in value.items()}


def gemini_list(value: Any) -> List[Any]:
    """The value if it is a list: what upstream sends is taken as it comes."""
    return value if isinstance(value, list) else []


def gemini_dump(value: Any) -> str:
    """A value as compact JSON; what is nested too deep for it is an empty object."""
    try:
        return dump_json(value).decode()
    except RecursionError:
        return "{}"


# ---- schemas ----------------------------------------------------------------

GEMINI_SCHEMA_NAMES = {"defs": "$defs", "ref": "$ref"}
GEMINI_SCHEMA_MAPS = frozenset(("properties", "$defs", "definitions", "patternProperties"))
GEMINI_SCHEMA_INNER = frozenset(("items", "additionalProperties", "not", "anyOf", "oneOf", "allOf", "prefixItems"))
GEMINI_FORMATS = frozenset(("int32", "int64", "float", "double", "enum"))  # OpenAPI's; JSON Schema knows none of them


def gemini_schema(schema: Any) -> Any:
    """The JSON Schema of an OpenAPI one: {"type":"OBJECT","nullable":true,"properties":{…},"minItems":"1","propertyOrdering":[…]}"""
    if isinstance(schema, list):
        return [gemini_schema(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found: Json = {}
    for name, value in gemini_fields(schema).items():
        name = GEMINI_SCHEMA_NAMES.get(name, name)
        if name == "type":
            value = [str(kind).lower() for kind in value] if isinstance(value, list) else str(value).lower()
        elif name in GEMINI_SCHEMA_MAPS and isinstance(value, dict):
            value = {key: gemini_schema(inner) for key, inner in value.items()}
        elif name in GEMINI_SCHEMA_INNER:
            value = gemini_schema(value)
        elif name[:3] in ("min", "max") and isinstance(value, str) and value.isdecimal():
            value = int(value[:MAX_DIGITS])  # 64-bit numbers are strings in Google's JSON
        elif name == "example":
            name, value = "examples", [value]
        if name not in ("nullable", "propertyOrdering") and value != "type_unspecified" and not (name == "format" and value in GEMINI_FORMATS):
            found[name] = value
    return gemini_or_null(found) if schema.get("nullable") is True else found


def gemini_or_null(schema: Json) -> Json:
    """The schema that takes null, too."""
    if isinstance(schema.get("enum"), list):
        schema["enum"] = [*schema["enum"], None]
    if isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    elif isinstance(schema.get("anyOf"), list):
        schema["anyOf"] = [*schema["anyOf"], {"type": "null"}]
    return schema


def gemini_given_schema(fields: Json, openapi: str, plain: str) -> Optional[Json]:
    """The schema under one of two names. Gemini CLI writes OpenAPI's capitals under the plain one as well (clients.md)."""
    for name in (plain, openapi):
        schema = fields.get(name)
        if isinstance(schema, dict):
            return gemini_schema(schema) if name == openapi or name_in(schema, "type").isupper() else schema
    return None


# ---- reading parts ----------------------------------------------------------


class GeminiCalls:
    """The calls of one conversation: ids for those that have none, and the call that a result answers.

    A client may invent an id for the result of a call that had none (Gemini CLI) or name none at all (google-genai): the
    first open call of that function is meant, so parallel calls of one function keep their order.
    """

    def __init__(self, seed: str = "") -> None:
        self._seed = seed
        self._count = 0
        self._ids: set = set()
        self._open: List[Tuple[Optional[str], str, str]] = []  # id given, name, id

    def next_turn(self) -> None:
        """The model speaks again: nobody answers its older calls any more."""
        self._open.clear()

    def called(self, given: Optional[str], name: str) -> str:
        """The id of a further call: its own, unless another call has it."""
        self._count += 1
        made = hashlib.sha256(f"{self._seed}|{self._count}|{name}".encode("utf-8", "replace")).hexdigest()[:24]
        own = given if given and given not in self._ids else f"call_{made}"
        self._ids.add(own)
        self._open.append((given or None, name, own))
        return own

    def answered(self, given: Optional[str], name: str) -> str:
        """The id of the call that a result belongs to; a result of no call keeps its own."""
        same = [call for call in self._open if given and call[0] == given]
        alike = [call for call in self._open if call[1] == name and not (given and call[0])]
        for call in same or alike:
            self._open.remove(call)
            return call[2]
        return given or name


def gemini_parts(content: Any, path: str) -> List[Json]:
    """The parts of a content, whatever its form: {"role","parts":[…]}, a list of parts, one part, a string."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"text": content}]
    if isinstance(content, list):
        return [part for item in content for part in gemini_parts(item, path)]
    fields = gemini_fields(want_object(content, path))
    if "parts" in fields:
        return gemini_parts(fields["parts"], path)
    return [fields] if fields.keys() - {"role"} else []


def gemini_block(part: Json, calls: GeminiCalls) -> Block:
    """The block of one part with its signature."""
    seal = text_or_none(part.get("thoughtSignature"))
    seal = None if seal in GEMINI_NO_SEALS else seal
    kind = next((name for name in GEMINI_PARTS if isinstance(part.get(name), dict)), None)
    text = part.get("text")
    if isinstance(text, str) or kind is None and not part.keys() - {"thought", "thoughtSignature", "text"}:
        text = text if isinstance(text, str) else ""
        return Thinking(text, seal) if part.get("thought") is True else Text(text, seal=seal)
    if kind is not None:
        block = GEMINI_PARTS[kind](part, gemini_fields(part[kind]), calls)
        return block if seal is None else replace(block, seal=seal)
    kind = next((name for name in part if name in GEMINI_OPAQUE), None) or next(name for name in part if name != "thoughtSignature")
    return Opaque(kind, {kind: part[kind]}, seal=seal)


def gemini_media(part: Json, given: Json, calls: GeminiCalls) -> Union[Image, File]:
    """{"inlineData":{"mimeType","data","displayName"}} | {"fileData":{"mimeType","fileUri"}}"""
    media_type, data, url = (text_or_none(given.get(name)) for name in ("mimeType", "data", "fileUri"))
    extra = {name: part[name] for name in GEMINI_MEDIA_EXTRA if part.get(name) is not None}
    if not (media_type or "").startswith("image/"):
        return File(media_type, gemini_base64(data), url, name=text_or_none(given.get("displayName")), extra=extra or None)
    detail = GEMINI_DETAILS.get(name_in(extra.get("mediaResolution"), "level"))
    if detail is not None:
        del extra["mediaResolution"]
    return Image(media_type, gemini_base64(data), url, detail=detail, extra=extra or None)


def gemini_base64(data: Optional[str]) -> Optional[str]:
    """The data in the standard alphabet, padded: google-genai writes the URL-safe one, which nobody else takes."""
    if data is not None and ("-" in data or "_" in data):
        data = data.replace("-", "+").replace("_", "/")
    return data if data is None or not len(data) % 4 else data + "=" * (-len(data) % 4)


def gemini_call(part: Json, given: Json, calls: GeminiCalls) -> ToolCall:
    """{"functionCall":{"id","name","args":{}}}"""
    name, args = name_in(given, "name"), given.get("args")
    if isinstance(args, dict) and len(args) == 1 and isinstance(args.get("_raw"), str):
        arguments = args["_raw"]
    else:
        arguments = "{}" if args is None else gemini_dump(args)
    return ToolCall(calls.called(text_or_none(given.get("id")), name), name, arguments)


def gemini_result(part: Json, given: Json, calls: GeminiCalls) -> ToolResult:
    """{"functionResponse":{"id","name","response":{"output":…}|{"error":…}|{…},"parts":[{"inlineData":…}]}}; what is no text is
    told as JSON."""
    said = given.get("response")
    key = next(iter(said)) if isinstance(said, dict) and len(said) == 1 else ""
    if key in ("output", "result", "error"):
        said = said[key]
    text = said if isinstance(said, str) else "" if said is None or said == {} else gemini_dump(said)
    content: List[Block] = [Text(text)] if text else []
    content += [gemini_block(gemini_fields(inner), calls) for inner in gemini_list(given.get("parts"))
                if "inlineData" in gemini_fields(inner) or "fileData" in gemini_fields(inner)]
    return ToolResult(calls.answered(text_or_none(given.get("id")), name_in(given, "name")), content, True if key == "error" else None)


GEMINI_PARTS: Dict[str, Callable[[Json, Json, GeminiCalls], Block]] = {
    "inlineData": gemini_media, "fileData": gemini_media, "functionCall": gemini_call, "functionResponse": gemini_result}


def gemini_joins(last: Optional[Block], sealed: bool, kind: type, seal: Optional[str]) -> bool:
    """Whether a text or thought goes on with the next part. A signature stands anywhere on a text, but at a thought's end."""
    return type(last) is kind and (not sealed or kind is Text and seal is None)


def gemini_joined(blocks: Iterable[Block]) -> List[Block]:
    """What the model said, its neighbouring texts and thoughts joined: clients keep an answer in the pieces it came in."""
    joined: List[Tuple[Any, List[str], Optional[str]]] = []  # first block, its texts, its signature
    for block in blocks:
        own = block.signature if isinstance(block, Thinking) else block.seal
        last, texts, seal = joined[-1] if joined else (None, [], None)
        if isinstance(block, (Text, Thinking)) and gemini_joins(last, seal is not None, type(block), own):
            texts.append(block.text)
            joined[-1] = (last, texts, seal if own is None else own)
        else:
            joined.append((block, [main_text(block) or ""], own))
    return [block if len(texts) < 2 else type(block)("".join(texts), **{"signature" if isinstance(block, Thinking) else "seal": seal})
            for block, texts, seal in joined]


def gemini_messages(contents: Any) -> List[Message]:
    """The conversation. Media behind a result in one content belong to that result (Gemini CLI puts them there)."""
    if contents is not None and not isinstance(contents, (str, dict, list)):
        raise wrong_type("contents", "a list", contents)
    calls = GeminiCalls()
    messages: List[Message] = []
    for at, content in enumerate(contents if isinstance(contents, list) else [contents]):
        role = name_in(content, "role")
        role = "assistant" if role in GEMINI_MODEL_ROLES else role if role == "system" else "user"
        if role == "assistant" and (not messages or messages[-1].role != role):
            calls.next_turn()
        result: Optional[ToolResult] = None
        for part in gemini_parts(content, f"contents.{at}"):
            block = gemini_block(part, calls)
            if isinstance(block, (Image, File)) and result is not None:
                result.content.append(block)
                continue
            result = block if isinstance(block, ToolResult) else None
            if isinstance(block, (Text, Thinking)) and block == type(block)(""):
                continue
            side = "user" if result is not None else "assistant" if isinstance(block, (ToolCall, Thinking)) else role
            if not messages or messages[-1].role != side:
                messages.append(Message(side, []))
            messages[-1].content.append(block)
    return [Message(message.role, gemini_joined(message.content)) if message.role == "assistant" else message for message in messages]


# ---- writing parts ----------------------------------------------------------


def gemini_args(arguments: str) -> Json:
    """The object of a text of arguments; text that is none is kept inside one."""
    if not arguments.strip():
        return {}
    try:
        value = parse_json(arguments.encode("utf-8", "surrogatepass"))
    except ClientError:
        value = None
    return value if isinstance(value, dict) else {"_raw": arguments}


def gemini_part(block: Block) -> Optional[Json]:
    """The part of a block with its signature; None for what the dialect cannot say."""
    write = GEMINI_WRITERS.get(type(block))
    part = write(block) if write is not None else None
    return part if part is None or block.seal is None else {**part, "thoughtSignature": block.seal}


def gemini_wire_media(media: Union[Image, File]) -> Optional[Json]:
    """{"inlineData":{"mimeType","data"}} | {"fileData":{"mimeType","fileUri"}}; a file's plain text is text."""
    if isinstance(media, File) and media.text is not None:
        return {"text": media.text}
    if media.data is None and media.url is None:
        return None
    media_type = media.media_type
    if isinstance(media, Image) and media_type is None:
        ending = (media.url or "png").partition("?")[0].rpartition(".")[2].lower()
        media_type = f"image/{GEMINI_IMAGE_ENDINGS.get(ending, 'jpeg')}"
    part: Json = {name: value for name, value in (media.extra or {}).items() if name in GEMINI_MEDIA_EXTRA}
    level = next((level for level, detail in GEMINI_DETAILS.items() if isinstance(media, Image) and detail == media.detail), None)
    if level is not None:
        part["mediaResolution"] = {"level": level}
    if media.data is not None:
        return {"inlineData": {"mimeType": media_type or "application/pdf", "data": media.data}, **part}
    return {"fileData": {**({} if media_type is None else {"mimeType": media_type}), "fileUri": media.url}, **part}


def gemini_wire_thought(thought: Thinking) -> Optional[Json]:
    """{"text","thought":true,"thoughtSignature"}"""
    sealed = thought.redacted if thought.signature is None else thought.signature
    if not thought.text and sealed is None:
        return None
    return {"text": thought.text, "thought": True, **({} if sealed is None else {"thoughtSignature": sealed})}


GEMINI_WRITERS: Dict[type, Callable[[Any], Optional[Json]]] = {
    Text: lambda text: {"text": text.text},
    Refusal: lambda refusal: {"text": refusal.text},
    Image: gemini_wire_media,
    File: gemini_wire_media,
    Thinking: gemini_wire_thought,
    ToolCall: lambda call: {"functionCall": {"id": call.id, "name": call.name, "args": gemini_args(call.arguments)}},
    ToolReference: lambda reference: {"text": f"Tool {reference.name} loaded"},
    Compaction: lambda compaction: {"text": compaction.summary} if compaction.summary else None,
    Opaque: lambda opaque: opaque.raw if opaque.kind in GEMINI_OPAQUE and isinstance(gemini_fields(opaque.raw).get(opaque.kind), dict) else None,
}


def gemini_wire_result(result: ToolResult, names: Dict[str, str]) -> Json:
    """{"functionResponse":{"id","name","response":{"output"|"error":"…"},"parts":[media]}}"""
    parts = [part for part in map(gemini_part, result.content) if part is not None]
    media = [part for part in parts if "inlineData" in part or "fileData" in part]
    text = "\n".join(part["text"] for part in parts if "text" in part)
    return {"functionResponse": {"id": result.call_id, "name": names.get(result.call_id, result.call_id),
                                 "response": {"error" if result.is_error else "output": text}, **({"parts": media} if media else {})}}


def gemini_system_length(messages: Sequence[Message]) -> int:
    """How many messages lead as system prompt."""
    return next((at for at, message in enumerate(messages) if message.role not in ("system", "developer")), len(messages))


def gemini_contents(messages: Sequence[Message]) -> List[Json]:
    """The contents of a conversation. A late system prompt is a reminder in the user's turn (DESIGN 8)."""
    names = {block.id: block.name for message in messages for block in message.content if isinstance(block, ToolCall)}
    contents: List[Json] = []
    for message in messages[gemini_system_length(messages):]:
        parts: List[Json] = []
        for block in message.content:
            if message.role in ("system", "developer") and isinstance(block, Text):
                block = Text(gemini_reminder(block.text))
            part = gemini_wire_result(block, names) if isinstance(block, ToolResult) else gemini_part(block)
            if part is None:
                continue
            if isinstance(block, (Image, File)) and parts and "functionResponse" in parts[-1]:
                contents.append({"role": "user", "parts": parts})  # the user's own, not the result's
                parts = []
            parts.append(part)
        if parts:
            contents.append({"role": "model" if message.role == "assistant" else "user", "parts": parts})
    return contents


def gemini_reminder(text: str) -> str:
    """A system prompt as a user's words."""
    return text if not text or text.startswith("<system-reminder>") else f"<system-reminder>\n{text}\n</system-reminder>"


# ---- tools and options ------------------------------------------------------


def gemini_tools(given: Any) -> List[Tool]:
    """[{"functionDeclarations":[{"name","description","parameters"|"parametersJsonSchema"}]},{"googleSearch":{}}]"""
    if given is not None and not isinstance(given, (list, dict)):
        raise wrong_type("tools", "a list", given)
    tools: List[Tool] = []
    for tool in given if isinstance(given, list) else [given or {}]:
        for name, value in gemini_fields(tool).items():
            if name == "functionDeclarations":
                tools += [gemini_tool(gemini_fields(one)) for one in (value if isinstance(value, list) else [value]) if name_in(one, "name")]
            elif value is not None:
                tools.append(Tool(name, kind="server", extra=value if value and isinstance(value, dict) else None))
    return tools


def gemini_tool(declared: Json) -> Tool:
    """The tool of one declaration."""
    extra = {name: declared[name] for name in GEMINI_TOOL_EXTRA if declared.get(name) is not None}
    return Tool(declared["name"], text_or_none(declared.get("description")),
                gemini_given_schema(declared, "parameters", "parametersJsonSchema"), extra=extra or None)


def gemini_wire_tools(tools: Sequence[Tool]) -> List[Json]:
    """The tools of a request: one entry for the functions, one for each of Google's own."""
    declared: List[Json] = []
    for tool in tools:
        if tool.kind != "server":
            said = {"name": tool.name, "description": tool.description, "parametersJsonSchema": tool.schema}
            said.update((name, value) for name, value in (tool.extra or {}).items() if name in GEMINI_TOOL_EXTRA)
            declared.append({name: value for name, value in said.items() if value is not None})
    served = [{tool.name: tool.extra or {}} for tool in tools if tool.kind == "server" and tool.name in GEMINI_SERVER_TOOLS]
    return ([{"functionDeclarations": declared}] if declared else []) + served


def gemini_choice(given: Any) -> Tuple[Optional[ToolChoice], Optional[List[Any]]]:
    """(choice, names of the only functions left) of {"functionCallingConfig":{"mode","allowedFunctionNames"}}"""
    config = gemini_fields(gemini_fields(given).get("functionCallingConfig"))
    allowed = gemini_list(config.get("allowedFunctionNames"))
    mode = GEMINI_CHOICES.get(name_in(config, "mode").upper())
    if mode == "required" and len(allowed) == 1 and isinstance(allowed[0], str):
        return ToolChoice("tool", allowed[0]), None
    return ToolChoice(mode) if mode else None, allowed if allowed and mode in ("auto", "required") else None


def gemini_wire_choice(choice: ToolChoice) -> Json:
    """{"functionCallingConfig":{"mode","allowedFunctionNames"}}"""
    named = {"allowedFunctionNames": [choice.name]} if choice.mode == "tool" and choice.name else {}
    return {"functionCallingConfig": {"mode": GEMINI_MODES.get(choice.mode, "AUTO"), **named}}


def gemini_number(config: Json, name: str, whole: bool = False) -> Any:
    """The number under `name` of generationConfig, None when absent or null."""
    value = config.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
        raise wrong_type(f"generationConfig.{name}", "a number", value)
    return int(value) if whole and value is not None else value


def gemini_reasoning(given: Json) -> Optional[Reasoning]:
    """{"includeThoughts","thinkingBudget","thinkingLevel"}; a budget of -1 is the model's choice, 0 switches thinking off."""
    config = gemini_fields(given)
    visible, level = config.get("includeThoughts"), name_in(config, "thinkingLevel").lower()
    budget = gemini_number(config, "thinkingBudget", True)
    said = Reasoning(mode=None if budget is None else "on" if budget > 0 else "adaptive" if budget else "off",
                     effort=level if level in EFFORTS else None, budget=budget if budget and budget > 0 else None,
                     visible=visible if isinstance(visible, bool) else None)
    return None if said == Reasoning() else said


def gemini_wire_reasoning(reasoning: Reasoning) -> Json:
    """The wire form of what was said about thinking: a budget or a level, never both (Gemini 3 refuses the pair)."""
    config: Json = {} if reasoning.visible is None else {"includeThoughts": reasoning.visible}
    if reasoning.mode == "off" or reasoning.effort == "none":
        config["thinkingBudget"] = 0
    elif reasoning.budget is not None:
        config["thinkingBudget"] = reasoning.budget
    elif reasoning.effort is not None:
        config["thinkingLevel"] = GEMINI_LEVELS.get(reasoning.effort, reasoning.effort.upper())
    elif reasoning.mode is not None:
        config["thinkingBudget"] = -1
    return config


def gemini_output(config: Json) -> Optional[OutputFormat]:
    """{"responseMimeType":"application/json","responseSchema"|"responseJsonSchema"}; other types are no structure."""
    schema = gemini_given_schema(config, "responseSchema", "responseJsonSchema")
    media_type = config.get("responseMimeType")
    if media_type == "application/json" or media_type is None and schema is not None:
        return OutputFormat(schema)
    return None


def gemini_config(request: Request) -> Json:
    """The generationConfig of a request."""
    given = (request.extra or {}).get("generationConfig")
    config = {name: given[name] for name in GEMINI_CONFIG_PASSED if given.get(name) is not None} if isinstance(given, dict) else {}
    for field_name, name, _ in GEMINI_NUMBERS:
        if getattr(request, field_name) is not None:
            config[name] = getattr(request, field_name)
    if request.stop is not None:
        config["stopSequences"] = request.stop
    if request.logprobs is not None:
        config.update({"responseLogprobs": True, **({"logprobs": request.logprobs} if request.logprobs else {})})
    thinking = gemini_wire_reasoning(request.reasoning) if request.reasoning is not None else {}
    if thinking:
        config["thinkingConfig"] = thinking
    if request.output is not None:
        schema = {} if request.output.schema is None else {"responseJsonSchema": request.output.schema}
        config.update({"responseMimeType": "application/json", **schema})
    return config


def gemini_extra(fields: Json, config: Json) -> Optional[Json]:
    """What the hub has no word for, by its name; of generationConfig under its name."""
    extra = {name: value for name, value in fields.items() if name not in GEMINI_READ and value is not None}
    rest = {name: value for name, value in config.items() if name not in GEMINI_CONFIG_READ and value is not None}
    return {**extra, **({"generationConfig": rest} if rest else {})} or None


# ---- what an answer says besides --------------------------------------------


def gemini_usage(usage: Any) -> Optional[Usage]:
    """The hub's usage of `usageMetadata`, where thoughts stand beside the candidates, and tool results beside the prompt."""
    if not isinstance(usage, dict):
        return None
    usage = gemini_fields(usage)
    thoughts = count_or_zero(usage, "thoughtsTokenCount")
    return Usage(input=count_or_zero(usage, "promptTokenCount") + count_or_zero(usage, "toolUsePromptTokenCount"),
                 output=count_or_zero(usage, "candidatesTokenCount") + thoughts,
                 cache_read=count_or_zero(usage, "cachedContentTokenCount"), reasoning=thoughts)


def gemini_wire_usage(usage: Usage) -> Json:
    """{"promptTokenCount","cachedContentTokenCount","candidatesTokenCount","thoughtsTokenCount","totalTokenCount"}"""
    said = {"promptTokenCount": usage.input, "candidatesTokenCount": max(0, usage.output - usage.reasoning), "totalTokenCount": usage.total}
    some = {"cachedContentTokenCount": usage.cache_read, "thoughtsTokenCount": usage.reasoning}
    return {**said, **{name: count for name, count in some.items() if count}}


def gemini_citations(candidate: Json) -> List[Json]:
    """Flat citations, their places in bytes of the answer's text, of
    {"groundingMetadata":{"groundingChunks":[{"web":{"uri","title"}}],"groundingSupports":[{"segment":{"startIndex","endIndex"},
    "groundingChunkIndices":[0]}]},"citationMetadata":{"citations":[{"uri","title","startIndex","endIndex"}]}}"""
    grounds = gemini_fields(candidate.get("groundingMetadata"))
    chunks = [gemini_fields(chunk) for chunk in gemini_list(grounds.get("groundingChunks"))]
    found = []
    for support in map(gemini_fields, gemini_list(grounds.get("groundingSupports"))):
        for index in gemini_list(support.get("groundingChunkIndices")):
            if type(index) is int and 0 <= index < len(chunks):
                source = chunks[index].get("web") or chunks[index].get("retrievedContext")
                found.append((gemini_fields(support.get("segment")), gemini_fields(source)))
    sources = gemini_fields(candidate.get("citationMetadata"))
    found += [(source, source) for source in map(gemini_fields, gemini_list(sources.get("citations") or sources.get("citationSources")))]
    return [{"type": "url_citation", "url": name_in(source, "uri"), "title": name_in(source, "title"),
             "start_index": count_or_zero(place, "startIndex"), "end_index": count_or_zero(place, "endIndex")}
            for place, source in found if name_in(source, "uri")]


def gemini_placed(citations: Iterable[Json], text: str, before: int) -> List[Json]:
    """The citations that lie in a text with `before` bytes ahead of it, their places in its characters."""
    raw = text.encode("utf-8", "surrogatepass")
    return [{**note, "start_index": gemini_characters(raw, note["start_index"] - before),
             "end_index": gemini_characters(raw, note["end_index"] - before)}
            for note in citations if note["start_index"] < before + len(raw) and note["end_index"] > before]


def gemini_characters(raw: bytes, size: int) -> int:
    """How many characters of a text lie whole within its first `size` bytes; half an emoji counts as the one it is in Python."""
    size = max(0, min(size, len(raw)))
    while size < len(raw) and raw[size] & 0xC0 == 0x80:
        size -= 1
    return len(raw[:size].decode("utf-8", "surrogatepass"))


def gemini_grounding(citations: Iterable[Tuple[Json, str, int]]) -> Json:
    """groundingMetadata of citations, each with its text and the bytes ahead of that; one without a place is of the whole text."""
    chunks: List[Json] = []
    supports: List[Json] = []
    for note, text, before in citations:
        start, end = note.get("start_index"), note.get("end_index")
        if not (type(start) is int and type(end) is int and 0 <= start < end):
            start, end = 0, len(text)
        chunk = {"web": {"uri": note["url"], "title": name_in(note, "title")}}
        if chunk not in chunks:
            chunks.append(chunk)
        places = [before + len(text[:at].encode("utf-8", "surrogatepass")) for at in (start, end)]
        supports.append({"segment": {"startIndex": places[0], "endIndex": places[1], "text": text[start:end]},
                         "groundingChunkIndices": [chunks.index(chunk)]})
    return {"groundingChunks": chunks, "groundingSupports": supports}


def gemini_logprobs(result: Json) -> List[Json]:
    """OpenAI's list of tokens of {"chosenCandidates":[{"token","logProbability"}],"topCandidates":[{"candidates":[…]}]}"""
    tops = gemini_list(result.get("topCandidates"))
    return [{**gemini_token(chosen), "top_logprobs": [gemini_token(one) for one in gemini_list(gemini_fields(tops[at]).get("candidates"))]
             if at < len(tops) else []} for at, chosen in enumerate(gemini_list(result.get("chosenCandidates")))]


def gemini_token(given: Any) -> Json:
    """{"token","logprob","bytes"}"""
    token, logprob = name_in(given, "token"), gemini_fields(given).get("logProbability")
    return {"token": token, "logprob": logprob if isinstance(logprob, (int, float)) else 0.0, "bytes": list(token.encode("utf-8", "replace"))}


def gemini_wire_logprobs(tokens: Iterable[Any]) -> Json:
    """logprobsResult of OpenAI's list."""
    def wire(items: Iterable[Any]) -> List[Json]:
        return [{"token": name_in(item, "token"), "logProbability": item.get("logprob")} for item in items if isinstance(item, dict)]
    tokens = [item for item in tokens if isinstance(item, dict)]
    return {"topCandidates": [{"candidates": wire(gemini_list(item.get("top_logprobs")))} for item in tokens], "chosenCandidates": wire(tokens)}


def gemini_failure(error: Json) -> Failure:
    """The failure of {"code","message","status"}."""
    word, code = name_in(error, "status"), error.get("code")
    if type(code) is not int or not 400 <= code <= 599:
        code = GEMINI_CODES.get(word, 502)
    told = {"message": text_or_none(error.get("message")) or word or "upstream sent an error without a text", "code": word or None}
    return framed_failure(code, {}, dump_json({"error": told}))


def gemini_error(error: ProxyError) -> Json:
    """{"error":{"code","message","status","type","details":[{"@type","retryDelay":"2s"}]}}. Gemini CLI ignores `retry-after`; it
    waits as the text or RetryInfo says, and gives up on a violated quota per day (clients.md)."""
    failure, told = getattr(error, "failure", None), openai_error(error)["error"]
    code, message = error.status, told["message"]
    if failure is not None and failure.kind == "overflow":
        code = 400
        if failure.overflow is not None:
            message = "The input token count ({}) exceeds the maximum number of tokens allowed ({}).".format(*failure.overflow)
    details: List[Json] = []
    if told["type"] == "insufficient_quota":
        details.append({"@type": RPC + "QuotaFailure", "violations": [{"description": message, "quotaId": "CopilotQuotaPerDay"}]})
    wait = failure.wait_s if failure is not None else seconds_of(error.headers.get("retry-after"))
    if wait is not None:
        delay = f"{max(1, math.ceil(wait))}s"
        details.append({"@type": RPC + "RetryInfo", "retryDelay": delay})
        message = message if "retry in " in message else f"{message.rstrip('.')}. Please retry in {delay}."
    status = GEMINI_STATUS.get(code, "INVALID_ARGUMENT" if code < 500 else "INTERNAL")
    return {"error": {"code": code, "message": message, "status": status, "type": told["type"], **({"details": details} if details else {})}}


# ---- reading a stream -------------------------------------------------------


class GeminiReader:
    """Reads one answer: objects in, the hub's events out. One block is open at a time.

    The end waits for the end of the input, because usage may follow `finishReason`. Citations and logprobs are the whole
    answer's: they go to the text that ends it.
    """

    def __init__(self) -> None:
        self.ended = False
        self._events: List[Event] = []
        self._started = False
        self._calls = GeminiCalls()
        self._called = False
        self._index = -1
        self._block: Optional[Block] = None  # the open text or thought
        self._texts: List[str] = []
        self._seal: Optional[str] = None
        self._before = 0  # bytes of the texts that have ended
        self._reason: Optional[str] = None
        self._usage: Any = None
        self._citations: List[Json] = []
        self._logprobs: List[Json] = []

    def read(self, frames: Iterable[Frame]) -> List[Event]:
        """The events of one batch of frames."""
        self._events = []
        for frame in frames:
            chunk = load_object(frame.data)
            if chunk is not None and not self.ended:
                self.take(chunk)
        return self._events

    def take(self, chunk: Json) -> List[Event]:
        """The events so far, those of one more object among them."""
        if isinstance(chunk.get("error"), dict):
            self.ended = True
            self._events.append(Fault(gemini_failure(chunk["error"])))
            return self._events
        used = chunk.get("usageMetadata") or chunk.get("usage_metadata") or self._usage
        news, self._usage = used != self._usage and self._started, used
        if not self._started:
            self._start(gemini_fields(chunk))
        candidates = chunk.get("candidates")
        for candidate in candidates if type(candidates) is list else ():
            if type(candidate) is dict and not candidate.get("index"):
                self._candidate(candidate)
        if not candidates:
            self._events.append(Pulse())
            if gemini_fields(gemini_fields(chunk).get("promptFeedback")).get("blockReason"):
                self._reason = "SAFETY"
        used = gemini_usage(self._usage) if news else None
        if used is not None:
            self._events.append(Used(used))
        return self._events

    def end(self, reason: Optional[str] = None) -> List[Event]:
        """The end, if the answer said why it ended (or `reason` says it)."""
        self._events = []
        reason = self._reason or reason
        if reason is not None and not self.ended:
            self.ended = True
            self._close(last=True)
            word = stop_meaning(GEMINI, reason)
            self._events.append(ReplyStop("tool" if word == "end" and self._called else word, gemini_usage(self._usage)))
        return self._events

    def _start(self, chunk: Json) -> None:
        self._started = True
        seed = text_or_none(chunk.get("responseId")) or ""
        self._calls = GeminiCalls(seed)
        self._events.append(ReplyStart(seed, text_or_none(chunk.get("modelVersion")) or "", 0, gemini_usage(self._usage)))

    def _candidate(self, candidate: Json) -> None:
        content = candidate.get("content")
        parts = content.get("parts") if type(content) is dict else None
        for part in parts if type(parts) is list else ():
            if type(part) is dict and part:
                self._part(part)
        if len(candidate) > 2 or "index" not in candidate:  # more than its content
            candidate = gemini_fields(candidate)
            self._reason = text_or_none(candidate.get("finishReason")) or self._reason
            self._citations = gemini_citations(candidate) or self._citations
            self._logprobs += gemini_logprobs(gemini_fields(candidate.get("logprobsResult")))

    def _part(self, part: Json) -> None:
        text = part.get("text")
        if len(part) == 1 and type(text) is str and type(self._block) is Text:
            if text:
                self._texts.append(text)
                self._events.append(BlockDelta(self._index, text))
            return
        part = gemini_fields(part)
        if "functionResponse" in part:  # nothing a model says
            return
        block = gemini_block(part, self._calls)
        if isinstance(block, Thinking):
            return self._say(block, block.text, block.signature)
        if isinstance(block, Text):
            return self._say(block, block.text, block.seal)
        self._close()
        self._called = self._called or isinstance(block, ToolCall)
        self._index += 1
        if isinstance(block, ToolCall):
            self._events += [BlockStart(self._index, opening(block)), BlockDelta(self._index, block.arguments), BlockStop(self._index)]
        else:
            self._events += [BlockStart(self._index, block), BlockStop(self._index)]

    def _say(self, block: Block, text: str, seal: Optional[str]) -> None:
        """More of a text or thought, or another one."""
        if not text and seal is None:
            return
        if not gemini_joins(self._block, self._seal is not None, type(block), seal):
            self._close()
            self._index += 1
            self._block = type(block)("")
            self._events.append(BlockStart(self._index, self._block))
        if text:
            self._texts.append(text)
            self._events.append(BlockDelta(self._index, text))
        self._seal = self._seal if seal is None else seal

    def _close(self, last: bool = False) -> None:
        block, text = self._block, "".join(self._texts)
        if block is None:
            return
        final = None if self._seal is None else Text("", seal=self._seal) if isinstance(block, Text) else Thinking("", self._seal)
        if isinstance(block, Text):
            citations = gemini_placed(self._citations, text, self._before) if last else []
            if last and (citations or self._logprobs):
                final = Text("", citations or None, seal=self._seal, extra={"logprobs": self._logprobs} if self._logprobs else None)
            self._before += len(text.encode("utf-8", "surrogatepass"))
        self._events.append(BlockStop(self._index, final))
        self._block, self._texts, self._seal = None, [], None


# ---- writing a stream -------------------------------------------------------

# The part of the last object. Google's has it, and the chats of google-genai forget a turn with an object without parts
# (observed 2026-11-25 on 3.6.1: test_chats_keep_a_streamed_turn).
GEMINI_LAST: Json = {"text": ""}
GEMINI_HEAD = '{"candidates":[{"content":{"role":"model","parts":['


def gemini_uncut(events: Sequence[Event]) -> Sequence[Event]:
    """Without the stops a Fault forced: a call that is not whole must not be sent, the client would run it."""
    if not events or type(events[-1]) is not Fault:
        return events
    last = len(events) - 1
    while last and type(events[last - 1]) is BlockStop:
        last -= 1
    return [*events[:last], events[-1]]


class GeminiWriter:
    """Writes one answer: sequenced events in, frames out, each a whole object. Texts and visible thoughts leave piece by
    piece, everything else as one part; a thought's signature waits for the next part that has room."""

    def __init__(self, asked: Optional[Request]) -> None:
        self._shown = asked is None or asked.reasoning is not None and bool(asked.reasoning.visible)
        self._named: Json = {"modelVersion": asked.model if asked else ""}
        self._tail = ""  # of every object but the last, behind its parts
        self._frames: List[Frame] = []
        self._block: Any = None
        self._texts: List[str] = []
        self._head: Optional[str] = None  # of the open block's deltas; None: it leaves whole, or not at all
        self._seal: Optional[str] = None  # for the first delta
        self._waiting: Optional[str] = None
        self._said = 0  # bytes of text so far
        self._citations: List[Tuple[Json, str, int]] = []
        self._logprobs: List[Any] = []
        self._usage: Optional[Usage] = None

    def write(self, events: Sequence[Event]) -> List[Frame]:
        """The frames of one list of events."""
        self._frames = []
        for event in events:
            self._actions[type(event)](self, event)
        return self._frames

    def _start(self, event: ReplyStart) -> None:
        named = {"modelVersion": event.model or self._named["modelVersion"], "responseId": event.id}
        self._named = {name: value for name, value in named.items() if value}
        rest = dump_json(self._named, True).decode()[1:]
        self._tail = f']}},"index":0}}]{"," if self._named else ""}{rest}'
        self._usage = event.usage

    def _stop(self, event: ReplyStop) -> None:
        last = GEMINI_LAST if self._waiting is None else {"text": "", "thought": True, "thoughtSignature": self._waiting}
        candidate: Json = {"content": {"role": "model", "parts": [last]}, "finishReason": stop_word(GEMINI, event.reason), "index": 0}
        if self._citations:
            candidate["groundingMetadata"] = gemini_grounding(self._citations)
        if self._logprobs:
            candidate["logprobsResult"] = gemini_wire_logprobs(self._logprobs)
        usage = event.usage or self._usage
        used = {} if usage is None else {"usageMetadata": gemini_wire_usage(usage)}
        self._frames.append(Frame(None, dump_json({"candidates": [candidate], **used, **self._named}, True).decode()))

    def _fault(self, event: Fault) -> None:
        self._frames.append(Frame(None, dump_json(gemini_error(UpstreamError(event.failure)), True).decode()))

    def _send(self, part: Json) -> None:
        self._frames.append(Frame(None, f"{GEMINI_HEAD}{dump_json(part, True).decode()}{self._tail}"))

    def _signature(self, own: Optional[str]) -> Optional[str]:
        """The signature of the next part: its own, else the one that waits."""
        if own is not None:
            self._release()
        waiting, self._waiting = self._waiting, None
        return waiting if own is None else own

    def _release(self) -> None:
        """The waiting signature on a part of its own: the next one has no room."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._send({"text": "", "thought": True, "thoughtSignature": waiting})

    def _block_start(self, event: BlockStart) -> None:
        block = self._block = event.block
        self._texts, self._head, self._seal = [], None, None
        if isinstance(block, (Text, Refusal)):
            self._head, self._seal = GEMINI_HEAD + '{"text":', self._signature(block.seal)
        elif isinstance(block, (Thinking, Compaction)):
            self._release()
            self._head = GEMINI_HEAD + '{"thought":true,"text":' if self._shown else None

    def _delta(self, event: BlockDelta) -> None:
        text = event.text
        self._texts.append(text)
        if self._seal is not None:
            self._send({"text": text, "thoughtSignature": self._seal})
            self._seal = None
        elif self._head is not None:
            self._frames.append(Frame(None, f"{self._head}{encode_basestring_ascii(text)}}}{self._tail}"))

    def _block_stop(self, event: BlockStop) -> None:
        block = finished(self._block, "".join(self._texts), event.block)
        text = main_text(block)
        if text and not self._texts:
            self._delta(BlockDelta(event.index, text))
        if isinstance(block, (Text, Refusal)):
            self._text_stop(block)
        elif isinstance(block, (Thinking, Compaction)):
            self._waiting = block.sealed if isinstance(block, Compaction) else block.redacted if block.signature is None else block.signature
        else:
            part = gemini_part(block)
            if part is not None:
                seal = self._signature(block.seal)
                self._send(part if seal is None else {**part, "thoughtSignature": seal})

    def _text_stop(self, block: Union[Text, Refusal]) -> None:
        """The end of a text, where a seal of its own may come to light; one that waited goes on waiting if no text came."""
        if self._block.seal is not None or self._texts:
            late = self._seal if self._block.seal is not None else block.seal
            if late is not None:
                self._send({"text": "", "thoughtSignature": late})
        elif block.seal is not None:
            self._waiting = self._seal
            self._send({"text": "", "thoughtSignature": self._signature(block.seal)})
        else:
            self._waiting = self._seal
        self._seal = None
        if isinstance(block, Text):
            self._citations += [(note, block.text, self._said) for note in block.citations or () if name_in(note, "url")]
            self._logprobs += gemini_list((block.extra or {}).get("logprobs"))
        self._said += len(block.text.encode("utf-8", "surrogatepass"))

    _actions: Dict[Any, Callable[[Any, Any], None]] = {  # of the class: an object that held its own methods would be a ring
        ReplyStart: _start, BlockStart: _block_start, BlockDelta: _delta, BlockStop: _block_stop,
        ReplyStop: _stop, Fault: _fault, Pulse: lambda self, event: None, Used: lambda self, event: None}


class GeminiCodec(Codec):
    """Gemini; the first candidate only. What a body names twice, plain JSON Schema beside OpenAPI's, the plain one is taken."""

    name = GEMINI
    keep_alive = b"\n"  # a comment breaks Google's SDKs and Gemini CLI (clients.md); in a JSON array it is white space

    def decode_request(self, body: Json) -> Request:
        """The Request of a body, `model` and `stream` from where the gateway put them."""
        fields = gemini_fields(body)
        model = fields.get("model")
        if model is not None and not isinstance(model, str):
            raise wrong_type("model", "a string", model)
        config = {} if fields.get("generationConfig") is None else gemini_fields(want_object(fields["generationConfig"], "generationConfig"))
        system = [Text(part["text"]) for part in gemini_parts(fields.get("systemInstruction"), "systemInstruction") if name_in(part, "text")]
        numbers = {field_name: gemini_number(config, name, whole) for field_name, name, whole in GEMINI_NUMBERS}
        choice, allowed = gemini_choice(fields.get("toolConfig"))
        logprobs = gemini_number(config, "logprobs", True)
        return Request(
            model=(model or "")[len("models/") if (model or "").startswith("models/") else 0:],
            messages=canonical([Message("system", list(system)), *gemini_messages(fields.get("contents"))]),
            tools=[tool for tool in gemini_tools(fields.get("tools")) if allowed is None or tool.kind == "server" or tool.name in allowed],
            tool_choice=choice, stream=want_flag(fields, "stream"),
            stop=None if config.get("stopSequences") is None else [word for word in want_list(config, "stopSequences") if isinstance(word, str)],
            logprobs=0 if logprobs is None and config.get("responseLogprobs") is True else logprobs,
            reasoning=gemini_reasoning(config.get("thinkingConfig") or {}), output=gemini_output(config),
            extra=gemini_extra(fields, config), **numbers)

    def encode_request(self, request: Request) -> Json:
        """The body of a request, with `model` and `stream` for the path."""
        extra, tools, config = request.extra or {}, gemini_wire_tools(request.tools), gemini_config(request)
        system = [{"text": block.text} for message in request.messages[:gemini_system_length(request.messages)]
                  for block in message.content if isinstance(block, Text)]
        said: Json = {name: extra[name] for name, kind in GEMINI_PASSED if isinstance(extra.get(name), kind)}
        if system:
            said["systemInstruction"] = {"parts": system}
        if tools:
            said["tools"] = tools
        if request.tool_choice is not None and tools and "functionDeclarations" in tools[0]:
            said["toolConfig"] = gemini_wire_choice(request.tool_choice)
        if config:
            said["generationConfig"] = config
        return {"model": request.model, "stream": request.stream, "contents": gemini_contents(request.messages), **said}

    def decode_reply(self, body: Json) -> Reply:
        """The whole answer, read as a stream of one object; raises UpstreamError for one that failed."""
        reader = GeminiReader()
        return collect([reader.take(body), reader.end("STOP")])

    def encode_reply(self, reply: Reply, asked: Optional[Request] = None) -> Json:
        """The answer as one object: the last of its stream with the parts of all."""
        objects = [load_object(frame.data) or {} for frame in GeminiWriter(asked).write(replay(reply))]
        parts = [part for body in objects for part in body["candidates"][0]["content"]["parts"]]
        objects[-1]["candidates"][0]["content"]["parts"] = [part for part in parts if part != GEMINI_LAST] or [GEMINI_LAST]
        return objects[-1]

    def decode_stream(self, batches: Iterable[List[Frame]]) -> Iterator[List[Event]]:
        reader = GeminiReader()
        for frames in batches:
            yield reader.read(frames)
        rest = reader.end()
        if rest:
            yield rest

    def encode_stream(self, batches: Iterable[List[Event]], asked: Optional[Request] = None) -> Iterator[List[Frame]]:
        """The frames of a stream; thoughts only if they were `asked` for. An array of the same objects is the other form."""
        writer = GeminiWriter(asked)
        for events in sequence(map(gemini_uncut, batches)):
            yield writer.write(events)

    def encode_error(self, error: ProxyError) -> Json:
        return gemini_error(error)

    def decode_usage(self, body: Json) -> Optional[Usage]:
        return gemini_usage(gemini_fields(body).get("usageMetadata"))

    def stop_reason(self, body: Json) -> Optional[str]:
        candidates = gemini_list(body.get("candidates"))
        return text_or_none(gemini_fields(candidates[0]).get("finishReason")) if candidates else None


# ---- the other verbs --------------------------------------------------------


def gemini_countable(body: Json) -> Json:
    """The generateContent body inside a countTokens body: {"contents":[…]} or {"generateContentRequest":{…}}"""
    inner = gemini_fields(body).get("generateContentRequest")
    return body if inner is None else want_object(inner, "generateContentRequest")


def gemini_model_entry(model: str, label: Optional[str] = None, version: Optional[str] = None, description: Optional[str] = None,
                       input_limit: Optional[int] = None, output_limit: Optional[int] = None, embeds: bool = False,
                       thinks: bool = False) -> Json:
    """{"name":"models/ID","version","displayName","description","inputTokenLimit","outputTokenLimit","supportedGenerationMethods":[…]}"""
    verbs = ["embedContent", "batchEmbedContents"] if embeds else ["generateContent", "streamGenerateContent", "countTokens"]
    limits = {"inputTokenLimit": input_limit, "outputTokenLimit": output_limit}
    return {"name": f"models/{model}", "baseModelId": model, "version": version or model, "displayName": label or model,
            "description": description or label or model, **{name: limit for name, limit in limits.items() if limit is not None},
            "supportedGenerationMethods": verbs, **({"thinking": True} if thinks else {})}


def gemini_embedding_request(body: Json, verb: str) -> Tuple[List[str], Optional[int]]:
    """(texts, dimensions) of {"content":{"parts":[{"text"}]},"outputDimensionality"} or, for
    batchEmbedContents, {"requests":[{"content",…}]}"""
    batch = verb == "batchEmbedContents"
    requests = want_list(gemini_fields(body), "requests") if batch else [body]
    texts: List[str] = []
    dimensions: Optional[int] = None
    for at, request in enumerate(requests):
        path = f"requests.{at}.content" if batch else "content"
        fields = gemini_fields(want_object(request, path))
        words = [name_in(part, "text") for part in gemini_parts(fields.get("content"), path)]
        if not any(words) or not all(words):
            raise ClientError(f"{path}: only text can be embedded, and there must be some", param=path)
        texts.append("\n".join(words))
        config = gemini_fields(fields.get("embedContentConfig"))
        dimensions = dimensions or want_count(fields, "outputDimensionality") or want_count(config, "outputDimensionality")
    if not texts:
        raise ClientError("requests: at least one is required", param="requests")
    return texts, dimensions


def gemini_embedding_answer(vectors: Sequence[Sequence[float]], verb: str) -> Json:
    """{"embedding":{"values":[…]}} or, for batchEmbedContents, {"embeddings":[{"values":[…]}]}"""
    if verb == "batchEmbedContents":
        return {"embeddings": [{"values": list(vector)} for vector in vectors]}
    return {"embedding": {"values": list(vectors[0]) if vectors else []}}


###############################################################################
#                                   Quirks                                    #
###############################################################################
# One row per named deviation of an upstream, applied to the wire body on every
# road. A clean body or frame is never touched.


class FrameEdit:
    """One edit over one relayed stream; it may remember what it has seen.

        touches(frames) -> bool     whether some of these whole frames may need it: a few searches, no parsing
        edit(frame) -> bytes        one frame of such a read: the frame to relay, b"" to swallow it
        edit_all(frames) -> bytes   all of them without taking them apart, None where it cannot

    `inside`: it may look into a frame's delta. An edit of what stands around the delta says False; it comes behind the
    others and makes the same of the same bytes: what it made of one frame is done to all of that form without asking it.
    """

    inside = True

    def touches(self, frames: bytes) -> bool:
        raise NotImplementedError

    def edit(self, frame: bytes) -> bytes:
        raise NotImplementedError

    def edit_all(self, frames: bytes) -> Optional[bytes]:
        return None


@dataclass(eq=False, repr=False)
class Quirk(Value):
    """One deviation, with its source.

    `request(body, plan)` edits the body in place and says whether it did; where the history shows none of the `signs`
    (see `history_signs`) it is not asked (none: always; so it must not walk a history). `frames(plan)` makes
    the edit of one relayed stream, `whole(body, plan)` edits a relayed whole answer in place and says whether it did;
    beside a request edit they undo its consequence, so they run only where it was made. `applies(plan)` decides once
    per request.
    """

    name: str
    provider: str
    dialects: Tuple[str, ...]
    source: str
    request: Optional[Callable[[Json, Plan], bool]] = None
    frames: Optional[Callable[[Plan], FrameEdit]] = None
    whole: Optional[Callable[[Json, Plan], bool]] = None
    signs: FrozenSet[str] = frozenset()
    applies: Optional[Callable[[Plan], bool]] = None  # none: always


# ---- fields -----------------------------------------------------------------


def drop_service_tier(body: Json, plan: Plan) -> bool:
    """Copilot refuses the field in every dialect."""
    return body.pop("service_tier", plan) is not plan


def force_store_false(body: Json, plan: Plan) -> bool:
    """Copilot stores nothing: `store: true`, OpenAI's default, is answered 400."""
    if body.get("store") is False:
        return False
    body["store"] = False
    return True


def ask_for_usage(body: Json, plan: Plan) -> bool:
    """GPT reports usage in streams only when asked; what the client did not ask for is swallowed again."""
    options = body.get("stream_options")
    options = options if isinstance(options, dict) else {}
    if options.get("include_usage") is True:
        return False
    body["stream_options"] = {**options, "include_usage": True}
    return True


def ask_for_stream(body: Json, plan: Plan) -> bool:
    """A whole answer longer than upstream gives in one piece is asked for as a stream; what comes is put together here."""
    asked = [body[name] for name in OUTPUT_LIMITS if type(body.get(name)) in (int, float)]
    if body.get("stream") is True or max(asked, default=0) <= (model_limit(plan.record or {}, "max_non_streaming_output_tokens") or 0):
        return False
    body["stream"] = plan.assembled = True
    if plan.upstream_dialect == CHAT:
        ask_for_usage(body, plan)
    return True


def renamed_field(body: Json, old: str, new: str) -> bool:
    """Gives a field its other name, in its place; where both are there the new one stays."""
    if old not in body:
        return False
    fields = [(new if name == old else name, value) for name, value in body.items() if name != old or new not in body]
    body.clear()
    body.update(fields)
    return True


@lru_cache(maxsize=64)
def wants_completion_limit(model: str) -> bool:
    """Whether Chat calls the output limit `max_completion_tokens`: GPT from 5 on and the o-series."""
    name = model.lower()
    return name.startswith("gpt") and model_version(name, "gpt") >= (5, 0) or re.match(r"o\d", name) is not None


def name_output_limit(body: Json, plan: Plan) -> bool:
    """GPT-5 refuses `max_tokens`; the others know no other name."""
    names = ("max_tokens", "max_completion_tokens")
    return renamed_field(body, *(names if wants_completion_limit(plan.model) else names[::-1]))


LEAST_OUTPUT = 16  # tokens; Responses refuses less


def raise_output_limit(body: Json, plan: Plan) -> bool:
    """A probe for one token still gets its answer."""
    limit = body.get("max_output_tokens")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit >= LEAST_OUTPUT:
        return False
    body["max_output_tokens"] = LEAST_OUTPUT
    return True


BILLING_LINE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")


def drop_billing_line(body: Json, plan: Plan) -> bool:
    """Takes Claude Code's attribution off the system prompt: its end changes, and the cached prefix with it (user-pains P11)."""
    holders = [body, *[turn for turn in turns_of(body) if turn.get("role") in ("system", "developer")]]
    changed = False
    for holder in holders:
        for name in [name for name in ("system", "instructions", "content") if name in holder]:
            for place, key in [(holder, name), *[(block, "text") for block in objects_in(holder[name])]]:
                text = place.get(key)
                if isinstance(text, str) and BILLING_LINE.match(text):
                    place[key], changed = BILLING_LINE.sub("", text), True
    if changed:
        for holder, name in ((holder, name) for holder in holders for name in ("system", "content")):
            if isinstance(holder.get(name), list):
                holder[name] = [block for block in holder[name] if not (isinstance(block, dict) and block.get("text") == "")]
    return changed


def drop_body_betas(body: Json, plan: Plan) -> bool:
    """Betas are a header; as fields they are refused."""
    return any([body.pop(name, plan) is not plan for name in ("betas", "anthropic_beta")])


def name_tool_choice(body: Json, plan: Plan) -> bool:
    """Gemini knows `auto`, `required` and `none` only: a tool that is named becomes the one that may be called."""
    choice = body.get("tool_choice")
    if not isinstance(choice, dict):
        return False
    name = wire_object(choice, "function").get("name")
    named = [tool for tool in objects_in(body.get("tools")) if name and wire_object(tool, "function").get("name") == name]
    body.update({"tool_choice": "required"}, **({"tools": named} if named else {}))
    return True


# ---- histories --------------------------------------------------------------
# What a conversation may have been through: a client that died in mid-call, a compaction that cut a pair, a turn
# that was stopped. Each row mends what upstream would refuse at this and every later turn.


def turns_of(body: Json) -> List[Json]:
    """The messages or input items of a body that are objects."""
    return objects_in(body.get("messages")) or objects_in(body.get("input"))


def wire_blocks(turn: Json) -> List[Json]:
    """The content blocks of a turn that are objects; none where the content is a text."""
    return objects_in(turn.get("content"))


def wire_object(value: Any, name: str) -> Json:
    """An object inside a wire object; an empty one where there is none."""
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def wire_text(content: Any) -> str:
    """The text of a content in any dialect: a string, or parts with a `text`."""
    if isinstance(content, str):
        return content
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return "\n".join(part for part in parts if isinstance(part, str))


def is_blank(block: Any) -> bool:
    """Whether a text block says nothing: Claude refuses it."""
    return isinstance(block, dict) and block.get("type") == "text" and not str(block.get("text") or "").strip()


def drop_blank_texts(body: Json, plan: Plan) -> bool:
    """Takes out text blocks without a text, and turns that hold nothing else; a body of nothing else stays."""
    turns = objects_in(body.get("messages"))
    dropped = [_drop_blanks(turn) for turn in turns]
    kept = [turn for turn in turns if not _is_empty(turn, plan)]
    if kept and len(kept) < len(turns):
        body["messages"] = kept
        dropped.append(True)
    system = body.get("system")
    if isinstance(system, str) and not system.strip() or isinstance(system, list) and any(map(is_blank, system)):
        left = [block for block in system if not is_blank(block)] if isinstance(system, list) else []
        body.update(system=left)
        if not left:
            del body["system"]
        dropped.append(True)
    return any(dropped)


def _drop_blanks(turn: Json) -> bool:
    blocks = wire_blocks(turn)
    inner = [_drop_blanks(block) for block in blocks if block.get("type") == "tool_result"]
    if not any(map(is_blank, blocks)):
        return any(inner)
    kept = [block for block in turn["content"] if not is_blank(block)]
    marks = [block["cache_control"] for block in blocks if is_blank(block) and block.get("cache_control")]
    places = [block for block in objects_in(kept) if block.get("type") in MARKABLE]
    if marks and places:
        places[-1].setdefault("cache_control", marks[-1])
    turn["content"] = kept
    return True


def _is_empty(turn: Json, plan: Plan) -> bool:
    """Whether a turn says and calls nothing. GPT takes empty texts: they stay."""
    if turn.get("role") not in ("user", "assistant") or turn.get("tool_calls") or turn.get("function_call"):
        return False
    content = turn.get("content")
    if content == [] or content is None and plan.upstream_dialect == CHAT:
        return True
    return isinstance(content, str) and not content.strip() and (plan.upstream_dialect == MESSAGES or is_claude(plan))


def is_claude(plan: Plan) -> bool:
    """Whether the model is one of Anthropic's."""
    return "claude" in plan.model.lower()


# A conversation as a row of entries (calls made, the call answered, the wire value), whatever the dialect: a user
# message of Messages is cut into its results and the rest.
Paired = Tuple[Sequence[str], Optional[str], Json]
NO_RESULT = "No result of this call was recorded."
LONE_RESULT = "[Result of a tool call that is no longer part of this conversation]\n"


def chat_entries(turns: Sequence[Json]) -> Iterator[Paired]:
    for turn in turns:
        calls = objects_in(turn.get("tool_calls")) if turn.get("role") == "assistant" else ()
        answered = str(turn.get("tool_call_id")) if turn.get("role") == "tool" else None
        yield [str(call.get("id")) for call in calls], answered, turn


def response_entries(items: Sequence[Json]) -> Iterator[Paired]:
    for item in items:
        kind, call = str(item.get("type")), str(item.get("call_id") or "")
        yield ([call] if call and kind.endswith("_call") else ()), (call if call and kind.endswith("_output") else None), item


def message_entries(turns: Sequence[Json]) -> Iterator[Paired]:
    """A user message with results is cut into them and what stands between."""
    for turn in turns:
        blocks = wire_blocks(turn)
        if turn.get("role") == "assistant" or not any(block.get("type") == "tool_result" for block in blocks):
            yield [str(block.get("id")) for block in blocks if block.get("type") == "tool_use"], None, turn
            continue
        rest: List[Json] = []
        for block in blocks:
            if block.get("type") != "tool_result":
                rest.append(block)
                continue
            if rest:
                yield (), None, {"role": "user", "content": rest}
                rest = []
            yield (), str(block.get("tool_use_id")), block
        if rest:
            yield (), None, {"role": "user", "content": rest}


def joined_messages(values: Sequence[Json]) -> List[Json]:
    """The wire messages again: results that stand together, and what the user says behind them, are one message."""
    turns: List[Json] = []
    open_turn: Optional[Json] = None  # a user message made here
    for value in values:
        is_result = value.get("type") == "tool_result"
        if open_turn is not None and (is_result or value.get("role") == "user"):
            content = value.get("content")
            open_turn["content"] += [value] if is_result else content if isinstance(content, list) else [{"type": "text", "text": content}]
            continue
        open_turn = {"role": "user", "content": [value]} if is_result else None
        turns.append(open_turn or value)
    return turns


def response_stub(item: Json, call: str) -> Json:
    """The missing output of a call item; a search found nothing."""
    if item["type"] == "tool_search_call":
        return {"type": "tool_search_output", "execution": "client", "call_id": call, "status": "completed", "tools": []}
    return {"type": f"{item['type']}_output", "call_id": call, "output": NO_RESULT}


class Pairing(NamedTuple):
    """How a dialect pairs calls and results. `adjacent`: a result must follow its call at once."""

    field: str
    adjacent: bool
    entries: Callable[[Sequence[Json]], Iterator[Paired]]
    stub: Callable[[Json, str], Json]  # (who calls, call id) -> the result that is missing
    told: Callable[[Json], Json]  # a result nobody asked for, as words of the user
    joined: Callable[[Sequence[Json]], Sequence[Json]] = list


PAIRINGS = {
    CHAT: Pairing("messages", True, chat_entries,
                  lambda turn, call: {"role": "tool", "tool_call_id": call, "content": NO_RESULT},
                  lambda turn: {"role": "user", "content": LONE_RESULT + wire_text(turn.get("content"))}),
    MESSAGES: Pairing("messages", True, message_entries,
                      lambda turn, call: {"type": "tool_result", "tool_use_id": call, "content": NO_RESULT, "is_error": True},
                      lambda block: {"role": "user", "content": [{"type": "text", "text": LONE_RESULT + wire_text(block.get("content"))}]},
                      joined_messages),
    RESPONSES: Pairing("input", False, response_entries,
                       response_stub,
                       lambda item: {"type": "message", "role": "user",
                                     "content": [{"type": "input_text", "text": LONE_RESULT + wire_text(item.get("output"))}]}),
}


def is_paired(entries: Iterable[Paired], adjacent: bool) -> bool:
    """Whether every call has one result behind it and every result its call."""
    waiting: Set[str] = set()
    for calls, answered, _ in entries:
        if answered is not None:
            if answered not in waiting:
                return False
            waiting.remove(answered)
        elif calls or adjacent:
            if waiting and (adjacent or not waiting.isdisjoint(calls)) or len(set(calls)) < len(calls):
                return False
            waiting.update(calls)
    return not waiting


def pair_calls(body: Json, plan: Plan) -> bool:
    """Puts every result behind its call: a call without one gets a note, a result without a call is told as text, a
    second result of one call goes (copilot-upstream 9.3)."""
    way = PAIRINGS[plan.upstream_dialect]
    entries = list(way.entries(objects_in(body.get(way.field))))
    if is_paired(entries, way.adjacent):
        return False
    results: Dict[str, List[int]] = {}
    for at, (_, answered, _) in enumerate(entries):
        if answered is not None:
            results.setdefault(answered, []).append(at)
    values: List[Json] = []
    asked: Set[str] = set()
    kept: Set[int] = set()  # places of results that have their call
    for at, (calls, answered, value) in enumerate(entries):
        if answered is not None:
            if at in kept and not way.adjacent:
                values.append(value)
            elif at not in kept and answered not in asked:
                values.append(way.told(value))
            continue
        values.append(value)
        for call in dict.fromkeys(calls):
            later = next((place for place in results.get(call, ()) if place > at and place not in kept), None)
            if later is None:
                values.append(way.stub(value, call))
                continue
            kept.add(later)
            results[call] = results[call][results[call].index(later) + 1:]
            values += [entries[later][2]] if way.adjacent else []
        asked.update(calls)
    body[way.field] = way.joined(values)
    return True


def mend_arguments(body: Json, plan: Plan) -> bool:
    """Arguments upstream cannot read become an object that holds them as they are."""
    mended = False
    for turn in turns_of(body):
        for call in objects_in(turn.get("tool_calls")):
            function = call.get("function")
            if isinstance(function, dict) and load_object(str(function.get("arguments") or "")) is None:
                function["arguments"] = dump_json(messages_input(spoken(function.get("arguments")))).decode()
                mended = True
        for block in wire_blocks(turn):
            if block.get("type") == "tool_use" and not isinstance(block.get("input"), dict):
                block["input"] = messages_input(spoken(block.get("input")))
                mended = True
    return mended


def spoken(arguments: Any) -> str:
    """Arguments as the text they were meant to be."""
    return arguments if isinstance(arguments, str) else "" if arguments is None else dump_json(arguments).decode()


ODD_ID, PLAIN_ID = re.compile(r"[^a-zA-Z0-9_-]"), re.compile(r"[a-zA-Z0-9_-]+\Z")


def spell_tool_ids(body: Json, plan: Plan) -> bool:
    """Ids of calls made elsewhere, in the letters Messages allows; each keeps one spelling of its own."""
    places = [(block, name) for turn in turns_of(body) for block in wire_blocks(turn)
              for name in (TOOL_ID_FIELDS.get(str(block.get("type"))),) if name]
    ids = {str(block.get(name)) for block, name in places}
    odd = {given for given in ids if not given or ODD_ID.search(given)}
    spellings = Counter(ODD_ID.sub("_", given) for given in odd)
    for block, name in places:
        given = str(block.get(name))
        if given in odd:
            plain = ODD_ID.sub("_", given) or "tool"
            twin = plain in ids or spellings[plain] > 1
            block[name] = f"{plain}_{state_digest(given)[:8]}" if twin else plain
    return bool(odd)


TOOL_ID_FIELDS = {"tool_use": "id", "tool_result": "tool_use_id"}
CONTINUE = "Continue exactly where your last message ends. Do not repeat any of it."


def answer_prefill(body: Json, plan: Plan) -> bool:
    """A conversation that ends with the model's own words: Claude from 4.6 on must be asked to go on."""
    turns = turns_of(body)
    if not turns or turns[-1].get("role") != "assistant" or turns[-1].get("tool_calls"):
        return False
    if any(str(block.get("type")).endswith("tool_use") for block in wire_blocks(turns[-1])):
        return False
    body["messages"] = [*body["messages"], {"role": "user", "content": CONTINUE}]
    return True


def fold_late_systems(body: Json, plan: Plan) -> bool:
    """System messages inside a conversation; the last may stay on Claude from 4.8 on (DESIGN 8)."""
    return fold_systems(body, model_version(plan.model, "claude") >= (4, 8))


def fold_systems(body: Json, last_stays: bool) -> bool:
    """Leading system messages join `system`, later ones become reminders where they stand: hoisting would break the
    cached prefix. An effort on one of them is the turn's."""
    turns = objects_in(body.get("messages"))
    first = next((at for at, turn in enumerate(turns) if not is_system(turn)), len(turns))
    late = [at for at, turn in enumerate(turns) if at >= first and is_system(turn)]
    efforts = [turns[at].pop("output_config") for at in late if "output_config" in turns[at]]  # its beta is not taken
    efforts = [config["effort"] for config in efforts if isinstance(config, dict) and config.get("effort")]
    if efforts:
        body["output_config"] = {**wire_object(body, "output_config"), "effort": efforts[-1]}
    if late and last_stays and late[-1] == len(turns) - 1 and turns[-1].get("role") == "system":
        del late[-1]
    if not first and not late:
        return bool(efforts)
    for at in late:
        turns[at] = {"role": "user", "content": [reminder(block) for block in wire_content(turns[at])]}
    if first:
        body["system"] = wire_content({"content": body.get("system") or []}) + [part for turn in turns[:first] for part in wire_content(turn)]
    body["messages"] = turns[first:]
    return True


def is_system(turn: Any) -> bool:
    """Whether a turn is an instruction of the client, not of its user."""
    return isinstance(turn, dict) and turn.get("role") in ("system", "developer")


def wire_content(turn: Json) -> List[Json]:
    """The content of a turn as blocks."""
    content = turn.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else wire_blocks(turn)


def reminder(block: Json) -> Json:
    """A block of a late system message as the user's words, marked as what it is."""
    text = block.get("text")
    if not isinstance(text, str) or not text.strip() or text.startswith("<system-reminder>"):
        return block
    return {**block, "text": f"<system-reminder>\n{text}\n</system-reminder>"}


def history_signs(body: Json, plan: Plan) -> Set[str]:
    """What is odd about a history, found in one walk: most rows have nothing to do in most conversations."""
    way = PAIRINGS[plan.upstream_dialect]
    turns = objects_in(body.get(way.field))
    signs = set() if is_paired(way.entries(turns), way.adjacent) else {"pairs"}
    for turn in turns:
        content = turn.get("content")
        if not content or isinstance(content, str) and content.isspace():
            signs.add("blank")
        if turn.get("role") in ("system", "developer"):
            signs.add("system")
        if "tool_calls" in turn:
            signs.add("arguments")
            signs.update("tool_name" for call in objects_in(turn["tool_calls"]) if is_odd_name(named_part(call).get("name")))
        elif is_odd_name(turn.get("name")):
            signs.add("tool_name")
        if turn.get("id") is not None or turn.get("type") == "item_reference":
            signs.add("item_id")
        for blocks in (content, turn.get("output")):
            if isinstance(blocks, list):
                _block_signs(blocks, signs)
    loaded = [tool for turn in turns if "tools" in turn for tool in tools_in(turn["tools"])]
    if any(is_odd_name(named_part(tool).get("name")) for tool in (*tools_in(body.get("tools")), *loaded, *choices_in(body))):
        signs.add("tool_name")
    if any(map(is_blank, objects_in(body.get("system")))) or isinstance(body.get("system"), str) and not body["system"].strip():
        signs.add("blank")
    if "cache_control" in body or any(["cache_control" in block for name in ("system", "tools") for block in objects_in(body.get(name))]):
        signs.add("cache_mark")
    return signs


def _block_signs(blocks: List[Any], signs: Set[str]) -> None:
    for block in blocks:
        kind = name_in(block, "type")
        if isinstance(block, dict) and "cache_control" in block:
            signs.add("cache_mark")
        if kind == "text":
            if is_blank(block):
                signs.add("blank")
        elif kind == "tool_use":
            if not isinstance(block.get("input"), dict):
                signs.add("arguments")
            if not PLAIN_ID.match(str(block.get("id"))):
                signs.add("tool_id")
            if is_odd_name(block.get("name")):
                signs.add("tool_name")
        elif kind == "tool_result":
            if not PLAIN_ID.match(str(block.get("tool_use_id"))):
                signs.add("tool_id")
            inner = block.get("content")
            if isinstance(inner, list):
                _block_signs(inner, signs)
                if any(isinstance(part, dict) and "cache_control" in part for part in inner):
                    signs.add("cache_inside")
        elif kind in IMAGE_PARTS:
            signs.add("image")
        elif kind == "tool_reference":
            signs.add("reference")
        elif kind in ("thinking", "redacted_thinking"):
            if is_unsigned(block):
                signs.add("unsigned")
            if "cache_control" in block:
                signs.add("cache_inside")


def drop_item_ids(body: Json, plan: Plan) -> bool:
    """Ids of items mean nothing to the next connection: nothing is stored, and what the client calls an item is not
    what sealed it. Upstream finds its state without. Translated items keep the id their carrier holds."""
    items = objects_in(body.get("input"))
    kept = [item for item in items if item.get("type") != "item_reference"]
    for item in kept:
        item.pop("internal_chat_message_metadata_passthrough", None)  # Codex's own (clients.md)
    odd = [item for item in kept if item.get("id") is not None
           and not (plan.road == "translated" and item.get("type") in ("reasoning", "compaction"))]
    for item in odd:
        del item["id"]
    if len(kept) < len(items):
        body["input"] = kept
    return bool(odd) or len(kept) < len(items)


EMPTY_SIGNATURES = ("", "skip_thought_signature_validator")  # what clients and gateways put where they have none


def drop_unsigned_thinking(body: Json, plan: Plan) -> bool:
    """Thinking without a signature is refused, and a placeholder is none (user-pains P40, 3.1)."""
    dropped = False
    for turn in turns_of(body):
        blocks = wire_blocks(turn)
        if any(map(is_unsigned, blocks)):
            turn["content"] = [block for block in turn["content"] if not is_unsigned(block)]
            dropped = True
    if dropped:
        body["messages"] = [turn for turn in objects_in(body.get("messages")) if turn.get("content") != []]
    return dropped


def is_unsigned(block: Any) -> bool:
    """Whether a block is thinking that nobody can verify."""
    kind = block.get("type") if isinstance(block, dict) else None
    state = block.get({"thinking": "signature", "redacted_thinking": "data"}[kind]) if kind in ("thinking", "redacted_thinking") else "signed"
    return not isinstance(state, str) or state.strip() in EMPTY_SIGNATURES


# ---- thinking ---------------------------------------------------------------


def model_efforts(plan: Plan) -> Sequence[str]:
    """The efforts a model lists."""
    listed = model_capability(plan.record or {}, "supports", "reasoning_effort")
    return [effort for effort in listed if isinstance(effort, str)] if isinstance(listed, list) else []


# Where each dialect says how hard to think.
EFFORT_PLACES = {CHAT: (None, "reasoning_effort"), RESPONSES: ("reasoning", "effort"), MESSAGES: ("output_config", "effort")}


def clamp_effort(body: Json, plan: Plan) -> bool:
    """An effort of the model's own list (a model without one takes none, an adaptive Claude any)."""
    efforts = model_efforts(plan)
    if plan.record is None or not efforts and model_capability(plan.record, "supports", "adaptive_thinking") is True:
        return False
    return set_effort(body, plan, efforts)


def set_effort(body: Json, plan: Plan, efforts: Sequence[str]) -> bool:
    """Makes the body's effort one of a list; an empty list takes it out."""
    parent, name = EFFORT_PLACES[plan.upstream_dialect]
    place = body.get(parent) if parent else body
    asked = place.get(name) if isinstance(place, dict) else None
    if not isinstance(asked, str) or asked in efforts:
        return False
    if efforts:
        place[name] = clamped_effort(asked, efforts)
        return True
    del place[name]
    if parent and not place:
        del body[parent]
    return True


def fit_thinking(body: Json, plan: Plan) -> bool:
    """Thinking in the one form the model knows, a budget within its bounds, and its text asked for: a model that thinks
    in silence trips idle limits (copilot-upstream 7.1)."""
    asked, record = body.get("thinking"), plan.record
    if not isinstance(asked, dict) or asked.get("type") not in ("enabled", "adaptive") or record is None:
        return False
    before = dump_json([asked, body.get("output_config")])
    most = model_capability(record, "supports", "max_thinking_budget")
    if model_capability(record, "supports", "adaptive_thinking") is True:
        if asked["type"] == "enabled" and not most:
            think_adaptively(body, plan)
    elif not most:
        del body["thinking"]
        return True
    elif asked["type"] == "adaptive":
        think_by_budget(body, plan)
    fit_budget(body, record)
    thinking = body["thinking"]
    if thinking.get("display") not in ("summarized", "omitted") and ("display" in thinking or model_version(plan.model, "claude") >= (4, 7)):
        thinking["display"] = "summarized"
    return dump_json([body["thinking"], body.get("output_config")]) != before


def ask_for_hidden_thinking(body: Json, plan: Plan) -> bool:
    """Upstream is asked for the text that a client does not want to see: its silence trips idle limits. What comes is
    hidden again, the signature in a carrier that holds the text (DESIGN 8, "Thinking `display`")."""
    thinking = wire_object(body, "thinking")
    if thinking.get("display") != "omitted" or thinking.get("type") not in ("enabled", "adaptive"):
        return False
    thinking["display"] = "summarized"
    return True


def hide_thinking(value: Json, plan: Plan) -> bool:
    """A whole answer with the text of its thinking inside the signatures."""
    blocks = [block for block in wire_blocks(value) if block.get("type") == "thinking"]
    for block in blocks:
        block["signature"] = hidden_signature(plan, str(block.get("thinking") or ""), block.get("signature"))
        block["thinking"] = ""
    return bool(blocks)


def hidden_signature(plan: Plan, text: str, signature: Any) -> str:
    """The carrier of a signature and the text it signs; nothing for thinking that is not signed."""
    return seal("thinking", plan.origin, signature, text=text) if isinstance(signature, str) and signature else ""


class HiddenThinking(FrameEdit):
    """Messages frames without the text of the thinking; its signature leaves in a carrier when the block ends."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._open: Dict[Any, Tuple[List[str], List[str]]] = {}  # index -> (text, signature) so far

    def touches(self, frames: bytes) -> bool:
        return bool(self._open) or b"thinking" in frames

    def edit(self, frame: bytes) -> bytes:
        """The frame without what must not be seen; behind the last of a block what was held back."""
        chunk = frame_json(frame) or {}
        index, block, delta = chunk.get("index"), wire_object(chunk, "content_block"), wire_object(chunk, "delta")
        if block.get("type") == "thinking":
            self._open[index] = [str(block.get("thinking") or "")], [str(block.get("signature") or "")]
            return format_sse(parse_frame(frame)[0], {**chunk, "content_block": {**block, "thinking": "", "signature": ""}})
        if index not in self._open:
            return frame
        if delta.get("type") in ("thinking_delta", "signature_delta"):
            kept = self._open[index][delta["type"] == "signature_delta"]
            kept.append(str(delta.get("thinking") or delta.get("signature") or ""))
            return b""
        if chunk.get("type") != "content_block_stop":
            return frame
        text, signature = map("".join, self._open.pop(index))
        signed = {"type": "signature_delta", "signature": hidden_signature(self._plan, text, signature)}
        told = format_sse("content_block_delta", {"type": "content_block_delta", "index": index, "delta": signed})
        return told + frame if signature else frame


def think_adaptively(body: Json, plan: Plan) -> bool:
    """The form of newer models: the budget becomes an effort where the client named none."""
    asked = body.get("thinking")
    if not isinstance(asked, dict) or asked.get("type") != "enabled":
        return False
    budget, config = asked.get("budget_tokens"), wire_object(body, "output_config")
    if "effort" not in config and isinstance(budget, int):
        efforts = model_efforts(plan) or EFFORTS
        body["output_config"] = {**config, "effort": clamped_effort(effort_of_budget(budget), efforts)}
    body["thinking"] = {"type": "adaptive", **{name: value for name, value in asked.items() if name == "display"}}
    return True


def think_by_budget(body: Json, plan: Plan) -> bool:
    """The form of older models: the effort becomes a budget."""
    asked = body.get("thinking")
    if not isinstance(asked, dict) or asked.get("type") != "adaptive":
        return False
    effort = wire_object(body, "output_config").get("effort")
    body["thinking"] = {"type": "enabled", "budget_tokens": budget_of_effort(effort if isinstance(effort, str) else "medium"),
                        **{name: value for name, value in asked.items() if name == "display"}}
    return True


def fit_budget(body: Json, record: Json) -> None:
    """A budget between the model's least and most, and below `max_tokens`; where no room is left, no thinking."""
    thinking, tokens = body["thinking"], body.get("max_tokens")
    budget = thinking.get("budget_tokens")
    if thinking["type"] != "enabled" or not isinstance(budget, int):
        return
    least = model_capability(record, "supports", "min_thinking_budget") or LEAST_BUDGET
    most = model_capability(record, "supports", "max_thinking_budget") or budget
    room = tokens - 1 if isinstance(tokens, int) else budget
    fitted_budget = max(least, min(budget, most, room))
    body["thinking"] = {**thinking, "budget_tokens": fitted_budget} if fitted_budget <= room else {"type": "disabled"}


LEAST_BUDGET = 1024  # tokens; Anthropic, "Extended thinking"


def drop_sampling(body: Json, plan: Plan) -> bool:
    """Thinking allows temperature 1 and a `top_p` from 0.95 only (Anthropic, "Extended thinking")."""
    thinking = body.get("thinking")
    if not isinstance(thinking, dict) or thinking.get("type") not in ("enabled", "adaptive"):
        return False
    fine = {"temperature": lambda value: value == 1, "top_p": lambda value: value >= 0.95, "top_k": lambda value: False}
    odd = [name for name, test in fine.items() if isinstance(body.get(name), (int, float)) and not test(body[name])]
    for name in odd:
        del body[name]
    return bool(odd)


# ---- cache marks ------------------------------------------------------------

CACHE_MARKS = 4  # breakpoints a request may have
MARKABLE = frozenset(("text", "image", "document", "tool_use", "tool_result", "search_result"))


def cache_places(body: Json) -> List[Json]:
    """Tools, system blocks and message blocks that may carry a mark, in the order of the prompt."""
    places = objects_in(body.get("tools")) + objects_in(body.get("system"))
    return places + [block for turn in objects_in(body.get("messages")) for block in wire_blocks(turn)]


def expand_cache_mark(body: Json, plan: Plan) -> bool:
    """A mark on the whole request, which Copilot does not know, is one on its last block."""
    if "cache_control" not in body:
        return False
    mark = body.pop("cache_control")
    turns = [turn for turn in objects_in(body.get("messages")) if turn.get("content")]
    if turns and isinstance(mark, dict):
        turns[-1]["content"] = wire_content(turns[-1])
        last = next((block for block in reversed(turns[-1]["content"]) if block.get("type") in MARKABLE), None)
        if last is not None:
            last.setdefault("cache_control", mark)
    return True


def move_cache_marks(body: Json, plan: Plan) -> bool:
    """Marks where none may stand: inside a result they belong to the result, on thinking to nobody."""
    moved = False
    for block in cache_places(body):
        inner = [part for part in wire_blocks(block) if "cache_control" in part] if block.get("type") == "tool_result" else []
        for part in inner:
            block.setdefault("cache_control", part.pop("cache_control"))
        lost = str(block.get("type")).endswith("thinking") and block.pop("cache_control", None) is not None
        moved = bool(inner) or lost or moved
    return moved


def drop_cache_scopes(body: Json, plan: Plan) -> bool:
    """`scope` is refused; `ttl` on some hosts: it stays where the client asked for it with its beta."""
    names = ("scope",) if EXTENDED_CACHE in plan.betas else ("scope", "ttl")
    marks = [block["cache_control"] for block in cache_places(body) if isinstance(block.get("cache_control"), dict)]
    return any([mark.pop(name, None) is not None for mark in marks for name in names])


def limit_cache_marks(body: Json, plan: Plan) -> bool:
    """At most four marks: those of the last tool, the last system block and the newest messages stay."""
    places = [block for block in cache_places(body) if block.get("cache_control") is not None]
    if len(places) <= CACHE_MARKS:
        return False
    tools, system = ([block for block in objects_in(body.get(name)) if block.get("cache_control") is not None] for name in ("tools", "system"))
    wanted = tools[-1:] + system[-1:] + places[::-1]
    kept = {id(block) for block in list({id(block): block for block in wanted}.values())[:CACHE_MARKS]}
    for block in places:
        if id(block) not in kept:
            del block["cache_control"]
    return True


# ---- betas ------------------------------------------------------------------

# Beta flags that every host behind Copilot accepts, and what they allow in a body (copilot-upstream 7.2). A field goes
# with its beta; any other flag may be refused.
DEFERRED_TOOLS = "advanced-tool-use-2025-11-20"
EXTENDED_CACHE = "extended-cache-ttl-2025-04-11"
INTERLEAVED = "interleaved-thinking-2025-05-14"
CONTEXT_EDITING = "context-management-2025-06-27"
BETAS = frozenset((INTERLEAVED, CONTEXT_EDITING, DEFERRED_TOOLS, EXTENDED_CACHE))


LONG_CONTEXT_BETA = "context-1m-2025-08-07"  # deprecated on some hosts, so only on request (copilot-upstream 7.2)


def sift_betas(header: str) -> Tuple[List[str], List[str]]:
    """(kept, dropped) of an `anthropic-beta` header: a comma list, an open set."""
    asked = [name.strip() for name in header.split(",") if name.strip()]
    return [name for name in asked if name in BETAS], [name for name in asked if name not in BETAS]


def defers_tools(body: Json) -> bool:
    """Whether a tool waits to be searched for, or was found so."""
    return any(tool.get("defer_loading") for tool in objects_in(body.get("tools"))) or next(reference_places(body), None) is not None


def offer_deferred(body: Json) -> None:
    """Offers every tool at once."""
    for tool in objects_in(body.get("tools")):
        tool.pop("defer_loading", None)
    tell_references(body, lambda name: True)


def thinks_between_calls(body: Json) -> bool:
    """Whether a budget is given beside tools: such models think between calls only when told to."""
    return isinstance(body.get("thinking"), dict) and body["thinking"].get("type") == "enabled" and bool(body.get("tools"))


def keeps_cache_longer(body: Json) -> bool:
    """Whether a cache mark names its time."""
    return any(isinstance(block.get("cache_control"), dict) and "ttl" in block["cache_control"] for block in cache_places(body))


# beta -> (whether a body needs it, how a body does without)
BETA_FIELDS: Dict[str, Tuple[Callable[[Json], bool], Callable[[Json], Any]]] = {
    CONTEXT_EDITING: (lambda body: "context_management" in body, lambda body: body.pop("context_management", None)),
    DEFERRED_TOOLS: (defers_tools, offer_deferred),
    EXTENDED_CACHE: (keeps_cache_longer, lambda body: [block["cache_control"].pop("ttl", None) for block in cache_places(body)
                                                       if isinstance(block.get("cache_control"), dict)]),
    INTERLEAVED: (thinks_between_calls, lambda body: None),
}


def needed_betas(body: Json) -> List[str]:
    """The betas of the fields a body has."""
    return [beta for beta, (needs, _) in BETA_FIELDS.items() if needs(body)]


# ---- tools -------------------------------------------------------------------


def drop_schema_keyword(body: Json, plan: Plan) -> bool:
    """Takes `$schema` out of tool schemas; a *property* of that name stays."""
    return any([_drop_schema(schema) for holder in tool_lists(body) for tool in holder["tools"] for schema in _tool_schemas(tool)])


def _tool_schemas(tool: Any) -> Iterator[Json]:
    """The parameter schemas of one tool in any dialect, those inside a namespace too."""
    if not isinstance(tool, dict):
        return
    inner = tool.get("function") if isinstance(tool.get("function"), dict) else tool
    for name in ("parameters", "input_schema"):
        if isinstance(inner.get(name), dict):
            yield inner[name]
    for nested in tool.get("tools") or () if isinstance(tool.get("tools"), list) else ():
        yield from _tool_schemas(nested)


def _drop_schema(schema: Any) -> bool:
    if isinstance(schema, list):
        return any([_drop_schema(part) for part in schema])
    if not isinstance(schema, dict):
        return False
    changed = isinstance(schema.get("$schema"), str) and schema.pop("$schema") is not None
    for name, part in schema.items():
        if name in ("properties", "$defs", "definitions", "patternProperties") and isinstance(part, dict):
            changed = any([_drop_schema(named) for named in part.values()]) or changed
        elif name not in ("default", "enum", "const", "examples", "required"):
            changed = _drop_schema(part) or changed
    return changed


# ---- tools and pictures -----------------------------------------------------

# One walk serves the three dialects: what carries a name is told apart by its shape.
#
#            tools                      calls of the history          images
#   Chat     {"function":{"name"}}      turn.tool_calls[].function    {"type":"image_url","image_url":{"url"}}
#   Resp.    {"name"}, namespaces       items of CALL_KINDS           {"type":"input_image","image_url"}
#   Mess.    {"name"}                   blocks of CALL_KINDS          {"type":"image","source":{"data"}}

CALL_KINDS = ("function_call", "custom_tool_call", "tool_use")
# Longest `tools` of a request (OpenAI; copilot-upstream 5.1, user-pains P51). No model record states another.
MAX_TOOLS = 128
# What OpenAI and Anthropic take for the name of a tool.
WIRE_NAME = re.compile(r"[A-Za-z0-9_-]{1,%d}" % Names.LONGEST)
# So many tools set aside are named to the client one by one: a header has to stay short.
MOST_NAMED = 16
# Tools that no host behind Copilot runs, by the opening of their type (copilot-upstream 6.1, 7.1). `computer_` needs a beta
# that is not accepted; `bash_`, `text_editor_` and `memory_` are run by the client and pass, as custom tools do.
UNHOSTED = ("image_generation", "file_search", "code_interpreter", "computer", "mcp", "local_shell")
UNHOSTED_TOOLS = {CHAT: UNHOSTED + ("web_search",), RESPONSES: UNHOSTED,
                  MESSAGES: ("web_search_", "web_fetch_", "code_execution_", "computer_", "mcp_toolset")}


def tools_in(tools: Any) -> Iterator[Json]:
    """The tools of a list, those of a namespace in its place."""
    for tool in objects_in(tools):
        if isinstance(tool.get("tools"), list):
            yield from objects_in(tool["tools"])
        else:
            yield tool


def tool_lists(body: Json) -> List[Json]:
    """Who holds tools: the body, and items of its history that brought some (Responses: `additional_tools`, what a search found)."""
    return [holder for holder in (body, *turns_of(body)) if isinstance(holder.get("tools"), list)]


def all_tools(body: Json) -> Iterator[Json]:
    """Every tool of a body, wherever it stands."""
    for holder in tool_lists(body):
        yield from tools_in(holder["tools"])


def calls_in(turn: Json) -> Iterator[Json]:
    """The calls of one turn: of its history, or of an answer."""
    if turn.get("type") in CALL_KINDS:
        yield turn
    if "tool_calls" in turn:
        yield from objects_in(turn["tool_calls"])
    content = turn.get("content")
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") in CALL_KINDS:
            yield block


def choices_in(body: Json) -> List[Json]:
    """A `tool_choice` that points at a tool, and the members of one that allows several."""
    choice = body.get("tool_choice")
    if not isinstance(choice, dict):
        return []
    allowed = choice.get("allowed_tools", choice)
    return [choice, *objects_in(allowed.get("tools") if isinstance(allowed, dict) else None)]


def named_part(value: Json) -> Json:
    """What holds the name of a tool, a choice or a call."""
    inner = value.get("function", value.get("custom"))
    return inner if isinstance(inner, dict) else value


def tool_label(value: Json) -> str:
    """The name of a tool, a choice or a call; the type of one that has no name."""
    return text_or_none(named_part(value).get("name")) or text_or_none(value.get("type")) or ""


def reference_places(body: Json) -> Iterator[Tuple[List[Any], int]]:
    """(list, index) of every `tool_reference` block: they stand in tool results (Messages)."""
    for turn in turns_of(body):
        for block in objects_in(turn.get("content")):
            if block.get("type") == "tool_result" and isinstance(block.get("content"), list):
                for at, part in enumerate(block["content"]):
                    if isinstance(part, dict) and part.get("type") == "tool_reference":
                        yield block["content"], at


def name_dropped(plan: Plan, kind: str, names: Sequence[str]) -> None:
    """Tells the client what was set aside: `tool:NAME`, the first of many by name, the others by number."""
    entries = [f"{kind}:" + re.sub(r"[^A-Za-z0-9_.:/+-]", "_", name)[:80] for name in names[:MOST_NAMED]]
    if len(names) > MOST_NAMED:
        entries.append(f"{kind}:+{len(names) - MOST_NAMED}")
    plan.dropped = plan.dropped + [entry for entry in dict.fromkeys(entries) if entry not in plan.dropped]


def take_out_tools(body: Json, gone: Sequence[Json], plan: Plan) -> None:
    """Takes tools out of the body, and out of its `tool_choice`; a namespace goes with its last tool."""
    marked = {id(tool) for tool in gone}
    for holder in tool_lists(body):
        holder["tools"] = tools_left(holder["tools"], marked)
    keep_cache_mark(objects_in(body.get("tools")), gone)
    names = dict.fromkeys(map(tool_label, gone))
    left = set(map(tool_label, all_tools(body)))
    release_choice(body, [name for name in names if name not in left])
    if not body.get("tools"):
        close_tools(body, plan)
    owns = [plan.names.restore(name)[:2] for name in names]
    name_dropped(plan, "tool", [f"{namespace}.{name}" if namespace else name for name, namespace in owns])


def tools_left(tools: List[Any], marked: Set[int]) -> List[Any]:
    """The tools of a list that are not marked, by identity; a namespace without any is gone."""
    kept = []
    for tool in tools:
        nested = tool.get("tools") if isinstance(tool, dict) else None
        if isinstance(nested, list) and any(id(inner) in marked for inner in nested):
            tool = {**tool, "tools": [inner for inner in nested if id(inner) not in marked]}
            kept += [tool] if tool["tools"] else []
        elif id(tool) not in marked:
            kept.append(tool)
    return kept


def keep_cache_mark(kept: List[Any], gone: Sequence[Json]) -> None:
    """Moves the cache mark of a tool that is gone to the last one left that may carry it (Messages): clients mark their last."""
    marks = [tool["cache_control"] for tool in gone if tool.get("cache_control")]
    places = [at for at, tool in enumerate(kept) if isinstance(tool, dict) and tool.get("defer_loading") is not True]
    if marks and places and not any("cache_control" in kept[at] for at in places):
        kept[places[-1]]["cache_control"] = marks[-1]


def release_choice(body: Json, gone: Sequence[str]) -> None:
    """Takes a `tool_choice` away that can only be met by tools that are gone."""
    choices = choices_in(body)
    if not any(tool_label(choice) in gone for choice in choices):
        return
    holder = choices[0].get("allowed_tools", choices[0])
    left = [choice for choice in choices[1:] if tool_label(choice) not in gone]
    if left:
        holder["tools"] = left
    else:
        del body["tool_choice"]


def close_tools(body: Json, plan: Plan) -> None:
    """Takes away what is refused beside an empty list of tools.

    Hosts of Claude refuse calls in the history of a request without tools: there the called ones stand in, not to be called.
    """
    for name in ("tools", "tool_choice", "parallel_tool_calls"):
        body.pop(name, None)
    called = dict.fromkeys(tool_label(call) for turn in turns_of(body) for call in calls_in(turn))
    if called and plan.upstream_dialect == MESSAGES:
        body["tools"] = [{"name": name, "input_schema": {"type": "object", "properties": {}}} for name in called]
        body["tool_choice"] = {"type": "none"}


def drop_unhosted_tools(body: Json, plan: Plan) -> bool:
    """Sets tools aside that upstream would have to run and does not."""
    openings = UNHOSTED_TOOLS[plan.upstream_dialect]
    gone = [tool for tool in objects_in(body.get("tools")) if name_in(tool, "type").startswith(openings)]
    if gone:
        take_out_tools(body, gone, plan)
    return bool(gone)


def limit_tools(body: Json, plan: Plan) -> bool:
    """Sets the tools beyond the limit aside: from the end, first those of servers, then built-in ones, then called ones.

    A server's tool has `__` in its name (`mcp__github__list`) or stands in a namespace. Order stays, for the prompt cache.
    Tools that Claude finds by search are not counted (Anthropic, "Tool search tool": up to 10,000).
    """
    tools = [tool for tool in tools_in(body.get("tools"))
             if not (plan.upstream_dialect == MESSAGES and tool.get("defer_loading") is True)]
    if len(tools) <= MAX_TOOLS:
        return False
    forced = set(map(tool_label, choices_in(body)))
    called = {tool_label(call) for turn in turns_of(body) for call in calls_in(turn)}
    own = {id(tool) for tool in objects_in(body["tools"]) if "__" not in tool_label(tool)}

    def rank(tool: Json) -> int:
        name = tool_label(tool)
        return 0 if name in forced else 1 if name in called else 2 if id(tool) in own else 3
    take_out_tools(body, sorted(tools, key=rank)[MAX_TOOLS:], plan)
    return True


def tell_references(body: Json, lost: Callable[[str], bool]) -> bool:
    """References to tools that upstream does not know, as text."""
    places = [(blocks, at) for blocks, at in reference_places(body) if lost(name_in(blocks[at], "tool_name"))]
    for blocks, at in places:
        blocks[at] = {"type": "text", "text": f"Tool {name_in(blocks[at], 'tool_name')} loaded"}
    return bool(places)


def tell_lost_references(body: Json, plan: Plan) -> bool:
    """Says as text that a tool was found which is not offered any more: Claude's hosts refuse a reference to it."""
    offered = set(map(tool_label, tools_in(body.get("tools"))))
    return tell_references(body, lambda name: name not in offered)


def is_odd_name(name: Any) -> bool:
    """Whether upstream refuses a tool of that name."""
    return isinstance(name, str) and not WIRE_NAME.fullmatch(name)


def tool_name_places(body: Json) -> Iterator[Tuple[Json, str]]:
    """(object, key) of every place that holds the name of a function or custom tool."""
    for turn in turns_of(body):
        for call in calls_in(turn):
            yield named_part(call), "name"
        if "tools" in turn:  # what a search has loaded (Responses)
            yield from ((named_part(tool), "name") for tool in tools_in(turn["tools"]))
        if turn.get("role") == "tool":
            yield turn, "name"
    for tool in (*tools_in(body.get("tools")), *choices_in(body)):
        yield named_part(tool), "name"
    for blocks, at in reference_places(body):
        yield blocks[at], "tool_name"


def shorten_tool_names(body: Json, plan: Plan) -> bool:
    """Gives tools names that upstream takes, everywhere in the body; `plan.names` knows the way back.

    Good names are noted first, so that none of them is given to another tool.
    """
    places = [(part, key) for part, key in tool_name_places(body) if isinstance(part.get(key), str)]
    names = dict.fromkeys(part[key] for part, key in places)
    bad = set(filter(is_odd_name, names))
    for name in names if bad else ():
        if name not in bad and plan.names.restore(name) == (name, None, "function"):
            plan.names.shorten(name)
    for part, key in places if bad else ():
        if part[key] in bad:
            part[key] = plan.names.shorten(part[key])
    return bool(bad)


def answered_calls(value: Json) -> Iterator[Json]:
    """The calls of an answer or of one frame of it, in any dialect, and the tools that Responses repeats."""
    for choice in objects_in(value.get("choices")):
        for name in ("message", "delta"):
            yield from calls_in(choice[name]) if isinstance(choice.get(name), dict) else ()
    for holder in (value, value.get("response")):
        if isinstance(holder, dict):
            yield from tools_in(holder.get("tools"))
            for item in objects_in(holder.get("output")):
                yield from calls_in(item)
    for name in ("item", "content_block"):
        yield from calls_in(value[name]) if isinstance(value.get(name), dict) else ()
    yield from calls_in(value)
    if value.get("type") == "response.function_call_arguments.done":
        yield value


def restore_tool_names(value: Json, plan: Plan) -> bool:
    """Gives the calls of an answer, or of a frame, their tools' own names; edits it, and says whether it did."""
    renamed = plan.names.renamed()
    parts = [part for part in map(named_part, answered_calls(value)) if text_or_none(part.get("name")) in renamed]
    for part in parts:
        part["name"] = renamed[part["name"]]
    return bool(parts)


class RestoredNames(FrameEdit):
    """Frames with the tools' own names in place of those that upstream was given."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._needles = tuple(dump_json(name) for name in plan.names.renamed())

    def touches(self, frames: bytes) -> bool:
        """Whether a changed name stands in the frames."""
        return any(needle in frames for needle in self._needles)

    def edit(self, frame: bytes) -> bytes:
        """The frame to relay."""
        chunk = frame_json(frame) if self.touches(frame) else None
        if chunk is None or not restore_tool_names(chunk, self._plan):
            return frame
        return format_sse(parse_frame(frame)[0], chunk)


def drop_eager_streaming(body: Json, plan: Plan) -> bool:
    """Takes `eager_input_streaming` off every tool."""
    tools = [tool for tool in objects_in(body.get("tools")) if "eager_input_streaming" in tool]
    for tool in tools:
        del tool["eager_input_streaming"]
    return bool(tools)


def drop_speed(body: Json, plan: Plan) -> bool:
    """Takes `speed` away and says so: fast answers are models of their own (`<id>-fast`)."""
    if "speed" not in body:
        return False
    del body["speed"]
    name_dropped(plan, "field", ["speed"])
    return True


def describe_namespaces(body: Json, plan: Plan) -> bool:
    """Gives a namespace without a description one."""
    mute = [tool for holder in tool_lists(body) for tool in objects_in(holder["tools"])
            if tool.get("type") == "namespace" and not (text_or_none(tool.get("description")) or "").strip()]
    for tool in mute:
        tool["description"] = f"Tools of {tool_label(tool)}"
    return bool(mute)


# ---- tool schemas -----------------------------------------------------------

GONE: Any = object()  # what a rule gives for a keyword that has to go
# Keywords whose value may be null; a null under any other is refused.
NULL_KEYWORDS = frozenset(("default", "const"))
COMBINATORS = ("anyOf", "oneOf", "allOf")
NOT_AT_TOP = (*COMBINATORS, "enum", "not")
TEXT_KEYWORDS = frozenset(("type", "description"))  # any text is right under these, which are most of a schema


class SchemaRules(NamedTuple):
    """What an upstream takes: `keywords` gives for a keyword's value (value, schema, rules) the value to send or GONE, the
    same object where it is fine. `items`: an array has to say what it holds."""

    keywords: Dict[str, Callable[[Any, Json, "SchemaRules"], Any]]
    items: bool = False


def _schema_table(value: Any, schema: Json, rules: SchemaRules) -> Any:
    if not isinstance(value, dict):
        return GONE
    changes: Json = {}
    for name, part in value.items():
        kept = mended_schema(part, rules) if isinstance(part, dict) else _subschema(part, schema, rules)
        if kept is not part:
            changes[name] = {} if kept is GONE else kept
    return {**value, **changes} if changes else value


def _schema_list(value: Any, schema: Json, rules: SchemaRules) -> Any:
    if not isinstance(value, list):
        return GONE
    mended = [part for part in (_subschema(part, schema, rules) for part in value) if part is not GONE]
    if len(mended) == len(value) > 0 and all(part is given for part, given in zip(mended, value)):
        return value
    return mended or GONE


def _subschema(value: Any, schema: Json, rules: SchemaRules) -> Any:
    if isinstance(value, dict):
        return mended_schema(value, rules)
    return value if isinstance(value, bool) else GONE


def _schema_or_list(value: Any, schema: Json, rules: SchemaRules) -> Any:
    return (_schema_list if isinstance(value, list) else _subschema)(value, schema, rules)


def _keyword_text(value: Any, schema: Json, rules: SchemaRules) -> Any:
    return value if isinstance(value, str) else GONE


def _name_list(value: Any, schema: Json, rules: SchemaRules) -> Any:
    """Draft 3 wrote `"required": true` on the property itself."""
    if not isinstance(value, list):
        return GONE
    return value if all(isinstance(name, str) for name in value) else [name for name in value if isinstance(name, str)]


def _types(value: Any, schema: Json, rules: SchemaRules) -> Any:
    if isinstance(value, str):
        return value
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    return value if names and len(names) == len(value) else names or GONE


def _enumerated(value: Any, schema: Json, rules: SchemaRules) -> Any:
    """A null only where the declared type has it, or none is declared."""
    if not isinstance(value, list) or not value:
        return GONE
    declared = schema.get("type")
    if None not in value or declared is None or declared == "null" or isinstance(declared, list) and "null" in declared:
        return value
    return [member for member in value if member is not None] or GONE


def _single_type(value: Any, schema: Json, rules: SchemaRules) -> Any:
    """Gemini takes one type; null is what a missing argument says."""
    names = _types(value, schema, rules)
    return names if names is GONE or isinstance(names, str) else next((name for name in names if name != "null"), names[0])


def _string_enum(value: Any, schema: Json, rules: SchemaRules) -> Any:
    """Gemini takes strings, and them for strings only: elsewhere a value of another type would be worse than a free one."""
    kind = _single_type(schema.get("type"), schema, rules)
    if not isinstance(value, list) or kind not in ("string", GONE):
        return GONE
    names = [member if isinstance(member, str) else dump_json(member).decode() for member in value if member is not None]
    return value if names and names == value else names or GONE


def schema_rules(items: bool = False, **others: Callable[[Any, Json, SchemaRules], Any]) -> SchemaRules:
    rows = (
        (_schema_table,   ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas")),
        (_schema_list,    (*COMBINATORS, "prefixItems")),
        (_schema_or_list, ("items",)),
        (_subschema,      ("additionalProperties", "additionalItems", "unevaluatedProperties", "not", "if", "then", "else",
                           "contains", "propertyNames")),
        (_keyword_text,  ("description",)),
        (_name_list,     ("required",)),
        (_types,         ("type",)),
        (_enumerated,    ("enum",)),
    )
    return SchemaRules({**{name: rule for rule, names in rows for name in names}, **others}, items)


# OpenAI and Google refuse an array without items ("array schema missing items"), Anthropic does not.
SCHEMA_RULES = {CHAT: schema_rules(items=True), RESPONSES: schema_rules(items=True), MESSAGES: schema_rules()}
GEMINI_SCHEMA_RULES = schema_rules(items=True, type=_single_type, enum=_string_enum)  # copilot-upstream 5.1 "Gemini"


def mended_schema(schema: Json, rules: SchemaRules) -> Json:
    """The schema as upstream takes it: the same object where it is fine, a copy otherwise. One pass."""
    changes: Json = {}
    keywords = rules.keywords
    for name, value in schema.items():
        if name in TEXT_KEYWORDS and isinstance(value, str):
            continue
        if value is None:
            if name not in NULL_KEYWORDS:
                changes[name] = GONE
        elif name in keywords:
            kept = keywords[name](value, schema, rules)
            if kept is not value:
                changes[name] = kept
    if rules.items and (schema.get("items") is None or changes.get("items") is GONE) and _is_array(schema.get("type")):
        changes["items"] = {}
    if not changes:
        return schema
    return {name: value for name, value in {**schema, **changes}.items() if value is not GONE}


def _is_array(kind: Any) -> bool:
    return kind == "array" or isinstance(kind, list) and "array" in kind


def mended_parameters(schema: Any, rules: SchemaRules) -> Json:
    """The schema of a tool: an object with properties, and no alternatives at its top, in any dialect."""
    mended = mended_schema(schema, rules) if isinstance(schema, dict) else {}
    if any(name in mended for name in NOT_AT_TOP):
        mended = without_alternatives(mended)
    if mended.get("type") != "object" or "properties" not in mended:
        mended = {**mended, "type": "object", "properties": mended.get("properties", {})}
    return mended


def without_alternatives(schema: Json) -> Json:
    """The schema with the properties of its alternatives as its own; required is what every one of them requires.

    Anthropic: "input_schema does not support oneOf, allOf, or anyOf at the top level"; OpenAI names all of NOT_AT_TOP.
    """
    merged = {name: value for name, value in schema.items() if name not in NOT_AT_TOP}
    properties, required = dict(merged.get("properties", {})), list(merged.get("required", ()))
    for name in COMBINATORS:
        branches = [_referred(branch, schema) for branch in objects_in(schema.get(name))]
        wanted = [branch["required"] if isinstance(branch.get("required"), list) else [] for branch in branches]
        for branch in branches:
            properties = {**(branch["properties"] if isinstance(branch.get("properties"), dict) else {}), **properties}
        required += [key for keys in wanted for key in keys if name == "allOf" or all(key in others for others in wanted)]
    merged["properties"] = properties
    return {**merged, "required": list(dict.fromkeys(required))} if required else merged


def _referred(branch: Json, schema: Json) -> Json:
    """What a branch refers to inside the schema, `{"$ref":"#/$defs/name"}`; else the branch itself."""
    root, table, name = (str(branch.get("$ref", "")).split("/") + ["", ""])[:3]
    found = schema.get(table, {}).get(name) if root == "#" and table in ("$defs", "definitions") else None
    return found if isinstance(found, dict) else branch


def mend_tool_schemas(body: Json, plan: Plan) -> bool:
    """Mends the schemas and descriptions of tools, so that one bad tool does not fail the turn."""
    dialect, changed = plan.upstream_dialect, False
    gemini = dialect == CHAT and "gemini" in plan.model.lower()
    rules = GEMINI_SCHEMA_RULES if gemini else SCHEMA_RULES[dialect]
    key, kinds = ("input_schema", (None, "custom")) if dialect == MESSAGES else ("parameters", (None, "function"))
    for tool in all_tools(body):
        part = named_part(tool)
        if tool.get("type") not in kinds or not isinstance(part.get("name"), str):
            continue
        schema = mended_parameters(part.get(key), rules)
        if schema is not part.get(key):
            part[key], changed = schema, True
        if not isinstance(part.get("description", ""), str):
            del part["description"]
            changed = True
    return changed


# ---- pictures ---------------------------------------------------------------

# What an image may have where neither settings nor the model's record say (copilot-upstream 4.2, user-pains 2).
IMAGE_BYTES, IMAGE_PIXELS = 3_145_728, 8000
# Anthropic, "Vision": a request with more images than that takes smaller ones only.
MANY_IMAGES, MANY_IMAGES_PIXELS = 20, 2000
# VS Code's own numbers, where it does not trust the records (copilot-upstream 4.2).
IMAGE_COUNTS = (("claude", 20), ("gemini", 10))
# type of a part: the note's type in the same place
IMAGE_PARTS = {"image_url": "text", "input_image": "input_text", "image": "text"}


def image_places(body: Json) -> Iterator[Tuple[List[Any], int]]:
    """(list, index) of every image, oldest first, inside tool results too."""
    for turn in turns_of(body):
        for name in ("content", "output"):
            if isinstance(turn.get(name), list):
                yield from _image_places(turn[name])


def _image_places(parts: List[Any]) -> Iterator[Tuple[List[Any], int]]:
    for at, part in enumerate(parts):
        if not isinstance(part, dict):
            continue
        if name_in(part, "type") in IMAGE_PARTS:
            yield parts, at
        elif isinstance(part.get("content"), list):
            yield from _image_places(part["content"])


def image_payload(part: Json) -> Optional[str]:
    """The base64 text of an image, None where upstream fetches it itself."""
    source = part.get("source", part.get("image_url"))
    if isinstance(source, dict):
        source = source.get("data", source.get("url"))
    if not isinstance(source, str) or source.startswith(("http:", "https:")):
        return None
    return source[source.find(",", 0, 1024) + 1:] if source.startswith("data:") else source


def image_limits(plan: Plan, images: int) -> ImageLimits:
    """(bytes, longest side, number) that hold for a request: settings, else the model's record, else what is known."""
    asked, vision = plan.image_limits, model_capability(plan.record or {}, "limits", "vision")
    stated = {name: count_or_zero(vision, name) for name in ("max_prompt_image_size", "max_prompt_images")} if isinstance(vision, dict) else {}
    usual = next((most for brand, most in IMAGE_COUNTS if brand in plan.model.lower()), stated.get("max_prompt_images"))
    count = asked.count or usual or images
    many = min(images, count) > MANY_IMAGES
    return ImageLimits(asked.bytes or stated.get("max_prompt_image_size") or IMAGE_BYTES,
                       asked.pixels or (MANY_IMAGES_PIXELS if many else IMAGE_PIXELS), count)


def image_fault(part: Json, limits: ImageLimits) -> str:
    """Why an image cannot be sent; "" if it can."""
    payload = image_payload(part)
    if payload is None:
        return ""
    size_bytes = len(payload) * 3 // 4 - payload.count("=", -2)
    if size_bytes > limits.bytes:
        return f"{size_bytes} bytes is over the limit of {limits.bytes}"
    width, height = image_size_base64(payload) or (0, 0)
    return f"{width}x{height} px is over the limit of {limits.pixels}" if max(width, height) > limits.pixels else ""


def limit_images(body: Json, plan: Plan) -> bool:
    """Puts a short note in the place of images that upstream would refuse; the newest win.

    The vision header follows: with it and without an image Copilot answers 429, the other way round 400 (3.2).
    """
    places = list(image_places(body))
    limits = image_limits(plan, len(places))
    kept = 0
    for parts, at in reversed(places):
        fault = image_fault(parts[at], limits)
        if not fault and kept == limits.count:
            fault = f"only the newest {limits.count} are sent"
        if not fault:
            kept += 1
            continue
        note_image(parts, at, fault)
    plan.caller.vision = kept > 0
    if kept < len(places):
        name_dropped(plan, "image", [str(len(places) - kept)])
    return kept < len(places)


def note_image(parts: List[Any], at: int, fault: str) -> None:
    """Puts a note in the place of an image."""
    note = {"type": IMAGE_PARTS[parts[at]["type"]], "text": f"[image omitted: {fault}]"}
    parts[at] = {**note, "cache_control": parts[at]["cache_control"]} if parts[at].get("cache_control") else note


# ---- edits of relayed answers -------------------------------------------------

# Strings in JSON escape their quotes: what these expressions find, quotes and all, is never part of a text.
CHUNK_OPENS = re.compile(rb"data:\s*\{")
CHOICE_OPENS = re.compile(rb'"choices"\s*:\s*\[\s*\{')
ANY_INDEX = re.compile(rb'"index"\s*:\s*\d+')
LATER_INDEX = re.compile(rb'"index"\s*:\s*[1-9]')
CALLS_OPEN = re.compile(rb'"tool_calls"\s*:\s*\[\s*\{')
STOP_FINISH = re.compile(rb'("finish_reason"\s*:\s*)"stop"')
JSON_STRING = rb'"(?:[^"\\]|\\.)*"'
PADDED = rb'"padding"\s*:\s*' + JSON_STRING
PADDING = re.compile(PADDED + rb"\s*,\s*|\s*,\s*" + PADDED + rb"|" + PADDED)
DELTA = re.compile(rb'"delta"\s*:\s*')
ITEM_ID = re.compile(rb'"item_id"\s*:\s*"([^"]*)"')
OUTPUT_INDEX = re.compile(rb'"output_index"\s*:\s*(\d+)')


def spelled(frame: bytes, edited: bytes, chunk: Json) -> bytes:
    """`edited` if that says `chunk`, else the chunk written anew: edited bytes are a guess, and are not sent unchecked."""
    return edited if frame_json(edited) == chunk else format_sse(parse_frame(frame)[0], chunk)


def with_members(frame: bytes, opens: re.Pattern, holder: Json, members: Json) -> bytes:
    """The frame with members set in one of its objects, whose brace `opens` finds first; sets them in `holder` too.
    A guess: see `spelled`."""
    for name, value in members.items():
        member = dump_json({name: value})[1:-1]
        if name in holder:
            frame = re.sub(rb'"%b"\s*:\s*(?:""|0|null)' % name.encode(), lambda found: member, frame, 1)
        else:
            frame = opens.sub(lambda found: found.group(0) + member + (b"," if holder else b""), frame, 1)
        holder[name] = value
    return frame


def chunk_choices(chunk: Json) -> List[Json]:
    """The choices of a chunk or an answer, as far as they are objects."""
    return objects_in(chunk.get("choices"))


def absent(holder: Json, members: Json) -> Json:
    """Those of the members that an object does not have."""
    return {name: value for name, value in members.items() if name not in holder}


class UsageChunk(FrameEdit):
    """Swallows the chunk that carries nothing but the usage nobody asked for."""

    inside = False

    def __init__(self, plan: Plan) -> None:
        pass

    def touches(self, frames: bytes) -> bool:
        return b'"choices":[]' in frames or b'"choices": []' in frames

    def edit(self, frame: bytes) -> bytes:
        chunk = frame_json(frame) or {} if self.touches(frame) else {}
        return b"" if chunk.get("choices") == [] and isinstance(chunk.get("usage"), dict) else frame


class OneChoice(FrameEdit):
    """Puts Claude's text and calls, which may come as several choices, into the first one.

    Calls of different choices may have one index: the later ones get the next that is free.
    """

    def __init__(self, plan: Plan) -> None:
        self._numbers: Dict[Tuple[int, int], int] = {}  # (choice, index) of a call -> its index for the client
        self._renumbered = False

    def touches(self, frames: bytes) -> bool:
        return (b'"name"' in frames or LATER_INDEX.search(frames) is not None
                or self._renumbered and b'"tool_calls"' in frames)

    def edit(self, frame: bytes) -> bytes:
        chunk = frame_json(frame)
        if chunk is None or not any([self._moved(choice) for choice in chunk_choices(chunk)]):
            return frame
        return spelled(frame, ANY_INDEX.sub(b'"index":0', frame, 1), chunk)

    def _moved(self, choice: Json) -> bool:
        """Moves a choice to the first place, its calls to theirs; whether that changed anything."""
        place, delta = choice.get("index"), choice.get("delta")
        moved = type(place) is int and place > 0
        if moved:
            choice["index"] = 0
        calls = delta.get("tool_calls") if isinstance(delta, dict) else None
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, dict) and type(call.get("index")) is int:
                number = self._number(place if moved else 0, call["index"])
                moved, call["index"] = moved or number != call["index"], number
        return moved

    def _number(self, choice: int, index: int) -> int:
        taken = self._numbers.values()
        number = self._numbers.setdefault((choice, index), index if index not in taken else max(taken) + 1)
        self._renumbered = self._renumbered or number != index
        return number


def merge_choices(body: Json, plan: Plan) -> bool:
    """Makes one choice of the several Claude's answer came in: texts joined, calls in order, the first thought."""
    choices = [choice for choice in chunk_choices(body) if isinstance(choice.get("message"), dict)]
    if len(choices) < 2 or len(choices) != len(body["choices"]):
        return False
    messages = [choice["message"] for choice in choices]
    texts = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    calls = [call for message in messages if isinstance(message.get("tool_calls"), list) for call in message["tool_calls"]]
    thought = next((message for message in messages if message.get("reasoning_text") or message.get("reasoning_opaque")), {})
    finishes = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    merged = {**messages[0], "content": "".join(texts) if texts else None,
              **{name: thought[name] for name in ("reasoning_text", "reasoning_opaque") if name in thought},
              **({"tool_calls": calls} if calls else {})}
    finish = "tool_calls" if calls and "tool_calls" in finishes else finishes[-1] if finishes else None
    body["choices"] = [{**choices[0], "finish_reason": finish, "index": 0, "message": merged}]
    return True


class CallFinish(FrameEdit):
    """Says `tool_calls` where Gemini ends a turn with calls by `stop`: clients would not run them."""

    def __init__(self, plan: Plan) -> None:
        self._called = False

    def touches(self, frames: bytes) -> bool:
        return not self._called and b'"tool_calls"' in frames or self._called and b'"stop"' in frames

    def edit(self, frame: bytes) -> bytes:
        self._called = self._called or CALLS_OPEN.search(frame) is not None
        return STOP_FINISH.sub(rb'\1"tool_calls"', frame) if self._called else frame


def finish_with_calls(body: Json, plan: Plan) -> bool:
    """The same for a whole answer."""
    wrong = [choice for choice in chunk_choices(body) if choice.get("finish_reason") == "stop"
             and isinstance(choice.get("message"), dict) and choice["message"].get("tool_calls")]
    for choice in wrong:
        choice["finish_reason"] = "tool_calls"
    return bool(wrong)


class Padding(FrameEdit):
    """Takes out the noise that hides a message's length from eavesdroppers."""

    def __init__(self, plan: Plan) -> None:
        pass

    def touches(self, frames: bytes) -> bool:
        return b'"padding"' in frames

    def edit(self, frame: bytes) -> bytes:
        chunk = frame_json(frame)
        if chunk is None or not any([_drop_padding(choice.get("delta")) for choice in chunk_choices(chunk)]):
            return frame
        return spelled(frame, PADDING.sub(b"", frame), chunk)


def drop_padding(body: Json, plan: Plan) -> bool:
    """The same for a whole answer."""
    return any([_drop_padding(choice.get("message")) for choice in chunk_choices(body)])


def _drop_padding(message: Any) -> bool:
    return isinstance(message, dict) and message.pop("padding", None) is not None


class ChunkFields(FrameEdit):
    """Fills what a chunk's type demands and upstream leaves out or empty; the id is the meter's part.

    The chunk that opens GPT's streams says nothing but the verdict on the prompt, under no id: it is swallowed.
    """

    inside = False

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._about: Json = {}  # of the first chunk, and of all that say less

    def touches(self, frames: bytes) -> bool:
        return b"data:" in frames

    def edit(self, frame: bytes) -> bytes:
        """The chunk with its gaps filled, b"" for the opening one; errors and what is no chunk stay."""
        chunk = frame_json(frame)
        if chunk is None or chunk.get("error"):
            return frame
        if "prompt_filter_results" in chunk and not chunk.get("choices") and not chunk.get("usage"):
            return b""
        self._about = self._about or {"object": "chat.completion.chunk", "created": chunk.get("created") or self._plan.asked_at,
                                      "model": chunk.get("model") or self._plan.model}
        lacking = {name: value for name, value in self._about.items() if not chunk.get(name)}
        if not isinstance(chunk.get("choices"), list):
            lacking["choices"] = []
        gaps = [(CHUNK_OPENS, chunk, lacking)] + [(CHOICE_OPENS, choice, absent(choice, {"finish_reason": None, "index": at}))
                                                  for at, choice in enumerate(chunk_choices(chunk))]
        if not any(members for _, _, members in gaps):
            return frame
        edited = frame
        for opens, holder, members in gaps:
            edited = with_members(edited, opens, holder, members)
        return spelled(frame, edited, chunk)


def fill_fields(body: Json, plan: Plan) -> bool:
    """The same for a whole answer, whose messages lack `content` beside calls."""
    about = {"object": "chat.completion", "created": plan.asked_at, "model": plan.model, "choices": []}
    lacking = {name: value for name, value in about.items() if not body.get(name) and body.get(name) != value}
    body.update(lacking)
    filled = bool(lacking)
    for at, choice in enumerate(chunk_choices(body)):
        holders = [(choice, {"index": at, "finish_reason": None})]
        if isinstance(choice.get("message"), dict):
            holders.append((choice["message"], {"content": None}))
        for holder, members in holders:
            gaps = absent(holder, members)
            holder.update(gaps)
            filled = filled or bool(gaps)
    return filled


class ItemIds(FrameEdit):
    """Gives every output item one id, the first it came under: SDKs join deltas, items and the final output by it.

    A read in which every frame has the `item_id` of the newest item costs two counts; one of frames about that item under
    other ids is cut at its ids (1 µs a frame at full speed, one by one 2.5). Ids may be 400 characters long.
    """

    inside = False

    def __init__(self, plan: Plan) -> None:
        self._pins: Dict[int, bytes] = {}  # output_index -> id, as JSON spells it between the quotes
        self._kinds: Dict[int, str] = {}  # output_index -> type of the item
        self._newest = 0  # what an event without an index is about
        self._spelled = b'"item_id":""'  # with the pin of the newest

    def touches(self, frames: bytes) -> bool:
        return frames.count(self._spelled) != frames.count(b"\ndata:") + frames.startswith(b"data:")

    def edit(self, frame: bytes) -> bytes:
        found = ITEM_ID.search(frame)
        if found is None:
            return self._items(frame) if b'"item"' in frame or b'"output"' in frame else frame
        own = found.group(1)
        if b"\\" in own:
            return frame
        pin = self._pinned(self._place(frame, found.end()), own)
        return frame if pin == own else frame[:found.start(1)] + pin + frame[found.end(1):]

    def edit_all(self, frames: bytes) -> Optional[bytes]:
        before, *parts = frames.split(b'"item_id":"')
        if self._newest not in self._pins or b"\n\n" in before or b"\r" in frames:
            return None
        rests = [self._behind_id(part, b'"output_index":%d' % self._newest) for part in parts]
        return None if None in rests else self._spelled[:-1].join([before, *rests])

    @staticmethod
    def _behind_id(part: bytes, index: bytes) -> Optional[bytes]:
        """What follows the id that a part begins with, up to the next frame's; None where it is not about that index."""
        end = part.find(b'"')
        blank = part.find(b"\n\n", end)
        at = part.find(index, end, blank)
        alike = at > 0 and part[at + len(index)] in b",}" and part.find(b"\n\n", blank + 2) < 0 and b"\\" not in part[:end]
        return part[end:] if alike else None

    def _place(self, frame: bytes, near: int = 0) -> int:
        """The `output_index` of a frame; looked for from `near` on first, an id may be long."""
        found = OUTPUT_INDEX.search(frame, near) or OUTPUT_INDEX.search(frame)
        return int(found.group(1)[:9]) if found is not None else self._newest

    def _pinned(self, place: int, own: bytes) -> bytes:
        pin = self._pins.setdefault(place, own)
        if place != self._newest or pin is own:
            self._newest, self._spelled = place, b'"item_id":"' + pin + b'"'
        return pin

    def _items(self, frame: bytes) -> bytes:
        """A frame with whole items: one under its index, or the final output, whose places are the indexes."""
        event = frame_json(frame) or {}
        response, output = event.get("response"), []
        if isinstance(event.get("item"), dict):
            place, item = self._place(frame), event["item"]
            self._kinds.setdefault(place, name_in(item, "type"))
            if isinstance(item.get("id"), str):
                self._pinned(place, dump_json(item["id"])[1:-1])
            output = [(place, item)]
        elif isinstance(response, dict) and isinstance(response.get("output"), list):
            output = [(place, item) for place, item in enumerate(response["output"]) if isinstance(item, dict)]
        differing = [(place, item) for place, item in output if self._differs(place, item)]
        edited = frame
        for place, item in differing:
            edited = self._renamed(edited, item, self._pins[place])
        return spelled(frame, edited, event) if differing else frame

    def _differs(self, place: int, item: Json) -> bool:
        """Whether an item stands under another id than that of its place; an item of another type is another item."""
        own, same = item.get("id"), self._kinds.get(place, "") in ("", name_in(item, "type"))
        return isinstance(own, str) and same and place in self._pins and dump_json(own)[1:-1] != self._pins[place]

    @staticmethod
    def _renamed(frame: bytes, item: Json, pin: bytes) -> bytes:
        own, item["id"] = dump_json(item["id"]), json.loads(b'"' + pin + b'"')
        found = id_member(frame, own)
        return frame[:found.start("id")] + b'"' + pin + b'"' + frame[found.end("id"):] if found else frame


# ---- the table ----------------------------------------------------------------

# Where each dialect says how long an answer may be.
OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def may_be_assembled(plan: Plan) -> bool:
    """Whether a whole answer was asked for of a model that limits the length of those."""
    return not plan.stream and plan.choices == 1 and bool(model_limit(plan.record or {}, "max_non_streaming_output_tokens"))


QUIRKS: Tuple[Quirk, ...] = (
    #     name              provider   dialects                     source
    Quirk("service_tier",   "copilot", (CHAT, RESPONSES, MESSAGES), "copilot-upstream 5.1, 6.1, 7.1",
          request=drop_service_tier),
    Quirk("store",          "copilot", (RESPONSES,),                "copilot-upstream 6.1",
          request=force_store_false),
    Quirk("$schema",        "copilot", (CHAT, RESPONSES, MESSAGES), "copilot-upstream 7.1, 5.1",
          request=drop_schema_keyword),
    Quirk("output_limit",   "copilot", (CHAT,),                     "copilot-upstream 5.1",
          request=name_output_limit),
    Quirk("least_output",   "copilot", (RESPONSES,),                "copilot-upstream 6.1",
          request=raise_output_limit),
    Quirk("body_betas",     "copilot", (MESSAGES,),                 "copilot-upstream 7.2",
          request=drop_body_betas),
    Quirk("billing",        "copilot", (CHAT, RESPONSES, MESSAGES), "copilot-upstream 7.1; user-pains P11",
          request=drop_billing_line),
    Quirk("tool_choice",    "copilot", (CHAT,),                     "copilot-upstream 5.1",
          request=name_tool_choice, applies=lambda plan: "gemini" in plan.model.lower()),
    # histories: what is folded or dropped comes before the pairing of calls, and that before what looks at the last turn
    Quirk("late_system",    "copilot", (MESSAGES,),                 "copilot-upstream 7.1; DESIGN 8",
          request=fold_late_systems, signs=frozenset(("system",))),
    Quirk("unsigned",       "copilot", (MESSAGES,),                 "copilot-upstream 7.1; user-pains P40",
          request=drop_unsigned_thinking, signs=frozenset(("unsigned",))),
    Quirk("blank_text",     "copilot", (CHAT, MESSAGES),            "copilot-upstream 7.1",
          request=drop_blank_texts, signs=frozenset(("blank",))),
    Quirk("pairs",          "copilot", (CHAT, RESPONSES, MESSAGES), "copilot-upstream 9.3; user-pains P22",
          request=pair_calls, signs=frozenset(("pairs",))),
    Quirk("arguments",      "copilot", (CHAT, MESSAGES),            "copilot-upstream 5.1",
          request=mend_arguments, signs=frozenset(("arguments",))),
    Quirk("tool_ids",       "copilot", (MESSAGES,),                 "copilot-upstream 7.1",
          request=spell_tool_ids, signs=frozenset(("tool_id",))),
    Quirk("prefill",        "copilot", (CHAT, MESSAGES),            "copilot-upstream 7.1; user-pains P48",
          request=answer_prefill, applies=lambda plan: is_claude(plan) and model_version(plan.model, "claude") >= (4, 6)),
    Quirk("item_ids",       "copilot", (RESPONSES,),                "copilot-upstream 6.4; user-pains P41",
          request=drop_item_ids, signs=frozenset(("item_id",))),
    Quirk("effort",         "copilot", (CHAT, RESPONSES, MESSAGES), "copilot-upstream 6.1, 7.1; DESIGN 8",
          request=clamp_effort),
    Quirk("thinking",       "copilot", (MESSAGES,),                 "copilot-upstream 7.1; DESIGN 8",
          request=fit_thinking),
    Quirk("hidden_thinking", "copilot", (MESSAGES,),                "DESIGN 8; copilot-upstream 7.1",
          request=ask_for_hidden_thinking, frames=HiddenThinking, whole=hide_thinking, applies=lambda plan: plan.road == "pass-through"),
    Quirk("sampling",       "copilot", (MESSAGES,),                 "copilot-upstream 7.1",
          request=drop_sampling),
    Quirk("cache_request",  "copilot", (MESSAGES,),                 "copilot-upstream 7.1",
          request=expand_cache_mark),
    Quirk("cache_inside",   "copilot", (MESSAGES,),                 "copilot-upstream 7.1",
          request=move_cache_marks, signs=frozenset(("cache_inside",))),
    Quirk("cache_scope",    "copilot", (MESSAGES,),                 "copilot-upstream 7.1; user-pains P12",
          request=drop_cache_scopes, signs=frozenset(("cache_mark",))),
    Quirk("cache_count",    "copilot", (MESSAGES,),                 "copilot-upstream 7.1",
          request=limit_cache_marks, signs=frozenset(("cache_mark",))),
    Quirk("include_usage",  "copilot", (CHAT,),                     "copilot-upstream 5.2",
          request=ask_for_usage, frames=UsageChunk, applies=lambda plan: plan.stream),
    Quirk("eager_input_streaming", "copilot", (MESSAGES,),          "copilot-upstream 7.1",
          request=drop_eager_streaming),
    Quirk("speed",          "copilot", (MESSAGES,),                 "copilot-upstream 7.1",
          request=drop_speed),
    Quirk("namespaces",     "copilot", (RESPONSES,),                "copilot-upstream 6.1",
          request=describe_namespaces),
    # Tools are set aside under the names their client knows, then renamed, then mended.
    Quirk("server_tools",   "copilot", (CHAT, RESPONSES, MESSAGES), "copilot-upstream 6.1, 7.1",
          request=drop_unhosted_tools),
    Quirk("tool_limit",     "copilot", (CHAT, RESPONSES, MESSAGES), "copilot-upstream 5.1; user-pains P51",
          request=limit_tools),
    Quirk("tool_references", "copilot", (MESSAGES,),                "copilot-upstream 7.1; DESIGN 8",
          request=tell_lost_references, signs=frozenset(("reference",))),
    Quirk("tool_names",     "copilot", (CHAT, RESPONSES, MESSAGES), "user-pains P52",
          request=shorten_tool_names, signs=frozenset(("tool_name",)), frames=RestoredNames, whole=restore_tool_names),
    Quirk("schema",         "copilot", (CHAT, RESPONSES, MESSAGES), "copilot-upstream 5.1, 7.1; user-pains P50",
          request=mend_tool_schemas),
    Quirk("images",         "copilot", (CHAT, RESPONSES, MESSAGES), "copilot-upstream 3.2, 4.2; user-pains P55, P56",
          request=limit_images, signs=frozenset(("image",))),
    Quirk("assembled",      "copilot", (CHAT, RESPONSES, MESSAGES), "copilot-upstream 7.1, last row",
          request=ask_for_stream, applies=may_be_assembled),
    # ---- answers: of relayed frames and bodies only; decoders read all of this anyway
    Quirk("choices",        "copilot", (CHAT,),                     "copilot-upstream 5.3, 5.5",
          frames=OneChoice, whole=merge_choices, applies=lambda plan: "claude" in plan.model and plan.choices == 1),
    Quirk("finish",         "copilot", (CHAT,),                     "copilot-upstream 5.4",
          frames=CallFinish, whole=finish_with_calls, applies=lambda plan: "gemini" in plan.model),
    Quirk("padding",        "copilot", (CHAT,),                     "copilot-upstream 5.5",
          frames=Padding, whole=drop_padding),
    Quirk("fields",         "copilot", (CHAT,),                     "copilot-upstream 5.2, 5.5",
          frames=ChunkFields, whole=fill_fields),
    Quirk("pinned_ids",     "copilot", (RESPONSES,),                "copilot-upstream 6.4",
          frames=ItemIds),
)


def quirks_for(plan: Plan) -> List[Quirk]:
    """The rows that concern this request, in order."""
    return [quirk for quirk in quirks_of(plan.provider, plan.upstream_dialect) if quirk.applies is None or quirk.applies(plan)]


@lru_cache(maxsize=64)
def quirks_of(provider: str, dialect: str) -> List[Quirk]:
    """The rows of a provider's dialect, in order."""
    return [quirk for quirk in QUIRKS if quirk.provider == provider and dialect in quirk.dialects]


def edit_request(body: Json, plan: Plan, quirks: Sequence[Quirk]) -> bool:
    """Applies the request edits in place; True when one of them changed the body."""
    before = len(plan.edits)
    signs: Optional[Set[str]] = None
    for quirk in quirks:
        if quirk.request is None:
            continue
        if quirk.signs:
            signs = history_signs(body, plan) if signs is None else signs
            if quirk.signs.isdisjoint(signs):
                continue
        if quirk.request(body, plan):
            plan.edits.append(quirk.name)
            signs = None if quirk.signs else signs  # the other rows change no history
    return len(plan.edits) > before


CHOICE_GAPS = (b'"finish_reason"', b'"index"')  # what `ChunkFields` fills beside a delta


class FrameForm:
    """What stands around the delta of most frames of a stream, before and after the edits.

    Frames of one stream mostly differ in their delta only: once one has been edited, its like are known by two counts
    (0.2 µs a frame at full speed) and edited by two replacements.
    """

    __slots__ = ("head", "tail", "seam", "around", "new_head", "new_tail", "filled")

    def __init__(self, old: Tuple[bytes, bytes], new: Tuple[bytes, bytes]) -> None:
        self.head, self.tail = old
        self.seam = self.tail + self.head
        self.around = self.head + self.tail
        self.new_head, self.new_tail = new
        self.filled = [name for name in CHOICE_GAPS if name in b"".join(new) and name not in self.around]

    def fits(self, frames: bytes) -> bool:
        """Whether all frames are of this form: each blank line inside is one where a tail meets a head. Both hold bare
        quotes, so neither stands inside a text."""
        return (frames.startswith(self.head) and frames.endswith(self.tail) and len(frames) >= len(self.around)
                and frames.count(self.seam) == frames.count(b"\n\n") - 1 and b"\r" not in frames
                and not (self.filled and any([name in frames for name in self.filled])))  # behind a delta one may have what the others lack

    def edited(self, frames: bytes) -> bytes:
        """Frames of this form in the new one."""
        if self.new_head != self.head:
            frames = frames.replace(self.head, self.new_head)
        return frames.replace(self.tail, self.new_tail) if self.new_tail != self.tail else frames


def around_delta(frame: bytes) -> Optional[Tuple[bytes, bytes, bytes]]:
    """(before, delta, behind) of a frame that holds one `delta`."""
    found = DELTA.findall(frame)
    if len(found) != 1:
        return None
    head, name, rest = frame.partition(found[0])
    try:
        text = rest.decode()
        size = len(text[:_scan_json(text, 0)[1]].encode())
    except (StopIteration, ValueError, RecursionError):
        return None
    return head + name, rest[:size], rest[size:]


def edits_of_answer(plan: Plan, quirks: Sequence[Quirk]) -> List[Quirk]:
    """The rows that concern an answer: beside a request edit only where it was made."""
    return [quirk for quirk in quirks if quirk.request is None or quirk.name in plan.edits]


class FramePatch:
    """Runs the frame edits over what is relayed of one stream; a read that nobody touches passes as it is."""

    LEARNINGS = 8  # forms in a row that nothing has fitted: where every frame has its own, they only cost

    def __init__(self, plan: Plan, quirks: Sequence[Quirk]) -> None:
        edits = [quirk.frames(plan) for quirk in edits_of_answer(plan, quirks) if quirk.frames is not None]
        self._inside = [edit for edit in edits if edit.inside]
        self._around = [edit for edit in edits if not edit.inside]
        self._forms: deque = deque(maxlen=3)  # newest first
        self._learnings = 0

    def feed(self, frames: bytes) -> bytes:
        """The frames to relay; whole frames only."""
        form = self.form_of(frames)
        if form is not None:
            return form.edited(frames)
        edited = self._at_once(frames)
        return edited if edited is not None else b"".join(map(self._frame, split_frames(frames)))

    def _at_once(self, frames: bytes) -> Optional[bytes]:
        """The frames edited without being taken apart, None where an edit must see them one by one."""
        if any([edit.touches(frames) for edit in self._inside]):
            return None
        edited: Optional[bytes] = frames
        for edit in self._around:
            if edited is not None and edit.touches(edited):
                edited = edit.edit_all(edited)
        if edited is not None and edited is not frames:
            self._learnings = self.LEARNINGS  # no form is needed, and none will fit
        return edited

    def form_of(self, frames: bytes) -> Optional[FrameForm]:
        """The known form that all these frames have, None where they have none or an edit must look inside."""
        for form in self._forms:
            if form.fits(frames):
                if self._inside and any([edit.touches(frames) for edit in self._inside]):
                    return None
                self._learnings = 0
                return form
        return None

    def learns(self) -> bool:
        """Whether forms may still be found: then a mixed read is worth cutting."""
        return self._learnings < self.LEARNINGS and bool(self._inside or self._around)

    def _frame(self, frame: bytes) -> bytes:
        for edit in self._inside:
            if edit.touches(frame):
                frame = edit.edit(frame)
        form = next((form for form in self._forms if form.fits(frame)), None)
        if form is not None:
            self._learnings = 0
            return form.edited(frame)
        edited = frame
        for edit in self._around:
            edited = edit.edit(edited) if edited else edited
        if edited and self._learnings < self.LEARNINGS:
            self._learn(frame, edited)
        return edited

    def _learn(self, frame: bytes, edited: bytes) -> None:
        """Keeps the form of a frame, and what was made of it; gives up where no form fits twice."""
        old = around_delta(frame)
        new = old if edited is frame else around_delta(edited)
        self._learnings += 1
        if self._learnings == self.LEARNINGS:
            self._forms.clear()
        elif old is not None and new is not None and old[1] == new[1]:
            self._forms.appendleft(FrameForm(old[::2], new[::2]))


class Passage:
    """What becomes of a stream that is passed through: junk taken out, metered, patched.

    Frames that differ only in their delta from one that went this way need not go it again: the form tells all.
    A read of several kinds is cut in halves until pieces are of one: at full speed the first read, which begins with the
    opening frames, would take 0.5 ms frame by frame.
    """

    PIECE_BYTES = 4096  # less is not cut

    def __init__(self, codec: Codec, trace_id: str, plan: Plan, quirks: Sequence[Quirk]) -> None:
        self.meter = codec.meter(trace_id)
        self._patch = FramePatch(plan, quirks)
        self._end_word = codec.end_word
        self._begun = False

    def feed(self, frames: bytes) -> bytes:
        """The frames to relay; whole frames only."""
        form = self._known(frames)
        if form is not None:
            self.meter.keep(frames)
            return form.edited(frames)
        frames = without_junk(frames, self._end_word)
        self.meter.keep(frames)
        return self._piece(frames)

    def _known(self, frames: bytes) -> Optional[FrameForm]:
        """The form of these frames, if it tells what becomes of them."""
        form = self._patch.form_of(frames)
        return form if form is not None and self.meter.passes(form.around) else None

    def _piece(self, frames: bytes) -> bytes:
        """What becomes of a part of a read."""
        form = self._known(frames)
        if form is not None:
            return form.edited(frames)
        if len(frames) > self.PIECE_BYTES and (not self._begun or self._patch.learns()):
            middle = frames.find(b"\n\n", len(frames) // 2) + 2
            if 1 < middle < len(frames):
                return self._piece(frames[:middle]) + self._piece(frames[middle:])
        self._begun = True
        return self._patch.feed(self.meter.relayed(frames))


# ---- mends ------------------------------------------------------------------
# What only upstream can tell: a refusal names a field, a beta, a signature, a tool. The request is mended exactly there
# and sent once more, and the lesson holds for the next requests of the same account and model.


class Mend(NamedTuple):
    """What a refusal teaches. `pattern` is searched in `MESSAGE [STATUS] [param PARAM]`, case aside; `learn(found, body, plan)` gives
    a hashable lesson or None; `cure(body, lesson, plan)` edits in place and says whether it did. `renewed`: what is learned
    takes the place of what was learned before, for both would be obeyed."""

    name: str
    dialects: Tuple[str, ...]
    source: str
    pattern: str
    learn: Callable[[Any, Json, Plan], Any]
    cure: Callable[[Json, Any, Plan], bool]
    renewed: bool = False
    provider: str = "copilot"


Lesson = Tuple[str, Any]  # (name of a mend, what it learned)

# Fields without which a request is none: a refusal that names one of them is about its value.
ESSENTIAL = frozenset(("model", "messages", "input", "role", "content", "type", "text", "tools", "system", "instructions", "id", "call_id",
                       "tool_use_id", "tool_call_id", "signature", "arguments", "output", "data", "source", "image_url", "function"))


def learn_path(found: Any, body: Json, plan: Plan) -> Optional[Tuple[str, ...]]:
    """The path of a refused field, places in lists left out: `tools.0.custom.foo` and `tools[3].foo` -> (tools, custom, foo)."""
    path = next((text for text in found.groups() if text), "")
    steps = tuple(step for step in re.findall(r"[^.\[\]]+", path) if not step.isdigit())
    required = steps[-1:] == ("max_tokens",) and plan.upstream_dialect == MESSAGES
    named = steps[-1:] == ("name",) and (steps[0] != "messages" or "tool_use" in steps or "tool_calls" in steps)
    return steps if steps and steps[-1] not in ESSENTIAL and not required and not named else None


def drop_path(value: Any, steps: Sequence[str]) -> bool:
    """Takes a field out wherever the path leads; a step that is no field names the type of what it stands for (`custom`,
    `ephemeral`, `tool_result`): objects of another type are not meant."""
    if isinstance(value, list):
        return any([drop_path(item, steps) for item in value])
    if not isinstance(value, dict) or not steps:
        return False
    if len(steps) == 1:
        return value.pop(steps[0], steps) is not steps
    if isinstance(value.get(steps[0]), (dict, list)):
        return drop_path(value[steps[0]], steps[1:])
    return value.get("type", "custom") == steps[0] and drop_path(value, steps[1:])


def drop_refused(body: Json, steps: Sequence[str], plan: Plan) -> bool:
    """The body without a field that was refused, told to the client."""
    if not drop_path(body, steps):
        return False
    name_dropped(plan, "field", [".".join(steps)])
    return True


def learn_names(found: Any, body: Json, plan: Plan) -> Optional[Tuple[str, ...]]:
    """(old, new) names of a field."""
    return found.group("old"), found.group("new")


def learn_betas(found: Any, body: Json, plan: Plan) -> Optional[Tuple[str, ...]]:
    """The betas a refusal names; a host that names none refuses them all."""
    named = [beta for beta in plan.betas if beta in found.string or beta == LONG_CONTEXT_BETA and "long context" in found.string.lower()]
    return tuple(named or (plan.betas if "beta flag" in found.string.lower() else ())) or None


def drop_betas(body: Json, betas: Sequence[str], plan: Plan) -> bool:
    """The request without these betas and the fields that need them."""
    refused = [beta for beta in plan.betas if beta in betas]
    for beta in refused:
        plan.betas.remove(beta)
        BETA_FIELDS[beta][1](body) if beta in BETA_FIELDS else None
        plan.dropped.append(beta)
    if DEFERRED_TOOLS in refused:
        limit_tools(body, plan)  # those that waited count now
    return bool(refused)


def learn_words(found: Any, body: Json, plan: Plan, place: Tuple[Optional[str], str], words: str) -> Optional[Tuple[str, ...]]:
    """The values a refusal allows in a place; None where it is about another one."""
    parent, name = place
    asked = (wire_object(body, parent) if parent else body).get(name)
    param = re.search(r"\[param (\S+)\]$", found.string)
    if found.group("refused") not in (None, asked) or param and param[1] != "-" and name.rpartition("_")[2] not in param[1]:
        return None
    return tuple(dict.fromkeys(re.findall(rf"\b({words})\b", found.group("allowed").lower()))) or None


def learn_efforts(found: Any, body: Json, plan: Plan) -> Optional[Tuple[str, ...]]:
    """The efforts a refusal allows."""
    return learn_words(found, body, plan, EFFORT_PLACES[plan.upstream_dialect], "none|minimal|low|medium|high|xhigh|max")


VERBOSITY_PLACES = {CHAT: (None, "verbosity"), RESPONSES: ("text", "verbosity")}


def learn_verbosities(found: Any, body: Json, plan: Plan) -> Optional[Tuple[str, ...]]:
    """The verbosities a refusal allows."""
    return learn_words(found, body, plan, VERBOSITY_PLACES[plan.upstream_dialect], "low|medium|high")


def set_verbosity(body: Json, allowed: Sequence[str], plan: Plan) -> bool:
    """A verbosity that is allowed in place of one that is not."""
    parent, name = VERBOSITY_PLACES[plan.upstream_dialect]
    place = wire_object(body, parent) if parent else body
    if place.get(name) in (None, *allowed):
        return False
    place[name] = allowed[0]
    return True


STATE_FIELDS = {"thinking": "signature", "redacted_thinking": "data", "reasoning": "encrypted_content"}


def held_state(holder: Any) -> Optional[str]:
    """The opaque state of a thinking block, a reasoning item or a Chat message."""
    state = holder.get(STATE_FIELDS.get(str(holder.get("type")), "reasoning_opaque")) if isinstance(holder, dict) else None
    return state if isinstance(state, str) else None


def learn_states(found: Any, body: Json, plan: Plan) -> Optional[Tuple[str, ...]]:
    """Digests of every state a body holds: a refusal names one and does not say what is wrong with the others."""
    held = [held_state(holder) for turn in turns_of(body) for holder in (turn, *wire_blocks(turn))]
    return tuple(sorted({state_digest(state) for state in held if state is not None})) or None


def is_refused(holder: Any, digests: FrozenSet[str]) -> bool:
    """Whether a state was refused."""
    state = held_state(holder)
    return state is not None and state_digest(state) in digests


def drop_states(body: Json, digests: Iterable[str], plan: Plan) -> bool:
    """The conversation without the state that was refused; turns that held nothing else go."""
    name = "input" if plan.upstream_dialect == RESPONSES else "messages"
    kept, changed, digests = [], False, frozenset(digests)
    for turn in body[name] if isinstance(body.get(name), list) else ():
        refused = [block for block in wire_blocks(turn) if is_refused(block, digests)] if isinstance(turn, dict) else []
        if refused:
            turn["content"] = [block for block in turn["content"] if not is_refused(block, digests)]
            changed = True
        if is_refused(turn, digests):
            changed = True
            if turn.get("type") == "reasoning":
                continue
            turn.pop("reasoning_opaque")
            turn.pop("reasoning_text", None)
        if not refused or turn["content"]:
            kept.append(turn)
    if changed:
        body[name] = kept
    return changed


def learn_item_state(found: Any, body: Json, plan: Plan) -> Optional[Tuple[str, ...]]:
    """`ids` where the refusal is about an id and items still have theirs; else the state itself is wrong. Raises
    ClientError 400 where that is a compaction: what it stands for is not here."""
    about_ids = re.search(r"item_id|item id|begins with|not found", found.string, re.I)
    if about_ids and any(turn.get("id") is not None for turn in turns_of(body)):
        return ("ids",)
    states = learn_states(found, body, plan)
    if states is None and any(turn.get("type") == "compaction" for turn in turns_of(body)):
        raise foreign_compaction()
    return states


def drop_item_state(body: Json, lesson: Sequence[str], plan: Plan) -> bool:
    """Items without their ids, or without the reasoning that was refused."""
    if lesson != ("ids",):
        return drop_states(body, lesson, plan)
    return any([turn.pop("id", None) is not None for turn in turns_of(body)])


def lose_state(body: Json, digests: Sequence[str], plan: Plan) -> bool:
    """Gemini's calls told as text where their state was refused."""
    return needs_state(plan.model) and any([drop_states(body, digests, plan), tell_bare_calls(body, plan)])


def tell_bare_calls(body: Json, plan: Plan) -> bool:
    """Calls of a Chat body without their state, and their results, as text: Gemini 3 answers 400 to a bare call."""
    names: Dict[str, str] = {}
    for turn in turns_of(body):
        calls = objects_in(turn.get("tool_calls"))
        if turn.get("role") == "assistant" and calls and not turn.get("reasoning_opaque"):
            functions = [wire_object(call, "function") for call in calls]
            names.update({str(call.get("id")): str(function.get("name")) for call, function in zip(calls, functions)})
            told = [f"[Called {function.get('name')} with {function.get('arguments') or '{}'}]" for function in functions]
            turn["content"] = "\n".join([text for text in (wire_text(turn.get("content")),) if text] + told)
            del turn["tool_calls"]
        elif turn.get("role") == "tool" and str(turn.get("tool_call_id")) in names:
            said = wire_text(turn.get("content"))
            turn.update(role="user", content=f"[Result of {names[str(turn.pop('tool_call_id'))]}:]\n{said}")
    return bool(names)


def tool_digest(tool: Json) -> str:
    """Tells a tool from one of the same name that was corrected since."""
    return state_digest(dump_json({name: value for name, value in tool.items() if name != "cache_control"}).decode())


def learn_tool(found: Any, body: Json, plan: Plan) -> Optional[Tuple[str, str]]:
    """(name, digest) of the tool a refusal names: by its place, the place inside a namespace, or its name."""
    said = {name: text for name, text in found.groupdict().items() if text}
    tools = objects_in(body.get("tools"))
    if "name" in said:
        wanted = (said["name"], said["name"].rpartition(".")[2])
        named = [tool for tool in all_tools(body) if tool_label(tool) in wanted]
    else:
        named = tools[int(said["at"]):][:1]
        named = objects_in(named[0].get("tools"))[int(said["inner"]):][:1] if named and "inner" in said else named
    return (tool_label(named[0]), tool_digest(named[0])) if named else None


def quarantine(body: Json, lesson: Tuple[str, str], plan: Plan) -> bool:
    """The request without a tool that upstream cannot take."""
    return set_aside(body, plan, lambda tool: tool_label(tool) == lesson[0] and tool_digest(tool) == lesson[1])


def set_aside(body: Json, plan: Plan, bad: Callable[[Json], bool]) -> bool:
    """The request without some tools, told to the client."""
    gone = [tool for tool in all_tools(body) if bad(tool)]
    if gone:
        take_out_tools(body, gone, plan)
    return bool(gone)


def learn_kind(found: Any, body: Json, plan: Plan) -> Optional[str]:
    """The type of a hosted tool that is refused."""
    kind = next(text for text in found.groups() if text)
    return kind if any(tool.get("type") == kind for tool in objects_in(body.get("tools"))) else None


def drop_kind(body: Json, kind: str, plan: Plan) -> bool:
    """The request without the tools of one type."""
    return set_aside(body, plan, lambda tool: tool.get("type") == kind)


def learn_cap(found: Any, body: Json, plan: Plan) -> Optional[int]:
    """The most output tokens a refusal allows."""
    return int(found.group("cap"))


def cap_output(body: Json, cap: int, plan: Plan) -> bool:
    """An output limit within what upstream allows, and a thinking budget below it."""
    names = [name for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")
             if isinstance(body.get(name), int) and body[name] > cap]
    body.update(dict.fromkeys(names, cap))
    if names and isinstance(body.get("thinking"), dict):
        fit_budget(body, plan.record or {})
    return bool(names)


def learn_images(found: Any, body: Json, plan: Plan) -> Optional[Tuple[str, ...]]:
    """Digests of the images a refusal means: the one at the place it names, all where one cannot be read and nobody says
    which, else the oldest up to half of all their bytes."""
    named = re.search(r"(?:messages|input)[.\[](\d+)\]?\.content[.\[](\d+)", found.string)
    payloads = list(filter(None, (image_payload(parts[at]) for parts, at in image_places(body))))
    if named:
        part = block_at(turns_of(body), int(named[1]), int(named[2]))
        payloads, spare = list(filter(None, (image_payload(parts[at]) for parts, at in _image_places([part])))), 0
    else:
        spare = 0 if re.search("process", found.group(), re.I) else sum(map(len, payloads)) // 2
    left = sum(map(len, payloads))
    gone: List[str] = []
    for payload in payloads:
        if left > spare:
            gone.append(state_digest(payload))
        left -= len(payload)
    return tuple(gone) or None


def block_at(turns: Sequence[Json], turn: int, block: int) -> Any:
    """The block at a place, None where there is none."""
    content = turns[turn].get("content") if turn < len(turns) else None
    return content[block] if isinstance(content, list) and block < len(content) else None


def drop_images(body: Json, digests: Iterable[str], plan: Plan) -> bool:
    """The request with a note in the place of these images; the vision header follows."""
    places, digests = list(image_places(body)), frozenset(digests)
    gone = [(parts, at) for parts, at in places if state_digest(image_payload(parts[at]) or "") in digests]
    for parts, at in gone:
        note_image(parts, at, "upstream could not take it")
    if gone:
        plan.caller.vision = len(gone) < len(places)
        name_dropped(plan, "image", [str(len(gone))])
    return bool(gone)


def learn_word(found: Any, body: Json, plan: Plan) -> str:
    """The one word a refusal names; for cures that need none, all of it."""
    return next((text for text in found.groups() if text), found.group())


def learn_thinking(found: Any, body: Json, plan: Plan) -> Optional[str]:
    """The other form of thinking than the one that was refused."""
    asked = body.get("thinking")
    return {"enabled": "adaptive", "adaptive": "enabled"}.get(asked.get("type")) if isinstance(asked, dict) else None


def change_thinking(body: Json, form: str, plan: Plan) -> bool:
    """Thinking in the form that is known."""
    if form == "adaptive":
        return think_adaptively(body, plan)
    if not think_by_budget(body, plan):
        return False
    fit_budget(body, plan.record or {})
    return True


EVERY = (CHAT, RESPONSES, MESSAGES)
REFUSED = r"(?:unsupported|invalid) value: '(?P<refused>[\w-]+)'"
ALLOWED = r"(?:supported \w+|valid \w+|should be|must be|one of|expected|allowed|supports)(?P<allowed>.*)"
FIELD = r"['\"`]?([\w$][\w$.\[\]-]*)['\"`]?"
MENDS: Tuple[Mend, ...] = (
    #    name            dialects               source
    Mend("thinking",     (MESSAGES,),           "copilot-upstream 7.1",
         r"thinking\.type\.enabled\W.*adaptive|adaptive thinking is not supported|thinking\.type\W.*(?:input should be 'enabled'|adaptive|not supported)",
         learn_thinking, change_thinking, renewed=True),
    Mend("signature",    (MESSAGES, CHAT),      "copilot-upstream 5.1, 7.1",
         r"signature\W* in \W*thinking\W* block|in \W*redacted_thinking\W* block|bound to a different conversation",
         learn_states, drop_states),
    Mend("item_state",   (RESPONSES,),          "copilot-upstream 6.4",
         r"encrypted (?:function output )?content|item_id did not match|item with id .{1,600} not found|does not belong to this connection"
         r"|expected an id that begins with|invalid_encrypted_content",
         learn_item_state, drop_item_state),
    Mend("lost_state",   (CHAT,),               "copilot-upstream 5.1",
         r"^invalid request body \[|thought.?signature", lambda found, body, plan: learn_states(found, body, plan) or (), lose_state),
    Mend("beta",         (MESSAGES,),           "copilot-upstream 7.2",
         r"anthropic-beta|beta flag|beta header|context beta", learn_betas, drop_betas),
    Mend("efforts",      EVERY,                 "user-pains P44",
         rf"(?:effort|\blevel\b|{REFUSED}).*?{ALLOWED}", learn_efforts, lambda body, efforts, plan: set_effort(body, plan, efforts), renewed=True),
    Mend("verbosity",    (CHAT, RESPONSES),     "user-pains P44",
         rf"(?:verbosity|{REFUSED}).*?{ALLOWED}", learn_verbosities, set_verbosity, renewed=True),
    Mend("no_effort",    EVERY,                 "clients.md, Claude Code",
         r"not support the effort parameter|effort\W+is not supported", learn_word, lambda body, _, plan: set_effort(body, plan, ())),
    Mend("renamed",      EVERY,                 "copilot-upstream 5.1",
         r"'(?P<old>\w+)' is not supported.*use '(?P<new>\w+)' instead", learn_names,
         lambda body, names, plan: renamed_field(body, *names)),
    Mend("output_cap",   EVERY,                 "Anthropic and OpenAI wordings",
         r"max_(?:completion_|output_)?tokens\W.*?(?:\d+ ?> ?|at most |less than or equal to )(?P<cap>\d{3,9})", learn_cap, cap_output, renewed=True),
    Mend("prefill",      (CHAT, MESSAGES),      "copilot-upstream 7.1",
         r"assistant message prefill|must end with a user message", learn_word, lambda body, _, plan: answer_prefill(body, plan)),
    Mend("late_system",  (MESSAGES,),           "copilot-upstream 7.1",
         r"role 'system' is not supported|unexpected role \W*system|role: input should be 'user' or 'assistant'", learn_word, lambda body, _, plan: fold_systems(body, False)),
    Mend("reference",    (MESSAGES,),           "copilot-upstream 7.1",
         r"tool reference '([^']+)' not found", learn_word,
         lambda body, name, plan: tell_references(body, lambda given: given == name)),
    Mend("hosted_tool",  EVERY,                 "copilot-upstream 6.1, 7.1",
         r"requested tool (\w+) is not supported|unsupported tool type:? '?(\w+)|tool(?: type)? '?(\w+)'? is not supported|invalid value: '(\w+)'\. supported values", learn_kind, drop_kind),
    Mend("images",       EVERY,                 "copilot-upstream 9.2; user-pains P55",
         r"failed to parse request.*\[413\]|request entity too large|payload too large|image exceeds|could not process image|too much media"
         r"|image dimensions exceed|too many images",
         learn_images, drop_images),
    Mend("field",        EVERY,                 "copilot-upstream 5.1, 6.1, 7.1; user-pains P43",
         rf"{FIELD}: extra inputs are not permitted|(?:unsupported|unknown|unrecognized)(?: request)? (?:parameter|argument|field|property)(?: supplied)?:? {FIELD}"
         rf"|^unsupported value: {FIELD} does not support|^{FIELD} is not supported|(?:parameter|field|property) {FIELD} is (?:not supported|unsupported|not allowed)"
         r"|`temperature` and `(top_p)` cannot both|`(temperature|top_p|top_k)` (?:may only|must be|is deprecated)|json: unknown field \"([^\"]+)\"",
         learn_path, drop_refused),
    Mend("tool",         EVERY,                 "user-pains P50",
         r"(?:\btools[.\[]|function_declarations\[)(?P<at>\d+)\]?(?!\]?\.function_declarations)(?:\.tools\[(?P<inner>\d+)\])?"
         r"(?:\.custom|\.function)?(?:\.(?:input_schema|parameters|name|description)\b|: (?!.*cache_control))"
         r"|^(?!messages\.|input\[|tool_choice).*?(?:schema|parameters)\b[^'\"`]{0,40}\b(?:function|tool)\W{1,3}(?P<name>[\w.-]+)",
         learn_tool, quarantine),
)


CURES = {row.name: row.cure for row in MENDS}
RENEWED = frozenset(row.name for row in MENDS if row.renewed)


def mend(body: Json, failure: Failure, plan: Plan) -> Optional[Lesson]:
    """Mends a body where a refusal says so, in place; None when it names nothing known, and the body is as before."""
    if failure.status not in (400, 413) or failure.kind not in ("request", "model"):
        return None
    said = f"{failure.message} [{failure.status}] [param {failure.param or '-'}]"
    for row in MENDS:
        if row.provider != plan.provider or plan.upstream_dialect not in row.dialects:
            continue
        found = re.search(row.pattern, said, re.I | re.S)
        lesson = row.learn(found, body, plan) if found else None
        if lesson is not None and row.cure(body, lesson, plan):
            plan.edits.append(f"mend:{row.name}")
            return row.name, lesson
    return None


def heed(body: Json, lessons: Iterable[Lesson], plan: Plan) -> bool:
    """Applies what earlier refusals taught; True when the body was changed."""
    changed = [name for name, lesson in lessons if CURES[name](body, lesson, plan)]
    plan.edits += [f"learned:{name}" for name in dict.fromkeys(changed)]
    return bool(changed)


###############################################################################
#                                   Tokens                                    #
###############################################################################
# What a text, an image, a document costs in tokens, without a vocabulary.

# Theory of operation. A regular expression cuts text about where the o200k pre-tokeniser does, and each piece costs
# what weights fitted once per tokenizer family say. The weights of adjacent letters measure how common a word looks,
# which is what decides whether a vocabulary holds it: " function" costs 1.0, random letters one token per two.
# Pieces repeat, so costs are remembered; long texts are sampled. Method, constants and accuracy are those of
# reference/token-estimation.md; `bench_tokens` in the test file measures them against real tokenizers.

# Texts longer than this are sampled (mean extra error 1 % at 500 KB), and the full pass works in pieces of this size:
# one C call stays near 1 ms, so that the streams of other threads go on.
WINDOW_CHARS = 16384
# Many short slices beat few long ones: one odd region weighs little. A word cut by a slice's edge counts twice.
SLICE_CHARS, SLICE_EDGE_TOKENS = 128, 0.6
# Of a long text a sixteenth is read, at least this much (mean extra error 2 %); of a whole request, whose count a client
# acts on and which may be of any length, so much (1.2 %).
SAMPLE_CHARS, REQUEST_SAMPLE_CHARS = 8192, 32768
# Bounds of what one family remembers: under 20 MB for hostile text too, about 10 MB for real text.
MEMO_PIECES, MEMO_PIECE_CHARS = 80_000, 24

LATIN_RANGES = "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
CJK_RANGES = "\u2e80-\ua4cf\uf900-\ufaff\ufe30-\uffef"
# Bounded repetitions keep pieces short, so that they repeat. 128 marks: rulers of 70 to 100 are common, and cost 1.
TOKEN_PIECES = "|".join((
    "[^%s0-9%s\r\n]?[%s]{1,64}" % (LATIN_RANGES, CJK_RANGES, LATIN_RANGES),  # a word with the mark before it
    "[0-9]{1,3}",
    "[%s]" % CJK_RANGES,
    " ?[^\\x00-\\x7f%s%s]{1,64}" % (LATIN_RANGES, CJK_RANGES),  # other scripts and symbols
    r" ?[!-/:-@\[-`{-~]{1,128}[\r\n/]{0,64}",  # marks
    r"\s{0,64}[\r\n]{1,64}|\s{1,64}(?!\S)|\s",  # blanks
    r"[\s\S]",
))
# Case of the letters of a word part, in the order of the case weights.
CASE_LOWER, CASE_TITLE, CASE_CAPS, CASE_SINGLE_CAPITAL, CASE_MIXED = range(5)

PIECE_MARKS = {mark: index for index, mark in enumerate("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")}
PREFIX_INDEX = {" ": 2, "\t": 3, **{mark: 4 + index for mark, index in PIECE_MARKS.items()}}
LATIN_LETTERS = frozenset(filter(str.isalpha, map(chr, [*range(0x41, 0x250), *range(0x1E00, 0x1F00)])))
# Latin-1 byte of a letter to its symbol in the pairs: 1 to 26, every other Latin letter 27; 0 is the edge of a word.
FOLDED_LETTERS = bytes([code & 31 if chr(code & 0xDF) in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" else 27 for code in range(256)])
# Block of another script by code point >> 7: fourteen are 128 wide, seven symbol blocks 256, then Hangul.
SCRIPT_BLOCKS = {
    **{start >> 7: index for index, start in enumerate((
        0x80, 0x380, 0x400, 0x580, 0x600, 0x680, 0x900, 0x980, 0xA00, 0xA80, 0xB80, 0xC00, 0xC80, 0xE00))},
    **{(start >> 7) + half: 14 + index for index, start in enumerate((
        0x2000, 0x2100, 0x2200, 0x2500, 0x2600, 0x2700, 0x2B00)) for half in (0, 1)},
    **dict.fromkeys(range(0xAC00 >> 7, (0xD7A3 >> 7) + 1), 21),
}
EMOJI_BLOCK, OTHER_BLOCK = 22, 23
# A repeated neighbour is cheap in general punctuation, mathematics, box drawing and emoji.
REPEATING_BLOCKS = frozenset((14, 16, 17, EMOJI_BLOCK))

# Weight of each pair of adjacent symbols (word edge, a to z, any other Latin letter: 28 x left + right), for all
# families: (code point - 80) x 0.06 x the family's scale.
LETTER_PAIRS = (
    r'P@@>:FCB===CCG?D<GEAB=A>EFF\BYRZTp[PqWjePWRcQgOXQaSX`YcgJ[kdi[mkd]H`WcmQ`o[ajX[onfiwD__\pOnyXUnKYa'
    r'pSufT_RTrvdbYc<`dnVXkbT_K_[Ll`a~f[q`edrVks6Y_\PbX]plXu[VVl_OPRWbXOY`igEZgeob[orRjUWhkIacVocO^dkgdd'
    r'>eqjo[[dL\s~[`ZWnY]]i]`neXgyBaZf}TldkWrje``Wo+joGUKu_gipN]WRZXPVv[xiY[TEPdXXUfSbfcZnDaypoTrf^n]Ucf'
    r'yVmih^ux\]lc[^>[VlSY[[ceUqji]mnShfjh~`jjl`;TNrQVTlOXgo]rVXjmuW[S`U~Vq^?SQW`PzzaWrl`biU\gwYbZjejX_m'
    r'=_cYS\fKm_k_asX]]xfXQbWnifphJTX_Wj=PtkTRdZM`]cQb^P]OhYPTDaofZUjn^[`|X]xL\O[\[Noyilw`F^e[l|gUOpQYUj'
    r'emi]itYNP~dZwPAVwV]R^Y~Uo]bcWPgw[_ZX_me[hi<Zu]bWSd\b~Xgec[^]YSVWf]\\Uq<_kb`ZbfFW~lee^O^y[\_PfIpHiZ'
    r'=gT\V\\br`mqHW]gXMWWVboqWgaiH[hdlOsGlQ_`s_tbe=nd}mjaajhXEdzhkTk{^QfknqPQb]faqqYMVgWo?8eLx]ic^XUsgb'
    r'z~XgrhSx|k[enl4egWjdjwSZmTdX\LgpdT_xmY[_`oFXhrf`^rhgfWlq[]el]vj[fiRriB\^VndxYuM^_^hccQzsfrlqiZqxFY')

# How each family prices pieces: scale of the letter pairs; direct costs (line ends, line ends with blanks, spaces,
# tabs, tabs with spaces, each further 16 blanks, line end after marks, kana, common / other / rare ideograph, CJK
# marks, each digit after the first); 181 packed weights, (code point - 80) / 10.
TOKEN_WEIGHTS = {
    "o200k": (1.001, (1.12, 1.0, 0.96, 0.92, 1.11, 0.04, -0.12, 0.6, 0.64, 1.23, 0.82, 0.88, 0.0),
        r'KR=KZRNWN<R>LS[QHAFPPHNLYbMUVO@_U_TTCEQHQQTahTP/JgMIQTQPMQRQNOPMHPVKMQGJTXOUWTB.=?CDJRTZ^)D'
        r'NW`QRQ[YIUZ]UOMMU[PPOKPGHRMVhUVRiOXLZS[)8;4.3+(O=GFO?7?V1PEJ>4ScTRWVWWXTUSTRTS?VdSINWjh=Xa'),
    "claude3": (1.056, (1.15, 1.69, 0.91, 0.59, 1.06, 0.94, 0.85, 0.72, 1.07, 1.25, 0.81, 1.35, 0.0),
        r'LAGOTOYFV<KNWNWSOQOPRUSHPUMVXPQXSQSUCSS8]X^`\aPPWAX`ZVRPNONJKMNONPSMZRVNQTJUNPF7>>IKORW[Z>J'
        r'KW[QSTWNKPUW[RPLX^TSRJTQMRNZfRYUgYOUXPbINDIGF@@RJKQQND9bB`aXLMj[VTWWXZ\eZYY_YZ;bX_\k[lgLN`'),
    "claude47": (0.838, (1.16, 1.41, 0.95, 0.5, 1.18, 0.6, 0.83, 0.72, 1.08, 1.3, 0.82, 1.28, 0.0),
        r'ZIYVOTVVUbQUZQSVWWWWRXUQY^U\\OWXX^]UFUl>Z\gwblPco:bQNPMOOQUUWTV[WP=?INOW`^eimtl|JJPKJQU\Y8H'
        r'R^j]STTXNJZZbSQNU[OSOOPLMRU`bOZUnUTWSR`KKDKFFBARJKMQNH>aDcaXKMlYVTWXXZ\eZYZ`YZBaXc^g[kcLOb'),
    "gemma3": (0.809, (1.07, 1.8, 0.83, 0.49, 1.32, 0.27, 1.01, 0.34, 0.54, 0.84, 0.81, 0.96, 1.0),
        r'LM@OVSWHU<QOYSSSOPPQQPQCKXOUSOQSNRQQDKO?ZZY^]]P0K<TYSPPNMMKHGLMJOPPJRKKKQXOWRQH25=HCIRTX^$?'
        r'JZcURVWOHRUVYPMLSUQOMLRNESPX]OVTfPQNUMa$7;<*-+1O>DGOA/1J(F?I=0PnURVWUVUUUSTSSQ1J[HBMWdhFX^'),
}


def softplus(z: float) -> float:
    return math.log1p(math.exp(z)) if z < 30 else z


def script_block(char: str) -> int:
    code = ord(char)
    return SCRIPT_BLOCKS.get(code >> 7, OTHER_BLOCK) if code < 0x1F000 else EMOJI_BLOCK


def letter_case(letters: str) -> int:
    if letters.islower():
        return CASE_LOWER
    if letters.isupper():
        return CASE_CAPS if len(letters) > 1 else CASE_SINGLE_CAPITAL
    return CASE_TITLE if letters[1:].islower() else CASE_MIXED


class PieceCosts(dict):
    """Costs of pieces of text in one tokenizer family. A missing one is worked out and remembered, within bounds.

    Many threads may share it: every step is one dict operation, and a clear loses only work.
    """

    def __init__(self, family: str) -> None:
        scale, self.direct, packed = TOKEN_WEIGHTS[family]
        w = [(ord(char) - 80) / 10 for char in packed]
        self.prefix, self.case = w[:36], w[36:51]
        self.length, self.caps_length, self.long_word = w[51:65], w[65:79], w[79]
        self.runs, self.mark_count, self.long_marks, self.many_runs = w[80:89], w[89:94], w[94], w[95]
        self.after_space, self.at_line_end, self.mark = w[96], w[97], w[98:130]
        self.first_block, self.block, self.repeated, self.no_space, self.has_capitals = w[130:154], w[154:178], *w[178:]
        rows = [LETTER_PAIRS[at:at + 28] for at in range(0, len(LETTER_PAIRS), 28)]
        self.pairs = [[(ord(char) - 80) * 0.06 * scale for char in row] for row in rows]
        # Compiled here and not at import: 10 ms that a start need not spend. `re` keeps it for the next family.
        self.cut = re.compile(TOKEN_PIECES).findall

    def total(self, text: str, start: int, end: int) -> float:
        return sum(map(self.__getitem__, self.cut(text, start, end)))

    def __missing__(self, piece: str) -> float:
        cost = self.price(piece)
        if len(piece) <= MEMO_PIECE_CHARS:
            if len(self) >= MEMO_PIECES:
                self.clear()
            self[piece] = cost
        return cost

    def price(self, piece: str) -> float:
        """Cost of a piece as TOKEN_PIECES cuts them: its last character tells the kind."""
        last = piece[-1]
        if last in LATIN_LETTERS:
            return self.price_word(piece)
        if last > "\x7f":
            is_cjk = "\u2e80" <= last <= "\ua4cf" or "\uf900" <= last <= "\ufaff" or "\ufe30" <= last <= "\uffef"
            return self.price_ideograph(piece) if is_cjk else self.price_script(piece)
        if last in "0123456789":
            return 1 + self.direct[12] * (len(piece) - 1)
        if piece.isspace():
            return self.price_blank(piece)
        return self.price_marks(piece) if last.isprintable() or len(piece) > 1 else 1.0

    def price_word(self, piece: str) -> float:
        """Each camelCase part by case, length and letter pairs; the mark before the word belongs to the first.

        Case weights come in three sets: a part after nothing or a space, after another mark, inside the word.
        """
        prefix = 0 if piece[0] in LATIN_LETTERS else PREFIX_INDEX.get(piece[0], 1)
        letters = piece[1:] if prefix else piece
        z, cases, cost = self.prefix[prefix], 0 if prefix in (0, 2) else 5, 0.0
        for part in (letters,) if letter_case(letters) != CASE_MIXED else self.camel_parts(letters):
            cost += 1 + softplus(z + self.score_part(part, cases))
            z, cases = 0.0, 10
        return cost

    def camel_parts(self, letters: str) -> Iterator[str]:
        """fooBARBaz -> foo, BARBaz: capitals then small letters, or capitals, as o200k parts them."""
        shape = "".join(["A" if letter.isupper() else "a" for letter in letters])
        return (letters[part.start():part.end()] for part in re.finditer("A*a+|A+", shape))

    def score_part(self, letters: str, cases: int) -> float:
        length, case = len(letters), letter_case(letters)
        z = self.case[cases + case] + (self.caps_length if case == CASE_CAPS else self.length)[min(length, 14) - 1]
        if length > 14:
            z += self.long_word * (length - 14) / 8
        row = self.pairs[0]
        for code in letters.encode("latin-1", "replace").translate(FOLDED_LETTERS):
            z += row[code]
            row = self.pairs[code]
        return z + row[0]

    def price_ideograph(self, piece: str) -> float:
        """The standard codecs serve as frequency table: GB 2312 level 1 holds the common ideographs."""
        kana, common, other, rare, mark = self.direct[7:12]
        if "\u3041" <= piece <= "\u30ff":
            return kana
        if not ("\u3400" <= piece <= "\u9fff" or "\uf900" <= piece <= "\ufaff"):
            return mark
        for codec in ("gb2312", "big5", "euc_jp"):
            try:
                row = piece.encode(codec)[0]
            except UnicodeEncodeError:
                continue
            return common if codec == "gb2312" and 0xB0 <= row <= 0xD7 else other
        return rare

    def price_script(self, piece: str) -> float:
        text = piece.lstrip(" ")
        blocks = [script_block(char) for char in text]
        z = self.first_block[blocks[0]] + sum([self.block[block] for block in blocks])
        if len(text) == len(piece):
            z += self.no_space
        if text != text.lower():
            z += self.has_capitals
        if not REPEATING_BLOCKS.isdisjoint(blocks):
            repeats = [a == b and block in REPEATING_BLOCKS for a, b, block in zip(text, text[1:], blocks)]
            z += self.repeated * sum(repeats)
        return 1 + softplus(z)

    def price_marks(self, piece: str) -> float:
        """The cost of a run of ASCII marks, with the space before and the line ends behind it."""
        marks = piece.strip(" \r\n")
        runs = [mark for mark, before in zip(marks, " " + marks) if mark != before]
        z = self.runs[min(len(runs), 9) - 1] + self.mark_count[min(len(marks), 5) - 1]
        z += sum([self.mark[PIECE_MARKS[mark]] for mark in runs if mark in PIECE_MARKS])
        if len(marks) > 5:
            z += self.long_marks * (len(marks) - 5) / 8
        if len(runs) > 9:
            z += self.many_runs * (len(runs) - 9)
        if piece[0] == " ":
            z += self.after_space
        if piece[-1] in "\r\n":
            return 1 + softplus(z + self.at_line_end) + self.direct[6]
        return 1 + softplus(z)

    def price_blank(self, piece: str) -> float:
        line_ends, mixed, spaces, tabs, tabs_and_spaces, further = self.direct[:6]
        if "\n" in piece or "\r" in piece:
            cost = mixed if piece.strip("\r\n") else line_ends
        elif "\t" in piece:
            cost = tabs_and_spaces if piece.strip("\t") else tabs
        else:
            cost = spaces
        return cost + further * ((len(piece) - 1) // 16)


def cut_windows(text: str) -> Iterator[Tuple[int, int]]:
    """(start, end) of consecutive stretches of at most WINDOW_CHARS, cut behind a line end where there is one."""
    start = 0
    while start < len(text):
        end = start + WINDOW_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield start, end
        start = end


class TokenEstimator:
    """Estimates how many tokens a text is. Holds what each family remembers; safe to share between threads."""

    def __init__(self) -> None:
        self._families: Dict[str, PieceCosts] = {}

    def text(self, text: str, family: str = "o200k", exact: bool = False, sample: Optional[int] = None) -> int:
        """Tokens of a text, 0 only for "". Above 16 K characters a sample decides, of `sample` characters if that is said,
        unless `exact` asks for it all.

        Takes any str, lone surrogates included. Join the texts of a request with line feeds and ask once. The full
        pass takes ten times as long; it is for an estimate within 5 % of a limit.
        """
        costs = self._families.get(family)
        if costs is None:
            costs = self._families[family] = PieceCosts(family)
        size = len(text)
        if size <= WINDOW_CHARS:
            total = costs.total(text, 0, size)
        elif exact or size <= (sample or 0):
            total = sum(costs.total(text, start, end) for start, end in cut_windows(text))
        else:
            slices = (sample or max(SAMPLE_CHARS, size // 16)) // SLICE_CHARS
            starts = [index * (size - SLICE_CHARS) // (slices - 1) for index in range(slices)]
            total = sum([costs.total(text, start, start + SLICE_CHARS) for start in starts])
            total = (total - SLICE_EDGE_TOKENS * slices) * size / (slices * SLICE_CHARS)
        return max(1, round(total)) if text else 0


def token_family(model: str) -> str:
    """The tokenizer a model bills with, a key of TOKEN_WEIGHTS. Copilot's own list says o200k for every model."""
    name = model.lower()
    if "claude" in name:
        return "claude47" if model_version(name, "claude") >= (4, 7) else "claude3"
    return "gemma3" if "gemini" in name or "gemma" in name else "o200k"


# What surrounds the text. Claude: a request of one user message costs 7 (to 4.6), 11 (4.7), 6 (later), a further
# message about 4, a system prompt nothing, the tools' own prompt 346 (forced: 313; Anthropic's table), scaled by the
# tokenizer for 4.7+ (an assumption that Calibration corrects). OpenAI: cookbook. Grok: what peers measured.
# Share: what is billed of the tools' compact JSON. OpenAI renders declarations (0.81 of the JSON for forty functions,
# counted by the cookbook's rules), Gemini's own counter takes names and descriptions (0.74).
# Calls and results: an estimate of id and wrapper.
FRAMING = (
    # name      since    request  message  tools  forced  share  call or result
    ("claude",  (4, 8),  2,       4,       520,   470,    1.0,   28),
    ("claude",  (4, 7),  7,       4,       520,   470,    1.0,   28),
    ("claude",  None,    3,       4,       346,   313,    1.0,   28),
    ("gemini",  None,    0,       0,       0,     0,      0.75,  0),
    ("grok",    None,    3,       3,       120,   120,    0.8,   8),
    ("",        None,    3,       3,       12,    12,     0.8,   8),
)


def framing_tokens(model: str, messages: int, tools_json: int = 0, forced: bool = False, calls: int = 0,
                   names: int = 0) -> int:
    """Tokens of a request beside its texts.

    `messages`: without the system prompt. `tools_json`: the estimate of all tools as compact JSON of name, description
    and schema, 0 for none. `forced`: the tool choice demands a call. `calls`: tool calls plus results in the history.
    `names`: messages with a `name` (OpenAI).
    """
    name = model.lower()
    _, _, request, message, once, once_forced, share, call = next(
        row for row in FRAMING if row[0] in name and (row[1] is None or model_version(name, row[0]) >= row[1]))
    tools = round(tools_json * share) + (once_forced if forced else once) if tools_json else 0
    return request + message * messages + tools + call * calls + names


# Claude shrinks an image to a longest edge and a number of 28-pixel patches (Anthropic, "Vision"); 5.5 was billed as if
# its edge were 2000. A shrunk image costs about 36 more, every image about 4 (a public table of billed counts).
CLAUDE_IMAGES = (
    # since    edge  patches
    ((5, 5),   2000, 4784),
    ((4, 7),   2576, 4784),
    ((0, 0),   1568, 1568),
)
# OpenAI models that cost 32-pixel patches x factor, shrunk to a budget. `low` is a 512-pixel picture.
OPENAI_PATCHES = (
    # name                         factor  budget of auto  high   original
    (r"gpt-(4\.?1|5)\b.*-nano",    2.46,   1536,           1536,  1536),
    (r"gpt-(4\.?1|5)\b.*-mini",    1.62,   1536,           1536,  1536),
    (r"\bo4-mini",                 1.72,   1536,           1536,  1536),
    (r"gpt-5\.[2-4]\b",            1.2,    2500,           2500,  10000),
    (r"gpt-5\.[5-9]\b",            1.2,    10000,          2500,  10000),
    (r"gpt-([6-9]|[1-3]\d)\b",     1.2,    None,           2500,  10000),
)
# The others cost a base and 512-pixel tiles of the picture fitted into 2048 x 2048, shortest side 768.
OPENAI_TILES = (
    # name               base  tile
    (r"4o-mini",         2833, 5667),
    (r"gpt-5(\.1)?\b",   70,   140),
    (r"\bo[13]\b",       75,   150),
    (r"computer-use",    65,   129),
    (r"",                85,   170),
)
GEMINI_3_IMAGES = {"low": 280, "medium": 560, "ultra_high": 2240}  # by resolution asked, not by size; else 1120


def count_patches(width: float, height: float, side: float, budget: Optional[int] = None) -> int:
    """Squares of `side` pixels that cover a picture, after OpenAI's rule for shrinking it to a budget of them."""
    across, down = width / side, height / side
    patches = math.ceil(across - 1e-6) * math.ceil(down - 1e-6)
    if budget is None or patches <= budget:
        return max(1, patches)
    shrink = math.sqrt(budget / (across * down))
    shrink *= min(max(1, math.floor(size * shrink)) / (size * shrink) for size in (across, down))
    return max(1, min(budget, math.ceil(across * shrink - 1e-6) * math.ceil(down * shrink - 1e-6)))


def claude_image_tokens(name: str, size: Optional[Tuple[int, int]]) -> int:
    if size is None:
        return 1568
    version = model_version(name, "claude")
    edge, budget = next((edge, budget) for since, edge, budget in CLAUDE_IMAGES if version >= since)
    shrink = min(1.0, edge / max(size))
    width, height = size[0] * shrink, size[1] * shrink
    shrunk = shrink < 1 or count_patches(width, height, 28) > budget
    return count_patches(width, height, 28, budget) + (40 if shrunk else 4)


def openai_image_tokens(name: str, size: Optional[Tuple[int, int]], detail: str) -> int:
    for pattern, factor, auto, high, original in OPENAI_PATCHES:
        if re.search(pattern, name):
            budget = {"low": 256, "high": high, "original": original}.get(detail, auto)
            return math.ceil(count_patches(size[0], size[1], 32, budget) * factor) if size else 765
    base, tile = next((base, tile) for pattern, base, tile in OPENAI_TILES if re.search(pattern, name))
    if detail == "low":
        return base
    if size is None:
        return base + 4 * tile  # a square picture; 765 for GPT-4o
    shrink = min(1.0, 2048 / max(size))
    shrink = min(shrink, 768 / min(size))
    return base + tile * count_patches(size[0] * shrink, size[1] * shrink, 512)


def gemini_image_tokens(name: str, size: Optional[Tuple[int, int]], detail: str) -> int:
    if model_version(name, "gemini") >= (3, 0):
        return GEMINI_3_IMAGES.get(detail, 1120)
    if size is None or max(size) <= 384:
        return 258
    return 258 * count_patches(size[0], size[1], min(max(min(size) / 1.5, 256), 768))


def image_tokens(model: str, size: Optional[Tuple[int, int]], detail: str = "auto") -> int:
    """Tokens that an image of (width, height) costs; None stands for an unknown size. Never by its bytes.

    `detail` is OpenAI's word, or Gemini's `media_resolution` with or without its prefix.
    """
    name, detail = model.lower(), detail.lower().replace("media_resolution_", "")
    if "claude" in name:
        return claude_image_tokens(name, size)
    if "gemini" in name or "gemma" in name:
        return gemini_image_tokens(name, size, detail)
    return openai_image_tokens(name, size, detail)


# A page of text (1500 to 3000 tokens in Anthropic's words), its picture (A4 at 150 dots per inch), and the size of a
# page in a file whose page objects are compressed.
PAGE_TEXT_TOKENS, PAGE_PIXELS, PAGE_BYTES = 2000, (1240, 1754), 50_000


def count_pages(data: bytes) -> int:
    """Page objects of a PDF, at least 1; by size where none is readable. Scans in steps of 1 MB (under 10 ms each)."""
    page, step, pages = re.compile(rb"/Type\s{0,8}/Page(?![A-Za-z])"), 1 << 20, 0
    for at in range(0, len(data), step):
        # A match belongs to the step it starts in; it may end up to 32 bytes later.
        pages += sum(match.start() < at + step for match in page.finditer(data, at, at + step + 32))
    return pages or max(1, len(data) // PAGE_BYTES)


def document_tokens(model: str, data: bytes) -> int:
    """Tokens that a PDF costs: its pages as text and as pictures; Gemini takes the pictures only."""
    pages, name = count_pages(data), model.lower()
    if "gemini" in name:
        return pages * (560 if model_version(name, "gemini") >= (3, 0) else 258)
    text = PAGE_TEXT_TOKENS * 7 // 5 if token_family(name) == "claude47" else PAGE_TEXT_TOKENS
    return pages * (text + image_tokens(name, PAGE_PIXELS))


# ---- whole requests ---------------------------------------------------------

# Whose prompts keep the thinking of earlier turns (Anthropic, "Extended thinking", 2026: Opus 4.5 and later, the others
# after 4.5). Elsewhere only that of the running tool loop is read (the same; OpenAI, "Reasoning models": items since
# the last user message).
KEEPS_THINKING = (("opus", (4, 5)), ("claude", (4, 6)))
# Characters per token of what only upstream can read: encrypted reasoning, redacted thinking (reference 7.2).
SEALED_CHARS = 6
# Bytes per token of a file that is no PDF (what Copilot's client reckons), and of sound and pictures that move: 128 kbit/s
# at Gemini's 32 tokens a second, 1 Mbit/s at its 263.
FILE_BYTES, MEDIA_BYTES = 8, 500


class PromptParts:
    """What a request holds, by the way it is counted. `media`: tokens of pictures, documents and what cannot be read."""

    __slots__ = ("model", "texts", "sealed", "media", "calls")

    def __init__(self, model: str) -> None:
        self.model = model
        self.texts: List[str] = []
        self.sealed = self.media = self.calls = 0

    def add(self, block: Block) -> None:
        """Takes a block in. The estimator never sees base64."""
        if isinstance(block, ToolCall):
            self.calls += 1
            self.texts.append(f"{block.name} {block.arguments}")
        elif isinstance(block, ToolResult):
            self.calls += 1
            for part in block.content:
                self.add(part)
        elif isinstance(block, ToolReference):
            self.texts.append(block.name)
        elif isinstance(block, (Text, Refusal)):
            self.texts.append(block.text)
        elif isinstance(block, Thinking):
            self._add_thinking(block)
        else:
            self._add_foreign(block)

    def _add_thinking(self, block: Thinking) -> None:
        """Claude reads the text, and only where there is none what its signature hides; the others what is encrypted."""
        readable = block.text and "claude" in self.model
        sealed = block.redacted or (None if readable else block.signature)
        self.sealed += len(sealed or "") // SEALED_CHARS
        if not sealed:
            self.texts.append(block.text)

    def _add_foreign(self, block: Any) -> None:
        if isinstance(block, Image):
            self._add_image(block.data or "", block.detail or "auto")
        elif isinstance(block, File):
            self._add_file(block)
        elif isinstance(block, Compaction):
            self.texts.append(block.summary or "")
            self.media += len(block.sealed or "") // SEALED_CHARS
        else:
            self._add_opaque(block.raw)

    def _add_image(self, data: str, detail: str) -> None:
        self.media += image_tokens(self.model, image_size_base64(data) if data else None, detail)

    def _add_file(self, file: File) -> None:
        """A PDF by its pages, one page where only its address is known; plain text as text."""
        kind, data = file.media_type or "application/pdf", file.data or ""
        if file.text is not None:
            self.texts.append(file.text)
        elif kind == "application/pdf" or not data:
            self.media += document_tokens(self.model, decode_base64(data))
        elif kind.startswith("text/"):
            self.texts.append(decode_base64(data).decode("utf-8", "replace"))
        else:
            self.media += len(data) * 3 // 4 // (MEDIA_BYTES if kind.startswith(("audio/", "video/")) else FILE_BYTES)

    def _add_opaque(self, raw: Any) -> None:
        """The texts inside a block of one dialect only; its payloads as picture, sound or sealed state."""
        for name, text in strings_of(raw):
            if name in ("data", "file_data") and image_size_base64(text):
                self._add_image(text, "auto")
            elif name in ("data", "file_data"):
                self.media += 1 + len(text) * 3 // 4 // MEDIA_BYTES
            elif name in ("encrypted_content", "signature"):
                self.media += len(text) // SEALED_CHARS
            elif name != "type":
                self.texts.append(text)


def strings_of(value: Any) -> Iterator[Tuple[str, str]]:
    """(name of the field, text) of every string in a JSON value, however deep; without names of its own a list's name."""
    left = [("", value)]
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += reversed(list(value.items()))
        elif isinstance(value, list):
            left += [(name, item) for item in reversed(value)]
        elif isinstance(value, str):
            yield name, value


def first_thinking(request: Request, model: str) -> int:
    """The index of the message from which on upstream reads thinking.

    A client may say it itself: `{"edits":[{"type":"clear_thinking_20251015","keep":"all"|{"type":"thinking_turns","value":1}}]}`
    """
    said = [edit.get("keep") for edit in want_edits(request) if str(edit.get("type")).startswith("clear_thinking")]
    since = next((since for word, since in KEEPS_THINKING if word in model), None)
    if "all" in said or not said and since is not None and "claude" in model and model_version(model, "claude") >= since:
        return 0
    holds = [{type(block) for block in message.content} for message in request.messages]
    loop = max((index for index, message in enumerate(request.messages) if message.role == "user" and ToolResult not in holds[index]), default=0)
    turns = [index for index, kinds in enumerate(holds) if Thinking in kinds]
    kept = count_or_zero(said[0] or {"value": 1}, "value") if said else 0  # one turn where it does not say
    return min(loop, turns[-min(kept, len(turns))]) if kept and turns else loop


def want_edits(request: Request) -> List[Json]:
    """The edits of `context_management` as Messages has it."""
    management = (request.extra or {}).get("context_management")
    edits = management.get("edits") if isinstance(management, dict) else None
    return [edit for edit in edits if isinstance(edit, dict)] if isinstance(edits, list) else []


def counted_tools(request: Request, model: str) -> str:
    """The tools the model sees, as lines of compact JSON. One that a search can load later is seen once it was found."""
    finders = ("search", "server") if "claude" in model else ("search",)
    hides = any(tool.kind in finders and "tool_search" in tool.name for tool in request.tools)
    found = hides and {name for message in request.messages for block in message.content for name in found_tools(block)}
    seen = [tool for tool in request.tools if not (hides and tool.deferred and tool.name not in found)]
    return "\n".join(json_text({"name": tool.name, "description": tool.description or "", "input_schema": tool.schema or tool.grammar or {}})
                     for tool in seen)


def json_text(value: Json) -> str:
    """Compact JSON as the text it is estimated as."""
    return dump_json(value).decode("utf-8", "surrogatepass")


def found_tools(block: Block) -> Iterator[str]:
    """The names of tools that a block says were found."""
    if isinstance(block, ToolReference):
        yield block.name
    elif isinstance(block, ToolResult):
        for part in block.content:
            yield from found_tools(part)
    elif isinstance(block, Opaque):
        yield from (text for name, text in strings_of(block.raw) if name == "tool_name")


def measure_request(estimator: TokenEstimator, request: Request, model: str, multiplier: Optional[float] = None,
                    sample: int = REQUEST_SAMPLE_CHARS) -> Tuple[int, int]:
    """(tokens of texts, tools and framing; tokens of media) of a request, as upstream will read it.

    `multiplier`: the operator's own factor of o200k for Claude, in place of the family's weights. `sample`: characters that
    decide where there are more.
    """
    model = model.lower()
    family, scale = ("o200k", multiplier) if multiplier and "claude" in model else (token_family(model), 1.0)
    parts, thinks = PromptParts(model), first_thinking(request, model)
    for index, message in enumerate(request.messages):
        for block in message.content:
            if index >= thinks or not isinstance(block, Thinking):
                parts.add(block)
    if request.output is not None and request.output.schema:
        parts.texts.append(json_text(request.output.schema))
    turns = sum(message.role in ("user", "assistant") for message in request.messages)
    names = sum("name" in (message.extra or {}) for message in request.messages) if family == "o200k" else 0
    forced = request.tool_choice is not None and request.tool_choice.mode in ("required", "tool")
    tools = round(estimator.text(counted_tools(request, model), family, sample=sample) * scale)
    framing = framing_tokens(model, turns, tools, forced, parts.calls, names)
    text = estimator.text("\n".join(parts.texts), family, sample=sample)
    return max(1, round(text * scale) + parts.sealed + framing), parts.media


class Calibration:
    """What answers taught about estimates: per model, how much more (or less) was billed than estimated.

    A running mean of actual / estimated, in which a request weighs by its size: what a small one adds is framing, and the
    counts that matter are those of large ones. It absorbs unknown framing, tools' prompts and tokenizers. Lock-free: every
    step is one dict operation, and of two threads that learn at once one lesson may be lost.
    """

    # An answer's weight (reference 8: 0.1 to 0.3), the bounds of a ratio, and the size below which nothing is learned.
    WEIGHT, LOWEST, HIGHEST, MIN_TOKENS, MAX_MODELS = 0.3, 0.6, 1.8, 500, 500
    # A client with a count too low compacts too late, one that is some percent too high costs it nothing: in sessions of
    # real texts (60 turns, true counts) 42 % of all counts after the fifth turn fell short of the truth without this
    # margin, 0.1 % with it, and 0.7 % were more than 10 % too high.
    MARGIN = 0.04

    def __init__(self) -> None:
        self._learned: Dict[str, Tuple[float, float]] = {}  # model -> fading sums of (actual, estimated) tokens

    def learn(self, model: str, estimated: int, actual: int) -> None:
        """One more answer of a model."""
        if min(estimated, actual) <= self.MIN_TOKENS:
            return
        if len(self._learned) >= self.MAX_MODELS and model not in self._learned:
            self._learned.clear()  # names are a client's to invent
        ratio = min(max(actual / estimated, self.LOWEST), self.HIGHEST)
        billed, guessed = self._learned.get(model, (0.0, 0.0))
        fade = 1 - self.WEIGHT
        self._learned[model] = billed * fade + ratio * estimated, guessed * fade + estimated

    def factor(self, model: str) -> float:
        """What to multiply an estimate with, margin included; 1 for a model that taught nothing."""
        billed, guessed = self._learned.get(model, (0.0, 0.0))
        return billed / guessed * (1 + self.MARGIN) if guessed else 1.0

    def apply(self, model: str, estimated: int) -> int:
        """The corrected estimate, rounded up."""
        return math.ceil(estimated * self.factor(model))


class PromptCounter:
    """Input tokens of whole requests: estimated, and corrected by what upstream billed. Shared between threads."""

    def __init__(self, estimator: TokenEstimator, calibration: Calibration) -> None:
        self._estimator = estimator
        self._calibration = calibration

    def count(self, request: Request, model: str, multiplier: Optional[float] = None, sample: int = REQUEST_SAMPLE_CHARS) -> int:
        """Input tokens of a request. An operator's `multiplier` for Claude is taken at its word: nothing learned changes it."""
        text, media = measure_request(self._estimator, request, model, multiplier, sample)
        if multiplier and "claude" in model.lower():
            return text + media
        return self._calibration.apply(model, text) + media

    def learn(self, request: Request, model: str, billed: int) -> None:
        """Compares a request with what was billed for it, where all of it can be seen."""
        if billed <= Calibration.MIN_TOKENS or any(tool.kind == "server" for tool in request.tools) \
                or (request.extra or {}).get("previous_response_id"):
            return
        text, media = measure_request(self._estimator, request, model)
        if not media:
            self._calibration.learn(model, text, billed)


###############################################################################
#                                   Catalog                                   #
###############################################################################
# Which codec speaks a dialect, what the account's models are called and can
# do, and what a request will become.

CODECS: Dict[str, Codec] = {CHAT: ChatCodec(), RESPONSES: ResponsesCodec(), MESSAGES: MessagesCodec(), GEMINI: GeminiCodec()}

# ---- model records ----------------------------------------------------------

# Upstream's endpoint names, slashes, case and /v1 prefix removed, and what they mean here.
ENDPOINT_DIALECTS = {"chat/completions": CHAT, "responses": RESPONSES, "messages": MESSAGES, "embeddings": EMBEDDINGS}
# The path a client would use; for the message that names an endpoint which works.
DIALECT_PATHS = {CHAT: "/v1/chat/completions", RESPONSES: "/v1/responses", MESSAGES: "/v1/messages",
                 EMBEDDINGS: "/v1/embeddings"}

HOST_OR_QUERY = re.compile(r"^[a-z]+://[^/]*|[?#].*$")


def endpoint_dialects(record: Json) -> List[str]:
    """The dialects a model is served in over HTTP; without metadata chat, or embeddings for that type."""
    listed = record.get("supported_endpoints")
    names = [name for name in listed if isinstance(name, str) and name.strip()] if isinstance(listed, list) else []
    if not names:
        return [EMBEDDINGS if model_capability(record, "type") == "embeddings" else CHAT]
    return list(dict.fromkeys(dialect for dialect in map(endpoint_dialect, names) if dialect))


@lru_cache(maxsize=64)
def endpoint_dialect(name: str) -> Optional[str]:
    """The dialect of an endpoint: "/v1/messages", "messages/" and "https://…/v1/messages" all mean messages;
    "ws:/responses" is no HTTP endpoint."""
    path = HOST_OR_QUERY.sub("", name.strip().lower()).strip("/")
    return ENDPOINT_DIALECTS.get(path[3:] if path.startswith("v1/") else path)


def usable_prompt_cap(record: Json) -> Optional[int]:
    """How many prompt tokens really fit: upstream's own cap, else window less output, else the window."""
    cap, window, output = (model_limit(record, name) for name in
                           ("max_prompt_tokens", "max_context_window_tokens", "max_output_tokens"))
    return cap or (window - output if window and output and window > output else window)


def knows_long_context(record: Json) -> bool:
    """Whether a model takes a million tokens when asked to; variants named `-1m` always do."""
    window = model_limit(record, "max_context_window_tokens")
    return window is not None and window >= 1_000_000 and not str(record.get("id")).endswith("-1m")


def is_offered(record: Json) -> bool:
    """Whether lists show the model: upstream's picker does, or it makes embeddings, and no policy switched it off."""
    policy = record.get("policy")
    if isinstance(policy, dict) and policy.get("state") == "disabled":
        return False
    return record.get("model_picker_enabled") is True or model_capability(record, "type") == "embeddings"


def model_entry(record: Json, whole: bool = False) -> Json:
    """One entry of GET /v1/models: the keys OpenAI and Anthropic clients read, and the sizes.

    {"id","object":"model","type":"model","created":0,"created_at","owned_by","display_name","context_window",…}
    `whole` adds what GET /v1/models/{id} shows besides: capabilities and endpoints.
    """
    window = model_limit(record, "max_context_window_tokens")
    entry: Json = {"id": record["id"], "object": "model", "type": "model", "created": 0,
                   "created_at": "1970-01-01T00:00:00.000Z", "owned_by": record.get("vendor") or "",
                   "display_name": record.get("name") or record["id"]}
    sizes = {"context_window": window, "max_input_tokens": usable_prompt_cap(record),
             "max_output_tokens": model_limit(record, "max_output_tokens")}
    entry.update((name, value) for name, value in sizes.items() if value)
    entry["supports_1m_context"] = bool(window and window > 200_000)
    if whole:
        entry["capabilities"] = record.get("capabilities")
        entry["supported_endpoints"] = record.get("supported_endpoints")
    return entry


CODEX_INSTRUCTIONS = "You are Codex, a coding agent that works in the user's terminal. Be precise, safe and helpful."


def codex_model(record: Json) -> Json:
    """One entry of GET /v1/models?client_version=…, Codex's own catalogue (console reference B.3; clients.md)."""
    listed = model_capability(record, "supports", "reasoning_effort")
    efforts = [effort for effort in listed if isinstance(effort, str)] if isinstance(listed, list) else []
    policy, sees, window = record.get("policy"), model_capability(record, "supports", "vision") is True, usable_prompt_cap(record)
    talks = str(record["id"]).startswith("gpt-5")
    return {
        "slug": record["id"], "display_name": text_or_none(record.get("name")) or record["id"],
        "description": text_or_none(policy.get("terms")) or "" if isinstance(policy, dict) else "",
        "default_reasoning_level": "medium" if "medium" in efforts or not efforts else efforts[0],
        "supported_reasoning_levels": [{"effort": effort, "description": f"{effort} effort"} for effort in efforts],
        "shell_type": "shell_command", "visibility": "list" if record.get("model_picker_enabled") is True else "hide",
        "supported_in_api": True, "priority": 1, "base_instructions": CODEX_INSTRUCTIONS,
        "support_verbosity": talks, "default_verbosity": "low" if talks else None, "apply_patch_tool_type": "freeform",
        "web_search_tool_type": "text_and_image" if sees else "text", "truncation_policy": {"mode": "tokens", "limit": 10000},
        "supports_parallel_tool_calls": model_capability(record, "supports", "parallel_tool_calls") is not False,
        "context_window": window, "max_context_window": window, "effective_context_window_percent": 95,
        "input_modalities": ["text", "image"] if sees else ["text"], "supports_reasoning_summary_parameter": True,
        "default_reasoning_summary": "auto", "supports_image_detail_original": sees, "experimental_supported_tools": [],
        "supports_search_tool": True, "use_responses_lite": False, "include_skills_usage_instructions": True,
        "include_plugin_usage_instructions": True, "include_apps_usage_instructions": True}


def gemini_model(record: Json) -> Json:
    """One entry of GET /v1beta/models."""
    thinks = any(model_capability(record, "supports", name) for name in ("reasoning_effort", "adaptive_thinking", "max_thinking_budget"))
    return gemini_model_entry(record["id"], text_or_none(record.get("name")), text_or_none(record.get("version")), None,
                              usable_prompt_cap(record), model_limit(record, "max_output_tokens"),
                              EMBEDDINGS in endpoint_dialects(record), thinks)


# ---- names ------------------------------------------------------------------

LONG_CONTEXT = "[1m]"
DATE_SUFFIX = re.compile(r"-(?:20\d{6}|20\d\d-\d\d-\d\d)$")
NAME_SUFFIX = re.compile(r"-(?:latest|thinking)$")
VERSION_DASH = re.compile(r"(?<=\d)-(?=\d{1,2}(?:\D|$))")
# claude-3.5-sonnet -> claude-sonnet-3.5
REVERSED_CLAUDE = re.compile(r"^claude-(\d+(?:\.\d+)?)-([a-z]+)(.*)$")
CLAUDE_FAMILIES = ("fable", "opus", "sonnet", "haiku")


def plain_name(name: str) -> str:
    """The one spelling that stands for all spellings of a model: `claude-3-5-sonnet-20241022` and
    `Claude-Sonnet-3.5-latest` both become `claude-sonnet-3.5` (copilot-upstream 4.6, gateway-features 5.5)."""
    name = name.strip().lower()
    name = NAME_SUFFIX.sub("", DATE_SUFFIX.sub("", NAME_SUFFIX.sub("", name)))
    name = VERSION_DASH.sub(".", name)
    return REVERSED_CLAUDE.sub(r"claude-\2-\1\3", name)


def parse_mappings(table: Any) -> Tuple[Dict[str, str], List[Tuple[str, str]]]:
    """(exact, prefixes longest first) of a mapping table; `name*` is a prefix. Entries of wrong types are ignored."""
    pairs = [(key.strip(), value.strip()) for key, value in table.items()
             if isinstance(value, str) and key.strip() and value.strip()] if isinstance(table, dict) else []
    prefixes = sorted(((key[:-1], value) for key, value in pairs if key.endswith("*")), key=lambda pair: -len(pair[0]))
    return {key: value for key, value in pairs if not key.endswith("*")}, prefixes


def map_name(name: str, exact: Dict[str, str], prefixes: Sequence[Tuple[str, str]]) -> Optional[str]:
    """The mapping's target for a name: exact before the longest prefix, the full name before the one without `[1m]`."""
    for spelling in (name, name[:-len(LONG_CONTEXT)]) if name.endswith(LONG_CONTEXT) else (name,):
        if spelling in exact:
            return exact[spelling]
        for prefix, target in prefixes:
            if spelling.startswith(prefix):
                return target
    return None


class Catalogue:
    """The account's models as upstream listed them: an immutable value, replaced whole on refresh.

    `document` is upstream's own; `records` are keyed by id, duplicates merged (first wins, endpoints joined).
    """

    def __init__(self, document: Json) -> None:
        self.document = document
        self.records: Dict[str, Json] = {}
        for record in document.get("data") or () if isinstance(document.get("data"), list) else ():
            if isinstance(record, dict) and isinstance(record.get("id"), str) and record["id"]:
                self._add(record)
        self._plain: Dict[str, str] = {}
        for name in sorted(self.records, key=lambda known: plain_name(known) != known):
            self._plain.setdefault(plain_name(name), name)

    def _add(self, record: Json) -> None:
        known = self.records.setdefault(record["id"], record)
        if known is not record and isinstance(record.get("supported_endpoints"), list):
            listed = known.get("supported_endpoints")
            joined = list(listed) if isinstance(listed, list) else []
            joined.extend(name for name in record["supported_endpoints"] if name not in joined)
            self.records[record["id"]] = {**known, "supported_endpoints": joined}

    def offered(self) -> List[Json]:
        """The records that lists show."""
        return [record for record in self.records.values() if is_offered(record)]

    def find(self, name: str) -> Optional[Tuple[str, Optional[str]]]:
        """(id, reason) of the model a name means; the reason is None when the name is the id. None: nobody has it."""
        if name in self.records:
            return name, None
        if name.lower().endswith(LONG_CONTEXT):
            base = self.find(name[:-len(LONG_CONTEXT)])
            if base is None:
                return None
            long = self.find(base[0] + "-1m")
            return (long or base)[0], "alias"
        plain = plain_name(name)
        found = self._plain.get(plain) or self._newest(plain)
        return (found, "alias") if found else None

    def _newest(self, family: str) -> Optional[str]:
        """`opus`, `sonnet` …: the newest offered Claude of that family."""
        if family not in CLAUDE_FAMILIES:
            return None
        members = [record["id"] for record in self.offered()
                   if re.fullmatch(rf"claude-{family}-\d+(\.\d+)?", plain_name(record["id"]))]
        return max(members, default=None, key=lambda name: model_version(plain_name(name), family))


# ---- what the model can do ---------------------------------------------------


REASONING_OUTPUT = 12800  # what a model that reasons gets at least towards Responses (DESIGN 8, "Output limits")


def fitted(request: Request, record: Optional[Json], upstream: str, fill: bool) -> Request:
    """The request within the model's limits: output tokens, and thinking in the form and strength it knows.

    `fill`: a missing output limit becomes the model's own (Messages needs one). Responses counts reasoning as output: there
    the limit is raised while the model reasons, and the answer cut by us.
    """
    if record is None:
        return request
    limit = model_limit(record, "max_output_tokens")
    tokens = request.max_tokens if request.max_tokens is not None or not (fill or upstream == MESSAGES) else limit
    tokens = min(tokens, limit) if tokens and limit else tokens
    reasoning = fitted_reasoning(request.reasoning, record, upstream, tokens)
    if upstream == RESPONSES and tokens and is_reasoning(reasoning, record):
        tokens = max(tokens, min(REASONING_OUTPUT, limit or REASONING_OUTPUT))
    return replace(request, max_tokens=tokens, reasoning=reasoning)


def is_reasoning(asked: Optional[Reasoning], record: Json) -> bool:
    """Whether the model will reason: asked to, or because it does so unless told otherwise."""
    if asked is not None and (asked.mode == "off" or asked.effort):
        return asked.mode != "off" and asked.effort != "none"
    return bool(model_capability(record, "supports", "reasoning_effort"))


def fitted_reasoning(asked: Optional[Reasoning], record: Json, upstream: str, tokens: Optional[int] = None) -> Optional[Reasoning]:
    """Thinking as the model can: adaptive where it is, a budget within its bounds (and the `tokens` of the answer), an effort
    of its list; None for a model that does not think."""
    efforts = model_capability(record, "supports", "reasoning_effort")
    efforts = efforts if isinstance(efforts, list) else []
    adaptive = model_capability(record, "supports", "adaptive_thinking") is True
    most = model_capability(record, "supports", "max_thinking_budget")
    if asked is None or not efforts and not adaptive and not most:
        return None
    stated = asked.budget if asked.budget and asked.budget > 0 else None
    effort = asked.effort or (effort_of_budget(stated) if stated else None)
    effort = clamped_effort(effort, efforts) if efforts and effort else (effort if adaptive else None)
    least = model_capability(record, "supports", "min_thinking_budget") or 1024
    if upstream != MESSAGES:
        if asked.mode == "off":  # `none` is an effort like any other: only what the model lists can be said
            return Reasoning(effort=clamped_effort("none", efforts)) if efforts else None
        limit = min(most or 0, (model_limit(record, "max_output_tokens") or most or 0) - 1)
        return replace(asked, effort=effort, budget=max(least, min(stated, limit)) if stated and not effort and limit > 0 else None)
    if asked.mode == "off":
        return replace(asked, effort=effort, budget=None if effort else asked.budget)
    if asked.mode is None and not stated and asked.effort in (None, "none") and not effort:
        return None
    if adaptive:
        return replace(asked, mode="adaptive", effort=effort, budget=None, visible=True)
    budget = stated or budget_of_effort(asked.effort or "medium")
    if not stated and tokens and budget >= tokens:
        budget = tokens // 2  # half is left to the answer
    return replace(asked, mode="on", effort=None, budget=max(least, min(budget, most or budget)), visible=None)


def lacking_powers(record: Optional[Json], upstream: str) -> Any:
    """What Messages can say of tools and this model does not know: only some Claude search theirs."""
    knows = record is not None and model_capability(record, "supports", "tool_search") is True
    return frozenset((DEFER, REFERENCE)) if upstream == MESSAGES and not knows else frozenset()


def phased(request: Request) -> Request:
    """The request with a phase on what the model said: commentary beside a call, else the final answer (gateway-features 8.2)."""
    messages = []
    for message in request.messages:
        usual = "commentary" if any(isinstance(block, ToolCall) for block in message.content) else "final_answer"
        content = [replace(block, phase=block.phase or usual) if isinstance(block, Text) else block for block in message.content]
        messages.append(replace(message, content=content) if message.role == "assistant" else message)
    return replace(request, messages=messages)


PDF_NOTE = "[{}: PDF is not supported by this upstream; use text extracted from it.]"


def without_pdfs(blocks: Sequence[Block]) -> List[Block]:
    """The blocks with a note in place of every PDF: Copilot's chat takes none (F-097)."""
    kept: List[Block] = []
    for block in blocks:
        if isinstance(block, ToolResult):
            block = replace(block, content=without_pdfs(block.content))
        elif isinstance(block, File) and block.text is None and block.file_id is None and (block.media_type or "application/pdf") == "application/pdf":
            block = Text(PDF_NOTE.format(block.name or "document.pdf"))
        kept.append(block)
    return kept


def request_without_pdfs(request: Request) -> Request:
    """The same for a whole request."""
    return replace(request, messages=[replace(message, content=without_pdfs(message.content)) for message in request.messages])


# ---- names nobody has -------------------------------------------------------

# Tiers of a family, dearest first; a name without one of these words has the tier marked "". Clients make side requests
# under names of their own (clients.md): they get what the account has of that family, never a dearer tier (DESIGN 8).
TIERS: Dict[str, Tuple[str, ...]] = {"claude": ("fable", "opus", "sonnet", "haiku"), "gemini": ("pro", "flash", "flash-lite")}
OTHER_TIERS = ("base", "mini", "nano")


def family_of(name: str) -> str:
    """The name up to its first digit: `o4-mini` -> o, `grok-9` -> grok, `claude-opus-9` -> claude."""
    stem = re.split(r"\d", plain_name(name), maxsplit=1)[0].strip("-. ")
    return next((family for family in TIERS if stem.startswith(family)), stem)


def tier_of(name: str, family: str) -> int:
    """The place of a name in its family's tiers, 0 the dearest."""
    tiers = TIERS.get(family, OTHER_TIERS)
    words = plain_name(name)
    found = [place for place, tier in enumerate(tiers) if re.search(rf"(^|-){tier}(-|$)", words)]
    return max(found, default=tiers.index("sonnet") if family == "claude" else 0)


def kindred(name: str, catalogue: Catalogue, small: str) -> Optional[str]:
    """What the account has for a name nobody has: the dearest model of its family that is no dearer, the newest of
    these; else the small model. None for a name of no family."""
    family = family_of(name)
    chats = [record["id"] for record in catalogue.offered() if model_capability(record, "type") in (None, "chat")]
    kin = [known for known in chats if family_of(known) == family]
    if not family or not kin and family not in TIERS and not re.search(r"\d", name):
        return None
    asked = tier_of(name, family)
    fitting = [known for known in kin if tier_of(known, family) >= asked]
    best = max(fitting, default=None, key=lambda known: (-tier_of(known, family), model_version(plain_name(known), family), -len(known)))
    found = catalogue.find(small)
    return best or (found[0] if found else None)


# ---- routes -----------------------------------------------------------------

# client dialect -> upstream dialects in the order they are preferred (DESIGN 8 "Routing")
ROUTING = {MESSAGES: (MESSAGES, RESPONSES, CHAT), CHAT: (CHAT, MESSAGES, RESPONSES),
           RESPONSES: (RESPONSES, MESSAGES, CHAT), GEMINI: (CHAT, MESSAGES, RESPONSES)}
# The seeds' refusals, word for word (console reference A.5): (client dialect, only the native dialect allowed) -> text.
REFUSALS = {
    (CHAT, False): "This model does not support the chat/completions endpoint. Please use /v1/messages or /v1/responses.",
    (RESPONSES, False): "This model does not support the responses endpoint. Please choose a different model.",
    (RESPONSES, True): "This model does not support the responses endpoint. Please choose a different model.",
    (GEMINI, False): "This model does not support Gemini-compatible requests. Please switch model.",
    (GEMINI, True): "This model does not support chat/completions. Please switch model.",
}


def choose_dialect(client: str, served: Sequence[str], only_first: bool = False) -> str:
    """The upstream dialect for a client's; raises ClientError in the seeds' words where none fits."""
    wanted = ROUTING[client][:1] if only_first else ROUTING[client]
    fitting = [dialect for dialect in wanted if dialect in served]
    if fitting:
        return fitting[0]
    if client == MESSAGES:
        return CHAT  # there is no 400 here: upstream says what is wrong
    raise ClientError(REFUSALS[client, only_first], code="unsupported_api_for_model", param="model")


def unknown_model(name: str, dialect: str) -> ClientError:
    """The refusal of a name nobody has: 404 where the dialect knows that, else 400 (DESIGN 8, "Names nobody has")."""
    message = f"The model '{name}' does not exist or this account has no access to it; GET /v1/models lists the names"
    if dialect in (MESSAGES, GEMINI):
        return ClientError(message, status=404, code="model_not_found", param="model")
    return ClientError(message, code="model_not_supported", param="model")


def wrong_endpoint(name: str, dialect: str, served: Sequence[str]) -> ClientError:
    """The refusal of a model that makes no embeddings; names an endpoint that serves it."""
    paths = " or ".join(DIALECT_PATHS[other] for other in served) or "no endpoint this gateway serves"
    return ClientError(f"The model '{name}' is not served at {DIALECT_PATHS[dialect]}; use {paths}",
                       code="unsupported_api_for_model", param="model")


###############################################################################
#                                   Agents                                    #
###############################################################################
# Who is calling and why: client, session, prompt, initiator, sub-agent,
# compaction, vision. Each decision is kept beside its reason.

# ---- ids --------------------------------------------------------------------


def uuid_of(text: str, rest: bytes = b"") -> str:
    """The UUID derived from a text: `abc` -> ba7816bf-8f01-4fea-8141-40de5dae2223 (gateway-features 6.9).

    `rest` is what follows it, as UTF-8: a prompt with pictures has megabytes, which are not copied once more.
    """
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    digest.update(rest)
    digits = digest.hexdigest()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"


# Claude Code's `metadata.user_id`: today a JSON string, formerly user_<x>_account_<y>_session_<z>.
LEGACY_USER = r"(?s)user_(.+?)_account.*?_session_(.+)$"


def parse_user_id(user: str) -> Tuple[Optional[str], Optional[str]]:
    """(user, session) of a `metadata.user_id`, None for what it does not hold."""
    legacy = re.search(LEGACY_USER, user)
    if legacy:
        return legacy.group(1), legacy.group(2)
    try:
        value = json.loads(user)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(value, dict):
        return None, None
    return (text_or_none(value.get("device_id")) or text_or_none(value.get("account_uuid")) or None,
            text_or_none(value.get("session_id")) or None)


# Where clients name their session, most trusted first (clients.md; gateway-features 4.5, 6.4).
SESSION_HEADERS = ("x-root-session-id", "x-session-id", "session-id", "session_id", "x-claude-code-session-id",
                   "x-session-affinity", "thread-id", "conversation_id")


def session_of(headers: Dict[str, str], request: Request) -> Tuple[Optional[str], str]:
    """(session UUID, where it was found). A `metadata.user_id` without a session settles it: none."""
    if request.user:
        session = parse_user_id(request.user)[1]
        return (uuid_of(session) if session else None), "metadata.user_id"
    for name in SESSION_HEADERS:
        if headers.get(name):
            return uuid_of(headers[name]), name
    if request.cache_key:
        return uuid_of(request.cache_key), "prompt_cache_key"
    return None, "none"


LONG_STRING = 1 << 16


def abridged(value: Any) -> Any:
    """The value with every string of 64 KB and more told by its length and its ends: writing and hashing 5 MB of pictures
    takes 10 ms, of every request of a turn."""
    if isinstance(value, str):
        return value if len(value) < LONG_STRING else f"{value[:500]}{len(value)}{value[-500:]}"
    if isinstance(value, dict):
        return {name: abridged(member) for name, member in value.items()}
    return [abridged(member) for member in value] if isinstance(value, list) else value


def prompt_words(body: Json) -> Optional[bytes]:
    """The last human turn as the prompt id hashes it: a string as it is, else the compact JSON of its blocks
    without tool results and cache marks, pictures abridged. Messages that hold only tool results are passed over."""
    turns = body.get("messages") if isinstance(body.get("messages"), list) else body.get("input")
    if isinstance(turns, str):
        return turns.encode("utf-8", "surrogatepass")
    for turn in reversed(turns if isinstance(turns, list) else []):
        if not isinstance(turn, dict) or turn.get("role") != "user":
            continue
        content = turn.get("content")
        if isinstance(content, str) and content:
            return content.encode("utf-8", "surrogatepass")
        kept = [{name: value for name, value in part.items() if name != "cache_control"} if isinstance(part, dict) else part
                for part in content if not (isinstance(part, dict) and part.get("type") == "tool_result")] \
            if isinstance(content, list) else []
        if kept:
            return dump_json(abridged(kept))
    return None


# ---- who starts the turn ----------------------------------------------------

REMINDER = re.compile(r"<system-reminder>.*?</system-reminder>", re.S)
# How the texts begin that a client's own loop writes into the user's place (gateway-features 6.5 type 2, clients.md).
LOOP_OPENINGS = (
    "This session is being continued from a previous conversation that ran out of context",
    "Continue if you have next steps, or stop and ask for clarification",
    "The previous request exceeded the provider's size limit due to large media attachments",
    "[Request interrupted",
    "Another language model started to solve this problem",
    "You are performing a CONTEXT CHECKPOINT COMPACTION",
)
SUMMARY_SYSTEMS = ("You are a helpful AI assistant tasked with summarizing conversations",
                   "You are an anchored context summarization assistant")
SUMMARY_GUARD = "CRITICAL: Respond with TEXT ONLY"
SUMMARY_TASK = "Your task is to create a detailed summary of the conversation so far"
SUMMARY_SECTIONS = ("Pending Tasks:", "Current Work:")
CODEX_SUMMARY = "You are performing a CONTEXT CHECKPOINT COMPACTION"
MARKER = "__SUBAGENT_MARKER__"


def last_turn(messages: Sequence[Message]) -> List[Block]:
    """What came after the last assistant message, trailing system and developer entries left out."""
    turn: List[Block] = []
    for message in reversed(messages):
        if message.role == "assistant":
            break
        if message.role == "user":
            turn[:0] = message.content
    return turn


def is_loop_text(text: str, beside_skill: bool) -> bool:
    """Whether a client's loop wrote this text, not a human."""
    words = REMINDER.sub("", text).strip()
    return (not words or words == "Tool loaded." or beside_skill or words.startswith(LOOP_OPENINGS))


def decide_initiator(request: Request, policy: str) -> Tuple[str, str]:
    """("user" | "agent", why): new words of a human make it the user's, also beside a tool result.

    `policy` "any" is the old rule: agent as soon as the history holds an assistant or tool turn.
    """
    if policy == "any":
        used = any(message.role == "assistant" or any(isinstance(block, ToolResult) for block in message.content)
                   for message in request.messages)
        return ("agent", "history") if used else ("user", "first turn")
    turn = last_turn(request.messages)
    results = [block for block in turn if isinstance(block, ToolResult)]
    beside_skill = any(isinstance(part, Text) and part.text.startswith("Launching skill:")
                       for result in results for part in result.content)
    texts = [block.text for block in turn if isinstance(block, Text)]
    if any(not is_loop_text(text, beside_skill) for text in texts):
        return "user", "new words beside a tool result" if results else "new words"
    if results:
        return "agent", "loop text beside tool results" if texts else "tool results"
    if any(isinstance(block, (Image, File)) for block in turn):
        return "user", "new media"
    if texts:
        return "agent", "loop text"
    if turn:
        return "agent", "no words"
    return ("agent", "assistant turn last") if request.messages else ("user", "empty input")


def find_marker(messages: Sequence[Message]) -> Optional[Json]:
    """The sub-agent marker a hook left in a system reminder of the first user message (gateway-features 6.3)."""
    first = next((message for message in messages if message.role == "user"), None)
    for block in first.content if first else ():
        if not isinstance(block, Text) or MARKER not in block.text:
            continue
        for reminder in REMINDER.findall(block.text):
            marker = parse_marker(reminder)
            if marker:
                return marker
    return None


def parse_marker(reminder: str) -> Optional[Json]:
    """{"session_id","agent_id","agent_type"} behind the marker word, None if broken or incomplete."""
    _, found, rest = reminder.partition(MARKER)
    try:
        value = json.loads(rest[:-len("</system-reminder>")].strip()) if found else None
    except (ValueError, RecursionError):
        return None
    complete = isinstance(value, dict) and all(value.get(name) for name in ("session_id", "agent_id", "agent_type"))
    return value if complete else None


def detect_compaction(request: Request) -> int:
    """0 no, 1 a request for a summary, 2 a client's automatic continuation (gateway-features 6.5)."""
    last = request.messages[-1] if request.messages else None
    if last is not None and any(isinstance(block, Opaque) and block.kind == "compaction_trigger" for block in last.content):
        return 1
    texts = [block.text for block in last_turn(request.messages)
             if isinstance(block, Text) and not block.text.startswith("<system-reminder>")]
    said = "\n\n".join(texts)
    if SUMMARY_GUARD in said and SUMMARY_TASK in said and any(section in said for section in SUMMARY_SECTIONS):
        return 1
    if said.startswith(CODEX_SUMMARY):
        return 1
    if said.startswith(LOOP_OPENINGS[:3]):
        return 2
    systems = [block.text for message in request.messages if message.role in ("system", "developer")
               for block in message.content if isinstance(block, Text)]
    return 1 if any(text.startswith(SUMMARY_SYSTEMS) for text in systems) else 0


def has_images(blocks: Iterable[Block]) -> bool:
    """Whether any block is an image, inside tool results too."""
    return any(isinstance(block, Image) or isinstance(block, ToolResult) and has_images(block.content) for block in blocks)


# ---- the verdict ------------------------------------------------------------

# Values of Codex's `x-openai-subagent` that make a request a sub-agent's (gateway-features 6.3).
CODEX_SUBAGENTS = frozenset(("collab_spawn", "compact", "memory_consolidation", "review"))
KNOWN_CLIENTS = (("claude-cli/", "claude-code"), ("codex", "codex"), ("opencode/", "opencode"), ("geminicli", "gemini-cli"),
                 ("openai/", "openai-sdk"), ("asyncopenai/", "openai-sdk"), ("anthropic/", "anthropic-sdk"),
                 ("asyncanthropic/", "anthropic-sdk"), ("litellm", "litellm"), ("aider", "aider"), ("curl/", "curl"))


@lru_cache(maxsize=256)
def client_of(user_agent: str) -> str:
    """A short name for the program behind a user agent; its first product name when we do not know it."""
    agent = user_agent.lower()
    for prefix, name in KNOWN_CLIENTS:
        if agent.startswith(prefix):
            return name
    return agent.partition("/")[0].partition(" ")[0][:40]


def identify(headers: Dict[str, str], body: Json, request: Request, machine_id: str, policy: str) -> Caller:
    """All that is decided about the caller before anything is edited or merged."""
    agent = headers.get("user-agent", "")
    session, session_reason = session_of(headers, request)
    words = prompt_words(body)
    caller = Caller(client=client_of(agent), session_id=session, session_reason=session_reason,
                    prompt_id=uuid_of((session or "") + machine_id, words) if words is not None else "",
                    prompt_reason="last user turn" if words is not None else "none",
                    vision=any(has_images(message.content) for message in request.messages))
    caller.initiator, caller.initiator_reason = decide_initiator(request, policy)
    caller.subagent = find_marker(request.messages)
    caller.compaction = detect_compaction(request)
    side = headers.get("x-openai-subagent", "")
    if caller.compaction == 1 or side == "compact":
        caller.initiator, caller.initiator_reason = "agent", "compaction"
        caller.interaction = "conversation-compaction"
    elif caller.compaction == 2:
        caller.initiator, caller.initiator_reason = "agent", "automatic continuation"
    elif caller.subagent or side in CODEX_SUBAGENTS or headers.get("x-claude-code-agent-id") or headers.get("x-parent-session-id"):
        caller.initiator, caller.initiator_reason = "agent", "sub-agent"
        caller.interaction = "conversation-subagent"
    return caller


###############################################################################
#                                    State                                    #
###############################################################################
# What outlives a process: directories, settings, JSON files, locks, logs.

# ---- directories and files --------------------------------------------------


class Paths:
    """Where everything lies below the home directory; names as the seeds use them (gateway-features 2)."""

    def __init__(self, env: Dict[str, str]) -> None:
        data = env.get("XDG_DATA_HOME") or os.path.join(env.get("HOME") or os.path.expanduser("~"), ".local", "share")
        self.home = env.get("COPILOT_API_HOME") or os.path.join(data, "copilot-api")
        self.oauth_app = (env.get("COPILOT_API_OAUTH_APP") or "").strip()
        self.enterprise = enterprise_domain(env.get("COPILOT_API_ENTERPRISE_URL") or "")
        name = "ent_github_token" if self.enterprise else "github_token"
        self.config = os.path.join(self.home, "config.json")
        self.token = os.path.join(self.home, self.oauth_app, name)
        self.identity = os.path.join(self.home, "identity.json")
        self.models = os.path.join(os.path.dirname(self.token), "ent_models.json" if self.enterprise else "models.json")
        self.demo_models = os.path.join(self.home, "demo_models.json")
        self.lock = os.path.join(self.home, ".lock")
        self.logs = env.get("COPILOT_API_LOG_DIR") or os.path.join(self.home, "logs")

    def make(self) -> None:
        """Creates the directories, readable by the owner only; raises SetupError."""
        try:
            os.makedirs(self.home, 0o700, exist_ok=True)
            os.makedirs(os.path.dirname(self.token), 0o700, exist_ok=True)
        except OSError as exc:
            raise SetupError(f"cannot create {self.home}: {exc.strerror}; set COPILOT_API_HOME to a writable folder") from exc
        self._close_to_others()

    def _close_to_others(self) -> None:
        """Mode 0700 for a home an older fork left open: only if it is ours and a gateway's, not any shared folder."""
        try:
            facts = os.stat(self.home)
            own = not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()
            if own and not facts.st_mode & stat.S_ISVTX and facts.st_mode & 0o077 and os.path.exists(self.config):
                os.chmod(self.home, 0o700)
        except OSError:
            pass  # its files are 0600 all the same


def enterprise_domain(text: str) -> str:
    """The bare domain of a GitHub Enterprise address: scheme, path and slashes removed, lower-cased."""
    return re.sub(r"^[a-z]+://", "", text.strip().lower()).partition("/")[0]


def write_private(path: str, text: str) -> None:
    """Replaces a file whole or not at all (temp file, fsync, os.replace), mode 0600; raises OSError.

    After a crash or on a full disk the old file is intact.
    """
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except OSError:
            pass  # the temp file is already gone; the first error is the one that matters
        raise


def write_json(path: str, value: Any) -> None:
    """A pretty-printed JSON file, written like `write_private`."""
    write_private(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: str) -> Optional[str]:
    """The stripped text of a small file; None when it is absent, unreadable or blank."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def read_json(path: str) -> Optional[Json]:
    """The object in a JSON file of ours; None when it is absent or broken (it is only a cache then)."""
    try:
        value = json.loads(read_text(path) or "")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class HomeLock:
    """Keeps two gateways of one home apart while one of them reads, changes and writes a file.

    An advisory lock of the operating system beside a lock between our own threads; a crashed holder frees it.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._threads = threading.Lock()
        self._file: Any = None  # guarded by _threads

    def __enter__(self) -> HomeLock:
        self._threads.acquire()
        try:
            self._file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
            self._system_lock(True)
        except OSError:
            pass  # a file system without locks, or a full disk: our threads are still kept apart
        return self

    def __exit__(self, *exc: Any) -> None:
        try:
            if self._file is not None:
                self._system_lock(False)
                self._file.close()
        except OSError:
            pass
        finally:
            self._file = None
            self._threads.release()

    def _system_lock(self, take: bool) -> None:
        if os.name == "nt":
            import msvcrt  # only there
            self._file.seek(0)
            msvcrt.locking(self._file.fileno(), msvcrt.LK_LOCK if take else msvcrt.LK_UNLCK, 1)
        else:
            import fcntl  # not on Windows
            fcntl.flock(self._file, fcntl.LOCK_EX if take else fcntl.LOCK_UN)


# ---- settings ---------------------------------------------------------------

EXPLORE_PROMPT = (
    "Before you call any tool, work out which files and facts you will need. Ask for all of them together: read in "
    "parallel through the parallel tool wrapper, one batch at a time. Go one by one only where a result decides what "
    "comes next. Repeat in rounds: plan what is missing, fetch it in one batch, study the results, then plan the next round.")
NARRATE_PROMPT = (
    "The user sits at a terminal and sees two channels: `commentary` for progress notes while you work, `final` for "
    "the answer. Keep notes to one or two plain sentences without greetings or filler. Send the first before you start to "
    "explore, then one about every twenty seconds; say what you found and what comes next. Lay out a longer plan only once "
    "you know enough, announce edits before you make them, and do not begin every note the same way.")
NARRATING_MODELS = ("gpt-5.3-codex", "gpt-5.4-mini", "gpt-5.4", "gpt-5.5")
DEFAULT_PROMPTS = {"gpt-5-mini": EXPLORE_PROMPT, **{model: NARRATE_PROMPT for model in NARRATING_MODELS}}
DEFAULT_EFFORTS = {"gpt-5-mini": "low", **{model: "xhigh" for model in NARRATING_MODELS}}
DEFAULT_THRESHOLDS = {"gpt-5.4": 217600, "gpt-5.5": 217600}
UNSET = None

TRUE_WORDS, FALSE_WORDS = frozenset(("1", "true", "yes", "on")), frozenset(("0", "false", "no", "off", ""))


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in TRUE_WORDS | FALSE_WORDS:
        return value.strip().lower() in TRUE_WORDS
    raise ValueError("true or false")


def _number(value: Any) -> float:
    if isinstance(value, str):
        value = float(value) if re.fullmatch(r"\d+(\.\d+)?", value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
        raise ValueError("a number, 0 or more")
    return value


def _count(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError("a whole number, 0 or more")
    return int(number)


def _port(value: Any) -> int:
    port = _count(value)
    if port > 65535:
        raise ValueError("a port, 0 to 65535")
    return port


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return value.strip()


def _strings(value: Any) -> List[str]:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("a list of strings")
    return [item.strip() for item in value if item.strip()]


def _table(value: Any) -> Json:
    if not isinstance(value, dict):
        raise ValueError("an object")
    return value


def _name_lists(value: Any) -> Dict[str, List[str]]:
    try:
        return {name: _strings(names) for name, names in _table(value).items()}
    except ValueError as exc:
        raise ValueError("an object of lists of model names") from exc


def _rows(value: Any) -> List[Any]:
    if not isinstance(value, list):
        raise ValueError("a list")
    return value


def _any(value: Any) -> Any:
    return value


def _one_of(*names: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value not in names:
            raise ValueError("one of " + ", ".join(json.dumps(name) for name in names))
        return value
    return check


# Every name that can be configured (settings.md). A row: key, default, check, environment names.
# Flags carry the key's own name; what is not in this table cannot be set.
SETTINGS: Tuple[Tuple[str, Any, Callable[[Any], Any], Tuple[str, ...]], ...] = (
    ("host", "127.0.0.1", _text, ("HOST",)),
    ("port", 4141, _port, ("PORT",)),
    ("auth.apiKeys", [], _any, ()),
    ("auth.apiKey", UNSET, _any, ("COPILOT_API_KEY", "API_KEY")),
    ("auth.adminApiKey", UNSET, _any, ()),
    ("adminAuth.secretHash", UNSET, _text, ("ADMIN_SECRET_HASH", "ADMIN_SECRET")),
    ("adminAuth.sessionTtlDays", 5, _number, ()),
    ("adminAuth.enforceHttps", True, _bool, ()),
    ("cors.origins", [], _strings, ()),
    ("allowedHosts", [], _strings, ()),
    ("limits.bodyBytes", 67108864, _count, ()),
    ("limits.headerBytes", 65536, _count, ()),
    ("limits.connections", 4096, _count, ()),
    ("limits.headerSeconds", 30, _number, ()),
    ("limits.bodySeconds", 60, _number, ()),
    ("limits.idleSeconds", 120, _number, ()),
    ("limits.concurrentPerClient", 0, _count, ()),
    ("limits.queueSeconds", 60, _number, ()),
    ("rateLimitSeconds", UNSET, _number, ("RATE_LIMIT",)),
    ("rateLimitWait", False, _bool, ("RATE_LIMIT_WAIT",)),
    ("manualApprove", False, _bool, ()),
    ("root", "auto", _one_of("auto", "dashboard", "text", "auth"), ()),
    ("verbose", False, _bool, ("VERBOSE", "DEBUG")),
    ("showToken", False, _bool, ("SHOW_TOKEN",)),
    ("proxyEnv", False, _bool, ("PROXY_ENV",)),
    ("logFile", UNSET, _text, ()),
    ("logRetentionDays", 7, _number, ()),
    ("accountType", "individual", _one_of("individual", "business", "enterprise"), ()),
    ("endpoints.github", UNSET, _text, ("COPILOT_API_GITHUB_URL",)),
    ("endpoints.githubApi", UNSET, _text, ("COPILOT_API_GITHUB_API_URL",)),
    ("endpoints.copilot", UNSET, _text, ("COPILOT_API_COPILOT_URL",)),
    ("endpoints.anthropic", "https://api.anthropic.com", _text, ("COPILOT_API_ANTHROPIC_URL",)),
    ("endpoints.openaiAuth", "https://auth.openai.com", _text, ("COPILOT_API_OPENAI_AUTH_URL",)),
    ("endpoints.codex", "https://chatgpt.com/backend-api", _text, ("COPILOT_API_CODEX_URL",)),
    ("endpoints.allowHttp", False, _bool, ()),
    ("identity.editorVersion", "vscode/1.124.2", _text, ()),
    ("identity.pluginVersion", "copilot-chat/0.52.0", _text, ()),
    ("identity.userAgent", "GitHubCopilotChat/0.52.0", _text, ()),
    ("identity.integrationId", "vscode-chat", _text, ()),
    ("identity.apiVersion", "2026-06-01", _text, ()),
    ("identity.githubApiVersion", "2025-04-01", _text, ()),
    ("identity.codexVersion", "0.146.0", _text, ()),
    ("identity.codexUserAgent", UNSET, _text, ()),
    ("identity.codexOriginator", "codex_cli_rs", _text, ()),
    ("identity.messagesProxy", False, _bool, ()),
    ("upstreamTransport.headersTimeoutMs", 600000, _number, ()),
    ("upstreamTransport.streamInactivityTimeoutMs", 600000, _number, ()),
    ("upstreamTransport.websocketOpenTimeoutMs", 30000, _number, ()),
    ("upstreamTransport.websocketPoolIdleTimeoutMs", 60000, _number, ()),
    ("upstreamTransport.websocketMaxBufferedBytes", 8388608, _count, ()),
    ("upstreamTransport.websocketMaxBufferedMessages", 1024, _count, ()),
    ("useMessagesApi", True, _bool, ()),
    ("redirectAnthropic", False, _bool, ()),
    ("useResponsesApiWebSocket", "auto", _one_of("auto", True, False), ()),
    ("maxConnectionRetries", 3, _count, ()),
    ("streams.keepAliveSeconds", 10, _number, ()),
    ("streams.statusHoldSeconds", 10, _number, ()),
    ("streams.retryWaitSeconds", 60, _number, ()),
    ("fallbacks", {}, _name_lists, ()),
    ("modelMappings", {}, _table, ()),
    ("unknownModels", "resolve", _one_of("resolve", "refuse"), ()),
    ("context1m", "suffix", _one_of("suffix", "auto", "off"), ()),
    ("strictResponses", False, _bool, ()),
    ("geminiFallback", True, _bool, ()),
    ("modelReasoningEfforts", DEFAULT_EFFORTS, _table, ()),
    ("autoReasoningEffort", True, _bool, ()),
    ("fillMaxTokens", True, _bool, ()),
    ("extraPrompts", DEFAULT_PROMPTS, _table, ()),
    ("smallModel", "gpt-5-mini", _text, ()),
    ("smallModels", {}, _table, ()),
    ("warmupToSmallModel", True, _bool, ()),
    ("compactUseSmallModel", False, _bool, ()),
    ("claudeAutoModel", UNSET, _text, ()),
    ("messageApiWebSearchModel", "auto", _text, ()),
    ("useResponsesApiWebSearch", True, _bool, ()),
    ("useFunctionApplyPatch", False, _bool, ()),
    ("hiddenModels", [], _strings, ()),
    ("disableHiddenModels", False, _bool, ()),
    ("premiumModelMultipliers", {}, _table, ()),
    ("modelCardMetadata", {}, _table, ()),
    ("aggregateModels", "auto", _one_of("auto", True, False), ()),
    ("opencodeModelContextWindow", 300000, _count, ()),
    ("systemPromptRemove", [], _strings, ()),
    ("systemPromptAdd", [], _strings, ()),
    ("toolResultSuffixRemove", [], _strings, ()),
    ("extendCacheTtl", False, _bool, ()),
    ("initiatorPolicy", "last", _one_of("last", "any"), ()),
    ("contextManagement", {"messages": True, "responses": False}, _table, ()),
    ("responsesApiContextManagementModels", [], _strings, ()),
    ("modelResponsesApiCompactThresholds", DEFAULT_THRESHOLDS, _table, ()),
    ("contextTrim.mode", "off", _one_of("off", "trim", "summarize_then_trim"), ()),
    ("contextTrim.summarizeAtRatio", 0.8, _number, ()),
    ("contextTrim.targetRatio", 0.55, _number, ()),
    ("contextTrim.keepRecentTurns", 4, _count, ()),
    ("contextTrim.summaryMaxTokens", 2048, _count, ()),
    ("contextTrim.summarizerModel", UNSET, _text, ()),
    ("usageScaling", False, _any, ()),
    ("claudeTokenMultiplier", UNSET, _number, ()),
    ("anthropicApiKey", UNSET, _any, ("ANTHROPIC_API_KEY",)),
    ("images.maxBytes", UNSET, _count, ()),
    ("images.maxDimension", UNSET, _count, ()),
    ("images.maxCount", UNSET, _count, ()),
    ("caps", [], _rows, ()),
    ("loopBreaker", UNSET, _any, ()),
    ("prices", {}, _table, ()),
    ("usageDatabase", UNSET, _text, ("COPILOT_API_SQLITE_DB_PATH",)),
    ("usageRetentionDays", 400, _number, ()),
    ("usageTestIntervalMinutes", UNSET, _number, ()),
    ("usageLogCountMode", "request", _text, ()),
    ("providers", {}, _table, ()),
    ("accounts", [], _rows, ()),
    ("activeAccountId", UNSET, _any, ()),
    ("accountStrategy", "active", _text, ()),
)
# Keys whose value is a secret: `env:NAME` and `file:PATH` are followed, `config` shows them masked.
SECRET_KEYS = frozenset(("auth.apiKeys", "auth.apiKey", "auth.adminApiKey", "adminAuth.secretHash", "anthropicApiKey"))
# Environment names other programs use too; that one took effect is said at start.
GENERIC_NAMES = frozenset(("HOST", "PORT", "API_KEY", "VERBOSE", "DEBUG", "RATE_LIMIT", "RATE_LIMIT_WAIT", "SHOW_TOKEN",
                           "PROXY_ENV", "ANTHROPIC_API_KEY", "ADMIN_SECRET_HASH", "ADMIN_SECRET", "MODEL_MAPPING"))
# Older or foreign names that are read as well (settings.md "also read").
OTHER_NAMES = {"modelMapping": "modelMappings"}


def snake(name: str) -> str:
    """`apiKeys` -> `api_keys`: the spelling of system B's users, accepted on input."""
    return re.sub(r"(?<=[a-z0-9])([A-Z])", lambda found: "_" + found.group(1).lower(), name)


def dig(config: Json, key: str) -> Tuple[bool, Any]:
    """(found, value) of a dotted key, each part in camelCase or snake_case."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict):
            return False, None
        name = part if part in value else snake(part)
        if name not in value:
            return False, None
        value = value[name]
    return True, value


class Settings:
    """The effective settings: `settings["streams.keepAliveSeconds"]`; `origins` says where each comes from.

    Order: command line > environment > config.json > default. Built once, swapped whole on reload.
    """

    def __init__(self, config: Json, env: Dict[str, str], flags: Dict[str, Any]) -> None:
        self.values: Dict[str, Any] = {}
        self.origins: Dict[str, str] = {}
        self.warnings: List[str] = []
        config = with_other_names(config)
        for key, default, check, names in SETTINGS:
            self.values[key], self.origins[key] = default, "default"
            for origin, given in self._given(key, names, config, env, flags):
                try:
                    self.values[key], self.origins[key] = check(given), origin
                    break
                except ValueError as exc:
                    shown = "" if key in SECRET_KEYS else f" {json.dumps(given, default=str)[:60]}"
                    self.warnings.append(f"{origin}: {key} is{shown} but must be {exc}; the default counts")
        self._mappings(env)
        self._api_keys(config)
        self.warnings.extend(unknown_keys(config))

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @staticmethod
    def _given(key: str, names: Sequence[str], config: Json, env: Dict[str, str],
               flags: Dict[str, Any]) -> Iterator[Tuple[str, Any]]:
        """What was said about a key, the strongest first."""
        if flags.get(key) is not None:
            yield "command line", flags[key]
        for name in names:
            if env.get(name, "").strip():
                yield f"environment {name}", env[name]
        found, value = dig(config, key)
        if found and value is not None:
            yield "config.json", value

    def _mappings(self, env: Dict[str, str]) -> None:
        """MODEL_MAPPING, a JSON object, replaces the mapping table (system D)."""
        text = env.get("MODEL_MAPPING")
        if not text:
            return
        try:
            self.values["modelMappings"] = _table(json.loads(text))
            self.origins["modelMappings"] = "environment MODEL_MAPPING"
        except ValueError:
            self.warnings.append("environment MODEL_MAPPING is not a JSON object; it is ignored")

    def _api_keys(self, config: Json) -> None:
        """Resolves `auth.*`; a wrong container refuses to start: it must never mean "open"."""
        if not isinstance(config.get("auth", {}), dict) or dig(config, "auth.apiKeys") == (True, None):
            raise SetupError("config.json: auth must be an object, auth.apiKeys a list; nothing was started")
        keys = self.values["auth.apiKeys"]
        if not isinstance(keys, list):
            raise SetupError("config.json: auth.apiKeys must be a list of strings; nothing was started")
        wrong = [key for key in keys if not isinstance(key, str) or not key.strip()]
        if wrong:
            self.warnings.append(f"config.json: auth.apiKeys holds {len(wrong)} entries that are no key; they are dropped")
        single = self.values["auth.apiKey"]
        if single is not None and not isinstance(single, str):
            raise SetupError("config.json: auth.apiKey must be a string; nothing was started")
        given = [key.strip() for key in keys if isinstance(key, str) and key.strip()]
        given += [single.strip()] if single and single.strip() else []
        self.values["auth.apiKeys"] = [Secret(key) for key in dict.fromkeys(map(resolve_secret, given)) if key]
        if (keys or given) and not self.values["auth.apiKeys"]:
            raise SetupError("config.json: auth.apiKeys holds no usable key; nothing was started")
        self.values["auth.apiKey"] = None
        for key in ("auth.adminApiKey", "anthropicApiKey"):
            value = self.values[key]
            if value is not None and not isinstance(value, str):
                self.warnings.append(f"{self.origins[key]}: {key} must be a string; it is ignored")
            self.values[key] = Secret(resolve_secret(value.strip())) if isinstance(value, str) and value.strip() else None


def resolve_secret(text: str) -> str:
    """The value behind `env:NAME` or `file:PATH`; any other text is the value itself."""
    if text.startswith("env:"):
        return os.environ.get(text[4:], "").strip()
    if text.startswith("file:"):
        return read_text(os.path.expanduser(text[5:])) or ""
    return text


def with_other_names(config: Json) -> Json:
    """The config with foreign spellings of a key beside our own: `modelMapping`, `model_mappings.exact/.prefix`."""
    config = dict(config)
    for other, key in OTHER_NAMES.items():
        if other in config and key not in config:
            config[key] = config.pop(other)
    found, table = dig(config, "modelMappings")
    if found and isinstance(table, dict) and any(isinstance(table.get(part), dict) for part in ("exact", "prefix")):
        exact, prefix = table.get("exact") or {}, table.get("prefix") or {}
        config.pop("model_mappings", None)
        config["modelMappings"] = {**exact, **{f"{name}*": target for name, target in prefix.items()}}
    return config


def unknown_keys(config: Json) -> List[str]:
    """A line for each key no setting has, with the nearest known name; the keys stay in the file."""
    known = {key for key, _, _, _ in SETTINGS}
    groups = {key.rpartition(".")[0] for key in known if "." in key}
    spellings = {spelling: key for key in known | groups for spelling in (key, ".".join(map(snake, key.split("."))))}
    lines = []

    def look(table: Json, prefix: str) -> None:
        for name, value in table.items():
            key = spellings.get(prefix + name)
            if key is None:
                import difflib  # only for this message
                near = difflib.get_close_matches(prefix + name, spellings, 1, 0.5)
                hint = f"; did you mean {spellings[near[0]]}?" if near else ""
                lines.append(f"config.json: unknown key {prefix + name} is kept and ignored{hint}")
            elif key in groups and key not in known and isinstance(value, dict):
                look(value, key + ".")

    look(config, "")
    return lines


class ConfigFile:
    """config.json: created with defaults, completed, never overwritten when broken."""

    # What a new file holds besides the admin key; other settings appear in it only when somebody sets them.
    NEW: Json = {"auth": {"apiKeys": []}, "providers": {}, "modelMappings": {}, "extraPrompts": DEFAULT_PROMPTS,
                 "smallModel": "gpt-5-mini", "modelReasoningEfforts": DEFAULT_EFFORTS}
    COMPLETED = ("extraPrompts", "modelReasoningEfforts")  # missing model names are added, values of the user stay

    def __init__(self, paths: Paths, lock: HomeLock) -> None:
        self.path = paths.config
        self._lock = lock

    def read(self) -> Json:
        """The file's object, {} when it is absent or blank; raises SetupError that shows where it is broken."""
        try:
            with open(self.path, encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as exc:
            raise SetupError(f"cannot read {self.path}: {exc}") from exc
        if not text.strip():
            return {}
        try:
            config = json.loads(text)
        except json.JSONDecodeError as exc:
            raise SetupError(broken_config(self.path, text, exc)) from exc
        except RecursionError as exc:
            raise SetupError(f"{self.path} is nested too deeply; nothing was overwritten") from exc
        if not isinstance(config, dict):
            raise SetupError(f"{self.path} must hold a JSON object; nothing was overwritten")
        return config

    def prepare(self) -> Tuple[Json, List[str]]:
        """(config, warnings) after completing the file under the home's lock; the admin key must be writable."""
        with self._lock:
            config = self.read()
            before = json.dumps(config)
            if not config:
                config = json.loads(json.dumps(self.NEW))
            for key in self.COMPLETED:
                if isinstance(config.get(key), dict):
                    config[key].update((name, value) for name, value in self.NEW[key].items() if name not in config[key])
            found, given = dig(config, "auth.adminApiKey")
            warnings = [] if not found or given is None or isinstance(given, str) else [
                "config.json: auth.adminApiKey must be a string; a new key was made"]
            new_key = self._admin_key(config)
            if json.dumps(config) != before:
                try:
                    write_json(self.path, config)
                except OSError as exc:
                    if new_key:
                        raise SetupError(f"cannot write the admin key to {self.path}: {exc.strerror}") from exc
                    warnings.append(f"cannot complete {self.path}: {exc.strerror}; the file is as it was")
            return config, warnings

    @staticmethod
    def _admin_key(config: Json) -> bool:
        """Sees to it that `auth.adminApiKey` is a trimmed key; True when one was made."""
        auth = config.setdefault("auth", {})
        if not isinstance(auth, dict):
            raise SetupError("config.json: auth must be an object; nothing was started")
        found, key = dig(auth, "adminApiKey")
        if found and isinstance(key, str) and key.strip():
            auth["adminApiKey" if "adminApiKey" in auth else "admin_api_key"] = key.strip()
            return False
        auth["adminApiKey"] = os.urandom(32).hex()
        return True


def _masked(found: Any) -> str:
    """What may be shown of one word of a broken line: key names, numbers, true, false, null."""
    text = found.group(0)
    plain = re.fullmatch(r'"(?:[^"\\]|\\.)*"\s*:|-?\d{1,5}|true|false|null', text)
    return text if plain else '"…"'


def broken_config(path: str, text: str, exc: json.JSONDecodeError) -> str:
    """Where a file is broken: line, column, and the line itself with its strings masked."""
    line = (text.splitlines() or [""])[exc.lineno - 1] if exc.lineno <= len(text.splitlines()) else ""
    shown = re.sub(r'"(?:[^"\\]|\\.)*"?(?:\s*:)?|[^\s{}\[\],:"]+', _masked, line).strip()
    return (f"{path} is broken: {exc.msg}, line {exc.lineno} column {exc.colno}: {shown[:200]}\n"
            "Nothing was overwritten. Repair the line, or move the file away to start with defaults.")


# ---- memory -----------------------------------------------------------------


class Recollection:
    """What clients that keep only text and tool-call ids cannot carry: call id -> the thinking that led to it, sealed.

    Least recently used entries go first beyond the limit; lost at a restart, as the reference allows (DESIGN 4).
    """

    LIMIT_BYTES, ORIGINS = 32 << 20, 10_000

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Dict[str, Tuple[Thinking, ...]] = {}  # in order of use; guarded by _lock
        self._origins: Dict[str, str] = {}  # digest of a state in one of the seeds' shapes -> origin; guarded by _lock
        self._size = 0  # guarded by _lock

    def keep(self, call_ids: Sequence[str], thinking: Sequence[Thinking]) -> None:
        """Remembers the thinking of one answer under the first of its calls."""
        if not call_ids or not thinking:
            return
        with self._lock:
            self._drop(call_ids[0])
            self._kept[call_ids[0]] = tuple(thinking)
            self._size += self._weight(thinking)
            while self._size > self.LIMIT_BYTES:
                self._drop(next(iter(self._kept)))

    def note(self, thinking: Iterable[Thinking], origin: str) -> None:
        """Remembers who sealed what the seeds' shapes carry: they do not say it themselves (DESIGN 4)."""
        states = [block.signature for block in thinking if block.signature and "@" in block.signature]
        with self._lock:
            for state in states:
                self._origins[state_digest(state)] = origin
            while len(self._origins) > self.ORIGINS:
                del self._origins[next(iter(self._origins))]

    def owned(self, request: Request, origin: str) -> Request:
        """The request without such state of another origin; of unknown origin it is tried. Raises ClientError 400 for a
        compaction of another origin."""
        def stays(block: Block) -> bool:
            if not isinstance(block, Thinking) or "@" not in (block.signature or "") \
                    or self._origins.get(state_digest(block.signature), origin) == origin:
                return True
            if is_sealed_compaction(block.signature or ""):
                raise foreign_compaction()
            return False
        return replace(request, messages=[replace(message, content=list(filter(stays, message.content))) for message in request.messages])

    def _drop(self, call_id: str) -> None:
        self._size -= self._weight(self._kept.pop(call_id, ()))

    @staticmethod
    def _weight(thinking: Sequence[Thinking]) -> int:
        return sum(len(block.text) + len(block.signature or block.redacted or "") + 200 for block in thinking)

    def restored(self, request: Request) -> Request:
        """The request with what is remembered put before the calls it led to, where the client sent none of it."""
        return replace(request, messages=[replace(message, content=self._with_thinking(message.content))
                                          if message.role == "assistant" else message for message in request.messages])

    def _with_thinking(self, blocks: List[Block]) -> List[Block]:
        if any(isinstance(block, Thinking) and (block.signature or block.redacted) or getattr(block, "seal", None) for block in blocks):
            return blocks
        filled: List[Block] = []
        for block in blocks:
            filled.extend(self.recall(block.id) if isinstance(block, ToolCall) else ())
            filled.append(block)
        return filled

    def recall(self, call_id: str) -> Tuple[Thinking, ...]:
        """The thinking that led to a call, sealed; nothing for a call nobody remembers."""
        with self._lock:
            known = self._kept.pop(call_id, ())
            if known:
                self._kept[call_id] = known  # used last now
        return known


class Lessons:
    """What upstream's refusals taught, per (origin, dialect), in the order they were learned; forgotten after six hours."""

    LIFE_S, KEYS, EACH = 6 * 3600.0, 512, 64

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self.taught = 0  # grows with every lesson that is new
        self._learned: Dict[Tuple[str, str], Dict[Lesson, float]] = {}  # lesson -> when it ends; guarded by _lock

    def learn(self, origin: str, dialect: str, lesson: Lesson) -> bool:
        """Remembers a lesson; False when it was known."""
        now = self._clock()
        with self._lock:
            known = self._learned.pop((origin, dialect), {})
            new = known.pop(lesson, 0.0) <= now
            self.taught += new
            if lesson[0] in RENEWED:
                known = {other: ends for other, ends in known.items() if other[0] != lesson[0]}
            known[lesson] = now + self.LIFE_S
            self._learned[origin, dialect] = dict(list(known.items())[-self.EACH:])
            while len(self._learned) > self.KEYS:
                del self._learned[next(iter(self._learned))]
        return new

    def forget(self, origin: str, dialect: str, lesson: Lesson) -> None:
        """A lesson that did not help."""
        with self._lock:
            self._learned.get((origin, dialect), {}).pop(lesson, None)

    def of(self, origin: str, dialect: str) -> List[Lesson]:
        """The lessons that hold now."""
        now = self._clock()
        with self._lock:
            return [lesson for lesson, ends in self._learned.get((origin, dialect), {}).items() if ends > now]


# ---- logs -------------------------------------------------------------------


class Log:
    """What the operator sees: one line per event on stderr, secrets removed.

    `once` says a thing one time per key, so that a full disk is one line and not one per request.
    """

    KEYS = 10_000  # of `once`; clients name some of them

    def __init__(self, stream: Any = None, verbose: bool = False) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._said: Set[str] = set()  # guarded by _lock
        self.verbose = verbose

    def info(self, message: str) -> None:
        """An event worth a line."""
        self._write("info", message)

    def warning(self, message: str) -> None:
        """Something the operator may want to change."""
        self._write("warning", message)

    def debug(self, message: str) -> None:
        """Only with --verbose."""
        if self.verbose:
            self._write("debug", message)

    def once(self, key: str, message: str) -> None:
        """A warning that is not repeated for the same key."""
        with self._lock:
            if key in self._said:
                return
            if len(self._said) >= self.KEYS:
                self._said.clear()
            self._said.add(key)
        self._write("warning", message)

    def shown_secret(self, message: str) -> None:
        """A line that holds a token, printed as it is: only --show-token calls this."""
        self._print(f"[{time.strftime('%H:%M:%S')}] token   {message}\n")

    def _write(self, level: str, message: str) -> None:
        self._print(f"[{time.strftime('%H:%M:%S')}] {level:<7} {redact(message)}\n")

    def _print(self, line: str) -> None:
        try:
            stream = self._stream or sys.stderr
            stream.write(line)
            stream.flush()
        except (OSError, ValueError):
            pass  # a closed terminal must not stop the server


class HandlerLogs:
    """`<logs>/<handler>-YYYY-MM-DD.log`, one line per entry, old files removed (gateway-features 21).

    Written only with --verbose; a line that cannot be written is said once on the console and dropped.
    """

    SWEEP_S = 86400
    OURS = re.compile(r"-handler-\d{4}-\d\d-\d\d\.log$")  # the folder may hold other programs' logs

    def __init__(self, folder: str, retention_days: float, log: Log, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._retention_s = retention_days * 86400
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._swept_at = 0.0  # guarded by _lock

    def write(self, handler: str, trace_id: str, message: str, level: str = "info") -> None:
        """One line: `[YYYY-MM-DD HH:MM:SS] [level] [handler] [trace id] message`."""
        now = self._clock()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        line = f"[{stamp}] [{level}] [{handler}] [{trace_id}] {redact(message)}\n"
        with self._lock:
            try:
                self._prepare(now)
                path = os.path.join(self._folder, f"{handler}-{stamp[:10]}.log")
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                with os.fdopen(handle, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(line)
            except OSError as exc:
                self._log.once("handler-logs", f"cannot write logs in {self._folder}: {exc.strerror}; requests go on without")

    def _prepare(self, now: float) -> None:
        """Makes the folder and removes files older than the retention, once a day."""
        if now - self._swept_at < self.SWEEP_S:
            return
        self._swept_at = now
        os.makedirs(self._folder, 0o700, exist_ok=True)
        for name in filter(self.OURS.search, os.listdir(self._folder)):
            path = os.path.join(self._folder, name)
            try:
                if now - os.stat(path).st_mtime > self._retention_s:
                    os.unlink(path)
            except FileNotFoundError:
                pass  # another gateway of this home was quicker


class RequestLog:
    """`--log-file PATH`: every request and answer with a heading, secrets masked (console reference C.8)."""

    def __init__(self, path: str, log: Log) -> None:
        self._path = path
        self._log = log
        self._lock = threading.Lock()
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            write_private(path, f"# API Request/Response Log\nStarted: {self._stamp()}\n")
        except OSError as exc:
            raise SetupError(f"cannot write --log-file {path}: {exc.strerror}") from exc

    def request(self, method: str, path: str, headers: Dict[str, str], body: bytes) -> None:
        """The entry of a request."""
        self._entry("Request", [f"Endpoint: {path}", f"Method: {method}", *self._shown(headers, body)])

    def response(self, path: str, status: int, headers: Dict[str, str], body: bytes) -> None:
        """The entry of an answer."""
        self._entry("Response", [f"Endpoint: {path}", f"Status: {status}", *self._shown(headers, body)])

    @staticmethod
    def _shown(headers: Dict[str, str], body: bytes) -> List[str]:
        shown = {name: "***" if name in SECRET_HEADERS else value for name, value in headers.items()}
        return [f"Headers: {json.dumps(shown)}", f"Body: {body.decode('utf-8', 'replace')}"]

    @staticmethod
    def _stamp() -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def _entry(self, title: str, lines: Sequence[str]) -> None:
        text = f"\n## {title} - {self._stamp()}\n" + "\n".join(map(redact, lines)) + "\n"
        with self._lock:
            try:
                with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(text)
            except OSError as exc:
                self._log.once("log-file", f"cannot write {self._path}: {exc.strerror}; requests go on without")


###############################################################################
#                                  Upstream                                   #
###############################################################################
# The one outbound door, and both ends of a relay: pooled sockets on the far
# side, the client's socket with its keep-alives on the near side, and the one
# thread that watches them all.

# Longest wait for a TCP connection and a TLS handshake. Far hosts need 1 to 3 s; browsers give up at 30.
CONNECT_S = 30.0
# An idle pooled socket older than this is closed: load balancers drop theirs after about 60 s.
POOL_IDLE_S = 50.0
# So soon after its answer a socket is taken without a look: one that has closed costs one try on a fresh one, and the look lets
# another thread in, a fifth of what a whole answer costs with 16 clients.
POOL_TRUST_S = 0.05
POOL_SIZE = 64  # idle sockets kept per host; more than any burst of one user leaves behind
# Probes on a silent upstream socket, so that a dead route is noticed within about two minutes: seconds of silence, seconds between
# probes, probes. The first is called TCP_KEEPIDLE on Linux and Windows, TCP_KEEPALIVE on macOS, where Python 3.9 does not name it.
TCP_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
MACOS_TCP_KEEPALIVE = 0x10  # netinet/tcp.h
# How long a finished stream may keep its socket busy before the socket is closed instead of pooled.
DRAIN_S = 0.05
# A head and a body above this are sent by two calls: joining 5 MB costs 3 ms.
JOIN_BYTES = 65536
CAPTURE_BYTES = 4 << 20  # of one answer, for --log-file and --verbose
DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)


class TransportError(Exception):
    """No answer, or no whole answer: refused, reset, closed, silent, not HTTP. `timed_out` tells silence apart."""

    def __init__(self, message: str, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class Stopper:
    """The switch that ends one request from outside: its client left, or the server stops.

    Holds the upstream socket in use, so that `stop` can wake the thread that waits on it (`shutdown`, never
    `close`: closing does not wake a reader and frees the number for reuse).
    """

    __slots__ = ("stopped", "_error", "_lock", "_sock", "_waiter")

    def __init__(self) -> None:
        self.stopped = False
        self._error: Optional[Exception] = None  # none: the client is gone
        self._lock = threading.Lock()
        self._sock: Optional[socket.socket] = None  # guarded by _lock
        self._waiter: Optional[threading.Event] = None  # made by the first wait; guarded by _lock

    def attach(self, sock: socket.socket) -> None:
        """Puts a socket under the switch; raises when it was thrown already."""
        with self._lock:
            self._sock = sock
        self.check()

    def detach(self) -> None:
        """Takes the socket away: it may now be pooled, and a late `stop` must not hit it."""
        with self._lock:
            self._sock = None

    def stop(self, error: Optional[Exception] = None) -> None:
        """Throws the switch; whoever waits is told by `error`, by default that the client is gone."""
        if error is not None:
            self._error = error
        with self._lock:
            self.stopped = True
            if self._waiter is not None:
                self._waiter.set()
            if self._sock is not None:
                try:
                    # The plain method: it leaves the TLS object alone, whose state its own thread is using.
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
                except OSError:
                    pass  # already closed by the far end

    def check(self) -> None:
        """Raises when the switch was thrown. An error that was kept would hold its frames, and they this object: such a
        ring, with the whole request in it, waits for the collector."""
        if self.stopped:
            raise self._error or ClientGone()

    def wait(self, seconds: float) -> None:
        """Waits, or raises as soon as the switch is thrown."""
        with self._lock:
            self._waiter = waiter = self._waiter or threading.Event()
            if self.stopped:
                waiter.set()
        waiter.wait(seconds)
        self.check()


SMALL_READ = 2048  # bytes; an event that comes alone is smaller
HAS_READ_CLOCK = os.name == "posix" and hasattr(socket, "SO_RCVTIMEO") and hasattr(select, "poll")
# A `timeval` is two longs; where they have 32 bits and time has 64 (ARM, x86), the option is another (Linux, asm-generic/socket.h).
SO_RCVTIMEO_NEW = 66
TIMEVAL = "qq" if getattr(socket, "SO_RCVTIMEO", 0) == SO_RCVTIMEO_NEW else "ll"


def timeval(seconds: float) -> bytes:
    """A time as SO_RCVTIMEO and SO_SNDTIMEO take it."""
    return struct.pack(TIMEVAL, int(seconds), int(seconds % 1 * 1e6))


class Conn:
    """One upstream socket and how to wait on it.

    `read` waits first and reads then: it holds no buffer, and any wait is a stall clock. `read_next`, for waits that are always
    as long, lets the system's own clock (SO_RCVTIMEO) watch a read that holds a small buffer, which grows while the far side
    is ahead of us: one call and one switch of threads less, a tenth to a fifth of what an event that comes alone costs.
    """

    __slots__ = ("sock", "key", "idle_since", "_poll", "is_tls", "_clock_s", "_size")

    def __init__(self, sock: socket.socket, key: Tuple[str, str, str]) -> None:
        self.sock = sock
        self.key = key
        self.idle_since = 0.0
        self.is_tls = hasattr(sock, "pending")
        self._clock_s = 0.0  # what SO_RCVTIMEO is set to
        self._size = SMALL_READ
        self._poll: Any = None
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(sock, select.POLLIN)

    def readable(self, timeout_s: float) -> bool:
        """Whether bytes (or the end) arrive within the time. A decrypted rest counts: poll would not see it."""
        if self.is_tls and self.sock.pending():
            return True
        if self._poll is not None:
            return bool(self._poll.poll(timeout_s * 1000))
        return bool(select.select([self.sock], [], [], timeout_s)[0])

    def read(self, timeout_s: float) -> bytes:
        """The bytes that are there, b"" at the end; raises TransportError for silence and broken connections."""
        try:
            if not self.readable(timeout_s):
                raise TransportError(f"upstream was silent for {timeout_s:g} s", timed_out=True)
            if self.is_tls:
                self.sock.settimeout(timeout_s or None)  # half a record makes the socket readable, then recv waits
            return self.sock.recv(READ_BYTES)
        except socket.timeout as exc:
            raise TransportError(f"upstream was silent for {timeout_s:g} s", timed_out=True) from exc
        except (OSError, ValueError) as exc:  # ValueError: a descriptor beyond what `select` can watch
            raise TransportError(f"connection to {self.key[1]} broke: {reason_of(exc)}") from exc

    def read_next(self, timeout_s: float) -> bytes:
        """The same where each wait is as long as the one before: the next piece of an answer, the next request."""
        if self.is_tls or not HAS_READ_CLOCK or timeout_s <= 0:
            return self.read(timeout_s)
        try:
            if timeout_s != self._clock_s:
                self._clock_s = timeout_s
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(timeout_s))
            if self._size == READ_BYTES:
                data = self.sock.recv(READ_BYTES)
            else:  # what `recv` shrinks leaves holes: 7 KB a stream, where this leaves none
                places = bytearray(SMALL_READ)
                data = bytes(places[:self.sock.recv_into(places)])
                if len(data) == SMALL_READ and [event for _, event in self._poll.poll(0)] == [select.POLLIN]:
                    data += self.sock.recv(READ_BYTES)  # of a connection that broke, this would raise, and `data` be lost
            self._size = SMALL_READ if len(data) < SMALL_READ else READ_BYTES
            return data
        except BlockingIOError as exc:
            raise TransportError(f"upstream was silent for {timeout_s:g} s", timed_out=True) from exc
        except OSError as exc:
            raise TransportError(f"connection to {self.key[1]} broke: {reason_of(exc)}") from exc

    def close(self) -> None:
        """Closes the socket; only the thread that uses it may."""
        try:
            self.sock.close()
        except OSError:
            pass


def reason_of(exc: BaseException) -> str:
    """A short text for an operating-system error."""
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__


class Pool:
    """Idle kept-alive sockets by (scheme, host, tunnel).

    Their age is wall clock: a monotonic one stands still while a laptop sleeps, and a socket whose route was forgotten
    meanwhile takes a request in and never answers.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: Dict[Tuple[str, str, str], List[Conn]] = {}  # guarded by _lock

    def take(self, key: Tuple[str, str, str]) -> Optional[Conn]:
        """The socket used last, if one is still good: readable after a while means closed or unasked-for bytes."""
        while True:
            with self._lock:
                waiting = self._idle.get(key)
                if not waiting:
                    return None
                conn = waiting.pop()
            idle_s = self._clock() - conn.idle_since
            if 0 <= idle_s < POOL_TRUST_S or 0 <= idle_s < POOL_IDLE_S and not conn.readable(0):
                return conn
            conn.close()

    def give(self, conn: Conn) -> None:
        """Keeps a socket whose answer was read to the very end."""
        conn.idle_since = self._clock()
        with self._lock:
            waiting = self._idle.setdefault(conn.key, [])
            surplus = waiting[:1 + len(waiting) - POOL_SIZE] if len(waiting) >= POOL_SIZE else []
            del waiting[:len(surplus)]
            waiting.append(conn)
        for old in surplus:
            old.close()

    def close(self) -> None:
        """Closes every idle socket."""
        with self._lock:
            conns = [conn for waiting in self._idle.values() for conn in waiting]
            self._idle.clear()
        for conn in conns:
            conn.close()


@lru_cache(maxsize=64)
def parsed_request(url: str) -> urllib.request.Request:
    """A request to an address, to copy from: taking an address apart costs 6 µs, and there are a handful."""
    return urllib.request.Request(url)


@lru_cache(maxsize=64)
def split_url(url: str) -> SplitResult:
    """The parts of an upstream's address; raises ValueError."""
    return urlsplit(url)


class Outbound(urllib.request.Request):
    """One request to an upstream: urllib's own (for proxies), with our header list, body and clocks."""

    def __init__(self, method: str, url: str, headers: Sequence[Tuple[str, str]], body: Optional[bytes],
                 stopper: Stopper, head_timeout_s: float, gap_timeout_s: float) -> None:
        vars(self).update(vars(parsed_request(url)))
        self.headers, self.unredirected_hdrs = {}, {}
        self.method = method
        self.wire_headers = headers
        self.body = body
        self.stopper = stopper
        self.head_timeout_s = head_timeout_s
        self.gap_timeout_s = gap_timeout_s

    def head(self) -> bytes:
        """The request head. `Proxy-Authorization` goes to a plain-http proxy only, never through a tunnel."""
        headers = [("Host", split_url(self.full_url).netloc.rpartition("@")[2]), *self.wire_headers, ("Accept-Encoding", "identity")]
        if self.body is not None:
            headers.append(("Content-Length", str(len(self.body))))
        credentials = self.get_header("Proxy-authorization")
        if credentials and self.type == "http":
            headers.append(("Proxy-Authorization", credentials))
        return format_head(f"{self.method} {self.selector} HTTP/1.1", headers)


class Inflater:
    """Takes a gzip or zlib body as it arrives and gives its bytes; raises TransportError for a damaged one.

    A gzip body may be several members one behind the other (RFC 1952 2.2).
    """

    def __init__(self) -> None:
        self._object = zlib.decompressobj(47)  # 32 + 15: gzip or zlib, by its header
        self._begun = False  # inside a member

    def feed(self, data: bytes) -> bytes:
        pieces = []
        try:
            while data:
                if self._object.eof:
                    self._object = zlib.decompressobj(47)
                self._begun = True
                pieces.append(self._object.decompress(data))
                data = self._object.unused_data
        except zlib.error as exc:
            raise TransportError("the compressed answer is damaged") from exc
        return b"".join(pieces)

    def end(self) -> bytes:
        """b"" at a body's end; raises TransportError where it is not the compressed data's."""
        if self._begun and not self._object.eof:
            raise TransportError("the compressed answer ended before it was complete")
        return b""


class Answer:
    """An upstream answer whose head has arrived; the body is read piece by piece.

    Owned by one thread. `close` must be called however it ends; a body read to its end goes back to the pool.
    """

    def __init__(self, conn: Conn, pool: Pool, request: Outbound, head: bytes, rest: bytes) -> None:
        line, self.headers = parse_head(head)
        version, _, status_text = line.partition(" ")
        self.status = int(status_text[:3])
        self._conn: Optional[Conn] = conn
        self._pool = pool
        self._stopper = request.stopper
        self._gap_s = request.gap_timeout_s
        self._reusable = version == "HTTP/1.1" and "close" not in self.headers.get("connection", "").lower()
        self._chunks: Optional[ChunkDecoder] = None
        self._left: Optional[int] = None  # bytes to come; None: until the connection closes
        self._buffer = rest
        self._inflater: Optional[Inflater] = None
        if request.method == "HEAD" or self.status in (204, 304) or self.status < 200:
            self._left = 0
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._chunks = ChunkDecoder()
        else:
            self._left = content_length(self.headers)
        coding = self.headers.get("content-encoding", "identity").lower()
        if coding in ("gzip", "x-gzip", "deflate"):
            self._inflater = Inflater()
        elif coding != "identity":
            raise BadHead(f"the content coding {coding[:40]}, which was not asked for")

    def read(self) -> bytes:
        """The next body bytes, b"" at the end; raises TransportError when the body breaks off, ClientGone."""
        while True:
            data = self._read_raw()
            if self._inflater is None:
                return data
            if not data:
                return self._inflater.end()
            data = self._inflater.feed(data)
            if data:
                return data

    def _read_raw(self) -> bytes:
        while True:
            data, self._buffer = self._buffer, b""
            if not data:
                if self._conn is None or self._left == 0 or self._chunks is not None and self._chunks.done:
                    self._release()
                    return b""
                data = self._receive()
                if not data:
                    return b""
            if self._chunks is None:
                return self._counted(data)
            try:
                body = self._chunks.feed(data)
            except BadHead as exc:
                raise TransportError(str(exc)) from exc
            if body:
                return body

    def _receive(self) -> bytes:
        """Bytes from the socket; the end is fine only for a body without length."""
        try:
            data = self._conn.read_next(self._gap_s)
        except TransportError:
            self._stopper.check()
            raise
        if not data:
            self._stopper.check()
            self._reusable = False
            if self._left is not None or self._chunks is not None:
                raise TransportError("the upstream connection ended before the answer was complete")
            self._release()
        return data

    def _counted(self, data: bytes) -> bytes:
        if self._left is None:
            return data
        if len(data) > self._left:
            self._reusable = False  # more than was announced: the next answer would start with rubbish
            data = data[:self._left]
        self._left -= len(data)
        return data

    def read_all(self, limit: int = 1 << 28) -> bytes:
        """The whole body; raises like `read`, and TransportError beyond `limit` bytes."""
        pieces, size = [], 0
        while True:
            data = self.read()
            if not data:
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.append(data)
            size += len(data)
            if size > limit:
                raise TransportError(f"the answer is larger than {limit} bytes")

    def drain(self, seconds: float) -> None:
        """Reads what little may follow a stream's last frame, so that the socket can be used again."""
        self._gap_s = seconds
        try:
            while self.read():
                pass
        except (TransportError, ClientGone, ProxyError):
            pass  # nothing depends on it: the socket is closed instead

    def _release(self) -> None:
        """Gives the socket back, or closes it where it cannot be trusted."""
        conn, self._conn = self._conn, None
        if conn is None:
            return
        self._stopper.detach()
        if self._reusable and not self._stopper.stopped and not (self._chunks and self._chunks.rest):
            self._pool.give(conn)
        else:
            conn.close()

    def close(self) -> None:
        """Ends the answer, read or not."""
        if self._conn is not None:
            self._reusable = False
            self._release()


STATUS_LINE = re.compile(rb"HTTP/1\.[01] \d\d\d")


class PooledHandler(urllib.request.BaseHandler):
    """urllib's transport with our bytes inside: a pooled socket, head and body in one call, own head parsing.

    `http.client` costs 44 µs a call and closes every connection under urllib (measured 2026-11-21).
    """

    def __init__(self, pool: Pool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._tls_lock = threading.Lock()
        self._tls: Any = None  # made on first use (20 ms); guarded by _tls_lock

    def http_open(self, request: Outbound) -> Answer:
        """An http:// request."""
        return self._exchange(request, ("http", request.host, ""))

    def https_open(self, request: Outbound) -> Answer:
        """An https:// request, through a CONNECT tunnel where a proxy is set."""
        return self._exchange(request, ("https", request.host, getattr(request, "_tunnel_host", None) or ""))

    def _exchange(self, request: Outbound, key: Tuple[str, str, str]) -> Answer:
        """Sends on a pooled socket; if that one had died unnoticed, once more on a fresh one."""
        conn = self._pool.take(key)
        if conn is not None:
            try:
                request.stopper.attach(conn.sock)
                return self._send(request, conn)
            except _NothingReceived:
                request.stopper.check()
            except BaseException:
                conn.close()
                raise
            conn.close()
        conn = self._connect(request, key)
        try:
            return self._send(request, conn)
        except BaseException:
            request.stopper.detach()
            conn.close()
            raise

    def _send(self, request: Outbound, conn: Conn) -> Answer:
        try:
            self._write(request, conn)
        except socket.timeout as exc:
            request.stopper.check()
            raise TransportError(f"{conn.key[1]} took in no request for {request.head_timeout_s:g} s", timed_out=True) from exc
        except OSError as exc:
            request.stopper.check()
            if not conn.readable(0):  # an answer may be waiting: upstream need not read a body it refuses
                raise _NothingReceived(f"connection to {conn.key[1]} broke: {reason_of(exc)}") from exc
        return self._receive(request, conn)

    @staticmethod
    def _write(request: Outbound, conn: Conn) -> None:
        """Sends head and body; raises OSError. An upstream that takes nothing in must not hold us for ever."""
        head, body = request.head(), request.body or b""
        if len(body) <= JOIN_BYTES and not conn.is_tls:
            conn.sock.sendall(head + body)  # fits into the kernel's buffer
            return
        conn.sock.settimeout(request.head_timeout_s)
        try:
            conn.sock.sendall(head if len(body) > JOIN_BYTES else head + body)
            if len(body) > JOIN_BYTES:
                conn.sock.sendall(body)
        finally:
            conn.sock.settimeout(None)  # an answer that refuses the body is read by the clocks of every answer

    def _receive(self, request: Outbound, conn: Conn) -> Answer:
        """Waits for the head; 1xx answers are skipped."""
        deadline = self._clock() + request.head_timeout_s
        data = self._more(request, conn, partial(conn.read_next, request.head_timeout_s), b"")
        while True:
            end = data.find(b"\r\n\r\n")
            if end >= 0:
                status = data[9:12]
                if status[:1] != b"1" or status == b"101":
                    break
                data = data[end + 4:]
                continue
            if len(data) > READ_BYTES:
                raise TransportError(f"{conn.key[1]} sent a head without end")
            data += self._more(request, conn, partial(conn.read, max(0.0, deadline - self._clock())), data)
        if not STATUS_LINE.match(data):
            raise TransportError(f"{conn.key[1]} did not answer in HTTP")
        try:
            return Answer(conn, self._pool, request, data[:end], data[end + 4:])
        except BadHead as exc:
            raise TransportError(f"{conn.key[1]} sent a bad head: {exc}") from exc

    @staticmethod
    def _more(request: Outbound, conn: Conn, read: Callable[[], bytes], received: bytes) -> bytes:
        try:
            data = read()
        except TransportError as exc:
            request.stopper.check()
            if exc.timed_out:
                raise TransportError(f"{conn.key[1]} sent no answer for {request.head_timeout_s:g} s", timed_out=True) from exc
            if received:
                raise
            raise _NothingReceived(str(exc)) from exc
        if not data:
            request.stopper.check()
            kind = TransportError if received else _NothingReceived
            raise kind(f"{conn.key[1]} closed the connection before it answered")
        return data

    def _connect(self, request: Outbound, key: Tuple[str, str, str]) -> Conn:
        """A fresh connection, with TLS and a tunnel where the key says so; raises TransportError."""
        scheme, address, tunnel = key
        host, port = split_address(address, 443 if scheme == "https" and not tunnel else 80)
        try:
            sock = connect(host, port, request.stopper)
        except OSError as exc:
            request.stopper.check()
            raise TransportError(f"cannot connect to {address}: {reason_of(exc)}") from exc
        try:
            sock.settimeout(CONNECT_S)
            if tunnel:
                open_tunnel(sock, tunnel, request.get_header("Proxy-authorization"))
            if scheme == "https":
                sock = self._context().wrap_socket(sock, server_hostname=split_address(tunnel or address, 443)[0],
                                                   do_handshake_on_connect=False)
                request.stopper.attach(sock)  # before the handshake: `stop` must find the socket that waits
                sock.do_handshake()
            sock.settimeout(None)
            return Conn(sock, key)
        except (OSError, ValueError) as exc:
            sock.close()
            request.stopper.check()
            raise TransportError(f"cannot connect to {tunnel or address}: {reason_of(exc)}") from exc
        except BaseException:
            sock.close()
            raise

    def _context(self) -> Any:
        with self._tls_lock:
            if self._tls is None:
                import ssl  # urllib has loaded it; the context, not the import, is what costs
                self._tls = ssl.create_default_context()  # honours SSL_CERT_FILE and SSL_CERT_DIR
                extra = os.environ.get("NODE_EXTRA_CA_CERTS")
                if extra and os.path.exists(extra):
                    self._tls.load_verify_locations(cafile=extra)
            return self._tls


class _NothingReceived(TransportError):
    """The socket died before one byte of the answer: on a pooled one, a fresh one may be tried."""


def split_address(address: str, port: int) -> Tuple[str, int]:
    """(host, port) of `host`, `host:port` or `[v6]:port`."""
    parts = urlsplit("//" + address)
    return parts.hostname or "", parts.port or port


def probe_when_silent(sock: Any) -> None:
    """Has the system probe a connected socket that is silent, by the names it has for that."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    named = [(getattr(socket, name), value) for name, value in TCP_KEEPALIVE if hasattr(socket, name)]
    if sys.platform == "darwin" and not hasattr(socket, "TCP_KEEPALIVE"):
        named.insert(0, (MACOS_TCP_KEEPALIVE, TCP_KEEPALIVE[1][1]))
    try:
        for option, value in named:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        if not named and hasattr(socket, "SIO_KEEPALIVE_VALS"):  # Windows before 10, 1709: on, milliseconds; it probes ten times
            sock.ioctl(socket.SIO_KEEPALIVE_VALS, (1, TCP_KEEPALIVE[0][1] * 1000, TCP_KEEPALIVE[2][1] * 1000))
    except OSError:
        pass  # the name is known here and the option is not: the system's own two hours stay


def connect(host: str, port: int, stopper: Stopper) -> socket.socket:
    """A TCP connection under the stopper's switch, tried address by address; raises OSError."""
    last: Optional[OSError] = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            stopper.attach(sock)
            sock.settimeout(CONNECT_S)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            probe_when_silent(sock)
            return sock
        except OSError as exc:
            sock.close()
            last = exc
        except BaseException:
            sock.close()
            raise
    raise last or OSError(errno.EHOSTUNREACH, f"{host} has no address")


def open_tunnel(sock: socket.socket, target: str, credentials: Optional[str]) -> None:
    """Asks a proxy for a tunnel to `target`; the proxy's credentials go here and nowhere else."""
    host, port = split_address(target, 443)
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    headers = [("Host", name)] + ([("Proxy-Authorization", credentials)] if credentials else [])
    sock.sendall(format_head(f"CONNECT {name} HTTP/1.1", headers))
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(1)  # byte by byte: what follows the head belongs to TLS
        if not piece or len(data) > READ_BYTES:
            raise OSError(errno.ECONNRESET, "the proxy closed the tunnel")
        data += piece
    status = data[9:12].decode("latin-1")
    if status != "200":
        raise OSError(errno.EACCES, f"the proxy refused the tunnel with {status}")


def proxies_of(env: Dict[str, str], supported: bool = True) -> Dict[str, str]:
    """The proxies of HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, upper or lower case; socks is not supported."""
    named = {name: env.get(f"{name}_proxy") or env.get(f"{name.upper()}_PROXY") or "" for name in ("http", "https", "all")}
    found = {scheme: named[scheme] or named["all"] for scheme in ("http", "https")}
    return {scheme: address if "://" in address else "http://" + address
            for scheme, address in found.items() if address and not (supported and address.startswith("socks"))}


class Upstream:
    """The one outbound door. Every byte that leaves goes through `open`."""

    def __init__(self, settings: Callable[[], Settings], env: Dict[str, str], log: Log) -> None:
        self._settings = settings
        self.pool = Pool()
        if settings()["proxyEnv"] and not proxies_of(env) and proxies_of(env, supported=False):
            log.warning("--proxy-env: only http proxies are supported (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY); going out directly")
        self._opener = urllib.request.OpenerDirector()
        # An empty table: without --proxy-env proxy variables are ignored, which urllib would not do by itself.
        self._opener.add_handler(urllib.request.ProxyHandler(proxies_of(env) if settings()["proxyEnv"] else {}))
        self._opener.add_handler(PooledHandler(self.pool))

    def open(self, method: str, url: str, headers: Sequence[Tuple[str, str]], body: Optional[bytes] = None,
             stopper: Optional[Stopper] = None, head_timeout_s: Optional[float] = None, whole: bool = False) -> Answer:
        """The answer to one request, whatever its status; raises TransportError, ClientGone, SetupError.

        No redirect is followed. `whole`: the body, too, may take as long as a head (a whole answer comes at once).
        """
        settings = self._settings()
        self._check_scheme(url, settings)
        head_s = head_timeout_s or settings["upstreamTransport.headersTimeoutMs"] / 1000
        gap_s = head_s if whole else settings["upstreamTransport.streamInactivityTimeoutMs"] / 1000
        return self._opener.open(Outbound(method, url, headers, body, stopper or Stopper(), head_s, gap_s))

    @staticmethod
    def _check_scheme(url: str, settings: Settings) -> None:
        """Plain http only to loopback, unless the operator allows it: tokens would be readable on the way."""
        if url.startswith("https://"):
            return
        if not url.startswith("http://"):
            raise SetupError(f"the upstream address {redact(url)} is neither http nor https")
        host = split_url(url).hostname or ""
        if not is_loopback(host) and not settings["endpoints.allowHttp"]:
            raise SetupError(f"plain http to {host} would show tokens to the network; use https or set endpoints.allowHttp")

    def fetch(self, method: str, url: str, headers: Sequence[Tuple[str, str]], body: Optional[bytes] = None,
              stopper: Optional[Stopper] = None, timeout_s: Optional[float] = None) -> Tuple[int, Dict[str, str], bytes]:
        """(status, headers, body) of a small exchange; raises like `open`."""
        answer = self.open(method, url, headers, body, stopper, timeout_s, whole=True)
        try:
            return answer.status, answer.headers, answer.read_all()
        finally:
            answer.close()


@lru_cache(maxsize=256)  # asked four times per request; `ipaddress` takes 10 µs
def is_loopback(host: str) -> bool:
    """Whether a host name or address literal means this machine: localhost, 127.*, ::1, ::ffff:127.*."""
    if host in ("localhost", "::1") or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or bool(mapped and mapped.is_loopback)


# ---- retries ----------------------------------------------------------------


class RetryPolicy(NamedTuple):
    """When an attempt is repeated, always before the first byte.

        transport, 408, 499, 502, 503, 504, "too many concurrent …"    at once, then after 1, 2, 4 s
        a stated wait (429, 503) up to `wait_limit_s`                   after that wait
        everything else                                                 not at all
    """

    retries: int = 3
    wait_limit_s: float = 60.0
    unit_s: float = 1.0  # one second; tests shrink it

    def delay(self, failure: Failure, done: int) -> Optional[float]:
        """Seconds until the next attempt after `done` repeats, None to give up."""
        if done >= self.retries:
            return None
        if failure.wait_s is not None and failure.kind != "quota":
            return failure.wait_s if failure.wait_s <= self.wait_limit_s else None
        if failure.transient:
            return self.unit_s * 2 ** (done - 1) if done else 0.0
        return None


# ---- the client's end -------------------------------------------------------


# Keep-alives and the status line are due a little early, so that with the watch's own step neither promise is exceeded.
HOLD_SHARE = 0.9


class ClientLine:
    """The writing side of one request: the status line held back, keep-alives, one lock.

        held --open--> open --finish--> ended        a stream
        held --whole-> ended                         any other answer

    While it is held every failure is still a real status. The watch opens it when upstream stays silent too
    long. `gone` is set when the client left; `stopper` then ends upstream's side.
    """

    __slots__ = ("sock", "stopper", "gone", "opened", "ended", "watched", "started_at", "sent_at", "bytes_out", "keep_alive",
                 "early_head", "ending", "chunked", "captured", "_lock", "_owed", "_clock")

    def __init__(self, sock: socket.socket, chunked: bool, clock: Callable[[], float]) -> None:
        self.sock = sock
        self.stopper = Stopper()
        self.gone = False
        self.opened = False
        self.ended = False
        self.watched = False  # set and cleared by the watch, for the thread that owns the request
        self.started_at = self.sent_at = clock()
        self.bytes_out = 0
        self.keep_alive = b""  # none: a whole answer, nothing may be sent early
        self.early_head: Callable[[], bytes] = bytes
        self.ending: Optional[Callable[[Failure], bytes]] = None  # what ends the stream when it fails
        self.chunked = chunked
        self.captured: Optional[bytearray] = None  # the body as sent, unframed, where logs want it
        self._lock = threading.Lock()
        self._owed = b""  # what the kernel did not take of a keep-alive; guarded by _lock
        self._clock = clock

    def settle(self) -> bool:
        """Stops the watch from committing the status line; True when it is out already."""
        with self._lock:
            self.keep_alive = b"" if not self.opened else self.keep_alive
            return self.opened

    def may_open_early(self, head: Callable[[], bytes], keep_alive: bytes) -> None:
        """Lets the watch commit the status line with this head when upstream stays silent."""
        self.early_head, self.keep_alive = head, keep_alive

    def send(self, data: bytes) -> None:
        """Sends body bytes of an open stream; raises ClientGone."""
        with self._lock:
            self._send(self._framed(data))

    def send_first(self, head: bytes, data: bytes) -> None:
        """Sends head and first body bytes with one call; only the bytes when the watch sent the head."""
        with self._lock:
            head = b"" if self.opened else head
            self.opened = True
            self._send(head + self._framed(data))

    def finish(self, data: bytes = b"", head: bytes = b"") -> None:
        """Sends the last bytes (and the head, if it is not out) and ends the stream.

        The watch must have let go of the line before.
        """
        with self._lock:
            head = b"" if self.opened else head
            self.opened = self.ended = True
            self._send(head + (self._framed(data) if data else b"") + (b"0\r\n\r\n" if self.chunked else b""))

    def whole(self, head: bytes, body: bytes) -> None:
        """Sends a complete answer; raises ClientGone."""
        with self._lock:
            self.opened = self.ended = True
            if self.captured is not None:
                self._capture(body)
            if len(body) > JOIN_BYTES:
                self._send(head)
                self._send(body)
            else:
                self._send(head + body)

    def _framed(self, data: bytes) -> bytes:
        if self.captured is not None:
            self._capture(data)
        return b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data

    def _capture(self, data: bytes) -> None:
        if len(self.captured) < CAPTURE_BYTES:
            self.captured += data

    def _send(self, data: bytes) -> None:
        if self._owed:
            data, self._owed = self._owed + data, b""
        try:
            self.sock.sendall(data)
        except OSError as exc:
            self.gone = True
            raise ClientGone from exc
        self.sent_at = self._clock()
        self.bytes_out += len(data)

    def leave(self) -> None:
        """Marks the client as gone and stops the upstream side; called by the watch."""
        self.gone = True
        self.stopper.stop()

    def tick(self, now: float, keep_alive_s: float, status_hold_s: float) -> None:
        """Sends a keep-alive if one is due. Never waits: a line that is being written needs none."""
        if not self.keep_alive or self.ended:
            return
        due = self.sent_at + HOLD_SHARE * keep_alive_s if self.opened else self.started_at + HOLD_SHARE * status_hold_s
        if now < due or not self._lock.acquire(False):
            return
        try:
            if self.keep_alive and not self.ended:  # asked again under the lock: `settle` may have come between
                self._nudge(now)
        finally:
            self._lock.release()

    def _nudge(self, now: float) -> None:
        data = self._owed or (b"" if self.opened else self.early_head()) + self._framed(self.keep_alive)
        self.opened = True
        self.sent_at = now
        try:
            taken = self.sock.send(data, DONT_WAIT) if DONT_WAIT or select.select([], [self.sock], [], 0)[1] else 0
        except (BlockingIOError, InterruptedError):
            taken = 0
        except OSError:
            self.leave()
            return
        self._owed = data[taken:]
        self.bytes_out += taken


WATCH_TURN_S = 0.1  # how long a request may run before its client's socket is looked at


class Watch:
    """One thread for all running requests: notices clients that left, and sends keep-alives in silence.

    Its own thread takes new requests into the selector, a turn later: most whole answers are over by then, and two
    system calls with their switches of threads are saved.
    """

    def __init__(self, settings: Callable[[], Settings], log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._log = log
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._lines: Dict[int, ClientLine] = {}  # by descriptor; guarded by _lock
        self._unseen: Dict[int, ClientLine] = {}  # those not in the selector yet; guarded by _lock
        self._talkers: Dict[int, ClientLine] = {}  # those with bytes nobody reads yet, behind which an end stays unseen; guarded by _lock
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._stopped = False
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread within one step."""
        self._stopped = True
        self._waker.close()
        if self._thread is not None:
            self._thread.join(2)
        self._selector.close()
        self._woken.close()

    def lines(self) -> List[ClientLine]:
        """The requests under watch."""
        with self._lock:
            return list(self._lines.values())

    def add(self, line: ClientLine) -> None:
        """Puts a request under watch."""
        number = line.sock.fileno()
        if number < 0:
            line.leave()  # the socket is closed already
            return
        line.watched = True
        with self._lock:
            self._lines[number] = self._unseen[number] = line

    def remove(self, line: ClientLine) -> None:
        """Lets go of a request; before its last byte is sent, or a client that closes on it looks gone."""
        if not line.watched:
            return
        line.watched = False
        number = line.sock.fileno()
        with self._lock:
            if self._lines.get(number) is line:
                del self._lines[number]
                self._talkers.pop(number, None)
                if self._unseen.pop(number, None) is None:
                    self._forget(number)

    def _forget(self, number: int) -> None:
        try:
            self._selector.unregister(number)
        except (KeyError, ValueError, OSError):
            pass  # a pipelined request took it out before

    def _see(self) -> None:
        """Takes new requests into the selector."""
        with self._lock:
            for number, line in self._unseen.items():
                try:
                    self._selector.register(number, selectors.EVENT_READ, line)
                except (KeyError, ValueError, OSError):
                    line.leave()  # the socket is closed already
            self._unseen.clear()

    def _run(self) -> None:
        scanned_at = self._clock()
        while not self._stopped:
            settings = self._settings()
            keep_alive_s, status_hold_s = settings["streams.keepAliveSeconds"], settings["streams.statusHoldSeconds"]
            step = max(0.005, min(1.0, keep_alive_s / 10, status_hold_s / 10))
            turn = min(step, WATCH_TURN_S if self._lines else 0.5)
            try:
                ready = self._selector.select(turn)
            except (OSError, ValueError):
                ready = []  # a descriptor was closed while we waited, or there are more than `select` can watch (Windows: 512)
                time.sleep(turn)
            try:
                self._see()
                for key, _ in ready:
                    if key.data is not None:
                        self._look(key.data)
                now = self._clock()
                if now - scanned_at >= step:
                    scanned_at = now
                    self._scan(now, keep_alive_s, status_hold_s)
            except Exception as exc:  # one line's trouble must not end keep-alives for all
                self._log.once("watch", f"internal error in the watch: {type(exc).__name__}: {exc}")

    def _scan(self, now: float, keep_alive_s: float, status_hold_s: float) -> None:
        with self._lock:
            talkers = list(self._talkers.values())
        for line in talkers:
            if has_hung_up(line.sock):
                line.leave()
        if keep_alive_s:
            for line in self.lines():
                line.tick(now, keep_alive_s, status_hold_s)

    def _look(self, line: ClientLine) -> None:
        """A readable client socket: gone, or it has sent its next request already."""
        number = line.sock.fileno()
        if number < 0 or self._lines.get(number) is not line:
            return  # ended meanwhile; the number may belong to somebody else
        try:
            data = line.sock.recv(1, socket.MSG_PEEK | DONT_WAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        with self._lock:
            if self._lines.get(number) is line:
                self._forget(number)  # level-triggered: it would be reported again and again
                if data:
                    self._talkers[number] = line
        if not data:
            line.leave()


TCP_HUNG_UP = (7, 8)  # CLOSE, CLOSE_WAIT of include/net/tcp_states.h


def has_hung_up(sock: socket.socket) -> bool:
    """Whether the far end has closed, read or not; False where the system does not tell (only Linux does)."""
    try:
        return hasattr(socket, "TCP_INFO") and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in TCP_HUNG_UP
    except OSError:
        return False  # closed by its own thread, or no TCP


###############################################################################
#                                  Accounts                                   #
###############################################################################
# Who we are upstream: GitHub tokens found or made by the device flow, and the
# Copilot token each is exchanged for.

# ---- addresses --------------------------------------------------------------

OAUTH_APPS = {"": "Iv1.b507a08c87ecfe98", "opencode": "Ov23li8tweQw6odWQebz"}  # copilot-upstream 1.2
OPENCODE_AGENT = "opencode/1.14.29"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


class Hosts(NamedTuple):
    """Where GitHub and Copilot live for this configuration; `copilot` None: the token says."""

    web: str
    api: str
    copilot: Optional[str]
    domain: str  # github.com, or the GHE.com tenant
    enterprise: bool
    account_type: str

    def api_base(self, token: Json, direct: bool) -> str:
        """The Copilot API for a token document; the token's own word wins over every guess (copilot-upstream 1.6)."""
        endpoints = token.get("endpoints")
        stated = endpoints.get("api") if isinstance(endpoints, dict) else None
        if self.copilot or stated:
            return (self.copilot or str(stated)).rstrip("/")
        tier = re.search(r"proxy-ep=proxy\.(\w+)\.githubcopilot\.com", str(token.get("token") or ""))
        if tier:
            return f"https://api.{tier.group(1)}.githubcopilot.com"
        if self.enterprise:
            return f"https://copilot-api.{self.domain}"
        if direct or self.account_type == "individual":
            return "https://api.githubcopilot.com"
        return f"https://api.{self.account_type}.githubcopilot.com"


def hosts_of(settings: Settings, paths: Paths) -> Hosts:
    """The addresses after overrides, enterprise domain and account type."""
    domain = paths.enterprise or "github.com"
    return Hosts(web=(settings["endpoints.github"] or f"https://{domain}").rstrip("/"),
                 api=(settings["endpoints.githubApi"] or f"https://api.{domain}").rstrip("/"),
                 copilot=settings["endpoints.copilot"] or None, domain=domain,
                 enterprise=bool(paths.enterprise), account_type=settings["accountType"])


# ---- found tokens -----------------------------------------------------------

# Kinds that cannot be exchanged and are refused directly (copilot-upstream 1.1).
USELESS_TOKENS = {"ghp_": "a classic personal access token", "github_pat_": "a personal access token",
                  "ghs_": "an installation token"}
TOKEN_VARIABLES = ("COPILOT_API_GITHUB_TOKEN", "COPILOT_GITHUB_TOKEN", "GH_COPILOT_TOKEN")
GENERIC_TOKEN_VARIABLES = ("GH_TOKEN", "GITHUB_TOKEN")  # whatever else uses them comes first: tried late


def found_tokens(flag: Optional[str], env: Dict[str, str], paths: Paths, domain: str) -> Iterator[Tuple[str, str]]:
    """(source, token) in the order of DESIGN 8; what is found is tried, not believed.

    GH_TOKEN and GITHUB_TOKEN belong to github.com: they are never sent to an enterprise host.
    """
    if flag:
        yield "--github-token", flag
    yield from ((name, env[name].strip()) for name in TOKEN_VARIABLES if env.get(name, "").strip())
    own = read_text(paths.token) or (None if paths.oauth_app or paths.enterprise else older_token(env))
    if own:
        yield "token file", own
    if domain == "github.com":
        yield from ((name, env[name].strip()) for name in GENERIC_TOKEN_VARIABLES if env.get(name, "").strip())
    yield from editor_tokens(env, domain)


def older_token(env: Dict[str, str]) -> Optional[str]:
    """The token file of an older fork in its default place."""
    home = env.get("HOME") or os.path.expanduser("~")
    return (read_text(os.path.join(home, ".local", "share", "copilot-api", "github_token"))
            or read_text(os.path.join(home, ".ghc-tunnel", "github_token.txt")))


def editor_tokens(env: Dict[str, str], domain: str) -> Iterator[Tuple[str, str]]:
    """Tokens that editors left: apps.json before hosts.json; the plugin's own app first, `ghu_` before `gho_`.

    {"github.com:Iv1.b507…":{"user","oauth_token":"ghu_…"}}   {"github.com":{"oauth_token":"ghu_…"}}
    """
    base = env.get("LOCALAPPDATA") if os.name == "nt" else env.get("XDG_CONFIG_HOME")
    folder = os.path.join(base or os.path.join(env.get("HOME") or os.path.expanduser("~"), ".config"), "github-copilot")
    for name in ("apps.json", "hosts.json"):
        entries = read_json(os.path.join(folder, name)) or {}
        tokens = [(key, entry["oauth_token"].strip()) for key, entry in entries.items()
                  if (key == domain or key.startswith(domain + ":")) and isinstance(entry, dict)
                  and isinstance(entry.get("oauth_token"), str) and entry["oauth_token"].strip()]
        tokens.sort(key=lambda pair: (OAUTH_APPS[""] not in pair[0], not pair[1].startswith("ghu_")))
        yield from ((f"editor ({name})", token) for _, token in tokens)


# ---- the exchange -----------------------------------------------------------

# notification_id of a 403 envelope -> what the user can do; GitHub's own message stands before it (copilot-upstream 1.5).
SUBSCRIBE = "subscribe at https://github.com/settings/copilot or run `auth login` with another account"
OTHER_ACCOUNT = "run `auth login` with another account, or ask GitHub support"
IDENTITY = "GitHub refused the client identity: adjust identity.userAgent and identity.editorVersion"
NO_ACCESS = {
    "no_copilot_access": SUBSCRIBE,
    "not_signed_up": SUBSCRIBE,
    "subscription_ended": SUBSCRIBE,
    "expired_coupon": SUBSCRIBE,
    "revoked_coupon": SUBSCRIBE,
    "codespaces_demo_inactive": SUBSCRIBE,
    "enterprise_managed_user_account": "a managed account gets Copilot through its enterprise: ask its administrator",
    "feature_flag_blocked": "a policy switches Copilot off for this account: ask its administrator",
    "spammy_user": "GitHub has flagged this account: write to GitHub support",
    "billing_locked": "billing of the account is locked: settle it in its billing settings",
    "trade_restricted": OTHER_ACCOUNT,
    "trade_restricted_country": OTHER_ACCOUNT,
    "access_revoked": OTHER_ACCOUNT,
    "snippy_not_configured": "choose at https://github.com/settings/copilot whether suggestions may match public code",
    "go_http_client": IDENTITY,
    "programmatic_token_generation": IDENTITY,
    "server_error": "GitHub could not say whether this account has Copilot: try again later",
}
EXCHANGE_TRIES = 3  # on 5xx and transport errors (copilot-upstream 1.5)


class ExchangeError(Exception):
    """Why a GitHub token gave no Copilot token. `verdict`: refused (for good), not_found, later (may pass)."""

    def __init__(self, message: str, verdict: str, status: int = 401) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.status = status


def exchange_error(status: int, headers: Dict[str, str], body: bytes) -> ExchangeError:
    """A failed exchange as a sentence that says what to do."""
    message, _, parsed = error_text(body)
    details = (parsed or {}).get("error_details")
    if status == 401:
        return ExchangeError(f"GitHub rejected the token ({status} {message}); run `auth login`", "refused")
    if status == 404:
        return ExchangeError("GitHub does not exchange tokens of this app (404); run `auth login`", "not_found")
    if status == 403 and "rate limit" in message.lower():
        until = headers.get("x-ratelimit-reset", "")
        when = time.strftime(" until %H:%M", time.localtime(int(until))) if until.isdigit() else ""
        return ExchangeError(f"GitHub's API rate limit is reached{when}; the token stays, it is tried again", "later", 503)
    if status == 403 and "personal access token" in message.lower():
        return ExchangeError("a personal access token cannot be used for Copilot; run `auth login`", "refused")
    if isinstance(details, dict):
        name = str(details.get("notification_id") or "")
        said = str(details.get("message") or details.get("title") or message).rstrip(".")
        address = f" ({details['url']})" if isinstance(details.get("url"), str) else ""
        return ExchangeError(f"{said}{address}; {NO_ACCESS.get(name, OTHER_ACCOUNT)}", "later" if name == "server_error" else "refused", 403)
    if status == 403:
        return ExchangeError(f"GitHub refused a Copilot token (403 {message}); check the account's Copilot access", "refused", 403)
    return ExchangeError(f"GitHub answered {status} to the token exchange; it is tried again", "later", 503)


@dataclass(eq=False, repr=False)
class CopilotToken(Value):
    """A bearer for the Copilot API and where to use it.

    `expires_at` is our own clock's: receipt + refresh_in + 60 s, so a wrong clock or a short lifetime never
    means an exchange per request. It is wall clock: a monotonic one stands still while a laptop sleeps.
    """

    bearer: Secret
    api: str
    received_at: float
    refresh_in: float
    direct: bool = False

    def is_fresh(self, now: float) -> bool:
        """Whether it may be used at `now` (Unix seconds); a clock that was set back counts as expired."""
        if self.direct:
            return True
        left = self.received_at + self.refresh_in + 60 - now
        return now >= self.received_at and left > min(300.0, self.refresh_in / 5)


class SingleFlight:
    """Lets one caller do the work and gives its result to all who ask meanwhile; no lock is held while it works.

    Work that requests wait for has a thread of its own: the client of the first may leave, the others still need it.
    No frame that an error of the work has passed may lead back to it: the ring would hold every request that waited.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Optional[_Flight] = None  # guarded by _lock

    def run(self, work: Callable[[], Any], stopper: Optional[Stopper] = None) -> Any:
        """The result (or error) of `work`, done by this thread or by the one that was first."""
        with self._lock:
            flight, first = self._running or _Flight(), self._running is None
            self._running = flight
        if first and not (stopper and self._has_left(flight, work)):
            self._fly(flight, work)
        try:
            return flight.join(stopper)
        finally:
            del flight

    def _has_left(self, flight: _Flight, work: Callable[[], Any]) -> bool:
        """Starts the work in a thread of its own; False where the system gives no more threads."""
        try:
            threading.Thread(target=self._fly, args=(flight, work), name="flight", daemon=True).start()
        except RuntimeError:
            return False
        return True

    def _fly(self, flight: _Flight, work: Callable[[], Any]) -> None:
        """Does the work; its error is for those who join."""
        try:
            flight.result = work()
        except BaseException as exc:
            flight.error = exc
        finally:
            with self._lock:
                self._running = None
            flight.done.set()
            del flight


class _Flight:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.result: Any = None
        self.error: Optional[BaseException] = None

    def join(self, stopper: Optional[Stopper]) -> Any:
        wait_for(self.done, None, stopper)
        try:
            if self.error is not None:
                raise self.error
            return self.result
        finally:
            del self


def wait_for(event: threading.Event, seconds: Optional[float], stopper: Optional[Stopper]) -> bool:
    """Whether the event happened in time; raises ClientGone when the client leaves meanwhile."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        step = 0.25 if deadline is None else min(0.25, max(0.0, deadline - time.monotonic()))
        if event.wait(step):
            return True
        if stopper is not None:
            stopper.check()
        if deadline is not None and time.monotonic() >= deadline:
            return False


class Account:
    """One GitHub identity: its token, how it is used, and the Copilot token of the moment."""

    def __init__(self, token: str, source: str) -> None:
        self.token = Secret(token)
        self.source = source
        self.login = ""
        self.direct = False  # the GitHub token itself is the bearer (opencode's app)
        self.copilot: Optional[CopilotToken] = None
        self.flight = SingleFlight()
        self.key = hashlib.sha256(token.encode()).hexdigest()[:12]  # names the account in carriers; stable over restarts


NOT_SIGNED_IN = "not_signed_in"


class Accounts:
    """Finds an account, keeps its Copilot token fresh, and signs in when there is none.

        begin -> settling -> active            a found token worked, or could not be tried for now
                          -> none -> device flow -> active
    """

    def __init__(self, upstream: Upstream, paths: Paths, settings: Callable[[], Settings], log: Log, env: Dict[str, str],
                 flag_token: Optional[str] = None, terminal: bool = False, clock: Callable[[], float] = time.time,
                 unit_s: float = 1.0) -> None:
        self._upstream = upstream
        self._terminal = terminal  # somebody may read a code there: ask for one at start
        self._paths = paths
        self._settings = settings
        self._log = log
        self._env = env
        self._flag_token = flag_token
        self._clock = clock
        self._unit_s = unit_s
        self.settled = threading.Event()  # set once the found tokens are tried
        self.active: Optional[Account] = None
        self.refusal = ""  # why the last token tried was refused
        self.on_active: List[Callable[[], None]] = []
        self._candidates: Iterator[Tuple[str, str]] = iter(())  # only the one thread inside _settling draws from it
        self._settling = SingleFlight()
        self.device = DeviceFlow(self, upstream, log, unit_s)

    @property
    def hosts(self) -> Hosts:
        """The addresses of now (settings are live)."""
        return hosts_of(self._settings(), self._paths)

    @property
    def oauth_app(self) -> str:
        """The identity in use: "" or `opencode`."""
        return self._paths.oauth_app

    # ---- settling -----------------------------------------------------------

    def begin(self) -> None:
        """Looks for an account in the background."""
        threading.Thread(target=self.settle, name="accounts", daemon=True).start()

    def stop(self) -> None:
        """Ends what was begun on its own: a sign-in that nobody will finish."""
        self.device.stop()

    def settle(self) -> None:
        """Tries the found tokens in order until one works; called once at start and by commands."""
        try:
            self._candidates = found_tokens(self._flag_token, self._env, self._paths, self.hosts.domain)
            self._settling.run(self._next_account)
        finally:
            self.settled.set()
        if self.active is None:
            self._log.info(f"nobody is signed in: open {self._sign_in_url()} or run `copilot_proxy.py auth login`")
            if self._terminal:
                self.device.begin()

    def _next_account(self, failed: Optional[Account] = None) -> None:
        """Makes the next candidate that is not refused the active account, in place of `failed`; none: signed out.

        `failed` stays active until then, so that other requests do not meet a gap.
        """
        if self.active is not failed:
            return  # somebody was quicker
        for source, token in self._candidates:
            useless = next((what for prefix, what in USELESS_TOKENS.items() if token.startswith(prefix)), None)
            if useless:
                self._log.warning(f"GitHub token from {source} is {useless}; it cannot be used for Copilot and is skipped")
            elif self._try(Account(token, source)):
                return
        if self.active is failed:
            self.active = None

    def _try(self, account: Account) -> bool:
        """Whether the account works or may work later; it is active then."""
        usable = self._is_usable(account)
        if usable:
            self._activate(account)
        return usable

    def _is_usable(self, account: Account) -> bool:
        """Whether Copilot takes the account, as far as it can be told now; a refusal is logged and kept."""
        try:
            self._mint(account)
        except ExchangeError as exc:
            if exc.verdict != "later":
                self.refusal = str(exc)
                self._log.warning(f"GitHub token from {account.source}: {exc}")
                return False
            self._log.warning(f"GitHub token from {account.source} could not be tried: {exc}")
        return True

    def _activate(self, account: Account) -> None:
        self.active = account
        self.refusal = ""
        self._log.info(f"using the GitHub token from {account.source}" + (" directly, without exchange" if account.direct else ""))
        if self._settings()["showToken"]:
            self._log.shown_secret(f"GitHub token: {account.token.reveal()}")
        threading.Thread(target=self._greet, args=(account,), name="greet", daemon=True).start()

    def _greet(self, account: Account) -> None:
        """Learns the login name and lets the rest of the house know; nothing depends on the name."""
        for notify in self.on_active:
            notify()
        try:
            status, _, body = self._upstream.fetch("GET", self.hosts.api + "/user", self.github_headers(account, "2022-11-28"),
                                                   timeout_s=30)
            value = json.loads(body) if status == 200 else {}
            account.login = str(value.get("login") or "")
            if account.login:
                self._log.info(f"logged in as {account.login}")
        except (TransportError, SetupError, ValueError, AttributeError):
            pass

    def adopt(self, token: str, source: str) -> bool:
        """Puts a token just obtained by sign-in to work, now and after a restart; False when Copilot refuses it.

        A refused one does not replace the stored token of an account that works.
        """
        account = Account(token, source)
        works = self._is_usable(account)
        if works or self.active is None:
            self.store(token)
        if works:
            self._activate(account)
        self.settled.set()
        if not works:
            self._log.warning(f"signed in, but Copilot is not available: {self.refusal}")
        return works

    def store(self, token: str) -> None:
        """Writes the token file; a full disk is said, the token works until the restart."""
        try:
            self._paths.make()
            write_private(self._paths.token, token + "\n")
        except (OSError, SetupError) as exc:
            self._log.warning(f"cannot write {self._paths.token}: {reason_of(exc)}; sign in again after a restart")

    def forget(self) -> bool:
        """Removes the token file; True when there was one."""
        try:
            os.unlink(self._paths.token)
            return True
        except FileNotFoundError:
            return False

    # ---- tokens -------------------------------------------------------------

    def github_headers(self, account: Account, api_version: Optional[str] = None) -> List[Tuple[str, str]]:
        """Headers of a GitHub REST call (copilot-upstream 1.5)."""
        settings = self._settings()
        if account.direct or self.oauth_app == "opencode":
            return [("Authorization", "Bearer " + account.token.reveal()), ("Accept", "application/json"),
                    ("User-Agent", OPENCODE_AGENT)]
        return [("Authorization", "token " + account.token.reveal()), ("Accept", "application/json"),
                ("User-Agent", settings["identity.userAgent"]), ("Editor-Version", settings["identity.editorVersion"]),
                ("Editor-Plugin-Version", settings["identity.pluginVersion"]),
                ("X-GitHub-Api-Version", api_version or settings["identity.githubApiVersion"]),
                ("X-VSCode-User-Agent-Library-Version", "electron-fetch")]

    def bearer(self, stopper: Optional[Stopper] = None) -> CopilotToken:
        """A Copilot token that is fresh by our own clock; exchanges in single flight when needed.

        Waits for the first settling at most `streams.statusHoldSeconds`; raises ClientError 401 that says how to
        sign in, or UpstreamError when GitHub cannot be reached.
        """
        if not self.settled.is_set():
            wait_for(self.settled, self._settings()["streams.statusHoldSeconds"], stopper)
        while True:
            account = self.active
            if account is None:
                raise self.sign_in_needed()
            try:
                return self._fresh(account) or account.flight.run(partial(self._fresh_or_minted, account), stopper)
            except ExchangeError as exc:
                if exc.verdict == "later" or not self._replaced(account, exc, stopper):
                    raise self._exchange_failed(exc) from exc

    def _fresh(self, account: Account) -> Optional[CopilotToken]:
        token = account.copilot
        return token if token is not None and token.is_fresh(self._clock()) else None

    def _fresh_or_minted(self, account: Account) -> CopilotToken:
        """Asked again inside the flight: the one before may just have landed."""
        return self._fresh(account) or self._mint(account)

    def _replaced(self, account: Account, exc: ExchangeError, stopper: Optional[Stopper]) -> bool:
        """An account refused for good makes way for the next one found; True when another one is active now."""
        self.refusal = str(exc)
        if self.active is account:
            self._log.warning(f"GitHub token from {account.source}: {exc}")
        self._settling.run(partial(self._next_account, account), stopper)
        return self.active is not None and self.active is not account

    def _exchange_failed(self, exc: ExchangeError) -> ProxyError:
        """What a request is told."""
        if exc.verdict == "later":
            return UpstreamError(Failure("auth", "account", exc.status, str(exc), "token_exchange_failed", transient=True))
        if exc.status == 403:
            return UpstreamError(Failure("policy", "account", 403, str(exc), "copilot_access"))
        return self.sign_in_needed()

    def spoil(self, token: CopilotToken) -> None:
        """Forgets a token that upstream refused, unless another thread has replaced it already."""
        account = self.active
        if account is not None and account.copilot is token and not token.direct:
            account.copilot = None

    def sign_in_needed(self) -> ClientError:
        """The 401 for everybody while nobody is signed in; the first one starts a device code."""
        self.device.begin()
        why = f" ({self.refusal})" if self.refusal else ""
        code = self.device.code_line()
        return ClientError(f"Not signed in to GitHub Copilot{why}. Open {self._sign_in_url()} or run `copilot_proxy.py auth login`"
                           + (f"; {code}" if code else ""), status=401, code=NOT_SIGNED_IN, kind="authentication_error")

    def _sign_in_url(self) -> str:
        settings = self._settings()
        return f"http://{shown_host(settings['host'])}:{settings['port']}/auth/device"

    def _mint(self, account: Account) -> CopilotToken:
        """A new Copilot token for the account; raises ExchangeError."""
        if self.oauth_app == "opencode" or account.direct:
            return self._mint_direct(account)
        try:
            document = self._exchange(account)
        except ExchangeError as exc:
            if exc.verdict == "not_found" and account.token.reveal().startswith("gho_"):
                return self._mint_direct(account)
            raise
        refresh = document.get("refresh_in")
        account.copilot = CopilotToken(Secret(str(document["token"])), self.hosts.api_base(document, False), self._clock(),
                                       float(refresh) if isinstance(refresh, (int, float)) and refresh > 0 else 1500.0)
        if self._settings()["showToken"]:
            self._log.shown_secret(f"Copilot token: {account.copilot.bearer.reveal()}")
        return account.copilot

    def _exchange(self, account: Account) -> Json:
        """GET /copilot_internal/v2/token; 5xx and transport errors are tried again; raises ExchangeError."""
        url = self.hosts.api + "/copilot_internal/v2/token"
        failure: Optional[ExchangeError] = None
        for attempt in range(EXCHANGE_TRIES):
            if attempt:
                time.sleep(self._unit_s * attempt)
            try:
                status, headers, body = self._upstream.fetch("GET", url, self.github_headers(account), timeout_s=30)
            except (TransportError, SetupError) as exc:
                failure = ExchangeError(f"cannot reach {urlsplit(url).netloc}: {exc}", "later", 503)
                continue
            if status == 200:
                return self._token_document(body)
            failure = exchange_error(status, headers, body)
            if status < 500:
                break
        try:
            raise failure or ExchangeError("the token exchange was not tried", "later", 503)
        finally:
            failure = None  # see SingleFlight

    @staticmethod
    def _token_document(body: bytes) -> Json:
        try:
            document = json.loads(body)
        except ValueError:
            document = None
        if not isinstance(document, dict) or not isinstance(document.get("token"), str):
            raise ExchangeError("GitHub's answer to the token exchange holds no token; it is tried again", "later", 503)
        return document

    def _mint_direct(self, account: Account) -> CopilotToken:
        """The GitHub token as bearer, if GET /models answers 200 with it (copilot-upstream 1.8)."""
        headers = [("Authorization", "Bearer " + account.token.reveal()), ("User-Agent", OPENCODE_AGENT)]
        api = ""
        try:
            status, _, body = self._upstream.fetch("GET", self.hosts.api + "/copilot_internal/user", headers, timeout_s=30)
            api = self.hosts.api_base(json_object(body) or {} if status == 200 else {}, True)
            status, answer_headers, body = self._upstream.fetch("GET", api + "/models", headers, timeout_s=30)
        except (TransportError, SetupError) as exc:
            raise ExchangeError(f"cannot reach {urlsplit(api).netloc}: {exc}", "later", 503) from exc
        if status != 200:
            raise exchange_error(status, answer_headers, body) if status != 404 else ExchangeError(
                "GitHub does not exchange this token (404) and Copilot does not take it directly; run `auth login`", "refused")
        account.direct = True
        account.copilot = CopilotToken(account.token, api, self._clock(), 0.0, direct=True)
        return account.copilot


def shown_host(host: str) -> str:
    """The host to put into an address for people: wildcards are this machine."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else (f"[{host}]" if ":" in host else host)


# ---- device flow ------------------------------------------------------------

# error of a poll -> what the user is told when it ends the flow (copilot-upstream 1.3)
DEVICE_ENDINGS = {
    "expired_token": "the code has expired; ask for a new one",
    "access_denied": "sign-in was refused on GitHub",
    "device_flow_disabled": "GitHub has the device flow switched off for this app",
    "incorrect_client_credentials": "GitHub does not know this app",
    "incorrect_device_code": "GitHub does not know this code",
    "unsupported_grant_type": "GitHub does not offer the device flow here",
}
REFUSED_BY_USER = "refused"
SLOW_DOWN_S = 5  # added to the interval when `slow_down` names none


def positive(value: Any, default: float) -> float:
    """A number of seconds as GitHub gives it (a form gives text), the default for anything else."""
    try:
        return float(value) if 0 < float(value) < 1e6 else default
    except (TypeError, ValueError):
        return default


class DeviceFlow:
    """Sign-in by a code the user types at GitHub.

        idle -> starting -> waiting -> done | failed(reason) | refused(reason)

    `begin` keeps a code that is still good, and what the user or GitHub refused until somebody asks anew.
    """

    def __init__(self, accounts: Accounts, upstream: Upstream, log: Log, unit_s: float) -> None:
        self._accounts = accounts
        self._upstream = upstream
        self._log = log
        self._unit_s = unit_s
        self._lock = threading.Lock()
        self.state = "idle"  # guarded by _lock
        self.reason = ""
        self.document: Json = {}  # GitHub's answer to the code request
        self.expires_at = 0.0
        self._stopped = threading.Event()
        self.changed = threading.Condition(self._lock)

    def begin(self, anew: bool = False) -> None:
        """Starts the flow in the background unless one is running; `anew` asks for a new code."""
        with self._lock:
            if self.state in ("starting", "waiting", "refused") and not anew:
                return
            self.state, self.reason = "starting", ""
            self._stopped.set()  # ends the poll of an earlier code
            stopped = self._stopped = threading.Event()
        threading.Thread(target=self._run, args=(stopped,), name="device-flow", daemon=True).start()

    def wait_code(self, seconds: float) -> Json:
        """The state once a code is there (or failed): {"state","user_code","verification_uri","expires_in","error"}."""
        with self._lock:
            self.changed.wait_for(lambda: self.state != "starting", seconds)
            return self._shown()

    def shown(self) -> Json:
        """The state as a page or client may see it; never a token."""
        with self._lock:
            return self._shown()

    def _shown(self) -> Json:
        left = max(0, int(self.expires_at - time.time()))
        return {"state": self.state, "user_code": self.document.get("user_code"),
                "verification_uri": self.document.get("verification_uri"), "expires_in": left,
                **({"error": self.reason} if self.reason else {})}

    def stop(self) -> None:
        """Ends the poll."""
        with self._lock:
            self._stopped.set()

    def code_line(self) -> str:
        """`enter WDJB-MJHT at https://…`, "" while there is no code."""
        with self._lock:
            if self.state != "waiting":
                return ""
            return f"enter {self.document['user_code']} at {self.document['verification_uri']}"

    def _run(self, stopped: threading.Event) -> None:
        """The thread of one code: a failure of any kind leaves a state that says so."""
        try:
            document = self._request_code()
            if not self._set(stopped, "waiting", document=document):
                return
            self._log.info(f"sign in to GitHub: {self.code_line()}")
            token = self._poll(stopped, document)
            if token and stopped is self._stopped:
                self._log.info("signed in to GitHub")
                works = self._accounts.adopt(token, "device sign-in")  # first: a poll in between must not start a new code
                self._set(stopped, "done" if works else "refused", "" if works else self._accounts.refusal)
        except Exception as exc:  # the state must never stay "waiting" with nobody polling
            refused = isinstance(exc, SetupError) and exc.code == REFUSED_BY_USER
            if self._set(stopped, "refused" if refused else "failed", str(exc)):
                self._log.warning(f"sign-in failed: {exc}")

    def _set(self, stopped: threading.Event, state: str, reason: str = "", document: Optional[Json] = None) -> bool:
        """Changes the state, unless a newer flow has taken over."""
        with self._lock:
            if stopped is not self._stopped or stopped.is_set():
                return False
            self.state, self.reason = state, reason
            if document is not None:
                self.document = document
                self.expires_at = time.time() + document["expires_in"]
            self.changed.notify_all()
            return True

    def _post(self, path: str, body: Json) -> Json:
        """A POST to GitHub's sign-in pages; answers in JSON or as a form."""
        headers = [("Accept", "application/json"), ("Content-Type", "application/json"), ("User-Agent", "GitHubCopilotChat")]
        status, _, raw = self._upstream.fetch("POST", self._accounts.hosts.web + path, headers, dump_json(body), timeout_s=30)
        if status >= 500:
            raise TransportError(f"GitHub answered {status}")
        try:
            value = json.loads(raw)
        except ValueError:
            value = dict(parse_qsl(raw.decode("utf-8", "replace")))
        return value if isinstance(value, dict) else {}

    def _client_id(self) -> str:
        return OAUTH_APPS.get(self._accounts.oauth_app, OAUTH_APPS[""])

    def _request_code(self) -> Json:
        """{"device_code","user_code","verification_uri","expires_in","interval"}; raises SetupError."""
        try:
            document = self._post("/login/device/code", {"client_id": self._client_id(), "scope": "read:user"})
        except (TransportError, SetupError) as exc:
            raise SetupError(f"cannot get a sign-in code from GitHub: {exc}") from exc
        if not document.get("device_code") or not document.get("user_code"):
            raise SetupError(f"GitHub gave no sign-in code: {document.get('error_description') or document.get('error') or 'empty answer'}")
        return {**document, "verification_uri": document.get("verification_uri") or self._accounts.hosts.web + "/login/device",
                "expires_in": positive(document.get("expires_in"), 900.0), "interval": positive(document.get("interval"), SLOW_DOWN_S)}

    def _poll(self, stopped: threading.Event, document: Json) -> Optional[str]:
        """The access token once the user has agreed, None when a newer flow took over; raises SetupError."""
        interval = document["interval"]
        request = {"client_id": self._client_id(), "device_code": document["device_code"], "grant_type": DEVICE_GRANT}
        while time.time() < self.expires_at:
            # one second over the interval, so that clocks that differ a little do not mean slow_down
            if stopped.wait((interval + 1) * self._unit_s):
                return None
            try:
                answer = self._post("/login/oauth/access_token", request)
            except TransportError:
                continue  # the network may come back before the code expires
            if answer.get("access_token"):
                return str(answer["access_token"])
            error = str(answer.get("error") or "")
            if error == "slow_down":
                interval = positive(answer.get("interval"), interval + SLOW_DOWN_S)
            elif error and error != "authorization_pending":
                raise SetupError(DEVICE_ENDINGS.get(error) or str(answer.get("error_description") or error),
                                 code=None if error == "expired_token" else REFUSED_BY_USER)
        raise SetupError(DEVICE_ENDINGS["expired_token"])


###############################################################################
#                                  Providers                                  #
###############################################################################
# How one upstream is addressed: hosts, identity headers, paths, its catalogue.

# dialect or operation -> path below the API base (copilot-upstream 0.2); only the Messages ones carry /v1
COPILOT_PATHS = {CHAT: "/chat/completions", RESPONSES: "/responses", MESSAGES: "/v1/messages", EMBEDDINGS: "/embeddings",
                 "count_tokens": "/v1/messages/count_tokens"}
COUNT_TIMEOUT_S = 3.0  # counting that takes longer is no help: clients ask in bursts of 25
# How long a fetched catalogue counts as current; VS Code uses the same (copilot-upstream 4.1).
CATALOGUE_FRESH_S = 600.0
CATALOGUE_RETRY_S = 15.0  # after a failed fetch
# VS Code renews its session id every hour or so (gateway-features 5.3).
SESSION_RENEW_S = 3600.0


def opencode_agent(agent: str) -> str:
    """The client's own agent if it is opencode's, with the bare product behind a comma (gateway-features 5.3)."""
    if not agent.startswith("opencode/"):
        return OPENCODE_AGENT
    bare = agent.split()[0].rstrip(",")
    return agent if agent == bare or agent.endswith(f", {bare}") else f"{agent}, {bare}"


class Identity:
    """The ids of this installation: machine and device random per home (never the MAC), session per hour."""

    def __init__(self, paths: Paths, lock: HomeLock, log: Log, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._session: Tuple[str, float] = ("", 0.0)
        with lock:
            stored = read_json(paths.identity) or {}
            self.machine_id = str(stored.get("machineId") or os.urandom(32).hex())
            self.device_id = str(stored.get("deviceId") or random_uuid())
            if stored.get("machineId") != self.machine_id or stored.get("deviceId") != self.device_id:
                try:
                    write_json(paths.identity, {**stored, "machineId": self.machine_id, "deviceId": self.device_id})
                except OSError as exc:
                    log.warning(f"cannot write {paths.identity}: {reason_of(exc)}; ids change at the next start")

    @property
    def session_id(self) -> str:
        """UUID and epoch milliseconds, the form VS Code sends."""
        session, made_at = self._session
        now = self._clock()
        if not session or not 0 <= now - made_at < SESSION_RENEW_S:
            session = f"{random_uuid()}{int(now * 1000)}"
            self._session = (session, now)
        return session


def random_uuid() -> str:
    """A random UUID (version 4), without the uuid module's start-up cost."""
    return uuid_of(os.urandom(16).hex())


class Provider:
    """What the ten steps ask of an upstream: it takes wire bodies in one of its dialects and answers in that dialect.

    `open` raises TransportError and ClientGone; `fetch_models` and `fetch_account` raise UpstreamError and ClientError 401.
    """

    name = ""
    stand_ins: Dict[str, str] = {}  # operation -> the model that answers for names nobody has
    accounts: "Accounts"
    seen_headers: Dict[str, str]  # of the last good answer: they tell what is left of the quota

    def open(self, plan: Plan, token: CopilotToken, body: bytes, stopper: Stopper, client_headers: Dict[str, str]) -> Any:
        """Sends one request of a plan and gives its answer, to be read like an Answer."""
        raise NotImplementedError

    def fetch_models(self) -> Json:
        """The model list as upstream writes it."""
        raise NotImplementedError

    def fetch_account(self) -> Json:
        """The quota document."""
        raise NotImplementedError


class Copilot(Provider):
    """GitHub Copilot: one account's API, addressed as VS Code does (or as opencode does in direct mode)."""

    name = "copilot"

    def __init__(self, upstream: Upstream, accounts: Accounts, identity: Identity, settings: Callable[[], Settings]) -> None:
        self._upstream = upstream
        self.accounts = accounts
        self.identity = identity
        self.seen_headers = {}
        self._settings = settings

    def open(self, plan: Plan, token: CopilotToken, body: bytes, stopper: Stopper,
             client_headers: Dict[str, str]) -> Answer:
        """Sends one request of a plan; raises like `Upstream.open`."""
        operation = plan.operation if plan.operation in COPILOT_PATHS else plan.upstream_dialect
        return self._upstream.open("POST", token.api + COPILOT_PATHS[operation],
                                   self.headers(plan, token, client_headers), body, stopper,
                                   COUNT_TIMEOUT_S if operation == "count_tokens" else None, whole=not (plan.stream or plan.assembled))

    def headers(self, plan: Plan, token: CopilotToken, client_headers: Dict[str, str]) -> List[Tuple[str, str]]:
        """The request headers; `X-Initiator` says the truth about who started the turn."""
        if token.direct:
            headers = self._direct_headers(token, client_headers)
        else:
            intent = "copilot-panel" if plan.operation == EMBEDDINGS else "conversation-agent"
            headers = self._editor_headers(token, intent, plan.caller.interaction or intent)
            request_id = plan.caller.prompt_id or random_uuid()
            headers += [("X-Request-Id", request_id), ("X-Agent-Task-Id", request_id),
                        ("X-Interaction-Id", plan.caller.session_id or uuid_of(request_id))]
        headers.append(("X-Initiator", plan.caller.initiator))
        if plan.caller.vision:
            headers.append(("Copilot-Vision-Request", "true"))
        if plan.betas:
            headers.append(("anthropic-beta", ",".join(plan.betas)))
        if plan.upstream_dialect == MESSAGES and client_headers.get("anthropic-version"):
            headers.append(("anthropic-version", client_headers["anthropic-version"]))
        return headers

    def _editor_headers(self, token: CopilotToken, intent: str, interaction: str) -> List[Tuple[str, str]]:
        """VS Code's identity: one coordinated set (copilot-upstream 3.1, DESIGN 8 "Identity")."""
        settings = self._settings()
        return [("Authorization", "Bearer " + token.bearer.reveal()), ("Content-Type", "application/json"),
                ("Copilot-Integration-Id", settings["identity.integrationId"]),
                ("Editor-Version", settings["identity.editorVersion"]),
                ("Editor-Plugin-Version", settings["identity.pluginVersion"]),
                ("User-Agent", settings["identity.userAgent"]), ("OpenAI-Intent", intent),
                ("X-Interaction-Type", interaction), ("X-GitHub-Api-Version", settings["identity.apiVersion"]),
                ("Editor-Device-Id", self.identity.device_id), ("VScode-SessionId", self.identity.session_id),
                ("VScode-MachineId", self.identity.machine_id),
                ("X-VSCode-User-Agent-Library-Version", "electron-fetch")]

    @staticmethod
    def _direct_headers(token: CopilotToken, client_headers: Dict[str, str]) -> List[Tuple[str, str]]:
        """opencode's identity: no editor, machine, session or interaction headers (copilot-upstream 1.8)."""
        headers = [("Authorization", "Bearer " + token.bearer.reveal()), ("Content-Type", "application/json"),
                   ("Accept", "application/json"), ("Openai-Intent", "conversation-edits"),
                   ("User-Agent", opencode_agent(client_headers.get("user-agent", "")))]
        return headers + [(name, client_headers[name]) for name in ("x-session-affinity", "x-parent-session-id")
                          if client_headers.get(name)]

    def fetch_models(self) -> Json:
        """Upstream's model list document; raises UpstreamError, ClientError 401."""
        token = self.accounts.bearer()
        if token.direct:
            headers = [("Authorization", "Bearer " + token.bearer.reveal()), ("User-Agent", OPENCODE_AGENT)]
        else:
            headers = self._editor_headers(token, "model-access", "model-access")
            headers = [header for header in headers if header[0] != "Content-Type"] + [("X-Request-Id", random_uuid())]
        return self._get_json(token.api + "/models", headers)

    def fetch_account(self) -> Json:
        """The quota document of /copilot_internal/user; raises UpstreamError, ClientError 401."""
        if not self.accounts.settled.is_set():
            wait_for(self.accounts.settled, self._settings()["streams.statusHoldSeconds"], None)
        account = self.accounts.active
        if account is None:
            raise self.accounts.sign_in_needed()
        return self._get_json(self.accounts.hosts.api + "/copilot_internal/user", self.accounts.github_headers(account))

    def _get_json(self, url: str, headers: Sequence[Tuple[str, str]]) -> Json:
        try:
            status, answer_headers, body = self._upstream.fetch("GET", url, headers, timeout_s=30)
        except TransportError as exc:
            raise UpstreamError(unreachable(str(exc))) from exc
        if status != 200:
            raise UpstreamError(classify(status, answer_headers, body, time.time()))
        try:
            value = json.loads(body)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UpstreamError(Failure("transport", "provider", 502, "upstream's answer is not JSON"))
        return value


class Models:
    """The catalogue of the moment: fetched in the background, kept on disk, the last good one served on failure."""

    def __init__(self, provider: Provider, path: str, log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        self._provider = provider
        self._path = path  # where the last list is kept
        self._log = log
        self._clock = clock
        self._flight = SingleFlight()
        self._lock = threading.Lock()
        self._next_fetch = 0.0  # monotonic; guarded by _lock
        self._asked_anew = -CATALOGUE_RETRY_S  # monotonic; guarded by _lock
        self._wanted = 0  # how often a list was asked for at once; guarded by _lock
        self._running = 0  # background fetches; guarded by _lock
        self._idle = threading.Event()  # none is running
        self._idle.set()
        cached = read_json(self._path)
        self._catalogue = Catalogue(cached) if cached else None

    @property
    def loaded(self) -> int:
        """How many models are known."""
        return len(self._catalogue.records) if self._catalogue else 0

    def current(self, wait_s: float = 0.0, stopper: Optional[Stopper] = None) -> Optional[Catalogue]:
        """The catalogue, None while there is neither a fetched nor a stored one. A due refresh starts behind it."""
        self.refresh_soon()
        if self._catalogue is None and wait_s:
            wait_for(self._idle, wait_s, stopper)
        return self._catalogue

    def find_anew(self, name: str, wait_s: float, stopper: Optional[Stopper] = None) -> Optional[Tuple[str, Optional[str]]]:
        """Looks a name up in a catalogue fetched for it, because it may be new; at most one such fetch per 15 s.

        After `wait_s` the list we have is the answer, and the fetched one that of the next request. Raises ClientGone.
        """
        with self._lock:
            if self._clock() < self._asked_anew + CATALOGUE_RETRY_S:
                return None
            self._asked_anew = self._clock()
        self.refresh_soon(now=True)
        wait_for(self._idle, wait_s, stopper)
        return self._catalogue.find(name) if self._catalogue is not None else None

    def refresh_soon(self, now: bool = False) -> None:
        """Starts a background fetch if one is due (or `now`)."""
        with self._lock:
            if not now and self._clock() < self._next_fetch:
                return
            self._wanted += now
            self._next_fetch = self._clock() + CATALOGUE_RETRY_S
            self._running += 1
            self._idle.clear()
        threading.Thread(target=self._refresh_quietly, name="models", daemon=True).start()

    def _refresh_quietly(self) -> None:
        try:
            self.refresh()
        except ProxyError as exc:
            kept = "the last good list stays" if self._catalogue else "no list yet"
            if exc.code != NOT_SIGNED_IN:
                self._log.warning(f"cannot fetch the model list: {exc.message}; {kept}")
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._idle.set()

    def refresh(self) -> Catalogue:
        """Fetches the catalogue, in single flight; raises UpstreamError, ClientError 401."""
        return self._flight.run(self._fetch)

    def _fetch(self) -> Catalogue:
        wanted = self._wanted
        document = self._provider.fetch_models()
        catalogue = Catalogue(document)
        if not catalogue.records:
            raise UpstreamError(Failure("transport", "provider", 502, "upstream's model list is empty"))
        fresh = self._catalogue is None or self._catalogue.document != document
        self._catalogue = catalogue
        with self._lock:
            # asked for anew under way: another account may have become active, its list is not this one
            self._next_fetch = self._clock() + (CATALOGUE_FRESH_S if wanted == self._wanted else 0.0)
        if fresh:
            self._log.info("models: " + ", ".join(record["id"] for record in catalogue.offered()))
            try:
                write_private(self._path, json.dumps(document, ensure_ascii=False))
            except (OSError, UnicodeEncodeError) as exc:
                self._log.once("models-cache", f"cannot write {self._path}: {reason_of(exc)}")
        return catalogue


# ---- the demo model ---------------------------------------------------------
#
# A deterministic model for `start --demo`: it does what directives in the prompt say. They may stand anywhere in a
# user's text, follow each other and nest, so that a sub-agent's prompt can carry its own:
#
#   [[tool:bash CMD]] [[tool:read PATH]] [[tool:write PATH :: TEXT]] [[tool:list PATH]] [[tool:patch PATH :: TEXT]]
#   [[tool:task PROMPT]]         call whichever offered tool plays that role; [[tool:first]]: the first one, arguments made up
#   [[call:NAME {json}]]         call a tool with exactly these arguments, [[call:NAME text]] a free-form one
#   [[parallel: A ;; B ;; C]]    several calls in one turn, each `tool:…` or `call:…`
#   [[think:TEXT]] [[pre:TEXT]]  think, or say, TEXT before the next step
#   [[say:TEXT]] [[long:N]] [[json:{…}]]  the final answer: TEXT (with %name%, see `demo_filled`), N tokens, this JSON
#   [[stop:REASON]]              end the final turn with end | length | refusal | pause | filter
#   [[delay:MS]] [[gap:MS]] [[cut:N]]  wait before a turn, between its pieces; drop the line after N pieces (first attempt)
#   [[usage:IN,OUT,CACHED]]      report these token counts
#   [[error:STATUS opts msg]]    answer an error; opts: x=N (first N attempts only) at=STEP type=T code=C retry-after=S
#   [[midstream:TYPE msg]]       begin a good stream, then fail in it (first attempt; opts x= and at=)
#   [[id:TOKEN]]                 nothing, but attempts are counted apart
#
# Each assistant turn does one tool step. Which are done is counted in the tool results behind the directives, so the
# model needs no memory; a step whose tool is not offered is skipped. Then follows the final answer, or `DONE` and the
# last result. The words are a contract with test drivers; they are those of their scripted model.

DEMO_NAMES = "tool|call|parallel|think|pre|say|long|json|stop|delay|gap|cut|usage|error|midstream|id"
# Patterns of the demo are kept as text and compiled where they are used: 2 ms that no other start pays.
DEMO_HEAD = rf"\[\[({DEMO_NAMES}):"
DEMO_MARK = rf"\[\[(?:{DEMO_NAMES}):|\]\]"
DEMO_JSON = r"(?:call:\s*\S+\s+|json:\s*)(?=[{\[])"  # a directive whose argument JSON itself ends
DEMO_OPTION = r"([a-z-]+)=(\S+)$"
DEMO_WORD = r"\S{1,32}\s*|\s+"  # a piece of a stream; JSON without blanks is cut, too
# Heads looked at in one text: each that is never closed costs a pass to the end of the text.
DEMO_MOST = 1000
DEMO_LARGEST = 1_000_000  # of any number in a directive: tokens, milliseconds, pieces


def demo_directives(text: str) -> List[Tuple[str, str]]:
    """(name, argument) of every outermost directive of a text, in order."""
    found: List[Tuple[str, str]] = []
    head = re.compile(DEMO_HEAD).search(text)
    for _ in range(DEMO_MOST):
        if head is None:
            break
        end = demo_json_end(text, head.start()) or demo_end(text, head.end())
        if end is not None:
            found.append((head.group(1), text[head.end():end - 2].strip()))
        head = re.compile(DEMO_HEAD).search(text, head.end() if end is None else end)
    return found


def demo_end(text: str, at: int) -> Optional[int]:
    """Where the directive ends whose argument begins at `at`; None when it is never closed.

    Directives inside it are passed over. `[[tool:bash [[ -f x ]]]]` ends with the run of brackets.
    """
    depth = 1
    while depth:
        mark = re.compile(DEMO_MARK).search(text, at)
        if mark is None:
            return None
        depth += 1 if mark.group() != "]]" else -1
        at = mark.end()
    while text.startswith("]", at):
        at += 1
    return at


def demo_json_end(text: str, at: int) -> Optional[int]:
    """Where a directive ends that is nothing but JSON behind its name: JSON may hold brackets of its own."""
    head = re.compile(DEMO_JSON).match(text, at + 2)
    if head is None:
        return None
    try:
        end = _DECODER.raw_decode(text, head.end())[1]
    except (ValueError, RecursionError):
        return None
    while text[end:end + 1].isspace():
        end += 1
    return end + 2 if text.startswith("]]", end) else None


# ---- the demo's tools -------------------------------------------------------

# role -> names of tools that play it, the best first; their argument, the best first
DEMO_ROLES: Dict[str, Tuple[Tuple[str, ...], Tuple[str, ...]]] = {
    "bash": (("bash", "shell", "exec_command", "shell_command", "run_shell_command", "local_shell", "execute_command", "run_command",
              "run_in_terminal", "terminal", "container.exec", "exec", "execute_bash", "run_bash", "sh"),
             ("command", "cmd", "script", "code", "commands", "input")),
    "read": (("read", "read_file", "view", "view_file", "cat", "open_file", "get_file"),
             ("file_path", "filePath", "absolute_path", "path", "filename", "file")),
    "write": (("write", "write_file", "create_file", "create", "save_file"),
              ("file_path", "filePath", "absolute_path", "path", "filename", "file")),
    "list": (("ls", "list", "list_directory", "list_dir", "list_files", "glob"),
             ("path", "dir_path", "dir", "directory", "target_directory", "pattern")),
    "patch": (("apply_patch", "patch"), ("input", "patch")),
    "task": (("agent", "task", "subagent", "dispatch_agent", "spawn_agent", "invoke_agent"),
             ("prompt", "task", "message", "instructions", "objective")),
}
DEMO_CONTENTS = ("content", "contents", "text", "file_text", "data", "body")  # what a `write` tool calls the text
DEMO_FREE = ("input", "patch", "code", "script")  # what a tool calls the one text it takes
DEMO_AGENTS = ("subagent_type", "agent_type", "agent", "agent_name")
DEMO_GENERAL = r"general[-_ ]?purpose|generalist|general"  # the agent every client has
DEMO_CODE_MODE = "run javascript"  # Codex's newest models: the one tool runs scripts that call the others


def demo_tool(tools: Sequence[Tool], wanted: str) -> Optional[Tool]:
    """The offered tool of a name or role; names may have got a prefix on their way (`mcp__x__bash`, `functions.shell`)."""
    exact = [tool for tool in tools if tool.name == wanted]
    if exact:
        return exact[-1]
    if wanted == "first":
        return next((tool for tool in tools if tool.kind == "function"), None)
    names = DEMO_ROLES[wanted][0] if wanted in DEMO_ROLES else (wanted,)
    known = {demo_letters(tool.name): tool for tool in reversed(tools)}
    alike = [known[demo_letters(name)] for name in names if demo_letters(name) in known]
    endings = [re.compile(rf"(?:^|[._:/-]|__){re.escape(name)}$", re.I) for name in names if len(name) > 3] if not alike else []
    alike += [tool for ending in endings for tool in tools if ending.search(tool.name)]
    return alike[0] if alike else None


def demo_part(schema: Json, keyword: str, kind: type) -> Any:
    """What a schema says under a keyword that takes a `dict` or a `list`; empty for anything else."""
    value = schema.get(keyword)
    return value if isinstance(value, kind) else kind()


def demo_letters(name: str) -> str:
    """A name without case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def demo_call(tools: Sequence[Tool], spec: str) -> Optional[ToolCall]:
    """The call of `tool:ROLE ARGUMENT` or `call:NAME ARGUMENT`, still without an id; None when no such tool is offered."""
    verb, _, rest = spec.strip().partition(":")
    wanted, argument = (rest.split(None, 1) + ["", ""])[:2]
    tool = demo_tool(tools, wanted)
    if tool is None:
        return None
    arguments = demo_exact(tool, argument.strip()) if verb == "call" else demo_fitting(tool, wanted, argument.strip())
    own = tool.kind in ("custom", "search") or tool.kind == "server" and tool.name == "local_shell"
    return ToolCall("", tool.name, arguments, tool.kind if own else "function", tool.namespace)


def demo_exact(tool: Tool, argument: str) -> str:
    """The arguments as they were written; text for a tool that takes JSON is wrapped."""
    if tool.kind == "custom" or load_object(argument or "{}") is not None:
        return argument if tool.kind == "custom" else argument or "{}"
    return json.dumps({"input": argument}, ensure_ascii=False)


def demo_fitting(tool: Tool, role: str, argument: str) -> str:
    """The arguments that make the tool do what its role says, all others as small as its schema allows."""
    free = role == "patch"
    if free:
        path, _, content = argument.partition("::")
        lines = "".join(f"+{line}\n" for line in content.strip().split("\n"))
        argument = f"*** Begin Patch\n*** Add File: {path.strip()}\n{lines}*** End Patch"
    elif role in ("bash", "read") and DEMO_CODE_MODE in (tool.description or "")[:200].lower():
        free, command = True, argument if role == "bash" else f"cat {argument}"
        argument = f"const r = await tools.exec_command({{cmd: {json.dumps(command)}}}); text(r);"
    if tool.kind == "custom":
        return argument
    schema = tool.schema or {}
    if free:
        names = list(demo_part(schema, "properties", dict))
        arguments: Json = {next((name for name in DEMO_FREE if name in names), names[0] if names else "input"): argument}
    elif tool.kind == "server" and tool.name == "local_shell":
        arguments = {"type": "exec", "command": ["bash", "-lc", argument], "env": {}}
    else:
        arguments = demo_role_arguments(tool, role, argument)
    return json.dumps(arguments, ensure_ascii=False)


def demo_role_arguments(tool: Tool, role: str, argument: str) -> Json:
    """The smallest valid arguments, with the role's own argument put where the tool wants it."""
    smallest = demo_instance(tool.schema, tool.schema) if tool.schema else {}
    arguments: Json = smallest if isinstance(smallest, dict) else {}
    if role not in DEMO_ROLES:
        return arguments
    value, _, content = argument.partition("::") if role == "write" else (argument, "", "")
    demo_put(arguments, tool.schema or {}, DEMO_ROLES[role][1], value.strip(), ["bash", "-lc"] if role == "bash" else [])
    if role == "write":
        demo_put(arguments, tool.schema or {}, DEMO_CONTENTS, content.strip(), [])
    if role == "task":
        general = re.search(DEMO_GENERAL, json.dumps(tool.schema) + (tool.description or ""))
        for name, schema in demo_part(tool.schema or {}, "properties", dict).items():
            if name in DEMO_AGENTS and not (isinstance(schema, dict) and schema.get("enum")):
                arguments[name] = general.group() if general else "general-purpose"
    return arguments


def demo_put(arguments: Json, schema: Json, names: Sequence[str], value: str, ahead: List[str]) -> None:
    """Changes the arguments: sets the first of the names that the schema knows, as a list where it wants one."""
    properties = demo_part(schema, "properties", dict)
    name = next((name for name in names if name in properties), names[0])
    is_list = demo_type(demo_resolved(properties.get(name), schema)) == "array"
    arguments[name] = ahead + [value] if is_list else value


# ---- the smallest instance of a schema --------------------------------------

DEMO_DEEPEST = 12  # levels; a reference costs two, so that schemas which refer to themselves end


def demo_instance(schema: Any, root: Any, hint: str = "x", depth: int = 0) -> Any:
    """The smallest value a JSON schema allows, by the common keywords; texts are named after their property."""
    depth += 2 if isinstance(schema, dict) and "$ref" in schema else 1
    schema = demo_resolved(schema, root)
    if not isinstance(schema, dict) or depth > DEMO_DEEPEST:
        return hint
    stated = [schema[name] for name in ("const", "default") if name in schema] + demo_part(schema, "enum", list)[:1]
    if stated:
        return stated[0]
    options = [demo_resolved(option, root) for option in demo_part(schema, "anyOf", list) or demo_part(schema, "oneOf", list)]
    if options:
        best = next((option for option in options if isinstance(option, dict) and demo_type(option) != "null"), options[0])
        return demo_instance(best, root, hint, depth)
    parts = [demo_instance(part, root, hint, depth) for part in demo_part(schema, "allOf", list)]
    if parts:
        objects = [part for part in parts if isinstance(part, dict)]
        return {name: value for part in objects for name, value in part.items()} if objects else parts[-1]
    writer = DEMO_INSTANCES.get(demo_type(schema))
    if writer is not None:
        return writer(schema, root, hint, depth)
    return ("http://example.com/" if schema.get("format") in ("uri", "url") else hint).ljust(demo_bound(schema, "minLength", 0), "x")


def demo_object(schema: Json, root: Any, hint: str, depth: int) -> Json:
    """An object of the required properties."""
    return {name: demo_instance(demo_part(schema, "properties", dict).get(name, {}), root, name, depth)
            for name in demo_part(schema, "required", list) if isinstance(name, str)}


# type -> its smallest value; anything else is a text
DEMO_INSTANCES: Dict[str, Callable[[Json, Any, str, int], Any]] = {
    "object": demo_object,
    "array": lambda schema, root, hint, depth:
        [demo_instance(schema.get("items") or {}, root, hint, depth)] * demo_bound(schema, "minItems", 0),
    "integer": lambda schema, root, hint, depth: demo_bound(schema, "minimum", demo_bound(schema, "exclusiveMinimum", 0) + 1),
    "number": lambda schema, root, hint, depth: schema["minimum"] if isinstance(schema.get("minimum"), (int, float)) else 1,
    "boolean": lambda schema, root, hint, depth: False,
    "null": lambda schema, root, hint, depth: None,
}


def demo_bound(schema: Any, name: str, default: int) -> int:
    """A whole number of a schema (Gemini's spell them as texts) or of a directive's options, within bounds."""
    value = schema.get(name, default)
    try:
        return max(-DEMO_LARGEST, min(int(value), DEMO_LARGEST))
    except (TypeError, ValueError, OverflowError):
        return default


def demo_type(schema: Any) -> str:
    """The type a schema wants, in small letters; of several the first that is not null."""
    if not isinstance(schema, dict):
        return ""
    wanted = schema.get("type")
    if isinstance(wanted, list):
        wanted = next((name for name in wanted if str(name).lower() != "null"), "null")
    if wanted is None:
        wanted = "object" if "properties" in schema else "array" if "items" in schema else ""
    return str(wanted).lower()


def demo_resolved(schema: Any, root: Any) -> Any:
    """The schema behind `$ref: "#/…"`."""
    for _ in range(DEMO_DEEPEST):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        path, schema = str(schema["$ref"]).lstrip("#/").split("/"), root
        for name in path:
            schema = schema.get(name.replace("~1", "/").replace("~0", "~"), {}) if isinstance(schema, dict) else {}
    return schema


# ---- what the demo sees -----------------------------------------------------

DEMO_SUMMARY = "SUMMARY-OF-"  # how its summaries begin; behind the directives it means that their steps are done
DEMO_COMPACTIONS = frozenset(("compaction_summary", "context_compaction"))  # older names of Responses' compaction item
# Words by which clients ask for a summary (clients.md); such a request holds every old directive, too.
DEMO_SUMMARIES = (r"(?i)create a detailed summary of (?:the|our|this) conversation|context checkpoint compaction|<state_snapshot>"
                  r"|summari[sz]e (?:the|this|our) conversation|create a (?:new )?(?:anchored )?summary"
                  r"|provide a detailed prompt for continuing|handoff summary")
DEMO_SUMMARY_SYSTEM = 8000  # characters; a longer system prompt speaks of more than a summary
DEMO_CONTEXT = r"(?is)<([a-z_-]*(?:reminder|notification)|environment_context|context)[^>]*>.*?</\1>"  # a client's, not a prompt


@dataclass(eq=False, repr=False)
class DemoView(Value):
    """What the model looks at: the conversation as (role, text), roles being user, assistant, system, call, result.

    Each text block is an item: neighbours of one role are one message in the hub, and a script ends with its text.
    Leading system messages are no items. `script`: where the directives in force stand, -1 nowhere.
    """

    request: Request
    items: List[Tuple[str, str]] = field(default_factory=list)
    system: str = ""
    images: int = 0
    documents: int = 0
    thoughts: int = 0
    sealing: bool = False  # Responses asks for a compaction item
    script: int = -1

    def texts(self, *roles: str) -> List[str]:
        """The texts of these roles from behind the script on."""
        return [text for role, text in self.items[self.script + 1:] if role in roles]

    def results(self) -> List[str]:
        """The tool results the script's steps have got."""
        return self.texts("result") if self.script >= 0 else []

    def last_words(self) -> str:
        """What the user said last: neighbouring texts together."""
        said: List[str] = []
        for role, text in reversed(self.items):
            if role == "user":
                said.insert(0, text)
            elif said:
                break
        return "\n".join(said)


def demo_view(request: Request) -> DemoView:
    """The view of a request."""
    view = DemoView(request)
    systems: List[str] = []
    leading = True
    for message in request.messages:
        is_system = message.role in ("system", "developer")
        leading = leading and is_system
        for block in message.content:
            demo_count(view, block)
            item = demo_item(block, "system" if is_system else message.role)
            if is_system and item is not None:
                systems.append(item[1])
            if item is not None and not leading:
                view.items.append(item)
    view.system = "\n".join(systems)
    view.script = demo_script_at(view.items)
    return view


def demo_count(view: DemoView, block: Block) -> None:
    """Changes the view: counts a block that is no text, and those inside a tool result."""
    view.images += isinstance(block, Image)
    view.documents += isinstance(block, File) or isinstance(block, Opaque) and block.kind == "document"
    view.thoughts += isinstance(block, Thinking) or block.seal is not None
    view.sealing |= isinstance(block, Opaque) and block.kind == "compaction_trigger"
    for part in block.content if isinstance(block, ToolResult) else ():
        demo_count(view, part)


def demo_item(block: Block, role: str) -> Optional[Tuple[str, str]]:
    """(role, text) of a block, None for one without words."""
    if isinstance(block, (Text, Refusal)):
        return (role, block.text) if block.text else None
    if isinstance(block, ToolCall):
        return "call", block.arguments
    if isinstance(block, ToolResult):
        return "result", "\n".join(part.text for part in block.content if isinstance(part, (Text, Refusal)) and part.text)
    if isinstance(block, Compaction) or isinstance(block, Opaque) and block.kind in DEMO_COMPACTIONS:
        return "user", f"{DEMO_SUMMARY}COMPACTED"
    return None


def demo_script_at(items: Sequence[Tuple[str, str]]) -> int:
    """The index of the user text whose directives are in force: the last with any, until a final answer and a prompt
    without follow it; -1 when there is none."""
    script, answered = -1, False
    for at, (role, text) in enumerate(items):
        if role == "user" and demo_directives(text):
            script, answered = at, False
        elif role == "user" and answered and re.sub(DEMO_CONTEXT, "", text).strip():
            script, answered = -1, False
        elif role == "assistant" and text.strip():
            answered = script >= 0 and (at + 1 == len(items) or items[at + 1][0] == "user")
        elif role in ("call", "result"):
            answered = False
    return script


def demo_asks_summary(view: DemoView) -> bool:
    """Whether a client wants its conversation summed up."""
    if view.sealing or re.search(DEMO_SUMMARIES, view.last_words()):
        return True
    return len(view.system) < DEMO_SUMMARY_SYSTEM and not view.request.tools and bool(re.search(DEMO_SUMMARIES, view.system))


def demo_asks_verdict(view: DemoView) -> bool:
    """Whether Claude Code's auto mode asks if a call may run (clients.md)."""
    return "</block>" in (view.request.stop or ()) or "security monitor" in view.system[:600] and "<block>" in view.last_words()


def demo_filled(text: str, view: DemoView) -> str:
    """The text with its %name% filled in, so that a client can check end to end what reached the model; other words
    between percent signs stay."""
    request, results = view.request, view.results()
    choice = request.tool_choice
    facts = {
        "images": view.images, "documents": view.documents, "thoughts": view.thoughts, "results": len(results),
        "tools": len(request.tools), "items": len(view.items), "system_chars": len(view.system), "model": request.model,
        "max_tokens": request.max_tokens, "tool_choice": (choice.name or choice.mode) if choice else None,
        "effort": request.reasoning.effort or "" if request.reasoning else "", "last_result": results[-1].strip() if results else ""}
    return re.sub(r"%([a-z_]+)%", lambda found: str(facts.get(found.group(1), found.group())), text)


def demo_size(view: DemoView) -> int:
    """About how many tokens a request is: a quarter of the bytes of its words and tools."""
    said = [view.system] + [text for _, text in view.items]
    tools = [json.dumps(tool.schema or {}) + (tool.description or "") for tool in view.request.tools]
    return max(1, sum(len(text.encode("utf-8", "surrogatepass")) for text in said + tools) // 4)


# ---- the demo's script ------------------------------------------------------


@dataclass(eq=False, repr=False)
class DemoScript(Value):
    """What the directives say. `thoughts` and `openings` by the step they stand before."""

    steps: List[List[ToolCall]] = field(default_factory=list)
    thoughts: Dict[int, str] = field(default_factory=dict)
    openings: Dict[int, str] = field(default_factory=dict)
    final: Optional[str] = None
    stop: str = "end"
    usage: Optional[Usage] = None
    delay_ms: int = 0
    gap_ms: int = 0
    cut_after: Optional[int] = None
    errors: List[str] = field(default_factory=list)
    faults: List[str] = field(default_factory=list)

    def done(self, results: int) -> int:
        """How many steps are done when so many results are there: a step is when each of its calls has one."""
        for step, calls in enumerate(self.steps):
            results -= len(calls)
            if results < 0:
                return step
        return len(self.steps)


def demo_count_of(said: str) -> int:
    """A number that is not negative; raises ValueError for anything else."""
    return max(0, min(int(said), DEMO_LARGEST))


DEMO_STOPS = {**{row[0]: row[0] for row in STOP_REASONS}, "refusal": "filter"}
# directive -> field of the script, and what its argument becomes
DEMO_FIELDS: Dict[str, Tuple[str, Callable[[str], Any]]] = {
    "say": ("final", str),
    "json": ("final", str),
    "long": ("final", lambda said: " ".join(f"w{at}" for at in range(max(1, demo_count_of(said) // 2)))),  # loss is easy to see
    "stop": ("stop", lambda said: DEMO_STOPS.get(said, "end")),
    "usage": ("usage", lambda said: Usage(*map(demo_count_of, said.split(",")[:3]))),
    "delay": ("delay_ms", demo_count_of),
    "gap": ("gap_ms", demo_count_of),
    "cut": ("cut_after", demo_count_of),
}


def demo_script(text: str, tools: Sequence[Tool]) -> DemoScript:
    """The script of a text; a directive with a broken number is passed over."""
    script = DemoScript()
    before = {"think": script.thoughts, "pre": script.openings}
    failures = {"error": script.errors, "midstream": script.faults}
    for name, said in demo_directives(text):
        if name in DEMO_FIELDS:
            field_name, meaning = DEMO_FIELDS[name]
            try:
                setattr(script, field_name, meaning(said))
            except ValueError:
                continue
        elif name in before:
            before[name][len(script.steps)] = said
        elif name in failures:
            failures[name].append(said)
        elif name != "id":
            specs = said.split(";;") if name == "parallel" else [f"{name}:{said}"]
            calls = [call for call in (demo_call(tools, spec) for spec in specs) if call is not None]
            script.steps += [calls] if calls else []
    return script


def demo_failing(said: Iterable[str], step: int, attempt: int, times: int) -> Optional[Tuple[str, Dict[str, str], str]]:
    """(status or type, options, message) of the first failure that is due in this step and attempt: `x` of them, by
    default `times`."""
    for argument in said:
        name, *words = argument.split() or [""]
        options: Dict[str, str] = {}
        while words and re.match(DEMO_OPTION, words[0]):
            key, _, options[key] = words.pop(0).partition("=")
        if demo_bound(options, "at", 0) == step and attempt < demo_bound(options, "x", times):
            return name, options, " ".join(words)
    return None


# ---- the demo's answer ------------------------------------------------------


@dataclass(eq=False, repr=False)
class DemoTurn(Value):
    """What the model does with one request.

    `key` is the same for retries of one turn: who calls counts attempts by it. `events` are the pieces of the
    stream, with `gap_ms` between them after `delay_ms`, and the line is dropped after `cut_after` pieces. With a
    `failure` there are none: the answer is an error, with `headers`, and `error_type` as its type where the script
    names one.
    """

    key: str
    events: List[List[Event]] = field(default_factory=list)
    failure: Optional[Failure] = None
    error_type: str = ""
    headers: Dict[str, str] = field(default_factory=dict)
    delay_ms: int = 0
    gap_ms: int = 0
    cut_after: Optional[int] = None

    @property
    def reply(self) -> Reply:
        """The whole answer; raises UpstreamError when it is none."""
        if self.failure is not None:
            raise self.error()
        return collect(self.events)

    def error(self) -> UpstreamError:
        """The scripted error as the rest of the gateway knows errors."""
        error = UpstreamError(self.failure or CUT)
        error.kind = self.error_type or None
        return error


def demo_pieces(reply: Reply) -> List[List[Event]]:
    """The stream of an answer, in words; its start knows only what the prompt costs."""
    usage = replace(reply.usage, output=0, reasoning=0) if reply.usage is not None else None
    pieces: List[List[Event]] = [[ReplyStart(reply.id, reply.model, reply.created_at, usage)]]
    for event in replay(reply)[1:]:
        if isinstance(event, BlockDelta):
            pieces += [[BlockDelta(event.index, word)] for word in re.findall(DEMO_WORD, event.text)]
        else:
            pieces.append([event])
    return pieces


class DemoModel:
    """The model behind `demo-chat`, `demo-responses` and `demo-messages`; it remembers nothing.

        turn = model.decide(request)                                  # then count: n = seen[turn.key]
        turn = model.decide(request, attempt=n) if n else turn        # x=N and [[cut:]] look at the attempt
    """

    def decide(self, request: Request, attempt: int = 0) -> DemoTurn:
        """What the model does next. Raises nothing, whatever the request."""
        view = demo_view(request)
        if demo_asks_summary(view):
            return self._summary(view)
        if demo_asks_verdict(view):
            return self._turn(view, "verdict", [Text("<block>no" if "</block>" in (request.stop or ()) else "<block>no</block>")])
        said = view.items[view.script][1] if view.script >= 0 else ""
        script = demo_script(said, request.tools)
        if request.tool_choice is not None and request.tool_choice.mode == "none" \
                or view.script >= 0 and any(DEMO_SUMMARY in text for text in view.texts("user", "system")):
            script.steps = []
        step = script.done(len(view.results()))
        spoken = demo_directives(said) if said else view.last_words()
        key = self._digest(request.model, spoken, step, len(view.results()), bool(request.tools))
        error = demo_failing(script.errors, step, attempt, DEMO_LARGEST)
        if error is not None and error[0].isdecimal():
            return self._error(key, script, *error)
        turn = self._step(view, script, step, key)
        turn.cut_after = script.cut_after if attempt == 0 else None
        fault = demo_failing(script.faults[::-1], step, attempt, 1)
        if fault is not None and request.stream:
            self._break(turn, *fault)
        return turn

    def _step(self, view: DemoView, script: DemoScript, step: int, key: str) -> DemoTurn:
        """The turn of a step: its calls, or the final answer behind the last one."""
        calls, stop, text = [], script.stop, script.openings.get(step)
        if step < len(script.steps):
            calls = script.steps[step]
        elif view.script < 0:
            calls = self._forced(view)
        if not calls:
            text = self._final(view, script)
        blocks: List[Block] = []
        thought = script.thoughts.get(step)
        if thought:
            blocks.append(Thinking(thought, f"demo_{self._digest(thought)}"))
        if text:
            blocks.append(Text(text))
        blocks += [replace(call, id=f"call_{self._digest(key, len(view.items), at)}") for at, call in enumerate(calls)]
        return self._turn(view, key, blocks, "tool" if calls else stop, script)

    def _forced(self, view: DemoView) -> List[ToolCall]:
        """The call that `tool_choice` demands of a prompt without a script."""
        choice, output = view.request.tool_choice, view.request.output
        if choice is None or choice.mode not in ("required", "tool") or output is not None and output.schema:
            return []
        call = demo_call(view.request.tools, f"tool:{choice.name if choice.mode == 'tool' else 'first'}")
        return [call] if call is not None else []

    def _final(self, view: DemoView, script: DemoScript) -> str:
        """The text of the last turn."""
        output, results = view.request.output, view.results()
        if output is not None and output.schema and not self._is_json(script.final):
            return json.dumps(demo_instance(output.schema, output.schema))
        if script.final is not None:
            return demo_filled(script.final, view)
        if output is not None and output.schema is None:
            return json.dumps({"ok": True})
        if results:
            return f"DONE {results[-1].strip()[:2000]}"
        return f"OK: {self._head(view)}" if view.script >= 0 else self._introduction(view)

    def _introduction(self, view: DemoView) -> str:
        """What a prompt without directives is answered: who speaks, and what can be tried. No directive stands here that
        would do harm when a client quotes the answer in a later prompt."""
        tools = view.request.tools
        said = [f"You wrote: {self._head(view)}" if self._head(view) else "Hello.",
                f"This is {view.request.model}, the built-in demo model of copilot_proxy, a gateway that gives every AI client one "
                "local address on your own GitHub Copilot subscription. No account and no network are used here, and I do not "
                "think: I do what directives in your prompt say.",
                "Try [[say:hello]] or [[long:200]]; think, pre, json, stop, usage, delay, gap, cut, error and midstream work alike; "
                "the comment above DEMO_NAMES in copilot_proxy.py tells how."]
        shell = demo_tool(tools, "bash")
        first = shell or demo_tool(tools, "first")
        if first is not None:
            said.append(f"You offer me {len(tools)} tool{'s' * (len(tools) > 1)}. Shall I call {first.name}? Say "
                        f"[[tool:{'bash echo hello' if shell else 'first'}]].")
        return "\n\n".join(said)

    def _summary(self, view: DemoView) -> DemoTurn:
        """A summary in the tags it is asked for in, or sealed where Responses wants an item."""
        count = len(view.items)
        text = f"{DEMO_SUMMARY}{count}-ITEMS the user asked for scripted steps and they were done."
        asked = view.system + view.last_words()
        if "<state_snapshot>" in asked:
            text = f"<state_snapshot><overall_goal>{text}</overall_goal></state_snapshot>"
        elif "<summary>" in asked:
            text = f"<analysis>short</analysis>\n<summary>{text}</summary>"
        sealed = base64.b64encode(text.encode()).decode()
        return self._turn(view, f"summary:{count}", [Compaction(sealed, text) if view.sealing else Text(text)])

    def _error(self, key: str, script: DemoScript, status: str, options: Dict[str, str], message: str) -> DemoTurn:
        """A turn that answers an error, classified as if upstream had answered so; without a clock nothing resets."""
        headers = {name: options[name] for name in ("retry-after",) if name in options}
        error = {"message": message or f"scripted error {status}", **{name: options[name] for name in ("type", "code") if name in options}}
        failure = classify(int(status[:9]), headers, dump_json({"error": error}), 0.0)
        return DemoTurn(key, [], replace(failure, resets_at=None), options.get("type", ""), headers, script.delay_ms)

    def _break(self, turn: DemoTurn, kind: str, options: Dict[str, str], message: str) -> None:
        """Changes the turn: it fails behind its first block."""
        error = {"type": kind, "code": options.get("code"), "message": message or "scripted mid-stream error"}
        end = next((at for at, events in enumerate(turn.events) if isinstance(events[0], BlockStop)), 0)
        turn.events[end + 1:] = [[Fault(stream_failure({"error": {name: value for name, value in error.items() if value}}))]]

    def _turn(self, view: DemoView, key: str, blocks: List[Block], stop: str = "end", script: Optional[DemoScript] = None) -> DemoTurn:
        """The turn that says these blocks, under ids derived from what was said before."""
        script = script or DemoScript()
        said = [(main_text(block) or "").encode("utf-8", "surrogatepass") for block in blocks]
        thought = sum(len(text) for block, text in zip(blocks, said) if isinstance(block, Thinking))
        usage = script.usage or Usage(demo_size(view), max(1, sum(map(len, said)) // 4), reasoning=thought // 4)
        reply = Reply(f"msg_{self._digest(key, len(view.items))}", view.request.model, 0, blocks, stop, usage=usage)
        return DemoTurn(key, demo_pieces(reply), delay_ms=script.delay_ms, gap_ms=script.gap_ms)

    @staticmethod
    def _head(view: DemoView) -> str:
        """The last line of the prompt, shortened, without brackets that would make it a script."""
        lines = view.last_words().strip().splitlines()
        return re.sub(r"\[\[|\]\]", "", lines[-1])[:80] if lines else ""

    @staticmethod
    def _digest(*parts: Any) -> str:
        """24 hex digits that are the same for the same parts."""
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:24]

    @staticmethod
    def _is_json(text: Optional[str]) -> bool:
        try:
            json.loads(text or "")
        except (ValueError, RecursionError):
            return False
        return True


# ---- the demo provider ------------------------------------------------------

DEMO_MODELS = {"demo-chat": "/chat/completions", "demo-responses": "/responses", "demo-messages": "/v1/messages",
               "demo-embeddings": "/embeddings"}
DEMO_ACCOUNT = "demo"
DEMO_MOST_TURNS = 1000  # of which attempts are counted; the oldest is forgotten


def demo_record(name: str, endpoint: str) -> Json:
    """The catalogue's entry of one demo model: it can do everything, within common limits."""
    return {"id": name, "object": "model", "name": f"Demo ({endpoint})", "vendor": "copilot_proxy", "version": name, "preview": False,
            "model_picker_enabled": True, "supported_endpoints": [endpoint], "capabilities": {
                "type": "embeddings" if endpoint == "/embeddings" else "chat", "family": name, "tokenizer": "o200k_base", "object": "model_capabilities",
                "limits": {"max_context_window_tokens": 200_000, "max_prompt_tokens": 168_000, "max_output_tokens": 32_000,
                           "vision": {"max_prompt_images": 20, "max_prompt_image_size": 20_971_520,
                                      "supported_media_types": ["image/jpeg", "image/png", "image/webp", "image/gif"]}},
                "supports": {"streaming": True, "tool_calls": True, "parallel_tool_calls": True, "vision": True, "structured_outputs": True,
                             "reasoning_effort": list(EFFORTS), "adaptive_thinking": True, "tool_search": True, "min_thinking_budget": 1024,
                             "max_thinking_budget": 31_999}}}


def demo_embeddings(wire: Json) -> Json:
    """Vectors that depend on the text alone: OpenAI's answer document."""
    length = count_or_zero(wire, "dimensions") or 64
    rows = []
    for at, text in enumerate(wire["input"]):
        digest = hashlib.shake_256(text.encode("utf-8", "surrogatepass")).digest(min(length, 4096))
        rows.append({"object": "embedding", "index": at, "embedding": [round(byte / 127.5 - 1, 4) for byte in digest]})
    tokens = sum(len(text) // 4 + 1 for text in wire["input"])
    return {"object": "list", "data": rows, "model": wire["model"], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


class DemoDeviceFlow(DeviceFlow):
    """Nobody signs in to the demo."""

    def begin(self, anew: bool = False) -> None:
        """Does nothing: the page goes on saying who is signed in."""


class DemoAccounts(Accounts):
    """The account of `start --demo`: always signed in, and nobody is ever asked."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.device = DemoDeviceFlow(self, self._upstream, self._log, self._unit_s)

    def settle(self) -> None:
        """Makes the demo's account the active one."""
        account = Account(DEMO_ACCOUNT, "--demo")
        account.login = DEMO_ACCOUNT
        account.copilot = CopilotToken(Secret(DEMO_ACCOUNT), "", self._clock(), 1.0, direct=True)
        self.active = account
        self.settled.set()
        for notify in self.on_active:
            notify()


class Demo(Provider):
    """The built-in model behind the same doors and steps as any upstream: wire bodies in, wire bodies out."""

    name = "demo"
    stand_ins = {"generate": "demo-chat", EMBEDDINGS: "demo-embeddings"}

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self.seen_headers = {}
        self._model = DemoModel()
        self._lock = threading.Lock()
        self._seen: Dict[str, int] = {}  # turn -> attempts so far; guarded by _lock

    def open(self, plan: Plan, token: CopilotToken, body: bytes, stopper: Stopper, client_headers: Dict[str, str]) -> "DemoAnswer":
        """Answers one request; raises ClientGone while it waits as the script says."""
        wire = json.loads(body)
        if plan.operation == EMBEDDINGS:
            return DemoAnswer(200, {}, [dump_json(demo_embeddings(wire))], stopper)
        codec = CODECS[plan.upstream_dialect]
        if plan.operation == "count_tokens":
            size = demo_size(demo_view(codec.decode_request({"max_tokens": 1, **wire})))
            return DemoAnswer(200, {}, [dump_json({"input_tokens": size})], stopper)
        try:
            request = codec.decode_request(wire)
        except ClientError as error:
            return DemoAnswer(error.status, {}, [dump_json(codec.encode_error(error))], stopper)
        turn = self._turn(request)
        stopper.wait(turn.delay_ms / 1000)
        if turn.failure is not None:
            return DemoAnswer(turn.failure.status, turn.headers, [dump_json(codec.encode_error(turn.error()))], stopper)
        start: Any = turn.events[0][0]
        turn.events[0][0] = ReplyStart(client_id(plan.upstream_dialect, start.id, start.id), start.model, int(time.time()), start.usage)
        if not request.stream:
            return DemoAnswer(200, {}, [dump_json(codec.encode_reply(turn.reply, request))], stopper)
        pieces = map(format_frames, codec.encode_stream(iter(turn.events), request))
        return DemoAnswer(200, {"content-type": "text/event-stream"}, pieces, stopper, turn.gap_ms / 1000, turn.cut_after)

    def _turn(self, request: Request) -> DemoTurn:
        """What the model does, at the attempt this is."""
        turn = self._model.decide(request)
        with self._lock:
            attempt = self._seen.pop(turn.key, 0)
            self._seen[turn.key] = attempt + 1
            if len(self._seen) > DEMO_MOST_TURNS:
                del self._seen[next(iter(self._seen))]
        return self._model.decide(request, attempt) if attempt else turn

    def fetch_models(self) -> Json:
        """One model per dialect, and one for embeddings."""
        return {"object": "list", "data": [demo_record(name, endpoint) for name, endpoint in DEMO_MODELS.items()]}

    def fetch_account(self) -> Json:
        """A quota document without limits."""
        return {"login": DEMO_ACCOUNT, "copilot_plan": DEMO_ACCOUNT, "quota_reset_date": "", "quota_snapshots": {
            name: {"entitlement": 0, "remaining": 0, "percent_remaining": 100.0, "unlimited": True, "quota_id": name,
                   "overage_count": 0, "overage_permitted": False} for name in ("chat", "completions", "premium_interactions")}}


class DemoAnswer:
    """The demo's answer, read like any upstream's: pieces with a gap between them, and perhaps a cut behind some."""

    def __init__(self, status: int, headers: Dict[str, str], pieces: Iterable[bytes], stopper: Stopper, gap_s: float = 0.0,
                 cut_after: Optional[int] = None) -> None:
        self.status = status
        self.headers = {"content-type": "application/json", "x-request-id": random_uuid(), **headers}
        self._pieces = iter(pieces)
        self._stopper = stopper
        self._gap_s = gap_s
        self._cut_after = cut_after
        self._given = 0

    def read(self) -> bytes:
        """The next bytes, b"" at the end; raises TransportError at the cut, ClientGone."""
        self._stopper.check()
        if self._given == self._cut_after:
            raise TransportError("the upstream connection ended before the answer was complete")
        if self._given and self._gap_s:
            self._stopper.wait(self._gap_s)
        self._given += 1
        return next(filter(None, self._pieces), b"")

    def read_all(self, limit: int = 1 << 28) -> bytes:
        """All of it; raises like `read`."""
        return b"".join(iter(self.read, b""))

    def drain(self, seconds: float) -> None:
        """Nothing follows the last frame."""

    def close(self) -> None:
        """There is no connection to give back."""


###############################################################################
#                                   Ledger                                    #
###############################################################################
# Usage and requests in SQLite. One thread writes, in batches of at most a
# second; readers open connections of their own.

# table -> columns. A table that lacks a column (made by a seed or an older version) gets it.
LEDGER_TABLES: Dict[str, Tuple[Tuple[str, str], ...]] = {
    "token_usage_events": (  # gateway-features 17.1
        ("id", "INTEGER PRIMARY KEY AUTOINCREMENT"), ("created_at_ms", "INTEGER NOT NULL"), ("created_at_utc", "TEXT NOT NULL"),
        ("trace_id", "TEXT"), ("session_id", "TEXT NOT NULL DEFAULT ''"), ("user_id", "TEXT NOT NULL DEFAULT ''"),
        ("source", "TEXT NOT NULL DEFAULT 'copilot'"), ("endpoint", "TEXT NOT NULL DEFAULT ''"), ("provider_name", "TEXT"),
        ("model", "TEXT NOT NULL DEFAULT ''"), ("input_tokens", "INTEGER NOT NULL DEFAULT 0"),
        ("output_tokens", "INTEGER NOT NULL DEFAULT 0"), ("cache_read_input_tokens", "INTEGER NOT NULL DEFAULT 0"),
        ("cache_creation_input_tokens", "INTEGER NOT NULL DEFAULT 0"), ("total_tokens", "INTEGER NOT NULL DEFAULT 0"),
        ("total_nano_aiu", "INTEGER"), ("cost_currency", "TEXT"), ("total_cost_nanos", "INTEGER"), ("cost_source", "TEXT")),
    "requests": (
        ("id", "INTEGER PRIMARY KEY AUTOINCREMENT"), ("created_at_ms", "INTEGER NOT NULL"), ("created_at_utc", "TEXT NOT NULL"),
        ("trace_id", "TEXT NOT NULL"), ("client", "TEXT"), ("user_agent", "TEXT"), ("endpoint", "TEXT"), ("method", "TEXT"),
        ("path", "TEXT"), ("session_id", "TEXT"), ("session_reason", "TEXT"), ("prompt_id", "TEXT"), ("prompt_reason", "TEXT"),
        ("initiator", "TEXT"), ("initiator_reason", "TEXT"), ("interaction", "TEXT"), ("subagent", "TEXT"),
        ("compaction", "INTEGER"), ("vision", "INTEGER"), ("provider", "TEXT"), ("account", "TEXT"), ("asked_model", "TEXT"),
        ("model", "TEXT"), ("model_reason", "TEXT"), ("served_model", "TEXT"), ("dialect", "TEXT"),
        ("upstream_dialect", "TEXT"), ("road", "TEXT"), ("stream", "INTEGER"), ("edits", "TEXT"), ("dropped", "TEXT"), ("given_up", "TEXT"),
        ("attempts", "INTEGER"), ("status", "INTEGER"), ("outcome", "TEXT"), ("failure_kind", "TEXT"), ("failure_scope", "TEXT"),
        ("failure_message", "TEXT"), ("resets_at", "REAL"), ("upstream_request_id", "TEXT"), ("stop_reason", "TEXT"),
        ("request_bytes", "INTEGER"), ("response_bytes", "INTEGER"), ("first_byte_ms", "INTEGER"), ("duration_ms", "INTEGER"),
        ("input_tokens", "INTEGER"), ("output_tokens", "INTEGER"), ("cache_read_tokens", "INTEGER"),
        ("cache_write_tokens", "INTEGER"), ("reasoning_tokens", "INTEGER"), ("billed_nano_aiu", "INTEGER")),
}
LEDGER_INDEXES = {"token_usage_events": ("created_at_ms", "model", "trace_id", "session_id", "user_id"),
                  "requests": ("created_at_ms", "trace_id", "session_id")}
# Numbered steps run once each, in order, and counted in `user_version`; columns are added without a step.
LEDGER_MIGRATIONS: Tuple[Tuple[str, ...], ...] = (
    tuple(f"CREATE INDEX IF NOT EXISTS idx_{table}_{column} ON {table}({column})"
          for table, columns in LEDGER_INDEXES.items() for column in columns),  # 1: indexes
)
BATCH_S = 0.25  # rows wait at most this long for company
HELD_ROWS = 10000  # rows kept while the disk is full or the file locked; beyond it the oldest are dropped

Row = Dict[str, Any]


def utc_text(ms: int) -> str:
    """Unix milliseconds as `2026-11-25T21:47:19.123Z`."""
    return f"{utc_second(ms // 1000)}.{ms % 1000:03d}Z"


@lru_cache(maxsize=16)  # the rows of one batch share their seconds
def utc_second(second: int) -> str:
    """A Unix second as `2026-11-25T21:47:19`."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def request_row(exchange: Exchange) -> Row:
    """The row of the requests table: every exchange has one, however it ended."""
    plan, failure, usage = exchange.plan or Plan(dialect=""), exchange.failure, exchange.usage or Usage()
    caller = plan.caller
    return {
        "created_at_ms": exchange.started_ms, "created_at_utc": utc_text(exchange.started_ms), "trace_id": exchange.trace_id,
        "client": caller.client or client_of(exchange.user_agent), "user_agent": exchange.user_agent,
        "endpoint": exchange.endpoint, "method": exchange.method, "path": exchange.path,
        "session_id": caller.session_id, "session_reason": caller.session_reason, "prompt_id": caller.prompt_id,
        "prompt_reason": caller.prompt_reason, "initiator": caller.initiator, "initiator_reason": caller.initiator_reason,
        "interaction": caller.interaction, "subagent": json.dumps(caller.subagent) if caller.subagent else None,
        "compaction": caller.compaction, "vision": int(caller.vision), "provider": plan.provider, "account": exchange.account,
        "asked_model": plan.asked_model, "model": plan.model, "model_reason": plan.model_reason,
        "served_model": exchange.served_model, "dialect": plan.dialect, "upstream_dialect": plan.upstream_dialect,
        "road": plan.road, "stream": int(plan.stream), "edits": ",".join(plan.edits), "dropped": ",".join(plan.dropped),
        "given_up": ",".join(f"{model};{kind}" for model, kind in plan.given_up.items()),
        "attempts": exchange.attempts, "status": exchange.status, "outcome": exchange.outcome,
        "failure_kind": failure.kind if failure else None, "failure_scope": failure.scope if failure else None,
        "failure_message": redact(failure.message)[:500] if failure else None, "resets_at": failure.resets_at if failure else None,
        "upstream_request_id": exchange.upstream_request_id, "stop_reason": exchange.stop_reason,
        "request_bytes": exchange.request_bytes, "response_bytes": exchange.response_bytes,
        "first_byte_ms": exchange.first_byte_ms, "duration_ms": exchange.duration_ms, "input_tokens": usage.input,
        "output_tokens": usage.output, "cache_read_tokens": usage.cache_read, "cache_write_tokens": usage.cache_write,
        "reasoning_tokens": usage.reasoning, "billed_nano_aiu": usage.billed_nano}


def usage_row(exchange: Exchange) -> Optional[Row]:
    """The row of the usage table, None when nothing was used. `input_tokens` leaves out what the cache holds."""
    usage, plan = exchange.usage, exchange.plan
    if usage is None or plan is None or not (usage.total or usage.billed_nano):
        return None
    return {
        "created_at_ms": exchange.started_ms, "created_at_utc": utc_text(exchange.started_ms), "trace_id": exchange.trace_id,
        "session_id": plan.caller.session_id or "", "user_id": exchange.account, "source": plan.provider,
        "endpoint": exchange.endpoint, "provider_name": None, "model": plan.model,
        "input_tokens": max(0, usage.input - usage.cache_read - usage.cache_write), "output_tokens": usage.output,
        "cache_read_input_tokens": usage.cache_read, "cache_creation_input_tokens": usage.cache_write,
        "total_tokens": usage.total, "total_nano_aiu": usage.billed_nano}


class Ledger:
    """The database and its one writer. A database that cannot be used is said once; requests go on."""

    def __init__(self, path: str, log: Log) -> None:
        self.path = path
        self._log = log
        self._queue: queue.SimpleQueue = queue.SimpleQueue()  # an Exchange, an Event to set, or None to end
        self._hurry = threading.Event()  # somebody waits for the batch
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        """Starts the writer."""
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def record(self, exchange: Exchange) -> None:
        """Queues the rows of an exchange; they are committed within a second."""
        self._queue.put(exchange)

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Waits until all that was recorded before is committed."""
        done = threading.Event()
        self._hurry.set()
        self._queue.put(done)
        return done.wait(timeout_s)

    def stop(self) -> None:
        """Commits what is queued and ends the writer (bounded)."""
        self._hurry.set()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(5)

    def _run(self) -> None:
        store = _Store(self.path, self._log)
        ended = False
        while not ended:
            exchanges, waiting, ended = self._collect()
            rows = [("requests", request_row(exchange)) for exchange in exchanges]
            rows += [("token_usage_events", row) for row in map(usage_row, exchanges) if row is not None]
            store.write(rows)
            for event in waiting:
                event.set()
        store.close()

    def _collect(self) -> Tuple[List[Exchange], List[threading.Event], bool]:
        """What arrives within one batch: exchanges, flushes to answer, and whether to end."""
        item = self._queue.get()
        if isinstance(item, Exchange):
            self._hurry.wait(BATCH_S)  # asleep while the batch fills: waking up per row costs more than the row
        exchanges: List[Exchange] = []
        while isinstance(item, Exchange):
            exchanges.append(item)
            if len(exchanges) >= 5000 or self._queue.empty():
                return exchanges, [], False
            item = self._queue.get()
        self._hurry.clear()
        return exchanges, [item] if item is not None else [], item is None


def storable(value: Any) -> Any:
    """The value as SQLite takes it: a lone surrogate, which JSON can escape, cannot be stored."""
    return value if type(value) is not str or value.isascii() else value.encode("utf-8", "replace").decode()


class _Store:
    """The writer's connection: opened on first use, opened again after an error."""

    def __init__(self, path: str, log: Log) -> None:
        self._path = path
        self._log = log
        self._db: Any = None
        self._held: List[Tuple[str, Row]] = []  # rows of failed batches

    def write(self, rows: List[Tuple[str, Row]]) -> None:
        """Commits the rows and those held back before; on failure they are held."""
        rows = self._held + rows
        if not rows:
            return
        import sqlite3  # 1 MB and file access: only in the writer
        try:
            if self._db is None:
                self._db = open_ledger(self._path)
            try:
                self._insert(rows)
            except (sqlite3.InterfaceError, sqlite3.ProgrammingError, OverflowError, ValueError):  # a row that cannot be stored as it is
                self._db.rollback()
                self._insert_singly(rows)
            self._db.commit()
            self._held = []
        except (sqlite3.Error, OSError) as exc:  # a full disk, a locked file
            self._log.once("ledger", f"cannot write usage to {self._path}: {exc}; requests go on, rows are kept in memory")
            self._held = rows[-HELD_ROWS:]
            self.close()

    def _insert(self, rows: Sequence[Tuple[str, Row]]) -> None:
        for table in LEDGER_TABLES:
            batch = [row for name, row in rows if name == table]
            if batch:
                names = list(batch[0])  # every row of a table has the same columns in the same order
                self._db.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
                                     [tuple(row.values()) for row in batch])

    def _insert_singly(self, rows: Sequence[Tuple[str, Row]]) -> None:
        """One row that SQLite cannot take must not keep the others out."""
        import sqlite3
        for row in rows:
            try:
                self._insert([(row[0], {name: storable(value) for name, value in row[1].items()})])
            except (sqlite3.InterfaceError, sqlite3.ProgrammingError, OverflowError, ValueError) as exc:
                self._log.once("ledger-row", f"a row cannot be stored and is dropped: {exc}")

    def close(self) -> None:
        """Closes the connection."""
        import sqlite3
        try:
            if self._db is not None:
                self._db.close()
        except sqlite3.Error:
            pass  # its transaction is rolled back by the next opening
        self._db = None


def open_ledger(path: str) -> Any:
    """A connection to the database, brought to today's shape; raises sqlite3.Error, OSError."""
    import sqlite3
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, 0o700, exist_ok=True)
    if not os.path.exists(path):
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    db = sqlite3.connect(path, timeout=5, check_same_thread=False)
    try:
        migrate_ledger(db)
    except BaseException:
        db.close()
        raise
    return db


def migrate_ledger(db: Any) -> None:
    """Brings a database to today's shape: tables, missing columns, numbered steps; raises sqlite3.Error."""
    db.execute("PRAGMA busy_timeout=5000")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=NORMAL")
    db.execute("BEGIN IMMEDIATE")  # two gateways that start together migrate one after the other
    for table, columns in LEDGER_TABLES.items():
        db.execute(f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(' '.join(column) for column in columns)})")
        present = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
        for name, kind in columns:
            if name not in present:
                db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind.replace(' PRIMARY KEY AUTOINCREMENT', '')}")
    done = db.execute("PRAGMA user_version").fetchone()[0]
    for statements in LEDGER_MIGRATIONS[done:]:
        for statement in statements:
            db.execute(statement)
    db.execute(f"PRAGMA user_version={max(done, len(LEDGER_MIGRATIONS))}")
    db.commit()


###############################################################################
#                                   Gateway                                   #
###############################################################################
# The steps of one request, from read to record.


STATUS_PHRASES = {200: "OK", 204: "No Content", 301: "Moved Permanently", 302: "Found", 304: "Not Modified", 400: "Bad Request",
                  401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
                  408: "Request Timeout", 413: "Content Too Large", 415: "Unsupported Media Type", 421: "Misdirected Request",
                  422: "Unprocessable Content", 426: "Upgrade Required", 429: "Too Many Requests",
                  431: "Request Header Fields Too Large", 500: "Internal Server Error", 502: "Bad Gateway",
                  503: "Service Unavailable", 504: "Gateway Timeout", 529: "Overloaded"}


@dataclass(eq=False, repr=False)
class Inbound(Value):
    """A request as the server accepted it: whole, decoded, admitted. `base_headers` go on every answer."""

    method: str
    path: str
    query: Dict[str, str]
    headers: Dict[str, str]
    body: bytes
    trace_id: str = ""
    base_headers: List[Tuple[str, str]] = field(default_factory=list)
    peer: str = ""  # the client's address
    key_name: str = ""  # names the API key that let it in, without telling it; "" without keys
    parsed: Optional[ParsedBody] = None  # of the body


def answer_head(status: int, headers: Sequence[Tuple[str, str]]) -> bytes:
    """The head of an answer to the client."""
    return format_head(f"HTTP/1.1 {status} {STATUS_PHRASES.get(status, 'Status')}", headers)


EMBEDDING_BATCH = 512  # inputs per call where the catalogue states no limit (copilot-upstream 8)
COUNT_PAUSE_S = 60.0  # after a 429 of upstream's own counting
ERROR_BODY_BYTES = 1 << 20  # more of an error answer is not read
ERROR_EXCERPT = 200  # bytes of an answer that is none, for the error that says so
MENDS_EACH = 8  # of one request: upstream names one fault at a time, and one tool server may bring several bad tools
NO_RETRY_KINDS = frozenset(("auth", "policy", "quota", "overflow"))


def error_headers(error: ProxyError) -> List[Tuple[str, str]]:
    """Headers of an error answer: what upstream said about limits, and that a retry is of no use where it is."""
    failure = getattr(error, "failure", None)
    headers = list(error.headers.items())
    if failure is not None and failure.wait_s is not None and "retry-after" not in error.headers:
        headers.append(("retry-after", str(math.ceil(failure.wait_s))))  # upstream said it in words or in a frame
    if error.final or failure is not None and (failure.kind in NO_RETRY_KINDS and not failure.transient or is_long(failure)):
        headers.append(("x-should-retry", "false"))
    return headers


def quota_header(value: str) -> Json:
    """`ent=1500&ov=0.0&ovPerm=true&rem=81.5&rst=2026-09-01T00%3A00%3A00Z` as an object (copilot-upstream 2.3)."""
    fields = dict(parse_qsl(value))
    numbers = {name: float(text) for name, text in fields.items() if re.fullmatch(r"-?\d{1,15}(\.\d{1,9})?", text)}
    return {"entitlement": numbers.get("ent"), "unlimited": numbers.get("ent") == -1, "overage": numbers.get("ov"),
            "overage_permitted": fields.get("ovPerm") == "true", "percent_remaining": numbers.get("rem"), "reset": fields.get("rst")}


def seen_quotas(headers: Dict[str, str], prefixes: Tuple[str, ...] = ("x-quota-snapshot-", "x-usage-ratelimit-")) -> Json:
    """The quotas and rolling limits of an answer's headers, by name."""
    return {name.rpartition("-")[2]: quota_header(value) for name, value in headers.items() if name.startswith(prefixes)}


# Which quota of an earlier answer tells when a limit ends that states no time itself: kind, pattern in "code message", its names
KNOWN_ENDS = (("quota", r"", ("premium_models", "premium_interactions", "chat")), ("rate", r"weekly", ("weekly",)))


def with_known_end(failure: Failure, seen: Dict[str, str], now: float) -> Failure:
    """The failure of a limit, with the end that the headers of an earlier answer told of if it states none."""
    if failure.resets_at is None:
        text, quotas = f"{failure.code or ''} {failure.message}".lower(), seen_quotas(seen)
        names = next((names for kind, pattern, names in KNOWN_ENDS if kind == failure.kind and re.search(pattern, text)), ())
        ends = [iso_time(str(quotas[name]["reset"])) for name in names if name in quotas]
        failure.resets_at = next((end for end in ends if end and end > now), None)
        failure.wait_s = failure.wait_s if failure.resets_at is None else failure.resets_at - now
    return failure


def remaining_limits(headers: Dict[str, str]) -> str:
    """`, session 99.6% left until …, weekly …` of the rolling limits, "" where upstream says nothing."""
    left = seen_quotas(headers, ("x-usage-ratelimit-",))
    return "".join(f", {name} {quota['percent_remaining']}% left until {quota['reset']}" for name, quota in left.items())


class RateGate:
    """At least `rateLimitSeconds` between two generation requests, over all clients (gateway-features 20)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._passed_at = float("-inf")  # when the last request passed; guarded by _lock
        self._taken: List[float] = []  # the slots of those who wait; guarded by _lock

    def pass_through(self, settings: Settings, stopper: Stopper) -> None:
        """Returns when the request may go; raises ClientError 429, or waits for its own slot if told to."""
        limit = settings["rateLimitSeconds"]
        if not limit:
            return
        with self._lock:
            now = self._clock()
            slot = max(now, max([self._passed_at, *self._taken]) + limit)
            if slot <= now:
                self._passed_at = now
                return
            if settings["rateLimitWait"]:
                self._taken.append(slot)
        if not settings["rateLimitWait"]:
            raise try_later(f"Rate limit exceeded; retry in {slot - now:.1f}s", slot - now)
        try:
            stopper.wait(slot - now)
            with self._lock:
                self._passed_at = max(self._passed_at, slot)
        finally:
            with self._lock:
                self._taken.remove(slot)  # of a client that left, too: those who come later must not wait for it


def try_later(message: str, wait_s: float) -> ClientError:
    """A 429 of ours that a client may well retry."""
    error = ClientError(message, status=429, code="rate_limited", kind="rate_limit_error",
                        headers={"retry-after": str(math.ceil(wait_s))})
    error.final = False
    return error


# When a client refused by the queue may come again: places come free one by one, not at a known time.
QUEUE_RETRY_S = 5.0


class ClientQueue:
    """At most `limits.concurrentPerClient` requests of one client run at a time; the others stand in line.

        run -> running                       a place is free and nobody waits for it
            -> waiting -> running            the one that ends hands its place on, the oldest first
                       -> 429, client gone   `limits.queueSeconds` are over, the client left; the place in line is given up

    Clients do not wait for each other. The limit is live: a higher one takes effect as requests end.
    """

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._running: Dict[str, int] = {}  # requests by client; guarded by _lock
        self._waiting: Dict[str, Deque[threading.Event]] = {}  # set: it is your turn; guarded by _lock

    def run(self, client: str, stopper: Stopper, work: Callable[[], None]) -> None:
        """Does the work when it is its turn; raises ClientError 429, ClientGone."""
        turn = self._take(client)
        if turn is not None:
            self._wait(client, turn, stopper)
        try:
            work()
        finally:
            with self._lock:
                self._leave(client)

    def _take(self, client: str) -> Optional[threading.Event]:
        """None with a place taken, else the turn to wait for."""
        with self._lock:
            if client not in self._waiting and self._has_room(client):
                self._running[client] = self._running.get(client, 0) + 1
                return None
            turn = threading.Event()
            self._waiting.setdefault(client, deque()).append(turn)
            return turn

    def _wait(self, client: str, turn: threading.Event, stopper: Stopper) -> None:
        seconds, come = self._settings()["limits.queueSeconds"], False
        try:
            come = wait_for(turn, seconds, stopper)
        finally:
            if not come:
                self._give_up(client, turn)
        if not come:
            limit = self._settings()["limits.concurrentPerClient"]
            raise try_later(f"{limit} requests of this client are running already (limits.concurrentPerClient) and none of them "
                            f"ended within {seconds:g} s", QUEUE_RETRY_S)

    def _give_up(self, client: str, turn: threading.Event) -> None:
        with self._lock:
            if turn.is_set():  # it came in the last moment: somebody else may have it
                self._leave(client)
                return
            self._waiting[client].remove(turn)
            if not self._waiting[client]:
                del self._waiting[client]

    def _has_room(self, client: str) -> bool:
        limit = self._settings()["limits.concurrentPerClient"]
        return not limit or self._running.get(client, 0) < limit

    def _leave(self, client: str) -> None:
        """Frees one place and hands out what is free; called with the lock held."""
        self._running[client] -= 1
        waiting = self._waiting.get(client)
        while waiting and self._has_room(client):
            waiting.popleft().set()
            self._running[client] += 1
        if not waiting:
            self._waiting.pop(client, None)
        if not self._running[client]:
            del self._running[client]


def share_of(inbound: Inbound, caller: Caller) -> str:
    """Who shares one share of `limits.concurrentPerClient`: all who hold one key; without keys one session (or, where
    none is told, one program) of one address."""
    return inbound.key_name or f"{inbound.peer} {caller.session_id or caller.client}"


class Planner:
    """Turns the name a client asks for into a model, and into the dialect it is spoken to in."""

    def __init__(self, settings: Callable[[], Settings], models: Models, provider: Provider) -> None:
        self._settings = settings
        self._models = models
        self._provider = provider

    def _long(self, name: str, plan: Plan) -> str:
        """The name with `[1m]` where the long window is asked for, by name or by beta, and without it where it is off."""
        mode, bare = self._settings()["context1m"], name[:-len(LONG_CONTEXT)] if name.lower().endswith(LONG_CONTEXT) else name
        plan.long_context = mode == "auto" or mode == "suffix" and (bare != name or plan.long_context)
        return bare + LONG_CONTEXT if mode == "suffix" and plan.long_context else bare

    def choose(self, plan: Plan, stopper: Stopper) -> None:
        """Mapping, then name resolution, then the endpoint; without a catalogue the client's own dialect is tried.

        Fills the plan's model, reason, record and upstream dialect; raises ClientError for names nobody has.
        """
        settings = self._settings()
        accounts = self._provider.accounts
        name, reasons = self._mapped(plan.asked_model)
        plan.provider, plan.model, plan.upstream_dialect = self._provider.name, name, plan.dialect
        if accounts.settled.is_set() and accounts.active is None:
            raise accounts.sign_in_needed()
        catalogue = self._models.current(HOLD_SHARE * settings["streams.statusHoldSeconds"], stopper)
        if catalogue is not None:
            plan.model, reason = self._found(name, catalogue, plan, stopper)
            plan.record = (self._models.current() or catalogue).records.get(plan.model)
            reasons += [reason] if reason else []
        plan.model_reason = ",".join(reasons) or None
        self._direct(plan)

    def _direct(self, plan: Plan) -> None:
        """Fills in the way to the plan's model; raises ClientError."""
        if plan.operation == EMBEDDINGS:
            plan.upstream_dialect = EMBEDDINGS
            if plan.record is not None and EMBEDDINGS not in endpoint_dialects(plan.record):
                raise wrong_endpoint(plan.model, EMBEDDINGS, endpoint_dialects(plan.record))
        elif plan.record is not None:
            plan.upstream_dialect = self._routed(plan.dialect, plan.record, self._settings())
        elif plan.dialect == GEMINI:
            plan.upstream_dialect = CHAT
        plan.road = "pass-through" if plan.upstream_dialect == plan.dialect else "translated"
        plan.origin = self._origin(plan)

    def fall_back(self, plan: Plan, name: str) -> bool:
        """Points a fresh plan at a model of `fallbacks`; False for a name nobody has. Raises ClientError where it cannot serve.

        The operator's name means what it says: it is neither mapped nor replaced by its kin.
        """
        catalogue = self._models.current()
        found = catalogue.find(self._long(name, plan)) if catalogue is not None else None
        if catalogue is None or found is None:
            return False
        plan.provider, plan.model, plan.record = self._provider.name, found[0], catalogue.records[found[0]]
        self._direct(plan)
        return True

    def _found(self, name: str, catalogue: Catalogue, plan: Plan, stopper: Stopper) -> Tuple[str, Optional[str]]:
        """(id, reason) of a name: what it means, else its kin where that is allowed; raises ClientError, ClientGone."""
        long, hold_s = self._long(name, plan), self._settings()["streams.statusHoldSeconds"]
        found = catalogue.find(long) or self._models.find_anew(long, HOLD_SHARE * hold_s, stopper)
        if found is not None:
            return found[0], None if found[0] == name else found[1] or "alias"
        kin = self._provider.stand_ins.get(plan.operation)
        if kin is None and self._settings()["unknownModels"] == "resolve" and plan.operation != EMBEDDINGS:
            kin = kindred(name, catalogue, self._settings()["smallModel"])
        if kin is None:
            raise unknown_model(name, plan.dialect)
        return kin, "unknown-name"

    def _routed(self, dialect: str, record: Json, settings: Settings) -> str:
        served = self._served(record)
        only_first = dialect == RESPONSES and settings["strictResponses"] or dialect == GEMINI and not settings["geminiFallback"]
        return choose_dialect(dialect, served, only_first)

    def _origin(self, plan: Plan) -> str:
        account = self._provider.accounts.active
        return origin_of(plan.provider, account.key if account else "", plan.model)

    def choose_leniently(self, plan: Plan) -> bool:
        """The same for counting, where no name is refused; True when upstream counts for this model."""
        plan.model, _ = self._mapped(plan.asked_model)
        plan.provider, plan.upstream_dialect = self._provider.name, MESSAGES
        catalogue = self._models.current()
        found = catalogue.find(plan.model) if catalogue is not None else None
        if catalogue is None or found is None:
            return False
        plan.model, plan.record = found[0], catalogue.records[found[0]]
        plan.origin = self._origin(plan)
        served = self._served(plan.record)
        plan.upstream_dialect = next((dialect for dialect in ROUTING[plan.dialect] if dialect in served), MESSAGES)
        return MESSAGES in served

    def _mapped(self, name: str) -> Tuple[str, List[str]]:
        mappings = self._settings()["modelMappings"]
        target = map_name(name, *parse_mappings(mappings)) if mappings else None
        return (target, ["mapping"]) if target else (name, [])

    def _served(self, record: Json) -> List[str]:
        """The dialects a model is used in; `useMessagesApi: false` takes Messages away."""
        settings, served = self._settings(), endpoint_dialects(record)
        if settings["useMessagesApi"] and not settings["redirectAnthropic"]:
            return served
        return [dialect for dialect in served if dialect != MESSAGES]


class Sender:
    """Sends one request until there is an answer or nothing more to try: the Send step."""

    def __init__(self, settings: Callable[[], Settings], provider: Provider, log: Log, unit_s: float) -> None:
        self._settings = settings
        self._provider = provider
        self._log = log
        self._unit_s = unit_s

    def send(self, plan: Plan, wire: bytes, inbound: Inbound, stopper: Stopper, exchange: Exchange) -> Answer:
        """An answer of status 200; repeated before the first byte as RetryPolicy says; raises UpstreamError.

        A refused Copilot token is replaced and the request replayed, once for each way to refuse it: an expired token
        (401) may hide that the host has changed (421) or that it is not the one for this account (403).
        """
        accounts = self._provider.accounts
        renewed: Set[int] = set()
        repeats = 0
        while True:
            token = accounts.bearer(stopper)
            exchange.account = accounts.active.login if accounts.active else ""
            answer, failure = self.attempt(plan, token, wire, stopper, inbound, exchange)
            if answer is not None:
                return answer
            if failure.renew and failure.status not in renewed and not token.direct:
                renewed.add(failure.status)
                self._log.debug(f"upstream answered {failure.status}; a fresh Copilot token is tried once")
                accounts.spoil(token)
                continue
            if not self.wait_to_repeat(failure, repeats, stopper):
                raise UpstreamError(unreachable(failure.message, exchange.attempts) if failure.code == UNREACHABLE else failure)
            repeats += 1

    def wait_to_repeat(self, failure: Failure, repeats: int, stopper: Stopper) -> bool:
        """Waits as long as RetryPolicy says after `repeats` repeats; False when it says to give up."""
        settings = self._settings()
        policy = RetryPolicy(settings["maxConnectionRetries"], settings["streams.retryWaitSeconds"], self._unit_s)
        delay = policy.delay(failure, repeats)
        if delay is None:
            failure.lasting = failure.wait_s is not None and failure.wait_s > policy.wait_limit_s > 0
            return False
        self._log.debug(f"an attempt failed ({failure.status} {failure.kind}); again in {delay:g} s")
        stopper.wait(delay)
        return True

    def attempt(self, plan: Plan, token: CopilotToken, wire: bytes, stopper: Stopper, inbound: Inbound,
                exchange: Exchange) -> Tuple[Optional[Answer], Failure]:
        """(answer, _) of a success, (None, failure) otherwise; raises ClientGone."""
        exchange.attempts += 1
        try:
            answer = self._provider.open(plan, token, wire, stopper, inbound.headers)
        except TransportError as exc:
            return None, Failure("transport", "provider", 504, str(exc), UNREACHABLE, transient=not exc.timed_out)
        exchange.upstream_request_id = answer.headers.get("x-request-id") or answer.headers.get("request-id")
        if answer.status == 200:
            self._provider.seen_headers = answer.headers
            if self._log.verbose:
                self._log.debug(f"<-- model: {plan.model}{remaining_limits(answer.headers)}")
            return answer, CUT
        try:
            now = time.time()
            failure = classify(answer.status, answer.headers, answer.read_all(ERROR_BODY_BYTES), now)
            return None, with_known_end(failure, self._provider.seen_headers, now)
        except TransportError as exc:
            return None, classify(answer.status, answer.headers, str(exc).encode(), time.time())
        finally:
            answer.close()


class Road:
    """How an answer of upstream's becomes the client's. One object serves one request, attempt by attempt.

    `stream`, `not_a_stream`, `whole` and `assembled` relay one answer; they raise UpstreamError while nothing of it has
    been relayed, and end the client's stream legally afterwards.
    """

    def __init__(self, plan: Plan, inbound: Inbound, line: ClientLine, exchange: Exchange, watch: Watch) -> None:
        self.plan = plan
        self.inbound = inbound
        self.line = line
        self.exchange = exchange
        self.watch = watch
        self.relayed = False  # something of upstream's has reached the client

    def stream_headers(self, upstream: Dict[str, str]) -> List[Tuple[str, str]]:
        """Headers of the streamed answer."""
        return stream_headers(self.plan, self.inbound, upstream, self.line)

    def early_head(self) -> bytes:
        """The head of a streamed answer that opens before upstream's is known."""
        return answer_head(200, self.stream_headers({}))

    def stream(self, answer: Answer) -> None:
        raise NotImplementedError

    def not_a_stream(self, answer: Answer) -> None:
        raise NotImplementedError

    def whole(self, answer: Answer) -> None:
        raise NotImplementedError

    def assembled(self, answer: Answer) -> None:
        """Relays as a whole what upstream streams."""
        raise NotImplementedError

    def ending(self, failure: Failure) -> bytes:
        """What ends a stream of which only the head is out."""
        raise NotImplementedError

    def relay(self, answer: Answer, data: bytes) -> None:
        """Sends stream bytes, behind the head if it is not out."""
        if self.relayed:
            self.line.send(data)
            return
        self.relayed = True
        self.line.send_first(answer_head(200, self.stream_headers(answer.headers)), data)
        self.exchange.first_byte_ms = elapsed_ms(self.exchange)

    def finish(self, answer: Answer, data: bytes, failure: Optional[Failure]) -> None:
        """Sends the last bytes, after the watch has let go, and notes how it ended."""
        exchange = self.exchange
        exchange.status, exchange.failure = 200, failure
        exchange.outcome = "ok" if failure is None else "interrupted" if failure.code == INTERRUPTED else "upstream_error"
        if exchange.first_byte_ms is None:
            exchange.first_byte_ms = elapsed_ms(exchange)
        self.watch.remove(self.line)
        self.line.finish(data, b"" if self.relayed else answer_head(200, self.stream_headers(answer.headers)))
        if failure is None:
            answer.drain(DRAIN_S)

    def send_whole(self, answer: Answer, body: bytes, usage: Optional[Usage], model: Any, stop_reason: Optional[str]) -> None:
        """Sends a complete answer and notes what it used."""
        exchange = self.exchange
        exchange.usage, exchange.served_model, exchange.stop_reason = usage, text_or_none(model) or "", stop_reason
        headers = [*model_headers(self.plan, self.inbound, answer.headers), *usage_headers(usage)]
        send_whole(self.watch, self.line, exchange, body, headers)


class Batches:
    """Upstream's stream as it arrives: whole frames of one read at a time. `failure` says why it broke off, if it did."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.failure: Optional[Failure] = None

    def dated(self, failure: Failure) -> Failure:
        """What a frame of this stream told, at the moment it came."""
        return dated(failure, self._answer.headers, time.time())

    def __iter__(self) -> Iterator[bytes]:
        buffer = FrameBuffer()
        while True:
            try:
                data = self._answer.read()
            except TransportError as exc:
                self.failure = Failure("transport", "provider", 502, str(exc), INTERRUPTED, transient=not exc.timed_out)
                return
            except UpstreamError as error:
                self.failure = error.failure  # the gateway stops
                return
            if not data and not is_whole_frame(buffer.rest()):
                return
            frames = buffer.feed(data or b"\n\n")  # an end without its blank line still ends the last frame
            if frames:
                yield frames
            if not data:
                return


# How a stream begins that nobody asked for; its content type need not say so.
SSE_OPENING = re.compile(rb"\s*(?:data|event|id|retry)?: ?[^\n]*\n")


class Reread(Answer):
    """An answer whose body has been read, to be read once more."""

    def __init__(self, answer: Answer, body: bytes) -> None:
        self.headers, self._body = answer.headers, body

    def read(self) -> bytes:
        body, self._body = self._body, b""
        return body


def assembled_reply(codec: Codec, answer: Answer, exchange: Exchange) -> Reply:
    """The whole answer of a stream; raises UpstreamError for one that breaks off or tells of a failure."""
    batches = Batches(answer)
    events = lawful(guarded(codec.decode_stream(map(parse_frames, batches))), exchange.trace_id)
    try:
        return collect(noted(events, exchange))
    except UpstreamError as error:
        if error.failure.code == INTERRUPTED and batches.failure is not None:
            raise UpstreamError(batches.failure) from error
        raise


def noted(batches: Iterable[List[Event]], exchange: Exchange) -> Iterator[List[Event]]:
    """The same events; what they tell of usage on the way stays in the record if the stream breaks off."""
    for events in batches:
        for event in events:
            if type(event) is ReplyStart:
                exchange.usage, exchange.served_model = event.usage, event.model
            elif type(event) is Used:
                exchange.usage = event.usage
        yield events


class PassThroughRoad(Road):
    """Same dialect on both sides: upstream's own bytes, metered on the way."""

    def __init__(self, plan: Plan, quirks: Sequence[Quirk], inbound: Inbound, line: ClientLine, exchange: Exchange,
                 watch: Watch) -> None:
        super().__init__(plan, inbound, line, exchange, watch)
        self._quirks = quirks
        self._codec = CODECS[plan.dialect]

    def stream(self, answer: Answer) -> None:
        """Moves whole frames as they arrive: read -> cut -> meter -> patch -> write, one write per read."""
        passage = Passage(self._codec, self.exchange.trace_id, self.plan, self._quirks)
        meter, batches, last, held = passage.meter, Batches(answer), b"", b""
        try:
            for frames in batches:
                out = passage.feed(frames)
                if not self.relayed and meter.error is not None:
                    raise UpstreamError(meter.error)
                if not self.relayed and out and is_prelude(out):
                    held += out  # told with the first event: the status may still be another
                    continue
                if held:
                    out, held = held + out, b""
                if meter.ended or meter.error is not None:
                    last = out
                    break
                if out:
                    self.relay(answer, out)
            if not self.relayed and not meter.ended:
                raise UpstreamError(batches.failure or CUT)
            last += meter.close(batches.failure if meter.error is None else batches.dated(meter.error))
        except (ClientGone, UpstreamError):
            meter.close(CUT)  # what was used so far is still billed
            raise
        finally:
            self.exchange.usage, self.exchange.served_model = meter.usage, meter.served_model
            self.exchange.stop_reason = meter.stop_reason
        self.finish(answer, last, None if meter.error is None else batches.dated(meter.error))

    def not_a_stream(self, answer: Answer) -> None:
        """A whole answer where a stream was asked for is told as a stream; an error is an error."""
        value, exchange = good_object(answer, read_whole(answer)), self.exchange
        reply = self._codec.decode_reply(value)
        exchange.usage, exchange.served_model, exchange.stop_reason = reply.usage, reply.model or "", reply.stop_reason
        reply = replace(reply, id=client_id(self.plan.dialect, reply.id, exchange.trace_id))
        frames = self._codec.encode_stream(lawful([replay(reply)], exchange.trace_id))
        self.finish(answer, b"".join(map(format_frames, frames)), None)

    def whole(self, answer: Answer) -> None:
        """Relays a whole answer, upstream's bytes where no quirk concerns it."""
        body = read_whole(answer)
        if SSE_OPENING.match(body):
            self.assembled(Reread(answer, body))
        else:
            self._edit_and_send(answer, body, good_object(answer, body))

    def assembled(self, answer: Answer) -> None:
        """Tells a stream as one object: what the hub carries of it."""
        value = self._codec.encode_reply(assembled_reply(self._codec, answer, self.exchange), None)
        self._send(answer, dump_json(value), value)

    def _edit_and_send(self, answer: Answer, body: bytes, value: Json) -> None:
        edited = any([self._codec.finish(value), *[quirk.whole(value, self.plan) for quirk in edits_of_answer(self.plan, self._quirks)
                                                   if quirk.whole is not None]])
        self._send(answer, dump_json(value, ascii_only=body.isascii()) if edited else body, value)

    def _send(self, answer: Answer, body: bytes, value: Json) -> None:
        self.send_whole(answer, body, self._codec.decode_usage(value), value.get("model"), self._codec.stop_reason(value))

    def ending(self, failure: Failure) -> bytes:
        """The dialect's ending for a stream without content."""
        return self._codec.meter(self.exchange.trace_id).close(failure)


class RememberingRoad(PassThroughRoad):
    """Chat, passed through, of a model that refuses calls without their state: what its client may not keep is kept here."""

    def __init__(self, plan: Plan, quirks: Sequence[Quirk], inbound: Inbound, line: ClientLine, exchange: Exchange,
                 watch: Watch, recollection: Recollection) -> None:
        super().__init__(plan, quirks, inbound, line, exchange, watch)
        self._recollection = recollection
        self._relayed: List[bytes] = []

    def relay(self, answer: Answer, data: bytes) -> None:
        self._relayed.append(data)
        super().relay(answer, data)

    def finish(self, answer: Answer, data: bytes, failure: Optional[Failure]) -> None:
        super().finish(answer, data, failure)
        if failure is None:
            try:
                self._remember(collect(self._codec.decode_stream([parse_frames(b"".join(self._relayed) + data)])))
            except UpstreamError:
                pass  # it ended in an unusual way: nothing is remembered

    def _send(self, answer: Answer, body: bytes, value: Json) -> None:
        super()._send(answer, body, value)
        self._remember(self._codec.decode_reply(value))

    def _remember(self, reply: Reply) -> None:
        carriage = Carriage(self.plan.origin, CHAT, CHAT)
        thinking = [carriage.sealed(block) for block in reply.content if isinstance(block, Thinking) and block.signature]
        self._recollection.keep([block.id for block in reply.content if isinstance(block, ToolCall)], thinking)


class TranslatedRoad(Road):
    """Upstream speaks another dialect: frames -> events -> frames, batch by batch; whole answers by the same values."""

    def __init__(self, plan: Plan, request: Request, inbound: Inbound, line: ClientLine, exchange: Exchange, watch: Watch,
                 recollection: Recollection, cutter: Optional[Callable[[], TextCutter]], expected: Callable[[], int]) -> None:
        super().__init__(plan, inbound, line, exchange, watch)
        self._asked = request
        self._cutter = cutter  # one for each try
        self._expected = expected  # input tokens, estimated
        hidden = plan.dialect == MESSAGES and request.reasoning is not None and request.reasoning.visible is False
        self._carriage = Carriage(plan.origin, plan.dialect, plan.upstream_dialect, hidden)
        self._recollection = recollection
        self._client, self._upstream = CODECS[plan.dialect], CODECS[plan.upstream_dialect]
        self._framing: Callable[[Iterable[Frame]], bytes] = format_frames
        if plan.dialect == GEMINI and inbound.query.get("alt") != "sse":
            self._framing = JsonArray()

    def stream_headers(self, upstream: Dict[str, str]) -> List[Tuple[str, str]]:
        """Headers of the streamed answer; Gemini without `alt=sse` is a JSON array."""
        headers = super().stream_headers(upstream)
        return [("Content-Type", "application/json"), *headers[1:]] if self._framing is not format_frames else headers

    def stream(self, answer: Answer) -> None:
        """Moves events as they arrive: read -> decode -> meter -> encode -> write, one write per read.

        A Messages client reads the prompt's size in the first event, where Chat and Responses tell it in the last. It is
        reckoned while upstream thinks: the head of the answer is here, the first event seldom.
        """
        expected = Usage(input=self._expected()) if self.plan.dialect == MESSAGES else None
        batches = Batches(answer)
        self._stream_events(answer, self._upstream.decode_stream(map(parse_frames, batches)), batches, expected)

    def _stream_events(self, answer: Answer, decoded: Iterable[List[Event]], batches: Batches, expected: Optional[Usage]) -> None:
        plan, exchange = self.plan, self.exchange
        restored = restore_names(guarded(decoded), plan.names)
        events = lawful(self._cutter().stream(restored) if self._cutter else restored, exchange.trace_id)
        tally = Tally(self, batches, self._carriage.stream(events), expected)
        last = b""
        try:
            for frames in self._client.encode_stream(iter(tally), self._asked):
                data = self._framing(frames)
                if tally.ended:
                    last += data
                elif data:
                    self.relay(answer, data)
        finally:
            exchange.usage, exchange.served_model, exchange.stop_reason = tally.usage, tally.model, tally.stop_reason
        self._remember(tally.calls, tally.thinking)
        if tally.usage is not None and tally.usage.estimated:  # the text was cut: upstream need not say the rest
            answer.close()
            plan.edits.append("cut")
        if isinstance(self._framing, JsonArray):
            last += self._framing.close()
        self.finish(answer, last, tally.failure)

    def not_a_stream(self, answer: Answer) -> None:
        """A whole answer where a stream was asked for is told as a stream; an error is an error."""
        reply = self._upstream.decode_reply(good_object(answer, read_whole(answer)))
        self._stream_events(answer, [replay(reply)], Batches(answer), None)

    def whole(self, answer: Answer) -> None:
        """Translates a whole answer."""
        body = read_whole(answer)
        if SSE_OPENING.match(body):
            self.assembled(Reread(answer, body))
        else:
            self._tell(answer, self._upstream.decode_reply(good_object(answer, body)))

    def assembled(self, answer: Answer) -> None:
        """The same for one that comes as a stream."""
        self._tell(answer, assembled_reply(self._upstream, answer, self.exchange))

    def _tell(self, answer: Answer, reply: Reply) -> None:
        plan = self.plan
        reply = restore_reply(reply, plan.names)
        if self._cutter:
            reply = collect(lawful(self._cutter().stream([replay(reply)]), self.exchange.trace_id))
        reply = self._carriage.reply(reply)
        reply = replace(reply, id=client_id(plan.dialect, reply.id, self.exchange.trace_id), model=reply.model or plan.model,
                        created_at=reply.created_at or self.exchange.started_ms // 1000)
        thinking = [block for block in reply.content if isinstance(block, Thinking) and (block.signature or block.redacted)]
        self._remember([block.id for block in reply.content if isinstance(block, ToolCall)], thinking)
        body = dump_json(self._client.encode_reply(reply, self._asked))
        self.send_whole(answer, body, reply.usage, reply.model, reply.stop_reason)

    def _remember(self, calls: Sequence[str], thinking: Sequence[Thinking]) -> None:
        """Keeps what the client or the shape of its carriers cannot say at the next turn."""
        self._recollection.note(thinking, self.plan.origin)
        if self.plan.dialect == CHAT:
            self._recollection.keep(calls, thinking)

    def ending(self, failure: Failure) -> bytes:
        """The dialect's ending for a stream without content."""
        return stream_ending(self.plan.dialect, failure, self.exchange.trace_id, self._framing)


class JsonArray:
    """Frames as the elements of one JSON array, closed by `close`: Gemini's stream without `alt=sse`."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, frames: Iterable[Frame]) -> bytes:
        pieces = []
        for frame in frames:
            pieces.append(("," if self._begun else "[") + frame.data)
            self._begun = True
        return format_text("".join(pieces))

    def close(self) -> bytes:
        """The bracket that ends the array."""
        return b"\n]" if self._begun else b"[]"


def stream_ending(dialect: str, failure: Failure, trace_id: str,
                  framing: Callable[[Iterable[Frame]], bytes] = format_frames) -> bytes:
    """What ends a stream of which only the head is out."""
    data = b"".join(map(framing, CODECS[dialect].encode_stream(lawful([[Fault(failure)]], trace_id))))
    return data + (framing.close() if isinstance(framing, JsonArray) else b"")


class Tally:
    """Counts along a translated stream: usage, model, ending, and what a forgetful client cannot keep.

    While nothing has been relayed a Fault is raised: it is still a real status. A stream that broke off tells why.
    """

    def __init__(self, road: Road, batches: Batches, events: Iterable[List[Event]], expected: Optional[Usage]) -> None:
        self._road = road
        self._batches = batches
        self._events = events
        self._expected = expected  # what the client is told at the start where upstream says nothing; never counted here
        self._begun = False
        self.ended = False
        self.failure: Optional[Failure] = None
        self.usage: Optional[Usage] = None
        self.model = ""
        self.stop_reason: Optional[str] = None
        self.calls: List[str] = []
        self.thinking: List[Thinking] = []

    def __iter__(self) -> Iterator[List[Event]]:
        forgetful = self._road.plan.dialect in (CHAT, MESSAGES)
        for events in self._events:
            if not self._begun:
                if all(type(event) is Pulse for event in events):
                    continue  # alive, and may still refuse: nothing opens the stream but its start
                events = [self._started(event) if type(event) is ReplyStart else event for event in events]
            last = type(events[-1])
            if last is Fault or last is ReplyStop:
                if len(events) > 1 and type(events[-2]) is Used:
                    self.usage = events[-2].usage
                events = [*events[:-1], self._ended(events[-1])]
            elif last is Used:
                self.usage = events[-1].usage
            if forgetful:
                self._remember(events)
            yield events

    def _started(self, start: Any) -> Event:
        road = self._road
        self._begun = True
        self.model, self.usage = start.model, start.usage
        said = start.usage if start.usage is not None and start.usage.input else self._expected or start.usage
        return ReplyStart(client_id(road.plan.dialect, start.id, road.exchange.trace_id), start.model or road.plan.model,
                          start.created_at or road.exchange.started_ms // 1000, said)

    def _ended(self, end: Any) -> Event:
        if type(end) is ReplyStop:
            self.ended, self.stop_reason, self.usage = True, end.reason, end.usage or self.usage
            return end
        self.failure = self._batches.failure if end.failure.code == INTERRUPTED and self._batches.failure else self._batches.dated(end.failure)
        if not self._road.relayed:
            raise UpstreamError(self.failure)
        self.ended = True
        return Fault(self.failure)

    def _remember(self, events: Sequence[Any]) -> None:
        for event in events:
            if type(event) is BlockStart and isinstance(event.block, ToolCall):
                self.calls.append(event.block.id)
            elif type(event) is BlockStop and isinstance(event.block, Thinking) and (event.block.signature or event.block.redacted):
                self.thinking.append(event.block)


# An answer of some dialect has one of these; what has none of them says nothing.
ANSWER_FIELDS = ("choices", "output", "content", "data", "candidates")


def good_object(answer: Answer, body: bytes) -> Json:
    """The JSON of a whole answer; raises UpstreamError for pages, error objects and rubbish that came as 200."""
    value = json_object(body)
    if value is not None and is_error_object(value):
        raise UpstreamError(stream_failure(value))
    if value is None or not any(name in value for name in ANSWER_FIELDS):
        said = body[:ERROR_EXCERPT].decode("utf-8", "replace").strip()
        what = html_title(body.decode("utf-8", "replace")) if said[:1] == "<" else f"upstream answered 200 with {said or 'nothing'}"
        raise UpstreamError(Failure("transport", "provider", 502, what, request_id=answer.headers.get("x-request-id"),
                                    headers=tuple(relayed_headers(answer.headers))))
    return value


@dataclass(eq=False, repr=False)
class Outgoing(Value):
    """A request as it is sent: the wire body, and its bytes."""

    body: Json
    raw: bytes


# Edits, by their names in `Plan.edits`, that leave a conversation as it came.
OUTSIDE_EDITS = frozenset(("service_tier", "store", "output_limit", "least_output", "body_betas", "effort", "thinking", "hidden_thinking",
                           "sampling", "include_usage", "speed", "assembled", "model"))


def edited_bytes(inbound: Inbound, body: Json, plan: Plan) -> bytes:
    """The bytes of an edited body; a large conversation that nobody edited as it came."""
    parsed = inbound.parsed
    if parsed is not None and parsed.spans and OUTSIDE_EDITS.issuperset(plan.edits):
        return spliced(inbound.body, parsed.spans, body)
    return dump_json(body, ascii_only=parsed is not None and parsed.as_ascii)


@dataclass(eq=False, repr=False)
class Turn(Value):
    """A request on its way to one model: what the client meant, what was decided, what is sent, how the answer returns."""

    request: Request
    plan: Plan
    wire: Outgoing
    road: Road
    taught: int  # `Lessons.taught` when it was shaped


def says_something(message: Message) -> bool:
    """Whether a turn of the conversation holds more than blanks."""
    return message.role != "system" and any(not isinstance(block, Text) or block.text.strip() for block in message.content)


def expected_input(prompts: PromptCounter, request: Request, plan: Plan, settings: Settings, sample: int = REQUEST_SAMPLE_CHARS) -> int:
    """Input tokens that upstream will bill for a client's request, as far as is known before."""
    if plan.upstream_dialect == CHAT and plan.provider == "copilot":
        request = request_without_pdfs(request)
    return prompts.count(request, plan.model, settings["claudeTokenMultiplier"], sample)


class Gateway:
    """Takes an accepted request through interpret, plan, permit, shape, send, relay and record."""

    def __init__(self, settings: Callable[[], Settings], planner: Planner, sender: Sender, machine_id: str, watch: Watch,
                 estimator: TokenEstimator, prompts: PromptCounter, log: Log,
                 approve: Optional[Callable[[str], bool]] = None) -> None:
        self._settings = settings
        self._planner = planner
        self._sender = sender
        self._estimator = estimator
        self._prompts = prompts
        self._log = log
        self._machine_id = machine_id
        self._watch = watch
        self._approve = approve
        self._approve_lock = threading.Lock()  # one question at a time on the terminal
        self._gate = RateGate()
        self._queue = ClientQueue(settings)
        self._recollection = Recollection()
        self._lessons = Lessons()

    def generate(self, dialect: str, inbound: Inbound, line: ClientLine, exchange: Exchange, said: Optional[Json] = None) -> None:
        """Serves one generation request of a dialect; `said`: what the path says instead of the body (Gemini).

        Raises ProxyError while nothing has been sent, ClientGone.
        """
        read = partial(self._read, dialect, inbound, exchange, said or {})
        plan, body, request = read()
        self._watch.add(line)
        self._planner.choose(plan, line.stopper)
        turn = self._turn(plan, body, request, inbound, line, exchange)
        try:
            self._permit(plan, line.stopper)
            self._queue.run(share_of(inbound, plan.caller), line.stopper, partial(self._serve, turn, read))
        except ProxyError as error:
            if not line.settle():
                raise
            exchange.status, exchange.outcome, exchange.failure = 200, "upstream_error", failure_of(error)
            self._watch.remove(line)
            line.finish(turn.road.ending(exchange.failure))

    def _read(self, dialect: str, inbound: Inbound, exchange: Exchange, said: Json) -> Tuple[Plan, Json, Request]:
        """(a fresh plan, the client's body, the request it means): read and interpret; raises ClientError."""
        inbound.parsed = parse_body(inbound.body)
        body = {**want_object(inbound.parsed.value, "the request body"), **said}
        request = CODECS[dialect].decode_request(body)
        if dialect == GEMINI and not any(says_something(message) for message in request.messages):
            raise ClientError(GEMINI_EMPTY)
        plan = exchange.plan = Plan(dialect, asked_model=request.model, stream=request.stream, asked_at=exchange.started_ms // 1000,
                                    choices=body["n"] if type(body.get("n")) is int else 1)
        plan.long_context = LONG_CONTEXT_BETA in inbound.headers.get("anthropic-beta", "")
        settings = self._settings()
        plan.caller = identify(inbound.headers, body, request, self._machine_id, settings["initiatorPolicy"])
        plan.image_limits = ImageLimits(settings["images.maxBytes"], settings["images.maxDimension"], settings["images.maxCount"])
        return plan, body, request

    def _turn(self, plan: Plan, body: Json, request: Request, inbound: Inbound, line: ClientLine, exchange: Exchange) -> Turn:
        """The request as the plan's model gets it, and the road of its answer. Edits the body."""
        quirks, taught = quirks_for(plan), self._lessons.taught
        if plan.road == "translated":
            wire = self._translated(plan, request, quirks, inbound.parsed is not None and inbound.parsed.as_ascii)
            # It opens a stream, whose end says the true number: 1.5 ms of 200,000 tokens, a count takes 3.4.
            expected = partial(expected_input, self._prompts, request, plan, self._settings(), SAMPLE_CHARS)
            road: Road = TranslatedRoad(plan, request, inbound, line, exchange, self._watch, self._recollection,
                                        self._cutter(plan, request), expected)
        else:
            if plan.dialect == CHAT and needs_state(plan.model):
                road = RememberingRoad(plan, quirks, inbound, line, exchange, self._watch, self._recollection)
            else:
                road = PassThroughRoad(plan, quirks, inbound, line, exchange, self._watch)
            wire = self._shape(plan, body, inbound, quirks)
        if plan.stream:
            line.may_open_early(road.early_head, CODECS[plan.dialect].keep_alive)
            line.ending = road.ending
        return Turn(request, plan, wire, road, taught)

    def _serve(self, turn: Turn, read: Callable[[], Tuple[Plan, Json, Request]]) -> None:
        """Serves a turn, or one of its fallbacks in its place; raises UpstreamError while nothing has been relayed.

        A short limit has been waited out before: the client asked for this model, and its prompt cache is there. A quota
        and a long wait change models at once. When none serves, the first error counts: it is about what was asked for.
        """
        try:
            self._serve_once(turn)
        except UpstreamError as error:
            hopeless = turn.road.line.stopper.stopped or not may_fall_back(error.failure)
            if hopeless or not self._fall_back(turn, error.failure, read):
                raise

    def _fall_back(self, turn: Turn, failure: Failure, read: Callable[[], Tuple[Plan, Json, Request]]) -> bool:
        """Whether one of the `fallbacks` of the turn's model served; each is asked once, in order."""
        plan, fallbacks = turn.plan, self._settings()["fallbacks"]
        given_up = {plan.model: failure.kind}
        for name in fallbacks.get(plan.model) or fallbacks.get(plan.asked_model) or ():
            following = self._fallback_turn(turn, name, given_up, read)
            if following is None:
                continue
            try:
                self._serve_once(following)
                return True
            except UpstreamError as error:
                given_up[following.plan.model] = error.failure.kind
        turn.road.exchange.plan = plan
        plan.given_up = given_up if len(given_up) > 1 else {}
        return False

    def _fallback_turn(self, turn: Turn, name: str, given_up: Dict[str, str],
                       read: Callable[[], Tuple[Plan, Json, Request]]) -> Optional[Turn]:
        """The turn of a fallback, from the client's own body; None where it is not there, was tried, or cannot serve."""
        road = turn.road
        plan, body, request = read()
        try:
            if not self._planner.fall_back(plan, name):
                self._log.once(f"fallback {name}", f"fallbacks: no model is called {json.dumps(name)}; it is passed over")
            elif plan.model not in given_up:
                plan.given_up = dict(given_up)
                plan.model_reason = ",".join(filter(None, (turn.plan.model_reason, "fallback")))
                self._log.info(f"{turn.plan.model} cannot serve ({given_up[turn.plan.model]}); {plan.model} is asked in its place")
                return self._turn(plan, body, request, road.inbound, road.line, road.exchange)
        except ClientError as error:
            self._log.info(f"fallback {name} cannot serve this request: {error.message}")
        return None

    def _serve_once(self, turn: Turn) -> None:
        """Sends one turn and relays its answer; raises UpstreamError while nothing of upstream's has been relayed."""
        plan, road = turn.plan, turn.road
        exchange = road.exchange
        if turn.taught != self._lessons.taught and heed(turn.wire.body, self._lessons.of(plan.origin, plan.upstream_dialect), plan):
            turn.wire.raw = dump_json(turn.wire.body)  # learned while it stood in line
        self._repeated(partial(self._mended, plan, turn.wire, road, road.inbound, road.line, exchange), road.line, exchange)
        if exchange.outcome == "ok" and exchange.usage is not None and not exchange.usage.estimated:  # the client has its answer
            self._prompts.learn(turn.request, plan.model, exchange.usage.input)

    def _translated(self, plan: Plan, request: Request, quirks: Sequence[Quirk], as_ascii: bool) -> Outgoing:
        """What to send in upstream's dialect: state opened, fitted to the model, tools flattened, quirks applied."""
        request = self._recollection.owned(self._recollection.restored(request), plan.origin)
        request = opened_request(request, plan.origin, plan.upstream_dialect)
        if needs_state(plan.model):
            request = told_calls(request)
        asked = request.max_tokens
        request = fitted(request, plan.record, plan.upstream_dialect, self._settings()["fillMaxTokens"])
        plan.cut_at = asked if asked and request.max_tokens and request.max_tokens > asked else None
        if plan.upstream_dialect == RESPONSES:
            session = parse_user_id(request.user)[1] if request.user and request.tools else None
            request = phased(replace(request, cache_key=request.cache_key or session))
        elif plan.upstream_dialect == CHAT and plan.provider == "copilot":
            request = request_without_pdfs(request)
        lacking = lacking_powers(plan.record, plan.upstream_dialect)
        flat = flatten(replace(request, model=plan.model), plan.names, plan.upstream_dialect, lacking)
        body = CODECS[plan.upstream_dialect].encode_request(flat)
        edit_request(body, plan, quirks)
        self._allowed(plan, body)
        plan.caller.vision = plan.caller.vision and next(image_places(body), None) is not None  # a dialect may have no place for them
        return Outgoing(body, dump_json(body, as_ascii))

    def _allowed(self, plan: Plan, body: Json) -> bool:
        """Adds the betas of the body's fields; then what earlier refusals taught. True when the body was changed."""
        if plan.upstream_dialect == MESSAGES:
            plan.betas += [beta for beta in needed_betas(body) if beta not in plan.betas]
            if plan.long_context and plan.record is not None and knows_long_context(plan.record):
                plan.betas.append(LONG_CONTEXT_BETA)
                plan.dropped = [name for name in plan.dropped if name != LONG_CONTEXT_BETA]
        changed = heed(body, self._lessons.of(plan.origin, plan.upstream_dialect), plan)
        aside = ", ".join(name[len("tool:"):] for name in plan.dropped if name.startswith("tool:"))
        if aside:
            self._log.once(f"{plan.model} without {aside}", f"tools set aside for {plan.model}, which would refuse them: {aside}")
        return changed

    def _cutter(self, plan: Plan, request: Request) -> Optional[Callable[[], TextCutter]]:
        """What ends the text here because Responses cannot be told to; one for each try."""
        if plan.upstream_dialect != RESPONSES or not (request.stop or plan.cut_at):
            return None
        return partial(TextCutter, plan.cut_at, request.stop or (), partial(self._estimator.text, family=token_family(plan.model)),
                       partial(expected_input, self._prompts, request, plan, self._settings()))

    def _mended(self, plan: Plan, wire: Outgoing, road: Road, inbound: Inbound, line: ClientLine, exchange: Exchange) -> None:
        """Sends and relays; once more after every refusal that says what to mend. Raises UpstreamError like `_send_and_relay`."""
        learned: List[Tuple[str, Lesson]] = []  # (refusal, what was made of it)
        while True:
            try:
                return self._send_and_relay(plan, wire, road, inbound, line, exchange)
            except UpstreamError as error:
                if len(learned) == MENDS_EACH:
                    raise
                failure, told = error.failure, len(plan.dropped)
                lesson = mend(wire.body, failure, plan)
                before = [known for refusal, known in learned if refusal == failure.message]
                if lesson is None or before and before[-1][0] != lesson[0]:
                    for known in before:  # that was not it
                        self._lessons.forget(plan.origin, plan.upstream_dialect, known)
                    raise
            learned.append((failure.message, lesson))
            self._keep(lesson, plan, plan.dropped[told:])
            wire.raw = dump_json(wire.body)

    def _keep(self, lesson: Lesson, plan: Plan, gone: Sequence[str]) -> None:
        """Remembers a lesson for the account and model; the operator is told once."""
        if self._lessons.learn(plan.origin, plan.upstream_dialect, lesson):
            without = f": without {', '.join(gone)}" if gone else ""
            self._log.info(f"upstream refused a request for {plan.model}; mended and repeated: {lesson[0]}{without}")

    def _send_and_relay(self, plan: Plan, wire: Outgoing, road: Road, inbound: Inbound, line: ClientLine,
                        exchange: Exchange) -> None:
        """Sends and relays once; raises UpstreamError while nothing of upstream's has been relayed."""
        answer = self._sender.send(plan, wire.raw, inbound, line.stopper, exchange)
        try:
            streamed = "text/event-stream" in answer.headers.get("content-type", "text/event-stream")
            if plan.stream:
                (road.stream if streamed else road.not_a_stream)(answer)
            else:
                (road.assembled if plan.assembled and streamed else road.whole)(answer)
        except UpstreamError as error:
            if error.failure.told is None:
                raise
            raise UpstreamError(dated(error.failure, answer.headers, time.time())) from error
        finally:
            answer.close()

    def _repeated(self, once: Callable[[], None], line: ClientLine, exchange: Exchange) -> None:
        """Runs one relay, again where upstream broke off before anything reached the client, or opened its stream with an
        error on which Sender would repeat. Given up: 504 names the tries, or the error of the last."""
        repeats = 0
        while True:
            try:
                return once()
            except UpstreamError as error:
                failure = error.failure
                if failure.code != INTERRUPTED and failure.told is None:
                    raise
                if not self._sender.wait_to_repeat(failure, repeats, line.stopper):
                    if failure.told is not None:
                        raise
                    raise UpstreamError(unreachable(failure.message, exchange.attempts)) from error
                repeats += 1

    def _permit(self, plan: Plan, stopper: Stopper) -> None:
        """Rate limit, then the operator's yes."""
        settings = self._settings()
        self._gate.pass_through(settings, stopper)
        if settings["manualApprove"] and self._approve is not None:
            with self._approve_lock:
                stopper.check()
                allowed = self._approve(f"{json.dumps(plan.caller.client or 'a client')} asks {json.dumps(plan.model)} ({plan.dialect})")
            if not allowed:
                raise ClientError("Request rejected by the operator", status=403, code="request_rejected")

    def _shape(self, plan: Plan, body: Json, inbound: Inbound, quirks: Sequence[Quirk]) -> Outgoing:
        """What to send: the client's own bytes where no row of EDITS applied."""
        if plan.upstream_dialect == MESSAGES:
            plan.betas, plan.dropped = sift_betas(inbound.headers.get("anthropic-beta", ""))
        edit_request(body, plan, quirks)
        if open_carriers(body, plan.dialect, plan.origin):
            plan.edits.append("carriers")
        if plan.dialect == CHAT and needs_state(plan.model) and any([self._give_back(body, plan.origin), tell_bare_calls(body, plan)]):
            plan.edits.append("state")
        if body.get("model") != plan.model:
            body["model"] = plan.model
            plan.edits.append("model")
        if self._allowed(plan, body):
            plan.edits.append("lessons")
        return Outgoing(body, edited_bytes(inbound, body, plan) if plan.edits else inbound.body)

    def _give_back(self, body: Json, origin: str) -> bool:
        """Puts remembered state beside the calls of a Chat body that came without; True when there was any."""
        given = False
        for turn in body["messages"]:
            calls = turn.get("tool_calls")
            if turn.get("reasoning_opaque") or not isinstance(calls, list) or not calls:
                continue
            for kept in self._recollection.recall(str(calls[0].get("id"))):
                thinking = opened_thinking(kept, origin, CHAT)
                if isinstance(thinking, Thinking):
                    turn.update({"reasoning_opaque": thinking.signature, **({"reasoning_text": thinking.text} if thinking.text else {})})
                    given = True
        return given


class Embeddings:
    """POST /v1/embeddings: bare strings wrapped, long lists split, base64 made here."""

    def __init__(self, planner: Planner, sender: Sender, watch: Watch) -> None:
        self._planner = planner
        self._sender = sender
        self._watch = watch

    def embed(self, inbound: Inbound, line: ClientLine, exchange: Exchange) -> None:
        """Serves one request; raises ProxyError, ClientGone."""
        body = want_object(parse_json(inbound.body), "the request body")
        whole, headers = self._vectors(body, embedding_inputs(body), EMBEDDINGS, inbound, line, exchange)
        send_whole(self._watch, line, exchange, dump_json(whole), headers)

    def _vectors(self, body: Json, texts: List[str], dialect: str, inbound: Inbound, line: ClientLine,
                 exchange: Exchange) -> Tuple[Json, List[Tuple[str, str]]]:
        """(OpenAI's answer document, headers): the batches sent one after the other and joined."""
        plan = exchange.plan = Plan(dialect, operation=EMBEDDINGS, asked_model=want_model(body))
        plan.caller.client = client_of(exchange.user_agent)
        self._watch.add(line)
        self._planner.choose(plan, line.stopper)
        size = model_limit(plan.record or {}, "max_inputs") or EMBEDDING_BATCH
        wire = {name: value for name, value in body.items() if name != "encoding_format"}
        answers: List[Json] = []
        upstream: Dict[str, str] = {}
        for at in range(0, len(texts), size):
            wire.update(model=plan.model, input=texts[at:at + size])
            value, upstream = self._batch(plan, wire, inbound, line, exchange)
            answers.append(value)
        whole = join_embeddings(answers, plan.model, body.get("encoding_format") == "base64")
        exchange.usage = Usage(input=count_or_zero(whole, "usage", "prompt_tokens"))
        exchange.served_model = text_or_none(whole["model"]) or plan.model
        return whole, [*model_headers(plan, inbound, upstream), *usage_headers(exchange.usage)]

    def embed_gemini(self, model: str, verb: str, inbound: Inbound, line: ClientLine, exchange: Exchange) -> None:
        """embedContent and batchEmbedContents: the same vectors in Gemini's shape; raises like `embed`."""
        texts, dimensions = gemini_embedding_request(want_object(parse_json(inbound.body), "the request body"), verb)
        asked = {"model": model, "input": texts, **({"dimensions": dimensions} if dimensions else {})}
        whole, headers = self._vectors(asked, texts, GEMINI, inbound, line, exchange)
        body = gemini_embedding_answer([row["embedding"] for row in whole["data"]], verb)
        send_whole(self._watch, line, exchange, dump_json(body), headers)

    def _batch(self, plan: Plan, wire: Json, inbound: Inbound, line: ClientLine, exchange: Exchange) -> Tuple[Json, Dict[str, str]]:
        answer = self._sender.send(plan, dump_json(wire), inbound, line.stopper, exchange)
        try:
            value = json_object(read_whole(answer))
        finally:
            answer.close()
        if value is None or not isinstance(value.get("data"), list):
            raise UpstreamError(Failure("transport", "provider", 502, "upstream's answer holds no embeddings"))
        return value, answer.headers


def let_others_run(body: bytes) -> None:
    """A pause between two steps of a large body. A thread that waits for the interpreter gets it after 5 ms, and needs it
    twice for every event: 32 streams beside counts of 200,000 tokens waited up to 12 ms."""
    if len(body) >= LARGE_BODY:
        time.sleep(0.0002)


class TokenCounter:
    """POST /v1/messages/count_tokens: Anthropic's count with a key, else upstream's own, else our estimate."""

    def __init__(self, settings: Callable[[], Settings], planner: Planner, sender: Sender, upstream: Upstream,
                 accounts: Accounts, watch: Watch, log: Log, prompts: PromptCounter) -> None:
        self._settings = settings
        self._planner = planner
        self._sender = sender
        self._prompts = prompts
        self._upstream = upstream
        self._accounts = accounts
        self._watch = watch
        self._log = log
        self._paused_until = 0.0  # monotonic: upstream's own counting after a 429
        self._exact = True  # until Anthropic refuses the key

    def count(self, inbound: Inbound, line: ClientLine, exchange: Exchange) -> None:
        """Serves one request: {"input_tokens": n}, with `estimated` where it is; never an error for a readable body."""
        inbound.parsed = parse_body(inbound.body)
        body = want_object(inbound.parsed.value, "the request body")
        let_others_run(inbound.body)
        # no model and no messages are readable all the same: clients ask what a bare tool costs
        request = CODECS[MESSAGES].decode_request({**body, "model": body.get("model") or self._settings()["smallModel"],
                                                   "messages": body.get("messages") or [{"role": "user", "content": ""}]})
        plan, known = self._planned(MESSAGES, request.model, line, exchange)
        count = self._at_anthropic(plan, body, line.stopper)
        if count is None and known:
            count = self._at_copilot(plan, body, inbound, line.stopper, exchange)
        value: Json = {"input_tokens": count}
        if count is None:
            let_others_run(inbound.body)
            value = {"input_tokens": self._estimate(request, plan), "estimated": True}
        send_whole(self._watch, line, exchange, dump_json(value), model_headers(plan, inbound, {}))

    def count_gemini(self, model: str, inbound: Inbound, line: ClientLine, exchange: Exchange) -> None:
        """countTokens: {"totalTokens": n}, our estimate."""
        body = gemini_countable(want_object(parse_json(inbound.body), "the request body"))
        request = CODECS[GEMINI].decode_request({**body, "model": model})
        plan, _ = self._planned(GEMINI, model, line, exchange)
        total = self._estimate(request, plan)
        send_whole(self._watch, line, exchange, dump_json({"totalTokens": total}), model_headers(plan, inbound, {}))

    def _estimate(self, request: Request, plan: Plan) -> int:
        return expected_input(self._prompts, request, plan, self._settings())

    def _planned(self, dialect: str, model: str, line: ClientLine, exchange: Exchange) -> Tuple[Plan, bool]:
        """(plan, whether upstream counts for the model)."""
        plan = exchange.plan = Plan(dialect, operation="count_tokens", asked_model=model)
        plan.caller.client = client_of(exchange.user_agent)
        self._watch.add(line)
        return plan, self._planner.choose_leniently(plan)

    def _at_anthropic(self, plan: Plan, body: Json, stopper: Stopper) -> Optional[int]:
        """The exact count for a Claude model, None without a key or on any failure (gateway-features 10.1)."""
        settings = self._settings()
        key = settings["anthropicApiKey"]
        if not key or not plan.model.startswith("claude") or not self._exact:
            return None
        address = settings["endpoints.anthropic"].rstrip("/")
        self._log.once("anthropic-count", f"exact token counts: prompts of count_tokens are sent to {address}")
        headers = [("x-api-key", key.reveal()), ("anthropic-version", "2023-06-01"), ("Content-Type", "application/json"),
                   ("anthropic-beta", "token-counting-2024-11-01")]
        wire = dump_json({**countable(body), "model": plan.model.replace(".", "-")})
        try:
            status, _, answer = self._upstream.fetch("POST", address + "/v1/messages/count_tokens", headers, wire, stopper, COUNT_TIMEOUT_S)
        except (TransportError, SetupError) as exc:
            self._log.warning(f"counting at Anthropic failed: {exc}; counted otherwise")
            return None
        if status in (401, 403):
            self._exact = False
            self._log.warning(f"Anthropic refused the key ({status}); exact counting is off until the restart")
        return count_or_zero(json_object(answer), "input_tokens") or None if status == 200 else None

    def _at_copilot(self, plan: Plan, body: Json, inbound: Inbound, stopper: Stopper, exchange: Exchange) -> Optional[int]:
        """Upstream's own count, asked once; a 429 pauses it for a minute. None on any failure."""
        if time.monotonic() < self._paused_until or self._accounts.active is None:
            return None
        wire = {**countable(body), "model": plan.model}
        plan.betas, plan.dropped = sift_betas(inbound.headers.get("anthropic-beta", ""))
        edit_request(wire, plan, quirks_for(plan))
        if open_carriers(wire, MESSAGES, plan.origin):
            plan.edits.append("carriers")
        sent = edited_bytes(inbound, wire, plan)
        try:
            answer, failure = self._sender.attempt(plan, self._accounts.bearer(stopper), sent, stopper, inbound, exchange)
            if answer is None:
                if failure.status == 429:
                    self._paused_until = time.monotonic() + COUNT_PAUSE_S
                return None
            try:
                return count_or_zero(json_object(answer.read_all()), "input_tokens") or None
            finally:
                answer.close()
        except (ProxyError, TransportError):
            return None


# ---- answers ----------------------------------------------------------------


def model_headers(plan: Plan, inbound: Inbound, upstream: Dict[str, str]) -> List[Tuple[str, str]]:
    """Headers of every answer of a model: who served, why, what was dropped, what upstream says of limits."""
    headers = inbound.base_headers + relayed_headers(upstream)
    request_id = upstream.get("x-request-id") or upstream.get("request-id") or inbound.trace_id
    headers += [("x-request-id", request_id), ("request-id", request_id), ("x-copilot-api-model", plan.model)]
    if plan.model_reason:
        headers.append(("x-copilot-api-reason", plan.model_reason))
    if plan.given_up:
        tried = [f"{model};{kind}" for model, kind in plan.given_up.items()]
        headers.append(("x-copilot-api-fallback", ",".join([*tried, plan.model])))
    if plan.dropped:
        headers.append(("x-copilot-api-dropped", ",".join(plan.dropped)))
    return headers


def stream_headers(plan: Plan, inbound: Inbound, upstream: Dict[str, str], line: ClientLine) -> List[Tuple[str, str]]:
    """Headers of a streamed answer; an HTTP/1.0 client gets it unchunked, up to the close."""
    framing = [("Transfer-Encoding", "chunked")] if line.chunked else []
    return [("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache"), *framing,
            *model_headers(plan, inbound, upstream)]


def send_whole(watch: Watch, line: ClientLine, exchange: Exchange, body: bytes, headers: Sequence[Tuple[str, str]]) -> None:
    """Sends a complete JSON answer of status 200, after the watch has let go."""
    watch.remove(line)
    exchange.status, exchange.outcome = 200, "ok"
    exchange.first_byte_ms = elapsed_ms(exchange)
    line.whole(answer_head(200, [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers]), body)


def elapsed_ms(exchange: Exchange) -> int:
    """Milliseconds since the request's head was read."""
    return max(0, int(time.time() * 1000) - exchange.started_ms)


def read_whole(answer: Answer) -> bytes:
    """The whole body of an upstream answer; raises UpstreamError when it breaks off."""
    try:
        return answer.read_all()
    except TransportError as exc:
        raise UpstreamError(Failure("transport", "provider", 502, str(exc), INTERRUPTED, transient=not exc.timed_out)) from exc


def failure_of(error: ProxyError) -> Failure:
    """The failure behind an error; a refusal of ours concerns this request only."""
    if isinstance(error, UpstreamError):
        return error.failure
    return Failure("request", "request", error.status, error.message, error.code)


def account_usage(provider: Provider) -> Json:
    """Upstream's quota document with `plan`, `quotas`, `raw` and `login` beside it; raises UpstreamError 502."""
    try:
        document = provider.fetch_account()
    except UpstreamError as error:
        raise UpstreamError(Failure("transport", "provider", 502, f"Failed to fetch Copilot usage: {error.message}",
                                    "usage_unavailable")) from error
    quotas = {name: quota_entry(name, snapshot) for name, snapshot in quota_snapshots(document).items()}
    active = provider.accounts.active
    login = document.get("login") or (active.login if active else "")
    return {**document, "plan": document.get("copilot_plan"), "quotas": quotas, "login": login,
            "quota_reset_date": document.get("quota_reset_date") or document.get("limited_user_reset_date"),
            "as_of": utc_text(int(time.time() * 1000)), "raw": document,
            "accounts": [{"login": login, "active": True, "plan": document.get("copilot_plan"), "quotas": quotas}]}


def countable(body: Json) -> Json:
    """A Messages body without the fields the counting endpoint does not know."""
    return {name: value for name, value in body.items() if name not in ("max_tokens", "stream", "temperature", "top_p", "top_k",
                                                                        "metadata", "stop_sequences", "service_tier")}


def usage_headers(usage: Optional[Usage]) -> List[Tuple[str, str]]:
    """`x-copilot-api-usage`, and `-cost` in USD where upstream said what it billed (1 credit = 0.01 USD)."""
    if usage is None:
        return []
    headers = [("x-copilot-api-usage", f'{{"input":{usage.input},"output":{usage.output},"cache_read":{usage.cache_read},'
                                       f'"cache_write":{usage.cache_write},"reasoning":{usage.reasoning}}}')]
    if usage.billed_nano:
        headers.append(("x-copilot-api-cost", f"{usage.billed_nano / 1e11:.8f}".rstrip("0").rstrip(".")))
    return headers


def embedding_inputs(body: Json) -> List[str]:
    """The input as the list of strings upstream wants; raises ClientError for token ids."""
    given = body.get("input")
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise wrong_type("input", "a string or a list of strings", given)
    if not given:
        raise ClientError("input: at least one string is required", param="input")
    if all(isinstance(item, str) for item in given):
        return given
    raise ClientError("input: expected a string or a list of strings; token ids are not accepted by Copilot, send the text "
                      "(langchain: check_embedding_ctx_length=False)", param="input")


def join_embeddings(answers: Sequence[Json], model: str, as_base64: bool) -> Json:
    """One answer out of the batches': indexes counted on, usage summed, what upstream left out filled in."""
    data: List[Json] = []
    for answer in answers:
        offset = len(data)
        rows = [row for row in answer["data"] if isinstance(row, dict)]
        rows.sort(key=lambda row: row.get("index") if isinstance(row.get("index"), int) else 0)
        data.extend({**row, "object": "embedding", "index": offset + at,
                     "embedding": pack_floats(row.get("embedding")) if as_base64 else row.get("embedding")}
                    for at, row in enumerate(rows))
    prompt = sum(count_or_zero(answer, "usage", "prompt_tokens") for answer in answers)
    total = sum(count_or_zero(answer, "usage", "total_tokens") for answer in answers) or prompt
    return {**answers[0], "object": "list", "data": data, "model": answers[0].get("model") or model,
            "usage": {"prompt_tokens": prompt, "total_tokens": total}}


def pack_floats(vector: Any) -> Any:
    """Little-endian float32 as base64, the form OpenAI's SDK asks for."""
    if not isinstance(vector, list):
        return vector
    try:
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    except (struct.error, OverflowError) as exc:
        raise UpstreamError(Failure("transport", "provider", 502, "upstream's answer holds no embeddings")) from exc


QUOTA_NAMES = {"premium_interactions": "Premium Interactions", "chat": "Chat", "completions": "Completions"}


def quota_snapshots(document: Json) -> Dict[str, Json]:
    """`quota_snapshots`, or the free plan's counters in the same shape (copilot-upstream 2.2)."""
    snapshots = document.get("quota_snapshots")
    if isinstance(snapshots, dict) and snapshots:
        return {name: value for name, value in snapshots.items() if isinstance(value, dict)}
    left, allowed = document.get("limited_user_quotas"), document.get("monthly_quotas")
    if not isinstance(left, dict) or not isinstance(allowed, dict):
        return {}
    return {name: {"entitlement": allowed[name], "remaining": left.get(name, 0), "unlimited": False,
                   "percent_remaining": 100.0 * left.get(name, 0) / allowed[name] if allowed[name] else 0.0}
            for name in allowed if isinstance(allowed[name], (int, float))}


def quota_entry(name: str, snapshot: Json) -> Json:
    """A quota with the fields of systems B and D (console reference D.6)."""
    def number(key: str) -> float:
        value = snapshot.get(key)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0
    entitlement, remaining, percent = number("entitlement"), number("remaining"), number("percent_remaining")
    unlimited = snapshot.get("unlimited") is True
    return {**snapshot, "name": QUOTA_NAMES.get(name, name), "available": unlimited or snapshot.get("has_quota", entitlement > 0) is True,
            "used": max(0, entitlement - remaining), "percent_used": round(100 - percent, 2),
            "percent_remaining": round(percent, 2), "unlimited": unlimited}


###############################################################################
#                                   Server                                    #
###############################################################################
# Routes, keys, origin checks, and the handler that owns the client's socket.

# Unread body bytes we take in after a refusal, so that the client reads our answer instead of a reset.
LINGER_BYTES, LINGER_S = 1 << 28, 2.0
POLITE_CONNECTIONS = 64  # connections above the limit that are still told so in their dialect
FORWARDING_HEADERS = ("forwarded", "x-forwarded-", "x-real-ip", "cf-connecting-ip")  # beginnings
ALLOWED_METHODS = "GET,HEAD,PUT,POST,DELETE,PATCH,OPTIONS"


@dataclass(eq=False, repr=False)
class App(Value):
    """The parts of a running gateway; `settings` is a function because settings are live."""

    settings: Callable[[], Settings]
    reload: Callable[[], None]
    paths: Paths
    log: Log
    upstream: Upstream
    watch: Watch
    accounts: Accounts
    provider: Copilot
    models: Models
    gateway: Gateway
    embeddings: Embeddings
    counter: TokenCounter
    ledger: Ledger
    handler_logs: Optional[HandlerLogs] = None
    request_log: Optional[RequestLog] = None
    device_page: Optional[Callable[[Json], str]] = None
    started_at: float = field(default_factory=time.time)
    served: int = 0
    running: Dict[int, str] = field(default_factory=dict)  # calls not yet recorded; single dict operations
    stopping: bool = False  # running calls finish, and their connections end with them


@dataclass(eq=False, repr=False)
class PlainAnswer(Value):
    """A complete answer of a plain route."""

    body: Any
    status: int = 200
    headers: List[Tuple[str, str]] = field(default_factory=list)

    def encoded(self) -> Tuple[bytes, str]:
        """(bytes, content type): text as it is, anything else as JSON."""
        if isinstance(self.body, str):
            kind = "text/html" if self.body.lstrip()[:1] == "<" else "text/plain"
            return self.body.encode(), f"{kind}; charset=utf-8"
        return dump_json(self.body), "application/json"


# ---- reading ----------------------------------------------------------------


FIRST_PLACES = 8 << 20  # bytes made ready for a body when its length is known


class ClientReader:
    """Reads requests from one client socket; what follows a body stays for the next request."""

    def __init__(self, sock: socket.socket) -> None:
        self._conn = Conn(sock, ("", "client", ""))
        self._rest = b""
        self.idle = True  # nothing of a request is here
        self.unread = True  # it is not here whole

    def head(self, settings: Settings) -> Optional[bytes]:
        """The next head without its empty line; None when the client closed or stayed idle; raises ClientError."""
        data = self._rest.lstrip(b"\r\n")
        self.idle, self.unread = not data, True
        limit = settings["limits.headerBytes"]
        deadline = time.monotonic() + settings["limits.headerSeconds"] if data else None
        while True:
            end = data.find(b"\r\n\r\n")
            if 0 <= end <= limit:
                self._rest = data[end + 4:]
                return data[:end]
            if len(data) > limit:
                raise ClientError(f"the request head is larger than {limit} bytes", status=431)
            more = self._more(self._conn.read_next, settings["limits.idleSeconds"]) if deadline is None \
                else self._more(self._conn.read, max(0.0, deadline - time.monotonic()))
            self.idle = False
            if not more:
                return None
            deadline = deadline or time.monotonic() + settings["limits.headerSeconds"]
            data = (data + more).lstrip(b"\r\n") if not data.strip() else data + more

    @staticmethod
    def _more(read: Callable[[float], bytes], wait_s: float) -> bytes:
        """Bytes that arrive in time, b"" otherwise."""
        try:
            return read(wait_s)
        except TransportError:
            return b""

    def body(self, headers: Dict[str, str], settings: Settings) -> bytes:
        """The body as the client sent it, whole; raises ClientError, ClientGone."""
        limit, gap_s = settings["limits.bodyBytes"], settings["limits.bodySeconds"]
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return self._chunked(limit, gap_s)
        length = content_length(headers) or 0
        if length > limit:
            raise too_large(limit)
        if length > JOIN_BYTES:
            return self._large(length, gap_s)
        body = bytearray(self._rest[:length])
        self._rest = self._rest[length:]
        while len(body) < length:
            body += self._body_piece(gap_s)
        if len(body) > length:  # the next request came with the last piece
            self._rest = bytes(body[length:])
            del body[length:]
        return bytes(body)

    def _large(self, length: int, gap_s: float) -> bytes:
        """A body of so many bytes, received in its place: each further copy of 5 MB costs 1 to 3 ms. For what is only announced
        no memory is taken beyond the first places."""
        body = bytearray(min(length, FIRST_PLACES))
        have = min(length, len(self._rest))
        body[:have], self._rest = self._rest[:have], self._rest[have:]
        while have < length:
            if have == len(body):
                body += bytes(min(have, length - have))
            with memoryview(body) as places:
                have += self._fill(places[have:], gap_s)
        return body

    def _fill(self, places: memoryview, gap_s: float) -> int:
        """How many bytes were received into these places; never beyond them. Raises like `_body_piece`."""
        if not self._conn.readable(gap_s):
            raise body_stopped(gap_s)
        try:
            count = self._conn.sock.recv_into(places)
        except OSError as exc:
            raise ClientGone from exc
        if not count:
            raise ClientGone
        return count

    def _chunked(self, limit: int, gap_s: float) -> bytes:
        decoder, pieces, size = ChunkDecoder(), [], 0
        data, self._rest = self._rest, b""
        while not decoder.done:
            try:
                piece = decoder.feed(data or self._body_piece(gap_s))
            except BadHead as exc:
                raise ClientError(f"the request body is malformed: {exc}") from exc
            data = b""
            size += len(piece)
            if size > limit:
                raise too_large(limit)
            pieces.append(piece)
        self._rest = decoder.rest
        return b"".join(pieces)

    def _body_piece(self, gap_s: float) -> bytes:
        try:
            data = self._conn.read(gap_s)
        except TransportError as exc:
            if exc.timed_out:
                raise body_stopped(gap_s) from exc
            raise ClientGone from exc
        if not data:
            raise ClientGone
        return data

    def linger(self) -> None:
        """Takes in some of what the client still sends after a refusal."""
        deadline, taken = time.monotonic() + LINGER_S, 0
        while taken < LINGER_BYTES:
            data = self._more(self._conn.read, max(0.0, deadline - time.monotonic()))
            if not data:
                return
            taken += len(data)


def body_stopped(gap_s: float) -> ClientError:
    """408 for a client that stopped in the middle of its body."""
    return ClientError(f"the request body stopped arriving for {gap_s:g} s", status=408)


def too_large(limit: int) -> ClientError:
    """The 413 of a body above `limits.bodyBytes`."""
    return ClientError(f"the request body is larger than {limit} bytes (limits.bodyBytes)", status=413, code="request_too_large")


def decode_content(body: bytes, coding: str, limit: int) -> bytes:
    """The body without its content coding: gzip, deflate, and zstd where this Python has it; raises ClientError."""
    for name in reversed([part.strip().lower() for part in coding.split(",") if part.strip()]):
        if name == "identity":
            continue
        if name in ("gzip", "x-gzip", "deflate"):
            body = inflate(body, limit)
        elif name == "zstd":
            body = decode_zstd(body, limit)
        else:
            raise unsupported_coding(name)
    return body


def inflate(body: bytes, limit: int) -> bytes:
    """A gzip or zlib body, unpacked up to the limit and no further (a small body may unpack to gigabytes)."""
    decoder = zlib.decompressobj(47)
    try:
        plain = decoder.decompress(body, limit + 1)
    except zlib.error as exc:
        raise ClientError("the compressed request body is damaged", code="invalid_request_body") from exc
    if len(plain) > limit:
        raise too_large(limit)
    if not decoder.eof:
        raise ClientError("the compressed request body is incomplete", code="invalid_request_body")
    return plain


def decode_zstd(body: bytes, limit: int) -> bytes:
    """A zstd body; Python has the decoder since 3.14."""
    try:
        zstd = importlib.import_module("compression.zstd")
    except ImportError:
        raise unsupported_coding("zstd") from None
    try:
        plain = zstd.ZstdDecompressor().decompress(body, limit + 1)
    except zstd.ZstdError as exc:
        raise ClientError("the compressed request body is damaged", code="invalid_request_body") from exc
    if len(plain) > limit:
        raise too_large(limit)
    return plain


def unsupported_coding(name: str) -> ClientError:
    """The 415 that names the client setting to change (clients.md, Codex)."""
    return ClientError(f"Content-Encoding {name} cannot be decoded here; send gzip, deflate or plain JSON "
                       "(Codex: set features.enable_request_compression = false)", status=415,
                       headers={"Accept-Encoding": "gzip, deflate"})


# ---- admission --------------------------------------------------------------


def given_keys(headers: Dict[str, str], query: Dict[str, str]) -> List[str]:
    """Every key a request carries, wherever clients put it."""
    scheme, _, rest = headers.get("authorization", "").strip().partition(" ")
    found = [headers.get("x-api-key", ""), rest if scheme.lower() == "bearer" else "", headers.get("x-goog-api-key", ""),
             query.get("key", ""), query.get("api_key", "")]
    return [key.strip() for key in found if key.strip()]


def has_key(given: Sequence[str], keys: Sequence[Secret]) -> bool:
    """Whether one of the given keys is one of ours; every comparison is made, in constant time each."""
    return bool(keys) and any([key.matches(one) for one in given for key in keys])


def key_name(given: Sequence[str], keys: Sequence[Secret]) -> str:
    """A name for the key that let a request in: equal for equal keys, and it does not tell the key. "" for none."""
    return next((hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:12] for key in given if has_key([key], keys)), "")


def header_keys(headers: Dict[str, str]) -> List[str]:
    """The keys of `x-api-key` and `Authorization: Bearer`: where an admin key may stand."""
    return given_keys({name: headers[name] for name in ("x-api-key", "authorization") if name in headers}, {})


def is_loopback_caller(peer: str, headers: Dict[str, str]) -> bool:
    """Whether the request comes from this machine and was not passed on by a proxy."""
    return is_loopback(peer) and not any(name.startswith(FORWARDING_HEADERS) for name in headers)


HOST_VALUE = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^@/?#:\[\]\s]+))(?::\d*)?\Z")


@lru_cache(maxsize=256)
def host_name(value: str) -> str:
    """The name in a Host header, without port and brackets, lower-cased; "" for anything that is no host."""
    found = HOST_VALUE.match(value)
    return (found.group(1) or found.group(2)).lower() if found else ""


def is_own_host(value: str, settings: Settings) -> bool:
    """Whether a Host header names us; a foreign one means DNS rebinding."""
    name = host_name(value)
    if is_loopback(name) or name in map(str.lower, settings["allowedHosts"]):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return not is_loopback(settings["host"])


def is_foreign(headers: Dict[str, str], settings: Settings, secret: bool) -> bool:
    """Whether a page of another site sent this request (Origin, Sec-Fetch-Site). `*` opens no secrets."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is not None:
        return not is_allowed_origin(origin, settings, not secret)
    return site not in ("none", "same-origin")


def is_allowed_origin(origin: str, settings: Settings, wildcard: bool = True) -> bool:
    """Loopback origins, our own names, and those of `cors.origins`; `null` never."""
    allowed = settings["cors.origins"]
    if origin != "null" and (origin in allowed or wildcard and "*" in allowed):
        return True
    name = host_name(origin.partition("://")[2].partition("/")[0])
    return bool(name) and (is_loopback(name) or name in map(str.lower, settings["allowedHosts"]))


def cors_headers(headers: Dict[str, str], settings: Settings) -> List[Tuple[str, str]]:
    """What lets a page read the answer; nothing for pages that may not."""
    origin = headers.get("origin")
    if origin is None or not is_allowed_origin(origin, settings):
        return []
    return [("Access-Control-Allow-Origin", "*" if "*" in settings["cors.origins"] else origin), ("Vary", "Origin"),
            ("Access-Control-Expose-Headers", "*")]


def normal_path(path: str) -> str:
    """The path with `//`, doubled version prefixes and a trailing slash removed."""
    if "//" in path or path.startswith(("/v1/v1", "/v1beta/v1")):
        path = re.sub(r"/{2,}", "/", path)
        path = re.sub(r"^(/v1(?:beta)?)(/v1(?:beta)?)+(?=/|$)", r"\1", path)
    return path.rstrip("/") or "/"


# ---- plain routes -----------------------------------------------------------


def root_page(app: App, inbound: Inbound, name: str) -> PlainAnswer:
    """`Server running`, or the sign-in page for a browser while nobody has signed in."""
    wants_page = "text/html" in inbound.headers.get("accept", "")
    signed_out = app.accounts.settled.is_set() and app.accounts.active is None
    if app.settings()["root"] == "auth" or app.settings()["root"] == "auto" and wants_page and signed_out:
        return PlainAnswer("", 302, [("Location", "/auth/device")])
    return PlainAnswer("Server running")


def health(app: App, inbound: Inbound, name: str) -> PlainAnswer:
    """Readiness without a question upstream; `?strict=true` makes it a status (console reference B.8)."""
    account = app.accounts.active
    token = account.copilot if account else None
    ready = account is not None and app.models.loaded > 0
    left = int(token.received_at + token.refresh_in + 60 - time.time()) if token and not token.direct else None
    status = 503 if inbound.query.get("strict") == "true" and not ready else 200
    return PlainAnswer({
        "status": "ok" if ready else "degraded", "ready": ready, "version": VERSION,
        "uptime_seconds": int(time.time() - app.started_at),
        "copilot_token": {"present": token is not None, "expires_in_seconds": left},
        "models_loaded": app.models.loaded, "requests_served": app.served,
        "auth_required": bool(app.settings()["auth.apiKeys"]), "debug": app.log.verbose,
        "quota": seen_quotas(app.provider.seen_headers)}, status)


def known_catalogue(app: App) -> Catalogue:
    """The catalogue, waited for if it is being fetched; raises 401 or 503, never an invented list."""
    catalogue = app.models.current(app.settings()["streams.statusHoldSeconds"])
    if catalogue is not None:
        return catalogue
    if app.accounts.settled.is_set() and app.accounts.active is None:
        raise app.accounts.sign_in_needed()
    raise SetupError("the model list could not be fetched yet; try again in a moment", status=503, code="models_unavailable")


def list_models(app: App, inbound: Inbound, name: str) -> PlainAnswer:
    """GET /v1/models: one body for OpenAI and Anthropic clients, others for Google's and for Codex."""
    catalogue = known_catalogue(app)
    offered = catalogue.offered()
    if dialect_of_stranger(inbound.path, inbound.headers) == GEMINI:
        return PlainAnswer({"models": [gemini_model(record) for record in offered]})
    if "client_version" in inbound.query:
        return PlainAnswer({"models": [codex_model(record) for record in catalogue.records.values()
                                       if RESPONSES in endpoint_dialects(record) and usable_prompt_cap(record)]})
    entries = [model_entry(record) for record in offered]
    return PlainAnswer({"object": "list", "data": entries, "has_more": False,
                  "first_id": entries[0]["id"] if entries else None, "last_id": entries[-1]["id"] if entries else None})


def full_models(app: App, inbound: Inbound, name: str) -> PlainAnswer:
    """GET /v1/models/full/: upstream's own document."""
    return PlainAnswer(known_catalogue(app).document)


def one_model(app: App, inbound: Inbound, name: str) -> PlainAnswer:
    """GET /v1/models/{id}, aliases and mappings resolved."""
    catalogue = known_catalogue(app)
    target = map_name(name, *parse_mappings(app.settings()["modelMappings"])) or name
    found = catalogue.find(target)
    if found is None:
        raise ClientError(f"The model '{name}' does not exist.", status=404, code="model_not_found")
    record = catalogue.records[found[0]]
    is_gemini = dialect_of_stranger(inbound.path, inbound.headers) == GEMINI
    return PlainAnswer(gemini_model(record) if is_gemini else model_entry(record, whole=True))


def show_usage(app: App, inbound: Inbound, name: str) -> PlainAnswer:
    """GET /usage."""
    return PlainAnswer(account_usage(app.provider))


def show_token(app: App, inbound: Inbound, name: str) -> PlainAnswer:
    """GET /token: the Copilot token itself."""
    return PlainAnswer({"token": app.accounts.bearer().bearer.reveal()})


def device_code(app: App, inbound: Inbound, name: str) -> PlainAnswer:
    """The sign-in code, as a page or as JSON; POST asks for a new one."""
    if "text/html" in inbound.headers.get("accept", "") and app.device_page is not None:
        return PlainAnswer(app.device_page({}))  # a constant that asks for the JSON by itself
    wait_for(app.accounts.settled, app.settings()["streams.statusHoldSeconds"], None)
    if app.accounts.active is None or inbound.method == "POST":
        app.accounts.device.begin(anew=inbound.method == "POST")
    shown = app.accounts.device.wait_code(10.0)
    if app.accounts.active is not None and shown["state"] in ("idle", "done"):
        shown = {"state": "signed_in", "login": app.accounts.active.login}
    return PlainAnswer(shown, 502 if shown["state"] == "failed" and not shown.get("user_code") else 200)


def reload_config(app: App, inbound: Inbound, name: str) -> PlainAnswer:
    """POST /admin/config/reload: a broken file keeps the settings of before."""
    try:
        app.reload()
    except SetupError as error:
        raise ClientError(error.message, status=400, code="invalid_config") from error
    return PlainAnswer({"configPath": app.paths.config, "reloaded": True})


def refuse_socket(app: App, inbound: Inbound, name: str) -> PlainAnswer:
    """GET /v1/responses: Codex falls back to HTTP at once on 426, and only on that (clients.md)."""
    if inbound.headers.get("upgrade", "").lower() != "websocket":
        raise ClientError(f"{inbound.path} answers POST", status=405, headers={"Allow": "POST, OPTIONS"})
    return PlainAnswer("", 426, [("Upgrade", "websocket")])


# ---- routes -----------------------------------------------------------------


class Route(NamedTuple):
    """`access`: open | key | token | device | admin. `dialect` is that of errors, and of the request for live routes."""

    method: str
    path: str  # may end in `/*`: the rest is passed on as a name
    access: str
    dialect: str
    plain: Optional[Callable[[App, Inbound, str], PlainAnswer]] = None
    endpoint: str = ""  # recorded under this name; "" is not recorded


ROUTES: Tuple[Route, ...] = (
    #     method  path                          access    dialect      plain          endpoint
    Route("POST", "/v1/chat/completions",       "key",    CHAT,        None,          "chat_completions"),
    Route("POST", "/chat/completions",          "key",    CHAT,        None,          "chat_completions"),
    Route("POST", "/v1/responses",              "key",    RESPONSES,   None,          "responses"),
    Route("POST", "/responses",                 "key",    RESPONSES,   None,          "responses"),
    Route("GET",  "/v1/responses",              "key",    RESPONSES,   refuse_socket),
    Route("GET",  "/responses",                 "key",    RESPONSES,   refuse_socket),
    Route("POST", "/v1/messages",               "key",    MESSAGES,    None,          "messages"),
    Route("POST", "/v1/messages/count_tokens",  "key",    MESSAGES,    None,          "count_tokens"),
    Route("POST", "/v1/embeddings",             "key",    EMBEDDINGS,  None,          "embeddings"),
    Route("POST", "/embeddings",                "key",    EMBEDDINGS,  None,          "embeddings"),
    Route("POST", "/v1beta/models/*",           "key",    GEMINI,      None,          "gemini"),
    Route("POST", "/v1/models/*",               "key",    GEMINI,      None,          "gemini"),
    Route("POST", "/models/*",                  "key",    GEMINI,      None,          "gemini"),
    Route("GET",  "/v1beta/models",             "key",    GEMINI,      list_models),
    Route("GET",  "/v1beta/models/*",           "key",    GEMINI,      one_model),
    Route("GET",  "/v1/models",                 "key",    CHAT,        list_models),
    Route("GET",  "/models",                    "key",    CHAT,        list_models),
    Route("GET",  "/api/models",                "key",    CHAT,        list_models),
    Route("GET",  "/v1/models/full",            "key",    CHAT,        full_models),
    Route("GET",  "/models/full",               "key",    CHAT,        full_models),
    Route("GET",  "/v1/models/*",               "key",    CHAT,        one_model),
    Route("GET",  "/models/*",                  "key",    CHAT,        one_model),
    Route("GET",  "/usage",                     "key",    CHAT,        show_usage),
    Route("GET",  "/token",                     "token",  CHAT,        show_token),
    Route("GET",  "/",                          "open",   CHAT,        root_page),
    Route("GET",  "/health",                    "open",   CHAT,        health),
    Route("GET",  "/auth/device",               "device", CHAT,        device_code),
    Route("POST", "/auth/device",               "device", CHAT,        device_code),
    Route("POST", "/admin/config/reload",       "admin",  CHAT,        reload_config),
)
ROUTE_TABLE = {path: {route.method: route for route in ROUTES if route.path == path} for path in dict.fromkeys(route.path for route in ROUTES)}
UNKNOWN_ROUTE = Route("", "", "key", CHAT)
ADMIN_ROUTE = Route("", "", "admin", CHAT)


def dialect_of_stranger(path: str, headers: Dict[str, str]) -> str:
    """The dialect of a caller on a path that several share, by the headers only its SDKs send (clients.md)."""
    if path.startswith("/v1beta") or "x-goog-api-key" in headers or "x-goog-api-client" in headers:
        return GEMINI
    return MESSAGES if path.startswith("/v1/messages") or "anthropic-version" in headers else CHAT


def find_route(method: str, path: str, headers: Dict[str, str]) -> Tuple[Route, str, Optional[ClientError]]:
    """(route, name in the path, error): the error is a 404 or 405 in the dialect the path belongs to."""
    methods, name = ROUTE_TABLE.get(path), ""
    if methods is None:
        parent, _, name = path.rpartition("/")
        methods = ROUTE_TABLE.get(parent + "/*")
        stem = next((stem for stem in ("/v1/models/", "/v1beta/models/", "/models/") if path.startswith(stem)), None)
        if methods is None and stem:  # a model name with a slash in it
            methods, name = ROUTE_TABLE[stem + "*"], path[len(stem):]
    if methods is None:
        route = ADMIN_ROUTE if path == "/admin" or path.startswith("/admin/") else UNKNOWN_ROUTE
        route = route._replace(dialect=dialect_of_stranger(path, headers))
        return route, "", ClientError(f"Not found: {method} {path}", status=404, code="not_found")
    route = methods.get("GET" if method == "HEAD" else method)
    if route is None:
        allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
        first = next(iter(methods.values()))
        shared = first.plain is not None or first.dialect == GEMINI
        return first._replace(dialect=dialect_of_stranger(path, headers)) if shared else first, "", ClientError(
            f"{path} does not answer {method}; use {allowed}", status=405, headers={"Allow": allowed})
    if route.plain is not None:
        route = route._replace(dialect=dialect_of_stranger(path, headers))
    return route, unquote(name), None


# ---- the handler ------------------------------------------------------------


class Handler(socketserver.BaseRequestHandler):
    """One client connection: requests one after the other, until one side closes."""

    server: Server

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "SO_SNDTIMEO") and os.name == "posix":
            # a client that takes nothing for so long is gone; without it its thread would stay for ever
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(600))
        self.reader = ClientReader(self.request)
        self.server.handlers.add(self)
        try:
            while self._next(self.reader) and not self.server.app.stopping:
                pass
        finally:
            self.server.handlers.discard(self)

    def hang_up(self) -> None:
        """Lets the connection read the end of its socket, as if the client had left."""
        try:
            self.request.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # the client was quicker

    def _next(self, reader: ClientReader) -> bool:
        """Serves the next request; False when the connection ends."""
        app = self.server.app
        settings = app.settings()
        exchange = Exchange(new_trace_id(), "")
        line = ClientLine(self.request, True, time.monotonic)
        call = _Call(app, settings, exchange, line, reader, self.client_address[0])
        try:
            head = reader.head(settings)
            if head is None:
                return False
            call.begin(head, self.server.is_crowded())
            call.serve()
        except ClientGone:
            exchange.status, exchange.outcome = 499, "client_gone"
            return False
        except ProxyError as error:
            call.refuse(error)
        except BadHead as exc:
            call.keep = False
            call.refuse(ClientError(f"the request head is malformed: {exc}"))
        except Exception as exc:  # the last line of defence: the client gets an error, the operator a trace
            app.log.warning(f"internal error in {call.method} {call.path}: {type(exc).__name__}: {exc}")
            if app.log.verbose:
                import traceback  # only here
                app.log.debug(traceback.format_exc())
            call.keep = False
            call.refuse(ProxyError("internal error; the gateway's log says more", code="internal_error"))
        finally:
            call.end()
        if call.lingers:
            call.linger()
        return call.keep and not line.gone


class _Call:
    """One request on its way through the server: read, admitted, run, answered or refused, logged and recorded."""

    def __init__(self, app: App, settings: Settings, exchange: Exchange, line: ClientLine, reader: ClientReader, peer: str) -> None:
        self.app = app
        self.settings = settings
        self.exchange = exchange
        self.line = line
        self.reader = reader
        self.peer = peer
        self.method = self.path = ""
        self.headers: Dict[str, str] = {}
        self.query: Dict[str, str] = {}
        self.given: List[str] = []  # keys, wherever they stood
        self.route = UNKNOWN_ROUTE
        self.keep = False
        self.lingers = False  # it was refused unread
        self.name = ""  # what the route's `*` stands for
        self.crowded = False
        self.started = time.monotonic()
        self.base_headers: List[Tuple[str, str]] = [("x-trace-id", exchange.trace_id), ("Connection", "close")]

    def begin(self, head: bytes, crowded: bool) -> None:
        """Reads the head; raises BadHead, ClientError."""
        self.app.running[id(self)] = self.exchange.trace_id
        self.settings = self.app.settings()  # keys may have changed while the connection was idle
        self.started = time.monotonic()
        self.exchange.started_ms = int(time.time() * 1000)
        self.line.started_at = self.line.sent_at = self.started
        first, self.headers = parse_head(head)
        parts = first.split(" ")
        if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0") or not parts[0].isalpha():
            raise BadHead("not an HTTP/1.1 request line")
        self.method = parts[0].upper()
        try:
            target = urlsplit("http://-" + parts[1] if parts[1].startswith("/") or not re.match(r"https?://", parts[1], re.I) else parts[1])
        except ValueError as exc:
            raise BadHead("the request target is malformed") from exc
        if self.headers.get("transfer-encoding", "chunked").lower() != "chunked":
            raise BadHead("a Transfer-Encoding other than chunked")
        self.path, self.query = normal_path(target.path), dict(parse_qsl(target.query, keep_blank_values=True)) if target.query else {}
        self.given = given_keys(self.headers, self.query)
        newer = parts[2] == "HTTP/1.1"
        connection = self.headers.get("connection", "").lower()
        self.keep = newer and "close" not in connection and not crowded and not self.app.stopping
        self.line.chunked = newer
        trace = self.headers.get("x-trace-id", "")
        self.exchange.trace_id = trace if TRACE_ID.match(trace) else self.exchange.trace_id
        self.exchange.method, self.exchange.path = self.method, self.path
        self.exchange.user_agent = self.headers.get("user-agent", "")[:300]
        self.base_headers = [("x-trace-id", self.exchange.trace_id), *cors_headers(self.headers, self.settings)]
        if not self.keep:
            self.base_headers.append(("Connection", "close"))
        self.crowded = crowded

    def serve(self) -> None:
        """Admits the request, reads its body, and runs its route."""
        self.route, name, error = find_route(self.method, self.path, self.headers)
        if self.crowded:
            raise ProxyError("too many connections (limits.connections); try again in a moment", status=503)
        self.exchange.endpoint = self.route.endpoint if error is None else ""
        self._check_host()
        if self.method == "OPTIONS":
            self._preflight()
            return
        self._admit()
        if error is not None:
            raise error
        inbound = Inbound(self.method, self.path, self.query, self.headers, self._body(), self.exchange.trace_id, self.base_headers,
                          self.peer, key_name(self.given, self.settings["auth.apiKeys"]))
        self._log_request(inbound.body)
        if self.route.plain is not None:
            self._send(self.route.plain(self.app, inbound, name))
        else:
            self.app.served += 1
            self.name = name
            self._run(inbound)

    def _log_request(self, body: bytes) -> None:
        """Bodies are kept only where --log-file or --verbose asks for them."""
        app = self.app
        if app.request_log is not None:
            app.request_log.request(self.method, self.path, self.headers, body)
        if app.handler_logs is not None and self.route.endpoint:
            app.handler_logs.write(self._handler(), self.exchange.trace_id, "request " + body.decode("utf-8", "replace"), "debug")
        logged = app.request_log is not None and self.route.access != "token" or app.handler_logs is not None and self.route.endpoint
        self.line.captured = bytearray() if logged else None

    def _log_answer(self) -> None:
        app, captured = self.app, self.line.captured
        if app.request_log is not None and captured is not None:
            app.request_log.response(self.path, self.exchange.status, dict(self.base_headers), bytes(captured))
        if app.handler_logs is not None and self.exchange.endpoint:
            if captured is not None:
                app.handler_logs.write(self._handler(), self.exchange.trace_id, "answer " + captured.decode("utf-8", "replace"), "debug")
            app.handler_logs.write(self._handler(), self.exchange.trace_id, exchange_line(self.exchange))

    def _handler(self) -> str:
        return f"{self.exchange.endpoint.replace('_', '-')}-handler"

    def _run(self, inbound: Inbound) -> None:
        """Hands a live route to the part that serves it."""
        if self.route.endpoint == "gemini":
            self._run_gemini(inbound)
        elif self.route.endpoint == "embeddings":
            self.app.embeddings.embed(inbound, self.line, self.exchange)
        elif self.route.endpoint == "count_tokens":
            self.app.counter.count(inbound, self.line, self.exchange)
        else:
            self.app.gateway.generate(self.route.dialect, inbound, self.line, self.exchange)

    def _run_gemini(self, inbound: Inbound) -> None:
        """`{model}:{verb}`"""
        model, _, verb = self.name.rpartition(":")
        app, line, exchange = self.app, self.line, self.exchange
        if verb in ("generateContent", "streamGenerateContent"):
            app.gateway.generate(GEMINI, inbound, line, exchange, {"model": model, "stream": verb == "streamGenerateContent"})
        elif verb == "countTokens":
            app.counter.count_gemini(model, inbound, line, exchange)
        elif verb in ("embedContent", "batchEmbedContents"):
            app.embeddings.embed_gemini(model, verb, inbound, line, exchange)
        else:
            raise ClientError("Unsupported Gemini endpoint.", status=404)

    # ---- admission ----------------------------------------------------------

    def _check_host(self) -> None:
        """DNS rebinding: a page that points its own name at us sends that name as Host."""
        value = self.headers.get("host")
        if value is None and not self.line.chunked:
            return  # HTTP/1.0 knows no Host
        if value is None:
            self.keep = False
            self.base_headers.append(("Connection", "close"))
            raise BadHead("no Host header")
        if not is_own_host(value, self.settings) and not has_key(self.given, self.settings["auth.apiKeys"]):
            raise ClientError(f"the Host {host_name(value)[:100]} is not ours; add it to allowedHosts if it is", status=403, code="host_refused")

    def _admit(self) -> None:
        """Origin and key, by the route's access; raises ClientError 401 or 403."""
        settings, access = self.settings, self.route.access
        api_key = has_key(self.given, settings["auth.apiKeys"])
        admin = settings["auth.adminApiKey"]
        is_admin = admin is not None and has_key(header_keys(self.headers), [admin])
        navigation = self.method == "GET" and access in ("open", "device") and self.headers.get("sec-fetch-mode") == "navigate"
        if is_foreign(self.headers, settings, secret=access in ("token", "device", "admin")) and not (api_key or is_admin or navigation) and access != "open":
            raise ClientError("requests of other sites' pages are refused; add the origin to cors.origins to allow it",
                              status=403, code="origin_refused")
        if access == "key":
            allowed = api_key or not settings["auth.apiKeys"]
        elif access in ("token", "device"):
            allowed = is_admin or is_loopback_caller(self.peer, self.headers) and not (access == "token" and settings["auth.apiKeys"])
        else:
            allowed = is_admin or access == "open"
        if not allowed:
            wanted = "the admin key (auth.adminApiKey)" if access != "key" else "an API key"
            raise ClientError(f"Unauthorized: {self.path} wants {wanted} as x-api-key or Authorization: Bearer", status=401,
                              kind="authentication_error", code="invalid_api_key",
                              headers={"WWW-Authenticate": 'Bearer realm="copilot-api"'})

    def _preflight(self) -> None:
        asked = self.headers.get("access-control-request-headers", "*")
        headers = [("Access-Control-Allow-Methods", ALLOWED_METHODS), ("Access-Control-Allow-Headers", asked),
                   ("Access-Control-Max-Age", "600")] if cors_headers(self.headers, self.settings) else []
        if headers and "access-control-request-private-network" in self.headers:
            headers.append(("Access-Control-Allow-Private-Network", "true"))
        self._send(PlainAnswer("", 204, headers))

    def _body(self) -> bytes:
        """The decoded body; a client that waits for it is told to go on first."""
        if "transfer-encoding" not in self.headers and "content-length" not in self.headers:
            self.reader.unread = False
            return b""
        limit = self.settings["limits.bodyBytes"]
        if (content_length(self.headers) or 0) > limit:
            raise too_large(limit)
        if self.headers.get("expect", "").lower() == "100-continue":
            self._raw(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.reader.body(self.headers, self.settings)
        self.reader.unread = False
        self.exchange.request_bytes = len(body)
        coding = self.headers.get("content-encoding", "")
        return decode_content(body, coding, limit) if coding else body

    # ---- answers ------------------------------------------------------------

    def _raw(self, data: bytes) -> None:
        try:
            self.line.sock.sendall(data)
        except OSError as exc:
            raise ClientGone from exc

    def _send(self, reply: PlainAnswer) -> None:
        """A complete answer; no body for HEAD, 204 and 304, whatever the headers say."""
        body, kind = reply.encoded()
        headers = [*reply.headers, *self.base_headers]
        if reply.status not in (204, 304):
            headers += [("Content-Type", kind)] if body else []
            headers.append(("Content-Length", str(len(body))))
        self.exchange.status = reply.status
        bare = self.method == "HEAD" or reply.status in (204, 304)
        self.line.whole(answer_head(reply.status, headers), b"" if bare else body)

    def refuse(self, error: ProxyError) -> None:
        """The error in the caller's dialect, if nothing has been sent; else the connection just ends."""
        self.exchange.status = error.status
        self.exchange.outcome = "upstream_error" if isinstance(error, UpstreamError) else "refused"
        self.exchange.failure = failure_of(error)
        self.app.watch.remove(self.line)
        codec = CODECS.get(self.route.dialect)
        if self.line.settle() or self.line.ended:
            self.keep = False
            if not self.line.ended and self.line.ending is not None:
                self._end_stream(self.line.ending(self.exchange.failure))
            return
        body = codec.encode_error(error) if codec is not None else openai_error(error)
        request_id = self.exchange.failure.request_id or self.exchange.trace_id
        headers = [*error_headers(error), ("x-request-id", request_id), ("request-id", request_id)]
        # without headers the head itself was not understood: anything may follow
        due = self.reader.unread and (not self.headers or "transfer-encoding" in self.headers or "content-length" in self.headers)
        if due and self.keep:
            self.keep = False
            self.base_headers = [*self.base_headers, ("Connection", "close")]
        try:
            self._send(PlainAnswer(body, error.status, headers))
            self.lingers = due
        except ClientGone:
            self.keep = False

    def _end_stream(self, ending: bytes) -> None:
        try:
            self.line.finish(ending)
        except ClientGone:
            pass  # nobody reads it

    def linger(self) -> None:
        """Lets a client that is still sending read the refusal instead of a reset."""
        try:
            self.line.sock.shutdown(socket.SHUT_WR)
            self.reader.linger()
        except OSError:
            pass  # it is gone already

    def end(self) -> None:
        """Records the exchange and lets go of the client."""
        self.app.watch.remove(self.line)
        self.line.ending, self.line.early_head = None, bytes  # they hold the line: a circle is freed late
        if self.exchange.endpoint:
            self._record()
        else:
            self._log_answer()
        self.app.running.pop(id(self), None)

    def _record(self) -> None:
        exchange, line = self.exchange, self.line
        exchange.response_bytes = line.bytes_out
        exchange.duration_ms = int((time.monotonic() - self.started) * 1000)
        if line.gone and exchange.outcome in ("unfinished", "ok"):
            exchange.status, exchange.outcome = 499, "client_gone"
        self.app.ledger.record(exchange)
        self._log_answer()
        if self.app.log.verbose:
            self.app.log.debug(exchange_line(exchange))


def exchange_line(exchange: Exchange) -> str:
    """One line that says what was decided and how it ended."""
    row = request_row(exchange)
    shown = ("client", "asked_model", "model", "model_reason", "initiator", "initiator_reason", "session_reason", "prompt_id",
             "vision", "interaction", "edits", "dropped", "given_up", "attempts", "failure_kind", "failure_scope", "input_tokens",
             "output_tokens", "stop_reason", "first_byte_ms", "duration_ms")
    facts = " ".join(f"{name}={json.dumps(row[name])}" for name in shown if row[name] not in (None, "", 0))
    return f"{exchange.method} {exchange.path} -> {exchange.status} {exchange.outcome} {facts}"


def new_trace_id() -> str:
    """`<milliseconds, base 36>-<6 characters>` (gateway-features 4.5)."""
    return f"{base36(int(time.time() * 1000))}-{random.getrandbits(24):06x}"  # a name, no secret


def base36(number: int) -> str:
    """A number in base 36."""
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
        if not number:
            return digits


class Server(ThreadingHTTPServer):
    """The listening socket: a thread per connection, a long queue, no name look-ups."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # 5 by default: a burst of clients would be refused
    allow_reuse_address = os.name == "posix"  # on Windows it would let two servers share a port

    def __init__(self, host: str, port: int) -> None:
        self.app: App  # set before the first request is accepted
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.handlers: Set[Handler] = set()  # one per connection; single set operations
        self._active = 0  # guarded by _active_lock
        self._active_lock = threading.Lock()
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        """Binds without `getfqdn`, which may wait for DNS."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def dismiss(self) -> None:
        """Sends idle clients away; the others leave when their request has its answer."""
        self.app.stopping = True
        for handler in list(self.handlers):
            if handler.reader.idle:
                handler.hang_up()

    def give_up(self) -> None:
        """Waits no longer for requests that have not arrived whole."""
        for handler in list(self.handlers):
            if handler.reader.unread:
                handler.hang_up()

    def is_crowded(self) -> bool:
        """Whether more clients are connected than `limits.connections`."""
        return self._active > self.app.settings()["limits.connections"]

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection; far above the limit only a fixed answer, so that idlers cost nothing."""
        if self._active < self.app.settings()["limits.connections"] + POLITE_CONNECTIONS:
            super().process_request(request, client_address)
            return
        try:
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        except OSError:
            pass
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._active_lock:
            self._active += 1
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._active_lock:
                self._active -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A broken connection is not worth a traceback."""
        exc = sys.exc_info()[1]
        if not isinstance(exc, OSError):
            self.app.log.warning(f"internal error on a connection: {type(exc).__name__}: {exc}")


###############################################################################
#                                   Console                                   #
###############################################################################
# The pages: for now the sign-in page; the console will live here.

DEVICE_HTML = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sign in to GitHub Copilot</title>
<style>
  :root { color-scheme: dark; --ink: #e6edf3; --dim: #8b949e; --card: #161b22; --line: #30363d; --go: #238636; }
  body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: #0d1117; color: var(--ink);
         font: 16px/1.5 system-ui, sans-serif; }
  main { width: min(26rem, calc(100vw - 4rem)); padding: 2rem; background: var(--card); border: 1px solid var(--line);
         border-radius: 12px; text-align: center; }
  h1 { font-size: 1.25rem; margin: 0 0 1rem; }
  ol { margin: 0 0 1rem; padding-left: 1.25rem; text-align: left; color: var(--dim); }
  code { display: block; margin: 1rem 0; font: 600 2rem/1.4 ui-monospace, monospace; letter-spacing: .12em; user-select: all; }
  a.button, button { display: inline-block; padding: .6rem 1.2rem; border: 0; border-radius: 6px; background: var(--go);
         color: #fff; font: inherit; text-decoration: none; cursor: pointer; }
  #status { min-height: 1.5em; margin: 1rem 0 0; color: var(--dim); }
</style>
</head>
<body>
<main>
  <h1>Sign in to GitHub Copilot</h1>
  <ol><li>Open GitHub</li><li>Enter this code and authorise</li><li>Come back: this page notices</li></ol>
  <code id="code">…</code>
  <a class="button" id="open" target="_blank" rel="noopener noreferrer">Open GitHub</a>
  <button id="anew" hidden>New code</button>
  <p id="status" role="status">waiting for a code</p>
</main>
<script>
  const byId = (id) => document.getElementById(id);
  const words = {
    starting: "asking GitHub for a code", done: "signed in: you can close this page", signed_in: "signed in: you can close this page",
  };

  function left(seconds) {
    return Math.floor(seconds / 60) + ":" + String(seconds % 60).padStart(2, "0");
  }

  function show(state) {
    byId("code").textContent = state.user_code || "…";
    const address = String(state.verification_uri || "");
    if (/^https?:/.test(address)) byId("open").href = address;
    byId("anew").hidden = !["failed", "refused"].includes(state.state);
    byId("status").textContent = state.state === "waiting" ? "waiting for GitHub, " + left(state.expires_in) + " left"
      : state.error || words[state.state] || state.state;
  }

  let timer;

  async function refresh(method) {
    try {
      const answer = await fetch("/auth/device", { method: method || "GET", headers: { Accept: "application/json" } });
      const state = await answer.json();
      show(state);
      if (state.state === "done" || state.state === "signed_in") return;
    } catch (error) {
      byId("status").textContent = "the gateway does not answer";
    }
    clearTimeout(timer);
    timer = setTimeout(refresh, 2000);
  }

  byId("anew").addEventListener("click", () => refresh("POST"));
  refresh();
</script>
</body>
</html>
"""


def device_page(shown: Json) -> str:
    """The sign-in page; it asks for the state by itself, so the page is a constant."""
    return DEVICE_HTML


###############################################################################
#                                   Clients                                   #
###############################################################################
# Set-up of client programs with undo, launching, plugins and the MCP bridge
# will live here.


###############################################################################
#                                Command line                                 #
###############################################################################
# Commands, composition of the parts, main.

# option -> environment variable it stands for; accepted before and after the command (gateway-features 1.2)
GLOBAL_OPTIONS = {"--api-home": "COPILOT_API_HOME", "--oauth-app": "COPILOT_API_OAUTH_APP",
                  "--enterprise-url": "COPILOT_API_ENTERPRISE_URL"}
EXIT_OK, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2
STOP_S = 2.0  # how long running requests may take to end once they are told to
STOPPED = Failure("transport", "provider", 503, "the gateway was stopped", "gateway_stopped")
RISK_NOTE = ("Note: this is not an official GitHub client. Heavy automated use can get a Copilot account restricted; "
             "use it as you would use your editor.")


def take_global_options(args: Sequence[str], env: Dict[str, str]) -> List[str]:
    """The arguments without the global options, which go into `env` (a flag wins over the variable)."""
    rest: List[str] = []
    waiting = iter(args)
    for arg in waiting:
        name, has_value, value = arg.partition("=")
        if name in GLOBAL_OPTIONS:
            env[GLOBAL_OPTIONS[name]] = value if has_value else next(waiting, "")
        else:
            rest.append(arg)
    return rest


def check_exposure(host: str, settings: Settings) -> None:
    """Raises SetupError for an address that others reach and that no key guards, at start and at reload."""
    if not is_loopback(host) and not settings["auth.apiKeys"]:
        raise SetupError(f"refusing to listen on {host} without an API key: anybody who reaches the port could use your account.\n"
                         "Set one: COPILOT_API_KEY=$(openssl rand -hex 24) python copilot_proxy.py start --host " + host)


class Setup:
    """What every command begins with: environment, paths, log, config file, settings."""

    def __init__(self, env: Dict[str, str], flags: Dict[str, Any]) -> None:
        self.env = env
        self.flags = flags
        self.paths = Paths(env)
        self.lock = HomeLock(self.paths.lock)
        self.file = ConfigFile(self.paths, self.lock)
        self.log = Log()
        self._settings: Optional[Settings] = None

    def settings(self) -> Settings:
        """The settings of now; raises SetupError for a refused configuration."""
        if self._settings is None:
            self._settings = Settings(self.file.read(), self.env, self.flags)
            self.log.verbose = self._settings["verbose"]
        return self._settings

    def prepare(self) -> Settings:
        """Creates and completes what a server needs on disk, then gives the settings; raises SetupError."""
        self.paths.make()
        config, warnings = self.file.prepare()
        self._settings = Settings(config, self.env, self.flags)
        self.log.verbose = self._settings["verbose"]
        for warning in warnings + self._settings.warnings:
            self.log.warning(warning)
        for key, origin in self._settings.origins.items():
            if origin.rpartition(" ")[2] in GENERIC_NAMES:
                self.log.info(f"{key} is set by the {origin}")
        return self._settings

    def reload(self) -> None:
        """Reads config.json again; a broken or refused one changes nothing; raises SetupError.

        Host and port stay what they were at start: another value needs a restart.
        """
        settings = Settings(self.file.read(), self.env, self.flags)
        if self._settings is not None:
            settings.values.update(host=self._settings["host"], port=self._settings["port"])
        check_exposure(settings["host"], settings)
        self._settings = settings
        self.log.verbose = settings["verbose"]


def compose(setup: Setup, flag_token: Optional[str] = None, unit_s: float = 1.0, terminal: bool = False, demo: bool = False) -> App:
    """The parts of a gateway, made and handed to each other; nothing is started. `unit_s`: one second, tests shrink it.
    `demo`: the built-in model in place of Copilot."""
    settings = setup.settings
    upstream = Upstream(settings, setup.env, setup.log)
    accounts = (DemoAccounts if demo else Accounts)(upstream, setup.paths, settings, setup.log, setup.env, flag_token, terminal,
                                                    unit_s=unit_s)
    identity = Identity(setup.paths, setup.lock, setup.log)
    provider: Provider = Demo(accounts) if demo else Copilot(upstream, accounts, identity, settings)
    models = Models(provider, setup.paths.demo_models if demo else setup.paths.models, setup.log)
    accounts.on_active.append(lambda: models.refresh_soon(now=True))
    watch = Watch(settings, setup.log)
    planner = Planner(settings, models, provider)
    sender = Sender(settings, provider, setup.log, unit_s)
    estimator = TokenEstimator()
    prompts = PromptCounter(estimator, Calibration())
    return App(
        settings=settings, reload=setup.reload, paths=setup.paths, log=setup.log, upstream=upstream, watch=watch, accounts=accounts,
        provider=provider, models=models,
        gateway=Gateway(settings, planner, sender, identity.machine_id, watch, estimator, prompts, setup.log, ask_operator),
        embeddings=Embeddings(planner, sender, watch),
        counter=TokenCounter(settings, planner, sender, upstream, accounts, watch, setup.log, prompts),
        ledger=Ledger(settings()["usageDatabase"] or os.path.join(setup.paths.home, "copilot-api.sqlite"), setup.log),
        device_page=device_page)


def start_parts(app: App) -> None:
    """Opens the logs and starts the threads of a composed gateway; raises SetupError."""
    settings = app.settings()
    app.handler_logs = HandlerLogs(app.paths.logs, settings["logRetentionDays"], app.log) if settings["verbose"] else None
    app.request_log = RequestLog(settings["logFile"], app.log) if settings["logFile"] else None
    app.ledger.start()
    app.watch.start()
    app.accounts.begin()


PATIENCE_S = 25.0  # for what runs when we are told to stop; Kubernetes kills after 30 s, systemd after 90, Docker after 10


def finish_running(app: App, signals: queue.SimpleQueue, patience_s: float = PATIENCE_S) -> None:
    """Waits for the running requests, as long as patience lasts or until another signal comes."""
    deadline = time.monotonic() + patience_s
    if app.running and patience_s:
        app.log.info(f"stopping: {len(app.running)} running requests have {patience_s:g} s to end; a second signal ends them now")
    while app.running and signals.empty() and time.monotonic() < deadline:
        time.sleep(0.005)


def stop_parts(app: App) -> None:
    """Ends them, in the reverse order of `start_parts`: running streams get their dialect's ending, what was recorded is
    committed, and the door closes behind all who use it."""
    for line in app.watch.lines():
        line.stopper.stop(UpstreamError(STOPPED))
    deadline = time.monotonic() + STOP_S
    while app.running and time.monotonic() < deadline:
        time.sleep(0.005)
    app.accounts.stop()
    app.watch.stop()
    app.ledger.stop()
    app.upstream.pool.close()


def ask_operator(question: str) -> bool:
    """--manual: a yes or no on the terminal."""
    try:
        return input(f"{question}; send it? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, OSError):
        return False


# ---- start ------------------------------------------------------------------


def run_start(setup: Setup, options: Any) -> int:
    """The server; returns when it is stopped."""
    settings = setup.prepare()
    host = usable_host(settings, setup.log)
    check_exposure(host, settings)
    if settings["manualApprove"] and not sys.stdin.isatty():
        raise SetupError("--manual asks on the terminal, and there is none")
    raise_file_limit()
    share_one_heap()
    try:
        server = Server(host, settings["port"])
    except OSError as exc:
        holder = port_holder(settings["port"])
        print(f"cannot listen on {host}:{settings['port']}: {reason_of(exc)}" + (f"; it is held by {holder}" if holder else ""), file=sys.stderr)
        return EXIT_FAILED
    server.app = app = compose(setup, options.github_token or None, terminal=sys.stderr.isatty(), demo=options.demo)
    signals: queue.SimpleQueue = queue.SimpleQueue()  # the one thing a signal handler may safely fill
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.put(number))
    threading.Thread(target=lambda: (signals.get(), server.shutdown()), name="signals", daemon=True).start()
    start_parts(app)
    greet(setup, server.server_address[1], host, options.demo)
    gc.freeze()  # what the start has made stays: the collector need not look through it again and again
    try:
        server.serve_forever(0.2)
    finally:
        server.server_close()
        server.dismiss()
        finish_running(app, signals)
        server.give_up()
        stop_parts(app)
    return EXIT_OK


def usable_host(settings: Settings, log: Log) -> str:
    """The address to bind; a HOST from the environment that does not resolve (conda exports one) is ignored."""
    host = settings["host"]
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        if settings.origins["host"] != "environment HOST":
            raise SetupError(f"the host {host} does not resolve; nothing was started") from None
        log.warning(f"HOST={host} does not resolve and is ignored; listening on 127.0.0.1")
        host = settings.values["host"] = "127.0.0.1"
    return host


M_ARENA_MAX = -8  # glibc's malloc.h


def share_one_heap() -> None:
    """Lets all threads take memory from one heap, where the system is Linux with glibc.

    By default each of the first sixteen threads gets a heap of its own, and what large bodies leave in each is not used
    by the others: 40 MB after half an hour of mixed traffic. Nothing waits for the one lock: Python holds its own.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        import ctypes  # 3 ms: only here
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    except (ImportError, OSError, AttributeError):
        pass  # another C library


def raise_file_limit() -> None:
    """Every stream takes two descriptors; the soft limit is often 1,024."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard, 65536, 10240):  # macOS calls its hard limit infinite and refuses it
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return
        except (ValueError, OSError):
            continue


def port_holder(port: int) -> str:
    """Who listens on a port: `process 123 (python)` on Linux, "" where that cannot be seen."""
    try:
        with open("/proc/net/tcp", encoding="ascii") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        sockets = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
        for process in filter(str.isdigit, os.listdir("/proc")):
            for number in list_quietly(f"/proc/{process}/fd"):
                if link_quietly(f"/proc/{process}/fd/{number}") in sockets:
                    return f"process {process} ({read_text(f'/proc/{process}/comm') or '?'})"
    except (OSError, ValueError, IndexError):
        pass
    return ""


def list_quietly(folder: str) -> List[str]:
    """The names in a folder, none if it is not ours to see."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def link_quietly(path: str) -> str:
    """Where a link points, "" if it is gone."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def greet(setup: Setup, port: int, host: str, demo: bool) -> None:
    """The lines a person sees at start: address, usage page, once per home the risk note; in a demo what to try."""
    url = f"http://{shown_host(host)}:{port}"
    setup.log.info(f"copilot_proxy {VERSION} listens on {url}")
    setup.log.info(f"usage: {url}/usage-viewer?endpoint={url}/usage")
    if demo:
        setup.log.info(f"""demo, no account and no network: curl -N {url}/v1/chat/completions -H 'content-type: application/json' """
                       """-d '{"model":"demo-chat","stream":true,"messages":[{"role":"user","content":"Who are you?"}]}'""")
        return
    if setup.settings()["accountType"] != "individual":
        setup.log.info(f"account type: {setup.settings()['accountType']}")
    stored = read_json(setup.paths.identity) or {}
    if not stored.get("riskNoteShown"):
        setup.log.info(RISK_NOTE)
        try:
            with setup.lock:
                write_json(setup.paths.identity, {**(read_json(setup.paths.identity) or {}), "riskNoteShown": True})
        except OSError:
            pass  # it is shown again at the next start


# ---- accounts ---------------------------------------------------------------


def run_login(setup: Setup, options: Any) -> int:
    """`auth`, `auth login`: the device flow on the terminal."""
    if options.provider not in (None, "copilot"):
        print(f"unknown provider {options.provider!r}; valid here: copilot", file=sys.stderr)
        return EXIT_FAILED
    setup.prepare()
    accounts = compose(setup).accounts
    accounts.device.begin()
    shown = accounts.device.wait_code(60)
    if shown["state"] == "waiting":
        print(f"Open {shown['verification_uri']} and enter the code {shown['user_code']}", flush=True)
    while accounts.device.shown()["state"] in ("starting", "waiting"):
        time.sleep(0.05)
    shown = accounts.device.shown()
    if shown["state"] != "done":
        print(f"sign-in failed: {shown.get('error')}", file=sys.stderr)
        return EXIT_FAILED
    accounts.settled.wait(60)
    if accounts.active is None:
        print(f"signed in, but Copilot is not available: {accounts.refusal}", file=sys.stderr)
        return EXIT_FAILED
    print(f"Signed in; the token is in {setup.paths.token}")
    return EXIT_OK


def run_logout(setup: Setup, options: Any) -> int:
    """`auth logout`: removes the token file."""
    removed = compose(setup).accounts.forget() if os.path.isdir(setup.paths.home) else False
    print(f"Signed out; {setup.paths.token} is removed" if removed else "Nobody was signed in here")
    return EXIT_OK


def run_status(setup: Setup, options: Any) -> int:
    """`auth status`: which token would be used, and whether it works."""
    setup.prepare()
    accounts = compose(setup).accounts
    accounts.settle()
    if accounts.active is None:
        print("Not signed in" + (f": {accounts.refusal}" if accounts.refusal else "") + ". Run `copilot_proxy.py auth login`")
        return EXIT_FAILED
    account = accounts.active
    works = account.copilot is not None
    print(f"GitHub token from {account.source}" + (", used directly" if account.direct else ""))
    print(f"Copilot token: {'ok, ' + account.copilot.api if works and account.copilot else 'could not be fetched now'}")
    return EXIT_OK if works else EXIT_FAILED


def run_check_usage(setup: Setup, options: Any) -> int:
    """`check-usage`: plan, reset date and three quota lines; signs in first if need be."""
    setup.prepare()
    app = compose(setup)
    app.accounts.settle()
    if app.accounts.active is None and run_login(setup, options) != EXIT_OK:
        return EXIT_FAILED
    if app.accounts.active is None:
        app.accounts.settle()
    try:
        usage = account_usage(app.provider)
    except ProxyError as error:
        print(error.message, file=sys.stderr)
        return EXIT_FAILED
    print(f"Copilot usage (plan: {usage['plan']})\nQuota resets: {usage['quota_reset_date']}\n")
    for key, title in (("premium_interactions", "Premium"), ("chat", "Chat"), ("completions", "Completions")):
        print(f"  {title}: {quota_line(usage['quotas'].get(key))}")
    return EXIT_OK


def quota_line(quota: Optional[Json]) -> str:
    """`277/1500 used (18.5% used, 81.5% remaining)` (gateway-features 1.9)."""
    if quota is None:
        return "N/A"
    entitlement, used = quota.get("entitlement") or 0, quota["used"]
    percent = 100 * used / entitlement if entitlement else 0
    return f"{used:g}/{entitlement:g} used ({percent:.1f}% used, {quota['percent_remaining']:.1f}% remaining)"


# ---- reports ----------------------------------------------------------------


def run_debug(setup: Setup, options: Any) -> int:
    """`debug`: versions, paths, whether there is a token; offline."""
    facts = debug_facts(setup)
    if options.json:
        print(json.dumps(facts, indent=2))
        return EXIT_OK
    runtime, paths = facts["runtime"], facts["paths"]
    print(f"copilot_proxy debug\n\nVersion: {facts['version']}\n"
          f"Runtime: {runtime['name']} {runtime['version']} ({runtime['platform']} {runtime['arch']})\n\nPaths:\n"
          f"- APP_DIR: {paths['APP_DIR']}\n- CONFIG_PATH: {paths['CONFIG_PATH']}\n- GITHUB_TOKEN_PATH: {paths['GITHUB_TOKEN_PATH']}\n\n"
          f"Token exists: {'Yes' if facts['tokenExists'] else 'No'}\nCodex configured: {'Yes' if facts['providers']['codexConfigured'] else 'No'}\n"
          f"Enabled providers: {', '.join(facts['providers']['enabled']) or 'none'}")
    return EXIT_OK


def debug_facts(setup: Setup) -> Json:
    """The document of `debug --json`, keys in the documented order (gateway-features 1.10)."""
    import platform  # rarely used
    config = setup.file.read()
    providers = config.get("providers") if isinstance(config.get("providers"), dict) else {}
    enabled = [name for name, entry in providers.items() if isinstance(entry, dict) and entry.get("enabled") is not False]
    paths = setup.paths
    return {"providers": {"codexConfigured": os.path.isfile(os.path.join(paths.home, "codex_credentials.json")), "enabled": enabled},
            "version": VERSION,
            "runtime": {"name": "python", "version": platform.python_version(), "platform": sys.platform, "arch": platform.machine()},
            "paths": {"APP_DIR": paths.home, "CONFIG_PATH": paths.config, "GITHUB_TOKEN_PATH": paths.token},
            "tokenExists": os.path.isfile(paths.token) and read_text(paths.token) is not None}


def run_config(setup: Setup, options: Any) -> int:
    """`config`: the effective settings with the origin of each; `--defaults`: the table of names."""
    if options.defaults:
        for key, default, _, names in SETTINGS:
            print(f"{key:<48} {shown_value(key, default):<32} {', '.join(names)}".rstrip())
        return EXIT_OK
    settings = setup.settings()
    for key in settings.values:
        print(f"{key:<48} {shown_value(key, settings[key]):<32} {settings.origins[key]}")
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return EXIT_OK


def shown_value(key: str, value: Any) -> str:
    """A setting's value for people, secrets masked, long ones cut."""
    if key in SECRET_KEYS:
        many = value if isinstance(value, list) else [value] if value else []
        return f"{len(many)} set" if isinstance(value, list) else ("***" if many else "null")
    if key in ("providers", "accounts"):
        return f"{len(value)} entries"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


# ---- main -------------------------------------------------------------------

# command -> (function, help); `auth login` is a command of two words
COMMANDS: Dict[str, Tuple[Callable[[Setup, Any], int], str]] = {
    "start":       (run_start,       "serve until stopped"),
    "auth":        (run_login,       "sign in to GitHub; also: auth login, auth logout, auth status"),
    "auth login":  (run_login,       "sign in to GitHub"),
    "auth logout": (run_logout,      "remove the stored token"),
    "auth status": (run_status,      "which token is used, and whether it works"),
    "check-usage": (run_check_usage, "plan and quotas"),
    "debug":       (run_debug,       "versions and paths, offline"),
    "info":        (run_debug,       "the same as debug"),
    "config":      (run_config,      "effective settings and where each comes from"),
}
# command -> options: (flags, keyword arguments of argparse); `dest` with a dot is a setting
START_OPTIONS: Tuple[Tuple[Tuple[str, ...], Json], ...] = (
    (("-p", "--port"), {"dest": "port", "metavar": "PORT", "help": "port to listen on (4141)"}),
    (("--host",), {"dest": "host", "help": "address to listen on (127.0.0.1)"}),
    (("-v", "--verbose"), {"dest": "verbose", "action": "store_true", "default": None, "help": "debug lines, handler logs"}),
    (("-a", "--account-type"), {"dest": "accountType", "choices": ("individual", "business", "enterprise"), "help": "kind of Copilot plan"}),
    (("--demo",), {"dest": "demo", "action": "store_true", "help": "a built-in model, no account and no network"}),
    (("--manual",), {"dest": "manualApprove", "action": "store_true", "default": None, "help": "ask before every request"}),
    (("-r", "--rate-limit"), {"dest": "rateLimitSeconds", "metavar": "SECONDS", "help": "least time between two requests"}),
    (("-w", "--wait"), {"dest": "rateLimitWait", "action": "store_true", "default": None, "help": "wait instead of refusing"}),
    (("-g", "--github-token"), {"dest": "github_token", "metavar": "TOKEN", "help": "use this token, store nothing"}),
    (("--show-token",), {"dest": "showToken", "action": "store_true", "default": None, "help": "print tokens"}),
    (("--proxy-env",), {"dest": "proxyEnv", "action": "store_true", "default": None, "help": "use HTTP_PROXY and its kin"}),
    (("--log-file",), {"dest": "logFile", "metavar": "PATH", "help": "write every request and answer here"}),
)
LOGIN_OPTIONS: Tuple[Tuple[Tuple[str, ...], Json], ...] = (
    (("--provider",), {"dest": "provider", "help": "whom to sign in with (copilot)"}),
    (("-v", "--verbose"), {"dest": "verbose", "action": "store_true", "default": None, "help": "debug lines"}),
    (("--show-token",), {"dest": "showToken", "action": "store_true", "default": None, "help": "print tokens"}),
)
JSON_OPTION: Tuple[Tuple[Tuple[str, ...], Json], ...] = ((("--json",), {"dest": "json", "action": "store_true", "help": "as JSON"}),)
COMMAND_OPTIONS: Dict[str, Tuple[Tuple[Tuple[str, ...], Json], ...]] = {
    "start": START_OPTIONS, "auth": LOGIN_OPTIONS, "auth login": LOGIN_OPTIONS, "check-usage": LOGIN_OPTIONS,
    "debug": JSON_OPTION, "info": JSON_OPTION,
    "config": ((("--defaults",), {"dest": "defaults", "action": "store_true", "help": "every name and its default"}),),
}
USAGE = "copilot_proxy.py [--api-home DIR] [--oauth-app NAME] [--enterprise-url DOMAIN] COMMAND [options]"


def parse_command(args: Sequence[str]) -> Tuple[str, List[str]]:
    """(command, its arguments): one word, or two where the table has both."""
    two = " ".join(args[:2])
    if two in COMMANDS and len(args) > 1:
        return two, list(args[2:])
    return (args[0], list(args[1:])) if args else ("", [])


def overview() -> str:
    """What `--help` shows."""
    lines = [f"usage: {USAGE}", "", "commands:"]
    lines += [f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "`COMMAND --help` lists its options; `config --defaults` lists every setting."])


def parse_options(command: str, args: Sequence[str]) -> Any:
    """The options of a command; a wrong one ends the program with status 2, as argparse does."""
    import argparse  # 1.4 ms; everything else starts without it
    parser = argparse.ArgumentParser(prog=f"copilot_proxy.py {command}", description=COMMANDS[command][1], allow_abbrev=False)
    for names, keywords in COMMAND_OPTIONS.get(command, ()):
        parser.add_argument(*names, **keywords)
    return parser.parse_args(list(args))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one command; the exit status is 0, 1 at run time, 2 for a refused configuration."""
    env = dict(os.environ)
    args = take_global_options(sys.argv[1:] if argv is None else argv, env)
    if args and args[0] in ("--version", "-V"):
        print(VERSION)
        return EXIT_OK
    if not args or args[0] in ("--help", "-h", "help"):
        print(overview())
        return EXIT_OK if args else EXIT_REFUSED
    command, rest = parse_command(args)
    if command not in COMMANDS:
        print(f"unknown command {command!r}\n\n{overview()}", file=sys.stderr)
        return EXIT_REFUSED
    options = parse_options(command, rest)
    known = {key for key, _, _, _ in SETTINGS}
    flags = {name: value for name, value in vars(options).items() if name in known}
    try:
        return COMMANDS[command][0](Setup(env, flags), options)
    except SetupError as error:
        print(error.message, file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
