"""Ray's request router for the replicas: each proxy sends a prompt where its beginning has been computed.

Ray pickles this module into every process that has a router, so it holds only the class; the rule is in `prefixes`.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from persimmon.server.ray.prefixes import Candidate, RecentPrefixes, known_bytes, ranked

PREFIXES = "prefixes"
"""What a replica reports in its routing statistics: the keys that it knows, in one text, separated by spaces."""

ROUTED_BYTES = 1 << 20
"""Of prompts that this router has sent to a replica and that its next report will have."""


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types here
    """Chooses among all replicas of the deployment, on whichever machine they are.

    A request's session id is the list of the keys of its prompt, separated by commas, which `proxy.PrefixHeader` has
    put there.  Another session id is a key too, which keeps a session at one replica as long as that is not the busier.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._reported: dict[ReplicaID, frozenset[str]] = {}
        self._routed: dict[ReplicaID, RecentPrefixes] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in the order in which Ray should try them, each a rank of its own."""
        if pending_request is None:
            return [candidate_replicas]
        # Ray would otherwise ask again without a pause where all replicas are full.
        pending_request.routing_context.should_backoff = True
        metadata = pending_request.metadata
        keys = _keys(metadata.session_id)
        replicas = {each.replica_id.unique_id: each for each in candidate_replicas}
        candidates = [
            Candidate(
                name,
                known_bytes(keys, self._known(each.replica_id)),
                self.replica_queue_len_cache.get(each.replica_id) or 0,
            )
            for name, each in replicas.items()
        ]
        first_key = keys[0] if keys else metadata.internal_request_id
        return [[replicas[candidate.name]] for candidate in ranked(candidates, first_key)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Remembers where a prompt went, until the replica reports it."""
        if keys := _keys(pending_request.metadata.session_id):
            self._routed.setdefault(replica_id, RecentPrefixes(ROUTED_BYTES)).add(keys)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Takes what replicas have reported, and forgets those that are gone."""
        super().update_replicas(replicas)
        present = {each.replica_id for each in replicas}
        self._reported = {each.replica_id: frozenset(each.routing_stats.get(PREFIXES, "").split()) for each in replicas}
        self._routed = {own: routed for own, routed in self._routed.items() if own in present}

    def _known(self, replica_id: ReplicaID) -> list[RecentPrefixes | frozenset[str]]:
        places = (self._reported.get(replica_id), self._routed.get(replica_id))
        return [place for place in places if place]


def _keys(session_id: str) -> list[str]:
    return session_id.split(",") if session_id else []
