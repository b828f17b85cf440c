"""Every YAML composes into typed config, and every mistake is one clear line before anything is loaded."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

import config
from config import InferConfig, RunConfig, compose, one_line, quote_path, split_raw

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
CHOICES = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name in {"model", "arch", "kernels", "data", "tokenizer", "optim", "stage", "hardware", "experiment"}
]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_yaml_composes(group: str, name: str):
    assert isinstance(compose("train", [f"{group}={name}"]), RunConfig)


def test_the_defaults_compose():
    assert isinstance(compose("train"), RunConfig)
    assert isinstance(compose("infer"), InferConfig)


@pytest.mark.parametrize("group", ["tokenizer", "optim", "stage", "hardware", "data"])
def test_every_key_of_a_schema_is_written_in_a_yaml_with_a_comment(group: str):
    """A key that no YAML shows is a key nobody finds."""
    run = compose("train")
    text = "\n".join(path.read_text() for path in (CONF / group).glob("*.yaml"))
    commented = {line.split(":")[0].strip(" #") for line in text.splitlines() if ":" in line and "#" in line}
    names = {f.name for f in fields(getattr(run, group))} - {"name"}
    assert names <= commented, f"conf/{group} does not explain {sorted(names - commented)}"


def error_for(*overrides: str, config_name: str = "train") -> str:
    with pytest.raises((ValueError, HydraException, OmegaConfBaseException)) as caught:
        compose(config_name, list(overrides))
    return one_line(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.dept=3"], ["model.dept", "NanochatConfig", "model.depth"]),
        (["modle=d6"], ["modle", "model"]),
        (["model=d7"], ["d7", "d6", "d12", "llama"]),
        (["model.depth=many"], ["model.depth", "many", "Integer"]),
        (["model.depth=0"], ["model.depth", "0", "positive"]),
        (["model.window_pattern=XY"], ["window_pattern", "XY"]),
        (["model=llama", "model.n_head=7"], ["n_head", "7"]),
        (["model=llama", "arch=nanochat2026"], ["LlamaConfig"]),
        (["kernels=cuda"], ["cuda", "torch", "triton"]),
        (["data=tinystory"], ["tinystory", "tinystories"]),
        (["optim.matrix_lr=-1"], ["optim.matrix_lr", "-1"]),
        (["optim=adamw", "optim.matrix_lr=0.1"], ["matrix_lr", "AdamWConfig"]),
        (["stage.num_iterations=0"], ["stage.num_iterations", "0"]),
        (["hardware.dtype=fp8"], ["hardware.dtype", "fp8", "bfloat16"]),
        (["tokenizer.vocab_size=100"], ["vocab_size", "100"]),
        (["resume=/no/such/place"], ["resume", "/no/such/place"]),
        (["run=../elsewhere"], ["run", "../elsewhere"]),
        (["seed=-1"], ["seed", "-1"]),
        (["+new=1"], ["new"]),
        (["+model.new=1"], ["model.new"]),
        (["~model"], ["model"]),
        (["model=d2,d4"], ["model=d2,d4", "-m"]),
        (["model.depth=(3"], ["model.depth=(3"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_that_names_it(overrides: list[str], says: list[str]):
    message = error_for(*overrides)
    assert "\n" not in message
    for word in says:
        assert word in message


def test_paths_need_no_quoting():
    run = compose("train", ["data=text", "data.files=a b/it's (1)*.txt,c.txt"])
    assert run.data.files == ["a b/it's (1)*.txt", "c.txt"]
    assert quote_path("data.files=[x,y]") == "data.files=[x,y]"
    assert quote_path("model.depth=3") == "model.depth=3"


def test_raw_values_pass_untouched():
    awkward = "prompt=a, 'b' (c): \"d\"=e\n{f} [g] $h é 日本"
    argv, raw = split_raw(["temperature=0", awkward, "seed=1"], ("prompt",))
    assert argv == ["temperature=0", "seed=1"]
    assert raw == {"prompt": awkward.removeprefix("prompt=")}


@pytest.mark.parametrize("command", ["train.py", "infer.py"])
def test_a_command_refuses_in_one_line_with_status_2(command: str, tmp_path: Path):
    call = [sys.executable, ROOT / command, "no_such_key=1"]
    run = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "no_such_key" in run.stderr
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_cfg_job_shows_the_resolved_truth(tmp_path: Path):
    call = [sys.executable, ROOT / "train.py", "model=d6", "kernels.attention=torch", "--cfg", "job", "--resolve"]
    run = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "depth: 6" in run.stdout
    assert "run: d6-fables" in run.stdout
    assert "${" not in run.stdout


def test_kestrel_errors_inside_the_command_are_one_line():
    message = one_line(config.KestrelError("first\nsecond"))
    assert message == "first second"
