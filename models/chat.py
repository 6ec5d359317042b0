"""Chat templates, rendered as transformers renders them: sandboxed Jinja with a few helpers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from tapeout.errors import ModelError


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render a conversation to the text that the model expects.

    Args:
        template: the Jinja source of the model's chat template.
        messages: turns with ``role`` and ``content``.
        special_tokens: ``bos_token``, ``eos_token``, … as ``tokenizer_config.json`` names them.
        add_generation_prompt: end with the words that begin the assistant's turn.

    Raises:
        ModelError: the template is not valid Jinja, or refuses the conversation.
    """
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    class Generation(Extension):
        """``{% generation %}``: marks what training learns from; its body is rendered as it stands."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own way

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    # Not Jinja's own filter, which escapes for HTML.
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **{"ensure_ascii": False, **options}
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except Exception as error:  # a template's own code raises whatever Python does
        raise ModelError(f"the chat template cannot render this conversation: {error}.") from error


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a template may name, from ``tokenizer_config.json``."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = tokenizer_config.get(name)
        if token is not None:
            found[name] = str(token["content"] if isinstance(token, Mapping) else token)
    return found
