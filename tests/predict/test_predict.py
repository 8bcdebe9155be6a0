"Recognition of one's own videos: the same answers as a test gives, for every method; classes that come and go; files and errors; calibration; windows; the command."
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fsar.cli import main as cli, predict as cli_predict
from fsar.predict import recognizer as predict
from fsar.data.augment import TestTransform
from fsar.predict.calibration import Calibration, Trials, fit_calibration, measure_calibration, roc_area, temperature
from fsar.core.basics import FsarError, generator, torch_seed
from fsar.data.episodes import VideoClips
from fsar.engine.evaluation import embed_videos
from fsar.predict.pretrained import ARRAYS, Preprocessing, Pretrained, clip_of, frames_of
from fsar.predict.hub import load_pretrained
from fsar.model.base import METHODS, SAMPLERS
from fsar.model.registry import create_model
from fsar.data.motions import render, split_classes
from fsar.predict.recognizer import FewShotRecognizer, examples_of, matcher_of
from fsar.predict.answers import prediction_figure, spans
from fsar.data.video import VideoError, decode, decode_all, segment_indices, write_video

FORMS = [(m, v, "") for m in sorted(METHODS) for v in METHODS[m].variants] + [(m, "paper", s) for m in sorted(METHODS) for s in SAMPLERS if not issubclass(METHODS[m], SAMPLERS[s])]
forms = pytest.mark.parametrize("method, variant, sampler", FORMS, ids=["-".join(filter(None, (s, m, v))) for m, v, s in FORMS])
pytestmark = pytest.mark.filterwarnings("ignore:.*lazy modules.*")
SMALL = Preprocessing(48, 32)


def recogniser(method="otam", variant="paper", sampler="", seed=1, **options) -> FewShotRecognizer:
    "A model with its first weights: for all but accuracy it is as good as any."
    model = create_model(method, backbone="resnet_micro", frames=4, options={"variant": variant, **options}, sampler=sampler, seed=seed)
    return FewShotRecognizer(Pretrained(model.eval(), SMALL), "cpu")


def array(k: int, frames: int = 6, side: int = 48) -> np.ndarray:
    return generator(k).integers(0, 256, (frames, side, side + 8, 3), dtype=np.uint8)


def message(call, *args, **kwargs) -> str:
    with pytest.raises(FsarError) as error: call(*args, **kwargs)
    return str(error.value)


@pytest.fixture
def clips(tiny_motions) -> dict[str, list[str]]:
    "Files of three classes: three, two and one."
    return {name: [str(f) for f in sorted((tiny_motions / name).glob("*.mp4"))[:count]] for name, count in zip(split_classes("test"), (3, 2, 1))}


@pytest.fixture(scope="module")
def trained() -> FewShotRecognizer: return FewShotRecognizer.from_pretrained("molo-motions-mini", device="cpu")


# every method

@forms
def test_every_method_recognises_saves_and_loads(method, variant, sampler, clips, tmp_path):
    known = recogniser(method, variant, sampler).learn(clips)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    model, pre = known.model, known.pretrained.preprocessing
    with torch.inference_mode():  # the three verbs by hand
        support, query = (model.embed(torch.stack([clip_of(v, pre, model.clip_frames) for v in videos])) for videos in (sum(clips.values(), []), [array(0), array(1)]))
        support, query = model.adapt(support, labels, query)
        logits = model.score(support, labels, query, 3)
    found = known([array(0), array(1)])
    for p, one in zip(found, logits.double().softmax(-1).tolist()):
        assert p.probabilities == pytest.approx(dict(zip(known.classes, one)), rel=1e-5, abs=1e-7) and list(p.probabilities.values()) == sorted(p.probabilities.values(), reverse=True)
        assert p.label == next(iter(p.probabilities)) == p.nearest.label and p.nearest.video in clips[p.label] and not p.none and not p.calibrated
        assert p.alignment.shape == p.similarity.shape and (p.alignment >= 0).all() and p.alignment.any() and -1 <= p.nearest.similarity <= 1.0001
    known.save_support(tmp_path / "learned.safetensors")
    again = recogniser(method, variant, sampler).load_support(tmp_path / "learned.safetensors")
    assert [p.probabilities for p in again([array(0), array(1)])] == [p.probabilities for p in found] and again.support.names == known.support.names
    assert again(array(0)).pictures[1] is None and known(array(0)).pictures[1] is not None


