"""What must be known of each row to draw its next token: settings, progress and what was said lately, on the device.

The rows that are at work are always the first ones. A row that ends gives its place to the last one (`move`), so a step
computes no row in vain. All of it lies in memory that never moves, where a captured graph finds it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from inference import sampling
from inference.paged_cache import CacheRows
from inference.sampling import SETTINGS, Plan, SamplingConfig, log_probabilities, sample

NOT_FORCED = -1


class Drawn(NamedTuple):
    """What one step chose for some rows, on the device."""

    ids: Tensor  # [B] int64
    log_p: Tensor | None  # [B], where somebody asked for it
    top_log_p: Tensor | None  # [B, n]
    top_ids: Tensor | None  # [B, n]


class Rows:
    """State of `n` rows.

    token    [n] int64, drawn last and not yet read by the model
    active   [n] int32, 1 for rows that go on; others are computed when they stand among those, and change nothing
    step     [n] int64, how many tokens were drawn; limit: after how many it ends
    sample   [n] int64, which sample of its request it is
    forced   [n] int64, what to say next whatever is drawn, or NOT_FORCED
    history  [n, PENALTY_WINDOW] int64, a ring of the newest tokens, −1 for none
    is_stop  [V] bool, tokens that end a row; the same for all
    """

    def __init__(self, n: int, is_stop: Tensor) -> None:
        device = is_stop.device
        self.is_stop = is_stop
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
        step, active, forced, history = self.step[rows], self.active[rows], self.forced[rows], self.history[rows]
        ids = sample(logits, settings, plan, rows=self.sample[rows], step=step, history=history)
        is_free = forced == NOT_FORCED
        ids = torch.where(is_free, ids, forced)
        history.scatter_(1, (step % history.shape[1])[:, None], ids[:, None])
        step += active
        active *= ~((self.is_stop[ids] & is_free) | (step >= self.limit[rows]))
        self.token[rows] = ids
        return Drawn(ids, *((None,) * 3 if n_top is None else log_probabilities(logits, ids, n_top)))


class DecodeStep:
    """One step of decoding for the first `width` rows: read the tokens drawn last, draw the next ones.

    This is where a step can be captured: everything it reads and writes lies in `rows` and `cache_rows`, whose memory
    never moves, and what differs between steps is (plan, n_top) only. Today it is run operation by operation.
    """

    def __init__(self, model: torch.nn.Module, rows: Rows, cache_rows: CacheRows, width: int) -> None:
        self.model, self.rows = model, rows
        self.cache_rows = cache_rows.narrow(0, width)
        self.slice = slice(0, width)

    def __call__(self, plan: Plan, n_top: int | None) -> Drawn:
        tokens, active = self.rows.token[self.slice, None], self.rows.active[self.slice]
        logits = self.model.decode(tokens, self.cache_rows, new_tokens=active)
        return self.rows.draw(logits, self.slice, plan, n_top)
