"""What a tokenizer puts before and after a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapeout.errors import ModelError


def around(
    post: Mapping[str, Any] | None, config: Mapping[str, Any], special: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """Ids before and after a text: from the post-processor, unless tokenizer_config.json says otherwise.

    Raises:
        ModelError: the post-processor is of a kind that llama.cpp does not know.
    """
    before, after = _template(post)
    if (
        "add_bos_token" in config or "add_eos_token" in config
    ):  # transformers makes a new post-processor of them
        before = [special["bos"]] if config.get("add_bos_token") and "bos" in special else []
        after = [special["eos"]] if config.get("add_eos_token") and "eos" in special else []
    return before, after


def _template(post: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    if post is None or post["type"] == "ByteLevel":
        return [], []
    if post["type"] == "Sequence":
        parts = [_template(part) for part in post["processors"]]
        return [i for before, _ in parts for i in before], [i for _, after in parts for i in after]
    if post["type"] in ("RobertaProcessing", "BertProcessing"):
        return [post["cls"][1]], [post["sep"][1]]
    if post["type"] != "TemplateProcessing":
        raise ModelError(
            f"tokenizer.json has the post-processor {post['type']}, which llama.cpp does not know."
        )
    sides: tuple[list[int], list[int]] = ([], [])
    seen_text = False
    for piece in post["single"]:
        if "Sequence" in piece:
            seen_text = True
        else:
            sides[seen_text].extend(post["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return sides
