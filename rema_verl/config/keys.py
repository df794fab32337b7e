"""What each trainer mode does with verl's keys: ``keys.yaml``, for the checks and for ``docs/capabilities.md``.

    python -m rema_verl.config.keys > docs/capabilities.md

Imports neither verl nor torch.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

MODES = ("rema", "rema_separate", "mpdf", "sync", "colocate_async", "separate_async")
MODE, LOOP = "trainer.v1.trainer_mode", "actor_rollout_ref.rollout.agent.default_agent_loop"
# key -> what of it is ours. A run with the first two is one of ours; the others go into any recipe of verl's.
OURS = {
    MODE: ("rema", "rema_separate", "mpdf"),
    LOOP: ("rema", "mpdf"),
    "algorithm.adv_estimator": ("role_grpo", "turn_reinforce_plus_plus", "softrankpo"),
    "actor_rollout_ref.actor.policy_loss.loss_mode": ("turn_clip",),
    "reward.reward_manager.name": ("rema", "mpdf"),
}
PARTS = ("actor", "rollout", "ref")
GROUPS = ("algorithm", *(f"actor_rollout_ref.{part}" for part in PARTS), "reward", "trainer", "data")
ABSENT = object()


@dataclass(frozen=True)
class Row:
    """A row of the table; what its fields mean stands in ``keys.yaml``, above ``rows``."""

    keys: list[str]
    refused: str = ""
    no_effect: str = ""
    modes: list[str] | None = None
    when: dict[str, list] = field(default_factory=dict)
    unless: dict[str, list] = field(default_factory=dict)
    values: list | None = None
    only: list | None = None
    same_as: str | None = None

    def holds(self, config: DictConfig) -> bool:
        """Whether the row is about this run."""
        if self.modes is not None and value_of(config, MODE) not in self.modes:
            return False
        when, unless = ([matches(value_of(config, k), w) for k, w in c.items()] for c in (self.when, self.unless))
        return all(when) and not any(unless)

    def names(self, value: Any, same: Any = None) -> bool:
        """Whether this value of one of its keys is what the row is about."""
        if self.values is not None:
            return matches(value, self.values)
        return not (matches(value, self.only or []) or (self.same_as is not None and value == same))


@functools.cache
def table() -> dict[str, Any]:
    """``keys.yaml`` with its keys written out and its rows as :class:`Row`."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    raw = yaml.load(Path(__file__).with_name("keys.yaml").read_text("utf-8"), Loader=loader)
    return {
        "honoured": [f"{group}.{name}" for group, names in raw["honoured"].items() for name in names],
        "beside": {key: why for pattern, why in raw["beside"].items() for key in written_out(pattern)},
        "rows": [Row(**row) for row in raw["rows"]],
        "overrides": [Row(**row) for row in raw["overrides"]],
    }


def written_out(pattern: str) -> list[str]:
    """The keys or patterns that one with braces stands for.

    >>> written_out("a.{b,c}.*")
    ['a.b.*', 'a.c.*']
    """
    found = re.search(r"\{(.*?)\}", pattern)
    return [pattern.replace(found[0], one) for one in found[1].split(",")] if found else [pattern]


def value_of(config: DictConfig, key: str, default: Any = None) -> Any:
    """As plain data; ``default`` where there is no such key."""
    value = OmegaConf.select(config, key, default=default)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def matches(value: Any, wanted: list) -> bool:
    """Whether it is one of the wanted values; ``*`` in a text stands for anything that is set.

    >>> matches("seq_sum_k1,token_k1", ["*token_*"]), matches(None, ["*"]), matches(0.0, [[0], [1]])
    (True, False, True)
    """
    for one in wanted:
        if isinstance(one, list):
            if value == one or matches(value, one):
                return True
        elif isinstance(one, str) and value is not None:
            if fnmatchcase(text(value), one):
                return True
        elif value == one:
            return True
    return False


