"""The command line as a person meets it: exit codes, one line on stderr, one document on stdout."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import colqwen_lab as lab
from colqwen_lab import cli, signals
from colqwen_lab.records import published_cells
from colqwen_lab.report_script import published_report

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The program handles signals of the whole process."""
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["colqwen-lab", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "nope",
            "commands: variants, doctor, sweep, plan, compare, fidelity, search-times, quantize",
        ),
        ("sweep --nope", "No such option: --nope"),
        ("sweep -m gptq", "model must be base, awq"),
        ("sweep --size 5b", "valid: auto, tiny, mid, 4b, 8b"),
        ("sweep --kernel nope -m W4A16 --weights random", "kernel must be auto, "),
        ("sweep --execution nope", "unknown execution 'nope'; valid: eager, fast"),
        ("sweep --protocol nope", "valid: lean, published"),
        ("sweep --workload nope", "valid: queries"),
        ("sweep --size tiny,5b", "valid: auto, tiny, mid, 4b, 8b"),
        ("sweep --on nope", "valid: here, ray"),
        ("sweep --accelerator A100", "are options of a Ray cluster, on=ray"),
        ("sweep -b 0", "must be different whole numbers"),
        ("sweep -b -1", "must be different whole numbers"),
        ("sweep -b a", "must be different whole numbers"),
        ("sweep -b 8,8", "must be different whole numbers"),
        ("sweep -m base -b 1 -o /proc/none/x.jsonl", "name a file in a folder you can write"),
        ("sweep --min-steps x", "min_steps must be a whole number, such as 0, got 'x'"),
        ("plan --card 4070", "did you mean RTX 4070?"),
        ("fidelity --data nope", "generated, vidore:NAME"),
        ("fidelity --margin 0", "margin must be above 0 and below 1"),
        ("fidelity --weights random", "random"),
        ("compare outputs/h200/card-8.jsonl", "the file holds only awq; give a second file"),
        ("compare none.jsonl published", "no records file none.jsonl"),
        ("compare LICENSE published", "is not a cell record"),
        ("compare published published --card x", "card must be memory in GB above 0"),
        ("compare published published --card RTX4071", "RTX 4070"),
        ("compare published published --card A100", "write one of A100 40GB, A100 80GB"),
        ("compare published published --card -8", "card must be memory in GB"),
        ("compare published published --markdown /proc/none/x.md", "cannot write"),
        ("compare published published --markdown /dev/null", "got a device; name another"),
        ("sweep -m base -b 1 -o /dev/null", "got a device; name another"),
        ("sweep -m base -b 1 -o .", "got a folder; name another"),
        ("compare /dev/zero published", "got a device; name another"),
        ("quantize --scheme W9A16", "unknown scheme 'W9A16'; valid: W2A16"),
        ("quantize --iters -1", "iters"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert run(monkeypatch, *arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert message in line
    assert line.startswith("colqwen-lab: ")


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (KeyboardInterrupt(), "stopped"),
        (
            KeyboardInterrupt("stopped; 1 of 2 cells on file, run again to resume"),
            "stopped; 1 of 2",
        ),
    ],
)
def test_interrupted_is_one_line_and_exit_130(
    stop: BaseException,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(**_: object) -> None:
        raise stop

    monkeypatch.setattr(lab, "sweep", interrupted)
    assert run(monkeypatch, "sweep", "-m", "base", "-b", "1") == 130
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_a_batch_system_s_signal_is_one_line_and_exit_143(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signals, "received", [])
    monkeypatch.setattr(lab, "plan", lambda **_: signal.raise_signal(signal.SIGTERM))
    assert run(monkeypatch, "plan") == 143
    assert capsys.readouterr().err == "colqwen-lab: stopped\n"


def test_a_full_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "colqwen_lab", "variants"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    reason = "cannot use standard output: No space left on device; name another place for it"
    assert done.stderr == f"colqwen-lab: {reason}\n"


def test_version_and_examples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{lab.__version__}\n"
    for command in ("sweep", "plan", "compare", "fidelity", "quantize", "train-tiny"):
        assert run(monkeypatch, command, "--help") == 0
        assert capsys.readouterr().out.count(f"  colqwen-lab {command} ") >= 1


def test_a_missing_requirement_is_one_line_and_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "sweep", "--size", "4b", "-m", "base") == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert run(monkeypatch, "sweep", "-m", str(tmp_path)) == 1
    assert "has no config.json" in capsys.readouterr().err


