"""Chat templates, rendered as transformers renders them: sandboxed Jinja with a few helpers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

from tapeout.errors import ModelError

_CHARACTERS = 1 << 20
"""Most that a template may have, and make: the longest of a published model has 30 thousand."""
_CPU_S, _WALL_S, _MEMORY_BYTES = 2, 60, 1 << 30


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

    It is a stranger's program, so it runs in a process of its own: sandboxed (nothing but its arguments is in reach), with limits of time,
    memory and length that no honest template comes near.

    Raises:
        ModelError: the template is not valid Jinja, refuses the conversation, or runs into a limit.
    """
    given = {
        "template": template,
        "names": {**special_tokens, "messages": [*messages], "add_generation_prompt": add_generation_prompt},
    }
    refused = "the chat template cannot render this conversation"
    if len(template) > _CHARACTERS:
        raise ModelError(
            f"{refused}: it has {len(template)} characters, and {_CHARACTERS} are enough for any."
        )
    try:
        # -P: this file's folder, whose names are those of other packages, is not searched.
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=_WALL_S,
        )
        answer = json.loads(done.stdout)
    except (ValueError, subprocess.TimeoutExpired):  # killed, or it died of what it was given
        raise ModelError(
            f"{refused}: it was stopped, since it took more than {_CPU_S} seconds or {_MEMORY_BYTES >> 20} MiB, which no honest template does."
        ) from None
    if "error" in answer:
        raise ModelError(f"{refused}: {answer['error']}.")
    return str(answer["text"])


def _render(template: str, names: Mapping[str, Any]) -> str:
    """Render within this process's limits; any exception that a template's own code can raise."""
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
    pieces, length = [], 0
    for piece in environment.from_string(template).generate(tools=None, documents=None, **names):
        length += len(piece)
        if length > _CHARACTERS:
            raise jinja2.TemplateError(f"it makes more than {_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


def _answer() -> None:
    """What the process of its own does: reads a template and its names, writes the text or why there is none."""
    import resource

    given = json.loads(sys.stdin.buffer.read())
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        "RLIMIT_CPU": int(used.ru_utime + used.ru_stime) + _CPU_S,
        "RLIMIT_AS": _MEMORY_BYTES,
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": 0,
    }
    for name, value in limits.items():
        with suppress(ValueError, OSError):  # macOS knows no limit of addresses
            resource.setrlimit(getattr(resource, name), (value, value))
    try:
        answer = {"text": _render(given["template"], given["names"])}
    except Exception as error:  # a template's own code raises whatever Python does
        answer = {"error": (str(error) or type(error).__name__)[:2000]}
    sys.stdout.write(json.dumps(answer))


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a template may name, from ``tokenizer_config.json``."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = tokenizer_config.get(name)
        if token is not None:
            found[name] = str(token["content"] if isinstance(token, Mapping) else token)
    return found


if __name__ == "__main__":
    _answer()
