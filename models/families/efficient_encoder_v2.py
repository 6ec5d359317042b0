"""Our efficient encoder, version 2: version 1 with RoPE in the place of learned positions."""

from __future__ import annotations

from tapeout.models.families import Family, _efficient, _encoders

FAMILY = Family(_efficient.config_of(2), _encoders.tensors)
