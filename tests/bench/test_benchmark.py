"The benchmark: references equal the library in float64, every item works at a small size, a wrong result is never timed, a report by the command line, resumed, refused and made again."
import json
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import nbformat
import papermill
import pytest
import torch

from fsar.bench import benchmark as bench_benchmark, items, measures as benchmark, references, report, timing
from fsar.cli import main as cli
from fsar.bench.items import ITEMS, Equality, Goal, Settings
from fsar.core.basics import FsarError
from fsar.core.files import read_json, resource, write_json
from fsar.model.matching import bimhm, otam
from fsar.model.registry import create_model
from fsar.reports.rerun import same_figures

QUICK = Settings(rounds=1, quick=True)
TEMPLATE = resource("templates") / "benchmark.ipynb"


# references

@pytest.mark.parametrize("shape", [(2, 3, 2, 8, 8), (1, 2, 2, 3, 7), (1, 2, 2, 7, 3), (1, 1, 1, 1, 5), (1, 1, 1, 2, 2), (1, 1, 2, 16, 16)])
@pytest.mark.parametrize("lam", [0.1, 0.5])
def test_otam_cell_by_cell_is_the_sweep(shape, lam):
    sim = torch.rand(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    ours, theirs = (benchmark.with_gradient(lambda x, f=f: f(x, lam), sim) for f in (otam, references.otam_cells))
    assert references.apart(ours, theirs) < 1e-12 and theirs[0].isfinite().all() and theirs[1].abs().max() > 0.1


def test_otam_cell_by_cell_against_all_paths():
    "The soft minimum over all paths, enumerated: nothing of either program's recursion."
    dist, lam = torch.rand(3, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1)), 0.1
    padded, last = torch.nn.functional.pad(dist, (1, 1)), 4

    def paths(row, m):
        "Costs of all ways from the first column to a cell."
        if m == 0: return [torch.zeros((), dtype=torch.double)]
        return [padded[row, m] + cost for i, j in references.predecessors(row, m, last) for cost in paths(i, j)]

    found = -lam * torch.logsumexp(-torch.stack(paths(2, last)) / lam, 0)
    assert torch.isclose(references.otam_table(dist[None, None], lam)[0, 0], found, atol=1e-12)


def test_bimhm_as_it_is_written():
    sim = torch.rand(2, 3, 4, 5, 6, dtype=torch.double)
    assert torch.equal(references.bimhm_plain(sim), bimhm(sim))


@pytest.mark.parametrize("cardinalities, labels", [("2,3", [0, 1, 2, 0, 1, 2]), ("1", [2, 0, 1]), ("2", [1, 0, 1, 2, 1, 1]), ("4", [0, 1, 2])])
def test_trx_in_loops_is_the_library(cardinalities, labels):
    model = create_model("trx", backbone="resnet_micro", options={"cardinalities": cardinalities, "width": 48, "dropout": 0.0}).double()
    for head in model.heads:  # so that scale and offset of the norm matter
        torch.nn.init.normal_(head.norm.weight, 1, 0.3); torch.nn.init.normal_(head.norm.bias, 0, 0.3)
    labels, draw = torch.tensor(labels), torch.Generator().manual_seed(0)
    support, query = (torch.rand(n, 6, 128, dtype=torch.double, generator=draw) for n in (len(labels), 4))
    model = benchmark.headless(model)

    def head(episode):
        embedding = model.embed(benchmark.as_clips(torch.cat([episode[0], episode[2]])))
        return model.score({k: x[:len(labels)] for k, x in embedding.items()}, labels, {k: x[len(labels):] for k, x in embedding.items()}, 3)

    def gradients(form):
        given = support.clone().requires_grad_(), labels, query.clone().requires_grad_()
        logits = form(given)
        return [logits, *torch.autograd.grad(logits.square().sum(), [given[0], given[2], *(p for h in model.heads for p in h.parameters())])]

    assert references.apart(gradients(head), gradients(lambda e: references.trx_each(model, [e], 3)[0])) < 1e-9


