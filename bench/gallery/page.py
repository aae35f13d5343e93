"""docs/gallery.md: every picture, what is seen, what was measured, and the code that makes it."""

from collections.abc import Sequence

from bench.gallery.drawing import Picture, Table

OPENING = """# Gallery

Every picture is of a real run, and every number below was written by the program that ran it:
`make gallery` trains what is not yet kept under `.eqm/bench`, samples, measures, draws, and writes
this page. The same machine and the same versions give the same bytes. Step sizes, thresholds and
pairs of digits were chosen by hand; samples were not: seeds are 0, 1, 2, ..., and digits are the
first ones held out.

Digits are the 8 x 8 pixel images of scikit-learn; nothing was trained on those that are held out.
"SVC" is a support vector classifier fitted on the pixels of the training digits, which has no part
in the models.
"""


def markdown(pictures: Sequence[Picture]) -> str:
    """The page."""
    return "\n".join([OPENING, *map(_section, pictures)])


def _section(picture: Picture) -> str:
    parts = [
        f"## {picture.title}",
        f"![{picture.title}](gallery/{picture.name}.png)",
        picture.seen,
        _table(picture.table),
        f"```python\n{picture.code}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    head, *rows = (f"| {' | '.join(row)} |" for row in (table.head, *table.rows))
    rule = "|---" + "|--:" * (len(table.head) - 1) + "|"
    return "\n".join([head, rule, *rows])
