"""The command: any prompt as typed, every mistake one line, everything about the model from its checkpoint."""

import dataclasses
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import infer
from config import InferConfig, compose, run_command
from errors import KestrelError
from inference.request import stops_of
from inference.sampling import SamplingConfig
from model import LanguageModel, config_to_dict
from tests import warm
from tests.inference.scripted import BOS, BYTES, END
from tests.model.tiny import NANOCHAT_2026, awake, llama, nanochat

ROOT = Path(__file__).parent.parent.parent
CONTEXT = 3000  # takes a while to fill, so that there is time to interrupt


@pytest.fixture(autouse=True)
def same_threads():
    """infer.py sets the number of threads of its process, which here is ours."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def babbler(model_config, seed: int = 0) -> LanguageModel:
    """A model that talks nonsense without end: the tokens to stop at never get among the likeliest."""
    model = awake(model_config, vocab_size=BYTES.vocab_size, seed=seed)
    with torch.no_grad():
        model.head_weight[[BOS, END]] = 0.0
    return model


def save_run(run_dir: Path, model_config, *, step: int = 7, seed: int = 0, hardware=None, **changes) -> Path:
    """A run as training leaves it."""
    model = babbler(model_config, seed)
    config = {"model": config_to_dict(model_config) | changes, "hardware": hardware or {"dtype": "auto"}}
    return checkpoint.save(
        run_dir,
        step,
        model=model.state_dict(),
        optimizer={},
        state=checkpoint.TrainState(step=step).to_json(),
        config=config,
        tokenizer_json=BYTES.to_json(),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs, the second of which is the newest."""
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "older", llama(), step=3)
    save_run(folder / "newer, (with) 'quotes'", nanochat(sequence_len=CONTEXT, **NANOCHAT_2026))
    return folder


def config_for(*overrides: str, **raw) -> InferConfig:
    config = compose("infer", ["hardware.device=cpu", *overrides])
    return dataclasses.replace(config, **{key: str(value) for key, value in raw.items()})


def typed(monkeypatch, *argv: str) -> InferConfig:
    """The config that a command line arrives as."""
    seen = []
    monkeypatch.setattr(sys, "argv", ["infer.py", *argv])
    run_command("infer", seen.append, raw_keys=infer.RAW_KEYS)
    return seen[0]


# The command line.

AWKWARD = [
    "",
    " ",
    "  both ends  ",
    "commas, and, more",
    'it\'s "quoted" `so`',
    "(round [square {curly",
    "round) square] curly}",
    "colon: semicolon; equals = == =",
    "line\nbreak\n\n\ttab",
    "${interpolation} $HOME ${",
    "back\\slash \\n \\",
    "+plus ~tilde -dash --dash !bang #hash @at %percent ^caret &and *star |pipe <less >more ?",
    "null",
    "true",
    "[1,2]",
    "key=value",
    "prompt=prompt",
    "--help",
    "Ünïcödé, Привет, 日本語, 🦊👩‍👩‍👧, ע",
    "<|bos|> is text",
    "x" * 5000,
]


@pytest.mark.parametrize("prompt", AWKWARD, ids=lambda prompt: repr(prompt[:20]))
def test_a_prompt_arrives_as_typed(prompt, monkeypatch):
    config = typed(monkeypatch, f"prompt={prompt}", "top_k=3")
    assert config.prompt == prompt
    assert config.top_k == 3


