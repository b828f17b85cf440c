"""nanochat is what its definition says: against transformers (plain form), against the formulas (2026), key by key."""

import pytest
import torch
import torch.nn.functional as F

from model import build
from model.nanochat import NanochatConfig
from tests.model.tiny import FORMS, NANOCHAT_2026, VOCAB, awake, nanochat, tokens, torch_ops
from tests.numerics import assert_close


def padded_keys(config, layers, extra=()):
    """The state dict of `config` on paper: key and shape in order."""
    C, Vp, kv = config.n_embd, 128, config.kv_heads * config.head_dim
    keys = [("transformer.wte.weight", [Vp, C])]
    for i in range(layers):
        h = f"transformer.h.{i}"
        keys += [(f"{h}.attn.c_q.weight", [C, C]), (f"{h}.attn.c_k.weight", [kv, C]), (f"{h}.attn.c_v.weight", [kv, C])]
        keys += [(f"{h}.attn.c_proj.weight", [C, C])]
        keys += [(f"{h}.attn.ve_gate.weight", [config.kv_heads, 12])] if i in extra else []
        keys += [(f"{h}.mlp.c_fc.weight", [4 * C, C]), (f"{h}.mlp.c_proj.weight", [C, 4 * C])]
    return [*keys, ("lm_head.weight", [Vp, C])]


def keys_of(config) -> list:
    model = build(config, VOCAB, torch_ops())
    return [(name, list(value.shape)) for name, value in model.state_dict().items()]


def test_plain_keys_are_those_of_classic_nanochat():
    config = nanochat(n_kv_head=2)
    assert keys_of(config) == padded_keys(config, 3)


@pytest.mark.parametrize(("depth", "with_values"), [(3, [0, 2]), (4, [1, 3])])
def test_2026_keys_come_in_nanochats_order(depth, with_values):
    config = nanochat(depth=depth, n_kv_head=2, aspect_ratio=8, head_dim=4, **NANOCHAT_2026)
    scalars = [("resid_lambdas", [depth]), ("x0_lambdas", [depth]), ("smear_lambda", [1]), ("backout_lambda", [1])]
    tables = [(f"value_embeds.{i}.weight", [128, 2 * 4]) for i in with_values]
    want = [*scalars, *padded_keys(config, depth, with_values), ("smear_gate.weight", [1, 24]), *tables]
    assert keys_of(config) == want


@pytest.mark.parametrize(
    ("sequence_len", "pattern", "windows"),
    [
        (2048, "SSSL", [512, 512, 512, 2048, 512, 2048]),
        (512, "SSSL", [128, 128, 128, 512, 128, 512]),
        (1024, "ssl", [256, 256, 1024, 256, 256, 1024]),
        (4096, "S", [1024, 1024, 1024, 1024, 1024, 4096]),
        (2048, "L", [2048] * 6),
        (1000, "SL", [256, 1000, 256, 1000, 256, 1000]),
    ],
)
def test_windows(sequence_len, pattern, windows):
    assert NanochatConfig(depth=6, sequence_len=sequence_len, window_pattern=pattern).windows == windows


