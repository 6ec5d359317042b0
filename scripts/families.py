"""Every family × format × scheme on targets ``cpu``, ``apple``, ``rocm`` and ``nvidia``: are the codes in the file, and does the runtime compute the model?

    .venv/bin/python scripts/families.py [--out docs/families.md]

Writes the table and ends with 1 when a gate failed. ``tests/conformance/test_families.py`` runs every cell again.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tapeout.build import target
from tapeout.conformance import lowered
from tapeout.errors import ModelError, SchemeError
from tapeout.exporters import Refused
from tapeout.generated import ENCODERS, write_model
from tapeout.models import DecoderConfig, Model, load
from tapeout.quantize import SCHEMES, Quantized, quantize

FORMATS = (
    "gguf", "onnx", "coreml", "compressed-tensors", "bitsandbytes", "migraphx", "modelopt", "trtllm", "onnx-trt",
)  # fmt: skip
_TARGETS = {
    "coreml": "apple",
    **dict.fromkeys(("compressed-tensors", "bitsandbytes", "migraphx"), "rocm"),
    **dict.fromkeys(("modelopt", "trtllm", "onnx-trt"), "nvidia"),
}
"""The others are cpu's."""
SHOWN = ("int8", "int4-g32", "int4-g128", "nf4", "none")
# Every row of a weight is whole groups of 128.
_WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
_EXPERTS: dict[str, Any] = _WIDE | {"moe_intermediate_size": 128}
_LATENT: dict[str, Any] = _EXPERTS | {
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-6,  # GGUF has one epsilon for all norms, and that of the latents is fixed
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 16 for i in range(8)],
    "long_factor": [2.0 + i / 2 for i in range(8)],
    "original_max_position_embeddings": 256,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _WIDE),
    "llama, llama3 RoPE": ("llama", _WIDE | {"rope_scaling": _LLAMA3, "tie_word_embeddings": True}),
    "llama, linear RoPE": ("llama", _WIDE | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama, YaRN": ("llama", _WIDE | {"rope_scaling": _YARN}),
    "llama, LongRoPE": ("llama", _WIDE | {"rope_scaling": _LONG, "max_position_embeddings": 1024}),
    "llama, dynamic RoPE": (
        "llama",
        _WIDE | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "mistral, window": ("mistral", _WIDE | {"sliding_window": 24, "num_key_value_heads": 1}),
    "mixtral": ("mixtral", _WIDE),
    "gemma": ("gemma", _WIDE),
    "gemma2": ("gemma2", _WIDE | {"query_pre_attn_scalar": 16}),
    "gemma2, another attention scale": ("gemma2", _WIDE),
    "gemma3_text": ("gemma3_text", _WIDE | {"query_pre_attn_scalar": 16}),
    "phi3": ("phi3", _WIDE | {"num_key_value_heads": 8}),
    "phi3, LongRoPE": ("phi3", _WIDE | {"rope_scaling": _LONG, "max_position_embeddings": 1024}),
    "qwen2": ("qwen2", _WIDE),
    "qwen3": ("qwen3", _WIDE),
    "qwen2_moe": ("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 128}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "deepseek_v2": ("deepseek_v2", _LATENT | {"topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "deepseek_v2, groups of experts": ("deepseek_v2", _LATENT),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "t5": ("t5", {"d_model": 128, "d_ff": 256, "num_heads": 8, "d_kv": 16}),
    "t5, v1.1": (
        "t5",
        {
            "d_model": 128,
            "d_ff": 256,
            "num_heads": 8,
            "d_kv": 16,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
    **{name: (name, {"dim": 128, "hidden_dim": 256} if name == "distilbert" else _WIDE) for name in ENCODERS},
}
"""Rows of the table: a family, and fields of its config."""
# Those of the same codes behind one another: what the reference says of them is asked once.
CELLS = [(row, form, scheme) for row in MODELS for scheme in SHOWN for form in FORMATS]

# Past the sliding window; a prompt of one token; an odd length.
SEQUENCES = [
    [(i * i * 7 + i * 31 + j * 13) % 256 for i in range(length)]
    for j, length in enumerate((61, 1, 64, 64, 64))
]
HEAD = """\
# Every family × format × scheme, for each target and each of its formats

Made by `python scripts/families.py`, and held by `tests/conformance/test_families.py`, which runs every cell: a random model of the family
(rows of 128, norms and biases spread) is quantized, exported, read back with the format owner's library bit for bit, and run on the
format's runtime. A cell holds the largest logit difference (of an encoder: of its states or class logits) between the runtime and
`transformers` with the same codes, in units of the standard deviation and before the runtime rounds inputs, and after the comma what
the runtime's own rounding costs as a share of its limit. Core ML packages run on our interpreter of the saved program, not on Apple
hardware, directories and rank checkpoints of `rocm` and `nvidia` on transformers, graphs for TensorRT and MIGraphX on onnxruntime, all
on a CPU, not on a GPU. Modules of IREE take two compilations a cell and are tested apart ([rocm](rocm.md)). Bounds: [gates](gates.md).

"""


@cache
def _model(row: str, shared: Path) -> Model:
    family, fields = MODELS[row]
    return load(write_model(shared / row / "model", family, fields, dtype="F32"))


@cache
def _codes(row: str, scheme: str, shared: Path) -> Quantized:
    return quantize(_model(row, shared), scheme, out=shared / row / scheme)


def cell(row: str, form: str, scheme: str, work: Path, shared: Path) -> str:
    """What the gates say of one cell.

    Args:
        work: an empty directory.
        shared: a directory for models and their codes, the same for every cell: all formats are given the same codes.
    """
    name, options = _TARGETS.get(form, "cpu"), {} if form == "coreml" else {"format": form}
    # One thread: a model so small is done before two have met.
    device = target(name, **options, **({"threads": 1} if name == "cpu" else {}))
    if isinstance(carry := device.carries(SCHEMES[scheme]), Refused):
        return f"refused: {carry.reason}"
    quant = _codes(row, scheme, shared)
    try:
        return lowered(
            device, quant, work, SEQUENCES if isinstance(quant.model.config, DecoderConfig) else None
        )
    except (ModelError, SchemeError) as error:
        return f"refused: {error}"


def table(cells: dict[tuple[str, str, str], str]) -> str:
    """The table; what is refused whatever the scheme takes one cell a format."""
    lines = [
        f"| family | {' | '.join(f'{form} `{scheme}`' for form in FORMATS for scheme in SHOWN)} |",
        f"|{' --- |' * (1 + len(FORMATS) * len(SHOWN))}",
    ]
    notes: list[str] = []
    for row in MODELS:
        shown = []
        for form in FORMATS:
            for scheme in SHOWN:
                said = cells[row, form, scheme]
                if said.startswith("refused: "):
                    if (reason := said.removeprefix("refused: ")) not in notes:
                        notes.append(reason)
                    said = f"refused ({notes.index(reason) + 1})"
                shown.append(said)
        lines.append(f"| {row} | {' | '.join(shown)} |")
    told = [f"{number}. {reason}" for number, reason in enumerate(notes, 1)]
    return "\n".join(lines) + ("\n\nRefused, since:\n\n" + "\n".join(told) if told else "") + "\n"


def written(text: str) -> dict[tuple[str, str, str], str]:
    """The cells of a written table, with the reasons of what is refused."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    found = {}
    for line in text.splitlines():
        row, *cells = [part.strip() for part in line.strip("|").split("|")]
        if row in MODELS:
            wheres = [(form, scheme) for form in FORMATS for scheme in SHOWN]
            for (form, scheme), said in zip(wheres, cells, strict=True):
                number = re.fullmatch(r"refused \((\d+)\)", said)
                found[row, form, scheme] = f"refused: {reasons[number[1]]}" if number else said
    return found


def main() -> None:
    """Run all cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/families.md"))
    arguments = parser.parse_args()
    cells = {}
    with tempfile.TemporaryDirectory(prefix="tapeout-") as shared:
        for row, form, scheme in CELLS:
            with tempfile.TemporaryDirectory(prefix="tapeout-") as work:
                cells[row, form, scheme] = cell(row, form, scheme, Path(work), Path(shared))
            print(f"{row}, {form} {scheme}: {cells[row, form, scheme]}", flush=True)
    arguments.out.write_text(HEAD + table(cells), encoding="utf-8")
    sys.exit(any("**" in said for said in cells.values()))


if __name__ == "__main__":
    main()
