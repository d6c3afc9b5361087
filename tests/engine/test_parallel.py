"""Joining processes, and what ranks tell each other."""

import pytest
import torch
import torch.distributed as dist

from minitron.config.schema import Parallel
from minitron.engine.parallel import (
    any_rank,
    broadcast_object,
    check_layout,
    gather_to_main,
    merge_over_stages,
    on_main,
    pick_device,
    refuse_together,
    sum_over_model_ranks,
    sum_over_replicas,
    world,
)  # fmt: skip
from minitron.errors import RequestError
from minitron.weights.load import load
from minitron.weights.save import export
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import save_model


@pytest.mark.parametrize(
    ("layout", "processes", "said"),
    [
        ({"tp": 3}, 4, "parallel.tp=3: tp x pp x cp = 3 must divide the number of processes, 4"),
        ({"tp": 2, "pp": 2}, 2, "parallel.tp=2: tp x pp x cp = 4 must divide the number of processes, 2"),
        ({"tp": 2}, 1, "must divide the number of processes, 1"),
        ({"sp": True}, 1, "parallel.sp=true: sequence parallelism needs parallel.tp of at least 2"),
        ({"vpp": 2}, 4, "parallel.vpp=2: virtual stages need parallel.pp of at least 2"),
        ({"cp": 3}, 4, "parallel.tp=1: tp x pp x cp = 3 must divide the number of processes, 4"),
        ({"ep": 3, "pp": 2}, 8, "parallel.ep=3: must divide dp x cp = 4"),
    ],
    ids=str,
)
def test_layouts_that_cannot_be_run(layout, processes, said):
    with pytest.raises(RequestError, match=said):
        check_layout(Parallel(**layout), processes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(RequestError, match="device=cuda: no GPU is visible to torch; use auto or cpu"):
        pick_device("cuda")
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


def test_processes_are_left_as_they_were_found():
    for _ in range(2):
        with world(Parallel(), "cpu", 1) as here:
            assert dist.is_initialized()
            assert (here.rank, here.size, here.is_main, here.is_first_stage, here.is_last_stage) == (0, 1, True, True, True)
        assert not dist.is_initialized()
    with pytest.raises(ZeroDivisionError), world(Parallel(), "cpu", 1):
        1 / 0  # noqa: B018
    assert not dist.is_initialized()


def test_a_second_run_in_one_process_is_refused(alone):
    with pytest.raises(RequestError, match="one run per process"), world(Parallel(), "cpu", 1):
        pass
    assert dist.is_initialized()


def battery(here):
    """What every helper gives this rank."""
    stage = torch.full((2, 3), float(here.tp_rank)) + 10 * here.pp_rank
    found = {
        "main": on_main(here, lambda: f"from {here.rank}"),
        "broadcast": broadcast_object(here.rank + 5, here),
        "any": (any_rank(here.rank == 3, here), any_rank(False, here)),
        "model": sum_over_model_ranks(10**here.rank, here),
        "replicas": [tensor.tolist() for tensor in sum_over_replicas([torch.ones(2) * here.rank, torch.ones(1, 1)], here)],
        "merged": {key: value.item() for key, value in merge_over_stages(
            {f"own.{here.pp_rank}": torch.tensor(here.pp_rank), "both": torch.tensor(here.pp_rank + 1)}, here, add=("both",)).items()},
        "first": gather_to_main(stage if here.is_first_stage else None, here, 1),
        "last": gather_to_main(stage if here.is_last_stage else None, here, 0),
        "same": gather_to_main(stage, here, None),
    }  # fmt: skip
    for refusal in (lambda: on_main(here, refuse), lambda: refuse_together("lost on 1" if here.rank == 1 else None, here)):
        try:
            refusal()
        except RequestError as error:
            found.setdefault("refused", []).append(str(error))
    refuse_together(None, here)
    return found


def refuse():
    raise RequestError("no room")


@pytest.mark.multirank
def test_what_four_ranks_tell_each_other():
    ranks = on_ranks(battery, Layout(tp=2, pp=2))
    for found in ranks:
        assert (found["main"], found["broadcast"], found["any"], found["model"]) == ("from 0", 5, (True, False), 1111)
        assert found["merged"] == {"own.0": 0, "own.1": 1, "both": 3}
        assert found["refused"] == ["no room", "lost on 1"]
    assert ranks[0]["first"].tolist() == [[0.0] * 3 + [1.0] * 3] * 2
    assert ranks[0]["last"].tolist() == [[10.0] * 3] * 2 + [[11.0] * 3] * 2
    assert ranks[0]["same"].tolist() == [[0.0] * 3] * 2
    assert all(found[name] is None for found in ranks[1:] for name in ("first", "last", "same"))


@pytest.mark.multirank
def test_replicas_add_up():
    ranks = on_ranks(battery, Layout(tp=2, dp=2))
    assert [found["replicas"] for found in ranks] == [[[2.0, 2.0], [[2.0]]], [[4.0, 4.0], [[2.0]]]] * 2
    assert [found["model"] for found in ranks] == [11, 11, 1100, 1100]


def exported_into(world, folder, target):
    source = open_folder(folder, "model.path")
    with pytest.raises(RequestError, match="cannot write"):
        export(load(source, world, torch.float32), world, source.config, folder, target, torch.float32)
    return True


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2)], ids=str)
def test_an_export_that_rank_0_cannot_write_is_refused_on_every_rank(layout, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert on_ranks(exported_into, layout, save_model(tmp_path / "model"), tmp_path / "file" / "hf") == [True, True]


def nested(world):
    with pytest.raises(AssertionError, match="alone"):
        on_main(world, lambda: on_main(world, lambda: 1))
    return True


def test_what_rank_0_does_alone_cannot_ask_the_others(alone):
    assert nested(alone)
