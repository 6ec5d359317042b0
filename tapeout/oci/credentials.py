"""Logins to registries, as ``docker login``, ``oras login`` and ``skopeo login --compat-auth-file`` keep them.

The file is ``$DOCKER_CONFIG/config.json``, ``~/.docker/config.json`` by default: ``auths`` holds them, or ``credHelpers`` and
``credsStore`` name programs ``docker-credential-NAME`` that do (https://docs.docker.com/reference/cli/docker/login/).
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapeout.errors import RegistryError

DOCKER_HUB = "docker.io"
_HUB_KEY = "https://index.docker.io/v1/"
_HELPER_TIMEOUT_S = 60
_TOKEN_USER = "<token>"  # what a helper says instead of a user whose secret is an identity token


@dataclass(frozen=True)
class Login:
    """A user and password, or an identity token that a token server exchanges."""

    user: str
    password: str
    identity_token: str | None = None

    @property
    def basic(self) -> str:
        """The value of a header ``Authorization``."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def login(host: str) -> Login | None:
    """The login that is kept for ``host[:port]``; None where there is none.

    Raises:
        RegistryError: the file or a helper cannot be read.
    """
    path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        auths, helpers = dict(config.get("auths") or {}), dict(config.get("credHelpers") or {})
        store = config.get("credsStore")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RegistryError(f"{path} cannot be read as docker's configuration: {error}.") from error
    key = _HUB_KEY if host == DOCKER_HUB else host
    if helper := helpers.get(key) or helpers.get(host) or store:
        return _of_helper(str(helper), key)
    for name, entry in auths.items():
        if name == key or _host(name) == host:
            return _of_entry(entry, name, path)
    return None


def _host(name: str) -> str:
    """The host of a key of ``auths``, which may be written as an address."""
    return name.partition("://")[2].partition("/")[0] if "://" in name else name.partition("/")[0]


def _of_entry(entry: Mapping[str, Any], name: str, path: Path) -> Login | None:
    try:
        token = entry.get("identitytoken")
        if "auth" in entry:
            user, colon, password = base64.b64decode(entry["auth"]).decode().partition(":")
            if not colon:
                raise ValueError("no colon between user and password")
        else:
            user, password = entry.get("username", ""), entry.get("password", "")
    except (AttributeError, TypeError, ValueError) as error:
        raise RegistryError(f"{path} has no readable login of {name}: {error}; log in again.") from error
    return Login(user, password, token) if user or token else None


def _of_helper(helper: str, key: str) -> Login | None:
    """What ``docker-credential-HELPER get`` says: https://github.com/docker/docker-credential-helpers."""
    program = f"docker-credential-{helper}"
    if not re.fullmatch(r"[\w.-]+", helper):
        raise RegistryError(f"docker's configuration names {helper!r}, which is no credential helper.")
    try:
        done = subprocess.run(
            [program, "get"],
            input=key,
            capture_output=True,
            text=True,
            check=False,
            timeout=_HELPER_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RegistryError(
            f"{program}, which docker's configuration names for {key}, does not work: {error}."
        ) from error
    if done.returncode:
        if "not found" in done.stdout + done.stderr:
            return None
        raise RegistryError(f"{program} gave no login of {key}: {(done.stdout or done.stderr).strip()}.")
    try:
        said = json.loads(done.stdout)
        user, secret = str(said["Username"]), str(said["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"{program} said something that is no login of {key}.") from error
    return Login("", "", secret) if user == _TOKEN_USER else Login(user, secret)
