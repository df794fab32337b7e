"""The least an engine must prefill for a set of dialogues. Plain Python: no torch, no verl."""

from collections.abc import Iterable, Sequence


def minimum_prefill(rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> int:
    """Tokens that an engine with one prefix cache, unlimited and exact to the token, prefills for these rows.

    A token that its row's role sampled is never prefilled: its keys and values are there since it was generated. Every
    other one is, once; what rows have in common at their beginning (instructions, question), once for all of them.

    Args:
        rows: of the roles that spoke: all ids of a row, and its mask over them (1 = sampled).

    Two samples of one question, where 7 and 8 were sampled:

    >>> minimum_prefill([([1, 2, 7, 3], [0, 0, 1, 0]), ([1, 2, 8, 3], [0, 0, 1, 0])])
    4
    """
    total, last = 0, tuple[int, ...]()
    for ids, mask in sorted(((tuple(ids), mask) for ids, mask in rows), key=lambda row: row[0]):
        total += mask[common_prefix(last, ids) :].count(0)
        last = ids
    return total


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of what both begin with.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
