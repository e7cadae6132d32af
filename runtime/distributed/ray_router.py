"""Which replica answers a request: that of its first picture, unless it is busier than the others.

The replica of a picture is found by rendezvous hashing: every router gives the same answer without a word between
them, and when a replica comes or goes only the pictures that go to it, or went to it, change places.
"""

import random
from hashlib import sha256

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

# Requests by which the replica of a picture may be busier than the idlest one and still be chosen.
PATIENCE = 2


def home_of(key: str, names: list[str]) -> str:
    """Which of `names` a key belongs to."""
    return max(names, key=lambda name: sha256(f"{name} {key}".encode()).digest())


class PictureRouter(RequestRouter):
    """Ray Serve's router of the replicas. A request's `session_id` is the key of its first picture, or empty."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas: of each the idlest one that takes the request is chosen."""
        if not candidate_replicas:
            return []
        # What is not known counts as idle: it is asked before it is chosen.
        load = {one.replica_id: self.replica_queue_len_cache.get(one.replica_id) or 0 for one in candidate_replicas}
        idlest = sorted(candidate_replicas, key=lambda one: (load[one.replica_id], random.random()))
        ranks = [idlest[:2], idlest]
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # or it would ask full replicas without a pause
            key = pending_request.metadata.session_id
            if key:
                by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
                home = by_name[home_of(key, list(by_name))]
                if load[home.replica_id] <= load[idlest[0].replica_id] + PATIENCE:
                    ranks.insert(0, [home])
        return ranks
