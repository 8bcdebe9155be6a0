"Episodes: a pure function of (seed, epoch, index), never one source on both sides, the same for any number of workers."
import itertools, time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from fsar.data.augment import TestTransform, TrainTransform
from fsar.core.basics import FsarError, generator
from fsar.data.episodes import (EpisodeClips, EpisodeSampler, EpisodeTable, VideoClips, class_pool, draw, draw_episode, episode_loader, episode_table, separable)
from fsar.data.video import segment_indices


def videos(classes="abcdef", count=12, recordings=None, split="test"):
    "A table of `count` videos a class; with `recordings`, so many sources a class."
    return pd.DataFrame([{"video": f"{c}/{v}", "class": c, "split": split, "source": f"{c}/{v % recordings if recordings else v}"}
                         for c in classes for v in range(count)])


def same(a, b): return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in ("classes", "support", "support_labels", "query", "query_labels"))


# ---- dealing sources out to two sides

def test_separable_agrees_with_trying_every_set_of_sources():
    rng = generator(1)
    for _ in range(300):
        sizes = rng.integers(1, 6, size=rng.integers(1, 7)).tolist()
        shots, queries = rng.integers(1, 8, size=2)
        brute = any(shots <= sum(side) <= sum(sizes) - queries for n in range(len(sizes) + 1) for side in itertools.combinations(sizes, n))
        assert separable(0, sizes, shots, queries) == brute, (sizes, shots, queries)
        assert separable(sizes[0], sizes[1:], shots, queries) == any(
            shots <= sizes[0] + sum(side) <= sum(sizes) - queries for n in range(len(sizes)) for side in itertools.combinations(sizes[1:], n))


def test_draw_succeeds_wherever_it_is_possible():
    rng, tight = generator(2), 0
    for case in range(400):
        sizes = rng.integers(1, 6, size=rng.integers(2, 7))
        sources = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        shots, queries = map(int, rng.integers(1, 7, size=2))
        if not separable(0, sizes.tolist(), shots, queries): continue
        tight += shots + queries == len(sources)
        support, query = draw(sources, shots, queries, generator(3, case))
        assert len(set(support)) == shots and len(set(query)) == queries
        assert not set(sources[support]) & set(sources[query])
    assert tight > 3  # cases without any slack were among them


def test_no_video_is_favoured():
    sources = np.arange(12) // 2
    count = np.zeros((2, 12))
    for i in range(6000):
        for side, drawn in enumerate(draw(sources, 2, 3, generator(4, i))): count[side, drawn] += 1
    assert abs(count[0] - 1000).max() < 150 and abs(count[1] - 1500).max() < 180  # five standard deviations


# ---- the sampler

@pytest.mark.parametrize("ways, shots, queries", [(1, 1, 1), (5, 1, 5), (5, 5, 1), (6, 4, 8), (2, (1, 4), 3)])
def test_an_episode_is_what_it_says(ways, shots, queries):
    table = videos()
    sampler = EpisodeSampler(table, "test", ways=ways, shots=shots, queries=queries, seed=0)
    low, high = (shots, shots) if isinstance(shots, int) else shots
    for e in map(sampler, range(50)):
        names = [sampler.pool.names[c] for c in e.classes]
        assert len(set(names)) == ways and len(set(e.rows)) == len(e.rows)
        assert table["class"].iloc[e.support].tolist() == [names[k] for k in e.support_labels]
        assert table["class"].iloc[e.query].tolist() == [names[k] for k in e.query_labels]
        counts = np.bincount(e.support_labels, minlength=ways)
        assert counts.min() >= low and counts.max() <= high
        assert np.bincount(e.query_labels, minlength=ways).tolist() == [queries] * ways


def test_pure_function_of_seed_epoch_index():
    def make(seed): return EpisodeSampler(videos(), "test", ways=3, shots=1, queries=2, seed=seed)
    a, b = make(5), make(5)
    forwards = [a(i, epoch=1) for i in range(6)]
    for i in reversed(range(6)): assert same(forwards[i], b(i, epoch=1))  # whatever was asked before
    assert not same(a(0), a(1)) and not same(a(0, 0), a(0, 1)) and not same(make(5)(0), make(6)(0))


def test_global_random_state_is_neither_read_nor_moved():
    sampler = EpisodeSampler(videos(), "test", ways=3, shots=1, queries=2, seed=0)
    np.random.seed(1); first = sampler(0); state = np.random.get_state()[1].copy()
    np.random.seed(2)
    assert same(first, sampler(0))
    np.random.seed(1); sampler(0)
    assert np.array_equal(np.random.get_state()[1], state)


