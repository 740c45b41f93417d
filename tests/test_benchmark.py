"""The benchmark: fair turns, honest gaps, and a summary that refuses every missing field."""
import copy
import csv
import io
import json
import random
import re
import sys
import time
from collections import Counter
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from vidgen import cli, runs
from vidgen.clip import Clip
from vidgen.errors import Canceled
from vidgen.evaluate import benchmark as bench
from vidgen.evaluate import benchmark_command, summary, timing
from vidgen.evaluate.benchmark import COLUMNS, Results, Setting, benchmark, comparisons, ratios, save, settings_grid, summarise, table, text, turns
from vidgen.evaluate.compare import table_csv
from vidgen.evaluate.timing import HostPeak
from vidgen.models import family
from vidgen.world import parse, render, scene

STAR = "a red star moving left on a white background"
PROMPTS = [STAR, "a blue circle moving up on a grey background", "a green square moving right on a black background"]


@pytest.fixture
def clock(monkeypatch):
    "Time that only passes when somebody says so."
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now.value)
    return now


class Maker:
    "Draws small clips; takes as many seconds as `seconds` says for its n-th clip."

    def __init__(self, clock=None, seconds=lambda n: 1.0, broken=(), first_frame=None, weights="abc", grey=False):
        self.clock, self.seconds, self.broken, self.first_frame, self.weights, self.grey, self.made = clock, seconds, broken, first_frame, weights, grey, []

    def generate(self, prompt, *, seed, progress, **options):
        n = len(self.made)
        self.made.append((prompt, seed, options))
        if n in self.broken:
            raise RuntimeError(f"clip {n} burst")
        spent = self.seconds(n)
        if self.clock:
            self.clock.value += spent
        frames = np.full((5, 32, 48, 3), 128, np.uint8) if self.grey else render(scene(seed, **parse(prompt)), num_frames=5, width=48, height=32).frames
        made = {"text": 0.1 * spent, "denoise": 0.7 * spent, "decode": 0.2 * spent, "per_step": 0.07 * spent} | ({"first_frame": self.first_frame} if self.first_frame else {})
        return [Clip(frames, 8, {"prompt": prompt, "seed": seed, "seconds": made})]


def of(makers):
    "A loader that knows these makers by model name, and no optimised path."
    def load(setting, **options):
        return makers[setting.model] if setting.mode == "baseline" else bench.load_setting(setting)
    return load


def bench_of(makers, prompts=PROMPTS, seeds=(0, 1), extra=(), **options):
    return benchmark([*settings_grid(list(makers)), *extra], prompts, seeds, load=of(makers), **options)


# settings

def test_settings_have_plain_names_of_their_own():
    found = settings_grid(["shapes-t2v", "some/folder of mine"], mode="both", steps=[25, 10], guidance=[3.0, None])
    names = [s.name for s in found]
    assert len(set(names)) == len(found) == 16 and all(re.fullmatch(r"[\w.-]+", n) for n in names)
    assert names[0] == "shapes-t2v-baseline-25-steps-guidance-3" and found[0].options == {"num_inference_steps": 25, "guidance_scale": 3.0} and found[1].mode == "optimized"


@pytest.mark.parametrize(("given", "says"), [({"mode": "optimised"}, "nearest: optimized"), ({"steps": [5, 5]}, "each once"), ({"models": []}, "none")])
def test_bad_settings(given, says):
    with pytest.raises(ValueError, match=says):
        settings_grid(**({"models": ["m"]} | given))


def test_every_setting_goes_first_equally_often():
    order = turns(["a", "b", "c"], 9)
    for place in range(3):
        assert Counter(names[place] for names in order) == {"a": 3, "b": 3, "c": 3}


# the measuring

