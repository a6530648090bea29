"""`persimmon bench`: speed and latency of any server with OpenAI's API.

It speaks HTTP and knows nothing of this project's own server.
"""