def test_rows_of_other_splits_are_never_drawn():
    table = pd.concat([videos(split="train"), videos("ghi", split="val")], ignore_index=True)
    sampler = EpisodeSampler(table, "val", ways=3, shots=1, queries=1, seed=0)
    assert sampler.pool.names == ("g", "h", "i")
    assert all((table["split"].iloc[sampler(i).rows] == "val").all() for i in range(20))


@pytest.mark.parametrize("recordings", [2, 3, 5])
def test_support_and_query_never_share_a_source(recordings):
    table = videos(recordings=recordings)
    sampler = EpisodeSampler(table, "test", ways=5, shots=3, queries=4, seed=0)
    source = table["source"].to_numpy()
    assert all(not set(source[e.support]) & set(source[e.query]) for e in map(sampler, range(200)))


def test_blind_episodes_meet_a_source_as_often_as_expected_and_never_a_video_twice():
    table = videos(recordings=4)                                       # 4 recordings of 3 videos: 2 of the 11 others share a query's
    source = table["source"].to_numpy()
    met = {}
    for shots in (1, 3):
        blind, apart = (EpisodeSampler(table, "test", ways=5, shots=shots, queries=4, seed=0, apart=on) for on in (False, True))
        drawn = [blind(i) for i in range(1500)]
        assert all(len(set(e.rows)) == len(e.rows) for e in drawn)
        assert not any(set(source[e.support]) & set(source[e.query]) for e in map(apart, range(200)))
        met[shots] = np.mean([source[q] in source[e.support] for e in drawn for q in e.query])  # sources are a class's own here
    assert abs(met[1] - 2 / 11) < 0.015 and abs(met[3] - (1 - 9 * 8 * 7 / (11 * 10 * 9))) < 0.015


def test_blind_draws_are_those_of_a_table_without_sources():
    "And so those of any table whose videos are all from sources of their own, whether blind or not."
    def make(table, on): return EpisodeSampler(table, "test", ways=4, shots=(1, 3), queries=2, seed=3, apart=on)
    samplers = [make(videos(recordings=3), False), make(videos(), False), make(videos(), True)]
    assert all(same(samplers[0](i), s(i)) for s in samplers[1:] for i in range(50))


def test_one_seed_asks_blind_and_apart_the_same_but_for_those_who_give_way():
    table = videos(recordings=4)
    source = table["source"].to_numpy()
    blind, apart = (EpisodeSampler(table, "test", ways=3, shots=1, queries=4, seed=0, apart=on) for on in (False, True))
    for b, a in ((blind(i), apart(i)) for i in range(100)):
        assert np.array_equal(b.classes, a.classes) and np.array_equal(b.support, a.support)
        for way in range(3):
            asked = b.query[b.query_labels == way]
            clear = asked[source[asked] != source[b.support[way]]]
            assert np.array_equal(a.query[a.query_labels == way][:len(clear)], clear)


def test_blind_classes_need_videos_and_no_sources():
    EpisodeSampler(videos(recordings=1), "test", ways=5, shots=7, queries=5, seed=0, apart=False)
    with pytest.raises(FsarError, match="13 videos[.] Too few") as caught: EpisodeSampler(videos(recordings=1), "test", ways=5, shots=7, queries=6, seed=0, apart=False)
    assert "class 'a': 12 videos\n" in str(caught.value) and "source" not in str(caught.value)


def test_only_a_blind_table_says_so():
    tables = {on: episode_table(EpisodeSampler(videos(recordings=4), "test", ways=3, shots=1, queries=2, seed=0, apart=on), 30) for on in (True, False)}
    assert "apart" not in tables[True].info and tables[False].info["apart"] is False and tables[True].hash != tables[False].hash
    assert set(tables[True].info) == {"split", "class_names", "ways", "shots", "queries", "seed", "epoch", "videos"}  # as before there was a choice: the hashes stay


def test_unequal_shots_reach_both_ends():
    sampler = EpisodeSampler(videos(), "test", ways=4, shots=(1, 5), queries=1, seed=0)
    assert {int(n) for i in range(100) for n in np.bincount(sampler(i).support_labels)} == {1, 2, 3, 4, 5}