@forms
def test_answers_depend_on_no_other_query_and_one_class_is_enough(method, variant, sampler):
    known = recogniser(method, variant, sampler).learn({"a": [array(0), array(1)], "b": [array(2)]})
    many = known([array(k) for k in range(3, 23)])  # more than a batch
    assert many[18].probabilities == pytest.approx(known(array(21)).probabilities, abs=1e-5)
    assert known.remove("b")(array(3)).probabilities == {"a": 1.0}


# what a model sees

def test_a_file_is_seen_as_its_test_sees_it(tiny_motions, tiny_store):
    known, rows = recogniser(), np.arange(6)
    stored = embed_videos(known.model, VideoClips(tiny_store, rows, frames=4, transform=TestTransform(32)), progress=False)["frames"]
    own, _ = known.embed([tiny_motions / f"{v}.mp4" for v in tiny_store.index.video[rows]])
    assert torch.nn.functional.cosine_similarity(stored, own["frames"], dim=-1).min() > 0.999  # the store's frames are JPEG


def test_the_frames_are_those_in_the_middle_of_equal_parts(clips):
    path = clips["bounce_off"][0] if "bounce_off" in clips else next(iter(clips.values()))[0]
    for most, kept in ((64, range(12)), (5, [0, 3, 6, 8, 11]), (0, range(12))):
        wanted = np.array(kept)[segment_indices(len(kept), 4)]
        by_hand = TestTransform(32)(torch.from_numpy(decode(path, wanted, short_side=48)).permute(0, 3, 1, 2).contiguous())
        assert torch.equal(clip_of(path, Preprocessing(48, 32, most), 4), by_hand)


def test_an_array_is_seen_as_a_file_of_the_same_frames(tmp_path):
    frames, _ = decode_all(write_video(tmp_path / "a.mp4", render("split", 0), fps=12))
    for pre in (Preprocessing(72, 64), Preprocessing(120, 96), Preprocessing(80, 80, 7)):
        assert torch.equal(clip_of(tmp_path / "a.mp4", pre, 8), clip_of(frames, pre, 8))
    layouts = frames, torch.from_numpy(frames), frames.transpose(0, 3, 1, 2), torch.from_numpy(frames.transpose(0, 3, 1, 2).copy())
    assert all(np.array_equal(frames_of(x), frames) for x in layouts)


@pytest.mark.parametrize("video", [np.zeros((4, 8, 8, 3)), np.zeros((4, 8, 8, 3), np.int16), torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8, dtype=torch.bfloat16), np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8, 4), np.uint8),
                                   np.zeros((0, 8, 8, 3), np.uint8), np.zeros((4, 3, 8, 3), np.uint8), np.zeros((2, 4, 8, 8, 3), np.uint8), 7, None, b"x"])
def test_other_arrays_are_refused(video):
    known = recogniser().learn({"a": [array(0)]})
    assert message(known, video).endswith(ARRAYS)


def test_files_that_cannot_be_read_are_named(clips, tmp_path):
    known, cut = recogniser().learn(clips), tmp_path / "cut.mp4"
    cut.write_bytes(Path(next(iter(clips.values()))[0]).read_bytes()[:900])
    for path in (cut, tmp_path / "none.mp4", tmp_path):
        with pytest.raises(VideoError) as error: known([array(0), path])
        assert error.value.path == path and error.value.reason
        assert str(path) in message(known.learn, {"new": [array(0), path]}) and str(path) in message(known.windows, path)
    assert known.classes == tuple(clips)  # as before


# classes come and go

def test_learning_adding_and_removing_lead_to_the_same(clips):
    whole, steps = recogniser().learn(clips), recogniser()
    first, second, third = clips
    steps.learn({first: clips[first][:1], "gone": [array(9)], second: clips[second]}).add(third, clips[third]).remove("gone").add(first, clips[first][1:], more=True)
    assert steps.support.counts == whole.support.counts and "(3)" in repr(steps)
    assert steps(array(0)).probabilities == pytest.approx(whole(array(0)).probabilities, abs=1e-6)
    assert whole.learn({"only": [array(1)]}).classes == ("only",) and "no class yet" in repr(whole.remove("only"))


