"""README.md of an export: what is known, nothing made up, and hostile names are text."""

import re

import pytest
import yaml

from helpers.report_folders import full_report, logits, plain_report, write_validated
from qexport.report import write_card
from qexport.report.card import code, front_matter, render_card, text
from qexport.report.exported import recipe_settings

HUB = {"name": "some/model", "hub_id": "some/model", "licence": {"license": "apache-2.0", "file": "LICENSE"}}


def front(card: str) -> dict:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_a_card_of_a_model_from_the_hub(tmp_path):
    card = render_card(write_validated(tmp_path, full_report(), export={"source": HUB}))
    assert front(card) == {
        "base_model": "some/model", "license": "apache-2.0", "base_model_relation": "quantized",
        "library_name": "onnxruntime", "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime", "quantized", "qexport", "w4a16_g32"],
    }  # fmt: skip
    assert "[some/model](https://huggingface.co/some/model)" in card
    assert "qexport generate ." in card and "That of the source model: apache-2.0." in card
    assert "| perplexity, quantized | 11 |" in card and "| whole model | 3.0 MB |" in card
    assert "| `some.option` | `4` |" in card and "onnxruntime_genai" not in card, "there is no genai_config.json"
    assert "--chat" not in card and "ORT_DISABLE_TELEMETRY=1" in card
    (tmp_path / "genai_config.json").write_text('{"model": {"context_length": 99}}')
    (tmp_path / "chat_template.jinja").touch()
    card = render_card(write_validated(tmp_path, full_report()))
    assert "max_length=99" in card and "add_special_tokens=True" in card and "apply_chat_template" in card


def test_nothing_is_made_up(tmp_path):
    exported = write_validated(tmp_path, plain_report(reference="/home/somebody/secret/tiny"))
    card = render_card(exported)
    assert {"base_model", "license"}.isdisjoint(front(card)) and "See the source model." in card
    assert "secret" not in card and "# tiny, mine" in card


def test_before_a_validation_there_are_no_numbers(tmp_path):
    exported = write_validated(tmp_path, plain_report(), export={"source": HUB})
    card = render_card(type(exported)(tmp_path, exported.manifest, "", exported.export, None))
    assert "Not validated yet" in card and "perplexity" not in card


def test_a_licence_file_is_named(tmp_path):
    source = {"name": "m", "hub_id": None, "licence": {"file": "LICENSE"}}
    card = render_card(write_validated(tmp_path, plain_report(), export={"source": source}))
    assert "That of the source model, in `LICENSE`." in card and "license" not in front(card)


def test_problems_are_in_the_card(tmp_path):
    report = plain_report().model_copy(update=dict(problems=("2 linears are not fused: a, b",)))
    assert "- 2 linears are not fused: a, b" in render_card(write_validated(tmp_path, report))


def test_a_model_without_text(tmp_path):
    report = plain_report().model_copy(update=dict(logits=None))
    card = render_card(write_validated(tmp_path, report, kind="module"))
    assert "pipeline_tag" not in front(card) and "qexport generate" not in card and "InferenceSession" in card


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a`b``c", "x | y\n# z", "[a](javascript:alert(1))"])
def test_hostile_names(tmp_path, name):
    source = {"name": name, "hub_id": name, "licence": {"license": name, "license_link": name}}
    exported = write_validated(
        tmp_path, plain_report(), export={"source": source}, session={name: name}, recipe=yaml.safe_dump({"name": name})
    )
    card = render_card(exported)
    assert front(card)["base_model"] == name and front(card)["license"] == name
    body = card.split("---\n", 2)[2]
    outside = "".join(body.split("`")[::2])  # code spans show what is in them
    assert "<script" not in outside and not re.search(r"(?<!\\)\]\(javascript", outside) and "\n# z" not in body
    assert yaml.safe_load(front_matter(exported))["base_model"] == name


def test_code_and_text_of_markdown():
    assert code("a_b") == "`a_b`" and code("a`b") == "`` a`b ``" and code("a\n<b>|") == "`a <b>\\|`"
    assert text("<b>_x_ [y]\n`z`") == "&lt;b&gt;\\_x\\_ \\[y\\] \\`z\\`"


def test_a_card_of_ones_own_stays(tmp_path):
    exported = write_validated(tmp_path, plain_report())
    path = write_card(exported)
    first = path.read_text()
    other = plain_report().model_copy(update=dict(logits=logits(perplexity=98.76)))
    assert write_card(write_validated(tmp_path, other)) == path and "98.76" in path.read_text() and "98.76" not in first
    path.write_text("# Mine\n")
    assert write_card(exported) is None and path.read_text() == "# Mine\n"


@pytest.mark.parametrize("recipe", ["[" * 10_000, "name: [unfinished", "- a list", "name: &a [*a]"])
def test_a_recipe_that_cannot_be_read_says_nothing(recipe):
    assert recipe_settings(recipe) == {}
