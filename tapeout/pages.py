"""The pages of the documentation, as they travel in the wheel, and which of them explains an error."""

from __future__ import annotations

import posixpath
import re
from importlib.resources import files
from importlib.resources.abc import Traversable

from tapeout.errors import ModelError, OutputError, RuntimeCrash, SchemeError, TapeoutError, nearest

__all__ = ["explaining", "for_terminal", "names", "read", "title"]

# What a part of the code is about, where that says more than the kind of the error; of several that fit the longest counts.
_SUBJECTS = {
    "tapeout.bench": "throughput",
    "tapeout.delta": "delta",
    "tapeout.device_report": "device-reports",
    "tapeout.devices": "plan",
    "tapeout.diff": "diff",
    "tapeout.environments": "doctor",
    "tapeout.exporters.coreml": "apple",
    "tapeout.exporters.huggingface.bitsandbytes": "rocm",
    "tapeout.exporters.huggingface.compressed_tensors": "rocm",
    "tapeout.exporters.huggingface.modelopt": "nvidia",
    "tapeout.exporters.iree": "rocm",
    "tapeout.exporters.onnx": "onnx",
    "tapeout.exporters.trtllm": "nvidia-trtllm",
    "tapeout.matrix": "matrix-runs",
    "tapeout.matrix.cluster": "scale",
    "tapeout.matrix.driver": "scale",
    "tapeout.matrix.pipelines": "ci",
    "tapeout.models.module": "onnx",
    "tapeout.models.optimum": "onnx",
    "tapeout.models.traced": "onnx",
    "tapeout.oci": "registry",
    "tapeout.plan": "plan",
    "tapeout.registry": "registry",
    "tapeout.signing": "package",
    "tapeout.ssh": "device-reports",
    "tapeout.targets": "targets",
    "tapeout.targets.apple": "apple",
    "tapeout.targets.coreml": "apple",
    "tapeout.targets.gpu": "gpu",
    "tapeout.targets.huggingface": "rocm",
    "tapeout.targets.iree": "rocm",
    "tapeout.targets.iree_compiler": "rocm",
    "tapeout.targets.mobile": "mobile",
    "tapeout.targets.modelopt": "nvidia",
    "tapeout.targets.modelopt_loader": "nvidia",
    "tapeout.targets.nvidia": "nvidia",
    "tapeout.targets.onnxruntime": "onnx",
    "tapeout.targets.onnxruntime_typed": "onnx",
    "tapeout.targets.served": "gpu",
    "tapeout.targets.tensorrt": "nvidia-tensorrt",
    "tapeout.targets.tensorrt_engine": "nvidia-tensorrt",
    "tapeout.targets.tensorrt_run": "nvidia-tensorrt",
    "tapeout.targets.trtllm": "nvidia-trtllm",
    "tapeout.targets.trtllm_ranks": "nvidia-trtllm",
}
_ANY_SUBJECT = (TapeoutError, ModelError, SchemeError, OutputError, RuntimeCrash)


def names() -> list[str]:
    """Names of the pages, those of subfolders as ``decisions/0001-…``."""
    return sorted(_walk(_root(), ""))


def read(name: str) -> str:
    """A page as Markdown; TapeoutError names the page that may be meant."""
    if name not in (known := names()):
        usual = [each for each in known if "/" not in each]
        raise TapeoutError(f"there is no page '{name}'{nearest(name, usual)}.")
    return _root().joinpath(f"{name}.md").read_text(encoding="utf-8")


def for_terminal(name: str) -> str:
    """A page whose links to other pages are their names, as ``tapeout docs`` takes them."""

    def named(found: re.Match[str]) -> str:
        text, page = found[1], posixpath.normpath(posixpath.join(posixpath.dirname(name), found[2]))
        return f"`{page}`" if text in (f"{found[2]}.md", page) else f"{text} (`{page}`)"

    return re.sub(r"\[([^\]]+)\]\(([\w./-]+)\.md(?:#[^)]*)?\)", named, read(name))


def title(name: str) -> str:
    """A page's first heading."""
    return next(line.lstrip("# ") for line in read(name).splitlines() if line.startswith("# "))


def explaining(error: TapeoutError) -> str:
    """The page that explains an error: the one it was given; else that of the code that raised it; else that of its kind."""
    if "page" in vars(error) or type(error) not in _ANY_SUBJECT:
        return error.page
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals["__name__"] if trace else ""
    while module and module not in _SUBJECTS:
        module = module.rpartition(".")[0]
    return _SUBJECTS.get(module, error.page)


def _root() -> Traversable:
    return files("tapeout") / "docs"


def _walk(folder: Traversable, prefix: str) -> list[str]:
    found = []
    for each in folder.iterdir():
        if each.is_dir():
            found += _walk(each, f"{prefix}{each.name}/")
        elif each.name.endswith(".md"):
            found.append(prefix + each.name.removesuffix(".md"))
    return found
