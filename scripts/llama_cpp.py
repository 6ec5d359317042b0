"""Install the llama-cpp-python that constraints.txt pins into this interpreter's environment.

Its own build takes minutes, most of them for tools that tapeout never calls. Here the wheel is made from the vendored
llama.cpp alone and kept in ~/.cache/tapeout/llama-cpp, one for each version and CPU; llama.cpp's headers are kept beside it.

With the argument aarch64 it builds static libraries for 64-bit Arm instead, with Debian's cross compiler: what check.cpp is tested with.
Where that compiler is absent it says so and ends well, for the test is skipped then.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
PARTS_OFF = ("APP", "COMMON", "EXAMPLES", "SERVER", "TESTS", "TOOLS")
SETTINGS = [f"cmake.define.LLAMA_BUILD_{part}=OFF" for part in PARTS_OFF] + [
    "cmake.source-dir=vendor/llama.cpp",  # the binding's own CMakeLists forces COMMON on
    "cmake.define.LLAMA_OPENSSL=OFF",
    "cmake.define.GGML_NATIVE=ON",
    "cmake.define.CMAKE_INSTALL_LIBDIR=llama_cpp/lib",
    f"cmake.define.CMAKE_INSTALL_RPATH={'@loader_path' if sys.platform == 'darwin' else '$ORIGIN'}",
    # A wheel holds no links: versioned names would become copies, and two copies of ggml would be loaded.
    "cmake.define.CMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
    "wheel.exclude=bin/**;include/**;llama_cpp/lib/cmake/**;llama_cpp/lib/pkgconfig/**",
]
if platform.machine() in ("x86_64", "AMD64"):
    # GCC 12 takes the writes of ggml's AMX tile configuration for dead: its _tile_loadconfig names only the first 8 of 64 bytes as
    # read (llama.cpp's pull request 26954). What then runs crashes. With AMX a 1.1B in Q4_0 decodes more than twice as fast.
    SETTINGS += ["cmake.define.CMAKE_CXX_FLAGS=-fno-dse -fno-tree-dse"]
AARCH64 = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_C_COMPILER": "aarch64-linux-gnu-gcc",
    "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_NATIVE": "OFF",
    "GGML_OPENMP": "OFF",
    "LLAMA_OPENSSL": "OFF",
} | {f"LLAMA_BUILD_{part}": "OFF" for part in PARTS_OFF}
CROSS_TOOLS = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "cmake": "cmake",
    "ninja": "ninja-build",
}
"""What builds for 64-bit Arm, and the Debian package that has it."""
CPU_FACTS = r"^(?:vendor_id|cpu family|model|flags|Features|isa|CPU (?:implementer|architecture|part))\s*:.*"
LOADS = "import sys, llama_cpp as l; l.llama_backend_init(); sys.exit(l.__version__ != sys.argv[1])"


def run(*command: str | Path, **environment: str) -> None:
    status = subprocess.run(command, env=os.environ | environment, check=False).returncode
    if status:
        sys.exit(f"stopped with exit status {status}: {' '.join(map(str, command))}")


def loads(version: str) -> bool:
    """Whether this version is installed and its library starts without a warning."""
    command = [sys.executable, "-I", "-W", "error", "-c", LOADS, version]
    return not subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tapeout" / "llama-cpp"


def cache_entry(version: str) -> Path:
    """Native code runs on the CPU and the libc that it was built for, so both are part of the name."""
    facts = [sys.platform, platform.machine(), platform.processor(), *platform.libc_ver(), *SETTINGS]
    if (cpuinfo := Path("/proc/cpuinfo")).exists():  # a set, since one machine's cores may differ
        facts += sorted(set(re.findall(CPU_FACTS, cpuinfo.read_text(), re.MULTILINE)))
    return cache() / f"{version}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}"


def build(version: str, entry: Path) -> None:
    # cmake and ninja come with pip's build environment where the machine has none; a compiler does not.
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        if os.geteuid() or not shutil.which("apt-get"):
            sys.exit("llama.cpp needs a C++ compiler: install g++, then run this again.")
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qq", "-y", "--no-install-recommends", "gcc", "g++", "libc6-dev")
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{entry.name}-") as scratch:
        # pip's own cache knows neither the CPU nor the settings, so this wheel must not get into it.
        command = (*PIP, "wheel", "-q", "--no-deps", "--no-cache-dir", "--no-binary=llama-cpp-python")
        settings = [f"--config-settings={setting}" for setting in SETTINGS]
        new, jobs = Path(scratch, "new"), str(os.cpu_count() or 1)
        run(*command, *settings, "-w", new, f"llama-cpp-python=={version}", CMAKE_BUILD_PARALLEL_LEVEL=jobs)
        if not entry.exists():  # another clone may have been quicker
            new.rename(entry)


def sources(version: str, into: Path) -> Path:
    """llama.cpp as llama-cpp-python's source package has it."""
    run(
        *PIP,
        "download",
        "-q",
        "--no-deps",
        "--no-binary=llama-cpp-python",
        "-d",
        into,
        f"llama-cpp-python=={version}",
    )
    (archive,) = into.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        wanted = [each for each in opened if "/vendor/llama.cpp/" in each.name]
        opened.extractall(into, wanted, filter="data")
    return into / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"


