"""What tables.py shows of docs/results where that is not one file as it is: fewer columns, several files side by side."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.common import ROOT
from benchmarks.paper.results import VIEWS as OF_CLAIMS

RESULTS = ROOT / "docs" / "results"
Row = dict[str, Any]


def load(name: str) -> dict[str, Any]:
    """What docs/results/NAME.json holds."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def cell(value: Any, form: str) -> str:
    """A figure as text; nothing for None, and a space before a percent sign."""
    text = "" if value is None else format(value, form)
    return f"{text[:-1]} %" if text.endswith("%") and form.endswith("%") else text


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as Markdown, its last line ended."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("|" + "".join(f" {text} |" if text else " |" for text in line) + "\n" for line in lines)


def plain(name: str) -> str:
    """The table of one file as it is."""
    found = load(name)
    columns = found["columns"]
    return markdown(list(columns), [[cell(row[heading], form) for heading, form in columns.items()] for row in found["rows"]])


def rows(name: str, **where: Any) -> list[Row]:
    """The rows of a file whose fields are `where`'s."""
    return [row for row in load(name)["rows"] if all(row[key] == value for key, value in where.items())]


def shown(found: Iterable[Row], columns: Mapping[str, tuple[str, str]]) -> str:
    """A table of the columns heading -> (field, format)."""
    return markdown(list(columns), [[cell(row.get(field), form) for field, form in columns.values()] for row in found])


def once(found: list[Row], field: str) -> list[Row]:
    """The rows with `field` empty where it is that of the row before."""
    before = [None, *(row[field] for row in found)]
    return [{**row, field: None if row[field] == last else row[field]} for row, last in zip(found, before, strict=False)]


def millions(number: float) -> str:
    return f"{number / 1e6:.1f} M"


def three_models(found: list[Row], speed: bool) -> str:
    """Teacher, pruned and student on each text, the student in bold."""
    made = [
        {**row, "params": millions(row["params"]), "model": f"**{row['model']}**" if row["model"] == "student" else row["model"]}
        for row in once(found, "text")
    ]
    columns = {name: (name, form) for name, form in (("text", ""), ("model", ""), ("params", ""), ("loss", ".3f"), ("perplexity", ".2f"))}
    columns |= {"gap closed": ("gap closed", ".1%")} | ({"tokens/s": ("tokens/s", ",.0f")} if speed else {})
    return shown(made, columns)


def demo() -> str:
    """The run on a quiet machine, and WikiText-2 from another one, whose losses on the held-out text are the same."""
    quiet, texts = rows("demo"), rows("demo_wikitext2", text="wikitext2")
    same = zip(quiet, rows("demo_wikitext2", text="held-out"), strict=True)
    if any(one["loss"] != other["loss"] for one, other in same):
        raise SystemExit("demo.json and demo_wikitext2.json are not of the same training")
    return three_models([*quiet, *texts], speed=True)


def demo_depth() -> str:
    return three_models([row for row in rows("demo_depth") if row["model"] != "teacher"], speed=False)


def demo_course() -> str:
    found = rows("demo_course")
    lines = [
        [title, *(format(row[field], ".3f") for row in found)] for title, field in (("distillation loss", "loss"), ("held-out loss", "held-out loss"))
    ]
    return markdown(["tokens", *(f"{row['tokens']:,}" for row in found)], lines)


RANKED = {"none (the original)": "nothing cut", "activations (l2, mean)": "activations (l2 over samples, mean over tokens)"}


def criteria() -> str:
    found = [{**row, "ranked by": RANKED.get(row["ranked by"], row["ranked by"])} for row in rows("criteria")]
    return shown(found, {"ranked by": ("ranked by", ""), "held-out": ("held-out loss", ".3f"), "WikiText-2": ("wikitext2 loss", ".3f")})


