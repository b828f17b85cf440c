"""Many prompts from a file: `python infer.py mode=batch input=prompts.jsonl output=answers.jsonl`.

Every line of the input is an object with a "prompt", and whatever it wants otherwise than the command line says: any
field of SamplingConfig, "stop" (a list of texts), "logprobs" (how many), "tools" (true: the calculator), "id" (copied).
Every line of the output answers one: {"line", "id", "prompt", "model", "samples": [{"text", "finish", "n_tokens"}, …]},
or {"line", "id", "prompt", "model", "error"} if it does not fit. Lines come in the order in which they are done.

The same command goes on where an earlier one stopped: what is answered is skipped, and a last line that was torn in
the middle is written anew. A line's draws follow from the seed and its number, so nothing depends on where it stopped.
What another model began is left alone unless any_model=true says otherwise.
"""

import dataclasses
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from errors import KestrelError
from inference.calculator import calculate
from inference.console import note
from inference.engine import Engine
from inference.request import Event, Request
from inference.sampling import MAX_SAMPLES, SamplingConfig
from inference.stopwatch import Stopwatch

SAMPLING_KEYS = {field.name for field in dataclasses.fields(SamplingConfig)}
BEGINNING = b'{"line": '  # of every answer
KEYS = {"prompt", "id", "stop", "logprobs", "tools"} | SAMPLING_KEYS


def run_batch(
    engine: Engine,
    sampling: SamplingConfig,
    source: Path,
    target: Path,
    *,
    stop: tuple[str, ...] = (),
    model: str | None = None,
    any_model: bool = False,
) -> bool:
    """Answer every line of `source` that `target` does not answer yet → False if interrupted.

    stop        for lines that do not say
    model       its name, noted with every answer
    any_model   go on with what another model began
    """
    lines = read_source(source)
    if target.exists() and target.samefile(source):
        raise KestrelError(f"{target} is the input as well: name another output=")
    stopwatch = Stopwatch()
    with target.open("a", encoding="utf-8") as file:
        take_alone(file, target)
        done = read_target(target, lines, None if any_model else model)
        waiting = [number for number in lines if number not in done]
        note(f"{source}: {len(lines)} lines, {len(done)} of them answered in {target} before")
        try:
            for number, answer in answers(engine, sampling, stop, lines, waiting, stopwatch):
                line = lines[number]
                about = {"line": number, "id": line.get("id"), "prompt": line["prompt"]}
                write(file, about | ({"model": model} if model else {}) | answer)
        except KeyboardInterrupt:
            note(stopwatch.summary() + ", interrupted: the same command goes on from here")
            return False
    note(stopwatch.summary())
    return True


