"""The engine: many rows that talk at once, each with its own length, settings and end, over one cache of bounded size.

    request = engine.submit(Request(prompt_ids, SamplingConfig(...)))
    while engine.has_work:
        for event in engine.step(): ...        # a token, a piece of text, an end

A step draws one token for every row at work, then reads pieces of the prompts that wait, and lets rows begin. Requests
may come and go between any two steps (a server does that); `generate` wraps this for one prompt. The samples of a
prompt share its pages in the cache, and a page that several would write to is copied first. Rows that end leave at
once, and the last row takes their place, so nothing is computed in vain.

A request is admitted when there is room for all it may become, prompt and answer, so a row that has begun can always
finish; until then requests wait in the order they came. What could never fit is refused by `submit`.

What a row says depends on its request, its seed and which sample it is, and not on the rows around it: draws are hashes
(sampling.py), and on the CPU no row's sums depend on the others (`width_for`, `PagedCache.reach_for`; tests compare bit
by bit). The exception are nanochat's gates, whose torch.sigmoid may show the shape of a step in the last bit.

With `lag=1`, the default on a GPU, tokens are handed out while the next step is already under way, so that the device
never waits for Python. Ends by stop token and by length are known to the device; of a row that ends by a stop string
one token is drawn in vain. Rows that use a tool are the exception: their next token may be forced by this one.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import closing

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from errors import KestrelError
from inference.block_pool import BlockPool
from inference.paged_cache import PagedCache
from inference.prefill import PAD_TO, Prefill, Prompt, Reader
from inference.request import Event, Request, Row
from inference.rows import NOT_FORCED, DecodeStep, Drawn, Rows
from inference.sampling import Plan, SamplingConfig, recent_tokens
from inference.speculation import Lookup, n_right
from model.cost import kv_bytes_per_token
from model.cuda_graphs import Capture, CudaGraphs
from model.language_model import LanguageModel
from model.layers.linear import Master
from model.quantised import cache_codes

DEFAULT_NEW_TOKENS = 512
STOPS = ("<|bos|>", "<|assistant_end|>")  # a new document begins; the answer of a chat is over

Column = list[int | None]  # one token per sample; None: this sample has ended


class Engine:
    """A model and its tokenizer, ready to continue prompts.

    max_rows        how many samples are computed together; more wait
    cache_tokens    how many tokens the cache holds; None: max_rows whole contexts, or what is free on the GPU
    page            tokens of a block
    prefill_chunk   tokens of prompts that are read between two steps of decoding
    reuse_prefixes  keep the pages of prompts that were read, for prompts with the same beginning
    lag             how many steps later tokens are handed out: 0, or 1; None: 1 on a GPU
    name            who answers, for files and logs
    quant_cache     keep keys and values in 8 bits: int8 or fp8; None: in the model's dtype
    speculate       how many tokens to guess from what was said before, while one greedy row is alone at work; 0: none
    graphs          whether steps of decoding are recorded in CUDA graphs (rows.DecodeStep); None: on a GPU
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 8,
        cache_tokens: int | None = None,
        page: int = 32,
        prefill_chunk: int = 1024,
        reuse_prefixes: bool = True,
        lag: int | None = None,
        graphs: bool | None = None,
        speculate: int = 0,
        quant_cache: str | None = None,
        name: str | None = None,
    ) -> None:
        if model.vocab_size != tokenizer.vocab_size:
            raise KestrelError(
                f"the model knows {model.vocab_size} tokens and the tokenizer {tokenizer.vocab_size}: "
                "they are not from the same run"
            )
        numbers = {"max_rows": max_rows, "page": page, "prefill_chunk": prefill_chunk, "cache_tokens": cache_tokens}
        for key, value in numbers.items():
            if value is not None and value < 1:
                raise KestrelError(f"{key} must be at least 1, got {value}")
        if speculate < 0:
            raise KestrelError(f"speculate must be at least 0, got {speculate}")
        self.name = name
        self.model, self.tokenizer, self.max_rows, self.prefill_chunk = model, tokenizer, max_rows, prefill_chunk
        self.device = next(model.parameters()).device
        is_gpu = self.device.type == "cuda"
        self.lag = int(is_gpu) if lag is None else lag
        self.speculate, self.reader = min(speculate, model.context_len - 1), None  # what reads guesses
        self.capture: Capture | None = CudaGraphs() if (is_gpu if graphs is None else graphs) else None
        codes = cache_codes(quant_cache)
        cache_tokens = most_tokens(model, max_rows, self.device, codes) if cache_tokens is None else cache_tokens
        self.pool = BlockPool(-(-cache_tokens // page), page)
        self.cache = PagedCache(model, self.pool.n_blocks, page, one_row=max_rows == 1, form=quant_cache)
        self.prefill = Prefill(model, self.cache, self.pool, reuse_prefixes, self.capture)
        self.least_width = PAD_TO if self.device.type == "cpu" and max_rows > 1 else 1
        most_width = -(-max_rows // self.least_width) * self.least_width
        self.cache_rows = self.cache.rows(most_width)
        is_stop = torch.zeros(model.vocab_size, dtype=torch.bool, device=self.device)
        self.rows = Rows(most_width, is_stop, model.ops)
        self.stop_ids = {tokenizer.encode_special(name) for name in STOPS}
        self.steps: dict[int, DecodeStep] = {}  # by width
        self.queue: deque[Request] = deque()
        self.prompt: Prompt | None = None  # the one that is being read, or whose samples have not all begun
        self.running: list[Row] = []  # row i stands at i on the device
        self.in_flight: deque[Flight] = deque()
        self.unread: list[Event] = []  # events that `generate` met and that are not its own
        self.n_steps = 0
        self.n_decoded = self.n_keys_read = 0  # steps of decoding, and tokens in the cache that their rows looked at
        self.n_cached = 0  # tokens of the rows at work

    @property
    def stop_ids(self) -> set[int]:
        return self._stop_ids

    @stop_ids.setter
    def stop_ids(self, ids: set[int]) -> None:
        self._stop_ids = set(ids)
        self.rows.is_stop.zero_()
        self.rows.is_stop[torch.tensor(sorted(ids), dtype=torch.int64, device=self.device)] = True

    @property
    def has_work(self) -> bool:
        """Whether `step` may still have something to say."""
        return bool(self.queue or self.prompt or self.running or self.in_flight or self.unread)

    def stats(self) -> dict[str, object]:
        """How it stands: for a log, or a server's page."""
        return {
            "rows_at_work": len(self.running),
            "requests_waiting": len(self.queue) + (self.prompt is not None),
            "blocks_held": self.pool.n_held,
            "blocks_available": self.pool.n_available,
            "steps_decoded": self.n_decoded,
            "graphs_of_steps": {width: len(step.graphs) for width, step in self.steps.items()},  # the rest is eager
            "graphs_of_prompts": [n for n, reader in self.prefill.readers.items() if reader.replay is not None],
        }

    def encode(self, text: str) -> list[int]:
        """A text as the beginning of a document."""
        return self.tokenizer.encode(text, prepend=self.tokenizer.bos_id)

    # For one prompt.

    def generate(self, prompt_ids: list[int], sampling: SamplingConfig) -> Iterator[Column]:
        """Continue a prompt `sampling.num_samples` times; a prompt that does not fit is refused here and now.

        prompt_ids   taken as they are; empty: only <|bos|>
        → columns of one id per sample, as they are computed. A sample that drew a stop token shows None from there on;
        if there are more samples than rows, the later ones show None until they begin.
        """
        request = Request(list(prompt_ids) or [self.tokenizer.bos_id], sampling)
        self.limit_of(request)
        return self.columns(request)

    def columns(self, request: Request) -> Iterator[Column]:
        """The tokens of a request, step by step."""
        with closing(self.follow(request)) as steps:
            for events in steps:
                yield from columns_of(events)

    def follow(self, request: Request) -> Iterator[list[Event]]:
        """Submit a request, and step until it is done → its events of each step. Whoever stops reading cancels it."""
        self.submit(request)
        n_open = request.sampling.num_samples
        try:
            while n_open:
                events = self.step()
                self.unread = [event for event in events if event.request is not request]
                mine = [event for event in events if event.request is request]
                n_open -= sum(event.finish is not None for event in mine)
                if mine:
                    yield mine
        finally:
            if n_open:
                self.cancel(request)

    # For many.

    def submit(self, request: Request) -> Request:
        """Put a request at the end of the queue; KestrelError if it can never be served."""
        self.limit_of(request)
        self.queue.append(request)
        return request

    def limit_of(self, request: Request) -> int:
        """How many tokens a sample of the request may become."""
        return fit(self.model, request.prompt_ids, request.sampling, self.pool.n_blocks * self.pool.page)

    def cancel(self, request: Request) -> list[Event]:
        """End a request wherever it is → the last event of each sample that had begun."""
        if request in self.queue:
            self.queue.remove(request)
        if self.prompt is not None and self.prompt.request is request:
            self.drop_prompt()
        rows = [row for row in self.running if row.request is request]
        events = [row.end("cancelled") for row in rows]
        for row in rows:
            self.leave(row)
        return events

    def step(self) -> list[Event]:
        """Draw a token for every row at work, and let in who waits → what has become known."""
        self.n_steps += 1
        events, self.unread = self.unread, []
        self.decode()
        events += self.land()
        self.admit()
        return events + self.land()

    # Rows at work.

    def decode(self) -> None:
        """Launch a step for the rows at work."""
        if not any(row.n_launched < row.limit for row in self.running):
            return
        if guessed := self.guess():
            self.verify(self.running[0], guessed)
            return
        width = self.width_for(len(self.running))
        if width not in self.steps:
            self.steps[width] = DecodeStep(self.model, self.rows, self.cache_rows, width, self.capture)
        step = self.steps[width]
        step.cache_rows.reach(self.cache.reach_for(max(len(row.blocks) for row in self.running)))
        for row in self.running:
            if row.tools is not None:
                forced = row.tools.next_forced
                self.rows.forced[row.slot] = NOT_FORCED if forced is None else forced
        self.n_cached += len(self.running)
        self.n_decoded, self.n_keys_read = self.n_decoded + 1, self.n_keys_read + self.n_cached
        self.launched(self.running, step(*self.what_for(self.running)))

    def guess(self) -> list[int]:
        """What may come next, where that helps and is known on the host: a row alone, greedy, and nothing under way."""
        if not self.speculate or len(self.running) != 1 or self.in_flight:
            return []
        row = self.running[0]
        config = row.request.sampling
        plain = config.temperature == 0 and not config.penalises and row.request.logprobs is None and row.tools is None
        return row.lookup.guess(min(self.speculate, row.limit - row.n_launched - 1)) if plain else []

    def verify(self, row: Row, guessed: list[int]) -> None:
        """Read the guesses, keep those that the model would have said, and what it says after them."""
        if self.reader is None:
            rows = self.cache_rows.narrow(0, 1)
            rows.reach(self.cache.max_blocks)
            self.reader = Reader(self.model, rows, 1 + self.speculate, self.capture, every=True)
        said = self.reader([row.lookup.ids[-1], *guessed])[0, : 1 + len(guessed)].argmax(-1).tolist()
        n = n_right(guessed, said)
        cache_rows = self.reader.row
        cache_rows.lengths -= len(guessed) - n
        for name, after in cache_rows.after_each.items():
            cache_rows.states[name][0] = after[n]
        self.rows.token[0], self.rows.step[0] = said[n], row.n_launched + n + 1
        self.n_cached += n + 1
        self.n_decoded, self.n_keys_read = self.n_decoded + 1, self.n_keys_read + self.n_cached
        for token in said[: n + 1]:
            self.launched([row], Drawn(torch.tensor([token]), None, None, None))

    def width_for(self, n: int) -> int:
        """How many rows to compute when n are at work: few different widths, so that few steps need be captured.

        A CPU may sum the rows that are left over from a multiple of four in another order than the rest, so there the
        widths are such multiples. A row that is always alone need not care.
        """
        return min(max(self.least_width, 1 << (n - 1).bit_length()), len(self.rows.active))

    def what_for(self, rows: list[Row]) -> tuple[Plan, int | None]:
        """What a step must compute for these rows: the plan, and how many log-probabilities."""
        asked = [row.request.logprobs for row in rows if row.request.logprobs is not None]
        return Plan.of([row.request.sampling for row in rows]), max(asked, default=None)

    def launched(self, rows: list[Row], drawn: Drawn) -> None:
        for row in rows:
            row.n_launched += 1
        self.in_flight.append(Flight(self.n_steps, list(rows), drawn))

    def land(self) -> list[Event]:
        """Hand out what was drawn, but for what may stay under way."""
        lag = 0 if self.speculate or any(row.tools is not None for row in self.running) else self.lag
        lag = lag if self.running else 0
        events = []
        while self.in_flight and self.in_flight[0].step <= self.n_steps - lag:
            flight = self.in_flight.popleft()
            for row, token, logprob, top in flight.arrivals():
                if row.finished:  # it ended after this was launched
                    continue
                events.append(row.take(token, token in self.stop_ids, logprob, top))
                if row.lookup is not None:
                    row.lookup.push(token)
                if row.finished:
                    self.leave(row)
        return events

    def leave(self, row: Row) -> None:
        """Take a row out, and put the last one in its place."""
        self.n_cached -= len(row.request.prompt_ids) + row.n_launched - 1
        last = self.running.pop()
        if last is not row:
            self.rows.move(last.slot, row.slot)
            self.cache_rows.move(last.slot, row.slot)
            self.running[row.slot] = last
            last.slot = row.slot
        self.rows.active[len(self.running)] = 0
        self.cache_rows.clear(len(self.running))
        self.pool.release(row.blocks)

    # Those who wait.

    def admit(self) -> None:
        """Read prompts in the order they came, up to prefill_chunk tokens, and begin their samples."""
        budget = self.prefill_chunk
        while budget > 0 and (self.prompt or self.queue):
            if self.prompt is None:
                request = self.queue[0]
                self.prompt = self.prefill.begin(request, self.limit_of(request))
                if self.prompt is None:
                    return
                self.queue.popleft()
            prompt = self.prompt
            n_left = len(prompt.request.prompt_ids) - prompt.n_read
            if n_left:
                n = min(n_left, self.prefill_chunk)  # the pieces of a prompt depend on nothing but itself
                self.prefill.read(prompt, n)
                budget -= n
            if prompt.logits is not None and not self.begin_samples(prompt):
                return

    def begin_samples(self, prompt: Prompt) -> bool:
        """Let as many samples begin as there are rows and blocks for → whether that was all of them."""
        request, first = prompt.request, len(self.running)
        states = self.prefill.states()
        history = torch.tensor(recent_tokens(request.prompt_ids, self.stop_ids), device=self.device)
        while prompt.n_begun < request.sampling.num_samples and len(self.running) < self.max_rows:
            blocks = self.blocks_for_next(prompt)
            if blocks is None:
                break
            row = Row(request, prompt.n_begun, blocks, prompt.limit, self.tokenizer)
            row.slot = len(self.running)
            row.lookup = Lookup(request.prompt_ids) if self.speculate else None
            self.running.append(row)
            self.n_cached += len(request.prompt_ids)
            self.rows.begin(row.slot, request.sampling, row.sample, row.limit, history)
            self.cache_rows.begin(row.slot, blocks, len(request.prompt_ids), states)
            prompt.n_begun += 1
        begun = self.running[first:]
        if begun:
            logits = prompt.logits.expand(len(begun), -1)
            slots = slice(first, len(self.running))
            self.launched(begun, self.rows.draw(logits, slots, *self.what_for(begun)))
        if prompt.n_begun < request.sampling.num_samples:
            return False
        self.drop_prompt()
        return True

    def blocks_for_next(self, prompt: Prompt) -> list[int] | None:
        """The blocks of the prompt's next sample; None: they are not there yet.

        All samples hold the prompt's full pages. The page in which prompt and answer meet is written to: it is copied
        if another sample is at work on it. (One that has ended did no harm: it wrote beyond the prompt.)
        """
        full, partial = prompt.blocks[: prompt.n_full], prompt.blocks[prompt.n_full :]
        copies = [block for block in partial if self.pool.refs[block] > 1]
        n_more = prompt.n_answer - len(prompt.reserved) + len(copies)
        if n_more > self.pool.n_available:
            return None
        own = self.pool.allocate(n_more) + prompt.reserved
        prompt.reserved = []
        shared = full if copies else full + partial
        self.pool.share(shared)
        for block, copy in zip(copies, own):
            self.cache.copy_block(block, copy)
        return shared + own

    def drop_prompt(self) -> None:
        self.pool.release(self.prompt.blocks + self.prompt.reserved)
        self.prompt = None


def columns_of(events: list[Event]) -> Iterator[Column]:
    """Events of one request as columns: several if a sample has several, as when another reader made the steps."""
    left = events
    while left:
        column: Column = [None] * left[0].request.sampling.num_samples
        met, later = set(), []
        for event in left:
            if event.sample in met:
                later.append(event)
            else:
                met.add(event.sample)
                column[event.sample] = event.token
        if any(token is not None for token in column):
            yield column
        left = later


class Flight:
    """What a step drew, on its way from the device to the host."""

    def __init__(self, step: int, rows: list[Row], drawn: Drawn) -> None:
        self.step, self.rows = step, rows
        self.landed: torch.cuda.Event | None = None
        # Copied behind what computes it and before what overwrites it.
        self.drawn = Drawn(*(None if x is None else copy_to_host(x) for x in drawn))
        if drawn.ids.is_cuda:
            self.landed = torch.cuda.Event()
            self.landed.record()

    def arrivals(self) -> Iterator[tuple[Row, int, float | None, tuple]]:
        """Each row with its token, and the log-probabilities it asked for; waits for the device."""
        if self.landed is not None:
            self.landed.synchronize()
        ids, log_p, top_log_p, top_ids = (None if x is None else x.tolist() for x in self.drawn)
        for i, row in enumerate(self.rows):
            n_top = row.request.logprobs
            if n_top is None:
                yield row, ids[i], None, ()
            else:
                yield row, ids[i], log_p[i], tuple(zip(top_ids[i], top_log_p[i]))[:n_top]


def copy_to_host(x: Tensor) -> Tensor:
    """On the host, once the stream has got so far."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)


def fit(model: LanguageModel, prompt_ids: list[int], sampling: SamplingConfig, cache_tokens: int | None = None) -> int:
    """How many new tokens to generate; KestrelError if prompt and answer fit neither the context nor the cache."""
    limit, used = model.context_len, len(prompt_ids)
    bad = [token for token in prompt_ids if not 0 <= token < model.vocab_size]
    if bad:
        raise KestrelError(f"the prompt holds token {bad[0]}, but this model's tokens are 0 to {model.vocab_size - 1}")
    if used == 0:
        raise KestrelError("the prompt holds no token: begin with <|bos|>")
    what = "this model sees at most {} at once"
    if cache_tokens is not None and cache_tokens < limit:
        limit, what = cache_tokens, "the cache holds at most {} (cache_tokens)"
    what = what.format(limit)
    if used >= limit:
        raise KestrelError(
            f"the prompt has {used} tokens, but {what}, prompt and answer together: "
            f"shorten the prompt to {limit - 1} tokens or fewer"
        )
    if sampling.max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, limit - used)
    if used + sampling.max_new_tokens > limit:
        raise KestrelError(
            f"the prompt has {used} tokens and max_new_tokens is {sampling.max_new_tokens}, but {what}: "
            f"use max_new_tokens={limit - used} or fewer, or a shorter prompt"
        )
    return sampling.max_new_tokens


def most_tokens(model: LanguageModel, max_rows: int, device: torch.device, codes: torch.dtype | None = None) -> int:
    """A context for every row, unless the GPU has less memory free than that: then most of what it has."""
    wanted = max_rows * model.context_len
    if device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(wanted, int(0.8 * free) // kv_bytes_per_token(model, codes)))


def cast_weights(model: LanguageModel) -> LanguageModel:
    """Keep matrices and tables in the model's dtype, as every use casts them anyway: same numbers, less to read.

    For a model that will not be trained: its fp32 masters are gone, and weights that read the same input are stacked.
    """
    for module in model.modules():
        if isinstance(module, Master):
            module.weight.data = module.weight.data.to(model.dtype)
    model.stack_weights()
    return model.requires_grad_(False)