def test_a_difference_is_never_allowed_to_pass():
    x = torch.arange(4.0)
    for wrong in (x + 1, x * torch.nan, x[:2], [x, x]):
        with pytest.raises(FsarError, match="the library and its reference differ by .*, and 0.001 is allowed"): references.agreed(wrong, x, 1e-3, "numbers")
    assert references.agreed(x * 1.0001, x, 1e-3, "numbers") == pytest.approx(1e-4, rel=1e-2)


# items

@pytest.fixture(scope="module")
def quick():
    "Every item measured once, quickly: name → rows."
    return {}


@pytest.mark.parametrize("name", [name for name in ITEMS if ITEMS[name].judged])
def test_every_item_measures_and_compares(name, quick):
    quick[name] = rows = ITEMS[name].measure(QUICK)
    assert rows and all(json.loads(json.dumps(r)) == r for r in rows)
    for r in rows:
        value = r["measured"]["value"]
        assert r["device"] == "cpu" and r["case"] and r["unit"] and value["low"] <= value["median"] <= value["high"]
        assert value["median"] > 0 or r["counts"] == {"torch imported": 0} or r["case"] == "import fsar"  # a difference of two noisy times
        assert report.verdict(r, quick=True) == ("not judged" if r["goal"] else "–") and report.verdict(r) in ("met", "missed", "–")
        if r["equal"]: assert r["equal"]["holds"] and 0 <= r["measured"]["apart"] <= r["equal"]["tolerance"]
    assert (any(r["goal"] for r in rows) or name == "compile") and (any(r["equal"] for r in rows) or name == "start")
    assert len({r["case"] for r in rows}) == len(rows)


def test_videos_are_counted_not_supposed(quick):
    rows = quick.get("testing") or ITEMS["testing"].measure(QUICK)
    videos = next(r for r in rows if r["case"] == "videos embedded")
    assert videos["counts"] == {"ours": 24 * 100, "reference": 10_000 * 2 * (1 + 1)} and videos["measured"]["value"]["median"] == pytest.approx(40_000 / 2_400)


@pytest.mark.parametrize("name, broken", [("otam", "otam"), ("scoring", "scored"), ("trx", "trx_head"), ("testing", "scored")])
def test_a_wrong_result_is_never_timed(name, broken, monkeypatch):
    right = getattr(benchmark, broken)
    monkeypatch.setattr(benchmark, broken, lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    monkeypatch.setattr(benchmark, "in_turns", lambda *args, **kwargs: pytest.fail("the clock runs"))
    with pytest.raises(FsarError, match="the library and its reference differ"): ITEMS[name].measure(QUICK)


def test_plain_frames_are_planes_and_ours_are_not():
    ours, theirs = (create_model("protonet", backbone="resnet_micro").eval() for _ in range(2))
    references.plain(theirs)
    x, seen = torch.rand(2, 3, 16, 16), []
    for model in (ours, theirs): model.backbone.body[0][0].register_forward_pre_hook(lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last)))
    assert references.apart(ours.backbone(x), theirs.backbone(x)) < 1e-5 and seen == [True, False]


def test_originals_that_are_gone_are_named(tiny_store, monkeypatch):
    from fsar.data.augment import TrainTransform
    from fsar.data.episodes import EpisodeSampler
    monkeypatch.setattr(references, "original", lambda store, row: (None, False))
    with pytest.raises(FsarError, match=rf"{len(tiny_store)} originals of .* are not where they were, e.g. that of"):
        references.OriginalClips(tiny_store, EpisodeSampler(tiny_store, "train", ways=2, shots=1, queries=1, seed=0), frames=4, transform=TrainTransform(32))


# verdict, table, notes

TEN = Goal(10)


def rows_of(value=3.0, goal=TEN, unit="times as fast", **more):
    return {"item": "otam", **items.row("T = 8", Settings(), unit, [value * 0.9, value, value * 1.2], ours="a", reference="b", goal=goal, **more)}


