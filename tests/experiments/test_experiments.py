"A run's pieces without running one: data by name, provenance, parameters, folders, pages. (The whole run: test_cli.py.)"
import re
import dataclasses
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest

from fsar.experiments import protocol, runs as experiments
from fsar.reports import notebooks, provenance
from fsar.core.config import Config
from fsar.core.basics import FsarError
from fsar.core.files import resource, write_json
from fsar.data.datasets import Data, dataset_kind, prepare_data
from fsar.data.episodes import Episode

TEMPLATE = resource("templates") / "train.ipynb"


def notebook(path, *cells, tags=()):
    made = [nbformat.v4.new_code_cell(c, metadata={"tags": list(tags)}) for c in cells]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), path)
    return path


# the template

def test_the_parameters_cell_is_exactly_the_configuration():
    known = papermill.inspect_notebook(str(TEMPLATE))
    assert list(known) == [f.name for f in dataclasses.fields(Config)]
    notebooks.check_template(TEMPLATE, Config().to_dict())


def test_the_parameters_cell_has_the_defaults_and_types_of_the_configuration():
    cell = next(c for c in nbformat.read(TEMPLATE, 4).cells if "parameters" in c.metadata.get("tags", ()))
    values: dict = {}
    exec(cell.source, values)
    found = {f.name: values[f.name] for f in dataclasses.fields(Config)}
    assert found == Config().to_dict() and Config.from_dict(found) == Config()
    for name, kind in typing.get_type_hints(Config).items():
        wanted = list if typing.get_origin(kind) is tuple else str if typing.get_origin(kind) is typing.Literal else kind
        assert (typing.get_origin(values["__annotations__"][name]) or values["__annotations__"][name]) is wanted, name


def test_every_parameter_is_explained():
    lines = next(c for c in nbformat.read(TEMPLATE, 4).cells if "parameters" in c.metadata.get("tags", ())).source.splitlines()
    for k, line in enumerate(lines):  # after the value, or above it
        assert "  # " in line or line.startswith("# ") or lines[k - 1].startswith("# "), line


def test_the_template_is_not_executed_by_itself_and_knows_no_method():
    cells = nbformat.read(TEMPLATE, 4).cells
    assert "skip_exec: true" in cells[0].source
    code = "".join(c.source for c in cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", ()))
    assert not [f'"{name}"' for name in ("molo", "protonet") if f'"{name}"' in code]


@pytest.mark.parametrize("tags, given, words", [((), {"ways": 5}, "no cell tagged 'parameters'"), (["parameters"], {"ways": 5, "way": 1}, "Did you mean 'ways'"),
                                                (["parameters"], {}, "which no configuration sets")])
def test_a_template_that_does_not_fit_is_an_error(tmp_path, tags, given, words):
    path = notebook(tmp_path / "toy.ipynb", "ways: int = 5", tags=tags)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FsarError, match=words): notebooks.check_template(path, given)


def test_a_template_that_is_not_there(tmp_path):
    with pytest.raises(FsarError, match="no template 'nothing'"): experiments.run(Config(out=str(tmp_path / "out")), template="nothing")


# data

def test_an_unknown_data_set_names_the_nearest():
    with pytest.raises(FsarError, match="Did you mean 'motions-mini'"): dataset_kind(Config(dataset="motion-mini"))


def test_a_benchmark_wants_its_videos():
    with pytest.raises(FsarError, match="--videos FOLDER"): prepare_data(Config(dataset="ucf101"))


def test_a_folder_is_prepared_once_in_the_cache(tiny_motions, tmp_path, monkeypatch):
    monkeypatch.setenv("FSAR_CACHE", str(tmp_path))
    config = Config(dataset=str(tiny_motions), short_side=32, size=32)
    data = prepare_data(config, progress=False)
    assert data.store.path.parent == tmp_path / "stores" and data.name == tiny_motions.name
    assert prepare_data(config, progress=False).store.hash == data.store.hash and len(list((tmp_path / "stores").iterdir())) == 1
    other = prepare_data(config.replace(test_classes=[data.store.classes("test")[0]], train_classes=list(data.store.classes("train"))), progress=False)
    assert other.store.path != data.store.path and any("left out" in note for note in other.notes)


def test_store_may_lie_where_the_user_says(tiny_motions, tmp_path, monkeypatch):
    monkeypatch.setenv("FSAR_CACHE", str(tmp_path / "cache"))
    data = prepare_data(Config(dataset=str(tiny_motions), short_side=32, size=32, store=str(tmp_path / "mine")), progress=False)
    assert data.store.path == tmp_path / "mine" and not (tmp_path / "cache").exists()


def test_no_val_classes_is_an_error_unless_nothing_is_selected(tiny_store):
    index = tiny_store.index[tiny_store.index["split"] != "val"]
    data = Data("tiny", dataclasses.replace(tiny_store, index=index))
    with pytest.raises(FsarError, match="--protocol last"): protocol.validator(Config(), data, None, "fp32")
    assert protocol.validator(Config(protocol="last"), data, None, "fp32") is None
    assert protocol.validator(Config(validate_every=0), data, None, "fp32") is None


