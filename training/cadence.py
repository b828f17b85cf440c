"""What happens between steps: a validation, a sample, a checkpoint. The loop says when; this says what.

Every rank calls each of these at the same step. Validation is shared out among the ranks, samples and files are left to
rank 0.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
from checkpoint import TrainState
from data.batches import val_batches
from data.documents import TokenShards
from data.tokenizer import Tokenizer
from errors import KestrelError
from evals.bits_per_byte import evaluate
from inference.simple import sample_text
from model.language_model import LanguageModel
from optim.muon_adamw import MuonAdamW
from training.distributed import Device, broadcast_object
from training.horizon import Horizon, StageConfig
from training.report import Reporter


@dataclass
class Cadence:
    """The parts of a run that validation, sampling and saving need."""

    path: Path  # the run directory
    stage: StageConfig
    settings: dict  # the resolved config as plain data: goes into every checkpoint
    model: LanguageModel
    optimizer: MuonAdamW
    tokenizer: Tokenizer
    val_shards: TokenShards
    horizon: Horizon
    state: TrainState
    reporter: Reporter
    device: Device

    @torch.no_grad()
    def validate(self) -> float:
        """Loss and bits per byte on the validation split, the same rows every time. → bits per byte"""
        batches = val_batches(
            self.val_shards,
            batch_size=self.horizon.device_batch_size,
            sequence_len=self.model.context_len,
            rank=self.device.rank,
            world_size=self.device.world_size,
            max_tokens=self.stage.eval_tokens,
            device=self.device.device,
        )
        token_bytes = torch.from_numpy(self.tokenizer.token_bytes).to(self.device.device)
        result = evaluate(self.model, batches, token_bytes)
        self.reporter.validation(self.state.step, result["loss"], result["bpb"])
        return result["bpb"]

    def sample(self) -> None:
        """Continue every prompt of the stage, greedily, so that samples of different steps compare."""
        if not self.device.is_main:
            return
        texts = sample_text(
            self.model, self.tokenizer, self.stage.sample_prompts, max_new_tokens=self.stage.sample_tokens
        )
        for prompt, text in zip(self.stage.sample_prompts, texts):
            self.reporter.sample(self.state.step, prompt, text)

    def save(self, best: bool) -> None:
        """Publish a checkpoint; if rank 0 cannot, every rank stops with the same message."""
        optimizer = self.optimizer.state_tensors()  # gathered from all ranks
        problem = None
        if self.device.is_main:
            self.state.rng = checkpoint.rng_state(self.device.device)
            try:
                checkpoint.save(
                    self.path,
                    self.state.step,
                    model=dict(self.model.named_parameters()),
                    optimizer=optimizer,
                    state=self.state.to_json(),
                    config=self.settings,
                    tokenizer_json=self.tokenizer.to_json(),
                    keep_last=self.stage.keep_last,
                    best=best,
                )
            except KestrelError as error:
                problem = str(error)
        problem = broadcast_object(problem)
        if problem is not None:
            raise KestrelError(problem)
