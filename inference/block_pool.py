"""Which block of the paged cache belongs to whom: reference counts, and prefixes of prompts that can be used again.

All of this is bookkeeping on the host; no tensor is touched. A block is one page of keys and values in every layer.
It is free, held by so many rows (`refs`), or idle: held by nobody, but filled with a known piece of a prompt, so that a
later prompt with the same beginning need not be read again. Idle blocks are given away, the longest unused first, when
no free one is left. Prefixes are compared token by token, never by a hash that could be equal by chance.
"""

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor

from errors import KestrelError

ROOT = 0  # the prefix of no tokens


class Prefix(NamedTuple):
    """A full page of tokens after a known prefix."""

    id: int  # of the prefix that ends with this page; never used twice
    block: int
    states: dict[str, Tensor]  # what the model remembers besides keys and values after the page's last token


class BlockPool:
    """`n_blocks` blocks of `page` tokens, numbered from 1; block 0 is nobody's."""

    def __init__(self, n_blocks: int, page: int) -> None:
        self.n_blocks, self.page = n_blocks, page
        self.free = list(range(n_blocks, 0, -1))
        self.refs = [0] * (n_blocks + 1)
        self.idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self.prefixes: dict[tuple[int, tuple[int, ...]], Prefix] = {}
        self.key_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # block → its key in `prefixes`
        self.n_prefixes = ROOT

    @property
    def n_available(self) -> int:
        """How many blocks `allocate` can give."""
        return len(self.free) + len(self.idle)

    @property
    def n_held(self) -> int:
        return self.n_blocks - self.n_available

    def allocate(self, n: int) -> list[int]:
        """n blocks for one holder; their contents are garbage."""
        if n > self.n_available:
            raise KestrelError(f"the cache is full: {n} blocks are needed and {self.n_available} of them are there")
        blocks = []
        for _ in range(n):
            if not self.free:
                self.forget(next(iter(self.idle)))
            block = self.free.pop()
            self.refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One more holder for each of these."""
        for block in blocks:
            self.idle.pop(block, None)
            self.refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One holder less. The end of a prefix goes to sleep before its beginning, which more prompts may share."""
        for block in reversed(blocks):
            assert self.refs[block] > 0, f"block {block} was released once too often"
            self.refs[block] -= 1
            if self.refs[block] == 0:
                if block in self.key_of:
                    self.idle[block] = None
                else:
                    self.free.append(block)

    def forget(self, block: int) -> None:
        """Free an idle block; what followed it can no longer be found and is given away in its turn."""
        del self.idle[block]
        del self.prefixes[self.key_of.pop(block)]
        self.free.append(block)

    def find(self, ids: list[int]) -> list[Prefix]:
        """The known pages that a prompt begins with, short of its last token: that one must be read to go on from."""
        found, parent = [], ROOT
        for start in range(0, len(ids) - self.page, self.page):
            prefix = self.prefixes.get((parent, tuple(ids[start : start + self.page])))
            if prefix is None:
                break
            found.append(prefix)
            parent = prefix.id
        return found

    def know(self, parent: int, tokens: list[int], block: int, states: dict[str, Tensor]) -> int:
        """Note that `block` holds a page of tokens after the prefix `parent` → the id of the prefix that ends here.

        If another block is known to hold the same, this one stays unknown.
        """
        key = (parent, tuple(tokens))
        if key not in self.prefixes:
            self.n_prefixes += 1
            self.prefixes[key] = Prefix(self.n_prefixes, block, states)
            self.key_of[block] = key
        return self.prefixes[key].id
