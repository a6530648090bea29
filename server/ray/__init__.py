"""The server as a Ray Serve application: replicas on the machines of a cluster, each with an engine of its own."""
