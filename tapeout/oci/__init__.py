"""A client of OCI registries, by the distribution spec (https://github.com/opencontainers/distribution-spec/blob/main/spec.md).

Blobs go up in chunks and come down in ranges; where a connection drops, they go on at the byte that was reached. The package `oras`
reads an upload into memory, begins a broken transfer again, and compares no digest of what it loads (docs/decisions/0022).
"""

from tapeout.oci.reference import DIGEST, Reference
from tapeout.oci.repository import INDEX_TYPE, MANIFEST_TYPE, Repository, Sent, sha256

__all__ = ["DIGEST", "INDEX_TYPE", "MANIFEST_TYPE", "Reference", "Repository", "Sent", "sha256"]
