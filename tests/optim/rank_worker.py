"""What one rank of tests/optim/test_sharding.py does: a process imports this and nothing of pytest."""

from pathlib import Path

import torch
import torch.distributed as dist

from optim import muon_adamw
from optim.groups import AdamWConfig, MuonAdamWConfig
from optim.sharding import Ranks
from tests.optim.toy import Toy, random_gradients, set_gradients, snapshot, toy_optimizer

STEPS = 4
CONFIGS = {"muon_adamw": MuonAdamWConfig(), "adamw": AdamWConfig(lr=0.01)}
CLIP = 0.5
# Muon decays a weight where update and weight share a sign; a norm summed in another order could turn it.
NO_DECAY = MuonAdamWConfig(weight_decay=0.0)
# Ranks see different gradients; their averages are whole gradients of the same size.
RANK_SEEDS = {2: (10, 20), 3: (10, 20, 30)}


def averaged_gradients(model, world_size, step):
    """What W ranks average to, for a process that is alone."""
    parts = [random_gradients(model, seed + step) for seed in RANK_SEEDS[world_size]]
    return [torch.stack(g).mean(0) for g in zip(*parts)]


def train(model, optimizer, gradients, steps, **options):
    """Steps with a momentum, a rate and a decay that change; gradients(model, step) → this process's."""
    results = []
    for step in steps:
        set_gradients(model, gradients(model, step))
        results.append(optimizer.step(1 - step / 10, 0.85 + step / 100, 1 - step / 20, **options))
    return results


def main(rank, folder):
    """Be rank `rank` of three, then of two: starting a process takes longer than all it does."""
    torch.set_num_threads(1)
    for world_size in (3, 2):
        if rank < world_size:
            be_rank(rank, world_size, Path(folder))


def be_rank(rank, world_size, folder):
    rendezvous = f"file://{folder}/rendezvous{world_size}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    mine = lambda model, step: random_gradients(model, RANK_SEEDS[world_size][rank] + step)
    out = {}

    for name, config in CONFIGS.items():
        model, optimizer = toy_optimizer(config=config)
        results = train(model, optimizer, mine, range(STEPS))
        state = optimizer.state_tensors()
        out[name] = {"parameters": snapshot(model), "norms": [r.grad_norm for r in results], "state": state}
        out[name]["local_numbers"] = local_state_numbers(optimizer)

        loaded = Toy(seed=5)
        saved = torch.load(folder / f"single_{world_size}_{name}.pt")
        loaded.load_state_dict(saved["parameters"])
        _, optimizer = toy_optimizer(loaded, config)
        optimizer.load_state_tensors(saved["state"])
        train(loaded, optimizer, mine, range(STEPS, STEPS + 2))
        out[name]["continued"] = snapshot(loaded)

    model, optimizer = toy_optimizer(config=NO_DECAY)
    results = train(model, optimizer, mine, range(STEPS), grad_clip=CLIP)
    out["clipped"] = {"parameters": snapshot(model), "norms": [r.grad_norm for r in results]}
    out["early"] = begin_early(mine)
    out["in bf16"] = train_in_bf16(mine)
    out["skipping"] = skip_when_one_rank_overflows(mine, rank, world_size)
    out["collectives"] = collectives(rank, world_size)
    torch.save(out, folder / f"ranks_{world_size}_{rank}.pt")
    dist.destroy_process_group()


def begin_early(gradients):
    """Two backward passes a step, of which the second one's gradients leave while it runs, in the smallest buckets."""
    bucket_bytes, muon_adamw.BUCKET_BYTES = muon_adamw.BUCKET_BYTES, 0
    model, optimizer = toy_optimizer(config=NO_DECAY)
    n_buckets, begun = len(optimizer.early.buckets), []
    for step in range(STEPS):
        optimizer.zero_grad()
        for i in range(2):
            if i == 1:
                optimizer.expect_last_gradients()
            parts = [(p * (g / 2)).sum() for p, g in zip(model.parameters(), gradients(model, step))]
            torch.stack(parts).sum().backward()
        begun.append(sum(len(group.begun) for group in optimizer.groups))
        optimizer.step(1 - step / 10, 0.85 + step / 100, 1 - step / 20)
    muon_adamw.BUCKET_BYTES = bucket_bytes
    return {"parameters": snapshot(model), "begun": begun, "n_buckets": n_buckets, "state": optimizer.state_tensors()}


def train_in_bf16(gradients):
    model, optimizer = toy_optimizer(config=NO_DECAY, reduce_dtype=torch.bfloat16)
    train(model, optimizer, gradients, range(1))
    return {"parameters": snapshot(model), "dtype": {g.dtype for group in optimizer.groups for g in group.grads}}


def local_state_numbers(optimizer):
    """How many numbers of optimizer state live on this rank."""
    groups = optimizer.groups
    moments = [x for g in groups for x in (getattr(g, "exp_avg", []) + getattr(g, "exp_avg_sq", []))]
    return sum(x.numel() for x in moments) + sum(g.momentum.numel() for g in groups if hasattr(g, "momentum"))


def skip_when_one_rank_overflows(gradients, rank, world_size):
    """Every parameter in turn overflows on the last rank only; each time all ranks must skip."""
    model, optimizer = toy_optimizer()
    train(model, optimizer, gradients, range(1), inv_scale=1.0)
    before, skipped = snapshot(model), []
    for name, _ in model.named_parameters():
        set_gradients(model, gradients(model, 1))
        if rank == world_size - 1:
            getattr(model, name).grad.view(-1)[-1] = float("inf")
        skipped.append(optimizer.step(1.0, 0.9, 1.0, inv_scale=0.5).skipped)
    unchanged = all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    good = train(model, optimizer, gradients, range(1, 3), inv_scale=1.0)
    return {
        "all_skipped": all(skipped),
        "unchanged": unchanged,
        "then_good": not any(r.skipped for r in good),
        "parameters": snapshot(model),
        "steps": optimizer.steps,
    }


def collectives(rank, world_size):
    """Row counts below, at and above the number of ranks come back whole and averaged."""
    ranks, got = Ranks(), []
    for n in (1, 2, 3, 5, 6):
        x = torch.arange(n * 2.0).view(n, 2)
        rows = ranks.average_rows(x * (rank + 1))()
        whole = ranks.gather_rows(rows, n)()
        got.append(torch.allclose(whole, x * (world_size + 1) / 2) and rows.shape == x[ranks.share(n)].shape)
        place = torch.full_like(x, -1.0)
        place[ranks.share(n)] = x[ranks.share(n)]
        ranks.gather_into(place, place[ranks.share(n)])()
        got.append(torch.equal(place, x))
    small = ranks.average_all([torch.full((2, 2), float(rank)), torch.tensor(2.0 * rank)])()
    got.append(torch.equal(small[0], torch.full((2, 2), (world_size - 1) / 2)) and small[1] == world_size - 1)
    return got
