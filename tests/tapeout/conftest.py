"""What the tests of packages share: sessions that run in this process."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import registries

from tapeout import target
from tapeout.generated import write_model
from tapeout.models import Generation, load
from tapeout.oci import session
from tapeout.pack import pack
from tapeout.quantize import quantize
from tapeout.recipe import Recipe
from tapeout.validate import GateResult, Report
from tapeout.validate.generate import Said, say
from tapeout.validate.session import SessionSpec
from tapeout.validate.timing import Timing, measure, measure_encoding


class Here:
    """A worker's session in this process: a worker takes seconds to load torch."""

    ended = False

    def __init__(self, spec: SessionSpec) -> None:
        self._factory = spec.imported()
        self.open(spec.arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, arguments: Mapping[str, Any]) -> None:
        one = {"threads": 1} if "threads" in inspect.signature(self._factory).parameters else {}
        self._session = self._factory(**{**arguments, **one})

    def release(self) -> None:
        self._session.close()

    def say(self, strings: Sequence[str], prompts: Sequence[str], generation: Generation) -> Said:
        return say(self._session, strings, prompts, generation)

    def time(self, prompt_tokens: int, new_tokens: int, repeats: int, warm: bool = True) -> Timing:
        return measure(self._session, prompt_tokens, new_tokens, repeats, warm=warm)

    def cache_bytes(self, tokens: int) -> int | None:
        known = getattr(self._session, "cache_bytes", None)
        return known(tokens) if known else None

    def roof(self) -> dict[str, Any] | None:
        known = getattr(self._session, "roof", None)
        return known() if known else None

    def time_encoding(self, batch: int, tokens: int, repeats: int) -> list[float]:
        return measure_encoding(self._session, batch, tokens, repeats)


@pytest.fixture(scope="session")
def here() -> type[Here]:
    """Takes the place of ``open_session``."""
    return Here


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package for ``null`` with everything that one holds, whose gates a test has made up; not to be written to."""
    work = tmp_path_factory.mktemp("bare")
    model = write_model(work / "small", "mistral", {"sliding_window": 100}, dtype="F32")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (model / "LICENSE").write_text("Do as you like.")
    (model / "NOTICE").write_text("Made by a test.")
    config = json.loads((model / "tokenizer_config.json").read_text())
    said = {"chat_template": "{{ messages[0].content }}"}
    (model / "tokenizer_config.json").write_text(json.dumps(config | said))
    device, recipe = target("null", threads=1), Recipe.of({})
    quant = quantize(load(model), "int8", out=work / "codes")
    (work / "out" / "artifact").mkdir(parents=True)
    artifact = device.export(quant, work / "out" / "artifact")
    gates = (
        GateResult("codes", "passed", "tensors that differ from the store", 0.0, 0.0, "made up"),
        GateResult("quality/kl", "passed", "mean KL, nats", 0.0125, 0.1, "made up"),
        GateResult("task", "skipped", reason="made up"),
    )
    golden = (((1, 2), np.arange(272, dtype=np.float32)),)
    report = Report("small", "null", "int8", gates, golden=golden)
    return pack(artifact, report, quant, device, recipe.kept(quant)).directory


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Registries are asked again at once, and by nobody's login."""
    monkeypatch.setattr(session, "_FIRST_WAIT_S", 0.002)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@pytest.fixture
def running(tmp_path: Path) -> Iterator[registries.Running]:
    """A registry on loopback."""
    if not registries.REGISTRY:
        pytest.skip(registries.WHY_NOT)
    with registries.registry(tmp_path / "registry") as found:
        yield found
