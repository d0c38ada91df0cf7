"""Conclusions from the numbers of a table: sentences chosen by conditions on the numbers."""

from __future__ import annotations

import operator
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

OTHERWISE = "otherwise"
"""The condition of the last sentence, which is used if no other condition holds."""

_NUMBERS = {
    **dict.fromkeys(("student", "teacher", "gap", "minutes"), ("mean",)),
    **dict.fromkeys(("gain", "validation_gain"), ("mean", "low", "high")),
    **dict.fromkeys(("time", "epochs", "rate"), ()),
}
"""The numbers of a row that a conclusion may name, and the statistics of each of them."""

_SAMPLE = SimpleNamespace(
    **{
        name: SimpleNamespace(**dict.fromkeys(statistics, 1.0)) if statistics else 1.0
        for name, statistics in _NUMBERS.items()
    }
    | {"epochs": 1}
)
"""The numbers of a row, with any values, by which the forms in sentences are tried."""

_COMPARED = ("gain", "validation_gain", "time")
"""Those of `_NUMBERS` that compare a row with another row."""

_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}

_COMPARISON = re.compile(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*(-?[\d.]+)\s*")


@dataclass(frozen=True)
class Conclusion:
    """A conclusion: several sentences with conditions, of which the first true one is used.

    Conditions compare numbers of rows with constants, such as
    ``gpd.gain.low > 0 and gpd.time < 2``. A conclusion is worth nothing if it cannot turn out
    otherwise; so there has to be a last sentence for all other cases.

    Args:
        sentences: sentences by their conditions, the last one under `OTHERWISE`; numbers of rows
            are written in braces, such as ``{gpd.gain}`` or ``{gpd.gap.mean:.1f}``.
        topic: the situation in which a reader needs the conclusion, as text after "if"; conclusions
            with a topic are also shown in the README.

    Raises:
        ValueError: when there is no condition, no sentence for other cases, when a condition or a
            number cannot be read, when several numbers are given the form of one, or when a number
            cannot have the form that it is given.

    Example:
        >>> conclusion = Conclusion({"a.epochs > 20": "{a.epochs} are many.", "otherwise": "Few."})
        >>> conclusion.rows()
        ['a']
    """

    sentences: Mapping[str, str]
    topic: str | None = None

    def __post_init__(self) -> None:
        """Check that conditions and sentences can be read."""
        conditions = list(self.sentences)
        if len(conditions) < 2 or conditions[-1] != OTHERWISE:
            raise ValueError(
                f"a reading needs a sentence under a condition and a last one under "
                f"{OTHERWISE!r}, and one has {conditions}"
            )
        for path in self._paths():
            _, *names = path.split(".")
            if not names or names[0] not in _NUMBERS or names[1:] not in _allowed(names[0]):
                raise ValueError(
                    f"a reading names the number {path!r}; numbers are ROW.NAME with "
                    f"{', '.join(_NUMBERS)}, and of some of them .mean, .low or .high"
                )
        for sentence in self.sentences.values():
            for _, path, form, _ in string.Formatter().parse(sentence):
                name = (path or "").rpartition(".")[2]
                if form and _NUMBERS.get(name):
                    raise ValueError(
                        f"a reading gives the form {form!r} to {path!r}, which is several numbers; "
                        f"name one of them, such as {path}.mean"
                    )
            try:
                sentence.format(**dict.fromkeys(self.rows(), _SAMPLE))
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise ValueError(
                    f"the sentence {sentence!r} of a reading cannot be printed: {error}"
                ) from error

    def rows(self) -> list[str]:
        """Keys of the rows whose numbers the conclusion needs."""
        return list(dict.fromkeys(path.split(".")[0] for path in self._paths()))

    def compared(self) -> list[str]:
        """Keys of the rows of which the conclusion needs a comparison with another row."""
        found = (path.split(".") for path in self._paths())
        return list(dict.fromkeys(key for key, name, *_ in found if name in _COMPARED))

    def say(self, summaries: Mapping[str, object]) -> str | None:
        """The first sentence whose condition holds, with its numbers filled in.

        Args:
            summaries: summaries by key of the row.

        Returns:
            The sentence; None if a number is not known that the conditions up to this sentence, or
            the sentence itself, need.
        """
        for condition, sentence in self.sentences.items():
            true = _holds(condition, summaries)
            if true is None:
                return None
            if true:
                known = all(_look_up(path, summaries) is not None for path in _in_braces(sentence))
                return sentence.format(**summaries) if known else None
        return None

    def _paths(self) -> Iterator[str]:
        for condition, sentence in self.sentences.items():
            yield from (path for path, _, _ in _comparisons(condition))
            yield from _in_braces(sentence)


def _allowed(name: str) -> list[list[str]]:
    return [[], *([part] for part in _NUMBERS[name])]


def _comparisons(condition: str) -> list[tuple[str, str, float]]:
    """The comparisons of a condition, each as name of a number, comparison sign and constant.

    Raises:
        ValueError: when the condition cannot be read.
    """
    if condition == OTHERWISE:
        return []
    found = [_COMPARISON.fullmatch(part) for part in condition.split(" and ")]
    if None in found:
        raise ValueError(
            f"the condition {condition!r} is none; write NUMBER > CONSTANT, joined by 'and'"
        )
    return [(match[1], match[2], float(match[3])) for match in found if match is not None]


def _holds(condition: str, summaries: Mapping[str, object]) -> bool | None:
    """Whether a condition holds; None if a number is not known."""
    results = []
    for path, sign, constant in _comparisons(condition):
        value = _look_up(path, summaries)
        if value is None:
            return None
        # Of a spread or a gain, the mean is compared.
        results.append(_COMPARISONS[sign](getattr(value, "mean", value), constant))
    return all(results)


def _look_up(path: str, summaries: Mapping[str, object]) -> object | None:
    """A number of a row; None if the row or the number is not known.

    Args:
        path: name of the number, such as ``gpd.gain.low``.
        summaries: summaries by key of the row.
    """
    key, *names = path.split(".")
    value = summaries.get(key)
    for name in names:
        value = getattr(value, name, None)
    return value


def _in_braces(sentence: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(sentence) if field]
