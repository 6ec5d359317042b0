"""Chat templates render to what transformers' ``apply_chat_template`` gives."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from tapeout.errors import ModelError
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.models.chat import _render, render, special_tokens

transformers = pytest.importorskip("transformers")

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# Indented blocks, a namespace, loop controls, and the whitespace that trim_blocks and lstrip_blocks decide on.
NAMESPACE = """{{- bos_token }}
{%- set ns = namespace(turns=0, system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content | trim %}
        {%- continue %}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- if ns.turns > 3 %}
        {%- break %}
    {%- endif %}
  {% if loop.last %}
<last>
  {% endif %}
[{{ ns.turns }} {{ message.role | upper }}] {{ message.content }}{{ eos_token }}
{%- endfor %}
{{ ns.system }}
{% if add_generation_prompt %}
>
{% endif %}
"""

# What templates for tools do with the list that nobody gave.
TOOLS = """{% if tools %}{{ tools | tojson }}{% endif %}{% if documents is defined and documents %}documents{% endif %}
{{- messages | tojson }}
{{ messages[0] | tojson(indent=2) }}{{ pad_token | default('no pad') }}{{ unk_token is defined }}"""

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first_user_prefix = messages[0]['content'] + '\n\n' %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set first_user_prefix = '' %}{% set loop_messages = messages %}"
    "{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "(first_user_prefix if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# A thought is cut off the answer, as Qwen 3 and DeepSeek R1 do, by Python's own string methods.
THINKING = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last == messages|length - 1 %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<|im_start|>assistant\n<think>\n' + content.rstrip('\n') + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama-2": LLAMA_2,
    "namespace": NAMESPACE,
    "tools": TOOLS,
    "llama-3": LLAMA_3,
    "gemma": GEMMA,
    "phi-3": PHI_3,
    "thinking": THINKING,
}

USER = {"role": "user", "content": "What is 6 × 7? <b>&amp; 'quotes' \"two\"</b>"}
ASSISTANT = {"role": "assistant", "content": " 42 \n"}
SYSTEM = {"role": "system", "content": "\nYou are brief: 简短 🙂.  "}
CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ASSISTANT, {"role": "user", "content": ""}],
    "thought": [USER, {"role": "assistant", "content": "<think>\n6 × 7\n</think>\n\n42"}, USER],
    "system-turns": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose beginning is an added token with its own properties, and whose end is a plain string."""
    directory = write_model(tmp_path_factory.mktemp("chat") / "model")
    path = directory / "tokenizer_config.json"
    added = {"__type": "AddedToken", "content": "<eos>", "lstrip": True, "special": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": added, "eos_token": "<eos>"}))
    return directory


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)


def both(tokenizer: Any, model: Path, template: str, messages: Any, prompt: bool = True) -> tuple[str, str]:
    """What we render, and what transformers does."""
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    # In this process: one of its own for each of them takes a quarter of a second.
    tokens = special_tokens(load(model).tokenizer_config)
    return _render(template, {**tokens, "messages": messages, "add_generation_prompt": prompt}), expected


@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_rendered_as_transformers_does(
    tokenizer: Any, model: Path, template: str, messages: list[dict[str, str]], prompt: bool
) -> None:
    found, expected = both(tokenizer, model, template, messages, prompt)
    assert found == expected
    assert all(message["content"].strip()[:4] in found for message in messages[:1])


def test_the_generation_prompt_is_the_templates_own() -> None:
    assert render(CHATML, [USER], {}).endswith("<|im_start|>assistant\n")
    assert not render(CHATML, [USER], {}, add_generation_prompt=False).endswith("<|im_start|>assistant\n")


def test_nothing_is_escaped_for_html() -> None:
    assert (
        render("{{ messages[0].content }}{{ messages | tojson }}", [USER], {}).count("<b>&amp; 'quotes'") == 2
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson(ensure_ascii=False) }}",
        "{{ messages | tojson(ensure_ascii=True) }}",
        "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}.",
    ],
)
def test_what_templates_may_use(tokenizer: Any, model: Path, template: str) -> None:
    found, expected = both(tokenizer, model, template, CONVERSATIONS["system-turns"])
    assert found == expected


def test_today() -> None:
    before = datetime.now().astimezone().strftime("%d %b %Y %z")
    found = render("{{ strftime_now('%d %b %Y %z') }}", [USER], {})
    assert found in (before, datetime.now().astimezone().strftime("%d %b %Y %z"))


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (LLAMA_2, [ASSISTANT], "roles must alternate"),
        ("{% if %}", [USER], "Expected an expression"),
        ("{{ messages[0].nobody.content }}", [USER], "has no attribute 'nobody'"),
        ("{{ messages.append(1) }}", [USER], "unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", [USER], "unsafe"),
        pytest.param(
            "{{ messages[0].content + 1 }}",
            [USER],
            "str",
        ),
        pytest.param(
            "{{ 1 // 0 }}",
            [USER],
            "zero",
        ),
    ],
)
def test_a_template_that_cannot_be_rendered(
    template: str, messages: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(ModelError, match=f"the chat template cannot render this conversation: .*({message})"):
        render(template, messages, {})


def test_special_tokens_as_strings_and_as_objects(tokenizer: Any, model: Path) -> None:
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "pad_token": None,
        "unk_token": {"content": "<unk>"},
        "model_max_length": 12,
    }
    assert special_tokens(config) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert special_tokens({}) == {}
    assert special_tokens(load(model).tokenizer_config) == tokenizer.special_tokens_map


def test_the_rarer_special_tokens() -> None:
    config = {"sep_token": "[SEP]", "cls_token": "[CLS]", "mask_token": {"content": "[MASK]"}}
    assert special_tokens(config) == {"sep_token": "[SEP]", "cls_token": "[CLS]", "mask_token": "[MASK]"}


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for a in range(10**9) %}a{% endfor %}", "Range too big"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "was stopped"),
        ("{{ 'a' * 10**10 }}", "MemoryError|was stopped"),
        ("{{ ('a' * 10**6) ~ ('b' * 10**6) }}", "more than 1048576 characters"),
        ("{% for a in range(99999) %}{{ 'b' * 99 }}{% endfor %}", "more than 1048576 characters"),
        ("{{ 10 ** (10 ** 10) }}", "was stopped"),
        ("{{ '%1000000000d' % 1 }}", "MemoryError|was stopped|more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion|was stopped|too many nested"),
        ("a" * (1 << 20) + "b", "it has 1048577 characters"),
    ],
    ids=["range", "loops", "memory", "length", "pieces", "power", "format", "macro", "nested", "long"],
)
def test_a_template_that_means_harm_is_stopped(template: str, why: str) -> None:
    before = perf_counter()
    with pytest.raises(
        ModelError, match=f"the chat template cannot render this conversation: .*({why})"
    ) as told:
        render(template, [USER], {})
    assert perf_counter() - before < 30  # two seconds of a core; the machine has others to serve
    assert len(str(told.value)) < 2200


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_a_template_reaches_nothing_but_its_arguments(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, or an attribute that does not exist: nothing of the process is shown and nothing is done."""
    monkeypatch.chdir(tmp_path)
    try:
        found = render(template, [USER], {})
    except ModelError:
        found = ""
    assert not re.search("<(class|module|function|jinja)|root:", found)
    assert list(tmp_path.iterdir()) == []
