"""The report as files: Markdown, CSV, and one page of HTML that needs nothing else."""

import base64
import csv
import io
import shutil
from pathlib import Path

import jinja2

from prom_jax.reporting.cells import Cell, Column, Row, Table, Value
from prom_jax.reporting.comparisons import LEVEL
from prom_jax.reporting.figures import Figure
from prom_jax.reporting.runs import METHODS, Run, finite
from prom_jax.reporting.tables import Section
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import make_directory, write_text

TEMPLATES = Path(__file__).parents[1] / "resources" / "report"
# Significantly better, significantly worse than a table's reference, and than the base model.
MARKS, MARKS_OF_BASE = ("▲", "▼"), ("△", "▽")
LONGEST = 600  # characters of a prompt and of an answer to read on the page
MISSING = "–"


def write(
    out: Path, sections: list[Section], runs: list[Run], figures: list[Figure], notes: list[str], paper: dict
):
    """Writes report.md, report.html, tables/*.csv and figures/*.png.

    Raises:
      UserError: if something cannot be written.
    """
    make_directory(out)
    pictures = [
        copy(figure, out / "figures" / f"{n}-{figure.path.name}") for n, figure in enumerate(figures, 1)
    ]
    content = {
        "sections": sections,
        "runs": runs,
        "measurements": measurements(runs),
        "figures": list(zip(figures, pictures)),
        "notes": notes,
        "paper": paper,
        "with_paper": any(table.is_papers for section in sections for table in section.tables),
    }
    for name, table in csv_tables(sections, runs).items():
        write_text(out / "tables" / f"{name}.csv", as_csv(table))
    write_text(out / "report.md", render("report.md.jinja", content))
    write_text(out / "report.html", render("report.html.jinja", content))


def render(name: str, content: dict) -> str:
    """A template filled in; whatever comes from outside is escaped, in HTML as in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {
        "marks": marks,
        "few": few,
        "symbols": (MARKS, MARKS_OF_BASE),
        "missing": MISSING,
        "level": LEVEL,
    }
    environment.filters |= {"md": as_markdown_text, "data_uri": data_uri, "p": p_value, "signed": signed}
    environment.filters |= {"number": number, "cell": markdown_cell, "begin": begin, "end": end}
    return environment.get_template(name).render(content)


def copy(figure: Figure, destination: Path) -> str:
    """Copies a picture into the report's folder; returns its path from there."""
    make_directory(destination.parent)
    try:
        shutil.copyfile(figure.path, destination)
    except OSError as error:
        raise UserError(
            f"{figure.path} cannot be copied to {destination} ({error.strerror}): free some space, or give "
            "another --out"
        ) from error
    return f"{destination.parent.name}/{destination.name}"


def data_uri(path: Path) -> str:
    """A PNG as an address that holds the picture itself."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# Numbers and marks.


def number(value: float | None, digits: int = 1) -> str:
    """Such as '10.7', or a dash."""
    return MISSING if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """Such as '+2.1' or '−0.4'."""
    return "" if value is None else f"{value:+.1f}".replace("-", "−")


def p_value(value: float | None) -> str:
    """Such as '0.013' or '<0.001'."""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def marks(table: Table, value: Value) -> list[tuple[str, str]]:
    """What a value's significant differences look like, and what they say."""
    found = []
    for reference, name in table.references.items():
        if verdict := value.verdicts.get(reference):
            better, worse = MARKS_OF_BASE if name.startswith(METHODS["base"]) else MARKS
            word = "better" if verdict > 0 else "worse"
            found.append((better if verdict > 0 else worse, f"significantly {word} than {name}"))
    return found


def few(column: Column, row: Row, cell: Cell) -> str:
    """How many documents a cell has, if others of its task have more."""
    return f"n = {cell.documents}" if 0 < cell.documents < (column.documents or row.documents) else ""


def begin(text: str) -> str:
    """The first characters of a text; … says that there are more."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def end(text: str) -> str:
    """The last characters of a text; … says that there are more."""
    return text if len(text) <= LONGEST else f"… {text[-LONGEST:]}"


def markdown_cell(cell: Cell, table: Table, column: Column, row: Row) -> str:
    """Such as '10.7 / 22.5▲ (3.4* / 16.8*)'."""
    ours = " / ".join(
        number(value.ours, table.digits)
        + (f" ± {value.spread:.1f}" if value.spread is not None else "")
        + "".join(mark for mark, _ in marks(table, value)) * (not cell.borrowed)
        for value in cell.values
    )
    paper = " / ".join(number(value.paper, table.digits) for value in cell.values)
    some = any(value.paper is not None for value in cell.values)
    n = few(column, row, cell)
    flags = "\\*" * cell.zeroed + "=" * cell.borrowed
    of_paper = f" ({paper}{chr(92) + '*' if cell.paper_zeroed else ''})" * some
    return f"{ours}{flags}{of_paper}{', ' * bool(n)}{n}"


def as_markdown_text(text) -> str:
    """Text that Markdown takes as it is."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + letter if letter in "\\`*_[]|" else letter for letter in text)


# CSV.


def as_csv(rows: list[dict]) -> str:
    """Rows of the same keys, under a header."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys() if rows else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def csv_tables(sections: list[Section], runs: list[Run]) -> dict[str, list[dict]]:
    """Rows by name of the file."""
    found = {"measurements": measurements(runs)}
    for section in sections:
        for table in section.tables:
            found.setdefault(table.key, []).extend(_values(section, table))
            found.setdefault("comparisons", []).extend(
                {"base_model": section.base, "table": table.key} | vars(comparison)
                for comparison in table.comparisons
            )
    return found


def _values(section: Section, table: Table):
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells):
            for metric, value in zip(column.metrics, cell.values):
                yield {
                    "base_model": section.base,
                    "row": row.label,
                    "column": column.label,
                    "metric": metric or row.detail,
                    "ours": value.ours,
                    "spread": value.spread,
                    "seeds": cell.seeds,
                    "documents": cell.documents,
                    "paper": value.paper,
                    "zeroed": cell.zeroed,
                    "as_prom": cell.borrowed,
                    "significant": "; ".join(text for _, text in marks(table, value)),
                }


def measurements(runs: list[Run]) -> list[dict]:
    """Every score of every evaluation as results.json has it, with the standard error over documents."""
    return [
        {
            "folder": run.name,
            "base_model": run.base,
            "method": run.method,
            "language": ",".join(run.languages) or None,
            "seed": run.seed,
            "pivot": str(run.pivot or ""),
            "task": task,
            "metric": metric,
            "value": finite(entry["value"]),
            "stderr": finite(entry.get("stderr")),
            "documents": entry.get("n", content.get("n")),
        }
        for run in runs
        for task, content in run.tasks.items()
        for metric, entry in content["metrics"].items()
    ]
