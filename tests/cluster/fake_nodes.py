"""Ray's fake provider, for node types that name their memory.

Ray's own passes `memory` on as a custom resource, which its nodes refuse; the nodes detect it.
"""

import os
import time
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):
    """Starts nodes as processes of this machine."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: dict[str, Any], labels: Any
    ) -> None:
        # Real ones take minutes to come.
        time.sleep(float(os.environ.get("FAKE_NODE_COMES_AFTER_S", 0)))
        detected = {name: value for name, value in resources.items() if name != "memory"}
        super()._create_node_with_resources_and_labels(node_config, tags, count, detected, labels)
