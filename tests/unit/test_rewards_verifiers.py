"""What each verifier takes for right, and the registry."""

from __future__ import annotations

import fractions
import math

import pytest

from megatron_occ.rl.rewards import get_verifier, register_verifier
from megatron_occ.rl.rewards.registry import checked_score


@pytest.mark.parametrize(
    ("response", "score"), [("42", 1.0), (" 42\n", 1.0), ("42.", 0.0), ("4 2", 0.0), ("", 0.0)]
)
def test_exact(response, score):
    assert get_verifier("exact")(response, "42") == score


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("5160+02940=53550.", 1.0),
        ("5160+02940=53550.junk", 1.0),
        ("9=9=53550.", 1.0),
        ("53550.", 1.0),
        ("5160+02940=53550", 0.0),
        ("53550.=1.", 0.0),
        ("1=53550.=", 0.0),
        ("=5355.", 0.0),
        ("=535500.", 0.0),
        ("= 53550.", 0.0),
        ("=53550 .", 0.0),
        ("=107100/2.", 0.0),
        ("", 0.0),
        ("=.", 0.0),
    ],
)
def test_arithmetic(response, score):
    assert get_verifier("arithmetic")(response, "53550") == score


def test_names_of_the_package_s_own_tasks_pick_the_arithmetic_verifier():
    for name in ("reversed_multiplication", "reversed_addition", "star_paths"):
        assert get_verifier(name) is get_verifier("arithmetic")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arithmetics", "did you mean 'arithmetic'"),
        ("zzz", "known: arithmetic, .*exact, .*math"),
        ("os:system", "not the name of a verifier: use register_verifier"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        get_verifier(name)


def test_registered_function_and_path_are_found(tmp_path, monkeypatch):
    (tmp_path / "occ_own_verifiers.py").write_text(
        "def half(response, answer):\n    return 0.5\n\nconstant = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import occ_own_verifiers

    register_verifier("own half", occ_own_verifiers.half)
    register_verifier("own half", "occ_own_verifiers:half")
    assert get_verifier("own half")("r", "a") == 0.5
    with pytest.raises(ValueError, match="'own half' is taken by occ_own_verifiers:half"):
        register_verifier("own half", "occ_own_verifiers:other")
    register_verifier("own constant", "occ_own_verifiers:constant")
    with pytest.raises(ValueError, match="is not a function but int"):
        get_verifier("own constant")
    register_verifier("own missing", "occ_no_such_module:f")
    with pytest.raises(ValueError, match="occ_no_such_module"):
        get_verifier("own missing")


def test_functions_that_another_process_cannot_import_are_refused():
    def local(response: str, answer: str) -> float:
        return 1.0

    renamed = math.floor
    for function in (local, lambda r, a: 1.0, fractions.Fraction(1, 2)):
        with pytest.raises(ValueError, match="top level of a module"):
            register_verifier("own bad", function)
    register_verifier("own floor", renamed)
    local.__module__ = "__main__"
    with pytest.raises(ValueError, match="defined in the script that runs"):
        register_verifier("own bad", local)
    for name, path in (("", "m:f"), ("a:b", "m:f"), ("own bad", "m"), ("own bad", ":f")):
        with pytest.raises(ValueError, match=r"':'|module:function"):
            register_verifier(name, path)


@pytest.mark.parametrize(("value", "score"), [(True, 1.0), (0, 0.0), (0.25, 0.25), (-1, -1.0)])
def test_finite_numbers_are_scores(value, score):
    assert checked_score(value) == score


@pytest.mark.parametrize("value", [None, "1.0", math.nan, math.inf, 1j, [1.0]])
def test_anything_else_is_not(value):
    with pytest.raises(ValueError, match="the verifier returned"):
        checked_score(value)
