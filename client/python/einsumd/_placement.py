"""Which daemon answers for which groups of a weight.

Each of several daemons has some of its groups, or each has it whole and computes some of them.
Which of both it is their weights say; what does not add up is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from einsumd._daemon import Daemon, Weight
from einsumd._errors import FailedPrecondition


@dataclass(frozen=True)
class Share:
    """The groups of a weight, counted over all daemons, that one of them answers for."""

    daemon: Daemon
    begin: int
    end: int
    base: int
    """Which of all groups is its first."""


@dataclass(frozen=True)
class Placement:
    """A weight over all daemons: `weight` with all groups, and who holds which."""

    weight: Weight
    shares: tuple[Share, ...]
    whole: bool
    """Every daemon has all of it."""

    def of(self, begin: int, end: int) -> list[Share]:
        """Who answers for which of these groups; those with nothing to do are left out."""
        if not self.whole:
            cut = ((s, max(begin, s.begin), min(end, s.end)) for s in self.shares)
            return [Share(s.daemon, b, e, s.base) for s, b, e in cut if b < e]
        n, groups = len(self.shares), end - begin
        ends = [begin + i * groups // n for i in range(n + 1)]
        return [Share(s.daemon, b, e, 0) for s, b, e in zip(self.shares, ends, ends[1:]) if b < e]


def place_weight(found: list[tuple[Daemon, Weight]]) -> Placement:
    """Who answers for which groups of a weight."""
    first = found[0][1]
    if len(found) == 1:
        daemon = found[0][0]
        return Placement(first, (Share(daemon, 0, first.groups, 0),), False)
    for daemon, weight in found:
        shape = (weight.output_dim, weight.reduced_dim, weight.block_d, weight.block_r)
        wanted = (first.output_dim, first.reduced_dim, first.block_d, first.block_r)
        if shape != wanted or weight.groups != first.groups:
            raise FailedPrecondition(
                f"{weight.name}: D, R and blocks {shape} and {weight.groups} groups here, "
                f"{wanted} and {first.groups} at {found[0][0].endpoint}",
                endpoint=daemon.endpoint,
            )
    n, groups = len(found), first.groups
    sizes = {weight.tensor_parallel_size for _, weight in found}
    if sizes <= {0, 1}:
        return Placement(first, tuple(Share(d, 0, groups, 0) for d, _ in found), True)
    ranks = [weight.tensor_parallel_rank for _, weight in found]
    if sizes != {n} or sorted(ranks) != list(range(n)):
        held = ", ".join(
            f"{d.endpoint} has rank {w.tensor_parallel_rank} of {w.tensor_parallel_size}"
            for d, w in found
        )
        raise FailedPrecondition(
            f"{first.name}: expected ranks 0 to {n - 1} of {n}, or the whole weight everywhere; "
            f"{held}"
        )
    shares = sorted(
        (Share(d, r * groups, (r + 1) * groups, r * groups) for (d, _), r in zip(found, ranks)),
        key=lambda share: share.begin,
    )
    return Placement(replace(first, groups=n * groups), tuple(shares), False)
