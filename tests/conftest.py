"""What every test may ask for: a process group of one rank, real data where it is, a small corpus."""

import ast
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# before torch is imported: the models here are tiny, and threads that wait for each other cost more than they give
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("minitron", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("minitron")


@pytest.fixture
def alone() -> Iterator[object]:
    """The `World` of a single process on the CPU."""
    from minitron.config.schema import Parallel
    from minitron.engine.parallel import world

    with world(Parallel(), "cpu", 1) as here:
        yield here


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of test data."""
    root = Path(os.environ.get("MINITRON_TEST_DATA", Path(__file__).parents[1].parent / "shared" / "data")).resolve()
    if not root.is_dir():
        pytest.skip(f"no test data in {root} (MINITRON_TEST_DATA)")
    return root


@pytest.fixture(scope="session")
def stories(data_root: Path) -> Path:
    """A trained Llama of 260 thousand parameters with its tokenizer: 5 layers, hidden 64, 8 heads in 4 groups, ffn 172, vocabulary 512."""
    if not (data_root / "stories260k").is_dir():
        pytest.skip(f"no stories260k in {data_root} (MINITRON_TEST_DATA)")
    return data_root / "stories260k"


@pytest.fixture(scope="session")
def docstrings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of English: what Python's own modules say of themselves, one document a module."""
    path = tmp_path_factory.mktemp("text") / "docstrings.jsonl"
    with open(path, "w", encoding="utf-8") as handle:
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py")):
            nodes = [
                node
                for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
                if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            ]
            text = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
            if text:
                handle.write(json.dumps({"text": text}) + "\n")
    return path
