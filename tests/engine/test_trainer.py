"""The training loop: steps that go wrong, when it saves, validates and stops."""

import dataclasses
import math

import pytest
import torch

from minitron.engine.checkpoint import Checkpoints
from minitron.errors import RequestError
from tests.engine.runs import SETTINGS, Run
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model", 4, num_hidden_layers=2)


def spoiled(loss, value):
    """A loss like `loss` whose value, or whose gradient, is not finite."""

    def for_step(step, batches):
        inner = loss(step, batches)

        def compute(number, hidden):
            total, tokens, parts = inner.last(number, hidden)
            if value == "loss":
                return total * math.nan, tokens, {**parts, "loss": parts["loss"] * math.nan}
            hidden.register_hook(lambda gradient: gradient * math.inf)
            return total, tokens, parts

        return dataclasses.replace(inner, last=compute)

    return for_step


def spoiled_step(world, folder, value, dtype):
    """The metrics of a spoiled step, and whether it left every parameter and the state of the optimizer as they were."""
    run = Run(world, folder, dtype=dtype)
    run.step()
    before = {name: parameter.detach().clone() for name, parameter in run.trainer.model.named_parameters()}
    batch = run.microbatches(1)
    line = run.trainer.update(batch, spoiled(run.task.loss, value)(1, batch))
    same = all(torch.equal(parameter, before[name]) for name, parameter in run.trainer.model.named_parameters())
    after = run.step()
    return line["skipped"], same, math.isfinite(after["loss"]) and math.isfinite(after["grad_norm"]) and after["skipped"] == 0


@pytest.mark.multirank
@pytest.mark.parametrize("value", ["loss", "gradient"])
@pytest.mark.parametrize(("layout", "dtype"), [(Layout(), torch.float32), (Layout(), torch.bfloat16), (Layout(tp=2, pp=2), torch.float32)], ids=str)
def test_a_step_that_is_not_finite_changes_nothing(layout, dtype, value, folder):
    assert on_ranks(spoiled_step, layout, folder, value, dtype) == [(1, True, True)] * layout.size


@pytest.mark.parametrize("save_interval", [10, 2])
def test_steps_that_are_not_finite_end_the_run_with_one_line(save_interval, folder, alone, tmp_path):
    run = Run(alone, folder, dataclasses.replace(SETTINGS, save_interval=save_interval))
    count = SETTINGS.max_bad_steps
    said = (
        rf"^step {count} \(samples 16 to 19 of the training data\) was the last of {count} in a row that were left out: its loss was not finite; "
        r"lower train\.lr=0\.003, or look at the data there$"
    )
    with pytest.raises(RequestError, match=said):
        run.fit(tmp_path, loss=spoiled(run.task.loss, "loss"))
    assert [(line["skipped"], line["skipped_steps"]) for line in run.lines] == [(1, number) for number in range(1, count + 1)]
    assert list(tmp_path.glob("step_*")) == []


def test_it_reports_every_step_and_validates_and_saves_at_its_intervals(folder, alone, tmp_path):
    run = Run(alone, folder).fit(tmp_path)
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in run.lines] == [48 * step for step in range(1, 7)]
    assert all(line["tokens_per_second"] > 0 and line["skipped"] == line["skipped_steps"] == 0 for line in run.lines)
    assert all(0 < line["data_seconds"] < line["step_seconds"] and line["peak_memory_gib"] > 0 for line in run.lines)
    valid = {line["step"]: line["valid_loss"] for line in run.lines if "valid_loss" in line}
    assert [*valid] == [2, 4, 6]  # every fourth step, at every save, and the last
    kept = [f"step_{step:08}" for step in sorted({4, 6, min(valid, key=valid.__getitem__)})]  # the newest two and the best
    assert sorted(path.name for path in tmp_path.glob("step_*")) == kept
    assert (tmp_path / "latest").read_text() == "6\n"


def test_a_step_s_counted_tokens_are_told_where_they_are_fewer_than_those_read(folder, alone, tmp_path):
    run = Run(alone, folder)

    def masked(step):
        """From the third step on every sequence has a position less that counts."""
        counted_BS = torch.ones(2, 12, dtype=torch.bool)
        counted_BS[:, : max(step - 1, 0)] = False
        return [batch._replace(counted_BS=counted_BS) for batch in run.microbatches(step)]

    run.fit(tmp_path, microbatches=masked)
    assert [line.get("counted_tokens") for line in run.lines] == [None, None, 44, 40, 36, 32]
    assert [line["tokens"] for line in run.lines] == [48 * step for step in range(1, 7)]


def test_a_stop_asked_for_at_the_last_step_is_no_stop(folder, alone, tmp_path):
    run = Run(alone, folder).fit(tmp_path, stop_after=6)
    assert run.trainer.step == 6


def without_teacher(world, folder, out, interval):
    """What is said where the teacher can't be asked after step 3, the checkpoints then, and the losses that follow from them."""
    run, checkpoints = Run(world, folder, dataclasses.replace(SETTINGS, save_interval=interval)), Checkpoints(out)

    def asked(step, batches):
        if step == 3:
            raise RequestError("the cache is gone")
        return loss(step, batches)

    loss = run.task.loss
    with pytest.raises(RequestError) as refused:
        run.fit(out, loss=asked)
    steps, again = checkpoints.steps(), Run(world, folder)
    assert checkpoints.resume(again.trainer)
    return str(refused.value), steps, [line["loss"] for line in [*run.lines, *again.fit(out).lines]]


@pytest.mark.multirank
@pytest.mark.parametrize(("interval", "steps", "said"), [(2, [2, 3], "; stopped at step 3, saved in {}/step_00000003"), (3, [3], "")])
@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2)], ids=str)
def test_a_refusal_between_two_steps_loses_none_that_were_done(layout, interval, steps, said, folder, tmp_path, alone):
    unbroken = on_ranks(fitted, layout, folder, tmp_path / "unbroken")[0]
    found = on_ranks(without_teacher, layout, folder, tmp_path / "broken", interval)
    assert [one[:2] for one in found] == [("the cache is gone" + said.format(tmp_path / "broken"), steps)] * layout.size
    assert found[0][2] == unbroken


def fitted(world, folder, out):
    return [line["loss"] for line in Run(world, folder).fit(out).lines]


def test_a_refusal_before_the_first_step_saves_nothing(folder, alone, tmp_path):
    def refuse(step, batches):
        raise RequestError("the cache is gone")

    with pytest.raises(RequestError, match=r"^the cache is gone$"):
        Run(alone, folder).fit(tmp_path, loss=refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_done_does_nothing_more(folder, alone, tmp_path):
    run = Run(alone, folder)
    run.trainer.step = 6
    assert run.fit(tmp_path).lines == []
    assert list(tmp_path.iterdir()) == []
