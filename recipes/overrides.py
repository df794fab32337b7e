"""Print configuration files as Hydra command-line overrides, one per line: ``python recipes/overrides.py FILE...``

SMOKE=1 needs them in this form: what a recipe sets on the command line outranks any configuration file.
"""

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from rema_verl.errors import Parser, UserError, die


def leaves(node: DictConfig, prefix: str = ""):
    """(dotted key, value as Hydra writes it) for every leaf; interpolations stay interpolations."""
    for key in node:
        raw = node._get_node(key)
        if isinstance(raw, DictConfig):
            yield from leaves(raw, f"{prefix}{key}.")
        else:
            value = list(raw) if OmegaConf.is_list(raw) else raw._value()
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def as_overrides(file: str | Path) -> list[str]:
    """A configuration file as overrides that outrank everything before them."""
    return [f"++{key}={value}" for key, value in leaves(OmegaConf.load(file))]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="overrides.py", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    files = parser.parse_args(argv).files
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file")
    print("\n".join(line for file in files for line in as_overrides(file)))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        die(e)
