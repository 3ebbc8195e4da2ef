"""Progress bars that behave in logs."""

from __future__ import annotations

from medseg.execute import progress
from medseg.execute.progress import progress_bar


def test_in_a_log_a_bar_is_lines_now_and_then(capsys):
    with progress_bar(500, "train", shown=True, unit="step") as bar:
        for _ in range(500):
            bar.update()
    text = capsys.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert 1 <= len(lines) <= 3
    assert all(line.startswith("train:") for line in lines)
    assert "500/500" in lines[-1]
    assert all(len(line) <= 90 for line in lines)


def test_long_work_prints_in_between(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    with progress_bar(3, "preprocess", shown=True) as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    counts = [line.split("|")[2].split()[0] for line in lines]
    assert counts == sorted(counts)
    assert {"1/3", "2/3"} <= set(counts)
    assert counts[-1] == "3/3"


def test_a_hidden_bar_prints_nothing(capsys):
    with progress_bar(10, "train", shown=False) as bar:
        bar.update(10)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_a_terminal_gets_a_moving_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress_bar(4, "predict", shown=True) as bar:
        bar.update(4)
    assert "\r" in capsys.readouterr().err