def test_same_prompts_and_seeds_for_all_and_the_warm_up_does_not_count(clock):
    makers = {name: Maker(clock, lambda n, t=t: 100.0 if n < 2 else t) for name, t in (("a", 2.0), ("b", 1.0))}
    results = bench_of(makers, warm_up=2)
    assert makers["a"].made == makers["b"].made and len(makers["a"].made) == 2 + 6
    assert results.of(results.settings[0], "seconds").tolist() == [2.0] * 6 and ratios(results)[0]["latency"]["value"] == 2.0
    found = summarise(results)["settings"][1]
    assert found["latency"]["value"] == 1.0 and found["clips_per_minute"]["value"] == 60 and found["frames_per_second"]["value"] == 5 and found["clips"] == 6
    assert found["stages"] == pytest.approx({"text": 0.1, "denoise": 0.7, "decode": 0.2}) and summarise(results)["protocol"]["rounds"] == 6


def test_a_machine_that_slows_down_does_not_favour_anybody(clock):
    pace = SimpleNamespace(n=0)

    def slower(base):
        def seconds(n):
            pace.n += 1
            return base * 1.1 ** pace.n     # every clip 10 % slower than the one before
        return seconds
    results = bench_of({"a": Maker(clock, slower(2.0)), "b": Maker(clock, slower(1.0))}, warm_up=0)
    assert ratios(results)[0]["latency"]["value"] == pytest.approx(2.0, rel=0.02)
    seconds = [results.of(s, "seconds") for s in results.settings]
    assert seconds[0][-1] / seconds[1][0] > 3.5     # what one after the other would have said


def test_medians_forgive_one_hiccup(clock):
    results = bench_of({"a": Maker(clock, lambda n: 50.0 if n == 3 else 1.0)})
    assert summarise(results)["settings"][0]["latency"]["value"] == 1.0


def test_quality_is_measured_outside_the_clock(clock, monkeypatch):
    for module in (bench, timing):
        monkeypatch.setattr(module, "worth", lambda clip, prompt, world: setattr(clock, "value", clock.value + 1000) or {"temporal_stability": 0.9, "dynamic_degree": 0.1, "as_asked": None, "reason": ""})
    assert bench_of({"a": Maker(clock)}).of(Setting("a"), "seconds").tolist() == [1.0] * 6


def test_first_frame_is_known_or_streamed(clock):
    results = bench_of({"whole": Maker(clock), "streaming": Maker(clock, first_frame=0.25)})
    rows = {r["setting"]: r for r in results.rows}
    assert (rows["whole-baseline"]["first_frame_seconds"], rows["whole-baseline"]["first_frame"]) == (1.0, "with the whole clip")
    assert (rows["streaming-baseline"]["first_frame_seconds"], rows["streaming-baseline"]["first_frame"]) == (0.25, "streamed")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_one_clip_does_not_inherit_anothers_peak():
    with HostPeak() as large:
        block = np.ones(2**24)
    del block
    with HostPeak() as small:
        pass
    assert large.rise > 0.1 and small.rise < 0.05 and large.gib > large.rise


def test_without_proc_the_peak_is_not_measured(monkeypatch, clock):
    monkeypatch.setattr(HostPeak, "_status", lambda self, key: (_ for _ in ()).throw(OSError("no /proc")))
    found = summarise(bench_of({"a": Maker(clock)}))["settings"][0]
    assert found["peak_host"]["value"] is None and "can't tell" in found["peak_host"]["reason"] and found["peak_device"]["reason"] == "no GPU was used"


# what fails, and what isn't there

def test_one_broken_clip_is_a_row(clock):
    results = bench_of({"a": Maker(clock, broken={3}), "b": Maker(clock)})
    assert Counter(r["status"] for r in results.rows) == {"measured": 11, "failed": 1}
    found = summarise(results)["settings"][0]
    assert (found["clips"], found["failed"], found["reason"]) == (5, 1, "RuntimeError: clip 3 burst") and comparisons(results)[0]["latency"].n == 5


def test_what_does_not_load_is_not_measured_and_the_others_go_on(clock):
    def load(setting, **options):
        if setting.model == "huge":
            raise MemoryError("it takes 80 GiB")
        return Maker(clock)
    results = benchmark(settings_grid(["a", "huge"]), PROMPTS, load=load)
    found = {s["name"]: s for s in summarise(results)["settings"]}
    assert found["huge-baseline"]["status"] == "not measured" and found["huge-baseline"]["reason"] == "it takes 80 GiB" and found["a-baseline"]["clips"] == 3


