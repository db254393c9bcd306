"""The documentation says what is there."""

import re
import subprocess
import sys

import pytest

from tools import readme
from utils.config.args import build_parser
from utils.files import ROOT

READMES = {"README.md": 9_500, "README.zh-CN.md": 10_000}  # with the most bytes they may have
DOCUMENTS = [
    *READMES, "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
]  # fmt: skip
# What the examples tell readers to write is not there.
EXAMPLES = re.compile("linear|lenet|NAME")


def read(name):
    return (ROOT / name).read_text()


def test_the_tables_of_the_documents_are_up_to_date():
    command = [sys.executable, "-m", "tools.readme", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
    for table in readme.TABLES:
        assert any(f"<!-- {table}: begin" in read(name) for name in readme.FILES), table


def test_every_flag_is_documented():
    text = read("docs/flags.md")
    hidden = {"-h", "--help", "--local-rank", "--local_rank", "--no-exchange"}
    for action in build_parser()._actions:
        for flag in set(action.option_strings) - hidden:
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), flag


def test_every_file_is_documented():
    text = read("docs/architecture.md")
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("cifar*.py")]:
        assert f"`{path.name}`" in text, path.name
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `utils/")}
    for path in (ROOT / "utils").rglob("*.py"):
        if path.name == "__init__.py" or path == ROOT / "utils" / "plot.py":
            continue
        wing = path.relative_to(ROOT).parts[1] + "/" if path.parent != ROOT / "utils" else ""
        name = path.relative_to(ROOT / "utils" / wing)
        assert f"`{name}`" in rows[f"utils/{wing}"], path


@pytest.mark.parametrize(("name", "most"), READMES.items())
def test_a_readme_is_short(name, most):
    assert len((ROOT / name).read_bytes()) <= most


def test_both_readmes_show_the_same_commands():
    def commands(text):
        blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
        lines = "".join(blocks).splitlines()
        return [line.split("#")[0].strip() for line in lines]

    english, chinese = (commands(read(name)) for name in READMES)
    assert chinese == english
    assert len(english) > 10


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if re.match("https?://", link):
            continue
        file, _, part = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), link
        if part:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            parts = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
            assert part in parts, link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_names_are_there(name):
    folders = "bench|docs|models|tests|tools|utils"
    for path in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]+\.(?:py|sh|md))", read(name)):
        assert EXAMPLES.search(path) or (ROOT / path).exists(), path


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_examples_pass_the_lint(name):
    examples = re.findall(r"^```python\n(.*?)^```", read(name), re.M | re.S)
    assert examples
    for example in examples:
        file = "tests/unit/test_example.py" if "def test_" in example else "models/example.py"
        for task in (["check"], ["format", "--check"]):
            command = [sys.executable, "-m", "ruff", *task, "--stdin-filename", file, "-"]
            result = subprocess.run(
                command, cwd=ROOT, input=example, capture_output=True, text=True, timeout=60
            )
            assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", ["reliability.md", "foreign-files.md"])
def test_every_test_that_a_promise_names_exists(page):
    """The tables name them as `file` or `file: part of a name`, one in each row at least."""
    text = (ROOT / "docs" / page).read_text()
    (head,) = (line for line in text.splitlines() if line.endswith("| test |"))
    rows = text.partition(head)[2].partition("\n\n")[0].strip().splitlines()[1:]
    assert len(rows) > 20
    cells = {row: row.rpartition(" | ")[2] for row in rows}
    assert [row for row, cell in cells.items() if "`test_" not in cell] == []
    for row, cell in cells.items():
        text = text.replace(row, cell)
    named = re.findall(r"`(test_\w+)(?::\s(\w+))?`", text)
    for file, word in named:
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        source = path.read_text()
        names = re.findall(r"^ *(?:def|class) (\w+)", source, re.MULTILINE)
        assert any(word in name for name in names), (file, word)