def test_what_cannot_be_learned_is_named_and_nothing_changes(clips, tmp_path):
    known = recogniser().learn(clips)
    first, second, _ = clips
    (tmp_path / "some" / "empty").mkdir(parents=True); (tmp_path / "some" / "full").mkdir()
    os.symlink(clips[first][0], tmp_path / "some" / "full" / "a.mp4")
    for words, call, *args in [("there is no class to learn", known.learn, {}), ("class 'x' has no example", known.learn, {"x": []}), ("class 'x' has no example", known.add, "x", []), ("are a list of videos, not one", known.learn, {"x": "a.mp4"}),
                               ("are a list of videos, not one", known.add, "x", array(0)), ("not a list", known.learn, [1]), (f"class '{first}' is known already, by 3 examples", known.add, first, [array(0)]),
                               (f"is not known. Did you mean '{first}'?", known.remove, first[:-1]), ("is not known. Known: ", known.remove, "zzz"), (f"given twice, as an example of 'x' and of '{first}'", known.learn, {first: [clips[first][0]], "x": [clips[first][0]]}),
                               ("given twice", known.learn, {"x": [clips[first][0]] * 2}), ("given twice, as an example of 'x' and an example already", known.add, "x", [clips[second][0]]), ("class 'empty' is empty", known.learn, tmp_path / "some"),
                               ("no such folder", known.learn, tmp_path / "nowhere")]:
        assert words in message(call, *args), words
    with pytest.raises(FsarError, match="is not known"): known.add("zzz", [array(0)], more=True)
    assert known.support.counts == {name: len(files) for name, files in clips.items()}
    assert "no class is known yet" in message(recogniser(), array(0)) and "no class is known yet" in message(recogniser().windows, array(0), fps=5) and "no class is known yet" in message(recogniser().save_support, tmp_path / "x")


def test_a_folder_is_a_mapping(tiny_motions):
    from_folder = examples_of(tiny_motions)
    assert list(from_folder) == sorted(from_folder) and {len(v) for v in from_folder.values()} == {6} and all(Path(v).parent.name == name for name, videos in from_folder.items() for v in videos)


# why

@pytest.mark.parametrize("method", ["protonet", "otam", "bimhm", "molo", "hyrsm", "ta2n"])
def test_an_example_finds_itself(method):
    known = recogniser(method).learn({"a": [array(0), array(1)], "b": [array(2)]})
    if method in ("molo", "protonet"): known.remove("a").add("a", [array(0)])  # these compare with a class's mean
    for k, name in ((0, "a"), (2, "b")):
        p = known(array(k))
        assert p.label == name and torch.equal(p.pictures[0], p.pictures[1])
        if METHODS[method] is not METHODS["hyrsm"]: assert p.similarity.diagonal() == pytest.approx(np.ones(4), abs=1e-4)


def test_the_alignment_is_the_methods_own():
    from fsar.model.matching import alignment, bimhm, otam
    assert matcher_of(recogniser("otam").model) is not bimhm and matcher_of(recogniser("trx").model) is bimhm and matcher_of(recogniser("vim").model) is bimhm
    sim = torch.rand(2, 4, 4)
    for known in (recogniser("otam"), recogniser("molo", matcher="otam"), recogniser("otam", sampler="vim")): assert torch.allclose(matcher_of(known.model)(sim), otam(sim))
    p = recogniser("otam").learn({"a": [array(0)]})(array(1))
    assert np.allclose(p.alignment, alignment(otam, torch.from_numpy(p.similarity)).clamp(min=0).numpy())
    assert p.nearest.similarity == pytest.approx(float((p.alignment * p.similarity).sum() / p.alignment.sum()))


