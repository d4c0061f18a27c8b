"""The scores of POPE and CHAIR as functions of summed counts, and their intervals and paired tests.

`pope/scoring.py` and `chair/scoring.py` hold the published definitions; here the same figures are written as
functions of sums over items, which is what the statistics need. Tests hold the two against each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .power import holm, needed
from .stats import Array, Metric, Pair, Sample, mcnemar

_POPE_COLUMNS = 5  # true positive, false positive, true negative, false negative, taken for neither
_TP, _FP, _TN, _FN, _OTHER = range(_POPE_COLUMNS)
_CHAIR_COLUMNS = (
    "captions",
    "hallucinated_captions",
    "mentions",
    "hallucinated_mentions",
    "right_objects",
    "named_objects",
    "true_objects",
    "length",
    "runs",
    "repeated_runs",
)


@dataclass(frozen=True)
class Score:
    """One column of a results table.

    Attributes:
        key: name in `metrics.json`.
        title: name on the page.
        metric: sums (..., K) -> score (...).
        better: +1 when more is better, -1 when less is, 0 when neither is.
        percent: a share of 1, shown times 100.
        main: shown in the short table.
    """

    key: str
    title: str
    metric: Metric
    better: int = 1
    percent: bool = True
    main: bool = True


@dataclass(frozen=True)
class Counted:
    """The items of one benchmark and recipe as numbers: counts (N, K), the image of each item, and facts.

    `right` is (N,) whether the item is right: for CHAIR, whether the caption names nothing that is not there.
    """

    ids: list[str]
    images: list[str]
    counts: Array
    right: npt.NDArray[np.bool_]
    facts: dict[str, Any]


def ratio(above: Array, below: Array) -> Array:
    """Division where x / 0 is 0, as `pope` and `chair` have it where the published code would fail."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _f1(sums: Array) -> Array:
    tp = sums[..., _TP]
    return ratio(2 * tp, 2 * tp + sums[..., _FP] + sums[..., _FN])  # the same as 2pr / (p + r)


def _accuracy(sums: Array) -> Array:
    return ratio(sums[..., _TP] + sums[..., _TN], sums.sum(axis=-1))


def _yes_ratio(sums: Array) -> Array:
    return ratio(sums[..., _TP] + sums[..., _FP], sums.sum(axis=-1))


def _precision(sums: Array) -> Array:
    return ratio(sums[..., _TP], sums[..., _TP] + sums[..., _FP])


def _recall(sums: Array) -> Array:
    return ratio(sums[..., _TP], sums[..., _TP] + sums[..., _FN])


def _of_split(metric: Metric, place: int) -> Metric:
    columns = slice(place * _POPE_COLUMNS, (place + 1) * _POPE_COLUMNS)
    return lambda sums: metric(sums[..., columns])


def _mean(metric: Metric, splits: int) -> Metric:
    parts = [_of_split(metric, place) for place in range(splits)]
    return lambda sums: np.mean([part(sums) for part in parts], axis=0)


def pope_scores(splits: Sequence[str]) -> list[Score]:
    """POPE's scores: means over the splits (what papers print), then each split."""
    count = len(splits)
    scores = [
        Score("mean_f1", "mean F1", _mean(_f1, count)),
        Score("mean_accuracy", "mean accuracy", _mean(_accuracy, count)),
        Score("mean_yes_ratio", "mean yes ratio", _mean(_yes_ratio, count), better=0),
    ]
    named: list[tuple[str, str, Callable[[Array], Array], int, bool]] = [
        ("f1", "F1", _f1, 1, True),
        ("accuracy", "accuracy", _accuracy, 1, False),
        ("precision", "precision", _precision, 1, False),
        ("recall", "recall", _recall, 1, False),
        ("yes_ratio", "yes ratio", _yes_ratio, 0, False),
    ]
    for place, split in enumerate(splits):
        for key, title, metric, better, main in named:
            own = _of_split(metric, place)
            scores.append(Score(f"{split}.{key}", f"{title}, {split}", own, better, main=main))
    return scores


def pope_counts(
    splits: Sequence[str],
    labels: Sequence[str],
    predictions: Sequence[str],
    order: Sequence[str],
    parser: str,
) -> Array:
    """(N, 5 S) counts: item n has a single 1, in the columns of its split.

    Args:
        splits: (N,) split of each question.
        labels: (N,) "yes" or "no".
        predictions: (N,) "yes", "no" or "other".
        order: the S splits, in the order of the columns.
        parser: VLMEvalKit's counts an answer that is neither as "not yes".
    """
    counts = np.zeros((len(labels), _POPE_COLUMNS * len(order)))
    for row, (split, label, said) in enumerate(zip(splits, labels, predictions, strict=True)):
        column = _OTHER
        if said == "yes":
            column = _TP if label == "yes" else _FP
        elif said == "no":
            column = _TN if label == "no" else _FN
        elif parser == "vlmeval" and label == "yes":
            column = _FN
        counts[row, order.index(split) * _POPE_COLUMNS + column] = 1
    return counts


