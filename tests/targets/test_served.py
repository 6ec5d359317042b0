"""Sessions on servers, played by small modules of their names whose models are transformers; nothing here runs vLLM or TensorRT-LLM."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import MissingToolchain, TapeoutError
from tapeout.generated import write_model
from tapeout.targets import huggingface, modelopt_loader, served
from tapeout.validate import reference
from tapeout.validate.metrics import log_softmax

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PADDED = 280  # servers pad a vocabulary of 272


class Sampling:
    def __init__(self, **given: Any) -> None:
        self.given = given


class Model:
    """What both servers have in common: a prompt's logits, with a wider vocabulary."""

    def __init__(self, model: str, **given: Any) -> None:
        self.session = reference.open_session(model)
        self.given, self.asked, self.shut = given, [], False

    def rows(self, ids: list[int]) -> np.ndarray:
        self.session.reset()
        found = self.session.prefill(ids)
        return np.pad(found, ((0, 0), (0, PADDED - found.shape[1])), constant_values=-1e9)

    def shutdown(self) -> None:
        self.shut = True


class Vllm(Model):
    def generate(self, prompts: list[dict[str, list[int]]], how: Sampling, use_tqdm: bool) -> list[Any]:
        assert self.given["max_logprobs"] == -1, "vLLM tells 20 log-probabilities unless it is told otherwise"
        (prompt,) = prompts
        self.asked.append((len(prompt["prompt_token_ids"]), "prompt_logprobs" in how.given))
        told = log_softmax(self.rows(prompt["prompt_token_ids"]).astype(np.float64))
        rows = [{i: types.SimpleNamespace(logprob=p) for i, p in enumerate(row)} for row in told]
        output = types.SimpleNamespace(logprobs=[rows[-1]])
        return [types.SimpleNamespace(outputs=[output], prompt_logprobs=[None, *rows[:-1]])]


class TensorRt(Model):
    def generate(self, ids: list[int], how: Sampling) -> Any:
        assert how.given["return_context_logits"]
        return types.SimpleNamespace(context_logits=torch.from_numpy(self.rows(ids)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60, 80))
    return monkeypatch


def install(patch: pytest.MonkeyPatch, name: str, kind: type) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(LLM=kind, SamplingParams=Sampling, __version__="1.2.3")
    patch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("name", "kind", "runtime"),
    [("vllm", Vllm, "vLLM 1.2.3"), ("tensorrt_llm", TensorRt, "TensorRT-LLM 1.2.3")],
)
def test_session(gpu: pytest.MonkeyPatch, tmp_path: Path, name: str, kind: type, runtime: str) -> None:
    model = write_model(tmp_path, "llama", {}, dtype="F32")
    install(gpu, name, kind)
    opened = huggingface.open_session if name == "vllm" else modelopt_loader.open_session
    session = opened(str(model))
    assert session.facts.runtime == runtime
    assert (session.facts.device, session.facts.resident_bytes, session.facts.emulated) == (
        "a GPU",
        20,
        False,
    )
    wanted = reference.open_session(str(model))
    ids = [(i * 7) % 256 for i in range(20)]
    for _ in range(2):
        found = np.concatenate(
            [session.prefill(ids[:12]), session.append(ids[12:16]), session.decode(ids[16])[None]]
        )
        right = wanted.prefill(ids[:17])
        kept = np.r_[0:12, 15, 16]
        assert found.shape == (14, 272)
        apart = log_softmax(found.astype(np.float64)) - log_softmax(right[kept].astype(np.float64))
        assert np.abs(apart).max() < 1e-4
        session.reset()
        wanted.reset()
    session.close()


def test_a_token_alone_does_not_have_the_prompt_computed_again(
    gpu: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(gpu, "vllm", Vllm)
    session = served.open_session(write_model(tmp_path, "llama", {}, dtype="F32"), "vllm")
    session.prefill([1, 2, 3])
    session.decode(4)
    assert session._engine._llm.asked == [(3, True), (4, False)]


def test_what_does_not_fit_is_told(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(gpu, "vllm", Vllm)
    model = write_model(tmp_path, "llama", {"max_position_embeddings": 16}, dtype="F32")
    session = served.open_session(model, "vllm")
    with pytest.raises(TapeoutError, match="16 tokens and one more do not fit the context of 16"):
        session.prefill([1] * 16)
    with pytest.raises(TapeoutError, match="vocabulary"):
        session.prefill([300])


def test_a_server_that_fails_is_quoted(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("no kernel for this card")

    install(gpu, "vllm", refuse)  # type: ignore[arg-type]
    with pytest.raises(TapeoutError, match=r"vLLM does not load .*: no kernel for this card"):
        served.open_session(write_model(tmp_path, "llama", {}, dtype="F32"), "vllm")


def test_a_gpu_without_what_its_session_needs(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    gpu.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    with pytest.raises(MissingToolchain, match=r"needs triton: pip install triton\. CUDA_VISIBLE_DEVICES="):
        served.on_gpu(tmp_path, ())