def test_predictions_as_text_json_html_and_picture(clips):
    known = recogniser().learn({"<b>&": [array(0)], **clips})
    p = known(array(0))
    assert json.loads(json.dumps(p.to_dict(), allow_nan=False)) == p.to_dict() and set(p.to_dict()["probabilities"]) == set(known.classes)
    assert "&lt;b&gt;&amp;" in p._repr_html_() and "<b>&" not in p._repr_html_() and "not calibrated" in p._repr_html_()
    assert repr(p).startswith("array 6×48×56×3: <b>& ") and "nearest example array" in repr(p)
    figure = prediction_figure([p, known(clips[next(iter(clips))][0])])
    assert len(figure.axes) == 6 and len(p.figure().axes) == 3
    figure.canvas.draw()


# accuracy

def test_the_shipped_model_recognises_novel_motions(trained):
    names = split_classes("test")[:5]
    trained.learn({name: [render(name, k) for k in range(5)] for name in names})
    found = trained([render(name, k) for name in names for k in range(5, 11)])
    right = sum(p.label == name for p, name in zip(found, (n for n in names for _ in range(6))))
    assert right >= 21  # of 30; guessing gives 6, and 87 % are expected


def test_words_read_from_lips(trained, shared_dir):
    "Real clips: five examples of each of five words, none from a query's video; against guessing and against training-free ProtoNet."
    words, weights = shared_dir / "realdata" / "grid_words", shared_dir / "realdata" / "weights" / "mobilenet_v2-b0353104.pth"
    if not words.is_dir() or not weights.is_file(): pytest.skip("the word clips or the ImageNet weights are not at hand (../shared/realdata)")
    free = FewShotRecognizer(Pretrained(create_model("protonet", backbone="mobilenet_v2", weights=str(weights)).eval(), Preprocessing(72, 72)), "cpu")
    names, right, asked = sorted(p.name for p in words.iterdir() if p.name.startswith(("adverb_", "color_"))), {}, 0
    source = lambda file: file.name.split("_")[0]
    for five in (names[:5], names[3:]):
        files = {name: list({source(f): f for f in sorted((words / name).glob("*.mp4"))}.values()) for name in five}  # one clip of a video
        seen = {source(f) for name in five for f in files[name][:5]}
        queries = [f for name in five for f in [g for g in files[name][5:] if source(g) not in seen][:10]]
        asked += len(queries)
        for kind, known in (("trained", trained), ("free", free)):
            known.learn({name: files[name][:5] for name in five})
            right[kind] = right.get(kind, 0) + sum(p.label == Path(p.video).parent.name for p in known(queries))
    chance = 0.2 * asked + 1.64 * math.sqrt(0.16 * asked)  # what guessing exceeds once in twenty times
    print({k: f"{100 * v / asked:.0f} %" for k, v in right.items()}, "of", asked)
    assert asked == 100 and right["trained"] > chance and right["trained"] > right["free"]


# calibration

@pytest.mark.parametrize("scale", [1e-3, 0.3, 1, 20, 1e4])
def test_temperature_undoes_any_scale(scale):
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 4, generator=rng)
    labels = logits.softmax(-1).multinomial(1, generator=rng)[:, 0]
    assert temperature(scale * logits, labels) == pytest.approx(scale, rel=0.05)
    best = min(np.geomspace(0.2, 5, 400), key=lambda t: float(torch.nn.functional.cross_entropy(logits / t, labels)))
    assert temperature(logits, labels) == pytest.approx(best, rel=0.02)  # the most likely one, by trying all


def test_temperature_of_what_cannot_be_calibrated():
    logits = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    assert temperature(logits, torch.tensor([0, 1])) < 0.01 * float(logits.std())  # always right: as sure as can be
    assert temperature(logits, torch.tensor([1, 0])) > 100 * float(logits.std())  # always wrong
    assert math.isfinite(temperature(torch.zeros(2, 3), torch.tensor([0, 1]))) and math.isfinite(temperature(torch.zeros(2, 1), torch.tensor([0, 0])))


def test_above_counts_pairs():
    with torch_seed(0): a, b = torch.randint(0, 6, (40,)).float(), torch.randint(0, 5, (30,)).float()
    by_hand = ((a[:, None] > b).double() + (a[:, None] == b).double() / 2).mean()
    assert roc_area(a, b) == pytest.approx(float(by_hand)) and roc_area(b, b) == 0.5 and roc_area(a + 10, b) == 1


