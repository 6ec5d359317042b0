"""The GPU's session on a CPU in float32, against transformers with the same codes; its kernels stand in test_gpu_kernels.py."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from thinned import thinned

from tapeout.exporters import huggingface
from tapeout.exporters.huggingface.reader import Tensors
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import Calibration, quantize
from tapeout.validate import device_peaks, reference, rounding

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
pytest.importorskip("accelerate")

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
MODELS: dict[str, dict[str, Any]] = {
    "llama": WIDE | {"tie_word_embeddings": True},
    "mistral": WIDE | {"sliding_window": 24, "num_key_value_heads": 1},
    "mixtral": WIDE,
    "gemma2": WIDE | {"query_pre_attn_scalar": 16},
    "gemma3_text": WIDE | {"query_pre_attn_scalar": 16},
    "phi3": WIDE | {"num_key_value_heads": 8},
    "qwen2": WIDE,
    "qwen3_moe": WIDE | {"moe_intermediate_size": 128},
    "deepseek_v3": WIDE | {"moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128},
}
CASES = [
    *((family, "compressed-tensors", "int4-g32") for family in MODELS),
    *(
        ("llama", "compressed-tensors", scheme)
        for scheme in ("int8", "int4-g128-asym", "w8a8", "fp8", "fp8-static", "nvfp4", "nvfp4-w4a4", "none")
    ),
    *(("qwen2", "bitsandbytes", scheme) for scheme in ("nf4", "nf4-dq")),
    *(
        ("llama", "modelopt", scheme)
        for scheme in ("int8", "int4-g128", "fp8", "fp8-static", "nvfp4", "nvfp4-w4a4")
    ),
]


CALIBRATED = ("fp8-static", "nvfp4-w4a4")
ROUNDED = {"compressed-tensors": ("w8a8", *CALIBRATED), "modelopt": ("fp8", *CALIBRATED)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The session's module; codes are widened by torch, since Triton's interpreter takes seconds for a token."""
    from tapeout.targets import gpu, gpu_kernels

    def widen(self: Any, dtype: Any) -> Any:
        codes = self.packed
        if self.bits == 4:
            halves = codes.reshape(len(codes), -1, self.part)
            codes = torch.cat((halves & 0xF, halves >> 4), -1).reshape(len(codes), -1)
        weight = self.levels[codes.int()].reshape(len(codes), -1, self.group)
        if self.zero is not None:
            weight = weight - self.zero[:, :, None].float()
        return (weight * self.scale.float()[:, :, None]).reshape(len(codes), -1).to(dtype)

    monkeypatch.setattr(gpu_kernels.Codes, "widen", widen)
    monkeypatch.setattr(
        gpu_kernels.Codes, "times", lambda self, x: torch.nn.functional.linear(x, self.widen(x.dtype))
    )
    return gpu


@pytest.mark.parametrize(("family", "form", "scheme"), thinned(CASES, alike=lambda case: case[1]))
def test_session(
    gpu: Any, family: str, form: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(write_model(tmp_path / "model", family, MODELS[family], dtype="F32"))
    calibration = Calibration(sequences=2, length=32) if scheme in CALIBRATED else None
    quant = quantize(model, scheme, calibration=calibration, out=tmp_path / "codes")
    artifact = huggingface.write(quant, tmp_path / "out", form)
    values = [
        name
        for name in quant
        if artifact.containers[name] == "F16" and getattr(quant[name], "dtype", "") != "F16"
    ]
    same = reference.open_session(str(model.directory), str(tmp_path / "codes"), values=values)
    said = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config") or {}
    with ExitStack() as stack:
        found = dict(gpu.weights(said, Tensors(tmp_path / "out", stack)))
        # Rounded inputs turn a last bit into a step: here the weights alone.
        plain = {
            name: replace(each, inputs=None) if isinstance(each, gpu.Weight) else each
            for name, each in found.items()
        }
        session = gpu.load(tmp_path / "out", iter(plain.items()), "cpu", torch.float32)
    if form == "bitsandbytes":
        monkeypatch.setattr(device_peaks.matmul_peaks, "__defaults__", (64,))
        told = session.roof()
        assert [each["type"] for each in told["peaks"]] == ["float32"]
        assert told["peaks"][0]["operations_per_s"] > 0
        assert told["chunk"] == 2048
    rounded = {name: each.inputs for name, each in found.items() if getattr(each, "inputs", None)}
    assert len(rounded) == (14 if scheme in ROUNDED.get(form, ()) else 0)
    if form == "compressed-tensors":
        for name, inputs in rounded.items():
            x = torch.linspace(-2, 3, 512).reshape(2, 256)
            assert torch.equal(inputs(x), rounding.ROUNDED["scheme"](quant, name)(x))
    ids = [(i * i * 7 + i * 31) % 256 for i in range(70)]
    for _ in range(2):  # a new sequence sees nothing of the one before
        found = [session.prefill(ids[:41]), session.prefill(ids[41:61])]
        found += [session.decode(token)[None] for token in ids[61:]]
        wanted = same.prefill(ids)
        # Sums in another order, float32 throughout: as lowering/weights has it.
        assert np.abs(np.concatenate(found) - wanted).max() <= 1e-4 * wanted.std()
        session.reset()
        same.reset()
