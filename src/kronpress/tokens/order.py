"""Which window comes when: functions of the seed and of how much there is, not of who asks or how many there are.

A stream of N tokens is read as if it were repeated without end, and cut into windows of L tokens. Window k has the
tokens k·L to k·L + L − 1 and belongs to the epoch in which it begins, ⌊k·L / N⌋. So where L does not divide N, the last
window of an epoch takes the first tokens of the next, which begins its windows behind them: over any number of epochs
no token is left out and none is taken twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor


class ShuffledWindows:
    """The windows of one stream in the order in which they are used: epoch by epoch, each shuffled by itself.

    The last window of an epoch, where it reaches into the next, stays the last. The order of epoch e is the e-th that a
    generator with this seed draws.

    >>> windows = ShuffledWindows(num_tokens=10, length=4, seed=0)
    >>> [windows.number(i) for i in range(5)], [windows.epoch(k) for k in range(5)]
    ([0, 1, 2, 4, 3], [0, 0, 0, 1, 1])
    """

    def __init__(self, num_tokens: int, length: int, seed: int) -> None:
        self.num_tokens, self.length, self.seed = num_tokens, length, seed
        self._drawn: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))
        self._state: Tensor | None = None

    def epoch(self, window: int) -> int:
        """In which epoch the window, and with it the one that is used at this place, begins."""
        return window * self.length // self.num_tokens

    def first(self, epoch: int) -> int:
        """The first window of the epoch."""
        return -(-epoch * self.num_tokens // self.length)

    def number(self, place: int) -> int:
        """The window that is used after `place` others."""
        epoch = self.epoch(place)
        first = self.first(epoch)
        order = self._order(epoch)
        return first + int(order[place - first]) if place - first < len(order) else place

    def _order(self, epoch: int) -> Tensor:
        """The shuffled numbers of the windows that lie wholly within the epoch, from 0."""
        drawn, order = self._drawn
        if drawn != epoch:
            generator = torch.Generator()
            if epoch < drawn or self._state is None:
                drawn = -1
                generator.manual_seed(self.seed)
            else:
                generator.set_state(self._state)
            for each in range(drawn + 1, epoch + 1):
                num_whole = (each + 1) * self.num_tokens // self.length - self.first(each)
                order = torch.randperm(num_whole, generator=generator)
            self._drawn, self._state = (epoch, order), generator.get_state()
        return order


class Interleaved:
    """Sets in turns, by weight: the k-th item of set s, from 0, has the time (k + u_s) / w_s, and times go upwards.

    u_s in [0, 1) is drawn from the seed. Of the first n items n·w_s / Σ w are of set s, give or take one more than
    there are sets, and any place is found without those before it. Of equal times the first set's comes first.

    >>> turns = Interleaved([3, 1], seed=0)
    >>> [turns.item(place) for place in range(6)]
    [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4)]
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = sum(weights)
        self.weights = [weight / total for weight in weights]
        generator = torch.Generator().manual_seed(seed)
        self.offsets: list[float] = torch.rand(len(weights), generator=generator, dtype=torch.float64).tolist()

    def item(self, place: int) -> tuple[int, int]:
        """Which set has this place, and how many items it had before."""
        counts = self.counts(place)
        number = self._next(counts)
        return number, counts[number]

    def counts(self, num_items: int) -> list[int]:
        """How many of the first `num_items` items each set has."""
        # Up to a time of n − S there are fewer than n, since each set has less than w_s·time + 1.
        time = num_items - len(self.weights)
        counts = [self._before(number, time) for number in range(len(self.weights))]
        while sum(counts) < num_items:
            counts[self._next(counts)] += 1
        return counts

    def _next(self, counts: list[int]) -> int:
        return min(range(len(counts)), key=lambda number: self._time(number, counts[number]))

    def _time(self, number: int, count: int) -> float:
        return (count + self.offsets[number]) / self.weights[number]

    def _before(self, number: int, time: float) -> int:
        """How many items of the set have an earlier time; the estimate is put right, since a quotient is rounded."""
        count = max(0, ceil(time * self.weights[number] - self.offsets[number]))
        while count > 0 and self._time(number, count - 1) >= time:
            count -= 1
        while self._time(number, count) < time:
            count += 1
        return count


def share(items: Sequence[int], rank: int, num_ranks: int) -> Sequence[int]:
    """What process `rank` of `num_ranks` takes of a step's items: shares that, put together in order, are all.

    >>> [share(range(8), rank, 4) for rank in range(4)]
    [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    """
    begin, end = (len(items) * each // num_ranks for each in (rank, rank + 1))
    return items[begin:end]
