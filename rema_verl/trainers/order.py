"""The order in which a step's rows are trained: a fair draw, whatever order the dialogues ended in.

verl hands rows over as they arrived, short dialogues first, and cuts them into mini-batches in that order. With
several updates a step the last one would then train on what took longest: long, unfinished, mostly punished dialogues.
"""

import random


def fair_order(rows: int, workers: int, seed: object) -> list[int]:
    """A permutation that leaves each row with its data-parallel worker and is random within the worker's share.

    verl gives worker ``w`` the rows ``w * rows / workers`` and following, and each worker cuts its share, in order,
    into its parts of the mini-batches. So every mini-batch is a random draw over questions, roles, lengths and verl's
    padding rows, and the balance of work between the workers stays as verl made it.

    Args:
        rows: in the batch, a multiple of ``workers``.
        workers: data-parallel.
        seed: the same seed gives the same order (its text is what counts).

    Raises:
        ValueError: the rows cannot be shared equally.

    >>> fair_order(6, 2, "run 0, step 1")
    [1, 0, 2, 5, 4, 3]
    """
    if rows % workers:
        raise ValueError(f"{rows} rows cannot be shared equally by {workers} workers")
    rng, share = random.Random(str(seed)), rows // workers
    order: list[int] = []
    for first in range(0, rows, share):
        order += rng.sample(range(first, first + share), share)
    return order