def layout() -> str:
    keep, metrics, evaluation = rows("layout")
    lines = [["`keep.safetensors`", keep["what"]]]
    for name, row in (("metrics.jsonl", metrics), ("eval.json", evaluation)):
        lines.append([f"losses of `{name}`, largest relative difference", format(row["relative difference"], ".1e")])
    return markdown(["", "tp=1 against tp=2"], lines)


def exact() -> str:
    axes = {"hidden": "hidden", "ffn": "ffn", "heads": "heads", "groups": "groups", "layers, BI": "layers.bi", "layers, loss": "layers.loss"}
    columns = {"layout": ("layout", ""), **{heading: (field, ".0e") for heading, field in axes.items()}}
    columns |= {
        "kept sets that differ": ("kept sets that differ", "d"),
        "tensors that differ": ("models that differ", "d"),
        "logits": ("logits", ".0e"),
    }
    return shown(rows("exact"), columns)


def distill_step() -> str:
    found = [{**row, "side": row["side"].removesuffix(", bf16")} for row in rows("distill_step")]
    for row in found:
        if " / " in row["side"]:
            row |= {"side": f"*{row['side']}*", "teacher": None, "student": None, "optimizer": None}
    parts = {name: (name, ".2f") for name in ("teacher", "student", "optimizer", "total")}
    return shown(found, {"side": ("side", ""), **parts, "tokens/s": ("tokens/s", ",.0f")})


SIDES = {
    "Megatron, fused loss, bf16": "Megatron, the same fused loss",
    "Megatron, whole logits, bf16": "Megatron, its own whole logits",
    "minitron train / Megatron, fused loss, bf16": "*minitron / the same loss*",
    "minitron train / Megatron, whole logits, bf16": "*minitron / whole logits*",
}


def train_step() -> str:
    found = rows("train_step")
    made = []
    for row, after in zip(found, [*found[1:], {}], strict=True):
        if "quickest" in row["side"]:
            continue
        total = f"{row['total']:.2f}" + (f", quickest {after['total']:.2f}" if "quickest" in after.get("side", "") else "")
        made.append({**row, "side": SIDES.get(row["side"], row["side"].removesuffix(", bf16")), "total": total})
    columns = {"side": ("side", ""), "data": ("data", ".3f"), "forward, backward": ("forward, backward", ".2f"), "optimizer": ("optimizer", ".2f")}
    return shown(made, columns | {"metrics": ("metrics", ".3f"), "total": ("total", "")})


