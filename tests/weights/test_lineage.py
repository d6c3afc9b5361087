"""What goes along with what is made of a model: its licence, its notices, its name on the hub."""

import json
import re

import pytest
import torch

from minitron.weights.lineage import carried, front_matter, hub_id, notices
from minitron.weights.load import load
from minitron.weights.save import export
from minitron.weights.source import open_folder
from tests.oracles.models import save_model

FRONT = "---\nlicense: llama3.1\nlicense_name: community\nlanguage:\n- en\n- de\nbase_model: a/b\nextra: 7\n---\n# Title\n---\nlicense: mit\n---\n"


def test_the_licence_that_a_readme_names(tmp_path):
    (tmp_path / "README.md").write_text(FRONT)
    assert carried(tmp_path) == {"license": "llama3.1", "license_name": "community", "language": ["en", "de"]}


@pytest.mark.parametrize(("tags", "made_here"), [("[minitron, pruning]", True), ("[llama]", False), ("minitron", False), ("7", False)])
def test_what_a_model_was_made_of_is_told_by_one_that_was_made_here(tags, made_here, tmp_path):
    """Another's `base_model` is what it was fine-tuned from, and not the model that is cut."""
    (tmp_path / "README.md").write_text(f"---\nbase_model: a/b\ntags: {tags}\n---\n")
    assert carried(tmp_path) == ({"base_model": "a/b"} if made_here else {})


def test_a_licence_that_only_lies_there(tmp_path):
    assert carried(tmp_path) == {}
    (tmp_path / "NOTICE").write_text("Built with")
    assert carried(tmp_path) == {}
    (tmp_path / "LICENSE.txt").write_text("You may")
    assert carried(tmp_path) == {"license": "other", "license_link": "LICENSE.txt"}
    assert [file.name for file in notices(tmp_path)] == ["LICENSE.txt", "NOTICE"]


UNREADABLE = [
    "", "# Title", "---\n", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: {a: 1}\n---\n",
    "---\nlicense: !!python/name:os.system\n---\n", "---\n" + "[" * 400 + "\n---\n",
]  # fmt: skip


@pytest.mark.parametrize("text", UNREADABLE, ids=range(len(UNREADABLE)))
def test_a_readme_that_says_nothing_that_can_be_read(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert carried(tmp_path) == {}


def test_a_model_from_the_hub_has_its_name(tmp_path):
    folder = tmp_path / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    assert hub_id(folder) == "meta-llama/Llama-3.1-8B"
    (folder / "README.md").write_text(FRONT)
    assert carried(folder)["base_model"] == "meta-llama/Llama-3.1-8B"
    assert hub_id(tmp_path) is None


def test_an_export_has_the_terms_and_none_of_the_code(alone, tmp_path):
    folder = save_model(tmp_path / "model")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "tokenizer_own.py", "README.md", "own.py"):
        (folder / name).write_text(f"of {name}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "own.Own"}}))
    source = open_folder(folder, "model.path")
    export(
        load(source, alone, torch.float32), alone, source.config, folder, tmp_path / "hf", torch.float32, {"README.md": "---\nlicense: mit\n---\n"}
    )
    found = {file.name for file in (tmp_path / "hf").iterdir()}
    assert {"LICENSE", "NOTICE.txt", "USE_POLICY.md", "README.md"} < found and not any(name.endswith(".py") for name in found)
    assert front_matter(tmp_path / "hf" / "README.md") == {"license": "mit"}
    assert not re.search("auto_map", (tmp_path / "hf" / "config.json").read_text())