def test_test_episodes_are_the_same_for_every_method_and_seed(tiny_store):
    data = Data("tiny", tiny_store)
    tables = [protocol.table_of(Config(method=m, seed=s, test_queries=2), data, "test", 1, 20) for m, s in (("molo", 0), ("protonet", 7))]
    assert tables[0].hash == tables[1].hash
    assert protocol.table_of(Config(test_queries=2), data, "val", 1, 20).hash != tables[0].hash


def test_rivals_prefer_a_mistake():
    episode = Episode(classes=np.array([4, 2]), support=np.array([10, 11, 20]), support_labels=np.array([0, 0, 1]), query=np.array([12, 21]), query_labels=np.array([0, 1]))
    assert protocol.rivals(episode, np.array([0, 0])) == (1, [(20, 1), (10, 0)])
    assert protocol.rivals(episode, np.array([0, 1])) == (0, [(10, 0), (20, 1)])
    one_way = Episode(*(np.array(a) for a in ([4], [10], [0], [12], [0])))
    assert protocol.rivals(one_way, np.array([0])) == (0, [(10, 0)])


# provenance

def test_the_command_makes_the_configuration_again():
    from fsar.cli.main import parse
    config = Config(method="otam", options=("lam=0.2",), test_shots=(1, 3), flip=True, train_classes=("letter_*", "it's"), source=r"(.+)_\d+$", lr=5e-4, out="reports/my run")
    import shlex
    assert parse(shlex.split(provenance.to_command("fsar train", config))[1:]).config() == config
    assert provenance.to_command("fsar train", Config()) == "fsar train --out reports/quickstart"  # the folder always, so that another default changes nothing


def test_git_state_is_absent_outside_a_checkout(tmp_path, monkeypatch):
    import fsar
    monkeypatch.setattr(fsar, "__file__", str(tmp_path / "site" / "fsar" / "__init__.py"))
    assert provenance.git_state() is None


# streams and pages

@pytest.mark.parametrize("text, seen", [("a\rb\rc", "c"), ("10%\r20%\r\nnext\n", "20%\nnext\n"), ("\x1b[A\x1b[31mred\x1b[0m", "red"), ("plain\n", "plain\n"), ("", "")])
def test_settle_keeps_what_a_terminal_shows(text, seen):
    assert notebooks.settle(text) == seen


def test_tidy_merges_a_thousand_updates_and_keeps_the_order_of_the_rest(tmp_path):
    toy = nbformat.read(notebook(tmp_path / "toy.ipynb", "fit()"), 4)
    def stream(text, name="stderr"): return nbformat.v4.new_output("stream", name=name, text=text)
    toy.cells[0].outputs = [stream("hello\n", "stdout")] + [stream(f"\r{k}%") for k in range(1000)] + [nbformat.v4.new_output("display_data", data={"text/plain": "x"}), stream("bye\n", "stdout")]
    notebooks.tidy(toy)
    assert [(o.output_type, o.get("text")) for o in toy.cells[0].outputs] == [("stream", "hello\nbye\n"), ("stream", "999%"), ("display_data", None)]


def test_a_page_shows_no_code_no_bars_and_embeds_its_pictures(tmp_path):
    toy = nbformat.read(notebook(tmp_path / "toy.ipynb", "secret_code()"), 4)
    toy.cells.insert(0, nbformat.v4.new_markdown_cell("# A < B", metadata={}))
    toy.cells.insert(0, nbformat.v4.new_markdown_cell("hidden words", metadata={"tags": ["template"]}))
    toy.cells[-1].outputs = [nbformat.v4.new_output("stream", name="stderr", text="99%"), nbformat.v4.new_output("display_data", data={"image/png": "iVBORw0KGgo="}, metadata={"image/png": {"alt": "what it shows"}})]
    nbformat.write(toy, tmp_path / "toy.ipynb")
    text = notebooks.to_html(tmp_path / "toy.ipynb", tmp_path / "page.html").read_text()
    body = text[text.index("<body>"):]
    assert "secret_code" not in body and "99%" not in body and "hidden words" not in body
    assert 'src="data:image/png;base64,' in body and 'alt="what it shows"' in body and "http" not in text.replace("http-equiv", "")
    assert len(text) < 20_000


# the output folder

def state(folder, config, status):
    write_json(folder / "run.json", dict(config=config.to_dict(), config_hash=config.hash, template="train", status=status))


def test_another_configuration_is_not_overwritten_unless_asked(tmp_path):
    config = Config(out=str(tmp_path))
    state(tmp_path, config, "finished")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FsarError, match=r"a finished run of another configuration \(lr 0.001 → 0.01\).*--overwrite"):
        experiments.run(config.replace(lr=0.01))
    assert not experiments.is_finished(tmp_path, config.replace(lr=0.01), "train", True)
    notebooks.clear(tmp_path, "train")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


