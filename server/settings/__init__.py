"""The settings of the server in sections, so that each process gets those that it needs and no others."""

ENVIRONMENT_PREFIX = "PERSIMMON_"
"""What the environment variable of a setting begins with."""
