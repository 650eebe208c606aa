"""From the body of a request to what is asked for, or the error that names the field.

A body is a stranger's: types, counts and sizes are looked at before any work is done with them. What changes the
answer and is not supported is refused by its name, and so is what nobody knows: a misspelt option that is ignored
costs its user an afternoon. Ranges are `SamplingParams`' and the engine's matter.

Source: OpenAI's API reference, "Chat" and "Completions"; further fields by vLLM's names.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..sampling import SamplingParams
from . import bodies
from .errors import ApiError, of_value

__all__ = ["Asked", "parse", "read_chat", "read_completion", "read_fields"]

MAX_N, MAX_LOGPROBS = 128, 20
MAX_STOP_LENGTH = 512  # characters of all strings: each token's text is compared with all of them

SAMPLING = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "n", "stop", "stop_token_ids", "max_tokens", "min_tokens", "ignore_eos", "logit_bias", "structured_outputs",
}  # fmt: skip
COMMON = SAMPLING | {
    "model", "stream", "stream_options", "logprobs", "response_format", "priority", "cache_salt", "timeout",
}  # fmt: skip
CHAT = COMMON | {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
COMPLETION = COMMON | {"prompt", "echo"}
WITHOUT_EFFECT = {"user", "metadata", "safety_identifier", "prompt_cache_key"}  # on what is generated
# What is not supported may be there as long as it asks for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none",), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none",), "modalities": (["text"],), "audio": (), "suffix": ("",), "best_of": (1,),
    "store": (False,), "service_tier": ("auto", "default"), "chat_template": (), "add_generation_prompt": (True,),
    "documents": ([],), "reasoning_effort": (), "prediction": (), "web_search_options": (), "use_beam_search": (False,),
}  # fmt: skip
RENAMED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}


@dataclass(frozen=True)
class Asked:
    """What a request asks for. prompts: text or token ids; or a conversation in `messages`, with `variables` for the
    template. logprobs: how many candidates to report. only_prompt: no token is wanted (max_tokens = 0).
    timeout: seconds until the client does not want the answer any more.
    """

    params: SamplingParams
    model: str | None = None
    prompts: list[str | list[int]] = field(default_factory=list)
    messages: list[dict[str, Any]] | None = None
    variables: dict[str, bool] = field(default_factory=dict)
    stream: bool = False
    include_usage: bool = False  # in one more chunk at the end
    continuous_usage: bool = False  # and in each
    echo: bool = False
    only_prompt: bool = False
    logprobs: int | None = None
    priority: int = 0
    cache_salt: str = ""
    timeout: float | None = None


def parse(body: bytes | bytearray) -> dict[str, Any]:
    """JSON -> its object. Raises ApiError as `bodies.parse` raises Refused."""
    try:
        return bodies.parse(body)
    except bodies.Refused as error:
        raise ApiError(400, error.message, error.param) from None


def read_fields(body: dict[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are given, each of its kind; None counts as not given. Raises ApiError for one that is not in
    `kinds`, or of another kind.
    """
    given = {name: value for name, value in body.items() if value is not None and name not in WITHOUT_EFFECT}
    for name, value in given.items():
        if name not in kinds and value not in NOTHING.get(name, ()):
            raise _refusal(name, kinds)
        kind = kinds.get(name)
        if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise ApiError(400, f"{name}: expected {SAID[kind]}, got {_kind(value)}", name)
    return {name: value for name, value in given.items() if name in kinds}


def read_chat(body: dict[str, Any], defaults: Mapping[str, Any]) -> Asked:
    """A body of /v1/chat/completions. defaults: sampling parameters that the caller need not give."""
    given = read_fields(body, dict.fromkeys(CHAT) | KINDS | {"logprobs": bool, "messages": list})
    if not given.get("messages"):
        raise ApiError(400, 'messages: expected a list of {"role": ..., "content": ...}, at least one', "messages")
    logprobs = given.get("top_logprobs", 0) if given.get("logprobs") else None
    if logprobs is None and given.get("top_logprobs"):
        raise ApiError(400, "top_logprobs: expected none without logprobs: true", "top_logprobs")
    if "max_completion_tokens" in given:
        given["max_tokens"] = given["max_completion_tokens"]
    return Asked(
        _params(given, {"max_tokens": 2**31, **defaults}, _count("top_logprobs", logprobs)),
        messages=[_message(i, m) for i, m in enumerate(given["messages"])], logprobs=logprobs,
        variables=_variables(given.get("chat_template_kwargs", {})), **_common(given),
    )  # fmt: skip


