"""What must be set before Ray is imported."""

import os

# Ray's way to say that its processes listen on loopback; on Linux they listen on all interfaces otherwise.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