def test_the_optimised_path_that_is_not_there_is_never_faked(clock, tmp_path):
    results = bench_of({"a": Maker(clock)}, extra=[Setting("a", "optimized")])
    row, = [r for r in results.rows if r["mode"] == "optimized"]
    assert row["status"] == "not measured" and row["reason"] == "there is no optimized path yet"
    assert not [k for k, v in row.items() if v is not None and k not in ("setting", "mode", "model", "status", "reason")]
    found = save(results, tmp_path)
    assert found["protocol"]["mode"] == "both" and found["ratios"] == [] and all(v["value"] is None and v["reason"] for v in found["settings"][1].values() if isinstance(v, dict) and "value" in v)
    assert table(found)[2].count("not measured") == 7 and "there is no optimized path yet" in text(found)


def test_few_clips_that_all_fail_are_no_certainty(good):
    found = good[0]["settings"][0]["as_asked"]      # three of three right
    assert found["value"] == 1.0 and found["high"] == 1.0 and 0.3 < found["low"] < 0.5


def test_a_score_draws_prompts_whole():
    results = Results([Setting("a")], PROMPTS, list(range(20)), 0, {})
    for i, prompt in enumerate(PROMPTS):
        results.rows += [bench._row(Setting("a"), status="measured", prompt=prompt, seed=s, round=20 * i + s, seconds=1.0, frames=5, temporal_stability=0.2 + 0.3 * i) for s in range(20)]
    found = summarise(results)["settings"][0]["temporal_stability"]
    assert found["n"] == 60 and found["high"] - found["low"] > 0.3


def test_a_path_put_there_is_measured(clock, monkeypatch):
    monkeypatch.setitem(bench.LOADERS, "baseline", lambda s, **o: Maker(clock))
    monkeypatch.setitem(bench.LOADERS, "optimized", lambda s, **o: Maker(clock, lambda n: 0.5))
    results = benchmark(settings_grid(["a"], mode="both"), PROMPTS)
    assert ratios(results) and ratios(results)[0]["setting"] == "a-optimized" and ratios(results)[0]["latency"]["value"] == 2.0


def test_nothing_at_all(clock, tmp_path):
    results = benchmark([Setting("a", "optimized")], PROMPTS)
    found = save(results, tmp_path)
    assert results.measured == [] and found["comparisons"] == [] and {p.name for p in tmp_path.iterdir()} == {"benchmark.csv", "PROJECT_SUMMARY.json"}


def test_stopping_stops(clock):
    def stop(n):
        if n == 4:
            raise Canceled("enough")
        return 1.0
    with pytest.raises(Canceled, match="enough"):
        bench_of({"a": Maker(clock, stop)})


@pytest.mark.parametrize("given", [{"prompts": []}, {"seeds": []}, {"seeds": [1, 1]}, {"prompts": [STAR, STAR]}, {"warm_up": -1}])
def test_bad_requests(given, clock):
    with pytest.raises(ValueError, match="each once"):
        bench_of({"a": Maker(clock)}, **given)


# kept

def test_csv_has_every_column_and_no_words_for_numbers(clock, tmp_path):
    results = bench_of({"a": Maker(clock)}, extra=[Setting("a", "optimized")])
    rows = list(csv.DictReader(io.StringIO(table_csv(results.rows, COLUMNS))))
    assert list(rows[0]) == list(COLUMNS) and len(rows) == 7
    gap, made = [next(r for r in rows if r["mode"] == mode) for mode in ("optimized", "baseline")]
    assert gap["seconds"] == gap["prompt"] == "" and float(made["seconds"]) == 1.0 and made["prompt"] in PROMPTS