def read_completion(body: dict[str, Any], defaults: Mapping[str, Any], most: int) -> Asked:
    """A body of /v1/completions, with at most so many prompts."""
    given = read_fields(body, dict.fromkeys(COMPLETION) | KINDS | {"logprobs": int, "echo": bool})
    logprobs, echo = _count("logprobs", given.get("logprobs")), given.get("echo", False)
    only_prompt = echo and given.get("max_tokens") == 0 and type(given["max_tokens"]) is int
    if only_prompt:
        given["max_tokens"] = 1  # it is not shown
    return Asked(
        _params(given, defaults, logprobs, of_prompt=echo), prompts=_prompts(given.get("prompt"), most),
        echo=echo, only_prompt=only_prompt, logprobs=logprobs, **_common(given),
    )  # fmt: skip


# ---- fields --------------------------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "model": str, "stream": bool, "stream_options": dict, "response_format": dict, "priority": int, "cache_salt": str,
    "timeout": int | float, "max_completion_tokens": int, "top_logprobs": int, "chat_template_kwargs": dict,
    "structured_outputs": dict, "logit_bias": dict, "n": int, "stop": str | list, "stop_token_ids": list,
}  # fmt: skip
SAID: dict[Any, str] = {str: "text", bool: "true or false", int: "an integer", dict: "an object", list: "a list"}
SAID |= {int | float: "a number", str | list: "text or a list"}


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {value!r:.40}"


