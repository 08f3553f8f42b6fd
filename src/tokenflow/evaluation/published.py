"""Tab. 3 of the paper, to stand beside one's own figures."""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = (
    "SEEDB", "MMV", "POPE", "VQAv2", "GQA", "TQA", "AI2D", "RWQA", "MMMU", "MMB", "MME", "MME-P",
)  # fmt: skip

# Model; language model; resolution; the figures of COLUMNS, then the average; "-" where none was published.
_TAB_3 = """
InstructBLIP | Vicuna-13B        | 224| 58.8 25.6 78.9 -    49.5 50.7 -    -    -    36.0 -       1212.8  -
MiniGPT-4    | Vicuna-13B        | 224| -    -    -    -    -    -    -    -    -    -    1158.7  866.6   -
BLIP-2       | Vicuna-13B        | 224| 46.4 22.4 -    -    -    42.5 -    -    26.6 -    -       1293.8  -
ShareGPT4V   | Vicuna-7B         | 336| 69.7 37.6 -    80.6 63.3 60.4 58.0 54.9 37.2 68.8 1943.8  1567.4  -
NExT-GPT     | Vicuna-7B         | 224| 57.5 -    -    66.0 -    -    -    -    -    58.0 -       -       -
Qwen-VL-Chat | Qwen-7B           | 448| 57.7 -    -    78.2 57.5 -    -    -    -    -    1848.3  1487.5  -
Janus        | DeepSeek-LLM-1.3B | 384| 63.7 34.3 87.0 77.3 59.1 -    -    -    30.5 69.4 -       1338.0  -
LLaVA-1.5    | Vicuna-13B        | 336| 68.1 36.1 85.9 80.0 63.3 61.3 61.1 55.3 36.4 67.7 1826.7  1531.3  62.9
Gemini-Nano-1| 1.8B from scratch | -  | -    -    -    62.7 -    -    -    -    26.3 -    -       -       -
Chameleon    | 34B from scratch  | 256| -    -    -    69.6 -    -    -    -    -    -    -       -       -
LWM          | LLaMA-2-7B        | 256| -    9.6  75.2 55.8 44.8 18.8 -    -    -    -    -       -       -
SEED-LLaMA   | LLaMA-2-13B       | 224| 53.7 -    -    63.4 -    -    -    -    -    -    -       -       -
Show-o       | Phi-1.5-1.3B      | 256| -    -    80.0 69.4 58.0 -    -    -    26.7 -    -       1097.2  -
VILA-U       | LLaMA-2-7B        | 256| 56.3 27.7 83.9 75.3 58.3 48.3 -    -    -    -    -       1336.2  -
VILA-U       | LLaMA-2-7B        | 384| 59.0 33.5 85.8 79.4 60.8 60.8 -    -    -    -    -       1401.8  -
EMU3         | 8B from scratch   | 512| 68.2 37.2 85.2 75.1 60.3 64.7 70.0 57.4 31.6 58.5 1509.9* 1243.8* 60.9
TokenFlow-B  | Vicuna-13B        | 224| 60.4 22.4 84.0 70.2 59.3 49.8 54.2 49.4 34.2 55.3 1660.4  1353.6  55.2
TokenFlow-L  | Vicuna-13B        | 256| 62.6 27.7 85.0 73.9 60.3 54.1 56.6 49.2 34.4 60.3 1622.9  1365.4  57.5
TokenFlow-XL | Vicuna-13B        | 384| 68.7 40.7 86.8 77.9 62.7 61.5 66.7 53.7 38.7 68.9 1840.9  1545.9  64.0
TokenFlow-XL | Qwen-2.5-14B      | 384| 72.6 48.2 87.8 77.6 62.5 62.3 75.8 56.6 43.2 76.8 1922.2  1551.1  67.4
"""
FIRST_DISCRETE = "Gemini-Nano-1"  # the rows above it have continuous visual input


@dataclass(frozen=True)
class Row:
    """A row of Tab. 3.

    Attributes:
        figures: what was published, by column.
        average: as published.
        measured_by_the_authors: columns with an asterisk there: not in the original paper, but measured with
            lmms-eval on the released checkpoint.
    """

    model: str
    language_model: str
    resolution: str
    figures: dict[str, float]
    average: float | None
    measured_by_the_authors: tuple[str, ...]


def tab_3() -> list[Row]:
    """All rows in the paper's order."""
    rows = []
    for line in _TAB_3.strip().splitlines():
        model, language_model, resolution, text = (part.strip() for part in line.split("|"))
        *cells, average = text.split()
        by_column = dict(zip(COLUMNS, cells, strict=True))
        figures = {name: float(cell.rstrip("*")) for name, cell in by_column.items() if cell != "-"}
        starred = tuple(name for name, cell in by_column.items() if cell.endswith("*"))
        mean = None if average == "-" else float(average)
        rows.append(Row(model, language_model, resolution, figures, mean, starred))
    return rows
