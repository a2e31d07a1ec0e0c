"""README's front door opens: its commands and programs run as they stand, and print what it says they print.

Only the address is changed. A ``curl`` block is followed by the JSON that it is answered with; a Python block goes on
where the one before it ended, and is followed by what it prints, as a quotation or a block of text.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
README: Final = (ROOT / "README.md").read_text("utf-8")
ADDRESS: Final = "http://127.0.0.1:11400"
NEW_EACH_TIME: Final = ("id", "created", "system_fingerprint", "usage")
"""The last but one names the version of PyTorch; the last, what others left in the prefix cache."""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def programs() -> list[tuple[str, str]]:
    """(program, what it prints: a quotation, or a block of text)."""
    shown = r"^```python\n(?P<code>.*?)^```\n\n(?:```text\n(?P<text>.*?)^```$|(?P<quote>(?:^> [^\n]*\n)+))?"
    found = re.finditer(shown, README, re.MULTILINE | re.DOTALL)
    return [(each["code"], each["text"] or (each["quote"] or "").replace("> ", "")) for each in found]


def stable(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in NEW_EACH_TIME}


@pytest.mark.slow
def test_the_commands_are_answered_as_shown(quiet_server: Any) -> None:
    commands = [code for code in blocks("") if code.startswith("curl")]
    answers = blocks("json")
    assert len(commands) == len(answers) > 0
    for command, shown in zip(commands, answers, strict=True):
        here = command.replace(ADDRESS, quiet_server.base_url).replace("curl ", "curl --silent --max-time 30 ", 1)
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=60, check=True)
        assert stable(json.loads(done.stdout)) == stable(json.loads(shown))


@pytest.mark.slow
def test_the_programs_print_what_is_shown(quiet_server: Any) -> None:
    names: dict[str, Any] = {}
    shown = programs()
    assert len(shown) >= 4
    for code, said in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code.replace(ADDRESS, quiet_server.base_url), "README.md", "exec"), names)
        assert said, "each program is followed by what it prints"
        assert printed.getvalue().split() == said.split()
    names["client"].close()


def test_every_page_of_the_documentation_is_linked_and_every_link_leads_somewhere() -> None:
    links = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
    assert [link for link in links if not (ROOT / link).exists()] == []
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages - links == set()
