import pytest

from qcompile.core import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.ModelError, 3),
        (errors.DataError, 4),
        (errors.BudgetError, 5),
        (errors.VerificationError, 6),
        (errors.TargetError, 7),
        (errors.WorkerError, 8),
    ],
)
def test_exit_codes(kind: type[errors.QcompileError], code: int) -> None:
    error = kind("here", "it is so", "do this")
    assert error.exit_code == code
    assert isinstance(error, errors.QcompileError)


def test_a_message_is_one_line() -> None:
    error = errors.ModelError("a.onnx", "two\nlines  and\tspaces", "export\nagain")
    assert str(error) == "a.onnx: two lines and spaces; export again"


def test_the_parts_stay_apart() -> None:
    error = errors.DataError(7, "fact", "remedy")
    assert (error.place, error.fact, error.remedy) == ("7", "fact", "remedy")


def test_first_line_skips_blank_lines() -> None:
    assert errors.first_line(ValueError("\n\n  the fact  \nthe rest")) == "the fact"


def test_first_line_of_an_empty_error_is_its_type() -> None:
    assert errors.first_line(EOFError()) == "EOFError"


def test_first_line_is_cut() -> None:
    assert errors.first_line(ValueError("abcdefghij"), limit=5) == "abcd…"
    assert errors.first_line(ValueError("abcde"), limit=5) == "abcde"