def test_compare_published_is_the_report_s_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "compare", "published", "published", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 2
    (place,) = document["places"]
    rows = {row["batch_size"]: row for row in place["same_batch"]}
    percents = {batch: round(row["percent"], 1) for batch, row in rows.items() if row["percent"]}
    assert percents == {8: -50.8, 16: -59.4, 32: -52.8, 64: -27.1, 128: -4.0, 256: 0.3}
    assert round(rows[8]["saving_percent"], 1) == 59.4
    base_12 = [c for c in place["cards"] if c["card_gb"] == 12 and c["side"] == "base"]
    assert [(card["batch_size"], card["items_per_s"]) for card in base_12] == [(256, 966.0)]


def test_markdown_to_stdout_and_over_its_own_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "compare", "published", "--markdown", "-") == 0
    report = capsys.readouterr().out
    assert report.startswith("## awq against base")
    assert list(tmp_path.iterdir()) == []
    rows = tmp_path / "rows.jsonl"
    rows.write_text(published_cells()[0].to_line())
    for _ in range(2):
        assert run(monkeypatch, "compare", "published", "--markdown", "report.md") == 0
    assert capsys.readouterr().err == "wrote report.md\n" * 2
    assert f"{(tmp_path / 'report.md').read_text()}\n" == report
    assert run(monkeypatch, "compare", "published", "--markdown", "rows.jsonl") == 2
    assert "rows.jsonl holds content of another kind" in capsys.readouterr().err
    assert rows.read_text() == published_cells()[0].to_line()
    assert run(monkeypatch, "compare", "published", "--markdown", "-", "--json") == 2
    assert "give --markdown - or --json, not both" in capsys.readouterr().err


def test_one_file_of_two_models_is_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for arguments in (("published",), ("published", "published")):
        assert run(monkeypatch, "compare", *arguments) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert max(map(len, shown[0].splitlines())) <= 80


def test_a_terminal_obeys_no_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = published_cells()
    odd = first.model_copy(update={"reason": "\x1b[31mred\x9b\u202e", "status": "failed"})
    results = lab.Results((odd, *others))
    monkeypatch.setattr(lab, "sweep", lambda *_, **__: results)
    assert run(monkeypatch, "sweep") == 0
    out = capsys.readouterr().out
    assert "[31mred" in out
    assert out.count("\n") > len(results)
    for shown in (out, repr(results)):
        assert all(one.isprintable() or one == "\n" for one in shown)


def test_sweep_then_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows, report = tmp_path / "rows.jsonl", tmp_path / "report.md"
    sweep = [
        "sweep",
        "-m",
        "base",
        "-m",
        "awq",
        "-b",
        "2,4",
        "-o",
        str(rows),
        "--weights",
        "random",
    ]
    assert run(monkeypatch, *sweep) == 0
    out, err = capsys.readouterr()
    assert out.count("random") == 0
    assert "awq" in out
    assert "awq eager/lean/auto batch 4: " in err
    assert (
        run(monkeypatch, "compare", str(rows), str(rows), "--card", "8", "--markdown", str(report))
        == 0
    )
    assert "## Comparison at the same batch size" in report.read_text()
    assert "AMD" not in published_report()["environment"]["gpu"]


def test_quantize_makes_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = tmp_path / "made"
    quantize = [
        "quantize",
        "--scheme",
        "w8a16",
        "--iters",
        "0",
        "--samples",
        "2",
        "--seqlen",
        "16",
        "-o",
        str(made),
    ]
    assert run(monkeypatch, *quantize) == 0
    assert "W8A16" in capsys.readouterr().out
    assert (
        run(monkeypatch, "sweep", "-m", str(made), "-b", "2", "-o", str(tmp_path / "rows.jsonl"))
        == 0
    )
    assert run(monkeypatch, *quantize) == 2
    assert "is not empty" in capsys.readouterr().err


def test_variants_and_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "variants") == 0
    assert (
        "TomoroAI/tomoro-colqwen3-embed-4b @ 6a32fb68598730bf5620fbf18d832c784235c59c"
        in capsys.readouterr().out
    )
    assert run(monkeypatch, "doctor") == 0
    out = capsys.readouterr().out
    for line in (
        "GPU",
        "torch",
        "kernel auto_round:torch_zp",
        "cache",
        "hub",
        "default size           tiny",
    ):
        assert f"\n{line}" in f"\n{out}"


@pytest.mark.parametrize(
    "code",
    [
        "import colqwen_lab",
        "from colqwen_lab.cli import app; app(['--help'], standalone_mode=False)",
        "import colqwen_lab as lab; c = lab.compare(); c.to_dict(); c.markdown()",
        "import colqwen_lab as lab; r = lab.load('published'); r.table(); r.plot()",
        "from colqwen_lab.analysis import fidelity, fidelity_plots",
    ],
)
def test_starts_without_torch(code: str) -> None:
    check = "; import sys; assert not {'torch', 'transformers', 'auto_round'} & sys.modules.keys()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code + check], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: other programs do not lengthen it much.
    spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent_s < (5 if "lab." in code or "analysis" in code else 1.5)
