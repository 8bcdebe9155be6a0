"Models to share: what is written comes back alike, a stranger's folder is not trusted, and the hub is asked only for what is plainly its own."
import base64
import http.server
import json
import pickle
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from fsar.predict import hub
from fsar.engine.checkpoints import WEIGHTS, CheckpointWarning, save_model
from fsar.core.basics import FsarError, torch_seed
from fsar.core.files import read_json, sha256_file, write_json
from fsar.predict.hub import CARD, CONFIG, load_pretrained, results_of, push_to_hub, save_pretrained
from fsar.predict.pretrained import Preprocessing, Pretrained
from fsar.predict.card import model_card
from fsar.model.base import METHODS, SAMPLERS
from fsar.model.registry import create_model

FORMS = [(m, v, "") for m in sorted(METHODS) for v in METHODS[m].variants] + [(m, "paper", s) for m in sorted(METHODS) for s in SAMPLERS if not issubclass(METHODS[m], SAMPLERS[s])]
forms = pytest.mark.parametrize("method, variant, sampler", FORMS, ids=["-".join(filter(None, (s, m, v))) for m, v, s in FORMS])
pytestmark = pytest.mark.filterwarnings("ignore:.*lazy modules.*")
REPORT = Path(__file__).parents[2] / "reports" / "quickstart" / "metrics.json"


def small(method="protonet", variant="paper", sampler="", seed=1):
    return create_model(method, backbone="resnet_micro", frames=4, classes=6, options={"variant": variant}, sampler=sampler, seed=seed).eval()


def pretrained(*args, **known) -> Pretrained: return Pretrained(small(*args), Preprocessing(48, 32), **known)


