"""What a check found: a table that fits a terminal, and a page that needs no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from medseg.report.text import WIDTH, columns, shortened, wrap
from medseg.schema.check import CaseFacts, CheckReport, Problem

_MAX_SHOWN = 20
_NAME_COLUMNS = 23
_SCRIPT = """
const body = document.querySelector("#cases tbody");
const rows = Array.from(body.rows);
function show() {
  const text = document.querySelector("#find").value.toLowerCase();
  const level = document.querySelector("#level").value;
  for (const row of rows) {
    const fits = level === "all" || row.dataset.level === level;
    row.hidden = !(fits && row.textContent.toLowerCase().includes(text));
  }
}
document.querySelector("#find").addEventListener("input", show);
document.querySelector("#level").addEventListener("change", show);
let last = null, sign = 1;
document.querySelectorAll("#cases th button").forEach((button, column) => {
  button.addEventListener("click", () => {
    sign = last === column ? -sign : 1;
    last = column;
    const key = (row) => row.cells[column].dataset.key;
    rows.sort((a, b) => {
      const x = key(a), y = key(b), difference = x - y;
      return sign * (Number.isNaN(difference) ? x.localeCompare(y) : difference);
    });
    body.append(...rows);
  });
});
"""
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --error: #c0281c; --warning: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --error: #ff7b6b; --warning: #e3b341; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 88rem;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; }
h2 { font-size: 1.1rem; margin-top: 1.8rem; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid var(--line); padding: .45rem .6rem; text-align: left;
  vertical-align: top; }
th button { background: none; border: 0; color: inherit; cursor: pointer; font: inherit;
  font-weight: 600; padding: 0; white-space: nowrap; width: auto; }
th button:focus-visible { outline: 2px solid; }
th button::after { content: " \\2195"; opacity: .4; }
.error b { color: var(--error); } .warning b { color: var(--warning); }
.good { opacity: .6; }
.case { font-weight: 600; overflow-wrap: anywhere; min-width: 7rem; }
td p { margin: 0 0 .5rem; overflow-wrap: anywhere; max-width: 46rem; min-width: 22rem; }
.fix { opacity: .75; } code { font-size: .92em; }
img { image-rendering: pixelated; max-width: none; display: block; background: #121212; }
.controls { display: flex; gap: 1rem; margin: .8rem 0; flex-wrap: wrap; }
input, select { font: inherit; padding: .25rem .4rem; }
.scroll { overflow-x: auto; } .numbers { white-space: nowrap; }
"""


def format_check(report: CheckReport) -> str:
    """Return a summary by kind of problem and what each error says, at most 80 columns wide."""
    problems = all_problems(report)
    num_fixes = sum(problem.fix is not None for problem in problems)
    blocks = [wrap(_headline(report))]
    if num_fixes:
        text = f"--fix OUT would write a copy with {_count(num_fixes, 'problem')} corrected."
        blocks[0] += wrap(text)
    if problems:
        blocks.append(_kinds(problems))
    for level in ("error", "warning"):
        chosen = [problem for problem in problems if problem.level == level]
        chosen = chosen if level == "error" else _one_of_each(chosen)
        lines = [line for problem in chosen[:_MAX_SHOWN] for line in wrap(_line(problem))]
        if len(chosen) > _MAX_SHOWN:
            lines.append(f"... and {len(chosen) - _MAX_SHOWN} more")
        blocks.append(lines)
    return "\n\n".join("\n".join(block) for block in blocks if block)


def format_fixed(report: CheckReport, folder: str, done: Sequence[Problem]) -> str:
    """Return what a corrected copy differs in, and what it still has, at most 80 columns wide.

    Args:
        report: What was found in the original.
        folder: The copy.
        done: Problems of the report that were corrected.
    """
    left = [problem for problem in all_problems(report) if problem not in done]
    lines = wrap(f"Corrected copy: {folder} ({_count(len(done), 'problem')} corrected).")
    lines += [
        line
        for problem in done[:_MAX_SHOWN]
        for line in wrap(f"{_where(problem)}{problem.fix} ({problem.file})", "  ")
    ]
    if len(done) > _MAX_SHOWN:
        lines.append(f"  ... and {len(done) - _MAX_SHOWN} more")
    if left:
        lines += wrap(f"Left as they are, for you to look at: {_count(len(left), 'problem')}.")
    return "\n".join(lines)


def all_problems(report: CheckReport) -> list[Problem]:
    """Return every problem of a report, errors first, otherwise in the order of the cases."""
    found = [problem for facts in report.cases.values() for problem in facts.problems]
    found += report.problems
    return sorted(found, key=lambda problem: problem.level != "error")


def num_errors(report: CheckReport) -> int:
    """Return the number of errors of a report."""
    return sum(problem.level == "error" for problem in all_problems(report))


