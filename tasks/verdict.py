"""What a result means, in one plain sentence, and what should make a reader doubt it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import sqrt

from tasks.summary import Row, Spread, digits, percent, size, span, times

NARROWED = 0.9


def verdict(rows: Sequence[Row], kind: str, images: int) -> str:
    """Size, speed and accuracy of the last model against dense. `kind` is mask, cut or none; zeros imply no speed."""
    dense, last = rows[0], rows[-1]
    if kind == "none":
        return f"Nothing was pruned: {_accuracy(rows, images)}."
    gain = _size(dense, last)
    if kind == "mask":
        smaller = last.bytes < dense.bytes_unpacked
        opening = f"{'Smaller' if smaller else 'No smaller'} file, same speed on plain runtimes: {gain}"
    else:
        opening = f"{gain[0].upper()}{gain[1:]} and {_speed(dense, last)}"
    return f"{opening}; {_accuracy(rows, images)}."


def warnings(rows: Sequence[Row], kind: str, classes: int, images: int, rounds: int = 1) -> list[str]:
    """Sentences for a reader who would otherwise trust the figures too much. rounds: in which was cut; of several none
    starts from the pruned model."""
    found = list(_harmed(rows, images))
    dense, last = rows[0], rows[-1]
    pruned = next((row for row in rows if row.name == "pruned" and rounds == 1), None)
    if _is_at_chance(dense, classes):
        found.append("The dense model itself is at chance on these images: labels, preprocessing or weights are wrong.")
    elif pruned is not None and _is_at_chance(pruned, classes):
        found.append(
            "Right after pruning the model was at chance, which leaves little to heal from. "
            "A smaller budget that leaves the pruned model above chance heals better."
        )
    if dense.bytes < NARROWED * dense.bytes_unpacked:
        found.append(_narrow(dense, last))
    if kind != "none" and last.bytes >= dense.bytes_unpacked:
        found.append(
            "The weights file did not get smaller"
            + (": packing does not pay at this sparsity." if kind == "mask" else ".")
        )
    return found


def _is_at_chance(row: Row, classes: int) -> bool:
    """Whether top-1 says no more than guessing does: half as much again as the chance level, or five points."""
    return row.top1 is not None and classes > 1 and row.top1 <= min(1.5 / classes, 1 / classes + 0.05)


def _narrow(dense: Row, last: Row) -> str:
    """How the dense file is less than the network in memory, and what that means for the sizes here."""
    said = (
        "The dense weights are exact in float16, so their file is narrower than the network in memory; a healer that "
        "trains gives what it trains full precision."
        if dense.nonzeros > NARROWED * dense.parameters
        else "The dense weights are stored without their zeros; what is cut or trained anew may need them again."
    )
    by, unit = size(max(dense.bytes, last.bytes))
    files = f"{digits(dense.bytes / by)} to {digits(last.bytes / by)} {unit}"
    larger = f" The files themselves go from {files}." if last.bytes >= dense.bytes else ""
    return f"{said} Sizes are compared with dense in full precision.{larger}"


def _harmed(rows: Sequence[Row], images: int) -> Iterator[str]:
    """Healers that took the model further from dense, by more than two standard errors of the difference."""
    for before, after in pairwise(row for row in rows if row.name != "dense"):
        if before.agreement is None or after.agreement is None:
            continue
        share = (before.agreement + after.agreement) / 2
        if before.agreement - after.agreement > 2 * sqrt(2 * share * (1 - share) / images):
            yield (
                f'Healing from "{before.name}" to "{after.name}" did harm: agreement with dense fell from '
                f"{percent(before.agreement, images)} to {percent(after.agreement, images)} %. Leave that healer out "
                "of healing.methods, or lower its lr."
            )


def _size(dense: Row, last: Row) -> str:
    change = 1 - last.bytes / dense.bytes_unpacked
    against = " than dense in full precision" if dense.bytes < NARROWED * dense.bytes_unpacked else ""
    return f"the weights file is {100 * abs(change):.0f} % {'smaller' if change >= 0 else 'larger'}{against}"


def _speed(dense: Row, last: Row) -> str:
    ratios = {batch: last.speedup(dense, batch) for batch in sorted(dense.latency.keys() & last.latency.keys())}
    measured = {batch: ratio for batch, ratio in ratios.items() if ratio is not None}
    if not measured:
        return "speed was not measured"
    if all(ratio.low <= 1 <= ratio.high for ratio in measured.values()):
        spreads = ", ".join(f"batch of {batch}: {_spread(ratio)}" for batch, ratio in measured.items())
        return f"speed did not measurably change ({spreads})"
    return ", ".join(f"a batch of {batch} runs {_paced(ratio)} ({_spread(ratio)})" for batch, ratio in measured.items())


def _paced(ratio: Spread) -> str:
    if ratio.low <= 1 <= ratio.high:
        return "no measurably faster"
    return "measurably faster" if ratio.median > 1 else "measurably slower"


def _spread(ratio: Spread) -> str:
    return f"{times(ratio.median)}, {span(ratio, lambda value: f'{value:.2f}')} between quartiles"


def _accuracy(rows: Sequence[Row], images: int) -> str:
    dense, last = rows[0], rows[-1]
    before = next((row for row in rows if row.name == "pruned"), last)
    if last.top1 is not None and dense.top1 is not None:
        gap = last.top1 - dense.top1
        side = "the same as" if gap == 0 else f"{percent(abs(gap), images)} points {'below' if gap < 0 else 'above'}"
        shown = f"top-1 is {percent(last.top1, images)} %, {side} dense"
        return (
            shown
            if before.top1 in (None, last.top1)
            else f"{shown}, from {percent(before.top1, images)} % before healing"
        )
    if last.agreement is None:
        return "accuracy was not measured"
    rise = ""
    if before.agreement is not None and before.agreement != last.agreement:
        rise = f", from {percent(before.agreement, images)} % before healing"
    shown = f"it agrees with the dense model on {percent(last.agreement, images)} % of the images{rise}"
    return f"{shown} (no labels, so top-1 is unknown)"
