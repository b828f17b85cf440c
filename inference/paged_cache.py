"""Keys and values in pages: a row's tokens lie in any blocks, in the order its block table names them.

So rows of very different lengths share one memory, a finished row's blocks serve the next one, and rows with the same
beginning hold the same blocks. Who holds what is `BlockPool`'s business; here are the tensors.

`CacheRows` is what a model is given: the block tables, lengths and remembered states of some rows, on the device, in
memory that never moves. Block 0 belongs to nobody: rows without a request write there, and block tables end in it.

Pages may hold codes of 8 bits instead of numbers: then the scales of each page lie beside it, and go where it goes.
"""

import torch
from torch import Tensor, nn

from model.quantised import cache_codes

TRASH = 0
CPU_REACH = 512  # keys


class PagedCache:
    """Room for n_blocks · page tokens.

    k, v      [L, 1 + n_blocks, page, Hkv, D] in the model's dtype, or codes (kernels_torch/quantised_cache.py)
    scales    of codes: k_scales and v_scales [L, 1 + n_blocks, page, Hkv], those of a head side by side
    one_row   there will never be two rows at once
    form      of the codes, int8 or fp8; None: no codes
    """

    def __init__(
        self, model: nn.Module, n_blocks: int, page: int, one_row: bool = False, form: str | None = None
    ) -> None:
        n_layer, n_kv_head, head_dim = model.cache_shape
        self.device = next(model.parameters()).device
        self.one_row = one_row
        self.page, self.max_blocks = page, -(-model.context_len // page)
        shape = (n_layer, 1 + n_blocks, page, n_kv_head, head_dim)
        self.k = torch.empty(shape, dtype=cache_codes(form) or model.dtype, device=self.device)
        self.v = torch.empty_like(self.k)
        self.scales: dict[str, Tensor] = {}
        if form is not None:
            shape = (n_layer, 1 + n_blocks, n_kv_head, page)
            for name in ("k_scales", "v_scales"):
                self.scales[name] = torch.empty(shape, dtype=torch.float32, device=self.device).transpose(2, 3)

    def copy_block(self, source: int, target: int) -> None:
        """Before a block that others hold too would be written to."""
        for pages in (self.k, self.v, *self.scales.values()):
            pages[:, target].copy_(pages[:, source])

    def reach_for(self, n_blocks: int) -> int:
        """How many entries of the block tables to hand to a kernel, for rows of up to n_blocks blocks.

        A GPU's kernels read as far as each row goes, so there the tables are always whole. Plain PyTorch reads all of
        the table it is given: on a CPU that is as far as the longest row goes, rounded up to what its attention sums at
        a time, so that it changes no bit of a row how long the others are. A row that is always alone need not care.
        """
        if self.device.type != "cpu":
            return self.max_blocks
        at_once = 1 if self.one_row else max(1, CPU_REACH // self.page)
        return min(-(-n_blocks // at_once) * at_once, self.max_blocks)

    def rows(self, n: int) -> "CacheRows":
        """Empty rows: all their blocks are block 0."""
        table = torch.full((n, self.max_blocks), TRASH, dtype=torch.int32, device=self.device)
        lengths = torch.zeros(n, dtype=torch.int32, device=self.device)
        return CacheRows(self, table, lengths, {}, slice(0, n))


class CacheRows:
    """Rows of a paged cache, as a model reads and writes them (model.layers.attention.Cache).

    block_table  [B, n] int32
    lengths      [B] int32: how many tokens each row holds
    states       name → [all rows, 1, C]: what a family remembers besides keys and values
    """

    is_empty = False  # a prefix may be there already, so a prompt's first piece is read like any other

    def __init__(
        self, cache: PagedCache, block_table: Tensor, lengths: Tensor, states: dict[str, Tensor], rows: slice
    ) -> None:
        self.cache, self.all_tables, self.all_lengths, self.states = cache, block_table, lengths, states
        self.rows = rows
        self.block_table, self.lengths = block_table[rows], lengths[rows]
        self.after_each: dict[str, Tensor] = {}  # name → [T, C], of the first row in the call before

    def narrow(self, start: int, end: int) -> "CacheRows":
        """Some of the rows, in the same memory."""
        return CacheRows(self.cache, self.all_tables, self.all_lengths, self.states, slice(start, end))

    def reach(self, n_blocks: int) -> None:
        """Let the tables end after n_blocks, for kernels that read them to the end."""
        self.block_table = self.all_tables[self.rows, :n_blocks]

    # What a model does.

    def reserve(self, n_tokens: int) -> None:
        """Begin a call that brings `n_tokens` tokens a row."""
        if n_tokens > 1:  # a step of decoding counts for itself
            self.ends = self.lengths + n_tokens

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """All pages of a layer [P, page, Hkv, D], keys and values."""
        return self.cache.k[layer], self.cache.v[layer]

    def scales_of_layer(self, layer: int) -> dict[str, Tensor]:
        """Of pages that are codes: k_scales and v_scales [P, page, Hkv]."""
        return {name: scales[layer] for name, scales in self.cache.scales.items()}

    def advance(self, n_tokens: int | Tensor) -> None:
        """End a call: the tokens written count from now on; a tensor [B] says how many of each row are real."""
        self.lengths += n_tokens

    def recall(self, name: str, like: Tensor) -> Tensor:
        """What was remembered under `name`; zeros of `like`'s shape and dtype in the beginning."""
        return self.state(name, like)[self.rows]

    def remember(self, name: str, value: Tensor, after_each: Tensor | None = None) -> None:
        """Keep `value` [B, 1, C] for the next call; after_each [B, T, C] says what it was after every token.

        With the latter another prompt can go on where one of its pages ends.
        """
        self.state(name, value)[self.rows].copy_(value)
        if after_each is not None:
            self.after_each[name] = after_each[0]

    def state(self, name: str, like: Tensor) -> Tensor:
        """The states [all rows, 1, C] under `name`."""
        if name not in self.states:
            shape = (len(self.all_lengths), *like.shape[1:])
            self.states[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        return self.states[name]

    # What the engine does.

    def begin(self, row: int, blocks: list[int], length: int, states: dict[str, Tensor]) -> None:
        """Let a row hold `length` tokens in these blocks, with the states [1, C] after the last of them."""
        table = torch.full((self.cache.max_blocks,), TRASH, dtype=torch.int32)
        table[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        self.all_tables[row].copy_(table)
        self.all_lengths[row] = length
        for name in self.states.keys() | states.keys():
            if name in states:
                self.state(name, states[name][None])[row] = states[name]
            else:
                self.states[name][row] = 0

    def move(self, source: int, target: int) -> None:
        """Let a row stand where another one stood."""
        for tensor in (self.all_tables, self.all_lengths, *self.states.values()):
            tensor[target].copy_(tensor[source])

    def clear(self, row: int) -> None:
        """A row that holds nothing: what it writes goes to block 0."""
        self.all_tables[row] = TRASH
        self.all_lengths[row] = 0