def norm(x, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def attention_by_the_formula(w, x, i, config, value_embed):
    """One head at a time, one query at a time: slow, and easy to check against the paper."""
    T, D, group = x.shape[0], config.head_dim, config.n_head // config.kv_heads
    q, k, v = (F.linear(x, w[f"transformer.h.{i}.attn.{name}.weight"]) for name in ("c_q", "c_k", "c_v"))
    if value_embed is not None:
        gate = 3 * torch.sigmoid(F.linear(x[:, :12], w[f"transformer.h.{i}.attn.ve_gate.weight"]))
        v = v + gate.repeat_interleave(D, dim=1) * value_embed
    theta = torch.outer(torch.arange(T).double(), config.rope_base ** (-torch.arange(0, D, 2).double() / D))
    cos, sin = theta.cos().float().double(), theta.sin().float().double()  # the model's tables are fp32

    def rotate(z):
        a, b = z[:, : D // 2], z[:, D // 2 :]
        return config.qk_scale * norm(torch.cat([a * cos + b * sin, b * cos - a * sin], 1), config.norm_eps)

    heads = []
    for h in range(config.n_head):
        own, shared = slice(h * D, (h + 1) * D), slice(h // group * D, (h // group + 1) * D)
        qh, kh, vh = rotate(q[:, own]), rotate(k[:, shared]), v[:, shared]
        rows = []
        for t in range(T):
            first = max(0, t - config.windows[i])
            p = torch.softmax(kh[first : t + 1] @ qh[t] / D**0.5, 0)
            rows.append(p @ vh[first : t + 1])
        heads.append(torch.stack(rows))
    return F.linear(torch.cat(heads, 1), w[f"transformer.h.{i}.attn.c_proj.weight"])


def nanochat_by_the_formula(w, row, config):
    """Features 2026 written down once more, without ops, batches or switches."""
    eps, L, middle = config.norm_eps, config.n_layer, None
    e = norm(w["transformer.wte.weight"][row], eps)
    x = e.clone()
    for t in range(1, len(row)):
        x[t] = e[t] + w["smear_lambda"] * torch.sigmoid(w["smear_gate.weight"] @ e[t, :24]) * e[t - 1]
    x0 = x
    for i in range(L):
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        table = w.get(f"value_embeds.{i}.weight")
        x = x + attention_by_the_formula(w, norm(x, eps), i, config, None if table is None else table[row])
        up = torch.relu(F.linear(norm(x, eps), w[f"transformer.h.{i}.mlp.c_fc.weight"])) ** 2
        x = x + F.linear(up, w[f"transformer.h.{i}.mlp.c_proj.weight"])
        middle = x if i == L // 2 else middle
    x = norm(x - w["backout_lambda"] * middle, eps)
    return 15 * torch.tanh(F.linear(x, w["lm_head.weight"][:VOCAB]) / 15)


@pytest.mark.parametrize("depth", [1, 4])
def test_2026_form_equals_the_formulas(depth):
    config = nanochat(depth=depth, n_kv_head=2, aspect_ratio=32 // depth, head_dim=8, **NANOCHAT_2026)
    model, row = awake(config, torch.float64), tokens(1, 140)
    weights = {name: value.double() for name, value in model.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(
            model(row)[0], nanochat_by_the_formula(weights, row[0], config), rtol=1e-10, atol=1e-10
        )


def huggingface_names(name: str) -> str:
    """Our key → the key of transformers' NanoChatForCausalLM."""
    words = {
        "transformer.h": "model.layers",
        "transformer.wte": "model.embed_tokens",
        "attn.c_proj": "self_attn.o_proj",
    }
    words |= {f"attn.c_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for ours, theirs in words.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_plain_form_equals_transformers(n_kv_head):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: no second opinion")
    config = nanochat(n_kv_head=n_kv_head)
    theirs = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(
            vocab_size=VOCAB,
            hidden_size=config.n_embd,
            intermediate_size=4 * config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.sequence_len,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            attn_implementation="eager",
        )
    ).eval()
    model, exact, row = awake(config), awake(config, torch.float64), tokens(2, 170)
    tables = ("transformer.wte.weight", "lm_head.weight")
    weights = {huggingface_names(k): v[:VOCAB] if k in tables else v for k, v in model.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    with torch.no_grad():
        assert_close(model(row), exact(row), theirs(row).logits, "logits")


@pytest.mark.parametrize("form", [form for form in FORMS if "nanofalcon" not in form and "llama" not in form])
def test_logits_stay_within_the_softcap(form):
    model = awake(FORMS[form])
    with torch.no_grad():
        model.lm_head.weight *= 100
        logits = model(tokens(2, 20))
    assert 14 < logits.abs().max() <= 15
