"""The papers' claims: what is made of the figures, and that the tables of teachers, arms and claims hold together."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from benchmarks.paper import __main__ as script
from benchmarks.paper.claims import ARMS, CANDIDATES, CLAIMS, CURVE, TEACHERS, Lower, Settles, needed
from benchmarks.paper.picture import drawn
from benchmarks.paper.results import COLUMNS, VIEWS, arms_table, rows, table
from benchmarks.paper.verdicts import CONTRADICTED, REPRODUCED, UNRESOLVED, Interval, interval, together, verdict
from minitron.arch.arch import Arch
from minitron.config.compose import compose
from minitron.config.schema import Parallel, Target
from minitron.pruning.target import target_arch

ROOT = Path(__file__).parents[2]
SMOLLM2 = Arch("llama", 30, 576, 1536, 9, 3, 64, 49152, 2048, share_embeddings_and_output_weights=True)
STORIES = Arch("llama", 5, 64, 172, 8, 4, 8, 512, 512, share_embeddings_and_output_weights=True)


def test_an_interval_is_students():
    found = interval([1.0, 2.0, 3.0])  # deviation 1; the quantile of t with 2 degrees of freedom is 4.30265
    half = 4.30265273 / math.sqrt(3)
    assert [found.mean, found.low, found.high] == pytest.approx([2.0, 2.0 - half, 2.0 + half])
    assert interval([0.5, 0.5]) == Interval(0.5, 0.5, 0.5)
    assert interval([0.5]) == Interval(0.5, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (0.01, 0.2, None, REPRODUCED),
        (-0.01, 0.2, None, UNRESOLVED),
        (0.0, 0.0, None, UNRESOLVED),
        (-0.2, -0.01, None, CONTRADICTED),
        (-math.inf, math.inf, None, UNRESOLVED),
        (-0.01, 0.015, 0.02, REPRODUCED),
        (0.001, 0.015, 0.02, REPRODUCED),
        (-0.03, 0.015, 0.02, UNRESOLVED),
        (0.01, 0.03, 0.02, UNRESOLVED),
        (0.021, 0.03, 0.02, CONTRADICTED),
        (-0.03, -0.021, 0.02, CONTRADICTED),
        (-math.inf, math.inf, 0.02, UNRESOLVED),
    ],
)
def test_a_verdict_follows_from_where_the_interval_lies(low, high, margin, expected):
    assert verdict(Interval((low + high) / 2, low, high), margin) == expected


def test_a_claim_is_worth_its_worst_comparison():
    assert together([REPRODUCED, REPRODUCED]) == REPRODUCED
    assert together([REPRODUCED, UNRESOLVED]) == UNRESOLVED
    assert together([UNRESOLVED, CONTRADICTED, REPRODUCED]) == CONTRADICTED


def test_claims_compare_arms_that_exist():
    used = {arm for claim in CLAIMS.values() for comparison in claim.comparisons for arm in comparison.arms}
    assert used == set(ARMS), "an arm is in a claim, and the other way round"
    for claim in CLAIMS.values():
        for comparison in claim.comparisons:
            if isinstance(comparison, Lower):
                assert comparison.when == "before" or all(ARMS[arm].budget for arm in comparison.arms)
            else:
                assert comparison.share in CURVE
    assert needed(["kd_over_ce", "pruned_init"]) == ["width", "random init", "CE"]


@pytest.mark.parametrize("name", TEACHERS)
def test_the_cuts_of_a_teacher_are_equally_large(name):
    teacher = TEACHERS[name]
    shape = teacher.shape
    arch = {"smollm2_135m": SMOLLM2, "stories260k": STORIES}.get(name) or Arch(
        "llama", shape["num_hidden_layers"], shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"],
        shape["num_key_value_heads"], shape["head_dim"], shape["vocab_size"], shape["max_position_embeddings"],
        share_embeddings_and_output_weights=True,
    )  # fmt: skip
    sizes = {}
    for arm, one in ARMS.items():
        settings = [setting.split("=") for part in one.parts for setting in teacher.parts[part]]
        target = Target(**{key.removeprefix("target."): int(value) for key, value in settings if key.startswith("target.")})
        sizes[arm] = target_arch(arch, target, Parallel()).num_parameters()
    small = {arm: count for arm, count in sizes.items() if arm.startswith("small")}
    alike = [count for arm, count in sizes.items() if arm not in small]
    assert max(alike) / min(alike) < 1.02
    assert all(arch.num_parameters() / count > 3.5 for count in small.values())


def test_the_settings_of_all_arms_compose():
    teacher = TEACHERS["openstax"]
    for own in {(*one.settings, *(setting for part in one.parts for setting in teacher.parts[part])) for one in ARMS.values()}:
        assert compose("compress", [*teacher.settings, *own, "run.dir=here", "model.path=there"]).dtype == "fp32"


def losses(before, after=None, **curve):
    """An arm's figures, as far as rows are made of them."""
    text = {"kl": 0.5, "texts": {"wikitext2": {"loss": 9.0, "kl": 1.0}}}
    found = {"before": {"loss": before, **text}, "curve": {"0.0": before, **curve}, "tokens": 1000, "processor_seconds": 6.0, "params": 2_000_000}
    return found if after is None else {**found, "after": {"loss": after, **text}}