def trials(n=4000, seed=0) -> Trials:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=rng)  # 3 is of none
    logits = torch.randn(n, 3, generator=rng) + 3 * torch.nn.functional.one_hot(labels, 4)[:, :3]
    return Trials(logits, labels, dict(data="made", classes=["a", "b", "c", "d"], ways=3, shots=[1, 1], queries=1, episodes=n, seed=0))


@pytest.mark.parametrize("reject", [0.05, 0.5, 0.8, 0.95])
def test_the_threshold_rejects_what_it_should_here_and_elsewhere(reject):
    c = fit_calibration(trials(), reject)
    there = measure_calibration(trials(seed=1), c.temperature, c.threshold)
    assert c.rejected == pytest.approx(reject, abs=0.01) and there.rejected == pytest.approx(reject, abs=0.04)
    assert 0 <= c.lost < c.rejected and c.answered <= c.accuracy and c.answered == pytest.approx(c.accuracy, abs=c.lost + 1e-9) and c.separation > 0.8
    assert c.confidence == pytest.approx(c.accuracy, abs=0.01) and there.confidence == pytest.approx(there.accuracy, abs=0.03)
    assert Calibration.from_dict(json.loads(json.dumps(asdict(c)))) == c


@pytest.mark.parametrize("method, sampler", [("otam", ""), ("hyrsm", ""), ("finetune", ""), ("trx", ""), ("vim", ""), ("protonet", "vim")])
def test_a_trial_is_the_episode_without_its_last_class(method, sampler, tiny_store):
    known = recogniser(method, sampler=sampler)
    found = known.trials(tiny_store, ways=3, shots=(1, 3), queries=2, episodes=3, seed=4)
    assert found.logits.shape == (3 * 4 * 2, 3) and int((~found.known).sum()) == 6 and found.about["shots"] == [1, 3] and found.about["data"] == "tiny val"
    from fsar.data.episodes import EpisodeSampler
    sampler_, rows = EpisodeSampler(tiny_store, "val", ways=4, shots=(1, 3), queries=2, seed=4), tiny_store.split("val")
    embedding = embed_videos(known.model, VideoClips(tiny_store, rows, frames=known.model.clip_frames, transform=TestTransform(32)), progress=False)
    take = lambda wanted: {k: x[np.searchsorted(rows, wanted)] for k, x in embedding.items()}
    for e in range(3):
        episode = sampler_(e)
        kept = episode.support_labels < 3
        labels = torch.from_numpy(episode.support_labels[kept])
        with torch.inference_mode():
            support, query = known.model.adapt(take(episode.support[kept]), labels, take(episode.query))
            alone = known.model.score(support, labels, query, 3)
        assert torch.allclose(found.logits[8 * e:8 * e + 8], alone, atol=1e-4)


def test_trials_from_a_store_a_folder_and_a_mapping_agree(tiny_store, tiny_motions):
    known, how = recogniser(), dict(ways=3, shots=2, queries=2, episodes=20)
    names = split_classes("val")[:5]
    mapping = {name: [tiny_motions / name / f"{k}.mp4" for k in range(6)] for name in tiny_store.classes("val") if name in names}
    if not all(f.is_file() for files in mapping.values() for f in files): mapping = {name: sorted((tiny_motions / name).glob("*.mp4")) for name in mapping}
    one, two = known.trials(tiny_store, **how), known.trials(mapping, name="mine", **how)
    assert two.about["data"] == "mine" and one.about["classes"] == two.about["classes"]
    assert torch.allclose(one.logits, two.logits, atol=0.02) and torch.equal(one.labels, two.labels)  # JPEG in between
    assert known.trials(tiny_motions, **how).about["data"] == "tiny"


def test_what_cannot_be_calibrated_is_named(tiny_store):
    known = recogniser()
    for words, videos, how in [("needs three classes at least", {"a": [array(0)], "b": [array(1)]}, {}), ("5 shots and 3 queries a class need 8 videos", tiny_store, {}), ("between 0 and 1, not 1.5", trials(), {"reject": 1.5}),
                               ("has no 'vall' videos", tiny_store, {"split": "vall"}), ("6-way episodes need 6", tiny_store, {"ways": 5, "shots": 1})]:
        assert words in message(known.calibrate, videos, **how), words
    assert "holds frames with a short side of 48 pixels, the model takes 60" in message(FewShotRecognizer(replace(known.pretrained, preprocessing=Preprocessing(60, 32)), "cpu").calibrate, tiny_store)
    assert known.calibration is None


