"""Variables of Ray's processes: what routes prompts by their prefixes, and lets a chunk of a stream cost less.

Ray's processes read them when they start, so a cluster that runs already must have been started with them.
"""

from persimmon.server.ray import proxy

ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{proxy.__name__}:{proxy.middlewares.__name__}",
    # A chunk goes from replica to proxy in a message of gRPC; otherwise it is one of Ray's objects.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # Ray's default is 4 MiB, less than the vectors of a large request for embeddings take.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # Otherwise each chunk goes from one thread to another in the replica, and again in the proxy.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
