"""Reading prompts: one at a time, in pieces, beginning behind what another prompt has read already.

A prompt is read once however many samples it gets. Its pieces go through the model between steps of decoding, so a long
prompt does not hold up those who are talking. Of each piece only the last row's logits are computed. On the CPU, whose
sums round differently for odd shapes, pieces are padded (to no effect but that), so that the same prompt gives the same
bits whatever part of it was known before. On a GPU they are padded to few different lengths, for each of which reading
is recorded in a CUDA graph once it was met: a thousand tokens take less time to read than Python needs to say so.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from inference.block_pool import ROOT, BlockPool
from inference.paged_cache import CacheRows, PagedCache
from inference.request import Request
from model.cuda_graphs import Capture, Unchanged, require_alike

PAD_TO = 4  # rows of which a CPU's matrix product sums all in one way
LENGTHS = (32, 128, 256, 512, 1024)  # of pieces that are recorded; padding wastes what a GPU has plenty of


class Prompt:
    """A request on its way into the cache, until all its samples have begun.

    limit     how many tokens each sample may become
    blocks    those of the prompt itself; n_answer: how many more each sample needs
    reserved  the first sample's n_answer blocks, so that what has been read can go on
    n_read    tokens of the prompt that are in the cache, reused or read
    logits    [1, V] after the last token, once it has been read
    """

    def __init__(
        self,
        request: Request,
        limit: int,
        page: int,
        blocks: list[int],
        reserved: list[int],
        n_reused: int,
        parent: int,
    ) -> None:
        self.request, self.limit, self.blocks, self.reserved = request, limit, blocks, reserved
        self.n_answer = len(reserved)
        self.n_read = self.n_reused = n_reused
        self.page = page
        self.parent = parent  # the id of the prefix that ends with the last page known
        self.n_begun = 0  # samples
        self.logits: Tensor | None = None

    @property
    def n_full(self) -> int:
        """How many of the blocks the prompt fills to the end."""
        return len(self.request.prompt_ids) // self.page


class Prefill:
    """The one row of the cache through which prompts are read."""

    def __init__(
        self, model: torch.nn.Module, cache: PagedCache, pool: BlockPool, reuse: bool, capture: Capture | None = None
    ) -> None:
        self.model, self.cache, self.pool, self.reuse, self.capture = model, cache, pool, reuse, capture
        self.row = cache.rows(1)
        self.readers: dict[int, Reader] = {}  # by length

    def begin(self, request: Request, limit: int) -> Prompt | None:
        """Take the blocks that the prompt and its first answer need; None: they are not there yet."""
        ids, page = request.prompt_ids, self.pool.page
        known = self.pool.find(ids) if self.reuse else []
        shared = [prefix.block for prefix in known]
        self.pool.share(shared)
        n_prompt, n_all = -(-len(ids) // page), -(-(len(ids) + limit) // page)
        if n_all - len(shared) > self.pool.n_available:
            self.pool.release(shared)
            return None
        blocks = shared + self.pool.allocate(n_prompt - len(shared))
        n_known = len(shared) * page
        self.row.begin(0, blocks, n_known, known[-1].states if known else {})
        self.row.reach(self.cache.reach_for(-(-(len(ids) + PAD_TO - 1) // page)))  # padding needs a place, too
        reserved = self.pool.allocate(n_all - n_prompt)
        return Prompt(request, limit, page, blocks, reserved, n_known, known[-1].id if known else ROOT)

    def read(self, prompt: Prompt, n_tokens: int) -> None:
        """Read the next n_tokens of the prompt, which are there to be read."""
        ids, start = prompt.request.prompt_ids, prompt.n_read
        piece = ids[start : start + n_tokens]
        length = self.length_for(len(piece))
        if length is None:
            logits = self.read_padded(piece, start)
        else:
            if length not in self.readers:
                self.readers[length] = Reader(self.model, self.row, length, self.capture)
            logits = self.readers[length](piece)
        prompt.n_read += len(piece)
        if self.reuse:
            self.know_pages(prompt, start)
        if prompt.n_read == len(ids):
            prompt.logits = logits

    def length_for(self, n_tokens: int) -> int | None:
        """The recorded length that a piece is padded to; None: it is read as it is."""
        if self.capture is None:
            return None
        return next((length for length in LENGTHS if n_tokens <= length <= self.model.context_len), None)

    def read_padded(self, piece: list[int], start: int) -> Tensor:
        """Operation by operation → logits [1, V] after the piece."""
        n_pad = 0 if self.cache.device.type != "cpu" else -len(piece) % PAD_TO
        n_pad = min(n_pad, self.model.context_len - start - len(piece))
        tokens = torch.tensor([piece + [0] * n_pad], device=self.cache.device)
        n_real = torch.full((1,), len(piece), dtype=torch.int32, device=self.cache.device) if n_pad else None
        return self.model.decode(tokens, self.row, new_tokens=n_real)

    def know_pages(self, prompt: Prompt, start: int) -> None:
        """Let later prompts find the pages that were filled since `start`."""
        page = self.pool.page
        for i in range(start // page, prompt.n_read // page):
            last = (i + 1) * page - 1 - start
            states = {name: after[last : last + 1].clone() for name, after in self.row.after_each.items()}
            tokens = prompt.request.prompt_ids[i * page : (i + 1) * page]
            prompt.parent = self.pool.know(prompt.parent, tokens, prompt.blocks[i], states)

    def states(self) -> dict[str, Tensor]:
        """What the model remembers after the prompt just read."""
        return {name: state[0] for name, state in self.row.states.items()}


class Reader:
    """Reads pieces of up to `length` tokens: the first time operation by operation, then recorded and replayed.

    What padding writes lies behind the piece, in the prompt's own pages or where nobody looks.

    capture   None: nothing is recorded
    every     whether logits after all tokens are wanted
    """

    def __init__(
        self, model: torch.nn.Module, row: CacheRows, length: int, capture: Capture | None, every: bool = False
    ) -> None:
        self.model, self.row, self.capture, self.every = model, row, capture, every
        device = row.lengths.device
        self.tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
        self.n_real = torch.zeros(1, dtype=torch.int32, device=device)
        self.n_met = 0
        self.logits: Tensor | None = None
        self.after_each: dict[str, Tensor] = {}
        self.replay: Callable[[], None] | None = None

    def __call__(self, piece: list[int]) -> Tensor:
        """→ logits [1, V] after the piece; or [1, length, V] after every token."""
        self.tokens[0, : len(piece)] = torch.tensor(piece)
        self.n_real.fill_(len(piece))
        self.n_met += 1
        if self.n_met == 1 or self.capture is None:
            self.run()
            return self.logits
        if self.replay is None:
            self.record(len(piece))
        self.replay()
        self.row.after_each = self.after_each
        return self.logits.clone()  # the next graph may write where they are

    def record(self, n: int) -> None:
        """Record, and prove that it comes to the logits that reading kernel by kernel comes to."""
        state = Unchanged(self.row.lengths, *self.row.states.values())
        part = (slice(None), slice(n)) if self.every else slice(None)
        self.run()
        eager = self.logits[part].clone()
        state.restore()
        self.replay = self.capture(self.run)
        self.replay()
        require_alike(self.logits[part], eager)
        state.restore()

    def run(self) -> None:
        self.row.after_each = {}
        options = dict(every=True) if self.every else {}
        self.logits = self.model.decode(self.tokens, self.row, new_tokens=self.n_real, **options)
        self.after_each = self.row.after_each
