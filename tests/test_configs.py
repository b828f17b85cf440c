"""Every YAML composes into typed config, and every mistake is one clear line before anything is loaded."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

import config
from config import InferConfig, QuantizeConfig, RunConfig, compose, one_line, quote_path, split_raw

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
    assert isinstance(compose("quantize"), QuantizeConfig)


@pytest.mark.parametrize("group", ["tokenizer", "optim", "stage", "hardware", "data"])
def test_every_key_of_a_schema_is_written_in_a_yaml_with_a_comment(group: str):
    """A key that no YAML shows is a key nobody finds."""
    run = compose("train")
    text = "\n".join(path.read_text() for path in (CONF / group).glob("*.yaml"))
    commented = {line.split(":")[0].strip(" #") for line in text.splitlines() if ":" in line and "#" in line}
    names = {f.name for f in fields(getattr(run, group))} - {"name"}
    assert names <= commented, f"conf/{group} does not explain {sorted(names - commented)}"


def error_for(*overrides: str, config_name: str = "train") -> str:
    with pytest.raises((ValueError, ArithmeticError, HydraException, OmegaConfBaseException)) as caught:
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
        (["optim.grad_clip=inf"], ["optim.grad_clip", "inf", "optim.grad_clip=0"]),
        (["optim.weight_decay=inf"], ["optim.weight_decay", "inf"]),
        (["optim.max_weight_decay=inf"], ["optim.max_weight_decay", "inf", "optim.max_weight_decay=1e9"]),
        (["optim=adamw", "optim.eps=inf"], ["optim.eps", "inf"]),
        (["optim.scalar_lr=nan"], ["optim.scalar_lr", "nan"]),
        (["optim.matrix_lr=1e300"], ["optim.matrix_lr", "1e+300"]),
        (["stage.target_flops=inf"], ["stage.target_flops", "inf", "stage.target_flops=-1"]),
        (["stage.target_param_data_ratio=-inf"], ["stage.target_param_data_ratio", "-inf"]),
        (["optim.grad_clip=1" + 400 * "0"], ["optim.grad_clip", "too large"]),
        (["seed=18446744073709551616"], ["seed", "9223372036854775807"]),
        (["model.sequence_len=100000000000"], ["model.sequence_len", "100000000000", "at most"]),
        (["model.depth=99999999"], ["model.depth", "99999999", "at most"]),
        (["model=llama", "model.n_embd=80000000"], ["model.n_embd", "80000000", "at most"]),
        (["tokenizer.vocab_size=1000000000000"], ["tokenizer.vocab_size", "1000000000000", "at most"]),
        (["resume="], ["resume", "empty", "auto"]),
        (["resume=" + 300 * "x"], ["resume", "xxx", "too long"]),
        (["run=" + 300 * "x"], ["run", "200", "300", "shorter"]),
        (["run=ünï"], ["run=ünï", "quote"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_that_names_it(overrides: list[str], says: list[str]):
    message = error_for(*overrides)
    assert "\n" not in message
    for word in says:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["num_samples=100000000000"], ["num_samples", "100000000000", "at most"]),
        (["repetition_penalty=1e-300"], ["repetition_penalty", "1e-300", "0.01"]),
        (["top_p=nan"], ["top_p", "nan"]),
    ],
    ids=lambda value: value[-1],
)
def test_a_mistake_in_sampling_is_one_line_that_names_it(overrides: list[str], says: list[str]):
    message = error_for(*overrides, config_name="infer")
    assert "\n" not in message
    for word in says:
        assert word in message


@pytest.mark.parametrize(
    ("sweep", "says"), [("seed=1,x", ["seed", "'x'"]), ("optim.grad_clip=1,inf", ["grad_clip", "inf"])]
)
def test_a_mistake_in_the_last_job_of_a_sweep_is_known_before_the_first(sweep, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", sweep, "model=d2"])
    with pytest.raises(SystemExit) as stopped:
        config.run_command("train", lambda run: pytest.fail("a job was begun"))
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in says), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=1,2", "runs_dir=file"], ["file/sweeps", "Not a directory", "runs_dir="]),
        (["seed=1,2", "data.files=" + 250 * "x"], ["named after its overrides", "hydra.sweep.subdir"]),
    ],
    ids=["runs_dir", "name"],
)
def test_a_sweep_whose_folders_cannot_be_made_is_one_line(overrides, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *overrides])
    with pytest.raises(SystemExit) as stopped:
        config.run_command("train", lambda run: pytest.fail("a job was begun"))
    err = capsys.readouterr().err
    assert (stopped.value.code, err.count("\n")) == (2, 1)
    assert all(word in err for word in says), err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_jobs_of_a_sweep_are_its_product():
    jobs = config.sweep_jobs(["seed=1,2", "model=d2", "data.files=['a,b.txt']", "optim.grad_clip=0,1"])
    assert len(jobs) == 4
    assert all("model=d2" in job and "data.files=['a,b.txt']" in job for job in jobs)


def test_a_path_to_go_on_from_that_may_not_be_looked_at_says_so(tmp_path: Path, no_privileges):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    message = error_for(f"resume={locked}/run")
    assert "cannot be read: Permission denied" in message
    assert str(locked) in message


def test_a_mistake_is_told_whatever_the_environment_says_of_ranks(monkeypatch, capsys):
    for environment, lines in (
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, 1),
        ({"RANK": "5", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 0),  # rank 0 speaks for all
    ):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(SystemExit):
            config.stop("no")
        assert capsys.readouterr().err.count("\n") == lines


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
