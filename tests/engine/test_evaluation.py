"Evaluation: every video embedded once, batches equal to a loop, intervals and comparisons that are what they say."
import json, math, time
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from fsar.data.augment import TestTransform
from fsar.core.basics import FsarError, generator
from fsar.data.episodes import EpisodeSampler, EpisodeTable, VideoClips, episode_table
from fsar.engine.evaluation import Evaluator, embed_videos, evaluate, predict_episodes
from fsar.engine.results import Result, across_seeds, compare, mean_ci95, summarise
from fsar.model.base import METHODS, FewShotModel
from fsar.model.blocks import class_mean
from fsar.model.registry import create_model

ROWS = np.arange(40)


def index(classes=8, count=5):
    return pd.DataFrame([{"video": f"{c}/{v}", "class": f"class {c}", "split": "test", "source": f"{c}/{v}"} for c in range(classes) for v in range(count)])


def make_table(episodes=50, ways=5, shots=1, queries=2, seed=0, **kwargs):
    return episode_table(EpisodeSampler(index(), "test", ways=ways, shots=shots, queries=queries, seed=seed, **kwargs), episodes)


def noise(*shape, key=0): return torch.from_numpy(generator(key).normal(size=shape)).float()


class Pixels:
    "Videos of random pixels that count how often each is read."
    def __init__(self, rows, frames=4, size=32): self.rows, self.frames, self.size, self.read = np.asarray(rows), frames, size, Counter()
    def __len__(self): return len(self.rows)
    def __getitem__(self, k):
        row = int(self.rows[k])
        self.read[row] += 1
        return torch.from_numpy(generator(row).integers(0, 256, (self.frames, 3, self.size, self.size), dtype=np.uint8))


class Two(FewShotModel):
    "Two named tensors of different shapes, from any floats: what a method with two branches looks like to the evaluation."
    def __init__(self): torch.nn.Module.__init__(self); self.calls = []
    def embed(self, clips):
        self.calls.append(len(clips))
        x = clips.float().mean((3, 4))
        return {"frames": x, "motion": x.diff(dim=1)}
    def score(self, support, labels, query, ways):
        return -sum(torch.cdist(query[k].flatten(-2), class_mean(support[k].flatten(-2), labels, ways)) for k in support)


# ---- each video once

@pytest.mark.parametrize("batch_size, workers", [(1, 0), (7, 0), (64, 0), (7, 2)])
def test_each_video_is_embedded_exactly_once_in_order(batch_size, workers):
    model, clips = Two(), Pixels(range(100, 130))
    embedding = embed_videos(model, clips, batch_size=batch_size, workers=workers, progress=False)
    assert sum(model.calls) == 30 and max(model.calls) <= batch_size
    if not workers: assert clips.read == Counter(range(100, 130))  # a worker counts in its own process
    assert torch.allclose(embedding["frames"], torch.stack([clips[k] for k in range(30)]).float().mean((3, 4)))
    assert embedding["motion"].shape == (30, 3, 3)


def test_a_test_of_many_episodes_decodes_each_video_once(tiny_store, monkeypatch):
    table = episode_table(EpisodeSampler(tiny_store, "test", ways=5, shots=1, queries=2, seed=0), 500)
    model, read, frames = Two(), Counter(), type(tiny_store).frames
    monkeypatch.setattr(type(tiny_store), "frames", lambda self, row, indices: (read.update([row]), frames(self, row, indices))[1])
    result = Evaluator(VideoClips(tiny_store, table.rows, frames=4, transform=TestTransform(32)), table)(model)
    assert read == Counter(table.rows.tolist()) and sum(model.calls) == len(table.rows)
    assert result.episodes == 500 and result.class_names == tuple(tiny_store.classes("test"))


def test_a_test_leaves_modes_and_random_state_alone():
    model = create_model("protonet", backbone="resnet_micro", frames=4).train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    modes, state, weights = [m.training for m in model.modules()], torch.random.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    embedding = embed_videos(model, Pixels(ROWS), progress=False)
    evaluate(model, embedding, make_table(), row_to_position=ROWS)
    assert [m.training for m in model.modules()] == modes and not frozen.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())  # running statistics of batch normalisation too


def test_half_precision_embeds_to_float32():
    model = create_model("protonet", backbone="resnet_micro", frames=4)
    full, half = (embed_videos(model, Pixels(range(4)), precision=p, progress=False)["frames"] for p in ("fp32", "bf16"))
    assert half.dtype == torch.float32 and not torch.equal(full, half) and torch.allclose(full, half, rtol=0.1, atol=0.1 * full.abs().max().item())


# ---- batches of episodes

