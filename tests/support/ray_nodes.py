"""A Ray cluster of several machines' processes on this one: ``python ray_nodes.py NODES``; says its address, then obeys lines on stdin.

NODES is JSON: of each, the head first, keywords of ``Cluster.add_node``. ``kill N`` ends the processes of a node, as a machine that dies does.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    head, *others = json.loads(sys.argv[1])
    small = {"object_store_memory": 80_000_000, "num_cpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **small, **head})
    nodes = [cluster.head_node, *(cluster.add_node(**{**small, **each}) for each in others)]
    cluster.wait_for_nodes()
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        _, which = line.split()
        cluster.remove_node(nodes[int(which)], allow_graceful=False)
        sys.stdout.write("killed\n")
        sys.stdout.flush()
    cluster.shutdown()


if __name__ == "__main__":
    main()
