"""`report.html`: one self-contained page about a run, made of whatever the run's folder holds so far."""

import json
from pathlib import Path

import minitron
from minitron.arch import Arch
from minitron.arch.counts import count
from minitron.config.schema import BUDGETS
from minitron.files import write_text
from minitron.reporting import curves, page, pictures, searched, standing
from minitron.reporting.generation import memory_told, speed_pictures, speed_table, told
from minitron.reporting.results import HELD_OUT, STUDENT, WHOLE, Evals, gap_on, models_of, rows, task_rows, windows_told
from minitron.reporting.runfiles import RunFiles, read_run
from minitron.reporting.speed import speed
from minitron.reporting.wording import ABSENT, counted, decimal, kept_of, measurement, percent, ratio, size, size_of, sizes_of

REPORT = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    A section whose file is missing says which verb writes it. Raises RequestError for a missing folder or a broken file.
    """
    run = read_run(Path(run_dir))
    target = run.path / REPORT
    write_text(target, render(run))
    return target


def render(run: RunFiles) -> str:
    """The whole page."""
    name = model_name(run)
    compression = () if run.whole else (search, architecture, importance)
    body = "\n".join(part(run) for part in (summary, *compression, training, evaluation, speeds, loading, settings))
    kind = "Training report" if run.whole else "Compression report"
    header, footer = page.header(kind, name, lead(run)), page.footer(f"minitron {minitron.__version__} · {run.path}")
    return page.page(f"{name} · minitron", f"{header}\n<main>\n{body}\n</main>\n{footer}")


def model_name(run: RunFiles) -> str:
    """What the page is about: the model's name if config.yaml tells it, else the run's folder."""
    path = run.setting("model.path")
    return str(path).rstrip("/").rsplit("/", 1)[-1] if path else run.path.resolve().name


def lead(run: RunFiles) -> str:
    """The run in one or two sentences, as markup; empty while there is nothing to say."""
    sentences = []
    if run.original and run.pruned:
        before, after = run.original.num_parameters(), run.pruned.num_parameters()
        sentences.append(f"<strong>{size(before)}</strong> parameters became <strong>{size(after)}</strong>.")
    if run.search and run.search.chosen:
        sentences.append(f"A search chose the sizes from <strong>{counted(len(run.search.candidates), 'candidate')}</strong>.")
    gap = gap_on(run.evals or {}, HELD_OUT)
    tokens = [line["tokens"] for line in run.metrics if line.get("tokens") is not None]
    over = f" over {size(tokens[-1])} tokens" if tokens else ""
    if run.evals and set(WHOLE) <= set(run.evals):
        untrained, trained = (decimal(run.evals[key].get("loss"), 3) for key in WHOLE)
        sentences.append(f"Training{over} took the held-out loss from {untrained} to <strong>{trained}</strong>.")
    if gap is not None:
        sentences.append(f"Pruning raised the held-out loss; distillation{over} took back <strong>{percent(gap)}</strong> of that.")
    return " ".join(sentences)


def summary(run: RunFiles) -> str:
    """The outcome: four numbers, and the models side by side on the held-out text."""
    if run.evals is None and not (run.original and run.pruned):
        return page.section("summary", "", page.absent("eval.json", "evaluate"))
    return page.section("summary", "", page.facts(headline(run)), outcome(run.evals) if run.evals else page.absent("eval.json", "evaluate"))


def headline(run: RunFiles) -> list[tuple[str, str, str]]:
    """Parameters, loss, perplexity and the gap closed, each with a note."""
    evals: Evals = run.evals or {}
    models = models_of(evals)
    before = run.original.num_parameters() if run.original else evals.get(models[0], {}).get("params")
    after = run.pruned.num_parameters() if run.pruned else evals.get(models[-1], evals.get("pruned", {})).get("params")
    latest = next((key for key in reversed(models) if key in evals), STUDENT)

    def against(name: str, digits: int) -> tuple[str, str]:
        others = [f"{key} {decimal(evals[key].get(name), digits)}" for key in models if key in evals and key != latest]
        return decimal(evals.get(latest, {}).get(name), digits), " · ".join(others)

    gap = gap_on(evals, HELD_OUT)
    figures = [
        ("Parameters", size(after), f"{percent(ratio(after, before))} of {size(before)}"),
        (f"Held-out loss, {latest}", *against("loss", 3)),
        (f"Perplexity, {latest}", *against("perplexity", 2)),
    ]
    return figures if run.whole else [*figures, ("Loss gap closed", percent(gap), "0 % is pruned, 100 % is the teacher")]


def outcome(evals: Evals) -> str:
    """The models on the held-out text."""
    models = models_of(evals)
    teacher = evals.get(models[0], {}).get("params")
    lines = [
        (row.model, size(row.parameters), percent(ratio(row.parameters, teacher)), decimal(row.loss, 3), decimal(row.perplexity),
         percent(row.gap_closed) if row.model == STUDENT else "")
        for row in rows(evals) if row.text == HELD_OUT
    ]  # fmt: skip
    return page.table(("Model", "Parameters", "Retained", "Loss", "Perplexity", "Gap closed"), lines, strong=models[-1])


def search(run: RunFiles) -> str:
    """Which sizes were compared and how they came out; nothing of a run that was told its sizes."""
    if run.search is None:
        budgets = any(run.setting(f"search.{name}") is not None for name in BUDGETS)
        return page.section("search", "Search", page.absent("candidates.json", "search")) if budgets else ""
    results, found = run.search, standing.standings(run.search)
    lines = [
        (
            one.name,
            standing.outcome(results, one).partition(" ")[0],  # when: the losses end there
            *(["·".join(str(rank) for rank in one.ranks if rank is not None)] if results.rungs else []),
            *("" if loss is None else decimal(loss, 3) for loss in one.losses),
            *(standing.size_text(field, one) for field in standing.varied(results)),
            *(standing.cost_text(name, one) for name in standing.costs_of(results)),
        )
        for one in found
    ]
    head = (
        "Candidate",
        "",
        *(["ranks"] if results.rungs else []),
        *(f"{rung.steps:,} steps" if rung.steps else "untrained" for rung in results.rungs),
        *(standing.HEADINGS[field] for field in standing.varied(results)),
        *(standing.COSTS[name][0] for name in standing.costs_of(results)),
    )
    told = page.definitions([*standing.told(results), *([("sizes", same)] if (same := standing.unvaried(results)) else [])])
    cards = page.grid(*(page.stack(*map(page.card, pictures)) for pictures in searched.search_pictures(results) if pictures))
    table = page.table_card("Candidates", page.table(head, lines, strong=results.chosen or ""))
    return page.section("search", "Search", told, cards, table)


def architecture(run: RunFiles) -> str:
    """Sizes before and after, in numbers and to scale."""
    if run.original is None or run.pruned is None:
        return page.section("architecture", "Architecture", page.absent("arch.json", "prune"))
    bars = page.card(pictures.parameter_bars(run.original, run.pruned))
    drawing = page.card(pictures.blueprint(run.original, run.pruned, run.keep)) if run.keep is not None else page.absent("keep.safetensors", "prune")
    lines = size_rows(run.original, run.pruned, run.setting("train.seq_length"))
    sizes = page.table_card("Sizes", page.table(("", "Before", "After", "Kept"), lines))
    return page.section("architecture", "Architecture", page.grid(page.stack(bars, sizes), drawing))


def size_rows(original: Arch, pruned: Arch, seq_length: int | None) -> list[tuple[str, str, str, str]]:
    """The table of sizes and costs; FLOPs are told for sequences of `seq_length` tokens (the longest that fit if None)."""
    length = seq_length or original.max_position_embeddings
    before, after = count(original, length), count(pruned, length)
    sparse = before.active_parameters < before.parameters
    lines = [
        (name[0].upper() + name[1:], size_of(original, field), size_of(pruned, field), kept_of(original, pruned, field))
        for name, field in sizes_of(original).items()
    ]
    costs = (
        ("Parameters", before.parameters, after.parameters, size),
        *([("Parameters a token makes use of", before.active_parameters, after.active_parameters, size)] if sparse else []),
        ("Forward FLOPs per token", before.flops_per_token, after.flops_per_token, size),
        ("KV cache per token, bf16", before.kv_cache_bytes_per_token, after.kv_cache_bytes_per_token, kibibytes),
    )
    return lines + [(name, show(old), show(new), percent(new / old, 0)) for name, old, new, show in costs]


def kibibytes(count: float) -> str:
    """Bytes as KiB: 23040 -> "22.5 KiB"."""
    return f"{count / 1024:,.1f} KiB"


def importance(run: RunFiles) -> str:
    """What the scores say, axis by axis."""
    if run.importance is None:
        return page.section("importance", "Importance", page.absent("importance.safetensors", "calibrate"))
    told = {name: run.calibration[name] for name in ("criterion", "samples", "seq_length", "batch_agg", "seq_agg") if name in run.calibration}
    shown = " · ".join(f"{name.replace('_', ' ')} {value}" for name, value in told.items())
    drawn = map(page.card, pictures.importance_pictures(run.importance, run.keep, told.get("criterion")))
    missing = "" if run.keep is not None else page.absent("keep.safetensors", "prune")
    return page.section("importance", "Importance", page.remark(shown), missing, page.grid(*drawn))


def training(run: RunFiles) -> str:
    """How the losses went."""
    if not run.metrics:
        return page.section("training", "Training", page.absent("metrics.jsonl", "train" if run.whole else "distill"))
    drawn = (curves.train_curve(run.metrics, *loss_told(run)), curves.validation_curve(run.metrics, run.evals or {}))
    cards = page.grid(*(page.card(picture) for picture in drawn if picture is not None))
    return page.section("training", "Training", page.remark(speed(run.metrics)), cards)


# distill.loss -> what the loss is called
LOSSES = {"forward_kl": "KL(teacher ‖ student)", "reverse_kl": "KL(student ‖ teacher)", "jsd": "Jensen-Shannon divergence"}


def loss_told(run: RunFiles) -> tuple[str, str]:
    """What the loss on the logits is called, and what else the settings say of what was minimised. Without settings, just a loss."""
    logged = {name for line in run.metrics for name, value in line.items() if value is not None}
    name = LOSSES.get(run.setting("distill.loss") or "", "loss")
    if "kd_loss" not in logged:
        return ("next-token cross-entropy" if "ce_loss" in logged else "loss"), ""
    if name == "loss":
        return name, ""
    temperature, cached = run.setting("distill.temperature") or 1, run.setting("teacher.cache.folder") is not None
    top_k = run.setting("teacher.cache.top_k" if cached else "distill.top_k")
    scaled = {
        f"beta {run.setting('distill.beta')}": name == LOSSES["jsd"],
        f"temperature {temperature:g}, scaled by its square": temperature != 1,
        f"the teacher's {top_k} largest tokens and all others together": top_k is not None,
        "a cached teacher": cached,
    }
    said = "; ".join([name, *(text for text, applies in scaled.items() if applies)]) + "."
    weight = run.setting("distill.cross_entropy") or 0
    terms = ["kd_loss", *([f"{weight:g} × ce_loss"] if weight else [])]
    if "hidden_loss" in logged:
        alpha = run.setting("distill.hidden.alpha")
        terms.append(f"{'alpha' if alpha in (None, 'dynamic') else f'{alpha:g}'} × hidden_loss")
        if alpha in (None, "dynamic"):
            said = f"{said[:-1]}. Alpha is dynamic: 0 in the first step, then what made hidden_loss as large as kd_loss in the step before."
    return name, said if len(terms) == 1 else f"loss = {' + '.join(terms)}; kd_loss: {said}"


def evaluation(run: RunFiles) -> str:
    """Every model on every text and task."""
    if run.evals is None:
        return page.section("evaluation", "Evaluation", page.absent("eval.json", "evaluate"))
    models, told, found = models_of(run.evals), windows_told(run.evals), rows(run.evals)
    words = any(row.word_perplexity is not None for row in found)
    lines, previous = [], None
    for row in found:
        gap = percent(row.gap_closed) if row.model == STUDENT else ""
        speed = decimal(row.tokens_per_second, 0) if row.text == HELD_OUT else ""
        perplexities = (decimal(row.perplexity), *([decimal(row.word_perplexity)] if words else []))
        lines.append(("" if row.text == previous else row.text, row.model, decimal(row.loss, 3), *perplexities, gap, speed))
        previous = row.text
    head = ["Text", "Model", "Loss", "Perplexity", *(["Per word"] if words else []), "Gap closed", "Tokens/s"]
    cards = [page.table_card("Texts", page.table(head, lines, strong=models[-1], texts=2)), page.card(curves.loss_dots(run.evals))]
    if tasks := task_rows(run.evals):
        asked = [ABSENT if row.rows is None else f"{row.rows:,}" for row in tasks]
        shown = [
            (row.name, row.metric, *map(measurement, row.values), percent(row.retained), rows_asked)
            for row, rows_asked in zip(tasks, asked, strict=True)
        ]
        head = ["Task", "Metric", *map(str.capitalize, models), "Retained", "Rows"]
        cards.append(page.table_card("Tasks, with standard errors", page.table(head, shown, strong=None, texts=2)))
    note = page.remark(f"Loss in nats per token; perplexity per token{' and per word' if words else ''}, of {told}.") if told else ""
    return page.section("evaluation", "Evaluation", note, page.grid(*cards))


def speeds(run: RunFiles) -> str:
    """How fast the exported model generates; nothing of a run that did not ask for it."""
    if run.speed is None:
        return page.section("speed", "Speed", page.absent("speed.json", "speed")) if run.setting("speed.enabled") else ""
    note = ". ".join(part for part in (told(run.speed), memory_told(run.speed)) if part)
    head, texts, lines = speed_table(run.speed)
    table = page.table_card(
        "Generation", page.table([name[0].upper() + name[1:] for name in head], lines, strong=models_of(run.evals or {})[-1], texts=texts)
    )
    return page.section("speed", "Speed", page.remark(f"{note}."), page.grid(*map(page.card, speed_pictures(run.speed))), table)


def loading(run: RunFiles) -> str:
    """How to use the exported model."""
    if not run.exported:
        return page.section("loading", "Use the model", page.absent("hf/", "export"))
    folder = json.dumps(str(run.path / "hf"), ensure_ascii=False)  # JSON's string literal is Python's too
    lines = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({folder})",
        f"tokenizer = AutoTokenizer.from_pretrained({folder})",
    )
    return page.section("loading", "Use the model", page.code("\n".join(lines)))


def settings(run: RunFiles) -> str:
    """The resolved settings, folded."""
    if run.config is None:
        return page.section("settings", "Settings", page.absent("config.yaml", "compress"))
    return page.section("settings", "Settings", page.folded("config.yaml, as the run resolved it", page.code(run.config)))