@pytest.mark.parametrize("value, goal, said", [(3, Goal(10), "missed"), (10, Goal(10), "met"), (30, Goal(10), "met"), (1.6, Goal(1.5, most=True), "missed"), (1.5, Goal(1.5, most=True), "met"), (3, None, "–")])
def test_a_goal_is_met_or_missed(value, goal, said):
    metrics = {"rows": [rows_of(value, goal)], "settings": {"quick": False, "items": ["otam"], "devices": ["cpu"]}, "failed": {}}
    table = report.goal_table(metrics)
    assert table["verdict"].tolist() == [said] and table["measured"][0].endswith("times as fast") and report.goal_table(metrics | {"settings": {"quick": True}})["verdict"].tolist() == ["not judged" if goal else "–"]
    text = report.notes(metrics)
    assert ("What bounds it: the sweep" in text and "*Missed: T = 8 (" in text) == (said == "missed")
    assert ("missed: OTAM, forward and backward (T = 8)" in report.summary(metrics["rows"], False, {})) == (said == "missed")


def test_the_table_tells_rates_ratios_and_equality():
    rows = [rows_of(250, Goal(2000), "episodes/s", ratio=[4, 5, 6], equal=Equality("logits", tolerance=1e-4, apart=2e-6)), rows_of(12, rates={"ours": 400, "reference": 33.333}, rate_unit="clips/s")]
    table = report.goal_table({"rows": rows, "settings": {"quick": False}})
    assert table["goal"].tolist() == ["≥ 2,000 episodes/s", "≥ 10 times as fast"] and table["ours and the reference"].tolist() == ["5 (4 … 6) times as fast", "400 against 33.3 clips/s"]
    assert table["equal within"].tolist() == ["logits, 2e-06 of 1e-04", "–"] and table["measured"][0] == "250 (225 … 300) episodes/s"
    drawn = report.panels(rows)
    assert [(m.row["unit"], m.spread["median"], m.goal) for part in drawn.values() for m in part] == [("episodes/s", 5, None), ("times as fast", 12, 10)]
    assert report.panels(rows, quick=True)[report.FAST][1].goal is None


# the report