def take_alone(file: TextIO, path: Path) -> None:
    """Refuse a file that another process is writing answers to."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise KestrelError(f"{path} is being written by another process: wait, or name another output=") from error
    except OSError:
        pass  # a file system without locks


def answers(
    engine: Engine,
    sampling: SamplingConfig,
    stop: tuple[str, ...],
    lines: dict[int, dict],
    waiting: list[int],
    stopwatch: Stopwatch,
) -> Iterator[tuple[int, dict]]:
    """Keep the engine busy with the lines that wait → the number and the answer of each, as soon as it is complete."""
    numbers: dict[Request, int] = {}
    told: dict[Request, list[dict]] = {}
    todo = iter(waiting)
    while True:
        while len(engine.queue) < engine.max_rows and (number := next(todo, None)) is not None:
            try:
                request = engine.submit(request_of(engine, sampling, stop, lines[number], number))
            except KestrelError as error:
                yield number, {"error": str(error)}
                continue
            numbers[request] = number
            told[request] = [new_sample(request) for _ in range(request.sampling.num_samples)]
        if not engine.has_work:
            return
        events = engine.step()
        if events:
            stopwatch.count(sum(event.token is not None for event in events))
        for event in events:
            samples = told[event.request]
            take(samples[event.sample], event)
            if event.finish is not None and all(sample["finish"] for sample in samples):
                del told[event.request]
                yield numbers.pop(event.request), {"samples": samples}


def request_of(engine: Engine, sampling: SamplingConfig, stop: tuple[str, ...], line: dict, number: int) -> Request:
    """What a line asks for; by default with draws of its own."""
    changes = {"seed": (sampling.seed + number) % 2**63} | {key: line[key] for key in SAMPLING_KEYS & line.keys()}
    return Request(
        engine.encode(line["prompt"]),
        dataclasses.replace(sampling, **changes),
        stop=tuple(line.get("stop", stop)),
        logprobs=line.get("logprobs"),
        tool=calculate if line.get("tools") else None,
    )


def new_sample(request: Request) -> dict[str, Any]:
    sample = {"text": "", "finish": None, "n_tokens": 0}
    return sample if request.logprobs is None else {**sample, "tokens": [], "logprobs": [], "top_logprobs": []}


def take(sample: dict[str, Any], event: Event) -> None:
    """Add an event to the sample it belongs to."""
    sample["text"] += event.text
    sample["finish"] = event.finish
    sample["n_tokens"] += event.token is not None
    if event.logprob is not None:
        sample["tokens"].append(event.token)
        sample["logprobs"].append(event.logprob)
        sample["top_logprobs"].append(event.top)


def write(file: TextIO, answer: dict) -> None:
    text = json.dumps(answer, ensure_ascii=False)
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # half a letter, which no encoding has
        text = json.dumps(answer)
    file.write(text + "\n")
    file.flush()


def read_source(path: Path) -> dict[int, dict]:
    """The lines of the input that are not empty, by number; what cannot be meant is refused before anything is done."""
    lines = {}
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            lines[number] = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise KestrelError(f"{path} line {number} is not JSON: {error}") from error
        check(lines[number], f"{path} line {number}")
    return lines


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise KestrelError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def check(line: Any, where: str) -> None:
    """Refuse a line that holds something else than what this file says."""
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
        raise KestrelError(f'{where} must be an object with a text as "prompt", like {{"prompt": "Once upon a time"}}')
    if unknown := sorted(line.keys() - KEYS):
        raise KestrelError(f"{where} has the key {unknown[0]!r}; known keys: {', '.join(sorted(KEYS))}")
    for key, kind in (("stop", list), ("logprobs", int), ("tools", bool)):
        if key in line and type(line[key]) is not kind and not (key == "logprobs" and line[key] is None):
            raise KestrelError(f"{where}: {key} must be a {kind.__name__}, got {line[key]!r:.80}")
    try:
        defaults = dataclasses.asdict(SamplingConfig())
        for key in SAMPLING_KEYS & line.keys():
            wanted = (int, float) if isinstance(defaults[key], float) else (int,)
            if type(line[key]) not in wanted and not (key == "max_new_tokens" and line[key] is None):
                raise KestrelError(f"{key} must be a number, got {line[key]!r:.80}")
        settings = SamplingConfig(**{key: line[key] for key in SAMPLING_KEYS & line.keys()})
        if settings.num_samples > MAX_SAMPLES:
            raise KestrelError(f"num_samples must be at most {MAX_SAMPLES}, got {settings.num_samples}")
        Request([], stop=tuple(line.get("stop", ())), logprobs=line.get("logprobs"))
    except KestrelError as error:
        raise KestrelError(f"{where}: {error}") from error


def read_target(path: Path, lines: dict[int, dict], model: str | None = None) -> set[int]:
    """Which lines are answered already; what a torn last line left is cut off.

    model   refuse what another one answered; None: whoever answered
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    done = set()
    for text in whole.split(b"\n")[:-1]:
        try:
            answer = json.loads(text)
            number = answer["line"]
            fits = answer["prompt"] == lines[number]["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError):
            fits = False
        if not fits:
            raise KestrelError(f"{path} holds something else than answers to this input: name another output=")
        if model is not None and (other := answer.get("model", model)) != model:
            raise KestrelError(
                f"{path} was begun by {other!s:.200}, and this is {model}: name another output=, or the former with "
                "ckpt=, or take any_model=true"
            )
        done.add(number)
    torn = data[len(whole) :]
    if not BEGINNING.startswith(torn[: len(BEGINNING)]):
        raise KestrelError(f"{path} ends with something else than an answer: name another output=")
    if torn:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return done
