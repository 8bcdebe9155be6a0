"Training: whatever interrupts it, the same bytes; whatever goes wrong, a message that says so."
import math
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fsar.engine.checkpoints import CheckpointWarning, load_model, verified_record
from fsar.core.basics import FsarError, generator
from fsar.model.base import METHODS
from fsar.model.registry import create_model
from fsar.engine.training import _check_settings, is_due, run_step
from fsar.engine.optimisers import SCHEDULES, learning_rate, make_optimizer
from fsar.engine.journal import MetricsLog
from fsar.engine.devices import choose_device
from fsar.engine.run import prepare_run

from disks import small_disk
from toy_training import CLASSES, LONG, METHOD_NAMES, Episodes, Poisoned, child, ctrl_c, killed_at, run, settings, tiny, weights

@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    "An undisturbed training."
    out = tmp_path_factory.mktemp("reference")
    return out, run(out)


# ---- the pieces

@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_learning_rate(schedule, warmup):
    rates = [learning_rate(s, 50, lr=2.0, schedule=schedule, warmup=warmup) for s in range(50)]
    rising = math.ceil(warmup * 50)
    assert all(0 < r <= 2.0 for r in rates) and all(a >= b for a, b in zip(rates[rising:], rates[rising + 1:]))
    if rising: assert rates[0] == pytest.approx(2.0 / rising)
    if schedule == "step" and warmup < 0.5: assert rates[29:31] == pytest.approx([2.0, 0.2]) and rates[-1] == pytest.approx(0.02)


def test_unknown_schedule_and_optimizer():
    with pytest.raises(FsarError, match="unknown schedule 'linear'.*cosine"): learning_rate(0, 1, lr=1, schedule="linear")
    with pytest.raises(FsarError, match="unknown optimizer 'adan'. Did you mean 'adam'"): make_optimizer("adan", tiny(), lr=1)


def test_frozen_parameters_stay_out():
    model = tiny()
    model.backbone.requires_grad_(False)
    assert sum(len(g["params"]) for g in make_optimizer("adam", model, lr=1).param_groups) == 2  # the classifier's


def test_sgd_has_no_momentum(): assert make_optimizer("sgd", tiny(), lr=1).defaults["momentum"] == 0


def test_device():  # precision: test_memory.py
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(FsarError, match="device 'cuda:77' is not available here; accepted: auto, cpu"): choose_device("cuda:77")


@pytest.mark.parametrize("tasks, every, episodes", [(1, 1, 5), (2, 5, 24), (16, 40, 100), (7, 3, 20), (3, 1000, 10)])
def test_validation_comes_with_every_so_many_episodes_and_at_the_end(tasks, every, episodes):
    config, steps = settings(tasks_per_step=tasks, validate_every=every, episodes=episodes), math.ceil(episodes / tasks)
    due = [s for s in range(1, steps + 1) if is_due(config, s, steps)]
    expected = {min(steps, math.ceil(n / tasks)) for n in range(every, episodes + 1, every)} | {steps}
    assert due == sorted(expected)
    assert not any(is_due(settings(validate_every=0), s, 12) for s in range(1, 13))


def test_log_drops_what_lies_beyond_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "log.csv")
    for step in range(1, 21): log.write({"step": step, "loss": step / 3, "val": None})
    log.file.write("2"); log.close()  # half of line 21: it must not pass for line 2
    for last in (20, 7):
        MetricsLog(tmp_path / "log.csv", last).close()
        assert pd.read_csv(tmp_path / "log.csv")["step"].tolist() == list(range(1, last + 1))
    MetricsLog(tmp_path / "log.csv").close()
    assert (tmp_path / "log.csv").read_text() == ""


def test_a_step_is_the_mean_of_its_episodes():
    "Accumulated gradients against one backward through the mean loss, and clipping to a known norm."
    model, config = tiny(), settings(tasks_per_step=3, episodes=3, lr=1.0, optimizer="sgd", weight_decay=0.0, warmup=0.0, schedule="constant", clip_norm=0.01)
    model.backbone.body[3].p = 0.0
    twin = tiny()
    twin.backbone.body[3].p = 0.0
    twin.train()
    torch.stack([twin(Episodes()[i]).loss for i in range(3)]).mean().backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    row = run_step(prepare_run(config, model), iter(map(Episodes().__getitem__, range(3))), 0)
    assert row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for p, q in zip(model.parameters(), twin.parameters()): assert torch.allclose(p, q - q.grad, atol=1e-6)