def test_everything_is_kept_and_hangs_together(clock, tmp_path):
    results = bench_of({"good": Maker(clock), "grey": Maker(clock, lambda n: 0.5, grey=True)}, seeds=range(4))
    found = save(results, tmp_path)
    assert summary.read(tmp_path) == found and {a["path"] for a in found["artifacts"]} == {p.name for p in tmp_path.iterdir()} - {"PROJECT_SUMMARY.json"}
    assert {a["name"]: a["kind"] for a in found["artifacts"]}["contact_sheet"] == "sheet" and len(found["artifacts"]) >= 5
    assert found["comparisons"][0]["names"] == ["good-baseline", "grey-baseline"] and found["settings"][0]["weights"] == "abc"


def test_a_run_gets_rounds_films_and_the_summary(clock, tmp_path, monkeypatch):
    told = []

    class Probe(runs.Tracker):
        def log(self, step, metrics):
            told.append((step, metrics))

        def file(self, name, path):
            told.append(path.name)

    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path))
    monkeypatch.setitem(runs.TRACKERS, "mlflow", Probe)
    monkeypatch.setenv("VIDGEN_TRACKING_TRACKERS", "mlflow")
    monkeypatch.setattr(bench, "LOADERS", {"baseline": lambda s, **o: Maker(clock), "optimized": None})
    found, results, run = benchmark_command.run_on_record([Setting("a")], PROMPTS, [0], margins={"temporal_stability": 0.1}, load={})
    assert run.status == "succeeded" and run.manifest["prompts"] == PROMPTS and run.params["num_prompts"] == 3 and run.manifest["stages"]["a-baseline"] == 3.0
    assert [step for step, _ in (t for t in told if isinstance(t, tuple))] == [0, 1, 2] and "a-baseline/latency" in told[0][1]
    assert {"PROJECT_SUMMARY.json", "benchmark.csv", "000-seed-0.mp4"} <= {t for t in told if isinstance(t, str)}
    assert summary.read(run.path / "artifacts")["run"] == run.path.name == found["run"]


# the schema

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A summary with something in every list."
    results = Results([Setting("a"), Setting("b"), Setting("a", "optimized")], PROMPTS, [0], 1, {"temporal_stability": 0.1}, missing={"a-optimized": "there is none"})
    for i, prompt in enumerate(PROMPTS):
        for s, t in ((Setting("a"), 1.0), (Setting("b"), 2.0)):
            results.rows.append(bench._row(s, status="measured", prompt=prompt, seed=0, round=i, seconds=t + 0.01 * i, first_frame_seconds=t, frames=5, denoise_seconds=0.9 * t, temporal_stability=0.9 - 0.01 * i,
                                           as_asked=1.0, peak_host_gib=1.0))
    folder = tmp_path_factory.mktemp("summary")
    (folder / "rows.csv").write_text("a\n")
    found = summarise(results, artifacts=summary.references([folder / "rows.csv"], folder))
    found |= {"metrics": [{"metric": "fvd@world", "value": None, "n": 0, "direction": "lower", "version": "1"}], "notes": ["x"]}
    found["environment"]["gpus"] = [{"name": "x"}]
    summary.check(found, folder=folder)
    return found, folder


def required(schema, value, path=()):
    "Every required field of a schema that a value has, as paths."
    if isinstance(value, dict):
        for key in schema.get("required", ()):
            yield (*path, key)
        for key, inside in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            yield from required(inner, inside, (*path, key)) if isinstance(inner, dict) else ()
    elif isinstance(value, list) and value:
        for i, item in enumerate(value[:3]):
            yield from required(schema.get("items", {}), item, (*path, i))


def without(value, path):
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    return value


def test_every_missing_field_is_found_and_named(good):
    paths = list(required(summary.SCHEMA, good[0]))
    assert len(paths) > 150 and {p[0] for p in paths} == set(summary.SCHEMA["properties"]) == set(good[0])
    for path in paths:
        with pytest.raises(ValueError, match=rf"has no '{path[-1]}'"):
            summary.check(without(good[0], path))


def test_additions_are_found(good):
    for path in ((), ("protocol",), ("settings", 0), ("settings", 0, "latency"), ("artifacts", 0), ("ratios", 0)):
        broken = copy.deepcopy(good[0])
        inside = broken
        for key in path:
            inside = inside[key]
        inside["nobody"] = 1
        with pytest.raises(ValueError, match="'nobody', which nobody expects"):
            summary.check(broken)


