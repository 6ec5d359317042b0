"""A Ray cluster of several machines' processes on this one: ``python ray_nodes.py NODES``; says its address, then obeys lines on stdin.

NODES is JSON: of each, the head first, keywords of ``Cluster.add_node``; and ``mounts``, what it sees otherwise than the nodes before it: a path
and what stands there instead, a file or null, an empty directory (Linux, as root: namespaces of mounts).

``kill N`` ends the processes of a node, as a machine that dies does. ``ray VERSION`` lets the cluster say that it runs another Ray.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from typing import Any

from ray._common.usage import usage_constants, usage_lib
from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

_CLONE_NEWNS = 0x00020000  # linux/sched.h


def main() -> None:
    head, *others = json.loads(sys.argv[1])
    small = {"object_store_memory": 80_000_000, "num_cpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **small, **head})
    nodes = [cluster.head_node, *(add(cluster, {**small, **each}) for each in others)]
    cluster.wait_for_nodes()
    say(cluster.address)
    for line in sys.stdin:
        what, which = line.split()
        if what == "kill":
            cluster.remove_node(nodes[int(which)], allow_graceful=False)
        else:
            claim(GcsClient(address=cluster.address), which)
        say("done")
    cluster.shutdown()


def add(cluster: Cluster, keywords: dict[str, Any]) -> Any:
    mounts: dict[str, str | None] = keywords.pop("mounts", {})
    if mounts and ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    if mounts:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for path, instead in mounts.items():
        what = ["--bind", instead] if instead else ["-t", "tmpfs", "tmpfs"]
        subprocess.run(["mount", *what, path], check=True)
    return cluster.add_node(**keywords)


def claim(gcs: GcsClient, version: str) -> None:
    found = usage_lib.get_cluster_metadata(gcs) | {"ray_version": version}
    key, space = usage_constants.CLUSTER_METADATA_KEY, KV_NAMESPACE_CLUSTER
    gcs.internal_kv_put(key, json.dumps(found).encode(), overwrite=True, namespace=space)


def say(words: str) -> None:
    os.write(1, f"{words}\n".encode())


if __name__ == "__main__":
    main()