@pytest.mark.parametrize("shots", [1, 3, (1, 3)], ids=str)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_batches_equal_an_episode_at_a_time(method, shots):
    model = create_model(method, backbone="resnet_micro", frames=4).eval()
    embedding = embed_videos(model, Pixels(ROWS, model.clip_frames), progress=False)
    table = make_table(30, shots=shots)
    predicted = predict_episodes(model, embedding, table, row_to_position=ROWS)
    for e in range(len(table)):
        episode = table[e]
        support, query = ({k: x[torch.from_numpy(rows).long()] for k, x in embedding.items()} for rows in (episode.support, episode.query))
        labels = torch.from_numpy(episode.support_labels).long()
        with torch.inference_mode(): logits = model.score(*_adapted(model, support, labels, query), 5)
        top = logits.sort(-1).values
        clear = (top[:, -1] - top[:, -2] > 1e-4 * logits.abs().max()).numpy()  # elsewhere rounding decides
        assert np.array_equal(predicted[e][clear], logits.argmax(-1).numpy()[clear])


def _adapted(model, support, labels, query):
    support, query = model.adapt(support, labels, query)
    return support, labels, query


def test_the_size_of_a_batch_changes_nothing():
    embedding, table = {"frames": noise(40, 4, 16), "motion": noise(40, 3, 16, key=1)}, make_table(101, shots=(1, 3))
    results = [evaluate(Two(), embedding, table, row_to_position=ROWS, batch_size=n) for n in (1, 8, 100, 1000, None)]
    assert len({r.correct.tobytes() for r in results}) == 1


def test_rows_of_the_store_find_their_place_in_any_order():
    embedding, table = {"frames": noise(40, 4, 16), "motion": noise(40, 3, 16)}, make_table()
    order = generator(5).permutation(40)
    places = np.empty(40, int); places[order] = ROWS
    shuffled = evaluate(Two(), {k: x[torch.from_numpy(order)] for k, x in embedding.items()}, table, row_to_position=places)
    assert np.array_equal(shuffled.correct, evaluate(Two(), embedding, table, row_to_position=ROWS).correct)


def test_ten_thousand_one_shot_episodes_in_seconds():
    big = index(24, 100)
    table = episode_table(EpisodeSampler(big, "test", ways=5, shots=1, queries=1, seed=0), 10_000)
    model = create_model("molo" if "molo" in METHODS else "otam", backbone="resnet_micro", frames=8).eval()
    names = model.embed(torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8))
    embedding = {k: noise(2400, *x.shape[1:]) for k, x in names.items()}  # T = 8, C = 128
    start = time.process_time()
    result = evaluate(model, embedding, table, row_to_position=np.arange(2400))
    assert time.process_time() - start < 20
    assert abs(result.accuracy - 0.2) < 0.02  # noise knows nothing


# ---- the numbers

def test_accuracy_interval_and_confusion_by_hand():
    table = make_table(2, ways=2, shots=1, queries=2)
    predicted = table.query_labels.copy()
    predicted[0, 0] = 1  # way 0 taken for way 1
    result = summarise(predicted, table)
    assert result.correct.tolist() == [0.75, 1.0] and result.accuracy == 0.875
    assert result.ci95 == pytest.approx(1.96 * math.sqrt(2 * 0.125**2) / math.sqrt(2))
    one, two = table.classes[0]
    wanted = np.zeros((8, 8), int)
    for c in table.classes.ravel(): wanted[c, c] += 2
    wanted[one, one] -= 1; wanted[one, two] += 1
    assert np.array_equal(result.confusion, wanted)
    assert result.per_class == {f"class {c}": wanted[c, c] / wanted[c].sum() for c in range(8) if wanted[c].sum()}
    assert (result.episodes, result.ways, result.shots, result.queries, result.seed, result.chance) == (2, 2, 1, 2, 0, 0.5)


def test_a_result_reads_well_and_survives_json():
    result = evaluate(Two(), {"frames": noise(40, 4, 16), "motion": noise(40, 3, 16)}, make_table(shots=(1, 3)), row_to_position=ROWS)
    assert result.task == "5-way 1–3-shot" and str(result) == f"{100 * result.accuracy:.1f} ± {100 * result.ci95:.1f} % (chance 20.0 %)"
    text = json.dumps(result.to_dict(), allow_nan=False)
    back = Result.from_dict(json.loads(text))
    assert json.dumps(back.to_dict()) == text and back.shots == (1, 3) and np.array_equal(back.confusion, result.confusion)
    with pytest.raises(FsarError, match="ci95"): Result.from_dict({k: v for k, v in result.to_dict().items() if k != "ci95"})


def test_the_interval_covers_the_truth_nineteen_times_in_twenty():
    draws = generator(6).binomial(25, 0.6, size=(2000, 200)) / 25
    held = np.mean([abs(mean - 0.6) <= ci for mean, ci in map(mean_ci95, draws)])
    assert 0.93 < held < 0.97


def result_of(correct, table_hash="same"):
    mean, ci95 = mean_ci95(np.asarray(correct, float))
    return Result(mean, ci95, np.asarray(correct, float), {}, np.zeros((0, 0), int), (), "test", len(correct), 5, 1, 5, 0, table_hash)


