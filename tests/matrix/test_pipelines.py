"""Pipeline files: what each CI system would make of them, and that its shell gives our commands what was meant."""

from __future__ import annotations

import graphlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines as ci
import pytest
from commands import tapeout
from thinned import thinned

from tapeout.cli import app
from tapeout.errors import OutputError, RecipeError
from tapeout.matrix import Cell, Matrix
from tapeout.matrix.ci import SYSTEMS
from tapeout.matrix.pipelines import PLACES, check, pipeline, write
from tapeout.targets import default_scheme

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STRANGE = 'it\'s ${{ secrets.A }} $HOME "x" — é.toml'
MATRICES = {
    "one.toml": '[matrix]\nmodels = ["arithmetic"]\ntargets = ["null"]\n',
    "all.toml": '[matrix]\nmodels = ["arithmetic", "org/name"]\nschemes = ["default", "int8"]\ntargets = ["all"]\n',
    # 3 models, 10 schemes, 2 roundings, 5 targets
    "many.toml": """
        [matrix]
        models = ["models/one", "models/two", "models/three"]
        schemes = ["int8", "int8-g32", "int8-g128", "int4-g32", "int4-g64", "int4-g128", "nf4", "nf4-dq", "fp8", "none"]
        roundings = ["rtn", "hqq"]
        targets = ["cpu", "mobile", "apple", "null", {target = "cpu", format = "onnx"}]
    """,
    STRANGE: """
        [matrix]
        models = ["models/it's $HOME \\"q\\" `id` ${{ github.token }}", "models/-rf", "models/é漢"]
        targets = ["cpu", "apple", "nvidia", {target = "cpu", name = "a b'c$d"}]
        [ci]
        install = '''
        echo "two lines: $EXTRAS"
        true
        '''
        python = "3.10"
        [runners]
        cpu = "a: b #c"
        nvidia = ["self-hosted", "no", "1.0"]
    """,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with matrix files, and a model that lies in it; the working directory of the test."""
    for name, text in MATRICES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "models" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(matrix: str) -> list[str]:
    return [cell.name for cell in Matrix.read(Path(matrix)).cells()]


def cells(system: str, text: str) -> list[ci.Job]:
    """Jobs of cells only."""
    every = ci.jobs(system, text)
    if system == "github":
        return [job for job in every if job.name.partition("/")[0].startswith(("cells", "own-cells"))]
    if system == "gitlab":
        return [job for job in every if job.raw.get("stage") == "cells"]
    return [job for job in every if job.raw["group"] == "cells"]


@pytest.mark.slow
def test_schemas_and_linters(place: Path) -> None:
    """GitHub's, GitLab's and Buildkite's published schemas, and yamllint; shellcheck reads every line of bash."""
    files: dict[str, list[Path]] = {system: [] for system in SYSTEMS}
    blocks = set()
    for system in SYSTEMS:
        for number, name in enumerate(MATRICES):
            for fail_fast in (False, True) if name == "one.toml" else (False,):
                text = pipeline(Path(name), system, fail_fast=fail_fast)
                files[system].append(place / f"{system}-{number}-{fail_fast}.yml")
                files[system][-1].write_text(text)
                blocks |= {script for _, script in ci.scripts(system, text)}
    schema = {
        "github": ["vendor.github-workflows"],
        "gitlab": ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"],
        "buildkite": ["vendor.buildkite"],
    }
    for system, paths in files.items():
        subprocess.run([BIN / "check-jsonschema", "--builtin-schema", *schema[system], *paths], check=True)
    # Whose lines the large one has many times.
    small = [path for paths in files.values() for path in paths if path.stat().st_size < 100_000]
    rules = "{extends: default, rules: {line-length: disable, document-start: disable, truthy: {check-keys: false}}}"
    subprocess.run(
        [BIN / "yamllint", "--strict", "-d", rules, *small],
        check=True,
    )
    for number, block in enumerate(sorted(blocks)):
        (place / f"{number}.sh").write_text(block)
    subprocess.run([BIN / "shellcheck", "--shell", "bash", *place.glob("*.sh")], check=True)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("matrix", thinned(MATRICES))
def test_no_cell_is_lost_and_each_finds_its_codes(place: Path, matrix: str, system: str) -> None:
    text = pipeline(Path(matrix), system)
    every, those = ci.jobs(system, text), cells(system, text)
    assert [job.env["CELL"] for job in those] == names(matrix) if system != "github" else True
    assert sorted(job.env["CELL"] for job in those) == sorted(names(matrix))
    # Jobs by the name that others call them by; GitHub calls all of a strategy's by one name, Buildkite those of a group.
    known = (
        {job.name for job in every}
        | {job.name.partition("/")[0] for job in every}
        | {job.raw.get("group") for job in every}
    )
    needs = {job.name.partition("/")[0] if system == "github" else job.name: job.needs for job in every}
    assert {need for each in needs.values() for need in each} <= known
    order = list(graphlib.TopologicalSorter(needs).static_order())
    assert order[-1] == "index"
    # Codes are made once for a model, scheme and rounding, and each cell waits for its own.
    shared = {cell.name: _shared(cell) for cell in Matrix.read(Path(matrix)).cells()}
    keys = [
        job for job in every if job.name.startswith("key of ")
    ]  # GitLab's of models that come from elsewhere
    others = [job for job in every if job not in [*those, *keys] and job.name != "index"]
    making = {shared[job.env["CELL"]]: job.name for job in others}
    assert len(making) == len(others)
    for job in those:
        assert making[shared[job.env["CELL"]]].partition("/" if system == "github" else "\n")[0] in job.needs


def _shared(cell: Cell) -> tuple[str, str, str]:
    scheme = default_scheme(cell.device()) if cell.scheme == "default" else cell.scheme
    return cell.model, scheme, cell.rounding


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_shell_gives_our_commands_what_was_meant(place: Path, system: str) -> None:
    """Every line is run by bash with a ``tapeout`` that says what it was given, and that is parsed by our own command line."""
    bin_ = place / "bin"
    ci.fake(
        bin_,
        "tapeout",
        f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\" >> '{place}/said'",
    )
    for name in ("buildkite-agent", "tar", "head", "curl", "python"):
        ci.fake(bin_, name, "true")
    text = pipeline(Path(STRANGE), system)
    for job, script in ci.scripts(system, text):
        env = {
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "GITHUB_OUTPUT": "out",
            "GITHUB_STEP_SUMMARY": "summary",
            **job.env,
        }
        (place / "packages").mkdir(exist_ok=True)
        (place / "packages" / "index.md").touch()
        before = len(_said(place))
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", script],
            env=env,
            cwd=place,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        for arguments in _said(place)[before:]:
            command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
            assert command.__name__ == "matrix"
            assert bound.arguments["recipe"] == Path(STRANGE)
            assert bound.arguments.get("only") == ([job.env["CELL"]] if "CELL" in job.env else None)
    parts = {
        flag for arguments in _said(place) for flag in arguments if flag in ("--codes", "--collect", "--key")
    }
    assert parts == {"--codes", "--collect"} | ({"--key"} if system != "buildkite" else set())


def _said(place: Path) -> list[list[str]]:
    path = place / "said"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_github_jobs_fit_its_limits_and_strangers_stay_off_our_machines(place: Path) -> None:
    many = ci.read(pipeline(Path("many.toml"), "github"))["jobs"]
    assert [len(many[name]["strategy"]["matrix"]["include"]) for name in ("cells-1", "cells-2")] == [256, 44]
    strange = ci.read(pipeline(Path(STRANGE), "github"))["jobs"]
    for name, job in strange.items():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        own = any("self-hosted" in row.get("runner", "") for row in rows)
        assert own == (name == "own-cells") == ("head.repo.fork != true" in job.get("if", "")), name
    assert strange["own-cells"]["strategy"]["matrix"]["include"][0]["runner"] == ["self-hosted", "no", "1.0"]


def test_every_github_action_is_a_commit_and_the_token_can_only_comment(place: Path) -> None:
    text = pipeline(Path("all.toml"), "github")
    for job in ci.jobs("github", text):
        assert all(len(step.action.partition("@")[2]) == 40 for step in job.steps if step.action)
        # What others write never becomes a part of a script.
        assert not any("${{" in step.script for step in job.steps)
    read = ci.read(text)
    assert read["permissions"] == {"contents": "read"}
    assert {name: job["permissions"] for name, job in read["jobs"].items() if "permissions" in job} == {
        "index": {"contents": "read", "pull-requests": "write"}
    }


def test_fail_fast_is_the_commands(place: Path) -> None:
    for fail_fast in (False, True):
        github = ci.read(pipeline(Path("one.toml"), "github", fail_fast=fail_fast))["jobs"]
        assert github["cells"]["strategy"]["fail-fast"] is fail_fast
        gitlab = ci.read(pipeline(Path("one.toml"), "gitlab", fail_fast=fail_fast))
        assert ("auto_cancel" in gitlab["workflow"]) is fail_fast
        (cell,) = cells("buildkite", pipeline(Path("one.toml"), "buildkite", fail_fast=fail_fast))
        assert cell.raw.get("cancel_on_build_failing", False) is fail_fast


def test_gitlab_keys_the_cache_by_what_the_codes_are_made_of(place: Path) -> None:
    every = ci.read(pipeline(Path("many.toml"), "gitlab"))
    ours = every["codes one.int8.rtn"]["cache"]["key"]
    assert "models/one/model.safetensors" in ours["files"]
    assert "needs" not in every["codes one.int8.rtn"]
    keys = [str(job["cache"]["key"]) for name, job in every.items() if name.startswith("codes one.")]
    assert len(set(keys)) == len(keys) == 10 * 2
    # A model of a hub can change while nothing in the repository does: a job before finds the digest, for that job of codes alone.
    hub, key = every["codes two.int8.rtn"], every["key of two.int8.rtn"]
    assert hub["cache"]["key"] == "tapeout-$TAPEOUT_CODES"
    assert hub["needs"] == ["key of two.int8.rtn"]
    assert key["variables"]["CELL"] == hub["variables"]["CELL"]
    assert every["stages"][0] == every[".key"]["stage"] == "keys"
    assert every[".key"]["artifacts"]["reports"] == {"dotenv": "codes.env"}
    # Embedded models are tapeout's own, and change with its version.
    one = ci.read(pipeline(Path("one.toml"), "gitlab"))
    assert one["stages"] == ["codes", "cells", "index"]
    assert isinstance(one["codes arithmetic.int8.rtn"]["cache"]["key"], str)


@pytest.mark.parametrize("digest", ["0" * 64, ""])
def test_gitlab_s_key_is_what_our_command_prints(place: Path, digest: str) -> None:
    """Run by bash, as a runner does; where the command fails, so does the job, and no empty key is kept."""
    ci.fake(place / "bin", "tapeout", f"echo {digest}" if digest else "exit 2")
    (job,) = [
        job
        for job in ci.jobs("gitlab", pipeline(Path("many.toml"), "gitlab"))
        if job.name == "key of two.int8.rtn"
    ]
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    ci.fake(place / "bin", "python", "true")
    (step,) = job.steps
    command = ["bash", "-eo", "pipefail", "-c", step.script]
    done = subprocess.run(command, env={"PATH": path, **job.env}, check=False)
    assert (done.returncode == 0) == bool(digest)
    found = Path("codes.env").read_text() if Path("codes.env").exists() else ""
    assert found == (f"TAPEOUT_CODES={digest}\n" if digest else "")


@pytest.mark.slow
def test_runners(place: Path) -> None:
    def of(system: str, target: str) -> Any:
        (job,) = (
            job
            for job in cells(system, pipeline(Path("all.toml"), system))
            if job.env["CELL"] == f"arithmetic.int8.rtn.{target}"
        )
        return {
            "github": job.raw.get("row", {}).get("runner"),
            "gitlab": job.raw.get("tags"),
            "buildkite": job.raw.get("agents"),
        }[system]

    assert of("github", "cpu") == "ubuntu-24.04"
    assert of("github", "apple") == "macos-15"
    assert of("github", "nvidia-trtllm") == ["self-hosted", "gpu", "nvidia"]
    assert of("gitlab", "cpu") is None
    assert of("gitlab", "apple") == ["saas-macos-medium-m1"]
    assert of("buildkite", "rocm-iree") == ["queue=rocm"]
    Path("said.toml").write_text(
        MATRICES["one.toml"] + '[runners]\nnull = "big"\nindex = ["queue=small", "os=linux"]\n'
    )
    null, index = ci.jobs("buildkite", pipeline(Path("said.toml"), "buildkite"))[1:]
    assert (null.raw["agents"], index.raw["agents"]) == (["queue=big"], ["queue=small", "os=linux"])


def test_bad_input(place: Path) -> None:
    def said(text: str, system: str = "github", name: str = "bad.toml") -> str:
        Path("bad.toml").write_text(text)
        with pytest.raises(RecipeError) as refused:
            pipeline(Path(name), system)
        return str(refused.value)

    one = MATRICES["one.toml"]
    assert said(one, "gitub") == (
        "'gitub' is no CI system that a pipeline can be written for; did you mean 'github'? (known: buildkite, github, gitlab)."
    )
    assert "[runners] has 'nvida', which is no target; did you mean 'nvidia'?" in said(
        one + '[runners]\nnvida = "x"\n'
    )
    assert "[runners] cpu is []: expected the label of a runner, or several." in said(
        one + "[runners]\ncpu = []\n"
    )
    assert "unknown key 'ci.instal'; did you mean 'install'?" in said(one + '[ci]\ninstal = "x"\n')
    assert "the matrix has no cell: models is empty" in said('[matrix]\nmodels = []\ntargets = ["cpu"]\n')
    assert "must be named by a printable path from the root" in said(one, name=str(place / "bad.toml"))
    assert "must be named by a printable path from the root" in said(one, name="../x.toml")
    assert "must be named by a printable path from the root" in said(one, name="x\n- run: evil.toml")


def test_a_place_that_exists(place: Path) -> None:
    text, there = pipeline(Path("one.toml"), "gitlab"), Path("a/b.yml")
    with pytest.raises(OutputError, match=r"a/b\.yml does not exist: again writes it"):
        check(text, there, "again")
    assert write(text, there)
    assert not write(text, there)
    check(text, there, "again")
    line = 1 + text.splitlines().index('  image: "python:3.11"')
    there.write_text(text.replace("3.11", "3.12"))
    with pytest.raises(OutputError, match=r"exists and says something else; give --force"):
        write(text, there)
    with pytest.raises(
        OutputError,
        match=rf"a/b\.yml is not what its matrix gives, from line {line} on: again --force writes it anew",
    ):
        check(text, there, "again")
    assert write(text, there, force=True)
    there.write_text(text + "x: 1\n")
    with pytest.raises(OutputError, match="at its end"):
        check(text, there, "again")
    assert [path.name for path in there.parent.iterdir()] == ["b.yml"]
    with pytest.raises(OutputError, match="a is a directory; --out names the pipeline file itself"):
        write(text, there.parent)


def test_the_command(place: Path) -> None:
    done = tapeout("matrix", "one.toml", "--emit", "github", cwd=place, status=0)
    assert done.stderr == ".github/workflows/matrix.yml\n"
    assert (place / PLACES["github"]).read_text() == pipeline(Path("one.toml"), "github")
    assert "was up to date" in tapeout("matrix", "one.toml", "--emit", "github", cwd=place, status=0).stderr
    assert (
        "is up to date"
        in tapeout("matrix", "one.toml", "--emit", "github", "--check", cwd=place, status=0).stderr
    )
    assert (
        "give one of them"
        in tapeout("matrix", "one.toml", "--emit", "github", "--key", cwd=place, status=2).stderr
    )
    assert "it wants --emit" in tapeout("matrix", "one.toml", "--check", cwd=place, status=2).stderr
    assert (
        "did you mean 'buildkite'?"
        in tapeout("matrix", "one.toml", "--emit", "buildkit", cwd=place, status=2).stderr
    )


def test_our_own_workflow_is_what_our_matrix_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(
        pipeline(Path("examples/ci-matrix.toml"), "github"),
        PLACES["github"],
        "tapeout matrix examples/ci-matrix.toml --emit github",
    )
    workflows: list[Callable[..., Any] | Path] = [*(ROOT / ".github" / "workflows").glob("*.yml")]
    subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows], check=True
    )