def test_an_unfinished_run_is_resumed_and_a_finished_one_reused(tmp_path):
    config = Config(out=str(tmp_path))
    state(tmp_path, config, "running")
    write_json(tmp_path / "metrics.json", {"headline": "61.2 %"})
    assert not experiments.is_finished(tmp_path, config, "train", False)
    state(tmp_path, config, "finished")
    assert experiments.is_finished(tmp_path, config.replace(workers=3), "train", False)
    (tmp_path / "metrics.json").unlink()
    assert not experiments.is_finished(tmp_path, config, "train", False)


@pytest.mark.parametrize("body, words", [("raise FsarError('class walk is empty')", "^class walk is empty$"), ("raise VideoError('a.mp4', 'cut off')", "a.mp4"),
                                         ("1 / 0", r"stopped with ZeroDivisionError: division by zero \(traceback: .*toy.ipynb\)")])
def test_a_failing_cell_leaves_its_traceback_and_one_line(tmp_path, body, words):
    source = notebook(tmp_path / "source.ipynb", "import sys\nfrom fsar.core.basics import FsarError\nfrom fsar.data.video import VideoError\n" + "\n".join(f"print('{k}%', end='\\r', file=sys.stderr)" for k in range(3)) + "\n" + body)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FsarError, match=words) as e: notebooks.produce(source, out, {}, {"template": "toy"}, progress=False)
    assert "\n" not in str(e.value)
    left = nbformat.read(out / "toy.ipynb", 4)
    assert [o.output_type for c in left.cells for o in c.get("outputs", []) if o.output_type == "error"] and not (out / "report.html").exists()


def test_a_read_only_output_folder_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(FsarError, match="cannot write .*file"): experiments.run(Config(out=str(blocked / "run")))


@pytest.mark.parametrize("place, words", [("nowhere", "no such folder"), ("empty", "there is no|nothing|no ")])
def test_evaluating_what_is_no_checkpoint(tmp_path, place, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FsarError, match=words): experiments.evaluate_checkpoint(tmp_path / place, {})


def test_a_run_from_before_a_field_existed_is_still_its_own(tmp_path):
    config = Config(method="protonet", out=str(tmp_path))
    older = {k: v for k, v in config.to_dict().items() if k != "sampler"}
    for status, reused in (("finished", True), ("running", False)):
        write_json(tmp_path / "run.json", dict(config=older, config_hash="of another set of fields", template="train", status=status))
        write_json(tmp_path / "metrics.json", {"config": older})
        assert experiments.is_finished(tmp_path, config, "train", False) is reused
    with pytest.raises(FsarError, match=r"an unfinished run of another configuration \(sampler '' → 'vim'\)"): experiments.is_finished(tmp_path, config.replace(sampler="vim"), "train", False)
    (tmp_path / "run.json").unlink()
    assert experiments.is_finished(tmp_path, config, "train", False) is False
    with pytest.raises(FsarError, match="sampler differ"): experiments.is_finished(tmp_path, config.replace(sampler="vim"), "train", False)


def test_importing_the_commands_is_light():
    assert subprocess.run([sys.executable, "-c", "import sys, fsar.cli.runs, fsar.cli.experiments; sys.exit('torch' in sys.modules)"]).returncode == 0


def test_a_report_without_its_run_is_made_again_but_not_replaced(tmp_path):
    mine = Config(method="protonet")
    write_json(tmp_path / "metrics.json", {"config": mine.to_dict()})
    assert experiments.is_finished(tmp_path, mine.replace(out=str(tmp_path)), "train", False) is False  # the same again
    with pytest.raises(FsarError, match="holds a report of another configuration .method, seed differ.: choose another --out"):
        experiments.is_finished(tmp_path, mine.replace(method="otam", seed=3), "train", False)
    assert experiments.is_finished(tmp_path, mine.replace(seed=3), "train", True) is False  # when told to
    with pytest.raises(FsarError, match="holds another kind of report: choose another --out"): experiments.compare_runs(["a", "b"], tmp_path)
    write_json(tmp_path / "metrics.json", {"runs": {}})  # a comparison of runs
    with pytest.raises(FsarError, match="another configuration"): experiments.is_finished(tmp_path, mine, "train", False)


def test_a_fresh_clone_can_run_the_demo_over_the_published_report():
    root = Path(__file__).parents[2]
    words = re.search(r"/fsar train (.*)", (root / "Makefile").read_text())[1].split()
    from fsar.cli.main import parse
    assert experiments.check_remake(root / "reports" / "quickstart", parse(["train", *words]).config()) is None


@pytest.mark.parametrize("metadata, words", [({}, "names no kernel"), ({"kernelspec": {"name": "no-such-kernel", "display_name": "x"}}, "needs the Jupyter kernel 'no-such-kernel', which is not installed .*python3.*ipykernel install")])
def test_a_template_whose_kernel_is_missing(tmp_path, metadata, words):
    nbformat.write(nbformat.v4.new_notebook(metadata=metadata), tmp_path / "odd.ipynb")
    with pytest.raises(FsarError, match=words): notebooks.execute(tmp_path / "odd.ipynb", tmp_path / "out.ipynb", {})
    assert not (tmp_path / "out.ipynb").exists()