@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("benchmark") / "mine"
    assert cli.main(["bench", "--quick", "--items", "otam", "trx", "--rounds", "2", "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_the_report_by_the_command_line(made, says_its_origin):
    metrics, page = read_json(made / "metrics.json"), (made / "report.html").read_text()
    says_its_origin(metrics, made)
    assert metrics["settings"] == {"items": ["otam", "trx"], "rounds": 2, "quick": True, "devices": ["cpu"], "threads": torch.get_num_threads()} and metrics["failed"] == {}
    assert [r["item"] for r in metrics["rows"]] == ["otam", "otam", "trx", "trx"] and all(r["equal"]["holds"] for r in metrics["rows"])
    assert "a quick look" in metrics["headline"] and "goals are not judged" in page and "not judged" in page and "A quick look: sizes are small" in page and ">met<" not in page and "Traceback" not in page
    assert metrics["command"] == f"fsar bench --items otam trx --rounds 2 --quick --device cpu --out {made}" and metrics["command"] in page
    assert (made / "figures" / "ratios.png").stat().st_size > 5000 and sorted(p.name for p in (made / "items").iterdir()) == ["otam.json", "trx.json"]
    for r in metrics["rows"]: assert report.spread_text(r["measured"]["value"]) in page


def test_times_are_no_difference_between_two_benchmarks(made):
    metrics = read_json(made / "metrics.json")
    again = deepcopy(metrics)
    for r in again["rows"]:
        for name in ("median", "low", "high"): r["measured"]["value"][name] *= 3
        r["measured"]["apart"] /= 2
    again["headline"] = "another"
    found = same_figures(metrics, again)
    assert found.same and found.equal > 50
    again["rows"][0]["equal"]["holds"] = False
    assert [c.path for c in same_figures(metrics, again).changes] == ["rows[0].equal.holds"]
    assert same_figures(metrics, {**metrics, "rows": metrics["rows"][1:]}).changes[0].path == "rows"


def test_what_is_finished_is_reused_and_the_rest_is_measured(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FSAR_QUIET", "1")
    (tmp_path / "items").mkdir()
    kept = read_json(made / "items" / "otam.json")
    write_json(tmp_path / "items" / "otam.json", kept)
    measured = []
    monkeypatch.setattr(bench_benchmark, "measuring", lambda name, **how: lambda: measured.append(name) or [{"item": name, **r} for r in ITEMS[name].measure(QUICK)])
    assert cli.main(["bench", "--quick", "--items", "otam", "trx", "--rounds", "2", "--device", "cpu", "--out", str(tmp_path), "--json"]) == 0
    told = capsys.readouterr()
    assert measured == ["trx"] and "measured before: otam" in told.err
    metrics = json.loads(told.out)
    assert metrics["rows"][:2] == kept["rows"] and metrics["sound"] and len(metrics["rows"]) == 4
    write_json(tmp_path / "items" / "otam.json", kept | {"code": "0" * 64})  # of other source
    bench_benchmark.measure_all(["otam", "trx"], {"devices": ["cpu"], "rounds": 2, "quick": True}, tmp_path / "items", progress=False)
    assert measured == ["trx", "otam"]


def test_other_settings_are_refused_unless_overwritten(made, tmp_path, capsys):
    (tmp_path / "items").mkdir()
    write_json(tmp_path / "items" / "otam.json", read_json(made / "items" / "otam.json"))
    words = ["bench", "--quick", "--items", "otam", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(words) == 2 and re.search(r"otam.json holds a measurement with other settings \(rounds 2 → 1\): choose another --out, or start again with --overwrite", capsys.readouterr().err)
    assert not (tmp_path / "metrics.json").exists()
    assert cli.main([*words, "--overwrite"]) == 0 and read_json(tmp_path / "metrics.json")["settings"]["rounds"] == 1


def test_an_item_that_fails_is_told_and_spoils_nothing(tmp_path, capsys, monkeypatch):
    def failing(s): raise FsarError("no such thing here")
    monkeypatch.setitem(ITEMS._entries, "trx", replace(ITEMS["trx"], measure=failing))
    assert cli.main(["bench", "--quick", "--items", "trx", "otam", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]) == 1
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["failed"] == {"trx": "no such thing here"} and "NOT MEASURED: trx" in metrics["headline"] and {r["item"] for r in metrics["rows"]} == {"otam"}
    assert "Not measured: no such thing here" in (tmp_path / "report.html").read_text() and not (tmp_path / "items" / "trx.json").exists()  # it is tried again the next time


def test_a_measured_item_has_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_benchmark, "measuring", lambda **how: pytest.fail("measured in this process"))
    monkeypatch.setattr(bench_benchmark, "companion", lambda make, **how: timing.companion(make, **how | {"quick": True}))
    found = bench_benchmark.measure_item("otam", {"devices": ["cpu"], "rounds": 1, "quick": False}, tmp_path / "otam.json")
    assert [r["case"] for r in found["rows"]] == ["T = 4", "T = 6"] and read_json(tmp_path / "otam.json") == found


def test_what_cannot_be_asked(tmp_path, capsys):
    for words, said in ((["--items", "otam", "tr"], "unknown item of the benchmark 'tr'. Did you mean 'trx'? Known: automatic, compile, findings, growth, loader, memory, otam, profiles, scoring, start, step, testing, trx"), (["--rounds", "0"], "rounds must be at least 1, got 0"),
                        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "device 'cuda' is not available here; accepted: auto, cpu")])):
        assert cli.main(["bench", *words, "--out", str(tmp_path / "no")]) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    write_json(tmp_path / "metrics.json", {"sizes": []})
    assert cli.main(["bench", "--items", "otam", "--quick", "--out", str(tmp_path)]) == 2 and "another kind of report" in capsys.readouterr().err


def test_the_help_names_every_item_and_the_template_has_one_parameter():
    code = "import sys\nfrom fsar.cli.main import main\ntry: main(['bench', '--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stderr.strip() == "False" and all(name in answer.stdout for name in ITEMS)
    assert list(papermill.inspect_notebook(str(TEMPLATE))) == ["out"] and "skip_exec: true" in nbformat.read(TEMPLATE, 4).cells[0].source
