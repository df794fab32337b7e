"""Turns, read off a response mask.

Shapes: B rows, L response tokens, T turns of one row, N turns of all rows together.

A policy loss or an advantage estimator of verl sees no turn boundaries, only the response mask: 1 for tokens the model
sampled, 0 for text that came from elsewhere (the partner, a tool, padding). A *turn* is a run of 1s inside one row; two
turns of one role always have a masked token between them, and an empty turn leaves no trace. Turns are numbered 0..N-1
through the batch, row by row, so the turns are the segments of the flat list of sampled tokens: a sum over turns is one
segmented reduction, always in the same order, and nothing of size B x L x T is ever made.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Turns:
    """The turns of a batch, in row order.

    Args:
        num: N, how many turns the batch holds.
        row: (N,) int64, the row a turn belongs to.
        length: (N,) int64, its number of tokens, at least 1.
        per_row: (B,) int64, how many turns each row has, 0 for a row with no valid token.
        of_token: (B, L) int32, the turn a token belongs to; N for masked tokens.
        tokens: int64, where the sampled tokens stand in the flattened batch, turn by turn.
    """

    num: int
    row: torch.Tensor
    length: torch.Tensor
    per_row: torch.Tensor
    of_token: torch.Tensor
    tokens: torch.Tensor


def check_mask(response_mask: torch.Tensor) -> torch.Tensor:
    """The mask as (B, L) bool; ``ValueError`` if it is not two-dimensional."""
    if response_mask.dim() != 2:
        raise ValueError(f"response_mask must have shape (rows, tokens), got {tuple(response_mask.shape)}")
    return response_mask.bool()


def find_turns(response_mask: torch.Tensor) -> Turns:
    """Number the runs of 1s in a mask.

    Args:
        response_mask: (B, L), non-zero where the model sampled the token.

    Raises:
        ValueError: the mask is not two-dimensional.

    Example, one row of four tokens with a two-token and a one-token turn::

        >>> turns = find_turns(torch.tensor([[1, 1, 0, 1]]))
        >>> turns.num, turns.row.tolist(), turns.length.tolist(), turns.per_row.tolist()
        (2, [0, 0], [2, 1], [2])
        >>> turns.of_token.tolist()
        [[0, 0, 2, 1]]
    """
    mask = check_mask(response_mask)
    padded = torch.nn.functional.pad(mask, (1, 1))
    changes = padded[:, 1:] ^ padded[:, :-1]  # (B, L + 1), where a turn starts, and one place after its end
    row, at = changes.nonzero(as_tuple=True)  # in row order, a start and its end by turns
    row, length = row[::2], at[1::2] - at[::2]
    num = row.numel()
    # One running count through the flattened batch gives every row its own range of turn numbers.
    count = changes.flatten().cumsum(0, dtype=torch.int32).view_as(changes)[:, :-1]
    of_token = (count >> 1).masked_fill_(~mask, num)
    return Turns(num, row, length, changes.sum(dim=1) >> 1, of_token, mask.flatten().nonzero()[:, 0])


def count_turns(response_mask: torch.Tensor) -> int:
    """How many turns a mask holds: (B, L) padded, or verl's jagged nested form with one run of values per row.

    >>> count_turns(torch.tensor([[1, 1, 0, 1]]))
    2
    >>> count_turns(torch.nested.nested_tensor([torch.tensor([1, 1]), torch.tensor([1])], layout=torch.jagged))
    2
    """
    if response_mask.is_nested:
        mask, row_starts = response_mask.values().bool(), response_mask.offsets()[:-1]  # type: ignore[attr-defined]  # nested tensors have them
        after_gap = torch.ones_like(mask)
        after_gap[1:] = ~mask[:-1]
        after_gap[row_starts[row_starts < mask.numel()]] = True  # a row's first token continues no earlier turn
        return int((mask & after_gap).sum())
    mask = check_mask(response_mask)
    return int(mask[:, :1].sum() + (mask[:, 1:] & ~mask[:, :-1]).sum())


def sum_per_turn(values: torch.Tensor, turns: Turns) -> torch.Tensor:
    """(B, L) -> (N,): the sum of each turn's tokens. Masked tokens count nowhere, whatever they hold.

    Differentiable; with no turn at all the empty result still hangs on ``values``' graph.

    >>> sum_per_turn(torch.tensor([[1.0, 2.0, 9.0, 4.0]]), find_turns(torch.tensor([[1, 1, 0, 1]])))
    tensor([3., 4.])
    """
    sampled = values.flatten().index_select(0, turns.tokens)
    # Not index_add: on a GPU its atomic additions, all masked tokens' to one entry, take ten times as long. "unsafe"
    # leaves out a look at the lengths, for which the host would have to wait.
    return torch.segment_reduce(sampled, "sum", lengths=turns.length, unsafe=True)


def to_tokens(values: torch.Tensor, turns: Turns) -> torch.Tensor:
    """(N,) -> (B, L): every token of a turn gets the turn's value, masked tokens get 0.

    >>> to_tokens(torch.tensor([3.0, 4.0]), find_turns(torch.tensor([[1, 1, 0, 1]])))
    tensor([[3., 3., 0., 4.]])
    """
    padded = torch.cat([values, values.new_zeros(1)])
    return padded.index_select(0, turns.of_token.flatten()).view(turns.of_token.shape)


def sum_per_span(values: torch.Tensor, turns: Turns) -> torch.Tensor:
    """(B, L) -> (N,): like :func:`sum_per_turn`, but a masked token belongs to the turn before it.

    For rewards, which may lie outside the mask: verl puts an outcome on a row's last response token even if that token
    is masked. Masked tokens before a row's first turn belong to that turn. Rows without a turn have nothing to give to.

    >>> turns = find_turns(torch.tensor([[0, 1, 0, 1]]))
    >>> sum_per_span(torch.tensor([[0.5, 1.0, 2.0, 4.0]]), turns)
    tensor([3.5000, 4.0000])
    """
    before_row = turns.per_row.cumsum(0) - turns.per_row  # (B,) number of a row's first turn
    valid = turns.of_token < turns.num
    # The largest turn number so far in the row; rows' numbers only grow, so a running maximum carries them forward.
    so_far = torch.where(valid, turns.of_token, -1).cummax(dim=1).values.long()
    of_span = torch.maximum(so_far, before_row[:, None])
    of_span = torch.where(turns.per_row[:, None] > 0, of_span, turns.num)
    sums = values.new_zeros(turns.num + 1).index_add(0, of_span.flatten(), values.flatten())
    return sums[: turns.num]