def train_step_operators() -> str:
    """What the narrow model tells of the loop, and SmolLM2's ratios to both plain loops, in each dtype."""
    ours, plain, share, longer, of_step = rows("train_step_operators")
    ratios = rows("train_step_narrow")
    against = ("minitron train / Megatron, fused loss", "minitron train / Megatron, fused loss, again")
    lines = {"operators of a step, ours and plain": [], "those that only ours runs, of a step": []}
    lines |= {"the narrow model: what a step takes longer, of SmolLM2's step": [], "SmolLM2: median ratio, quickest quarter": []}
    halves = {"bf16": ratios[: len(ratios) // 2], "fp32": ratios[len(ratios) // 2 :]}
    for dtype, half in halves.items():
        at = [next(number for number, row in enumerate(half) if row["side"] == side) for side in against]
        median, quickest = (" and ".join(f"{half[number + step]['total']:.2f}" for number in at) for step in (0, 1))
        texts = [
            f"{ours[dtype]:,} and {plain[dtype]:,}",
            cell(share[dtype], ".2%"),
            f"{longer[dtype]:+.1f} ms, {cell(of_step[dtype], '+.2%')}",
            f"{median}; {quickest}",
        ]
        for cells, text in zip(lines.values(), texts, strict=True):
            cells.append(text)
    return markdown(["", *halves], [[name, *cells] for name, cells in lines.items()])


def save() -> str:
    both = zip(rows("save"), rows("save_one_thread"), strict=True)
    made = [{**two, "one": one["seconds"], "one of": one["of a save waited for"]} for two, one in both]
    made[0] |= {"of a save waited for": None, "one of": None}
    share = "of a save that is waited for"
    columns = {"": ("", ""), "seconds": ("seconds", ".2f"), share: ("of a save waited for", ".0%")}
    return shown(made, columns | {"one thread: seconds": ("one", ".2f"), f"one thread: {share}": ("one of", ".0%")})


def kd_loss() -> str:
    found = []
    for row in (*rows("kd_loss"), *rows("kd_loss_fp32")):
        shape, dtype = row["tokens x hidden x vocabulary"].split(", ")
        side = row["side"].removesuffix(", forward").replace("fused, recompute", "fused, gradients recomputed")
        found.append({**row, "at": f"{shape.split(' x ')[0]}, {dtype}", "side": side})
    columns = {"tokens, dtype": ("at", ""), "side": ("side", ""), "seconds": ("seconds", ".3f"), "peak MiB": ("peak MiB", ",.0f")}
    return shown(once(found, "at"), columns | {"gradient error": ("gradient error", ".1e")})


def data() -> str:
    headings = ("one thread, one worker", "one, by processor time", "two threads, two workers", "two, by processor time")
    made = [{**row, "what": heading} for row, heading in zip(rows("data"), headings, strict=True)]
    columns = {"tokens per second and core": ("what", ""), "plain tokenizers": ("plain tokenizers", ",.0f")}
    return shown(made, columns | {"minitron": ("minitron", ",.0f"), "ratio": ("ratio", ".2f")})


def data_memory() -> str:
    made = [{**row, "text": row[""].removeprefix("peak MB, ")} for row in rows("data_memory")]
    return shown(made, {"text, and how long it took": ("text", ""), "peak, MB": ("minitron", ",.0f"), "ratio": ("ratio", ".2f")})


def memory() -> str:
    columns = {"layout": ("case", ""), "stage": ("stage", "d"), "weights, both models": ("weights", ",.0f")}
    parts = ("gradients, Adam", "teacher's states", "activations", "loss", "working", "rest", "said", "took")
    return shown(rows("memory"), columns | {part: (part, ",.0f") for part in parts} | {"ratio": ("ratio", ".2f")})


def calibrate() -> str:
    made = [
        {**row, "compiled": cell(row["compiled"], ".1%") + (f" ({row['of the compiled']})" if row["of the compiled"] else "")}
        for row in rows("calibrate")
    ]
    columns = {"model": ("model", ""), "dtype": ("dtype", ""), "without, s": ("without, s", ".2f"), "with, s": ("with, s", ".2f")}
    return shown(once(made, "model"), columns | {"cost": ("cost", ".1%"), "compiled": ("compiled", "")})


def reslice() -> str:
    return shown(rows("reslice"), {"cut to": ("cut to", ""), "most memory": ("peak / largest parameter", ".2f")})


def depth() -> str:
    columns = {"way": ("way", ""), "seconds": ("s", ".2f"), "of full passes": ("of full passes", ".2f"), "evaluations of blocks": ("blocks", ",d")}
    return shown(rows("depth"), columns | {"losses, relative difference": ("losses ≠", ".1e")})


def sizes(name: str) -> str:
    """L24-H576-F1280-A9-G3 as "24, 576, 1280"."""
    return ", ".join(part[1:] for part in name.split("-")[:3])


ROLES = {"chosen": "chosen", "widest": "keeps the most of its widths", "middle before training": "in the middle before training", "": ""}


def search() -> str:
    made = []
    for row in rows("search"):
        role = ROLES[row["which"]]
        name = sizes(row["candidate"]) + (f": {role}" if role else "")
        made.append({**row, "named": f"**{name}**" if role == "chosen" else name, "params": f"{row['M']:.1f} M"})
    columns = {"layers, width, MLP": ("named", ""), "parameters": ("params", ""), "as cut": ("as cut", ".3f")}
    rungs = {f"ladder, {steps} steps": (f"ladder, {steps} steps", ".3f") for steps in (6, 12)}
    return shown(made, columns | rungs | {"alone, 24 steps": ("alone, seed 1234", ".3f")})


def search_seeds() -> str:
    roles = [role for role in ROLES if role]
    found = {row["which"]: row for row in rows("search")}
    lines = [[str(seed), *(format(found[role][f"alone, seed {seed}"], ".3f") for role in roles)] for seed in (1234, 1235, 1236)]
    return markdown(["seed", *(ROLES[role] for role in roles)], lines)


def plan_nemotron() -> str:
    """How many architectures of the papers' grids remain, beside what they print (arXiv 2407.14679, Table 12)."""
    lines = []
    for budget, printed, taken in (("8", "15", "L32-H4096-F16384-A48-G8"), ("4", "18", "L32-H3072-F9216-A24-G8")):
        plan = load(f"plan_nemotron_{budget}b")
        above, below = (sum(count for why, count in plan["fell"].items() if word in why) for word in ("above", "below"))
        itself = ", the model itself one of them" if "the model itself" in plan["fell"] else ""
        row = next(row for row in plan["rows"] if row["name"] == taken)
        axes = f"{row['num_layers']} layers, {row['hidden_size']}, {row['ffn_hidden_size']}, {row['num_attention_heads']} heads"
        chosen = f"{axes}: {row['params'] / 1e9:.2f} B"
        lines.append([f"{budget}.0 B", f"{plan['grid']}{itself}", str(above), str(below), str(len(plan["rows"])), printed, chosen])
    return markdown(["budget", "combinations", "too large", "too small", "remain", "the paper says", "chosen there, among them"], lines)


def plan_nemotron_8b() -> str:
    """Those of 8 B by their distance from the budget, the furthest five by name."""
    off = sorted(((row["params"] / 8e9 - 1, row) for row in rows("plan_nemotron_8b")), key=lambda pair: -abs(pair[0]))
    lines = []
    for share, row in off[:5]:
        taken = ", the chosen one" if row["name"] == "L32-H4096-F16384-A48-G8" else ""
        widths = f"{row['hidden_size']}, {row['ffn_hidden_size'] / row['hidden_size']:g} x"
        name = f"{row['num_layers']} layers, {widths}, {row['num_attention_heads']} heads{taken}"
        lines.append([name, f"{row['params'] / 1e9:.3f} B", cell(share, "+.2%")])
    others = [row["params"] / 1e9 for _, row in off[5:]]
    lines.append([f"the other {len(others)}", f"{min(others):.3f} to {max(others):.3f} B", f"at most {cell(abs(off[5][0]), '.1%')}"])
    return markdown(["architecture", "parameters", "off"], lines)


def latency() -> str:
    columns = {"shape": ("shape", ""), "parameters": ("parameters", ""), "predicted, ms": ("predicted ms", ".1f")}
    return shown(rows("latency"), columns | {"whole model, ms": ("real ms", ".1f"), "error": ("error", "+.1%")})


def peers() -> str:
    from benchmarks.peers.figures import table  # which writes its tables as this file does

    return table(load("peers"))


def peers_overlap() -> str:
    from benchmarks.peers.figures import overlap_table

    return overlap_table(load("peers"))


VIEWS: dict[str, Callable[[], str]] = {
    view.__name__: view
    for view in (
        demo,
        demo_depth,
        demo_course,
        criteria,
        peers,
        peers_overlap,
        layout,
        exact,
        distill_step,
        train_step,
        train_step_operators,
        save,
        kd_loss,
        data,
        data_memory,
        memory,
        calibrate,
        reslice,
        depth,
        search,
        search_seeds,
        plan_nemotron,
        plan_nemotron_8b,
        latency,
    )
}


def of_claims(file: str, view: Callable[[Mapping[str, Any]], str]) -> Callable[[], str]:
    """A view of what benchmarks/paper wrote."""
    return lambda: view(load(file))


VIEWS |= {name: of_claims(file, view) for name, (file, view) in OF_CLAIMS.items()}
