from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """``save(body, {name: spec})`` builds a program with coremltools' own Builder and saves it, every pass left out."""
    count = iter(range(99))

    def saved(body: Callable[..., Any], specs: Mapping[str, Any], opset: str = "iOS18") -> Path:
        import coremltools as ct
        from coremltools.converters.mil.backend.mil.load import load as backend
        from coremltools.converters.mil.mil import Function, Program

        target = getattr(ct.target, opset)
        program = Program()
        with Function(dict(specs), target) as function:
            outputs = body(*function.inputs.values())
            function.set_outputs(list(outputs) if isinstance(outputs, tuple) else [outputs])
        program.add_function("main", function)
        path = tmp_path / f"{next(count)}.mlpackage"
        weights = path.with_suffix(".weights")
        weights.mkdir()
        spec = backend(program, str(weights), specification_version=target.value)
        ct.models.utils.save_spec(spec, str(path), weights_dir=str(weights))
        return path

    return saved
