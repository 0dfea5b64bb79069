"""report.html: hostile names stay text, what is missing is not there, and nothing is asked of the network."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from helpers.report_folders import full_report, logits, plain_report, write_validated
from qexport.errors import InputError
from qexport.report import render
from qexport.report.exported import read_export
from qexport.report.html import render_html
from qexport.validation.report import InputRange, ValueComparison
from qexport.validation.verdict import with_verdict

HOSTILE = """</script><script>alert(1)</script><img src=x onerror=alert(1)>"'&{{ 7 * 7 }}"""
# Elements whose end tag HTML leaves out.
VOID = {"meta", "input", "br", "img", "link"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where elements are not nested."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self._open = [], [], []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(folder, report, **options) -> Page:
    return Page(render_html(write_validated(folder, report, **options)))


def test_a_full_report_shows_everything(tmp_path):
    page = page_of(tmp_path, full_report(), export={"calibration": "32 windows", "float": [
        {"linear": "lm_head", "reason": "kept in float by the recipe"}]})  # fmt: skip
    for words in (
        "Quality: fair", "Numerics: as planned", "10 → 11", "float16 in PyTorch", "Own error", "Cost in KL",
        "KL along the text", "Into q_proj",
        "What single linears cost", "Greedy continuations alike", "Every value", "Suggested overrides",
        "model.layers.2.mlp.down_proj", "32 windows", "lm_head : kept in float by the recipe", "some.option",
        "inputs are rounded", "1.31.1", "2.13.0", "name: mine",
        "qexport export some/model --out out --recipe recipe.yaml --target cpu",
        "qexport validate out --reference some/model --text 'my text.txt' --windows 2 --window 33",
    ):  # fmt: skip
        assert words in page.text, words


def test_problems_come_first(tmp_path):
    report = plain_report()
    broken = report.layers.linears[0].model_copy(update=dict(max_abs_error=None, own_sqnr_db=None))
    layers = report.layers.model_copy(update=dict(linears=(broken, *report.layers.linears[1:])))
    text = page_of(tmp_path, with_verdict(report.model_copy(update=dict(layers=layers)))).text
    assert "as planned" not in text and "Numerics: 1 problem " in text
    assert text.index("NaN or Inf comes out of model.layers.0.self_attn.q_proj") < text.index("KL from the float model")


def test_an_old_report_shows_what_it_has(tmp_path):
    page = page_of(tmp_path, plain_report())
    for words in ("Cost in KL", "Activations", "Suggested overrides", "Beside other", "KL cost", "qexport validate"):
        assert words not in page.text, words
    assert page.count("figure") == 3 and "qexport export some/model" in page.text


def test_a_report_of_nothing_but_null(tmp_path):
    empty = ValueComparison(name="a.0.b", block="a.0")
    report = full_report()
    layers = report.layers.model_copy(update=dict(
        linears=(empty, ValueComparison(name="a.1.b", block="a.1")), blocks=(empty, empty), attentions=(empty,),
        ranges=2 * (InputRange(block="", linears=(), float_absmax=None, absmax=None, float_spread=None, spread=None),),
    ))  # fmt: skip
    nothing = dict.fromkeys(["kl_mean", "kl_median", "kl_p99", "float_perplexity", "perplexity"])
    scores = logits(**nothing, nonfinite_tokens=64, kl_by_position=(None, None, None))
    report = with_verdict(report.model_copy(update=dict(layers=layers, logits=scores, sensitivity=None)))
    page = page_of(tmp_path, report, bytes={}, session={}, numerics={}, recipe="")
    assert "problem" in page.text and "None" not in page.text and "nan" not in page.text.replace("NaN", "")


def test_a_model_without_text_shows_its_outputs(tmp_path):
    row = ValueComparison(name="scores", sqnr_db=33.3, cosine=1.0, max_abs_error=0.1)
    report = with_verdict(plain_report().model_copy(update=dict(logits=None, outputs=(row,), reference="Classifier")))
    page = page_of(tmp_path, report, kind="module", export={"source": {"name": "Classifier"}})
    assert "Output scores" in page.text and "33.3 dB" in page.text and "Perplexity" not in page.text
    assert "qexport export" not in page.text, "there is no command line for an nn.Module"


def test_hostile_names_stay_text(tmp_path):
    report = full_report()
    linears = tuple(
        row.model_copy(update=dict(name=row.name + HOSTILE, scheme=HOSTILE)) for row in report.layers.linears
    )
    report = with_verdict(report.model_copy(update=dict(
        reference=HOSTILE, text=HOSTILE, layers=report.layers.model_copy(update=dict(linears=linears)),
        settings={"reference": HOSTILE, HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}, seconds={HOSTILE: 1.0},
    )))  # fmt: skip
    options = dict(
        export={"source": {"name": HOSTILE}, "calibration": HOSTILE, "float": [{"linear": HOSTILE, "reason": HOSTILE}]},
        recipe=f"name: {HOSTILE!r}\n# {HOSTILE}\n", session={HOSTILE: HOSTILE}, numerics={HOSTILE: HOSTILE},
    )  # fmt: skip
    page = page_of(tmp_path / "hostile", report, **options)
    harmless = page_of(tmp_path / "harmless", full_report())
    assert page.count("script") == harmless.count("script") == 1 and page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in " ".join(page.texts) and "{{ 7 * 7 }}" in page.text


def test_nothing_is_loaded_and_only_our_script_runs(tmp_path):
    page = render_html(write_validated(tmp_path, full_report()))
    found = Page(page)
    assert not any(key in attributes for _, attributes in found.tags for key in ("src", "href", "style", "onclick"))
    assert re.findall(r"https?:|@import|url\(", page) == []
    (policy,) = [a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        inside = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_numbers_stand_behind_the_cells_and_null_is_empty(tmp_path):
    report = full_report()
    row = report.layers.linears[0].model_copy(update=dict(kl_cost=None, own_sqnr_db=1 / 3))
    layers = report.layers.model_copy(update=dict(linears=(row, *report.layers.linears[1:])))
    page = render_html(write_validated(tmp_path, report.model_copy(update=dict(layers=layers))))
    first = page.split('id="rows"')[1].split("<tbody>")[1].split("</tr>")[0]
    assert f'<td class="n" data-v="{1 / 3}">0.3</td>' in first and '<td class="n"></td>' in first


def test_a_page_is_written_whole_and_again(tmp_path):
    write_validated(tmp_path, plain_report())
    before = {p.name for p in tmp_path.iterdir()}
    path = render(tmp_path)
    first = path.read_bytes()
    assert render(tmp_path).read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} - before == {"report.html"} == {path.name}


def test_folders_without_a_validation(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        render(tmp_path / "nowhere")
    write_validated(tmp_path, plain_report())
    (tmp_path / "report.json").write_text('{"export": {}}')
    with pytest.raises(InputError, match="never validated.*Run qexport validate"):
        render(tmp_path)
    (tmp_path / "report.json").unlink()
    assert read_export(tmp_path).report is None
    (tmp_path / "report.json").write_text('{"validation": {"reference": 3}}')
    with pytest.raises(InputError, match=r"damaged or of another version of qexport \(reference: .*validate"):
        render(tmp_path)
    whole = {"validation": plain_report().as_dict()}
    whole["validation"]["layers"]["linears"][0]["sqnr_db"] = "much"
    (tmp_path / "report.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match=r"damaged .*layers\.linears\.0\.sqnr_db"):
        render(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(InputError, match="unreadable"):
        render(tmp_path)


def test_an_export_part_of_another_shape_is_no_obstacle(tmp_path):
    write_validated(tmp_path, plain_report())
    for export in ([], {"float": 3, "apart": [1], "source": "x", "calibration": None}, {"source": {"licence": 7}}):
        page_of(tmp_path, plain_report(), export=export)
