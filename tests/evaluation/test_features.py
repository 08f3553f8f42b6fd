"""The kinds of features side by side, from constructed result files to verdicts on the paper's orders."""

from __future__ import annotations

import math

import pytest

from tokenflow.cli import main
from tokenflow.errors import UserError
from tokenflow.evaluation import report
from tokenflow.evaluation.features import PUBLISHED, average_of, by_features, error_of_difference, orders

# Right answers of 400, and CIDEr-D.
FIGURES = {
    "last": (300, 0.50),
    "last-semantic": (296, 0.50),
    "last-pixel": (220, 0.20),
    "all": (330, 0.60),
    "all-residual": (260, 0.40),
    "continuous": (340, 0.62),
}


def result(features: str, right: int, cider: float, **changes) -> report.Result:
    share = right / 400
    yes_no = {"accuracy": share, "F1": share, "yes share": 0.5, "questions": 400}
    captions = {"CIDEr-D": cider, "standard error": 0.01, "questions": 100}
    return {
        "kind": "questions",
        "metrics": {
            "yes-no": yes_no,
            "captions": captions,
            "average": (share + cider) / 2,
            "text": {"accuracy": 0.1, "log-likelihood": -3.0, "questions": 44},
        },
        "fingerprint": {"reference": {"sha256": "1"}},
        "model": {"name": f"chat {features}", "features": features},
        "each": {
            "yes-no": " ".join("1" if i < right else "0" for i in range(400)),
            "captions": " ".join(f"{cider + 0.1 * (-1) ** i:.3f}" for i in range(100)),
        },
        **changes,
    }


@pytest.fixture
def results() -> list[report.Result]:
    return [result(features, *figures) for features, figures in FIGURES.items()]


def test_averages_and_their_errors(results):
    average, error = average_of(results[0])
    assert average == pytest.approx((0.75 + 0.5) / 2)  # plain text is no part of it
    assert error == pytest.approx(math.hypot(math.sqrt(0.75 * 0.25 / 400), 0.01) / 2)


def test_errors_are_paired_by_question(results):
    # 4 of 400 answers differ; captions differ by nothing.
    expected = math.sqrt((4 / 400 - (4 / 400) ** 2) * 400 / 399 / 400) / 2
    assert error_of_difference(*results[:2]) == pytest.approx(expected)
    assert error_of_difference(results[0], results[0]) == 0


def test_orders_hold_or_not_or_cannot_be_told(results):
    results[1]["each"]["yes-no"] = " ".join(results[1]["each"]["yes-no"].split()[::-1])  # right elsewhere
    found = by_features(results[::-1])
    assert list(found) == list(PUBLISHED)
    verdicts = {order.name.partition(":")[0] + order.name[-9:]: order.verdict for order in orders(found)}
    assert verdicts == {
        "Tab. 1ove pixel": "holds",
        "Tab. 1 semantic": "holds",
        "Tab. 8ll scales": "does not hold",
        "Tab. 8residuals": "holds",
        "Tab. 8tic alone": "not told apart",
        "Tab. 9 discrete": "holds",
    }
    assert len(orders(by_features(results[:2]))) == 1


def test_the_command_prints_markdown(results, tmp_path, capsys):
    files = []
    for number, one in enumerate(results):
        files.append(str(tmp_path / f"{number}.json"))
        report.write(one, files[-1])
    assert main(["eval", "features", *files]) == 0
    printed = capsys.readouterr().out
    rows = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert len({len(row) for row in cells[:8]}) == 1  # a header, a line, six kinds
    assert cells[3][:5] == ["last", "75.0", "75.0", "50.0", "0.500"]
    assert cells[3][-3:] == ["1356.5", "59.9", "49.1"]
    assert cells[-1][-1] == "holds"
    assert "93.7 % are kept" in cells[-1][1]


def test_results_that_do_not_belong_are_refused(results, tmp_path, capsys):
    with pytest.raises(UserError, match="both shown 'last'"):
        by_features([results[0], results[0]])
    with pytest.raises(UserError, match="fingerprints differ"):
        by_features([results[0], result("all", 1, 0.1, fingerprint={"reference": {"sha256": "2"}})])
    with pytest.raises(UserError, match="needs a result of eval vlm"):
        by_features([result("other", 1, 0.1)])
    with pytest.raises(UserError, match="needs a result of eval vlm"):
        by_features([result("last", 1, 0.1, metrics={"accuracy": 0.5})])
    assert main(["eval", "features", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
