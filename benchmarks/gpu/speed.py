"""Seconds and memory of training steps, each way; what runs in them; what compiling gives."""

import gc
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import Bench, K, N, rates, row
from benchmarks.rounds import Row
from benchmarks.steps import Steps
from trainer.data.loader import Batch, pinned
from trainer.engine import apply_update, train_micro_batch
from trainer.evaluate import evaluate
from trainer.options import PROTOCOLS
from trainer.weights.masks import Masked
from trainer.weights.scores import count_of, drawn
from trainer.weights.subnetwork import Subnetwork, prunable

TOKENS = (196, 98, 144, 49)  # all patches first: the others are compared with it
RATES = {0.9: 144, 0.75: 84}
PROFILED, LONGEST = 5, 10


def steps(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """Rate and memory of the trainer's step by K, in bfloat16."""
    for name, batch in bench.size.models:
        model = bench.steps(name, batch)
        whole, memory = 0.0, 0.0
        for tokens in TOKENS:
            laps = bench.timed(model.ours(tokens))
            used = memory_a_view(bench, model, tokens)
            what = f"{name}, K = {tokens}"
            yield rates(what, batch, laps)
            if used:
                yield row(f"{what}: memory a view", used / 1e6, unit="MB")
            if tokens == N:
                whole, memory = statistics.median(laps), used
                continue
            promised = model.macs(N) / model.macs(tokens)
            gained = whole / statistics.median(laps)
            yield row(f"{what}: speed-up over K = {N}, share of what MACs promise", gained / promised)
            if used:
                beyond = used / memory - (tokens + 1) / (N + 1)
                yield row(f"{what}: memory a view over K = {N}, beyond the share of tokens", beyond)


def memory_a_view(bench: Bench, model: Steps, tokens: int) -> float:
    """Bytes that a view more adds to a step's peak; 0 where torch does not count them."""
    if bench.device.type != "cuda":
        return 0.0
    few, many = (peak(bench, model, tokens, views) for views in (model.batch // 2, model.batch))
    return (many - few) / (model.batch - model.batch // 2)


def peak(bench: Bench, model: Steps, tokens: int, views: int) -> int:
    """Bytes allocated at most in a step, above those before it."""
    step = model.ours(tokens, views)
    bench.wait()
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    step()
    bench.wait()
    return torch.cuda.max_memory_allocated(bench.device) - before


def rivals(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """Ours against the paper's selector in every step, timm's patch_drop_rate, and all patches."""
    for name, batch in bench.size.models[:2]:
        model = bench.steps(name, batch)
        teacher: Any = timm.create_model(f"{name}_patch16_224").eval().to(bench.device)
        dense = bench.timed(model.dense())
        yield rates(f"{name}, dense", batch, dense)
        for rate, tokens in RATES.items():
            ours, theirs = bench.timed(model.ours(tokens)), bench.timed(model.in_step(teacher, rate))
            what = f"{name}, K = {tokens}: against the selector in the step, r = {rate}"
            yield row(what, statistics.median(theirs) / statistics.median(ours))
        ours, theirs = bench.timed(model.ours(K)), bench.timed(model.patch_drop(K))
        ratio = statistics.median(theirs) / statistics.median(ours)
        yield row(f"{name}, K = {K}: against timm's patch_drop_rate", ratio)
        ratio = statistics.median(dense) / statistics.median(ours)
        yield row(f"{name}, K = {K}: against timm dense", ratio)


def masks(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """What it costs to hold four matrices a block at their zeros: gradients before the update, weights after it."""
    name, batch = bench.size.models[0]
    model = bench.steps(name, batch)
    shapes = prunable(model.model)
    kept = drawn(shapes, count_of(sum(map(math.prod, shapes.values())), 0.8), "benchmark")
    hook, tickets = Masked(Subnetwork(kept), model.model), model.tickets(K)

    def masked() -> None:
        train_micro_batch(model.state, tickets, model.setup, 0, 0)
        apply_update(model.state, model.setup, 0, partial(hook.before_update, None), partial(hook.after_update, None))

    plain = bench.timed(model.ours(K))
    cost = statistics.median(bench.timed(masked)) / statistics.median(plain)
    yield row(f"{name}, K = {K}: weight masks against none", cost, against=f"{len(kept)} matrices")


def kernels(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """Where the host waits for the device in a step, how long the device works in it, and with what."""
    for name, batch in bench.size.models[:2]:
        model = bench.steps(name, batch)
        tickets = host_batch(bench, model)
        step = partial(model.train, tickets)
        laps = bench.timed(step)
        if bench.device.type == "cuda":
            places = waits(partial(model.train, tickets))
            yield row(f"{name}, K = {K}: waits of the host in a step", len(places), unit="waits")
            notes += [f"kernels: {name}: the host waits at {place}" for place in sorted(set(places))]
        yield from tested(bench, model)
        longest, total = profiled(bench, step)
        share = total / statistics.median(laps)
        yield row(f"{name}, K = {K}: share of a step that the device works", share)
        notes += [f"kernels: {name}: {100 * spent / total:.1f} % {key[:90]}" for key, spent in longest]


def host_batch(bench: Bench, model: Steps) -> Batch:
    """As it comes from the loader."""
    batch = {name: tensor.cpu() for name, tensor in model.tickets(K).items()}
    return pinned(batch) if bench.device.type == "cuda" else batch


def tested(bench: Bench, model: Steps) -> Iterator[Row]:
    """Validation under its three protocols: its rate, and where the host waits but for the figures at the end."""
    rows = model.batch
    batch = {"patches": model.patches, "rankings": model.order, "labels": model.targets["labels"]}
    batch = {name: tensor.cpu() for name, tensor in batch.items()} | {"positions": torch.arange(rows)}
    batch = pinned(batch) if bench.device.type == "cuda" else batch

    def test(batches: int) -> None:
        evaluate({"": model.state.student}, [{**batch} for _ in range(batches)], PROTOCOLS, K, rows, model.setup)

    what = f"{model.name}, K = {K}"
    test(1)
    yield rates(f"{what}: validation, three protocols", 3 * rows, [bench.seconds(lambda: test(3)) / 3])
    if bench.device.type == "cuda":
        more = len(waits(lambda: test(3))) - len(waits(lambda: test(1)))
        yield row(f"{what}: waits of the host in a batch of validation", more / 2, unit="waits")
    model.model.train()


def waits(action: Callable[[], Any]) -> list[str]:
    """File and line of every operation for which the host waits."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in seen if "called a synchronizing" in str(warning.message)]
    return [f"{'/'.join(warning.filename.split('/')[-2:])}:{warning.lineno}" for warning in found]


def profiled(bench: Bench, step: Callable[[], Any]) -> tuple[list[tuple[str, float]], float]:
    """The kernels that take longest in a step, and all together, in seconds; on a CPU, operators."""
    cuda, count = bench.device.type == "cuda", min(PROFILED, bench.size.laps)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(count):
            step()
        bench.wait()
    spent = {
        event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / count
        for event in seen.key_averages()
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)
    }
    if not spent:
        raise RuntimeError("the profiler saw no kernels")
    return sorted(spent.items(), key=lambda item: -item[1])[:LONGEST], sum(spent.values())


def ddp(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """One process among one: the process group of a GPU, a sum, and a step."""
    name, batch = bench.size.models[0]
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(bench.device)
    place = {"init_method": f"file://{bench.work / 'group'}", "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("nccl" if cuda else "gloo", **place)
    try:
        summand = torch.ones(1000, device=bench.device)
        torch.distributed.all_reduce(summand)
        yield row("values of a sum over one rank that changed", (summand != 1).sum(), unit="values")
        model = bench.steps(name, batch // 2)
        tickets, state = model.tickets(K), model.state
        alone = train_micro_batch(state, tickets, model.setup, 0, 0)
        state.optimizer.zero_grad()
        together = DistributedDataParallel(state.student, device_ids=[bench.device.index] if cuda else None)
        loss = train_micro_batch(replace(state, model=together), tickets, model.setup, 0, 0)
        apply_update(state, model.setup, 0)
        worst = 1e6 * abs(float(loss - alone)) / float(alone)
        yield row("loss under DistributedDataParallel against without", worst, unit="ppm")
        del together
    finally:
        gc.collect()  # the group joins its threads only when nothing refers to it
        torch.distributed.destroy_process_group()


def compiled(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """torch.compile as --torchcompile does it: the first step, its rate, and another K."""
    from torch._dynamo.utils import counters

    name, batch = next(((name, batch) for name, batch in bench.size.models if name == "deit_tiny"))
    model = bench.steps(name, batch)
    eager = bench.timed(model.ours(K))
    model.state.model = torch.compile(model.state.student, backend=bench.size.backend)
    for tokens in (K, 144, 49):
        step, before = model.ours(tokens), counters["stats"]["unique_graphs"]
        what = f"{name}, K = {tokens}"
        yield row(f"{what}: first step", bench.seconds(step), unit="s")
        yield row(f"{what}: graphs compiled", counters["stats"]["unique_graphs"] - before, unit="graphs")
        laps = bench.timed(step)
        yield rates(f"{what}, compiled", batch, laps)
        if tokens == K:
            yield row(f"{what}: compiled against eager", statistics.median(eager) / statistics.median(laps))
