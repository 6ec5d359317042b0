"""Our efficient encoder, version 1: pre-norm, learned positions, the mean of all tokens classified."""

from __future__ import annotations

from tapeout.models.families import Family, _efficient, _encoders

FAMILY = Family(_efficient.config_of(1), _encoders.tensors)
