"""One decoder on one runtime, timed when told to: a word on stdin (``time``), a JSON line on stdout.

    python decoder.py KIND PATH --prefill 512 --decode 128 --threads 2

KIND: tapeout-onnx (ours on onnxruntime), tapeout-gguf (ours on llama.cpp), genai (any directory with genai_config.json on
onnxruntime-genai), optimum (an exported directory on onnxruntime through optimum). The first line says that it is loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Timed = tuple[float, list[float]]  # seconds of the prompt with its first token, and of each token after it
Run = Callable[[list[int], int], Timed]


def tapeout(path: Path, context: int, threads: int, runtime: str) -> Run:
    """Greedy, through the sessions that tapeout validates with."""
    if runtime == "onnx":
        from tapeout.targets.onnxruntime import open_session

        session: Any = open_session(str(path), context, threads=threads)
    else:
        from tapeout.targets.llama_cpp import open_session as open_gguf

        session = open_gguf(str(next(path.glob("*.gguf"))), context=context, threads=threads)

    def run(ids: list[int], new: int) -> Timed:
        session.reset()
        begin = time.perf_counter()
        token = int(session.append(ids)[-1].argmax())
        first, seconds = time.perf_counter() - begin, []
        for _ in range(new):
            begin = time.perf_counter()
            token = int(session.decode(token).argmax())
            seconds.append(time.perf_counter() - begin)
        return first, seconds

    return run


def genai(path: Path, context: int, threads: int) -> Run:
    """Greedy, as onnxruntime-genai's own examples do it."""
    import onnxruntime_genai as og

    config = og.Config(str(path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def run(ids: list[int], new: int) -> Timed:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(
            do_sample=False, min_length=context, max_length=context, past_present_share_buffer=True
        )
        generator = og.Generator(model, parameters)
        begin = time.perf_counter()
        generator.append_tokens(np.array([ids], np.int32))
        generator.generate_next_token()
        first, seconds = time.perf_counter() - begin, []
        for _ in range(new):
            begin = time.perf_counter()
            generator.generate_next_token()
            seconds.append(time.perf_counter() - begin)
        return first, seconds

    return run


def optimum(path: Path, threads: int) -> Run:
    """Greedy, a call of the model for each token, its cache handed on."""
    import onnxruntime
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = ORTModelForCausalLM.from_pretrained(path, session_options=options, use_io_binding=True)

    def run(ids: list[int], new: int) -> Timed:
        rows, mask = torch.tensor([ids]), torch.ones((1, len(ids)), dtype=torch.int64)
        begin, past, seconds, first = time.perf_counter(), None, [], 0.0
        for step in range(new + 1):
            if step:
                begin = time.perf_counter()
            said = model(input_ids=rows, attention_mask=mask, past_key_values=past, use_cache=True)
            past, rows = said.past_key_values, said.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, mask.new_ones((1, 1))], 1)
            if step:
                seconds.append(time.perf_counter() - begin)
            else:
                first = time.perf_counter() - begin
        return first, seconds

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("tapeout-onnx", "tapeout-gguf", "genai", "optimum"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    context = arguments.prefill + arguments.decode + 8
    if arguments.kind == "genai":
        run = genai(arguments.path, context, arguments.threads)
    elif arguments.kind == "optimum":
        run = optimum(arguments.path, arguments.threads)
    else:
        run = tapeout(arguments.path, context, arguments.threads, arguments.kind.removeprefix("tapeout-"))
    ids = [3 + 7 * i % 97 for i in range(arguments.prefill)]
    run(ids, 4)  # warm-up
    print(json.dumps({"resident_bytes": resident()}), flush=True)
    for _ in sys.stdin:
        first, seconds = run(ids, arguments.decode)
        print(json.dumps({"prefill_s": first, "decode_s": seconds, "resident_bytes": resident()}), flush=True)


def resident() -> int:
    """This process's resident bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell resident memory")


if __name__ == "__main__":
    main()
