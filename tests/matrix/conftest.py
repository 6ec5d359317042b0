"""What the tests of shared storage have in common."""

from __future__ import annotations

from collections.abc import Iterator

import buckets
import fsspec
import pytest


@pytest.fixture(scope="session")
def _s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[buckets.Buckets]:
    if buckets.WHY_NOT:
        pytest.skip(buckets.WHY_NOT)
    with buckets.buckets(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def s3(_s3: buckets.Buckets, monkeypatch: pytest.MonkeyPatch) -> buckets.Buckets:
    """An S3 whose place fsspec knows, in this process and in those that it starts."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": _s3.url})
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", _s3.url)  # what fsspec makes of it when it is imported
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "somebody")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return _s3