def test_rows_are_paired_by_seed():
    found = {
        "width": {1: losses(5.0, 2.0), 2: losses(5.1, 3.0), 3: losses(5.2, 4.0), 4: losses(5.2, 4.0)},
        "random init": {1: losses(7.0, 2.5), 2: losses(7.0, 3.5), 3: losses(7.0, 4.5)},
    }
    (row,) = rows(["pruned_init"], found)
    assert set(row) == set(COLUMNS)
    assert (row["difference"], row["low"], row["high"], row["outcome"], row["verdict"]) == (0.5, 0.5, 0.5, REPRODUCED, REPRODUCED)
    assert (row["seeds"], row["M tokens"], row["minutes"]) == (3, 0.006, 0.6), "the seeds that all its arms have"
    assert rows(["kd_over_ce"], found) == []


def test_a_single_seed_resolves_nothing():
    found = rows(["pruned_init"], {"width": {1: losses(5.0, 2.0)}, "random init": {1: losses(5.0, 9.0)}})
    assert (found[0]["low"], found[0]["verdict"]) == (None, UNRESOLVED)
    assert "no interval" in table({"rows": found})


def test_an_order_that_settles():
    def arm(number, before, middle, last):
        return {CANDIDATES[number]: losses(before, last, **{"0.25": middle})}

    figures = {**arm(0, 3.0, 1.0, 0.5), **arm(1, 2.0, 2.0, 0.6), **arm(2, 1.0, 3.0, 0.7)}
    assert Settles(CANDIDATES[:3], 0.25).difference(figures.__getitem__) == 2.0  # from the opposite order to the same


@pytest.fixture
def results():
    """Of one claim, as benchmarks/claims.py writes them."""
    found = {
        "width": {1: losses(5.0, 2.0), 2: losses(5.0, 2.0)},
        "few tokens": {1: losses(5.0, 2.5), 2: losses(5.0, 2.7)},
        "many tokens": {1: losses(5.0, 2.0), 2: losses(5.0, 2.002)},
        "seq mean": {1: losses(5.0), 2: losses(5.0)},
    }
    arms = {arm: {str(seed): one for seed, one in seeds.items()} for arm, seeds in found.items()}
    return {"rows": rows(["top_k"], found), "arms": arms, "teacher": {"params": 3_000_000, "loss": 1.5, "texts": {"wikitext2": 4.0}}}


def test_the_table_has_a_line_for_each_comparison(results):
    lines = table(results).splitlines()
    assert len(lines) == 4
    assert lines[2].split(" | ")[2:5] == ["width < few tokens: +0.600 (-0.671 to +1.871)", UNRESOLVED, f"**{UNRESOLVED}**"]
    assert lines[3] == "| | | width = many tokens: +0.001 (-0.012 to +0.014, within ±0.02) | reproduced | | | |"
    assert arms_table(results).splitlines()[2:] == [
        "| *teacher* | 3.00 M | | 1.500 | | 4.000 | |",
        "| width | 2.00 M | 5.000 | 2.000 | 0.500 | 9.000 | 1.000 |",
        "| few tokens | 2.00 M | 5.000 | 2.600 | 0.500 | 9.000 | 1.000 |",
        "| many tokens | 2.00 M | 5.000 | 2.001 | 0.500 | 9.000 | 1.000 |",
    ]


def test_the_picture_names_what_is_compared(results):
    text = drawn(results)
    assert text == drawn(results), "the same file each time"
    assert all(f">{row['compared'].replace('<', '&lt;')}<" in text for row in results["rows"])


@pytest.mark.parametrize("file", sorted({file for file, _ in VIEWS.values()}))
def test_verdicts_in_the_documents_follow_from_the_figures_of_the_arms(file):
    results = json.loads((ROOT / "docs" / "results" / f"{file}.json").read_text(encoding="utf-8"))
    found = {arm: {int(seed): one for seed, one in seeds.items()} for arm, seeds in results["arms"].items()}
    names = [claim for claim in CLAIMS if CLAIMS[claim].words in {row["claim"] for row in results["rows"]}]
    assert rows(names, found) == results["rows"]


def test_the_picture_in_the_documents_has_every_comparison():
    results = json.loads((ROOT / "docs" / "results" / "paper.json").read_text(encoding="utf-8"))
    picture = (ROOT / "docs" / "claims.svg").read_text(encoding="utf-8")
    assert [line for line in picture.splitlines() if "<text" in line] == [line for line in drawn(results).splitlines() if "<text" in line]


@pytest.mark.slow
def test_arms_are_run_once(tmp_path, monkeypatch):
    """Two arms on the real stories260K, a few steps each; the same command again computes none of it, further steps all of it."""
    if not (data := script.test_data()).is_dir():
        pytest.skip("MINITRON_TEST_DATA names no folder")
    teacher = dataclasses.replace(script.TEACHERS["stories260k"], training=())
    small = [
        f'data.train="{data}/text/wikitext2_test.docs.jsonl"', "data.text_key=page", "eval.texts={}", "train.warmup_steps=1",
        "train.eval_tokens=1024", "eval.tokens=1024", "calibrate.samples=8", "device=cpu",
    ]  # fmt: skip
    begun, run = [], script.Seed.run
    monkeypatch.setattr(script.Seed, "run", lambda self, name, parts: (begun.append(name), run(self, name, parts))[1])

    def once(steps):
        begun.clear()
        return script.run(teacher, tmp_path, ["kd_over_ce"], 1, [*small, f"train.steps={steps}"])

    known, found = once(4)
    assert begun == ["width", "CE"]
    after = {arm: found[arm][1]["after"] for arm in begun}
    assert found["width"][1]["tokens"] == 4 * 8 * 128
    assert after["width"] != after["CE"] and found["width"][1]["before"] == found["CE"][1]["before"], "one cut, two losses"
    assert after["width"]["kl"] < found["width"][1]["before"]["kl"]
    assert once(4) == (known, found) and begun == []
    assert once(5)[1]["CE"] != found["CE"] and begun == ["width", "CE"]
