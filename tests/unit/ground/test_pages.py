"""What the pages say: their links lead somewhere, and what they let one type is accepted."""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from bit_ray.cli.flags import parse
from bit_ray.cli.main import COMMANDS
from bit_ray.cli.submission import job_settings
from bit_ray.errors import ConfigError
from bit_ray.submission.config import PreflightConfig

ROOT = Path(__file__).parents[3]
ROOMS = ("docs", "clusters", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(page for room in ROOMS for page in (ROOT / room).rglob("*.md"))])
FENCED = re.compile(r"^[ \t]*```(\w*)\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
END = re.compile(r"[|&;<>()]+")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text()))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind ``bit-ray`` of each command in the page's blocks of code."""
    for _, block in FENCED.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
                lexer.whitespace_split = True
                words = list(lexer)
            except ValueError:  # a quote that goes on: no command of ours
                continue
            before = "", *words
            for i, word in enumerate(words):
                if word == "bit-ray" and (i == 0 or before[i].endswith((".sbatch", "/bit-ray"))):
                    end = next((j for j in range(i, len(words)) if END.fullmatch(words[j])), len(words))
                    yield words[i + 1 : end]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_of_a_page_is_accepted(page: Path) -> None:
    for words in commands(page):
        command = " ".join(words[: 1 if words[0] in COMMANDS else 2])
        assert command in COMMANDS, words
        given = words[len(command.split()) :]
        # More stands where "..." does, unless it is a flag's value.
        shown = [word for before, word in pairwise(["", *given]) if word != "..." or before.startswith("-")]
        if "--help" not in shown:
            message = refusal(command, shown)
            assert not message or (len(shown) < len(given) and re.search(": (missing|empty); ", message)), words


def refusal(command: str, words: list[str]) -> str:
    try:
        config = parse(COMMANDS[command].config, words, prog=command)
        if isinstance(config, PreflightConfig):
            job_settings(config)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_that_a_page_names_is_there(page: Path) -> None:
    for named in re.findall(r"`bit-ray ([a-z][a-z -]*)", page.read_text()):
        words = named.split()
        assert words[0] in COMMANDS or any(command.startswith(" ".join(words[:2])) for command in COMMANDS), named
