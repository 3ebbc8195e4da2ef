"""What README and docs show must exist: commands, options, files, Python names, recipes."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import medseg
from medseg.api.recipes import read_recipe, recipe_paths, recipes_folder
from medseg.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
}
LAYOUT = PAGES["docs/layout.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(medseg [^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SCRIPT = re.compile(r"\b(scripts/[\w./]+)")
PLACEHOLDERS = {"DATASET", "CONFIG", "FOLD", "COMMAND"}


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    return [code for name, code in FENCE.findall(PAGES[page]) if name == language]


def command_lines(code: str) -> list[list[str]]:
    r"""Return the `medseg` command lines of a shell block as lists of arguments.

    >>> command_lines("scripts/test\nmedseg plan show 7  # reasons\n")
    [['plan', 'show', '7']]
    """
    lines = code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["medseg"]]


SHOWN = [
    pytest.param(arguments, id=f"{page}: {' '.join(arguments)}"[:90])
    for page in PAGES
    for code in blocks(page, "bash")
    for arguments in command_lines(code)
]


def parse(arguments: list[str]) -> dict[str, Any]:
    """Parse a command line as the program does, without running it; return its values."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("medseg", list(arguments))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(name, rest, parent=context)
    return dict(context.params)


def commands() -> dict[str, Any]:
    """Return every command of the program by its full name."""
    top: Any = typer.main.get_command(app)
    found = {}
    for name, command in top.commands.items():
        nested = getattr(command, "commands", None)
        found |= {f"{name} {sub}": c for sub, c in nested.items()} if nested else {name: command}
    return found


def options(command: Any) -> set[str]:
    """Return every spelling of every option of a command."""
    return {text for item in command.params for text in item.opts if text.startswith("-")}


SECOND_WORDS = "show|list|copy|init|check|diff|pack|unpack|join|info|fetch|nnunet|totalsegmentator"


class TestCommands:
    @pytest.mark.parametrize("arguments", SHOWN)
    def test_shown_command_line_parses(self, arguments: list[str]) -> None:
        parse(arguments)

    def test_parsing_refuses_what_does_not_exist(self) -> None:
        for wrong in (["trian", "1", "2d", "0"], ["train", "1", "2d", "0", "--bugdet", "1h"]):
            with pytest.raises(typer.BadParameter.__mro__[2]):
                parse(wrong)

    def test_readme_shows_the_way_from_data_to_scores(self) -> None:
        shown = [arguments[0] for code in blocks("README.md", "bash")
                 for arguments in command_lines(code)]  # fmt: skip
        way = ["plan-and-preprocess", "train", "crossval", "predict", "evaluate"]
        foreign = ["predict", "import", "import", "export"]
        assert shown == [*way, *foreign, "predict", "export", "serve"]

    @pytest.mark.parametrize("page", PAGES)
    def test_commands_in_running_text_exist(self, page: str) -> None:
        known = commands()
        for text in INLINE.findall(PAGES[page]):
            words = shlex.split(text)[1:]
            while words and (words[0].startswith("-") or words[0] in PLACEHOLDERS):
                words.pop(0)
            name = next((n for n in (" ".join(words[:2]), *words[:1]) if n in known), None)
            assert name is not None or not words, f"{page}: no command {text!r}"
            found = {word for word in words if word.startswith("-")}
            assert name is None or found <= options(known[name]), f"{page}: {text!r}"

    def test_recipes_in_commands_exist(self) -> None:
        for shown in SHOWN:
            recipe = parse(shown.values[0]).get("recipe", "default")
            assert recipe.endswith(".yaml") or recipe in recipe_paths(), shown.id


class TestLayout:
    """docs/layout.md lists every command with exactly the options it has."""

    SYNOPSIS = LAYOUT[LAYOUT.index("\n  demo [") : LAYOUT.index("\n```\n\nExit status")]
    ENTRIES = tuple(re.sub(r"\s+", " ", part) for part in re.split(r"\n  (?! )", SYNOPSIS)[1:])

    def test_every_command_is_listed_once(self) -> None:
        names = [
            re.match(rf"[a-z-]+(?: (?:{SECOND_WORDS}))?", entry).group() for entry in self.ENTRIES
        ]
        assert sorted(names) == sorted([*commands(), "plan show", "plan diff"])

    @pytest.mark.parametrize("name", sorted(commands()))
    def test_options_are_those_of_the_program(self, name: str) -> None:
        entry = next(e for e in self.ENTRIES if re.match(rf"{name}(?: [A-Z\[-]|$)", e))
        assert set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", entry)) == options(commands()[name])