@pytest.mark.parametrize(
    ("typed", "stops"),
    [
        ("The end", ("The end",)),
        (", [a]", (", [a]",)),
        ('["\\n\\n", "x, y"]', ("\n\n", "x, y")),
        ("[]", ()),
        (None, ()),
    ],
)
def test_stop_is_a_text_or_a_list_of_them(typed, stops, monkeypatch):
    assert stops_of(typed) == stops


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("", "texts that are not empty, got ('',)"),
        ('["a", ""]', "texts that are not empty, got ('a', '')"),
        ("[1]", "texts that are not empty, got (1,)"),
        ("[a", "stop=[a begins like a list and is none in JSON"),
        ("x" * 1001, "stop must be at most 64 texts of at most 1000 characters, got 1, the longest of 1001"),
        (str(["x"] * 65).replace("'", '"'), "got 65, the longest of 1"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_stop_text_that_cannot_be_meant_is_one_sentence(typed, says, runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", f"stop={typed}", f"runs_dir={runs}"])
    with pytest.raises(SystemExit) as left:
        run_command("infer", infer.main, raw_keys=infer.RAW_KEYS)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_paths_arrive_as_typed(monkeypatch):
    config = typed(monkeypatch, "ckpt=runs/a, (b)=[c] é", "runs_dir=my runs, old")
    assert (config.ckpt, config.runs_dir) == ("runs/a, (b)=[c] é", "my runs, old")


def test_the_yaml_says_what_the_defaults_of_the_code_are():
    config = compose("infer")
    for field in dataclasses.fields(SamplingConfig):
        assert getattr(config, field.name) == field.default, field.name
    assert (config.prompt, config.ckpt, config.stream) == (None, None, True)
    assert (config.mode, config.input, config.output, config.max_rows) == ("generate", None, None, 16)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["temprature=1"], ["temprature", "temperature"]),
        (["temperature=hot"], ["temperature", "hot"]),
        (["temperature=-1"], ["temperature", "-1"]),
        (["top_p=0"], ["top_p", "0"]),
        (["top_k=1.5"], ["top_k", "1.5"]),
        (["max_new_tokens=0"], ["max_new_tokens", "0"]),
        (["num_samples=0"], ["num_samples", "0"]),
        (["seed=-2"], ["seed", "-2"]),
        (["repetition_penalty=0"], ["repetition_penalty", "0"]),
        (["frequency_penalty=101"], ["frequency_penalty", "101"]),
        (["presence_penalty=-101"], ["presence_penalty", "-101"]),
        (["mode=talk"], ["mode", "talk", "chat"]),
        (["mode=batch"], ["input="]),
        (["mode=batch", "input=a.jsonl"], ["output="]),
        (["mode=batch", "max_rows=0"], ["max_rows", "0"]),
        (["speculate=-1"], ["speculate", "-1"]),
        (["mode=batch", "prompt=a"], ["prompt=", "batch"]),
        (["input=a.jsonl"], ["input=", "generate"]),
        (["stream=maybe"], ["stream", "maybe"]),
        (["hardware.dtype=fp8"], ["hardware.dtype", "fp8"]),
        (["kernels=cuda"], ["cuda", "torch", "triton"]),
        (["model=d6"], ["model"]),
        (["runs_dir=/no/such/folder"], ["/no/such/folder", "train.py", "ckpt="]),
        (["ckpt=/no/such/run"], ["/no/such/run", "does not exist"]),
        (["ckpt="], ["ckpt"]),
        (["hardware.compile=true"], ["hardware.compile", "training"]),
        (["hardware.device_batch_size=4"], ["hardware.device_batch_size", "num_samples"]),
    ],
    ids=lambda value: value[0],
)
def test_a_mistake_is_one_line_and_status_2(argv, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        run_command("infer", infer.main, raw_keys=infer.RAW_KEYS)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in says), err


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KestrelError, match="torchrun"):
        infer.main(config_for())


# What comes from the checkpoint.


def test_the_newest_run_is_found_and_another_can_be_named(runs, capsys):
    for named, says in (
        ({"runs_dir": runs}, "step 7, nanochat"),
        ({"ckpt": runs / "older"}, "step 3, llama"),
        ({"ckpt": runs / "older" / "checkpoints" / "step-00000003"}, "step 3, llama"),
        ({"ckpt": runs / "newer, (with) 'quotes'"}, "step 7, nanochat"),
    ):
        infer.main(config_for("max_new_tokens=2", prompt="a", **named))
        out, err = capsys.readouterr()
        assert out.startswith("a")
        assert says in err
        assert "cpu, float32, kernels: all torch" in err


