"""The report page of finished, partial, empty, broken and hostile run folders."""

import json
import re
import shutil
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minitron.errors import RequestError
from minitron.reporting.report import write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The page as a browser takes it: its tags balanced, its texts, table rows and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.attributes, self.rows, self.text = [], [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.text += text
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += text


def page_of(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run_tells_its_numbers(run_dir):
    page = page_of(run_dir)
    assert "SmolLM2-135M" in page.text
    assert "134.5 M parameters became 101.9 M." in page.text
    assert "distillation over 39.3 M tokens took back 82.7 % of that" in page.text
    for row in (
        ["teacher", "134.5 M", "100.0 %", "2.650", "14.15", ""],
        ["pruned", "101.9 M", "75.7 %", "4.380", "79.84", ""],
        ["student", "101.9 M", "75.7 %", "2.950", "19.11", "82.7 %"],
        ["Layers", "30", "30", "100 %"],
        ["Hidden size", "576", "512", "89 %"],
        ["MLP neurons per layer", "1,536", "1,152", "75 %"],
        ["KV cache per token, bf16", "22.5 KiB", "22.5 KiB", "100 %"],
        ["held-out", "teacher", "2.650", "14.15", "", "1,210"],
        ["wikitext2", "teacher", "3.480", "32.46", "", ""],
        ["", "student", "4.020", "55.70", "74.5 %", ""],
    ):
        assert row in page.rows
    assert f'AutoModelForCausalLM.from_pretrained("{run_dir}/hf")' in page.text
    assert (run_dir / "config.yaml").read_text() in page.text
    assert page.tags.count("svg") == 10 and "criterion activation · samples 1024" in page.text
    assert "yet: minitron" not in page.text


def test_losses_without_layers_have_a_picture_where_they_were_measured(run_dir):
    file = run_dir / "importance.safetensors"
    save_file({**load_file(file), "layers.loss": np.linspace(4, 3, 23, dtype=np.float32)}, file, metadata={"criterion": "activation"})
    page = page_of(run_dir)
    assert page.tags.count("svg") == 11
    assert "Next-token loss without 8 layers in a row; the lowest, 3.000, without layers 22 to 29." in page.text


def test_sizes_that_differ_between_layers_are_ranges(run_dir):
    arch = json.loads((run_dir / "arch.json").read_text())
    blocks = [{"ffn_hidden_size": 1152 - layer, "num_attention_heads": 9, "num_query_groups": 3} for layer in range(30)]
    arch["pruned"]["layers"] = blocks
    (run_dir / "arch.json").write_text(json.dumps(arch))
    page = page_of(run_dir)
    assert ["MLP neurons per layer", "1,536", "1,123..1,152", "73..75 %"] in page.rows
    assert ["Attention heads", "9", "9", "100 %"] in page.rows


def test_the_page_loads_nothing_and_repeats_no_id(every_axis_run_dir):
    page = page_of(every_axis_run_dir)
    assert not {"script", "img", "iframe", "object", "image"} & set(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "srcset")]
    assert references and all(value.startswith("#") for value in references)
    text = (every_axis_run_dir / "report.html").read_text()
    assert set(re.findall(r"https?://[^\"' <)]+", text)) == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # names, not addresses
    assert not re.search(r"@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert {value[1:] for value in references} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)


VERBS = {
    "arch.json": "prune",
    "importance.safetensors": "calibrate",
    "keep.safetensors": "prune",
    "metrics.jsonl": "distill",
    "eval.json": "evaluate",
    "hf": "export",
    "config.yaml": "compress",
}


@pytest.mark.parametrize("name", VERBS)
def test_a_section_without_its_file_tells_who_writes_it(run_dir, name):
    gone = run_dir / name
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    text = page_of(run_dir).text
    shown = name + "/" if name == "hf" else name
    assert f"This run has no {shown} yet: minitron {VERBS[name]} writes it." in text
    assert text.count("yet: minitron") == {"eval.json": 2, "keep.safetensors": 2}.get(name, 1)


def test_an_empty_run_is_a_page_of_what_to_do(tmp_path):
    page = page_of(tmp_path)
    assert all(f"minitron {verb} writes it" in page.text for verb in VERBS.values())
    assert page.tags.count("svg") == 0 and tmp_path.name in page.text


def test_an_evaluation_of_the_teacher_alone_is_told(run_dir):
    evals = json.loads((run_dir / "eval.json").read_text())
    (run_dir / "eval.json").write_text(json.dumps({"teacher": evals["teacher"]}))
    page = page_of(run_dir)
    assert ["teacher", "134.5 M", "100.0 %", "2.650", "14.15", ""] in page.rows
    assert "Held-out loss, teacher" in page.text and "took back" not in page.text


def test_tasks_have_a_table(run_dir):
    evals = json.loads((run_dir / "eval.json").read_text())
    for model, value in (("teacher", 0.5), ("student", 0.4343)):
        acc = {"value": value, "stderr": 0.0222, "higher_is_better": True}
        evals[model]["tasks"] = {"hellaswag": {"metrics": {"acc_norm": acc}, "rows": 500, "num_fewshot": 10, "group": None}}
    evals["teacher"] |= {"seq_length": 1024, "stride": 512, "word_perplexity": 33.25}
    (run_dir / "eval.json").write_text(json.dumps(evals))
    page = page_of(run_dir)
    assert ["hellaswag (10-shot)", "acc_norm", "0.500 ±0.022", "–", "0.434 ±0.022", "86.9 %", "500"] in page.rows
    assert ["held-out", "teacher", "2.650", "14.15", "33.25", "", "1,210"] in page.rows
    assert "of windows of 1,024 tokens, one every 512." in page.text


def test_a_report_is_replaced_whole(run_dir):
    (run_dir / "report.html").write_text("old")
    assert write_report(run_dir).read_text() != "old" and not list(run_dir.glob(".*"))


HOSTILE = "</title></style><script>alert('1')</script><img src=x onerror=\"alert(2)\">&amp; $\\frac$ ]]> -->"


def test_hostile_names_are_shown_and_not_obeyed(run_dir):
    evals = json.loads((run_dir / "eval.json").read_text())
    for model in evals.values():
        model["texts"] = {HOSTILE: model["texts"]["wikitext2"]}
        acc = {"value": 0.5, "stderr": None, "higher_is_better": True}
        model["tasks"] = {HOSTILE: {"metrics": {HOSTILE: acc}, "rows": None, "num_fewshot": None, "group": None}}
    (run_dir / "eval.json").write_text(json.dumps(evals))
    (run_dir / "config.yaml").write_text(json.dumps({"model": {"path": HOSTILE.replace("/", "")}, "note": HOSTILE}))
    folder = run_dir.rename(run_dir.with_name("a\"b'c<script>d&"))
    page = page_of(folder)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert escape(HOSTILE) in (folder / "report.html").read_text()
    assert HOSTILE in [row[0] for row in page.rows] and HOSTILE in [row[1] for row in page.rows]
    assert page.text.count(HOSTILE.replace("/", "")) == 2  # the heading and the tab's title
    line = next(line for line in page.text.splitlines() if line.startswith("model = "))
    assert eval(line.removeprefix("model = AutoModelForCausalLM.from_pretrained"), {}) == str(folder / "hf")


@pytest.mark.parametrize("name", ["arch.json", "importance.safetensors", "keep.safetensors", "metrics.jsonl", "eval.json", "config.yaml"])
def test_a_broken_file_is_refused_by_its_name(run_dir, name):
    (run_dir / name).write_bytes(b"{]\n\xff\n")
    with pytest.raises(RequestError, match=re.escape(name)) as refusal:
        write_report(run_dir)
    assert "\n" not in str(refusal.value) and not (run_dir / "report.html").exists()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"^run\.dir=.*nowhere"):
        write_report(tmp_path / "nowhere")
