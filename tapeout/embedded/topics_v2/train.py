"""Train the embedded encoder ``topics_v2``, which is ``topics_v1`` with RoPE: ``python train.py --out DIR``."""

from __future__ import annotations

from tapeout.embedded.topics_v1.train import main

if __name__ == "__main__":
    main(version=2)