def test_a_paired_comparison_by_hand():
    gap = compare(result_of([0.6, 0.8, 1.0, 0.4]), result_of([0.4, 0.8, 0.6, 0.2]), ("molo", "otam"))
    difference = np.array([0.2, 0, 0.4, 0.2])
    assert gap.difference == pytest.approx(0.2) and gap.ci95 == pytest.approx(1.96 * difference.std(ddof=1) / 2)
    z = 0.2 / (difference.std(ddof=1) / 2)
    assert gap.p_value == pytest.approx(math.erfc(z / math.sqrt(2))) and gap.differs and "molo is better" in str(gap)
    back = compare(result_of([0.4, 0.8, 0.6, 0.2]), result_of([0.6, 0.8, 1.0, 0.4]), ("otam", "molo"))
    assert back.difference == pytest.approx(-gap.difference) and back.p_value == pytest.approx(gap.p_value) and "molo is better" in str(back)
    json.dumps(gap.to_dict(), allow_nan=False)


def test_noise_is_called_noise():
    rng = generator(7)
    base = rng.binomial(25, 0.6, 500) / 25
    wrong = sum(compare(result_of(base + rng.normal(0, 0.1, 500)), result_of(base + rng.normal(0, 0.1, 500))).differs for _ in range(400))
    assert 8 <= wrong <= 35  # 5 % of 400, give or take
    assert "inside the noise" in str(compare(result_of(base), result_of(base))) and compare(result_of(base), result_of(base)).p_value == 1.0
    assert compare(result_of(base + 0.1), result_of(base)).differs  # better in every single episode, by the same


def test_pairing_takes_out_what_both_find_hard():
    rng = generator(8)
    hard = rng.normal(0.5, 0.2, 1000)
    a, b = (result_of(hard + rng.normal(shift, 0.05, 1000)) for shift in (0.01, 0))
    assert compare(a, b).ci95 < 0.5 * math.hypot(a.ci95, b.ci95) and compare(a, b).differs


def test_only_the_same_episodes_are_compared():
    embedding = {"frames": noise(40, 4, 16), "motion": noise(40, 3, 16)}
    one, two = (evaluate(Two(), embedding, make_table(seed=s), row_to_position=ROWS) for s in (0, 1))
    with pytest.raises(FsarError, match="different episodes"): compare(one, two)
    with pytest.raises(FsarError, match="different episodes"): across_seeds([one, two])
    assert across_seeds([result_of([0.5, 0.5]), result_of([0.7, 0.7])]).std == pytest.approx(np.std([0.5, 0.7], ddof=1))


def test_every_method_answers_the_same_episodes(tmp_path):
    table = make_table()
    table.save(tmp_path / "episodes.safetensors")
    again = EpisodeTable.load(tmp_path / "episodes.safetensors", index())
    embedding = {"frames": noise(40, 4, 16)}
    hashes = {evaluate(create_model(m, backbone="resnet_micro"), embedding, t, row_to_position=ROWS).table_hash for m, t in [("protonet", table), ("otam", again)]}
    assert hashes == {table.hash}


# ---- what mean pooling cannot see

def test_mean_pooling_cannot_tell_a_video_from_its_reverse():
    paths = noise(4, 8, 32).cumsum(1)
    clips = torch.stack([paths, paths.flip(1)], 1).flatten(0, 1).repeat_interleave(5, 0) + noise(40, 8, 32, key=1)
    table = make_table(600, ways=2, pairs=[(f"class {c}", f"class {c + 1}") for c in (0, 2, 4, 6)])
    protonet, otam = (evaluate(create_model(m, backbone="resnet_micro"), {"frames": clips}, table, row_to_position=ROWS) for m in ("protonet", "otam"))
    assert abs(protonet.accuracy - 0.5) < 0.06 and otam.accuracy > 0.8


# ---- errors

def test_errors_say_what_is_wrong():
    embedding = {"frames": noise(40, 4, 16), "motion": noise(40, 3, 16)}
    with pytest.raises(FsarError, match="videos that were not embedded, the lowest is row 3 "):
        evaluate(Two(), embedding, make_table(), row_to_position=np.where(ROWS >= 30, -1, ROWS)[:3])
    with pytest.raises(FsarError, match="at least two episodes"): evaluate(Two(), embedding, make_table(1), row_to_position=ROWS)
    embedding["frames"][7] = torch.nan
    with pytest.raises(FsarError, match="logits are not finite"): evaluate(Two(), embedding, make_table(), row_to_position=ROWS)


def test_broken_weights_are_noticed_while_embedding():
    model = create_model("protonet", backbone="resnet_micro", frames=4)
    with torch.no_grad(): next(model.parameters()).fill_(torch.nan)
    with pytest.raises(FsarError, match="'frames' is not finite for row 105"): embed_videos(model, Pixels(range(105, 110)), progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_gpu_gives_the_same_answers(method):
    model, table, found = create_model(method, backbone="resnet_micro", frames=4), make_table(200, shots=(1, 3)), {}
    for device in ("cpu", "cuda"):
        embedding = embed_videos(model, Pixels(ROWS, model.clip_frames), device=device, progress=False)
        assert all(x.device.type == device for x in embedding.values())
        found[device] = evaluate(model, embedding, table, row_to_position=ROWS).accuracy
    assert found["cpu"] == pytest.approx(found["cuda"], abs=0.02)
