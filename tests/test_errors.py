from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from colqwen_lab.errors import BadInput, MissingRequirement, scrubbed


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no /home/anna/y, /Users/Anna/z, C:\\Users\\anna\\w", "no ~/y, ~/z, ~\\w"),
        ("'C:\\\\Users\\\\Jane Doe\\\\ckpt'", "'~\\\\ckpt'"),
        ("C:\\Users\\Jane is missing; see D:\\x", "~ is missing; see D:\\x"),
        ("C:/Users/Jane Doe/ckpt, /Users/jane doe/x", "~/ckpt, ~/x"),
        ("/home/anna is missing, see docs/x", "~ is missing, see docs/x"),
        ("https://jane:s3cret@hub/x", "https://...@hub/x"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ..."),
        ("sk-proj-0123456789abcdef AKIAIOSFODNN7EXAMPLE", "sk-... AKIA..."),
        (f"hf_{'a' * 30} github_pat_{'b' * 30}", "hf_... github_pat_..."),
        (
            "hub:Tomoro/x@6a32fb68598730bf risk-averse-but-long-name",
            "hub:Tomoro/x@6a32fb68598730bf risk-averse-but-long-name",
        ),
    ],
)
def test_text_holds_no_home_user_password_or_token(text: str, says: str) -> None:
    assert scrubbed(text) == says


@pytest.mark.parametrize(
    ("home", "text", "says"),
    [
        ("/", "/opt/x/y.so", "/opt/x/y.so"),
        ("/ann", "/annfs /ann/x /ann /ann.bak /mnt/ann/x", "/annfs ~/x ~ /ann.bak /mnt/ann/x"),
        ("/srv/anna", "'/srv/anna' is missing; in /srv/anna.", "'~' is missing; in ~."),
    ],
)
def test_this_home_is_replaced_where_it_ends(
    home: str, text: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    assert scrubbed(text) == says


def test_an_error_is_one_short_line_without_a_home() -> None:
    error = MissingRequirement(f"{Path.home()}/ckpt\nis\x1b[2J \ud800missing")
    assert str(error) == "~/ckpt is[2J missing"
    assert error._render_traceback_() == ["MissingRequirement: ~/ckpt is[2J missing"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    long = str(BadInput(f"{'x' * 10**6}; valid: y"))
    assert len(long) < 2000
    assert long.endswith("xx; valid: y")