def test_pairs_make_two_way_episodes_in_both_orders():
    pairs = [("a", "b"), ("e", "c")]
    sampler = EpisodeSampler(videos(), "test", ways=2, shots=1, queries=1, seed=0, pairs=pairs)
    seen = {tuple(sampler.pool.names[c] for c in sampler(i).classes) for i in range(100)}
    assert seen == {("a", "b"), ("b", "a"), ("c", "e"), ("e", "c")}


def test_pairs_ask_only_their_own_classes_for_enough_videos():
    table = pd.concat([videos(), videos("z", count=1)], ignore_index=True)
    EpisodeSampler(table, "test", ways=2, shots=1, queries=3, seed=0, pairs=[("a", "b")])
    with pytest.raises(FsarError, match="'z': 1 video"): EpisodeSampler(table, "test", ways=2, shots=1, queries=3, seed=0)


@pytest.mark.parametrize("table, change, words", [
    (videos(), dict(ways=7), ["'test' has 6 classes", "7-way", "a, b, c"]),
    (videos(count=9), dict(shots=5, queries=5), ["need 10 videos", "class 'a': 9 videos", "… and 1 more"]),
    (videos(recordings=1), dict(), ["'a': 12 videos from 1 source (largest 12)", "different sources"]),
    (videos(), dict(split="tets"), ["'tets'", "Did you mean 'test'?"]),
    (videos(), dict(shots=0), ["shots", "from 1"]),
    (videos(), dict(shots=(3, 2)), ["lowest"]),
    (videos(), dict(queries=0), ["queries=0"]),
    (videos(), dict(ways=2, pairs=[("a", "x")]), ["no class 'x'", "It has: a, b"]),
    (videos(), dict(ways=3, pairs=[("a", "b")]), ["two-way", "ways=3"]),
    (videos(), dict(ways=2, pairs=[]), ["pairs is empty"]),
])
def test_errors_name_the_class_and_the_counts(table, change, words):
    with pytest.raises(FsarError) as caught:
        EpisodeSampler(table, **{**dict(split="test", ways=5, shots=1, queries=1, seed=0), **change})
    for word in words: assert word in str(caught.value)


def test_the_error_counts_quarantined_videos():
    quarantine = pd.DataFrame([{"video": "a/x", "class": "a", "split": "test", "reason": "truncated"}] * 3)
    with pytest.raises(FsarError, match="class 'a': 12 videos, 3 more in quarantine"):
        EpisodeSampler(SimpleNamespace(index=videos(), quarantine=quarantine), "test", ways=2, shots=10, queries=5, seed=0)


# ---- the table

@pytest.fixture(scope="module")
def table(): return episode_table(EpisodeSampler(videos(), "test", ways=3, shots=(1, 3), queries=2, seed=0), 40)


def test_the_table_holds_the_samplers_episodes(table):
    sampler = EpisodeSampler(videos(), "test", ways=3, shots=(1, 3), queries=2, seed=0)
    assert all(same(table[i], sampler(i)) for i in range(40))
    assert table.support.shape == (40, 9) and ((table.support == -1) == (table.support_labels == -1)).all() and (table.support == -1).any()
    assert set(table.rows) <= set(range(72)) and -1 not in table.rows
    assert len(table.head(7)) == 7 and same(table.head(7)[6], table[6])


def test_ten_thousand_episodes_in_seconds():
    sampler = EpisodeSampler(videos([f"c{i}" for i in range(24)], count=100, recordings=25), "test", ways=5, shots=5, queries=5, seed=0)
    start = time.process_time()
    assert episode_table(sampler, 10_000).query.shape == (10_000, 25)
    assert time.process_time() - start < 10  # about 2.5 s on an idle core


def test_the_hash_is_that_of_the_questions(table):
    def make(table=None, seed=0):
        table = videos() if table is None else table
        return episode_table(EpisodeSampler(table, "test", ways=3, shots=(1, 3), queries=2, seed=seed), 40).hash
    assert make() == table.hash and make(seed=1) != table.hash
    assert make(videos().assign(video=lambda t: "other/" + t["video"])) != table.hash  # the same rows, other videos
    assert table.head(39).hash != table.hash


def test_saved_and_loaded(table, tmp_path):
    for name in ("one", "two"): table.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = EpisodeTable.load(tmp_path / "one", videos())
    assert loaded.hash == table.hash and loaded.class_names == table.class_names and all(same(loaded[i], table[i]) for i in range(40))