class TestPages:
    @pytest.mark.parametrize("page", PAGES)
    def test_relative_links_lead_somewhere(self, page: str) -> None:
        for link in LINK.findall(PAGES[page]):
            if re.match(r"\w+:", link):
                continue
            target, _, anchor = link.partition("#")
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(path), f"{page}: {link}"

    @pytest.mark.parametrize("page", PAGES)
    def test_scripts_exist(self, page: str) -> None:
        missing = [name for name in SCRIPT.findall(PAGES[page]) if not (ROOT / name).exists()]
        assert not missing

    @pytest.mark.parametrize("page", sorted(set(PAGES) - {"README.md", "README.zh-CN.md"}))
    def test_every_page_is_linked(self, page: str) -> None:
        target = (ROOT / page).resolve()
        linked = {
            ((ROOT / other).parent / link.partition("#")[0]).resolve()
            for other in PAGES
            if other != page
            for link in LINK.findall(PAGES[other])
        }
        assert target in linked

    def test_chinese_readme_shows_the_same(self) -> None:
        english, chinese = PAGES["README.md"], PAGES["README.zh-CN.md"]
        swap = {"README.md": "README.zh-CN.md"}
        assert sorted(swap.get(link, link) for link in LINK.findall(chinese)) == sorted(
            LINK.findall(english)
        )
        for language in ("bash", "python"):
            codes = [blocks(page, language) for page in ("README.md", "README.zh-CN.md")]
            assert len(codes[0]) == len(codes[1])
            for ours, theirs in zip(*codes, strict=True):
                assert without_comments(ours) == without_comments(theirs)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def without_comments(code: str) -> list[str]:
    """Return the lines of a block up to their comments."""
    return [re.sub(r"\s*# .*", "", line) for line in code.splitlines()]


PYTHON = [
    pytest.param(code, id=f"{page}-{number}")
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"))
]


class TestPython:
    @pytest.mark.parametrize("code", PYTHON)
    def test_code_compiles_and_names_exist(self, code: str) -> None:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and is_medseg(node.value):
                assert node.attr in medseg.__all__, node.attr
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("medseg"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.dump(node)

    @pytest.mark.parametrize("code", PYTHON)
    def test_calls_fit_their_signatures(self, code: str) -> None:
        for node in ast.walk(ast.parse(code)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = medseg if is_medseg(node.func.value) else medseg.Model
            function = getattr(owner, node.func.attr, None)
            if function is None or not (owner is medseg or node.func.attr.startswith("predict")):
                continue
            own = [None] if owner is medseg.Model else []
            keywords = {str(keyword.arg): None for keyword in node.keywords}
            inspect.signature(function).bind(*own, *node.args, **keywords)


def is_medseg(node: ast.expr) -> bool:
    """Return whether an expression is the name `medseg`."""
    return isinstance(node, ast.Name) and node.id == "medseg"


class TestRecipes:
    def test_there_are_recipes(self) -> None:
        assert {"default", "demo"} <= set(recipe_paths())
        assert recipes_folder().name == "configs"

    @pytest.mark.parametrize("name", recipe_paths())
    def test_recipe_loads_and_says_what_it_is_for(self, name: str) -> None:
        assert read_recipe(name).description

    @pytest.mark.parametrize("name", recipe_paths())
    def test_recipe_opens_with_command_time_and_result(self, name: str) -> None:
        lines = recipe_paths()[name].read_text(encoding="utf-8").splitlines()
        comment = lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]
        assert comment[0].startswith(f"# {name}: ")
        text = "\n".join(line.removeprefix("#") for line in comment)
        command = next(line.strip() for line in text.splitlines() if line.startswith("   medseg"))
        parse(shlex.split(command)[1:])
        assert re.search(r"\b(\d+ ?(s|min|minutes|h|hours)|a day)\b", text), "no time"
        assert re.search(r"\b(Dice|result)\b", text), "no result"

    @pytest.mark.parametrize("name", recipe_paths())
    def test_documented_fields_are_those_of_the_schema(self, name: str) -> None:
        page = PAGES["docs/how-to/change-a-recipe.md"]
        recipe = read_recipe(name).model_dump()
        for section, value in recipe.items():
            assert f"`{section}`" in page or section == "format_version"
            if isinstance(value, dict) and section != "augmentation":
                row = next(line for line in page.splitlines() if line.startswith(f"| `{section}`"))
                assert set(value) <= set(re.findall(r"`(\w+)`", row))
