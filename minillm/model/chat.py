"""Chat templates: a list of messages becomes the text that the model was trained on.

A template is a Jinja program that came with the model, from a stranger. It runs in Jinja's sandbox, with the settings,
the variables and the tags that transformers gives it.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..extras import require

__all__ = ["ChatFormat"]

REASONING = ("reasoning_content", "thinking", "reasoning")  # names that one field of a message goes by


class ChatFormat:
    """What a tokenizer knows about conversations.

    chat_template: Jinja source; or several, {name: source}; or None. named_tokens: {"bos_token": "<s>", ...}, which
    the template may use by these names.
    """

    chat_template: str | dict[str, str] | None
    named_tokens: dict[str, str]

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any] | Callable] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for [{"role": ..., "content": ...}, ...], in the form that the model was trained on.

        tools: JSON schemas, or functions with type hints and a docstring, for templates that offer tools.
        chat_template: another Jinja source, or the name of one of several. `variables` reach the template (Qwen3:
        `enable_thinking=False`). Fields that are None are left out, as transformers does. Raises ValueError for
        messages that the template cannot render, and when there is no template.
        """
        dicts = isinstance(messages, list | tuple) and all(isinstance(message, dict) for message in messages)
        if not dicts or not messages:
            raise ValueError(f'messages: expected a list of {{"role": ..., "content": ...}}, got {messages!r}')
        known = {"tools": _schemas(tools), "documents": documents, "add_generation_prompt": add_generation_prompt}
        known |= {"messages": [_message(message) for message in messages]}
        template = _template(self._choose(chat_template, tools))
        try:
            return template.render({**self.named_tokens, **known, **variables})
        except Exception as e:  # a program of a stranger's, on input of another shape: anything may be raised
            raise ValueError(f"messages: the chat template cannot render them ({type(e).__name__}: {e})") from e

    def _choose(self, wanted: str | None, tools: Any) -> str:
        """The source of the template to use."""
        several = self.chat_template if isinstance(self.chat_template, dict) else {}
        if wanted is not None:
            return several.get(wanted, wanted)
        if isinstance(self.chat_template, str):
            return self.chat_template
        if tools is not None and "tool_use" in several:
            return several["tool_use"]
        if "default" in several:
            return several["default"]
        if several:
            raise ValueError(f"chat_template: expected one of the names {sorted(several)}, as none is the default")
        raise ValueError("chat_template: this tokenizer has none; give it one, or encode a plain prompt")


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that are None, and with what the model thought under the two names that templates read."""
    given = {name: value for name, value in message.items() if value is not None}
    thoughts = next((given[name] for name in REASONING if name in given), None)
    return given if thoughts is None else {"thinking": thoughts, **given, "reasoning_content": thoughts}


def _schemas(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not all(isinstance(tool, dict) or callable(tool) for tool in tools):
        raise ValueError(f"tools: expected a list of JSON schemas or functions, got {tools!r}")
    if all(isinstance(tool, dict) for tool in tools):
        return list(tools)
    require("transformers", "transformers")
    from transformers.utils import get_json_schema

    return [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]


@lru_cache(maxsize=16)
def _template(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: marks what the assistant said, for training; rendered as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            from jinja2.nodes import Scope

            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    jinja.filters["tojson"] = lambda value, ensure_ascii=False, **options: json.dumps(
        value, ensure_ascii=ensure_ascii, **options
    )
    jinja.globals |= {"raise_exception": _refuse, "strftime_now": time.strftime}
    try:
        return jinja.from_string(source)
    except TemplateError as e:
        raise ValueError(f"chat_template: not a Jinja template ({type(e).__name__}: {e})") from e


def _refuse(message: str) -> None:
    """What a template calls when messages break its rules."""
    raise ValueError(message)
