"""Just enough of CI systems to run their jobs here: a bare folder and a machine's own cache for each job, caches and artifacts between them."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipelines as ci

BIN = Path(sys.executable).parent


@dataclass
class Ran:
    """What came of a job: its folder, whether it passed, what was said, the job's or action's outputs."""

    folder: Path
    status: int
    said: str
    outputs: dict[str, str]


class System:
    """One system with its storage; every job starts with what the repository has."""

    def __init__(self, work: Path, repository: dict[str, str]) -> None:
        self._work, self._repository = work, repository
        self.caches, self.artifacts = work / "caches", work / "artifacts"
        self.caches.mkdir(parents=True)
        self.artifacts.mkdir()
        self._number = 0

    def folder(self) -> tuple[Path, dict[str, str]]:
        """A checkout on a fresh machine, and the variables of its shell."""
        self._number += 1
        folder = self._work / f"job-{self._number}" / "checkout"
        folder.mkdir(parents=True)
        for name, text in self._repository.items():
            (folder / name).write_text(text)
        kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
        machine = {
            "TAPEOUT_CACHE": str(folder.parent / "machine"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        return folder, {**kept, **machine, "PATH": f"{folder.parent / 'bin'}:{BIN}:/usr/bin:/bin"}

    def plain(self, job: ci.Job, cached: Path | None = None) -> Ran:
        """A job of GitLab, or of Buildkite with its agent: all of its bash in one go; ``cached`` is what its cache has."""
        folder, env = self.folder()
        if cached and "cache" in job.raw:
            (path,) = job.raw["cache"]["paths"]
            shutil.copytree(cached, folder / path)
        agent = f"""
        case "$1 $2" in
          "artifact download") found=1; for each in "{self.artifacts}"/$3; do [ -e "$each" ] && cp "$each" "$4" && found=0; done; exit $found;;
          annotate*) cat > "{folder}/annotation";;
        esac"""
        ci.fake(folder.parent / "bin", "buildkite-agent", agent)
        for path in self.artifacts.glob("*/"):  # GitLab brings those of the jobs that are needed
            if path.name in job.needs:
                shutil.copytree(path, folder, dirs_exist_ok=True)
        status, said = bash(job.steps[0].script, folder, {**env, **job.env})
        wanted = job.raw.get("artifact_paths")
        if wanted and "/" not in wanted:
            shutil.copy(folder / wanted, self.artifacts)
        for path in job.raw.get("artifacts", {}).get("paths", []):
            if (folder / path).is_dir():
                shutil.copytree(folder / path, self.artifacts / job.name / path, dirs_exist_ok=True)
        return Ran(folder, status, said, {})

    def github(self, steps: list[dict[str, Any]], context: dict[str, Any], env: dict[str, Any]) -> Ran:
        """A job of GitHub, or a composite action, step by step."""
        folder, machine = self.folder()
        context = {**context, "github.workspace": str(folder)}
        status, said, after = 0, "", []
        for step in steps:
            if status and "cancelled()" not in step.get("if", ""):
                continue
            if "pull_request" in step.get("if", "") or (
                ".outputs.package" in step.get("if", "") and not context.get("steps.export.outputs.package")
            ):
                continue
            given = {key: ci.resolve(value, context) for key, value in step.get("with", {}).items()}
            action = step.get("uses", "").partition("@")[0].removeprefix("actions/")
            if action in ("cache", "cache/restore"):
                kept, path = self.caches / given["key"], folder / given["path"]
                if kept.exists():
                    shutil.copytree(kept, path)
                elif action == "cache":
                    after.append((path, kept))
            elif action == "upload-artifact":
                upload(folder, given["path"], self.artifacts / given["name"])
            elif action == "download-artifact":
                for each in self.artifacts.iterdir():
                    if fnmatch.fnmatch(each.name, given["pattern"]):
                        shutil.copytree(each, folder / given["path"], dirs_exist_ok=True)
            elif "run" in step:
                output, summary = folder.parent / "output", folder.parent / "summary"
                output.write_text("")
                own = {
                    key: str(ci.resolve(value, context))
                    for key, value in {**env, **step.get("env", {})}.items()
                }
                files = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
                ended, words = bash(step["run"], folder, {**machine, **files, **own})
                status, said = status or ended, said + words
                for line in output.read_text().splitlines():
                    key, _, value = line.partition("=")
                    context[f"steps.{step['id']}.outputs.{key}"] = value
        for path, kept in after:
            if not status:
                shutil.copytree(path, kept)
        return Ran(
            folder,
            status,
            said,
            {key: str(value) for key, value in context.items() if key.startswith("steps.")},
        )


def upload(folder: Path, paths: str, to: Path) -> None:
    """What upload-artifact does: the content of a folder, or the files of a pattern."""
    if (folder / paths).is_dir():
        shutil.copytree(folder / paths, to)
        return
    to.mkdir()
    for each in folder.glob(paths):
        shutil.copy(each, to)


def bash(script: str, folder: Path, env: dict[str, str]) -> tuple[int, str]:
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=180, check=False
    )
    assert not re.search("Traceback", done.stderr), done.stderr
    return done.returncode, done.stdout + done.stderr
