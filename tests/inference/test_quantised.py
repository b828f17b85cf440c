"""Models that read from codes: the same words as the weights they stand for, from a file or made on loading."""

import json
import sys

import pytest
import torch

import checkpoint
import infer
import quantize
from checkpoint.manifest import MANIFEST, dump_json, manifest_hash
from checkpoint.saving import write_file
from config import QuantizeConfig, compose, run_command
from errors import KestrelError
from inference.engine import cast_weights
from inference.sampling import SamplingConfig
from kernels_torch.quantised_weight import FORMS, quantise
from model.quantised import Quantisation, quantise_model, quantised_layers
from tests.inference.test_infer import config_for, save_run
from tests.model.tiny import FORMS as MODELS
from tests.model.tiny import NANOCHAT_2026, awake, nanochat, tokens

EVERY_FORM = pytest.mark.parametrize("form", FORMS)
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=12)


@pytest.fixture
def run(tmp_path):
    save_run(tmp_path / "run", nanochat(**NANOCHAT_2026))
    return tmp_path / "run"


def made(run, form, **changes) -> QuantizeConfig:
    """Run the command → its config."""
    config = QuantizeConfig(quant=form, ckpt=str(run), device="cpu", **changes)
    quantize.main(config)
    return config


def greedy(engine) -> list:
    return list(engine.generate(engine.encode("once"), GREEDY))


def error_of(function, *arguments, **options) -> str:
    with pytest.raises(KestrelError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@EVERY_FORM
def test_a_quantised_checkpoint_says_what_one_quantised_on_loading_says(run, form, capsys):
    made(run, form)
    on_loading = infer.load_engine(config_for(f"quant={form}", ckpt=run))
    assert f"{form} weights" in capsys.readouterr().err
    from_file = infer.load_engine(config_for(ckpt=run.with_name(f"run-{form}")))
    assert f"{form} weights" in capsys.readouterr().err
    assert greedy(from_file) == greedy(on_loading)
    for name, layer in quantised_layers(from_file.model).items():
        other = on_loading.model.get_submodule(name)
        assert torch.equal(layer.codes.view(torch.uint8), other.codes.view(torch.uint8)), name
        assert torch.equal(layer.scales, other.scales), name


@EVERY_FORM
@pytest.mark.parametrize("family", MODELS)
def test_codes_give_the_logits_of_the_weights_they_stand_for(form, family):
    """In every family, whole rows and token by token."""
    coded, plain = (awake(MODELS[family], torch.float64) for _ in range(2))
    quantise_model(coded, Quantisation(form))
    with torch.no_grad():
        for name, layer in quantised_layers(plain).items():
            layer.weight.data = coded.get_submodule(name).weight_in(torch.float64)
    row = tokens(2, 9)
    torch.testing.assert_close(coded(row), plain(row))
    stacked = cast_weights(coded)
    torch.testing.assert_close(stacked(row), plain(row))


@EVERY_FORM
def test_a_quantised_file_is_smaller_and_holds_no_weight_twice(run, form):
    made(run, form)
    files = [
        next((folder / "checkpoints").glob("step-*")) / "model.safetensors"
        for folder in (run, run.with_name(f"run-{form}"))
    ]
    assert files[1].stat().st_size < 0.75 * files[0].stat().st_size
    header = files[1].read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]).keys()
    assert any(name.endswith(".codes") for name in names)
    layers = {name.removesuffix(".codes") for name in names if name.endswith(".codes")}
    assert not {f"{name}.weight" for name in layers} & names


def test_groups_of_int4_are_remembered(run):
    made(run, "int4", quant_group=64)
    engine = infer.load_engine(config_for(ckpt=run.with_name("run-int4")))
    layer = next(iter(quantised_layers(engine.model).values()))
    assert torch.equal(layer.codes, quantise(infer_weight(run, layer), "int4", 64)[0])


def infer_weight(run, layer) -> torch.Tensor:
    """The weight of the first layer as it was saved."""
    model = infer.load_engine(config_for(ckpt=run)).model
    first = next(iter(quantised_layers(model).values()))
    assert first.weight.shape == layer.weight.shape
    return first.weight


def test_what_is_quantised_is_not_quantised_again_or_trained_on(run):
    made(run, "int8")
    small = run.with_name("run-int8")
    assert "quantised already (int8): leave quant= out" in error_of(
        infer.load_engine, config_for("quant=int4", ckpt=small)
    )
    assert "quantised already" in error_of(made, small, "int4", out=str(run.with_name("other")))
    assert "holds checkpoints already" in error_of(made, run, "int8")
    assert not run.with_name("other").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant=int3"], "quant must be one of int8, int4, fp8, got 'int3'"),
        (["quant=int4", "quant_group=48"], "quant_group must be 64 or 128, got 48"),
        (["quant=int8", "device=tpu"], "device must be auto, cpu or cuda, got 'tpu'"),
        (["quant=int8", "ckpt="], "ckpt= is empty"),
        (["quant=int8", "out="], "out= is empty"),
        ([], "quant= says what to make"),
    ],
)
def test_bad_values_of_the_command_are_one_sentence(run, overrides, message, monkeypatch, capsys):
    given = [f"ckpt={run}", "device=cpu", *overrides]
    monkeypatch.setattr(sys, "argv", ["quantize.py", *given])
    with pytest.raises(SystemExit) as left:
        run_command("quantize", quantize.main, raw_keys=quantize.RAW_KEYS)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_bad_values_of_infer_are_refused():
    with pytest.raises(KestrelError, match="quant must be one of"):
        compose("infer", ["quant=bf16"])


def damage(folder, change) -> None:
    """Change the config of a checkpoint, as someone would who keeps hashes right."""
    path = next((folder / "checkpoints").glob("step-*"))
    config = json.loads((path / "config.json").read_text())
    change(config)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["config.json"] = write_file(path / "config.json", [dump_json(config)])
    manifest["sha256"] = manifest_hash(manifest)
    (path / MANIFEST).write_bytes(dump_json(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("quant"), "does not fit the configuration"),
        (lambda config: config["quant"].update(form="int8"), "does not fit the configuration"),
        (lambda config: config["quant"].update(group=64), "does not fit the configuration"),
        (lambda config: config["quant"].update(form="int2"), "quant is {'form': 'int2'"),
        (lambda config: config["quant"].update(group="many"), "quant is"),
        (lambda config: config.update(quant="int4"), "quant is 'int4'"),
        (lambda config: config.update(quant=[]), r"quant is \[\]"),
    ],
)
def test_a_config_that_does_not_fit_the_file_is_refused(run, change, message):
    made(run, "int4")
    small = run.with_name("run-int4")
    damage(small, change)
    with pytest.raises(KestrelError, match=message):
        infer.load_engine(config_for(ckpt=small))


def test_a_flipped_bit_is_noticed(run):
    made(run, "int8")
    small = run.with_name("run-int8")
    file = next((small / "checkpoints").glob("step-*")) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    assert "sha256" in error_of(infer.load_engine, config_for(ckpt=small))


@pytest.mark.parametrize("code", [127, 255])
def test_no_code_of_a_saved_fp8_weight_may_be_nan(tmp_path, code):
    codes = torch.full((2, 3), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(KestrelError, match="not finite"):
        checkpoint.save(tmp_path, 1, model={"codes": codes}, optimizer={}, state={}, config={}, tokenizer_json="{}")