def test_the_checker_agrees_with_jsonschema(good):
    other = jsonschema.Draft202012Validator(summary.SCHEMA)
    jsonschema.Draft202012Validator.check_schema(summary.SCHEMA)
    assert other.is_valid(good[0]) and not summary.faults(good[0], summary.SCHEMA)
    rng, wrong = random.Random(0), 0
    leaves = list(places(good[0]))
    for _ in range(400):
        broken, inside = copy.deepcopy(good[0]), None
        path = rng.choice(leaves)
        inside = broken
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = rng.choice([None, "", "x", -1, 0, 1.0, 2.5, True, [], {}, ["x"], {"x": 1}, "a" * 64, "not measured"])
        mine, theirs = not summary.faults(broken, summary.SCHEMA), other.is_valid(broken)
        assert mine == theirs, (path, inside[path[-1]])
        wrong += not mine
    assert 100 < wrong < 400


def places(value, path=()):
    "Every path in a JSON value."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield (*path, key)
        yield from places(inside, (*path, key))


@pytest.mark.parametrize(("schema", "good", "bad"), [
    ({"pattern": "^a+$"}, "aa", "ab"), ({"minItems": 2}, [1, 2], [1]), ({"minLength": 1}, "x", ""), ({"minimum": 0}, 0, -1), ({"const": 1}, 1, 2), ({"enum": ["a"]}, "a", "b"), ({"type": "integer"}, 2.0, True),
    ({"type": ["number", "null"]}, None, "1"), ({"items": {"type": "string"}}, ["a"], ["a", 1]), ({"required": ["a"]}, {"a": 1}, {}), ({"additionalProperties": False}, {}, {"a": 1}),
    ({"additionalProperties": {"type": "number"}}, {"a": 1}, {"a": "x"}), ({"properties": {"a": {"type": "null"}}}, {"a": None}, {"a": 1})])
def test_each_word_by_itself(schema, good, bad):
    for value, right in ((good, True), (bad, False)):
        assert (summary.faults(value, schema) == []) is right is jsonschema.Draft202012Validator(schema).is_valid(value)


def test_a_word_the_checker_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="maximum"):
        summary.faults(1, {"type": "integer", "maximum": 3})


@pytest.mark.parametrize(("path", "value", "says"), [
    (("settings", 0, "latency", "value"), None, "neither a value nor a reason"), (("settings", 0, "latency", "value"), 99.0, "not within"), (("settings", 0, "clips"), 0, "measured with 0 clips"),
    (("settings", 2, "reason"), "", "does not say why"), (("settings", 2, "clips"), 3, "not measured with 3 clips"), (("ratios", 0, "latency", "value"), -5.0, "not within")])
def test_what_a_schema_cannot_say(good, path, value, says):
    broken = copy.deepcopy(good[0])
    inside = broken
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    with pytest.raises(ValueError, match=says):
        summary.check(broken)


def test_evidence(good, tmp_path):
    found, folder = good
    for change, says in ((lambda p: p.unlink(), "is gone"), (lambda p: p.write_text("b\n"), "not the file"), (lambda p: p.write_text("longer"), "not the file")):
        (tmp_path / "rows.csv").write_text("a\n")
        summary.write(found, tmp_path)
        change(tmp_path / "rows.csv")
        with pytest.raises(ValueError, match=says):
            summary.read(tmp_path)
    outside = found | {"artifacts": [found["artifacts"][0] | {"path": "../rows.csv"}]}
    with pytest.raises(ValueError, match="outside"):
        summary.check(outside, folder=tmp_path)
    with pytest.raises(ValueError, match="lies outside"):
        summary.references([folder / "rows.csv"], tmp_path)
    with pytest.raises(FileNotFoundError):
        summary.references([tmp_path / "no"], tmp_path)


def test_a_broken_summary_is_not_written(good, tmp_path):
    with pytest.raises(ValueError):
        summary.write(good[0] | {"version": ""}, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="why"):
        summary.measure(None)


# the command

