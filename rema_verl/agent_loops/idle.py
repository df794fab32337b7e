"""How long engines stand idle while dialogues are pending. Plain Python: no torch, no verl."""

from collections import defaultdict
from collections.abc import Iterable

Span = tuple[float, float]  # begin and end, in seconds of one clock


def covered(spans: Iterable[Span]) -> float:
    """Seconds covered by at least one span.

    >>> covered([(0, 2), (1, 3), (5, 6)])
    4.0
    """
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def idle_share(pending: Iterable[Span], calls: Iterable[tuple[int, float, float]]) -> float:
    """Share of the time with a dialogue pending in which an engine had no call, mean over the engines that had any.

    Args:
        pending: when dialogues began and ended.
        calls: (replica, begin, end) of each of their calls, as the replica's server saw it.

    Raises:
        ZeroDivisionError: without a call.

    Replica 0 works for 3 of 4 seconds, replica 1 for 2:

    >>> idle_share([(0, 3), (1, 4)], [(0, 0, 2), (0, 1, 3), (1, 1, 2), (1, 3, 4)])
    0.375
    """
    of_replica: dict[int, list[Span]] = defaultdict(list)
    for replica, begin, end in calls:
        of_replica[replica].append((begin, end))
    busy = sum(covered(spans) for spans in of_replica.values())
    return 1 - busy / (len(of_replica) * covered(pending))
