"""What decoding reads is counted as it happens, and told beside the tokens per second."""

import pytest

from inference import bandwidth
from inference.bandwidth import copied_per_s, share_of_bandwidth
from inference.engine import Engine, cast_weights
from inference.request import Request
from inference.sampling import SamplingConfig
from inference.stopwatch import Stopwatch
from model.cost import bytes_of_products, kv_bytes_per_token
from tests.inference.scripted import BYTES
from tests.inference.test_serving import run
from tests.model.tiny import FORMS, awake


def test_steps_and_the_keys_they_look_at_are_counted():
    engine = Engine(awake(FORMS["plain"], vocab_size=BYTES.vocab_size), BYTES, max_rows=4, lag=0)
    engine.stop_ids = set()
    greedy = dict(temperature=0, max_new_tokens=4)
    run(
        engine,
        [Request([1] * 10, SamplingConfig(**greedy)), Request([1] * 20, SamplingConfig(**greedy, num_samples=2))],
    )
    assert engine.n_decoded == 3  # the first token of each row comes with its prompt
    assert engine.n_keys_read == (11 + 12 + 13) + 2 * (21 + 22 + 23)


def test_the_share_is_what_was_read_of_what_a_copy_moves(monkeypatch):
    model = cast_weights(awake(FORMS["plain"], vocab_size=BYTES.vocab_size))
    engine = Engine(model, BYTES)
    assert share_of_bandwidth(engine, 1.0) is None
    layers, width = model.config.n_layer, model.config.n_embd
    assert bytes_of_products(model) == 4 * (12 * layers * width**2 + model.head_weight.numel())
    engine.n_decoded, engine.n_keys_read = 100, 5000
    monkeypatch.setattr(bandwidth, "copied_per_s", lambda device: 1e9)
    engine.device = type("Device", (), {"type": "cuda"})()
    read = 100 * bytes_of_products(model) + 5000 * kv_bytes_per_token(model)
    assert share_of_bandwidth(engine, 0.5) == pytest.approx(read / 0.5e9)
    assert share_of_bandwidth(engine, 0.0) is None
    assert " tokens/s (62% of the memory's copy bandwidth), " in Stopwatch().summary(0.62)


@pytest.mark.gpu
def test_a_copy_is_timed(device):
    assert 1e11 < copied_per_s(device) < 1e14