@pytest.fixture
def vidgen(tmp_path, monkeypatch, capsys):
    "Call the command line: (status, stdout, stderr)."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIDGEN_STORAGE_RUNS", str(tmp_path / "runs"))

    def call(*args):
        capsys.readouterr()
        status = cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())
    return call


def test_smoke_both_modes_as_csv(vidgen, tmp_path):
    family.save_parts(family.family("cogvideox").tiny("cogvideox-2b", words=STAR.split()), tmp_path / "tiny")
    status, out, err = vidgen("benchmark", "--mode", "both", "--csv", "--model", tmp_path / "tiny", "--steps", 2, "-n", 2, "--warm-up", 0, "--out", "kept")
    assert status == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert Counter((r["mode"], r["status"]) for r in rows) == {("baseline", "measured"): 2, ("optimized", "not measured"): 1}
    assert all(float(r["seconds"]) > 0 and float(r["denoise_seconds"]) > 0 and r["hash"] for r in rows if r["mode"] == "baseline")
    found = summary.read(tmp_path / "kept")
    assert found["settings"][0]["as_asked"]["reason"].startswith("only prompts of the world") and found["settings"][1]["reason"] == "there is no optimized path yet"
    run, = runs.find("benchmark", root=tmp_path / "runs")
    assert run.status == "succeeded" and run.manifest["model_hash"]["tiny-baseline-2-steps"] == found["settings"][0]["weights"]


def test_only_what_is_not_there(vidgen):
    status, out, _ = vidgen("benchmark", "--mode", "optimized", "--json", "-n", 1)
    assert status == 1 and json.loads(out)["settings"][0]["reason"] == "there is no optimized path yet"


@pytest.mark.parametrize(("args", "says"), [
    (["--mode", "optimised"], "nearest: optimized"), (["--csv", "--json"], "only one of them"), (["--margin", "0"], "above 0"), (["-n", "0"], "1 or more"), (["--model", "shapes-t3v"], "nearest: shapes-t2v"),
    (["--prompt", "x", "--prompts", "y"], "not both"), (["--prompts", "no.txt"], "no file"), (["--device", "gpu"], "unknown device"), (["--steps", "2", "--steps", "2"], "each once"),
    (["--image", "x.png"], "from text alone")])
def test_wrong_words_are_refused_before_anything_is_loaded(vidgen, tmp_path, args, says):
    start = time.perf_counter()
    status, _, err = vidgen("benchmark", *args)
    assert status == 2 and says in err and not (tmp_path / "runs").exists() and time.perf_counter() - start < 60


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("# mine\none\n\n two \none\n")
    (tmp_path / "a.yaml").write_text("prompts:\n- one\n- {prompt: two, kind: x}\n")
    (tmp_path / "none.txt").write_text("# nothing\n")
    assert benchmark_command.read_prompts(tmp_path / "a.txt") == benchmark_command.read_prompts(tmp_path / "a.yaml") == ["one", "two"]
    with pytest.raises(ValueError, match="holds no prompt"):
        benchmark_command.read_prompts(tmp_path / "none.txt")


def test_what_would_only_come_out_at_the_end_is_said_at_the_beginning():
    never = lambda setting, **options: pytest.fail("it was loaded")
    with pytest.raises(ValueError, match="2 settings are called 'x-baseline'.*a/x, b/x"):
        benchmark([Setting("a/x"), Setting("b/x")], ["p"], load=never)
    for seed in (-1, 0.5, True):
        with pytest.raises(ValueError, match="seeds are whole numbers from 0"):
            benchmark([Setting("x")], ["p"], [seed], load=never)


def test_seeds_that_all_agree_are_one_finding_a_prompt():
    setting = Setting("x")
    rows = [{"setting": setting.name, "status": "measured", "round": i, "prompt": str(i % 4), "as_asked": 1.0} for i in range(40)]
    found = bench._score(Results([setting], [], [], 0, {}, rows), setting, "as_asked", "share", "")
    assert found["n"] == 40 and found["high"] == 1 and found["low"] == pytest.approx(bench.wilson(4, 4).low)
