from __future__ import annotations

import pytest

from colqwen_lab.measure import sweep


@pytest.fixture(autouse=True)
def undisturbed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No interference on record: a busy machine would have its cells measured again on resume."""
    if "interference" not in request.node.name:
        monkeypatch.setattr(sweep, "interference", lambda before: ([], None))
