"""Where the deployment's files are, and how they are read."""

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"


def read_yaml(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.safe_load(path.read_text())


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
