"""The order in which a step's rows are trained: a fair draw, whatever order the dialogues ended in.

verl hands rows over as they arrived, short dialogues first, and cuts them into mini-batches in that order. With
several updates a step the last one would then train on what took longest: long, unfinished, mostly punished dialogues.
"""

import random
from collections.abc import Sequence


def fair_order(lengths: Sequence[int], mini_batch: int, workers: int, seed: object) -> list[int]:
    """A permutation of rows that makes every mini-batch a random draw, the same one for any number of workers.

    verl gives data-parallel worker ``w`` the rows ``w * rows / workers`` and following, and each worker cuts its share,
    in order, into its parts of the mini-batches. Rows are drawn into mini-batches first, without a look at their
    lengths; then each mini-batch is shared out so that its workers, who wait for each other after every update, have
    about the same work (verl's ``get_seqlen_balanced_partitions``).

    Args:
        lengths: tokens of each row.
        mini_batch: rows of one update over all workers; divides the number of rows.
        workers: data-parallel; divides ``mini_batch``.
        seed: the same seed gives the same order (its text is what counts).

    Raises:
        ValueError: the rows cannot be cut into equal shares of equal mini-batches.

    Two updates of four rows, by one worker and by two::

        >>> fair_order([5, 5, 5, 5, 9, 9, 9, 9], mini_batch=4, workers=1, seed="run 0, step 1")
        [0, 4, 5, 6, 1, 2, 3, 7]
        >>> fair_order([5, 5, 5, 5, 9, 9, 9, 9], mini_batch=4, workers=2, seed="run 0, step 1")
        [4, 5, 1, 7, 0, 6, 2, 3]
    """
    if len(lengths) % mini_batch or mini_batch % workers:
        raise ValueError(f"{len(lengths)} rows cannot be cut into mini-batches of {mini_batch} for {workers} workers")
    import torch
    from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

    drawn = random.Random(str(seed)).sample(range(len(lengths)), len(lengths))
    work = calculate_workload(torch.tensor(lengths, dtype=torch.int64)).tolist()
    shares: list[list[int]] = [[] for _ in range(workers)]
    for first in range(0, len(drawn), mini_batch):
        rows = sorted(drawn[first : first + mini_batch])
        parts = get_seqlen_balanced_partitions([work[row] for row in rows], k_partitions=workers, equal_size=True)
        for share, part in zip(shares, parts, strict=True):
            share += [rows[i] for i in part]
    return [row for share in shares for row in share]
