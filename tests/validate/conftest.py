from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

Save = Callable[..., Path]


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """``save(body, {name: spec})`` builds a program with coremltools' own Builder and saves it, every pass left out."""

    def saved(
        body: Callable[..., Any], specs: Mapping[str, Any], opset: str = "iOS18", inputs: Sequence[Any] = ()
    ) -> Path:
        import coremltools as ct
        from coremltools.converters.mil.backend.mil.load import load as backend
        from coremltools.converters.mil.mil import Function, Program

        target = getattr(ct.target, opset)
        program = Program()
        with Function(dict(specs), target) as function:
            outputs = body(*function.inputs.values())
            function.set_outputs(list(outputs) if isinstance(outputs, tuple) else [outputs])
            function.set_input_types(tuple(inputs))
        program.add_function("main", function)
        path = tmp_path_factory.mktemp("package") / "model.mlpackage"
        weights = path.with_suffix(".weights")
        weights.mkdir()
        spec = backend(program, str(weights), specification_version=target.value)
        ct.models.utils.save_spec(spec, str(path), weights_dir=str(weights))
        return path

    return saved
