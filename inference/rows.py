"""What must be known of each row to draw its next token: settings, progress and what was said lately, on the device.

The rows that are at work are always the first ones. A row that ends gives its place to the last one (`move`), so a step
computes no row in vain. All of it lies in memory that never moves, where a captured graph finds it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inference import sampling
from inference.paged_cache import CacheRows
from inference.request import MAX_LOGPROBS
from inference.sampling import SETTINGS, Plan, SamplingConfig, log_probabilities, sample
from model.cuda_graphs import Capture, Unchanged, require_alike
from model.ops import Ops

NOT_FORCED = -1
MOST_GRAPHS = 16  # of one width: plans differ by what they need and by the power of two of the largest top_k

Key = tuple[Plan, int | None]


class Drawn(NamedTuple):
    """What one step chose for some rows, on the device."""

    ids: Tensor  # [B] int64
    log_p: Tensor | None  # [B], where somebody asked for it
    top_log_p: Tensor | None  # [B, n]
    top_ids: Tensor | None  # [B, n]


class Rows:
    """State of `n` rows, for the ops that draw and take note.

    token    [n] int64, drawn last and not yet read by the model
    active   [n] int32, 1 for rows that go on; others are computed when they stand among those, and change nothing
    step     [n] int64, how many tokens were drawn; limit: after how many it ends
    sample   [n] int64, which sample of its request it is
    forced   [n] int64, what to say next whatever is drawn, or NOT_FORCED
    history  [n, PENALTY_WINDOW] int64, a ring of the newest tokens, −1 for none
    is_stop  [V] bool, tokens that end a row; the same for all
    """

    def __init__(self, n: int, is_stop: Tensor, ops: Ops) -> None:
        device = is_stop.device
        self.is_stop, self.ops = is_stop, ops
        self.active = torch.zeros(n, dtype=torch.int32, device=device)
        self.token, self.step, self.limit, self.sample = (
            torch.zeros(n, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.forced = torch.full((n,), NOT_FORCED, device=device)
        self.history = torch.full((n, sampling.PENALTY_WINDOW), -1, device=device)
        self.settings = {name: torch.zeros(n, dtype=dtype, device=device) for name, dtype in SETTINGS.items()}

    def begin(self, row: int, config: SamplingConfig, sample: int, limit: int, history: Tensor) -> None:
        """Let a row begin to draw, after a prompt whose newest tokens are `history`."""
        self.active[row], self.step[row], self.limit[row], self.sample[row] = 1, 0, limit, sample
        self.forced[row] = NOT_FORCED
        self.history[row] = history
        for name, tensor in self.settings.items():
            tensor[row] = getattr(config, name)

    def move(self, source: int, target: int) -> None:
        """Let a row stand where another one stood."""
        for tensor in (self.token, self.active, self.step, self.limit, self.sample, self.forced, self.history):
            tensor[target].copy_(tensor[source])
        for tensor in self.settings.values():
            tensor[target].copy_(tensor[source])

    def draw(self, logits: Tensor, rows: slice, plan: Plan, n_top: int | None = None) -> Drawn:
        """Choose the next token of some rows, after logits [B, V], and take note of it.

        n_top   None: no log-probabilities; else those of the tokens drawn and of the n_top likeliest
        """
        settings = {name: tensor[rows] for name, tensor in self.settings.items()}
        token, step, active, history = self.token[rows], self.step[rows], self.active[rows], self.history[rows]
        draw = dict(rows=self.sample[rows], step=step, history=history, draw_tokens=self.ops.draw_tokens)
        ids = sample(logits, settings, plan, **draw)
        self.ops.take_tokens(ids, self.forced[rows], self.limit[rows], self.is_stop, token, step, active, history)
        return Drawn(token, *((None,) * 3 if n_top is None else log_probabilities(logits, token, n_top)))


class DecodeStep:
    """One step of decoding for the first `width` rows: read the tokens drawn last, draw the next ones.

    Everything it reads and writes lies in `rows` and `cache_rows`, whose memory never moves, and what differs between
    steps is (plan, n_top) only. So it can be recorded in a CUDA graph for each of those and replayed: the host then
    starts one graph instead of some hundred kernels. The first time is not recorded, as kernels may have to compile;
    what is asked for once only never is, nor what comes after `MOST_GRAPHS` others. Each graph is proven once: from the
    same state it must come to the logits that the step comes to kernel by kernel.

    capture   function → what replays it, as model.cuda_graphs.CudaGraphs; None: nothing is recorded
    """

    def __init__(
        self, model: nn.Module, rows: Rows, cache_rows: CacheRows, width: int, capture: Capture | None = None
    ) -> None:
        self.model, self.rows, self.capture = model, rows, capture
        self.cache_rows = cache_rows.narrow(0, width)
        self.slice = slice(0, width)
        self.met: set[Key] = set()
        self.graphs: dict[Key, tuple[Callable[[], None], Drawn]] = {}

    def __call__(self, plan: Plan, n_top: int | None) -> Drawn:
        if self.capture is None:
            return self.run(plan, n_top)
        key = (plan, None if n_top is None else MAX_LOGPROBS)  # those not asked for are left out later
        if key not in self.graphs:
            if key not in self.met or len(self.graphs) >= MOST_GRAPHS:
                self.met.add(key)
                return self.run(*key)
            self.graphs[key] = self.record(*key)
        replay, drawn = self.graphs[key]
        replay()
        return drawn

    def record(self, plan: Plan, n_top: int | None) -> tuple[Callable[[], None], Drawn]:
        """What replays the step, and where it leaves what it drew."""
        rows, cache_rows, drawn = self.rows, self.cache_rows, []
        of_rows = [x[self.slice] for x in (rows.token, rows.step, rows.active, rows.history)]
        state = Unchanged(*of_rows, cache_rows.lengths, *cache_rows.states.values())
        at_work = rows.active[self.slice].bool()
        self.run(plan, n_top)
        eager = self.logits[at_work]
        state.restore()
        replay = self.capture(lambda: drawn.append(self.run(plan, n_top)))
        replay()
        require_alike(self.logits[at_work], eager)
        state.restore()
        return replay, drawn[0]

    def run(self, plan: Plan, n_top: int | None) -> Drawn:
        """Operation by operation."""
        tokens, active = self.rows.token[self.slice, None], self.rows.active[self.slice]
        self.logits = self.model.decode(tokens, self.cache_rows, new_tokens=active)
        return self.rows.draw(self.logits, self.slice, plan, n_top)
