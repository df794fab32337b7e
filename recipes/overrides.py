"""Print configuration files as Hydra command-line overrides, one per line: ``python recipes/overrides.py FILE...``

SMOKE=1 needs them in this form: what a recipe sets on the command line outranks any configuration file.
"""

import json
import sys

from omegaconf import DictConfig, OmegaConf


def leaves(node: DictConfig, prefix: str = ""):
    """(dotted key, value as Hydra writes it) for every leaf; interpolations stay interpolations."""
    for key in node:
        raw = node._get_node(key)
        if isinstance(raw, DictConfig):
            yield from leaves(raw, f"{prefix}{key}.")
        else:
            value = list(raw) if OmegaConf.is_list(raw) else raw._value()
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    for file in sys.argv[1:]:
        for key, value in leaves(OmegaConf.load(file)):
            print(f"++{key}={value}")