def test_a_calibration_decides_is_kept_and_travels(clips, tmp_path):
    known = recogniser().learn(clips)
    plain = known(array(0))
    best, c = float(known.logits(known.embed([array(0)])[0]).max()), fit_calibration(trials())
    for threshold, none in ((best - 1e-3, False), (best + 1e-3, True)):
        known._calibrate(replace(c, temperature=0.5, threshold=threshold))
        p = known(array(0))
        assert p.none == none and p.calibrated and p.label == plain.label and ("none of these" in repr(p)) == none and ("none of these" in p._repr_html_()) == none and p.to_dict()["none"] == none
        sharper = {k: v ** 2 for k, v in plain.probabilities.items()}
        assert p.probabilities == pytest.approx({k: v / sum(sharper.values()) for k, v in sharper.items()}, rel=1e-4)
        assert bool(known.windows(array(0), fps=3, seconds=2).none.all()) == none
    known.save_pretrained(tmp_path / "model")
    again = FewShotRecognizer.from_pretrained(tmp_path / "model", device="cpu")
    assert again.calibration == known.calibration and "80 %" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    known.save_support(tmp_path / "learned.safetensors")
    assert recogniser().load_support(tmp_path / "learned.safetensors").calibration == known.calibration
    known.pretrained = replace(known.pretrained, calibration={"temperature": 1})
    assert "this is not a calibration" in message(known, array(0))


def test_a_wrong_calibration_in_a_model_is_refused():
    good = asdict(fit_calibration(trials()))
    for wrong in ({**good, "temperature": 0}, {**good, "temperature": "1"}, {**good, "threshold": None}, {**good, "more": 1}, []): message(Calibration.from_dict, wrong)


# learned, as a file

def test_a_file_of_what_was_learned_is_checked(clips, tmp_path):
    from safetensors.torch import load_file, save_file
    known, path = recogniser().learn(clips), tmp_path / "learned.safetensors"
    known.save_support(path)
    assert f"{path} exists" in message(known.save_support, path)
    known.remove(next(iter(clips))).save_support(path, overwrite=True)
    before = known.support
    assert "was learned with another model" in message(recogniser(seed=2).load_support, path) and "was learned with another model" in message(recogniser("bimhm").load_support, path)
    whole = path.read_bytes()
    from safetensors import safe_open
    with safe_open(path, "pt") as f: about = f.metadata()
    tensors = load_file(path)
    def alter(**tensors_): save_file(tensors_, path, about); return message(known.load_support, path)
    assert "have not the shapes" in alter(frames=tensors["frames"][:, :2].contiguous()) and "have not the shapes" in alter(other=tensors["frames"]) and "is damaged" in alter(frames=tensors["frames"][:1])
    for content in (b"", whole[:200], pickle.dumps({"a": 1}), whole[:-7]):
        path.write_bytes(content)
        assert f"{path} is not what save_support writes, or is damaged" in message(known.load_support, path)
    assert "no such file" in message(known.load_support, tmp_path / "nothing") and known.support is before


def test_names_that_are_no_text_come_back(tmp_path, clips):
    odd = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    try: odd.write_bytes(Path(next(iter(clips.values()))[0]).read_bytes())
    except OSError: pytest.skip("this file system takes UTF-8 names only")
    known = recogniser().learn({"a": [odd]})
    known.save_support(tmp_path / "learned.safetensors")
    assert recogniser().load_support(tmp_path / "learned.safetensors").support.names == (str(odd),)


# windows

@pytest.mark.parametrize("frames, fps, seconds, step", [(50, 10, 2, 1), (45, 10, 2, 1), (9, 10, 2, 1), (100, 29.97, 1.5, 0.4), (100, 25, 0.01, 0.01), (1, 25, 1, 1), (240, 24, 2, 3), (77, 12.5, 2, 0.05)])
def test_windows_cover_the_video_in_order(frames, fps, seconds, step):
    found = spans(frames, fps, seconds, step)
    length = min(frames, max(1, round(seconds * fps)))
    assert found[0][0] == 0 and found[-1][1] == frames and all(b - a == length for a, b in found) and found == sorted(set(found))
    assert all(abs(a - k * step * fps) <= 0.5 for k, (a, _) in enumerate(found[:-1])) if step * fps >= 1 else True