@pytest.mark.parametrize(
    "model_config", [nanochat(**NANOCHAT_2026), llama(tied=True, n_kv_head=1)], ids=["2026", "llama"]
)
def test_a_loaded_model_computes_what_was_saved(model_config, tmp_path):
    save_run(tmp_path / "run", model_config, seed=5)
    row = torch.randint(BYTES.vocab_size, (2, 40))
    loaded = infer.load_engine(config_for(ckpt=tmp_path / "run")).model
    assert loaded.config == model_config
    with torch.no_grad():
        assert loaded(row).equal(babbler(model_config, seed=5)(row))


def test_dtype_is_that_of_the_run_unless_asked_otherwise(tmp_path, capsys):
    for trained, asked, got in (
        ("auto", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float16", "auto", torch.float32),  # a CPU does not compute in it
    ):
        save_run(tmp_path / f"{trained}-{asked}", llama(), hardware={"dtype": trained})
        engine = infer.load_engine(config_for(f"hardware.dtype={asked}", ckpt=tmp_path / f"{trained}-{asked}"))
        assert engine.model.dtype == got
        assert {p.dtype for p in engine.model.parameters() if p.dim() == 2} == {got}
        assert f"cpu, {str(got).removeprefix('torch.')}," in capsys.readouterr().err


def test_an_engine_knows_who_it_is(runs, tmp_path):
    """Run, step, hash: the same from another place, another for other weights."""
    names = {infer.load_engine(config_for(ckpt=runs / "older")).name}
    names.add(infer.load_engine(config_for(ckpt=next((runs / "older" / "checkpoints").iterdir()))).name)
    assert re.fullmatch("older step 3 [0-9a-f]{8}", *names)
    save_run(tmp_path / "older", llama(), step=3, seed=1)
    for changes in ((), ("quant=int8",)):
        names.add(infer.load_engine(config_for(*changes, ckpt=tmp_path / "older")).name)
    assert len(names) == 3


def test_a_small_model_takes_one_thread_unless_asked_otherwise(runs):
    for overrides, threads in (([], 1), (["hardware.threads=2"], 2)):
        infer.load_engine(config_for(*overrides, runs_dir=runs))
        assert torch.get_num_threads() == threads


def test_a_config_that_is_not_ours_is_refused(tmp_path):
    for name, changes, says in (
        ("key", {"__reduce__": "os.system"}, "__reduce__"),
        ("family", {"family": "os.system"}, "os.system"),
        ("type", {"n_embd": "24"}, "n_embd"),
        ("shape", {"n_embd": 48}, "does not fit"),
        ("layers", {"n_layer": 10**9}, "n_layer"),
        ("context", {"sequence_len": 10**12}, "sequence_len"),
    ):
        save_run(tmp_path / name, llama(), **changes)
        with pytest.raises(KestrelError, match=says):
            infer.load_engine(config_for(ckpt=tmp_path / name))


TOLD: dict[str, str] = {}  # by the last override: the usual story is told once


@pytest.mark.parametrize(
    "override",
    [
        "max_new_tokens=5",
        "temperature=0",
        "temperature=2",
        "top_k=2",
        "top_p=0.3",
        "repetition_penalty=9",
        "seed=1",
        "frequency_penalty=3",
        "presence_penalty=5",
    ],
)
def test_every_sampling_key_changes_the_story(override, runs, capsys):
    stories = []
    for overrides in (["max_new_tokens=60"], ["max_new_tokens=60", override]):
        if overrides[-1] not in TOLD:
            infer.main(config_for(*overrides, runs_dir=runs, prompt="The "))
            TOLD[overrides[-1]] = capsys.readouterr().out
        stories.append(TOLD[overrides[-1]])
    assert stories[0] != stories[1]


def test_the_same_command_tells_the_same_story_streamed_or_not(runs, capsys):
    stories = []
    for stream in ("true", "true", "false"):
        infer.main(config_for("max_new_tokens=60", f"stream={stream}", "num_samples=2", runs_dir=runs, prompt="The "))
        stories.append(capsys.readouterr().out)
    assert stories[0] == stories[1] == stories[2]


def test_kernels_are_chosen_by_name(runs, capsys):
    infer.main(config_for("max_new_tokens=2", "kernels.rmsnorm=torch", runs_dir=runs, prompt="a"))
    assert "kernels: all torch" in capsys.readouterr().err
    with pytest.raises(KestrelError, match=r"kernels\.rmsnorm=nothing"):
        infer.main(config_for("kernels.rmsnorm=nothing", runs_dir=runs, prompt="a"))


# The process itself.


def start(runs: Path, *argv: str, cold: bool = False, **options) -> subprocess.Popen:
    python = [sys.executable] if cold else warm.python()
    command = [*python, ROOT / "infer.py", f"runs_dir={runs}", "hardware.device=cpu", *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, **{"stdout": pipe, "stderr": pipe, "stdin": subprocess.DEVNULL, **options})


def test_a_story_streams_out_of_the_process_and_ctrl_c_ends_it_politely(runs):
    prompt = 'Said "he", it\'s (é) = ${x}: \n🦊'
    process = start(runs, f"prompt={prompt}", f"max_new_tokens={CONTEXT - 100}", "temperature=1", cold=True)
    told = process.stdout.read(len(prompt.encode()) + 10)
    assert process.poll() is None, "it had finished before anything could be read"
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert told.startswith(prompt.encode())
    assert rest.endswith(b"\n")
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert err.strip().endswith(b"interrupted")
    assert int(err.splitlines()[-1].split()[0]) < CONTEXT - 100


def test_ctrl_c_while_it_starts_is_quiet(runs):
    command = [sys.executable, "-X", "importtime", ROOT / "infer.py"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    while b" dataclasses\n" not in process.stderr.readline():  # the first of the imports, PyTorch is yet to come
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert b" hydra" not in err, "it was past its imports"


def test_a_reader_that_leaves_is_no_error(runs):
    process = start(runs, "prompt=Once", f"max_new_tokens={CONTEXT - 100}", "temperature=1")
    assert process.stdout.read(6).startswith(b"Once")
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert process.stderr.read().count(b"\n") == 1  # the line that says which model it is
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(runs):
    with open("/dev/full", "wb") as full:
        process = start(runs, "prompt=a", "max_new_tokens=2", stdout=full)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith(b"error: cannot write to standard output: No space left")
    assert err.count(b"\n") == 2  # the other says which model it is


def test_a_closed_output_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(KestrelError, match="standard output is closed"):
        infer.main(config_for())


def test_a_device_is_no_file_of_prompts_or_answers(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}')
    for given in (
        {"input": "/dev/zero", "output": tmp_path / "o"},
        {"input": tmp_path / "in.jsonl", "output": "/dev/zero"},
    ):
        with pytest.raises(KestrelError, match="=/dev/zero is not a regular file"):
            infer.main(config_for("mode=batch", **given))


def test_hardware_of_a_checkpoint_that_is_none_is_refused(tmp_path):
    for hardware in ([1], {"dtype": []}):
        save_run(tmp_path / "run", llama(), hardware=hardware)
        with pytest.raises(KestrelError, match="hardware"):
            infer.load_engine(config_for(ckpt=tmp_path / "run"))


def test_piped_text_is_continued_and_only_the_story_is_on_stdout(runs):
    process = start(runs, "max_new_tokens=3", "temperature=0", stdin=subprocess.PIPE)
    out, err = process.communicate("Once, é".encode() + b"\n", timeout=30)
    assert process.returncode == 0, err
    assert out.startswith("Once, é".encode())
    assert b"tokens/s" in err
    assert b"tokens/s" not in out
