"""Runs in the worker environment ``optimum``, as a script: a Hugging Face directory in, its ONNX graph and facts out.

Nothing of tapeout is there: this file stands alone. Arguments: the model's directory, and an empty one.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

TASK = "text-generation-with-past"


def main(model: Path, out: Path) -> None:
    """Export, float32, and say what the configuration says."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from optimum.exporters.onnx import main_export
    from transformers import AutoConfig

    main_export(
        str(model),
        out,
        task=TASK,
        device="cpu",
        do_validation=False,
        no_post_process=True,
        local_files_only=True,
    )
    config: Any = AutoConfig.from_pretrained(model, local_files_only=True)

    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    facts = {
        "max_position_embeddings": first(
            "max_position_embeddings", "max_seq_len", "n_positions", "seq_length"
        ),
        "vocab_size": first("vocab_size"),
        "hidden_size": first("hidden_size"),
        "num_layers": first("num_hidden_layers"),
        "num_heads": first("num_attention_heads"),
        "eos_token_id": first("eos_token_id"),
        "bos_token_id": first("bos_token_id"),
        "pad_token_id": first("pad_token_id"),
    }
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