# ---- a whole training

def test_it_learns_and_leaves_what_it_promises(reference):
    out, result = reference
    assert result.steps == 12 and not result.reused and result.best_folder == out / "best" and result.selection == "best accuracy on validation classes"
    assert result.history["step"].tolist() == list(range(1, 13)) and result.history["episodes"].iloc[-1] == 24
    assert {"lr", "loss", "loss_episode", "loss_class", "accuracy", "gradient_norm", "val_accuracy", "val_ci95", "seconds"} <= set(result.history)
    assert result.history["val_accuracy"].notna().to_numpy().nonzero()[0].tolist() == [3, 7, 11]
    assert result.best_accuracy == result.history["val_accuracy"].max()
    assert verified_record(out / "best")["metadata"]["accuracy"] == result.best_accuracy
    longer = run(out.parent / "longer", settings(episodes=160, validate_every=0))
    assert longer.history["loss"].tail(10).mean() < 0.8 * longer.history["loss"].head(10).mean()


def test_finished_is_reused_at_once(reference):
    out, _ = reference
    class Untouchable:
        def __getitem__(self, index): raise AssertionError("a finished training asks for no episode")
    start = time.perf_counter()
    again = run(out, settings(workers=2, test_episodes=50), episodes=Untouchable())
    assert again.reused and again.steps == 12 and time.perf_counter() - start < 2
    assert len(again.history) == 12


def test_a_setting_newer_than_a_training_counts_there_with_its_default():
    ours = {"lr": 0.1, "sampler": "", "data": "hash"}
    _check_settings(Path("out"), {"lr": 0.1, "data": "hash"}, ours)
    with pytest.raises(FsarError, match=r"sampler: '' there, 'vim' here"): _check_settings(Path("out"), {"lr": 0.1, "data": "hash"}, ours | {"sampler": "vim"})


def test_settings_of_another_training_are_refused(reference):
    out, _ = reference
    with pytest.raises(FsarError, match=r"holds a training with other settings \(lr: 0.005 there, 0.1 here\)"): run(out, settings(lr=0.1))
    with pytest.raises(FsarError, match=r"method: 'protonet' there, 'molo' here"): run(out, settings(method="molo"))


def test_the_data_is_a_setting_too(tmp_path):
    episodes = Episodes()
    episodes.store = SimpleNamespace(hash="one")
    run(tmp_path, settings(episodes=4), episodes=episodes)
    episodes.store = SimpleNamespace(hash="two")
    with pytest.raises(FsarError, match=r"data: 'one' there, 'two' here"): run(tmp_path, settings(episodes=4), episodes=episodes)


def test_neither_workers_nor_validation_nor_saving_change_the_weights(reference, tmp_path):
    out, _ = reference
    run(tmp_path / "workers", settings(workers=2))
    run(tmp_path / "blind", settings(validate_every=0), validate=None)
    run(tmp_path / "often", save_seconds=0)
    assert {weights(tmp_path / name) for name in ("workers", "blind", "often")} == {weights(out)}


def test_protocols(tmp_path):
    paper = run(tmp_path / "paper", settings(protocol="paper"))
    assert "TEST" in paper.selection and "TEST" in verified_record(paper.best_folder)["metadata"]["selection"]
    last = run(tmp_path / "last", settings(protocol="last"))
    assert last.best_folder == tmp_path / "last/last" and not (tmp_path / "last/best").exists() and "no selection" in last.selection
    with pytest.raises(FsarError, match="test_shots"): run(tmp_path / "paper", settings(protocol="paper", test_shots=(5,)))  # there it decides the weights


def test_early_stop(tmp_path):
    values = iter([0.5, 0.7, 0.7, 0.6, 0.6, 0.9])
    result = run(tmp_path, settings(patience=3, episodes=60), validate=lambda model: SimpleNamespace(accuracy=next(values), ci95=0.1))
    assert result.steps == 20 and result.best_accuracy == 0.7 and result.best_step == 8 and len(result.history) == 20
    assert run(tmp_path, settings(patience=3, episodes=60)).reused


