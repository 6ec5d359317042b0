"""Recipes: a TOML file that says how a model is quantized and what its gates demand.

scheme = "int4-g128"
rounding = "rtn"

[tensors]                 # scheme by glob over tensor names; the last match wins
"*.down_proj" = "int8"
lm_head = "int8"

[calibration]             # for gptq, awq and smoothquant; with rtn and hqq: weight columns by their inputs
text = "texts/own.txt"    # default: the model's calibration.txt, or the one that ships with tapeout
sequences = 128
length = 512

[limits]                  # of the quality, task and throughput gates
kl = 0.05
min_tokens_per_s = 5      # and max_ttft_ms, max_memory
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tapeout.errors import RecipeError, nearest
from tapeout.files import file_sha256
from tapeout.quantize import Calibration, Quantized
from tapeout.validate import Limits


class Recipe(BaseModel):
    """Everything that decides the codes, and the limits that the gates hold them to.

    Attributes:
        scheme: of the linear layers; embeddings and head take int8 unless ``tensors`` says otherwise.
        rounding: how codes are chosen.
        tensors: scheme by glob over tensor names without ``.weight``.
        calibration: what data-aware rounding looks at; None: the default text where the rounding needs one.
        limits: of the quality, task and throughput gates; what is absent follows from the scheme, or is not demanded.
        text: evaluation text, UTF-8; None: the model's own or the one that ships with tapeout.
        tokens: how many tokens of it are evaluated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scheme: str = "int8"
    rounding: str = "rtn"
    tensors: dict[str, str] = Field(default_factory=dict)
    calibration: Calibration | None = None
    limits: Limits = Limits()
    text: Path | None = None
    tokens: int = Field(default=4096, gt=0)

    @property
    def scheme_given(self) -> str | None:
        """The scheme where the recipe says one; a checkpoint that is quantized already has its own."""
        return self.scheme if "scheme" in self.model_fields_set else None

    def with_default(self, scheme: str) -> Recipe:
        """The same, with this scheme where it says none."""
        return self if self.scheme_given else self.model_copy(update={"scheme": scheme})

    def demanding(self, **speed: Any) -> Recipe:
        """The same with these limits of speed and memory over its own; None: not given."""
        given = {name: value for name, value in speed.items() if value is not None}
        return self.model_copy(update={"limits": replace(self.limits, **given)}) if given else self

    def rounds(self) -> dict[str, Any]:
        """The arguments of ``quantize`` that decide the codes."""
        return {
            "scheme": self.scheme_given,
            "rounding": self.rounding,
            "overrides": self.tensors,
            "calibration": self.calibration,
        }

    def kept(self, quant: Quantized) -> dict[str, Any]:
        """What a package keeps of the recipe beside its schemes, as JSON: enough to make and judge the codes again.

        A text is named by its SHA-256, since a path means nothing elsewhere: None: the default one for evaluation; the digest of
        whatever was used for calibration, which is itself None when nothing was calibrated.
        """
        calibration = None
        if quant.calibration_sha256 is not None:
            used = self.calibration or Calibration()
            calibration = {
                **asdict(used),
                "text": used.text_sha256(quant.model),
                "device": quant.device,
            }
        return {
            "calibration": calibration,
            "limits": {
                name: value
                for name, value in asdict(self.limits).items()
                if name not in ("min_tokens_per_s", "max_ttft_ms", "max_memory") or value is not None
            },
            "text": file_sha256(self.text) if self.text else None,
            "tokens": self.tokens,
        }

    def toml(self) -> str:
        """What was set, as a recipe file; ``read`` gives the same back."""
        values, tables = [], []
        for key in type(self).model_fields:
            value = getattr(self, key)
            if key not in self.model_fields_set or value is None:
                continue
            if is_dataclass(value) and not isinstance(value, type):
                value = asdict(value)
            if isinstance(value, dict):
                rows = [f"{_key(name)} = {_toml(each)}" for name, each in value.items() if each is not None]
                tables.append("\n".join([f"\n[{key}]", *rows]))
            else:
                values.append(f"{key} = {_toml(value)}")
        return "\n".join([*values, *tables]) + "\n"

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe file; RecipeError names the key that is wrong and the closest known one."""
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {path} is not TOML: {error}.") from error
        return cls.of(raw, str(path))

    @classmethod
    def of(cls, raw: dict[str, Any], source: str = "the recipe") -> Recipe:
        """Check a recipe's values; RecipeError names the key that is wrong and the closest known one."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                tables = {
                    "limits": Limits.__dataclass_fields__,
                    "calibration": Calibration.__dataclass_fields__,
                }
                known = tables.get(str(first["loc"][0]), cls.model_fields)
                raise RecipeError(
                    f"{source} has an unknown key '{key}'{nearest(str(first['loc'][-1]), known)}."
                ) from None
            raise RecipeError(f"{source}: {key} is {first['input']!r}: {first['msg']}.") from None


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, int | float):
        return repr(value)
    # A JSON string is a TOML one but for this character.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
