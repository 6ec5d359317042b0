"""Pipelines as the systems that run them read them: their jobs in order, each with its variables and its lines of bash."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """YAML 1.2 of what matters here: ``on`` is a string."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in each if tag != "tag:yaml.org,2002:bool"]
    for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|false"), ["t", "f"])


@dataclass(frozen=True)
class Step:
    """Lines of bash, or an action with its inputs."""

    script: str = ""
    action: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Job:
    """``needs`` are names of jobs; ``env`` what its shell has."""

    name: str
    needs: tuple[str, ...]
    env: dict[str, str]
    steps: tuple[Step, ...]
    raw: dict[str, Any]


def read(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load(text, Loader)
    return found


def jobs(system: str, text: str) -> list[Job]:
    return {"github": _github, "gitlab": _gitlab, "buildkite": _buildkite}[system](read(text))


def resolve(value: Any, context: dict[str, Any]) -> Any:
    """GitHub's ``${{ a.b }}`` by what ``context`` has at ``a.b``; a quoted word is itself."""

    def one(match: re.Match[str]) -> str:
        what = match[1].strip()
        return what[1:-1] if what.startswith("'") else str(context[what])

    return re.sub(r"\$\{\{(.*?)\}\}", one, value) if isinstance(value, str) else value


def _github(pipeline: dict[str, Any]) -> list[Job]:
    found = []
    for name, job in pipeline["jobs"].items():
        for row in job.get("strategy", {}).get("matrix", {}).get("include", [{}]):
            context = {f"matrix.{key}": value for key, value in row.items()}
            env = {key: resolve(value, context) for key, value in {**pipeline["env"], **job["env"]}.items()}
            steps = tuple(
                Step(
                    each.get("run", ""),
                    each.get("uses", ""),
                    each.get("with", {}),
                    each.get("env", {}),
                    each.get("name", ""),
                )
                for each in job["steps"]
            )
            steps = tuple(
                Step(
                    s.script,
                    s.action,
                    {
                        k: resolve(v, {**context, "steps.codes.outputs.digest": "DIGEST"})
                        for k, v in s.inputs.items()
                    },
                    s.env,
                    s.name,
                )
                for s in steps
            )
            needs = job.get("needs", [])
            found.append(
                Job(
                    name if not row else f"{name}/{row['cell']}",
                    tuple(needs),
                    env,
                    steps,
                    {**job, "row": row},
                )
            )
    return found


def _gitlab(pipeline: dict[str, Any]) -> list[Job]:
    keywords = {"stages", "workflow", "variables", "default"}
    found = []
    for name, job in pipeline.items():
        if name in keywords or name.startswith("."):
            continue
        whole = {**pipeline["default"], **pipeline.get(job.get("extends", ""), {}), **job}
        env = {
            key: value.replace("$$", "$")
            for key, value in {**pipeline["variables"], **whole["variables"]}.items()
        }
        script = "\n".join([*whole["before_script"], *whole["script"]])
        needs = whole.get("needs", whole.get("dependencies", []))
        found.append(Job(name, tuple(needs), env, (Step(script),), whole))
    return found


def _buildkite(pipeline: dict[str, Any]) -> list[Job]:
    found = []
    for step in pipeline["steps"]:
        for each in step.get("steps", [step]):
            env = {key: value.replace("$$", "$") for key, value in {**pipeline["env"], **each["env"]}.items()}
            assert not re.search(r"(?<!\$)(?:\$\$)*\$(?!\$)", each["command"]), (
                "a dollar that the upload would take"
            )
            needs = [need["step"] for need in each.get("depends_on", [])]
            found.append(
                Job(
                    each["key"],
                    tuple(needs),
                    env,
                    (Step(each["command"].replace("$$", "$")),),
                    {**each, "group": step.get("key")},
                )
            )
    return found


def scripts(system: str, text: str) -> list[tuple[Job, str]]:
    """Every piece of bash with the job that it stands in."""
    return list(
        itertools.chain.from_iterable(
            [(job, s.script) for s in job.steps if s.script] for job in jobs(system, text)
        )
    )


def fake(folder: Path, name: str, script: str) -> None:
    """A command of this name in ``folder``."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