@forms
def test_a_window_is_a_clip(method, variant, sampler):
    known, long = recogniser(method, variant, sampler).learn({"a": [array(0), array(1)], "b": [array(2)]}), array(5, frames=30)
    timeline = known.windows(long, fps=5, seconds=2, step=1)
    assert len(timeline) == 5
    for start, row in zip(range(0, 25, 5), timeline.probabilities):
        assert dict(zip(known.classes, row)) == pytest.approx(known(long[start:start + 10]).probabilities, abs=1e-5)


def test_a_file_in_windows_is_its_frames_in_windows(tmp_path, monkeypatch):
    known = recogniser().learn({"a": [array(0)], "b": [array(2)]})
    path = write_video(tmp_path / "long.mp4", array(5, frames=40), fps=8)
    whole = known.windows(decode_all(path)[0], fps=8, seconds=2, step=0.25)
    calls = []
    monkeypatch.setattr(predict, "decode", lambda *a, **k: (calls.append(1), decode(*a, **k))[1])
    for chunk in (predict.CHUNK, 1):  # in one piece, window by window
        monkeypatch.setattr(predict, "CHUNK", chunk)
        assert np.array_equal(known.windows(path, seconds=2, step=0.25).probabilities, whole.probabilities)
    assert len(calls) == 1 + len(whole)


def test_a_timeline_as_tables_json_and_picture():
    known = recogniser().learn({"a": [array(0)], "b": [array(2)]})
    timeline = known.windows(np.concatenate([array(0, 20), array(2, 20)]), fps=10, seconds=1, step=0.5)
    timeline = replace(timeline, probabilities=np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8], [0.1, 0.9]]), none=np.array([0, 0, 1, 0, 0, 0, 0], bool))
    s = timeline.segments
    assert s["label"].tolist() == ["a", "none of these", "a", "b"] and s["start"].tolist() == [0, 1.25, 1.75, 2.75] and s["end"].tolist() == [1.25, 1.75, 2.75, 4]
    assert s["probability"].tolist()[0] == pytest.approx(0.85) and math.isnan(s["probability"][1])
    told = json.loads(json.dumps(timeline.to_dict(), allow_nan=False))
    assert told["segments"][1]["probability"] is None and len(told["windows"]) == 7 and told["windows"][2]["none"] is True
    timeline.figure().canvas.draw()
    known.windows(array(0), fps=1, seconds=60).figure().canvas.draw()  # a single window
    assert len(repr(timeline).splitlines()) == 6


def test_windows_that_cannot_be(clips):
    known = recogniser().learn(clips)
    assert "give fps=" in message(known.windows, array(0)) and message(known.windows, 7, fps=3).endswith(ARRAYS)
    for how in ({"seconds": 0}, {"step": -1}, {"fps": -2}): assert "above 0" in message(known.windows, array(0), **{"fps": 5, **how})


# the command

def run(*words) -> dict:
    return cli.parse(["predict", *map(str, words)]).run()


@pytest.fixture
def examples(tmp_path) -> Path:
    for name in ("split", "roll_left"):
        (tmp_path / "examples" / name).mkdir(parents=True)
        for k in range(2): write_video(tmp_path / "examples" / name / f"{k}.mp4", render(name, k), fps=12)
        write_video(tmp_path / f"{name}.mp4", render(name, 5), fps=12)
    return tmp_path / "examples"


def test_the_command_answers_learns_and_draws(examples, tmp_path):
    told = run(tmp_path / "split.mp4", tmp_path / "roll_left.mp4", "--support", examples, "--save", tmp_path / "learned.safetensors", "--picture", tmp_path / "why.png")
    assert [p["label"] for p in told["predictions"]] == ["split", "roll_left"] and told["classes"] == {"roll_left": 2, "split": 2} and told["calibrated"]
    words = cli_predict.Predict(support="").words(told)
    assert words.splitlines()[0].split() == ["video", "answer", "probability", "nearest", "example"] and f"picture: {tmp_path / 'why.png'}" in words and "2 classes from 4 examples" in words
    assert (tmp_path / "why.png").read_bytes()[1:4] == b"PNG"
    again = run(tmp_path / "split.mp4", "--support", tmp_path / "learned.safetensors")
    assert again["predictions"][0]["probabilities"] == pytest.approx(told["predictions"][0]["probabilities"], abs=1e-5)