def test_an_incomplete_last_step(tmp_path):
    result = run(tmp_path, settings(episodes=7, tasks_per_step=3))
    assert result.history["episodes"].tolist() == [3, 6, 7]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is optional")
    run(tmp_path)
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_loading_overlaps_computing(tmp_path, workers):
    "Each episode takes 60 ms to load (asleep) and each validation-free step 60 ms to compute (asleep): together clearly less than one after the other."
    class Slow(Episodes):
        def __getitem__(self, index): time.sleep(0.06); return super().__getitem__(index)
    marks = []
    run(tmp_path, settings(episodes=32, tasks_per_step=1, validate_every=0, workers=workers), episodes=Slow(),
        on_step=lambda step, row: (time.sleep(0.06), marks.append(time.perf_counter())))
    step = np.median(np.diff(marks[8:]))  # the median: other programs take the processor now and then
    alone = run(tmp_path / "alone", settings(episodes=32, tasks_per_step=1, validate_every=0)).seconds / 32
    assert step < 0.12 + alone - 0.03


# ---- interrupted and on

@pytest.mark.parametrize("steps", [(1,), (3, 4), (2, 5, 8, 11), (12,)])
@pytest.mark.parametrize("save_seconds", [0, 1000])
def test_ctrl_c(reference, tmp_path, steps, save_seconds):
    out, result = reference
    for step in steps:
        with pytest.raises(KeyboardInterrupt): run(tmp_path, on_step=ctrl_c(step), save_seconds=save_seconds)
    final = run(tmp_path)
    assert final.reused == (steps == (12,)) and weights(tmp_path) == weights(out) and weights(tmp_path, "best") == weights(out, "best")
    assert final.history.drop(columns="seconds").equals(result.history.drop(columns="seconds")) and final.best_accuracy == result.best_accuracy


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_resumes_exactly(method, precision, tmp_path):
    "With its own dropout and normalisation, from a checkpoint in the middle."
    config = settings(method=method, frames=3, size=16, short_side=16, episodes=3, tasks_per_step=1, validate_every=0, precision=precision, optimizer="adam")
    def new(): return create_model(method, backbone="resnet_micro", frames=3, classes=CLASSES)
    episodes = Episodes(frames=new().clip_frames, size=16, ways=2, queries=1)
    run(tmp_path / "straight", config, new(), episodes, None)
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "broken", config, new(), episodes, None, on_step=ctrl_c(2), save_seconds=0)
    run(tmp_path / "broken", config, new(), episodes, None)
    assert weights(tmp_path / "straight") == weights(tmp_path / "broken")
    assert load_model(tmp_path / "broken/last", expect_method=method).config["method"] == method


@pytest.fixture(scope="module")
def processes():
    "Children start from a clean process that has imported everything once."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy_training"])
    with pytest.MonkeyPatch.context() as environment:  # where the server finds it
        environment.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    "The training of a child that nobody kills, and how long it takes from the moment that it is ready."
    out, ready = tmp_path_factory.mktemp("undisturbed"), processes.Event()
    process = processes.Process(target=child, args=(out, ready))
    process.start(); ready.wait()
    start = time.perf_counter()
    process.join()
    assert process.exitcode == 0 and (out / "best.previous").exists()  # the best weights were replaced on the way
    return out, time.perf_counter() - start


def same_training(one, two):
    assert weights(one) == weights(two) and weights(one, "best") == weights(two, "best")
    logs = [pd.read_csv(out / "log.csv").drop(columns="seconds") for out in (one, two)]
    assert logs[0].equals(logs[1]) and len(logs[0]) == LONG.episodes // LONG.tasks_per_step


@pytest.mark.timeout(180)
def test_killed_at_ten_random_moments(processes, undisturbed, tmp_path):
    "SIGKILL, and now and then Ctrl-C, a random time after the start; saves come after every step, so that kills hit them too."
    out, seconds = undisturbed
    rng, codes, half_written = generator(11), [], 0
    while codes.count(0) == 0 and len(codes) < 10:
        ready = processes.Event()
        process = processes.Process(target=child, args=(tmp_path / "run", ready))
        process.start(); ready.wait()
        process.join(rng.uniform(0, 0.1) * seconds)
        if process.is_alive(): os.kill(process.pid, signal.SIGINT if len(codes) % 4 == 3 else signal.SIGKILL)
        process.join()
        codes.append(process.exitcode)
        half_written += (tmp_path / "run/last.partial").exists() or (tmp_path / "run/best.partial").exists()
    assert len(codes) == 10 and 0 not in codes, f"a child finished before it could be killed: {codes}"
    run(tmp_path / "run", LONG)
    print(f"exit codes {codes}; {half_written} kills left a half-written checkpoint")
    same_training(out, tmp_path / "run")


