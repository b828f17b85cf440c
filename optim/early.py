"""Averaging gradients over the ranks while the backward pass still makes the others.

Every parameter tells when its gradient is there, and a bucket whose last one came is on its way at once. Ranks must
begin the same messages in the same order or wait for each other forever, so the first step only notes the order in
which buckets were complete; rank 0's counts for all, and from then on each begins when it is complete and those before
it have begun. What is not on its way when the backward pass is over begins with the update.
"""

from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from optim.sharding import Ranks


class Bucketed(Protocol):
    """A group of the optimizer, as far as its messages go."""

    params: list[Tensor]
    buckets: list[list[int]]

    def reduce(self, bucket: int) -> None: ...


class EarlyReduction:
    """Begins each bucket of `groups` as soon as its gradients are complete."""

    def __init__(self, groups: list[Bucketed], ranks: Ranks) -> None:
        self.ranks, self.armed = ranks, False
        self.buckets = [(group, i) for group in groups for i in range(len(group.buckets))]
        self.order: list[int] | None = None  # the same on every rank
        self.seen: list[int] = []  # complete, in the order in which they became so
        for number, (group, i) in enumerate(self.buckets):
            for parameter in group.buckets[i]:
                group.params[parameter].register_post_accumulate_grad_hook(partial(self.arrived, number))

    def arm(self) -> None:
        """The next backward pass completes the gradients."""
        self.missing = [len(group.buckets[i]) for group, i in self.buckets]
        self.seen, self.n_begun, self.armed = [], 0, True

    def arrived(self, bucket: int, _: Tensor) -> None:
        """A gradient of this bucket is there."""
        if not self.armed:
            return
        self.missing[bucket] -= 1
        if self.missing[bucket] > 0:
            return
        self.seen.append(bucket)
        while self.order is not None and self.n_begun < len(self.order):
            number = self.order[self.n_begun]
            if self.missing[number] > 0:
                return
            self.begin(number)
            self.n_begun += 1

    def finish(self) -> None:
        """Begin what is left, in the order of all ranks."""
        if self.armed and self.order is None and len(self.seen) == len(self.buckets):
            self.order = self.agree(self.seen)
        for number in range(len(self.buckets)) if self.order is None else self.order:
            self.begin(number)  # but for those that have begun
        self.armed = False

    def begin(self, number: int) -> None:
        group, bucket = self.buckets[number]
        group.reduce(bucket)

    def agree(self, order: list[int]) -> list[int]:
        """Rank 0's."""
        device = self.buckets[0][0].params[0].device
        shared = torch.tensor(order, device=device)
        dist.broadcast(shared, group_src=0, group=self.ranks.group)
        return shared.tolist()