def test_the_command_prints_json_alone(examples, tmp_path):
    answer = subprocess.run([sys.executable, "-m", "fsar", "predict", str(tmp_path / "split.mp4"), "--support", str(examples), "--json"], capture_output=True, text=True, timeout=200)
    assert answer.returncode == 0 and json.loads(answer.stdout)["predictions"][0]["label"] == "split"


def test_the_command_takes_long_videos_and_calibrates(examples, tiny_motions, tmp_path):
    write_video(tmp_path / "long.mp4", np.concatenate([render("split", 7), render("roll_left", 7)]), fps=12)
    told = run(tmp_path / "long.mp4", "--support", examples, "--windows", 2, "--picture", tmp_path / "time.png")
    labels = [s["label"] for s in told["timelines"][0]["segments"]]
    assert labels[0] == "split" and labels[-1] == "roll_left" and (tmp_path / "time.png").is_file() and "split" in told["text"]
    many = tmp_path / "others"
    for name in ("stretch", "gather", "shake"):
        (many / name).mkdir(parents=True)
        for k in range(8): write_video(many / name / f"{k}.mp4", render(name, k), fps=12)
    told = run(tmp_path / "split.mp4", "--support", examples, "--calibrate", many, "--save", tmp_path / "learned.safetensors")
    known = FewShotRecognizer.from_pretrained("molo-motions-mini", device="cpu").load_support(tmp_path / "learned.safetensors")
    assert known.calibration.data == "others" and known.calibration.ways == 2


@pytest.mark.parametrize("words, said", [
    (["--support", "examples"], "name the videos to recognise"), (["split.mp4", "--support", "exmples"], "no such file: exmples"), (["split.mp4"], "--support"), (["split.mp4", "--support", "examples", "--model", "molo-motion"], "Did you mean 'molo-motions-mini'?"),
    (["split.mp4", "--support", "examples", "--picture", "why.jpg"], "--picture writes a .png file"), (["split.mp4", "--support", "examples", "--save", "a.pt"], "--save writes a .safetensors file"), (["split.mp4", "--support", "examples", "--picture", "there.png"], "there.png exists"),
    (["split.mp4", "--support", "examples", "--windows", "-1"], "from 0 up"), (["split.mp4", "roll_left.mp4", "--support", "examples", "--windows", "1", "--picture", "t.png"], "timeline of one video"), (["split.mp4"] * 21 + ["--support", "examples", "--picture", "t.png"], "up to 20 videos"),
    (["nothing.mp4", "--support", "examples"], "nothing.mp4: no such file"), (["split.mp4", "--support", "examples", "--device", "gpu"], "device 'gpu' is not available here"), (["split.mp4", "--support", "examples", "--size", "100"], "larger than the stored frames"),
    (["split.mp4", "--support", "split.mp4"], "is not what save_support writes"), (["split.mp4", "--suport", "examples"], "--support")])
def test_the_commands_errors_are_one_line(words, said, examples, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.png").touch()
    assert cli.main(["predict", *words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("fsar: error: ") and said in err and len(err.splitlines()) == 1
    assert Path("there.png").stat().st_size == 0


def test_a_run_without_its_preparation_can_be_told(examples, tmp_path):
    from fsar.engine.checkpoints import save_model
    save_model(tmp_path / "best", load_pretrained("molo-motions-mini").model)
    assert "give short_side=PIXELS and size=PIXELS" in message(run, tmp_path / "split.mp4", "--support", examples, "--model", tmp_path / "best")
    told = run(tmp_path / "split.mp4", "--support", examples, "--model", tmp_path / "best", "--short-side", 72, "--size", 64)
    assert told["predictions"][0]["label"] == "split" and not told["calibrated"] and "not calibrated" in cli_predict.Predict(support="").words(told)
