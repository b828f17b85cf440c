"""Causal self-attention of every family: projections, rotary positions, optional QK norm, value gate and cache.

One `forward` serves training and decoding. Without a cache the tokens are whole rows from position 0; with one they
continue each row where the cache stands, and row lengths stay on the device, so that a step can be captured in a graph.
"""

from typing import Protocol

from torch import Tensor, nn

from model.layers.linear import Linear, Master, Operands, products, side_by_side
from model.layers.norm import RMSNorm
from model.ops import Ops


class Cache(Protocol):
    """What a model asks of its key-value cache: inference/kv_cache.py in one piece, paged_cache.py in pages."""

    block_table: Tensor | None  # [B, n] integers: the pages of each row; None: rows lie in one piece
    lengths: Tensor  # [B] int32: tokens each row holds, that is the position of its next token
    ends: Tensor  # [B] int32: lengths plus the tokens of the call in progress
    is_empty: bool  # no row holds a token yet, known without asking the device

    def reserve(self, n_tokens: int) -> None: ...
    def of_layer(self, layer: int) -> tuple[Tensor, Tensor]: ...  # keys and values, in one piece or in pages
    def scales_of_layer(self, layer: int) -> dict[str, Tensor]: ...  # of pages only, by name; of numbers there are none
    def advance(self, n_tokens: int | Tensor) -> None: ...
    def recall(self, name: str, like: Tensor) -> Tensor: ...
    def remember(self, name: str, value: Tensor, after_each: Tensor | None = None) -> None: ...


class Attention(nn.Module):
    """Grouped-query causal attention.

    layer          its index: which layer of the cache is its own
    window         how many earlier tokens each token sees; None: all
    qk_eps         eps of the norm of q and k after the rotation; None: no norm
    qk_scale       what q and k are multiplied with after that (nanochat's 1.2 sharpens the softmax)
    gate_channels  how many input channels gate a value embedding; None: there is no value embedding
    gate_range     the gate is gate_range · sigmoid(W x[:gate_channels])
    """

    def __init__(
        self,
        ops: Ops,
        *,
        layer: int,
        n_embd: int,
        n_head: int,
        n_kv_head: int,
        window: int | None = None,
        qk_eps: float | None = None,
        qk_scale: float = 1.0,
        gate_channels: int | None = None,
        gate_range: float = 1.0,
    ) -> None:
        super().__init__()
        self.ops, self.layer, self.window = ops, layer, window
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, n_embd // n_head
        self.qk_eps, self.qk_scale = qk_eps, qk_scale
        self.gate_channels, self.gate_range = gate_channels, gate_range
        self.c_q = Linear(n_embd, n_head * self.head_dim)
        self.c_k = Linear(n_embd, n_kv_head * self.head_dim)
        self.c_v = Linear(n_embd, n_kv_head * self.head_dim)
        self.c_proj = Linear(n_head * self.head_dim, n_embd)
        if gate_channels is not None:
            self.ve_gate = Master(n_kv_head, gate_channels)  # the op rounds it
        self.qkv: Operands | None = None

    def stack(self) -> None:
        """For `decode`: the weights of q, k and v as one."""
        self.qkv = side_by_side(self.c_q, self.c_k, self.c_v)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        tokens: Tensor | None = None,
        value_table: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x [B, T, C] → [B, T, C]; what value_table [V, Hkv·D] says about the tokens is added to the values, gated."""
        B, T, _ = x.shape
        n_gate = 0 if value_table is None else self.gate_channels
        gate_input, q, k, v = products(x, self.c_q, self.c_k, self.c_v, n_first=n_gate)
        q = q.view(B, T, self.n_head, self.head_dim)
        k, v = (y.view(B, T, self.n_kv_head, self.head_dim) for y in (k, v))
        if value_table is not None:
            gate = dict(gate_input=gate_input, gate_weight=self.ve_gate.weight)
            v = self.ops.value_embedding(v, tokens, value_table, **gate, gate_range=self.gate_range)
        if cache is None:
            y = self.attend(q, k, v, cos, sin, doc_ids)
        else:
            y = self.attend_cached(q, k, v, cos, sin, cache)
        return self.c_proj(y.reshape(B, T, -1))

    def decode(
        self,
        x: Tensor,
        normed: Tensor | None,
        norm: RMSNorm,
        cos: Tensor,
        sin: Tensor,
        cache: Cache,
        *,
        tokens: Tensor | None = None,
        value_table: Tensor | None = None,
    ) -> Tensor:
        """x + attention(norm(x)) of few tokens a row [B, T, C], in few launches. normed: norm(x) where it is known."""
        if normed is None and value_table is not None:
            normed = norm(x)  # the gate reads it, too
        if normed is None:
            qkv = self.ops.linear_decode(x, *self.qkv, **norm.options)
        else:
            qkv = self.ops.linear_decode(normed, *self.qkv)
        heads = qkv.unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 Hkv, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=2)
        if value_table is not None:
            gate = dict(gate_input=normed[..., : self.gate_channels], gate_weight=self.ve_gate.weight)
            v = self.ops.value_embedding(v, tokens, value_table, **gate, gate_range=self.gate_range)
        y = self.attend_cached(q, k, v, cos, sin, cache)
        return self.c_proj.decode(self.ops, y.flatten(2), residual=x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, doc_ids: Tensor | None) -> Tensor:
        """Attention among the tokens given, the first of which stands at position 0."""
        q, k = self.ops.qk_norm_rope(q, k, cos, sin, eps=self.qk_eps, scale=self.qk_scale)
        return self.ops.attention(q, k, v, window=self.window, doc_ids=doc_ids)

    def attend_cached(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        """Attention over the tokens given, which join the cache, and those before them."""
        kv, options = cache.of_layer(self.layer), dict(eps=self.qk_eps, scale=self.qk_scale)
        if cache.block_table is not None:
            places, scales = (cache.block_table, cos, sin, cache.lengths), cache.scales_of_layer(self.layer)
            if q.shape[1] == 1:
                options = dict(eps=self.qk_eps, qk_scale=self.qk_scale, window=self.window)
                return self.ops.attention_step_paged(q, k, v, *kv, *places, **options, **scales)[0]
            q, *pages = self.ops.qk_norm_rope_append_paged(q, k, v, *kv, *places, **options, **scales)
            seen = (cache.block_table, cache.ends)
            return self.ops.attention_decode_paged(q, *pages, *seen, window=self.window, **scales)
        q, k_all, v_all = self.ops.qk_norm_rope_append(q, k, v, *kv, cos, sin, cache.lengths, **options)
        if cache.is_empty:  # a first prefill sees nothing but itself: the training kernel does it best
            T = q.shape[1]
            return self.ops.attention(q, k_all[:, :T], v_all[:, :T], window=self.window)
        return self.ops.attention_decode(q, k_all, v_all, cache.ends, window=self.window)
