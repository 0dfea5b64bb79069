"""The documentation leads nowhere that is not there, and names no command that is not one."""

import re
from pathlib import Path

import pytest
import torch

from qexport.runtime.session import open_session
from qexport.validation.running import run_session

HOME = Path(__file__).parents[2]
PAGES = [HOME / "README.md", *sorted(HOME.glob("docs/**/*.md")), *HOME.glob("[pt]*s/README.md")]
MADE = ("index.md", "passes.md", "reference/", "results/")  # pages of the site that tools/site.py writes
COMMANDS = {path.stem for path in (HOME / "qexport" / "cli" / "commands").glob("*.py")}


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HOME)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith("https://"):
            continue
        name, _, part = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target.is_relative_to(HOME / "docs") and str(target.relative_to(HOME / "docs")).startswith(MADE):
            continue
        assert target.exists(), link
        assert not part or part in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HOME)))
def test_scripts_and_commands_are_there(page):
    text = page.read_text("utf-8")
    for script in re.findall(r"(?<![\w/])(?:samples|tools)/\w+(?:/\w+)*\.(?:py|md|yaml)\b", text):
        assert (HOME / script).is_file(), script
    code = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL))
    for command in re.findall(r"^qexport ([a-z]+)", code, re.MULTILINE):
        assert command in COMMANDS, command


def test_the_first_page_is_short():
    assert len(PAGES[0].read_bytes()) <= 8192


def test_every_page_is_on_the_site():
    listed = set(re.findall(r"[\w/-]+\.md", (HOME / "mkdocs.yml").read_text("utf-8")))
    pages = {page.relative_to(HOME / "docs").as_posix() for page in HOME.glob("docs/**/*.md")}
    assert pages <= listed and all(page.startswith(MADE) for page in listed - pages)


def test_errors_are_quoted_as_they_are():
    quoted = re.findall(r"^`(.+)`$", (HOME / "docs" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    code = "\n".join(path.read_text("utf-8") for path in HOME.glob("qexport/**/*.py"))
    assert len(quoted) > 4 and [sentence for sentence in quoted if sentence not in code] == []


@pytest.mark.parametrize("family", ["llama", "opt", pytest.param("bloom", marks=pytest.mark.slow)])
def test_the_loop_of_the_documentation_writes_what_one_pass_finds_likeliest(export_folder, family):
    """Positions that the graph counts, positions that are an input, and standard attention."""
    said = (HOME / "docs" / "deploying.md").read_text("utf-8")
    names: dict = {}
    exec(compile(next(iter(re.findall(r"```python\n(.*?)```", said, re.DOTALL))), "docs/deploying.md", "exec"), names)
    folder, prompt = export_folder(family, "w8a16"), [5, 9, 17, 4]
    written = names["write"](str(folder), prompt, 6)
    ids = torch.tensor([[*prompt, *written]])
    session = open_session(folder)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}
    given = {value.name: value for value in session.get_inputs()}
    empty = {n: torch.zeros(1, v.shape[1], 0, v.shape[3]) for n, v in given.items() if n.startswith("past")}
    (logits,) = run_session(session, {n: feeds[n] for n in feeds if n in given} | empty, ["logits"]).values()
    assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == written