def keep_headers(version: str) -> None:
    """llama.h and what it includes, which no wheel holds."""
    entry = cache() / f"headers-{version}"
    if entry.exists():
        return
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{entry.name}-") as scratch:
        tree, new = sources(version, Path(scratch)), Path(scratch, "new")
        for folder in ("include", "ggml/include"):
            shutil.copytree(tree / folder, new, dirs_exist_ok=True)
        if not entry.exists():
            new.rename(entry)


def build_aarch64(version: str) -> None:
    """Static libraries and headers in one folder; minutes, once for each version. Without the tools: a line that names them."""
    digest = hashlib.sha256(repr(AARCH64).encode()).hexdigest()[:16]
    entry = cache() / f"aarch64-{version}-{digest}"
    if entry.exists():
        return
    if absent := {tool: name for tool, name in CROSS_TOOLS.items() if not shutil.which(tool)}:
        print(
            f"llama.cpp is not built for aarch64, and its test is skipped: no {', '.join(absent)} "
            f"(Debian: apt-get install {' '.join(absent.values())}).",
            file=sys.stderr,
        )
        return
    print(f"building llama.cpp for aarch64, once on this machine, into {entry} ...", flush=True)
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=f".{entry.name}-") as scratch:
        tree, made, new = sources(version, Path(scratch)), Path(scratch, "made"), Path(scratch, "new")
        settings = [f"-D{name}={value}" for name, value in AARCH64.items()]
        if launcher := shutil.which("ccache"):
            settings += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={launcher}" for language in ("C", "CXX")]
        run("cmake", "-G", "Ninja", "-S", tree, "-B", made, *settings)
        run("ninja", "-C", made, "llama")
        for folder in ("include", "ggml/include"):
            shutil.copytree(tree / folder, new, dirs_exist_ok=True)
        for library in made.rglob("lib*.a"):
            shutil.copy(library, new)
        if not entry.exists():
            new.rename(entry)


def main() -> None:
    pin = re.search(r"^llama-cpp-python==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    version = pin[1] if pin else sys.exit(f"{CONSTRAINTS} has no line llama-cpp-python==VERSION")
    if sys.argv[1:] == ["aarch64"]:
        build_aarch64(version)
        return
    install(version)
    keep_headers(version)


def install(version: str) -> None:
    if loads(version):
        return
    entry = cache_entry(version)
    if not entry.exists():
        print(f"building llama.cpp for this CPU, once on this machine, into {entry} ...", flush=True)
        build(version, entry)
    run(*PIP, "install", "-q", "-c", CONSTRAINTS, "--force-reinstall", "--no-deps", *entry.glob("*.whl"))
    run(*PIP, "install", "-q", "-c", CONSTRAINTS, "llama-cpp-python")  # what it depends on
    if not loads(version):
        sys.exit(f"llama-cpp-python {version} does not load; delete {entry}, then run this again.")


if __name__ == "__main__":
    main()
