"""`minitron evaluate`: perplexities and benchmark tasks of the teacher, the pruned model and the student, or of a model before and after `train`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minitron import engine
from minitron.config.schema import Config
from minitron.data.tokenizing import load_tokenizer
from minitron.evaluation.asking import Answers, conducted, end_tokens
from minitron.evaluation.tasks import evaluate
from minitron.evaluation.words import count_words, per_word
from minitron.files import write_json
from minitron.reporting.console import final_table, progress, say
from minitron.reporting.results import MODELS, WHOLE
from minitron.session import Session, session

FILE = "eval.json"
MAKERS = {"pruned": "prune", "student": "distill", "trained": "train"}  # which verb makes which model


def run(cfg: Config) -> None:
    """Open the run, evaluate, show the results."""
    with session(cfg, "evaluate") as opened:
        results = work(opened)
        if opened.world.is_main:
            final_table(results, {"results": str(opened.folder / FILE)})


def work(opened: Session) -> dict[str, Any]:
    """Writes run.dir/eval.json for those of MODELS, or in a folder of `train` of WHOLE, that are there, and returns its content."""
    opened.data  # noqa: B018 -- before the models: a text that is too short is refused first
    names = WHOLE if engine.on_main(opened.world, opened.is_whole) else MODELS
    models = {names[0]: lambda: opened.teacher}
    if engine.on_main(opened.world, opened.pruned.is_dir):
        models["pruned"] = opened.load_pruned
    if opened.chosen() is not None:
        models[names[-1]] = opened.load_student
    absent = [f"{name} (minitron {MAKERS[name]} makes it)" for name in names if name not in models]
    if absent and opened.world.is_main:
        say(f"evaluates {' and '.join(models)} alone; not here yet: {', '.join(absent)}")
    results = {name: measure(load(), name, opened, opened.teacher_world if name == names[0] else opened.world) for name, load in models.items()}
    opened.mark("evaluate", done=False)
    engine.on_main(opened.world, lambda: write_json(opened.folder / FILE, results))
    opened.mark("evaluate", done=True)
    return results


def measure(model: engine.Model, name: str, opened: Session, world: engine.World) -> dict[str, Any]:
    """One model's entry of eval.json; `world` is its layout. The figures at its top are of held-out text of the training corpus."""
    texts = {text: score(model, f"text_{text}", f"{name} on {text}", opened, world)[0] for text in opened.cfg.eval.texts}
    held_out, speed = score(model, "valid", f"{name} on held-out text", opened, world)
    return {
        "params": model.arch.num_parameters(),
        **held_out,
        "tokens_per_second": speed,
        "texts": texts,
        "tasks": answer(model, name, opened, world),
    }


def score(model: engine.Model, split: str, description: str, opened: Session, world: engine.World) -> tuple[dict[str, Any], float]:
    """Loss and perplexities on windows of a prepared text, of which the last, partial one is left out; tokens per second over all ranks."""
    cfg = opened.cfg
    from minitron.data.corpus import Windows, eval_batches

    seq_length = cfg.eval.seq_length or cfg.train.seq_length
    windows = Windows(opened.data.blend(split), seq_length, limit_tokens=cfg.eval.tokens, stride=cfg.eval.stride)
    stream = eval_batches(
        windows,
        micro_batch_size=cfg.eval.micro_batch_size,
        dp_rank=world.dp_rank,
        dp_size=world.dp,
        first_counted=None if cfg.eval.stride is None else windows.first_counted,
    )
    with progress(description, len(windows), cfg.logging.progress and world.is_main) as advance, model.on_device():
        found = engine.language_model_score(model, stream, world, lambda count: advance(count * world.dp))
    words = engine.on_main(world, lambda: count_words(windows.predicted(), load_tokenizer(str(opened.source.folder))))
    figures = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "word_perplexity": per_word(found.loss, found.tokens, words),
        "words": words,
        "seq_length": seq_length,
        "stride": windows.stride,
    }
    return figures, found.tokens_per_second


def answer(model: engine.Model, name: str, opened: Session, world: engine.World) -> dict[str, Any]:
    """How a model does on the benchmark tasks; on rank 0 alone, where lm-eval runs."""
    cfg, tasks = opened.cfg, opened.tasks
    if cfg.eval.tasks is None:
        return {}
    folder = opened.source.folder
    tokenizer = load_tokenizer(str(folder))
    budget = cfg.eval.micro_batch_size * (cfg.eval.seq_length or cfg.train.seq_length)
    shown = cfg.logging.progress and world.is_main
    answers = Answers(model, world, tokenizer, end_tokens(folder, tokenizer), budget, lambda what, total: progress(f"{name}, {what}", total, shown))
    most = cfg.eval.max_length or model.arch.max_position_embeddings

    def conduct(ask: Callable[[Any], Any]) -> dict[str, Any]:
        from minitron.evaluation.harness import ShardedLM  # imports lm-eval

        assert tasks is not None
        return evaluate(ShardedLM(ask, tokenizer, most), tasks, cfg.eval)

    return conducted(world, answers, conduct) or {}