@pytest.mark.parametrize("damage, words", [
    (lambda b: b[:200], "damaged"), (lambda b: b"", "damaged"), (lambda b: b[:-4] + bytes([b[-4] ^ 1]) + b[-3:], "altered"),
    (lambda b: b.replace(b'\\"seed\\": 0', b'\\"seed\\": 1'), "altered"),
])
def test_a_damaged_or_altered_file_is_refused(table, tmp_path, damage, words):
    table.save(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(damage(before))
    assert (tmp_path / "t").read_bytes() != before
    with pytest.raises(FsarError, match=words): EpisodeTable.load(tmp_path / "t")


def test_missing_file_other_videos_and_no_folder(table, tmp_path):
    with pytest.raises(FsarError, match="no such file"): EpisodeTable.load(tmp_path / "none")
    table.save(tmp_path / "t")
    with pytest.raises(FsarError, match="other videos"): EpisodeTable.load(tmp_path / "t", videos(count=13))
    with pytest.raises(FsarError, match="cannot write"): table.save(tmp_path / "none" / "t")


# ---- clips

@pytest.fixture(scope="module")
def clips(tiny_store):
    sampler = EpisodeSampler(tiny_store, "train", ways=3, shots=1, queries=2, seed=0)
    return EpisodeClips(tiny_store, sampler, frames=4, transform=TrainTransform(32))


def test_an_item_is_its_episode_with_pixels(clips, tiny_store):
    batch, episode = clips[3], clips.sampler(3)
    assert batch.support.shape == (3, 4, 3, 32, 32) and batch.query.shape == (6, 4, 3, 32, 32) and batch.clips.shape == (9, 4, 3, 32, 32)
    assert batch.support.dtype == torch.uint8 and batch.index == 3
    assert batch.class_ids.tolist() == episode.classes.tolist() and batch.query_labels.tolist() == episode.query_labels.tolist()
    assert all(x.dtype == torch.int64 for x in (batch.support_labels, batch.query_labels, batch.class_ids))
    names = tiny_store.classes("train")  # the base-class labels of the classifier
    assert [names[c] for c in batch.class_ids] == tiny_store.index["class"].iloc[episode.support].tolist()
    assert torch.equal(batch.to("cpu").clips, batch.clips)


def test_the_same_item_again_another_epoch_differs(clips):
    assert torch.equal(clips[2].clips, clips[2].clips)
    later = EpisodeClips(clips.store, clips.sampler, frames=4, transform=clips.transform, epoch=1)
    assert not torch.equal(later[2].clips, clips[2].clips)


def test_any_number_of_workers_and_any_start(clips):
    wanted = [clips[i] for i in range(5)]
    before = torch.random.get_rng_state()
    for workers in (0, 1, 2):
        got = list(episode_loader(clips, 0, 5, workers=workers))
        assert [b.index for b in got] == [0, 1, 2, 3, 4]
        assert all(torch.equal(g.clips, w.clips) and torch.equal(g.class_ids, w.class_ids) for g, w in zip(got, wanted))
    assert [b.index for b in episode_loader(clips, 3, 5)] == [3, 4]
    assert [b.index for b in itertools.islice(episode_loader(clips, 7), 2)] == [7, 8]  # no end unless one is given
    assert torch.equal(before, torch.random.get_rng_state())


def test_test_clips_are_centred_and_in_order(tiny_store):
    rows = tiny_store.split("test")[::-1]
    data = VideoClips(tiny_store, rows, frames=4, transform=TestTransform(32))
    assert len(data) == len(rows) == len(list(episode_loader(data, workers=1)))
    frames = int(tiny_store.index["frames"].iloc[rows[2]])
    assert torch.equal(data[2], TestTransform(32)(tiny_store.frames(int(rows[2]), segment_indices(frames, 4))))
    assert data.row_to_position[rows].tolist() == list(range(len(rows))) and data.row_to_position.max() == len(rows) - 1


def test_the_pool_is_the_stores_split(tiny_store):
    for split in ("train", "val", "test"):
        pool = class_pool(tiny_store, split)
        assert pool.names == tuple(tiny_store.classes(split)) and sorted(np.concatenate(pool.rows)) == sorted(tiny_store.split(split))


def test_an_episode_is_drawn(clips):
    batch = clips[0]
    fig = draw_episode(batch, clips.sampler.pool.names, predicted=np.where(np.arange(6) == 1, (batch.query_labels + 1) % 3, batch.query_labels), queries=2)
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert sum("✓" in t for t in titles) == 5 and sum("taken for" in t for t in titles) == 1 and sum("support" in t for t in titles) == 3