@pytest.mark.timeout(240)
def test_killed_at_every_file_operation(processes, undisturbed, tmp_path):
    "Start, log, best, state: a kill before each of the first sixty file operations of a process, one after the other in one folder."
    out, _ = undisturbed
    for count in range(60):
        process = processes.Process(target=killed_at, args=(tmp_path / "run", count))
        process.start(); process.join()
        assert process.exitcode == -signal.SIGKILL
    process = processes.Process(target=child, args=(tmp_path / "run",))
    process.start(); process.join()
    assert process.exitcode == 0
    same_training(out, tmp_path / "run")


def test_a_damaged_state_costs_time_and_no_bits(reference, tmp_path):
    out, _ = reference
    with pytest.raises(KeyboardInterrupt): run(tmp_path, on_step=ctrl_c(7), save_seconds=0)
    os.truncate(tmp_path / "last/optimizer.safetensors", 100)
    with pytest.warns(CheckpointWarning, match="last/optimizer.safetensors is damaged.*the previous checkpoint is used instead"): run(tmp_path)
    assert weights(tmp_path) == weights(out) and (tmp_path / "last.damaged").exists()


def test_two_damaged_states_stop(tmp_path):
    with pytest.raises(KeyboardInterrupt): run(tmp_path, on_step=ctrl_c(7), save_seconds=0)
    for name in ("last", "last.previous"): os.truncate(tmp_path / name / "model.safetensors", 100)
    with pytest.raises(FsarError, match="no usable checkpoint in .*last.*damaged.*and the one before it.*damaged"): run(tmp_path)


# ---- what goes wrong

def test_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(KeyboardInterrupt): run(tmp_path / "sound", on_step=ctrl_c(4), save_seconds=0, validate=None)
    with pytest.raises(FsarError, match=r"training stopped at step 4: not finite in episode 9 \(loss = nan, loss_episode = nan") as caught:
        run(tmp_path / "run", episodes=Poisoned(), save_seconds=0, validate=None)
    evidence = tmp_path / "run/nonfinite"
    assert str(evidence) in str(caught.value) and "smaller lr" in str(caught.value)
    assert sorted(p.name for p in evidence.iterdir()) == ["episode_9.safetensors", "model", "values.json"]
    from safetensors.torch import load_file
    assert load_file(evidence / "episode_9.safetensors")["query"].isnan().any()
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "sound/last", evidence / "model"))
    assert all(torch.equal(before[k], after[k]) for k in before if "running" not in k and "num_batches" not in k)  # the step was not taken
    with pytest.raises(FsarError, match="episode 9"): run(tmp_path / "run", episodes=Poisoned(), validate=None)  # and again


def test_a_gradient_that_is_not_finite(tmp_path):
    "A finite loss may have an infinite slope: the square root at zero."
    class Steep(METHODS["protonet"]):
        def losses(self, episode, support, query, logits): return {"root": (1.0, (support["frames"] * 0).sum().sqrt())}
    model = Steep(tiny().backbone, frames=2)
    model.config = {"method": "steep"}
    with pytest.raises(FsarError, match=r"not finite in episode 0, 1 \(gradient_norm = nan\)"): run(tmp_path, model=model)


def test_full_disk_while_training(reference, tmp_path):
    "It stops with the reason; with room again it goes on to the same bytes."
    with small_disk(tmp_path / "disk", "size=200k") as disk:
        def fill(step, row):
            if step == 6: (disk / "filler").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 8192))
        with pytest.raises(FsarError, match=r"cannot write .*/run/(last|best|log.csv): no space left on the disk"):
            run(disk / "run", save_seconds=0, on_step=fill)
        (disk / "filler").unlink()
        run(disk / "run")
        assert weights(disk / "run") == weights(reference[0])


def test_file_size_limit_while_training(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(FsarError, match=r"cannot write .*/run/last: the file grows beyond the allowed size"): run(tmp_path / "run", save_seconds=0)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_read_only_output(tmp_path):
    with small_disk(tmp_path / "disk", "size=200k,ro") as disk:
        with pytest.raises(FsarError, match=r"cannot write .*/disk/run: the file system is read-only"): run(disk / "run")


def test_a_file_where_the_output_should_be(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(FsarError, match=r"cannot write .*/run"): run(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


# ---- several processes (more: test_processes.py)

def test_processes_must_share_evenly():
    from fsar.engine.run import _check_even_shares
    with pytest.raises(FsarError, match=r"3 processes share the episodes of a step: tasks_per_step \(4\)"): _check_even_shares(settings(tasks_per_step=4), 3)