def _column(name: str) -> Metric:
    place = _CHAIR_COLUMNS.index(name)
    return lambda sums: sums[..., place]


def _share(above: str, below: str) -> Metric:
    first, second = _column(above), _column(below)
    return lambda sums: ratio(first(sums), second(sums))


def _chair_f1(sums: Array) -> Array:
    right, named, true = (_column(name)(sums) for name in ("right_objects", "named_objects", "true_objects"))
    return ratio(2 * right, named + true)  # the harmonic mean of right / named and right / true


def chair_scores() -> list[Score]:
    """CHAIR's scores, with recall and length beside them: saying less lowers CHAIR too.

    Repetition shows a text that degenerates: the share of runs of four words that the caption had before.
    """
    return [
        Score("chair_s", "CHAIR_S", _share("hallucinated_captions", "captions"), better=-1),
        Score("chair_i", "CHAIR_I", _share("hallucinated_mentions", "mentions"), better=-1),
        Score("recall", "recall", _share("right_objects", "true_objects")),
        Score("precision", "precision", _share("right_objects", "named_objects"), main=False),
        Score("f1", "F1", _chair_f1),
        Score("length", "length, words", _share("length", "captions"), better=0, percent=False),
        Score("repetition", "repeated runs of 4 words", _share("repeated_runs", "runs"), better=-1),
    ]


def chair_counts(rows: Sequence[Mapping[str, float]]) -> Array:
    """(N, 10) counts from one mapping per caption."""
    return np.array([[float(row[name]) for name in _CHAIR_COLUMNS] for row in rows]).reshape(
        len(rows), len(_CHAIR_COLUMNS)
    )


def measure(counted: Counted, scores: Sequence[Score], baseline: Counted | None = None) -> dict[str, Any]:
    """Every score with its 95 % interval and, with a baseline, the paired difference and its power.

    Returns:
        {"scores": {key: {"value", "low", "high", "difference": {"value", "low", "high", "p", "power":
        {"images", "items", "detectable"}}}}, "mcnemar": {"gained", "lost", "p"}, and the facts}. A score that
        is not defined has nulls. `power` (see `power.needed`: for one point, with 80 % power at 5 %) is null
        for a score that is no share and where the two never differ; its `detectable` is null where no
        difference could be seen. McNemar's test is on items, all other figures keep an image together.

    Raises:
        ValueError: there are no items, or the baseline has not the same items in the same order.
    """
    found: dict[str, Any] = {"items": len(counted.ids), "images": len(set(counted.images)), **counted.facts}
    pair: Pair | None = None
    if baseline is None:
        sample = Sample.of(counted.counts, counted.images)
    else:
        _check_paired(baseline, counted)
        found["mcnemar"] = mcnemar(baseline.right, counted.right)._asdict()
        pair = Pair.of(baseline.counts, counted.counts, counted.images)
        sample = pair.after
    found["scores"] = {}
    for score in scores:
        entry: dict[str, Any] = _nulls(sample.interval(score.metric, proportion=score.percent)._asdict())
        if pair is not None:
            entry["difference"] = _nulls(pair.difference(score.metric)._asdict())
            entry["difference"]["power"] = _power(pair, score, len(counted.ids))
        found["scores"][score.key] = entry
    return found


def correct(recipes: Mapping[str, dict[str, Any]]) -> None:
    """Fill in Holm's corrected p-values: one family is one score (or McNemar's test) over all recipes.

    Args:
        recipes: {recipe: what `measure` returns} of one benchmark. Every "difference" and "mcnemar" gets
            "p_holm", null where p is; the baseline, which has neither, is left alone.
    """
    keys = dict.fromkeys(key for found in recipes.values() for key in found["scores"])
    families = [[found["mcnemar"] for found in recipes.values() if "mcnemar" in found]]
    for key in keys:
        entries = [found["scores"][key] for found in recipes.values() if key in found["scores"]]
        families.append([entry["difference"] for entry in entries if "difference" in entry])
    for family in families:
        for test, p in zip(family, holm([test["p"] for test in family]), strict=True):
            test["p_holm"] = p


def _power(pair: Pair, score: Score, items: int) -> dict[str, Any] | None:
    if not score.percent:
        return None
    size = len(pair.before.sums)
    power = needed(pair.variance(score.metric), pair.changed(score.metric), size, items)
    if power is None:
        return None
    seen = power.detectable if power.detectable is not None and power.detectable < 1 else None
    return power._replace(detectable=seen)._asdict()  # no two shares are more than 1 apart


def _check_paired(first: Counted, second: Counted) -> None:
    if len(first.ids) != len(second.ids):
        raise ValueError(f"paired systems need the same items: {len(first.ids)} against {len(second.ids)}")
    pairs = zip(
        zip(first.ids, first.images, strict=True), zip(second.ids, second.images, strict=True), strict=True
    )
    for place, (one, other) in enumerate(pairs):
        if one != other:
            raise ValueError(
                f"paired systems need the same items in the same order: item {place} is {one} in the baseline "
                f"and {other} here"
            )


def _nulls(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(value) else value for name, value in values.items()}
