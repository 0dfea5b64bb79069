from pathlib import Path

import pytest

from qexport.models.provenance import licence_of, origin
from qexport.models.source import ModelFolder


def test_a_local_folder_has_no_id_and_leaves_its_parents_out(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    assert origin(ModelFolder(folder, str(folder), None)) == {"name": "tiny", "hub_id": None, "licence": {}}


def test_what_is_not_here_was_an_id_of_the_hub(tmp_path):
    found = origin(ModelFolder(tmp_path, "some/model", None))
    assert (found["name"], found["hub_id"]) == ("some/model", "some/model")


def test_the_licence_is_what_the_front_matter_says(tmp_path):
    card = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\ntags: [a]\n---\n# M\nlicense: mit\n"
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "LICENSE").write_text("Apache License")
    found = {"license": "other", "license_name": "mine", "license_link": "LICENSE", "file": "LICENSE"}
    assert licence_of(tmp_path) == found


@pytest.mark.parametrize(
    "card", ["", "# no front matter\nlicense: mit\n", "---\nlicense: mit\n", "---\n- a\n---\n", "---\na: [\n---\n",
             "---\nlicense: [mit]\nlicense_name: 3\nlicense_link: ' '\n---\n"],
)  # fmt: skip
def test_nothing_is_guessed(tmp_path: Path, card):
    (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == {}


def test_a_card_that_is_no_text(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---")
    assert licence_of(tmp_path) == {}
