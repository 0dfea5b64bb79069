"""What is fetched of a repository on the Hub: the small files, and of the weights those that are read."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from qexport.errors import InputError
from qexport.models.files import INDEX, WHOLE
from qexport.models.source import open_model

COMMIT = "c" * 40
OTHERS = ("consolidated.safetensors", "model.fp16.safetensors", "original/model.safetensors", "pytorch_model.bin")
PARTS = tuple(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.fixture
def hub(model_folder, tmp_path, monkeypatch):
    """hub(files): a repository with a config and these files; returns the list of the files fetched of it."""
    fetched = []

    def make(*files, stated=None):
        source, folder = model_folder("llama"), tmp_path / "snapshots" / COMMIT
        config = json.loads((source / "config.json").read_text()) | {"transformers_weights": stated}
        there = {"config.json": json.dumps(config), "README.md": ""}
        there |= {INDEX: json.dumps({"weight_map": dict(enumerate(PARTS))})} if INDEX in files else {}

        def snapshot_download(name, *, allow_patterns, revision=COMMIT):
            assert (name, revision) == ("some/model", COMMIT)
            names = dict.fromkeys([*there, *files])
            for file in filter_repo_objects(names, allow_patterns=allow_patterns):
                target = folder / file
                if not target.exists():
                    fetched.append(file)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_text(there.get(file, ""))
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return fetched

    return make


@pytest.mark.parametrize(
    ("files", "stated", "weights"),
    [((WHOLE,), None, [WHOLE]), ((WHOLE, INDEX, *PARTS), None, [WHOLE]), ((INDEX, *PARTS), None, list(PARTS)),
     ((WHOLE, "a[b].safetensors"), "a[b].safetensors", ["a[b].safetensors"]),
     ((WHOLE, INDEX, *PARTS), INDEX, list(PARTS))],
)  # fmt: skip
def test_the_weights_that_transformers_reads_are_fetched_and_no_others(hub, files, stated, weights):
    fetched = hub(*OTHERS, *files, stated=stated)
    assert open_model("some/model").path.name == COMMIT
    small = ["config.json", "README.md", *([INDEX] if INDEX in files else [])]
    assert sorted(fetched) == sorted([*small, *weights])


@pytest.mark.parametrize(
    ("files", "stated", "why"),
    [((), None, f"some/model: has neither {WHOLE} nor {INDEX}. Download what it has"),
     ((WHOLE,), "mine.safetensors", "has no mine.safetensors, which its config.json names")],
)  # fmt: skip
def test_weights_under_other_names_are_refused_and_not_fetched(hub, files, stated, why):
    fetched = hub(*OTHERS, *files, stated=stated)
    with pytest.raises(InputError, match=why):
        open_model("some/model")
    assert not any(file.endswith((".safetensors", ".bin")) for file in fetched)


def test_an_adapter_is_known_before_its_weights_are_fetched(hub):
    fetched = hub("adapter_config.json", "adapter_model.safetensors")
    with pytest.raises(InputError, match="an adapter of an unnamed base"):
        open_model("some/model")
    assert "adapter_model.safetensors" not in fetched


@pytest.mark.parametrize("listed", [False, True])
def test_offline_what_was_fetched_is_found(model_folder, tmp_path, monkeypatch, listed):
    """In huggingface_hub's own cache, with its list of the repository's files or without."""
    cache = tmp_path / "models--some--model"
    snapshot = Path(shutil.copytree(model_folder("llama"), cache / "snapshots" / COMMIT))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    if listed:
        trees = pytest.importorskip("huggingface_hub._tree_cache")
        names = [*(p.name for p in snapshot.iterdir()), *OTHERS]
        entry = {"size": 1, "blob_id": "b", "lfs_sha256": None, "lfs_size": None, "xet_hash": None}
        trees.write_tree_cache(str(cache), COMMIT, {name: trees.TreeCacheEntry(**entry) for name in names})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_model("some/model").path == snapshot.resolve()