def _refusal(name: str, known: Mapping[str, Any]) -> ApiError:
    if name in RENAMED:
        wanted = f'{{"structured_outputs": {{"{RENAMED[name]}": ...}}}}'
        told = "grammars are not supported" if name == "guided_grammar" else f"write {wanted}"
        return ApiError(400, f"{name}: {told}", name, "unsupported_parameter")
    if name in NOTHING:
        return ApiError(400, f"{name}: not supported by this server; leave it out", name, "unsupported_parameter")
    near = difflib.get_close_matches(name[:40], known, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return ApiError(400, f"{name[:40]!r}: no such field{meant}", name[:40], "unknown_parameter")


def _count(name: str, value: int | None) -> int | None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise ApiError(400, f"{name}: expected 0 to {MAX_LOGPROBS}, got {value}", name)
    return value


def _common(given: dict[str, Any]) -> dict[str, Any]:
    options, stream = given.get("stream_options"), given.get("stream", False)
    if options is not None and not stream:
        raise ApiError(400, "stream_options: expected none without stream: true", "stream_options")
    known = dict.fromkeys(("include_usage", "include_obfuscation", "continuous_usage_stats"), bool)
    wanted = read_fields(options or {}, known)
    usage = wanted.get("include_usage", False)
    timeout = given.get("timeout")
    if timeout is not None and not 0 < timeout < 1e6:
        raise ApiError(400, f"timeout: expected seconds, more than 0, got {timeout}", "timeout")
    if not -(2**31) <= given.get("priority", 0) < 2**31:
        raise ApiError(400, "priority: expected an integer of 32 bits", "priority")
    passed: dict[str, Any] = {name: given[name] for name in ("model", "priority", "cache_salt") if name in given}
    passed["continuous_usage"] = usage and wanted.get("continuous_usage_stats", False)
    return {"stream": stream, "include_usage": usage, "timeout": timeout, **passed}


def _params(
    given: dict[str, Any], defaults: Mapping[str, Any], logprobs: int | None, of_prompt: bool = False
) -> SamplingParams:
    _bounded(given)
    wanted = {name: given[name] for name in SAMPLING if name in given}
    if "logit_bias" in wanted:
        wanted["logit_bias"] = _biases(wanted["logit_bias"])
    if "structured_outputs" in wanted:
        read_fields(wanted["structured_outputs"], dict.fromkeys(("json", "regex", "choice")))
    if (form := _form(given.get("response_format"))) is not None:
        if "structured_outputs" in wanted:
            raise ApiError(400, "response_format: expected none beside structured_outputs", "response_format")
        wanted["structured_outputs"] = {"json": form}
    try:
        return SamplingParams(
            **{**defaults, **wanted}, logprobs=logprobs, prompt_logprobs=logprobs if of_prompt else None
        )
    except (TypeError, ValueError) as error:
        raise of_value(error) from None


def _bounded(given: dict[str, Any]) -> None:
    if given.get("n", 1) > MAX_N:
        raise ApiError(400, f"n: expected at most {MAX_N}, got {given['n']}", "n")
    stop = given.get("stop", "")
    characters = sum([len(s) for s in ([stop] if isinstance(stop, str) else stop) if isinstance(s, str)])
    if characters > MAX_STOP_LENGTH:
        raise ApiError(400, f"stop: expected at most {MAX_STOP_LENGTH} characters, got {characters}", "stop")


def _biases(given: dict[str, Any]) -> dict[int, Any]:
    try:
        biases = {int(token): value for token, value in given.items() if token.isascii() and token.isdigit()}
    except ValueError:  # more digits than Python reads
        biases = {}
    if len(biases) < len(given) or not all(type(v) in (int, float) and -100 <= v <= 100 for v in biases.values()):
        raise ApiError(400, "logit_bias: expected token ids as keys and numbers from -100 to 100", "logit_bias")
    return biases


def _form(form: dict[str, Any] | None) -> Any:
    """The JSON schema that a response_format stands for; None for any text."""
    if form is None:
        return None
    match form.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema" if isinstance(inner := form.get("json_schema"), dict) and "schema" in inner:
            return inner["schema"]
    raise ApiError(
        400,
        'response_format: expected {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema":'
        ' {"schema": ...}}',
        "response_format",
    )


def _message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f'{where}: expected {{"role": ..., "content": ...}}, got {_kind(message)}', "messages")
    for name in ("tool_calls", "tool_call_id", "function_call", "audio"):
        if message.get(name):
            raise ApiError(400, f"{where}.{name}: tools and audio are not supported", "messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join([_part(where, part) for part in content])
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.content: expected text or a list of parts, got {_kind(content)}", "messages")
    passed = {name: message[name] for name in ("name", "reasoning_content") if isinstance(message.get(name), str)}
    return {"role": message["role"], "content": content, **passed}


def _part(where: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise ApiError(400, f'{where}.content: expected parts of type "text", got {_kind(kind)}', "messages")


def _variables(given: dict[str, Any]) -> dict[str, bool]:
    """Switches of a template, such as Qwen3's enable_thinking: a template is a program, and gets no more to work on."""
    own = {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}
    if bad := [n for n, value in given.items() if not isinstance(value, bool) or n in own or not n.isidentifier()]:
        raise ApiError(400, f"chat_template_kwargs: {bad[0][:40]!r}: expected switches, true or false")
    return given


def _prompts(prompt: Any, most: int) -> list[str | list[int]]:
    """OpenAI's four forms: text, a list of texts, token ids, a list of lists of token ids."""
    prompts = [prompt] if isinstance(prompt, str) or _are_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts:
        raise ApiError(400, f"prompt: expected text, token ids, or a list of them, got {_kind(prompt)}", "prompt")
    if len(prompts) > most:
        raise ApiError(400, f"prompt: expected at most {most} in one request, got {len(prompts)}", "prompt")
    texts = [isinstance(one, str) for one in prompts]
    if not all(texts) and (any(texts) or not all([_are_ids(one) for one in prompts])):
        raise ApiError(400, "prompt: expected all text or all lists of token ids, none empty", "prompt")
    return prompts


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all([type(one) is int for one in value])