def logits(model) -> torch.Tensor:
    "Of two queries in a 2-way task of unequal shots."
    with torch_seed(3): clips = torch.randint(0, 256, (5, model.clip_frames, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        videos = model.embed(clips)
        labels = torch.tensor([0, 1, 1])
        support, query = model.adapt({k: x[:3] for k, x in videos.items()}, labels, {k: x[3:] for k, x in videos.items()})
        return model.score(support, labels, query, 2)


def message(call, *args, **kwargs) -> str:
    with pytest.raises(FsarError) as error: call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def shared(tmp_path) -> Path: return save_pretrained(pretrained(), tmp_path / "mine")


@pytest.fixture
def run(tmp_path) -> Path:
    "A finished run's folder: its best and last weights, and the figures of the quick start as those of its best."
    folder = tmp_path / "reports" / "mine"
    for name, seed in (("best", 1), ("last", 2)): save_model(folder / "checkpoints" / name, small(seed=seed), {"trained_on": [{"dataset": "mine", "classes": ["hop", "run"]}]})
    metrics = read_json(REPORT)
    metrics["config"] |= {"short_side": 48, "size": 32, "max_frames": 16}
    metrics["hashes"]["weights"] = sha256_file(folder / "checkpoints/best" / WEIGHTS)
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "run.json", {"config": metrics["config"], "status": "finished", "template": "train"})
    return folder


# there and back

@forms
def test_every_method_comes_back_with_equal_logits(method, variant, sampler, tmp_path):
    one = pretrained(method, variant, sampler)
    two = load_pretrained(save_pretrained(one, tmp_path / "shared"))
    assert torch.equal(logits(one.model), logits(two.model)) and not two.model.training
    assert (two.model.config, two.preprocessing, two.identity) == (one.model.config, one.preprocessing, one.identity)


def test_what_is_known_comes_back(tmp_path):
    known = dict(trained_on=[{"dataset": "mine", "classes": ["hop"]}], test=results_of(read_json(REPORT)), calibration={"any": 1}, license="cc-by-4.0")
    again = load_pretrained(save_pretrained(replace(pretrained(), **(known | {"calibration": None})), tmp_path / "shared"))
    assert {k: getattr(again, k) for k in known} == known | {"calibration": None}


def test_identity_is_of_weights_configuration_and_preparation():
    one = pretrained()
    others = [Pretrained(small(seed=2), one.preprocessing), Pretrained(small("protonet"), Preprocessing(48, 40)), Pretrained(small("otam"), one.preprocessing)]
    assert pretrained().identity == one.identity and len({p.identity for p in (one, *others)}) == 4


def test_a_run_a_checkpoint_and_a_shared_model_are_one_and_the_same(run, tmp_path):
    of_run, of_checkpoint = load_pretrained(run), load_pretrained(run / "checkpoints/best")
    of_shared = load_pretrained(save_pretrained(of_run, tmp_path / "shared"))
    assert of_run.identity == of_checkpoint.identity == of_shared.identity and of_run.preprocessing == Preprocessing(48, 32, 16)
    assert of_run.test == of_checkpoint.test == of_shared.test == results_of(read_json(run / "metrics.json")) and of_shared.trained_on[0]["classes"] == ["hop", "run"]


def test_results_belong_to_the_weights_that_were_tested(run):
    last = load_pretrained(run / "checkpoints/last")
    assert last.test is None and last.preprocessing == Preprocessing(48, 32, 16) and "no test of these weights" in model_card(last, "x")


def test_an_unfinished_run_knows_its_preparation(run):
    (run / "metrics.json").unlink()
    assert load_pretrained(run / "checkpoints/last").preprocessing == Preprocessing(48, 32, 16)
    assert "has not finished" in message(load_pretrained, run)


def test_a_checkpoint_without_its_run_asks_for_what_it_lacks(run, tmp_path):
    alone = shutil.copytree(run / "checkpoints/best", tmp_path / "elsewhere" / "best")
    assert "give short_side=PIXELS and size=PIXELS" in message(load_pretrained, alone) and "give size=PIXELS as" in message(load_pretrained, alone, short_side=48)
    assert load_pretrained(alone, short_side=48, size=32).preprocessing == Preprocessing(48, 32, 64)
    assert load_pretrained(run, size=40).preprocessing == Preprocessing(48, 40, 16)  # what is given comes first


def test_a_report_without_its_weights_says_how_to_make_them(run):
    shutil.rmtree(run / "checkpoints")
    assert read_json(run / "metrics.json")["command"] in message(load_pretrained, run)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(run):
    save_model(run / "checkpoints/best", small(seed=5))
    with open(run / "checkpoints/best" / WEIGHTS, "r+b") as f: f.write(b"x")
    with pytest.warns(CheckpointWarning, match="previous checkpoint is used"): found = load_pretrained(run)
    assert torch.equal(logits(found.model), logits(small(seed=1))) and found.test is not None


def test_shipped_models_are_sound_and_told_of():
    assert hub.shipped()
    for name, folder in hub.shipped().items():
        found = load_pretrained(name)
        assert found.license != "unknown" and found.trained_on and found.test["results"] and found.calibration
        assert (folder / CARD).read_text(encoding="utf-8") == model_card(found, name)  # as the code writes it today
        found.preprocessing, logits(found.model)


# a stranger's folder

def change(path, *keys, value=None):
    "Change or remove an entry of a JSON file."
    config = read_json(path)
    part = config
    for key in keys[:-1]: part = part[key]
    part[keys[-1]] = value
    if value is None: del part[keys[-1]]
    write_json(path, config)


@pytest.mark.parametrize("keys, value, words", [
    (("model", "method"), "mollo", "unknown method 'mollo'. Did you mean 'molo'?"), (("model", "backbone"), "resnet51", "unknown backbone 'resnet51'. Did you mean"),
    (("model", "options"), {"scales": 3}, "method 'protonet' has no option 'scales'. Did you mean 'scale'?"), (("model", "options"), {"scale": "big"}, "wants a number, got 'big'"),
    (("model", "sampler"), "vym", "unknown sampler 'vym'"), (("model", "frames"), "four", "configuration key 'frames' must be a whole number, got 'four'"), (("model", "frame"), 8, "unknown key 'model.frame'. Did you mean 'frames'?"), (("model", "method"), None, "lacks the key 'model.method'"),
    (("model",), [], "model is not a mapping"), (("model", "backbone"), "resnet18", "do not fit the model built from its config.json"), (("model", "classes"), 7, "2 tensors differ, first 'classifier.bias'"),
    (("preprocessing", "size"), 64, "configuration key 'size' (64) is larger"), (("preprocessing", "size"), "32", "configuration key 'size' must be a whole number, got '32'"), (("preprocessing", "crop"), 3, "unknown key 'preprocessing.crop'"),
    (("library",), "transformers", "is not the configuration of a model of fsar"), (("format",), 99, "newer than this one"), (("modell",), {}, "unknown key 'modell'. Did you mean 'model'?"), (("license",), None, "lacks the key 'license'"),
    (("files", "model.safetensors"), "0" * 64, "is damaged or was altered"), (("files", "model.pkl"), "0", "unknown key 'files.model.pkl'")])
def test_a_wrong_configuration_is_refused(shared, keys, value, words):
    change(shared / CONFIG, *keys, value=value)
    said = message(load_pretrained, shared)
    assert str(shared) in said and (words in said)


@pytest.mark.parametrize("content, words", [(b"{", "is not valid JSON"), (b"[]", "is not the configuration"), (b"\xff", "is not valid JSON")])
def test_a_broken_configuration_is_refused(shared, content, words):
    (shared / CONFIG).write_bytes(content)
    assert words in message(load_pretrained, shared)


def test_altered_and_missing_weights_are_refused(shared):
    content = bytearray((shared / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (shared / WEIGHTS).write_bytes(content)
    assert f"{shared / WEIGHTS} is damaged or was altered" in message(load_pretrained, shared)
    (shared / WEIGHTS).unlink()
    assert message(load_pretrained, shared) == f"{shared / WEIGHTS} is missing"


class Trap:
    def __init__(self, place): self.place = place
    def __reduce__(self): return Path.touch, (self.place,)


def test_nothing_is_unpickled(shared, tmp_path):
    trap = tmp_path / "sprung"
    for content in (pickle.dumps(Trap(trap)), None):
        if content is None: torch.save({"x": Trap(trap)}, shared / WEIGHTS)
        else: (shared / WEIGHTS).write_bytes(content)
        change(shared / CONFIG, "files", WEIGHTS, value=sha256_file(shared / WEIGHTS))  # with the right hash
        assert "is not a safetensors file" in message(load_pretrained, shared) and not trap.exists()
    assert pickle.loads(pickle.dumps(Trap(trap))) is None and trap.exists()  # the trap works


@pytest.mark.parametrize("place", ["", "nothing", "no/such", "./no/such", "molo-motion", Path("owner/name")])
def test_no_model_there(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "no").mkdir()
    monkeypatch.setattr(hub, "client", lambda: pytest.fail("the network was touched"))
    said = message(load_pretrained, place)
    assert "Accepted: a run's folder, a checkpoint's (model.json), a shared model's (config.json), or owner/name" in said
    assert ("Did you mean 'molo-motions-mini'?" in said) == (place == "molo-motion")


def test_a_local_model_never_touches_the_network(run, shared, monkeypatch):
    monkeypatch.setattr(hub, "client", lambda: pytest.fail("the network was touched"))
    monkeypatch.chdir(run.parent.parent)
    for place in ("reports/mine", run, str(shared), "molo-motions-mini"): load_pretrained(place)
    assert "is for a model on the hub" in message(load_pretrained, "reports/mine", revision="main")


# writing

def test_what_lies_there_is_replaced_only_when_asked_to(shared):
    before = (shared / WEIGHTS).read_bytes()
    (shared / ".git").mkdir(); (shared / "notes.txt").write_text("mine")
    other = pretrained("otam")
    assert f"{shared} holds {CONFIG} already" in message(save_pretrained, other, shared) and (shared / WEIGHTS).read_bytes() == before
    save_pretrained(other, shared, overwrite=True)
    assert load_pretrained(shared).identity == other.identity and (shared / "notes.txt").read_text() == "mine" and (shared / ".git").is_dir()


def test_an_interrupted_writing_is_noticed(shared, monkeypatch):
    monkeypatch.setattr(hub, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): save_pretrained(Pretrained(small(seed=4), Preprocessing(48, 32)), shared, overwrite=True)
    assert "is damaged or was altered" in message(load_pretrained, shared)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in message(save_pretrained, pretrained(), tmp_path / "file" / "model")


# the card

def test_the_card_says_what_the_run_measured(run, tmp_path):
    from huggingface_hub import ModelCard
    metrics = read_json(run / "metrics.json")
    text = (save_pretrained(load_pretrained(run), tmp_path / "words", license="cc-by-4.0") / CARD).read_text(encoding="utf-8")
    card = ModelCard(text)
    assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == ("fsar", "cc-by-4.0", "video-classification")
    for r, told in zip(metrics["results"], card.data.eval_results):
        assert told.metric_value == round(r["accuracy"], 4) and told.dataset_name == "motions-mini" and f"{100 * r['accuracy']:.1f} ± {100 * r['ci95']:.1f} %" in text
    for words in (metrics["command"], "hop, run", "those that did best on the val classes", "Intended use", "Limits", 'from_pretrained("words")', "time reversal", "`cc-by-4.0`", "Not calibrated"): assert words in text


def test_the_card_marks_weights_that_were_chosen_on_the_test_and_leaks(run):
    metrics = read_json(run / "metrics.json") | {"selected_on": "test"}
    metrics["data"]["notes"] = ["this test is not few-shot: hop was trained on"]
    card = model_card(replace(load_pretrained(run), test=results_of(metrics)), "x")
    assert "classes of the test itself" in card and "Note: this test is not few-shot" in card


def test_a_card_of_little_knowledge_says_so():
    card = model_card(pretrained("vim"), "x")
    for words in ("license: \"unknown\"", "has not stated a licence", "Not known: no test", "## Training data\n\nNot known."): assert words in card
    assert "model-index" not in card


# the hub

@pytest.mark.parametrize("place, name", [("someone/molo", "someone/molo"), ("hf://someone/molo", "someone/molo"), ("a-b/c.d_e", "a-b/c.d_e"), ("here/molo", None), ("./fsar/molo", None), ("/fsar/molo", None), ("fsar", None), ("a/b/c", None),
                                         ("~/molo", None), ("fsar/", None), ("fsar\\molo", None), (Path("someone/molo"), None)])
def test_what_is_a_name_on_the_hub(place, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub.hub_name(place) == name


def test_without_the_hubs_client_the_message_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'fsar[hub]'" in message(load_pretrained, "someone/molo") and "pip install 'fsar[hub]'" in message(push_to_hub, pretrained(), "someone/molo")


class FakeHub(http.server.BaseHTTPRequestHandler):
    "The part of the hub's protocol that three small files need. Repositories lie in `server.repos`: name → file → content."

    def answer(self, code: int, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for k, v in {"Content-Length": len(body), **headers}.items(): self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, repos = urlsplit(self.path).path, self.server.repos
        self.server.asked.append(("POST", path))
        if self.headers.get("Authorization") != "Bearer good": return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            repos.setdefault(name, {})
            return self.answer(200, {"url": f"{self.server.url}/{name}", "id": name, "name": name})
        if path == "/api/validate-yaml": return self.answer(200, {"errors": [], "warnings": []})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path: return self.answer(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file": repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer(200, {"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.server.url}/{name}/commit/{'c' * 40}", "hookOutput": ""})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        parts = path.strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repos.get(name)
        if files is None: return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if parts[0] == "api": return self.answer(200, [{"type": "file", "path": f, "size": len(x), "oid": "0" * 40} for f, x in files.items()] if "tree" in parts else {"id": name, "sha": "c" * 40, "siblings": [{"rfilename": f} for f in files], "tags": [], "private": False, "downloads": 0, "likes": 0})
        content = files.get(parts[-1])
        if content is None: return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit="c" * 40)
        self.answer(200, content, ETag=f'"{hash(content) % 10**12}"', X_Repo_Commit="c" * 40)

    do_HEAD = do_GET
    def log_message(self, *args): pass


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.url, server.repos, server.asked = f"http://127.0.0.1:{server.server_port}", {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(); server.server_close()


def test_to_the_hub_and_back(fake_hub):
    one = pretrained("molo")
    address = push_to_hub(one, "someone/molo-small", endpoint=fake_hub.url, token="good", license="mit")
    assert address.endswith("someone/molo-small") and set(fake_hub.repos["someone/molo-small"]) >= {CONFIG, WEIGHTS, CARD}
    fake_hub.repos["someone/molo-small"] |= {"pytorch_model.bin": b"a pickle", "code.py": b"print(1)"}  # what others might put beside
    two = load_pretrained("someone/molo-small", endpoint=fake_hub.url)
    assert two.identity == one.identity and two.license == "mit" and torch.equal(logits(one.model), logits(two.model))
    assert not [path for _, path in fake_hub.asked if path.endswith((".bin", ".py"))]  # never asked for
    assert 'from_pretrained("someone/molo-small")' in fake_hub.repos["someone/molo-small"][CARD].decode()


def test_the_hubs_refusals_are_one_line_each(fake_hub):
    assert "cannot get someone/nothing from the Hugging Face hub: there is no such repository, or it is private" in message(load_pretrained, "someone/nothing", endpoint=fake_hub.url)
    said = message(push_to_hub, pretrained(), "someone/molo", endpoint=fake_hub.url, token="bad")
    assert said.startswith("cannot write someone/molo to the Hugging Face hub:") and "log in" in said
    fake_hub.repos["someone/other"] = {"pytorch_model.bin": b"a pickle"}
    assert "config.json" in message(load_pretrained, "someone/other", endpoint=fake_hub.url)


@pytest.mark.parametrize("name", ["molo", "a/b/c", "", "-a/b", "a/ b"])
def test_names_that_the_hub_does_not_take(name):
    assert "accepted: owner/name" in message(push_to_hub, pretrained(), name)


def test_a_hub_that_does_not_answer():
    assert message(load_pretrained, "someone/molo-nowhere", endpoint="http://127.0.0.1:9").endswith("the hub does not answer, and it is not in this machine's cache")
    assert message(push_to_hub, pretrained(), "someone/molo", endpoint="http://127.0.0.1:9", token="x") == "cannot write someone/molo to the Hugging Face hub: the hub does not answer"
