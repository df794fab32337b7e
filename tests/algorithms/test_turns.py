"""Turns read off the mask, against a loop over the tokens."""

import pytest
import torch

from rema_verl.algorithms.turns import count_turns, find_turns, sum_per_span, sum_per_turn, to_tokens

# starts with 1, ends with 1, one-token turns, all ones, no valid token, tool_agent-like
MASK = torch.tensor(
    [
        [1, 0, 1, 1, 0, 1],
        [0, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [1, 1, 0, 0, 1, 0],
    ]
)


def reference_turns(mask):
    """[(row, [token, ...]), ...] in row order."""
    turns = []
    for row, values in enumerate(mask.tolist()):
        for token, valid in enumerate(values):
            if valid and (token == 0 or not values[token - 1]):
                turns.append((row, []))
            if valid:
                turns[-1][1].append(token)
    return turns


@pytest.mark.parametrize("mask", [MASK, *[torch.rand(9, 33) < p for p in (0.1, 0.5, 0.95)]])
def test_structure_and_sums(mask):
    expected = reference_turns(mask)
    turns = find_turns(mask)
    assert turns.num == len(expected) == count_turns(mask)
    assert turns.row.tolist() == [row for row, _ in expected]
    assert turns.length.tolist() == [len(tokens) for _, tokens in expected]
    assert turns.per_row.tolist() == [sum(row == r for r, _ in expected) for row in range(len(mask))]
    values = torch.randn(mask.shape, dtype=torch.float64)
    sums = sum_per_turn(values, turns)
    torch.testing.assert_close(sums, torch.stack([values[r, t].sum() for r, t in expected]))
    on_tokens = torch.zeros_like(values)
    for number, (row, tokens) in enumerate(expected):
        on_tokens[row, tokens] = sums[number]
    torch.testing.assert_close(to_tokens(sums, turns), on_tokens)


@pytest.mark.parametrize("mask", [MASK, torch.rand(9, 33) < 0.5, torch.rand(9, 33) < 0.05])
def test_spans_lose_no_reward_of_a_row_that_spoke(mask):
    values = torch.randn(mask.shape, dtype=torch.float64)
    expected = []
    turns = reference_turns(mask)
    for number, (row, tokens) in enumerate(turns):
        is_first = number == 0 or turns[number - 1][0] != row
        is_last = number + 1 == len(turns) or turns[number + 1][0] != row
        start = 0 if is_first else tokens[0]
        end = mask.shape[1] if is_last else turns[number + 1][1][0]
        expected.append(values[row, start:end].sum())
    torch.testing.assert_close(sum_per_span(values, find_turns(mask)), torch.stack(expected))


def test_count_turns_of_jagged_rows():
    for mask in (MASK, torch.rand(20, 12) < 0.5):
        # Two of the rows keep nothing at all: an empty row in the middle and one at the end.
        lengths = [6, 3, 0, 6, 6, 4] + [int(n) for n in torch.randint(0, 12, (13,))] + [0]
        rows = [row[:n] for row, n in zip(mask, lengths[: len(mask) - 1] + [0], strict=True)]
        jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
        assert count_turns(jagged) == sum(count_turns(row[None]) for row in rows if len(row))


def test_no_row_and_no_turn():
    assert find_turns(torch.zeros(0, 4)).num == 0
    assert find_turns(torch.zeros(2, 0)).per_row.tolist() == [0, 0]
    turns = find_turns(torch.zeros(2, 3))
    values = torch.randn(2, 3, requires_grad=True)
    sum_per_turn(values, turns).sum().backward()
    assert values.grad.abs().sum() == 0
    assert to_tokens(torch.zeros(0), turns).tolist() == [[0.0] * 3] * 2


def test_masked_nan_and_inf_stay_out_of_value_and_gradient():
    values = torch.tensor([[1.0, float("nan"), 2.0, float("inf")]], requires_grad=True)
    sums = sum_per_turn(values, find_turns(torch.tensor([[1, 0, 1, 0]])))
    sums.sum().backward()
    assert sums.tolist() == [1.0, 2.0]
    assert values.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_a_mask_must_be_rows_by_tokens():
    with pytest.raises(ValueError, match="rows, tokens"):
        find_turns(torch.ones(3))
