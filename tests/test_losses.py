"""What the actor workers note of every turn."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from rema_verl.trainers import losses

CONFIG = OmegaConf.create({"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.3, "clip_ratio_c": 3.0})
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("advantage", "ratio", "clipped"),
    [
        (1.0, 1.29, False),
        (1.0, 1.31, True),
        (1.0, 0.5, False),
        (-1.0, 0.81, False),
        (-1.0, 0.79, True),
        (-1.0, 2.9, False),
        (-1.0, 3.1, True),
        (0.0, 9.0, False),
    ],
)
def test_a_turn_is_clipped_on_the_side_its_advantage_points_to(advantage, ratio, clipped):
    new = torch.zeros(2, 4)
    new[0, 3] = math.log(ratio)
    found = losses.turns_of(CONFIG, new, torch.zeros(2, 4), torch.full((2, 4), advantage), MASK, torch.tensor([7, -1]))
    assert found["row"].tolist() == [7, 7, -1] and found["turn"].tolist() == [0, 1, 0]
    assert found["log_ratio"].tolist() == pytest.approx([0, math.log(ratio), 0])
    assert found["clipped"].tolist() == [False, clipped, False]


def test_the_ratio_is_the_mean_over_the_turn_and_what_is_masked_is_not_read():
    new = torch.tensor([[0.5, -0.1, math.nan, 0.0], [math.inf, 0.3, 0.3, 0.0]])
    found = losses.turns_of(CONFIG, new, torch.zeros(2, 4), torch.ones(2, 4), MASK, torch.tensor([0, 1]))
    assert found["log_ratio"].tolist() == pytest.approx([0.2, 0.0, 0.2])


def test_turns_stay_what_they_were_where_rejection_took_tokens():
    """verl's ``rollout_rs=token_*`` made two holes in row 0's only turn, and took all of row 1's first turn."""
    sampled = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]])
    left = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0]])
    new = torch.tensor([[0.3, 9.0, 0.0, math.inf, 0.0], [math.nan, 9.0, 0.0, 0.5, 0.0]])
    zeros = torch.zeros(2, 5)
    found = losses.turns_of(CONFIG, new, zeros, zeros + 1, left, torch.tensor([0, 1]), loss_mask=sampled)
    assert (found["row"].tolist(), found["turn"].tolist()) == ([0, 1], [0, 1])
    assert found["log_ratio"].tolist() == pytest.approx([0.1, 0.5]) and found["clipped"].tolist() == [False, True]


def test_notes_are_taken_once(monkeypatch):
    zeros = torch.zeros(2, 4)
    made = losses.turns_of(CONFIG, zeros, zeros, zeros, MASK, torch.tensor([0, 1]))
    monkeypatch.setattr(losses, "_noted", [made, made])
    assert len(losses.take_turns(None)) == 6 and len(losses.take_turns(None)) == 0


def test_no_turn_at_all():
    zeros = torch.zeros(2, 4)
    assert len(losses.turns_of(CONFIG, zeros, zeros, zeros, zeros, torch.tensor([0, 1]))) == 0


def test_a_clip_range_that_reaches_zero_clips_nothing_below():
    zeros = torch.zeros(2, 4)
    wide = OmegaConf.merge(CONFIG, {"clip_ratio_low": 1.0})
    found = losses.turns_of(wide, zeros - 5, zeros, zeros - 1, MASK, torch.tensor([0, 1]))
    assert found["clipped"].tolist() == [False, False, False]