def text(value: Any) -> str:
    """As on a command line.

    >>> text(True), text(None), text(0.5)
    ('true', 'null', '0.5')
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


# --- checks ----------------------------------------------------------------------------------------------------------


def found(config: DictConfig) -> Iterator[tuple[Row, str, Any]]:
    """(row, key, value) of every key of this run that a row of the table is about."""
    own = [key for key, names in OURS.items() if value_of(config, key) in names]
    pieces = not {MODE, LOOP} & set(own)  # single pieces in a recipe of verl's: only what is about them
    for row in table()["rows"]:
        if (pieces and not set(own) & set(row.when)) or not row.holds(config):
            continue
        for key in row.keys:
            value = value_of(config, key, ABSENT)
            if value is not ABSENT and row.names(value, row.same_as and value_of(config, row.same_as)):
                yield row, key, value


def check(config: DictConfig) -> None:
    """Refuse what the run's trainer mode would not do.

    Raises:
        ValueError: for the first key refused; one line.
    """
    for line in refusals(config):
        raise ValueError(line)


def refusals(config: DictConfig) -> list[str]:
    """One line for each key that is refused."""
    mode = str(value_of(config, MODE))
    return [f"{k}={text(value)} {_filled(row.refused, mode=mode)}" for row, k, value in found(config) if row.refused]


def notes(config: DictConfig) -> list[str]:
    """One line for each key that is set and has no effect."""
    return [f"{key}={text(value)} has no effect: {row.no_effect}" for row, key, value in found(config) if row.no_effect]


def check_overrides(config: DictConfig, role: str, overrides: dict[str, Any]) -> None:
    """Refuse what ``rema.roles.<role>.overrides`` cannot give to one role.

    Raises:
        ValueError: for the first key refused; one line.
    """
    for key, value in leaves(overrides):
        for row in table()["overrides"]:
            if matches(key, row.keys) and row.holds(config):
                why = _filled(row.refused, role=role, key=key, name=key.rpartition(".")[2])
                raise ValueError(f"rema.roles.{role}.overrides.{key}={text(value)} {why}")


def _filled(message: str, **values: str) -> str:
    return re.sub(r"\{(%s)\}" % "|".join(values), lambda match: values[match[1]], " ".join(message.split()))


# --- the whole table -------------------------------------------------------------------------------------------------


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in it.

    >>> list(leaves({"a": {"b": 1, "c": {}}, "d": [2]}))
    [('a.b', 1), ('a.c', {}), ('d', [2])]
    """
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def places(key: str) -> list[str]:
    """Which parts of the table have this key; those that have it only in a pattern count where none has itself."""
    in_row = any(key in row.keys for row in table()["rows"])
    exact = ["rows"] * in_row + [name for name in ("honoured", "beside") if key in table()[name]]
    return exact or [name for name in ("honoured", "beside") if matches(key, list(table()[name]))]


def keys_of(config: DictConfig) -> list[str]:
    """The keys of a whole verl configuration that the table must have, interpolations not followed."""
    tree: Any = OmegaConf.to_container(config, resolve=False)
    found = []
    for group in GROUPS:
        block = functools.reduce(lambda block, name: block[name], group.split("."), tree)
        found += [key for key, _ in leaves(block, f"{group}.")]
    return found


def capabilities() -> str:
    """The text of ``docs/capabilities.md``."""
    lines = [
        "# What each trainer mode does with verl's keys",
        "",
        "Written by `python -m rema_verl.config.keys` from `rema_verl/config/keys.yaml`; a test compares the two, and",
        "another one finds the keys of verl's configuration that are missing there. For verl 0.9.1, and for the modes",
        f"{', '.join(f'`{mode}`' for mode in MODES[:-1])} and `{MODES[-1]}`;",
        "the last three are verl's own, with agent loop `rema`.",
        "",
        "A key is honoured as in verl where no table says otherwise. A value that is refused is one line and exit code",
        "2 before anything is started; one without effect is one line, and the run goes on.",
        "",
        "## Refused",
        "",
        "| Key | Value | Modes | Where | It ... |",
        "|---|---|---|---|---|",
        *_rows([row for row in table()["rows"] if row.refused], "refused"),
        "",
        "## Without effect",
        "",
        "| Key | Value | Modes | Where | Because |",
        "|---|---|---|---|---|",
        *_rows([row for row in table()["rows"] if row.no_effect], "no_effect"),
        "",
        "## In `rema.roles.<role>.overrides`",
        "",
        "Mode `rema_separate` lays them over `actor_rollout_ref` for one role. Refused there, beside all of the above:",
        "",
        "| Key | Value | Modes | Where | It ... |",
        "|---|---|---|---|---|",
        *_rows(table()["overrides"], "refused"),
        "",
        "## Honoured in every mode",
        "",
        "With the keys above, where no row of theirs applies:",
        "",
        *(f"- `{group}`: {_names(group)}" for group in GROUPS),
        "",
        "## Beside the training",
        "",
        "As in verl, and nothing that changes what is trained:",
        "",
        *(f"- {', '.join(f'`{key}`' for key in keys)}: {why}" for why, keys in _families().items()),
    ]
    return "\n".join(lines) + "\n"


def _rows(rows: list[Row], kind: str) -> Iterator[str]:
    for row in rows:
        modes = "all" if row.modes is None else ", ".join(row.modes)
        if kind == "refused" and row in table()["overrides"]:
            modes = "rema_separate"
        which = [_values(row.values)] if row.values is not None else []
        if row.only is not None:
            which = [f"not {_values(row.only)}"] if row.only else []
            which += [f"not that of `{row.same_as}`"] if row.same_as else []
        where = [f"`{key}` is {_values(values)}" for key, values in row.when.items()]
        where += [f"`{key}` is not {_values(values)}" for key, values in row.unless.items()]
        said = _filled(getattr(row, kind), mode="<mode>").replace("|", "\\|")
        keys = ", ".join(f"`{key}`" for key in row.keys)
        yield f"| {keys} | {', '.join(which) or 'any'} | {modes} | {'; '.join(where) or 'always'} | {said} |"


def _values(values: list) -> str:
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return " or ".join("set" if value == "*" else f"`{text(value)}`" for value in flat)


def _names(group: str) -> str:
    return ", ".join(f"`{key.removeprefix(group + '.')}`" for key in table()["honoured"] if key.startswith(f"{group}."))


def _families() -> dict[str, list[str]]:
    by_reason: dict[str, list[str]] = {}
    for key, why in table()["beside"].items():
        by_reason.setdefault(why, []).append(key)
    return by_reason


if __name__ == "__main__":
    print(capabilities(), end="")
