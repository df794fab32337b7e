"""The table of verl's keys has all of them, what it refuses is refused, and docs/capabilities.md is what it says."""

import contextlib
import functools
import itertools

import pytest
from conftest import REPO
from omegaconf import OmegaConf, open_dict

from rema_verl import checks
from rema_verl.config import composing, keys

NAMES = ("ppo_trainer", "rema_trainer", "mpdf_trainer")
LOSS, ESTIMATOR = "actor_rollout_ref.actor.policy_loss.loss_mode", "algorithm.adv_estimator"
ROWS = [row for row in keys.table()["rows"] if row.refused or row.no_effect]


@functools.cache
def composed(name: str):
    return composing.compose(name, [] if name == "ppo_trainer" else ["+device=cpu"])


@contextlib.contextmanager
def setting(config, **values):
    """Keys set for a while, however deep; to copy or compose a whole configuration takes longer."""
    before = {key: keys.value_of(config, key, keys.ABSENT) for key in values}
    try:
        for key, value in values.items():
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        yield config
    finally:
        for key, value in before.items():
            if value is keys.ABSENT:
                parent, _, name = key.rpartition(".")
                with open_dict(parent := OmegaConf.select(config, parent)):
                    del parent[name]
            else:
                OmegaConf.update(config, key, value, merge=False, force_add=True)


def run_in(mode: str, **values):
    """A configuration of ours, in one of the modes."""
    return setting(composed("mpdf_trainer" if mode == "mpdf" else "rema_trainer"), **{keys.MODE: mode}, **values)


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_verls_configuration_is_in_the_table(name):
    """A key that a new verl brings is in none of the lists."""
    found = {key: keys.places(key) for key in keys.keys_of(composed(name))}
    assert [key for key, places in found.items() if not places] == []
    assert {key: places for key, places in found.items() if len(places) > 1} == {}  # one or the other


def test_the_table_has_no_key_that_verl_has_not():
    known = {key for name in NAMES for key in keys.keys_of(composed(name))}
    table = keys.table()
    listed = [*table["honoured"], *table["beside"]]
    assert [key for key in listed if not any(keys.matches(one, [key]) for one in known)] == []
    config = composed("ppo_trainer")
    in_rows = {key for row in table["rows"] for key in row.keys}
    assert [key for key in in_rows if keys.value_of(config, key, keys.ABSENT) is keys.ABSENT] == []


def test_no_family_is_a_whole_group():
    """Else a key that a new verl brings would be in it."""
    families = [key for key in keys.table()["beside"] if "*" in key]
    for group in keys.GROUPS:
        assert not keys.matches(f"{group}.new", families) and not keys.matches(f"{group}.optim.new", families)
    assert not keys.matches("actor_rollout_ref.actor.fsdp_config.new", families)


@pytest.mark.parametrize("mode", keys.MODES)
def test_what_verl_and_our_configurations_set_is_neither_refused_nor_noted(mode):
    with run_in(mode) as config:
        assert list(keys.found(config)) == []


def test_verls_defaults_are_among_the_values_that_rows_let_pass():
    config = composed("ppo_trainer")
    for row in ROWS:
        same = row.same_as and keys.value_of(config, row.same_as)
        for key in row.keys if row.only is not None else ():
            assert not row.names(keys.value_of(config, key), same), key


def other(row: keys.Row, value):
    """A value that the row is about."""
    if row.values is not None:
        return keys.text(row.values[0]).replace("*", "x") if isinstance(row.values[0], str) else row.values[0]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else {"x": 1} if isinstance(value, dict) else "x"


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.keys[0]}-{i}" for i, row in enumerate(ROWS)])
def test_every_row_is_said_in_one_line_that_names_the_key(row):
    first = {key: values[0][0] if isinstance(values[0], list) else values[0] for key, values in row.when.items()}
    where = {key: "x" if value == "*" else value for key, value in first.items()}
    for mode, key in itertools.product(row.modes or keys.MODES, row.keys):
        with run_in(mode, **where) as config:
            value = other(row, keys.value_of(config, key))
            with setting(config, **{key: value}):
                if not row.holds(config):  # its condition is on the agent loop, which this mode has no choice of
                    assert mode == "mpdf" and keys.LOOP in row.unless
                    continue
                said = f"{key}={keys.text(value)} {'' if row.refused else 'has no effect: '}"
                (line,) = [line for line in keys.refusals(config) + keys.notes(config) if line.startswith(said)][:1]
                assert "\n" not in line and "{" not in line.removeprefix(said)


def test_a_refusal_is_one_line_and_exit_code_2_and_a_note_is_one_line(capsys):
    with run_in("rema", **{"actor_rollout_ref.actor.grad_clip": 0.5}) as config, pytest.raises(SystemExit) as end:
        checks.check_or_exit(config)
    assert end.value.code == 2
    line = "actor_rollout_ref.actor.grad_clip=0.5 is not read by verl's v1 trainers: set actor_rollout_ref.actor.optim."
    assert line in capsys.readouterr().err
    with run_in("rema", **{"trainer.balance_batch": False}) as config:
        assert keys.notes(config) == ["trainer.balance_batch=false has no effect: verl's v1 trainers always balance"]


def test_of_a_run_with_single_pieces_only_what_is_about_them_is_refused():
    stock = {keys.MODE: "sync", "actor_rollout_ref.actor.grad_clip": 0.5}
    token = {"algorithm.rollout_correction.rollout_rs": "seq_max_k2,token_k1"}
    with setting(composed("ppo_trainer"), **stock, **token, **{ESTIMATOR: "grpo", "algorithm.gamma": 0.9}) as config:
        keys.check(config)  # nothing of ours
        with setting(config, **{ESTIMATOR: "softrankpo"}), pytest.raises(ValueError, match=r"gamma=0\.9 is not read"):
            keys.check(config)
        with setting(config, **{LOSS: "turn_clip"}), pytest.raises(ValueError, match=r"rollout_rs=.*cuts turns into"):
            keys.check(config)


@pytest.mark.parametrize("mode", ["rema", "rema_separate", "mpdf", "sync"])
def test_whole_rows_may_be_rejected_where_turns_count_and_single_tokens_elsewhere(mode):
    rejection = "algorithm.rollout_correction.rollout_rs"
    with run_in(mode, **{rejection: "seq_mean_k1"}) as config:
        keys.check(config)
    with run_in(mode, **{rejection: "token_k1"}) as config, pytest.raises(ValueError, match="reject whole rows"):
        keys.check(config)
    with run_in(mode, **{rejection: "token_k1", LOSS: "vanilla"}) as config:
        keys.check(config)


def test_the_documentation_is_what_the_table_says():
    """Written by  python -m rema_verl.config.keys > docs/capabilities.md"""
    text = (REPO / "docs" / "capabilities.md").read_text()
    assert text == keys.capabilities()
    for row in (*ROWS, *keys.table()["overrides"]):
        assert all(f"`{key}`" in text for key in row.keys)