def check_page(report: CheckReport, pictures: Mapping[str, bytes]) -> str:
    """Return a page of HTML in one piece: summary, then a row for each case, problems first.

    Args:
        report: What was found.
        pictures: Case id -> PNG; cases without one are shown without.
    """
    by_case: dict[str | None, list[Problem]] = {}
    for problem in all_problems(report):
        by_case.setdefault(problem.case, []).append(problem)
    whole = [p for case, found in by_case.items() if case not in report.cases for p in found]
    cases = sorted(report.cases, key=lambda case: _rank(by_case.get(case, [])))
    rows = [
        _row(number, case, report.cases[case], by_case.get(case, []), pictures.get(case, b""))
        for number, case in enumerate(cases)
    ]
    title = html.escape(f"Check of {report.dataset}")
    heads = ("level", "case", "picture", "problems", "image", "labels (voxels)")
    buttons = "".join(f"<th><button>{head}</button></th>" for head in heads)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
        f"<p>{html.escape(_headline(report))}</p>\n"
        + (f"<h2>The dataset as a whole</h2>\n{_problems(whole)}\n" if whole else "")
        + '<h2>Cases</h2>\n<div class="controls">'
        '<label>Find <input id="find" type="search"></label> '
        '<label>Show <select id="level"><option value="all">all cases</option>'
        '<option value="error">cases with errors</option>'
        '<option value="warning">cases with warnings only</option>'
        '<option value="good">cases without problems</option></select></label></div>\n'
        f'<div class="scroll"><table id="cases"><thead><tr>{buttons}</tr></thead><tbody>\n'
        + "\n".join(rows)
        + f"\n</tbody></table></div>\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _headline(report: CheckReport) -> str:
    problems = all_problems(report)
    bad = {p.case for p in problems if p.level == "error" and p.case is not None}
    odd = {p.case for p in problems if p.case is not None} - bad
    parts = [f"{report.dataset}: {_count(len(report.cases), 'case')}"]
    if bad:
        parts.append(f"{len(bad)} with errors")
    if odd:
        parts.append(f"{len(odd)} with warnings")
    whole = sum(problem.case is None for problem in problems)
    if whole:
        parts.append(f"{_count(whole, 'problem')} of the dataset as a whole")
    return ", ".join(parts) + (". No problem was found." if not problems else ".")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _kinds(problems: Sequence[Problem]) -> list[str]:
    """Return a table of the kinds of problems: how many cases, and which."""
    lines = [f"{'level':<9}{'problem':<{_NAME_COLUMNS}}{'found':>6}  in"]
    order = sorted(problems, key=lambda problem: (problem.level != "error", problem.code))
    for (_, code), group in groupby(order, key=lambda p: (p.level != "error", p.code)):
        found = list(group)
        cases = list(dict.fromkeys(p.case or "the dataset" for p in found))
        head = f"{found[0].level:<9}{shortened(code, _NAME_COLUMNS - 1):<{_NAME_COLUMNS}}"
        head += f"{len(found):>6}  "
        lines.append(head + _listed(cases, WIDTH - columns(head)))
    return lines


def _listed(names: Sequence[str], width: int) -> str:
    """Return as many names as fit into a width, the first one in any case."""
    for number in range(len(names), 0, -1):
        rest = f" + {len(names) - number}" if number < len(names) else ""
        text = ", ".join(names[:number])
        if columns(text + rest) <= width:
            return text + rest
    rest = f" + {len(names) - 1}" if len(names) > 1 else ""
    return shortened(names[0], width - len(rest)) + rest


def _one_of_each(problems: Sequence[Problem]) -> list[Problem]:
    """Return the first problem of each kind: warnings repeat themselves."""
    return list({problem.code: problem for problem in reversed(problems)}.values())[::-1]


def _line(problem: Problem) -> str:
    return f"{problem.level} {problem.code}: {_where(problem)}{problem.message}"


def _where(problem: Problem) -> str:
    return "" if problem.case is None else f"case {problem.case!r}: "


def _rank(problems: Sequence[Problem]) -> int:
    levels = {problem.level for problem in problems}
    return 0 if "error" in levels else 1 if levels else 2


def _row(
    number: int, case: str, facts: CaseFacts, problems: Sequence[Problem], picture: bytes
) -> str:
    level = ("error", "warning", "good")[_rank(problems)]
    words = {"error": "&#10007; error", "warning": "! warning", "good": "&#10003;"}[level]
    size = 0 if facts.shape is None else facts.shape[0] * facts.shape[1] * facts.shape[2]
    cells = [
        (str(_rank(problems)), f"<b>{words}</b>", level),
        (html.escape(case), html.escape(case), "case"),
        (str(number), _picture(case, picture), ""),
        (str(-len(problems)), _problems(problems), ""),
        (str(size), "<br>".join(map(html.escape, _image_words(facts))), "numbers"),
        (str(len(facts.labels)), "<br>".join(_label_words(facts)), "numbers"),
    ]
    inner = "".join(f'<td class="{kind}" data-key="{key}">{text}</td>' for key, text, kind in cells)
    return f'<tr data-level="{level}">{inner}</tr>'


def _problems(problems: Sequence[Problem]) -> str:
    parts = []
    for problem in problems:
        fix = f' <span class="fix">--fix {html.escape(problem.fix)}.</span>' if problem.fix else ""
        parts.append(
            f'<p class="{problem.level}"><b>{html.escape(problem.code)}</b> '
            f"{html.escape(problem.message)}{fix}</p>"
        )
    return "".join(parts)


def _image_words(facts: CaseFacts) -> Iterator[str]:
    """Yield shape, spacing, orientation and the range of each channel."""
    if facts.shape is not None:
        yield f"{' x '.join(map(str, facts.shape))} {facts.orientation}"
    if facts.spacing is not None:
        yield f"{' x '.join(f'{step:.3g}' for step in facts.spacing)} mm"
    for channel in facts.channels:
        yield f"{channel.min:.4g} to {channel.max:.4g}"


def _label_words(facts: CaseFacts) -> Iterator[str]:
    for value, number in list(facts.labels.items())[:_MAX_SHOWN]:
        yield f"{value}: {number}"
    if len(facts.labels) > _MAX_SHOWN:
        yield f"and {len(facts.labels) - _MAX_SHOWN} more"


def _picture(case: str, png: bytes) -> str:
    if not png:
        return ""
    text = base64.b64encode(png).decode("ascii")
    return f'<img loading="lazy" alt="{html.escape(case)}" src="data:image/png;base64,{text}">'
